import numpy as np
import pytest
import torch

from training.layers.text_map import TextMap, explained, least_error

PENALTIES = (0.01, 0.3, 3.0, 100.0)


def planted(classes: int, texts: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    e = torch.nn.functional.normalize(torch.randn(classes, texts, generator=rng) + 1, dim=1)
    p = e @ torch.randn(texts, 7, generator=rng) + noise * torch.randn(classes, 7, generator=rng)
    return e, p


def explicit(e: np.ndarray, p: np.ndarray, penalty: float, new: np.ndarray, unit: float) -> np.ndarray:
    """Ridge by the normal equations, with an intercept that is not penalised."""
    design = np.hstack([e / unit, np.ones((len(e), 1))])
    cost = penalty * np.diag([1.0] * e.shape[1] + [0.0])
    weight = np.linalg.solve(design.T @ design + cost, design.T @ p)
    return np.hstack([new / unit, np.ones((len(new), 1))]) @ weight


@pytest.mark.parametrize("texts", [4, 30])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_equals_an_explicit_ridge_and_as_many_refits(texts: int, penalty: float) -> None:
    """With fewer and with more dimensions than classes."""
    e, p = planted(12, texts)
    new, _ = planted(5, texts)
    text_map = TextMap(e, p)
    x, y = e.double().numpy(), p.double().numpy()
    unit = float(np.sqrt(np.square(x - x.mean(0)).sum(1).mean()))
    expected = explicit(x, y, penalty, new.double().numpy(), unit)
    np.testing.assert_allclose(text_map.predict(new, penalty).numpy(), expected, atol=1e-7)
    for left in range(12):
        rest = np.arange(12) != left
        alone = explicit(x[rest], y[rest], penalty, x[left : left + 1], unit)[0]
        np.testing.assert_allclose(text_map.left_out(penalty)[left].numpy(), alone, atol=1e-7)


def test_what_is_explained_of_classes_left_out() -> None:
    e, p = planted(40, 4, noise=0.0)
    text_map = TextMap(e, p)
    assert explained(text_map.means, text_map.left_out(1e-6))[1] == pytest.approx(1, abs=1e-6)
    # A map that says nothing says the mean of the others, and that explains nothing, exactly.
    assert explained(text_map.means, text_map.left_out(1e12))[1] == pytest.approx(0, abs=1e-6)
    mean = p.double().mean(0)
    assert torch.allclose(text_map.predict(e, 1e12), mean.expand(40, -1), atol=1e-9)
    misleading = TextMap(e.roll(1, 0), p)
    assert explained(misleading.means, misleading.left_out(1e-6))[1] < 0


def test_the_penalty_with_which_classes_left_out_are_predicted_best() -> None:
    e, p = planted(12, 30, noise=0.3)
    text_map = TextMap(e, p)
    errors = [(p.double() - text_map.left_out(penalty)).square().sum().item() for penalty in PENALTIES]
    assert least_error(text_map, PENALTIES) == PENALTIES[int(np.argmin(errors))]
    assert 0 < int(np.argmin(errors)) < len(PENALTIES)


def test_texts_that_are_all_alike_say_nothing() -> None:
    e, p = planted(6, 4)
    text_map = TextMap(e[:1].expand(6, -1), p)
    assert torch.allclose(text_map.predict(e[:1], 0.1)[0], p.double().mean(0), atol=1e-9)
    assert explained(text_map.means, text_map.left_out(0.1))[1] == pytest.approx(0, abs=1e-9)
