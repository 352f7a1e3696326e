"""Every shell and Python block of README.md and of docs/ does what it says.

A page is read from top to bottom, and its blocks run in that order in one folder, as a reader would give them: there
lie the files that the blocks name, a cache of the hub with tiny models under the names of the real ones, and nothing
else.  A block runs word for word, but for what stands in three tables here: flags behind a command that make a run
small (SMALLER), commands that run elsewhere, with the reason (ELSEWHERE), and commands that take minutes (LONG).  What
is in no table and is no command that this file knows is an error, so that nothing is left out in silence.

Where a block of `text` follows a shell block, it is what the command says: all of it, in this order, `...` standing for
anything.  One that begins with `error:` is of a command that fails.  A Python block that begins with `# NAME.py` is a
file of that name.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flags import xla_flags
from random_params import random_params

import jaxlm
from jaxlm import LM, TokenizerConfig
from jaxlm.__main__ import main
from jaxlm.config import MeshConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.nn.transformer import Transformer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY = "--model.width 16 --model.layers 1 --model.heads 2"
SMALLER = {  # what a command matches -> flags that are put behind it; of two for the same field the last counts
    "train.py": "--epochs 0 --steps 2 --log-every 1 --sample-tokens 4",
    "quickstart|shakespeare|bert_pretrain|translate|gpt2_124m|mine|small_bert": TINY,
    "quickstart": "--model.vocabulary 360 --data.length 64 --batch 32 --task.stride 0",
    "bert_pretrain|small_bert": "--model.vocabulary 100 --data.length 32",
    "translate": "--model.vocabulary 340 --task.generated 2 --task.decoding.max-new-tokens 4 --task.decoding.beams 2",
    "llama|gpt2_124m|mine": "--batch 8 --data.length 32 --model.vocabulary 408",
    "llama": f"{TINY} --model.kv-heads 2 --model.head-width 8 --model.mlp-width 16",
    "fsdp 8 --mesh.tensor 2": "--mesh.fsdp 4",  # eight devices are here
    "gpt2_124m": "--task.stride 0",
    "plan configs/gpt3": "--model.layers 2",
}
ELSEWHERE = {  # what a command, or a Python block, matches -> why it does not run here
    r"^python3 -m venv|pip install": "installs; .ci/run does",
    r"^source ": "the tests run in an environment that is active",
    r"^srun ": "Slurm is not here; tests/test_hosts.py has what it sets",
    r"^\S*python -m pytest": "these tests",
    r"^jaxlm plan .* --fit": "compiles a program for each batch, which takes long; tests/test_plan.py has the search",
    r"^python -m sphinx": "half a minute; .ci/run does",
    r"class WithOwnHead": "tests/test_load.py runs this block, and looks at what comes out",
    r"^python -m jaxlm\.inference\.lm_eval": "needs the extra [eval] and downloads; tests/test_lm_eval.py has it",
}
MODEL = {"generate": "decoder", "evaluate": "decoder"}  # verb or config -> what MODEL stands for there; else an encoder
FAILED = ("error:", "Unrecognized options")  # how the text behind a block begins whose last command fails
LONG = r"^jaxlm plan|JAXLM_PROCESS=|--sweep"  # commands that take minutes, or processes of their own


class Block(NamedTuple):
    """A block of a page."""

    line: int  # where it begins
    language: str
    text: str
    printed: str = ""  # what the page says that it prints


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page.  Fails for one whose language is none of those that are known."""
    found: list[Block] = []
    fence = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    end = 0
    for match in fence.finditer(text):
        line, language = text.count("\n", 0, match.start()) + 1, match[1]
        assert language in ("bash", "python", "text", "") or language.startswith("{"), (
            f"{page.name}:{line}: {language!r} is no language that the tests run; say bash, python or text"
        )
        if language == "text" and found and found[-1].language == "bash" and not text[end : match.start()].strip():
            found[-1] = found[-1]._replace(printed=match[2])
        else:
            found.append(Block(line, language, match[2]))
        end = match.end()
    return found


def commands_of(block: str) -> list[list[str]]:
    """The words of each command of a shell block."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


# What the blocks name


WORDS = re.findall("[a-z]{2,}", (ROOT / "README.md").read_text().lower())[:300] + ["good", "bad"] * 20
CHAT = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
MODELS = {  # folder or hub name -> preset, tokenizer
    "encoder": ("bert-base", "wordpiece"),
    "decoder": ("gpt2", "byte_bpe"),
    "SOURCE": ("bert-base", "wordpiece"),
    "bert-base-uncased": ("bert-base", "wordpiece"),
    "org/name": ("bert-base", "wordpiece"),
    "org/name-instruct": ("llama-3.2-1b", "byte_bpe"),
    "meta-llama/Llama-3.1-8B": ("llama-3.2-1b", "byte_bpe"),
    "gpt2": ("gpt2", "byte_bpe"),
}


def lines(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(4, 9))) for _ in range(count)]


def write_files(folder: Path) -> None:
    """The data that the blocks name."""
    write = lambda name, some: (folder / name).write_text("".join(f"{line}\n" for line in some))
    rows = [(text, 5 if "good" in text else 1 if "bad" in text else 3) for text in lines(80, 0)]
    for name in ("reviews.csv", "test.csv"):
        write(name, ["review,stars", *(f"{text},{stars}" for text, stars in rows)])
    write("new.csv", ["review", *lines(4, 1)])
    for part, seed in (("train", 2), ("val", 3), ("test", 4), ("new", 5)):
        write(f"{part}.en", lines(60 if part == "train" else 8, seed))
        write(f"{part}.de", [line.upper() for line in lines(60 if part == "train" else 8, seed)])
    kinds = ["NUM:dist How far", "HUM:ind Who", "LOC:city Where"]
    write("TREC.train", [f"{kinds[n % 3]} is {line} ?" for n, line in enumerate(lines(60, 6))])
    for name in ("input.txt", "text.txt", "texts.txt", "corpus.txt"):
        write(name, [f"{a}. {b}." if n % 7 else "" for n, (a, b) in enumerate(zip(lines(200, 7), lines(200, 8)))])
    write("articles.jsonl", [json.dumps({"body": text}) for text in lines(100, 10)])
    (folder / "latin.txt").write_bytes("un café\n".encode("iso-8859-1"))
    (folder / "falcon").mkdir()
    (folder / "falcon" / "config.json").write_text('{"model_type": "falcon"}')
    write("prompts.txt", ["the film", "a story", "never again"])
    (folder / "corpus").mkdir()
    for name in ("corpus.txt.gz", "corpus/a.txt.gz", "corpus/b.txt.gz"):
        with gzip.open(folder / name, "wt") as file:
            file.write((folder / "corpus.txt").read_text())


def write_models(folder: Path, hub: Path) -> None:
    """Tiny models with the names of real ones: those of the hub in its cache, as its library lays them out."""
    made = {}
    for name, (preset, kind) in MODELS.items():
        if (preset, kind) not in made:
            tokenizer = tokenizers.train(lines(300, 9), TokenizerConfig(train=kind), 400 if "byte" in kind else 200)
            small = {"vocabulary": tokenizer.size, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
            config = dataclasses.replace(PRESETS[preset], max_length=256, **small)
            config = dataclasses.replace(config, kv_heads=1, head_width=8) if "llama" in preset else config
            made[preset, kind] = LM(config, Transformer(config), random_params(config), tokenizer)
        target = folder / name
        if "-" in name or "/" in name or name == "gpt2":
            cached = hub / f"models--{name.replace('/', '--')}"
            target = cached / "snapshots" / ("0" * 40)
            (cached / "refs").mkdir(parents=True)
            (cached / "refs" / "main").write_text("0" * 40)
        jaxlm.save(made[preset, kind], target)
        if "instruct" in name:
            (target / "chat_template.jinja").write_text(CHAT)


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A folder with all that the blocks name, which each page gets a copy of."""
    folder = tmp_path_factory.mktemp("documents")
    write_models(folder / "here", folder / "hub")
    write_files(folder / "here")
    shutil.copytree(ROOT / "configs", folder / "here" / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder / "here")
    return folder


class Reader:
    """Gives the blocks of a page, one after the other, in a folder."""

    def __init__(self, page: Path, capsys: pytest.CaptureFixture[str], devices: Any):
        self.page, self.capsys, self.devices = page, capsys, devices
        tokens = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
        # What a Python block may take as given.
        self.names: dict[str, Any] = {"__name__": "__main__", "tokens_BT": tokens, "mask_BT": np.ones_like(tokens)}
        self.names["mesh"] = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])

    def read(self, block: Block) -> None:
        where = f"{self.page.name}:{block.line}"
        name = re.match(r"# ([\w/]+\.py)\n", block.text)
        if block.language == "python" and name:
            Path(name[1]).parent.mkdir(exist_ok=True)
            Path(name[1]).write_text(block.text)
        elif block.language == "python" and not elsewhere(block.text):
            exec(compile("\n" * block.line + block.text, where, "exec"), self.names)
        elif block.language == "bash":
            *before, last = commands_of(block.text)
            said = "".join(self.give(command, where) for command in before)
            said += self.give(last, where, fails=block.printed.startswith(FAILED))
            told, at = " ".join(said.split()), 0
            for part in block.printed.split("..."):
                part = " ".join(part.split())
                assert part in told[at:], f"{where} does not say {part!r} but:\n{said}"
                at = told.index(part, at) + len(part)

    def give(self, words: list[str], where: str, fails: bool = False) -> str:
        """Runs a command, unless it runs elsewhere, and returns what it says."""
        line = " ".join(words)
        if elsewhere(line) or re.search(LONG, line):
            return ""
        if words[:2] == ["python", "-c"]:  # sees the devices that there are, not those of the tests
            alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
            return subprocess.run([sys.executable, *words[1:]], env=alone, capture_output=True, text=True).stdout
        environment, arguments = understood(words, where)
        self.devices(8 if "--mesh.fsdp" in arguments else 1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                code = main(arguments)
            except SystemExit as end:  # --help
                code = end.code
        said = "".join(self.capsys.readouterr())
        assert code in ((1, 2) if fails else (0,)), f"{where}: {line} ends with {code}:\n{said}"
        return said


def elsewhere(text: str) -> bool:
    return any(re.search(some, text, re.MULTILINE) for some in ELSEWHERE)


def understood(words: list[str], where: str) -> tuple[dict[str, str], list[str]]:
    """What a command sets in the environment, and the arguments of `jaxlm` that it stands for, small ones."""
    line = " ".join(words)
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words[0].partition("=")
        words = words[1:]
    for program in (["python", "train.py"], [".venv/bin/python", "train.py"], ["python", "-m", "jaxlm"], ["jaxlm"]):
        if words[: len(program)] == program:
            arguments = ["train"] * ("train.py" in program) + words[len(program) :]
            break
    else:
        raise AssertionError(f"{where}: nobody has told the tests how to run {line!r}")
    if arguments[0] in ("train", "plan"):
        arguments += [flag for some, flags in SMALLER.items() if re.search(some, line) for flag in flags.split()]
    model = MODEL.get(arguments[0], "encoder")
    return environment, [model if word == "MODEL" else word for word in arguments]


@pytest.fixture
def reader(request, things, tmp_path, monkeypatch, no_pictures, capsys, devices) -> Iterator[Reader]:
    from huggingface_hub import constants

    shutil.copytree(things / "here", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(things / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(things / "hub"))
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    tasks = dict(jaxlm.config.TASK_CONFIGS)
    yield Reader(request.param, capsys, devices)
    for name in {path.stem for path in Path.cwd().glob("*.py")}:
        sys.modules.pop(name, None)
    jaxlm.config.TASK_CONFIGS.clear()
    jaxlm.config.TASK_CONFIGS.update(tasks)


# The pages for those who change the library; the others take minutes.
FIRST = ("extending.md", "your_task.md", "index.md", "install.md")
READ = [pytest.param(page, id=page.name, marks=() if page.name in FIRST else pytest.mark.long) for page in PAGES]


@pytest.mark.parametrize("reader", READ, indirect=True)
def test_the_blocks_of_a_page_do_what_it_says(reader):
    for block in blocks_of(reader.page):
        reader.read(block)


def long_ones() -> list[Any]:
    """The commands that take minutes, each once, with a page that it is on."""
    found = {}
    for page in PAGES:
        for block in blocks_of(page):
            for command in commands_of(block.text) if block.language == "bash" else ():
                if re.search(LONG, " ".join(command)) and not elsewhere(" ".join(command)):
                    found.setdefault(" ".join(command), pytest.param(page, command, id=f"{page.name}:{block.line}"))
    return list(found.values())


@pytest.mark.long
@pytest.mark.parametrize(("reader", "command"), long_ones(), indirect=["reader"])
def test_what_takes_minutes(reader, command):
    environment, arguments = understood(command, reader.page.name)
    if arguments[0] == "plan":
        pytest.importorskip("libtpu")
    count = int(environment.get("JAXLM_PROCESSES", 1))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    # The TPU's compiler refuses the flags of the CPU's.
    flags = "--xla_force_host_platform_device_count=1" if arguments[0] == "plan" else xla_flags(1)
    settings = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    begun = []
    for n in range(count):
        told = {"JAXLM_COORDINATOR": place, "JAXLM_PROCESS": f"{n}", "JAXLM_PROCESSES": f"{count}"} if count > 1 else {}
        command = [sys.executable, "-m", "jaxlm", *arguments]
        begun.append(subprocess.Popen(command, env=settings | told, stderr=subprocess.PIPE, text=True))
    try:
        for process in begun:
            said = process.communicate(timeout=600)[1]
            assert process.returncode == 0, said
    finally:
        for process in begun:
            process.kill()


LINKED = [*PAGES, *sorted((ROOT / "docs" / "reference").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?://|mailto:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {link}, which is not there"
            assert not anchor or anchor in anchors(target), (
                f"{page.name} links to {link}; {target.name} has no such heading"
            )


def anchors(page: Path) -> set[str]:
    """Those of the headings of a page, as GitHub and MyST make them."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_what_is_no_command_that_is_known_is_an_error(tmp_path):
    for words in (["curl", "https://example.org"], ["python", "other.py"], ["jaxlmx"]):
        with pytest.raises(AssertionError, match="nobody has told the tests how to run"):
            understood(words, "here")
    (tmp_path / "page.md").write_text("```console\n$ jaxlm\n```\n")
    with pytest.raises(AssertionError, match="'console' is no language that the tests run"):
        blocks_of(tmp_path / "page.md")
