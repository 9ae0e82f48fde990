"""Staged, sharded pre-training of HIVE: a vision encoder and an LLM joined by hierarchical cross-attention."""

__version__ = "0.1.0"
