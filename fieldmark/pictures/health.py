"""What is wrong with a data set before anyone trains on it: duplicates, leaks between splits, classes without images.

Near duplicates are pairs of pictures whose 64-bit difference hashes (decode.dhash) differ in at most NEAR_BITS bits. On
5,902 crops of CUB-200-2011 all 3 pairs within 3 bits were the same photograph, and none of the 6 pairs at 4 and 5 bits
was; two more pairs of the same photograph were 6 and 7 bits apart. So a pair that is found can be trusted, and some are
not found.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from fieldmark.command import counted, name_some
from fieldmark.listing import SPLITS, Listing, Row

NEAR_BITS = 3
# Of pictures that share one hash (black frames, for example) only so many are paired; all of them are counted as leaks.
MAX_PAIRED = 20
# A run is the hashes that share one piece. All runs of up to SHORT_RUN hashes are compared together; each longer one by
# itself, BLOCK of its hashes at a time.
SHORT_RUN, BLOCK = 64, 2048
# So many names stand in a warning.
SHOWN = 3
# What it means to have no image in a split, and what to do.
WITHOUT = {
    "train": "nothing learns them from images; add some",
    "val": "they have no say in what is chosen on val; add images, or raise dataset.val_fraction",
    "test": "test accuracy says nothing of them; add images, or raise dataset.test_fraction",
}


def near_pairs(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (i, j), i < j, of distinct uint64 hashes (n,) that differ in at most NEAR_BITS bits.

    It finds every such pair. A hash has NEAR_BITS + 1 = 4 pieces of 16 bits, and two hashes that differ in so few bits
    have at least one whole piece in common (Manku et al., WWW 2007): only hashes with a common piece are compared.
    """
    found = [np.zeros((0, 2), dtype=np.int64)]
    for shift in range(0, 64, 16):
        piece = (hashes >> np.uint64(shift)).astype(np.uint16)
        order = np.argsort(piece, kind="stable")
        _, lengths = np.unique(piece, return_counts=True)
        is_long = lengths > SHORT_RUN
        for run in np.split(order, np.cumsum(lengths)[:-1]) if is_long.any() else []:
            if len(run) > SHORT_RUN:
                found += compare_run(hashes, run)
        # All short runs at once: each member with the next in its run, then with the one after that, and so on.
        members = order[~np.repeat(is_long, lengths)]
        for step in range(1, SHORT_RUN):
            same = np.flatnonzero(piece[members][step:] == piece[members][:-step])
            if not same.size:
                break
            pairs = np.stack([members[same], members[same + step]], axis=1)
            found.append(pairs[is_near(hashes[pairs[:, 0]], hashes[pairs[:, 1]])])
    pairs = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return pairs[:, 0], pairs[:, 1]


def is_near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    near: np.ndarray = np.bitwise_count(a ^ b) <= NEAR_BITS
    return near


def compare_run(hashes: np.ndarray, run: np.ndarray) -> list[np.ndarray]:
    """The near pairs (k, 2) among the positions `run`, every one with every other, BLOCK of them at a time."""
    found = []
    for start in range(0, len(run), BLOCK):
        block, rest = run[start : start + BLOCK], run[start:]
        a, b = np.nonzero(np.triu(is_near(hashes[block][:, None], hashes[rest][None]), 1))
        found.append(np.stack([block[a], rest[b]], axis=1))
    return found


class ByHash(NamedTuple):
    """Rows by their difference hash."""

    hashes: np.ndarray  # distinct ones, sorted
    places: np.ndarray  # of all rows, hash by hash
    starts: np.ndarray  # where those of each hash begin in `places`
    counts: np.ndarray

    def rows_of(self, number: int) -> list[int]:
        """Where the rows of a hash stand, in order; by its position in `hashes`."""
        places: list[int] = self.places[self.starts[number] : self.starts[number] + self.counts[number]].tolist()
        return places


def by_hash(rows: Sequence[Row]) -> ByHash:
    """Where the rows of each difference hash stand, in order; all have one."""
    hashes = np.fromiter((row["dhash"] for row in rows), dtype=np.uint64, count=len(rows))
    places = np.argsort(hashes, kind="stable")
    distinct, starts, counts = np.unique(hashes[places], return_index=True, return_counts=True)
    return ByHash(distinct, places, starts, counts)


def find_near_duplicates(rows: Sequence[Row]) -> tuple[list[Row], set[str]]:
    """Pairs of used images (path, other, bits), and the paths of test images that have a near duplicate elsewhere.

    `rows` are those of index.images that are ok. Of images that share one hash the first MAX_PAIRED are paired.
    Documents have no hash, and are in no pair.
    """
    ordered = sorted((row for row in rows if row.get("dhash") is not None), key=lambda row: row["path"])
    found = by_hash(ordered)
    pairs: list[Row] = []
    leaks: set[str] = set()
    twins = ((number, number) for number in np.flatnonzero(found.counts > 1).tolist())
    near = zip(*(side.tolist() for side in near_pairs(found.hashes)), strict=True)
    for a, b in chain(twins, near):
        bits = int(np.bitwise_count(found.hashes[a] ^ found.hashes[b]))
        of_a, of_b = ([ordered[place] for place in found.rows_of(number)] for number in (a, b))
        splits = {row["split"] for row in chain(of_a, of_b)}
        if "test" in splits and len(splits) > 1:
            for one, other in ((of_a, of_b), (of_b, of_a)):
                if any(row["split"] != "test" for row in other):
                    leaks |= {row["path"] for row in one if row["split"] == "test"}
        for first in of_a[:MAX_PAIRED]:
            for second in of_b[:MAX_PAIRED]:
                if a != b or first["path"] < second["path"]:
                    path, other_path = sorted((first["path"], second["path"]))
                    pairs.append({"path": path, "other": other_path, "bits": bits})
    return pairs, leaks


def likely_sequences(rows: Iterable[Row]) -> list[list[Row]]:
    """The usable rows of each sequence (sequences.py) that is not of one group already, the worst first.

    That is: those with pictures in test and elsewhere, then the longest, then by path.
    """
    members: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row.get("sequence") is not None:
            members[row["sequence"]].append(row)
    groups = {name: {row.get("group") for row in each} for name, each in members.items()}
    found = [each for name, each in members.items() if len(groups[name]) > 1 or None in groups[name]]
    return sorted(found, key=lambda each: (not gives_test_away(each), -len(each), each[0]["path"]))


def gives_test_away(members: Iterable[Row]) -> bool:
    splits = {row["split"] for row in members}
    return "test" in splits and len(splits) > 1


def sizes_of(rows: Iterable[Row]) -> Iterator[tuple[int, int]]:
    """Width and height of those that are pictures."""
    return ((row["width"], row["height"]) for row in rows if row.get("width") is not None)


def spread(values: Iterable[int]) -> Row:
    """The smallest, median and largest value; null where there is none."""
    numbers = np.fromiter(values, dtype=np.int64)
    if not numbers.size:
        return {"min": None, "median": None, "max": None}
    return {"min": int(numbers.min()), "median": float(np.median(numbers)), "max": int(numbers.max())}


def count_pairs(pairs: Iterable[tuple[Row, Row]]) -> dict[str, int]:
    """How many pairs of rows are of two classes, of two splits of one class, or of one class and split."""
    counts = {"within_split": 0, "across_splits": 0, "across_classes": 0}
    for a, b in pairs:
        if a["class_id"] != b["class_id"]:
            counts["across_classes"] += 1
        else:
            counts["within_split" if a["split"] == b["split"] else "across_splits"] += 1
    return counts


def examine(rows: Sequence[Row], classes: Sequence[Row], listing: Listing) -> tuple[dict[str, Any], list[Row]]:
    """The health of an index (all its image rows and classes) as numbers, and its near duplicates as rows."""
    usable = [row for row in rows if row["status"] == "ok"]
    pairs, leaks = find_near_duplicates(usable)
    named = {pair[end] for pair in pairs for end in ("path", "other")}
    named |= {row["duplicate_of"] for row in rows if row["status"] == "duplicate"}
    by_path = {row["path"]: row for row in usable if row["path"] in named}
    copies = count_pairs((row, by_path[row["duplicate_of"]]) for row in rows if row["status"] == "duplicate")
    copies["across_classes"] = sum(row["status"] == "conflict" for row in rows)

    splits_of: dict[str, set[str]] = defaultdict(set)
    for row in usable:
        if row.get("group") is not None:
            splits_of[row["group"]].add(row["split"])
    leaking = {group for group, splits in splits_of.items() if "test" in splits and len(splits) > 1}
    of_group = {row["path"] for row in usable if row["split"] == "test" and row.get("group") in leaking}

    sequences = likely_sequences(rows)
    shown = [row for each in sequences if gives_test_away(each) for row in each if row["split"] == "test"]

    size = {split: dict.fromkeys((row["class_id"] for row in usable), 0) for split in SPLITS}
    for row in usable:
        size[row["split"]][row["class_id"]] += 1
    with_images = {row["class_id"] for row in usable}
    health = {
        "byte_duplicates": copies,
        "near_duplicates": count_pairs((by_path[pair["path"]], by_path[pair["other"]]) for pair in pairs),
        "groups": {"count": len(splits_of), "across_splits": sum(len(splits) > 1 for splits in splits_of.values())},
        "sequences": {
            "count": len(sequences),
            "images": sum(map(len, sequences)),
            "across_splits": sum(len({row["split"] for row in each}) > 1 for each in sequences),
            "test_images": len(shown),
        },
        "contaminated_test": {
            "near_duplicates": len(leaks),
            "groups": len(of_group),
            "images": len(leaks | of_group),
        },
        "images_a_class": {split: spread(counts.values()) for split, counts in size.items()},
        "classes_without": {
            **{split: sum(count == 0 for count in counts.values()) for split, counts in size.items()},
            "images": sum(row["class_id"] not in with_images for row in classes),
        },
        "pixels": {
            "shorter_side": spread(min(size) for size in sizes_of(usable)),
            "longer_side": spread(max(size) for size in sizes_of(usable)),
        },
        "passed_over": len(listing.passed_over),
    }
    return health, pairs


def warnings(health: dict[str, Any], rows: Sequence[Row], classes: Sequence[Row], listing: Listing) -> list[str]:
    """What a person should know before they trust a number, most serious first."""
    said = []

    def say(names: Sequence[str], one: str, many: str, more: str = "") -> None:
        if names:
            said.append(f"{counted(len(names), one, many)}: {name_some(names, SHOWN)}{more}")

    leak, tested = health["contaminated_test"], sum((row["split"], row["status"]) == ("test", "ok") for row in rows)
    if leak["images"]:
        said.append(
            f"test is contaminated: {leak['images']} of {tested} test images have a near duplicate in train or val"
            f" ({leak['near_duplicates']}) or are of a group that train or val has too ({leak['groups']}); their"
            " accuracy is optimistic; data/index/near_duplicates.parquet lists the pairs"
        )
    sequences = likely_sequences(rows)
    if sequences:
        found = health["sequences"]
        one, many = "likely sequence holds", "likely sequences hold"
        names = [f"{each[0]['path']} to {PurePosixPath(each[-1]['path']).name} ({len(each)})" for each in sequences]
        said.append(
            f"{counted(len(sequences), one, many)} {found['images']} images taken one after the other of one thing, and"
            f" {found['test_images']} of {tested} test images have others of theirs in train or val:"
            f" {name_some(names, SHOWN)}; look at some: where it is so, `group_by: sequence` under `dataset` in"
            " params.yaml keeps each in one of the splits that are drawn"
        )
    conflicts, broken = ([row["path"] for row in rows if row["status"] == kind] for kind in ("conflict", "broken"))
    twice = "under two classes with the same bytes"
    say(conflicts, f"file stands {twice}, and is not used", f"files stand {twice}, and are not used")
    across = health["near_duplicates"]["across_classes"]
    if across:
        pairs = counted(across, "pair of near duplicates stands", "pairs of near duplicates stand")
        said.append(f"{pairs} under two classes; data/index/near_duplicates.parquet lists them")
    why = "; `error` in data/index/images.parquet says why"
    say(broken, "file is broken, and is not used", "files are broken, and are not used", why)
    for split, names in classes_without(rows, classes).items():
        one, many = f"class with images has none in {split}", f"classes with images have none in {split}"
        say(names, one, many, f"; {WITHOUT[split]}")
    with_images = {row["class_id"] for row in rows if row["status"] == "ok"}
    bare = [row["name"] for row in classes if row["class_id"] not in with_images]
    alone = "texts alone can tell"
    say(bare, f"class has no image, and its {alone} it", f"classes have no image, and their {alone} them")
    say(listing.empty, "folder holds no image and is no class", "folders hold no image and are no classes")
    where = "where images stand, and"
    say(
        listing.passed_over,
        f"file is no image, or does not stand {where} is passed over",
        f"files are no images, or do not stand {where} are passed over",
    )
    return said


def classes_without(rows: Sequence[Row], classes: Sequence[Row]) -> dict[str, list[str]]:
    """The names of classes whose usable images leave a split without any; val and test only where they have train."""
    splits_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["status"] == "ok":
            splits_of[row["class_id"]].add(row["split"])
    seen = [(row["name"], splits_of[row["class_id"]]) for row in classes if row["class_id"] in splits_of]
    return {
        split: [name for name, splits in seen if split not in splits and (split == "train" or "train" in splits)]
        for split in SPLITS
    }
