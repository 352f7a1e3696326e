"""Training examples behind a prediction: the nearest ones, and those with influence on the last layer of a classifier.

The gradient of the cross-entropy of an example with respect to the last linear layer is the outer product of its
error e = p - y [N] and its input h [D]. With 1 appended to h for the bias, the gradients of two examples have the
product (h . h' + 1) (e . e'). The influence of training example i on the loss of an example is

    (gradient of the example)^T (H + damping I)^-1 (gradient of i) / n

where H is the mean Hessian of the n training examples: to first order, the increase of the loss if i is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.config.arguments import check_list, check_model
from jaxlm.config.ranges import Positive, check_argument
from jaxlm.errors import UserError, suggestion
from jaxlm.explain.examples import Example, head_of, read_example
from jaxlm.explain.outputs import Rows
from jaxlm.explain.patching import run_stacks
from jaxlm.inference.encode import encode
from jaxlm.inference.packing import row_length
from jaxlm.lm import LM
from jaxlm.nn.heads import ClassesHead
from jaxlm.nn.layers import Linear
from jaxlm.nn.transformer import Transformer

MAX_HESSIAN = 8192  # rows of the Hessian, classes times features
BATCH_ROWS = 32
SIMILARITIES = ("embedding", "influence", "gradient")
Similarity = Literal["embedding", "influence", "gradient"]


class Neighbours(NamedTuple):
    """Training examples in the order of their scores.

    Attributes:
      label: the class whose loss is explained; None for embeddings.
      scores: of all training examples [N]: cosine similarities, or influences; positive examples are helpful, because
        the loss is larger without them.
      nearest: the numbers of the examples with the largest scores, descending.
      farthest: the numbers of those with the smallest scores, ascending; for influences the harmful ones.
    """

    label: str | None
    scores: np.ndarray
    nearest: np.ndarray
    farthest: np.ndarray


def nearest_examples(lm: LM, text: str, training: Sequence[str], count: int = 5) -> Neighbours:
    """Returns the training texts whose embeddings are the most similar to that of a text.

    Args:
      lm: the model; `jaxlm.encode` defines the embeddings.
      text: the text.
      training: the texts of the training examples.
      count: number of texts to return.

    Raises:
      UserError: for empty training data, and as `jaxlm.encode` does.
    """
    check_model("lm", lm)
    count, texts = check_argument("count", count, Positive), _checked(training)
    if not isinstance(text, str):
        raise UserError(f"text is a {type(text).__name__}; give a string")
    x_ND = encode(lm, [text, *texts])
    x_ND /= np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
    return _neighbours(None, x_ND[1:] @ x_ND[0], count)


def influential_examples(
    lm: LM,
    text: Any,
    training: Sequence[tuple[Any, str]],
    label: str | None = None,
    *,
    count: int = 5,
    damping: float | None = 0.01,
) -> Neighbours:
    """Returns the training examples with the largest influence on the loss of a prediction, through the last layer.

    Args:
      lm: a classifier with the head classes.
      text: what `jaxlm.predict` accepts as an example.
      training: pairs of such an example and its label.
      label: the class whose loss is explained; None: what the model predicts.
      count: number of examples to return, both helpful and harmful.
      damping: what is added to the diagonal of the Hessian, such as the weight decay of the last layer; None: the
        identity takes the place of the Hessian, so that influences are products of gradients.

    Raises:
      UserError: for a model without the head, unknown labels, empty training data, and a Hessian of more than 8,192
        rows.

    Source: Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions, section 2; for products of
    gradients, Pruthi et al. 2020, TracIn.
    """
    check_model("lm", lm)
    count = check_argument("count", count, Positive)
    pairs, labels = _checked(training), lm.config.labels
    if head_of(lm) != "classes" or len(labels) < 2:
        head = head_of(lm) or "none"
        raise UserError(f"the model has the head {head} with {len(labels)} outputs; influence requires several classes")
    if lm.config.structure == "encoder_decoder":
        raise UserError("the model is an encoder-decoder; influence requires an encoder or a decoder")
    for n, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError(f"example {n} of training is a {type(pair).__name__}; give (text, label)")
    for name in [own for _, own in pairs] + [label] * (label is not None):
        if name not in labels:
            raise UserError(f"the label {name!r} is not one of the model{suggestion(str(name), labels)}")
    features = lm.config.width + 1
    if damping is not None and not damping > 0:
        raise UserError(f"damping is {damping}; give a number above 0, or None for products of gradients")
    if damping is not None and len(labels) * features > MAX_HESSIAN:
        raise UserError(
            f"the Hessian of {len(labels)} classes and {features} features has {len(labels) * features} rows, more "
            f"than {MAX_HESSIAN}; set damping to None"
        )
    examples = [read_example(lm, one) for one in [text, *(own for own, _ in pairs)]]
    h_ND, p_NC = last_layer_inputs(lm, examples)
    index = int(p_NC[0].argmax()) if label is None else labels.index(label)
    y_N = np.array([labels.index(own) for _, own in pairs])
    scores = last_layer_influence(h_ND[1:], p_NC[1:], y_N, (h_ND[0], p_NC[0], index), damping)
    return _neighbours(labels[index], scores, count)


def _checked(training: Any) -> list[Any]:
    examples = list(check_list("training", training, "examples"))
    if not examples:
        raise UserError("training has no examples; give at least one")
    return examples


def _neighbours(label: str | None, scores_N: np.ndarray, count: int) -> Neighbours:
    order = np.argsort(-scores_N, kind="stable")
    return Neighbours(label, scores_N, order[:count], order[::-1][:count])


def last_layer_influence(
    h_ND: np.ndarray,
    p_NC: np.ndarray,
    y_N: np.ndarray,
    example: tuple[np.ndarray, np.ndarray, int],
    damping: float | None,
) -> np.ndarray:
    """Returns the influence [N] of each training example on the loss of an example; see the formula of the module.

    Args:
      h_ND: the inputs of the last layer.
      p_NC: the predicted probabilities.
      y_N: the labels.
      example: the input [D], the probabilities [C] and the label of the example whose loss is explained.
      damping: see `influential_examples`.
    """
    C, (h_D, p_C, y) = p_NC.shape[1], example
    with_bias = lambda h: np.concatenate([h, np.ones((*h.shape[:-1], 1))], -1).astype(np.float64)
    h_ND, h_D = with_bias(h_ND), with_bias(h_D)
    error_NC, error_C = p_NC - np.eye(C)[y_N], p_C - np.eye(C)[y]
    if damping is None:
        return (h_ND @ h_D) * (error_NC @ error_C) / len(h_ND)
    direction_CD = hessian_product(h_ND, p_NC, np.outer(error_C, h_D), damping)
    return np.einsum("NC,CD,ND->N", error_NC, direction_CD, h_ND) / len(h_ND)


def hessian_product(h_ND: np.ndarray, p_NC: np.ndarray, gradient_CD: np.ndarray, damping: float) -> np.ndarray:
    """Returns the inverse of the damped Hessian times a gradient [C, D].

    The Hessian of the mean cross-entropy is the mean of (diag(p) - p p^T) x (h h^T).
    """
    (N, D), C = h_ND.shape, p_NC.shape[1]
    hessian = np.zeros((C, D, C, D))
    for a in range(C):
        for b in range(a, C):
            weight_N = p_NC[:, a] * ((a == b) - p_NC[:, b])
            hessian[a, :, b] = hessian[b, :, a] = (h_ND * weight_N[:, None]).T @ h_ND / N
    matrix = hessian.reshape(C * D, C * D)
    matrix[np.diag_indices(C * D)] += damping
    return np.linalg.solve(matrix, gradient_CD.ravel()).reshape(C, D)


def last_layer_inputs(lm: LM, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs of the last layer of a classifier [N, D], and the probabilities of the classes [N, C].

    Args:
      lm: the model, with the head classes.
      examples: the examples as the model reads them.
    """
    program = lm.programs.get(_features, lm.config, lm.module)
    order = np.argsort([len(example.tokens_T) for example in examples], kind="stable")
    found: list[Any] = [None] * len(examples)
    for start in range(0, len(order), BATCH_ROWS):
        batch = order[start : start + BATCH_ROWS]
        T = row_length(max(len(examples[n].tokens_T) for n in batch))
        filled = np.zeros((3, BATCH_ROWS, T), np.int32)
        for row, n in enumerate(batch):
            size = len(examples[n].tokens_T)
            filled[:, row, :size] = examples[n].tokens_T, np.ones(size), examples[n].types_T
        h_BD, p_BC = map(np.asarray, program(lm.params, Rows(*filled)))
        for row, n in enumerate(batch):
            found[n] = h_BD[row], p_BC[row]
    h, p = zip(*found)
    return np.stack(h), np.stack(p)


def _features(config: ModelConfig, module: Transformer) -> Any:
    lm = LM(config, module, None)

    @jax.jit
    def read(params: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
        inputs: list[jax.Array] = []

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            own = context.module
            if isinstance(own, Linear) and own.name == "out" and isinstance(own.parent, ClassesHead):
                inputs.append(args[0])
            return call(*args, **kwargs)

        x_BTD = run_stacks(module, params, rows)
        with nn.intercept_methods(intercept):
            logits_BC = lm.head_logits(params, x_BTD, rows.segments_BT)
        assert logits_BC is not None
        return inputs[0].astype(jnp.float32), jax.nn.softmax(logits_BC.astype(jnp.float32))

    return read
