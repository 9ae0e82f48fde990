"""Random numbers as a pure function of seed, step and rank: so there is no generator state to save or to restore.

A run that goes on draws what it would have drawn, on any number of ranks, and whatever was drawn between
steps (to look at held-out data, to load other data) leaves the training as it is.
"""

from __future__ import annotations

import random

import numpy
import torch

from hive_scale.device import seed_accelerator


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of Python, NumPy and torch (CPU and GPU) for optimizer step `step` of this rank."""
    words = [int(word) for word in numpy.random.SeedSequence((seed, step, rank)).generate_state(4)]
    random.seed(words[0])
    numpy.random.seed(words[1])
    number = words[2] << 32 | words[3]
    torch.default_generator.manual_seed(number)
    seed_accelerator(number)
