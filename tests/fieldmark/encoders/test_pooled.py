"""The pooled vector, the projection and the layer `head` on a small random model of each family."""

import copy
from typing import Any

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.layers import choose_layers, find_tower
from fieldmark.encoders.pooled import pool_batch, projection_of
from fieldmark.encoders.towers import LoadedTower
from fieldmark.params import Encoder
from tests.fieldmark.encoders import test_families as families
from tests.fieldmark.encoders import test_towers as towers_without_texts

CPU = torch.device("cpu")
FAMILIES = families.FAMILIES
# Where the head of a family ends with an MLP, or with its pooling.
WITHOUT_MATRIX = ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "convnext_large_d")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedEncoder]:
    base = tmp_path_factory.mktemp("families")
    return {
        name: load_encoder(
            name, Encoder(model=f"local-dir:{families.save_small(base / name, name)}", batch_size=3), CPU
        )
        for name in FAMILIES
    }  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedTower]:
    base = tmp_path_factory.mktemp("towers")
    found = {}
    for name in towers_without_texts.FAMILIES:
        towers_without_texts.register_small(name)
        file = towers_without_texts.save_small(base / f"{name}.safetensors", name)
        found[name] = towers_without_texts.load(name, file)
    return found


def own_pooled(visual: Any, pixels: Tensor) -> Tensor:
    """The pooled vector by the library's own forward pass, the projection of it taken away."""
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
    with torch.inference_mode():
        return visual(pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_pooled_is_what_the_library_gives_before_its_projection(
    name: str, encoders: dict[str, LoadedEncoder]
) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    pooled, cells = pool_batch(encoder, pixels, [])
    assert cells == []
    assert pooled.dtype == torch.float32
    scale = pooled.abs().max()
    torch.testing.assert_close(pooled / scale, own_pooled(encoder.model.visual, pixels) / scale, atol=1e-5, rtol=0)
    visual: Any = encoder.model.visual
    if isinstance(visual, TimmModel):
        with torch.inference_mode():
            before = visual.trunk.forward_head(visual.trunk.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(pooled / scale, before / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_projected_it_is_the_global_embedding(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder, pixels = encoders[name], families.draw_noise(name)
    projection = projection_of(encoder)
    assert (projection is None) == (name in WITHOUT_MATRIX)
    last: Any = encoder.model.visual.head if projection is None else None  # type: ignore[union-attr]
    head = functional.linear if projection else lambda pooled, *_: last(pooled)
    count = find_tower(encoder.model)
    choice = choose_layers(count, ["head"], False, "key")
    pooled, (cells,) = pool_batch(encoder, pixels, choice.layers)
    weight, bias = projection or (None, None)
    for found, expected in zip((pooled, cells), encoder.embed_images(pixels), strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(head(found, weight, bias) / scale, expected / scale, atol=1e-5, rtol=0)
