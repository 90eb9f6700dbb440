"""What questions of one's own were answered, embedded: each text once, apart from all other texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import snapshot, unit

ASK = {"guess": {"prompt": "prompts/guess.md", "links": "data/none"}}


def write_asked(name: str, said: list[tuple[str, str]], guesses: str | None = "guesses", mark: str = "asked") -> None:
    """said: (field, text)."""
    rows = [{"subject_id": f"{n}", "sample": 0, "field": field, "rank": 0, "text": text} for n, (field, text) in
            enumerate(said)]  # fmt: skip
    made_by: dict[str, Any] = {"subject": "image", "guesses": guesses, "mask": True, "told": False}
    path = Path("data/asked", name, "texts.parquet")
    store.write_table(store.make_table("asked/1", rows), path, "asked/1", made_by, mark)


def read(encoder: str) -> list[dict[str, Any]]:
    path = f"data/asked/guess/vectors/{encoder}.parquet"
    rows: list[dict[str, Any]] = store.read_table(path, "embed.text/1").to_pylist()
    return rows


def test_each_text_once_as_every_encoder_embeds_it_but_guesses(
    set_params: Callable[..., Params], run_stage: Callable[..., None], models: dict[str, Path]
) -> None:
    set_params(ask=ASK)
    said = [("guesses", "Blue tang"), ("reasons", "a forked tail"), ("reasons", "bars"), ("more", "bars")]
    write_asked("guess", said)
    run_stage("embed_asked", "--ask", "guess")
    for name in ("conv", "vit"):
        rows = read(name)
        assert {(row["text"], row["kind"]) for row in rows} == {("a forked tail", "asked"), ("bars", "asked")}
        model = open_clip.create_model(f"local-dir:{models[name]}").eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{models[name]}")([row["text"] for row in rows])
        with torch.no_grad():
            expected = unit(model.encode_text(tokens).numpy())
        np.testing.assert_allclose(np.array([row["vector"] for row in rows], np.float32), expected, atol=1e-3)


def test_only_new_texts_are_embedded_and_an_encoder_that_is_gone_leaves_nothing(
    set_params: Callable[..., Params], run_stage: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    params = set_params(ask=ASK)
    write_asked("guess", [("reasons", "one"), ("reasons", "two")])
    run_stage("embed_asked", "--ask", "guess")
    assert "conv.parquet: 2 texts embedded, 0 kept" in capsys.readouterr().out
    before = snapshot(Path("data/asked/guess/vectors"))
    write_asked("guess", [("reasons", "two"), ("reasons", "three")], mark="edited")
    run_stage("embed_asked", "--ask", "guess")
    assert "conv.parquet: 1 texts embedded, 1 kept" in capsys.readouterr().out
    write_asked("guess", [("reasons", "one"), ("reasons", "two")])
    run_stage("embed_asked", "--ask", "guess")
    after = snapshot(Path("data/asked/guess/vectors"))
    assert {name: content for name, (content, _) in after.items()} == {name: each for name, (each, _) in before.items()}
    stray = Path("data/asked/guess/vectors/gone.parquet")
    stray.write_bytes(b"")
    run_stage("embed_asked", "--ask", "guess", "--dry-run")
    assert "conv.parquet: 0 texts to embed, 2 kept" in capsys.readouterr().out
    assert stray.exists()
    run_stage("embed_asked", "--ask", "guess")
    assert {path.stem for path in stray.parent.iterdir()} == set(params.encoders)


def test_a_question_that_nobody_asks_is_one_line(
    set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    set_params(ask=ASK)
    with pytest.raises(UserError, match=r"ask\.other: is not there; choose one of: guess"):
        run_stage("embed_asked", "--ask", "other")
    with pytest.raises(UserError, match=r"data/asked/guess/texts\.parquet: is missing; run the stage that writes it"):
        run_stage("embed_asked", "--ask", "guess")
