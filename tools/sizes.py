"""What an encoder's artefacts take on disk and in memory, before a picture is embedded.

Rows are drawn: random numbers, of the shapes that a pass of a blank picture gives, go through the functions by which
the stages make rows of nodes, tokens, moments, graphs and labels, and what comes out is written as their files are. So
every setting, schema and compression counts as it does later, and no formula has to be kept beside the code. Numbers
of a real encoder compress a little better than random ones, those of a tower that ends with a ReLU much better.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from fieldmark import store
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import LoadedEncoder
from fieldmark.encoders.layers import choose_layers, find_tower
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import Product, Size, size_of
from fieldmark.graphs.patches import graph_rows
from fieldmark.labels.labelling import CENTRES_PER_CLASS, Reference
from fieldmark.moments import Basis
from fieldmark.params import Labels, Params
from fieldmark.pictures.views import Outputs, View, cut_views
from stages.embed_tokens import key_of, tokens_of
from stages.label_patches import label
from stages.pool_tokens import find_asked, products_of
from stages.pool_tokens import measure as measure_widths
from training.data import Cache
from training.data.cache import Parts
from training.data.part import word_of
from training.runs import write_predictions

# Images that are drawn, and the side of a picture in pixels, of which only the boxes of its nodes depend.
IMAGES, SIDE = 24, 512
# Bytes of a node or a view in memory, beside its vectors: the mask; the four sides of a box.
MASK, BOX = 1, 16
# Of an edge the two nodes and the two weights; of a view where its edges start, and how many there are.
EDGE, EDGES = 8, 16


class Drawn(NamedTuple):
    """The rows of one artefact, of IMAGES images."""

    rows: pa.Table
    schema: str

    @property
    def size(self) -> Size:
        return size_of([self.rows], IMAGES)


@contextmanager
def one_at_a_time(encoder: ImageEncoder) -> Iterator[None]:
    """The encoder with batches of one picture: a batch is filled up, and one blank picture says enough."""
    before, encoder.batch_size = encoder.batch_size, 1
    try:
        yield
    finally:
        encoder.batch_size = before


def draw_rows(product: Product) -> pa.Table:
    """The rows of IMAGES images whose views are cut as ever, and whose outputs are drawn."""
    encoder, generator = product.encoder, torch.Generator().manual_seed(0)
    blank = encoder.preprocess(Image.new("RGB", (8, 8)))[None].to(encoder.device)
    with one_at_a_time(encoder), torch.inference_mode():
        shapes = [(each.shape[1:], each.dtype) for each in product.forward(encoder.normalise(blank))]
    picture = Image.new("RGB", (SIDE, SIDE))

    def draw(count: int) -> list[Outputs]:
        return [tuple(torch.randn(shape, generator=generator).to(kind) for shape, kind in shapes) for _ in range(count)]

    views: list[View] = []
    passes: list[list[Outputs]] = []
    for image_id in sorted(store.sha256(str(number)) for number in range(IMAGES)):
        for view in cut_views(image_id, lambda side: (picture, picture.size), encoder, product.embed):
            found = draw(len(view.pixels))
            while view.further is not None:
                view = view.further(found)
                found += draw(len(view.pixels))
            views.append(view)
            passes.append(found)
    return product.rows(views, passes).cast(product.columns)


def tokens_product(encoder: ImageEncoder, params: Params) -> Product | None:
    """What embed_tokens makes with an encoder, where `tokens` names it."""
    if encoder.name not in params.tokens:
        return None
    asked = params.tokens[encoder.name]
    choice = choose_layers(find_tower(encoder.model), asked.layers, asked.rollout, key_of(encoder))
    return tokens_of(encoder, choice, params.embed)


def moments_products(encoder: ImageEncoder, params: Params) -> list[Product]:
    """What pool_tokens makes with an encoder, along directions that are fitted on nothing."""
    if encoder.name not in params.moments:
        return []
    asked = find_asked(encoder, params.moments[encoder.name])
    with one_at_a_time(encoder):
        widths = measure_widths(encoder, asked)
    bases = {
        each.name: Basis(*(part.to(encoder.device) for part in Basis.stand_in(widths[each.layer], each.directions)))
        for each in asked
        if each.directions is not None
    }
    return products_of(encoder, asked, asked, bases, widths, params.embed.uncut)


def draw_artefacts(encoder: ImageEncoder, params: Params, classes: int) -> dict[str, Drawn]:
    """The rows of all that the stages make with an encoder, by its folder under data/."""
    name = encoder.name
    found = {f"embed/{name}/images": Drawn(draw_rows(nodes_of(encoder, params.embed)), "embed.nodes/1")}
    tokens = tokens_product(encoder, params)
    if tokens is not None:
        found[f"embed/{name}/tokens"] = Drawn(draw_rows(tokens), tokens.schema)
    for product in moments_products(encoder, params):
        found[f"embed/{name}/moments/{product.folder.name}"] = Drawn(draw_rows(product), product.schema)
    nodes = found[f"embed/{name}/images"].rows
    found[f"graphs/{name}"] = Drawn(link(nodes, params), "graphs/1")
    if isinstance(encoder, LoadedEncoder):
        found[f"labels/{name}"] = Drawn(label_drawn(nodes, params, classes, encoder), "labels/1")
    return found


def link(nodes: pa.Table, params: Params) -> pa.Table:
    """graphs/1 of nodes."""
    return graph_rows(nodes.combine_chunks(), params.graphs).cast(store.arrow_schema("graphs/1"))


def count_concepts(encoder: str, params: Params, classes: int) -> int:
    """The concepts that the bank keeps; before there is one, as many as `select` may keep."""
    bank = Path("data/bank") / f"{encoder}.parquet"
    if not bank.is_file():
        return classes * params.select.per_class
    return int(pc.sum(store.read_table(bank, "bank/1", ["kept"])["kept"]).as_py() or 0)


def label_drawn(nodes: pa.Table, params: Params, classes: int, encoder: LoadedEncoder) -> pa.Table:
    """labels/1 of nodes, with drawn concepts, and means and centres as `labels` asks for them.

    Density of pixels needs pictures; another one takes as many bytes.
    """
    settings = params.labels.model_copy(update={"inside_object": False})
    if settings.density == "pixel":
        settings = settings.model_copy(update={"density": "neg_entropy"})
    count = count_concepts(encoder.name, params, classes)
    concepts, reference = draw_unit(count, dimension_of(nodes)), draw_reference(nodes, settings, classes)
    table = label(nodes, concepts, np.arange(count), encoder.logit_scale, settings, reference)
    return table.cast(store.arrow_schema("labels/1"))


def draw_reference(nodes: pa.Table, settings: Labels, classes: int) -> Reference:
    """What labels would know of training images."""
    width = dimension_of(nodes)
    means = torch.zeros(2, width) if settings.mode == "splice" else None
    centres = draw_unit(CENTRES_PER_CLASS * classes, width) if settings.density in ("gaga", "product") else None
    return Reference(means, centres)


def draw_unit(count: int, width: int) -> Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return drawn / drawn.norm(dim=1, keepdim=True)


def dimension_of(nodes: pa.Table) -> int:
    return int(nodes.schema.field("vector").type.list_size)


def size_of_predictions(classes: int, seeds: int) -> float:
    """Bytes an image in predictions.parquet of a run, whose seeds all differ."""
    with TemporaryDirectory() as folder:
        path, written = Path(folder) / "predictions.parquet", []
        for images in (IMAGES, 2 * IMAGES):
            random = np.random.default_rng(0)
            logits = [(seed, random.standard_normal((images, classes))) for seed in range(seeds)]
            write_predictions(path, logits, stand_in_cache(images, classes), "0" * 64)
            written.append(path.stat().st_size)
    return (written[1] - written[0]) / IMAGES


def stand_in_cache(images: int, classes: int) -> Cache:
    """A cache of images that are nowhere, without parts."""
    names = [f"class-{number:05d}" for number in range(classes)]
    y = torch.arange(images) % classes
    ids = [store.sha256(str(number)) for number in range(images)]
    return Cache(
        classes=names, paths=[f"train/{names[k]}/{ids[i][:12]}.jpg" for i, k in enumerate(y.tolist())], image_ids=ids,
        groups=ids, split=np.full(images, "train"), y=y, target=y, views=1, parts=Parts([]), fingerprints={},
    )  # fmt: skip


def memory_of(word: str, encoder: str, drawn: dict[str, Drawn]) -> float:
    """Bytes an image, all views, of the arrays that a run reads for a word of READS; 0 for what is of classes."""
    nodes = drawn[f"embed/{encoder}/images"].rows
    count = len(nodes) / IMAGES
    vector = 2 * dimension_of(nodes)
    views = pc.sum(pc.equal(nodes["node"], 0)).as_py() / IMAGES
    kind, rest = word_of(word), word.partition("/")[2]
    if kind == "nodes":
        return count * (vector + MASK)
    if kind == "globals":
        return views * vector
    if kind == "boxes":
        return count * BOX
    if kind in ("moments", "pooled"):
        table = drawn.get(f"embed/{encoder}/moments/{rest or 'pooled'}")
        return 0.0 if table is None else 2 * dimension_of(table.rows) * views
    if kind in ("tokens", "cls", "rollout") and f"embed/{encoder}/tokens" in drawn:
        return numbers_of_layer(drawn[f"embed/{encoder}/tokens"].rows, "vectors" if kind == "tokens" else kind, rest)
    if kind == "edges":
        edges = pc.sum(pc.list_value_length(drawn[f"graphs/{encoder}"].rows["src"])).as_py()
        return EDGE * edges / IMAGES + EDGES * views
    if kind == "labels" and f"labels/{encoder}" in drawn:
        rows = drawn[f"labels/{encoder}"].rows
        lists = ("concept_idx", "concept_weight", "ring_gains", "selected_concepts")
        return sum(flat_bytes(rows, name) for name in lists) / IMAGES + count * (4 + MASK)
    return 0.0


def numbers_of_layer(rows: pa.Table, column: str, layer: str) -> float:
    """Bytes an image of a column of tokens: of one layer, or of the deepest that has the column."""
    held = rows.filter(pc.is_valid(rows[column]))
    number: Any = int(layer) if layer.isdigit() else pc.max(held["layer"])
    return flat_bytes(held.filter(pc.equal(held["layer"], number)), column) / IMAGES


def flat_bytes(rows: pa.Table, column: str) -> int:
    """Bytes of the numbers in a column of lists."""
    return int(pc.list_flatten(rows[column]).combine_chunks().nbytes)
