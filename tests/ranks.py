"""Real processes that form a world, as a launcher would start them; one start serves many checks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hive_scale.distributed import session

# the server imports these once, and each rank is a cheap fork of it
CONTEXT = multiprocessing.get_context("forkserver")
# (the last is what deepspeed.initialize imports, and with it all of torch's compiler: seconds in each rank)
MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
CONTEXT.set_forkserver_preload(["hive_scale.model.build", "hive_scale.engine.fsdp", "deepspeed", MUON])


class RankFailed(Exception):
    """The message is the traceback of the rank that failed first."""


# the word of a launcher's command after which its option for the port comes
PORT_OPTIONS = {
    "deepspeed": "--master_port",
    "deepspeed.launcher.runner": "--master_port",
    "launch": "--main_process_port",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def at_free_port(words: list[str]) -> list[str]:
    """A launcher's command at a port of its own: by default, ranks of two tests at once would meet at the same one."""
    word = next((word for word in words if word in PORT_OPTIONS), None)
    if word is None:
        return words
    place = words.index(word) + 1
    return [*words[:place], PORT_OPTIONS[word], str(free_port()), *words[place:]]


def run(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 600) -> list[Any]:
    """What ``function(world, *arguments)`` returns on each of `size` ranks.

    Raises RankFailed as soon as one rank fails, or when `timeout` seconds have passed; all others are killed.
    """
    with TemporaryDirectory() as folder:
        port = free_port()
        paths = [Path(folder, str(rank)) for rank in range(size)]
        processes = [
            CONTEXT.Process(target=_rank, args=(rank, size, port, paths[rank], function, arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, paths, time.monotonic() + timeout)
            return [pickle.loads(path.read_bytes()) for path in paths]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list[BaseProcess], paths: list[Path], deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > deadline:
            raise RankFailed("the ranks did not end in time")
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    if failed := [rank for rank, process in enumerate(processes) if process.exitcode]:
        time.sleep(0.5)  # the first to end need not be the first to fail
        texts = sorted(path for path in (path.with_suffix(".error") for path in paths) if path.exists())
        first = min(texts, key=lambda path: path.stat().st_mtime_ns, default=None)
        raise RankFailed(first.read_text() if first else f"rank {failed[0]} ended without a word")


def _rank(rank: int, size: int, port: int, path: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with session() as world:
        try:
            result = function(world, *arguments)
        except BaseException:
            path.with_suffix(".error").write_text(f"rank {rank} of {size}:\n{traceback.format_exc()}")
            raise
        path.write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # some libraries take seconds to tidy up
