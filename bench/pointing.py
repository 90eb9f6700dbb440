"""How often concepts point at the parts that they name: by encoder (or its `dense` rule), by place, and by both.

Over all training and validation images of the data set that stands in data/, in folds of whole groups (fold by the hash
of the group that the index names, else of the image): each image's place is known from other groups, lam
(evaluation/pointing.py) is chosen on a fifth that is not judged. The encoders' banks are as they are, selected on
training images by class and not by place. The class that an image is asked with is what description_zero_shot says.
95 % bootstrap intervals over groups (over images where the index names none) and over classes, p two-sided over the
former, uncorrected.

There is no bar: it says what an encoder's cells are worth on data that mark parts. Needs embed_images, embed_text and
select_concepts of each encoder; an image and fold costs no pass. Beside the cache it holds a fifth of all patches in
float32 at a time, and those of a part's images once more. Encoders are paired with the first of them where they keep
concepts for the same parts. --classes leaves other classes out of all tables; places and lam are of all classes still.

    python -m bench.pointing [--encoders NAME ...] [--classes FILE]
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluation.explanations import NEEDED, Comparison, against_rivals, read_norms, read_parts, read_points
from evaluation.pointing import PLACE_RIVALS, Placed, part_concepts, place_parts, rank_parts
from evaluation.words import lay_out, percent, points, points_range, written_p
from fieldmark.chosen import choose_classes
from fieldmark.command import UserError, run
from fieldmark.devices import set_up_torch
from fieldmark.params import load_params
from fieldmark.store import read_table, sha256
from training.data import read_cache
from training.data.bank import Bank
from training.loop import predict
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
    groups: Ints  # of all images of the cache: the position of the first one of their group
    classes: list[str]

    def of_classes(self, wanted: Sequence[str]) -> "Pointed":
        """What it hits on images of these classes. A part that none of them shows is left out."""
        parts = {}
        for part, one in self.parts.items():
            kept = np.isin(np.array(self.classes)[self.y[one.images]], wanted)
            if kept.any():
                parts[part] = Placed(one.images[kept], one.own[kept], one.rivals[:, kept])
        return self._replace(parts=parts)

    def together(self) -> tuple[Ints, Floats, Floats]:
        """Images, hits of place and concept, and those of PLACE_RIVALS, all parts behind one another."""
        images, own, rivals = zip(*self.parts.values(), strict=True)
        return np.concatenate(images), np.concatenate(own), np.concatenate(rivals, axis=1)


def point(encoder: str, buckets: int) -> Pointed:
    """What the concepts of an encoder hit on the images of train and val, in folds.

    Raises UserError where its bank names fewer than two parts that images show together.
    """
    method = load_method(ASKS)
    cache = read_cache(DATA, encoder, buckets, method.READS | NEEDED)
    norms, bank, parts = read_norms(DATA, encoder, cache, buckets)[:, 1:], cache.part(Bank), read_parts(DATA)
    texts = read_table(bank.path, "bank/1", ["concept_idx", "text"]).sort_by("concept_idx")["text"].to_pylist()
    concepts, marks = part_concepts(texts, bank.kept, parts), read_points(DATA, cache, parts)
    images = torch.cat([cache.images(split) for split in ("train", "choose", "val")]).sort().values
    model = method.fit(hide_test(cache), method.Settings(), 0).model
    predicted = predict(model, cache, images).argmax(1).cpu()
    fold = torch.tensor([int(sha256(f"fold {cache.groups[image]}")[:8], 16) % FOLDS for image in images.tolist()])
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
    if not found:
        problem = "no two parts are both marked and named by concepts: there is nothing to judge"
        raise UserError(f"{bank.path}: {problem}; leave {encoder} out (--encoders), or add concepts that name parts")
    whole = {
        part: Placed(*(np.concatenate(each, axis=-1) for each in zip(*several, strict=True)))
        for part, several in found.items()
    }
    first: dict[str, int] = {}
    groups = np.array([first.setdefault(group, image) for image, group in enumerate(cache.groups)])
    return Pointed(whole, lams, cache.y.numpy(), groups, cache.classes)


def line_of(found: Comparison) -> list[str]:
    """A comparison as a line of a table."""
    figures = [found.what, percent(found.own), found.rival, percent(found.theirs), points(found.difference)]
    return [*figures, points_range(found.over_images), points_range(found.over_classes), written_p(found.p)]


def table(found: Mapping[str, Pointed]) -> str:
    """The tables of all encoders."""
    grouped = any(len(np.unique(one.groups)) < len(one.groups) for one in found.values())
    over = "over groups" if grouped else "over images"
    lines = [["", "hits", "rival", "its", "ahead by", over, "over classes", "p"]]
    sizes = []
    first = next(iter(found))
    for name, one in found.items():
        images, own, rivals = one.together()
        against = partial(against_rivals, images=images, y=one.y, groups=one.groups)
        comparisons = against(f"{name}: place and concept", PLACE_RIVALS, own, rivals)
        comparisons += against(f"{name}: concepts", PLACE_RIVALS[:1], rivals[1], rivals[:1])
        if name != first and list(one.parts) == list(found[first].parts):
            _, _, others = found[first].together()
            comparisons += against(f"{name}: concepts", [first], rivals[1], others[1:2])
        lines += map(line_of, comparisons)
        lams = ", ".join(f"{lam:g}" for lam in one.lams)
        sizes.append(f"{name}: {len(images)} parts on {len(np.unique(images))} images, lam by fold {lams}")
    by_part = [["part", "images", *(f"{name}: {what}" for name in found for what in ("both", "place", "concepts"))]]
    for part in dict.fromkeys(part for one in found.values() for part in one.parts):
        hits = [one.parts.get(part) for one in found.values()]
        # An image counts where it shows another part too that the encoder's concepts name: numbers may differ.
        counts = dict.fromkeys(str(len(of.images)) for of in hits if of is not None)
        row = [part, " or ".join(counts)]
        for of in hits:
            row += ["-"] * 3 if of is None else [percent(of.own.mean()), *map(percent, of.rivals[:2].mean(1))]
        by_part.append(row)
    return "\n\n".join([lay_out(lines), lay_out(by_part), "\n".join(sizes)])


def judged_classes(file: str) -> list[str]:
    """The classes that a file names by folder or class_id. Raises UserError for a line that names none, or no line."""
    index = read_table(DATA / "index/classes.parquet", "index.classes/2", ["class_id"])
    classes = choose_classes(file, set(index["class_id"].to_pylist()), "--classes")
    if not classes:
        raise UserError(f"--classes: {file}: names no class; write a class's folder or class_id, one a line")
    return classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", default="params.yaml", metavar="FILE")
    parser.add_argument("--encoders", nargs="+", metavar="NAME", help="of `encoders` (default: all of them)")
    parser.add_argument("--classes", metavar="FILE", help="the classes judged, by folder or class_id, one a line")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    set_up_torch()
    classes = None if arguments.classes is None else judged_classes(arguments.classes)
    names = arguments.encoders or list(params.encoders)
    found = {name: point(name, params.dataset.buckets) for name in names}
    if classes is not None:
        found = {name: one.of_classes(classes) for name, one in found.items()}
        if bare := [name for name, one in found.items() if not one.parts]:
            problem = f"no image of these {len(classes)} classes shows two parts that the concepts of {bare[0]} name"
            raise UserError(f"--classes: {arguments.classes}: {problem}; name more classes")
    print(table(found))


if __name__ == "__main__":
    run(main)
