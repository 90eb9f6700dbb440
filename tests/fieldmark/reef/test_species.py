"""The species table: complete, distinct, and grouped in look-alikes."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from fieldmark.command import UserError
from fieldmark.reef.species import VOCABULARY, complete, load_species, phrases, random_attributes

SPECIES = load_species()
BODY_PLAN = ("body_shape", "tail_shape", "dorsal_fin", "body_colour")


def test_24_species_with_distinct_ids_names_and_marks():
    assert len(SPECIES) == 24
    for key in ("class_id", "name", "scientific_name", "note"):
        assert len({getattr(one, key) for one in SPECIES}) == 24
    assert len({tuple(one.attributes.items()) for one in SPECIES}) == 24
    assert all(re.fullmatch(r"[a-z0-9_-]+", one.class_id) for one in SPECIES)


def test_groups_of_four_share_a_body_plan_and_differ_in_one_or_two_marks_from_a_neighbour():
    groups = defaultdict(list)
    for one in SPECIES:
        groups[one.superclass].append(one)
    assert [len(group) for group in groups.values()] == [4] * 6
    for group in groups.values():
        assert len({tuple(one.attributes[name] for name in BODY_PLAN) for one in group}) == 1
        for one, other in combinations(group, 2):
            assert 1 <= sum(one.attributes[name] != other.attributes[name] for name in VOCABULARY) <= 3
        for one in group:
            nearest = min(
                sum(one.attributes[name] != other.attributes[name] for name in VOCABULARY)
                for other in group
                if other is not one
            )
            assert nearest <= 2


def test_every_field_mark_is_shown_by_some_species_and_missing_in_others():
    shown = Counter((name, value) for one in SPECIES for name, value in one.attributes.items())
    for mark in phrases():
        assert 2 <= shown[mark] <= 22, mark


def test_the_guide_has_an_entry_for_every_species():
    guide = Path("data/demo/field_guide.md").read_text(encoding="utf-8")
    for one in SPECIES:
        assert guide.count(f"**{one.name}** (*{one.scientific_name}*).") == 1


def test_random_attributes_are_complete_and_never_an_excluded_species():
    met = random_attributes(np.random.default_rng(0), [])
    drawn = random_attributes(np.random.default_rng(0), [replace(SPECIES[0], attributes=met)])
    assert list(drawn) == list(VOCABULARY)
    assert drawn != met


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ({"wings": "two"}, "unknown attribute 'wings'"),
        ({"body_shape": "flat"}, "body_shape is 'flat'; use one of slender, oval, tall"),
        ({}, "body_shape is 'none'"),
    ],
)
def test_a_wrong_mark_is_one_clear_line(marks, says):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        complete(marks, "species.yaml: pike")
    assert "species.yaml: pike" in str(caught.value)
    assert "\n" not in str(caught.value)
