"""Choose the concepts that tell classes apart: the concept bank of one encoder.

Reads   data/concepts/concepts.parquet, data/embed/NAME/text.parquet and images/, data/index/images.parquet (training
        images, and validation images for the judgement); `select` of params.yaml.
Writes  data/bank/NAME.parquet (bank/1): every candidate a row, with its discriminability, and why it was dropped;
        data/bank/NAME.json: how many were kept, and whether they carry signal.
Costs   two matrix products over the training images and one of candidates with candidates: seconds for ten thousand.

How concepts are chosen stands in fieldmark/concepts/selection.py. What is kept is judged on validation images
(fieldmark/concepts/gate.py). Concepts without signal are told; `select.fallback` auto then puts visual prototypes in
their place, and prototypes does so whatever the verdict. Where no concept is kept and no prototype made, the bank holds
class names alone: methods that read no concept train as ever, and a warning says where to look.

    python -m stages.select_concepts --encoder reef
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fieldmark import store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.concepts import gate
from fieldmark.concepts.selection import (
    choose,
    class_means,
    discriminability,
    find_prototypes,
    merge_candidates,
)
from fieldmark.labels.splits import read_globals, read_split
from fieldmark.params import load_params

INDEX = Path("data/index/images.parquet")
CONCEPTS = Path("data/concepts/concepts.parquet")
EMBED = Path("data/embed")
BANK = Path("data/bank")
SCHEMA = "bank/1"
Row = dict[str, Any]


def read_candidates(text_path: Path) -> tuple[list[Row], list[Row], dict[str, np.ndarray]]:
    """Name rows and candidates (merge_candidates), and the vector (D,) of each concept_id."""
    texts = store.read_table(text_path, "embed.text/1", ["text_id", "vector"])
    vector_of = dict(zip(texts.column("text_id").to_pylist(), store.vectors_of(texts).astype(np.float32), strict=True))
    concepts = [row for row in store.read_table(CONCEPTS, "concepts/1").to_pylist() if row["kept"]]
    absent = [row["text"] for row in concepts if row["concept_id"] not in vector_of]
    if absent:
        raise UserError(f"{text_path}: has no vector of {absent[0]!r}; run embed_text again")
    names, candidates = merge_candidates(concepts)
    return names, candidates, vector_of


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
    names, candidates, vector_of = read_candidates(text_path)
    train_images = read_split(INDEX, "train")
    if not train_images:
        raise UserError(f"{INDEX}: holds no training image; concepts are selected on them")
    train = read_globals(images, buckets, train_images)
    val = read_globals(images, buckets, read_split(INDEX, "val"))
    means, scale = class_means(*train), text_header.params["logit_scale"]
    vectors = np.array([vector_of[row["concept_id"]] for row in candidates]).reshape(-1, means.shape[1])
    gains = discriminability(vectors @ means.T, scale)
    choose(candidates, vectors, gains, settings, len(means))

    kept = [i for i, row in enumerate(candidates) if row["kept"]]
    found = gate.judge(train, val, vectors[kept], [candidates[i]["class_ids"] for i in kept])
    print(f"{arguments.encoder}: {gate.say(found)}")
    warn(found, settings.fallback)
    prototypes: list[Row] = []
    if settings.fallback == "prototypes" or (settings.fallback == "auto" and (found["verdict"] == "none" or not kept)):
        prototypes, centres = find_prototypes(images, buckets, train_images, settings.per_class)
        vectors = np.concatenate([vectors, centres])
        gains = np.concatenate([gains, discriminability(centres @ means.T, scale)])
        for i in kept:
            candidates[i].update(kept=False, drop_reason="visual prototypes stand in for named concepts")

    rows = names + candidates + prototypes
    numbers: list[float | None] = [None] * len(names) + [float(gain) for gain in gains]
    of_names = np.array([vector_of[row["concept_id"]] for row in names]).reshape(-1, means.shape[1])
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
        "discriminability": pa.array(numbers, pa.float32()),
        "vector": store.vector_column(np.concatenate([of_names, vectors])),
        "kept": [row["kept"] for row in rows],
        "drop_reason": pa.array([row["drop_reason"] for row in rows], store.TEXT),
    })
    path = BANK / f"{arguments.encoder}.parquet"
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by))
    still_kept = sum(row["kept"] for row in candidates)
    counts = {"candidates": len(candidates), "kept": still_kept, "prototypes": len(prototypes)}
    metrics = json.dumps({**counts, "judged": found}, indent=2)
    store.write_text(path.with_suffix(".json"), metrics + "\n")
    made = f", {len(prototypes)} prototypes made" if prototypes else ""
    print(f"{path}: {still_kept} of {len(candidates)} concepts kept, {len(names)} name texts{made}")


if __name__ == "__main__":
    run(main)
