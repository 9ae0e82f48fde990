"""Command-line arguments that name a run, shared by all commands. It imports nothing slow, to keep `--help` fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hive_scale.config import Config

DS_CONFIGS = Path(__file__).parent / "ds_configs"  # in a checkout, a link to the top-level folder


def add_run_arguments(
    parser: argparse.ArgumentParser, keys: str = "any key of the config, such as output=DIR", default: str = "debug"
) -> None:
    """Add the arguments that name a run. `keys` is the help of the words, `default` the preset if none is named."""
    parser.set_defaults(default_preset=default)
    parser.add_argument("--preset", help=f"a run by its name (default {default}): see docs/index.md")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML: a saved run, or changes to a preset")
    shipped = ", ".join(sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
    parser.add_argument(
        "--ds_config", metavar="JSON", help=f"DeepSpeed ZeRO and offload: a file, or {shipped}; without: FSDP2"
    )
    parser.add_argument(
        "--ds_config_owned",
        choices=("refuse", "ignore"),
        help="what it fixes otherwise than the config, such as the batch: refuse it (default), or say so and go on",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that trains."""
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--overwrite", action="store_true", help="move the run that is there to <output>.old-DATE and start over"
    )
    # a separate option, since --overwrite with an optional value would take a following key=value word for it
    parser.add_argument(
        "--overwrite=delete", dest="overwrite", action="store_const", const="delete", help="remove it instead"
    )
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log_level", choices=levels, default="warning", help="of what libraries say (warning)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; unused


def named_run(arguments: argparse.Namespace, words: Sequence[str]) -> Config:
    """The config that `arguments` name, overridden by `words`. Raises ValueError with the remedy."""
    from hive_scale import credentials, presets
    from hive_scale.rundir import at_home

    given = {"ds_config": arguments.ds_config and find_ds_config(arguments.ds_config)}
    given |= {"ds_config_owned": arguments.ds_config_owned}
    engine = [f"engine.{name}={value}" for name, value in given.items() if value]
    preset = arguments.preset or (None if arguments.config else arguments.default_preset)  # a file may name a preset
    config = presets.load(preset, arguments.config, [*words, *engine])
    if arguments.config and not any(word.startswith(("output=", "name=")) for word in words):
        config = at_home(config, arguments.config)
    if (named := credentials.variables()) and os.environ.get("RANK", "0") == "0":
        print(f"the command's shards read environment variables: {', '.join(named)}", file=sys.stderr)
    return config


def find_ds_config(given: str) -> str:
    """Path of the DeepSpeed JSON `given`: a file, or one of the package ("zero2", "ds_configs/zero2.json").

    Anything else is returned unchanged, so that the engine refuses it.
    """
    path = Path(given)
    shipped = DS_CONFIGS / f"{path.stem}.json"
    by_name = path.name == path.stem or path.parent.name == DS_CONFIGS.name
    return str(shipped) if by_name and not path.exists() and shipped.is_file() else given
