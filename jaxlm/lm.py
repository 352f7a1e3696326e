"""A language model with its config, module, parameters and tokenizer; loading it from a folder and saving it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import families
from jaxlm.config import TASK_CONFIGS, MatmulPrecision, ModelConfig, check_task, task_from_json, task_to_json
from jaxlm.config.ranges import Name, Range, check_argument, short_repr
from jaxlm.data.chat.rendering import templates
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.devices import sharding
from jaxlm.devices.programs import Programs
from jaxlm.errors import UserError, suggestion
from jaxlm.hub import model_files, safetensors
from jaxlm.hub.download import fetch
from jaxlm.hub.gguf import container, vocabulary, writing
from jaxlm.hub.gguf import folder as gguf_folder
from jaxlm.hub.peft import base_of, is_adapter
from jaxlm.hub.pooling import Pooling, read_files, read_pooling
from jaxlm.nn import nodes
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.storage import buckets, disk
from jaxlm.vectors.files import EXPORT


class StackOutputs(NamedTuple):
    """The hidden states and attention weights of a stack, as far as the call requested them.

    states_LBTD: the embeddings and the output of each layer, L + 1 in all; the last is after the final norm.
    attention_LBHTS: self-attention weights of each layer.
    cross_attention_LBHTS: attention weights of each layer of a decoder over the encoder.
    activations: values by part of the layers [L, B, T, ...], for the layers that have the part; see `jaxlm.nn.sites`.
    """

    states_LBTD: jax.Array | None = None
    attention_LBHTS: jax.Array | None = None
    cross_attention_LBHTS: jax.Array | None = None
    activations: Mapping[str, jax.Array] | None = None


class Output(NamedTuple):
    """The outputs of a model for a batch.

    logits: of the first head: [B, T, V] (lm, masked_lm), [B, N] (classes), [B, T, N] (tokens), [B, T, 2] (span: start
    and end), [B, 2] (next_sentence), [B, T] (replaced), [B, D] (pooled: a vector, no logits); None without a head.
    hidden_BTD: the last hidden states; for an encoder-decoder, those of the decoder.
    encoder, decoder: hidden states and attention weights; None for a stack that the model does not have.
    """

    logits: jax.Array | None
    hidden_BTD: jax.Array
    encoder: StackOutputs | None = None
    decoder: StackOutputs | None = None


class Trained(NamedTuple):
    """The task that a model was fine-tuned for.

    task: the config of the task, with its columns; the name of its class where that is not registered.
    length: tokens in a row, which is also the maximum length of an example.
    """

    task: Any
    length: int


@dataclass(frozen=True, eq=False)
class LM:
    """A model as data: `lm(tokens_BT)` applies `lm.module` to `lm.params`, jitted.

    The module has the mesh of the parameters. A module with another mesh is replaced by a copy with this mesh.
    """

    config: ModelConfig
    module: Transformer
    params: Any
    tokenizer: Tokenizer | None = None
    origin: families.Origin | None = None  # the config and format of the folder that it was loaded from
    files: dict[str, bytes] = field(default_factory=dict)  # further files to save with the model, by name
    pooling: Pooling | None = None  # how texts become vectors, where the folder declares it
    fresh: tuple[str, ...] = ()  # paths of the parameters that the folder lacks, which are randomly initialised
    adapted: tuple[str, ...] = ()  # paths of the arrays that belong to its adapter, in addition to the updates
    programs: Programs = field(default_factory=Programs, repr=False)  # compiled for this model

    def __post_init__(self) -> None:
        mesh = sharding.mesh_of(self.params)
        if mesh is not None and mesh != self.module.constrain.mesh:
            object.__setattr__(self, "module", self.module.clone(constrain=sharding.Placement(mesh)))
        if self.tokenizer is not None:  # raises for tokens that have no row in the embeddings
            object.__setattr__(self, "tokenizer", self.tokenizer.for_model(self.config.vocabulary, self.config.V))

    @property
    def trained(self) -> Trained | None:
        """The task that the model was fine-tuned for; None where its files do not name one.

        Raises:
          UserError: where the file with the task is damaged.
        """
        if _TASK not in self.files:
            return None
        try:
            values = json.loads(self.files[_TASK])
            length = values["length"]
            if type(length) is not int or length < 2:
                raise ValueError(f"length is {length!r}")
            kind = values["task"]["kind"]
            if kind not in TASK_CONFIGS:
                return Trained(str(kind), length)
            task = task_from_json(values["task"])
            check_task(task)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{_TASK} of the model is not as jaxlm writes it ({error}); delete it") from None
        return Trained(task, length)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that can be generated: the tokenizer's, where the stored vocabulary is padded beyond it."""
        return self.config.V if self.tokenizer is None else min(self.tokenizer.target.size, self.config.V)

    def tokens(self, text: str, pair: str | None = None) -> np.ndarray:
        """Returns the token ids of a text, [1, T] int32, with the special tokens that the model expects around it.

        `tokenizer.encode(text)` returns the ids of the text alone. This adds [CLS] and [SEP], BOS or EOS, as calling
        the tokenizer of transformers does.

        Args:
          text: the text.
          pair: a second text, for a model that reads pairs.

        Raises:
          UserError: for a model without a tokenizer, and for an id that the model has no row for.
        """
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer; load it from a folder with one, or give token ids")
        ((ids, _),) = self.tokenizer.encode_with_special_tokens([text], None if pair is None else [pair])
        return np.array([ids], np.int32)

    def _token(self, role: str) -> int | None:
        """Returns the id of the token with a role, such as pad or eos, in config.json or in the tokenizer, or None."""
        token = self.origin.config.get(f"{role}_token_id") if self.origin else None
        return token if isinstance(token, int) or self.tokenizer is None else getattr(self.tokenizer, role)

    def apply(
        self,
        params: Any,
        tokens_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        target_tokens_BT: jax.Array | None = None,
        target_mask_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        global_BT: jax.Array | None = None,
        *,
        states: bool = False,
        attentions: bool = False,
        activations: bool = False,
    ) -> Output:
        """Returns the outputs of the model with these parameters: a pure function for any transformation of JAX.

        Args:
          params: the parameters.
          tokens_BT: token ids, int32; the input of the encoder, where there is one.
          mask_BT: 1 for tokens, 0 for padding; the same as segments of 1 and 0.
          types_BT: token types of BERT; None: 0.
          target_tokens_BT: input of the decoder of an encoder-decoder; None: `tokens_BT` after the start token.
          target_mask_BT: as `mask_BT`, for `target_tokens_BT`.
          segments_BT: number of the example that a token of a packed row belongs to, from 1; 0 for padding. Heads with
            one output per row then read the row's first token (or the last, by `config.classes_from`).
          positions_BT: positions of the tokens; None: as transformers counts them.
          global_BT: 1 for tokens with global attention, in `tokens_BT`; None: as `config.global_tokens` defines.
          states: whether to return the hidden states of every layer.
          attentions: whether to return the attention weights of every layer.
          activations: whether to return the activations of every layer at all sites of `jaxlm.nn.sites`.

        Raises:
          UserError: where both a mask and segments are given, where target tokens are missing or not supported, and
            where global tokens are not supported.
        """
        if mask_BT is not None and segments_BT is not None:
            raise UserError("mask_BT and segments_BT are both given; give only one: a mask is segments of 0 and 1")
        segments_BT = mask_BT if segments_BT is None else segments_BT
        inputs: list[Any] = [tokens_BT, segments_BT, positions_BT, types_BT]
        if self.config.structure == "encoder_decoder":
            if target_tokens_BT is None:
                inputs += [self._shift_right(tokens_BT), None]  # the decoder attends to padding, as in transformers
            else:
                inputs += [target_tokens_BT, target_mask_BT]
                tokens_BT, segments_BT = target_tokens_BT, target_mask_BT
        elif target_tokens_BT is not None:
            raise UserError(f"target_tokens_BT is given, but the model is a(n) {self.config.structure}; leave it out")
        named: dict[str, Any] = {}
        if global_BT is not None:
            source_BT = inputs[1]
            named["global_BT"] = jnp.asarray(global_BT) > 0
            if source_BT is not None:
                named["global_BT"] &= jnp.asarray(source_BT) > 0
        collections = ["states"] * states + ["weights"] * attentions + ["activations"] * activations
        x_BTD = apply(self.module, params, *inputs, mutable=collections or False, **named)
        stacks: dict[str, StackOutputs | None] = {"encoder": None, "decoder": None}
        if collections:
            x_BTD, sown = x_BTD
            stacks = {stack: _stack_outputs(sown, stack) for stack in stacks if stack in sown[collections[0]]}
        if self.config.classes_from == "last":  # transformers finds the last token by its id
            end, padding = self._token("eos"), self._token("pad")
            if self.config.structure == "encoder_decoder" and end is not None:
                segments_BT = jnp.equal(tokens_BT, end)
            elif segments_BT is None and padding is not None:
                segments_BT = jnp.not_equal(tokens_BT, padding)
        return Output(self.head_logits(params, x_BTD, segments_BT), x_BTD, **stacks)

    def head_logits(self, params: Any, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array | None:
        """Returns the output of the first head for the last hidden states, None without a head; see `Output.logits`.

        Args:
          params: the parameters.
          x_BTD: the last hidden states.
          segments_BT: as in `apply`, for heads with one output per row.
        """
        head = next(iter(self.config.heads_on_top), None)
        if head is None:
            return None
        if head in ("classes", "pooled", "next_sentence"):
            x_BTD = _row_state(x_BTD, segments_BT, self.config.classes_from if head == "classes" else "first")
        return apply(self.module, params, x_BTD, method=head)

    def _shift_right(self, tokens_BT: jax.Array) -> jax.Array:
        start, padding = self.config.start_token, self._token("pad")
        if start is not None:
            first_B1 = jnp.full_like(tokens_BT[:, :1], start)
        elif padding is not None:  # mBART starts with the last token of the text, its language
            last_B1 = (tokens_BT != padding).sum(1, keepdims=True) - 1
            first_B1 = jnp.take_along_axis(tokens_BT, last_B1, 1)
        else:
            raise UserError("an encoder-decoder requires target_tokens_BT, the input of its decoder")
        return jnp.concatenate([first_B1, tokens_BT[:, :-1]], 1)

    def __call__(self, tokens_BT: jax.Array, *inputs: jax.Array | None, **named: Any) -> Output:
        """Returns `apply` with the model's own parameters, compiled once for each combination of shapes.

        Args:
          tokens_BT: token ids, any integer dtype.
          *inputs: further arguments of `apply`, by position.
          **named: further arguments of `apply`, by name.

        Raises:
          UserError: for ids that the model has no row for, for rows longer than its positions, and as `apply` does.
        """
        check_ids("tokens_BT", tokens_BT, self.config.vocabulary)
        target_BT = inputs[2] if len(inputs) > 2 else named.get("target_tokens_BT")
        if target_BT is not None:
            check_ids("target_tokens_BT", target_BT, self.config.V)
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        length = tokens_BT.shape[-1]
        if tokens_BT.ndim != 2 or not length:
            raise UserError(f"tokens_BT has shape {tokens_BT.shape}; give [rows, positions], at least one of each")
        limit = self.config.position_limit
        if limit is not None and length > limit and named.get("positions_BT") is None:
            raise UserError(f"a row has {length} tokens, more than the {limit} positions of the model; truncate it")
        shapes = tuple(None if x is None else jnp.shape(x) for x in (tokens_BT, *inputs))
        more = tuple((name, x if isinstance(x, bool) or x is None else jnp.shape(x)) for name, x in named.items())
        key = self.config, self.module, self._token("eos"), self._token("pad"), shapes, more
        return self.programs.get(_compiled_apply, *key)(self.params, tokens_BT, *inputs, **named)


def _compiled_apply(config: ModelConfig, module: Transformer, eos: int | None, pad: int | None, *_: Any) -> Any:
    """Returns `LM.apply`, jitted; one function for each combination of shapes, so that `Programs` can drop it."""
    tokens = families.Origin({"eos_token_id": eos, "pad_token_id": pad}, heads=None)
    return jax.jit(
        LM(config, module, None, origin=tokens).apply, static_argnames=("states", "attentions", "activations")
    )


def check_ids(name: str, ids: Any, rows: int) -> None:
    """Raises UserError for ids that are not integers or that the model has no row for.

    Arrays on an accelerator and tracers are not checked: reading them would wait for the device.

    Args:
      name: the argument, for the message.
      ids: token ids, an array or nested lists.
      rows: number of ids of the model.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    if isinstance(ids, jax.Array) and (jax.default_backend() != "cpu" or not ids.is_fully_addressable):
        return
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise UserError(f"{name} has rows of different lengths; pad them to one length, and give mask_BT") from None
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} has the dtype {ids.dtype}; give token ids, which are integers")
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        invalid = int(ids.min() if ids.min() < 0 else ids.max())
        raise UserError(
            f"{name} has the id {invalid}, but the model has {rows} rows for tokens, so ids go from 0 to {rows - 1}; "
            f"correct the ids, or add rows to the model with jaxlm.resize(lm, size)"
        )


def _stack_outputs(sown: Any, stack: str) -> StackOutputs:
    states = sown["states"][stack]["states"][0] if "states" in sown else None
    attention, cross = sown["weights"][stack]["weights"][0][:2] if "weights" in sown else (None, None)
    activations = sown["activations"][stack]["activations"][0] if "activations" in sown else None
    return StackOutputs(states, attention, cross, activations)


def _row_state(x_BTD: jax.Array, segments_BT: jax.Array | None, where: str) -> jax.Array:
    """Returns the state [B, D] of each row's "first" or "last" token, or the "mean" or "max" over its tokens."""
    if where == "first":
        return x_BTD[:, 0]
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT > 0
    if where == "mean":
        return (x_BTD * real_BT[..., None]).sum(1) / jnp.maximum(real_BT.sum(1, keepdims=True), 1)
    if where == "max":
        max_BD = jnp.where(real_BT[..., None], x_BTD, -jnp.inf).max(1)
        return jnp.where(real_BT.any(1, keepdims=True), max_BD, 0).astype(x_BTD.dtype)
    last_B = x_BTD.shape[1] - 1 - jnp.argmax(real_BT[:, ::-1], 1)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], 1)[:, 0]


def find(name: str | os.PathLike[str], *, revision: str | None = None, offline: bool = False) -> Path:
    """Returns the folder of a model: the export of a run, the downloaded snapshot of a hub name, or a cached folder.

    Args:
      name: a folder of a run or of a model, a GGUF file, an address of one of them in a bucket, or a hub name.
      revision: branch, tag or commit of a hub name; None: its main branch.
      offline: whether to use only files that were downloaded before.

    Raises:
      UserError: where the folder or hub name does not exist, or contains no model yet.
    """
    address = check_argument("name", name, str)
    revision = check_argument("revision", revision, str | None)
    if buckets.is_address(address) and address.lower().endswith(container.SUFFIX):
        buckets.forget_downloads()
        address = buckets.download(address)
    if container.is_gguf(address):
        return gguf_folder.open_file(address)
    folder = (
        buckets.model(address) if buckets.is_address(address) else fetch(address, revision=revision, offline=offline)
    )
    if (folder / "export" / "config.json").exists():
        return folder / "export"
    if is_adapter(folder):
        return folder
    has_weights = any((folder / name).exists() for name in (safetensors.WEIGHTS, safetensors.INDEX))
    if not has_weights and (error := container.only_gguf(folder, os.listdir(folder))):
        raise error
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; give an exported model or a run folder")
    if next((folder / "export").glob(f"{EXPORT}.*"), None):
        raise UserError(f"{folder} contains word vectors, not a model; load them with jaxlm.load_vectors")
    if "run" in families.read_config(folder / "config.json"):
        raise UserError(
            f"the run in {folder} has no export yet; run its command again until it ends, or stop it with SIGTERM, "
            f"which exports the model as it is then"
        )
    return folder


def load(
    name: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    head: str | None = None,
    labels: Sequence[str] | int | None = None,
    dtype: str | None = "float32",
    compute_dtype: str | None = None,
    matmul_precision: str = "default",
    mesh: jax.sharding.Mesh | None = None,
    module: type[Transformer] | None = None,
    revision: str | None = None,
    offline: bool = False,
    split_special_tokens: bool | None = None,
    log: Callable[[str], None] | None = None,
) -> LM:
    """Loads a model from a folder in Hugging Face format, from the export of a run, from a GGUF file, or from the hub.

    Args:
      name: a folder of a model, of a run or of an adapter in the format of PEFT, a GGUF file, an address in a bucket,
        or a hub name. The folder of an adapter is loaded together with the base that it names.
      adapter: folders or hub names of one or several adapters for the model; their updates are added.
      head: lm, masked_lm, next_sentence, replaced, classes, tokens, span, pooled, none, or encoder (of an
        encoder-decoder); None: as in the checkpoint. A head that the checkpoint lacks is randomly initialised, with a
        message.
      labels: names, or the number, of the outputs of the heads classes and tokens; None: as in the checkpoint.
      dtype: of the parameters in memory: float32, bfloat16 or float16; None: as they are stored.
      compute_dtype: of the arithmetic; None: the same as `dtype`.
      matmul_precision: of products of float32 matrices: default, high or highest. By default a TPU computes them in one
        pass of bfloat16 and a GPU in TensorFloat32; highest is float32.
      mesh: devices to shard the parameters over; each device reads only its slices. None: the first device.
      module: a class derived from `Transformer` that the parameters in the folder belong to.
      revision: branch, tag or commit of a hub name; None: its main branch.
      offline: whether to use only files that were downloaded before.
      split_special_tokens: True: special tokens written in a text, such as "[SEP]", are encoded like other text, for
        texts from users of a service. False: they become the special token. None: as the tokenizer's files specify,
        else False.
      log: receives messages about initialised and unused parameters, and inputs that are not rounded; None: standard
        error.

    Returns:
      The model.

    Raises:
      UserError: where the folder or hub name does not exist, contains no model, or has files that contradict each
        other; and for arguments out of range.
    """
    head = check_argument("head", head, str | None)
    names = _label_names(labels)
    check_argument("matmul_precision", matmul_precision, MatmulPrecision)
    check_argument("mesh", mesh, jax.sharding.Mesh | None)
    if module is not None and not (isinstance(module, type) and issubclass(module, Transformer)):
        raise UserError(f"module is {short_repr(module)}; it must be a class derived from jaxlm's Transformer")
    folder = find(name, revision=revision, offline=offline)
    adapters = [find(one, offline=offline) for one in _names_of_adapters(adapter)]
    stored, compute = (None if given is None else _dtype(given) for given in (dtype, compute_dtype))
    how: dict[str, Any] = {"head": head, "labels": names, "module": module, "adapters": adapters}
    found = families.load(folder, dtype=stored, mesh=mesh, **how)
    log = log or partial(print, file=sys.stderr)
    if found.unrounded:
        log(f"inputs of projections are not rounded as in {folder}: {', '.join(found.unrounded)}")
    if found.origin.unused:
        log(f"not used by the model, but kept for saving: {', '.join(found.origin.unused)}")
    if found.fresh:
        log(f"randomly initialised, since {folder} has none: {', '.join(found.fresh)}")
    leaves = jax.tree.leaves(found.params, is_leaf=nodes.is_node)
    compute = compute or stored or jnp.result_type(*[leaf for leaf in leaves if not nodes.is_node(leaf)])
    placement = sharding.Placement(mesh)
    own_module = (module or Transformer)(found.config, placement, jnp.dtype(compute), precision=matmul_precision)
    with_tokenizer = tokenizer_folder(folder)
    tokenizer = tokenizers.load(str(with_tokenizer), split_special_tokens) if with_tokenizer else None
    files, pooling = kept_files(folder)
    for one in adapters:
        files |= kept_files(one)[0]
    stored_model = found.origin.config.get("model")  # of jaxlm's own format
    same_heads = isinstance(stored_model, dict) and stored_model.get("heads_on_top") == list(found.config.heads_on_top)
    if found.fresh or (head is not None and found.origin.heads is None and not same_heads):
        files = without_task(files)  # the task was trained with another head
    own_name = base_name(str(name), found.origin)
    for one in adapters:
        other = base_of(one)
        if other and os.path.basename(other) != os.path.basename(own_name):  # folders may have been moved
            log(f"the adapter in {one} names {other} as its base, and is applied to {own_name}")
    origin = found.origin._replace(base=own_name)
    return LM(found.config, own_module, found.params, tokenizer, origin, files, pooling, found.fresh, found.adapted)


def base_name(name: str, origin: families.Origin) -> str:
    """Returns how an adapter names its base: the absolute path of a folder or GGUF file, or a hub name.

    Args:
      name: what the user gave as the model.
      origin: the origin of the model.
    """
    if os.path.isdir(name) or buckets.is_address(name):
        return origin.base
    return os.path.abspath(name) if os.path.exists(name) else name


def _names_of_adapters(adapter: Any) -> list[str]:
    if adapter is None:
        return []
    names = list(adapter) if isinstance(adapter, (list, tuple)) else [adapter]
    return [check_argument("adapter", name, str) for name in names]


def _label_names(labels: Any) -> tuple[str, ...] | None:
    """Returns the names of the outputs of a head, which are numbered where only their number is given."""
    if labels is None or isinstance(labels, (list, tuple)):
        names = check_argument("labels", labels, tuple[Name, ...] | None)
        repeated = next((name for name in names or () if names.count(name) > 1), None)
        if repeated is not None or (names is not None and not names):
            raise UserError(f"labels is {short_repr(labels)}; give at least one name, and each name once")
        return names
    count = check_argument("labels", labels, Annotated[int, Range(1, 1_000_000)])
    return tuple(f"LABEL_{i}" for i in range(count))


def kept_files(folder: Path) -> tuple[dict[str, bytes], Pooling | None]:
    """Returns the files of a model's folder that `save` copies, by name, and the pooling that they declare."""
    if is_adapter(folder) and not (folder / "config.json").exists():  # as PEFT writes it
        return kept_files(families.base_of(folder))
    paths = {name: model_files.locate(folder, name) for name in _CARRIED}
    files = {name: model_files.read_bytes(file) for name, file in paths.items() if file is not None}
    if _TASK not in files and folder.name == "export":
        files |= _task_of_run(folder.parent)
    return files | read_files(folder), read_pooling(folder)


def without_task(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files of a model, without the task that it was fine-tuned for."""
    return {name: content for name, content in files.items() if name != _TASK}


def _files_to_save(lm: LM) -> Mapping[str, bytes]:
    """Returns the further files to save with a model.

    A model with a new head for classes, tokens or spans is no longer a sentence encoder, so those files are left out.
    """
    new_head = lm.origin is None or lm.origin.heads != lm.config.heads_on_top
    if new_head and {"classes", "tokens", "span"} & set(lm.config.heads_on_top):
        return {name: content for name, content in lm.files.items() if name in _CARRIED}
    return lm.files


def _dtype(name: Any) -> Any:
    known = ("float32", "bfloat16", "float16")
    name = getattr(name, "__name__", str(name))
    if name not in known:
        raise UserError(f"dtype is {name!r}{suggestion(name, known)}")
    return jnp.dtype(name)


_TASK = "jaxlm_task.json"  # the task that the model of a folder was fine-tuned for
_CARRIED = ("generation_config.json", _TASK)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "*.spm", "*.model")


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder contains the files of a tokenizer."""
    return any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


def tokenizer_folder(folder: Path) -> Path | None:
    """Returns the folder with the tokenizer of a model, for an adapter possibly that of its base; None without one."""
    if not has_tokenizer(folder) and is_adapter(folder):
        folder = families.base_of(folder)
    return folder if has_tokenizer(folder) else None


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a model cannot be written to `folder` without losing other files.

    Args:
      folder: the folder or GGUF file to be written.
      overwrite: whether an existing folder or file may be replaced; the folder of a run never is.
    """
    if folder.suffix.lower() == container.SUFFIX:
        if folder.is_dir() or (folder.exists() and not overwrite):
            raise UserError(f"{folder} exists; choose another file{'' if folder.is_dir() else ', or set overwrite'}")
        return
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{folder} cannot be created, because {above} is a file; choose another folder")
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder} is the current folder, or contains it; choose a folder below it")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} exists and is not empty; choose another folder, or set overwrite")
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} contains a run, which would be lost; choose another folder")


def save(
    lm: LM,
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """Writes a model, its tokenizer and its further files to a folder that transformers can load, or to a GGUF file.

    A model with an adapter is written as the adapter alone, in the format of PEFT; `merge(lm)` is the whole model.
    The folder is written as a whole or not at all. Files that were read and have not changed are written byte for byte,
    under their old names. An architecture without a Hugging Face format is written in jaxlm's own format.

    Quantised projections are written in the format compressed-tensors, which `load` reads as such. NF4 and jaxlm's own
    format are written as floats, with a message on standard error.

    Args:
      lm: the model.
      folder: the folder to write, or a file whose name ends with .gguf.
      dtype: of all tensors: float32, bfloat16 or float16; None: each as in the folder that it was loaded from. In a
        GGUF file it is the dtype of the matrices, which can also be q8_0 or q4_0: integers of 8 or 4 bits with a scale
        for each 32 of them. The embeddings then have 8 bits, and matrices that are not a multiple of 32 wide float16.
      overwrite: whether to replace a folder that is not empty, or a file.
      max_shard_bytes: maximum size of a file of tensors; a GGUF file is always one file.

    Returns:
      The name of the format, such as "bert".

    Raises:
      UserError: where the folder is not empty and `overwrite` is False, where it contains a run, where another
        process writes to it, and where a GGUF file cannot represent the model.
    """
    check_argument("lm", lm, LM)
    folder = disk.local(check_argument("folder", folder, str), "folder")
    max_shard_bytes = check_argument("max_shard_bytes", max_shard_bytes, Annotated[int, Range(1, 10**18)])
    if folder.suffix.lower() == container.SUFFIX:
        return _save_gguf(lm, folder, dtype, overwrite)
    check_free(folder, overwrite)
    lock = disk.lock_path(folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with disk.lock(lock, str(folder), "choose another folder"), disk.atomic_folder(folder, overwrite) as part:
        extra: dict[str, Any] = {}
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(part))
            ids = {"bos": lm.tokenizer.bos, "eos": lm.tokenizer.eos, "pad": lm.tokenizer.pad}
            extra = {f"{name}_token_id": i for name, i in ids.items()}
        if (
            lm.origin is not None and "model_type" not in lm.origin.config
        ):  # the model is in no format yet; a task added these keys
            extra |= lm.origin.config
        for name, content in _files_to_save(lm).items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        kind = families.save(
            lm.config,
            lm.params,
            part,
            origin=lm.origin,
            dtype=None if dtype is None else _dtype(dtype),
            extra=extra,
            max_shard_bytes=max_shard_bytes,
            module=None if type(lm.module) is Transformer else type(lm.module),
            adapted=lm.adapted,
            log=partial(print, file=sys.stderr),
        )
    return kind


def _save_gguf(lm: LM, path: Path, dtype: Any, overwrite: bool) -> str:
    """Writes a GGUF file, and returns its architecture; see `save`."""
    if dtype is not None:
        dtype = str(getattr(dtype, "__name__", dtype)).lower()
        if dtype not in writing.DTYPES:
            raise UserError(f"dtype is {dtype!r}{suggestion(dtype, writing.DTYPES)}")
    check_free(path, overwrite)
    tokenizer: dict[str, Any] = {"tokenizer.ggml.model": vocabulary.NONE[0]}
    if lm.tokenizer is not None:
        own = lm.tokenizer
        frame = {"bos": own.prefix == [own.bos], "eos": own.suffix == [own.eos]}
        if (own.prefix and not frame["bos"]) or (own.suffix and not frame["eos"]):
            raise UserError(
                f"the tokenizer adds {own.pieces(own.prefix + own.suffix)} to each text; a GGUF file can only add BOS "
                f"and EOS: save a folder instead"
            )
        tokenizer = vocabulary.write(
            json.loads(own.backend.to_str()),
            own.special,
            lm.config.vocabulary,
            model=own.files.get("tokenizer.model"),
            frame=frame,
            template=templates(own).get("default"),
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return families.save_gguf(lm.config, lm.params, path, origin=lm.origin, dtype=dtype, tokenizer=tokenizer)
    except OSError as error:
        raise disk.write_error(path, error, "file") from None


def _task_of_run(folder: Path) -> dict[str, bytes]:
    """Returns the file with the task of a run, for an export by a version that did not write this file yet."""
    file = model_files.locate(folder, "config.json")
    run = model_files.read_object(file).get("run") if file else None
    data = run.get("data") if isinstance(run, dict) else None
    if not isinstance(run, dict) or not isinstance(data, dict):
        return {}
    return {_TASK: json.dumps({"task": run.get("task"), "length": data.get("length")}).encode()}


def with_task(lm: LM, task: Any, length: int) -> LM:
    """Returns the model with the task that it was fine-tuned for, which is saved with it; see `LM.trained`.

    Args:
      lm: the model.
      task: the config of the task.
      length: tokens in a row.
    """
    content = json.dumps({"task": task_to_json(task), "length": length}, indent=2) + "\n"
    return dataclasses.replace(lm, files={**lm.files, _TASK: content.encode()})


def with_params(lm: LM, params: Any) -> LM:
    """Returns the same model with other parameters."""
    return dataclasses.replace(lm, params=params)
