"""What all tests share: hundreds of small runs, none of which need be drawn by wandb unless a test says so.

Whatever they start, a whole Slurm or a browser, ends with them, however they end.
"""

import os

import guardian
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; and the other cores have tests of their own
settings.register_profile("shared", deadline=None)  # a busy machine's seconds say nothing of a property
settings.load_profile("shared")
guardian.watch()
