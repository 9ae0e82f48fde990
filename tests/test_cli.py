"""What people type is understood, or answered with what they meant.

Why: options of other programs, options in place of words and words in place of options ended in a usage text that did
not say what to type.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_scale import __main__ as program
from hive_scale.cli import Parser, add_run_arguments, add_training_arguments, count
from hive_scale.commands import (
    COMMANDS,
    demo,
    export,
    finetune_vlm,
    plan,
    prepare_data,
    pretrain,
    submit_pipeline,
    visualize,
)


def training_parser() -> Parser:
    parser = Parser()
    parser.add_argument("encoder", type=Path)
    add_run_arguments(parser)
    add_training_arguments(parser)
    return parser


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("enc --output=runs/x --data.train=[a.tar]", ["output=runs/x", "data.train=[a.tar]"]),
        ("--output runs/x enc --quiet", ["output=runs/x"]),
        ("output=x --ds_config zero2 enc eval_interval=3", ["output=x", "eval_interval=3"]),
        ("--quiet output=x enc --overwrite=delete name=y", ["output=x", "name=y"]),
        ("--ds_config a=b.json enc --stages.joint.groups.vision.lr=1e-4", ["stages.joint.groups.vision.lr=1e-4"]),
        ("enc --lr 1e-3 --batch-size=8", ["lr=1e-3", "batch-size=8"]),  # answered when the config is merged
        ("enc --slurm.nodes=2", ["slurm.nodes=2"]),
        (f"enc name={'x' * 300}", [f"name={'x' * 300}"]),
        ("enc -- name=y", ["name=y"]),
    ],
)
def test_keys_of_the_config_are_words_wherever_and_however_they_stand(line: str, words: list[str]) -> None:
    found = training_parser().parse_args(line.split())
    assert (str(found.encoder), found.overrides) == ("enc", words)
    assert found.ds_config in (None, "zero2", "a=b.json")


def refused(main: Callable[[], object], monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *line.split()])
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        (pretrain, "--presett debug", "--presett: did you mean --preset?"),
        (pretrain, "--presett=debug", "--presett: did you mean --preset?"),
        (pretrain, "-preset debug", "-preset: did you mean --preset?"),
        (pretrain, "--ds-config zero2", "--ds-config: did you mean --ds_config?"),
        (pretrain, "--quite output=x", "--quite: did you mean --quiet?"),
        (pretrain, "--resume", "--resume: the same command resumes a run"),
        (pretrain, "--bf16", "--bf16: give engine.precision=bf16"),
        (pretrain, "--output", "--output has no value: keys of the config are words, such as output=VALUE"),
        (pretrain, "--lr 1e-3", "lr: there is no such key: did you mean stages.STAGE.groups.GROUP.lr"),
        (pretrain, "--model.fusoin=concat", "Did you mean: 'fusion'"),
        (pretrain, "--log_level warn", "did you mean warning?"),
        (pretrain, "debug", "'debug' is not key=value: did you mean --preset debug?"),
        (pretrain, "runs/x/config.yaml", "is not key=value: did you mean --config runs/x/config.yaml?"),
        (finetune_vlm, "output=x there/is/none", "there/is/none is not there: "),
        (plan, "--gpus 3", "--gpus: did you mean --gpu?"),
        (export, "encodr runs/x", "did you mean encoder?"),
        (export, "encoder runs/x --ouput=d", "--ouput: did you mean --output?"),
        (export, "encoder runs/x output=d", "output=d: did you mean --output=d?"),
        (export, "encoder runs/x --nothing_like_it", "--nothing_like_it: there are --output, --stage, --ema, --dtype"),
        (visualize, "report there/is --plots p there/too", "there/is is not there"),
        (prepare_data, "tabel a.csv", "did you mean table?"),
        (prepare_data, "table a.csv images --outptu o", "--outptu: did you mean --output?"),
        (submit_pipeline, "statsu runs/x", "there is no 'statsu': did you mean status?"),
        (submit_pipeline, "status runs/x --folow", "--folow: did you mean --follow?"),
    ],
)
def test_what_is_mistyped_is_answered_with_what_was_meant(
    command: object,
    line: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(command.main, monkeypatch, line)  # type: ignore[attr-defined]
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "did you mean pretrain?"),
        ("Finetune", "did you mean finetune_vlm?"),
        ("submit", "did you mean submit_pipeline?"),
        ("xyz", "there are pretrain, submit_pipeline,"),
        ("--preset debug", "name a command before --preset, such as pretrain"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(program.main, monkeypatch, line)
    assert said in capsys.readouterr().err


def test_without_arguments_every_command_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hive_scale"])
    assert program.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert [line.split() for line in lines if line.startswith(f"  {name} ")] == [[name, *text.split()]]


def test_a_tilde_after_an_equals_sign_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    parser = Parser()
    parser.add_argument("--output", type=Path)
    assert parser.parse_args(["--output=~/x"]) == argparse.Namespace(output=Path("/home/somebody/x"))


def test_a_command_ends_with_a_line_wherever_it_is_interrupted_or_has_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "hive_scale"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert program.run("plan", []) == 75
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("port", [0, -1, 65536, 99999])
def test_a_number_that_is_no_port_is_refused(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: name)  # as where gradio is installed
    monkeypatch.setattr(sys, "argv", ["demo", "runs/none", f"--port={port}"])
    assert demo.main() == 2
    assert f"--port {port} is no port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("pretrain outputt=x", "Did you mean: 'output'?"),
        ("pretrain stages.joint.ema=2", "stages.joint: ema=2 is a decay per step"),
        ("pretrain --preset rtx3090 stages.joint.optimizer=moun", "did you mean muon?"),
        ("plan --preset paper_siglip stages.joint.lrr=1", "Key 'lrr' not in 'StageConfig'"),
        ("plan --gpu rtx9999", "no such GPU"),
        ("probe runs/x --set emoji --headss knn", "did you mean --heads?"),
        ("evaluate runs/x --tasks mmee", "there is no task 'mmee'"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(line: str, answer: str) -> None:
    """That takes seconds, of which a typo is not worth one."""
    command = [sys.executable, "-X", "importtime", "-m", "hive_scale", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2, said
    assert answer in "\n".join(said)
    assert not [line for line in done.stderr.splitlines() if line.endswith(("| torch", "  torch"))]


@pytest.mark.parametrize("text", ["60000", "60_000", "60,000", "60k", "60K", "0.06M"])
def test_a_count_may_be_short(text: str) -> None:
    assert count(text) == 60_000


@pytest.mark.parametrize("text", ["60x", "k", "1.5", "-3", "1e4", ""])
def test_what_is_no_count_is_answered_with_some(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give one, such as 60000, 60k or 3M"):
        count(text)


def test_ctrl_c_while_a_command_begins_is_one_line() -> None:
    """The first half second, in which packages are checked and modules are imported."""
    command = [sys.executable, "-u", "-X", "importtime", "-m", "hive_scale", "plan"]
    for module in ("hive_scale.commands", "packaging", "hive_scale.exit_codes", "omegaconf"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            if not line.startswith("import time:"):
                said.append(line)
            elif line.split("|")[-1].strip() == module:  # it is imported now
                process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75, module
        assert said == ["stopped: the same command goes on with what is left to do\n"], module
