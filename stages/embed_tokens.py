"""Store what chosen layers of an encoder hold of every image: all cells of the map, CLS and attention rollout.

Reads   data/index/images.parquet and the images it names; `tokens.NAME`, `encoders.NAME` or `towers.NAME`, and
        `embed.views` of params.yaml.
Writes  data/embed/NAME/tokens/bNNN.parquet (embed.tokens/1). Rows that are there already, made by the same encoder and
        layers, are kept, bucket by bucket, as embed_images keeps its own.
Costs   one forward pass an image and view, up to the last layer asked for; 2 bytes a number on disk, which is much:
        0.3 MB an image, view and layer for a ViT of 14 x 14 cells and 768 numbers. It says how much, and stops before
        the first image where the disk has less. --dry-run tells time and bytes, and writes nothing.

For methods that train a block or a pooling of their own over raw tokens; all others read nodes (embed_images). Views
are those of `embed.views`, without crops. A row is one layer of one view. `vectors` holds grid_h x grid_w cells, row
by row, of `width` numbers each, as they left the layer (layers.py): not projected, not of unit length. The layer
`head`, one past the last, holds what the projection takes of each cell. `cls` is null where the tower has no CLS token.
`rollout`, heads x cells, is in the row of the last layer but one, where `rollout: true` asks for it, and null
elsewhere.

    python -m stages.embed_tokens --encoder vit-b-16 --dry-run
    python -m stages.embed_tokens --encoder vit-b-16
    python -m stages.embed_tokens --encoder vit-b-16 --engine ray
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from fieldmark import cluster, store
from fieldmark.command import UserError, run
from fieldmark.devices import choose_device
from fieldmark.encoders.base import ImageEncoder, make_batch
from fieldmark.encoders.layers import RULES, LayerChoice, choose_layers, find_tower, hidden_states
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.passes import (
    Outputs,
    Product,
    Work,
    count_workers,
    find_batch_size,
    find_work,
    free_space,
    list_devices,
    passes_parser,
    preview,
    refuse_compile,
    run_shards,
    update,
)
from fieldmark.memory import keep_memory
from fieldmark.params import Embed, Params, load_params
from fieldmark.pictures.views import BucketSources, View, read_sources

EMBED = Path("data/embed")
SCHEMA = "embed.tokens/1"


@torch.inference_mode()
def forward(encoder: ImageEncoder, choice: LayerChoice, pixels: Tensor) -> tuple[Tensor, ...]:
    """Normalised pixels (n, 3, H, W) to the cells of each layer, CLS of each, and rollout: float16, on the device.

    n is at most batch_size.
    """
    hidden = hidden_states(encoder.model, make_batch(encoder, pixels), choice, key_of(encoder), encoder.dense)
    return tuple(each[: len(pixels)].half() for each in (*hidden.cells, *hidden.cls, hidden.rollout))


def key_of(encoder: ImageEncoder) -> str:
    return f"params.yaml: tokens.{encoder.name}"


def make_rows(name: str, choice: LayerChoice, views: list[View], passes: list[list[Outputs]]) -> pa.Table:
    """The embed.tokens rows of views, one a layer, from what `forward` gave for each."""
    return pa.concat_tables(view_rows(name, choice, *each) for each in zip(views, passes, strict=True))


def view_rows(name: str, choice: LayerChoice, view: View, passes: list[Outputs]) -> pa.Table:
    """The rows of one view."""
    outputs, count = passes[0], len(choice.layers)
    cells, cls, rollout = outputs[:count], outputs[count:-1], outputs[-1]
    for layer, *parts in zip(choice.layers, cells, cls, strict=True):
        if not all(part.isfinite().all() for part in parts):
            problem = f"layer {layer} of {name} has numbers that float16 cannot hold, or that are none"
            remedy = f"try precision: fp32, or take the layer out of tokens.{name}.layers"
            raise UserError(f"image {view.image_id}: {problem}; {remedy}")
    height, width, length = zip(*(each.shape for each in cells), strict=True)
    return pa.table({
        "image_id": pa.array([view.image_id] * count),
        "view": pa.array([view.number] * count, pa.int16()),
        "layer": pa.array(choice.layers, pa.int16()),
        "grid_h": pa.array(height, pa.int16()),
        "grid_w": pa.array(width, pa.int16()),
        "width": pa.array(length, pa.int32()),
        "vectors": list_column(cells),
        "cls": list_column(cls),
        "rollout": list_column([rollout if layer == choice.rollout else rollout[:0] for layer in choice.layers]),
    })


def list_column(tensors: Sequence[Tensor]) -> pa.Array:
    """A list of numbers a tensor, null for one that has none."""
    return pa.array([each.numpy().reshape(-1) if each.numel() else None for each in tensors], store.items(store.HALF))


def tokens_of(encoder: ImageEncoder, choice: LayerChoice, embed: Embed) -> Product:
    """What this stage makes with an encoder."""
    return Product(
        folder=EMBED / encoder.name / "tokens",
        schema=SCHEMA,
        columns=store.arrow_schema(SCHEMA),
        made_by={
            "encoder": encoder.fingerprint, "views": embed.views, "layers": choice.layers,
            "rollout": choice.rollout is not None, "rules": RULES,
        },
        embed=embed.uncut,
        encoder=encoder,
        forward=partial(forward, encoder, choice),
        rows=partial(make_rows, encoder.name, choice),
    )  # fmt: skip


def bytes_an_image(product: Product) -> int:
    """What the numbers of one image take before they are compressed, from a pass of a blank picture."""
    encoder = product.encoder
    blank = encoder.preprocess(Image.new("RGB", (8, 8)))[None].to(encoder.device)
    outputs = product.forward(encoder.normalise(blank))
    return 2 * sum(output[0].numel() for output in outputs) * (product.embed.views + 1)


def space_needed(work: Work, bytes_each: int) -> int:
    """The most bytes that a run takes beyond those taken now: a bucket is written beside its former self."""
    taken = most = 0
    for path, kept in work.todo:
        taken += bytes_each * (len(kept.present) + len(kept.missing))
        most = max(most, taken)
        taken -= path.stat().st_size if path.exists() else 0
    return most


def open_product(arguments: Namespace, params: Params) -> Product:
    """What this stage makes; its encoder is loaded on the first device that is named."""
    name = arguments.encoder
    device = choose_device(list_devices(arguments.device)[0])
    encoder = load_image_encoder(name, params.image_encoder(name), device, params.towers)
    asked = params.tokens[name]
    choice = choose_layers(find_tower(encoder.model), asked.layers, asked.rollout, key_of(encoder))
    return tokens_of(encoder, choice, params.embed)


def check_space(product: Product, needed: int) -> None:
    """Raises UserError where the disk of the product's folder has less than these bytes."""
    free = free_space(product.folder)
    if needed > free:
        problem = f"up to {needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB are free"
        remedy = f"free some, or take layers out of tokens.{product.encoder.name}.layers"
        raise UserError(f"{product.folder}: {problem}; {remedy}")


def open_buckets(arguments: Namespace, params: Params) -> Callable[[int], cluster.Bucket]:
    """What a worker of a cluster does with a bucket. Space is looked at bucket by bucket: disks may differ."""
    keep_memory()
    product, buckets = open_product(arguments, params), params.dataset.buckets
    images, each = BucketSources(params.dataset.folder, buckets), bytes_an_image(product)

    def bring(bucket: int) -> cluster.Bucket:
        sources, shard = images[bucket], (bucket, buckets)
        check_space(product, space_needed(find_work(product, sources, buckets, shard), each))
        return cluster.Bucket(update([product], sources, buckets, shard), len(sources))

    return bring


def main() -> None:
    arguments = cluster.add_bucket_engine(passes_parser(__doc__)).parse_args()
    refuse_compile(arguments)
    keep_memory()
    params = load_params(arguments.params)
    name, buckets = arguments.encoder, params.dataset.buckets
    params.image_encoder(name)
    if name not in params.tokens:
        remedy = f"add it, as in `tokens: {{{name}: {{layers: [-2]}}}}`"
        raise UserError(f"params.yaml: tokens.{name}: is not there, so that no layer is asked for; {remedy}")
    folder = EMBED / name / "tokens"
    if cluster.on_cluster(arguments):
        cluster.run_buckets(cluster.Job("stages.embed_tokens", "open_buckets", arguments, params), [folder])
        return
    sources = read_sources(params.dataset.folder)
    if run_shards("stages.embed_tokens", [folder], buckets, arguments):
        return
    product = open_product(arguments, params)
    if arguments.find_batch_size:
        print(find_batch_size(product))
        return
    # Of all buckets, since each process writes to the same disk.
    work, each = find_work(product, sources, buckets), bytes_an_image(product)
    size = f"at most {len(work.missing) * each / 1e6:.2f} MB to write, {each / 1e6:.2f} MB an image"
    layers, free = ", ".join(map(str, product.made_by["layers"])), free_space(folder)
    print(f"{folder}: layers {layers}; {size}; {free / 1e6:.0f} MB are free", flush=True)
    if arguments.dry_run:
        print(preview([product], sources, buckets, count_workers(arguments)))
        return
    check_space(product, space_needed(work, each))
    update([product], sources, buckets, arguments.shard)


if __name__ == "__main__":
    run(main)
