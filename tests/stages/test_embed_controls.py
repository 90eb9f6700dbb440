import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from stages import embed_controls
from tests.project import ROOT, unit

PATH = Path("data/embed/conv/controls.parquet")
UNRELATED = ["a kettle with a curved spout", "a tram with brass railings", "a loaf of bread with a cracked crust"]


def write_classes(names: dict[str, str]) -> None:
    rows = [{"class_id": class_id, "name": name, "from_images": True} for class_id, name in names.items()]
    mark = store.fingerprint("index.classes/2", {"classes": sorted(names)})
    path = "data/index/classes.parquet"
    store.write_table(store.make_table("index.classes/2", rows), path, "index.classes/2", {}, mark)


def write_unrelated(lines: list[str]) -> None:
    Path("data/controls").mkdir(exist_ok=True)
    Path("data/controls/unrelated.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def prepared(set_params: Callable[..., Params]) -> Params:
    write_classes({"tang": "Blue Tang", "wrasse": "Wrasse"})
    write_unrelated(UNRELATED)
    return set_params(controls={"conv": {"per_class": 4}})


@pytest.fixture
def run(run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        capsys.readouterr()
        run_stage("embed_controls", "--encoder", "conv", *arguments)
        return capsys.readouterr().out

    return run


def read() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = store.read_table(PATH, "embed.controls/1").to_pylist()
    return rows


def test_every_class_has_its_name_before_the_same_random_descriptors(
    prepared: Params, run: Callable[..., str], models: dict[str, Path]
) -> None:
    assert run() == f"{PATH}: 11 texts embedded, 0 kept\n"
    rows = read()
    assert [row["text"] for row in rows if row["kind"] == "unrelated"] == UNRELATED
    assert {row["class_id"] for row in rows if row["kind"] == "unrelated"} == {None}
    drawn = {
        class_id: [str(row["text"]) for row in rows if row["class_id"] == class_id] for class_id in ("tang", "wrasse")
    }
    assert [text.removeprefix("Blue Tang") for text in drawn["tang"]] == [
        text.removeprefix("Wrasse") for text in drawn["wrasse"]
    ]
    words = {word for line in UNRELATED for word in line.split()}
    for rank, text in enumerate(drawn["wrasse"]):
        first, second = text.removeprefix("Wrasse, which has ").split()
        assert ({first, second} <= words and first != second) == (rank % 2 == 0)
        assert re.fullmatch(r"[a-z0-9]{3,}", first)
    assert len(set(drawn["wrasse"])) == 4
    model = open_clip.create_model(f"local-dir:{models['conv']}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{models['conv']}")([row["text"] for row in rows])
    with torch.no_grad():
        expected = unit(model.encode_text(tokens).numpy())
    np.testing.assert_allclose(np.array([row["vector"] for row in rows], dtype=np.float32), expected, atol=1e-3)


def test_only_what_is_not_there_is_embedded(
    prepared: Params, run: Callable[..., str], set_params: Callable[..., Params]
) -> None:
    run()
    first = PATH.read_bytes()
    assert run() == f"{PATH}: 0 texts embedded, 11 kept\n"
    assert PATH.read_bytes() == first
    # Words are drawn from the unrelated texts: with the same ones, a class and a rank more change no other text.
    write_classes({"tang": "Blue Tang", "wrasse": "Wrasse", "goby": "Goby"})
    set_params(controls={"conv": {"per_class": 5}})
    before = {str(row["text"]) for row in read()}
    assert run() == f"{PATH}: 7 texts embedded, 11 kept\n"
    assert before < {str(row["text"]) for row in read()}
    merged = PATH.read_bytes()
    PATH.unlink()
    assert run() == f"{PATH}: 18 texts embedded, 0 kept\n"
    assert PATH.read_bytes() == merged
    set_params(controls={"conv": {"per_class": 5, "seed": 1}})
    assert run() == f"{PATH}: 15 texts embedded, 3 kept\n"


def test_classes_of_one_name_share_what_is_embedded(prepared: Params, run: Callable[..., str]) -> None:
    write_classes({"a": "Tang", "b": "Tang"})
    assert run() == f"{PATH}: 7 texts embedded, 0 kept\n"
    rows = [row for row in read() if row["kind"] == "random"]
    assert [row["vector"] for row in rows[:4]] == [row["vector"] for row in rows[4:]]


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(prepared: Params, run: Callable[..., str]) -> None:
    head, rate, size = run("--dry-run").splitlines()
    assert not PATH.exists()
    assert head == f"{PATH}: 11 texts to embed, 0 kept"
    assert rate.startswith("time: about ")
    assert size.startswith("on disk: about ")


def test_what_cannot_be_is_one_line(prepared: Params, run: Callable[..., str]) -> None:
    write_unrelated([UNRELATED[0], "", UNRELATED[1], UNRELATED[0]])
    with pytest.raises(UserError, match=r"unrelated\.txt: line 4 repeats line 1: 'a kettle with"):
        run()
    write_unrelated([""])
    with pytest.raises(UserError, match=r"unrelated\.txt: holds no text"):
        run()
    Path("data/controls/unrelated.txt").unlink()
    with pytest.raises(UserError, match=r"unrelated\.txt: cannot be read .* git checkout"):
        run()


def test_the_bundled_texts_speak_of_no_living_thing() -> None:
    texts = embed_controls.read_unrelated(ROOT / "data/controls/unrelated.txt")
    assert len(texts) >= 1165  # as many as GPT-4's concepts of cub100
    marks = "bird fish animal plant tree flower leaf beak bill wing wings tail feather feathers fin fins breast belly"
    assert not {word for text in texts for word in re.findall(r"[a-z]+", text)} & set(marks.split())
    assert max(len(text.split()) for text in texts) <= 15
