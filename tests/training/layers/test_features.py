"""What probes see of an image: the same from a batch as from the cache, each block with its weight."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan, write_cache, write_moments, write_other
from training.data import Batch, Cache, Part, feature_words, read_cache
from training.data.features import feature_blocks, feature_kinds
from training.data.moments import Moments
from training.data.nodes import Globals, Nodes, mean_and_max
from training.data.rows import EncoderFiles
from training.layers.blocks import Standardise
from training.layers.features import Features, FeatureSettings, blocks_of, parts_of
from training.methods import also_reads_of, linear_probe, read_settings, reads_of, ridge

Planted = Callable[[Plan], Cache]


def test_mean_and_maximum_by_hand() -> None:
    nodes = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]], [[-1.0, 5.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    y = torch.zeros(2, dtype=torch.long)
    mean, highest = mean_and_max(Batch(y, y, {"nodes": nodes, "mask": mask}))
    assert mean.tolist() == [[2.0, -3.0], [-1.0, 5.0]]
    assert highest.tolist() == [[3.0, -2.0], [-1.0, 5.0]]


def test_the_global_vector_alone_is_standardised_and_no_more(planted: Planted) -> None:
    cache = planted(Plan(views=2))
    features, train = Features.measure(cache, FeatureSettings()), cache.images("train")
    vectors = torch.cat([cache.globals(train, view) for view in range(2)])
    assert torch.equal(features.of_training(cache), Standardise(vectors)(vectors))
    assert torch.equal(features.of(cache, train, 1), Standardise(vectors)(cache.globals(train, 1)))


@pytest.mark.parametrize("transform", ["none", "signed_sqrt"])
def test_blocks_have_equal_weight_whatever_their_sizes(planted: Planted, transform: str) -> None:
    cache = planted(Plan(views=2))
    settings = FeatureSettings.model_validate({"features": ["global", "nodes"], "transform": transform})
    features = Features.measure(cache, settings)
    x = features.of_training(cache)
    assert x.shape[1] == features.size == 3 * 32
    for block in x.split(32, dim=1):
        torch.testing.assert_close(block.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
        assert block.var(0, correction=0).sum().item() == pytest.approx(32, rel=1e-4)
    # As if the global vector came twice as wide: its weight in the sum stays what it was.
    wide = replace(cache, parts=cache.parts.with_part(doubled(cache)))
    x = Features.measure(wide, settings).of_training(wide)
    sums = [block.var(0, correction=0).sum().item() for block in x.split([64, 32, 32], dim=1)]
    assert sums == pytest.approx([128 / 3] * 3, rel=1e-4)


def doubled(cache: Cache) -> Globals:
    nodes = cache.part(Nodes).nodes[:, 0]
    return Globals(torch.cat([nodes, nodes.flip(1)], dim=1))


def test_signed_roots_of_unit_length_by_a_loop(planted: Planted) -> None:
    cache = planted(Plan())
    batch = cache.batch(cache.images("test")[:3])
    [found] = blocks_of(FeatureSettings(transform="signed_sqrt"), batch)
    for vector, said in zip(batch.g.tolist(), found.tolist(), strict=True):
        roots = [(value > 0) * abs(value) ** 0.5 - (value < 0) * abs(value) ** 0.5 for value in vector]
        length = sum(root**2 for root in roots) ** 0.5
        assert said == pytest.approx([root / length for root in roots], abs=1e-6)


def test_what_is_fitted_is_what_a_batch_shows(planted: Planted) -> None:
    cache = planted(Plan(views=2))
    features = Features.measure(cache, FeatureSettings(features=["nodes", "global"]))
    images = cache.images("train")[:7]
    shown = features(cache.batch(images, torch.ones(7, dtype=torch.long)))
    assert torch.equal(features.of(cache, images, 1), shown)
    mean, highest = mean_and_max(cache.batch(images, torch.ones(7, dtype=torch.long)))
    for block, raw in zip(shown.split(32, dim=1), (mean, highest, cache.globals(images, 1)), strict=True):
        torch.testing.assert_close(F.normalize(block - block.mean(0)), F.normalize(raw - raw.mean(0)))


def test_what_a_probe_reads_follows_from_its_features() -> None:
    assert feature_words() == {"globals", "nodes", "moments", "again", "asked", "descriptions", "links"}
    assert parts_of(["global"]) == {"globals"}
    # Node 0 is the global vector: it is not read twice.
    assert parts_of(["nodes"]) == parts_of(["global", "nodes"]) == {"nodes"}
    assert reads_of("linear_probe", linear_probe.Settings(features=["nodes"])) == {"nodes"}
    # Any other name is one of moments.
    assert parts_of(["pooled", "isqrt", "isqrt-390", "global"]) == {
        "pooled", "moments/isqrt", "moments/isqrt-390", "globals",
    }  # fmt: skip


def test_moments_stand_beside_the_global_vector(planted: Planted) -> None:
    cache = planted(Plan(views=2))
    features = Features.measure(cache, FeatureSettings(features=["pooled", "global"]))
    images = cache.images("train")[:7]
    batch = cache.batch(images, torch.ones(7, dtype=torch.long))
    pooled, whole = blocks_of(features.settings, batch)
    assert torch.equal(pooled, cache.part(Moments).vectors["pooled"][2 * images + 1].float())
    assert torch.equal(whole, cache.globals(images, 1))
    assert features(batch).shape == (7, 36 + 32)


@pytest.mark.parametrize("given", [["../images"], ["global", ""]])
def test_what_cannot_be_the_name_of_a_vector_is_said(given: list[str]) -> None:
    known = r"one of descriptions, global, nodes, a key under moments\.ENCODER"
    what = rf"^p\.yaml: runs\.a\.settings\.features\.\d: .*{known}"
    with pytest.raises(UserError, match=what):
        read_settings("p.yaml", "runs.a", "linear_probe", {"features": given})


def test_a_later_part_brings_its_vector_by_itself(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = planted(Plan(cue="none"))

    @dataclass(frozen=True)
    class Answer(Part):
        """One dimension that says the class."""

        provides: ClassVar[frozenset[str]] = frozenset({"answer"})
        features = {"answer": lambda batch: (batch.answer,)}  # noqa: RUF012

        answer: Tensor

        @classmethod
        def read(cls, source: EncoderFiles) -> Self:
            raise NotImplementedError

    kinds = feature_kinds() | {"answer": Answer}
    monkeypatch.setattr("training.data.features.feature_kinds", lambda: kinds)
    cache = cache.with_part(Answer(F.one_hot(cache.y).float()))
    settings = linear_probe.Settings(features=["answer"], l2=[1e-4])
    assert linear_probe.reads(settings) == {"answer"}
    told = cache.only(linear_probe.reads(settings))
    model = linear_probe.fit(told, settings, 0).model
    test = told.images("test")
    assert (model(told.batch(test)).logits.argmax(1) == told.y[test]).all()


def test_vectors_of_other_encoders_are_further_blocks(tmp_path: Path) -> None:
    write_cache(tmp_path, Plan(views=2))
    write_other(tmp_path, "other", 20)
    write_moments(tmp_path, "other", "pooled", 24)
    settings = ridge.Settings(features=["nodes", "global", "pooled"])
    reads, also_reads = reads_of("ridge", settings), also_reads_of("ridge", settings)
    assert reads == {"nodes", "pooled"}
    assert also_reads == {"nodes", "globals", "pooled"}
    cache = read_cache(tmp_path, "tiny", 3, reads, ["other"], also_reads)
    features, images = Features.measure(cache, settings), cache.images("train")[:5]
    batch = cache.batch(images, torch.ones(5, dtype=torch.long))
    blocks = blocks_of(features.settings, batch)
    assert [block.shape[1] for block in blocks] == [32, 32, 32, 36, 20, 20, 20, 24]
    assert torch.equal(blocks[-1], batch.also[0].pooled)
    assert torch.equal(blocks[-2], batch.also[0].g)
    x = features.of_training(cache).split([block.shape[1] for block in blocks], 1)
    weights = torch.stack([block.var(0, correction=0).sum() for block in x])
    torch.testing.assert_close(weights, torch.full((8,), features.size / 8))


def test_another_encoder_without_the_same_nodes_stands_beside_where_none_is_read(tmp_path: Path) -> None:
    write_cache(tmp_path, Plan())
    write_moments(tmp_path, "other", "pooled", 24)
    settings = ridge.Settings(features=["pooled"])
    cache = read_cache(tmp_path, "tiny", 3, {"pooled"}, ["other"], also_reads_of("ridge", settings))
    assert Features.measure(cache, settings).size == 36 + 24
    with pytest.raises(UserError, match="embed/other/images"):
        read_cache(tmp_path, "tiny", 3, {"nodes"}, ["other"], {"nodes"})


def test_mean_and_scale_do_not_depend_on_the_chunks(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = planted(Plan(views=2))
    settings = FeatureSettings(features=["nodes", "pooled"])
    whole = Features.measure(cache, settings)
    assert whole.chunk == 2048
    monkeypatch.setattr("training.layers.features.ROOM", 5 * whole.size)
    some = Features.measure(cache, settings)
    assert some.chunk == 5
    for one, other in zip(some.standardise, whole.standardise, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.scale, other.scale)
    assert torch.equal(some.of_training(cache), whole.of_training(cache))


def test_descriptions_are_the_mean_of_their_sentences(planted: Planted) -> None:
    cache = planted(Plan(sentences=3))
    batch = cache.batch(cache.images("train"))
    assert batch.dm.any()
    [found] = feature_blocks("descriptions", batch)
    for row, sentences, there in zip(found, batch.d, batch.dm, strict=True):
        own = sentences[there]
        torch.testing.assert_close(row, F.normalize(own.mean(0), dim=0) if len(own) else torch.zeros_like(row))


def test_without_any_description_a_probe_cannot_tell_what_texts_are_worth(planted: Planted) -> None:
    with pytest.raises(UserError, match=r"no image has a description, which this run reads; set describe\.enabled"):
        ridge.fit(planted(Plan(sentences=0)), ridge.Settings(features=["descriptions"]), 0)
