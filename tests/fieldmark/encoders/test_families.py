"""Every family of encoders on a small random model: open_clip's own configuration of it with fewer, narrower layers."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors.torch import save_file
from timm.models import SwinTransformer, register_model
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder, check_activation, load_encoder
from fieldmark.encoders.maps import image_features
from fieldmark.params import Encoder
from tests.fieldmark.encoders.test_clip import save_tokenizer
from tests.project import save_model

CPU = torch.device("cpu")
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TRANSFORMER = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FASTVIT = {"embed_dims": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
# open_clip's name of the model: pixels and cells a side, and what of its image tower is made smaller.
FAMILIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ViT-B-32": (64, 4, VIT),
    "ViT-B-32-quickgelu": (64, 4, VIT),
    "ViT-M-16-alt": (64, 4, VIT),
    "ViT-L-14-CLIPA": (64, 4, VIT),
    "RN50-quickgelu": (64, 2, {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}),
    "coca_base": (64, 4, VIT),
    "coca_ViT-B-32": (64, 4, {**VIT, "attn_pooler_queries": 5, "attn_pooler_heads": 2}),
    "ViT-B-16-SigLIP": (64, 4, TRANSFORMER),
    "ViT-B-16-SigLIP2": (64, 4, TRANSFORMER),
    "EVA01-g-14": (56, 4, TRANSFORMER),
    "EVA02-B-16": (64, 4, TRANSFORMER),
    "EVA02-E-14": (56, 4, TRANSFORMER),
    "convnext_base": (64, 2, CONVNEXT),
    "convnext_large_d": (64, 2, CONVNEXT),
    "MobileCLIP-S1": (64, 2, FASTVIT),
    "MobileCLIP-B": (64, 4, {"depth": 1}),
    "MobileCLIP2-S3": (128, 2, {"embed_dims": (16, 16, 32, 32, 32), "layers": (1, 1, 1, 1, 1)}),
    "MobileCLIP2-L-14": (56, 4, TRANSFORMER),
    "PE-Core-B-16": (64, 4, TRANSFORMER),
    "ViTamin-S": (64, 4, {"depth": 1}),
    "swin_base_patch4_window7_224": (
        64, 2, {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
    ),
    "vit_medium_patch16_gap_256": (64, 4, TRANSFORMER),
    "vit_relpos_medium_patch16_cls_224": (64, 4, TRANSFORMER),
}  # fmt: skip


def register_small(original: str, name: str) -> str:
    """Make a timm model of a family's small sizes known to timm under a name of its own; that name."""
    side, _, sizes = FAMILIES[name]
    fixed = {"img_size": side} if timm.get_pretrained_cfg(original).fixed_input_size else {}

    def create(**kwargs: Any) -> nn.Module:
        # What else timm.create_model hands on is about weights.
        head = {key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs}
        return timm.create_model(original, **head, **fixed, **sizes)

    create.__name__ = f"small_{name.replace('-', '_').lower()}"
    if not timm.is_model(create.__name__):
        register_model(create)
    return create.__name__


def save_small(folder: Path, name: str) -> Path:
    """A random model of a family as a local-dir."""
    side, _, sizes = FAMILIES[name]
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if original := vision.get("timm_model_name"):
        vision["timm_model_name"] = register_small(original, name)
    else:
        vision.update(sizes)
    vision["image_size"] = side
    config["embed_dim"] = 32
    text.update(width=16, heads=2, layers=1, context_length=12)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"].update(width=16, heads=2, layers=1)
    if "hf_tokenizer_name" in text:
        save_tokenizer(folder)
        text["vocab_size"] = 20
    save_model(folder, config)
    model = open_clip.create_model(f"local-dir:{folder}")
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    if norms:
        # Statistics of real activations: without them they fade on the way to the last map.
        for norm in norms:
            norm.momentum = None
            nn.init.ones_(norm.weight)
        with torch.no_grad():
            model.visual.train()(draw_noise(name))
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def draw_noise(name: str) -> Tensor:
    """Three pictures of a family's size."""
    side, _, _ = FAMILIES[name]
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: save_small(base / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, LoadedEncoder]:
    return {
        name: load_encoder(name, Encoder(model=f"local-dir:{folder}", batch_size=3), CPU)
        for name, folder in folders.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_global_row_is_the_librarys_own(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    pixels = draw_noise(name)
    pooled, tokens = encoder.embed_images(pixels)
    encode: Any = encoder.model.encode_image
    with torch.inference_mode():
        own = encode(pixels.to(memory_format=torch.channels_last), normalize=False)
    assert torch.equal(pooled, own)
    _, grid, _ = FAMILIES[name]
    assert tokens.shape == (3, grid, grid, 32)
    assert torch.isfinite(tokens).all()
    directions = nn.functional.normalize(tokens, dim=-1)
    assert directions.std(dim=(1, 2)).amax(dim=-1).min() > 1e-3
    # Neighbours on the grid and in the batch change nothing.
    assert torch.equal(encoder.embed_images(pixels[[2, 0]])[1], tokens[[2, 0]])


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_lie_in_the_space_of_the_images(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    vectors = encoder.embed_texts(["a fish", "a fish with fins"])
    encode: Any = encoder.model.encode_text
    with torch.inference_mode():
        own = encode(encoder.tokenizer(["a fish", "a fish with fins"]), normalize=False)
    assert vectors.shape == (2, 32)
    torch.testing.assert_close(vectors, own, atol=1e-5, rtol=1e-5)
    assert encoder.logit_scale > 1


def test_each_fingerprint_differs_from_every_other(encoders: dict[str, LoadedEncoder]) -> None:
    assert len({encoder.fingerprint for encoder in encoders.values()}) == len(FAMILIES)


def change_features(visual: Any, grid: int, change: Callable[[Tensor], Tensor]) -> None:
    """Put the feature map (n, h, w, C) through `change` before it is pooled; prefix tokens become its last cell."""

    def change_rows(rows: Tensor) -> Tensor:
        prefix = rows.shape[1] - grid**2
        cells = change(rows[:, prefix:].unflatten(1, (grid, grid)))
        return torch.cat([cells[:, -1, -1:].expand(-1, prefix, -1), cells.flatten(1, 2)], dim=1)

    def change_map(features: Tensor) -> Tensor:
        if features.ndim == 3:
            return change_rows(features)
        if isinstance(getattr(visual, "trunk", None), SwinTransformer):
            return change(features)
        return change(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()

    if isinstance(visual, TimmModel):
        features = visual.trunk.forward_features
        visual.trunk.forward_features = lambda pixels: change_map(features(pixels))
    else:
        last = visual.layer4 if isinstance(visual, ModifiedResNet) else visual.transformer.resblocks[-1]
        last.register_forward_hook(lambda module, inputs, output: change_map(output))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_map_of_equal_cells_has_tokens_equal_to_the_global_row(
    name: str, encoders: dict[str, LoadedEncoder]
) -> None:
    visual: Any = copy.deepcopy(encoders[name].model.visual)
    pixels = draw_noise(name)
    _, tokens = image_features(visual, pixels, name)
    change_features(visual, FAMILIES[name][1], lambda cells: cells[:, -1:, -1:].expand_as(cells))
    pooled, equal = image_features(visual, pixels, name)
    # Some random towers give tiny numbers.
    scale = (pooled[0] - pooled[1]).abs().max()
    assert scale > 1e-3 * pooled.abs().max()
    torch.testing.assert_close(equal / scale, (pooled / scale)[:, None, None].expand_as(equal), atol=1e-3, rtol=0)
    # The token of a cell is of that cell: the same one as in the map that it came from.
    torch.testing.assert_close(equal[:, 0, 0] / scale, tokens[:, -1, -1] / scale, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_of_the_map_changes_its_own_token_alone(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    visual: Any = copy.deepcopy(encoders[name].model.visual)
    grid = FAMILIES[name][1]
    count = grid**2
    # One picture many times; its n-th copy is changed in cell n.
    pixels = draw_noise(name)[:1].expand(count, -1, -1, -1)
    _, before = image_features(visual, pixels, name)

    def change(cells: Tensor) -> Tensor:
        step = torch.randn(cells.shape[-1], generator=torch.Generator().manual_seed(1)) * cells.abs().max()
        return cells + torch.eye(count).reshape(count, grid, grid, 1) * step

    change_features(visual, grid, change)
    _, after = image_features(visual, pixels, name)
    moved = (after - before).norm(dim=-1)
    assert (moved > 1e-3 * moved.max()).nonzero().tolist() == [[n, *divmod(n, grid)] for n in range(count)]


@pytest.mark.parametrize("name", [name for name, (_, _, sizes) in FAMILIES.items() if sizes.items() >= VIT.items()
                                  or sizes.items() >= TRANSFORMER.items()])  # fmt: skip
def test_a_bright_square_lights_its_own_cell(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    visual: Any = copy.deepcopy(encoders[name].model.visual)
    side, grid, _ = FAMILIES[name]
    with torch.no_grad():
        for part, weight in visual.named_parameters():
            # Blocks without attention: a patch changes its own token and no other.
            if re.search(r"blocks\.\d+\.attn\.(out_)?proj\.weight", part):
                weight.zero_()
    squares = torch.eye(grid**2).reshape(-1, 1, grid, grid).expand(-1, 3, -1, -1)
    squares = nn.functional.interpolate(squares, size=side)
    _, before = image_features(visual, torch.zeros_like(squares), name)
    _, after = image_features(visual, squares, name)
    moved = (after - before).norm(dim=-1)
    assert (moved > 1e-3 * moved.max()).nonzero().tolist() == [[n, *divmod(n, grid)] for n in range(grid**2)]


def test_a_resnets_cell_stands_at_every_place(encoders: dict[str, LoadedEncoder]) -> None:
    visual: Any = copy.deepcopy(encoders["RN50-quickgelu"].model.visual)
    pixels, pool = draw_noise("RN50-quickgelu"), visual.attnpool
    cells = visual.forward_intermediates(pixels, indices=1)["image_intermediates"][0]
    # So that attention is far from even.
    pool.positional_embedding.mul_(30)
    _, tokens = image_features(visual, pixels, "mine")
    torch.testing.assert_close(tokens[:, 1, 0], pool(cells[:, :, 1:, :1].expand_as(cells)), atol=1e-5, rtol=1e-4)
    # Without places it is MaskCLIP's rule.
    pool.positional_embedding.zero_()
    maskclip = pool.c_proj(pool.v_proj(cells.permute(0, 2, 3, 1)))
    torch.testing.assert_close(image_features(visual, pixels, "mine")[1], maskclip, atol=1e-5, rtol=1e-4)
    assert (tokens - maskclip).abs().max() > 0.1


# One of each way in which positions come to another size, and towers that have none.
@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-B-16",
                                  "convnext_base", "swin_base_patch4_window7_224"])  # fmt: skip
def test_another_size_is_another_encoder_of_the_same_texts(
    name: str, encoders: dict[str, LoadedEncoder], folders: dict[str, Path]
) -> None:
    side, grid, _ = FAMILIES[name]
    size = side // grid * (grid + 2)
    small, large = encoders[name], load(name, folders, size)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    pooled, tokens = large.embed_images(pixels)
    own: Any = open_clip.create_model(f"local-dir:{folders[name]}", force_image_size=size).eval()
    with torch.inference_mode():
        expected = own.encode_image(pixels.to(memory_format=torch.channels_last), normalize=False)
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    assert tokens.shape == (3, grid + 2, grid + 2, 32)
    assert large.preprocess(Image.new("RGB", (50, 70))).shape == (3, size, size)
    assert large.fingerprint != small.fingerprint
    assert torch.equal(large.embed_texts(["a fish"]), small.embed_texts(["a fish"]))
    # Its own size by name is the encoder that names none.
    assert load(name, folders, side).fingerprint == small.fingerprint
    cell = side // grid
    words = rf"^params\.yaml: encoders\.mine\.image_size: .*, {cell} pixels each; use {size}$"
    with pytest.raises(UserError, match=words):
        load("mine", {"mine": folders[name]}, size - cell // 2)


def load(name: str, folders: dict[str, Path], size: int) -> LoadedEncoder:
    return load_encoder(name, Encoder(model=f"local-dir:{folders[name]}", batch_size=3, image_size=size), CPU)


def test_clips_resnet_has_one_size(folders: dict[str, Path], encoders: dict[str, LoadedEncoder]) -> None:
    resnet = "RN50-quickgelu"
    for size in (96, 80):
        with pytest.raises(UserError, match=rf"{resnet}\.image_size: .* each cell of 64 pixels, .*; leave it out, or"):
            load(resnet, folders, size)
    assert load(resnet, folders, 64).fingerprint == encoders[resnet].fingerprint


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_runs_or_is_refused(name: str, encoders: dict[str, LoadedEncoder], folders: dict[str, Path]) -> None:
    settings = Encoder(model=f"local-dir:{folders[name]}", precision="bf16", batch_size=3)
    # open_clip leaves layer scale, the pooling of CoCa and the last token of its texts in fp32.
    if name in ("ViT-M-16-alt", "coca_base", "coca_ViT-B-32"):
        with pytest.raises(UserError, match=r"encoders\.mine\.precision: open_clip cannot run .* bf16 .*; use fp32$"):
            load_encoder("mine", settings, CPU)
        return
    half, full, pixels = load_encoder("mine", settings, CPU), encoders[name], draw_noise(name)
    for low, high in zip(half.embed_images(pixels), full.embed_images(pixels), strict=True):
        assert nn.functional.cosine_similarity(low, high, dim=-1).min() > 0.99
    assert half.embed_texts(["a fish"]).isfinite().all()
    assert half.fingerprint != full.fingerprint


def test_a_tag_that_needs_quickgelu_is_refused_with_the_right_name() -> None:
    wrong = []
    for model, tag in open_clip.list_pretrained():
        try:
            check_activation(model, tag, open_clip.get_model_config(model), "key")
        except UserError as error:
            right = str(error).rsplit(" ", 1)[1]
            assert open_clip.get_pretrained_cfg(right, tag) == open_clip.get_pretrained_cfg(model, tag)
            check_activation(right, tag, open_clip.get_model_config(right), "key")
            wrong.append((model, tag))
    assert ("ViT-B-16", "openai") in wrong
    assert ("RN50", "openai") in wrong
    assert ("ViT-B-16", "laion2b_s34b_b88k") not in wrong
    words = r"encoders\.mine\.model: openai was trained with QuickGELU, .*; use ViT-B-16-quickgelu$"
    with pytest.raises(UserError, match=words):
        load_encoder("mine", Encoder(model="ViT-B-16", pretrained="openai"), CPU)
