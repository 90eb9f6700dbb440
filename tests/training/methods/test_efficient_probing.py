"""Learned queries over tokens, against an explicit loop."""

import math

import torch

from tests.training.cache import GRID
from training.data import Batch
from training.data.tokens import as_shape
from training.layers.blocks import Standardise
from training.methods.efficient_probing import EfficientProbing, Settings
from training.token_heads import Beside

WIDTH, CLASSES = 10, 3


def batch_of(tokens: torch.Tensor) -> Batch:
    y = torch.zeros(len(tokens), dtype=torch.long)
    return Batch(y, y, {"tokens": tokens, "token_grid": as_shape(GRID)})


def made() -> tuple[EfficientProbing, torch.Tensor]:
    torch.manual_seed(0)
    tokens = torch.randn(4, 12, WIDTH)
    head = EfficientProbing(Standardise(tokens.flatten(0, 1)), Beside(None), CLASSES, Settings(queries=3, hidden=2))
    torch.nn.init.normal_(head.classify.weight)
    return head.eval(), tokens


def test_each_query_weighs_its_own_part_of_the_values() -> None:
    head, tokens = made()
    for image, x in enumerate(head.scale(tokens)):
        pooled = []
        for query, part in zip(head.queries, head.value.weight.chunk(3), strict=True):
            scores = torch.stack([query @ token / math.sqrt(WIDTH) for token in x])
            pooled.append(sum(share * (part @ token) for share, token in zip(scores.softmax(0), x, strict=True)))
        expected = head.classify(head.norm(torch.cat(pooled)))
        torch.testing.assert_close(head(batch_of(tokens)).logits[image], expected)


def test_the_order_of_tokens_does_not_matter() -> None:
    head, tokens = made()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(batch_of(tokens[:, order])).logits, head(batch_of(tokens)).logits)


def test_attention_sums_to_one_and_finds_what_a_query_looks_for() -> None:
    head, tokens = made()
    x = head.scale(tokens)
    assert torch.allclose(head.attention(x).sum(-1), torch.ones(4, 3))
    with torch.no_grad():
        head.queries[1] = 50 * x[2, 7]
    assert head.attention(x)[2, 1].argmax() == 7
