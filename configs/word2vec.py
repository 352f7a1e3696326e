"""Word vectors: skip-gram with negative sampling (Mikolov et al. 2013) on plain text.

    python train.py configs/word2vec.py --data.path TEXT

A line is a document. Words are runs of letters and digits, in lower case.
"""

from jaxlm import VectorsConfig


def config() -> VectorsConfig:
    return VectorsConfig(pattern=r"\w+(?:'\w+)?", lowercase=True)
