"""Build micro-batches from sample numbers: the work of one worker process.

A broken sample is reported, and its slot filled by a fixed rule (see `sampler.SampleStream.substitutes`).
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count
from math import prod
from mmap import mmap
from multiprocessing import parent_process
from threading import Thread, local
from typing import Any, TypeVar
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hive_scale.batch import Batch, Sample, collate
from hive_scale.data.dataset import Decoded, Read, SampleReader
from hive_scale.data.sampler import SampleStream
from hive_scale.data.tar_scan import SampleError
from hive_scale.exit_codes import TryAgain, is_worker_death

NONE = -1
_numbers = count()
_here: WeakValueDictionary[int, BufferPool] = WeakValueDictionary()  # pools of this process, or inherited at its fork


@dataclass(frozen=True)
class BufferLayout:
    """Layout of one sample within a batch: shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def over(self, memory: Tensor, samples: int) -> Tensor:
        """View the start of `memory`, flat bytes, as (samples, *shape)."""
        size = prod(self.shape)
        return memory.view(self.dtype).as_strided((samples, *self.shape), (size, *self.strides))

    def bytes(self, samples: int) -> int:
        """Bytes of `samples` samples."""
        return samples * prod(self.shape) * self.dtype.itemsize


class BufferPool:
    """`number` buffers in memory shared with processes that are forked later, each for `samples` samples.

    The main process acquires a slot per request; the worker writes pixels into it; the consumer gets a tensor view.
    The slot is free again when the last view is garbage-collected, so a batch in use is never overwritten.
    """

    def __init__(self, layout: BufferLayout, samples: int, number: int) -> None:
        self.layout = layout
        # anonymous maps take memory only when used, and none of /dev/shm, which is small in containers
        maps = (mmap(-1, layout.bytes(samples)) for _ in range(number))
        self._memory = [torch.frombuffer(one, dtype=torch.uint8) for one in maps]
        self._free = deque(range(number))
        self._number = next(_numbers)
        _here[self._number] = self

    def acquire(self) -> int:
        """Return the most recently freed slot, whose memory is likely still cached; NONE if none is free."""
        return self._free.pop() if self._free else NONE

    def write_view(self, slot: int, samples: int) -> Tensor:
        """View of a slot as (samples, *shape), for the process that fills it."""
        return self.layout.over(self._memory[slot], samples)

    def read_view(self, slot: int, samples: int) -> Tensor:
        """View of a slot as a tensor (samples, *shape); the slot is freed when the tensor's storage is."""
        array = self._memory[slot].numpy()[:]  # only the tensor's storage keeps this object alive
        finalize(array, self._free.append, slot).atexit = False
        return self.layout.over(torch.from_numpy(array), samples)

    def handle(self, slot: int, samples: int) -> Any:
        """Return an object that a worker can pickle; the main process unpickles it as `read_view(slot, samples)`."""
        return _Sent(self._number, slot, samples)


@dataclass(frozen=True)
class _Sent:
    pool: int
    slot: int
    samples: int

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[int, int, int]]:
        return _received, (self.pool, self.slot, self.samples)


def _received(pool: int, slot: int, samples: int) -> Tensor:
    return _here[pool].read_view(slot, samples)


Made = TypeVar("Made")
# True if the sender of a signal can be known. On macOS it cannot, so every SIGTERM is obeyed.
TELLS_SENDERS = hasattr(signal, "sigtimedwait")
POLL = 1.0  # seconds between checks that the main process is alive
Slots = list[tuple[int, int]]  # (stream position, sample) of one micro-batch
Request = tuple[Slots, int]  # with the buffer slot for its images


@dataclass(frozen=True)
class WorkerResult:
    """Result of a worker: a batch, or None if it could not be filled, and the samples that cannot be used.

    `lost` are (row, sample, image as uint8 (3, H, W)) for samples whose features could not be read. `error` is a
    failure of the machine or of a server. It is sent as a value because an exception raised in a worker arrives as a
    page of traceback.
    """

    batch: Batch | None
    bad: list[SampleError]
    lost: list[tuple[int, int, NDArray[np.uint8]]] = field(default_factory=list)
    error: Exception | None = None

    def pin_memory(self) -> WorkerResult:
        return replace(self, batch=self.batch and self.batch.pin())

    def __reduce__(self) -> tuple[Any, ...]:
        """Send small tensors through the pipe: torch would create a file for each, and pass it over a socket."""
        if self.batch is None:
            return WorkerResult, (None, self.bad, self.lost, self.error)
        fields = vars(self.batch)
        small = {name: fields[name].numpy() for name in ("has_image", "tokens", "target_rows", "target_ids")}
        return _arrived, (fields | small, self.bad, self.lost)


def _arrived(
    fields: dict[str, Any], bad: list[SampleError], lost: list[tuple[int, int, NDArray[np.uint8]]]
) -> WorkerResult:
    tensors = {name: torch.from_numpy(value) for name, value in fields.items() if isinstance(value, np.ndarray)}
    return WorkerResult(Batch(**fields | tensors), bad, lost)


class MicroBatchDataset(Dataset[WorkerResult]):
    """Micro-batches of up to `size` samples. Broken samples are substituted if `order` is given, else left out.

    `held` is the number of batches that the consumer keeps at a time. If it keeps more, further batches use fresh
    memory outside the pool.
    """

    def __init__(self, samples: SampleReader, order: SampleStream | None, size: int, held: int) -> None:
        self.samples = samples
        self.order = order
        config = samples.config
        number = held + 1 + 2 * config.workers  # torch prefetches two per worker
        self.pool = BufferPool(_layout(samples), max(1, size), number)
        self.threads, self._thread = config.decode_threads, local()
        # (process, sample) that each thread of each worker reads now; shared memory, so it outlives a dead worker
        rows = max(1, config.workers) * self.threads
        self.reading = np.frombuffer(mmap(-1, rows * 16), np.int64).reshape(rows, 2)

    def watch(self, loaded: Iterable[WorkerResult]) -> Iterator[WorkerResult]:
        """Iterate over `loaded`; if a worker dies (out of memory, a crashing decoder), raise TryAgain that names its
        sample.
        """
        try:
            yield from loaded
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
            dead = [(process, i) for process, i in self.reading.tolist() if process and str(process) in str(error)]
            where = " or ".join(f"{self.samples.index.key(i)} of {self.samples.index.shard(i)}" for _, i in dead)
            said = str(error).strip()
            raise TryAgain(f"a data worker died while reading {where} ({said})" if where else said) from None

    def requests(self, slots: Iterable[Slots]) -> Requests:
        """Pair each of `slots` with a buffer slot, which is acquired in the main process."""
        return Requests(slots, self.pool)

    def __getitem__(self, request: Request) -> WorkerResult:
        try:
            return self._loaded(*request)
        except (OSError, TryAgain) as error:
            return WorkerResult(None, [], error=error)

    def _loaded(self, slots: Slots, slot: int) -> WorkerResult:
        pixels = self._place(slot, max(1, len(slots)))
        over = self._pool.map if self.threads > 1 else map
        # read all before decoding any: alternating would evict the CPU caches at each image
        read = list(over(self._read, (i for _, i in slots)))
        filled = list(over(self._fill, slots, read, pixels))
        bad = [fault for _, faults in filled for fault in faults]
        decoded = [one for one, _ in filled if one is not None]
        if self.order is not None and len(decoded) < len(slots):
            # the caller raises: an error raised in a worker arrives as a page of traceback
            return WorkerResult(None, bad)
        lost = [(row, one.number, one.pixels.numpy()) for row, one in enumerate(decoded) if one.number >= 0]
        for row, _, _ in lost:  # the main process, which has the encoder, fills these rows
            decoded[row] = replace(decoded[row], pixels=pixels[row])
        tokenizer = self.samples.tokenizer
        samples = self.samples.finished(decoded)
        if not samples:
            samples = [Sample("", None, [tokenizer.start_id, tokenizer.eos_id], [False, False])]
        # the images are already in `pixels`; they move up if samples before them were left out
        batch = collate(samples, tokenizer.pad_id, self.samples.image_size, pixels[: len(samples)])
        if get_worker_info() and slot != NONE:
            batch = replace(batch, pixels=self.pool.handle(slot, len(samples)))
        return WorkerResult(batch, bad, lost)

    def _place(self, slot: int, samples: int) -> Tensor:
        if slot == NONE:
            layout = self.pool.layout
            return layout.over(torch.empty(layout.bytes(samples), dtype=torch.uint8), samples)
        return (self.pool.write_view if get_worker_info() else self.pool.read_view)(slot, samples)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Thread pool, created in the process that reads, never before a fork."""
        numbers = count()
        return ThreadPoolExecutor(self.threads, initializer=lambda: vars(self._thread).update(number=next(numbers)))

    def _fill(
        self, slot: tuple[int, int], read: Read | SampleError, pixels: Tensor
    ) -> tuple[Decoded | None, list[SampleError]]:
        """Decode the sample of a slot into `pixels`, or the first usable substitute; also return the faults met."""
        position, first = slot
        bad: list[SampleError] = []
        substitutes = self.order.substitutes(position) if self.order else ()
        for i, one in chain([(first, read)], ((i, self._read(i)) for i in substitutes)):
            found = one if isinstance(one, SampleError) else self._try(i, self.samples.decoded, one, pixels)
            if not isinstance(found, SampleError):
                is_lost = self.samples.features is not None and found.pixels.dtype == torch.uint8
                return (replace(found, number=i) if is_lost else found), bad
            bad.append(found)
        return None, bad

    def _read(self, i: int) -> Read | SampleError:
        return self._try(i, self.samples.read, i)

    def _try(self, i: int, do: Callable[..., Made], *arguments: Any) -> Made | SampleError:
        """Return `do(*arguments)` for sample i, or a SampleError if it raises ValueError; notes i as being read."""
        self._note(i)
        try:
            return do(*arguments)
        except ValueError as error:
            return SampleError(self.samples.index.shard(i), self.samples.index.key(i), str(error))

    def _note(self, sample: int) -> None:
        if worker := get_worker_info():
            thread = getattr(self._thread, "number", 0)
            self.reading[worker.id * self.threads + thread] = os.getpid(), sample


@dataclass(frozen=True)
class Requests:
    """Iterable of requests; can be iterated again if `slots` can."""

    slots: Iterable[Slots]
    pool: BufferPool

    def __iter__(self) -> Iterator[Request]:
        return ((one, self.pool.acquire()) for one in self.slots)


def _layout(samples: SampleReader) -> BufferLayout:
    """Layout of an image, uint8 (3, H, W) in channels-last memory format like decoded ones, or of its features."""
    if samples.features:
        depths, tokens, width = samples.features.shape
        return BufferLayout((depths, tokens, width), (tokens * width, width, 1), samples.features.dtype)
    size = samples.image_size
    return BufferLayout((3, size, size), (1, 3 * size, 3), torch.uint8)


def worker_options(number: int) -> dict[str, Any]:
    """DataLoader options for `number` workers: how they are started, and that they persist between passes.

    Workers are forked whatever Python's default is, which differs between releases and systems: only forked ones share
    `BufferPool` and have the main process as their parent.
    """
    if not number:
        return {}
    options = {"worker_init_fn": ignore_signals, "multiprocessing_context": "fork", "persistent_workers": True}
    return options | {"num_workers": number}


def ignore_signals(_: int) -> None:
    """Initialise a worker: ignore signals, which the main process handles by saving its state and ending the workers.

    Ctrl-C and Slurm's warnings reach every process of a job; a worker that died of one would abort the step and the
    checkpoint. SIGTERM is obeyed only from the main process. A worker whose main process is gone, perhaps killed,
    exits within a second or two, since it may hold an inherited GPU context or port.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if TELLS_SENDERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main = parent_process()
    assert main is not None
    assert main.pid is not None
    Thread(target=_await_end, args=(main.pid,), daemon=True).start()


def _await_end(main: int) -> None:
    while os.getppid() == main:
        if not TELLS_SENDERS:
            time.sleep(POLL)
        elif (told := signal.sigtimedwait({signal.SIGTERM}, POLL)) and told.si_pid == main:
            break
    os._exit(0)
