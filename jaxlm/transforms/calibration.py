"""Statistics of the inputs of projections over calibration data: second moments, for pruning and quantisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.arguments import check_model
from jaxlm.config.ranges import Positive, check_argument
from jaxlm.errors import UserError
from jaxlm.lm import LM
from jaxlm.nn import nodes, parameters
from jaxlm.nn.transformer import Transformer, apply, unstack_layers
from jaxlm.transforms.calibration_rows import CalibrationRows, calibration_rows

MIN_TOKENS = 128  # a mean of squares over this many tokens has a relative standard error of about 1/8
BATCH_TOKENS = 1 << 12  # tokens that the model reads at a time
DAMPING = 0.01  # added to the diagonal of a Gram matrix that is inverted, as a fraction of its mean


class Moments(NamedTuple):
    """The second moments of the inputs X of a projection, summed over N tokens.

    Attributes:
      sums: float32 [L, I, I], the Gram matrices X^T X; or [L, I], their diagonals. I is the product of the contracted
        axes. Projections with the same input share one array.
      tokens_L: float32 [L], the number N for each layer.
    """

    sums: jax.Array
    tokens_L: jax.Array


@nodes.node
class Observed(nodes.Node):
    """A parameter whose products are recorded: `record` receives the inputs of each product, while it is traced."""

    base: Any  # array or node
    record: Any = nodes.static()

    def materialize(self) -> jax.Array:
        """Returns the dense array of the base."""
        return nodes.dense(self.base)

    def dot(self, x: jax.Array, contract: int, dtype: Any, dropped: jax.Array | None = None) -> jax.Array:
        """Returns the product of x with the base, and records x."""
        self.record(x)
        return nodes.dot(x, self.base, contract, dtype, dropped)

    def axes(self, axes: nodes.Axes, inputs: int) -> dict[str, tuple[nodes.Axes, int]]:
        """Returns the axes of the base."""
        return {"base": (axes, inputs)}


def input_moments(
    lm: LM,
    texts: Any,
    *,
    length: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int | None = None,
    paths: Collection[str] | None = None,
    diagonal: bool = False,
) -> dict[str, Moments]:
    """Returns the second moments of the inputs of projections while the model reads texts.

    Padding does not count. A layer that a model applies several times counts each token several times. The table of
    relative positions of DeBERTa, which a projection may read in addition to the tokens, does not count; where a
    projection reads only this table, each token counts as the mean over its rows.

    Args:
      lm: the model; its projections may be arrays or nodes.
      texts: strings or token ids; see `calibration_rows`.
      length: tokens in a row; None: the model's positions, 2,048 at most.
      max_tokens: number of tokens after which no further text is read; None: 262,144.
      batch_tokens: tokens that the model reads at a time, at least one row; None: 4,096.
      paths: the projections to measure, to save memory; None: all.
      diagonal: whether to return only the diagonals.

    Returns:
      The moments by the path of the projection, such as "decoder/layers/mlp/up/kernel".

    Raises:
      UserError: for texts without tokens, and for fewer tokens than the result requires: the largest number of inputs,
        below which a Gram matrix is singular, and at least 128.
    """
    check_model("lm", lm)
    batch_tokens = check_argument("batch_tokens", batch_tokens, Positive | None) or BATCH_TOKENS
    shapes = projection_inputs(lm.params)
    paths = tuple(path for path in shapes if paths is None or path in paths)
    rows = calibration_rows(lm, texts, length=length, max_tokens=max_tokens)
    check_tokens(rows, {} if diagonal else {path: shapes[path] for path in paths})
    of_layer = lambda inputs, _: _moments(inputs, diagonal)
    found = reduce_inputs(lm, rows, paths, of_layer, jnp.add, batch_tokens=batch_tokens)
    return {path: Moments(*moments) for path, moments in found.items()}


class LayerInputs(NamedTuple):
    """The inputs of one projection in one layer.

    Attributes:
      rows: float32 [N, I] for each time that the model applies the layer; I is the product of the contracted axes.
      are_tokens: True if N are tokens, with zeros for padding; False if N are relative positions.
      tokens: the number of tokens without padding.
    """

    rows: list[jax.Array]
    are_tokens: bool
    tokens: jax.Array


def reduce_inputs(
    lm: LM,
    rows: CalibrationRows,
    paths: Collection[str],
    of_layer: Callable[[LayerInputs, Any], Any],
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    given: Mapping[str, Any] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Any]:
    """Returns a statistic of the inputs of projections while the model reads rows.

    Projections with the same input share one statistic, and those that read no input have none.

    Args:
      lm: the model; its projections may be arrays or nodes.
      rows: the rows.
      paths: the projections.
      of_layer: (inputs, given values of the layer) -> an array or a tree of arrays.
      combine: combines the results of two batches; 0 must be neutral.
      given: values for `of_layer` by path, stacked over the layers; None: None for each layer.
      batch_tokens: tokens that the model reads at a time, at least one row.

    Returns:
      The results by path, stacked over the layers.
    """
    module = lm.module.clone(remat="none")  # a recorded input must not leave a rematerialised function
    contracted = {path: len(shape) for path, shape in projection_inputs(lm.params).items() if path in paths}
    shares: dict[str, str] = {}  # the path whose statistic each projection has, set while the function is traced

    def measure(params: Any, batch: CalibrationRows, given: Any) -> dict[str, Any]:
        inputs = _record(module, params, batch, contracted)
        first: dict[Any, str] = {}
        for path, layers in inputs.items():
            if all(layers):
                shares[path] = first.setdefault(tuple(tuple(map(id, layer)) for layer in layers), path)
        found = {}
        for path in first.values():
            is_token_BT = jnp.asarray(batch.segments[_side(path)] > 0)
            values = [None if given is None else given[path][n] for n in range(len(inputs[path]))]
            flat = [_layer_inputs(layer, contracted[path], is_token_BT) for layer in inputs[path]]
            found[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(of_layer, flat, values))
        return found

    add = jax.jit(lambda sums, *inputs: jax.tree.map(combine, sums, measure(*inputs)), donate_argnums=0)
    sums: Any = None
    for batch in batches(rows, batch_tokens):
        if sums is None:
            like = jax.eval_shape(measure, lm.params, batch, given)
            sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        sums = add(sums, lm.params, batch, given)
    return {path: sums[shares[path]] for path in contracted if path in shares}


def projection_inputs(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of the contracted axes of each projection of stacked parameters, by path."""
    found = {}
    for path, leaf in parameters.by_path(params, whole_nodes=True).items():
        row = parameters.find(path)
        if row is not None and row.inputs:
            found[path] = nodes.dense_like(leaf, stacked=1).shape[1 : 1 + row.inputs]
    return found


def check_tokens(rows: CalibrationRows, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError if a stack reads fewer than MIN_TOKENS tokens, or a projection fewer than it has inputs.

    Args:
      rows: the calibration data.
      shapes: the sizes of the inputs of each projection whose Gram matrix must not be singular, by path.
    """
    tokens = {side: int((segments > 0).sum()) for side, segments in rows.segments.items()}
    needs = [(stack, MIN_TOKENS, f"the {stack}" if len(tokens) > 1 else "the model") for stack in tokens]
    needs += [(_side(path), math.prod(shape), f"{path}, which has as many inputs,") for path, shape in shapes.items()]
    for side, minimum, reader in needs:
        if tokens[side] < minimum:
            raise UserError(
                f"the calibration data has {tokens[side]} tokens, but {reader} requires at least {minimum}; give more "
                f"text, or raise max_tokens"
            )


def _side(path: str) -> str:
    """Returns the stack whose tokens a projection reads: keys and values of cross-attention read the encoder's."""
    stack, _, part, name, *_ = path.split("/")
    return "encoder" if part == "cross_attention" and name in ("key", "value") else stack


def batches(rows: CalibrationRows, batch_tokens: int) -> Iterator[CalibrationRows]:
    """Yields batches with the same number of rows; rows of padding fill the last one."""
    count, length = rows.tokens_BT.shape
    size = min(count, max(1, batch_tokens // length))
    for first in range(0, count, size):
        padding = (0, max(0, first + size - count)), (0, 0)
        yield CalibrationRows(*[None if x is None else np.pad(x[first : first + size], padding) for x in rows])  # type: ignore


def _record(
    module: Transformer, params: Any, rows: CalibrationRows, paths: Collection[str]
) -> dict[str, list[list[jax.Array]]]:
    """Returns the inputs of projections, for each path, each layer, and each time that the layer is applied.

    Args:
      module: the model.
      params: its stacked parameters.
      rows: the rows, [B, T].
      paths: the projections.
    """
    inputs: dict[str, list[list[jax.Array]]] = {path: [] for path in paths}

    def observe(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = parameters.path_of(key_path)
        if path not in inputs:
            return leaf
        inputs[path].append([])
        return Observed(leaf, inputs[path][-1].append)

    with_nodes = jax.tree_util.tree_map_with_path(observe, unstack_layers(module.config, params), is_leaf=nodes.is_node)
    apply(module, with_nodes, rows.tokens_BT, rows.segments_BT, rows.positions_BT, None, *rows[3:])
    return inputs


def _layer_inputs(inputs: list[jax.Array], contract: int, is_token_BT: jax.Array) -> LayerInputs:
    """Returns the inputs of a projection: those of tokens, or if there are none, those of relative positions."""
    flat = lambda x: x.reshape(-1, math.prod(x.shape[x.ndim - contract :])).astype(jnp.float32)
    of_tokens = [x for x in inputs if x.ndim == is_token_BT.ndim + contract]
    rows = [jnp.where(is_token_BT.reshape(-1, 1), flat(x), 0) for x in of_tokens] or [flat(x) for x in inputs]
    return LayerInputs(rows, bool(of_tokens), is_token_BT.sum().astype(jnp.float32))


def _moments(inputs: LayerInputs, diagonal: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the moments [I, I] or [I] of the inputs of one projection, and the number of tokens."""
    total: Any = 0.0
    for x_NI in inputs.rows:
        if not inputs.are_tokens:
            x_NI *= jnp.sqrt(inputs.tokens / len(x_NI))
        total += jnp.square(x_NI).sum(0) if diagonal else jnp.dot(x_NI.T, x_NI, precision="highest")
    return total, inputs.tokens * len(inputs.rows)


def inverse_factor(gram_JJ: jax.Array, damping: float = DAMPING) -> jax.Array:
    """Returns the upper triangular R with R^T R = (G + damping mean(diag G) I)^-1 for a Gram matrix G of inputs.

    Row j of R, divided by its diagonal, is the optimal update of the weights of later inputs for an error of the weight
    of input j, after which that weight does not change (Frantar and Alistarh 2023, equation 3; Frantar et al. 2022,
    section 3.3). Inputs that are always zero have the diagonal 1 in place of 0.
    """
    diagonal_J = jnp.diagonal(gram_JJ)
    added_J = damping * diagonal_J.mean() + (diagonal_J == 0)
    reverse = lambda x: x[::-1, ::-1]
    # G = U U^T with an upper triangular U, so that R = U^-1, without the inverse of G, whose condition is worse.
    upper_JJ = reverse(jnp.linalg.cholesky(reverse(gram_JJ + jnp.diag(added_J))))
    return jax.scipy.linalg.solve_triangular(upper_JJ, jnp.eye(len(gram_JJ), dtype=gram_JJ.dtype))
