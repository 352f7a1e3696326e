"""Configs of the data: sources, cleaning and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxlm.config.ranges import MAX_INT, Config, Count, Name, Pattern, Range, Seed, Share

Format = Literal["suffix", "text", "csv", "tsv", "quoted_tsv", "jsonl", "parquet", "conll", "squad", "tokens"]
Characters = Annotated[int, Range(1, 10**15)]


@dataclass(frozen=True)
class CleaningConfig(Config):
    """Cleaning steps for each row; the run prints how many rows each step changed or dropped."""

    unicode: Literal["none", "NFC", "NFKC"] = "none"  # Unicode normalisation form
    encoding: Literal["refuse", "drop", "replace"] = "refuse"  # how to handle rows that are not valid UTF-8
    control: bool = False  # remove control characters other than tabs and line ends
    whitespace: bool = False  # collapse runs of white space to one space and strip both ends
    min_characters: Count = 0  # minimum length; shorter rows are dropped
    max_characters: Count = 0  # maximum length; longer rows are dropped; 0: no limit
    duplicates: bool = False  # drop repeated rows
    personal_data: Literal["keep", "mask", "drop"] = "keep"  # mask: [EMAIL], [PHONE] ... instead; drop: drop the row


@dataclass(frozen=True)
class DataConfig(Config):
    """Sources of the text, and the length of the packed rows."""

    path: str = ""  # file, folder, glob or tfds:NAME; txt, csv, tsv, json, jsonl, parquet or conll, optionally .gz
    eval_path: str = ""  # held-out data; empty: eval_fraction of the documents or examples is held out
    eval_fraction: Share = 0.1  # fraction of the documents or examples held out if eval_path is empty
    eval_choice: Literal["sampled", "last"] = "sampled"  # documents to hold out: a sample by hash, or the last ones
    eval_seed: Seed = 0  # seed for sampling the held-out examples; independent of the seed of the run
    format: Format = "suffix"  # file format; suffix: determined by the file name
    target_path: str = ""  # plain text aligned with `path` line by line, such as a translation; read as column "target"
    eval_target_path: str = ""  # plain text aligned with eval_path line by line
    columns: tuple[str, ...] = ()  # column names of csv and tsv files without a header, and of conll files
    pattern: Pattern = ""  # regular expression for lines of plain text; its named groups become the columns
    encoding: Name = "utf-8"  # encoding of text files, such as cp1252; a UTF-16 or UTF-32 byte-order mark overrides it
    label_from: Literal["column", "folder", "file"] = "column"  # label: the column "label", the folder or file name
    limit: Count = 0  # maximum number of rows to read, for training and for evaluation; 0: all
    text: Name = "text"  # text column for language modelling; also the name of the column that plain text is read as
    split: str = "train"  # training split of a tfds data set
    eval_split: str = ""  # held-out split of the same tfds data set
    documents: Literal["line", "blank_line", "file", "boundary"] = "line"  # how plain text is split into documents
    boundary: Pattern = ""  # regular expression that matches the first line of a document, for documents=boundary
    length: Annotated[int, Range(2, MAX_INT)] = 512  # tokens per row T
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    cache: str = ""  # folder for tokenized data; empty: $JAXLM_CACHE or ~/.cache/jaxlm


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """A tokenizer to load, or the type to train on the training data; model.vocabulary is its size."""

    path: str = ""  # folder, hub name, tokenizer.json, vocab.txt, .model, .gguf, or vocab.json next to merges.txt
    train: Literal["unigram", "bpe", "byte_bpe", "wordpiece", "characters"] = "unigram"  # type to train if no path
    lowercase: bool = False  # convert text to lower case (wordpiece only; the other types are lossless)
    separate: bool = False  # train separate tokenizers for source and target (Seq2Seq); the latter is saved in target/
    sentinels: Count = 0  # number of sentinel tokens <extra_id_0> ... in the vocabulary, for SpanCorruption
    split_special_tokens: bool | None = None  # split special tokens in texts, as other text; None: in pre-training only
    max_training_characters: Characters = 50_000_000  # maximum size of the text sample for training, in characters
