"""Measures the startup time: imports and the help of the command line.

    python benchmarks/startup.py

Each command runs seven times in a separate process, alternating with the others; the script prints the medians.  The
last line is the cost of `import jaxlm` beyond that of jax, flax and optax.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

PLAIN = "import jax, flax.linen, optax"
COMMANDS = {
    PLAIN: ["-c", PLAIN],
    "import jaxlm": ["-c", f"{PLAIN}, jaxlm"],
    "jaxlm --help": ["-m", "jaxlm", "--help"],
    "jaxlm train quickstart --help": ["-m", "jaxlm", "train", "quickstart", "--help"],
}
ROUNDS = 7


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    for arguments in COMMANDS.values():  # write the .pyc files
        seconds(arguments)
    rounds = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in COMMANDS}
    for name, median in medians.items():
        print(f"{median:6.2f} s  {name}")
    print(f"{medians['import jaxlm'] - medians[PLAIN]:6.2f} s  of `import jaxlm` beyond jax, flax and optax")
