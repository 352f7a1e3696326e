"""Second moments of the inputs of projections over calibration data, for pruning and quantisation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
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
    module = lm.module.clone(remat="none")  # a recorded input must not leave a rematerialised function
    shares: dict[str, str] = {}

    def measure(params: Any, batch: CalibrationRows) -> dict[str, Moments]:
        return _moments(module, params, batch, {path: len(shapes[path]) for path in paths}, diagonal, shares)

    add = jax.jit(lambda sums, *inputs: jax.tree.map(jnp.add, sums, measure(*inputs)), donate_argnums=0)
    sums: Any = None
    for batch in batches(rows, batch_tokens):
        if sums is None:
            sums = jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(measure, lm.params, batch)
            )
        sums = add(sums, lm.params, batch)
    return {path: sums[shares[path]] for path in paths if path in shares}


def projection_inputs(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of the contracted axes of each projection of stacked parameters, by path."""
    found = {}
    for path, leaf in parameters.by_path(params, whole_nodes=True).items():
        row = parameters.find(path)
        if row is not None and row.inputs:
            found[path] = nodes.dense_like(leaf, stacked=True).shape[1 : 1 + row.inputs]
    return found


def check_tokens(rows: CalibrationRows, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError if a stack reads fewer than MIN_TOKENS tokens, or a projection fewer than it has inputs.

    Args:
      rows: the calibration data.
      shapes: the sizes of the inputs of each projection whose Gram matrix must not be singular, by path.
    """
    tokens = {side: int((segments > 0).sum()) for side, segments in rows.segments.items()}
    needs = [(stack, MIN_TOKENS, f"the {stack}") for stack in tokens]
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


def _moments(
    module: Transformer,
    params: Any,
    rows: CalibrationRows,
    contracted: dict[str, int],
    diagonal: bool,
    shares: dict[str, str],
) -> dict[str, Moments]:
    """Returns the moments for some rows, one for all projections with the same input.

    Args:
      module: the model.
      params: its stacked parameters.
      rows: the rows, [B, T].
      contracted: the number of contracted axes of each projection, by path.
      diagonal: whether to compute only the diagonals.
      shares: receives, while the function is traced, the path whose moments each projection has.
    """
    inputs: dict[str, list[list[jax.Array]]] = {path: [] for path in contracted}

    def observe(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = parameters.path_of(key_path)
        if path not in inputs:
            return leaf
        inputs[path].append([])
        return Observed(leaf, inputs[path][-1].append)

    with_nodes = jax.tree_util.tree_map_with_path(observe, unstack_layers(params), is_leaf=nodes.is_node)
    apply(module, with_nodes, rows.tokens_BT, rows.segments_BT, rows.positions_BT, None, *rows[3:])
    first: dict[Any, str] = {}
    for path, layers in inputs.items():
        if all(layers):
            shares[path] = first.setdefault(tuple(tuple(map(id, layer)) for layer in layers), path)
    moments = {}
    for path in first.values():
        is_token_BT = jnp.asarray(rows.segments[_side(path)] > 0)
        of_layers = [_of_layer(layer, contracted[path], is_token_BT, diagonal) for layer in inputs[path]]
        moments[path] = Moments(*map(jnp.stack, zip(*of_layers)))
    return moments


def _of_layer(
    inputs: list[jax.Array], contract: int, is_token_BT: jax.Array, diagonal: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the moments [I, I] or [I] of the inputs of one projection, and the number of tokens."""
    tokens = is_token_BT.sum().astype(jnp.float32)
    of_tokens = [x for x in inputs if x.ndim == is_token_BT.ndim + contract]
    total: Any = 0.0
    for x in of_tokens or inputs:
        x_NI = x.reshape(-1, math.prod(x.shape[x.ndim - contract :])).astype(jnp.float32)
        if of_tokens:
            x_NI = jnp.where(is_token_BT.reshape(-1, 1), x_NI, 0)
        else:
            x_NI *= jnp.sqrt(tokens / len(x_NI))
        square = lambda x_NI: jnp.square(x_NI).sum(0) if diagonal else jnp.dot(x_NI.T, x_NI, precision="highest")
        total += square(x_NI)
    return total, tokens * len(of_tokens or inputs)


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
