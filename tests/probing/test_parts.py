"""A part of the features is there whole or not at all, here and at a URL."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

from beit_dist.probing.parts import Parts
from beit_dist.storage.opening import open_place
from beit_dist.storage.place import Place


@pytest.fixture(params=["folder", "URL"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return open_place(str(tmp_path) if request.param == "folder" else f"memory://{uuid.uuid4()}/probe")


def parts(out: Place, images: int = 7, **facts: str) -> Parts:
    return Parts(out, facts, images=images, size=3, layers=2, width=4)


def test_what_was_written_is_read_layer_by_layer(out: Place) -> None:
    made, features = parts(out), torch.randn(2, 7, 4)
    assert made.missing() == [0, 1, 2]
    for part in (2, 0, 1):
        rows = made.rows(part)
        made.write(part, features[:, rows.start : rows.stop])
    again = parts(out)
    assert again.missing() == []
    assert torch.equal(torch.stack([again.layer(0), again.layer(1)]), features)
    again.remove()
    assert again.missing() == [0, 1, 2]


def test_a_part_that_is_cut_short_is_missing(out: Place) -> None:
    made = parts(out)
    made.write(0, torch.zeros(2, 3, 4))
    made.place.write("part-000001.f32", b"\0" * 17)
    assert made.missing() == [1, 2]


def test_other_weights_images_or_layers_have_other_parts(out: Place) -> None:
    parts(out, weights="a").write(0, torch.zeros(2, 3, 4))
    assert parts(out, weights="a").missing() == [1, 2]
    assert parts(out, weights="b").missing() == [0, 1, 2]
    assert parts(out, images=8, weights="a").missing() == [0, 1, 2]
