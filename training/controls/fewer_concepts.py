"""Only so many of the kept concepts: what `concepts: M` asks of a control.

One by one, a class that owns the fewest so far takes the next of its concepts in a drawn order, which then counts for
all its owners; concepts of no class come last. So the concepts of a smaller M are among those of a larger.
"""

import torch
from torch import Tensor

from fieldmark.command import UserError
from training import relabelling as AFTER
from training.controls import Request
from training.data import Cache
from training.data.bank import Bank

__all__ = ["AFTER"]
CHANGES = frozenset({"concepts", "labels"})
NEEDS = frozenset({"names", "concepts", "owners"})
DRAWS = True
SUBJECT = "the number of texts does"


def apply(cache: Cache, request: Request) -> Cache:
    bank, count = cache.part(Bank), request.control.concepts
    assert count is not None
    return cache.with_part(bank.rows(keep_concepts(bank, count, request.generator)))


def keep_concepts(bank: Bank, count: int, generator: torch.Generator) -> Tensor:
    """(M,) bool: the names, and `count` kept concepts. Raises UserError where there are fewer."""
    available = bank.kept & ~bank.of_kind("name")
    if count > int(available.sum()):
        raise UserError(f"{bank.path}: has {int(available.sum())} kept concepts, control.concepts asks for {count}")
    order = torch.randperm(len(bank.kind), generator=generator)
    order = order[available[order]]
    classes = torch.randperm(bank.own.shape[1], generator=generator).tolist()
    waiting = {label: order[bank.own[order, label]].tolist()[::-1] for label in classes}
    chosen, owned = torch.zeros(len(bank.kind), dtype=torch.bool), dict.fromkeys(classes, 0)
    taken = 0
    while taken < count:
        for label in classes:
            while waiting[label] and chosen[waiting[label][-1]]:
                waiting[label].pop()
        open_classes = [label for label in classes if waiting[label]]
        if not open_classes:
            break
        concept = waiting[min(open_classes, key=owned.__getitem__)].pop()
        chosen[concept] = True
        taken += 1
        for label in bank.own[concept].nonzero().flatten().tolist():
            owned[label] += 1
    ownerless = order[~bank.own[order].any(1)]
    chosen[ownerless[: count - taken]] = True
    return chosen | bank.of_kind("name")
