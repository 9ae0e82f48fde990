#!/usr/bin/env python
"""Benchmarks of hive_scale and its peers on this machine. Each subcommand prints one table of docs/benchmarks.md."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

# finds the benchmarks beside this file, and the package if it is not installed
sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[:2]]

EXAMPLES = """\
examples:
  python launchers/benchmark.py engines                     every sharding, two processes
  python launchers/benchmark.py engines --cases fsdp zero2 --ranks 4 --markdown
  python launchers/benchmark.py loss                        head and cross-entropy: time and peak memory
  python launchers/benchmark.py loss --rows 4096 --vocabularies 128256 --dtypes bf16
  python launchers/benchmark.py data                        our loader and others': per sample, resumed, other ranks
  python launchers/benchmark.py padding                     what dealing by length saves
  python launchers/benchmark.py host                        what the host does in a step, in CPU time and operators
  python launchers/benchmark.py gpu                         one GPU: time, MFU and memory beside their plan, 8 minutes
"""
# modules of launchers/benchmarks with HELP, configure(parser) and run(arguments); they import torch late
BENCHMARKS = (
    *("engines", "checkpoint", "loss", "data", "padding", "memory", "efficiency", "gains", "start", "chain"),
    *("host", "gpu", "all"),
)


def main() -> int:
    from hive_scale.cli import Parser
    from hive_scale.exit_codes import ended

    parser = Parser(description=__doc__, epilog=EXAMPLES)
    subparsers = parser.add_subparsers(required=True, metavar="WHAT")
    for name in BENCHMARKS:
        benchmark = import_module(f"benchmarks.{name}")
        subparser = subparsers.add_parser(name, help=benchmark.HELP, description=benchmark.__doc__)
        benchmark.configure(subparser)
        subparser.add_argument("--rounds", type=int, default=12, help="timed rounds (default 12)")
        subparser.add_argument("--markdown", action="store_true", help="print the table as docs/benchmarks.md has it")
        subparser.add_argument("--quick", action="store_true", help="toy sizes: does it run? The figures mean nothing")
        subparser.set_defaults(run=benchmark.run)
    arguments = parser.parse_args()
    return ended(lambda: arguments.run(arguments) or 0)


if __name__ == "__main__":
    from hive_scale.__main__ import check_environment

    sys.exit(check_environment() or main())
