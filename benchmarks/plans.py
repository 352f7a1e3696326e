"""Plans of large runs on TPUs that are not here, by their own compiler: remakes benchmarks/PLANS.md.

    python benchmarks/plans.py [NAME ...]        needs the [plan] extra; minutes each on two CPU cores

NAME is the first column's; without any, all are made.  Lines of those that are not named stay as they are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from jaxlm.planning.plan import GIB

COLAB = "--init bert-base --compute-dtype bfloat16 --data.length 128"
PLANS = {
    # name: (config, topology, further flags)
    "GPT-3 175B": ("gpt3_175b", "v5p:8x8x8", ""),
    "GPT-3 175B, the least slice": ("gpt3_175b", "v5p:2x4x4", "--batch 8 --mesh.tensor 4"),
    "Llama 3.1 70B": ("llama_70b", "v5p:8x8x4", ""),
    "Llama 3.1 70B on v6e": ("llama_70b", "v6e:16x16", ""),
    "Llama 3.1 8B, context 8,192": ("llama_8b", "v6e:4x4", ""),
    "GPT-2 124M": ("gpt2_124m", "v5e:2x2", "--remat none --batch 64"),
    "BERT-large": ("bert_large", "v5e:2x2", "--remat dots --batch 112"),
    "T5 v1.1 XXL": ("t5_xxl", "v5p:4x4x4", ""),
    "BERT-base, fine-tuned (Colab)": ("finetune_csv", "v5e:1x1", f"{COLAB} --remat full --batch 2560"),
    "the same, nothing recomputed": ("finetune_csv", "v5e:1x1", f"{COLAB} --remat none --batch 128"),
}  # fmt: skip
HEAD = (
    "plan", "command", "rows", "remat", "state", "temporaries", "in all", "of", "MFU, overlapped", "MFU, apart",
    "tokens/s, apart", "compiled in",
)  # fmt: skip
FILE = Path(__file__).with_name("PLANS.md")
TEXT = """# Plans

What large runs need on TPUs, as `jaxlm plan` says: the very step that `fit` would run, compiled by the TPU's own
compiler, libtpu {libtpu}, on a machine without a TPU.  Bytes are of one device.  MFU is predicted by a roofline: once
with products, memory and network all at the same time, once with one after the other; a run lies between them.  None of
these was run.  `python benchmarks/plans.py` makes this page anew.

Made on {date}, jax {jax}.

{table}
"""


def row(name: str) -> list[str]:
    """The line of a plan."""
    config, topology, flags = PLANS[name]
    words = ["plan", f"configs/{config}.py", "--topology", topology, *flags.split()]
    print(f"{name}: jaxlm {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "jaxlm", *words, "--json"], stdout=subprocess.PIPE, text=True)
    made = json.loads(done.stdout)
    gib = lambda size: f"{size / GIB:.1f} GiB"
    state = gib(made["parameter_bytes"] + made["optimizer_bytes"])
    first = [name, f"`{' '.join(words)}`", f"{made['batch']:,}", made["remat"], state]
    last = f"{made['compile_seconds']:.0f} s"
    if not made["fits"]:
        return [*first, "", made["refused"] or gib(made["used_bytes"]), gib(made["limit_bytes"]), "", "", "", last]
    line = made["roofline"]
    speed = made["tokens"] / line["sequential"]["seconds"]
    of = lambda kind: f"{line[kind]['mfu']:.0%}"
    memory = [gib(made[f"{what}_bytes"]) for what in ("temporary", "used", "limit")]
    return [*first, *memory, of("overlapped"), of("sequential"), f"{speed:,.0f}", last]


def main() -> None:
    from importlib.metadata import version

    import jax

    lines = {}
    if FILE.exists():
        cells = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in FILE.read_text().splitlines()]
        lines = {line[0]: line for line in cells if line[0] in PLANS}
    for name in sys.argv[1:] or PLANS:
        lines[name] = row(name)
        ordered = [lines[known] for known in PLANS if known in lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *ordered])
        versions = {"libtpu": version("libtpu"), "jax": jax.__version__, "date": f"{date.today():%d %B %Y}"}
        FILE.write_text(TEXT.format(table=table, **versions))
        print(" | ".join(lines[name]), flush=True)


if __name__ == "__main__":
    main()
