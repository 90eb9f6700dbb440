"""What a run reads of new pictures, made as the stages make it, without a file of the pipeline being written.

The stages' own functions decode a picture, cut view 0 of it, run the encoder, and make rows: nodes (embed_images),
moments (pool_tokens), tokens (embed_tokens), labels (label_patches) and graphs (build_graphs), those alone that the run
reads. A chunk of pictures goes into a temporary folder, laid out as data/ is, and the trainer's own parts read it.

A run is asked on features that are those it was trained on, or not at all: what made a table is in its fingerprint, and
the run's config.json has the fingerprint of every table that it read. So another encoder, other weights, another
picture size, other nodes, bank, labels or graphs are errors.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.layers import choose_layers, find_tower
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import Clock, CpuSlots, ForwardPass, Product, forward_views
from fieldmark.graphs.patches import SCHEMA as GRAPHS
from fieldmark.graphs.patches import graph_rows
from fieldmark.moments import Basis
from fieldmark.params import Embed, Graphs, Params
from fieldmark.pictures.decode import bad_image, open_part, processors
from fieldmark.pictures.transforms import UNCHANGED, Transform, transformed
from fieldmark.pictures.views import Outputs, Source, View, cut_views, open_indexed
from stages import embed_tokens, label_patches, pool_tokens
from stages.label_patches import Labelling
from tools.prediction.pictures import Looked, Question, Views, thumbnail
from training.data import Cache, Part, Parts, kind_of
from training.data.arrays import Arrays, Make, make_room
from training.data.cell_descriptions import CellDescriptions
from training.data.descriptions import Descriptions
from training.data.moments import names_in
from training.data.nodes import Globals
from training.data.rows import EncoderFiles

DATA = Path("data")
NODES, LABELS = "embed.nodes/1", "labels/1"
# What can be made of a new picture, by the schema of the table that holds it.
MADE = {NODES, LABELS, GRAPHS, pool_tokens.SCHEMA, embed_tokens.SCHEMA}
BOXED = pa.schema([("image_id", store.TEXT), ("box", store.items(store.FLOAT))])


class Family(NamedTuple):
    """Products that share one forward function, and how many outputs it has."""

    products: list[Product]
    outputs: int


@dataclass(frozen=True)
class Shown(ForwardPass):
    """One way in which pictures are shown to an encoder, and all that is made of it."""

    products: list[Product]


@dataclass(frozen=True)
class Recipe:
    """How the parts of the cache that a run reads of one encoder are made of new pictures."""

    encoder: ImageEncoder
    reads: frozenset[str]  # in the words of READS
    passes: list[Shown]
    labelling: Labelling | None
    graphs: Graphs | None
    common: list[Part]  # what is the same for all pictures, to say why a run decides as it does


class Fresh(EncoderFiles):
    """Files that are read once: no array of them is kept."""

    def keep(self, what: str, sources: Collection[Path], make: Make) -> Arrays:
        return make(partial(make_room, self.folder))


def tables_of(encoder: str, reads: Collection[str]) -> dict[str, str]:
    """What has to be made of a picture for these words: paths under data/ and their schemas.

    Bank, projection and the like are the same for all pictures, and in the run's model. Raises UserError for a part
    that cannot be made of a picture.
    """
    found: dict[str, str] = {}
    for word in sorted(reads):
        kind = kind_of(word)
        if not kind.shows or kind.supervises or kind in (Descriptions, CellDescriptions):
            continue
        files = kind.files(encoder, [word])
        if not set(files.values()) <= MADE:
            raise UserError(f"{word}: is read by this run, and cannot be made of a new picture; ask another run")
        found |= files
    return found


def reads_whole(encoder: str, reads: Collection[str]) -> bool:
    """Whether of all nodes the global one is enough."""
    of_nodes = {kind_of(word) for word in reads if NODES in kind_of(word).files(encoder, [word]).values()}
    return of_nodes <= {Globals} and not {LABELS, GRAPHS} & set(tables_of(encoder, reads).values())


def families_of(encoder: ImageEncoder, params: Params, embed: Embed, reads: frozenset[str]) -> list[Family]:
    """What the stages make with an encoder, of which these words are read."""
    schemas = set(tables_of(encoder.name, reads).values())
    found = []
    if schemas & {NODES, LABELS, GRAPHS}:
        rollout = embed.regions is not None and embed.regions.reads_rollout
        found.append(Family([nodes_of(encoder, embed)], 3 if rollout else 2))
    if pool_tokens.SCHEMA in schemas:
        products = moments_of(encoder, params, embed.uncut, names_in(reads))
        found.append(Family(products, len(products)))
    if embed_tokens.SCHEMA in schemas:
        key, asked = embed_tokens.key_of(encoder), params.tokens.get(encoder.name)
        if asked is None:
            raise UserError(f"{key}: is not there, and this run reads tokens of {encoder.name}; add it")
        choice = choose_layers(find_tower(encoder.model), asked.layers, asked.rollout, key)
        found.append(Family([embed_tokens.tokens_of(encoder, choice, embed.uncut)], 2 * len(choice.layers) + 1))
    return found


def moments_of(encoder: ImageEncoder, params: Params, embed: Embed, names: Sequence[str]) -> list[Product]:
    """What pool_tokens makes under these NAMEs, along the bases that it has kept."""
    chosen = params.moments.get(encoder.name, {})
    for name in names:
        if name not in chosen:
            raise UserError(f"{pool_tokens.key_of(encoder)}.{name}: is not there, and this run reads it; add it")
    asked = pool_tokens.find_asked(encoder, {name: chosen[name] for name in names})
    bases = {}
    for each in asked:
        if each.directions is not None:
            basis = pool_tokens.read_basis(encoder, each)
            if basis is None:
                path = each.folder / pool_tokens.BASIS
                raise UserError(f"{path}: is missing, or of another encoder; run pool_tokens (dvc repro), or dvc pull")
            bases[each.name] = Basis(*(tensor.to(encoder.device) for tensor in basis))
    return pool_tokens.products_of(encoder, asked, asked, bases, pool_tokens.measure(encoder, asked), embed)


def recipe_of(
    params: Params,
    name: str,
    reads: frozenset[str],
    known: Mapping[str, str],
    classes: list[str],
    device: torch.device,
) -> Recipe:
    """How what is read of an encoder is made; the encoder is loaded.

    `known` are the fingerprints of what the run was trained on, by path under data/. Raises UserError where another
    table would be made now, where something that is needed is not here, or where the encoder cannot be loaded.
    """
    schemas = set(tables_of(name, reads).values())
    encoder = load_image_encoder(name, params.image_encoder(name), device, params.towers)
    families = families_of(encoder, params, params.embed, reads)
    made = {
        product.folder.relative_to(DATA).as_posix(): (product.schema, product.fingerprint)
        for family in families
        for product in family.products
    }
    labelling = label_patches.read_labelling(name, params) if LABELS in schemas else None
    if labelling is not None:
        made[f"labels/{name}"] = LABELS, store.fingerprint(LABELS, labelling.made_by)
    if GRAPHS in schemas:
        made_by = {**params.graphs.model_dump(), "embed": made[f"embed/{name}/images"][1]}
        made[f"graphs/{name}"] = GRAPHS, store.fingerprint(GRAPHS, made_by)
    for path, (schema, mark) in made.items():
        there = known.get(path) or store.read_folder_header(DATA / path, schema, params.dataset.buckets).fingerprint
        if mark != there:
            raise UserError(
                f"{DATA / path}: the run was trained on another one than {name} and params.yaml make of a picture now"
                " (other weights or parameters); bring these back, or make all of it anew (dvc repro)"
            )
    embed = params.embed.model_copy(update={"views": 0})
    if reads_whole(name, reads):
        embed = embed.uncut.model_copy(update={"tokens": False, "grids": []})
    graphs = params.graphs if GRAPHS in schemas else None
    passes = join(families_of(encoder, params, embed, reads))
    return Recipe(encoder, reads, passes, labelling, graphs, common_parts(params, name, reads, classes))


def common_parts(params: Params, name: str, reads: frozenset[str], classes: list[str]) -> list[Part]:
    """Bank and projection, where they are read and are on this machine; the model itself has what it needs."""
    source = EncoderFiles(DATA, name, params.dataset.buckets, classes, pa.array([], store.TEXT), 1, reads)
    kinds = dict.fromkeys(kind_of(word) for word in sorted(reads) if not kind_of(word).shows)
    return [kind.read(source) for kind in kinds if all((DATA / path).exists() for path in kind.files(name, reads))]


def join(families: Iterable[Family]) -> list[Shown]:
    """What is made of an encoder, those together for which a picture is cut alike: it is decoded once for them."""
    by_cuts: dict[str, list[Family]] = {}
    for family in families:
        embed = family.products[0].embed
        by_cuts.setdefault(repr((embed.crops, embed.regions)), []).append(family)
    shown = []
    for group in by_cuts.values():
        products, start = [], 0
        for family in group:
            own = slice(start, start := start + family.outputs)
            products += [replace(each, rows=partial(rows_from, each.rows, own)) for each in family.products]
        first = products[0]
        forward = partial(run_all, [family.products[0].forward for family in group])
        shown.append(Shown(first.embed, first.encoder, forward, products))
    return shown


def run_all(forwards: Sequence[Callable[[Tensor], Outputs]], pixels: Tensor) -> Outputs:
    """The outputs of several forward functions, one behind another."""
    return tuple(output for forward in forwards for output in forward(pixels))


def rows_from(
    rows: Callable[[list[View], list[list[Outputs]]], pa.Table],
    own: slice,
    views: list[View],
    passes: list[list[Outputs]],
) -> pa.Table:
    """Product.rows of those outputs of each pass that are a product's own."""
    return rows(views, [[outputs[own] for outputs in found] for found in passes])


class Features:
    """Makes what a run reads of new pictures. Its encoders are loaded at once."""

    def __init__(
        self,
        params: Params,
        reads: Mapping[str, frozenset[str]],
        known: Mapping[str, str],
        classes: list[str],
        device: torch.device,
    ) -> None:
        """`reads` is what is read of each encoder, the run's own first; `known` as in recipe_of."""
        self.classes = classes
        self.slots = CpuSlots(device, processors())
        self.recipes = [recipe_of(params, name, words, known, classes, device) for name, words in reads.items()]

    @property
    def passes(self) -> list[Shown]:
        return [shown for recipe in self.recipes for shown in recipe.passes]

    def prepare(self, file: IO[bytes], source: Source, transform: Transform = UNCHANGED) -> Views:
        """View 0 of a picture, or of what a transform makes of it, for each pass of each encoder.

        `file` is that of the source, opened. Raises BadImage with the reason.
        """

        def open_at(side: float) -> tuple[Image.Image, tuple[int, int]]:
            # What a view shows further is cut when the file was closed again.
            image, size = reopen(source, side * transform.zoom) if file.closed else decode(side * transform.zoom)
            if transform == UNCHANGED:
                return image, size
            image = transformed(image, transform, source.image_id)
            return image, image.size

        def decode(side: float) -> tuple[Image.Image, tuple[int, int]]:
            file.seek(0)
            return open_part(file, source.part, side)

        # Some files of /proc state no size, and a read from them waits.
        if os.fstat(file.fileno()).st_size == 0:
            raise bad_image(UnidentifiedImageError())
        with self.slots.one():
            return tuple(
                cut_views(source.image_id, open_at, shown.encoder, shown.embed, source.box) for shown in self.passes
            )

    def make(self, looked: Sequence[Looked], question: Question) -> Cache:
        """What the run sees of new pictures, in order, as a cache whose labels mean nothing."""
        by_id = {each.image_id: each for each in looked}
        place = {image_id: number for number, image_id in enumerate(by_id)}
        # Their views lie in the order of the passes.
        passes, parts = iter(zip(*(each.views for each in by_id.values()), strict=True)), []
        for recipe in self.recipes:
            with TemporaryDirectory(prefix="fieldmark-") as name:
                for shown, of_pass in zip(recipe.passes, passes, strict=False):
                    self.write_passed(shown, [view for views in of_pass for view in views], Path(name))
                parts.append(self.read_parts(recipe, by_id, question, Path(name)))
        y = torch.zeros(len(by_id), dtype=torch.long)
        cache = Cache(
            classes=self.classes,
            paths=[each.picture.path for each in by_id.values()],
            image_ids=list(by_id),
            groups=list(by_id),
            split=np.full(len(by_id), "new"),
            y=y,
            target=y,
            views=1,
            parts=parts[0],
            fingerprints={},
            also=tuple(parts[1:]),
        )
        return cache.take(torch.tensor([place[each.image_id] for each in looked]))

    def write_passed(self, shown: Shown, views: list[View], folder: Path) -> None:
        """Run views and write what is made of them, one bucket a table."""
        passed = list(forward_views(views, shown, self.slots, Clock()))
        for product in shown.products:
            rows = pa.concat_tables([product.rows(*each) for each in passed])
            write(rows, folder / product.folder.relative_to(DATA), product.schema)

    def read_parts(
        self, recipe: Recipe, looked: Mapping[str, Looked], question: Question, folder: Path
    ) -> Parts:
        """The parts of one encoder, after labels and graphs were made of the nodes in `folder`."""
        name = recipe.encoder.name
        if recipe.labelling is not None or recipe.graphs is not None:
            nodes = store.read_table(store.bucket_path(folder / f"embed/{name}/images", 0), NODES)
            if recipe.labelling is not None:
                write(label(recipe.labelling, nodes, looked.values(), question), folder / f"labels/{name}", LABELS)
            if recipe.graphs is not None:
                write(graph_rows(nodes.combine_chunks(), recipe.graphs), folder / f"graphs/{name}", GRAPHS)
        source = Fresh(folder, name, 1, self.classes, pa.array(list(looked)), 1, recipe.reads)
        kinds = dict.fromkeys(kind_of(word) for word in sorted(recipe.reads))
        silent = no_sentences(len(looked), recipe.encoder)
        made: list[Part] = [
            silent[kind] if kind in silent else kind.read(source)
            for kind in kinds
            if kind.shows and not kind.supervises
        ]
        return Parts([*made, *recipe.common])


def reopen(source: Source, side: float) -> tuple[Image.Image, tuple[int, int]]:
    """A picture that was open before, decoded anew. Raises UserError where it is another one by now."""
    try:
        return open_indexed(source, side)
    except UserError:
        raise UserError(f"{source.path}: has changed while it was asked about; ask again") from None


def write(rows: pa.Table, folder: Path, schema: str) -> None:
    """A table as the only bucket of a folder; nobody asks what made it."""
    store.write_table(rows, store.bucket_path(folder, 0), schema, {}, "new")


def label(labelling: Labelling, nodes: pa.Table, looked: Iterable[Looked], question: Question) -> pa.Table:
    """The labels of new pictures' nodes, with boxes that a manifest names and thumbnails of index_images."""
    thumbs = None
    if labelling.boxes is not None:
        boxes = [{"image_id": each.image_id, "box": each.picture.box} for each in looked]
        labelling = labelling._replace(boxes=pa.Table.from_pylist(boxes, BOXED))
    if labelling.settings.density == "pixel":
        webp = [{"image_id": each.image_id, "webp": thumbnail(question, each.picture)} for each in looked]
        thumbs = store.make_table("thumbs/1", webp)
    return labelling.label(nodes, thumbs)


def no_sentences(images: int, encoder: ImageEncoder) -> dict[type[Part], Part]:
    """What a run that reads descriptions sees of pictures that have none: no model is asked."""
    vectors = torch.zeros(images, 0, encoder.dimension, dtype=torch.float16)
    mask = torch.zeros(images, 0, dtype=torch.bool)
    return {Descriptions: Descriptions(vectors, mask), CellDescriptions: CellDescriptions(vectors, mask)}
