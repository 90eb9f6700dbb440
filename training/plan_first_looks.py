"""Write down what each first look of `train.first_looks` reads, as training.plan_runs does of runs.

Reads   every file that a first look reads, for its sha256: data/index/, data/embed/; the code of training/ and of what
        it imports.
Writes  data/again/inputs/NAME.json for each first look: `files` and `code`, as data/inputs/RUN.json. The stage
        first_look@NAME depends on that file and on its parameters. Without a first look, an empty folder.
Costs   a look at all bytes that first looks read; nothing where there is none.

    python -m training.plan_first_looks
"""

from pathlib import Path

from fieldmark.command import run, stage_parser
from fieldmark.params import PLANS, Params, load_params


def plan(params: Params, path: str, data: Path) -> None:
    """Write data/again/inputs/; `path` is the parameters' file, for messages."""
    # PyTorch takes seconds to import, and most data sets have no first look.
    from training.hashes import hash_data
    from training.looks import plan_look
    from training.runs import write_json

    for one in [plan_look(path, params, name) for name in params.train.first_looks]:
        files = hash_data(data, one.reading.files, params.dataset.buckets)
        write_json(data / "again" / PLANS / f"{one.name}.json", {"files": files, "code": one.code})


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    arguments = parser.parse_args()
    params, data = load_params(arguments.params), Path(arguments.data)
    folder, looks = data / "again" / PLANS, params.train.first_looks
    folder.mkdir(parents=True, exist_ok=True)
    if looks:
        plan(params, arguments.params, data)
    for stray in folder.glob("*.json"):
        if stray.stem not in looks:
            stray.unlink()
    print(f"{folder}: what {len(looks)} first looks read is written down")


if __name__ == "__main__":
    run(main)
