"""How a command names a run, for every launcher of runs. Nothing is imported that `--help` would wait for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_scale.config import Config


def add_run_arguments(parser: argparse.ArgumentParser, keys: str = "any key of the config, such as output=DIR") -> None:
    """`keys` tells what the words at the end may be."""
    parser.add_argument("--preset", help="a run by its name (default debug): see the README")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML: a saved run, or changes to a preset")
    parser.add_argument("--ds_config", metavar="JSON", help="DeepSpeed ZeRO and offload settings; without: FSDP2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def named_run(arguments: argparse.Namespace, words: Sequence[str]) -> Config:
    """The run that `arguments` name, changed by `words`. Raises ValueError with the remedy."""
    from hive_scale import presets

    engine = [f"engine.ds_config={arguments.ds_config}"] if arguments.ds_config else []
    return presets.load(arguments.preset, arguments.config, [*words, *engine])
