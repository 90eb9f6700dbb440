"""The cache of one encoder as a method sees it: the index, the parts that it declares, and batches of them.

`read_cache` joins the parts (`part.py`) with the index. Vectors stay in float16 and edges in flat lists, mapped from
the arrays that an earlier reading left (`arrays.py`); `Cache.batch` gathers, pads and widens for a few hundred images
at a time, without a loop over images. `Cache.on` puts a cache on the device that trains (`placement.py`). Letters in
shapes: B images, N local nodes, D dimensions, C classes, M concepts, k labels a node, S sentences, V views.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fieldmark.command import UserError
from fieldmark.halves import halve
from fieldmark.store import Header, read_folder_header, read_header, read_table
from training.data.moments import NamedVectors
from training.data.nodes import Globals, Nodes
from training.data.part import P, Part, Parts, kind_of, part_kinds
from training.data.placement import bring
from training.data.rows import STAGES, EncoderFiles, count_views
from training.data.tokens import grid_word
from training.hashes import hash_file

SPLITS = ("train", "val", "test")
CPU = torch.device("cpu")
INDEX = {"index/images.parquet": "index.images/1", "index/classes.parquet": "index.classes/2"}


class Fields:
    """Tensors of a batch by name. A field of a part that the method does not declare is a UserError that says so."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = dict(values)

    def __getattr__(self, name: str) -> Tensor:
        if name in self.__dict__.get("values", {}):
            found: Tensor = self.values[name]
            return found
        raise undeclared(name)

    @property
    def moments(self) -> NamedVectors:
        """By NAME, the vectors (B, d) of moments/NAME."""
        return NamedVectors.of(self.values)

    @property
    def pooled(self) -> Tensor:
        """(B, d): the moments of that name."""
        return self.moments["pooled"]

    def of(self, word: str) -> Tensor:
        """What READS calls by this word, where a field has that name: tokens/4, cls/rollout."""
        if word not in self.values:
            raise undeclared(word)
        return self.values[word]

    def grid_of(self, word: str) -> tuple[int, int]:
        """(h, w) of tokens (B, h w, d), by the word of READS that they have."""
        height, width, _ = self.of(grid_word(word)).shape
        return height, width

    @property
    def token_grid(self) -> tuple[int, int]:
        """(h, w) of `tokens` (B, h w, d)."""
        return self.grid_of("tokens")

    def has(self, name: str) -> bool:
        return name in self.values

    def changed(self, **values: Any) -> Self:
        """The same with other tensors under these names."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, values=dict(self.values))
        for name, value in values.items():
            if name in copy.__dict__:
                copy.__dict__[name] = value
            else:
                copy.values[name] = value
        return copy


def undeclared(name: str) -> Exception:
    """What to raise for a field that is not there."""
    word, _, rest = name.partition("/")
    for part, kind in part_kinds().items():
        if word in kind.shows:
            part = word if word in kind.provides else part
            part = f"{part}/{rest}" if rest else part
            return UserError(f"{name}: is of the part `{part}`, which the method's READS does not name; add it there")
    return AttributeError(name)


class Batch(Fields):
    """B images, each seen in one view. Node 0 is the whole image, nodes 1..N its local nodes, padded under `mask`.

    Beside these it has the fields of the parts that the method reads, see `shows` of each part in training/data/.
    """

    def __init__(self, y: Tensor, target: Tensor, values: Mapping[str, Tensor], also: tuple[Fields, ...] = ()) -> None:
        """y (B,) int64, positions in Cache.classes; target, what training is told of the class, as Cache.target."""
        super().__init__(values)
        self.y, self.target = y, target
        self.also = also  # of each other encoder, in the order of the run's `also`

    @property
    def g(self) -> Tensor:
        """(B, D): the global vector."""
        return self.values["g"] if "g" in self.values else self.nodes[:, 0]

    @property
    def l(self) -> Tensor:  # noqa: E743 (l for local, beside g for global)
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
    image_ids: list[str]
    groups: list[str]  # what no split and no half of val takes apart: the group that the index names, else the image_id
    split: np.ndarray  # (n,) str: train, choose, val, test; a regime has unused ones, and a fit hidden ones
    y: Tensor  # (n,) int64
    target: Tensor  # y, unless a regime tells training otherwise: (n,) int64, or (n, C) float32 whose rows sum to 1
    views: int  # V
    parts: Parts
    fingerprints: dict[str, str]  # of what was read, by file or folder
    also: tuple[Parts, ...] = ()  # what is read of other encoders
    others: "Cache | None" = None  # images of other classes, for a method that learns from them (BORROWS)
    device: torch.device = CPU  # of y, target, batches, and what of the parts fits there; positions stay on the CPU

    def part(self, kind: type[P]) -> P:
        """One part. Raises UserError where the method does not declare it."""
        return self.parts.part(kind)

    def has(self, kind: type[Part]) -> bool:
        return self.parts.has(kind)

    def with_part(self, part: Part) -> "Cache":
        """The cache with one more part, or another one in the place of one."""
        return replace(self, parts=self.parts.with_part(part))

    def change(self, kind: type[Part], **values: Any) -> "Cache":
        """The cache with other values in one part."""
        part: Any = self.part(kind)
        return self.with_part(replace(part, **values))

    def only(self, reads: Collection[str]) -> "Cache":
        """The cache as a method sees it that reads these parts, in the words of READS, and no others."""
        others = None if self.others is None else self.others.only(reads)
        return replace(self, parts=self.parts.only(reads), others=others)

    def on(self, device: torch.device) -> "Cache":
        """The cache on a device: the last step before a fit or a prediction.

        What regimes and controls draw is drawn before, on the CPU, and so the same for every device.
        """
        if device == self.device:
            return self
        return replace(
            self,
            y=self.y.to(device),
            target=self.target.to(device),
            parts=self.parts.on(device),
            also=tuple(parts.on(device) for parts in self.also),
            others=None if self.others is None else self.others.on(device),
            device=device,
        )

    def images(self, split: str) -> Tensor:
        """The positions of a split's images, in the order of their paths."""
        return torch.from_numpy(np.flatnonzero(self.split == split))

    def globals(self, images: Tensor, view: int = 0) -> Tensor:
        """(len(images), D) float32: the global vectors."""
        rows = images * self.views + view
        found = self.part(Globals).g[rows] if self.has(Globals) else self.part(Nodes).nodes[rows, 0]
        return bring(found, self.device).float()

    def batch(self, images: Tensor, views: Tensor | None = None) -> Batch:
        """These images, each in its view of `views` (default: view 0, the one that evaluation reads)."""
        rows = images * self.views + (0 if views is None else views)
        also = tuple(Fields(parts.cut(images, rows, self.device)) for parts in self.also)
        return Batch(self.y[images], self.target[images], self.parts.cut(images, rows, self.device), also)

    def take(self, images: Tensor) -> "Cache":
        """Some of the images alone (m,), with all their views and classes."""
        rows = (images[:, None] * self.views + torch.arange(self.views)).flatten()
        return replace(
            self,
            paths=[self.paths[image] for image in images.tolist()],
            image_ids=[self.image_ids[image] for image in images.tolist()],
            groups=[self.groups[image] for image in images.tolist()],
            split=self.split[images.numpy()],
            y=self.y[images],
            target=self.target[images],
            parts=self.parts.take(images, rows),
            also=tuple(parts.take(images, rows) for parts in self.also),
        )


def kinds_of(reads: Collection[str]) -> list[type[Part]]:
    """The classes of the parts that `reads` names, each once. Raises UserError for a name that is no part."""
    return list(dict.fromkeys(kind_of(name) for name in sorted(reads)))


def files_of(encoder: str, reads: Collection[str]) -> dict[str, str]:
    """What these parts are read from, the index apart: paths under data/, and the schema of each."""
    return {path: schema for kind in kinds_of(reads) for path, schema in kind.files(encoder, reads).items()}


def read_cache(
    folder: str | Path,
    encoder: str,
    buckets: int,
    reads: Collection[str],
    also: Sequence[str] = (),
    also_reads: Collection[str] = (),
) -> Cache:
    """Read the parts `reads` of what the stages wrote for an encoder into `folder` (data/), and `also_reads` of others.

    The images that the index has in val are `choose` or `val` (fieldmark/halves.py). Raises UserError, naming the file
    and the stage to run: a file missing or broken, an image without rows, a val that has no two halves, files that were
    made from different encoders, banks or texts, or another encoder whose nodes are not at the same places.
    """
    folder, reads, also_reads = Path(folder), frozenset(reads), frozenset(also_reads)
    fingerprints = check_origins(folder, encoder, buckets, reads, also, also_reads)
    classes = sorted(read_table(folder / "index/classes.parquet", "index.classes/2").column("class_id").to_pylist())
    index = read_table(
        folder / "index/images.parquet", "index.images/1", ["path", "image_id", "class_id", "group", "split", "status"]
    )
    index = index.filter(pc.equal(index["status"], "ok")).sort_by("path")
    split = np.array(index["split"].to_pylist(), dtype=str)
    for name in SPLITS:
        if not (split == name).any():
            raise UserError(
                f"{folder / 'index/images.parquet'}: holds no {name} image; correct dataset.* and run index_images"
            )
    ids = index["image_id"].to_pylist()
    groups = [own if group is None else group for own, group in zip(ids, index["group"].to_pylist(), strict=True)]
    y = pc.index_in(index["class_id"], value_set=pa.array(classes))
    if y.null_count:
        raise UserError(f"{folder / 'index/classes.parquet'}: lacks a class of images.parquet; run index_images again")
    labels = torch.from_numpy(y.to_numpy().astype(np.int64))
    split = halve(split, split == "val", groups, labels.numpy())
    if not {"choose", "val"} <= set(split):
        raise UserError(
            f"{folder / 'index/images.parquet'}: val is of one image or group, and no half of it is left to report on"
            " where the other chooses; put more into val (dataset.val_fraction) and run index_images"
        )
    image_ids = index["image_id"].combine_chunks()
    files = [files_of(encoder, reads), *(files_of(other, also_reads) for other in also)]
    views = count_views(folder, {path: schema for each in files for path, schema in each.items()}, buckets)
    source = EncoderFiles(folder, encoder, buckets, classes, image_ids, views, reads)
    parts = Parts([kind.read(source) for kind in kinds_of(reads)])
    for part in parts.by_kind.values():
        part.check(parts)
    others = [EncoderFiles(folder, other, buckets, classes, image_ids, views, also_reads) for other in also]
    for other in others:
        for kind in kinds_of(also_reads):
            kind.check_beside(source, other)
    return Cache(
        classes=classes,
        paths=index["path"].to_pylist(),
        image_ids=ids,
        groups=groups,
        split=split,
        y=labels,
        target=labels,
        views=views,
        parts=parts,
        fingerprints=fingerprints,
        also=tuple(Parts([kind.read(other) for kind in kinds_of(also_reads)]) for other in others),
    )


def check_origins(
    folder: Path,
    encoder: str,
    buckets: int,
    reads: Collection[str],
    also: Sequence[str] = (),
    also_reads: Collection[str] = (),
) -> dict[str, str]:
    """The fingerprint of everything that is read, after a look at what each says it was made from.

    Raises UserError where one was made from something else than what is read beside it: labels of a former bank, a
    graph of other embeddings, moments of another encoder than the nodes.
    """
    headers: dict[str, Header] = {}
    for name, files in [
        (encoder, INDEX | files_of(encoder, reads)),
        *((other, files_of(other, also_reads)) for other in also),
    ]:
        headers |= {path: header_of(folder, path, schema, buckets) for path, schema in files.items()}
        check_encoder(folder, name, {path: (schema, headers[path]) for path, schema in files.items()})
    for made, param, source, stage in (origin for kind in kinds_of(reads) for origin in kind.origins(encoder)):
        if source in headers and headers[made].params.get(param) != headers[source].fingerprint:
            raise UserError(
                f"{folder / made}: was not made from {folder / source} as it is now (another encoder or other"
                f" parameters); run {stage} again (dvc repro)"
            )
    return {name: header.fingerprint for name, header in sorted(headers.items())}


def header_of(folder: Path, path: str, schema: str, buckets: int) -> Header:
    """What a file, or a folder of buckets, says of itself. Raises UserError where it is missing or broken."""
    if path.endswith(".parquet"):
        return read_header(folder / path, schema)
    if not (folder / path).exists() and schema in STAGES:
        raise UserError(f"{folder / path}: is missing; run {STAGES[schema]} (dvc repro), or fetch it (dvc pull)")
    if path.endswith(".safetensors"):
        return Header(schema, hash_file(folder / path), made_by(folder / path))
    return read_folder_header(folder / path, schema, buckets)


def made_by(path: Path) -> dict[str, Any]:
    """What a safetensors file says it was made by. Raises UserError where it is broken."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("made_by", "{}"))
            return found
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: is not readable ({error}); remove it, and run the stage that writes it") from None


def check_encoder(folder: Path, encoder: str, tables: Mapping[str, tuple[str, Header]]) -> None:
    """Raise UserError where tables of one encoder's vectors of images, by their path, are not of the same weights."""
    said = {
        path: (STAGES[schema], header.params["encoder"])
        for path, (schema, header) in tables.items()
        if schema in STAGES and "encoder" in header.params
    }
    for path, (stage, mark) in said.items():
        first = next(iter(said))
        if mark != said[first][1]:
            raise UserError(
                f"{folder / path}: was made by another encoder {encoder} than {folder / first} (other weights or"
                f" parameters); run {stage} again (dvc repro)"
            )
