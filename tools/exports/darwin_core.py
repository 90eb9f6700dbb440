"""What a run predicts as a Darwin Core archive, the zip that GBIF, OBIS and their readers take.

OUT is a zip of meta.xml, eml.xml and occurrence.txt: an occurrence an image, its columns terms of Darwin Core (TERMS).
  occurrenceID                      the image_id, the same in every export
  basisOfRecord                     MachineObservation
  scientificName, kingdom, higherClassification
                                    of the class, from data/index/classes.parquet: scientific_name, and lineage where it
                                    is known; a class without a scientific name leaves it empty
  scientificNameID                  of the class, by WoRMS (urn:lsid:marinespecies.org:taxname:AphiaID), as OBIS asks;
                                    the column is there where a class has one (aphia_id in classes.csv)
  verbatimIdentification            the class as the data set writes it
  identificationVerificationStatus  ValidatedByHuman: the name is the data set's label, whatever the run says;
                                    PredictedByMachine: nobody has looked (the words are OBIS's, after Martin-Cabrera et
                                    al. 2022 [mem])
  identifiedBy                      the label, or the run
  previousIdentifications           what the run takes the image for, where the label says otherwise
  dynamicProperties                 JSON: path, split, group, and `probability`, which the run gives the row's own name
  eventDate                         captured_at where it is a date of ISO 8601 or of EXIF; as it stands it is always
                                    verbatimEventDate
  decimalLatitude, decimalLongitude, minimumDepthInMeters, maximumDepthInMeters, license
                                    from the index; longitudes in [-180, 180]

So no row bears a name that somebody knows to be wrong. Lineages have no rank names, so they are higherClassification;
kingdom is filled in where one of GBIF's eight stands in it.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

from fieldmark import store
from fieldmark.command import counted
from fieldmark.listing import WORMS
from fieldmark.pictures.cuts import file_of
from tools.exports.index import Index, Row, check_file
from tools.exports.predictions import Said, Source

COLUMNS = ("group", "captured_at", "latitude", "longitude", "depth_m", "licence")
DWC, DC = "http://rs.tdwg.org/dwc/terms/", "http://purl.org/dc/terms/"
TERMS = {
    "occurrenceID": DWC, "basisOfRecord": DWC, "occurrenceStatus": DWC, "eventDate": DWC, "verbatimEventDate": DWC,
    "decimalLatitude": DWC, "decimalLongitude": DWC, "geodeticDatum": DWC, "minimumDepthInMeters": DWC,
    "maximumDepthInMeters": DWC, "scientificName": DWC, "kingdom": DWC, "higherClassification": DWC,
    "vernacularName": DWC, "verbatimIdentification": DWC, "identifiedBy": DWC, "identificationReferences": DWC,
    "identificationVerificationStatus": DWC, "identificationRemarks": DWC, "previousIdentifications": DWC,
    "associatedMedia": DWC, "license": DC, "dynamicProperties": DWC,
}  # fmt: skip
HUMAN, MACHINE = "ValidatedByHuman", "PredictedByMachine"
LABEL = "label of the data set"
# There where a class has one.
TAXON = "scientificNameID"
# Those of GBIF's backbone: a name that is one of these is a kingdom, whatever the ranks beside it.
KINGDOMS = {"Animalia", "Archaea", "Bacteria", "Chromista", "Fungi", "Plantae", "Protozoa", "Viruses"}
EXIF_DATE = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)")
PART_OF_DATE = re.compile(r"\d{4}(-(0[1-9]|1[0-2]))?")
# A zip keeps the time of each file; the earliest that it knows stands for none.
NO_TIME = (1980, 1, 1, 0, 0, 0)


def event_date(captured_at: str | None) -> str:
    """A date of ISO 8601, whole or a year or a month, or one as EXIF writes it; anything else could be misread."""
    text = EXIF_DATE.sub(r"\1-\2-\3T\4", captured_at or "")
    if PART_OF_DATE.fullmatch(text):
        return text
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return ""
    return text.replace(" ", "T")


def taxon(row: Row) -> Row:
    """The terms that name a class."""
    scientific, name = row["scientific_name"] or "", row["name"]
    above = [rank for rank in row["lineage"] or [] if rank not in (name, scientific)]
    return {
        "scientificName": scientific,
        TAXON: next((alias for alias in row["aliases"] or [] if alias.startswith(WORMS)), ""),
        "kingdom": next((rank for rank in above if rank in KINGDOMS), ""),
        "higherClassification": " | ".join(above),
        "vernacularName": name if scientific and name != scientific else "",
        "verbatimIdentification": name,
    }


def place(image: Row) -> Row:
    """Where and when an image was taken, as far as the index says."""
    latitude, longitude, depth = image["latitude"], image["longitude"], image["depth_m"]
    known = latitude is not None and longitude is not None
    return {
        "eventDate": event_date(image["captured_at"]),
        "verbatimEventDate": image["captured_at"] or "",
        "decimalLatitude": latitude if known else "",
        "decimalLongitude": (longitude - 360 if longitude > 180 else longitude) if known else "",
        "geodeticDatum": "not recorded" if known else "",  # the word that Darwin Core asks for
        "minimumDepthInMeters": "" if depth is None else depth,
        "maximumDepthInMeters": "" if depth is None else depth,
    }


def occurrence(said: Said, classes: dict[str, Row], source: Source, media: str | None) -> Row:
    """One row: the label where there is one, else what the run says."""
    image, predicted = said.image, classes[said.class_id]
    label, own = (None, said.probability) if said.of_label is None else (classes[image["class_id"]], said.of_label)
    agreed = label is None or label is predicted
    name = predicted["scientific_name"] or predicted["name"]
    about = {"path": image["path"], "split": said.split, "group": image["group"], "probability": own}
    by = [*([LABEL] if label else []), *([str(source)] if agreed else [])]
    return {
        "occurrenceID": image["image_id"],
        "basisOfRecord": "MachineObservation",
        "occurrenceStatus": "present",
        **place(image),
        **taxon(label or predicted),
        "identifiedBy": " | ".join(by),
        "identificationReferences": f"{source}, fingerprint {source.mark}",
        "identificationVerificationStatus": HUMAN if label else MACHINE,
        "identificationRemarks": f"probability {own:.4f} by {source}, calibrated on val",
        "previousIdentifications": "" if agreed else f"{name} (probability {said.probability:.4f} by {source})",
        "associatedMedia": media + quote(file_of(image["path"])) if media else "",
        "license": image["licence"] or "",
        "dynamicProperties": json.dumps({k: v for k, v in about.items() if v is not None}, ensure_ascii=False),
    }


def field(value: object) -> str:
    """A value as a field of a tab-separated file that quotes nothing."""
    return re.sub(r"\s+", " ", str(value)).strip()


def meta(terms: dict[str, str]) -> str:
    """meta.xml, which says which term a column is."""
    fields = "\n".join(
        f'    <field index="{number}" term="{space}{name}"/>' for number, (name, space) in enumerate(terms.items())
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<archive xmlns="http://rs.tdwg.org/dwc/text/" metadata="eml.xml">
  <core encoding="UTF-8" fieldsTerminatedBy="\\t" linesTerminatedBy="\\n" fieldsEnclosedBy="" ignoreHeaderLines="1"
        rowType="{DWC}Occurrence">
    <files><location>occurrence.txt</location></files>
    <id index="0"/>
{fields}
  </core>
</archive>
"""


def eml(source: Source, index: Index, rows: int) -> str:
    """eml.xml: what can be said without knowing who publishes. Title, creator and contact are theirs to fill in."""
    mark = store.sha256("".join(index.fingerprints.values()) + source.mark)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<eml:eml xmlns:eml="https://eml.ecoinformatics.org/eml-2.2.0" packageId="{mark}" system="fieldmark" xml:lang="en">
  <dataset>
    <title>Images of {len(index.classes)} classes and what {escape(str(source))} says of them</title>
    <creator><organizationName>to be filled in by who publishes</organizationName></creator>
    <language>en</language>
    <abstract><para>{rows} occurrences, one an image. Names are the data set's labels; where there is none, they are
      predictions and say so (identificationVerificationStatus). Probabilities are
      calibrated on val (temperature {source.temperature:.3f}).</para></abstract>
    <contact><organizationName>to be filled in by who publishes</organizationName></contact>
  </dataset>
</eml:eml>
"""


def write_archive(out: Path, index: Index, source: Source, said: Sequence[Said], media: str | None) -> str:
    """Write the zip. Returns what there is to say of it: also how many rows no taxonomy will find."""
    check_file(out, "occurrences.zip")
    classes = {row["class_id"]: row for row in index.classes}
    rows = [occurrence(each, classes, source, media) for each in said]
    terms = TERMS | ({TAXON: DWC} if any(row[TAXON] for row in rows) else {})
    lines = ["\t".join(terms), *("\t".join(field(row[name]) for name in terms) for row in rows)]
    files = {
        "meta.xml": meta(terms),
        "eml.xml": eml(source, index, len(rows)),
        "occurrence.txt": "\n".join(lines) + "\n",
    }
    store.write_atomic(out, lambda partial: write_zip(files, partial))
    machine = sum(row["identificationVerificationStatus"] == MACHINE for row in rows)
    return "; ".join([f"{len(rows)} occurrences, {machine} of them {MACHINE}", *lacking(rows)])


def lacking(rows: Iterable[Row]) -> list[str]:
    """What publishers will miss, and how to add it."""
    unnamed = [row["verbatimIdentification"] for row in rows if not row["scientificName"]]
    undated = sum(not row["eventDate"] for row in rows)
    unplaced = sum(row["decimalLatitude"] == "" for row in rows)
    said = []
    if unnamed:
        classes = counted(len(set(unnamed)), "class", "classes")
        said.append(f"{len(unnamed)} without a scientificName, of {classes} (scientific_name in classes.csv)")
    if undated:
        said.append(f"{undated} without an eventDate (captured_at in the manifest)")
    if unplaced:
        said.append(f"{unplaced} without coordinates (latitude, longitude)")
    return said


def write_zip(files: dict[str, str], path: Path) -> None:
    """Equal files, equal bytes: a member has no time of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            member = zipfile.ZipInfo(name, NO_TIME)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, text)
