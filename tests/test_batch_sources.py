"""Batches from a source: it may read the training state, and then is asked between steps, for each step once."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, fit
from jaxlm.data.batches import iterate_batches
from jaxlm.errors import Stopped
from jaxlm.tasks import register
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.task import TASKS


class Recorded:
    """A source that reads the state, and records which one each step was given."""

    reads_state = True

    def __init__(self, source):
        self.source, self.seen = source, []

    def batch(self, step, state, rows=None):
        self.seen.append((step, int(state.step)))
        batch = self.source.batch(step, None, rows)
        # What is learned depends on the weights, as text that the model has written does.
        keep = 1 + int(1000 * abs(float(np.asarray(state.params["embeddings"]["tokens"]).sum()))) % 7
        return batch | {"weights_BT": batch["weights_BT"] * (np.arange(batch["weights_BT"].shape[1]) % 8 < keep)}

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)


def run_of(folder, name, **more):
    (folder / "text.txt").write_text("".join(f"line {n} of a text about {n * n}\n" for n in range(200)))
    return RunConfig(
        model=ModelConfig(vocabulary=64, max_length=32, width=16, layers=1, heads=2),
        data=DataConfig(path=str(folder / "text.txt"), length=32),
        tokenizer=TokenizerConfig(train="characters"),
        optimizer=OptimizerConfig(rate=1e-2),
        batch=8,
        steps=6,
        checkpoint_every=2,
        keep_checkpoints=True,
        sample_tokens=0,
        workdir=str(folder / name),
        **more,
    )


@pytest.fixture
def sources(monkeypatch):
    """Training batches of CausalLM come from `Recorded` sources, which are listed."""
    made = []

    class OnPolicy(CausalLMTask):
        def batches(self, part, rows, length, seed):
            source = super().batches(part, rows, length, seed)
            if seed is None:
                return source
            made.append(Recorded(source))
            return made[-1]

    monkeypatch.setitem(TASKS, CausalLM, OnPolicy)
    register(CausalLM, OnPolicy)
    return made


def test_a_source_that_reads_the_state_is_asked_between_steps(sources, tmp_path, monkeypatch, devices, no_pictures):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    whole = fit(run_of(tmp_path, "whole"))
    assert sources[-1].seen == [(step, step) for step in range(6)]
    count = iter(range(3))
    with pytest.raises(Stopped):
        fit(run_of(tmp_path, "parts"), stop=lambda: next(count) == 2)
    parts = fit(run_of(tmp_path, "parts"))
    assert sources[-1].seen == [(step, step) for step in range(3, 6)]
    np.testing.assert_array_equal(parts.params["embeddings"]["tokens"], whole.params["embeddings"]["tokens"])


def test_a_source_that_does_not_is_asked_ahead_of_time():
    class Plain:
        reads_state = False

        def batch(self, step, state, rows=None):
            assert state is None
            return {"step": step}

    assert [batch["step"] for batch in iterate_batches(Plain(), 2, 7, lambda: pytest.fail("the state is read"))] == [
        2,
        3,
        4,
        5,
        6,
    ]
