"""Word vectors: skip-gram with negative sampling (Mikolov et al. 2013) on plain text.

    python train.py configs/word2vec.py --data.path TEXT

A line is a document. Words are runs of letters and digits, in lower case. `benchmarks/word_vectors.py` compares the
vectors and the speed with those of gensim; docs/vectors.md has the table.

Measured in November 2026 with seed 0, on 6.6 million words of documentation of Debian, separated by white space:

Hardware         2 cores of an Intel Xeon with AVX-512, shared with other processes (load 12)
Time             45 s of CPU time for 5 epochs, 769,000 words per second of CPU time (gensim: 248,000)
Score            analogies word : word + s 35.2 %, word + ing : word + ed 19.2 % (gensim: 30.0 % and 12.1 %)
"""

from jaxlm import VectorsConfig


def config() -> VectorsConfig:
    return VectorsConfig(pattern=r"\w+(?:'\w+)?", lowercase=True)
