"""What was said of an image, or else of those that it is linked to: the feature `inherited/NAME` of probes.

    t_i = the mean sentence of image i, of unit length, where a model described it
    t_i = unit(sum_j w_ij t_j)  over the nearest NEIGHBOURS training images j that send to i by links/NAME and have a t,
          w_ij the links' weights

Training images that none with a description reaches take theirs from those that were reached before, and so on; what no
link reaches at all is 0. Training images of this fit alone are heard [design]: the vector of a judged image follows
from its own sentences and links, and no other judged image has a part in it.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.command import UserError
from training.data import Batch, Cache
from training.data.cache import Fields
from training.data.descriptions import mean_sentence
from training.data.features import inherited_name
from training.layers.states import State, within
from training.links import LinkSettings, Memory, links_word, senders

CHUNK = 2048  # images whose sentences are read at a time
NEIGHBOURS = 10  # an image hears so many of the nearest that have a vector [design]
SMALLEST = 1e-6  # a weight, so that links of no weight count alike


def is_inherited(feature: str) -> bool:
    return inherited_name(feature) is not None


def settings_of(feature: str) -> LinkSettings:
    name = inherited_name(feature)
    assert name is not None
    return LinkSettings(links=name, neighbours=NEIGHBOURS)


class Inherited(nn.Module):
    text: Tensor  # (M, D), of the training images that have one, unit length

    def __init__(self, memory: Memory, text: Tensor) -> None:
        """text (M, D): of each row of the memory."""
        super().__init__()
        self.memory = memory
        self.register_buffer("text", text)

    @classmethod
    def of(cls, cache: Cache, feature: str, encoder: int = 0) -> Self:
        """Of the training images. `encoder`: 0 for the run's own, from 1 for those of `also`.

        Raises UserError where none of them has a description.
        """
        settings, train = settings_of(feature), senders(cache, settings_of(feature))
        text = torch.cat([own_text(encoders_of(cache.batch(some))[encoder]) for some in train.split(CHUNK)])
        if not text.any():
            raise UserError(
                f"no training image has a description, which {feature} hands on; set describe.enabled: true and run"
                " describe_images (dvc repro), or leave it out"
            )
        links = replace(cache.only({links_word(settings)}), also=()).batch(train)
        while True:
            there = text.any(1)
            found = cls(Memory.of_keys(settings, links.key[there], cache.views), text[there])
            reached = torch.where(there[:, None], text, found.heard(links))
            if torch.equal(reached.any(1), there):
                return found
            text = reached

    @classmethod
    def from_state(cls, state: State, feature: str) -> Self:
        return cls(Memory.from_state(within(state, "memory"), settings_of(feature)), state["text"])

    def heard(self, fields: Fields) -> Tensor:
        """(B, D): the mean over what sends to each image, of unit length; 0 where nothing does."""
        row, place, weight = self.memory.entering(fields)
        total = self.text.new_zeros(len(fields.key), self.text.shape[1])
        return F.normalize(total.index_add(0, place, weight.clamp(min=SMALLEST)[:, None] * self.text[row]), dim=-1)

    def forward(self, fields: Fields) -> Tensor:
        """(B, D) float32: of a batch, or of another encoder in it."""
        own = own_text(fields)
        return torch.where(own.any(1, keepdim=True), own, self.heard(fields))


def own_text(fields: Fields) -> Tensor:
    """(B, D) float32: the mean sentence of each image, 0 without any."""
    return mean_sentence(fields.d, fields.dm)


def encoders_of(batch: Batch) -> tuple[Fields, ...]:
    """What a batch has of the run's own encoder, and of each other one."""
    return batch, *batch.also
