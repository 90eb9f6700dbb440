"""Ask a vision model what each image shows, without telling it what the image is of.

Reads   data/index/images.parquet and its images with status ok as `dataset` says, data/index/classes.parquet (to find
        names in answers), the prompt `describe.prompt`, where cells are asked about `describe.cell_prompt`, params:
        domain, dataset, llm, describe; where describe.share is below 1 the vectors of pictures that describe.by names;
        of a text graph nodes.csv in `dataset.root`.
Writes  data/descriptions/answers.parquet (llm.answers/1): one row an image and one a cell, failed ones too;
        data/descriptions/descriptions.parquet (descriptions/1): the sentences; names of classes, superclasses and
        lineages, and `aliases`, are masked (fieldmark/concepts/names.py; the report says what is left of them);
        data/descriptions/cells.parquet (descriptions.cells/1): what was said of cells, masked alike; empty where
        `describe.nodes` names none; data/descriptions/metrics.json: rows, tokens and cost in sum.
Costs   llm.mode live or batch: one call for each image or cell whose answer is held neither there nor in the journal,
        which lies in .cache/ of the original checkout of an experiment or worktree (or in $FIELDMARK_CACHE); see
        --dry-run. llm.mode replay, or describe.enabled false: nothing. Of several runs at a time one asks and the
        others wait for its answers. Memory does not grow with the images' sizes: a picture is opened when it is its
        turn. It grows by a key and a few places an image: items, rows and sentences are made, read and written a row
        group at a time (bench/llm_batch.py).

The image goes as a JPEG of at most describe.image_px; no class, folder or file name leaves this machine.

With `describe.share` below 1 the most informative pictures alone are asked about (fieldmark/informative.py): chosen
among all, by vectors and without labels. The others have no row. Each item is what it would be without a share, and a
smaller share is part of a larger one as long as pictures and vectors stay: raising it pays for the new ones.

Documents of a text graph need no model: their titles and sentences are written to descriptions.parquet as they stand in
the data set, nothing masked, and nobody is asked (fieldmark/documents.py).

`describe.nodes` cuts each picture into cells besides, [3] into 3 x 3, and asks about each by a call of its own, at ten
times the price. A cell is cut at full sharpness, so a picture is decoded anew for each. Cells are of the picture as it
is, whatever part of it an encoder sees.

    python -m stages.describe_images
    python -m stages.describe_images --dry-run
"""

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.concepts.names import MASK_RULES, Keys, NameMask, domain_words
from fieldmark.documents import RULES as DOCUMENT_RULES
from fieldmark.documents import Document, read_documents
from fieldmark.llm.answers import Item, check_coverage, keep_answers
from fieldmark.llm.held import SCHEMA, Made, Named
from fieldmark.llm.pictures import JPEG_QUALITY, as_sent, image_part, with_part
from fieldmark.llm.prompts import Prompt, load_prompt
from fieldmark.llm.questions import Question, ask, foresee, read_answers, write_answers
from fieldmark.llm.replay import replay
from fieldmark.llm.said import tidy
from fieldmark.lock import refuse_cold_start, refuse_old_index
from fieldmark.params import Params, load_params
from fieldmark.pictures.boxes import Box, cut_windows
from fieldmark.pictures.cuts import Places

STAGE = "describe_images"
IMAGES = Path("data/index/images.parquet")
CLASSES = Path("data/index/classes.parquet")
ANSWERS = Path("data/descriptions/answers.parquet")
DESCRIPTIONS = Path("data/descriptions/descriptions.parquet")
CELLS = Path("data/descriptions/cells.parquet")
METRICS = Path("data/descriptions/metrics.json")
CELL_SCHEMA = "descriptions.cells/1"
Row = dict[str, Any]


def choose_images(image_ids: list[str], params: Params) -> tuple[list[str], list[str]]:
    """Which of the sorted image_ids are described, sorted; and the fingerprints of what that was chosen by.

    Raises UserError where `describe.by` lacks one of them.
    """
    by, buckets = Path(params.describe.by), params.dataset.buckets
    if params.describe.share == 1 or not image_ids:
        return image_ids, []
    # torch takes two seconds to import, and a choice alone needs it.
    import torch

    from fieldmark import informative

    mark = store.read_folder_header(by, "embed.nodes/1", buckets).fingerprint
    # A bucket at a time: of its rows, most are of parts of pictures.
    table = pa.concat_tables([whole_pictures(store.bucket_path(by, bucket)) for bucket in range(buckets)])
    place = pc.index_in(pa.array(image_ids), value_set=table["image_id"].combine_chunks())
    if place.null_count:
        what = f"{by}: lacks {place.null_count} of {len(image_ids)} pictures"
        raise UserError(f"{what}; run embed_images again (dvc repro)")
    vectors = torch.from_numpy(store.vectors_of(table)[place.to_numpy()]).float()
    count = informative.budget(len(image_ids), params.describe.share)
    chosen = informative.most_informative(vectors, image_ids, count, informative.cluster_count(len(image_ids)))
    return sorted(image_ids[place] for place in chosen.tolist()), [mark]


def whole_pictures(path: Path) -> pa.Table:
    """image_id and vector of whole pictures in view 0, of a bucket of embed.nodes/1."""
    table = store.read_table(path, "embed.nodes/1", ["image_id", "view", "node", "vector"])
    return table.filter(pc.and_(pc.equal(table["view"], 0), pc.equal(table["node"], 0)))


def items_of(image_ids: Sequence[str], prompt: Prompt, params: Params) -> Sequence[Item]:
    """One item an image, its image at the end of the last message."""
    messages = prompt.render({**params.domain.model_dump(), "sentences": params.describe.sentences})
    px = params.describe.image_px
    return Made(image_ids, lambda image_id: Item(image_id, 0, with_part(messages, image_part(image_id, px))))


class Cell(NamedTuple):
    """A cell of a picture, which is asked about by itself."""

    image_id: str
    number: int
    box: Box

    @property
    def subject(self) -> str:
        return f"{self.image_id}#{','.join(f'{side:g}' for side in self.box)}"


def cells_of(image_ids: Sequence[str], nodes: Sequence[int]) -> list[Cell]:
    """The cells of each image: n x n for each n of `nodes`, once, row by row. A box is written with four decimals."""
    windows = [window for count in dict.fromkeys(nodes) for window in cut_windows((0, 0, 1, 1), count)]
    sides = np.round(np.array(windows, dtype=np.float64).reshape(-1, 4), 4).tolist()
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in sides]
    return [Cell(one, number, box) for one in image_ids for number, box in enumerate(boxes, start=1)]


def cell_items(cells: Sequence[Cell], prompt: Prompt, params: Params) -> Sequence[Item]:
    """One item a cell; its box stands beside the image that it is cut from."""
    messages = prompt.render({**params.domain.model_dump(), "sentences": params.describe.cell_sentences})
    px = params.describe.image_px

    def make(cell: Cell) -> Item:
        return Item(cell.subject, 0, with_part(messages, image_part(cell.image_id, px, cell.box)))

    return Made(cells, make)


def descriptions_of(
    answers: Iterable[Row], mask: NameMask, most: int | None, masked: Counter[Path], target: Path
) -> Iterator[Row]:
    """Rows of descriptions/1 from the answers that are ok, in their order. Counts in `masked`, for `target`, the names
    of classes that were masked.

    Of an answer that a model gave the first `most` sentences (None: all), none longer than said.LONGEST.
    """
    for answer in answers:
        if answer["status"] != "ok":
            continue
        said = json.loads(answer["response_json"])["sentences"]
        said = said[:most] if answer["source"] in ("live", "batch") else said
        for rank, sentence in enumerate(filter(None, map(tidy, said))):
            text, found = mask.apply(sentence)
            masked[target] += found
            yield {"image_id": answer["subject_id"], "rank": rank, "text": text}


def document_rows(documents: Sequence[Document], used: Collection[str]) -> Iterator[Row]:
    """Rows of descriptions/1, sorted: title and sentences of each document whose image_id is used, once."""
    by_id = {image_id: document for document in documents if (image_id := document.image_id) and image_id in used}
    for image_id in sorted(by_id):
        for rank, text in by_id[image_id].sentences:
            yield {"image_id": image_id, "rank": rank, "text": text}


def cell_rows(described: Iterable[Row], nodes: Sequence[int]) -> Iterator[Row]:
    """Rows of descriptions.cells/1, sorted, from those of descriptions_of, whose image_id is the subject of a cell.
    Those of one image stand together."""
    known = {cell.subject: cell for cell in cells_of([""], nodes)}
    for image_id, of_image in groupby(described, lambda row: row["image_id"].partition("#")[0]):
        rows = []
        for row in of_image:
            cell = known[row["image_id"].removeprefix(image_id)]
            sides = dict(zip(("x0", "y0", "x1", "y1"), cell.box, strict=True))
            rows.append({**row, "image_id": image_id, "cell": cell.number, **sides})
        yield from sorted(rows, key=lambda row: (row["cell"], row["rank"]))


def kept_answers(kind: str, *columns: str) -> Iterator[Row]:
    """The rows of answers.parquet about `images`, or about `cells`, in its order: subject_id and some columns."""
    for row in read_answers(ANSWERS, ["subject_id", *columns]):
        if ("#" in row["subject_id"]) == (kind == "cells"):
            yield row


def cell_params(prompt: Prompt | None, params: Params) -> dict[str, Any]:
    """What decides what is said of cells, beside what decides what is said of pictures; empty where none is asked."""
    if prompt is None:
        return {}
    settings = params.describe
    return {"nodes": settings.nodes, "cell_prompt_sha": prompt.sha, "cell_sentences": settings.cell_sentences}


def content_params(prompt: Prompt, params: Params) -> dict[str, Any]:
    """What decides the answers' content: not where, how fast or with what limits they are asked for."""
    if not params.describe.enabled:
        return {"enabled": False}
    share = {} if params.describe.share == 1 else {"share": params.describe.share}
    return share | {
        "enabled": True,
        "prompt_sha": prompt.sha,
        "domain": params.domain.model_dump(),
        "model": params.llm.model,
        "temperature": params.llm.temperature,
        "image_px": params.describe.image_px,
        "jpeg_quality": JPEG_QUALITY,
        "sentences": params.describe.sentences,
    }


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print calls, tokens and price, and call nobody")
    args = parser.parse_args()
    params = load_params(args.params)
    prompt = load_prompt(params.describe.prompt)
    for table in (IMAGES, CLASSES):
        refuse_old_index(table, params.dataset, args.params)
    upstream = store.read_header(IMAGES, "index.images/1").fingerprint
    images = store.read_table(IMAGES, "index.images/1", ["path", "image_id", "status", "box"])
    classes_mark = store.read_header(CLASSES, "index.classes/2").fingerprint
    classes = store.read_table(CLASSES, "index.classes/2").to_pylist()

    places = Places(params.dataset.folder, images.filter(pc.equal(images["status"], "ok")).drop_columns("status"))
    del images
    wanted, chosen_by = choose_images(sorted(places), params) if params.describe.enabled else ([], [])
    items = items_of(wanted, prompt, params)
    questions = {"images": Question(prompt, items)}
    # Without cells nothing of the second prompt is read, and everything is as it was before there were any.
    cells, cell_prompt = list[Cell](), None
    if params.describe.enabled and params.describe.nodes:
        cells, cell_prompt = cells_of(wanted, params.describe.nodes), load_prompt(params.describe.cell_prompt)
        questions["cells"] = Question(cell_prompt, cell_items(cells, cell_prompt, params))
    if params.llm.mode == "import" and params.describe.enabled:
        raise UserError(
            "params.yaml: describe.enabled: descriptions cannot be imported yet; set it to false, or llm.mode to live,"
            " batch or replay"
        )
    if params.llm.mode in ("live", "batch") and params.describe.enabled:
        refuse_cold_start(ANSWERS)
        if args.dry_run:
            print(foresee(STAGE, questions, params.llm, ANSWERS))
            return
        asked = ask(STAGE, questions, params.llm, ANSWERS, attach=lambda item: as_sent(item, places))
        answered: dict[str, Sequence[Row]] = dict(asked)
    else:
        if args.dry_run:
            why = f"llm.mode {params.llm.mode}" if items else "describe.enabled false"
            print(f"{STAGE}: {sum(len(each.items) for each in questions.values())} items, 0 calls ({why})")
            return
        answered = {
            kind: replay(each.items, "image_id" if kind == "images" else "subject_id", each.prompt, params.llm)
            for kind, each in questions.items()
            if each.items
        }
        keep_answers(STAGE, ANSWERS, [])

    content = content_params(prompt, params)
    # Cells change nothing of what is said of pictures.
    of_pictures = store.fingerprint(SCHEMA, content, [upstream, *chosen_by])
    content |= cell_params(cell_prompt, params)
    mark = store.fingerprint(SCHEMA, content, [upstream, *chosen_by])
    write_answers(list(answered.values()), ANSWERS, content, mark, METRICS)

    card = domain_words(params.domain.noun, params.domain.group, *params.domain.attributes)
    mask = NameMask(Keys.of(classes, card), params.domain.noun)
    said, masked = ("status", "source", "response_json"), Counter[Path]()
    documents = params.dataset.format == "text_graph"
    if documents:
        described = document_rows(read_documents(Path(params.dataset.root)), places)
    else:
        of_images, most = kept_answers("images", *said), params.describe.sentences
        described = descriptions_of(of_images, mask, most, masked, DESCRIPTIONS)
    schema = "descriptions/1"
    content = {"domain": params.domain.model_dump(), "rules": MASK_RULES}
    if documents:
        content = {"documents": DOCUMENT_RULES}
    table_mark = store.fingerprint(schema, content, [of_pictures, classes_mark])
    store.write_rows(described, DESCRIPTIONS, schema, content, table_mark)
    content |= {"nodes": params.describe.nodes if cells else []}
    table_mark = store.fingerprint(CELL_SCHEMA, content, [mark, classes_mark])
    of_cells = descriptions_of(kept_answers("cells", *said), mask, params.describe.cell_sentences, masked, CELLS)
    store.write_rows(cell_rows(of_cells, params.describe.nodes), CELLS, CELL_SCHEMA, content, table_mark)
    if masked.total():
        what = f"{masked.total()} names of classes or their groups in the answers"
        where = f"{DESCRIPTIONS}{f' and {CELLS}' if masked[CELLS] else ''}"
        print(f"{STAGE}: {what} are masked in {where}", file=sys.stderr)
    names = {
        "images": Named(wanted, lambda subject: called(subject, places)),
        "cells": Named([cell.subject for cell in cells], lambda subject: called(subject, places)),
    }
    # Kind by kind: there are many cells to a picture, and they would outvote pictures of which none is described.
    for kind in answered:
        check_coverage(kept_answers(kind, "status", "response_json"), names[kind], params.llm, ANSWERS)


def called(subject: str, places: Places) -> str:
    """What people call a picture, or a cell of it."""
    image_id, _, box = subject.partition("#")
    return f"{places.path_of(image_id)}{f' at {box}' if box else ''}"


if __name__ == "__main__":
    run(main)
