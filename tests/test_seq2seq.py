"""Text-to-text tasks: properties of every generative architecture, then files, scores, conversations and bad input."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from random_params import random_params

from jaxlm import Chat, DataConfig, Decoding, Seq2Seq, TokenizerConfig, UserError
from jaxlm.data import source
from jaxlm.data.batches import Batches, Epoch
from jaxlm.data.chat import rendering
from jaxlm.data.formats.lines import Place
from jaxlm.data.joined import join
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.families import PRESETS
from jaxlm.inference.generate import generate
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.run.evaluate import run_eval
from jaxlm.run.step import make_eval_step
from jaxlm.tasks.cells import Records
from jaxlm.tasks.chat import ChatTask
from jaxlm.tasks.seq2seq import Seq2SeqTask

T, S, ROWS, V = 20, 28, 3, 300
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps", "London", "Anna")
SMALL = {"vocabulary": V, "max_length": 64, "width": 16, "layers": 2, "heads": 2, "head_width": None, "mlp_width": 32}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0, "heads_on_top": ("lm",)}
MODELS = {
    "t5": replace(PRESETS["t5-small"], **SMALL, decoder_layers=3, start_token=0),
    "bart": replace(PRESETS["bart-base"], **SMALL, decoder_layers=1, start_token=3),
    "mbart": replace(PRESETS["mbart-large"], **SMALL, decoder_layers=2),
    "marian": replace(PRESETS["opus-mt"], **SMALL, decoder_layers=2, start_token=0),
    "gpt2": replace(PRESETS["gpt2"], **SMALL),
    "llama": replace(PRESETS["llama-7b"], **SMALL, kv_heads=1),
    "prefix": replace(PRESETS["gpt2"], **SMALL, prefix_lm=True),
    "separate": replace(PRESETS["t5-small"], **SMALL, start_token=0, decoder_tokens=True, decoder_vocabulary=V - 10),
}
ENCODER_DECODERS = [name for name, model in MODELS.items() if model.structure == "encoder_decoder"]
close = partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)


@lru_cache
def tokenizer(add_eos: bool):
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 12)) for _ in range(40)]
    return tokenizers.train(texts, TokenizerConfig(train="bpe"), V, add_eos=add_eos)


@lru_cache
def separate_tokenizers():
    """Returns a tokenizer of sources, with another tokenizer of targets."""
    random = np.random.default_rng(0)
    sources = [" ".join(random.choice(WORDS, 12)) for _ in range(40)]
    config = TokenizerConfig(train="bpe", separate=True)
    return tokenizers.train_both(sources, [line.upper() for line in sources], config, (V, V - 10))


def tokenizer_of(model: str):
    return separate_tokenizers() if model == "separate" else tokenizer(model in ENCODER_DECODERS)


def task_of(model: str, length: int = T, **fields) -> Seq2SeqTask:
    decoding = Decoding(temperature=0.0, max_new_tokens=7)
    task = Seq2SeqTask(Seq2Seq(source_length=S, decoding=decoding, **fields), length, 0, tokenizer_of(model), ())
    return task.bind(MODELS[model])


def records(lengths, seed: int = 0):
    random = np.random.default_rng(seed)
    text = lambda n: " ".join(random.choice(WORDS, n))
    rows = [{"source": text(n), "target": text(m)} for n, m in lengths]
    return [Seq2SeqTask.read(Seq2Seq(), row, Place("rows", n)) for n, row in enumerate(rows, start=1)]


LENGTHS = ((5, 1), (1, 6), (9, 3), (2, 2), (4, 4), (7, 5), (1, 1), (3, 2))


@lru_cache
def compiled(model: str):
    config, task = MODELS[model], task_of(model)
    module, params = Transformer(config), random_params(config)

    def loss(params, batch):
        return task.losses(module, params, batch, None)[0]["loss"]

    return task, params, jax.jit(make_eval_step(task, module)), jax.jit(jax.value_and_grad(loss, has_aux=True))


def batches_of(task, records):
    return task.batches(Records(records, []), ROWS, task.length, None)


def split_rows(batch, k):
    return {name: x.reshape(k, -1, *x.shape[1:]) for name, x in batch.items()}


@pytest.mark.parametrize("model", MODELS)
def test_losses_of_packed_examples_equal_those_of_single_examples(model):
    task, params, step, _ = compiled(model)
    examples = records(LENGTHS)
    batches = batches_of(task, examples)
    assert batches.rows_in_epoch < len(examples)  # some examples share rows
    together = run_eval(step, params, batches, split_rows).losses
    separate = [run_eval(step, params, batches_of(task, [record]), split_rows).losses for record in examples]
    for name, total in together.items():
        close(total, np.sum([losses[name] for losses in separate], 0))


QUICK = ("t5", "gpt2", "prefix")


@pytest.mark.parametrize("model", [pytest.param(m, marks=() if m in QUICK else pytest.mark.long) for m in MODELS])
def test_no_example_attends_to_another(model):
    """Uses the gradient of one example's loss by the embedding of each token. All tokens, also of sources, differ."""
    task, params, _, gradient = compiled(model)
    batch = dict(batches_of(task, records(LENGTHS)).batch_at(0))
    batch["tokens_BT"] = np.arange(ROWS * T, dtype=np.int32).reshape(ROWS, T)
    sides = {"tokens_BT": "segments_BT"}
    if model in ENCODER_DECODERS:
        batch["source_tokens_BS"] = ROWS * T + np.arange(ROWS * S, dtype=np.int32).reshape(ROWS, S)
        sides["source_tokens_BS"] = "source_segments_BS"
    for b in range(ROWS):
        for e in range(1, int(batch["segments_BT"][b].max()) + 1):
            own = {side: (np.arange(ROWS) == b)[:, None] & (batch[of] == e) for side, of in sides.items()}
            single = batch | {"weights_BT": batch["weights_BT"] * own["tokens_BT"].astype(np.float32)}
            grads = gradient(params, single)[1]
            for side in sides:
                is_separate = side == "tokens_BT" and MODELS[model].decoder_tokens
                table = "decoder_embeddings" if is_separate else "embeddings"
                by_VD = grads[table]["tokens"]
                if MODELS[model].tied_embeddings and is_separate == MODELS[model].decoder_tokens:
                    by_VD = by_VD - head_gradient(model, table)(params, single)  # the head reads every token
                by_token = np.asarray(by_VD)[batch[side]]
                assert np.abs(by_token[~own[side]]).max(initial=0) < 1e-6
                assert np.abs(by_token[own[side]]).max() > 1e-6


@lru_cache
def head_gradient(model: str, table: str):
    """Returns a compiled function from (params, batch) to the gradient by the embeddings in the head."""
    task = task_of(model)
    module = Transformer(MODELS[model])

    def loss(embeddings_VD, params, batch):
        x_BTD = jax.lax.stop_gradient(states(module, params, batch))
        changed = params | {table: params[table] | {"tokens": embeddings_VD}}
        return task.losses_from_states(module, changed, x_BTD, batch, None)[0]["loss"][0]

    return jax.jit(lambda params, batch: jax.grad(loss)(params[table]["tokens"], params, batch))


def states(module, params, batch):
    from jaxlm.tasks.states import hidden_states

    return hidden_states(module, params, batch, None)[0]


@pytest.mark.parametrize("model", MODELS)
def test_only_the_target_has_weights(model):
    """Each target token and the end token are counted once. The tokens before the target are not counted."""
    task = task_of(model)
    examples = records(LENGTHS)
    batch = batches_of(task, examples).batch_at(0)
    answers = task.answers(examples)
    assert all(answer[-1] == task.end for answer in answers)
    assert batch["weights_BT"].sum() <= sum(map(len, answers))
    for b in range(ROWS):
        for e in range(1, int(batch["segments_BT"][b].max()) + 1):
            learned = (batch["segments_BT"][b] == e) & (batch["weights_BT"][b] > 0)
            assert batch["labels_BT"][b][learned].tolist() in answers
    if model in ENCODER_DECODERS:
        first_tokens = batch["tokens_BT"][(batch["positions_BT"] == 0) & (batch["segments_BT"] > 0)]
        assert set(first_tokens.tolist()) == {task.end if task.start is None else task.start}


def has_gradient(task, model: str, batch):
    """Returns whether the loss has a gradient by the hidden state at each position, as [B, T]."""
    module, params = Transformer(MODELS[model]), compiled(model)[1]

    def loss(x_BTD):
        return task.losses_from_states(module, params, x_BTD, batch, jax.random.key(0))[0]["loss"][0]

    return np.abs(jax.grad(loss)(states(module, params, batch))).max(-1) > 0


@pytest.mark.parametrize("model", ["gpt2", "llama", "prefix"])
def test_a_prompt_has_no_gradient(model):
    task = task_of(model, label_smoothing=0.1)
    examples = records(LENGTHS)
    batch = batches_of(task, examples).batch_at(0)
    learned_BT = has_gradient(task, model, batch)
    assert (learned_BT == (batch["weights_BT"] > 0)).all()
    answers = task.answers(examples)
    for b in range(ROWS):
        for e in range(1, int(batch["segments_BT"][b].max()) + 1):
            assert batch["labels_BT"][b][learned_BT[b] & (batch["segments_BT"][b] == e)].tolist() in answers


def test_a_prefix_attends_to_the_whole_prefix_and_to_no_later_token():
    task, params, _, _ = compiled("prefix")
    module = Transformer(MODELS["prefix"])
    batch = dict(batches_of(task, records([(6, 1)])).batch_at(0))
    batch["tokens_BT"] = np.arange(ROWS * T, dtype=np.int32).reshape(ROWS, T)
    prompt = int(batch["prefix_BT"][0].sum())
    assert 6 <= prompt < T and (np.diff(batch["prefix_BT"][0]) <= 0).all()

    def state(embeddings_VD, t):
        changed = params | {"embeddings": params["embeddings"] | {"tokens": embeddings_VD}}
        return states(module, changed, batch)[0, t].sum()

    by_token = lambda t: np.abs(jax.grad(state)(params["embeddings"]["tokens"], t))[batch["tokens_BT"][0]].max(-1)
    first, later = by_token(0), by_token(prompt)
    assert first[:prompt].min() > 1e-6 and first[prompt:].max() == 0
    assert later[: prompt + 1].min() > 1e-6 and later[prompt + 1 :].max(initial=0) == 0


@pytest.mark.parametrize(
    "model",
    ["prefix", pytest.param("separate", marks=pytest.mark.long), pytest.param("marian", marks=pytest.mark.long)],
)
def test_generated_tokens_are_the_most_likely_tokens_of_a_packed_batch(model):
    """Greedily generated texts, as targets, are the most likely token at every position of a packed batch."""
    config, task, params = MODELS[model], task_of(model, 64), compiled(model)[1]
    lm = LM(config, Transformer(config), params, task.tokenizer)
    prompts = task.prompts(records(LENGTHS))
    decoding = Decoding(temperature=0.0, max_new_tokens=7)
    found = generate(lm, prompts, decoding, stop_tokens=(), return_tokens=True)
    make = task._one_stack if task.source_length is None else task._two_stacks
    examples = [make(prompt, ids) for prompt, ids in zip(prompts, found)]

    class Examples:
        fields, labels = task.fields, 0

        def epoch(self, n):
            lengths = lambda name: np.array([len(example[name]) for example in examples])
            sources = None if task.source_length is None else lengths("source_tokens_BS")
            return Epoch(lengths("tokens_BT"), lambda units: join([examples[i] for i in units]), None, sources)

    batches = Batches(Examples(), ROWS, 64, task.max_examples, None, task.source_length)
    assert batches.rows_in_epoch < len(examples)
    for step in range(len(batches)):
        batch = batches.batch_at(step)
        logits_BTV = apply(lm.module, params, states(lm.module, params, batch), method="lm")
        limit_V = np.where(np.arange(config.V) < lm.vocabulary, 0.0, -np.inf)
        learned = batch["weights_BT"] > 0
        assert learned.any()
        assert (np.asarray(logits_BTV + limit_V).argmax(-1) == batch["labels_BT"])[learned].all()


def test_separate_vocabularies_are_saved_and_loaded(tmp_path):
    tokenizer = separate_tokenizers()
    assert (tokenizer.size, tokenizer.target.size) == (V, V - 10)
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.encode_with_special_tokens(["the dog"]) == tokenizer.encode_with_special_tokens(["the dog"])
    assert (
        again.target.encode_with_special_tokens(["THE DOG"])
        == tokenizer.target.encode_with_special_tokens(["THE DOG"])
        != tokenizer.encode_with_special_tokens(["THE DOG"])
    )


def test_texts_longer_than_the_positions_are_refused_before_the_run():
    task = Seq2SeqTask(Seq2Seq(), T, 0, tokenizer(False), ())
    with pytest.raises(UserError, match="max_new_tokens is 128, and the model has 64 positions; lower it to 63"):
        task.bind(MODELS["gpt2"])


def test_long_texts_are_truncated_and_keep_their_end():
    long = records([(60, 60)])
    for model in ("t5", "gpt2"):
        task = task_of(model, label_smoothing=0.1)
        [[[example]]] = task.features(long, True)
        assert len(example["tokens_BT"]) == T == len(example["labels_BT"])
        if model == "t5":
            assert len(example["source_tokens_BS"]) == S and example["source_tokens_BS"][-1] == task.end
        assert example["labels_BT"][-1] == task.end


def write(folder, name, lines):
    data = "".join(f"{line}\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    return str(folder / name)


def test_aligned_files_are_read_as_rows(tmp_path):
    a = write(tmp_path, "a.en.gz", ["one", "", "three words here", "four"])
    b = write(tmp_path, "a.de", ["eins", "", "drei Wörter hier", "vier"])
    data = DataConfig(path=a, text="source", target_path=b)
    rows = list(source.rows(a, data, "", target_path=b))
    assert [row for _, row in rows] == [
        {"source": "one", "target": "eins"},
        {"source": "three words here", "target": "drei Wörter hier"},
        {"source": "four", "target": "vier"},
    ]
    assert [place.line for place, _ in rows] == [1, 3, 4]


def test_files_of_different_lengths_are_refused_with_the_first_different_line(tmp_path):
    random = np.random.default_rng(0)
    sizes = random.integers(1, 60, 40)
    a = write(tmp_path, "a", ["x" * n for n in sizes])
    b = write(tmp_path, "b", ["y" * n for i, n in enumerate(sizes) if i != 17])
    for one, other in ((a, b), (b, a)):
        with pytest.raises(UserError) as error:
            list(source.rows(one, DataConfig(text="source"), "", target_path=other))
        assert all(part in str(error.value) for part in ("has 40", "has 39", "from line 18"))


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"source": "a", "target": " "}, {}, "rows:1: column 'target' is empty"),
        ({"source": "", "target": "b"}, {}, "--task.empty drop"),
        ({"src": "a", "target": "b"}, {}, "there is no column 'source'; the columns are 'src', 'target'"),
        ({"source": 5, "target": "b"}, {}, "holds int 5, not text"),
        ({"source": "a", "target": ["b", 3]}, {}, "holds int 3, not text"),
    ],
)
def test_bad_rows_are_refused(row, fields, message):
    with pytest.raises(UserError) as error:
        Seq2SeqTask.read(Seq2Seq(**fields), row, Place("rows", 1))
    assert message in str(error.value)
    if "empty" in message:
        assert Seq2SeqTask.read(Seq2Seq(empty="drop"), row, Place("rows", 1)) is None


def test_sentences_are_joined_and_targets_are_not():
    record = Seq2SeqTask.read(Seq2Seq(), {"source": ["One.", "Two."], "target": ["a", "b"]}, Place("rows", 1))
    assert record == {"source": "One. Two.", "label": ("a", "b")}


NESTED = {"id": 1, "translation": {"en": "a fox", "de": "ein Fuchs"}}


def test_a_dot_names_an_entry_of_a_column():
    """Data sets of translations on the hub have such columns."""
    read = lambda **fields: Seq2SeqTask.read(Seq2Seq(**fields), NESTED, Place("rows", 1))
    both = {"source": "a fox", "label": ("ein Fuchs",)}
    assert read(source="translation.en", target="translation.de") == both
    assert read(source="translation.en", target="translation.yo") == {"source": "a fox"}
    empty = {"translation": {"en": None}}  # the entry exists and has no text
    with pytest.raises(UserError, match=r"column 'translation.en' is empty"):
        Seq2SeqTask.read(Seq2Seq(source="translation.en"), empty, Place("rows", 1))
    with pytest.raises(UserError, match=r"no column 'translation.fr'.* are 'id', 'translation.en', 'translation.de'"):
        read(source="translation.fr")


@pytest.mark.filterwarnings("ignore")  # tfds and its imports print warnings
@pytest.mark.parametrize("nested", [False, True])
def test_translations_of_tfds_are_read(nested, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pair = tfds.features.Translation(("en", "yo"))
    rows = [{"en": "good morning", "yo": "ẹ káàárọ̀"}, {"en": "thank you", "yo": "ẹ ṣé"}]

    class TinyPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"translation": pair}) if nested else pair
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate({"translation": row} if nested else row for row in rows)

    builder = TinyPairs(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    prefix = "translation." if nested else ""
    task = Seq2Seq(source=f"{prefix}en", target=f"{prefix}yo")
    found = source.rows(str(builder.data_path), DataConfig(text=task.source), "train")
    records = [Seq2SeqTask.read(task, row, place) for place, row in found]
    assert sorted(record["label"][0] for record in records) == sorted(row["yo"] for row in rows)
    assert "tensorflow" not in sys.modules


# Conversations

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TALKS = [
    {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]},
    {
        "messages": [
            {"role": "system", "content": "quick"},
            {"role": "user", "content": "over"},
            {"role": "assistant", "content": "lazy</s>dog"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "Anna sleeps"},
        ]
    },
]


def chat_of(length: int = 80, **fields) -> ChatTask:
    fields |= {"template": CHATML, "decoding": Decoding(max_new_tokens=32)}
    task = ChatTask(Chat(**fields), length, 0, tokenizer(False), ())
    return task.bind(MODELS["llama"])


def test_only_the_answers_of_the_assistant_have_weights():
    task = chat_of()
    read = [ChatTask.read(Chat(), row, Place("rows", n)) for n, row in enumerate(TALKS)]
    words = task.tokenizer
    for record, answers in zip(read, (["a dog"], ["lazy</s>dog", "Anna sleeps"])):
        [[[example]]] = list(task.features([record], True))
        learned = example["labels_BT"][example["weights_BT"] > 0].tolist()
        assert words.decode(learned) == "".join(answers)
        assert learned.count(words.eos) == len(answers) and learned[-1] == words.eos
    [[[last]]] = list(chat_of(last_answer_only=True).features(read[1:], True))
    assert words.decode(last["labels_BT"][last["weights_BT"] > 0]) == "Anna sleeps"
    [[[truncated]]] = list(chat_of(8).features(read[1:], True))
    assert len(truncated["tokens_BT"]) == 8 and truncated["labels_BT"][-1] == words.encode("\n")[-1]


@pytest.mark.parametrize("last_answer_only", [False, True])
def test_only_the_answers_of_the_assistant_have_gradients(last_answer_only):
    task = chat_of(last_answer_only=last_answer_only)
    read = [ChatTask.read(Chat(), row, Place("rows", n)) for n, row in enumerate(TALKS)]
    batch = task.batches(Records(read, []), len(read), task.length, None).batch_at(0)
    learned_BT = has_gradient(task, "llama", batch)
    assert (learned_BT == (batch["weights_BT"] > 0)).all()
    answers = {"a dog", "Anna sleeps"} if last_answer_only else {"a dog", "lazy</s>dogAnna sleeps"}
    in_talk = lambda n: learned_BT & (batch["segments_BT"] == n)
    talks = range(1, batch["segments_BT"].max() + 1)
    learned = [labels_T[of_T].tolist() for n in talks for labels_T, of_T in zip(batch["labels_BT"], in_talk(n))]
    assert {task.tokenizer.decode(ids) for ids in learned} == answers


def test_a_prompt_ends_where_the_answer_begins():
    task = chat_of()
    read = [ChatTask.read(Chat(), row, Place("rows", n)) for n, row in enumerate(TALKS)]
    for record, prompt in zip(read, task.prompts(read)):
        [[[example]]] = list(task.features([record], True))
        whole = [example["tokens_BT"][0], *example["labels_BT"]]
        assert whole[: len(prompt)] == prompt
        assert task.tokenizer.decode(whole[len(prompt) :]).startswith(record["label"])
    assert task.stop_tokens == (task.tokenizer.eos,)
    question = ChatTask.read(Chat(), {"messages": TALKS[0]["messages"][:1]}, Place("rows", 1))
    assert "label" not in question and task.prompts([question]) == task.prompts(read[:1])


def test_questions_and_answers_are_conversations():
    task = Chat(question="q", answer="a", system="quick", compared=r"#### (\S+)")
    record = ChatTask.read(task, {"q": "the", "a": "so #### 12"}, Place("rows", 1))
    assert [message["role"] for message in record["messages"]] == ["system", "user", "assistant"]
    chat_task = ChatTask(task, 40, 0, tokenizer(False), ())
    assert chat_task.score([record] * 2, [{"prediction": "#### 3 or #### 12"}, {"prediction": "12"}])["exact"] == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "column 'messages' holds 'hello', not a list of"),
        ({"messages": []}, "--task.question and --task.answer"),
        ({"talk": []}, "there is no column 'messages'; the columns are 'talk'"),
        (
            {"messages": [{"content": "x"}]},
            "in column 'messages', message 0 is {'content': 'x'}; give a dict with a role",
        ),
        ({"messages": ["x"]}, "message 0 is 'x'"),
        ({"messages": {"role": "user", "content": "x"}}, "not a list of"),
        ({"conversations": []}, "column 'conversations' holds [], not a list of"),
        ({"conversations": [{"from": "humn", "value": "x"}]}, "message 0 is from 'humn'; perhaps you meant 'human'"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "a lone surrogate, U+D83D"),
    ],
)
def test_invalid_conversations_are_refused(row, message):
    with pytest.raises(UserError) as error:
        ChatTask.read(Chat(), row, Place("rows", 1))
    assert message in str(error.value)


def test_conversations_of_other_formats_are_read():
    sharegpt = [{"from": "human", "value": "the"}, {"from": "gpt", "value": "dog"}]
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "dog"}]
    system = [{"role": "system", "content": "quick"}]
    read = lambda row: ChatTask.read(Chat(), row, Place("rows", 1))
    expected = {"messages": messages, "label": "dog"}
    assert (
        read({"conversations": sharegpt})
        == read({"conversation": sharegpt})
        == read({"messages": sharegpt})
        == expected
    )
    assert read({"messages": json.dumps(messages)}) == read({"messages": np.array(messages)}) == expected
    assert read({"conversations": sharegpt, "system": "quick"})["messages"] == system + messages
    assert read({"conversations": [{"from": "system", "value": "quick"}, *sharegpt]})["messages"] == system + messages
    parts = [
        messages[0],
        {"role": "assistant", "content": [{"type": "text", "text": "do"}, {"type": "text", "text": "g"}]},
    ]
    assert read({"messages": parts})["label"] == "dog"
    examples = list(chat_of().features([read({"messages": parts}), read({"conversations": sharegpt})], True))
    assert (examples[0][0][0]["tokens_BT"] == examples[1][0][0]["tokens_BT"]).all()


@pytest.mark.long
@pytest.mark.usefixtures("devices", "no_plots")
def test_a_chat_run_learns_answers_and_exports_its_template(tmp_path):
    import jaxlm
    from jaxlm import OptimizerConfig, RunConfig

    lines = [json.dumps({"q": f"the {word}", "a": word}) for word in WORDS[:4]] * 50
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    tokenizer(False).save(tmp_path / "words")
    run = RunConfig(
        model=replace(MODELS["llama"], width=32, initial_std=0.1),
        task=Chat(question="q", answer="a", template=CHATML, decoding=Decoding(temperature=0.0, max_new_tokens=8)),
        data=DataConfig(path=str(tmp_path / "talk.jsonl"), length=64),
        tokenizer=TokenizerConfig(path=str(tmp_path / "words")),
        optimizer=OptimizerConfig(rate=1e-2, weight_decay=0.0),
        batch=8,
        epochs=5,
        workdir=str(tmp_path / "run"),
    )
    jaxlm.fit(run)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["exact"] > 0.9
    lm = jaxlm.load(tmp_path / "run")
    assert rendering.render(lm.tokenizer, [{"role": "user", "content": "x"}]) == "<s>user\nx</s>\n"
    [row] = jaxlm.predict(lm, [{"q": "the fox"}], task=run.task)
    assert row["prediction"] == "fox"
