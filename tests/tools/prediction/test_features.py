"""Features of new pictures are those that the stages make, to the last bit, and a run is not asked on others."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fieldmark.command import UserError
from fieldmark.params import Params, load_params
from tests.tools.conftest import Write, run_module
from tools.prediction.features import Features, tables_of
from tools.prediction.pictures import look, read_question
from training.data import CPU, Cache, read_cache

EVERYTHING = frozenset(
    {"globals", "nodes", "boxes", "kinds", "pooled", "moments/isqrt", "tokens", "cls", "labels", "edges"}
)
GLOBALS = frozenset({"globals"})


def features_of(
    params: Params, reads: Mapping[str, frozenset[str]], known: Mapping[str, str] | None = None
) -> Features:
    return Features(params, reads, known or {}, ["a", "b", "c"], CPU)


def seen(features: Features) -> Cache:
    """What is made of all pictures, though the index has them."""
    question = read_question("images")
    return features.make(list(look(question, (), features.prepare, 8)), question)


def same(found: Cache, stored: Cache) -> None:
    """Every field of a batch has the same bits; products of labels may differ in the last one of half precision."""
    place = {image_id: number for number, image_id in enumerate(stored.image_ids)}
    images = torch.tensor([place[image_id] for image_id in found.image_ids])
    ours, theirs = found.batch(torch.arange(len(images))), stored.batch(images)
    for own, other in ((ours, theirs), *zip(ours.also, theirs.also, strict=True)):
        assert own.values.keys() == other.values.keys() != set()
        for name, value in own.values.items():
            near = 1e-3 if name in ("concept_weight", "density", "ring_gains") else 0
            np.testing.assert_allclose(value.numpy(), other.values[name].numpy(), rtol=0, atol=near, err_msg=name)


def test_features_are_those_of_the_stages(asked: Path) -> None:
    params = load_params()
    found = seen(features_of(params, {"vit": EVERYTHING, "twin": GLOBALS}))
    assert len(found.paths) == 24
    same(found, read_cache("data", "vit", params.dataset.buckets, EVERYTHING, ["twin"], GLOBALS))


def test_what_people_marked_for_training_is_not_made(asked: Path) -> None:
    params = load_params()
    found = seen(features_of(params, {"vit": GLOBALS | {"parts"}}))
    same(found, read_cache("data", "vit", params.dataset.buckets, GLOBALS))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [{"mode": "splice", "density": "product"}, {"density": "pixel"}], ids=str)
def test_labels_are_made_in_every_way(
    labels: dict[str, str], trained: Path, write_other: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    params = write_other(labels=labels | {"inside_object": True})
    run_module("stages.label_patches", "--encoder", "vit", "--params", "other.yaml")
    found = seen(features_of(params, {"vit": frozenset({"labels"})}))
    same(found, read_cache("data", "vit", params.dataset.buckets, {"labels"}))


@pytest.mark.slow
def test_windows_have_passes_of_their_own(
    trained: Path, write_other: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are made of a pass without windows, beside one with them."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    params = write_other(embed={"views": 1, "crops": [2]})
    run_module("stages.embed_images", "--encoder", "vit", "--params", "other.yaml")
    reads = frozenset({"nodes", "boxes", "pooled"})
    features = features_of(params, {"vit": reads})
    assert len(features.passes) == 2
    same(seen(features), read_cache("data", "vit", params.dataset.buckets, reads))


@pytest.mark.slow
@pytest.mark.parametrize("regions", [{}, {"crops": "random", "map": "attention"}, {"object": "box"}], ids=str)
def test_regions_are_found_again(
    regions: dict[str, str], trained: Path, write_other: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object and its crops, labels and graphs of them; moments and tokens beside are made of a pass without."""
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    kinds = {"nodes": ["global", "object", "grid", "crop"]}
    params = write_other(embed={"views": 1, "tokens": False, "grids": [2], "regions": regions}, graphs=kinds)
    for stage in ("embed_images", "build_graphs", "select_concepts", "label_patches"):
        run_module(f"stages.{stage}", "--encoder", "vit", "--params", "other.yaml")
    found = seen(features_of(params, {"vit": EVERYTHING}))
    same(found, read_cache("data", "vit", params.dataset.buckets, EVERYTHING))


def test_only_what_is_read_is_made(asked: Path) -> None:
    [shown] = features_of(load_params(), {"vit": frozenset({"globals", "names", "owners"})}).passes
    assert (shown.embed.tokens, shown.embed.grids, shown.embed.crops) == (False, [], [])
    assert [product.folder.name for product in shown.products] == ["images"]


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        ({"nodes"}, {"embed": {"views": 1, "tokens": False, "grids": [2]}}),
        ({"nodes", "edges"}, {"graphs": {"neighbours": 1}}),
        ({"labels"}, {"labels": {"top": 2}}),
        ({"moments/isqrt"}, {"moments": {"vit": {"isqrt": {"directions": 4, "layer": 0}}}}),
        ({"tokens"}, {"tokens": {"vit": {"layers": [0]}}}),
    ],
    ids=["nodes", "edges", "labels", "moments", "tokens"],
)
def test_other_parameters_are_refused(
    words: set[str], blocks: dict[str, dict[str, object]], write_other: Write
) -> None:
    params = write_other(**blocks)
    with pytest.raises(UserError, match=r"data/(embed|graphs|labels)/vit.*(trained on another one|is missing, or of)"):
        features_of(params, {"vit": frozenset(words)})


def test_other_weights_and_missing_names_are_refused(asked: Path) -> None:
    with pytest.raises(UserError, match="data/embed/vit/images: the run was trained on another one than vit"):
        features_of(load_params(), {"vit": frozenset({"nodes"})}, {"embed/vit/images": "another"})
    with pytest.raises(UserError, match=r"moments\.vit\.other: is not there"):
        features_of(load_params(), {"vit": frozenset({"moments/other"})})


def test_a_run_that_reads_descriptions_is_given_none(asked: Path) -> None:
    features = features_of(load_params(), {"vit": frozenset({"globals", "descriptions"})})
    batch = seen(features).batch(torch.arange(24))
    assert batch.d.shape == (24, 0, 16)
    assert batch.dm.shape == (24, 0)


def test_a_run_that_reads_links_is_asked_about_no_new_picture() -> None:
    said = "links/near: is read by this run, and cannot be made of a new picture; ask another run"
    with pytest.raises(UserError, match=f"^{said}$"):
        tables_of("tiny", {"globals", "links/near"})
