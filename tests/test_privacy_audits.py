"""Audits of the privacy of training data: exposure of canaries, membership inference, extraction, audited epsilon."""

from __future__ import annotations

import types

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from jaxlm import UserError
from jaxlm.trust import (
    attack,
    audited_epsilon,
    continuations,
    exposure,
    membership,
    membership_chapter,
    memorisation,
    memorisation_chapter,
    random_canaries,
    reference_scores,
)
from jaxlm.trust.memorisation import exposure_bits

RANDOM = np.random.default_rng(0)


def test_the_exposure_of_a_random_string_is_about_log2_of_e():
    scores = RANDOM.normal(size=3000)
    by_rank, extrapolated = exposure_bits(scores[:1000], scores[1000:])
    assert by_rank.mean() == pytest.approx(1.4427, abs=0.1)
    assert extrapolated.mean() == pytest.approx(1.4427, abs=0.1)


def test_the_exposure_of_the_most_likely_string():
    other = RANDOM.normal(size=1023)
    by_rank, extrapolated = exposure_bits(np.array([6.0, other.max()]), other)
    assert by_rank[0] == 10 and extrapolated[0] > 20 and by_rank[1] == 10


class Digits:
    """A tokenizer with one token per character, which represents the letters and the digits below 9."""

    unk = 0

    def encode(self, text):
        return [0 if character == "9" else ord(character) for character in text]


def test_the_exposure_of_canaries_of_a_model(monkeypatch):
    """The log-probability is that of a model that prefers one secret."""
    secret = "12345678"
    score = lambda pair: -1.0 if pair[1] == secret else -18.0 - int(pair[1]) / 1e8
    likelihoods = lambda lm, pairs: [types.SimpleNamespace(log_probability=score(pair)) for pair in pairs]
    monkeypatch.setattr(memorisation, "log_likelihoods", likelihoods)
    lm = types.SimpleNamespace(tokenizer=Digits())
    found = exposure(lm, "the code is ", [secret, "11111111"], candidates=255)
    assert found.by_rank[0] == 8 and found.candidates == 255 and found.extrapolated[0] > 10
    assert "Exposure" in memorisation_chapter({"once": found}).title
    with pytest.raises(UserError, match="encodes as unknown"):
        exposure(lm, "the code is ", ["99999999"])
    for canaries in ([], ["12", "123"], ["word"]):
        with pytest.raises(UserError, match="strings of digits"):
            exposure(lm, "the code is ", canaries)


def test_canaries_differ():
    assert len(set(random_canaries(100, 2))) == 100 and random_canaries(3, seed=1) != random_canaries(3, seed=2)
    with pytest.raises(UserError, match="raise digits"):
        random_canaries(11, 1)


def test_an_attack_has_the_area_of_scikit_learn_and_intervals_around_its_rates():
    members, others = RANDOM.normal(0.5, 1, 300).round(1), RANDOM.normal(0, 1, 500).round(1)
    found = attack(members, others)
    labels = [1] * 300 + [0] * 500
    assert found.auc == pytest.approx(roc_auc_score(labels, np.concatenate([members, others])))
    assert found.auc_interval[0] < found.auc < found.auc_interval[1]
    for rate, share, (low, high) in zip(found.rates, found.found, found.intervals):
        assert low <= share <= high
        threshold = np.sort(others)[::-1][int(rate * 500)]
        assert (others > threshold).mean() <= rate and (members > threshold).mean() == share
    assert attack([2, 3], [0, 1]).auc == 1 and attack([2, 3], [0, 1]).found == (1, 1, 1)
    assert "0.5" in attack_row(found)


def attack_row(found):
    return str(membership_chapter({"loss": found}, {"loss": 0.5}).sections)


@pytest.mark.parametrize(("members", "others"), [([], [1]), ([1], []), ([np.nan], [1])])
def test_scores_that_are_missing_or_not_finite(members, others):
    with pytest.raises(UserError, match="must be finite"):
        attack(members, others)


def test_reference_models_remove_what_makes_an_example_easy():
    easy = RANDOM.normal(0, 5, 400)
    is_member = np.arange(400) < 200
    losses = easy - 1.0 * is_member
    references = easy + RANDOM.normal(0, 0.5, (4, 400))
    plain = attack(-losses[is_member], -losses[~is_member])
    scores = reference_scores(losses, references)
    compared = attack(scores[is_member], scores[~is_member])
    assert plain.auc < 0.65 and compared.auc > 0.95
    with pytest.raises(UserError, match="for each reference model"):
        reference_scores(losses, references[:, 1:])


def test_the_audited_epsilon_of_randomised_response_is_below_the_true_one():
    pytest.importorskip("jax_privacy")
    for epsilon in (1.0, 3.0):
        keep = RANDOM.random(2000) < np.exp(epsilon) / (1 + np.exp(epsilon))
        scores = np.where(keep, 1.0, 0.0)  # of members; other canaries have the opposite response
        found = audited_epsilon(scores[:1000], 1 - scores[1000:], 1e-6)
        assert 0.6 * epsilon < found <= epsilon + 0.05
    assert audited_epsilon(RANDOM.random(100), RANDOM.random(100), 1e-6) < 0.5
    assert membership.RATES[0] == 0.001


def test_continuations_that_greedy_decoding_reproduces(monkeypatch):
    likelihoods = lambda lm, pairs: [types.SimpleNamespace(is_greedy=pair[1] == [98, 99]) for pair in pairs]
    monkeypatch.setattr(memorisation, "log_likelihoods", likelihoods)
    lm = types.SimpleNamespace(tokenizer=Digits())
    reproduced, used = continuations(lm, ["abcd", "a", "abbb"], prompt=1, tokens=2)
    assert reproduced.tolist() == [True, False] and used.tolist() == [0, 2]
    with pytest.raises(UserError, match="longest text has 4 tokens"):
        continuations(lm, ["abcd"], prompt=4, tokens=4)
