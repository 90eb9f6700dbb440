"""The untrained LongCLIP checkpoint: its positions, and that it is read as a published one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Encoder, Params
from tests.fieldmark.encoders.test_longclip import LONG, load, rows_of, save_checkpoints
from tools.longclip import stretch_positions


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("longclip"))


@pytest.fixture(scope="module")
def clip(checkpoints: Path) -> LoadedEncoder:
    settings = Encoder(model=f"local-dir:{checkpoints / 'clip'}", batch_size=2)
    return load_encoder("mine", settings, torch.device("cpu"))


def test_the_first_twenty_rows_stay_and_the_rest_become_four_times_as_many() -> None:
    before = torch.randn(77, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = stretch_positions(before)
    assert after.shape == (248, 8)
    assert torch.equal(after[:20], before[:20])
    for i in range(57):
        assert torch.equal(after[20 + 4 * i], before[20 + i])
    for i in range(56):
        for quarter in (1, 2, 3):
            expected = ((4 - quarter) * before[20 + i] + quarter * before[21 + i]) / 4
            torch.testing.assert_close(after[20 + 4 * i + quarter], expected)
    for quarter in (1, 2, 3):
        torch.testing.assert_close(after[244 + quarter], before[76] + quarter * (before[76] - before[75]) / 4)


@given(rows=st.integers(22, 90), start=st.floats(-9, 9), slope=st.floats(-9, 9))
def test_a_straight_line_stays_straight(rows: int, start: float, slope: float) -> None:
    places = torch.arange(rows, dtype=torch.float64)[:, None]
    after = stretch_positions(start + slope * places)
    assert len(after) == 4 * rows - 60
    expected = start + slope * (20 + torch.arange(len(after) - 20, dtype=torch.float64)[:, None] / 4)
    torch.testing.assert_close(after[20:], expected)


def test_the_untrained_start_is_written_in_the_published_layout(
    checkpoints: Path, clip: LoadedEncoder, set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    base = {"model": f"local-dir:{checkpoints / 'clip'}", "precision": "bf16"}
    set_params(encoders={"base": base})
    run_stage("tools.longclip", "--encoder", "base", "--out", "new/long.pt")
    state = torch.load("new/long.pt", weights_only=True)
    assert torch.equal(state["positional_embedding"], state["positional_embedding_res"])
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    encoder = load(Path("new/long.pt"))
    assert torch.equal(rows_of(encoder), stretch_positions(rows_of(clip)))
    assert encoder.count_tokens(LONG) == (102, False)
    assert torch.equal(encoder.embed_texts(["a fish"]), clip.embed_texts(["a fish"]))
    assert not list(Path("new").glob("*.part"))
    with pytest.raises(UserError, match=r"params\.yaml: encoders\.vit: is no CLIP with QuickGELU; "):
        run_stage("tools.longclip", "--encoder", "vit", "--out", "new/vit.pt")
    assert not Path("new/vit.pt").exists()
