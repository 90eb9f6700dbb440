"""Look again at every image, where a first look wants to see more: two resampled pictures of each view, embedded.

Reads   data/first_looks/NAME/maps.parquet; data/index/images.parquet and the images it names; of params.yaml
        `train.first_looks.NAME.encoder` and the block of that encoder or tower. Views are those that the maps are of.
Writes  data/again/NAME/bNNN.parquet (again/1). Rows that are there already, made by the same encoder of maps of the
        same first look, are kept, bucket by bucket, as embed_images keeps its own.
Costs   two forward passes an image and view, and a decode at the size that the maps ask for; memory for the maps of all
        images, 8 kB an image and view. --dry-run tells time and bytes, and writes nothing.

A picture is taken from all the pixels of the file (fieldmark/pictures/zoom.py): what the maps magnify has detail that
the first look never had, where the file has more pixels than the encoder reads. It fills the encoder's input, and
nothing cuts it again. `vector` is the pooled one, before the projection (fieldmark/encoders/pooled.py). An image that
has no map is an error.

    python -m stages.look_again --look zoom --dry-run
    python -m stages.look_again --look zoom
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError, key_parser, run
from fieldmark.devices import choose_device
from fieldmark.encoders import layers as tower_layers
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.passes import (
    Clock,
    Outputs,
    Product,
    add_passes,
    count_workers,
    find_batch_size,
    list_devices,
    preview,
    refuse_compile,
    rows_of_images,
    run_shards,
    run_sources,
    update,
)
from fieldmark.encoders.pooled import pool_batch
from fieldmark.memory import keep_memory
from fieldmark.params import Embed, load_params
from fieldmark.pictures.views import Source, View, read_sources
from fieldmark.pictures.zoom import RULES, zoomed_views

AGAIN = Path("data/again")
FIRST_LOOKS = Path("data/first_looks")
SCHEMA, MAPS = "again/1", "maps/1"
BRANCHES = ("complementary", "discriminative")  # sorted, as they stand in the tables


class Maps:
    """The maps of a first look, of some images."""

    def __init__(self, path: Path, encoder: ImageEncoder, image_ids: Sequence[str]) -> None:
        """Raises UserError where an image has not all its maps, or where they were made with another encoder."""
        header = store.read_header(path, MAPS)
        again = "run first_look again (dvc repro)"
        if header.params["encoder"] != encoder.fingerprint:
            what = f"was made with another {encoder.name} than it is now (other weights or parameters)"
            raise UserError(f"{path}: {what}; run embed_tokens, and {again}")
        self.fingerprint, self.views = header.fingerprint, int(header.params["views"])
        found = store.read_images(path, MAPS, image_ids).sort_by([(key, "ascending") for key in store.KEYS[MAPS]])
        wanted = sorted(image_ids)
        keys = [(image_id, view, branch) for image_id in wanted for view in range(self.views) for branch in BRANCHES]
        held = list(zip(*(found[name].to_pylist() for name in store.KEYS[MAPS]), strict=True))
        if held != keys:
            lacking = sorted(set(keys) - set(held)) or held
            raise UserError(f"{path}: lacks the maps of image {lacking[0][0]} (view {lacking[0][1]}); {again}")
        side = found["side"][0].as_py() if held else 1
        values = pc.list_flatten(found["values"]).to_numpy().astype(np.float32)
        self.maps = torch.from_numpy(values).reshape(len(wanted), self.views, len(BRANCHES), side, side)
        self.place = {image_id: place for place, image_id in enumerate(wanted)}

    def of(self, source: Source) -> Tensor:
        """(views, branches, side, side) of an image."""
        return self.maps[self.place[source.image_id]]


@torch.inference_mode()
def forward(encoder: ImageEncoder, pixels: Tensor) -> Outputs:
    """Normalised pixels (n, 3, H, W) to pooled vectors (n, d), on the device; n is at most batch_size."""
    return (pool_batch(encoder, pixels, [])[0],)


def make_rows(name: str, views: list[View], passes: list[list[Outputs]]) -> pa.Table:
    """The rows of views, one a branch, from the pooled vectors (d) of each one's passes."""
    vectors = torch.stack([torch.stack([pooled for (pooled,) in found]) for found in passes])  # (views, branches, d)
    usable = vectors.half().isfinite().all(-1).all(-1)
    if not bool(usable.all()):
        image_id = views[int(usable.int().argmin())].image_id
        raise UserError(f"image {image_id}: float16 cannot hold what {name} gives of it; try precision: fp32")
    return pa.table({
        "image_id": [view.image_id for view in views for _ in BRANCHES],
        "view": pa.array(np.repeat([view.number for view in views], len(BRANCHES)), pa.int16()),
        "branch": [*BRANCHES] * len(views),
        "vector": store.vector_column(vectors.flatten(0, 1).numpy()),
    })


def look(
    maps: Maps, sources: Sequence[Source], products: Sequence[Product], clock: Clock
) -> Iterator[tuple[pa.Table, ...]]:
    """passes.forward_sources of pictures that maps resample."""
    encoder = products[0].encoder

    def cut(source: Source) -> list[View]:
        return zoomed_views(source, encoder, maps.of(source))

    return rows_of_images(run_sources(sources, products[0], clock, cut), products, len(sources))


def again_of(name: str, encoder: ImageEncoder, maps: Maps) -> Product:
    """What this stage makes of a first look."""
    width = pool_batch(encoder, torch.zeros(1, 3, *np.broadcast_to(encoder.preprocessing["size"], 2)), [])[0].shape[1]
    return Product(
        folder=AGAIN / name,
        schema=SCHEMA,
        columns=store.arrow_schema(SCHEMA, width),
        made_by={
            "encoder": encoder.fingerprint, "maps": maps.fingerprint, "views": maps.views - 1,
            "rules": [RULES, tower_layers.RULES],
        },
        embed=Embed(views=maps.views - 1),
        encoder=encoder,
        forward=partial(forward, encoder),
        rows=partial(make_rows, encoder.name),
    )  # fmt: skip


def main() -> None:
    arguments = add_passes(key_parser(__doc__, "--look", "train.first_looks")).parse_args()
    refuse_compile(arguments)
    keep_memory()
    params = load_params(arguments.params)
    name, buckets = arguments.look, params.dataset.buckets
    if name not in params.train.first_looks:
        known = ", ".join(params.train.first_looks) or "none"
        raise UserError(f"params.yaml: train.first_looks.{name}: is not there; choose one of: {known}, or add it")
    sources = read_sources(params.dataset.folder)
    if run_shards("stages.look_again", [AGAIN / name], buckets, arguments):
        return
    devices, chosen = list_devices(arguments.device), params.train.first_looks[name].encoder
    encoder = load_image_encoder(chosen, params.image_encoder(chosen), choose_device(devices[0]), params.towers)
    maps = Maps(FIRST_LOOKS / name / "maps.parquet", encoder, [source.image_id for source in sources])
    product = again_of(name, encoder, maps)
    if arguments.find_batch_size:
        print(find_batch_size(product))
    elif arguments.dry_run:
        said = preview([product], sources, buckets, count_workers(arguments), partial(look, maps))
        print(f"{product.folder}: {said}")
    else:
        update([product], sources, buckets, arguments.shard, partial(look, maps))


if __name__ == "__main__":
    run(main)
