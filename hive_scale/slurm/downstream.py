"""What may follow a run's last stage: our own launchers, each as one more job of the chain."""

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
    """A launcher that is run, on all processes of its job, once `after` has succeeded."""

    launcher: str  # of launchers/
    after: str  # a stage, or another downstream job
    words: list[str]  # what one would type after its name, that of its output last

    @property
    def output(self) -> Path:
        """The directory in which it leaves what it makes."""
        return Path(self.words[-1].removeprefix("output="))

    def check(self, config: Config, world_size: int) -> None:
        """Raises ValueError for what the job would find wrong hours later."""
        launcher = import_module(f"hive_scale.commands.{self.launcher}")
        if self.launcher == "finetune_vlm":
            launcher.check(self.words, config.model.vision, world_size)
        else:
            launcher.check(self.words)

    def run(self) -> int:
        """The launcher's exit code. It joins the processes of its job by itself."""
        code: int = import_module(f"hive_scale.commands.{self.launcher}").main(self.words)
        return code

    def is_done(self, run_dir: Path, name: str) -> bool:
        """Whether it has succeeded with these very words."""
        file = _marker(run_dir, name)
        try:
            return bool(strict_json.read(file) == asdict(self))
        except (OSError, ValueError):  # not there, or cut off
            return False

    def mark_done(self, run_dir: Path, name: str) -> None:
        file = _marker(run_dir, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, dumps(asdict(self)))


Followers = Mapping[str, DownstreamJob]  # by name, in the order in which they could run


def _marker(run_dir: Path, name: str) -> Path:
    return run_dir / "slurm" / "then" / f"{name}.json"


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for the run, and ``after.*`` words."""
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
    """The downstream jobs of `config`'s run that `names` ("probe,vlm,evaluate" or a part of it) asks for.

    ``after.NAME=WORDS`` adds to the launcher's command line. What is evaluated is the fine-tuned model if there is to
    be one, else the run itself. Raises ValueError with the remedy for an unknown name.
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
    # the first words may be overridden, as launchers heed the last of two; the last may not, for others count on them
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
    """Every job of a run, in an order in which they can run, with the one that it waits for ("" for the first)."""
    chained = dict(zip(stages, ["", *stages], strict=False))
    return chained | {name: follower.after for name, follower in then.items()}
