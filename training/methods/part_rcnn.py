"""An object and its parts among an image's nodes: after part-based R-CNN (Zhang et al., ECCV 2014 [mem]).

    s_k(n) = sigmoid(v_k . l_n + b_k)                       l_n the standardised node n; k = 0 the root, 1..P the parts
    choose n_0..n_P that maximise  s_0(n_0) prod_k s_k(n_k) inside(n_k, n_0) delta_k(n_k, n_0)^alpha
    logits = Linear([g; l_n_0; l_n_1; ...; l_n_P])          g is node 0, the whole picture

`inside` is 1 where the centre of the part's box lies in the root's, or within 0.02 of it, else 0. `delta_k` is a
Gaussian of where that centre lies in the frame of the root's box, one a part and along each side, 1 at its mean. Every
node may be the root, the whole picture too, so that there is a choice for every image. For each root the parts are
chosen one by one, and the best root is taken: that is the best of all choices, without going through them.

A choice has no gradient. In training an image is a mean over all choices, each weighed by softmax(log of the product /
temperature); what a node weighs as a part is a sum over roots, and exact. The temperature falls by epochs to a tenth of
where it starts; evaluation takes the best choice.

mode weak: detectors and Gaussians learn from classes alone. mode strong: the parts are those that the data set marks.
In training images a detector should find the nodes whose box overlaps the part's by 0.7 (IoU), and the one that
overlaps it most; the root's is the box around all visible parts; Gaussians are fitted to where these lie. At evaluation
no mark is read, of no image.

A reconstruction from memory. The paper proposes regions by selective search, trains SVMs on boxes first and a
classifier behind them, and compares nearest neighbours and mixtures of Gaussians for delta. Here regions are the nodes
that are stored, all is trained at once, delta is one Gaussian, and a part smaller than a fifth of the picture, such as
a point, counts as a square of that side [design].
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.data.parts import ObjectParts
from training.layers.blocks import Dropout, Standardise, silent
from training.layers.boxes import centre_and_sides, overlap
from training.layers.nodes import in_precision, training_sample
from training.layers.states import State, within
from training.loop import EVALUATION_BATCH, NotNegative, Positive
from training.methods import Fitted, NotPossible, Output
from training.offset import PROBE_WORDS
from training.token_heads import Beside, BesideSettings, fit_head, head_also_reads, head_reads

SEEDED = True
READS = frozenset({"nodes", "boxes", "parts"}) | PROBE_WORDS
ALSO = PROBE_WORDS
also_reads = head_also_reads
SLACK = 0.02  # of the picture's side: how far outside the root's box the centre of a part may lie
OVERLAP = 0.7  # IoU from which on a node shows a part
SMALLEST = 0.2  # of the picture's side: smaller parts count as so large
SPREAD, NARROWEST = 0.5, 0.05  # of a Gaussian, in sides of the root's box: before anything is known, and at least
COLDEST = 0.1  # of the first temperature, in the last epoch


class LossWeights(Block):
    """Of each loss beside the cross entropy."""

    detectors: NotNegative = 1.0  # whether detectors find the parts that are marked; mode strong alone has it


class Settings(BesideSettings):
    mode: Literal["weak", "strong"] = "weak"  # weak: parts are whatever tells classes apart; strong: those marked
    parts: Count = 4  # in mode weak: P
    geometry: NotNegative = 0.1  # how much the place of a part counts: alpha
    temperature: Positive = 1.0  # of the choice of nodes in the first epoch of training
    dropout: Fraction = 0.3  # share of activations dropped in training
    loss_weights: LossWeights = LossWeights()  # beside the cross entropy, weight 1; 0 switches one off


def reads(settings: Settings) -> frozenset[str]:
    return head_reads(settings, own_reads(settings))


def own_reads(settings: Settings) -> frozenset[str]:
    """What it reads itself, and not by its probe."""
    return frozenset({"nodes", "boxes"}) | ({"parts"} if settings.mode == "strong" else set())


class Geometry(nn.Module):
    """log delta_k: where the centre of part k lies in the frame of the root's box, whose sides are 1."""

    def __init__(self, mean: Tensor, spread: Tensor, trained: bool) -> None:
        """mean and spread (P, 2), from the centre of the root's box."""
        super().__init__()
        self.mean = nn.Parameter(mean, requires_grad=trained)
        self.log_spread = nn.Parameter((spread / SPREAD).log(), requires_grad=trained)

    def forward(self, offset: Tensor) -> Tensor:
        """offset (..., 2) -> (..., P)."""
        precision = (SPREAD * self.log_spread.exp()).square().reciprocal()
        # -1/2 sum over sides of (offset - mean)^2 / spread^2, multiplied out: no tensor of all parts and both sides.
        squares, products = offset.square() @ precision.T, offset @ (self.mean * precision).T
        return products - (squares + (self.mean.square() * precision).sum(1)) / 2


def node_boxes(batch: Batch) -> Tensor:
    """(B, n, 4): of every node; that of the whole picture is all of it, in whatever view."""
    low = batch.box.new_zeros(len(batch.box), 1, 2)
    return torch.cat([torch.cat([low, low + 1], dim=2), batch.box], dim=1)


def is_inside(box: Tensor, mask: Tensor) -> Tensor:
    """(B, root, part) bool: whether the centre of a node lies in the box of another, of boxes (B, n, 4), mask (B, n).

    What does not exist is inside nothing. A root that does not exist holds all, so that no row is empty.
    """
    centre, _ = centre_and_sides(box)
    low, high = box[:, :, None, :2] - SLACK, box[:, :, None, 2:] + SLACK
    inside = ((centre[:, None] >= low) & (centre[:, None] <= high)).all(-1)
    return (inside | ~mask[:, :, None]) & mask[:, None]


def offsets(centre: Tensor, root: Tensor) -> Tensor:
    """centre (..., 2) in the frame of root boxes (..., 4): 0 at the middle of the box, whose sides are 1."""
    middle, sides = centre_and_sides(root)
    return (centre - middle) / sides.clamp(min=SLACK)


def share_out(root: Tensor, part: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """(B, n, 1+P): how often each node is the root and each part, over all choices by their softmax / temperature.

    root (B, n): log s_0; part (B, n, n, P): what part k at a node adds for each root, -inf where it cannot be there.
    """
    part = part / temperature
    of_root = root / temperature + part.logsumexp(2).sum(-1)
    by_root = of_root.masked_fill(~mask, -torch.inf).softmax(1)
    by_part = torch.einsum("br,brnk->bnk", by_root, part.softmax(2))
    return torch.cat([by_root[..., None], by_part], dim=2)


def choose(root: Tensor, part: Tensor, mask: Tensor) -> Tensor:
    """(B, n, 1+P): 1 at the node that is the root, or the part, in the best of all choices; arguments as in share_out.

    The first of equals.
    """
    best = part.max(2)  # (B, root, P)
    by_root = (root + best.values.sum(-1)).masked_fill(~mask, -torch.inf).argmax(1)
    by_part = best.indices[torch.arange(len(root), device=root.device), by_root]
    chosen = torch.cat([by_root[:, None], by_part], dim=1)
    return (torch.arange(root.shape[1], device=root.device)[:, None] == chosen[:, None]).float()


def marked_boxes(part_box: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1+P, 4), (B, 1+P) bool: the box around all parts that are seen, then each part, none too small."""
    centre, sides = centre_and_sides(part_box)
    half = sides.clamp(min=SMALLEST) / 2
    low, high = centre - half, centre + half
    around = [
        low.masked_fill(~seen[..., None], torch.inf).amin(1, keepdim=True),
        high.masked_fill(~seen[..., None], -torch.inf).amax(1, keepdim=True),
    ]
    whole, any_seen = torch.cat(around, dim=2), seen.any(1, keepdim=True)
    whole = whole.where(any_seen[..., None], torch.zeros_like(whole))
    return torch.cat([whole, torch.cat([low, high], dim=2)], dim=1), torch.cat([any_seen, seen], dim=1)


def detection(scores: Tensor, overlaps: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of detectors (B, n, 1+P), before the sigmoid, with the nodes that show what is marked.

    overlaps (B, 1+P, n) of nodes with boxes that are `seen` (B, 1+P). The mean over nodes that show it and that over
    the others count alike; then the mean over all that is seen and overlaps a node.
    """
    scores, overlaps = scores.transpose(1, 2), overlaps.masked_fill(~mask[:, None], 0.0)
    most = overlaps.amax(2, keepdim=True)
    shows = (overlaps >= OVERLAP) | ((overlaps == most) & (most > 0))
    others = ~shows & mask[:, None]
    told = seen & (most > 0).squeeze(2)
    by_box = [
        (F.softplus(signed) * which).sum(2) / which.sum(2).clamp(min=1)
        for signed, which in ((-scores, shows), (scores, others))
    ]
    return (torch.stack(by_box).mean(0) * told).sum() / told.sum().clamp(min=1)


class PartRCNN(nn.Module):
    def __init__(
        self, scale: Standardise, geometry: Geometry, beside: Beside, classes: int, settings: Settings
    ) -> None:
        super().__init__()
        dimension, parts = len(scale.mean), len(geometry.mean)
        self.settings, self.epoch = settings, 0  # training's; see train()
        self.scale, self.geometry, self.beside = scale, geometry, beside
        self.detect = nn.Linear(dimension, 1 + parts)
        self.dropout = Dropout(settings.dropout)
        self.classify = silent((2 + parts) * dimension, classes)

    def train(self, mode: bool = True) -> "PartRCNN":
        """Training mode or not. The loop asks for training once an epoch: so epochs are counted for `temperature`."""
        self.epoch += mode
        return super().train(mode)

    @property
    def temperature(self) -> float:
        """Of the softmax over choices, in this epoch of training."""
        share = min(max(self.epoch - 1, 0) / max(self.settings.epochs - 1, 1), 1.0)
        return self.settings.temperature * COLDEST**share

    def forward(self, batch: Batch) -> Output:
        x, box = in_precision(self.scale(batch.nodes)), node_boxes(batch)
        scores = self.detect(x).float()  # (B, n, 1+P)
        weight = self.weigh(scores, box, batch.mask)
        found = torch.cat([x[:, :1], weight.to(x.dtype).transpose(1, 2) @ x], dim=1).flatten(1)
        losses = {}
        if self.training and self.settings.mode == "strong":
            marked, seen = marked_boxes(batch.part_box, batch.part_seen)
            losses = {"detectors": detection(scores, overlap(marked, box), seen, batch.mask)}
        return Output(self.beside(batch, self.classify(self.dropout(found))), losses, weight.mean(2))

    def weigh(self, scores: Tensor, box: Tensor, mask: Tensor) -> Tensor:
        """(B, n, 1+P): how much each node is the root and each part; scores (B, n, 1+P), box (B, n, 4), mask (B, n)."""
        scores = F.logsigmoid(scores)
        root, part = scores[..., 0], scores[:, None, :, 1:]
        if self.settings.geometry:
            centre, _ = centre_and_sides(box)
            with torch.autocast(box.device.type, enabled=False):  # squares cancel out: bfloat16 would leave noise
                place = self.geometry(offsets(centre[:, None], box[:, :, None]))
            part = part + self.settings.geometry * place
        part = torch.where(is_inside(box, mask)[..., None], part, -torch.inf)  # (B, root, node, P)
        return share_out(root, part, mask, self.temperature) if self.training else choose(root, part, mask)


def free_geometry(parts: int) -> Geometry:
    """Of parts that nothing is known of: about the middle of the root, each a little elsewhere, and trained."""
    return Geometry(0.1 * torch.randn(parts, 2), torch.full((parts, 2), SPREAD), trained=True)


def marked_geometry(cache: Cache) -> Geometry:
    """Where the parts of training images lie in the node that is most their root. Raises NotPossible where none is."""
    train, found = cache.images("train"), []
    if not cache.part(ObjectParts).part_seen[train].any():
        raise NotPossible("part_rcnn: mode strong: the data set marks no part of a training image; take mode: weak")
    for images in train.split(EVALUATION_BATCH):
        batch = cache.batch(images)
        box, (marked, seen) = node_boxes(batch), marked_boxes(batch.part_box, batch.part_seen)
        overlaps = overlap(marked[:, :1], box).squeeze(1).masked_fill(~batch.mask, -1.0)
        root = box[torch.arange(len(box), device=box.device), overlaps.argmax(1)]
        centre, _ = centre_and_sides(marked[:, 1:])
        found.append((offsets(centre, root[:, None]).double(), seen[:, 1:, None]))
    offset, seen = (torch.cat(each) for each in zip(*found, strict=True))
    count = seen.sum(0).clamp(min=1)
    mean = (offset * seen).sum(0) / count
    spread = ((offset - mean).square() * seen).sum(0).div(count).sqrt().clamp(min=NARROWEST)
    spread = spread.where(seen.any(0), torch.full_like(spread, SPREAD))
    return Geometry(mean.float(), spread.float(), trained=False)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    sample, classes = training_sample(cache), len(cache.classes)
    scale = Standardise(sample.nodes[sample.mask])
    known = marked_geometry(cache) if settings.mode == "strong" else None

    def make(beside: Beside) -> PartRCNN:
        geometry = free_geometry(settings.parts) if known is None else known
        return PartRCNN(scale, geometry, beside, classes, settings)

    return fit_head(cache, settings, seed, own_reads(settings), make, settings.loss_weights.model_dump())


def build(state: State, settings: Settings, classes: int) -> PartRCNN:
    mean = torch.zeros_like(state["geometry.mean"])
    geometry = Geometry(mean, torch.ones_like(mean), trained=settings.mode == "weak")
    beside = Beside.from_state(within(state, "beside"), settings, classes)
    return PartRCNN(Standardise.from_state(within(state, "scale")), geometry, beside, classes, settings)
