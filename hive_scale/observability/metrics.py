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
    memory_gb     the most so far of the fullest rank: allocated on its GPU, or resident on the host, in 1e9 bytes
    time          when the line was written, seconds since 1970, UTC
    restarts      how often the stage had been started again by then
    spent         {account: seconds} of the stage over all its restarts: steps, data, evaluate, save, start, lost, down
    lost_steps    steps done again or left out, over all restarts
    samples_per_second, tokens_per_second, tflops_per_device    of all ranks, of all ranks, of rank 0

In some lines:

    reserved_gb   as memory_gb, on GPUs: what torch has taken of their memory
    host_gb       as memory_gb, beside GPUs: resident on the host
    pinned_gb     as memory_gb, beside CUDA's GPUs: pinned on the host, as torch rounds it up; host_gb may hold it
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
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, pairwise, takewhile
from math import isfinite
from pathlib import Path
from typing import Any

from hive_scale.atomic import write_text
from hive_scale.strict_json import dumps, parse_line, read_lines

SCHEMA = 1
logger = logging.getLogger(__name__)

Line = dict[str, Any]

# of a line that names its schema: what schema 1 had from its first day, but for numbers that may be left out
ALWAYS = {"samples", "tokens", "lr", "seconds", "data_seconds", "memory_gb", "time", "restarts"}
NUMBERS = ALWAYS - {"lr"} | {"loss", "grad_norm", "lost_steps", "mfu", "hfu", "eval_loss"}
TABLES = {"lr", "spent", "gates", "grad_rms"}  # of numbers, by name
LARGEST = 2**53  # of whole numbers that JSON's readers agree on


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics file; those that are damaged, as by a killed run or a failing disk, are left out and said.

    Each line has a `step`, above that of the line before; what it has of the keys above has their type.
    Raises ValueError for a schema that this version does not know.
    """
    lines, said = _read(path)
    for text in said:
        logger.warning("%s: %s", path, text)
    return lines


def damage(path: Path) -> list[str]:
    """What is wrong with a metrics file, a sentence each: lines that cannot be used, steps that have none."""
    return _read(path)[1]


def _read(path: Path) -> tuple[list[Line], list[str]]:
    whole, cut = read_lines(path)
    _check_schema(path, whole)
    is_cut = set(cut)
    places = (number for number in count(1) if number not in is_cut)
    sound = {number: numbers(line) for number, line in zip(places, whole, strict=False) if _is_sound(numbers(line))}
    kept = _ascending({number: line["step"] for number, line in sound.items()})
    left_out = sorted({*range(1, len(whole) + len(cut) + 1)}.difference(kept))
    lines = [sound[number] for number in kept]
    return lines, [f"line {number} is cut off or damaged, and left out" for number in left_out] + _holes(lines)


def _holes(lines: Sequence[Line]) -> list[str]:
    steps = [0, *(line["step"] for line in lines)]
    gaps = [(before + 1, after - 1) for before, after in pairwise(steps) if after > before + 1]
    return [f"step {a} is missing" if a == b else f"steps {a} to {b} are missing" for a, b in gaps]


def _check_schema(path: Path, lines: Sequence[Line]) -> None:
    """A newer version writes on to the end; a single line that says so has a damaged digit."""
    newer = list(takewhile(lambda line: _of(line) > SCHEMA, reversed(lines)))
    if len(newer) > 1 or (newer and len(newer) == len(lines)):
        raise ValueError(f"{path} has schema {_of(newer[0])}, this version reads up to {SCHEMA}: update hive_scale")


def _of(line: Line) -> int:
    schema = line.get("schema", SCHEMA)
    return schema if isinstance(schema, int) else 0


def _is_sound(line: Line) -> bool:
    """Whether a reader can use what a line says, whatever bits of it have changed."""
    if _of(line) != SCHEMA or ("schema" in line and not line.keys() >= ALWAYS):
        return False
    tables = [line[key] for key in TABLES & line.keys()]
    values = [line[key] for key in NUMBERS & line.keys()]
    if not all(isinstance(table, dict) for table in tables):
        return False
    values += [value for table in tables for value in table.values()]
    step, seconds = line.get("step"), line.get("seconds", 1)
    return all(map(_is_number, (*values, step, seconds))) and type(step) is int and step > 0 and seconds > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < LARGEST)


def _ascending(steps: Mapping[int, int]) -> list[int]:
    """The most line numbers such that their steps ascend: one wrong step puts itself out, not its neighbours."""
    ends: list[int] = []  # the lowest step in which so many ascending ones can end, and the line of it
    at: list[int] = []
    before: dict[int, int | None] = {}
    for number, step in steps.items():
        place = bisect_left(ends, step)
        before[number] = at[place - 1] if place else None
        ends[place : place + 1], at[place : place + 1] = [step], [number]
    chain: list[int] = []
    last = at[-1] if at else None
    while last is not None:
        chain.append(last)
        last = before[last]
    return chain[::-1]


def rewrite(path: Path, lines: Iterable[Line]) -> None:
    """Replace the whole file at once, so that no reader meets half of it."""
    write_text(path, "".join(dumps(line) + "\n" for line in lines))


class MetricsTail:
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
                line = parse_line(text)
                if line is not None and _is_sound(numbers(line)):
                    yield numbers(line)
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
