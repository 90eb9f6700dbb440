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
"""

from fieldmark.command import UserError, run
from fieldmark.encoders.base import choose_device
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.nodes import EMBED, nodes_of
from fieldmark.encoders.passes import (
    compile_blocks,
    find_batch_size,
    list_devices,
    passes_parser,
    preview,
    run_shards,
    update,
)
from fieldmark.memory import keep_memory
from fieldmark.params import load_params
from fieldmark.pictures.views import count_passes, read_sources


def main() -> None:
    arguments = passes_parser(__doc__).parse_args()
    keep_memory()
    params = load_params(arguments.params)
    settings = params.image_encoder(arguments.encoder)
    sources = read_sources(params.dataset.folder)
    buckets = params.dataset.buckets
    if run_shards("stages.embed_images", [EMBED / arguments.encoder / "images"], buckets, arguments):
        return
    devices = list_devices(arguments.device)
    encoder = load_image_encoder(arguments.encoder, settings, choose_device(devices[0]), params.towers)
    if arguments.compile:
        if encoder.dense is not None:
            key = f"params.yaml: encoders.{encoder.name}.dense"
            what = "needs what the last block reads on the way, and compiled code shows it to nobody"
            raise UserError(f"--compile: {key}: {what}; leave --compile out, or use last")
        compile_blocks(encoder.model)
    product = nodes_of(encoder, params.embed)
    if arguments.find_batch_size:
        print(find_batch_size(product))
    elif arguments.dry_run:
        print(f"{product.folder}: {preview([product], sources, buckets, len(devices))}")
        print(f"forward passes: {count_passes(params.embed)} an image")
    else:
        update([product], sources, buckets, arguments.shard)


if __name__ == "__main__":
    run(main)
