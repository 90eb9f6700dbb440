"""Judge what a model said of cells of pictures: does it speak of its own cell, and of the parts that lie there?

Reads   data/descriptions/cells.parquet (`describe.nodes`); of encoder E data/embed/E/ (boxes, texts),
        data/bank/E.parquet and data/labels/E/; data/index/images.parquet and, where parts are marked, parts.parquet.
Writes  data/explanations/cells.E/: tables.txt and tables.json. All figures are of the half of val that chose nothing.
Costs   seconds; memory for the patches of these images in float32.

Agreement. A cell's concepts are c = norm(sum over its patches of sum_k w_k (K_k - K)): w are the labels of the patches
whose middle lies in it, K is the mean of the bank's kept concepts. A text agrees where its vector is nearer to its own
cell's c than to another's: that of the same cell in another picture (is it about this picture?), and that of another
cell of the same picture (is it about this place?). Both sides are of one encoder: what it cannot see in a cell, and
what its labels get wrong, counts against the text.

Pointing. A text that names one part (evaluation/pointing.py) hits where its cell holds the part's point. It is held
against a cell of the same picture at random, and against the place alone: how often this cell holds that part in the
other pictures that show it. Only pictures that show the part are judged.

Which cells a model speaks of says what is foreground, whatever it says of them. So rivals are cells that it spoke of
too, and a cell counts once, by the mean over its sentences: one and the same sentence about each of them is nearer half
of the time, and one that names a part hits as often as a random cell and as the place alone, exactly.

Sentences of one picture are right or wrong together: intervals are over pictures, or whole groups.

    python -m evaluation.cell_texts --encoder reef
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.explanations import read_parts, read_points
from evaluation.pointing import PartWords, covers, judged_patches, named_part
from evaluation.runs import group_numbers, groups_of
from evaluation.statistics import DRAWS, UNITS, bootstrap, interval
from evaluation.words import lay_out, percent, points, points_range
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import load_params
from fieldmark.pictures.boxes import cut_windows
from fieldmark.store import read_header, read_table, sha256, vectors_of, write_text
from training.data import Cache, read_cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.cell_descriptions import CELLS, SCHEMA
from training.data.labels import Labels
from training.metrics import Bools, Floats, Ints
from training.runs import write_json

SPLIT = "val"
NEEDED = frozenset({"nodes", "boxes", "concepts", "owners", "labels"})
CHUNK = 256  # pictures whose patches are looked at at once, or sentences that are compared with all pictures
RIVALS = ("the same cell of another picture", "another cell of the same picture")


class Said(NamedTuple):
    """T sentences about cells of n pictures."""

    texts: list[str]
    vectors: Floats  # (T, D), unit length
    image: Ints  # (T,) positions among the pictures
    cell: Ints  # (T,) positions among the cells

    def per_cell(self, shape: tuple[int, ...]) -> Ints:
        """(n, Q): how many of them are about each cell."""
        at = np.ravel_multi_index((self.image, self.cell), shape)
        return np.bincount(at, minlength=math.prod(shape)).reshape(shape)

    def by_cell(self, values: Floats, shape: tuple[int, ...]) -> Floats:
        """(n, Q): the mean of values (T,) over the sentences about each cell; nan where there is none."""
        at, count = np.ravel_multi_index((self.image, self.cell), shape), self.per_cell(shape)
        sums = np.bincount(at, values, minlength=math.prod(shape)).reshape(shape)
        return np.where(count > 0, sums / np.maximum(count, 1), np.nan)


class Grids(NamedTuple):
    """The cells that every picture is cut into: Q of them."""

    boxes: Floats  # (Q, 4)
    size: Ints  # (Q,): into how many by how many

    @classmethod
    def of(cls, nodes: Sequence[int]) -> "Grids":
        """Those of `describe.nodes`, in the order of their numbers."""
        cells = [(window, count) for count in dict.fromkeys(nodes) for window in cut_windows((0, 0, 1, 1), count)]
        return cls(np.array([window for window, _ in cells]), np.array([count for _, count in cells]))


class Judged(NamedTuple):
    """A share over cells, and what it is held against."""

    name: str
    cells: int
    units: int
    share: float
    rival: float
    over: tuple[float, float]  # 95 % of share - rival


def concept_vectors(cache: Cache, images: Tensor, grids: Grids) -> tuple[Tensor, Bools]:
    """(n, Q, D): c of each cell, unit length, or 0 where no patch with a label lies in it; and which have one."""
    bank, labels = cache.part(Bank), cache.part(Labels)
    centred = bank.K - bank.K[bank.kept].mean(0)
    patches = torch.from_numpy(judged_patches(cache, images))
    found = []
    for some, own in zip(images.split(CHUNK), patches.split(CHUNK), strict=True):
        rows = some * cache.views
        box = cache.part(Boxes).box[rows, 1:]
        middle = (box[..., :2] + box[..., 2:]) / 2
        cells = torch.from_numpy(grids.boxes).float()[None, :, None]  # (1, Q, 1, 4)
        inside = (cells[..., :2] <= middle[:, None]).all(-1) & (middle[:, None] < cells[..., 2:]).all(-1)
        weight = labels.concept_weight[rows, 1:].float()[..., None]
        of_nodes = (centred[labels.concept_idx[rows, 1:].long()] * weight).sum(2)  # (b, N, D)
        found.append((inside & own[:, None]).float() @ of_nodes)
    sums = torch.cat(found)
    return F.normalize(sums, dim=-1), (sums.norm(dim=-1) > 0).numpy()


def agreement(said: Said, concepts: Tensor, known: Bools, grids: Grids) -> dict[str, Floats]:
    """By rival, (n, Q): how often a sentence about the cell is nearer to it than to a rival's; ties count half.

    `concepts` (n, Q, D) and `known` (n, Q) are those of concept_vectors. Rivals are all cells of the same size in the
    picture, or the same cell of all others, that are known and that a sentence was written about. It is nan where there
    is no such rival, and where the cell itself is not such a one.
    """
    vectors, image, cell = torch.from_numpy(said.vectors).float(), said.image, said.cell
    told = (said.per_cell(known.shape) > 0) & known
    cosines = torch.einsum("td,tqd->tq", vectors, concepts[image]).numpy()  # with the cells of its own picture
    own, at = cosines[np.arange(len(image)), cell], told[image, cell]
    there = told[image] & (grids.size == grids.size[cell][:, None]) & at[:, None]
    there[np.arange(len(image)), cell] = False
    beside = mean_win(own[:, None], cosines, there)
    elsewhere = np.full(len(image), np.nan)
    for number in range(known.shape[1]):
        pictures = np.flatnonzero(told[:, number])
        cells = concepts[pictures, number]
        about = np.flatnonzero(at & (cell == number))
        for rows in np.split(about, range(CHUNK, len(about), CHUNK)):
            place = np.searchsorted(pictures, image[rows])
            cosines = (vectors[rows] @ cells.T).numpy()  # with that cell of all pictures
            other = place[:, None] != np.arange(len(pictures))
            elsewhere[rows] = mean_win(cosines[~other][:, None], cosines, other)
    return {name: said.by_cell(wins, known.shape) for name, wins in zip(RIVALS, (elsewhere, beside), strict=True)}


def mean_win(own: Floats, rivals: Floats, exist: Bools) -> Floats:
    """(T,): how often own (T, 1) is above the rivals (T, R) that exist; nan where none does."""
    wins = np.where(own > rivals, 1.0, np.where(own == rivals, 0.5, 0.0)) * exist
    count = exist.sum(1)
    return np.where(count > 0, wins.sum(1) / np.maximum(count, 1), np.nan)


class Hits(NamedTuple):
    """Of the m cells with a sentence that names a part their picture shows."""

    image: Ints  # (m,) positions among the pictures
    hit: Floats  # 0 or 1
    random: Floats  # of the picture's cells of one size that were spoken of, the share that holds the part
    place: Floats  # of other pictures with the part where this cell was spoken of, the share where it holds it, or nan


def point_out(said: Said, parts: Mapping[str, PartWords], held: Mapping[str, Floats], grids: Grids) -> dict[str, Hits]:
    """Hits by part; `held` (n, Q), by part, says which cells hold it, nan in pictures that do not show it.

    A part is left out that no sentence names, or that fewer than two pictures show.
    """
    named, found = np.array([named_part(text, parts) or "" for text in said.texts]), {}
    for part, holds in held.items():
        shown, count = ~np.isnan(holds[:, 0]), said.per_cell(holds.shape)
        image, cell = np.nonzero((said.by_cell(named == part, holds.shape) > 0) & shown[:, None])
        if not len(image) or shown.sum() < 2:
            continue
        told = (count > 0) & shown[:, None]
        filled = np.where(told, holds, 0.0)
        same = told[image] & (grids.size == grids.size[cell][:, None])  # (m, Q)
        hit, others = filled[image, cell], told.sum(0)[cell] - 1
        place = np.where(others > 0, (filled.sum(0)[cell] - hit) / np.maximum(others, 1), np.nan)
        found[part] = Hits(image, hit, (filled[image] * same).sum(1) / same.sum(1), place)
    return found


def held_by(cells: Floats, at: Floats) -> Floats:
    """(n, Q): 1 where a cell (Q, 4) holds one of the points (n, P, 2) of a part, nan where the picture shows none."""
    holds = covers(np.broadcast_to(cells, (len(at), *cells.shape)), at).astype(np.float64)
    holds[np.isnan(at[..., 0]).all(1)] = np.nan
    return holds


def judge(name: str, own: Floats, rival: Floats, units: Ints) -> Judged:
    """The mean of own (m,) and of its rival, where neither is nan; units (m,) are drawn anew, whole."""
    known = ~np.isnan(own) & ~np.isnan(rival)
    own, rival, units = own[known], rival[known], units[known]
    if not len(own):
        return Judged(name, 0, 0, float("nan"), float("nan"), (float("nan"), float("nan")))
    means = bootstrap((own - rival).astype(np.float32)[None, None], units, DRAWS, 0, whole=True)
    share, other = float(own.mean()), float(rival.mean())
    return Judged(name, len(own), len(np.unique(units)), share, other, interval(means[:, 0], 0.95))


def as_text(title: str, agree: Sequence[Judged], hits: Sequence[tuple[Judged, Judged]], notes: Sequence[str]) -> str:
    """tables.txt."""

    def shares(one: Judged) -> list[str]:
        if not one.cells:
            return ["", "", ""]
        return [percent(one.rival), points(one.share - one.rival), points_range(one.over)]

    lines = [["a text is nearer to its own cell than to", "cells", "pictures", "%", "chance", "-", "95 %"]]
    lines += [
        [one.name, str(one.cells), str(one.units), percent(one.share) if one.cells else "", *shares(one)]
        for one in agree
    ]
    blocks = [title, lay_out(lines)]
    if hits:
        head = ["its cell holds the part that it names", "cells", "pictures", "%"]
        lines = [[*head, "random cell", "-", "95 %", "place alone", "-", "95 %"]]
        lines += [
            [chance.name, str(chance.cells), str(chance.units), percent(chance.share), *shares(chance), *shares(place)]
            for chance, place in hits
        ]
        blocks.append(lay_out(lines))
    foot = [
        "agreement: with the concepts that label the cell's patches, by the same encoder; pointing: by points of parts"
        " that the data set marks",
        "of cells that a text was written about, each counted once, against others of these; place alone: where another"
        " picture with the part has that cell among them",
        "95 % bootstrap intervals of the difference, over pictures or whole groups"
        + ("" if all(one.units >= UNITS for one in agree) else f": fewer than {UNITS} say nothing of others")
        + "; not corrected for the number of rows, and no verdict",
        *notes,
    ]
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


def read_said(data: Path, encoder: str, cache: Cache, images: Tensor) -> tuple[Said, list[int], str]:
    """What was said of cells of `images`, `describe.nodes`, and the fingerprint. Raises UserError where nothing was."""
    path, texts = data / CELLS, data / f"embed/{encoder}/text.parquet"
    header, table = read_header(path, SCHEMA), read_table(path, SCHEMA)
    nodes: list[int] = header.params["nodes"]
    ids = pa.array([cache.image_ids[image] for image in images.tolist()])
    table = table.filter(pc.is_in(table["image_id"], value_set=ids))
    if not table.num_rows:
        raise UserError(
            f"{path}: says nothing of a cell of a picture of {SPLIT}; name cells in describe.nodes and run"
            " describe_images and embed_text (dvc repro)"
        )
    vectors = read_table(texts, "embed.text/1", ["text_id", "vector"])
    wanted = pa.array([sha256(text) for text in table["text"].to_pylist()])
    row = pc.index_in(wanted, value_set=vectors["text_id"].combine_chunks())
    if row.null_count:
        raise UserError(f"{texts}: lacks {row.null_count} texts of {path}; run embed_text again (dvc repro)")
    said = Said(
        table["text"].to_pylist(),
        vectors_of(vectors)[row.to_numpy()].astype(np.float32),
        pc.index_in(table["image_id"], value_set=ids).to_numpy().astype(np.int64),
        table["cell"].to_numpy().astype(np.int64) - 1,
    )
    return said, nodes, header.fingerprint


def judge_cells(data: Path, encoder: str, buckets: int) -> str:
    """Write the tables and return them as text."""
    cache = read_cache(data, encoder, buckets, NEEDED)
    images = cache.images(SPLIT)
    said, nodes, mark = read_said(data, encoder, cache, images)
    grids = Grids.of(nodes)
    index = read_table(data / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    groups = group_numbers([cache.paths[image] for image in images.tolist()], groups_of(index))
    units = np.arange(len(images)) if groups is None else groups
    concepts, known = concept_vectors(cache, images, grids)
    of_cells, half = np.repeat(units, known.shape[1]), np.full(known.size, 0.5)
    agree = [
        judge(name, wins.ravel(), half, of_cells) for name, wins in agreement(said, concepts, known, grids).items()
    ]

    hits: list[tuple[Judged, Judged]] = []
    notes = [f"{int((~known[said.image, said.cell]).sum())} of {len(said.texts)} texts are of a cell without a patch"]
    try:
        parts = read_parts(data)
    except UserError as error:
        parts, notes = {}, [*notes, f"pointing is not judged: {error}"]
    of_images = {part: at[images.numpy()] for part, at in read_points(data, cache, parts).items()}
    found = point_out(said, parts, {part: held_by(grids.boxes, at) for part, at in of_images.items()}, grids)
    if found:
        every = Hits(*(np.concatenate(each) for each in zip(*found.values(), strict=True)))
        for part, one in [*found.items(), ("all parts", every)]:
            of = units[one.image]
            hits.append((judge(part, one.hit, one.random, of), judge(part, one.hit, one.place, of)))
    title = (
        f"python -m evaluation.cell_texts --encoder {encoder}: {SPLIT}, {len(said.texts)} texts about cells of"
        f" {len(np.unique(said.image))} of {len(images)} pictures, describe.nodes {nodes}"
    )
    text = as_text(title, agree, hits, notes)
    folder = data / f"explanations/cells.{encoder}"
    content: dict[str, Any] = {
        "encoder": encoder,
        "nodes": nodes,
        "agreement": [one._asdict() for one in agree if one.cells],
        "pointing": [{"random": random._asdict(), "place": place._asdict()} for random, place in hits],
        "fingerprints": {**cache.fingerprints, CELLS: mark},
    }
    write_json(folder / "tables.json", content)
    write_text(folder / "tables.txt", text)
    return text


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    parser.add_argument("--encoder", required=True, metavar="NAME", help="of `encoders`, with labels")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    print(judge_cells(Path(arguments.data), arguments.encoder, params.dataset.buckets), end="")


if __name__ == "__main__":
    run(main)
