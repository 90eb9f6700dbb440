"""Which nodes of a graph would be linked, by their vectors.

    p_i  = P x_i,   q_j = Q x_j                                       x (n, F) the nodes' vectors
    s_ij = sigmoid(v . GELU(A p_i + B q_j + C (p_i * q_j) + b) + c)   j sends to i

A perceptron on a pair of nodes. The product beside the pair [design] lets it tell likeness in few units; a pair of all
nodes then costs width^2 products. Learnt from the links that there are against as many pairs drawn anew in each epoch
that are none, by binary cross entropy in float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HELD_OUT = 0.1  # of the links, by which it is judged
EPOCHS, BATCH, RATE, DECAY = 20, 1024, 3e-3, 1e-2
BLOCK = 2**24  # hidden units found at a time


class LinkPredictor(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.hear, self.send = nn.Linear(inputs, width, bias=False), nn.Linear(inputs, width, bias=False)
        self.receiver, self.sender = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.both = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1)

    def forward(self, receivers: Tensor, senders: Tensor) -> Tensor:
        """Logits (...) of s, of vectors (..., F) each."""
        return self.pairs(self.hear(receivers), self.send(senders))

    def pairs(self, p: Tensor, q: Tensor) -> Tensor:
        hidden = F.gelu(self.receiver(p) + self.sender(q) + self.both(p * q))
        return self.score(hidden).squeeze(-1)

    @torch.no_grad()
    def nearest(self, receivers: Tensor, senders: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """The edges (E,) into receivers (m, F) of s > 1/2, at most `most` each, the highest first: sender, receiver, s.

        Receivers ascend.
        """
        p, q = self.hear(receivers), self.send(senders)
        count = len(senders) if most is None else min(most, len(senders))
        step = max(1, BLOCK // (len(senders) * p.shape[1]))
        found = [self.pairs(some[:, None], q[None]).topk(count, 1) for some in p.split(step)]
        value = torch.cat([each.values for each in found]).sigmoid()
        place = torch.cat([each.indices for each in found])
        linked = value > 0.5
        owner = torch.arange(len(p), device=p.device)[:, None].expand_as(place)
        return place[linked], owner[linked], value[linked]


def draw_strangers(linked: Tensor, nodes: int, count: int, generator: torch.Generator) -> Tensor:
    """(2, at most count): sender and receiver of pairs that are no link, nor a node with itself; linked (E,) codes.

    A code is receiver * nodes + sender; `linked` ascends.
    """
    pair = torch.randint(nodes, (2, count), generator=generator)
    code = pair[1] * nodes + pair[0]
    place = torch.searchsorted(linked, code).clamp(max=len(linked) - 1)
    return pair[:, (linked[place] != code) & (pair[0] != pair[1])]


def pair_of(edges: Tensor, nodes: int) -> Tensor:
    """(E,): a number for the two ends of each edge (2, E), whichever way it goes."""
    return edges.amin(0) * nodes + edges.amax(0)


def fit_links(x: Tensor, sender: Tensor, receiver: Tensor, width: int, seed: int) -> tuple[LinkPredictor, float]:
    """Learn the links sender (E,) -> receiver (E,), E > 0, among nodes x (n, F); beside it the AUC on links held out.

    All is drawn on the CPU, by the seed. Where a link is held out, the one the other way is not learnt from either. The
    AUC is nan where there are too few links to hold any out.
    """
    generator, home = torch.Generator().manual_seed(seed), x.device
    torch.manual_seed(seed)
    model = LinkPredictor(x.shape[1], width).to(home)
    sender, receiver = sender.cpu(), receiver.cpu()
    linked = (receiver * len(x) + sender).sort().values
    order = torch.randperm(len(sender), generator=generator)
    edges = torch.stack([sender, receiver])[:, order]
    held, edges = edges.split([round(HELD_OUT * len(order)), len(order) - round(HELD_OUT * len(order))], dim=1)
    edges = edges[:, ~torch.isin(pair_of(edges, len(x)), pair_of(held, len(x)))]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(EPOCHS):
        strangers = draw_strangers(linked, len(x), edges.shape[1], generator)
        pair = torch.cat([edges, strangers], 1)
        truth = (torch.arange(pair.shape[1]) < edges.shape[1]).float()
        for some in torch.randperm(len(truth), generator=generator).split(BATCH):
            of, to = pair[:, some].to(home)
            loss = F.binary_cross_entropy_with_logits(model(x[to], x[of]), truth[some].to(home))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model, held_out_auc(model, x, held, draw_strangers(linked, len(x), 4 * held.shape[1], generator))


@torch.no_grad()
def held_out_auc(model: LinkPredictor, x: Tensor, held: Tensor, strangers: Tensor) -> float:
    """How often a link scores higher than a pair that is none: the area under the ROC curve."""
    (of, to), (no_of, no_to) = held.to(x.device), strangers.to(x.device)
    links, others = model(x[to], x[of]), model(x[no_to], x[no_of])
    higher = links[:, None] > others
    return float((higher.double() + (links[:, None] == others).double() / 2).mean())
