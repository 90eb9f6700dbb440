"""Patch graphs as PyTorch Geometric opens them: the same adjacency as the trainer's, from the cache and from files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import image_id, unit, write_index, write_nodes
from training.data import read_cache

loading = pytest.importorskip("torch_geometric.loader")
from torch_geometric.nn import GCNConv  # noqa: E402
from torch_geometric.utils import to_dense_adj  # noqa: E402

from tools.exports.pyg import PatchGraphs, patch_graphs  # noqa: E402

KINDS = ["global", "token", "grid", "grid"]
BOXES = [(0, 0, 1, 1), (0.1, 0, 0.5, 0.5), (0.5, 0.5, 1, 0.9), (0, 0.5, 0.5, 1)]
Row = dict[str, Any]
Export = Callable[..., str]


@pytest.fixture
def graphs(set_params: Callable[..., Params]) -> dict[str, np.ndarray]:
    """Nine images of two classes with graphs drawn at random, one without an edge: by image_id their (4, 4, 2)."""
    set_params()
    ids = [image_id(number) for number in range(9)]
    rng = np.random.default_rng(0)
    write_nodes(
        Path("data/embed/conv/images"),
        {each: unit(rng.standard_normal((4, 8))).astype(np.float16) for each in ids},
        kinds=KINDS,
        boxes=BOXES,
    )
    write_index({each: ("ba"[n % 2], ("train", "val", "test")[n % 3]) for n, each in enumerate(ids)})
    table = store.make_table("index.classes/2", [{"class_id": c, "name": c, "from_images": True} for c in "ab"])
    store.write_table(table, "data/index/classes.parquet", "index.classes/2", {}, "classes")
    dense = {}
    for number, each in enumerate(ids):
        weight = np.triu(rng.random((2, 4, 4)) * (rng.random((2, 4, 4)) < 0.6) * (number > 0), 1).astype(np.float16)
        dense[each] = (weight + weight.transpose(0, 2, 1)).transpose(1, 2, 0)
    write_graphs(dense, "embed")
    return dense


def write_graphs(dense: dict[str, np.ndarray], embed: str) -> None:
    for bucket, ids in enumerate(store.split_buckets(list(dense), 4)):
        rows = []
        for each in ids:
            src, dst = np.nonzero(dense[each].any(axis=2))
            weights = dense[each][src, dst]
            rows.append({
                "image_id": each, "view": 0, "src": src.tolist(), "dst": dst.tolist(),
                "spatial": list(weights[:, 0]), "semantic": list(weights[:, 1]),
            })  # fmt: skip
        path = store.bucket_path("data/graphs/conv", bucket)
        store.write_table(store.make_table("graphs/1", rows), path, "graphs/1", {"embed": embed}, "graphs")


def test_adjacency_is_the_trainer_s(graphs: dict[str, np.ndarray], export: Export) -> None:
    export("pyg", Path("graphs"), "--encoder", "conv")
    cache = read_cache(Path("data"), "conv", 4, {"nodes", "edges"})
    ids = store.read_table("data/index/images.parquet", "index.images/1").to_pydict()
    order = dict(zip(ids["image_id"], ids["path"], strict=True))
    torch.manual_seed(0)
    layer = GCNConv(8, 5)
    for found in (list(patch_graphs("data", "conv")), PatchGraphs("graphs")):
        assert len(found) == 9
        for batch in loading.DataLoader(found, batch_size=4):
            images = torch.tensor([cache.paths.index(order[each]) for each in batch.image_id])
            ours = cache.batch(images)
            theirs = to_dense_adj(batch.edge_index, batch.batch, batch.edge_attr)
            assert torch.equal(theirs, ours.adjacency)
            assert torch.equal(batch.y, cache.y[images])
            assert ["val" if split == "choose" else split for split in cache.split[images.numpy()]] == batch.split
            nodes = ours.nodes.float()
            assert torch.equal(batch.x.view(nodes.shape), nodes)
            # A GCN layer by its formula, D^-1/2 (A + I) D^-1/2 X W + b, on the trainer's matrix.
            weights = ours.adjacency[..., 1] + torch.eye(4)
            scale = weights.sum(2).rsqrt()
            by_hand = scale[:, :, None] * weights * scale[:, None, :] @ (nodes @ layer.lin.weight.T) + layer.bias
            done = layer(batch.x, batch.edge_index, batch.edge_attr[:, 1])
            torch.testing.assert_close(done.view(by_hand.shape), by_hand, atol=1e-5, rtol=1e-5)


def test_a_graph_is_the_image_s(graphs: dict[str, np.ndarray], export: Export) -> None:
    assert "9 images of 4 nodes x 8" in export("pyg", Path("out/graphs"), "--encoder", "conv")
    found = PatchGraphs("out/graphs", "val")
    assert {graph.split for graph in found} == {"val"}
    assert len(found) == 3
    for graph in (found[place] for place in range(3)):
        centres = [[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2] for box in BOXES]
        torch.testing.assert_close(graph.pos, torch.tensor(centres))
        assert [found.about["kinds"][code] for code in graph.kind] == KINDS
        assert found.about["classes"][int(graph.y)] in "ab"
        assert graph.has_isolated_nodes() is bool((graphs[graph.image_id].sum(axis=(1, 2)) == 0).any())
        assert graph.is_undirected()
        assert not graph.has_self_loops()
    with pytest.raises(ValueError, match="split is 'all'"):
        PatchGraphs("out/graphs", "all")


def test_no_file_of_it_runs_code(graphs: dict[str, np.ndarray], export: Export) -> None:
    """safetensors and JSON alone."""
    export("pyg", Path("graphs"), "--encoder", "conv")
    files = sorted(Path("graphs").iterdir())
    assert [path.name for path in files] == [*(f"b{bucket:03d}.safetensors" for bucket in range(4)), "dataset.json"]
    json.loads(files[-1].read_text())
    for path in files[:-1]:
        with safe_open(path, "np") as file:
            assert "x" in file.keys()  # noqa: SIM118 (not a dict)


def test_equal_inputs_equal_bytes(graphs: dict[str, np.ndarray], export: Export) -> None:
    export("pyg", Path("graphs"), "--encoder", "conv")
    first = {path.name: path.read_bytes() for path in Path("graphs").iterdir()}
    export("pyg", Path("graphs"), "--encoder", "conv")
    assert {path.name: path.read_bytes() for path in Path("graphs").iterdir()} == first


def test_graphs_of_other_embeddings_are_refused(graphs: dict[str, np.ndarray], export: Export) -> None:
    write_graphs(graphs, "former")
    with pytest.raises(UserError, match="data/graphs/conv: was made from other embeddings; run build_graphs again"):
        export("pyg", Path("graphs"), "--encoder", "conv")
    first = next(iter(graphs))
    write_graphs({each: dense for each, dense in graphs.items() if each != first}, "embed")
    with pytest.raises(UserError, match=r"b00\d\.parquet: lacks an image \(view 0\); run build_graphs again"):
        list(patch_graphs("data", "conv"))
