"""describe_images against a counting server: what leaves this machine, what comes back, what is masked."""

import base64
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.answers import summarise
from fieldmark.llm.journal import journal_path
from fieldmark.llm.pictures import JPEG_QUALITY, data_url
from fieldmark.pictures.cuts import Place
from fieldmark.pictures.decode import BadImage
from stages.describe_images import ANSWERS, CELLS, DESCRIPTIONS, METRICS, main
from tests.fieldmark.llm.workspace import KEY, Row, Workspace, answers
from tests.openai_server import OpenAIServer, content, refusal
from tests.training.cache import with_vectors


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    workspace.blocks["describe"] = {"enabled": True, "image_px": 300}
    workspace.write()
    workspace.write_classes("Secret bandit", "Ray", scientific_name="Latro secretus")
    return workspace


def descriptions() -> list[Row]:
    rows: list[Row] = store.read_table(DESCRIPTIONS, "descriptions/1").to_pylist()
    return rows


def picture(call: dict[str, Any]) -> Image.Image:
    url = call["messages"][-1]["content"][1]["image_url"]["url"]
    head, _, payload = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(payload)))


def test_an_image_is_asked_about_once_without_its_label(server: OpenAIServer, workspace: Workspace) -> None:
    images = workspace.write_images(3)
    workspace.run(main)
    before = ANSWERS.read_bytes(), DESCRIPTIONS.read_bytes()
    workspace.run(main)
    assert len(server.calls) == 3
    assert (ANSWERS.read_bytes(), DESCRIPTIONS.read_bytes()) == before
    for call in server.calls:
        sent = json.dumps(call).lower()
        assert not [word for word in ("secret", "bandit", "latro", ".png", "train") if word in sent]
        assert picture(call).size == (300, 200)
        assert not picture(call).info.get("exif")
    assert [row["subject_id"] for row in answers(str(ANSWERS))] == sorted(row["image_id"] for row in images)
    assert [row["rank"] for row in descriptions()] == [0, 1] * 3


def test_another_size_of_picture_is_another_question(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.run(main)
    workspace.blocks["describe"]["image_px"] = 200
    workspace.write()
    workspace.run(main)
    assert [picture(call).width for call in server.calls] == [300, 200]


def test_class_names_in_answers_are_masked_and_counted(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_images(1)
    sentences = ["A  secret-bandit (Latro secretus) beside a ray. ", " ", "Its tray is grey."]
    server.script.append(content(json.dumps({"sentences": sentences})))
    workspace.run(main)
    assert [row["text"] for row in descriptions()] == ["A fish (fish) beside a fish.", "Its tray is grey."]
    assert "3 names of classes" in capsys.readouterr().err
    assert json.loads(answers(str(ANSWERS))[0]["response_json"])["sentences"] == sentences


def write_vectors(images: list[Row], folder: str = "data/embed/toy/images", mark: str = "toy") -> None:
    """Vectors of pictures in two clusters, and of a part of each, which is not looked at."""
    rng = np.random.default_rng(0)
    rows = [
        {
            **{"image_id": row["image_id"], "view": view, "node": node, "kind": "grid" if node else "global"},
            **{"x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 1.0, "flip": False, "norm": 1.0},
            "vector": np.eye(4)[place % 2] + 0.1 * rng.standard_normal(4) if not node and not view else 9 * np.ones(4),
        }
        for place, row in enumerate(images)
        for view, node in ((0, 0), (0, 1), (1, 0))
    ]
    for bucket, ids in enumerate(store.split_buckets([row["image_id"] for row in images], 16)):
        table = with_vectors("embed.nodes/1", [row for row in rows if row["image_id"] in ids], 4)
        store.write_table(table, store.bucket_path(folder, bucket), "embed.nodes/1", {}, mark)


def test_a_share_describes_the_most_informative_pictures_and_more_of_it_pays_for_the_new_ones(
    server: OpenAIServer, workspace: Workspace
) -> None:
    images = workspace.write_images(20)
    write_vectors(images)
    workspace.run(main)  # before there was a share
    keys = {row["subject_id"]: row["item_key"] for row in answers(str(ANSWERS))}
    whole = store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint
    assert len(server.calls) == 20
    ANSWERS.unlink()
    journal_path("describe_images").unlink()
    said: set[str] = set()
    for share, count, calls in ((0.1, 2, 2), (0.5, 10, 8), (0.1, 2, 0), (1.0, 20, 10)):
        server.calls.clear()
        workspace.blocks["describe"] |= {"share": share, "by": "data/embed/toy/images"}
        workspace.write()
        workspace.run(main)
        rows = answers(str(ANSWERS))
        assert (len(rows), len(server.calls)) == (count, calls)
        assert {row["subject_id"]: row["item_key"] for row in rows}.items() <= keys.items()
        described = {row["image_id"] for row in descriptions()}
        assert described == {row["subject_id"] for row in rows}
        assert said <= described or described <= said
        said = described
        if share < 1:  # both clusters have ten pictures
            place = {row["image_id"]: number % 2 for number, row in enumerate(images)}
            assert sum(place[image_id] for image_id in described) == count // 2
    assert store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint == whole


def test_cells_are_those_of_the_pictures_that_are_described(server: OpenAIServer, workspace: Workspace) -> None:
    write_vectors(workspace.write_images(10))
    workspace.blocks["describe"] |= {"share": 0.2, "by": "data/embed/toy/images", "nodes": [2]}
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 2 + 2 * 4
    cells = store.read_table(CELLS, "descriptions.cells/1").to_pylist()
    assert {row["image_id"] for row in cells} == {row["image_id"] for row in descriptions()}


def test_what_is_chosen_follows_the_vectors_and_those_have_to_be_there(
    server: OpenAIServer, workspace: Workspace
) -> None:
    images = workspace.write_images(10)
    workspace.blocks["describe"] |= {"share": 0.2, "by": "data/embed/toy/images"}
    workspace.write()
    with pytest.raises(UserError, match=r"data/embed/toy/images/b000\.parquet: is missing; run the stage"):
        workspace.run(main)
    write_vectors(images[:-1])
    with pytest.raises(UserError, match=r"data/embed/toy/images: lacks 1 of 10 pictures; run embed_images again"):
        workspace.run(main)
    assert server.calls == []
    write_vectors(images)
    workspace.run(main)
    marks = [store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint]
    write_vectors(images, mark="another encoder")
    workspace.run(main)
    marks.append(store.read_header(DESCRIPTIONS, "descriptions/1").fingerprint)
    assert marks[0] != marks[1]
    assert len(server.calls) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.5}, r"describe\.by: a share of 0\.5 needs vectors .* data/embed/toy/images, or describe\.share"),
        ({"share": 0.5, "by": "data/embed/other/images"}, r"describe\.by: 'data/embed/other/images' is no vectors"),
        ({"share": 0.0}, r"describe\.share: input should be greater than 0"),
    ],
)
def test_a_share_needs_vectors_of_an_encoder(workspace: Workspace, values: dict[str, Any], message: str) -> None:
    workspace.blocks["describe"] |= values
    workspace.write()
    with pytest.raises(UserError, match=message):
        workspace.run(main)


def test_switched_off_it_writes_empty_tables_and_asks_nobody(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(2)
    workspace.run(main)
    before = ANSWERS.read_bytes()
    journal_path("describe_images").unlink()
    workspace.blocks["describe"]["enabled"] = False
    workspace.write()
    workspace.monkeypatch.delenv("FIELDMARK_TEST_KEY")
    for mode in ("live", "import", "replay"):
        workspace.write(mode=mode)
        workspace.run(main)
        assert answers(str(ANSWERS)) == []
        assert descriptions() == []
        assert json.loads(METRICS.read_text()) == summarise([])
    # Even answers that only the old table held come back for nothing.
    workspace.blocks["describe"]["enabled"] = True
    workspace.write(mode="live")
    workspace.run(main)
    assert len(server.calls) == 2
    assert ANSWERS.read_bytes() == before


def test_a_run_ends_with_what_it_did_and_leaves_metrics_of_all_rows(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    images = workspace.write_images(3)
    Path("data/photos", images[0]["path"]).write_bytes(b"no picture")
    workspace.write(min_coverage=0.0)
    workspace.run(main)
    assert "describe_images: asked 2, cached 0, spent $0.0004, failed: 1 error\n" in capsys.readouterr().err
    metrics = METRICS.read_bytes()
    assert json.loads(metrics) == summarise(answers(str(ANSWERS)))
    assert json.loads(metrics)["status"] == {"error": 1, "ok": 2}
    workspace.run(main)
    assert "describe_images: asked 0, cached 2, spent $0.0000, failed: 1 error\n" in capsys.readouterr().err
    assert METRICS.read_bytes() == metrics


def test_descriptions_cannot_be_imported(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.write(mode="import")
    with pytest.raises(UserError, match=r"^params\.yaml: describe\.enabled: descriptions cannot be imported yet;"):
        workspace.run(main)
    assert server.calls == []
    assert not ANSWERS.exists()


def test_a_picture_gone_bad_is_a_row_and_the_run_goes_on(server: OpenAIServer, workspace: Workspace) -> None:
    images = workspace.write_images(3)
    Path("data/photos", images[0]["path"]).write_bytes(b"no picture")
    Path("data/photos", images[1]["path"]).unlink()
    with pytest.raises(UserError, match=r"1 of 3 answered.*\(error\)"):
        workspace.run(main)
    assert len(server.calls) == 1
    assert sorted(row["status"] for row in answers(str(ANSWERS))) == ["error", "error", "ok"]


def test_a_refused_image_is_named_by_its_path(server: OpenAIServer, workspace: Workspace) -> None:
    [image] = workspace.write_images(1)
    server.script.append(refusal("no"))
    with pytest.raises(UserError) as caught:
        workspace.run(main)
    assert f"data/photos/{image['path']} (refused)" in str(caught.value)
    assert descriptions() == []


def test_a_dry_run_asks_nobody(server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    workspace.write_images(4)
    workspace.run(main, "--dry-run")
    assert "4 items, 0 cached, 4 calls to tiny" in capsys.readouterr().out
    workspace.blocks["describe"]["enabled"] = False
    workspace.write()
    workspace.run(main, "--dry-run")
    assert "0 items, 0 calls" in capsys.readouterr().out
    assert server.calls == []
    assert not ANSWERS.exists()


def test_recordings_answer_for_images_too(server: OpenAIServer, workspace: Workspace) -> None:
    [image] = workspace.write_images(1)
    Path("recordings").mkdir()
    record = {
        "prompt": "describe",
        "prompt_sha": store.sha256(Path("prompts/describe.md").read_bytes()),
        "image_id": image["image_id"],
        "sample": 0,
        "model": "authored",
        "created_at": "2026-11-21T00:00:00Z",
        "response": {"sentences": ["a fish"]},
    }
    Path("recordings/describe.jsonl").write_text(json.dumps(record))
    workspace.write(mode="replay", recordings="recordings")
    workspace.run(main)
    assert descriptions() == [{"image_id": image["image_id"], "rank": 0, "text": "a fish"}]
    assert server.calls == []


def test_listed_answers_that_are_not_here_are_not_paid_again(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    Path("dvc.lock").write_text("stages: {describe_images: {outs: [{path: data/descriptions/answers.parquet}]}}")
    with pytest.raises(UserError, match=r"`dvc pull data/descriptions/answers\.parquet`"):
        workspace.run(main)
    assert server.calls == []


def test_no_encoded_picture_outlives_its_call(workspace: Workspace, server: OpenAIServer) -> None:
    server.calls = Forgetful()
    workspace.write(concurrency=2)
    peaks, size = [], 0
    for count in (8, 32):
        for row in workspace.write_images(count):
            # Noise hardly compresses: what is held shows.
            path = Path("data/photos", row["path"])
            Image.effect_noise((300 + count, 300), 100).save(path)
            size = len(data_url(Place(path), 300, JPEG_QUALITY))
        workspace.blocks["describe"] = {"enabled": True, "image_px": 300 + count}
        workspace.write()
        tracemalloc.start()
        workspace.run(main)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < (32 - 8) * size / 4


class Forgetful(list[dict[str, Any]]):
    def append(self, call: dict[str, Any]) -> None:
        pass


def test_a_data_url_is_upright_and_never_enlarged(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    payload = base64.b64decode(data_url(Place(tmp_path / "turned.jpg"), 512, 90).partition(",")[2])
    assert Image.open(io.BytesIO(payload)).size == (40, 100)
    with pytest.raises(BadImage):
        data_url(Place(tmp_path / "none.jpg"), 512, 90)


def test_no_key_is_stored(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.run(main)
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_nothing_is_priced_or_asked_of_the_former_data_set(
    server: OpenAIServer, workspace: Workspace, arguments: list[str]
) -> None:
    workspace.write_images(1)
    workspace.lock_index("data/reef", "images")
    with pytest.raises(UserError, match=r"data/index: is of dataset\.root data/reef, and params\.yaml says data/ph"):
        workspace.run(main, *arguments)
    assert not server.calls


def cells() -> list[Row]:
    rows: list[Row] = store.read_table(CELLS, "descriptions.cells/1").to_pylist()
    return rows


def test_cells_are_asked_about_beside_pictures_which_stay_as_they_are(
    server: OpenAIServer, workspace: Workspace
) -> None:
    images = workspace.write_images(2)
    workspace.run(main)
    before, described = answers(str(ANSWERS)), DESCRIPTIONS.read_bytes()
    assert cells() == []
    workspace.blocks["describe"]["nodes"] = [2]
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 2 + 2 * 4  # no picture is asked about again
    assert DESCRIPTIONS.read_bytes() == described
    after = answers(str(ANSWERS))
    assert [row for row in after if "#" not in row["subject_id"]] == before
    boxes = ["0,0,0.5,0.5", "0.5,0,1,0.5", "0,0.5,0.5,1", "0.5,0.5,1,1"]
    ids = sorted(row["image_id"] for row in images)
    asked = {row["subject_id"]: row["item_key"] for row in after if "#" in row["subject_id"]}
    assert sorted(asked) == sorted(f"{image_id}#{box}" for image_id in ids for box in boxes)
    assert len(set(asked.values())) == 8
    found = [(row["image_id"], row["cell"], row["rank"]) for row in cells()]
    assert found == [(image_id, cell, rank) for image_id in ids for cell in (1, 2, 3, 4) for rank in (0, 1)]
    assert [cells()[4][side] for side in ("x0", "y0", "x1", "y1")] == [0, 0.5, 0.5, 1]
    # Other cells beside these: these are held.
    workspace.blocks["describe"]["nodes"] = [3, 2]
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 10 + 2 * 9
    third = next(row for row in cells() if row["cell"] == 5)
    assert [round(third[side], 4) for side in ("x0", "y0", "x1", "y1")] == [0.3333, 0.3333, 0.6667, 0.6667]
    workspace.blocks["describe"]["nodes"] = []
    workspace.write()
    workspace.run(main)
    assert len(server.calls) == 10 + 2 * 9
    assert answers(str(ANSWERS)) == before
    assert cells() == []


def test_a_cell_is_sent_as_the_piece_that_it_is_at_full_sharpness(server: OpenAIServer, workspace: Workspace) -> None:
    [row] = workspace.write_images(1)
    path = Path("data/photos", row["path"])
    image = Image.new("RGB", (901, 600), "red")
    image.paste("blue", (450, 300, 901, 600))
    image.save(path)
    workspace.blocks["describe"]["nodes"] = [2]
    workspace.write()
    workspace.run(main)
    pieces = [picture(call) for call in server.calls if "piece" in call["messages"][-1]["content"][0]["text"]]
    assert sorted(piece.size for piece in pieces) == [(300, 200)] * 4  # px holds for a piece too
    colours = sorted(piece.getpixel((150, 100)) for piece in pieces)  # type: ignore[type-var]
    assert [max(range(3), key=lambda channel: colour[channel]) for colour in colours] == [2, 0, 0, 0]  # type: ignore[index]
    sent = json.dumps(server.calls).lower()
    assert not [word for word in ("secret", "bandit", "latro", ".png") if word in sent]


def test_a_cell_that_shows_nothing_is_an_answer_and_no_row(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.run(main)
    workspace.blocks["describe"]["nodes"] = [2]
    workspace.write(concurrency=1)
    server.script += [content(json.dumps({"sentences": said})) for said in ([], ["A secret bandit."], [], [])]
    workspace.run(main)
    assert [(row["cell"], row["text"]) for row in cells()] == [(2, "A fish.")]
    assert [row["status"] for row in answers(str(ANSWERS))] == ["ok"] * 5


def test_cells_count_in_the_price_and_the_limit(
    server: OpenAIServer, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write_images(2)
    workspace.blocks["describe"]["nodes"] = [3]
    workspace.write(max_calls=19)
    workspace.run(main, "--dry-run")
    said = capsys.readouterr().out
    assert "prompts/describe_cell.md: 18 items, 0 cached, 18 calls" in said
    assert "in sum: 20 items, 0 cached, 20 calls" in said
    with pytest.raises(UserError, match=r"llm\.max_calls"):
        workspace.run(main)
    assert server.calls == []


def test_a_cell_without_an_answer_is_named(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.run(main)
    workspace.blocks["describe"]["nodes"] = [2]
    workspace.write(concurrency=1, min_coverage=1.0)
    server.script.append(refusal("no"))
    with pytest.raises(UserError, match=r"0\.png at 0,0,0\.5,0\.5"):
        workspace.run(main)


def test_cells_do_not_stand_in_for_pictures_that_have_no_answer(server: OpenAIServer, workspace: Workspace) -> None:
    workspace.write_images(1)
    workspace.blocks["describe"]["nodes"] = [2]
    workspace.write(concurrency=1, min_coverage=0.7)
    server.script.append(refusal("no"))
    with pytest.raises(UserError, match=r"0 of 1 answered"):
        workspace.run(main)
    assert sum(row["status"] == "ok" for row in answers(str(ANSWERS))) == 4
