"""Audits of bias: properties of each measure, values calculated independently, and the errors of wrong input."""

from __future__ import annotations

import dataclasses
import json
import math
from difflib import SequenceMatcher
from functools import lru_cache

import jax
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm.__main__ import main
from jaxlm.config import Classification, ModelConfig, MultipleChoice, TokenizerConfig
from jaxlm.data.formats.lines import Place
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.lm import LM, with_task
from jaxlm.nn.transformer import Transformer
from jaxlm.reports.pictures import Bars, draw
from jaxlm.trust import audits, bbq, group_gaps
from jaxlm.trust.association_tests import AssociationTest, associate, audit_associations, read_test, run_test
from jaxlm.trust.audit import bootstrap, wilson
from jaxlm.trust.bias_pairs import PairScores, audit_pairs, preferences, score_pairs, shared_positions
from jaxlm.trust.counterfactuals import PRONOUNS, audit_counterfactuals, compare, counterparts, swap
from jaxlm.vectors.word_vectors import WordVectors

WORDS = ["the", "old", "young", "farmer", "baker", "is", "was", "kind", "tall", "here", "there", "and", "sings", "well"]
WORDS += ["he", "she", ".", ","]
PAIRS = [
    ("the old farmer is kind", "the young farmer is kind"),
    ("the baker sings well", "the tall baker sings well"),
    ("here the old baker was kind", "here the farmer was kind"),
]
TINY = {"width": 16, "layers": 2, "heads": 2, "max_length": 32}


@lru_cache
def tokenizer():
    return tokenizers.train([" ".join(WORDS)] * 4, TokenizerConfig(train="wordpiece"), vocabulary=78)


@lru_cache
def lm_of(kind: str) -> LM:
    encoder = {"structure": "encoder", "types": 2, "norm_place": "post"}
    fields = {
        "masked": {**encoder, "heads_on_top": ("masked_lm",)},
        "causal": {},
        "classifier": {**encoder, "heads_on_top": ("classes",), "labels": ("no", "yes")},
    }[kind]
    config = ModelConfig(**TINY, **fields, vocabulary=tokenizer().size)
    return LM(config, Transformer(config), random_params(config, std=0.4), tokenizer())


def write_pairs(path, pairs, head="sent_more,sent_less,bias_type"):
    path.write_text("\n".join([head, *(f"{more},{less},age" for more, less in pairs)]) + "\n")
    return str(path)


# Intervals


def test_wilson_has_the_published_values():
    np.testing.assert_allclose(wilson(81, 263), (0.3080, 0.2553, 0.3662), atol=5e-5)  # Newcombe 1998, table I
    np.testing.assert_allclose(wilson(0, 20), (0, 0, 0.1611), atol=5e-5)
    assert math.isnan(wilson(0, 0).value)


def test_a_bootstrap_has_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal(400)
    [estimate] = bootstrap(lambda rows: np.array([values[rows].mean()]), 400, seed=1)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


# Pairs of sentences


def test_shared_positions_are_the_same_tokens_in_the_same_order():
    random = np.random.default_rng(0)
    for _ in range(50):
        first, second = (random.integers(0, 5, random.integers(1, 12)).tolist() for _ in range(2))
        i, j = shared_positions(first, second)
        assert [first[n] for n in i] == [second[n] for n in j]
        assert i == sorted(set(i)) and j == sorted(set(j))


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_scores_equal_one_pass_for_each_token(kind):
    lm = lm_of(kind)
    scores = score_pairs(lm, PAIRS)
    for n, pair in enumerate(PAIRS):
        ids = (
            [lm.tokens(text)[0].tolist() for text in pair]
            if kind == "masked"
            else [lm.tokenizer.with_prefix(lm.tokenizer.encode(text)) for text in pair]
        )
        frame = 1 if kind == "masked" else 0
        shared = shared_positions(*(one[frame : len(one) - frame] for one in ids))
        totals = [0.0, 0.0]
        for i, j in zip(*shared):
            if kind == "causal" and not (i and j):
                continue
            for side, position in enumerate((i + frame, j + frame)):
                totals[side] += _log_prob(lm, ids[side], position)
        np.testing.assert_allclose((scores.more_N[n], scores.less_N[n]), totals, rtol=1e-5)


def _log_prob(lm: LM, ids: list[int], position: int) -> float:
    """Returns the log-probability of one token, from one pass over one text of a fixed length."""
    is_masked = lm.config.structure == "encoder"
    tokens = np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)] = ids
    if is_masked:
        tokens[0, position] = lm.tokenizer.mask
    logits = np.asarray(lm(tokens, mask_BT=(np.arange(16) < len(ids)).astype(np.int32)[None]).logits[0], np.float64)
    logits_V = logits[position - (not is_masked)]
    return logits_V[ids[position]] - np.log(np.exp(logits_V).sum())


def test_equal_sentences_and_exchanged_ones():
    same = score_pairs(lm_of("masked"), [(PAIRS[0][0], PAIRS[0][0])])
    assert same.more_N == pytest.approx(same.less_N, rel=1e-5) and preferences(same)["all"].value == 0
    scores, exchanged = (score_pairs(lm_of("masked"), p) for p in (PAIRS, [pair[::-1] for pair in PAIRS]))
    np.testing.assert_allclose(scores.more_N, exchanged.less_N, rtol=1e-5)
    assert preferences(scores)["all"].value == pytest.approx(1 - preferences(exchanged)["all"].value)


def test_preferences_are_counted_by_kind():
    scores = PairScores(np.array([1.0, 2, 3]), np.array([0.0, 3, 3]), np.array([2, 2, 2]), ("age", "age", "work"))
    assert {name: estimate.value for name, estimate in preferences(scores).items()} == {
        "all": pytest.approx(1 / 3), "age": 0.5, "work": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sent_mor,sent_less\na b,a c\n", "perhaps you meant 'sent_mor'"),
        ("sent_more,sent_less\n", "no row"),
        ("sent_more,sent_less\nthe old farmer,\n", "sent_less"),
        ("sent_more,sent_less\nfarmer,baker\n", "share no token"),
        ("sent_more,sent_less\n" + "the " * 60 + ",the\n", "32 positions"),
    ],
)
def test_invalid_pairs(tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        audit_pairs(lm_of("masked"), str(tmp_path / "pairs.csv"))


def test_a_classifier_has_no_preferences(tmp_path):
    with pytest.raises(UserError, match="--counterfactuals"):
        audit_pairs(lm_of("classifier"), write_pairs(tmp_path / "pairs.csv", PAIRS))


# Associations


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 5))


def test_the_effect_size_has_the_definition_of_caliskan():
    x, y, a, b = vectors(3), vectors(3, 1), vectors(4, 2), vectors(2, 3)
    cosine = lambda u, v: u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    s = [np.mean([cosine(w, v) for v in a]) - np.mean([cosine(w, v) for v in b]) for w in [*x, *y]]
    found = associate(x, y, a, b)
    assert found.effect_size == pytest.approx((np.mean(s[:3]) - np.mean(s[3:])) / np.std(s, ddof=1))
    assert found.is_exact and found.partitions == 20
    assert associate(y, x, a, b).effect_size == pytest.approx(-found.effect_size)
    assert associate(3 * x, y, a, b).effect_size == pytest.approx(found.effect_size)


def test_the_strongest_association_has_the_smallest_p():
    x, y = np.array([[1, 0.1 * n] for n in range(3)]), np.array([[0.1 * n, 1] for n in range(3)])
    assert associate(x, y, np.eye(2)[:1], np.eye(2)[1:]).p == pytest.approx(1 / 20)
    assert associate(y, x, np.eye(2)[:1], np.eye(2)[1:]).p == 1


def test_drawn_partitions_agree_with_all_of_them(monkeypatch):
    sets = vectors(6), vectors(6, 1) + 0.3, vectors(4, 2), vectors(4, 3)
    exact = associate(*sets)
    monkeypatch.setattr("jaxlm.trust.association_tests.MAX_EXACT", 10)
    drawn = associate(*sets, seed=3)
    assert not drawn.is_exact and drawn.p == pytest.approx(exact.p, abs=0.01) and drawn == associate(*sets, seed=3)


def test_words_without_a_vector():
    model = WordVectors(("farmer", "baker", "old", "young", "kind", "tall"), vectors(6))
    test = AssociationTest("t", ("Farmer", "plumber", "old"), ("baker", "young", "tall"), ("kind",), ("tall",))
    with pytest.raises(UserError, match=r"1 of 8 words have no vector: plumber; .*--missing drop"):
        run_test(model, test)
    assert run_test(model, test, missing="drop").partitions == 6  # two targets on each side


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{}", "lacks targ1"),
        (
            json.dumps({"targ1": ["a", "b"], "targ2": ["c"], "attr1": ["d"], "attr2": ["e"]}),
            "2 members and targ2 has 1",
        ),
        (json.dumps({"targ1": [], "targ2": ["c"], "attr1": ["d"], "attr2": ["e"]}), "targ1 holds no list"),
    ],
)
def test_invalid_association_files(tmp_path, content, message):
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_test(str(tmp_path / "test.jsonl"))


# BBQ


def question(row: dict) -> bbq.Question:
    base = {
        "context": "c", "question": "q", "ans0": "the old one", "ans1": "the young one", "ans2": "unknown", "label": 2,
        "context_condition": "ambig", "question_polarity": "neg", "category": "Age",
        "answer_info": {"ans0": ["x", "old"], "ans1": ["x", "nonOld"], "ans2": ["x", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }  # fmt: skip
    return bbq.read_question(base | row, Place("example", 1))


def test_bias_scores_have_the_definition_of_parrish():
    clear = {"context_condition": "disambig", "label": 0}
    negative, other = question(clear), question(clear | {"question_polarity": "nonneg"})
    ambiguous = question({})
    questions = [negative] * 4 + [other] * 4 + [ambiguous] * 10
    # 3 + 1 of 7 known answers agree with the stereotype; of 4 wrong answers to ambiguous contexts 3 do.
    chosen = np.array([0, 0, 0, 1, 0, 0, 1, 2] + [2] * 6 + [0, 0, 0, 1])
    scores = bbq.score_answers(questions, chosen)
    assert scores.s_dis.value == pytest.approx(2 * 4 / 7 - 1)
    assert scores.s_amb.value == pytest.approx((1 - 0.6) * (2 * 3 / 4 - 1))
    assert scores.accuracy_disambiguated.value == pytest.approx(5 / 8)
    assert scores.accuracy_ambiguous.value == pytest.approx(0.6)
    assert bbq.score_answers([ambiguous] * 3, np.array([2, 2, 2])).s_amb.value == 0
    assert bbq.score_answers([negative], np.array([0])).s_dis.value == 1


def test_a_decoder_answers_with_the_most_likely_answer():
    rows = [
        {"context": text, "ans2": "kind and tall"} for text in ("the farmer sings", "old and kind", "a young baker")
    ]
    questions, lm = [question(row) for row in rows], lm_of("causal")
    for normalize in (False, True):
        expected = []
        for one in questions:
            prompt = bbq.PROMPT.format(context=one.context, question=one.question)
            scores = []
            for text in one.answers:  # one forward pass each, without packing
                start = len(lm.tokenizer.with_prefix(lm.tokenizer.encode(prompt)))
                ids = lm.tokenizer.with_prefix(lm.tokenizer.encode(f"{prompt} {text}"))
                log_TV = jax.nn.log_softmax(lm([ids]).logits[0].astype(float))
                log_probs = [float(log_TV[n - 1, ids[n]]) for n in range(start, len(ids))]
                scores.append(np.mean(log_probs) if normalize else np.sum(log_probs))
            expected.append(int(np.argmax(scores)))
        np.testing.assert_array_equal(bbq.answer(lm, questions, normalize), expected)


def test_a_model_of_multiple_choice_answers_with_its_prediction():
    config = dataclasses.replace(lm_of("classifier").config, labels=("score",))
    lm = LM(config, Transformer(config), random_params(config, std=0.4), tokenizer())
    lm = with_task(lm, MultipleChoice(), 24)
    questions = [question({"context": text}) for text in ("the farmer sings", "old and kind", "a young baker")]
    rows = [{"question": f"{q.context} {q.question}", "options": list(q.answers)} for q in questions]
    options = [row["option"] for row in jaxlm.predict(lm, rows)]
    assert [q.answers[n] for q, n in zip(questions, bbq.answer(lm, questions))] == options


@pytest.mark.parametrize("row", [{"label": 7}, {"answer_info": {}}, {"context_condition": "?"}])
def test_rows_that_are_not_of_bbq(row):
    with pytest.raises(UserError, match="not one of BBQ"):
        question(row)


def test_a_classifier_answers_no_questions():
    with pytest.raises(UserError, match="MultipleChoice"):
        bbq.answer(lm_of("classifier"), [question({})])


# Counterfactuals


def test_words_are_swapped_with_their_case_and_every_reading():
    words = counterparts(PRONOUNS)
    assert swap("He saw himself, and HE sang.", words) == ["She saw herself, and SHE sang."]
    assert swap("I saw her.", words) == ["I saw him.", "I saw his."]
    assert swap("the theory", words) == []
    assert swap("She's here; he'd go", counterparts([("a", "b")])) == []
    assert swap("Anna met Tom", counterparts([("Tom", "Anna")])) == ["Tom met Anna"]


def test_differences_of_probabilities():
    p = np.array([[0.9, 0.1], [0.6, 0.4]])
    found = compare(p, [np.array([[0.8, 0.2]]), np.array([[0.4, 0.6], [0.7, 0.3]])])
    assert found.flips_N.tolist() == [False, True] and found.certain_N.tolist() == [False, False]
    np.testing.assert_allclose(found.difference_N, [0.1, 0.15])


@pytest.mark.parametrize("pairs", [[("a", "a")], [("two words", "b")], [], [("", "b")]])
def test_invalid_pairs_of_words(pairs):
    with pytest.raises(UserError):
        counterparts(pairs)


# Groups


def test_gaps_equal_their_definition():
    groups = ["a"] * 6 + ["b"] * 6
    positive = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0], bool)
    predicted = np.array([1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0], bool)
    gaps = group_gaps.group_gaps(groups, positive, predicted, positive == predicted)
    assert gaps.demographic_parity.value == pytest.approx(5 / 6 - 2 / 6)
    assert gaps.true_positive.value == pytest.approx(1 - 1 / 2)
    assert gaps.false_positive.value == pytest.approx(2 / 3 - 1 / 4)
    assert gaps.equalised_odds.value == pytest.approx(1 / 2)
    same = group_gaps.group_gaps(["a", "b"] * 6, np.repeat(positive[:6], 2), np.repeat(predicted[:6], 2), positive)
    assert same.demographic_parity.value == 0
    rates = group_gaps.group_rates(positive[:6], predicted[:6], (positive == predicted)[:6])
    assert (rates.false_positive.value, rates.false_negative.value) == (0.25, 0.5)


GROUPS = "text,label,region\nthe farmer,no,north\nthe baker,yes,north\nhe sings,no,south\nshe sings,yes,south\n"


@pytest.mark.parametrize(
    ("column", "positive", "rows", "message"),
    [
        ("regoin", (), GROUPS, "perhaps you meant 'region'"),
        ("", (), GROUPS, "--group-column"),
        ("region", ("maybe",), GROUPS, "not a class"),
        ("region", ("no", "yes"), GROUPS, "leave at least one out"),
        ("region", (), GROUPS.replace("south", "north"), "two groups"),
        ("region", (), GROUPS.replace("she sings,yes,south\n", ""), "'south' 1"),
        ("region", (), GROUPS.replace("south", ""), "two groups"),
        ("region", (), GROUPS.replace("yes", "yse"), "the label 'yse'"),
    ],
)
def test_invalid_groups(tmp_path, column, positive, rows, message):
    (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        group_gaps.audit_groups(lm_of("classifier"), str(tmp_path / "rows.csv"), column, positive)


def test_a_language_model_has_no_groups():
    with pytest.raises(UserError, match="--pairs"):
        group_gaps.check_classifier(lm_of("causal"), "--groups")


# The page


def test_bars_with_intervals_are_drawn(tmp_path):
    caption = draw(Bars("b", ("x", "y"), (40.0, 60.0), "%", ((30, 50), (50, 70)), 50.0), tmp_path / "b.png")
    assert "95 %" in caption and (tmp_path / "b.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="one for each"):
        draw(Bars("b", ("x", "y"), (40.0, 60.0), "%", ((30, 50),)), tmp_path / "c.png")


def test_the_verb_writes_a_page_and_scores(tmp_path, capsys):
    jaxlm.save(lm_of("masked"), tmp_path / "model")
    sets = {
        "targ1": ["the farmer", "he sings"],
        "targ2": ["the baker", "she sings"],
        "attr1": ["old"],
        "attr2": ["tall"],
    }
    (tmp_path / "test.json").write_text(json.dumps(sets))
    pairs = write_pairs(tmp_path / "pairs.csv", PAIRS)
    page = tmp_path / "page.html"
    flags = ["--pairs", pairs, "--associations", str(tmp_path / "test.json"), "--output", str(page)]
    assert main(["audit", str(tmp_path / "model"), *flags]) == 0
    scores = json.loads(page.with_suffix(".json").read_text())["scores"]
    assert scores["pairs"] == 3 and -2 <= scores["associations/test/effect_size"] <= 2
    assert "Blodgett" in page.read_text() and "Ethayarajh" in page.read_text()
    assert "pairs/all" in capsys.readouterr().out


def test_a_classifier_is_audited_with_its_rows(tmp_path):
    (tmp_path / "rows.csv").write_text(GROUPS)
    found = audit_counterfactuals(lm_of("classifier"), str(tmp_path / "rows.csv"))
    assert found.scores["counterfactuals"] == 2
    gaps = group_gaps.audit_groups(lm_of("classifier"), str(tmp_path / "rows.csv"), "region")
    assert gaps.scores["groups/north/members"] == 2
    assert Classification() == group_gaps.check_classifier(lm_of("classifier"), "--groups")


def test_flags_of_audits_that_are_not_requested():
    bias = audits.BiasArguments(pairs="p.csv", positive=("yes",))
    with pytest.raises(UserError, match="--positive has no effect without --groups"):
        audits.requested_audits(audits.AuditArguments("m", bias=bias))
    with pytest.raises(UserError, match="no audit is requested"):
        audits.requested_audits(audits.AuditArguments("m"))
    with pytest.raises(UserError, match="word vectors support --associations"):
        audits.audit(
            WordVectors(("a",), np.ones((1, 2))), audits.AuditArguments("m", bias=audits.BiasArguments("p.csv"))
        )


def test_sentences_are_encoded_by_any_model(tmp_path):
    sets = {
        "targ1": ["the farmer", "he sings"],
        "targ2": ["the baker", "she sings"],
        "attr1": ["old"],
        "attr2": ["tall"],
    }
    (tmp_path / "test.json").write_text(json.dumps(sets))
    found = audit_associations(lm_of("causal"), [str(tmp_path / "test.json")])
    assert -2 <= found.scores["associations/test/effect_size"] <= 2
    with pytest.raises(UserError, match="--pooling is 'maen'"):
        audit_associations(lm_of("causal"), [str(tmp_path / "test.json")], pooling="maen")


# Equality with an implementation in torch of the definitions.


@pytest.mark.parity
@pytest.mark.parametrize(("preset", "kind"), [("bert-base", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel")])
def test_pairs_have_the_scores_of_torch(preset, kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(PRESETS[preset], **TINY, mlp_width=24, vocabulary=tokenizer().size)
    lm = LM(config, Transformer(config), random_params(config, std=0.4), tokenizer())
    jaxlm.save(lm, tmp_path)
    model = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    lm = jaxlm.load(tmp_path)
    found = score_pairs(lm, PAIRS)

    @torch.no_grad()
    def log_probs(ids):
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    def score(ids, other):
        is_shared = [a == 0 for a in ids]
        for block in SequenceMatcher(None, ids, other, autojunk=False).get_matching_blocks():
            is_shared[block.a : block.a + block.size] = [True] * block.size
        total = 0.0
        for n, token in enumerate(ids):
            if not is_shared[n] or (lm.config.structure == "encoder" and n in (0, len(ids) - 1)):
                continue
            if lm.config.structure == "encoder":  # [CLS] and [SEP] are not scored
                total += log_probs([*ids[:n], lm.tokenizer.mask, *ids[n + 1 :]])[n, token]
            elif n:
                total += log_probs(ids)[n - 1, token]
        return total

    encode = lambda text: lm.tokenizer.encode_with_special_tokens([text])[0][0]
    if lm.config.structure == "decoder":
        encode = lambda text: list(lm.tokenizer.with_prefix(lm.tokenizer.encode(text)))
    ids = [[encode(text) for text in pair] for pair in PAIRS]
    np.testing.assert_allclose(found.more_N, [score(more, less) for more, less in ids], atol=1e-4)
    np.testing.assert_allclose(found.less_N, [score(less, more) for more, less in ids], atol=1e-4)


@pytest.mark.parity
def test_an_effect_size_is_that_of_torch(tmp_path):
    """Caliskan et al. 2017: the standardised difference of the mean associations of two sets of targets."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        PRESETS["bert-base"], **TINY, mlp_width=24, vocabulary=tokenizer().size, heads_on_top=()
    )
    lm = LM(config, Transformer(config), random_params(config, std=0.4), tokenizer())
    jaxlm.save(lm, tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    sets = {
        "targ1": ["the old farmer", "old baker", "old"], "targ2": ["the young farmer", "young baker", "young"],
        "attr1": ["kind", "sings well"], "attr2": ["tall", "is here"],
    }  # fmt: skip
    (tmp_path / "test.json").write_text(json.dumps({name: {"examples": texts} for name, texts in sets.items()}))
    found = audit_associations(jaxlm.load(tmp_path), [str(tmp_path / "test.json")], pooling="cls")

    @torch.no_grad()
    def vector(text):
        ids = lm.tokenizer.encode_with_special_tokens([text])[0][0]
        return model(torch.tensor([ids])).last_hidden_state[0, 0].double()

    cosine = lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=0)
    of = {name: [vector(text) for text in texts] for name, texts in sets.items()}
    mean = lambda values: sum(values) / len(values)
    association = lambda w: mean([cosine(w, a) for a in of["attr1"]]) - mean([cosine(w, b) for b in of["attr2"]])
    first, second = ([float(association(w)) for w in of[name]] for name in ("targ1", "targ2"))
    expected = (np.mean(first) - np.mean(second)) / np.std(first + second, ddof=1)
    [effect] = [value for name, value in found.scores.items() if "effect" in name]
    np.testing.assert_allclose(effect, expected, atol=1e-4)
