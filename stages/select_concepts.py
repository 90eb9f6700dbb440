"""Choose the concepts that tell classes apart: the concept bank of one encoder.

Reads   data/concepts/concepts.parquet, data/embed/NAME/text.parquet and images/, data/index/images.parquet (training
        images, and for the judgement the half of val that chooses); `select` of params.yaml.
Writes  data/bank/NAME.parquet (bank/1): every candidate a row, with its discriminability, and why it was dropped;
        data/bank/NAME.json: how many were kept, and whether they carry signal.
Costs   two matrix products over the training images and one of candidates with candidates: seconds for ten thousand.

How concepts are chosen stands in fieldmark/concepts/selection.py. What is kept is judged by fieldmark/concepts/gate.py
on the half of val that chooses (fieldmark/halves.py). Concepts without signal are told; `select.fallback` auto then
puts visual prototypes in their place, and prototypes does so whatever the verdict. Where no concept is kept and no
prototype made, the bank holds class names alone: methods that read no concept train as ever, and a warning says where
to look. Documents of a text graph have no pictures to choose by: their bank holds class names alone.

    python -m stages.select_concepts --encoder reef
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fieldmark import store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.concepts import gate
from fieldmark.concepts.selection import Selected, Texts, class_means, find_prototypes, read_texts, select_bank
from fieldmark.labels.splits import read_globals, read_split
from fieldmark.params import Select, load_params

INDEX = Path("data/index/images.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
EMBED = Path("data/embed")
BANK = Path("data/bank")
SCHEMA = "bank/1"
Row = dict[str, Any]


def warn(found: Row, fallback: str) -> None:
    """Say on stderr where there is no concept, or concepts carry no signal, and what to do."""
    if found["concepts"] == 0 and fallback == "none":
        print(
            f"warning: {CONCEPTS}: no concept was kept, so that no node gets a label, and methods that tell classes by"
            " their concepts do not train; see its drop_reason column, or set select.fallback to prototypes",
            file=sys.stderr,
        )
    if found["verdict"] in ("none", "weak") and fallback == "none":
        print(
            f"warning: {gate.VERDICTS[found['verdict']]}; set select.fallback to prototypes, or to auto, which acts on"
            " no signal at all, to put visual prototypes in their place",
            file=sys.stderr,
        )


def select_on_images(texts: Texts, images: Path, buckets: int, scale: float, settings: Select) -> Selected:
    """The bank that training images choose. Raises UserError where there is none."""
    train_images = read_split(INDEX, "train")
    if not train_images:
        raise UserError(f"{INDEX}: holds no training image; concepts are selected on them")
    train = read_globals(images, buckets, train_images)
    choose = read_globals(images, buckets, read_split(INDEX, "choose"))
    return select_bank(
        texts,
        class_means(*train),
        scale,
        settings,
        partial(gate.judge, train, choose),
        partial(find_prototypes, images, buckets, train_images, settings.per_class),
    )


def bank_of_documents(texts: Texts, dimension: int) -> Selected:
    """Class names alone: documents have no picture in whose space a concept could tell classes apart."""
    for row in texts.candidates:
        row.update(kept=False, drop_reason="documents have no picture that it could tell apart")
    rows = texts.names + texts.candidates
    vectors = np.array([texts.vector_of[row["concept_id"]] for row in rows], np.float32).reshape(-1, dimension)
    nobody = np.zeros((0, dimension), np.float32), np.zeros(0, dtype=object)
    return Selected(rows, vectors, [None] * len(rows), gate.judge(nobody, nobody, nobody[0], []))


def main() -> None:
    arguments = encoder_parser(__doc__).parse_args()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    settings, buckets = params.select, params.dataset.buckets
    images, text_path = EMBED / arguments.encoder / "images", EMBED / arguments.encoder / "text.parquet"
    image_header = store.read_folder_header(images, "embed.nodes/1", buckets)
    text_header = store.read_header(text_path, "embed.text/1")
    if image_header.params["encoder"] != text_header.params["encoder"]:
        raise UserError(f"{text_path}: is of another encoder than {images}; run embed_images and embed_text again")
    texts = read_texts(CONCEPTS, text_path)
    if store.are_documents(INDEX):
        bank = bank_of_documents(texts, next(iter(texts.vector_of.values())).shape[0])
        print(f"{arguments.encoder}: documents have no pictures to choose concepts by; the bank has class names alone")
    else:
        bank = select_on_images(texts, images, buckets, text_header.params["logit_scale"], settings)
        print(f"{arguments.encoder}: {gate.say(bank.judged)}")
        warn(bank.judged, settings.fallback)
    rows = bank.rows

    made_by = {
        **settings.model_dump(),
        "embed": image_header.fingerprint,
        "text": text_header.fingerprint,
        "index": store.read_header(INDEX, "index.images/1").fingerprint,
    }
    table = pa.table({
        "concept_idx": pa.array(range(len(rows)), pa.int32()),
        "concept_id": pa.array([row["concept_id"] for row in rows], store.TEXT),
        "text": pa.array([row["text"] for row in rows], store.TEXT),
        "class_ids": pa.array([sorted(row["class_ids"]) for row in rows], store.items(store.TEXT)),
        "kind": [row["kind"] for row in rows],
        "discriminability": pa.array(bank.gains, pa.float32()),
        "vector": store.vector_column(bank.vectors),
        "kept": [row["kept"] for row in rows],
        "drop_reason": pa.array([row["drop_reason"] for row in rows], store.TEXT),
    })
    path = BANK / f"{arguments.encoder}.parquet"
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by))
    kept = sum(row["kept"] for row in texts.candidates)
    prototypes = sum(row["kind"] == "proto" for row in rows)
    counts = {"candidates": len(texts.candidates), "kept": kept, "prototypes": prototypes}
    metrics = json.dumps({**counts, "judged": bank.judged}, indent=2)
    store.write_text(path.with_suffix(".json"), metrics + "\n")
    made = f", {prototypes} prototypes made" if prototypes else ""
    print(f"{path}: {kept} of {len(texts.candidates)} concepts kept, {len(texts.names)} name texts{made}")


if __name__ == "__main__":
    run(main)
