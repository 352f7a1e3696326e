"""`python train.py configs/NAME.py [--field value ...]`: train what a config says.  `--help` explains every field."""

import signal
import sys

# An interrupt ends the process at once while the imports below run, which may swallow an exception.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from jaxlm.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
