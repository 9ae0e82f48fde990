"""Registry of the VQA benchmarks by name."""

from __future__ import annotations

from difflib import get_close_matches

from hive_scale.evaluate import easyvqa, gqa, mme, okvqa, scienceqa
from hive_scale.evaluate.vqa_types import Task

TASKS: dict[str, Task] = {task.name: task for task in (mme.TASK, gqa.TASK, okvqa.TASK, scienceqa.TASK, easyvqa.TASK)}


def find_task(name: str) -> Task:
    """Return the task called `name`. Raises ValueError that suggests the nearest name."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}"
        raise ValueError(f"there is no task '{name}': {hint}")
    return TASKS[name]
