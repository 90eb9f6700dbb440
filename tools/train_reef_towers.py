"""Make two towers for reef, encoders of images alone: a small ViT with a CLS token and a small Swin of four stages.

Writes   OUT/reef-vit and OUT/reef-swin: config.json and model.safetensors, in timm's own layout.
Reads    data/demo/species.yaml, only to leave those 24 combinations of field marks out of the training drawings.
Costs    about 10 minutes on 2 idle cores with bfloat16, more on busy ones, and 5 GB of memory. Run by hand; nothing of
         it is committed, and the demo does not need it.

    python -m tools.train_reef_towers [--out DIR] [--images N] [--epochs E] [--seed S]

They stand in for DINOv2 and Swin, whose weights no tool of this project brings, so that methods over CLS, rollout and
stages of several resolutions can be tried. What a method gains on them says nothing of what it gains on the real ones.

Drawings of random field marks, as for the demo's encoder (tools/train_reef_encoder.py), and no text: one linear layer
tells from the embedding of a picture which field marks it shows, a second one the same of each cell, where the boxes of
the drawn parts say so. Each tower has a process of one thread: the same seed gives the same weights, however many cores
a machine has.

profiles/reef-vision.yaml has both as `model: local-dir:data/towers/NAME`.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

from fieldmark.command import run
from fieldmark.encoders.towers.timm import tower_features
from fieldmark.reef.species import load_species
from tools.train_reef_encoder import (
    CELL_WEIGHT,
    CONFIG,
    PIXELS,
    Drawings,
    Progress,
    cell_targets,
    draw_all,
    shuffled,
    to_input,
)

OUT = Path("data/towers")
BATCH = 32
LEARNING_RATE = 1e-3

# timm's model, and what is smaller than in it.
TOWERS: dict[str, dict[str, Any]] = {
    "reef-vit": {"model_name": "vit_tiny_patch16_224", "embed_dim": 128, "depth": 6, "num_heads": 4},
    "reef-swin": {
        "model_name": "swin_tiny_patch4_window7_224", "embed_dim": 32, "depths": (1, 1, 3, 1),
        "num_heads": (1, 2, 4, 8), "window_size": 5,
    },
}  # fmt: skip


def make_tower(arguments: dict[str, Any], seed: int) -> Any:
    """A model of timm's for drawings, untrained and without a classifier."""
    torch.manual_seed(seed)
    return timm.create_model(**arguments, img_size=PIXELS, num_classes=0)


def train_tower(model: Any, name: str, drawings: Drawings, epochs: float, seed: int) -> None:
    """Train a tower in place; `name` stands in what is told on the way."""
    torch.manual_seed(seed)
    width, marks = model.num_features, drawings.shows.shape[1]
    heads = nn.ModuleDict({"picture": nn.Linear(width, marks), "cell": nn.Linear(width, marks)})
    parameters = [*model.train().parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.05},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    steps = max(int(epochs * len(drawings.pixels)) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order, progress = shuffled(len(drawings.pixels), seed), Progress(name, steps * BATCH)
    for _ in range(steps):
        rows = np.sort([next(order) for _ in range(BATCH)])
        shows, boxes = torch.from_numpy(drawings.shows[rows]).float(), torch.from_numpy(drawings.boxes[rows])
        with torch.autocast("cpu", torch.bfloat16):
            pooled, cells = tower_features(model, to_input(drawings.pixels[rows], PIXELS), name)
        loss = F.binary_cross_entropy_with_logits(heads["picture"](pooled.float()), shows)
        target, weight = cell_targets(boxes, cells.shape[1])
        logits = heads["cell"](cells.float().flatten(1, 2))
        cell_loss = F.binary_cross_entropy_with_logits(logits, target, weight)
        (loss + CELL_WEIGHT * cell_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.step(BATCH, f"loss {loss.item():.3f} cells {cell_loss.item():.3f}")
    model.eval()


def save(model: Any, folder: Path) -> None:
    """Write weights and configuration, with the preprocessing that the tower was trained with."""
    preprocess = CONFIG["preprocess_cfg"]
    seen = {key: preprocess[key] for key in ("mean", "std", "interpolation")}
    seen |= {"input_size": (3, PIXELS, PIXELS), "crop_pct": 1.0, "crop_mode": "center"}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=seen)


def write_tower(folder: Path, arguments: dict[str, Any], drawings: Drawings, epochs: float, seed: int) -> None:
    """Make one tower, on one thread."""
    torch.set_num_threads(1)
    model = make_tower(arguments, seed)
    train_tower(model, folder.name, drawings, epochs, seed)
    save(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write (default: {OUT})")
    parser.add_argument("--images", type=int, default=8000, help="training drawings (default: 8000)")
    parser.add_argument("--epochs", type=float, default=5, help="passes over them (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    drawings = draw_all(args.images, args.seed, load_species())
    with ProcessPoolExecutor(max_workers=len(TOWERS)) as pool:
        made = [
            pool.submit(write_tower, args.out / name, arguments, drawings, args.epochs, args.seed)
            for name, arguments in TOWERS.items()
        ]
        for each in made:
            each.result()


if __name__ == "__main__":
    run(main)
