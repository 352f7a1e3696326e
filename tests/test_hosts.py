"""Runs of several processes have the losses and the export of one process, and all processes exit together.

All runs are tiny. Their hosts are processes on this machine that communicate through gloo.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flags import xla_flags

from jaxlm import CausalLM, UserError
from jaxlm.config import MeshConfig
from jaxlm.data.batches import Batches
from jaxlm.data.corpus import Corpus
from jaxlm.devices import hosts, sharding
from jaxlm.run.assembly import local_rows, shard_batch
from jaxlm.run.measure import MEASURED
from jaxlm.tasks.pretraining import CausalLMTask

TRAIN = Path(__file__).parent.parent / "train.py"
CONFIG = """
from pathlib import Path
from jaxlm import CausalLM, Classification, DataConfig, Decoding, ModelConfig, OptimizerConfig, RunConfig, Seq2Seq
from jaxlm import TokenizerConfig

KINDS = {
    "causal": ("decoder", CausalLM()),
    "classes": ("encoder", Classification()),
    "pairs": ("encoder_decoder", Seq2Seq(decoding=Decoding(max_new_tokens=8, min_length=2))),
}

def config(task="causal"):
    structure, kind = KINDS[task]
    start = {"start_token": 2} if task == "pairs" else {}
    model = dict(vocabulary=64, max_length=32, width=32, layers=2, heads=2, dropout=0.1, structure=structure)
    return RunConfig(
        model=ModelConfig(**model, **start),
        task=kind,
        data=DataConfig(path=str(Path(__file__).parent / f"{task}.{'txt' if task == 'causal' else 'csv'}"), length=32),
        tokenizer=TokenizerConfig(train="characters"),
        optimizer=OptimizerConfig(rate=1e-2, beta2=0.99),
        batch=8, steps=12, log_every=4, checkpoint_every=3, eval_every=6, sample_tokens=0, keep_checkpoints=True,
    )
"""
MAX_DETECTION_SECONDS = 120  # the other hosts must detect a lost host within this time


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Returns a folder with a config, its data, and the cache of all runs of this file."""
    folder = tmp_path_factory.mktemp("hosts")
    draw = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    lines = [" ".join(draw.choices(words, k=12)) for _ in range(120)]
    (folder / "causal.txt").write_text("".join(f"{line}\n" for line in lines))
    rows = [f"{line[: draw.randint(5, 28)]},{'ab'[line < 'm']}\n" for line in lines]
    (folder / "classes.csv").write_text("text,label\n" + "".join(rows))
    (folder / "pairs.csv").write_text("source,target\n" + "".join(f"{line[:12]},{line[8::-1]}\n" for line in lines))
    (folder / "tiny.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def run_alone(data_dir, tmp_path_factory):
    """`run_alone(*arguments)` returns the folder of a run in one process, which is executed once for all tests."""
    runs: dict[tuple[Any, ...], Path] = {}

    def run(*arguments: Any, devices: int = 2) -> Path:
        if (key := (devices, *arguments)) not in runs:
            folder = tmp_path_factory.mktemp("alone")
            command = (TRAIN, data_dir / "tiny.py", *arguments, "--workdir", folder / "run")
            Host(data_dir, command, {}, folder / "output.txt", devices).wait(0)
            runs[key] = folder / "run"
        return runs[key]

    return run


class Host:
    """A Python process with its standard error in a file."""

    def __init__(self, data_dir: Path, command: tuple[Any, ...], environment: dict[str, str], file: Path, devices: int):
        self.file = file
        settings = {
            "XLA_FLAGS": xla_flags(devices),
            "JAX_PLATFORMS": "cpu",
            "JAXLM_CACHE": str(data_dir / "cache"),
        }
        command = (sys.executable, *map(str, command))
        with open(file, "w") as stderr:
            self.process = subprocess.Popen(
                command, env=os.environ | settings | environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in self.output():
            code = self.process.poll()
            assert code is None and time.monotonic() < end, f"{code} before it printed {text!r}:\n{self.output()}"
            time.sleep(0.01)

    def wait(self, code: int, seconds: float = 240) -> str:
        """Waits for the end of the process with this exit code, and returns its output."""
        actual = self.process.wait(seconds)
        output = self.output()
        assert actual == code, f"ended with {actual}:\n{output}"
        assert "Traceback" not in output, output
        return output


@pytest.fixture
def start(data_dir, tmp_path):
    """`start(n, *arguments)` starts n hosts of a run or of another script. They are killed after the test."""
    started: list[Host] = []

    def start(
        count: int,
        *arguments: Any,
        devices: int = 1,
        own: dict[int, tuple[str, ...]] | None = None,
        script: Path | None = None,
    ) -> list[Host]:
        address, new = f"localhost:{free_port()}", []
        command = (TRAIN, data_dir / "tiny.py") if script is None else (script,)
        for n in range(count):
            variables = {"JAXLM_COORDINATOR": address, "JAXLM_PROCESSES": str(count), "JAXLM_PROCESS": str(n)}
            file = tmp_path / f"output-{len(started)}.txt"
            new.append(Host(data_dir, (*command, *arguments, *(own or {}).get(n, ())), variables, file, devices))
            started.append(new[-1])
        return new

    yield start
    for host in started:
        host.process.kill()
        host.process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def losses(folder: Path) -> list[dict[str, float]]:
    """Returns the log without values that depend on the clock and the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in rows]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "export" / "model.safetensors")


def assert_alike(ours: Path, theirs: Path, rel: float) -> None:
    a, b = losses(ours), losses(theirs)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=rel)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=rel)


# The rendezvous of a process


ADDRESS = {"JAXLM_COORDINATOR": "10.0.0.1:1234", "JAXLM_PROCESSES": "4", "JAXLM_PROCESS": "3"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[1-8]", "SLURM_PROCID": "5"}
RENDEZVOUS = {
    "alone": ({}, None),
    "given": (ADDRESS, hosts.Rendezvous("10.0.0.1:1234", 4, 3)),
    "given one": ({"JAXLM_PROCESSES": "1"}, None),
    "srun": (SRUN, hosts.Rendezvous(None, 8)),
    "srun of one task": (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    "sbatch without srun": ({name: SRUN[name] for name in SRUN if "STEP" not in name}, None),
    "srun of separate processes": (SRUN | {"JAXLM_PROCESSES": "1"}, None),
    "given in srun": (SRUN | ADDRESS, hosts.Rendezvous("10.0.0.1:1234", 4, 3)),
    "mpirun": (
        {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"},
        hosts.Rendezvous(None, 2),
    ),
    "mpirun of one": ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
    "TPU pod": ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, hosts.Rendezvous()),
    "TPU slices": ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, hosts.Rendezvous()),
    "TPU host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "TPU pod on CPU": ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": "cpu"}, None),
}


@pytest.mark.parametrize("name", RENDEZVOUS)
def test_the_environment_determines_the_rendezvous(name):
    environment, expected = RENDEZVOUS[name]
    assert hosts.find_rendezvous(environment) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAXLM_PROCESS": ""}, "JAXLM_COORDINATOR, JAXLM_PROCESSES is set, JAXLM_PROCESS is not; give all three"),
        ({"JAXLM_PROCESS": "4"}, "JAXLM_PROCESS is '4' of JAXLM_PROCESSES '4'; give numbers"),
        ({"JAXLM_PROCESSES": "two"}, "JAXLM_PROCESSES 'two'"),
        ({"JAXLM_COORDINATOR": "10.0.0.1"}, "JAXLM_COORDINATOR is '10.0.0.1'; give HOST:PORT"),
    ],
)
def test_invalid_addresses_raise_an_error(change, message):
    with pytest.raises(UserError, match=message):
        hosts.find_rendezvous(ADDRESS | change)


# A single host


def test_a_single_host_does_not_wait():
    assert hosts.is_first() and hosts.gather_json({"a": 1}) == [{"a": 1}]
    marker = object()
    assert hosts.run_on_first(lambda: marker) is marker and hosts.run_on_first_then_others(lambda: marker) is marker
    stop = lambda: False
    assert hosts.agree_on_stop(stop) is stop
    tree = {"a": jax.numpy.ones(3)}
    assert hosts.gather(tree)["a"] is tree["a"]
    assert hosts.exit_process(2) == 2
    assert not hosts.is_host_loss(RuntimeError("Connection closed by peer"))


@pytest.mark.parametrize(("rows", "k", "n"), [(8, 1, 4), (8, 2, 2), (6, 1, 4), (7, 2, 8)])
def test_rows_of_all_devices_are_all_rows(rows, k, n):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:n])
    assert local_rows(mesh, rows, k) == list(range(rows))


def test_rows_of_some_devices_are_those_that_the_batch_is_sharded_to(monkeypatch):
    """On a host with devices 2 and 3 of 4, a batch with only its own rows is sharded like the whole batch."""
    rows, k = 14, 2
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=1), jax.devices()[:4])
    batch = {"tokens_BT": np.arange(1, rows * 8 + 1, dtype=np.int32).reshape(rows, 8)}
    local_devices = set(mesh.devices.flat[2:])
    layout = sharding.batch_sharding(mesh, "B")
    indices = {d: i for d, i in layout.devices_indices_map((k, 8)).items() if d in local_devices}
    monkeypatch.setattr(type(layout), "addressable_devices_indices_map", lambda *_: indices)
    local = local_rows(mesh, rows, k)
    monkeypatch.undo()
    assert local == [4, 5, 6, 7, 12, 13]  # micro-batches are rows 0 to 7 and 8 to 15; the last two rows are padding
    part = {"tokens_BT": np.zeros_like(batch["tokens_BT"])}
    part["tokens_BT"][local] = batch["tokens_BT"][local]
    shards = [shard_batch(mesh, some, k)["tokens_BT"].addressable_shards for some in (part, batch)]
    for ours, theirs in zip(*shards, strict=True):
        assert ours.device == theirs.device
        if ours.device in local_devices:
            np.testing.assert_array_equal(ours.data, theirs.data)


def test_a_part_of_a_batch_has_the_rows_of_the_whole_batch():
    corpus = Corpus(np.arange(500, dtype=np.uint16), np.array([0, 200, 500]), np.array([0, 1, 2]), 500)
    task = CausalLMTask(CausalLM(), 16, 0, None, ())
    batches = Batches(task.examples(corpus, True), 6, 16, task.max_examples, 0)
    for step in (0, 3, 40):
        whole, some = batches.batch_at(step), batches.batch_at(step, [1, 4])
        for name, value in whole.items():
            np.testing.assert_array_equal(some[name][[1, 4]], value[[1, 4]])
            assert not some[name][[0, 2, 3, 5]].any()


# Several processes train as one

TASKS = {"causal": (), "classes": ("classes",), "pairs": ("pairs",)}  # the last one evaluates by generation


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "mesh"),
    [
        ("causal", ()),
        ("causal", ("--mesh.data", "1", "--mesh.fsdp", "2")),
        ("causal", ("--mesh.data", "1", "--mesh.tensor", "2")),
        ("classes", ("--mesh.data", "1", "--mesh.fsdp", "2")),
        ("pairs", ("--mesh.data", "1", "--mesh.fsdp", "2")),
    ],
    ids=lambda x: " ".join(x) or "data" if isinstance(x, tuple) else x,
)
def test_two_processes_train_as_one(start, run_alone, tmp_path, task, mesh):
    arguments = (*TASKS[task], *mesh)
    one = run_alone(*arguments)
    first, second = start(2, *arguments, "--workdir", tmp_path / "two")
    assert "on 2 cpu device(s)" in first.wait(0)
    assert second.wait(0) == ""
    assert_alike(tmp_path / "two", one, rel=1e-6)
    ours, theirs = tensors(tmp_path / "two"), tensors(one)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)
    names = lambda folder: sorted(path.relative_to(folder).parts[:2] for path in folder.rglob("*") if path.is_file())
    without = lambda folder: [parts for parts in names(folder) if parts[0] not in ("checkpoints", "tensorboard")]
    assert without(tmp_path / "two") == without(one)
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1  # only the first host writes events


USE = """
import json, os, sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import jaxlm
from jaxlm.devices import hosts
from jaxlm.config import MeshConfig
from jaxlm.run.fit import fit
from jaxlm.inference.likelihood import log_likelihoods
from tiny import config

hosts.join(hosts.find_rendezvous(os.environ))
found = []
for name in ("causal", "classes"):
    run = replace(config(name), workdir=f"{sys.argv[1]}/{name}", mesh=MeshConfig(data=1, fsdp=2), steps=2)
    lm = fit(run, summary=False)
    if name == "causal":
        greedy, beams = jaxlm.Decoding(max_new_tokens=5, temperature=0.0), jaxlm.Decoding(max_new_tokens=5, beams=2)
        found += [jaxlm.generate(lm, ["the", "a quick"], how) for how in (greedy, beams)]
        found += [one.log_probability for one in log_likelihoods(lm, [("the", " fox"), ("a", " lazy dog")])]
    else:
        found += [row["prediction"] for row in jaxlm.predict(lm, [{"text": "the quick"}, {"text": "fox"}])]
        found += [jaxlm.evaluate(lm, [{"text": "the", "label": "a"}])["loss"]]
        found += map(float, jaxlm.encode(lm, ["fox"])[0])
if hosts.is_first():
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


@pytest.mark.long
def test_two_processes_use_the_model_that_they_trained_together(start, data_dir, tmp_path):
    (data_dir / "use.py").write_text(USE)
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        for host in start(count, folder, devices=2 // count, script=data_dir / "use.py"):
            host.wait(0)
        found[count] = json.loads((folder / "found.json").read_text())
    texts = lambda values: [value for value in values if not isinstance(value, float)]
    numbers = lambda values: [value for value in values if isinstance(value, float)]
    assert texts(found[2]) == texts(found[1])
    np.testing.assert_allclose(numbers(found[2]), numbers(found[1]), rtol=1e-4, atol=1e-5)


MEMORY = """
import os, sys
from pathlib import Path
import jax
import numpy as np
from jaxlm import LM, ModelConfig, families; from jaxlm.devices import hosts, sharding
from jaxlm.config import MeshConfig
from jaxlm.lm import save, with_params
from jaxlm.nn import parameters
from jaxlm.nn.transformer import Transformer, init

def kilobytes(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])

hosts.join(hosts.find_rendezvous(os.environ))
mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2))
config = ModelConfig(vocabulary=512, max_length=32, width=768, layers=12, heads=8)
module = Transformer(config, sharding.Placement(mesh))

def ones(path, leaf):
    name = parameters.path_of(path)
    layout = sharding.sharding(mesh, parameters.find(name).axes, leaf.shape, name)
    part = lambda index: np.ones([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape)], np.float32)
    return jax.make_array_from_callback(leaf.shape, layout, part)

params = jax.tree_util.tree_map_with_path(ones, jax.eval_shape(lambda: init(module, jax.random.key(0))))
lm = LM(config, module, params, None, families.Origin({}, None))
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
hosts.read_on_first(params, lambda some: save(with_params(lm, some), sys.argv[1]))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(f"{(kilobytes('VmHWM') - before) / 1024:.0f} MB above, of a model of {size / 2**20:.0f} MB", file=sys.stderr)
"""


@pytest.mark.long
def test_no_host_requires_memory_for_the_whole_model_to_save_it(start, data_dir, tmp_path):
    (data_dir / "memory.py").write_text(MEMORY)
    for host in start(2, tmp_path / "export", script=data_dir / "memory.py"):
        output = re.search(r"(\d+) MB above, of a model of (\d+) MB", host.wait(0))
        assert output is not None
        above, size = map(int, output.groups())
        print(output[0])
        assert size > 300 and above < size / 2
    assert all((tensor == 1).all() for tensor in tensors(tmp_path).values())


@pytest.mark.long
def test_two_processes_at_an_address_train_as_one(start, run_alone, tmp_path):
    """Each process has its own copy. Two processes resume the run at the address, and then one process."""
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "2")
    one = run_alone(*mesh)
    bucket = tmp_path / "bucket" / "run"
    more = (*mesh, "--workdir", f"file://{bucket}")
    first, second = start(2, *more)
    first.wait(0)
    assert second.wait(0) == ""
    assert_alike(bucket, one, rel=1e-6)
    names = lambda folder, part: sorted(path.name for path in (folder / part).iterdir())
    for part in ("checkpoints", "export"):
        assert names(bucket, part) == names(one, part)
    for count, devices in ((2, 1), (1, 2)):
        shutil.rmtree(bucket / "checkpoints" / "12")
        (bucket / "report.html").unlink()
        again = start(count, *more, devices=devices)
        assert "resuming  at step 9\n" in again[0].wait(0)
        assert_alike(bucket, one, rel=1e-6)
        for other in again[1:]:
            assert other.wait(0) == ""


@pytest.mark.long
def test_two_processes_start_from_weights_and_detect_a_finished_run(start, run_alone, tmp_path):
    begin = ("--init", run_alone() / "export")
    one = run_alone(*begin)
    for output in ("held-out loss", "is already finished, at step 12; nothing is left to do"):
        first, second = start(2, *begin, "--workdir", tmp_path / "two")
        assert output in first.wait(0)
        second.wait(0)
    assert_alike(tmp_path / "two", one, rel=1e-6)


@pytest.mark.long
def test_a_corrupt_checkpoint_ends_both_hosts_and_the_previous_one_is_resumed(start, tmp_path):
    more = ("--workdir", tmp_path / "run", "--mesh.data", "1", "--mesh.fsdp", "2")
    for host in start(2, *more):
        host.wait(0)
    (tmp_path / "run" / "report.html").unlink()
    top = tmp_path / "run" / "checkpoints" / "12" / "state"
    for file in [*top.glob("d/*"), *top.glob("ocdbt.process_*/d/*")]:
        os.truncate(file, 20)
    both = start(2, *more)
    assert [host.process.wait(120) for host in both] == [1, 1]
    assert any("error: checkpoint 12 is corrupt" in host.output() for host in both)
    assert (tmp_path / "run" / "corrupt" / "12").is_dir()
    first, second = start(2, *more)
    assert "resuming  at step 9\n" in first.wait(0)
    second.wait(0)


# Exiting together

STEPS = ("--steps", "150", "--checkpoint-every", "10", "--eval-every", "50", "--log-every", "5")


@pytest.mark.long
def test_a_signal_to_one_host_stops_all_hosts_at_the_same_step(start, tmp_path):
    more = ("--workdir", tmp_path / "run", "--steps", "2000", "--checkpoint-every", "1000", "--eval-every", "0")
    first, second = start(2, *more)
    first.wait_for("step 8/")
    second.process.send_signal(signal.SIGTERM)
    output = [first.wait(143), second.wait(143)]
    assert "saving after this step" in output[1] and "saving after" not in output[0]
    stopped = {line for part in output for line in part.splitlines() if line.startswith("stopped at step")}
    (line,) = stopped
    (step,) = (path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert line.startswith(f"stopped at step {int(step):,} of 2,000 and saved")
    first, second = start(2, *more)
    first.wait_for(f"resuming  at step {int(step):,}\n")


@pytest.mark.long
@pytest.mark.parametrize(("victim", "resuming"), [(0, (1, 4)), (1, (2,))])
def test_a_killed_host_ends_the_other_and_any_number_of_hosts_resumes(start, run_alone, tmp_path, victim, resuming):
    both = start(2, *STEPS, "--workdir", tmp_path / "run")
    both[0].wait_for("step 65/")
    both[victim].process.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    output = both[1 - victim].wait(1, MAX_DETECTION_SECONDS)
    print(f"host {1 - victim} ended {time.monotonic() - begin:.1f} s after host {victim} was killed")
    assert f"error: host {victim} of 2 was lost" in output and "the same command" in output
    reached = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    assert 50 <= reached < 150
    for count in resuming:
        folder = tmp_path / f"again-{count}"
        shutil.copytree(tmp_path / "run", folder)
        again = start(count, *STEPS, "--workdir", folder)
        output = again[0].wait(0, 400)
        assert f"resuming  at step {reached}\n" in output and "corrupt" not in output
        for other in again[1:]:
            other.wait(0)
        assert_alike(folder, run_alone(*STEPS), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("signal_number", "victim"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_the_other_hosts_report_which_host_was_lost(start, tmp_path, signal_number, victim):
    """A stopped host keeps its connections. Host 0 has the service that publishes which hosts are lost."""
    three = start(3, *STEPS, "--workdir", tmp_path / "run", "--batch", "9")
    three[0].wait_for("step 20/")
    three[victim].process.send_signal(signal_number)
    for host in three[:victim] + three[victim + 1 :]:
        assert f"error: host {victim} of 3 was lost" in host.wait(1, MAX_DETECTION_SECONDS)


# Errors before the start


def test_hosts_with_different_configs_do_not_start(start, tmp_path):
    both = start(2, "--workdir", tmp_path / "run", own={1: ("--optimizer.rate", "2e-2", "--seed", "1")})
    for host in both:
        output = host.wait(2)
        assert "hosts 0 and 1 of 2 do not have the same run; they differ in (host 0 | host 1):\n" in output
        assert "  run.optimizer.rate: 0.01 | 0.02\n" in output and "  run.seed: 0 | 1\n" in output
        assert "give all hosts the same command" in output
    assert not (tmp_path / "run").exists()


def test_an_unreachable_coordinator_is_reported(start, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_TIMEOUT", "3")
    address = f"localhost:{free_port()}"
    variables = {"JAXLM_COORDINATOR": address, "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": "1"}
    command = (TRAIN, data_dir / "tiny.py", "--workdir", tmp_path / "run")
    begin = time.monotonic()
    second = Host(data_dir, command, variables, tmp_path / "second.txt", 1)
    output = second.wait(2, 60)
    assert time.monotonic() - begin < 40
    assert f"error: host 1 of 2 found no coordinator at {address} in 3 s; start host 0 there, fix JAXLM_COORD" in output
    assert "JAXLM_TIMEOUT" in output and output.count("\n") == 1


def test_a_missing_host_is_reported(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_TIMEOUT", "3")
    address = f"localhost:{free_port()}"
    variables = {"JAXLM_COORDINATOR": address, "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": "0"}
    command = (TRAIN, data_dir / "tiny.py", "--workdir", tmp_path / "run")
    output = Host(data_dir, command, variables, tmp_path / "first.txt", 1).wait(2, 60)
    assert f"error: host 0 of 2 waited 3 s at {address}, and not all hosts came; start all" in output


def test_a_coordinator_port_in_use_is_reported(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_TIMEOUT", "3")
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::", 0))
        listener.listen()
        address = f"localhost:{listener.getsockname()[1]}"
        variables = {"JAXLM_COORDINATOR": address, "JAXLM_PROCESSES": "2", "JAXLM_PROCESS": "0"}
        command = (TRAIN, data_dir / "tiny.py", "--workdir", tmp_path / "run")
        output = Host(data_dir, command, variables, tmp_path / "first.txt", 1).wait(2, 60)
    assert f"error: host 0 cannot be the coordinator at {address}: Address already in use; give JAXLM_COORD" in output
