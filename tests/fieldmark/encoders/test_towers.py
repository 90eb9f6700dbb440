"""Image-only encoders on small random models: timm's own configurations of them with fewer, narrower layers."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import SwinTransformer, register_model, save_for_hf
from torch import Tensor, nn

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.layers import choose_layers, hidden_states
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.towers import LoadedTower, load_tower
from fieldmark.encoders.towers.timm import tower_features, translate_config
from fieldmark.params import Encoder, Params, Tower
from fieldmark.pictures.boxes import visible_box
from tests.checkout import checkout, command, commit, edit_params
from tests.project import draw
from tools.preflight import named_paths

CPU = torch.device("cpu")
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
# Our name: timm's name of the model, pixels and cells a side, length of a vector, and what is made smaller.
FAMILIES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_dinov2", 56, 4, 32, VIT),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", 56, 4, 32, VIT),
    "resnet": ("resnet50", 64, 2, 128, {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32), "stem_width": 8}),
    "swin": ("swin_tiny_patch4_window7_224", 64, 2, 64, SWIN),
    "convnext": ("convnext_tiny", 64, 2, 32, CONVNEXT),
    "vit_map": ("vit_base_patch16_siglip_224", 64, 4, 32, VIT),
    "vit_average": ("vit_medium_patch16_gap_256", 64, 4, 32, VIT),
}
# Where register_model looks for what timm knows of a model.
default_cfgs: dict[str, dict[str, Any]] = {}


def register_small(name: str) -> None:
    """Make a family's small model known to timm as small_NAME, with the configuration of the large one."""
    original, side, _, _, sizes = FAMILIES[name]

    def create(pretrained_cfg_overlay: dict[str, Any] | None = None, **arguments: Any) -> nn.Module:
        overlay = {"input_size": (3, side, side)} | (pretrained_cfg_overlay or {})
        return timm.create_model(original, pretrained_cfg_overlay=overlay, **sizes, **arguments)

    create.__name__ = f"small_{name}"
    cfg = timm.get_pretrained_cfg(original)
    assert cfg is not None
    default_cfgs[create.__name__] = dataclasses.asdict(cfg) | {"input_size": (3, side, side)}
    if not timm.is_model(create.__name__):
        register_model(create)


def save_small(path: Path, name: str, seed: int = 0) -> Path:
    """A checkpoint of a family's small model with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(f"small_{name}")
        for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
            # Statistics of real activations: without them they fade on the way to the last map.
            norm.momentum = None
            nn.init.ones_(norm.weight)
        with torch.no_grad():
            model.train()(draw_noise(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return path


def draw_noise(name: str) -> Tensor:
    """Three pictures of a family's size."""
    side = FAMILIES[name][1]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def load(name: str, file: Path, **settings: Any) -> LoadedTower:
    return load_tower("mine", Tower(model=f"small_{name}", pretrained=str(file), **{"batch_size": 3} | settings), CPU)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    for name in FAMILIES:
        register_small(name)
    return {name: save_small(folder / f"{name}.safetensors", name) for name in FAMILIES}


@pytest.fixture(scope="module")
def towers(files: dict[str, Path]) -> dict[str, LoadedTower]:
    return {name: load(name, file) for name, file in files.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_global_row_is_timms_own(name: str, towers: dict[str, LoadedTower], files: dict[str, Path]) -> None:
    tower, pixels = towers[name], draw_noise(name)
    _, _, grid, dimension, _ = FAMILIES[name]
    pooled, tokens = tower.embed_images(pixels)
    # Built anew, with its classifier, and called as timm's users do.
    own: Any = timm.create_model(f"small_{name}", checkpoint_path=str(files[name])).eval()
    with torch.inference_mode():
        before_classes = own.forward_head(own.forward_features(pixels), pre_logits=True)
        own.reset_classifier(0)
        torch.testing.assert_close(pooled, before_classes, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pooled, own(pixels), atol=1e-4, rtol=1e-4)
    assert pooled.dtype == tokens.dtype == torch.float32
    assert pooled.shape == (3, tower.dimension) == (3, dimension)
    assert tokens.shape == (3, grid, grid, dimension)
    directions = nn.functional.normalize(tokens, dim=-1)
    assert directions.std(dim=(1, 2)).amax(dim=-1).min() > 1e-3
    # Neighbours in the batch change nothing.
    assert torch.equal(tower.embed_images(pixels[[2, 0]])[0], pooled[[2, 0]])
    assert torch.equal(tower.embed_images(pixels[[2, 0]])[1], tokens[[2, 0]])


def change_features(model: Any, grid: int, change: Callable[[Tensor], Tensor]) -> None:
    """Put the feature map (n, h, w, C) through `change` before it is pooled; prefix tokens become its last cell."""
    features = model.forward_features

    def change_map(found: Tensor) -> Tensor:
        if found.ndim == 3:
            prefix = found.shape[1] - grid**2
            cells = change(found[:, prefix:].unflatten(1, (grid, grid)))
            return torch.cat([cells[:, -1, -1:].expand(-1, prefix, -1), cells.flatten(1, 2)], dim=1)
        if isinstance(model, SwinTransformer):
            return change(found)
        return change(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    model.forward_features = lambda pixels: change_map(features(pixels))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_map_of_equal_cells_has_tokens_equal_to_the_global_row(name: str, towers: dict[str, LoadedTower]) -> None:
    model: Any = copy.deepcopy(towers[name].model)
    change_features(model, FAMILIES[name][2], lambda cells: cells[:, -1:, -1:].expand_as(cells))
    pooled, tokens = tower_features(model, draw_noise(name), "mine")
    assert (pooled[0] - pooled[1]).abs().max() > 1e-3
    torch.testing.assert_close(tokens, pooled[:, None, None].expand_as(tokens), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(tokens[:, 0, 0], towers[name].embed_images(draw_noise(name))[1][:, -1, -1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_of_the_map_changes_its_own_token_alone(name: str, towers: dict[str, LoadedTower]) -> None:
    model: Any = copy.deepcopy(towers[name].model)
    grid = FAMILIES[name][2]
    count = grid**2
    # One picture many times; its n-th copy is changed in cell n.
    pixels = draw_noise(name)[:1].expand(count, -1, -1, -1)
    _, before = tower_features(model, pixels, "mine")

    def change(cells: Tensor) -> Tensor:
        step = torch.randn(cells.shape[-1], generator=torch.Generator().manual_seed(1)) * cells.abs().max()
        return cells + torch.eye(count).reshape(count, grid, grid, 1) * step

    change_features(model, grid, change)
    _, after = tower_features(model, pixels, "mine")
    moved = (after - before).norm(dim=-1)
    assert (moved > 1e-3 * moved.max()).nonzero().tolist() == [[n, *divmod(n, grid)] for n in range(count)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_follow_a_bright_square_through_the_picture(name: str, towers: dict[str, LoadedTower]) -> None:
    model: Any = copy.deepcopy(towers[name].model)
    _, side, grid, _, _ = FAMILIES[name]
    with torch.no_grad():
        for part, weight in model.named_parameters():
            # Blocks without attention: a patch changes its own token and no other.
            if re.search(r"blocks\.\d+\.attn\.proj\.weight", part):
                weight.zero_()
    squares = torch.eye(grid**2).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1)
    squares = nn.functional.interpolate(squares, size=side)
    # On one picture: a black one has no variance, which norms blow up.
    picture = draw_noise(name)[:1].expand_as(squares)
    _, before = tower_features(model, picture, "mine")
    _, after = tower_features(model, picture + squares, "mine")
    moved = (after - before).norm(dim=-1)
    if name.startswith(("dinov2", "vit", "convnext")):
        assert (moved > 1e-3 * moved.max()).nonzero().tolist() == [[n, *divmod(n, grid)] for n in range(grid**2)]
    # Convolutions and windows reach further: the centre of what moves goes down and right as the square does.
    shares = (moved / moved.sum(dim=(1, 2), keepdim=True)).unflatten(0, (grid, grid))
    down = (shares.sum(dim=3) * torch.arange(grid)).sum(dim=2)
    right = (shares.sum(dim=2) * torch.arange(grid)).sum(dim=2)
    assert (down.diff(dim=0) > 0.01).all()
    assert (right.diff(dim=1) > 0.01).all()


def test_tokens_are_what_timm_gives_patches(towers: dict[str, LoadedTower]) -> None:
    for name, prefix in (("dinov2", 1), ("dinov2_registers", 5)):
        tower: Any = towers[name]
        features = tower.model.forward_features(draw_noise(name))
        pooled, tokens = tower.embed_images(draw_noise(name))
        torch.testing.assert_close(features[:, 0], pooled, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(features[:, prefix:], tokens.flatten(1, 2), atol=1e-5, rtol=1e-4)
    for name in ("resnet", "swin"):
        pooled, tokens = towers[name].embed_images(draw_noise(name))
        torch.testing.assert_close(tokens.mean(dim=(1, 2)), pooled, atol=1e-5, rtol=1e-4)


def test_the_stages_of_a_swin_are_at_hand(towers: dict[str, LoadedTower]) -> None:
    tower: Any = towers["swin"]
    final, stages = tower.model.forward_intermediates(draw_noise("swin"))
    assert [tuple(stage.shape[1:]) for stage in stages] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    torch.testing.assert_close(final.mean(dim=(1, 2)), tower.embed_images(draw_noise("swin"))[0], atol=1e-5, rtol=1e-4)


def test_a_fingerprint_is_of_what_changes_vectors(
    towers: dict[str, LoadedTower], files: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    resnet = towers["resnet"]
    others = [
        *towers.values(),
        load("resnet", save_small(tmp_path / "other.safetensors", "resnet", seed=1)),
        load("resnet", files["resnet"], precision="bf16"),
        load("resnet", files["resnet"], image_size=96),
        load_encoder("mine", Encoder(model=f"local-dir:{models['conv']}"), CPU),
    ]
    assert len({other.fingerprint for other in others}) == len(others)
    moved = tmp_path / "moved.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in resnet.model.state_dict().items()}}, moved)
    again = load("resnet", moved, batch_size=5)
    assert again.fingerprint == resnet.fingerprint
    pixels = draw_noise("resnet")
    torch.testing.assert_close(again.embed_images(pixels)[0], resnet.embed_images(pixels)[0])


def save_folder(folder: Path, name: str, seed: int = 0) -> nn.Module:
    """A family's small model, with a classifier, as timm saves it: under the name of the large one."""
    original, side, _, _, sizes = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(original, img_size=side, num_classes=5, **sizes).eval()
    seen = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.3), "crop_pct": 1.0, "input_size": (3, side, side)}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=seen)
    return model


@pytest.mark.parametrize("name", ["dinov2", "swin"])
def test_a_folder_that_timm_saved_is_loaded_as_it_is(name: str, tmp_path: Path) -> None:
    saved: Any = save_folder(tmp_path / "model", name)
    settings = Tower(model=f"local-dir:{tmp_path}/model", batch_size=3)
    tower, pixels = load_tower("mine", settings, CPU), draw_noise(name)
    with torch.inference_mode():
        expected = saved.forward_head(saved.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(tower.embed_images(pixels)[0], expected, atol=1e-5, rtol=1e-4)
    assert tower.preprocessing["mean"] == (0.5, 0.4, 0.3)
    assert tower.preprocessing["size"] == (FAMILIES[name][1],) * 2

    choice = choose_layers(tower.model, [-2, -1], name == "dinov2", "tokens.mine")
    hidden = hidden_states(tower.model, pixels, choice, "tokens.mine")
    grids = {"dinov2": [(4, 4), (4, 4)], "swin": [(4, 4), (2, 2)]}
    assert [tuple(cells.shape[1:3]) for cells in hidden.cells] == grids[name]
    assert hidden.rollout.shape[2] == (16 if name == "dinov2" else 0)

    # The file names no folder, and other weights for the same architecture can be named.
    (tmp_path / "model").rename(tmp_path / "moved")
    moved = load_tower("mine", settings.model_copy(update={"model": f"local-dir:{tmp_path}/moved"}), CPU)
    assert moved.fingerprint == tower.fingerprint
    save_folder(tmp_path / "other", name, seed=1)
    other = {"model": f"local-dir:{tmp_path}/moved", "pretrained": f"{tmp_path}/other/model.safetensors"}
    assert load_tower("mine", Tower(**other), CPU).fingerprint != tower.fingerprint


def test_a_folder_at_another_size(tmp_path: Path) -> None:
    save_folder(tmp_path, "dinov2")
    tower = load_tower("mine", Tower(model=f"local-dir:{tmp_path}", image_size=84), CPU)
    assert tower.embed_images(tower.preprocess(Image.new("RGB", (50, 40)))[None])[1].shape[1:3] == (6, 6)


def test_the_arguments_of_a_folder_are_in_the_fingerprint(tmp_path: Path) -> None:
    """Heads of attention are in no weight."""
    save_folder(tmp_path, "dinov2")
    tower = load_tower("mine", Tower(model=f"local-dir:{tmp_path}"), CPU)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_heads": 2', '"num_heads": 4'))
    assert load_tower("mine", Tower(model=f"local-dir:{tmp_path}"), CPU).fingerprint != tower.fingerprint


def test_another_size_is_built_and_positions_follow(towers: dict[str, LoadedTower], files: dict[str, Path]) -> None:
    for name, size, grid in (("dinov2", 84, 6), ("swin", 128, 4), ("resnet", 96, 3), ("vit_map", 96, 6)):
        tower = load(name, files[name], image_size=size)
        pixels = tower.preprocess(Image.new("RGB", (50, 40), "red"))[None]
        assert pixels.shape == (1, 3, size, size)
        assert tower.embed_images(pixels)[1].shape[1:3] == (grid, grid)
    wide, small = load("dinov2", files["dinov2"], image_size=84).model, towers["dinov2"].model
    assert wide.get_parameter("pos_embed").shape[1] > small.get_parameter("pos_embed").shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_sees_the_same(name: str, towers: dict[str, LoadedTower], files: dict[str, Path]) -> None:
    half = load(name, files[name], precision="bf16")
    for low, high in zip(half.embed_images(draw_noise(name)), towers[name].embed_images(draw_noise(name)), strict=True):
        assert nn.functional.cosine_similarity(low, high, dim=-1).min() > 0.99


@limits(max_examples=30)
@given(
    width=st.integers(20, 120), height=st.integers(20, 120), mode=st.sampled_from(["center", "squash", "border"]),
    crop_pct=st.sampled_from([0.75, 0.875, 0.95, 1.0]),
)  # fmt: skip
def test_the_visible_box_is_what_timm_shows(width: int, height: int, mode: str, crop_pct: float) -> None:
    config = {
        "input_size": (3, 64, 64), "crop_pct": crop_pct, "crop_mode": mode, "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
    }  # fmt: skip
    preprocess = create_transform(**config)
    x0, y0, x1, y1 = visible_box(width, height, translate_config(config))
    # Each pixel of the picture holds where it lies.
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    for places, low, high, axis in ((across, x0, x1, 0), (down, y0, y1, 1)):
        picture = Image.fromarray((places * 255).round().astype(np.uint8)).convert("RGB")
        shown = preprocess(picture)[0]
        line = shown[32] if axis == 0 else shown[:, 32]
        expected = low + (high - low) * (torch.arange(64) + 0.5) / 64
        inside = (expected > 0.1) & (expected < 0.9)
        # Whole pixels, before and after, and 8 bits.
        assert (line - expected)[inside].abs().max() < 0.6 / 64 + 1.1 / min(width, height) + 1 / 255


def test_timm_decides_what_a_tower_sees(towers: dict[str, LoadedTower]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    for tower in towers.values():
        own = create_transform(**resolve_model_data_config(tower.model))(picture)
        assert torch.equal(tower.normalise(tower.preprocess(picture)[None])[0], own)
    dino, resnet = towers["dinov2"].preprocessing, towers["resnet"].preprocessing
    assert (dino["size"], dino["crop_share"], dino["interpolation"]) == ((56, 56), 1.0, "bicubic")
    # 0.95 of 67 pixels.
    assert (resnet["size"], resnet["resize_mode"], resnet["crop_share"]) == ((64, 64), "shortest", 64 / 67)
    assert towers["vit_map"].preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert visible_box(134, 67, resnet) == pytest.approx((35 / 134, 1.5 / 67, 99 / 134, 65.5 / 67))


def test_what_cannot_be_loaded_is_one_line(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As without a network: nothing is asked for.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    partial = tmp_path / "partial.pth"
    state = timm.create_model("small_resnet").state_dict()
    torch.save({key: value for key, value in state.items() if "layer4" not in key}, partial)
    wide = tmp_path / "wide.pth"
    torch.save({**state, "conv1.weight": torch.zeros(9, 3, 7, 7)}, wide)
    save_folder(tmp_path / "empty", "dinov2")
    (tmp_path / "empty/model.safetensors").rename(tmp_path / "whole.safetensors")
    save_folder(tmp_path / "unknown", "dinov2")
    config = tmp_path / "unknown/config.json"
    config.write_text(config.read_text().replace("vit_small", "vit_smal"))
    save_folder(tmp_path / "wide", "dinov2")
    config = tmp_path / "wide/config.json"
    config.write_text(config.read_text().replace('"embed_dim": 32', '"embed_dim": 64'))
    resnet, swin, dinov2 = (str(files[name]) for name in ("resnet", "swin", "dinov2"))
    small = {"model": "small_resnet", "pretrained": resnet}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**small, "model": "resnet51"}, r"\.model: timm knows no 'resnet51'; did you mean .*resnet50"),
        ({**small, "model": "resnet50.a1"}, r"\.model: timm knows no 'resnet50\.a1'; .*resnet50\."),
        ({"model": "???"}, r"\.model: timm knows no '\?\?\?'; see timm\.list_models"),
        ({"model": "resnet50t"}, r"\.pretrained: timm has no weights for resnet50t, and random ones embed nothing;"),
        ({"model": "test_resnet.r160_in1k"}, r": 'test_resnet.*' cannot be downloaded: no network\? give `"),
        ({"model": "local-dir:nowhere"}, r"\.model: nowhere holds no model as timm saves it \(.*config\.json.*\);"),
        ({"model": f"local-dir:{tmp_path}/unknown"}, r"\.model: .*unknown holds no model .*vit_smal_patch14_dinov2"),
        ({"model": f"local-dir:{tmp_path}/empty"}, r"\.model: .*empty holds no weights \(model\.safetensors or py"),
        ({"model": f"local-dir:{tmp_path}/wide"}, r"wide/model\.safetensors \(.*size mismatch"),
        ({**small, "pretrained": "nowhere.pth"}, r"\.pretrained: there is no file nowhere\.pth;"),
        ({**small, "pretrained": str(broken)}, r": timm cannot load 'small_resnet' from .*broken"),
        ({**small, "pretrained": str(partial)}, r"partial\.pth \(.*Missing key.*layer4"),
        ({**small, "pretrained": str(wide)}, r"wide\.pth \(.*size mismatch"),
        ({**small, "pretrained": swin}, r"swin\.safetensors \(.*Missing key"),
        ({**small, "precision": "fp16"}, r"\.precision: fp16 needs a GPU"),
        ({**small, "image_size": 70}, r"\.image_size: 70 .*32 pixels each; use 96$"),
        ({"model": "small_dinov2", "pretrained": dinov2, "image_size": 60}, r"\.image_size: 60 .*14 pixels .*use 70$"),
    ]
    for settings, words in cases:
        with pytest.raises(UserError, match=words) as error:
            load_tower("mine", Tower(**settings), CPU)
        assert str(error.value).startswith("params.yaml: towers.mine")
        assert "\n" not in str(error.value)


def test_preflight_looks_for_the_checkpoint_and_the_folder(set_params: Callable[..., Params]) -> None:
    mine = {"model": "resnet18", "pretrained": "mine.pth"}
    params = set_params(towers={"hub": {"model": "resnet18"}, "mine": mine, "own": {"model": "local-dir:own"}})
    towers = [entry for entry in named_paths(params) if entry[0].startswith("towers")]
    assert towers == [("towers.own.model", "own", "folder"), ("towers.mine.pretrained", "mine.pth", "file")]


def test_a_tower_goes_through_the_stages_that_need_no_text(
    set_params: Callable[..., Params], dataset: list[str], run_stage: Callable[..., None], files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tower = {"model": "small_resnet", "pretrained": str(files["resnet"]), "batch_size": 4}
    params = set_params(towers={"mine": tower}, embed={"tokens": True, "grids": [], "views": 1})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "mine")
    nodes = store.read_buckets("data/embed/mine/images", "embed.nodes/1", 4)
    assert nodes.schema.field("vector").type.list_size == 128
    rows = [row for row in nodes.to_pylist() if row["view"] == 0]
    assert [row["kind"] for row in rows[:5]] == ["global", "token", "token", "token", "token"]
    assert len(rows) == 5 * len(dataset)
    # Pictures of 80 x 60, of which the middle square is seen, less timm's margin: 64 of 67 pixels.
    share = 64 / 67
    seen = ((1 - 0.75 * share) / 2, (1 - share) / 2, (1 + 0.75 * share) / 2, (1 + share) / 2)
    assert [rows[0][side] for side in ("x0", "y0", "x1", "y1")] == pytest.approx(seen, abs=1e-6)
    assert [rows[1][side] for side in ("x0", "y0", "x1", "y1")] == pytest.approx((*seen[:2], 0.5, 0.5), abs=1e-6)
    loaded = load_image_encoder("mine", params.image_encoder("mine"), CPU)
    by_id = {store.sha256(path.read_bytes()): path for path in map(Path("images").joinpath, dataset)}
    pooled, _ = loaded.embed_images(loaded.preprocess(Image.open(by_id[rows[0]["image_id"]]))[None])
    np.testing.assert_allclose(rows[0]["vector"], nn.functional.normalize(pooled[0], dim=0), atol=1e-3)

    run_stage("build_graphs", "--encoder", "mine")
    graphs = store.read_buckets("data/graphs/mine", "graphs/1", 4)
    assert len(graphs) == 2 * len(dataset)
    run_stage("tools.export", "--encoder", "mine", "--to", "safetensors", "mine.safetensors")
    capsys.readouterr()
    run_stage("embed_images", "--encoder", "mine")
    assert "0 images embedded, 12 kept" in capsys.readouterr().out
    for stage in ("embed_text", "select_concepts", "label_patches"):
        with pytest.raises(UserError, match=r"towers\.mine: a tower has no text side; choose one of `encoders`: conv"):
            run_stage(stage, "--encoder", "mine")


@pytest.mark.slow
def test_a_tower_more_is_embedded_and_linked_and_nothing_else_runs(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "fieldmark")
    for n, place in enumerate(f"{split}/{name}" for split in ("train", "val", "test") for name in "ab"):
        draw(folder / f"data/pictures/{place}/{n}.png", n)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "tower.pth")

    def make_small(params: Any) -> None:
        params["demo"] = {}
        params["dataset"].update(root="data/pictures", buckets=2)
        params["embed"].update(views=0, tokens=False)

    edit_params(folder, make_small)
    commit(folder)
    command("dvc", "repro", "index_images", cwd=folder)
    tower = {"model": "test_resnet", "pretrained": "tower.pth", "precision": "fp32", "batch_size": 4, "image_size": 64}
    edit_params(folder, lambda params: params.update(towers={"mine": tower}))
    done = command("dvc", "repro", "build_tower_graphs", cwd=folder)
    assert re.findall(r"Running stage '(.*)'", done.stdout) == ["embed_towers@mine", "build_tower_graphs@mine"]
    assert "6 images embedded" in done.stdout
    assert "6 images linked anew" in done.stdout
    again = command("dvc", "repro", "build_tower_graphs", cwd=folder)
    assert "Running stage" not in again.stdout
