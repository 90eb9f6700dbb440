"""Embed every image once: the whole picture, its object, the cells of its dense map, coarser grids of them, and crops.

Reads   data/index/images.parquet and the images it names; `encoders.NAME` and `embed` of params.yaml.
Writes  data/embed/NAME/images/bNNN.parquet (embed.nodes/1). Rows that are there already, made by the same encoder and
        parameters, are kept: an image more embeds one image and rewrites one bucket. What a run that was killed had
        finished, bucket by bucket, is kept too.
Costs   one forward pass an image and view (`crops: [3]` adds 9 a view, `regions` one for the object and one for each
        crop of it); 2 bytes a dimension and node on disk; memory does not grow with the images. --dry-run embeds a few
        batches, writes nothing, and says what is to come. --find-batch-size times the forward pass at growing batches.
        Large JPEGs are decoded at reduced size (views.py).

Which nodes a view has, and in which order, stands in fieldmark/encoders/nodes.py.

    python -m stages.embed_images --encoder reef
    python -m stages.embed_images --encoder reef --dry-run
    python -m stages.embed_images --encoder reef --device cuda:0,cuda:1
    python -m stages.embed_images --encoder reef --engine ray
"""

from argparse import Namespace
from collections.abc import Callable

from fieldmark import cluster
from fieldmark.command import UserError, run
from fieldmark.devices import choose_device
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.nodes import EMBED, nodes_of
from fieldmark.encoders.passes import (
    Product,
    compile_blocks,
    count_workers,
    find_batch_size,
    list_devices,
    passes_parser,
    preview,
    run_shards,
    update,
)
from fieldmark.memory import keep_memory
from fieldmark.params import Params, load_params
from fieldmark.pictures.views import BucketSources, count_passes, read_sources


def open_product(arguments: Namespace, params: Params) -> Product:
    """What this stage makes; its encoder is loaded on the first device that is named."""
    settings = params.image_encoder(arguments.encoder)
    device = choose_device(list_devices(arguments.device)[0])
    encoder = load_image_encoder(arguments.encoder, settings, device, params.towers)
    if arguments.compile:
        if encoder.dense is not None:
            key = f"params.yaml: encoders.{encoder.name}.dense"
            what = "needs what the last block reads on the way, and compiled code shows it to nobody"
            raise UserError(f"--compile: {key}: {what}; leave --compile out, or use last")
        compile_blocks(encoder.model)
    return nodes_of(encoder, params.embed)


def open_buckets(arguments: Namespace, params: Params) -> Callable[[int], cluster.Bucket]:
    """What a worker of a cluster does with a bucket."""
    keep_memory()
    product, buckets = open_product(arguments, params), params.dataset.buckets
    images = BucketSources(params.dataset.folder, buckets)

    def bring(bucket: int) -> cluster.Bucket:
        sources = images[bucket]
        return cluster.Bucket(update([product], sources, buckets, (bucket, buckets)), len(sources))

    return bring


def main() -> None:
    arguments = cluster.add_bucket_engine(passes_parser(__doc__)).parse_args()
    keep_memory()
    params = load_params(arguments.params)
    params.image_encoder(arguments.encoder)
    folder, buckets = EMBED / arguments.encoder / "images", params.dataset.buckets
    if cluster.on_cluster(arguments):
        cluster.run_buckets(cluster.Job("stages.embed_images", "open_buckets", arguments, params), [folder])
        return
    sources = read_sources(params.dataset.folder)
    if run_shards("stages.embed_images", [folder], buckets, arguments):
        return
    product = open_product(arguments, params)
    if arguments.find_batch_size:
        print(find_batch_size(product))
    elif arguments.dry_run:
        print(f"{product.folder}: {preview([product], sources, buckets, count_workers(arguments))}")
        print(f"forward passes: {count_passes(params.embed)} an image")
    else:
        update([product], sources, buckets, arguments.shard)


if __name__ == "__main__":
    run(main)
