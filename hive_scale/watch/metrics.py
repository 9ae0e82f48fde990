"""`metrics.jsonl`, the truth about a stage: one JSON object per optimizer step, in ascending order of `step`.

Schema 1. Always there:

    schema        1
    step          optimizer steps done in this stage, from 1; no step twice, whatever was resumed or repeated
    samples       pairs that the stage has consumed
    tokens        target tokens that the stage has consumed
    loss          mean over the step's target tokens, nats, before the step
    grad_norm     L2 norm over all trainable parameters, before clipping
    lr            {group: learning rate}
    seconds       from the end of the step before, looks at held-out data included
    data_seconds  of these, waited for data, by the rank that waited longest: all keep step
    memory_gb     peak of rank 0 so far: allocated on its GPU, or resident on the host, in 1e9 bytes
    time          when the line was written, seconds since 1970, UTC
    restarts      how often the stage had been started again by then
    spent         {account: seconds} of the stage over all its restarts: steps, data, evaluate, save, start, lost, down
    lost_steps    steps done again or left out, over all restarts
    samples_per_second, tokens_per_second, tflops_per_device    of all ranks, of all ranks, of rank 0

In some lines:

    mfu, hfu      what rank 0 gets out of its GPU's peak: without, with what is computed twice
    eval_loss     mean over all held-out target tokens, nats, after the step
    gates         {LLM depth's place among the fused ones: tanh(g)}, after the step, of gates that train
    grad_rms      {layer: L2 norm of its gradient}, after clipping, root mean square over about the last
                  1 / (1 - beta2) steps: what Adam's second moments say

A value that is not finite is left out. Other keys are a reader's to show or to leave out. A change that is not an
addition raises the schema's number.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from hive_scale.strict_json import dumps, parse_line, read_lines

SCHEMA = 1
logger = logging.getLogger(__name__)

Line = dict[str, Any]


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics file; what is cut in its middle, as by a killed run, is left out and said.

    Raises ValueError for a schema that this version does not know.
    """
    lines, cut = read_lines(path)
    for number in cut:
        logger.warning("%s: line %d is cut off and left out", path, number)
    if newer := [line["schema"] for line in lines if _number(line.get("schema", SCHEMA)) > SCHEMA]:
        raise ValueError(f"{path} has schema {newer[0]}, this version reads up to {SCHEMA}: update hive_scale")
    return lines


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def rewrite(path: Path, lines: Iterable[Line]) -> None:
    """Replace the whole file at once, so that no reader meets half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(dumps(line) + "\n" for line in lines))
    os.replace(fresh, path)


class Follower:
    """New lines of a metrics file that another process writes, or replaces by one that ends sooner."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = (0, 0)  # inode and offset

    def lines(self) -> Iterator[Line]:
        """What has been added since the last call; a line not yet written to its end waits for the next."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            inode, (known, offset) = os.fstat(file.fileno()).st_ino, self._place
            offset = offset if inode == known else 0
            file.seek(offset)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                offset += len(text)
                if (line := parse_line(text)) is not None:
                    yield line
            self._place = inode, offset


def flat(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by path: ``lr/connector``, ``grad_rms/vision.3``."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "schema":
            numbers[prefix + key] = value
    return numbers


def numbers(line: Mapping[str, Any]) -> Line:
    """`line` without the values that are not finite, for which JSON has no number."""
    kept = {key: value for key, value in line.items() if not isinstance(value, float) or isfinite(value)}
    return {key: numbers(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
