"""torchvision's towers, with random weights from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.params import Params, Tower
from fieldmark.pictures.boxes import visible_box

CPU = torch.device("cpu")
NAMES = {"resnet18": 512, "regnet_y_400mf": 440, "efficientnet_b0": 1280}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in NAMES:
            torch.save(models.get_model(name, weights=None).state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in NAMES}


def load(**settings: Any) -> ImageEncoder:
    tower = Tower(library="torchvision", **{"batch_size": 3, **settings})
    return load_image_encoder("mine", tower, CPU)


@pytest.mark.parametrize("name", NAMES)
def test_the_global_row_is_what_torchvisions_classifier_reads(name: str, files: dict[str, Path]) -> None:
    tower = load(model=name, pretrained=str(files[name]))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    pooled, tokens = tower.embed_images(tower.preprocess(picture)[None])
    own: Any = models.get_model(name, weights=None).eval()
    own.load_state_dict(torch.load(files[name], weights_only=True))
    read = []
    own.avgpool.register_forward_hook(lambda part, inputs, output: read.append(output.flatten(1)))
    shown = models.get_model_weights(name).DEFAULT.transforms()
    with torch.inference_mode():
        own(shown(picture)[None])
    torch.testing.assert_close(pooled, read[0], atol=1e-5, rtol=1e-4)
    assert tokens.shape == (1, 7, 7, NAMES[name])
    assert tower.dimension == NAMES[name]
    torch.testing.assert_close(tokens.mean(dim=(1, 2)), pooled)
    share = shown.crop_size[0] / shown.resize_size[0]
    assert visible_box(100, 100, tower.preprocessing) == pytest.approx(((1 - share) / 2,) * 2 + ((1 + share) / 2,) * 2)


def test_what_cannot_be_loaded_is_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    vgg = tmp_path / "vgg.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), vgg)
    resnet = {"model": "resnet18", "pretrained": str(files["resnet18"])}
    for settings, words in [
        ({**resnet, "model": "resnet19"}, r"\.model: torchvision knows no 'resnet19'"),
        ({**resnet, "pretrained": "nowhere.pth"}, r"\.pretrained: there is no file nowhere\.pth"),
        ({**resnet, "pretrained": str(vgg)}, r": torchvision cannot load 'resnet18' \(.*Missing key"),
        ({"model": "squeezenet1_1", "pretrained": str(vgg)}, r"\.model: no rule for the cells of a SqueezeNet"),
        ({**resnet, "image_size": 70}, r"\.image_size: 70 .*32 pixels each; use 96$"),
        ({**resnet, "precision": "fp16"}, r"\.precision: fp16 needs a GPU"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            load(**settings)
        assert str(error.value).startswith("params.yaml: towers.mine")
        assert "\n" not in str(error.value)


def test_it_goes_through_the_stages(
    set_params: Callable[..., Params], dataset: list[str], run_stage: Callable[..., None], files: dict[str, Path]
) -> None:
    tower = {"library": "torchvision", "model": "resnet18", "pretrained": str(files["resnet18"]), "image_size": 64}
    set_params(towers={"mine": tower}, embed={"tokens": True, "grids": [], "views": 0})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "mine")
    nodes = store.read_buckets("data/embed/mine/images", "embed.nodes/1", 4)
    assert nodes.schema.field("vector").type.list_size == 512
    assert len(nodes) == len(dataset) * (1 + 4)
    run_stage("build_graphs", "--encoder", "mine")
