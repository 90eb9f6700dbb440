"""One text vector a class: its name's, that of what is said of it, or both. What methods ask that set texts beside
images, or in the place of images that a class has not."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import Cache, feature_words
from training.data.bank import Bank
from training.layers.features import FeatureSettings, parts_of
from training.layers.logistic import as_probabilities, training_globals
from training.layers.teachers import Teachers
from training.layers.text_map import PENALTIES, TEACHERS, TextMap, explained, least_error
from training.layers.texts import class_text
from training.methods import NotPossible

Texts = Literal["names", "concepts", "both"]
READS = feature_words() | {"globals", "names", "concepts", "owners"}  # of a probe that sets texts beside global vectors


class TextSettings(FeatureSettings):
    """The knobs of such a probe."""

    texts: Texts = "names"  # what is said of a class: names, concepts, or the middle of both


def reads(settings: TextSettings) -> frozenset[str]:
    """What of READS these settings leave."""
    found = parts_of(settings.features) | text_reads(settings.texts)
    return found if "nodes" in found else found | {"globals"}


def text_reads(texts: Texts) -> frozenset[str]:
    """What READS calls these texts."""
    return frozenset({"owners", *(("names", "concepts") if texts == "both" else (texts,))})


def own_texts(bank: Bank) -> Tensor:
    """(C, M) bool: the texts that each class owns and is judged by: kept ones, names and prototypes apart."""
    return bank.own.T & bank.kept & ~bank.of_kind("name", "proto")


def concept_mean(cache: Cache, owned: Tensor, beside: Tensor | None = None) -> Tensor:
    """(C, D): the mean over the texts of each class in owned (C, M) bool. A text that the bank holds twice counts once.

    With `beside` (C, D) each text is first set beside that: the middle of both, of unit length. Raises NotPossible for
    a class without texts.
    """
    bank, means = cache.part(Bank), []
    for label, (class_id, rows) in enumerate(zip(cache.classes, owned, strict=True)):
        if not rows.any():
            raise NotPossible(
                f"{bank.path}: class {class_id} has no kept concept; write texts of it (concepts.import or"
                " concepts.edits) or have a model asked (llm.mode live); where it has texts, drop_reason in"
                " data/concepts/concepts.parquet says why none was kept"
            )
        found = torch.unique(bank.K[rows], dim=0)
        means.append((found if beside is None else F.normalize(found + beside[label], dim=-1)).mean(0))
    return torch.stack(means)


def text_blocks(cache: Cache, texts: Texts) -> list[Tensor]:
    """The name vector of each class, the mean of its concepts, or both: (C, D) each, of unit length.

    Raises UserError for a class without a name, NotPossible for one without a concept, where they are asked for.
    """
    found = [class_text(cache)] if texts != "concepts" else []
    if texts != "names":
        found.append(F.normalize(concept_mean(cache, own_texts(cache.part(Bank))), dim=-1))
    return found


def class_texts(cache: Cache, texts: Texts) -> Tensor:
    """(C, D): one unit vector a class, the middle of name and concepts where both are asked for."""
    return F.normalize(torch.stack(text_blocks(cache, texts)).sum(0), dim=-1)


def class_mix(cache: Cache, texts: Texts) -> Tensor | None:
    """(C, C): by their texts, which mix of the classes with training images each class without some is; rows sum to 1.

    The map of layers/text_map.py from texts to the class means p of global vectors is linear in these: q_u, where it
    expects the images of class u, is sum over s of mix_us p_s. Leaving classes out chooses its penalty. A class with
    images is itself. None where every class is. Raises NotPossible where fewer than three classes have images, or a
    class lacks a text; UserError for one without a name.
    """
    text = torch.cat(text_blocks(cache, texts), dim=1)
    vectors, target = training_globals(cache)
    told = as_probabilities(target, len(cache.classes)).double()
    taught = told.any(0)
    if taught.all():
        return None
    if taught.sum() < TEACHERS:
        raise NotPossible(
            f"fewer than {TEACHERS} classes have images to learn from what a class without images is like; leave it"
            " unsaid (unseen: null), or take zero_shot or description_zero_shot"
        )
    told = told[:, taught]
    means = told.T @ vectors.double() / told.sum(0)[:, None]
    penalty = least_error(TextMap(text[taught], means), PENALTIES)
    itself = torch.eye(len(taught), dtype=means.dtype, device=means.device)
    mix = itself * taught
    shares = TextMap(text[taught], itself[taught][:, taught]).predict(text[~taught], penalty)
    mix[~taught] = shares @ itself[taught]
    return mix.float()


class Expectation(NamedTuple):
    """Where classes are expected by their texts, within the span of the images that teach (r dimensions)."""

    of_teachers: Tensor  # (T, r): of each class that teaches, by the map that was fitted without it
    of_classes: Tensor  # (C, r): of each class told apart; of one that teaches, the same
    penalty: float  # of the map; leaving classes out chose it
    error: float  # the mean squared error of what is said of classes left out
    explained: float  # the share of the spread of class means that this explains; under 0 where texts mislead


def expect(
    cache: Cache, lent: Cache, teachers: Teachers, texts: Texts, penalties: Sequence[float]
) -> Expectation:
    """By a map that the classes of `lent` teach (layers/text_map.py), `cache` itself or another.

    Raises UserError for a class without a name, NotPossible for one without a concept, where they are asked for.
    """
    text_map = TextMap(torch.cat(text_blocks(lent, texts), dim=1)[teachers.taught], teachers.centres)
    penalty = least_error(text_map, penalties)
    left_out = text_map.left_out(penalty)
    expected = text_map.predict(torch.cat(text_blocks(cache, texts), dim=1), penalty)
    if lent is cache:
        expected[teachers.taught] = left_out
    return Expectation(left_out, expected, penalty, *explained(text_map.means, left_out))
