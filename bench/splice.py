"""Our SpLiCE solver beside scikit-learn's Lasso on the same problem: 1,000 concepts, 512 dimensions.

Concepts stand in 100 groups of a common direction each, as texts of one part do; nodes are sparse sums of 8 concepts
and as much noise again. Both are centred, and solved to the same objective: scikit-learn (positive=True, alpha =
sparsity / (2 D)) node by node with the inner products of concepts given, in float64 to tol 1e-6, ours in float32.
"Worst gap" is how far our objective stands over its, at most.

    python -m bench.splice [--nodes N]
"""

import argparse
import platform
from time import perf_counter

import numpy as np
import torch
from sklearn.linear_model import Lasso

from fieldmark.labels.splice import TOLERANCE, centre, decompose, gradient, objective, violation

CONCEPTS, DIMENSION, GROUPS, PLANTED, SPARSITY = 1000, 512, 100, 8, 0.25
# scikit-learn takes milliseconds a node: so many of them are enough to time it.
LASSO_NODES = 200


def draw_problem(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred unit nodes (nodes, D) and concepts (M, D)."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randn(GROUPS, DIMENSION, generator=generator).repeat_interleave(CONCEPTS // GROUPS, dim=0)
    concepts = group + torch.randn(CONCEPTS, DIMENSION, generator=generator)
    concepts = centre(concepts, concepts.mean(dim=0))
    share = torch.zeros(nodes, CONCEPTS)
    place = torch.rand(nodes, CONCEPTS, generator=generator).topk(PLANTED, dim=1).indices
    share.scatter_(1, place, torch.rand(nodes, PLANTED, generator=generator))
    signal = torch.nn.functional.normalize(share @ concepts, dim=1)
    noise = torch.nn.functional.normalize(torch.randn(nodes, DIMENSION, generator=generator), dim=1)
    vectors = signal + noise
    return centre(vectors, vectors.mean(dim=0)), concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4096, help="nodes (default: 4096)")
    nodes = parser.parse_args().nodes
    targets, concepts = draw_problem(nodes)
    decompose(targets[:64], concepts, SPARSITY)
    started = perf_counter()
    weights = decompose(targets, concepts, SPARSITY)
    ours = (perf_counter() - started) / nodes
    worst = violation(weights, gradient(weights, targets, concepts, SPARSITY)).max().item()

    dictionary, some = concepts.double(), targets[:LASSO_NODES].double()
    columns = np.asfortranarray(dictionary.numpy().T)
    lasso = Lasso(alpha=SPARSITY / (2 * DIMENSION), positive=True, fit_intercept=False, tol=1e-6, max_iter=10000,
                  precompute=np.ascontiguousarray((dictionary @ dictionary.T).numpy()))  # fmt: skip
    started = perf_counter()
    theirs = np.stack([lasso.fit(columns, node).coef_ for node in some.numpy()])
    each = (perf_counter() - started) / len(some)
    found = objective(weights[:LASSO_NODES].double(), some, dictionary, SPARSITY)
    gap = found - objective(torch.from_numpy(theirs), some, dictionary, SPARSITY)

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{nodes} nodes, {CONCEPTS} concepts, {DIMENSION} dimensions, sparsity {SPARSITY}")
    print(f"concepts a node: {(weights > 0).sum(dim=1).float().mean():.1f} on average; optimality violated by")
    print(f"{worst:.1e} at most (tolerance {TOLERANCE:.0e}); worst gap {gap.max():.1e} of {found.mean():.3f}")
    print(f"ours          {1e6 * ours:8.0f} us a node")
    print(f"scikit-learn  {1e6 * each:8.0f} us a node ({each / ours:.0f} x)")


if __name__ == "__main__":
    main()
