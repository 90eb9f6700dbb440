"""From the Parquet cache to tensors: everything a method may look at, read once, and batches cut out of it.

`read_cache` joins what the stages wrote for one encoder (nodes, graphs, labels, bank, descriptions) with the index.
Vectors stay in float16 and edges in flat lists, so memory is about what the files hold, and vectors that would fill it
stay on the disk; `Cache.batch` gathers, pads and widens for a few hundred images at a time, without a loop over images.
Names and shapes are those of the method catalogue: B images, N local nodes, D dimensions, C classes, M concepts, k
labels a node, S sentences.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.store import (
    bucket_of,
    bucket_path,
    read_buckets,
    read_folder_header,
    read_header,
    read_table,
    sha256,
    vectors_of,
)

SPLITS = ("train", "val", "test")
MEMORY_SHARE = 0.5  # of the machine's memory, for vectors
NEAR = 0.01  # of the image's side: two encoders' boxes of one node differ by no more


@dataclass(frozen=True)
class Bank:
    """The concept bank. Rows of kind `name` are class names: `kept` is false for them, and labels no patch."""

    path: str  # the file it was read from, for messages
    K: Tensor  # (M, D) float32, unit length
    own: Tensor  # (M, C) bool: the classes that own a concept; a generic one has none
    kind: tuple[str, ...]  # M of name, visual, habitat, generic, proto
    kept: Tensor  # (M,) bool

    def of_kind(self, *kinds: str) -> Tensor:
        """(M,) bool: the rows of these kinds."""
        return torch.tensor([kind in kinds for kind in self.kind], dtype=torch.bool)


@dataclass(frozen=True)
class Batch:
    """B images, each seen in one view. Node 0 is the whole image, nodes 1..N its local nodes, padded under `mask`."""

    y: Tensor  # (B,) int64, the position in Cache.classes
    target: Tensor  # (B,) int64 or (B, C) float32: what training is told of the class, as Cache.target
    nodes: Tensor  # (B, N+1, D) float32, unit length; 0 where padded
    mask: Tensor  # (B, N+1) bool, true for node 0
    box: Tensor  # (B, N, 4) float32, x0 y0 x1 y1 of the local nodes in [0,1] of the full image
    concept_idx: Tensor  # (B, N+1, k) int64, rows of the bank; 0 at weight 0 where a node has fewer
    concept_weight: Tensor  # (B, N+1, k) float32, >= 0, sum <= 1 (what the labelling cut off is missing)
    selected: Tensor  # (B, N+1) bool, the patches that label_patches selected
    density: Tensor  # (B, N+1) float32, information density
    adjacency: Tensor  # (B, N+1, N+1, 2) float32, spatial and semantic weight in [0,1], symmetric, diagonal 0
    ring_gains: Tensor  # (B, R) float32, information gained from ring to ring; R is 0 where label_patches wrote none
    selected_concepts: Tensor  # (B, Mc) int64, rows of the bank, best first: the image's concepts; -1 where fewer
    d: Tensor  # (B, S, D) float32, sentences of the image's description; S is 0 where no image has one
    dm: Tensor  # (B, S) bool
    others: tuple[Tensor, ...] = ()  # (B, N+1, D') float32 each: the same nodes as other encoders see them
    text_edges: Tensor | None = None  # (B, Mc+S, Mc+S, 1) float32, weights between texts, where Cache has them ready

    @property
    def g(self) -> Tensor:
        """(B, D): the global vector."""
        return self.nodes[:, 0]

    @property
    def l(self) -> Tensor:  # noqa: E743 (the catalogue's name)
        """(B, N, D): the local vectors."""
        return self.nodes[:, 1:]

    @property
    def lm(self) -> Tensor:
        """(B, N) bool: which local nodes exist."""
        return self.mask[:, 1:]


@dataclass(frozen=True, eq=False)  # one cache equals itself alone, so that what follows from it can be remembered
class Cache:
    """All images of an index as one encoder sees them: n images in V views each; row i * V + v is image i in view v."""

    classes: list[str]
    paths: list[str]
    split: np.ndarray  # (n,) str
    y: Tensor  # (n,) int64
    target: Tensor  # y, unless a regime tells training otherwise: (n,) int64, or (n, C) float32 whose rows sum to 1
    views: int  # V
    vectors: Tensor  # (n V, N+1, D) float16
    mask: Tensor  # (n V, N+1) bool
    boxes: Tensor  # (n V, N+1, 4) float32
    concept_idx: Tensor  # (n V, N+1, k) int32
    concept_weight: Tensor  # (n V, N+1, k) float16
    selected: Tensor  # (n V, N+1) bool
    density: Tensor  # (n V, N+1) float32
    ring_gains: Tensor  # (n V, R) float32; R is 0 where labels have none
    selected_concepts: Tensor  # (n V, Mc) int32, rows of the bank; -1 where a row has fewer
    edge_start: Tensor  # (n V,) int64: a row's edges are edge_start .. edge_start + edge_count
    edge_count: Tensor  # (n V,) int64
    edge_nodes: Tensor  # (edges, 2) int16
    edge_weight: Tensor  # (edges, 2) float16
    sentences: Tensor  # (n, S, D) float16
    sentence_mask: Tensor  # (n, S) bool
    bank: Bank
    fingerprints: dict[str, str]  # by file or folder
    others: tuple[Tensor, ...] = ()  # (n V, N+1, D') float16 each: the same nodes as other encoders see them
    text_edges: Tensor | None = None  # (n V, Mc+S, Mc+S, 1) float16: a method's own, between the texts of each row

    def images(self, split: str) -> Tensor:
        """The positions of a split's images, in the order of their paths."""
        return torch.from_numpy(np.flatnonzero(self.split == split))

    def globals(self, images: Tensor, view: int = 0) -> Tensor:
        """(len(images), D) float32: the global vectors."""
        return self.vectors[images * self.views + view, 0].float()

    def batch(self, images: Tensor, views: Tensor | None = None) -> Batch:
        """These images, each in its view of `views` (default: view 0, the one that evaluation reads)."""
        rows = images * self.views + (0 if views is None else views)
        return Batch(
            y=self.y[images],
            target=self.target[images],
            nodes=self.vectors.index_select(0, rows).float(),  # several times as fast as [rows]
            mask=self.mask[rows],
            box=self.boxes[rows, 1:],
            concept_idx=self.concept_idx[rows].long(),
            concept_weight=self.concept_weight[rows].float(),
            selected=self.selected[rows],
            density=self.density[rows],
            ring_gains=self.ring_gains[rows],
            selected_concepts=self.selected_concepts[rows].long(),
            adjacency=self.adjacency(rows),
            d=self.sentences[images].float(),
            dm=self.sentence_mask[images],
            others=tuple(vectors.index_select(0, rows).float() for vectors in self.others),
            text_edges=None if self.text_edges is None else self.text_edges[rows].float(),
        )

    def adjacency(self, rows: Tensor) -> Tensor:
        """(len(rows), N+1, N+1, 2) float32: the rows' edges laid out as dense matrices."""
        nodes = self.mask.shape[1]
        count = self.edge_count[rows]
        sample = torch.repeat_interleave(torch.arange(len(rows)), count)
        # Position of every edge in the flat lists: its row's start, plus how far it stands behind its row's first.
        first = count.cumsum(0) - count
        edge = torch.arange(len(sample)) + (self.edge_start[rows] - first)[sample]
        source, target = self.edge_nodes[edge].long().unbind(1)
        dense = torch.zeros(len(rows) * nodes * nodes, 2)
        dense[(sample * nodes + source) * nodes + target] = self.edge_weight[edge].float()
        return dense.view(len(rows), nodes, nodes, 2)


def read_cache(folder: str | Path, encoder: str, buckets: int, also: Sequence[str] = ()) -> Cache:
    """Read what the stages wrote into `folder` (data/) for one encoder, and the nodes of each of `also`.

    Raises UserError, naming the file and the stage to run: a file missing or broken, an image without rows, files that
    were made from different encoders, banks or texts, or another encoder whose nodes are not at the same places.
    """
    folder = Path(folder)
    embed, graphs, labels = (
        folder / name for name in (f"embed/{encoder}/images", f"graphs/{encoder}", f"labels/{encoder}")
    )
    fingerprints = check_origins(folder, encoder, buckets, also)

    classes = sorted(read_table(folder / "index/classes.parquet", "index.classes/1").column("class_id").to_pylist())
    index = read_table(
        folder / "index/images.parquet", "index.images/1", ["path", "image_id", "class_id", "split", "status"]
    )
    index = index.filter(pc.equal(index["status"], "ok")).sort_by("path")
    split = np.array(index["split"].to_pylist(), dtype=str)
    for name in SPLITS:
        if not (split == name).any():
            raise UserError(
                f"{folder / 'index/images.parquet'}: holds no {name} image; correct dataset.* and run index_images"
            )
    image_ids = index["image_id"].combine_chunks()
    y = pc.index_in(index["class_id"], value_set=pa.array(classes))
    if y.null_count:
        raise UserError(f"{folder / 'index/classes.parquet'}: lacks a class of images.parquet; run index_images again")

    views, vectors, mask, boxes = read_nodes(embed, buckets, image_ids)
    rows = Rows(image_ids, views, buckets)
    concept_idx, concept_weight, selected, density = read_labels(labels, rows, mask)
    ring_gains, selected_concepts = read_image_labels(labels, rows)
    edge_start, edge_count, edge_nodes, edge_weight = read_graphs(graphs, rows, nodes=mask.shape[1])
    bank = read_bank(folder / f"bank/{encoder}.parquet", classes)
    if max(concept_idx.max(initial=0), selected_concepts.max(initial=0)) >= max(len(bank.kind), 1):
        raise UserError(f"{labels}: names concepts that {bank.path} does not hold; run label_patches again")
    sentences, sentence_mask = read_descriptions(
        folder / "descriptions/descriptions.parquet",
        folder / f"embed/{encoder}/text.parquet",
        image_ids,
        vectors.shape[2],
    )
    labels_of = torch.from_numpy(y.to_numpy().astype(np.int64))
    return Cache(
        classes=classes,
        paths=index["path"].to_pylist(),
        split=split,
        y=labels_of,
        target=labels_of,
        views=views,
        vectors=torch.from_numpy(vectors),
        mask=torch.from_numpy(mask),
        boxes=torch.from_numpy(boxes),
        concept_idx=torch.from_numpy(concept_idx),
        concept_weight=torch.from_numpy(concept_weight),
        selected=torch.from_numpy(selected),
        density=torch.from_numpy(density),
        ring_gains=torch.from_numpy(ring_gains),
        selected_concepts=torch.from_numpy(selected_concepts),
        edge_start=torch.from_numpy(edge_start),
        edge_count=torch.from_numpy(edge_count),
        edge_nodes=torch.from_numpy(edge_nodes),
        edge_weight=torch.from_numpy(edge_weight),
        sentences=torch.from_numpy(sentences),
        sentence_mask=torch.from_numpy(sentence_mask),
        bank=bank,
        fingerprints=fingerprints,
        others=tuple(read_others(folder, encoder, other, buckets, image_ids, mask, boxes) for other in also),
    )


def read_others(
    folder: Path, encoder: str, other: str, buckets: int, image_ids: pa.Array, mask: np.ndarray, boxes: np.ndarray
) -> Tensor:
    """Vectors (n V, N+1, D') float16 of an `other` encoder, whose nodes have to be those of `encoder`."""
    _, vectors, own_mask, own_boxes = read_nodes(folder / f"embed/{other}/images", buckets, image_ids)
    if own_mask.shape != mask.shape or (own_mask != mask).any() or not np.allclose(own_boxes, boxes, atol=NEAR):
        raise UserError(
            f"{folder / 'embed' / other}: its nodes are not those of {encoder}, so that they cannot stand side by side;"
            " embed both with embed.grids of the same sizes or with the same crops, and embed.tokens false"
        )
    return torch.from_numpy(vectors)


def check_origins(folder: Path, encoder: str, buckets: int, also: Sequence[str] = ()) -> dict[str, str]:
    """Every input's fingerprint, after a look at what each says it was made from.

    Raises UserError where one was made from something else than what lies here: shards of another encoder, labels of a
    former bank.
    """
    headers = {
        f"embed/{encoder}/images": read_folder_header(folder / f"embed/{encoder}/images", "embed.nodes/1", buckets),
        f"embed/{encoder}/text.parquet": read_header(folder / f"embed/{encoder}/text.parquet", "embed.text/1"),
        f"bank/{encoder}.parquet": read_header(folder / f"bank/{encoder}.parquet", "bank/1"),
        f"labels/{encoder}": read_folder_header(folder / f"labels/{encoder}", "labels/1", buckets),
        f"graphs/{encoder}": read_folder_header(folder / f"graphs/{encoder}", "graphs/1", buckets),
        "descriptions/descriptions.parquet": read_header(
            folder / "descriptions/descriptions.parquet", "descriptions/1"
        ),
        "index/images.parquet": read_header(folder / "index/images.parquet", "index.images/1"),
        "index/classes.parquet": read_header(folder / "index/classes.parquet", "index.classes/1"),
    }
    images, text, bank, labels, graphs = list(headers)[:5]
    headers |= {
        f"embed/{other}/images": read_folder_header(folder / f"embed/{other}/images", "embed.nodes/1", buckets)
        for other in also
    }
    for made, param, source, stage in [
        (graphs, "embed", images, "build_graphs"),
        (bank, "embed", images, "select_concepts"),
        (bank, "text", text, "select_concepts"),
        (labels, "embed", images, "label_patches"),
        (labels, "bank", bank, "label_patches"),
    ]:
        if headers[made].params.get(param) != headers[source].fingerprint:
            raise UserError(
                f"{folder / made}: was not made from {folder / source} as it is now (another encoder or other"
                f" parameters); run {stage} again (dvc repro)"
            )
    return {name: header.fingerprint for name, header in sorted(headers.items())}


class Rows:
    """Where the rows of a table belong: image i in view v is row i * V + v. Rows of other images are not read."""

    def __init__(self, image_ids: pa.Array, views: int, buckets: int) -> None:
        self.image_ids, self.views, self.buckets = image_ids, views, buckets
        self.count = len(image_ids) * views

    def place(self, table: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """The table without rows of other images, and the row that each of its lines belongs to."""
        table = table.filter(pc.is_in(table["image_id"], value_set=self.image_ids))
        image = pc.index_in(table["image_id"], value_set=self.image_ids).to_numpy()
        return table, image.astype(np.int64) * self.views + column(table, "view")

    def require(self, present: np.ndarray, folder: Path, stage: str) -> None:
        """Raise UserError for the first row that is not `present`."""
        if not present.all():
            image, view = divmod(int(np.argmin(present)), self.views)
            image_id = self.image_ids[image].as_py()
            raise UserError(
                f"{bucket_path(folder, bucket_of(image_id, self.buckets))}: lacks image {image_id} (view {view});"
                f" run {stage} again (dvc repro), or fetch the file again (dvc pull)"
            )


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The elements of a list column one behind another, and how many each line has."""
    return pc.list_flatten(lists).to_numpy(), pc.list_value_length(lists).to_numpy().astype(np.int64)


def slots(lengths: np.ndarray) -> np.ndarray:
    """0, 1, .. length-1 for each length, one behind another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def make_room(shape: tuple[int, ...], folder: Path) -> np.ndarray:
    """Zeros, float16; what is more than MEMORY_SHARE of the machine's memory lies in a file, gone with the array.

    Batches are then read from the disk of `folder`.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * math.prod(shape) <= MEMORY_SHARE * memory:
        return np.zeros(shape, dtype=np.float16)
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        return np.memmap(file, np.float16, "w+", shape=shape)


def read_nodes(folder: Path, buckets: int, image_ids: pa.Array) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """V, vectors (n V, N+1, D) float16, mask (n V, N+1), boxes (n V, N+1, 4): one bucket at a time in memory."""
    keys = read_buckets(folder, "embed.nodes/1", buckets, ["view", "node"])
    if not keys.num_rows:
        raise UserError(f"{folder}: holds no image; run embed_images (dvc repro)")
    views, nodes = int(column(keys, "view").max()) + 1, int(column(keys, "node").max()) + 1
    rows = Rows(image_ids, views, buckets)
    mask = np.zeros((rows.count, nodes), dtype=bool)
    boxes = np.zeros((rows.count, nodes, 4), dtype=np.float32)
    vectors: np.ndarray | None = None
    for bucket in range(buckets):
        table = read_table(bucket_path(folder, bucket), "embed.nodes/1")
        if vectors is None:
            vectors = make_room((rows.count, nodes, table.schema.field("vector").type.list_size), folder)
        table, row = rows.place(table)
        node = column(table, "node")
        if (column(table, "kind")[node == 0] != "global").any():
            raise UserError(f"{bucket_path(folder, bucket)}: node 0 is not the global one; run embed_images again")
        mask[row, node] = True
        vectors[row, node] = vectors_of(table)
        boxes[row, node] = np.stack([column(table, side) for side in ("x0", "y0", "x1", "y1")], axis=1)
    assert vectors is not None
    rows.require(mask[:, 0], folder, "embed_images")
    return views, vectors, mask, boxes


def read_labels(folder: Path, rows: Rows, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """concept_idx (n V, N+1, k) int32, concept_weight (same) float16, selected and density (n V, N+1)."""
    columns = ["image_id", "view", "node", "concept_idx", "concept_weight", "density", "selected"]
    table, row = rows.place(read_buckets(folder, "labels/1", rows.buckets, columns))
    node = column(table, "node")
    concepts, lengths = flat(table["concept_idx"])
    weights, _ = flat(table["concept_weight"])
    if node.size and node.max() >= mask.shape[1]:
        raise UserError(f"{folder}: labels nodes that the embeddings do not have; run label_patches again")
    k = int(lengths.max(initial=0))
    concept_idx = np.zeros((*mask.shape, k), dtype=np.int32)
    concept_weight = np.zeros((*mask.shape, k), dtype=np.float16)
    place = (np.repeat(row, lengths), np.repeat(node, lengths), slots(lengths))
    concept_idx[place], concept_weight[place] = concepts, weights
    selected, density, labelled = np.zeros_like(mask), np.zeros(mask.shape, dtype=np.float32), np.zeros_like(mask)
    selected[row, node], density[row, node], labelled[row, node] = (
        column(table, "selected"),
        column(table, "density"),
        True,
    )
    rows.require((labelled | ~mask).all(axis=1), folder, "label_patches")
    return concept_idx, concept_weight, selected, density


def read_image_labels(folder: Path, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """What labels say of whole images, on node 0: ring_gains (n V, R) float32, selected_concepts (n V, Mc) int32.

    Missing gains are 0 and missing concepts -1; R is 0 where no image has gains.
    """
    columns = ["image_id", "view", "node", "ring_gains", "selected_concepts"]
    table = read_buckets(folder, "labels/1", rows.buckets, columns)
    table, row = rows.place(table.filter(pc.equal(table["node"], 0)))
    found = []
    for name, dtype, missing in (("ring_gains", np.float32, 0), ("selected_concepts", np.int32, -1)):
        values, lengths = flat(pc.fill_null(table[name], []))
        wide = np.full((rows.count, int(lengths.max(initial=0))), missing, dtype=dtype)
        wide[np.repeat(row, lengths), slots(lengths)] = values
        found.append(wide)
    return found[0], found[1]


def read_graphs(folder: Path, rows: Rows, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """edge_start and edge_count (n V,), edge_nodes (edges, 2) int16, edge_weight (edges, 2) float16."""
    table, row = rows.place(read_buckets(folder, "graphs/1", rows.buckets))
    source, lengths = flat(table["src"])
    edge_nodes = np.stack([source, flat(table["dst"])[0]], axis=1)
    edge_weight = np.stack([flat(table["spatial"])[0], flat(table["semantic"])[0]], axis=1)
    if edge_nodes.size and (edge_nodes.min() < 0 or edge_nodes.max() >= nodes):
        raise UserError(f"{folder}: links nodes that the embeddings do not have; run build_graphs again")
    start, count = np.zeros(rows.count, dtype=np.int64), np.full(rows.count, -1, dtype=np.int64)
    start[row], count[row] = np.cumsum(lengths) - lengths, lengths
    rows.require(count >= 0, folder, "build_graphs")
    return start, count, edge_nodes, edge_weight


def read_bank(path: Path, classes: Sequence[str]) -> Bank:
    """The bank, with `own` in the order of `classes`."""
    table = read_table(path, "bank/1").sort_by("concept_idx")
    if (column(table, "concept_idx") != np.arange(table.num_rows)).any():
        raise UserError(f"{path}: concept_idx does not count from 0 without a gap; run select_concepts again")
    position = {class_id: column for column, class_id in enumerate(classes)}
    own = np.zeros((table.num_rows, len(classes)), dtype=bool)
    for concept, owners in enumerate(table["class_ids"].to_pylist()):
        own[concept, [position[owner] for owner in owners if owner in position]] = True
    return Bank(
        path=str(path),
        K=torch.from_numpy(vectors_of(table).astype(np.float32)),
        own=torch.from_numpy(own),
        kind=tuple(table["kind"].to_pylist()),
        kept=torch.from_numpy(np.array(table["kept"].to_pylist(), dtype=bool)),
    )


def read_descriptions(path: Path, text: Path, image_ids: pa.Array, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentence vectors (n, S, D) float16 in the order of their rank, and their mask (n, S)."""
    table: Any = read_table(path, "descriptions/1")
    table = table.filter(pc.is_in(table["image_id"], value_set=image_ids)).sort_by(
        [("image_id", "ascending"), ("rank", "ascending")]
    )
    image = pc.index_in(table["image_id"], value_set=image_ids).to_numpy().astype(np.int64)
    # The lines of one image stand together now: a line's slot is its distance from its image's first.
    lengths = np.unique_counts(column(table, "image_id")).counts if table.num_rows else np.zeros(0, dtype=np.int64)
    sentences = np.zeros((len(image_ids), int(lengths.max(initial=0)), dimension), dtype=np.float16)
    mask = np.zeros(sentences.shape[:2], dtype=bool)
    if not table.num_rows:
        return sentences, mask
    texts = read_table(text, "embed.text/1", ["text_id", "vector"])
    wanted = pa.array([sha256(sentence) for sentence in table["text"].to_pylist()])
    found = pc.index_in(wanted, value_set=texts["text_id"].combine_chunks())
    if found.null_count:
        raise UserError(f"{text}: lacks {found.null_count} texts of {path}; run embed_text again (dvc repro)")
    sentences[image, slots(lengths)] = vectors_of(texts)[found.to_numpy()]
    mask[image, slots(lengths)] = True
    return sentences, mask
