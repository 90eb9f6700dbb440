"""One fit of the riddle: what a method with some of its `faults` says of images that train it, and of others.

The riddle is why public code reports 92 % on training images and 72 % on test images where the paper has 92 there.
Images of train and val are cross-fitted (training/folds.py): inside a fold one split chooses settings and epoch, then
all its training images are fitted. `peeking` is the protocol of that code: the images of the fold choose themselves.

What is asked is asked as that code asks it, in batches of BATCH: held-out images in the order of their classes, as a
test list has them, and shuffled; a method that judges an image by itself says the same both times. Training images are
asked shuffled, as they train.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import other_labels
from fieldmark.params import Block
from training.controls import Control, Request
from training.data import Cache
from training.folds import HELD_OUT, refit, settle, split_fold
from training.methods import Fitted, load_method, reads_of
from training.regimes import hide_test

BATCH = 128
OF_BANK = frozenset({"names", "concepts", "owners", "labels"})


class Fold(NamedTuple):
    """Fold `number` of `folds`, and whether its own images choose."""

    folds: int
    number: int
    peeking: bool = False


class Source(NamedTuple):
    """Where what a fold makes anew is read."""

    data: Path
    encoder: str
    buckets: int
    device: torch.device


class Answers(NamedTuple):
    """Accuracy on the images that trained, and what is said of each held-out image, those of `held_out`."""

    train: float
    ordered: list[int]  # in batches in the order of classes
    shuffled: list[int]  # in shuffled batches
    chosen: dict[str, Any]


def needs_of(method: str, settings: Block) -> frozenset[str]:
    """The parts to read: what the method sees, and what its bank is made anew of in each fold."""
    reads = reads_of(method, settings)
    return other_labels.needs(reads, anew=True) if reads & OF_BANK else reads


def held_out(cache: Cache, fold: Fold) -> Tensor:
    """The positions of a fold's images, in the order of their classes."""
    images = split_fold(cache, fold.folds, fold.number).images(HELD_OUT)
    return images[torch.argsort(cache.y[images].cpu(), stable=True)]


def cross_fit(cache: Cache, method: str, settings: Block, fold: Fold, seed: int, source: Source) -> Answers:
    """Fit and ask. `cache` has the parts of `needs_of`, and all images of train and val.

    Raises NotPossible where the method cannot work on this data.
    """
    dealt = split_fold(cache, fold.folds, fold.number)
    if fold.peeking:
        split = np.select([dealt.split == "choose", dealt.split == HELD_OUT], ["train", "choose"], dealt.split)
        whole = prepare(replace(dealt, split=split), None, method, settings, source)
        fitted = fit_seen(whole, method, settings, seed, source)
        chosen = fitted.chosen
    else:
        inner = prepare(dealt, None, method, settings, source)
        chosen = fit_seen(inner, method, settings, seed, source).chosen
        whole = prepare(refit(dealt), dealt, method, settings, source)
        fitted = fit_seen(whole, method, settle(settings, chosen), seed, source)
    whole = whole.on(source.device)
    generator = torch.Generator().manual_seed(seed)
    train, held = whole.images("train"), held_out(cache, fold)
    mixed = train[torch.randperm(len(train), generator=generator)]
    order = torch.randperm(len(held), generator=generator)
    right = torch.tensor(ask(fitted.model, whole, mixed)) == whole.y[mixed].cpu()
    shuffled = torch.tensor(ask(fitted.model, whole, held[order]))[order.argsort()]
    return Answers(right.double().mean().item(), ask(fitted.model, whole, held), shuffled.tolist(), chosen)


def prepare(cache: Cache, inner: Cache | None, method: str, settings: Block, source: Source) -> Cache:
    """The cache as the method sees it, its bank and labels made of its own training images; `inner` as in reselection.

    Where the method reads no bank, nothing is made.
    """
    reads = reads_of(method, settings)
    if reads & OF_BANK:
        generator = torch.Generator().manual_seed(0)
        request = Request(Control(), source.data, source.encoder, source.buckets, generator)
        cache = other_labels.apply(cache, request, anew=True, inner=inner)
    return cache.only(reads)


def fit_seen(cache: Cache, method: str, settings: Block, seed: int, source: Source) -> Fitted:
    """A fit that sees no label of an image that neither trains nor chooses."""
    return load_method(method).fit(hide_test(cache).on(source.device), settings, seed)


@torch.no_grad()
def ask(model: nn.Module, cache: Cache, images: Tensor) -> list[int]:
    """What is said of images (n,), batch by batch in this order, in evaluation mode."""
    model.eval()
    said = [model(cache.batch(batch)).logits.argmax(1).cpu() for batch in images.split(BATCH)]
    found: list[int] = torch.cat(said).tolist()
    return found
