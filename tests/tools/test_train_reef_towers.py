"""Towers for reef that are smaller still, trained for two steps, and the shapes of those that the tool makes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fieldmark.encoders.layers import HiddenStates, choose_layers, find_tower, hidden_states
from fieldmark.encoders.towers import load_tower
from fieldmark.params import Tower
from fieldmark.reef.drawing import draw_fish
from fieldmark.reef.species import load_species
from tests.tools.towers import SMALL, write_small
from tools.train_reef_towers import TOWERS, make_tower

ASKED = {"reef-vit": ([-2, -1], True), "reef-swin": ([-3, -2, -1], False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("towers"))


def read(name: str, model: torch.nn.Module, pixels: torch.Tensor) -> HiddenStates:
    """What profiles/reef-vision.yaml asks of a tower."""
    layers, rollout = ASKED[name]
    return hidden_states(model, pixels, choose_layers(find_tower(model), layers, rollout, f"tokens.{name}"), name)


def test_they_load_by_their_folder_and_give_layers_of_several_grids_cls_and_rollout(folder: Path) -> None:
    picture = draw_fish(load_species()[0].attributes, np.random.default_rng(0), 200).image
    for name, grids in (("reef-vit", [(10, 10)] * 2), ("reef-swin", [(20, 20), (10, 10), (5, 5)])):
        tower = load_tower(name, Tower(model=f"local-dir:{folder / name}", batch_size=1), torch.device("cpu"))
        assert tower.preprocessing["size"] == (160, 160)
        pixels = tower.normalise(tower.preprocess(picture)[None])
        found = read(name, tower.model, pixels)
        assert [tuple(cells.shape[1:3]) for cells in found.cells] == grids
        assert [cls.numel() > 0 for cls in found.cls] == [name == "reef-vit"] * len(grids)
        assert tower.embed_images(pixels)[1].shape[1:3] == grids[-1]
        if name == "reef-vit":
            # CLS itself has a share of its row too.
            assert found.rollout.shape == (1, SMALL[name]["num_heads"], 100)
            assert 0.5 < float(found.rollout.sum(dim=2).min()) < float(found.rollout.sum(dim=2).max()) < 1


def test_training_moves_every_weight(folder: Path) -> None:
    for name, arguments in SMALL.items():
        tower = load_tower(name, Tower(model=f"local-dir:{folder / name}"), torch.device("cpu"))
        before = make_tower(arguments, 0).state_dict()
        held = {key for key, value in tower.model.state_dict().items() if torch.equal(value, before[key])}
        assert {key for key in held if not key.endswith(("relative_position_index", "attn_mask"))} == set()


@pytest.mark.slow
def test_a_seed_makes_the_same_towers_and_another_one_others(folder: Path, tmp_path: Path) -> None:
    again, other = write_small(tmp_path / "again"), write_small(tmp_path / "other", seed=1)
    for name in SMALL:
        first, second, third = (path / name / "model.safetensors" for path in (folder, again, other))
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes() != third.read_bytes()


def test_what_the_tool_makes_has_the_layers_of_the_profile() -> None:
    pixels = torch.zeros(1, 3, 160, 160)
    for name, shapes in (
        ("reef-vit", [(10, 10, 128)] * 2),
        ("reef-swin", [(20, 20, 64), (10, 10, 128), (5, 5, 256)]),
    ):
        with torch.inference_mode():
            found = read(name, make_tower(TOWERS[name], 0).eval(), pixels)
        assert [tuple(cells.shape[1:]) for cells in found.cells] == shapes
