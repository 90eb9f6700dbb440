"""How far a run's answers, its node scores and the rings of its labels stay the same where pictures are transformed.

Answers. On the same pictures, transformed and as they are: accuracy, its paired difference, and the share of pictures
whose answer stays. Against the control `in place`, in which nothing moves and the same part of the picture is lost, the
paired difference tells what moving itself does.

Node scores. Of a method that says how much each patch counted, the scores of the picture as it is are moved as the
picture is: to each patch of the transformed picture belongs the place that it shows, and there the scores are
interpolated bilinearly between the middles of the old patches. Patches that show no place that a patch had before do
not count. The rank correlation (Spearman) of these scores with those that the run now gives is 1 where scores follow
the picture. Three things to hold it against: `stay`, the correlation with the scores that the same patches had before;
`other`, with those of other pictures moved alike, which is what the habits of the method and the frame give; and the
distance between the scores' centres of mass, in sides of the picture, between moved and new (`off`) and between old and
new (`off, if still`). Patches are an image's finest nodes (evaluation.pointing.finest).

Rings. What labels say of rings and of sectors about the densest place (fieldmark/labels/rings.py), before and after:
the mean distance of a picture's values from its own before, over that of different pictures from each other. 0 is
invariance, 1 means that a picture is no more like itself than like another one. The concepts that a table of labels has
cut off count as shown all alike, for rings and sectors both.

Nothing here reads a file. tools/invariance.py reads, transforms, asks and writes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from evaluation.pointing import finest, others
from evaluation.statistics import LEVEL, Paired, bootstrap, holm, interval, paired_difference
from evaluation.words import lay_out, percent, points, points_range, written_p
from fieldmark.labels.rings import ring_centre, ring_gains, sector_gains
from fieldmark.params import Labels
from training.metrics import Bools, Floats, Ints

DRAWS = 10_000  # of the bootstrap
FEWEST = 3  # patches, for a rank correlation
EDGE = 1e-6  # a place so near to a patch is in it
CHUNK = 64  # images whose patches are compared with each other, or held with all concepts, at once
Kind = TypeVar("Kind")


class Images(NamedTuple):
    """The n images that are judged."""

    y: Ints  # (n,)
    groups: Ints | None  # (n,), where the data name groups
    by_class: bool  # whether the runs' regime makes their accuracy a claim about other classes

    @property
    def units(self) -> Ints:
        """(n,): what is drawn anew for the interval of a mean over images."""
        return np.arange(len(self.y)) if self.groups is None else self.groups

    def interval(self, values: Floats) -> tuple[float, float]:
        """Of the mean of values (n,) in [-1, 1], those that are nan apart: 95 %, over images or whole groups."""
        known = ~np.isnan(values)
        gain = values[known].astype(np.float32)[None, None]
        means = bootstrap(gain, self.units[known], DRAWS, 0, whole=self.groups is not None)
        return interval(means[:, 0], 0.95)


# Node scores.


class Scored(NamedTuple):
    """The scores of n images, each of N local nodes."""

    scores: Floats  # (n, N) in [0, 1]
    boxes: Floats  # (n, N, 4)
    patches: Bools  # (n, N): which nodes are patches

    @property
    def middles(self) -> Floats:
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2

    def of(self, scores: Floats) -> "Scored":
        """The same patches with other scores."""
        return self._replace(scores=scores)

    def some(self, rows: slice) -> "Scored":
        return Scored(self.scores[rows], self.boxes[rows], self.patches[rows])


def scored(scores: Floats, boxes: Floats, mask: Bools) -> Scored:
    """Of nodes (n, N) that exist where `mask` says so."""
    return Scored(scores, boxes, finest(torch.from_numpy(boxes), torch.from_numpy(mask)))


def moved_scores(before: Scored, origins: Floats) -> tuple[Floats, Bools]:
    """(n, N) scores at the places `origins` (n, N, 2) of the picture, and which of these places lie in a patch."""
    sides = (before.boxes[..., 2:] - before.boxes[..., :2])[:, None].clip(min=1e-9)
    near = (1 - np.abs(origins[:, :, None] - before.middles[:, None]) / sides).clip(min=0).prod(-1)
    near = near * before.patches[:, None]  # (n, N of the new, N of the old)
    total = near.sum(2)
    low, high = before.boxes[:, None, :, :2] - EDGE, before.boxes[:, None, :, 2:] + EDGE
    held = ((low <= origins[:, :, None]) & (origins[:, :, None] <= high)).all(-1)
    known = (held & before.patches[:, None]).any(2) & (total > 0)
    moved = np.einsum("nij,nj->ni", near, before.scores) / np.where(known, total, 1)
    return moved.round(9), known  # rounded, so that scores that were equal stay so


def ranks(values: Floats, counted: Bools) -> Floats:
    """(n, N): the rank of each value of a row among those counted, from 1; equal ones share the mean of theirs."""
    less = (values[:, None] < values[:, :, None]) & counted[:, None]
    same = (values[:, None] == values[:, :, None]) & counted[:, None]
    return less.sum(2) + (same.sum(2) + 1) / 2


def rank_correlation(a: Floats, b: Floats, counted: Bools) -> Floats:
    """(n,): Spearman's, of each row over what is counted; nan where that is under FEWEST, or all alike."""
    weight = counted / np.maximum(counted.sum(1, keepdims=True), 1)
    of_a, of_b = (ranks(each, counted) for each in (a, b))
    of_a, of_b = (each - (each * weight).sum(1, keepdims=True) for each in (of_a, of_b))
    spread = np.sqrt((of_a**2 * weight).sum(1) * (of_b**2 * weight).sum(1))
    known = (counted.sum(1) >= FEWEST) & (spread > 1e-9)
    return np.where(known, (of_a * of_b * weight).sum(1) / np.where(known, spread, 1), np.nan)


def centre(scores: Floats, middles: Floats, counted: Bools) -> Floats:
    """(n, 2): the centre of mass of the scores that are counted; nan where they are all 0."""
    weight = scores * counted
    total = weight.sum(1, keepdims=True)
    return np.where(total > 0, np.einsum("nk,nkd->nd", weight, middles) / np.where(total > 0, total, 1), np.nan)


class Followed(NamedTuple):
    """How the scores of n images follow them; nan where an image tells nothing."""

    follow: Floats  # (n,) rank correlation of the new scores with the old ones, moved
    stay: Floats  # (n,) with the old ones of the same patches
    other: Floats  # (n,) with those of other images, moved alike
    off: Floats  # (n,) distance between the centres of the new and of the moved scores
    off_if_still: Floats  # (n,) between those of the new and of the old ones


def follow(before: Scored, after: Scored, origins: Floats, seed: int = 0) -> Followed:
    """`origins` (n, N, 2): where in the picture lies what the middle of each node of the transformed one shows."""
    parts = []
    swapped = [before.scores[other] for other in others(len(before.scores), seed)]
    for start in range(0, len(before.scores), CHUNK):
        rows = slice(start, start + CHUNK)
        old, new = before.some(rows), after.some(rows)
        moved, known = moved_scores(old, origins[rows])
        counted = known & new.patches
        with_others = [
            rank_correlation(new.scores, moved_scores(old.of(theirs[rows]), origins[rows])[0], counted)
            for theirs in swapped
        ]
        now, then, still = (
            centre(scores, new.middles, counted) for scores in (new.scores, moved, old.scores)
        )
        parts.append(Followed(
            rank_correlation(new.scores, moved, counted),
            rank_correlation(new.scores, old.scores, counted & old.patches),
            np.mean(with_others, axis=0) if with_others else np.full(len(old.scores), np.nan),
            np.linalg.norm(now - then, axis=1),
            np.linalg.norm(now - still, axis=1),
        ))  # fmt: skip
    return Followed(*map(np.concatenate, zip(*parts, strict=True)))


# Rings and sectors.


class Gains(NamedTuple):
    """What rings and sectors say of n images, in nats: (n, K), dH_2 .. dH_K, JS."""

    rings: Floats
    sectors: Floats


class Shown(NamedTuple):
    """What local nodes of n images show: concepts, how dense they are, and where they are."""

    concepts: torch.Tensor  # (n, N, k): those that each node has, as the bank numbers them
    weight: torch.Tensor  # (n, N, k)
    density: torch.Tensor  # (n, N)
    places: torch.Tensor  # (n, N, 2)
    numbers: Ints  # (M,): the bank's numbers of the concepts that there are

    def gains(self, settings: Labels) -> Gains:
        rings, sectors = [], []
        for start in range(0, len(self.concepts), CHUNK):
            rows = slice(start, start + CHUNK)
            weights = dense(self.concepts[rows], self.weight[rows], self.numbers)
            asked = weights, self.density[rows], self.places[rows], settings
            rings.append(ring_gains(*asked).numpy())
            sectors.append(sector_gains(*asked).numpy())
        return Gains(np.concatenate(rings), np.concatenate(sectors))

    def turned(self, degrees: float, settings: Labels) -> "Shown":
        """All places turned about the densest one, and nothing else."""
        angle = torch.tensor(degrees).deg2rad()
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        mu = ring_centre(self.density, self.places, settings)[:, None]
        return self._replace(places=(self.places - mu) @ turn.T + mu)


def dense(concepts: torch.Tensor, weight: torch.Tensor, numbers: Ints) -> torch.Tensor:
    """Weights (n, N, M) of all concepts, from those k that each node has, as Shown has them."""
    place = torch.zeros(int(numbers.max()) + 1, dtype=torch.long)
    place[torch.tensor(numbers).long()] = torch.arange(len(numbers))
    # What weighs nothing may have any number.
    column = place[concepts.long().clamp(max=len(place) - 1)]
    return torch.zeros(*concepts.shape[:2], len(numbers)).scatter_add_(2, column, weight.float())


def moved_by(before: Floats, after: Floats, seed: int = 0) -> Floats:
    """(n,): how far values (n, K) move, over how far different images are from each other, in the mean over K."""
    apart = [np.abs(before - before[other]).mean() for other in others(len(before), seed)]
    return np.abs(after - before).mean(1) / max(float(np.mean(apart)), 1e-9)


# Rows.


@dataclass(frozen=True)
class Row:
    """A run under a transform."""

    run: str
    transform: str
    accuracy: float
    same: float  # share of the images whose answer is that of the picture as it is
    paired: Paired | None  # to the pictures as they are; None for these themselves
    lost: float | None  # accuracy in place: nothing moves, and as much is lost
    moved: Paired | None  # to the pictures in place
    scores: dict[str, float] = field(default_factory=dict)  # means of Followed
    follow: tuple[float, float] | None = None  # interval of the first
    p: float | None = None  # corrected for all rows

    @property
    def words(self) -> str:
        if self.paired is None:
            return ""
        if not self.paired.judged:
            return "too few to judge"
        if self.p is not None and self.p < LEVEL:
            return "loses" if self.paired.difference < 0 else "gains"
        if self.paired.equivalent:
            return "equivalent within 1 point"
        low, high = self.paired.over
        return "no difference shown" if low <= 0 <= high else "not shown after correction"


@dataclass(frozen=True)
class RingRow:
    """What a transform does to the rings and sectors of an encoder's labels."""

    encoder: str
    transform: str
    rings: float  # moved_by, mean over images
    sectors: float
    rings_js: float  # of JS alone
    sectors_js: float
    difference: float  # rings - sectors
    over: tuple[float, float]
    turns: bool  # whether the picture, or its boxes, are turned


def judge(
    run: str,
    transform: str,
    predicted: Ints,
    still: Ints,
    in_place: Ints | None,
    followed: Followed | None,
    images: Images,
) -> Row:
    """A row of predictions (n,): of transformed pictures, of them as they are, and in place."""
    told = followed is not None and not np.isnan(followed.follow).all()
    return Row(
        run,
        transform,
        accuracy=accuracy(predicted, images),
        same=float((predicted == still).mean()),
        paired=against(predicted, still, images),
        lost=None if in_place is None else accuracy(in_place, images),
        moved=None if in_place is None else against(predicted, in_place, images),
        scores={name: mean(values) for name, values in followed._asdict().items()} if followed and told else {},
        follow=images.interval(followed.follow) if followed and told else None,
    )


def unchanged(run: str, predicted: Ints, stored: Ints, images: Images) -> Row:
    """The row of pictures as they are; `stored` (n,) is what the run's own table says of them."""
    same = float((predicted == stored).mean())
    return Row(run, "unchanged", accuracy(predicted, images), same, paired=None, lost=None, moved=None)


def accuracy(predicted: Ints, images: Images) -> float:
    return float((predicted == images.y).mean())


def against(predicted: Ints, rival: Ints, images: Images) -> Paired:
    right = predicted == images.y, rival == images.y
    return paired_difference(*right, images.y, images.groups, by_class=images.by_class)


def mean(values: Floats) -> float:
    """Of those that are known; nan where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def judge_rings(
    encoder: str, transform: str, before: Gains, after: Gains, images: Images, turns: bool
) -> RingRow:
    rings, sectors = moved_by(before.rings, after.rings), moved_by(before.sectors, after.sectors)
    return RingRow(
        encoder,
        transform,
        rings=float(rings.mean()),
        sectors=float(sectors.mean()),
        rings_js=float(moved_by(before.rings[:, -1:], after.rings[:, -1:]).mean()),
        sectors_js=float(moved_by(before.sectors[:, -1:], after.sectors[:, -1:]).mean()),
        difference=float((rings - sectors).mean()),
        over=images.interval(rings - sectors),
        turns=turns,
    )


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with p corrected by Holm, for all of them that are judged."""
    judged = [row for row in rows if row.paired is not None and row.paired.judged]
    by_row = dict(zip(map(id, judged), holm([row.paired.p for row in judged if row.paired]), strict=True))
    return [replace(row, p=by_row.get(id(row))) for row in rows]


# Words.


def fraction(value: float) -> str:
    return f"{value:z.2f}" if np.isfinite(value) else "-"


def fraction_range(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:+z.2f}, {ends[1]:+z.2f}]"


def by(rows: Sequence[Kind], name: str) -> list[list[Kind]]:
    """The rows, those together that have the same under this name."""
    found: dict[str, list[Kind]] = {}
    for row in rows:
        found.setdefault(getattr(row, name), []).append(row)
    return list(found.values())


def table_of(rows: Sequence[Row]) -> str:
    """The rows of one run."""
    head = [rows[0].run, "accuracy", "same answer", "- unchanged", "interval", "p (Holm)"]
    lines = [[*head, "in place", "- in place", "interval", "verdict"]]
    for row in rows:
        line = [row.transform, percent(row.accuracy), percent(row.same), *paired_fields(row.paired)]
        line += ["" if row.p is None else written_p(row.p), "" if row.lost is None else percent(row.lost)]
        lines.append([*line, *paired_fields(row.moved), row.words])
    return lay_out(lines)


def table_of_scores(rows: Sequence[Row]) -> str:
    """What the node scores of one run do."""
    lines = [[f"node scores of {rows[0].run}", "follow", "interval", "stay", "other", "off", "if still"]]
    for row in rows:
        if row.follow is not None:
            rest = [fraction(row.scores[name]) for name in ("stay", "other", "off", "off_if_still")]
            lines.append([row.transform, fraction(row.scores["follow"]), fraction_range(row.follow), *rest])
    return lay_out(lines)


def paired_fields(paired: Paired | None) -> list[str]:
    return ["", ""] if paired is None else [points(paired.difference), points_range(paired.over)]


def table_of_rings(rows: Sequence[RingRow]) -> str:
    lines = [[f"labels of {rows[0].encoder}", "rings", "sectors", "- sectors", "interval", "rings JS", "sectors JS"]]
    for row in rows:
        figures = [fraction(row.rings), fraction(row.sectors), f"{row.difference:+z.2f}", fraction_range(row.over)]
        lines.append([row.transform, *figures, fraction(row.rings_js), fraction(row.sectors_js)])
    return lay_out(lines)


def as_text(title: str, rows: Sequence[Row], rings: Sequence[RingRow]) -> str:
    """tables.txt: the tables, and the notes that they must not be read without."""
    judged = [row.paired for row in rows if row.paired is not None]
    blocks = [title]
    for some in by(rows, "run"):
        blocks += [table_of(some), *([table_of_scores(some)] if any(row.scores for row in some) else [])]
    blocks += map(table_of_rings, by(rings, "encoder"))
    foot = [
        "accuracies and same answers in %, differences in points; same answer: as of the picture as it is (unchanged:"
        " as data/runs has it)",
        f"95 % bootstrap intervals over {judged[0].units} {judged[0].unit}; p: two-sided, corrected (Holm) for"
        f" {sum(row.p is not None for row in rows)} comparisons",
        "in place: nothing moves, and what the motion would lose has the mean colour of the picture's edge, as has what"
        " lies beside a picture that moves",
        "shift, rotate: to a side drawn by image_id; scale 1.25 shows an encoder that resizes what crop 0.8 would show",
    ]
    if any(row.scores for row in rows):
        foot += [
            "follow: rank correlation of the new node scores with the old ones, moved as the picture was; stay: with"
            " the old ones of the same patches; other: with those of other pictures, moved",
            "off: between the centres of new and of moved scores, if still: of new and of old ones, in sides of the"
            " picture",
        ]
    if rings:
        foot += [
            "rings, sectors: how far dH_2 .. dH_K, JS of a picture move, over how far those of different pictures are"
            " apart; 0: not at all",
            "boxes turned: the places of nodes alone, about the densest one; the others: pictures, embedded and"
            " labelled anew",
        ]
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


def as_markdown(title: str, rows: Sequence[Row], rings: Sequence[RingRow]) -> str:
    """answers.md: a sentence for each question."""
    lines = ["# What stays when pictures are moved, turned or darkened", "", title, ""]
    for some in by(rows, "run"):
        lines += [f"## {some[0].run}", "", *(f"- {sentence}" for sentence in sentences(some)), ""]
    for of_encoder in by(rings, "encoder"):
        lines += [f"## Circles or sectors: labels of {of_encoder[0].encoder}", ""]
        lines += [*(f"- {ring_sentence(row)}" for row in of_encoder if row.turns), ""]
    lines.append("Intervals are 95 %, paired; in brackets differences to the pictures as they are, in points.")
    return "\n".join(lines) + "\n"


WORDS = {
    "loses": "Accuracy falls under",
    "gains": "Accuracy rises under",
    "equivalent within 1 point": "Accuracy is the same within 1 point under",
    "not shown after correction": "Not shown after correction for all comparisons:",
    "no difference shown": "No difference is shown, which does not mean that there is none, under",
    "too few to judge": "There are too few units to judge",
}


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """What the rows of one run say."""
    said: dict[str, list[str]] = {}
    for row in rows:
        if row.paired is not None:
            figures = "" if row.words == "no difference shown" else f" ({' '.join(paired_fields(row.paired))})"
            said.setdefault(row.words, []).append(row.transform + figures)
    yield from (f"{start} {', '.join(said[words])}." for words, start in WORDS.items() if words in said)
    worse = [row.transform for row in rows if row.moved is not None and row.moved.over[1] < 0]
    found = f"costs more than losing the same part in place under {', '.join(worse)}"
    nowhere = "is nowhere shown to cost more than losing the same part in place"
    yield f"Moving itself {found if worse else nowhere} (not corrected)."
    told = [
        f"{row.transform} {fraction(row.scores['follow'])} ({fraction(row.scores['stay'])},"
        f" {fraction(row.scores['other'])})"
        for row in rows
        if row.scores
    ]
    if told:
        yield (
            "Node scores follow the picture with a rank correlation of (in brackets where they are left where they"
            f" were, and with those of other pictures): {', '.join(told)}."
        )


def ring_sentence(row: RingRow) -> str:
    words = "rings move less" if row.over[1] < 0 else "sectors move less" if row.over[0] > 0 else "no difference shown"
    moved = f"rings move by {fraction(row.rings)}, sectors by {fraction(row.sectors)} of what lies between two pictures"
    return f"{row.transform}: {moved} ({row.difference:+z.2f} {fraction_range(row.over)}): {words}."


def as_json(rows: Sequence[Row], rings: Sequence[RingRow]) -> dict[str, Any]:
    """tables.json: the same figures for programs."""

    def fields_of(paired: Paired | None) -> dict[str, Any] | None:
        return None if paired is None else paired._asdict()

    runs = [
        {
            **vars(row),
            "paired": fields_of(row.paired),
            "moved": fields_of(row.moved),
            "scores": {name: value if np.isfinite(value) else None for name, value in row.scores.items()},
        }
        for row in rows
    ]
    return {"runs": runs, "rings": [vars(row) for row in rings]}
