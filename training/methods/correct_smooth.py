"""Correct and Smooth: a probe's mistakes on training images are spread over links, then their labels (ICLR 2021 [mem]).

    E <- a P E + (1 - a) E0             from E0 = Y - Z on training images, 0 elsewhere: what the probe got wrong
    Z' = Z + s E / |E|_1                s the mean of |E0|_1 over training images (the paper's autoscale)
    G <- b P G + (1 - b) G0             from G0 = Y on training images, Z' elsewhere
    logits = log(G / sum G + FLOOR),    negative shares as 0

Z is what the probe says as probabilities: of training images **out of fold** (training/offset.py), for a probe that
explains the images it was fitted on has nothing left to correct there; of all others its full fit. The paper takes the
fit's own residuals, over D^-1/2 W D^-1/2; P, the mean of what a node hears, is for links with directions [design]. Val
chooses a (`correct`) and b (`smooth`); with 0 for both it is the probe.

Under `sources: train` residuals and labels live on training images, and a judged image hears them in the last of the
steps, with its own Z; under `all` they pass through the others too. No image hears its own label in the first step; a
training image hears it back from its neighbours later, and its accuracy says nothing.
"""

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch import Tensor, nn

from fieldmark.params import Count
from training.data import Batch, Cache, feature_words
from training.data.links import WORD
from training.layers.states import State, within
from training.links import Alpha, Heard, LinkSettings, Memory, labels_of_senders, links_word, senders, spread
from training.loop import predict
from training.methods import Fitted, NotPossible, Output, search
from training.offset import Offset, WithProbe, as_probe, fit_rival, probe_also_reads, reads_of_probe, with_reads

SEEDED = False
READS = (feature_words() - {"again"}) | {WORD}
ALSO = feature_words() - {"again"}
FLOOR = 1e-20  # added to every class's share


class BaseProbe(WithProbe):
    """The probe that is corrected: any vectors but a second look's, descriptions too."""

    method: str = "ridge"  # of the probe family
    settings: dict[str, Any] = Field(default_factory=dict)  # as a run of its own would have them

    @field_validator("settings")
    @classmethod
    def _are_its_settings(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "method" in info.data:
            why = "and what the probe gets wrong is asked of training images that it was not fitted to"
            reads_of_probe(info.data["method"], settings, why)
        return settings


class Settings(LinkSettings):
    with_probe: Annotated[BaseProbe, BeforeValidator(as_probe)] = BaseProbe()  # what is corrected; true: probes
    correct: list[Alpha] = Field(
        default=[0.5, 0.8, 0.95, 0.0], min_length=1
    )  # shares of what a node hears of mistakes that val chooses from; 0 corrects nothing
    smooth: list[Alpha] = Field(
        default=[0.5, 0.8, 0.95, 0.0], min_length=1
    )  # shares of what a node hears of classes that val chooses from; 0 smooths nothing
    steps: Count = 20  # how far both go


def reads(settings: Settings) -> frozenset[str]:
    return with_reads(frozenset({links_word(settings)}), settings.with_probe)


def also_reads(settings: Settings) -> frozenset[str]:
    return probe_also_reads(settings.with_probe)


class CorrectSmooth(nn.Module):
    mistakes: Tensor
    classes: Tensor
    size: Tensor
    shares: Tensor

    def __init__(
        self, memory: Memory, offset: Offset, mistakes: Tensor, classes: Tensor, size: Tensor, shares: Tensor
    ) -> None:
        """Of the images that send, before the last step: mistakes E and classes G, (M, C); size s; shares (2,), a b."""
        super().__init__()
        self.memory, self.offset = memory, offset
        for name, value in {"mistakes": mistakes, "classes": classes, "size": size, "shares": shares}.items():
            self.register_buffer(name, value)

    def forward(self, batch: Batch) -> Output:
        # Never what it would be in training: this is fitted, and an image that trained is told as any other.
        base = self.offset.eval()(batch).softmax(-1)
        heard = Heard(self.memory, batch)
        return Output(judge(base, heard, self.mistakes, self.classes, self.size, *self.shares), {}, None)


def judge(
    base: Tensor, heard: Heard, mistakes: Tensor, classes: Tensor, size: Tensor, a: float | Tensor, b: float | Tensor
) -> Tensor:
    """Logits (B, C) of images without a label, Z (B, C): the last step of both."""
    share = ((1 - b) * correct(base, a * heard.mean(mistakes), size) + b * heard.mean(classes)).clamp(min=0)
    return (share / share.sum(1, keepdim=True).clamp(min=1e-12) + FLOOR).log()


def correct(base: Tensor, mistakes: Tensor, size: Tensor) -> Tensor:
    """Z' of Z (n, C) and what is heard of mistakes (n, C); as it was where nothing is heard."""
    return base + size * mistakes / mistakes.abs().sum(1, keepdim=True).clamp(min=1e-12)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises NotPossible where no training image can be told by a fit that it had no part in."""
    try:
        rival = fit_rival(cache, settings.with_probe)
    except NotPossible:
        raise NotPossible(
            "no class has training images in two groups, so that nothing is known of what the probe gets wrong on"
            " images that it was not fitted to; take more images a class"
        ) from None
    sending, memory, offset = senders(cache, settings), Memory.of(cache, settings), rival.offset().eval()
    told = labels_of_senders(cache, settings)
    labelled = told.any(1, keepdim=True)
    base = (predict(rival.probe, cache, sending) / rival.temperature).softmax(-1)
    out_of_fold = rival.out_of_fold[sending * cache.views].to(base.device).softmax(-1)
    judged = labelled & out_of_fold.isfinite().all(1, keepdim=True)  # others have no answer out of fold
    mistakes = torch.where(judged, told - out_of_fold, 0)
    size = mistakes.abs().sum() / judged.sum()
    val, whole = cache.images("val"), memory.whole()
    heard = Heard(memory, cache.only({links_word(settings)}).batch(val))
    base_of_val = (predict(rival.probe, cache, val) / rival.temperature).softmax(-1) if len(val) else base[:0]

    def spread_both(a: float, b: float) -> tuple[Tensor, Tensor]:
        """E and G (M, C) before the last step."""
        wrong = spread(whole, mistakes, a, settings.steps - 1)
        corrected = correct(base, a * whole.sum(wrong, whole.mean()), size)
        return wrong, spread(whole, torch.where(labelled, told, corrected), b, settings.steps - 1)

    def logits(correct: float, smooth: float) -> Tensor:
        wrong, classes = spread_both(correct, smooth)
        return judge(base_of_val, heard, wrong, classes, size, correct, smooth)

    point, history = search(cache, settings, logits)
    a, b = point["correct"], point["smooth"]
    model = CorrectSmooth(memory, offset, *spread_both(a, b), size, torch.tensor([a, b], device=cache.device))
    return Fitted(model, history, {**point, **rival.chosen})


def build(state: State, settings: Settings, classes: int) -> CorrectSmooth:
    memory = Memory.from_state(within(state, "memory"), settings)
    offset = Offset.from_state(within(state, "offset"), settings.with_probe, classes)
    return CorrectSmooth(memory, offset, *(state[name] for name in ("mistakes", "classes", "size", "shares")))
