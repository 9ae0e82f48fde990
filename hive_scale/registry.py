"""Registries of classes by name: fusions, encoder families, LLM families, optimizers and adapters.

Each entry is a class that implements its base class's whole interface, so no other module compares names. Entries of
this package are imported on first use; a user's own modules, named in the config's ``extensions``, register more.

This module imports no torch.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=type)
EXTENSIONS = "HIVE_SCALE_EXTENSIONS"  # variable that names the user's modules, for commands without a config


class Registry:
    """Classes of one kind by name, imported on first use."""

    def __init__(self, what: str, modules: Mapping[str, str]) -> None:
        """`what` names the kind of entry in messages; `modules` maps each built-in name to the module that has it."""
        self.what, self._modules = what, dict(modules)
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a class under `name`.

        Raises ValueError if the name is taken, or the class lacks a method or class attribute of its base class.
        """

        def add(entry: T) -> T:
            taken = self._modules.get(name, entry.__module__)
            before = self._entries.get(name, entry)
            if taken != entry.__module__ or before.__qualname__ != entry.__qualname__:
                raise ValueError(f"{self.what} {name} is there already, from {taken}: give yours another name")
            if missing := sorted({*getattr(entry, "__abstractmethods__", ()), *_without_value(entry)}):
                raise ValueError(f"{self.what} {name}: {entry.__name__} does not say {', '.join(missing)}: define them")
            self._modules[name], self._entries[name] = entry.__module__, entry
            return entry

        return add

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):  # a config may hold any type here
            return False
        if name not in self._modules:
            load_extensions(_trusted())
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        """The class registered as `name`; imports its module. Raises ValueError if there is none."""
        self.check(name)
        if name not in self._entries:
            import_module(self._modules[name])
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """All registered names, including entries that are not imported yet."""
        return tuple(self._modules)

    def check(self, name: str, key: str = "", modules: Sequence[str] = ()) -> None:
        """Raises ValueError if `name` is not registered; the message suggests the nearest name.

        `key` is the config key that holds the name, and `modules` the user's modules to suggest, both for the message.
        """
        if name not in self:
            near = get_close_matches(str(name), self._modules, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self._modules)}."
            where, needed = f"{key}={name}: " if key else "", ",".join(modules) or "module"
            raise ValueError(
                f"{where}there is no {self.what} '{name}': {hint} For one of your own give extensions=[{needed}], or "
                f"{EXTENSIONS}={needed} in the environment"
            )


def _without_value(entry: type) -> set[str]:
    """Names of class attributes that `entry` or its base classes declare as ClassVar, and that have no value."""
    declared = {
        name
        for base in inspect.getmro(entry)
        for name, kind in vars(base).get("__annotations__", {}).items()
        if "ClassVar" in str(kind)
    }
    return {name for name in declared if not hasattr(entry, name)}


def use_extensions(modules: Iterable[str]) -> None:
    """Import the modules that a user's own command names, and pass them on to child processes by the environment.

    Raises ValueError for a module that cannot be imported.
    """
    load_extensions(modules)
    os.environ[EXTENSIONS] = ",".join(dict.fromkeys([*_trusted(), *modules]))


def load_extensions(modules: Iterable[str]) -> None:
    """Import modules, which register their classes. Raises ValueError for a module that cannot be imported.

    Importing runs code. A run's saved config may name modules, but only the user's own command or environment gets
    them imported.
    """
    for module in modules:
        if module not in sys.modules and (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # users keep their modules in the current directory
        try:
            import_module(module)
        except Exception as error:  # a user's module may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"extensions: {module} cannot be imported ({type(error).__name__}: {reason}): give the name of a "
                "module that Python finds, as by PYTHONPATH"
            ) from error


def _trusted() -> list[str]:
    return [module for module in os.environ.get(EXTENSIONS, "").split(",") if module]


FUSION_NAMES = ("cross_attention", "joint_attention", "concat", "deepstack", "gated_cross_attention", "q_former")
FUSIONS = Registry("fusion", {name: f"hive_scale.model.fusion.{name}" for name in FUSION_NAMES})
ENCODERS = Registry(
    "encoder family",
    dict.fromkeys(
        (
            *("siglip_vision_model", "clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit"),
            *("aimv2_vision_model", "ijepa", "vit"),
        ),
        "hive_scale.model.encoders",
    ),
)
LLMS = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "olmo2", "granite", "phi3", "gemma2", "gemma3_text")
HOSTS = Registry("LLM family", dict.fromkeys(LLMS, "hive_scale.model.hosts"))
OPTIMIZERS = Registry("optimizer", dict.fromkeys(("adamw", "muon", "adafactor"), "hive_scale.engine.optimizer"))
ADAPTERS = Registry("adapter", dict.fromkeys(("lora", "dora"), "hive_scale.model.adapters"))
