"""A language model: configuration, module, parameters, tokenizer.  Loaded from a folder, saved to one."""

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
from jaxlm.config.ranges import Name, Range, argument, shown
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.devices import sharding
from jaxlm.devices.programs import Programs
from jaxlm.errors import UserError, perhaps
from jaxlm.hub import model_files
from jaxlm.hub.download import fetch
from jaxlm.hub.pooling import Pooling, carried, read_pooling
from jaxlm.nn.transformer import Transformer, apply
from jaxlm.storage import buckets, disk


class StackOutputs(NamedTuple):
    """What went on in a stack, where it was asked for.

    states_LBTD: hidden states of the embeddings and of each layer, L + 1 in all, the last after the last norm.
    attention_LBHTS, cross_attention_LBHTS: attention weights of each layer, over itself and over the encoder.
    """

    states_LBTD: jax.Array | None = None
    attention_LBHTS: jax.Array | None = None
    cross_attention_LBHTS: jax.Array | None = None


class Output(NamedTuple):
    """What a model says of a batch.

    logits: of its first head: [B, T, V] (lm, masked_lm), [B, N] (classes), [B, T, N] (tokens), [B, T, 2] (span: start
    and end), [B, 2] (next_sentence), [B, T] (replaced), [B, D] (pooled: a vector, no logits); None without a head.
    hidden_BTD: the last hidden states; of an encoder-decoder, those of the decoder.
    encoder, decoder: what went on inside, of the stacks that there are.
    """

    logits: jax.Array | None
    hidden_BTD: jax.Array
    encoder: StackOutputs | None = None
    decoder: StackOutputs | None = None


class Trained(NamedTuple):
    """What a model was fine-tuned for.

    task: the config of the task, with its columns; the name of its kind where that is not registered.
    length: tokens in a row, and the most that an example had.
    """

    task: Any
    length: int


@dataclass(frozen=True, eq=False)
class LM:
    """A model as data: `lm(tokens_BT)` applies `lm.module` to `lm.params`, jitted.

    The module carries the mesh of the parameters: where they lie on another one than it names, it is replaced.
    """

    config: ModelConfig
    module: Transformer
    params: Any
    tokenizer: Tokenizer | None = None
    origin: families.Origin | None = None  # how its folder said it
    files: dict[str, bytes] = field(default_factory=dict)  # that go along when it is saved
    pooling: Pooling | None = None  # how texts become vectors, where the folder declares it
    fresh: tuple[str, ...] = ()  # paths of parameters that were drawn anew, since the folder has none
    programs: Programs = field(default_factory=Programs, repr=False)  # compiled for this model

    def __post_init__(self) -> None:
        mesh = sharding.mesh_of(self.params)
        if mesh is not None and mesh != self.module.constrain.mesh:
            object.__setattr__(self, "module", self.module.clone(constrain=sharding.Placement(mesh)))
        if self.tokenizer is not None:  # refuses tokens that this model has no row for
            object.__setattr__(self, "tokenizer", self.tokenizer.for_model(self.config.vocabulary, self.config.V))

    @property
    def trained(self) -> Trained | None:
        """What the model was fine-tuned for, where its files say so.  Raises UserError where they cannot be read."""
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
            raise UserError(f"{_TASK} of the model is not what jaxlm writes ({error}); delete it") from None
        return Trained(task, length)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that can be written: the tokenizer's, where the stored vocabulary is padded beyond it."""
        return self.config.V if self.tokenizer is None else min(self.tokenizer.target.size, self.config.V)

    def tokens(self, text: str, pair: str | None = None) -> np.ndarray:
        """Returns what the model reads of a text: its ids, [1, T] int32, with the special tokens around them.

        `tokenizer.encode(text)` gives the ids of the text alone, `tokens` also [CLS] and [SEP], BOS or EOS, as the
        tokenizer of transformers does when it is called.

        Args:
            text: the text.
            pair: a second text, for a model that reads two.

        Raises:
            UserError: for a model without a tokenizer, and for an id that the model has no row for.
        """
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer; load it from a folder with one, or give token ids")
        ((ids, _),) = self.tokenizer.frame([text], None if pair is None else [pair])
        return np.array([ids], np.int32)

    def _token(self, role: str) -> int | None:
        """The token of a role, such as pad or eos, where config.json or the tokenizer names it."""
        said = self.origin.config.get(f"{role}_token_id") if self.origin else None
        return said if isinstance(said, int) or self.tokenizer is None else getattr(self.tokenizer, role)

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
        *,
        states: bool = False,
        attentions: bool = False,
    ) -> Output:
        """The pure function behind a call: `params -> Output`, under any transformation of JAX.

        mask_BT: 1 for tokens, 0 for padding; the same as segments of 1 and 0.  segments_BT: which example of the row a
        token belongs to, where rows are packed; then heads that speak of a whole example speak of the row's first (or
        last, by `config.classes_from`).  positions_BT: as transformers counts them, where unsaid.
        target_tokens_BT: what an encoder-decoder's decoder reads; unsaid, the tokens behind its start token.
        states, attentions: return every layer's hidden states, and attention weights.
        """
        if mask_BT is not None and segments_BT is not None:
            raise UserError("mask_BT and segments_BT are both given; give segments of 0 and 1 for a mask")
        segments_BT = mask_BT if segments_BT is None else segments_BT
        inputs: list[Any] = [tokens_BT, segments_BT, positions_BT, types_BT]
        if self.config.structure == "encoder_decoder":
            if target_tokens_BT is None:
                inputs += [self._moved_right(tokens_BT), None]  # the decoder sees padding, as in transformers
            else:
                inputs += [target_tokens_BT, target_mask_BT]
                tokens_BT, segments_BT = target_tokens_BT, target_mask_BT
        elif target_tokens_BT is not None:
            raise UserError(f"target_tokens_BT is given, but the model is a(n) {self.config.structure}; leave it out")
        wanted = ["states"] * states + ["weights"] * attentions
        x_BTD = apply(self.module, params, *inputs, mutable=wanted or False)
        inside: dict[str, StackOutputs | None] = {"encoder": None, "decoder": None}
        if wanted:
            x_BTD, seen = x_BTD
            inside = {stack: _inside(seen, stack) for stack in inside if stack in seen[wanted[0]]}
        if self.config.classes_from == "last":  # which transformers finds by its token
            end, padding = self._token("eos"), self._token("pad")
            if self.config.structure == "encoder_decoder" and end is not None:
                segments_BT = jnp.equal(tokens_BT, end)
            elif segments_BT is None and padding is not None:
                segments_BT = jnp.not_equal(tokens_BT, padding)
        return Output(self._logits(params, x_BTD, segments_BT), x_BTD, **inside)

    def _logits(self, params: Any, x_BTD: jax.Array, segments_BT: jax.Array | None) -> jax.Array | None:
        head = next(iter(self.config.heads_on_top), None)
        if head is None:
            return None
        read = x_BTD
        if head in ("classes", "pooled", "next_sentence"):
            where = self.config.classes_from if head == "classes" else "first"
            read = _example(x_BTD, segments_BT, where)
        return apply(self.module, params, read, method=head)

    def _moved_right(self, tokens_BT: jax.Array) -> jax.Array:
        start, padding = self.config.start_token, self._token("pad")
        if start is not None:
            first_B1 = jnp.full_like(tokens_BT[:, :1], start)
        elif padding is not None:  # mBART begins with what the text ends with, its language
            last_B1 = (tokens_BT != padding).sum(1, keepdims=True) - 1
            first_B1 = jnp.take_along_axis(tokens_BT, last_B1, 1)
        else:
            raise UserError("an encoder-decoder needs target_tokens_BT, the tokens that its decoder reads")
        return jnp.concatenate([first_B1, tokens_BT[:, :-1]], 1)

    def __call__(self, tokens_BT: jax.Array, *inputs: jax.Array | None, **named: Any) -> Output:
        """`apply` with the model's own parameters, compiled."""
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
            raise UserError(f"a row has {length} tokens, more than the {limit} positions of the model; cut it")
        shapes = tuple(None if x is None else jnp.shape(x) for x in (tokens_BT, *inputs))
        more = tuple((name, x if isinstance(x, bool) or x is None else jnp.shape(x)) for name, x in named.items())
        key = self.config, self.module, self._token("eos"), self._token("pad"), shapes, more
        return self.programs.get(_compiled_apply, *key)(self.params, tokens_BT, *inputs, **named)


def _compiled_apply(config: ModelConfig, module: Transformer, eos: int | None, pad: int | None, *_: Any) -> Any:
    """Returns `LM.apply` of such a model, compiled; one function for each shape, so that their number has a bound."""
    tokens = families.Origin({"eos_token_id": eos, "pad_token_id": pad}, heads=None)
    return jax.jit(LM(config, module, None, origin=tokens).apply, static_argnames=("states", "attentions"))


def check_ids(name: str, ids: Any, rows: int) -> None:
    """Raises UserError for ids that are no integers, and for one that the model has no row for.

    Arrays on an accelerator, and those of a traced function, are not looked at: it would have to be waited for.
    """
    if isinstance(ids, jax.core.Tracer):
        return
    if isinstance(ids, jax.Array) and (jax.default_backend() != "cpu" or not ids.is_fully_addressable):
        return
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise UserError(f"{name} has rows of several lengths; pad them to one, and give mask_BT") from None
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{name} has the dtype {ids.dtype}; give token ids, which are integers")
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        strange = int(ids.min() if ids.min() < 0 else ids.max())
        raise UserError(
            f"{name} has the id {strange}, but the model has {rows} rows for tokens, so ids go from 0 to {rows - 1}; "
            f"correct the ids, or give the model more rows with jaxlm.resize(lm, size)"
        )


def _inside(seen: Any, stack: str) -> StackOutputs:
    states = seen["states"][stack]["states"][0] if "states" in seen else None
    weights = seen["weights"][stack]["weights"][0][:2] if "weights" in seen else (None, None)
    return StackOutputs(states, *weights)


def _example(x_BTD: jax.Array, segments_BT: jax.Array | None, where: str) -> jax.Array:
    """The state [B, D] that stands for the row's example: its first token's, its last one's, or their mean."""
    if where == "first":
        return x_BTD[:, 0]
    real_BT = jnp.ones(x_BTD.shape[:2], bool) if segments_BT is None else segments_BT > 0
    if where == "mean":
        return (x_BTD * real_BT[..., None]).sum(1) / jnp.maximum(real_BT.sum(1, keepdims=True), 1)
    last_B = x_BTD.shape[1] - 1 - jnp.argmax(real_BT[:, ::-1], 1)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], 1)[:, 0]


def find(name: str | os.PathLike[str], *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a model: of a run, its export; of a hub name, its snapshot in the cache.

    Raises UserError where there is none, or where it holds no model yet.
    """
    address = argument("name", name, str)
    revision = argument("revision", revision, str | None)
    folder = (
        buckets.model(address) if buckets.is_address(address) else fetch(address, revision=revision, offline=offline)
    )
    if (folder / "export" / "config.json").exists():
        return folder / "export"
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json; give an exported model or a run folder")
    if "run" in families.read_config(folder / "config.json"):
        raise UserError(
            f"the run in {folder} has no export yet; let it end (give its command again), or stop it with SIGTERM, "
            f"which exports what there is"
        )
    return folder


def load(
    name: str | os.PathLike[str],
    *,
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
    say: Callable[[str], None] | None = None,
) -> LM:
    """The model in a folder, or of a hub name: Hugging Face's format, or a run (its export).

    head: lm, masked_lm, next_sentence, replaced, classes, tokens, span, pooled, none, or encoder (of an
    encoder-decoder); None: what the checkpoint has.  One that it does not have is randomly initialised, with a message.
    labels: names, or the number, of what the heads classes and tokens tell apart; None: what the checkpoint says.
    dtype: of the parameters in memory, None as they are stored; compute_dtype: of the arithmetic, None as `dtype`.
    matmul_precision: of products of float32 matrices: default, high or highest.  At the default a TPU computes them in
    one pass of bfloat16 and a GPU in TensorFloat32; highest is float32.
    mesh: where the parameters go, each device reading its slices; None: the first device.
    module: a class of your own, derived from Transformer, whose parameters the folder holds.
    split_special_tokens: whether special tokens written in texts, such as "[SEP]", are spelled like other text (True,
    for texts that users of a service send) or read as these tokens (False); None: as the tokenizer's files say, else
    False.
    revision: branch, tag or commit on the hub; offline: look only in the hub's cache.  say: takes what is said, in
    place of standard error.

    Raises UserError where there is no such folder or hub name, where it holds no model, or where its files contradict
    each other.
    """
    head = argument("head", head, str | None)
    names = _label_names(labels)
    argument("matmul_precision", matmul_precision, MatmulPrecision)
    argument("mesh", mesh, jax.sharding.Mesh | None)
    if module is not None and not (isinstance(module, type) and issubclass(module, Transformer)):
        raise UserError(f"module is {shown(module)}; it must be a class derived from jaxlm's Transformer")
    folder = find(name, revision=revision, offline=offline)
    kinds = [None if kind is None else _dtype(kind) for kind in (dtype, compute_dtype)]
    found = families.load(
        folder,
        head=head,
        labels=names,
        dtype=kinds[0],
        mesh=mesh,
        module=module,
    )
    if found.fresh:
        tell = say or partial(print, file=sys.stderr)
        tell(f"randomly initialised, since {folder} has none: {', '.join(found.fresh)}")
    compute = kinds[1] or kinds[0] or jnp.result_type(*jax.tree.leaves(found.params))
    placement = sharding.Placement(mesh)
    made = (module or Transformer)(found.config, placement, jnp.dtype(compute), precision=matmul_precision)
    tokenizer = tokenizers.load(str(folder), split_special_tokens) if has_tokenizer(folder) else None
    files, pooling = kept_files(folder)
    before = found.origin.config.get("model")  # of our own format
    own = isinstance(before, dict) and before.get("heads_on_top") == list(found.config.heads_on_top)
    if found.fresh or (head is not None and found.origin.heads is None and not own):
        files = without_task(files)  # the head is another than that of the task
    return LM(found.config, made, found.params, tokenizer, found.origin, files, pooling, found.fresh)


def _label_names(labels: Any) -> tuple[str, ...] | None:
    """The names of the outputs of a head, of which the number alone may be given."""
    if labels is None or isinstance(labels, (list, tuple)):
        names = argument("labels", labels, tuple[Name, ...] | None)
        twice = next((name for name in names or () if names.count(name) > 1), None)
        if twice is not None or (names is not None and not names):
            raise UserError(f"labels is {shown(labels)}; give at least one name, and each name once")
        return names
    count = argument("labels", labels, Annotated[int, Range(1, 1_000_000)])
    return tuple(f"LABEL_{i}" for i in range(count))


def kept_files(folder: Path) -> tuple[dict[str, bytes], Pooling | None]:
    """Returns the files of a model's folder that are saved with the model again, and the pooling that they declare."""
    kept = {name: model_files.locate(folder, name) for name in _CARRIED}
    files = {name: model_files.read_bytes(file) for name, file in kept.items() if file is not None}
    if _TASK not in files and folder.name == "export":
        files |= _of_run(folder.parent)
    return files | carried(folder), read_pooling(folder)


def without_task(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files of a model without the note of what it was fine-tuned for."""
    return {name: content for name, content in files.items() if name != _TASK}


def _files_to_save(lm: LM) -> Mapping[str, bytes]:
    """Returns the files that are saved beside a model.

    Those that make it an encoder of sentences are left out where it has got a head that says something else of a text.
    """
    new_head = lm.origin is None or lm.origin.heads != lm.config.heads_on_top
    if new_head and {"classes", "tokens", "span"} & set(lm.config.heads_on_top):
        return {name: content for name, content in lm.files.items() if name in _CARRIED}
    return lm.files


def _dtype(name: Any) -> Any:
    known = ("float32", "bfloat16", "float16")
    given = getattr(name, "__name__", str(name))
    if given not in known:
        raise UserError(f"dtype is {given!r}{perhaps(given, known)}")
    return jnp.dtype(given)


_TASK = "jaxlm_task.json"  # of an export: what the model was fine-tuned for
_CARRIED = ("generation_config.json", _TASK)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "*.spm", "*.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any(True for pattern in _VOCABULARIES for _ in folder.glob(pattern))


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a model cannot be written to `folder` without losing something."""
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another folder")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{folder} cannot be made: {above} is a file; choose another folder")
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder} is the present folder, or above it; choose a folder below it")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} exists and is not empty; choose another folder, or say that it may be overwritten")
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run, which would be lost; choose another folder")


def save(
    lm: LM,
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> str:
    """Writes the model where transformers can load it; returns the name of the format.

    The folder appears whole or not at all.  What was read and has not changed is written byte for byte, under the names
    that it had.  An architecture that Hugging Face has no format for is written in jaxlm's own.

    dtype: of all tensors; None: each as it was stored where it came from.  overwrite: replace a folder that is not
    empty.  max_shard_bytes: files are at most this large.

    Raises UserError where the folder exists and is not empty, unless `overwrite` says to replace it; where it holds a
    run; and where another process writes there.
    """
    argument("lm", lm, LM)
    folder = disk.local(argument("folder", folder, str), "folder")
    max_shard_bytes = argument("max_shard_bytes", max_shard_bytes, Annotated[int, Range(1, 10**18)])
    check_free(folder, overwrite)
    lock = disk.lock_beside(folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with disk.lock(lock, str(folder), "choose another folder"), disk.atomic_folder(folder, overwrite) as part:
        extra: dict[str, Any] = {}
        if lm.tokenizer is not None:
            lm.tokenizer.save(str(part))
            ids = {"bos": lm.tokenizer.bos, "eos": lm.tokenizer.eos, "pad": lm.tokenizer.pad}
            extra = {f"{name}_token_id": i for name, i in ids.items()}
        if lm.origin is not None and "model_type" not in lm.origin.config:  # of no format yet, but what a task says
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
        )
    return kind


def _of_run(folder: Path) -> dict[str, bytes]:
    """The note of what a run trains, where its export was written before exports had one."""
    file = model_files.locate(folder, "config.json")
    run = model_files.read_object(file).get("run") if file else None
    data = run.get("data") if isinstance(run, dict) else None
    if not isinstance(run, dict) or not isinstance(data, dict):
        return {}
    return {_TASK: json.dumps({"task": run.get("task"), "length": data.get("length")}).encode()}


def with_task(lm: LM, task: Any, length: int) -> LM:
    """Returns the model with a note of what it was fine-tuned for, which is saved with it; see `LM.trained`."""
    note = json.dumps({"task": task_to_json(task), "length": length}, indent=2) + "\n"
    return dataclasses.replace(lm, files={**lm.files, _TASK: note.encode()})


def with_params(lm: LM, params: Any) -> LM:
    """The same model with other parameters."""
    return dataclasses.replace(lm, params=params)
