"""Published files are read as they were written, or not at all. Why: disks flip bits, copies end early."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import small, some_pairs  # noqa: F401  (the fixture is one of this module, too)

from hive_scale import config as configs
from hive_scale.checkpoint.run_reader import Run, verify_path
from hive_scale.checkpoint.weights import read_weights, write_weights
from hive_scale.checksums import SUMS, CorruptFile, check, listing, read_sums, write_sums
from hive_scale.commands.export import main as export
from hive_scale.config import Config, PartConfig, TokenizerConfig
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import World, session
from hive_scale.export import export_run, from_pretrained
from hive_scale.model.build import open_encoder, vision_config
from hive_scale.model.llava import StockLlava
from hive_scale.pipeline import initial_model, run_pipeline
from hive_scale.run import find_encoder, open_hive
from hive_scale.rundir import BEGAN, MARKER

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("projector", "language")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


def recipe(output: Path) -> Config:
    config = small(output, fusion="concat", steps=2, save_interval=1)
    return replace(config, stages={name: config.stages[name] for name in STAGES})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, some_pairs: None, world: World) -> Path:  # noqa: F811
    """A run with everything that can be exported of it."""
    config = recipe(tmp_path_factory.mktemp("finished") / "run")
    run_pipeline(config, world)
    for kind in ("encoder", "llm", "hive", "llava"):
        export_run(kind, config.run_dir, config.run_dir / "export" / kind)
    return config.run_dir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage, whose config names it."""
    shutil.copytree(finished, tmp_path / "run")
    with listing(tmp_path / "run" / "config.yaml"):
        configs.save(recipe(tmp_path / "run"), tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], None], ...] = (flip, empty, Path.unlink)
GROWING = {"metrics.jsonl", "memory.txt", ".lock", "bad_samples.jsonl"}  # what a run writes to the end, or to look at


def damaged(run: Path) -> dict[str, str]:
    return {str(path.relative_to(run)): damage for path, damage, _ in verify_path(run) if damage}


def test_verify_names_the_damage_of_every_file_that_a_run_has_published(run: Path) -> None:
    assert damaged(run) == {}
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in GROWING]
    files = [path for path in files if path.suffix != ".lock"]  # of an export, beside it; empty
    assert {"config.yaml", "data.json", "preprocessor_config.json", "tokenizer.json", SUMS} <= {p.name for p in files}
    for number, path in enumerate(files):
        damage = DAMAGES[number % 3]
        if path.name == SUMS and damage is Path.unlink:  # which makes it a directory of an older version's
            damage = empty
        whole = path.read_bytes()
        damage(path)
        found = damaged(run)
        path.write_bytes(whole)
        assert any(path.is_relative_to(run / place) or path.name in text for place, text in found.items()), path
    assert damaged(run) == {}


def test_verify_names_what_is_missing_and_what_was_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "language" / "encoder" / "model-00001-of-00002.safetensors").touch()
    (run / "projector" / "encoder" / "preprocessor_config.json").unlink()
    (run / "projector" / "step_00000002" / "more").touch()
    shutil.rmtree(run / "export" / "llm" / "probes", ignore_errors=True)
    (run / "export" / "llm" / "probes").mkdir()  # what our own tools put beside a model is no damage
    (run / "export" / "llm" / "probes" / "cifar10.json").touch()
    monkeypatch.setattr("sys.argv", ["export.py", "verify", str(run)])
    assert export() == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
    assert len(said) == 3
    assert "files that were not written with it: 'more'" in said[0]
    assert "projector/encoder: preprocessor_config.json is missing" in said[1]
    assert "language/encoder: files that were not written with it: 'model-00001-of-00002.safetensors'" in said[2]
    monkeypatch.setattr("sys.argv", ["export.py", "verify", str(run / "export" / "hive")])
    assert export() == 0


def test_a_user_can_check_a_published_directory_without_us(run: Path) -> None:
    command = ["sha256sum", "--check", "--strict", SUMS]
    for directory in (run, run / "language" / "encoder", run / "export" / "llava"):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        listed = {line.partition(":")[0] for line in done.stdout.splitlines()}
        if directory != run:
            assert listed == {path.name for path in directory.iterdir()} - {SUMS}
    flip(run / "export" / "llava" / "config.json")
    assert subprocess.run(command, cwd=run / "export" / "llava", capture_output=True, check=False).returncode == 1


def begun_with(path: Path) -> None:
    vision = PartConfig(path=str(path))
    initial_model(replace(small(path).model, vision=vision), seed=0)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "probe and fine-tuning, of a run": ("language/encoder", lambda path: find_encoder(path.parents[1])),
    "probe and fine-tuning, of a directory": ("export/encoder", find_encoder),
    "an encoder opened": ("export/encoder", open_encoder),
    "a part to begin with": ("export/encoder", begun_with),
    "a config": ("export/encoder", lambda path: vision_config(PartConfig(path=str(path)))),
    "a tokenizer": ("export/llm", lambda path: open_tokenizer(TokenizerConfig(path=str(path)))),
    "evaluate": ("export/llava", lambda path: StockLlava(path, torch.device("cpu"))),
    "from_pretrained": ("export/hive", from_pretrained),
}


@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_published_directory_checks_it(run: Path, reader: str) -> None:
    place, read = READERS[reader]
    directory = run / place
    read(directory)
    names = [name for name in read_sums(directory) if name != "README.md"]
    if reader in ("a config", "a tokenizer"):  # which leave weights to who reads those
        names.remove("model.safetensors")
    for number, name in enumerate(names):
        whole = (directory / name).read_bytes()
        DAMAGES[number % 3](directory / name)
        with pytest.raises(ValueError, match=r"checksum|bytes instead|is missing|cannot be read"):
            read(directory)
        (directory / name).write_bytes(whole)
    read(directory)
    (directory / SUMS).unlink()  # others', or an older version's: read as it is
    read(directory)


def test_what_an_older_version_left_is_read_and_told_apart(
    run: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*run.rglob(SUMS), *run.rglob(BEGAN), run / MARKER):
        path.unlink()
    (run / "data.json").write_text(json.dumps(json.loads((run / "data.json").read_text())))
    run_pipeline(recipe(run), world)
    find_encoder(run)
    open_hive(run)
    monkeypatch.setattr("sys.argv", ["export.py", "verify", str(run)])
    assert export() == 0
    lines = capsys.readouterr().out.splitlines()
    exports = [f"export/{kind}" for kind in ("encoder", "hive", "llava", "llm")]
    unlisted = [line.split()[1].rstrip(":") for line in lines if "no checksums" in line]
    assert unlisted == [
        str(run / name) for name in ("config.yaml", "data.json", *(f"{s}/encoder" for s in STAGES), *exports)
    ]
    empty(run / "language" / "encoder" / "model.safetensors")
    assert export() == 1


def test_a_run_whose_own_files_are_damaged_is_refused_by_name(run: Path, world: World) -> None:
    whole = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(whole.replace("encoder_layer_ratio: 0.5", "encoder_layer_ratio: 0.9"))
    for read in (Run, find_encoder, open_hive):
        with pytest.raises(
            CorruptFile, match=r"config.yaml does not match its checksum: .* if you changed it yourself"
        ):
            read(run)
    with pytest.raises(ValueError, match=r"holds another run \(other model.encoder_layer_ratio\)"):
        run_pipeline(recipe(run), world)
    (run / "config.yaml").write_text(whole)
    shutil.rmtree(run / "language")
    for damage in (empty, lambda path: path.write_text("[1]")):
        damage(run / "data.json")
        with pytest.raises(ValueError, match=r"data.json .* restore it, or remove it"):
            run_pipeline(recipe(run), world)
        (run / SUMS).unlink(missing_ok=True)  # the second time it is an older version's
    (run / "data.json").unlink()
    run_pipeline(recipe(run), world)
    assert damaged(run) == {}


def test_an_export_replaces_nothing(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "a disk that is away")
    with pytest.raises(ValueError, match="exists: give another --output"):
        export_run("encoder", run, out)
    assert out.is_symlink()
    out.unlink()

    def meanwhile(*arguments: object) -> str:
        out.mkdir()
        (out / "thesis").touch()
        return "card"

    monkeypatch.setattr("hive_scale.export.card", meanwhile)
    with pytest.raises(OSError, match="not empty"):
        export_run("encoder", run, out)
    assert [path.name for path in out.iterdir()] == ["thesis"]


def test_verify_looks_into_the_runs_in_a_run(run: Path) -> None:
    inner = Path(shutil.copytree(run, run.parent / "copy"))
    flip(inner / "data.json")
    for name in ("blank", "vlm"):
        shutil.copytree(inner, run / name)
    assert damaged(run).keys() == {"blank/data.json", "vlm/data.json"}


def test_empty_final_weights_end_a_finished_run_with_a_remedy_that_works(run: Path, world: World) -> None:
    weights, metrics = run / "language" / "weights.safetensors", run / "language" / "metrics.jsonl"
    whole, steps = weights.read_bytes(), metrics.read_bytes()
    empty(weights)
    command = [sys.executable, "launchers/pretrain.py", "--config", str(run / "config.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {weights} cannot be read")
    remedy = "remove weights.safetensors, and the command that trained the run makes it again from the stage's last"
    assert remedy in done.stderr
    assert "step_00000002" in done.stderr
    weights.unlink()
    run_pipeline(recipe(run), world)
    assert weights.read_bytes() == whole
    assert metrics.read_bytes() == steps, "no step was trained again"


def test_a_flipped_bit_of_a_finished_runs_result_ends_its_command(run: Path, world: World) -> None:
    encoder = run / "language" / "encoder"
    flip(encoder / "model.safetensors")
    with pytest.raises(CorruptFile, match=f"remove {encoder}, and the command that trained the run makes it again"):
        run_pipeline(recipe(run), world)
    shutil.rmtree(encoder)
    run_pipeline(recipe(run), world)
    assert damaged(run) == {}
    shutil.rmtree(run / "language" / "step_00000002")
    shutil.rmtree(run / "language" / "step_00000001", ignore_errors=True)
    flip(run / "language" / "weights.safetensors")
    with pytest.raises(CorruptFile, match="then trains this stage again"):
        run_pipeline(recipe(run), world)


def test_a_deleted_encoder_is_made_again_from_the_stages_weights_and_said(
    run: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever else is gone by then."""
    before = {path.name: path.read_bytes() for path in (run / "projector" / "encoder").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")}
    for stage in STAGES:
        shutil.rmtree(run / stage / "encoder")
        for checkpoint in run.glob(f"{stage}/step_*"):
            shutil.rmtree(checkpoint)
    assert set(damaged(run)) == {f"{stage}/encoder" for stage in STAGES}
    run_pipeline(recipe(run), world)
    assert {path.name: path.read_bytes() for path in (run / "projector" / "encoder").iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in run.glob("*/weights.safetensors")} == times
    assert capsys.readouterr().out.count("was not there: made again from the stage's weights") == 2


def test_a_stage_that_has_lost_weights_and_checkpoints_does_not_begin_again_untold(
    run: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (run / "language").iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_pipeline(recipe(run), world)
    assert "begins again: its log reaches step 2, but neither its weights nor a checkpoint is there" in caplog.text
    assert damaged(run) == {}


@pytest.mark.parametrize("place", ["language/weights.safetensors", "export/hive/model.safetensors"])
def test_weights_whose_checksum_cannot_be_found_are_not_others(run: Path, place: str) -> None:
    path = run / place
    path.write_bytes(path.read_bytes().replace(b'"xxh3_128"', b'"xxh3_129"', 1))
    for read in (open_hive, verified) if path.name == "weights.safetensors" else (from_pretrained,):
        with pytest.raises(CorruptFile, match="does not bear the checksum that it was written with"):
            read(run if read is not from_pretrained else path.parent)
    assert damaged(run)


def verified(run: Path) -> None:
    if found := [damage for place, damage in damaged(run).items() if place == "language/weights.safetensors"]:
        raise CorruptFile(found[0])


def test_an_index_of_weights_that_lacks_a_tensor_is_not_believed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((200,), float(i)) for i in range(3)}
    index = write_weights(tmp_path / "weights.safetensors", tensors, max_shard_bytes=1000)
    content = json.loads(index.read_text())
    del content["weight_map"]["t1"]
    for wrong in (
        content,
        [],
        {"weight_map": [1]},
        {"weight_map": {"t0": "../x.safetensors"}},
        {"weight_map": {"a": 1}},
    ):
        index.write_text(json.dumps(wrong))
        with pytest.raises(CorruptFile, match=r"weights.safetensors.index.json .*: get it again from where it came"):
            read_weights(tmp_path)


def test_a_list_of_checksums_is_believed_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    check(tmp_path)
    whole = (tmp_path / SUMS).read_text()
    lines = whole.splitlines(keepends=True)
    wrong = [
        "",
        "\0" * len(whole),
        whole[:-1],
        "".join(lines[:-2]),
        whole + "more\n",
        whole.replace("a.json", "b.json"),
    ]
    wrong += [
        whole.replace("a.json", "../a.json"),
        whole.replace("a.json", "/dev/zero"),
        whole.replace("# 6", "# 7", 1),
    ]
    for text in wrong:
        (tmp_path / SUMS).write_text(text)
        with pytest.raises(CorruptFile):
            check(tmp_path)
    others = (lambda path: path.symlink_to("/dev/zero"), Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone"))
    for make in others:
        (tmp_path / SUMS).unlink()
        make(tmp_path / SUMS)
        with pytest.raises(CorruptFile, match="cannot be read"):
            check(tmp_path)
        (tmp_path / SUMS).rmdir() if make is Path.mkdir else None
        (tmp_path / SUMS).touch()
    (tmp_path / SUMS).unlink()
    (tmp_path / SUMS).write_bytes(whole.encode()[:80] + b"\xff" + whole.encode()[81:])
    with pytest.raises(CorruptFile, match="cannot be read"):
        check(tmp_path)
    (tmp_path / SUMS).write_text(whole)
    check(tmp_path)
    flip(tmp_path / "b.json")  # after it was found sound in this very process
    with pytest.raises(CorruptFile, match=r"b\.json does not match its checksum"):
        check(tmp_path)


def test_a_process_that_dies_while_it_writes_a_listed_file_leaves_no_wrong_checksum(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("first", "second"):
        with listing(path):
            path.write_text(text)
        check(tmp_path)
    with pytest.raises(KeyboardInterrupt), listing(path):  # noqa: PT012
        path.write_text("half of the th")
        raise KeyboardInterrupt
    check(tmp_path)
    assert read_sums(tmp_path) == {}
