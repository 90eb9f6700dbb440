"""The referee as a command on a small project; and whether planted texts that say something, or nothing, fool it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import referee as maths
from evaluation.referee import Texts
from evaluation.referee_tables import FileResult, questions, verdict
from fieldmark import store
from fieldmark.command import UserError
from tests.project import draw
from tests.tools.conftest import contents, run_module, write_params
from tools import referee

NAMES = ["Angel", "Butterfly", "Cardinal", "Damsel", "Emperor", "Filefish", "Goby", "Hogfish", "Idol", "Jobfish"]
TRAITS = ["yellow tail", "blue bars", "black mask", "white spots", "red fins"]
FAST = ["--encoder", "vit", "--splits", "2", "--draws", "2"]


def class_ids() -> list[str]:
    return [name.lower() for name in NAMES]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """Ten classes of ten pictures in two families, with attributes, embedded by a tiny encoder."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, name in enumerate(class_ids() * 11):
            draw(Path(f"images/{'test' if number >= 100 else 'train'}/{name}/{number}.png"), number % 10 + 10 * number)
        lines = [f"{name.lower()},{name},Reef > {'Flat' if name < 'F' else 'Long'}" for name in NAMES]
        Path("images/classes.csv").write_text("\n".join(["class_id,name,lineage", *lines, ""]))
        Path("data/controls").mkdir(parents=True)
        Path("data/none").touch()
        things = [f"a {what} {thing}" for what in ("wooden", "broken", "cheap") for thing in ("chair", "engine", "cup")]
        Path("data/controls/unrelated.txt").write_text("\n".join([*things, ""]))
        write_params(models, concepts={"import": "none"}, embed={"views": 0, "tokens": False, "grids": [2]})
        run_module("stages.index_images")
        run_module("stages.embed_images", "--encoder", "vit")
        rows = [
            {"class_id": name, "attribute": "tail", "value": ["forked", "round"][number % 2]}
            for number, name in enumerate(class_ids())
        ]
        table = store.make_table("index.attributes/1", rows)
        store.write_table(table, Path("data/index/attributes.parquet"), "index.attributes/1", {}, "attributes")
        texts = {
            name: [f"fish with a {TRAITS[number % 5]}", f"fish with a {TRAITS[number // 2]} and a long fin"]
            for number, name in enumerate(NAMES)
        }
        Path("good.json").write_text(json.dumps(texts | {"Angel": ["a fish that sings at dawn", "an angel fish"]}))
        rows_of = [f"{name.lower()},fish with a {TRAITS[number % 5]}" for number, name in enumerate(NAMES)]
        Path("sheet.csv").write_text("\n".join(["class,text", *rows_of, ""]))
    return folder


@pytest.fixture
def project(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A test leaves data/ as it was."""
    monkeypatch.chdir(small)
    monkeypatch.setattr(referee, "FEW_DRAWS", 1)
    monkeypatch.setattr(referee, "NEC", (2.0, float("inf")))
    before = contents(small / "data")
    yield small
    assert contents(small / "data") == before


def test_one_page_of_two_files(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_module("tools.referee", "good.json", "sheet.csv", *FAST, "--json", "page.json", "--markdown", "page.md")
    text, figures = capsys.readouterr().out, json.loads(Path("page.json").read_text())
    good, sheet = figures["files"]
    assert good["counts"] == [0, *[2] * 9]
    assert good["bare"] == ["angel"]
    assert good["reasons"] == {"sound": 1, "class_name": 1}
    assert good["naming"]["all"]["own"] == pytest.approx(1 / 20)
    assert good["naming"]["kept"]["any"] == 0
    assert sheet["counts"] == [1] * 10
    rows = {row["name"]: row for row in good["rows"]}
    assert list(rows) == [
        "zero-shot, 0 images", "map, 0 images", "prior, 1 image", "prior, 2 images",
        "bottleneck, NEC 2", "bottleneck, NEC all",
    ]  # fmt: skip
    controls = ["random", "shuffled", "permuted", "unrelated", "names", "names + texts"]
    assert list(rows["zero-shot, 0 images"]["others"]) == controls
    assert list(rows["map, 0 images"]["others"]) == [*controls, "none"]
    assert list(rows["bottleneck, NEC 2"]["others"]) == ["random", "unrelated", "names", "none"]
    assert rows["map, 0 images"]["others"]["none"] == pytest.approx(1 / 3)  # three classes are told apart
    assert not any(row["shown"] for file in figures["files"] for row in file["rows"])
    assert text.count("no verdict") >= 2 * 6  # ten classes say nothing of others
    assert [group["group"] for group in good["missing"]["groups"]] == ["tail"]
    assert [each["rank"] for each in good["ranks"]] == [0, 1]
    assert {row["class_id"] for row in good["carrying"]} <= set(class_ids()) - {"angel"}
    assert [side["question"] for side in figures["sides"]] == list(rows)
    assert Path("page.md").read_text().count("\n## ") >= 8
    assert "2 classes" not in text
    assert "no verdict: fewer than 20 classes; 2 draws of a control, all of which" in text
    assert "no verdict: fewer than 20 classes; 1 draw of a control, all of which" in text
    assert (good["distinct"], good["choices"], sheet["choices"]) == (10, 9, 5)
    known = store.read_table(Path(".cache/referee/vit.parquet"), "embed.text/1")
    assert known.num_rows == len(set(known["text"].to_pylist()))


def test_what_texts_are_worth_and_the_same_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tools.referee", "good.json", *FAST, "--worth", "--per-class", "1", "--json", "worth.json"]
    run_module(*words)
    first, kept = capsys.readouterr().out, Path(".cache/referee/vit.parquet").read_bytes()
    run_module("tools.referee", "sheet.csv", *FAST, "--worth")
    capsys.readouterr()
    run_module(*words)
    texts = set(store.read_table(Path(".cache/referee/vit.parquet"), "embed.text/1")["text"].to_pylist())
    assert {f"fish with a {trait}" for trait in TRAITS} <= texts  # what another file holds is kept
    assert len(Path(".cache/referee/vit.parquet").read_bytes()) >= len(kept)
    assert capsys.readouterr().out == first
    [file] = json.loads(Path("worth.json").read_text())["files"]
    assert [row["k"] for row in file["worth"]] == [0, 1, 2, 4, 5]  # half of ten pictures are all
    assert file["counts"] == [0, *[1] * 9]
    assert file["reasons"]["over --per-class"] == 9
    assert file["rows"] == []
    assert file["worth"][0]["none"] == pytest.approx(1 / 3)
    assert "beside no image the texts are worth" in first


def test_files_may_name_the_roles(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("fit.txt").write_text("angel\nbutterfly\ncardinal\ndamsel\n")
    Path("choose.txt").write_text("emperor\nfilefish\n")
    roles = ["--fit", "fit.txt", "--settings", "choose.txt"]
    run_module("tools.referee", "sheet.csv", *FAST, *roles, "--json", "own.json")
    said = capsys.readouterr().out
    assert "1 split of the classes: 4 teach, 2 choose, 4 are told apart" in said
    assert "left out: rank 1; in a split" in said  # all that is told apart is of one family
    assert json.loads(Path("own.json").read_text())["setting"]["roles"] == [[4, 2, 4]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["good.json", "good.json"], "good.json: stands there twice"),
        (["good.json", "--fit", "good.json"], "--fit and --settings: name both"),
        (["good.json", "--draws", "0"], "--draws: 0 is none"),
        (["good.json", "--features", ""], "--features: input should be one of [^\n]*$"),
        (["nothing.json"], "nothing.json: cannot be read"),
        (["empty.json"], "empty.json: none of its texts can be a concept .*1 class_name"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(project: Path, words: list[str], said: str) -> None:
    Path("empty.json").write_text('{"angel": ["an angel"]}')
    with pytest.raises(UserError, match=said):
        run_module("tools.referee", *FAST, *words)


def test_images_of_another_encoder_are_refused(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for path in Path("data/embed/vit/images").iterdir():
        header, table = store.read_header(path, "embed.nodes/1"), store.read_table(path, "embed.nodes/1")
        store.write_table(table, path, "embed.nodes/1", header.params | {"encoder": "older"}, header.fingerprint)
    with pytest.raises(UserError, match="data/embed/vit/images: was made by another encoder vit; run embed_images"):
        run_module("tools.referee", *FAST, "good.json")


def test_files_are_called_by_the_ends_in_which_they_differ() -> None:
    assert referee.called([Path("a/gpt4.json"), Path("b/sheet.csv")]) == ["gpt4.json", "sheet.csv"]
    assert referee.called([Path("a/x.json"), Path("b/x.json"), Path("y.json")])[:2] == ["a/x.json", "b/x.json"]
    with pytest.raises(UserError, match=r"x\.json: stands there twice"):
        referee.called([Path("x.json"), Path("x.json").absolute()])


# Planted data: 60 classes, of which 24 are told apart by six images each.


def judged(seed: int, said: float, mixed: bool = False) -> list[maths.Row]:
    """Four texts a class whose mean tells where images lie, `said` of 1, or nothing of it; mixed: of others' owners."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    meaning, labels = normal(60, 6), torch.arange(60)
    y = labels.repeat_interleave(6)
    x = torch.cat([meaning, 0.5 * normal(60, 6)], dim=1)[y] @ normal(12, 16) + 2.0 * normal(len(y), 16)
    K = F.normalize(said * meaning.repeat_interleave(4, 0) @ normal(6, 24) + normal(240, 24), dim=1)
    own = F.one_hot(labels.repeat_interleave(4), 60).bool()
    own = own[torch.randperm(240, generator=generator)] if mixed else own
    pool = torch.arange(len(y)) % 2 == 0
    ranks = torch.where(pool, torch.arange(6).repeat(60) // 2, -1)[None]
    splits, knobs = [], maths.Knobs(0.3, 0.7)
    for roles in maths.rotated_roles([f"class-{n}" for n in range(60)], 2):
        taught = maths.learn(x, y, roles)
        asked: dict[int | None, Any] = {k: maths.ask(taught, y, pool, ranks, roles.report, k, knobs) for k in (0, 1)}
        splits.append(referee.Split(taught, asked, {0: knobs, 1: knobs}))
    texts = Texts(tuple(map(str, range(240))), K, own)
    voices = referee.voices_of(texts, F.normalize(normal(60, 24), dim=1), F.normalize(normal(50, 24), dim=1), 20)
    questions = referee.ask_all(splits, voices, F.normalize(normal(len(y), 24), dim=1), (0, 1)).questions
    part = maths.part_of([split.asked[0].images for split in splits], len(y))
    return maths.judge(questions, y.numpy(), dict.fromkeys(questions, part))


def judged_in_a_bottleneck(seed: int, said: float, draws: int = maths.FEWEST_DRAWS) -> list[maths.Row]:
    """A text for each of 30 classes that lies where images of some other class do, `said` of 1, or anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    labels, means = torch.arange(30), normal(30, 6) @ normal(6, 96) / 6**0.5
    y = labels.repeat_interleave(8)
    g = F.normalize(means[y] + 2.0 * normal(len(y), 96), dim=1)
    K = F.normalize(said * means[torch.randperm(30, generator=generator)] + (1 - said) * normal(30, 96), dim=1)
    pool = torch.arange(len(y)) % 2 == 0
    images = (~pool).nonzero()[:, 0]
    shown = referee.Shown(labels, g[pool], y[pool], g[images], images, y[images])
    texts, strangers = Texts(tuple(map(str, range(30))), K, torch.eye(30).bool()), F.normalize(normal(50, 96), dim=1)
    found = referee.ask_bottleneck(shown, texts, strangers, {}, 10.0, len(y), draws)
    part = dict.fromkeys(found.questions, maths.part_of([images], len(y)))
    return maths.judge(found.questions, y.numpy(), part)


def claims(rows: list[maths.Row]) -> list[str]:
    """What the page says of rows, line by line."""
    file = FileResult("x.json", 60, [4] * 60, 60, 240, {}, {}, [], {}, rows)
    return questions(file)[2]


def test_what_a_bottleneck_shows_is_not_said_of_the_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of these pictures, whose owners are mixed up."""
    monkeypatch.setattr(referee, "NEC", (float("inf"),))
    own, these = claims([*judged(0, said=1.0, mixed=True), *judged_in_a_bottleneck(0, said=1.0)])[:2]
    assert own == "that the texts say something of their own classes is shown in no question"
    assert these == (
        "that the texts say more of these pictures than random or unrelated ones, whoever owns them, is shown in:"
        " bottleneck, NEC all"
    )


def test_few_draws_give_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referee, "NEC", (float("inf"),))
    rows = judged_in_a_bottleneck(0, said=1.0, draws=3)
    assert not rows[0].shown
    assert verdict(rows[0]) == "no verdict"
    assert "one case of 4 (--bottleneck-draws 19 or more)" in claims(rows)[0]


def test_texts_that_carry_the_class_are_shown_to() -> None:
    rows = {row.name: row for row in judged(0, said=1.0)}
    row = rows["map, 0 images"]
    assert row.shown
    assert min(row.over[name].over[0] for name in ("shuffled", "permuted", "random", "none")) > 0
    assert not rows["zero-shot, 0 images"].shown  # their space is not that of the images


def fooled(seeds: range) -> int:
    return sum(any(row.shown for row in judged(seed, said=0.0)) for seed in seeds)


def test_texts_that_carry_nothing_are_not() -> None:
    assert fooled(range(3)) == 0


@pytest.mark.slow
def test_of_many_files_that_carry_nothing_five_per_cent_at_most_say_yes() -> None:
    assert fooled(range(100)) <= 5


@pytest.mark.slow
def test_of_many_files_that_say_nothing_of_the_pictures_five_per_cent_at_most_say_yes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(referee, "NEC", (float("inf"),))
    assert sum(row.shown for seed in range(100) for row in judged_in_a_bottleneck(seed, said=0.0)) <= 5


def test_unrelated_texts_stand_for_more_concepts_than_there_are() -> None:
    strangers = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    found = referee.strangers_of(torch.zeros(12, 3), strangers, torch.Generator().manual_seed(1))
    times = (found[:, None] == strangers).all(2).sum(0)
    assert found.shape == (12, 3)
    assert set(times.tolist()) <= {2, 3}
    assert np.all(times.numpy() > 0)
