"""Figures show the right numbers, bad requests are answered with the valid choices, and the report works in a real
browser: every plot present, text selectable, light, dark, and on a phone.
"""

from __future__ import annotations

import gzip
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import ranks
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.cuda._memory_viz import segsum
from torch.cuda._memory_viz import trace as trace_of

from hive_scale import config as configs
from hive_scale import presets
from hive_scale.batch import Sample, collate
from hive_scale.config import Config, GroupConfig, PartConfig, StageConfig
from hive_scale.distributed import Fragment, World, session
from hive_scale.engine.optimizer import optimizer_kind
from hive_scale.model.build import init_model
from hive_scale.observability.console import console
from hive_scale.observability.layer_stats import layer_grad_rms, layer_of
from hive_scale.observability.profiler import ROWS
from hive_scale.pipeline import run_pipeline
from hive_scale.preflight import open_data
from hive_scale.report import report as reports
from hive_scale.report.attention_maps import attention_maps, choose, words_at
from hive_scale.report.curves import History, by_component, curves, thin
from hive_scale.report.gradient_maps import concentration, gradient_maps
from hive_scale.report.run_view import RunView, pairs_of
from hive_scale.report.svg import bare, draw

ROOT = Path(__file__).resolve().parents[1]
LLM = tiny.language(vocab_size=259, hidden_size=32)


def small(output: Path, fusion: str, *names: str, **changes: Any) -> Config:
    """The debug preset's stages of those `names`, two steps each."""
    run = presets.load("debug", None, [f"fusion={fusion}", f"output={output}"])
    model = replace(
        run.model, vision=PartConfig(config=tiny.SIGLIP), language=PartConfig(config=LLM), encoder_layer_ratio=0.5
    )
    stages = {name: replace(stage, max_steps=2, global_batch=8, micro_batch=4) for name, stage in run.stages.items()}
    stages = {name: stages[name] for name in names}
    return replace(run, model=model, stages=stages, blank_image_control=False, eval_interval=1, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunView]:
    """A HIVE and a baseline, trained for two steps a stage, with a dozen images to look at."""
    import webdataset

    folder = tmp_path_factory.mktemp("runs")
    pairs = open_data(replace(presets.debug(), output=str(folder))).heldout
    with webdataset.TarWriter(str(folder / "some.tar")) as writer:
        for i in range(12):
            pixels = pairs.sample(i).pixels
            assert pixels is not None
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            writer.write({"__key__": f"{i:03d}", "jpg": image, "txt": pairs.caption(i), "json": {}})
    made = []
    with session() as world:
        for name, fusion, *names in (
            ("hive", "cross_attention", "projector", "joint"),
            ("baseline", "concat", "joint"),
        ):
            config = small(folder / name, fusion, *names)
            data = replace(config.data, heldout=[str(folder / "some.tar")])
            run_pipeline(replace(config, data=data), world)
            made.append(RunView(folder / name))
    return made


def test_gradients_are_those_of_each_blocks_output() -> None:
    """As torch itself keeps them in the backward of a training step, sample by sample."""
    model = init_model(tiny.model_config(), seed=0).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.5)
    batch = tiny.batch(2)
    maps = gradient_maps("x", model, batch)
    outputs: list[torch.Tensor] = []
    for layer in model.vision.encoder.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output) or output.retain_grad())
    model(**batch.inputs()).backward()
    assert maps.norms.shape == (2, max(model.encoder_depths), 16)
    for layer, output in enumerate(outputs):
        torch.testing.assert_close(maps.norms[:, layer], output.grad.norm(dim=-1))
    assert maps.norms.gt(0).all()


def test_concentration_of_an_even_and_a_single_patch() -> None:
    norms = torch.stack([torch.ones(16), torch.eye(16)[5]])[None]
    found = concentration(norms)
    assert found["entropy"] == pytest.approx([1.0, 0.0], abs=1e-5)
    assert found["top_tenth"] == pytest.approx([2 / 16, 1.0])


def test_dollars_in_captions_are_no_mathematics_and_odd_characters_no_broken_file() -> None:
    text = "from $5 to $10 or $x^2$"

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        bare(axes, text + " \x08\ud83d")
        axes.set_ylabel(text)
        axes.plot([1, 2], [1e-5, 1.0], label=f"run {text}")
        axes.set_yscale("log")
        figure.legend(loc="outside lower center")

    svg = ElementTree.fromstring(draw(3, 3, paint))
    written = ["".join(one.itertext()).strip() for one in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {text + " \ufffd\ufffd", text, f"run {text}"} <= {*written}
    assert not [one for one in written if "mathdefault" in one], "the ticks of the axis are set as powers"


def test_a_legend_names_every_curve_whatever_it_is_called() -> None:
    lines = [
        {"step": i, "samples": i, "loss": 1.0, "seconds": 0.1, "lr": {"_mine": 1e-3, "$b$": 1e-3}} for i in range(1, 4)
    ]
    two = curves([History(name, {"stage": lines}) for name in ("_run", "run $1$")])
    assert "_run" in two["Training loss"]
    assert "run $1$: _mine" in two["Learning rates"]
    one = curves([History("_run", {"stage": lines})])["Learning rates"]
    assert "_mine" in one
    assert "$b$" in one


@pytest.mark.parametrize("side", [32, 37])
def test_maps_lie_on_the_part_of_the_image_that_patches_cover(side: int) -> None:
    config = tiny.model_config()
    config = replace(config, vision=PartConfig(config=tiny.SIGLIP | {"image_size": side}))
    model, pixels = init_model(config, seed=0), torch.zeros(3, side, side, dtype=torch.uint8)
    shown = attention_maps(model, pixels, [1, 2, 3], [("word", [1, 2])], "word")
    assert shown.pixels.shape == (3, 32, 32)
    assert {len(weights) for maps in shown.maps.values() for weights in maps} == {16}
    batch = collate([Sample("k", pixels, [1, 2, 3], [False, True, True])], 0, side)
    assert gradient_maps("run", model, batch).pixels.shape == (1, 3, 32, 32)


def test_words_find_their_tokens_and_a_missing_one_lists_those_there_are() -> None:
    data = open_data(replace(presets.debug(), output="unused"))
    text = "café: a red cat, a dog"
    words = words_at(data.tokenizer.encode(text, 77), data.tokenizer.decode)
    assert [word for word, _ in words] == ["café", "a", "red", "cat", "a", "dog"]
    assert dict(words)["red"] == [10, 11, 12]  # a byte each, after the start token; é takes two
    assert choose(words, ["CAT"]) == [words[3]]
    with pytest.raises(ValueError, match="'cow' is not in the text, whose words are café, a, red, cat, dog"):
        choose(words, ["cow"])


def test_gauges_are_the_moments_and_gates_summed_over_ranks() -> None:
    model = init_model(tiny.model_config(), seed=0)
    name = "fusion.layers.1.gate"
    fragments = [
        Fragment(name, "master", (1,), 0, torch.tensor([0.5])),
        Fragment(name, "exp_avg_sq", (1,), 0, torch.tensor([0.19])),
        Fragment("vision.encoder.layers.0.mlp.fc1.bias", "exp_avg_sq", (2,), 0, torch.tensor([0.95])),
        Fragment("vision.encoder.layers.0.mlp.fc1.bias", "exp_avg_sq", (2,), 1, torch.tensor([0.76])),
        Fragment("vision.encoder.layers.0.mlp.fc1.bias", "exp_avg", (2,), 0, torch.tensor([5.0, 5.0])),
    ]
    adamw = StageConfig({"all": GroupConfig(["*"], 1e-3)}, betas=(0.8, 0.9))
    factor = partial(optimizer_kind(adamw).square_factor, stage=adamw)
    found = layer_grad_rms(model, fragments, 2, factor, World(0, 1, torch.device("cpu")))
    assert found["gates"] == pytest.approx({"0": 0.0, "1": 0.46211716})
    assert found["grad_rms"]["vision.0"] == pytest.approx(3.0)  # (0.95 + 0.76) / (1 - 0.9**2) = 9
    assert found["grad_rms"]["fusion.1"] == pytest.approx(1.0)
    behind = {"vision.encoder.layers.0.mlp.fc1.bias": 3}  # steps of the stage before, in its moments alone
    found = layer_grad_rms(model, fragments, 2, factor, World(0, 1, torch.device("cpu")), behind)
    assert found["grad_rms"]["vision.0"] == pytest.approx((1.71 / (1 - 0.9**5)) ** 0.5)
    assert found["grad_rms"]["fusion.1"] == pytest.approx(1.0)
    assert layer_of("language.model.embed_tokens.weight") == "language"
    assert by_component({"vision.0": 3.0, "vision": 4.0}) == {"vision": 5.0}


def test_curves_of_stages_follow_each_other_and_long_ones_are_averaged() -> None:
    stages = {"a": [{"samples": 8}, {"samples": 16}], "b": [{"samples": 8}]}
    history = History("x", stages)
    assert [x for x, _ in history.points()] == [8, 16, 24]
    assert history.borders() == [16]
    assert thin([(float(i), float(i)) for i in range(8)], most=2) == ([1.5, 5.5], [1.5, 5.5])


def _profiled(world: World, folder: str) -> str:
    """What rank 0 shows of two steps on several ranks, the second profiled."""
    run = small(Path(folder), "cross_attention", "joint")
    with console.capture() as shown:
        run_pipeline(replace(run, profile=configs.ProfileConfig("2:3")), world)
    return shown.get()


def test_a_profiled_step_leaves_trace_and_snapshot_per_rank_and_shows_ten_operators(tmp_path: Path) -> None:
    shown, nothing = ranks.run(_profiled, 2, str(tmp_path))
    shown = shown[shown.index("time of its own") :]
    assert re.search(r"^│ (vision|fusion|language) +│ forward +│ FSDP::all_gather", shown, re.MULTILINE)
    assert shown.count("%") == ROWS
    assert not nothing
    folder = tmp_path / "joint" / "profile"
    for rank in range(2):
        trace = json.loads(gzip.decompress((folder / f"trace_rank_{rank:05d}.json.gz").read_bytes()))["traceEvents"]
        names = {event.get("name") for event in trace}
        assert {"hive_scale: vision", "hive_scale: fusion", "hive_scale: language", "[memory]"} <= names
        snapshot = pickle.loads((folder / f"memory_rank_{rank:05d}.pickle").read_bytes())
        (events,) = snapshot["device_traces"]
        alive: dict[int, int] = {}
        for event in events:
            if event["action"] == "alloc":
                alive[event["addr"]] = event["size"]
            elif event["action"] == "free_completed":
                alive.pop(event["addr"], None)
        assert {segment["address"]: segment["total_size"] for segment in snapshot["segments"]} == alive
        assert f"segments: {len(alive)}\n" in segsum(snapshot)  # as torch itself reads it
        assert f"{len(events)} entries\n" in trace_of(snapshot)
        around = [" ".join(frame["name"] for frame in event["frames"]) for event in events]
        for name in ("hive_scale: vision", "hive_scale: fusion", "Backward0"):
            assert any(name in names for names in around)


def test_two_runs_beside_each_other(runs: list[RunView], tmp_path: Path) -> None:
    maps = [reports.gradients(run, run.heldout(2)) for run in runs]
    written = reports.save_gradients(maps, [run.history() for run in runs], tmp_path / "gradients.svg")
    text = written[0].read_text()
    assert text.count("<image") == sum(2 * 2 * (1 + 2 * run.norms.shape[1]) // 2 for run in maps)
    assert ">hive<" in text
    assert ">baseline<" in text
    numbers = json.loads(written[1].read_text())
    assert set(numbers) == {"hive", "baseline"}
    assert all(0 <= value <= 1 for value in numbers["hive"]["entropy"])


def visualize(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launchers/visualize.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_attention_by_command(runs: list[RunView], tmp_path: Path) -> None:
    output = str(tmp_path / "attention.svg")
    done = visualize("attention", str(runs[0].dir), "--caption", "a red cat", "--tokens", "red,cat", "--output", output)
    assert done.returncode == 0, done.stderr
    text = Path(output).read_text()
    assert text.count("<image") == 2 * (1 + 2 * 2)  # layers x (the image, and both layers of each map)
    assert ">red<" in text


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda runs, _: RunView(runs[0].dir / "joint"), "is no run, for it has no config.yaml"),
        (lambda runs, _: runs[0].model("joined"), "no stage 'joined': there are projector, joint, initial"),
        (lambda runs, new: RunView(new).model(), "no finished stage: train it to its end"),
        (lambda runs, _: runs[0].read_image(ROOT / "README.md"), "README.md: .*: give a JPEG, PNG or WebP"),
        (
            lambda runs, _: runs[0].read_image(Path("nowhere.png")),
            "nowhere.png is not there: there is no 'nowhere.png' in ",
        ),
        (lambda runs, _: pairs_of(runs[0], [Path("a.png")], [], 1), "has no caption.*write a.txt"),
        (lambda runs, _: pairs_of(runs[0], [Path("a.png")], ["a", "b"], 1), "2 captions for 1 images"),
        (
            lambda runs, _: reports.attention(runs[0], runs[0].heldout(1)[0][0], "a cat", layers=[1]),
            "--layers: 1 does not attend to patches; those that do: 2, 4",
        ),
        (lambda runs, _: reports.attention(runs[0], runs[0].heldout(1)[0][0], "a cat", head=9), "none of 0 to 3"),
    ],
)
def test_bad_requests_say_what_there_is(runs: list[RunView], tmp_path: Path, act: Any, message: str) -> None:
    configs.save(small(tmp_path, "cross_attention", "projector"), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=message):
        act(runs, tmp_path)


def test_a_run_under_way_is_reported_with_what_it_has(tmp_path: Path) -> None:
    configs.save(small(tmp_path, "cross_attention", "projector"), tmp_path / "config.yaml")
    (tmp_path / "projector").mkdir()
    line = {"step": 1, "samples": 8, "loss": 2.0, "grad_norm": 1.0, "lr": {"a": 0.1}, "seconds": 1, "data_seconds": 0}
    (tmp_path / "projector" / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "lo')
    fault = {"shard": "a.tar", "key": "7", "reason": "no image"}
    (tmp_path / "bad_samples.jsonl").write_text(json.dumps(fault) + "\n")
    found = reports.report([RunView(tmp_path)], look=False)
    assert [(row["reason"], row["samples"], row["such as"]) for row in found.faults] == [("no image", "1", "a.tar: 7")]
    assert any("line 2 is cut off" in note for note in found.notes)
    assert "Training loss" in found.plots
    reports.save_report(found, tmp_path / "report.html", tmp_path / "plots")
    assert "--ink" in (tmp_path / "plots" / "training_loss.svg").read_text()


# -- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(runs: list[RunView], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    reports.save_report(reports.report(runs, images=2), path)
    return path


def test_the_report_needs_nothing_else(report: Path) -> None:
    text = report.read_text()
    assert "<script" not in text
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")>\s]+)', text)
    assert all(link.startswith(("data:", "#")) for link in links), set(links)
    figures = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in text.split("<svg")[1:]]
    assert sum(map(len, figures)) == len(set().union(*figures))  # no figure takes another's parts for its own
    for word in ("hive", "baseline", "Held-out loss", "Gates", "bad samples", "the truth", "MB per process"):
        assert word in text, word


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "dark")])
def test_the_report_in_chromium(browser: Any, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    assert not errors
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    wanted = re.findall(r'data-plot="([^"]+)"', report.read_text())
    boxes = page.eval_on_selector_all(
        "figure[data-plot] > svg", "found => found.map(svg => svg.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == len(wanted) >= 10
    assert all(box["width"] > 150 and box["height"] > 60 for box in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out on a phone
    text = page.locator("figure[data-plot='Training loss'] svg text", has_text="samples").first
    assert float(text.evaluate("node => node.getBoundingClientRect().height")) >= 8  # can be read
    selected = text.evaluate("node => { const s = getSelection(); s.selectAllChildren(node); return s.toString(); }")
    assert selected == "samples"
    ink, paper = (
        sum(int(part) for part in re.findall(r"\d+", colour)[:3])
        for colour in (
            text.evaluate("node => getComputedStyle(node).fill"),
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
        )
    )
    assert (ink > paper + 300) if scheme == "dark" else (paper > ink + 300)
    page.close()
