"""What every launcher that trains has around its work: the group of processes, their noise, and how they end."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hive_scale.config import Config
from hive_scale.distributed import TRY_AGAIN, World, session
from hive_scale.rundir import MARKER, check_place
from hive_scale.train import Stopped
from hive_scale.watch.noise import hushed
from hive_scale.watch.terminal import console


def launch(config: Config, arguments: argparse.Namespace, work: Callable[[World], None]) -> int:
    """Do `work` among the processes of this launch. The exit code: 0, or TRY_AGAIN if it was stopped and has saved.

    `arguments` are those of `command.add_training_arguments`. Raises ValueError if the run directory cannot be one.
    """
    check_place(config)
    folder, has_begun = config.run_dir / "logs", (config.run_dir / MARKER).exists
    with session() as world, hushed(folder, world, arguments.log_level, arguments.quiet, has_begun):
        try:
            work(world)
        except Stopped as stopped:
            if world.is_main:
                console.print(f"{stopped}. The same command goes on from there.", soft_wrap=True, markup=False)
            return TRY_AGAIN
    return 0
