"""Local attention with global tokens: in blocks as in whole rows, packed as unpacked, and only where it should be."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, Classification, QuestionAnswering, Seq2Seq, UserError
from jaxlm.config import MeshConfig, ModelConfig
from jaxlm.devices import sharding
from jaxlm.families import FAMILIES, PRESETS
from jaxlm.hub import safetensors
from jaxlm.nn import windows
from jaxlm.nn.dot_product import Scores, WeightDropout, dot_product_attention
from jaxlm.nn.global_tokens import global_tokens
from jaxlm.nn.masks import self_mask
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.nn.windows import Heads, windowed_attention

B, T, WINDOW = 2, 300, 5  # five blocks of 64 queries; the last one is padded


def segments(random: np.random.Generator) -> np.ndarray:
    """Returns rows of several examples with padding between and after them."""
    lengths = random.integers(1, 90, (B, 12))
    numbers = np.concatenate([np.repeat(np.arange(1, 13), row)[:T] for row in lengths]).reshape(B, T)
    numbers[:, -7:] = 0
    return numbers.astype(np.int32)


def heads(random: np.random.Generator, K: int = 2) -> Heads:
    draw = lambda H: jnp.asarray(random.standard_normal((B, T, H, 4)), jnp.float32)
    return Heads(draw(4), draw(K), draw(K))


def whole_rows(rows: Heads, of_global: Heads | None, segments_BT: Any, global_BT: Any, scores: Scores) -> jax.Array:
    mask_BTS = self_mask(segments_BT, False, WINDOW, None, global_BT)
    out_BTHC = dot_product_attention(*rows, mask_BTS, scores)
    if of_global is None:
        return out_BTHC
    of_global_BTHC = dot_product_attention(*of_global, mask_BTS, scores)
    return jnp.where(global_BT[..., None, None], of_global_BTHC, out_BTHC)


@pytest.mark.parametrize(
    ("share", "slots"),
    [(None, 0), (0.0, 16), (0.03, 16), (0.03, 3), (1.0, 16)],
    ids=["local", "none", "few", "many", "all"],
)
def test_attention_in_blocks_equals_that_of_whole_rows(share, slots):
    """Values and gradients, for packed rows, grouped queries, a soft cap, and any number of global tokens."""
    random = np.random.default_rng(0)
    segments_BT = jnp.asarray(segments(random))
    rows, of_global, direction = heads(random), heads(random), heads(random).q_BTHC
    global_BT = None if share is None else jnp.asarray(random.random((B, T)) < share) & (segments_BT > 0)
    of_global = None if share is None else of_global
    scores = Scores(0.5, 3.0)
    # The outputs of padding have no meaning.
    direction = jnp.where(segments_BT[..., None, None] > 0, direction, 0)

    def in_blocks(rows: Heads, of_global: Heads | None) -> jax.Array:
        return windowed_attention(rows, of_global, segments_BT, WINDOW, global_BT, scores, WeightDropout(), slots)

    def product(attend: Any, *some: Any) -> jax.Array:
        return (attend(*some) * direction).sum()

    expected = partial(whole_rows, segments_BT=segments_BT, global_BT=global_BT, scores=scores)
    real = np.asarray(segments_BT) > 0
    values = [np.asarray(jax.jit(attend)(rows, of_global))[real] for attend in (in_blocks, expected)]
    np.testing.assert_allclose(*values, atol=2e-6)
    gradients = [
        jax.jit(jax.grad(partial(product, attend), (0, 1)))(rows, of_global) for attend in (in_blocks, expected)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, atol=5e-6, rtol=1e-5), *gradients)


SMALL: dict[str, Any] = {"vocabulary": 40, "max_length": T, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
SMALL |= {"dropout": 0.0, "attention_dropout": 0.0, "window": WINDOW, "padding_token": None}
LONGFORMER = replace(PRESETS["longformer-base-4096"], **SMALL)
LOCAL = replace(PRESETS["modernbert-base"], **SMALL, layer_kinds=("local",))


def test_the_rules_define_the_global_tokens_of_each_example():
    tokens_BT = np.array([[7, 8, 2, 9, 7, 2, 2, 8, 9, 9, 1, 1], [7, 8, 9, 9, 2, 7, 7, 2, 9, 2, 2, 8]])
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]])
    of_rule = lambda rule: global_tokens(tokens_BT, segments_BT, replace(LONGFORMER, global_tokens=rule))
    found = {rule: of_rule(rule) for rule in ("first", "question", "none")}
    assert found["none"] is None
    places = lambda mask_BT: [np.flatnonzero(row).tolist() for row in np.asarray(mask_BT)]
    assert places(found["first"]) == [[0, 4, 8], [1, 5]]
    assert places(found["question"]) == [[0, 1, 4], [1, 2, 3, 5, 6]]  # the third example has no separator
    by_head = lambda *heads: replace(LONGFORMER, heads_on_top=heads).global_rule
    assert [by_head(head) for head in ("classes", "span", "tokens", "masked_lm")] == [
        "first",
        "question",
        "none",
        "none",
    ]


def examples_of(config: ModelConfig, random: np.random.Generator) -> list[np.ndarray]:
    """Returns the tokens of examples whose rows are long enough for blocks; token 2 is a separator."""
    return [random.integers(0, config.vocabulary, n).astype(np.int32) for n in (T, 150, 90, 40, 7, 1)]


@pytest.mark.parametrize(
    "rule", ["first", pytest.param("none", marks=pytest.mark.long), pytest.param("question", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("slots", [pytest.param(2, marks=pytest.mark.long), 64])
def test_packed_rows_equal_single_rows(monkeypatch, rule, slots):
    """Global attention is confined to the example, whatever the number of global tokens of the row."""
    monkeypatch.setattr(windows, "slots_of", lambda config: slots)
    config = replace(LONGFORMER, global_tokens=rule)
    examples = examples_of(config, np.random.default_rng(0))
    module, params = Transformer(config), random_params(config)
    rows = [[0], [1, 2, 3, 4, 5]]
    batch = np.zeros((3, 2, T), np.int32)
    for row, numbers in enumerate(rows):
        tokens = np.concatenate([examples[n] for n in numbers])
        batch[0, row, : len(tokens)] = tokens
        batch[1, row, : len(tokens)] = np.repeat(np.arange(len(numbers)) + 1, [len(examples[n]) for n in numbers])
        batch[2, row, : len(tokens)] = np.concatenate([np.arange(len(examples[n])) for n in numbers])
    packed_BTD = np.asarray(jax.jit(partial(apply, module))(params, *batch))
    for row, numbers in enumerate(rows):
        for slot, n in enumerate(numbers, start=1):
            alone_1TD = apply(module, params, examples[n][None])
            np.testing.assert_allclose(packed_BTD[row][batch[1, row] == slot], alone_1TD[0], atol=2e-5)


def test_a_token_outside_of_the_windows_has_no_gradient():
    """Without global tokens, the reach of a token grows by its window in each layer; a global token reaches all."""
    module, params = Transformer(LONGFORMER), random_params(LONGFORMER)
    x_1TD = jnp.asarray(np.random.default_rng(0).standard_normal((1, T, 16)), jnp.float32)
    _, inputs = apply(module, params, jnp.zeros((1, T), jnp.int32), method="embed")
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(16), jnp.float32)

    def read_by(place: int, global_places: list[int]) -> list[int]:
        is_global_1T = jnp.zeros((1, T), bool).at[0, jnp.array(global_places, int)].set(True)
        given = inputs._replace(global_BT=is_global_1T if global_places else None)
        state = lambda x_1TD: apply(module, params, x_1TD, given, method="stack")[0, place] @ direction
        return np.flatnonzero(np.asarray(jax.jit(jax.grad(state))(x_1TD))[0].any(-1)).tolist()

    reach = LONGFORMER.layers * (WINDOW - 1)
    assert read_by(100, []) == list(range(100 - reach, 100 + reach + 1))
    # The state of a token depends on the global token, which in the layer before attends to all tokens.
    assert read_by(100, [290]) == list(range(T))
    one = replace(LONGFORMER, layers=1)
    module, params = Transformer(one), random_params(one)
    near = list(range(100 - WINDOW + 1, 100 + WINDOW))
    assert read_by(100, [290]) == [*near, 290]


@pytest.mark.parametrize(
    "config",
    [replace(LONGFORMER, global_tokens="first"), pytest.param(LOCAL, marks=pytest.mark.long)],
    ids=["longformer", "modernbert"],
)
def test_memory_grows_in_proportion_to_the_length(config):
    """The gradient needs no array with a size for each pair of positions, whatever the number of global tokens."""
    config = replace(config, max_length=2048, heads_on_top=())
    module, params = Transformer(config), random_params(config)
    program = jax.jit(jax.grad(lambda params, tokens, segments: apply(module, params, tokens, segments).sum()))

    def temporary(length: int) -> int:
        rows = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return program.lower(params, rows, rows).compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.3 * temporary(1024)


SIZES: dict[str, Any] = {"vocabulary": 41, "max_length": 20, "width": 12, "layers": 2, "heads": 3, "mlp_width": 10}
LED = replace(PRESETS["led-base-16384"], **SIZES, decoder_max_length=8, window=3)


def lm_of(config: ModelConfig) -> LM:
    return LM(config, Transformer(config), random_params(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_attention": False, "global_tokens": "first"}, "no projections for tokens with global attention"),
        ({"heads_on_top": ("classes", "span")}, "different global tokens; set --model.global-tokens first"),
        ({"global_tokens": "question", "separator_token": None}, "model.separator_token is None; set it"),
        ({"structure": "decoder", "heads_on_top": ("lm",)}, "it is for encoders with attention"),
        ({"relative": "disentangled"}, "without relative positions"),
        ({"layer_windows": (2, 3, 4)}, "3 windows, but the model has 2 layers; give at most one for each layer"),
        ({"layer_windows": (2, 3), "layer_kinds": ("global",)}, "no layer has local attention; leave it out"),
        ({"decoder_max_length": 8}, "model.decoder_max_length is 8, but the model is a"),
        ({"window": 0}, "model.window is 0; local layers need at least 1"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        replace(LONGFORMER, **fields).check()


@pytest.mark.parametrize("config", [replace(PRESETS["longformer-base-4096"], **SIZES), LED], ids=["longformer", "led"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_window": 5}, "attention_window 5; it counts both sides of a token: give an even number"),
        ({"attention_window": [4, 3]}, "attention_window 3; it counts"),
        ({"attention_window": 0}, "attention_window 0"),
        ({"attention_window": [4, True]}, "attention_window True"),
        ({"attention_window": [4, "4"]}, "attention_window '4'"),
        ({"attention_window": [4, 4, 4]}, "an attention_window of 3 entries, and the model 2 layers"),
        ({"attention_window": []}, "an attention_window of 0 entries"),
        ({"global_tokens": "last"}, "global_tokens is 'last'; it must be one of none, first, question"),
    ],
)
def test_invalid_windows_are_refused(tmp_path, config, change, message):
    jaxlm.save(lm_of(config), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path / "model")


def test_windows_and_global_tokens_are_read_from_the_file_and_written(tmp_path):
    config = replace(LED, layers=3, layer_windows=(3, 2), decoder_layers=2, global_tokens="first")
    assert jaxlm.save(lm_of(config), tmp_path / "model") == "led"
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (values["attention_window"], values["global_tokens"]) == ([4, 2, 4], "first")
    assert (values["max_encoder_position_embeddings"], values["max_decoder_position_embeddings"]) == (20, 8)
    loaded = jaxlm.load(tmp_path / "model").config
    assert (loaded.layer_windows, loaded.global_rule, loaded.decoder_config.global_rule) == ((3, 2), "first", "none")
    values.pop("global_tokens")
    assert FAMILIES["led"].config_from_hf(values | {"attention_window": 6}).window == 4


def test_texts_longer_than_the_model_are_refused():
    lm = lm_of(replace(LED, heads_on_top=("lm",)))
    with pytest.raises(UserError, match=r"21 tokens, more than the 20 positions"):
        lm(np.ones((1, 21), int), target_tokens_BT=np.ones((1, 3), int))
    for choices in ({"max_new_tokens": 8}, {"max_new_tokens": 20}):
        with pytest.raises(UserError, match="the model has 8 positions: set at most 7"):
            jaxlm.generate(lm, [[5, 6, 7]], return_tokens=True, **choices)
    with pytest.raises(UserError, match="a prompt of 21 tokens exceeds the model's 20 positions"):
        jaxlm.generate(lm, [[5] * 21], max_new_tokens=3, return_tokens=True)
    roberta = lm_of(replace(PRESETS["roberta-base"], **SIZES))
    with pytest.raises(UserError, match="global_BT is given, but the model has no projections"):
        roberta(np.full((1, 4), 5), global_BT=np.ones((1, 4)))
    with pytest.raises(UserError, match=r"task\.source_length is 21, longer than the 20 positions"):
        Seq2Seq(source_length=21).check_model(jaxlm.RunConfig(task=Seq2Seq()), lm.config)


@pytest.mark.parametrize(("preset", "kind"), [("roberta-base", "longformer"), ("bart-base", "led")])
def test_a_lengthened_model_computes_the_same_within_its_window(tmp_path, preset, kind):
    short = lm_of(replace(PRESETS[preset], **SIZES))
    long = jaxlm.lengthen(short, 50, window=40)
    ids = np.random.default_rng(0).integers(6, 41, (2, 18))
    named = {} if kind == "longformer" else {"target_tokens_BT": ids[:, :7]}
    np.testing.assert_allclose(long(ids, **named).logits, short(ids, **named).logits, atol=1e-5)
    # The same projections are used for global tokens.
    is_global = np.ones_like(ids)
    np.testing.assert_allclose(long(ids, **named, global_BT=is_global).logits, short(ids, **named).logits, atol=1e-5)
    assert jaxlm.save(long, tmp_path / "long") == kind
    # A file without these projections is read with copies of the others.
    tensors = {name: np.asarray(x) for name, x in safetensors.read(tmp_path / "long").items()}
    without = {name: x for name, x in tensors.items() if "_global" not in name}
    assert len(tensors) - len(without) == 12
    safetensors.write(without, tmp_path / "long" / safetensors.WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(tmp_path / "long").params, long.params)
    some = without | {name: x for name, x in tensors.items() if "0" in name and "_global" in name}
    safetensors.write(some, tmp_path / "long" / safetensors.WEIGHTS)
    with pytest.raises(UserError, match=r"do not match the model config.*6 lines"):
        jaxlm.load(tmp_path / "long")


@pytest.mark.parametrize(
    ("preset", "changes", "options", "message"),
    [
        ("roberta-base", {}, {"max_length": 50, "window": 5}, "window is 5; it counts the tokens on both sides"),
        ("roberta-base", {}, {"max_length": 19}, "max_length is 19, less than the model's 20 positions"),
        ("gpt2", {}, {"max_length": 50}, "the model is a.n. decoder with positions 'learned'"),
        ("modernbert-base", {"window": 2}, {"max_length": 50}, "positions 'rotary'"),
        ("longformer-base-4096", {}, {"max_length": 50}, "the model has local attention already"),
    ],
)
def test_other_models_are_not_lengthened(preset, changes, options, message):
    with pytest.raises(UserError, match=message):
        jaxlm.lengthen(lm_of(replace(PRESETS[preset], **SIZES, **changes)), **options)


def test_a_task_chooses_the_global_tokens():
    from jaxlm.data.tokenizers import tokenizer as tokenizers
    from jaxlm.tasks import TASKS

    tokenizer = tokenizers.train(["a few words"] * 9, jaxlm.TokenizerConfig(train="wordpiece"), 25)
    configured = lambda task, model: TASKS[type(task)](task, 16, 0, tokenizer, ()).configure(model)
    body = replace(LONGFORMER, heads_on_top=())
    assert configured(Classification(), body).global_rule == "first"
    question = configured(QuestionAnswering(), body)
    assert (question.global_rule, question.separator_token) == ("question", tokenizer.sep)
    assert configured(Seq2Seq(), LED).global_rule == "first"
    assert configured(Seq2Seq(), replace(LED, global_tokens="none")).global_rule == "none"
    assert configured(Seq2Seq(), PRESETS["bart-base"]).global_rule == "none"


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 1, 2)], ids=str)
def test_sharded_rows_equal_rows_on_one_device(devices, sizes):
    """The last mesh shards the length, whose rows are computed as a whole."""
    config = replace(LONGFORMER, global_tokens="first", heads_on_top=("classes",))
    params, random = random_params(config), np.random.default_rng(0)
    tokens_BT = random.integers(0, 40, (8, 320)).astype(np.int32)
    segments_BT = np.repeat(np.arange(1, 6), 64)[None].repeat(8, 0).astype(np.int32)
    config = replace(config, max_length=320)
    params = random_params(config)
    objective = lambda module: jax.jit(
        jax.value_and_grad(lambda params: (apply(module, params, tokens_BT, segments_BT) ** 2).mean())
    )
    expected = objective(Transformer(config))(params)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[:8])
    found = objective(Transformer(config, sharding.Placement(mesh)))(params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-4), found, expected)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", ["LongformerForMaskedLM", "LongformerForQuestionAnswering", "LEDForConditionalGeneration"]
)
@pytest.mark.parametrize("length", [7, 16, 30])
def test_any_global_tokens_are_those_of_transformers(tmp_path, name, length):
    """Compares logits for lengths with and without padding to the window, and for the default global tokens."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 41, "pad_token_id": 1, "sep_token_id": 2, "attention_window": [4, 8]}
    if name.startswith("LED"):
        sizes |= {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
        sizes |= {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_encoder_position_embeddings": 40}
    else:
        sizes |= {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
        sizes |= {"max_position_embeddings": 40}
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path / "model")
    lm, random = jaxlm.load(tmp_path / "model"), np.random.default_rng(length)
    mask = np.arange(length) < np.array([[length], [length - 1], [5]])
    tokens = np.where(mask, random.integers(6, 41, (3, length)), 1)
    for row, places in enumerate([(2, 4, length - 1), (1, 3, length - 2), (2, 3, 4)]):
        tokens[row, places] = 2
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask.astype(int))}
    named: dict[str, Any] = {"mask_BT": mask.astype(np.int32)}
    if name.startswith("LED"):
        targets = random.integers(6, 41, (3, 5))
        inputs["decoder_input_ids"], named["target_tokens_BT"] = torch.tensor(targets), targets
    all_tokens, first = np.ones((3, length), int), (np.arange(length) == 0) * np.ones((3, 1), int)
    for is_global in (None, first, random.integers(0, 2, (3, length)), all_tokens):
        more = {} if is_global is None else {"global_attention_mask": torch.tensor(is_global)}
        with torch.no_grad():
            theirs = model(**inputs, **more)
        ours = np.asarray(lm(tokens, **named, global_BT=is_global).logits)
        of_span = "start_logits" in theirs
        expected = torch.stack([theirs.start_logits, theirs.end_logits], -1) if of_span else theirs.logits
        real = mask if "LED" not in name else np.ones(ours.shape[:2], bool)
        np.testing.assert_allclose(ours[real], expected.numpy()[real], atol=1e-4)


@pytest.mark.parity
def test_texts_are_those_of_transformers_with_a_global_first_token(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = replace(LED, vocabulary=41, decoder_max_length=20, tied_embeddings=False, global_tokens="first")
    config = replace(config, decoder_tokens=True)
    lm = lm_of(config)
    jaxlm.save(lm, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 1, "eos_token_id": 2}))
    model = transformers.LEDForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    prompt = np.random.default_rng(0).integers(6, 41, (1, 15))
    is_global = torch.tensor((np.arange(15) == 0)[None].astype(int))
    for beams in (1, 3):
        more = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams, "global_attention_mask": is_global}
        theirs = model.generate(torch.tensor(prompt), attention_mask=torch.ones(1, 15, dtype=torch.long), **more)
        expected = theirs[0, 1:].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        own = jaxlm.load(tmp_path / "model")
        found = jaxlm.generate(
            own, prompt.tolist(), max_new_tokens=10, temperature=0.0, beams=beams, return_tokens=True
        )
        assert found == [expected]


@pytest.mark.long
@pytest.mark.parametrize("slots", [2, 64])
def test_dropout_of_weights_has_its_rate(slots):
    """The mean over many keys is the value without dropout, whichever way the global tokens are computed."""
    random = np.random.default_rng(0)
    rows, of_global = heads(random), heads(random)
    segments_BT, global_BT = jnp.ones((B, T), jnp.int32), jnp.zeros((B, T), bool).at[:, jnp.array([0, 9, 70])].set(True)

    def value(dropout: WeightDropout) -> jax.Array:
        return windowed_attention(rows, of_global, segments_BT, WINDOW, global_BT, Scores(0.5), dropout, slots)

    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.jit(lambda keys: jax.lax.map(lambda key: value(WeightDropout(key, 64)), keys))(keys)
    np.testing.assert_allclose(drawn.mean(0), value(WeightDropout()), atol=0.35)
    assert not np.array_equal(drawn[0], drawn[1])
    product = lambda rows, key: windowed_attention(
        rows, of_global, segments_BT, WINDOW, global_BT, Scores(0.5), WeightDropout(key, 64), slots
    ).sum()
    gradient = jax.jit(jax.grad(product))(rows, keys[0])
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in gradient)
