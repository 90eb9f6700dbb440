"""Which images are annotated, and what aligning with their texts comes to, against plain loops."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.informative import budget, cluster_count, most_informative
from tests.training.cache import Plan
from training.data import Cache
from training.data.descriptions import Descriptions
from training.data.links import Links
from training.layers.features import Features
from training.methods import gaga
from training.regimes import hide_test

Planted = Callable[[Plan], Cache]
QUICK = {"epochs": 15, "weight_decay": [0.1], "hidden": 32, "precision": "fp32", "batch_size": 64, "lr": [3e-3]}


@pytest.fixture(scope="module")
def described(planted: Planted) -> Cache:
    """Sentences say the class, as global vectors do in another basis."""
    cache = planted(Plan(classes=4, train=24, val=8, test=20, noise=1.0, sentences=1, described="all"))
    d = cache.part(Descriptions).d
    noise = torch.randn(d.shape, generator=torch.Generator().manual_seed(0))
    said = F.one_hot(cache.y, d.shape[2])[:, None] + 0.2 * noise
    return cache.change(Descriptions, d=F.normalize(said, dim=-1).half())


def annotated(cache: Cache, **knobs: object) -> gaga.Annotations:
    settings = gaga.Settings(**{"annotations": "descriptions", **knobs})
    features = Features.measure(cache, settings)
    return gaga.annotate(cache, settings, features.of(cache, cache.images("train")))


@pytest.mark.parametrize("share", [0.05, 0.25, 1.0])
def test_the_most_informative_training_images_are_annotated(described: Cache, share: float) -> None:
    found = annotated(described, share=share, annotation_neighbours=0)
    train, settings = described.images("train"), gaga.Settings()
    x = Features.measure(described, settings).of(described, train)
    names = [described.image_ids[image] for image in train.tolist()]
    wanted = most_informative(x, names, budget(len(train), share), cluster_count(len(train)))
    keys = described.part(Links).key[train[wanted]]
    assert set(found.key[found.text.any(1)].tolist()) == set(keys.tolist())
    assert torch.equal(found.key, found.key.sort().values)
    row = torch.searchsorted(found.key, keys[0])
    own = described.part(Descriptions).d[train[wanted[0]]].float().mean(0)
    torch.testing.assert_close(found.text[row], F.normalize(own, dim=0))


def test_a_text_is_averaged_with_its_nearest() -> None:
    text = F.normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    for neighbours in (0, 2, 20):
        found = gaga.smooth(text, neighbours)
        for row in range(9):
            near = [other for other in (text @ text[row]).argsort(descending=True).tolist() if other != row]
            wanted = F.normalize(text[[row, *near[:neighbours]]].sum(0), dim=0)
            torch.testing.assert_close(found[row], wanted)
    torch.testing.assert_close(gaga.smooth(text[:1], 3), text[:1])


def nce(scores: list[float], own: int) -> Tensor:
    values = torch.tensor(scores, dtype=torch.float64)
    return values.logsumexp(0) - values[own]


def test_alignment_is_that_of_images_with_their_texts_and_of_clusters_with_theirs() -> None:
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(7, 4, generator=generator), dim=-1)
    text[2] = text[0]  # two images of one text
    text[5] = 0.0  # one that is not annotated
    cluster, source = torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([0, 1, 0, 3, 4, 5, 6])
    prototypes = F.normalize(torch.zeros(4, 4).index_add(0, cluster, text), dim=-1)
    prototypes[3] = 0.0  # of whose cluster nothing is annotated
    found = gaga.Annotations(torch.arange(7), text, source, cluster, prototypes)
    rows, aligned = torch.tensor([0, 1, 2, 4, 5, 6]), torch.randn(6, 4, generator=generator)
    losses = gaga.alignment(aligned, rows, found, temperature=0.5)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a.double(), b.double(), dim=0)) / 0.5

    there = [0, 1, 2, 3, 5]  # places in the batch whose image has a text
    terms = []
    for i in there:
        others = [j for j in there if j == i or source[rows[j]] != source[rows[i]]]
        own = others.index(i)
        terms.append(nce([cosine(aligned[i], text[rows[j]]) for j in others], own))
        terms.append(nce([cosine(aligned[j], text[rows[i]]) for j in others], own))
    torch.testing.assert_close(losses["nodes"].double(), torch.stack(terms).mean())
    means = {k: aligned[[place for place, row in enumerate(rows) if cluster[row] == k]].mean(0) for k in (0, 1, 2)}
    terms = [
        nce([cosine(*((means[k], prototypes[j]) if ahead else (means[j], prototypes[k]))) for j in means], k)
        for k in means
        for ahead in (True, False)
    ]
    torch.testing.assert_close(losses["prototypes"].double(), torch.stack(terms).mean())


def test_with_one_text_there_is_nothing_to_tell_apart(described: Cache) -> None:
    found = annotated(described, share=0.01)
    assert int(found.text.any(1).sum()) == 1
    losses = gaga.alignment(torch.randn(len(found.key), 32), torch.arange(len(found.key)), found, 0.2)
    assert [float(value) for value in losses.values()] == [0.0, 0.0]


def retrieved(cache: Cache, weights: dict[str, float]) -> float:
    """How often a test image, aligned, is nearest to its own class's mean sentence."""
    settings = gaga.Settings(**QUICK, annotations="descriptions", share=0.25, loss_weights=gaga.LossWeights(**weights))
    model, test = gaga.fit(cache, settings, 0).model.eval(), cache.images("test")
    batch = cache.batch(test)
    with torch.no_grad():
        aligned = model.align(model.norm(model.over_links(batch, model.features(batch))))
    said = F.normalize(aligned, dim=-1)[:, :4]  # dimension c of a sentence says class c
    return float((said.argmax(1) == cache.y[test]).float().mean())


def test_images_come_to_lie_beside_texts_of_their_kind(described: Cache) -> None:
    assert retrieved(described, {"nodes": 1.0, "prototypes": 0.5}) > 0.8
    assert retrieved(described, {"nodes": 0.0, "prototypes": 1.0}) > 0.5
    assert retrieved(described, {"nodes": 0.0, "prototypes": 0.0}) < 0.5


def test_no_judged_image_has_a_part_in_the_annotations(described: Cache) -> None:
    train = described.images("train")
    dm = torch.zeros_like(described.part(Descriptions).dm)
    dm[train] = True
    alone = replace(described.change(Descriptions, dm=dm), y=described.y.flip(0))
    for one, other in zip(annotated(hide_test(described)), annotated(hide_test(alone)), strict=True):
        assert torch.equal(one, other)


def test_without_a_description_it_says_what_to_do(described: Cache) -> None:
    dm = torch.zeros_like(described.part(Descriptions).dm)
    with pytest.raises(UserError, match=r"no training image has a description.*or take annotations: names"):
        annotated(described.change(Descriptions, dm=dm))
