"""Ranks of one machine share its cores, and one of them reads for all what all need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import torch

from hive_scale import node
from hive_scale.checkpoint.io import CorruptFile
from hive_scale.checkpoint.weights import read_weights, write_weights
from hive_scale.distributed import World
from hive_scale.node import once_per_node, share, use_cores

SIZE = 20_000_000  # bytes of weights
ALONE = World(0, 1, torch.device("cpu"))


def bytes_read() -> int:
    """What this process has read by calls, from disk or not."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def on_nodes_of_two(world: World, folder: Path) -> tuple[list[int], str, int, str]:
    """Who of four is asked, the weights' identity and what reading them took, and what is said of different nodes."""
    node.node_id = lambda: f"node{world.rank // 2} boot"  # type: ignore[assignment]
    asked: list[int] = []
    once_per_node(world, lambda: str(asked.append(world.rank)))
    before = bytes_read()
    weights = read_weights(folder, world)
    taken = bytes_read() - before
    assert float(weights["b"][0]) == 0.0
    try:
        once_per_node(world, lambda: f"of node {world.rank // 2}")
        said = ""
    except ValueError as error:
        said = str(error)
    return asked, weights.identity, taken, said


@pytest.mark.parametrize("shard_bytes", [SIZE, SIZE // 3])
def test_one_rank_of_each_node_reads_the_weights_to_check_them(shard_bytes: int, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(SIZE // 8) for name in "ab"}
    write_weights(tmp_path / "weights.safetensors", tensors, max_shard_bytes=shard_bytes + 1000)
    expected = read_weights(tmp_path).identity
    found = ranks.run(on_nodes_of_two, 4, tmp_path)
    assert [asked for asked, *_ in found] == [[0], [], [2], []]
    assert {identity for _, identity, _, _ in found} == {expected}
    taken = [one[2] for one in found]
    assert min(taken[0], taken[2]) > SIZE
    assert max(taken[1], taken[3]) < SIZE / 10
    for *_, said in found:
        assert said.startswith(
            "node1, the node of rank 2, has other files than node0, that of rank 0 (of node 1, not of"
        )


def test_damaged_weights_end_every_rank(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "weights.safetensors", {"a": torch.zeros(1000)})
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    with pytest.raises(CorruptFile):
        read_weights(tmp_path, ALONE)
    with pytest.raises(ranks.RankFailed, match=r"CorruptFile: .*does not match its checksum"):
        ranks.run(reading, 2, tmp_path)


def reading(world: World, folder: Path) -> str:
    return read_weights(folder, world).identity


def test_cores_are_shared_by_those_who_may_run_on_them() -> None:
    whole, half, other = tuple(range(16)), tuple(range(8)), tuple(range(8, 16))
    assert [share([("a", whole)] * 4, rank) for rank in range(4)] == [4] * 4, "torchrun: all on all"
    assert [share([("a", half), ("a", other)], rank) for rank in range(2)] == [8, 8], (
        "srun: bound to cores of their own"
    )
    assert [share([("a", whole), ("b", whole)], rank) for rank in range(2)] == [16, 16], "two nodes"
    assert share([("a", (3,))] * 5, 4) == 1, "never none"


def threads(world: World, asked: str | None) -> int:
    _ = os.environ.pop("OMP_NUM_THREADS", None) if asked is None else os.environ.update(OMP_NUM_THREADS=asked)
    torch.set_num_threads(3)
    use_cores(world)
    return torch.get_num_threads()


@pytest.mark.parametrize("asked", [None, "1"])
def test_threads_are_a_ranks_share_of_the_cores(asked: str | None) -> None:
    cores = len(os.sched_getaffinity(0))
    assert ranks.run(threads, 2, asked) == [max(1, cores // 2)] * 2


def test_a_number_of_threads_that_somebody_asked_for_stays() -> None:
    assert ranks.run(threads, 1, "3") == [3]
