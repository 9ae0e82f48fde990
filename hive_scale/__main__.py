"""Entry point of `python -m hive_scale COMMAND`, which the files in launchers/ call, too."""

from __future__ import annotations

import sys
from collections.abc import Callable

OLDEST, NEWEST = (3, 11), (3, 13)  # as requires-python in pyproject.toml
INSTALL = "pip install -r requirements.lock (make install) gives versions that were tried together"


def main() -> int:
    """Run the command named by the first word, with the remaining words as its arguments.

    Returns:
        The command's exit code; 2 for an unknown command, or if this environment cannot run it.
    """
    return _unless_stopped(_main)


def run(command: str, words: list[str] | None = None, program: str | None = None) -> int:
    """Check the environment, then run `command` with `words` (default: sys.argv). Returns the exit code."""
    return _unless_stopped(lambda: _run(command, words, program))


def _unless_stopped(work: Callable[[], int]) -> int:
    """Call `work`; if Ctrl-C ends it before `exit_codes.ended` is there to say so, answer as that does."""
    try:
        return work()
    except KeyboardInterrupt:
        print("stopped: the same command goes on with what is left to do", file=sys.stderr)
        return 75  # exit_codes.TRY_AGAIN


def _main() -> int:
    words = sys.argv[1:]
    # the deepspeed launcher inserts its own option before the command: --local_rank=0 pretrain ...
    own = [word for word in words[:1] if word.startswith("--local_rank")]
    words = words[len(own) :]
    if not words or words[0] in ("-h", "--help"):
        from hive_scale.exit_codes import ended

        return ended(_show_usage)
    return _run(words[0], [*own, *words[1:]], f"python -m hive_scale {words[0]}")


def _run(command: str, words: list[str] | None, program: str | None) -> int:
    if code := check_python():
        return code
    from hive_scale.commands import COMMANDS

    if command not in COMMANDS:
        from difflib import get_close_matches

        if command.startswith("-"):
            return _refuse(f"name a command before {command}, such as pretrain: there are {', '.join(COMMANDS)}")
        near = get_close_matches(command.lower(), COMMANDS, n=1) or [name for name in COMMANDS if command in name]
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        return _refuse(f"no command '{command}': {known}")
    if code := check_packages():
        return code
    if words is not None:
        sys.argv[1:] = words
    sys.argv[0] = program or sys.argv[0]
    import gc
    from importlib import import_module

    from hive_scale.exit_codes import ended

    # The imports make half a million objects that stay: to look through them less often shortens every start.
    gc.set_threshold(50_000, 20, 50)
    # the import, too, may be interrupted
    return ended(lambda: import_module(f"hive_scale.commands.{command}").main())


def check_environment() -> int:
    """Return 0 if this environment can run the package; else print what to change, and return 2."""
    return check_python() or check_packages()


def check_python() -> int:
    """Check the Python version, as `check_environment` does."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return 0
    version = ".".join(map(str, sys.version_info[:2]))
    return _refuse(f"hive_scale needs Python 3.11 to 3.13, and this is {version}: make an environment with those")


def check_packages() -> int:
    """Check the installed packages, as `check_environment` does."""
    try:
        from hive_scale.requirements import problem

        found = problem()
    except ModuleNotFoundError as error:
        found = f"{error.name} is not installed"
    return _refuse(f"{found}: {INSTALL}") if found else 0


def _show_usage() -> int:
    print(_usage(), flush=True)
    return 0


def _usage() -> str:
    from hive_scale import __doc__ as purpose
    from hive_scale.commands import COMMANDS

    lines = [f"  {name:16} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m hive_scale COMMAND [--help] ...",
            "",
            purpose or "",
            "",
            *lines,
            "",
            "several processes: torchrun --nproc_per_node 2 -m hive_scale pretrain ...",
            "                   deepspeed --module hive_scale pretrain --ds_config zero2 ...",
        ]
    )


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
