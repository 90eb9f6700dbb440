"""CLS and one cell a head through the last block, against cells picked in a loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.store import bucket_path, make_table, read_header, read_table, write_table
from tests.training.cache import ENCODER, GRID, HEADS, Plan, write_cache
from tests.training.methods.test_universal import assert_saved, quick, quick_settings, shake
from training.data import Batch, Cache, read_cache
from training.data.tokens import as_shape
from training.folds import settle
from training.layers.blocks import Standardise
from training.layers.losses import margin_contrast
from training.loop import assess_split, total_loss
from training.methods import reads_of
from training.methods.transfg import Scales, Settings, TransFG, fit
from training.token_heads import Beside

WIDTH, CLASSES, CELLS = 10, 3, GRID[0] * GRID[1]
LEARNED = {"select": "attention"}
Planted = Callable[[Plan], Cache]


def batch_of(tokens: Tensor, cls: Tensor, rollout: Tensor) -> Batch:
    y = torch.arange(len(tokens)) % CLASSES
    grid = as_shape(GRID)
    values = {"tokens/rollout": tokens, "token_grid/rollout": grid, "cls/rollout": cls, "rollout": rollout}
    return Batch(y, y, {**values, "tokens": tokens, "token_grid": grid})


def made(**knobs: Any) -> tuple[TransFG, Batch]:
    torch.manual_seed(0)
    tokens, cls, rollout = torch.randn(4, CELLS, WIDTH), torch.randn(4, WIDTH), torch.rand(4, 3, CELLS)
    settings = Settings(**{"hidden": 8, "heads": 2, "dropout": 0.0, **knobs})
    whole = tokens.mean(1) if settings.select == "attention" else cls
    scales = Scales(Standardise(tokens.flatten(0, 1)), Standardise(whole))
    head = TransFG(scales, Beside(None), CLASSES, settings)
    nn.init.normal_(head.classify.weight)
    return head.eval(), batch_of(tokens, cls, rollout)


@pytest.mark.parametrize("hidden", [8, None])
def test_it_sees_cls_and_the_cell_of_the_highest_rollout_of_each_head(hidden: int | None) -> None:
    head, batch = made(hidden=hidden)
    for image in range(4):
        parts = []
        for row in batch.rollout[image]:
            best = max(range(CELLS), key=lambda t, row=row: float(row[t]))  # type: ignore[misc]
            parts.append(head.scale_cell(batch.of("tokens/rollout")[image, best]))
        rows = torch.stack([head.scale_cls(batch.of("cls/rollout")[image]), *parts])
        z = head.norm(head.block(head.narrow(rows)[None])[:, 0])
        torch.testing.assert_close(head(batch).logits[image], head.classify(z)[0])


def test_cells_that_no_head_picks_do_not_matter_and_heads_may_agree() -> None:
    head, batch = made()
    best = batch.rollout.argmax(-1)
    tokens = batch.of("tokens/rollout")
    others = torch.ones(4, CELLS).scatter(1, best, 0.0)[..., None]
    moved = batch.changed(**{"tokens/rollout": tokens + others * torch.randn_like(tokens)})
    assert torch.equal(head(moved).logits, head(batch).logits)
    same = batch.changed(rollout=batch.rollout[:, :1].expand(-1, 3, -1))
    assert torch.isfinite(head(same).logits).all()
    # Softmax over one part three times is that over another one than once: duplicates count.
    assert not torch.equal(head(same).logits, head(batch.changed(rollout=batch.rollout[:, :1])).logits)


@pytest.mark.parametrize("knobs", [{}, LEARNED])
def test_the_order_of_cells_does_not_matter(knobs: dict[str, Any]) -> None:
    head, batch = made(**knobs)
    order = torch.randperm(CELLS, generator=torch.Generator().manual_seed(0))
    words = ("tokens/rollout", "tokens")
    moved = batch.changed(rollout=batch.rollout[:, :, order], **{word: batch.of(word)[:, order] for word in words})
    torch.testing.assert_close(head(moved).logits, head(batch).logits)


def test_the_contrast_is_that_of_what_becomes_of_cls_by_what_training_is_told() -> None:
    head, batch = made()
    z = head.norm(head.block(head.narrow(head.picked(batch)))[:, 0])
    told = batch.changed(target=torch.tensor([0, 0, 1, 1]))
    output = head.train()(told)
    torch.testing.assert_close(output.losses["contrast"], margin_contrast(z, told.target))
    plain = F.cross_entropy(output.logits, told.target)
    torch.testing.assert_close(total_loss(output, told.target, {"contrast": 0.0}), plain)
    assert total_loss(output, told.target, {"contrast": 1.0}) > plain


def test_learned_attention_picks_a_cell_whole_and_learns_by_all() -> None:
    head, batch = made(**LEARNED)
    x, cls = head.scale_cell(batch.tokens), head.scale_cls(batch.tokens.mean(1))
    assert head.attention is not None
    a = head.attention(cls, x)
    torch.testing.assert_close(a.sum(-1), torch.ones(4, 2))
    for image in range(4):
        query, key = head.attention.query(cls[image]).chunk(2), head.attention.key(x[image]).chunk(2, dim=-1)
        expected = torch.stack([(k @ q / 2).softmax(0) for q, k in zip(query, key, strict=True)])
        torch.testing.assert_close(a[image], expected)
    picked = head.picked(batch)
    torch.testing.assert_close(picked[:, 0], cls)
    places = a.argmax(-1)
    torch.testing.assert_close(picked[:, 1:], torch.stack([each[place] for each, place in zip(x, places, strict=True)]))
    weight = torch.randn(picked[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    found, expected = (
        torch.autograd.grad((each * weight).sum(), head.attention.key.weight, retain_graph=True)[0]
        for each in (picked[:, 1:], a @ x)
    )
    torch.testing.assert_close(found, expected)
    assert found.any()


@pytest.mark.parametrize(
    "knobs", [LEARNED, {"hidden": None, "heads": 2}, {**LEARNED, "hidden": None, "heads": 18}]
)
def test_other_settings_say_the_same_when_saved(planted: Planted, knobs: dict[str, Any], tmp_path: Path) -> None:
    cache = planted(Plan())
    fitted = quick("transfg", cache, **knobs)
    shake(fitted.model)
    assert_saved(fitted.model, "transfg", settle(quick_settings("transfg", **knobs), fitted.chosen), cache, tmp_path)


def test_it_reads_the_layer_before_the_last_block_or_the_deepest() -> None:
    assert reads_of("transfg", Settings()) == {"tokens/rollout", "cls/rollout", "rollout"}
    assert reads_of("transfg", Settings(select="attention")) == {"tokens"}
    assert reads_of("transfg", Settings(select="attention", layer=1)) == {"tokens/1"}


def test_learned_attention_finds_a_cell_without_rollout(planted: Planted) -> None:
    cache = planted(Plan(cue="local", train=40, val=15, test=40))
    blind = quick("linear_probe", cache)
    ours = quick("transfg", cache, epochs=30, hidden=64, lr=[1e-2], weight_decay=[3.0], **LEARNED)
    assert assess_split(blind.model, cache, "test")[0] < 0.4
    assert assess_split(ours.model, cache, "test")[0] > 0.9


def test_a_tower_without_rollout_is_told_so_and_has_the_substitute(tmp_path: Path) -> None:
    plan = Plan(train=8, val=4, test=4)
    write_cache(tmp_path, plan)
    for bucket in range(plan.buckets):
        path = bucket_path(tmp_path / f"embed/{ENCODER}/tokens", bucket)
        header = read_header(path, "embed.tokens/1")
        rows = [{**row, "cls": None, "rollout": None} for row in read_table(path, "embed.tokens/1").to_pylist()]
        write_table(make_table("embed.tokens/1", rows), path, "embed.tokens/1", header.params, header.fingerprint)
    with pytest.raises(UserError, match=r"embed/tiny/tokens: holds no cls; only a tower with a CLS token has one"):
        read_cache(tmp_path, ENCODER, plan.buckets, reads_of("transfg", Settings()))
    settings = quick_settings("transfg", epochs=1, layer=1, **LEARNED)
    cache = read_cache(tmp_path, ENCODER, plan.buckets, reads_of("transfg", settings))
    assert torch.isfinite(torch.tensor(assess_split(fit(cache, settings, 0).model, cache, "test"))).all()


def test_settings_that_do_not_fit_together_are_refused(planted: Planted) -> None:
    with pytest.raises(ValidationError, match=r"layer: rollout says which layer is read; leave it out"):
        Settings(layer=1)
    with pytest.raises(ValidationError, match=r"heads: 3 do not divide hidden, 256"):
        Settings(heads=3)
    with pytest.raises(UserError, match=r"settings\.heads of transfg: 8 do not divide 36, the width of the enc"):
        quick("transfg", planted(Plan()), hidden=None)


def test_there_is_a_part_for_each_head_of_the_encoder(planted: Planted) -> None:
    cache = planted(Plan())
    model = quick("transfg", cache, epochs=0).model
    assert isinstance(model, TransFG)
    assert model.picked(cache.batch(torch.arange(5))).shape == (5, 1 + HEADS, 36)
