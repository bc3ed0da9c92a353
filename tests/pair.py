"""Runs command lines one after another, on the ranks that torchrun has started: torchrun pair.py FILE.

The file is JSON: a list of lists of words, each what follows `lit-prune`. One start of the libraries serves them all.
"""

import json
import sys
from pathlib import Path

from lit_prune import cli

if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        print("lit-prune", *words, flush=True)
        cli.main(words)
