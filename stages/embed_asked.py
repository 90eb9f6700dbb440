"""Embed what a question of your own was answered with every encoder.

Reads   data/asked/NAME/texts.parquet, all its texts but guesses of classes; `encoders`.
Writes  data/asked/NAME/vectors/ENCODER.parquet for each encoder (embed.text/1): one row a distinct text, in the space
        of its images. Rows that are there already, made by the same encoder, are kept: an answer more embeds its texts.
Costs   for each encoder, loading it and one forward pass of the text tower a text: seconds for thousands. --dry-run
        embeds a few batches, writes nothing, and says what is to come.

These vectors lie apart from those of names, concepts and descriptions (embed_text): an edited question changes no bank,
no label, and no run but those that read its answers. And a question may use links that were made from other texts.

    python -m stages.embed_asked --ask guess
    python -m stages.embed_asked --ask guess --dry-run
"""

from pathlib import Path

import pyarrow as pa

from fieldmark import store
from fieldmark.command import UserError, key_parser, run
from fieldmark.devices import choose_device
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.texts import SCHEMA, embed_texts, kept_texts, preview
from fieldmark.params import load_params

ASKED = Path("data/asked")
TEXTS = "asked/1"
KIND = "asked"


def read_texts(path: Path) -> list[str]:
    """The distinct texts of an asked/1 table, but for guesses of classes: of those the trainer takes the class."""
    guesses = store.read_header(path, TEXTS).params["guesses"]
    rows = store.read_table(path, TEXTS, ["field", "text"]).to_pylist()
    return sorted({row["text"] for row in rows if row["field"] != guesses})


def main() -> None:
    parser = key_parser(__doc__, "--ask", "ask")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print texts, time and bytes to come; write nothing")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    if arguments.ask not in params.ask:
        known = ", ".join(params.ask) or "none is there"
        raise UserError(f"params.yaml: ask.{arguments.ask}: is not there; choose one of: {known}")
    source = ASKED / arguments.ask / "texts.parquet"
    kinds = dict.fromkeys(read_texts(source), KIND)
    upstream = [store.read_header(source, TEXTS).fingerprint]
    folder = source.with_name("vectors")
    for name, settings in params.encoders.items():
        encoder = load_encoder(name, settings, choose_device(arguments.device), params.towers)
        path = folder / f"{name}.parquet"
        kept = kept_texts(path, kinds, encoder)
        held = set(kept.column("text").to_pylist())
        missing = {text: kind for text, kind in kinds.items() if text not in held}
        if arguments.dry_run:
            print(f"{path}: {preview(missing, len(kept), encoder)}")
            continue
        made_by = {"encoder": encoder.fingerprint, "logit_scale": encoder.logit_scale}
        table = pa.concat_tables([kept, embed_texts(missing, encoder)])
        store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by, upstream))
        cut = sum(table.column("truncated").to_pylist())
        print(f"{path}: {len(missing)} texts embedded, {len(kept)} kept; {cut} are cut")
    if not arguments.dry_run:
        for stray in folder.glob("*.parquet"):
            if stray.stem not in params.encoders:
                stray.unlink()


if __name__ == "__main__":
    run(main)
