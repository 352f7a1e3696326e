"""Public functions accept the usual Python types, and refuse other arguments with one message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import ModelConfig, RunConfig, TokenizerConfig, UserError
from jaxlm.data.tokenizers.tokenizer import train
from jaxlm.devices import sharding
from jaxlm.devices.sharding import Placement
from jaxlm.inference.likelihood import fill, log_likelihoods, perplexity
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer

CONFIG = ModelConfig(vocabulary=64, max_length=16, width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def lm() -> LM:
    module = Transformer(CONFIG)
    params = random_params(CONFIG)
    tokenizer = train(["to be or not to be"], TokenizerConfig(train="characters"), 16, add_bos=True)
    return LM(CONFIG, module, params, tokenizer)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arguments") / "model"
    jaxlm.save(lm, folder)
    return folder


# The call, and the words that the message must contain.
LOADS = {
    "None": (None, {}, "name is None; it must be a string"),
    "a number": (123, {}, "name is 123; it must be a string"),
    "bytes": (b"x", {}, "name is b'x'; it must be a string"),
    "a zero byte": ("a\0b", {}, "without NUL characters"),
    "a lone surrogate": ("\ud800", {}, "lone surrogates"),
    "a long name": ("x" * 5000, {}, "is not a folder"),
    "dtype": ("", {"dtype": np.int32}, "dtype is 'int32'"),
    "head": ("", {"head": 5}, "head is 5; it must be a string, or None"),
    "no label": ("", {"head": "classes", "labels": 0}, "labels is 0; it must be at least 1"),
    "labels below 0": ("", {"head": "classes", "labels": -1}, "labels is -1; it must be at least 1"),
    "many labels": ("", {"head": "classes", "labels": 10**12}, "at most 1,000,000"),
    "a fraction of labels": ("", {"head": "classes", "labels": 2.5}, "labels is 2.5; it must be an integer"),
    "labels in a text": ("", {"head": "classes", "labels": "ab"}, "labels is 'ab'"),
    "labels that are numbers": ("", {"head": "classes", "labels": [1, 2]}, "each entry a non-empty string"),
    "a duplicate label": ("", {"head": "classes", "labels": ["a", "a"]}, "each name once"),
    "empty labels": ("", {"head": "classes", "labels": []}, "at least one name"),
    "mesh": ("", {"mesh": jaxlm.MeshConfig()}, "it must be of type Mesh, or None"),
    "module": ("", {"module": 5}, "module is 5; it must be a class derived from"),
    "revision": ("", {"revision": 5}, "revision is 5"),
}


@pytest.mark.parametrize("name", LOADS)
def test_load_refuses_invalid_arguments(folder, name):
    address, keywords, message = LOADS[name]
    with pytest.raises(UserError) as error:
        jaxlm.load(folder if address == "" else address, **keywords)
    assert message in str(error.value)


OTHERS = {
    "save without a folder": (lambda lm: jaxlm.save(lm, None), "folder is None; it must be a string"),
    "save without a model": (lambda lm: jaxlm.save(None, "x"), "lm is None; it must be of type LM"),
    "save with swapped arguments": (lambda lm: jaxlm.save("x", lm), "lm is 'x'; it must be of type LM"),
    "shards of zero bytes": (
        lambda lm: jaxlm.save(lm, "x", max_shard_bytes=0),
        "max_shard_bytes is 0; it must be at least 1",
    ),
    "shards of NaN bytes": (lambda lm: jaxlm.save(lm, "x", max_shard_bytes=float("nan")), "max_shard_bytes is nan"),
    "fit without a run": (lambda lm: jaxlm.fit(None), "run is None; it must be of type RunConfig"),
    "fit a class": (lambda lm: jaxlm.fit(RunConfig), "it must be of type RunConfig"),
    "fit a name": (lambda lm: jaxlm.fit(RunConfig(), model="bert"), "model is 'bert'; it must be of type LM, or None"),
    "fit a path": (lambda lm: jaxlm.fit(RunConfig(), data="x.csv"), "data is 'x.csv'; it must be of type Prepared"),
    "fit with a stop": (lambda lm: jaxlm.fit(RunConfig(), stop=5), "stop is 5; it must be a function"),
    "no ids": (lambda lm: lm(None), "token ids, which are integers"),
    "a text": (lambda lm: lm("abc"), "token ids, which are integers"),
    "floats": (lambda lm: lm(np.ones((1, 3))), "token ids, which are integers"),
    "one row": (lambda lm: lm([1, 2]), "[rows, positions]"),
    "rows of several lengths": (lambda lm: lm([[1, 2], [1]]), "rows of different lengths"),
    "no text": (lambda lm: lm.tokens(None), "give strings"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_refuse_invalid_arguments(lm, name):
    call, message = OTHERS[name]
    with pytest.raises(UserError) as error:
        call(lm)
    assert message in str(error.value)


# The call of a function that generates, encodes or scores, and the words that the message must contain.
SURROGATE = "a\ud800"
INFERENCE = {
    "no model": (lambda lm: jaxlm.generate(None, ["a"]), "lm is None; give what jaxlm.load or jaxlm.fit returns"),
    "no prompts": (lambda lm: jaxlm.generate(lm, None), "prompts is None, of type NoneType; give a list of prompts"),
    "a path": (lambda lm: jaxlm.generate(lm, Path("p.txt")), "prompts is the path 'p.txt'; read the file"),
    "a set": (lambda lm: jaxlm.generate(lm, {"a"}), "give a list of prompts"),
    "the ids of one prompt": (
        lambda lm: jaxlm.generate(lm, [1, 2]),
        "a prompt is 1, of type int; give a string or a list",
    ),
    "a prompt that is None": (lambda lm: jaxlm.generate(lm, [None]), "a prompt is None"),
    "floats as ids": (lambda lm: jaxlm.generate(lm, [[1.0, 2.5]]), "a prompt contains 1.0, of type float"),
    "an array of floats": (lambda lm: jaxlm.generate(lm, np.ones((1, 2))), "a prompt contains 1.0"),
    "booleans as ids": (lambda lm: jaxlm.generate(lm, [[True]]), "a prompt contains True"),
    "texts as ids": (lambda lm: jaxlm.generate(lm, [["a", "b"]]), "a prompt contains 'a'"),
    "nested ids": (lambda lm: jaxlm.generate(lm, [[[1, 2]]]), "a prompt contains [1, 2]"),
    "a huge id": (lambda lm: jaxlm.generate(lm, [[10**5000]]), "ids go from 0 to 63"),
    "a prompt with a lone surrogate": (lambda lm: jaxlm.generate(lm, [SURROGATE]), "has a lone surrogate"),
    "stop tokens in a text": (lambda lm: jaxlm.generate(lm, ["a"], stop_tokens="a"), "stop_tokens is 'a'"),
    "one stop token": (lambda lm: jaxlm.generate(lm, ["a"], stop_tokens=5), "stop_tokens is 5"),
    "floats as stop tokens": (lambda lm: jaxlm.generate(lm, ["a"], stop_tokens=[1.5]), "stop_tokens contains 1.5"),
    "a stop token that does not exist": (
        lambda lm: jaxlm.generate(lm, ["a"], stop_tokens=[-1]),
        "stop_tokens contains -1; ids must be from 0",
    ),
    "many texts": (lambda lm: jaxlm.generate(lm, ["a"], n_best=10**6), "n_best is 1000000"),
    "many tokens": (lambda lm: jaxlm.generate(lm, ["a"], max_new_tokens=10**30), "max_new_tokens is 1"),
    "seed": (lambda lm: jaxlm.generate(lm, ["a"], seed=-1), "seed is -1"),
    "temperature": (lambda lm: jaxlm.generate(lm, ["a"], temperature=float("nan")), "temperature is nan"),
    "stop": (lambda lm: jaxlm.generate(lm, ["a"], stop=3), "stop is 3"),
    "a stop with a lone surrogate": (lambda lm: jaxlm.generate(lm, ["a"], stop=[SURROGATE]), "stop is "),
    "draft": (lambda lm: jaxlm.generate(lm, ["a"], draft="x"), "draft is 'x'; give what jaxlm.load"),
    "decoding": (lambda lm: jaxlm.generate(lm, ["a"], {"seed": 1}), "give a jaxlm.Decoding"),
    "a stream of several prompts": (lambda lm: [*jaxlm.stream(lm, ["a"])], "a prompt contains 'a'"),
    "a stream of a path": (lambda lm: [*jaxlm.stream(lm, Path("p"))], "a prompt is "),
    "no texts": (lambda lm: jaxlm.encode(lm, None), "texts is None"),
    "texts at a path": (lambda lm: jaxlm.encode(lm, Path("t.txt")), "texts is the path 't.txt'"),
    "texts of a mapping": (lambda lm: jaxlm.encode(lm, {"a": 1}), "of type dict; give a list of strings"),
    "ids as texts": (lambda lm: jaxlm.encode(add_pooling(lm), [[1, 2]]), "text 0 is a list"),
    "a text with a lone surrogate": (lambda lm: jaxlm.encode(add_pooling(lm), [SURROGATE]), "has a lone surrogate"),
    "batch_tokens": (lambda lm: jaxlm.encode(lm, ["a"], batch_tokens="5"), "batch_tokens is '5'"),
    "normalize": (lambda lm: jaxlm.encode(lm, ["a"], normalize="yes"), "normalize is 'yes'"),
    "no pairs": (lambda lm: log_likelihoods(lm, None), "pairs is None"),
    "a pair in a text": (lambda lm: log_likelihoods(lm, ["ab"]), "pair 0 is 'ab'; give (context, continuation)"),
    "a pair of floats": (lambda lm: log_likelihoods(lm, [([1.5], "a")]), "pair 0 contains 1.5"),
    "a pair with a lone surrogate": (lambda lm: log_likelihoods(lm, [("a", SURROGATE)]), "has a lone surrogate"),
    "too_long": (lambda lm: log_likelihoods(lm, [("a", "b")], too_long="cut"), "too_long is 'cut'"),
    "length": (lambda lm: log_likelihoods(lm, [("a", "b")], length=1.5), "length is 1.5"),
    "no texts for perplexity": (lambda lm: perplexity(lm, None), "texts is None"),
    "a long text with a lone surrogate": (lambda lm: perplexity(lm, SURROGATE), "has a lone surrogate"),
    "stride": (lambda lm: perplexity(lm, "abc", stride="2"), "stride is '2'"),
    "blank": (lambda lm: fill(lm, "a", blank=""), "blank is ''"),
}


def add_pooling(lm: LM) -> LM:
    return replace(lm, pooling=jaxlm.Pooling(("lasttoken",)))


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_refuses_invalid_arguments(lm, name):
    call, message = INFERENCE[name]
    with pytest.raises(UserError) as error:
        call(lm)
    assert message in str(error.value)


def test_prompts_are_ids_of_any_integer_type(lm):
    """A prompt may be a list of NumPy integers or a row of an array."""
    greedy = {"temperature": np.float32(0), "max_new_tokens": np.int64(3), "seed": np.uint8(1), "return_tokens": True}
    expected = jaxlm.generate(lm, [[1, 2, 3]], stop_tokens=(), **greedy)
    assert 60 not in expected[0] and len(expected[0]) == 3
    ids = np.array([[1, 2, 3]])
    for prompts in (ids.astype(np.uint8), ids.astype(np.uint64), [ids[0].astype(np.int16)], [tuple(ids[0])]):
        assert jaxlm.generate(lm, prompts, stop_tokens=(), **greedy) == expected
    assert jaxlm.generate(lm, iter([[1, 2, 3]]), stop_tokens=np.array([60]), **greedy) == expected


def test_the_usual_python_types_are_accepted(lm, folder, tmp_path):
    """The arguments are paths, NumPy scalars, dtypes and ids of several integer types."""
    loaded = jaxlm.load(folder, dtype=np.dtype("float32"), compute_dtype=np.float32)
    other = jaxlm.load(str(folder), head="classes", labels=np.int64(3), log=lambda _: None)
    assert other.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    jaxlm.save(loaded, tmp_path / "new", max_shard_bytes=np.int64(10**6))
    tokens_BT = np.array([[1, 2, 3]])
    expected = np.asarray(lm(tokens_BT).logits)
    for dtype in (np.uint8, np.int16, np.uint64):
        np.testing.assert_array_equal(loaded(tokens_BT.astype(dtype)).logits, expected)
    np.testing.assert_array_equal(loaded(tokens_BT.tolist()).logits, expected)
    mesh = sharding.make_mesh(jaxlm.MeshConfig(), jax.devices()[:1])
    np.testing.assert_allclose(jaxlm.load(folder, mesh=mesh)(tokens_BT).logits, expected, rtol=1e-5, atol=1e-6)
    assert Placement(mesh).mesh is mesh
