"""Checkpoints that any engine can read on any number of ranks, and that are verified before use."""
