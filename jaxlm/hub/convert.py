"""A family is a two-way table: from it follow import, export, the strict report of what does not fit, and the tests.

A `Rule` ties a tensor of a file to leaves of our parameter tree; its `Layout` is a pair of functions, inverse of each
other.  A `Key` does the same for `config.json` and `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Head, ModelConfig
from jaxlm.errors import UserError, perhaps


class Layout(NamedTuple):
    """How one layer's tensor lies in the file and in ours: pure moves of entries, inverse of each other.

    to_ours(config, tensor) gives one array, or a tuple of them for a rule that splits; to_hf(config, *arrays) joins.
    """

    to_ours: Callable[..., Any]
    to_hf: Callable[..., np.ndarray]


# Shapes are in the letters of `jaxlm.nn`, I and O for what a projection reads and writes: ours <-> the file.  H stands
# for K in keys and values.  "linear" is torch's Linear, stored [O, I]; "conv" is GPT-2's Conv1D, stored [I, O].
same = Layout(lambda config, x: x, lambda config, x: x)
linear = Layout(lambda config, x: x.T, lambda config, x: x.T)  # [I, O] <-> [O, I]
linear_heads_out = Layout(  # [D, H, C] <-> [HC, D]
    lambda config, x: x.T.reshape(config.width, -1, config.C),
    lambda config, x: x.reshape(config.width, -1).T,
)
linear_heads_in = Layout(  # [H, C, D] <-> [D, HC]
    lambda config, x: x.T.reshape(-1, config.C, config.width),
    lambda config, x: x.reshape(-1, config.width).T,
)
bias_heads_out = Layout(  # [H, C] <-> [HC]
    lambda config, x: x.reshape(-1, config.C),
    lambda config, x: x.reshape(-1),
)
conv_heads_in = Layout(  # [H, C, D] <-> [HC, D]
    lambda config, x: x.reshape(-1, config.C, config.width),
    lambda config, x: x.reshape(-1, config.width),
)
conv_query_key_value = Layout(  # three of [.., H, C] <-> [.., 3HC], kernel or bias
    lambda config, x: tuple(part.reshape(*x.shape[:-1], -1, config.C) for part in np.split(x, 3, axis=-1)),
    lambda config, *parts: np.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1),
)


class Rule(NamedTuple):
    """A tensor of the file and the leaves that it holds, `{i}` in `hf` being the stacked layer axis of ours.

    It applies where all of `ours`, and the leaf `where` if named, exist in the parameter tree, so that one table serves
    every choice of heads.  Two rules may hold the same leaf: a file then holds it twice, equal.
    """

    hf: str
    ours: str | tuple[str, ...]
    layout: Layout = same
    where: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that it holds."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def names(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Its tensors in the file, one a layer where there is `{i}`."""
        return [self.hf.format(i=i) for i in range(shapes[self.leaves[0]][0])] if "{i}" in self.hf else [self.hf]


class Family(NamedTuple):
    """A file format: how it says a config and its tensors.  Tensor names are those of a model with a head."""

    presets: dict[str, ModelConfig]
    rules: tuple[Rule, ...]
    heads: dict[tuple[Head, ...], str]  # head sets that the format has -> its class in transformers; (): the body
    prefix: str  # of the body's tensors; files may leave it out, and do where there is only a body
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]  # all but the heads, which `architectures` and tensors tell
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    buffers: tuple[str, ...] = ()  # tensors that a file may hold and a model does not need
    copies: Mapping[str, str] = {}  # tensors that repeat another where the model ties them -> that other
    renames: Mapping[str, str] = {}  # endings of names in old files -> those of today


def to_ours(rules: tuple[Rule, ...], config: ModelConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree, numpy arrays in the file's dtype.  Raises UserError where the tensors are not exactly those
    of `config`: missing, unexpected, or of another shape."""
    shapes = tree_shapes(config)
    refuse(hf_shapes(rules, config), {name: tuple(x.shape) for name, x in tensors.items()}, "tensors of the file")
    leaves: dict[str, np.ndarray] = {}
    for rule in _applying(rules, shapes):
        layers = [rule.layout.to_ours(config, np.asarray(tensors[name])) for name in rule.names(shapes)]
        layers = layers if isinstance(rule.ours, tuple) else [(layer,) for layer in layers]
        for path, leaf in zip(rule.leaves, map(np.stack, zip(*layers)) if "{i}" in rule.hf else layers[0]):
            if path in leaves and not np.array_equal(leaves[path], leaf):
                raise UserError(
                    f"{rule.hf} differs from the other tensor that holds {path}; make them equal in the file"
                )
            leaves[path] = leaf
    return _nested(leaves)


def to_hf(rules: tuple[Rule, ...], config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The file's tensors, some of them views of `params`.  Raises UserError where `params` is not of `config`."""
    shapes, leaves = tree_shapes(config), _flat(params)
    refuse(shapes, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, "parameters")
    tensors = {}
    for rule in _applying(rules, shapes):
        parts = [np.asarray(leaves[path]) for path in rule.leaves]
        for i, name in enumerate(rule.names(shapes)):
            tensors[name] = rule.layout.to_hf(config, *([x[i] for x in parts] if "{i}" in rule.hf else parts))
    return tensors


def canonical(family: Family, config: ModelConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the names that `family.rules` use, without what the family declares as buffer or copy.

    Raises UserError for two tensors of one name, and for a copy that differs from its original.
    """
    expected = hf_shapes(family.rules, config)
    known = expected.keys() | family.copies.keys()
    buffers = re.compile("|".join(re.escape(name).replace(r"\{i\}", r"\d+") for name in family.buffers) or "(?!)")
    found: dict[str, Any] = {}
    for written, tensor in tensors.items():
        name = written
        for old, new in family.renames.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        full = family.prefix + name
        name = full if full in known or buffers.fullmatch(full) else name
        if buffers.fullmatch(name):
            continue
        if name in found:
            raise UserError(f"two tensors stand for {name}, one of them {written}; remove one from the file")
        found[name] = tensor
    own = set() if config.tied_embeddings else {rule.hf for rule in family.rules}  # not copies, if perhaps unexpected
    for copy, original in family.copies.items():
        if copy in found and copy not in expected and copy not in own:
            tensor = found.pop(copy)
            # A writer that drops shared memory may have kept either name.
            if not np.array_equal(tensor, found.setdefault(original, tensor)):
                raise UserError(
                    f"{copy} differs from {original}, of which it is a copy in this model; remove one from the file, "
                    f"or set tie_word_embeddings to false in config.json if the model keeps both"
                )
    return found


def refuse(expected: Mapping[str, tuple], found: Mapping[str, tuple], what: str) -> None:
    """Raises UserError that lists both sides, names and shapes, unless they are equal."""
    if lines := difference(expected, found):
        raise UserError(
            f"the {what} do not fit the model config (- missing, + unexpected), {len(lines)} lines:\n  "
            + "\n  ".join(lines)
            + "\nchange the config, or give the weights that belong to it"
        )


def difference(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """`- name shape` for what is missing, `+ name shape` for what is unexpected, sorted by name."""
    sides = [(name, "-", shape) for name, shape in expected.items() - found.items()]
    sides += [(name, "+", shape) for name, shape in found.items() - expected.items()]
    return [
        f"{sign} {name} {list(shape)}"
        for name, sign, shape in sorted(sides, key=lambda side: (side[0], side[1] == "+"))
    ]


@lru_cache
def tree_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each leaf of the parameter tree."""
    import jax  # here, so that presets can be listed without it

    from jaxlm.nn import transformer

    tree = jax.eval_shape(lambda: transformer.init(transformer.Transformer(config), jax.random.key(0)))
    return {path: leaf.shape for path, leaf in _flat(tree).items()}


def hf_shapes(rules: tuple[Rule, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the file.  Raises ValueError for a leaf that no rule holds."""
    shapes, held = tree_shapes(config), set[str]()
    expected: dict[str, tuple[int, ...]] = {}
    for rule in _applying(rules, shapes):
        held.update(rule.leaves)
        # One False, seen as the whole leaf (of one layer): the layout itself tells the shape, without its memory.
        layer = [np.broadcast_to(np.False_, shapes[path][1 if "{i}" in rule.hf else 0 :]) for path in rule.leaves]
        expected |= dict.fromkeys(rule.names(shapes), rule.layout.to_hf(config, *layer).shape)
    if missing := shapes.keys() - held:
        raise ValueError(f"no rule holds {sorted(missing)}; add one to the family's table")
    return expected


def _applying(rules: tuple[Rule, ...], shapes: Mapping[str, Any]) -> Iterator[Rule]:
    return (rule for rule in rules if shapes.keys() >= {*rule.leaves, rule.where or rule.leaves[0]})


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{above}{key}/") if isinstance(value, Mapping) else {above + key: value}
    return leaves


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


REQUIRED = object()
# What transformers calls an activation; the first name of each is the one that is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Key(NamedTuple):
    """A key of `config.json`, the field that it says, transformers' value where it is absent, and, for a closed choice,
    the format's values -> ours."""

    hf: str
    ours: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


def keyed(
    keys: tuple[Key, ...], fixed: Mapping[str, Any], only: Mapping[str, Any]
) -> tuple[Callable[[dict[str, Any]], ModelConfig], Callable[[ModelConfig], dict[str, Any]]]:
    """`config_from_hf` and `config_to_hf` of a format that says a config key by key.

    fixed: the fields of ModelConfig that the format cannot say.  only: the keys of which we know one value.
    Where two keys say one field, the first is read and both are written.
    """

    def from_hf(hf: dict[str, Any]) -> ModelConfig:
        for name, value in only.items():
            if hf.get(name, value) != value:
                raise UserError(f"config.json has {name} {hf[name]!r}; only {value!r} is known: choose another model")
        fields: dict[str, Any] = {}
        for key in keys:
            value = hf.get(key.hf, key.default)
            if value is REQUIRED:
                raise UserError(f"config.json has no {key.hf!r}; add it, or fetch the file again")
            if key.values is not None and value not in key.values:
                raise UserError(f"config.json has {key.hf} {value!r}{perhaps(str(value), key.values)}")
            fields.setdefault(key.ours, value if key.values is None else key.values[value])
        return ModelConfig(**fixed, **fields)

    def to_hf(config: ModelConfig) -> dict[str, Any]:
        hf, config = dict(only), resolved(config)
        for key in keys:
            value = getattr(config, key.ours)
            hf[key.hf] = value if key.values is None else {v: k for k, v in reversed(tuple(key.values.items()))}[value]
        return hf

    return from_hf, to_hf


def resolved(config: ModelConfig) -> ModelConfig:
    """The config with the sizes that it leaves to others spelled out."""
    return dataclasses.replace(config, kv_heads=config.K, head_width=config.C, mlp_width=config.F)


def says(family: Family, config: ModelConfig) -> bool:
    """Whether the format can say what the model computes: `config` comes back from it, but for what inference does not
    see.  Dropout and initial weights are written where the format has a place for them, and may be lost."""
    said = family.config_from_hf(family.config_to_hf(config))
    try:
        said.check()
    except UserError:  # such as heads that do not divide the width, in a format that cannot say a head width
        return False
    return _seen(said) == _seen(config) and heads(family, config) is not None


def heads(family: Family, config: ModelConfig) -> str | None:
    """The class in transformers with the config's heads, or None."""
    return next((name for had, name in family.heads.items() if set(had) == set(config.heads_on_top)), None)


def _seen(config: ModelConfig) -> ModelConfig:
    unseen: dict[str, Any] = {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initial_std": 0.0,
        "scale_residual_init": False,
    }
    unseen |= {"heads_on_top": ()} | ({"rotary_base": 0.0} if config.positions == "learned" else {})
    return dataclasses.replace(resolved(config), **unseen)
