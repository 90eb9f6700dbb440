"""Links between images, or between the documents of a text graph: links/1.

A message flows from `src` to `dst`. Kinds:

- `knn`: dst is an image, src one of the k nearest to it among all usable images, by the cosine of vectors (nearest.py);
- `text`: the same, by the mean of what describe_images says of each image, sentence by sentence;
- `group`: both are of one group of the index (a track, a camera, a site), weight 1;
- what the data give: edges of a text graph, under the kind that they have there, or `given`.

Which of these may send is no matter of this table: it links every image to those nearest to it, of whatever split, so
that another split, fold or regime leaves it as it is. Whoever passes messages holds the ends against the splits
(`count_by_split` tells how many links lead where).

The header's `sources` says which files the vectors came from, and what these said of themselves then (`refuse_stale`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.nearest import Floats, Ints, Pairs, nearest, ranked

SCHEMA = "links/1"
Row = dict[str, Any]


def table_of(pairs: Pairs, image_ids: Sequence[str], kind: str) -> pa.Table:
    """links/1 of pairs of positions in `image_ids`: the nearest send to the row."""
    names = pa.array(image_ids, store.TEXT)
    return pa.table({
        "src": names.take(pa.array(pairs.near)),
        "dst": names.take(pa.array(pairs.row)),
        "weight": pa.array(pairs.cosine, store.FLOAT),
        "kind": pa.repeat(pa.scalar(kind), len(pairs.row)),
    })


def pairs_of(table: pa.Table, image_ids: Sequence[str]) -> Pairs:
    """The pairs of links/1 by positions in `image_ids`, -1 where one is not among them."""
    names = pa.array(image_ids, store.TEXT)
    row, near = (
        pc.fill_null(pc.index_in(table[name], value_set=names), -1).to_numpy().astype(np.int64)
        for name in ("dst", "src")
    )
    return Pairs(row, near, table["weight"].to_numpy())


def update(
    old: pa.Table | None, vectors: Floats, image_ids: Sequence[str], k: int,
    device: torch.device | None = None, said: str | None = None,
) -> Pairs:  # fmt: skip
    """The k nearest of each of these images, sorted by image_id; vectors (n, D) of unit length, or 0.

    `old` are the links of k nearest that the same vectors gave among other images, some of these and maybe more: who
    has not lost one of its nearest is held against the new images alone. The bits are those of a start from nothing.
    """
    everyone = np.arange(len(image_ids))
    if old is None:
        return nearest(vectors, everyone, everyone, k, device, said)
    before = pairs_of(old, image_ids)
    linked = np.isin(everyone, before.row)
    bereft = np.isin(everyone, before.row[before.near < 0])
    new, kept = everyone[~linked], everyone[linked & ~bereft]
    return ranked(
        [
            before.where(np.isin(before.row, kept)),
            nearest(vectors, kept, new, k, device, said),
            nearest(vectors, everyone[~linked | bereft], everyone, k, device, said),
        ],
        k,
    )


def links_of_groups(images: pa.Table, most: int) -> tuple[Pairs, list[str], int]:
    """Pairs of the usable images of each group, the image_ids they count in, and how many groups are cut.

    `images`: image_id, path, group and captured_at of index.images. In a group of more than most + 1 images each is
    linked to the `most` that stand next to it, by time of capture, then by path.
    """
    members = defaultdict(list)
    ordered = images.sort_by([(name, "ascending") for name in ("captured_at", "path")])
    image_ids = ordered["image_id"].to_pylist()
    for place, group in enumerate(ordered["group"].to_pylist()):
        if group is not None:
            members[group].append(place)
    pairs = [window(np.array(places), most) for _, places in sorted(members.items())]
    row, near = np.concatenate([np.empty((2, 0), np.int64), *pairs], axis=1)
    cut = sum(len(places) > most + 1 for places in members.values())
    return Pairs(row, near, np.ones(len(row), np.float32)), image_ids, cut


def window(places: Ints, most: int) -> np.ndarray:
    """(2, p): each of n places with the `most` next to it in their order, as many before as behind, or all others."""
    count = len(places)
    wide = min(most + 1, count)
    first = np.clip(np.arange(count) - wide // 2, 0, count - wide)
    row, near = np.repeat(np.arange(count), wide), (first[:, None] + np.arange(wide)).ravel()
    return np.stack([places[row], places[near]])[:, row != near]


def given_links(edges: pa.Table, images: pa.Table, both_ways: bool = False) -> tuple[pa.Table, Counter[str]]:
    """links/1 of edges between paths (index.links/1), and how many edges are left out, by the reason.

    `images`: path, image_id, status and duplicate_of of index.images. An edge of a copy is one of the image that is
    used for it. Of several edges from one image to another, of one kind, the one of the largest weight stays.
    `both_ways`: each sends from dst to src as well, with the larger weight where both directions are given.
    """
    used = images.filter(pc.field("status") == "ok")
    copies = images.filter(pc.field("status") == "duplicate")
    image_ids = used["image_id"].combine_chunks()
    paths = pa.concat_arrays([used["path"].combine_chunks(), copies["path"].combine_chunks()])
    of_copies = pc.index_in(copies["duplicate_of"].combine_chunks(), value_set=used["path"].combine_chunks())
    image_of = pa.concat_arrays([pa.array(np.arange(len(used)), pa.int32()), of_copies])  # of each path, its image
    ends = {end: image_of.take(pc.index_in(edges[end].combine_chunks(), value_set=paths)) for end in ("src", "dst")}
    # By numbers: of the texts, those of an edge alone take 200 bytes.
    numbered = pa.table({**ends, "weight": edges["weight"], "kind": edges["kind"]}).drop_null()
    between = numbered.filter(pc.field("src") != pc.field("dst"))
    best = strongest(between)
    left_out = Counter({
        "an end is not used": len(edges) - len(numbered),
        "both ends are one": len(numbered) - len(between),
        "they stand there twice": len(between) - len(best),
    })
    if both_ways:
        back = best.rename_columns({"src": "dst", "dst": "src"}).select(best.column_names)
        best = strongest(pa.concat_tables([best, back]))
    ids = {end: image_ids.take(best[end].combine_chunks()) for end in ("src", "dst")}
    table = pa.table({**ids, "weight": best["weight"], "kind": best["kind"]})
    return table.cast(store.arrow_schema(SCHEMA)), +left_out


def strongest(edges: pa.Table) -> pa.Table:
    """Of several edges from one end to another, of one kind, the one of the largest weight."""
    best = edges.group_by(["src", "dst", "kind"], use_threads=False).aggregate([("weight", "max")])
    return best.rename_columns({"weight_max": "weight"}).select(["src", "dst", "weight", "kind"])


def count_by_split(links: pa.Table, splits: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many links lead from one split to another; `splits` has that of each image_id."""
    ids, of = pa.array(list(splits), store.TEXT), pa.array(list(splits.values()), store.TEXT)
    ends = pa.table({end: of.take(pc.index_in(links[end], value_set=ids)) for end in ("src", "dst")})
    counted = ends.group_by(["src", "dst"]).aggregate([([], "count_all")]).to_pylist()
    return Counter({(row["src"], row["dst"]): row["count_all"] for row in counted})


def refuse_stale(path: Path, data: Path) -> None:
    """Raise UserError where links were made of vectors that have been made otherwise since; `data` holds both.

    What is not there is not asked: a machine that only trains needs no vectors for the links that it was sent.
    """
    sources = store.read_header(path, SCHEMA).params["sources"]
    for name, said in sources.items():
        source = data / name
        file = source if source.suffix else store.bucket_path(source, 0)
        if file.is_file() and said_of(file, said["schema"]) != said:
            stage = f"python -m stages.link_images --links {path.stem}"
            raise UserError(f"{path}: was not made from {source} as it is now; run {stage} (dvc repro)")


def said_of(file: Path, schema: str) -> Row:
    """What a file that vectors come from says of itself, as far as it decides them.

    Of a table of texts the encoder alone: another prompt gives other texts beside those of images, and no other vector.
    """
    header = store.read_header(file, schema)
    of_texts = schema == "embed.text/1"
    decides = {"encoder": header.params["encoder"]} if of_texts else {"fingerprint": header.fingerprint}
    return {"schema": schema, **decides}
