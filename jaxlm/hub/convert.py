"""Two-way conversion between the files of Hugging Face and our parameters and configs.

A `Family` is a table from which import, export and the report of missing and unexpected tensors are derived. A `Rule`
maps a tensor of a file to leaves of the parameter tree; its `Layout` is a pair of inverse functions. A `Key` maps a key
of `config.json` to a field of `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DROPOUT_SITES, LINEAR_SIZES, Head, ModelConfig
from jaxlm.errors import UserError, suggestion
from jaxlm.hub.compressed_tensors import PendingParts, to_parts
from jaxlm.hub.safetensors import Pending
from jaxlm.nn import nodes, parameters
from jaxlm.nn.layer_parts import layers_of_rows


class Layout(NamedTuple):
    """A pair of inverse functions between a tensor of the file and our arrays, for one layer; they only move entries.

    `to_ours(config, tensor)` returns an array, or a tuple of arrays; `to_hf(config, *arrays)` returns the tensor.
    """

    to_ours: Callable[..., Any]
    to_hf: Callable[..., np.ndarray]


# Comments give shapes in the letters of `jaxlm.nn`, as ours <-> file; I and O are inputs and outputs of a projection,
# and H is K for keys and values. "linear" is torch's Linear, stored as [O, I]; "conv" is GPT-2's Conv1D, [I, O].
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


linear_query_key_value = Layout(  # three of [D, H, C] <-> [3HC, D]
    lambda config, x: tuple(part.T.reshape(config.width, -1, config.C) for part in np.split(x, 3)),
    lambda config, *parts: np.concatenate([part.reshape(config.width, -1).T for part in parts]),
)
bias_query_key_value = Layout(  # three of [H, C] <-> [3HC]
    lambda config, x: tuple(part.reshape(-1, config.C) for part in np.split(x, 3)),
    lambda config, *parts: np.concatenate([part.reshape(-1) for part in parts]),
)


def _split_grouped(config: ModelConfig, x: np.ndarray) -> list[np.ndarray]:
    """Splits rows into those of the queries, of the keys and of the values."""
    return np.split(x, np.cumsum([config.heads * config.C, config.K * config.C]))


linear_grouped_query_key_value = Layout(  # [D, H, C] and two of [D, K, C] <-> [(H + 2K)C, D]
    lambda config, x: tuple(part.T.reshape(config.width, -1, config.C) for part in _split_grouped(config, x)),
    linear_query_key_value.to_hf,
)


def _split_groups(config: ModelConfig, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits rows [K(G + 2)C, ...] into those of the queries [H, C, ...], the keys and the values [K, C, ...]."""
    rows = x.reshape(config.K, -1, config.C, *x.shape[1:])
    return rows[:, :-2].reshape(-1, config.C, *x.shape[1:]), rows[:, -2], rows[:, -1]


def _join_groups(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    rows = [query.reshape(len(key), -1, *key.shape[1:]), key[:, None], value[:, None]]
    return np.concatenate(rows, axis=1).reshape(-1, *key.shape[2:])


# Each key-value head follows its G query heads: [D, H, C] and two of [D, K, C] <-> [K(G + 2)C, D]
linear_query_key_value_by_group = Layout(
    lambda config, x: tuple(np.moveaxis(part, -1, 0) for part in _split_groups(config, x)),
    lambda config, *parts: _join_groups(*(np.moveaxis(part, 0, -1) for part in parts)),
)
bias_query_key_value_by_group = Layout(_split_groups, lambda config, *parts: _join_groups(*parts))


def _swap_pairs(config: ModelConfig, x: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    """Transposes the rotated entries of each head, seen as a matrix of these sizes; -1 is half of their number."""
    rotated = x[..., : config.R].reshape(*x.shape[:-1], *sizes).swapaxes(-1, -2).reshape(*x.shape[:-1], config.R)
    return np.concatenate([rotated, x[..., config.R :]], axis=-1)


# Rotated pairs are neighbours in the file, and R/2 entries apart in ours: [D, H, C] <-> [HC, D]
linear_heads_out_in_pairs = Layout(
    lambda config, x: _swap_pairs(config, linear_heads_out.to_ours(config, x), (-1, 2)),
    lambda config, x: linear_heads_out.to_hf(config, _swap_pairs(config, x, (2, -1))),
)
# Latent attention, whose rotated entries are the last of a head in the file, in pairs of neighbours, and first in ours.
latent_query = Layout(  # [I, H, C] <-> [HC, I]
    lambda config, x: _swap_pairs(config, np.roll(x.T.reshape(x.shape[1], -1, config.C), config.R, -1), (-1, 2)),
    lambda config, x: np.roll(_swap_pairs(config, x, (2, -1)), -config.R, -1).reshape(len(x), -1).T,
)
latent_key_value_down = Layout(  # [D, O] and [D, R] <-> [O + R, D]
    lambda config, x: (x[: -config.R].T, _swap_pairs(config, x[-config.R :].T, (-1, 2))),
    lambda config, down, rotary: np.concatenate([down.T, _swap_pairs(config, rotary, (2, -1)).T]),
)
latent_key_value = Layout(  # [I, H, C - R] and the values of each head <-> the rows of each head, [.., I]
    lambda config, x: tuple(np.split(x.T.reshape(x.shape[1], config.heads, -1), [config.C - config.R], -1)),
    lambda config, *parts: np.concatenate(parts, -1).reshape(len(parts[0]), -1).T,
)
latent_out = Layout(  # [H, values of a head, D] <-> [D, values of all heads]
    lambda config, x: x.T.reshape(config.heads, -1, config.width),
    lambda config, x: x.reshape(-1, config.width).T,
)
linear_gate_up = Layout(  # two of [D, F] <-> [2F, D]
    lambda config, x: tuple(part.T for part in np.split(x, 2)),
    lambda config, *parts: np.concatenate([part.T for part in parts]),
)
interleaved = Layout(  # two of [..., F] <-> [..., 2F], in which the entries alternate
    lambda config, x: (x[..., ::2], x[..., 1::2]),
    lambda config, *parts: np.stack(parts, -1).reshape(*parts[0].shape[:-1], -1),
)
halves = Layout(  # two of [F] <-> [2F]
    lambda config, x: tuple(np.split(x, 2)),
    lambda config, *parts: np.concatenate(parts),
)
conv_width_last = Layout(  # [n, I, O] <-> [O, I, n]
    lambda config, x: x.transpose(2, 1, 0),
    lambda config, x: x.transpose(2, 1, 0),
)
one_row = Layout(lambda config, x: x[0], lambda config, x: x[None])  # [V] <-> [1, V]


class Rule(NamedTuple):
    """A tensor of the file and the leaves that it contains.

    The rule applies if all leaves in `ours`, and the leaf `where`, if given, are in the parameter tree, the leaf
    `unless` is not, and `when` returns True for the config, so that one table covers all variants of a model.

    Attributes:
      hf: the name of the tensor; `{i}` is the layer of a row of the leaves, and `{e}` the index along
        the axis of experts after it.
      ours: the path of the leaf, or of several leaves.
      layout: the conversion.
      where: a leaf that must exist.
      unless: a leaf that must not exist.
      when: a condition on the config.
      first: the first layer with this tensor; the leaf is 1, without effect, in earlier layers.
      idle: whether transformers stores this tensor but computes with another one for the same leaf. Idle tensors are
        written, but not read.
      stand_in: the tensor that is read for this one from a file that has none of the tensors with stand-ins.
    """

    hf: str
    ours: str | tuple[str, ...]
    layout: Layout = same
    where: str | None = None
    unless: str | None = None
    when: Callable[[ModelConfig], bool] = lambda config: True
    first: int = 0
    idle: bool = False
    stand_in: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """The paths of the leaves."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def config(self, config: ModelConfig) -> ModelConfig:
        """Returns the config of the stack to which the leaves belong."""
        return config.decoder_config if self.leaves[0].startswith("decoder/") else config

    @property
    def stacked(self) -> int:
        """The number of leading axes of the leaves along which there is one tensor for each index."""
        return ("{i}" in self.hf) + ("{e}" in self.hf)

    def names(
        self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], hf: str | None = None
    ) -> dict[tuple[int, ...], str]:
        """Returns the names of the tensors in the file by their indices along the stacked axes.

        Args:
          config: the model's config.
          shapes: the shapes of the leaves by path.
          hf: the pattern of the names, such as `stand_in`; None: `self.hf`.
        """
        hf = hf or self.hf
        sizes = shapes[self.leaves[0]][: self.stacked]
        ranges = [range(self.first if axis == 0 else 0, size) for axis, size in enumerate(sizes)]
        layers = layers_of_rows(config, self.leaves[0], sizes[0]) if sizes else ()
        name = lambda row, *experts: hf.format(**dict(zip("ie", (layers[row], *experts))))
        return {index: name(*index) if index else hf for index in itertools.product(*ranges)}


def projection(hf: str, ours: str, kernel: Layout = linear, bias: Layout = same) -> tuple[Rule, Rule]:
    """Returns the rules for a Linear of torch."""
    return Rule(f"{hf}.weight", f"{ours}/kernel", kernel), Rule(f"{hf}.bias", f"{ours}/bias", bias)


def norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    """Returns the rules for a norm with an optional bias."""
    return Rule(f"{hf}.weight", f"{ours}/scale"), Rule(f"{hf}.bias", f"{ours}/bias")


def attention(hf: str, ours: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Returns the rules for the projections of an attention; their names in the file follow the prefix `hf`."""
    inputs = ((query, "query"), (key, "key"), (value, "value"))
    return (
        *(
            rule
            for theirs, name in inputs
            for rule in projection(f"{hf}{theirs}", f"{ours}/{name}", linear_heads_out, bias_heads_out)
        ),
        *projection(f"{hf}{out}", f"{ours}/out", linear_heads_in),
    )


class Family(NamedTuple):
    """A file format: the conversion of configs and tensors.

    Attributes:
      presets: configs of published models by name.
      rules: the conversion of tensors, with the names in a model with a head.
      heads: supported sets of heads -> the class of transformers; the empty tuple is the model without a head.
      prefix: prefix of the names of all tensors below the head; files of a model without a head omit it.
      config_from_hf: converts the values of config.json, except heads and labels, which are common to all families.
      config_to_hf: the inverse of `config_from_hf`.
      buffers: names of tensors that a file may contain but a model does not need; * matches anything.
      unused: names of weights that a file may contain but a model does not compute with -> what they are for. Unlike
        buffers, they are reported when a model is loaded.
      copies: tensors that repeat another tensor if the model ties them -> that other tensor.
      renames: suffixes of names in old files -> current suffixes.
      old_prefixes: prefixes of names in old files, in place of `prefix`.
      encoder: the class of transformers for the encoder of an encoder-decoder without its decoder.
      ties: whether config.json defines if embeddings are tied; otherwise the tensors do.
      naming: keys of config.json with which transformers names tensors as in the rules.
      module: the class of the Linen module; None: Transformer.
    """

    presets: dict[str, ModelConfig]
    rules: tuple[Rule, ...]
    heads: dict[tuple[Head, ...], str]
    prefix: str
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    buffers: tuple[str, ...] = ()
    unused: Mapping[str, str] = {}
    copies: Mapping[str, str] = {}
    renames: Mapping[str, str] = {}
    old_prefixes: tuple[str, ...] = ()
    encoder: str | None = None
    ties: bool = True
    naming: Mapping[str, Any] = {}
    module: Any = None


def to_ours(family: Family, config: ModelConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameter tree as NumPy arrays in the dtypes of the file.

    Raises:
      UserError: if tensors are missing, are unexpected, or have another shape than `config` requires.
    """
    check_shapes(
        hf_shapes(family, config), {name: tuple(x.shape) for name, x in tensors.items()}, "tensors of the file"
    )
    return nested({path: reader.read(config, tensors) for path, reader in readers(family, config).items()})


class Reader(NamedTuple):
    """Reads one leaf, or a part of it, from the tensors of a file.

    Attributes:
      rule: the rule for the leaf.
      which: index of the leaf in `rule.leaves`.
      names: names of the tensors, by their indices along the stacked axes.
      shape: shape of the leaf.
    """

    rule: Rule
    which: int
    names: dict[tuple[int, ...], str]
    shape: tuple[int, ...]

    def read(self, config: ModelConfig, tensors: Mapping[str, Any], index: Any = (), dtype: Any = None) -> np.ndarray:
        """Returns the slices `index` of the leaf in `dtype`, or in the file's dtype; it reads one tensor at a time."""
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        leaf_dtype = dtype or next((tensors[name].dtype for name in self.names.values()), np.dtype(np.float32))
        leaf = np.empty([len(range(n)[part]) for n, part in zip(self.shape, index, strict=True)], leaf_dtype)
        stacked = self.rule.stacked
        chosen = [enumerate(range(n)[part]) for n, part in zip(self.shape[:stacked], index)]
        for pairs in itertools.product(*chosen):
            place: Any = (*(row for row, _ in pairs), ...)
            at = tuple(i for _, i in pairs)
            if at in self.names:
                self._fill(leaf[place], config, tensors[self.names[at]], index[stacked:])
            else:
                leaf[place] = 1
        return leaf

    def _fill(self, part: np.ndarray, config: ModelConfig, tensor: Any, index: tuple[slice, ...]) -> None:
        """Copies from a tensor; only the indexed entries are read."""
        mapped = hasattr(tensor, "release")
        arrays = self.rule.layout.to_ours(self.rule.config(config), tensor.view() if mapped else np.asarray(tensor))
        part[...] = (arrays[self.which] if isinstance(self.rule.ours, tuple) else arrays)[index]
        if mapped:
            tensor.release()


def readers(family: Family, config: ModelConfig) -> dict[str, Reader]:
    """Returns the reader of each leaf of the parameter tree by path."""
    shapes = tree_shapes(config, family.module)
    result: dict[str, Reader] = {}
    for rule in applying(family.rules, config, shapes):
        if not rule.idle:
            result |= {
                p: Reader(rule, which, rule.names(config, shapes), shapes[p]) for which, p in enumerate(rule.leaves)
            }
    return result


def sources(family: Family, config: ModelConfig) -> dict[str, str]:
    """Returns the name of the tensor that each leaf is read from, by path; `{i}` is the layer."""
    return {path: reader.rule.hf for path, reader in readers(family, config).items()}


def idle(family: Family, config: ModelConfig) -> set[str]:
    """Returns the names of the tensors that are written, but not read."""
    shapes = tree_shapes(config, family.module)
    return {
        name
        for rule in applying(family.rules, config, shapes)
        if rule.idle
        for name in rule.names(config, shapes).values()
    }


def to_hf(family: Family, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Pending]:
    """Returns the tensors of the file, which are computed when they are written; nodes become dense arrays.

    A tensor that consists of quantised nodes also has them as `parts`, if the format has layers.

    Raises:
      UserError: if `params` do not have the shapes that `config` requires.
    """
    shapes, leaves = tree_shapes(config, family.module), flat(params)
    arrays = {path: nodes.dense_like(leaf, parameters.stacked_axes(path)) for path, leaf in leaves.items()}
    check_shapes(shapes, {path: tuple(array.shape) for path, array in arrays.items()}, "parameters")
    expected, tensors = hf_shapes(family, config), dict[str, Pending]()
    for rule in applying(family.rules, config, shapes):
        parts = [leaves[path] for path in rule.leaves]
        quantised = _quantised_layers(rule, config, parts)
        for index, name in rule.names(config, shapes).items():
            make = partial(_join, rule, config, parts, index)
            kind = np.dtype(arrays[rule.leaves[0]].dtype)
            tensors[name] = Pending(expected[name], kind, make, quantised and quantised(index))
    return tensors


def _quantised_layers(
    rule: Rule, config: ModelConfig, leaves: list[Any]
) -> Callable[[tuple[int, ...]], PendingParts] | None:
    """Returns a function from the index of a matrix to its quantised tensor; None: it is written dense."""
    stacked = parameters.stacked_axes(rule.leaves[0])
    if stacked != rule.stacked or not rule.hf.endswith(".weight"):
        return None
    return to_parts(partial(rule.layout.to_hf, rule.config(config)), leaves, stacked)


def _join(rule: Rule, config: ModelConfig, leaves: list[Any], index: tuple[int, ...]) -> np.ndarray:
    inner = parameters.stacked_axes(rule.leaves[0]) - rule.stacked  # axes of matrices within the tensor
    array = partial(nodes.of_layer, layer=index, stacked=inner)
    return rule.layout.to_hf(rule.config(config), *(np.asarray(array(leaf)) for leaf in leaves))


class Canonical(NamedTuple):
    """The tensors of a file by their names in the family's rules.

    Attributes:
      tensors: tensors by their names in the rules.
      names: name in the file -> name in the rules; for a copy, the name of its original.
      buffers: tensors that the family declares as buffers or as unused, by their names in the file.
    """

    tensors: dict[str, Any]
    names: dict[str, str]
    buffers: dict[str, Any]


def canonical(family: Family, config: ModelConfig, tensors: Mapping[str, Any]) -> Canonical:
    """Renames the tensors of a file, and separates buffers and copies.

    Raises:
      UserError: if two tensors have the same name, or if a copy differs from its original.
    """
    shapes = tree_shapes(config, family.module)
    rules_of = list(applying(family.rules, config, shapes))
    expected = {name for rule in rules_of for name in rule.names(config, shapes).values()}
    buffer = any_of((*family.buffers, *family.unused))
    known = any_of([*(rule.hf for rule in family.rules), *family.copies])
    result = Canonical({}, {}, {})
    for written, tensor in tensors.items():
        name = written
        for old, new in family.renames.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        for old in family.old_prefixes:
            name = family.prefix + name.removeprefix(old) if name.startswith(old) else name
        full = family.prefix + name
        name = full if known.fullmatch(full) or buffer.fullmatch(full) else name
        if buffer.fullmatch(name) and name not in expected:
            result.buffers[written] = tensor
            continue
        if name in result.tensors:
            raise UserError(f"the file contains {name} twice, once as {written}; remove one of them from the file")
        result.tensors[name], result.names[written] = tensor, name
    vocabulary = ("lm_head/kernel", "masked_lm_head/vocabulary/kernel")  # not copies in an untied model
    own = set() if config.tied_embeddings else {rule.hf for rule in family.rules if rule.ours in vocabulary}
    for copy, original in family.copies.items():
        if copy in result.tensors and copy not in expected and copy not in own:
            tensor = result.tensors.pop(copy)
            # A writer that stores shared memory once may have kept either name.
            if not equal(tensor, result.tensors.setdefault(original, tensor)):
                raise UserError(
                    f"{copy} differs from {original}, but must be a copy of it in this model; remove one of them, "
                    f"or set tie_word_embeddings to false in config.json if the model has both"
                )
            result.names.update({written: original for written, name in result.names.items() if name == copy})
    _add_stand_ins(rules_of, config, shapes, result.tensors)
    return result


def _add_stand_ins(rules: list[Rule], config: ModelConfig, shapes: Mapping[str, Any], tensors: dict[str, Any]) -> None:
    """Adds the tensors that a file lacks and that have stand-ins, unless it has some of them."""
    lacks: dict[str, str] = {}
    for rule in rules:
        if rule.stand_in is not None:
            own, others = (rule.names(config, shapes, hf).values() for hf in (rule.hf, rule.stand_in))
            lacks |= dict(zip(own, others))
    if not lacks.keys() & tensors.keys():
        tensors.update({name: tensors[other] for name, other in lacks.items() if other in tensors})


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that matches each of the names; `{i}` and `{e}` match any number, `*` anything."""
    parts = (re.sub(r"\\{[ie]\\}", r"\\d+", re.escape(name)).replace(r"\*", ".*") for name in names)
    return re.compile("|".join(parts) or "(?!)")


def unused(family: Family, names: Iterable[str]) -> tuple[str, ...]:
    """Returns, for messages, the weights among these tensors that a model does not compute with."""
    counts = {p: sum(any_of((p,)).fullmatch(name) is not None for name in names) for p in family.unused}
    return tuple(f"{count} tensors of {family.unused[p]} ({p})" for p, count in counts.items() if count)


def equal(a: Any, b: Any) -> bool:
    """Returns whether two tensors have the same bytes; they are read in chunks."""
    if a is b or tuple(a.shape) != tuple(b.shape) or not a.shape:
        return a is b or (tuple(a.shape) == tuple(b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes())
    return all(a[i : i + 1024].tobytes() == b[i : i + 1024].tobytes() for i in range(0, a.shape[0], 1024))


# Fields that affect only training.
TRAINING_FIELDS = (
    *("dropout", "attention_dropout", *DROPOUT_SITES),
    *("initial_std", "initial_by_inputs", "scale_residual_init"),
    *("expert_capacity", "balance_loss", "router_z_loss"),
)
MAX_LINES = 40  # in a message about weights that do not match the config


def check_shapes(expected: Mapping[str, tuple], found: Mapping[str, tuple], what: str) -> None:
    """Raises UserError with the differences of two dicts from names to shapes, unless they are equal.

    Args:
      expected: the shapes that the config requires.
      found: the actual shapes.
      what: the kind of arrays, for the message.
    """
    if lines := difference(expected, found):
        more = [f"... and {len(lines) - MAX_LINES:,} more"] if len(lines) > MAX_LINES else []
        raise UserError(
            f"the {what} do not match the model config (- missing, + unexpected), {len(lines)} lines:\n  "
            + "\n  ".join(lines[:MAX_LINES] + more)
            + "\nchange the config, or use the weights that belong to it"
        )


def difference(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> list[str]:
    """Returns lines `- name shape` for missing and `+ name shape` for unexpected names, sorted by name."""
    sides = [(name, "-", shape) for name, shape in expected.items() - found.items()]
    sides += [(name, "+", shape) for name, shape in found.items() - expected.items()]
    return [
        f"{sign} {name} {list(shape)}"
        for name, sign, shape in sorted(sides, key=lambda side: (side[0], side[1] == "+"))
    ]


def tree_shapes(config: ModelConfig, module: Any = None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each leaf of the parameters of `module(config)` by path; None: a Transformer."""
    if module:
        return _traced_shapes(config, module)
    plain = ModelConfig()
    same = {name: getattr(plain, name) for name in TRAINING_FIELDS}  # configs that differ only in these share a trace
    return _traced_shapes(dataclasses.replace(config, **same), None)


@lru_cache
def _traced_shapes(config: ModelConfig, module: Any) -> dict[str, tuple[int, ...]]:
    import jax  # not at the top, so that listing presets does not import it

    from jaxlm.nn import transformer

    instance = (module or transformer.Transformer)(config)
    tree = jax.eval_shape(lambda: transformer.init(instance, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def hf_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the file by name; raises ValueError if a leaf has no rule."""
    shapes, covered = tree_shapes(config, family.module), set[str]()
    expected: dict[str, tuple[int, ...]] = {}
    for rule in applying(family.rules, config, shapes):
        covered.update(rule.leaves)
        # A broadcast scalar has the shape of the leaf (of one layer) without its memory; the layout converts the shape.
        layer = [np.broadcast_to(np.False_, shapes[path][rule.stacked :]) for path in rule.leaves]
        expected |= dict.fromkeys(
            rule.names(config, shapes).values(), rule.layout.to_hf(rule.config(config), *layer).shape
        )
    if missing := shapes.keys() - covered:
        raise ValueError(f"there is no rule for {sorted(missing)}; add one to the family's table")
    return expected


def applying(rules: tuple[Rule, ...], config: ModelConfig, shapes: Mapping[str, Any]) -> Iterator[Rule]:
    """Returns the rules that apply to a model with this config and leaves at these paths."""
    return (
        rule
        for rule in rules
        if shapes.keys() >= {*rule.leaves, rule.where or rule.leaves[0]}
        and rule.unless not in shapes
        and rule.when(config)
    )


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the leaves of a tree of dictionaries by path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{above}{key}/") if isinstance(value, Mapping) else {above + key: value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of dictionaries for leaves by path; the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


REQUIRED = object()
# Name of an activation in transformers -> ours; the first name for each is the one that is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


# Fields -> the field that they default to: if both are equal in a file, the first is set to None.
_FOLLOWING = {"decoder_heads": "heads", "decoder_mlp_width": "mlp_width", **dict.fromkeys(DROPOUT_SITES, "dropout")}


class Key(NamedTuple):
    """A key of `config.json`.

    Attributes:
      hf: the key.
      ours: the field of ModelConfig.
      default: the default of transformers if the key is missing.
      values: for a closed choice, the format's values -> ours.
    """

    hf: str
    ours: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


def check_only(hf: dict[str, Any], only: Mapping[str, Any]) -> None:
    """Raises UserError if a key of config.json has another value than the only supported one."""
    for name, value in only.items():
        if hf.get(name) not in (None, value):
            raise UserError(f"config.json has {name} {hf[name]!r}; only {value!r} is supported: choose another model")


def key_conversion(
    keys: tuple[Key, ...], fixed: Mapping[str, Any], only: Mapping[str, Any]
) -> tuple[Callable[[dict[str, Any]], ModelConfig], Callable[[ModelConfig], dict[str, Any]]]:
    """Returns `config_from_hf` and `config_to_hf` for a format that converts key by key.

    If two keys correspond to one field, they must agree.

    Args:
      keys: the keys.
      fixed: values of the fields of ModelConfig that the format does not contain.
      only: keys for which only one value is supported.
    """

    def from_hf(hf: dict[str, Any]) -> ModelConfig:
        check_only(hf, only)
        fields: dict[str, Any] = {}
        for key in keys:
            value = hf.get(key.hf, key.default)
            if value is REQUIRED:
                raise UserError(f"config.json has no {key.hf!r}; add it, or download the file again")
            if key.values is not None:
                matches = [ours for theirs, ours in key.values.items() if theirs == value]
                if not matches:
                    raise UserError(f"config.json has {key.hf} {value!r}{suggestion(str(value), map(str, key.values))}")
                value = matches[0]
            if key.hf in hf and fields.setdefault(key.ours, value) != value:
                raise UserError(
                    f"config.json has {key.hf} {value!r}, but a related key has {fields[key.ours]!r}; "
                    f"only equal values are supported: choose another model"
                )
            fields.setdefault(key.ours, value)
        for name, other in _FOLLOWING.items():
            if name in fields and fields[name] == fields.get(other):
                fields[name] = None
        return ModelConfig(**{**fixed, **fields})

    def to_hf(config: ModelConfig) -> dict[str, Any]:
        hf, config = dict(only), resolved(config)
        for key in keys:
            value = getattr(config, key.ours)
            if value is None and key.ours in DROPOUT_SITES and key.default is not None:
                value = config.dropout  # null has no meaning for this key
            if key.values is not None:
                names = [theirs for theirs, ours in key.values.items() if ours == value]
                if not names:
                    raise UserError(
                        f"the format does not support {key.ours} {value!r}{suggestion(str(value), key.values.values())}"
                    )
                value = names[0]
            hf[key.hf] = value
        return hf

    return from_hf, to_hf


def resolved(config: ModelConfig) -> ModelConfig:
    """Returns the config with explicit values for the sizes that default to other fields."""
    kinds = config.layer_kinds
    windows, decoder = config.layer_windows, config.decoder_config
    own_kinds, decoder_layers = decoder.layer_kinds, config.decoder_layers or config.layers
    sizes: dict[str, Any] = {
        "layer_windows": tuple(windows[i % len(windows)] for i in range(config.layers)) if windows else (),
        "decoder_layer_kinds": tuple(own_kinds[i % len(own_kinds)] for i in range(decoder_layers)),
        "decoder_max_length": decoder.max_length,
        "kv_heads": config.K,
        "head_width": config.C,
        "rotary_width": config.R,
        "mlp_width": config.F,
        "value_width": config.value_C,
        "attention_scale": config.C**-0.5 if config.attention_scale is None else config.attention_scale,
        "distinct_layers": config.distinct_layers or config.layers,
        "decoder_layers": decoder_layers,
        "decoder_heads": config.decoder_heads or config.heads,
        "decoder_mlp_width": config.decoder_mlp_width or config.F,
        "layer_kinds": tuple(kinds[i % len(kinds)] for i in range(config.layers)),
        **_resolved_parts(config),
        "transform_activation": config.transform_activation or config.activation,
        **dict(zip(LINEAR_SIZES, config.linear_sizes)),
    }
    return dataclasses.replace(config, **sizes)


def _resolved_parts(config: ModelConfig) -> dict[str, Any]:
    """Returns the mixer and the feed-forward layer of each layer, or () if all are equal, and the width of experts."""
    fields: dict[str, Any] = {}
    for name, pattern in (("mixer", config.mixer_pattern), ("feed_forward", config.feed_forward_pattern)):
        layers = tuple(pattern[i % len(pattern)] for i in range(config.layers))
        fields[f"{name}s"] = () if set(layers) == {getattr(config, name)} else layers
    if "experts" in config.feed_forward_pattern:
        fields["expert_width"] = config.expert_F
    return fields


def shortest(kinds: list[Any]) -> tuple[Any, ...]:
    """Returns the shortest prefix of `kinds` that gives the whole list when repeated."""
    lengths = range(1, len(kinds) + 1)
    return next((tuple(kinds[:n]) for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds))), ())


def decoder_tokens(family: Family) -> str | None:
    """Returns the tensor that shows whether the decoder has its own token embeddings; None: there is none."""
    name = f"{family.prefix}decoder.embed_tokens.weight"
    return name if family.prefix and name in family.copies else None


def can_represent(family: Family, config: ModelConfig) -> bool:
    """Returns whether the format can represent the computation of a model.

    This is the case if `config` survives the conversion, except for fields that do not affect inference, such as
    dropout and the initial weights, which may be lost.
    """
    if heads(family, config) is None:
        return False
    try:
        back = family.config_from_hf(family.config_to_hf(config) | {"architectures": [heads(family, config)]})
        back = dataclasses.replace(back, heads_on_top=config.heads_on_top)
        if decoder_tokens(family) and not config.tied_embeddings:  # read from the tensors
            back = dataclasses.replace(back, decoder_tokens=config.decoder_tokens)
        back.check()
        if not family.ties:  # read from the tensors
            back = dataclasses.replace(back, tied_embeddings=config.tied_embeddings)
    except UserError:  # for example, a head width that the format cannot represent
        return False
    return inference_config(back) == inference_config(config)


def heads(family: Family, config: ModelConfig) -> str | None:
    """Returns the class of transformers with the heads of the config, or None."""
    if family.encoder and config.structure == "encoder":
        return None if config.heads_on_top else family.encoder
    return next((name for had, name in family.heads.items() if set(had) == set(config.heads_on_top)), None)


def inference_config(config: ModelConfig) -> ModelConfig:
    """Returns the config with defaults for all fields that do not affect inference.

    Two models with equal results compute the same function of their parameters.
    """
    config, on_top = resolved(config), set(config.heads_on_top)
    rotary, scaling, both = config.positions == "rotary", config.rotary_scaling, config.structure == "encoder_decoder"
    local_decoder = both and config.decoder_config.has_local_layers
    unused = {  # fields -> whether they have no effect
        (*TRAINING_FIELDS, "labels", "start_token"): True,
        ("max_length", "decoder_max_length"): config.positions != "learned",
        ("position_offset", "padding_token"): config.positions not in ("learned", "sinusoidal"),
        ("count_padding",): config.positions != "learned",
        ("sinusoidal_to_base",): config.positions != "sinusoidal",
        ("rotary_base",): not rotary and config.positions != "sinusoidal" and config.relative != "transformer_xl",
        ("rotary_scaling", "rotary_attention"): not rotary,
        ("rotary_factor",): not rotary or scaling in ("none", "longrope"),
        ("rotary_length",): not rotary or scaling in ("none", "linear"),
        ("rotary_low", "rotary_high"): not rotary or scaling not in ("llama3", "yarn"),
        ("rotary_truncate",): not rotary or scaling != "yarn",
        ("rotary_short", "rotary_long"): not rotary or scaling != "longrope",
        ("rotary_width",): not rotary,
        ("local_rotary_base",): not rotary or not config.has_local_layers,
        ("window",): not config.has_local_layers or (config.layer_windows and not local_decoder),
        ("global_tokens",): config.global_tokens in ("none", "head") and config.global_rule == "none",
        ("separator_token",): config.global_rule != "question",
        ("query_key_norm_whole",): not config.query_key_norm,
        ("alibi_scaled",): config.relative != "alibi",
        ("types",): config.types > 0 and config.types_in == "attention",  # only equality has an effect
        ("relative_buckets",): config.relative in ("none", "transformer_xl"),
        ("relative_distance",): config.relative == "none",
        ("relative_terms", "relative_shared", "relative_norm"): config.relative != "disentangled",
        ("attention_scale",): config.relative == "disentangled",
        ("conv_activation",): not config.conv_width,
        (*LINEAR_SIZES, "linear_conv_width"): "gated_delta" not in config.mixer_pattern,
        ("experts_per_token", "normalize_experts"): "experts" not in config.feed_forward_pattern,
        ("expert_limit", "expert_offset", "expert_scale", "router_scores", "expert_groups"): "experts"
        not in config.feed_forward_pattern,
        ("expert_groups_per_token",): config.expert_groups == 1,
        ("value_width", "query_rank", "key_value_rank"): "latent" not in config.mixer_pattern,
        ("mlp_width",): set(config.feed_forward_pattern) == {"experts"},
        ("decoder_layers", "decoder_heads", "decoder_mlp_width", "decoder_tokens", "decoder_layer_kinds"): not both,
        ("decoder_max_length",): not both,
        ("scale_logits", "logit_divisor", "logit_cap"): "lm" not in on_top,
        ("tied_embeddings",): not on_top & {"lm", "masked_lm"},
        ("masked_lm_bias",): "masked_lm" not in on_top,
        ("transform_activation",): "masked_lm" not in on_top and not config.shared_transform,
        ("classes_from", "classes_activation"): "classes" not in on_top,
    }
    no_bias = {
        "down": "mlp" in config.biases,
        "experts": "experts" not in config.feed_forward_pattern,
        "norm": config.norm != "layernorm",
        "transform": "masked_lm" not in on_top and not config.shared_transform,
        "classes": "classes" not in on_top,
        "lm": "lm" not in on_top,
    }
    biases = tuple(sorted(bias for bias in config.biases if not no_bias.get(bias)))
    plain = dataclasses.asdict(ModelConfig())
    fields = {name: plain[name] for names, no_effect in unused.items() if no_effect for name in names}
    return dataclasses.replace(config, biases=biases, **fields)
