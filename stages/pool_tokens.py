"""Make vectors of whole images from what an encoder holds before its projection: the pooled vector, moments of tokens.

Reads   data/index/images.parquet and the images it names; `moments.NAME`, `encoders.NAME` or `towers.NAME`, and
        `embed.views` of params.yaml. Where data/embed/NAME/tokens holds all that is missing, it is read instead of the
        images: the vectors have the same bits.
Writes  data/embed/NAME/moments/MOMENT/bNNN.parquet (embed.moments/1) for each MOMENT of `moments.NAME`, kept bucket by
        bucket as embed_images keeps its own; beside them basis.safetensors, where directions are asked for;
        data/embed/NAME/projection.safetensors. Removes the folder of a MOMENT that params.yaml no longer names.
Costs   one forward pass an image and view for all of them, and about a millisecond for an isqrt; no token is stored.
        The first time also a pass for BASIS_IMAGES training images. An isqrt of 128 directions has 8,256 numbers,
        16.5 kB an image and view. Memory does not grow with the images. --dry-run tells time and bytes, and writes
        nothing.

A row is one view. `pooled` is what the head gives before its projection (fieldmark/encoders/pooled.py); the other kinds
are made of one layer's tokens (fieldmark/moments.py). No vector has unit length.

A basis (a mean and directions) is fitted on view 0 of training images, drawn by the hash of image_id, and then kept: an
image more does not move it, and changes one bucket. It is fitted again where encoder, layer or directions change, and
with --refit. Its sha256 is in the fingerprint of the rows. Machines that share the buckets (--shard) need the same one:
let the first of them finish, and copy its basis.

projection.safetensors holds `weight` (D, d) and, where there is one, `bias` (D,): the global embedding of an image is
weight @ pooled + bias. It holds no tensor where the head is not linear, or projects nothing.

    python -m stages.pool_tokens --encoder reef --dry-run
    python -m stages.pool_tokens --encoder reef
    python -m stages.pool_tokens --encoder reef --engine ray
"""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from fieldmark import cluster, store
from fieldmark.command import UserError, run
from fieldmark.devices import choose_device
from fieldmark.encoders import layers as tower_layers
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.layers import find_tower, number_layer
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.passes import (
    ALL_BUCKETS,
    Clock,
    ForwardPass,
    Maker,
    Outputs,
    Passed,
    Product,
    Shard,
    count_workers,
    find_batch_size,
    find_work,
    forward_sources,
    list_devices,
    passes_parser,
    preview,
    refuse_compile,
    rows_of_images,
    run_shards,
    run_sources,
    update,
)
from fieldmark.encoders.pooled import pool_batch, projection_of
from fieldmark.labels.splits import read_split
from fieldmark.memory import keep_memory
from fieldmark.moments import CHUNK, RULES, Basis, TokenSums, length_of, pool
from fieldmark.params import Embed, Moment, Params, load_params
from fieldmark.pictures.views import BucketSources, Source, View, read_sources

EMBED = Path("data/embed")
INDEX = Path("data/index/images.parquet")
SCHEMA, TOKENS = "embed.moments/1", "embed.tokens/1"
BASIS, PROJECTION = "basis.safetensors", "projection.safetensors"
# Training images that a basis is fitted on: with 36 tokens each or more, some 20,000 for a few hundred dimensions.
BASIS_IMAGES = 512


class Asked(NamedTuple):
    """A vector that `moments` asks for, its layer as the tower counts it."""

    name: str  # its key in params.yaml, and its folder
    kind: str
    layer: int | None  # None: the pooled vector
    directions: int | None  # None: no basis
    folder: Path


# How many numbers a cell has, by layer; under None, the pooled vector.
Widths = dict[int | None, int]


class Stored(NamedTuple):
    """What embed_tokens has stored, made by the same encoder of the same views."""

    folder: Path
    buckets: int
    layers: set[int]
    image_ids: set[str]

    def has(self, asked: Iterable[Asked], sources: Iterable[Source]) -> bool:
        """Whether it holds all that these vectors of these images are made of."""
        layers, image_ids = {each.layer for each in asked}, {source.image_id for source in sources}
        return layers <= self.layers and image_ids <= self.image_ids


def key_of(encoder: ImageEncoder) -> str:
    return f"params.yaml: moments.{encoder.name}"


def find_asked(encoder: ImageEncoder, chosen: dict[str, Moment]) -> list[Asked]:
    """What `moments.NAME` asks for. Raises UserError for a layer that the tower does not have."""
    tower, folder = find_tower(encoder.model), EMBED / encoder.name / "moments"
    asked = []
    for name, moment in chosen.items():
        layer = None
        if moment.kind != "pooled":
            layer = number_layer(tower, moment.chosen_layer, f"{key_of(encoder)}.{name}.layer")
        asked.append(Asked(name, moment.kind, layer, moment.chosen_directions, folder / name))
    return asked


def layers_of(asked: Iterable[Asked]) -> list[int]:
    """The layers to read, each once, in order."""
    return sorted({each.layer for each in asked if each.layer is not None})


def measure(encoder: ImageEncoder, asked: list[Asked]) -> Widths:
    """Widths, from a pass of a blank picture. Raises UserError for more directions than a cell has numbers."""
    layers = layers_of(asked)
    pooled, cells = pool_batch(encoder, encoder.preprocess(Image.new("RGB", (8, 8)))[None], layers)
    widths: Widths = {None: pooled.shape[1]}
    widths |= {layer: each.shape[-1] for layer, each in zip(layers, cells, strict=True)}
    for each in asked:
        if (each.directions or 0) > widths[each.layer]:
            what = f"{each.directions} are more than the {widths[each.layer]} numbers of a cell of layer {each.layer}"
            raise UserError(f"{key_of(encoder)}.{each.name}.directions: {what}; ask for fewer")
    return widths


@torch.inference_mode()
def forward(encoder: ImageEncoder, asked: list[Asked], bases: dict[str, Basis], pixels: Tensor) -> Outputs:
    """Normalised pixels (n, 3, H, W) to the vectors (n, D) that are asked for, float16, on the device."""
    layers = layers_of(asked)
    pooled, cells = pool_batch(encoder, pixels, layers)
    found: dict[int | None, Tensor] = {None: pooled}
    found |= {layer: each.flatten(1, 2) for layer, each in zip(layers, cells, strict=True)}
    return make_vectors(asked, bases, found)


def make_vectors(asked: list[Asked], bases: dict[str, Basis], found: dict[int | None, Tensor]) -> Outputs:
    """The vectors (n, D) that are asked for, float16, of tokens (n, T, d) by layer, and the pooled ones under None."""
    return tuple(
        (found[None] if each.layer is None else pool(each.kind, found[each.layer], bases.get(each.name))).half()
        for each in asked
    )


@torch.inference_mode()
def forward_cells(encoder: ImageEncoder, layers: list[int], pixels: Tensor) -> Outputs:
    """Normalised pixels (n, 3, H, W) to the cells (n, h, w, d) of each layer, float16, on the device."""
    return tuple(cells.half() for cells in pool_batch(encoder, pixels, layers)[1])


def make_rows(
    encoder: ImageEncoder, asked: Asked, place: int, views: list[View], passes: list[list[Outputs]]
) -> pa.Table:
    """The embed.moments rows of views, from the vector at `place` of what was made of each."""
    vectors = torch.stack([outputs[place] for (outputs,) in passes])
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        image_id = views[int(finite.int().argmin())].image_id
        of_layer = "" if asked.layer is None else f" of layer {asked.layer}"
        problem = f"{asked.kind}{of_layer} of {encoder.name} has numbers that float16 cannot hold, or that are none"
        remedy = f"try precision: fp32, or take {asked.name} out of moments.{encoder.name}"
        raise UserError(f"image {image_id}: {problem}; {remedy}")
    return pa.table({
        "image_id": [view.image_id for view in views],
        "view": pa.array([view.number for view in views], pa.int16()),
        "layer": pa.array([asked.layer] * len(views), pa.int16()),
        "kind": [asked.kind] * len(views),
        "vector": store.vector_column(vectors.numpy()),
    })


def basis_made_by(encoder: ImageEncoder, asked: Asked) -> dict[str, Any]:
    """What a basis is kept for."""
    return {
        "encoder": encoder.fingerprint, "layer": asked.layer, "directions": asked.directions,
        "rules": [RULES, tower_layers.RULES],
    }  # fmt: skip


def read_basis(encoder: ImageEncoder, asked: Asked) -> Basis | None:
    """The basis that is kept, if this made it. Raises UserError for a broken file."""
    path = asked.folder / BASIS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads(file.metadata()["made_by"]) == basis_made_by(encoder, asked)
            return Basis(file.get_tensor("mean"), file.get_tensor("directions")) if kept else None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not readable ({error}); remove it and run pool_tokens, or dvc pull it") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], made_by: dict[str, Any]) -> None:
    """A safetensors file that says what made it. One that has these bytes already is left as it is."""
    # One entry: of several, safetensors does not keep the order.
    content = save(tensors, {"made_by": store.canonical_json(made_by)})
    if not path.is_file() or path.read_bytes() != content:
        store.write_bytes(path, content)


def write_projection(encoder: ImageEncoder) -> None:
    found = projection_of(encoder)
    tensors: dict[str, Tensor] = {}
    if found is not None:
        weight, bias = found
        tensors = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias})
    made_by = {"encoder": encoder.fingerprint, "linear": found is not None}
    write_tensors(EMBED / encoder.name / PROJECTION, tensors, made_by)


def find_stored(encoder: ImageEncoder, views: int, buckets: int, bucket: int | None = None) -> Stored | None:
    """What embed_tokens has stored of this encoder and these views, if it has, in all buckets or in one of them.

    Raises UserError for a broken file.
    """
    folder = EMBED / encoder.name / "tokens"
    looked_at = range(buckets) if bucket is None else [bucket]
    paths = [store.bucket_path(folder, each) for each in looked_at]
    if not all(path.is_file() for path in paths):
        return None
    headers = [store.read_header(path, TOKENS) for path in paths]
    made_by = headers[0].params
    wanted = {"encoder": encoder.fingerprint, "views": views, "rules": tower_layers.RULES}
    if len({header.fingerprint for header in headers}) > 1 or not wanted.items() <= made_by.items():
        return None
    return Stored(folder, buckets, set(made_by["layers"]), set().union(*map(store.held_ids, paths)))


def read_cells(stored: Stored, sources: Iterable[Source], views: int) -> Iterator[tuple[View, dict[int, Tensor]]]:
    """Views 0 to `views` of images whose tokens are stored, bucket by bucket, and the cells (T, d) of each layer."""
    for bucket, members in groupby(sources, key=lambda source: store.bucket_of(source.image_id, stored.buckets)):
        path = store.bucket_path(stored.folder, bucket)
        for rows in store.iterate_images(path, TOKENS, [source.image_id for source in members]):
            found: dict[int, dict[int, Tensor]] = {}
            for row in range(len(rows)):
                view, layer, width = (rows.column(name)[row].as_py() for name in ("view", "layer", "width"))
                cells = rows.column("vectors")[row].values.to_numpy(zero_copy_only=False)
                found.setdefault(view, {})[layer] = torch.tensor(cells).reshape(-1, width)
            for view in range(views + 1):
                yield View(store.image_of(rows), view, torch.empty(0), [], False), found[view]


def pool_stored(
    stored: Stored, asked: list[Asked], bases: dict[str, Basis],
    sources: Sequence[Source], products: Sequence[Product], clock: Clock,
) -> Iterator[tuple[pa.Table, ...]]:  # fmt: skip
    """passes.forward_sources of tokens that embed_tokens has stored, without a pass."""
    device, views = products[0].encoder.device, products[0].embed.views

    def passed() -> Iterator[Passed]:
        found = clock.timed(read_cells(stored, sources, views), "decode")
        while read := list(islice(found, CHUNK)):
            tokens: dict[int | None, Tensor] = {
                layer: torch.stack([cells[layer] for _, cells in read]).to(device) for layer in layers_of(asked)
            }
            vectors = [each.cpu() for each in make_vectors(asked, bases, tokens)]
            yield [view for view, _ in read], [[outputs] for outputs in zip(*vectors, strict=True)]

    return rows_of_images(clock.timed(passed(), "forward"), products, len(sources))


def draw_sample(sources: Sequence[Source], buckets: int) -> list[Source]:
    """The training images that bases are fitted on, bucket by bucket. Raises UserError where there is none."""
    training = read_split(INDEX, "train")
    drawn = [each for each in sources if each.image_id in training]
    if not drawn:
        remedy = "take the kinds with directions out of `moments`, or give the data set training images"
        raise UserError(f"{INDEX}: has no training image to fit directions on; {remedy}")
    drawn = sorted(drawn, key=lambda each: store.sha256(each.image_id))[:BASIS_IMAGES]
    return sorted(drawn, key=lambda each: (store.bucket_of(each.image_id, buckets), each.image_id))


def sample_cells(
    encoder: ImageEncoder, asked: list[Asked], sample: list[Source], stored: Stored | None, embed: Embed
) -> Iterator[list[Tensor]]:
    """The cells of view 0 of a sample, batch by batch: of each layer (n, ..., d), float16, on the CPU."""
    layers = layers_of(asked)
    if stored is not None and stored.has(asked, sample):
        found = read_cells(stored, sample, 0)
        while read := list(islice(found, encoder.batch_size)):
            yield [torch.stack([cells[layer] for _, cells in read]) for layer in layers]
        return
    whole = ForwardPass(embed.model_copy(update={"views": 0}), encoder, partial(forward_cells, encoder, layers))
    for _, passes in run_sources(sample, whole, Clock()):
        yield [torch.stack(cells) for cells in zip(*(outputs for (outputs,) in passes), strict=True)]


def fit_bases(
    encoder: ImageEncoder, asked: list[Asked], widths: Widths, batches: Iterable[list[Tensor]]
) -> dict[str, Basis]:
    """The bases of these vectors, by name, from the cells of a sample, batch by batch; they are written."""
    sums: dict[int | None, TokenSums] = {layer: TokenSums(widths[layer]) for layer in layers_of(asked)}
    for batch in batches:
        for each, cells in zip(sums.values(), batch, strict=True):
            each.add(cells)
    bases = {}
    for one in asked:
        basis = bases[one.name] = sums[one.layer].basis(one.directions or 0)
        write_tensors(one.folder / BASIS, basis._asdict(), basis_made_by(encoder, one))
    return bases


def products_of(
    encoder: ImageEncoder, asked: list[Asked], needed: list[Asked], bases: dict[str, Basis], widths: Widths,
    embed: Embed,
) -> list[Product]:  # fmt: skip
    """What this stage makes with an encoder: a folder a vector. The pass makes those that are `needed`, for all."""
    run = partial(forward, encoder, needed, bases)
    products = []
    for each in asked:
        products.append(Product(
            folder=each.folder,
            schema=SCHEMA,
            columns=store.arrow_schema(SCHEMA, length_of(each.kind, widths[each.layer], each.directions)),
            made_by={
                "encoder": encoder.fingerprint, "views": embed.views, "kind": each.kind, "layer": each.layer,
                "directions": each.directions, "basis": bases[each.name].sha256 if each.name in bases else None,
                "rules": [RULES, tower_layers.RULES],
            },
            embed=embed,
            encoder=encoder,
            forward=run,
            rows=partial(make_rows, encoder, each, needed.index(each) if each in needed else -1),
        ))  # fmt: skip
    return products


def remove_former(encoder: ImageEncoder, asked: list[Asked]) -> None:
    """Remove the folders of vectors that are no longer asked for, and bases where no directions are."""
    wanted = {each.folder for each in asked}
    for folder in (EMBED / encoder.name / "moments").glob("*/"):
        if folder not in wanted:
            shutil.rmtree(folder)
    for each in asked:
        if each.directions is None:
            (each.folder / BASIS).unlink(missing_ok=True)


class Opened(NamedTuple):
    """An encoder, loaded, and what is asked of it."""

    encoder: ImageEncoder
    asked: list[Asked]
    embed: Embed
    widths: Widths
    bases: dict[str, Basis]  # as they are kept, or one that stands in
    unfitted: list[Asked]  # whose basis is not there


def open_moments(arguments: Namespace, params: Params, refit: bool) -> Opened:
    """What this stage works with, on the first device that is named; with `refit` no basis is there."""
    name = arguments.encoder
    device = choose_device(list_devices(arguments.device)[0])
    encoder = load_image_encoder(name, params.image_encoder(name), device, params.towers)
    asked = find_asked(encoder, params.moments[name])
    widths = measure(encoder, asked)
    bases: dict[str, Basis] = {}
    unfitted = []
    for each in asked:
        if each.directions is not None:
            kept = None if refit else read_basis(encoder, each)
            if kept is None:
                unfitted.append(each)
            bases[each.name] = kept or Basis.stand_in(widths[each.layer], each.directions)
    return Opened(encoder, asked, params.embed.uncut, widths, bases, unfitted)


def fit_unfitted(opened: Opened, sample: list[Source], stored: Stored | None) -> dict[str, Basis]:
    """All bases, those that are not there fitted on a sample."""
    encoder = opened.encoder
    if not opened.unfitted:
        return opened.bases
    batches = sample_cells(encoder, opened.unfitted, sample, stored, opened.embed)
    told = tqdm(batches, desc=f"basis {encoder.name}", total=-(-len(sample) // encoder.batch_size), unit="batch")
    return opened.bases | fit_bases(encoder, opened.unfitted, opened.widths, told)


def on_device(encoder: ImageEncoder, bases: dict[str, Basis]) -> dict[str, Basis]:
    return {key: Basis(*(tensor.to(encoder.device) for tensor in basis)) for key, basis in bases.items()}


def choose_maker(
    opened: Opened, bases: dict[str, Basis], sources: Sequence[Source], stored: Stored | None, buckets: int,
    shard: Shard,
) -> tuple[list[Product], Maker]:  # fmt: skip
    """What is made of images in some buckets, and from what: stored tokens where these are enough, else the images."""
    encoder, asked, embed, widths = opened[:4]
    found = products_of(encoder, asked, asked, bases, widths, embed)
    lacking = [find_work(product, sources, buckets, shard).missing for product in found]
    needed = [each for each, missing in zip(asked, lacking, strict=True) if missing]
    products = products_of(encoder, asked, needed, bases, widths, embed)
    if stored is not None and stored.has(needed, [source for missing in lacking for source in missing]):
        return products, partial(pool_stored, stored, needed, bases)
    return products, forward_sources


def open_basis(arguments: Namespace, params: Params) -> Callable[[None], None]:
    """What one worker of a cluster does first: it makes what all buckets share."""

    def prepare(_: None) -> None:
        opened, buckets = open_moments(arguments, params, arguments.refit), params.dataset.buckets
        remove_former(opened.encoder, opened.asked)
        write_projection(opened.encoder)
        if opened.unfitted:
            sample = draw_sample(read_sources(params.dataset.folder), buckets)
            fit_unfitted(opened, sample, find_stored(opened.encoder, opened.embed.views, buckets))

    return prepare


def open_buckets(arguments: Namespace, params: Params) -> Callable[[int], cluster.Bucket]:
    """What a worker of a cluster does with a bucket. Raises UserError where it does not see the bases."""
    keep_memory()
    opened, buckets = open_moments(arguments, params, refit=False), params.dataset.buckets
    if opened.unfitted:
        path = opened.unfitted[0].folder / BASIS
        raise UserError(f"{path}: is not seen by all nodes; pool_tokens needs a disk that they share (docs/cluster.md)")
    encoder, bases = opened.encoder, on_device(opened.encoder, opened.bases)
    images = BucketSources(params.dataset.folder, buckets)

    def bring(bucket: int) -> cluster.Bucket:
        sources, shard = images[bucket], (bucket, buckets)
        stored = find_stored(encoder, opened.embed.views, buckets, bucket)
        products, make = choose_maker(opened, bases, sources, stored, buckets, shard)
        return cluster.Bucket(update(products, sources, buckets, shard, make), len(sources))

    return bring


def main() -> None:
    parser = cluster.add_bucket_engine(passes_parser(__doc__))
    parser.add_argument("--refit", action="store_true", help="fit the bases again; every vector along them changes")
    arguments = parser.parse_args()
    refuse_compile(arguments)
    keep_memory()
    params = load_params(arguments.params)
    name, buckets = arguments.encoder, params.dataset.buckets
    params.image_encoder(name)
    if name not in params.moments:
        remedy = f"add it, as in `moments: {{{name}: {{pooled: {{kind: pooled}}}}}}`"
        raise UserError(f"params.yaml: moments.{name}: is not there, so that no vector is asked for; {remedy}")
    folders = [EMBED / name / "moments" / each for each in params.moments[name]]
    if cluster.on_cluster(arguments):
        job = cluster.Job("stages.pool_tokens", "open_buckets", arguments, params)
        cluster.run_buckets(job, folders, first="open_basis")
        return
    sources = read_sources(params.dataset.folder)
    opened = open_moments(arguments, params, arguments.refit)
    encoder, asked, embed, widths, bases, unfitted = opened
    stored = find_stored(encoder, embed.views, buckets)
    sample = draw_sample(sources, buckets) if unfitted else []
    if not arguments.dry_run and not arguments.find_batch_size:
        if arguments.shard is None:
            remove_former(encoder, asked)
            write_projection(encoder)
        bases = fit_unfitted(opened, sample, stored)
        if run_shards("stages.pool_tokens", folders, buckets, arguments, done="--refit"):
            return

    bases = on_device(encoder, bases)
    if arguments.find_batch_size:
        print(find_batch_size(products_of(encoder, asked, asked, bases, widths, embed)[0]))
        return
    products, make = choose_maker(opened, bases, sources, stored, buckets, ALL_BUCKETS)
    if not arguments.dry_run:
        update(products, sources, buckets, arguments.shard, make)
        return
    said = ", ".join(f"{each.name} {length_of(each.kind, widths[each.layer], each.directions):,}" for each in asked)
    print(f"{EMBED / name / 'moments'}: numbers a vector: {said}")
    if unfitted:
        names = ", ".join(each.name for each in unfitted)
        print(f"first of all {len(sample)} training images more, for the directions of {names}")
    print(preview(products, sources, buckets, count_workers(arguments), make))


if __name__ == "__main__":
    run(main)
