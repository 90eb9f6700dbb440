"""Embed every image once: the whole picture, the cells of its dense map, coarser grids of them, and crops.

Reads   data/index/images.parquet and the images it names; `encoders.NAME` and `embed` of params.yaml.
Writes  data/embed/NAME/images/bNNN.parquet (embed.nodes/1). Rows that are there already, made by the same encoder and
        parameters, are kept: an image more embeds one image and rewrites one bucket. What a run that was killed had
        finished, bucket by bucket, is kept too.
Costs   one forward pass an image and view (`crops: [3]` adds 9 a view); 2 bytes a dimension and node on disk; memory
        does not grow with the images. --dry-run embeds a few batches, writes nothing, and says what is to come.

Nodes of a view, in this order: `global`; `token`s, row by row, where `embed.tokens`; for each g of `embed.grids` g x g
`grid` cells, means of the tokens they cover; for each c of `embed.crops` c x c windows with a pass of their own. View 0
is the picture as it is; views 1 to `embed.views` are random crops, flipped at random, seeded by image_id. A vector has
unit length; it is 0, as its norm, for a cell in which a tower that ends with a ReLU sees nothing.

    python -m stages.embed_images --encoder reef
    python -m stages.embed_images --encoder reef --dry-run
"""

import hashlib
import heapq
import io
import math
import os
import random
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stages import store
from stages.clip import Box, LoadedEncoder, choose_device, load_encoder, visible_box
from stages.command import UserError, encoder_parser, run
from stages.images import BadImage, map_ahead, open_rgb
from stages.params import Embed, load_params

EMBED = Path("data/embed")
SCHEMA = "embed.nodes/1"
Region = tuple[int, int, int, int]
# A view's crop covers this share of the picture's largest square.
VIEW_AREA = (0.5, 1.0)
# Batches that --dry-run embeds to tell the rate.
SAMPLE_BATCHES = 4


class Source(NamedTuple):
    image_id: str
    path: Path


class Work(NamedTuple):
    """What is to do in a folder: the buckets that change, and which of their images are there and which missing."""

    made_by: dict[str, Any]
    mark: str
    todo: list[tuple[Path, store.Kept]]
    missing: list[Source]


class View(NamedTuple):
    """One view ready for the encoder: pixels (1 + crops, 3, H, W), the box of each pass, and whether it is flipped."""

    image_id: str
    number: int
    pixels: Tensor
    boxes: list[Box]
    flip: bool


def read_sources(folder: Path) -> list[Source]:
    """The usable images of the index."""
    table = store.read_table("data/index/images.parquet", "index.images/1", ["image_id", "path", "status"])
    return [Source(row["image_id"], folder / row["path"]) for row in table.to_pylist() if row["status"] == "ok"]


def view_region(image_id: str, number: int, width: int, height: int) -> tuple[Region, bool]:
    """The pixel box (left, top, right, bottom) of a view and its flip: all for view 0, else drawn by image_id."""
    if number == 0:
        return (0, 0, width, height), False
    chance = random.Random(f"{image_id}:{number}")
    side = max(1, round(min(width, height) * math.sqrt(chance.uniform(*VIEW_AREA))))
    left, top = chance.randint(0, width - side), chance.randint(0, height - side)
    return (left, top, left + side, top + side), chance.random() < 0.5


def cut_windows(box: Box, count: int) -> list[Box]:
    """count x count equal windows of a box, row by row."""
    x0, y0, x1, y1 = box
    xs, ys = np.linspace(x0, x1, count + 1), np.linspace(y0, y1, count + 1)
    return [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(count) for i in range(count)]


def open_indexed(source: Source) -> Image.Image:
    """Decode an image that the index calls usable. Raises UserError where its bytes are not those that were indexed."""
    remedy = "run index_images again (dvc repro)"
    try:
        with open(source.path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != source.image_id:
                raise UserError(f"{source.path}: has changed since it was indexed; {remedy}")
            file.seek(0)
            return open_rgb(file)
    except (OSError, BadImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{source.path}: could be read when it was indexed, not now ({reason}); {remedy}") from None


def prepare(source: Source, encoder: LoadedEncoder, settings: Embed) -> list[View]:
    """Decode one image and cut its views and their crops. Raises UserError as open_indexed does."""
    image = open_indexed(source)
    views = []
    for number in range(settings.views + 1):
        region, flip = view_region(source.image_id, number, *image.size)
        picture = image.crop(region)
        seen = visible_box(*picture.size, encoder.preprocessing)
        inside = max(seen[0], 0.0), max(seen[1], 0.0), min(seen[2], 1.0), min(seen[3], 1.0)
        windows = [window for count in settings.crops for window in cut_windows(inside, count)]
        pictures = [picture, *(crop_fraction(picture, window) for window in windows)]
        if flip:
            pictures = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pictures]
        boxes = [in_image(box, region, image.size) for box in (seen, *windows)]
        pixels = torch.stack([encoder.preprocess(each) for each in pictures])
        views.append(View(source.image_id, number, pixels, boxes, flip))
    return views


def crop_fraction(picture: Image.Image, box: Box) -> Image.Image:
    """The window `box`, in [0, 1] of the picture, at least one pixel a side."""
    left, top = math.floor(box[0] * picture.width), math.floor(box[1] * picture.height)
    right = max(left + 1, round(box[2] * picture.width))
    bottom = max(top + 1, round(box[3] * picture.height))
    return picture.crop((left, top, right, bottom))


def in_image(box: Box, region: Region, size: tuple[int, int]) -> Box:
    """A box in [0, 1] of a pixel region as a box in [0, 1] of the whole image."""
    left, top, right, bottom = region
    x = [(left + share * (right - left)) / size[0] for share in (box[0], box[2])]
    y = [(top + share * (bottom - top)) / size[1] for share in (box[1], box[3])]
    return x[0], y[0], x[1], y[1]


def grid_cells(box: Box, height: int, width: int, rows: int, columns: int, *, flip: bool) -> list[Box]:
    """The boxes of rows x columns cells pooled from height x width tokens that cover `box`, row by row.

    A cell covers the tokens that adaptive average pooling gives it; neighbours overlap where the counts do not divide.
    """
    x0, y0, x1, y1 = box
    cells = []
    for row in range(rows):
        top, bottom = row * height // rows, -(-(row + 1) * height // rows)
        for column in range(columns):
            left, right = column * width // columns, -(-(column + 1) * width // columns)
            if flip:
                left, right = width - right, width - left
            cells.append((
                x0 + (x1 - x0) * left / width, y0 + (y1 - y0) * top / height,
                x0 + (x1 - x0) * right / width, y0 + (y1 - y0) * bottom / height,
            ))
    return cells


def view_nodes(view: View, pooled: Tensor, tokens: Tensor, settings: Embed) -> tuple[list[str], list[Box], Tensor]:
    """Kinds, boxes and raw vectors (nodes, D) of one view, from its passes (1 + crops, D) and tokens (h, w, D)."""
    height, width, _ = tokens.shape
    kinds, boxes, vectors = ["global"], [view.boxes[0]], [pooled[:1]]
    levels = [("token", height, width)] if settings.tokens else []
    levels += [("grid", count, count) for count in settings.grids]
    for kind, rows, columns in levels:
        if rows > height or columns > width:
            finer = f"{rows} x {columns} is finer than the {height} x {width} tokens of this encoder"
            raise UserError(f"params.yaml: embed.grids: {finer}; take {rows} out")
        cells = F.adaptive_avg_pool2d(tokens.permute(2, 0, 1), (rows, columns)).flatten(1).T
        kinds += [kind] * len(cells)
        boxes += grid_cells(view.boxes[0], height, width, rows, columns, flip=view.flip)
        vectors.append(cells)
    kinds += ["crop"] * (len(pooled) - 1)
    return kinds, boxes + view.boxes[1:], torch.cat([*vectors, pooled[1:]])


def make_rows(view: View, pooled: Tensor, tokens: Tensor, settings: Embed) -> pa.Table:
    """The embed.nodes rows of one view."""
    kinds, boxes, raw = view_nodes(view, pooled, tokens, settings)
    norms = raw.norm(dim=1)
    if not bool(torch.isfinite(norms).all() and norms[0] > 0):
        raise UserError(f"image {view.image_id}: its embedding is 0 or not finite; try encoders.NAME.precision: fp32")
    corners = np.clip(np.asarray(boxes, dtype=np.float32), 0, 1)
    count = len(kinds)
    return pa.table({
        "image_id": pa.array([view.image_id] * count),
        "view": pa.array([view.number] * count, pa.int16()),
        "node": pa.array(range(count), pa.int16()),
        "kind": pa.array(kinds),
        **{name: pa.array(corners[:, i]) for i, name in enumerate(("x0", "y0", "x1", "y1"))},
        "flip": pa.array([view.flip] * count),
        "norm": pa.array(norms.numpy()),
        "vector": store.vector_column((raw / norms.where(norms > 0, 1)[:, None]).numpy()),
    })


def embed_views(views: Iterable[View], encoder: LoadedEncoder, settings: Embed) -> Iterator[pa.Table]:
    """Yield the rows of each view in order, its passes batched with those of the views around it."""
    waiting: list[View] = []
    pixels: list[Tensor] = []
    done: list[tuple[Tensor, Tensor]] = []

    def forward(count: int) -> None:
        batch = torch.stack(pixels[:count])
        del pixels[:count]
        pooled, tokens = encoder.embed_images(batch)
        done.extend(zip(pooled, tokens, strict=True))

    def finished() -> Iterator[pa.Table]:
        while waiting and len(done) >= len(waiting[0].pixels):
            view = waiting.pop(0)
            passes = done[: len(view.pixels)]
            del done[: len(view.pixels)]
            yield make_rows(view, torch.stack([each[0] for each in passes]), passes[0][1], settings)

    for view in views:
        waiting.append(view)
        pixels.extend(view.pixels)
        while len(pixels) >= encoder.batch_size:
            forward(encoder.batch_size)
            yield from finished()
    if pixels:
        forward(len(pixels))
    yield from finished()


def count_passes(settings: Embed) -> int:
    """Forward passes an image."""
    return (settings.views + 1) * (1 + sum(count**2 for count in settings.crops))


def embed_sources(sources: list[Source], encoder: LoadedEncoder, settings: Embed) -> Iterator[pa.Table]:
    """Yield the embed.nodes rows of each image in order; threads decode the images ahead."""
    schema = store.arrow_schema(SCHEMA, encoder.dimension)
    workers = os.cpu_count() or 1
    prepared = map_ahead(
        lambda source: prepare(source, encoder, settings), sources,
        workers=workers, ahead=max(workers, 2 * encoder.batch_size // count_passes(settings)),
    )
    rows = embed_views((view for views in prepared for view in views), encoder, settings)
    for _ in sources:
        yield pa.concat_tables(islice(rows, settings.views + 1)).cast(schema)


def find_work(sources: list[Source], encoder: LoadedEncoder, settings: Embed, folder: Path, buckets: int) -> Work:
    """Compare a folder of buckets with what it should hold of `sources`."""
    made_by: dict[str, Any] = {
        "encoder": encoder.fingerprint, "views": settings.views, "tokens": settings.tokens,
        "grids": settings.grids, "crops": settings.crops,
    }
    mark = store.fingerprint(SCHEMA, made_by)
    by_id = {source.image_id: source for source in sources}
    todo: list[tuple[Path, store.Kept]] = []
    for bucket, wanted in enumerate(store.split_buckets(list(by_id), buckets)):
        path = store.bucket_path(folder, bucket)
        kept = store.find_kept(path, SCHEMA, mark, wanted)
        if kept.changes:
            todo.append((path, kept))
    return Work(made_by, mark, todo, [by_id[image_id] for _, kept in todo for image_id in kept.missing])


def embed(sources: list[Source], encoder: LoadedEncoder, settings: Embed, folder: Path, buckets: int) -> int:
    """Bring a folder of buckets up to date with `sources`; return how many images were embedded."""
    store.remove_strays(folder, buckets)
    work = find_work(sources, encoder, settings, folder, buckets)
    columns = store.arrow_schema(SCHEMA, encoder.dimension)
    with tqdm(total=len(work.missing), desc=f"embed {encoder.name}", unit="img") as progress:

        def count(images: Iterable[pa.Table]) -> Iterator[pa.Table]:
            for image in images:
                progress.update()
                yield image

        rows = count(embed_sources(work.missing, encoder, settings))
        for path, kept in work.todo:
            old = store.iterate_images(path, SCHEMA, kept.present) if kept.present else iter(())
            images = heapq.merge(old, islice(rows, len(kept.missing)), key=store.image_of)
            store.write_sorted(images, path, SCHEMA, columns, work.made_by, work.mark)
    return len(work.missing)


def preview(work: Work, kept: int, encoder: LoadedEncoder, settings: Embed) -> str:
    """What a run would do, for --dry-run: the rate and the bytes are those of a few images embedded now."""
    total = len(work.missing)
    lines = [f"{total} images to embed, {kept} kept; {len(work.todo)} buckets to write"]
    if total:
        sample = work.missing[: max(1, SAMPLE_BATCHES * encoder.batch_size // count_passes(settings))]
        # A first pass is slower than those that follow.
        list(embed_sources(sample[:1], encoder, settings))
        started = perf_counter()
        images = list(embed_sources(sample, encoder, settings))
        rate = len(sample) / (perf_counter() - started)
        file = io.BytesIO()
        store.write_parquet(images, file, images[0].schema)
        size = file.tell() / len(sample) * total / 1e6
        measured = f"{rate:.1f} images/s on {encoder.device}, measured with {len(sample)} of them"
        lines += [f"time: about {timedelta(seconds=round(total / rate))} ({measured})", f"on disk: about {size:.2f} MB"]
    return "\n".join(lines)


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print images, time and bytes to come; write nothing")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    settings = params.encoder(arguments.encoder)
    sources = read_sources(params.dataset.folder)
    encoder = load_encoder(arguments.encoder, settings, choose_device(arguments.device))
    folder = EMBED / arguments.encoder / "images"
    if arguments.dry_run:
        work = find_work(sources, encoder, params.embed, folder, params.dataset.buckets)
        print(f"{folder}: {preview(work, len(sources) - len(work.missing), encoder, params.embed)}")
        return
    count = embed(sources, encoder, params.embed, folder, params.dataset.buckets)
    print(f"{folder}: {count} images embedded, {len(sources) - count} kept")


if __name__ == "__main__":
    run(main)
