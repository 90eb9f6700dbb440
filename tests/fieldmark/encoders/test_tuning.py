"""What of an encoder is tuned: exactly those weights, and at first nothing of what it gives."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models

from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.towers.torchvision import parts_of
from fieldmark.encoders.tuning import (
    end_tuning,
    image_parts,
    make_optimizer,
    restore,
    snapshot,
    start_tuning,
    text_parts,
)
from fieldmark.params import Encoder

CPU = torch.device("cpu")
BLOCK = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


def load(models: dict[str, Path], name: str) -> LoadedEncoder:
    return load_encoder(name, Encoder(model=f"local-dir:{models[name]}", batch_size=4), CPU)


def start(encoder: LoadedEncoder, blocks: int, rank: int | None) -> Any:
    parts = [image_parts(encoder.model, "key"), text_parts(encoder.model, "key")]
    return start_tuning(parts, blocks, rank, torch.Generator().manual_seed(0))


def tunable(model: nn.Module) -> set[str]:
    """The weights that are tuned, by the names that the model's file gives them."""
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {re.sub(r"parametrizations\.(\w+)\.0\.(up|down)$", r"\1", name) for name in found}


def pixels_of(encoder: LoadedEncoder) -> Tensor:
    size = encoder.preprocessing["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator)


def test_low_rank_updates_are_of_every_matrix_of_the_last_blocks(models: dict[str, Path]) -> None:
    """Of attention and of both halves of the MLP: a rule by the word `proj` leaves out three of the four."""
    encoder = load(models, "vit")
    tuned = start(encoder, 1, 4)
    image = {f"visual.transformer.resblocks.1.{name}" for name in BLOCK}
    text = {f"transformer.resblocks.0.{name}" for name in BLOCK}
    assert tunable(encoder.model) == image | text | {"visual.proj", "text_projection"}
    assert len(tuned.inner) == 2 * len(image | text)
    assert len(tuned.projections) == 2


def test_whole_blocks_have_their_norms_and_biases_too(models: dict[str, Path]) -> None:
    encoder = load(models, "vit")
    start(encoder, 1, None)
    names = {name for name, _ in encoder.model.named_parameters()}
    wanted = {name for name in names if name.startswith(("visual.transformer.resblocks.1.", "transformer.resblocks."))}
    behind = {"visual.ln_post.weight", "visual.ln_post.bias", "ln_final.weight", "ln_final.bias"}
    assert tunable(encoder.model) == wanted | behind | {"visual.proj", "text_projection"}
    assert "visual.transformer.resblocks.1.ln_1.bias" in wanted


@pytest.mark.parametrize("rank", [4, None])
def test_without_blocks_the_projections_alone(models: dict[str, Path], rank: int | None) -> None:
    encoder = load(models, "conv")
    assert start(encoder, 0, rank).inner == []
    assert tunable(encoder.model) == {"visual.head.proj.weight", "text_projection"}


def test_stages_of_a_convolutional_tower(models: dict[str, Path]) -> None:
    encoder = load(models, "conv")
    start(encoder, 2, 4)
    visual = {name for name in tunable(encoder.model) if name.startswith("visual.trunk")}
    weights = {name for name, each in encoder.model.state_dict().items() if each.ndim == 4}
    # Parametrised weights have another name now.
    bare = {name.replace("parametrizations.", "").replace(".original", "") for name in weights}
    assert visual == {name for name in bare if name.startswith(("visual.trunk.layer3", "visual.trunk.layer4"))}


@pytest.mark.parametrize(
    ("name", "first", "behind"),
    [
        ("efficientnet_lite0", "blocks", ["conv_head", "bn2"]),
        ("convnext_atto", "stages", ["norm_pre", "head"]),
        ("swin_tiny_patch4_window7_224", "layers", ["norm", "head"]),
        ("vit_tiny_patch16_224", "blocks", ["norm"]),
    ],
)
def test_what_lies_behind_the_blocks_of_timm(name: str, first: str, behind: list[str]) -> None:
    model: Any = timm.create_model(name, num_classes=0)
    parts = image_parts(model, "key")
    assert parts.blocks == list(getattr(model, first))
    assert all(any(getattr(model, each) is part for part in parts.behind) for each in behind)
    assert parts.projection == []


@pytest.mark.parametrize(("name", "count"), [("resnet18", 4), ("regnet_y_400mf", 4), ("efficientnet_b0", 9)])
def test_stages_of_torchvision(name: str, count: int) -> None:
    trunk = nn.Sequential(*(part for _, part in parts_of(torchvision_models.get_model(name))))
    assert len(image_parts(trunk, "key").blocks) == count


def test_a_tower_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"^key: no rule says what the last blocks of a Linear are; "):
        image_parts(nn.Linear(2, 2), "key")


@pytest.mark.parametrize("name", ["conv", "vit"])
@pytest.mark.parametrize("rank", [3, None])
def test_what_begins_to_be_tuned_gives_the_same_bits(models: dict[str, Path], name: str, rank: int | None) -> None:
    encoder = load(models, name)
    pixels, texts = pixels_of(encoder), ["a red fish", "a tall fin"]
    names = set(encoder.model.state_dict())
    before = [*encoder.embed_images(pixels), encoder.embed_texts(texts)]
    start(encoder, 1, rank)
    during = [*encoder.embed_images(pixels), encoder.embed_texts(texts)]
    end_tuning(encoder.model)
    after = [*encoder.embed_images(pixels), encoder.embed_texts(texts)]
    for first, second, third in zip(before, during, after, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    assert set(encoder.model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_updates_end_up_in_the_weights_and_nothing_else_moves(models: dict[str, Path]) -> None:
    encoder = load(models, "vit")
    before = {name: each.clone() for name, each in encoder.model.state_dict().items()}
    tuned = start(encoder, 1, 4)
    optimizer = make_optimizer(tuned.inner, tuned.projections, 1e-2, 1e-2, 0.0)
    for _ in range(2):  # of the first step B alone has a gradient
        model: Any = encoder.model
        image = model.encode_image(encoder.normalise(pixels_of(encoder)))
        loss = image.square().sum() + model.encode_text(encoder.tokenizer(["a red fish"])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = tunable(encoder.model)
    end_tuning(encoder.model)
    after = encoder.model.state_dict()
    assert {name for name, each in before.items() if not torch.equal(each, after[name])} == moved
    change = after["visual.transformer.resblocks.1.mlp.c_fc.weight"] - before[
        "visual.transformer.resblocks.1.mlp.c_fc.weight"
    ]
    assert torch.linalg.matrix_rank(change, atol=1e-6) <= 4


def test_groups_hold_each_parameter_once_and_vectors_have_no_decay(models: dict[str, Path]) -> None:
    tuned = start(load(models, "vit"), 1, None)
    optimizer = make_optimizer(tuned.inner, tuned.projections, 1e-4, 1e-3, 0.1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, tuned.all))
    assert len(set(map(id, held))) == len(held)
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
        outer = {id(parameter) for parameter in tuned.projections}
        assert all((id(parameter) in outer) == (group["lr"] == 1e-3) for parameter in group["params"])


def test_the_best_values_come_back() -> None:
    values = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3, 2))]
    kept = snapshot(values)
    with torch.no_grad():
        values[0].add_(1)
    restore(values, kept)
    assert values[0].tolist() == [1, 1]
