"""Whether what a text claims can be seen in one photograph: rules on general English, for any domain.

A text is invisible for the first of RULES of which it holds a word or a phrase; else for `size` (of the whole: "a small
bird"), `comparison` (one that takes more than the photo) or `nothing_visible` (no word of a colour, a pattern, a shape
or a part; or only that there is a look, a covering such as plumage, or a distinctive shape of a part). Hedges and
negations around a mark are visible ("often has a crest", "no wing bars"); a posture is, a habit is not. What the
attributes of the domain card name is visible as well, and parts of plants are where the card is one of plants.
tests/fieldmark/concepts/visibility_guide.md is the guide that the rules follow.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import takewhile
from typing import NamedTuple

from fieldmark.concepts.names import (
    ANIMAL_PARTS,
    COLOURS,
    PATTERNS,
    PLANT_PARTS,
    SHAPES,
    VEHICLE_PARTS,
    domain_words,
    stems,
    words,
)

# Words of parts and marks that often mean something else ("back to the coast", "on the one hand").
VAGUE = frozenset(words("arm back hand line saddle scale side skin"))
POSES = frozenset(words("cocked flared folded perched posture raised stance"))
SEEN = (COLOURS | SHAPES | PATTERNS | ANIMAL_PARTS | VEHICLE_PARTS | POSES) - VAGUE
LONGEST_SEEN = max(map(len, SEEN))
# Plants have parts and ways to grow where they are what is pictured; elsewhere they are food and surroundings.
FLORA = PLANT_PARTS | frozenset(
    words("""
    acorn annulus areole awn ball banner bell bristle capsule catkin cluster corona corymb cup cyme fall filament floret
    flowerhead foliage frond funnel gill globe guide hair husk inflorescence keel leaflet lobe margin midrib nectary
    node nut ovary pad panicle pappus petiole pollen pompom pompon pore prickle raceme ray ring runner samara saucer
    scale sheath shoot skin spike spore stalk standard stipule style tassel tendril tepal trumpet tube tuber umbel urn
    vase volva whorl

    ascending climbing creeping drooping erect nodding pendent pendulous prostrate shrubby sprawling spreading trailing
    twining weeping
    """)
)
# What a phrase of two words means where the second alone would be food.
FLORA_PHRASES = ("nectar guide", "seed head", "seed pod")
# A card is one of plants if it says any of these, or calls what is pictured by one of those.
BOTANY = frozenset(
    words("""
    plant tree shrub herb grass fern moss mushroom fungus leaf flower blossom petal fruit seed
    wildflower bloom tepal sepal stamen pistil anther bract floret inflorescence corolla calyx spadix frond leaflet
    petiole umbel raceme panicle catkin
    """)
)
PLANTS = frozenset(
    words("""
    aster begonia bulb cactus cacti camellia clover conifer crocus crop cultivar daffodil dahlia daisy hyacinth iris
    lily magnolia narcissus narcissi oak orchid palm pansy peony pine poppy primrose rose sedge seedling succulent
    sunflower tulip vine violet weed willow
    """)
)
GROWTH = frozenset(words("bush climber fern grass herb moss shrub tree vine"))
# What stands in a card's attributes without naming anything that is seen.
EMPTY = frozenset(words("and the with for from its all each size"))
PARTS = PATTERNS | ANIMAL_PARTS | PLANT_PARTS | VEHICLE_PARTS
# What is small or large with, or without, the whole being so.
WHOLE = frozenset(words("thing body build frame stature species individual animal"))
QUANTITIES = frozenset(words("amount amounts area areas number numbers pair pairs portion portions row rows"))
SIZES = frozenset(
    words("big giant huge large largish little massive medium mid miniature sized small smallish tiny larger smaller")
)
# What covers all of what is pictured, and the sides of a look: everything has them, so that a text says how they are,
# or nothing. "Sleek" is said of any.
COVERINGS = frozenset(
    words("""
    appearance color coloration colored colour colouration coloured hue livery mark marking outline patch pattern
    patterned plumage shape shade shaded silhouette sleek tone
    """)
)
# How they are, beside colours, patterns and shapes.
LOOKS = re.compile(
    r"(?:bright|contrast|vibrant|vivid|dull|muted|camouflag|multi|light|uniform|plain|lack)\w*|no|without|two|three"
)
# What is said of anything: "distinctive engine nacelles" are engine nacelles.
PRAISE = frozenset(
    words("""
    characteristic classic distinct distinctive modern notable recognizable special specific standard standardized
    traditional typical typically unique unusual
    """)
)
ASPECTS = frozenset(
    words("arrangement configuration design layout pattern placement position section shape spacing style")
)
MARKS = PATTERNS - COVERINGS | frozenset(words("mark marking"))
ARTICLES = frozenset(words("a an the its their with has have and"))
# Where a phrase about one thing ends.
CLAUSE = frozenset(words("with that which who has have having is are was on in of at than for from"))

NUMBER = (
    r"(?:\d+(?:[.,]\d+)*|(?:two|three|four|five|six|seven|eight|nine|ten|twelve|several|half an?)(?! (?:in|l|m|g)\b))"
)


def any_of(alternatives: str) -> str:
    return f"(?:{'|'.join(alternatives.split())})"


UNIT = any_of(
    "mm cm m km inch inches in ft feet foot yards? (?:milli|centi|kilo)?met(?:er|re)s? k?g grams? kilograms? tons?"
    " tonnes? lbs? pounds? oz ounces? lit(?:er|re)s? l cc b?hp horsepower kw cylinders? mph km/h kph knots seconds?"
    " minutes? hours? days? weeks? months? years?"
)
NEAR = any_of(
    "in on onto into near under through over above below along among around at to from between across beside by"
)
# "found on lakes" is about lakes, "found on the wings" about wings.
FOUND = (
    any_of("found lives? living occurs? occurring resides? residing breeds? winters?")
    + r" (?:\w+ ){0,2}"
    + any_of("in near around across throughout from on at along among within")
    + r"(?! (?:its|their|each|both|the (?:\w+ )?"
    + any_of(
        "backs? belly body breast cheeks? chest eyes? face fins? flanks? head legs? neck sides? tail throat wings?"
    )
    + r")\b)"
)
REGION = r"(?:north|south|east|west|central)(?:ern)? (?:america|africa|asia|europe|australia)\w*"
# Words that may stand for a colour or a part: a place only after a preposition.
SPOT = any_of(
    "waters? ground air sky rocks? rocky sand sandy reef ice snow grass(?:es)? mud branch(?:es)? twigs? stumps? logs?"
    " poles fences? cliffs? ledges? caves? flowers crevices? roads? streets? foliage weeds? seagrass bark reeds depths"
    " wild"
)
OFTEN = any_of(
    "often usually typically commonly frequently sometimes generally occasionally mostly mainly primarily regularly"
    " always rarely seldom"
)
HEDGE = r"(?:also |often |sometimes |easily )?"
# What something is for, rather than what it looks like.
PURPOSE = any_of(
    "attract avoid balance blend break build catch climb crack cut defend dig drill eat escape extract feed find fly"
    " get grab help hide hunt impress keep kill pick pierce probe protect reach search see spear spot stay swim tear"
    " warn watch"
)
KINDS = any_of("males? females? juveniles? adults? immatures? young birds species winter summer")


class Rule(NamedTuple):
    """Regular expressions: `words`, separated by spaces, for single words; `phrases` for more."""

    words: str
    phrases: Sequence[str] = ()


RULES = {
    "sound": Rule(
        r"""
        songs? calls? calling sings? singing sang sounds? nois[ey]\w* loud\w* voices? vocal\w* notes hear heard
        audible chirp\w* whistl\w* trill\w* twitter\w* warbl(?:e|es|ing) melod\w* musical croak\w* barking roar\w*
        mimic\w* squawk\w* screech\w* scream\w* shriek\w* hoot\w* honk\w* buzz\w* coos cooing quack\w* rattles
        rattling drumming high-pitched raspy quiet\w* silent\w*
        """
    ),
    "smell": Rule(
        r"""
        smell\w* scent\w* fragran\w* aroma\w* odou?r\w* taste\w* tasting flavou?r\w* edible poison\w* toxi\w+ venom\w*
        """
    ),
    "diet": Rule(
        r"""
        feeds? feeding feeders? fed eats? eaten eating diet\w* foods? forag\w+ prey\w* predat\w+
        hunt(?:s|ed|ers?|ing)? graz(?:es?|ing) scaveng\w+ (?:carni|frugi|grani|herbi|insecti|omni|pisci)vor\w+
        insects? caterpillars? (?:earth)?worms? crustaceans? mollus[ck]s? larvae rodents? nectar plankton carrion
        catch(?:es|ing)? caught drinks? drinking pollinat\w+
        """,
        [r"(?:seeds|grains?|nuts|insects),? (?:and|or) \w+", r"\w+,? (?:and|or) (?:seeds|grains|nuts|insects)"],
    ),
    "range": Rule(
        r"""
        endemic inhabit\w* distribution geographic\w* migrat\w+ migrants? wintering residents? visitors? vagrants?
        worldwide americas? africa europe asia australia canada mexico pacific atlantic tropic\w* hemisphere
        continents? year-round
        """,
        [
            FOUND,
            REGION,
            "native to",
            "(?:old|new) world",
            "united states",
            "year round",
            "(?:its|their|broad|wide|narrow|limited|home|breeding|winter) range(?! of)",
            r"range (?:that|which|is|across|throughout|extend\w*|spans?|stretch\w*)",
        ],
    ),
    "habitat": Rule(
        r"""
        habitats? environments? surroundings climates? landscapes? terrain wilderness forests? wood(?:s|lands?)
        jungles? rainforests? marsh\w* wetlands? swamps? lakes? rivers? ponds? creeks? lagoons? estuar\w+ oceans?
        oceanic seas? shores? shorelines? beach(?:es)? coast\w* offshore inland islands? mountain\w* deserts? arid
        grasslands? meadows? fields gardens? parks backyards? orchards? farms? farmlands? plantations? pastures?
        vegetation thickets? undergrowth (?:shrub|scrub)lands? tundra prairies? savannah?s? understor\w+ trees?
        shrubs? shrubby bush(?:es)? seabed seafloor reefs suburb\w* urban cities towns? villages? highways? motorways?
        wires
        """,
        [
            rf"{NEAR} (?:[\w-]+ ){{0,2}}{SPOT}(?!-| (?:brown|buff|colou?r|gr[ae]y|red|tan|white|yellow))",
            "bod(?:y|ies) of water",
            r"(?:perch(?:ed|ing)|sit(?:s|ting)|cling(?:s|ing)|stand(?:s|ing)) (?:in|on|atop|upon|among|near|at)"
            r"(?! (?:one|its))",
        ],
    ),
    "size": Rule(
        r"""
        wingspans? weigh weighs weighing weights? heaviest largest smallest biggest lifespans?
        """,
        [
            rf"{NUMBER}(?:\s*(?:-|\u2013|to|or|and)\s*{NUMBER})?[\s-]*{UNIT}",
            # A part's size "for its body size" is seen.
            r"(?<!for its )(?<!for their )(?<!body )size",
            r"(?<!for its )(?<!for their )body size",
            r"(?:overall|body|total|average) (?:length|height)",
        ],
    ),
    "population": Rule(
        r"""
        populations? endangered threat\w* protected conservation iucn extinct\w* abundan\w+ rare rarely rarest
        uncommon widespread vulnerable declin\w+
        """,
        [rf"common(?! (?:traits?|features?|characteristics?|marks?|in {KINDS}))", "(?:in|of|declining) numbers"],
    ),
    "breeding": Rule(
        r"""
        eggs? clutch\w* nests? nested nesting nesters? nestlings? chicks? hatch(?:es|ing|lings?) fledg\w+ incubat\w+
        offspring brood\w* parent\w* breeds? breeders? courtship mates? mating monogam\w+ born laying
        """,
        ["(?:its|their|for|of) young", "lays? (?!flat|over|along|close)"],
    ),
    "mechanics": Rule(
        r"""
        torque mileage accelerat\w+ transmission gearbox drivetrain (?:front|rear|all|four)-wheel-drive suspension
        hybrid electric diesel petrol gasoline turbo(?:charge\w*|diesel)? v\d+ speeds? passengers capacity
        """,
        [
            r"(?:front|rear|all|four)[- ]wheel drive",
            "fuel(?! (?:cap|door|filler|lid|tank))",
            # "passenger windows" are windows.
            r"passenger(?! (?:[\w-]+ )?(?:cabins?|doors?|entrances?|entry|exits?|windows?)\b)",
        ],
    ),
    "lore": Rule(
        r"""
        named namesake nickname\w* genus subspecies taxonom\w* evol\w+ popular\w* belov\w+ favou?rites? prized
        price\w* expensive cheap iconic symboli\w+ legend\w* relatives cousins? discovered latin belongs? killed
        people humans? birders? (?:bird-?)?watch(?:ers?|ing) pets? sold manufactur\w+ produced introduced
        """,
        [
            r"called (?:an?|the)",
            r"symbols? (?:for|of)",
            r"(?:hence|gets?|gives?|giving|earn\w*|deriv\w*) (?:\w+ ){0,4}names?",
            r"names? (?:comes?|is derived|derives?|refers?)",
            r"members? of",
            r"(?:of|in|to) the (?:\w+ ){0,2}family",
            r"related to",
            r"(?:in|from|since|until) (?:19|20)\d\d",
        ],
    ),
    "behaviour": Rule(
        r"""
        behaviou?r\w* flocks? flocking shoals? schooling solitary nocturnal diurnal crepuscular aggressive\w* shy
        secretive elusive curious active\w* energetic agile agility acrobatic\w* fast fastest swift\w* territor\w*
        social sociable lifestyles? colon(?:y|ies|ial) dives? diving divers? soar\w* hover\w* glid(?:e|es|ing) swims?
        swimming swimmers? flyers? fliers? burrow\w* tendenc(?:y|ies) habits? prefers? preferring preferences?
        abilit(?:y|ies) capab\w+ indicat(?:es?|ed|ing|ive) suggest\w+ helps? helping allow\w* enabl\w+ aids? aiding
        assist\w* serv(?:e|es|ing) us(?:es?|ed|ing) wing-?beats? flapping flutter\w* flit\w* swoop\w* dart(?:s|ing)?
        hop(?:s|ping)? walk(?:s|ing)? wad(?:e|es|ing) waddl\w+ wags? wagging bob(?:s|bing) flicks? flicking pumping
        jump\w* leap\w* climb\w* creep\w* roost\w* perch(?:es)? preen\w* peck\w* drill\w* prob(?:e|es|ing)
        hid(?:e|es|ing) cach(?:e|es|ing) steal\w* chas(?:e|es|ing) attack\w* defend\w* compet\w+ gather\w* travel\w*
        dwell\w* nimbl\w+ movements? moving motions? sleep\w* bath(?:e|es|ing) adapt\w* surviv\w* camouflages
        attract(?:s|ing)? chang(?:es?|ing) keep(?:s|ing)? warm waterproof insulat\w+ mou?lt\w* eyesight vision senses?
        schools
        """,
        [
            rf"{OFTEN} (?:be )?(?:seen|found|observed|spotted|encountered|held|kept|holds|cocked|raised|spread"
            r"|drooped|fanned|flicked|wagged|pumped)",
            r"seen (?:alone|with|in (?:flocks|groups|pairs|the company))",
            r"(?:alone|singly) or in",
            rf"can {HEDGE}(?!appear|look|have|show|range|vary|be\b)\w+",
            rf"can {HEDGE}be (?:raised|lowered|erected|fanned|extended|opened|folded|retracted|difficult|hard)",
            r"known (?:as|to (?!have|be\b))",
            r"able to",
            r"tends? to (?!be\b|have|appear|look)",
            r"(?:perfect|ideal|good|suitable|designed|built|great|specialized) (?:for|to)",
            r"for (?!being|having|lacking|missing|striking|contrasting|\w*wing|marking)\w{3,}ing",
            rf"to {PURPOSE}",
            r"(?<!in )(?<!during )flight(?! feathers)",
            "wing beats?",
            r"(?:be|been|is|are) spotted (?!with)",
            r"(?<!when )(?<!while )(?<!in )(?:fly|flies|flying)",
            r"when (?:alarmed|excited|threatened|agitated|disturbed|displaying|startled|in danger)",
            r"(?:moves?|turns?|opens?|raises?|shakes?|flaps?|spreads|lifts?|lowers?|twitche?s?|pumps?) (?:its|their)",
            r"blend(?:s|ing)? in",
            # "camouflage paint" and "a camouflage of greens" are seen.
            r"(?:for|as|offers?|provides?|providing|effective|excellent|good|perfect) (?:\w+ )?camouflage",
            r"camouflag(?:e|ed|ing) (?:against|among|from|in|itself|themselves|with)",
        ],
    ),
}
PATTERN_OF = {
    reason: (re.compile(any_of(rule.words)), re.compile(rf"\b(?:{'|'.join(rule.phrases) or '(?!)'})\b"))
    for reason, rule in RULES.items()
}

TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
# "egg-shaped" and "forest green" are a shape and a colour; "sparrow-like" says nothing of either.
LIKENESS = re.compile(
    r"\b\w+-(?:shaped|colou?red|green|blue|gr[ae]y|brown|black|white|red|yellow|orange)\b"
    r"|\b(?:electric|forest|grass|moss|ocean|sea|sky) (?:green|blue)\b"
)
LIKE = re.compile(r"\b(\w+)-(?:like|catching)\b")
# ", a common trait of this species": a clause that only says of whom the rest is true.
REMARK = re.compile(
    r", (?:(?:which|that) (?:is|are) )?(?:an? |the )?(?:[\w-]+ ){0,2}"
    r"(?:traits?|features?|characteristics?|hallmarks?|marks?|typical|unique|common) (?:of|to|for|in|among)\b.*$"
)
# From such a word to the clause's end, a text speaks of others.
REFERENCE = re.compile(
    r"\b(?:similar|resembl\w+|looks? like|like (?:an?|the|that|those|other)|unlike|compared|contrasts? with|as opposed"
    r" to|distinguish\w*|differ(?:s|ent)? from|different than|confused|mistaken|reminiscent)\b[^,;]*"
)
# What is true only beside others: "more prominent in juveniles", "one of the palest".
RELATIVE = re.compile(
    r"\b(?:extended|lengthened|reduced|shortened|stretched) .*\bcompared\b"
    rf"|\b(?:(?:more|less|most|least) \w+|\w+er) (?:in|on|for|among) (?:the |most |some )?{KINDS}\b"
    r"|\b(?:most|least) \w+ (?:of|species|thing)\b|\bdimorphi\w+\b"
    r"|\bone of the (?:most|least|few|only|\w+est)\b|\bonly (?:\w+ ){0,2}species\b"
)
THAN = re.compile(r"\bthan\b([^,;]*)")
OTHERS = re.compile(rf"\b(?:{KINDS}|others?|most|many|(?:that|those) of)\b")
# A ratio within the photo: "longer than it is wide", "more than half black".
RATIO = re.compile(r" (?:it is|they are|wide|broad|long|deep|tall|half|one|two|three|\d)")


@cache
def forms(word: str) -> frozenset[str]:
    """The word and what it may be made of: darker -> dark; streaking -> streak; wingtips -> wing, tip."""
    found = {word} | stems(word)
    for ending in ("er", "est", "ing"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 2:
            found |= {stem, stem + "e", stem[:-1] if stem[-1] == stem[-2] else stem}
    # No longer than a word that is seen: a model may write one of a hundred thousand letters.
    for cut in range(3, min(len(word) - 2, LONGEST_SEEN + 1)):
        if word[:cut] in SEEN:
            found |= stems(word[cut:]) & SEEN
    return frozenset(found)


@cache
def reasons_of(word: str) -> frozenset[str]:
    """The reasons of RULES of which `word`, or a part between its hyphens, is one of the words."""
    pieces = {word, *word.split("-")}
    return frozenset(
        reason for reason, (pattern, _) in PATTERN_OF.items() if any(pattern.fullmatch(piece) for piece in pieces)
    )


def one_of(phrases: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these whole phrases, in the singular or plural; nothing where there are none."""
    longest_first = sorted({phrase.casefold() for phrase in phrases} - {""}, key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?:e?s)?\b")


class Eye:
    """Tells what can be seen of one domain. `attributes` are the parts and marks that its card names."""

    def __init__(self, noun: str, group: str = "", attributes: Sequence[str] = ()) -> None:
        is_flora = domain_words(noun, group, *attributes) & BOTANY or domain_words(noun, group) & PLANTS
        flora = FLORA if is_flora else frozenset()
        # Of "trumpet daffodils" the last word says what it is, the others what it looks like.
        last = domain_words(*(phrase.split()[-1] for phrase in (noun, group) if phrase.split()))
        self.seen = (SEEN | flora | (domain_words(*attributes) - EMPTY)) - last
        self.parts = PARTS | flora
        self.noun = one_of([noun, group])
        self.flora = one_of([*flora, *FLORA_PHRASES] if flora else [])
        # "a small shrub with ..." is about no surroundings where plants are pictured.
        growth = one_of(GROWTH if flora else []).pattern
        self.subject = re.compile(rf"^(?:an? |the )?(?:(?!{NEAR}\b)[\w-]+ ){{0,3}}?{growth}")

    def sees(self, text: str) -> bool:
        """Whether a text has a word of anything visible; a part's bare name ("the wings") says nothing."""
        content = [word for word in words(text) if word not in ARTICLES]
        if len(content) == 1 and self.is_part(content[0]):
            return False
        if not self.says_how(content):
            return False
        return any(not self.seen.isdisjoint(forms(word)) for word in content)

    def says_how(self, content: list[str]) -> bool:
        """Whether words say more than that there is a look, a covering, or a part that is praised."""
        seen = [forms(word) & self.seen for word in content]
        if any(LOOKS.fullmatch(word) for word in content):
            return True
        if any(seen) and all(found <= COVERINGS for found in seen):
            return False
        # "distinctive cockpit window shape": without what praises, and the noun for a side, names of parts are left.
        rest = [word for word in content if word not in PRAISE and not stems(word) & ASPECTS]
        is_empty = 0 < len(rest) < len(content) - 1 and not PRAISE.isdisjoint(content)
        return not is_empty or any(stems(word) & MARKS for word in rest) or not all(map(self.is_part, rest))

    def is_part(self, word: str) -> bool:
        return not word.endswith("ed") and not self.parts.isdisjoint(forms(word))

    def likeness(self, match: re.Match[str]) -> str:
        """What is left of "sparrow-like", which says nothing, and of "bell-like", which is a shape."""
        return "shaped" if match[0].endswith("like") and not self.seen.isdisjoint(forms(match[1])) else ""

    def why_invisible(self, text: str) -> str | None:
        """The reason for which a photo cannot show all that a text claims; None where it can."""
        text = text.casefold().replace("\u2019", "'")
        text = LIKE.sub(self.likeness, LIKENESS.sub("shaped", REMARK.sub("", text)))
        # Of insects, "an insect with ..." is not about food, nor of plants "... on its twigs" about where they are.
        text = self.subject.sub("thing", self.noun.sub("thing", text))
        foreign = self.flora.sub("mark", text)
        found = {reason for word in TOKEN.findall(foreign) for reason in reasons_of(word)}
        for reason, (_, phrases) in PATTERN_OF.items():
            if reason in found or phrases.search(foreign):
                return reason
        if self.sizes_the_whole(words(text)):
            return "size"
        if RELATIVE.search(text) or any(self.refers_to_others(match[1]) for match in THAN.finditer(text)):
            return "comparison"
        alone = REFERENCE.sub("", text)
        if self.sees(alone):
            return None
        return "comparison" if alone != text else "nothing_visible"

    def refers_to_others(self, text: str) -> bool:
        """Whether what follows "than" is nothing that the same photo shows."""
        return not RATIO.match(text) and (bool(OTHERS.search(text)) or not any(map(self.is_part, words(text))))

    def sizes_the_whole(self, tokens: list[str]) -> bool:
        """Whether a word of size tells of the whole rather than of a part: a small songbird, a bird with a big body."""
        subject = True
        for position, token in enumerate(tokens):
            if token in SIZES and self.is_whole(tokens[position + 1 :], subject):
                return True
            subject = subject and token not in CLAUSE
        return False

    def is_whole(self, tokens: list[str], subject: bool) -> bool:
        """Whether the noun that these words begin with is the whole: any but a part, as `subject` of the text."""
        phrase = list(takewhile(lambda token: token not in CLAUSE, tokens))
        for token in phrase:
            # "a large white body" is white.
            if stems(token) & WHOLE:
                before = phrase[: phrase.index(token)]
                return token != "body" or not any(forms(word) & (COLOURS | PATTERNS) for word in before)
            if self.is_part(token) or token in QUANTITIES:
                return False
        return subject and bool(phrase) and self.seen.isdisjoint(forms(phrase[-1]))
