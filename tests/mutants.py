"""Mutants of the product's own formulas: which one-line errors would the tests notice?

  python tests/mutants.py                      the named mutants, and a sample of each module's; `make mutants`
  python tests/mutants.py --all model/fusion/concat   every mutant of one module

Each mutant runs in a copy of the repository, against the test files of its module alone. The exit code is 1 if one of
NAMED lives. The score, and the survivors that change nothing, are in docs/mutants.md.

Why not a library: mutmut (3.8) leaves out properties, decorated functions and constants, where the guard's limit and
most readers of tasks are; cosmic-ray (8.7) mutates annotations, which nothing evaluates, replaces operators mostly by
ones that raise TypeError, which every test notices, and writes into the working tree. Neither drops or swaps arguments.
"""

from __future__ import annotations

import argparse
import ast
import copy
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEED, WORKERS = 0, 2
JUDGED = 100  # exit codes of pytest begin here, so that a process that failed by itself kills no mutant
PRELOADED = ["torchvision.transforms.v2", "transformers", "accelerate", "omegaconf", "pyarrow", "pytest", "hypothesis"]
MODEL = ["tests/test_references.py", "tests/test_model.py"]
TESTS = {  # arguments of pytest, the quickest to fail first
    "batch": ["tests/test_batch.py", *MODEL, "tests/test_loader.py", "-k", "not worlds"],
    "schedule": ["tests/test_config.py", "-k", "schedule or warm or iterations"],
    "param_groups": ["tests/test_param_groups.py"],
    "data/sampler": ["tests/test_sampler.py"],
    "resilience/loss_guard": ["tests/test_loss_guard.py", "-k", "not bit and not run"],
    **{
        f"model/fusion/{one}": [*MODEL, "tests/test_generate.py"]
        for one in ("__init__", "cross_attention", "joint_attention", "concat")
    },
    **{
        f"model/fusion/{one}": [
            "tests/test_fusions.py",
            *MODEL,
            "tests/test_generate.py",
            "-k",
            "not planned and not goes",
        ]
        for one in ("deepstack", "gated_cross_attention", "q_former")
    },
    "model/attention": [*MODEL, "tests/test_generate.py"],
    "model/hive": MODEL,
    "model/encoders": [*MODEL, "tests/test_report.py"],
    "model/projector": MODEL,
    "checkpoint/format": ["tests/test_checkpoint.py", "-k", "not kill and not runs and not byte"],
    "data/conversation": ["tests/test_conversation.py", "tests/test_asked.py"],
    "data/turns": ["tests/test_conversation.py", "tests/test_layouts.py"],
    "chat_template": ["tests/test_conversation.py", "tests/test_asked.py"],
    **{f"evaluate/{name}": ["tests/test_tasks.py"] for name in ("answer_parsing", "mme", "okvqa", "gqa", "scienceqa")},
}
NAMED = [  # each lived through all tests once: (module, text, instead)
    ("batch", "from_numpy(targets - 1)", "from_numpy(targets)"),
    ("model/fusion/cross_attention", "torch.tanh(self.gate) * self.out_norm", "self.gate * self.out_norm"),
    ("model/fusion/cross_attention", "hidden_BTD + update", "hidden_BTD - update"),
    ("model/fusion/joint_attention", "torch.cat([-second, first], dim=-1)", "torch.cat([second, -first], dim=-1)"),
    ("model/hive", "for depth in self.encoder_depths]", "for depth in reversed(self.encoder_depths)]"),
    ("resilience/loss_guard", "SIGMA * median", "median"),
]
OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}
# messages, what nothing evaluates, and text in f-strings
SKIPPED = (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
UNREAD = {"annotation", "returns", "decorator_list"}


@dataclass(frozen=True)
class Mutant:
    """`module`'s `source` with one change, told in a line."""

    module: str
    change: str
    source: str


def mutants(module: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse(path_of(ROOT, module).read_text())
    made = []
    for place, field, number, old in _places(tree):
        if not (new := _mutated(old)):
            continue
        given = getattr(place, field)
        setattr(place, field, new if number is None else [*given[:number], new, *given[number + 1 :]])
        told = f"line {old.lineno}: {_shown(old)}  ->  {_shown(new)}"
        made.append(Mutant(module, told, ast.unparse(ast.fix_missing_locations(tree))))
        setattr(place, field, given)
    return made


def named() -> list[Mutant]:
    """Raises ValueError if a text to replace is not there once: the list is behind the code."""
    made = []
    for module, old, new in NAMED:
        source = path_of(ROOT, module).read_text()
        if source.count(old) != 1:
            raise ValueError(f"NAMED: {module} has '{old}' {source.count(old)} times: write it as the module does now")
        made.append(Mutant(module, f"named: {old}  ->  {new}", source.replace(old, new)))
    return made


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def path_of(root: Path, module: str) -> Path:
    return root / "hive_scale" / f"{module}.py"


def _places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.expr | ast.stmt]]:
    """(parent, field, index in it, node) of all that may be changed below `node`."""
    for field, value in ast.iter_fields(node):
        several = isinstance(value, list)
        for number, child in enumerate(value if several else [value]):
            is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not isinstance(child, ast.AST) or field in UNREAD or isinstance(child, SKIPPED) or is_docstring:
                continue
            if isinstance(child, (ast.expr, ast.stmt)):
                yield node, field, number if several else None, child
            yield from _places(child)


def _mutated(node: ast.expr | ast.stmt) -> ast.AST | None:
    """What stands instead of `node`, if anything: another operator, condition, constant, result, or call."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            return _with(node, op=OTHER[type(op)]())
        case ast.Compare(ops=[op, *rest]):
            return _with(node, ops=[OTHER[type(op)](), *rest])
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare):
            return _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.UnaryOp(operand=operand):
            return operand
        case ast.Constant(value=bool() as value):
            return _with(node, value=not value)
        case ast.Constant(value=int() | float() as value):
            return _with(node, value=value + 1)
        case ast.Constant(value=str() as value) if "://" not in value:
            return _with(node, value=value + "~")
        case ast.Return(value=ast.expr()):
            return _with(node, value=ast.Constant(None))
        case ast.Call(func=ast.Attribute(value=inner), args=[], keywords=[]):
            return inner
        case ast.Call(func=ast.Attribute(), args=[ast.expr() as inner], keywords=[]):
            return inner
        case ast.Call(func=func, args=[first, second, *rest]) if ast.unparse(func) not in ("min", "max"):
            return _with(node, args=[second, first, *rest])
    return None


def _with(node: ast.AST, **changes: Any) -> ast.AST:
    new = copy.copy(node)
    vars(new).update(changes)
    return new


def run_tests(root: Path, arguments: list[str]) -> None:
    """In a process of its own, whose exit code is JUDGED and pytest's."""
    os.setsid()  # so that all it starts can be ended with it
    os.chdir(root)
    os.environ |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # of a mutant, which the next might be taken for
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    import pytest

    os._exit(JUDGED + pytest.main(["-x", "-p", "no:cacheprovider", "--hypothesis-seed=0", *arguments]))


class Runner:
    """Runs tests in `workers` copies of the repository; libraries are loaded once, in the process they fork from."""

    def __init__(self, folder: Path, workers: int) -> None:
        os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
        os.environ["HF_HOME"] = str(folder / "hub")  # a user's cache would decide some tests
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._free: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            left_out = shutil.ignore_patterns(".*", "__pycache__", "run", "wandb", "*.egg-info")
            self._free.put(Path(shutil.copytree(ROOT, folder / str(number), ignore=left_out)))

    def survives(self, mutant: Mutant, limit: float) -> bool:
        """Whether the tests of its module pass in `limit` seconds."""
        root = self._free.get()
        path = path_of(root, mutant.module)
        original = path.read_text()
        path.write_text(mutant.source)
        process = self._context.Process(target=run_tests, args=(root, TESTS[mutant.module]))
        process.start()
        process.join(limit)
        if process.is_alive() and process.pid:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        path.write_text(original)
        self._free.put(root)
        code = process.exitcode or 0
        if code >= 0 and code - JUDGED not in (0, 1, 2):  # passed, failed, cannot be imported
            raise RuntimeError(f"{mutant.module}, {mutant.change}: its tests did not run (exit code {code})")
        return code == JUDGED

    def seconds(self, module: str) -> float:
        """What the tests of a module need as it is. Raises ValueError if they fail."""
        begin = time.monotonic()
        if not self.survives(Mutant(module, "", path_of(ROOT, module).read_text()), 1800):
            raise ValueError(f"{module}: its tests fail as they are: run pytest {' '.join(TESTS[module])}")
        return time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}", default=list(TESTS))
    parser.add_argument("--sample", type=int, default=8, help="mutants of each module")
    parser.add_argument("--all", action="store_true", help="every mutant, without a limit of time: hours")
    parser.add_argument("--minutes", type=float, default=20.0, help="no mutant is begun later")
    given = parser.parse_args()
    if unknown := set(given.modules) - TESTS.keys():
        parser.error(f"no module {min(unknown)}: choose among {', '.join(TESTS)}")
    every = {module: mutants(module) for module in given.modules}
    chosen = {
        module: found if given.all else random.Random(f"{SEED} {module}").sample(found, min(given.sample, len(found)))
        for module, found in every.items()
    }
    # one of each module in turn, so that the limit of time cuts all alike
    queue = [one for turn in zip_longest(*chosen.values()) for one in turn if one]
    queue[:0] = must_die = [one for one in named() if one.module in every]
    end = math.inf if given.all else time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        runner = Runner(Path(folder), WORKERS)
        one_of = {tuple(TESTS[module]): module for module in every}
        needed = dict(zip(one_of, pool.map(runner.seconds, one_of.values()), strict=True))

        def judge(mutant: Mutant) -> bool | None:
            if time.monotonic() > end:
                return None
            lives = runner.survives(mutant, 30 + 3 * needed[tuple(TESTS[mutant.module])])
            print("survived" if lives else "killed  ", mutant.module, mutant.change, sep="  ", flush=True)
            return lives

        lived = dict(zip(queue, pool.map(judge, queue), strict=True))
    print("\n| module | killed | run | all it has |\n|---|---:|---:|---:|")
    for module, found in every.items():
        ran = [lives for one, lives in lived.items() if one.module == module and lives is not None]
        print(f"| `{module}` | {ran.count(False)} | {len(ran)} | {len(found)} |")
    ran = [lives for lives in lived.values() if lives is not None]
    print(f"| all | {ran.count(False)} | {len(ran)} | {sum(map(len, every.values()))} |")
    return int(any(lived[one] is not False for one in must_die))


if __name__ == "__main__":
    sys.exit(main())
