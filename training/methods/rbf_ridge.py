"""Ridge regression with a Gaussian kernel: as ridge, but the vectors of training images near by count, and not all.

    minimise   sum over rows of |y - f(x) - b|^2 + penalty |f|^2        f(x) = sum_i k(x, x_i) a_i, b is free
    k(x, x')   = exp(-|x - x'|^2 / (width d))                          d the mean squared distance of training rows

x is the probe's vector (layers/features.py), rows are training images in every view. Leaving each image out chooses
both knobs, exactly and with kernel and intercept as layers/ridge.py says; val chooses nothing. Cost grows with the cube
of the number of rows, and the model holds all of them.
"""

from collections.abc import Mapping

from pydantic import Field

from training.data import Cache, feature_words
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.kernels import KernelLayer, gauss
from training.layers.logistic import Positive
from training.layers.ridge import Basis, Build, Judged, basis_of_kernel, choose_left_out, training_rows
from training.layers.states import State, within
from training.methods import Fitted, grid
from training.methods.linear_probe import Probe

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads = feature_reads, feature_also_reads


class Settings(FeatureSettings):
    width: list[Positive] = Field(default=[1.0, 2.0], min_length=1)  # of the kernel, that leaving out chooses from
    penalty: list[Positive] = Field(
        default=[3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003], min_length=1
    )  # strengths that leaving out chooses from


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)
    held, rows = features.of_training(cache), training_rows(cache, features)
    # Twice the sum of the variances.
    mean_distance = 2 * held.double().var(0, correction=0).sum().item()

    def basis_of(point: Mapping[str, float]) -> tuple[Basis, Build]:
        distance = point["width"] * mean_distance
        kernel = gauss(held.double(), held.double(), distance)
        row = kernel.mean(0)
        basis = basis_of_kernel(kernel, rows)

        def build(penalty: float, judged: Judged) -> KernelLayer:
            coefficients = basis.solve(penalty)
            bias = basis.mean - row @ coefficients
            return KernelLayer(held, judged.scale * coefficients, judged.scale * bias, distance)

        return basis, build

    layer, chosen, history = choose_left_out(cache, features, grid(settings), basis_of)
    return Fitted(Probe(features, layer), history, chosen)


def build(state: State, settings: Settings, classes: int) -> Probe:
    kernel = KernelLayer.from_state(within(state, "layer"))
    return Probe(Features.from_state(within(state, "features"), settings), kernel)
