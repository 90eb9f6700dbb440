"""From the text of a class to where its images lie: ridge regression fitted on classes that have images.

    minimise   sum over classes c of |p_c - W e_c - b|^2 + penalty |W|^2        p_c the mean of c's images, b is free

e_c is the vector of c's text, divided by the root of the mean squared distance of these vectors from their mean, so
that one grid of penalties fits every encoder. Every class counts once. A class left out is predicted by the others
alone, exactly and with the intercept refitted (layers/ridge.py). Such a map is the oldest way to classes without images
(zero-shot learning from attributes or texts); in this form it is ours [design].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.layers.ridge import Rows, basis_of_kernel

ALIKE = 1e-12  # a mean squared distance of unit vectors that is rounding
TEACHERS = 3  # classes at least: of two, the map that is fitted without one says where the other lies
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class TextMap:
    """All in float64."""

    def __init__(self, texts: Tensor, means: Tensor) -> None:
        """texts (C, E) and means (C, r) of C >= 2 classes with images."""
        texts, self.means = texts.double(), means.double()
        self.centre = texts.mean(0)
        spread = (texts - self.centre).square().sum(1).mean()
        self.unit = spread.sqrt() if spread > ALIKE else torch.ones_like(spread)
        self.texts = (texts - self.centre) / self.unit
        rows = Rows(
            *(len(texts), 1, texts.shape[1], len(texts)),
            x=lambda chunk: self.texts[chunk][None],
            y=lambda chunk: self.means[chunk],
        )
        self.basis = basis_of_kernel(self.texts @ self.texts.T, rows)

    def predict(self, texts: Tensor, penalty: float) -> Tensor:
        """Where the images of classes with these texts (C', E) are expected: (C', r)."""
        coefficients = self.basis.solve(penalty)  # they sum to 0 over classes
        return ((texts.double() - self.centre) / self.unit) @ (self.texts.T @ coefficients) + self.means.mean(0)

    def left_out(self, penalty: float) -> Tensor:
        """What the map without a class says of it: (C, r)."""
        everything = slice(0, len(self.means))
        return self.basis.left_out(self.basis.u(everything), self.means, penalty)[0]


def explained(means: Tensor, left_out: Tensor) -> tuple[float, float]:
    """The mean squared error of what is said of classes left out, and the share of their spread that it explains.

    means and left_out (C, r). The spread is about the mean of the other classes, as the error is; the share is under 0
    where the texts mislead.
    """
    count = len(means)
    error = (means - left_out).square().sum(1).mean().item()
    spread = means.var(0, correction=0).sum().item() * (count / (count - 1)) ** 2
    return error, 1 - error / max(spread, ALIKE)


def least_error(text_map: TextMap, penalties: Sequence[float]) -> float:
    """The penalty at which classes left out are predicted best, by the squared error; of equals the first."""
    return min(penalties, key=lambda penalty: explained(text_map.means, text_map.left_out(penalty))[0])
