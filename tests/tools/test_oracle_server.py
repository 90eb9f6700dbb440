"""The oracle is asked by the stage as it stands, tells the truth as often as it says, and is no language model."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import load_params
from fieldmark.reef.species import VOCABULARY, Species, load_species, phrases
from stages.ask import main as ask
from stages.describe_images import ANSWERS, CELLS, DESCRIPTIONS, main
from stages.generate_concepts import main as generate_concepts
from tests.fieldmark.llm.workspace import REPOSITORY, Workspace, answers
from tools.oracle_server import (
    RECORDINGS,
    Listener,
    Oracle,
    Picture,
    Refused,
    guesses_of,
    read_pictures,
    read_recordings,
    seen_in,
    sentences_of,
    shown_marks,
    told_marks,
    vernacular,
)

SPECIES = load_species(REPOSITORY / "data/demo/species.yaml")[:3]
EACH = 4
# Of the drawings' parts: the tail at the right, all else at the left; the cheek is not visible.
BOXES = {"tail": [0.6, 0.2, 0.9, 0.4], "body": [0.05, 0.05, 0.45, 0.45], "dorsal_fin": [0.1, 0.0, 0.4, 0.1],
         "cheek": [0.1, 0.3, 0.2, 0.4]}  # fmt: skip


def write_index(species: list[Species]) -> None:
    """A few pictures of each species, which tell nothing of it, and the truth about them."""
    rows = []
    for number, one in enumerate(one for one in species for _ in range(EACH)):
        path = Path("data/photos/train", f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (60, 90, 3), np.uint8)  # no cell is like another
        Image.fromarray(noise).save(path)
        image_id = store.sha256(path.read_bytes())
        rows.append(
            {
                "path": path.relative_to("data/photos").as_posix(),
                "image_id": image_id,
                "class_id": one.class_id,
                "split": "train",
                "status": "ok",
            }
        )
    marks = [
        {"class_id": one.class_id, "attribute": attribute, "value": value}
        for one in species
        for attribute, value in one.attributes.items()
    ]
    classes = [
        {"class_id": one.class_id, "name": one.name, "scientific_name": one.scientific_name, "from_images": True}
        for one in species
    ]
    parts = [
        {"path": row["path"], "part": part, "x": 0.5, "y": 0.5, "visible": part != "cheek", "box": box}
        for row in rows
        for part, box in BOXES.items()
    ]
    tables = {"images/1": rows, "attributes/1": marks, "classes/2": classes, "parts/1": parts}
    for named, found in tables.items():
        name, schema = named.partition("/")[0], f"index.{named}"
        store.write_table(store.make_table(schema, found), f"data/index/{name}.parquet", schema, {}, name)


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Workspace, Oracle]]:
    """A project of three species whose parameters name an oracle."""
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(monkeypatch, "http://127.0.0.1:1/v1")
    workspace.blocks["describe"] = {"enabled": True, "image_px": 300}
    workspace.write()
    write_index(SPECIES)
    RECORDINGS.parent.mkdir(parents=True)
    RECORDINGS.write_bytes((REPOSITORY / RECORDINGS).read_bytes())
    oracle = Oracle(read_pictures(load_params("params.yaml")), read_recordings())
    with Listener(oracle, 0) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        workspace.write(base_url=f"http://127.0.0.1:{listener.server_port}/v1", model="oracle-20")
        yield workspace, oracle
        listener.shutdown()


def descriptions() -> dict[str, list[str]]:
    """The sentences of each image."""
    said: dict[str, list[str]] = {}
    for row in store.read_table(DESCRIPTIONS, "descriptions/1").to_pylist():
        said.setdefault(row["image_id"], []).append(row["text"])
    return said


def test_the_stage_asks_it_and_keeps_that_it_was_an_oracle(workspace: tuple[Workspace, Oracle]) -> None:
    project, oracle = workspace
    project.run(main)
    assert oracle.calls == {"oracle-20": len(SPECIES) * EACH}
    rows = answers(str(ANSWERS))
    assert {(row["status"], row["source"], row["model_requested"], row["model_reported"]) for row in rows} == {
        ("ok", "live", "oracle-20", "oracle-20")
    }
    said = descriptions()
    assert said == {picture.image_id: sentences_of(picture, 0.2, None) for picture in oracle.pictures.values()}
    assert "12 calls to oracle-20" in oracle.count()


def test_of_a_cell_it_tells_what_can_be_seen_there(workspace: tuple[Workspace, Oracle]) -> None:
    project, oracle = workspace
    project.blocks["describe"]["nodes"] = [2]
    project.write(base_url=project.llm["base_url"], model="oracle-0")
    oracle.pictures = read_pictures(load_params("params.yaml"))
    assert len(oracle.pictures) == len(SPECIES) * EACH * 5
    project.run(main)
    said: dict[int, str] = {}
    for row in store.read_table(CELLS, "descriptions.cells/1").to_pylist():
        said[row["cell"]] = f"{said.get(row['cell'], '')} {row['text']}"
    assert set(said) == {1, 2}  # nothing of a fish is in the lower half
    assert "tail" not in said[1]
    assert "body" in said[1]
    assert "dorsal fin" in said[1]
    assert "tail" in said[2]
    assert "body" not in said[2]
    whole = next(one for one in oracle.pictures.values() if one.cell is None)
    cell = whole._replace(cell=(0.0, 0.0, 0.5, 0.5))
    for wrong in (0.0, 0.5):  # errors are those of the whole picture
        assert shown_marks(cell, wrong).items() <= told_marks(whole, wrong).items()
    assert sentences_of(cell._replace(cell=(0.5, 0.5, 1.0, 1.0)), 0.2, "named") == []


def test_it_guesses_among_the_listed_classes_and_gives_the_marks_as_reasons(
    workspace: tuple[Workspace, Oracle]
) -> None:
    project, oracle = workspace
    project.blocks["ask"] = {
        "guess": {"prompt": "prompts/guess.md", "links": "data/none", "count": 2, "image_px": 300},
        "small": {"prompt": "prompts/guess.md", "links": "data/none", "image_px": 64, "mask": False},
    }
    project.write()
    with pytest.raises(UserError, match=r"or the image_px of a question; start it again"):
        project.run(ask, "--ask", "small")
    oracle.pictures = read_pictures(load_params("params.yaml"))
    assert len(oracle.pictures) == 2 * len(SPECIES) * EACH
    wrong, by_id = 0, {picture.image_id: picture for picture in oracle.pictures.values()}
    for name, count in (("guess", 2), ("small", 3)):
        project.run(ask, "--ask", name)
        said: dict[str, dict[str, list[str]]] = {}
        for row in store.read_table(f"data/asked/{name}/texts.parquet", "asked/1").to_pylist():
            said.setdefault(row["subject_id"], {}).setdefault(row["field"], []).append(row["text"])
        assert said.keys() == by_id.keys()
        for image_id, fields in said.items():
            assert fields["reasons"] == sentences_of(by_id[image_id], 0.2, None)
            assert len(fields["guesses"]) == len(set(fields["guesses"])) == count
            wrong += fields["guesses"][0] != by_id[image_id].name
    assert 0 < wrong < 2 * len(by_id)
    assert oracle.calls == {"oracle-20": 2 * len(by_id)}


def test_so_many_first_guesses_are_wrong_and_further_ones_follow_from_the_first() -> None:
    every = load_species(REPOSITORY / "data/demo/species.yaml")
    known = {one.name: one.attributes for one in every}
    pictures = [Picture(str(n), one.class_id, one.name, one.attributes, {}) for n in range(400) for one in SPECIES]
    for share in (0.0, 0.2, 1.0):
        guessed = [(guesses_of(picture, share, known), picture) for picture in pictures]
        assert all(sorted(names) == sorted(known) for names, _ in guessed)
        wrong = [names[0] != picture.name for names, picture in guessed]
        assert abs(sum(wrong) / len(wrong) - share) < 0.02

    def shared(one: str, other: str) -> int:
        return sum(known[one][each] == value for each, value in known[other].items())

    for names, picture in guessed:  # all wrong
        first, *others = names
        assert shared(first, picture.name) == max(shared(name, picture.name) for name in known if name != picture.name)
        likeness = [shared(first, name) for name in others]
        assert likeness == sorted(likeness, reverse=True)
    # Of one picture and one first guess there is one list, whatever is true: rank tells nothing of who is.
    after: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    for picture in [Picture(str(n), one.class_id, one.name, one.attributes, {}) for n in range(20) for one in every]:
        for share in (0.0, 1.0):
            first, *others = guesses_of(picture, share, known)
            after.setdefault((picture.image_id, first), []).append((picture.name, others))
    for lists in after.values():
        assert all(others == lists[0][1] for _, others in lists)
    assert any(len({name for name, _ in lists}) > 1 for lists in after.values())


def test_a_part_is_seen_where_half_of_it_is_or_where_it_fills_half_the_cell() -> None:
    cell = (0.0, 0.0, 0.5, 0.5)
    assert seen_in(cell, (0.4, 0.0, 0.6, 0.5))  # half of it
    assert not seen_in(cell, (0.41, 0.0, 0.61, 0.5))
    assert seen_in(cell, (0.0, 0.25, 1.0, 1.0))  # fills half of the cell, and has most of itself elsewhere
    assert not seen_in(cell, (0.5, 0.5, 1.0, 1.0))


def test_names_are_masked_by_the_stage_and_invented_ones_are_not(workspace: tuple[Workspace, Oracle]) -> None:
    project, oracle = workspace
    said = {}
    for model in ("oracle-20", "oracle-20-named", "oracle-20-vernacular"):
        project.write(model=model)
        project.run(main)
        said[model] = descriptions()
    for picture in oracle.pictures.values():
        plain, named, invented = (sentences[picture.image_id] for sentences in said.values())
        assert named == ["A fish that is known as fish.", *plain]
        assert invented == [f"A fish that is known as {vernacular(picture.class_id)}.", *plain]
    assert oracle.calls == dict.fromkeys(said, len(SPECIES) * EACH)


def test_a_class_is_told_by_the_recordings(workspace: tuple[Workspace, Oracle]) -> None:
    project, _ = workspace
    project.blocks["concepts"] = {"prompt": "prompts/concepts.md"}
    project.write()
    project.run(generate_concepts)
    recorded = [json.loads(line) for line in RECORDINGS.read_text().splitlines()]
    expected = {record["class_id"]: record["response"] for record in recorded}
    for row in answers():
        assert json.loads(row["response_json"]) == expected[row["subject_id"]]


def test_so_many_marks_are_wrong_and_all_others_true() -> None:
    pictures = [Picture(str(n), one.class_id, one.name, one.attributes, {}) for n in range(400) for one in SPECIES]
    for share in (0.0, 0.2, 1.0):
        told = [(told_marks(picture, share), picture.marks) for picture in pictures]
        wrong = [said[attribute] != true[attribute] for said, true in told for attribute in VOCABULARY]
        assert abs(sum(wrong) / len(wrong) - share) < 0.01
        assert all(said[attribute] in VOCABULARY[attribute] for said, _ in told for attribute in VOCABULARY)
    told = [(told_marks(picture, 0.2), picture.marks) for picture in pictures]
    by_mark = [sum(said[attribute] != true[attribute] for said, true in told) for attribute in VOCABULARY]
    assert min(by_mark) > 0.15 * len(pictures)


def test_what_is_said_is_what_is_told_and_no_more() -> None:
    known = phrases()
    for one in SPECIES:
        picture = Picture("image", one.class_id, one.name, one.attributes, {})
        said = " ".join(sentences_of(picture, 0.0, None))
        for (attribute, value), phrase in known.items():
            assert (phrase in said) == (one.attributes[attribute] == value), phrase
        assert not any(word in said.lower() for word in (*one.name.lower().split(), vernacular(one.class_id).lower()))
        assert 1 <= len(sentences_of(picture, 0.0, None)) <= 3
    invented = {vernacular(one.class_id) for one in load_species(REPOSITORY / "data/demo/species.yaml")}
    assert len(invented) == 24


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"model": "gpt-4.1-mini", "messages": []}, r"this is an oracle, and no gpt-4\.1-mini; set llm\.model to one"),
        ({"model": "oracle-101"}, r"set llm\.model to one of oracle-PERCENT"),
        ({"model": "oracle-5", "messages": [{"content": "Who are you?"}]}, r"one picture or one class of reef"),
        (
            {"model": "oracle-5", "messages": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"not there when the oracle began, or describe\.image_px was another",
        ),
    ],
)
def test_what_it_does_not_know_is_refused(request_: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        Oracle({}, {}).answer(request_)


def test_another_model_s_name_is_refused_by_the_stage(workspace: tuple[Workspace, Oracle]) -> None:
    project, oracle = workspace
    project.write(model="gpt-4.1-mini", prices={})
    with pytest.raises(UserError, match=r"this is an oracle, and no gpt-4\.1-mini"):
        project.run(main)
    assert not oracle.calls


def test_it_knows_the_demo_alone(workspace: tuple[Workspace, Oracle]) -> None:
    rows = [{"class_id": "a", "attribute": "bill", "value": "hooked"}]
    table = store.make_table("index.attributes/1", rows)
    store.write_table(table, "data/index/attributes.parquet", "index.attributes/1", {}, "other")
    with pytest.raises(UserError, match=r"bill hooked is no field mark of reef.*dataset\.root: data/reef"):
        read_pictures(load_params("params.yaml"))
