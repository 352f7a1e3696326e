"""Small data sets and models for notebooks and configs, generated or downloaded, in the same file formats.

    generated                     downloaded                   file
    reviews("reviews.csv")        imdb("reviews.csv")          a table with the columns text and label
    captions("captions")          multi30k("captions")         train, val and test .jsonl with the columns en and de
    articles("articles.txt")      wikitext("articles.txt")     running text; each document begins with a heading
    documentation("python.txt")                                running text that is part of every Python installation
    topics("topics")                                           train and test .csv about the topics of `articles`
    divided("reviews.csv")                                     the rows of a table, split into training and test data
    bert("bert", texts)           a name on the hub            a model in the format of Hugging Face

The generated data comes from small grammars and depends only on the seed. It is much easier than real text, so results
on it show that a method runs, not how well it works.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
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
    """Writes a csv file of generated film reviews with the columns `text` and `label`, positive or negative.

    Most reviews are plain. One in six has a positive and a negative clause, one in twenty is ironic or understated.
    Three percent of the labels are wrong, as in real data, so no classifier can be perfect.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(("negative", "positive"))
        text = _review(draw, label)
        wrong = draw.random() < 0.03
        rows.append((text, {"negative": "positive", "positive": "negative"}[label] if wrong else label))
    return _write_table(path, ("text", "label"), rows)


def _review(draw: random.Random, label: str) -> str:
    kind = draw.random()
    good = label == "positive"
    if kind < 0.05:
        hidden = draw.choice(_UNDERSTATED if good else _IRONY)
        return " ".join([f"I saw it on a {draw.choice(('rainy', 'quiet', 'cold'))} evening.", hidden])
    if kind < 0.22:  # the clause after "but" has the label
        one, other = draw.sample(_PARTS, 2)
        words = (_BAD, _GOOD) if good else (_GOOD, _BAD)
        before, after = (draw.choice(side) for side in words)
        return f"The {one} is {before}, but the {other} is so {after} that nothing else matters."
    sentences = [_sentence(draw, part, good) for part in draw.sample(_PARTS, draw.choice((1, 2, 2, 3)))]
    return " ".join([*sentences, draw.choice(_VERDICTS[label])] if draw.random() < 0.5 else sentences)


def _sentence(draw: random.Random, part: str, good: bool) -> str:
    if draw.random() < 0.2:
        return f"The {part} is not {draw.choice(_BAD if good else _GOOD)} at all."
    return f"The {part} is {draw.choice(_ADVERBS)}{draw.choice(_GOOD if good else _BAD)}."


# Captions in two languages


class _Noun(NamedTuple):
    english: str
    german: str
    gender: str  # m, f or n


def _nouns(words: str) -> tuple[_Noun, ...]:
    return tuple(_Noun(*word.split("/")) for word in words.split())


def _pairs(words: str) -> dict[str, str]:
    """Returns English -> German."""
    return dict(pair.split(" / ") for pair in words.split(", "))


_PEOPLE = _nouns(
    "man/Mann/m woman/Frau/f child/Kind/n girl/Mädchen/n boy/Junge/m teacher/Lehrer/m nurse/Krankenschwester/f "
    "cook/Koch/m"
)
_THINGS = _nouns(
    "ball/Ball/m book/Buch/n bag/Tasche/f hat/Hut/m flower/Blume/f picture/Bild/n cup/Tasse/f chair/Stuhl/m "
    "bicycle/Fahrrad/n lamp/Lampe/f"
)
_OF_PEOPLE = _pairs("young / jung, old / alt, small / klein, tall / groß, tired / müde")
_OF_THINGS = _pairs("red / rot, blue / blau, green / grün, white / weiß, new / neu, small / klein")
_VERBS = {  # by form: transitive, perfect and intransitive
    "does": _pairs(
        "is holding / hält, is carrying / trägt, is painting / malt, is looking for / sucht, is buying / kauft, "
        "is showing / zeigt"
    ),
    "has": _pairs(
        "has bought / gekauft, has found / gefunden, has lost / verloren, has painted / gemalt, has brought / gebracht"
    ),
    "is": _pairs(
        "is sitting / sitzt, is sleeping / schläft, is waiting / wartet, is laughing / lacht, is reading / liest, "
        "is singing / singt"
    ),
}
_PLACES = _pairs(
    "in the park / im Park, on the beach / am Strand, in the snow / im Schnee, at the lake / am See, "
    "in the garden / im Garten, on the street / auf der Straße, in the kitchen / in der Küche, "
    "at the window / am Fenster"
)
# Article and ending of adjectives, in the nominative and in the accusative.
_ENDINGS = {"m": ("ein", "er", "einen", "en"), "f": ("eine", "e", "eine", "e"), "n": ("ein", "es", "ein", "es")}


def captions(folder: StrPath, train: int = 1500, held_out: int = 100, seed: int = 0) -> Path:
    """Writes `train.jsonl`, `val.jsonl` and `test.jsonl` of generated captions with the columns `en` and `de`.

    The German is simple but correct. The finite verb is always the second element and a participle is at the end, so a
    translation has to reorder words. No caption is in more than one file.

    Raises:
      UserError: there are not enough different captions.
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
            raise UserError(f"{train + 2 * held_out:,} captions are more than can be generated; request fewer")
        disk.write(folder / f"{name}.jsonl", "".join(lines))
    return folder


def _caption(draw: random.Random) -> tuple[str, str]:
    who, what = draw.choice(_PEOPLE), draw.choice(_THINGS)
    subject = _phrase(draw, who, _OF_PEOPLE, 0)
    object_ = _phrase(draw, what, _OF_THINGS, 2)
    kind = draw.choice(("does", "does", "has", "is"))
    english, german = draw.choice(list(_VERBS[kind].items()))
    place, ort = draw.choice(list(_PLACES.items())) if kind == "is" or draw.random() < 0.7 else ("", "")
    objects = ([], []) if kind == "is" else ([object_[0]], [object_[1]])
    verb, participle = ("hat", [german]) if kind == "has" else (german, [])
    if place and draw.random() < 0.4:
        en = [place[0].upper() + place[1:], subject[0], english, *objects[0]]
        de = [ort[0].upper() + ort[1:], verb, subject[1], *objects[1], *participle]
    else:
        en = [subject[0][0].upper() + subject[0][1:], english, *objects[0], place]
        de = [subject[1][0].upper() + subject[1][1:], verb, *objects[1], ort, *participle]
    return " ".join(filter(None, en)) + ".", " ".join(filter(None, de)) + "."


def _phrase(draw: random.Random, noun: _Noun, adjectives: dict[str, str], case: int) -> tuple[str, str]:
    """Returns a phrase in English and German, such as "an old man" and "ein alter Mann".

    case: 0 for the nominative, 2 for the accusative.
    """
    article, ending = _ENDINGS[noun.gender][case : case + 2]
    english, german = noun.english, noun.german
    if draw.random() < 0.6:
        adjective, stem = draw.choice(list(adjectives.items()))
        english = f"{adjective} {english}"
        german = f"{stem[:-1] if stem.endswith('e') else stem}{ending} {german}"
    return f"{'an' if english[0] in 'aeiou' else 'a'} {english}", f"{article} {german}"


# Running text

_TOPICS = {
    "animal": ("fox", "otter", "deer", "hare", "wolf", "heron", "badger", "beaver", "squirrel", "lynx"),
    "plant": ("willow", "fern", "thistle", "poppy", "clover", "birch", "nettle", "lily", "maple", "violet"),
    "instrument": ("violin", "flute", "drum", "harp", "trumpet", "cello", "piano", "guitar", "oboe", "organ"),
    "tool": ("hammer", "saw", "chisel", "drill", "spade", "rake", "scythe", "anvil", "file", "pliers"),
}
_SENTENCES = {
    "animal": (
        "The {topic} sleeps in the {0}.",
        "At {1} the {topic} goes out to hunt.",
        "The {topic} eats {2}.",
        "Young animals stay with the mother until {3}.",
        "Its fur is {4}.",
        "Hunters know the tracks of the {topic}.",
    ),
    "plant": (
        "The {topic} grows near the {0}.",
        "The {topic} flowers in {3}.",
        "Its leaves are {4}.",
        "In dry years the {topic} needs much water.",
        "Gardeners sow the {topic} in {3}.",
        "Its roots reach deep into the soil.",
    ),
    "instrument": (
        "The {topic} is played in the {0}.",
        "The sound of the {topic} is {4}.",
        "A concert for the {topic} was written in {3}.",
        "Musicians practise on the {topic} at {1}.",
        "Its tone carries through the whole hall.",
        "The orchestra has a place for the {topic}.",
    ),
    "tool": (
        "The {topic} is made of {2}.",
        "The {topic} hangs in the {0}.",
        "Workers sharpen the {topic} at {1}.",
        "Its handle is {4}.",
        "The smith repairs the {topic} in {3}.",
        "A carpenter needs the {topic} every day.",
    ),
}
_WORDS = {  # for the numbered fields of the sentences
    "animal": (
        "forest den reeds burrow",
        "night dusk dawn",
        "mice fish berries grass",
        "autumn winter",
        "red brown grey thick",
    ),
    "plant": ("river meadow fence marsh", "", "", "spring summer june may", "green narrow round soft"),
    "instrument": (
        "theatre church school opera",
        "home noon",
        "",
        "vienna paris prague london",
        "bright warm deep clear",
    ),
    "tool": (
        "workshop shed barn forge",
        "noon dawn",
        "iron steel wood brass",
        "winter march",
        "short straight heavy smooth",
    ),
}


def articles(path: StrPath, documents: int = 400, seed: int = 0) -> Path:
    """Writes generated running text: documents about one topic each, with one sentence per line.

    A document begins with a heading such as ` = Fox = `. The topics are ten animals, plants, instruments and tools
    each, and the sentences depend on the kind of the topic.
    """
    draw = random.Random(seed)
    lines = []
    for _ in range(documents):
        kind = draw.choice(list(_TOPICS))
        topic = draw.choice(_TOPICS[kind])
        lines += [f" = {topic.capitalize()} = ", ""]
        for sentence in draw.sample(_SENTENCES[kind], 5):
            words = [draw.choice(field.split()) if field else "" for field in _WORDS[kind]]
            lines.append(sentence.format(*words, topic=topic))
        lines.append("")
    return _write(path, "\n".join(lines) + "\n")


_NEUTRAL = (
    "We read about the {topic} at school.",
    "She drew the {topic} in her notebook.",
    "He told us a story about the {topic}.",
    "There is a picture of the {topic} on the wall.",
    "The {topic} is on the next page.",
    "They asked a question about the {topic}.",
)


def topics(folder: StrPath) -> Path:
    """Writes `train.csv` and `test.csv` with the columns `text` and `label`, the kind of topic that a sentence names.

    The sentences reveal the kind only by the name of the topic. The training data has six of the ten topics of each
    kind and the test data the other four, so the test measures what a model has learned from `articles`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", slice(0, 6)), ("test", slice(6, 10))):
        rows = [
            (text.format(topic=topic), kind) for kind in _TOPICS for topic in _TOPICS[kind][part] for text in _NEUTRAL
        ]
        random.Random(0).shuffle(rows)
        _write_table(folder / f"{name}.csv", ("text", "label"), rows)
    return folder


def documentation(path: StrPath) -> Path:
    """Writes the topics of Python's `help()`, almost 500,000 characters of English in every Python installation."""
    from pydoc_data.topics import topics as pages

    return _write(path, "".join(pages[name] for name in sorted(pages)))


def split(path: StrPath, share: float = 0.1, seed: int = 0) -> tuple[Path, Path]:
    """Splits the shuffled rows of a csv file into NAME.train.csv and NAME.test.csv, stratified by the last column.

    Args:
      path: the csv file.
      share: fraction of the rows in the test data.
      seed: seed of the order.

    Returns:
      The paths of the training and test data.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    random.Random(seed).shuffle(rows)
    rows.sort(key=lambda row: row[-1])  # stratifies by class, because every n-th row is test data
    step = round(1 / share)
    parts = {"train": [row for n, row in enumerate(rows) if n % step], "test": rows[::step]}
    for part in parts.values():
        random.Random(seed).shuffle(part)
    train, test = (_write_table(path.with_suffix(f".{name}.csv"), head, part) for name, part in parts.items())
    return train, test


def rows(path: StrPath) -> list[dict[str, str]]:
    """Returns the rows of a csv file, each as column -> text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Models


def bert(folder: StrPath, texts: Iterable[str], vocabulary: int = 300, seed: int = 0, **sizes: Any) -> Path:
    """Writes a small BERT with random weights and a WordPiece tokenizer trained on the texts, unless it exists.

    Args:
      folder: the folder of the model; unchanged if it already contains a model.
      texts: training data of the tokenizer.
      vocabulary: number of tokens.
      seed: seed of the weights.
      sizes: fields of `ModelConfig` that replace the defaults of 2 layers with width 128.

    Raises:
      UserError: the vocabulary is larger than the number of pieces in the texts.
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
    params = jax.jit(partial(init, module))(jax.random.key(seed))
    save(LM(module.config, module, params, words), folder)
    return folder


# Downloads


def download(repository: str, name: str) -> Path:
    """Returns the path of a file of a data set on the Hugging Face hub, which is cached.

    Raises:
      UserError: the file is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the exceptions for network errors differ between versions of the library
        raise UserError(
            f"{name} of the data set {repository} is not in the cache, and the hub cannot be reached "
            f"({type(error).__name__}); check the network and try again, use your own file, or set JAXLM_TINY=1 before "
            f"starting a notebook to generate data instead"
        ) from error


def imdb(path: StrPath, count: int = 5000, seed: int = 0) -> Path:
    """Writes a sample of the 25,000 training reviews of IMDB (Maas et al. 2011), in the format of `reviews`."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(download("stanfordnlp/imdb", "plain_text/train-00000-of-00001.parquet")).to_pylist()
    sample = random.Random(seed).sample(table, count)
    names = ("negative", "positive")
    rows = [(row["text"].replace("<br />", " "), names[row["label"]]) for row in sample]
    return _write_table(path, ("text", "label"), rows)


def multi30k(folder: StrPath) -> Path:
    """Writes the 29,000 training, 1,014 validation and 1,000 test captions of Multi30k (Elliott et al. 2016)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "val", "test"):
        disk.write(folder / f"{part}.jsonl", download("bentrevett/multi30k", f"{part}.jsonl").read_bytes())
    return folder


def wikitext(path: StrPath) -> Path:
    """Writes the training part of WikiText-2 (Merity et al. 2016), 11 MB, in the format of `articles`."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(download("Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"))
    return _write(path, "".join(table["text"].to_pylist()))


def _write_table(path: StrPath, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    return _write(path, file.getvalue())


def _write(path: StrPath, text: str) -> Path:
    """Writes a file atomically, because another process may write it at the same time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write(path, text)
    return path
