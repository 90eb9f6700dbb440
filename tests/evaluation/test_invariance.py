import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ConstantInputWarning, spearmanr

from evaluation.invariance import (
    Gains,
    Images,
    Row,
    Scored,
    Shown,
    as_markdown,
    as_text,
    centre,
    corrected,
    dense,
    follow,
    judge,
    judge_rings,
    moved_by,
    moved_scores,
    rank_correlation,
    scored,
    unchanged,
)
from fieldmark.labels.rings import ring_gains, sector_gains
from fieldmark.params import Labels
from fieldmark.pictures.transforms import Transform, motion_of, transformed
from training.metrics import Floats

SIDE = 4
IMAGES = Images(np.arange(40) % 4, None, by_class=False)


def boxes_of_grid(images: int, side: int = SIDE) -> Floats:
    """(images, side * side + 4, 4): cells row by row, then the 2 x 2 cells of a coarser grid."""
    found = []
    for count in (side, 2):
        y, x = (each.reshape(-1) / count for each in np.indices((count, count)))
        found.append(np.stack([x, y, x + 1 / count, y + 1 / count], axis=1))
    return np.tile(np.concatenate(found), (images, 1, 1))


def of_grid(cells: Floats) -> Scored:
    """Scores of cells (n, side, side); coarser nodes have all the same, and are no patches."""
    images = len(cells)
    scores = np.concatenate([cells.reshape(images, -1), np.full((images, 4), 0.9)], axis=1)
    return scored(scores, boxes_of_grid(images, cells.shape[1]), np.ones_like(scores, dtype=bool))


def origins(transform: Transform, images: int, side: int = SIDE) -> Floats:
    boxes = boxes_of_grid(images, side)
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2
    return np.stack([motion_of(transform, f"{image}", (64, 64)).origins(middles[image]) for image in range(images)])


def cells_of(values: np.ndarray, side: int = SIDE) -> np.ndarray:
    return values[:, : side * side].reshape(-1, side, side)


def test_patches_are_the_finest_nodes() -> None:
    assert of_grid(np.zeros((1, SIDE, SIDE))).patches.tolist() == [[True] * 16 + [False] * 4]


def test_scores_move_as_the_picture_does() -> None:
    scores = np.random.default_rng(0).random((3, SIDE, SIDE))
    moved, known = moved_scores(of_grid(scores), origins(Transform("flip", flip=True), 3))
    assert known.all()
    np.testing.assert_allclose(cells_of(moved), scores[:, :, ::-1])
    moved, known = moved_scores(of_grid(scores), origins(Transform("turn", degrees=90), 3))
    assert known.all()
    for image in range(3):
        either = [np.rot90(scores[image], turn) for turn in (1, 3)]
        assert sum(np.allclose(cells_of(moved)[image], each) for each in either) == 1


def test_a_shift_by_a_cell_moves_scores_by_a_cell_and_leaves_a_strip_unknown() -> None:
    scores = np.random.default_rng(0).random((8, SIDE, SIDE))
    shift = Transform("shift", shift=1 / SIDE)
    moved, known = moved_scores(of_grid(scores), origins(shift, 8))
    for image in range(8):
        x, y = (motion_of(shift, f"{image}", (64, 64)).offset // 16).astype(int)
        expected, there = np.full((SIDE, SIDE), np.nan), np.zeros((SIDE, SIDE), dtype=bool)
        for row in range(SIDE):
            for column in range(SIDE):
                if 0 <= row - y < SIDE and 0 <= column - x < SIDE:
                    expected[row, column], there[row, column] = scores[image, row - y, column - x], True
        assert np.array_equal(cells_of(known)[image], there)
        np.testing.assert_allclose(cells_of(moved)[image][there], expected[there])


def test_between_patches_scores_are_interpolated() -> None:
    at = np.array([[[0.25, 0.125], [0.25, 0.25], [0.01, 0.01], [1.2, 0.5]]])
    scores = np.arange(16.0).reshape(1, SIDE, SIDE)
    moved, known = moved_scores(of_grid(scores), at)
    assert moved[0, :3].tolist() == pytest.approx([(0 + 1) / 2, (0 + 1 + 4 + 5) / 4, 0])
    assert known.tolist() == [[True, True, True, False]]


def test_rank_correlation_against_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 30, 9)).astype(float)
    counted = rng.random((30, 9)) < 0.6
    a[0], counted[1], counted[2] = 3, False, np.arange(9) < 2
    found = rank_correlation(a, b, counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        expected = [
            spearmanr(x[some], y[some]).statistic if some.sum() > 2 else np.nan
            for x, y, some in zip(a, b, counted, strict=True)
        ]
    assert np.isnan(found[:3]).all()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_centre_of_mass() -> None:
    middles = np.array([[[0.25, 0.5], [0.75, 0.5], [0.5, 1.0]]])
    counted = np.array([[True, True, False]])
    assert centre(np.array([[1.0, 3.0, 9.0]]), middles, counted)[0].tolist() == pytest.approx([0.625, 0.5])
    assert np.isnan(centre(np.array([[0.0, 0.0, 9.0]]), middles, counted)).all()


def brightness(pictures: list[Image.Image]) -> Scored:
    """A planted method that counts each cell by how bright the picture is there: it follows every picture exactly."""
    pixels = np.stack([np.asarray(picture, dtype=float)[..., 0] for picture in pictures])
    return of_grid(pixels.reshape(len(pictures), SIDE, 16, SIDE, 16).mean((2, 4)) / 255)


def pictures_of(images: int) -> list[Image.Image]:
    """64 x 64 pixels, of one colour in each of 4 x 4 cells."""
    values = np.random.default_rng(1).integers(0, 256, (images, SIDE, SIDE), dtype=np.uint8)
    pixels = values.repeat(16, axis=1).repeat(16, axis=2)
    return [Image.fromarray(np.stack([each] * 3, axis=-1)) for each in pixels]


@pytest.mark.parametrize(
    "transform", [Transform("flip", flip=True), Transform("turn", degrees=90), Transform("shift", shift=0.25)],
    ids=lambda each: each.name,
)  # fmt: skip
def test_a_method_that_sees_content_follows_and_one_that_looks_at_a_place_stays(transform: Transform) -> None:
    pictures = pictures_of(12)
    changed = [transformed(picture, transform, f"{image}") for image, picture in enumerate(pictures)]
    found = follow(brightness(pictures), brightness(changed), origins(transform, 12))
    np.testing.assert_allclose(found.follow, 1)
    np.testing.assert_allclose(found.off, 0, atol=1e-6)
    assert (found.stay < 0.9).all()
    assert abs(found.other.mean()) < 0.3
    assert (found.off_if_still > 0.005).all()

    fixed = of_grid(np.tile(np.linspace(0, 1, 16).reshape(SIDE, SIDE), (12, 1, 1)))
    found = follow(fixed, fixed, origins(transform, 12))
    np.testing.assert_allclose(found.stay, 1)
    np.testing.assert_allclose(found.off_if_still, 0, atol=1e-9)
    # Where it looks does not hang on the picture: those of others say the same.
    np.testing.assert_allclose(found.follow, found.other)
    if transform.name != "shift":
        assert (found.follow < 0.9).all()


def test_scores_that_are_all_alike_tell_nothing() -> None:
    even = of_grid(np.full((3, SIDE, SIDE), 0.5))
    found = follow(even, even, origins(Transform("flip", flip=True), 3))
    assert np.isnan(found.follow).all()
    row = judge("r", "flip", np.zeros(3, int), np.zeros(3, int), None, found, Images(np.zeros(3, int), None, False))
    assert row.scores == {}
    assert row.follow is None


def test_images_are_followed_alike_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, pictures = Transform("turn", degrees=20), pictures_of(9)
    changed = [transformed(picture, transform, f"{image}") for image, picture in enumerate(pictures)]
    asked = brightness(pictures), brightness(changed), origins(transform, 9)
    whole = follow(*asked)
    monkeypatch.setattr("evaluation.invariance.CHUNK", 4)
    for one, other in zip(follow(*asked), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def shown(images: int = 6) -> Shown:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(3 * torch.randn(images, 16, 5, generator=generator), dim=2)
    places = torch.rand(images, 16, 2, generator=generator)
    density, numbers = torch.rand(images, 16, generator=generator), np.array([2, 3, 5, 7, 9])
    return Shown(torch.from_numpy(numbers).expand_as(weights), weights, density, places, numbers)


def test_turned_boxes_leave_rings_and_move_sectors() -> None:
    before = shown().gains(Labels())
    after = shown().turned(30, Labels()).gains(Labels())
    row = judge_rings("e", "boxes turned 30", before, after, Images(np.zeros(6, int), None, False), True)
    assert (row.rings, row.rings_js) == pytest.approx((0, 0), abs=1e-4)
    assert row.sectors > 0.1
    assert row.over[1] < 0


def test_gains_are_those_of_rings_and_sectors_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = shown()
    expected = ring_gains(asked.weight, asked.density, asked.places, Labels())
    monkeypatch.setattr("evaluation.invariance.CHUNK", 4)
    found = asked.gains(Labels())
    np.testing.assert_allclose(found.rings, expected.numpy(), atol=1e-6)
    expected = sector_gains(asked.weight, asked.density, asked.places, Labels())
    np.testing.assert_allclose(found.sectors, expected.numpy(), atol=1e-6)


def test_values_move_by_what_lies_between_pictures() -> None:
    values = np.array([[0.0, 1.0], [0.5, 3.0]])
    assert moved_by(values, values).tolist() == [0, 0]
    assert moved_by(values, values[::-1]).tolist() == pytest.approx([1, 1])


def test_stored_weights_become_rows_over_the_kept_concepts() -> None:
    index, weight = torch.tensor([[[7, 2], [2, 0]]]), torch.tensor([[[0.5, 0.25], [1.0, 0.0]]]).half()
    found = dense(index, weight, np.array([2, 5, 7]))
    assert found.tolist() == [[[0.25, 0, 0.5], [1.0, 0, 0]]]


def test_rows_and_their_words() -> None:
    still = IMAGES.y.copy()
    lost = np.where(np.arange(40) < 20, (still + 1) % 4, still)
    place = np.where(np.arange(40) < 2, (still + 1) % 4, still)
    rows = corrected([
        unchanged("r", still, still, IMAGES),
        judge("r", "turn", lost, still, place, None, IMAGES),
        judge("r", "flip", place, still, None, None, IMAGES),
    ])  # fmt: skip
    assert [row.accuracy for row in rows] == [1, 0.5, 0.95]
    assert [row.words for row in rows] == ["", "loses", "no difference shown"]
    turn = rows[1]
    assert turn.paired is not None
    assert turn.moved is not None
    assert (turn.paired.difference, turn.moved.difference, turn.same) == pytest.approx((-0.5, -0.45, 0.5))
    assert (turn.lost, turn.p) == (0.95, pytest.approx(2 * turn.paired.p))
    text, page = as_text("TITLE", rows, []), as_markdown("TITLE", rows, [])
    assert "over 40 images" in text
    assert "for 2 comparisons" in text
    assert "- Accuracy falls under turn (-50.0 [" in page
    assert "- No difference is shown, which does not mean that there is none, under flip." in page
    assert "- Moving itself costs more than losing the same part in place under turn" in page


def test_groups_stay_whole_and_few_of_them_are_not_judged() -> None:
    images = Images(np.arange(40) % 4, np.arange(40) // 8, by_class=False)
    row: Row = corrected([judge("r", "turn", (images.y + 1) % 4, images.y, None, None, images)])[0]
    assert row.paired is not None
    assert (row.paired.unit, row.paired.units, row.words, row.p) == ("groups", 5, "too few to judge", None)


def test_circles_are_held_against_sectors_in_words() -> None:
    rows = [unchanged("r", IMAGES.y, IMAGES.y, IMAGES), judge("r", "flip", IMAGES.y, IMAGES.y, None, None, IMAGES)]
    before = Gains(np.arange(80.0).reshape(40, 2), np.arange(80.0).reshape(40, 2))
    after = Gains(before.rings, before.sectors + 20)
    ring = judge_rings("reef", "rotate 30", before, after, IMAGES, True)
    assert "labels of reef" in as_text("TITLE", rows, [ring])
    assert "- rotate 30: rings move by 0.00, sectors by 0." in as_markdown("TITLE", rows, [ring])
    assert ": rings move less." in as_markdown("TITLE", rows, [ring])
