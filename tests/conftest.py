"""Fixtures shared by all tests. Their hundreds of small runs log to no wandb unless a test asks for it.

Everything that tests start, such as a Slurm or a browser, ends with them, however they end.
"""

import os

import guardian
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors; and the other cores have tests of their own
settings.register_profile("shared", deadline=None)  # a busy machine's seconds say nothing of a property
settings.load_profile("shared")
guardian.watch()
