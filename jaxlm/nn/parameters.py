"""The one table that knows the parameters: logical axes, whether weight decay applies, and depth.

Sharding, weight decay, layer-wise rates, freezing and Muon's matrices read this table.  Every leaf of a parameter tree
matches exactly one row; a leaf without a row is an error that names it.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from typing import Any, Literal, NamedTuple

import jax

from jaxlm.nn.nodes import is_node


class Parameter(NamedTuple):
    """One row: which leaves, and what is known of them.

    axes: the logical axis of each dimension; None is never split.
    decays: whether weight decay applies (biases and norms: no).
    depth: "embeddings" lie below the first layer, "layers" are stacked along the first axis, "head" lies above.
    inputs: how many of the axes after "layers" a projection contracts; 0 for what is not a projection.
    """

    path: str
    axes: tuple[str | None, ...]
    decays: bool
    depth: Literal["embeddings", "layers", "head"]
    inputs: int = 0


_STACK = r"(encoder|decoder)"
_LAYER = _STACK + r"/layers"
_ATTENTION = _LAYER + r"/(cross_)?attention"
_EMBEDDINGS = r"(decoder_)?embeddings"
_DENSE = r"(pooled_head|classes_head|replaced_head)/dense"
_OUT = r"(next_sentence_head|(classes_head|tokens_head|span_head|replaced_head)/out)"
TABLE = (
    Parameter(_EMBEDDINGS + r"/tokens", ("vocabulary", "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/(positions|types)", (None, "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/norm/(scale|bias)", (None,), False, "embeddings"),
    Parameter(_EMBEDDINGS + r"/project/kernel", (None, "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/project/bias", (None,), False, "embeddings"),
    Parameter(r"encoder/conv/kernel", (None, "width", None), True, "embeddings"),
    Parameter(r"encoder/conv/(bias|norm/(scale|bias))", (None,), False, "embeddings"),
    Parameter(_STACK + r"/relative/buckets", (None, None), True, "embeddings"),
    Parameter(_STACK + r"/relative/distances", (None, "width"), True, "embeddings"),
    Parameter(_STACK + r"/relative/norm/(scale|bias)", (None,), False, "embeddings"),
    Parameter(_ATTENTION + r"/(relative_)?query/kernel", ("layers", "width", "heads", "head_width"), True, "layers", 1),
    Parameter(_ATTENTION + r"/(relative_)?query/bias", ("layers", "heads", "head_width"), False, "layers"),
    Parameter(
        _ATTENTION + r"/(key|value|relative_key)/kernel",
        ("layers", "width", "kv_heads", "head_width"),
        True,
        "layers",
        1,
    ),
    Parameter(_ATTENTION + r"/(key|value|relative_key)/bias", ("layers", "kv_heads", "head_width"), False, "layers"),
    Parameter(_ATTENTION + r"/(query|key)_norm/(scale|bias)", ("layers", None), False, "layers"),
    Parameter(_ATTENTION + r"/out/kernel", ("layers", "heads", "head_width", "width"), True, "layers", 2),
    Parameter(_ATTENTION + r"/out/bias", ("layers", None), False, "layers"),
    Parameter(_LAYER + r"/mlp/(up|gate)/kernel", ("layers", "width", "mlp"), True, "layers", 1),
    Parameter(_LAYER + r"/mlp/(up|gate)/bias", ("layers", "mlp"), False, "layers"),
    Parameter(_LAYER + r"/mlp/down/kernel", ("layers", "mlp", "width"), True, "layers", 1),
    Parameter(_LAYER + r"/mlp/down/bias", ("layers", None), False, "layers"),
    Parameter(_LAYER + r"/\w+_norm/(scale|bias)", ("layers", None), False, "layers"),
    Parameter(_STACK + r"/norm/(scale|bias)", (None,), False, "head"),
    Parameter(r"lm_head/kernel", ("vocabulary", "width"), True, "head"),
    Parameter(r"lm_head/bias", ("vocabulary",), False, "head"),
    Parameter(r"(masked_lm|transform)_head/transform/kernel", ("width", None), True, "head"),
    Parameter(r"(masked_lm|transform)_head/(transform|norm)/(bias|scale)", (None,), False, "head"),
    Parameter(r"masked_lm_head/vocabulary/kernel", ("vocabulary", "width"), True, "head"),
    Parameter(r"masked_lm_head/vocabulary/bias", ("vocabulary",), False, "head"),
    Parameter(_DENSE + r"/kernel", ("width", None), True, "head"),
    Parameter(_OUT + r"/kernel", ("width", None), True, "head"),
    Parameter(rf"({_DENSE}|{_OUT})/bias", (None,), False, "head"),
)

PARTS = ("muon", "adam")  # labels of `optax.partition`, keys in the states of its parts


@cache
def find(path: str) -> Parameter | None:
    """The row of a path such as `decoder/layers/mlp/up/kernel`, or None."""
    rows = [row for row in TABLE if re.fullmatch(row.path, path)]
    if len(rows) > 1:
        raise ValueError(f"{path} matches {len(rows)} rows of the parameter table: {[row.path for row in rows]}")
    return rows[0] if rows else None


def path_of(key_path: tuple[Any, ...]) -> str:
    """`a/b/c` from the dictionary keys of a JAX key path, less what an optimizer's state puts before a parameter's."""
    keys = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(key for key in keys if key not in PARTS)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by their paths, such as `embeddings/tokens`."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _own(path: str, dimensions: int) -> Parameter | None:
    """The row of a user's own module, in a layer or outside, that is called `own` or `own_...`: not split, decays as
    usual."""
    if not any(part.split("_")[0] == "own" for part in path.split("/")):
        return None
    stacked = bool(re.match(_LAYER + "/", path))
    axes = ("layers",) * stacked + (None,) * (dimensions - stacked)
    below = bool(re.match(_EMBEDDINGS + "/", path))
    return Parameter(path, axes, dimensions - stacked > 1, "layers" if stacked else "embeddings" if below else "head")


def rows(params: Any) -> Any:
    """The tree of rows of a parameter tree.  Raises ValueError for a leaf that no row, or more than one, describes."""

    def row(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(key_path)
        dimensions = None if is_node(leaf) else leaf.ndim
        found = find(path) or _own(path, dimensions or 0)
        if found is None or dimensions not in (None, len(found.axes)):
            raise ValueError(
                f"parameter {path} {getattr(leaf, 'shape', '')} has no row in jaxlm.nn.parameters.TABLE; "
                f"add one that says its axes, decay and depth"
            )
        return _rows_of_node(leaf, found) if is_node(leaf) else found

    return jax.tree_util.tree_map_with_path(row, params, is_leaf=is_node)


def _rows_of_node(value: Any, row: Parameter) -> Any:
    """The node with a row in the place of each of its arrays."""
    if not is_node(value):
        return value if value is None else row
    inner = {
        name: _rows_of_node(getattr(value, name), row._replace(path=f"{row.path}/{name}", axes=axes, inputs=inputs))
        for name, (axes, inputs) in value.axes(row.axes, row.inputs).items()
    }
    return dataclasses.replace(value, **inner)


def is_row(value: Any) -> bool:
    """Whether a value is a row of the table; `rows` has them as leaves."""
    return isinstance(value, Parameter)


def rows_by_path(params: Any) -> dict[str, Parameter]:
    """The rows of a parameter tree by the paths of its leaves."""
    found = jax.tree_util.tree_leaves_with_path(rows(params), is_leaf=is_row)
    return {path_of(path): row for path, row in found}


def trained_in_nodes(params: Any, others: bool = True) -> Any:
    """For each leaf whether it is trained: in a node what the node names, outside of nodes all or none (`others`)."""

    def of(value: Any, trained: bool) -> Any:
        if not is_node(value):
            return value if value is None else trained
        inner = {name: of(getattr(value, name), trained and name in value.trained) for name in value.arrays}
        return dataclasses.replace(value, **inner)

    return jax.tree.map(lambda leaf: of(leaf, is_node(leaf) or others), params, is_leaf=is_node)


def split(params: Any, trained: Any) -> tuple[Any, Any]:
    """The trained leaves and the frozen ones, each tree with None in the place of the others.

    trained: the tree with a bool for each leaf.  `joined` is the inverse.
    """
    some = lambda wanted: jax.tree.map(lambda leaf, is_trained: leaf if is_trained == wanted else None, params, trained)
    return some(True), some(False)


def joined(trained: Any, frozen: Any) -> Any:
    """The whole tree of the parts that `split` made; frozen: None where nothing is."""
    if frozen is None:
        return trained
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)
