"""A small project in a temporary folder: parameters, prompts and an index, for tests of the LLM stages."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ruamel.yaml import YAML

from fieldmark import store
from fieldmark.llm.answers import Item
from fieldmark.llm.journal import journal_path
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.params import Llm, Price
from tests.openai_server import OpenAIServer

REPOSITORY = Path(__file__).parents[3]
KEY = "sk-test-0123456789-not-to-be-seen"
Row = dict[str, Any]


class Workspace:
    """Made in the current folder. `llm` are the values of that block; `write` puts params.yaml in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base_url: str) -> None:
        self.monkeypatch = monkeypatch
        self.llm: dict[str, Any] = {
            "mode": "live",
            "base_url": base_url,
            "model": "tiny",
            "api_key_env": "FIELDMARK_TEST_KEY",
            "concurrency": 4,
            "timeout_s": 5.0,
            "max_attempts": 3,
            "prices": {"tiny": {"input": 1.0, "output": 2.0}},
        }
        self.blocks: dict[str, Any] = {}
        monkeypatch.setenv("FIELDMARK_TEST_KEY", KEY)
        for variable in ("FIELDMARK_CACHE", "FIELDMARK_COLD", "OPENAI_BASE_URL"):
            monkeypatch.delenv(variable, raising=False)
        shutil.copytree(REPOSITORY / "prompts", "prompts")

    def write(self, **llm: Any) -> None:
        self.llm |= llm
        content = {
            "domain": {
                "noun": "fish",
                "group": "reef fish",
                "attributes": ["tail", "bars and stripes"],
                "not_shown": ["sound"],
            },
            "dataset": {"root": "data/photos"},
            "llm": self.llm,
            "encoders": {"toy": {"model": "toy"}},
            "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "toy"}}},
            "report": {"reference": "zero_shot"},
            **self.blocks,
        }
        with open("params.yaml", "w") as file:
            YAML(typ="safe").dump(content, file)

    def write_classes(self, *names: str, superclasses: dict[str, str] | None = None, **columns: Any) -> None:
        rows = [
            {
                "class_id": store.sha256(name)[:8],
                "name": name,
                "from_images": False,
                "superclass": (superclasses or {}).get(name),
                **columns,
            }
            for name in sorted(names)
        ]
        table = store.make_table("index.classes/2", rows)
        store.write_table(table, "data/index/classes.parquet", "index.classes/2", {}, store.sha256(str(sorted(names))))

    def write_images(self, count: int, size: tuple[int, int] = (900, 600)) -> list[Row]:
        """Images in folders whose names give the class away, as rows of index.images/1; the last one is broken."""
        rows = []
        for number in range(count):
            path = Path("data/photos/train/Secret bandit", f"secret-bandit-{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (number, 80, 120)).save(path)
            image_id = store.sha256(path.read_bytes())
            relative = path.relative_to("data/photos").as_posix()
            rows.append(
                {"path": relative, "image_id": image_id, "class_id": "secret-bandit", "split": "train", "status": "ok"}
            )
        broken = {"path": "train/broken.jpg", "image_id": None, "class_id": "x", "split": "train", "status": "broken"}
        table = store.make_table("index.images/1", [*rows, broken])
        store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "images")
        return rows

    def lock_index(self, root: str, *names: str) -> None:
        """A dvc.lock that lists these tables of the index as made of `root`."""
        outs = [
            {"path": path, "md5": hashlib.md5(Path(path).read_bytes()).hexdigest()}
            for path in (f"data/index/{name}.parquet" for name in names)
        ]
        made_by = {"params.yaml": {"dataset": {"root": root}}}
        with open("dvc.lock", "w") as file:
            YAML(typ="safe").dump({"stages": {"index_images": {"params": made_by, "outs": outs}}}, file)

    def run(self, main: Callable[[], None], *arguments: str) -> None:
        """A stage's main in this process, as its command line would call it."""
        self.monkeypatch.setattr(sys, "argv", ["stage", *arguments])
        main()

    def start(self, stage: str, *arguments: str) -> subprocess.Popen[str]:
        """A stage as a process of its own."""
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", f"stages.{stage}", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(path: str = "data/concepts/answers.parquet") -> list[Row]:
    rows: list[Row] = store.read_table(path, "llm.answers/1").to_pylist()
    return rows


def journal_lines(stage: str = "generate_concepts") -> list[bytes]:
    """The complete lines of a stage's journal."""
    content = journal_path(stage).read_bytes()
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


SCHEMA = {"type": "object", "required": ["x"], "properties": {"x": {"type": "string"}}}
PROMPT = Prompt("prompts/test.md", "0" * 64, "a test", (), SCHEMA, ())
# An address of documentation (RFC 5737), which nothing is sent to.
ELSEWHERE = "http://192.0.2.1/v1"
PRICES = {"tiny": Price(input=1.0, output=2.0)}


def row_with(**values: Any) -> Row:
    """A row of llm.answers/1 that is an answer, but for these values."""
    row = {
        "item_key": "key",
        "subject_id": "subject",
        "sample": 0,
        "prompt_sha": "0" * 64,
        "status": "ok",
        "response_json": '{"x":"y"}',
        "model_requested": "tiny",
        "model_reported": None,
        "response_id": None,
        "finish_reason": "stop",
        "input_tokens": 100,
        "output_tokens": 50,
        "cost_usd": None,
        "attempts": 1,
        "source": "live",
        "created_at": "2026-11-21T00:00:00Z",
    }
    return row | values


def llm_of(server: OpenAIServer, **values: Any) -> Llm:
    """The settings that ask a local server."""
    settings = {"mode": "live", "base_url": server.base_url, "model": "tiny", "api_key_env": "FIELDMARK_TEST_KEY"}
    return Llm.model_validate({**settings, "timeout_s": 5.0, "max_attempts": 3, **values})


def items_of(texts: Iterable[str]) -> list[Item]:
    """A question a text."""
    return [Item(f"id of {text}", 0, [{"role": "user", "content": text}]) for text in texts]


def plain(item: Item) -> list[Message]:
    return item.messages
