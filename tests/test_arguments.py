"""The public functions take what Python users have, and refuse the rest in one sentence."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import ModelConfig, RunConfig, TokenizerConfig, UserError, sharding
from jaxlm.data.tokenizer import train
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.sharding import Placement

CONFIG = ModelConfig(vocabulary=64, max_length=16, width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def lm() -> LM:
    module = Transformer(CONFIG)
    params = module.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    tokenizer = train(["to be or not to be"], TokenizerConfig(train="characters"), 16, begun=True)
    return LM(CONFIG, module, params, tokenizer)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arguments") / "model"
    jaxlm.save(lm, folder)
    return folder


# The call, and what the message must say.
LOADS = {
    "None": (None, {}, "name is None; it must be a text"),
    "a number": (123, {}, "name is 123; it must be a text"),
    "bytes": (b"x", {}, "name is b'x'; it must be a text"),
    "a zero byte": ("a\0b", {}, "without a NUL character"),
    "half a surrogate pair": ("\ud800", {}, "half of a surrogate pair"),
    "a long name": ("x" * 5000, {}, "is no folder"),
    "dtype": ("", {"dtype": np.int32}, "dtype is 'int32'"),
    "head": ("", {"head": 5}, "head is 5; it must be a text, or None"),
    "no label": ("", {"head": "classes", "labels": 0}, "labels is 0; it must be at least 1"),
    "labels below 0": ("", {"head": "classes", "labels": -1}, "labels is -1; it must be at least 1"),
    "many labels": ("", {"head": "classes", "labels": 10**12}, "at most 1,000,000"),
    "half a label": ("", {"head": "classes", "labels": 2.5}, "labels is 2.5; it must be a whole number"),
    "labels in a text": ("", {"head": "classes", "labels": "ab"}, "labels is 'ab'"),
    "labels that are numbers": ("", {"head": "classes", "labels": [1, 2]}, "each entry a text"),
    "a label twice": ("", {"head": "classes", "labels": ["a", "a"]}, "each name once"),
    "empty labels": ("", {"head": "classes", "labels": []}, "at least one name"),
    "mesh": ("", {"mesh": jaxlm.MeshConfig()}, "it must be of type Mesh, or None"),
    "module": ("", {"module": 5}, "module is 5; it must be a class derived from"),
    "revision": ("", {"revision": 5}, "revision is 5"),
}


@pytest.mark.parametrize("name", LOADS)
def test_load_refuses(folder, name):
    address, named, message = LOADS[name]
    with pytest.raises(UserError) as error:
        jaxlm.load(folder if address == "" else address, **named)
    assert message in str(error.value)


OTHERS = {
    "save nowhere": (lambda lm: jaxlm.save(lm, None), "folder is None; it must be a text"),
    "save nothing": (lambda lm: jaxlm.save(None, "x"), "lm is None; it must be of type LM"),
    "save, swapped": (lambda lm: jaxlm.save("x", lm), "lm is 'x'; it must be of type LM"),
    "no shard": (lambda lm: jaxlm.save(lm, "x", max_shard_bytes=0), "max_shard_bytes is 0; it must be at least 1"),
    "a NaN shard": (lambda lm: jaxlm.save(lm, "x", max_shard_bytes=float("nan")), "max_shard_bytes is nan"),
    "fit nothing": (lambda lm: jaxlm.fit(None), "run is None; it must be of type RunConfig"),
    "fit a class": (lambda lm: jaxlm.fit(RunConfig), "it must be of type RunConfig"),
    "fit a name": (lambda lm: jaxlm.fit(RunConfig(), model="bert"), "model is 'bert'; it must be of type LM, or None"),
    "fit a path": (lambda lm: jaxlm.fit(RunConfig(), data="x.csv"), "data is 'x.csv'; it must be of type Prepared"),
    "fit until": (lambda lm: jaxlm.fit(RunConfig(), stop=5), "stop is 5; it must be a function"),
    "no ids": (lambda lm: lm(None), "token ids, which are integers"),
    "a text": (lambda lm: lm("abc"), "token ids, which are integers"),
    "floats": (lambda lm: lm(np.ones((1, 3))), "token ids, which are integers"),
    "one row": (lambda lm: lm([1, 2]), "[rows, positions]"),
    "rows of several lengths": (lambda lm: lm([[1, 2], [1]]), "rows of several lengths"),
    "no text": (lambda lm: lm.tokens(None), "give strings"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_refuse(lm, name):
    call, message = OTHERS[name]
    with pytest.raises(UserError) as error:
        call(lm)
    assert message in str(error.value)


def test_what_python_users_have_is_taken(lm, folder, tmp_path):
    """Paths, NumPy scalars, dtypes, ids of any integer type."""
    loaded = jaxlm.load(folder, dtype=np.dtype("float32"), compute_dtype=np.float32)
    other = jaxlm.load(str(folder), head="classes", labels=np.int64(3), say=lambda _: None)
    assert other.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    jaxlm.save(loaded, tmp_path / "new", max_shard_bytes=np.int64(10**6))
    tokens_BT = np.array([[1, 2, 3]])
    expected = np.asarray(lm(tokens_BT).logits)
    for kind in (np.uint8, np.int16, np.uint64):
        np.testing.assert_array_equal(loaded(tokens_BT.astype(kind)).logits, expected)
    np.testing.assert_array_equal(loaded(tokens_BT.tolist()).logits, expected)
    mesh = sharding.make_mesh(jaxlm.MeshConfig(), jax.devices()[:1])
    np.testing.assert_allclose(jaxlm.load(folder, mesh=mesh)(tokens_BT).logits, expected, rtol=1e-5, atol=1e-6)
    assert Placement(mesh).mesh is mesh
