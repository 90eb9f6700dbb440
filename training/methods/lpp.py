"""LP++: a linear probe blended with the class texts, by one learned weight a class (Huang et al., CVPR 2024 [mem]).

    logits_c = x . (w_c + alpha_c s t_c) + b_c

with x the standardised global vector, t_c the class's text (class_text) less the mean over classes, of unit
length, and s `text_scale`. A reconstruction, and not the paper's procedure: they start from class means and take
block-wise gradient steps of sizes from Lipschitz constants, without a penalty. Here the same form is fitted by
full-batch L-BFGS (layers/logistic.py), the problem being convex, from zero and with one L2 penalty on w and alpha
[design]: at s = 0 it is the linear probe, and the greater s, the cheaper it is to lean on the texts. Val chooses both.
Left free, alpha fits the training images at the cost of val where there are many.
"""

from typing import cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Batch, Cache
from training.data.bank import Bank
from training.layers.blocks import Standardise
from training.layers.logistic import Chosen, ProbeSettings, fit_probe, require_val, training_globals
from training.layers.states import State, within
from training.layers.texts import class_text, own_names
from training.loop import NotNegative, Positive
from training.methods import Fitted, Output, search_points

SEEDED = False
READS = frozenset({"globals", "names", "owners"})
NO_DIRECTION = 1e-4  # texts that are shorter than this when centred are all alike, and what is left of them is rounding


class Settings(ProbeSettings):
    l2: list[Positive] = Field(default=[1.0, 0.1, 0.0316, 0.01, 0.001], min_length=1)  # strengths that val chooses from
    text_scale: list[NotNegative] = Field(default=[1.0, 3.0, 10.0], min_length=1)  # more: texts are cheaper to lean on


def reads(settings: Settings) -> frozenset[str]:
    return READS if any(settings.text_scale) else frozenset({"globals"})


def text_directions(cache: Cache) -> Tensor:
    """t (C, D): each class's text less the mean over classes, of unit length; near 0 where all have the same text."""
    text = class_text(cache)
    return F.normalize(text - text.mean(0), dim=-1, eps=NO_DIRECTION)


class BlendedLinear(nn.Linear):
    """x (B, D) -> x . (w_c + alpha_c text_c) + bias_c (B, C); `weight` (C, D+1) is w and, in its last column, alpha."""

    text: Tensor

    def __init__(self, text: Tensor) -> None:
        """text (C, D). Everything starts at 0."""
        classes, dimension = text.shape
        super().__init__(dimension + 1, classes)
        self.register_buffer("text", text)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, :-1] + self.weight[:, -1:] * self.text, self.bias)


class LPPlusPlus(nn.Module):
    def __init__(self, standardise: Standardise, linear: nn.Linear) -> None:
        super().__init__()
        self.standardise, self.linear = standardise, linear

    def forward(self, batch: Batch) -> Output:
        return Output(self.linear(self.standardise(batch.g.float())), {}, None)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    require_val(len(cache.images("val")), search_points(settings), "l2 and text_scale")
    vectors = training_globals(cache)[0]
    standardise = Standardise(vectors)
    no_text = vectors.new_zeros(len(cache.classes), vectors.shape[1])
    text = text_directions(cache) if any(settings.text_scale) else no_text
    best: tuple[tuple[float, float], float, Chosen] | None = None
    history: list[dict[str, float]] = []
    for text_scale in settings.text_scale:
        chosen = fit_probe(
            cache,
            settings,
            lambda images, view: standardise(cache.globals(images, view)),
            BlendedLinear(text_scale * text).to(cache.device),
        )
        rows = [{**row, "epoch": row["epoch"] + len(history), "text_scale": text_scale} for row in chosen.history]
        history += rows
        score = max((row["val_accuracy"], -row["val_loss"]) for row in rows)
        if best is None or score > best[0]:
            best = score, text_scale, chosen
    assert best is not None
    _, text_scale, chosen = best
    model = LPPlusPlus(standardise, chosen.linear)
    return Fitted(model, history, {"l2": chosen.l2, "text_scale": text_scale}, chosen.pass_seconds)


def texts_add(model: LPPlusPlus, settings: Settings, cache: Cache, images: Tensor, classes: Tensor) -> Tensor | None:
    """alpha_a x . s t_a - alpha_b x . s t_b, each shared evenly among the texts that name the class.

    The rest of logit a - logit b is what w and the bias say. None where the settings leave no text.
    """
    if "names" not in reads(settings):
        return None
    owned, linear = own_names(cache.part(Bank)).float(), cast(BlendedLinear, model.linear)
    said = linear.weight[:, -1] * (model.standardise(cache.globals(images)) @ linear.text.T)  # (B, C)
    share = owned / owned.sum(1, keepdim=True)
    a, b = (said.gather(1, classes)[..., None] * share[classes]).unbind(1)
    return a - b


def build(state: State, settings: Settings, classes: int) -> LPPlusPlus:
    return LPPlusPlus(Standardise.from_state(within(state, "standardise")), BlendedLinear(state["linear.text"]))
