"""Seed random number generators as a pure function of seed, step and rank, so that no generator state is saved.

A resumed run draws the same numbers as an uninterrupted one. Numbers drawn between steps (for evaluation, or for
loading other data) do not affect training.
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
