"""What methods add to the cross entropy: pure functions of tensors, each a scalar (docs/methods.md).

What a loss is told of the class is `target`, classes (B,) or probabilities (B, C), as in `Batch`: partial labels give
each candidate a share.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1
MARGIN = 0.4  # TransFG's alpha
DELETION = 0.5  # TRD's constant
ALPHA, DELTA = 32.0, 0.1  # Proxy-Anchor's steepness and margin
SHORTEST = 1e-3  # a proxy that is shorter has a smaller cosine, so that one of length 0 has a gradient


def likeliest_class(target: Tensor, logits: Tensor) -> Tensor:
    """(B,): the class; of several candidates the one that the logits favour."""
    if target.ndim == 1:
        return target
    return logits.detach().masked_fill(target <= 0, float("-inf")).argmax(1)


def kl_from_normal(mean: Tensor, log_variance: Tensor, mask: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = -1/2 (1 + log_variance - mean^2 - variance), the mean over nodes' dimensions.

    mean and log_variance (B, n, z), mask (B, n).
    """
    mean, log_variance = mean.float(), log_variance.float()
    by_node = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(-1)
    return (by_node * mask).sum() / mask.sum().clamp(min=1)


def info_nce(positive: Tensor, negatives: Tensor) -> Tensor:
    """-log(e^p / (e^p + sum of e^n)) of each image (B,): p (B,) and n (B, K) are products over the temperature.

    A negative that does not count is -inf.
    """
    return torch.cat([positive[:, None], negatives], dim=1).logsumexp(1) - positive


def contrast_views(a: Tensor, b: Tensor, temperature: float, alike: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE of two views of n images: 1/2 [NCE(a -> b) + NCE(b -> a)], the mean over images.

        NCE(a -> b)_i = -log( e^(cos(a_i, b_i) / t) / sum over j of e^(cos(a_i, b_j) / t) )

    a, b (n, d), of any length. `alike` (n, n) bool, symmetric: pairs i, j that are no negatives of each other, such as
    two images of one class; an image and its own other view count whatever it says. log n where all vectors are equal.
    """
    with torch.autocast(a.device.type, enabled=False):
        cosine = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T / temperature
    itself = torch.arange(len(a), device=a.device)
    if alike is not None:
        alike = alike.clone()
        alike[itself, itself] = False
        cosine = cosine.masked_fill(alike, float("-inf"))
    return (F.cross_entropy(cosine, itself) + F.cross_entropy(cosine.T, itself)) / 2


def nearest(h: Tensor, mask: Tensor, proxies: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances in float32: of each node to its nearest proxy (B, n), and of each proxy to its node (B, P).

    h (B, n, r), mask (B, n) with a true in every row, proxies (B, P, r). A padded node is at distance 0, and no
    proxy's nearest.
    """
    with torch.autocast(h.device.type, enabled=False):
        h, proxies = h.float(), proxies.float()
        distance = (
            h.square().sum(-1)[:, :, None] + proxies.square().sum(-1)[:, None, :] - 2 * h @ proxies.transpose(1, 2)
        ).clamp(min=0)
    return distance.amin(2) * mask, distance.masked_fill(~mask[:, :, None], float("inf")).amin(1)


def chamfer(h: Tensor, mask: Tensor, proxies: Tensor) -> Tensor:
    """(B,): half the mean squared distance of each node to its nearest proxy, plus half that of each proxy to its node.

    h (B, n, r), mask (B, n), proxies (B, P, r). A form of TRD's recovery (NeurIPS 2023) [design]: every node and
    proxy counts, where its code takes one minimum over all.
    """
    by_node, by_proxy = nearest(h, mask, proxies)
    return (by_node.sum(1) / mask.sum(1) + by_proxy.mean(1)) / 2


def hausdorff(h: Tensor, mask: Tensor, proxies: Tensor) -> Tensor:
    """(B,): the largest squared distance of any node to its nearest proxy, or of any proxy to its nearest node.

    Shapes as in `chamfer`.
    """
    by_node, by_proxy = nearest(h, mask, proxies)
    return torch.maximum(by_node.amax(1), by_proxy.amax(1))


def capped_chamfer(h: Tensor, mask: Tensor, proxies: Tensor) -> Tensor:
    """(B,): chamfer, but that a node, or a proxy, x may be deleted for DELETION + |x| where that costs less.

    As an edit distance of graphs has it: the form that TRD's code, which has 0.5 + |x| beside the distances, may have
    been meant to have [design]. Shapes as in `chamfer`.
    """
    by_node, by_proxy = nearest(h, mask, proxies)
    by_node, by_proxy = (
        torch.minimum(distance, DELETION + torch.linalg.vector_norm(x.float(), dim=-1))
        for distance, x in ((by_node, h), (by_proxy, proxies))
    )
    return ((by_node * mask).sum(1) / mask.sum(1) + by_proxy.mean(1)) / 2


def assignment_logits(h: Tensor, mask: Tensor, proxies: Tensor) -> Tensor:
    """(B, C) float32: the highest h_n . P_c over an image's nodes; node 0 is real.

    h (B, n, r), mask (B, n), proxies (C, r). Only the node that wins has a gradient.
    """
    h = torch.where(mask[:, :, None], h, h[:, :1])  # another node 0 wins nothing
    return (h @ proxies.to(h.dtype).T).float().max(1).values


def margin_contrast(x: Tensor, target: Tensor) -> Tensor:
    """1/B^2 sum over pairs: 1 - cos of two images of one class, max(cos - MARGIN, 0) of two of different classes.

    x (B, d), of any length. TransFG's contrastive loss (He et al., AAAI 2022 [code]). An image and itself are a pair,
    which adds 0. Probabilities as `target` weigh both terms by how likely two images are of one class, p_i . p_j
    [design].
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1)
        cosine = x @ x.T
        same = (target[:, None] == target).float() if target.ndim == 1 else (target.float() @ target.float().T)
    same = same.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 1.0)
    return (same * (1 - cosine) + (1 - same) * (cosine - MARGIN).clamp(min=0)).mean()


def proxy_anchor(x: Tensor, proxies: Tensor, target: Tensor) -> Tensor:
    """Proxy-Anchor (Kim et al., CVPR 2020 [mem]): each class's proxy draws its images of the batch, pushes the others.

        1/|P+| sum over P+ of log(1 + sum over images of p of e^(-ALPHA (cos(x, p) - DELTA)))
      + 1/|P|  sum over P  of log(1 + sum over the others of  e^( ALPHA (cos(x, p) + DELTA)))

    x (B, d), of any length; proxies (C, d), P; P+ are those of classes in the batch. Probabilities as `target` weigh
    each e in the first sum by the share of the class, and by what is left of it in the second [design].
    """
    with torch.autocast(x.device.type, enabled=False):
        cosine = F.normalize(x.float(), dim=-1) @ F.normalize(proxies.float(), dim=-1, eps=SHORTEST).T
        share = F.one_hot(target, len(proxies)).float() if target.ndim == 1 else target.float()
        drawn = log_one_plus(-ALPHA * (cosine - DELTA) + share.log())
        pushed = log_one_plus(ALPHA * (cosine + DELTA) + (1 - share).clamp(min=0).log())
    here = (share > 0).any(0)
    return (drawn * here).sum() / here.sum() + pushed.mean()


def log_one_plus(exponents: Tensor) -> Tensor:
    """log(1 + sum over rows of e^x) (C,) of x (B, C)."""
    return F.pad(exponents, (0, 0, 1, 0)).logsumexp(0)


def rank_hinge(scores: Tensor, worth: Tensor, mask: Tensor) -> Tensor:
    """Sum over pairs with worth_i < worth_j of max(0, 1 - (s_j - s_i)), the mean over images.

    scores, worth, mask (B, R). How NTS-Net (Yang et al., ECCV 2018 [mem]) teaches a navigator which regions tell most;
    worth has no gradient here.
    """
    worth = worth.detach()
    lower = (worth[:, :, None] < worth[:, None]) & mask[:, :, None] & mask[:, None]
    hinge = (1 - (scores[:, None] - scores[:, :, None])).clamp(min=0)
    return (hinge * lower).sum((1, 2)).mean()


def reverse_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-sum_c r_c log softmax(-z)_c, r_c = (1 - q_c) / (C - 1) (Pang et al., NeurIPS 2018 [mem]), the mean over images.

    logits z (B, C), q the target. The reversed logits should say every class but the true one, all alike: the
    prediction stays that of z, and the loss is log(C - 1) at least.
    """
    classes = logits.shape[1]
    share = F.one_hot(target, classes).float() if target.ndim == 1 else target.float()
    return -((1 - share) / (classes - 1) * (-logits.float()).log_softmax(1)).sum(1).mean()
