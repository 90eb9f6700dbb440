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
from tests.project import unit, write_concepts

LONG = "a fish with " + "many, many " * 10 + "bars"


def write_descriptions(texts: list[str]) -> None:
    rows = [{"image_id": f"{n}", "rank": 0, "text": text} for n, text in enumerate(texts)]
    path = "data/descriptions/descriptions.parquet"
    store.write_table(store.make_table("descriptions/1", rows), path, "descriptions/1", {}, "descriptions")
    write_cells([])


def write_cells(texts: list[str], mark: str = "cells") -> None:
    """What was said of cells; where nothing was, no cell was asked about."""
    box = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
    rows = [{"image_id": f"{n}", "cell": 1, **box, "rank": 0, "text": text} for n, text in enumerate(texts)]
    path, schema = "data/descriptions/cells.parquet", "descriptions.cells/1"
    store.write_table(store.make_table(schema, rows), path, schema, {"nodes": [2] if texts else []}, mark)


@pytest.fixture
def texts(set_params: Callable[..., Params]) -> Params:
    write_concepts(
        [
            ("a photo of a tang", "tang", "name"),
            ("a forked tail", "tang", "visual"),
            ("a forked tail", "wrasse", "visual"),
            ("in reefs", None, "habitat"),
            ("blue-black", "tang", "dropped"),
            (LONG, "tang", "visual"),
        ]
    )
    write_descriptions(["a fish by a rock", "a forked tail", "a fish by a rock"])
    return set_params()


def read() -> list[dict[str, object]]:
    return store.read_table("data/embed/conv/text.parquet", "embed.text/1").to_pylist()


def test_each_text_once_as_open_clip_embeds_it(
    texts: Params, run_stage: Callable[..., None], models: dict[str, Path]
) -> None:
    run_stage("embed_text", "--encoder", "conv")
    rows = read()
    kinds = {row["text"]: row["kind"] for row in rows}
    assert len(rows) == 5
    assert kinds == {
        "a photo of a tang": "name",
        "a forked tail": "concept",
        "in reefs": "concept",
        LONG: "concept",
        "a fish by a rock": "description",
    }
    model = open_clip.create_model(f"local-dir:{models['conv']}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{models['conv']}")([row["text"] for row in rows])
    with torch.no_grad():
        expected = unit(model.encode_text(tokens).numpy())
    vectors = np.array([row["vector"] for row in rows], dtype=np.float32)
    np.testing.assert_allclose(vectors, expected, atol=1e-3)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=2e-3)
    for row, read_tokens in zip(rows, tokens, strict=True):
        assert row["text_id"] == store.sha256(str(row["text"]))
        assert row["truncated"] == (row["text"] == LONG)
        assert row["n_tokens"] == int((read_tokens != 0).sum())


def test_running_twice_gives_the_same_bytes(texts: Params, run_stage: Callable[..., None]) -> None:
    path = Path("data/embed/conv/text.parquet")
    run_stage("embed_text", "--encoder", "conv")
    first = path.read_bytes()
    path.unlink()
    run_stage("embed_text", "--encoder", "conv")
    assert path.read_bytes() == first
    header = store.read_header(path, "embed.text/1")
    assert header.params["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-4)


def test_only_texts_that_are_not_there_are_embedded(
    texts: Params,
    set_params: Callable[..., Params],
    run_stage: Callable[..., None],
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path("data/embed/conv/text.parquet")

    def run() -> str:
        capsys.readouterr()
        run_stage("embed_text", "--encoder", "conv")
        return capsys.readouterr().out

    assert run() == f"{path}: 5 texts embedded, 0 kept; 1 are cut\n"
    first = path.read_bytes()
    assert run() == f"{path}: 0 texts embedded, 5 kept; 1 are cut\n"
    assert path.read_bytes() == first
    # One concept less, which stays as a description, and two texts more.
    write_concepts([("a photo of a tang", "tang", "name"), ("a blue tail", "tang", "visual"), (LONG, "tang", "visual")])
    write_descriptions(["a fish by a rock", "a forked tail", "a fish on sand"])
    assert run() == f"{path}: 2 texts embedded, 4 kept; 1 are cut\n"
    kinds = {row["text"]: row["kind"] for row in read()}
    assert len(kinds) == 6
    assert kinds["a forked tail"] == "description"
    # As if it had been made at once.
    merged = path.read_bytes()
    path.unlink()
    assert run() == f"{path}: 6 texts embedded, 0 kept; 1 are cut\n"
    assert path.read_bytes() == merged
    set_params(encoders={"conv": {"model": f"local-dir:{models['vit']}", "batch_size": 4}})
    assert run() == f"{path}: 6 texts embedded, 0 kept; 1 are cut\n"
    path.write_bytes(merged[:-30])
    with pytest.raises(UserError, match=r"text\.parquet: is not readable Parquet"):
        run()


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(
    texts: Params, run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("data/embed/conv/text.parquet")
    run_stage("embed_text", "--encoder", "conv", "--dry-run")
    head, rate, size = capsys.readouterr().out.splitlines()
    assert not path.exists()
    assert head == f"{path}: 5 texts to embed, 0 kept"
    assert re.fullmatch(r"time: about 0:00:\d\d \(\d+\.\d texts/s on cpu, measured with 5 of them\)", rate)
    assert re.fullmatch(r"on disk: about 0\.\d\d MB", size)
    run_stage("embed_text", "--encoder", "conv")
    before = path.read_bytes()
    capsys.readouterr()
    run_stage("embed_text", "--encoder", "conv", "--dry-run")
    assert capsys.readouterr().out == f"{path}: 0 texts to embed, 5 kept\n"
    assert path.read_bytes() == before


def test_what_cannot_be_is_one_line(
    texts: Params, set_params: Callable[..., Params], run_stage: Callable[..., None], models: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=r"encoders\.reef: "):
        run_stage("embed_text", "--encoder", "reef")
    write_concepts([("blue-black", "tang", "dropped")])
    write_descriptions([])
    with pytest.raises(UserError, match="no text was kept"):
        run_stage("embed_text", "--encoder", "conv")
    Path("data/concepts/concepts.parquet").unlink()
    with pytest.raises(UserError, match=r"concepts\.parquet: is missing"):
        run_stage("embed_text", "--encoder", "conv")


def test_what_is_said_of_cells_is_embedded_and_without_cells_nothing_changes(
    texts: Params, run_stage: Callable[..., None]
) -> None:
    run_stage("embed_text", "--encoder", "vit")
    path = Path("data/embed/vit/text.parquet")
    before = path.read_bytes()
    write_cells([], mark="made by another version, and empty all the same")
    run_stage("embed_text", "--encoder", "vit")
    assert path.read_bytes() == before
    write_cells(["a fish with a torn fin"])
    run_stage("embed_text", "--encoder", "vit")
    rows = store.read_table(path, "embed.text/1").to_pylist()
    assert [row["kind"] for row in rows if row["text"] == "a fish with a torn fin"] == ["description"]
    mark = store.read_header(path, "embed.text/1").fingerprint
    write_cells(["a fish with a torn fin"], mark="another")
    run_stage("embed_text", "--encoder", "vit")
    assert store.read_header(path, "embed.text/1").fingerprint != mark
