"""Format `clips`: films, whose frames are the pictures; in folders of their classes, or with a table.

Without a table: root/CLASS/CLIP or root/SPLIT/CLASS/CLIP, as pictures lie in `imagefolder`. `dataset.frames_per_second`
says which frames are pictures (fieldmark/pictures/clips.py: paths, containers and limits). All frames of a clip are one
group, named by the path of the clip, so that none stands in train and another in test.

With root/clips.csv, a row says what is seen in a clip. Columns: path (from root) and class; and, where known, split,
group (a dive, a camera; the clip itself without it), licence, captured_at (of the first frame, in ISO 8601: each
frame's own time follows from it), latitude, longitude, depth_m, and
  start, end   seconds from the first frame, of the part of the clip that shows the class: its frames alone
  time, box    seconds, of the one frame that was annotated, and the object's box in it (x0 y0 x1 y1 in shares of it);
               with a path `CLIP#ID` the picture is what lies in the box (fieldmark/pictures/cuts.py)
A clip may have several rows; a frame that two of them claim is an error. classes.csv in root as elsewhere.

Listing reads how long each clip is; a clip that cannot be read is one row, which becomes
`broken` with the reason. PyAV is needed, the extra `video`.
"""

import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from fieldmark.command import UserError
from fieldmark.formats.hf_imagefolder import visible_files
from fieldmark.formats.manifest import OPTIONAL, image_of, number
from fieldmark.listing import SPLITS, Listing, Row, Spelling, read_class_table, read_csv
from fieldmark.params import Dataset
from fieldmark.pictures.clips import MAX_SECONDS, MOST, count_frames, frame_path, is_film, length_of, moment_path
from fieldmark.pictures.cuts import file_of, is_cut
from fieldmark.pictures.files import BadImage

TABLE = "clips.csv"
MOMENTS = ("start", "end", "time")


def read(dataset: Dataset) -> Listing:
    """List the frames. Raises UserError where the folders are not laid out as above, or a row cannot stand."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name the one that holds the clips")
    files = [path.relative_to(root).as_posix() for path in visible_files(root)]
    films = [path for path in files if is_film(path)]
    listing = Listing([], read_class_table(root))
    if (root / TABLE).is_file():
        rows = read_table(root, dataset.frames_per_second)
        named = {row["clip"] for row in rows}
        listing.passed_over = [path for path in films if path not in named]
    else:
        placed = {path: place_of(path) for path in films}
        listing.passed_over = [path for path, place in placed.items() if place is None]
        rows = [
            frame
            for path, place in placed.items()
            if place is not None
            for frame in frames_of(root, path, {"name": place[1], "split": place[0]}, dataset.frames_per_second)
        ]
    if not rows:
        raise UserError(f"params.yaml: dataset.root: {root} holds no clip; expected {root}/CLASS/CLIP, or {TABLE}")
    listing.images = sorted(rows, key=lambda row: str(row["path"]))
    return listing


def place_of(path: str) -> tuple[str | None, str] | None:
    """The split and the class of a clip by its folders; None where it does not lie in a folder of its class."""
    match path.split("/")[:-1]:
        case [name] if name not in SPLITS:
            return None, name
        case [split, name] if split in SPLITS:
            return split, name
    return None


def read_table(root: Path, rate: float) -> list[Row]:
    """A row a frame that clips.csv names, with its `clip`. Raises UserError for a line that cannot stand."""
    path, spelling = root / TABLE, Spelling(root)
    rows: dict[str, Row] = {}
    lines: dict[str, str] = {}
    for line, row in enumerate(read_csv(path, ["path", "class"], [*OPTIONAL, *MOMENTS]), start=2):
        where = f"{path}: line {line}"
        image = image_of(row, where)
        start, end, time = (number(row.get(name), name, where) for name in MOMENTS)
        if time is not None and (start is not None or end is not None):
            raise UserError(f"{where}: has a time, and a start or an end; write the one or the others")
        if min(start or 0, time or 0) < 0 or (end is not None and end <= (start or 0)):
            raise UserError(f"{where}: start, end, time are seconds from the first frame, and end comes after start")
        if max(start or 0, end or 0, time or 0) > MAX_SECONDS:
            raise UserError(f"{where}: start, end, time are seconds, and no film has {MAX_SECONDS:.0f} of them")
        if image["box"] is not None and time is None:
            raise UserError(f"{where}: has a box and no time; a box is of one frame: write when it was annotated")
        if is_cut(image["path"]) and image["box"] is None:
            raise UserError(f"{where}: {image['path']!r} names a box by its `#`; give the row a box and a time")
        named = image.pop("path")
        clip, mark = spelling.on_disk(file_of(named)), named[len(file_of(named)) :]
        try:
            if time is None:
                frames = frames_of(root, clip, image, rate, start, end)
            else:
                frames = [{"group": clip, **given(image), "path": moment_path(clip, time) + mark, **taken(image, time)}]
        except OverflowError:
            said = f"captured_at is {image['captured_at']!r}, and frames are later than any date can say"
            raise UserError(f"{where}: {said}; correct it") from None
        for frame in frames:
            other = lines.setdefault(frame["path"], where)
            # Of a clip that cannot be read, one row says so.
            if other != where and "unread" not in frame:
                raise UserError(f"{where}: the frame {frame['path']!r} is of {other} too; let their times not overlap")
            rows.setdefault(frame["path"], {**frame, "clip": clip})
    return list(rows.values())


def frames_of(
    root: Path, clip: str, about: Row, rate: float, start: float | None = None, end: float | None = None
) -> list[Row]:
    """A row a frame of a clip, or of a part of it; one alone, `unread`, of a clip that cannot be read."""
    about = {"group": clip, **given(about)}
    try:
        numbers = numbers_within(length_of(root / clip), rate, start, end)
    except BadImage:
        return [{**about, "path": frame_path(clip, rate, 0), "unread": True}]
    return [{**about, "path": frame_path(clip, rate, each), **taken(about, each / rate)} for each in numbers]


def given(row: Row) -> Row:
    """What a row says, and its split, which may be None."""
    return {key: value for key, value in row.items() if value is not None or key == "split"}


def numbers_within(seconds: float, rate: float, start: float | None = None, end: float | None = None) -> Iterable[int]:
    """The frames of a clip from `start` to before `end`; of a part between two of them, the one that it begins in."""
    last = count_frames(seconds, rate)
    first = math.ceil((start or 0) * rate - 1e-6)
    behind = last if end is None else min(last, math.ceil(end * rate - 1e-6))
    return range(first, behind) if first < behind else [min(max(first - 1, 0), MOST - 1)]


def taken(row: Row, after: float) -> Row:
    """When a frame was taken, from when its clip begins, where that is a time of ISO 8601."""
    try:
        begins = datetime.fromisoformat(str(row.get("captured_at")))
    except ValueError:
        return {}
    return {"captured_at": (begins + timedelta(seconds=after)).isoformat().replace("+00:00", "Z")}
