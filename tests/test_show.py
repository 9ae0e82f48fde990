"""Figures say what the numbers say, and a word that is not there is answered with those that are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from hive_scale import presets
from hive_scale.distributed import Fragment, World
from hive_scale.model.build import assemble
from hive_scale.preparation import open_data
from hive_scale.show.attention_map import choose, words_at
from hive_scale.show.curves import History, by_component, thin
from hive_scale.show.gradient_map import concentration, gradient_maps
from hive_scale.watch.gauge import gauge, layer_of


def test_gradients_are_those_of_each_blocks_output() -> None:
    """As torch itself keeps them in the backward of a training step, sample by sample."""
    model = assemble(tiny.model_config(), seed=0).eval()
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
    model = assemble(tiny.model_config(), seed=0)
    name = "fusion.layers.1.gate"
    fragments = [
        Fragment(name, "master", (1,), 0, torch.tensor([0.5])),
        Fragment(name, "exp_avg_sq", (1,), 0, torch.tensor([0.19])),
        Fragment("vision.encoder.layers.0.mlp.fc1.bias", "exp_avg_sq", (2,), 0, torch.tensor([0.95, 0.76])),
    ]
    found = gauge(model, fragments, 2, 0.9, World(0, 1, torch.device("cpu")))
    assert found["gates"] == pytest.approx({"0": 0.0, "1": 0.46211716})
    assert found["grad_rms"]["vision.0"] == pytest.approx(3.0)  # (0.95 + 0.76) / (1 - 0.9**2) = 9
    assert found["grad_rms"]["fusion.1"] == pytest.approx(1.0)
    assert layer_of("language.model.embed_tokens.weight") == "language"
    assert by_component({"vision.0": 3.0, "vision": 4.0}) == {"vision": 5.0}


def test_curves_of_stages_follow_each_other_and_long_ones_are_averaged() -> None:
    stages = {"a": [{"samples": 8}, {"samples": 16}], "b": [{"samples": 8}]}
    history = History("x", stages)
    assert [x for x, _ in history.points()] == [8, 16, 24]
    assert history.borders() == [16]
    assert thin([(float(i), float(i)) for i in range(8)], most=2) == ([1.5, 5.5], [1.5, 5.5])
