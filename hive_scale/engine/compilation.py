"""Compilation of the model's blocks by `torch.compile`: when it is on, and for which shapes."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from hive_scale import strict_json
from hive_scale.config import EngineConfig
from hive_scale.device import is_accelerator, is_compiled_by_default
from hive_scale.engine.activation_checkpointing import blocks_of
from hive_scale.exit_codes import TryAgain

COMPILERS = ("g++", "clang++", "c++")
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable for the folder of compiled code
# Texts are padded to a multiple of so many tokens. Compiled code for one length serves all of them, since it is made
# for any length that this divides; for others torch would compile again in the middle of a run.
TOKENS = 16
# Encoder and LLM share transformers' function around a block, of which torch by default keeps 8 versions: for training
# and evaluation, the first length and any other, with and without a mask, frozen and trained. torch 2.11 has no option.
LIMIT: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}


def is_compiled(config: EngineConfig, kind: str) -> bool:
    """True if blocks are compiled on a device of type `kind`. With ``auto``, where it pays and can work.

    ZeRO-3 gathers inside of blocks, which would cut each into many graphs.
    """
    return would_compile(config, config.compile == "auto" and is_compiled_by_default(kind) and not _lacking(kind))


def would_compile(config: EngineConfig, by_default: bool) -> bool:
    """True if blocks are compiled on a machine that does so `by_default`."""
    return by_default and _zero_stage(config) < 3 if config.compile == "auto" else bool(config.compile)


def _zero_stage(config: EngineConfig) -> int:
    """The ZeRO stage of the DeepSpeed JSON; 0 without one, or if it is one that `deepspeed_config` will refuse."""
    if not config.ds_config:
        return 0
    try:
        return int(strict_json.read(Path(config.ds_config))["zero_optimization"]["stage"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def check_compiler(config: EngineConfig, kind: str) -> None:
    """Raises ValueError if `config` asks for compiled blocks, and this machine lacks what torch needs for them."""
    if config.compile is True and (lacking := _lacking(kind)):
        raise ValueError(
            f"engine.compile=true needs {lacking}, and there is none here: install it, or set engine.compile=false "
            "(all else works without)"
        )


def _lacking(kind: str) -> str:
    """What `torch.compile` needs for a device of type `kind` and does not find; "": nothing."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))):
        return "a C++ compiler (g++, or one that CXX names)"
    if is_accelerator(torch.device(kind)) and not find_spec("triton"):
        return "the package triton"
    # Triton compiles a module of Python for each kernel
    if is_accelerator(torch.device(kind)) and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (python3-dev)"
    return ""


def compile_blocks(model: Any) -> None:
    """Compile each block of a Hive, in place, and what it does with pixels, as one kernel.

    What was compiled before is read from a cache that outlives the machine's /tmp.
    """
    # importing torch sets the variable to a folder in /tmp, unless the user has set it
    if CACHE not in os.environ or Path(os.environ[CACHE]).name.startswith("torchinductor_"):
        os.environ[CACHE] = str(_own_cache())
    for block in blocks_of(model):
        block.compile(**LIMIT)
    model.normalise = torch.compile(model.normalise, **LIMIT)


def _own_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "hive_scale", "compiled")


@contextmanager
def renewing_cache() -> Iterator[None]:
    """Context of work with compiled blocks. If torch's compiler fails, our cache, which may be damaged, is removed.

    Raises TryAgain then: other ranks may be in a collective, so that only a restart can compile anew. Without a cache
    of ours, raises ValueError with the remedy.
    """
    cache = _own_cache()
    had_one = cache.is_dir()
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._inductor.", "torch._dynamo.")):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if had_one and os.environ.get(CACHE) == str(cache):
            shutil.rmtree(cache, ignore_errors=True)
            raise TryAgain(
                f"compiled blocks failed ({reason}): the cache of compiled code, {cache}, was removed, and is made anew"
            ) from error
        raise ValueError(
            f"torch.compile failed ({reason}): set engine.compile=false, which only costs speed"
        ) from error
