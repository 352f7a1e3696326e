"""Trains the run of a config: `python train.py configs/NAME.py [--field value ...]`.  `--help` explains every field."""

import signal
import sys

# During the imports below an interrupt ends the process at once, because they may swallow an exception.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxlm.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
