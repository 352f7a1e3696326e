"""Config of a run that trains word vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxlm.config.data import DataConfig
from jaxlm.config.ranges import (
    AboveZero,
    Config,
    Count,
    NotNegative,
    Pattern,
    Positive,
    Range,
    Seed,
    Share,
    check_fields,
)
from jaxlm.errors import UserError

PIECE = 32  # tokens of a text whose pairs are the entries of one matrix product
Width = Annotated[int, Range(1, 100_000)]
Window = Annotated[int, Range(1, 1000)]
Exponent = Annotated[float, Range(0, 10)]


@dataclass(frozen=True)
class SkipGramConfig(Config):
    """Skip-gram with negative sampling (Mikolov et al. 2013)."""

    rate: AboveZero = 0.025  # learning rate of the first update; it decreases linearly to final_rate
    final_rate: NotNegative = 1e-4  # learning rate of the last update
    negatives: Positive = 5  # number of negative words per pair, as a weight: see shared
    shared: Positive = 64  # negative words that are sampled for a block, and shared by its tokens
    exponent: Exponent = 0.75  # negative words are sampled in proportion to count ** exponent
    subsample: Share = 1e-3  # words above this fraction of the text are dropped at random; 0: none
    block: Annotated[int, Range(PIECE, 1 << 20)] = 128  # tokens of an update, a multiple of 32


@dataclass(frozen=True)
class GloVeConfig(Config):
    """GloVe: weighted least squares over counts of co-occurrences (Pennington et al. 2014)."""

    rate: AboveZero = 0.05  # learning rate of AdaGrad
    max_count: AboveZero = 100.0  # a count of this size or more has the weight 1 (x_max)
    exponent: Exponent = 0.75  # alpha: a smaller count x has the weight (x / max_count) ** exponent
    block: Annotated[int, Range(1, 1 << 20)] = 1024  # counts of an update


@dataclass(frozen=True)
class VectorsConfig(Config):
    """A run that trains word vectors, from the text to the exported vectors.

    A document of the data is a text whose words are context of each other. The fields of the data for evaluation, and
    the row length, have no effect.
    """

    data: DataConfig = field(default_factory=DataConfig)
    method: Literal["skip_gram", "glove"] = "skip_gram"  # what is trained
    skip_gram: SkipGramConfig = field(default_factory=SkipGramConfig)
    glove: GloVeConfig = field(default_factory=GloVeConfig)
    width: Width = 100  # entries of a vector D
    window: Window = 5  # maximum distance of a word and its context, in words
    pattern: Pattern = ""  # regular expression that matches a word; empty: words are separated by white space
    lowercase: bool = False  # convert text to lower case
    min_count: Positive = 5  # rarer words are dropped
    max_words: Count = 0  # number of words to keep, the most frequent ones; 0: all
    epochs: Positive = 5  # passes over the text, or over the counts of co-occurrences
    seed: Seed = 0  # seed for vectors, order and sampling
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    checkpoint_every: Count = 0  # steps between checkpoints; 0: a tenth of the run
    format: Literal["word2vec", "word2vec_binary", "glove"] = "word2vec"  # format of the exported vectors
    workdir: str = ""  # run folder; empty: runs/CONFIG_NAME

    def check(self) -> None:
        """Raises UserError if the config is invalid, without reading data."""
        check_fields(self)
        if not self.data.path:
            raise UserError("data.path is empty; give a file, a folder, a glob or tfds:NAME with --data.path")
        if self.skip_gram.block % PIECE:
            below = self.skip_gram.block - self.skip_gram.block % PIECE
            raise UserError(
                f"skip_gram.block is {self.skip_gram.block}; it must be a multiple of {PIECE}, such as {below}"
            )
        if self.skip_gram.final_rate > self.skip_gram.rate:
            raise UserError(
                f"skip_gram.final_rate is {self.skip_gram.final_rate:g}, above skip_gram.rate "
                f"{self.skip_gram.rate:g}; lower it"
            )
        other, default = ("glove", GloVeConfig()) if self.method == "skip_gram" else ("skip_gram", SkipGramConfig())
        if getattr(self, other) != default:
            raise UserError(
                f"fields of {other} are set, which have no effect if method is {self.method}; leave them out, or set "
                f"--method {other}"
            )
