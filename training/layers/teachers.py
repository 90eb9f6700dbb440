"""What images of classes that are lent teach: how images of a class spread, and where classes lie.

    S      = covariance within these classes, of x (layers/features.py), measured on them too
    S^-1 d = within the space that their images span by its eigenvectors; beside it S, shrunk, is round

So nothing has to be found anew for few images of other classes, which lie a little beside that space: their means are
whitened as they are.

A study lends the same classes to many runs, and a process remembers what the last KEPT sets of images taught, by the
sha256 of their vectors and labels. For n images of F numbers that is 8 F min(n, F) bytes each: 100 MB at 1,500 of
8,600.
"""

import hashlib
from typing import NamedTuple

from torch import Tensor

from training.data import Cache
from training.layers.blocks import Span
from training.layers.features import Features, FeatureSettings, Transform
from training.layers.gaussian import Spread
from training.layers.ridge import training_targets
from training.methods.prototypes import class_means

KEPT = 2  # a study goes from one set of vectors to another and back


class Teachers(NamedTuple):
    features: Features
    span: Span  # of all images of these classes
    spread: Spread  # within the span
    trace: float  # tr(S)
    centres: Tensor  # (T, r): the means of the classes with images, within the span
    taught: Tensor  # (C',) bool: which these are

    def whiten(self, means: Tensor, shrinkage: float) -> Tensor:
        """S^-1 d (C, F) of rows d (C, F), S shrunk as layers/gaussian.py says."""
        inside = self.span.into(means)
        beside = (means - self.span.back(inside)) / (shrinkage * self.spread.mean)
        return self.span.back(self.spread.whiten(inside, shrinkage)) + beside


# By all that they were made from, the last one last.
remembered: dict[str, Teachers] = {}


def teach(lent: Cache, names: tuple[str, ...], transform: Transform) -> Teachers:
    """From all training images of a cache, in float64."""
    features = Features.measure(lent, FeatureSettings(features=list(names), transform=transform))
    x, told = features.of_training(lent), training_targets(lent)
    seen = hashlib.sha256(repr((names, transform, str(x.device))).encode())
    for tensor in (x, told, *features.state_dict().values()):
        seen.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.cpu().contiguous().numpy())
    key = seen.hexdigest()
    found = remembered.pop(key, None) or learn(features, x.double(), told)
    remembered[key] = found
    for old in list(remembered)[:-KEPT]:
        del remembered[old]
    return found


def learn(features: Features, x: Tensor, told: Tensor) -> Teachers:
    """Of rows x (n, F) and what training is told of each (n, C')."""
    span = Span(x)
    centres, covariance, taught = class_means(span.into(x), told)
    spread = Spread(covariance, features.size)
    return Teachers(features, span, spread, covariance.trace().item(), centres[taught], taught)
