"""LongCLIP on a small random checkpoint in its published layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders import longclip
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Encoder, Params
from tests.project import VIT, save_model, write_concepts
from tools.longclip import stretch_positions

CPU = torch.device("cpu")
CONFIG = {**VIT, "text_cfg": {**VIT["text_cfg"], "context_length": 77}}
# Start and end make 77 tokens of 75 words.
SHORT = "fin " * 75
LONG = "fin " * 100


def save_checkpoints(base: Path) -> Path:
    """A folder with: the configurations `tiny` and `tiny-quickgelu`, known to open_clip by name; `clip`, a random CLIP
    of 77 positions with QuickGELU; its `long.pt`, whose two tables differ as after training.
    """
    for name, settings in {"tiny": CONFIG, "tiny-quickgelu": {**CONFIG, "quick_gelu": True}}.items():
        (base / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(base)
    save_model(base / "clip", {**CONFIG, "quick_gelu": True})
    state = open_clip.create_model(f"local-dir:{base / 'clip'}").state_dict()
    generator = torch.Generator().manual_seed(1)
    state["positional_embedding"] = stretch_positions(state["positional_embedding"])
    state["positional_embedding_res"] = torch.randn(248, 16, generator=generator)
    torch.save(dict(state), base / "long.pt")
    return base


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("longclip"))


def load(pretrained: Path, model: str = "tiny", **settings: Any) -> LoadedEncoder:
    return load_encoder("mine", Encoder(model=model, pretrained=str(pretrained), batch_size=2, **settings), CPU)


@pytest.fixture(scope="module")
def encoder(checkpoints: Path) -> LoadedEncoder:
    return load(checkpoints / "long.pt")


@pytest.fixture(scope="module")
def clip(checkpoints: Path) -> LoadedEncoder:
    return load_encoder("mine", Encoder(model=f"local-dir:{checkpoints / 'clip'}", batch_size=2), CPU)


def rows_of(encoder: LoadedEncoder) -> Tensor:
    rows = encoder.model.positional_embedding
    assert isinstance(rows, Tensor)
    return rows


def test_each_table_counts_where_it_was_trained(checkpoints: Path, encoder: LoadedEncoder) -> None:
    state = torch.load(checkpoints / "long.pt", weights_only=True)
    rows = rows_of(encoder)
    assert rows.shape == (248, 16)
    assert torch.equal(rows[:20], state["positional_embedding"][:20])
    assert torch.equal(rows[20:], state["positional_embedding_res"][20:])
    for name, tensor in encoder.model.state_dict().items():
        assert name == "positional_embedding" or torch.equal(tensor, state[name])


def test_a_change_after_token_77_is_read(encoder: LoadedEncoder, clip: LoadedEncoder) -> None:
    assert clip.count_tokens(SHORT) == encoder.count_tokens(SHORT) == (77, False)
    assert clip.count_tokens(LONG) == (77, True)
    assert encoder.count_tokens(LONG) == (102, False)
    assert encoder.count_tokens("fin " * 246) == (248, False)
    assert encoder.count_tokens("fin " * 247) == (248, True)
    for pair, change in (([LONG + "fish", LONG + "tail"], True), (["fin " * 246 + word for word in "ab"], False)):
        assert torch.equal(*clip.embed_texts(pair))
        assert torch.equal(*encoder.embed_texts(pair)) != change


def test_both_towers_are_the_checkpoints_own(checkpoints: Path, encoder: LoadedEncoder, clip: LoadedEncoder) -> None:
    assert any(isinstance(part, QuickGELU) for part in encoder.model.visual.modules())
    assert any(isinstance(part, QuickGELU) for part in encoder.model.transformer.modules())
    assert encoder.preprocessing == clip.preprocessing
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for mine, same in zip(encoder.embed_images(pixels), clip.embed_images(pixels), strict=True):
        assert torch.equal(mine, same)
    # A text that ends before row 20 is read as before.
    assert torch.equal(encoder.embed_texts(["a fish"]), clip.embed_texts(["a fish"]))
    state = torch.load(checkpoints / "long.pt", weights_only=True)
    state["visual.proj"] = -state["visual.proj"]
    torch.save(state, checkpoints / "tuned.pt")
    torch.testing.assert_close(load(checkpoints / "tuned.pt").embed_images(pixels)[0], -encoder.embed_images(pixels)[0])


def test_the_name_of_the_model_and_the_path_do_not_matter(checkpoints: Path, encoder: LoadedEncoder) -> None:
    (checkpoints / "moved.ckpt").write_bytes((checkpoints / "long.pt").read_bytes())
    assert load(checkpoints / "moved.ckpt", "tiny-quickgelu").fingerprint == encoder.fingerprint
    half = load(checkpoints / "long.pt", precision="bf16")
    assert half.fingerprint != encoder.fingerprint
    low, full = half.embed_texts([LONG]), encoder.embed_texts([LONG])
    assert torch.nn.functional.cosine_similarity(low, full).min() > 0.99


def test_another_checkpoint_of_the_model_is_open_clips_to_load(checkpoints: Path, clip: LoadedEncoder) -> None:
    for suffix in ("pt", "npz"):
        torch.save(clip.model.state_dict(), checkpoints / f"plain.{suffix}")
    plain = load(checkpoints / "plain.pt", "tiny-quickgelu")
    assert plain.count_tokens(LONG) == (77, True)
    assert torch.equal(plain.embed_texts([SHORT]), clip.embed_texts([SHORT]))
    assert longclip.read_checkpoint(str(checkpoints / "plain.npz")) is None
    assert longclip.read_checkpoint("openai") is None


class Hostile:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_that_does_not_fit_is_one_line(checkpoints: Path, tmp_path: Path) -> None:
    def refuse(change: Callable[[dict[str, Any]], object], words: str, model: str = "tiny") -> None:
        state = torch.load(checkpoints / "long.pt", weights_only=True)
        change(state)
        torch.save(state, tmp_path / "broken.pt")
        with pytest.raises(UserError, match=words) as error:
            load(tmp_path / "broken.pt", model)
        assert str(error.value).startswith("params.yaml: encoders.mine: ")
        assert "\n" not in str(error.value)

    tables = r"broken\.pt: positional_embedding and positional_embedding_res are not two tables of one shape"
    refuse(lambda state: state.update(positional_embedding=torch.zeros(77, 16)), tables)
    refuse(lambda state: state.pop("positional_embedding"), tables)
    names = (longclip.FIRST_TABLE, longclip.SECOND_TABLE)
    refuse(lambda state: state.update({name: torch.zeros(20, 16) for name in names}), tables)
    refuse(lambda state: state.update({name: torch.zeros(248) for name in names}), tables)
    refuse(lambda state: state.pop("visual.proj"), r"Missing key\(s\) in state_dict: .visual\.proj")
    refuse(lambda state: state.update(more=torch.zeros(1)), r"Unexpected key\(s\) in state_dict: .more")
    refuse(lambda state: None, "cannot load .ViT-S-32-alt. .*Missing key", model="ViT-S-32-alt")
    refuse(lambda state: None, "cannot load 'coca_ViT-B-32'", model="coca_ViT-B-32")
    refuse(lambda state: state.update(more=Hostile(tmp_path / "taken")), "Weights only load failed")
    assert not (tmp_path / "taken").exists()


def test_its_texts_do_not_mix_with_another_towers_images(
    checkpoints: Path, dataset: list[str], set_params: Callable[..., Params], run_stage: Callable[..., None]
) -> None:
    own = {"model": "tiny", "pretrained": str(checkpoints / "long.pt"), "batch_size": 4}
    set_params(encoders={"mine": {"model": f"local-dir:{checkpoints / 'clip'}", "batch_size": 4}})
    write_concepts([("a photo of a tang", "a", "name"), (LONG, "a", "visual"), ("a fin", "b", "visual")])
    for name, schema in (("descriptions", "descriptions/1"), ("cells", "descriptions.cells/1")):
        path = f"data/descriptions/{name}.parquet"
        store.write_table(store.make_table(schema, []), path, schema, {"nodes": []}, "none")
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "mine")
    # The user names LongCLIP's checkpoint and embeds the texts alone.
    set_params(encoders={"mine": own})
    run_stage("embed_text", "--encoder", "mine")
    rows = store.read_table("data/embed/mine/text.parquet", "embed.text/1").to_pylist()
    assert {row["text"]: (row["n_tokens"], row["truncated"]) for row in rows}[LONG] == (102, False)
    with pytest.raises(UserError, match=r"mine/text\.parquet: is of another encoder than data/embed/mine/images; "):
        run_stage("select_concepts", "--encoder", "mine")
    assert not Path("data/bank/mine.parquet").exists()
    run_stage("embed_images", "--encoder", "mine")
    run_stage("select_concepts", "--encoder", "mine")
    assert Path("data/bank/mine.parquet").exists()


def test_another_size_has_other_positions_of_cells_and_the_same_texts(
    checkpoints: Path, encoder: LoadedEncoder
) -> None:
    large = load(checkpoints / "long.pt", image_size=48)
    own = encoder.model.visual.positional_embedding
    assert isinstance(own, Tensor)
    grid = own[1:].T.reshape(1, -1, 4, 4)
    wider = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(
        large.model.visual.positional_embedding, torch.cat([own[:1], wider.flatten(2)[0].T]), atol=1e-6, rtol=1e-5
    )
    assert large.embed_images(torch.randn(1, 3, 48, 48))[1].shape == (1, 6, 6, 16)
    assert torch.equal(large.embed_texts([LONG]), encoder.embed_texts([LONG]))
    assert large.fingerprint != encoder.fingerprint
    assert load(checkpoints / "long.pt", image_size=32).fingerprint == encoder.fingerprint


def test_its_image_tower_has_the_rules_for_cells_of_a_clip(checkpoints: Path) -> None:
    settings = Encoder(model=f"local-dir:{checkpoints / 'clip'}", batch_size=2, dense="neighbour")
    clip, plain = load_encoder("mine", settings, CPU), load(checkpoints / "long.pt")
    encoder = load(checkpoints / "long.pt", dense="neighbour")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(encoder.embed_images(pixels), clip.embed_images(pixels), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(encoder.embed_images(pixels)[0], plain.embed_images(pixels)[0])
    assert encoder.fingerprint != plain.fingerprint
