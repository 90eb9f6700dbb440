"""Taxa, distances and errors by rank, by hand."""

from typing import Any

import numpy as np

from evaluation.taxonomy import RankErrors, Taxonomy, lineages_of
from fieldmark.store import make_table

CLASSES = ("auk", "puffin", "gull", "duck", "toad")
TREE = Taxonomy(
    CLASSES,
    (
        ("Animals", "Birds", "Shorebirds", "Alcids"),
        ("Animals", "Birds", "Shorebirds", "Alcids"),
        ("Animals", "Birds", "Shorebirds", "Gulls"),
        ("Animals", "Birds", "Fowl"),
        ("Animals",),
    ),
)


def test_chains_and_members() -> None:
    assert TREE.names == [*CLASSES, "Birds", "Fowl", "Shorebirds", "Alcids", "Gulls"]  # Animals says nothing
    named = [[TREE.names[node] for node in chain if node >= 0] for chain in TREE.chains]
    assert named == [
        ["auk", "Alcids", "Shorebirds", "Birds"],
        ["puffin", "Alcids", "Shorebirds", "Birds"],
        ["gull", "Gulls", "Shorebirds", "Birds"],
        ["duck", "Fowl", "Birds"],
        ["toad"],
    ]
    rows = zip(TREE.names, TREE.members, strict=True)
    members = {name: [CLASSES[number] for number in np.flatnonzero(row)] for name, row in rows}
    assert members["Shorebirds"] == ["auk", "puffin", "gull"]
    assert members["duck"] == members["Fowl"] == ["duck"]


def test_distances() -> None:
    assert TREE.steps.tolist() == [
        [0, 1, 2, 3, 4],
        [1, 0, 2, 3, 4],
        [2, 2, 0, 3, 4],
        [2, 2, 2, 0, 3],  # a duck has a rank less
        [1, 1, 1, 1, 0],
    ]
    y, guess = np.array([0, 0, 2, 3, 4]), np.array([0, 1, 3, 3, 0])
    assert TREE.distances(y, guess).tolist() == [0, 1, 3, 0, 1]
    assert TREE.errors_by_rank(y, guess) == [
        RankErrors(0, 5, 5, 3 / 5),
        RankErrors(1, 3, 4, 1 / 4),  # the toad has no rank 1
        RankErrors(2, 2, 4, 1 / 4),
        RankErrors(3, 1, 3, 0),
    ]


def test_two_taxa_of_one_name_are_two() -> None:
    tree = Taxonomy(("a", "b"), (("Plants", "Morus"), ("Birds", "Morus")))
    assert tree.names[2:] == ["Birds", "Morus", "Plants", "Morus"]
    assert tree.steps.tolist() == [[0, 3], [3, 0]]


def lineages(*rows: dict[str, Any]) -> Any:
    ids = [row["class_id"] for row in rows]
    table = make_table("index.classes/2", [{"name": row["class_id"], "from_images": True, **row} for row in rows])
    return lineages_of(table, ids[::-1])[::-1] if lineages_of(table, ids) else None


def test_lineages_of_the_index() -> None:
    auk = {"class_id": "auk", "name": "Great Auk", "lineage": ["Birds", "Alcids", "Great auk"], "superclass": "Alcids"}
    puffin = {"class_id": "puffin", "scientific_name": "Fratercula arctica", "lineage": ["Birds", "Fratercula Arctica"]}
    toad = {"class_id": "toad", "superclass": "amphibians"}
    newt = {"class_id": "newt"}
    assert lineages(auk, newt, puffin, toad) == (("Birds", "Alcids"), (), ("Birds",), ("amphibians",))
    # A taxon may have the name of a class in it.
    junco = {"class_id": "junco", "lineage": ["Birds", "Junco"]}
    slate = {"class_id": "slate", "lineage": ["Birds", "Junco"]}
    assert lineages(junco, slate, toad) == (("Birds", "Junco"), ("Birds", "Junco"), ("amphibians",))


def test_taxa_that_part_nothing_are_none() -> None:
    assert lineages({"class_id": "a"}, {"class_id": "b"}) is None
    assert lineages({"class_id": "a", "lineage": ["Birds"]}, {"class_id": "b", "lineage": ["Birds", "b"]}) is None
