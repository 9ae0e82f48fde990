"""The log of a run outlives it: one line per step whatever happens, wandb and TensorBoard drawn from it and harmless
when they fail, and a screen that shows each message once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import wandb_server
from rich.cells import cell_len
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.batch import Sample, collate
from hive_scale.config import LogConfig
from hive_scale.distributed import World
from hive_scale.observability import console, goodput, logging_setup, trackers
from hive_scale.observability.goodput import Goodput
from hive_scale.observability.metrics import MetricsTail, damage, read_metrics
from hive_scale.observability.stage_log import StageLog
from hive_scale.observability.throughput import Throughput
from hive_scale.observability.trackers import replay, wandb_id
from hive_scale.phase_timer import PhaseTimer
from hive_scale.report import run_view as gallery
from hive_scale.report.report import report
from hive_scale.slurm.status import _progress

ROOT = Path(__file__).parents[1]
WORLD = World(0, 1, torch.device("cpu"))
OFF = LogConfig(wandb="off")


def values(**changes: Any) -> dict[str, Any]:
    always = {"loss": 2.0, "grad_norm": 1.0, "num_tokens": 5, "lr": {"a": 0.1}, "data_seconds": 0.0, "memory_gb": 0.5}
    return always | changes


def train(stage_dir: Path, first: int, last: int, config: LogConfig = OFF) -> None:
    with StageLog(stage_dir, 10, first - 1, 5 * (first - 1), config, WORLD) as log:
        for step in range(first, last + 1):
            log.step(step, 4 * step, values(loss=1.0 / step))


def test_one_line_per_step_across_restarts(tmp_path: Path) -> None:
    train(tmp_path / "joint", 1, 6)
    path = tmp_path / "joint" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"schema": 1, "step": 7, "lo')  # killed while it wrote
    train(tmp_path / "joint", 5, 8)  # from the checkpoint of step 4
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["tokens"] for line in lines] == [5 * step for step in range(1, 9)]
    assert [line["restarts"] for line in lines] == [0] * 4 + [1] * 4
    assert all(line["schema"] == 1 for line in lines)


def test_a_cut_line_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    assert "line 2 is cut off" in caplog.text


def described(path: Path, draw: bool = False) -> list[str]:
    """What every reader of a log says of it: status, goodput, mirrors and, to `draw`, the report."""
    if draw:
        notes = report([gallery.RunView(path.parents[1])], look=False).notes
        assert [note.partition(": ")[2] for note in notes] == damage(path)
    lines = read_metrics(path)
    _progress(lines, 10, 4)
    goodput.summary(*goodput.added(lines[-1:]))
    Goodput(PhaseTimer(), lines, 3).line()
    list(MetricsTail(path).lines())
    return damage(path)


def written(folder: Path, steps: int = 8) -> Path:
    run_dir(folder)
    spent = {"spent": dict.fromkeys(goodput.ACCOUNTS, 1.0), "lost_steps": 0}
    with StageLog(folder / "joint", 10, 0, 0, OFF, WORLD) as log:
        for step in range(1, steps + 1):
            log.step(step, 4 * step, values(eval_loss=2.0, grad_rms={"vision.1": 1.0}, gates={"0": 0.5}, **spent))
    return folder / "joint" / "metrics.jsonl"


def test_what_is_not_finite_is_left_out_of_a_line(tmp_path: Path) -> None:
    run_dir(tmp_path)
    with StageLog(tmp_path / "joint", 10, 0, 0, OFF, WORLD) as log:
        log.step(1, 4, values(eval_loss=float("nan"), gates={"0": float("inf"), "1": 0.5}))
    (line,) = (tmp_path / "joint" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["gates"] == {"1": 0.5}
    assert "eval_loss" not in found


def wrong_key(text: str) -> str:
    return text.replace('"step"', '"stpe"')


@pytest.mark.parametrize(
    "change",
    [
        wrong_key,
        lambda text: text.replace('"samples"', '"smaples"'),
        lambda text: text.replace('"step": 4', '"step": 40000000000000000000000000'),
        lambda text: text.replace('"step": 4', '"step": "4"'),
        lambda text: text.replace('"schema": 1', '"schema": 9'),
        lambda text: text.replace('"schema": 1', '"schema": "1"'),
        lambda text: text.replace('"lr": {"a": 0.1}', '"lr": 0.1'),
        lambda text: text.replace('"lr": {"a": 0.1}', '"lr": {"a": [1]}'),
        lambda text: text.replace('"loss": 2.0', '"loss": "2.0"'),
        lambda text: text.replace('"seconds": ', '"seconds": -'),
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "\x00" * len(text),
        lambda text: text.replace("tokens", "tok\udcffens"),  # the byte 0xff
        lambda text: text.replace('"spent"', '"spend"').replace('"step": 4', '"step": 44'),
    ],
)
def test_a_damaged_line_is_left_out_and_the_hole_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[str], str]
) -> None:
    """Only that line: and a stage that goes on, and every reader, does so."""
    path = written(tmp_path / "run")
    lines = path.read_text().split("\n")
    lines[3] = change(lines[3])
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 5, 6, 7, 8]
    assert "line 4 is cut off or damaged, and left out" in caplog.text
    assert "step 4 is missing" in caplog.text
    said = ["line 4 is cut off or damaged, and left out", "step 4 is missing"]
    assert described(path, draw=change is wrong_key) == said
    train(path.parent, 7, 10)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert described(path) == ["step 4 is missing"], "for good"


def test_no_bytes_in_a_log_stop_a_stage_or_its_readers(tmp_path: Path) -> None:
    path = written(tmp_path / "run", 4)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for number in range(40):
        data = bytearray(whole)
        for place in random.integers(0, len(data), random.integers(1, 12)):
            data[place] = random.integers(256)
        path.write_bytes(data)
        described(path, draw=number % 10 == 0)
        train(path.parent, 4, 5)
        assert read_metrics(path)[-1]["step"] == 5


def test_what_was_not_finite_or_not_recorded_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As logs of the first versions have it, which wrote NaN, and logs whose gradient was not finite."""
    path = written(tmp_path / "run", 3)
    first = '{"step": 4, "samples": 16, "loss": NaN, "grad_norm": Infinity, "lr": {"a": 0.1}, "seconds": 1.5}\n'
    path.write_text(path.read_text().replace('"grad_norm": 1.0, ', "") + first)
    assert read_metrics(path)[-1] == {"step": 4, "samples": 16, "lr": {"a": 0.1}, "seconds": 1.5}
    assert described(path, draw=True) == []
    assert not caplog.records


def test_a_disk_that_takes_no_line_does_not_stop_a_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StageLog(tmp_path / "joint", 10, 0, 0, OFF, WORLD) as log:
        for step in range(1, 8):
            if step == 3:
                size = (tmp_path / "joint" / "metrics.jsonl").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
            if step == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            log.step(step, 4 * step, values())
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    caplog.clear()
    assert [line["step"] for line in read_metrics(tmp_path / "joint" / "metrics.jsonl")] == [1, 2, 6, 7]
    assert "steps 3 to 5 are missing" in caplog.text


def test_a_schema_from_the_future_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"schema": 2, "step": 1}\n')
    with pytest.raises(ValueError, match="reads up to 1: update"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_follower_waits_for_whole_lines_and_meets_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsTail(path)
    assert list(follower.lines()) == []
    with path.open("w") as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert [line["step"] for line in follower.lines()] == [1]
        file.write('ep": 2}\n')
        file.flush()
        assert [line["step"] for line in follower.lines()] == [2]
    path.with_suffix(".new").write_text('{"step": 1}\n')
    path.with_suffix(".new").replace(path)
    assert [line["step"] for line in follower.lines()] == [1]


def run_dir(path: Path) -> Path:
    configs.save(replace(presets.debug(), output=str(path)), path / "config.yaml")
    return path


def test_tensorboard_shows_a_restarted_stage_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = run_dir(tmp_path / "run")
    train(run / "joint", 1, 6, LogConfig(tensorboard=True))
    train(run / "joint", 5, 8, LogConfig(tensorboard=True))
    events = EventAccumulator(str(run / "tensorboard" / "joint"))
    events.Reload()
    drawn = events.Scalars("loss")
    assert [event.step for event in drawn] == list(range(1, 9))
    assert [event.value for event in drawn] == pytest.approx([1 / step for step in range(1, 9)])


def records(path: Path) -> Iterator[bytes]:
    """What wandb wrote: after 7 bytes, blocks of 32 KiB of pieces (4 bytes checksum, 2 length, 1 place, payload)."""
    data, offset, whole = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        length, place = struct.unpack("<HB", data[offset + 4 : offset + 7])
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if place in (1, 4):  # the only piece, or the last
            yield whole
            whole = b""


def offline_steps(run: Path) -> dict[str, list[list[int]]]:
    """Steps in each of wandb's offline segments, by run id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[list[int]]] = {}
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        steps = []
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                steps += [int(i.value_json) for i in record.history.item if [i.key, *i.nested_key][-1] == "step"]
        found.setdefault(path.stem.removeprefix("run-"), []).append(steps)
    return found


def test_wandb_segments_share_one_id_and_are_replayed_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr("hive_scale.observability.trackers.PATIENCE", 120.0)  # on a busy machine wandb takes its time
    run = run_dir(tmp_path / "run")
    train(run / "joint", 1, 6, LogConfig())
    name = wandb_id(run, "joint")
    assert offline_steps(run) == {name: [[1, 2, 3, 4, 5, 6]]}
    # a moment later, since wandb names segments by the second
    train(run / "joint", 5, 8, LogConfig())
    assert replay(run, "offline") == [name]
    segments = offline_steps(run)
    assert set(segments) == {name}
    assert sorted(segments[name]) == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8]]
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"0123456789" * 4 not in written


def test_a_server_gets_each_step_once_whatever_was_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own client on a wire of ours; offline segments are sent the same way."""
    online = LogConfig(wandb="online")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setattr("hive_scale.observability.trackers.PATIENCE", 120.0)
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = run_dir(tmp_path / "run")
        train(run / "joint", 1, 6, online)
        name = wandb_id(run, "joint")
        assert server.steps(name) == [1, 2, 3, 4, 5, 6]
        train(run / "joint", 5, 8, online)  # from the checkpoint of step 4
        assert server.steps(name) == [1, 2, 3, 4, 5, 6, 7, 8]
        train(run / "joint", 9, 9, LogConfig())  # on a node without a network
        assert server.steps(name)[-1] == 8
        for _ in range(2):
            sync = [sys.executable, str(ROOT / "launchers/visualize.py"), "sync", str(run)]
            subprocess.run(sync, check=True, capture_output=True, timeout=120)
        assert server.steps(name) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert set(server.history) == {name}


def test_a_server_that_goes_away_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with wandb_server.serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        run = run_dir(tmp_path / "run")
        train(run / "joint", 1, 3, LogConfig(wandb="online"))
    monkeypatch.setattr(trackers, "PATIENCE", 3.0)
    train(run / "joint", 4, 6, LogConfig(wandb="online"))  # nobody answers now
    [left] = [one for one in psutil.Process().children() if "hive_scale.observability.trackers" in one.cmdline()]
    for process in (*left.children(recursive=True), left):  # it would try for hours
        process.kill()
    assert [line["step"] for line in read_metrics(run / "joint" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sum("wandb" in record.message for record in caplog.records) == 1


def test_a_mirror_that_dies_harms_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")  # wandb refuses it
    run = run_dir(tmp_path / "run")
    train(run / "joint", 1, 3, LogConfig())
    assert len(read_metrics(run / "joint" / "metrics.jsonl")) == 3
    assert sum("wandb failed" in record.message for record in caplog.records) == 1
    assert "nonsense" in (run / "logs" / "nonsense.log").read_text()


def test_a_mirror_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = tmp_path / "slow" / "wandb"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(slow.parent))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    run = run_dir(tmp_path / "run")
    train(run / "joint", 1, 3, LogConfig())
    assert "is left to itself" in caplog.text
    assert len(read_metrics(run / "joint" / "metrics.jsonl")) == 3


RANKS = """
import logging, sys, warnings
from pathlib import Path
import torch
from hive_scale.distributed import World
from hive_scale.observability.logging_setup import capture_library_logs
for rank in (1, 2):
    with capture_library_logs(Path(sys.argv[1]), World(rank, 3, torch.device("cpu"))):
        late = logging.getLogger("DeepSpeed")
        late.propagate = False
        late.addHandler(logging.StreamHandler(sys.stdout))  # as the library does on import
        late.warning("the same everywhere")
        late.info("chatter")
        if rank == 2:
            warnings.warn("only here")
"""


def test_warnings_of_all_ranks_are_told_once_by_rank_0(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_setup.capture_library_logs(tmp_path, WORLD):
        logging.getLogger("DeepSpeed").warning("the same everywhere")
        command = [sys.executable, "-c", RANKS, str(tmp_path)]
        others = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        warnings.warn("mine", stacklevel=1)
        assert not others.stdout + others.stderr
    shown = "".join(capfd.readouterr())
    assert shown.count("the same everywhere") == 1
    assert shown.count("only here") == shown.count("mine") == 1
    assert "warning of rank 2: " in shown
    assert "chatter" not in shown
    assert "chatter" in (tmp_path / "rank_00002.log").read_text()
    assert not isinstance(logging.getLogger("DeepSpeed"), logging_setup._Captive)


def test_quiet_leaves_warnings_and_what_is_captured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with logging_setup.capture_library_logs(tmp_path, WORLD, quiet=True):
        train(tmp_path / "joint", 1, 2)
        with console.console.capture() as outcome:
            console.console.print("the outcome")
        logging.getLogger("x").warning("beware")
    shown = "".join(capfd.readouterr())
    assert "beware" in shown
    assert "loss" not in shown
    assert outcome.get() == "the outcome\n"


def test_afterwards_the_screen_is_where_stdout_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_setup.capture_library_logs(tmp_path, WORLD, quiet=True):
        pass
    moved = StringIO()
    monkeypatch.setattr(sys, "stdout", moved)
    console.console.print("here")
    assert moved.getvalue() == "here\n"


LOST = """
import sys
from pathlib import Path
import torch
from hive_scale.distributed import World
from hive_scale.observability import console, logging_setup

with logging_setup.capture_library_logs(Path(sys.argv[1]), World(0, 1, torch.device("cpu"))):
    for step in range(3):
        console.console.print("step", step)
        for _ in console.track(range(2), "evaluate"):
            pass
        sys.stdin.readline()
    print("the end")
sys.exit(7)
"""


def test_a_run_outlives_its_screen(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LOST, tmp_path]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        on_full = subprocess.Popen(words, stdout=full, env=environment, **pipes)
        piped = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, **pipes)
        assert piped.stdout
        assert piped.stdout.readline() == "step 0\n"
        piped.stdout.close()  # as of `| head -1`
        for process, why in ((piped, "Broken pipe"), (on_full, "No space left on device")):
            _, errors = process.communicate("\n\n\n")
            assert process.returncode == 7, errors
            assert errors.count("warning: the output cannot be written") == 1
            assert why in errors
            assert "Traceback" not in errors


LINE = {
    **{"step": 3000, "seconds": 3.5, "loss": 1.5, "mfu": 0.41, "data_seconds": 0.5, "memory_gb": 7.2, "grad_norm": 1},
    **{"lr": {"a": 0.1}, "eval_loss": 1.7, "eval_seconds": 1.5},
}
SCREENS = {
    60: "language   ━━━━━━╸━━━━━━━━━ 3000/6978 loss 1.500",
    80: "language   ━━━━━━╸━━━━━━━━━ 3000/6978 loss 1.500  32 samples/s  ETA 3:52:03",
    100: "language   ━━━━━━╸━━━━━━━━━ 3000/6978 loss 1.500  32 samples/s  400 tokens/s  MFU 41.0%  ETA 3:52:03",
    120: "language   ━━━━━━╸━━━━━━━━━ 3000/6978 loss 1.500  32 samples/s  400 tokens/s  MFU 41.0%  ETA 3:52:03  "
    "data 25%  7.20 GB",
    160: "language   ━━━━━━╸━━━━━━━━━ 3000/6978 loss 1.500  32 samples/s  400 tokens/s  MFU 41.0%  ETA 3:52:03  "
    "data 25%  7.20 GB  lr 1.0e-01  grad 1.00",
}


@pytest.mark.parametrize("width", SCREENS)
def test_the_counter_and_the_bar_survive_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is least important goes first; nothing wraps, and nothing is cut."""
    shown = screen(width, monkeypatch, lambda view: view.show(LINE, samples=64, tokens=800))
    assert shown[-1] == SCREENS[width]
    assert "language 3000/6978  held-out loss 1.7000  in 0:02" in shown


@pytest.mark.parametrize("width", [60, 80, 300])
def test_no_name_makes_the_bar_wrap(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("数" * 60, "x" * 100, "a"):
        monkeypatch.setattr(console, "console", Console(file=StringIO(), force_terminal=True, width=width))
        one = console.StageView(name, 100_000, 7)
        one.start()
        one.show({**LINE, "step": 8, "loss": math.nan}, samples=64, tokens=800)
        one.stop()
        lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", console.console.file.getvalue()).splitlines()
        bars = [line for line in lines if "━" in line]
        assert "8/100000" in bars[-1]
        assert max(map(cell_len, bars)) <= width


def screen(width: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[console.StageView], object]) -> list[str]:
    """The lines that a terminal of `width` columns shows after `act`, as a terminal emulator would."""
    file = StringIO()
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, highlight=False, width=width))
    view = console.StageView("language", 6978, 2999)
    view.start()
    act(view)
    view.stop()
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_an_evaluation_shows_how_far_it_is_and_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(view: console.StageView) -> None:
        view.show({**LINE, "step": 2999}, samples=64, tokens=800)
        for _ in view.track("abc", "held-out"):
            time.sleep(0.15)  # the bar moves ten times a second

    shown = screen(80, monkeypatch, act)
    assert any(re.fullmatch(r"held-out   ━+[╸╺]?━* +[12]/3", line) for line in shown)
    assert shown[-1].startswith("language   ━"), "the bar of the evaluation is gone at its end"
    assert max(map(len, shown)) <= 80


def test_without_a_terminal_progress_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    assert list(console.track("abc", "features")) == ["a", "b", "c"]
    assert capsys.readouterr().out == "features 1/3\nfeatures 2/3\nfeatures 3/3\n"
    assert list(console.track(iter("ab"), "features")) == ["a", "b"]
    assert capsys.readouterr().out == "features 1\nfeatures 2\n", "of an unknown number"
    monkeypatch.setattr(console, "INTERVAL", 100.0)
    assert list(console.track("abc", "features")) == ["a", "b", "c"]
    assert not capsys.readouterr().out


def test_rates_leave_out_evaluation() -> None:
    timer = PhaseTimer()
    meter = Throughput(None, None, 1, timer)
    batch = collate([Sample("a", None, [1, 2], [False, True])] * 4, pad_id=0, image_size=2)
    time.sleep(0.05)
    plain = meter.step([batch], 8)["samples_per_second"]
    timer.enter("evaluate")
    time.sleep(0.5)
    timer.enter("data")
    time.sleep(0.05)
    assert meter.step([batch], 8)["samples_per_second"] > plain / 3, "with the evaluation it would be an eleventh"


def test_what_is_on_the_screen_already_is_logged_and_not_said_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with logging_setup.capture_library_logs(tmp_path, WORLD, level="info"):
        logging_setup.show_and_log("run        mine\noutput     there")
    shown = "".join(capfd.readouterr())
    assert shown == "run        mine\noutput     there\n"
    assert "run        mine\n    output     there\n" in (tmp_path / "rank_00000.log").read_text()


def test_the_screen_shows_what_a_watcher_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = console.describe(LINE, samples=64, tokens=800, seconds_left=3723)
    words = "loss 1.500", "32 samples/s", "400 tokens/s", "MFU 41.0%", "ETA 1:02:03", "data 25%", "7.20 GB"
    assert tuple(parts.values())[:7] == ("loss 1.500", "32 samples/s", "400 tokens/s", "MFU 41.0%", *words[4:])
    for slurm in (False, True):
        with (tmp_path / "screen").open("w") as file:
            monkeypatch.setattr(console, "console", Console(file=file, force_terminal=True, highlight=False, width=200))
            monkeypatch.setattr(os, "environ", os.environ | ({"SLURM_JOB_ID": "7"} if slurm else {}))
            train(tmp_path / f"joint{slurm}", 1, 10)
        shown = (tmp_path / "screen").read_text()
        assert ("\x1b[" in shown) is not slurm  # a bar moves the cursor, lines do not
        assert "10/10" in shown
