"""Embed every text once: class names, concepts and image descriptions.

Reads   data/concepts/concepts.parquet (kept rows), data/descriptions/descriptions.parquet; `encoders.NAME`.
Writes  data/embed/NAME/text.parquet (embed.text/1): one row a distinct text, in the space of the images.
Costs   one forward pass of the text tower a text: seconds for thousands.

    python -m stages.embed_text --encoder reef
"""

from pathlib import Path

import pyarrow as pa
import torch
from tqdm import tqdm

from stages import store
from stages.clip import LoadedEncoder, choose_device, load_encoder
from stages.command import UserError, encoder_parser, run
from stages.params import load_params

CONCEPTS = Path("data/concepts/concepts.parquet")
DESCRIPTIONS = Path("data/descriptions/descriptions.parquet")
EMBED = Path("data/embed")
SCHEMA = "embed.text/1"


def read_texts() -> dict[str, str]:
    """Distinct texts and their kind: `name`, `concept` or `description`. A text of several kinds keeps the first."""
    kinds: dict[str, str] = {}
    for row in store.read_table(CONCEPTS, "concepts/1").to_pylist():
        if row["kept"]:
            kinds.setdefault(row["text"], "name" if row["kind"] == "name" else "concept")
    for text in store.read_table(DESCRIPTIONS, "descriptions/1", ["text"]).column("text").to_pylist():
        kinds.setdefault(text, "description")
    if not kinds:
        raise UserError(f"{CONCEPTS}: no text was kept; see its drop_reason column, then run clean_concepts again")
    return kinds


def embed_texts(kinds: dict[str, str], encoder: LoadedEncoder) -> pa.Table:
    """The embed.text rows of `kinds`, vectors of unit length."""
    texts = sorted(kinds)
    counts = [encoder.count_tokens(text) for text in texts]
    vectors = []
    for start in tqdm(range(0, len(texts), encoder.batch_size), desc=f"text {encoder.name}", unit="batch"):
        vectors.append(encoder.embed_texts(texts[start : start + encoder.batch_size]))
    raw = torch.cat(vectors)
    norms = raw.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all() and (norms > 0).all()):
        raise UserError(f"encoders.{encoder.name}: the embedding of a text is not finite; try precision: fp32")
    return pa.table({
        "text_id": [store.sha256(text) for text in texts],
        "text": texts,
        "kind": [kinds[text] for text in texts],
        "n_tokens": [count for count, _ in counts],
        "truncated": [truncated for _, truncated in counts],
        "vector": store.vector_column((raw / norms).numpy()),
    })


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    arguments = parser.parse_args()
    settings = load_params(arguments.params).encoder(arguments.encoder)
    kinds = read_texts()
    encoder = load_encoder(arguments.encoder, settings, choose_device(arguments.device))
    made_by = {"encoder": encoder.fingerprint, "logit_scale": encoder.logit_scale}
    upstream = [
        store.read_header(CONCEPTS, "concepts/1").fingerprint,
        store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint,
    ]
    path = EMBED / arguments.encoder / "text.parquet"
    table = embed_texts(kinds, encoder)
    store.write_table(table, path, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by, upstream))
    print(f"{path}: {len(kinds)} texts, {sum(table.column('truncated').to_pylist())} of them cut")


if __name__ == "__main__":
    run(main)
