"""Why clean_concepts drops texts: counts and examples of each reason, on texts that three models wrote of 100 birds.

Reads ../shared/data/cub100/concepts_{gpt4,gpt3,deepseek}.json; the domain card and `clean` of params.yaml with
profiles/cub100.yaml laid over it. Each class's texts go through the stage's own function as one imported answer.
Examples are drawn by seed from all texts of a reason.

    python -m bench.drop_reasons [--examples N] [--seed S]
"""

import argparse
import json
import platform
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from time import perf_counter

from ruamel.yaml import YAML

from fieldmark.concepts.cleaning import Row, clean_class
from fieldmark.llm.imported import row_of
from fieldmark.params import Params, check_params
from tools.profiles import lay_over

CUB = Path("../shared/data/cub100")
PROFILE = Path("profiles/cub100.yaml")


def profile_params() -> Params:
    """params.yaml with what the profile changes."""
    text = lay_over(Path("params.yaml").read_text(encoding="utf-8"), PROFILE)
    return check_params(PROFILE, YAML(typ="safe", pure=True).load(text))


def clean_file(path: Path) -> tuple[dict[str, list[Row]], float]:
    """Rows of concepts/1 (without those of names) of each class folder, and the seconds it took."""
    params = profile_params()
    texts = json.loads(path.read_text(encoding="utf-8"))
    started = perf_counter()
    cleaned = {}
    for folder, own in texts.items():
        row = {"class_id": folder, "name": folder.split(".")[1].replace("_", " "), "scientific_name": None}
        rows = clean_class(row, [row_of(folder, own)], params.domain, params.clean)
        cleaned[folder] = [row for row in rows if row["kind"] != "name"]
    return cleaned, perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10, help="texts shown a reason (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="what draws them (default: 0)")
    args = parser.parse_args()
    if not CUB.is_dir():
        sys.exit(f"drop_reasons: {CUB} is not there; it needs the shared test material beside the checkout")
    print(f"{platform.machine()}, Python {platform.python_version()}, seed {args.seed}")
    for path in (CUB / f"concepts_{source}.json" for source in ("gpt4", "gpt3", "deepseek")):
        cleaned, seconds = clean_file(path)
        by_reason: dict[str, list[str]] = defaultdict(list)
        for rows in cleaned.values():
            for row in rows:
                by_reason[row["drop_reason"] or "kept"].append(row["text"])
        total = sum(map(len, by_reason.values()))
        print(f"\n{path.name}: {total} texts of {len(cleaned)} classes in {seconds:.1f} s\n")
        for reason, texts in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            print(f"{reason:16} {len(texts):6} {len(texts) / total:6.1%}")
            for text in random.Random(args.seed).sample(sorted(texts), min(args.examples, len(texts))):
                print(f"    {text!r}")
        kept = {folder: sum(row["kept"] for row in rows) for folder, rows in cleaned.items()}
        low, middle, high = min(kept.values()), statistics.median(kept.values()), max(kept.values())
        print(f"\nkept a class: {low} at least, {middle:g} in the median, {high} at most")
        print(f"classes that keep none: {', '.join(folder for folder, count in kept.items() if not count) or 'none'}")


if __name__ == "__main__":
    main()
