"""Filters of texts, personal data, and generation with filters."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm.__main__ import main
from jaxlm.config import CleaningConfig, SafetyConfig, TokenizerConfig
from jaxlm.data import personal_data
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer
from jaxlm.trust import filters, word_lists
from jaxlm.trust.filters import ClassifierFilter, CopyFilter, PatternFilter, Verdict, WordFilter
from jaxlm.trust.safe_generation import SafeGenerator

PERSONAL = {
    "email": ("anna.b+x@example.co.uk", "jörg@münchen.de"),
    "card": ("4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009"),
    "iban": ("DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"),
    "ip": ("192.168.0.1", "2001:db8::ff00:42:8329", "::1"),
    "identity": ("123-45-6789", "AB 12 34 56 C", "12345678Z", "X1234567L", "1 85 05 78 006 084 91"),
    "phone": ("+49 30 1234567", "(415) 555-2671", "415-555-2671", "030 1234567", "01 42 68 53 00", "+1 (212) 555-0123"),
}
OTHERS = (
    "version 1.2.3.4", "v1.2.3.4", "2024-01-15", "12:30:45", "ISBN 978-3-16-148410-0", "arXiv 2301.12345",
    "$1,234,567.89", "3.14159265358979", "std::vector", "1234567890123456", "user@localhost", "10.1000/182", "1/2/2024",
    "call 911", "0.0.0.0", "a@b", "1.2.3.4.5", "2023/10/11 12:00", "08:00-16:30", "000-12-3456", "order 12345678",
    "4111 1111 1111 1112", "DE88 3704 0044 0532 0130 00", "12345678A", "300.1.2.3",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_personal_data_are_found_with_their_characters(kind, text):
    before = "Write to me: "
    [found] = personal_data.find(f"{before}{text}, please.")
    assert found == (kind, len(before), len(before) + len(text))
    assert personal_data.mask(f"{before}{text}, please.") == f"{before}[{kind.upper()}], please."


@pytest.mark.parametrize("text", OTHERS)
def test_other_numbers_are_no_personal_data(text):
    assert not personal_data.find(f"See {text} here.")


def test_several_findings_are_masked_in_order():
    text = "anna@example.org or +49 30 1234567 or 192.168.0.1"
    assert personal_data.mask(text) == "[EMAIL] or [PHONE] or [IP]"
    assert personal_data.mask(text, ["ip"]) == "anna@example.org or +49 30 1234567 or [IP]"
    with pytest.raises(UserError, match=r"'mail' is no kind of personal data; .*email"):
        personal_data.mask(text, ["mail"])


@pytest.mark.parametrize("text", ["1 ", "a.", "+1 ", "::", "a@", "00"])
def test_the_search_takes_time_in_proportion_to_the_text(text):
    began = time.process_time()
    personal_data.find(text * 20_000)
    assert time.process_time() - began < 5


def test_cleaning_masks_or_drops_personal_data():
    from collections import Counter

    from jaxlm.data.clean import clean

    report: Counter = Counter()
    apply = lambda how: clean("mail anna@example.org", CleaningConfig(personal_data=how), set(), report)
    assert (apply("keep"), apply("mask"), apply("drop")) == ("mail anna@example.org", "mail [EMAIL]", None)
    assert report == {"changed: personal_data": 1, "dropped: personal_data": 1}


# Lists


@pytest.mark.parametrize(
    "text", ["A BADWORD!", "bad\u200bword", "ｂａｄｗｏｒｄ", "bádword", "b4dw0rd", "so badword so"]
)
def test_a_listed_word_is_found_in_other_spellings(text):
    [verdict] = WordFilter(("badword",))([text])
    assert verdict == Verdict(False, "words", "a listed word", 1.0)


def test_words_are_found_as_a_whole():
    verdicts = WordFilter(("ass", "two  words"))(["a class", "two\nwords", "an ass", "two other words"])
    assert [verdict.allowed for verdict in verdicts] == [True, False, False, True]


def test_patterns_are_matched_in_linear_time(tmp_path):
    (tmp_path / "patterns.txt").write_text("# a comment\n\n(a+)+$\nno\\d+\n")
    [patterns] = filters.filters_of(SafetyConfig(patterns=str(tmp_path / "patterns.txt")))
    assert isinstance(patterns, PatternFilter)
    began = time.process_time()
    verdicts = patterns(["a" * 100_000 + "!", "NO77", "fine"])
    assert time.process_time() - began < 5
    assert [verdict.allowed for verdict in verdicts] == [True, False, True]
    assert verdicts[1].reason == "the pattern in line 4"


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("patterns", "ok\n(a", r"patterns.txt:2: '\(a' is not a valid regular expression: missing \)"),
        ("patterns", "# nothing\n", "contains no regular expression; write one per line"),
        ("words", "", "contains no word or phrase"),
        ("words", "\u200b", "has no visible characters; remove it"),
        ("words", b"\xff\xfe\xff", "cannot be read: it is not UTF-8"),
        ("words", None, "cannot be read: No such file"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, field, content, message):
    path = tmp_path / f"{field}.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        for check in filters.filters_of(SafetyConfig(**{field: str(path)})):
            check(["a text"])


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlm\[safety\]'"):
        word_lists.compile_patterns([(1, "a")], "file")


def test_copies_of_the_system_prompt_are_found():
    secret = "You are Max, the assistant of a bakery. Never give a discount of more than ten per cent."
    check = CopyFilter(secret)
    verdicts = check(
        [
            "I am an assistant of a bakery.",
            "My instructions: never give a DISCOUNT, of more than ten percent!",
            "The bakery opens at nine.",
            "",
        ]
    )
    assert [verdict.allowed for verdict in verdicts] == [True, False, True, True]
    assert [v.allowed for v in CopyFilter("top secret")(["it is Top Secret.", "the top is secret"])] == [False, True]


# Classifiers and generation

WORDS = ("kind", "mean", "a", "dog", "cat", "is", "very")


def tokenizer_of(kind: str):
    return tokenizers.train([" ".join(WORDS)] * 3, TokenizerConfig(train=kind), 270 if "byte" in kind else 45)


@pytest.fixture(scope="module")
def classifier() -> LM:
    tokenizer = tokenizer_of("wordpiece")
    small = {"vocabulary": tokenizer.size, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_length": 16}
    config = dataclasses.replace(
        PRESETS["bert-base"], **small, heads_on_top=("classes",), labels=("good", "bad", "worse")
    )
    return LM(config, Transformer(config), random_params(config, 0.5), tokenizer)


@pytest.fixture(scope="module")
def decoder() -> LM:
    tokenizer = tokenizer_of("byte_bpe")
    small = {"vocabulary": tokenizer.size, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_length": 48}
    config = dataclasses.replace(PRESETS["gpt2"], **small)
    return LM(config, Transformer(config), random_params(config), tokenizer)


def test_a_classifier_rejects_texts_above_the_threshold(classifier):
    texts = ["a kind dog", "mean cat", "very mean", ""]
    rows = jaxlm.predict(classifier, texts, probabilities=True)
    harms = [row["probabilities"]["bad"] + row["probabilities"]["worse"] for row in rows]
    threshold = float(np.median(harms))
    verdicts = ClassifierFilter(classifier, ("bad", "worse"), threshold)(texts)
    np.testing.assert_allclose([verdict.score for verdict in verdicts], harms, rtol=1e-5)
    assert [verdict.allowed for verdict in verdicts] == [harm <= threshold for harm in harms]
    assert {v.reason for v in verdicts if not v.allowed} == {f"bad or worse above {threshold:g}"}


def test_the_most_harmful_window_of_a_long_text_counts(classifier):
    check = ClassifierFilter(classifier, ("bad",), 0.5)
    long = "kind dog " * 40 + "very mean " * 40
    [verdict] = check([long])
    windows = check._windows(long)
    assert len(windows) > 10 and sum(window.count("mean") for window in windows) >= 40
    np.testing.assert_allclose(verdict.score, max(one.score for one in check(windows)), rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "threshold", "message"),
    [
        (("evil",), 0.5, "the filter has no label 'evil'.*; its labels are good, bad, worse"),
        ((), 0.5, "give at least one label"),
        (("bad",), 1.5, "a threshold from 0 to 1"),
    ],
)
def test_a_filter_with_other_labels_is_refused(classifier, labels, threshold, message):
    with pytest.raises(UserError, match=message):
        ClassifierFilter(classifier, labels, threshold)


def test_a_filter_that_is_no_classifier_is_refused(decoder):
    with pytest.raises(UserError, match="the filter is a model with the heads lm; give a classifier"):
        ClassifierFilter(decoder, ("bad",))


def by_length(texts):
    """A filter of a user: the score is the fraction of the letter e."""
    scores = [text.count("e") / max(1, len(text)) for text in texts]
    return [Verdict(score < 0.2, "letters", "" if score < 0.2 else "many e", score) for score in scores]


def test_the_least_harmful_allowed_candidate_is_returned(decoder, tmp_path):
    safety = SafetyConfig(personal_data="mask", candidates=6, log=str(tmp_path / "log.jsonl"))
    generator = SafeGenerator(decoder, safety, [by_length])
    choices = {"max_new_tokens": 12, "seed": 3}
    answers = generator.answer(["a dog", "the cat"], **choices)
    samples = jaxlm.generate(decoder, ["a dog", "the cat"], n_best=6, **choices)
    for answer, texts in zip(answers, samples):
        assert [candidate.text for candidate in answer.candidates] == [personal_data.mask(text) for text in texts]
        scores = {candidate.text: candidate.score for candidate in answer.candidates if candidate.allowed}
        assert answer.text == min(scores, key=lambda text: scores[text]) and not answer.refused
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_refusals_are_logged_with_their_reasons_and_without_texts(decoder, tmp_path):
    reject = lambda texts: [Verdict(False, "all", "everything", 1.0) for _ in texts]
    log = tmp_path / "log.jsonl"
    safety = SafetyConfig(personal_data="refuse", refusal="No.", log=str(log))
    for _ in range(2):
        [answer] = SafeGenerator(decoder, safety, [by_length, reject]).answer(["my secret"], max_new_tokens=4)
        assert answer.text == "No." and answer.refused and answer.reasons == ["all: everything"]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["reasons"] == ["all: everything"] and "secret" not in log.read_text()


def test_prompts_are_refused_on_request(decoder):
    safety = SafetyConfig(personal_data="refuse", check_prompt=True)
    refused, answered = SafeGenerator(decoder, safety).answer(["mail anna@example.org", "a dog"], max_new_tokens=2)
    assert refused.refused and refused.reasons == ["personal_data: personal data: email"] and not refused.candidates
    assert len(answered.candidates) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classifier": "x"}, "give both, or neither"),
        ({"labels": ("bad",)}, "give both, or neither"),
        ({"candidates": 3}, "have no effect without a filter"),
        ({"candidates": 0, "words": "x"}, "safety.candidates is 0"),
        ({"threshold": 2.0}, "safety.threshold is 2.0"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SafetyConfig(**fields).check()


def test_a_log_that_cannot_be_written_is_an_error_before_generation(decoder, tmp_path):
    safety = SafetyConfig(personal_data="refuse", log=str(tmp_path / "no" / "log.jsonl"))
    with pytest.raises(UserError, match="cannot be written: No such file"):
        SafeGenerator(decoder, safety)


def test_several_answers_or_greedy_candidates_are_refused(decoder):
    generator = SafeGenerator(decoder, SafetyConfig(personal_data="mask", candidates=2))
    with pytest.raises(UserError, match=r"filters return one answer: set safety.candidates"):
        generator.answer(["a"], n_best=3)
    with pytest.raises(UserError, match="greedy search has only one result"):
        generator.answer(["a"], temperature=0.0)


def test_the_command_generates_with_filters(decoder, classifier, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxlm.verbs.machine.configure_process", lambda: None)
    jaxlm.save(decoder, tmp_path / "decoder")
    jaxlm.save(classifier, tmp_path / "filter")
    (tmp_path / "words.txt").write_text("\n".join("abcdefghijklmnopqrstuvwxyz0123456789"))
    more = ["--max-new-tokens", "4", "--safety.classifier", str(tmp_path / "filter"), "--safety.labels", "bad"]
    command = ["generate", str(tmp_path / "decoder"), "--prompt", "a dog", *more]
    assert main([*command, "--safety.threshold", "0", "--safety.refusal", "Refused."]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Refused.\n" and "rejected  classifier: bad above 0" in captured.err
    assert main([*command, "--safety.threshold", "1"]) == 0
    assert capsys.readouterr().out.startswith("a dog")
    assert main([*command[:-1], "evil"]) == 2
    assert "its labels are good, bad, worse" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    command = [*command[:2], "--file", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.jsonl"), *more]
    assert main([*command, "--safety.threshold", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a dog", "a cat"] and all(row["refused"] for row in rows)
    assert main([*command, "--safety.threshold", "1"]) == 2
    assert "was written with other settings" in capsys.readouterr().err
