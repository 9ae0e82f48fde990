"""Whatever bytes a file holds, its reader raises only ValueError, quickly and in little memory.

Why: shards, configs, weights and run directories come from strangers, and a reader's traceback ends a run of days.
Each target feeds one reader random bytes and randomly changed sound files: any bytes, and for JSON and arrays any
values in any place, with recomputed checksums, so that the code behind them is reached. docs/fuzz.md has the table.

A target runs `FUZZ_SECONDS` (5 by default; CI: 60; `make fuzz`: 600), in rounds whose seeds count up from 0, so that
every fault found can be reproduced.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from safetensors.torch import save
from tars import image_bytes, pair, write_tar

from hive_scale import config as configs
from hive_scale import config_merge, presets
from hive_scale.checkpoint.format import Range, StepCheckpoint, audit, tensor_name, write_manifest
from hive_scale.checkpoint.io import file_hash
from hive_scale.checkpoint.weights import read_weights, write_weights
from hive_scale.config import Config, EngineConfig
from hive_scale.data.bad_samples import BadSampleLog, read_faults
from hive_scale.data.index import open_index
from hive_scale.data.messages import parse_messages
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import ShardReader
from hive_scale.data.tar_scan import SampleError, scan_shard
from hive_scale.data.transform import decode
from hive_scale.observability.metrics import MetricsTail, flat, numbers, read_metrics
from hive_scale.prepare.readers import table
from hive_scale.slurm.chain import Record
from hive_scale.slurm.job import read_attempts
from hive_scale.strict_json import loads

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
ROUND = 100  # examples with one seed
LONGEST = 20.0  # seconds of this process that one example may take
GROWTH = 1.5e9  # bytes that a target may take over what it began with
CACHE = ShardCache(10**9)
ROOT = Path(__file__).resolve().parents[1]
Check = Callable[[Path, Any], None]

# ------------------------------------------------------------------------------ what is fed

WORDS = st.sampled_from(
    ["", "step", "a<image>b", "\ud83d", "\x1b[31m", "../x", "a\nb", "x" * 300, "${oc.env:HOME}", "="]
)
NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("inf")])
LEAVES = st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | st.text(max_size=8) | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | WORDS, inner, max_size=3)
)
DEEP = st.sampled_from([b"[", b'{"a":', b"[[1],", b"{a: ", b"- "]).flatmap(
    lambda one: st.integers(1, 3000).map(lambda count: one * count)
)
TOKENS = st.sampled_from(
    [
        *(
            b"\0",
            b"\xff",
            b"\xed\xa0\xbd",
            b"\n",
            b'"',
            b"{",
            b"}",
            b"[",
            b"]",
            b":",
            b",",
            b"\\ud83d",
            b"\\u0000",
            b"-1",
        ),
        *(b"1e999", b"NaN", b"9" * 5000, b"&a", b"*a", b"!!int x", b"!!binary", b"? ", b"<<: ", b"ustar", b"0" * 11),
        *(b"\x80" + b"\xff" * 11, bytes(512), b"\xff\xda", b"IHDR", b"\x7f\xff\xff\xff", b"\xff" * 8),
    ]
)


@st.composite
def changed(draw: st.DrawFn, sound: list[bytes]) -> bytes:
    """One of `sound` with up to four pieces replaced, left out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.sampled_from([0, 0, 1, 1, 4, 8, 60, 512]))
        piece = bytes(content[at : at + length])
        content[at : at + length] = draw(st.binary(max_size=16) | TOKENS | DEEP | st.just(2 * piece))
    return bytes(content)


def raw(sound: list[bytes]) -> st.SearchStrategy[bytes]:
    return changed(sound) | changed(sound) | changed(sound) | st.binary(max_size=200) | DEEP


@st.composite
def grafted(draw: st.DrawFn, sound: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """`sound`, plain data, with other values, keys or nothing in up to three places."""
    root = [deepcopy(sound)]
    for _ in range(draw(st.integers(1, 3))):
        place: Any = root
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
                what = draw(st.integers(0, 5))
                if what == 0 and place is not root:
                    del place[key]
                elif what == 1 and isinstance(place, dict):
                    place[draw(st.text(max_size=4) | WORDS)] = place.pop(key)
                else:
                    place[key] = draw(values)
                break
            place = place[key]
    return root[0]


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: json.dumps(value).encode())


# ------------------------------------------------------------------------------ how it is run


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """What readers leave out is said, thousands of times."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def fuzz(folder: Path, contents: st.SearchStrategy[Any], check: Check) -> None:
    """Give `check` examples of `contents` for `SECONDS`; it is to raise nothing, but may raise ValueError."""
    count, worst, began, before = 0, 0.0, time.monotonic(), peak()

    def one(content: Any) -> None:
        nonlocal count, worst
        start, count = time.process_time(), count + 1
        with suppress(ValueError):
            check(folder, content)
        worst = max(worst, time.process_time() - start)
        assert worst < LONGEST, "it takes too long"

    number = 0
    while number == 0 or time.monotonic() - began < SECONDS:
        wanted = hypothesis.settings(
            max_examples=ROUND if number else 30,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        try:
            hypothesis.seed(number)(wanted(hypothesis.given(contents)(one)))()
        except FlakyFailure:
            assert worst < LONGEST
            raise
        number += 1
    print(f"{count} examples, the slowest {worst:.2f} s, {(peak() - before) / 1e6:.0f} MB more")
    assert peak() - before < GROWTH


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------ the targets


def tars() -> list[bytes]:
    """Small ones of each format, with long names, links, devices, sparse members and names that lead elsewhere."""
    made = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            for name, content in (("a.png", image_bytes(4, 4, format="PNG")), ("a.txt", b"text"), ("../b.txt", b"t")):
                member = tarfile.TarInfo(name if format == 0 else name.replace("a.", "a" * 120 + "."))
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
            kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)
            for number, kind in enumerate(kinds):
                member = tarfile.TarInfo(f"/c{number}.png")
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
        made.append(buffer.getvalue())
    return made


def scan(folder: Path, content: bytes) -> None:
    path = folder / "a.tar"
    path.write_bytes(content)
    found = scan_shard(str(path), CACHE)
    for start, length in found.members.reshape(-1, 2).tolist():
        assert 0 <= start <= start + length <= len(content)
    "".join([*found.keys, *(fault.describe() for fault in found.faults)]).encode("utf-8")


def test_a_tar(tmp_path: Path) -> None:
    fuzz(tmp_path, raw(tars()), scan)


@pytest.fixture
def shard(tmp_path: Path) -> str:
    return write_tar(tmp_path / "set" / "b.tar", [(f"k{i}", pair(i)) for i in range(3)])


def test_an_index(tmp_path: Path, shard: str) -> None:
    sound = open_index([shard], CACHE)
    arrays = {name: array.copy() for name, array in sound.arrays.items()}
    written, place = sound.path.read_bytes(), sound.path
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])

    def check(_: Path, content: Any) -> None:
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            place.write_bytes(checksummed(header, arrays, content))
        index = open_index([shard], CACHE)
        reader = ShardReader(index.shards, index.stamps, CACHE)
        try:
            for i in range(len(index)):
                for member in index.members[i].tolist():
                    with suppress(ValueError):
                        reader.read(index.shard_of(i), *member)
                with suppress(ValueError):
                    index.key(i).encode()
        finally:
            reader.close()

    numbers = st.sampled_from([-1, 0, 1, 2, 10**6, 2**31 - 1, 2**62, -(2**63)])
    edits = st.lists(st.tuples(st.sampled_from(sorted(arrays)), st.integers(0, 200), numbers), min_size=1, max_size=3)
    tables = grafted({name: entry for name, entry in header.items() if name != "__metadata__"})
    faults = grafted([{"shard": shard, "key": "k", "reason": "broken"}]).map(lambda found: (found,))
    fuzz(tmp_path, raw([written]) | edits | tables.filter(lambda table: isinstance(table, dict)) | faults, check)


def checksummed(header: dict[str, Any], arrays: dict[str, Any], change: Any) -> bytes:
    """An index with `change`d arrays, another table of arrays or other faults, under a checksum that is right."""
    from hive_scale.data.index import _checksum, _seal  # what a stranger would compute, too

    changed = {name: array.copy() for name, array in arrays.items()}
    table = (
        change if isinstance(change, dict) else {key: entry for key, entry in header.items() if key != "__metadata__"}
    )
    for name, at, value in change if isinstance(change, list) else ():
        flat = changed[name].reshape(-1)
        flat[at % max(1, len(flat))] = np.array(value).astype(flat.dtype)
    metadata = header["__metadata__"] | {"checksum": json.dumps(_checksum(changed))}
    metadata |= {"faults": json.dumps(change[0])} if isinstance(change, tuple) else {}
    metadata["seal"] = json.dumps(_seal({name: json.loads(value) for name, value in metadata.items()}))
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    kept = [name for name in header if name != "__metadata__"]
    ordered = sorted(kept, key=lambda name: header[name]["data_offsets"][0])
    return len(text).to_bytes(8, "little") + text + b"".join(changed[name].tobytes() for name in ordered)


CONVERSATION = {
    "id": 1,
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
}


def test_a_record_and_its_conversation(tmp_path: Path) -> None:
    def check(_: Path, content: bytes) -> None:
        record = loads(content, 10**6)
        if isinstance(record, dict):
            for turn in parse_messages(record):
                turn["content"].encode()

    fuzz(tmp_path, raw([json.dumps(CONVERSATION).encode()]) | as_json(grafted(CONVERSATION)), check)


def test_tables_of_records(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    rows = [b'image,caption\na.jpg,text\na.jpg,"two\nlines"\n', json.dumps([CONVERSATION] * 2).encode()]
    rows.append(b"\n".join([json.dumps(CONVERSATION).encode()] * 2))

    def check(folder: Path, content: bytes) -> None:
        for ending in ("json", "jsonl", "csv", "tsv"):
            path = folder / f"t.{ending}"
            path.write_bytes(content)
            with suppress(ValueError):
                for item in table(path, folder).items():
                    json.dumps(item.record)

    fuzz(tmp_path, raw(rows) | as_json(st.lists(grafted(CONVERSATION), max_size=2)), check)


def test_an_image(tmp_path: Path) -> None:
    kinds = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")]
    sound = [image_bytes(9, 7, format=format, mode=mode) for format, mode in kinds]

    def check(_: Path, content: bytes) -> None:
        assert decode(content, max_pixels=10**6).numel() <= 3 * 10**6

    fuzz(tmp_path, raw(sound), check)


def test_a_checkpoints_manifest(tmp_path: Path) -> None:
    step = tmp_path / "step_00000003"
    step.mkdir()
    stored = Range("master/a", 0, 6)
    (step / "rank_00000.safetensors").write_bytes(save({tensor_name(stored): torch.arange(6.0)}))
    size = (step / "rank_00000.safetensors").stat().st_size
    hash = file_hash(step / "rank_00000.safetensors")
    files = {"rank_00000.safetensors": {"bytes": size, "xxh3_128": hash, "ranges": [list(stored)]}}
    content = {"step": 3, "shapes": {"master/a": [2, 3]}, "files": files, "state": {"step": 3, "losses": [1.0]}}
    manifest = step / "manifest.json"
    write_manifest(step, 3, {"master/a": (2, 3)}, files, content["state"])
    written = manifest.read_bytes()

    def check(_: Path, content: Any) -> None:
        manifest.unlink(missing_ok=True)
        if isinstance(content, bytes):
            manifest.write_bytes(content)
        else:
            with suppress(TypeError, KeyError):  # what cannot be written is none
                write_manifest(step, *(content[key] for key in ("step", "shapes", "files", "state")))
        audit(step)
        snapshot = StepCheckpoint(step)
        for name in snapshot.masters():
            snapshot.master(name)

    fuzz(tmp_path, raw([written]) | grafted(content), check)


LINE = {
    **{"schema": 1, "step": 3, "samples": 9, "tokens": 30, "loss": 1.5, "grad_norm": 0.5, "lr": {"all": 1e-3}},
    **{"seconds": 0.1, "time": 1.7e9, "restarts": 0, "spent": {"steps": 1.0}, "lost_steps": 0, "gates": {"0": 0.1}},
}


def test_metrics(tmp_path: Path) -> None:
    def check(folder: Path, content: bytes) -> None:
        path = folder / "metrics.jsonl"
        path.write_bytes(content)
        for line in [*MetricsTail(path).lines(), *read_metrics(path)]:
            flat(line)
            numbers(line)

    fuzz(tmp_path, raw([2 * (json.dumps(LINE).encode() + b"\n")]) | as_json(grafted(LINE)), check)


def test_faults_that_were_noted(tmp_path: Path) -> None:
    line = {"shard": "a.tar", "key": "k", "reason": "broken"}

    def check(folder: Path, content: bytes) -> None:
        path = folder / "bad_samples.jsonl"
        path.write_bytes(content)
        "".join(fault.describe() for fault in read_faults(path)).encode()
        BadSampleLog(path, 1).add([SampleError("b.tar", "l", "cut")])

    fuzz(tmp_path, raw([json.dumps(line).encode() + b"\n"]) | as_json(grafted(line)), check)


def test_a_config(tmp_path: Path) -> None:
    saved = configs.to_yaml(presets.load("debug", None, []))
    settings = {"preset": "debug", "model": {"fusion": "concat"}, "data": {"train": ["a.tar"], "tokenizer": {}}}
    joint = {"max_steps": 3, "betas": [0.9, 0.95], "data": {"format": "caption"}, "groups": {}}
    settings |= {"stages": {"joint": joint}}
    brief = "preset: debug\nmodel:\n  fusion: concat\nstages: &a\n  joint: {max_steps: 3, data: {format: caption}}\n"

    def check(folder: Path, content: bytes) -> None:
        file = folder / "config.yaml"
        file.write_bytes(content)
        with suppress(ValueError):
            presets.load(None, file, [])
        configs.load(file)

    parts = [part.encode() for part in saved.split("\nstages:")]
    fuzz(tmp_path, raw([brief.encode(), parts[0]]) | as_json(grafted(settings)), check)


def test_words_of_a_config(tmp_path: Path) -> None:
    words = [
        b"stages.joint.max_steps=3",
        b"data.train=[a/{0..9}.tar, '2 x b.tar']",
        b"model.vision.config={a: 1}",
        b"name=x",
    ]

    def check(_: Path, content: bytes) -> None:
        config_merge.resolve(Config(), [content.decode(errors="replace")])

    fuzz(tmp_path, raw(words), check)


def test_a_deepspeed_json(tmp_path: Path) -> None:
    from hive_scale.engine import deepspeed_config

    shipped = [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    stage = presets.load("debug", None, []).stages["joint"]
    more = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}, "scheduler": {"params": {}}}
    offload = {"offload_param": {"device": "nvme", "nvme_path": "/x"}, "offload_optimizer": {"device": "cpu"}}
    zero = {"stage": 3, "cpu_offload": False, "max_live_parameters": 5e8, **offload}
    full = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, "comms_logger": {"enabled": False}, **more}

    def check(folder: Path, content: bytes) -> None:
        path = folder / "ds.json"
        path.write_bytes(content)
        deepspeed_config.check(path, {"joint": (stage, 1)}, EngineConfig())

    fuzz(tmp_path, raw(shipped) | as_json(grafted(full)), check)


def test_weights(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "a.safetensors", {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2)})
    written = path.read_bytes()
    length = int.from_bytes(written[:8], "little")
    header, data = json.loads(written[8 : 8 + length]), written[8 + length :]

    def with_header(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data

    def check(_: Path, content: bytes) -> None:
        path.write_bytes(content)
        weights = read_weights(path)
        for name in weights:
            assert weights[name].numel() <= 10
        weights.sources()

    lengths = st.sampled_from([0, 1, length - 1, 2**20, 2**40, 2**63, 2**64 - 1])
    lying = lengths.map(lambda number: number.to_bytes(8, "little") + written[8:])
    fuzz(tmp_path, raw([written]) | grafted(header).map(with_header) | lying, check)


def test_the_index_of_weights(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(6), "y": torch.ones(6)}
    index = write_weights(tmp_path / "a.safetensors", tensors, max_shard_bytes=24)
    written = index.read_bytes()

    def check(_: Path, content: bytes) -> None:
        index.write_bytes(content)
        with suppress(FileNotFoundError):
            read_weights(index)

    fuzz(tmp_path, raw([written]) | as_json(grafted(json.loads(written))), check)


def test_attempts_and_the_record_of_a_chain(tmp_path: Path) -> None:
    attempt = {"event": "begin", "stage": "joint", "job": "7", "time": "2026-01-01T00:00:00+00:00", "at": "joint:3"}
    then = {"probe": {"launcher": "probe", "after": "joint", "words": ["runs/a", "--output", "runs/a/probes"]}}
    chain = {"cwd": "/", "code": {}, "cluster": "slurm", "jobs": {"joint": "7"}, "steps": {"joint": 3}, "then": then}
    chain |= {"resources": {"joint": {"partition": "gpu", "nodes": 2}}}
    (tmp_path / "slurm").mkdir()

    def check(folder: Path, content: bytes) -> None:
        for name in ("attempts.jsonl", "chain.json"):
            (folder / "slurm" / name).write_bytes(content)
        read_attempts(folder)
        Record.read(folder)

    sound = [json.dumps(one).encode() for one in (attempt, chain)]
    fuzz(tmp_path, raw(sound) | as_json(grafted(attempt)) | as_json(grafted(chain)), check)
