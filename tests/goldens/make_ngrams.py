"""Writes ngrams.arpa.gz and ngrams_fallback.arpa.gz: the models that KenLM estimates for the texts of test_ngrams.py.

PYTHONPATH=tests python tests/goldens/make_ngrams.py path/to/lmplz     (built from KenLM 0.3.0 with cmake)
"""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import test_ngrams


def main() -> None:
    for file, texts, flags in test_ngrams.GOLDENS:
        command = [sys.argv[1], *flags, "-S", "100M"]
        result = subprocess.run(command, input="".join(f"{text}\n" for text in texts).encode(), capture_output=True)
        assert result.returncode == 0, result.stderr.decode()
        path = Path(__file__).parent / file
        path.write_bytes(gzip.compress(result.stdout, mtime=0))
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
