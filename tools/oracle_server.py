"""An oracle on this machine that answers questions about pictures from the truth about reef: it is no language model.

What a vision model would say of a drawing is not there on a machine without one. This server knows: it is asked as a
model is, by describe_images and ask as they stand (llm.mode live, llm.base_url http://127.0.0.1:8765/v1), and answers
with the field marks that the drawing has. So it tells what a method makes of texts of a known quality, and nothing at
all about language models: no figure that rests on it is a result about them. Answers name it as `model_requested`. A
question about a class is answered as the demo's recordings answer it, so that its concepts stay what they are.

The model that is asked for says what is told, and so is kept with every answer:

    oracle-20             each field mark is another one of its kind in 20 of 100 drawings; the name is not told
    oracle-20-named       the same marks, and the name of the species, which describe_images masks
    oracle-20-vernacular  the same marks, and an invented name, one for each species, which no mask knows

Marks that are absent are not spoken of. Which are wrong follows from the picture alone, so that all three err alike.
Of a cell (`describe.nodes`) it tells the marks whose part lies in it by half of its box or more, or fills half of the
cell, and nothing where there is none: what can be seen there, with the same errors. A name is told of no cell.

A question that asks for "guesses", as prompts/guess.md does, gets classes of the list in it, and the marks as reasons.
With oracle-20 the first guess is wrong in 20 of 100 drawings: it is a class that shares most marks with the true one.
The others follow by how many marks they share with the first guess, whatever is true, so that they tell no more than it
does. Which drawings these are follows from the picture alone too.

Reads   data/index/images.parquet, attributes.parquet, parts.parquet and classes.parquet, the pictures,
        data/demo/answers, params: dataset, describe, ask.
Writes  nothing. When it ends it prints how many calls it answered, by the model that was asked for: with no answer held
        before, as many as --dry-run foresaw. A picture is known by its bytes, as it is sent.
Costs   a few milliseconds a picture and cell, before the first answer. It listens on the loopback address alone, until
        Ctrl-C.

    python -m tools.oracle_server
    python -m tools.oracle_server --port 9000
"""

import functools
import json
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.llm.pictures import JPEG_QUALITY, data_url
from fieldmark.params import Params, load_params
from fieldmark.pictures.boxes import Box, box_of
from fieldmark.pictures.cuts import Place
from fieldmark.reef.species import VOCABULARY, phrases
from fieldmark.store import read_table, sha256
from stages.describe_images import cells_of

INDEX, CLASSES = Path("data/index"), "index.classes/2"
RECORDINGS = Path("data/demo/answers/concepts.jsonl")
MODEL = re.compile(r"oracle-(\d{1,2}|100)(?:-(named|vernacular))?")
MODELS = "oracle-PERCENT, oracle-PERCENT-named, oracle-PERCENT-vernacular"
SENTENCES = 3  # at most, of field marks
GUESSES = 5  # where a question does not say how many
HOW_MANY = re.compile(r"(\d+) most likely")
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
PHRASES = phrases()
# The parts of index.parts where a mark of an attribute is seen: any of them.
WHERE = {
    "body_shape": ("body",),
    "tail_shape": ("tail",),
    "dorsal_fin": ("dorsal_fin",),
    "body_colour": ("body",),
    "fin_colour": ("dorsal_fin", "tail"),
} | {mark: (mark,) for mark in ("bars", "stripes", "spots", "eye_mask", "tail_spot", "cheek")}
SEEN = 0.5  # the share of a part's box that lies in a cell, or of a cell that it fills, from which on it is told
COUNTING = threading.Lock()  # calls come in threads


class Picture(NamedTuple):
    """One drawing and what is true of it."""

    image_id: str
    class_id: str
    name: str
    marks: Mapping[str, str]  # attribute -> value
    boxes: Mapping[str, Box]  # of the parts that are visible
    cell: Box | None = None  # the cell of it that is shown; None: all of it


def share_of(text: str) -> float:
    """A number in [0, 1) that follows from a text, even over texts."""
    return int(sha256(text)[:13], 16) / 16**13


def told_marks(picture: Picture, wrong: float) -> dict[str, str]:
    """The marks that are told: each with probability `wrong` another value of its attribute."""
    told = {}
    for attribute, values in VOCABULARY.items():
        key, value = f"oracle {picture.image_id} {attribute}", picture.marks[attribute]
        if share_of(key) < wrong:
            others = [other for other in values if other != value]
            value = others[int(share_of(f"{key} value") * len(others))]
        told[attribute] = value
    return told


def seen_in(cell: Box, part: Box) -> bool:
    """Whether a part is seen in a cell."""
    width, height = (max(0.0, min(cell[end], part[end]) - max(cell[end - 2], part[end - 2])) for end in (2, 3))
    areas = [max((x1 - x0) * (y1 - y0), 1e-9) for x0, y0, x1, y1 in (part, cell)]
    return width * height >= SEEN * min(areas)


def shown_marks(picture: Picture, wrong: float) -> dict[str, str]:
    """The marks that are told and can be seen in what is shown."""
    told, cell = told_marks(picture, wrong), picture.cell
    if cell is None:
        return told
    seen = {part for part, box in picture.boxes.items() if seen_in(cell, box)}
    # A mark that is told in error lies where the true one would: on the part, where it has none of its own.
    return {mark: value for mark, value in told.items() if seen & set(place_of(picture, mark))}


def place_of(picture: Picture, mark: str) -> tuple[str, ...]:
    """The parts on which a mark is seen; one that the drawing has not itself, on the body."""
    parts = WHERE[mark]
    return parts if picture.boxes.keys() & set(parts) else ("body",)


def vernacular(class_id: str) -> str:
    """An invented name of three syllables, which no table of names holds."""
    drawn = [share_of(f"vernacular {class_id} {place}") for place in range(6)]
    letters = [(CONSONANTS, VOWELS)[place % 2] for place in range(6)]
    return "".join(among[int(share * len(among))] for share, among in zip(drawn, letters, strict=True)).capitalize()


def listed(said: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(said[:-1]), *said[-1:]]))


def sentences_of(picture: Picture, wrong: float, names: str | None) -> list[str]:
    """What the oracle says of a drawing; `names`: named, vernacular or None."""
    told = [PHRASES[mark] for mark in shown_marks(picture, wrong).items() if mark in PHRASES]
    if not told:
        return []
    step = -(-len(told) // SENTENCES)
    sentences = [f"A fish with {listed(told[start : start + step])}." for start in range(0, len(told), step)]
    if names is not None and picture.cell is None:
        name = picture.name if names == "named" else vernacular(picture.class_id)
        sentences.insert(0, f"A fish that is known as {name}.")
    return sentences


def guesses_of(picture: Picture, wrong: float, known: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The names in `known`, the marks of each class by its name, from the likeliest to the least likely."""

    def nearest(first: str) -> list[str]:
        """The other classes, those first that share most marks with it; between equals the picture draws."""

        def likeness(name: str) -> tuple[int, float]:
            shared = sum(known[first][attribute] == value for attribute, value in known[name].items())
            return -shared, share_of(f"oracle {picture.image_id} {first} {name}")

        return sorted((name for name in known if name != first), key=likeness)

    is_wrong = len(known) > 1 and share_of(f"oracle {picture.image_id} class") < wrong
    first = nearest(picture.name)[0] if is_wrong else picture.name
    return [first, *nearest(first)]


def read_pictures(params: Params) -> dict[str, Picture]:
    """Every picture of the index, and every cell of it, by the sha256 of the data URL that it is asked with."""
    marks: dict[str, dict[str, str]] = defaultdict(dict)
    for row in read_table(INDEX / "attributes.parquet", "index.attributes/1").to_pylist():
        if row["value"] not in VOCABULARY.get(row["attribute"], {}):
            raise UserError(
                f"{INDEX / 'attributes.parquet'}: {row['attribute']} {row['value']} is no field mark of reef; the"
                " oracle knows the demo alone: set dataset.root: data/reef"
            )
        marks[row["class_id"]][row["attribute"]] = row["value"]
    names, boxes, found = read_names(), read_boxes(), dict[str, Picture]()
    px = params.describe.image_px
    ways = [(px, None), *((px, cell.box) for cell in cells_of([""], params.describe.nodes))]
    ways += [(other, None) for other in sorted({question.image_px for question in params.ask.values()} - {px})]
    for row in read_table(INDEX / "images.parquet", "index.images/1").to_pylist():
        if row["status"] == "ok":
            path, class_id = params.dataset.folder / row["path"], row["class_id"]
            whole = Picture(row["image_id"], class_id, names[class_id], marks[class_id], boxes.get(row["path"], {}))
            for px, cell in ways:
                shown = whole._replace(cell=cell)
                key = sha256(data_url(Place(path), px, JPEG_QUALITY, cell))
                if found.get(key, shown) != shown:
                    raise UserError(f"{path}: as it is sent, it equals another picture or cell: the oracle cannot tell")
                found[key] = shown
    return found


def read_boxes() -> dict[str, dict[str, Box]]:
    """By path, the boxes of the parts that are visible."""
    boxes: dict[str, dict[str, Box]] = defaultdict(dict)
    for row in read_table(INDEX / "parts.parquet", "index.parts/1").to_pylist():
        if row["visible"] and (box := box_of(row["box"])) is not None:
            boxes[row["path"]][row["part"]] = box
    return boxes


def read_names() -> dict[str, str]:
    """The name of each class by its id."""
    table = read_table(INDEX / "classes.parquet", CLASSES, ["class_id", "name"])
    return dict(zip(table["class_id"].to_pylist(), table["name"].to_pylist(), strict=True))


def read_recordings() -> dict[str, Any]:
    """What the demo's recordings answer about each class, by its name."""
    records = map(json.loads, RECORDINGS.read_text(encoding="utf-8").splitlines())
    by_class = {record["class_id"]: record["response"] for record in records if record["sample"] == 0}
    return {name: by_class[class_id] for class_id, name in read_names().items() if class_id in by_class}


def texts_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """All that is said in messages."""
    contents = [message["content"] for message in messages]
    parts = [part for each in contents if isinstance(each, list) for part in each if part.get("type") == "text"]
    return "\n".join([*(each for each in contents if isinstance(each, str)), *(part["text"] for part in parts)])


class Refused(Exception):
    """A call that is not answered: a status of HTTP and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Oracle:
    pictures: dict[str, Picture]  # by read_pictures
    concepts: dict[str, Any]  # by read_recordings
    calls: Counter[str] = field(default_factory=Counter)  # answered ones, by the model that was asked

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """A chat completion. Raises Refused where the model, or the picture or class in question, is not known."""
        model = str(request.get("model"))
        asked = MODEL.fullmatch(model)
        if asked is None:
            raise Refused(404, f"this is an oracle, and no {model}; set llm.model to one of {MODELS}")
        question = request["messages"][-1]["content"]
        if isinstance(question, str):
            said = self.concepts_of(question)
        else:
            picture, wrong = self.picture_of(question), int(asked[1]) / 100
            said = {"sentences": sentences_of(picture, wrong, asked[2])}
            if '"guesses"' in (text := texts_of(request["messages"])):
                said = {"guesses": self.guesses_in(text, picture, wrong), "reasons": said["sentences"]}
        with COUNTING:
            self.calls[model] += 1
        content = json.dumps(said)
        words = len(content.split())
        return {
            "id": f"oracle-{sha256(content)[:16]}",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": words, "total_tokens": 1 + words},
        }

    def concepts_of(self, question: str) -> Any:
        """The recorded answer about the one class that a question names."""
        named = [name for name in self.concepts if name in question]
        if len(named) != 1:
            raise Refused(404, "the oracle answers questions about one picture or one class of reef, and no others")
        return self.concepts[named[0]]

    @functools.cached_property
    def marks(self) -> dict[str, Mapping[str, str]]:
        """The marks of each class, by its name."""
        return {picture.name: picture.marks for picture in self.pictures.values()}

    def guesses_in(self, text: str, picture: Picture, wrong: float) -> list[str]:
        """As many classes as a question asks for, of those that it lists."""
        listed = {line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")}
        known = {name: marks for name, marks in self.marks.items() if name in listed}
        if picture.name not in known:
            raise Refused(404, "the oracle guesses among classes of reef that stand in the question, each behind '- '")
        many = HOW_MANY.search(text)
        return guesses_of(picture, wrong, known)[: int(many[1]) if many else GUESSES]

    def picture_of(self, parts: list[dict[str, Any]]) -> Picture:
        """The picture that the parts of a message hold."""
        urls = [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]
        picture = self.pictures.get(sha256(urls[0])) if len(urls) == 1 else None
        if picture is None:
            why = (
                "this picture was not there when the oracle began, or describe.image_px was another, or describe.nodes,"
                " or the image_px of a question; start it again"
            )
            raise Refused(404, why)
        return picture

    def count(self) -> str:
        """What it did, for people."""
        said = [f"{counted(count, 'call', 'calls')} to {model}" for model, count in sorted(self.calls.items())]
        return f"oracle_server: answered {listed(said) or 'nobody'}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.path != "/v1/chat/completions":
                raise Refused(404, "the oracle answers chat/completions alone")
            body, status = self.server.oracle.answer(json.loads(content)), 200
        except Refused as refused:
            body, status = {"error": {"message": str(refused), "type": "invalid_request_error"}}, refused.status
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        """Calls are counted."""


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, oracle: Oracle, port: int) -> None:
        """Of the loopback address alone; port 0 takes any that is free."""
        super().__init__(("127.0.0.1", port), Handler)
        self.oracle = oracle


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--port", type=int, default=8765, help="where it listens (default: 8765)")
    args = parser.parse_args()
    oracle = Oracle(read_pictures(load_params(args.params)), read_recordings())
    try:
        listener = Listener(oracle, args.port)
    except OSError as error:
        raise UserError(f"--port {args.port}: cannot be listened on ({error.strerror}); choose another") from None
    with listener:
        print(
            f"oracle_server: knows {counted(len(oracle.pictures), 'picture', 'pictures')}; it is no language model."
            f' params.yaml: llm: {{mode: live, base_url: "http://127.0.0.1:{listener.server_port}/v1", model: ...}}'
            f" with one of {MODELS}",
            flush=True,
        )
        try:
            listener.serve_forever()
        finally:
            print(oracle.count(), file=sys.stderr)


if __name__ == "__main__":
    run(main)
