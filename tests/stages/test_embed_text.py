from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from stages import store
from stages.command import UserError
from stages.params import Params
from tests.stages.project import unit, write_concepts

LONG = "a fish with " + "many, many " * 10 + "bars"


def write_descriptions(texts: list[str]) -> None:
    rows = [{"image_id": f"{n}", "rank": 0, "text": text} for n, text in enumerate(texts)]
    path = "data/descriptions/descriptions.parquet"
    store.write_table(store.make_table("descriptions/1", rows), path, "descriptions/1", {}, "descriptions")


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
