"""The pooled vector, its projection and the layer `head`, on a small random model of each family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models as torchvision_models

from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder, make_batch
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.layers import (
    LayerChoice,
    choose_layers,
    count_layers,
    find_tower,
    has_cls,
    hidden_states,
    number_layer,
)
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.maps import image_features, pool_cells, pool_map
from fieldmark.encoders.pooled import pool_batch, projection_of
from fieldmark.params import Encoder, Tower
from tests.fieldmark.encoders import test_families as families
from tests.fieldmark.encoders import test_maps as heads
from tests.fieldmark.encoders import test_towers as textless

CPU = torch.device("cpu")
# Of the families of test_families.py one of each kind of head.
FAMILIES = (
    "ViT-B-32", "ViT-L-14-CLIPA", "RN50-quickgelu", "coca_ViT-B-32", "ViT-B-16-SigLIP", "EVA02-B-16", "convnext_base",
    "convnext_large_d", "MobileCLIP-S1", "PE-Core-B-16", "swin_base_patch4_window7_224", "vit_medium_patch16_gap_256",
)  # fmt: skip
# Their heads end with an MLP, or with their pooling.
WITHOUT_MATRIX = ("ViT-B-16-SigLIP", "convnext_large_d")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedEncoder]:
    base, found = tmp_path_factory.mktemp("families"), {}
    for name in FAMILIES:
        folder = families.save_small(base / name, name)
        found[name] = load_encoder(name, Encoder(model=f"local-dir:{folder}", batch_size=3), CPU)
    return found


def layers_of(encoder: ImageEncoder) -> list[int]:
    """The first layer, the last one where that is another, and `head`."""
    tower = find_tower(encoder.model)
    return choose_layers(tower, [0, "head"] if count_layers(tower) == 1 else [0, -1, "head"], False, "key").layers


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest number: some random towers give tiny ones."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-5, rtol=0)


def without_projection(visual: Any) -> Any:
    """A copy of an image tower whose own forward pass projects nothing."""
    visual = copy.deepcopy(visual)
    if isinstance(visual, VisionTransformer):
        visual.proj, visual.output_tokens = None, False
    elif isinstance(visual, ModifiedResNet):
        linear = visual.attnpool.c_proj
        linear.weight, linear.bias = nn.Parameter(torch.eye(linear.in_features)), nn.Parameter(torch.zeros(1))
    elif len(visual.head):
        visual.head[-1] = nn.Identity()
    else:
        visual.trunk.reset_classifier(0)
    return visual


@pytest.mark.parametrize("name", FAMILIES)
def test_pooled_is_what_the_library_gives_before_its_projection(
    name: str, encoders: dict[str, LoadedEncoder]
) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    visual: Any = encoder.model.visual
    pooled, cells = pool_batch(encoder, pixels, [])
    assert cells == []
    assert pooled.dtype == torch.float32
    with torch.inference_mode():
        assert_close(pooled, without_projection(visual)(pixels))
        if isinstance(visual, TimmModel):
            assert_close(pooled, visual.trunk.forward_head(visual.trunk.forward_features(pixels), pre_logits=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_projected_the_head_is_what_embed_images_gives(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    visual: Any = encoder.model.visual
    pooled, cells = pool_batch(encoder, pixels, layers_of(encoder))
    projection = projection_of(encoder)
    assert (projection is None) == (name in WITHOUT_MATRIX)
    for found, expected in zip((pooled, cells[-1]), encoder.embed_images(pixels), strict=True):
        assert_close(functional.linear(found, *projection) if projection else visual.head(found), expected)
    projected = number_layer(find_tower(encoder.model), "projected", "key")
    if projection is None:
        with pytest.raises(UserError, match=r"layer: projected: its head is not one linear projection, so that cells"):
            pool_batch(encoder, pixels, [projected])
    else:
        [of_head, found] = pool_batch(encoder, pixels, [projected - 1, projected])[1]
        assert_close(found, encoder.embed_images(pixels)[1])
        assert torch.equal(of_head, cells[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_cells_are_those_of_the_layers_and_no_bit_depends_on_what_else_is_asked(
    name: str, encoders: dict[str, LoadedEncoder]
) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    layers = layers_of(encoder)
    pooled, cells = pool_batch(encoder, pixels, layers)
    with torch.inference_mode():
        batch = make_batch(encoder, pixels)
        for layer, found in zip(layers, cells, strict=True):
            hidden = hidden_states(encoder.model, batch, LayerChoice([layer], None), "key")
            assert torch.equal(found, hidden.cells[0])
    assert torch.equal(pool_batch(encoder, pixels, [])[0], pooled)
    # Neighbours in the batch, and how many they are, change nothing.
    for order in ([1], [2, 0]):
        alone, of_layers = pool_batch(encoder, pixels[order], layers)
        assert torch.equal(alone, pooled[order])
        assert all(map(torch.equal, of_layers, [each[order] for each in cells]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "RN50-quickgelu"])
def test_cls_of_the_head_stands_in_the_place_of_a_cell(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    tower = find_tower(encoder.model)
    head = count_layers(tower)
    assert head is not None
    with torch.inference_mode():
        hidden = hidden_states(encoder.model, make_batch(encoder, pixels), LayerChoice([head], None), "key")
    cls, pooled = hidden.cls[0], pool_batch(encoder, pixels, [])[0]
    assert cls.shape == (pooled.shape if has_cls(tower) else (3, 0))
    visual: Any = encoder.model.visual
    if getattr(visual, "pool_type", "") == "tok" and visual.attn_pool is None:
        assert_close(cls, pooled)
    if isinstance(visual, TimmModel) and getattr(visual.trunk, "global_pool", "") == "token":
        assert_close(cls, pooled)


def test_rollout_is_the_same_with_the_head_beside_it(encoders: dict[str, LoadedEncoder]) -> None:
    for name in ("ViT-B-32", "EVA02-B-16", "PE-Core-B-16"):
        encoder, pixels = encoders[name], families.draw_noise(name)
        tower = find_tower(encoder.model)
        with torch.inference_mode():
            alone, beside = (
                hidden_states(encoder.model, pixels, choose_layers(tower, asked, True, "key"), "key")
                for asked in ([0], [0, "head"])
            )
        assert torch.equal(alone.rollout, beside.rollout)
        assert len(beside.cells) == len(beside.cls) == 2


@pytest.mark.parametrize(("trunk", "pool", "projection"), heads.TOWERS)
def test_the_last_step_of_each_kind_of_head(trunk: str, pool: str, projection: str) -> None:
    visual = heads.timm_tower(trunk, pool, projection)
    last: Any = visual.head[-1] if len(visual.head) else visual.trunk.get_classifier()
    last = last.proj if pool == "rot_attn" and projection == "" else last
    features = visual.trunk.forward_features(heads.timm_pixels(visual))
    unprojected = pool_map(visual, features, "mine"), pool_cells(visual, features, "mine")[0]
    for found, expected in zip(unprojected, image_features(visual, heads.timm_pixels(visual), "mine"), strict=True):
        assert_close(last(found), expected)


@pytest.mark.parametrize("name", textless.FAMILIES)
def test_a_tower_without_texts_projects_nothing(name: str, tmp_path: Path) -> None:
    textless.register_small(name)
    tower = textless.load(name, textless.save_small(tmp_path / "tower.safetensors", name))
    pixels = textless.draw_noise(name)
    pooled, cells = pool_batch(tower, pixels, layers_of(tower))
    embedded, tokens = tower.embed_images(pixels)
    assert_close(pooled, embedded)
    assert_close(cells[-1], tokens)
    assert projection_of(tower) is None


def test_a_tower_without_layers_has_its_embedding(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pth"
    torch.save(torchvision_models.resnet18().state_dict(), file)
    settings = Tower(library="torchvision", model="resnet18", pretrained=str(file), batch_size=2, image_size=64)
    tower = load_image_encoder("mine", settings, CPU)
    pixels = torch.randn(2, 3, 64, 64)
    pooled, cells = pool_batch(tower, pixels, [])
    assert torch.equal(pooled, tower.embed_images(pixels)[0])
    assert cells == []
    assert projection_of(tower) is None


def test_half_precision(encoders: dict[str, LoadedEncoder], tmp_path: Path) -> None:
    for name in ("ViT-B-32", "RN50-quickgelu", "EVA02-B-16", "convnext_base"):
        folder = families.save_small(tmp_path / name, name)
        half = load_encoder("mine", Encoder(model=f"local-dir:{folder}", precision="bf16", batch_size=3), CPU)
        full, pixels = encoders[name], families.draw_noise(name)
        low, high = (pool_batch(each, pixels, layers_of(each)) for each in (half, full))
        projection = projection_of(half)
        assert projection is not None
        for one, other in zip((low[0], *low[1], projection[0]), (high[0], *high[1]), strict=False):
            assert one.dtype == torch.float32
            assert functional.cosine_similarity(one, other, dim=-1).min() > 0.99
        projected = functional.linear(low[0], *projection)
        assert functional.cosine_similarity(projected, half.embed_images(pixels)[0], dim=-1).min() > 0.999
