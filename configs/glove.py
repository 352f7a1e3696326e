"""Word vectors: GloVe (Pennington et al. 2014) on plain text.

    python train.py configs/glove.py --data.path TEXT

A line is a document. Words are runs of letters and digits, in lower case.
"""

from jaxlm import VectorsConfig


def config() -> VectorsConfig:
    return VectorsConfig(method="glove", pattern=r"\w+(?:'\w+)?", lowercase=True, window=10, epochs=25, format="glove")
