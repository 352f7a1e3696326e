"""XLNet: two streams equal to transformers', targets that nothing reads, permuted examples, and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_params import random_params

import jaxlm
from jaxlm import CausalLM, Classification, DataConfig, MaskedLM, ModelConfig, PermutedLM, RunConfig, UserError
from jaxlm.config import Seq2Seq, TokenizerConfig
from jaxlm.data.corpus import Corpus
from jaxlm.data.corrupt import Draws, prediction_order
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices.sharding import Placement
from jaxlm.families import PRESETS
from jaxlm.lm import LM
from jaxlm.nn.masks import permutation_masks
from jaxlm.nn.stack import Targets
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.tasks.permuted import PermutedLMTask

SMALL = {"vocabulary": 320, "max_length": 64, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
XLNET = replace(PRESETS["xlnet-base"], **SMALL, dropout=0.0, attention_dropout=0.0)
TEXT = [f"Line {n} is here. It speaks of {n * n} things! Does it? Yes, the {n % 7} of them." for n in range(120)]


def permutation(lengths: np.ndarray, T: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random orders [B, T] with this number of targets in each row, and the places of the targets."""
    random, order_BT = np.random.default_rng(0), np.zeros((len(lengths), T), np.int32)
    for order_T, length in zip(order_BT, lengths):
        order_T[random.permutation(length)[:targets]] = 1 + np.arange(targets)
    return order_BT, np.argsort(order_BT == 0, axis=1, kind="stable")[:, :targets]


def streams(module, params, tokens_BT, segments_BT, types_BT, order_BT, places_BQ):
    """Returns the logits of the query stream [B, Q, V] and the content stream [B, T, V]."""
    mask_BTS, mask_BQS = permutation_masks(order_BT, segments_BT, places_BQ)
    inputs = tokens_BT, segments_BT, None, types_BT
    queries = apply(module, params, *inputs, mask_BTS=mask_BTS, targets=Targets(places_BQ, mask_BQS))
    content = apply(module, params, *inputs, mask_BTS=mask_BTS)
    return tuple(apply(module, params, x, method="lm") for x in (queries, content))


def embedded_streams(module, params, x_BTD, segments_BT, order_BT, places_BQ):
    """Returns the hidden states of both streams, as a function of the embeddings of the tokens."""
    mask_BTS, mask_BQS = permutation_masks(order_BT, segments_BT, places_BQ)
    targets, (B, T) = Targets(places_BQ, mask_BQS), segments_BT.shape
    zeros = jnp.zeros((B, T), jnp.int32)
    both_BND, inputs = apply(module, params, zeros, segments_BT, method="embed", mask_BTS=mask_BTS, targets=targets)
    queries = apply(module, params, jnp.concatenate([x_BTD, both_BND[:, T:]], 1), inputs, method="stack")
    return queries, apply(module, params, x_BTD, inputs._replace(targets=None), method="stack")


def test_no_token_reads_itself_or_what_the_permutation_hides():
    """The gradient of each output by each embedding is 0 exactly where the order of prediction hides the token."""
    T, Q = 7, 3
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 0]])
    order = jnp.asarray([[0, 2, 1, 0, 1, 0, 0]])
    places = jnp.asarray([[1, 2, 4]])
    params = jax.device_put(random_params(XLNET))
    x_BTD = jax.random.normal(jax.random.key(1), (1, T, 16))
    states = partial(embedded_streams, Transformer(XLNET), params)
    queries, content = jax.jit(jax.jacrev(lambda x: states(x, segments, order, places)))(x_BTD)
    reads = lambda jacobian: np.abs(np.asarray(jacobian)).sum((2, 3, 5))[0] > 0  # [outputs, inputs]
    assert queries.shape == (1, Q, 16, 1, T, 16)
    read_by_target, read_by_token = reads(queries), reads(content)
    order, segments = np.asarray(order[0]), np.asarray(segments[0])
    for q, place in enumerate([1, 2, 4]):
        expected = (segments == segments[place]) & (order < order[place])
        assert read_by_target[q].tolist() == expected.tolist()
    for place in range(6):
        expected = (segments == segments[place]) & ((order <= order[place]) | (np.arange(T) == place))
        assert read_by_token[place].tolist() == expected.tolist()


def test_both_streams_of_packed_examples_equal_those_of_single_ones():
    lengths, T = [5, 6, 3], 16
    random, params = np.random.default_rng(0), jax.device_put(random_params(XLNET))
    of_rows = jax.jit(partial(streams, Transformer(XLNET), params))
    fields = {name: np.zeros((1, T), np.int32) for name in ("tokens", "segments", "types", "order")}
    start, places = 0, []
    for n, length in enumerate(lengths):
        at = np.s_[0, start : start + length]
        fields["tokens"][at], fields["segments"][at] = random.integers(0, 320, length), n + 1
        fields["types"][at], fields["order"][at] = random.integers(0, 3, length), permutation([length], length, 2)[0]
        places += [start + place for place in np.flatnonzero(fields["order"][at])]
        start += length
    names = "tokens", "segments", "types", "order"
    packed = of_rows(*(fields[name] for name in names), np.array([places]))
    start = 0
    for n, length in enumerate(lengths):
        own = np.s_[:, start : start + length]
        single = {name: array[own] for name, array in fields.items()} | {"segments": np.ones((1, length), np.int32)}
        of_example = np.array([places[2 * n : 2 * n + 2]]) - start
        queries, content = of_rows(*(single[name] for name in names), of_example)
        np.testing.assert_allclose(packed[0][:, 2 * n : 2 * n + 2], queries, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(packed[1][own], content, atol=2e-5, rtol=1e-5)
        start += length


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=6), st.floats(0.02, 0.95), st.integers(1, 8), st.integers(0, 99)
)
def test_orders_count_the_targets_of_each_text_and_depend_on_it_alone(lengths, rate, longest, seed):
    lengths = np.array(lengths)
    numbers = 100 + np.arange(len(lengths))
    options = {"rate": rate, "longest": longest}
    together = prediction_order(lengths, Draws((seed,), numbers), **options)
    for n, order in enumerate(np.split(together, np.cumsum(lengths)[:-1])):
        assert sorted(order[order > 0]) == list(range(1, (order > 0).sum() + 1))
        assert 1 <= (order > 0).sum() <= rate * len(order) + 1
        alone = prediction_order(lengths[n : n + 1], Draws((seed,), numbers[n : n + 1]), **options)
        assert alone.tolist() == order.tolist()


def test_a_sixth_is_predicted_in_spans_of_equally_likely_lengths_and_in_any_order():
    order = prediction_order(np.full(40, 3000), Draws((0,), np.arange(40)), rate=1 / 6, longest=5).reshape(40, 3000)
    assert (order > 0).mean() == pytest.approx(1 / 6, rel=0.01)
    starts = np.flatnonzero(np.diff((order > 0).ravel(), prepend=False))
    spans = np.bincount(np.diff(starts)[::2])  # spans that touch count as one, which is rare
    assert all(0.17 < count / spans[1:6].sum() < 0.23 for count in spans[1:6])
    assert abs(np.corrcoef(order[order > 0], np.nonzero(order)[1])[0, 1]) < 0.02
    assert (np.corrcoef((order > 0).mean(0)[:2990].reshape(-1, 10).mean(1), np.arange(299))[0, 1]) < 0.2


def frame(text: list[int]) -> SimpleNamespace:
    """Returns a tokenizer that frames texts as XLNet's: text <sep> <cls>."""
    add = lambda ids: ([*ids, 4, 3], [*[0] * len(ids), 0, 2], [0])
    return SimpleNamespace(add_special_tokens=add, max_text_tokens=lambda length, pair: length - 2)


def test_examples_are_framed_texts_that_change_with_each_epoch():
    corpus = Corpus(np.arange(10, 50).astype(np.uint16), np.array([0, 1, 12, 40]), np.arange(4), 1)
    examples = PermutedLMTask(PermutedLM(), 16, 0, frame([])).examples(corpus, True)
    features = lambda n: examples.epoch(n).features(np.arange(len(examples.spans))).split()
    first, again, later = features(0), features(0), features(1)
    assert [f["tokens_BT"].tolist() for f in first] == [f["tokens_BT"].tolist() for f in later]
    assert [f["order_BT"].tolist() for f in first] == [f["order_BT"].tolist() for f in again]
    assert [f["order_BT"].tolist() for f in first] != [f["order_BT"].tolist() for f in later]
    assert first[0]["tokens_BT"].tolist() == [10, 4, 3] and first[0]["types_BT"].tolist() == [0, 0, 2]
    assert first[0]["order_BT"].tolist() == [1, 0, 0]
    assert all((f["order_BT"][-2:] == 0).all() and (f["order_BT"] > 0).any() for f in first)
    text = [token for f in first for token in f["tokens_BT"][:-2].tolist()]
    assert text == list(range(10, 50))


def test_memory_is_the_text_of_the_same_document_before_a_piece():
    corpus = Corpus(np.arange(10, 50).astype(np.uint16), np.array([0, 1, 1, 12, 40]), np.arange(5), 1)
    examples = PermutedLMTask(PermutedLM(memory=5), 12, 0, frame([])).examples(corpus, True)
    epoch = examples.epoch(0)
    features = epoch.features(np.arange(len(examples.spans))).split()
    assert [len(f["order_BT"]) for f in features] == epoch.lengths.tolist() and epoch.lengths.max() == 12
    memory = [f["tokens_BT"][f["order_BT"] < 0].tolist() for f in features]
    text = [f["tokens_BT"][(f["order_BT"] < 0).sum() : -2].tolist() for f in features]
    assert text == [
        [10],
        *(list(range(n, min(n + 5, 22))) for n in (11, 16, 21)),
        *([*range(n, min(n + 5, 50))] for n in range(22, 50, 5)),
    ]
    starts = [piece[0] for piece in text]
    firsts = [10, 11, 11, 11, *[22] * 6]
    assert memory == [list(range(max(first, start - 5), start)) for first, start in zip(firsts, starts)]
    alone = PermutedLMTask(PermutedLM(), 7, 0, frame([])).examples(corpus, True)
    without = alone.epoch(0).features(np.arange(len(alone.spans))).split()
    assert [f["order_BT"][f["order_BT"] >= 0].tolist() for f in features] == [f["order_BT"].tolist() for f in without]


def test_a_text_reads_its_memory_which_has_no_gradient_and_does_not_read_the_text():
    T, M, places = 9, 4, jnp.asarray([[5, 7]])
    order, segments = jnp.asarray([[-1] * M + [0, 2, 0, 1, 0]]), jnp.ones((1, T), jnp.int32)
    module, params = Transformer(XLNET), jax.device_put(random_params(XLNET))
    mask_BTS, mask_BQS = permutation_masks(order, segments, places)
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 10, 11, 12, 13]])
    targets = Targets(places, mask_BQS, order < 0)
    x_BND, inputs = apply(module, params, tokens, segments, method="embed", mask_BTS=mask_BTS, targets=targets)
    queries = lambda x_BND: apply(module, params, x_BND, inputs, method="stack")
    gradient_TD = jax.grad(lambda x: (queries(x) ** 2).sum())(x_BND)[0, :T]
    assert not gradient_TD[:M].any() and gradient_TD[M].any() and gradient_TD[7].any()
    other_memory, other_text = x_BND.at[:, 1].add(1.0), x_BND.at[:, M].add(1.0)
    assert np.abs(queries(other_memory) - queries(x_BND)).min() > 0
    content = lambda x_BND: apply(module, params, x_BND[:, :T], inputs._replace(targets=None), method="stack")
    np.testing.assert_array_equal(content(other_text)[:, :M], content(x_BND)[:, :M])


def test_every_target_of_a_full_row_is_counted():
    task = PermutedLMTask(PermutedLM(rate=0.4, max_span=3), 64, 0, frame([]))
    sizes = np.array([1, 1, 5, 9, 30, 16, 40, 63])
    corpus = Corpus(np.arange(sizes.sum()).astype(np.uint16), np.cumsum([0, *sizes]), np.arange(len(sizes) + 1), 1)
    batches = task.batches(corpus, 2, 64, 0)
    for n in range(20):
        batch = batches.batch_at(n)
        _, weights_BQ, labels_BQ = task._targets(batch)
        assert float(weights_BQ.sum()) == float(task.weights(batch)["loss"]) > 0
        assert labels_BQ.shape == (2, task.targets)


def run_of(folder, model=XLNET, task=None, **fields) -> RunConfig:
    (folder / "text.txt").write_text("\n".join(TEXT))
    data = DataConfig(path=str(folder / "text.txt"), length=40, cache=str(folder / "cache"), documents="line")
    base = {"model": model, "task": task or PermutedLM(), "data": data, "tokenizer": TokenizerConfig(train="wordpiece")}
    return RunConfig(**base | {"batch": 8, "steps": 4, "workdir": str(folder / "run"), "sample_tokens": 0} | fields)


@pytest.mark.usefixtures("devices", "no_plots")
@pytest.mark.long
def test_a_pre_trained_model_is_exported_and_fine_tuned(tmp_path):
    lm = jaxlm.fit(run_of(tmp_path))
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert np.isfinite(scores["loss"]) and 0 <= scores["accuracy"] <= 1
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert (exported["model_type"], exported["architectures"]) == ("xlnet", ["XLNetLMHeadModel"])
    rows = [{"text": line, "label": n % 2} for n, line in enumerate(TEXT[:24])]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(path=str(tmp_path / "rows.jsonl"), length=40, cache=str(tmp_path / "cache"))
    run = RunConfig(None, Classification(), data, init=str(tmp_path / "run"), steps=2, workdir=str(tmp_path / "tuned"))
    tuned = jaxlm.fit(replace(run, batch=4))
    assert tuned.config.classes_from == "last" and tuned.config.heads_on_top == ("classes",)
    np.testing.assert_array_equal(tuned.params["embeddings"]["query"], lm.params["embeddings"]["query"])  # unused


NO_STREAM = replace(XLNET, query_stream=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": CausalLM()}, "a model with a query stream is trained with PermutedLM: change the task"),
        ({"task": MaskedLM()}, "a model with a query stream is trained with PermutedLM: change the task"),
        ({"task": Seq2Seq()}, "the model is an encoder and cannot generate text"),
        ({"model": NO_STREAM}, "PermutedLM reads a query stream: set --model.query-stream"),
        ({"model": replace(PRESETS["bert-base"], **SMALL)}, "PermutedLM needs a(n) encoder with the heads ('lm',)"),
        ({"model": replace(PRESETS["gpt2"], **SMALL)}, "PermutedLM needs a(n) encoder with the heads ('lm',)"),
        ({"task": PermutedLM(rate=0.0)}, "task.rate is 0.0"),
        ({"task": PermutedLM(max_span=0)}, "task.max_span is 0"),
        ({"task": PermutedLM(memory=-1)}, "task.memory is -1"),
        ({"task": PermutedLM(memory=38)}, "task.memory is 38, which leaves no space for a text in a row of 40 tokens"),
        ({"tokenizer": TokenizerConfig(train="bpe")}, "train one with --tokenizer.train wordpiece"),
    ],
)
def test_bad_input_is_refused(fields, message, tmp_path):
    if isinstance(fields.get("task"), Seq2Seq):
        rows = [json.dumps({"source": line, "target": line}) for line in TEXT]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        fields = fields | {"data": DataConfig(path=str(tmp_path / "rows.jsonl"), cache=str(tmp_path / "cache"))}
    with pytest.raises(UserError) as error:
        jaxlm.fit(run_of(tmp_path, **fields))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "message"),
    [(CausalLM(), "structure decoder"), (MaskedLM(), "needs the head masked_lm")],
    ids=["causal", "masked"],
)
def test_continued_pre_training_names_the_objective_of_the_model(task, message, tmp_path):
    tokenizer = tokenizers.train(TEXT, TokenizerConfig(train="wordpiece"), 320)
    jaxlm.save(LM(XLNET, Transformer(XLNET), random_params(XLNET), tokenizer), tmp_path / "model")
    with pytest.raises(UserError) as error:
        jaxlm.fit(run_of(tmp_path, None, task, init=str(tmp_path / "model"), tokenizer=TokenizerConfig()))
    assert message in str(error.value) and "use configs/adapt.py permuted" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "decoder"}, "it is for encoders only"),
        ({"kv_heads": 1}, "model.kv_heads is 1"),
        ({"width": 15, "heads": 3}, "make it even"),
        ({"conv_width": 3}, "conv_width is 3"),
        ({"front_end": "own"}, "front_end 'own'"),
        ({"relative": "none"}, "model.query_stream is True, but model.relative is 'none'"),
        ({"relative": "none", "query_stream": False}, "model.types_in is 'attention'"),
    ],
)
def test_invalid_models_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        replace(XLNET, **changes).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "uni"}, "only 'bi' is supported"),
        ({"bi_data": True}, "only False is supported"),
        ({"summary_type": "mean"}, "summary_type 'mean'"),
        ({"d_head": 5}, "d_head must be d_model / n_head"),
    ],
)
def test_other_variants_of_the_format_are_refused(change, message, tmp_path):
    jaxlm.save(LM(XLNET, Transformer(XLNET), random_params(XLNET)), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        jaxlm.load(tmp_path / "model")
    assert message in str(error.value)


def test_a_limit_of_distances_makes_far_tokens_equal():
    """With a limit of 2, the outputs for the last token do not depend on the order of the tokens further away."""
    config: ModelConfig = replace(XLNET, relative_distance=2, layers=1)
    module, params = Transformer(config), jax.device_put(random_params(config))
    last = lambda tokens: apply(module, params, jnp.asarray([tokens]))[0, -1]
    np.testing.assert_allclose(last([5, 6, 7, 8, 9, 1]), last([7, 5, 6, 8, 9, 1]), atol=1e-5)
    assert np.abs(last([5, 6, 7, 8, 9, 1]) - last([5, 6, 7, 9, 8, 1])).max() > 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("clamp", [-1, 4])
def test_both_streams_equal_those_of_transformers(tmp_path, clamp):
    """Logits of both streams are within 1e-5, for rows of different lengths, types and an odd number of targets."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 41, "d_model": 18, "n_layer": 3, "n_head": 3, "d_inner": 20, "clamp_len": clamp}
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    lm, random, T, Q = jaxlm.load(tmp_path), np.random.default_rng(0), 13, 3
    lengths = np.array([T, 7, 4])
    order_BT, places_BQ = permutation(lengths, T, Q)
    tokens, types = random.integers(6, 41, (3, T)), random.integers(0, 3, (3, T))
    real = (np.arange(T) < lengths[:, None]).astype(np.int32)
    hidden = (order_BT[:, None] > 0) & (order_BT[:, None] >= order_BT[:, :, None])
    inputs = {"attention_mask": real, "perm_mask": hidden, "target_mapping": np.eye(T)[places_BQ]}
    inputs = {name: torch.tensor(x).float() for name, x in inputs.items()}
    inputs |= {"input_ids": torch.tensor(tokens), "token_type_ids": torch.tensor(types)}
    with torch.no_grad():
        queries = model(**inputs).logits.numpy()
        del inputs["target_mapping"]
        content = model(**inputs).logits.numpy()
    ours = streams(lm.module, lm.params, tokens, real, types, order_BT, places_BQ)
    np.testing.assert_allclose(ours[0], queries, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(ours[1])[real > 0], content[real > 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parity
def test_a_text_with_memory_equals_the_second_segment_of_transformers(tmp_path):
    """Logits of both streams are within 1e-5 of those with the cached states of the first segment (`mems`)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    M, T, Q = 6, 9, 3
    sizes = {"vocab_size": 41, "d_model": 18, "n_layer": 3, "n_head": 3, "d_inner": 20, "mem_len": M}
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    lm, random = jaxlm.load(tmp_path), np.random.default_rng(0)
    order_BT, places_BQ = permutation(np.array([T, T]), T, Q)
    tokens = random.integers(6, 41, (2, M + T))
    hidden = (order_BT[:, None] > 0) & (order_BT[:, None] >= order_BT[:, :, None])
    inputs = {"perm_mask": torch.tensor(hidden).float(), "input_ids": torch.tensor(tokens[:, M:])}
    targets = {"target_mapping": torch.tensor(np.eye(T)[places_BQ]).float()}
    with torch.no_grad():
        mems = model(torch.tensor(tokens[:, :M]), use_mems=True).mems
        expected = [model(**inputs, **more, mems=mems).logits.numpy() for more in (targets, {})]
    rows = np.concatenate([np.full((2, M), -1), order_BT], 1)
    ones = np.ones_like(rows)
    queries, content = streams(lm.module, lm.params, tokens, ones, 0 * ones, rows, places_BQ + M)
    np.testing.assert_allclose(queries, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(content[:, M:], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 2, 3, 1)], ids=str)
def test_a_sharded_gradient_equals_an_unsharded_one(shape):
    """The number of targets, 9, is a multiple of no axis."""
    config = replace(XLNET, heads=6, width=24)
    task = PermutedLMTask(PermutedLM(memory=3), 24, 0, frame([])).replace_fields(targets=9)
    sizes = np.array([5, 7, 9, 14, 22, 3, 4, 22, 10, 8])
    corpus = Corpus(np.arange(sizes.sum()).astype(np.uint16), np.cumsum([0, *sizes]), np.arange(len(sizes) + 1), 1)
    batch = {name: jnp.asarray(array) for name, array in task.batches(corpus, 2, 24, 0).batch_at(0).items()}
    params = jax.device_put(random_params(config))

    def gradient(module):
        loss = lambda params: task.losses(module, params, batch, None)[0]["loss"][0]
        return jax.jit(jax.value_and_grad(loss))(params)

    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor", "context"))
    expected, found = gradient(Transformer(config)), gradient(Transformer(config, Placement(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), found, expected)
