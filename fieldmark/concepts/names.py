"""Class names in texts: found word by word, so that what gives a class away can be dropped or masked.

A class name is made of words that give it away ("Kingfisher", "Brandt's"), of codes, however they are written (SR-20,
SR20, SR 20), and of plain words that merely describe ("white", "breasted"). The plain words below are general English
for colours, shapes, patterns, the parts of animals, plants and vehicles, and little else; the words of the domain card
are plain as well. No word is there for one data set's sake. (visibility.py takes most of them for signs of something
visible.)
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

# How texts are masked; counts up when the same sentence comes out otherwise.
MASK_RULES = 3
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
    band banded bar bare barred blotch blotched braided checker checkerboard checkered chevron crescent crescented
    dappled dot dotted edge edged eyespot fleck flecked freckle freckled fringe fringed frosted grizzled hatched
    lacy line lined marbled margin mark marking mask masked mosaic mottle mottled ocellus outlined patch patched
    pattern patterned ring ringed rosette saddle scallop scalloped speckle speckled spectacled spot spotless spotted
    streak streaked stripe striped swirl tip tipped tuft tufted unmarked unspotted unstreaked vein veined
    vermiculated wash washed
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
    aileron badge bogie bonnet bumper cab cabin canopy cockpit convertible coupe cowling door duct emblem engine exhaust
    exit fender flap fuselage gear grille hardpoint hatch hatchback headlight hull intake lamp lettering livery logo
    minivan mirror nacelle nozzle pickup pod propeller pylon radome ramp rim roof rotor sedan slat spoiler spoke
    stabiliser stabilizer strut suv tailgate taillight tailpipe tailplane tailwheel tire tyre undercarriage van wagon
    wheel window windscreen windshield winglet
    """)
)
# What describes without saying what is seen: how big, how many, how bright, where and when; and words of grammar.
OTHERS = frozenset(
    words("""
    big deep double fine giant great heavy high large least lesser greater little long low medium short single small
    tall tiny wide even odd

    ash bay bright dull light plain rust sandy two tone toned three four five common northern southern eastern western
    summer winter

    class company corporation family general group model new old series type variant version world

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


# What lies between the pieces of a name, and inside one: letters or digits.
ATOM = re.compile(r"[^\W\d_]+|\d+")
GAP = re.compile(r"[^\w,;:!?()\n]{0,2}|_{1,2}")
# Between two names that are one mention ("Boeing 737-800"); and what a writer adds to a code ("737-8F", "A320-214").
ADJOINING = re.compile(r"[ \-/\u2010-\u2013]{1,2}")
CODE_BEFORE = re.compile(r"\b[^\W\d_]{1,3}[-/]$")
CODE_BEHIND = re.compile(r"(?:[-/\u2010-\u2013][^\W_]*\d[^\W_]*| [A-Z][A-Za-z]{0,3}-?\d[^\W_]*| \d{3,4}\b)+")
# The next word, where it is no code.
AMOUNT_BEHIND, AMOUNT_BEFORE = re.compile(r"[.,]\d|\s?%"), re.compile(r"\d[.,]$")
NEXT_WORD = re.compile(r"[ -]([^\W\d_]{2,})(?![-\w]*\d)")
SENTENCE_START = re.compile(r"(?:^|[.!?]\s+)[\"'\u201c\u2018(]*$")
# Before a number these are words of grammar: "an 80-seat jet" is no An-80.
ARTICLES = frozenset(words("a an"))
# What has no ending of its own for several.
ALIKE = frozenset(words("aircraft deer fish moose salmon series sheep shellfish species trout"))


class Keys(NamedTuple):
    """What names are looked for by, spelled as `spell` does."""

    whole: frozenset[str]  # names, scientific names and aliases
    telling: frozenset[str]  # last words, codes and numbers of them, each of which gives a class away on its own
    suffixes: frozenset[str]  # numbers that stand behind another one (200 of 737-200): beside a name they are of it
    groups: frozenset[str]  # superclasses and lineages as a whole
    capital: frozenset[str]  # words of those: they are names where they are written with a capital
    modifiers: frozenset[str]  # words of a class's names before the last one ("tree", "painted"): likewise

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], domain: frozenset[str]) -> "Keys":
        """Those of classes, rows of index.classes; `domain` are words that never give one away."""
        found: list[set[str]] = [set() for _ in cls._fields]
        whole, telling, suffixes, groups, capital, modifiers = found
        for row in rows:
            scientific = row.get("scientific_name") or ""
            for name in (row["name"], scientific, *(row.get("aliases") or ())):
                whole.add(spell(atoms(name)))
                codes, behind = codes_of(name)
                telling |= codes
                suffixes |= behind
            for name in (row["name"], *(row.get("aliases") or ())):
                own = [word for word in words(name) if telling_words([word], domain)]
                telling |= telling_words(own[-1:], domain)
                modifiers |= telling_words(own[:-1], domain)
            # Of the scientific name the genus alone gives the class away; epithets are often plain Latin ("minor").
            telling |= telling_words(words(scientific)[:1], domain)
            for group in filter(None, (row.get("superclass"), *(row.get("lineage") or ()))):
                of_group = telling_words(words(group), domain)
                # "Perching Birds" and "Flat" describe; they are looked for where a word of them is more than that.
                if of_group:
                    groups.add(spell(atoms(group)))
                capital |= of_group
        modifiers -= telling
        for keys in found:
            keys.discard("")
        return cls(*map(frozenset, found))


def atoms(text: str) -> list[str]:
    return ATOM.findall(text.casefold())


def spell(pieces: Sequence[str]) -> str:
    """One key for every way to write a name: where there are digits, pieces stand together (F/A-18, FA 18: fa18)."""
    return ("" if any(piece[0].isdigit() for piece in pieces) else " ").join(pieces)


def telling_words(tokens: Iterable[str], domain: frozenset[str]) -> set[str]:
    """Those that give a class away, and what they may be forms of. Words of digits alone are left to codes_of."""
    telling = (word for word in tokens if tells(word) and not word.isdigit() and not is_plain(word, domain))
    return {
        spell(atoms(stem)) for word in telling for stem in stems(word) if stem == word or not is_plain(stem, domain)
    }


def codes_of(name: str) -> tuple[set[str], set[str]]:
    """The codes in a name that tell on their own, and the numbers that do so behind another number.

    Of DHC-8-300 these are dhc8, dhc8300 and, behind, 300; of A320, a320 and 320; of 737-200, 737, 737200 and 200.
    """
    codes: set[str] = set()
    suffixes: set[str] = set()
    for chunk in name.split():
        pieces = atoms(chunk)
        for end, piece in enumerate(pieces, start=1):
            if not piece[0].isdigit():
                continue
            numbers = sum(each[0].isdigit() for each in pieces[:end])
            if end > 1:
                codes.add(spell(pieces[:end]))
            if tells(piece):
                (codes if numbers == 1 else suffixes).add(piece)
    return codes, suffixes


class Mention(NamedTuple):
    """A name in a text, from `start` to `end`; `key` is what was found there, `many` whether in the plural."""

    start: int
    end: int
    key: str
    many: bool


class Finder:
    """Finds names in texts, each at its longest, however their codes are written: F/A-18, F/A 18C, FA18."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = frozenset(keys) - {""}
        # In characters, with the ending of a plural: a text may part letters that a name has together.
        self.longest = max(map(len, self.keys), default=0) + 2

    def mentions(self, text: str) -> Iterator[Mention]:
        """From left to right; none overlaps another."""
        found = list(ATOM.finditer(text))
        pieces = [match[0].casefold() for match in found]
        start = 0
        while start < len(found):
            best = self.longest_at(text, found, pieces, start)
            if best is None:
                start += 1
                continue
            end, key, many = best
            yield Mention(found[start].start(), found[end - 1].end(), key, many)
            start = end

    def longest_at(
        self, text: str, found: list[re.Match[str]], pieces: list[str], start: int
    ) -> tuple[int, str, bool] | None:
        """The longest name from a piece on: where it ends, its key, and whether it is in the plural."""
        # What stands behind an apostrophe ends a word ("the engine's 4 blades").
        if start and text[found[start].start() - 1] in "'\u2019" and len(pieces[start]) == 1:
            return None
        is_article = pieces[start] in ARTICLES and not (start and pieces[start - 1] in {*ARTICLES, "the"})
        best = None
        for end in range(start + 1, len(found) + 1):
            gap = text[found[end - 2].end() : found[end - 1].start()] if end > start + 1 else ""
            if not GAP.fullmatch(gap) or (end == start + 2 and is_article and gap.isspace()):
                break
            spelled = spell(pieces[start:end])
            if len(spelled) > self.longest:
                break
            if end == start + 1 and spelled.isdigit() and is_amount(text, found[start].start(), found[start].end()):
                continue
            possessive = pieces[end - 1] == "s" and gap[-1:] in ("'", "\u2019")
            singular = set() if possessive else plural_of(spelled) & self.keys
            forms = singular if end > start + 1 else stems(spelled) & self.keys
            if spelled in self.keys or forms:
                best = end, spelled if spelled in self.keys else min(forms), bool(singular)
        return best

    def is_in(self, text: str) -> bool:
        return next(self.mentions(text), None) is not None


def is_amount(text: str, start: int, end: int) -> bool:
    """Whether digits are part of a longer number, or a share: 100 of "100,000", "2.100" and "100%"."""
    return bool(AMOUNT_BEHIND.match(text, end) or AMOUNT_BEFORE.search(text, max(0, start - 2), start))


def plural_of(word: str) -> set[str]:
    """What a word may be the plural of."""
    found = {word.removesuffix(ending) for ending in ("s", "es") if word.endswith(ending)}
    return found | {word[:-3] + "y"} if word.endswith("ies") else found


class ClassNames:
    """The names of one class or of several, ready to be looked for. `domain` are words that never give one away."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], domain: frozenset[str]) -> None:
        keys = Keys.of(rows, domain)
        self.finder = Finder(keys.whole | keys.telling | keys.modifiers | keys.suffixes)

    def is_in(self, text: str) -> bool:
        """Whether a text holds a whole name, scientific or other (`aliases`), or a word or code that gives it away."""
        return self.finder.is_in(text)


class NameMask:
    """Replaces what names a class or a group of classes by the domain's noun, and keeps the sentence one."""

    def __init__(self, keys: Keys, noun: str) -> None:
        self.sure = keys.whole | keys.telling | keys.groups
        self.capital, self.suffixes = keys.capital | keys.modifiers, keys.suffixes
        self.finder = Finder(self.sure | self.capital | self.suffixes)
        self.noun, self.nouns = noun, several(noun)
        self.article = "an" if noun[:1].lower() in tuple("aeiou") else "a"
        either = f"(?:{re.escape(self.nouns)}|{re.escape(noun)})"
        self.before = re.compile(rf"\b{either}\s+$", re.IGNORECASE)
        self.behind = re.compile(rf"[\s-]+({either})\b", re.IGNORECASE)
        self.article_before = re.compile(r"\b(an?)\s+$", re.IGNORECASE)

    def apply(self, text: str) -> tuple[str, int]:
        """The text without names, and how many were masked: those that adjoin are one ("Boeing 737-800")."""
        masked, done, count = [], 0, 0
        for start, end, many in self.spans(text):
            left = text[done:start]
            behind = self.behind.match(text, end)
            if behind:
                end, many = behind.end(), behind[1].casefold() != self.noun.casefold()
            left = self.before.sub("", left)
            article = self.article_before.search(left)  # what stands behind one is no plural: "a Cirrus"
            capital = bool(SENTENCE_START.search(text[:done] + left)) and text[start].isupper()
            if article:
                left = left[: article.start()]
                word = f"{self.article.capitalize() if article[1][0].isupper() else self.article} {self.noun}"
            else:
                word = self.nouns if many else self.noun
                word = word[:1].upper() + word[1:] if capital else word
            masked += [left, word]
            done, count = end, count + 1
        return "".join([*masked, text[done:]]), count

    def spans(self, text: str) -> list[tuple[int, int, bool]]:
        """Where what is masked starts and ends, and whether it is a plural."""
        spans: list[tuple[int, int, bool]] = []
        mentions = list(self.finder.mentions(text))
        starts = {mention.start for mention in mentions}
        for mention in mentions:
            start, end = self.edges(mention, text)
            adjoins = bool(spans) and (
                start <= spans[-1][1] or ADJOINING.fullmatch(text[spans[-1][1] : start]) is not None
            )
            if not adjoins and not self.counts(mention, text, starts):
                continue
            behind = CODE_BEHIND.match(text, end)
            end = behind.end() if behind else end
            if adjoins:
                start, end = spans[-1][0], max(end, spans.pop()[1])
            spans.append((start, end, mention.many))
        return spans

    def edges(self, mention: Mention, text: str) -> tuple[int, int]:
        """Where the word, or the code, starts and ends that a name is part of ("737MAX", "B-737")."""
        start, end = mention.start, mention.end
        while end < len(text) and text[end].isalnum():
            end += 1
        while start and text[start - 1].isalnum():
            start -= 1
        code = CODE_BEFORE.search(text, max(0, start - 6), start) if text[start].isdigit() else None
        return code.start() if code else start, end

    def counts(self, mention: Mention, text: str, starts: set[int]) -> bool:
        """Whether a mention is a name without another one beside it: "Cirrus" is, "Air" of "Air Canada" is not."""
        if mention.key in self.sure:
            return True
        return mention.key in self.capital and written_as_name(mention, text, starts)


def written_as_name(mention: Mention, text: str, starts: Collection[int]) -> bool:
    """Whether a word has a capital that a sentence's start does not explain, and is not the first of another name.

    Known names start at `starts`: the first word of a sentence is one where the next word is.
    """
    if not text[mention.start].isupper():
        return False
    following = NEXT_WORD.match(text, mention.end)
    known = following is not None and following.start(1) in starts
    before = text[: mention.start].rstrip(" \t\"'\u201c\u2018(")
    first = not before or before[-1] in ".!?\n"
    in_another = following is not None and following[1][0].isupper() and not known
    return known or not (first or in_another)


def several(noun: str) -> str:
    """A noun's plural by the rules of English; the noun itself where it is one of ALIKE."""
    last = words(noun)[-1:]
    if not last or last[0] in ALIKE or last[0].endswith(("fish", "craft")):
        return noun
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")
