"""Format `camtrap_dp`: a Camera Trap Data Package (Camtrap DP 1.0.2, tdwg/camtrap-dp), as Agouti and Trapper export it.

`dataset.root` is the package's folder, or its datapackage.json: that names deployments.csv, media.csv and
observations.csv, the last with what was seen [O: the example of the standard]. filePath of a picture starts from the
folder of `dataset.images`, or of the package. Where it is an address, the picture has to lie in media/ there as
MEDIAID.SUFFIX, the suffix that of fileName: nothing is downloaded here. Films are left out, and so are media of another
type than image/.

A picture's label is the scientificName of its animals: of its own observations (observationLevel media), else, where it
has none, of the one taxon that an observation of level event names for that deployment and time. Of one taxon, the
picture is a row, with the box where just one animal has one. Of several taxa, each box is a row of its own (path
`FILE#ID`, ID the observationID: fieldmark/pictures/cuts.py), and a picture without all boxes is left out. Boxes
(bboxX, bboxY, bboxWidth, bboxHeight) are shares from the top left; they are taken to be of the upright picture. Blank
pictures, people and vehicles, and animals without a name are left out. All of this is counted in warnings, and so is
how many labels a machine gave (classificationMethod), since they are no truth. A scientificName may be above species:
`Ardea` is a class beside `Ardea cinerea`, and its superclass where taxonomic ranks of datapackage.json or classes.csv
do not say otherwise.

A deployment is a group, so that no camera's background stands in two splits that are drawn; two deployments of one
place are two groups. Splits are drawn: the standard has none. Time is that of the picture, place that of its
deployment, coarsened as its publisher chose; cameraDepth is depth_m. The licence is that of scope `media`. From
`taxonomic` come English vernacular names, and the ranks kingdom to genus where they are there.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fieldmark.annotations import missing_files
from fieldmark.command import UserError, name_some
from fieldmark.formats.coco import RANKS
from fieldmark.formats.manifest import inside, number, text
from fieldmark.listing import Listing, Row, merge_classes, read_class_table, read_csv
from fieldmark.params import Dataset
from fieldmark.pictures.cuts import cut_path, file_of

PACKAGE = "datapackage.json"
# The columns of each table: those that are needed, and the others of the standard.
TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "deployments": (
        ("deploymentID",),
        (
            "locationID", "locationName", "latitude", "longitude", "coordinateUncertainty", "deploymentStart",
            "deploymentEnd", "setupBy", "cameraID", "cameraModel", "cameraDelay", "cameraHeight", "cameraDepth",
            "cameraTilt", "cameraHeading", "detectionDistance", "timestampIssues", "baitUse", "featureType", "habitat",
            "deploymentGroups", "deploymentTags", "deploymentComments",
        ),
    ),
    "media": (
        ("mediaID", "deploymentID", "timestamp", "filePath"),
        (
            "captureMethod", "filePublic", "fileName", "fileMediatype", "exifData", "favorite", "mediaComments",
        ),
    ),
    "observations": (
        ("observationID", "deploymentID", "observationLevel", "observationType"),
        (
            "mediaID", "eventID", "eventStart", "eventEnd", "cameraSetupType", "scientificName", "count", "lifeStage",
            "sex", "behavior", "individualID", "individualPositionRadius", "individualPositionAngle", "individualSpeed",
            "bboxX", "bboxY", "bboxWidth", "bboxHeight", "classificationMethod", "classifiedBy",
            "classificationTimestamp", "classificationProbability", "observationTags", "observationComments",
        ),
    ),
}  # fmt: skip
SIDES = ("bboxX", "bboxY", "bboxWidth", "bboxHeight")
ENGLISH = ("eng", "en")


class Seen(NamedTuple):
    """An observation of an animal that has a name."""

    number: str
    name: str
    box: list[float] | None
    by_machine: bool


def read(dataset: Dataset) -> Listing:
    """List the pictures of animals. Raises UserError naming the file and the row that cannot stand."""
    root = Path(dataset.root)
    path = root / PACKAGE if root.is_dir() else root
    package = read_package(path)
    tables = {name: read_resource(package, name, path) for name in TABLES}
    places = {key: place_of(row, where) for key, (where, row) in by_key(tables["deployments"], "deploymentID").items()}
    media = by_key(tables["media"], "mediaID")
    left_out: dict[str, list[str]] = defaultdict(list)
    seen, events, others = read_observations(tables["observations"], media, places, left_out)
    licence = licence_of(package)
    listing = Listing([])
    machine = 0
    for key, (where, row) in media.items():
        if row["deploymentID"] not in places:
            raise UserError(f"{where}: deployment {row['deploymentID']!r} is not in deployments; take a whole package")
        if not (row.get("fileMediatype") or "image/").startswith("image/"):
            left_out["media are no pictures"].append(key)
            continue
        animals = seen.get(key) or ([] if key in others else during(events[row["deploymentID"]], row, where))
        if not animals:
            left_out["pictures show no animal that is named"].append(key)
            continue
        file = picture_of(row, key, where)
        about = {
            "split": None, "group": row["deploymentID"], "captured_at": text(row["timestamp"]), "licence": licence,
            **places[row["deploymentID"]],
        }  # fmt: skip
        names = {animal.name for animal in animals}
        boxes = [animal.box for animal in animals if animal.box is not None]
        if len(names) == 1:
            listing.images.append({"path": file, "name": animals[0].name, **about})
            if len(animals) == 1 and boxes:
                listing.images[-1]["box"] = boxes[0]
        elif len(boxes) == len(animals):
            for animal in animals:
                listing.images.append(
                    {"path": cut_path(file, animal.number), "name": animal.name, **about, "box": animal.box}
                )
        else:
            left_out["pictures show several taxa, and not every animal has a box"].append(key)
            continue
        machine += any(animal.by_machine for animal in animals)
    return finish(listing, package, path.parent, dataset.folder, left_out, machine)


def finish(
    listing: Listing, package: Row, root: Path, folder: Path, left_out: dict[str, list[str]], machine: int
) -> Listing:
    """The listing with its classes, and a warning of each thing that a person should know."""
    for reason, keys in left_out.items():
        listing.warnings.append(f"{root}: {len(keys)} {reason}, and are left out: {name_some(keys)}")
    if not listing.images:
        raise UserError(f"{root}: no picture has an animal with a scientificName; " + "; ".join(listing.warnings))
    if machine:
        said = f"the labels of {machine} pictures were given by a machine"
        listing.warnings.append(f"{root}: {said} (classificationMethod), and are learned and judged by like all others")
    files = sorted({file_of(row["path"]) for row in listing.images})
    gone = missing_files(folder, files)
    if gone:
        said = f"{len(gone)} of {len(files)} pictures that are listed are not there"
        listing.warnings.append(f"{folder}: {said}: {name_some(gone)}; download them under these names")
    listing.images.sort(key=lambda row: row["path"])
    names = {row["name"] for row in listing.images}
    listing.classes = merge_classes(describe(package, names), read_class_table(root))
    return listing


def read_package(path: Path) -> Row:
    """datapackage.json. Raises UserError where it is not there or is no package."""
    try:
        package = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder that holds {PACKAGE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not JSON ({error}); take it from the package again") from None
    if not isinstance(package, dict) or not isinstance(package.get("resources"), list):
        raise UserError(f"{path}: names no `resources`; it is no {PACKAGE} of a Camera Trap Data Package")
    return package


def read_resource(package: Row, name: str, path: Path) -> list[tuple[str, Row]]:
    """The rows of a table of the package, each with where it stands. Raises UserError where it cannot be read."""
    found = [each for each in package["resources"] if isinstance(each, dict) and each.get("name") == name]
    file = found[0].get("path") if len(found) == 1 else None
    if not isinstance(file, str):
        raise UserError(f"{path}: does not name one file of `{name}`; it is no Camera Trap Data Package")
    if "://" in file or file.endswith((".gz", ".zip")):
        raise UserError(f"{path}: {name} is {file}; download and unpack it, and write its name there")
    table = path.parent / inside(file, f"{path}: {name}")
    needed, optional = TABLES[name]
    rows = read_csv(table, needed, optional)
    return [(f"{table}: line {line}", row) for line, row in enumerate(rows, start=2)]


def by_key(rows: Iterable[tuple[str, Row]], key: str) -> dict[str, tuple[str, Row]]:
    found: dict[str, tuple[str, Row]] = {}
    for where, row in rows:
        if not row[key] or row[key] in found:
            raise UserError(f"{where}: {key} {row[key]!r} is empty or stands there twice; correct it")
        found[row[key]] = (where, row)
    return found


def place_of(row: Row, where: str) -> Row:
    """Where a deployment's camera stood. Raises UserError for what is no place."""
    found = {column: number(row.get(column), column, where) for column in ("latitude", "longitude")}
    return {**found, "depth_m": number(row.get("cameraDepth"), "cameraDepth", where)}


def read_observations(
    rows: Iterable[tuple[str, Row]], media: dict[str, Any], places: dict[str, Row], left_out: dict[str, list[str]]
) -> tuple[dict[str, list[Seen]], dict[str, list[tuple[datetime, datetime, str]]], set[str]]:
    """Animals by mediaID; of each deployment the taxa of its events, with their times; and media without an animal."""
    seen: dict[str, list[Seen]] = defaultdict(list)
    events: dict[str, list[tuple[datetime, datetime, str]]] = defaultdict(list)
    others: set[str] = set()
    for where, row in rows:
        key, name = row.get("mediaID") or "", (row.get("scientificName") or "").strip()
        animal = row["observationType"] == "animal"
        if row["observationLevel"] == "event":
            if row["deploymentID"] not in places:
                raise UserError(f"{where}: deployment {row['deploymentID']!r} is not in deployments")
            if animal and name:
                start, end = (moment(row.get(side), f"{where}: {side}") for side in ("eventStart", "eventEnd"))
                events[row["deploymentID"]].append((start, end, name))
            continue
        if key not in media:
            raise UserError(f"{where}: media {key!r} is not in media; take a whole package")
        if not animal or not name:
            others.add(key)
            kind = "animals have no name" if animal else f"observations are of type {row['observationType']}"
            left_out[kind].append(row["observationID"])
            continue
        by_machine = row.get("classificationMethod") == "machine"
        seen[key].append(Seen(row["observationID"], name, box_of(row, where), by_machine))
    return seen, events, others


def moment(value: str | None, where: str) -> datetime:
    """A time of ISO 8601; without a zone it is in UTC. Raises UserError, beginning with `where`."""
    try:
        found = datetime.fromisoformat((value or "").strip())
    except ValueError:
        raise UserError(f"{where} is {value!r}; write a time as 2020-05-30T02:57:37Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def during(events: list[tuple[datetime, datetime, str]], row: Row, where: str) -> list[Seen]:
    """The one taxon of the events in which a picture was taken; nothing where there is none, or more than one."""
    if not events:
        return []
    at = moment(row["timestamp"], f"{where}: timestamp")
    names = {name for start, end, name in events if start <= at <= end}
    return [Seen("", name, None, False) for name in names] if len(names) == 1 else []


def box_of(row: Row, where: str) -> list[float] | None:
    """The box of an observation in [0,1]; None where it has none. Raises UserError for one that is none."""
    sides = [number(row.get(side), side, where) for side in SIDES]
    if all(side is None for side in sides):
        return None
    if any(side is None for side in sides):
        raise UserError(f"{where}: only some of {', '.join(SIDES)} are filled in; fill in all, or none")
    x, y, width, height = (side or 0.0 for side in sides)
    box = [min(max(side, 0.0), 1.0) for side in (x, y, x + width, y + height)]
    if max(x, y, width, height) > 1 or not (box[0] < box[2] and box[1] < box[3]):
        said = ", ".join(f"{side:g}" for side in (x, y, width, height))
        remedy = "they are shares of the picture (divide pixels by its sides)"
        raise UserError(f"{where}: {', '.join(SIDES)} are {said}; {remedy}")
    return box


def picture_of(row: Row, key: str, where: str) -> str:
    """Where a picture lies, from the folder of pictures."""
    path = row["filePath"].strip()
    if "://" not in path:
        return inside(path, where)
    suffix = PurePosixPath((row.get("fileName") or "").strip()).suffix.lower() or ".jpg"
    return inside(f"media/{key}{suffix}", where)


def licence_of(package: Row) -> str | None:
    """The licence of the media, by its name or address."""
    licences = package.get("licenses")
    for licence in licences if isinstance(licences, list) else []:
        if isinstance(licence, dict) and licence.get("scope") == "media":
            return text(licence.get("name") or licence.get("path"))
    return None


def describe(package: Row, names: set[str]) -> list[Row]:
    """A row a taxon: its English name, and its ranks or, without them, the genus that is a class as well."""
    taxa = package.get("taxonomic")
    taxa = [each for each in taxa if isinstance(each, dict)] if isinstance(taxa, list) else []
    known = {str(each["scientificName"]): each for each in taxa if each.get("scientificName")}
    english = {}
    for name in names:
        vernacular = known.get(name, {}).get("vernacularNames")
        found = [vernacular[key] for key in ENGLISH if vernacular.get(key)] if isinstance(vernacular, dict) else []
        english[name] = str(found[0]) if found else name
    count = Counter(english.values())
    rows = []
    for name in sorted(names):
        lineage = [str(known[name][rank]) for rank in RANKS if known.get(name, {}).get(rank)]
        lineage = [rank for rank in lineage if rank != name]
        genus = name.split()[0]
        above = lineage or ([genus] if genus != name and genus in names else [])
        rows.append({
            "class_id": name, "scientific_name": name, "superclass": above[-1] if above else None,
            "name": english[name] if count[english[name]] == 1 else f"{english[name]} ({name})",
            "lineage": above or None,
        })  # fmt: skip
    return rows
