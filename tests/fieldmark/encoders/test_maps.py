"""The rule of the dense tokens, on image towers of tiny timm models with every kind of pooling."""

import pytest
import torch
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from fieldmark.command import UserError
from fieldmark.encoders.maps import image_features


def test_a_transformer_whose_pooling_knows_the_places_is_refused() -> None:
    visual = timm_tower("test_vit", "map", "none")
    pixels = torch.zeros(1, 3, 160, 160)
    image_features(visual, pixels, "mine")
    visual.trunk.attn_pool.pos_embed = nn.Parameter(torch.zeros(100, 64))
    with pytest.raises(UserError, match=r"encoders\.mine: VisionTransformer: .* a learned position"):
        image_features(visual, pixels, "mine")


# Every kind of pooling, with and without CLS token, register token, and a norm or a projection after it.
TOWERS = [
    ("test_vit", "token", "linear"),
    ("test_vit", "token", ""),
    ("test_vit", "avg", "mlp"),
    ("test_vit", "avg", ""),
    ("test_vit", "map", "none"),
    ("test_vit2", "avg", "linear"),
    ("test_vit3", "map", "linear"),
    ("test_vit4", "avg", "linear"),
    ("test_vit_relpos", "avg", "linear"),
    ("test_byobnet", "avg", "linear"),
    ("test_byobnet", "rot_attn", ""),
    ("test_convnext", "rot_attn", "linear"),
]


def timm_tower(trunk: str, pool: str, projection: str) -> TimmModel:
    """open_clip's tower of a tiny trunk, each weight of it moved so that no layer passes its input on unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        visual = TimmModel(trunk, 16, pool=pool, proj=projection).eval().requires_grad_(False)
        for parameter in visual.parameters():
            parameter += 0.2 * torch.randn_like(parameter) * (1 if parameter.ndim < 2 else parameter.std())
    return visual


def timm_pixels(visual: TimmModel) -> Tensor:
    return torch.randn(2, *visual.trunk.default_cfg["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("trunk", "pool", "projection"), TOWERS)
def test_a_map_of_equal_cells_has_tokens_equal_to_the_global_row(
    trunk: str, pool: str, projection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = timm_tower(trunk, pool, projection)
    pixels = timm_pixels(visual)
    pooled, tokens = image_features(visual, pixels, "mine")
    torch.testing.assert_close(pooled, visual(pixels), atol=0, rtol=0)
    assert tokens.std(dim=(1, 2)).min() > 1e-4
    features = visual.trunk.forward_features(pixels)
    one = features[:, -1:] if features.ndim == 3 else features[:, :, -1:, -1:]
    monkeypatch.setattr(visual.trunk, "forward_features", lambda pixels: one.expand_as(features).contiguous())
    pooled, equal = image_features(visual, pixels, "mine")
    torch.testing.assert_close(equal, pooled[:, None, None].expand_as(equal), atol=1e-5, rtol=1e-5)
    # The token of a cell is of that cell: the same one as in the map that it came from.
    torch.testing.assert_close(equal[:, 0, 0], tokens[:, -1, -1], atol=1e-5, rtol=1e-5)
    assert (pooled[0] - pooled[1]).abs().max() > 1e-4


@pytest.mark.parametrize("trunk", ["test_vit", "test_byobnet"])
def test_the_mean_of_averaged_cells_is_the_global_row(trunk: str) -> None:
    visual = timm_tower(trunk, "avg", "linear")
    pooled, tokens = image_features(visual, timm_pixels(visual), "mine")
    torch.testing.assert_close(tokens.mean(dim=(1, 2)), pooled, atol=1e-5, rtol=1e-5)


def test_cls_pooling_takes_each_patch_where_the_cls_token_stood() -> None:
    visual = timm_tower("test_vit", "token", "linear")
    pixels = timm_pixels(visual)
    pooled, tokens = image_features(visual, pixels, "mine")
    features = visual.trunk.forward_features(pixels) @ visual.head.proj.weight.T
    torch.testing.assert_close(pooled, features[:, 0])
    torch.testing.assert_close(tokens, features[:, 1:].reshape(2, 10, 10, 16))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_rows_and_columns_of_a_transformer_stay_in_place(pool: str) -> None:
    visual = timm_tower("test_vit", pool, "none")
    visual.set_input_size((64, 96))
    # Without its blocks a patch changes its own token and no other.
    visual.trunk.blocks = nn.Identity()
    blank = torch.zeros(1, 3, 64, 96)
    before = image_features(visual, blank, "mine")[1][0]
    assert before.shape == (4, 6, 64)
    for row, column in ((0, 0), (0, 5), (1, 2), (3, 0), (3, 5)):
        pixels = blank.clone()
        pixels[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 2.0
        change = (image_features(visual, pixels, "mine")[1][0] - before).norm(dim=-1)
        assert (change > 1e-3).nonzero().tolist() == [[row, column]]


def test_prefix_tokens_are_no_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    # CLS token; attention pooling reads it too.
    visual = timm_tower("test_vit3", "map", "linear")
    pixels = timm_pixels(visual)
    pooled, tokens = image_features(visual, pixels, "mine")
    features = visual.trunk.forward_features(pixels)
    features[:, 0] += 5.0
    monkeypatch.setattr(visual.trunk, "forward_features", lambda pixels: features)
    changed, same = image_features(visual, pixels, "mine")
    assert torch.equal(same, tokens)
    assert (changed - pooled).abs().max() > 1e-4


def test_towers_of_other_kinds_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"encoders\.mine: no rule for the dense tokens of a Linear"):
        image_features(torch.nn.Linear(1, 1), torch.zeros(1, 3, 8, 8), "mine")
