"""Batches from a source. A source that reads the training state is called between steps, once for each step."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, fit
from jaxlm.data.batches import iterate_batches
from jaxlm.errors import Stopped, UserError
from jaxlm.tasks import register
from jaxlm.tasks.pretraining import CausalLMTask
from jaxlm.tasks.task import TASKS


class RecordingSource:
    """A source that reads the state, and records the steps of its arguments."""

    reads_state = True

    def __init__(self, source):
        self.source, self.calls = source, []

    def batch(self, step, state, rows=None):
        self.calls.append((step, int(state.step)))
        batch = self.source.batch(step, None, rows)
        # The weights of the loss depend on the parameters, as generated text does.
        keep = 1 + int(1000 * abs(float(np.asarray(state.params["embeddings"]["tokens"]).sum()))) % 7
        return batch | {"weights_BT": batch["weights_BT"] * (np.arange(batch["weights_BT"].shape[1]) % 8 < keep)}

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)


def run_config(folder, name, **more):
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
    """Returns a list of the sources of training batches, which are `RecordingSource`s for CausalLM."""
    recorded_sources = []

    class OnPolicy(CausalLMTask):
        def batches(self, part, rows, length, seed):
            source = super().batches(part, rows, length, seed)
            if seed is None:
                return source
            recorded_sources.append(RecordingSource(source))
            return recorded_sources[-1]

    monkeypatch.setitem(TASKS, CausalLM, OnPolicy)
    register(CausalLM, OnPolicy)
    return recorded_sources


@pytest.mark.long
def test_a_source_that_reads_the_state_is_called_between_steps(sources, tmp_path, monkeypatch, devices, no_plots):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    whole = fit(run_config(tmp_path, "whole"))
    assert sources[-1].calls == [(step, step) for step in range(6)]
    count = iter(range(3))
    with pytest.raises(Stopped):
        fit(run_config(tmp_path, "parts"), stop=lambda: next(count) == 2)
    parts = fit(run_config(tmp_path, "parts"))
    assert sources[-1].calls == [(step, step) for step in range(3, 6)]
    np.testing.assert_array_equal(parts.params["embeddings"]["tokens"], whole.params["embeddings"]["tokens"])


def test_a_source_that_does_not_read_the_state_is_called_ahead_of_time():
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


def test_more_examples_in_a_row_than_the_task_declares_are_refused(tmp_path, monkeypatch, devices, no_plots):
    """A stream's rows hold one example, so that its model would let the second example attend to the first."""

    class Packed(CausalLMTask):
        def batches(self, part, rows, length, seed):
            source = super().batches(part, rows, length, seed)
            batch = source.batch

            def packed_batch(step, state, rows=None):
                fields = batch(step, state, rows)
                return fields | {"segments_BT": np.where(np.arange(length) < 9, fields["segments_BT"], 2)}

            source.batch = packed_batch if seed is not None else batch
            return source

    monkeypatch.setitem(TASKS, CausalLM, Packed)
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="step 1 has a row with 2 examples, and the task has max_examples 1; return"):
        fit(run_config(tmp_path, "run"))
