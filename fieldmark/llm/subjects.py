"""What a question of one's own is asked about, and what its prompt may use.

| subject | a question for | variables beside those of all |
|---|---|---|
| class | each class | those of a class |
| pair | two classes, each pair once | first, second: each has those of a class, as in first.name |
| image | each picture, which is sent with it | for training images alone, those of their class |
| image_pair | two training pictures that are sent together, drawn | none: nobody says of which classes they are |
| text | what is said of each image or document | text; for training images alone, those of their class and neighbours |

All may use the words of the domain card (noun, group, attributes, not_shown), count, and classes, the names of all
classes. Of a class there are class_id, name, scientific_name, superclass, lineage, aliases, note and siblings.

What tells a prompt the class of an image is its label. A text that was written with the label, put beside a val or test
image, would hand the answer to whoever reads it: such prompts ask about training images alone (`check_blind`).
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from fieldmark.command import UserError
from fieldmark.concepts.siblings import siblings_of
from fieldmark.llm.answers import Item
from fieldmark.llm.held import Made
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.store import sha256

OF_CLASS = ("class_id", "name", "scientific_name", "superclass", "lineage", "aliases", "note")
SIBLINGS, NEIGHBOURS = "siblings", "neighbours"
TELLS_THE_CLASS = {*OF_CLASS, SIBLINGS, NEIGHBOURS}
OF_PICTURES = ("image", "image_pair", "text")
# Of more pairs than this, every one rendered before a limit of calls or cost could speak, minutes and memory would go.
MOST_PAIRS = 200_000
Row = dict[str, Any]
Values = dict[str, Any]


def names_of(classes: Sequence[Row]) -> list[str]:
    """What classes are called in a list of them, sorted: by name, or by class_id where several have that name."""
    count = Counter(row["name"] for row in classes)
    return sorted(row["name"] if count[row["name"]] == 1 else row["class_id"] for row in classes)


def class_values(classes: Sequence[Row]) -> dict[str, Values]:
    """What prompts may use of each class, by class_id."""
    siblings = siblings_of(classes)
    return {
        row["class_id"]: {name: row[name] for name in OF_CLASS} | {SIBLINGS: siblings.get(row["class_id"], [])}
        for row in classes
    }


def told_of_class(prompt: Prompt) -> list[str]:
    """The variables by which a prompt about images or texts is told their class."""
    return sorted(TELLS_THE_CLASS & set(prompt.variables)) if prompt.subject in OF_PICTURES else []


def check_blind(prompt: Prompt, splits: Collection[str], key: str) -> None:
    """Raise UserError where a prompt about images or texts is told their class, and others than training images are
    asked about; `key` of params.yaml names the question."""
    told = told_of_class(prompt)
    if prompt.subject == "image_pair" and told:
        known = ", ".join(told)
        raise UserError(f"{prompt.path}: variables: {known}: pairs of pictures are asked about without any class")
    if prompt.subject == "image_pair" and set(splits) != {"train"}:
        why = "what is said of two pictures becomes words for all, which no val or test image may write"
        raise UserError(f"params.yaml: {key}.splits: {prompt.path} asks about pairs of pictures; {why}; write [train]")
    if told and set(splits) != {"train"}:
        raise UserError(
            f"params.yaml: {key}.splits: {prompt.path} is told the class ({', '.join(told)}), which no text of a val or"
            " test image may know; write splits: [train], or take that out of the prompt"
        )


def class_items(prompt: Prompt, classes: Sequence[Row], card: Values, samples: int) -> list[Item]:
    """One item a class and sample."""
    values = class_values(classes)
    rendered = {class_id: prompt.render(card | values[class_id]) for class_id in sorted(values)}
    return sampled(rendered, samples)


def pair_items(prompt: Prompt, classes: Sequence[Row], card: Values, samples: int, *, siblings: bool) -> list[Item]:
    """One item a pair of classes and sample: of all pairs, or of those under one superclass.

    The subject_id is both class_ids with a space between. Raises UserError where there is no pair, or more than
    MOST_PAIRS.
    """
    values = class_values(classes)
    families = defaultdict[str, list[str]](list)
    for class_id in sorted(values):
        above = values[class_id]["superclass"] if siblings else "all"
        if above:
            families[above].append(class_id)
    count = sum(math.comb(len(family), 2) for family in families.values())
    if not count:
        why = "no two classes share a superclass (`superclass` in classes.csv)" if siblings else "there is one class"
        raise UserError(f"{prompt.path}: asks about pairs of classes, and {why}; set pairs: all, or name superclasses")
    if count > MOST_PAIRS:
        remedy = "name smaller groups in `superclass` of classes.csv" if siblings else "set pairs: siblings"
        raise UserError(f"{prompt.path}: asks about {count:,} pairs of classes, over {MOST_PAIRS:,}; {remedy}")
    pairs = sorted(pair for family in families.values() for pair in itertools.combinations(family, 2))
    return sampled(
        {
            f"{first} {second}": prompt.render({**card, "first": values[first], "second": values[second]})
            for first, second in pairs
        },
        samples,
    )


def image_items(
    prompt: Prompt,
    images: Mapping[str, str],
    classes: Sequence[Row],
    card: Values,
    samples: int,
    show: Callable[[list[Message], str], list[Message]],
) -> Sequence[Item]:
    """One item an image and sample, made when it is looked at. `images`: the class_id of each image_id; `show` adds the
    picture to messages."""
    if told_of_class(prompt):
        values = class_values(classes)
        texts = {class_id: prompt.render(card | values[class_id]) for class_id in sorted(set(images.values()))}
    else:
        texts = dict.fromkeys(images.values(), prompt.render(card))

    def make(subject: tuple[str, int]) -> Item:
        image_id, sample = subject
        return Item(image_id, sample, show(texts[images[image_id]], image_id))

    return Made([(image_id, sample) for image_id in sorted(images) for sample in range(samples)], make)


def image_pairs(images: Collection[str], most: int) -> list[tuple[str, str]]:
    """Pairs of image_ids, `most` of them: each image with the next one on a circle whose order are hashes.

    Classes have no say. An image more changes two pairs at most, and pushes out one.
    """
    circle = sorted(images, key=lambda image_id: sha256(f"pair {image_id}"))
    following = zip(circle, circle[1:] + circle[:1], strict=True)
    pairs = dict.fromkeys((min(pair), max(pair)) for pair in following if pair[0] != pair[1])
    return list(pairs)[:most]


def image_pair_items(
    prompt: Prompt,
    pairs: Sequence[tuple[str, str]],
    card: Values,
    samples: int,
    show: Callable[[list[Message], Sequence[str]], list[Message]],
) -> list[Item]:
    """One item a pair and sample; the subject_id is both image_ids with a space between."""
    text = prompt.render(card)
    return sampled({" ".join(pair): show(text, pair) for pair in sorted(pairs)}, samples)


def text_items(
    prompt: Prompt,
    texts: Mapping[str, str],
    images: Mapping[str, str],
    neighbours: Mapping[str, Sequence[str]],
    classes: Sequence[Row],
    card: Values,
    samples: int,
) -> list[Item]:
    """One item a text and sample. `texts`, `images` (class_ids) and `neighbours` (of each, the nearest first) by
    image_id; those without neighbours are left out where the prompt uses them."""
    told = told_of_class(prompt)
    near = NEIGHBOURS in prompt.variables
    values = class_values(classes) if told else {}
    rendered = {}
    for image_id in sorted(texts):
        if near and not neighbours.get(image_id):
            continue
        known = card | (values[images[image_id]] if told else {}) | {"text": texts[image_id]}
        others = {NEIGHBOURS: [texts[other] for other in neighbours[image_id]]} if near else {}
        rendered[image_id] = prompt.render(known | others)
    return sampled(rendered, samples)


def sampled(rendered: Mapping[str, list[Message]], samples: int) -> list[Item]:
    return [Item(subject, sample, messages) for subject, messages in rendered.items() for sample in range(samples)]


def texts_of(rows: Sequence[Row]) -> dict[str, str]:
    """By image_id what is said of each, a sentence a line: rows of descriptions/1, in any order."""
    said = defaultdict[str, list[str]](list)
    for row in sorted(rows, key=lambda row: (row["image_id"], row["rank"])):
        said[row["image_id"]].append(row["text"])
    return {image_id: "\n".join(sentences) for image_id, sentences in said.items()}


def nearest_of_class(
    links: Sequence[Row], texts: Collection[str], images: Mapping[str, str], most: int
) -> dict[str, list[str]]:
    """By image_id, of the images that are linked into it those of its own class that have a text, the nearest first,
    `most` of them.

    `links`: rows of links/1; `images`: the class_id of each image that may stand here, by image_id. Of equal weights
    the lower image_id goes first; who is linked twice counts once.
    """
    linked = [
        row
        for row in links
        if row["src"] != row["dst"]
        and {row["src"], row["dst"]} <= images.keys()
        and images[row["src"]] == images[row["dst"]]
        and row["src"] in texts
    ]
    found = defaultdict[str, dict[str, None]](dict)
    for row in sorted(linked, key=lambda row: (-row["weight"], row["src"])):
        found[row["dst"]][row["src"]] = None
    return {image_id: list(sources)[:most] for image_id, sources in found.items()}
