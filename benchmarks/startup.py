"""How long a user waits before any work: the imports and the help of the command line.

    python benchmarks/startup.py

Each command runs seven times in a process of its own, in turn with the others; the medians are printed.  The cost of
`import jaxlm` is what it takes beyond jax, flax and optax, which every program that uses it imports anyway.
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
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    for arguments in COMMANDS.values():  # writes the .pyc files
        seconds(arguments)
    rounds = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(times[name] for times in rounds) for name in COMMANDS}
    for name, median in medians.items():
        print(f"{median:6.2f} s  {name}")
    print(f"{medians['import jaxlm'] - medians[PLAIN]:6.2f} s  of `import jaxlm` beyond jax, flax and optax")
