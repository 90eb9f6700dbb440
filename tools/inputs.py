"""Which data a stage reads that a remote can hold, as dvc.lock and, for a run, data/inputs/RUN.json list them; or which
outputs are of a part of the cache or of an encoder.

Reads   dvc.lock, dvc.yaml and params.yaml in the working folder, as plain YAML; for a stage train@RUN also
        data/inputs/RUN.json (`dvc pull data/inputs` fetches it). Stages that DVC keeps in dvc.lock though an encoder or
        run is no longer in params.yaml are passed over: `dvc pull` does not know their outputs.
Writes  to stdout, one path a line. Source code is not listed.
Costs   nothing.

A part is a folder of data/ (concepts, descriptions, thumbs, bank, labels, graphs, runs ...) or what stands under an
encoder in data/embed (images, tokens, moments, text, projection). --encoder leaves what is of these encoders, and what
a tuned one is loaded from (data/adapted): with no part all of it, with parts what is both.

    dvc pull $(python -m tools.inputs train@linear_probe)
    dvc pull $(python -m tools.inputs --encoder clip --parts moments graphs)
"""

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML

from fieldmark.command import UserError, run
from fieldmark.lock import LOCK, covers, paths_of, read_stages

PIPELINE = Path("dvc.yaml")
PARAMS = Path("params.yaml")
INPUTS = Path("data/inputs")
RUN = "train@"  # how the stage of a run begins
# Folders of data/, beside embed, in which each encoder has a file or a folder of its name.
OF_ENCODERS = {"bank", "graphs", "labels"}


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


def outputs_of(parts: Sequence[str], encoders: Sequence[str]) -> list[str]:
    """The outputs in dvc.lock of these parts and encoders (none: all of them), of stages that dvc.yaml defines. Raises
    UserError for a word of which there is none."""
    defined = defined_stages()
    outs = [out for stage, entry in read_stages().items() if stage in defined for out in paths_of(entry, "outs")]
    loaded = places_of_encoders()
    words = {out: words_of(out, loaded) for out in outs if covers("data", out)}
    found = set(words)
    for wanted, option, place in ((parts, "parts", 0), (encoders, "encoder", 1)):
        known = sorted(set().union(*(of_out[place] for of_out in words.values())))
        for word in wanted:
            if word not in known:
                raise UserError(f"{LOCK}: no output is of {option} {word!r}; it knows {', '.join(known) or 'none'}")
        found = {out for out in found if not wanted or words[out][place] & set(wanted)}
    if not found:
        raise UserError(f"{LOCK}: no output is of both, parts {', '.join(parts)} and encoder {', '.join(encoders)}")
    return sorted(found)


def places_of_encoders() -> dict[str, list[str]]:
    """Where each encoder and tower of params.yaml may lie: the folder of its model, and its file."""
    params = YAML(typ="safe", pure=True).load(PARAMS.read_text(encoding="utf-8"))
    encoders = {**params["encoders"], **params.get("towers", {})}
    return {
        name: [str(settings.get(key) or "").removeprefix("local-dir:") for key in ("model", "pretrained")]
        for name, settings in encoders.items()
    }


def words_of(out: str, loaded: dict[str, list[str]]) -> tuple[set[str], set[str]]:
    """Of which parts an output below data/ is, and of which encoders; `loaded` says where these lie."""
    _, folder, *below = PurePosixPath(out).parts
    stems = [PurePosixPath(name).stem for name in below]
    if folder == "adapted":
        return {folder}, {name for name, places in loaded.items() if any(covers(out, place) for place in places)}
    if folder == "embed":
        return {folder, *stems[1:2]}, set(stems[:1])
    return {folder}, set(stems[:1]) if folder in OF_ENCODERS else set()


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
    parser.add_argument("stage", nargs="?", metavar="STAGE", help="a stage of dvc.lock, e.g. train@linear_probe")
    parser.add_argument("--parts", nargs="+", default=[], metavar="PART", help="outputs of these parts of the cache")
    parser.add_argument("--encoder", nargs="+", default=[], metavar="NAME", help="outputs of these encoders")
    arguments = parser.parse_args()
    chosen = bool(arguments.parts or arguments.encoder)
    if chosen == (arguments.stage is not None):
        parser.error("give a stage, or --parts or --encoder or both of these")
    for path in outputs_of(arguments.parts, arguments.encoder) if chosen else data_of(arguments.stage):
        print(path)


if __name__ == "__main__":
    run(main)
