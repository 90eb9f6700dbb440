"""Class names in texts: found word by word, so that what gives a class away can be dropped or masked.

A class name is made of words that give it away ("Kingfisher", "Brandt's") and of plain words that merely describe
("white", "breasted"). The plain words below are general English for colours, shapes, patterns, the parts of animals,
plants and vehicles, and little else; the words of the domain card are plain as well. No word is there for one data
set's sake. (visibility.py takes most of them for signs of something visible.)
"""

import re
from collections.abc import Iterable
from functools import cache

WORD = re.compile(r"[^\W_]+")
# Shorter words ("A", "MD", "11") are too common to give a class away on their own, but for codes ("S4", "3d").
SHORTEST = 3
CODE = re.compile(r"[^\W\d_]\d|\d[^\W\d_]")


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


COLOURS = frozenset(
    words("""
    amber auburn azure beige bicolor bicolored bicoloured black blackish blond blonde blue bluish brass bronze brown
    brownish buff buffy charcoal chestnut cinnamon color coloration colored colorful colour colouration coloured
    colourful copper cream creamy crimson cyan dark drab dun dusky ebony emerald fawn ginger gloss glossy gold golden
    gray grayish green greenish grey greyish hazel hue indigo iridescent ivory jade lavender lemon lilac magenta maroon
    mauve metallic multicolored multicoloured navy ochre olive orange pale pearl pearly pied pink pinkish plum purple
    purplish rainbow red reddish rose rosy ruby ruddy rufous russet rusty saffron salmon scarlet shaded sheen shiny
    silver silvery sooty tan tawny teal tinge tinged tint tinted translucent transparent tricolor tricolored tricoloured
    turquoise vermilion violet white whitish yellow yellowish
    """)
)
SHAPES = frozenset(
    words("""
    angular arched arrow blunt bristly broad bulbous bulging bulky chubby chunky circular compact concave convex curl
    curled curve curved cylindrical decurved diamond disc domed downy droopy elongate elongated fan flat fluffy fork
    forked fuzzy hairless hairy heart hook hooked hump humped hunched jagged lance lanky leathery narrow notch notched
    oblong outline oval overlapping plump pointed pointy protruding robust round rounded ruffled serrated shaggy shaped
    sharp silhouette sleek slender slim slit sloping smooth spiky spiny spiral square squared squat star stocky stout
    straight streamlined sturdy swept taper tapered tapering teardrop thick thin toothed triangular tubular upcurved
    upright upturned velvety wavy waxy wedge wispy woolly wrinkled
    """)
)
PATTERNS = frozenset(
    words("""
    band banded bar bare barred blotch blotched braided checker checkered chevron crescent crescented dappled dot dotted
    edge edged eyespot fleck flecked freckle freckled fringe fringed frosted grizzled hatched lacy line lined marbled
    margin mark marking mask masked mosaic mottle mottled ocellus outlined patch patched pattern patterned ring ringed
    rosette saddle scallop scalloped speckle speckled spectacled spot spotless spotted streak streaked stripe striped
    swirl tip tipped tuft tufted unmarked unspotted unstreaked vein veined vermiculated wash washed
    """)
)
ANIMAL_PARTS = frozenset(
    words("""
    abdomen anal antenna antennae antler arm back barbel beak beard bearded belly bib bill body breast brow cap cape
    carapace caudal cere cheek chest chin claw coat collar comb covert crest crested crown dewlap dorsal ear eared eye
    eyebrow eyelid eyeline eyering face facial feather feet fin finger flank flipper foot forehead frill frilled fur
    gill gorget hackle hair hand head hind hip hood hoof horn iris jaw keel keeled knee lateral leg lip lobe lobed lore
    lower malar mandible mane mantle mouth muzzle nape neck nose nostril patagium paw pectoral peduncle pelvic pincer
    plumage plume pouch primaries proboscis rib ribbed rump sail scale scaly scute secondaries shank shell shoulder side
    skin snout spine spur stomach streamer supercilium tail tailfin talon tarsus teeth tentacle tertial thigh thorax
    throat toe tongue tooth trunk tusk underparts underside undertail underwing upper upperparts upperside vent ventral
    wattle webbed webbing whisker wing wingbar
    """)
)
PLANT_PARTS = frozenset(
    words("""
    anther bark berry blade bloom blossom branch bract bud bulb calyx cone corolla flower fruit leaf leaves needle petal
    pistil pod root seed sepal spadix spathe stamen stem stigma thorn trunk twig
    """)
)
VEHICLE_PARTS = frozenset(
    words("""
    badge bonnet bumper cab cabin canopy cockpit convertible coupe cowling door emblem engine exhaust fender fuselage
    grille hatchback headlight hull lamp lettering livery logo minivan mirror nacelle pickup propeller rim roof
    rotor sedan spoiler spoke stabiliser stabilizer strut suv tailgate taillight tailpipe tire tyre undercarriage van
    wagon wheel window windscreen windshield winglet
    """)
)
# What describes without saying what is seen: how big, how many, how bright, where and when; and words of grammar.
OTHERS = frozenset(
    words("""
    big deep double fine giant great heavy high large least lesser greater little long low medium short single small
    tall tiny wide even odd

    ash bay bright dull light plain rust sandy two tone toned three four five common northern southern eastern western
    summer winter

    and the with for from of may will
    """)
)
PLAIN = COLOURS | SHAPES | PATTERNS | ANIMAL_PARTS | PLANT_PARTS | VEHICLE_PARTS | OTHERS


@cache
def stems(word: str) -> frozenset[str]:
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
    return frozenset(stem for stem in found if tells(stem))


def tells(word: str) -> bool:
    return len(word) >= SHORTEST or CODE.fullmatch(word) is not None


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
        telling = [word for word in single if tells(word) and not is_plain(word, domain)]
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
