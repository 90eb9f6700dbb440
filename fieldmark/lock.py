"""What dvc.lock knows of outputs that are not here, read as plain YAML: no import of DVC."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fieldmark.command import UserError

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
