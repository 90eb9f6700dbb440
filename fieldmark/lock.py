"""What dvc.lock knows of outputs that are not here, or made otherwise, read as plain YAML: no import of DVC."""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fieldmark.command import UserError
from fieldmark.params import Dataset

LOCK = Path("dvc.lock")


def read_stages() -> dict[str, dict[str, Any]]:
    """The stages of dvc.lock by name. Raises UserError where it is missing or not DVC's."""
    try:
        content = YAML(typ="safe", pure=True).load(LOCK.read_text(encoding="utf-8"))
        stages: dict[str, dict[str, Any]] = dict(content["stages"])
    except FileNotFoundError:
        raise UserError(f"{LOCK}: is missing: nothing was made here and nothing shared; run dvc repro first") from None
    except (OSError, UnicodeDecodeError, YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{LOCK}: is not a lock file of DVC ({' '.join(str(error).split())[:160]})") from None
    return stages


def paths_of(stage: dict[str, Any], side: str) -> list[str]:
    return [entry["path"] for entry in stage.get(side, [])]


def covers(outer: str, inner: str) -> bool:
    """Whether `inner` is `outer` or lies in it."""
    return PurePosixPath(inner).is_relative_to(outer)


def refuse_cold_start(path: Path) -> None:
    """Raises UserError where dvc.lock lists `path` and it is not here: making it anew would pay for it again."""
    if path.exists() or not LOCK.exists() or os.environ.get("FIELDMARK_COLD") == "1":
        return
    outs = [out for stage in read_stages().values() for out in paths_of(stage, "outs")]
    if any(covers(out, path.as_posix()) for out in outs):
        raise UserError(
            f"{path}: dvc.lock lists it but it is not here; fetch the answers that are paid for with `dvc pull {path}`,"
            " or set FIELDMARK_COLD=1 to pay for them again"
        )


def refuse_old_index(path: Path, dataset: Dataset, params: str) -> None:
    """Raises UserError where `path`, a file of the index, was made with other settings than `dataset` of file `params`.

    Whoever looks at a prompt or a price after a change of data set would see the former one's classes. dvc.lock knows
    the settings of what DVC made; of an index that was made by hand since, nobody does.
    """
    if not LOCK.exists() or not path.exists():
        return
    stage = read_stages().get("index_images", {})
    made = {out["path"]: out.get("md5") for out in stage.get("outs", [])}
    with open(path, "rb") as file:
        if made.get(path.as_posix()) != hashlib.file_digest(file, "md5").hexdigest():
            return
    try:
        before = Dataset.model_validate(stage["params"]["params.yaml"]["dataset"]).model_dump()
    except (KeyError, TypeError, ValidationError):
        return
    now = dataset.model_dump()
    changed = [key for key in now if now[key] != before[key]]
    if changed:
        key = "root" if "root" in changed else changed[0]
        raise UserError(
            f"{path.parent}: is of dataset.{key} {before[key]}, and {params} says {now[key]}; run"
            " `dvc repro index_images` first"
        )
