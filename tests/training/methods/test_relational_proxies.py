"""The summary and its relation to the object against loops; each fault of the reference code, on and off."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import assert_saved, quick, quick_settings, shake
from training.data import Batch, Cache
from training.data.kinds import KINDS
from training.folds import settle
from training.layers.blocks import Standardise
from training.layers.losses import proxy_anchor
from training.loop import decayed_groups, predict, total_loss
from training.methods import reads_of
from training.methods.relational_proxies import Fault, RelationalProxies, Settings
from training.region_heads import Regions
from training.token_heads import Beside

IMAGES, LOCAL, WIDTH, CLASSES = 5, 6, 10, 3
Planted = Callable[[Plan], Cache]


def batch_of(local: Tensor | None = None) -> Batch:
    """Images of an object and LOCAL crops, of which the second image has two fewer."""
    generator = torch.Generator().manual_seed(0)
    nodes = F.normalize(torch.randn(IMAGES, 2 + LOCAL, WIDTH, generator=generator), dim=-1)
    if local is not None:
        nodes[:, 2:] = local
    mask = torch.ones(IMAGES, 2 + LOCAL, dtype=torch.bool)
    mask[1, -2:] = False
    kinds = torch.tensor([KINDS.index(kind) for kind in ("global", "object", *["crop"] * LOCAL)]) * mask
    box = torch.rand(IMAGES, 1 + LOCAL, 4, generator=generator)
    y = torch.arange(IMAGES) % CLASSES
    return Batch(y, y, {"nodes": nodes * mask[..., None], "mask": mask, "kinds": kinds, "box": box})


def made(**knobs: Any) -> RelationalProxies:
    torch.manual_seed(0)
    settings = Settings(**{"hidden": 8, "heads": 2, "depth": 2, "dropout": 0.0, **knobs})
    nodes = batch_of().nodes
    regions = Regions(1, torch.arange(2, 2 + LOCAL), settings.local_kinds)
    head = RelationalProxies(Standardise(nodes.flatten(0, 1)), regions, Beside(None), CLASSES, settings)
    if head.proxies.requires_grad:
        nn.init.normal_(head.proxies)
    return head.eval()


def rows(batch: Batch, images: Any) -> Batch:
    return batch.changed(
        y=batch.y[images], target=batch.target[images], **{name: value[images] for name, value in batch.values.items()}
    )


def test_object_summary_and_relation_are_read_by_one_proxy_a_class() -> None:
    head, batch = made(), batch_of()
    logits = head(batch).logits
    for image in range(IMAGES):
        views = head.project.standardise(batch.nodes[image])
        g, *local = (head.project.norm(head.project.linear(view)) for view in views[1:][batch.mask[image, 1:]])
        x = torch.stack([head.summary.cls[0, 0], *local])[None]
        for block in head.summary.blocks:
            x = block(x)
        s = head.summary.norm(x[0, 0])
        first, norm, _, last = head.relation
        r = last(F.leaky_relu(norm(first(torch.cat([g, s])))))
        expected = [(proxy @ g / 1 + proxy @ s / 1 + proxy @ r / 3).item() for proxy in head.proxies]
        torch.testing.assert_close(logits[image], torch.tensor(expected))


def test_the_order_of_crops_says_nothing_but_where_places_have_vectors() -> None:
    batch, order = batch_of(), [0, 1, 7, 4, 2, 6, 5, 3]
    moved = batch.changed(**{name: batch.of(name)[:, order] for name in ("nodes", "mask", "kinds")})
    head, faulty = made(), made(faults=("crop_positions",))
    torch.testing.assert_close(head(moved).logits, head(batch).logits)
    assert not torch.allclose(faulty(moved).logits, faulty(batch).logits, atol=1e-2)


def test_where_a_crop_lies_counts_if_it_is_asked_to() -> None:
    batch = batch_of()
    moved = batch.changed(box=batch.box.flip(1))
    for boxes in (False, True):
        head = made(boxes=boxes)
        assert torch.equal(head(moved).logits, head(batch).logits) is not boxes
    assert reads_of("relational_proxies", Settings()) == {"nodes", "kinds"}
    assert reads_of("relational_proxies", Settings(boxes=True)) == {"nodes", "kinds", "boxes"}


def summarised(head: RelationalProxies, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """What the summary of each image is made of, where views are left as they are."""
    seen = []

    def see(local: Tensor, mask: Tensor) -> Tensor:
        seen.append((local, mask))
        return local.new_zeros(len(local), 8)

    monkeypatch.setattr(head.summary, "forward", see)
    monkeypatch.setattr(head.project, "forward", lambda v: v)
    monkeypatch.setattr(head.relation, "forward", lambda x: x[:, :8])
    head.represent(batch)
    return seen[0]


def test_a_summary_is_of_the_crops_of_its_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop n of image b says 100 b + n; with the fault the crops are those of whoever is in the batch."""
    said = 100.0 * torch.arange(IMAGES)[:, None] + torch.arange(LOCAL)
    batch = batch_of(said[..., None].expand(-1, -1, WIDTH))
    real = batch.mask[:, 2:]
    local, mask = summarised(made(), batch, monkeypatch)
    assert torch.equal(local[..., 0], said * real)
    assert torch.equal(mask, real)
    local, mask = summarised(made(faults=("scrambled_crops",)), batch, monkeypatch)
    by_view = [(b, n) for n in range(LOCAL) for b in range(IMAGES)]
    assert mask.flatten().tolist() == [bool(real[b, n]) for b, n in by_view]
    assert local[..., 0].flatten().tolist() == [100.0 * b + n if real[b, n] else 0.0 for b, n in by_view]
    assert ((local[0, :, 0] // 100) != 0).any()


@pytest.mark.parametrize("fault", [None, *get_args(Fault)])
def test_scrambled_crops_alone_make_an_answer_hang_on_the_rest_of_the_batch(fault: str | None) -> None:
    batch, head = batch_of(), made(faults=(fault,) if fault else ())
    together = head(batch).logits
    alone = torch.cat([head(rows(batch, [image])).logits for image in range(IMAGES)])
    backwards = head(rows(batch, list(reversed(range(IMAGES))))).logits.flip(0)
    if fault == "scrambled_crops":
        assert not torch.allclose(alone, together, atol=1e-2)
        assert not torch.allclose(backwards, together, atol=1e-2)
        # By itself an image has no crops but its own; and whatever comes of the batch, it comes again.
        expected = torch.cat([made()(rows(batch, [image])).logits for image in range(IMAGES)])
        torch.testing.assert_close(alone, expected)
        assert torch.equal(head(batch).logits, together)
    else:
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(backwards, together, atol=1e-5, rtol=1e-5)


def test_proxies_are_trained_unless_they_are_not_to_be() -> None:
    batch = batch_of()
    for faults in ((), ("untrained_proxies",)):
        head = made(faults=faults).train()
        before, trained = head.proxies.clone(), not faults
        optimiser = torch.optim.AdamW(decayed_groups(head, 0.0), lr=0.1)
        held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        assert any(parameter is head.proxies for parameter in held) is trained
        output = head(batch)
        total_loss(output, batch.target, {"anchor": 1.0}).backward()
        assert (head.proxies.grad is not None and bool(head.proxies.grad.any())) is trained
        optimiser.step()
        assert torch.equal(head.proxies, before) is not trained


def test_the_loss_anchors_all_three_views() -> None:
    head, batch = made().train(), batch_of()
    expected = sum(proxy_anchor(view, head.proxies, batch.target).item() for view in head.represent(batch))
    assert head(batch).losses["anchor"].item() == pytest.approx(expected, rel=1e-5)


def test_a_relation_by_batch_norm_hangs_on_the_batch_in_training_alone() -> None:
    batch = batch_of()
    for faults in ((), ("shared_batch_norm",)):
        head = made(faults=faults).train()
        some, every = head(rows(batch, [0, 1])).logits, head(batch).logits[:2]
        assert torch.allclose(some, every, atol=1e-3) is not bool(faults)


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return planted(Plan(train=9, val=4, test=4))


@pytest.mark.parametrize("fault", get_args(Fault))
def test_a_saved_model_with_a_fault_says_the_same(cache: Cache, fault: str, tmp_path: Path) -> None:
    knobs = {"epochs": 2, "faults": (fault,)}
    fitted = quick("relational_proxies", cache, **knobs)
    shake(fitted.model)
    settings = settle(quick_settings("relational_proxies", **knobs), fitted.chosen)
    assert_saved(fitted.model, "relational_proxies", settings, cache, tmp_path)


def test_a_constant_rate_trains_on_where_the_schedule_has_ended(cache: Cache) -> None:
    images = cache.images("test")
    first, *others = (
        predict(quick("relational_proxies", cache, epochs=3, faults=faults).model, cache, images)
        for faults in ((), ("constant_rate",))
    )
    assert not any(torch.equal(first, other) for other in others)
    assert Settings().decays
    assert not Settings(faults=("constant_rate",)).decays


def test_faults_stand_as_a_list_in_files_and_others_are_refused() -> None:
    assert Settings.model_validate({"faults": ["scrambled_crops"]}).faults == ("scrambled_crops",)
    with pytest.raises(ValidationError, match="heads: 3 do not divide hidden, 256"):
        Settings(heads=3)
    with pytest.raises(ValidationError, match="scrambled_crops"):
        Settings(faults=("scrambled",))
