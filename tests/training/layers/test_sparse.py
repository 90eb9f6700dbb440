"""The L1 path: against scikit-learn's saga, the conditions of an optimum by a loop, and the number asked for."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from training.layers import sparse
from training.layers.sparse import SHARE, TOLERANCE, ColumnScale, Problem, Sparse, fit_sparse, sparse_layers

N, M, C = 240, 30, 4


def sparse_at(features: Tensor, labels: Tensor, classes: int, nec: float) -> tuple[Tensor, Tensor]:
    """Weight and bias at one number."""
    found = sparse_layers(features, labels, classes, [nec])[0]
    return found.weight, found.bias


def sparse_path(
    features: Tensor, labels: Tensor, classes: int, share: float = SHARE, tolerance: float = TOLERANCE
) -> Iterator[Sparse]:
    """The layers of all penalties, the strongest first."""
    problem = Problem(features, labels, classes, share, tolerance)
    return (problem.layer(point) for point in problem.path())


def planted(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Columns of one scale that are correlated and off centre; three of them tell each class. Labels are noisy."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(N, M, generator=draw, dtype=torch.float64) @ (
        torch.eye(M, dtype=torch.float64) + 0.3 * torch.randn(M, M, generator=draw, dtype=torch.float64) / M**0.5
    )
    x = (x - x.mean(0)) / x.std(0, correction=0)
    logits = 1.5 * x[:, : 3 * C].unflatten(1, (C, 3)).sum(2)
    return x.to(dtype), torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]


def objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, penalty: float, share: float) -> float:
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y)
    return float(loss + penalty * (share * weight.abs().sum() + (1 - share) / 2 * weight.square().sum()))


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_the_path_is_that_of_scikit_learn(share: float) -> None:
    x, y = planted()
    points = list(itertools.islice(sparse_path(x, y, C, share, 1e-8), 16))
    for point in points[3::4]:
        saga = LogisticRegression(
            C=1 / (N * point.penalty), l1_ratio=share, solver="saga", tol=1e-9, max_iter=20_000
        ).fit(x.numpy(), y.numpy())
        theirs = torch.from_numpy(saga.coef_), torch.from_numpy(saga.intercept_)
        values = [objective(x, y, *layer, point.penalty, share) for layer in ((point.weight, point.bias), theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-9)
        for ours, other in zip((point.weight, point.bias), theirs, strict=True):
            # A number added to a column for all classes changes nothing that is said; by L1 alone it may cost nothing.
            torch.testing.assert_close(ours - ours.mean(0), other - other.mean(0), atol=1e-5, rtol=0)
        assert 0 < point.nec < M


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-2)])
def test_every_weight_meets_the_conditions_of_an_optimum(dtype: torch.dtype, tolerance: float) -> None:
    x, y = planted(dtype)
    a = x.double().numpy()
    for point in itertools.islice(sparse_path(x, y, C, 0.9, tolerance), 20):
        w, b = point.weight.double().numpy(), point.bias.double().numpy()
        logits = a @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        allowed = tolerance * point.penalty + 1e-6
        for c in range(C):
            off = p[:, c] - (y == c).numpy()
            assert abs(off.mean()) <= allowed  # the bias is free
            for k in range(M):
                slope = (off * a[:, k]).mean() + point.penalty * 0.1 * w[c, k]
                if w[c, k]:
                    assert abs(slope + point.penalty * 0.9 * np.sign(w[c, k])) <= allowed
                else:
                    assert abs(slope) <= point.penalty * 0.9 + allowed
        assert point.violation <= tolerance


def test_the_path_begins_where_all_weights_are_zero_and_not_before() -> None:
    x, y = planted()
    first, second = itertools.islice(sparse_path(x, y, C), 2)
    assert first.nec == 0
    assert second.nec > 0
    shares = torch.bincount(y, minlength=C) / N
    torch.testing.assert_close(first.bias.softmax(0), shares.double())


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_concepts_is_met_and_never_passed(seed: int) -> None:
    x, y = planted(torch.float32, seed)
    for wanted in (1.0, 5.0, 10.0):
        weight, _ = sparse_at(x, y, C, wanted)
        assert wanted - 1 < weight.count_nonzero().item() / C <= wanted


def test_one_walk_says_what_a_walk_for_each_number_says() -> None:
    x, y = planted(torch.float32)
    for together, wanted in zip(sparse_layers(x, y, C, [10.0, 2.0, 5.0]), [10.0, 2.0, 5.0], strict=True):
        weight, bias = sparse_at(x, y, C, wanted)
        assert torch.equal(together.weight, weight)
        assert torch.equal(together.bias, bias)
        assert together.nec == weight.count_nonzero().item() / C


def test_what_classes_are_told_by_is_found() -> None:
    """Class c is told by columns 3c, 3c + 1, 3c + 2 alone."""
    x, y = planted(torch.float32)
    weight, _ = sparse_at(x, y, C, 3.0)
    strongest = weight.abs().topk(2, dim=1).indices
    assert torch.equal(strongest // 3, torch.arange(C)[:, None].expand(C, 2))


def test_columns_count_alike_whatever_their_unit_and_place() -> None:
    x, y = planted()
    unit = torch.logspace(-3, 3, M, dtype=torch.float64)
    plain, moved = (sparse_layers(one, y, C, [5.0], tolerance=1e-6)[0] for one in (x, x * unit + 7.0))
    torch.testing.assert_close(moved.weight * unit, plain.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((x * unit + 7) @ moved.weight.T + moved.bias, x @ plain.weight.T + plain.bias)


def test_columns_that_come_in_together_are_not_split_and_the_number_not_passed() -> None:
    x, y = planted()
    weight, _ = sparse_at(torch.cat([x[:, :1]] * 20, 1), y, C, 5.0)  # twenty times the same
    assert weight.count_nonzero().item() / C <= 5


def test_a_column_that_never_changes_and_a_class_without_images_have_no_weight() -> None:
    x, y = planted(torch.float32)
    x[:, 0] = 3.1
    weight, bias = sparse_at(x, y, C + 1, 5.0)
    assert not weight[:, 0].any()
    assert not weight[C].any()
    assert int((x @ weight.T + bias).argmax(1).max()) < C
    assert 4 < weight.count_nonzero().item() / C <= 5  # a class that is never said is not counted


def test_one_class_alone_needs_no_weight() -> None:
    x, _ = planted(torch.float32)
    weight, bias = sparse_at(x, torch.zeros(N, dtype=torch.long), 1, 5.0)
    assert not weight.any()
    assert bias.tolist() == [0.0]


def test_probabilities_are_labels_too() -> None:
    x, y = planted(torch.float32)
    told = torch.nn.functional.one_hot(y, C).float()
    for ours, same in zip(sparse_at(x, told, C, 5.0), sparse_at(x, y, C, 5.0), strict=True):
        assert torch.equal(ours, same)
    shared = sparse_at(x, torch.full((N, C), 1 / C), C, 5.0)[0]
    assert not shared.any()  # told nothing, it says nothing


def test_without_a_bound_the_path_is_walked_to_its_end() -> None:
    x, y = planted(torch.float32)
    *_, last = sparse_path(x, y, C)
    weight, _ = sparse_at(x, y, C, math.inf)
    assert torch.equal(weight, last.weight)
    assert last.nec > 20
    first: Sparse = next(sparse_path(x, y, C))
    assert last.penalty == pytest.approx(1e-3 * first.penalty, rel=0.25)


def test_what_is_kept_is_fitted_anew_under_l2_and_val_chooses_the_strength() -> None:
    """The gradient by what is kept is 0, and what is not kept stays 0; columns are in units of their own."""
    x, y = planted(torch.float32)
    unit = torch.logspace(-1, 1, M)
    kept = sparse_at(x * unit + 3, y, C, 4.0)[0] != 0
    chosen = fit_sparse(x * unit + 3, y, x[:80] * unit + 3, y[:80], C, 4.0, [0.3, 0.01])
    assert torch.equal(chosen.linear.weight != 0, kept)
    best = max(chosen.history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert chosen.l2 == best["l2"]
    assert best["nec"] == kept.sum().item() / C
    linear = chosen.linear.double().requires_grad_(False)
    weight = (linear.weight * unit).requires_grad_()  # on standardised columns, where the penalty is
    bias = (linear.bias + 3 * linear.weight.sum(1)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y)
    (loss + chosen.l2 / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad[kept].abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4
    assert weight.grad[~kept].abs().max() > 1e-2  # so that the mask is what holds them


@pytest.mark.parametrize("rows", [4096, 7])
def test_columns_are_standardised_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """As numpy says at once, far from zero too, where sums of squares would lose all digits; two rows, or none, too."""
    monkeypatch.setattr(sparse, "ROWS", rows)
    x = planted(torch.float32)[0] * 1e-2 + 100
    scale, whole = ColumnScale.measure(x), x.double().numpy()
    np.testing.assert_allclose(scale.mean.numpy(), whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scale.scale.numpy(), whole.std(0), rtol=1e-9)
    for some in (x, x[:2], x[:0]):
        found = scale.of(some)
        assert found.dtype == torch.float32
        expected = (some.double().numpy() - whole.mean(0)) / whole.std(0)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    columns = torch.tensor([4, 0])
    torch.testing.assert_close(scale.only(columns).of(x[:, columns]), scale.of(x)[:, columns], rtol=0, atol=0)


def test_no_copy_of_all_features_is_made_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """And they are standardised once, though a path and a fit beside it read them."""
    seen: list[tuple[str, int]] = []
    widen, measure = Tensor.double, ColumnScale.measure.__func__  # type: ignore[attr-defined]

    def count(self: Tensor) -> Tensor:
        seen.append(("double", self.numel()))
        return widen(self)

    def count_measure(cls: type[ColumnScale], features: Tensor) -> ColumnScale:
        seen.append(("measure", len(features)))
        return measure(cls, features)

    monkeypatch.setattr(sparse, "ROWS", 7)
    monkeypatch.setattr(Tensor, "double", count)
    monkeypatch.setattr(ColumnScale, "measure", classmethod(count_measure))
    x, y = planted(torch.float32)
    fit_sparse(x, y, x[:80], y[:80], C, 4.0, [0.1])
    assert max(size for kind, size in seen if kind == "double") < N * M
    assert [size for kind, size in seen if kind == "measure"] == [N]
