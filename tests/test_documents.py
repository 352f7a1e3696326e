"""The tests run every shell and Python block of README.md and of docs/.

The blocks of a page run in their order in one folder. The folder has the files that the blocks name, and no others. A
cache of the hub has tiny models under the names of the real ones. A block runs unchanged, with the exceptions of three
tables: SMALL_FLAGS has flags that make a run small, SKIPPED has commands that do not run here, with the reason, and
LONG has commands that take minutes. An unknown command is an error, so that no command is skipped without notice.

If a block of `text` follows a shell block, the commands must print all of it, in this order. `...` stands for any text.
If the text begins with `error:`, the last command must fail. A Python block that begins with `# NAME.py` is a file of
that name.
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
from jaxlm import LM, AdapterConfig, TokenizerConfig
from jaxlm.__main__ import main
from jaxlm.config import MeshConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.devices import sharding
from jaxlm.families import PRESETS
from jaxlm.nn.transformer import Transformer
from jaxlm.transforms import adapters

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

TINY = "--model.width 16 --model.layers 1 --model.heads 2"
SMALL_FLAGS = {  # pattern of a command -> flags that follow it; the last of two flags for the same field counts
    "train.py (?!configs/(word2vec|glove))": "--epochs 0 --steps 2 --log-every 1 --sample-tokens 4",
    "quickstart|shakespeare|bert_pretrain|translate|gpt2_124m|mine|small_bert": TINY,
    "quickstart": "--model.vocabulary 360 --data.length 64 --batch 32 --task.stride 0",
    "bert_pretrain|small_bert": "--model.vocabulary 100 --data.length 32",
    "translate": "--model.vocabulary 340 --task.generated 2 --task.decoding.max-new-tokens 4 --task.decoding.beams 2",
    "llama|gpt2_124m|mine": "--batch 8 --data.length 32 --model.vocabulary 408",
    "longformer-base|long-roberta": "--data.length 64",
    "led-base": "--task.source-length 64 --data.length 32 --task.decoding.max-new-tokens 6",
    "llama": f"{TINY} --model.kv-heads 2 --model.head-width 8 --model.mlp-width 16",
    "fsdp 8 --mesh.tensor 2": "--mesh.fsdp 4",  # the tests have eight devices
    "gpt2_124m": "--task.stride 0",
    "plan configs/gpt3": "--model.layers 2",
    "lstm_trec": "--model.vocabulary 200",
    "configs/(preferences|reward)": "--data.length 128",
    "lstm-classifier": "--model.vocabulary 200",
}
SKIPPED = {  # pattern of a command or a Python block -> why it does not run here
    r"^python3 -m venv|pip install": "installs packages; .ci/run does the same",
    r"^source ": "the tests run in an active environment",
    r"^srun ": "requires Slurm; tests/test_hosts.py sets its variables",
    r"^\S*python -m pytest": "runs these tests",
    r"^jaxlm plan .* --fit": "compiles a program for each batch; tests/test_plan.py tests the search",
    r"^python -m sphinx": "takes half a minute; .ci/run does the same",
    r"class WithOwnHead": "tests/test_load.py runs this block and tests its result",
    r"^python -m jaxlm\.inference\.lm_eval": "requires the extra [eval] and downloads; tests/test_lm_eval.py tests it",
}
MODEL = {
    "generate": "decoder",
    "evaluate": "decoder",
    "compress": "decoder",
    "explain": "decoder",
}  # verb -> the model that MODEL stands for; an encoder for others
FAILURES = ("error:", "Unrecognized options")  # the first words of the output if the last command of a block fails
LONG = r"^jaxlm plan|JAXLM_PROCESS=|--sweep"  # commands that take minutes, or start processes


class Block(NamedTuple):
    """A block of a page."""

    line: int  # the number of its first line
    language: str
    text: str
    output: str = ""  # the output that the page shows


def blocks_of(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page. Fails for a block in an unknown language."""
    found: list[Block] = []
    fence = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    end = 0
    for match in fence.finditer(text):
        line, language = text.count("\n", 0, match.start()) + 1, match[1]
        assert language in ("bash", "python", "text", "") or language.startswith("{"), (
            f"{page.name}:{line}: {language!r} is not a language that the tests run; use bash, python or text"
        )
        if language == "text" and found and found[-1].language == "bash" and not text[end : match.start()].strip():
            found[-1] = found[-1]._replace(output=match[2])
        else:
            found.append(Block(line, language, match[2]))
        end = match.end()
    return found


def commands_of(block: str) -> list[list[str]]:
    """Returns the words of each command of a shell block."""
    found: list[list[str]] = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


# Files and models that the blocks name


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
    "roberta-base": ("roberta-base", "wordpiece"),
    "allenai/longformer-base-4096": ("longformer-base-4096", "wordpiece"),
    "allenai/led-base-16384": ("led-base-16384", "byte_bpe"),
}


def lines(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(4, 9))) for _ in range(count)]


def write_files(folder: Path) -> None:
    """Writes the data that the blocks name."""
    write = lambda name, rows: (folder / name).write_text("".join(f"{line}\n" for line in rows))
    rows = [(text, 5 if "good" in text else 1 if "bad" in text else 3) for text in lines(80, 0)]
    for name in ("reviews.csv", "test.csv"):
        write(name, ["review,stars", *(f"{text},{stars}" for text, stars in rows)])
    write("new.csv", ["review", *lines(4, 1)])
    for part, seed in (("train", 2), ("val", 3), ("test", 4), ("new", 5)):
        write(f"{part}.en", lines(60 if part == "train" else 8, seed))
        write(f"{part}.de", [line.upper() for line in lines(60 if part == "train" else 8, seed)])
    (folder / "fineweb").mkdir()
    for part in ("train", "val"):
        (np.arange(2000) % 250).astype(np.uint16).tofile(folder / "fineweb" / f"fineweb_{part}_0.bin")
    kinds = ["NUM:dist How far", "HUM:ind Who", "LOC:city Where"]
    write("TREC.train", [f"{kinds[n % 3]} is {line} ?" for n, line in enumerate(lines(60, 6))])
    for name in ("input.txt", "text.txt", "texts.txt", "corpus.txt"):
        write(name, [f"{a}. {b}." if n % 7 else "" for n, (a, b) in enumerate(zip(lines(200, 7), lines(200, 8)))])
    write("articles.jsonl", [json.dumps({"body": text}) for text in lines(100, 10)])
    papers = zip(lines(100, 11), lines(100, 12))
    write("papers.jsonl", [json.dumps({"article": text, "abstract": summary}) for text, summary in papers])
    pairs = zip(lines(40, 13), lines(40, 14), lines(40, 15))
    write("pairs.jsonl", [json.dumps({"prompt": a, "chosen": b, "rejected": c}) for a, b, c in pairs])
    (folder / "latin.txt").write_bytes("un café\n".encode("iso-8859-1"))
    (folder / "mamba").mkdir()
    (folder / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    write("prompts.txt", ["the film", "a story", "never again"])
    (folder / "corpus").mkdir()
    for name in ("corpus.txt.gz", "corpus/a.txt.gz", "corpus/b.txt.gz"):
        with gzip.open(folder / name, "wt") as file:
            file.write((folder / "corpus.txt").read_text())


def write_models(folder: Path, hub: Path) -> None:
    """Writes tiny models with the names of real ones. Models of the hub have the layout of its cache."""
    models = {}
    for name, (preset, kind) in MODELS.items():
        if (preset, kind) not in models:
            tokenizer = tokenizers.train(lines(300, 9), TokenizerConfig(train=kind), 400 if "byte" in kind else 200)
            small = {"vocabulary": tokenizer.size, "width": 16, "layers": 2, "heads": 2, "mlp_width": 24}
            config = dataclasses.replace(PRESETS[preset], max_length=256, **small)
            config = dataclasses.replace(config, kv_heads=1, head_width=8) if "llama" in preset else config
            models[preset, kind] = LM(config, Transformer(config), random_params(config), tokenizer)
        target = folder / name
        if "-" in name or "/" in name or name == "gpt2":
            cached = hub / f"models--{name.replace('/', '--')}"
            target = cached / "snapshots" / ("0" * 40)
            (cached / "refs").mkdir(parents=True)
            (cached / "refs" / "main").write_text("0" * 40)
        jaxlm.save(models[preset, kind], target)
        if "instruct" in name:
            (target / "chat_template.jinja").write_text(CHAT)
    for name in ("formal", "short"):
        gpt2 = models["gpt2", "byte_bpe"]
        params = adapters.add(gpt2.params, AdapterConfig(2), jax.random.key(0))
        jaxlm.save(dataclasses.replace(gpt2, params=params), folder / name)


@pytest.fixture(scope="module")
def page_files(tmp_path_factory) -> Path:
    """Returns a folder with the files and models that the blocks name. Each page uses a copy of it."""
    folder = tmp_path_factory.mktemp("documents")
    write_models(folder / "files", folder / "hub")
    write_files(folder / "files")
    shutil.copytree(ROOT / "configs", folder / "files" / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder / "files")
    return folder


class Runner:
    """Runs the blocks of a page sequentially in the current folder."""

    def __init__(self, page: Path, capsys: pytest.CaptureFixture[str], devices: Any):
        self.page, self.capsys, self.devices = page, capsys, devices
        tokens = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
        # Names that a Python block may use.
        self.names: dict[str, Any] = {"__name__": "__main__", "tokens_BT": tokens, "mask_BT": np.ones_like(tokens)}
        self.names["mesh"] = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])

    def run_block(self, block: Block) -> None:
        location = f"{self.page.name}:{block.line}"
        name = re.match(r"# ([\w/]+\.py)\n", block.text)
        if block.language == "python" and name:
            Path(name[1]).parent.mkdir(exist_ok=True)
            Path(name[1]).write_text(block.text)
        elif block.language == "python" and not is_skipped(block.text):
            exec(compile("\n" * block.line + block.text, location, "exec"), self.names)
        elif block.language == "bash":
            *before, last = commands_of(block.text)
            output = "".join(self.run_command(command, location) for command in before)
            output += self.run_command(last, location, fails=block.output.startswith(FAILURES))
            text, position = " ".join(output.split()), 0
            for part in block.output.split("..."):
                part = " ".join(part.split())
                assert part in text[position:], f"{location} does not print {part!r} but:\n{output}"
                position = text.index(part, position) + len(part)

    def run_command(self, words: list[str], location: str, fails: bool = False) -> str:
        """Runs a command, unless it is in a table, and returns its output."""
        line = " ".join(words)
        if is_skipped(line) or re.search(LONG, line):
            return ""
        if words[:2] == ["python", "-c"]:  # prints the devices of the machine, not those of the tests
            variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
            return subprocess.run([sys.executable, *words[1:]], env=variables, capture_output=True, text=True).stdout
        environment, arguments = parse_command(words, location)
        self.devices(8 if "--mesh.fsdp" in arguments else 1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                code = main(arguments)
            except SystemExit as end:  # --help
                code = end.code
        output = "".join(self.capsys.readouterr())
        assert code in ((1, 2) if fails else (0,)), f"{location}: {line} ends with {code}:\n{output}"
        return output


def is_skipped(text: str) -> bool:
    return any(re.search(pattern, text, re.MULTILINE) for pattern in SKIPPED)


def parse_command(words: list[str], location: str) -> tuple[dict[str, str], list[str]]:
    """Returns the environment variables of a command, and its arguments of `jaxlm` for a small run."""
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
        raise AssertionError(f"{location}: the tests have no rule to run {line!r}")
    if arguments[0] in ("train", "plan"):
        arguments += [
            flag for pattern, flags in SMALL_FLAGS.items() if re.search(pattern, line) for flag in flags.split()
        ]
    model = MODEL.get(arguments[0], "encoder")
    return environment, [model if word == "MODEL" else word for word in arguments]


@pytest.fixture
def runner(request, page_files, tmp_path, monkeypatch, no_plots, capsys, devices) -> Iterator[Runner]:
    from huggingface_hub import constants

    shutil.copytree(page_files / "files", tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    monkeypatch.syspath_prepend(tmp_path / "files")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(page_files / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(page_files / "hub"))
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    tasks = dict(jaxlm.config.TASK_CONFIGS)
    yield Runner(request.param, capsys, devices)
    for name in {path.stem for path in Path.cwd().glob("*.py")}:
        sys.modules.pop(name, None)
    jaxlm.config.TASK_CONFIGS.clear()
    jaxlm.config.TASK_CONFIGS.update(tasks)


# These pages are for developers of the library. The other pages take minutes.
FAST_PAGES = ("extending.md", "your_task.md", "index.md", "install.md")
PAGE_CASES = [
    pytest.param(page, id=page.name, marks=() if page.name in FAST_PAGES else pytest.mark.long) for page in PAGES
]


@pytest.mark.parametrize("runner", PAGE_CASES, indirect=True)
def test_the_blocks_of_a_page_have_the_output_of_the_page(runner):
    for block in blocks_of(runner.page):
        runner.run_block(block)


def long_commands() -> list[Any]:
    """Returns the commands that take minutes, each once, with a page that has it."""
    found = {}
    for page in PAGES:
        for block in blocks_of(page):
            for command in commands_of(block.text) if block.language == "bash" else ():
                if re.search(LONG, " ".join(command)) and not is_skipped(" ".join(command)):
                    found.setdefault(" ".join(command), pytest.param(page, command, id=f"{page.name}:{block.line}"))
    return list(found.values())


@pytest.mark.long
@pytest.mark.parametrize(("runner", "command"), long_commands(), indirect=["runner"])
def test_long_commands_succeed(runner, command):
    environment, arguments = parse_command(command, runner.page.name)
    if arguments[0] == "plan":
        pytest.importorskip("libtpu")
    count = int(environment.get("JAXLM_PROCESSES", 1))
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    # The compiler of the TPU refuses the flags of the CPU.
    flags = "--xla_force_host_platform_device_count=1" if arguments[0] == "plan" else xla_flags(1)
    settings = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    processes = []
    for n in range(count):
        variables = (
            {"JAXLM_COORDINATOR": address, "JAXLM_PROCESS": f"{n}", "JAXLM_PROCESSES": f"{count}"} if count > 1 else {}
        )
        command = [sys.executable, "-m", "jaxlm", *arguments]
        processes.append(subprocess.Popen(command, env=settings | variables, stderr=subprocess.PIPE, text=True))
    try:
        for process in processes:
            output = process.communicate(timeout=600)[1]
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


LINKED = [*PAGES, *sorted((ROOT / "docs" / "reference").glob("*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_have_a_target(page):
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"https?://|mailto:", link):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name} links to {link}, which does not exist"
            assert not anchor or anchor in anchors(target), (
                f"{page.name} links to {link}; {target.name} has no such heading"
            )


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub and MyST generate them."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.M
    )
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_unknown_commands_and_languages_are_an_error(tmp_path):
    for words in (["curl", "https://example.org"], ["python", "other.py"], ["jaxlmx"]):
        with pytest.raises(AssertionError, match="the tests have no rule to run"):
            parse_command(words, "here")
    (tmp_path / "page.md").write_text("```console\n$ jaxlm\n```\n")
    with pytest.raises(AssertionError, match="'console' is not a language that the tests run"):
        blocks_of(tmp_path / "page.md")
