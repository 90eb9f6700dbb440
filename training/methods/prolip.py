"""ProLIP: the encoder's own projection, moved a little (Fahes et al., 2024 [web]).

    v      = norm(W h + b)        logits = scale * v . t_c
    loss   = cross entropy + anchor |W - W_0|^2           anchor = 1 / images a class

h is the pooled vector before the projection, W_0 and b the encoder's (part `projection`), t_c the text of class c
(training/class_texts.py). It starts as zero-shot classification by these texts, and where there are few images it stays
near it. Trained by training/loop.py, which keeps the epoch that val prefers; without val the last one. The anchor's
weight is the paper's, the schedule is not [design].
"""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from training.class_texts import Texts, class_texts, text_reads
from training.data import Batch, Cache
from training.data.projection import Projection
from training.layers.ridge import training_targets
from training.layers.states import State
from training.loop import NotNegative, Positive, Schedule, fit_epochs
from training.methods import Fitted, Output

SEEDED = True
READS = frozenset({"pooled", "projection", "names", "concepts", "owners"})


class Settings(Schedule):
    texts: Texts = "names"  # what is said of a class: names, concepts, or the middle of both
    scale: Positive = 100.0  # turns cosines with the texts into logits
    anchor: NotNegative | None = None  # weight of |W - W_0|^2; null: 1 / the mean number of images that a class has
    epochs: Annotated[int, Field(ge=0)] = 60  # 0: zero-shot classification
    lr: list[Positive] = Field(default=[1e-4, 1e-3], min_length=1)  # learning rates that val chooses from
    weight_decay: list[NotNegative] = Field(default=[0.0], min_length=1)  # the penalty stands for it
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # bf16 is too coarse for cosines under a large scale


def reads(settings: Settings) -> frozenset[str]:
    return text_reads(settings.texts) | {"pooled", "projection"}


class ProLIP(nn.Module):
    start: Tensor
    bias: Tensor
    class_text: Tensor

    def __init__(self, start: Tensor, bias: Tensor, class_text: Tensor, scale: float) -> None:
        """start (D, d), bias (D,), class_text (C, D)."""
        super().__init__()
        self.weight = nn.Parameter(start.clone())
        for name, value in (("start", start), ("bias", bias), ("class_text", class_text)):
            self.register_buffer(name, value)
        self.scale = scale

    def forward(self, batch: Batch) -> Output:
        v = F.normalize(F.linear(batch.pooled.float(), self.weight, self.bias), dim=-1)
        moved = {"moved": (self.weight - self.start).square().sum()} if self.training else {}
        return Output(self.scale * v.float() @ self.class_text.T, moved, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    part, told = cache.part(Projection), training_targets(cache).sum(0) / cache.views
    anchor = 1 / told[told > 0].mean().item() if settings.anchor is None else settings.anchor
    text = class_texts(cache, settings.texts)
    model = partial(ProLIP, part.weight, part.bias, text, settings.scale)
    return fit_epochs(model, cache, settings, seed, {"moved": anchor})


def build(state: State, settings: Settings, classes: int) -> ProLIP:
    return ProLIP(state["start"], state["bias"], state["class_text"], settings.scale)
