import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from stages.clip import LoadedEncoder, choose_device, image_features, load_encoder, visible_box
from stages.command import UserError
from stages.params import Encoder
from tests.stages.project import CONV, VIT, save_model

CPU = torch.device("cpu")


def load(folder: Path, **settings: object) -> LoadedEncoder:
    return load_encoder("mine", Encoder(model=f"local-dir:{folder}", **{"batch_size": 4, **settings}), CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoders(models: dict[str, Path]) -> dict[str, LoadedEncoder]:
    return {name: load(folder) for name, folder in models.items()}


def noise(encoder: LoadedEncoder, count: int) -> Tensor:
    side = encoder.preprocessing["size"][0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def same_direction(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(
        torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_the_global_row_is_what_open_clip_gives(
    name: str, encoders: dict[str, LoadedEncoder], models: dict[str, Path]
) -> None:
    encoder = encoders[name]
    # Loaded anew and called as open_clip's users do.
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models[name]}")
    model.eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    pixels = torch.stack([preprocess(picture), *noise(encoder, 2)])
    assert torch.equal(encoder.preprocess(picture), pixels[0])
    pooled, tokens = encoder.embed_images(pixels)
    assert pooled.dtype == tokens.dtype == torch.float32
    assert tokens.shape == (3, *{"conv": (2, 2), "vit": (4, 4)}[name], 16)
    with torch.no_grad():
        same_direction(pooled, model.encode_image(pixels))
        texts = ["a fish", "a fish with a forked tail", "x"]
        same_direction(encoder.embed_texts(texts), model.encode_text(open_clip.tokenize(texts, 12)))
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_mean_of_convolutional_cells_is_the_global_row(encoders: dict[str, LoadedEncoder]) -> None:
    pooled, tokens = encoders["conv"].embed_images(noise(encoders["conv"], 3))
    torch.testing.assert_close(tokens.mean(dim=(1, 2)), pooled, atol=1e-5, rtol=1e-4)


def test_vit_cells_go_through_the_last_norm_and_projection(encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders["vit"]
    visual = encoder.model.visual
    pixels = noise(encoder, 2)
    with torch.no_grad():
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # type: ignore[operator, union-attr]
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1) + visual.positional_embedding  # type: ignore
        x = visual.ln_pre(x)  # type: ignore
        for block in visual.transformer.resblocks:  # type: ignore
            x = block(x)
        x = visual.ln_post(x) @ visual.proj  # type: ignore
    pooled, tokens = encoder.embed_images(pixels)
    torch.testing.assert_close(tokens, x[:, 1:].reshape(2, 4, 4, 16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, x[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_a_bright_square_lights_its_own_cell(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    grid = {"conv": 2, "vit": 4}[name]
    side = encoder.preprocessing["size"][0]
    cell = side // grid
    blank = encoder.embed_images(torch.zeros(1, 3, side, side))[1][0]
    for row in range(grid):
        for column in range(grid):
            pixels = torch.zeros(1, 3, side, side)
            pixels[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 2.0
            change = (encoder.embed_images(pixels)[1][0] - blank).norm(dim=-1)
            assert divmod(int(change.argmax()), grid) == (row, column)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_company_and_order_do_not_change_bits(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    pixels = noise(encoder, 4)
    together = encoder.embed_images(pixels)
    for order in ([0], [3], [2, 1], [3, 2, 1, 0], [1, 1, 1]):
        for one, all_ in zip(encoder.embed_images(pixels[order]), together, strict=True):
            assert torch.equal(one, all_[order])
    texts = ["a", "a long tail", "two words", "bars"]
    vectors = encoder.embed_texts(texts)
    for order in ([0], [3, 1], [2, 3, 0, 1]):
        assert torch.equal(encoder.embed_texts([texts[i] for i in order]), vectors[order])


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_bfloat16_runs_on_the_cpu(
    name: str, encoders: dict[str, LoadedEncoder], models: dict[str, Path]
) -> None:
    half = load(models[name], precision="bf16")
    pixels = noise(half, 2)
    for low, full in zip(half.embed_images(pixels), encoders[name].embed_images(pixels), strict=True):
        assert low.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(low, full, dim=-1).min() > 0.99
    assert half.embed_texts(["a fish"]).shape == (1, 16)
    assert half.fingerprint != encoders[name].fingerprint


def test_an_empty_model_gives_its_dimension(encoders: dict[str, LoadedEncoder]) -> None:
    assert encoders["conv"].dimension == 16


def change_config(folder: Path, edit: Callable[[dict], object]) -> Path:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return folder


def test_the_fingerprint_is_of_what_changes_a_vector(
    models: dict[str, Path], encoders: dict[str, LoadedEncoder], tmp_path: Path
) -> None:
    original = encoders["vit"].fingerprint
    assert load(shutil.copytree(models["vit"], tmp_path / "moved"), batch_size=7).fingerprint == original
    marks = [original, encoders["conv"].fingerprint]
    edits: dict[str, Callable[[dict], object]] = {
        "heads": lambda config: config["model_cfg"]["vision_cfg"].update(head_width=8),
        "pooling": lambda config: config["model_cfg"]["vision_cfg"].update(pool_type="avg"),
        "text_heads": lambda config: config["model_cfg"]["text_cfg"].update(heads=4),
        "mean": lambda config: config["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5]),
        "resize": lambda config: config["preprocess_cfg"].update(resize_mode="squash"),
        "activation": lambda config: config["model_cfg"].update(quick_gelu=True),
    }
    for name, edit in edits.items():
        folder = change_config(shutil.copytree(models["vit"], tmp_path / name), edit)
        marks.append(load(folder).fingerprint)
    with torch.random.fork_rng():
        marks.append(load(save_model(tmp_path / "wider", {**VIT, "embed_dim": 24})).fingerprint)
    assert len(set(marks)) == len(marks)


def test_tokens_are_counted_and_cuts_are_told(encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders["conv"]
    assert encoder.count_tokens("fish") == (3, False)
    assert encoder.count_tokens("fish " * 10) == (12, False)
    assert encoder.count_tokens("fish " * 11) == (12, True)


def test_an_encoder_that_cannot_be_loaded_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    bare = shutil.copytree(models["vit"], tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()
    cut = shutil.copytree(models["vit"], tmp_path / "cut")
    (cut / "open_clip_model.safetensors").write_bytes(
        (models["vit"] / "open_clip_model.safetensors").read_bytes()[:99]
    )
    other = shutil.copytree(models["vit"], tmp_path / "other")
    shutil.copy(models["conv"] / "open_clip_model.safetensors", other)
    odd = change_config(
        shutil.copytree(models["vit"], tmp_path / "odd"), lambda config: config["model_cfg"].update(foo=1)
    )
    (tmp_path / "empty").mkdir()
    for settings, words in (
        ({"model": f"local-dir:{tmp_path / 'none'}"}, "mine.model: there is no folder"),
        ({"model": "ViT-B-33", "pretrained": "openai"}, "mine.model: open_clip knows no 'ViT-B-33'"),
        ({"model": "ViT-B-32"}, "mine.pretrained: is missing"),
        ({"model": "ViT-B-32", "pretrained": "nobody"}, "open_clip cannot load"),
        ({"model": f"local-dir:{bare}"}, "could not be loaded"),
        ({"model": f"local-dir:{tmp_path / 'empty'}"}, "open_clip_config.json"),
        ({"model": f"local-dir:{models['vit']}", "precision": "fp16"}, "mine.precision: fp16 needs a GPU"),
        *(({"model": f"local-dir:{folder}"}, "open_clip cannot load") for folder in (cut, other, odd)),
    ):
        with pytest.raises(UserError, match=words) as error:
            load_encoder("mine", Encoder(**settings), CPU)  # type: ignore[arg-type]
        assert "encoders.mine" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "vision",
    [
        {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True},
    ],
)
def test_a_tower_without_a_rule_is_refused(vision: dict[str, object], tmp_path: Path) -> None:
    size = 160 if "timm_model_name" in vision else 32
    encoder = load(save_model(tmp_path, {**CONV, "vision_cfg": {**vision, "image_size": size}}))
    with pytest.raises(UserError, match=r"encoders\.mine: ") as error:
        encoder.embed_images(noise(encoder, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trunk", ["test_convnext", "test_efficientnet", "test_nfnet"])
def test_other_convolutional_towers_follow_the_rule(trunk: str, tmp_path: Path) -> None:
    vision = {
        "timm_model_name": trunk,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    encoder = load(save_model(tmp_path, {**CONV, "vision_cfg": {**vision, "image_size": 96}}))
    pixels = noise(encoder, 2)
    pooled, tokens = encoder.embed_images(pixels)
    with torch.no_grad():
        same_direction(pooled, encoder.model.encode_image(pixels))  # type: ignore[operator]
    assert tokens.shape == (2, 3, 3, 16)


def test_towers_of_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"encoders\.mine: no rule for the dense tokens of a Linear"):
        image_features(torch.nn.Linear(1, 1), torch.zeros(1, 3, 8, 8), "mine")


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("shortest", (80, 80), (0, 0, 1, 1)),
        ("shortest", (80, 60), (0.125, 0, 0.875, 1)),
        ("shortest", (10, 40), (0, 0.375, 1, 0.625)),
        ("squash", (80, 60), (0, 0, 1, 1)),
        ("longest", (80, 60), (0, -1 / 6, 1, 7 / 6)),
        ("longest", (40, 40), (0, 0, 1, 1)),
    ],
)
def test_what_an_encoder_sees_of_a_picture(mode: str, size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert visible_box(*size, {"resize_mode": mode}) == pytest.approx(box)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}: ") as error:
            choose_device(name)
        assert "\n" not in str(error.value)
