"""`python train.py configs/NAME.py [--field value ...]`: train what a config says.  `--help` explains every field."""

import sys

from jaxlm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
