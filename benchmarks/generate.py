"""Compares greedy generation with transformers, and with the memory bound, in one run on this machine.

    python benchmarks/generate.py [8] [1]        numbers of rows; requires the [parity] extra

Both implementations continue the same random prompts with a GPT of the same shape and random weights in float32.  Each
runs in a separate process, and they alternate.  The script prints the new tokens per second of each median round and
their ratio. Above 1, jaxlm is faster.

Every step must read all weights and the keys and values of the previous tokens.  `bound` is the time for this at the
rate at which the machine copies memory (reads plus writes).  The last number is the ratio of jaxlm's step to this
bound.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from train_step import in_turns

MODEL = {"vocabulary": 8192, "max_length": 1024, "width": 384, "layers": 6, "heads": 6}
PROMPT, NEW = 16, 128
ROUNDS = 5


def prompts(rows: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(0, MODEL["vocabulary"], (rows, PROMPT)).tolist()


def jaxlm_side(rows: int) -> Callable[[], float]:
    """Returns a function that continues `rows` prompts and returns its seconds."""
    import jax

    import jaxlm
    from jaxlm.nn.transformer import Transformer, init
    from jaxlm.verbs.machine import keep_memory

    keep_memory()  # as the command line does
    module = Transformer(jaxlm.ModelConfig(**MODEL))
    lm = jaxlm.LM(module.config, module, init(module, jax.random.key(0)))
    inputs = prompts(rows)

    def round_() -> float:
        start = time.perf_counter()
        outputs = jaxlm.generate(lm, inputs, max_new_tokens=NEW, temperature=0.0, return_tokens=True)
        assert [len(row) for row in outputs] == [NEW] * rows
        return time.perf_counter() - start

    return round_


def torch_side(rows: int, threads: int) -> Callable[[], float]:
    """Returns the same function for torch and transformers with `threads` threads."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.GPT2Config(
        vocab_size=MODEL["vocabulary"], n_positions=MODEL["max_length"], n_embd=MODEL["width"],
        n_layer=MODEL["layers"], n_head=MODEL["heads"], bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    inputs = torch.tensor(prompts(rows))
    mask = torch.ones_like(inputs)

    def round_() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            outputs = model.generate(inputs, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert outputs.shape == (rows, PROMPT + NEW)
        return time.perf_counter() - start

    return round_


def copy_side(rows: int) -> Callable[[], float]:
    """Copies memory, so that reads and writes together have the bytes that all steps of a generation must read."""
    import numpy as np

    half = step_bytes(rows) // 4  # bytes that each of two threads reads and writes
    pairs = [(np.ones(half, np.uint8), np.ones(half, np.uint8)) for _ in range(2)]
    pool = ThreadPoolExecutor(2)

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(NEW):
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
        return time.perf_counter() - start

    return round_


def step_bytes(rows: int) -> int:
    """Bytes that a step must read, on average over a generation: the weights and the keys and values.

    Of the embeddings only the token table counts, because it is also the head.
    """
    D, L, V = MODEL["width"], MODEL["layers"], MODEL["vocabulary"]
    weights = 12 * L * D * D + V * D
    return 4 * (weights + rows * (PROMPT + NEW // 2) * 2 * L * D)


SIDES = {
    "jaxlm": jaxlm_side,
    "torch 1": lambda rows: torch_side(rows, 1),  # on a busy machine, more threads are much slower
    "torch 2": lambda rows: torch_side(rows, 2),
    "copy": copy_side,
}


def work(side: str, rows: str) -> None:
    """The process of a `train_step.Worker`: runs a round for each input line."""
    round_ = SIDES[side](int(rows))
    for _ in sys.stdin:
        print(f"seconds {round_()}", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(*sys.argv[2:])
    for name in sys.argv[1:] or ("8", "1"):
        rows, seconds = int(name), in_turns(SIDES, name, ROUNDS)
        speed = {side: rows * NEW / seconds[side] for side in SIDES}
        fastest = max(speed["torch 1"], speed["torch 2"])
        step, bound = (1000 * seconds[side] / NEW for side in ("jaxlm", "copy"))
        print(
            f"{name} x {NEW}: jaxlm {speed['jaxlm']:,.0f} tokens/s, transformers {speed['torch 1']:,.0f} on one thread "
            f"and {speed['torch 2']:,.0f} on two, ratio to the faster {speed['jaxlm'] / fastest:.2f}; a step takes "
            f"{step:.2f} ms, bound {bound:.2f} ms ({step_bytes(rows) / 1e6:.0f} MB), {step / bound:.2f} times that",
            flush=True,
        )


if __name__ == "__main__":
    main()
