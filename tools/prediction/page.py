"""The page of --html: the first pictures with all that is said of them, in one file that loads nothing."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.gallery import read_thumbs, short
from evaluation.page import environment
from evaluation.words import percent
from fieldmark import store
from tools.prediction.output import SPLITS, Row, limits_of, logit, nothing_moves, written_for
from tools.prediction.pictures import Picture, Question, thumbnail

# Pictures on a page: some 10 MB, with the training pictures that they are like.
SHOWN = 300


class Page:
    """Takes the first SHOWN rows, and writes them at the end."""

    def __init__(self, question: Question, data: Path, buckets: int) -> None:
        self.question, self.data, self.buckets = question, data, buckets
        self.rows: list[Row] = []

    def add(self, pictures: Sequence[Picture], rows: Sequence[Row]) -> None:
        """The rows of pictures, with a thumbnail of each that can be decoded."""
        for picture, row in zip(pictures, rows[: SHOWN - len(self.rows)], strict=False):
            webp = None if row["error"] else thumbnail(self.question, picture)
            self.rows.append(row | {"webp": None if webp is None else encode(webp)})

    def write(self, path: Path, run: str, said: str, names: Mapping[str, str]) -> None:
        """`said` is how sure answers are, in words, `names` those of classes by class_id."""
        alike = {each["image_id"] for row in self.rows for each in row.get("nearest") or []}
        is_there = store.bucket_path(self.data / "thumbs", self.buckets - 1).is_file()
        thumbs = read_thumbs(self.data, self.buckets, alike) if is_there else {}
        content = {
            "run": run,
            "said": said,
            "pictures": len(self.question.pictures),
            "answers": [row | {"limits": limits_of(row, names)} for row in self.rows],
            "thumbs": {image_id: encode(thumbs[short(image_id)]) for image_id in alike} if thumbs else {},
            "names": names,
            "splits": SPLITS,
        }
        store.write_text(path, render(content))


def encode(webp: bytes) -> str:
    """As it stands in an address."""
    return base64.b64encode(webp).decode()


def render(content: Row) -> str:
    """The page. What comes from data is escaped, and so are characters that change how a text is read."""
    filters = (percent, logit, nothing_moves, written_for)
    made = environment(Path(__file__).parent, **{each.__name__: each for each in filters})
    return made.get_template("page.html.jinja").render(content)
