import torch
from torch import nn

from training.layers.attention import Attention, pick


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


def test_each_head_picks_its_highest_and_two_may_pick_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(4, 7, 3, generator=generator), torch.rand(4, 2, 7, generator=generator)
    scores[1, :, 5] = 2.0
    found = pick(x, scores)
    for image in range(4):
        for head in range(2):
            assert torch.equal(found[image, head], x[image, max(range(7), key=lambda t: float(scores[image, head, t]))])
    assert torch.equal(found[1, 0], found[1, 1])
