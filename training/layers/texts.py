"""What a bank's texts come to by class."""

from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from training.data import Cache
from training.data.bank import Bank


def class_text(cache: Cache) -> Tensor:
    """(C, D): each class's mean name vector. Raises UserError for a class without one."""
    bank = cache.part(Bank)
    owned = bank.own.T & bank.of_kind("name")  # (C, M)
    for class_id, found in zip(cache.classes, owned.any(1).tolist(), strict=True):
        if not found:
            raise UserError(
                f"{bank.path}: class {class_id} has no text of kind name; run clean_concepts again (dvc repro)"
            )
    return F.normalize(owned.float() @ F.normalize(bank.K, dim=-1), dim=-1)
