"""Whether test pictures were looked at, in the report or by tools.foci: data/studies/test_was_opened.json.

No stage removes it. It stands beside test_was_read.json, which says what test was read for (evaluation/compare.py).
Figures of test that a study declares after its pictures were looked at carry a note.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from evaluation.gallery import short
from evaluation.runs import Row, read_json
from fieldmark import store

MARKER = "studies/test_was_opened.json"  # under data/


def read(data: Path) -> list[Row]:
    """What test pictures were opened for so far: run (or what else answers), its fingerprint, images."""
    path = data / MARKER
    found: list[dict[str, Any]] = read_json(path, "it says that test was opened: restore it") if path.exists() else []
    return found


def record(data: Path, index: pa.Table, name: str, fingerprint: str) -> Row:
    """Write down that the test pictures of the index were opened beside what a run answers; once for each run."""
    usable = index.filter(pc.and_(pc.equal(index["status"], "ok"), pc.equal(index["split"], "test")))
    images = sorted(map(short, usable["image_id"].to_pylist()))
    opening = {"run": name, "fingerprint": fingerprint, "images": " ".join(images)}
    before = read(data)
    if opening not in before:
        store.write_text(data / MARKER, json.dumps([*before, opening], indent=2) + "\n")
    return opening
