"""Tables of answers: where they lie, and which of their rows cost money."""

from pathlib import Path

PAID = ("live", "batch")  # sources of answers that cost


def answer_tables(data: Path) -> list[Path]:
    """Every answers.parquet under data/: of the stages that ask, and of each question of one's own."""
    return sorted([*data.glob("*/answers.parquet"), *data.glob("asked/*/answers.parquet")])
