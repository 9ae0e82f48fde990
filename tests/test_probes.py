"""A probe says something about the encoder only if it is what it claims to be: attention as in PyTorch, each rate of
the grid as if alone, settings chosen without the test images, the same on any number of processes.
"""

from __future__ import annotations

import multiprocessing
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel, SiglipVisionModel

from hive_scale.commands import probe
from hive_scale.config import PartConfig
from hive_scale.data.transform import fitted
from hive_scale.distributed import World
from hive_scale.evaluate.classification_datasets import ClassificationDataset, Split, open_dataset
from hive_scale.evaluate.encoder import Cache, Encoder, LabelledImages, Source, cut
from hive_scale.evaluate.probe_runner import ProbeConfig, ProbeRunner, chosen, read_results, save, summarise, warnings
from hive_scale.evaluate.probes import (
    RATES,
    AttentiveProbe,
    LinearProbe,
    ProbeGrid,
    Recipe,
    nearest_neighbours,
    normalised,
)
from hive_scale.export.huggingface import export_encoder
from hive_scale.model.build import init_model

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
RECIPE = Recipe(rates=(1e-2, 1e-5), epochs=6, min_steps=0, batch=32, min_lr=1e-6)
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (200, 40, 40)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.stock_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of three colours, 40 of each to train on and 20 to test."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + noise.normal(0, 40, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_the_attentive_probe_is_multihead_attention_of_one_query() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(128, 5)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    features = torch.randn(3, 7, 128) * 2 + 1
    normal = F.layer_norm(features, (128,), probe.gain, probe.bias, eps=1e-6)
    pooled, _ = probe.attention(probe.query.expand(3, 1, 128), normal, normal)
    torch.testing.assert_close(probe(normalised(features)), probe.classify(pooled[:, 0]))


def test_the_linear_probe_reads_the_mean_of_normalised_features() -> None:
    torch.manual_seed(0)
    probe = LinearProbe(16, 4)
    with torch.no_grad():
        probe.gain.mul_(torch.rand(16))
        probe.bias.add_(torch.randn(16))
    features = torch.randn(3, 7, 16)
    normal = F.layer_norm(features, (16,), probe.gain, probe.bias, eps=1e-6)
    torch.testing.assert_close(probe(normalised(features)), probe.classify(normal.mean(1)))


def test_each_rate_of_the_grid_trains_as_if_alone() -> None:
    """Against plain PyTorch: cross-entropy, clipping at its own norm, AdamW, warm-up and cosine to the minimum."""
    recipe = replace(RECIPE, rates=(1e-2, 1e-3), max_grad_norm=0.05, weight_decay=0.1, warmup_epochs=3, epochs=6)
    grid = ProbeGrid(["attentive", "linear"], 64, 3, recipe, seed=4, world=ALONE)
    torch.manual_seed(4)
    alone = AttentiveProbe(64, 3)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.1)
    rates = [5e-4, 1e-3, 1e-3 * (1e-3 + (1 - 1e-3) / 2), 1e-6]  # two steps up, two down
    for step, rate in enumerate(rates):
        torch.manual_seed(step)
        features, labels = torch.randn(8, 5, 64), torch.randint(3, (8,))
        grid.step(features, labels, 8, step, len(rates))
        optimizer.zero_grad()
        F.cross_entropy(alone(normalised(features)), labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    made = grid.probes[grid.keys.index(("attentive", 1e-3))]
    for one, other in zip(made.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_part_of_a_batch_gives_its_part_of_the_gradient() -> None:
    """Whatever sizes the parts have: each image counts as one of the whole batch."""
    recipe = replace(RECIPE, max_grad_norm=1e9)
    torch.manual_seed(0)
    features, labels = torch.randn(5, 4, 64), torch.randint(3, (5,))
    parts = []
    for one in (slice(0, 5), slice(0, 2), slice(2, 5)):
        grid = ProbeGrid(["attentive", "linear"], 64, 3, recipe, seed=0, world=ALONE)
        grid.step(features[one], labels[one], 5, 0, 10)
        parts.append([p.grad for probe in grid.probes for p in probe.parameters() if p.grad is not None])
    for whole, first, second in zip(*parts, strict=True):
        torch.testing.assert_close(first + second, whole, atol=1e-6, rtol=1e-4)
    torch.manual_seed(0)
    alone = LinearProbe(64, 3)
    F.cross_entropy(alone(normalised(features)), labels).backward()  # type: ignore[no-untyped-call]
    assert alone.classify.bias.grad is not None
    torch.testing.assert_close(parts[0][-1], alone.classify.bias.grad)


def test_neighbours_vote_by_similarity() -> None:
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 2.0]])
    labels = torch.tensor([0, 0, 1, 1])
    asked = torch.tensor([[2.0, 0.1], [0.0, 0.3]])
    assert nearest_neighbours(known, labels, asked, 2, neighbours=3).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("cosine", "vote"),
    [(0.96, 0), (0.94, 1)],  # of one at 1 against two: exp(1 / 0.07) = 2 exp(cosine / 0.07) at 1 - 0.07 ln 2 = 0.951
)
def test_two_neighbours_outvote_one_that_is_little_nearer(cosine: float, vote: int) -> None:
    other = [cosine, (1 - cosine**2) ** 0.5]
    known = torch.tensor([[5.0, 0.0], other, [3 * value for value in other], [0.0, -9.0]])  # lengths do not count
    asked = torch.tensor([[7.0, 0.0]])
    assert nearest_neighbours(known, torch.tensor([1, 0, 0, 1]), asked, 2).tolist() == [vote]


@torch.no_grad()
def test_what_is_read_is_the_hidden_state_that_transformers_shows(encoder: Path, tmp_path: Path) -> None:
    config = replace(tiny.model_config(), vision=PartConfig(config=tiny.CLIP))
    export_encoder(config, dict(init_model(config, 0).named_parameters()), tmp_path, "crop")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    for kind, path, mean, std, first in (
        (SiglipVisionModel, encoder, torch.full((3,), 0.5), torch.full((3,), 0.5), 0),
        (CLIPVisionModel, tmp_path, *clip, 1),  # after its class token
    ):
        normal = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        states = kind.from_pretrained(path)(normal, output_hidden_states=True).hidden_states
        assert len(states) == 5
        for depth, place in ((-2, 3), (-1, 4), (0, 0), (1, 1)):
            made = Encoder(path, ALONE.device, depth=depth)(pixels)
            torch.testing.assert_close(made, states[place][:, first:], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(Encoder(path, ALONE.device)(pixels), states[3][:, first:], atol=1e-5, rtol=1e-4)


def test_each_image_is_augmented_in_its_own_way_in_each_epoch(images: Path) -> None:
    data = open_dataset("folder", images)
    alike = Split("train", 2, lambda i: data.train.read(0))
    places = [(place, (seed, epoch)) for place in (0, 1) for seed in (0, 1) for epoch in (0, 1)]
    made = [LabelledImages(alike, 32, "resize")[place, draw][0] for place, draw in places]
    assert len({one.numpy().tobytes() for one in made}) == len(places)
    again = [LabelledImages(alike, 32, "resize")[place, draw][0] for place, draw in places]
    assert all(map(torch.equal, made, again))


def test_features_beyond_float16_are_kept_finite_and_augmented_ones_are_not_read_from_disk(
    encoder: Path, images: Path, tmp_path: Path
) -> None:
    model, data = Encoder(encoder, ALONE.device, depth=0), open_dataset("folder", images)
    with torch.no_grad():
        model.tower.get_parameter("embeddings.position_embedding.weight").mul_(1e6)
    source = Source(model, data.test, workers=0)
    [(plain, labels)] = source.batches([np.arange(60)])
    assert plain.abs().max() > 65504
    source.cache = Cache(tmp_path, "these", source, np.arange(60), ALONE)
    [(kept, told)] = source.batches([np.arange(60)])
    torch.testing.assert_close(kept, plain.clamp(-65504, 65504), atol=1e-3, rtol=1e-3)
    assert torch.equal(labels, told)
    [(drawn, _)] = source.batches([np.arange(60)], (0, 0))
    assert not torch.equal(drawn.clamp(-65504, 65504), kept)


def test_workers_stay_from_one_epoch_to_the_next(encoder: Path, images: Path) -> None:
    data = open_dataset("folder", images)
    model = Encoder(encoder, ALONE.device)
    groups = [np.arange(4), np.arange(4, 8)]
    alone, shared = Source(model, data.train, workers=0), Source(model, data.train, workers=1)
    workers = []
    for draw in ((0, 0), (0, 1), None):
        for one, other in zip(shared.batches(groups, draw), alone.batches(groups, draw), strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
        workers.append([worker.pid for worker in multiprocessing.active_children()])
    assert workers[0] == workers[1] == workers[2]
    assert len(workers[0]) == 1
    del shared
    assert not multiprocessing.active_children()


def run(world: World, encoder: Path, images: Path, folder: Path, augment: bool) -> dict[str, Any]:
    plan = ProbeConfig(("attentive", "linear"), RECIPE, seeds=(0, 1), augment=augment, neighbours=True)
    data = open_dataset("folder", images)
    return ProbeRunner(Encoder(encoder, world.device), data, plan, world, folder).run()


def parted(world: World, encoder: Path, images: Path, folder: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """A run on this rank's parts, and probes after two steps on parts of five and two images, or on all."""
    grid = ProbeGrid(["attentive", "linear"], 64, 3, RECIPE, seed=0, world=world)
    made = torch.Generator().manual_seed(0)
    for step in range(2):
        features, labels = torch.randn(7, 4, 64, generator=made), torch.randint(3, (7,), generator=made)
        part = slice(None) if world.size == 1 else (slice(0, 5), slice(5, 7))[world.rank]
        grid.step(features[part], labels[part], 7, step, 4)
    trained = [parameter.detach() for probe in grid.probes for parameter in probe.parameters()]
    assert world.of_main(f"said by {world.rank}") == "said by 0"
    return run(world, encoder, images, folder, False), trained


def test_one_and_two_processes_agree_and_learn(encoder: Path, images: Path, tmp_path: Path) -> None:
    found = ranks.run(parted, 2, encoder, images, tmp_path / "two")
    both = [results for results, _ in found]
    assert both[0] == both[1]
    alone, whole = parted(ALONE, encoder, images, tmp_path / "one")
    for _, trained in found:
        for one, other in zip(trained, whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for kind in ("attentive", "linear"):
        assert alone[kind]["mean"] > 90, "three colours are told apart, even by a random encoder's features"
        for one, other in zip(alone[kind]["seeds"], both[0][kind]["seeds"], strict=True):
            assert one["rate"] == other["rate"] == 1e-2  # the other rate learns nothing
            assert abs(one["accuracy"] - other["accuracy"]) < 2  # an image at most changes sides
    assert alone["neighbours"] == both[0]["neighbours"]


def test_features_are_made_once(encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(ALONE, encoder, images, tmp_path, False)
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("the encoder ran again"))
    assert run(ALONE, encoder, images, tmp_path, False) == first
    assert sorted(tmp_path.iterdir()) == files


def test_a_file_of_features_that_is_lost_or_cut_is_made_again(encoder: Path, images: Path, tmp_path: Path) -> None:
    first = run(ALONE, encoder, images, tmp_path, False)
    for file in tmp_path.glob("train-*.features"):
        file.unlink()
    for file in tmp_path.glob("test-*.features"):
        with file.open("r+b") as opened:
            opened.truncate(11)
    assert run(ALONE, encoder, images, tmp_path, False) == first


def test_damaged_features_are_made_again_and_a_disk_that_takes_none_is_done_without(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(ALONE, encoder, images, tmp_path, False)
    for file in tmp_path.glob("*.features"):
        data = bytearray(file.read_bytes())
        for place in range(1000, len(data), len(data) // 7):  # features, labels or states of some images
            data[place] ^= 16
        file.write_bytes(data)
    assert run(ALONE, encoder, images, tmp_path, False) == first
    assert "made again" in caplog.text
    (tmp_path / "file").touch()
    assert run(ALONE, encoder, images, tmp_path / "file" / "no folder", False) == first
    assert "sees each image again" in caplog.text


def test_an_encoder_that_is_not_finite_gets_no_score(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "spoiled")
    file = tmp_path / "spoiled" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("fc1.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"spoiled are not finite: .*fc1\.weight"):
        Encoder(tmp_path / "spoiled", torch.device("cpu"))


def test_features_that_are_not_finite_get_no_score(encoder: Path, images: Path, tmp_path: Path) -> None:
    """Weights that are finite can make them; every image would be told to be of the first class."""
    shutil.copytree(encoder, tmp_path / "huge")
    tensors = load_file(tmp_path / "huge" / "model.safetensors")
    huge = {name: tensor * (1e25 if "layers.1.mlp" in name else 1) for name, tensor in tensors.items()}
    save_file(huge, tmp_path / "huge" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="huge makes features of some images that are not finite: give sound"):
        run(ALONE, tmp_path / "huge", images, tmp_path / "out", False)


def test_a_probe_that_has_diverged_is_right_nowhere() -> None:
    torch.manual_seed(0)
    recipe = replace(RECIPE, rates=(1e-2, 1e38), max_grad_norm=1e30)
    grid = ProbeGrid(["attentive", "linear"], 8, 2, recipe, 0, ALONE)
    features, labels = torch.randn(6, 3, 8), torch.zeros(6, dtype=torch.long)
    for step in range(40):
        grid.step(features, labels, 6, step, 40)
    right = dict(zip(grid.keys, grid.right(features, labels).tolist(), strict=True))
    assert right == {(kind, rate): 6 if rate < 1 else 0 for kind, rate in grid.keys}


def test_an_encoder_of_zeros_is_not_given_anothers_features(encoder: Path, images: Path, tmp_path: Path) -> None:
    """Weights as .bin, the same config, the same folder: found by what was loaded alone."""
    zeros = tmp_path / "zeros"
    shutil.copytree(encoder, zeros)
    tensors = load_file(zeros / "model.safetensors")
    (zeros / "model.safetensors").unlink()
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, zeros / "pytorch_model.bin")
    data, plan = open_dataset("folder", images), ProbeConfig(("linear",), RECIPE, seeds=(0,), augment=False)
    found = []
    for path in (encoder, zeros):
        model = Encoder(path, ALONE.device)
        assert read_results(tmp_path / "results.json", plan, model, data) is None
        found.append(ProbeRunner(model, data, plan, ALONE, tmp_path / "features").run())
        save(tmp_path / "results.json", plan, model, data, found[-1])
    assert found[0]["linear"]["mean"] > 90
    assert found[1]["linear"]["mean"] == pytest.approx(100 / 3)


def test_augmented_images_differ_by_epoch_and_serve(encoder: Path, images: Path, tmp_path: Path) -> None:
    assert run(ALONE, encoder, images, tmp_path, True)["linear"]["mean"] > 80
    assert not list(tmp_path.iterdir())  # what changes is not kept


def test_the_test_images_choose_nothing(encoder: Path, images: Path, tmp_path: Path) -> None:
    data = open_dataset("folder", images)

    def wrong(i: int) -> tuple[torch.Tensor, int]:
        pixels, label = data.test.read(i)
        return pixels, (label + 1) % 3

    plan = ProbeConfig(("linear",), RECIPE, seeds=(0,), augment=False)
    told = replace(data, name="told wrongly", test=replace(data.test, read=wrong))
    made: list[dict[str, Any]] = []
    for one in (data, told):
        results = ProbeRunner(Encoder(encoder, ALONE.device), one, plan, ALONE, tmp_path).run()
        made += results["linear"]["seeds"]
    assert made[0]["rate"] == made[1]["rate"]
    assert made[0]["chosen"] == made[1]["chosen"] > 90
    assert made[1]["accuracy"] < 10


def test_a_part_of_the_images_is_the_same_part_for_all(encoder: Path, images: Path, tmp_path: Path) -> None:
    data: ClassificationDataset = open_dataset("folder", images)
    plan = ProbeConfig(("linear",), RECIPE, limit=50)
    benches = [ProbeRunner(Encoder(encoder, ALONE.device), data, plan, ALONE, tmp_path / str(i)) for i in range(2)]
    assert benches[0].train_part.tolist() == benches[1].train_part.tolist()
    assert len(benches[0].train_part) == 45
    assert len(benches[0].choice_part) == 5
    assert not set(benches[0].train_part) & set(benches[0].choice_part)
    assert {*benches[0].train_part, *benches[0].choice_part} == {*benches[0].whole}


def test_a_set_that_has_results_is_passed_over_until_something_is_changed(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "folder").symlink_to(images)
    (tmp_path / "data" / "emoji").symlink_to(ROOT / "hive_scale/data/sample")
    words = [str(encoder), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--augment", "none"]
    words += ["--heads", "linear", "--rates", "1e-2", "--batch", "32", "--limit", "64", "--seeds", "1", "--epochs"]
    assert probe.main([*words, "1", "--set", "folder"]) == 0
    assert probe.main([*words, "1", "--set", "folder,emoji"]) == 0
    said = capsys.readouterr().out
    assert said.count("folder: 3 classes") == 1
    assert said.count("emoji: ") == 1
    assert said.count(f"results  {tmp_path}/out/folder.json") == 2
    monkeypatch.setattr(ProbeRunner, "run", lambda *_: pytest.fail("probed again"))
    assert probe.main([*words, "1", "--set", "folder,emoji"]) == 0
    with pytest.raises(pytest.fail.Exception, match="probed again"):
        probe.main([*words, "2", "--set", "folder"])


def relabel(images: Path) -> None:
    """Two classes of the test images change names: same files, same sizes, other labels."""
    for before, after in (("blue", "then"), ("red", "blue"), ("then", "red")):
        (images / "test" / before).rename(images / "test" / after)


def repaint(images: Path) -> None:
    """An image gives way to another; its file keeps name and size."""
    small, *_, large = sorted((images / "train").rglob("*.png"), key=lambda path: path.stat().st_size)
    large.write_bytes(small.read_bytes().ljust(large.stat().st_size, b"\0"))


@pytest.mark.parametrize("change", [relabel, repaint])
def test_results_and_features_are_those_of_these_labels_and_images(
    encoder: Path, images: Path, tmp_path: Path, change: Any
) -> None:
    mine = tmp_path / "images"
    shutil.copytree(images, mine)
    plan = ProbeConfig(("linear",), replace(RECIPE, rates=(1e-2,)), seeds=(0,), augment=False)
    model, made = Encoder(encoder, ALONE.device), []
    for _ in range(2):
        data = open_dataset("folder", mine)
        assert read_results(tmp_path / "results.json", plan, model, data) is None
        results = ProbeRunner(model, data, plan, ALONE, tmp_path / "features").run()
        save(tmp_path / "results.json", plan, model, data, results)
        assert read_results(tmp_path / "results.json", plan, model, open_dataset("folder", mine)) == results
        made.append(results["linear"]["mean"])
        if len(made) == 1:
            change(mine)
    if change is relabel:
        assert made[0] > 90
        assert made[1] == pytest.approx(made[0] / 3, abs=5), "two of three classes are told wrongly now"
    assert len(list((tmp_path / "features").glob("train-*.features"))) == 2


def test_results_of_another_precision_depth_or_plan_are_not_read(encoder: Path, images: Path, tmp_path: Path) -> None:
    data, plan, path = open_dataset("folder", images), ProbeConfig(("linear",), RECIPE), tmp_path / "results.json"
    model = Encoder(encoder, ALONE.device)
    save(path, plan, model, data, {"linear": {"mean": 1.0}})
    assert read_results(path, plan, model, data) == {"linear": {"mean": 1.0}}
    assert read_results(path, replace(plan, workers=3), model, data), "who reads the images changes nothing"
    others = [Encoder(encoder, ALONE.device, torch.bfloat16), Encoder(encoder, ALONE.device, depth=-1)]
    assert not any(read_results(path, plan, other, data) for other in others)
    plans = [replace(plan, recipe=replace(RECIPE, min_steps=1)), replace(plan, limit=9), replace(plan, augment=False)]
    assert not any(read_results(path, other, model, data) for other in plans)
    path.write_text(path.read_text()[:-9])
    assert read_results(path, plan, model, data) is None


def test_a_small_sets_probe_tells_apart_what_logistic_regression_does(encoder: Path, tmp_path: Path) -> None:
    """By default, against L-BFGS on the same features: the 50 steps of as many epochs alone leave it at a guess."""
    data = open_dataset("emoji", ROOT / "hive_scale/data/sample")
    plan = ProbeConfig(("linear",), Recipe(rates=RATES[-3:]), seeds=(0,), augment=False, limit=300)
    bench = ProbeRunner(Encoder(encoder, ALONE.device), data, plan, ALONE, tmp_path)
    found = bench.run()["linear"]["mean"]

    def features(split: Any, part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batches = [(normalised(f).mean(1), labels) for f, labels in bench._source(split).batches(cut(part, 128))]
        return torch.cat([f for f, _ in batches]), torch.cat([labels for _, labels in batches])

    known, labels = features(data.train, bench.whole)
    weight, bias = torch.zeros(32, data.num_classes, requires_grad=True), torch.zeros(data.num_classes)
    optimizer = torch.optim.LBFGS([weight, bias.requires_grad_()], max_iter=1000, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(known @ weight + bias, labels) + 1e-4 * weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    asked, truth = features(data.test, np.arange(data.test.size))
    regression = 100 * float(((asked @ weight + bias).argmax(1) == truth).float().mean())
    assert regression > 30
    assert found > regression - 8  # two standard deviations of 159 test images


def test_few_batches_are_each_trained_on_until_there_are_steps_enough(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []
    step = ProbeGrid.step

    def watched(self: ProbeGrid, features: Any, labels: Any, count: int, number: int, num_steps: int) -> None:
        seen.append((number, num_steps, len(self.probes)))
        step(self, features, labels, count, number, num_steps)

    monkeypatch.setattr(ProbeGrid, "step", watched)
    recipe = replace(RECIPE, epochs=2, batch=50, min_steps=10)  # 108 images to choose by: 2 batches an epoch
    data, plan = open_dataset("folder", images), ProbeConfig(("linear",), recipe, seeds=(0,), augment=False)
    ProbeRunner(Encoder(encoder, ALONE.device), data, plan, ALONE, tmp_path).run()
    assert [one for one in seen if one[2] == 2] == [(i, 12, 2) for i in range(12)]  # 3 times each
    assert [one for one in seen if one[2] == 1] == [(i, 12, 1) for i in range(12)]  # and the rate chosen, on all 120
    seen.clear()
    ProbeRunner(Encoder(encoder, ALONE.device), data, replace(plan, recipe=RECIPE), ALONE, tmp_path).run()
    assert {total for _, total, _ in seen} == {3 * RECIPE.epochs}, "batches enough are trained on once"


def test_what_is_tested_has_learned_from_all_training_images(encoder: Path, images: Path, tmp_path: Path) -> None:
    data = open_dataset("folder", images)
    seen: list[int] = []

    def noted(i: int) -> tuple[torch.Tensor, int]:
        seen.append(i)
        return data.train.read(i)

    watched = replace(data, train=replace(data.train, read=noted))
    plan = ProbeConfig(("linear",), replace(RECIPE, batch=40, epochs=2), seeds=(0,), augment=True)
    bench = ProbeRunner(Encoder(encoder, ALONE.device), watched, plan, ALONE, tmp_path)
    bench.run()
    half = seen.index(next(i for i in seen if i in bench.choice_part))
    assert not {*seen[:half]} & {*bench.choice_part.tolist()}, "no image to choose by is trained on before the choice"
    assert {*seen[half + len(bench.choice_part) :]} == {*range(120)}
    seen.clear()
    given = replace(watched, validation=data.test)
    ProbeRunner(Encoder(encoder, ALONE.device), given, plan, ALONE, tmp_path / "other").run()
    assert len(seen) == 2 * 120, "a split to choose by holds nothing back, and nothing is trained again"


def test_each_seed_and_epoch_takes_the_images_in_an_order_of_its_own(
    encoder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, list[int]]] = []
    batches = Source.batches

    def noted(self: Source, groups: Any, draw: Any = None) -> Any:
        seen.append((draw, np.concatenate(groups).tolist()))
        return batches(self, groups, draw)

    monkeypatch.setattr(Source, "batches", noted)
    recipe = replace(RECIPE, epochs=2, batch=9, rates=(1e-2,))
    plan = ProbeConfig(("linear",), recipe, seeds=(0, 1), augment=True, limit=20)
    ProbeRunner(Encoder(encoder, ALONE.device), open_dataset("folder", images), plan, ALONE, tmp_path).run()
    trained = [(draw, order) for draw, order in seen if draw is not None]
    places = [(seed, epoch) for seed in (0, 1) for _ in ("to choose", "on all") for epoch in (0, 1)]
    assert [draw for draw, _ in trained] == places
    for first in (0, 2):  # to choose, and on all
        orders = [order for place, (_, order) in enumerate(trained) if place % 4 in (first, first + 1)]
        assert len({tuple(order) for order in orders}) == 4
        assert all(len({*order}) == 18 for order in orders)


@pytest.mark.parametrize("split", ["none", "its own"])
def test_the_rate_chosen_is_the_one_that_is_tested(encoder: Path, images: Path, tmp_path: Path, split: str) -> None:
    """Wherever in the grid it stands; and chosen on the split that the set has for it."""
    data = open_dataset("folder", images)

    def sometimes_wrong(i: int) -> tuple[torch.Tensor, int]:
        pixels, label = data.train.read(i)
        return pixels, (label + (i % 4 == 0)) % 3

    if split == "its own":
        data = replace(data, validation=replace(data.train, name="validation", read=sometimes_wrong))
    recipe = replace(RECIPE, rates=(1e-5, 1e-2, 1e-6))
    plan = ProbeConfig(("attentive", "linear"), recipe, seeds=(0,), augment=False)
    for kind, one in ProbeRunner(Encoder(encoder, ALONE.device), data, plan, ALONE, tmp_path).run().items():
        [seed] = one["seeds"]
        assert seed["rate"] == 1e-2, kind
        assert seed["accuracy"] > 90, kind
        if split == "its own":
            assert seed["chosen"] == pytest.approx(75, abs=5), kind


def test_neighbours_are_sought_among_all_training_images_by_mean_features(encoder: Path, tmp_path: Path) -> None:
    data = open_dataset("emoji", ROOT / "hive_scale/data/sample")
    model = Encoder(encoder, ALONE.device)
    bench = ProbeRunner(model, data, ProbeConfig((), RECIPE, neighbours=True, limit=100), ALONE, tmp_path)

    def pooled(split: Split, part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        read = [split.read(int(i)) for i in part]
        pixels = torch.stack([fitted(one, model.image_size, model.mode) for one, _ in read])
        return model(pixels).mean(1), torch.tensor([label for _, label in read])

    known, labels = pooled(data.train, np.random.default_rng(0).permutation(data.train.size)[:100])
    asked, truth = pooled(data.test, range(data.test.size))
    share = (nearest_neighbours(known, labels, asked, data.num_classes) == truth).float().mean()
    assert bench.run() == {"neighbours": {"mean": pytest.approx(100 * float(share)), "deviation": 0.0}}


def test_seeds_are_summed_up_by_mean_and_sample_deviation() -> None:
    made = summarise([{"accuracy": 90.0}, {"accuracy": 94.0}])
    assert (made["mean"], made["deviation"]) == (92.0, pytest.approx(8**0.5))
    assert summarise([{"accuracy": 90.0}])["deviation"] == 0.0


@pytest.mark.parametrize(
    ("shares", "rate", "edge"),
    [
        ({1e-3: 50.0, 2e-3: 60.0, 3e-3: 40.0}, 2e-3, ""),
        ({1e-3: 50.0, 2e-3: 60.0, 3e-3: 70.0}, 3e-3, "highest"),
        ({1e-3: 80.0, 2e-3: 60.0, 3e-3: 70.0}, 1e-3, "lowest"),
        ({3e-3: 70.0, 1e-3: 50.0, 2e-3: 60.0}, 3e-3, "highest"),  # in whatever order they are given
        ({1e-3: 80.0, 2e-3: 80.0, 3e-3: 70.0}, 2e-3, ""),  # one as good lies within
        ({1e-4: 9.0, 1e-3: 80.0, 2e-3: 80.0, 3e-3: 80.0, 1e-2: 9.0}, 2e-3, ""),
        ({1e-3: 80.0, 2e-3: 80.0}, 1e-3, "lowest"),
        ({1e-3: 80.0}, 1e-3, ""),  # of one there is nothing to choose
    ],
)
def test_the_rate_chosen_and_the_edge_it_lies_at(shares: dict[float, float], rate: float, edge: str) -> None:
    assert chosen(shares) == {"chosen": max(shares.values()), "rate": rate, "edge": edge}


def test_rates_at_an_edge_are_told() -> None:
    seeds = [{"rate": 2e-3, "edge": "highest"}, {"rate": 5e-4, "edge": ""}]
    told = warnings({"linear": {"seeds": seeds}, "attentive": {"seeds": seeds[1:]}, "neighbours": {}})
    assert told == ["linear: 0.002 is the highest rate of the grid; a higher one may do better: --rates"]
    assert "a lower one" in warnings({"linear": {"seeds": [{"rate": 5e-5, "edge": "lowest"}]}})[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "cifar11"], "did you mean cifar10"),
        (["--set", "folder", "--heads", "deep"], "there is no 'deep': choose among attentive, linear, knn"),
        (["--set", "folder", "--depth", "9"], "has 4 blocks: there is no depth 9"),
        (["--set", "folder", "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--set", "folder", "--rates", "1e-3,high"], "--rates 1e-3,high are no numbers: give such as 1e-3,2e-3"),
        (["--set", "folder", "--rates", "1e-3,nan"], "each must be above 0"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    encoder: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    launcher = ROOT / "launchers/probe.py"
    monkeypatch.setattr(sys, "argv", [str(launcher), str(encoder), "--data", str(images), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(launcher), run_name="__main__")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert message in said
