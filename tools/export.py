"""Write what the pipeline made for other tools: embeddings, graphs, predictions, a data set, a model card.

    --to          what, from whom                                               for
    safetensors   the embeddings of --encoder, a file                           NumPy, PyTorch, JAX
    webdataset    the same, a folder of tar shards by split and bucket          WebDataset
    pyg           the patch graphs of --encoder, a folder                       PyTorch Geometric
    coco          what --run predicts, a folder of JSON                         pycocotools, FiftyOne, LightlyStudio
    darwin-core   what --run predicts, a Darwin Core archive (zip)              GBIF, OBIS
    card          what --run is and how well it does, a Markdown file           Hugging Face, people
    dataset       images, labels, descriptions, concepts, a folder of Parquet   datasets, pandas, Polars, DuckDB

Reads   data/index/ and, for the format that is asked for, data/embed/NAME/images/, data/graphs/NAME/, data/thumbs/,
        data/runs/RUN/, data/concepts/, data/descriptions/; --to dataset also the pictures.
Writes  OUT alone, of the usable images of the index. Equal inputs give equal bytes.
Costs   seconds for ten thousand images; memory: some copies of one bucket, and for safetensors all that is written.

What is in each file: docs/exporting.md, and the module of tools/exports/ that writes it.

    python -m tools.export --to safetensors --encoder reef data/export/reef.safetensors
    python -m tools.export --to pyg --encoder reef data/export/graphs
    python -m tools.export --to coco --run linear_probe data/export/coco
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from evaluation.runs import read_logits
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Params, load_params
from tools.exports import card, coco, darwin_core, dataset, embeddings, graphs
from tools.exports.index import read_index
from tools.exports.new_pictures import read_new, with_size
from tools.exports.predictions import SPLITS, Source, find_run, read_said, temperature_of

Arguments = argparse.Namespace
# What each format needs, and which options it takes beside.
NEEDS = {
    "safetensors": "encoder", "webdataset": "encoder", "pyg": "encoder", "coco": "run", "darwin-core": "run",
    "card": "run", "dataset": None,
}  # fmt: skip
# What a data set of documents can be written as.
OF_DOCUMENTS = ("card", "dataset")
TAKES = {
    "view": ("safetensors", "webdataset", "pyg"),
    "thumbs": ("webdataset",),
    "split": ("coco", "darwin-core"),
    "predictions": ("coco", "darwin-core"),
    "manifest": ("coco", "darwin-core"),
    "media_url": ("darwin-core",),
    "with_images": ("dataset",),
}


def export_embeddings(params: Params, arguments: Arguments) -> str:
    params.image_encoder(arguments.encoder)
    source = embeddings.find_source(arguments.data, arguments.encoder, arguments.view or 0, params.dataset.buckets)
    if arguments.to == "safetensors":
        embeddings.write_safetensors(source, arguments.out)
    elif arguments.to == "webdataset":
        embeddings.write_shards(source, arguments.out, thumbs=bool(arguments.thumbs))
    else:
        graphs.write_graphs(source, arguments.out)
    return f"{len(source.images)} images of {source.nodes} nodes x {source.dimension}"


def export_predictions(params: Params, arguments: Arguments) -> str:
    data = arguments.data
    found, config = find_run(data, params, arguments.run)
    index = read_index(data, coco.COLUMNS if arguments.to == "coco" else darwin_core.COLUMNS)
    logits = read_logits(data, found)
    left_out: dict[str, int] = {}
    if arguments.predictions:
        said, left_out = read_new(arguments.predictions, arguments.manifest, found.classes)
        if arguments.to == "coco":
            folder = arguments.manifest.parent if arguments.manifest else Path()
            said = [with_size(each, folder) for each in tqdm(said, desc="sizes", unit="image")]
    else:
        said = list(read_said(index, found, logits, arguments.split or "val"))
    temperature = temperature_of(found, logits)
    source = Source(found.name, config["method"], found.encoder, found.mark, temperature)
    if any(each.split == "test" for each in said):
        print("images of test are among them: whoever looks and then changes something tunes on test", file=sys.stderr)
    if arguments.to == "coco":
        written = coco.write_coco(data, arguments.out, index, source, said)
    else:
        written = darwin_core.write_archive(arguments.out, index, source, said, arguments.media_url)
    return "; ".join([written, *(f"{rows} left out: {why}" for why, rows in left_out.items())])


def export_card(params: Params, arguments: Arguments) -> str:
    found, config = find_run(arguments.data, params, arguments.run)
    index = read_index(arguments.data, ["licence"])
    return card.write_card(arguments.data, arguments.out, params, index, found, config)


def export_dataset(params: Params, arguments: Arguments) -> str:
    index = read_index(arguments.data, dataset.COLUMNS)
    folder, all_pictures = params.dataset.folder, bool(arguments.with_images)
    return dataset.write_dataset(arguments.data, arguments.out, folder, index, all_pictures=all_pictures)


EXPORTS: dict[str, Callable[[Params, Arguments], str]] = {
    "safetensors": export_embeddings, "webdataset": export_embeddings, "pyg": export_embeddings,
    "coco": export_predictions, "darwin-core": export_predictions, "card": export_card, "dataset": export_dataset,
}  # fmt: skip


def read_arguments() -> Arguments:
    """Options that a format does not take are refused, not passed over."""
    parser = stage_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="where the stages wrote")
    parser.add_argument("--to", required=True, choices=tuple(NEEDS), help="what to write")
    parser.add_argument("--encoder", help="a name under `encoders` or `towers` in params.yaml")
    parser.add_argument("--run", help="a name under `train.runs`")
    parser.add_argument("--view", type=int, metavar="N", help="which view of each image (default: 0, as it is)")
    parser.add_argument("--thumbs", action="store_true", default=None, help="a thumbnail beside each image's vectors")
    said = "of which images (default: val, the half that chose nothing; whoever looks at test tunes on it)"
    parser.add_argument("--split", choices=SPLITS, help=said)
    said = "new pictures in the place of the data set's: a Parquet file of tools.predict for this run"
    parser.add_argument("--predictions", type=Path, metavar="FILE", help=said)
    said = "more of these pictures: the manifest that tools.predict was given"
    parser.add_argument("--manifest", type=Path, metavar="FILE", help=said)
    said = "where the pictures are to be found: an address that a path is put behind"
    parser.add_argument("--media-url", metavar="URL", help=said)
    said = "pictures whose licence does not allow it too: you may pass them on"
    parser.add_argument("--with-images", action="store_true", default=None, help=said)
    parser.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write")
    arguments = parser.parse_args()
    for name in ("encoder", "run"):
        given, needed = getattr(arguments, name) is not None, NEEDS[arguments.to] == name
        if needed and not given:
            parser.error(f"--to {arguments.to} needs --{name}")
        if given and not needed:
            parser.error(f"--to {arguments.to} takes no --{name}")
    for name, formats in TAKES.items():
        if getattr(arguments, name) is not None and arguments.to not in formats:
            parser.error(f"--{name.replace('_', '-')} goes with --to {' or '.join(formats)}")
    if arguments.predictions and arguments.split:
        parser.error("--split is of the data set's pictures, --predictions of new ones")
    if arguments.manifest and not arguments.predictions:
        parser.error("--manifest goes with --predictions: the index has what the data set says")
    return arguments


def main() -> None:
    arguments = read_arguments()
    params = load_params(arguments.params)
    if params.dataset.format == "text_graph" and arguments.to not in OF_DOCUMENTS:
        what = f"the data set is of documents, and --to {arguments.to} is of pictures"
        raise UserError(f"{arguments.params}: dataset.format: {what}; choose one of: {', '.join(OF_DOCUMENTS)}")
    try:
        said = EXPORTS[arguments.to](params, arguments)
    except OSError as error:
        raise UserError(f"{arguments.out}: cannot be written: {error.strerror}") from None
    print(f"{arguments.out}: {said}")


if __name__ == "__main__":
    run(main)
