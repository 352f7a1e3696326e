"""Compares the training step with that of torch, in one run on this machine.

    python benchmarks/train_step.py [gpt] [bert] [char]        requires the [parity] extra

Both implementations train the same architecture on the same shapes with AdamW in float32 and without dropout.  For
decoders the peer consists of torch's own modules and fused attention, as in nanoGPT; for BERT it is transformers.  Each
runs in a separate process, and they alternate in short rounds, so that other load on the machine affects both.  The
script prints the tokens per second of each median round and their ratio.  Above 1, jaxlm is faster.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

CASES = {
    # name: (rows, length, steps in a round, model fields)
    "gpt": (16, 256, 2, {"vocabulary": 8192, "max_length": 256, "width": 384, "layers": 6, "heads": 6}),
    "bert": (8, 128, 2, {"structure": "encoder", "heads_on_top": ("masked_lm",), "vocabulary": 30522,
                         "max_length": 512, "types": 2, "norm_place": "post", "embedding_norm": True,
                         "activation": "gelu", "norm_epsilon": 1e-12}),
    "char": (12, 64, 100, {"vocabulary": 65, "max_length": 64, "width": 128, "layers": 4, "heads": 4}),
}  # fmt: skip
ROUNDS = 7


def jaxlm_side(name: str) -> Callable[[], float]:
    """Returns a function that runs one round of `CASES[name]` and returns its seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm import CausalLM, MaskedLM, MeshConfig, ModelConfig, OptimizerConfig
    from jaxlm.devices import sharding
    from jaxlm.nn.transformer import Transformer, init
    from jaxlm.run.optimizer import make_optimizer, make_schedule
    from jaxlm.run.step import TrainState, make_train_step
    from jaxlm.tasks.pretraining import CausalLMTask, MaskedLMTask

    rows, length, steps, fields = CASES[name]
    model = ModelConfig(**fields)
    special = type("Special", (), {"cls": 1, "sep": 2, "mask": 3, "bos": 4, "eos": 5})
    if model.structure == "encoder":
        task = MaskedLMTask(MaskedLM(), length, 0, special)
    else:
        task = CausalLMTask(CausalLM(), length, 0, special)
    mesh = sharding.make_mesh(MeshConfig())
    module = Transformer(model, sharding.Placement(mesh), unroll=model.layers)
    settings = OptimizerConfig(schedule="constant")
    params = init(module, jax.random.key(0))
    optimizer = make_optimizer(settings, 1000, params)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(0)))
    whole = sharding.replicated(mesh)
    step = jax.jit(
        make_train_step(task, module, optimizer, make_schedule(settings, 1000)),
        donate_argnums=0, in_shardings=(whole, None), out_shardings=(whole, whole),
    )  # fmt: skip
    state = jax.device_put(state, whole)
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.vocabulary, (1, rows, length), dtype=np.int32)
    predicted = np.ones(tokens.shape) if model.structure == "decoder" else random.random(tokens.shape) < 0.15
    batch = {
        "tokens_BT": tokens,
        "labels_BT": tokens,
        "weights_BT": predicted.astype(np.float32),
        "segments_BT": np.ones_like(tokens),
        "positions_BT": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    }
    batch = {key: jax.device_put(value, sharding.batch_sharding(mesh, key)) for key, value in batch.items()}

    def round_() -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)  # as `fit` does on CPU
        return time.perf_counter() - start

    return round_


def torch_gpt(vocabulary: int, max_length: int, width: int, layers: int, heads: int) -> Any:
    """Returns a GPT-2 (pre-norm, tied embeddings) from torch's own modules and its fused attention.

    For small models it is faster than the model of transformers, which does more work per layer in Python.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )

        def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
            parts = self.query_key_value(self.attention_norm(x_BTD)).split(width, dim=2)
            q_BHTC, k_BHTC, v_BHTC = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in parts)
            mixed_BHTC = functional.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
            x_BTD = x_BTD + self.out(mixed_BHTC.transpose(1, 2).flatten(2))
            return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            nn.init.normal_(self.tokens.weight, std=0.02)

        def forward(self, tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
            for block in self.blocks:
                x_BTD = block(x_BTD)
            logits_BTV = functional.linear(self.norm(x_BTD), self.tokens.weight)
            return functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

    return GPT()


def torch_side(name: str) -> Callable[[], float]:
    """Returns the same function for torch: its own modules for decoders, transformers for encoders."""
    import torch

    rows, length, steps, fields = CASES[name]
    vocabulary = fields["vocabulary"]
    if fields.get("structure") == "encoder":
        import transformers

        config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        bert = transformers.BertForMaskedLM(config)
        loss_of = lambda tokens, labels: bert(tokens, labels=labels).loss
        model: Any = bert
    else:
        loss_of = model = torch_gpt(**fields)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, vocabulary, (rows, length))
    labels = tokens.clone()
    if "structure" in fields:
        labels[torch.rand(labels.shape) >= 0.15] = -100

    def round_() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss = loss_of(tokens, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - start

    return round_


SIDES = {"jaxlm": jaxlm_side, "torch": torch_side}


def work(side: str, name: str) -> None:
    """The process of a `Worker`: runs a round for each input line."""
    if side == "jaxlm":
        from jaxlm import DataConfig, ModelConfig, RunConfig
        from jaxlm.verbs.machine import keep_memory, one_device_per_core

        # As train.py does.
        rows, length, _, fields = CASES[name]
        model = ModelConfig(**fields)
        one_device_per_core([RunConfig(model, batch=rows, data=DataConfig(length=length))])
        keep_memory()
    round_ = SIDES[side](name)
    for _ in sys.stdin:
        print(f"seconds {round_()}", flush=True)


class Worker:
    """An implementation in a separate process, so that their threads do not disturb each other."""

    def __init__(self, side: str, name: str):
        command = [sys.executable, sys.argv[0], "--work", side, name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def round(self) -> float:
        """Runs one round and returns its seconds."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        while line and not line.startswith("seconds "):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended; run it manually to see the error")
        return float(line.split()[1])


def in_turns(sides: Iterable[str], name: str, rounds: int) -> dict[str, float]:
    """Returns the seconds of each median round.  The sides alternate, after one round each to compile and warm up."""
    workers = {side: Worker(side, name) for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for worker in workers.values():
        worker.round()
    for _ in range(rounds):
        for side, worker in workers.items():
            seconds[side].append(worker.round())
    for worker in workers.values():
        worker.process.kill()
        worker.process.wait()
    return {side: statistics.median(durations) for side, durations in seconds.items()}


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(*sys.argv[2:])
    for name in sys.argv[1:] or CASES:
        rows, length, steps, _ = CASES[name]
        seconds = in_turns(SIDES, name, ROUNDS)
        speed = {side: rows * length * steps / seconds[side] for side in SIDES}
        print(
            f"{name:5} {rows} x {length}: jaxlm {speed['jaxlm']:,.0f} tokens/s, torch "
            f"{speed['torch']:,.0f} tokens/s, ratio {speed['jaxlm'] / speed['torch']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
