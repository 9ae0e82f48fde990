"""Why: labels that are off by one, or of the wrong sample, train a wrong model without any error.

The expected values are written by hand, so that they share nothing with `collate`.
"""

from __future__ import annotations

import pytest
import torch

from hive_scale.batch import Batch, Sample, collate

IMAGE = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)


def two() -> Batch:
    """A caption "5 6" about an image, and a text whose second and fourth tokens count."""
    seen = Sample("a", IMAGE, [1, 5, 6], [False, True, True])
    read = Sample("b", None, [1, 7, 8, 9], [False, True, False, True])
    return collate([seen, read], pad_id=0, image_size=2)


def test_each_target_is_predicted_from_the_token_before_it() -> None:
    batch = two()
    assert batch.tokens.tolist() == [[1, 5, 6, 0], [1, 7, 8, 9]]
    places = [divmod(row, 4) for row in batch.target_rows.tolist()]  # (sample, position) of four tokens each
    assert places == [(0, 0), (0, 1), (1, 0), (1, 2)]
    assert batch.target_ids.tolist() == [5, 6, 7, 9]
    assert (batch.num_tokens, len(batch), batch.keys) == (4, 2, ("a", "b"))


def test_a_text_without_an_image_is_marked_and_its_image_tells_nothing() -> None:
    batch = two()
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels[0], IMAGE)
    assert len(batch.pixels[1].unique()) == 1
    assert batch.has_image.tolist() == [True, False]
    assert not batch.all_images
    assert batch.inputs()["has_image"] is batch.has_image


def test_where_all_have_images_behind_the_start_token_the_model_is_told_nothing_of_it() -> None:
    batch = collate([Sample("a", IMAGE, [1, 5], [False, True])] * 2, pad_id=0, image_size=2)
    assert batch.all_images
    assert batch.inputs()["has_image"] is None
    assert batch.inputs()["image_slots"] is None


def test_images_further_on_are_told_for_all_samples() -> None:
    samples = [Sample("a", IMAGE, [1, 5, 6], [False, True, True], slot) for slot in (1, 2)]
    slots = collate(samples, pad_id=0, image_size=2).image_slots
    assert slots is not None
    assert slots.tolist() == [1, 2]


def test_images_that_lie_in_their_place_are_not_copied_and_others_are() -> None:
    places = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    places[0] = 9
    samples = [Sample("a", places[0], [1, 5], [False, True]), Sample("b", IMAGE, [1, 5], [False, True])]
    batch = collate(samples, pad_id=0, image_size=2, pixels=places)
    assert batch.pixels is places
    assert torch.equal(places[1], IMAGE)
    assert bool((places[0] == 9).all())


def test_a_batch_goes_to_a_device_whole() -> None:
    batch = two().to(torch.device("meta"))
    assert all(value.is_meta for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert batch.keys == ("a", "b")


def test_images_of_fewer_samples_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        collate([Sample("a", IMAGE, [1, 5], [False, True])], 0, 2, torch.zeros(2, 3, 2, 2, dtype=torch.uint8))
