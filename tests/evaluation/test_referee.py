"""The referee's maths against the method that it stands for, explicit loops and scikit-learn, on planted data."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from evaluation import referee
from evaluation.referee import Asked, Knobs, Roles, Taught, Texts
from tests.training.cache import Plan
from tests.training.methods.test_prior_lda import described
from training.class_texts import text_blocks
from training.data import Cache
from training.layers.blocks import Standardise
from training.layers.features import Features, FeatureSettings
from training.layers.sparse import sparse_layers
from training.loop import predict
from training.methods import plda
from training.regimes import Shots, by_draw, hide_test, restrict_classes

Planted = Callable[[Plan], Cache]
KNOBS = Knobs(0.3, 0.7)
CLASSES = [f"class-{n:02d}" for n in range(24)]


class Scene(NamedTuple):
    """Images of classes whose means follow from what is known of them, plus what is not."""

    taught: Taught
    y: Tensor
    pool: Tensor
    ranks: Tensor
    asked: Asked


def scene(
    known: Tensor, seed: int = 0, hidden: float = 0.0, noise: float = 0.5, images: int = 12, k: int | None = 0
) -> Scene:
    """20 numbers an image; half of the classes teach, two choose, the others are asked about at k images."""
    generator = torch.Generator().manual_seed(seed)
    classes, size = known.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    means = known.double() @ normal(size, 20) / size**0.5 + hidden * normal(classes, 20)
    y = torch.arange(classes).repeat_interleave(images)
    x = means[y] + noise * normal(len(y), 20)
    pool = torch.arange(len(y)) % 2 == 0
    order = torch.arange(images).div(2, rounding_mode="floor").repeat(classes)
    ranks = torch.where(pool, order, -1)[None]
    roles = referee.rotated_roles([f"class-{n}" for n in range(classes)], 1)[0]
    taught = referee.learn(x, y, roles)
    return Scene(taught, y, pool, ranks, referee.ask(taught, y, pool, ranks, roles.report, k, KNOBS))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return described(planted)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_says_what_plda_says(cache: Cache, k: int) -> None:
    lent, told = CLASSES[:12], CLASSES[14:]
    few = restrict_classes(cache, told, lent)
    few = Shots.model_validate({"shots": k}).apply(few, 0)
    with_texts, without = (
        predict(
            plda.fit(hide_test(few), plda.Settings.model_validate(
                {"shrinkage": [0.3], "prior_shrinkage": [0.7], "texts": texts}), 0).model,
            few, few.images("test"),
        )
        for texts in ("concepts", "none")
    )  # fmt: skip

    teaches = np.isin(np.array(cache.classes)[cache.y.numpy()], lent)
    reported = np.isin(np.array(cache.classes)[cache.y.numpy()], told)
    used = teaches & (cache.split == "train") | reported & np.isin(cache.split, ("train", "test"))
    seen = cache.take(torch.from_numpy(np.flatnonzero(used)))
    pool = torch.from_numpy(seen.split == "train")
    order = {path: place for place, path in enumerate(sorted(seen.paths, key=by_draw(0)))}
    ranks = torch.full((1, len(pool)), -1)
    for label in range(24):
        own = sorted(((seen.y == label) & pool).nonzero()[:, 0].tolist(), key=lambda image: order[seen.paths[image]])
        ranks[0, own] = torch.arange(len(own))
    roles = Roles(torch.arange(12), torch.tensor([12, 13]), torch.arange(14, 24))
    features = Features.measure(restrict_classes(cache, lent), FeatureSettings())
    taught = referee.learn(features.of(seen, torch.arange(len(pool))), seen.y, roles)
    asked = referee.ask(taught, seen.y, pool, ranks, roles.report, k, KNOBS)
    texts = torch.cat(text_blocks(cache, "concepts"), dim=1)
    placed, nothing = referee.place(taught, texts), referee.nowhere(taught, 24)
    for said, wanted in ((placed, with_texts), (nothing, without)):
        found = referee.logits(asked, said)[0].T
        found, other = (each.double() - each.double().mean(1, keepdim=True) for each in (found, wanted))
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3 * found.abs().max().item())


def test_roles_rotate_so_that_every_class_is_told_apart_as_often() -> None:
    splits = referee.rotated_roles([f"class-{n}" for n in range(100)], 5)
    assert all([*map(len, roles)] == [50, 10, 40] for roles in splits)
    assert all(len(torch.cat(list(roles)).unique()) == 100 for roles in splits)
    assert torch.bincount(torch.cat([roles.report for roles in splits])).tolist() == [2] * 100
    with pytest.raises(ValueError, match="6 classes are too few"):
        referee.rotated_roles(list("abcdef"), 5)


def test_without_images_logits_are_those_of_gaussians_where_texts_say() -> None:
    """By the definition: log densities, with no inner product made before."""
    known = normal(24, 6)
    taught, *_, asked = scene(known, hidden=0.3)
    placed = referee.place(taught, known)
    covariance = torch.diag(0.7 * taught.spread.values + 0.3 * taught.spread.mean)
    found = referee.logits(asked, placed)[0]
    x = taught.x[asked.images]
    for row, label in enumerate(asked.classes.tolist()):
        away = x - placed.weights[label] @ taught.means
        density = ((x @ covariance.inverse() * x) - (away @ covariance.inverse() * away)).sum(1) / 2
        torch.testing.assert_close(found[row], density, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, None])
def test_with_images_logits_are_posteriors_by_whole_matrices(k: int | None) -> None:
    """Class means drawn about where texts expect them, with the covariance of what teaching classes missed."""
    known = normal(24, 6)
    taught, y, pool, ranks, asked = scene(known, hidden=0.3, k=k)
    placed = referee.place(taught, known)
    scale = (0.7 * taught.spread.values + 0.3 * taught.spread.mean).rsqrt()
    missed = placed.missed @ (taught.means * scale)
    values, axes = torch.linalg.eigh(missed.T @ missed / len(missed))
    values = (values - 1 / 12).clamp(min=0)
    B = axes @ torch.diag(0.3 * values + 0.7 * values.sum() / 20) @ axes.T
    eye, x = torch.eye(20, dtype=torch.float64), taught.x[asked.images] * scale
    count = 6 if k is None else k
    A = B @ (B + eye / count).inverse()
    within = (eye + B - A @ B).inverse()
    found = referee.logits(asked, placed)[0]
    for row, label in enumerate(asked.classes.tolist()):
        few = taught.x[(y == label) & pool & (ranks[0] < count)] * scale
        expected = placed.weights[label] @ taught.means * scale
        mu = expected + A @ (few.mean(0) - expected)
        density = ((x @ within * x) - ((x - mu) @ within * (x - mu))).sum(1) / 2
        torch.testing.assert_close(found[row], density, rtol=1e-6, atol=1e-6)


def test_texts_that_tell_where_images_lie_are_told_from_texts_that_do_not() -> None:
    known = normal(24, 6)
    taught, *_, asked = scene(known)
    carried, nothing = (referee.hits(asked, each).mean() for each in (
        referee.place(taught, known), referee.place(taught, normal(24, 6, seed=1))))  # fmt: skip
    silent = referee.hits(asked, referee.nowhere(taught, 24)).mean()
    assert carried > 0.8
    assert nothing < 0.3
    assert silent.item() == pytest.approx(1 / len(asked.classes))


def test_leaving_a_concept_out_is_fitting_the_text_without_it() -> None:
    K = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(3)), dim=1)
    own = torch.zeros(40, 20, dtype=torch.bool)
    own[torch.arange(40), torch.arange(40) % 20] = True
    own[0, 5] = True  # a text of two classes
    texts = Texts(tuple(map(str, range(40))), K, own)
    vectors = referee.class_vectors(K, own)
    taught, *_, asked = scene(vectors, hidden=0.1)
    placed = referee.place(taught, vectors)
    worth, pairs = referee.concept_worth(asked, placed, texts, temperature=2.0)
    concept, label = texts.owned

    def loss(weights: Tensor) -> Tensor:
        said = referee.logits(asked, placed._replace(weights=weights))[0] / 2.0
        return F.cross_entropy(said.T, asked.y)

    assert placed.text_map is not None
    assert set(label[pairs].tolist()) == set(asked.classes.tolist())
    for value, pair in zip(worth.tolist(), pairs.tolist(), strict=True):
        fewer = own.clone()
        fewer[concept[pair], label[pair]] = False
        changed = placed.text_map.predict(referee.class_vectors(K, fewer), placed.penalty)
        weights = placed.weights.clone()
        weights[label[pair]] = changed[label[pair]]
        assert value == pytest.approx((loss(weights) - loss(placed.weights)).item(), abs=1e-5)


def test_a_class_without_a_text_is_told_by_the_texts_of_all_others() -> None:
    K, own = torch.eye(3), torch.tensor([[True, False, False], [False, True, False], [False, True, False]])
    vectors = referee.class_vectors(K, own)
    root = 0.5**0.5
    wanted = F.normalize(torch.tensor([1.0, root, root]), dim=0)
    torch.testing.assert_close(vectors, torch.stack([K[0], torch.tensor([0.0, root, root]), wanted]))


def test_what_is_missing_is_laid_at_the_attributes_that_texts_leave_out() -> None:
    """Texts say the first group; images show the first and the second; the third shows in nothing."""
    attributes = (normal(60, 9) > 0).double()
    shown = attributes[:, :6] - 0.5
    texts = attributes[:, :3] @ normal(3, 12, seed=5)
    taught, y, pool, ranks, asked = scene(shown, noise=0.2)
    groups = {"said": range(3), "unsaid": range(3, 6), "unseen": range(6, 9)}
    steps = referee.decompose(taught, y, pool, ranks, asked, texts, attributes, groups, KNOBS)
    said, told, true, images = (step.mean().item() for step in steps[:4])
    adds = {group: steps.groups[group].mean().item() - told for group in groups}
    explained = {
        what: {group: 1 - error / chance for group, (error, chance) in found.items()}
        for what, found in (("content", steps.content), ("seen", steps.seen))
    }
    assert told == pytest.approx(said, abs=0.1)  # the map loses nothing
    assert true - told > 0.3  # content
    assert adds["unsaid"] > 0.3
    assert abs(adds["said"]) < 0.05
    assert abs(adds["unseen"]) < 0.1
    assert images > 0.7
    assert explained["content"]["said"] > 0.9
    assert max(explained["content"]["unsaid"], explained["content"]["unseen"]) < 0.2
    assert min(explained["seen"]["said"], explained["seen"]["unsaid"]) > 0.8
    assert explained["seen"]["unseen"] < 0.2


def test_by_rank_each_image_is_asked_among_the_taxa_beside_its_own() -> None:
    chains = torch.tensor([[0, 5, 7], [1, 5, 7], [2, 6, 7], [3, 6, 7], [4, -1, -1]])
    y = torch.tensor([0, 1, 2, 3, 4])
    said = normal(5, 5, seed=4)
    found = referee.by_rank(said, y, chains)
    for rank, (hit, beside) in enumerate(found):
        for image, label in enumerate(y.tolist()):
            taxon = chains[label, rank].item()
            above = chains[label, rank + 1].item() if rank < 2 else 0
            among = [
                other
                for other in range(5)
                if chains[other, rank] >= 0 and (rank == 2 or chains[other, rank + 1].item() == above)
            ]
            others = [other for other in among if chains[other, rank].item() != taxon]
            assert bool(beside[image]) == (taxon >= 0 and bool(others))
            if beside[image]:
                guess = max(among, key=lambda other: said[other, image].item())
                assert bool(hit[image]) == (chains[guess, rank].item() == taxon)


def test_the_dense_layer_is_ridge_at_the_penalty_that_leaving_out_prefers() -> None:
    x, y = normal(60, 5).float(), torch.arange(60) % 3
    x = x + 2 * F.one_hot(y, 5)
    query = normal(20, 5, seed=1).float()
    found = referee.dense(x, y, query, 3)
    told = F.one_hot(y, 3).double().numpy()
    spread = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True) * 60).mean()
    fits = [Ridge(alpha=share * spread).fit(x.double(), told).predict(query) for share in referee.PENALTIES_OF_ROWS]
    assert min(np.abs(fit - found.numpy()).max() for fit in fits) < 1e-6


def test_the_bottleneck_finds_the_concepts_that_tell_and_needs_no_more() -> None:
    """Each of 8 classes shows in one of 24 concepts."""
    K = torch.linalg.qr(normal(24, 24))[0].float()
    y = torch.arange(8).repeat(30)
    x = 2 * K[y] + 0.3 * torch.randn(len(y), 24, generator=torch.Generator().manual_seed(1))
    made = referee.bottleneck(x[:160], y[:160], x[160:], K, 8, [2.0, float("inf")])
    assert made.nec[0] <= 2
    assert [(said.argmax(1) == y[160:]).double().mean().item() > 0.95 for said in made.logits] == [True, True]
    own = torch.zeros(24, 8, dtype=torch.bool)
    own[torch.arange(24), torch.arange(24) % 8] = True
    means = torch.stack([x[y == label].mean(0) for label in range(8)])
    assert referee.most_telling(K, own, means, 10.0, 1).nonzero()[:, 0].tolist() == list(range(8))


def test_what_l1_keeps_in_a_bottleneck_is_fitted_anew() -> None:
    """Without the shrinkage of L1, the same concepts say more of what they were fitted to."""
    K = torch.linalg.qr(normal(24, 24))[0].float()
    y = torch.arange(8).repeat(30)
    x = K[y] + 0.7 * torch.randn(len(y), 24, generator=torch.Generator().manual_seed(1))
    made = referee.bottleneck(x, y, x, K, 8, [1.0])
    scores = Standardise(x)(x) @ K.T
    shrunken = sparse_layers(scores, y, 8, [1.0])[0]
    before = scores @ shrunken.weight.T + shrunken.bias
    assert made.nec == [shrunken.nec]
    assert made.violation == [shrunken.violation]
    assert F.cross_entropy(made.logits[0], y) < 0.9 * F.cross_entropy(before, y)


def test_a_long_file_is_cut_to_as_many_texts_from_all_classes_in_turn() -> None:
    own = torch.zeros(40, 4, dtype=torch.bool)
    own[torch.arange(40), torch.tensor([0] * 30 + [1] * 6 + [2] * 3 + [3])] = True
    own[0, 3] = True  # a text of two classes
    texts = Texts(tuple(map(str, range(40))), normal(40, 5).float(), own)
    assert referee.fewer_texts(texts, 40) is texts
    fewer = referee.fewer_texts(texts, 14)
    assert len(set(fewer.texts)) == len(fewer.K) == 14
    kept = [int(text) for text in fewer.texts]
    torch.testing.assert_close(fewer.K, texts.K[kept])
    assert torch.equal(fewer.own, own[kept])
    assert 0 in kept  # one of the two texts of its shortest class
    counts = fewer.own.sum(0).tolist()
    assert counts[2:] == [3, 2]  # all that these have
    assert max(counts[:2]) <= 6  # five turns, and the one that it shares
