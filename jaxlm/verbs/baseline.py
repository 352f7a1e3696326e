"""`jaxlm baseline`: what counting achieves on the data of a run."""

from __future__ import annotations

import sys

from jaxlm.devices import process
from jaxlm.verbs import machine
from jaxlm.verbs.arguments import read_run, split_config, split_flag

_FLAGS = """\
  --field value     change a field of the config, such as --data.path or --baseline.order
  --model PRESET    replace the model by a preset
  --arpa FILE       for a language model: write the n-gram model; its words are the ids of the tokens
  --workdir FOLDER  write the scores to baseline.json in this folder"""


def baseline(argv: list[str], _: process.Signals) -> int:
    """Print what counting achieves on the data of a run: jaxlm baseline CONFIG [--arpa FILE] [--field value ...]."""
    file, words, flag_words = split_config(argv, baseline, _FLAGS)
    arpa, flag_words = split_flag(flag_words, "--arpa", "the path of a file to write")
    has_folder = any(word.partition("=")[0] == "--workdir" for word in flag_words)
    run = read_run("baseline", file, words, flag_words)
    machine.configure_process()
    from jaxlm.run import baseline as counting

    log = lambda line: print(line, file=sys.stderr, flush=True)
    print(counting.baseline(run, run.workdir if has_folder else "", arpa, log), end="")
    return 0
