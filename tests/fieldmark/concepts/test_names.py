"""Class names in texts: what gives a class away, and what merely describes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.concepts.names import ClassName, NameMask, domain_words, stems

BIRD = domain_words("bird", "birds", "wing shape", "bars and stripes")


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
    assert ClassName(name, scientific_name, BIRD).is_in(text) is leaks


def test_the_domain_card_is_never_a_leak() -> None:
    card = domain_words("aircraft", "airliners", "winglets and pylons")
    assert not ClassName("Twin Pylon Aircraft", None, card).is_in("an aircraft with four pylons")
    assert ClassName("Twin Pylon Aircraft", None, domain_words("aircraft")).is_in("an aircraft with four pylons")


@given(st.text(max_size=30), st.text(max_size=60))
def test_any_name_and_text_can_be_looked_at(name: str, text: str) -> None:
    ClassName(name, name, BIRD).is_in(text)
    masked, count = NameMask([name], "bird").apply(text)
    assert masked == text or count > 0


def test_a_name_is_found_in_itself() -> None:
    for name in ("Black Tail", 'A/B "x" é', "..x", "Ray"):
        assert ClassName(name, None, BIRD).is_in(f"this is the {name.upper()} of yours")


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
        ("Aetobatus ferreus, seen from above.", "fish, seen from above.", 1),
        ("Nothing to see.", "Nothing to see.", 0),
    ],
)
def test_masking(text: str, masked: str, count: int) -> None:
    mask = NameMask(["Ray", "Iron ray", "Aetobatus ferreus", ".."], "fish")
    assert mask.apply(text) == (masked, count)


def test_masking_without_names() -> None:
    assert NameMask([], "insect").apply("An ant.") == ("An ant.", 0)
    assert NameMask(["Ant"], "insect").apply("Like an ant.") == ("Like an insect.", 1)
