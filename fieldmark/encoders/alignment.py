"""Pictures and the sentences of their classes, drawn together: the loss of AdaptCLIPZS, and zero-shot by sentences.

AdaptCLIPZS (Saha et al., CVPR 2024) [code]: of a batch of n pictures i with one sentence j drawn for each,

    z_ij = s <f(x_i), g(t_j)>,     P_ij = 1 where the class of x_i owns t_j
    L = 1/2 mean_i  - sum_j P_ij / (sum_j' P_ij')  log softmax_j z_ij
      + 1/2 mean_j  - sum_i P_ij / (sum_i' P_i'j)  log softmax_i z_ij

with f and g of unit length: soft targets, even over what belongs together. With all classes of a batch distinct it is
the symmetric loss of CLIP (InfoNCE). What differs from the public code: two matrix products in the place of loops, the
mean of both directions in the place of their sum, s is the encoder's own scale over `temperature`, and a sentence that
two classes own is positive for the pictures of both (there, `texts.index` gave it to the first).

A class is then told by its sentences as there: a softmax over all sentences, the mean over those of a class.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fieldmark.store import sha256


class Texts(NamedTuple):
    """Sentences and the classes that own them."""

    classes: list[str]
    sentences: list[str]  # each once
    owners: Tensor  # (sentences, classes) bool
    of_class: list[list[int]]  # the sentences of each class


def own_texts(sentences: Mapping[str, Sequence[str]]) -> Texts:
    """The sentences of classes, by class_id, with what several of them own once."""
    classes = sorted(sentences)
    every = sorted({text for texts in sentences.values() for text in texts})
    row = {text: number for number, text in enumerate(every)}
    owners = torch.zeros(len(every), len(classes), dtype=torch.bool)
    of_class = [sorted({row[text] for text in sentences[name]}) for name in classes]
    for column, rows in enumerate(of_class):
        owners[rows, column] = True
    return Texts(classes, every, owners, of_class)


def deal_texts(sentences: Mapping[str, Sequence[str]], seed: int) -> dict[str, list[str]]:
    """The control: the same sentences dealt anew among the classes by hash, as many to each as it had.

    A sentence that several classes share may fall twice on one: that class then has one fewer.
    """
    places = [(name, rank) for name in sorted(sentences) for rank in range(len(sentences[name]))]
    cards = sorted(
        (sha256(f"deal {seed} {name} {text}"), text) for name, texts in sentences.items() for text in texts
    )
    dealt: dict[str, list[str]] = {name: [] for name in sorted(sentences)}
    for (name, _), (_, text) in zip(places, cards, strict=True):
        dealt[name].append(text)
    return dealt


def draw_text(image_id: str, epoch: int, seed: int, texts: Sequence[int]) -> int:
    """The sentence that a picture is shown with in an epoch: drawn by seed, epoch and image_id alone."""
    return texts[int(sha256(f"text {seed} {epoch} {image_id}")[:12], 16) % len(texts)]


def alignment_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """L of logits (n, m), pictures by sentences, and positives (n, m) bool; each row and column holds one."""
    return (soft_cross_entropy(logits, positives) + soft_cross_entropy(logits.T, positives.T)) / 2


def soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    targets = positives.to(logits.dtype) / positives.sum(dim=1, keepdim=True)
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def class_probabilities(logits: Tensor, owners: Tensor) -> Tensor:
    """(n, C) of logits (n, T) and owners (T, C): a softmax over all sentences, the mean over those of a class."""
    share = owners.to(logits.dtype) / owners.sum(dim=0)
    return torch.as_tensor(logits.softmax(dim=1) @ share)
