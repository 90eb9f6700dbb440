"""PRODEN: partial labels told apart as training goes on, by the model itself (Lv et al., ICML 2020 [mem]).

    q        = uniform over an image's candidates Y at first
    loss     = -sum_c q_c log softmax(logits)_c
    q        becomes softmax(logits | Y) behind each step that saw the image, by the logits of that step
    logits   = W x + b, or W GELU(V x) + b with `hidden`; x the vector of every probe (layers/features.py)

The network is one layer or two over frozen vectors: features do not change with what is found. With one class for each
image it is that layer, trained by cross entropy.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from training.data import Cache, feature_words
from training.layers.blocks import silent
from training.layers.features import Features, FeatureSettings, feature_also_reads, feature_reads
from training.layers.partial_labels import among_candidates
from training.layers.states import State, within
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted
from training.methods.linear_probe import Probe

SEEDED = True
READS = feature_words()
ALSO = READS
reads, also_reads = feature_reads, feature_also_reads


class Settings(FeatureSettings, Schedule):
    lr: list[Positive] = Field(default=[1e-2], min_length=1)  # learning rates that val chooses from
    weight_decay: list[NotNegative] = Field(default=[0.3, 3.0], min_length=1)  # weight decays that val chooses from
    hidden: Annotated[int, Field(ge=0)] = 0  # width of a layer before the last; 0: none


def layer_of(inputs: int, classes: int, hidden: int) -> nn.Module:
    """From x (B, inputs) to logits (B, classes), which are 0 at first: chance favours no candidate."""
    if not hidden:
        return silent(inputs, classes)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), silent(hidden, classes))


def retell(q: Tensor, logits: Tensor, past: float) -> Tensor:
    return among_candidates(q, logits)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    features = Features.measure(cache, settings)

    def build() -> Probe:
        return Probe(features, layer_of(features.size, len(cache.classes), settings.hidden))

    return fit_epochs(build, cache, settings, seed, retell=retell)


def build(state: State, settings: Settings, classes: int) -> Probe:
    features = Features.from_state(within(state, "features"), settings)
    return Probe(features, layer_of(features.size, classes, settings.hidden))
