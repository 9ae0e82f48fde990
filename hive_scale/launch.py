"""Run a training command's work inside its process group, with library logs captured and stops turned into codes."""

from __future__ import annotations

import argparse
import gc
import logging
import os
from collections.abc import Callable

from hive_scale.config import Config
from hive_scale.distributed import World, session
from hive_scale.exit_codes import Stopped
from hive_scale.launcher_env import check_all_started
from hive_scale.observability.logging_setup import capture_library_logs, show_and_log
from hive_scale.resilience.preemption import end_of_stop
from hive_scale.resilience.watchdog import Watchdog
from hive_scale.rundir import MARKER, check_place

logger = logging.getLogger(__name__)


def launch(config: Config, arguments: argparse.Namespace, work: Callable[[World], None]) -> int:
    """Run `work` on every rank of this launch. Returns the exit code: 0, or that of a stop that can be resumed.

    `arguments` are those of `cli.add_training_arguments`. Raises ValueError if the run directory is unsuitable,
    or a Slurm script has not started all of its job's tasks.
    """
    gc.freeze()  # what has been imported stays: no collection looks through it again
    check_all_started(os.environ)
    check_place(config)
    folder, has_begun = config.run_dir / "logs", (config.run_dir / MARKER).exists
    with session() as world, capture_library_logs(folder, world, arguments.log_level, arguments.quiet, has_begun):
        try:
            if world.is_main:
                _show_source(arguments)
            work(world)
        except Stopped as stopped:
            return end_of_stop(stopped, config.run_dir, world)
        except Exception:
            logger.info("what ended it", exc_info=True)  # the traceback goes to the log, the screen gets one line
            raise
    return 0


def preset_of(arguments: argparse.Namespace) -> str:
    """The preset that the command names, or has by default; "" if a file alone names the run."""
    return str(arguments.preset or ("" if arguments.config else arguments.default_preset))


def _show_source(arguments: argparse.Namespace) -> None:
    """Show what the run's config was made from: the first lines of its header."""
    given = {"preset": preset_of(arguments), "config": arguments.config}
    show_and_log("\n".join(f"{label:<10} {value}" for label, value in given.items() if value))


def by_main(config: Config, world: World, what: Callable[[], None]) -> None:
    """Run `what` on rank 0 while the other ranks wait, for as long as it makes progress. A collective."""
    with Watchdog(world, config.watchdog_seconds):
        world.timer.enter("handoff")
        if world.is_main:
            what()
        world.barrier()
