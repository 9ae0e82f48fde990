"""Choose each process's device and network interface, from what all processes see.

Launchers differ in what they show a process: all devices of its node, those near its cores, or a single one. A node's
name may also resolve differently on the node itself (127.0.1.1 on Debian). So the local rank alone decides nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import psutil

from hive_scale import device

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # unique to a running Linux machine
SHARED = "NCCL_MULTI_RANK_GPU_ENABLE"  # variable that lets NCCL >= 2.30 connect several MIG instances of one card


class View(NamedTuple):
    """The machine, devices and address that one process sees."""

    host: str  # host name, for messages
    machine: str  # unique id of the machine
    local_rank: int  # rank on its node, from the launcher; only a preference among devices
    kind: str  # device type, as torch.device has it
    devices: list[tuple[str, str]]  # (unique id, id of its card) of each visible device
    address: str  # IP address of this process on the route to the rendezvous; "": none


def look(local_rank: int, meeting: str) -> View:
    """What this process sees. `meeting` is the host of the rendezvous, "" for a single process."""
    kind = device.kind()
    visible = device.visible() if kind in device.DISTRIBUTED else []
    return View(socket.gethostname(), machine(), local_rank, kind, visible, own_address(meeting) if meeting else "")


def machine() -> str:
    """A unique id of this machine, even among machines of the same name."""
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else socket.gethostname()


def deal(views: Sequence[View]) -> list[int]:
    """Assign each rank a device of its own, by bipartite matching: its index among the devices that the rank sees.

    A rank without devices gets 0. The local rank is preferred where possible. Raises ValueError if there are too few
    devices, or ranks see different kinds.
    """
    _check_kinds(views)
    owners: dict[tuple[str, str], int] = {}

    def place(rank: int, tried: set[tuple[str, str]]) -> bool:
        """Give `rank` a device, if need be by moving its present owner to another (augmenting path)."""
        for key in _wanted(views[rank]):
            if key not in tried:
                tried.add(key)
                if key not in owners or place(owners[key], tried):
                    owners[key] = rank
                    return True
        return False

    for rank, view in enumerate(views):
        tried: set[tuple[str, str]] = set()
        if view.devices and not place(rank, tried):
            raise _shared(views, sorted({rank, *(owners[key] for key in tried)}), sorted(key[1] for key in tried))
    taken = {rank: identity for (_, identity), rank in owners.items()}
    chosen = [
        [identity for identity, _ in view.devices].index(taken[rank]) if view.devices else 0
        for rank, view in enumerate(views)
    ]
    _check_cards(views, chosen)
    return chosen


def interface(views: Sequence[View], rank: int) -> str:
    """Name of the network interface by which `rank` reaches the other ranks; "" if unknown.

    It is the one on the route to the rendezvous. If that route is the loopback (the rendezvous is on this machine),
    it is the one on the route to another rank whose address is not.
    """
    own = views[rank].address
    far = next((view.address for view in views if view.address and not _is_loopback(view.address)), "")
    if own and _is_loopback(own) and far:
        own = own_address(far)
    return interface_of(own)


def own_address(host: str) -> str:
    """This machine's IP address on the route to `host`, "" if there is no route. No packet is sent."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe, suppress(OSError):
                probe.connect(address)
                return _plain(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """Name of the interface with this IP `address`, "" if none has it."""
    return next((name for name, address_of_it in addresses() if _is_same(address, address_of_it)), "")


def addresses() -> list[tuple[str, str]]:
    """(interface name, IP address) for every address of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = psutil.net_if_addrs().items()
    return [(name, _plain(one.address)) for name, ones in found for one in ones if one.family in families]


def is_loopback_interface(name: str) -> bool:
    """True if interface `name` is a loopback, which reaches only this machine."""
    return any(_is_loopback(address) for one, address in addresses() if one == name)


def ranks_of(numbers: Sequence[int]) -> str:
    """Format rank numbers: ``rank 3``, or ``ranks 0, 1 and 6 more``."""
    first = ", ".join(str(number) for number in numbers[:8])
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' * (len(numbers) > 1)} {first}{more}"


def _wanted(view: View) -> list[tuple[str, str]]:
    keys = [(view.machine, identity) for identity, _ in view.devices]
    first = view.local_rank % len(keys) if keys else 0
    return keys[first:] + keys[:first]


def _check_kinds(views: Sequence[View]) -> None:
    for rank, view in enumerate(views):
        if view.kind != views[0].kind:
            raise ValueError(
                f"rank {rank} on {view.host} computes on {view.kind}, rank 0 on {views[0].host} on {views[0].kind}: a "
                "driver may be down, or the launcher gives no device: see nvidia-smi there, or leave that node out"
            )


def _check_cards(views: Sequence[View], chosen: Sequence[int]) -> None:
    """Raises ValueError if two ranks got MIG instances of one card, which NCCL takes for one device."""
    if os.environ.get(SHARED) == "1":
        return
    seen: dict[tuple[str, str], int] = {}
    for rank, (view, index) in enumerate(zip(views, chosen, strict=True)):
        if view.devices and (card := view.devices[index][1]):
            other = seen.setdefault((view.machine, card), rank)
            if other != rank:
                raise ValueError(
                    f"ranks {other} and {rank} have instances of one card of {view.host} ({card}), which NCCL refuses: "
                    f"give each a card of its own, or, with NCCL from 2.30 on, set {SHARED}=1"
                )


def _shared(views: Sequence[View], ranks: Sequence[int], devices: Sequence[str]) -> ValueError:
    count = f"{len(devices)} device{'s' * (len(devices) > 1)}"
    return ValueError(
        f"{ranks_of(ranks)} on {views[ranks[0]].host} see {count} between them ({', '.join(devices[:8])}): start one "
        "process per GPU, and show each all GPUs of its node or one of its own (CUDA_VISIBLE_DEVICES, --gpus-per-task, "
        "--gpu-bind)"
    )


def _is_same(one: str, other: str) -> bool:
    return bool(one) and (one == other or (_is_loopback(one) and _is_loopback(other)))


def _is_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


def _plain(address: str) -> str:
    """`address` without the zone (%eth0) that the kernel adds to link-local addresses."""
    return address.partition("%")[0]
