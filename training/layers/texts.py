"""What a bank's texts come to by class."""

from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from training.data import Cache
from training.data.bank import Bank


def own_names(bank: Bank) -> Tensor:
    """(C, M) bool: the texts that name each class."""
    return bank.own.T & bank.of_kind("name")


def name_terms(bank: Bank, g: Tensor, classes: Tensor) -> Tensor:
    """(B, M): the terms of g . t_a - g . t_b by the texts that name a or b; g (B, D), t class_text, classes (B, 2)."""
    owned, K = own_names(bank).float(), F.normalize(bank.K, dim=-1)
    share = owned / (owned @ K).norm(dim=-1, keepdim=True)
    a, b = share[classes].unbind(1)
    return (g @ K.T) * (a - b)


def class_text(cache: Cache) -> Tensor:
    """(C, D): each class's mean name vector. Raises UserError for a class without one."""
    bank = cache.part(Bank)
    owned = own_names(bank)
    for class_id, found in zip(cache.classes, owned.any(1).tolist(), strict=True):
        if not found:
            raise UserError(
                f"{bank.path}: class {class_id} has no text of kind name; run clean_concepts again (dvc repro)"
            )
    return F.normalize(owned.float() @ F.normalize(bank.K, dim=-1), dim=-1)
