"""Run a training command's work inside its process group, with library logs captured and stops turned into codes."""

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
    """Run `work` on every rank of this launch. Returns the exit code: 0, or that of a stop that can be resumed.

    `arguments` are those of `cli.add_training_arguments`. Raises ValueError if the run directory is unsuitable.
    """
    check_place(config)
    folder, has_begun = config.run_dir / "logs", (config.run_dir / MARKER).exists
    with session() as world, capture_library_logs(folder, world, arguments.log_level, arguments.quiet, has_begun):
        try:
            work(world)
        except Stopped as stopped:
            return end_of_stop(stopped, config.run_dir, world)
        except Exception:
            logger.info("what ended it", exc_info=True)  # the traceback goes to the log, the screen gets one line
            raise
    return 0


def by_main(config: Config, world: World, what: Callable[[], None]) -> None:
    """Run `what` on rank 0 while the other ranks wait, for as long as it makes progress. A collective."""
    with Watchdog(world, config.watchdog_seconds):
        world.timer.enter("handoff")
        if world.is_main:
            what()
        world.barrier()
