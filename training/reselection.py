"""The bank of a cache selected anew from its training images, as select_concepts does it, without a file being written.

Which concepts tell classes apart, whether they carry signal, and what stands in for them is learnt from labels. Where a
regime or a fold hides images or their labels, the bank on disk knows more than training may; this is what it would have
been. It is made of vectors of view 0 and of the classes that training is told: of several candidates by their
probability, and for the gate and for prototypes the most probable one, the first of equals. Texts of classes that the
cache does not have are left out. The gate is asked where `select.fallback` is auto, on the cache's images that choose,
with the classes that these are told.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from fieldmark.command import UserError
from fieldmark.concepts import gate
from fieldmark.concepts.selection import Row, Selected, find_prototypes, read_texts, select_bank
from fieldmark.params import Select
from fieldmark.store import read_header
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank
from training.layers.logistic import as_probabilities
from training.relabelling import classes_told

MAKES = frozenset({"names", "concepts", "owners"})
NEEDS = MAKES  # and vectors of whole images, be they of `globals` or of `nodes`
CONCEPTS = "concepts/concepts.parquet"


def files(encoder: str) -> dict[str, str]:
    """What is read beside the parts of NEEDS."""
    return {CONCEPTS: "concepts/1", f"embed/{encoder}/text.parquet": "embed.text/1"}


def read_selection(data: Path, encoder: str) -> Select:
    """The settings that the bank on disk says it was selected with. Raises UserError where it does not say them."""
    path = data / f"bank/{encoder}.parquet"
    made_by = read_header(path, "bank/1").params
    unsaid = [name for name in Select.model_fields if name not in made_by]
    if unsaid:
        raise UserError(
            f"{path}: does not say what select.{unsaid[0]} was, so a version before made it; run select_concepts again"
            " (dvc repro)"
        )
    return Select.model_validate({name: made_by[name] for name in Select.model_fields})


def select(cache: Cache, request: Request, judged: Row | None = None) -> Selected:
    """The bank that the cache's training images select; `judged` is what the gate says, where it has been asked."""
    data, encoder, classes = request.data, request.encoder, np.array(cache.classes, dtype=object)
    settings, text = read_selection(data, encoder), data / f"embed/{encoder}/text.parquet"
    train, val = cache.images("train"), cache.images("choose")
    x, told = cache.globals(train), classes_told(cache)
    values = as_probabilities(cache.target[train], len(classes))
    weight = values.sum(0)
    means = (values.T @ x)[weight > 0] / weight[weight > 0, None]

    def judge(concepts: np.ndarray, owners: list[set[str]]) -> Row:
        if judged is not None or settings.fallback != "auto":
            return judged or {"verdict": "unknown"}
        of_train = x.numpy(), np.array(list(told.values()), dtype=object)
        told_val = as_probabilities(cache.target[val], len(classes)).argmax(1).numpy()
        return gate.judge(of_train, (cache.globals(val).numpy(), classes[told_val]), concepts, owners)

    return select_bank(
        read_texts(data / CONCEPTS, text, set(cache.classes)),
        means.numpy(),
        read_header(text, "embed.text/1").params["logit_scale"],
        settings,
        judge,
        partial(find_prototypes, data / f"embed/{encoder}/images", request.buckets, told, settings.per_class),
    )


def apply(cache: Cache, request: Request, inner: Cache | None = None) -> Cache:
    """The cache with the bank that its training images select. Apply a regime before, and hide_test after.

    `inner` is the cache of a fold before those that chose joined its training images: whether concepts carry signal
    was chosen there, and stands.
    """
    by_gate = read_selection(request.data, request.encoder).fallback == "auto"
    bank = select(cache, request, select(inner, request).judged if by_gate and inner is not None else None)
    owners = np.array([[name in row["class_ids"] for name in cache.classes] for row in bank.rows])
    stored = bank.vectors.astype(np.float16).astype(np.float32)  # as a file of the bank holds them
    return cache.with_part(
        Bank(
            path=cache.part(Bank).path,
            K=torch.from_numpy(stored),
            kind=tuple(row["kind"] for row in bank.rows),
            kept=torch.tensor([row["kept"] for row in bank.rows], dtype=torch.bool),
            owners=torch.from_numpy(owners.reshape(len(bank.rows), len(cache.classes))),
        )
    )
