"""What layers of every kind of tower hold, and rollout against the product of attention maps written out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from timm.models import ResNet
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.command import UserError
from fieldmark.encoders.layers import (
    Attention,
    LayerChoice,
    attention_rollout,
    choose_layers,
    find_tower,
    hidden_states,
    queries_and_keys,
    record_attention,
    run_layers,
)

KEY = "params.yaml: tokens.mine"
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64}
NARROW: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
SWIN: dict[str, Any] = {
    "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2, "img_size": 64,
}  # fmt: skip


def open_clip_vit(**options: Any) -> nn.Module:
    return VisionTransformer(
        image_size=64, patch_size=16, width=32, layers=3, heads=2, mlp_ratio=2, output_dim=8, **options
    )


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=0, **options)


# ViTs of 4 x 4 cells with a CLS token, three blocks and two heads, and how many tokens stand before the cells.
VITS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "open_clip": (1, open_clip_vit),
    "open_clip, layer scale": (1, lambda: open_clip_vit(ls_init_value=0.5)),
    "open_clip, norms of q and k": (1, lambda: open_clip_vit(qk_norm=True, scale_heads=True)),
    "open_clip, attentional pooling": (1, lambda: open_clip_vit(attentional_pool=True, qk_norm=True)),
    "timm": (1, of_timm("vit_tiny_patch16_224", **SMALL)),
    "DINOv2 with registers": (5, of_timm("vit_small_patch14_reg4_dinov2", **SMALL, patch_size=16)),
    "DINOv3": (5, of_timm("vit_base_patch16_dinov3", **SMALL)),
    "EVA-02": (1, of_timm("eva02_base_patch16_clip_224", **SMALL)),
    "norms of q and k": (1, of_timm("vit_tiny_patch16_224", **SMALL, qk_norm=True)),
    "BEiT": (1, of_timm("beit_base_patch16_224", **SMALL)),
    "relative positions": (1, of_timm("vit_relpos_medium_patch16_cls_224", **SMALL)),
    "distilled": (2, of_timm("deit_base_distilled_patch16_224", **SMALL)),
}
# Towers without CLS: the (h, w, D) of each layer.
OTHERS: dict[str, tuple[list[tuple[int, int, int]], Callable[[], nn.Module]]] = {
    "SigLIP": ([(4, 4, 32)] * 3, of_timm("vit_base_patch16_siglip_224", **SMALL)),
    "registers alone": ([(4, 4, 32)] * 3, of_timm("vit_base_patch16_rope_reg1_gap_256", **SMALL)),
    "Swin": ([(16, 16, 16), (8, 8, 32), (4, 4, 64), (2, 2, 128)], of_timm("swin_base_patch4_window7_224", **SWIN)),
    "ConvNeXt": ([(16, 16, 8), (8, 8, 16), (4, 4, 16), (2, 2, 32)], of_timm("convnext_atto", **NARROW)),
    "ResNet": (
        [(32, 32, 64), (16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512)], of_timm("resnet10t"),
    ),
    "CLIP's ResNet": (
        [(16, 16, 8), (16, 16, 32), (8, 8, 64), (4, 4, 128), (2, 2, 256)],
        lambda: ModifiedResNet(layers=[1, 1, 1, 1], output_dim=8, heads=2, image_size=64, width=8),
    ),
}  # fmt: skip


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A random tower, its attention far from even."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make().eval().requires_grad_(False)
        for name, weight in tower.named_parameters():
            if name.endswith(("qkv.weight", "in_proj_weight")):
                nn.init.normal_(weight[: 2 * len(weight) // 3], std=0.3)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                nn.init.normal_(weight, std=0.3)
            if name in ("cls_token", "reg_token"):
                nn.init.normal_(weight)
            if "gamma" in name:
                nn.init.ones_(weight)
    return tower


@pytest.fixture(scope="module")
def towers() -> dict[str, nn.Module]:
    return {name: build(make) for name, (_, make) in (VITS | OTHERS).items()}


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def blocks_of(tower: Any) -> list[Any]:
    return list(tower.transformer.resblocks if isinstance(tower, VisionTransformer) else tower.blocks)


def outputs_of(parts: list[Any], tower: Any, pixels: Tensor) -> list[Tensor]:
    """What modules give in a plain forward pass of the tower."""
    outputs: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for part in parts]
    with torch.inference_mode():
        tower(pixels)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


@pytest.mark.parametrize("name", VITS)
def test_layers_of_a_vit_are_what_leaves_its_blocks(name: str, towers: dict[str, nn.Module], pixels: Tensor) -> None:
    tower, prefix = towers[name], VITS[name][0]
    expected = outputs_of(blocks_of(tower), tower, pixels)
    choice = choose_layers(tower, [-1, 0], False, KEY)
    assert choice == LayerChoice([0, 2], None)
    with torch.inference_mode():
        hidden = hidden_states(tower, pixels, choice, KEY)
    assert hidden.rollout.shape == (2, 0, 0)
    for cells, cls, tokens in zip(hidden.cells, hidden.cls, (expected[0], expected[2]), strict=True):
        assert cells.shape == (2, 4, 4, 32)
        torch.testing.assert_close(cells.flatten(1, 2), tokens[:, prefix:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(cls, tokens[:, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_a_tower_without_cls(name: str, towers: dict[str, nn.Module], pixels: Tensor) -> None:
    tower, shapes = towers[name], OTHERS[name][0]
    choice = choose_layers(tower, range(len(shapes)), False, KEY)
    with torch.inference_mode():
        hidden = hidden_states(tower, pixels, choice, KEY)
    assert [tuple(cells.shape[1:]) for cells in hidden.cells] == shapes
    assert [tuple(cls.shape) for cls in hidden.cls] == [(2, 0)] * len(shapes)
    assert all(cells.isfinite().all() and cells.std() > 0 for cells in hidden.cells)


def test_stages_are_what_leaves_them(towers: dict[str, nn.Module], pixels: Tensor) -> None:
    swin, resnet, clip_resnet = towers["Swin"], towers["ResNet"], towers["CLIP's ResNet"]
    cases: list[tuple[Any, list[Any], int, bool]] = [
        (swin, list(swin.layers), 0, False),  # type: ignore[arg-type]
        (resnet, [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4], 1, True),
        (clip_resnet, [clip_resnet.layer1, clip_resnet.layer2, clip_resnet.layer3, clip_resnet.layer4], 1, True),
    ]
    for tower, stages, first, channels_first in cases:
        chosen = list(range(first, first + len(stages)))
        with torch.inference_mode():
            hidden = hidden_states(tower, pixels, LayerChoice(chosen, None), KEY)
        for cells, output in zip(hidden.cells, outputs_of(stages, tower, pixels), strict=True):
            expected = output.permute(0, 2, 3, 1) if channels_first else output
            torch.testing.assert_close(cells, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_cells_stand_where_the_picture_is(name: str, towers: dict[str, nn.Module]) -> None:
    """A change in the lower left corner moves a cell of the first layer's lower left quarter most."""
    before = torch.zeros(1, 3, 64, 64)
    after = before.clone()
    after[:, :, 60:, :4] = 5
    with torch.inference_mode():
        first = LayerChoice([0], None)
        one, other = (hidden_states(towers[name], each, first, KEY).cells[0] for each in (before, after))
    moved = (other - one).norm(dim=-1)[0]
    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert row >= moved.shape[0] / 2
    assert column < moved.shape[1] / 2


def written_out(tower: Any, pixels: Tensor) -> list[Tensor]:
    """The attention maps (n, heads, T, T) of every block, as the library itself makes them without its kernels."""
    blocks, maps = blocks_of(tower), []
    if isinstance(blocks[0].attn, nn.MultiheadAttention):
        for block, tokens in zip(blocks, outputs_of([block.ln_1 for block in blocks], tower, pixels), strict=True):
            maps.append(block.attn(tokens, tokens, tokens, average_attn_weights=False)[1])
        return maps
    for block in blocks:
        block.attn.fused_attn = False
    try:
        return outputs_of([block.attn.attn_drop for block in blocks], tower, pixels)
    finally:
        for block in blocks:
            block.attn.fused_attn = True


# open_clip's attention with norms fails without its kernel: the test after this one is its proof.
@pytest.mark.parametrize("name", [name for name in VITS if "open_clip, norms" not in name and "pooling" not in name])
def test_maps_and_rollout_are_the_librarys_own_maps_and_their_product(
    name: str, towers: dict[str, nn.Module], pixels: Tensor
) -> None:
    tower, prefix = towers[name], VITS[name][0]
    expected = written_out(tower, pixels)
    with torch.inference_mode(), record_attention(tower) as kept:
        run_layers(tower, pixels, [2])
    for attention, own in zip(kept, expected, strict=True):
        torch.testing.assert_close(attention.rows(), own, atol=1e-5, rtol=1e-4)
    # A_2 A_1, the later one on the left; the last block has no part in it.
    product = expected[1] @ expected[0]
    with torch.inference_mode():
        for asked in ([-2], [0, 1, 2]):
            hidden = hidden_states(tower, pixels, choose_layers(tower, asked, True, KEY), KEY)
            torch.testing.assert_close(hidden.rollout, product[:, :, 0, prefix:], atol=1e-4, rtol=0)
            torch.testing.assert_close(hidden.rollout.sum(-1) + product[:, :, 0, :prefix].sum(-1), torch.ones(2, 2))
    # So it is not what a wrong order or another row would give.
    assert (expected[0] @ expected[1] - product)[:, :, 0].abs().max() > 1e-2
    assert (product[:, :, 1] - product[:, :, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", VITS)
def test_maps_times_values_are_the_blocks_own_output(
    name: str, towers: dict[str, nn.Module], pixels: Tensor
) -> None:
    """The map of each block, applied to its values, is what its own kernel gave."""
    tower: Any = towers[name]
    given: list[tuple[Tensor, Tensor]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if function is functional.scaled_dot_product_attention:
                given.append((args[2], output))
            return output

    with torch.inference_mode(), record_attention(tower) as kept, Watch():
        run_layers(tower, pixels, [2])
    blocks = blocks_of(tower)
    if isinstance(blocks[0].attn, nn.MultiheadAttention):
        tokens = outputs_of([block.ln_1 for block in blocks], tower, pixels)
        outputs = outputs_of([block.attn for block in blocks], tower, pixels)
        for block, attention, each, output in zip(blocks, kept, tokens, outputs, strict=True):
            weight, bias = block.attn.in_proj_weight[-32:], block.attn.in_proj_bias[-32:]
            value = functional.linear(each, weight, bias).unflatten(-1, (2, 16)).transpose(1, 2)
            mixed = (attention.rows() @ value).transpose(1, 2).flatten(2)
            torch.testing.assert_close(block.attn.out_proj(mixed), output, atol=1e-5, rtol=1e-5)
        return
    for attention, (value, output) in zip(kept, given, strict=True):
        torch.testing.assert_close(attention.rows() @ value, output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VITS)
def test_rollout_changes_no_bit_of_the_hidden_states(name: str, towers: dict[str, nn.Module], pixels: Tensor) -> None:
    tower = towers[name]
    with torch.inference_mode():
        plain, rolled = (
            hidden_states(tower, pixels, choose_layers(tower, [0, -2, -1], rollout, KEY), KEY)
            for rollout in (False, True)
        )
    assert all(map(torch.equal, [*plain.cells, *plain.cls], [*rolled.cells, *rolled.cls]))
    assert rolled.rollout.shape == (2, 2, 16)
    assert all(not part._forward_pre_hooks for part in tower.modules())


def attention_like(maps: Tensor) -> Attention:
    """An Attention whose map is `maps` (n, heads, T, T)."""
    return Attention(maps.new_zeros(*maps.shape[:3], 1), maps.new_zeros(*maps.shape[:3], 1), maps.log())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 7), st.integers(0, 2**31))
def test_a_row_at_a_time_is_the_product_of_whole_maps(depth: int, heads: int, count: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    maps = torch.randn(depth, 2, heads, count, count, generator=chance).softmax(-1)
    product = maps[0]
    for each in maps[1:]:
        product = each @ product
    row = attention_rollout([attention_like(each) for each in maps])
    torch.testing.assert_close(row, product[:, :, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(row.sum(-1), torch.ones(2, heads))


@given(st.permutations(range(1, 6)), st.permutations(range(1, 6)), st.integers(1, 5))
def test_cells_that_pass_on_one_cell_each_compose(first: list[int], second: list[int], looked_at: int) -> None:
    """CLS attends to one cell in the last map, each cell to one in those before: the composed image has all of it."""

    def passing_on(image: list[int]) -> Tensor:
        return torch.eye(6)[[0, *image]].expand(1, 3, 6, 6)

    last = torch.eye(6)
    last[0] = torch.eye(6)[looked_at]
    maps = [passing_on(first), passing_on(second), last.expand(1, 3, 6, 6)]
    row = attention_rollout([attention_like(each) for each in maps])
    assert row.argmax(-1).tolist() == [[first[second[looked_at - 1] - 1]] * 3]
    assert row.max() == 1
    same = list(range(1, 6))
    row = attention_rollout([attention_like(each) for each in (passing_on(same), passing_on(same), maps[-1])])
    assert row.argmax(-1).tolist() == [[looked_at] * 3]


def test_queries_and_keys_of_a_multihead_attention_without_bias() -> None:
    torch.manual_seed(0)
    attention, tokens = nn.MultiheadAttention(8, 2, bias=False, batch_first=True), torch.randn(3, 5, 8)
    expected = attention(tokens, tokens, tokens, average_attn_weights=False)[1]
    torch.testing.assert_close(queries_and_keys(attention, tokens).rows(), expected)
    query = tokens[:, None] / math.sqrt(2)
    row = Attention(query, query).rows(2)
    torch.testing.assert_close(row, (query @ query.mT / math.sqrt(8)).softmax(-1)[:, :, :2])


def test_a_half_precision_tower_gives_maps_in_float32(towers: dict[str, nn.Module], pixels: Tensor) -> None:
    for name in ("open_clip", "timm", "EVA-02"):
        tower = build(VITS[name][1])
        with torch.inference_mode():
            full = hidden_states(tower, pixels, LayerChoice([1], 1), KEY)
            half = hidden_states(tower.bfloat16(), pixels.bfloat16(), LayerChoice([1], 1), KEY)
        assert half.cells[0].dtype == torch.bfloat16
        assert half.rollout.dtype == torch.float32
        assert half.rollout.sum(-1).max() < 1 + 1e-5
        torch.testing.assert_close(half.rollout, full.rollout, atol=0.1, rtol=0)


def test_the_tower_of_a_loaded_model(models: dict[str, Path]) -> None:
    vit, conv = (open_clip.create_model(f"local-dir:{models[name]}") for name in ("vit", "conv"))
    assert isinstance(find_tower(vit), VisionTransformer)
    tower = find_tower(conv)
    assert isinstance(tower, ResNet)
    assert find_tower(tower) is tower


@pytest.mark.parametrize(
    ("name", "asked", "rollout", "words"),
    [
        ("timm", [0, 3], False, r"tokens\.mine\.layers: 3 is not there; this VisionTransformer has 0 to 2, or -3 to"),
        ("Swin", [-5], False, r"tokens\.mine\.layers: -5 is not there; this SwinTransformer has 0 to 3, or -4 to -1"),
        ("timm", [1, -2], False, r"tokens\.mine\.layers: \[1, -2\] are \[1, 1\] of 3, one of them twice; take one out"),
        ("ResNet", [-2], True, r"tokens\.mine\.rollout: a ResNet has no CLS token that looks at cells; set it"),
        ("SigLIP", [-2], True, r"tokens\.mine\.rollout: a VisionTransformer has no CLS token"),
        ("registers alone", [-2], True, r"tokens\.mine\.rollout: a Eva has no CLS token"),
        ("timm", [0, -1], True, r"tokens\.mine\.rollout: it is stored with the last layer but one, 1; add -2 to"),
    ],
)
def test_what_a_tower_cannot_give_is_told(
    name: str, asked: list[int], rollout: bool, words: str, towers: dict[str, nn.Module]
) -> None:
    with pytest.raises(UserError, match=rf"^params\.yaml: {words}"):
        choose_layers(towers[name], asked, rollout, KEY)


def test_towers_of_another_make_are_told() -> None:
    with pytest.raises(UserError, match=r"^params\.yaml: tokens\.mine\.layers: a Linear does not give its hidden"):
        choose_layers(nn.Linear(2, 2), [0], False, KEY)
    one = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 1})
    with pytest.raises(UserError, match=r"tokens\.mine\.rollout: it ends before the last block, and there is but one"):
        choose_layers(one, [0], True, KEY)
    # A block of TNT attends within cells too, and by other means.
    tnt = timm.create_model("tnt_s_patch16_224", depth=2).eval()
    with pytest.raises(UserError, match=r"tokens\.mine\.rollout: the blocks of a TNT do not each attend once"):
        hidden_states(tnt, torch.zeros(1, 3, 224, 224), choose_layers(tnt, [-2], True, KEY), KEY)
