"""Library logs go to one file per rank; rank 0 also shows the warnings of all ranks, each once."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, TextIO, cast

from hive_scale import credentials
from hive_scale.distributed import World
from hive_scale.observability.console import ForgivingFile, console
from hive_scale.strangers import printable

LEVELS = ("debug", "info", "warning", "error")
# loggers that install their own handlers
LOUD = ("DeepSpeed", "transformers", "torch", "accelerate", "huggingface_hub")
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SHOWN = "is_on_the_screen"  # attribute of log records that have been printed already
logger = logging.getLogger(__name__)
RECORD = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (?:WARNING|ERROR|CRITICAL) (.*)")


@contextmanager
def capture_library_logs(
    folder: Path,
    world: World,
    level: str = "warning",
    quiet: bool = False,
    has_begun: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Within, write log records and warnings to `folder`/rank_00000.log, and those of at least `level` to rank 0's
    screen.

    `quiet` suppresses everything else on the screen, which may be lost meanwhile. Nothing is written to `folder` before
    `has_begun` returns True, so a refused run leaves no file there.
    """
    root, threshold = logging.getLogger(), logging.getLevelNamesMapping()[level.upper()]
    file = _File(folder / f"rank_{world.rank:05d}.log", has_begun)
    handlers = [file, *([_Teller(folder, threshold)] if world.is_main else [])]
    loggers = [logging.getLogger(name) for name in LOUD]
    before = root.level, [(logger.__class__, logger.handlers[:]) for logger in loggers]
    screen: Any = None if console.file is sys.stdout else console.file  # None: look up sys.stdout at each print
    root.setLevel(min(logging.INFO, threshold))
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    for logger in loggers:
        logger.__class__ = _Captive
        logger.handlers.clear()
    with Path("/dev/null").open("w") as nowhere:
        console.file = nowhere if quiet else cast(TextIO, ForgivingFile(cast(TextIO, console.file)))
        try:
            yield
        finally:
            tell_others()
            console.file = screen
            logging.captureWarnings(False)
            for handler in handlers:
                root.removeHandler(handler)
                handler.close()
            root.setLevel(before[0])
            for logger, (kind, own) in zip(loggers, before[1], strict=True):
                logger.__class__ = kind
                logger.handlers[:] = own


def show_and_log(text: str) -> None:
    """Print `text` on the screen, and write it to the run's log, which keeps it where the screen is lost or quiet."""
    console.print(text, soft_wrap=True)
    logger.info(text, extra={SHOWN: True})


def tell_others() -> None:
    """Print the warnings of other ranks since the last call."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Teller):
            handler.gather()


class _Captive(logging.Logger):
    """Logger that always propagates to the root, and ignores handlers that the library adds later."""

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:
        pass


class _Formatter(logging.Formatter):
    """Indents continuation lines, so that text quoted in a message cannot pass for a record of its own.

    Clients of object stores log their requests with signatures; these are hidden.
    """

    def format(self, record: logging.LogRecord) -> str:
        return credentials.hide(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record), lines=True).replace("\n", "\n    ")


class _File(WatchedFileHandler):
    """File handler that opens its file once the run has begun, and again if the run directory is moved away."""

    def __init__(self, path: Path, has_begun: Callable[[], bool]) -> None:
        super().__init__(path, delay=True)
        self.setFormatter(_Formatter(FORMAT))
        self._has_begun, self._early = has_begun, list[logging.LogRecord]()

    def emit(self, record: logging.LogRecord) -> None:
        self._early.append(record)
        self._catch_up()

    def close(self) -> None:
        self._catch_up()
        super().close()

    def _catch_up(self) -> None:
        if self._early and self._has_begun():
            early, self._early = self._early, []
            for record in early:
                super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass  # full disk: a failing save reports it; no traceback per record

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


class _Teller(logging.Handler):
    """Prints rank 0's own records, and the other ranks' warnings as read from their files.

    It reads files because a rank that warns may be about to fail, so a collective would not be safe.
    """

    def __init__(self, folder: Path, level: int) -> None:
        super().__init__(level)
        self._folder, self._told = folder, set[str]()
        self._read = {path: path.stat().st_size for path in self._others()}  # skip what earlier runs have printed

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, SHOWN):
            return
        text = printable(credentials.hide(f"{record.name}: {record.getMessage()}").split("\n")[0])
        if text not in self._told:
            self._told.add(text)
            self._say(f"{record.levelname.lower()}: {text}")

    def gather(self) -> None:
        ranks: dict[str, list[str]] = {}
        for path in self._others():
            with path.open(errors="replace") as file:
                file.seek(self._read.get(path, 0))
                for match in filter(None, map(RECORD.match, iter(file.readline, ""))):
                    ranks.setdefault(match[1], []).append(str(int(path.stem.split("_")[1])))
                self._read[path] = file.tell()
        for text, whose in ranks.items():
            if text not in self._told:
                self._told.add(text)
                self._say(f"warning of rank {', '.join(dict.fromkeys(whose))}: {text}")

    def _others(self) -> list[Path]:
        return sorted(path for path in self._folder.glob("rank_*.log") if path.stem != "rank_00000")

    def _say(self, text: str) -> None:
        if console.is_terminal:
            console.print(text, soft_wrap=True)  # above the progress bar, not through it
        else:
            with suppress(OSError):  # stderr may be lost, too; rank 0's own log has it
                print(printable(text), file=sys.stderr, flush=True)
