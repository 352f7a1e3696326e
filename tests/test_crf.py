"""The CRF over tags: equal to an enumeration of all sequences, packed or not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import DataConfig, MultiTask, OptimizerConfig, RunConfig, Tagging, TokenizerConfig, UserError
from jaxlm.families import PRESETS
from jaxlm.nn import crf
from jaxlm.tasks import TASKS
from jaxlm.tasks.multi_task import TaskMixture

N = 3
# Two examples in each row, with special tokens and tokens within words between the words (0), and padding at the end.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2]])
WORDS = np.array([[0, 1, 1, 0, 1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0, 0, 0]], bool)


def random_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, crf.Words, crf.Transitions]:
    random = np.random.default_rng(seed)
    logits_BTN, tags_BT = random.standard_normal((*WORDS.shape, N), np.float32), random.integers(0, N, WORDS.shape)
    draw = lambda shape: jnp.asarray(random.standard_normal(shape, np.float32))
    transitions = crf.Transitions(*map(draw, ((N,), (N,), (N, N))))
    return logits_BTN, tags_BT, crf.find_words(jnp.asarray(WORDS), jnp.asarray(SEGMENTS)), transitions


def score(tags: Any, logits: np.ndarray, transitions: crf.Transitions) -> float:
    start, end, pairs = transitions
    inside = sum(logits[t, tag] for t, tag in enumerate(tags)) + sum(pairs[a, b] for a, b in itertools.pairwise(tags))
    return float(start[tags[0]] + inside + end[tags[-1]])


def examples() -> list[tuple[int, np.ndarray]]:
    """Returns the row and the positions of the words of each example."""
    found = [(b, np.flatnonzero(WORDS[b] & (SEGMENTS[b] == n))) for b in range(2) for n in (1, 2)]
    return [(b, at) for b, at in found if len(at)]


@pytest.mark.parametrize("seed", [0, 1])
def test_sums_and_best_tags_equal_an_enumeration(seed):
    logits, tags, words, transitions = random_inputs(seed)
    partition, paths, best, p = jax.jit(
        lambda x: (
            crf.log_partition(x, words, transitions),
            crf.path_scores(x, tags, words, transitions),
            crf.viterbi(x, words, transitions),
            crf.marginals(x, words, transitions),
        )
    )(logits)
    partition_of, path_of = np.zeros(2), np.zeros(2)
    for b, at in examples():
        every = list(itertools.product(range(N), repeat=len(at)))
        scores = np.array([score(one, logits[b, at], transitions) for one in every])
        path_of[b] += score(tags[b, at], logits[b, at], transitions)
        partition_of[b] += np.log(np.exp(scores).sum())
        np.testing.assert_array_equal(best[b, at], every[scores.argmax()])
        shares = np.exp(scores) / np.exp(scores).sum()
        for t, position in enumerate(at):
            expected = [sum(p for p, one in zip(shares, every) if one[t] == tag) for tag in range(N)]
            np.testing.assert_allclose(p[b, position], expected, atol=1e-5)
    np.testing.assert_allclose(partition, partition_of, rtol=1e-5)
    np.testing.assert_allclose(paths, path_of, rtol=1e-4, atol=1e-5)
    assert not np.asarray(p)[~WORDS].any()  # positions without a word take no part


def test_scores_of_tags_far_from_zero_are_finite():
    logits, _, words, transitions = random_inputs()
    value, gradient = jax.value_and_grad(lambda x: crf.log_partition(x, words, transitions).sum())(1e4 * logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


# Runs


def sentences(path, tags: str, count: int = 24) -> str:
    """Writes sentences in which the tag of "x" is that of the word before: only the sequence shows it."""
    random = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        a, b = tags.split()
        tag = random.choice([a, b])
        lines.append(f"{'red' if tag == a else 'blue'}\t{tag}\nx\t{tag.replace('B-', 'I-')}\nend\tO\n")
    path.write_text("\n".join(lines))
    return str(path)


def run_config(tmp_path, **fields: Any) -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["lstm-tagger"], vocabulary=96, width=16, dropout=0.0),
        task=Tagging(crf=True),
        tokenizer=TokenizerConfig(train="characters"),
        data=DataConfig(path=sentences(tmp_path / "train.conll", "B-A B-B"), format="conll", length=32, **fields),
        optimizer=OptimizerConfig(rate=0.05),
        examples=4,
        epochs=12,
        workdir=str(tmp_path / "run"),
    )


@pytest.mark.long
def test_a_tagger_learns_saves_and_predicts_with_its_transitions(tmp_path):
    lm = jaxlm.fit(run_config(tmp_path, eval_path=sentences(tmp_path / "eval.conll", "B-A B-B", 6)))
    assert lm.config.crf and lm.params["crf_head"]["pairs"].shape == (5, 5)
    loaded = jaxlm.load(tmp_path / "run" / "export")
    np.testing.assert_array_equal(loaded.params["crf_head"]["pairs"], lm.params["crf_head"]["pairs"])
    [prediction] = jaxlm.predict(loaded, [{"tokens": ["red", "x", "end"]}])
    assert prediction["prediction"] == ["B-A", "I-A", "O"] and 0.5 < prediction["confidence"] <= 1


def test_a_tag_that_was_never_seen_in_training_is_refused(tmp_path):
    run = run_config(tmp_path, eval_path=sentences(tmp_path / "eval.conll", "B-A B-C", 6))
    with pytest.raises(UserError, match="the label 'B-C' is not among the learned ones"):
        jaxlm.fit(run)


def test_several_tasks_have_no_crf():
    part = TASKS[Tagging](Tagging(crf=True), 32, 0, None, ("O", "B"))
    mixture = TaskMixture(MultiTask(parts={}), {"names": part})
    with pytest.raises(UserError, match="the part names has a CRF, which is not supported with several tasks"):
        mixture.bind(PRESETS["lstm-tagger"])
