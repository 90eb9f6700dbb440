"""Both towers of tools/train_reef_towers.py in a size that tests can train."""

from pathlib import Path
from typing import Any

from fieldmark.reef.species import load_species
from tools.train_reef_encoder import draw_chunk
from tools.train_reef_towers import BATCH, TOWERS, write_tower

SMALL: dict[str, dict[str, Any]] = {
    "reef-vit": TOWERS["reef-vit"] | {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "reef-swin": TOWERS["reef-swin"] | {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
}


def write_small(folder: Path, seed: int = 0) -> Path:
    """Train both for two steps on 32 drawings; returns the folder that holds theirs."""
    drawings = draw_chunk(range(BATCH), seed, load_species())
    for name, arguments in SMALL.items():
        write_tower(folder / name, arguments, drawings, 2, seed)
    return folder
