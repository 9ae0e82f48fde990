"""Staged, sharded pre-training of HIVE: a vision encoder and an LLM joined by hierarchical cross-attention.

Names of `__all__` are imported on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations  # older Pythons read this file, and are told which one is needed

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_MODULES = {
    "HiveConfig": "hive_scale.model.transformers_api",
    "HiveForConditionalGeneration": "hive_scale.model.transformers_api",
    "HiveProcessor": "hive_scale.model.transformers_api",
}
__all__ = ["HiveConfig", "HiveForConditionalGeneration", "HiveProcessor", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
