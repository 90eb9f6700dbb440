"""Print docs/contracts.md: what the pipeline writes as Parquet, schema by schema, from the code that writes it.

Reads   fieldmark/store.py and training/runs.py: schemas, keys, types and nulls are what they are there. What a file, a
        row and a column mean is said here (ABOUT), for each column of them.
Writes  to stdout, Markdown.
Costs   seconds: it imports PyTorch.

    python -m tools.contracts > docs/contracts.md
"""

import argparse
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from fieldmark.command import run
from fieldmark.store import COLUMNS, KEYS, arrow_schema
from training.data import Cache, Parts
from training.runs import SCHEMA as PREDICTIONS
from training.runs import predictions_table


class About(NamedTuple):
    """What the code of a schema does not say."""

    file: str  # where its tables lie
    row: str  # what a row is of
    columns: dict[str, str]  # what each column means


HEAD = """\
# Contracts

Made by `python -m tools.contracts`: do not edit this page, edit `fieldmark/store.py` and run the command again.

Every stage talks to the next one through Parquet files, and every file keeps a contract: a schema with a version. A
reader refuses a file of another version, with one line that says which stage to run.

**Header.** The metadata of a file hold `schema`, `fingerprint` and `params` (canonical JSON), and nothing that changes
from run to run: no time, no host, no absolute path. The fingerprint hashes the schema, the parameters that change
content and the fingerprints of what was read. So equal inputs give equal bytes.

**Rows** are sorted by the key. Pages carry checksums, which readers verify: a flipped bit is an error.

**Buckets.** Where a file is named `bNNN.parquet`, the images are spread over `dataset.buckets` files: an image is in
bucket `int(image_id[:8], 16) % buckets`. All buckets exist, empty ones too. One image more changes one bucket.

**Words.** ENCODER is a name under `encoders` or `towers` of params.yaml, RUN one under `train.runs`. D is the number of
dimensions of an encoder, C the number of classes. A column may be null only where its type says so."""

IMAGE = "the image: sha256 of the file's bytes"
VIEW = "0 is the picture as it is, 1, 2, ... are augmented views"
NODE = "its number within the view; 0 is the whole picture"

ABOUT = {
    "index.images/1": About(
        "data/index/images.parquet",
        "A file of the data set, or a box of one, usable or not.",
        {
            "path": "from the folder of the images; `FILE#ID`: the picture is that box of FILE, as all else is;"
            " `FILM/1fps/000012.jpg`, `SHARD.parquet/17`: it lies in that file (fieldmark/pictures/held.py)",
            "image_id": "sha256 of the file's bytes (of these and of the box); equal files share it; null: unreadable",
            "class_id": "of index.classes",
            "split": "train, val or test",
            "width": "pixels, after the picture's own orientation",
            "height": "pixels, likewise",
            "status": "ok, duplicate (an equal file is used), conflict (equal files of two classes) or broken",
            "error": "why it is not used",
            "dhash": "64-bit difference hash, for near duplicates",
            "duplicate_of": "the path of the equal file that is used",
            "box": "x0, y0, x1, y1 of the object in [0, 1], where known; of `FILE#ID` the box within FILE",
            "group": "track, camera or site; a sequence by the image_id of its first picture",
            "captured_at": "as the manifest says",
            "latitude": "degrees",
            "longitude": "degrees",
            "depth_m": "metres under water",
            "licence": "as the manifest says",
        },
    ),
    "index.classes/2": About(
        "data/index/classes.parquet",
        "A class.",
        {
            "class_id": "a name that can be a folder's",
            "name": "as people write it",
            "superclass": "the group in which it has siblings",
            "scientific_name": "of the species, where the data set gives it",
            "lineage": "ranks from the highest down",
            "aliases": "other names, which give it away as its own does; urn:lsid:marinespecies.org:taxname:AphiaID",
            "note": "a remark that prompts may use",
            "from_images": "whether the data set has images of it",
        },
    ),
    "index.parts/1": About(
        "data/index/parts.parquet",
        "A part of an object in an image, where the data set marks parts; else the table is empty.",
        {
            "path": "of index.images",
            "part": "its name in the data set",
            "x": "its centre in [0, 1] of the image",
            "y": "likewise",
            "visible": "whether the picture shows it",
            "box": "x0, y0, x1, y1 in [0, 1]",
        },
    ),
    "index.attributes/1": About(
        "data/index/attributes.parquet",
        "What the data set says of a class; else the table is empty.",
        {"class_id": "of index.classes", "attribute": "its name", "value": "what the class has of it"},
    ),
    "index.near_duplicates/1": About(
        "data/index/near_duplicates.parquet",
        "Two usable images that look alike.",
        {"path": "of index.images", "other": "of index.images", "bits": "in which their dhashes differ"},
    ),
    "index.links/1": About(
        "data/index/links.parquet",
        "An edge of a text graph; of pictures the table is empty.",
        {
            "src": "the path of the document that it leads from, in index.images",
            "dst": "the path of the one that it leads to",
            "weight": "how much it counts, 1 where the data do not say",
            "kind": "as the data call it, or `given`",
        },
    ),
    "thumbs/1": About(
        "data/thumbs/bNNN.parquet",
        "The thumbnail of a usable image: all that the report needs of the pictures.",
        {"image_id": IMAGE, "webp": "a WebP picture of 192 pixels at most"},
    ),
    "llm.answers/1": About(
        "data/concepts/answers.parquet, data/descriptions/answers.parquet, data/asked/NAME/answers.parquet",
        "What came of one question to a model, failed ones too.",
        {
            "item_key": "hash of what was asked and of whom",
            "subject_id": "a class_id, two with a space between, an image_id, or that of a cell: IMAGE_ID#X0,Y0,X1,Y1;"
            " `*` for texts of no class",
            "sample": "which of several answers to one question",
            "prompt_sha": "sha256 of the prompt's file",
            "status": "ok, refused, invalid, truncated or error",
            "response_json": "the answer, or what there is to know of the failure",
            "model_requested": "`llm.model`",
            "model_reported": "what the server says that it ran",
            "response_id": "the server's",
            "finish_reason": "the server's",
            "input_tokens": "of all calls of the item",
            "output_tokens": "likewise",
            "cost_usd": "by `llm.prices`",
            "attempts": "calls made",
            "source": "live, batch, replay, import or edited",
            "created_at": "when it was answered",
        },
    ),
    "descriptions/1": About(
        "data/descriptions/descriptions.parquet",
        "A sentence of an image's description, class names masked.",
        {"image_id": IMAGE, "rank": "its place in the description", "text": "the sentence"},
    ),
    "descriptions.cells/1": About(
        "data/descriptions/cells.parquet",
        "A sentence about a cell of an image (`describe.nodes`), class names masked. No row where nothing was seen.",
        {
            "image_id": IMAGE,
            "cell": "counted from 1, row by row, through the grids of `describe.nodes` in their order",
            "x0": "its box in [0, 1] of the full image: left",
            "y0": "top",
            "x1": "right",
            "y1": "bottom",
            "rank": "its place in what was said of the cell",
            "text": "the sentence",
        },
    ),
    "asked/1": About(
        "data/asked/NAME/texts.parquet",
        "A string of an answer to a question of your own, NAME under `ask` in params.yaml. The header's `params` name\n"
        "the prompt's `subject`, the field that holds `guesses` of classes, whether other fields were masked (`mask`)\n"
        "and whether the prompt was `told` the class of an image or text, so that its texts know the label.",
        {
            "subject_id": "of what was asked about: an image_id, a class_id, or two of either with a space between",
            "sample": "of several answers",
            "field": "where it stands in the answer: the keys that lead there, with a dot between them",
            "rank": "its place, from 0, among what stands there",
            "text": "on one line; names of classes masked but in guesses",
        },
    ),
    "concepts/1": About(
        "data/concepts/concepts.parquet",
        "A text of an answer, or a class name in one of `clean.name_templates`; kept or not.",
        {
            "concept_id": "sha256 of the text",
            "text": "the text itself",
            "class_id": "null for a text of no class",
            "kind": "name, visual, habitat or generic",
            "part": "the part of the object that it speaks of, where the answer says so",
            "rank": "its place among the texts of the class",
            "kept": "whether it goes on to the encoder",
            "drop_reason": "why not",
            "item_key": "the answer that it comes from",
        },
    ),
    "embed.nodes/1": About(
        "data/embed/ENCODER/images/bNNN.parquet",
        "A node of an image in one view.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "node": NODE,
            "kind": "global, object, token, grid or crop",
            "x0": "its box in [0, 1] of the full image: left",
            "y0": "top",
            "x1": "right",
            "y1": "bottom",
            "flip": "whether the view is mirrored",
            "norm": "the length that the vector had",
            "vector": "of unit length, or 0 with norm 0",
        },
    ),
    "embed.tokens/1": About(
        "data/embed/ENCODER/tokens/bNNN.parquet",
        "What one layer of an image tower holds of one view, not projected and not of unit length.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "layer": "counted from 0; `head`, what the projection takes, is one past the last",
            "grid_h": "cells from top to bottom",
            "grid_w": "cells from left to right",
            "width": "numbers a cell",
            "vectors": "grid_h x grid_w x width numbers, row by row",
            "cls": "the CLS token, where the tower has one",
            "rollout": "heads x cells, in the row of the last layer but one, where it is asked for",
        },
    ),
    "embed.moments/1": About(
        "data/embed/ENCODER/moments/NAME/bNNN.parquet",
        "A vector of one view, made before the projection or, as a control, of projected tokens: NAME is a key of\n"
        "`moments.ENCODER`, and D is its own.\n"
        "`basis.safetensors` beside the buckets holds `mean` (d) and `directions` (d, p) where the kind has them;\n"
        "`data/embed/ENCODER/projection.safetensors` holds `weight` and `bias` of a linear head: the global embedding\n"
        "is weight @ pooled + bias. It has no tensor where the head is not linear, or projects nothing.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "layer": "whose tokens it is made of, counted from 0; null for the pooled vector",
            "kind": "pooled, isqrt, bilinear, mean or max; one in a folder",
            "vector": "not of unit length",
        },
    ),
    "maps/1": About(
        "data/first_looks/NAME/maps.parquet",
        "Where the first look NAME of `train.first_looks` wants more pixels of a view, for one of two pictures of it.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "branch": "complementary or discriminative: what the classifier had not needed yet, or what decided it",
            "side": "nodes a side, the first and the last on the borders of what the encoder sees of the view",
            "values": "side x side numbers, row by row: how dense pixels shall lie; the largest of a map is 1",
        },
    ),
    "again/1": About(
        "data/again/NAME/bNNN.parquet",
        "A picture of one view, resampled as the first look NAME of `train.first_looks` asks for, in an encoder.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "branch": "complementary or discriminative, as in maps",
            "vector": "pooled, before the projection, as `pooled` of embed.moments; not of unit length",
        },
    ),
    "embed.text/1": About(
        "data/embed/ENCODER/text.parquet, data/asked/NAME/vectors/ENCODER.parquet",
        "A text in the space of the images.",
        {
            "text_id": "sha256 of the text",
            "text": "the text itself",
            "kind": "name, concept, description or asked",
            "n_tokens": "that the text has",
            "truncated": "whether it has more than the encoder reads",
            "vector": "of unit length",
        },
    ),
    "embed.controls/1": About(
        "data/embed/ENCODER/controls.parquet",
        "A text that says nothing of the classes, for controls.",
        {
            "kind": "unrelated or random",
            "class_id": "of a random one",
            "rank": "its place among those of its kind and class",
            "text": "the text itself",
            "vector": "of unit length",
        },
    ),
    "bank/1": About(
        "data/bank/ENCODER.parquet",
        "A text of the concept bank, or a visual prototype; kept or not.",
        {
            "concept_idx": "counts from 0 without a gap: what labels refer to",
            "concept_id": "of concepts; null for a prototype",
            "text": "the text itself; null for a prototype",
            "class_ids": "its owners: the classes that it was written for",
            "kind": "name, visual, habitat, generic or proto",
            "discriminability": "how well it tells classes apart, in nats; null for a name",
            "vector": "of unit length",
            "kept": "whether it labels nodes",
            "drop_reason": "why not",
        },
    ),
    "labels/1": About(
        "data/labels/ENCODER/bNNN.parquet",
        "What a node shows, in concepts.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "node": NODE,
            "concept_idx": "rows of the bank, the heaviest first",
            "concept_weight": "of each, together at most 1",
            "entropy": "of the weights over all kept concepts, in nats",
            "density": "how much the node is worth, in [0, 1]",
            "selected": "whether it is among the nodes chosen for the image",
            "ring_gains": "on node 0: information over rings about the densest place",
            "selected_concepts": "on node 0: the concepts chosen for the image, best first",
        },
    ),
    "graphs/1": About(
        "data/graphs/ENCODER/bNNN.parquet",
        "The graph of an image in one view: lists of edges, each edge in both directions, without loops.",
        {
            "image_id": IMAGE,
            "view": VIEW,
            "src": "node that an edge starts from",
            "dst": "node that it leads to",
            "spatial": "weight by distance in the picture, 0 where that rule made none",
            "semantic": "weight by cosine, 0 where that rule made none",
        },
    ),
    "links/1": About(
        "data/links/NAME.parquet",
        "A link between two images or documents, of whatever split: a message flows from `src` to `dst`. Of kinds\n"
        "`knn` and `text`, `src` is one of the k nearest to `dst`. The header's `params` say under `sources` which\n"
        "files the vectors came from, and what these said of themselves.",
        {
            "src": "image_id of who sends",
            "dst": "image_id of who receives",
            "weight": "the cosine (knn, text), 1 (group), or what the data give",
            "kind": "knn, text, group, or what the data call it (`given` where they do not)",
        },
    ),
    "options/1": About(
        "data/studies/foci/NAME/options.parquet",
        "A question with four options about an image (tools/foci.py). The header's `params` name who mined them, what\n"
        "the miner stands on, the split and the seed that drew their order.",
        {
            "image_id": IMAGE,
            "path": "of index.images",
            "options": "class_ids, in the order in which they are shown",
            "names": "of these classes",
            "answer": "the place of the true class among them, from 0",
            "miner_says": "the class_id that the miner answers",
        },
    ),
    PREDICTIONS: About(
        "data/runs/RUN/predictions.parquet, data/studies/NAME/RUN/predictions.parquet",
        "What a run says of an image, for one seed. `params.classes` of the header names the classes in their order.\n"
        "Pages of this file carry no checksums.",
        {
            "path": "of index.images",
            "split": "train, test, and of val the half that chose (choose) and the half that is reported (val);"
            " or as a study's regime has it; held_out in a fold",
            "seed": "of the fit",
            "class_id": "the true class",
            "logits": "one a class",
        },
    ),
}  # fmt: skip


def schemas() -> dict[str, pa.Schema]:
    """Every contract by name; a dimension that is known when a table is written counts as 1."""
    found = {name: arrow_schema(name, 1 if has_vectors(name) else None) for name in COLUMNS}
    nothing = Cache(
        classes=["one"], paths=[], image_ids=[], groups=[], split=np.zeros(0, dtype=str),
        y=torch.zeros(0, dtype=torch.long), target=torch.zeros(0, dtype=torch.long), views=1, parts=Parts([]),
        fingerprints={},
    )  # fmt: skip
    return {**found, PREDICTIONS: predictions_table(0, np.zeros((0, 0)), nothing).schema}


def has_vectors(name: str) -> bool:
    return any(field.name == "vector" for field in COLUMNS[name])


def type_in_words(kind: pa.DataType, nullable: bool, length: str) -> str:
    """A type as a reader writes it; `length` is how many numbers a list of fixed size has."""
    if pa.types.is_fixed_size_list(kind):
        words = f"{float_in_words(kind.value_type)}[{length}]"
    elif pa.types.is_list(kind):
        words = f"list of {float_in_words(kind.value_type)}"
    else:
        words = float_in_words(kind)
    return f"{words} or null" if nullable else words


def float_in_words(kind: pa.DataType) -> str:
    """Arrow calls float16 halffloat, float32 float and float64 double."""
    return {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}.get(kind, str(kind))


def section(name: str, schema: pa.Schema) -> str:
    """A contract as Markdown."""
    about, length = ABOUT[name], "C" if name == PREDICTIONS else "D"
    key = ", ".join(f"`{column}`" for column in KEYS.get(name, []))
    lines = [f"## {name}", "", about.row, "", f"File: {', '.join(f'`{file}`' for file in about.file.split(', '))}."]
    lines += [f"Key: {key}." if key else "Rows stand seed by seed, and for each seed in the order of the paths.", ""]
    lines += ["| column | type | |", "|---|---|---|"]
    for field in schema:
        # What the trainer writes has no null, though its schema does not say so.
        nullable = field.nullable and name != PREDICTIONS
        kind = type_in_words(field.type, nullable, length)
        lines.append(f"| `{field.name}` | {kind} | {about.columns[field.name]} |")
    return "\n".join(lines)


def page() -> str:
    """docs/contracts.md."""
    return "\n\n".join([HEAD, *(section(name, schema) for name, schema in schemas().items())]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(page(), end="")


if __name__ == "__main__":
    run(main)
