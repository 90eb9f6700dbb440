import torch
from torch import nn
from torch.nn import functional as F

from training.layers.attention import Attention, TransformerBlock, pick


def test_it_is_pytorch_s_own_and_tells_its_maps() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(
        {
            "into.weight": theirs.in_proj_weight, "into.bias": theirs.in_proj_bias,
            "out.weight": theirs.out_proj.weight, "out.bias": theirs.out_proj.bias,
        }
    )  # fmt: skip
    x = torch.randn(2, 5, 12)
    for asking in (x, x[:, :1]):
        expected, maps = theirs(asking, x, x, average_attn_weights=False)
        found, ours_maps = ours(asking, x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours_maps, maps)


def test_what_is_masked_is_as_if_it_were_not_there() -> None:
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    found, maps = attention(x, x, mask)
    expected, expected_maps = attention(x[:1], x[:1, mask[0]])
    torch.testing.assert_close(found[:1], expected)
    torch.testing.assert_close(maps[:1, :, :, mask[0]], expected_maps)
    assert not maps[0, :, :, ~mask[0]].any()
    torch.testing.assert_close(found[1:], attention(x[1:], x[1:])[0])


def test_a_block_is_pytorch_s_own_and_its_first_rows_are_those_of_all() -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    ours = TransformerBlock(8, 2, 32, 0.0)
    names = {
        "norm": "norm1", "attention.out": "self_attn.out_proj", "mlp.0": "norm2", "mlp.1": "linear1", "mlp.4": "linear2"
    }  # fmt: skip
    state = theirs.state_dict()
    weights = {f"{own}.{kind}": state[f"{other}.{kind}"] for own, other in names.items() for kind in ("weight", "bias")}
    into = {f"attention.into.{kind}": state[f"self_attn.in_proj_{kind}"] for kind in ("weight", "bias")}
    ours.load_state_dict(weights | into)
    x, mask = torch.randn(3, 5, 8), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, mask, 1), theirs(x, src_key_padding_mask=~mask)[:, :1])


def test_each_head_picks_its_highest_and_two_may_pick_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(4, 7, 3, generator=generator), torch.rand(4, 2, 7, generator=generator)
    scores[1, :, 5] = 2.0
    found = pick(x, scores)
    for image in range(4):
        for head in range(2):
            assert torch.equal(found[image, head], x[image, max(range(7), key=lambda t: float(scores[image, head, t]))])
    assert torch.equal(found[1, 0], found[1, 1])
