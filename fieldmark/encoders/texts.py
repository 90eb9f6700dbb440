"""Texts through an encoder, for all stages that embed texts."""

import io
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder

SCHEMA = "embed.text/1"
# How many batches --dry-run embeds to measure the rate.
SAMPLE_BATCHES = 4
# What count_tokens says of a text.
COUNTED = np.dtype([("tokens", np.int32), ("truncated", np.bool_)])


def embed_texts(kinds: dict[str, str], encoder: LoadedEncoder) -> pa.Table:
    """The embed.text rows of texts, given with the kind of each. Vectors have unit length, and are held once."""
    texts = sorted(kinds)
    counts = np.fromiter(map(encoder.count_tokens, texts), dtype=COUNTED, count=len(texts))
    vectors = np.empty((len(texts), encoder.dimension), dtype=np.float16)
    for start in tqdm(range(0, len(texts), encoder.batch_size), desc=f"text {encoder.name}", unit="batch"):
        part = slice(start, start + encoder.batch_size)
        raw = encoder.embed_texts(texts[part])
        norms = raw.norm(dim=1, keepdim=True)
        if not bool(torch.isfinite(norms).all() and (norms > 0).all()):
            raise UserError(f"encoders.{encoder.name}: the embedding of a text is not finite; try precision: fp32")
        vectors[part] = (raw / norms).numpy()
    return pa.table({
        "text_id": [store.sha256(text) for text in texts],
        "text": texts,
        "kind": [kinds[text] for text in texts],
        "n_tokens": counts["tokens"],
        "truncated": counts["truncated"],
        "vector": store.vector_column(vectors),
    }).cast(store.arrow_schema(SCHEMA, encoder.dimension))


def kept_texts(path: Path, kinds: dict[str, str], encoder: LoadedEncoder) -> pa.Table:
    """The embed.text rows of texts, given with the kind of each, that are there already and that this encoder made."""
    columns = store.arrow_schema(SCHEMA, encoder.dimension)
    if not path.is_file() or store.read_header(path, SCHEMA).params["encoder"] != encoder.fingerprint:
        return columns.empty_table()
    table = store.read_table(path, SCHEMA)
    table = table.filter(pc.is_in(table.column("text"), pa.array(list(kinds), pa.string())))
    # What was a concept may be a description now.
    kind = pa.array([kinds[text] for text in table.column("text").to_pylist()], pa.string())
    return table.set_column(columns.get_field_index("kind"), "kind", kind).cast(columns)


def preview(missing: dict[str, str], kept: int, encoder: LoadedEncoder) -> str:
    """What a run would do, for --dry-run. Rate and bytes are measured on a few texts that are embedded now."""
    lines = [f"{len(missing)} texts to embed, {kept} kept"]
    if missing:
        sample = dict(islice(missing.items(), SAMPLE_BATCHES * encoder.batch_size))
        # A first pass is slower than those that follow.
        embed_texts(dict(islice(sample.items(), 1)), encoder)
        started = perf_counter()
        table = embed_texts(sample, encoder)
        rate = len(sample) / (perf_counter() - started)
        file = io.BytesIO()
        store.write_parquet([table], file, table.schema)
        size = file.tell() / len(sample) * len(missing) / 1e6
        time = timedelta(seconds=round(len(missing) / rate))
        measured = f"{rate:.1f} texts/s on {encoder.device}, measured with {len(sample)} of them"
        lines += [f"time: about {time} ({measured})", f"on disk: about {size:.2f} MB"]
    return "\n".join(lines)
