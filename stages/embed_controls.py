"""Embed texts that say nothing of the classes: what a control puts in the place of concepts.

Reads   data/index/classes.parquet, data/controls/unrelated.txt; `controls.NAME` and `encoders.NAME` of params.yaml.
Writes  data/embed/NAME/controls.parquet (embed.controls/1), a row a text, of two kinds:
          unrelated  the lines of unrelated.txt, about things that are neither animals nor plants;
          random     "NAME, which has SOMETHING" for each class, `per_class` times, after WaffleCLIP (Roth et
                     al., ICCV 2023 [mem]): something is two words, or two runs of characters, drawn by
                     `seed`. It is the same for all classes: the names alone differ.
        Rows that are there already, made by the same encoder, are kept: a class more embeds `per_class` texts.
Costs   one forward pass of the text tower a text: 2,722 unrelated ones, and `per_class` a class. --dry-run
        embeds a few batches, writes nothing, and says what is to come.

    python -m stages.embed_controls --encoder reef
    python -m stages.embed_controls --encoder reef --dry-run
"""

import random
import re
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fieldmark import store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.devices import choose_device
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.texts import embed_texts, preview
from fieldmark.params import load_params

CLASSES = Path("data/index/classes.parquet")
UNRELATED = Path("data/controls/unrelated.txt")
EMBED = Path("data/embed")
SCHEMA = "embed.controls/1"
Row = dict[str, Any]


def read_unrelated(path: Path) -> list[str]:
    """The texts of a file, one a line. Raises UserError where it is missing, empty or says a thing twice."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); get it back with: git checkout {path}") from None
    first: dict[str, int] = {}
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if line in first:
            raise UserError(f"{path}: line {number} repeats line {first[line]}: {line!r}; remove one")
        if line:
            first[line] = number
    if not first:
        raise UserError(f"{path}: holds no text; get it back with: git checkout {path}")
    return list(first)


def random_descriptor(words: list[str], seed: int, rank: int) -> str:
    """Two of `words` at an even rank, two runs of 4 to 7 letters and digits at an odd one; by seed and rank alone."""
    rng = random.Random(f"{seed} {rank}")
    if rank % 2 == 0:
        return " ".join(rng.sample(words, 2))
    return " ".join("".join(rng.choices(string.ascii_lowercase + string.digits, k=rng.randint(4, 7))) for _ in range(2))


def control_rows(names: dict[str, str], unrelated: list[str], seed: int, per_class: int) -> list[Row]:
    """The rows without their vectors; `names` are the classes' by their class_id."""
    rows: list[Row] = [
        {"kind": "unrelated", "class_id": None, "rank": rank, "text": text} for rank, text in enumerate(unrelated)
    ]
    words = sorted({word for text in unrelated for word in re.findall(r"[a-z]{3,}", text)})
    for rank in range(per_class):
        descriptor = random_descriptor(words, seed, rank)
        rows += [
            {"kind": "random", "class_id": class_id, "rank": rank, "text": f"{name}, which has {descriptor}"}
            for class_id, name in names.items()
        ]
    return rows


def read_kept(path: Path, texts: list[str], encoder: LoadedEncoder) -> pa.Table:
    """Text and vector of the `texts` that are there already and that this encoder made."""
    columns = ["text", "vector"]
    if not path.is_file() or store.read_header(path, SCHEMA).params["encoder"] != encoder.fingerprint:
        empty: pa.Table = store.arrow_schema(SCHEMA, encoder.dimension).empty_table().select(columns)
        return empty
    table = store.read_table(path, SCHEMA, columns)
    return table.filter(pc.is_in(table["text"], pa.array(texts)))


def join_vectors(rows: list[Row], vectors: pa.Table) -> pa.Table:
    """The embed.controls rows; `vectors` (text, vector) has every row's text, perhaps more than once."""
    table = pa.Table.from_pylist(rows)
    place = pc.index_in(table["text"], value_set=vectors["text"].combine_chunks())
    return table.append_column("vector", vectors["vector"].combine_chunks().take(place.combine_chunks()))


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print texts, time and bytes to come; write nothing")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    settings = params.encoder(arguments.encoder)
    if arguments.encoder not in params.controls:
        raise UserError(
            f"params.yaml: controls.{arguments.encoder}: is not there, so that no text is asked for; add it, as in"
            f" `controls: {{{arguments.encoder}: {{per_class: 32}}}}`"
        )
    controls = params.controls[arguments.encoder]
    classes = store.read_table(CLASSES, "index.classes/2", ["class_id", "name"])
    names = dict(zip(classes["class_id"].to_pylist(), classes["name"].to_pylist(), strict=True))
    unrelated = read_unrelated(UNRELATED)
    rows = control_rows(names, unrelated, controls.seed, controls.per_class)

    encoder = load_encoder(arguments.encoder, settings, choose_device(arguments.device), params.towers)
    path = EMBED / arguments.encoder / "controls.parquet"
    texts = list(dict.fromkeys(row["text"] for row in rows))
    kept = read_kept(path, texts, encoder)
    held = set(kept["text"].to_pylist())
    missing = {text: "control" for text in texts if text not in held}
    if arguments.dry_run:
        print(f"{path}: {preview(missing, len(held), encoder)}")
        return
    made_by = {
        **controls.model_dump(),
        "encoder": encoder.fingerprint,
        "unrelated": store.sha256(store.canonical_json(unrelated)),
    }
    upstream = [store.read_header(CLASSES, "index.classes/2").fingerprint]
    embedded = embed_texts(missing, encoder).select(["text", "vector"])
    table = join_vectors(rows, pa.concat_tables([kept.cast(embedded.schema), embedded]))
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by, upstream))
    print(f"{path}: {len(missing)} texts embedded, {len(held)} kept")


if __name__ == "__main__":
    run(main)
