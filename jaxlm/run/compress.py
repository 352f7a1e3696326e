"""Smaller variants of a model: each is written to a folder, measured, and compared with the original in a table."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import families
from jaxlm.config import CompressConfig
from jaxlm.devices.programs import Programs
from jaxlm.errors import UserError
from jaxlm.inference.packing import inference_params
from jaxlm.lm import LM, check_free, find, load, save
from jaxlm.reports import pictures
from jaxlm.reports.metrics import format_score, metric_label
from jaxlm.run.sweep import markdown
from jaxlm.storage import disk
from jaxlm.transforms.pruning import prune
from jaxlm.transforms.quantization import quantize
from jaxlm.transforms.structured import shrink

ROWS, LENGTH = 8, 128  # of the batch whose time is measured
REPEATS = 5
TABLE, PICTURE = "compress.md", "compress.png"
# Scores that are numbers of things, which a table of variants leaves out.
_COUNTS = ("examples", "dropped", "tokens", "bytes")

Evaluate = Callable[[LM], Mapping[str, float]]


class Variant(NamedTuple):
    """A smaller model: the name of its folder, and the function that makes it from the original."""

    name: str
    make: Callable[[LM], LM]


def variants_of(recipe: CompressConfig, texts: Iterable[str] | None) -> list[Variant]:
    """Returns one variant for each format of weights.

    Args:
      recipe: how the variants are made.
      texts: the texts of the calibration data; None: no data.
    """
    data = None if texts is None else list(islice(texts, recipe.calibration_texts))
    return [Variant(weights, partial(_make, recipe, weights, data)) for weights in recipe.weights or ("float",)]


def _make(recipe: CompressConfig, weights: Any, texts: list[str] | None, lm: LM) -> LM:
    """Returns a variant of a model: with fewer layers, heads and columns, then pruned, then quantised."""
    if recipe.shrinks:
        kept: dict[str, Any] = {name: getattr(recipe, name) or None for name in ("layers", "heads", "mlp")}
        lm = shrink(lm, **kept, calibration=texts)
    if recipe.prunes:
        lm = prune(
            lm,
            recipe.sparsity or None,
            method=recipe.pruning,
            pattern=recipe.pattern or None,
            targets=recipe.targets,
            calibration=None if recipe.pruning == "magnitude" else texts,
        )
    if weights == "float":
        return lm
    return quantize(
        lm,
        weights,
        group=None if recipe.group < 0 else recipe.group,
        symmetric=recipe.symmetric,
        targets=recipe.targets,
        embeddings=recipe.embeddings,
        inputs=recipe.inputs,
        method=recipe.method,
        calibration=texts if recipe.calibrates else None,
    )


class Measured(NamedTuple):
    """A model with its sizes in bytes, its speed, and its scores."""

    name: str
    on_disk: int
    in_memory: int
    tokens_per_second: float
    scores: Mapping[str, float]


def compress(
    name: str, out: str, variants: Iterable[Variant], evaluate: Evaluate | None, log: Callable[[str], None]
) -> list[Measured]:
    """Writes the variants of a model, and a table and a picture that compare them with the original.

    A single variant is written to `out`, several to folders in it.

    Args:
      name: the folder of a run, a folder in Hugging Face format, or a hub name.
      out: the folder to write, which must be new or empty.
      variants: the variants; at least one.
      evaluate: computes the scores of a model; None: no scores.
      log: prints what is done.

    Returns:
      The original and the variants.

    Raises:
      UserError: if `out` is not empty, and as the variants raise it.
    """
    variants = list(variants)
    names = [variant.name for variant in variants]
    if repeated := [one for one in dict.fromkeys(names) if names.count(one) > 1]:
        raise UserError(f"the variant {repeated[0]} is given twice; give each variant once")
    top = disk.local(out, "OUT")
    check_free(top, overwrite=False)
    lm = load(name)
    made = [(variant.name, variant.make(lm)) for variant in variants[:1]]  # mistakes end before anything is measured
    log(f"measuring the original, {name}")
    results = [measure("original", lm, find(name), evaluate)]
    for variant in variants:
        log(f"making {variant.name}")
        small = made.pop()[1] if made else variant.make(lm)
        folder = top if len(variants) == 1 else top / variant.name
        save(small, folder)
        results.append(measure(variant.name, small, folder, evaluate))
        del small
    table = table_of(results)
    disk.write(top / TABLE, table)
    pictures.draw(picture_of(results), top / PICTURE)
    return results


def measure(name: str, lm: LM, folder: Path, evaluate: Evaluate | None) -> Measured:
    """Returns the sizes, the speed and the scores of a model whose files are in `folder`."""
    patterns = ("*.safetensors", "gguf/*")  # the second are links to the file of a GGUF model
    folders = {folder, families.base_of(folder)}  # two folders for an adapter
    on_disk = sum(file.stat().st_size for one in folders for pattern in patterns for file in one.glob(pattern))
    lm = dataclasses.replace(lm, programs=Programs())  # the compiled programs of this model are freed with it
    scores = {} if evaluate is None else evaluate(lm)
    kept = {key: float(x) for key, x in scores.items() if key not in _COUNTS and "/" not in key}
    return Measured(name, on_disk, parameter_bytes(lm.params), tokens_per_second(lm), kept)


def parameter_bytes(params: Any) -> int:
    """Returns the bytes of all parameters in the memory of devices; a CPU stores a 4-bit value in a byte."""
    return sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)


def tokens_per_second(lm: LM) -> float:
    """Returns the tokens per second that a forward pass reads, in batches of 8 rows of 128 tokens."""
    length = min(LENGTH, lm.config.max_length)
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocabulary, (ROWS, length)), jnp.int32)
    more: dict[str, Any] = {"target_tokens_BT": tokens_BT} if lm.config.structure == "encoder_decoder" else {}
    program = jax.jit(lambda params, tokens_BT: lm.apply(params, tokens_BT, **more).hidden_BTD)
    run = partial(program, inference_params(lm), tokens_BT)
    run().block_until_ready()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return tokens_BT.size / statistics.median(times)


def table_of(results: list[Measured]) -> str:
    """Returns a Markdown table with a line for each model."""
    scores = list(dict.fromkeys(name for result in results for name in result.scores))
    lines = [["model", "files (MB)", "memory (MB)", "tokens/s", *map(metric_label, scores)]]
    for one in results:
        sizes = [_megabytes(one.on_disk), _megabytes(one.in_memory), f"{one.tokens_per_second:,.0f}"]
        lines.append([one.name, *sizes, *(format_score(name, one.scores[name]) for name in scores)])
    return markdown(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}" if size >= 10_000_000 else f"{size / 1e6:.3g}"


def picture_of(results: list[Measured]) -> pictures.Bars:
    """Returns bars of the sizes of the files."""
    names = tuple(f"{one.name}{_score(one)}" for one in results)
    return pictures.Bars("Size of the files", names, tuple(one.on_disk / 1e6 for one in results), "MB")


def _score(one: Measured) -> str:
    """Returns the first score of a model for the name of its bar."""
    for name, value in one.scores.items():
        if name != "loss":
            return f" ({metric_label(name)} {format_score(name, value)})"
    return ""
