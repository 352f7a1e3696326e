"""Word vectors compared with gensim: speed, neighbours and analogies of skip-gram on one text.

    pip install gensim
    python benchmarks/word_vectors.py TEXT [--epochs 5] [--rounds 3]

TEXT is plain text, whose lines are documents and whose words are separated by white space.  Both libraries read the
same words and train with the same settings.  The speed is that of training alone, in short runs that alternate: words
of the text per second, and per second of CPU time, which other processes on the machine change little.  gensim has 2
threads.

Analogies are pairs of the vocabulary that rules give: word and word + s, word + ing and word + ed.  An answer is
correct if the nearest word is the expected one.  gensim is compared with itself too, with another seed, which is the
agreement to expect.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxlm import DataConfig, VectorsConfig, WordVectors
from jaxlm.vectors.skipgram import SkipGram
from jaxlm.vectors.words import WordCorpus, read_corpus

FREQUENT = 6000  # words of the analogies and of the neighbours
ANALOGIES, NEIGHBOURS = 4000, 500  # number of questions of each kind, and of words whose neighbours are compared


def clocks() -> np.ndarray:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([time.monotonic(), usage.ru_utime + usage.ru_stime])


def of_gensim(texts: list[list[str]], run: VectorsConfig, workers: int, seed: int = 1):
    from gensim.models import Word2Vec

    config = run.skip_gram
    model = Word2Vec(
        vector_size=run.width, window=run.window, min_count=run.min_count, sg=1, negative=config.negatives,
        ns_exponent=config.exponent, sample=config.subsample, alpha=config.rate, min_alpha=config.final_rate,
        workers=workers, seed=seed,
    )  # fmt: skip
    model.build_vocab(texts)
    return model


def train_gensim(model, texts: list[list[str]], epochs: int) -> None:
    model.train(texts, total_examples=len(texts), epochs=epochs)


def train_ours(run: VectorsConfig, corpus: WordCorpus) -> tuple[WordVectors, np.ndarray]:
    """Returns the vectors, and the time and the CPU time of training, without compilation."""
    trainer = SkipGram(run, corpus)
    trainer.update(trainer.first_state(), trainer.batch(0))[0].step.block_until_ready()
    state, start = trainer.first_state(), clocks()
    for step in range(trainer.steps):
        state, _ = trainer.update(state, trainer.batch(step))
    jax.block_until_ready(state)
    return WordVectors(corpus.words, trainer.vectors(state)), clocks() - start


def timed(body: Callable[[], None]) -> np.ndarray:
    start = clocks()
    body()
    return clocks() - start


def units(vectors: WordVectors) -> np.ndarray:
    return vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)


def analogy_score(vectors: WordVectors, pairs: list[tuple[str, str]]) -> float:
    """Returns the fraction of questions a : b = c : ? whose nearest word is the expected one."""
    ids = np.array([[vectors.index(word) for word in pair] for pair in pairs])
    i, j = np.random.default_rng(0).integers(len(ids), size=(2, ANALOGIES))
    (a, b), (c, d), unit = ids[i[i != j]].T, ids[j[i != j]].T, units(vectors)
    cosines = (unit[b] - unit[a] + unit[c]) @ unit.T
    for asked in (a, b, c):
        cosines[np.arange(len(a)), asked] = -np.inf
    return float((cosines.argmax(1) == d).mean())


def pairs_of(words: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    frequent = [word for word in words[:FREQUENT] if word.isalpha()]
    known = set(frequent)
    plural = [(w, w + "s") for w in frequent if len(w) > 3 and w + "s" in known]
    ending = [(w, w[:-3] + "ed") for w in frequent if w.endswith("ing") and w[:-3] + "ed" in known]
    return {"plural": plural, "ing-ed": ending}


def agreement(first: WordVectors, second: WordVectors) -> tuple[float, float]:
    """Returns the overlap of the 10 nearest words, and Spearman's correlation of the cosines of random pairs."""
    from scipy.stats import spearmanr

    one, two = units(first)[:FREQUENT], units(second)[:FREQUENT]
    random = np.random.default_rng(0)
    asked = random.choice(len(one), min(NEIGHBOURS, len(one)), replace=False)
    near = [np.argsort(-(unit[asked] @ unit.T), 1)[:, 1:11] for unit in (one, two)]
    overlap = float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(*near)]))
    a, b = random.integers(len(one), size=(2, 200_000))
    return overlap, float(spearmanr((one[a] * one[b]).sum(1), (two[a] * two[b]).sum(1)).statistic)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    run = VectorsConfig(data=DataConfig(path=args.text), epochs=args.epochs)
    corpus = read_corpus(run)
    texts = [line.split() for line in Path(args.text).read_text().splitlines()]
    print(f"{corpus.summary}; {processor()}, {jax.devices()[0].device_kind}")
    rates: list[np.ndarray] = []
    for number in range(args.rounds):
        model = of_gensim(texts, run, 2)
        theirs = corpus.read / timed(lambda model=model: train_gensim(model, texts, 1))
        ours = corpus.read / train_ours(replace(run, epochs=1), corpus)[1]
        rates.append(ours / theirs)
        line = "  ".join(
            f"{name} {x[0]:,.0f} /s, {x[1]:,.0f} /CPU s" for name, x in (("gensim", theirs), ("ours", ours))
        )
        print(f"round {number + 1}: words  {line}  ratio {rates[-1][0]:.2f}, CPU {rates[-1][1]:.2f}", flush=True)
    best = np.median(rates, axis=0)
    print(f"median ratio of the speed {best[0]:.2f}, per CPU second {best[1]:.2f}")
    found = {"ours": train_ours(run, corpus)[0]}
    for name, seed in (("gensim", 1), ("gensim, another seed", 2)):
        model = of_gensim(texts, run, 2, seed)
        train_gensim(model, texts, args.epochs)
        found[name] = WordVectors(corpus.words, model.wv[list(corpus.words)])
    for name, vectors in found.items():
        scores = [
            f"{kind} {analogy_score(vectors, pairs):.3f}" for kind, pairs in pairs_of(corpus.words).items() if pairs
        ]
        overlap, correlation = agreement(vectors, found["gensim"])
        print(
            f"{name:>20}  analogies {', '.join(scores)}; agreement with gensim: neighbours {overlap:.2f}, "
            f"Spearman {correlation:.2f}"
        )
    for word in [word for word in corpus.words[200:FREQUENT] if len(word) > 4 and word.isalpha()][:5]:
        for name in ("ours", "gensim"):
            print(f"{word:>16} {name:>8}  {', '.join(near for near, _ in found[name].most_similar(word, 6))}")


if __name__ == "__main__":
    sys.exit(main())
