"""A credential is used to open a shard and is written nowhere: configs contain only its public form.

Why: secrets that a run resolved have been published with its model card, and signed URLs stood in every log. That no
output of a real run contains any is tested in test_security.
"""

from __future__ import annotations

import logging
import os
import pickle
import stat
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tars import pair, write_tar
from test_shard_cache import Remote, remote  # noqa: F401

from hive_scale import config, credentials, presets
from hive_scale.checkpoint.run_reader import Run
from hive_scale.config import DataConfig
from hive_scale.config_merge import without_credentials
from hive_scale.data.index import open_index
from hive_scale.data.shard_cache import ShardCache
from hive_scale.data.shards import expand
from hive_scale.distributed import World
from hive_scale.observability.logging_setup import capture_library_logs
from hive_scale.slurm import downstream as followers
from hive_scale.slurm.chain import Record
from hive_scale.slurm.resources import Resources, read

SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=planted%2Fs3&X-Amz-Expires=60&X-Amz-Signature=planted"
SAS = "sv=2024-11-04&ss=b&srt=co&sp=rl&se=2030-01-01T00:00:00Z&sig=planted%2Babc%3D"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another test's credentials are not this one's."""
    credentials.forget()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config_home"))


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("https://me:planted@host/{0..3}.tar", "https://host/{0..3}.tar"),
        ("3 x https://planted@host:8080/a.tar", "3 x https://host:8080/a.tar"),
        ("https://me:pl@nted@host/a.tar", "https://host/a.tar"),
        ("https://me:planted/with/slashes@host/a.tar", "https://host/a.tar"),
        ("https://me:planted#?x@host/a.tar", "https://host/a.tar"),
        ("HTTPS://ME:PLANTED@HOST/A.TAR", "HTTPS://HOST/A.TAR"),
        ("{https,http}://me:planted@host/a.tar", "{https,http}://host/a.tar"),
        ("s3://key:planted@bucket/a.tar", "s3://bucket/a.tar"),
        (f"https://host/a.tar?{SIGNED}", "https://host/a.tar"),
        (f"https://host/a.tar?versionId=7&{SIGNED}", "https://host/a.tar?versionId=7"),
        (f"https://store.blob.core.windows.net/c/a.tar?{SAS}", "https://store.blob.core.windows.net/c/a.tar"),
        ("https://host/my shards/a.tar?token=planted", "https://host/my shards/a.tar"),
        ("https://host/get?file=a.tar&token=planted&part=2", "https://host/get?file=a.tar&part=2"),
        ("https://host/get?key=set/a.tar&key=planted", "https://host/get?key=set/a.tar"),
        ("https://host/a.tar?AWSAccessKeyId=planted&Signature=planted&Expires=1", "https://host/a.tar"),
        ("https://host/a.tar?Policy=planted&Signature=planted&Key-Pair-Id=planted", "https://host/a.tar"),
        ("https://host/a.tar?GoogleAccessId=planted&Expires=9&Signature=planted", "https://host/a.tar"),
        ("https://host/a.tar?q-sign-algorithm=sha1&q-ak=planted&q-signature=planted", "https://host/a.tar"),
        ("https://host/a.tar?access_token=planted&apikey=planted&accessToken=planted", "https://host/a.tar"),
        ("https://host/a.tar?plantedplantedplanted", "https://host/a.tar"),
        ("https://host/a.tar#token=planted", "https://host/a.tar"),
        ("https://host/a.tar?part=2;token=planted", "https://host/a.tar?part=2"),
        ("https://host/a.tar?%73ig=planted", "https://host/a.tar"),
        ("https://host/v;session=planted/a.tar;v=1;token=planted", "https://host/v/a.tar;v=1"),
        ("https://host/a.tar?part=2;half=1", "https://host/a.tar?part=2;half=1"),
        ("https://host/a.tar?x=1#planted", "https://host/a.tar?x=1"),
        ("zip://a.tar::https://me:planted@host/a.zip?sig=planted", "zip://a.tar::https://host/a.zip"),
        # nothing to hide
        ("https://host/{0000..0099}.tar?download=1", "https://host/{0000..0099}.tar?download=1"),
        ("https://host:8080/me@home/a.tar", "https://host:8080/me@home/a.tar"),
        ("https://[::1]:8080/me@home/a.tar", "https://[::1]:8080/me@home/a.tar"),
        ("abfs://container@account.dfs.core.windows.net/a.tar", "abfs://container@account.dfs.core.windows.net/a.tar"),
        ("/data/me@home/set-????.tar", "/data/me@home/set-????.tar"),
        ("s3://bucket/a#1.tar", "s3://bucket/a#1.tar"),
    ],
)
def test_the_public_form_of_a_pattern(given: str, public: str) -> None:
    data = DataConfig(train=[given])
    assert data.train == [public]
    assert credentials.private(public) == given
    assert DataConfig(train=[public]) == data  # and has no credentials itself
    assert credentials.private(public) == given
    assert "planted" not in credentials.hide(f"cannot open {given.replace(' ', '%20')}")


def test_no_way_of_making_a_config_leaves_a_credential_in_it(tmp_path: Path) -> None:
    url = f"https://me:planted@host/a.tar?{SIGNED}"
    file = tmp_path / "mine.yaml"
    file.write_text(f"preset: debug\ndata: {{train: ['{url}']}}\nstages: {{joint: {{data: {{heldout: ['{url}']}}}}}}\n")
    words = [f"data.heldout=['{url}']", f"stages.language.data.train=['{url}']"]
    made = presets.load(None, file, words)
    by_hand = replace(made, data=replace(made.data, train=[url]))
    for one in (made, by_hand):
        config.save(one, tmp_path / "config.yaml")
        for text in (repr(one), str(pickle.dumps(one)), (tmp_path / "config.yaml").read_text()):
            assert "planted" not in text
            assert text.count("https://host/a.tar") >= 4
    # one saved by an earlier version
    (tmp_path / "config.yaml").write_text(config.to_yaml(made).replace("https://host/a.tar", url))
    assert config.load(tmp_path / "config.yaml") == made


def test_another_signature_is_the_same_run_and_the_newest_is_used() -> None:
    runs = []
    for signature in ("planted_monday", "planted_tuesday"):
        words = [f"data.train=['https://me:{signature}@host/{{0..1}}.tar?sig={signature}&se={signature}']"]
        runs.append(presets.load("debug", None, words))
        assert expand(runs[-1].data.train)[0].shards == ["https://host/0.tar", "https://host/1.tar"]
        assert (
            credentials.place("https://host/1.tar")
            == f"https://me:{signature}@host/1.tar?sig={signature}&se={signature}"
        )
    assert runs[0] == runs[1]
    assert config.differences(*runs) == []


# -- variables ------------------------------------------------------------------------------------------------


def test_the_user_s_own_words_and_file_may_name_a_variable_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "planted" / "a.tar", [("a", pair(1)), ("b", {"txt": b"alone"})])
    write_tar(tmp_path / "planted" / "b.tar", [("c", pair(2))])
    monkeypatch.setenv("BASE", str(tmp_path / "planted"))
    file = tmp_path / "mine.yaml"
    file.write_text("preset: debug\ndata: {heldout: ['${oc.env:BASE}/{a,b}.tar']}\n")
    run = presets.load(None, file, ["data.train=[${oc.env:BASE}/*.tar]"])
    assert credentials.variables() == ["BASE"]
    assert "planted" not in config.to_yaml(run)
    [found], cache = expand(run.data.train), ShardCache(10**9)
    assert found.shards == ["$BASE/a.tar", "$BASE/b.tar"] == expand(run.data.heldout)[0].shards
    index = open_index(found.shards, cache)
    assert index.path.parent == Path(shard).parent
    assert [fault.shard for fault in index.faults] == ["$BASE/a.tar"]
    assert open_index([shard, str(tmp_path / "planted" / "b.tar")], cache).path == index.path
    # on another day, with the variable pointing elsewhere, it is the same run
    monkeypatch.setenv("BASE", str(tmp_path / "elsewhere"))
    assert presets.load(None, file, ["data.train=[${oc.env:BASE}/*.tar]"]) == run
    # in a process that was not told, the saved config reads no variable
    credentials.forget()
    with pytest.raises(ValueError, match=r"'\$BASE/\{a,b\}.tar' is missing .is \$NAME for a variable"):
        expand(run.data.heldout)


def test_a_variable_that_means_another_place_means_other_shards(
    remote: Remote,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote.files = {f"{day}/a.tar": day.encode() for day in ("monday", "tuesday")}
    for day in ("monday", "tuesday"):
        monkeypatch.setenv("BASE", f"{remote.address}/{day}")
        [shard] = expand(presets.load("debug", None, ["data.train=['${oc.env:BASE}/a.tar']"]).data.train)[0].shards
        assert shard == "$BASE/a.tar"
        with os.fdopen(ShardCache(10**9).open(shard), "rb") as file:
            assert file.read() == day.encode()


def test_a_variable_in_the_middle_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPER", "planted")
    words = ["data.train=['https://me:${oc.env:KEEPER}@host/${oc.env:KEEPER}/{0..1}.tar?sig=${oc.env:KEEPER}']"]
    run = presets.load("debug", None, words)
    assert run.data.train == ["https://host/$KEEPER/{0..1}.tar"]
    assert expand(run.data.train)[0].shards == ["https://host/$KEEPER/0.tar", "https://host/$KEEPER/1.tar"]
    assert credentials.place("https://host/$KEEPER/0.tar") == "https://me:planted@host/planted/0.tar?sig=planted"


@pytest.mark.parametrize(
    "word",
    [
        "name=${oc.env:PLANTED}",
        "output='${oc.env:PLANTED}'",
        "model.vision.path=${oc.env:PLANTED}",
        "model.language.config.extra='${oc.env:PLANTED}'",
        "data.tokenizer.path='a${oc.env:PLANTED}'",
        "data.train=['${oc.decode:a}']",
        "data.train=['${oc.create:a}/b.tar']",
        "data.train=['${oc.env:PLANTED,default}/b.tar']",
        "data.train=['${oc.env:${name}}/b.tar']",
        "stages.joint.data.tokenizer.path='${oc.env:PLANTED}'",
        "stages.joint.global_batch='${oc.env:PLANTED}'",
        "model.vision.config.a='\\${oc.env:PLANTED}'",
    ],
)
def test_nothing_else_may_name_one(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "planted")
    with pytest.raises(ValueError, match=r"\$\{oc") as refused:
        presets.load("debug", None, [word])
    assert "planted" not in str(refused.value)


def test_a_preset_s_own_argument_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "planted")
    with pytest.raises(ValueError, match="would be written into the run"):
        presets.load("vlm_small", None, ["encoder=${oc.env:PLANTED}"])


def test_a_cluster_s_profile_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "planted-token")
    for word in ("slurm.account=${oc.env:PLANTED_TOKEN}", "slurm.setup=['export A=planted-token']"):
        with pytest.raises(ValueError, match=r"config: (account|setup\.0)"):
            read(None, [word], {"joint": Resources()})


@pytest.mark.parametrize(
    "word",
    [
        "slurm.setup=['export WANDB_API_KEY=planted0123']",
        "slurm.setup=['module load cuda', 'export A=1 my_password=\"planted0123\"']",
        "slurm.python=env HF_TOKEN=planted0123 python",
    ],
)
def test_a_secret_that_a_job_s_script_would_set_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="looks like a secret") as refused:
        read(None, [word], {"joint": Resources()})
    assert "planted" not in str(refused.value)


def test_a_job_s_script_may_say_where_a_secret_lies() -> None:
    lines = ["export HF_TOKEN=$(cat ~/.token)", "export A_KEY=$B_KEY", "export A_KEY_FILE=/home/me/key", "MAX_TOKEN=9"]
    assert read(None, [f"slurm.setup={lines}"], {"joint": Resources()})["joint"].setup == lines


def test_keys_of_the_same_config_may_be_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: debug\nname: mine\noutput: runs/${name}\ndata: {heldout: '${data.train}'}\n")
    run = presets.load(None, file, ["data.train=[a.tar]"])
    assert (run.output, run.data.heldout) == ("runs/mine", ["a.tar"])


@pytest.mark.parametrize("value", ["", "/data/{0..3}.tar", "/data/*.tar", "${oc.env:HOME}"])
def test_a_variable_stands_for_itself_alone(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE", value)
    with pytest.raises(ValueError, match="variable BASE must hold text"):
        presets.load("debug", None, ["data.train=['${oc.env:BASE}']"])
    monkeypatch.delenv("BASE")
    with pytest.raises(ValueError, match="no variable BASE: set it"):
        presets.load("debug", None, ["data.train=['${oc.env:BASE}']"])


# -- what a run or a stranger wrote ---------------------------------------------------------------------------

REFERENCES = ("${oc.env:PLANTED}", "${name}", "x${oc.decode:1}", "\\${oc.env:PLANTED}", "${oc.env:PLANTED,}")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PLANTED", "planted")
    return "PLANTED"


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("key", ["data.train", "data.heldout", "model.vision.path", "stages.joint.data", "output"])
def test_a_saved_config_refers_to_nothing(reference: str, key: str, tmp_path: Path, planted: str) -> None:
    old, new = {
        "data.train": ("sample:train", reference),
        "data.heldout": ("sample:heldout", f"https://host/{reference}/a.tar"),
        "model.vision.path": ("path: ''", f"path: '{reference}'"),
        "stages.joint.data": ("data: null", f"data: {{train: ['{reference}']}}"),
        "output": ("output: runs/{name}", f"output: 'runs/{reference}'"),
    }[key]
    saved = tmp_path / "config.yaml"
    text = config.to_yaml(presets.load("debug", None, []))
    assert old in text
    saved.write_text(text.replace(old, new, 1).replace(f"- {reference}", f"- '{reference}'"))
    opened = [lambda: Run(tmp_path), lambda: config.run_of(str(tmp_path)), lambda: presets.load(None, saved, [])]
    for opens in opened:
        with pytest.raises(ValueError, match="refers to no variable, file or code") as refused:
            opens()
        assert "planted" not in str(refused.value)


def test_a_run_s_config_is_one_by_its_place_too(tmp_path: Path, planted: str) -> None:
    """A stranger may have left out most of its keys, and named a preset."""
    saved = tmp_path / "config.yaml"
    saved.write_text("preset: debug\ndata: {train: ['https://host/${oc.env:PLANTED}.tar']}\n")
    assert presets.load(None, saved, []).data.train == ["https://host/$PLANTED.tar"]
    (tmp_path / "initial").mkdir()
    with pytest.raises(ValueError, match="refers to no variable"):
        presets.load(None, saved, [])


# -- secrets where none belong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "name=planted-token",
        "data.train=['https://host/planted-token/a.tar']",
        "model.language.config.auth_token=planted",
        "model.language.config.note=hf_abcdefghijklmnopqrstuvwxyz",
        "model.vision.path=https://me:planted@host/model",
    ],
)
def test_a_secret_in_a_value_is_refused(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    with pytest.raises(ValueError, match="written") as refused:
        presets.load("debug", None, [word])
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    "word", ["data.train.0=https://me:planted@host/a.tar", "data.train=['https://me:planted@h/a.tar"]
)
def test_messages_about_words_have_no_credentials(word: str) -> None:
    with pytest.raises(ValueError, match=r"a list is wanted|not YAML") as refused:
        presets.load("debug", None, [word])
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("key", ["data.train", "data.heldout", "stages.joint.data.train"])
def test_one_text_in_place_of_a_list_is_kept_without_credentials(key: str, tmp_path: Path) -> None:
    url = "https://me:planted@host/{0..9}.tar"
    file = tmp_path / "mine.yaml"
    file.write_text(f"preset: debug\n{key.replace('.', ': {')}: {url}{'}' * key.count('.')}\n")
    for run in (presets.load("debug", None, [f"{key}={url}"]), presets.load(None, file, [])):
        assert "planted" not in config.to_yaml(run)
        assert "https://host/{0..9}.tar" in config.to_yaml(run)
    assert "planted" not in str(DataConfig(train=url).train)  # type: ignore[arg-type]
    assert "planted" not in without_credentials(f"{key}={url}", config.Config)


# -- fetching -------------------------------------------------------------------------------------------------


def test_user_and_password_of_a_url_are_used_and_not_told(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    remote.files["a.tar"], remote.login = os.urandom(5000), "Basic " + b64encode(b"me:pl@nted").decode()
    shard = expand(DataConfig(train=[remote.address.replace("://", "://me:pl%40nted@") + "/a.tar"]).train)[0].shards[0]
    assert shard == f"{remote.address}/a.tar"
    with os.fdopen(ShardCache(10**9, pause=0.001).open(shard), "rb") as file:
        assert file.read() == remote.files["a.tar"]
    for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.tar"):
        path.unlink()
    remote.login = "another"
    with pytest.raises(OSError, match=r"a\.tar cannot be fetched .*401.*the command gives them each time") as refused:
        ShardCache(10**9).open(shard)
    assert "nted" not in str(refused.value)


def test_a_redirect_takes_no_password_along(remote: Remote) -> None:  # noqa: F811
    remote.files["b.tar"], remote.redirect = b"x" * 100, {"/a.tar": f"{remote.address}/b.tar"}
    url = remote.address.replace("://", "://me:planted@") + "/a.tar"
    os.close(ShardCache(10**9).open(expand([url])[0].shards[0]))
    assert remote.authorized == ["/a.tar"]


def test_an_s3_key_in_a_url_reaches_its_client(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("s3fs", reason="pip install 'hive_scale[s3]'")
    import fsspec

    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": remote.address})
    remote.files["bucket/a.tar"] = os.urandom(3000)
    [shard] = expand(["s3://AKIDEXAMPLE:planted@bucket/a.tar"])[0].shards
    assert shard == "s3://bucket/a.tar"
    os.close(ShardCache(10**9).open(shard))
    assert all("AKIDEXAMPLE/" in header for header in remote.authorizations)
    assert remote.authorizations


def test_what_a_store_s_client_logs_is_told_without_credentials(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    url = DataConfig(train=[f"https://me:planted-password@host/a.tar?{SIGNED}"]).train[0]
    with capture_library_logs(tmp_path, World(0, 1, torch.device("cpu")), level="debug"):
        log = logging.getLogger("urllib3")
        log.warning("GET %s", credentials.private(url))
        log.debug("Authorization: me:planted-password, planted-token, %2Fs3", extra={})
    told = (tmp_path / "rank_00000.log").read_text() + "".join(capfd.readouterr())
    assert "planted" not in told
    assert told.count("GET https://host/a.tar") == 2


# -- jobs -----------------------------------------------------------------------------------------------------


def test_jobs_find_credentials_in_a_file_that_only_the_user_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPER", "resolved")
    given = ["https://me:planted@host/a.tar", "https://host/${oc.env:KEEPER}/b.tar"]
    run = presets.load("debug", None, [f"data.train={given}", f"output={tmp_path}/run"])
    old = os.umask(0)
    try:
        credentials.keep(run.run_dir)
    finally:
        os.umask(old)
    kept = credentials.store(run.run_dir)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert "resolved" not in kept.read_text()
    assert not kept.is_relative_to(run.run_dir)
    credentials.forget()  # as another process
    credentials.recall(tmp_path / "other")
    assert credentials.private("https://host/a.tar") == "https://host/a.tar"
    credentials.recall(run.run_dir)
    assert [credentials.private(one) for one in run.data.train] == [given[0], "https://host/resolved/b.tar"]
    assert "planted" not in credentials.hide("it says planted")
    kept.write_text("{")
    credentials.recall(run.run_dir)  # cut off: the shards are asked for without, and say that they want them


def test_words_for_what_follows_are_written_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPER", "resolved")
    run = presets.load("debug", None, [f"output={tmp_path}"])
    words = 'data.train=\'["https://me:planted@host/{0..1}.tar", "${oc.env:KEEPER}/a.tar"]\' --preset vlm_small'
    then = followers.read("vlm", [f"after.vlm={words}"], run)
    assert "planted" not in str(then)
    data = next(word for word in then["vlm"].words if word.startswith("data.train="))
    loaded = presets.load("debug", None, [data]).data.train
    assert loaded == ["https://host/{0..1}.tar", "$KEEPER/a.tar"]
    assert credentials.private(loaded[0]) == "https://me:planted@host/{0..1}.tar"
    assert credentials.private(loaded[1]) == "resolved/a.tar"
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    for word in ("--lmms_args=planted-token", "https://me:planted@host/a.tar", "name=planted-token"):
        with pytest.raises(ValueError, match="written"):
            followers.read("vlm", [f"after.vlm={word}"], run)
    record = Record(then={"vlm": {"launcher": "finetune_vlm", "after": "joint", "words": ["name=${oc.env:KEEPER}"]}})
    with pytest.raises(ValueError, match="refers to no variable"):
        record.followers()


def test_a_config_without_credentials_keeps_no_file(tmp_path: Path) -> None:
    credentials.keep(presets.load("debug", None, [f"output={tmp_path}"]).run_dir)
    assert not credentials.store(tmp_path).exists()
