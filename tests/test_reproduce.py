"""The whole path, from an encoder trained from scratch to the table: Base, SA and HIVE pre-trained, probed, fine-tuned
with an LLM, and asked; a second call repeats nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_vlm import write_questions

from hive_scale import presets
from hive_scale.cli import named_run
from hive_scale.commands import submit_pipeline
from hive_scale.plan.devices import find
from hive_scale.plan.run import Machine, plan_run
from hive_scale.slurm import downstream, resources
from launchers.reproduce import main
from launchers.reproduction import paper
from launchers.reproduction.steps import Step, record, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped emoji, and a dozen questions in easy-vqa's layout."""
    root = tmp_path_factory.mktemp("data")
    (root / "emoji").symlink_to(ROOT / "hive_scale/data/sample")
    write_questions(root / "easyvqa")
    return root


def reproduce(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command in this process, so that one server of forks does for two calls."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    return main()


def test_a_step_that_was_stopped_costs_what_all_its_attempts_cost(tmp_path: Path) -> None:
    script = tmp_path / "stopped_once.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "time.sleep(0.5)\n"
        "seen = pathlib.Path(sys.argv[1]).exists()\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "sys.exit(0 if seen else 75)\n"
    )
    steps = [Step("one", (str(script), str(tmp_path / "seen")))]
    with pytest.raises(ValueError, match="one failed"):
        run(steps, tmp_path / "steps", jobs=1)
    run(steps, tmp_path / "steps", jobs=1)
    assert record(tmp_path / "steps", "one")["seconds"] >= 1.0


def test_a_step_is_done_only_if_this_very_command_was(tmp_path: Path) -> None:
    script = tmp_path / "noted.py"
    script.write_text("import sys\nopen(sys.argv[1], 'a').write(sys.argv[2])\n")
    for word in ("a", "a", "b"):
        run([Step("one", (str(script), str(tmp_path / "seen"), word))], tmp_path / "steps", jobs=1)
    assert (tmp_path / "seen").read_text() == "ab"


def test_the_path_is_whole_and_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scale", "smoke", "--data", str(data), "--output", str(tmp_path / "out")]
    assert reproduce(monkeypatch, *words) == 0, capsys.readouterr().err
    first = capsys.readouterr().out
    assert "| HIVE |" in first
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert set(figures) == {"base", "sa", "hive"}
    for rows in figures.values():
        assert rows.keys() == {
            *("emoji, attentive", "emoji, linear", "easy-vqa", "easy-vqa, named", "core minutes", "peak GB")
        }
        assert all(0 <= value[0] <= 100 for value in rows.values())
    assert len(list((tmp_path / "out" / "steps").glob("*.json"))) == 1 + 2 + 3 + 3 + 3
    (tmp_path / "out" / "steps" / "answers-sa-0.json").unlink()
    assert reproduce(monkeypatch, *words) == 0
    second = capsys.readouterr().out
    assert [line.split()[1] for line in second.splitlines() if "launchers/" in line] == ["answers-sa-0:"]
    assert second.splitlines()[-3:] == first.splitlines()[-3:]


def test_missing_data_is_met_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scale", "small", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert reproduce(monkeypatch, *words) == 2
    assert "fashion_mnist is not there: make it with launchers/prepare_data.py" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert reproduce(monkeypatch, "--scale", "small", "--submit") == 2
    assert "--submit and slurm.* words are for --scale paper" in capsys.readouterr().err


def test_a_step_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    steps = [Step("plan", ("launchers/plan.py", "--gpu", "rtx3091"))]
    with pytest.raises(ValueError, match=r"plan failed; its last words, of .*\n.*did you mean rtx3090"):
        run(steps, tmp_path, jobs=1)
    assert not (tmp_path / "plan.json").exists()


def test_the_papers_commands_are_ours_and_come_with_hours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "total", lambda config, sizes, machine: len(config.stages))  # planning takes a minute
    assert reproduce(monkeypatch, "--scale", "paper") == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("torchrun --nproc_per_node 8 launchers/")]
    assert len(commands) == 3 + 2 * 4 + 1 + 2 * 2
    for name in ("pretrain", "probe", "finetune_vlm", "evaluate"):
        assert (ROOT / f"launchers/{name}.py").is_file()
        assert any(f"launchers/{name}.py" in line for line in commands)
    assert lines.count("# pre-training: 3.0 h") == 4
    assert lines.count("# fine-tuning: 2.0 h") == 3
    assert "# 18 h of training on 8 x H100" in lines[-2]


def test_hours_are_the_planners_sum() -> None:
    machine, config = Machine(find("h100"), 1), presets.debug()
    sizes = dict.fromkeys(config.stages, (6400, 20))
    config = replace(config, data=replace(config.data, max_tokens=20))
    assert paper.total(config, sizes, machine) == sum(plan.hours for plan in plan_run(config, machine, 6400))


def test_every_run_of_the_paper_is_one_that_the_pipeline_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words as submit_pipeline.py reads them, up to where data and a Slurm would be needed."""
    asked: list[list[str]] = []

    def submit(line: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(line[2:])
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", submit)
    assert reproduce(monkeypatch, "--scale", "paper", "--submit", "--dry_run", "slurm.nodes=2") == 0
    found = {}
    for words in asked:
        arguments = submit_pipeline._parser().parse_intermixed_args(words)
        assert arguments.dry_run
        plain, slurm_words = resources.split(arguments.overrides)
        assert slurm_words == ["slurm.nodes=2"]
        plain, more = downstream.split(plain)
        config = named_run(arguments, plain)
        found[config.run_dir.name] = config.model.fusion, downstream.read(arguments.then, more, config)
    assert {name: (fusion, list(after)) for name, (fusion, after) in found.items()} == {
        "vlm_base": ("concat", ["probe", "evaluate"]),
        "paper_siglip_sa": ("concat", ["probe", "vlm", "evaluate"]),
        "paper_siglip_hive": ("cross_attention", ["probe", "vlm", "evaluate"]),
        "paper_clip_sa": ("concat", ["probe"]),
        "paper_clip_hive": ("cross_attention", ["probe"]),
    }
    assert found["vlm_base"][1]["evaluate"].words[0] == "runs/vlm_base"
    assert found["paper_siglip_sa"][1]["evaluate"].words[0] == "runs/paper_siglip_sa/vlm"
    assert found["paper_siglip_sa"][1]["evaluate"].after == "vlm"
    assert "base, clip: nothing to train; probe it yourself" in capsys.readouterr().out
