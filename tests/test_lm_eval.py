"""lm-evaluation-harness runs a jaxlm model on local tasks, and its scores equal those of a manual computation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from functools import lru_cache

import pytest
from random_params import random_params

import jaxlm
from jaxlm.config import ModelConfig, TokenizerConfig
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.inference.likelihood import log_likelihoods
from jaxlm.lm import LM
from jaxlm.nn.transformer import Transformer

with warnings.catch_warnings():  # of its dependencies
    warnings.simplefilter("ignore")
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness, the extra eval, is not installed")
    from lm_eval.tasks import TaskManager

    from jaxlm.inference.lm_eval import Harness

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TEXT = "the quick brown fox jumps over a lazy dog\n"
CONFIG = ModelConfig(vocabulary=48, width=16, layers=2, heads=2, max_length=64)
CHOICES = [
    {"question": "the quick brown", "choices": ["fox", "dog", "lazy fox"], "answer": 0},
    {"question": "jumps over a", "choices": ["dog", "lazy dog", "quick"], "answer": 1},
    {"question": "a", "choices": ["b", "z", "o"], "answer": 2},
]
TEXTS = [{"text": TEXT * 4}, {"text": "a lazy dog"}]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["q"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@lru_cache
def lm() -> LM:
    tokenizer = tokenizers.train([TEXT], TokenizerConfig(train="characters"), 48, add_bos=True)
    return LM(CONFIG, Transformer(CONFIG), random_params(CONFIG, std=0.3), tokenizer)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Returns a folder with the tasks and their data."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, task in TASKS.items():
        rows = TEXTS if name == "rolling" else CHOICES
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = json.dumps({"data_files": {"test": str(tmp_path / f"{name}.jsonl")}})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + task)
    return tmp_path


def evaluate_task(model: Harness, tasks, name: str, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = harness.simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, **options)
    return found["results"][name], found["samples"][name]


def test_scores_of_multiple_choice_are_those_of_the_likelihoods(tasks):
    scores, samples = evaluate_task(Harness(lm()), tasks, "choice")
    right = by_length = 0
    for row, sample in zip(CHOICES, samples):
        found = log_likelihoods(lm(), [(row["question"], f" {choice}") for choice in row["choices"]])
        total = [one.log_probability for one in found]
        assert [r[0] for r in sample["filtered_resps"]] == pytest.approx(total, rel=1e-6)
        right += total.index(max(total)) == row["answer"]
        mean = [value / len(choice) for value, choice in zip(total, row["choices"])]
        by_length += mean.index(max(mean)) == row["answer"]
    assert scores["acc,none"] == pytest.approx(right / 3)
    assert scores["acc_norm,none"] == pytest.approx(by_length / 3)


def test_perplexity_is_that_of_the_windows_of_the_harness(tasks):
    scores, _ = evaluate_task(Harness(lm()), tasks, "rolling")
    total, tokenizer = 0.0, lm().tokenizer
    for text in (row["text"] for row in TEXTS):
        ids = [tokenizer.bos, *tokenizer.encode(text)]
        for counted in range(1, len(ids), 64):
            end = min(counted + 64, len(ids))
            start = max(0, end - 65)
            (found,) = log_likelihoods(lm(), [(ids[start:counted], ids[counted:end])])
            total += found.log_probability
    size = sum(len(row["text"].encode()) for row in TEXTS)
    assert scores["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert scores["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)


def test_texts_are_those_of_generate(tasks):
    _, samples = evaluate_task(Harness(lm()), tasks, "generation")
    questions = [row["question"] for row in CHOICES]
    expected = jaxlm.generate(lm(), questions, max_new_tokens=8, temperature=0.0, stop=("q",))
    assert [sample["resps"][0][0] for sample in samples] == expected and any(expected)
    assert not any("q" in text for text in expected)


def test_chats_are_passed_as_token_ids(tasks):
    tokenizer = lm().tokenizer
    chat_model = LM(CONFIG, lm().module, lm().params, tokenizers.Tokenizer(tokenizer.backend, tokenizer.special, FILES))
    _, samples = evaluate_task(Harness(chat_model), tasks, "choice", apply_chat_template=True)
    for row, sample in zip(CHOICES, samples):
        ids = jaxlm.data.chat.rendering.prompt(chat_model.tokenizer, [{"role": "user", "content": row["question"]}])
        assert ids.count(tokenizer.eos) == 1
        found = log_likelihoods(chat_model, [(ids, tokenizer.encode(choice)) for choice in row["choices"]])
        assert [r[0] for r in sample["filtered_resps"]] == pytest.approx([f.log_probability for f in found], rel=1e-6)


FILES = {"tokenizer_config.json": json.dumps({"chat_template": CHATML}).encode()}


class Request:
    def __init__(self, *args):
        self.args = args


def test_the_bos_token_is_optional():
    tokenizer, requests = lm().tokenizer, [Request("the fox", " jumps"), Request("", "the")]
    expected = [
        ([tokenizer.bos, *tokenizer.encode("the fox")], tokenizer.encode(" jumps")),
        ([tokenizer.bos], tokenizer.encode("the")),
    ]
    is_equal = lambda found: (
        [value for one in found for value in one[:2]]
        == pytest.approx([value for one in log_likelihoods(lm(), expected) for value in one[:2]], rel=1e-5)
    )
    assert is_equal(Harness(lm()).loglikelihood(requests))
    expected[0] = (expected[0][0][1:], expected[0][1])
    bare = Harness(lm(), add_bos_token=False)
    assert is_equal(bare.loglikelihood(requests))
    assert lm().tokenizer.bos is not None


def test_long_contexts_are_truncated_at_the_beginning():
    text = TEXT * 5
    found = Harness(lm()).loglikelihood([Request(text, "the fox")])
    ids = lm().tokenizer.encode(text + "the fox")[-65:]
    (expected,) = log_likelihoods(
        lm(), [(ids[:-8], ids[-8:])]
    )  # the line end of the context belongs to the continuation
    assert found[0][0] == pytest.approx(expected.log_probability)
    assert Harness(lm()).generate_until([Request(text, {"until": ["\n"], "max_gen_toks": 4})])


def test_requests_without_support_are_refused():
    with pytest.raises(UserError, match="no tokenizer"):
        Harness(LM(CONFIG, lm().module, lm().params))
    with pytest.raises(UserError, match="gen_prefix"):
        Harness(lm()).apply_chat_template([], add_generation_prompt=False)


def test_the_command_has_the_model_jaxlm(tasks):
    jaxlm.save(lm(), tasks / "model")
    command = ["run", "--model", "jaxlm", "--model_args", f"path={tasks / 'model'}", "--tasks", "choice"]
    command += ["--include_path", str(tasks), "--output_path", str(tasks / "out")]
    process = subprocess.run(
        [sys.executable, "-m", "jaxlm.inference.lm_eval", *command], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    (path,) = (tasks / "out").rglob("results*.json")
    expected, _ = evaluate_task(Harness(lm()), tasks, "choice")
    assert json.loads(path.read_text())["results"]["choice"]["acc,none"] == expected["acc,none"]
    command[4] = f"path={tasks / 'nothing'}"
    process = subprocess.run(
        [sys.executable, "-m", "jaxlm.inference.lm_eval", *command], capture_output=True, text=True
    )
    assert process.returncode == 2 and process.stderr.splitlines()[-1].startswith("error: ")
