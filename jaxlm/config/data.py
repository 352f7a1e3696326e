"""Where text comes from, how it is cleaned and cut into tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxlm.config.ranges import MOST, Config, Count, Name, Pattern, Range, Seed, Share

Format = Literal["suffix", "text", "csv", "tsv", "quoted_tsv", "jsonl", "parquet", "conll", "squad"]
Characters = Annotated[int, Range(1, 10**15)]


@dataclass(frozen=True)
class CleaningConfig(Config):
    """What is done to each row before it is used; the run prints how many rows each choice changed or dropped."""

    unicode: Literal["none", "NFC", "NFKC"] = "none"  # Unicode normal form
    encoding: Literal["refuse", "drop", "replace"] = "refuse"  # rows that are not UTF-8
    control: bool = False  # remove control characters other than tab and line ends
    whitespace: bool = False  # runs of white space become one space, ends are stripped
    min_characters: Count = 0  # shorter rows are dropped
    max_characters: Count = 0  # longer rows are dropped; 0: no limit
    duplicates: bool = False  # rows seen before are dropped


@dataclass(frozen=True)
class DataConfig(Config):
    """Where text comes from, and the shape that it is packed to."""

    path: str = ""  # file, folder, glob, or tfds:NAME; txt, csv, tsv, json, jsonl, parquet, conll, each also as .gz
    eval_path: str = ""  # held-out data; empty: eval_fraction of the documents or examples
    eval_fraction: Share = 0.1  # share of the documents or examples held out when there is no eval_path
    eval_choice: Literal["sampled", "last"] = "sampled"  # documents held out: any, by a hash; or the last of a text
    eval_seed: Seed = 0  # of the choice of the examples held out; the run's own seed does not change it
    format: Format = "suffix"  # of the files; suffix: by the end of a file's name
    target_path: str = ""  # plain text whose line n goes with line n of `path`: a translation; its column is "target"
    eval_target_path: str = ""  # the same beside eval_path
    columns: tuple[str, ...] = ()  # names of the columns of csv and tsv files without a header, and of conll files
    pattern: Pattern = ""  # of plain text, a regular expression whose named groups are the columns of a line
    encoding: Name = "utf-8"  # of text files, such as cp1252; a byte-order mark of UTF-16 or UTF-32 counts first
    label_from: Literal["column", "folder", "file"] = "column"  # column "label" is the name of a file, or of its folder
    limit: Count = 0  # rows that are read, the first ones, for training and for evaluation; 0: all
    text: Name = "text"  # the column that holds the text that a language model learns from, or a line of plain text
    split: str = "train"  # of a tfds data set
    eval_split: str = ""  # of the same tfds data set, held out
    documents: Literal["line", "blank_line", "file", "boundary"] = "line"  # what a document is, in plain text
    boundary: Pattern = ""  # regular expression of the line that begins a document, for documents=boundary
    length: Annotated[int, Range(2, MOST)] = 512  # tokens in a row T
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    cache: str = ""  # folder of tokenized data; empty: $JAXLM_CACHE or ~/.cache/jaxlm


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """A tokenizer to load, or the kind to train on the training part; its size is the model's vocabulary."""

    path: str = ""  # folder, hub name, tokenizer.json, vocab.txt, .model, or vocab.json with merges.txt beside it
    train: Literal["unigram", "bpe", "byte_bpe", "wordpiece", "characters"] = "unigram"  # when there is no path
    lowercase: bool = False  # fold case (wordpiece only: the others are lossless)
    separate: bool = False  # one of the sources, another of the targets (Seq2Seq), saved in a folder `target` below it
    sentinels: Count = 0  # of the vocabulary, tokens <extra_id_0> ... that mark gaps: SpanCorruption needs them
    split_special_tokens: bool | None = None  # spell [SEP] in a text like other text; None: in pre-training alone
    max_training_characters: Characters = 50_000_000  # the trainer sees a sample of this much text
