"""Memory for the pictures of batches, used again once nobody holds them.

Fresh memory costs a page fault every 4 kB, and that of workers a file and a mapping each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import prod
from mmap import mmap
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from torch import Tensor

NONE = -1
_numbers = count()
_here: WeakValueDictionary[int, Rooms] = WeakValueDictionary()  # those made in this process or before its fork


@dataclass(frozen=True)
class Layout:
    """Of one sample's part in a batch: a shape, the strides that it lies with, and a dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def over(self, memory: Tensor, samples: int) -> Tensor:
        """(samples, *shape) at the beginning of `memory`, which is flat and of bytes."""
        size = prod(self.shape)
        return memory.view(self.dtype).as_strided((samples, *self.shape), (size, *self.strides))

    def bytes(self, samples: int) -> int:
        return samples * prod(self.shape) * self.dtype.itemsize


class Rooms:
    """`number` rooms for up to `samples` samples each, shared with processes that are forked later.

    Who asks for a batch takes a room for it, whoever makes the batch fills it, and the batch is `lent` where it is
    used: the room is free again when the last tensor on it is gone, so that nobody's batch is ever written over.
    """

    def __init__(self, layout: Layout, samples: int, number: int) -> None:
        self.layout = layout
        # anonymous: nothing is there before its use, and none of it is of /dev/shm, which containers keep small
        maps = (mmap(-1, layout.bytes(samples)) for _ in range(number))
        self._memory = [torch.frombuffer(one, dtype=torch.uint8) for one in maps]
        self._free = deque(range(number))
        self._number = next(_numbers)
        _here[self._number] = self

    def take(self) -> int:
        """The room freed last, whose memory is in the caches still; NONE if none is free."""
        return self._free.pop() if self._free else NONE

    def fill(self, room: int, samples: int) -> Tensor:
        """(samples, *shape) to write into, for the process that fills it."""
        return self.layout.over(self._memory[room], samples)

    def lend(self, room: int, samples: int) -> Tensor:
        """The same as a tensor of its own, with which the room is given back."""
        array = self._memory[room].numpy()[:]  # an object that the tensor's storage, and nothing else, keeps alive
        finalize(array, self._free.append, room).atexit = False
        return self.layout.over(torch.from_numpy(array), samples)

    def sent(self, room: int, samples: int) -> Any:
        """What becomes `lend` of these in the process that they were made in."""
        return _Sent(self._number, room, samples)


@dataclass(frozen=True)
class _Sent:
    rooms: int
    room: int
    samples: int

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[int, int, int]]:
        return _received, (self.rooms, self.room, self.samples)


def _received(rooms: int, room: int, samples: int) -> Tensor:
    return _here[rooms].lend(room, samples)
