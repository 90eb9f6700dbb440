"""Which data a stage reads that a remote can hold, as dvc.lock and, for a run, data/inputs/RUN.json list them.

Reads   dvc.lock, dvc.yaml and params.yaml in the working folder, as plain YAML; for a stage train@RUN also
        data/inputs/RUN.json (`dvc pull data/inputs` fetches it). Stages that DVC keeps in dvc.lock though an encoder or
        run is no longer in params.yaml are passed over: `dvc pull` does not know their outputs.
Writes  to stdout, one path a line. Source code is not listed.
Costs   nothing.

    dvc pull $(python -m tools.inputs train@linear_probe)
"""

import argparse
import difflib
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fieldmark.command import UserError, run
from fieldmark.lock import LOCK, covers, paths_of, read_stages

PIPELINE = Path("dvc.yaml")
PARAMS = Path("params.yaml")
INPUTS = Path("data/inputs")
RUN = "train@"  # how the stage of a run begins


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


def data_of(name: str) -> list[str]:
    """The paths under data/ that a stage depends on and that DVC tracks. Raises UserError for an unknown stage."""
    defined = defined_stages()
    stages = {stage: entry for stage, entry in read_stages().items() if stage in defined}
    if name not in stages:
        raise UserError(unknown(name, stages))
    deps = paths_of(stages[name], "deps")
    outs = [out for other, stage in stages.items() if other != name for out in paths_of(stage, "outs")]
    found: list[str] = []
    planned = [path for dep in deps if covers(str(INPUTS), dep) for path in files_of(Path(dep))]
    for dep in [*deps, *planned]:
        if not covers("data", dep):
            continue
        if any(covers(out, dep) for out in outs) or Path(f"{dep}.dvc").is_file():
            found.append(dep)
        else:
            # A dependency on a whole folder of outputs.
            found.extend(out for out in outs if covers(dep, out))
    return sorted(set(found))


def unknown(name: str, stages: dict[str, dict[str, Any]]) -> str:
    """What to say of a stage that is not there; of a run where a run was meant, as `make pull RUN=` does."""
    what, known, wanted = "has no stage", list(stages), name
    if name.startswith(RUN):
        what, wanted = "has no run", name.removeprefix(RUN)
        known = [stage.removeprefix(RUN) for stage in stages if stage.startswith(RUN)]
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it knows {', '.join(known) or 'none'}"
    return f"{LOCK}: {what} {wanted!r}; {hint}"


def files_of(path: Path) -> list[str]:
    """What training.plan_runs says that a run reads. Raises UserError where it did not say so yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it with `dvc pull {INPUTS}`") from None
    return [str(INPUTS.parent / file) for file in content["files"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="STAGE", help="a stage as dvc.lock names it, e.g. train@linear_probe")
    for path in data_of(parser.parse_args().stage):
        print(path)


if __name__ == "__main__":
    run(main)
