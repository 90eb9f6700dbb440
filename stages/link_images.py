"""Link images, or documents: the k nearest by vectors or by descriptions, those of one group, or what the data give.

Reads   data/index/images.parquet; `links.NAME` of params.yaml; by its kind:
        knn    data/embed/ENCODER/images (the vector of the whole picture), or data/embed/ENCODER/moments and of these
               `names`, put side by side, each first brought to unit length; view 0;
        text   data/descriptions/descriptions.parquet and data/embed/ENCODER/text.parquet: the mean sentence;
        group  the group of each image in the index;
        given  data/index/links.parquet: the edges of a text graph, or with `both_ways` these and their reverses.
Writes  data/links/NAME.parquet (links/1, fieldmark/links.py). Links of k nearest by the same vectors are kept: an image
        more changes its own rows and those of the images that it is nearest to.
Costs   n^2 D multiplications: 10,000 images of 512 numbers take 2 s on two cores, 100,000 some 3 minutes, or seconds on
        a GPU. An image more, n D of them. Memory: the vectors in float32, and 200 MB.

Every usable image is linked to the nearest of all the others, of whatever split. What is nearest is exact, and the bits
depend neither on the size of blocks nor on the device (fieldmark/nearest.py).

    python -m stages.link_images --links near
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fieldmark import store
from fieldmark.command import UserError, counted, key_parser, run
from fieldmark.links import SCHEMA, count_by_split, given_links, links_of_groups, said_of, table_of, update
from fieldmark.nearest import Floats, unit_rows
from fieldmark.params import Links, load_params

DATA = Path("data")
IMAGES, GIVEN = DATA / "index/images.parquet", DATA / "index/links.parquet"
LINKS = DATA / "links"
# Images whose sentences are summed at a time.
SUMMED = 4096


def read_vectors(folder: Path, schema: str, buckets: int, image_ids: Sequence[str]) -> np.ndarray:
    """(n, D) float16: view 0 of these images, sorted, and of nodes node 0. Raises UserError where one is missing."""
    columns = ["image_id", "view", "vector", *(["node"] if schema == "embed.nodes/1" else [])]
    # Made once: Arrow's index_in would hash all images anew for every row group.
    place_of = {image_id: place for place, image_id in enumerate(image_ids)}
    vectors, present = np.empty((0, 0), np.float16), np.zeros(len(image_ids), dtype=bool)
    for bucket in range(buckets):
        for group in store.iterate_groups(store.bucket_path(folder, bucket), schema, columns):
            whole = pc.field("view") == 0
            table = group.filter(whole & (pc.field("node") == 0) if "node" in columns else whole)
            if not len(vectors):
                vectors = np.empty((len(image_ids), table.schema.field("vector").type.list_size), np.float16)
            places = np.array([place_of.get(each, -1) for each in table["image_id"].to_pylist()], dtype=np.int64)
            known = places >= 0
            vectors[places[known]] = store.vectors_of(table)[known]
            present[places[known]] = True
    if not present.all():
        stage = "pool_tokens" if schema == "embed.moments/1" else "embed_images"
        raise UserError(f"{folder}: has no row of image {image_ids[int(present.argmin())]}; run {stage} (dvc repro)")
    return vectors


def mean_sentences(texts: Path, described: Path, image_ids: Sequence[str]) -> np.ndarray:
    """(n, D) float32: the sum of the sentence vectors of each image; 0 where it has none.

    Raises UserError where the table of texts lacks a sentence.
    """
    table = store.read_table(texts, "embed.text/1", ["text_id", "vector"])
    rows = store.read_table(described, "descriptions/1").sort_by([("image_id", "ascending"), ("rank", "ascending")])
    image = pc.index_in(rows["image_id"], value_set=pa.array(image_ids, store.TEXT))
    rows, image = rows.filter(pc.is_valid(image)), image.drop_null().to_numpy()
    text_ids = pa.array([store.sha256(text) for text in rows["text"].to_pylist()], store.TEXT)
    place = pc.index_in(text_ids, value_set=table["text_id"].combine_chunks())
    if place.null_count:
        raise UserError(f"{texts}: lacks {place.null_count} sentences of {described}; run embed_text (dvc repro)")
    vectors, sentence = store.vectors_of(table), place.to_numpy()
    found = np.zeros((len(image_ids), vectors.shape[1]), np.float32)
    for start in range(0, len(image_ids), SUMMED):
        first, last = np.searchsorted(image, [start, start + SUMMED])
        np.add.at(found, image[first:last], vectors[sentence[first:last]].astype(np.float32))
    return found


def sources_of(links: Links) -> Iterator[tuple[Path, str]]:
    """The files and folders that the vectors come from, and their schemas."""
    vectors = Path(links.vectors)
    if links.kind == "text":
        yield from ((vectors, "embed.text/1"), (Path(links.texts), "descriptions/1"))
    elif links.names:
        yield from ((vectors / name, "embed.moments/1") for name in links.names)
    else:
        yield vectors, "embed.nodes/1"


def read_unit(links: Links, buckets: int, image_ids: Sequence[str]) -> Floats:
    """(n, D) float32 of unit length, or 0: what images are compared by."""
    if links.kind == "text":
        return unit_rows([mean_sentences(Path(links.vectors), Path(links.texts), image_ids)])
    return unit_rows([read_vectors(source, schema, buckets, image_ids) for source, schema in sources_of(links)])


def by_boxes(links: Links) -> bool:
    """Whether the data's boxes said where the encoder looks: a corrected box moves vectors under the same mark."""
    if links.kind != "knn" or links.names:
        return False
    made_by = store.read_header(store.bucket_path(links.vectors, 0), "embed.nodes/1").params
    return bool((made_by.get("regions") or {}).get("object") == "box")


def link_nearest(path: Path, links: Links, buckets: int, image_ids: list[str]) -> tuple[pa.Table, dict[str, Any], str]:
    """links/1 of kinds knn and text, what the header says, and what there is to say."""
    said = {}
    for source, schema in sources_of(links):
        if not source.suffix:
            store.read_folder_header(source, schema, buckets)
        file = source if source.suffix else store.bucket_path(source, 0)
        said[source.relative_to(DATA).as_posix()] = said_of(file, schema)
    made_by = {"kind": links.kind, "k": links.k, "sources": said}
    # What is said of an image changes under one mark, as after a retry: links by texts are made anew.
    keeps = links.kind == "knn" and not by_boxes(links) and path.is_file()
    old = store.read_table(path, SCHEMA) if keeps and store.read_header(path, SCHEMA).params == made_by else None
    vectors = read_unit(links, buckets, image_ids)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = update(old, vectors, image_ids, links.k, device, f"link {path.stem}")
    bare = len(image_ids) - int(vectors.any(axis=1).sum())
    remark = f"{counted(bare, 'has', 'have')} no vector, and no link" if bare else ""
    return table_of(pairs, image_ids, links.kind), made_by, remark


def link_groups(links: Links, images: pa.Table) -> tuple[pa.Table, dict[str, Any], str]:
    """The same of kind group. Raises UserError where the data name no group."""
    pairs, image_ids, cut = links_of_groups(images, links.k)
    if not len(pairs.row):
        what = "no two usable images are of one group"
        raise UserError(f"{IMAGES}: {what}; take the links out, or give the data set groups (docs/own-data.md)")
    of = f"of more than {links.k + 1} images, of which each is linked to the {links.k} next to it"
    remark = f"{counted(cut, 'group is', 'groups are')} {of}" if cut else ""
    return table_of(pairs, image_ids, links.kind), {"kind": links.kind, "k": links.k, "sources": {}}, remark


def link_given(images: pa.Table, both_ways: bool) -> tuple[pa.Table, dict[str, Any], str]:
    """The same of kind given. Raises UserError where the data give no edge that can be used."""
    table, left_out = given_links(store.read_table(GIVEN, "index.links/1"), images, both_ways)
    if not table.num_rows:
        raise UserError(f"{GIVEN}: has no edge between usable images; take the links out, or see docs/own-data.md")
    remark = ", ".join(f"{count} left out because {why}" for why, count in sorted(left_out.items()))
    return table, {"kind": "given", **({"both_ways": True} if both_ways else {}), "sources": {}}, remark


def fingerprint_of(made_by: dict[str, Any]) -> str:
    """That of links: where the vectors lie does not count, what they are does."""
    content = {key: value for key, value in made_by.items() if key != "sources"}
    return store.fingerprint(SCHEMA, content, [store.canonical_json(each) for each in made_by["sources"].values()])


def main() -> None:
    arguments = key_parser(__doc__, "--links", "links").parse_args()
    params = load_params(arguments.params)
    links = params.links.get(arguments.links)
    if links is None:
        known = ", ".join(params.links) or "none yet, so add it there"
        raise UserError(f"{arguments.params}: links.{arguments.links}: is not there; choose one of: {known}")
    path = LINKS / f"{arguments.links}.parquet"
    columns = ["path", "image_id", "split", "status", "group", "captured_at", "duplicate_of"]
    images = store.read_table(IMAGES, "index.images/1", columns)
    usable = images.filter(pc.field("status") == "ok").sort_by("image_id")
    if links.kind == "given":
        table, made_by, remark = link_given(images, links.both_ways)
    elif links.kind == "group":
        table, made_by, remark = link_groups(links, usable)
    else:
        image_ids = usable["image_id"].to_pylist()
        table, made_by, remark = link_nearest(path, links, params.dataset.buckets, image_ids)
    store.write_table(table, path, SCHEMA, made_by, fingerprint_of(made_by))
    reached = pc.count_distinct(table["dst"]).as_py()
    print(f"{path}: {table.num_rows} links to {reached} of {usable.num_rows} images{remark and f'; {remark}'}")
    splits = dict(zip(usable["image_id"].to_pylist(), usable["split"].to_pylist(), strict=True))
    leads = sorted(count_by_split(table, splits).items())
    print("from split to split: " + ", ".join(f"{src} -> {dst} {count}" for (src, dst), count in leads))


if __name__ == "__main__":
    run(main)
