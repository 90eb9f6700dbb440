"""Embed every image once: the whole picture, the cells of its dense map, coarser grids of them, and crops.

Reads   data/index/images.parquet and the images it names; `encoders.NAME` and `embed` of params.yaml.
Writes  data/embed/NAME/images/bNNN.parquet (embed.nodes/1). Rows that are there already, made by the same encoder and
        parameters, are kept: an image more embeds one image and rewrites one bucket. What a run that was killed had
        finished, bucket by bucket, is kept too.
Costs   one forward pass an image and view (`crops: [3]` adds 9 a view); 2 bytes a dimension and node on disk; memory
        does not grow with the images. --dry-run embeds a few batches, writes nothing, and says what is to come.
        --find-batch-size times the forward pass at growing batches. Large JPEGs are decoded at reduced size (views.py).

Nodes of a view, in this order: `global`; `token`s, row by row, where `embed.tokens`; for each g of `embed.grids` g x g
`grid` cells, means of the tokens they cover; for each c of `embed.crops` c x c windows with a pass of their own. View 0
is the picture as it is; views 1 to `embed.views` are random crops, flipped at random, seeded by image_id. A vector has
unit length; it is 0, as its norm, for a cell in which a tower that ends with a ReLU sees nothing.

    python -m stages.embed_images --encoder reef
    python -m stages.embed_images --encoder reef --dry-run
    python -m stages.embed_images --encoder reef --device cuda:0,cuda:1
"""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from fieldmark import store
from fieldmark.command import UserError, run
from fieldmark.encoders.base import ImageEncoder, choose_device
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.passes import (
    Outputs,
    Product,
    compile_blocks,
    find_batch_size,
    list_devices,
    passes_parser,
    preview,
    run_shards,
    update,
)  # fmt: skip
from fieldmark.memory import keep_memory
from fieldmark.params import Embed, load_params
from fieldmark.pictures.boxes import Box, grid_cells
from fieldmark.pictures.views import View, read_sources

EMBED = Path("data/embed")
SCHEMA = "embed.nodes/1"


def levels_of(settings: Embed, height: int, width: int) -> list[tuple[str, int, int]]:
    """Kind, rows and columns of every grid of nodes that a map of height x width tokens gives."""
    levels = [("token", height, width)] if settings.tokens else []
    levels += [("grid", count, count) for count in settings.grids]
    for _, rows, columns in levels:
        if rows > height or columns > width:
            finer = f"{rows} x {columns} is finer than the {height} x {width} tokens of this encoder"
            raise UserError(f"params.yaml: embed.grids: {finer}; take {rows} out")
    return levels


def make_rows(settings: Embed, views: list[View], passes: list[list[Outputs]]) -> pa.Table:
    """The embed.nodes rows of views, from the pooled vector (D) and the tokens (h, w, D) of each one's passes."""
    pooled = torch.stack([torch.stack([each[0] for each in found]) for found in passes])  # (views, 1 + crops, D)
    tokens = torch.stack([found[0][1] for found in passes]).permute(0, 3, 1, 2)
    height, width = tokens.shape[2:]
    levels = levels_of(settings, height, width)
    # A mean of each view's own, in any company: a product with a matrix of shares may differ in its last bits.
    cells = [F.adaptive_avg_pool2d(tokens, (h, w)).flatten(2).transpose(1, 2) for _, h, w in levels]
    raw = torch.cat([pooled[:, :1], *cells, pooled[:, 1:]], dim=1)
    norms = raw.norm(dim=2)
    usable = torch.isfinite(norms).all(dim=1) & (norms[:, 0] > 0)
    if not bool(usable.all()):
        image_id = views[int(usable.int().argmin())].image_id
        raise UserError(f"image {image_id}: its embedding is 0 or not finite; try encoders.NAME.precision: fp32")

    kinds = ["global", *(kind for kind, rows, columns in levels for _ in range(rows * columns))]
    kinds += ["crop"] * (pooled.shape[1] - 1)
    boxes: list[Box] = []
    for view in views:
        boxes.append(view.boxes[0])
        for _, rows, columns in levels:
            boxes += grid_cells(view.boxes[0], height, width, rows, columns, flip=view.flip)
        boxes += view.boxes[1:]
    corners = np.clip(np.asarray(boxes, dtype=np.float32), 0, 1)
    count = len(kinds)
    return pa.table({
        "image_id": [view.image_id for view in views for _ in kinds],
        "view": pa.array(np.repeat([view.number for view in views], count), pa.int16()),
        "node": pa.array(np.tile(np.arange(count), len(views)), pa.int16()),
        "kind": kinds * len(views),
        **{name: pa.array(corners[:, i]) for i, name in enumerate(("x0", "y0", "x1", "y1"))},
        "flip": np.repeat([view.flip for view in views], count),
        "norm": pa.array(norms.flatten().numpy()),
        "vector": store.vector_column((raw / norms.where(norms > 0, 1)[..., None]).flatten(0, 1).numpy()),
    })


def nodes_of(encoder: ImageEncoder, settings: Embed) -> Product:
    """What this stage makes with an encoder."""
    return Product(
        folder=EMBED / encoder.name / "images",
        schema=SCHEMA,
        columns=store.arrow_schema(SCHEMA, encoder.dimension),
        made_by={
            "encoder": encoder.fingerprint, "views": settings.views, "tokens": settings.tokens,
            "grids": settings.grids, "crops": settings.crops,
        },
        embed=settings,
        encoder=encoder,
        forward=encoder.embed_images,
        rows=partial(make_rows, settings),
    )  # fmt: skip


def main() -> None:
    arguments = passes_parser(__doc__).parse_args()
    keep_memory()
    params = load_params(arguments.params)
    settings = params.image_encoder(arguments.encoder)
    sources = read_sources(params.dataset.folder)
    buckets = params.dataset.buckets
    if run_shards("stages.embed_images", EMBED / arguments.encoder / "images", buckets, arguments):
        return
    devices = list_devices(arguments.device)
    encoder = load_image_encoder(arguments.encoder, settings, choose_device(devices[0]))
    if arguments.compile:
        compile_blocks(encoder.model)
    product = nodes_of(encoder, params.embed)
    if arguments.find_batch_size:
        print(find_batch_size(product))
    elif arguments.dry_run:
        print(f"{product.folder}: {preview(product, sources, buckets, len(devices))}")
    else:
        update(product, sources, buckets, arguments.shard)


if __name__ == "__main__":
    run(main)
