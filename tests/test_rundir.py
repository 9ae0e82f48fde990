"""Each row of the table in docs/runs.md is shown here: what is started, resumed, moved aside, removed or refused by
name.

Why: a run's directory is the only copy of days of work, and a mix-up ends in somebody's thesis.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import tars
import tiny
import torch

from hive_scale import config as configs
from hive_scale import credentials, presets
from hive_scale.checkpoint.run_claims import check_owner, claim_run_dir, is_again, is_begun
from hive_scale.checkpoint.run_reader import Run, verify_run
from hive_scale.checkpoint.stage_files import WEIGHTS, is_stage_done
from hive_scale.checkpoint.weights import read_weights
from hive_scale.checksums import SUMS
from hive_scale.cli import add_run_arguments, add_training_arguments, named_run
from hive_scale.commands import visualize
from hive_scale.config import Config, PartConfig
from hive_scale.distributed import World, session
from hive_scale.export import export_run, from_pretrained
from hive_scale.observability.metrics import read_metrics
from hive_scale.pipeline import run_pipeline
from hive_scale.report.summary import blank_image_control, show
from hive_scale.resilience.run_lock import locked
from hive_scale.run import find_encoder
from hive_scale.rundir import BEGAN, LOCK, MARKER, look
from hive_scale.slurm import submission
from hive_scale.slurm.chain import Record
from hive_scale.slurm.downstream import DownstreamJob
from hive_scale.slurm.resources import Resources

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "runs.md"
STRANGE = "a {0} #1 `x` [red] $HOME 'q\" é"
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as world:
        yield world


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tars.write_set(tmp_path_factory.mktemp("shards"), [8])


@pytest.fixture(scope="module")
def base(shards: list[str]) -> Config:
    """Three stages of one step."""
    run = presets.debug()
    language = tiny.language(vocab_size=259, hidden_size=32)
    model = replace(run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=language))
    stages = {name: replace(stage, max_steps=1, global_batch=4, micro_batch=4) for name, stage in run.stages.items()}
    data = replace(run.data, train=shards, heldout=shards)
    return replace(run, model=model, stages=stages, data=data, blank_image_control=False, eval_interval=0)


@pytest.fixture(scope="module")
def finished(base: Config, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_pipeline(at(base, run), world)
    return run


@pytest.fixture(scope="module")
def begun(base: Config, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first stage is done, the others have not begun."""
    run = tmp_path_factory.mktemp("begun") / "run"
    run_pipeline(at(base, run), world, until="projector")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def half(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def at(config: Config, output: Path | str) -> Config:
    return replace(config, output=str(output))


def edited(run: Path, change: Callable[[Config], Config]) -> Config:
    """The run as its config.yaml says it once somebody has edited that."""
    config = change(configs.load(run / "config.yaml"))
    configs.save(config, run / "config.yaml")
    return at(config, run)


def stage(config: Config, name: str, **changes: object) -> Config:
    return replace(config, stages=config.stages | {name: replace(config.stages[name], **changes)})  # type: ignore[arg-type]


def only(config: Config, *names: str) -> Config:
    return replace(config, stages={name: config.stages[name] for name in names})


def rate(config: Config, name: str, lr: float) -> Config:
    groups = {key: replace(group, lr=lr) for key, group in config.stages[name].groups.items()}
    return stage(config, name, groups=groups)


def written(run: Path) -> dict[str, int]:
    """When the weights of each stage were."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob(f"*/{WEIGHTS}")}


def files(folder: Path) -> dict[str, bytes]:
    """All but the lock, which says who has it."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def aside(run: Path) -> list[Path]:
    return sorted(run.parent.glob(f"{run.name}.old-*"))


def named(*words: str) -> Config:
    arguments = parsed(*words)
    return named_run(arguments, arguments.overrides)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    add_training_arguments(parser)
    return parser.parse_intermixed_args(words)


# -- where a run may begin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True, "delete"])
def test_a_place_that_is_nobodys_is_refused(
    base: Config, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    home, project = tmp_path / "home", tmp_path / "home" / "project"
    project.mkdir(parents=True)
    (project / "thesis.tex").write_text("precious")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(project)
    for output, message in {
        "": "output= is empty",
        " ": "output= is empty",
        "/": "home directory",
        "~": "home directory",
        str(tmp_path): "home directory, or holds it",
        ".": "current directory",
        str(project): "current directory",
        "x\n": "cannot be printed",
        str(loop): "leads to itself|[Ss]ymbolic",
        "y" * 300: "cannot be .*long",
    }.items():
        with pytest.raises(ValueError, match=message):
            run_pipeline(at(base, output), world, overwrite)
    assert files(home) == {"project/thesis.tex": b"precious"}
    assert {path.name for path in tmp_path.rglob("*")} == {"home", "project", "thesis.tex", "loop"}


@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_a_marker_that_is_no_file_is_not_read(base: Config, world: World, tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(tmp_path / MARKER)
    else:
        (tmp_path / MARKER).symlink_to("/dev/zero")
    assert look(tmp_path) == "foreign"


def test_the_command_refuses_such_a_place_before_it_writes_a_log(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: resnet")
    line = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--preset", "debug", "--overwrite", "output="]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "output= is empty" in done.stderr
    assert set(files(tmp_path)) == {"config.yaml"}


def test_what_others_have_left_there_is_not_taken_for_a_run(base: Config, world: World, tmp_path: Path) -> None:
    recipe = configs.to_yaml(base)
    for name, text in {"config.yaml": "model: resnet", "joint/weights.safetensors": "", "data.json": "{}"}.items():
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
        before = files(folder)
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="is no run"):
                run_pipeline(at(base, folder), world, overwrite)
        assert files(folder) == before
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / BEGAN).touch()
    with pytest.raises(ValueError, match=r"has began.yaml, but is no run"):
        run_pipeline(at(base, tmp_path / "stage"), world)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "config.yaml").write_text(recipe)  # ours, but beside it there is nothing of a run
    assert look(tmp_path / "recipes") == "foreign"


def test_a_run_begins_beside_files_of_others(base: Config, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.md").write_text("why")
    run_pipeline(at(base, folder), world, until="projector")
    assert (folder / "notes.md").read_text() == "why"
    assert json.loads((folder / MARKER).read_text())["format"] == 1


def test_a_start_that_is_refused_leaves_nothing(base: Config, world: World, tmp_path: Path) -> None:
    wrong = replace(base, data=replace(base.data, train=[str(tmp_path / "none-*.tar")]))
    with pytest.raises(ValueError, match="none-"):
        run_pipeline(at(wrong, tmp_path / "a" / "b"), world)
    assert not list(tmp_path.iterdir())
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="none-"):
        run_pipeline(at(wrong, tmp_path / "c"), world)
    assert not list((tmp_path / "c").iterdir())


def test_a_full_disk_at_the_first_write_leaves_nothing(
    base: Config, world: World, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="No space left on device: make room"):
            run_pipeline(at(base, tmp_path / "new"), world)
        with pytest.raises(ValueError, match="No space left on device"):
            run_pipeline(at(base, run), world, overwrite=True)
    assert not (tmp_path / "new").exists()
    assert not aside(run)
    run_pipeline(at(base, run), world)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.yaml").touch()  # as older versions have left it
    assert look(tmp_path / "older") == "free"


def test_of_many_starts_at_once_one_begins(base: Config, tmp_path: Path) -> None:
    """And who comes too late hears why, though the disk is slow."""
    processes = get_context("fork")
    outcomes = processes.SimpleQueue()

    def start(number: int) -> None:
        config = replace(at(base, tmp_path / "a" / "run"), name=f"start {number}")
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.05), fsync(descriptor))[1]
        try:
            with locked(config.run_dir, ALONE, patience=(number % 2) * 20.0) as lock:
                check_owner(config)
                if number < 2:  # refused for something else
                    raise ValueError("gave up")
                claim_run_dir(config, ALONE, lock)
            outcomes.put(config.name)
        except (ValueError, RuntimeError) as error:
            outcomes.put(str(error))

    starts = [processes.Process(target=start, args=(number,)) for number in range(12)]
    for process in starts:
        process.start()
    told = [outcomes.get() for _ in starts]
    for process in starts:
        process.join()
    (won,) = [text for text in told if text.startswith("start ")]
    assert configs.load(tmp_path / "a" / "run" / "config.yaml").name == won
    refusals = ("gave up", "is in use by process", "holds another run (other name)")
    assert all(any(text in one for text in refusals) for one in told if one != won), told


def test_a_directory_given_up_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    """Who waits for a lock must not end up with that of a directory that is gone or was moved."""
    run = tmp_path / "a" / "run"
    with locked(run, ALONE) as lock:
        assert (run / LOCK).exists()
        run.rename(tmp_path / "a" / "old")
        assert lock.take() == ""
        assert (run / LOCK).exists()
    assert not run.exists()
    assert (tmp_path / "a" / "old" / LOCK).exists()


# -- going on -------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on_and_hardware_may_change(base: Config, world: World, half: Path) -> None:
    before = written(half)
    run_pipeline(replace(stage(at(base, half), "projector", micro_batch=2), save_interval=1), world)
    assert is_stage_done(half / "joint")
    assert {name: written(half)[name] for name in before} == before


def test_another_command_is_refused_with_the_keys_it_changes(base: Config, world: World, half: Path) -> None:
    with pytest.raises(ValueError, match=r"other stages.joint.groups.connector.lr.*--overwrite; .*--config .*config"):
        run_pipeline(rate(at(base, half), "joint", 0.5), world)


def test_a_run_of_an_older_version_goes_on(base: Config, world: World, half: Path) -> None:
    for path in (half / MARKER, *half.glob(f"*/{BEGAN}")):
        path.unlink()
    data = json.loads((half / "data.json").read_text())
    old = {name: {key: entry["train"][key] for key in ("samples", "fingerprint")} for name, entry in data.items()}
    (half / "data.json").write_text(json.dumps(old))
    for path in (half / SUMS, *half.glob(f"*/{SUMS}")):
        path.unlink()
    assert look(half) == "ours"
    before = written(half)
    run_pipeline(at(base, half), world)
    assert is_stage_done(half / "joint")
    assert written(half)["projector"] == before["projector"]
    assert look(half) == "ours"
    assert (half / MARKER).is_file()


def test_a_run_of_a_newer_version_is_refused(base: Config, world: World, half: Path) -> None:
    (half / MARKER).write_text('{"format": 2}')
    with pytest.raises(ValueError, match="is of format 2, this version knows 1: update hive_scale"):
        run_pipeline(at(base, half), world)


def test_a_lost_config_is_named(base: Config, world: World, half: Path) -> None:
    began = half / "projector" / BEGAN
    text = began.read_text()
    for damage in ("[", "nonsense: 1", text[: len(text) // 2]):
        began.write_text(damage)
        with pytest.raises(ValueError, match=r"began\.yaml .*: restore it"):
            run_pipeline(at(base, half), world)
    began.write_text(text)
    (half / "config.yaml").unlink()
    (half / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds what is no run's \(thesis.tex\)"):
        run_pipeline(at(base, half), world, overwrite="delete")
    with pytest.raises(ValueError, match=r"config.yaml is missing: restore it"):
        run_pipeline(at(base, half), world)


def test_a_file_that_is_a_link_is_not_written_through(base: Config, world: World, half: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("projector/metrics.jsonl", LOCK, "bad_samples.jsonl", "logs/rank_00000.log"):
        (half / "logs").mkdir(exist_ok=True)
        (half / name).unlink(missing_ok=True)
        (half / name).symlink_to(precious)
        with pytest.raises(ValueError, match="is a link"):
            run_pipeline(at(base, half), world)
        (half / name).unlink()
    (tmp_path / "project" / "encoder").mkdir(parents=True)
    (tmp_path / "project" / "code.py").touch()
    (half / "language").symlink_to(tmp_path / "project")
    with pytest.raises(ValueError, match=r"is a link to a folder that holds .*code.py"):
        run_pipeline(at(base, half), world)
    assert precious.read_text() == "mine"


# -- --overwrite ----------------------------------------------------------------------------------------------


def test_overwrite_moves_the_old_run_aside(
    base: Config, world: World, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "thesis.tex").write_text("precious")
    before = files(run)
    run_pipeline(rate(at(base, run), "joint", 0.5), world, overwrite=True, until="projector")
    (old,) = aside(run)
    assert files(old) == before
    assert f"the run that {run} held is now {old}" in caplog.text
    assert [path.name for path in run.iterdir() if path.name in base.stages] == ["projector"]


def test_overwrite_delete_removes_it(base: Config, world: World, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    # all that a run, and commands on it, leave there
    for name in ("report.html", "attention.svg", "gradients.json", "gradients_over_training2.svg", ".x.svg.7.tmp"):
        (run / name).touch()
    for name in ("weights-00001-of-00002.safetensors", "weights.safetensors.index.json", "weights.safetensors.tmp"):
        (run / "joint" / name).touch()
    (run / "logs").mkdir()
    for name in ("rank_00001.log", "offline.log", "online.log", "tensorboard.log"):
        (run / "logs" / name).touch()
    made = written(run)
    run_pipeline(at(base, run), world, overwrite="delete", until="projector")
    assert not aside(run)
    assert written(run)["projector"] > made["projector"]
    assert "was removed" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.tex", "projector/notes.md", ".git/HEAD", "slurm/mine/.git/HEAD", "logs/x.doc"),
        # nearly names of ours
        *("attention_is_all_you_need.pdf", "gradients-talk/slides.tex", "report_to_my_boss.html", "draft.tmp"),
        *("joint/step_by_step.md", "joint/weights_of_mine.safetensors.zip", "joint/metrics.jsonl.ods"),
        *("logs/diary.log", "initial/notes.tmp"),
    ],
)
def test_overwrite_delete_refuses_what_is_no_runs(base: Config, world: World, run: Path, name: str) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("precious")
    before = files(run)
    with pytest.raises(ValueError, match=r"holds what is no run's \(.*--overwrite=delete leaves it alone"):
        run_pipeline(at(base, run), world, overwrite="delete")
    assert files(run) == before


def test_overwrite_leaves_alone_what_is_no_run(base: Config, world: World, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / "config.yaml").write_text("model: resnet")
    (project / "thesis.tex").write_text("precious")
    for words in (["--overwrite", f"output={project}"], [f"output={project}", "--overwrite=delete"]):
        arguments = parsed(*words)
        assert arguments.overrides == [f"output={project}"]
        with pytest.raises(ValueError, match="is no run, and not empty"):
            run_pipeline(at(base, named_run(arguments, arguments.overrides).run_dir), world, arguments.overwrite)
    assert set(files(project)) == {"config.yaml", "thesis.tex"}


def test_overwrite_validates_first(base: Config, world: World, run: Path, tmp_path: Path) -> None:
    before = files(run)
    nowhere = replace(base.model, vision=replace(base.model.vision, path=str(tmp_path / "nowhere")))
    for wrong in (
        replace(base, data=replace(base.data, train=[str(tmp_path / "none-*.tar")])),
        stage(base, "joint", global_batch=6),
        replace(base, engine=replace(base.engine, ds_config=str(tmp_path / "none.json"))),
        replace(base, model=nowhere),
    ):
        with pytest.raises(ValueError, match=r"none|nowhere|micro_batch"):
            run_pipeline(at(wrong, run), world, overwrite="delete")
    assert files(run) == before
    assert not aside(run)


def test_overwrite_keeps_what_the_new_run_needs(base: Config, world: World, run: Path) -> None:
    needy = replace(base, model=replace(base.model, connector_weights=str(run / "joint")))
    with pytest.raises(ValueError, match=r"model.connector_weights=.* lies in .*, which --overwrite would move away"):
        run_pipeline(at(needy, run), world, overwrite=True)
    shards = replace(base, data=replace(base.data, heldout=[f"3 x {run}/*.tar"]))
    with pytest.raises(ValueError, match=r"data.heldout=.* lies in"):
        run_pipeline(at(shards, run), world, overwrite=True)


@pytest.mark.parametrize("how", ["braces", "glob", "link", "variable"])
def test_overwrite_keeps_shards_however_a_pattern_names_them(
    base: Config, world: World, run: Path, shards: list[str], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copy(shards[0], run / "mine.tar"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.tar").symlink_to(mine)
    (tmp_path / "more").mkdir()
    shutil.copy(shards[0], tmp_path / "more" / "mine.tar")
    monkeypatch.setenv("WHERE", str(run))
    pattern = {
        "braces": f"{tmp_path}/{{run,more}}/*.tar",
        "glob": f"{tmp_path}/*/mine.tar",
        "link": f"{tmp_path}/links/*.tar",
        "variable": credentials.take("${oc.env:WHERE}/*.tar", own=True),
    }[how]
    needy = replace(base, data=replace(base.data, train=[pattern]))
    with pytest.raises(ValueError, match=r"data.train: .* lies in .*, which --overwrite would move away"):
        run_pipeline(at(needy, run), world, overwrite=True)
    assert not aside(run)
    assert mine.exists()


def test_overwrite_of_a_directory_of_runs_is_refused(base: Config, world: World, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, run / "another")
    for overwrite in (True, "delete"):
        with pytest.raises(ValueError, match=r"holds other runs, too \(another\)"):
            run_pipeline(at(base, run), world, overwrite)  # type: ignore[arg-type]


def test_overwrite_of_the_current_directory_is_refused(
    base: Config, world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "joint")
    for output in ("..", str(run)):
        with pytest.raises(ValueError, match="with you in it"):
            run_pipeline(at(base, output), world, overwrite=True)
    monkeypatch.chdir(run)
    run_pipeline(at(base, "."), world)  # which goes on in a run, though, or returns


def test_overwrite_of_a_run_in_use_is_refused(run: Path, base: Config, world: World) -> None:
    processes = get_context("fork")
    held, leave = processes.Event(), processes.Event()

    def hold() -> None:
        with locked(run, ALONE):
            held.set()
            leave.wait(60)

    process = processes.Process(target=hold)
    process.start()
    assert held.wait(60)
    with pytest.raises(RuntimeError, match=f"in use by process {process.pid}"):
        run_pipeline(at(base, run), world, overwrite=True)
    leave.set()
    process.join()
    assert not aside(run)


def test_overwrite_of_a_linked_directory_stays_on_its_disk(
    base: Config, world: World, run: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    run.rename(disk / "big")
    run.symlink_to(disk / "big")
    run_pipeline(at(base, run), world, overwrite=True, until="projector")
    assert run.is_symlink()
    assert len(aside(disk / "big")) == 1
    assert not aside(run)
    assert is_stage_done(disk / "big" / "projector")
    shutil.rmtree(disk)  # a scratch disk that was purged
    run_pipeline(at(base, run), world, until="projector")
    assert is_stage_done(disk / "big" / "projector")


def test_a_requeued_job_goes_on_with_what_it_has_begun(
    base: Config, world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command still says --overwrite."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    run_pipeline(at(base, run), world, overwrite=True, until="projector")  # another's run, whatever the attempt
    assert len(aside(run)) == 1
    made = written(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    run_pipeline(at(base, run), world, overwrite=True, until="language")
    assert written(run)["projector"] == made["projector"]
    assert is_stage_done(run / "language")
    assert len(aside(run)) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    assert not is_again(run)
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not is_again(run)  # the run there is not this torchrun's
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run_pipeline(at(base, run), world, overwrite=True, until="projector")
    assert len(aside(run)) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_again(run)


def test_a_follower_does_not_overwrite(base: Config) -> None:
    """Its job may begin again any time, days later, too."""
    with pytest.raises(ValueError, match="--overwrite: a job of a chain may begin again"):
        DownstreamJob("finetune_vlm", "joint", ["x", "--overwrite", "output=y"]).check(base, 1)


# -- moved and copied -----------------------------------------------------------------------------------------


def test_a_moved_run_goes_on_where_it_lies(base: Config, world: World, half: Path, tmp_path: Path) -> None:
    moved = half.rename(tmp_path / STRANGE.replace("/", ""))
    before = written(moved)
    run_pipeline(at(base, moved), world, until="language")
    run_pipeline(named("--config", str(moved / "config.yaml")), world)
    assert is_stage_done(moved / "joint")
    assert written(moved)["projector"] == before["projector"]
    assert not half.exists()


def test_the_config_of_a_copy_goes_on_in_the_copy(base: Config, world: World, half: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    before = files(half)
    run_pipeline(named("--config", str(copy / "config.yaml"), "save_interval=1"), world)
    assert is_stage_done(copy / "joint")
    assert files(half) == before
    # what names a run is heeded, and a recipe is no run
    said = [f"output={tmp_path / 'new'}", "name=other"]
    assert [named("--config", str(copy / "config.yaml"), word).name for word in said] == ["debug", "other"]
    assert named("--config", str(copy / "config.yaml"), said[0]).run_dir == tmp_path / "new"
    (tmp_path / "recipes").mkdir()
    recipe = shutil.copy(copy / "config.yaml", tmp_path / "recipes")
    assert named("--config", str(recipe)).output == configs.load(half / "config.yaml").output


def test_a_copy_does_not_take_the_originals_jobs_for_its_own(half: Path, tmp_path: Path) -> None:
    (half / "slurm").mkdir()
    Record(run=str(half), jobs={"joint": "7"}).write(half)
    copy = Path(shutil.copytree(half, tmp_path / "copy"))
    known = [Record.read(place) for place in (half, copy)]
    assert [record and record.jobs for record in known] == [{"joint": "7"}, {}]
    half.rename(tmp_path / "moved")
    moved = Record.read(tmp_path / "moved")
    assert moved
    assert moved.jobs == {}


def test_a_path_of_spaces_braces_and_marks_works_throughout(
    base: Config, world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / STRANGE
    run_pipeline(at(base, run), world, until="projector")
    run_pipeline(at(base, run), world)  # goes on
    show(at(base, run), world.device)
    assert f"weights  {run}" in capsys.readouterr().out
    assert not [finding for finding in verify_run(Run(run)) if finding.damage]
    export_run("hive", run, run / "hive")
    assert from_pretrained(run / "hive")
    assert find_encoder(run) == run / "joint" / "encoder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["visualize", "report", str(run)])
        assert visualize.main() == 0
    assert (run / "report.html").is_file()


def test_such_a_path_works_in_slurms_scripts(base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, asked = at(base, tmp_path / STRANGE), dict.fromkeys(base.stages, Resources(gpus_per_node=0))
    assert submission.submit(config, asked, "slurm", {}, dry_run=True) == 0
    script = capsys.readouterr().out.split("# ---- projector\n")[1].split("# ---- ")[0]
    # what a shell makes of it: srun is given the paths whole, and nothing in them is run
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    told = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True, check=False).stdout
    lines = told.splitlines()
    assert lines[0].startswith(f"{config.run_dir}/slurm/code/")
    assert f"{config.run_dir}/slurm/logs/%j_%t_log.out" in lines
    assert lines[-1] == f"{config.run_dir}/slurm/logs"
    (output,) = re.findall(r"^#SBATCH --output=(.*)$", script, re.MULTILINE)
    assert shlex.split(output) == [f"{config.run_dir}/slurm/logs/%j_0_log.out"]
    for mark in "%:\\":
        with pytest.raises(ValueError, match="Slurm cannot have"):
            submission.submit(at(base, tmp_path / f"a{mark}b"), asked, "slurm", {}, dry_run=True)


# -- config.yaml edited ---------------------------------------------------------------------------------------


def test_a_stage_added_to_a_finished_run_is_trained_alone(base: Config, world: World, run: Path) -> None:
    (run / "outcome.txt").write_text("of three stages")
    before = written(run)
    config = edited(run, lambda c: replace(c, stages=c.stages | {"more": replace(c.stages["joint"], seed=7)}))
    with pytest.raises(ValueError, match=r"other stages.more"):
        run_pipeline(at(base, run), world)  # the old command
    run_pipeline(config, world)
    assert is_stage_done(run / "more")
    assert {name: written(run)[name] for name in before} == before
    assert not (run / "outcome.txt").exists()


def test_the_blank_twin_follows_its_run(base: Config, world: World, run: Path) -> None:
    run_pipeline(blank_image_control(at(base, run)), world, follows=True, until="projector")
    config = edited(run, lambda c: rate(c, "joint", 0.5))
    run_pipeline(blank_image_control(config), world, follows=True, until="language")
    assert configs.load(run / "blank" / "config.yaml").stages["joint"].groups["vision"].lr == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: rate(c, "projector", 0.5), "projector has begun with other stages.projector.groups"),
        (lambda c: stage(c, "projector", seed=5), "projector has begun with other stages.projector.seed"),
        (lambda c: only(c, "language", "joint"), "projector has begun with other stages.projector "),
        (lambda c: only(c, "language", "projector", "joint"), "projector has begun with other stages.language"),
        (lambda c: replace(c, stages={"new": c.stages["joint"], **c.stages}), "other stages.new"),
        (
            lambda c: replace(c, stages={"first": c.stages["projector"], **only(c, "language", "joint").stages}),
            "other stages.projector ",
        ),
        (lambda c: replace(c, model=replace(c.model, encoder_layer_ratio=0.25)), "other model.encoder_layer_ratio"),
        (lambda c: replace(c, data=replace(c.data, max_tokens=20)), "other data.max_tokens"),
    ],
    ids=["rate", "seed", "removed", "order", "before", "renamed", "model", "data"],
)
def test_what_has_begun_stays_as_it_is(
    world: World, half: Path, change: Callable[[Config], Config], message: str
) -> None:
    config = edited(half, change)
    before = files(half)
    with pytest.raises(ValueError, match=rf"{message}.*undo that change, or move"):
        run_pipeline(config, world)
    assert files(half) == before


def test_a_stage_that_has_not_begun_may_be_changed_renamed_removed_or_moved(
    world: World, half: Path, shards: list[str], tmp_path: Path
) -> None:
    others = tars.write_set(tmp_path / "others", [8, 4])

    def change(config: Config) -> Config:
        config = stage(rate(config, "joint", 0.5), "joint", data={"train": others})
        return replace(config, stages={"projector": config.stages["projector"], "last": config.stages["joint"]})

    before = written(half)
    config = edited(half, change)
    run_pipeline(config, world)
    (line,) = read_metrics(half / "last" / "metrics.jsonl")
    assert line["lr"]["vision"] > 0.01  # of 0.5, behind the warmup
    assert json.loads((half / "data.json").read_text())["last"]["train"]["samples"] == 12
    assert written(half)["projector"] == before["projector"]
    assert not (half / "language").exists()


def test_other_data_of_a_stage_that_has_not_begun_are_noted(world: World, half: Path, tmp_path: Path) -> None:
    others = tars.write_set(tmp_path / "others", [8, 4])
    run_pipeline(edited(half, lambda c: stage(c, "joint", data={"train": others})), world)
    assert json.loads((half / "data.json").read_text())["joint"]["train"]["samples"] == 12


def test_until_a_stage_has_begun_the_model_may_change(base: Config, world: World, half: Path) -> None:
    shutil.rmtree(half / "projector")
    first = read_weights(half / "initial" / WEIGHTS).identity
    run_pipeline(edited(half, lambda c: stage(c, "projector", seed=5)), world, until="projector")
    assert read_weights(half / "initial" / WEIGHTS).identity != first
    assert is_stage_done(half / "projector")


def test_a_stage_whose_folder_was_moved_away_is_trained_again(
    base: Config, world: World, run: Path, tmp_path: Path
) -> None:
    (run / "joint").rename(tmp_path / "joint")
    config = edited(run, lambda c: rate(c, "joint", 0.5))
    run_pipeline(config, world)
    assert is_stage_done(run / "joint")
    (run / "language").rename(run / "language.old")  # in place, too
    with pytest.raises(ValueError, match=r"stage joint has begun, but .*language/weights.* is not there: restore it"):
        run_pipeline(config, world)
    (run / "joint").rename(run / "joint.old")
    run_pipeline(config, world)
    assert is_stage_done(run / "language")
    assert is_begun(run / "language.old")


# -- the table ------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_shown_by_a_test() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ") and "`test_" in line]
    shown = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    here = [name for name in globals() if name.startswith("test_")]
    here.remove("test_every_row_of_the_table_is_shown_by_a_test")
    assert len(rows) > 20
    assert sorted(set(shown)) == sorted(here)


def test_claims_are_whole(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while a slow disk takes config.yaml finds none, or all of it."""
    seen: list[bool] = []
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        seen.append((tmp_path / "run" / "config.yaml").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    with locked(tmp_path / "run", ALONE) as lock:
        claim_run_dir(at(base, tmp_path / "run"), ALONE, lock)
    assert seen[0] is False
    assert configs.load(tmp_path / "run" / "config.yaml") == at(base, tmp_path / "run")
