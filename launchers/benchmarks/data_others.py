"""Loaders for `benchmark.py data` with a format or an index of their own, installed only for the benchmark."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.data_peers import BATCH, GLOBAL, SHUFFLED, Peer, Raw, collated, once, sample

if TYPE_CHECKING:
    from hive_scale.batch import Batch


class Streaming(Peer):
    """MosaicML Streaming, in its own format."""

    name = "MosaicML Streaming"

    def prepare(self) -> None:
        from streaming import MDSWriter

        if not self.folder.exists():
            columns = {"key": "str", "jpg": "bytes", "txt": "bytes"}
            with MDSWriter(out=str(self.folder), columns=columns) as out:
                for one in once(self.tars):
                    out.write(dict(zip(columns, one, strict=True)))

    def _loader(self, workers: int, decode: bool, batch: int = BATCH) -> Any:
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        class Decoded(StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, at: Any) -> Any:
                one = super().__getitem__(at)
                raw = one["key"], one["jpg"], one["txt"]
                return sample(*raw) if decode else raw

        if "RANK" not in os.environ:
            clean_stale_shared_memory()
        images = Decoded(local=str(self.folder), shuffle=True, batch_size=batch, shuffle_seed=0)
        return StreamingDataLoader(
            images,
            batch_size=batch,
            num_workers=workers,
            # it counts what it brings by the first value of a mapping
            collate_fn=lambda samples: {
                "keys": [one.key if decode else one[0] for one in samples],
                "batch": collated(samples) if decode else samples,
            },
            drop_last=True,
        )

    def raw(self) -> Iterator[Raw]:
        return (one for batches in repeat(self._loader(0, decode=False)) for batch in batches for one in batch["batch"])

    def batches(self, workers: int) -> Iterator[Batch]:
        return (batch["batch"] for batches in repeat(self._loader(workers, decode=True)) for batch in batches)

    def resumed(self, position: int) -> Iterator[Raw]:
        loader = self._loader(0, decode=False)
        epoch, within = divmod(position, len(loader.dataset))
        loader.load_state_dict(loader.dataset.state_dict(0, True) | {"epoch": epoch, "sample_in_epoch": within})
        return (one for batch in loader for one in batch["batch"])

    def part(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        """Its ranks find each other through shared memory and the launcher's variables, so each is a process."""
        context = get_context("fork")
        found = [context.Queue() for _ in range(world)]
        ranks = [
            context.Process(target=self._rank, args=(queue, state, rank, world, steps), daemon=True)
            for rank, queue in enumerate(found)
        ]
        for process in ranks:
            process.start()
        said = [queue.get(timeout=300) for queue in found]
        for process in ranks:  # their threads wait for the epoch's end
            process.kill()
            process.join()
        return [key for keys, _ in said for key in keys], said[0][1]

    def _rank(self, found: Any, state: Any, rank: int, world: int, steps: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getppid() % 900 + world)}
        found.put(self.rank(state, world, steps))

    def rank(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        loader = self._loader(0, decode=False, batch=GLOBAL // world)
        if state:
            loader.load_state_dict(state)
        keys = [key for batch in islice(loader, steps) for key, *_ in batch["batch"]]
        return keys, loader.state_dict()


class Energon(Peer):
    """NVIDIA's Megatron-Energon, on the same tars; it keeps an index beside them."""

    name = "Energon"

    def prepare(self) -> None:
        import megatron.energon  # noqa: F401

        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            for tar in self.tars:
                shutil.copy(tar, self.folder)
            words = [
                "--non-interactive",
                "--split-ratio",
                "1,0,0",
                "--sample-type",
                "CrudeWebdataset",
                "--num-workers",
                "2",
            ]
            command = [str(Path(sys.executable).parent / "energon"), "prepare", str(self.folder), *words]
            subprocess.run(command, check=True, capture_output=True)

    def _set(self, decode: bool, batch: int | None, rank: int = 0, world: int = 1, workers: int = 0) -> Any:
        from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_train_dataset, stateless

        @stateless
        def cook(one: Any) -> Any:
            return one

        class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
            cookers = (Cooker(cook),)
            decoder = None

            @stateless
            def encode_sample(self, one: Any) -> Any:
                raw = one["__key__"].rpartition("/")[2], one["jpg"], one["txt"]
                return sample(*raw) if decode else raw

            def batch(self, samples: list[Any]) -> Any:
                return collated(samples) if decode else samples

        return get_train_dataset(
            self.folder,
            batch_size=batch,
            shuffle_buffer_size=SHUFFLED,
            max_samples_per_sequence=100,
            worker_config=WorkerConfig(rank=rank, world_size=world, num_workers=workers),
            task_encoder=Encoder(),
        )

    def raw(self) -> Iterator[Raw]:
        from megatron.energon import get_loader

        return chain.from_iterable(get_loader(self._set(False, BATCH)))

    def batches(self, workers: int) -> Iterator[Batch]:
        from megatron.energon import get_loader

        return iter(get_loader(self._set(True, BATCH, workers=workers)))

    def save(self, position: int) -> None:
        import torch
        from megatron.energon import get_savable_loader

        if not self._saved(position).exists():
            loader = get_savable_loader(self._set(False, BATCH))
            for _ in islice(loader, position // BATCH):
                pass
            torch.save(loader.save_state_rank(), self._saved(position))

    def resumed(self, position: int) -> Iterator[Raw]:
        import torch
        from megatron.energon import get_savable_loader

        loader = get_savable_loader(self._set(False, BATCH))
        path = self._saved(position)
        state = torch.load(path, weights_only=False)  # nosec B614 # our own file
        loader.restore_state_rank(state)
        return chain.from_iterable(loader)

    def _saved(self, position: int) -> Path:
        return self.folder.parent / f"energon-{position}.pt"

    def part(self, state: Any, world: int, steps: int) -> tuple[list[str], Any]:
        from megatron.energon import get_savable_loader

        keys, states = [], []
        for rank in range(world):
            loader = get_savable_loader(self._set(False, GLOBAL // world, rank, world))
            if state:
                loader.restore_state_rank(state[rank])
            keys += [key for batch in islice(loader, steps) for key, *_ in batch]
            states.append(loader.save_state_rank())
        return keys, states
