import pytest
import torch

from training.layers.blocks import Dropout, GatedAttention, Standardise, normalise_adjacency


def ragged_graphs(generator: torch.Generator, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random symmetric weights with zeros among them, (B, n, n), and the mask (B, n)."""
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    upper = torch.rand(len(sizes), max(sizes), max(sizes), generator=generator).triu(1)
    upper = upper * (upper > 0.4) * mask[:, :, None] * mask[:, None, :]
    return upper + upper.transpose(1, 2), mask


def test_normalised_adjacency_ignores_padding() -> None:
    weight, mask = ragged_graphs(torch.Generator().manual_seed(1), [3, 5])
    noisy = weight + 7 * ~(mask[:, :, None] & mask[:, None, :])
    adjacency = normalise_adjacency(noisy, mask)
    torch.testing.assert_close(adjacency, normalise_adjacency(weight, mask))
    assert adjacency[0, 3:].abs().sum() == 0
    assert adjacency[0, :, 3:].abs().sum() == 0


def test_attention_is_a_distribution_over_real_nodes() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    weights = GatedAttention(4, 3)(torch.randn(2, 3, 4), mask)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert weights[~mask].abs().sum() == 0
    assert weights[1, 0] == 1


def test_standardise_centres_and_keeps_angles_finite() -> None:
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 3 + 5
    z = Standardise(x)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0).mean(), torch.tensor(1.0))
    assert Standardise(torch.ones(4, 3))(torch.ones(2, 3)).abs().sum() == 0


def test_dropout_keeps_the_mean_and_rests_at_evaluation() -> None:
    torch.manual_seed(0)
    x, dropout = torch.ones(500, 4, 50), Dropout(0.3)
    dropped = dropout(x)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (dropped[:, 0] != dropped[:, 1]).any()
    shared = Dropout(0.3, by_image=True)(x)
    assert (shared == shared[:, :1]).all()
    assert (shared == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16
    assert dropout.eval()(x) is x
    assert Dropout(0.0)(x) is x
