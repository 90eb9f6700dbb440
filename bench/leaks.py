"""What 10,000 sentences about aircraft give away: names in them, and their words alone, before and after the mask.

Reads ../shared/data/aircraft_texts: gpt-4o-mini's sentence of each picture of FGVC-Aircraft, asked without the label.
Two class tables: the 100 variants' names alone, and with the maker as superclass and the family in the lineage. Of the
sentences that state the right family, by a rule apart from the mask's, prints how many still do; and the accuracy of
the control of evaluation/leaks.py on the official test part, for families and variants.

    python -m bench.leaks
"""

import csv
import json
import platform
import re
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from evaluation.leaks import KINDS, Names, by_words, naming, telling_words
from fieldmark.concepts.names import Keys, NameMask, domain_words

TEXTS = Path("../shared/data/aircraft_texts")
CARD = domain_words("aircraft")
Row = dict[str, str]


def stating(family: str) -> re.Pattern[str]:
    """Finds a family's name or code: 737 of Boeing 737, A320, A-320 and A 320 of A320."""
    code = re.sub(r"^(?:Boeing|Embraer) (?=\d|E-|ERJ)", "", family)
    pieces = re.findall(r"[A-Za-z]+|\d+", code)
    return re.compile(r"(?<![A-Za-z0-9])" + r"[\s/-]*".join(pieces) + r"(?![0-9])", re.IGNORECASE)


def read_texts() -> tuple[dict[str, str], list[Row]]:
    """The sentence of each file, and the rows of labels.csv."""
    texts = json.loads((TEXTS / "descriptions.json").read_text(encoding="utf-8"))
    with (TEXTS / "labels.csv").open(encoding="utf-8", newline="") as file:
        return texts, list(csv.DictReader(file))


def class_rows(labels: list[Row], grouped: bool) -> list[dict[str, object]]:
    """Rows of a class table: the variants, and where `grouped` their makers and families."""
    found = {row["variant"]: row for row in labels}
    groups = {
        name: {"superclass": row["manufacturer"], "lineage": [row["manufacturer"], row["family"]]}
        for name, row in found.items()
    }
    return [{"class_id": name, "name": name, **(groups[name] if grouped else {})} for name in sorted(found)]


def alone(texts: dict[str, str], labels: list[Row], level: str) -> float:
    """Accuracy on the official test part of words alone, for families or variants."""
    order = sorted({row[level] for row in labels})
    train, test = ([row for row in labels if row["split"] == part] for part in ("train", "test"))
    y, truth = (np.array([order.index(row[level]) for row in rows]) for rows in (train, test))
    found = by_words([texts[row["file"]] for row in train], y, [texts[row["file"]] for row in test])
    return float((found == truth).mean())


def main() -> None:
    if not TEXTS.is_dir():
        sys.exit(f"leaks: {TEXTS} is not there; it needs the shared test material beside the checkout")
    print(f"{platform.machine()}, Python {platform.python_version()}")
    texts, labels = read_texts()
    patterns = {row["family"]: stating(row["family"]) for row in labels}
    right = [row for row in labels if patterns[row["family"]].search(texts[row["file"]])]
    print(f"{len(right)} of {len(labels)} sentences state the right family")
    versions = {"as written": texts}
    names = Names(class_rows(labels, grouped=True), CARD)
    for label, grouped in (("variants' names", False), ("with makers and families", True)):
        rows = class_rows(labels, grouped)
        started = perf_counter()
        mask = NameMask(Keys.of(rows, CARD), "aircraft")
        versions[f"masked, {label}"] = {file: mask.apply(text)[0] for file, text in texts.items()}
        print(f"masked in {perf_counter() - started:.1f} s, {label}; without a telling word: {Names(rows, CARD).bare}")
    for label, said in versions.items():
        still = sum(bool(patterns[row["family"]].search(said[row["file"]])) for row in right)
        found = naming(names, said, {row["file"]: row["variant"] for row in labels})
        shares = ", ".join(f"{found[kind]:.1%} {what}" for kind, what in KINDS.items())
        print(f"\n{label}: {still} ({still / len(right):.1%}) still state it\n    names: {shares}")
        for level in ("family", "variant"):
            print(f"    words alone, {level}: {alone(said, labels, level):.3f}")
        train = [row for row in labels if row["split"] == "train"]
        for row in telling_words([said[row["file"]] for row in train], [row["variant"] for row in train]):
            print(f"    {row['word']}: {row['texts']} of {row['of']} are of {row['class_id']}")


if __name__ == "__main__":
    main()
