"""Rules for the cells of a CLS-pooled ViT, against loops over tokens on tiny random models."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional

from fieldmark.command import UserError
from fieldmark.encoders.base import make_batch
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.dense import BETA, GAMMA, REACH, RULES, Dense, proxy_attention, run_dense
from fieldmark.encoders.layers import (
    LayerChoice,
    choose_layers,
    embed_with_rollout,
    find_tower,
    hidden_states,
    record_attention,
)
from fieldmark.encoders.pooled import pool_batch
from fieldmark.params import Encoder, Proxy, Tower
from tests.fieldmark.encoders import test_families as families
from tests.project import VIT, save_model

CPU = torch.device("cpu")
PROXY = Proxy(proxy="small")
RULES_OF: dict[str, Any] = {"value": "value", "self": "self", "neighbour": "neighbour", "proxy": PROXY}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tower]:
    """ViTs normalised otherwise than the encoder: one of another size and batch, one of the same size."""
    folder = tmp_path_factory.mktemp("towers")
    data = {"mean": (0.5, 0.45, 0.4), "std": (0.2, 0.25, 0.3), "crop_pct": 0.9}
    return {
        "small": Tower(model=f"local-dir:{save_tower(folder / 'small', 48, data)}", batch_size=2),
        "alike": Tower(model=f"local-dir:{save_tower(folder / 'alike', 32, data)}", batch_size=7),
    }


def save_tower(folder: Path, side: int, data: dict[str, Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": side, "patch_size": 8}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
        # Cells that differ from each other, as those of a trained tower do.
        model.patch_embed.proj.weight.data *= 50
    save_for_hf(model, str(folder), safe_serialization=True, data_config={**data, "input_size": (3, side, side)},
                model_args=sizes)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return randomise(save_model(tmp_path_factory.mktemp("vit") / "model", VIT))


def randomise(folder: Path) -> Path:
    """The model with biases and norms that are not those of a fresh one, so that leaving one out shows."""
    state, generator = load_file(folder / "open_clip_model.safetensors"), torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if tensor.ndim == 1:
            state[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def load(folder: Path, dense: Any, towers: dict[str, Tower] | None = None, **settings: Any) -> LoadedEncoder:
    asked = Encoder(model=f"local-dir:{folder}", dense=dense, **{"batch_size": 4, **settings})
    return load_encoder("mine", asked, CPU, towers)


@pytest.fixture(scope="module")
def encoders(folder: Path, towers: dict[str, Tower]) -> dict[str, LoadedEncoder]:
    return {name: load(folder, dense, towers) for name, dense in {"last": "last", **RULES_OF}.items()}


def noise(side: int = 32, count: int = 3) -> Tensor:
    """Pictures (count, 3, side, side) of blocks of 8 pixels, each of its own colour, and some noise."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(count, 3, side // 8, side // 8, generator=generator).repeat_interleave(8, 2)
    return blocks.repeat_interleave(8, 3) + 0.3 * torch.randn(count, 3, side, side, generator=generator)


# The loops.


def softmax(scores: list[float]) -> list[float]:
    raised = [math.exp(each - max(scores)) if each > -math.inf else 0.0 for each in scores]
    return [each / sum(raised) for each in raised]


def maps_of(rule: str, query: Tensor, key: Tensor, similar: Tensor | None, width: int) -> list[list[float]]:
    """The attention map of one picture and head by a loop over pairs of tokens: query, key (T, d), similar (T, T)."""
    count, scale = len(query), 1 / math.sqrt(query.shape[1])
    rows = []
    for i in range(count):
        if rule == "value":
            row = [float(i == j) for j in range(count)]
        elif rule == "self":
            row = [0.0] * count
            for each in (query, key):
                found = softmax([float(each[i] @ each[j]) * scale for j in range(count)])
                row = [a + b for a, b in zip(row, found, strict=True)]
        elif rule == "neighbour":
            scores = []
            for j in range(count):
                apart = (i // width - j // width) ** 2 + (i % width - j % width) ** 2
                scores.append(float(key[i] @ key[j]) * scale + math.exp(-apart / (2 * REACH**2)))
            row = softmax(scores)
        else:
            assert similar is not None
            cut = [GAMMA * (float(similar[i, j]) - BETA * float(similar.mean())) for j in range(count)]
            positive = any(each > 0 for each in cut)
            row = softmax([each if each > 0 else -math.inf for each in cut]) if positive else []
            row = row or [float(i == j) for j in range(count)]
        rows.append(row)
    return rows


def looped(rule: str, query: Tensor, key: Tensor, value: Tensor, similar: Tensor | None, width: int) -> Tensor:
    """Mixed values (T, heads x d) of one picture's cells (heads, T, d)."""
    heads, count, _ = value.shape
    out = []
    for head in range(heads):
        rows = maps_of(rule, query[head], key[head], similar, width)
        mixed = [sum(rows[i][j] * value[head, j] for j in range(count)) for i in range(count)]
        out.append(torch.stack(mixed))  # type: ignore[arg-type]
    return torch.cat(out, dim=1)


def clip_attention(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (n, heads, T, d) of the cells in the last block of open_clip's ViT."""
    x = visual._embeds(pixels)
    *before, last = visual.transformer.resblocks
    for block in before:
        x = block(x)
    x = last.ln_1(x)[:, 1:]
    heads, found = last.attn.num_heads, []
    for number in range(3):
        width = last.attn.embed_dim
        part = slice(number * width, (number + 1) * width)
        rows = x @ last.attn.in_proj_weight[part].T + last.attn.in_proj_bias[part]
        found.append(rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2))
    return found[0], found[1], found[2]


def cosines(cells: Tensor) -> Tensor:
    """(T, T) of cells (T, D), by a loop."""
    count = len(cells)
    found = torch.zeros(count, count)
    for i in range(count):
        for j in range(count):
            found[i, j] = cells[i] @ cells[j] / (cells[i].norm() * cells[j].norm())
    return found


def similarities(encoder: LoadedEncoder, pixels: Tensor) -> list[Tensor | None]:
    """S of each picture, from the tower of a proxy; None for another rule."""
    if encoder.dense is None or encoder.dense.tower is None:
        return [None] * len(pixels)
    batch = make_batch(encoder, pixels)
    height, width = encoder.model.visual.grid_size  # type: ignore[union-attr,misc]
    return [cosines(each) for each in encoder.dense.proxy_cells(batch, height, width)[: len(pixels)]]


@pytest.mark.parametrize("rule", RULES_OF)
def test_a_rule_is_what_a_loop_over_tokens_gives(rule: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder, pixels = encoders[rule], noise()
    visual: Any = encoder.model.visual
    with torch.no_grad():
        made = clip_attention(visual, pixels)
        rows = torch.stack([
            looped(rule, *(part[n] for part in made), similar, 4)
            for n, similar in enumerate(similarities(encoder, pixels))
        ])
        out = visual.transformer.resblocks[-1].attn.out_proj
        expected = visual.ln_post(rows @ out.weight.T + out.bias) @ visual.proj
        tokens = encoder.embed_images(pixels)[1]
        torch.testing.assert_close(tokens, expected.reshape(3, 4, 4, 16), atol=1e-5, rtol=1e-5)
    # The rules differ by far more than that.
    for other in {"last", *RULES_OF} - {rule}:
        assert (tokens - encoders[other].embed_images(pixels)[1]).abs().max() > 1e-2


def test_last_has_the_bytes_and_the_fingerprint_of_an_encoder_without_the_key(
    folder: Path, encoders: dict[str, LoadedEncoder]
) -> None:
    encoder, pixels = encoders["last"], noise()
    visual: Any = encoder.model.visual
    assert encoder.dense is None
    without = load_encoder("mine", Encoder(model=f"local-dir:{folder}", batch_size=4), CPU)
    assert encoder.fingerprint == without.fingerprint
    with torch.inference_mode():
        output = visual.forward_intermediates(make_batch(encoder, pixels), indices=1)
        cells = output["image_intermediates"][0].permute(0, 2, 3, 1).contiguous()
        before = output["image_features"][:3], (visual.ln_post(cells) @ visual.proj)[:3]
    for found, expected in zip(encoder.embed_images(pixels), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", RULES_OF)
def test_the_global_vector_has_the_bits_of_last(rule: str, encoders: dict[str, LoadedEncoder]) -> None:
    pixels = noise()
    assert torch.equal(encoders[rule].embed_images(pixels)[0], encoders["last"].embed_images(pixels)[0])
    assert torch.equal(pool_batch(encoders[rule], pixels, [])[0], pool_batch(encoders["last"], pixels, [])[0])


@pytest.mark.parametrize("rule", RULES_OF)
def test_a_single_token_has_its_own_value(rule: str, towers: dict[str, Tower], tmp_path: Path) -> None:
    vision = {**VIT["vision_cfg"], "image_size": 8}
    encoder = load(randomise(save_model(tmp_path, {**VIT, "vision_cfg": vision})), RULES_OF[rule], towers)
    visual: Any = encoder.model.visual
    dense = encoder.dense
    assert dense is not None
    pixels = noise(8, 4)
    with torch.no_grad():
        value = clip_attention(visual, pixels)[2].transpose(1, 2).flatten(2)  # (4, 1, D)
        out = visual.transformer.resblocks[-1].attn.out_proj
        expected = (2 * value if rule == "self" else value) @ out.weight.T + out.bias
        _, cells = run_dense(dense, lambda: visual(pixels), pixels)
    torch.testing.assert_close(cells, expected, atol=1e-6, rtol=1e-5)


def test_a_proxy_to_which_cells_are_like_themselves_alone_is_value(encoders: dict[str, LoadedEncoder]) -> None:
    alone = torch.eye(16).expand(4, 16, 16)
    torch.testing.assert_close(proxy_attention(alone), alone, atol=0, rtol=0)
    visual, pixels = encoders["proxy"].model.visual, noise(count=4)

    class Alone(Dense):
        def proxy_cells(self, pixels: Tensor, height: int, width: int) -> Tensor:
            return alone

    dense = Alone("proxy", visual, encoders["proxy"].dense.tower, lambda shown: shown, {})  # type: ignore[union-attr]
    with torch.no_grad():
        _, cells = run_dense(dense, lambda: visual(pixels), pixels)  # type: ignore[operator]
        _, value = run_dense(encoders["value"].dense, lambda: encoders["value"].model.visual(pixels), pixels)  # type: ignore
    assert cells is not None
    torch.testing.assert_close(cells, value, atol=1e-6, rtol=1e-6)


def cells_at_random(count: int) -> Tensor:
    """(count, 16, 3)."""
    return torch.randn(count, 16, 3, generator=torch.Generator().manual_seed(0))


def test_mean_similarity_is_of_one_picture() -> None:
    first, second = cells_at_random(2) + torch.tensor([0.0, 2.0])[:, None, None]
    both = proxy_attention(torch.stack([first, second]))
    assert (cosines(first).mean() - cosines(second).mean()).abs() > 0.3
    for cells, found in zip((first, second), both, strict=True):
        torch.testing.assert_close(found, torch.tensor(maps_of("proxy", cells, cells, cosines(cells), 4)))
        torch.testing.assert_close(found, proxy_attention(cells[None])[0])


def test_a_row_without_a_positive_entry_keeps_itself() -> None:
    water = torch.ones(1, 9, 5)
    assert torch.equal(proxy_attention(water)[0], torch.eye(9))
    # A cell in which a tower with a ReLU sees nothing is like none, not even itself.
    cells = cells_at_random(1)
    cells[0, 3] = 0
    found = proxy_attention(cells)[0]
    assert torch.equal(found[3], torch.eye(16)[3])
    assert (found > 0).sum(1).max() > 1
    torch.testing.assert_close(found.sum(1), torch.ones(16))


@pytest.mark.parametrize("rule", RULES_OF)
def test_company_and_order_change_no_bit(rule: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder, pixels = encoders[rule], noise(count=4)
    together = encoder.embed_images(pixels)[1]
    for order in ([0], [2, 1], [3, 2, 1, 0], [1, 1, 1]):
        assert torch.equal(encoder.embed_images(pixels[order])[1], together[order])


@pytest.mark.parametrize("rule", RULES_OF)
def test_head_is_what_the_projection_takes_and_blocks_are_as_they_are(
    rule: str, encoders: dict[str, LoadedEncoder]
) -> None:
    """The layer of embed_tokens and pool_tokens, and projected tokens, beside attention rollout."""
    encoder, last, pixels = encoders[rule], encoders["last"], noise(count=4)
    tower, visual = find_tower(encoder.model), encoder.model.visual
    tokens, choice = encoder.embed_images(pixels)[1], choose_layers(tower, [0, -1, "head"], True, "key")
    with torch.inference_mode():
        found = hidden_states(encoder.model, make_batch(encoder, pixels), choice, "key", encoder.dense)
        plain = hidden_states(last.model, make_batch(last, pixels), choice, "key")
    torch.testing.assert_close(found.cells[-1] @ visual.proj, tokens, atol=1e-6, rtol=1e-5)  # type: ignore
    kept, before = ([*each.cells[:-1], *each.cls, each.rollout] for each in (found, plain))
    assert all(map(torch.equal, kept, before))
    layers = choose_layers(tower, [-1, "head"], False, "key").layers
    _, [block, head, projected] = pool_batch(encoder, pixels, [*layers, layers[-1] + 1])
    assert torch.equal(block, found.cells[1])
    assert torch.equal(head, found.cells[-1])
    torch.testing.assert_close(projected, tokens, atol=1e-6, rtol=1e-5)
    # The map of embed.regions, and what rollout says of the tower as it is.
    _, of_rule, rollout = embed_with_rollout(encoder, "key", pixels)
    assert torch.equal(of_rule, tokens)
    assert torch.equal(rollout, embed_with_rollout(last, "key", pixels)[2])


def test_a_proxy_sees_what_the_encoder_sees(
    folder: Path, towers: dict[str, Tower], encoders: dict[str, LoadedEncoder]
) -> None:
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alike = load(folder, Proxy(proxy="alike"), towers)
    for mirrored in (picture, picture.flip(-1)):
        dense = alike.dense
        assert dense is not None
        assert dense.tower is not None
        shown = dense.show(alike.normalise(mirrored))
        torch.testing.assert_close(shown, dense.tower.normalise(mirrored), atol=1e-5, rtol=1e-5)
        # One batch shape for both models; the tower's own batch_size does not count.
        batch = make_batch(alike, alike.normalise(mirrored))
        cells = dense.proxy_cells(batch, 4, 4)
        assert dense.tower.batch_size == len(batch) == 4
        expected = dense.tower.embed_images(dense.tower.normalise(mirrored[[0, 1, 1, 1]]))[1]
        torch.testing.assert_close(cells, expected.flatten(1, 2), atol=1e-4, rtol=1e-4)
    # A tower of another size: pictures and map are scaled.
    other = encoders["proxy"].dense
    assert other is not None
    assert other.show(noise(count=4)).shape == (4, 3, 48, 48)
    assert other.proxy_cells(noise(count=4), 4, 4).shape == (4, 16, 32)
    grey = other.show(encoders["proxy"].normalise(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)))
    assert other.tower is not None
    torch.testing.assert_close(grey, other.tower.normalise(torch.full((1, 3, 48, 48), 128, dtype=torch.uint8)))


def test_rule_and_tower_are_in_the_fingerprint(
    folder: Path, towers: dict[str, Tower], encoders: dict[str, LoadedEncoder]
) -> None:
    marks = {name: encoder.fingerprint for name, encoder in encoders.items()}
    marks["another tower"] = load(folder, Proxy(proxy="alike"), towers).fingerprint
    assert len(set(marks.values())) == len(marks)
    again = {"small": towers["small"].model_copy(update={"batch_size": 1})}
    assert load(folder, PROXY, again).fingerprint == marks["proxy"]
    assert encoders["self"].dense is not None
    assert encoders["self"].dense.identity == {"rule": "self", "rules": RULES}


# Other towers.


def timm_attention(attn: Any, tokens: Tensor) -> list[Tensor]:
    """q, k and v (n, heads, T, d) of timm's attention, before rotary positions."""
    if attn.qkv is None:
        rows = [part(tokens) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
    else:
        rows = [tokens @ weight.T for weight in attn.qkv.weight.chunk(3)]
        rows = [row + bias for row, bias in zip(rows, attn.qkv.bias.chunk(3), strict=True)]
    return [row.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for row in rows]


@pytest.mark.parametrize("name", ["MobileCLIP2-L-14", "EVA02-B-16"])
@pytest.mark.parametrize("rule", ["value", "self", "neighbour"])
def test_a_vit_of_timm_has_the_same_rules(name: str, rule: str, tmp_path: Path) -> None:
    encoder = load(families.save_small(tmp_path, name), rule, batch_size=3)
    visual, pixels = encoder.model.visual, families.draw_noise(name)
    trunk: Any = visual.trunk  # type: ignore[union-attr]
    block, inputs = trunk.blocks[-1], []
    hook = block.attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad(), record_attention(trunk) as recorded:
        trunk.forward_features(pixels)
    hook.remove()
    with torch.no_grad():
        query, key, value = timm_attention(block.attn, inputs[0])
        # With rotary positions they are what the block itself attends with.
        query, key = (query, key) if name.startswith("Mobile") else (recorded[-1].query, recorded[-1].key)
        rows = torch.stack([
            looped(rule, *(part[n, :, 1:] for part in (query, key, value)), None, 4) for n in range(len(pixels))
        ])
        cells = trunk.norm(block.attn.proj(block.attn.norm(rows)))
        # One cell in the place of the CLS token, alone.
        expected = visual.head(trunk.forward_head(cells.flatten(0, 1)[:, None]))  # type: ignore
    tokens = encoder.embed_images(pixels)[1]
    torch.testing.assert_close(tokens, expected.reshape(tokens.shape), atol=1e-5, rtol=1e-4)
    # What is made for the rule is no attention of the tower.
    rollout = embed_with_rollout(encoder, "key", pixels)
    assert torch.equal(rollout[1], tokens)
    head = pool_batch(encoder, pixels, [choose_layers(trunk, ["head"], False, "key").layers[0]])[1][0]
    with torch.inference_mode():
        found = hidden_states(encoder.model, pixels, LayerChoice([2], None), "key", encoder.dense)
    torch.testing.assert_close(head, found.cells[0], atol=1e-6, rtol=1e-5)


def test_a_tower_that_attends_is_not_recorded_with_an_encoder_of_timm(towers: dict[str, Tower], tmp_path: Path) -> None:
    encoder = load(families.save_small(tmp_path, "MobileCLIP2-L-14"), PROXY, towers, batch_size=3)
    _, tokens, rollout = embed_with_rollout(encoder, "key", families.draw_noise("MobileCLIP2-L-14"))
    assert tokens.shape[:3] == (3, 4, 4)
    assert rollout.shape[2] == 16


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RN50-quickgelu", "a ModifiedResNet"),
        ("convnext_base", "a ConvNeXt"),
        ("ViT-L-14-CLIPA", "a VisionTransformer with pooling avg"),
        ("ViT-B-16-SigLIP", "a VisionTransformer with pooling map"),
        ("coca_ViT-B-32", "a VisionTransformer with pooling tok"),
        ("EVA02-E-14", "an? Eva with pooling token"),
        ("PE-Core-B-16", "an? Eva with pooling map"),
        ("swin_base_patch4_window7_224", "a SwinTransformer"),
        ("vit_relpos_medium_patch16_cls_224", "a VisionTransformerRelPos"),
    ],
)
def test_another_family_is_refused_and_the_key_named(name: str, said: str, tmp_path: Path) -> None:
    folder = families.save_small(tmp_path, name)
    assert load(folder, "last", batch_size=3).dense is None
    for dense, rule in (("self", "self"), (PROXY, "proxy")):
        words = rf"^params\.yaml: encoders\.mine\.dense: {rule} needs a ViT .* CLS token, .* is {said}.*; use last$"
        with pytest.raises(UserError, match=words):
            load(folder, dense, batch_size=3)


def test_a_proxy_that_is_no_tower_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"encoders\.mine\.dense\.proxy: 'small' is not under `towers`; add it there$"):
        load(folder, PROXY)


@pytest.mark.parametrize("rule", RULES_OF)
def test_another_size_and_half_precision(rule: str, folder: Path, towers: dict[str, Tower]) -> None:
    large = load(folder, RULES_OF[rule], towers, image_size=48)
    assert large.embed_images(noise(48))[1].shape == (3, 6, 6, 16)
    half, full = (load(folder, RULES_OF[rule], towers, precision=each) for each in ("bf16", "fp32"))
    low, high = (each.embed_images(noise())[1] for each in (half, full))
    assert low.dtype == torch.float32
    assert functional.cosine_similarity(low, high, dim=-1).min() > 0.98
    picture = half.preprocess(Image.new("RGB", (40, 30)))[None]
    assert half.embed_images(picture)[1].isfinite().all()


def test_a_vit_of_a_single_block(towers: dict[str, Tower], tmp_path: Path) -> None:
    """The block's input is what the patches give: nothing stands before it."""
    vision = {**VIT["vision_cfg"], "layers": 1}
    encoder = load(randomise(save_model(tmp_path, {**VIT, "vision_cfg": vision})), "value")
    visual: Any = encoder.model.visual
    with torch.no_grad():
        value = clip_attention(visual, noise())[2].transpose(1, 2).flatten(2)
        out = visual.transformer.resblocks[0].attn.out_proj
        expected = visual.ln_post(value @ out.weight.T + out.bias) @ visual.proj
    torch.testing.assert_close(encoder.embed_images(noise())[1].flatten(1, 2), expected, atol=1e-5, rtol=1e-5)
