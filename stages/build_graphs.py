"""Link the nodes of each image: neighbours in the picture, likenesses in the embedding, and the whole to every part.

Reads   data/embed/NAME/images/; `graphs` of params.yaml. Nothing that depends on a prompt.
Writes  data/graphs/NAME/bNNN.parquet (graphs/1). A bucket whose images are unchanged is not touched.
Costs   one (N, N) product an image: seconds for ten thousand images of 33 nodes.

Which nodes are linked, and how strongly, stands in fieldmark/graphs/patches.py.

    python -m stages.build_graphs --encoder reef
    python -m stages.build_graphs --encoder reef --engine ray
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from fieldmark import cluster, store
from fieldmark.command import encoder_parser, run
from fieldmark.graphs.patches import SCHEMA, graph_rows
from fieldmark.params import Graphs, Params, load_params

EMBED = Path("data/embed")
GRAPHS = Path("data/graphs")
ORDER = [("image_id", "ascending"), ("view", "ascending")]


def update_bucket(
    source: Path, target: Path, settings: Graphs, made_by: dict[str, object], mark: str, by_boxes: bool = False
) -> cluster.Bucket:
    """Bring one bucket up to date with the embeddings; how many images were linked anew, and how many it has.

    `by_boxes`: the data's boxes said where nodes lie, so that a corrected box moved them under the same mark; then all
    are linked, and written where a link differs.
    """
    ids = store.read_table(source, "embed.nodes/1", ["image_id"]).column("image_id").unique().to_pylist()
    kept = store.find_kept(target, SCHEMA, mark, ids)
    if not kept.changes and not by_boxes:
        return cluster.Bucket(0, len(ids))
    anew = ids if by_boxes else kept.missing
    columns = ["image_id", "view", "node", "kind", "x0", "y0", "x1", "y1", "vector"]
    nodes = store.read_images(source, "embed.nodes/1", anew, columns)
    tables = [graph_rows(nodes.combine_chunks(), settings).cast(store.arrow_schema(SCHEMA))]
    if kept.present and not by_boxes:
        tables.append(store.read_images(target, SCHEMA, kept.present))
    made = pa.concat_tables(tables)
    if not kept.changes and made.sort_by(ORDER).equals(store.read_table(target, SCHEMA).sort_by(ORDER)):
        return cluster.Bucket(0, len(ids))
    store.write_table(made, target, SCHEMA, made_by, mark)
    return cluster.Bucket(len(anew), len(ids))


def open_buckets(arguments: Namespace, params: Params) -> Callable[[int], cluster.Bucket]:
    """What is done with a bucket, here or by a worker of a cluster."""
    images, folder = EMBED / arguments.encoder / "images", GRAPHS / arguments.encoder
    embedded = store.read_folder_header(images, "embed.nodes/1", params.dataset.buckets)
    embed_mark = embedded.fingerprint
    by_boxes = (embedded.params.get("regions") or {}).get("object") == "box"
    made_by = {**params.graphs.model_dump(), "embed": embed_mark}
    mark = store.fingerprint(SCHEMA, made_by)

    def link(bucket: int) -> cluster.Bucket:
        source, target = store.bucket_path(images, bucket), store.bucket_path(folder, bucket)
        return update_bucket(source, target, params.graphs, made_by, mark, by_boxes)

    return link


def main() -> None:
    arguments = cluster.add_bucket_engine(encoder_parser(__doc__)).parse_args()
    params = load_params(arguments.params)
    params.image_encoder(arguments.encoder)
    buckets, folder = params.dataset.buckets, GRAPHS / arguments.encoder
    if cluster.on_cluster(arguments):
        cluster.run_buckets(cluster.Job("stages.build_graphs", "open_buckets", arguments, params), [folder])
        return
    link, count = open_buckets(arguments, params), 0
    for bucket in tqdm(range(buckets), desc=f"link {arguments.encoder}", unit="bucket"):
        count += link(bucket).made
    store.remove_strays(folder, buckets)
    print(f"{folder}: {count} images linked anew")


if __name__ == "__main__":
    run(main)
