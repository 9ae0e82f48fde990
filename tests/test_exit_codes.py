"""Why: a script that restarts a run knows only its exit code. A wrong code stops a chain for good, or restarts forever
what cannot succeed. And whatever ends one rank must soon end the others. Every row of the table in docs/stops.md names
a test.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hive_scale import checksums, phase_timer, pipeline, presets, rendezvous
from hive_scale import config as configs
from hive_scale.checkpoint import io
from hive_scale.checkpoint.checkpointer import Checkpointer, WriteError
from hive_scale.checkpoint.stage_files import find_weights
from hive_scale.commands import pretrain
from hive_scale.config import Config, PartConfig
from hive_scale.distributed import Fragment, World, session
from hive_scale.exit_codes import FAULT, HALTED, REFUSED, TRY_AGAIN, TryAgain, code_of, ended
from hive_scale.launch import by_main, launch
from hive_scale.pipeline import run_pipeline
from hive_scale.rendezvous import NotMet
from hive_scale.report import summary
from hive_scale.resilience import watchdog
from hive_scale.resilience.preemption import STOP
from hive_scale.resilience.run_lock import locked
from hive_scale.resilience.watchdog import Watchdog
from hive_scale.slurm.slurm_cli import Silent, SlurmError

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
ARGUMENTS = Namespace(log_level="warning", quiet=True, preset="debug", config=None, default_preset="debug")
KILLED = -signal.SIGKILL
LOST_DEVICES = (
    *("uncorrectable ECC error encountered", "uncorrectable NVLink error detected during the execution"),
    *("unspecified launch failure", "an illegal memory access was encountered", "unknown error"),
    *("all CUDA-capable devices are busy or unavailable", "the launch timed out and was terminated"),
)


def small(output: Path, *words: str) -> Config:
    """One stage of one step of a tiny model."""
    brief = ["blank_image_control=false", "eval_interval=0", "log.wandb=off", "stages.projector.global_batch=4", *words]
    run = presets.load("debug", None, [f"output={output}", "stages.projector.max_steps=1", *brief])
    llm = tiny.language(vocab_size=259, hidden_size=32)
    model = replace(run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=llm))
    return replace(run, model=model, stages={"projector": run.stages["projector"]})


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still() -> None:
    time.sleep(1000)


def fail() -> None:
    raise ValueError("this node has no such disk: mount it")


def instead(owner: Any, name: str, act: Callable[[], None]) -> None:
    """From now on `act` comes before what `owner` calls `name`."""
    original = getattr(owner, name)

    def changed(*arguments: Any, **more: Any) -> Any:
        act()
        return original(*arguments, **more)

    setattr(owner, name, changed)


def trains(config: Config, world: World) -> None:
    run_pipeline(config, world)
    by_main(config, world, lambda: summary.show(config, world.device))


def gets_on(config: Config, world: World) -> None:
    """Rank 0 takes its time, but moves."""

    def long_save() -> None:
        for _ in range(32):
            time.sleep(0.25)
            phase_timer.tick()

    by_main(config, world, long_save)


def saves_on_a_slow_disk(config: Config, world: World) -> None:
    """Memory takes in what is written at once, and syncing takes its time: a final save, for which rank 1 waits."""
    io.PIECE, io.SYNC = 1 << 16, 1 << 20
    real, synced = os.fsync, dict[int, int]()

    def slow(descriptor: int) -> None:
        file = os.fstat(descriptor)
        time.sleep((file.st_size - synced.get(file.st_ino, 0)) / 1e6)
        synced[file.st_ino] = file.st_size
        real(descriptor)

    os.fsync = slow
    mine = torch.ones(2_000_000 if world.is_main else 0)
    with Watchdog(world, config.watchdog_seconds):
        world.timer.enter("save")
        store = Checkpointer(config.run_dir / "projector", world)
        store.save(1, [Fragment("w", "master", (2_000_000,), 0, mine)] if world.is_main else [], {}, wait=True)
    assert store.latest() is not None


def exports_by_a_slow_library(config: Config, world: World) -> None:
    """Rank 0 lets a library write, which tells nobody how far it is: seven seconds, where three are a hang."""

    def export() -> None:
        with io.published(config.run_dir / "export") as folder, (folder / "large").open("wb", buffering=0) as file:
            for _ in range(14):
                time.sleep(0.5)
                file.write(bytes(1 << 16))

    by_main(config, world, export)


def gets_nowhere(config: Config, world: World) -> None:
    by_main(config, world, stand_still)


def member(rank: int, port: int, folder: Path, victim: int, place: str, act: Any, work: Any) -> None:
    """A rank of two, as a launcher would start it; the victim meets `act` at `place`."""
    output = os.open(folder / f"said_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    watchdog.SILENCE = 60.0 if work is trains else 3.0
    rendezvous.JOINING = timedelta(seconds=5) if act is die else timedelta(seconds=60)
    config = small(folder / "run", f"watchdog_seconds={watchdog.SILENCE}")

    def command() -> int:
        if rank == victim:
            if place == "before it joins":
                act()
            elif place:
                owner, name = PLACES[place]
                instead(owner, name, act)
        return launch(config, ARGUMENTS, lambda world: work(config, world))

    code = ended(command)
    os._exit(code)


PLACES: dict[str, tuple[Any, str]] = {
    "in start-up": (pipeline, "open_all"),
    "in the final save": (Checkpointer, "finish"),
    "between stages": (pipeline.memory, "release"),
    "in the handoff": (pipeline, "merge_trained_weights"),
    "while it shows the outcome": (summary, "show"),
}


def codes_of(folder: Path, victim: int, place: str, act: Any, work: Any = trains) -> tuple[list[Any], list[str]]:
    """How both ranks end, and what they say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        ranks.CONTEXT.Process(target=member, args=(rank, port, folder, victim, place, act, work)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(150)
        return [process.exitcode for process in processes], [(folder / f"said_{rank}").read_text() for rank in range(2)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("place", "victim"),
    [
        ("before it joins", 0),
        ("before it joins", 1),
        ("in start-up", 1),
        ("in the final save", 1),
        ("between stages", 1),
        ("in the handoff", 0),
        ("while it shows the outcome", 0),
    ],
)
def test_a_rank_lost_anywhere_ends_the_others_to_be_tried_again(tmp_path: Path, place: str, victim: int) -> None:
    codes, said = codes_of(tmp_path, victim, place, die)
    assert codes[victim] == KILLED, said
    assert codes[1 - victim] == TRY_AGAIN, said
    left = said[1 - victim]
    assert "Traceback" not in left
    assert re.search(f"cannot meet rank {victim}|rank 1 on .* has gone without a word|rank 0, which holds", left), left


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_fails_before_it_joins_tells_the_others(tmp_path: Path, victim: int) -> None:
    began = time.monotonic()
    codes, said = codes_of(tmp_path, victim, "before it joins", fail)
    assert codes == [REFUSED, REFUSED], said
    assert time.monotonic() - began < 55  # not when they have waited for it in vain
    assert said[victim].startswith("error: this node has no such disk: mount it\n")
    stops = f"rank {1 - victim} stops: rank {victim} failed: ValueError: this node has no such disk"
    assert stops in said[1 - victim]


def test_what_stands_still_outside_steps_is_named_and_ends_to_be_tried_again(tmp_path: Path) -> None:
    codes, said = codes_of(tmp_path, 0, "", None, gets_nowhere)
    assert codes == [TRY_AGAIN, TRY_AGAIN], said
    assert "it has been at its handoff for" in "".join(said)
    assert "stand_still" in said[0]  # its stack


def test_long_work_of_one_rank_that_gets_on_is_no_hang(tmp_path: Path) -> None:
    codes, said = codes_of(tmp_path, 0, "", None, gets_on)
    assert codes == [0, 0], said


def test_a_long_save_is_no_hang(tmp_path: Path) -> None:
    """Eight megabytes at one a second, where three seconds without progress are a hang."""
    codes, said = codes_of(tmp_path, 0, "", None, saves_on_a_slow_disk)
    assert codes == [0, 0], said


def test_a_library_that_writes_for_long_is_no_hang(tmp_path: Path) -> None:
    codes, said = codes_of(tmp_path, 0, "", None, exports_by_a_slow_library)
    assert codes == [0, 0], said
    assert (tmp_path / "run" / "export" / "large").stat().st_size == 14 << 16


def test_what_is_published_is_hashed_and_synced_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is a sign of life: a file of a library's has gigabytes, and a disk may take seconds for each."""
    monkeypatch.setattr(checksums, "PIECE", 1 << 16)
    monkeypatch.setattr(io, "SYNC", 1 << 16)
    moves: list[int] = []
    with io.published(tmp_path / "export") as folder:
        (folder / "large").write_bytes(bytes(10 << 16))
        monkeypatch.setattr(checksums, "tick", lambda: moves.append(1))
        monkeypatch.setattr(io, "tick", lambda: moves.append(2))
    assert moves.count(1) >= 10
    assert moves.count(2) >= 10
    checksums.check(tmp_path / "export")


def test_every_error_has_its_code() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.yaml")
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    write = WriteError("checkpoint not written")
    expected = {
        TRY_AGAIN: [
            *(TryAgain("x"), write, NotMet("x"), Silent("x"), gloo, dist.DistNetworkError("x"), KeyboardInterrupt()),
            *(full, OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), TimeoutError("x"), URLError("x")),
            *(BrokenProcessPool("x"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
            *(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),),
            *(torch.AcceleratorError(f"CUDA error: {text}") for text in LOST_DEVICES),
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
            *(RuntimeError("NCCL Error 1: unhandled cuda error"), RuntimeError("CUDA driver error: unknown error")),
            RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
            dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
            dist.DistBackendError("NCCL error in: NCCLUtils.hpp:268, unhandled cuda error (run with NCCL_DEBUG=INFO)"),
            dist.DistStoreError("Timed out after 1800 seconds waiting for clients. 1/2 clients joined."),
        ],
        REFUSED: [
            *(ValueError("x"), SlurmError("x"), MemoryError(), torch.OutOfMemoryError("x")),
            torch.AcceleratorError("CUDA error: out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            *(FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x"), OSError("no such model")),
        ],
        FAULT: [
            *(RuntimeError("x"), KeyError("x"), AssertionError(), ZeroDivisionError("x")),
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
            RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(handle)`"),
        ],
    }
    for code, errors in expected.items():
        assert {repr(error): code_of(error) for error in errors} == {repr(error): code for error in errors}


def test_only_a_fault_of_the_program_has_a_traceback_behind_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def of(error: Exception) -> list[str]:
        def work() -> int:
            raise error

        code = ended(work)
        lines = capsys.readouterr().err.splitlines()
        assert (code == FAULT) == (len(lines) > 1)
        return lines

    assert of(ValueError("x=1 is bad: set x=2")) == ["error: x=1 is bad: set x=2"]
    assert of(OSError(errno.ENOSPC, "No space left on device", "/run/a"))[0].endswith(
        "'/run/a': make room, then the same command goes on"
    )
    assert of(TryAgain("rank 3 is lost")) == ["stopped: rank 3 is lost: the same command goes on from what is saved"]
    first, second, *_ = of(KeyError("k"))
    assert first.startswith("error: KeyError: 'k': this is a fault of the program")
    assert second.startswith("Traceback")


def full_disk(limit: int, work: Callable[[], int]) -> tuple[int, str]:
    """The exit code of `work`, and what it says, where no file can have more than `limit` bytes."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            sys.stdout = sys.stderr = os.fdopen(writes, "w")
            os._exit(ended(work))
        finally:
            os._exit(99)
    os.close(writes)
    with os.fdopen(reads) as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def test_a_disk_that_is_full_at_the_first_write_leaves_nothing_that_blocks_the_directory(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    other = replace(config, stages={"projector": replace(config.stages["projector"], seed=7)})
    pipeline.open_all(config, noted=False)  # the index is there
    code, said = full_disk(90, lambda: run_alone(config))
    assert code == REFUSED
    assert "make room" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    run_alone(other)  # not held up by what was begun
    assert configs.load(tmp_path / "run" / "config.yaml").stages["projector"].seed == 7
    assert find_weights(tmp_path / "run" / "projector" / "weights.safetensors")


def test_the_line_itself_may_find_no_room(tmp_path: Path) -> None:
    def work() -> int:
        sys.stderr = (tmp_path / "log").open("w")
        os.dup2(sys.stderr.fileno(), 2)
        watchdog.say("x" * 200)
        raise OSError(errno.ENOSPC, "No space left on device", "x" * 200)

    assert full_disk(90, work) == (TRY_AGAIN, "")


def run_alone(config: Config) -> int:
    with session() as world:
        run_pipeline(config, world)
    return 0


def test_a_library_that_finds_the_disk_full_says_so_in_its_own_error(tmp_path: Path) -> None:
    import numpy as np

    def save() -> int:
        save_file({"a": np.zeros(9999)}, tmp_path / "a.safetensors")
        return 0

    code, said = full_disk(90, save)
    assert code == TRY_AGAIN
    assert said.count("\n") == 1
    assert code_of(SafetensorError("header too large")) == FAULT


def test_a_stop_file_made_before_the_start_is_obeyed_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / STOP).touch()
    monkeypatch.setattr(sys, "argv", ["pretrain", f"output={run}"])
    assert pretrain.main() == HALTED
    said = capsys.readouterr().out
    assert f"stopped before it began. Remove {run / STOP}, and the same command goes on from there." in said
    assert {path.name for path in run.iterdir()} - {"logs", ".lock"} == {STOP}


def test_a_directory_in_use_is_said_to_be_tried_again(tmp_path: Path) -> None:
    """Of another process: a lock of this one's own is no hindrance."""
    ready, done = ranks.CONTEXT.Event(), ranks.CONTEXT.Event()
    holder = ranks.CONTEXT.Process(target=hold, args=(tmp_path, ready, done))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(TryAgain, match="is in use by process") as raised, locked(tmp_path, ALONE):
            pass
        assert code_of(raised.value) == TRY_AGAIN
    finally:
        done.set()
        holder.join()


def hold(folder: Path, ready: Any, done: Any) -> None:
    with locked(folder, ALONE):
        ready.set()
        done.wait(60)


def test_every_row_of_the_table_names_a_test_that_is_there() -> None:
    rows = [line for line in (ROOT / "docs" / "stops.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    text = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert all(f"def {name}(" in text for name in named), row
