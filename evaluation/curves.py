"""What history.csv of a run says: accuracy on the half of val that chooses, look by look, a line a seed."""

import csv
from collections import defaultdict
from pathlib import Path

from evaluation.runs import Row
from fieldmark.command import UserError

WIDTH, HEIGHT = 240, 96  # of a drawing


def read_curves(data: Path, name: str) -> Row | None:
    """The lines of a run, drawn in WIDTH x HEIGHT; None where no seed looked at val more than twice.

    A method without epochs looks once for each of its settings. Raises UserError where the file is broken.
    """
    path = data / f"runs/{name}/history.csv"
    lines: dict[int, list[tuple[float, float]]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            settings = {*(reader.fieldnames or [])} - {"seed", "epoch", "train_loss", "val_loss", "val_accuracy"}
            for row in reader:
                lines[int(row["seed"])].append((float(row["epoch"]), float(row["val_accuracy"])))
    except (OSError, ValueError, KeyError) as error:
        again = f"run train@{name} again (dvc repro)"
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); {again}") from None
    if max(map(len, lines.values()), default=0) <= 2:
        return None
    xs = [x for line in lines.values() for x, _ in line]
    ys = [y for line in lines.values() for _, y in line]
    low, high = min(ys), max(ys)
    room = (high - low) or 0.01
    reach = (max(xs) - min(xs)) or 1.0

    def place(x: float, y: float) -> str:
        return f"{WIDTH * (x - min(xs)) / reach:.1f},{HEIGHT - HEIGHT * (y - low) / room:.1f}"

    return {
        "name": name,
        "lines": [{"seed": seed, "points": " ".join(place(*at) for at in sorted(one))} for seed, one in lines.items()],
        "different": len({tuple(line) for line in lines.values()}),
        "low": low,
        "high": high,
        "last": int(max(xs)),
        "settings": bool(settings),
    }
