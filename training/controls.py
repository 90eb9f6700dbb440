"""Controls: the same cache without what a method claims to gain from, so that a gain can be laid at its door.

A control is a function from a cache to a cache, seeded, that takes one thing away and touches nothing else:

    none                as it is
    edges_removed       no image has an edge
    edges_rewired       each image's local nodes change places in its graph: the same edges, weights and degrees,
                        between other nodes; the global node stays, and so do nodes without an edge
    random_vectors      every vector of the bank, names too, is a random unit vector
    unrelated_texts     kept concepts become texts about things that are neither animals nor plants, each another one
    random_descriptors  each class owns as many texts as before, "NAME, which has ..." and words or characters drawn at
                        random (after WaffleCLIP, Roth et al., ICCV 2023 [mem]); texts of no class are left out
    owners_permuted     class c's texts and names belong to the class after c in a random cycle over all classes: no
                        class keeps its own

`concepts: M` keeps M of the kept concepts first. Where vectors or kept concepts change, the nodes' labels are made anew
as label_patches makes them. The bank of a control that replaces texts holds names and the control's texts only: none of
those it stands against is left to be read. Descriptions of images are not concepts, and stay.

Controls change bank, labels and edges, regimes (training/regimes.py) change split and target: they can be applied in
either order.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.labels.labelling import Reference, label_images, read_reference
from fieldmark.params import Block, Count, Labels
from fieldmark.store import bucket_path, read_header, read_table, vectors_of
from training.data import Bank, Cache

NEEDS_TEXTS = ("unrelated_texts", "random_descriptors")
GROUP = 2048  # views that are taken out of a cache to be labelled


class Control(Block):
    """What is taken away; `concepts` limits the bank to so many kept concepts before."""

    name: Literal[
        "none",
        "edges_removed",
        "edges_rewired",
        "random_vectors",
        "unrelated_texts",
        "random_descriptors",
        "owners_permuted",
    ] = "none"
    concepts: Count | None = None

    @property
    def label(self) -> str:
        return self.name if self.concepts is None else f"{self.name}-{self.concepts}"


@dataclass(frozen=True)
class Materials:
    """What a control needs beside a cache: how its nodes were labelled, and texts to put in the place of concepts."""

    labels: Labels
    reference: Reference  # what those labels know of training images
    logit_scale: float
    texts: pa.Table | None  # embed.controls/1, where the control needs it
    path: str  # where the texts are, for messages
    fingerprints: dict[str, str]  # of the texts, by file


def read_materials(folder: str | Path, encoder: str, control: Control, buckets: int) -> Materials:
    """From `folder` (data/): the settings that the labels say they were made with, the encoder's scale, the texts.

    Raises UserError where a file is missing, or holds texts of another encoder, or where labels lean on boxes of
    objects, which no cache has.
    """
    folder = Path(folder)
    path = folder / f"embed/{encoder}/controls.parquet"
    text = read_header(folder / f"embed/{encoder}/text.parquet", "embed.text/1").params
    made_by = read_header(bucket_path(folder / f"labels/{encoder}", 0), "labels/1").params
    texts, fingerprints = None, {}
    if control.name in NEEDS_TEXTS:
        if not path.is_file():
            remedy = f"add {encoder} to `controls` in params.yaml and run embed_controls (dvc repro)"
            raise UserError(f"{path}: is missing; {remedy}")
        header = read_header(path, "embed.controls/1")
        if header.params["encoder"] != text["encoder"]:
            raise UserError(f"{path}: is of another encoder than text.parquet; run embed_controls again (dvc repro)")
        texts = read_table(path, "embed.controls/1")
        fingerprints = {str(path.relative_to(folder)): header.fingerprint}
    unsaid = [name for name in Labels.model_fields if name not in made_by]
    if unsaid:
        raise UserError(
            f"{folder / 'labels' / encoder}: do not say what labels.{unsaid[0]} was, so a version before made them;"
            " run label_patches again (dvc repro)"
        )
    settings = Labels.model_validate({name: made_by[name] for name in Labels.model_fields})
    if settings.inside_object:
        raise UserError(
            "params.yaml: labels.inside_object: no control can label nodes so; set it to false and run label_patches"
        )
    reference = read_reference(folder / f"embed/{encoder}/images", folder / "index/images.parquet", buckets, settings)
    return Materials(settings, reference, text["logit_scale"], texts, str(path), fingerprints)


def apply_control(cache: Cache, control: Control, seed: int, materials: Materials) -> Cache:
    """The cache under a control.

    Raises UserError where the bank has fewer concepts than `control.concepts`, or there are fewer control texts than
    concepts to replace.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = cache.bank
    if control.concepts is not None:
        bank = take_rows(bank, keep_concepts(bank, control.concepts, generator))
    match control.name:
        case "edges_removed":
            cache = replace(cache, edge_count=torch.zeros_like(cache.edge_count))
        case "edges_rewired":
            cache = replace(cache, edge_nodes=rewire(cache, generator))
        case "random_vectors":
            bank = replace(bank, K=F.normalize(torch.randn(bank.K.shape, generator=generator), dim=1))
        case "unrelated_texts":
            bank = replace_by_unrelated(bank, materials, generator)
        case "random_descriptors":
            bank = replace_by_random(bank, cache.classes, materials, generator)
        case "owners_permuted":
            bank = replace(bank, own=bank.own[:, cycle(len(cache.classes), generator)])
    labelled = bank.K is cache.bank.K
    cache = replace(cache, bank=bank, fingerprints=cache.fingerprints | materials.fingerprints)
    return cache if labelled else relabel(cache, materials)


def cycle(count: int, generator: torch.Generator) -> Tensor:
    """A permutation (count,) that is one random cycle: nothing stays where it was, if there are two or more."""
    order = torch.randperm(count, generator=generator)
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(1)
    return permutation


def rewire(cache: Cache, generator: torch.Generator) -> Tensor:
    """(edges, 2) int16: each image's edges between permuted local nodes; symmetric as they were.

    Only nodes with an edge change places, node 0 aside: which kinds of nodes a graph links is no part of the control.
    """
    rows, nodes = cache.mask.shape
    row = torch.repeat_interleave(torch.arange(rows), cache.edge_count)
    first = cache.edge_count.cumsum(0) - cache.edge_count
    edge = torch.arange(len(row)) + (cache.edge_start - first)[row]
    ends = cache.edge_nodes[edge].long()
    linked = torch.zeros(rows, nodes, dtype=torch.bool)
    linked[row[:, None], ends] = True
    linked[:, 0] = False
    # Sorted by either key, a row's linked nodes come first: in their own order, and in a drawn one.
    place = torch.arange(nodes).expand(rows, nodes)
    drawn = torch.rand(rows, nodes, generator=generator)
    before = place.masked_fill(linked, -1).argsort(dim=1, stable=True)
    after = torch.where(linked, drawn - 1, place.float()).argsort(dim=1, stable=True)
    moved = torch.empty_like(before).scatter_(1, before, after)
    edge_nodes = cache.edge_nodes.clone()
    edge_nodes[edge] = moved[row[:, None], ends].to(edge_nodes.dtype)
    return edge_nodes


def keep_concepts(bank: Bank, count: int, generator: torch.Generator) -> Tensor:
    """(M,) bool: the names, and `count` kept concepts.

    One by one, a class that owns the fewest so far takes the next of its concepts in a drawn order, which then counts
    for all its owners; concepts of no class come last. So the concepts of a smaller `count` are among those of a
    larger. Raises UserError where there are fewer.
    """
    available = bank.kept & ~bank.of_kind("name")
    if count > int(available.sum()):
        raise UserError(f"{bank.path}: has {int(available.sum())} kept concepts, control.concepts asks for {count}")
    order = torch.randperm(len(bank.kind), generator=generator)
    order = order[available[order]]
    classes = torch.randperm(bank.own.shape[1], generator=generator).tolist()
    waiting = {label: order[bank.own[order, label]].tolist()[::-1] for label in classes}
    chosen, owned = torch.zeros(len(bank.kind), dtype=torch.bool), dict.fromkeys(classes, 0)
    taken = 0
    while taken < count:
        for label in classes:
            while waiting[label] and chosen[waiting[label][-1]]:
                waiting[label].pop()
        open_classes = [label for label in classes if waiting[label]]
        if not open_classes:
            break
        concept = waiting[min(open_classes, key=owned.__getitem__)].pop()
        chosen[concept] = True
        taken += 1
        for label in bank.own[concept].nonzero().flatten().tolist():
            owned[label] += 1
    ownerless = order[~bank.own[order].any(1)]
    chosen[ownerless[: count - taken]] = True
    return chosen | bank.of_kind("name")


def take_rows(bank: Bank, rows: Tensor) -> Bank:
    """The bank with these rows (M,) bool only."""
    kind = tuple(kind for kind, taken in zip(bank.kind, rows.tolist(), strict=True) if taken)
    return replace(bank, K=bank.K[rows], own=bank.own[rows], kind=kind, kept=bank.kept[rows])


def replace_by_unrelated(bank: Bank, materials: Materials, generator: torch.Generator) -> Bank:
    """Names, and every kept concept with the vector of another unrelated text."""
    assert materials.texts is not None
    bank = take_rows(bank, bank.kept | bank.of_kind("name"))
    concepts = bank.kept.nonzero().flatten()
    texts = torch.from_numpy(vectors_of(materials.texts.filter(pc.field("kind") == "unrelated")).astype(np.float32))
    if len(texts) < len(concepts):
        raise UserError(
            f"{materials.path}: holds {len(texts)} unrelated texts for {len(concepts)} concepts;"
            f" add lines to data/controls/unrelated.txt, or set control.concepts"
        )
    K = bank.K.clone()
    K[concepts] = texts[torch.randperm(len(texts), generator=generator)[: len(concepts)]]
    return replace(bank, K=K)


def replace_by_random(bank: Bank, classes: list[str], materials: Materials, generator: torch.Generator) -> Bank:
    """Names, and for each class as many random descriptors as it owns kept concepts, its alone.

    Ranks are drawn once for all classes: what stands after the name is the same for classes that own as many.
    """
    assert materials.texts is not None
    table = materials.texts.filter(pc.field("kind") == "random")
    vectors, owners = torch.from_numpy(vectors_of(table).astype(np.float32)), np.array(table["class_id"].to_pylist())
    ranks = table["rank"].to_numpy()
    drawn = torch.randperm(int(ranks.max(initial=-1)) + 1, generator=generator).numpy()
    names = take_rows(bank, bank.of_kind("name"))
    counts = bank.own[bank.kept & ~bank.of_kind("name")].sum(0).tolist()
    taken: list[Tensor] = []
    for class_id, count in zip(classes, counts, strict=True):
        rows = np.flatnonzero(owners == class_id)
        rows = rows[drawn[ranks[rows]].argsort()]
        if len(rows) < count:
            raise UserError(
                f"{materials.path}: holds {len(rows)} random descriptors of class {class_id}, which owns {count}"
                f" concepts; raise per_class of controls to {max(counts)} and run embed_controls (dvc repro)"
            )
        taken.append(torch.from_numpy(rows[:count]))
    concepts = torch.cat(taken)
    own = F.one_hot(torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts)), len(classes)).bool()
    return replace(
        bank,
        K=torch.cat([names.K, vectors[concepts]]),
        own=torch.cat([names.own, own]),
        kind=(*names.kind, *["visual"] * len(concepts)),
        kept=torch.cat([names.kept, torch.ones(len(concepts), dtype=torch.bool)]),
    )


def relabel(cache: Cache, materials: Materials) -> Cache:
    """The labels of all nodes from the cache's bank, as label_patches makes them, ring gains included.

    Density of pixels is the cache's own: no bank changes it, and no thumbnail is needed.
    """
    numbers = cache.bank.kept.nonzero().flatten()
    concepts, settings = cache.bank.K[numbers], materials.labels
    rows, nodes, _ = cache.vectors.shape
    top, shown = min(settings.top, len(numbers)), min(settings.select_concepts, len(numbers))
    concept_idx = torch.zeros(rows, nodes, top, dtype=cache.concept_idx.dtype)
    concept_weight = torch.zeros(rows, nodes, top, dtype=cache.concept_weight.dtype)
    density, selected = torch.zeros_like(cache.density), torch.zeros_like(cache.selected)
    selected_concepts = torch.zeros(rows, shown, dtype=cache.selected_concepts.dtype)
    gains = torch.zeros(rows, settings.rings, dtype=cache.ring_gains.dtype)
    counts = cache.mask.sum(1)
    # Views of one size at a time: no padding is labelled.
    for count in counts.unique().tolist():
        for group in (counts == count).nonzero().flatten().split(GROUP):
            box = cache.boxes[group, :count]
            places = (box[..., :2] + box[..., 2:]) / 2
            pixels = cache.density[group, :count] if settings.density == "pixel" else None
            for part, found in label_images(
                cache.vectors[group, :count], places, concepts, materials.logit_scale, settings, materials.reference,
                pixels=pixels,
            ):  # fmt: skip
                views = group[part]
                concept_idx[views, :count] = numbers[found.idx].to(concept_idx.dtype)
                concept_weight[views, :count] = found.weight.to(concept_weight.dtype)
                density[views, :count], selected[views, :count] = found.density, found.selected
                selected_concepts[views] = numbers[found.shown].to(selected_concepts.dtype)
                gains[views] = found.gains
    return replace(
        cache,
        concept_idx=concept_idx,
        concept_weight=concept_weight,
        density=density,
        selected=selected,
        selected_concepts=selected_concepts,
        ring_gains=gains,
    )
