"""Pruning after training: the numbers and the places of zeros, and the effect on the outputs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import ModelConfig, UserError
from jaxlm.config import AdapterConfig
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer
from jaxlm.transforms import adapters
from jaxlm.transforms.calibration import input_moments, inverse_factor
from jaxlm.transforms.masks import grouping, lowest
from jaxlm.transforms.pruning import sparsity_of
from jaxlm.transforms.sparsegpt import sparsegpt

CONFIG = ModelConfig(
    vocabulary=48, width=16, layers=2, heads=2, kv_heads=1, max_length=64, mlp_width=24, positions="rotary",
    feed_forward="gated", initial_std=0.2,
)  # fmt: skip
TEXTS = [np.random.default_rng(n).integers(0, 48, 64).tolist() for n in range(12)]
UP, OUT = "decoder/layers/mlp/up/kernel", "decoder/layers/attention/out/kernel"


def texts_for(method: str):
    return None if method == "magnitude" else TEXTS


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(CONFIG, Transformer(CONFIG), random_params(CONFIG))


def projections(lm: LM) -> dict[str, np.ndarray]:
    """Returns the projections as matrices [L, I, O]."""
    leaves, rows = parameters.by_path(lm.params), parameters.rows_by_path(lm.params)
    as_matrix = lambda path: (leaves[path].shape[0], int(np.prod(leaves[path].shape[1 : 1 + rows[path].inputs])), -1)
    return {path: np.asarray(leaves[path]).reshape(as_matrix(path)) for path in parameters.projections(lm.params)}


LONG = pytest.mark.long
SCOPES = [("magnitude", scope) for scope in ("layer", "output", "global")]
SCOPES += [("wanda", "output"), ("wanda", "layer"), ("sparsegpt", "layer")]
SCOPES += [pytest.param("sparsegpt", "output", marks=LONG)]  # type: ignore[list-item]


@pytest.mark.parametrize(("method", "scope"), SCOPES)
def test_the_sparsity_is_exact_in_its_scope(lm, method, scope):
    new = jaxlm.prune(lm, 0.3, method=method, scope=scope, calibration=texts_for(method))
    zeros = {path: matrix == 0 for path, matrix in projections(new).items()}
    if scope == "global":
        assert sum(z.sum() for z in zeros.values()) == round(0.3 * sum(z.size for z in zeros.values()))
    for zero_LIO in zeros.values():
        if scope == "output":
            assert set(zero_LIO.sum(1).ravel()) == {round(0.3 * zero_LIO.shape[1])}
        if scope == "layer":
            assert set(zero_LIO.sum((1, 2)).ravel()) == {round(0.3 * zero_LIO[0].size)}
    for before, after in zip(jax.tree.leaves(lm.params), jax.tree.leaves(new.params)):
        assert before.dtype == after.dtype and before.shape == after.shape
        if method != "sparsegpt":  # which changes the other weights
            np.testing.assert_array_equal(after, np.where(np.asarray(after) == 0, 0, before))


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("magnitude", "1:2"), ("wanda", "4:8"), ("sparsegpt", "2:4"), pytest.param("sparsegpt", "4:8", marks=LONG)],
)
def test_a_pattern_holds_for_each_group_of_inputs(lm, method, pattern):
    new = jaxlm.prune(lm, method=method, pattern=pattern, calibration=texts_for(method))
    remain, size = map(int, pattern.split(":"))
    for matrix_LIO in projections(new).values():
        L, I, O = matrix_LIO.shape  # noqa: E741
        assert set((matrix_LIO.reshape(L, I // size, size, O) != 0).sum(2).ravel()) == {remain}


def test_magnitude_removes_the_smallest_weights(lm):
    for scope, axes in (("layer", (1, 2)), ("output", (1,)), ("global", None)):
        before, after = projections(lm), projections(jaxlm.prune(lm, 0.4, scope=scope))
        if axes is None:
            before, after = ({"": np.concatenate([m.ravel() for m in some.values()])} for some in (before, after))
        for path, matrix in before.items():
            removed = np.where(after[path] == 0, np.abs(matrix), 0).max(axes)
            kept = np.where(after[path] != 0, np.abs(matrix), np.inf).min(axes)
            assert np.all(removed <= kept)


def test_zeros_are_removed_first_and_equal_scores_in_order():
    scores = {"a": jnp.array([[[0.0], [2.0], [-0.0], [2.0], [2.0], [5.0]]])}
    removed = lambda n: lowest(scores, {"a": 1}, grouping(0.5, "layer", None), {"a": n})["a"].ravel().tolist()
    assert removed(0) == [False] * 6
    assert removed(2) == [True, False, True, False, False, False]
    assert removed(4) == [True, True, True, True, False, False]
    signed = {"a": jnp.array([[[-3.0], [1.0], [-jnp.inf], [jnp.inf]]]), "b": jnp.array([[[-1.0], [1.0]]])}
    found = lowest(signed, {"a": 1, "b": 1}, grouping(0.5, "global", None), {"a": 4, "b": 4})
    assert found["a"].ravel().tolist() == [True, True, True, False] and found["b"].ravel().tolist() == [True, False]


def test_masks_are_the_same_on_several_devices(lm):
    mesh = jaxlm.devices.sharding.make_mesh(jaxlm.MeshConfig(1, 2, 2), jax.devices()[:4])
    named = parameters.projections(lm.params, "mlp")
    scores = {path: jnp.abs(parameters.by_path(lm.params)[path]).round(1) for path in named}  # with ties
    P = jax.sharding.PartitionSpec
    sharded = {
        path: jax.device_put(x, jax.NamedSharding(mesh, P(None, "fsdp", "tensor"))) for path, x in scores.items()
    }
    for scope, pattern in (("layer", None), ("output", None), ("global", None), ("layer", "2:4")):
        groups = grouping(None, scope, pattern)
        counts = dict.fromkeys(scores, 2 if pattern else 7)
        run = jax.jit(lambda scores: lowest(scores, dict.fromkeys(scores, 1), groups, counts))  # noqa: B023
        jax.tree.map(np.testing.assert_array_equal, run(scores), run(sharded))


def test_wanda_removes_the_smallest_products(lm):
    """Sun et al. 2023, figure 1: sort |W| times the norm of the input for each output."""
    moments, before = input_moments(lm, TEXTS), projections(lm)
    for path, matrix_LIO in projections(jaxlm.prune(lm, 0.5, method="wanda", calibration=TEXTS)).items():
        norm_LI1 = np.sqrt(np.diagonal(moments[path].sums, axis1=1, axis2=2))[..., None]
        scores = np.abs(before[path]) * norm_LI1
        smallest = np.argsort(scores, 1)[:, : scores.shape[1] // 2]
        expected = before[path].copy()
        np.put_along_axis(expected, smallest, 0, 1)
        np.testing.assert_array_equal(matrix_LIO, expected)


def reference_sparsegpt(W, gram, sparsity, pattern=None, block=128):
    """Algorithm 1 of Frantar and Alistarh 2023 in float64, for W [outputs, inputs]."""
    W, H = W.astype(np.float64).copy(), gram.astype(np.float64).copy()
    dead = np.diagonal(H) == 0
    W[:, dead] = 0
    mean = np.diagonal(H).mean()
    H[dead, dead] = mean
    H += 0.01 * mean * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    for i in range(0, W.shape[1], block):
        end = min(i + block, W.shape[1])
        errors, mask = np.zeros((len(W), end - i)), np.zeros((len(W), end - i), bool)
        if pattern is None:
            scores = (W[:, i:end] / np.diagonal(U)[i:end]) ** 2
            count = round(sparsity * len(W) * end) - round(sparsity * len(W) * i)
            mask = scores <= np.sort(scores.ravel())[count - 1]
        for j in range(i, end):
            if pattern is not None and j % pattern[1] == 0:
                scores = (W[:, j : j + pattern[1]] / np.diagonal(U)[j : j + pattern[1]]) ** 2
                low = np.argsort(scores, 1)[:, : pattern[1] - pattern[0]]
                np.put_along_axis(mask[:, j - i : j - i + pattern[1]], low, True, 1)
            errors[:, j - i] = np.where(mask[:, j - i], W[:, j], 0) / U[j, j]
            W[:, j:end] -= np.outer(errors[:, j - i], U[j, j:end])
        W[:, i:end][mask] = 0
        W[:, end:] -= errors @ U[i:end, end:]
    return W


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_sparsegpt_equals_the_published_algorithm(pattern):
    random = np.random.default_rng(0)
    inputs, outputs = 164, 6  # a whole block and a part
    X = random.standard_normal((2, 400, inputs)) @ random.standard_normal((2, inputs, inputs))
    X[:, :, 3] = 0
    gram = np.einsum("LNI,LNJ->LIJ", X, X).astype(np.float32)
    W = random.standard_normal((2, inputs, outputs)).astype(np.float32)
    groups = grouping(None, "layer", pattern)
    found = np.asarray(sparsegpt(jnp.asarray(W), jnp.asarray(gram), groups))
    for layer in range(2):
        expected = reference_sparsegpt(W[layer].T, gram[layer], 0.5, groups.pattern).T
        np.testing.assert_allclose(found[layer], expected, atol=2e-3)
        plain = np.where(found[layer] == 0, 0, W[layer])
        error = lambda new: np.square(X[layer] @ (new - W[layer])).sum()  # noqa: B023
        assert error(found[layer]) < 0.8 * error(plain)  # the updates compensate


def test_the_factor_is_that_of_the_inverse():
    X = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    gram = X.T @ X
    R = np.asarray(inverse_factor(jnp.asarray(gram)), np.float64)
    damped = gram + 0.01 * np.diagonal(gram).mean() * np.eye(12)
    np.testing.assert_allclose(R.T @ R, np.linalg.inv(damped), rtol=1e-3, atol=1e-5)
    assert np.array_equal(R, np.triu(R))


def test_calibrated_methods_change_the_output_less(lm):
    """Inputs of different sizes: the norms of a trained model are not all alike."""
    scale = np.random.default_rng(0).lognormal(0, 1, (2, 16)).astype(np.float32)
    params = jax.tree.map(lambda x: x, lm.params)
    for name in ("attention_norm", "mlp_norm"):
        params["decoder"]["layers"][name]["scale"] = scale
    lm = dataclasses.replace(lm, params=params)
    rows = np.array(TEXTS)
    hidden = lambda lm: np.asarray(lm(rows).hidden_BTD)
    error = {
        method: np.square(
            hidden(jaxlm.prune(lm, 0.5, method=method, calibration=texts_for(method))) - hidden(lm)
        ).mean()
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


def test_targets_limit_what_is_pruned(lm):
    new = jaxlm.prune(lm, 0.5, targets="mlp,out")
    for path, fraction in sparsity_of(new).items():
        assert fraction == (0.5 if "mlp" in path or "out" in path else 0), path
    assert list(sparsity_of(new, "mlp/up")) == [UP]
    same = jaxlm.prune(lm, 0.0)
    jax.tree.map(np.testing.assert_array_equal, same.params, lm.params)


def test_a_pruned_model_is_saved_with_its_zeros(lm, tmp_path):
    new = jaxlm.prune(lm, pattern="2:4")
    jaxlm.save(new, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, jaxlm.load(tmp_path / "model").params, new.params)


@pytest.mark.parametrize(
    ("named", "match"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0; it must be .*below 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": "half"}, "sparsity is 'half'"),
        ({"sparsity": 0.99, "scope": "output"}, "leaves none of the 16 weights in a group"),
        ({"pattern": "2:5"}, "has 16 inputs, which 5 does not divide"),
        ({"pattern": "2:32"}, "pattern is 2:32, but"),
        ({"pattern": "4:2"}, "pattern is '4:2'; it must be N:M"),
        ({"pattern": "0:4"}, "pattern is '0:4'"),
        ({"pattern": "4:4"}, "pattern is '4:4'"),
        ({"pattern": "half"}, "pattern is 'half'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity is 0.6, but pattern 2:4 removes 0.5"),
        ({"pattern": "2:4", "scope": "global"}, "a pattern replaces the scope"),
        ({"method": "wanda"}, "method wanda requires calibration data"),
        ({"method": "sparsegpt"}, "method sparsegpt requires calibration data"),
        ({"method": "magnitude", "calibration": TEXTS}, "method magnitude uses no calibration data"),
        ({"method": "wanda", "calibration": []}, "has no tokens"),
        ({"method": "sparsegpt", "calibration": [[1, 2]]}, "has 2 tokens"),
        ({"method": "wanda", "scope": "global", "calibration": TEXTS}, "supports output and layer"),
        ({"method": "optimal"}, "method is 'optimal'"),
        ({"targets": "querry"}, "no projection matches 'querry'"),
        ({"targets": 3}, "targets is 3"),
        ({"scope": "row"}, "scope is 'row'"),
    ],
)
def test_arguments_are_checked(lm, named, match):
    with pytest.raises(UserError, match=match):
        jaxlm.prune(lm, **named)


def test_only_dense_finite_models_can_be_pruned(lm):
    adapted = dataclasses.replace(lm, params=adapters.add(lm.params, AdapterConfig(2, targets="up"), jax.random.key(0)))
    with pytest.raises(UserError, match="mlp/up/kernel is of the kind LowRank"):
        jaxlm.prune(adapted)
    params = jax.tree.map(lambda x: x + np.nan, lm.params)
    with pytest.raises(UserError, match="not finite"):
        jaxlm.prune(dataclasses.replace(lm, params=params), method="wanda", calibration=TEXTS)
    with pytest.raises(UserError, match="not finite"):
        jaxlm.prune(dataclasses.replace(lm, params=params))
    with pytest.raises(UserError, match="lm is 3"):
        jaxlm.prune(3)
