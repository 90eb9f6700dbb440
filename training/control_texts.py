"""The texts that controls put in the place of concepts, as embed_controls wrote them."""

from pathlib import Path

import pyarrow as pa

from fieldmark.command import UserError
from fieldmark.store import read_header, read_table

CONTROL_TEXTS = "embed/{}/controls.parquet"  # under data/, of an encoder


def files(encoder: str) -> dict[str, str]:
    """What is read to have them: paths under data/, and the schema of each."""
    return {CONTROL_TEXTS.format(encoder): "embed.controls/1", f"embed/{encoder}/text.parquet": "embed.text/1"}


def read_control_texts(data: Path, encoder: str) -> tuple[pa.Table, Path]:
    """embed.controls/1 of an encoder, and its path. Raises UserError where it is missing or of another encoder."""
    path = data / CONTROL_TEXTS.format(encoder)
    if not path.is_file():
        remedy = f"add {encoder} to `controls` in params.yaml and run embed_controls (dvc repro)"
        raise UserError(f"{path}: is missing; {remedy}")
    text = read_header(data / f"embed/{encoder}/text.parquet", "embed.text/1")
    if read_header(path, "embed.controls/1").params["encoder"] != text.params["encoder"]:
        raise UserError(f"{path}: is of another encoder than text.parquet; run embed_controls again (dvc repro)")
    return read_table(path, "embed.controls/1"), path
