"""How a method with gradients is trained, in one explicit loop, and how any method is read out.

AdamW with a cosine schedule; every epoch shuffles the training images and draws a view for each; the loss is cross
entropy plus the method's own losses by weight. Val alone chooses: the epoch within a run, and the run within the
grid of learning rates and weight decays (accuracy first, then log loss). It is looked at as often as for any method:
BUDGET times in all, so that a grid of two points is looked at after eight epochs each, epoch 0 among them. Where val
holds no image (few-shot) there is nothing to choose by: the grid has to be of one point, and the last epoch is kept.
Everything follows from the seed; on a GPU (`train.device`) order, views and the weights that a model starts from are
those of the CPU, drawn there, and the noise of dropout is not.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fieldmark.devices import has_bf16
from fieldmark.memory import keep_memory
from fieldmark.params import Block, Count
from training.data import Cache
from training.data.arrays import make_room
from training.layers.logistic import Tally, require_val
from training.methods import BUDGET, Fitted, Output, search_points

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
EVALUATION_BATCH = 512
TALLIED = 8 * EVALUATION_BATCH  # images whose logits are judged at a time
HELD = 2**28  # bytes of logits that stay in memory until they are written
# From what training is told of a step's images, probabilities (B, C), their logits (B, C) float32, and the share of the
# schedule that is past, 0 in its first epoch and 1 in its last: what it is told of them from then on, (B, C).
Retell = Callable[[Tensor, Tensor, float], Tensor]


class Schedule(Block):
    """The knobs of the loop; a method's `Settings` adds its own."""

    epochs: Annotated[int, Field(ge=0)] = 30  # val chooses one of some; 0 leaves the model as it starts
    stop: Annotated[int, Field(ge=0)] | None = None  # the epoch to stop at, in a schedule of `epochs`; null: the last
    batch_size: Count = 128  # images a step
    lr: list[Positive] = Field(default=[1e-3], min_length=1)  # learning rates that val chooses from
    weight_decay: list[NotNegative] = Field(default=[0.01, 0.3], min_length=1)  # weight decays that val chooses from
    clip_norm: Positive = 1.0  # longest gradient
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where processor or GPU has it; fp32, bf16

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls; a known defect of some reference code is that it never does."""
        return True


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """All parameters that require a gradient: matrices with weight decay, vectors (biases, norms) without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def predict(model: nn.Module, cache: Cache, images: Tensor) -> Tensor:
    """Logits (len(images), C) in float32 on the cache's device, in evaluation mode, of view 0."""
    model.eval()
    return torch.cat([model(cache.batch(chunk)).logits.float() for chunk in images.split(EVALUATION_BATCH)])


@torch.no_grad()
def predict_all(model: nn.Module, cache: Cache, folder: Path) -> np.ndarray:
    """`predict` of all images, (n, C); more than HELD bytes lie in a file in `folder`, which goes with the array."""
    model.eval()
    found = make_room(folder, (len(cache.paths), len(cache.classes)), np.float32, HELD)
    for chunk in torch.arange(len(cache.paths)).split(EVALUATION_BATCH):
        found[chunk[0] : chunk[-1] + 1] = model(cache.batch(chunk)).logits.float().cpu().numpy()
    return found


def margin(logits: Tensor, classes: Tensor) -> Tensor:
    """logit a - logit b (B,) of logits (B, C), a and b of each image in classes (B, 2)."""
    a, b = logits.float().gather(1, classes).unbind(1)
    return a - b


def untrained(model: nn.Module, cache: Cache) -> Fitted:
    """A model that needs no training, with one row of history."""
    return Fitted(model, [state_row(0, told_loss(model, cache), assess_split(model, cache, "val"))])


def assess_split(model: nn.Module, cache: Cache, split: str) -> tuple[float, float]:
    """Accuracy and log loss on a split, in evaluation mode; nan where it holds no image."""
    tally = Tally()
    for images in cache.images(split).split(TALLIED):
        if len(images):
            tally.add(predict(model, cache, images), cache.y[images])
    return tally.result()


@torch.no_grad()
def told_loss(model: nn.Module, cache: Cache) -> float:
    """Mean cross entropy of the training images with what is told of them, in evaluation mode."""
    if cache.target.ndim == 1:
        return assess_split(model, replace(cache, y=cache.target), "train")[1]
    total, train = 0.0, cache.images("train")
    for images in train.split(TALLIED):
        total += F.cross_entropy(predict(model, cache, images), cache.target[images], reduction="sum").item()
    return total / len(train)


def state_row(epoch: int, train_loss: float, val: tuple[float, float]) -> dict[str, float]:
    """A row of history."""
    return {"epoch": epoch, "train_loss": train_loss, "val_loss": val[1], "val_accuracy": val[0]}


def total_loss(output: Output, target: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Cross entropy with `target`, classes (B,) or probabilities (B, C), plus the method's losses by their weights.

    Raises KeyError for a loss without a weight.
    """
    loss = F.cross_entropy(output.logits.float(), target)
    for name, value in output.losses.items():
        loss = loss + weights[name] * value
    return loss


def epochs_to_look(epochs: int, looks: int) -> set[int]:
    """The epochs behind which val is looked at: at most `looks`, evenly spread from 0 to the last; of one, the last."""
    return {round(step * epochs / (looks - 1)) for step in range(looks)} if looks > 1 else {epochs}


def fit_epochs(
    build: Callable[[], nn.Module],
    cache: Cache,
    schedule: Schedule,
    seed: int,
    weights: Mapping[str, float] | None = None,
    retell: Retell | None = None,
) -> Fitted:
    """Train one model for every learning rate and weight decay of the grid; return the one that val prefers.

    `build` makes a fresh model; it is called after the seed is set, and draws on the CPU. `weights` are those of the
    method's losses. `retell` moves targets that are probabilities behind each step, in a copy for each model; targets
    that are classes leave nothing to move. Every list of numbers in `schedule` is a grid, whoever goes through it: the
    more points, the fewer looks has each. Raises UserError for a grid of several points and no val.
    """
    looks = max(1, BUDGET // search_points(schedule))
    require_val(len(cache.images("val")), len(schedule.lr) * len(schedule.weight_decay), "lr, weight_decay")
    keep_memory()  # of a step for the next one; before, what loading took was given back
    best: tuple[tuple[float, float], Fitted] | None = None
    for lr, weight_decay in itertools.product(schedule.lr, schedule.weight_decay):
        torch.manual_seed(seed)
        model = build().to(cache.device)
        score, fitted = fit_once(model, cache, schedule, seed, lr, weight_decay, weights or {}, looks, retell)
        if best is None or score > best[0]:
            best = score, fitted
    assert best is not None
    return best[1]


def fit_once(
    model: nn.Module,
    cache: Cache,
    schedule: Schedule,
    seed: int,
    lr: float,
    weight_decay: float,
    weights: Mapping[str, float],
    looks: int,
    retell: Retell | None = None,
) -> tuple[tuple[float, float], Fitted]:
    """One run of the loop: the (val accuracy, -val loss) of the best epoch of `epochs_to_look`, and the model of then.

    History has a row for each of these epochs. Without val images the last one is kept, and the two numbers are nan.
    """
    retell = retell if cache.target.ndim == 2 else None
    cache = cache if retell is None else replace(cache, target=cache.target.clone())
    generator = torch.Generator().manual_seed(seed)
    train, has_val = cache.images("train"), len(cache.images("val")) > 0
    optimiser = torch.optim.AdamW(decayed_groups(model, weight_decay), lr=lr, fused=True)
    steps = schedule.epochs * math.ceil(len(train) / schedule.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1), 0.0 if schedule.decays else lr)
    precision = schedule.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(cache.device) else "fp32"

    last = schedule.epochs if schedule.stop is None else min(schedule.stop, schedule.epochs)
    looked, history, seconds = epochs_to_look(schedule.epochs, looks) | {last}, [], []
    best, best_epoch, best_state = (-math.inf, -math.inf), 0, model.state_dict()
    progress = tqdm(
        range(last + 1), desc=f"lr {lr:g} weight_decay {weight_decay:g}", leave=False, disable=None
    )
    for epoch in progress:
        if epoch:
            started = perf_counter()
            order = train[torch.randperm(len(train), generator=generator)]
            views = torch.randint(cache.views, (len(train),), generator=generator)
            past = (epoch - 1) / max(schedule.epochs - 1, 1)
            loss = train_epoch(
                model, cache, schedule, order, views, optimiser, scheduler, weights, precision, retell, past
            )
            seconds.append(perf_counter() - started)
        if epoch in looked:
            # Epoch 0 counts too: a model that starts from a fitted one may be best as it starts.
            train_loss = loss if epoch else told_loss(model, cache)
            accuracy, log_loss = assess_split(model, cache, "val")
            history.append(state_row(epoch, train_loss, (accuracy, log_loss)))
            progress.set_postfix(val_accuracy=f"{accuracy:.3f}")
            if (accuracy, -log_loss) > best or not has_val:
                best, best_epoch, best_state = (accuracy, -log_loss), epoch, copy.deepcopy(model.state_dict())

    model.load_state_dict(best_state)
    chosen: dict[str, float | str] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "epoch": best_epoch,
        "precision": precision,
    }
    return best, Fitted(model, history, chosen, sum(seconds) / max(len(seconds), 1))


def train_epoch(
    model: nn.Module,
    cache: Cache,
    schedule: Schedule,
    order: Tensor,
    views: Tensor,
    optimiser: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    weights: Mapping[str, float],
    precision: str,
    retell: Retell | None,
    past: float,
) -> float:
    """One pass over the training images in this order (n,), each in its view (n,); returns the mean loss.

    `retell`, at `past`, writes into cache.target.
    """
    model.train()
    # Read once, at the end: a GPU that has to tell each step's loss waits for the next step to be asked of it.
    loss_sum = torch.zeros((), dtype=torch.float64, device=cache.device)
    for images, view in zip(order.split(schedule.batch_size), views.split(schedule.batch_size), strict=True):
        batch = cache.batch(images, view)
        with torch.autocast(cache.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(batch)
        loss = total_loss(output, batch.target, weights)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
        optimiser.step()
        scheduler.step()
        if retell is not None:
            cache.target[images] = retell(batch.target, output.logits.detach().float(), past)
        loss_sum += loss.detach().double() * len(images)
    return loss_sum.item() / len(order)
