"""Say what the last edit did: concepts gained and lost, val images that changed sides, and what answers cost.

Reads   data/report/state.json, which the stage `report` writes, and the state before it: of the last run that left
        another one, in .cache/states; or, with --against, of a revision of git's (or an experiment of DVC's by its
        name), from DVC's cache or remote.
Writes  .cache/states: this state, which is the last one once another is there.
Costs   a second; with --against, three.

Accuracies are on val, the half that chose nothing, and of images that are there both times; an image is right where
more than half of the seeds classify it rightly. Test is not looked at. A few images more or less are no verdict: that
is a study's (docs/studies.md). Answers are counted that came since, also where their run failed afterwards; not those
that an edit made between the two states replaced.

    python -m tools.changes
    python -m tools.changes --against HEAD
    python -m tools.changes --all
"""

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from evaluation.changes import GENERIC, Changes, State, compare, last_state, parse, remember
from evaluation.words import lay_out, percent, points
from fieldmark.command import UserError, counted, printable, redact, run

DATA = Path("data")
STATE = DATA / "report/state.json"
SHOWN = 10  # lines of a list, without --all


def read_state(path: Path, name: str, remedy: str) -> State:
    """Raises UserError, which begins with `name` and ends with `remedy`, where there is none of this version."""
    try:
        state = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{name}: is not there; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({error}); {remedy}") from None
    if state is None:
        raise UserError(f"{name}: is of another version of fieldmark; {remedy}")
    return state


def state_of(revision: str) -> State:
    """The state of a revision. Raises UserError where DVC finds none."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "state.json")
        words = ["dvc", "get", ".", str(STATE), "--rev", revision, "--out", str(target)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if not target.is_file():
            why = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise UserError(
                f"--against {revision}: {redact(' '.join(why[:1]) or 'DVC brings nothing')}; name a revision that has a"
                f" dvc.lock with {STATE}, whose outputs are in DVC's cache or on its remote"
            )
        return read_state(target, f"--against {revision}: its {STATE}", "name another revision")


def shorten(lines: Sequence[str], whole: bool) -> list[str]:
    """The first lines, and how many more there are."""
    if whole or len(lines) <= SHOWN + 1:
        return list(lines)
    return [*lines[:SHOWN], f"  and {len(lines) - SHOWN} more lines (--all shows them)"]


def say(changes: Changes, names: dict[str, str], whole: bool) -> str:
    """The changes as a text; `names` are those of classes."""
    blocks: list[list[str]] = []
    for encoder, of_class in changes.concepts.items():
        gained, lost = (sum(len(getattr(change, side)) for change in of_class.values()) for side in ("gained", "lost"))
        head = f"concepts of {encoder}: {gained} gained, {lost} lost, in {counted(len(of_class), 'class', 'classes')}"
        lines = []
        for class_id, change in of_class.items():
            lines.append("  " + ("of no class" if class_id == GENERIC else names.get(class_id, class_id)))
            lines += [f"    + {text}" for text in change.gained]
            lines += [f"    - {text} ({reason})" for text, reason in change.lost.items()]
        blocks.append([head, *shorten(lines, whole)])
    if not changes.concepts:
        blocks.append(["concepts: as they were"])
    blocks += say_runs(changes, names, whole)
    unpriced = f", {changes.unpriced} of them without a price in params.yaml" if changes.unpriced else ""
    said = f"{counted(changes.answers, 'answer', 'answers')} since, {changes.usd:.4f} US dollars{unpriced}"
    blocks.append([f"money: {said}"])
    return printable("\n\n".join("\n".join(block) for block in blocks))


def say_runs(changes: Changes, names: dict[str, str], whole: bool) -> list[list[str]]:
    """What runs make of val: a table, the classes that changed, the images that changed sides."""
    table = [["run", "before", "after", "points", "now right", "now wrong"]]
    classes = [["run", "class", "before", "after", "points", "images"]]
    sides = []
    for change in changes.runs.values():
        name, (before, after) = change.label, change.accuracy
        moved = [str(len(side)) for side in (change.now_right, change.now_wrong)]
        table.append([name, percent(before), percent(after), points(after - before), *moved])
        for class_id, (then, now, images) in sorted(
            change.classes.items(), key=lambda each: (-abs(each[1][1] - each[1][0]), each[0])
        ):
            row = [name, names.get(class_id, class_id), percent(then), percent(now), points(now - then), str(images)]
            classes.append(row)
        sides += [f"  {name}  wrong -> right  {path}" for path in change.now_right]
        sides += [f"  {name}  right -> wrong  {path}" for path in change.now_wrong]
    moved = [
        f"{count} {what}" for count, what in ((changes.added_images, "more"), (changes.removed_images, "gone")) if count
    ]
    others = f" ({', '.join(moved)})" if moved else ""
    head = f"accuracy in % on {counted(changes.images, 'image', 'images')} of val that chose nothing{others}"
    blocks = [[head, *(f"  {line}" for line in lay_out(table).splitlines())]]
    if len(classes) > 1:
        lines = [f"  {line}" for line in lay_out(classes).splitlines()]
        blocks.append(["classes, those that changed most first in each run", lines[0], *shorten(lines[1:], whole)])
    if sides:
        blocks.append(["images that changed sides", *shorten(sides, whole)])
    for what, runs in (("new runs", changes.added_runs), ("runs that are gone", changes.removed_runs)):
        if runs:
            blocks.append([f"{what}: {', '.join(runs)}"])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a revision of git's in the place of the last run")
    parser.add_argument("--all", action="store_true", help="whole lists")
    arguments = parser.parse_args()
    state = read_state(STATE, str(STATE), "run `dvc repro report`")
    before = last_state(state, DATA) if arguments.against is None else state_of(arguments.against)
    remember(state, DATA)
    if before is None:
        print("nothing to compare with: no other run was seen here; --against REV compares with one that git knows")
    else:
        against = f"revision {arguments.against}" if arguments.against is not None else "the last run that was another"
        print(printable(f"against {against}:\n"))
        print(say(compare(before, state), {**before.names, **state.names}, arguments.all))


if __name__ == "__main__":
    run(main)
