"""Class names in texts: found word by word, so that what gives a class away can be dropped or masked.

A class name is made of words that give it away ("Kingfisher", "Brandt's") and of plain words that merely describe
("white", "breasted"). The plain words below are general English for colours, sizes, shapes, patterns and the parts of
animals, plants and vehicles; the words of the domain card are plain as well. No word is there for one data set's sake.
"""

import re
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+")
# Shorter words ("A", "MD", "11") are too common to give a class away on their own.
SHORTEST = 3


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


PLAIN = frozenset(
    words("""
    amber ash auburn azure beige black blond blonde blue bluish brass bronze brown brownish buff buffy charcoal chestnut
    cinnamon copper cream creamy crimson dark drab dun dusky ebony emerald fawn gold golden gray grayish green greenish
    grey greyish hazel indigo ivory lavender lemon light lilac magenta maroon mauve navy ochre olive orange pale pearl
    pink pinkish plum purple purplish red reddish rose rosy ruby ruddy rufous russet rust rusty saffron salmon sandy
    scarlet silver silvery sooty tan tawny teal turquoise vermilion violet white whitish yellow yellowish bright dull
    glossy shiny iridescent metallic pied plain two tone toned three four five colour color coloured colored bicolor
    bicolored bicoloured tricolor tricolored tricoloured

    big broad curved deep double elongated fine flat forked great giant heavy high large least lesser greater little
    long low medium narrow pointed round rounded sharp short single slender small square stout straight tall thick thin
    tiny triangular wide oval even odd

    band banded bar barred blotch blotched checker checkered dot dotted edge edged fleck flecked freckle freckled fringe
    fringed line lined margin marbled mark marking masked mask mottle mottled patch patched pattern patterned pearly
    ring ringed saddle scallop scalloped speckle speckled spectacled spot spotted streak streaked stripe striped tip
    tipped tufted tuft vein veined vermiculated wash washed crescent crescented

    abdomen antenna antler arm back barbel beak belly bill body breast brow cap cape cere cheek chest chin claw collar
    comb coat crest crown dewlap dorsal ear eye eyebrow eyelid eyeline eyering face facial feather feet fin finger
    flank foot forehead fur gill hair hand head hind hip hood horn iris jaw knee leg lip lore lower mandible mane mouth
    muzzle nape neck nose nostril patagium pectoral pelvic paw plumage plume pouch rump scale shell shoulder side skin
    snout spine stomach streamer tail tailfin talon thigh throat toe tongue tooth teeth trunk tusk undertail
    underwing upper upperparts underparts vent ventral whisker wing wingbar

    anther bark berry blade bloom blossom branch bract bud bulb calyx cone corolla flower fruit leaf leaves needle petal
    pistil pod root seed sepal spadix spathe stamen stem stigma thorn trunk twig

    bonnet bumper cabin cockpit door engine fender fuselage grille headlight hull mirror nacelle propeller roof rotor
    spoiler stabiliser stabilizer taillight tyre tire wheel window windscreen windshield winglet

    and the with for from of
    """)
)


def stems(word: str) -> set[str]:
    """The word and what it may be a form of: spots, spotted -> spot; striped -> stripe; berries -> berry."""
    found = {word}
    if word.endswith("ies"):
        found.add(word[:-3] + "y")
    if word.endswith("es"):
        found.add(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
    if word.endswith("ed"):
        found |= {word[:-2], word[:-1]}
        if word[-4:-3] == word[-3:-2]:
            found.add(word[:-3])
    return {stem for stem in found if len(stem) >= SHORTEST}


def is_plain(word: str, domain: frozenset[str]) -> bool:
    return any(stem in PLAIN or stem in domain for stem in stems(word))


def domain_words(*texts: str) -> frozenset[str]:
    """The words of the domain card with their singulars: none of them gives a class away."""
    return frozenset(stem for text in texts for word in words(text) for stem in stems(word))


class ClassName:
    """One class's name, ready to be looked for. `domain` are words that never give it away."""

    def __init__(self, name: str, scientific_name: str | None, domain: frozenset[str]) -> None:
        self.phrases = [phrase for phrase in (words(name), words(scientific_name or "")) if phrase]
        # Of the scientific name the genus alone gives the class away; epithets are often plain Latin ("minor").
        single = words(name) + words(scientific_name or "")[:1]
        telling = [word for word in single if len(word) >= SHORTEST and not is_plain(word, domain)]
        self.telling = frozenset(
            stem for word in telling for stem in stems(word) if stem == word or not is_plain(stem, domain)
        )

    def is_in(self, text: str) -> bool:
        """Whether a text holds the whole name, the scientific name, or a word that gives the class away."""
        tokens = words(text)
        if any(stems(token) & self.telling for token in tokens):
            return True
        return any(
            tokens[start : start + len(phrase)] == phrase
            for phrase in self.phrases
            for start in range(len(tokens) - len(phrase) + 1)
        )


class NameMask:
    """Replaces every class's whole name or scientific name by the domain's noun."""

    def __init__(self, names: Iterable[str], noun: str) -> None:
        article = "an" if noun[:1].lower() in tuple("aeiou") else "a"
        phrases = sorted({tuple(words(name)) for name in names} - {()}, key=lambda phrase: (-len(phrase), phrase))
        joined = "|".join(r"[\W_]+".join(map(re.escape, phrase)) for phrase in phrases)
        # (?!x)x matches nothing: a data set may have no names.
        self.pattern = re.compile(rf"\b(?:(an?)\s+)?(?:{joined or '(?!x)x'})(?:e?s)?\b", re.IGNORECASE)
        self.noun, self.article = noun, article

    def apply(self, text: str) -> tuple[str, int]:
        """The text without class names, and how many were masked."""

        def noun(match: re.Match[str]) -> str:
            if not match[1]:
                return self.noun
            article = self.article.capitalize() if match[1][0].isupper() else self.article
            return f"{article} {self.noun}"

        return self.pattern.subn(noun, text)
