"""What every launcher that trains has around its work: the group of processes, their noise, and how they end."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

from hive_scale.config import Config
from hive_scale.distributed import World, session
from hive_scale.exit_codes import Stopped
from hive_scale.observability.logging_setup import capture_library_logs
from hive_scale.resilience.preemption import end_of_stop
from hive_scale.resilience.watchdog import Watchdog
from hive_scale.rundir import MARKER, check_place

logger = logging.getLogger(__name__)


def launch(config: Config, arguments: argparse.Namespace, work: Callable[[World], None]) -> int:
    """Do `work` among the processes of this launch. The exit code: 0, or that of a stop after which it can go on.

    `arguments` are those of `command.add_training_arguments`. Raises ValueError if the run directory cannot be one.
    """
    check_place(config)
    folder, has_begun = config.run_dir / "logs", (config.run_dir / MARKER).exists
    with session() as world, capture_library_logs(folder, world, arguments.log_level, arguments.quiet, has_begun):
        try:
            work(world)
        except Stopped as stopped:
            return end_of_stop(stopped, config.run_dir, world)
        except Exception:
            logger.info("what ended it", exc_info=True)  # in the log: the screen gets a line
            raise
    return 0


def by_main(config: Config, world: World, what: Callable[[], None]) -> None:
    """Do `what` on rank 0, for which the others wait as long as it gets on. A collective."""
    with Watchdog(world, config.watchdog_seconds):
        world.timer.enter("handoff")
        if world.is_main:
            what()
        world.barrier()
