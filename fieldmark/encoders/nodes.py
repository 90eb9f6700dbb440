"""The nodes of a picture, in the space of an encoder: the whole, the cells of its dense map, coarser grids, and crops.

Nodes of a view, in this order: `global`; `object`, where `embed.regions`; `token`s, row by row, where `embed.tokens`;
for each g of `embed.grids` g x g `grid` cells, means of the tokens they cover; for each c of `embed.crops` c x c `crop`
windows, then the crops of the object (fieldmark/pictures/regions.py). The object and every crop have a pass of their
own. View 0 is the picture as it is; views 1 to `embed.views` are random crops, flipped at random, seeded by image_id. A
vector has unit length; it is 0, as its norm, for a cell in which a tower that ends with a ReLU sees nothing.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.layers import check_rollout, embed_with_rollout
from fieldmark.encoders.passes import Product
from fieldmark.params import Embed
from fieldmark.pictures import regions
from fieldmark.pictures.boxes import Box, grid_cells
from fieldmark.pictures.views import Outputs, Source, View, marked_object

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
    """The embed.nodes rows of views, from the pooled vector (D) and the tokens (h, w, D) of each one's passes.

    The passes are those of the view, its windows, its object and the crops of that.
    """
    pooled = torch.stack([torch.stack([each[0] for each in found]) for found in passes])  # (views, 1 + crops, D)
    tokens = torch.stack([found[0][1] for found in passes]).permute(0, 3, 1, 2)
    height, width = tokens.shape[2:]
    levels = levels_of(settings, height, width)
    # A mean of each view's own, in any company: a product with a matrix of shares may differ in its last bits.
    cells = [F.adaptive_avg_pool2d(tokens, (h, w)).flatten(2).transpose(1, 2) for _, h, w in levels]
    # The object's pass stands behind the windows of `embed.crops`, its node behind the global one.
    place = 1 + sum(count**2 for count in settings.crops)
    first = [0] if settings.regions is None else [0, place]
    crops = [number for number in range(1, pooled.shape[1]) if number not in first]
    raw = torch.cat([pooled[:, first], *cells, pooled[:, crops]], dim=1)
    norms = raw.norm(dim=2)
    usable = torch.isfinite(norms).all(dim=1) & (norms[:, 0] > 0)
    if not bool(usable.all()):
        image_id = views[int(usable.int().argmin())].image_id
        raise UserError(f"image {image_id}: its embedding is 0 or not finite; try encoders.NAME.precision: fp32")

    kinds = ["global", "object"][: len(first)]
    kinds += [kind for kind, rows, columns in levels for _ in range(rows * columns)]
    kinds += ["crop"] * len(crops)
    boxes: list[Box] = []
    for view in views:
        boxes += [view.boxes[number] for number in first]
        for _, rows, columns in levels:
            boxes += grid_cells(view.boxes[0], height, width, rows, columns, flip=view.flip)
        boxes += [view.boxes[number] for number in crops]
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


def moved_objects(encoder: ImageEncoder, path: Path, sources: list[Source]) -> set[str]:
    """The image_ids of sources whose box, of the data, is another one than that of which a bucket holds the crops."""
    sides = ["x0", "y0", "x1", "y1"]
    table = store.read_table(path, SCHEMA, ["image_id", "view", "node", *sides])
    table = table.filter((pc.field("view") == 0) & (pc.field("node") == 1))
    boxes = np.stack([table[side].to_numpy() for side in sides], axis=1)
    held = dict(zip(table["image_id"].to_pylist(), boxes, strict=True))
    now = {source.image_id: marked_object(source, encoder) for source in sources}
    return {each for each, box in now.items() if box is not None and not np.allclose(held[each], box, atol=1e-6)}


def nodes_of(encoder: ImageEncoder, settings: Embed) -> Product:
    """What the stage embed_images makes with an encoder. Raises UserError where it has no such map as regions need."""
    forward: Callable[[Tensor], Outputs] = encoder.embed_images
    asked = settings.regions
    if asked is not None and asked.reads_rollout:
        key = "params.yaml: embed.regions.map"
        check_rollout(encoder, key)
        forward = partial(embed_with_rollout, encoder, key)
    of_regions = {} if asked is None else {"regions": {**asked.made_by, "rules": regions.RULES}}
    return Product(
        folder=EMBED / encoder.name / "images",
        schema=SCHEMA,
        columns=store.arrow_schema(SCHEMA, encoder.dimension),
        made_by={
            "encoder": encoder.fingerprint, "views": settings.views, "tokens": settings.tokens,
            "grids": settings.grids, "crops": settings.crops, **of_regions,
        },
        embed=settings,
        encoder=encoder,
        forward=forward,
        rows=partial(make_rows, settings),
        outdated=partial(moved_objects, encoder) if asked is not None and asked.object == "box" else None,
    )  # fmt: skip
