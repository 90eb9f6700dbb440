"""Class names in texts: what gives a class away, and what merely describes it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.concepts.names import ClassNames, Keys, NameMask, domain_words, several, stems

BIRD = domain_words("bird", "birds", "wing shape", "bars and stripes")


def names_of(name: str, scientific_name: str | None = None, domain: frozenset[str] = BIRD) -> ClassNames:
    return ClassNames([{"name": name, "scientific_name": scientific_name}], domain)


def mask_of(noun: str, *rows: dict[str, Any]) -> NameMask:
    return NameMask(Keys.of(rows, domain_words(noun)), noun)


@pytest.mark.parametrize(
    ("name", "scientific_name", "text", "leaks"),
    [
        ("White-breasted Kingfisher", "Halcyon smyrnensis", "a bird with a white breast", False),
        ("White-breasted Kingfisher", "Halcyon smyrnensis", "a bird with the bill of kingfishers", True),
        ("White-breasted Kingfisher", "Halcyon smyrnensis", "a Halcyon with a red bill", True),
        ("White-breasted Kingfisher", None, "a white-breasted bird", False),
        ("Brandt's Cormorant", None, "a bird with Brandt's blue throat", True),
        ("Brandt's Cormorant", None, "a bird that is not a s", False),
        ("Red-winged Blackbird", None, "a bird with red shoulder patches on black wings", False),
        ("Red-winged Blackbird", None, "a blackbird with red shoulders", True),
        ("Long-tailed Jaeger", None, "a bird with two long tail streamers", False),
        ("Spotted Catbird", None, "a bird with spots, a striped tail and barred wings", False),
        ("Least Tern", None, "a bird with a pattern of white patterns", False),
        ("Boeing 737-800", None, "an aircraft with a 737 nose", True),
        ("Boeing 737-800", None, "an aircraft with 2 engines", False),
        ("Black Tail", None, "a fish with a black tail", True),
        ("Black Tail", None, "a fish with a tail that is black", False),
        ("Bird of Paradise", None, "a bird with a green head", False),
        ("Flower Iris", "Iris germanica", "a bird with a pale iris", False),
        ('A/B "x" é', None, "a bird with a crest", False),
        ("Épervier", None, "un épervier gris", True),
        ("Summer Tanager", "Piranga rubra", "a bird with red summer plumage", False),
        ("Cape May Warbler", None, "a bird that may have a crest", False),
        ("Common Tern", None, "a bird with a common pattern", False),
        ("Clark's Anemonefish", "Amphiprion clarkii", "a fish with Clark\u2019s bars", True),
        ("Clark's Anemonefish", "Amphiprion clarkii", "an amphiprion with white bars", True),
        ("Fourspot Butterflyfish", None, "a fish with four spots", False),
        ("Yellowtail Snapper", None, "a fish with a yellow tail", False),
        ("Yellowtail Snapper", None, "the yellowtail's forked fin", True),
        ("Audi S4 Sedan 2012", None, "a car with a four-ring badge on a sedan's grille", False),
        ("Audi S4 Sedan 2012", None, "a car with an S4 badge", True),
        ("Audi S4 Sedan 2012", None, "an Audi grille", True),
        ("Ford F-150 Regular Cab 2007", None, "a car with a two-door cab", False),
        ("Ford F-150 Regular Cab 2007", None, "a car with 150 on its tailgate", True),
        ("Red Maple", "Acer rubrum", "a leaf with a red stalk", False),
        ("Red Maple", "Acer rubrum", "a maple-shaped leaf", True),
        ("Red Maple", "Acer rubrum", "an acer's leaf", True),
    ],
)
def test_what_gives_a_class_away(name: str, scientific_name: str | None, text: str, leaks: bool) -> None:
    assert names_of(name, scientific_name).is_in(text) is leaks


def test_the_domain_card_is_never_a_leak() -> None:
    card = domain_words("aircraft", "airliners", "winglets and canards")
    assert not names_of("Twin Canard Aircraft", None, card).is_in("an aircraft with four canards")
    assert names_of("Twin Canard Aircraft", None, domain_words("aircraft")).is_in("an aircraft with four canards")


@given(st.text(max_size=30), st.text(max_size=60))
def test_any_name_and_text_can_be_looked_at(name: str, text: str) -> None:
    names_of(name, name).is_in(text)
    masked, count = mask_of("bird", {"name": name, "lineage": [name]}).apply(text)
    assert masked == text or count > 0


def test_a_name_is_found_in_itself() -> None:
    for name in ("Black Tail", 'A/B "x" é', "..x", "Ray"):
        assert names_of(name).is_in(f"this is the {name.upper()} of yours")


def test_stems() -> None:
    assert "spot" in stems("spotted")
    assert "stripe" in stems("striped")
    assert "berry" in stems("berries")
    assert "glass" in stems("glass")
    assert "glas" not in stems("glass")
    assert stems("as") == set()


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("An Iron ray rests near two iron-rays.", "A fish rests near two fish.", 2),
        ("The RAY is grey; the tray is not.", "The fish is grey; the tray is not.", 1),
        ("Aetobatus ferreus, seen from above.", "Fish, seen from above.", 1),
        ("It is an Iron ray fish, a ray.", "It is a fish, a fish.", 2),
        ("Nothing to see.", "Nothing to see.", 0),
    ],
)
def test_masking(text: str, masked: str, count: int) -> None:
    iron = {"name": "Iron ray", "scientific_name": "Aetobatus ferreus"}
    mask = mask_of("fish", {"name": "Ray"}, iron, {"name": ".."})
    assert mask.apply(text) == (masked, count)


AIRCRAFT = [
    {"name": "737-200", "superclass": "Boeing", "lineage": ["Boeing", "Boeing 737"]},
    {"name": "SR-20", "superclass": "Cirrus Aircraft"},
    {"name": "A320", "superclass": "Airbus", "aliases": ["Sharklet"]},
    {"name": "F/A-18", "superclass": "McDonnell Douglas"},
    {"name": "An-12", "superclass": "Antonov"},
    {"name": "DC-3", "superclass": "King Air"},
    {"name": "BAE 146-300", "superclass": "British Aerospace"},
]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("The aircraft is a Boeing 737.", "The aircraft is an aircraft."),
        ("A 737-400 aircraft with winglets", "An aircraft with winglets"),
        ("a Boeing 737-800 operated by an airline", "an aircraft operated by an airline"),
        ("a red 737MAX and a B-737", "a red aircraft and an aircraft"),
        ("Boeing 737s on an apron", "Aircraft on an apron"),
        ("a Cirrus SR20 or SR 20", "an aircraft or aircraft"),
        ("an A-320, an A 320, an A320neo, an A320-214", "an aircraft, an aircraft, an aircraft, an aircraft"),
        ("the FA-18 and the F/A18 and an FA18C", "the aircraft and the aircraft and an aircraft"),
        ("An An-12; an 12-seat cabin", "An aircraft; an 12-seat cabin"),
        ("a McDonnell Douglas MD-83 on a runway", "an aircraft on a runway"),
        ("a Douglas DC-3 aircraft", "an aircraft"),
        ("the colours of Air Canada and British Airways", "the colours of Air Canada and British Airways"),
        ("a sharklet with 200 rivets", "an aircraft with 200 rivets"),
        ("about 300 passengers, the engine's 3 blades", "about 300 passengers, the engine's 3 blades"),
        ("a BAe 146 with four engines", "an aircraft with four engines"),
        ("a plane of BRITISH AEROSPACE", "a plane of aircraft"),
    ],
)
def test_masking_codes_makers_and_other_names(text: str, masked: str) -> None:
    assert mask_of("aircraft", *AIRCRAFT).apply(text)[0] == masked


def test_groups_that_describe_are_no_names() -> None:
    rows = {"name": "Bay Wren", "lineage": ["Birds", "Perching Birds", "Wrens"]}, {"name": "Sole", "superclass": "Flat"}
    mask = mask_of("bird", *rows)
    assert mask.apply("A perching bird on a flat stone.") == ("A perching bird on a flat stone.", 0)
    assert mask.apply("Two Wrens; one Perching bird, one wren.")[0] == "Two birds; one bird, one bird."


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("smaller than the A320", True),
        ("like an FA-18", True),
        ("longer than the -200", True),
        ("a sharklet at each wingtip", True),
        ("four Boeing engines", False),
        ("a 20-seat cabin with 18 windows", False),
    ],
)
def test_codes_and_other_names_give_a_class_away(text: str, leaks: bool) -> None:
    assert ClassNames(AIRCRAFT, domain_words("aircraft")).is_in(text) is leaks


def test_several_of_what_is_pictured() -> None:
    nouns = ("bird", "fish", "aircraft", "fly", "finch", "ray", "lionfish")
    assert [several(noun) for noun in nouns] == ["birds", "fish", "aircraft", "flies", "finches", "rays", "lionfish"]


def test_masking_without_names() -> None:
    assert mask_of("insect").apply("An ant.") == ("An ant.", 0)
    assert mask_of("insect", {"name": "Ant"}).apply("Like an ant.") == ("Like an insect.", 1)
