"""The chain without Slurm: what is submitted, kept or skipped, the scripts, and the same run as local processes.
tests/cluster tests with a real Slurm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from test_vlm import recipe, write_questions

from hive_scale import presets
from hive_scale.checkpoint.stage_files import is_stage_done
from hive_scale.config import DataConfig
from hive_scale.exit_codes import HALTED, REFUSED
from hive_scale.slurm import downstream, slurm_cli, status, submission
from hive_scale.slurm.chain import Link, Record, decide, job_name
from hive_scale.slurm.downstream import DownstreamJob, order
from hive_scale.slurm.job import DownstreamChainJob, StageJob, attempts_file, read_attempts
from hive_scale.slurm.resources import PROFILES, Resources, environment, read, split
from hive_scale.slurm.slurm_cli import NEVER, Job

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["projector", "language", "joint"]
ORDER = order(STAGES, {})
BRIEF = ["blank_image_control=false", "eval_interval=0", *(f"stages.{stage}.max_steps=2" for stage in STAGES)]


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """submit_pipeline.py on a machine without Slurm's commands."""
    env = os.environ | {"PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    line = [sys.executable, "slurm/submit_pipeline.py", *words]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def job(state: str, reason: str = "") -> Job:
    return Job("7", state, reason)


def test_what_is_done_is_skipped_and_the_rest_is_chained() -> None:
    assert decide(ORDER, ["projector"], {}) == [
        Link("projector", "done"),
        Link("language", "submit"),
        Link("joint", "submit", "language"),
    ]


def test_what_runs_or_waits_is_kept() -> None:
    jobs = {"projector": job("RUNNING"), "language": job("PENDING", "Dependency"), "joint": job("PENDING")}
    assert [link.verb for link in decide(ORDER, [], jobs)] == ["kept"] * 3
    # a requeued one waits under its own id
    jobs["projector"] = job("PENDING", "BeginTime")
    assert [link.verb for link in decide(ORDER, [], jobs)] == ["kept"] * 3
    # one that was forgotten by all is submitted behind the others
    jobs["joint"] = job("")
    assert decide(ORDER, [], jobs)[2] == Link("joint", "submit", "language")


def test_a_failed_stage_is_started_again_and_what_waited_for_it_is_replaced() -> None:
    jobs = {"projector": job("FAILED"), "language": job("PENDING", NEVER), "joint": job("PENDING", "Dependency")}
    assert decide(ORDER, [], jobs) == [
        Link("projector", "submit"),
        Link("language", "submit", "projector", "7"),
        Link("joint", "submit", "language", "7"),
    ]


def test_how_a_job_ended_counts_for_nothing_without_its_weights() -> None:
    jobs = dict.fromkeys(STAGES, job("COMPLETED"))
    assert [link.verb for link in decide(ORDER, [], jobs)] == ["submit"] * 3
    assert [link.verb for link in decide(ORDER, STAGES, dict.fromkeys(STAGES, job("RUNNING")))] == ["done"] * 3


def test_what_follows_waits_for_the_last_stage_or_for_one_another() -> None:
    then = {"probe": DownstreamJob("probe", "joint", []), "vlm": DownstreamJob("finetune_vlm", "joint", [])}
    whole = order(STAGES, then | {"evaluate": DownstreamJob("evaluate", "vlm", [])})
    assert decide(whole, ["projector", "language"], {})[2:] == [
        Link("joint", "submit"),
        Link("probe", "submit", "joint"),
        Link("vlm", "submit", "joint"),
        Link("evaluate", "submit", "vlm"),
    ]
    # a probe that failed holds up nobody, and once all is trained waits for nobody
    jobs = {"probe": job("FAILED"), "vlm": job("RUNNING"), "evaluate": job("PENDING", "Dependency")}
    assert decide(whole, STAGES, jobs)[3:] == [
        Link("probe", "submit"),
        Link("vlm", "kept"),
        Link("evaluate", "kept", "vlm"),
    ]


def test_words_go_over_the_profile_and_a_stage_s_own_over_both() -> None:
    words = ["slurm.hours=6", "slurm.stages.joint.hours=12", "slurm.stages.joint.setup=[module load x]"]
    found = read("preemptible", words, dict.fromkeys(STAGES, Resources()))
    assert [(r.nodes, r.hours) for r in found.values()] == [(1, 2), (2, 6), (2, 12)]
    assert found["joint"].setup == ["module load x"]
    assert found["language"].world_size == 16


@pytest.mark.parametrize("profile", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_reads(profile: str) -> None:
    assert set(read(profile, [], dict.fromkeys(STAGES, Resources()))) == set(STAGES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm.nodez=2"], "nodez"),
        (["slurm.stages.jont.nodes=2"], "did you mean joint"),
        (["slurm.hours=.inf"], "slurm.hours=inf is no length of time"),
        (["slurm.hours=0.01", "slurm.grace=120"], "slurm.grace=120 seconds do not fit into slurm.hours=0.01"),
        (["slurm.nodes=0"], "slurm.nodes=0 must be at least 1"),
    ],
)
def test_bad_resources_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(None, words, dict.fromkeys(STAGES, Resources()))


def test_threads_leave_room_for_data_workers() -> None:
    assert environment(Resources(cpus_per_task=12), ROOT, DataConfig(workers=4))["OMP_NUM_THREADS"] == "8"
    assert environment(Resources(cpus_per_task=2), ROOT, DataConfig(workers=4))["OMP_NUM_THREADS"] == "1"
    assert environment(Resources(interface="ib0"), ROOT, DataConfig())["NCCL_SOCKET_IFNAME"] == "ib0"


def test_a_dry_run_prints_the_scripts_without_a_slurm(tmp_path: Path) -> None:
    words = ["--preset", "debug", "--dry_run", "--profile", "preemptible", "slurm.account=vision", "slurm.gpu=h100"]
    shown = command(*words, f"output={tmp_path / 'run'}", "--ds_config", "ds_configs/zero2.json")
    assert shown.returncode == 0, shown.stderr
    table, first, *rest = shown.stdout.split("# ---- ")
    assert re.search(r"joint .* 2 x 8 .* 0\.\d of \d+\.\d GB, 0\.0 h", table), table
    assert "--nodes=1" in first
    assert "afterok" not in first
    for script, before in zip(rest, STAGES, strict=False):
        assert f"#SBATCH --dependency=afterok:JOB_OF_{before}" in script
        assert "#SBATCH --kill-on-invalid-dep=yes" in script
        for line in ("--nodes=2", "--ntasks-per-node=8", "--signal=USR2@180", "--requeue", "--account=vision"):
            assert f"#SBATCH {line}\n" in script
        assert "export NCCL_SOCKET_IFNAME=ib0" in script
        assert " --distribution=block " in script, "ranks of a node follow each other"
        assert "module load cuda" in script
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=rest[0].split("\n", 1)[1], text=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry_run", "slurm.gpus_per_node=3"], "global_batch=64 does not divide among 3 processes"),
        (
            ["--dry_run", "slurm.tasks_per_node=4", "slurm.gpus_per_node=2"],
            "slurm.tasks_per_node=4 processes cannot share slurm.gpus_per_node=2 GPUs: leave tasks_per_node out",
        ),
        (["--dry_run", "data.train=[/nowhere/x.tar]"], "/nowhere/x.tar"),
        (["--dry_run", "slurm.gpu=a1000"], "a1000"),
        (["--dry_run", "model.vision.path=/nowhere"], "model.vision.path=/nowhere is not there"),
        (["--dry_run", "--ds_config", "/nowhere.json"], "engine.ds_config=/nowhere.json is no file"),
        (["--dry_run", "--ds_config", "mine.json", "stages.joint.max_grad_norm=10"], "contradicts 10.0 of joint"),
        (["--dry_run", "--profile", "mars"], "one of laptop, one_node, preemptible"),
        ([], "there is no sbatch here"),
        (["--dry_run", "--then", "prob"], "--then: there is no 'prob': did you mean probe?"),
        (["--dry_run", "after.vlm=llm_only=true"], "after.vlm: --then does not ask for it"),
        (["status", "/nowhere"], "/nowhere was not submitted from here"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    json_file = tmp_path / "mine.json"
    json_file.write_text('{"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}')
    words = [str(json_file) if word == "mine.json" else word for word in words]
    shown = command(*words, *([] if "status" in words else [f"output={tmp_path / 'run'}"]))
    assert shown.returncode == 2, shown.stdout
    assert shown.stderr.count("\n") == 1, shown.stderr
    assert message in shown.stderr


def test_words_for_downstream_jobs_are_read_by_their_old_name(caplog: pytest.LogCaptureFixture) -> None:
    assert downstream.split(["then.probe=--set pets", "output=x"]) == (["output=x"], ["after.probe=--set pets"])
    assert "then.probe is called after.probe now" in caplog.text


SBATCH = """#!/bin/bash
env | grep ^S >{folder}/environment; cp "${{@: -1}}" {folder}/script; echo Submitted batch job 7
"""


def test_a_job_s_own_limits_do_not_reach_the_jobs_submitted_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun would take them for options: SLURM_MEM_PER_CPU and --mem exclude each other, and the chain is lost."""
    for name, text in {
        "sbatch": SBATCH.format(folder=tmp_path),
        "squeue": "#!/bin/sh\n",
        "sacct": "#!/bin/sh\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_MEM_PER_CPU": "500", "SLURM_CPU_BIND": "quiet", "SUBMITIT_EXECUTOR": "slurm"}
    user = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    for name, value in (job | user | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    config = presets.load("debug", None, [f"output={tmp_path / 'run'}"])
    assert submission.submit(config, dict.fromkeys(STAGES, Resources(gpus_per_node=0, mem="800M")), "slurm", {}) == 0
    seen = (tmp_path / "environment").read_text()
    assert not [name for name in job if name in seen]
    assert all(f"{name}={value}" in seen for name, value in user.items())
    assert "SLURM_MEM_PER_CPU" not in (tmp_path / "script").read_text()
    assert os.environ["SLURM_MEM_PER_CPU"] == "500"  # this process is in its job still


def test_an_attempt_cut_off_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = StageJob(presets.load("debug", None, [f"output={tmp_path}"]), "projector", 5)
    begun.note("begin", datetime.now(), at="projector:0")
    path = attempts_file(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"event": "begin", "stage": "proj\xc3')  # a kill, or a full disk
    assert [line["event"] for line in read_attempts(tmp_path)] == ["begin"]
    begun.note("end", datetime.now(), code=0)  # on a line of its own
    assert [line["event"] for line in read_attempts(tmp_path)] == ["begin", "end"]
    assert "attempts.jsonl: line 2 is cut off and left out" in caplog.text


def test_lines_that_are_no_attempts_stop_neither_a_job_nor_the_status(tmp_path: Path) -> None:
    config = presets.load("debug", None, [f"output={tmp_path}"])
    begun = StageJob(config, "projector", 5)
    path = attempts_file(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b'{}\n[1]\n{"event": "begin"}\n\x00\x00\n{"event": "begin", "stage": 3, "job": "7"}\n7\n\xff{"ev')
    begun.begin(datetime.now())
    assert [line["stage"] for line in read_attempts(tmp_path)] == ["projector"]
    Record().write(tmp_path)
    assert status.show(config, follow_jobs=False) == 1


def test_a_record_that_was_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    Record().write(tmp_path)
    for text in ("", '{"cwd": "/a', '{"what": 1}', "[]"):
        Record.path(tmp_path).write_text(text)
        with pytest.raises(
            ValueError, match=r"chain\.json is not what was written .*cancel the run's jobs and delete it"
        ):
            Record.read(tmp_path)


def test_a_job_that_gets_nowhere_gives_up_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = StageJob(presets.load("debug", None, [f"output={tmp_path}"]), "projector", 2)
    for _ in range(2):
        job.begin(datetime.now())
    assert job() == REFUSED
    said = capsys.readouterr().err
    assert said.startswith("error: 2 attempts in a row began at projector:0 and saved no step: ")
    assert said.count("\n") == 1


def test_a_stop_file_keeps_a_job_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = presets.load("debug", None, [f"output={tmp_path}"])
    follower = DownstreamJob("probe", "joint", ["--output", str(tmp_path / "probes")])
    (tmp_path / "STOP").touch()
    for job in (StageJob(config, "projector", 5), DownstreamChainJob(config, "probe", 5, follower)):
        assert job() == HALTED
        assert f"stopped before it began. Remove {tmp_path / 'STOP'}" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "STOP").exists()
    assert [line["code"] for line in read_attempts(tmp_path) if line["event"] == "end"] == [HALTED, HALTED]


ODD = ["a|b", "a b", "a#1", "a`b`", "$(a)", "é", "a'b", 'a"b', "a;b", "a%b,c", "<b>", "-x", "x" * 200]


@pytest.mark.parametrize("name", ODD)
def test_a_job_is_known_again_whatever_the_run_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not is submitted a second time while it runs."""
    given = job_name(replace(presets.load("debug", None, []), name=name), "joint")
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", given)
    monkeypatch.setattr(slurm_cli, "squeue", lambda ids: f"7|RUNNING|n[1-2]|{given}\n")
    assert slurm_cli.look_up({"7": given}) == {"7": Job("7", "RUNNING", "n[1-2]")}
    # one that an earlier version has submitted under the very name
    monkeypatch.setattr(slurm_cli, "squeue", lambda ids: f"7|PENDING|(Dependency)|{name}-joint\n")
    if "\n" not in name:
        assert slurm_cli.look_up({"7": given})["7"] == Job("7", "PENDING", "Dependency")
    monkeypatch.setattr(slurm_cli, "squeue", lambda ids: "7|RUNNING|n1|other-joint\n")
    assert slurm_cli.look_up({"7": given})["7"].state == ""  # another cluster's job of that number


def test_nodes_that_are_not_there_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one node: give slurm\.nodes=1"):
        submitted(tmp_path / "run", "--then", "", *BRIEF, "slurm.nodes=2", cluster="local")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def then(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Words that ask for all that may follow, at the smallest."""
    folder = tmp_path_factory.mktemp("then")
    write_questions(folder / "easyvqa")
    shards = f"{folder}/easyvqa/train-*.tar"
    brief = "--heads linear --augment none --epochs 1 --batch 32 --limit 64 --seeds 1"
    return [
        *("--then", "probe,vlm,evaluate"),
        f"after.probe=--set emoji --data {ROOT / 'hive_scale/data/sample'} {brief}",
        f"after.vlm=--config {recipe(folder, shards)}",
        f"after.evaluate=--tasks easyvqa --data {folder} --max_tokens 2",
    ]


def submitted(run: Path, *words: str, cluster: str = "slurm") -> int:
    """What the command returns, in this process; on Slurm a dry run. `words` begin with ``--then``."""
    plain, resources = split(words[2:])
    plain, more = downstream.split(plain)
    config = presets.load("debug", None, [f"output={run}", *plain])
    then = downstream.read(words[1], more, config)
    asked = read(None, resources, dict.fromkeys([*STAGES, *then], Resources()))
    return submission.submit(config, asked, cluster, then, dry_run=cluster == "slurm")


def test_what_follows_is_written_as_jobs_behind_the_last_stage(
    tmp_path: Path, then: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(tmp_path / "run", *then, "slurm.gpus_per_node=2", "slurm.stages.evaluate.hours=3") == 0
    scripts = {text.split("\n", 1)[0]: text for text in capsys.readouterr().out.split("# ---- ")[1:]}
    assert list(scripts) == [*STAGES, "probe", "vlm", "evaluate"]
    for name, before in (("probe", "joint"), ("vlm", "joint"), ("evaluate", "vlm")):
        assert f"#SBATCH --dependency=afterok:JOB_OF_{before}\n" in scripts[name]
        assert "#SBATCH --ntasks-per-node=2\n" in scripts[name]
    assert "--time=180" in scripts["evaluate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["probe"], "--then probe: data/cifar10: "),
        (["probe", "after.probe=--set emogi"], "--then probe: there is no data set 'emogi': did you mean emoji"),
        (["vlm", "after.vlm=stages.langage.max_steps=2"], "--then vlm: .* did you mean language"),
        (["evaluate", "after.evaluate=--tasks gqua"], "--then evaluate: there is no task 'gqua': did you mean gqa"),
    ],
)
def test_what_would_end_a_later_job_is_met_at_submission(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        submitted(tmp_path / "run", "--then", *words)


@pytest.mark.slow  # a chain of jobs runs in tests/cluster, and one in this process below
def test_the_same_chain_as_local_processes(tmp_path: Path, then: list[str]) -> None:
    run = tmp_path / "run"
    words = ["--preset", "debug", "--cluster", "local", *BRIEF, f"output={run}", "--then", "probe", then[2]]
    shown = command(*words, "slurm.gpus_per_node=2", "slurm.cpus_per_task=1")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert all(is_stage_done(run / stage) for stage in STAGES)
    assert attempted(run) == [(stage, event) for stage in (*STAGES, "probe") for event in ("begin", "end")]
    assert (run / "probes" / "emoji.json").is_file()
    assert command("status", str(run)).stdout.count(" done ") == 4


def attempted(run: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (run / "slurm" / "attempts.jsonl").read_text().splitlines()]
    return [(line["stage"], line["event"]) for line in lines]


def test_the_same_chain_in_one_process_goes_on_to_the_benchmark(
    tmp_path: Path, then: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert submitted(run, *then, *BRIEF, cluster="debug") == 0
    names = [*STAGES, "probe", "vlm", "evaluate"]
    assert all(is_stage_done(place) for place in (*(run / stage for stage in STAGES), run / "vlm" / "language"))
    assert attempted(run) == [(name, event) for name in names for event in ("begin", "end")]
    assert 0 <= json.loads((run / "probes" / "emoji.json").read_text())["results"]["linear"]["mean"] <= 100
    assert json.loads((run / "evaluation" / "results.json").read_text())["easyvqa"]["missing"] == 0
    assert capsys.readouterr().out.count(" done ") == len(names)
    # what is done is not done again, but another evaluation is not the one that is done
    assert submitted(run, *then[:-1], then[-1] + " --limit 2", *BRIEF, cluster="debug") == 0
    assert attempted(run)[12:] == [("evaluate", "begin"), ("evaluate", "end")]
