"""Structured pruning: smaller models without some of the layers, attention heads and columns of MLPs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_model, token_ids
from jaxlm.config.ranges import Positive, check_argument, short_repr
from jaxlm.errors import UserError
from jaxlm.hub.convert import nested
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.transforms.calibration import input_moments
from jaxlm.transforms.calibration_rows import CalibrationRows, calibration_rows
from jaxlm.transforms.influence import layer_influence
from jaxlm.transforms.layers import keep_layers
from jaxlm.transforms.pruning import check_dense


def shrink(
    lm: LM,
    *,
    layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    layer_choice: Literal["even", "influence"] = "even",
    calibration: Any = None,
    length: int | None = None,
    max_tokens: int | None = None,
) -> LM:
    """Returns a smaller model that keeps some of the layers, attention heads and MLP columns.

    Every layer keeps the same numbers of heads and columns, but its own ones. With calibration data, those with the
    largest contribution to the output of the layer remain: the norm of the weights that read them times the root mean
    square of their values. Without it, the values are replaced by the norm of the weights that compute them.

    Layers with grouped queries lose whole groups: key-value heads together with their query heads. Where relative
    positions have a bias for each head (T5), all layers of a stack keep the same heads.

    A model with fewer layers or a narrower MLP stays in its Hugging Face format. So does one with fewer heads where
    the format has the width of a head, such as Llama's. `save` writes other models in jaxlm's own format.

    Args:
      lm: the model.
      layers: the number of layers to keep, or their indices from 0; of the encoder in an encoder-decoder. None: all.
      decoder_layers: the same for the decoder of an encoder-decoder.
      heads: the number of attention heads to keep; None: all.
      mlp: the width of the MLP to keep; None: all.
      layer_choice: which layers a number keeps. "even": evenly spaced ones, with the first and the last. "influence":
        those that change the hidden states most, by one minus the cosine similarity (Men et al. 2024, equation 1).
      calibration: texts or token ids; see `calibration_rows`.
      length: tokens in a row of the calibration data; None: the model's positions, 2,048 at most.
      max_tokens: number of tokens after which no further text is read; None: 262,144.

    Returns:
      A new model; `lm` is unchanged.

    Raises:
      UserError: if nothing is to be removed or nothing would remain, for indices out of range or given twice, for a
        number of heads that is not a multiple of a group, for low-rank or quantised parameters, and for calibration
        data that is missing or too short.

    Source: Michel et al. 2019 (heads); Men et al. 2024, ShortGPT (layers).
    """
    check_model("lm", lm)
    if layers is None and decoder_layers is None and heads is None and mlp is None:
        raise UserError("shrink has nothing to remove; give layers, decoder_layers, heads or mlp")
    layer_choice = check_argument("layer_choice", layer_choice, Literal["even", "influence"])
    heads, mlp = (check_argument(name, value, Positive | None) for name, value in (("heads", heads), ("mlp", mlp)))
    check_dense(lm.params)
    _check_widths(lm.config, heads, mlp)
    numbers = _numbers_of_layers(lm.config, layers, decoder_layers)
    if calibration is not None:  # read once, since it may be a stream
        calibration = calibration_rows(lm, calibration, length=length, max_tokens=max_tokens)
    influence: dict[str, np.ndarray] = {}
    if layer_choice == "influence" and any(isinstance(kept, int) for kept in numbers.values()):
        if calibration is None:
            raise UserError("layer_choice is 'influence', which requires calibration data; give texts as calibration")
        influence = layer_influence(lm, calibration)
    lm = _keep_layers(lm, {stack: _indices(lm.config, stack, kept, influence) for stack, kept in numbers.items()})
    if heads is None and mlp is None:
        return lm
    if heads is None and mlp is None:
        return lm
    rows = parameters.rows_by_path(lm.params)
    leaves = {path: jnp.asarray(leaf) for path, leaf in parameters.by_path(lm.params).items()}
    sizes = _sizes_of_inputs(lm, leaves, calibration)
    kept = _kept_heads(lm.config, leaves, sizes, heads) if heads else {}
    kept |= _kept_columns(leaves, sizes, mlp) if mlp else {}
    params = nested({path: _keep_units(path, leaf, rows[path].axes, kept) for path, leaf in leaves.items()})
    return _with_config(lm, _narrower(lm.config, heads, mlp), params)


def _check_widths(config: ModelConfig, heads: int | None, mlp: int | None) -> None:
    """Raises UserError for numbers of heads and columns that the model cannot keep."""
    both = (config, config.decoder_config)
    group = config.heads // config.K
    largest = min(one.heads for one in both)
    mixers, feed_forwards = sorted(set(config.mixer_pattern)), sorted(set(config.feed_forward_pattern))
    if heads is not None and mixers != ["attention"]:
        raise UserError(f"heads is {heads}, but the model has the mixer {', '.join(mixers)!r}; leave it out")
    if heads is not None and len({one.C for one in both}) > 1:
        raise UserError(f"heads is {heads}, but the heads of encoder and decoder have different widths; leave it out")
    if heads is not None and (heads > largest or heads % group):
        raise UserError(
            f"heads is {heads}; it must be at most {largest}, the heads of the model, and a multiple of {group}, the "
            f"query heads of each key-value head"
        )
    if heads is not None and (config.relative == "alibi" or config.query_key_norm_whole):
        raise UserError(
            f"heads is {heads}, but attention depends on the number of heads (relative {config.relative!r}, "
            f"query_key_norm_whole {config.query_key_norm_whole}); leave it out"
        )
    if mlp is not None and not set(feed_forwards) <= {"dense", "gated"}:
        raise UserError(
            f"mlp is {mlp}, but the model has the feed-forward layer {', '.join(feed_forwards)!r}; leave it out"
        )
    if mlp is not None and mlp > (width := min(one.F for one in both)):
        raise UserError(f"mlp is {mlp}; it must be at most {width}, the width of the MLP of the model")


def _numbers_of_layers(config: ModelConfig, layers: Any, decoder_layers: Any) -> dict[str, int | tuple[int, ...]]:
    """Returns the number, or the indices, of the layers that each stack keeps, for the stacks that lose layers."""
    two = config.structure == "encoder_decoder"
    if decoder_layers is not None and not two:
        raise UserError(
            f"decoder_layers is {short_repr(decoder_layers)}, but the model is a(n) {config.structure}; give layers"
        )
    given = {"layers": ("encoder" if two else config.structure, layers, config.layers)}
    given["decoder_layers"] = "decoder", decoder_layers, config.decoder_layers or config.layers
    found: dict[str, int | tuple[int, ...]] = {}
    for name, (stack, kept, count) in given.items():
        if kept is None:
            continue
        is_number = isinstance(kept, (int, np.integer)) and not isinstance(kept, bool)
        indices = (int(kept),) if is_number else tuple(token_ids(name, kept))
        limit = f"from 1 to {count}" if is_number else f"indices from 0 to {count - 1}, each once, at least one"
        valid = range(1, count + 1) if is_number else range(count)
        if not indices or len(set(indices)) < len(indices) or not all(index in valid for index in indices):
            raise UserError(f"{name} is {short_repr(kept)}; the {stack} has {count} layers: give {limit}")
        found[stack] = indices[0] if is_number else tuple(sorted(indices))
    if found:
        _check_layers(config, found)
    return found


def _check_layers(config: ModelConfig, kept: Mapping[str, Any]) -> None:
    """Raises UserError for models whose layers depend on their place."""
    distinct = config.distinct_layers or config.layers
    if 1 < distinct < config.layers:
        raise UserError(f"the {config.layers} layers share {distinct} sets of parameters; leave out layers")
    if config.scale_by_layer:
        raise UserError("the scores of attention depend on the number of the layer (scale_by_layer); leave out layers")
    if len(set(config.layer_kinds)) > 1 and config.structure == "encoder_decoder":
        raise UserError("the layers of both stacks are of several kinds (layer_kinds); leave out layers")
    if not config.first_norm and not all(isinstance(one, int) or 0 in one for one in kept.values()):
        raise UserError("the first layer of the model has no norm before attention; keep layer 0")


def _indices(
    config: ModelConfig, stack: str, kept: int | tuple[int, ...], influence: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the indices of the layers that a stack keeps, in order; `kept` is their number, or the indices."""
    if not isinstance(kept, int):
        return np.array(kept)
    two = config.structure == "encoder_decoder" and stack == "decoder"
    count = (config.decoder_layers if two else None) or config.layers
    if not influence:
        return np.linspace(0, count - 1, kept).round().astype(int)
    # A first layer without a norm before attention must stay the first one.
    needed_L = (np.arange(count) == 0) & (not config.first_norm)
    return np.sort(np.argsort(-np.where(needed_L, np.inf, influence[stack]), kind="stable")[:kept])


def _keep_layers(lm: LM, kept: Mapping[str, np.ndarray]) -> LM:
    """Returns the model with only these layers of each stack."""
    if lm.config.distinct_layers == 1 and kept:  # all layers have the same parameters
        return _with_config(lm, dataclasses.replace(lm.config, layers=len(kept[lm.config.structure])), lm.params)
    decoder = kept.get("decoder", ())
    first = decoder if lm.config.structure == "decoder" else kept.get("encoder", ())
    second = decoder if lm.config.structure == "encoder_decoder" else ()
    return keep_layers(lm, tuple(map(int, first)), tuple(map(int, second))) if kept else lm


def _sizes_of_inputs(
    lm: LM, leaves: Mapping[str, jax.Array], calibration: CalibrationRows | None
) -> dict[str, jax.Array]:
    """Returns the size [L, I] of each input of the projections that read heads and columns, by path.

    It is the root mean square over calibration data, or else the norm of the weights that compute the input.
    """
    paths = [path for path in leaves if re.search(r"attention/out/kernel$|mlp/down/kernel$", path)]
    if calibration is not None:
        moments = input_moments(lm, calibration, paths=paths, diagonal=True)
        return {path: jnp.sqrt(sums / tokens_L[:, None]) for path, (sums, tokens_L) in moments.items()}
    sizes = {}
    for path in paths:
        module, name, _ = path.rsplit("/", 2)
        if name == "out":  # the values, which several query heads may share
            value_LKC = jnp.linalg.norm(leaves[f"{module}/value/kernel"], axis=1)
            group = leaves[path].shape[1] // value_LKC.shape[1]
            size = jnp.repeat(value_LKC, group, axis=1)
        else:
            gate = leaves.get(f"{module}/gate/kernel")
            size = jnp.linalg.norm(leaves[f"{module}/up/kernel"], axis=1)
            size = size if gate is None else size * jnp.linalg.norm(gate, axis=1)
        sizes[path] = size.reshape(len(size), -1)
    return sizes


def _kept_heads(
    config: ModelConfig, leaves: Mapping[str, jax.Array], sizes: Mapping[str, jax.Array], heads: int
) -> dict[tuple[str, str], jax.Array]:
    """Returns the indices [L, n] of the heads to keep, by module and logical axis."""
    kept = {}
    for path, size_LI in sizes.items():
        module, name, _ = path.rsplit("/", 2)
        if name != "out":
            continue
        out_LHCD = leaves[path].astype(jnp.float32)
        L, H = out_LHCD.shape[:2]
        K = leaves[f"{module}/key/kernel"].shape[2]
        scores_LK = (jnp.square(out_LHCD).sum(-1) * jnp.square(size_LI).reshape(L, H, -1)).sum(-1).reshape(L, K, -1)
        scores_LK = scores_LK.sum(-1)
        if config.relative == "buckets" and module.endswith("/attention"):
            scores_LK = jnp.broadcast_to(scores_LK.sum(0), scores_LK.shape)  # the table of biases serves all layers
        index_LK = _largest(scores_LK, heads * K // H)
        kept[module, "kv_heads"] = index_LK
        kept[module, "heads"] = (index_LK[..., None] * (H // K) + jnp.arange(H // K)).reshape(L, -1)
    return kept


def _kept_columns(
    leaves: Mapping[str, jax.Array], sizes: Mapping[str, jax.Array], mlp: int
) -> dict[tuple[str, str], jax.Array]:
    """Returns the indices [L, n] of the columns of MLPs to keep, by module and logical axis."""
    kept = {}
    for path, size_LF in sizes.items():
        module, name, _ = path.rsplit("/", 2)
        if name == "down":
            scores_LF = size_LF * jnp.linalg.norm(leaves[path].astype(jnp.float32), axis=-1)
            kept[module, "mlp"] = _largest(scores_LF, mlp)
    return kept


def _largest(scores_LN: jax.Array, count: int) -> jax.Array:
    """Returns the indices [L, count] of the largest scores of each layer, in order."""
    return jnp.sort(jax.lax.top_k(scores_LN, count)[1], axis=1)


def _keep_units(
    path: str, leaf: jax.Array, axes: tuple[str | None, ...], kept: Mapping[tuple[str, str], jax.Array]
) -> jax.Array:
    """Returns a leaf with only the heads or columns to keep."""
    stack, *rest = path.split("/")
    if rest[:2] == ["relative", "buckets"]:
        index_LH = kept.get((f"{stack}/layers/attention", "heads"))
        return leaf if index_LH is None else leaf[:, index_LH[0]]
    module = "/".join(path.split("/")[:3])
    for axis, name in enumerate(axes):
        if name is not None and (module, name) in kept:
            index_LN = kept[module, name]
            shape = [1] * leaf.ndim
            shape[0], shape[axis] = index_LN.shape
            leaf = jnp.take_along_axis(leaf, index_LN.reshape(shape), axis)
    return leaf


def _narrower(config: ModelConfig, heads: int | None, mlp: int | None) -> ModelConfig:
    """Returns the config with other numbers of heads and columns; the width of a head does not change."""
    changes: dict[str, Any] = {}
    if heads is not None:
        kv_heads = heads * config.K // config.heads
        changes |= {"heads": heads, "kv_heads": None if config.kv_heads is None else kv_heads, "decoder_heads": None}
        is_default = config.head_width is None and heads == config.heads
        changes["head_width"] = None if is_default else config.C
    if mlp is not None:
        changes |= {"mlp_width": mlp, "decoder_mlp_width": None}
    return dataclasses.replace(config, **changes)


def _with_config(lm: LM, config: ModelConfig, params: Any) -> LM:
    """Returns the model with another config; `save` no longer writes the buffers of its folder."""
    config.check()
    origin = None if lm.origin is None else lm.origin._replace(buffers={}, unused=())
    return dataclasses.replace(lm, config=config, module=lm.module.clone(config=config), params=params, origin=origin)
