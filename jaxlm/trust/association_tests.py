"""Association tests of word vectors (WEAT) and of encoded sentences (SEAT)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.hub.pooling import MODES, Pooling
from jaxlm.inference.encode import encode
from jaxlm.lm import LM
from jaxlm.reports.pages import Chapter
from jaxlm.reports.pictures import Bars
from jaxlm.reports.tables import Table
from jaxlm.trust.audit import Audit
from jaxlm.vectors.word_vectors import WordVectors

MAX_EXACT = 100_000  # partitions of the targets that are all computed; of more, SAMPLES are drawn
SAMPLES = 100_000
SETS = ("targ1", "targ2", "attr1", "attr2")
_MARGIN = 1e-9  # relative; partitions with the same sum differ by rounding


class AssociationTest(NamedTuple):
    """Two sets of targets X and Y and two sets of attributes A and B, as words or sentences, and their names."""

    name: str
    targets_x: tuple[str, ...]
    targets_y: tuple[str, ...]
    attributes_a: tuple[str, ...]
    attributes_b: tuple[str, ...]
    categories: tuple[str, str, str, str] = ("X", "Y", "A", "B")


class Association(NamedTuple):
    """The result of an association test.

    effect_size: positive where X is closer to A, and Y to B. p: of the one-sided permutation test.
    partitions: number of partitions of the targets. is_exact: whether they are all.
    """

    effect_size: float
    p: float
    partitions: int
    is_exact: bool


def associate(x_XD: np.ndarray, y_YD: np.ndarray, a_AD: np.ndarray, b_BD: np.ndarray, seed: int = 0) -> Association:
    """Returns the effect size and the p-value of an association test.

    s(w) is the mean cosine of a target w with A minus that with B. The effect size is the difference of the means of s
    over X and Y, divided by the sample standard deviation of s over all targets. p is the proportion of partitions of
    the targets into two sets of equal size with a sum of s over the first minus the second that is at least the
    observed one: over all partitions where there are at most 100,000, otherwise over 100,000 drawn ones, to which the
    observed one is added.

    Args:
      x_XD: vectors of the targets X.
      y_YD: vectors of the targets Y, as many.
      a_AD: vectors of the attributes A.
      b_BD: vectors of the attributes B.
      seed: of the drawn partitions.

    Raises:
      UserError: for sets of targets of unequal size or with fewer than two, an empty set of attributes, a vector of
        zeros, and targets that all have the same association.

    Caliskan et al. 2017; May et al. 2019, section 2.
    """
    if len(x_XD) != len(y_YD) or len(x_XD) < 2:
        raise UserError(
            f"the sets of targets have {len(x_XD)} and {len(y_YD)} members; the permutation test requires sets of the "
            f"same size, at least 2: remove members of the larger one"
        )
    if not len(a_AD) or not len(b_BD):
        raise UserError(f"the sets of attributes have {len(a_AD)} and {len(b_BD)} members; give at least one in each")
    targets_WD, a_AD, b_BD = (_units(vectors) for vectors in (np.concatenate([x_XD, y_YD]), a_AD, b_BD))
    s_W = (targets_WD @ a_AD.T).mean(1) - (targets_WD @ b_BD.T).mean(1)
    n, spread = len(x_XD), s_W.std(ddof=1)
    if spread < 1e-12:
        raise UserError("all targets have the same association with the attributes; the effect size is undefined")
    effect_size = float((s_W[:n].mean() - s_W[n:].mean()) / spread)
    # The sum over the second set is the total minus the sum over the first, so comparing first sums is enough.
    observed = s_W[:n].sum()
    least = observed - _MARGIN * max(1e-3, np.abs(s_W).sum())
    partitions = math.comb(2 * n, n)
    if partitions <= MAX_EXACT:
        sums = np.fromiter((s_W[list(chosen)].sum() for chosen in combinations(range(2 * n), n)), float, partitions)
        return Association(effect_size, float((sums >= least).mean()), partitions, True)
    random = np.random.default_rng(seed)
    count = sum(int((_drawn_sums(random, s_W, n, size) >= least).sum()) for size in [SAMPLES // 10] * 10)
    return Association(effect_size, (count + 1) / (SAMPLES + 1), SAMPLES, False)


def _drawn_sums(random: np.random.Generator, s_W: np.ndarray, n: int, count: int) -> np.ndarray:
    """Returns sums over `count` random subsets of n of the values."""
    return random.permuted(np.broadcast_to(s_W, (count, len(s_W))), axis=1)[:, :n].sum(1)


def _units(vectors_ND: np.ndarray) -> np.ndarray:
    vectors_ND = np.asarray(vectors_ND, np.float64)
    norms = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    if not norms.all():
        raise UserError("a word or sentence has a vector of zeros, which has no cosine; remove it")
    return vectors_ND / norms


def read_test(file: str) -> AssociationTest:
    """Reads a test in the JSON format of sent-bias.

    Args:
      file: a JSON object with the keys targ1, targ2, attr1 and attr2. Each holds a list of texts, or an object with
        the list "examples" and the name "category".

    Raises:
      UserError: for a missing, empty or damaged file, and for a set that is missing, empty or unequal to its pair.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file} is not a file; --associations requires JSON files with the sets {', '.join(SETS)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error)[:100]}); give an object with {', '.join(SETS)}") from None
    if not isinstance(content, dict) or any(name not in content for name in SETS):
        missing = [name for name in SETS if not isinstance(content, dict) or name not in content]
        raise UserError(f"{file} lacks {', '.join(missing)}; give an object with the sets {', '.join(SETS)}")
    sets, names = zip(*[_read_set(file, name, content[name]) for name in SETS])
    if len(sets[0]) != len(sets[1]):
        raise UserError(
            f"{file}: targ1 has {len(sets[0])} members and targ2 has {len(sets[1])}; the permutation test requires "
            f"sets of the same size: remove members of the larger one"
        )
    return AssociationTest(path.name.split(".")[0], sets[0], sets[1], sets[2], sets[3], names)


def _read_set(file: str, key: str, value: Any) -> tuple[tuple[str, ...], str]:
    members = value.get("examples") if isinstance(value, dict) else value
    if not isinstance(members, list) or not members or not all(isinstance(text, str) and text for text in members):
        raise UserError(f"{file}: {key} holds no list of texts; give at least {2 if key[0] == 't' else 1}")
    return tuple(members), str(value.get("category", key)) if isinstance(value, dict) else key


def run_test(
    model: LM | WordVectors, test: AssociationTest, pooling: str = "", seed: int = 0, missing: str = "refuse"
) -> Association:
    """Returns the result of a test: WEAT for word vectors, SEAT for a model that encodes sentences.

    Args:
      model: word vectors, or a model.
      test: the test.
      pooling: the pooling of hidden states, a mode of `jaxlm.Pooling`; empty: as the model declares, and for a decoder
        that declares none the state of the last token, as May et al. do.
      seed: of the drawn partitions.
      missing: for words without a vector, "refuse" or "drop". Where the sets of targets then differ in size, the last
        members of the larger one are left out.

    Raises:
      UserError: as `associate` does, and for words without a vector.
    """
    sets = test.targets_x, test.targets_y, test.attributes_a, test.attributes_b
    if isinstance(model, WordVectors):
        found = _word_sets(model, test, missing)
        x_XD, y_YD, a_AD, b_BD = (np.array([model[word] for word in words]) for words in found)
        return associate(x_XD, y_YD, a_AD, b_BD, seed)
    lm = _with_pooling(model, pooling)
    texts = list(dict.fromkeys(text for members in sets for text in members))
    vector_of = dict(zip(texts, encode(lm, texts)))
    x_XD, y_YD, a_AD, b_BD = (np.array([vector_of[text] for text in members]) for members in sets)
    return associate(x_XD, y_YD, a_AD, b_BD, seed)


def _word_sets(model: WordVectors, test: AssociationTest, missing: str) -> list[list[str]]:
    """Returns the sets with the words as the vectors spell them: a word in upper case may have one in lower case."""
    spell = lambda word: next((form for form in (word, word.lower()) if form in model), None)
    sets = test.targets_x, test.targets_y, test.attributes_a, test.attributes_b
    absent = [word for members in sets for word in members if spell(word) is None]
    if absent and missing == "refuse":
        raise UserError(
            f"{test.name}: {len(absent)} of {sum(map(len, sets))} words have no vector: {', '.join(absent[:8])}"
            f"{', ...' if len(absent) > 8 else ''}; remove them from the test, or set --missing drop"
        )
    x, y, a, b = ([form for form in map(spell, members) if form is not None] for members in sets)
    size = min(len(x), len(y))
    if size < 2 or not a or not b:
        raise UserError(f"{test.name}: a set has too few words with a vector; use vectors of a larger vocabulary")
    return [x[:size], y[:size], a, b]


def _with_pooling(lm: LM, pooling: str) -> LM:
    if pooling:
        if pooling not in MODES:
            raise UserError(f"--pooling is {pooling!r}; use one of {', '.join(MODES)}")
        return dataclasses.replace(lm, pooling=Pooling((pooling,)))
    if lm.pooling is None and lm.config.structure == "decoder":
        return dataclasses.replace(lm, pooling=Pooling(("lasttoken",)))
    return lm


def audit_associations(
    model: LM | WordVectors, files: Sequence[str], pooling: str = "", seed: int = 0, missing: str = "refuse"
) -> Audit:
    """Returns the audit of association tests.

    Args:
      model: word vectors (WEAT), or a model (SEAT).
      files: JSON files of tests, as `read_test` reads them.
      pooling: as for `run_test`, and so are `seed` and `missing`.
      seed: of the drawn partitions.
      missing: how words without a vector are handled.

    Raises:
      UserError: as `read_test` and `run_test` do.
    """
    tests = [read_test(file) for file in files]  # all files are checked before anything is compiled
    results = [run_test(model, test, pooling, seed, missing) for test in tests]
    is_weat = isinstance(model, WordVectors)
    scores = dict(_numbers(zip(tests, results)))
    rows = [
        [
            test.name,
            f"{test.categories[0]} / {test.categories[1]}",
            f"{test.categories[2]} / {test.categories[3]}",
            f"{result.effect_size:.3f}",
            f"{result.p:.2g}",
            f"{result.partitions:,}{'' if result.is_exact else ' drawn'}",
        ]
        for test, result in zip(tests, results)
    ]
    note = f"{len(tests)} tests: about {0.05 * len(tests):.1g} have p below 0.05 by chance alone."
    head = ("test", "targets X / Y", "attributes A / B", "effect size", "p", "partitions")
    bars = Bars("Effect sizes", tuple(t.name for t in tests), tuple(r.effect_size for r in results), "effect size")
    title = "Associations of words (WEAT)" if is_weat else "Associations of sentences (SEAT)"
    return Audit(title, scores, [Chapter(title, _text(is_weat), [bars, Table("Tests", head, rows, note)])])


def _numbers(results: Any) -> Iterator[tuple[str, float]]:
    for test, result in results:
        yield f"associations/{test.name}/effect_size", result.effect_size
        yield f"associations/{test.name}/p", result.p


def _text(is_weat: bool) -> list[str]:
    vectors = "the vectors of words" if is_weat else "the pooled hidden states of sentences"
    return [
        f"The tests compare {vectors}. The effect size is positive where the targets X are closer to the attributes A, "
        "and Y to B. It is at most 2, and 0 without a difference. p is the proportion of exchanges of the targets with "
        "an association at least as strong (one-sided permutation test). Caliskan et al. (2017) define the test for "
        "words, May et al. (2019) for sentences.",
        "Known criticism: Ethayarajh et al. (2019) show that the choice of the words can change the sign of WEAT, "
        "because it depends on their frequency and on the few members of the sets. May et al. found SEAT inconsistent: "
        "similar tests of one concept disagree, and the sentences are not neutral for all encoders, whose vectors are "
        "also close to one another. Goldfarb-Tarrant et al. (2021) found no reliable correlation between such "
        "associations and the bias of systems that use the vectors. A test can detect bias. It cannot show that there "
        "is none.",
    ]
