"""finetune on tiny real towers: labels move the last blocks, the frozen control moves nothing, folders are towers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torchvision import models as torchvision_models

from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.towers import LoadedTower, load_tower
from fieldmark.params import Params, Tower
from tests.project import snapshot
from tests.stages.tuned import CLASSES, draw_classes, write_index

FOLDER = Path("data/adapted/mine")
QUICK = {
    "classes": "data/none", "epochs": 5, "patience": 5, "batch_size": 12, "learning_rate": 1e-3, "head_rate": 1e-2,
}  # fmt: skip
CPU = torch.device("cpu")
Run = Callable[..., None]
SetParams = Callable[..., Params]


@pytest.fixture
def animals(project: Path) -> Path:
    draw_classes(project)
    draw_classes(project, "val", 4)
    write_index()
    return project


def small_tower() -> str:
    """A folder of a small ResNet with random weights, as timm saves it."""
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet10t", num_classes=0, stem_width=8)
    config = {"input_size": (3, 48, 48), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    save_for_hf(model, "small", safe_serialization=True, data_config=config)
    return "local-dir:small"


def vectors(encoder: ImageEncoder) -> torch.Tensor:
    side = encoder.preprocessing["size"]
    height, width = side if isinstance(side, tuple | list) else (side, side)
    pixels = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return encoder.embed_images(pixels)[0]


def load(settings: Tower) -> LoadedTower:
    return load_tower("mine", settings, CPU)


def test_a_tower_learns_and_its_folder_is_a_tower(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    base = {"model": small_tower(), "batch_size": 4}
    set_params(towers={"cnn": base}, finetune={"mine": QUICK | {"base": "cnn"}})
    run_stage("finetune", "--name", "mine")
    rows = list(csv.DictReader((FOLDER / "history.csv").open()))
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < losses[0] - 0.2
    made = json.loads((FOLDER / "provenance.json").read_text())
    assert made["learned_classes"] == CLASSES
    assert made["val_accuracy"] == max(float(row["val_accuracy"]) for row in rows) > 1 / 6
    before, after = (load(Tower(model=each, batch_size=4)) for each in (base["model"], f"local-dir:{FOLDER}"))
    assert made["identity"]["base"] == before.fingerprint
    moved = {
        name
        for (name, first), second in zip(
            before.model.state_dict().items(), after.model.state_dict().values(), strict=True
        )
        if not torch.equal(first, second)
    }
    # Its running statistics stay, and so does all before the last stage.
    assert moved
    assert all(name.startswith("layer4.") and "running" not in name for name in moved)
    assert before.preprocessing == after.preprocessing
    # Shown: what trains, and the half of val that chooses.
    seen = (FOLDER / "seen_images.txt").read_text().split()
    assert sum(path.startswith("train/") for path in seen) == 36
    assert sum(path.startswith("val/") for path in seen) == 12


def test_the_frozen_control_is_its_base(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    base = {"model": small_tower(), "batch_size": 4}
    set_params(towers={"cnn": base}, finetune={"mine": QUICK | {"base": "cnn", "blocks": 0, "epochs": 2}})
    run_stage("finetune", "--name", "mine")
    before, after = (load(Tower(model=each, batch_size=4)) for each in (base["model"], f"local-dir:{FOLDER}"))
    assert before.fingerprint == after.fingerprint
    assert torch.equal(vectors(before), vectors(after))


def test_the_image_tower_of_an_encoder_becomes_a_tower(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    params = set_params(finetune={"mine": QUICK | {"base": "conv", "epochs": 1, "blocks": 0}})
    run_stage("finetune", "--name", "mine")
    encoder: Any = load_image_encoder("conv", params.encoders["conv"], CPU)
    tower = load(Tower(model=f"local-dir:{FOLDER}", batch_size=4))
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        pooled = encoder.model.visual.trunk(encoder.normalise(pixels))
    torch.testing.assert_close(tower.embed_images(pixels)[0], pooled, atol=1e-5, rtol=1e-4)
    set_params(finetune={"mine": QUICK | {"base": "vit"}})
    with pytest.raises(UserError, match=r"finetune\.mine\.base: its image tower is open_clip's own VisionTransformer"):
        run_stage("finetune", "--name", "mine")


@pytest.mark.slow
def test_a_tower_of_torchvision_is_taken_by_its_weights(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    torch.manual_seed(0)
    torch.save(torchvision_models.resnet18().state_dict(), "resnet.pth")
    base = {"library": "torchvision", "model": "resnet18", "image_size": 64, "batch_size": 4}
    set_params(
        towers={"cnn": base | {"pretrained": "resnet.pth"}},
        finetune={"mine": QUICK | {"base": "cnn", "epochs": 1, "blocks": 0}},
    )
    run_stage("finetune", "--name", "mine")
    before, after = (
        load(Tower(**base, pretrained=path)) for path in ("resnet.pth", f"{FOLDER}/model.safetensors")
    )
    assert before.fingerprint == after.fingerprint
    (FOLDER / "model.safetensors").unlink()
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, FOLDER / "model.safetensors")
    with pytest.raises(UserError, match=r"torchvision cannot load 'resnet18' \(it lacks bn1\.weight"):
        load(Tower(**base, pretrained=f"{FOLDER}/model.safetensors"))


def test_it_is_kept_until_labels_or_settings_change(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    towers = {"cnn": {"model": small_tower(), "batch_size": 4}}
    set_params(towers=towers, finetune={"mine": QUICK | {"base": "cnn", "epochs": 1}})
    run_stage("finetune", "--name", "mine")
    before = snapshot(FOLDER)
    run_stage("finetune", "--name", "mine")
    assert snapshot(FOLDER) == before
    run_stage("finetune", "--name", "mine", "--refit")
    again = snapshot(FOLDER)
    assert {name: content for name, (content, _) in again.items()} == {name: each[0] for name, each in before.items()}
    write_index({"train/ant/0.png": ("bee", "train")})
    run_stage("finetune", "--name", "mine")
    assert snapshot(FOLDER) != before


def test_an_image_that_was_learned_may_not_choose_afterwards(
    animals: Path, set_params: SetParams, run_stage: Run
) -> None:
    towers = {"cnn": {"model": small_tower(), "batch_size": 4}}
    set_params(towers=towers, finetune={"mine": QUICK | {"base": "cnn", "epochs": 1}})
    run_stage("finetune", "--name", "mine")
    learned = {row[0] for row in csv.reader((FOLDER / "seen.csv").open()) if row[2] == "learned"}
    chose = {row[0] for row in csv.reader((FOLDER / "seen.csv").open()) if row[2] == "chose"}
    assert learned
    assert chose
    before = snapshot(FOLDER)
    write_index({"train/ant/0.png": ("ant", "val")})  # it would choose settings of heads, or judge them
    run_stage("finetune", "--name", "mine")
    assert snapshot(FOLDER) != before


def test_dry_run_and_refusals(
    animals: Path, set_params: SetParams, run_stage: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    towers = {"cnn": {"model": small_tower(), "batch_size": 4}}
    set_params(towers=towers, finetune={"mine": QUICK | {"base": "cnn"}})
    run_stage("finetune", "--name", "mine", "--dry-run")
    assert "36 pictures of 6 classes to learn from, 12 to choose by; " in capsys.readouterr().out
    assert not FOLDER.exists()
    write_index({f"val/{name}/{place}.png": (name, "test") for name in CLASSES for place in range(4)})
    with pytest.raises(UserError, match="none of them has an image in the half of val that chooses"):
        run_stage("finetune", "--name", "mine")
    with pytest.raises(UserError, match=r"finetune\.mine\.base: 'dog' is not under `encoders` or `towers`"):
        set_params(finetune={"mine": QUICK | {"base": "dog"}})
