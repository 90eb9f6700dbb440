"""The concept graph: patches and the words that fit them, linked by place and likeness, under two graph convolutions.

Section 4 of the method catalogue in a first, small form [design]; it reconstructs its authors' notes and claims no
fidelity to a paper. For an image with nodes 0 (global) and 1..N (patches):

    c_n   = norm(sum of w_nk K_k over the node's `texts` heaviest concepts)               text of a node (D)
    x_n   = LN(Linear(v_n)) + LN(Linear(c_n))                                             (h)
    W     = mean of spatial and semantic edges; global linked to all with 1; self loops 1
    x     = x + dropout(GELU(A LN(x) W_l + b)), twice, A = D^-1/2 (W + I) D^-1/2          (GCN, Kipf and Welling 2017)
    r     = sum of a_n x_n, a = gated attention over the nodes                            (h); a is `node_scores`
    logits = Linear(g) + Linear(LN(r)), which is Linear([g; r]) with its two streams apart

The global stream starts as the tuned linear probe, the graph's at zero. Each stream also answers alone: its own cross
entropy, by `loss_weights`, is an auxiliary loss, so that neither starves because the other has already explained the
training images.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from stages.params import Block, Count, Fraction
from training.data import Batch, Cache
from training.layers import GatedAttention, GraphConv, Standardise, normalise_adjacency
from training.loop import NotNegative, Schedule, fit_epochs, starting_point
from training.methods import Fitted, Output

SEEDED = True
LAYERS = 2


class LossWeights(Block):
    """Cross entropies of each stream alone, beside that of their sum."""

    image: NotNegative = 0.5
    graph: NotNegative = 0.5


class Settings(Schedule):
    hidden: Count = 256
    dropout: Fraction = 0.3
    texts: Count = 5  # concepts that make a node's text
    nodes: Literal["all", "selected"] = "all"  # selected: only the patches that label_patches selected
    loss_weights: LossWeights = LossWeights()


class ConceptGraph(nn.Module):
    K: Tensor

    def __init__(
        self,
        standardise_global: Standardise,
        standardise_nodes: Standardise,
        K: Tensor,
        probe: nn.Linear,
        settings: Settings,
    ) -> None:
        """K (M, D): the vectors of the bank. `probe` (D -> C): where the global stream starts."""
        super().__init__()
        dimension, hidden, classes = K.shape[1], settings.hidden, probe.out_features
        self.settings = settings
        self.standardise_global, self.standardise_nodes = standardise_global, standardise_nodes
        self.register_buffer("K", K)
        self.in_vector, self.norm_vector = nn.Linear(dimension, hidden), nn.LayerNorm(hidden)
        self.in_text, self.norm_text = nn.Linear(dimension, hidden), nn.LayerNorm(hidden)
        self.convolutions = nn.ModuleList(GraphConv(hidden, hidden) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(LAYERS))
        self.attention = GatedAttention(hidden, hidden // 2)
        self.norm_readout = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify_global, self.classify_graph = nn.Linear(dimension, classes), nn.Linear(hidden, classes)
        self.classify_global.load_state_dict(probe.state_dict())
        nn.init.zeros_(self.classify_graph.weight)
        nn.init.zeros_(self.classify_graph.bias)

    def node_text(self, batch: Batch) -> Tensor:
        """c_n (B, N+1, D), unit length; 0 for a node without concepts."""
        weight, place = batch.concept_weight.topk(
            min(self.settings.texts, batch.concept_weight.shape[-1]), sorted=False
        )
        concept = batch.concept_idx.gather(-1, place)
        nodes = concept.shape[:2]
        if not concept.shape[-1]:
            return self.K.new_zeros(*nodes, self.K.shape[1])
        mixed = F.embedding_bag(
            concept.flatten(0, 1), self.K, per_sample_weights=weight.float().flatten(0, 1), mode="sum"
        )
        return F.normalize(mixed, dim=-1).unflatten(0, nodes)

    def forward(self, batch: Batch) -> Output:
        mask = batch.mask
        if self.settings.nodes == "selected":
            mask = mask & batch.selected
            mask[:, 0] = True
        weight = batch.adjacency.mean(-1)
        weight[:, 0, 1:] = weight[:, 1:, 0] = 1.0
        adjacency = normalise_adjacency(weight, mask)

        x = self.norm_vector(self.in_vector(self.standardise_nodes(batch.nodes.float())))
        x = x + self.norm_text(self.in_text(self.node_text(batch)))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # One mask for all nodes of an image: drawing one for each would take a quarter of the epoch.
            x = x + self.dropout(x.new_ones(len(x), 1, x.shape[-1])) * F.gelu(convolution(norm(x), adjacency))
        attention = self.attention(x, mask)
        readout = (attention[:, None].to(x.dtype) @ x).squeeze(1)

        by_global = self.classify_global(self.dropout(self.standardise_global(batch.g.float())))
        by_graph = self.classify_graph(self.dropout(self.norm_readout(readout)))
        losses = {}
        if self.training:
            losses = {
                "image": F.cross_entropy(by_global.float(), batch.target),
                "graph": F.cross_entropy(by_graph.float(), batch.target),
            }
        return Output(by_global + by_graph, losses, attention)


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    start = starting_point(cache)
    return fit_epochs(
        lambda: ConceptGraph(start.standardise_global, start.standardise_nodes, cache.bank.K, start.probe, settings),
        cache,
        settings,
        seed,
        settings.loss_weights.model_dump(),
    )
