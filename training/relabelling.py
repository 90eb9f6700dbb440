"""The labels of a cache's nodes made anew from its bank, as label_patches makes them, without a file being written.

Where a control changes vectors or kept concepts, a regime hides images from the bank, or a study asks for other
settings of `labels`, this is what the labels would have been; what they lean on is learnt from the cache's own training
images. Density of pixels is the cache's own: no bank changes it, and no thumbnail is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fieldmark.command import UserError
from fieldmark.labels.labelling import Reference, label_images, read_reference
from fieldmark.params import Labels as Settings
from fieldmark.store import bucket_path, read_header
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.labels import Labels
from training.data.nodes import Nodes

MAKES = frozenset({"labels"})
NEEDS = frozenset({"labels", "nodes", "boxes", "concepts"})
GROUP = 2048  # views that are taken out of a cache to be labelled


@dataclass(frozen=True)
class Labelling:
    """How nodes are labelled: settings, what they know of training images, and the encoder's own scale."""

    settings: Settings
    reference: Reference
    logit_scale: float


def files(encoder: str) -> dict[str, str]:
    """What is read beside the parts of NEEDS."""
    return {f"embed/{encoder}/text.parquet": "embed.text/1"}


def classes_told(cache: Cache) -> dict[str, str]:
    """The class_id that training is told of each training image, by image_id: the most probable one."""
    train = cache.images("train")
    told = cache.target[train] if cache.target.ndim == 1 else cache.target[train].argmax(1)
    numbers = zip(train.tolist(), told.tolist(), strict=True)
    return {cache.image_ids[image]: cache.classes[label] for image, label in numbers}


def read_labelling(
    data: Path, encoder: str, buckets: int, images: Mapping[str, str], changes: Mapping[str, Any]
) -> Labelling:
    """The settings that the labels on disk say they were made with, with these changes.

    `images` are the training images, the class_id of each by its image_id.

    Raises UserError where a file is missing, where the labels do not say what a setting was, or where they lean on
    boxes of objects, which no cache has.
    """
    folder = data / "labels" / encoder
    made_by = read_header(bucket_path(folder, 0), "labels/1").params
    unsaid = [name for name in Settings.model_fields if name not in made_by]
    if unsaid:
        raise UserError(
            f"{folder}: do not say what labels.{unsaid[0]} was, so a version before made them;"
            " run label_patches again (dvc repro)"
        )
    settings = Settings.model_validate({name: made_by[name] for name in Settings.model_fields})
    if settings.inside_object:
        raise UserError(
            "params.yaml: labels.inside_object: no control, regime or variant can label nodes so; set it to false and"
            " run label_patches"
        )
    settings = Settings.model_validate(settings.model_dump() | dict(changes))
    reference = read_reference(data / f"embed/{encoder}/images", images, buckets, settings)
    scale = read_header(data / f"embed/{encoder}/text.parquet", "embed.text/1").params["logit_scale"]
    return Labelling(settings, reference, scale)


def apply(cache: Cache, request: Request) -> Cache:
    """The cache with labels as its bank makes them."""
    images = classes_told(cache)
    return relabel(cache, read_labelling(request.data, request.encoder, request.buckets, images, request.labels))


def relabel(cache: Cache, labelling: Labelling) -> Cache:
    """The labels of all nodes from the cache's bank, ring gains included."""
    bank, nodes, boxes, labels = cache.part(Bank), cache.part(Nodes), cache.part(Boxes).box, cache.part(Labels)
    numbers = bank.kept.nonzero().flatten()
    concepts, settings = bank.K[numbers], labelling.settings
    rows, most = nodes.mask.shape
    top, shown = min(settings.top, len(numbers)), min(settings.select_concepts, len(numbers))
    concept_idx = torch.zeros(rows, most, top, dtype=labels.concept_idx.dtype)
    concept_weight = torch.zeros(rows, most, top, dtype=labels.concept_weight.dtype)
    density, selected = torch.zeros_like(labels.density), torch.zeros_like(labels.selected)
    selected_concepts = torch.zeros(rows, shown, dtype=labels.selected_concepts.dtype)
    gains = torch.zeros(rows, settings.rings, dtype=labels.ring_gains.dtype)
    counts = nodes.mask.sum(1)
    # Views of one size at a time: no padding is labelled.
    for count in counts.unique().tolist():
        for group in (counts == count).nonzero().flatten().split(GROUP):
            box = boxes[group, :count]
            places = (box[..., :2] + box[..., 2:]) / 2
            pixels = labels.density[group, :count] if settings.density == "pixel" else None
            for part, found in label_images(
                nodes.nodes[group, :count], places, concepts, labelling.logit_scale, settings, labelling.reference,
                pixels=pixels,
            ):  # fmt: skip
                views = group[part]
                concept_idx[views, :count] = numbers[found.idx].to(concept_idx.dtype)
                concept_weight[views, :count] = found.weight.to(concept_weight.dtype)
                density[views, :count], selected[views, :count] = found.density, found.selected
                selected_concepts[views] = numbers[found.shown].to(selected_concepts.dtype)
                gains[views] = found.gains
    return cache.change(
        Labels,
        concept_idx=concept_idx,
        concept_weight=concept_weight,
        density=density,
        selected=selected,
        selected_concepts=selected_concepts,
        ring_gains=gains,
    )
