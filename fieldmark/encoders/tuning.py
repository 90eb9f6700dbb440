"""Which weights of an encoder are tuned, and how: its last blocks, by low-rank updates or whole, and its projections.

A tower is read as blocks in order (of a ViT or a text tower), or as stages (of a convolutional tower), then what comes
behind the last of them (norms, `conv_head`, an attention pooling), and then its projection into the space of texts. The
last `blocks` of them and what is behind are tuned by low-rank updates (LoRA, Hu et al., ICLR 2022 [mem]):

    W' = W + B A,   A (r, in) drawn, B (out, r) zero at first, of every matrix and every kernel, as (out, in) alike

so that what is tuned begins as what it was made from. Biases, norms and running statistics stay. With `rank` null these
parts are tuned whole, norms and biases too. A projection is one matrix, and is tuned whole.

Parts are found by where they stand and never by their names: a rule such as `"proj" not in name`, as the public code of
AdaptCLIPZS has it, leaves out in_proj, out_proj and c_proj, which are most of a block.

A tuned encoder stays in evaluation mode: no dropout, and batch norms keep the statistics that they have.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from time import perf_counter
from typing import Any, NamedTuple

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from fieldmark.command import UserError
from fieldmark.devices import has_bf16
from fieldmark.encoders.maps import find_visual
from fieldmark.params import Adapt, Finetune
from fieldmark.pictures.epochs import iterate_batches, shuffled
from fieldmark.pictures.views import Preprocessor, Source

# Where timm keeps the blocks of a tower, or its stages.
TIMM_BLOCKS = ("blocks", "layers", "stages")
# Coefficients and epsilon of AdamW as the public code of AdaptCLIPZS has them [code].
BETAS, EPSILON = (0.9, 0.98), 1e-6
MAX_NORM = 1.0  # of the gradient
TIMED_STEPS = 3  # of a preview, after a first one
Weight = tuple[nn.Module, str]  # a module, and the name of a parameter that it holds itself


class Parts(NamedTuple):
    """A tower in the order of its passes."""

    blocks: list[nn.Module]
    behind: list[nn.Module]
    projection: list[Weight]  # none where the head ends with its pooling


class Tuned(NamedTuple):
    """The parameters that are tuned, each once."""

    inner: list[nn.Parameter]  # of blocks and of what is behind them
    projections: list[nn.Parameter]

    @property
    def all(self) -> list[nn.Parameter]:
        return [*self.inner, *self.projections]


class LowRank(nn.Module):
    """Adds a matrix of low rank, zero at first, to a weight (out, ...)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, inner = len(weight), weight[0].numel()
        rank = min(rank, out, inner)
        drawn = torch.randn(rank, inner, generator=generator) / inner**0.5
        self.down = nn.Parameter(drawn.to(weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def image_parts(model: nn.Module, key: str) -> Parts:
    """The image tower of a loaded model, or a tower. Raises UserError, under `key`, where its blocks are not known."""
    visual = find_visual(model)
    if isinstance(visual, VisionTransformer):
        behind = [each for each in (visual.attn_pool, visual.ln_post) if each is not None]
        return Parts(list(visual.transformer.resblocks), behind, [] if visual.proj is None else [(visual, "proj")])
    if isinstance(visual, ModifiedResNet):
        blocks = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        pool = visual.attnpool
        return Parts(blocks, [pool.q_proj, pool.k_proj, pool.v_proj], list(held_by(pool.c_proj)))
    blocks, behind = split_trunk(visual["trunk"] if isinstance(visual, nn.ModuleDict) else visual.trunk, key)
    return Parts(blocks, behind, list(held_by(visual["head"] if isinstance(visual, nn.ModuleDict) else visual.head)))


def split_trunk(trunk: nn.Module, key: str) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks or stages of a model of timm's or of torchvision's, and the modules behind them."""
    children = dict(trunk.named_children())
    for place, (name, child) in enumerate(children.items()):
        if name in TIMM_BLOCKS and isinstance(child, nn.Sequential | nn.ModuleList):
            return list(child), list(children.values())[place + 1 :]
    if stages := [child for name, child in children.items() if name.startswith("layer") and name[5:].isdigit()]:
        return stages, []  # timm's ResNets
    if isinstance(trunk, nn.Sequential) and isinstance(trunk[-1], nn.Sequential):  # torchvision's (towers/torchvision)
        stages = list(trunk[-1])
        if not isinstance(stages[0], nn.Sequential):  # a ResNet, whose stages stand side by side
            stages = [child for child in trunk if isinstance(child, nn.Sequential)]
        return stages, []
    kind = type(trunk).__name__
    raise UserError(f"{key}: no rule says what the last blocks of a {kind} are; take a ViT, Swin, ConvNeXt or ResNet")


def text_parts(model: Any, key: str) -> Parts:
    """The text tower of a loaded model. Raises UserError, under `key`, where its blocks are not known."""
    text = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        inner: nn.Module = getattr(text.transformer, "encoder", text.transformer)
        lists = [child for child in inner.children() if isinstance(child, nn.ModuleList)]
        blocks, behind, projection = lists[0] if lists else None, [], list(held_by(text.proj))
    else:
        blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
        behind, last = [text.ln_final], text.text_projection
        projection = [(text, "text_projection")] if isinstance(last, nn.Parameter) else list(held_by(last))
    if blocks is None:
        kind = type(text).__name__
        raise UserError(f"{key}: no rule says what the last blocks of a {kind} are; take another encoder")
    return Parts(list(blocks), behind, projection)


def held_by(module: nn.Module | None) -> Iterator[Weight]:
    """Every parameter of a module, with the module that holds it."""
    for owner in () if module is None else module.modules():
        for name, _ in owner.named_parameters(recurse=False):
            yield owner, name


def start_tuning(parts: list[Parts], blocks: int, rank: int | None, generator: torch.Generator) -> Tuned:
    """Make the last blocks and the projections of frozen towers tunable. What they give is what it was before."""
    inner: list[nn.Parameter] = []
    for tower in parts:
        for module in [*tower.blocks[-blocks:], *tower.behind] if blocks else []:
            for owner, name in list(held_by(module)):
                weight = owner.get_parameter(name)
                if rank is None:
                    inner.append(weight)
                elif weight.ndim > 1:
                    update = LowRank(weight, rank, generator)
                    parametrize.register_parametrization(owner, name, update)
                    inner += [update.down, update.up]
    tuned = Tuned(inner, [owner.get_parameter(name) for tower in parts for owner, name in tower.projection])
    for parameter in tuned.all:
        parameter.requires_grad_()
    return tuned


def end_tuning(model: nn.Module) -> None:
    """Put low-rank updates into the weights that they update, and freeze all: the model has the shape that it had."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            held: Any = module.parametrizations
            for name in list(held):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    model.requires_grad_(False)


def make_optimizer(
    inner: list[nn.Parameter], outer: list[nn.Parameter], rate: float, outer_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with a learning rate for blocks and one for what is outside; vectors (norms, biases) have no decay."""
    groups: list[dict[str, Any]] = []
    for parameters, lr in ((inner, rate), (outer, outer_rate)):
        groups.append({"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0})
    return torch.optim.AdamW([each for each in groups if each["params"]], betas=BETAS, eps=EPSILON)


def best_of(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the best accuracy on what chooses, the first among equals."""
    return max(history, key=lambda row: row["val_accuracy"])


def run_epochs(
    title: str,
    learned: list[Source],
    encoder: Preprocessor,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    settings: Adapt | Finetune,
    loss_of: Callable[[list[Source], Tensor, int], Tensor],
    accuracy: Callable[[], float],
    chosen_by: str,
    before: float | None = None,
) -> list[dict[str, Any]]:
    """Tune parameters in place, as they were after the best epoch; the epochs, as in history.csv.

    `loss_of` takes a batch, its pixels and the number of the epoch. `chosen_by` names what `accuracy` is of. Where
    `before` is given, it is the accuracy of epoch 0, which can be the best.
    """
    steps = settings.epochs * -(-len(learned) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reached, kept = before or 0.0, snapshot(parameters)
    history: list[dict[str, Any]] = []
    if before is not None:
        history.append({"epoch": 0, "loss": None, "val_accuracy": before})
    with tqdm(total=settings.epochs * len(learned), desc=title, unit="img") as progress:
        for epoch in range(settings.epochs):
            total = 0.0
            order = shuffled(learned, settings.seed, epoch)
            for batch, pixels in iterate_batches(order, encoder, epoch + 1, settings.batch_size):
                loss = loss_of(batch, pixels, epoch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                progress.update(len(batch))
                progress.set_postfix_str(f"loss {loss.item():.3f}, {chosen_by} {reached:.3f}")
            reached = accuracy()
            history.append({"epoch": epoch + 1, "loss": total / len(order), "val_accuracy": reached})
            best = best_of(history)
            if best is history[-1]:
                kept = snapshot(parameters)
            if epoch + 1 - best["epoch"] >= settings.patience:
                break
    restore(parameters, kept)
    return history


def say_time(
    learned: list[Source],
    encoder: Preprocessor,
    device: torch.device,
    settings: Adapt | Finetune,
    loss_of: Callable[[list[Source], Tensor], Tensor],
) -> str:
    """How long the epochs take, from a few steps that are thrown away."""
    order = shuffled(learned, settings.seed, 0)[: (TIMED_STEPS + 1) * settings.batch_size]
    times = [perf_counter()]
    for batch, pixels in iterate_batches(order, encoder, 1, settings.batch_size):
        loss_of(batch, pixels).backward()
        times.append(perf_counter())
    step = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else times[1] - times[0]
    steps = settings.epochs * -(-len(learned) // settings.batch_size)
    return (
        f"time: about {timedelta(seconds=round(step * steps))} for {settings.epochs} epochs"
        f" ({step:.2f} s a step of {settings.batch_size} on {device})"
    )


def snapshot(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [each.detach().clone() for each in parameters]


@torch.no_grad()
def restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def half_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Passes in bfloat16 where the device multiplies it itself; losses are float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))
