"""Word vectors: GloVe (Pennington et al. 2014) on plain text.

    python train.py configs/glove.py --data.path TEXT

A line is a document. Words are runs of letters and digits, in lower case. For a text of a few million words, set
--glove.max-count 10: less frequent pairs get more weight.

Measured in November 2026 with seed 0, on 6.6 million words of documentation of Debian, separated by white space, with
--glove.max-count 10 --epochs 15:

Hardware         2 cores of an Intel Xeon with AVX-512, shared with other processes (load 11)
Time             6 min, 0.5 to 1.4 million counts per second
Score            analogies word : word + s 13.9 %, word + ing : word + ed 5.9 % (skip-gram: 35.2 % and 19.2 %)
"""

from jaxlm import VectorsConfig


def config() -> VectorsConfig:
    return VectorsConfig(method="glove", pattern=r"\w+(?:'\w+)?", lowercase=True, window=10, epochs=25, format="glove")
