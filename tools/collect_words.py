"""Words of no class, out of what a vision model said of pairs of pictures: a file for `concepts.import`.

Reads   data/asked/NAME/texts.parquet of a question of subject image_pair (`python -m stages.ask --ask NAME`).
Writes  the file that `--out` names: a JSON object with the one key "*", its texts by how often each was said, the most
        often first, of equals by the alphabet. Case, spaces and a full stop at the end make no other text.
Costs   nothing.

    python -m tools.collect_words --ask leaves --out data/words.json
    python -m tools.collect_words --ask leaves --out data/words.json --most 60
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.llm.imported import GENERIC

ASKED = Path("data/asked")
# Of training pictures alone, and told no class (fieldmark.llm.subjects: check_blind): no val or test image writes them.
WRITTEN_BLIND = "image_pair"


def most_said(texts: Iterable[str], most: int) -> list[str]:
    """The `most` texts that are said most often, each as it was written first."""
    first: dict[str, str] = {}
    count: Counter[str] = Counter()
    for text in texts:
        key = " ".join(text.casefold().split()).rstrip(". ")
        if key:
            first.setdefault(key, text.strip().rstrip(". "))
            count[key] += 1
    return [first[key] for key in sorted(count, key=lambda key: (-count[key], key))[:most]]


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--ask", required=True, metavar="NAME", help="a question of `ask` in params.yaml")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write, for concepts.import")
    parser.add_argument("--most", type=int, default=100, metavar="N", help="texts at most (default: 100)")
    arguments = parser.parse_args()
    path = ASKED / arguments.ask / "texts.parquet"
    made_by = store.read_header(path, "asked/1").params
    if made_by["subject"] != WRITTEN_BLIND or made_by["told"] or made_by["guesses"]:
        raise UserError(
            f"{path}: holds no words of training pictures alone; name a question of subject image_pair that is told no"
            " class and guesses none"
        )
    texts = most_said(store.read_table(path, "asked/1", ["text"])["text"].to_pylist(), arguments.most)
    if not texts:
        raise UserError(f"{path}: holds no text; ask again (python -m stages.ask --ask {arguments.ask})")
    store.write_text(Path(arguments.out), json.dumps({GENERIC: texts}, indent=2, ensure_ascii=False) + "\n")
    print(f"{arguments.out}: {len(texts)} texts of no class; name it under concepts.import")


if __name__ == "__main__":
    run(main)
