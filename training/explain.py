"""Why a model says class a and not class b of an image: its patches and texts by what they add to logit a - logit b.

`classes` (n, 2) holds a and b of each image; `top_two` gives the first and the second that the model says. A value is
above 0 where a patch or text speaks for a. Patches come in the order of the cache's local nodes, 0 where an image has
fewer; where they lie say `Boxes`. Of a model that reads no node (a probe on whole pictures) there is nothing to say by
patches: which part of the picture counts could only be asked of the pixels, through the encoder. Then, and where a
method has no node scores or no texts, the answer is None.

occlude      logit a - logit b falls by so much where the patch is taken out: no longer counted among the nodes, without
             edges and texts, its vector 0. Coarser nodes and the vector of the whole picture stay, and that saw the
             patch too. So it is what the model gains by the patch beside the whole picture, and not what the decision
             would be without that part of the scene; patches that say the same can all have 0.
gradients    integrated gradients (Sundararajan et al., ICML 2017 [mem]): (v - m) . the mean of the gradient by v on the
             straight way of all patches from m to v, m the mean patch of the image. The patches of an image sum to
             what is lost where each becomes the mean one: a patch counts for what sets it apart from the others, and no
             node goes. v . gradient at v alone is cheaper and misses planted patches that this finds: behind a layer
             norm the length of a vector hardly counts, and where a decision is sure the slope is flat.
node_scores  how much the method itself says each patch counted, for whatever class.
texts        by the texts of the bank, as the method's file defines it (`texts_add`): exact terms of a sum where logits
             are linear in the texts, else the fall where an image's labels lack the text.
pairs        by pairs of texts that show at the same place (`pairs_add`): exact terms of a sum.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from training.data import Batch, Cache, Fields
from training.data.bank import Bank
from training.data.nodes import Nodes
from training.loop import EVALUATION_BATCH, margin, predict
from training.methods import load_method
from training.restore import Restored

STEPS = 32  # of the way that gradients are integrated on
# Of a logit: a patch that moves a decision by less is no reason for it. It changes no probability by more than 0.013.
LEAST_MOVE = 0.05
PROTOTYPE = "prototype of "  # begins the name of a concept that has no text; the classes that own it follow
Kind = TypeVar("Kind", bound=Fields)


def top_two(model: nn.Module, cache: Cache, images: Tensor) -> Tensor:
    """(n, 2): the class that the model says of each of `images` (n,), and the second."""
    return predict(model, cache, images).topk(2).indices


def keep_nodes(batch: Batch, keep: Tensor) -> Batch:
    """The batch as if its images had no local nodes but those in `keep` (B, N); the global node stays."""
    mask = batch.mask & torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)
    by_node = dict.fromkeys(("mask", "selected", "density"), mask)
    by_node |= dict.fromkeys(("nodes", "concept_weight"), mask[..., None])
    by_node |= {"adjacency": (mask[:, :, None] & mask[:, None, :])[..., None]}

    def kept(fields: Kind) -> Kind:
        left = {name: fields.values[name] * shown for name, shown in by_node.items() if fields.has(name)}
        return fields.changed(**left)

    return kept(batch).changed(also=tuple(kept(other) for other in batch.also))


@torch.no_grad()
def node_scores(model: nn.Module, cache: Cache, images: Tensor) -> Tensor | None:
    """(n, N) in [0, 1], of view 0; None where the method gives none."""
    model.eval()
    found = [model(cache.batch(some)).node_scores for some in images.split(EVALUATION_BATCH)]
    return None if found[0] is None else torch.cat([scores[:, 1:].float() for scores in found])


@torch.no_grad()
def occlude(model: nn.Module, cache: Cache, images: Tensor, classes: Tensor) -> Tensor | None:
    """(n, N) float32; None where no node is read. A pass for each patch of an image, EVALUATION_BATCH at a time."""
    if not cache.has(Nodes):
        return None
    model.eval()
    patches = cache.part(Nodes).mask[images * cache.views, 1:].cpu()
    whole = torch.cat([
        margin(model(cache.batch(some)).logits, pair)
        for some, pair in zip(images.split(EVALUATION_BATCH), classes.split(EVALUATION_BATCH), strict=True)
    ])  # fmt: skip
    fall = torch.zeros(patches.shape, device=cache.device)
    for rows in patches.nonzero().split(EVALUATION_BATCH):
        image, node = rows.T
        keep = torch.ones(len(rows), patches.shape[1], dtype=torch.bool).scatter_(1, node[:, None], False)
        without = model(keep_nodes(cache.batch(images[image]), keep.to(cache.device))).logits
        fall[image, node] = whole[image] - margin(without, classes[image])
    return fall


def gradients(model: nn.Module, cache: Cache, images: Tensor, classes: Tensor) -> Tensor | None:
    """(n, N) float32; None where no node is read. The vectors of other encoders at the place of a patch count too."""
    if not cache.has(Nodes):
        return None
    model.eval()
    found = torch.zeros(len(images), cache.part(Nodes).mask.shape[1] - 1, device=cache.device)
    for rows in torch.arange(len(images) * STEPS).split(EVALUATION_BATCH):
        image = rows // STEPS
        batch, share = cache.batch(images[image]), ((rows % STEPS + 0.5) / STEPS).to(cache.device)
        ways = [way_of(fields, batch.lm, share) for fields in (batch, *batch.also) if fields.has("nodes")]
        rest = iter(ways[1:])
        also = (other.changed(nodes=next(rest).nodes) if other.has("nodes") else other for other in batch.also)
        logits = model(batch.changed(nodes=ways[0].nodes, also=tuple(also))).logits
        by = torch.autograd.grad(
            margin(logits, classes[image]).sum(), [way.nodes for way in ways], allow_unused=True, materialize_grads=True
        )
        terms = [(way.whole * slope[:, 1:]).sum(-1) for way, slope in zip(ways, by, strict=True)]
        found.index_add_(0, image.to(cache.device), torch.stack(terms).sum(0) * batch.lm / STEPS)
    return found


class Way(NamedTuple):
    """From the mean patch of each image to its patches."""

    nodes: Tensor  # (B, N+1, D), a leaf that takes a gradient: node 0 as it is, and the patches on their way
    whole: Tensor  # (B, N, D): how far it is


def way_of(fields: Fields, patches: Tensor, share: Tensor) -> Way:
    """patches (B, N) bool: those that exist; share (B,) in [0, 1]: how far each image has come."""
    vectors = fields.nodes.float()
    local = vectors[:, 1:] * patches[..., None]
    mean = local.sum(1, keepdim=True) / patches.sum(1).clamp(min=1)[:, None, None]
    nodes = torch.cat([vectors[:, :1], mean + share[:, None, None] * (local - mean)], dim=1)
    return Way(nodes.requires_grad_(), local - mean)


class Texts(NamedTuple):
    """Texts of the bank by what they add, those that tell a and b apart the most first; n images."""

    text: Tensor  # (n, k) int64: rows of the bank (concept_idx); -1 where fewer texts say anything
    adds: Tensor  # (n, k) float32: to logit a - logit b


@torch.no_grad()
def texts(restored: Restored, cache: Cache, images: Tensor, classes: Tensor, most: int = 20) -> Texts | None:
    """The `most` texts that add most, for a or for b, to each image's decision; None where the method reads none.

    A text that speaks as much for a as for b adds nothing, however well it fits the picture.
    """
    method, found = load_method(restored.method), []
    if not hasattr(method, "texts_add") or not cache.has(Bank):
        return None
    for some, pair in zip(images.split(EVALUATION_BATCH), classes.split(EVALUATION_BATCH), strict=True):
        adds = method.texts_add(restored.model, restored.settings, cache, some, pair)
        if adds is None:
            return None
        text = adds.abs().topk(min(most, adds.shape[1])).indices
        adds = adds.gather(1, text)
        found.append((text.masked_fill(adds == 0, -1), adds))
    return Texts(*map(torch.cat, zip(*found, strict=True)))


class Pairs(NamedTuple):
    """Pairs of texts by what they add at the same place, those that tell a and b apart the most first; n images."""

    text: Tensor  # (n, k, 2) int64: rows of the bank; the same one twice where a text stands alone
    adds: Tensor  # (n, k) float32: to logit a - logit b; 0 where fewer pairs say anything
    more: Tensor  # (n, k) bool: whether the image has more of the pair than training images on average, or less


@torch.no_grad()
def pairs(restored: Restored, cache: Cache, images: Tensor, classes: Tensor, most: int = 20) -> Pairs | None:
    """The `most` pairs that add most, for a or for b, to each image's decision; None where the method reads none."""
    method, found = load_method(restored.method), []
    if not hasattr(method, "pairs_add") or not cache.has(Bank):
        return None
    for some, pair in zip(images.split(EVALUATION_BATCH), classes.split(EVALUATION_BATCH), strict=True):
        told = method.pairs_add(restored.model, restored.settings, cache, some, pair)
        if told is None:
            return None
        adds, text, more = told
        best = adds.abs().topk(min(most, adds.shape[1])).indices
        found.append((text[best], adds.gather(1, best), more.gather(1, best)))
    return Pairs(*map(torch.cat, zip(*found, strict=True)))


def name_text(text: str | None, class_ids: Sequence[str], names: Mapping[str, str]) -> str:
    """A text of the bank; a prototype has none and is named after the classes that own it. `names` is by class_id."""
    return text or PROTOTYPE + ", ".join(names[class_id] for class_id in class_ids)


def name_pair(first: str, second: str, more: bool) -> str:
    """How two texts at the same place are named, of which the picture has more than others do, or less.

    The same text twice is how much places differ in it.
    """
    amount = "more" if more else "less"
    if first == second:
        return f"{first}, setting places apart {amount} than on other pictures"
    return f"{amount} of {first} with {second} at the same place than on other pictures"


def can_say_why(method: str, reads: frozenset[str]) -> bool:
    """Whether a run of a method that reads this has patches or texts to name."""
    return "nodes" in reads or any(hasattr(load_method(method), name) for name in ("texts_add", "pairs_add"))


def reads_of(run: Restored) -> frozenset[str]:
    """What is read to say why, in the words of READS: what the run reads, and where its patches lie."""
    return run.reads | ({"boxes"} if "nodes" in run.reads else set())
