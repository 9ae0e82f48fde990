"""Downstream jobs: launchers that run after a run's last stage, each as one more job of the chain."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from hive_scale import strict_json
from hive_scale.atomic import write_text
from hive_scale.config import Config
from hive_scale.config_merge import without_credentials
from hive_scale.strict_json import dumps

PREFIX = "after."
OLD_PREFIX = "then."  # read in this release
logger = logging.getLogger(__name__)
LAUNCHERS = {"probe": "probe", "vlm": "finetune_vlm", "evaluate": "evaluate"}
SETS = "cifar10,cifar100,imagenet,tiny_imagenet,food101,stanford_cars,pets,caltech256"  # paper, Table 1
TASKS = "mme,gqa,okvqa,scienceqa"  # paper, Table 2


@dataclass(frozen=True)
class DownstreamJob:
    """A launcher that runs, on all processes of its job, once `after` has succeeded."""

    launcher: str  # name of a script in launchers/
    after: str  # a stage, or another downstream job
    words: list[str]  # its command line; the last word gives the output directory

    @property
    def output(self) -> Path:
        """Directory to which the launcher writes."""
        return Path(self.words[-1].removeprefix("output="))

    def check(self, config: Config, world_size: int) -> None:
        """Raise ValueError now for mistakes that the job would find hours later."""
        launcher = import_module(f"hive_scale.commands.{self.launcher}")
        if self.launcher == "finetune_vlm":
            launcher.check(self.words, config.model.vision, world_size)
        else:
            launcher.check(self.words)

    def run(self) -> int:
        """Run the launcher, which joins the processes of its job itself, and return its exit code."""
        code: int = import_module(f"hive_scale.commands.{self.launcher}").main(self.words)
        return code

    def is_done(self, run_dir: Path, name: str) -> bool:
        """True if it has succeeded with exactly these words."""
        file = _marker(run_dir, name)
        try:
            return bool(strict_json.read(file) == asdict(self))
        except (OSError, ValueError):  # missing or truncated
            return False

    def mark_done(self, run_dir: Path, name: str) -> None:
        file = _marker(run_dir, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, dumps(asdict(self)))


Followers = Mapping[str, DownstreamJob]  # by name, in an order in which they can run


def _marker(run_dir: Path, name: str) -> Path:
    return run_dir / "slurm" / "then" / f"{name}.json"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into those of the run and ``after.*`` words."""
    of_run: list[str] = []
    of_jobs: list[str] = []
    for word in words:
        if word.startswith(OLD_PREFIX):
            new = PREFIX + word.removeprefix(OLD_PREFIX)
            logger.warning(
                "%s is called %s now; the old name is read in this release", *(w.partition("=")[0] for w in (word, new))
            )
            word = new
        (of_jobs if word.startswith(PREFIX) else of_run).append(word)
    return of_run, of_jobs


def read(names: str, words: Sequence[str], config: Config) -> dict[str, DownstreamJob]:
    """Return the downstream jobs that `names` asks for, a comma-separated subset of "probe,vlm,evaluate".

    ``after.NAME=WORDS`` extends the launcher's command line. "evaluate" scores the fine-tuned model if "vlm" is
    requested, else the run itself. Raises ValueError with the remedy for an unknown name.
    """
    wanted = [name for name in names.split(",") if name]
    more = {name: shlex.split(text) for name, _, text in (word.removeprefix(PREFIX).partition("=") for word in words)}
    for name in (*wanted, *more):
        if name not in LAUNCHERS:
            near = get_close_matches(name, LAUNCHERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LAUNCHERS)}"
            raise ValueError(f"--then: there is no '{name}': {hint}")
        if name not in wanted:
            raise ValueError(f"{PREFIX}{name}: --then does not ask for it: add it there")
        if name in config.stages:
            raise ValueError(f"--then {name}: a stage of the run has that name: call the stage something else")
    run, last = str(config.run_dir), list(config.stages)[-1]
    asked, before = f"{run}/vlm" if "vlm" in wanted else run, "vlm" if "vlm" in wanted else last
    # users may override the first words, as launchers use the last of two; others rely on the final ones
    made = {
        "probe": (last, [run, "--set", SETS], ["--output", f"{run}/probes"]),
        "vlm": (last, [run], [f"output={run}/vlm"]),
        "evaluate": (before, [asked, "--tasks", TASKS], ["--output", f"{run}/evaluation"]),
    }
    return {
        name: DownstreamJob(
            LAUNCHERS[name],
            after,
            [*first, *(without_credentials(word, Config) for word in more.get(name, [])), *fixed],
        )
        for name, (after, first, fixed) in made.items()
        if name in wanted
    }


def order(stages: Sequence[str], then: Followers) -> dict[str, str]:
    """Map every job of a run, in an order in which they can run, to the one it waits for ("" for the first)."""
    chained = dict(zip(stages, ["", *stages], strict=False))
    return chained | {name: follower.after for name, follower in then.items()}
