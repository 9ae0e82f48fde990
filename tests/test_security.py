"""Input from strangers runs no code and exhausts no memory, and a run writes no secret to any file."""

from __future__ import annotations

import html
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
import tiny
import torch
import wandb_server

from hive_scale import credentials, presets
from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.config import Config, PartConfig
from hive_scale.data.shards import SAMPLE_DIR
from hive_scale.distributed import World, session
from hive_scale.pipeline import run_pipeline
from hive_scale.preflight import open_data

ROOT = Path(__file__).resolve().parents[1]
SECRETS = {
    "WANDB_API_KEY": "0123secretwandb",
    "HF_TOKEN": "hf_0123secrethub",
    "AWS_SECRET_ACCESS_KEY": "0123secretaws",
    "SOME_PASSWORD": "0123secretpassword",
}


class Bomb:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def small(output: Path) -> Config:
    run = presets.load("debug", None, [f"output={output}", "eval_interval=0"])
    vision, language = PartConfig(config=tiny.SIGLIP), PartConfig(config=tiny.language(vocab_size=259))
    stages = {name: replace(stage, max_steps=2, global_batch=4) for name, stage in run.stages.items()}
    return replace(
        run, model=replace(run.model, vision=vision, language=language), stages=stages, blank_image_control=False
    )


def test_a_run_writes_down_no_secret(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = small(tmp_path / "run")
    run_pipeline(config, world, until="language")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_a_pickle_among_weights_is_not_run(tmp_path: Path) -> None:
    from hive_scale.model import build

    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.language(vocab_size=259)))
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    config = replace(small(tmp_path).model, language=PartConfig(path=str(folder)))
    with pytest.raises(Exception, match=r"(?i)pickle|safetensors|weights"):
        build.init_model(config, seed=0)
    assert not marker.exists()


def test_a_pickle_in_a_checkpoints_place_is_not_run(tmp_path: Path, world: World) -> None:
    config, marker = small(tmp_path / "run"), tmp_path / "ran"
    run_pipeline(config, world, until="projector")
    stage_dir = tmp_path / "run" / "projector"
    (newest,) = stage_dir.glob("step_*")
    for path in newest.iterdir():
        path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound"):
        Checkpointer(stage_dir, world).latest()
    (stage_dir / "weights.safetensors").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match=r"cannot be read|not what was written|weights.safetensors"):
        run_pipeline(config, world, until="language")
    assert not marker.exists()


def png(width: int, height: int) -> bytes:
    """A black image of any size in few bytes, all of whose rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width // 8 + 1)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_of_600_megapixels_and_a_pickle_in_a_shard_are_left_out(tmp_path: Path) -> None:
    marker, shard = tmp_path / "ran", tmp_path / "shard.tar"
    large = png(30_000, 20_000)
    assert len(large) < 1_000_000
    with tarfile.open(shard, "w") as tar:
        for key, image in (("large", large), ("good", png(64, 64))):
            for name, content in ((f"{key}.png", image), (f"{key}.txt", b"an image")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
            bomb = pickle.dumps(Bomb(marker))
            for name in (f"{key}.pickle", f"{key}.pyd", f"{key}.pth"):
                member = tarfile.TarInfo(name)
                member.size = len(bomb)
                tar.addfile(member, BytesIO(bomb))
    config = small(tmp_path / "run")
    data = open_data(replace(config, data=replace(config.data, train=[str(shard)], max_bad_share=0.5)))
    keys = {data.train.index.key(i): i for i in range(len(data.train.index))}
    assert data.train.sample(keys["good"]).pixels is not None
    assert "large" not in keys
    (fault,) = data.train.index.faults
    assert fault.key == "large"
    assert "DecompressionBombError" in fault.reason  # Pillow has a limit of its own, above which nothing is opened
    assert not marker.exists()


def test_a_run_directory_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "launchers/pretrain.py", f"output={tmp_path / 'file' / 'run'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# -- planted in every input, looked for in every output -------------------------------------------------------

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "HF_TOKEN": "hf_plantedhubtokenplantedhubtoken",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "SHARD_PATH": "planted-path",
    "SHARD_PASSWORD": "planted-password",
}
TYPED = {"me": "planted-typed", "sig": "planted%2Bsignature"}  # what the user types into a URL
LOGINS = {b64encode(f"me:{password}".encode()).decode() for password in ("planted-password", "planted-typed")}
ONE_STAGE = """
name: planted
output: {output}
model:
  vision: {{config: {vision}}}
  language: {{config: {language}}}
data:
  train: ['{typed}/train.tar?sig={sig}&se=2030-01-01', '{referred}/more.tar']
  heldout: ['{referred}/heldout.tar']
  max_bad_samples: 9
stages: {{only: {{max_steps: 2, global_batch: 4, groups: {{all: {{parameters: ['*'], lr: 1e-3}}}}}}}}
engine: {{precision: fp32}}
log: {{wandb: offline, tensorboard: true}}
"""


@pytest.fixture
def guarded() -> Iterator[str]:
    """The address of a server whose files want a password, and one of them a signature as well."""
    shards = {"train.tar": "train-00000.tar", "heldout.tar": "heldout-00000.tar"}
    with served(shards) as address:
        yield address


@contextmanager
def served(shards: dict[str, str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            name = path.rpartition("/")[2]
            login = (self.headers["Authorization"] or "").removeprefix("Basic ")
            signed = path == "/planted-path/" + name or f"sig={TYPED['sig']}" in query
            if login not in LOGINS or not signed:
                self.send_error(401)
                return
            content = damaged() if name == "more.tar" else (SAMPLE_DIR / shards[name]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def damaged() -> bytes:
    """A tar with one sample that is none."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("a.png", png(64, 64)), ("a.txt", b"black"), ("b.txt", b"alone")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return buffer.getvalue()


def test_no_planted_secret_is_in_any_output(
    tmp_path: Path, guarded: str, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submitted run of one stage, by a local job, and everything that is made of it."""
    for name, value in {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "TMPDIR": "tmp"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
        (tmp_path / value).mkdir()
    for name, value in (PLANTED | {"no_proxy": "*", "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run, file, out = tmp_path / "out" / "run", tmp_path / "mine.yaml", tmp_path / "out" / "told.txt"
    out.parent.mkdir()
    content = ONE_STAGE.format(
        output=run,
        vision=json.dumps(tiny.SIGLIP),
        language=json.dumps(tiny.language(vocab_size=259)),
        typed=f"http://me:{TYPED['me']}@{guarded}",
        referred=f"http://me:${{oc.env:SHARD_PASSWORD}}@{guarded}/${{oc.env:SHARD_PATH}}",
        sig=TYPED["sig"],
    )
    file.write_text(content)
    submit = ["submit_pipeline", "--config", str(file), "--cluster", "local"]
    with out.open("a") as told:
        told.write(command("pretrain", "--config", str(file), "--print_config"))
        told.write(command(*submit, "--dry_run"))
        line = [sys.executable, "-m", "hive_scale", *submit]
        job = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        told.write(job.stdout + job.stderr)
        assert job.returncode == 0, job.stderr
        for kind in ("hive", "encoder"):
            told.write(command("export", kind, str(run)))
        told.write(command("visualize", "report", str(run)))
        with wandb_server.serving() as server:
            monkeypatch.setenv("WANDB_BASE_URL", server.url)
            # in a process of its own: wandb's threads would come up again in each fork of this one
            words = [sys.executable, "-m", "hive_scale", "visualize", "sync", str(run)]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
            told.write(done.stdout + done.stderr)
            assert server.asked
            told.write("\n".join(server.asked))
    assert "read environment variables: SHARD_PASSWORD, SHARD_PATH" in out.read_text()
    kept = credentials.store(run)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert TYPED["me"] in kept.read_text()
    assert not [name for name, value in PLANTED.items() if value in kept.read_text()]
    assert leaks(tmp_path, beside=(file, kept)) == []
    for made in ("bad_samples.jsonl", "config.yaml", "slurm/config.yaml", "slurm/chain.json", "report.html"):
        assert (run / made).stat().st_size, made
    assert f"http://{guarded}/$SHARD_PATH/more.tar" in (run / "bad_samples.jsonl").read_text()
    card = html.unescape((run / "export/hive/README.md").read_text()).replace("\\", "")
    assert f"http://{guarded}/train.tar, http://{guarded}/$SHARD_PATH/more.tar" in card
    assert [*run.rglob("*_submitted.pkl"), *run.rglob("run-*.wandb"), *run.rglob("events.*")]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in this process, which knows the secrets; what it said."""
    credentials.forget()

    def run(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        code = import_module(f"hive_scale.commands.{name}").main()
        said = "".join(capfd.readouterr())
        assert code == 0, said
        return said

    return run


def leaks(folder: Path, beside: Sequence[Path]) -> list[str]:
    """Which of the planted secrets, in clear or as it goes over a wire, is in which file, or in its name."""
    secrets = [*PLANTED.values(), *TYPED.values(), *(unquote(value) for value in TYPED.values()), *LOGINS]
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() and path not in beside else b""
        content = content + b"".join(texts_in(content)) + str(path.relative_to(folder)).encode()
        found += [f"{secret} in {path}" for secret in secrets if secret.encode() in content]
    return found


def texts_in(content: bytes) -> Iterator[bytes]:
    """What is packed in a file: of archives each member."""
    if zipfile.is_zipfile(BytesIO(content)):
        with zipfile.ZipFile(BytesIO(content)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def test_a_run_goes_on_with_a_new_signature(
    tmp_path: Path, guarded: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for day in ("monday", "tuesday"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / day))  # purged since
        monkeypatch.setitem(TYPED, "sig", day)
        config = small(tmp_path / "run")
        url = f"http://me:planted-typed@{guarded}/train.tar?sig={day}&se={day}"
        config = replace(config, data=replace(config.data, train=[url]))
        run_pipeline(config, world, until={"monday": "projector", "tuesday": "language"}[day])
    assert (tmp_path / "run" / "language" / "weights.safetensors").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "wednesday"))
    monkeypatch.setitem(TYPED, "sig", "wednesday")
    with pytest.raises(OSError, match=r"train\.tar cannot be fetched .*the command gives them each time"):
        run_pipeline(config, world)
