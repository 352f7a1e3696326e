"""Data to try things with: made up on the spot, or fetched from the hub, in the same files.

    made here                     fetched                      file
    reviews("reviews.csv")        imdb("reviews.csv")          a table with the columns text and label
    captions("captions")          multi30k("captions")         train, val and test .jsonl with the columns en and de
    articles("articles.txt")      wikitext("articles.txt")     running text; headings begin the documents
    documentation("python.txt")                                running text, which every Python carries
    topics("topics")                                           train and test .csv about the things of `articles`
    divided("reviews.csv")                                     a part to train on and one to test
    bert("bert", texts)           a hub name                   a model in Hugging Face's format

What is made here comes from small grammars, the same for the same seed, and is easy beside real text: it shows how
something is done, and says nothing of how well it works.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError
from jaxlm.storage import disk

StrPath = str | Path

# Reviews

_PARTS = ("story", "acting", "music", "ending", "dialogue", "camera work", "pace", "cast", "script", "first half")
_ADVERBS = ("", "", "", "really ", "quite ", "simply ", "truly ")
_GOOD = ("wonderful", "moving", "clever", "funny", "gripping", "charming", "superb", "honest", "warm", "brilliant")
_BAD = ("dull", "clumsy", "boring", "tired", "lifeless", "predictable", "messy", "awful", "hollow", "weak")
_VERDICTS = {
    "positive": (
        "I would see it again tomorrow.",
        "Go and see it.",
        "One of the best of the year.",
        "I left the cinema smiling.",
        "My whole family loved it.",
    ),
    "negative": (
        "I left before the end.",
        "Save your money.",
        "One of the worst of the year.",
        "I looked at my watch all the time.",
        "My whole family hated it.",
    ),
}
_IRONY = (
    "What a wonderful way to lose two hours of my life.",
    "Brilliant, if you cannot sleep.",
    "A truly superb reason to stay at home.",
)
_UNDERSTATED = (
    "I have seen worse, and seldom better.",
    "I wanted to hate it and could not.",
    "Nobody warned me that I would cry.",
)


def reviews(path: StrPath, count: int = 1000, seed: int = 0) -> Path:
    """Writes a csv file of made-up film reviews with the columns `text` and `label`, positive or negative.

    Most are plain.  A sixth weighs good against bad, a twentieth is ironic or understated, and three in a hundred bear
    the wrong label, as in every table that people made: so no classifier gets all of them right.
    """
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(("negative", "positive"))
        text = _review(draw, label)
        wrong = draw.random() < 0.03
        made.append((text, {"negative": "positive", "positive": "negative"}[label] if wrong else label))
    return _table(path, ("text", "label"), made)


def _review(draw: random.Random, label: str) -> str:
    kind = draw.random()
    good = label == "positive"
    if kind < 0.05:
        hidden = draw.choice(_UNDERSTATED if good else _IRONY)
        return " ".join([f"I saw it on a {draw.choice(('rainy', 'quiet', 'cold'))} evening.", hidden])
    if kind < 0.22:  # what comes after "but" decides
        one, other = draw.sample(_PARTS, 2)
        words = (_BAD, _GOOD) if good else (_GOOD, _BAD)
        before, after = (draw.choice(side) for side in words)
        return f"The {one} is {before}, but the {other} is so {after} that nothing else matters."
    said = [_sentence(draw, part, good) for part in draw.sample(_PARTS, draw.choice((1, 2, 2, 3)))]
    return " ".join([*said, draw.choice(_VERDICTS[label])] if draw.random() < 0.5 else said)


def _sentence(draw: random.Random, part: str, good: bool) -> str:
    if draw.random() < 0.2:
        return f"The {part} is not {draw.choice(_BAD if good else _GOOD)} at all."
    return f"The {part} is {draw.choice(_ADVERBS)}{draw.choice(_GOOD if good else _BAD)}."


# Captions in two languages


class _Noun(NamedTuple):
    english: str
    german: str
    gender: str  # m, f or n


_WHO = (
    _Noun("man", "Mann", "m"),
    _Noun("woman", "Frau", "f"),
    _Noun("child", "Kind", "n"),
    _Noun("girl", "Mädchen", "n"),
    _Noun("boy", "Junge", "m"),
    _Noun("teacher", "Lehrer", "m"),
    _Noun("nurse", "Krankenschwester", "f"),
    _Noun("cook", "Koch", "m"),
)
_WHAT = (
    _Noun("ball", "Ball", "m"),
    _Noun("book", "Buch", "n"),
    _Noun("bag", "Tasche", "f"),
    _Noun("hat", "Hut", "m"),
    _Noun("flower", "Blume", "f"),
    _Noun("picture", "Bild", "n"),
    _Noun("cup", "Tasse", "f"),
    _Noun("chair", "Stuhl", "m"),
    _Noun("bicycle", "Fahrrad", "n"),
    _Noun("lamp", "Lampe", "f"),
)
_OF_WHO = {"young": "jung", "old": "alt", "small": "klein", "tall": "groß", "tired": "müde"}
_OF_WHAT = {"red": "rot", "blue": "blau", "green": "grün", "white": "weiß", "new": "neu", "small": "klein"}
_DOES = {
    "is holding": "hält",
    "is carrying": "trägt",
    "is painting": "malt",
    "is looking for": "sucht",
    "is buying": "kauft",
    "is showing": "zeigt",
}
_HAS = {
    "has bought": "gekauft",
    "has found": "gefunden",
    "has lost": "verloren",
    "has painted": "gemalt",
    "has brought": "gebracht",
}
_IS = {
    "is sitting": "sitzt",
    "is sleeping": "schläft",
    "is waiting": "wartet",
    "is laughing": "lacht",
    "is reading": "liest",
    "is singing": "singt",
}
_WHERE = {
    "in the park": "im Park",
    "on the beach": "am Strand",
    "in the snow": "im Schnee",
    "at the lake": "am See",
    "in the garden": "im Garten",
    "on the street": "auf der Straße",
    "in the kitchen": "in der Küche",
    "at the window": "am Fenster",
}
_ENDINGS = {"m": ("ein", "er", "einen", "en"), "f": ("eine", "e", "eine", "e"), "n": ("ein", "es", "ein", "es")}


def captions(folder: StrPath, train: int = 1500, held_out: int = 100, seed: int = 0) -> Path:
    """Writes `train.jsonl`, `val.jsonl` and `test.jsonl` of made-up captions with the columns `en` and `de`.

    The German is plain and right.  Its verb comes second, also where the place comes first, and a participle last, so
    that a translation has to move words.  No caption of one file stands in another.
    """
    draw, seen = random.Random(seed), set()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("val", held_out), ("test", held_out)):
        lines: list[str] = []
        misses = 0
        while len(lines) < count and misses < 1000:
            pair = _caption(draw)
            misses = misses + 1 if pair[0] in seen else 0
            if not misses:
                seen.add(pair[0])
                lines.append(json.dumps(dict(zip(("en", "de"), pair)), ensure_ascii=False) + "\n")
        if misses:
            raise UserError(f"{train:,} and twice {held_out:,} captions are more than there are; ask for fewer")
        disk.write(folder / f"{name}.jsonl", "".join(lines))
    return folder


def _caption(draw: random.Random) -> tuple[str, str]:
    who, what = draw.choice(_WHO), draw.choice(_WHAT)
    nominative = _phrase(draw, who, _OF_WHO, 0)
    accusative = _phrase(draw, what, _OF_WHAT, 2)
    kind = draw.choice(("does", "does", "has", "is"))
    english, german = draw.choice(list({"does": _DOES, "has": _HAS, "is": _IS}[kind].items()))
    there, dort = draw.choice(list(_WHERE.items())) if kind == "is" or draw.random() < 0.7 else ("", "")
    objects = ([], []) if kind == "is" else ([accusative[0]], [accusative[1]])
    verb, last = ("hat", [german]) if kind == "has" else (german, [])
    if there and draw.random() < 0.4:
        en = [there[0].upper() + there[1:], nominative[0], english, *objects[0]]
        de = [dort[0].upper() + dort[1:], verb, nominative[1], *objects[1], *last]
    else:
        en = [nominative[0][0].upper() + nominative[0][1:], english, *objects[0], there]
        de = [nominative[1][0].upper() + nominative[1][1:], verb, *objects[1], dort, *last]
    return " ".join(filter(None, en)) + ".", " ".join(filter(None, de)) + "."


def _phrase(draw: random.Random, noun: _Noun, adjectives: dict[str, str], case: int) -> tuple[str, str]:
    """ "an old man" and "ein alter Mann"; case: 0 nominative, 2 accusative."""
    article, ending = _ENDINGS[noun.gender][case : case + 2]
    english, german = noun.english, noun.german
    if draw.random() < 0.6:
        adjective, stem = draw.choice(list(adjectives.items()))
        english = f"{adjective} {english}"
        german = f"{stem[:-1] if stem.endswith('e') else stem}{ending} {german}"
    return f"{'an' if english[0] in 'aeiou' else 'a'} {english}", f"{article} {german}"


# Running text

_THINGS = {
    "animal": ("fox", "otter", "deer", "hare", "wolf", "heron", "badger", "beaver", "squirrel", "lynx"),
    "plant": ("willow", "fern", "thistle", "poppy", "clover", "birch", "nettle", "lily", "maple", "violet"),
    "instrument": ("violin", "flute", "drum", "harp", "trumpet", "cello", "piano", "guitar", "oboe", "organ"),
    "tool": ("hammer", "saw", "chisel", "drill", "spade", "rake", "scythe", "anvil", "file", "pliers"),
}
_SAID = {
    "animal": (
        "The {thing} sleeps in the {0}.",
        "At {1} the {thing} goes out to hunt.",
        "The {thing} eats {2}.",
        "Young animals stay with the mother until {3}.",
        "Its fur is {4}.",
        "Hunters know the tracks of the {thing}.",
    ),
    "plant": (
        "The {thing} grows near the {0}.",
        "The {thing} flowers in {3}.",
        "Its leaves are {4}.",
        "In dry years the {thing} needs much water.",
        "Gardeners sow the {thing} in {3}.",
        "Its roots reach deep into the soil.",
    ),
    "instrument": (
        "The {thing} is played in the {0}.",
        "The sound of the {thing} is {4}.",
        "A concert for the {thing} was written in {3}.",
        "Musicians practise on the {thing} at {1}.",
        "Its tone carries through the whole hall.",
        "The orchestra has a place for the {thing}.",
    ),
    "tool": (
        "The {thing} is made of {2}.",
        "The {thing} hangs in the {0}.",
        "Workers sharpen the {thing} at {1}.",
        "Its handle is {4}.",
        "The smith repairs the {thing} in {3}.",
        "A carpenter needs the {thing} every day.",
    ),
}
_FILLED: dict[str, tuple[tuple[str, ...], ...]] = {
    "animal": (
        ("forest", "den", "reeds", "burrow"),
        ("night", "dusk", "dawn"),
        ("mice", "fish", "berries", "grass"),
        ("autumn", "winter"),
        ("red", "brown", "grey", "thick"),
    ),
    "plant": (
        ("river", "meadow", "fence", "marsh"),
        (),
        (),
        ("spring", "summer", "june", "may"),
        ("green", "narrow", "round", "soft"),
    ),
    "instrument": (
        ("theatre", "church", "school", "opera"),
        ("home", "noon"),
        (),
        ("vienna", "paris", "prague", "london"),
        ("bright", "warm", "deep", "clear"),
    ),
    "tool": (
        ("workshop", "shed", "barn", "forge"),
        ("noon", "dawn"),
        ("iron", "steel", "wood", "brass"),
        ("winter", "march"),
        ("short", "straight", "heavy", "smooth"),
    ),
}


def articles(path: StrPath, documents: int = 400, seed: int = 0) -> Path:
    """Writes made-up running text: documents under a heading ` = Fox = `, each about one thing, a sentence a line.

    Ten animals, plants, instruments and tools each; what is said of one depends on the kind of thing that it is.
    """
    draw = random.Random(seed)
    lines = []
    for _ in range(documents):
        kind = draw.choice(list(_THINGS))
        thing = draw.choice(_THINGS[kind])
        lines += [f" = {thing.capitalize()} = ", ""]
        for sentence in draw.sample(_SAID[kind], 5):
            words = [draw.choice(some) if some else "" for some in _FILLED[kind]]
            lines.append(sentence.format(*words, thing=thing))
        lines.append("")
    return _written(path, "\n".join(lines) + "\n")


_NEUTRAL = (
    "We read about the {thing} at school.",
    "She drew the {thing} in her notebook.",
    "He told us a story about the {thing}.",
    "There is a picture of the {thing} on the wall.",
    "The {thing} is on the next page.",
    "They asked a question about the {thing}.",
)


def topics(folder: StrPath) -> Path:
    """Writes `train.csv` and `test.csv` with the columns `text` and `label`: which kind of thing a sentence names.

    The sentences give no hint but the name, and the test names other things than the training part, six of ten of each
    kind against four: what a model knows of those it has read in `articles`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, which in (("train", slice(0, 6)), ("test", slice(6, 10))):
        said = [
            (text.format(thing=thing), kind) for kind in _THINGS for thing in _THINGS[kind][which] for text in _NEUTRAL
        ]
        random.Random(0).shuffle(said)
        _table(folder / f"{name}.csv", ("text", "label"), said)
    return folder


def documentation(path: StrPath) -> Path:
    """Writes the topics of Python's own `help()`, almost 500,000 characters of English that every installation has."""
    from pydoc_data.topics import topics as pages

    return _written(path, "".join(pages[name] for name in sorted(pages)))


def divided(path: StrPath, share: float = 0.1, seed: int = 0) -> tuple[Path, Path]:
    """Writes the rows of a csv file, in another order, to NAME.train.csv and, of each class alike, NAME.test.csv.

    share: of the rows that go to the test.  The classes are those of the last column.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: row[-1])  # every n-th row goes to the test: of each class alike
    step = round(1 / share)
    parts = {"train": [row for n, row in enumerate(rows) if n % step], "test": rows[::step]}
    for part in parts.values():
        random.Random(seed).shuffle(part)
    train, test = (_table(path.with_suffix(f".{name}.csv"), head, part) for name, part in parts.items())
    return train, test


def rows(path: StrPath) -> list[dict[str, str]]:
    """The rows of a csv file, by column."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Models


def bert(folder: StrPath, texts: Iterable[str], vocabulary: int = 300, seed: int = 0, **sizes: Any) -> Path:
    """Writes a small BERT with random weights, and a WordPiece tokenizer trained on the texts, for transformers too.

    sizes: fields of `ModelConfig` in place of 2 layers of width 128.  A folder that holds a model already is left as it
    is.  Raises UserError where the texts have fewer pieces than the vocabulary.
    """
    import jax

    from jaxlm.config import TokenizerConfig
    from jaxlm.data.tokenizers import tokenizer
    from jaxlm.families import PRESETS
    from jaxlm.lm import LM, save
    from jaxlm.nn.transformer import Transformer, init

    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    words = tokenizer.train(texts, TokenizerConfig(train="wordpiece", lowercase=True), vocabulary)
    config = replace(PRESETS["bert-tiny"], heads_on_top=("masked_lm",), vocabulary=vocabulary, max_length=128)
    module = Transformer(replace(config, **sizes))
    save(LM(module.config, module, init(module, jax.random.key(seed)), words), folder)
    return folder


# The real thing


def fetched(repository: str, name: str) -> Path:
    """A file of a data set of the Hugging Face hub, from the cache or downloaded.

    Raises UserError where neither is possible, with what else can be done.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the errors of the network are those of another library in each major version
        raise UserError(
            f"{name} of the data set {repository} is not in the cache, and the hub cannot be reached "
            f"({type(error).__name__}); fix the network and give this again, use a file of your own, or set "
            f"JAXLM_TINY=1 before a notebook starts: it then makes its data itself"
        ) from error


def imdb(path: StrPath, count: int = 5000, seed: int = 0) -> Path:
    """Writes so many of the 25,000 training reviews of IMDB (Maas et al. 2011) as `reviews` writes its own."""
    import pyarrow.parquet as parquet

    found = parquet.read_table(fetched("stanfordnlp/imdb", "plain_text/train-00000-of-00001.parquet")).to_pylist()
    some = random.Random(seed).sample(found, count)
    names = ("negative", "positive")
    return _table(path, ("text", "label"), ((r["text"].replace("<br />", " "), names[r["label"]]) for r in some))


def multi30k(folder: StrPath) -> Path:
    """Writes the 29,000 training, 1,014 validation and 1,000 test captions of Multi30k (Elliott et al. 2016)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        disk.write(folder / f"{part}.jsonl", fetched("bentrevett/multi30k", f"{part}.jsonl").read_bytes())
    return folder


def wikitext(path: StrPath) -> Path:
    """Writes the training part of WikiText-2 (Merity et al. 2016), 11 MB, as `articles` writes its own."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(fetched("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"))
    return _written(path, "".join(table["text"].to_pylist()))


def _table(path: StrPath, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return _written(path, file.getvalue())


def _written(path: StrPath, text: str) -> Path:
    """Whole or not at all: another process may write it at the same time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, text)
    return path
