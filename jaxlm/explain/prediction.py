"""A prediction to explain, and its value for a text with other words: the functions that all methods call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import families
from jaxlm.config.ranges import check_argument
from jaxlm.errors import UserError
from jaxlm.explain.examples import Example, head_of, read_example
from jaxlm.explain.outputs import (
    Rows,
    at_old_places,
    layer_outputs,
    outputs_of,
    remove_tokens,
    words_of,
)
from jaxlm.explain.targets import Choice, Target, choose_targets
from jaxlm.inference.packing import divisible_rows
from jaxlm.lm import LM
from jaxlm.nn import nodes
from jaxlm.nn.transformer import unstack_layers

Reference = Literal["mask", "padding", "unknown", "zero"]
Replacement = Literal["remove", "mask", "padding", "unknown", "zero"]

MAX_ROWS = 32  # of a batch
MAX_LOGITS = 1 << 25  # in a batch
MAX_TOKENS = 2048  # in a batch, padding included
MIN_ROW = 16  # tokens in the shortest row; longer rows are powers of two, so that few programs are compiled


class Prediction(NamedTuple):
    """A prediction of a model that is explained.

    Attributes:
      lm: the model, whose module computes in float32.
      example: the tokens that it reads.
      targets: the numbers to explain; several for a text that is predicted token by token.
    """

    lm: LM
    example: Example
    targets: tuple[Target, ...]


class Values(NamedTuple):
    """The values of a target for several variants of a text: scores [B] and probabilities [B]."""

    scores: np.ndarray
    probabilities: np.ndarray


def predict_target(
    lm: LM,
    text: Any,
    *,
    target: str | Target | None = None,
    word: int | None = None,
    new_tokens: int = 1,
    task: Any = None,
) -> Prediction:
    """Returns the prediction of a model for a text, ready to be explained.

    Args:
      lm: the model.
      text: a text, or what `jaxlm.predict` accepts as an example.
      target: the name of a label, the text of an answer, a token for a mask, or the text that follows a prompt; or a
        `Target` of your own. None: what the model predicts.
      word: for tags, the number of the word from 0; None: the first word whose tag marks a span.
      new_tokens: for the head lm without a target, the number of tokens to generate and explain.
      task: the config of a task; None: that of the model.

    Raises:
      UserError: for a text that the model cannot read as a whole, and for an unknown target.
    """
    example = read_example(lm, text, task)
    if isinstance(target, Target):
        if example.source is not None:
            raise UserError(
                f"target is {target.name!r}, a Target of your own, but the decoder of the model has no tokens for it; "
                f"give the text that the decoder writes as the target"
            )
        targets: tuple[Target, ...] = (target,)
    else:
        example, targets = choose_targets(lm, example, text, Choice(target, word, new_tokens))
    module = lm.module.clone(dtype=jnp.float32, precision="highest")
    return Prediction(dataclasses.replace(lm, module=module), example, targets)


def check_differentiable(lm: LM) -> None:
    """Raises UserError for a model that rounds the inputs of its projections: rounding has no gradient."""
    for leaf in jax.tree.leaves(lm.params, is_leaf=nodes.is_node):
        if (form := _input_format(leaf)) != "float":
            raise UserError(
                f"the model rounds the inputs of its projections to {form}, so that they have no gradient; use "
                f"occlusion or shapley, or explain the model before it was quantised"
            )


def _input_format(value: Any) -> str:
    if not nodes.is_node(value):
        return "float"
    own = getattr(value, "input_format", "float")
    inner = (_input_format(getattr(value, name)) for name in value.arrays)
    return own if own != "float" else next((form for form in inner if form != "float"), "float")


def reference_kinds(lm: LM) -> dict[str, int | None]:
    """Returns the kinds of references that the model has, and the token of each; None for the zero vector."""
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    tokens = {"mask": tokenizer.mask, "padding": tokenizer.pad, "unknown": tokenizer.unk}
    own = lm._token("pad") if lm.origin else None  # an example's tokenizer may lack it
    tokens["padding"] = own if tokens["padding"] is None else tokens["padding"]
    rows = lm.config.vocabulary
    return {name: token for name, token in tokens.items() if token is not None and token < rows} | {"zero": None}


def choose_reference(lm: LM, name: str | None) -> str:
    """Returns the reference of a model; by default its padding token, else the zero vector.

    Raises:
      UserError: for a token that the model does not have.
    """
    name = check_argument("reference", name, Reference | None)
    kinds = reference_kinds(lm)
    if name is None:
        return "padding" if "padding" in kinds else "zero"
    if name not in kinds:
        raise UserError(f"reference is {name!r}, but the tokenizer has no such token; choose one of {', '.join(kinds)}")
    return name


def choose_replacement(prediction: Prediction, name: str | None) -> str:
    """Returns what takes the place of a hidden token; by default tokens are removed if the target allows it.

    Raises:
      UserError: for a token that the model does not have, and where tokens cannot be removed.
    """
    target = prediction.targets[0]
    return replacement_for(prediction.lm, prediction.example, name, target.place is not None)


def replacement_for(lm: LM, example: Example, name: str | None, has_place: bool = False) -> str:
    """Returns what `choose_replacement` returns, before the target is known.

    Args:
      lm: the model.
      example: the tokens of the text.
      name: the choice of the user; None: the default.
      has_place: whether the target reads the output of one token.
    """
    name = check_argument("replacement", name, Replacement | None)
    head, kinds = head_of(lm), reference_kinds(lm)
    reads_token = head in ("tokens", "span", "masked_lm") or (head != "lm" and has_place)
    none_left = bool(example.is_text_T[: example.source].all())
    if name is None:
        return choose_reference(lm, None) if reads_token or none_left else "remove"
    if name != "remove":
        if name not in kinds:
            raise UserError(
                f"replacement is {name!r}, but the tokenizer has no such token; choose one of {', '.join(kinds)}"
            )
        return name
    if reads_token:
        raise UserError(
            f"replacement is 'remove', but the target belongs to tokens, which would be removed too; choose one of "
            f"{', '.join(kinds)}"
        )
    if none_left:
        raise UserError(
            f"replacement is 'remove', but the text has no special tokens, so that nothing would be left of it; choose "
            f"one of {', '.join(kinds)}"
        )
    return name


class _Layout(NamedTuple):
    """The padded rows of an example: the place of each token among P places, and their arrays."""

    places_T: np.ndarray
    split: int | None  # number of places of the encoder of an encoder-decoder
    tokens_P: np.ndarray
    types_P: np.ndarray
    is_row_P: np.ndarray


def _row_length(tokens: int) -> int:
    return max(MIN_ROW, 1 << (tokens - 1).bit_length())


def _layout(lm: LM, example: Example) -> _Layout:
    """Returns an example in rows of few lengths, at most the positions of the model."""
    limit = lm.config.position_limit
    fit = lambda count: _row_length(count) if limit is None else max(count, min(_row_length(count), limit))
    count = len(example.tokens_T)
    if example.source is None:
        places_T, split, P = np.arange(count), None, fit(count)
    else:
        split = fit(example.source)
        places_T = np.arange(count) + np.where(np.arange(count) >= example.source, split - example.source, 0)
        P = split + fit(count - example.source)
    padded = np.zeros((3, P), np.int32)
    padding = lm.config.padding_token
    padded[0] = 0 if padding is None else padding
    padded[:, places_T] = example.tokens_T, example.types_T, np.ones(count, np.int32)
    return _Layout(places_T, split, padded[0], padded[1], padded[2] > 0)


def _rows(layout_arrays: tuple[Any, Any, Any], split: int | None, B: int) -> Rows:
    tokens_BP, types_BP, is_row_BP = (jnp.broadcast_to(x_P, (B, len(x_P))) for x_P in layout_arrays)
    segments_BP = is_row_BP.astype(jnp.int32)
    if split is None:
        return Rows(tokens_BP, segments_BP, types_BP)
    first, second = slice(None, split), slice(split, None)
    return Rows(
        tokens_BP[:, first], segments_BP[:, first], types_BP[:, first], tokens_BP[:, second], segments_BP[:, second]
    )


def _stub(config: Any, module: Any, eos: int | None, pad: int | None) -> LM:
    """Returns a model without parameters, so that compiled functions do not keep the real one."""
    return LM(config, module, None, origin=families.Origin({"eos_token_id": eos, "pad_token_id": pad}, heads=None))


def _key(lm: LM) -> tuple[Any, ...]:
    return lm.config, lm.module, lm._token("eos"), lm._token("pad")


def _reference_words(params: Any, token: Any, is_zero: bool) -> jax.Array:
    words_W = nodes.rows(params["embeddings"]["tokens"], token).astype(jnp.float32)
    return jnp.zeros_like(words_W) if is_zero else words_W


def _values_program(key: tuple[Any, ...], target: tuple[Any, Any], split: int | None, remove: bool, zero: bool) -> Any:
    """Returns the compiled function from kept tokens [B, P] to the scores [B] and probabilities [B] of a target."""
    lm, (score, probability) = _stub(*key), target

    @jax.jit
    def program(params: Any, arrays: Any, keep_BP: jax.Array, token: Any, index: Any) -> tuple[jax.Array, jax.Array]:
        rows = _rows(arrays, split, len(keep_BP))
        words_BPW, place_BP, kept_BP = words_of(params, rows), None, arrays[2] & keep_BP
        if remove:
            words_BPW, rows, place_BP = remove_tokens(words_BPW, rows, keep_BP)
        else:
            reference_W = _reference_words(params, token, zero)
            words_BPW = jnp.where(keep_BP[..., None], words_BPW, reference_W)
            kept_BP = jnp.broadcast_to(arrays[2], keep_BP.shape)
            place_BP = _own_places(keep_BP.shape[1], split, len(keep_BP))
        output = at_old_places(lm, outputs_of(lm, params, words_BPW, rows), place_BP, kept_BP)
        scores_B = score(output, *index)
        return scores_B, scores_B if probability is None else probability(output, *index)

    return program


def _own_places(P: int, split: int | None, B: int) -> jax.Array:
    places_P = jnp.arange(P)
    return jnp.broadcast_to(
        places_P if split is None else jnp.where(places_P < split, places_P, places_P - split), (B, P)
    )


def _batch_rows(lm: LM, P: int) -> int:
    """Returns the number of rows of a batch."""
    by_vocabulary = {"lm", "masked_lm"} & set(lm.config.heads_on_top[:1])
    rows = min(MAX_ROWS, max(1, MAX_TOKENS // P), MAX_LOGITS // (P * lm.config.V) if by_vocabulary else MAX_ROWS)
    return divisible_rows(lm, max(1, rows))


def values_of(prediction: Prediction, target: Target, keep_NT: np.ndarray, replacement: str) -> Values:
    """Returns the values of a target for variants of the text in which some tokens are hidden.

    Args:
      prediction: the prediction.
      target: one of its targets.
      keep_NT: False for hidden tokens, for each of N variants.
      replacement: what takes the place of a hidden token, as `choose_replacement` returns it.
    """
    lm, example = prediction.lm, prediction.example
    layout = _layout(lm, example)
    P, N = len(layout.tokens_P), len(keep_NT)
    token = reference_kinds(lm).get(replacement)
    functions = target.score, target.probability
    flags = replacement == "remove", replacement == "zero"
    program = lm.programs.get(_values_program, _key(lm), functions, layout.split, *flags)
    params, arrays = lm.params, (layout.tokens_P, layout.types_P, layout.is_row_P)
    B = min(_batch_rows(lm, P), divisible_rows(lm, 1 << (N - 1).bit_length()))
    results = []
    for first in range(0, N, B):
        keep_BP = np.ones((B, P), bool)
        some_NT = keep_NT[first : first + B]
        keep_BP[: len(some_NT), layout.places_T] = some_NT
        results.append(
            [np.asarray(x_B)[: len(some_NT)] for x_B in program(params, arrays, keep_BP, token or 0, target.indices)]
        )
    scores, probabilities = (np.concatenate(part).astype(np.float64) for part in zip(*results))
    return Values(scores, probabilities)


class PathPoint(NamedTuple):
    """Points between the reference (0) and the text (1), with the weight of the gradient at each."""

    positions_N: np.ndarray
    weights_N: np.ndarray


def _path_program(
    key: tuple[Any, ...], score: Callable, split: int | None, zero: bool, layer: int | None, whole: bool
) -> Any:
    """Returns the compiled function from points of a path [B] to scores by place [P] and values [B].

    The path begins at the reference, or at zero for all tokens if `whole`.
    """
    lm = _stub(*key)

    @jax.jit
    def program(
        params: Any, arrays: Any, replaced_P: jax.Array, token: Any, index: Any, positions_B: jax.Array, weights_B: Any
    ) -> tuple[jax.Array, jax.Array]:
        if layer is not None:
            params = _unstacked(lm, params)
        B = len(positions_B)
        rows, one = _rows(arrays, split, B), _rows(arrays, split, 1)
        words_1PW = words_of(params, one)
        reference_W = _reference_words(params, token, zero)
        start_1PW = jnp.zeros_like(words_1PW) if whole else jnp.where(replaced_P[:, None], reference_W, words_1PW)
        start, end = start_1PW, words_1PW
        if layer is not None:
            start, end = (_layer_states(lm, params, words, one, layer) for words in (start, end))

        def total(path: jax.Array) -> tuple[jax.Array, jax.Array]:
            if layer is None:
                output = outputs_of(lm, params, path, rows)
            else:
                words_BPW = jnp.broadcast_to(words_1PW, (B, *words_1PW.shape[1:]))
                with layer_outputs(layer, lambda _: path):
                    output = outputs_of(lm, params, words_BPW, rows)
            P = len(arrays[0])
            kept_BP = jnp.broadcast_to(arrays[2], (B, P))
            output = at_old_places(lm, output, _own_places(P, split, B), kept_BP)
            scores_B = score(output, *index)
            return scores_B.sum(), scores_B

        path = start + positions_B[:, None, None] * (end - start)
        gradient, values_B = jax.grad(total, has_aux=True)(path)
        scores = ((weights_B[:, None, None] * gradient).sum(0) * (end - start)[0]).sum(-1)
        return jnp.zeros(len(arrays[0])).at[: len(scores)].set(scores), values_B

    return program


def _unstacked(lm: LM, params: Any) -> Any:
    """Returns parameters with separate layers, so that the layers are not scanned."""
    stacks = [part["layers"] for part in params.values() if "layers" in part]
    return params if all(isinstance(stack, tuple) for stack in stacks) else unstack_layers(lm.config, params)


def _layer_states(lm: LM, params: Any, words_1PW: jax.Array, rows: Rows, layer: int) -> jax.Array:
    """Returns the hidden states after a layer of the first stack [1, T, D]."""
    found: list[jax.Array] = []

    def store(x_BTD: jax.Array) -> jax.Array:
        found.append(x_BTD)
        return x_BTD

    with layer_outputs(layer, store):
        outputs_of(lm, params, words_1PW, rows)
    return found[0]


def path_scores(
    prediction: Prediction,
    target: Target,
    points: PathPoint,
    reference: str,
    *,
    layer: int | None = None,
    whole: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weighted gradients along a path, multiplied by its length and summed over each token's vector.

    Args:
      prediction: the prediction.
      target: one of its targets.
      points: the points of the path.
      reference: what the path begins with, for all tokens of the text; special tokens are the same everywhere.
      layer: the path leads through the hidden states after this layer; None: through word embeddings.
      whole: whether the path begins with zero vectors for all tokens, special ones too.

    Returns:
      Scores [T] and the values of the target at the points [N].
    """
    lm, example = prediction.lm, prediction.example
    layout = _layout(lm, example)
    P = len(layout.tokens_P)
    replaced_P = np.zeros(P, bool)
    replaced_P[layout.places_T] = example.is_text_T
    if layer is not None and layout.split is not None:
        replaced_P[layout.split :] = False  # the layers are those of the encoder
    arguments = _key(lm), target.score, layout.split, reference == "zero", layer, whole
    program = lm.programs.get(_path_program, *arguments)
    params, token = lm.params, reference_kinds(lm).get(reference) or 0
    arrays = layout.tokens_P, layout.types_P, layout.is_row_P
    N = len(points.positions_N)
    B = min(_batch_rows(lm, P), divisible_rows(lm, 1 << (N - 1).bit_length()))
    scores_P, values = np.zeros(P), []
    for positions_B, weights_B, count in _batches_of(points, B):
        inputs = params, arrays, replaced_P, token, target.indices, positions_B, weights_B
        some_P, values_B = program(*inputs)
        scores_P += np.asarray(some_P, np.float64)
        values.append(np.asarray(values_B, np.float64)[:count])
    return scores_P[layout.places_T], np.concatenate(values)


def _batches_of(points: PathPoint, B: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields the points of a path in batches of B, the last one filled up with weights of 0."""
    for first in range(0, len(points.positions_N), B):
        padded = np.zeros((2, B), np.float32)
        count = len(points.positions_N[first : first + B])
        padded[:, :count] = points.positions_N[first : first + B], points.weights_N[first : first + B]
        yield padded[0], padded[1], count
