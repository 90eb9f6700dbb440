import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from evaluation.fitting import base_cache, controlled_cache
from evaluation.plan import Cell, Entry, Study, Variation
from evaluation.plan import Plan as StudyPlan
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels.labelling import Reference
from fieldmark.params import Labels as LabelSettings
from stages.label_patches import label
from tests.project import write_thumbs
from tests.training.cache import ALL, ENCODER, Plan, tensors, unit, with_vectors, write_cache
from tests.training.methods.test_universal import FIRST_STEPS
from training.control_texts import read_control_texts
from training.controls import FEWER, Control, Request, apply_control, control_names, load_control, read_control
from training.controls.fewer_concepts import keep_concepts
from training.controls.owners_permuted import cycle
from training.data import Cache, kind_of, part_kinds, read_cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.descriptions import Descriptions
from training.data.edges import Edges
from training.data.kinds import Kinds
from training.data.labels import Labels
from training.data.links import Links
from training.data.moments import Moments
from training.data.nodes import Globals, Nodes
from training.data.parts import ObjectParts
from training.data.tokens import Cls, Rollout, Tokens
from training.loop import predict
from training.methods import (
    borrows_others,
    concept_graph,
    description_zero_shot,
    load_method,
    lpp,
    method_names,
    reads_of,
    single_points,
    zero_shot,
)
from training.regimes import Full, LongTail, Partial, restrict_classes
from training.relabelling import Labelling, read_labelling, relabel

PLAN = Plan(classes=5, train=6, val=2, test=20, nodes=7, dimension=24, views=2, noise=1.0, concepts=4, ragged=False)
SETTINGS = LabelSettings(temperature=0.7, top=3, redundancy=0.4, select_locals=3, select_concepts=5)
SCALE = 20.0
LABELS = {"concept_idx", "concept_weight", "density", "selected", "selected_concepts", "ring_gains"}
OF_LABELS = {f"Labels.{name}" for name in LABELS}
CHANGED: dict[str, set[str]] = {
    "none": set(),
    "edges_removed": {"Edges.count"},
    "edges_rewired": {"Edges.ends"},
    "links_removed": {"Links.near/start", "Links.near/source", "Links.near/weight"},
    "links_rewired": {"Links.near/source"},
    "links_random": {"Links.near/source"},
    "random_vectors": {*OF_LABELS, "Bank.K"},
    "unrelated_texts": {*OF_LABELS, "Bank.K", "Bank.kept", "Bank.owners"},
    "random_descriptors": {*OF_LABELS, "Bank.K", "Bank.kept", "Bank.owners"},
    "owners_permuted": {"Bank.owners"},
    "vectors_shuffled": {"Bank.owners"},
    "same_text": {*OF_LABELS, "Bank.K"},
}
NAMES = control_names()
PARTS = {
    **{"edges": "Edges.", "links": "Links.", "labels": "Labels."},
    **{"names": "Bank.", "concepts": "Bank.", "owners": "Bank."},
}
seeds = st.integers(0, 1000)


def write_controls(folder: Path, unrelated: int = 60, per_class: int = 7, encoder: str = "one") -> None:
    """Random unit vectors as texts; those of random descriptors are along axis `rank`."""
    rng = np.random.default_rng(5)
    rows: list[dict[str, Any]] = [
        {"kind": "unrelated", "rank": rank, "text": f"thing {rank}", "vector": unit(rng.standard_normal(24))}
        for rank in range(unrelated)
    ]
    rows += [
        {
            **{"kind": "random", "class_id": f"class-{position:02d}", "rank": rank, "text": f"{position} {rank}"},
            "vector": unit(np.eye(24)[rank] + 0.1 * np.eye(24)[10 + position]),
        }
        for position in range(PLAN.classes)
        for rank in range(per_class)
    ]
    path = folder / f"embed/{ENCODER}/controls.parquet"
    table = with_vectors("embed.controls/1", rows)
    store.write_table(table, path, "embed.controls/1", {"encoder": encoder}, f"{unrelated} {per_class}")


def label_as_the_stage_does(folder: Path, settings: LabelSettings = SETTINGS) -> None:
    """Labels by stages.label_patches, under headers as that stage and embed_text write them."""
    text = folder / f"embed/{ENCODER}/text.parquet"
    header = store.read_header(text, "embed.text/1")
    made_by = {"encoder": "one", "logit_scale": SCALE}
    store.write_table(store.read_table(text, "embed.text/1"), text, "embed.text/1", made_by, header.fingerprint)
    bank = store.read_table(folder / f"bank/{ENCODER}.parquet", "bank/1").filter(pc.field("kept"))
    concepts = torch.from_numpy(store.vectors_of(bank).astype(np.float32))
    for bucket in range(PLAN.buckets):
        nodes = store.read_table(store.bucket_path(folder / f"embed/{ENCODER}/images", bucket), "embed.nodes/1")
        path = store.bucket_path(folder / f"labels/{ENCODER}", bucket)
        header = store.read_header(path, "labels/1")
        thumbs = None
        if settings.density == "pixel":
            thumbs = store.read_table(store.bucket_path(folder / "thumbs", bucket), "thumbs/1")
        numbers = bank["concept_idx"].to_numpy()
        made = label(nodes, concepts, numbers, SCALE, settings, Reference(), thumbs=thumbs)
        store.write_table(made, path, "labels/1", header.params | settings.model_dump(), header.fingerprint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder, PLAN)
    label_as_the_stage_does(folder)
    write_controls(folder)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return read_cache(folder, ENCODER, PLAN.buckets, ALL)


@pytest.fixture(scope="module")
def control(folder: Path, cache: Cache) -> Callable[..., Cache]:
    def make(name: str = "none", seed: int = 0, concepts: int | None = None, of: Cache = cache) -> Cache:
        return apply_control(of, request(folder, name, seed, concepts))

    return make


def request(folder: Path, name: str = "none", seed: int = 0, concepts: int | None = None) -> Request:
    chosen = Control.model_validate({"name": name, "concepts": concepts})
    return Request(chosen, folder, ENCODER, PLAN.buckets, torch.Generator().manual_seed(seed))


def labels_of(cache: Cache) -> dict[str, Tensor]:
    return cache.part(Labels).tensors()


def concepts_of(bank: Bank) -> Tensor:
    return bank.kept & ~bank.of_kind("name")


def accuracy(method: Any, cache: Cache) -> float:
    images = cache.images("test")
    logits = predict(method.fit(cache, method.Settings(), 0).model, cache, images)
    return (logits.argmax(1) == cache.y[images]).float().mean().item()


@pytest.mark.parametrize("name", NAMES)
def test_a_control_changes_what_it_says_and_nothing_else(
    cache: Cache, control: Callable[..., Cache], name: str
) -> None:
    made, again, other = control(name), control(name), control(name, seed=1)
    before, after = tensors(cache), tensors(made)
    assert before.keys() == after.keys()
    for field, value in after.items():
        same = value.data_ptr() == before[field].data_ptr()
        if name in CHANGED:
            assert same == (field not in CHANGED[name]), field
        assert same or field.startswith(tuple(PARTS[part] for part in Control(name=name).changes)), field
        assert torch.equal(value, tensors(again)[field])
    for field in ("classes", "paths", "split", "views"):
        assert getattr(made, field) is getattr(cache, field)
    chosen = Control(name=name)
    assert chosen.draws == any(not torch.equal(value, tensors(other)[field]) for field, value in after.items())
    if name in ("none", "edges_removed", "edges_rewired"):
        assert made.part(Bank) is cache.part(Bank)
    assert (chosen.changes == frozenset()) == (name == "none")
    # No label names a text that is gone.
    heavy = made.part(Labels).concept_weight > 0
    assert made.part(Bank).kept[made.part(Labels).concept_idx[heavy].long()].all()
    assert made.part(Bank).kept[made.part(Labels).selected_concepts.long()].all()
    torch.testing.assert_close(made.part(Bank).K.norm(dim=1), torch.ones(len(made.part(Bank).K)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_controls_and_regimes_go_in_either_order(cache: Cache, control: Callable[..., Cache], name: str) -> None:
    for regime in (LongTail(exponent=1.0), Partial(wrong="instance", q=0.5)):
        one, two = regime.apply(control(name), 3), control(name, of=regime.apply(cache, 3))
        assert one.split.tolist() == two.split.tolist()
        for field, value in tensors(one).items():
            assert torch.equal(value, tensors(two)[field])


def test_labels_are_made_as_the_stage_makes_them(folder: Path, cache: Cache) -> None:
    made = relabel(cache, read_labelling(folder, ENCODER, PLAN.buckets, {}, {}))
    for field, value in labels_of(made).items():
        torch.testing.assert_close(value, labels_of(cache)[field])
    assert made.part(Labels).selected.sum(1).unique().tolist() == [1 + SETTINGS.select_locals]


@pytest.fixture(scope="module")
def by_pixels(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That folder with a picture of noise for each image, labelled by density of pixels."""
    copy = tmp_path_factory.mktemp("pixels") / "data"
    shutil.copytree(folder, copy)
    index = store.read_table(copy / "index/images.parquet", "index.images/1").filter(pc.field("status") == "ok")
    rng = np.random.default_rng(0)
    pictures = {
        image_id: rng.integers(0, most, (9, 11), dtype=np.uint8)
        for image_id, most in zip(index["image_id"].to_pylist(), rng.integers(2, 256, len(index)), strict=True)
    }
    write_thumbs(pictures, buckets=PLAN.buckets, folder=copy / "thumbs")
    label_as_the_stage_does(copy, SETTINGS.model_copy(update={"density": "pixel"}))
    return copy


def test_labels_by_pixels_are_made_as_the_stage_makes_them(folder: Path, by_pixels: Path, cache: Cache) -> None:
    staged = read_cache(by_pixels, ENCODER, PLAN.buckets, ALL)
    assert not torch.equal(staged.part(Labels).density, cache.part(Labels).density)
    again = relabel(staged, read_labelling(by_pixels, ENCODER, PLAN.buckets, {}, {}))
    # A study labels a cache by pixels that was labelled otherwise, and the other way round.
    mixed = folder.parent / "mixed"
    shutil.copytree(folder, mixed)
    shutil.copytree(by_pixels / "thumbs", mixed / "thumbs")
    turned = labelled(planned(mixed), "pixel")
    back = labelled(planned(by_pixels), "neg_entropy")
    for made, expected in ((again, staged), (turned, staged), (back, cache)):
        for field, value in labels_of(made).items():
            assert torch.equal(value, labels_of(expected)[field]), field


def labelled(plan: StudyPlan, density: str) -> Cache:
    """The cache of a study's variant, its nodes labelled by a setting of density."""
    variation = Variation((("density", density),))
    return controlled_cache(plan, base_cache(plan, ENCODER, ()), ENCODER, Control(), 0, variation)


def planned(data: Path) -> StudyPlan:
    """A study of one method that reads all, with nodes labelled by two settings of density."""
    entry = Entry("concept_graph", concept_graph.Settings())
    entries = {
        density: dataclasses.replace(entry, variation=Variation((("density", density),)))
        for density in ("pixel", "neg_entropy")
    }
    study = Study(methods=["concept_graph"])
    return StudyPlan("density", study, (ENCODER,), data, PLAN.buckets, entries, (), ())


def test_a_control_leaves_density_of_pixels_and_needs_no_thumbnail(by_pixels: Path, tmp_path: Path) -> None:
    shutil.copytree(by_pixels, tmp_path / "data", ignore=shutil.ignore_patterns("thumbs"))
    staged = read_cache(tmp_path / "data", ENCODER, PLAN.buckets, ALL)
    made = apply_control(staged, request(tmp_path / "data", "random_vectors"))
    assert torch.equal(made.part(Labels).density, staged.part(Labels).density)
    assert torch.equal(made.part(Labels).selected, staged.part(Labels).selected)
    assert not torch.equal(made.part(Labels).concept_weight, staged.part(Labels).concept_weight)
    assert not torch.equal(made.part(Labels).ring_gains, staged.part(Labels).ring_gains)


def test_padding_gets_no_label(folder: Path, cache: Cache) -> None:
    labelling = read_labelling(folder, ENCODER, PLAN.buckets, {}, {})
    short, nodes = 3, cache.part(Nodes)
    mask = nodes.mask.clone()
    mask[::2, short:] = False
    fewer = cache.change(Nodes, mask=mask, nodes=nodes.nodes.masked_fill(~mask[..., None], 0))
    padded = relabel(fewer, labelling)
    by_node = LABELS - {"selected_concepts", "ring_gains"}
    cut = {name: labels_of(cache)[name][::2, :short] for name in by_node}
    few = cache.change(Labels, **cut).change(Nodes, mask=mask[::2, :short], nodes=nodes.nodes[::2, :short])
    alone = relabel(few.change(Boxes, box=cache.part(Boxes).box[::2, :short]), labelling)
    assert torch.equal(padded.part(Labels).selected_concepts[::2], alone.part(Labels).selected_concepts)
    assert torch.equal(padded.part(Labels).selected_concepts[1::2], cache.part(Labels).selected_concepts[1::2])
    for field in by_node:
        value = labels_of(padded)[field]
        torch.testing.assert_close(value[::2, :short], labels_of(alone)[field])
        assert not value[::2, short:].any()
        torch.testing.assert_close(value[1::2], labels_of(cache)[field][1::2])


def test_ring_gains_are_of_the_bank(cache: Cache, control: Callable[..., Cache]) -> None:
    for name in ("edges_removed", "edges_rewired", "owners_permuted"):
        assert control(name).part(Labels).ring_gains is cache.part(Labels).ring_gains
    changed = control("random_vectors").part(Labels).ring_gains
    assert not torch.allclose(changed, cache.part(Labels).ring_gains)


def test_edges_are_removed(cache: Cache, control: Callable[..., Cache]) -> None:
    images = torch.arange(len(cache.paths))
    assert cache.batch(images).adjacency.any()
    assert not control("edges_removed").batch(images).adjacency.any()


@pytest.mark.parametrize("graph", ["gcn", "gat", "sage"])
def test_without_edges_no_message_passes(cache: Cache, control: Callable[..., Cache], graph: Any) -> None:
    chosen = concept_graph.Settings(graph=graph, hidden=16, epochs=0, weight_decay=[0.1])
    model = concept_graph.fit(cache, chosen, 0).model
    generator, images = torch.Generator().manual_seed(0), cache.images("test")

    def reached(read: Cache) -> Tensor:
        """(N+1, N+1) bool: whether what a node holds (row) changes what the layers make of another (column)."""
        batch = read.batch(images)
        x = torch.randn(*batch.mask.shape, 16, generator=generator)
        before = model.propagate(x, batch, batch.mask)
        found = []
        for node in range(x.shape[1]):
            changed = x.clone()
            changed[:, node] += 1 + x[:, node].roll(1, dims=-1)
            found.append((model.propagate(changed, batch, batch.mask) != before).flatten(2).any(2).any(0))
        return torch.stack(found)

    nodes = cache.part(Nodes).mask.shape[1]
    assert reached(cache).all()
    assert torch.equal(reached(control("edges_removed")), torch.eye(nodes, dtype=torch.bool))


# Under settings with which it reads more than by default, or less.
MORE_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "concept_graph": [
        {"graph": "mlp"},
        {"texts": 0},
        {"texts": 0, "graph": "mlp"},
        {"texts": 0, "nodes": "selected"},
        {"streams": ["global"]},
        {"streams": ["local"]},
        {"description": True, "streams": ["global"]},  # no stream reads it
        {"description": True, "texts": 0},
    ],
    "cate": [
        {"interference": 0},
        {"loss_weights": {"predictive": 0.0}},
        {"interference": 0, "loss_weights": {"predictive": 0.0}},
    ],
    "lpp": [{"text_scale": [0.0]}],
    "description_zero_shot": [{"class_names": True}, {"keep": 2, "neighbours": 1, "average": "embeddings"}],
    "prior_lda": [{"texts": "names"}, {"texts": "concepts"}],
    "plda": [{"texts": "both"}],
    **{method: [{"texts": "both"}] for method in ("gda", "proker", "prolip")},
}
CASES = [(method, given) for method in method_names() for given in ({}, *MORE_SETTINGS.get(method, []))]


@pytest.fixture(scope="module")
def every_part(folder: Path, cache: Cache) -> Cache:
    """With gains of rings, sentences, and the global vectors by themselves, and no val: the last epoch is kept."""
    rows, generator = len(cache.part(Labels).density), torch.Generator().manual_seed(3)
    said = F.normalize(torch.randn(len(cache.paths), 2, 24, generator=generator), dim=-1).half()
    described = Descriptions(said, torch.ones(said.shape[:2], dtype=torch.bool))
    with_all = cache.change(Labels, ring_gains=torch.rand(rows, 3, generator=generator)).with_part(described)
    with_all = with_all.with_part(Globals(cache.part(Nodes).nodes[:, 0].clone()))
    split = np.where(np.isin(cache.split, ("choose", "val")), "unused", cache.split)
    return dataclasses.replace(with_all, split=split)


@pytest.fixture(scope="module")
def without(every_part: Cache, control: Callable[..., Cache]) -> dict[str, Cache]:
    """`every_part` under each control."""
    return {name: control(name, of=every_part) for name in NAMES}


@pytest.mark.parametrize(("method", "given"), CASES, ids=lambda value: str(value))
def test_a_control_changes_the_logits_where_the_plan_says_so_and_no_bit_elsewhere(
    folder: Path, every_part: Cache, without: dict[str, Cache], method: str, given: dict[str, Any]
) -> None:
    module = load_method(method)
    quick = {"epochs": 1, "hidden": 16, "batch_size": 16, "precision": "fp32", "lr": [1e-2], **FIRST_STEPS}
    known = {name: value for name, value in quick.items() if name in module.Settings.model_fields}
    chosen = single_points(module.Settings(**(known | given)))[0]
    entries, study = {method: Entry(method, chosen)}, Study(methods=[method])
    plan = StudyPlan("one", study, (ENCODER,), folder, PLAN.buckets, entries, (), ())
    images = torch.arange(len(every_part.paths))

    def logits(of: Cache) -> Tensor:
        """Of a method that sees what it declares under these settings, and nothing else; lent are the same classes."""
        seen = dataclasses.replace(of, others=of if borrows_others(method) else None).only(reads_of(method, chosen))
        return predict(module.fit(seen, chosen, 0).model, seen, images)

    plain, bites = logits(every_part), set()
    kinds = {kind_of(name) for name in reads_of(method, chosen)}
    said: dict[tuple[int, ...], Tensor] = {}  # one fit for all controls that leave it the very same parts
    for name in NAMES:
        cell = Cell(ENCODER, Control(name=name), Full(), 0, method, 0)
        seen = tuple(id(part) for kind, part in without[name].parts.by_kind.items() if kind in kinds)
        if seen not in said:
            said[seen] = logits(without[name])
        differs = not torch.equal(said[seen], plain)
        assert differs == plan.reads(cell, cell.control.changes), name
        bites |= {name} if differs else set()
    # Nothing takes away what is made of pictures alone, or marked in them.
    of_images = {Globals, Nodes, Kinds, Moments, Boxes, Tokens, Cls, Rollout, ObjectParts}
    assert bool(bites) == bool(kinds - of_images)


def test_shuffled_vectors_are_the_same_ones_in_other_classes(cache: Cache, control: Callable[..., Cache]) -> None:
    bank, spread = cache.part(Bank), []
    for seed in range(20):
        made = control("vectors_shuffled", seed).part(Bank)
        assert made.K is bank.K
        assert made.kept is bank.kept
        for kind in set(bank.kind):  # each class owns as many names, and as many texts, as before
            assert torch.equal(made.own[bank.of_kind(kind)].sum(0), bank.own[bank.of_kind(kind)].sum(0))
        assert torch.equal(made.own[~bank.own.any(1)], bank.own[~bank.own.any(1)])
        texts = concepts_of(bank) & bank.own.any(1)
        # A class's texts go to several classes, not to one as under owners_permuted.
        spread += [int(made.own[texts & bank.own[:, label]].any(0).sum()) for label in range(PLAN.classes)]
    assert np.mean(spread) > 2
    mean = np.mean([accuracy(description_zero_shot, control("vectors_shuffled", seed)) for seed in range(20)])
    assert mean == pytest.approx(1 / 5, abs=0.08)


def test_one_text_for_all_tells_no_class_from_another(cache: Cache, control: Callable[..., Cache]) -> None:
    made = control("same_text")
    names = made.part(Bank).of_kind("name")
    for rows in (names, ~names):
        assert (made.part(Bank).K[rows] == made.part(Bank).K[rows][0]).all()
    mean = F.normalize(cache.part(Bank).K[concepts_of(cache.part(Bank))].mean(0), dim=0)
    torch.testing.assert_close(made.part(Bank).K[~names][0], mean)
    # What is left of the method that leans on texts is the probe, whatever the strength.
    images = torch.arange(len(made.paths))
    told = [predict(lpp.fit(made, lpp.Settings(l2=[0.1], text_scale=[s]), 0).model, made, images) for s in (0.0, 10.0)]
    torch.testing.assert_close(*told, atol=2e-2, rtol=0)
    assert accuracy(zero_shot, made) == pytest.approx(1 / 5, abs=0.05)


def adjacency(cache: Cache, rows: Tensor) -> Tensor:
    return cache.part(Edges).cut(rows, rows)["adjacency"]


@given(seed=seeds)
@settings(max_examples=10)
def test_rewired_graphs_keep_degrees_and_weights(cache: Cache, control: Callable[..., Cache], seed: int) -> None:
    rows = torch.arange(len(cache.part(Nodes).nodes))
    before, after = adjacency(cache, rows), adjacency(control("edges_rewired", seed), rows)
    assert torch.equal(after, after.transpose(1, 2))
    assert not after.diagonal(dim1=1, dim2=2).any()
    for view in (0, 1):
        weights = [graph[..., view].flatten(1).sort().values for graph in (before, after)]
        assert torch.equal(*weights)
        # The global node keeps its edges' weights, the local ones trade their degrees.
        assert torch.equal(*(graph[:, 0, :, view].sort().values for graph in (before, after)))
        degrees = [(graph[:, 1:, :, view] > 0).sum(2).sort().values for graph in (before, after)]
        assert torch.equal(*degrees)
    moved = (before != after).flatten(1).any(1).float().mean()
    assert moved > 0.9


def test_rewiring_leaves_unlinked_nodes_and_other_images_alone(cache: Cache, control: Callable[..., Cache]) -> None:
    # Nodes 6 and 7 lose their edges, as kinds that `graphs.nodes` leaves out have none.
    gone = (cache.part(Edges).ends >= 6).any(1)
    ends, weight = cache.part(Edges).ends.clone(), cache.part(Edges).weight.clone()
    ends[gone], weight[gone] = torch.tensor([0, 1], dtype=torch.int16), 0
    rows = torch.arange(len(cache.part(Nodes).nodes))
    rewired = control("edges_rewired", of=cache.change(Edges, ends=ends, weight=weight))
    assert not adjacency(rewired, rows)[:, 6:].any()
    # A restricted cache shares the edge lists with images it does not hold.
    part = restrict_classes(cache, cache.classes[1:3])
    rows = torch.arange(len(part.part(Nodes).nodes))
    before, after = adjacency(part, rows), adjacency(control("edges_rewired", of=part), rows)
    assert torch.equal(before.flatten(1).sort().values, after.flatten(1).sort().values)
    assert not torch.equal(before, after)


def test_random_vectors_leave_chance(cache: Cache, control: Callable[..., Cache]) -> None:
    for method in (zero_shot, description_zero_shot):
        assert accuracy(method, cache) > 0.9
        mean = np.mean([accuracy(method, control("random_vectors", seed)) for seed in range(20)])
        assert mean == pytest.approx(1 / 5, abs=0.06)
    made = control("random_vectors")
    assert torch.equal(made.part(Bank).own, cache.part(Bank).own)
    assert made.part(Bank).kind == cache.part(Bank).kind
    assert not (made.part(Bank).K == cache.part(Bank).K).any(1).any()
    assert (made.part(Bank).K * cache.part(Bank).K).sum(1).mean().abs() < 0.15  # nothing is left of the real ones


def test_permuted_owners_leave_no_class_its_own(cache: Cache, control: Callable[..., Cache]) -> None:
    for seed in range(5):
        made = control("owners_permuted", seed)
        assert made.part(Bank).K is cache.part(Bank).K
        assert not (made.part(Bank).own & cache.part(Bank).own).any()
        assert torch.equal(made.part(Bank).own.sum(1), cache.part(Bank).own.sum(1))
        for method in (zero_shot, description_zero_shot):
            assert accuracy(method, made) < 0.06


@given(count=st.integers(2, 50), seed=seeds)
def test_a_cycle_visits_all_and_fixes_none(count: int, seed: int) -> None:
    permutation = cycle(count, torch.Generator().manual_seed(seed))
    place, visited = 0, []
    for _ in range(count):
        assert permutation[place] != place
        visited.append(place)
        place = int(permutation[place])
    assert sorted(visited) == list(range(count))


@given(seed=seeds)
@settings(max_examples=15)
def test_fewer_concepts_are_shared_out_evenly_and_nested(cache: Cache, seed: int) -> None:
    names, smaller = cache.part(Bank).of_kind("name"), torch.zeros(len(cache.part(Bank).kind), dtype=torch.bool)
    for count in range(1, int(cache.part(Bank).kept.sum()) + 1):
        rows = keep_concepts(cache.part(Bank), count, torch.Generator().manual_seed(seed)) & ~names
        assert int(rows.sum()) == count
        assert (cache.part(Bank).kept | ~rows).all()
        assert (rows | ~smaller).all()
        shares = cache.part(Bank).own[rows].sum(0)
        assert shares.max() - shares.min() <= 1
        assert cache.part(Bank).own[rows].any(1).all() or count > 5 * 4  # texts of no class come last
        smaller = rows


def test_a_shared_concept_counts_for_all_its_owners() -> None:
    own = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=torch.bool)
    bank = Bank("bank.parquet", torch.eye(5), ("visual",) * 5, torch.ones(5, dtype=torch.bool), own)
    for seed in range(20):
        rows = keep_concepts(bank, 4, torch.Generator().manual_seed(seed))
        shares = own[rows].sum(0)
        assert shares.max() - shares.min() <= 1


def test_a_smaller_bank_labels_with_what_is_left(cache: Cache, control: Callable[..., Cache]) -> None:
    made = control("none", concepts=2)
    assert int(concepts_of(made.part(Bank)).sum()) == 2
    assert made.part(Labels).concept_idx.shape[-1] == 2
    sums = made.part(Labels).concept_weight.float().sum(-1)
    torch.testing.assert_close(sums, torch.ones(made.part(Nodes).mask.shape), atol=2e-3, rtol=0)
    assert accuracy(zero_shot, made) == accuracy(zero_shot, cache)
    single = control("random_vectors", concepts=1)
    assert (single.part(Labels).density == 1).all()
    everything = int(cache.part(Bank).kept.sum())
    assert int(concepts_of(control("none", concepts=everything).part(Bank)).sum()) == everything
    with pytest.raises(UserError, match=rf"tiny\.parquet: has {everything} kept concepts, .* for {everything + 1}"):
        control("none", concepts=everything + 1)
    assert Control(name="none", concepts=3).label == "none-3"
    assert Control(name="edges_removed").label == "edges_removed"


def test_every_concept_becomes_another_unrelated_text(
    folder: Path, cache: Cache, control: Callable[..., Cache]
) -> None:
    made = control("unrelated_texts")
    table, _ = read_control_texts(folder, ENCODER)
    chosen = table.filter(pc.field("kind") == "unrelated")
    unrelated = torch.from_numpy(store.vectors_of(chosen).astype(np.float32))
    kept = concepts_of(made.part(Bank))
    match = (made.part(Bank).K[kept][:, None] == unrelated[None]).all(2)
    assert match.sum(1).tolist() == [1] * int(cache.part(Bank).kept.sum())
    assert match.sum(0).max() == 1
    assert torch.equal(made.part(Bank).own[kept], cache.part(Bank).own[cache.part(Bank).kept])
    assert accuracy(zero_shot, made) == accuracy(zero_shot, cache)
    mean = np.mean([accuracy(description_zero_shot, control("unrelated_texts", seed)) for seed in range(20)])
    assert mean == pytest.approx(1 / 5, abs=0.06)
    assert int((~kept & ~made.part(Bank).of_kind("name")).sum()) == 0  # the dropped text is not left to be read
    read = {f"embed/{ENCODER}/controls.parquet", f"embed/{ENCODER}/text.parquet"}
    for name in ("unrelated_texts", "random_descriptors"):
        assert Control(name=name).files(ENCODER, {"concepts"}).keys() == read


def test_every_class_owns_as_many_random_descriptors_as_texts(cache: Cache, control: Callable[..., Cache]) -> None:
    made = control("random_descriptors")
    kept = concepts_of(made.part(Bank))
    assert torch.equal(made.part(Bank).own[kept].sum(0), cache.part(Bank).own[cache.part(Bank).kept].sum(0))
    assert (made.part(Bank).own[kept].sum(1) == 1).all()
    ranks: set[tuple[int, ...]] = set()
    for position in range(PLAN.classes):
        vectors = made.part(Bank).K[kept & made.part(Bank).own[:, position]]
        assert vectors[:, 10:].argmax(1).unique().tolist() == [position]  # of this class's name
        ranks.add(tuple(vectors[:, :10].argmax(1).tolist()))
    assert len(ranks) == 1  # the same for all classes
    assert len(set(*ranks)) == PLAN.concepts
    assert accuracy(zero_shot, made) == accuracy(zero_shot, cache)


def test_a_concept_of_two_classes_gives_each_a_descriptor(cache: Cache, control: Callable[..., Cache]) -> None:
    own = cache.part(Bank).own.clone()
    shared = int(concepts_of(cache.part(Bank)).nonzero()[0])
    own[shared] = F.one_hot(torch.tensor([0, 3]), 5).any(0)
    made = control("random_descriptors", of=cache.change(Bank, owners=own)).part(Bank)
    kept = concepts_of(made)
    assert torch.equal(made.own[kept].sum(0), own[cache.part(Bank).kept].sum(0))
    assert (made.own[kept].sum(1) == 1).all()


def test_what_is_missing_is_said_in_one_line(cache: Cache, folder: Path, tmp_path: Path) -> None:
    for part in ("embed", "labels"):
        (tmp_path / part / ENCODER).mkdir(parents=True)
    text, labels = f"embed/{ENCODER}/text.parquet", f"labels/{ENCODER}/b000.parquet"
    for name in (text, labels):
        (tmp_path / name).write_bytes((folder / name).read_bytes())

    def change(name: str) -> Cache:
        return apply_control(cache, request(tmp_path, name))

    assert read_labelling(tmp_path, ENCODER, PLAN.buckets, {}, {}) == Labelling(SETTINGS, Reference(), SCALE)
    with pytest.raises(UserError, match=r"controls\.parquet: is missing; add tiny to `controls`"):
        change("unrelated_texts")
    write_controls(tmp_path, encoder="another")
    with pytest.raises(UserError, match=r"controls\.parquet: is of another encoder than text\.parquet"):
        change("random_descriptors")
    write_controls(tmp_path, unrelated=3, per_class=2)
    with pytest.raises(UserError, match=r"holds 3 unrelated texts for 22 concepts; add lines to data/controls/unrel"):
        change("unrelated_texts")
    with pytest.raises(UserError, match=r"holds 2 random .* class-00, which owns 4 concepts; raise per_class of"):
        change("random_descriptors")
    header = store.read_header(tmp_path / labels, "labels/1")
    said = {name: value for name, value in header.params.items() if name != "mode"}
    table = store.read_table(tmp_path / labels, "labels/1")
    store.write_table(table, tmp_path / labels, "labels/1", said, header.fingerprint)
    with pytest.raises(UserError, match=r"do not say what labels\.mode was, .*; run label_patches again"):
        read_labelling(tmp_path, ENCODER, PLAN.buckets, {}, {})


def test_each_file_of_controls_says_what_it_is() -> None:
    assert set(NAMES) >= CHANGED.keys()
    for name in (*NAMES[1:], FEWER):
        module = load_control(name)
        assert part_kinds().keys() >= module.CHANGES
        assert part_kinds().keys() >= module.NEEDS
        assert module.SUBJECT
    with pytest.raises(UserError, match=r"p: c: there is no .*/edges_remove\.py; did you mean edges_removed\?"):
        read_control("p", "c", "edges_remove")


def test_a_control_needs_what_it_reads_and_no_more() -> None:
    assert Control().needs({"globals"}) == {"globals"}
    assert Control(name="edges_removed").needs({"nodes", "edges"}) == {"nodes", "edges"}
    # Labels are made anew only for a method that reads them.
    assert Control(name="random_vectors").needs({"globals", "names"}) == {"globals", "names", "concepts"}
    assert Control(name="random_vectors").needs({"labels"}) >= {"labels", "nodes", "boxes", "concepts"}
    assert Control(name="none", concepts=3).changes == {"concepts", "labels"}


def test_links_of_nobody(cache: Cache, control: Callable[..., Cache]) -> None:
    batch = control("links_removed").batch(torch.arange(len(cache.paths)))
    assert batch.of("links/near").shape == (2, 0)
    assert len(batch.of("link_weight/near")) == 0


@pytest.mark.parametrize("name", ["links_rewired", "links_random"])
def test_other_links_keep_how_many_an_image_hears_and_lose_its_class(
    cache: Cache, control: Callable[..., Cache], name: str
) -> None:
    plain, made = (one.part(Links).incoming["near"] for one in (cache, control(name)))
    assert torch.equal(made.start, plain.start)
    assert torch.equal(made.weight, plain.weight)
    key = cache.part(Links).key
    assert torch.isin(made.source, key).all()
    assert torch.equal(made.source.sort().values, plain.source.sort().values) == (name == "links_rewired")
    order = key.argsort()
    hears = cache.y.repeat_interleave(plain.start.diff())
    alike = [
        (cache.y[order[torch.searchsorted(key[order], edges.source)]] == hears).float().mean().item()
        for edges in (plain, made)
    ]
    assert alike[0] > 0.7  # of five classes
    assert abs(alike[1] - 0.2) < 4 * (0.16 / len(hears)) ** 0.5


def test_links_from_images_that_the_cache_has_not_stay_so(cache: Cache, control: Callable[..., Cache]) -> None:
    few = cache.take(torch.arange(0, len(cache.paths), 2))
    key, plain = few.part(Links).key, few.part(Links).incoming["near"].source
    drawn = control("links_random", of=few).part(Links).incoming["near"].source
    gone = ~torch.isin(plain, key)
    assert gone.any()
    assert torch.equal(drawn[gone], plain[gone])
    assert torch.isin(drawn[~gone], key).all()
