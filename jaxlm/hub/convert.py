"""A family is a two-way table: from it follow import, export, the strict report of what does not fit, and the tests.

A `Rule` ties a tensor of a file to leaves of our parameter tree; its `Layout` is a pair of functions, inverse of each
other.  A `Key` does the same for `config.json` and `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DROPOUT_SITES, Head, ModelConfig
from jaxlm.errors import UserError, perhaps
from jaxlm.hub.safetensors import Pending


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


linear_query_key_value = Layout(  # three of [D, H, C] <-> [3HC, D]
    lambda config, x: tuple(part.T.reshape(config.width, -1, config.C) for part in np.split(x, 3)),
    lambda config, *parts: np.concatenate([part.reshape(config.width, -1).T for part in parts]),
)
bias_query_key_value = Layout(  # three of [H, C] <-> [3HC]
    lambda config, x: tuple(part.reshape(-1, config.C) for part in np.split(x, 3)),
    lambda config, *parts: np.concatenate([part.reshape(-1) for part in parts]),
)
linear_gate_up = Layout(  # two of [D, F] <-> [2F, D]
    lambda config, x: tuple(part.T for part in np.split(x, 2)),
    lambda config, *parts: np.concatenate([part.T for part in parts]),
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
    """A tensor of the file and the leaves that it holds, `{i}` in `hf` being the stacked layer axis of ours.

    It applies where all of `ours`, and the leaf `where` if named, exist in the parameter tree, and the leaf `unless`
    does not, so that one table serves every choice.
    """

    hf: str
    ours: str | tuple[str, ...]
    layout: Layout = same
    where: str | None = None
    unless: str | None = None
    first: int = 0  # the first layer that has it; a leaf's rows before are of no effect, and 1
    idle: bool = False  # transformers keeps the tensor and computes with another of the same leaf: written, not read

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that it holds."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config as the stack of its leaves has it."""
        return config.of_decoder if self.leaves[0].startswith("decoder/") else config

    def names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
        """Its tensors in the file, by layer where there is `{i}`, else one under 0."""
        if "{i}" not in self.hf:
            return {0: self.hf}
        return {i: self.hf.format(i=i) for i in range(self.first, shapes[self.leaves[0]][0])}


def projection(hf: str, ours: str, kernel: Layout = linear, bias: Layout = same) -> tuple[Rule, Rule]:
    """A Linear of torch."""
    return Rule(f"{hf}.weight", f"{ours}/kernel", kernel), Rule(f"{hf}.bias", f"{ours}/bias", bias)


def norm(hf: str, ours: str) -> tuple[Rule, Rule]:
    """A norm, with the bias if it has one."""
    return Rule(f"{hf}.weight", f"{ours}/scale"), Rule(f"{hf}.bias", f"{ours}/bias")


def attention(hf: str, ours: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """The projections of an attention, by their names after `hf`."""
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
    """A file format: how it says a config and its tensors.  Tensor names are those of a model with a head."""

    presets: dict[str, ModelConfig]
    rules: tuple[Rule, ...]
    heads: dict[tuple[Head, ...], str]  # head sets that the format has -> its class in transformers; (): the body
    prefix: str  # of the body's tensors; files may leave it out, and do where there is only a body
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]  # all but heads and labels, which are read alike for all
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    buffers: tuple[str, ...] = ()  # tensors that a file may hold and a model does not need; * is anything
    copies: Mapping[str, str] = {}  # tensors that repeat another where the model ties them -> that other
    renames: Mapping[str, str] = {}  # endings of names in old files -> those of today
    encoder: str | None = None  # class in transformers of the encoder alone
    ties: bool = True  # whether config.json tells if embeddings are tied; else the tensors do
    naming: Mapping[str, Any] = {}  # keys of config.json that say that tensors are named as in the rules
    module: Any = None  # the class of Linen module that computes it; None: Transformer


def to_ours(family: Family, config: ModelConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree, numpy arrays in the file's dtype.  Raises UserError where the tensors are not exactly those
    of `config`: missing, unexpected, or of another shape."""
    refuse(hf_shapes(family, config), {name: tuple(x.shape) for name, x in tensors.items()}, "tensors of the file")
    return nested({path: reader.read(config, tensors) for path, reader in readers(family, config).items()})


class Reader(NamedTuple):
    """Reads one leaf, or a part of it, from the tensors of a file."""

    rule: Rule
    which: int  # of the rule's leaves
    names: dict[int, str]
    shape: tuple[int, ...]

    def read(self, config: ModelConfig, tensors: Mapping[str, Any], index: Any = (), dtype: Any = None) -> np.ndarray:
        """The leaf at `index` (slices), in `dtype`, or the file's.  No more than one tensor is read at a time."""
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        kept = dtype or next((tensors[name].dtype for name in self.names.values()), np.dtype(np.float32))
        leaf = np.empty([len(range(n)[part]) for n, part in zip(self.shape, index, strict=True)], kept)
        if "{i}" not in self.rule.hf:
            self._fill(leaf, config, tensors[self.names[0]], index)
            return leaf
        for row, i in enumerate(range(self.shape[0])[index[0]]):
            if i in self.names:
                self._fill(leaf[row, ...], config, tensors[self.names[i]], index[1:])
            else:
                leaf[row] = 1
        return leaf

    def _fill(self, part: np.ndarray, config: ModelConfig, tensor: Any, index: tuple[slice, ...]) -> None:
        """Copies from a tensor, which is read no further than it is indexed."""
        mapped = hasattr(tensor, "release")
        found = self.rule.layout.to_ours(self.rule.config(config), tensor.view() if mapped else np.asarray(tensor))
        part[...] = (found[self.which] if isinstance(self.rule.ours, tuple) else found)[index]
        if mapped:
            tensor.release()


def readers(family: Family, config: ModelConfig) -> dict[str, Reader]:
    """Path of each leaf of the parameter tree -> what reads it."""
    shapes = tree_shapes(config, family.module)
    found: dict[str, Reader] = {}
    for rule in _applying(family.rules, shapes):
        if not rule.idle:
            found |= {p: Reader(rule, which, rule.names(shapes), shapes[p]) for which, p in enumerate(rule.leaves)}
    return found


def sources(family: Family, config: ModelConfig) -> dict[str, str]:
    """Path of each leaf -> the tensor that it is read from, `{i}` being the layer."""
    return {path: reader.rule.hf for path, reader in readers(family, config).items()}


def idle(family: Family, config: ModelConfig) -> set[str]:
    """The file's tensors that are written and not read."""
    shapes = tree_shapes(config, family.module)
    return {name for rule in _applying(family.rules, shapes) if rule.idle for name in rule.names(shapes).values()}


def to_hf(family: Family, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Pending]:
    """The file's tensors, each made when it is written.  Raises UserError where `params` is not of `config`."""
    shapes, leaves = tree_shapes(config, family.module), flat(params)
    refuse(shapes, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, "parameters")
    expected, tensors = hf_shapes(family, config), dict[str, Pending]()
    for rule in _applying(family.rules, shapes):
        parts = [leaves[path] for path in rule.leaves]
        for i, name in rule.names(shapes).items():
            make = partial(_joined, rule, config, parts, i)
            tensors[name] = Pending(expected[name], np.dtype(parts[0].dtype), make)
    return tensors


def _joined(rule: Rule, config: ModelConfig, leaves: list[Any], layer: int) -> np.ndarray:
    return rule.layout.to_hf(
        rule.config(config), *(np.asarray(leaf[layer] if "{i}" in rule.hf else leaf) for leaf in leaves)
    )


class Canonical(NamedTuple):
    """A file's tensors under the names of its family's rules."""

    tensors: dict[str, Any]
    names: dict[str, str]  # name in the file -> the rules' name; of a copy, that of its original
    buffers: dict[str, Any]  # what the family declares as such, by its name in the file


def canonical(family: Family, config: ModelConfig, tensors: Mapping[str, Any]) -> Canonical:
    """Renames the tensors, and sets aside what the family declares as buffer or copy.

    Raises UserError for two tensors of one name, and for a copy that differs from its original.
    """
    shapes = tree_shapes(config, family.module)
    rules = _applying(family.rules, shapes)
    expected = {name for rule in rules for name in rule.names(shapes).values()}
    buffer = any_of(family.buffers)
    known = any_of([*(rule.hf for rule in family.rules), *family.copies])
    found = Canonical({}, {}, {})
    for written, tensor in tensors.items():
        name = written
        for old, new in family.renames.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        full = family.prefix + name
        name = full if known.fullmatch(full) or buffer.fullmatch(full) else name
        if buffer.fullmatch(name) and name not in expected:
            found.buffers[written] = tensor
            continue
        if name in found.tensors:
            raise UserError(f"two tensors stand for {name}, one of them {written}; remove one from the file")
        found.tensors[name], found.names[written] = tensor, name
    vocabulary = ("lm_head/kernel", "masked_lm_head/vocabulary/kernel")  # of an untied model no copies
    own = set() if config.tied_embeddings else {rule.hf for rule in family.rules if rule.ours in vocabulary}
    for copy, original in family.copies.items():
        if copy in found.tensors and copy not in expected and copy not in own:
            tensor = found.tensors.pop(copy)
            # A writer that drops shared memory may have kept either name.
            if not equal(tensor, found.tensors.setdefault(original, tensor)):
                raise UserError(
                    f"{copy} differs from {original}, of which it is a copy in this model; remove one from the file, "
                    f"or set tie_word_embeddings to false in config.json if the model keeps both"
                )
            found.names.update({written: original for written, name in found.names.items() if name == copy})
    return found


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the names, `{i}` being any number and `*` anything."""
    parts = (re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\*", ".*") for name in names)
    return re.compile("|".join(parts) or "(?!)")


def equal(a: Any, b: Any) -> bool:
    """Whether two tensors hold the same bytes, read a part at a time."""
    if a is b or tuple(a.shape) != tuple(b.shape) or not a.shape:
        return a is b or (tuple(a.shape) == tuple(b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes())
    return all(a[i : i + 1024].tobytes() == b[i : i + 1024].tobytes() for i in range(0, a.shape[0], 1024))


MOST_LINES = 40  # of a message about weights and a config that do not belong to each other


def refuse(expected: Mapping[str, tuple], found: Mapping[str, tuple], what: str) -> None:
    """Raises UserError that lists both sides, names and shapes, `MOST_LINES` of them, unless they are equal."""
    if lines := difference(expected, found):
        more = [f"... and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
        raise UserError(
            f"the {what} do not fit the model config (- missing, + unexpected), {len(lines)} lines:\n  "
            + "\n  ".join(lines[:MOST_LINES] + more)
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
def tree_shapes(config: ModelConfig, module: Any = None) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each leaf of the parameter tree of `module(config)`, by default a Transformer's."""
    import jax  # here, so that presets can be listed without it

    from jaxlm.nn import transformer

    made = (module or transformer.Transformer)(config)
    tree = jax.eval_shape(lambda: transformer.init(made, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def hf_shapes(family: Family, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of the file.  Raises ValueError for a leaf that no rule holds."""
    shapes, held = tree_shapes(config, family.module), set[str]()
    expected: dict[str, tuple[int, ...]] = {}
    for rule in _applying(family.rules, shapes):
        held.update(rule.leaves)
        # One False, seen as the whole leaf (of one layer): the layout itself tells the shape, without its memory.
        layer = [np.broadcast_to(np.False_, shapes[path][1 if "{i}" in rule.hf else 0 :]) for path in rule.leaves]
        expected |= dict.fromkeys(rule.names(shapes).values(), rule.layout.to_hf(rule.config(config), *layer).shape)
    if missing := shapes.keys() - held:
        raise ValueError(f"no rule holds {sorted(missing)}; add one to the family's table")
    return expected


def _applying(rules: tuple[Rule, ...], shapes: Mapping[str, Any]) -> Iterator[Rule]:
    return (
        rule
        for rule in rules
        if shapes.keys() >= {*rule.leaves, rule.where or rule.leaves[0]} and rule.unless not in shapes
    )


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Path -> leaf of a tree of dictionaries."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{above}{key}/") if isinstance(value, Mapping) else {above + key: value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
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
    "tanh": "tanh",
}


# Fields that are None where they are as another field, whatever way the file says it.
_FOLLOWING = {"decoder_heads": "heads", "decoder_mlp_width": "mlp_width", **dict.fromkeys(DROPOUT_SITES, "dropout")}


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
    Where two keys say one field, they must agree.
    """

    def from_hf(hf: dict[str, Any]) -> ModelConfig:
        for name, value in only.items():
            if hf.get(name) not in (None, value):
                raise UserError(f"config.json has {name} {hf[name]!r}; only {value!r} is known: choose another model")
        fields: dict[str, Any] = {}
        for key in keys:
            value = hf.get(key.hf, key.default)
            if value is REQUIRED:
                raise UserError(f"config.json has no {key.hf!r}; add it, or fetch the file again")
            if key.values is not None:
                known = [ours for theirs, ours in key.values.items() if theirs == value]
                if not known:
                    raise UserError(f"config.json has {key.hf} {value!r}{perhaps(str(value), map(str, key.values))}")
                value = known[0]
            if key.hf in hf and fields.setdefault(key.ours, value) != value:
                raise UserError(
                    f"config.json has {key.hf} {value!r}, where another key for the same says {fields[key.ours]!r}; "
                    f"only equal ones are known: choose another model"
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
                value = config.dropout  # a key of which null says nothing
            if key.values is not None:
                names = [theirs for theirs, ours in key.values.items() if ours == value]
                if not names:
                    raise UserError(
                        f"the format cannot say {key.ours} {value!r}{perhaps(str(value), key.values.values())}"
                    )
                value = names[0]
            hf[key.hf] = value
        return hf

    return from_hf, to_hf


def resolved(config: ModelConfig) -> ModelConfig:
    """The config with the sizes that it leaves to others spelled out."""
    kinds = config.layer_kinds
    sizes: dict[str, Any] = {
        "kv_heads": config.K,
        "head_width": config.C,
        "mlp_width": config.F,
        "attention_scale": config.C**-0.5 if config.attention_scale is None else config.attention_scale,
        "distinct_layers": config.distinct_layers or config.layers,
        "decoder_layers": config.decoder_layers or config.layers,
        "decoder_heads": config.decoder_heads or config.heads,
        "decoder_mlp_width": config.decoder_mlp_width or config.F,
        "layer_kinds": tuple(kinds[i % len(kinds)] for i in range(config.layers)),
        "transform_activation": config.transform_activation or config.activation,
    }
    return dataclasses.replace(config, **sizes)


def shortest(kinds: list[Any]) -> tuple[Any, ...]:
    """The shortest beginning of `kinds` that gives them all when it is repeated."""
    return next(
        tuple(kinds[:n]) for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds))
    )


DECODER_TOKENS = (
    "model.decoder.embed_tokens.weight"  # by which an encoder-decoder's file tells its own from shared ones
)


def says(family: Family, config: ModelConfig) -> bool:
    """Whether the format can say what the model computes: `config` comes back from it, but for what inference does not
    see.  Dropout and initial weights are written where the format has a place for them, and may be lost."""
    if heads(family, config) is None:
        return False
    try:
        said = family.config_from_hf(family.config_to_hf(config) | {"architectures": [heads(family, config)]})
        said = dataclasses.replace(said, heads_on_top=config.heads_on_top)
        if DECODER_TOKENS in family.copies and not config.tied_embeddings:  # tensors tell
            said = dataclasses.replace(said, decoder_tokens=config.decoder_tokens)
        said.check()
    except UserError:  # such as heads that do not divide the width, in a format that cannot say a head width
        return False
    return seen(said if family.ties else dataclasses.replace(said, tied_embeddings=config.tied_embeddings)) == seen(
        config
    )


def heads(family: Family, config: ModelConfig) -> str | None:
    """The class in transformers with the config's heads, or None."""
    if family.encoder and config.structure == "encoder":
        return None if config.heads_on_top else family.encoder
    return next((name for had, name in family.heads.items() if set(had) == set(config.heads_on_top)), None)


def seen(config: ModelConfig) -> ModelConfig:
    """The config with nothing but what inference computes by, so that equal ones compute alike."""
    config, on_top = resolved(config), set(config.heads_on_top)
    rotary, scaling = config.positions == "rotary", config.rotary_scaling
    unseen = {  # fields -> whether they are of no effect
        ("dropout", "attention_dropout", *DROPOUT_SITES, "labels", "start_token"): True,
        ("initial_std", "initial_by_inputs", "scale_residual_init"): True,
        ("max_length",): config.positions != "learned",
        ("position_offset", "padding_token"): config.positions != "learned",
        ("rotary_base",): not rotary and config.positions != "sinusoidal",
        ("rotary_scaling", "rotary_attention"): not rotary,
        ("rotary_factor",): not rotary or scaling in ("none", "longrope"),
        ("rotary_length",): not rotary or scaling in ("none", "linear"),
        ("rotary_low", "rotary_high"): not rotary or scaling not in ("llama3", "yarn"),
        ("rotary_truncate",): not rotary or scaling != "yarn",
        ("rotary_short", "rotary_long"): not rotary or scaling != "longrope",
        ("local_rotary_base",): not rotary or "local" not in config.layer_kinds,
        ("window",): "local" not in config.layer_kinds,
        ("relative_buckets", "relative_distance"): config.relative == "none",
        ("relative_terms", "relative_shared", "relative_norm"): config.relative != "disentangled",
        ("attention_scale",): config.relative == "disentangled",
        ("conv_activation",): not config.conv_width,
        ("decoder_layers", "decoder_heads", "decoder_mlp_width", "decoder_tokens"): config.structure
        != "encoder_decoder",
        ("scale_logits", "logit_cap"): "lm" not in on_top,
        ("tied_embeddings",): not on_top & {"lm", "masked_lm"},
        ("transform_activation",): "masked_lm" not in on_top and not config.shared_transform,
        ("classes_from", "classes_activation"): "classes" not in on_top,
    }
    no_bias = {
        "norm": config.norm != "layernorm",
        "transform": "masked_lm" not in on_top and not config.shared_transform,
        "classes": "classes" not in on_top,
        "lm": "lm" not in on_top,
    }
    biases = tuple(sorted(bias for bias in config.biases if not no_bias.get(bias)))
    plain = dataclasses.asdict(ModelConfig())
    fields = {name: plain[name] for names, without in unseen.items() if without for name in names}
    return dataclasses.replace(config, biases=biases, **fields)
