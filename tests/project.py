"""What tests of stages build a project of: pictures, tiny real encoders, and tables written by hand."""

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from fieldmark import store

ROOT = Path(__file__).parents[1]
TEXT_TOWER = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CONV = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "resnet10t",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "text_cfg": TEXT_TOWER,
}
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": TEXT_TOWER,
}
PARAMS: dict[str, Any] = {
    "domain": {"noun": "fish", "group": "reef fish"},
    "dataset": {"root": "images", "buckets": 4},
    "llm": {"model": "none"},
    "encoders": {},
    "embed": {"tokens": True, "grids": [2]},
    "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "conv"}}},
    "report": {"reference": "zero_shot"},
}


def save_model(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None) -> Path:
    """A randomly weighted open_clip model as a local-dir."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}")
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def draw(path: Path, seed: int, size: tuple[int, int] = (80, 60)) -> Path:
    """A picture of coloured blocks, another one for another seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def webp_of(grey: np.ndarray) -> bytes:
    """Grey values (H, W) uint8 as a picture that keeps them all."""
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def write_thumbs(pictures: dict[str, np.ndarray], *, buckets: int = 4, folder: str | Path = "data/thumbs") -> None:
    """thumbs: {image_id: grey values (H, W) uint8}."""
    for bucket, ids in enumerate(store.split_buckets(list(pictures), buckets)):
        table = store.make_table("thumbs/1", [{"image_id": each, "webp": webp_of(pictures[each])} for each in ids])
        store.write_table(table, store.bucket_path(folder, bucket), "thumbs/1", {}, "thumbs")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of change of every file in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def unit(vectors: Any) -> np.ndarray:
    array = np.asarray(vectors, dtype=np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def image_id(number: int) -> str:
    return store.sha256(f"image {number}")


def write_nodes(
    folder: Path,
    images: dict[str, np.ndarray],
    *,
    buckets: int = 4,
    mark: str = "embed",
    kinds: Sequence[str] | None = None,
    boxes: Sequence[Sequence[float]] | None = None,
) -> None:
    """embed.nodes buckets of one view an image: {image_id: unit vectors (nodes, D)}."""
    dimension = next(iter(images.values())).shape[1]
    for bucket, ids in enumerate(store.split_buckets(list(images), buckets)):
        rows: list[dict[str, Any]] = []
        for each in ids:
            for node, vector in enumerate(images[each]):
                box = boxes[node] if boxes else (0, 0, 1, 1)
                kind = kinds[node] if kinds else ("grid" if node else "global")
                rows.append(
                    {
                        "image_id": each,
                        "view": 0,
                        "node": node,
                        "kind": kind,
                        "flip": False,
                        "norm": 1.0,
                        **dict(zip(("x0", "y0", "x1", "y1"), map(float, box), strict=True)),
                        "vector": vector.astype(np.float16),
                    }
                )
        table = pa.Table.from_pylist(rows, schema=store.arrow_schema("embed.nodes/1", dimension))
        path = store.bucket_path(folder, bucket)
        store.write_table(table, path, "embed.nodes/1", {"encoder": "one"}, mark)


def write_texts(
    path: Path, vectors: dict[str, np.ndarray], *, logit_scale: float = 10.0, encoder: str = "one"
) -> None:
    """embed.text: {text: unit vector (D)}."""
    rows = [
        {
            "text_id": store.sha256(text),
            "text": text,
            "kind": "concept",
            "n_tokens": 3,
            "truncated": False,
            "vector": vector.astype(np.float16),
        }
        for text, vector in vectors.items()
    ]
    dimension = len(next(iter(vectors.values())))
    table = pa.Table.from_pylist(rows, schema=store.arrow_schema("embed.text/1", dimension))
    store.write_table(table, path, "embed.text/1", {"encoder": encoder, "logit_scale": logit_scale}, "text")


def write_index(images: dict[str, tuple[str, str]]) -> None:
    """index.images: {image_id: (class_id, split)}."""
    rows = [
        {
            "path": f"{split}/{class_id}/{each[:12]}.png",
            "image_id": each,
            "class_id": class_id,
            "split": split,
            "status": "ok",
        }
        for each, (class_id, split) in images.items()
    ]
    table = store.make_table("index.images/1", rows)
    store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "index")


def write_concepts(concepts: Sequence[tuple[str, str | None, str]]) -> None:
    """concepts: (text, class_id, kind), all kept but those of kind `dropped`."""
    rows = [
        {
            "concept_id": store.sha256(text),
            "text": text,
            "class_id": class_id,
            "rank": rank,
            "kind": "visual" if kind == "dropped" else kind,
            "kept": kind != "dropped",
        }
        for rank, (text, class_id, kind) in enumerate(concepts)
    ]
    table = store.make_table("concepts/1", rows)
    store.write_table(table, "data/concepts/concepts.parquet", "concepts/1", {}, "concepts")


@contextmanager
def ray_cluster(cpus: int) -> Iterator[dict[str, str]]:
    """A cluster that several commands use; the variables of their environment that name it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = [f"--port={port}", f"--num-cpus={cpus}", f"--temp-dir={folder}", "--object-store-memory=200000000"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        head = subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, text=True)
        assert head.stdout is not None
        try:
            assert any("Ray runtime started" in line for line in head.stdout)
            yield {**variables, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            head.terminate()
            head.wait()


def run_ray(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command on a cluster that begins and ends with it, on this machine."""
    command = [sys.executable, "-m", module, "--engine", "ray", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)
