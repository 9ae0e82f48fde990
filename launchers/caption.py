#!/usr/bin/env python
"""`python -m hive_scale caption`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hive_scale.__main__ import run

if __name__ == "__main__":
    sys.exit(run("caption"))
