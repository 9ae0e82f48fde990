"""Not collected by itself: what `test_ends.py` runs, and interrupts, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path


def test_that_is_interrupted(slurm: Path) -> None:
    subprocess.run(["sbatch", "-N2", "-o", "/dev/null", "--wrap", "srun sleep 600"], check=True)
    Path(os.environ["IS_UP"]).write_text(str(slurm))
    time.sleep(600)
