"""What dvc.lock knows of outputs that are not here, read as plain YAML: no import of DVC.

Reads   dvc.lock, dvc.yaml and params.yaml in the working folder. Stages that DVC keeps in dvc.lock though an encoder or
        method is no longer in params.yaml are passed over: `dvc pull` does not know their outputs.
Writes  to stdout, one path a line: the data that STAGE reads and that a remote can hold. Source code is not listed.
Costs   nothing.

    dvc pull $(python -m fieldmark.lock train@linear_probe)
"""

import argparse
import difflib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fieldmark.command import UserError, run

LOCK = Path("dvc.lock")
PIPELINE = Path("dvc.yaml")
PARAMS = Path("params.yaml")


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


def defined_stages() -> set[str]:
    """The stages that dvc.yaml defines today, NAME@KEY for each key of what a `foreach` loops over."""
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(PARAMS.read_text(encoding="utf-8"))
    names = set()
    for name, stage in yaml.load(PIPELINE.read_text(encoding="utf-8"))["stages"].items():
        if "foreach" not in stage:
            names.add(name)
            continue
        keys = params
        for part in stage["foreach"].removeprefix("${").removesuffix("}").split("."):
            keys = keys[part]
        names |= {f"{name}@{key}" for key in keys}
    return names


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


def data_of(name: str) -> list[str]:
    """The paths under data/ that a stage depends on and that DVC tracks. Raises UserError for an unknown stage."""
    defined = defined_stages()
    stages = {stage: entry for stage, entry in read_stages().items() if stage in defined}
    if name not in stages:
        close = difflib.get_close_matches(name, stages, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it knows {', '.join(stages) or 'none'}"
        raise UserError(f"{LOCK}: has no stage {name!r}; {hint}")
    outs = [out for other, stage in stages.items() if other != name for out in paths_of(stage, "outs")]
    found: list[str] = []
    for dep in paths_of(stages[name], "deps"):
        if not covers("data", dep):
            continue
        if any(covers(out, dep) for out in outs) or Path(f"{dep}.dvc").is_file():
            found.append(dep)
        else:
            # A dependency on a whole folder of outputs.
            found.extend(out for out in outs if covers(dep, out))
    return sorted(set(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="STAGE", help="a stage as dvc.lock names it, e.g. train@linear_probe")
    for path in data_of(parser.parse_args().stage):
        print(path)


if __name__ == "__main__":
    run(main)
