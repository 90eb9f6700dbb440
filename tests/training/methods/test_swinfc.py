"""Each part of SwinFC against loops and what it has to be where its weights are known, on one map and on three."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import assert_saved, quick, quick_settings, shake
from training.data import Batch, Cache
from training.data.tokens import Cells, Tokens, as_shape
from training.folds import settle
from training.layers.blocks import Standardise
from training.layers.losses import margin_contrast
from training.loop import assess_split, predict, total_loss
from training.methods import read_settings, reads_of, search_points
from training.methods.swinfc import (
    OUTPUTS,
    STAGES,
    CrossSpaceAttention,
    ExternalAttention,
    Map,
    Scales,
    Settings,
    SwinFC,
    average,
    fuse,
    selected,
    stages_of,
    unlike,
)
from training.token_heads import Beside

GENERATOR = torch.Generator().manual_seed(0)
WIDTH, CLASSES, GRID = 10, 3, (9, 9)
FINALS = (*OUTPUTS, "average")
REAL: dict[str, Any] = {"layers": (1, 4, 7)}
SIZES = {1: ((5, 6), 8), 4: ((3, 3), 12), 7: ((2, 2), 16)}  # grid and width by layer
Planted = Callable[[Plan], Cache]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def made(**knobs: Any) -> tuple[SwinFC, Batch]:
    torch.manual_seed(0)
    tokens, y = random(5, GRID[0] * GRID[1], WIDTH), torch.tensor([0, 1, 2, 0, 1])
    batch = Batch(y, y, {"tokens": tokens, "token_grid": as_shape(GRID)})
    settings = Settings(**{"hidden": 16, "heads": 2, "memory": 6, "dropout": 0.0, **knobs})
    maps, mean = stages_of(batch, settings)
    scales = Scales([Standardise(each.cells.flatten(0, 1)) for each in maps], Standardise(mean))
    head = SwinFC(scales, Beside(None), CLASSES, settings)
    shake(head)
    return head.eval(), batch


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((9, 9), [(9, 9), (5, 5), (3, 3)]),
        ((6, 6), [(6, 6), (3, 3), (2, 2)]),
        ((3, 4), [(3, 4), (2, 2), (1, 1)]),
        ((1, 1), [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_scales_are_means_of_the_cells_that_are_there(grid: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    cells = random(2, grid[0] * grid[1], 3)
    batch = Batch(torch.zeros(2), torch.zeros(2), {"tokens": cells, "token_grid": as_shape(grid)})
    maps, mean = stages_of(batch, Settings())
    assert [each.grid for each in maps] == expected
    torch.testing.assert_close(mean, cells.mean(1))
    image = cells.unflatten(1, grid)
    for (found, (height, width)), size in zip(maps, (1, 2, 4), strict=True):
        for row in range(height):
            for column in range(width):
                window = image[:, size * row : size * (row + 1), size * column : size * (column + 1)]
                torch.testing.assert_close(found[:, row * width + column], window.mean((1, 2)))


def test_external_attention_is_two_convolutions_and_nothing_without_the_second() -> None:
    torch.manual_seed(0)
    attention, x = ExternalAttention(4, 3), random(2, 5, 4)
    padded = F.pad(x, (0, 0, 1, 1))
    for image in range(2):
        for place in range(5):
            units = attention.into.bias + sum(
                attention.into.weight[:, :, step] @ padded[image, place + step] for step in range(3)
            )
            expected = x[image, place] + attention.back.weight @ attention.norm(units)
            torch.testing.assert_close(attention(x)[image, place], expected)
    nn.init.zeros_(attention.back.weight)
    assert torch.equal(attention(x), x)


def open_gates(attention: CrossSpaceAttention) -> None:
    for gate in (attention.rows, attention.columns):
        nn.init.zeros_(gate[-2].weight)  # type: ignore[arg-type]
        nn.init.constant_(gate[-2].bias, 100.0)  # type: ignore[arg-type]


def test_cross_space_attention_gates_rows_and_columns_each_by_its_own_mean() -> None:
    torch.manual_seed(0)
    attention, x = CrossSpaceAttention(4), random(2, 6, 4)
    image = x.unflatten(1, (2, 3))
    for row in range(2):
        for column in range(3):
            gates = attention.rows(image[:, row].mean(1)) * attention.columns(image[:, :, column].mean(1))
            torch.testing.assert_close(attention(x, (2, 3))[:, 3 * row + column], image[:, row, column] * gates)
    open_gates(attention)
    torch.testing.assert_close(attention(x, (2, 3)), x)


def test_cross_space_attention_commutes_with_a_mirror() -> None:
    torch.manual_seed(0)
    attention, image = CrossSpaceAttention(4), random(2, 3, 5, 4)
    there = attention(image.flatten(1, 2), (3, 5)).unflatten(1, (3, 5))
    for side in (1, 2):
        torch.testing.assert_close(
            attention(image.flip(side).flatten(1, 2), (3, 5)).unflatten(1, (3, 5)), there.flip(side)
        )


def test_fusion_brings_what_is_least_alike_and_nothing_at_gamma_0() -> None:
    stages = [random(2, count, 4) for count in (6, 3, 1)]
    torch.testing.assert_close(unlike(stages[0], stages[1]).sum(-1), torch.ones(2, 6))
    found = fuse(stages, torch.tensor(0.7))
    for i, stage in enumerate(stages):
        for image in range(2):
            for place, cell in enumerate(stage[image]):
                expected = cell.clone()
                for j, other in enumerate(stages):
                    if j != i:
                        shares = torch.tensor([math.exp(-float(cell @ each) / 2) for each in other[image]])
                        expected += 0.7 * (shares[:, None] * other[image]).sum(0) / shares.sum()
                torch.testing.assert_close(found[i][image, place], expected)
    assert all(map(torch.equal, fuse(stages, torch.zeros(1)), stages))
    alike, against = torch.tensor([[[9.0, 0.0]]]), torch.tensor([[[9.0, 0.0], [-9.0, 0.0]]])
    assert unlike(alike, against)[0, 0, 1] > 0.99


def test_the_cell_that_most_look_at_is_selected_by_each_head() -> None:
    x, attention = random(2, 5, 4), torch.rand(2, 3, 5, 5, generator=GENERATOR)
    attention[0, :, :, 2] += 5  # all heads look at one
    attention[1, 0, :, 0] += 5
    attention[1, 1:, :4, 4] += 5  # not all queries do
    attention = attention / attention.sum(-1, keepdim=True)
    found = selected(x, attention)
    torch.testing.assert_close(found[0], x[0, 2])
    torch.testing.assert_close(found[1], (x[1, 0] + 2 * x[1, 4]) / 3)


def test_the_average_is_that_of_softmaxes_and_begins_as_the_rival() -> None:
    own, z = 5 * random(4, 6, CLASSES), 30 * random(6, CLASSES)
    expected = torch.stack([(z + each).softmax(-1) for each in own]).mean(0)
    torch.testing.assert_close(average(own, z).softmax(-1), expected)
    assert torch.equal(average(torch.zeros_like(own), z), z)
    far = torch.zeros(1, CLASSES)
    far[0, 0] = 500.0  # the rival has no doubt, and a stage contradicts it
    against = torch.stack([far - far] * 3 + [-2 * far])
    assert torch.isfinite(average(against, far)).all()


def test_without_deep_supervision_and_contrast_the_loss_is_cross_entropy_alone() -> None:
    head, batch = made()
    output = head.train()(batch)
    assert set(output.losses) == {*STAGES, "contrast"}
    plain = F.cross_entropy(head.backbone(head.standardise(batch.tokens.mean(1))), batch.y)
    none = dict.fromkeys(output.losses, 0.0)
    torch.testing.assert_close(total_loss(output, batch.target, none), plain)
    beta = {"stage2": 0.4, "stage3": 0.6, "stage4": 0.8, "contrast": 1.0}
    fused, attention = head.fused(stages_of(batch, head.settings)[0])
    expected = plain + margin_contrast(selected(fused[-1], attention), batch.y)
    for name, classify, x in zip(STAGES, head.classify, fused, strict=True):
        expected = expected + beta[name] * F.cross_entropy(classify(x.max(1).values), batch.y)
    torch.testing.assert_close(total_loss(output, batch.target, beta), expected)


def test_weights_of_the_losses_are_those_of_the_settings(planted: Planted) -> None:
    """A weight of 0 leaves as it began what only that loss teaches."""
    cache = planted(Plan())
    model = quick("swinfc", cache, beta=(0.5, 0.0, 0.0), contrast=0.0).model
    assert isinstance(model, SwinFC)
    assert [bool(classify[-1].weight.any()) for classify in model.classify] == [True, False, False]
    assert model.backbone.weight.any()


def test_one_training_has_every_output(planted: Planted) -> None:
    """`final` says which is told, and changes nothing in training; by val it may keep another epoch."""
    cache = planted(Plan())
    split = np.where(cache.split == "val", "none", cache.split)
    bare, images = replace(cache, split=split), cache.images("test")
    fits = {final: quick("swinfc", bare, epochs=1, final=final) for final in FINALS}
    first, *others = (fitted.model.state_dict() for fitted in fits.values())
    assert all(torch.equal(state[name], value) for state in others for name, value in first.items())
    said = {final: predict(fitted.model, cache, images) for final, fitted in fits.items()}
    by_output = torch.stack([said[name] for name in OUTPUTS])
    torch.testing.assert_close(said["average"].softmax(-1), by_output.softmax(-1).mean(0))
    model: Any = fits["backbone"].model.eval()
    batch = cache.batch(images)
    maps, mean = stages_of(batch, model.settings)
    own = [model.backbone(model.standardise(mean))]
    own += [classify(x.amax(1)) for classify, x in zip(model.classify, model.fused(maps)[0], strict=True)]
    for found, expected in zip(by_output, own, strict=True):
        torch.testing.assert_close(found, expected)
    assert len({tuple(each.flatten().tolist()) for each in by_output}) == len(OUTPUTS)


def test_in_training_too_an_image_is_judged_by_itself() -> None:
    """Batch normalisation, as in the notes, would let the others of a batch have a say."""
    head, batch = made()
    head.train()
    together = head(batch).logits
    fused, _ = head.fused(stages_of(batch, head.settings)[0])
    for image in range(5):
        alone = batch.changed(**{name: getattr(batch, name)[image : image + 1] for name in ("tokens", "y", "target")})
        torch.testing.assert_close(head(alone).logits[0], together[image])
        for found, expected in zip(head.fused(stages_of(alone, head.settings)[0])[0], fused, strict=True):
            torch.testing.assert_close(found[0], expected[image])


def pyramid(cache: Cache) -> Cache:
    """The same images with three layers whose maps shrink and widen; the deepest shows the class in one cell."""
    rows, chance = len(cache.paths) * cache.views, torch.Generator().manual_seed(0)
    layers = {}
    for layer, (grid, width) in SIZES.items():
        vectors = torch.randn(rows, grid[0] * grid[1], width, generator=chance)
        if layer == 7:
            marks = 4 * torch.randn(len(cache.classes), width, generator=chance)
            vectors[torch.arange(rows), torch.arange(rows) % 4] += marks[cache.y.repeat_interleave(cache.views)]
        layers[f"tokens/{layer}"] = Cells(vectors.half(), grid)
    return cache.with_part(Tokens.of(layers))


def test_three_layers_of_other_sizes_are_its_stages(planted: Planted, tmp_path: Path) -> None:
    cache = pyramid(planted(Plan()))
    settings = quick_settings("swinfc", **REAL)
    assert reads_of("swinfc", settings) == {"tokens/1", "tokens/4", "tokens/7"}
    batch = cache.batch(torch.arange(3))
    maps, mean = stages_of(batch, settings)
    assert [(each.grid, each.cells.shape[-1]) for each in maps] == list(SIZES.values())
    assert torch.equal(mean, batch.of("tokens/7").mean(1))
    fitted = quick("swinfc", cache, epochs=20, lr=[1e-2], **REAL)
    assert assess_split(fitted.model, cache, "test")[0] > 0.9
    shake(fitted.model)
    assert_saved(fitted.model, "swinfc", settle(quick_settings("swinfc", **REAL), fitted.chosen), cache, tmp_path)
    for word in ("tokens/1", "tokens/4", "tokens/7"):
        moved = batch.changed(**{word: batch.of(word).flip(0)})
        assert not torch.equal(fitted.model(moved).logits, fitted.model(batch).logits)


def test_settings_as_a_file_has_them() -> None:
    read = read_settings("params.yaml", "train.runs.mine", "swinfc", {"layers": [1, 4, 7], "beta": [0, 0.0, 1]})
    assert read == Settings(layers=(1, 4, 7), beta=(0.0, 0.0, 1.0))
    assert search_points(read) == search_points(Settings())  # no grid for val to choose from
    assert reads_of("swinfc", Settings(layer=4)) == {"tokens/4"}
    assert reads_of("swinfc", Settings()) == {"tokens"}


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"layers": (1, 2, 3), "layer": 3}, r"layer: `layers` say which are read; leave one of them out"),
        ({"heads": 3}, r"heads: 3 do not divide hidden, 256"),
        ({"layers": (1, 2)}, r"layers"),
        ({"beta": (1.0, -0.1, 0.0)}, r"beta\.1"),
        ({"beta": (1.0, 1.0, 0.0), "final": "stage4"}, r"final: stage4 has a beta of 0 and learns nothing"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Settings(**knobs)


def test_a_map_is_pooled_by_nothing_at_size_1() -> None:
    whole = Map(random(1, 6, 2), (2, 3))
    assert whole.pooled(1) is whole
