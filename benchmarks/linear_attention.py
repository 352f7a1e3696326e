"""Compares linear attention with attention: tokens per second, and bytes of the cache per token of a row.

    python benchmarks/linear_attention.py [--lengths 512 2048] [--rounds 5]

The two decoders have nearly the same number of parameters.  The programs of both alternate, and the script prints the
fastest of the rounds, because other programs may use the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import ModelConfig
from jaxlm.nn.stack import CacheSpec
from jaxlm.nn.transformer import Transformer, apply, count_parameters, init

SIZES: dict[str, Any] = {"vocabulary": 512, "width": 256, "layers": 4, "heads": 4, "max_length": 4096, "biases": ()}
SIZES |= {"positions": "rotary", "norm": "rmsnorm", "feed_forward": "gated", "activation": "silu"}
MODELS = {
    "attention": ModelConfig(**SIZES, mlp_width=768),
    "gated_delta": ModelConfig(**SIZES, mlp_width=680, mixer="gated_delta"),
}
STEPS = 8  # generated tokens in a measurement


def programs(model: ModelConfig, length: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """Returns compiled functions by what they measure, and the bytes of the cache of one row."""
    module, tokens_BT = Transformer(model), np.random.default_rng(0).integers(0, model.vocabulary, (1, length))
    params = jax.jit(partial(init, module))(jax.random.key(0))
    keep = CacheSpec(np.array([length - STEPS]), length)
    prefill = jax.jit(lambda params: apply(module, params, tokens_BT, keep, method="prefill")[1])
    caches = jax.block_until_ready(prefill(params))
    loss = lambda params: jnp.square(apply(module, params, tokens_BT)).mean()

    @jax.jit
    def generate(params: Any, caches: Any) -> Any:
        def step(n: Any, caches: Any) -> Any:
            at_B1 = jnp.full((1, 1), length - STEPS, jnp.int32) + n
            return apply(module, params, tokens_BT[:, :1], at_B1, caches, method="decode_cached")[1]

        return jax.lax.fori_loop(0, STEPS, step, caches)

    gradient = jax.jit(jax.grad(loss))
    runs = {"prompt": partial(prefill, params), "training": partial(gradient, params)}
    runs["generation"] = partial(generate, params, caches)
    return runs, sum(leaf.nbytes for leaf in jax.tree.leaves(caches))


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main(lengths: list[int], rounds: int) -> None:
    for name, model in MODELS.items():
        print(f"{name}: {count_parameters(model):,} parameters")
    for length in lengths:
        made = {name: programs(model, length) for name, model in MODELS.items()}
        for measured in ("prompt", "training", "generation"):
            for runs, _ in made.values():
                seconds(runs[measured])  # compiles
            times = [{name: seconds(runs[measured]) for name, (runs, _) in made.items()} for _ in range(rounds)]
            tokens = STEPS if measured == "generation" else length
            for name in made:
                print(f"{length:6} {measured:10} {name:12} {tokens / min(t[name] for t in times):10,.0f} tokens/s")
        for name, (_, size) in made.items():
            print(f"{length:6} {'cache':10} {name:12} {size / length:10,.0f} bytes/token, {size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
