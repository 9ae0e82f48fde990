"""A checkpoint is restored bit for bit on any number of ranks, or refused; and no fault may cost a good one.

Why: the checkpoint code exists so that a half-written file does not cost a week of training, and garbage is never
loaded silently. The faults here are therefore real ones: processes killed in mid-write, full disks, flipped bits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import (
    die_at_byte,
    die_at_event,
    fail_then_recover,
    hold_lock,
    is_numbered,
    lock_refused,
    numbered,
    run,
    save_as_nobody,
    start,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import hive_scale.checkpoint.checkpointer as staging_module
from hive_scale.checkpoint.checkpointer import Checkpointer, WriteError
from hive_scale.checkpoint.format import (
    OwnedRange,
    Range,
    StepCheckpoint,
    difference,
    divide,
    tensor_name,
    write_manifest,
)
from hive_scale.checkpoint.io import CorruptFile, file_hash
from hive_scale.checkpoint.stage_files import LazyTensor, find_weights
from hive_scale.checkpoint.weights import fill, merge_trained_weights, read_weights, write_weights
from hive_scale.config import KeepConfig
from hive_scale.distributed import Fragment, World
from hive_scale.resilience.run_lock import locked

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _quiet_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage with good checkpoints of steps 1, 2 and 3."""
    directory = tmp_path / "stage"
    store = Checkpointer(directory, ALONE, KeepConfig(3))
    for step in (1, 2, 3):
        store.save(step, numbered(step), {"step": step})
    store.finish()
    return directory


def restored(directory: Path) -> int:
    """The step of the newest sound checkpoint; its contents must be that step's."""
    store = Checkpointer(directory, ALONE)
    found = store.latest()
    assert found is not None
    target = numbered(99)
    step = store.load(found, target)["step"]
    assert is_numbered(target, step)
    return int(step)


# ----------------------------------------------------------------------- who writes what


@settings(max_examples=60)
@given(st.data())
def test_ranks_share_all_ranges_and_overlap_nowhere(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    tables: list[list[OwnedRange]] = [[] for _ in range(size)]
    for key in "abc":
        cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=4)) | {0, 40})
        for low, high in pairwise(cuts):
            for rank in data.draw(st.sets(st.integers(0, size - 1), min_size=1)):
                tables[rank].append(OwnedRange(Range(key, low, high - low), (5, 8)))
    written = dict.fromkeys("abc", 0)
    for rank in range(size):
        for (key, offset, length), source, begin in divide(tables, rank):
            whole = tables[rank][source].range
            assert (key, offset) == (whole.key, whole.offset + begin)
            assert 0 < length <= whole.length - begin
            bits = ((1 << length) - 1) << offset
            assert not written[key] & bits
            written[key] |= bits
    assert set(written.values()) == {(1 << 40) - 1}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 5))
def test_replicas_share_the_writing_evenly(lengths: list[int], size: int) -> None:
    table = [OwnedRange(Range(f"w{i}", 0, length), (length,)) for i, length in enumerate(lengths)]
    shares = [sum(piece.range.length for piece in divide([table] * size, rank)) for rank in range(size)]
    assert sum(shares) == sum(lengths)
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([("w", 0, 4), ("w", 5, 5)], "w has a hole at 4"),
        ([("w", 0, 6), ("w", 5, 5)], "w has an overlap at 6"),
        ([("w", 0, 9)], "w has 9 elements"),
        ([], "w has 0 elements"),
    ],
)
def test_ranges_that_do_not_make_up_a_tensor_are_refused(ranges: list[tuple[str, int, int]], message: str) -> None:
    tables = [[OwnedRange(Range(*r), (2, 5))] for r in ranges] + [[OwnedRange(Range("w", 0, 0), (2, 5))]]
    with pytest.raises(ValueError, match=message):
        divide(tables, 0)
    with pytest.raises(ValueError, match=r"w has shape \(2, 5\) on one rank and \(10,\)"):
        divide([*tables, [OwnedRange(Range("w", 0, 10), (10,))]], 0)


# ----------------------------------------------------------------------- writing beside training


def test_training_goes_on_and_does_not_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    write = staging_module.write_file
    monkeypatch.setattr(staging_module, "write_file", lambda *a: may_write.wait(10) and write(*a))
    store = Checkpointer(tmp_path, ALONE)
    live, state = numbered(1), {"step": 1, "rng": [1, 2]}
    store.save(1, live, state)  # returns although nothing can be written yet
    assert not list(tmp_path.glob("step_????????"))
    for fragment in live:
        fragment.data.fill_(-1)
    state["rng"] = []
    may_write.set()
    assert store.finish() == tmp_path / "step_00000001"
    assert restored(tmp_path) == 1
    assert Checkpointer(tmp_path, ALONE).load(tmp_path / "step_00000001", live)["rng"] == [1, 2]


def test_a_checkpoint_is_twelve_bytes_a_parameter(stage: Path) -> None:
    size = sum(path.stat().st_size for path in (stage / "step_00000003").iterdir())
    assert 12 * 60_000 < size < 1.02 * 12 * 60_000


def test_the_staging_buffer_is_reused(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path, ALONE)
    places = set()
    for step in range(3):
        store.save(step, numbered(step), {})
        assert store._staging is not None
        places.add(store._staging.buffer.data_ptr())
    store.finish()
    assert len(places) == 1


def test_the_last_k_stay(tmp_path: Path) -> None:
    store = Checkpointer(tmp_path, ALONE, KeepConfig(2))
    for step in (10, 20, 30, 100_000_000):
        store.save(step, numbered(step), {})
    store.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000030", "step_100000000"]
    with pytest.raises(ValueError, match="set last to 1 or more"):
        KeepConfig(0)


def test_every_nth_and_the_best_stay_also_after_a_restart(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 2.0, 5: float("nan"), 6: 2.5, 7: None, 8: 2.25, 9: 4.0}
    for steps in ((1, 2, 3, 4, 5), (6, 7, 8, 9)):
        store = Checkpointer(tmp_path, ALONE, KeepConfig(1, every=3, best=True))
        for step in steps:
            store.save(step, numbered(step), {"step": step, "eval_loss": losses[step]})
        store.finish()
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [3, 4, 6, 9]
    damage_flip(tmp_path / "step_00000004")  # the best no more, once that is known
    damage_flip(tmp_path / "step_00000009")
    store = Checkpointer(tmp_path, ALONE, KeepConfig(1, best=True))
    assert store.latest() == tmp_path / "step_00000006"
    with pytest.raises(CorruptFile):
        store.load(tmp_path / "step_00000004", numbered(0))
    store.save(10, numbered(10), {"step": 10}, wait=True)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == [6, 10]


def test_damaged_checkpoints_do_not_displace_good_ones(stage: Path) -> None:
    for step in (2, 3):
        damage_flip(stage / f"step_0000000{step}")
    store = Checkpointer(stage, ALONE, KeepConfig(2))
    assert store.latest() == stage / "step_00000001"
    store.save(3, numbered(3), {"step": 3}, wait=True)  # over the damaged one
    assert sorted(path.name for path in stage.iterdir()) == ["step_00000001", "step_00000003"]
    assert restored(stage) == 3


def test_saving_twice_at_one_step_is_saving_once(stage: Path) -> None:
    store = Checkpointer(stage, ALONE)
    found = store.latest()
    before = (stage / "step_00000003/manifest.json").stat().st_mtime_ns
    store.save(3, numbered(3), {"step": 3}, wait=True)
    assert found == store.finish()
    assert (stage / "step_00000003/manifest.json").stat().st_mtime_ns == before


def test_ranges_that_change_within_a_stage_are_refused(stage: Path) -> None:
    store = Checkpointer(stage, ALONE)
    store.save(4, numbered(4), {})
    with pytest.raises(RuntimeError, match="have changed"):
        store.save(5, numbered(5, numel=7), {})
    store.finish()


# ----------------------------------------------------------------------- damage is found and named


def damage_flip(path: Path, name: str = "rank_00000.safetensors", at: int = -5) -> None:
    data = bytearray((path / name).read_bytes())
    data[at] ^= 1
    (path / name).write_bytes(data)


def damage_cut(path: Path, name: str) -> None:
    os.truncate(path / name, (path / name).stat().st_size - 1)


def damage_swap(path: Path, name: str) -> None:
    (path / name).write_bytes((path.with_name("step_00000002") / name).read_bytes())


def damage_remove(path: Path, name: str) -> None:
    (path / name).unlink()


DATA, MANIFEST = "rank_00000.safetensors", "manifest.json"
DAMAGES = [
    (lambda path: damage_flip(path), "does not match its checksum"),
    (lambda path: damage_flip(path, at=20), "does not match its checksum"),  # in the header
    (lambda path: damage_cut(path, DATA), "bytes instead of"),
    (lambda path: damage_remove(path, DATA), "No such file"),
    (lambda path: damage_swap(path, DATA), "does not match its checksum"),
    (lambda path: damage_swap(path, MANIFEST), "is that of step_00000002"),
    (lambda path: damage_flip(path, MANIFEST, at=-8), "manifest.json"),
    (lambda path: damage_flip(path, MANIFEST, at=60), "manifest.json"),
    (lambda path: damage_cut(path, MANIFEST), "not what was written"),
    (lambda path: damage_remove(path, MANIFEST), "No such file"),
    (lambda path: (path / MANIFEST).write_text("[]"), "not what was written"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken(stage, damage, reason, caplog) -> None:  # type: ignore[no-untyped-def]
    newest = stage / "step_00000003"
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert restored(stage) == 2
    assert reason in caplog.text
    with pytest.raises(CorruptFile, match=reason):
        Checkpointer(stage, ALONE).load(newest, numbered(0))


def test_every_byte_of_the_manifest_counts(stage: Path) -> None:
    path = stage / "step_00000003"
    good = (path / MANIFEST).read_bytes()
    for at in range(len(good)):
        (path / MANIFEST).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert Checkpointer(stage, ALONE)._damage(path), f"a flipped bit in byte {at} went unnoticed"


def test_starting_over_is_a_decision(stage: Path) -> None:
    for step in (1, 2, 3):
        damage_flip(stage / f"step_0000000{step}")
    with pytest.raises(CorruptFile, match="remove them all to start the stage over"):
        Checkpointer(stage, ALONE).latest()
    assert Checkpointer(stage / "other", ALONE).latest() is None


def test_another_models_state_is_refused_by_name(stage: Path) -> None:
    found = Checkpointer(stage, ALONE).latest()
    assert found is not None
    renamed = [fragment._replace(name="v") for fragment in numbered(0)]
    with pytest.raises(ValueError, match="missing: v; unexpected: w"):
        Checkpointer(stage, ALONE).load(found, renamed)
    reshaped = [fragment._replace(shape=(300, 200)) for fragment in numbered(0)]
    with pytest.raises(ValueError, match=r"of another shape: w \(60000,\) instead of \(300, 200\)"):
        Checkpointer(stage, ALONE).load(found, reshaped)
    with pytest.raises(ValueError, match="unexpected: exp_avg_sq/w"):
        Checkpointer(stage, ALONE).load(found, numbered(0)[:2])


def test_a_long_difference_is_cut() -> None:
    assert difference({}, {f"p{i:02d}": (1,) for i in range(30)}).endswith("p09 and 20 more")
    assert difference({}, {f"p{i:02d}": (1,) for i in range(11)}).endswith("p09 and 1 more")
    assert difference({}, {f"p{i:02d}": (1,) for i in range(10)}).endswith("p08, p09")


def test_a_manifest_cannot_point_elsewhere(stage: Path) -> None:
    path = stage / "step_00000003"
    content = json.loads((path / MANIFEST).read_text())["content"]
    content["files"]["../step_00000002/rank_00000.safetensors"] = content["files"].pop(DATA)
    (path / MANIFEST).unlink()
    write_manifest(path, 3, content["shapes"], content["files"], {})
    with pytest.raises(CorruptFile, match="outside the checkpoint"):
        Checkpointer(stage, ALONE).load(path, numbered(0))


# ----------------------------------------------------------------------- faults while writing


def check_after_crash(directory: Path) -> None:
    step = restored(directory)
    assert step in (1, 2)
    store = Checkpointer(directory, ALONE)  # the next run goes on, and clears up
    store.latest()
    store.save(7, numbered(7), {"step": 7}, wait=True)
    assert restored(directory) == 7
    assert not list(directory.glob("*.tmp"))


def test_kill_9_at_any_file_operation(tmp_path: Path) -> None:
    codes, steps = [], []
    for event in range(1, 21):
        directory = tmp_path / str(event)
        codes += run(1, tmp_path / f"meet{event}", die_at_event, directory, 0, event)
        steps.append(restored(directory))
        check_after_crash(directory)
        if codes[-1] == 9:  # every operation had its turn
            break
    assert codes.count(-signal.SIGKILL) >= 10
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_one_rank_of_two_at_any_file_operation(tmp_path: Path, victim: int) -> None:
    for event in range(1, 21):
        directory = tmp_path / str(event)
        codes = run(2, tmp_path / f"meet{event}", die_at_event, directory, victim, event)
        if codes[victim] == 9:  # every operation had its turn
            break
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] != 0  # it hears of it and ends, rather than hang
        check_after_crash(directory)
    assert event > (1 if victim else 10)


@pytest.mark.parametrize("limit", [1, 100_000, 359_999])
def test_kill_in_the_middle_of_a_file(tmp_path: Path, limit: int) -> None:
    codes = run(2, tmp_path / "meet", die_at_byte, tmp_path / "stage", 1, limit)
    assert codes[1] == -signal.SIGXFSZ
    assert restored(tmp_path / "stage") == 1
    check_after_crash(tmp_path / "stage")


def test_kill_9_of_all_at_any_moment(tmp_path: Path) -> None:
    for moment in range(6):
        directory = tmp_path / str(moment)
        ranks = start(2, tmp_path / f"meet{moment}", save_for_ever, directory)
        while not list(directory.glob("step_????????")):
            time.sleep(0.01)
        time.sleep(0.025 * moment)
        for process in ranks:
            process.kill()
        for process in ranks:
            process.join()
        step = restored(directory)
        assert step >= 1
        Checkpointer(directory, ALONE).save(step + 1, numbered(step + 1), {"step": step + 1}, wait=True)
        assert restored(directory) == step + 1


def save_for_ever(world: World, directory: Path) -> None:
    store = Checkpointer(directory, world, KeepConfig(1))
    for step in range(1, 10_000):
        store.save(step, numbered(step, world.rank, world.size), {"step": step})


@pytest.mark.parametrize("size", [1, 3])
def test_a_failed_write_is_heard_on_every_rank_and_retried(tmp_path: Path, size: int) -> None:
    assert run(size, tmp_path / "meet", fail_then_recover, tmp_path / "stage") == [0] * size
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["step_00000003"]


def test_no_space_left(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null"):
        pytest.skip("needs the right to mount a tmpfs; the file size limit above stands in for it")
    try:
        store = Checkpointer(disk, ALONE, KeepConfig(1))
        store.save(1, numbered(1), {"step": 1}, wait=True)  # 0.7 of 1 MB
        with pytest.raises(WriteError, match="No space left"):
            store.save(2, numbered(2), {"step": 2}, wait=True)
        assert [path.name for path in disk.iterdir()] == ["step_00000001"]
        assert restored(disk) == 1
    finally:
        os.system(f"umount {disk}")


def test_a_read_only_directory_is_a_message(stage: Path, tmp_path: Path) -> None:
    for directory in (*tmp_path.parents[:2], tmp_path):
        directory.chmod(0o755)
    stage.chmod(0o555)
    assert run(1, tmp_path / "meet", save_as_nobody, stage) == [0]
    assert restored(stage) == 3


def test_two_runs_on_one_directory(tmp_path: Path) -> None:
    directory, ready = tmp_path / "run", tmp_path / "ready"
    (owner,) = start(1, tmp_path / "meet1", hold_lock, directory, ready)
    while not ready.exists():
        time.sleep(0.01)
    assert run(2, tmp_path / "meet2", lock_refused, directory, owner.pid) == [0, 0]
    threading.Timer(1.0, owner.kill).start()
    with locked(directory, ALONE, patience=30.0):  # the lock dies with its owner
        pass
    owner.join()


# ----------------------------------------------------------------------- from stage to stage


def parent_and_checkpoint(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path]:
    parent = {
        "embed.weight": torch.randn(65, 13),
        "odd": torch.randn(7, 13).bfloat16(),
        "frozen": torch.randn(5, 3).bfloat16(),
        "gate": torch.randn(1),
        "scalar": torch.tensor(2.5),
        "mask": torch.tensor([True, False, True]),
    }
    masters = {name: torch.randn(parent[name].shape) for name in ("embed.weight", "odd", "gate")}
    fragments = [
        Fragment(name, kind, tuple(t.shape), 0, (t if kind == "master" else torch.zeros_like(t)).view(-1))
        for name, t in masters.items()
        for kind in ("master", "exp_avg", "exp_avg_sq")
    ]
    store = Checkpointer(tmp_path / "stage", ALONE)
    store.save(4, fragments, {"step": 4}, wait=True)
    write_weights(tmp_path / "parent.safetensors", parent)
    checkpoint = store.finish()
    assert checkpoint is not None
    return parent, masters, checkpoint


@pytest.mark.parametrize("limit", [5_000_000_000, 500])
def test_handoff_is_the_parent_with_the_masters_in_place(tmp_path: Path, limit: int) -> None:
    parent, masters, checkpoint = parent_and_checkpoint(tmp_path)
    path = tmp_path / "out" / "weights.safetensors"
    published = merge_trained_weights(tmp_path / "parent.safetensors", checkpoint, path, max_shard_bytes=limit)
    assert published == find_weights(path)
    files = [file for file in path.parent.iterdir() if file.suffix == ".safetensors"]
    assert (len(files) == 1) == (limit > 500)
    stock = {name: tensor for file in files for name, tensor in load_file(file).items()}  # any reader opens them
    assert read_weights(path).metadata["parent"] == read_weights(tmp_path / "parent.safetensors").identity
    for found in (dict(read_weights(path)), stock):
        assert found.keys() == parent.keys()
        for name, tensor in found.items():
            expected = masters.get(name, parent[name])
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected), name
    target = {name: torch.zeros_like(tensor) for name, tensor in parent.items()}
    fill(target.items(), path)
    assert torch.equal(target["odd"], masters["odd"].bfloat16())


def test_a_checkpoint_of_other_parameters_is_no_handoff(tmp_path: Path) -> None:
    _, _, checkpoint = parent_and_checkpoint(tmp_path)
    write_weights(tmp_path / "other.safetensors", {"odd": torch.zeros(7, 13), "gate": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unexpected: embed.weight; of another shape: gate \(1,\) instead of \(2,\)"):
        merge_trained_weights(tmp_path / "other.safetensors", checkpoint, tmp_path / "out.safetensors")
    damage_flip(checkpoint)
    with pytest.raises(CorruptFile, match="checksum"):
        merge_trained_weights(tmp_path / "parent.safetensors", checkpoint, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_weights_are_written_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def read() -> torch.Tensor:
        assert not alive, "the tensor before was still held"
        tensor = torch.ones(1000)
        alive.add(tensor)
        return tensor

    source = LazyTensor(torch.float32, (1000,), read)
    write_weights(tmp_path / "w.safetensors", {f"t{i}": source for i in range(5)})
    assert len(read_weights(tmp_path / "w.safetensors")) == 5


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    write_weights(tmp_path / "w.safetensors", model.state_dict())
    assert list(read_weights(tmp_path / "w.safetensors")) == ["embed.weight"]
    before = model["head"].weight.clone()
    torch.nn.init.zeros_(model["embed"].weight)
    fill(model.state_dict().items(), tmp_path / "w.safetensors")
    assert torch.equal(model["head"].weight, before)


def test_weights_that_do_not_fit_are_refused_before_anything_changes(tmp_path: Path) -> None:
    write_weights(tmp_path / "w.safetensors", {"a": torch.ones(3), "b": torch.ones(2)})
    a, b = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"missing: c; of another shape: b \(2,\) instead of \(4,\)"):
        fill({"a": a, "b": b, "c": torch.zeros(1)}.items(), tmp_path / "w.safetensors")
    assert not a.any()
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_weights(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("limit", [5_000_000_000, 1000])
def test_damaged_weights_are_refused(tmp_path: Path, limit: int) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for directory, value in ((good, 1.0), (bad, 2.0)):
        tensors = {f"t{i}": torch.full((200,), value + i) for i in range(3)}
        write_weights(directory / "weights.safetensors", tensors, {"from": "here"}, limit)
    assert read_weights(good).metadata["from"] == "here"  # a directory is fine, too
    assert read_weights(good).identity != read_weights(bad).identity
    assert read_weights(good).identity == read_weights(good / "weights.safetensors").identity
    (name, *_) = sorted(path.name for path in bad.glob("*.safetensors"))
    whole = (bad / name).read_bytes()
    for at in (3, 30, len(whole) // 2, len(whole) - 1):
        (bad / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptFile):
            read_weights(bad)
    (bad / name).write_bytes(whole[:-1])
    with pytest.raises(CorruptFile):
        read_weights(bad)
    (bad / name).write_bytes((good / name).read_bytes())  # sound, but of another set
    if limit == 1000:
        with pytest.raises(CorruptFile, match="not the file that its index names"):
            read_weights(bad)
        damage_cut(good, "weights.safetensors.index.json")
        with pytest.raises(CorruptFile, match="not what was written"):
            read_weights(good)


def test_a_failed_handoff_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    def read() -> torch.Tensor:
        raise OSError("disk gone")

    path = tmp_path / "weights.safetensors"
    sources = {"a": torch.ones(200), "b": LazyTensor(torch.float32, (200,), read)}
    for limit in (5_000_000_000, 800):
        with pytest.raises(OSError, match="disk gone"):
            write_weights(path, sources, max_shard_bytes=limit)
        assert find_weights(path) is None
    write_weights(path, {"a": torch.ones(3)})
    assert find_weights(path) == path


def test_a_range_is_read_from_the_middle_of_stored_ranges(tmp_path: Path) -> None:
    files, step = {}, tmp_path / "step_00000001"
    step.mkdir()
    for rank, begin in enumerate((0, 6)):
        stored, path = Range("master/a", begin, 6), step / f"rank_{rank:05d}.safetensors"
        path.write_bytes(save({tensor_name(stored): torch.arange(begin, begin + 6.0)}))
        entry = {"bytes": path.stat().st_size, "xxh3_128": file_hash(path), "ranges": [list(stored)]}
        files[path.name] = entry
    write_manifest(step, 1, {"master/a": (12,)}, files, {})
    for low, high in ((8, 11), (4, 9), (7, 12)):
        out = torch.empty(high - low)
        StepCheckpoint(step).read("master/a", low, out)
        assert out.tolist() == list(range(low, high))
