"""Activation patching: which activations of a clean text restore its answer in a corrupted text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_list, check_model
from jaxlm.config.ranges import short_repr
from jaxlm.errors import UserError, suggestion
from jaxlm.explain.activations import check_site
from jaxlm.explain.examples import Example, head_of, read_example, with_target
from jaxlm.explain.outputs import Rows
from jaxlm.lm import LM
from jaxlm.nn.sites import Site, layers_with, stacks_of
from jaxlm.nn.transformer import Transformer, apply

BATCH_TOKENS = 4096  # in one call of the compiled program
PATCHED_HEADS = ("lm", "masked_lm", "classes")
ALL = -1  # in `Patch`: all positions or all heads


class Patch(NamedTuple):
    """The activations of one layer that are copied from the clean text.

    Attributes:
      site: the site.
      layer: the number of the layer.
      position: the position in the row of the stack, or `ALL`.
      head: the head, for the parts "heads" and "cross_heads", or `ALL`.
    """

    site: Site
    layer: int
    position: int = ALL
    head: int = ALL


class Grid(NamedTuple):
    """The effect of patches at one site.

    Attributes:
      site: the site.
      layers: the numbers of the L layers.
      restored: the fraction of the difference between the texts that each patch restores [L, T], or [L, H] for heads:
        0 is the corrupted text, 1 the clean text.
    """

    site: Site
    layers: tuple[int, ...]
    restored: np.ndarray


class Patching(NamedTuple):
    """The effects of the activations of a clean text in a corrupted text.

    Attributes:
      answers: the two compared tokens or classes. The measured value is the logit of the first minus the second.
      clean, corrupted: the value for each text.
      pieces: the tokens of both texts by stack, with both where they differ.
      grids: the effects by site.
    """

    answers: tuple[str, str]
    clean: float
    corrupted: float
    pieces: dict[str, tuple[str, ...]]
    grids: tuple[Grid, ...]


class Contrast(NamedTuple):
    """Two texts of the same length, and the value that is compared.

    Attributes:
      lm: the model.
      clean, corrupted: the texts as the model reads them.
      place: the position whose logits are read; None: one output for the row.
      answers: the names of the two outputs.
      outputs: their indices.
    """

    lm: LM
    clean: Example
    corrupted: Example
    place: int | None
    answers: tuple[str, str]
    outputs: tuple[int, int]


def patch(
    lm: LM,
    clean: Any,
    corrupted: Any,
    answers: tuple[str, str] | None = None,
    parts: Sequence[str] = ("residual", "attention", "mlp", "heads"),
) -> Patching:
    """Returns how far each activation of the clean text restores its answer in the corrupted text.

    The model reads the corrupted text once for each layer and position (for heads, each layer and head), with the
    activation there replaced by that of the clean text. All patches run in one compiled program, in batches.

    Args:
      lm: a model with one of the heads lm, masked_lm and classes.
      clean: the text, with a mask token for the head masked_lm.
      corrupted: a text with as many tokens.
      answers: the tokens or classes of the clean and of the corrupted text. None: what the model predicts for each.
      parts: names of `jaxlm.nn.sites.PARTS`; "cross_attention" and "cross_heads" for encoder-decoders.

    Raises:
      UserError: for texts of different lengths, and for unknown answers and parts.

    Source: Meng et al. 2022, Locating and Editing Factual Associations in GPT, section 2; Wang et al. 2023,
    Interpretability in the Wild, for the normalised logit difference.
    """
    check_model("lm", lm)
    sites = sites_of(lm.config, parts)
    contrast = read_contrast(lm, clean, corrupted, answers)
    names = contrast.answers
    pieces = {stack: tuple(_pieces(contrast, stack)) for stack in stacks_of(lm.config)}
    patches = [patch for site in sites for patch in patches_of(lm.config, site, len(pieces[site.stack]))]
    clean_value, corrupted_value, values = patched_values(contrast, patches)
    if abs(clean_value - corrupted_value) < 1e-4:
        raise UserError(
            f"the logit of {names[0]!r} minus that of {names[1]!r} is {clean_value:.4f} for both texts, so that there "
            f"is nothing to restore; choose texts or answers for which the model's predictions differ"
        )
    restored, grids = (values - corrupted_value) / (clean_value - corrupted_value), []
    for site in sites:
        layers = layers_with(lm.config, site.stack)[site.part]
        own = np.array([value for value, one in zip(restored, patches) if one.site == site])
        grids.append(Grid(site, layers, own.reshape(len(layers), -1)))
    return Patching(names, clean_value, corrupted_value, pieces, tuple(grids))


def sites_of(config: ModelConfig, parts: Sequence[str]) -> list[Site]:
    """Returns the sites with these parts in every stack that has them. Raises UserError for unknown parts."""
    names = list(dict.fromkeys(check_list("parts", parts, "names of parts")))
    if not names:
        raise UserError("parts is empty; choose some of residual, attention, mlp and heads")
    for part in names:
        check_site(config, part)
    return [Site(stack, part) for stack in stacks_of(config) for part in names if part in layers_with(config, stack)]


def patches_of(config: ModelConfig, site: Site, length: int) -> Iterator[Patch]:
    """Yields the patches of each layer and position of a site, or of each layer and head.

    Args:
      config: the config of the model.
      site: the site.
      length: number of positions in the stack.
    """
    own = config.decoder_config if site.stack == "decoder" else config
    for layer in layers_with(config, site.stack)[site.part]:
        if site.part in ("heads", "cross_heads"):
            yield from (Patch(site, layer, head=head) for head in range(own.heads))
        else:
            yield from (Patch(site, layer, position) for position in range(length))


def read_contrast(lm: LM, clean: Any, corrupted: Any, answers: tuple[str, str] | None) -> Contrast:
    """Returns two texts as the model reads them, and the outputs that are compared.

    Raises:
      UserError: as `patch` does.
    """
    head = head_of(lm)
    if head not in PATCHED_HEADS:
        raise UserError(f"the model has the head {head or 'none'}; patching requires one of {', '.join(PATCHED_HEADS)}")
    examples = []
    for text in (clean, corrupted):
        example = read_example(lm, text)
        if head == "lm":  # the next token of a prompt, or the first token of a target
            example = with_target(lm, example, [0])[0]
        examples.append(example)
    first, second = examples
    if len(first.tokens_T) != len(second.tokens_T):
        raise UserError(
            f"the clean text has {len(first.tokens_T)} tokens, {' '.join(first.pieces)!r}, the corrupted text "
            f"{len(second.tokens_T)}, {' '.join(second.pieces)!r}; choose texts with the same number of tokens"
        )
    if (first.tokens_T == second.tokens_T).all():
        raise UserError(f"the texts have the same tokens, {' '.join(first.pieces)!r}; change a word of one of them")
    place = None if head == "classes" else len(first.tokens_T) - (first.source or 0) - 1
    if head == "masked_lm":
        place = _mask_place(lm, first, second)
    contrast = Contrast(lm, first, second, place, ("", ""), (0, 0))
    outputs = _predictions(contrast) if answers is None else _answers(contrast, answers)
    if outputs[0] == outputs[1]:
        name = _output_name(contrast, outputs[0])
        raise UserError(f"both answers are {name!r}; name two different ones, the first for the clean text")
    names = _output_name(contrast, outputs[0]), _output_name(contrast, outputs[1])
    return contrast._replace(answers=names, outputs=outputs)


def _mask_place(lm: LM, first: Example, second: Example) -> int:
    assert lm.tokenizer is not None
    mask = -1 if lm.tokenizer.mask is None else lm.tokenizer.mask
    places, others = ([int(n) for n in np.flatnonzero(some.tokens_T == mask)] for some in (first, second))
    if not places or places != others:
        name = lm.tokenizer.special.get("mask", "mask token")
        raise UserError(f"the texts have {name} at the tokens {places} and {others}; put it at one place in both")
    return places[0]


def _answers(contrast: Contrast, answers: tuple[str, str]) -> tuple[int, int]:
    """Returns the indices of the answers: labels, or tokens of the vocabulary."""
    answers = tuple(check_list("answers", answers, "two names"))  # type: ignore[assignment]
    if len(answers) != 2 or not all(isinstance(name, str) for name in answers):
        raise UserError(f"answers is {short_repr(answers)}; give two strings: that of the clean text comes first")
    lm = contrast.lm
    if contrast.place is None:
        labels = contrast.clean.task.labels
        for name in answers:
            if name not in labels:
                raise UserError(f"the answer {name!r} is not a label of the model{suggestion(name, labels)}")
        return labels.index(answers[0]), labels.index(answers[1])
    return _first_token(lm, answers[0]), _first_token(lm, answers[1])


def _first_token(lm: LM, word: str) -> int:
    """Returns the token of a word, which must be one; with a space before it if only that is one token."""
    assert lm.tokenizer is not None
    tokenizer = lm.tokenizer.target
    options = [tokenizer.encode(word), tokenizer.encode(f" {word}")]
    for ids in options:
        if len(ids) == 1 and ids[0] != tokenizer.unk:
            return int(ids[0])
    raise UserError(
        f"the answer {word!r} has {len(options[0])} tokens, {' '.join(tokenizer.pieces(options[0]))!r}; choose a word "
        f"that is one token of the vocabulary"
    )


def _output_name(contrast: Contrast, index: int) -> str:
    if contrast.place is None:
        return contrast.clean.task.labels[index]
    assert contrast.lm.tokenizer is not None
    tokenizer = contrast.lm.tokenizer.target
    return tokenizer.backend.decode([index], skip_special_tokens=False).strip() or tokenizer.pieces([index])[0]


def _pieces(contrast: Contrast, stack: str) -> Iterator[str]:
    source = contrast.clean.source
    span = slice(None) if source is None else slice(source) if stack == "encoder" else slice(source, None)
    for first, second in zip(contrast.clean.pieces[span], contrast.corrupted.pieces[span]):
        yield first if first == second else f"{first.strip()}|{second.strip()}"


def rows_of(example: Example) -> Rows:
    """Returns an example as rows of one row."""
    tokens_1T, types_1T = jnp.asarray(example.tokens_T[None]), jnp.asarray(example.types_T[None])
    S = example.source
    source = tokens_1T[:, :S], jnp.ones_like(tokens_1T[:, :S]), types_1T[:, :S]
    if S is None:
        return Rows(*source)
    return Rows(*source, tokens_1T[:, S:], jnp.ones_like(tokens_1T[:, S:]))


# The compiled programs


def run_stacks(module: Transformer, params: Any, rows: Rows, mutable: Any = False) -> Any:
    """Returns the last hidden states of rows, in an encoder-decoder those of the decoder."""
    targets = () if rows.target_tokens_BU is None else (rows.target_tokens_BU, rows.target_segments_BU)
    return apply(module, params, rows.tokens_BT, rows.segments_BT, None, rows.types_BT, *targets, mutable=mutable)


def _read_outputs(contrast: Contrast, example: Example) -> tuple[dict[Site, jax.Array], np.ndarray]:
    """Returns the activations of an example by site, and the logits [V] that the contrast compares."""
    lm = contrast.lm
    program = lm.programs.get(_reader, lm.config, lm.module, contrast.place)
    sown, logits_V = program(lm.params, rows_of(example))
    stacks = {stack: sown["activations"][stack]["activations"][0] for stack in stacks_of(lm.config)}
    sites = {Site(stack, part): value for stack, parts in stacks.items() for part, value in parts.items()}
    return sites, np.asarray(logits_V)


def _reader(config: ModelConfig, module: Transformer, place: int | None) -> Any:
    lm = LM(config, module, None)

    @jax.jit
    def read(params: Any, rows: Rows) -> Any:
        x_BTD, sown = run_stacks(module, params, rows, ["activations"])
        return sown, _logits_at(lm, params, rows, x_BTD, place)[0]

    return read


def _logits_at(lm: LM, params: Any, rows: Rows, x_BTD: jax.Array, place: int | None) -> jax.Array:
    """Returns the logits of each row at a place [B, V], or those of the row [B, N]."""
    if place is None:
        logits = lm.head_logits(params, x_BTD, rows.segments_BT)
    else:
        logits = lm.head_logits(params, x_BTD[:, place : place + 1], None)
        logits = None if logits is None else logits[:, 0]
    assert logits is not None
    return logits.astype(jnp.float32)


def _predictions(contrast: Contrast) -> tuple[int, int]:
    """Returns what the model predicts for each text."""
    count = None if contrast.place is None else contrast.lm.vocabulary
    first, second = (
        int(_read_outputs(contrast, example)[1][:count].argmax()) for example in (contrast.clean, contrast.corrupted)
    )
    return first, second


def patched_values(contrast: Contrast, patches: Sequence[Patch]) -> tuple[float, float, np.ndarray]:
    """Returns the difference of the two logits for the clean text, the corrupted text, and after each patch [N].

    Args:
      contrast: the texts and the answers.
      patches: each is applied to the corrupted text alone.
    """
    lm, (first, second) = contrast.lm, contrast.outputs
    clean, clean_V = _read_outputs(contrast, contrast.clean)
    _, corrupted_V = _read_outputs(contrast, contrast.corrupted)
    sites = tuple(dict.fromkeys(patch.site for patch in patches))
    layers = tuple(layers_with(lm.config, site.stack)[site.part] for site in sites)
    program = lm.programs.get(_patcher, lm.config, lm.module, contrast.place, sites, layers)
    batch = min(len(patches), max(1, BATCH_TOKENS // len(contrast.clean.tokens_T)))
    table_N4 = np.array([(sites.index(one.site), *one[1:]) for one in patches], np.int32).reshape(-1, 4)
    rows, values = rows_of(contrast.corrupted), []
    for start in range(0, len(patches), batch):
        some_N4 = table_N4[start : start + batch]
        padded_N4 = np.pad(some_N4, [(0, batch - len(some_N4)), (0, 0)], constant_values=ALL)
        given = [clean[site] for site in sites]
        logits_NV2 = program(lm.params, rows, given, padded_N4, np.array(contrast.outputs))
        values.append(np.asarray(logits_NV2[:, 0] - logits_NV2[:, 1])[: len(some_N4)])
    ends = float(clean_V[first] - clean_V[second]), float(corrupted_V[first] - corrupted_V[second])
    return *ends, np.concatenate([*values, np.zeros(0, np.float32)])


def _patcher(
    config: ModelConfig,
    module: Transformer,
    place: int | None,
    sites: tuple[Site, ...],
    layers: tuple[tuple[int, ...], ...],
) -> Any:
    """Returns the compiled program that reads N copies of a row, each with one patch."""
    lm, before = LM(config, module, None), module.edit

    @jax.jit
    def read(params: Any, rows: Rows, clean: Sequence[jax.Array], patches_N4: jax.Array, outputs: jax.Array) -> Any:
        site_N, layer_N, position_N, head_N = patches_N4.T

        def edit(site: Site, layer: Any, value: jax.Array) -> jax.Array:
            value = value if before is None else before(site, layer, value)
            if site not in sites:
                return value
            n = sites.index(site)
            row_of_layer = np.zeros(max(layers[n]) + 1, np.int32)
            row_of_layer[list(layers[n])] = np.arange(len(layers[n]))
            clean_1T = clean[n][jnp.asarray(row_of_layer)[layer]]
            is_place = lambda chosen_N, count: (chosen_N[:, None] == jnp.arange(count)) | (chosen_N == ALL)[:, None]
            mask = ((site_N == n) & (layer_N == layer))[:, None] & is_place(position_N, value.shape[1])
            if value.ndim == 4:
                mask = mask[..., None] & is_place(head_N, value.shape[2])[:, None]
            return jnp.where(mask[..., None], clean_1T, value)

        copy = lambda x: jnp.broadcast_to(x, (len(patches_N4), *x.shape[1:]))
        rows = jax.tree.map(copy, rows)
        x_NTD = run_stacks(module.clone(edit=edit), params, rows)
        return _logits_at(lm, params, rows, x_NTD, place)[:, outputs]

    return read
