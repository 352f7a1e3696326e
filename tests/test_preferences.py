"""Preferences: losses of pairs, their reference, and the rows that they are read from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

import jaxlm
from jaxlm import DataConfig, OptimizerConfig, Preference, Reward, RunConfig
from jaxlm.config import AdapterConfig, TokenizerConfig
from jaxlm.data.batches import Batches
from jaxlm.data.formats.lines import Place
from jaxlm.data.tokenizers import tokenizer as tokenizers
from jaxlm.errors import UserError
from jaxlm.families import PRESETS
from jaxlm.lm import LM
from jaxlm.nn import parameters
from jaxlm.nn.low_rank import without_updates
from jaxlm.nn.preferences import OBJECTIVES, Pairs
from jaxlm.nn.transformer import Transformer
from jaxlm.tasks.preference import PreferenceTask
from jaxlm.tasks.reward import RewardTask
from jaxlm.transforms import adapters

T, V = 128, 270
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
MODEL = replace(PRESETS["gpt2"], vocabulary=V, max_length=T, width=16, layers=2, heads=2, mlp_width=32, dropout=0.0)
MODEL = replace(MODEL, attention_dropout=0.0, heads_on_top=("lm",))
WORDS = ("Rex", "Bello", "no", "I do not know", "a dog", "Lassie of the hills")
PLACE = Place("pairs.jsonl", 3)


@lru_cache
def tokenizer():
    return tokenizers.train([" ".join(WORDS)] * 3, TokenizerConfig(train="byte_bpe"), V)


def task_of(**fields) -> PreferenceTask:
    return PreferenceTask(Preference(template=TEMPLATE, **fields), T, 0, tokenizer())


def rows(n: int) -> list[dict]:
    random = np.random.default_rng(1)
    pairs = [random.choice(WORDS, 2, replace=False) for _ in range(n)]
    return [{"prompt": f"Name {i}.", "chosen": str(a), "rejected": str(b)} for i, (a, b) in enumerate(pairs)]


def batch_of(task: PreferenceTask, some: list[dict], length: int = T):
    records = [task.read(task.task, row, PLACE) for row in some]
    batches = Batches(task.examples(type("Part", (), {"records": records}), False), 4, length, task.max_examples, None)
    return {name: jnp.asarray(x) for name, x in batches.batch_at(0).items()}


def params_of(std: float = 0.2):
    return jax.tree.map(jnp.asarray, random_params(MODEL, std))


def with_reference(params, reference):
    return {**params, parameters.TEACHER: reference}


# Losses


def arrays(seed: int = 0) -> Pairs:
    random = np.random.default_rng(seed)
    policy, reference = (-random.uniform(1, 30, (7, 2)).astype(np.float32) for _ in range(2))
    return Pairs(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(random.integers(1, 9, (7, 2)), jnp.float32))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_losses_have_the_values_of_their_papers():
    pairs = arrays()
    policy, reference, lengths = (np.asarray(x, np.float64) for x in pairs)
    ratios = policy - reference
    delta = ratios[:, 0] - ratios[:, 1]
    found = {
        name: OBJECTIVES[name](pairs, 0.3, 0.7, 0.1 if name in ("dpo", "simpo") else 0.0) for name in ("dpo", "ipo")
    }
    expected = -0.9 * np.log(sigmoid(0.3 * delta)) - 0.1 * np.log(sigmoid(-0.3 * delta))
    np.testing.assert_allclose(found["dpo"].loss_P, expected, rtol=1e-5)
    np.testing.assert_allclose(found["dpo"].rewards_P2, 0.3 * ratios, rtol=1e-5)
    means = ratios / lengths
    np.testing.assert_allclose(found["ipo"].loss_P, (means[:, 0] - means[:, 1] - 1 / 0.6) ** 2, rtol=1e-5)
    alone = pairs._replace(reference_P2=None)
    means = policy / lengths
    simpo = -np.log(sigmoid(0.3 * (means[:, 0] - means[:, 1]) - 0.7))
    np.testing.assert_allclose(OBJECTIVES["simpo"](alone, 0.3, 0.7, 0.0).loss_P, simpo, rtol=1e-5)
    odds = np.exp(means) / (1 - np.exp(means))
    orpo = -means[:, 0] - 0.3 * np.log(sigmoid(np.log(odds[:, 0] / odds[:, 1])))
    np.testing.assert_allclose(OBJECTIVES["orpo"](alone, 0.3, 0.7, 0.0).loss_P, orpo, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_finite_for_certain_answers(name):
    certain = Pairs(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2)))
    loss = lambda policy: OBJECTIVES[name](certain._replace(policy_P2=policy), 0.1, 0.5, 0.0).loss_P.sum()
    for policy in (jnp.zeros((1, 2)), jnp.array([[0.0, -1e4]]), jnp.array([[-1e4, 0.0]])):
        assert np.isfinite(loss(policy)) and np.isfinite(jax.grad(loss)(policy)).all()


@pytest.mark.parity
def test_losses_equal_those_of_trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pairs = arrays(2)._replace(reference_P2=None)
    means = [torch.tensor(np.asarray(x)) for x in np.asarray(pairs.means_P2).T]
    own = SimpleNamespace(
        beta=0.3, simpo_gamma=0.7, label_smoothing=0.1, loss_type="simpo", alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected, *rewards = CPOTrainer.cpo_loss(own, *means)
    found = OBJECTIVES["simpo"](pairs, 0.3, 0.7, 0.1)
    np.testing.assert_allclose(found.loss_P, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.rewards_P2, np.stack(rewards, -1), rtol=1e-5)
    expected, *_ = ORPOTrainer.odds_ratio_loss(own, *means)
    np.testing.assert_allclose(
        OBJECTIVES["orpo"](pairs, 0.3, 0.7, 0.0).loss_P, (-means[0] - expected).numpy(), rtol=1e-5
    )


# The task


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packed_pairs_have_the_losses_and_gradients_of_single_pairs(objective):
    task, some = task_of(objective=objective), rows(5)
    params, reference, module = params_of(), params_of(0.3), Transformer(MODEL)

    def loss(params, batch):
        losses, _ = task.losses(module, with_reference(params, reference), batch, None)
        return losses["loss"]

    total = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch)[0]))
    packed, packed_gradient = total(params, batch_of(task, some))
    batch = batch_of(task, some)
    assert loss(params, batch)[1] == 5 and int(batch["segments_BT"].max()) >= 4  # two pairs share a row
    single = [total(params, batch_of(task, [row])) for row in some]
    np.testing.assert_allclose(packed, sum(value for value, _ in single), rtol=1e-5)
    sums = jax.tree.map(lambda *leaves: sum(leaves), *[gradient for _, gradient in single])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), packed_gradient, sums)


def test_the_loss_of_the_reference_itself_is_that_of_equal_answers():
    task, params = task_of(), params_of()
    batch = batch_of(task, rows(3))
    losses, outputs = task.losses(Transformer(MODEL), with_reference(params, params), batch, None)
    np.testing.assert_allclose(losses["loss"][0] / losses["loss"][1], math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(outputs["reward_BE"], 0)


def test_the_model_without_its_adapter_is_the_reference():
    task, batch, module = task_of(), batch_of(task_of(), rows(3)), Transformer(MODEL)
    params = adapters.add(params_of(), AdapterConfig(4), jax.random.key(0))
    noise = lambda path, leaf: leaf + 0.1 if path[-1] == jax.tree_util.DictKey("b") else leaf
    params = jax.tree_util.tree_map_with_path(noise, params)
    losses, outputs = task.losses(module, params, batch, None)
    both = with_reference(params, without_updates(params))
    expected, of_both = task.losses(module, both, batch, None)
    np.testing.assert_allclose(losses["loss"][0], expected["loss"][0], rtol=1e-6)
    np.testing.assert_allclose(outputs["reward_BE"], of_both["reward_BE"], atol=1e-6)
    assert np.abs(outputs["reward_BE"]).max() > 0.01
    gradient_of = lambda more: jax.grad(
        lambda params: task.losses(module, {**params, **more}, batch, None)[0]["loss"][0]
    )
    separate = {parameters.TEACHER: params_of()}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient_of({})(params), gradient_of(separate)(params)
    )


QUESTION = {"role": "user", "content": "Name a dog."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Rex", "No."))
FORMS = {
    "texts": {"prompt": "Name a dog.", "chosen": "Rex", "rejected": "No."},
    "messages": {"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "prompt and conversations": {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
    "transcripts": {
        "chosen": "\n\nHuman: Name a dog.\n\nAssistant: Rex",
        "rejected": "\n\nHuman: Name a dog.\n\nAssistant: No.",
    },
    "json in text": {"chosen": json.dumps([QUESTION, GOOD]), "rejected": json.dumps([QUESTION, BAD])},
    "sharegpt": {
        "prompt": [{"from": "human", "value": "Name a dog."}],
        "chosen": [{"from": "gpt", "value": "Rex"}],
        "rejected": [{"from": "gpt", "value": "No."}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_published_forms_of_rows_give_the_same_record(form):
    record = PreferenceTask.read(Preference(), FORMS[form], PLACE)
    assert (record["chosen"], record["rejected"]) == ("Rex", "No.")
    assert [(m["role"], m["content"]) for m in record["prompt"]] == [("user", "Name a dog.")]
    system = PreferenceTask.read(Preference(system="Be brief."), FORMS[form], PLACE)["prompt"]
    assert [m["role"] for m in system] == ["system", "user"]


def test_several_turns_before_the_answers_are_the_prompt():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a dog.\n\nAssistant: "
    record = PreferenceTask.read(Preference(), {"chosen": talk + "Rex", "rejected": talk + "No."}, PLACE)
    assert [m["content"] for m in record["prompt"]] == ["Hi", "Hello", "Name a dog."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal; .*--task.equal drop"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "have one without text"),
        ({"prompt": "a", "chosen": "b"}, "there is no column 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "the row has no prompt; name its column with --task.prompt"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "column 'chosen' holds 3, not a text or a list"),
        ({"prompt": "a", "chosen": [QUESTION], "rejected": [BAD]}, "has the messages user after the prompt"),
        ({"prompt": [QUESTION, GOOD], "chosen": "a", "rejected": "b"}, "column 'prompt' ends with an answer"),
        ({"chosen": [QUESTION, GOOD], "rejected": [BAD]}, "has the messages user, assistant after the prompt"),
        ({"prompt": [{"content": "a"}], "chosen": "a", "rejected": "b"}, "in column 'prompt'"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        PreferenceTask.read(Preference(), row, PLACE)


def test_equal_pairs_can_be_dropped():
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert PreferenceTask.read(Preference(equal="drop"), row, PLACE) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "task.beta is 0.0"),
        ({"label_smoothing": 0.5}, "task.label_smoothing is 0.5"),
        ({"margin": 0.9}, "task.margin is 0.9, which has no effect if task.objective is dpo"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "no effect if task.objective is ipo"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Preference(**fields).check()


def test_a_model_or_an_adapter_without_a_reference_is_refused():
    run = RunConfig(model=MODEL, task=Preference(), data=DataConfig(path="x"))
    with pytest.raises(UserError, match="needs a decoder"):
        Preference().check_model(run, PRESETS["bert-base"])
    with pytest.raises(UserError, match=r"adapter.biases is 'all'"):
        Preference().check_model(replace(run, adapter=AdapterConfig(2, biases="all")), MODEL)
    Preference(objective="orpo").check_model(replace(run, adapter=AdapterConfig(2, biases="all")), MODEL)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Returns the folder of a random model, and a file of pairs whose chosen answer comes first in the alphabet."""
    folder = tmp_path_factory.mktemp("start")
    jaxlm.save(LM(MODEL, Transformer(MODEL), params_of(), tokenizer()), folder / "model")
    random = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(120):
            a, b = sorted(random.choice(["alpha", "beta", "gamma", "delta"], 2, replace=False))
            file.write(json.dumps({"prompt": f"{i}", "chosen": str(a), "rejected": str(b)}) + "\n")
    return folder


def run_of(start, workdir, **fields) -> RunConfig:
    task = Preference(template=TEMPLATE, **fields.pop("task", {}))
    data = DataConfig(path=str(start / "pairs.jsonl"), length=T, eval_fraction=0.2)
    fields = {"batch": 8, "steps": 24, "eval_every": 24, "checkpoint_every": 8, "log_every": 8} | fields
    optimizer = OptimizerConfig(rate=3e-3, weight_decay=0.0)
    init = str(start / "model")
    return RunConfig(model=None, init=init, task=task, data=data, optimizer=optimizer, workdir=str(workdir), **fields)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", [AdapterConfig(4), pytest.param(AdapterConfig(), marks=pytest.mark.long)], ids=str)
@pytest.mark.long
def test_a_rule_is_learned_and_the_export_predicts_the_same(start, tmp_path, adapter):
    lm = jaxlm.fit(run_of(start, tmp_path / "run", adapter=adapter))
    first, *_, last = (line for line in lines(tmp_path / "run") if "eval/accuracy" in line)
    np.testing.assert_allclose(first["eval/loss"], math.log(2), rtol=1e-5)
    assert last["eval/accuracy"] > 0.8 and last["eval/reward_margin"] > 0
    pairs = [{"prompt": "7", "chosen": "alpha", "rejected": "gamma"}]
    task = Preference(template=TEMPLATE)
    found = jaxlm.predict(jaxlm.load(tmp_path / "run"), pairs, task=task)[0]
    expected = jaxlm.predict(lm, pairs, task=task)[0]
    assert found["prediction"] == expected["prediction"]
    np.testing.assert_allclose(found["chosen_reward"], expected["chosen_reward"], atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("adapter", [AdapterConfig(4), AdapterConfig()], ids=str)
def test_a_stopped_run_resumes_to_the_same_result(start, tmp_path, adapter):
    whole = jaxlm.fit(run_of(start, tmp_path / "whole", adapter=adapter))
    calls = iter(range(100))
    with pytest.raises(jaxlm.errors.Stopped):
        jaxlm.fit(run_of(start, tmp_path / "run", adapter=adapter), stop=lambda: next(calls) > 10)
    resumed = jaxlm.fit(run_of(start, tmp_path / "run", adapter=adapter))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_a_run_without_initial_weights_is_refused(start, tmp_path):
    run = replace(run_of(start, tmp_path / "run"), init="", model=MODEL)
    run = replace(run, tokenizer=TokenizerConfig(path=str(start / "model")))
    with pytest.raises(UserError, match="the run has no initial weights; give them with --init"):
        jaxlm.fit(run)


# Reward models

SCORER = replace(MODEL, heads_on_top=("classes",), labels=("reward",), classes_from="last")


def test_packed_conversations_have_the_rewards_and_losses_of_single_ones():
    task = RewardTask(Reward(template=TEMPLATE, margin=0.3, center=0.1), T, 0, tokenizer(), ("reward",))
    params, module, some = jax.tree.map(jnp.asarray, random_params(SCORER)), Transformer(SCORER), rows(5)
    losses, _ = task.losses(module, params, batch_of(task, some), None)
    rewards_of = lambda row: task.losses(module, params, batch_of(task, [row]), None)[1]["reward_BE"][0, :2]
    rewards = np.array(list(map(rewards_of, some)))
    assert losses["loss"][1] == 5
    expected = -np.log(sigmoid(rewards[:, 0] - rewards[:, 1] - 0.3)) + 0.1 * rewards.sum(1) ** 2
    np.testing.assert_allclose(losses["loss"][0], expected.sum(), rtol=1e-5)
    chats = [
        jaxlm.data.chat.rendering.encode(
            tokenizer(),
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}],
            template=TEMPLATE,
        )[0]
        for row in some
    ]
    lm = LM(SCORER, module, params)
    for ids, reward in zip(chats, rewards[:, 0]):
        np.testing.assert_allclose(lm([ids]).logits[0, 0], reward, rtol=1e-5)


@pytest.mark.long
def test_a_reward_model_learns_a_rule_and_is_exported_with_one_output(start, tmp_path):
    run = replace(run_of(start, tmp_path / "run"), task=Reward(template=TEMPLATE))
    jaxlm.fit(run)
    last = [line for line in lines(tmp_path / "run") if "eval/accuracy" in line][-1]
    assert last["eval/accuracy"] > 0.8
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"] and len(config["id2label"]) == 1
    row = {"prompt": "7", "chosen": "alpha", "rejected": "gamma"}
    found = jaxlm.predict(jaxlm.load(tmp_path / "run"), [row])[0]
    assert found["prediction"] == "chosen" and found["chosen_reward"] > found["rejected_reward"]
