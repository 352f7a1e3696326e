"""Plans runs with the compilers of TPUs and GPUs, without either, and writes benchmarks/PLANS.md.

    python benchmarks/plans.py [NAME ...]        requires the extras [plan] and [plan-gpu]; minutes per plan

NAME is an entry of the first column.  Without names, all plans are made.  The other rows are kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from jaxlm.planning.plan import GIB

COLAB = "--init bert-base --compute-dtype bfloat16 --data.length 128"
NO_DROPOUT = "--model.dropout 0 --model.attention-dropout 0 --model.mlp-dropout 0"
PLANS = {
    # name: (config, topology, further flags)
    "GPT-3 175B": ("gpt3_175b", "v5p:8x8x8", ""),
    "GPT-3 175B, smallest slice": ("gpt3_175b", "v5p:2x4x4", "--batch 8 --mesh.tensor 4"),
    "Llama 3.1 70B": ("llama_70b", "v5p:8x8x4", ""),
    "Llama 3.1 70B on v6e": ("llama_70b", "v6e:16x16", ""),
    "Llama 3.1 8B, context 8,192": ("llama_8b", "v6e:4x4", ""),
    "Mixtral 8x7B, context 8,192": ("mixtral_8x7b", "v5p:4x4x8", ""),
    "Mixtral 8x7B on v6e": ("mixtral_8x7b", "v6e:16x16", "--batch 256 --mesh.tensor 2"),
    "Qwen3-30B-A3B": ("qwen3_30b_a3b", "v5p:4x4x4", ""),
    "Qwen3-30B-A3B on v6e": ("qwen3_30b_a3b", "v6e:8x8", ""),
    "GPT-2 124M": ("gpt2_124m", "v5e:2x2", "--remat none --batch 64"),
    "BERT-large": ("bert_large", "v5e:2x2", "--remat dots --batch 112"),
    "T5 v1.1 XXL": ("t5_xxl", "v5p:4x4x4", ""),
    "BERT-base, fine-tuned (Colab)": ("finetune_csv", "v5e:1x1", f"{COLAB} --remat full --batch 2560"),
    "the same, no rematerialisation": ("finetune_csv", "v5e:1x1", f"{COLAB} --remat none --batch 128"),
    "GPT-2 124M on a GPU": ("gpt2_124m", "H100:1", "--remat auto --batch 32"),
    "BERT-large on a GPU": ("bert_large", "H100:1", f"--remat auto --batch 64 {NO_DROPOUT}"),
    "Llama 3.1 8B on GPUs": ("llama_8b", "H100:8", "--batch 40"),
}  # fmt: skip
HEAD = (
    "plan", "command", "rows", "remat", "state", "temporaries", "total", "available", "MFU, overlapped",
    "MFU, sequential", "tokens/s, sequential", "compiled in",
)  # fmt: skip
FILE = Path(__file__).with_name("PLANS.md")
TEXT = """# Plans

Memory and predicted speed of runs on TPUs and GPUs, as reported by `jaxlm plan`. It compiles the same step that `fit`
would run with the TPU compiler, libtpu {libtpu}, or JAX's plugin for CUDA, on a machine without TPUs and GPUs. Bytes
are per device. MFU is predicted by a roofline model, once with full overlap of matrix products, memory and network, and
once without overlap; the MFU of a run is expected between the two. None of these plans has been run.
`python benchmarks/plans.py` regenerates this page.

Compiled on {date} with jax {jax}.

{table}
"""


def row(name: str) -> list[str]:
    """Returns the table row of a plan."""
    config, topology, flags = PLANS[name]
    words = ["plan", f"configs/{config}.py", "--topology", topology, *flags.split()]
    print(f"{name}: jaxlm {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "jaxlm", *words, "--json"], stdout=subprocess.PIPE, text=True)
    plan = json.loads(done.stdout)
    gib = lambda size: f"{size / GIB:.1f} GiB"
    state = gib(plan["parameter_bytes"] + plan["optimizer_bytes"])
    first = [name, f"`{' '.join(words)}`", f"{plan['batch']:,}", plan["remat"], state]
    last = f"{plan['compile_seconds']:.0f} s"
    if not plan["fits"]:
        return [*first, "", plan["refused"] or gib(plan["used_bytes"]), gib(plan["limit_bytes"]), "", "", "", last]
    line = plan["roofline"]
    speed = plan["tokens"] / line["sequential"]["seconds"]
    of = lambda kind: f"{line[kind]['mfu']:.0%}"
    memory = [gib(plan[f"{what}_bytes"]) for what in ("temporary", "used", "limit")]
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
