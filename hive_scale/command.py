"""How a command names a run, for every launcher of runs. Nothing is imported that `--help` would wait for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_scale.config import Config


def add_run_arguments(
    parser: argparse.ArgumentParser, keys: str = "any key of the config, such as output=DIR", default: str = "debug"
) -> None:
    """`keys` tells what the words at the end may be, `default` is the preset where none is named."""
    parser.set_defaults(default_preset=default)
    parser.add_argument("--preset", help=f"a run by its name (default {default}): see the README")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML: a saved run, or changes to a preset")
    parser.add_argument("--ds_config", metavar="JSON", help="DeepSpeed ZeRO and offload settings; without: FSDP2")
    parser.add_argument(
        "--ds_config_owned",
        choices=("refuse", "ignore"),
        help="what it fixes otherwise than the config, such as the batch: refuse it (default), or say so and go on",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What every launcher takes that trains."""
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--overwrite", action="store_true", help="delete what the run directory holds and start over")
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log_level", choices=levels, default="warning", help="of what libraries say (warning)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it


def named_run(arguments: argparse.Namespace, words: Sequence[str]) -> Config:
    """The run that `arguments` name, changed by `words`. Raises ValueError with the remedy."""
    from hive_scale import presets

    given = {name: getattr(arguments, name) for name in ("ds_config", "ds_config_owned")}
    engine = [f"engine.{name}={value}" for name, value in given.items() if value]
    preset = arguments.preset or (None if arguments.config else arguments.default_preset)  # a file may name its own
    return presets.load(preset, arguments.config, [*words, *engine])
