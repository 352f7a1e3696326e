"""`jaxlm convert`: a model with another dtype, head or file size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from jaxlm.config.ranges import Config, Range
from jaxlm.devices import process
from jaxlm.storage import disk
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import parse


@dataclass(frozen=True)
class Convert(Config):
    """Write a model to a new folder or GGUF file, with another dtype, head or maximum file size."""

    # The folder of a run, a folder in Hugging Face format, a GGUF file, or a hub name.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The folder to write, which must be new or empty, or a file whose name ends with .gguf.
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    # Of all tensors, or of the matrices of a GGUF file, which can also be q8_0 or q4_0; not set: unchanged.
    dtype: Literal["float32", "bfloat16", "float16", "q8_0", "q4_0"] | None = None
    head: str | None = None  # lm, masked_lm, classes, tokens, span, pooled, none, encoder ...; not set: unchanged
    merge: bool = False  # merge the updates of an adapter into its base, and write the whole model
    revision: str | None = None  # branch, tag or commit of a hub name
    shard_gb: Annotated[float, Range(0, 1_000_000, above=True)] = 5.0  # maximum size of a file, in 1e9 bytes
    overwrite: bool = False  # replace a destination that exists and is not empty


def convert(argv: list[str], _: process.Signals) -> int:
    """Write a model with another dtype, head or file size: jaxlm convert SOURCE DESTINATION [--dtype bfloat16]."""
    args = parse(Convert(source=tyro.MISSING, destination=tyro.MISSING), argv, "jaxlm convert")
    machine.configure_process()
    import jaxlm

    jaxlm.lm.check_free(disk.local(args.destination, "DESTINATION"), args.overwrite)
    lm = jaxlm.load(args.source, head=args.head, dtype=None, compute_dtype="float32", revision=args.revision)
    lm = jaxlm.merge(lm, dequantize=True) if args.merge else lm
    max_bytes = int(args.shard_gb * 1e9)
    kind = jaxlm.save(lm, args.destination, dtype=args.dtype, overwrite=args.overwrite, max_shard_bytes=max_bytes)
    print(f"{args.destination}: {kind} format")
    return 0
