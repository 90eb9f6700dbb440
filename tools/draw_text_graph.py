"""Draw a small text graph whose structure is known: notes of invented divers, in six classes, and who cites whom.

Reads    nothing.
Writes   OUT/nodes.csv and OUT/edges.csv, as format text_graph reads them (fieldmark/documents.py).
Costs    nothing. data/demo/text_graph, which comes with the repository, is what it gives without an option.

A note is about one kind of fish. Each of its sentences tells a field mark: with probability `own` one of its kind, with
`other` one of another kind (divers mix them up), else one that all share. So texts tell a part of the classes, and no
reader of a single note can tell them all. Each note cites CITED others. With `--carry P` each of these is of its own
class with probability P, and else anyone: the edges then know what texts do not. With `--carry 0` they know nothing:
everyone is cited alike, and a method that gains by them has a fault.

Note k of a class depends on the seed, the class and k alone; its edges, on how many notes there are as well.

    python -m tools.draw_text_graph
    python -m tools.draw_text_graph --out data/notes --carry 0 --seed 1
"""

import argparse
import csv
import io
import random
from pathlib import Path

from fieldmark.command import run
from fieldmark.documents import EDGES, NODES
from fieldmark.store import sha256, write_text

OUT = Path("data/demo/text_graph")
SPLITS = {"train": 20, "val": 8, "test": 12}  # notes of each class
SENTENCES, CITED = 4, 4
OWN, OTHER = 0.25, 0.15  # of a sentence: that it tells a mark of its kind, or one of another
CARRY = 0.7
MARKS = {
    "bandit": ["a tall yellow body", "a sail-like dorsal fin", "dark bars", "a dark mask through the eye"],
    "dartling": ["a slender blue body", "a single dark stripe", "a pale patch on the cheek", "thin yellow fins"],
    "paddler": ["an oval orange body", "a rounded tail", "one white bar", "a low dorsal fin with a white edge"],
    "lancer": ["a long green body", "a forked tail", "white spots along the flank", "red fins"],
    "drummer": ["a round grey body", "a square tail", "a dark spot before the tail", "many thin stripes"],
    "mimic": ["a purple body", "a fan-shaped tail", "pale rings round the eye", "spotted fins"],
}
SHARED = [
    "The water was clear and the current weak", "It kept close to the coral all the time",
    "We saw it near the end of the dive", "Light was poor below the ledge", "Two others stayed behind in the sand",
    "It fed on something we could not see", "The tide was turning when we came up", "It did not mind the lamp",
]  # fmt: skip
TELLING = ["It had {}", "The first thing we saw was {}", "What we noted was {}", "From the side one could see {}"]
SITES = ["north reef", "harbour wall", "old wreck", "south channel", "kelp bay"]


def write_note(seed: int, kind: str, number: int) -> dict[str, str]:
    """A row of nodes.csv."""
    chance = random.Random(f"{seed}/{kind}/{number}")
    sentences: list[str] = []
    while len(sentences) < SENTENCES:
        drawn = chance.random()
        if drawn < OWN + OTHER:
            of = kind if drawn < OWN else chance.choice([other for other in MARKS if other != kind])
            sentence = chance.choice(TELLING).format(chance.choice(MARKS[of]))
        else:
            sentence = chance.choice(SHARED)
        if sentence not in sentences:
            sentences.append(sentence)
    title = f"Dive {chance.randrange(100, 1000)} at the {chance.choice(SITES)}"
    split = next(name for name, end in ends() if number < end)
    # Nobody shall read the class off the name.
    name = sha256(f"{seed}/{kind}/{number}")[:8]
    return {"id": name, "title": title, "text": ". ".join(sentences) + ".", "label": kind, "split": split}


def ends() -> list[tuple[str, int]]:
    """The splits, and the number of the first note of a class that is of none of those before."""
    numbers, last = [], 0
    for split, count in SPLITS.items():
        last += count
        numbers.append((split, last))
    return numbers


def draw(seed: int = 0, carry: float = CARRY) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of nodes.csv and of edges.csv."""
    notes = [write_note(seed, kind, number) for kind in MARKS for number in range(sum(SPLITS.values()))]
    edges = []
    for note in notes:
        chance = random.Random(f"{seed}/cites/{note['id']}")
        cited: list[str] = []
        while len(cited) < CITED:
            alike = chance.random() < carry
            other = chance.choice([one for one in notes if not alike or one["label"] == note["label"]])
            if other["id"] not in (note["id"], *cited):
                cited.append(other["id"])
        # What is cited tells of who cites it.
        edges += [{"src": one, "dst": note["id"], "kind": "cited"} for one in sorted(cited)]
    return sorted(notes, key=lambda note: note["id"]), edges


def to_csv(rows: list[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"(default: {OUT})")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other notes (default: 0)")
    carries = f"how likely a note cites one of its own class, beyond chance (default: {CARRY})"
    parser.add_argument("--carry", type=float, default=CARRY, metavar="P", help=carries)
    arguments = parser.parse_args()
    notes, edges = draw(arguments.seed, arguments.carry)
    write_text(arguments.out / NODES, to_csv(notes))
    write_text(arguments.out / EDGES, to_csv(edges))
    print(f"{arguments.out}: {len(notes)} notes, {len(edges)} edges")


if __name__ == "__main__":
    run(main)
