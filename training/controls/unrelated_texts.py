"""Kept concepts become texts about things that are neither animals nor plants, each another one; names stay."""

import numpy as np
import pyarrow.compute as pc
import torch

from fieldmark.command import UserError
from fieldmark.store import vectors_of
from training import relabelling as AFTER
from training.control_texts import files, read_control_texts
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank

__all__ = ["AFTER", "files"]
CHANGES = frozenset({"concepts", "labels"})
NEEDS = frozenset({"names", "concepts", "owners"})
DRAWS = True
SUBJECT = "what the texts say does"


def apply(cache: Cache, request: Request) -> Cache:
    table, path = read_control_texts(request.data, request.encoder)
    bank = cache.part(Bank)
    bank = bank.rows(bank.kept | bank.of_kind("name"))
    concepts = bank.kept.nonzero().flatten()
    texts = torch.from_numpy(vectors_of(table.filter(pc.field("kind") == "unrelated")).astype(np.float32))
    if len(texts) < len(concepts):
        raise UserError(
            f"{path}: holds {len(texts)} unrelated texts for {len(concepts)} concepts;"
            f" add lines to data/controls/unrelated.txt, or set control.concepts"
        )
    K = bank.K.clone()
    K[concepts] = texts[torch.randperm(len(texts), generator=request.generator)[: len(concepts)]]
    return cache.with_part(bank).change(Bank, K=K)
