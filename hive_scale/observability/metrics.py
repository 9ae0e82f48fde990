"""`metrics.jsonl`, the record of a stage: one JSON object per optimizer step, in ascending order of `step`.

Schema 1. In every line:

    schema        1
    step          optimizer steps done in this stage, from 1; each step occurs once, despite resumes and rollbacks
    samples       pairs that the stage has consumed
    tokens        target tokens that the stage has consumed
    loss          mean over the step's target tokens, nats, before the update
    grad_norm     L2 norm over all trainable parameters, before clipping
    lr            {group: learning rate}
    seconds       since the end of the previous step, held-out evaluation included
    data_seconds  of these, waiting for data, on the rank that waited longest: ranks run in lockstep
    memory_gb     peak so far on the fullest rank: allocated on its GPU, or resident on the host, in 1e9 bytes
    time          when the line was written, seconds since 1970, UTC
    restarts      number of restarts of the stage so far
    spent         {account: seconds} of the stage over all its restarts: steps, data, evaluate, save, start, lost, down
    lost_steps    steps repeated or discarded, over all restarts
    samples_per_second, tokens_per_second, tflops_per_device    of all ranks, of all ranks, of rank 0; time of
                  evaluation is left out

In some lines:

    reserved_gb   as memory_gb, on GPUs: reserved by torch's allocator
    host_gb       as memory_gb, in GPU runs: resident on the host
    pinned_gb     as memory_gb, in CUDA runs: pinned on the host, as torch rounds it up; may be part of host_gb
    mfu, hfu      share of its GPU's peak that rank 0 reaches: without and with recomputation
    eval_loss     mean over all held-out target tokens, nats, after the update
    eval_seconds  of `seconds`, spent on that evaluation
    gates         {LLM depth's place among the fused ones: tanh(g)}, after the update, of trainable gates; a
                  feed-forward's is under "0.feed_forward"
    grad_rms      {layer: L2 norm of its gradient}, after clipping, root mean square over about the last
                  1 / (1 - beta2) steps, from Adam's second moments

Values that are not finite are left out. Readers may show or ignore other keys. Any change other than an addition
raises the schema number.
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

# keys that schema 1 had from its first day, without numbers that may be non-finite and so left out
ALWAYS = {"samples", "tokens", "lr", "seconds", "data_seconds", "memory_gb", "time", "restarts"}
NUMBERS = ALWAYS - {"lr"} | {"loss", "grad_norm", "lost_steps", "mfu", "hfu", "eval_loss", "eval_seconds"}
TABLES = {"lr", "spent", "gates", "grad_rms"}  # values that are {name: number}
LARGEST = 2**53  # integers below this are exact in every JSON reader


def read_metrics(path: Path) -> list[Line]:
    """Return the lines of a metrics file. Damaged ones (killed run, failing disk) are skipped with a warning.

    Each line's `step` is larger than that of the line before; values of known keys have the right type. Raises
    ValueError for a schema that this version does not know.
    """
    lines, said = _read(path)
    for text in said:
        logger.warning("%s: %s", path, text)
    return lines


def damage(path: Path) -> list[str]:
    """Describe what is wrong with a metrics file, one sentence each: unusable lines and missing steps."""
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
    """Raise ValueError if a newer version wrote the last lines. A single such line just has a damaged digit."""
    newer = list(takewhile(lambda line: _of(line) > SCHEMA, reversed(lines)))
    if len(newer) > 1 or (newer and len(newer) == len(lines)):
        raise ValueError(f"{path} has schema {_of(newer[0])}, this version reads up to {SCHEMA}: update hive_scale")


def _of(line: Line) -> int:
    schema = line.get("schema", SCHEMA)
    return schema if isinstance(schema, int) else 0


def _is_sound(line: Line) -> bool:
    """True if a line can be used: its schema is known, and its values have the right types and ranges."""
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
    """Return the longest run of line numbers with ascending steps, so that one wrong step drops only its own line."""
    ends: list[int] = []  # [n]: lowest last step of an ascending sequence of n + 1 lines; `at`: its last line
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
    """Replace the whole file atomically, so that no reader sees half of it."""
    write_text(path, "".join(dumps(line) + "\n" for line in lines))


class MetricsTail:
    """Reads new lines of a metrics file that another process appends to, or replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = (0, 0)  # inode and byte offset of the last read

    def lines(self) -> Iterator[Line]:
        """Yield the lines added since the last call; an incomplete line is left for the next call."""
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
    """Return the numbers of a line by path: ``lr/connector``, ``grad_rms/vision.3``."""
    numbers: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "schema":
            numbers[prefix + key] = value
    return numbers


def numbers(line: Mapping[str, Any]) -> Line:
    """Return `line` without non-finite values, which JSON cannot represent."""
    kept = {key: value for key, value in line.items() if not isinstance(value, float) or isfinite(value)}
    return {key: numbers(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
