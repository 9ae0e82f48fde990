"""Run commands of our launchers, each in a process of its own, several at a time, none twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# the server imports these once, and each step is a cheap fork of it; transformers reads the last one when saving
PRELOADED = ["hive_scale.pipeline", "hive_scale.evaluate.probe_runner", "hive_scale.evaluate.vqa_runner", "deepspeed"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Step:
    """One command. `words` follow ``python`` on its command line; `name` names its log and its record."""

    name: str
    words: tuple[str, ...]


def run(steps: Sequence[Step], folder: Path, jobs: int) -> None:
    """Run those of `steps` whose command has no record in `folder` yet, `jobs` at a time.

    Raises ValueError with the log of a failed step; finished steps stay finished.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # where Python 3.11's fork server looks for modules to preload
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    due = [step for step in steps if not _is_done(step, folder)]
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(lambda step: _run(step, folder, jobs), due):
            pass


def record(folder: Path, name: str) -> dict[str, Any]:
    """Wall seconds, processor seconds, and peak memory (1e9 bytes) of a finished step."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def _is_done(step: Step, folder: Path) -> bool:
    return (folder / f"{step.name}.json").exists() and record(folder, step.name)["command"] == list(step.words)


def _run(step: Step, folder: Path, jobs: int) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {step.name}: python {' '.join(step.words)}", flush=True)
    log = folder / f"{step.name}.log"
    process = CONTEXT.Process(target=_work, args=(step, folder, jobs))
    process.start()
    process.join()
    if process.exitcode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else "no word"
        raise ValueError(f"{step.name} failed; its last words, of {log}:\n{tail}")


def _work(step: Step, folder: Path, jobs: int) -> None:
    import torch

    with (folder / f"{step.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    sys.argv = list(step.words)
    done, stopped = folder / f"{step.name}.json", folder / f"{step.name}.stopped"
    before = json.loads(stopped.read_text()) if stopped.exists() else {}
    began, code = time.monotonic(), 0
    try:
        runpy.run_path(step.words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    content = {
        "command": list(step.words),
        "seconds": before.get("seconds", 0.0) + time.monotonic() - began,
        "cpu_seconds": before.get("cpu_seconds", 0.0) + time.process_time(),
        "peak_gb": max(before.get("peak_gb", 0.0), peak),
    }
    # a failed attempt is recorded as well, since its time and memory count
    (stopped if code else done).write_text(json.dumps(content, allow_nan=False) + "\n")
    sys.stdout.flush()
    os._exit(code)  # skips cleanup, which takes some libraries seconds
