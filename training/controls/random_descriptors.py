"""Each class owns as many texts as before, "NAME, which has ..." and words or characters drawn at random.

After WaffleCLIP (Roth et al., ICCV 2023 [mem]). Names stay, texts of no class are left out. Ranks are drawn once for
all classes: what stands after the name is the same for classes that own as many.
"""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

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
    texts, path = read_control_texts(request.data, request.encoder)
    table, bank, classes = texts.filter(pc.field("kind") == "random"), cache.part(Bank), cache.classes
    vectors, owners = torch.from_numpy(vectors_of(table).astype(np.float32)), np.array(table["class_id"].to_pylist())
    ranks = table["rank"].to_numpy()
    drawn = torch.randperm(int(ranks.max(initial=-1)) + 1, generator=request.generator).numpy()
    names = bank.rows(bank.of_kind("name"))
    counts = bank.own[bank.kept & ~bank.of_kind("name")].sum(0).tolist()
    taken: list[Tensor] = []
    for class_id, count in zip(classes, counts, strict=True):
        rows = np.flatnonzero(owners == class_id)
        rows = rows[drawn[ranks[rows]].argsort()]
        if len(rows) < count:
            raise UserError(
                f"{path}: holds {len(rows)} random descriptors of class {class_id}, which owns {count}"
                f" concepts; raise per_class of controls to {max(counts)} and run embed_controls (dvc repro)"
            )
        taken.append(torch.from_numpy(rows[:count]))
    concepts = torch.cat(taken)
    own = F.one_hot(torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts)), len(classes)).bool()
    changed = replace(
        bank,
        K=torch.cat([names.K, vectors[concepts]]),
        kind=(*names.kind, *["visual"] * len(concepts)),
        kept=torch.cat([names.kept, torch.ones(len(concepts), dtype=torch.bool)]),
        owners=torch.cat([names.own, own]),
    )
    return cache.with_part(changed)
