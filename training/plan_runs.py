"""Write down what each run of `train.runs` reads, so that a run is made anew exactly when something of it changed.

Reads   every file that a run reads, for its sha256: data/index/, data/embed/, data/bank/, data/labels/, data/graphs/,
        data/descriptions/, data/asked/; the code of training/ and of what it imports.
Writes  data/inputs/RUN.json for each run: `files`, the sha256 of each file or folder that the run reads, and `code`,
        the sha256 of every module that it executes. The stage train@RUN depends on that file and on its parameters.
Costs   a look at all bytes that the runs read: about a second for 12 thousand images.

A second machine learns from data/inputs/RUN.json what it has to fetch (tools/inputs.py).

    python -m training.plan_runs
"""

from pathlib import Path

from fieldmark.command import run, stage_parser
from fieldmark.params import Params, load_params
from training.hashes import hash_data
from training.inputs import ROOT, code_of
from training.runs import write_json
from training.train import plan_run


def plan(params: Params, path: str, data: Path) -> None:
    """Write data/inputs/; `path` is the parameters' file, for messages."""
    folder, buckets = data / "inputs", params.dataset.buckets
    planned = [plan_run(path, params, name) for name in params.train.runs]
    for one in planned:
        reading = one.reading
        code = code_of(ROOT / "training/train.py", reading.methods, reading.needs | reading.also_reads, one.control)
        files = hash_data(data, reading.files, buckets)
        write_json(folder / f"{one.name}.json", {"files": files, "code": code})
    for stray in folder.glob("*.json"):
        if stray.stem not in params.train.runs:
            stray.unlink()


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    plan(params, arguments.params, Path(arguments.data))
    print(f"{Path(arguments.data) / 'inputs'}: what {len(params.train.runs)} runs read is written down")


if __name__ == "__main__":
    run(main)
