"""However a launcher exposes devices, each rank gets one of its own; and ranks reach each other whatever host names
resolve to.

Why: launchers show a process all GPUs, those near its cores, or one; Debian resolves a machine's name to 127.0.1.1;
ports are in use. NCCL and gloo answer with unhelpful messages, or wait for half an hour.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import ranks
import torch
import torch.distributed as dist
from test_parity import model_of, stage_of, weights_of
from torch.distributed.tensor import DTensor

from hive_scale import device, placement
from hive_scale.config import EngineConfig
from hive_scale.distributed import World
from hive_scale.engine import open_engine
from hive_scale.launcher_env import place_of
from hive_scale.model.build import meta_model
from hive_scale.param_groups import apply_trainable_groups
from hive_scale.placement import View, deal, interface, look
from hive_scale.rendezvous import ports

ROOT = Path(__file__).resolve().parents[1]
MINE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def views(*seen: str, machine: str = "m") -> list[View]:
    """Ranks of a machine, each of which sees the devices of these letters."""
    return [View("n", machine, rank, "cuda", [(one, "") for one in those], "") for rank, those in enumerate(seen)]


@pytest.mark.parametrize(
    ("seen", "taken"),
    [
        (["abcd"] * 4, "abcd"),  # torchrun, deepspeed, srun --gpus-per-node
        (["a", "b", "c", "d"], "abcd"),  # --gpus-per-task, LSF, Flux, a pod with one
        (["ab", "ab", "cd", "cd"], "abcd"),  # --gpu-bind=closest, ranks in blocks
        (["ab", "cd", "ab", "cd"], "bcad"),  # ... and in turn
        (["ba", "cb", "ac"], "bca"),  # overlapping, in orders of their own
        (["ab", "a"], "ba"),  # the one that has a choice gives way
        (["dcba", "dcba"], "dc"),
    ],
)
def test_each_rank_has_a_device_for_itself(seen: list[str], taken: str) -> None:
    found = deal(views(*seen))
    assert "".join(those[index] for those, index in zip(seen, found, strict=True)) == taken


def test_where_all_see_all_the_number_on_the_node_decides() -> None:
    nodes = [*views(*["abcd"] * 4, machine="m"), *views(*["abcd"] * 4, machine="other")]
    assert deal(nodes) == [0, 1, 2, 3] * 2
    assert deal([one._replace(local_rank=3 - one.local_rank) for one in nodes]) == [3, 2, 1, 0] * 2


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (["a", "a"], r"^ranks 0, 1 on n see 1 device between them \(a\): start one process per GPU"),
        (["ab", "ab", "ab"], "ranks 0, 1, 2 on n see 2 devices"),
        (["abc", "c", "c"], "ranks 1, 2 on n see 1 device"),
    ],
)
def test_ranks_that_would_share_a_device_are_named(seen: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        deal(views(*seen))


def test_the_same_name_on_another_machine_is_another_device() -> None:
    assert deal([*views("0", machine="m"), *views("0", machine="other")]) == [0, 0]


def test_a_rank_that_finds_no_device_while_others_do_is_named() -> None:
    one, two = views("a", "b")
    with pytest.raises(ValueError, match="rank 1 on n computes on cpu, rank 0 on n on cuda: a driver may be down"):
        deal([one, two._replace(kind="cpu", devices=[])])
    assert deal([one._replace(kind="cpu", devices=[])] * 3) == [0, 0, 0]


def test_instances_of_one_card_are_refused_unless_nccl_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [view._replace(devices=[(f"MIG-{view.local_rank}", "0:41:0")]) for view in views("a", "b")]
    with pytest.raises(ValueError, match=r"ranks 0 and 1 have instances of one card of n \(0:41:0\)"):
        deal(both)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert deal(both) == [0, 0]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch see these cards, as its driver would tell of them."""

    def see(*uuids: str) -> None:
        def properties(index: int) -> Any:
            place = {"pci_domain_id": 0, "pci_bus_id": 16 + int(uuids[index][-1], 16), "pci_device_id": 0}
            return SimpleNamespace(uuid=uuids[index], **place)

        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    return see


def test_a_device_is_known_by_its_uuid_and_an_instance_by_the_word_that_gives_it(
    cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards("GPU-1", "GPU-2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    assert device.visible() == [("GPU-1", "00:11:00"), ("GPU-2", "00:12:00")]
    cards("GPU-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert device.visible() == [("MIG-7", "00:11:00")]
    assert look(5, "").devices == [("MIG-7", "00:11:00")]


DEALT = """
import os, sys, torch
from types import SimpleNamespace
uuids = sys.argv[1].split(",")
torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
torch.accelerator.device_count = lambda: len(uuids)
torch.accelerator.set_device_index = lambda device: print("takes", uuids[device.index], flush=True)
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=uuids[index])
from hive_scale import distributed
from hive_scale.exit_codes import ended
distributed.backend = lambda device: "gloo"  # there is no device to connect
init = distributed.dist.init_process_group
distributed.dist.init_process_group = lambda *words, device_id, **how: init(*words, **how)
def work():
    with distributed.session() as world:
        world.sum(1.0)
    return 0
sys.exit(ended(work))
"""


def srun(rank: int, size: int, nodes: str = "localhost", job: str | None = None) -> dict[str, str]:
    """As srun would start a process, which is told of no port."""
    env = {name: value for name, value in os.environ.items() if name not in MINE}
    env |= {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1"}
    job = job or str(os.getpid())
    return env | {
        **{"SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": job},
        "PYTHONPATH": str(ROOT),
    }


def start(script: str, *words: str, env: dict[str, str], prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, "-c", script, *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("seen", "codes", "told"),
    [
        (["GPU-7,GPU-9", "GPU-7"], {0}, ["takes GPU-9\n", "takes GPU-7\n"]),
        (["GPU-7", "GPU-7"], {2}, ["", ""]),
    ],
)
def test_processes_tell_each_other_what_they_see_before_they_connect(
    seen: list[str], codes: set[int], told: list[str]
) -> None:
    job = str(uuid4().int % 10**9)
    started = [start(DEALT, one, env=srun(rank, 2, job=job)) for rank, one in enumerate(seen)]
    said = [process.communicate(timeout=120) for process in started]
    assert {process.returncode for process in started} == codes, said
    assert [out for out, _ in said] == told
    if 2 in codes:
        assert "ranks 0, 1 on" in said[0][1] + said[1][1]
        assert "Traceback" not in said[0][1] + said[1][1]


@pytest.mark.parametrize(
    ("words", "place"),
    [
        # as Open MPI 4.1 and MPICH 4.0 say it, on one machine
        ({"OMPI_COMM_WORLD_": "RANK=1 SIZE=2 LOCAL_RANK=1 LOCAL_SIZE=2", "OMPI_MCA_": "ess_base_jobid=178"}, (1, 2, 1)),
        ({"PMI_": "RANK=1 SIZE=2 FD=8", "MPI_": "LOCALRANKID=1 LOCALNRANKS=2"}, (1, 2, 1)),
        # as their documentation has it
        ({"JSM_NAMESPACE_": "RANK=5 SIZE=8 LOCAL_RANK=1 LOCAL_SIZE=4", "MASTER_": "ADDR=h1"}, (5, 8, 1)),
        ({"MV2_COMM_WORLD_": "RANK=5 SIZE=8 LOCAL_RANK=1 LOCAL_SIZE=4", "MASTER_": "ADDR=h1"}, (5, 8, 1)),
        ({"FLUX_": "TASK_RANK=3 JOB_SIZE=4 TASK_LOCAL_ID=3 JOB_NNODES=1 JOB_ID=f2"}, (3, 4, 3)),
        ({"PMI_": "RANK=3 SIZE=4 LOCAL_RANK=1 LOCAL_SIZE=2", "MASTER_": "ADDR=h1", "PALS_": "APID=x"}, (3, 4, 1)),
        # mpirun has srun start its daemons, whose words its processes have
        (
            {
                "OMPI_COMM_WORLD_": "RANK=5 SIZE=8 LOCAL_RANK=1 LOCAL_SIZE=4",
                "SLURM_": "JOB_ID=1 JOB_NODELIST=g[3-4] STEP_ID=0 PROCID=1 STEP_NUM_TASKS=2",
            },
            (5, 8, 1),
        ),
        # and srun says some of theirs
        ({"PMI_": "RANK=0 SIZE=9", "SLURM_": "STEP_ID=0 PROCID=1 STEP_NUM_TASKS=2 LOCALID=1"}, (1, 2, 1)),
        ({"PMIX_": "RANK=0", "SLURM_": "STEP_ID=0 PROCID=1 STEP_NUM_TASKS=2 LOCALID=1"}, (1, 2, 1)),
    ],
)
def test_the_words_of_other_launchers(words: dict[str, str], place: tuple[int, int, int]) -> None:
    env = dict((prefix + word).split("=") for prefix, some in words.items() for word in some.split())
    found = place_of(env)
    assert (found.rank, found.size, found.local_rank) == place
    if "OMPI_MCA_ess_base_jobid" in env:
        assert found.master["MASTER_ADDR"] == "127.0.0.1"
        other = place_of(env | {"OMPI_MCA_ess_base_jobid": "179"})
        assert found.start != other.start
        assert found.master["MASTER_PORT"] != other.master["MASTER_PORT"]
    if "SLURM_JOB_NODELIST" in env:
        assert found.master["MASTER_ADDR"] == "g3"


def test_what_a_launcher_leaves_out_is_asked_for() -> None:
    several = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "5"), ("SIZE", "8"), ("LOCAL_RANK", "1"))}
    with pytest.raises(
        ValueError, match=r"OMPI_COMM_WORLD_SIZE=8 is set but not MASTER_ADDR: .* mpirun -x MASTER_ADDR"
    ):
        place_of(several)
    with pytest.raises(ValueError, match="PMIX_RANK=0 is set but nothing says how many"):
        place_of({"PMIX_RANK": "0"})


def mpi() -> list[list[str]]:
    """The mpiexecs of this machine, for two processes."""
    openmpi = ["--allow-run-as-root", "--oversubscribe"]
    known = (("mpiexec.openmpi", openmpi), ("mpiexec.hydra", []))
    return [[found, *words, "-n", "2"] for name, words in known if (found := shutil.which(name))]


SUMS = """
import os
from hive_scale.distributed import session
with session() as world:
    names = os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")
    print(world.rank, world.sum(1.0), *names, os.environ["MASTER_PORT"], flush=True)
"""


@pytest.mark.skipif(not mpi(), reason="no mpiexec on this machine")
@pytest.mark.parametrize("command", mpi(), ids=lambda command: Path(command[0]).name)
def test_mpiexec_starts_a_world(command: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if name not in MINE} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, sys.executable, "-c", SUMS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[:2] for line in done.stdout.splitlines()) == [["0", "[2.0]"], ["1", "[2.0]"]]


def test_another_port_is_taken_where_other_programs_and_other_jobs_have_the_first() -> None:
    job = str(uuid4().int % 10**9)
    first = int(place_of(srun(0, 2, job=job)).master["MASTER_PORT"])
    others = ports(first)
    # another job's store, which would answer all that ours does
    store = dist.TCPStore("127.0.0.1", others[0], 2, True, wait_for_workers=False)
    dist.PrefixStore("slurm 1.0 0", store).set("open", "")
    with socket.socket() as silent:
        silent.bind(("0.0.0.0", others[1]))
        silent.listen()
        started = [start(SUMS, env=srun(rank, 2, job=job)) for rank in range(2)]
        said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert {out.split()[-1] for out, _ in said} == {str(others[2])}


# ---------------------------------------------------------------- networks


def address_on_the_way(routes: dict[str, str]) -> Any:
    return lambda host: routes.get(host, "")


def test_a_rank_whose_way_ends_on_its_machine_takes_the_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "own_address", address_on_the_way({"10.0.0.2": "10.0.0.1"}))
    names = {"10.0.0.1": "ib0", "10.0.0.2": "ib1", "127.0.0.1": "lo"}
    monkeypatch.setattr(placement, "interface_of", lambda address: names.get(address, ""))
    far = [View("n", "m", 0, "cpu", [], address) for address in ("127.0.0.1", "127.0.0.1", "10.0.0.2")]
    assert [interface(far, rank) for rank in range(3)] == ["ib0", "ib0", "ib1"]
    assert interface(far[:2], 0) == "lo", "on one machine there is nobody else"
    assert interface([far[2]._replace(address=""), far[2]], 0) == "", "no route: gloo's own choice"


def test_an_interface_is_found_by_its_address() -> None:
    assert placement.is_loopback_interface(placement.interface_of(placement.own_address("localhost")))
    assert placement.own_address("no.such.host.invalid") == ""
    assert placement.interface_of("") == ""


class Net:
    """Two machines of networks and names of their own, joined by a wire; each believes its own name to be 127.0.1.1."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"hs{os.getpid()}{letter}" for letter in "ab"]
        self.commands = []
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        ends = [f"v{os.getpid()}{letter}" for letter in "ab"]
        subprocess.run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
        for number, (name, end) in enumerate(zip(self.names, ends, strict=True), 1):
            subprocess.run(["ip", "link", "set", end, "netns", name, "name", f"wire{number}"], check=True)
            for words in (
                f"addr add 10.77.0.{number}/24 dev wire{number}",
                f"link set wire{number} up",
                "link set lo up",
            ):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
            hosts = folder / name
            other = 3 - number
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n10.77.0.{other} node{other}\n")
            shell = f'hostname node{number} && mount --bind {hosts} /etc/hosts && exec "$@"'
            inside = ("unshare", "--uts", "--mount", "sh", "-c", shell, "sh")
            self.commands.append(("ip", "netns", "exec", name, *inside))

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare")
    try:
        made = Net(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("network namespaces cannot be made here")
    yield made
    made.remove()


def test_machines_whose_own_name_is_a_loopback_address_reach_each_other(net: Net) -> None:
    job = str(uuid4().int % 10**9)
    started = [
        start(SUMS, env=srun(rank, 2, "node[1-2]", job), prefix=prefix) for rank, prefix in enumerate(net.commands)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert [out.split()[1:4] for out, _ in said] == [["[2.0]", f"wire{n}", f"=wire{n}"] for n in (1, 2)]


# ---------------------------------------------------------------- meshes


def shard_groups(world: World) -> list[int]:
    model, stage = meta_model(model_of("cross_attention")), stage_of(3, "cross_attention", world.size)
    groups, weights = apply_trainable_groups(model, stage, model.unused_parameters()), weights_of("cross_attention")
    engine: Any = open_engine(model, groups, stage, EngineConfig("bf16", shard_size=2), world, weights)
    parameter = next(one for one in engine.model.parameters() if isinstance(one, DTensor))
    return dist.get_process_group_ranks(parameter.device_mesh["shard"].get_group())


def test_shards_lie_on_ranks_that_follow_each_other() -> None:
    """So with as many as a node has, weights are gathered inside it, and only gradients leave it."""
    assert ranks.run(shard_groups, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]
