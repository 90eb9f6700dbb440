"""Embed every text once: class names, concepts and image descriptions.

Reads   data/concepts/concepts.parquet (kept rows), data/descriptions/descriptions.parquet and cells.parquet;
        `encoders.NAME`.
Writes  data/embed/NAME/text.parquet (embed.text/1): one row a distinct text, in the space of the images. Rows that are
        there already, made by the same encoder, are kept: a concept more embeds one text.
Costs   one forward pass of the text tower a text: seconds for thousands. --dry-run embeds a few batches, writes
        nothing, and says what is to come.

    python -m stages.embed_text --encoder reef
    python -m stages.embed_text --encoder reef --dry-run
"""

from pathlib import Path

import pyarrow as pa

from fieldmark import store
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.devices import choose_device
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.texts import SCHEMA, embed_texts, kept_texts, preview
from fieldmark.params import load_params

CONCEPTS = Path("data/concepts/concepts.parquet")
DESCRIPTIONS = Path("data/descriptions/descriptions.parquet")
CELLS, CELL_SCHEMA = Path("data/descriptions/cells.parquet"), "descriptions.cells/1"
EMBED = Path("data/embed")


def read_texts() -> dict[str, str]:
    """Distinct texts and their kind: `name`, `concept` or `description`. A text of several kinds keeps the first."""
    kinds: dict[str, str] = {}
    for row in store.read_table(CONCEPTS, "concepts/1").to_pylist():
        if row["kept"]:
            kinds.setdefault(row["text"], "name" if row["kind"] == "name" else "concept")
    for path, schema in ((DESCRIPTIONS, "descriptions/1"), (CELLS, CELL_SCHEMA)):
        for group in store.iterate_groups(path, schema, ["text"]):
            for text in group["text"].to_pylist():
                kinds.setdefault(text, "description")
    if not kinds:
        raise UserError(f"{CONCEPTS}: no text was kept; see its drop_reason column, then run clean_concepts again")
    return kinds


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print texts, time and bytes to come; write nothing")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    settings = params.encoder(arguments.encoder)
    kinds = read_texts()
    encoder = load_encoder(arguments.encoder, settings, choose_device(arguments.device), params.towers)
    path = EMBED / arguments.encoder / "text.parquet"
    kept = kept_texts(path, kinds, encoder)
    held = set(kept.column("text").to_pylist())
    missing = {text: kind for text, kind in kinds.items() if text not in held}
    if arguments.dry_run:
        print(f"{path}: {preview(missing, len(kept), encoder)}")
        return
    made_by = {"encoder": encoder.fingerprint, "logit_scale": encoder.logit_scale}
    upstream = [
        store.read_header(CONCEPTS, "concepts/1").fingerprint,
        store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint,
    ]
    # Where no cell is asked about, texts are what they were before there was such a table.
    cells = store.read_header(CELLS, CELL_SCHEMA)
    upstream += [cells.fingerprint] if cells.params["nodes"] else []
    table = pa.concat_tables([kept, embed_texts(missing, encoder)])
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by, upstream))
    cut = sum(table.column("truncated").to_pylist())
    print(f"{path}: {len(missing)} texts embedded, {len(kept)} kept; {cut} are cut")


if __name__ == "__main__":
    run(main)
