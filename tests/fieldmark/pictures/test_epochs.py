"""Pictures for training: the same view of an image and epoch each time, in mixed order, and few at a time."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torchvision.transforms import Compose, PILToTensor, Resize

from fieldmark import store
from fieldmark.params import Embed
from fieldmark.pictures import epochs
from fieldmark.pictures.epochs import iterate_batches, load_view, shuffled
from fieldmark.pictures.views import Source, prepare
from tests.project import draw


class Shown:
    """An encoder that is shown pictures of 16 pixels a side."""

    preprocess = Compose([Resize((16, 16)), PILToTensor()])
    preprocessing: ClassVar[dict[str, Any]] = {"size": (16, 16), "resize_mode": "squash"}


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    paths = [draw(tmp_path / f"{number}.png", number) for number in range(7)]
    return [Source(store.sha256(path.read_bytes()), path) for path in paths]


def test_a_view_is_that_of_the_stages(sources: list[Source]) -> None:
    views = prepare(sources[0], Shown(), Embed(views=3, tokens=False, grids=[]))
    for number, view in enumerate(views):
        assert torch.equal(load_view(Shown(), number, sources[0]), view.pixels[0])
    assert not torch.equal(views[1].pixels, views[2].pixels)


def test_batches_hold_all_in_order_and_are_the_same_again(sources: list[Source]) -> None:
    first = list(iterate_batches(sources, Shown(), 1, 3))
    again = list(iterate_batches(sources, Shown(), 1, 3))
    assert [len(batch) for batch, _ in first] == [3, 3, 1]
    assert [source for batch, _ in first for source in batch] == sources
    assert all(torch.equal(one[1], other[1]) for one, other in zip(first, again, strict=True))


def test_few_pictures_are_held(sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def load(encoder: Shown, number: int, source: Source) -> torch.Tensor:
        decoded.append(source)
        return torch.zeros(3, 16, 16)

    monkeypatch.setattr(epochs, "load_view", load)
    next(iterate_batches(sources * 20, Shown(), 1, 2))
    assert len(decoded) <= 2 * 2 + 2 + 1


def test_an_epoch_mixes_classes_and_another_has_another_order(sources: list[Source]) -> None:
    """Sorted by class, as a listing is: a batch of the public code's holds few classes."""
    many = [Source(store.sha256(f"{name} {place}"), Path(name)) for name in "abcdefgh" for place in range(20)]
    order = shuffled(many, 0, 0)
    assert sorted(order) == sorted(many)
    assert np.mean([len({source.path for source in order[start : start + 16]}) for start in range(0, 160, 16)]) > 5
    assert order != shuffled(many, 0, 1) != shuffled(many, 1, 1)
    fewer = [source for source in order if source is not many[3]]
    assert fewer == shuffled(many[:3] + many[4:], 0, 0)
