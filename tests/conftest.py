"""What all tests share: hundreds of small runs, none of which need be drawn by wandb unless a test says so."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")
