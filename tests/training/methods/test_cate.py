import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import quick, shake
from training.data import Cache
from training.data.bank import Bank
from training.layers.blocks import Standardise
from training.loop import assess_split
from training.methods import NotPossible
from training.methods.cate import CATE, HARDEST, Interference, Settings, class_anchors, fit, predictive, reads

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def cache(planted: Callable[[Plan], Cache]) -> Cache:
    return planted(Plan())


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=GENERATOR), dim=-1)


def by_loop(x: Tensor, z: Tensor, mask: Tensor, anchors: Tensor, share: Tensor, patches: int) -> float:
    """Patch by patch, from what training is told in probabilities (B, C)."""
    losses = []
    units = F.normalize(anchors, dim=1)
    for image in range(len(x)):
        mine = F.normalize(share[image] @ anchors, dim=0)
        if not mine.any():
            continue
        real = mask[image].nonzero().flatten().tolist()
        asked = sorted(real, key=lambda n: -float(x[image, n] @ mine))[:patches]
        for n in asked:
            q = F.normalize(z[image, n], dim=0)
            rest = [float(q @ units[c]) for c in range(len(anchors)) if anchors[c].any() and not share[image, c]]
            hardest = sorted(rest, reverse=True)[:HARDEST]
            right = math.exp(float(q @ mine) / 0.1)
            losses.append(-math.log(right / (right + sum(math.exp(each / 0.1) for each in hardest))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("soft", [False, True])
def test_the_predictive_loss_equals_a_loop(soft: bool) -> None:
    x, z, mask = unit(6, 5, 8), torch.randn(6, 5, 8, generator=GENERATOR), torch.ones(6, 5, dtype=torch.bool)
    mask[1, 2:], mask[4, 1:] = False, False  # fewer patches than are asked
    anchors, y = torch.randn(40, 8, generator=GENERATOR), torch.tensor([0, 5, 39, 7, 7, 3])
    anchors[[3, 11]] = 0.0  # classes without concepts: an image of one asks no patch
    share = F.one_hot(y, 40).float()
    if soft:
        share = 0.7 * share + 0.3 * F.one_hot((y + 1) % 40, 40)
    found = predictive(x, z, mask, anchors, share if soft else y, 3)
    assert float(found) == pytest.approx(by_loop(x, z, mask, anchors, share, 3), rel=1e-4)
    assert torch.equal(predictive(x, z, mask, torch.zeros(40, 8), y, 3), torch.tensor(0.0))


def test_the_predictive_loss_asks_the_patches_that_look_like_the_class(cache: Cache) -> None:
    """A planted patch is among those that are asked, and gradients reach these alone."""
    batch, anchors = cache.batch(cache.images("train")), class_anchors(cache.part(Bank))
    x = batch.nodes.float()
    z = torch.randn(x.shape, generator=GENERATOR, requires_grad=True)
    predictive(x, z, batch.mask, anchors, batch.target, 2).backward()
    assert z.grad is not None
    reached = z.grad.abs().sum(-1) > 0
    assert (reached.sum(1) == 2).all()
    alike = torch.einsum("bnd,bd->bn", x, anchors[batch.y]).masked_fill(~batch.mask, -9)
    assert (reached & batch.mask).gather(1, alike.argmax(1, keepdim=True)).all()
    assert (alike.argmax(1) > 0).any()


def test_anchors_are_the_mean_of_kept_concepts(cache: Cache) -> None:
    bank = cache.part(Bank)
    for label, anchor in enumerate(class_anchors(bank)):
        owned = [bank.K[k] for k in range(len(bank.K)) if bank.own[k, label] and bank.kept[k]]
        torch.testing.assert_close(anchor, torch.stack(owned).mean(0))


def test_interference_is_the_standardised_product_and_reads_no_other_patch() -> None:
    K, x = unit(30, 8), unit(4, 5, 8)
    part = Interference(K, Standardise(x.flatten(0, 1) @ K.T), 6, 0.0)
    met = part.standardise(x @ K.T)
    torch.testing.assert_close(part(x), part.widen(F.elu(part.narrow(met))), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part(x[:1, :1]), part(x)[:1, :1])


def made(cache: Cache, **knobs: object) -> CATE:
    model = quick("cate", cache, dropout=0.0, epochs=1, **knobs).model
    shake(model)
    assert isinstance(model, CATE)
    return model


def test_noise_is_for_training_alone(cache: Cache) -> None:
    model, batch = made(cache), cache.batch(cache.images("train"))
    assert torch.equal(model.eval()(batch).logits, model(batch).logits)
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)
    with torch.no_grad():  # without a spread there is nothing to draw
        last = model.encode[-1]
        assert isinstance(last, torch.nn.Linear)
        last.weight[32:], last.bias[32:] = 0.0, -60.0
    torch.testing.assert_close(model(batch).logits, model.eval()(batch).logits)


def test_what_is_off_is_not_computed_and_not_read(cache: Cache) -> None:
    assert reads(Settings()) == {"nodes", "concepts", "owners"}
    assert reads(Settings.model_validate({"loss_weights": {"predictive": 0.0}})) == {"nodes", "concepts"}
    bare = {"interference": 0, "loss_weights": {"predictive": 0.0, "superfluous": 0.0}}
    assert reads(Settings.model_validate(bare)) == {"nodes"}
    batch = cache.batch(cache.images("train"))
    assert set(made(cache).train()(batch).losses) == {"predictive", "superfluous"}
    assert made(cache.only({"nodes"}), **bare).train()(batch).losses == {}


def test_no_concepts_are_a_reason_and_not_a_fault(cache: Cache) -> None:
    bare = cache.with_part(replace(cache.part(Bank), owners=torch.zeros_like(cache.part(Bank).own)))
    with pytest.raises(NotPossible, match=r"no class owns a kept concept; .*interference: 0"):
        fit(bare, Settings(epochs=1), 0)


@pytest.mark.slow
def test_the_bottleneck_keeps_what_tells_of_the_class_s_concepts(planted: Callable[[Plan], Cache]) -> None:
    """On images that taught nothing, and the cue in one patch of nine, which decides."""
    cache = planted(Plan(train=40, val=15, test=40, cue="local"))
    batch, anchors = cache.batch(cache.images("test")), class_anchors(cache.part(Bank))
    left = {}
    for weight in (1.0, 0.0):
        weights = {"predictive": weight, "superfluous": 0.0}
        model = quick("cate", cache, epochs=10, lr=[3e-3], patches=1, loss_weights=weights).model.eval()
        with torch.no_grad():
            z = model.encode(model.scale(batch.nodes)).chunk(2, dim=-1)[0]  # type: ignore[operator,union-attr]
        left[weight] = float(predictive(batch.nodes.float(), z, batch.mask, anchors, batch.y, 1))
    assert left[1.0] < 0.5 * left[0.0]
    assert assess_split(model, cache, "test")[0] > 0.8
