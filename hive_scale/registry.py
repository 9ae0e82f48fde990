"""What varies, by name: the fusions, encoder families, LLM families and optimizers that there are.

An entry is a class that answers everything the rest asks of it; its base class says what that is. Nobody else compares
names. What comes with the package is imported when it is asked for; a module of a user's own, named in the config's
``extensions``, registers more.

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
EXTENSIONS = "HIVE_SCALE_EXTENSIONS"  # modules of the user's own, for commands that take no config


class Registry:
    """Classes by name."""

    def __init__(self, what: str, modules: Mapping[str, str]) -> None:
        """`what` an entry is; `modules` of this package by the names that they register."""
        self.what, self._modules = what, dict(modules)
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator of the class that `name` stands for.

        Raises ValueError if the name is taken, or the class does not answer all that its base class asks.
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
        if not isinstance(name, str):  # of a config that gives what it likes
            return False
        if name not in self._modules:
            load_extensions(_trusted())
        return name in self._modules

    def __getitem__(self, name: str) -> Any:
        """The class of that name. Raises ValueError for none."""
        self.check(name)
        if name not in self._entries:
            import_module(self._modules[name])
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Of all entries, also those that are not imported yet."""
        return tuple(self._modules)

    def check(self, name: str, key: str = "", modules: Sequence[str] = ()) -> None:
        """Raises ValueError that names the nearest entry if there is none of that name.

        Args: `key` of the config that gives the name; `modules` of a user's own that the config says are needed.
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
    """Class attributes that the base classes of `entry` declare, and nobody gives a value."""
    declared = {
        name
        for base in inspect.getmro(entry)
        for name, kind in vars(base).get("__annotations__", {}).items()
        if "ClassVar" in str(kind)
    }
    return {name for name in declared if not hasattr(entry, name)}


def use_extensions(modules: Iterable[str]) -> None:
    """Import the modules that a user's own command names, here and in whatever this process starts.

    Raises ValueError for one that cannot be imported.
    """
    load_extensions(modules)
    os.environ[EXTENSIONS] = ",".join(dict.fromkeys([*_trusted(), *modules]))


def load_extensions(modules: Iterable[str]) -> None:
    """Import modules, which register what they bring. Raises ValueError for one that cannot be imported.

    A module is code: a run's saved config names it, but only the user's own command or environment has it imported.
    """
    for module in modules:
        if module not in sys.modules and (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # beside which users write theirs
        try:
            import_module(module)
        except Exception as error:  # whatever the user's code raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"extensions: {module} cannot be imported ({type(error).__name__}: {reason}): give the name of a "
                "module that Python finds, as by PYTHONPATH"
            ) from error


def _trusted() -> list[str]:
    return [module for module in os.environ.get(EXTENSIONS, "").split(",") if module]


FUSIONS = Registry(
    "fusion",
    {name: f"hive_scale.model.fusion.{name}" for name in ("cross_attention", "joint_attention", "concat")},
)
ENCODERS = Registry(
    "encoder family", dict.fromkeys(("siglip_vision_model", "clip_vision_model"), "hive_scale.model.encoders")
)
HOSTS = Registry("LLM family", dict.fromkeys(("llama", "qwen2", "qwen3"), "hive_scale.model.hosts"))
OPTIMIZERS = Registry("optimizer", {"adamw": "hive_scale.engine.optimizer"})
