"""How often concepts point at the parts that they name: by encoder (or its `dense` rule), by place, and by both.

Over all training and validation images of the data set that stands in data/, in folds: each image's place is known from
other images, lam (evaluation/pointing.py) is chosen on a fifth that is not judged. The encoders' banks are as they are,
selected on training images by class and not by place. The class that an image is asked with is what
description_zero_shot says. 95 % bootstrap intervals over images and over classes, p two-sided over images, uncorrected.

There is no bar: it says what an encoder's cells are worth on data that mark parts. Needs embed_images, embed_text and
select_concepts of each encoder; an image and fold costs no pass. Encoders are paired with the first of them where they
keep concepts for the same parts.

    python -m bench.pointing [--encoders NAME ...] [--classes FILE]
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluation.explanations import NEEDED, Comparison, against_rivals, read_norms, read_parts, read_points
from evaluation.pointing import PLACE_RIVALS, Placed, part_concepts, place_parts, rank_parts
from evaluation.words import lay_out, percent, points, points_range, written_p
from fieldmark.command import run
from fieldmark.params import load_params
from fieldmark.store import read_table, sha256
from training.data import read_cache
from training.data.bank import Bank
from training.loop import predict, set_up_torch
from training.methods import load_method
from training.metrics import Floats, Ints
from training.regimes import hide_test

DATA, FOLDS = Path("data"), 5
ASKS = "description_zero_shot"  # the method that says of which class an image is asked


class Pointed(NamedTuple):
    """What an encoder hits, by part, each image judged once: its positions in the cache are in `images`."""

    parts: dict[str, Placed]
    lams: list[float]  # by fold
    y: Ints  # classes of all images of the cache
    classes: list[str]

    def together(self) -> tuple[Ints, Floats, Floats]:
        """Images, hits of place and concept, and those of PLACE_RIVALS, all parts behind one another."""
        images, own, rivals = zip(*self.parts.values(), strict=True)
        return np.concatenate(images), np.concatenate(own), np.concatenate(rivals, axis=1)


def point(encoder: str, buckets: int) -> Pointed:
    """What the concepts of an encoder hit on the images of train and val, in folds."""
    method = load_method(ASKS)
    cache = read_cache(DATA, encoder, buckets, method.READS | NEEDED)
    norms, bank, parts = read_norms(DATA, encoder, cache, buckets)[:, 1:], cache.part(Bank), read_parts(DATA)
    texts = read_table(bank.path, "bank/1", ["concept_idx", "text"]).sort_by("concept_idx")["text"].to_pylist()
    concepts, marks = part_concepts(texts, bank.kept, parts), read_points(DATA, cache, parts)
    images = torch.cat([cache.images(split) for split in ("train", "choose", "val")]).sort().values
    model = method.fit(hide_test(cache), method.Settings(), 0).model
    predicted = predict(model, cache, images).argmax(1).cpu()
    fold = torch.tensor([int(sha256(f"fold {cache.image_ids[image]}")[:8], 16) % FOLDS for image in images.tolist()])
    found: dict[str, list[Placed]] = {}
    lams = []
    for number in range(FOLDS):
        judged, choosing = fold == number, fold == (number + 1) % FOLDS
        train = images[~judged & ~choosing]
        ranked = [
            rank_parts(cache, images[some], train, norms, concepts, marks, predicted[some])
            for some in (choosing, judged)
        ]
        placed, weights = place_parts(*ranked)
        lams += [weights.own] if weights is not None else []
        for part, one in placed.items():
            found.setdefault(part, []).append(one._replace(images=images[judged].numpy()[one.images]))
    whole = {
        part: Placed(*(np.concatenate(each, axis=-1) for each in zip(*several, strict=True)))
        for part, several in found.items()
    }
    return Pointed(whole, lams, cache.y.numpy(), cache.classes)


def line_of(found: Comparison) -> list[str]:
    """A comparison as a line of a table."""
    figures = [found.what, percent(found.own), found.rival, percent(found.theirs), points(found.difference)]
    return [*figures, points_range(found.over_images), points_range(found.over_classes), written_p(found.p)]


def table(found: Mapping[str, Pointed], only: set[str] | None) -> str:
    """The tables of all encoders; `only` leaves images of other classes out."""
    lines = [["", "hits", "rival", "its", "ahead by", "over images", "over classes", "p"]]
    first = next(iter(found))
    for name, one in found.items():
        images, own, rivals = one.together()
        kept = np.isin(np.array(one.classes)[one.y[images]], list(only)) if only else np.ones(len(images), dtype=bool)
        images, own, rivals = images[kept], own[kept], rivals[:, kept]
        what = f"{name}: place and concept"
        lines += map(line_of, against_rivals(what, PLACE_RIVALS, own, rivals, images, one.y))
        alone = against_rivals(f"{name}: concepts", PLACE_RIVALS[:1], rivals[1], rivals[:1], images, one.y)
        lines += map(line_of, alone)
        if name != first and list(one.parts) == list(found[first].parts):
            _, _, others = found[first].together()
            pair = against_rivals(f"{name}: concepts", [first], rivals[1], others[1:2, kept], images, one.y)
            lines += map(line_of, pair)
    sizes = [
        f"{name}: {len(one.together()[0])} parts on {len(np.unique(one.together()[0]))} images, lam by fold"
        f" {', '.join(f'{lam:g}' for lam in one.lams)}"
        for name, one in found.items()
    ]
    by_part = [["part", "images", *(f"{name}: {what}" for name in found for what in ("both", "place", "concepts"))]]
    for part in next(iter(found.values())).parts:
        row = [part, str(len(found[first].parts[part].images))]
        for one in found.values():
            hits = one.parts.get(part)
            row += ["-"] * 3 if hits is None else [percent(hits.own.mean()), *map(percent, hits.rivals[:2].mean(1))]
        by_part.append(row)
    return "\n\n".join([lay_out(lines), lay_out(by_part), "\n".join(sizes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml", metavar="FILE")
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help="of `encoders` (default: all of them)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="the class_ids that are judged, one a line")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    set_up_torch()
    only = set(arguments.classes.read_text(encoding="utf-8").split()) if arguments.classes else None
    names = arguments.encoders or list(params.encoders)
    print(table({name: point(name, params.dataset.buckets) for name in names}, only))


if __name__ == "__main__":
    run(main)
