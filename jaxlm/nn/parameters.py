"""The table of parameters: logical axes, weight decay, and depth.

Sharding, weight decay, layer-wise rates, freezing and Muon use this table. Every leaf of a parameter tree must match
exactly one row.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import jax

from jaxlm.errors import UserError
from jaxlm.nn.nodes import is_node
from jaxlm.nn.nodes import stacked_axes as stacked_axes_of


class Parameter(NamedTuple):
    """A row of the table.

    Attributes:
      path: regular expression for the paths of the leaves.
      axes: the logical axis of each dimension; None is never sharded.
      decays: whether weight decay applies; it does not apply to biases and norms.
      depth: "embeddings" are below the first layer, "layers" are stacked along the first axis, "head" is above them;
        "teacher" is another model, which is never trained.
      inputs: number of axes after "layers" that a projection contracts; 0 if the parameter is not a projection.
    """

    path: str
    axes: tuple[str | None, ...]
    decays: bool
    depth: Literal["embeddings", "layers", "head", "teacher"]
    inputs: int = 0


_STACK = r"(encoder|decoder)"
_LAYER = _STACK + r"/layers"
_ATTENTION = _LAYER + r"/(\w+_)?attention"
_MLP = _LAYER + r"/(\w+_)?mlp"
_QUERY = _ATTENTION + r"/(relative_|global_)?query"
_KEY_OR_VALUE = _ATTENTION + r"/((global_)?(key|value)|relative_key)"
_EMBEDDINGS = r"(decoder_)?embeddings"
_DENSE = r"(pooled_head|classes_head|replaced_head)/dense"
_OUT = r"(next_sentence_head|(classes_head|tokens_head|span_head|replaced_head)/out)"
TABLE = (
    Parameter(_EMBEDDINGS + r"/tokens", ("vocabulary", "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/(positions|types)", (None, "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/query", (None,), False, "embeddings"),
    Parameter(_EMBEDDINGS + r"/norm/(scale|bias)", (None,), False, "embeddings"),
    Parameter(_EMBEDDINGS + r"/project/kernel", (None, "width"), True, "embeddings"),
    Parameter(_EMBEDDINGS + r"/project/bias", (None,), False, "embeddings"),
    Parameter(r"encoder/conv/kernel", (None, "width", None), True, "embeddings"),
    Parameter(r"encoder/conv/(bias|norm/(scale|bias))", (None,), False, "embeddings"),
    Parameter(_STACK + r"/relative/buckets", (None, None), True, "embeddings"),
    Parameter(_STACK + r"/relative/distances", (None, "width"), True, "embeddings"),
    Parameter(_STACK + r"/relative/norm/(scale|bias)", (None,), False, "embeddings"),
    Parameter(_QUERY + r"/kernel", ("layers", "width", "heads", "head_width"), True, "layers", 1),
    Parameter(_QUERY + r"/bias", ("layers", "heads", "head_width"), False, "layers"),
    Parameter(_KEY_OR_VALUE + r"/kernel", ("layers", "width", "kv_heads", "head_width"), True, "layers", 1),
    Parameter(_KEY_OR_VALUE + r"/bias", ("layers", "kv_heads", "head_width"), False, "layers"),
    Parameter(
        _ATTENTION + r"/(query_down|key_value_down|rotary_key)/kernel", ("layers", "width", None), True, "layers", 1
    ),
    Parameter(_ATTENTION + r"/sinks", ("layers", "heads"), False, "layers"),
    Parameter(_ATTENTION + r"/(content|position|type)_bias", ("layers", "heads", "head_width"), False, "layers"),
    Parameter(_ATTENTION + r"/types", ("layers", None, "heads", "head_width"), True, "layers"),
    Parameter(_ATTENTION + r"/(query|key|out)_norm/(scale|bias)", ("layers", None), False, "layers"),
    Parameter(_ATTENTION + r"/gate/kernel", ("layers", "width", "heads", "head_width"), True, "layers", 1),
    Parameter(_ATTENTION + r"/gate/bias", ("layers", "heads", "head_width"), False, "layers"),
    Parameter(_ATTENTION + r"/(beta|decay)/kernel", ("layers", "width", "heads"), True, "layers", 1),
    Parameter(_ATTENTION + r"/(log_rate|decay_bias)", ("layers", "heads"), False, "layers"),
    Parameter(_ATTENTION + r"/(query|key|value)_conv", ("layers", None, "heads", "head_width"), True, "layers"),
    Parameter(_ATTENTION + r"/out/kernel", ("layers", "heads", "head_width", "width"), True, "layers", 2),
    Parameter(_ATTENTION + r"/out/bias", ("layers", None), False, "layers"),
    Parameter(_ATTENTION + r"/input/kernel", ("layers", "width", None, None), True, "layers", 1),
    Parameter(_ATTENTION + r"/recurrent_kernel", ("layers", None, None, None), True, "layers"),
    Parameter(_ATTENTION + r"/(bias|candidate_bias)", ("layers", None, None), False, "layers"),
    Parameter(_ATTENTION + r"/window_\d+/kernel", ("layers", None, "width", None), True, "layers", 2),
    Parameter(_ATTENTION + r"/window_\d+/bias", ("layers", None), False, "layers"),
    Parameter(_MLP + r"/(shared/)?(up|gate)/kernel", ("layers", "width", "mlp"), True, "layers", 1),
    Parameter(_MLP + r"/(shared/)?(up|gate)/bias", ("layers", "mlp"), False, "layers"),
    Parameter(_MLP + r"/(shared/)?down/kernel", ("layers", "mlp", "width"), True, "layers", 1),
    Parameter(_MLP + r"/(shared/)?down/bias", ("layers", None), False, "layers"),
    Parameter(_MLP + r"/(router|shared_gate/kernel)", ("layers", "width", None), True, "layers"),
    Parameter(_MLP + r"/router_(bias|correction)", ("layers", None), False, "layers"),
    Parameter(_MLP + r"/experts/(up|gate)_bias", ("layers", "experts", "mlp"), False, "layers"),
    Parameter(_MLP + r"/experts/down_bias", ("layers", "experts", None), False, "layers"),
    Parameter(_MLP + r"/experts/(up|gate)", ("layers", "experts", "width", "mlp"), True, "layers"),
    Parameter(_MLP + r"/experts/down", ("layers", "experts", "mlp", "width"), True, "layers"),
    Parameter(_LAYER + r"/\w+_norm/(scale|bias)", ("layers", None), False, "layers"),
    Parameter(_STACK + r"/norm/(scale|bias)", (None,), False, "head"),
    Parameter(_STACK + r"/project/kernel", ("width", None), True, "head"),
    Parameter(r"lm_head/kernel", ("vocabulary", "width"), True, "head"),
    Parameter(r"lm_head/bias", ("vocabulary",), False, "head"),
    Parameter(r"(masked_lm|transform)_head/transform/kernel", ("width", None), True, "head"),
    Parameter(r"(masked_lm|transform)_head/(transform|norm)/(bias|scale)", (None,), False, "head"),
    Parameter(r"masked_lm_head/vocabulary/kernel", ("vocabulary", "width"), True, "head"),
    Parameter(r"masked_lm_head/vocabulary/bias", ("vocabulary",), False, "head"),
    Parameter(_DENSE + r"/kernel", ("width", None), True, "head"),
    Parameter(_OUT + r"/kernel", ("width", None), True, "head"),
    Parameter(rf"({_DENSE}|{_OUT})/bias", (None,), False, "head"),
    Parameter(r"crf_head/(start|end)", (None,), False, "head"),
    Parameter(r"crf_head/pairs", (None, None), False, "head"),
    Parameter(r"distillation/(encoder|decoder)", ("width", None), True, "head"),
)
# Subtrees of the parameters of a run that do not belong to its model: those of a teacher, below `teacher/` with the
# paths of a model, and those that compare the model with it.
TEACHER, DISTILLATION = "teacher", "distillation"

PARTS = ("muon", "adam")  # labels of `optax.partition`, and keys in its state


@cache
def find(path: str) -> Parameter | None:
    """Returns the row for a path such as `decoder/layers/mlp/up/kernel`, or None."""
    rows = [row for row in TABLE if re.fullmatch(row.path, path)]
    if len(rows) > 1:
        raise ValueError(f"{path} matches {len(rows)} rows of the parameter table: {[row.path for row in rows]}")
    return rows[0] if rows else None


def stacked_axes(path: str) -> int:
    """Returns the number of leading axes of the parameter at a path that have one matrix for each index.

    They are the axes of layers and of experts. A parameter outside the table has at most that of layers.
    """
    row = find(path)
    return stacked_axes_of(row.axes) if row is not None else int(is_stacked(path))


def is_stacked(path: str) -> bool:
    """Returns whether the first axis of the parameter at a path is the layer."""
    return bool(re.match(_LAYER + "/", path))


def path_of(key_path: tuple[Any, ...]) -> str:
    """Returns `a/b/c` from the dictionary keys of a JAX key path, without the keys that an optimizer's state adds."""
    keys = [key.key for key in key_path if isinstance(key, jax.tree_util.DictKey)]
    return "/".join(key for key in keys if key not in PARTS)


def by_path(tree: Any, whole_nodes: bool = False) -> dict[str, Any]:
    """Returns the leaves of a parameter tree by path, such as `embeddings/tokens`.

    Args:
      tree: the parameters.
      whole_nodes: whether to return a node under its own path instead of its arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node if whole_nodes else None)
    return {path_of(path): leaf for path, leaf in leaves}


def of_model(params: Any) -> Any:
    """Returns the parameters of the model of a run, without those of a teacher."""
    if not isinstance(params, dict):
        return params
    return {name: part for name, part in params.items() if name not in (TEACHER, DISTILLATION)}


def _user_row(path: str, dimensions: int) -> Parameter | None:
    """Returns the row for a user's module named `own` or `own_...`: never sharded, weight decay for matrices."""
    if not any(part.split("_")[0] == "own" for part in path.split("/")):
        return None
    stacked = is_stacked(path)
    axes = ("layers",) * stacked + (None,) * (dimensions - stacked)
    embedding = bool(re.match(_EMBEDDINGS + "/", path))
    return Parameter(
        path, axes, dimensions - stacked > 1, "layers" if stacked else "embeddings" if embedding else "head"
    )


def rows(params: Any) -> Any:
    """Returns the row for each leaf of a parameter tree; raises ValueError if a leaf does not match exactly one."""

    def find_row(key_path: tuple[Any, ...], leaf: Any) -> Any:
        path = path_of(key_path)
        dimensions = None if is_node(leaf) else leaf.ndim
        of_teacher, own_path = path.startswith(f"{TEACHER}/"), path.removeprefix(f"{TEACHER}/")
        row = find(own_path) or _user_row(own_path, dimensions or 0)
        if row is not None and of_teacher:
            row = row._replace(path=path, depth="teacher")
        if row is None or dimensions not in (None, len(row.axes)):
            raise ValueError(
                f"parameter {path} {getattr(leaf, 'shape', '')} has no row in jaxlm.nn.parameters.TABLE; "
                f"add one with its axes, decay and depth"
            )
        return _rows_of_node(leaf, row) if is_node(leaf) else row

    return jax.tree_util.tree_map_with_path(find_row, params, is_leaf=is_node)


def _rows_of_node(value: Any, row: Parameter) -> Any:
    """Returns a node with rows instead of arrays."""
    if not is_node(value):
        return value if value is None else row
    inner = {
        name: _rows_of_node(getattr(value, name), row._replace(path=f"{row.path}/{name}", axes=axes, inputs=inputs))
        for name, (axes, inputs) in value.axes(row.axes, row.inputs).items()
    }
    return dataclasses.replace(value, **inner)


def is_row(value: Any) -> bool:
    """Returns whether a value is a row of the table, a leaf of the tree that `rows` returns."""
    return isinstance(value, Parameter)


def rows_by_path(params: Any) -> dict[str, Parameter]:
    """Returns the rows of a parameter tree by the paths of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(rows(params), is_leaf=is_row)
    return {path_of(path): row for path, row in leaves}


def projections(params: Any, targets: str = "all", experts: bool = False) -> list[str]:
    """Returns the paths of the projections that `targets` selects, such as `decoder/layers/mlp/up/kernel`.

    Args:
      params: a parameter tree; a projection may be a node.
      targets: parts of paths, separated by commas, such as `query,value`, `mlp` or `cross_attention/out`; `all` selects
        every projection.
      experts: whether the matrices of routed experts are among them, [L, X, I, O] for X experts.

    Raises:
      UserError: if there are no projections, or if a target selects none of them.
    """
    is_chosen = lambda row: row.inputs or (experts and row.decays and "experts" in row.axes)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    paths = [path for path in (path_of(key_path) for key_path, _ in leaves) if (row := find(path)) and is_chosen(row)]
    if not paths:
        raise UserError("the model has no projections (of attention or an MLP); choose another model")
    words = [word.strip() for word in targets.split(",")]
    chosen = {word: [path for path in paths if word == "all" or f"/{word}/" in f"/{path}/"] for word in words}
    for word in words:
        if not word or not chosen[word]:
            known = ["all", *dict.fromkeys(part for path in paths for part in path.split("/")[2:-1])]
            raise UserError(f"targets is {targets!r}, but no projection matches {word!r}; known: {', '.join(known)}")
    return [path for path in paths if any(path in matching for matching in chosen.values())]


def label_heads(params: Any) -> list[str]:
    """Returns the paths of the leaves of all heads except those over tokens, such as `classes_head/out/kernel`.

    Those that compare a model with its teacher count as heads.
    """
    heads: dict[str, list[tuple[str, Parameter]]] = {}
    for path, row in rows_by_path(params).items():
        head = path.split("/")[0]
        if head.endswith("_head") or head.split("_")[0] == "own" or head == DISTILLATION:
            heads.setdefault(head, []).append((path, row))
    over_tokens = lambda leaves: any("vocabulary" in row.axes for _, row in leaves)
    labels = {head: leaves for head, leaves in heads.items() if not over_tokens(leaves)}
    if labels.keys() == {"transform_head"}:  # it belongs to the other heads, here one over tokens
        return []
    return [path for leaves in labels.values() for path, _ in leaves]


def trained_in_nodes(params: Any, others: bool = True) -> Any:
    """Returns a tree of bools: whether each leaf is trained. In a node, the node decides; elsewhere, `others`."""

    def of(value: Any, trained: bool) -> Any:
        if not is_node(value):
            return value if value is None else trained
        inner = {name: of(getattr(value, name), trained and name in value.trained) for name in value.arrays}
        return dataclasses.replace(value, **inner)

    return jax.tree.map(lambda leaf: of(leaf, is_node(leaf) or others), params, is_leaf=is_node)


def split(params: Any, trained: Any) -> tuple[Any, Any]:
    """Returns the tree of the trained leaves and the tree of the frozen leaves; other leaves are None.

    The first tree has no part for a teacher. `trained` is a tree with a bool for each leaf. `join` is the inverse.
    """
    select = lambda value: jax.tree.map(lambda leaf, is_trained: leaf if is_trained == value else None, params, trained)
    ours, frozen = select(True), select(False)
    return ({name: ours[name] for name in ours if name != TEACHER} if isinstance(ours, dict) else ours), frozen


def join(trained: Any, frozen: Any) -> Any:
    """Returns the tree that `split` divided; `frozen` is None if all leaves are trained."""
    if frozen is None:
        return trained
    teacher = {}
    if isinstance(frozen, dict) and TEACHER in frozen:
        teacher = {TEACHER: frozen[TEACHER]}
        frozen = {name: part for name, part in frozen.items() if name != TEACHER}
    joined = jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda leaf: leaf is None)
    return {**joined, **teacher} if teacher else joined


def outside_nodes(part: Any) -> tuple[str, ...]:
    """Returns the paths of the arrays of a part of a parameter tree, as `split` returns it, that no node contains."""
    return tuple(path for path, leaf in by_path(part, whole_nodes=True).items() if not is_node(leaf))


def fill(part: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns a part of a parameter tree, as `split` returns it, with other arrays in place of its own.

    Args:
      part: the tree; it has None in place of the leaves of the other part, also in nodes.
      leaves: arrays and whole nodes, by path.
    """
    is_none = lambda value: value is None
    replace = lambda old, new: jax.tree.map(lambda a, b: None if a is None else b, old, new, is_leaf=is_none)
    return jax.tree_util.tree_map_with_path(
        lambda path, old: replace(old, leaves[path_of(path)]), part, is_leaf=is_node
    )
