import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import logging as hub_logging
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer

from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.encoders.towers import load_tower
from fieldmark.params import Encoder, Tower
from tests.project import CONV, ROOT, TEXT_TOWER, VIT, save_model

CPU = torch.device("cpu")


def load(folder: Path, **settings: object) -> LoadedEncoder:
    return load_encoder("mine", Encoder(model=f"local-dir:{folder}", **{"batch_size": 4, **settings}), CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoders(models: dict[str, Path]) -> dict[str, LoadedEncoder]:
    return {name: load(folder) for name, folder in models.items()}


def noise(encoder: LoadedEncoder, count: int) -> Tensor:
    side = encoder.preprocessing["size"][0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def same_direction(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(
        torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("family", ["encoder", "tower"])
def test_float32_of_a_gpu_is_not_rounded_to_tf32(family: str) -> None:
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=True):  # as it is where nobody says otherwise
        if family == "encoder":
            load_encoder("reef", Encoder(model=f"local-dir:{ROOT / 'data/demo/encoder'}"), CPU)
        else:
            with pytest.raises(UserError, match=r"towers\.none\.model: timm knows no"):
                load_tower("none", Tower(library="timm", model="none"), CPU)
        assert not cudnn.allow_tf32


def test_the_demo_encoder_keeps_its_fingerprint() -> None:
    """Only a change of RULES may change it: every stored embedding is made anew where it does."""
    settings = Encoder(model=f"local-dir:{ROOT / 'data/demo/encoder'}")
    own = "1a67bf1ebbbb57f5dedeaddda3e7c0edcbe0863f9c34a41875bdf9f9a246b0a8"
    assert load_encoder("reef", settings, CPU).fingerprint == own
    larger = load_encoder("reef", settings.model_copy(update={"image_size": 256}), CPU)
    assert larger.fingerprint != own
    assert larger.preprocessing["size"] == (256, 256)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_the_global_row_is_what_open_clip_gives(
    name: str, encoders: dict[str, LoadedEncoder], models: dict[str, Path]
) -> None:
    encoder = encoders[name]
    # Loaded anew and called as open_clip's users do.
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{models[name]}")
    model.eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    pixels = torch.stack([preprocess(picture), *noise(encoder, 2)])
    assert torch.equal(encoder.normalise(encoder.preprocess(picture)[None])[0], pixels[0])
    pooled, tokens = encoder.embed_images(pixels)
    assert pooled.dtype == tokens.dtype == torch.float32
    assert tokens.shape == (3, *{"conv": (2, 2), "vit": (4, 4)}[name], 16)
    with torch.no_grad():
        same_direction(pooled, model.encode_image(pixels))
        texts = ["a fish", "a fish with a forked tail", "x"]
        same_direction(encoder.embed_texts(texts), model.encode_text(open_clip.tokenize(texts, 12)))
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_mean_of_convolutional_cells_is_the_global_row(encoders: dict[str, LoadedEncoder]) -> None:
    pooled, tokens = encoders["conv"].embed_images(noise(encoders["conv"], 3))
    torch.testing.assert_close(tokens.mean(dim=(1, 2)), pooled, atol=1e-5, rtol=1e-4)


def test_vit_cells_go_through_the_last_norm_and_projection(encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders["vit"]
    visual = encoder.model.visual
    pixels = noise(encoder, 2)
    with torch.no_grad():
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # type: ignore[operator, union-attr]
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), x], dim=1) + visual.positional_embedding  # type: ignore
        x = visual.ln_pre(x)  # type: ignore
        for block in visual.transformer.resblocks:  # type: ignore
            x = block(x)
        x = visual.ln_post(x) @ visual.proj  # type: ignore
    pooled, tokens = encoder.embed_images(pixels)
    torch.testing.assert_close(tokens, x[:, 1:].reshape(2, 4, 4, 16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled, x[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("after", [False, True])
def test_the_global_row_of_a_vit_that_averages(after: bool, tmp_path: Path) -> None:
    vision = {**VIT["vision_cfg"], "pool_type": "avg", "final_ln_after_pool": after}
    encoder = load(save_model(tmp_path, {**VIT, "vision_cfg": vision}))
    pixels = noise(encoder, 4)
    assert torch.equal(encoder.embed_images(pixels)[0], encoder.model.encode_image(pixels))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_a_bright_square_lights_its_own_cell(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    grid = {"conv": 2, "vit": 4}[name]
    side = encoder.preprocessing["size"][0]
    cell = side // grid
    blank = encoder.embed_images(torch.zeros(1, 3, side, side))[1][0]
    for row in range(grid):
        for column in range(grid):
            pixels = torch.zeros(1, 3, side, side)
            pixels[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 2.0
            change = (encoder.embed_images(pixels)[1][0] - blank).norm(dim=-1)
            assert divmod(int(change.argmax()), grid) == (row, column)


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_company_and_order_do_not_change_bits(name: str, encoders: dict[str, LoadedEncoder]) -> None:
    encoder = encoders[name]
    pixels = noise(encoder, 4)
    together = encoder.embed_images(pixels)
    for order in ([0], [3], [2, 1], [3, 2, 1, 0], [1, 1, 1]):
        for one, all_ in zip(encoder.embed_images(pixels[order]), together, strict=True):
            assert torch.equal(one, all_[order])
    texts = ["a", "a long tail", "two words", "bars"]
    vectors = encoder.embed_texts(texts)
    for order in ([0], [3, 1], [2, 3, 0, 1]):
        assert torch.equal(encoder.embed_texts([texts[i] for i in order]), vectors[order])


@pytest.mark.parametrize("name", ["conv", "vit"])
def test_bfloat16_runs_on_the_cpu(
    name: str, encoders: dict[str, LoadedEncoder], models: dict[str, Path]
) -> None:
    half = load(models[name], precision="bf16")
    pixels = noise(half, 2)
    for low, full in zip(half.embed_images(pixels), encoders[name].embed_images(pixels), strict=True):
        assert low.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(low, full, dim=-1).min() > 0.99
    assert half.embed_texts(["a fish"]).shape == (1, 16)
    assert half.fingerprint != encoders[name].fingerprint


def test_an_empty_model_gives_its_dimension(encoders: dict[str, LoadedEncoder]) -> None:
    assert encoders["conv"].dimension == 16


def change_config(folder: Path, edit: Callable[[dict], object]) -> Path:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return folder


def test_the_fingerprint_is_of_what_changes_a_vector(
    models: dict[str, Path], encoders: dict[str, LoadedEncoder], tmp_path: Path
) -> None:
    original = encoders["vit"].fingerprint
    assert load(shutil.copytree(models["vit"], tmp_path / "moved"), batch_size=7).fingerprint == original
    marks = [original, encoders["conv"].fingerprint]
    edits: dict[str, Callable[[dict], object]] = {
        "heads": lambda config: config["model_cfg"]["vision_cfg"].update(head_width=8),
        "pooling": lambda config: config["model_cfg"]["vision_cfg"].update(pool_type="avg"),
        "text_heads": lambda config: config["model_cfg"]["text_cfg"].update(heads=4),
        "mean": lambda config: config["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5]),
        "resize": lambda config: config["preprocess_cfg"].update(resize_mode="squash"),
        "activation": lambda config: config["model_cfg"].update(quick_gelu=True),
    }
    for name, edit in edits.items():
        folder = change_config(shutil.copytree(models["vit"], tmp_path / name), edit)
        marks.append(load(folder).fingerprint)
    with torch.random.fork_rng():
        marks.append(load(save_model(tmp_path / "wider", {**VIT, "embed_dim": 24})).fingerprint)
    assert len(set(marks)) == len(marks)


WORDS = ["fish", "tail", "fin", "a", "with", "##s"]


def save_tokenizer(folder: Path, words: list[str] = WORDS, **settings: object) -> Path:
    """A BERT tokenizer of a few words as Hugging Face saves it: [PAD] is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[S]", "[E]", *words]
    tokenizer = BertTokenizer(
        vocab={word: number for number, word in enumerate(vocabulary)}, bos_token="[S]", eos_token="[E]", **settings
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_bert(folder: Path, words: list[str] = WORDS, **text_cfg: object) -> Path:
    """CONV with a Hugging Face text tower of one layer, which lies in folder/text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(vocab_size=20, **settings), add_pooling_layer=False).save_pretrained(folder / "text")
    names = {"hf_model_name": str(folder / "text"), "hf_tokenizer_name": "overridden by the folder"}
    config = {"context_length": 12, "hf_proj_type": "linear", **names, **text_cfg}
    return save_model(save_tokenizer(folder, words), {**CONV, "text_cfg": config})


def save_siglip(folder: Path, **text_cfg: object) -> Path:
    """As SigLIP is: attention pooling without projection, no CLS token to text, a cleaning tokenizer."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
    cleaning = {"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"clean": "canonicalize"}}
    tower = {**TEXT_TOWER, "vocab_size": 20, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": {**tower, **cleaning, **text_cfg}}
    return save_model(save_tokenizer(folder), config | {"custom_text": True, "init_logit_bias": -10})


@pytest.fixture(scope="module")
def readers(encoders: dict[str, LoadedEncoder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedEncoder]:
    """Encoders of every way to read a text."""
    base = tmp_path_factory.mktemp("readers")
    return {
        "open_clip": encoders["conv"],
        "bert": load(save_bert(base / "bert")),
        "siglip": load(save_siglip(base / "siglip")),
        "clips": load(save_siglip(base / "clips", tokenizer_mode="clips")),
        "stripped": load(save_siglip(base / "stripped", tokenizer_kwargs={"strip_sep_token": True})),
    }


def test_tokens_are_counted_and_cuts_are_told(readers: dict[str, LoadedEncoder]) -> None:
    for name, special in {"open_clip": 2, "bert": 2, "siglip": 2, "clips": 3, "stripped": 1}.items():
        count = readers[name].count_tokens
        assert count("") == (special, False)
        assert count("fish") == (special + 1, False)
        # [SEP] takes a place before it is stripped.
        full, most = (11, 10) if name == "stripped" else (12, 12 - special)
        assert count("fish " * most) == (full, False)
        assert count("fish " * (most + 1)) == (full, True)
        assert count("fish " * 1000) == (full, True)
    # What cleaning takes away is not read.
    assert readers["bert"].count_tokens("A fish, with fins.") == (9, False)
    assert readers["siglip"].count_tokens("A fish, with fins.") == (7, False)


@pytest.mark.parametrize("name", ["open_clip", "bert", "siglip", "clips", "stripped"])
@limits(max_examples=60)
@given(text=st.lists(st.sampled_from(["fish", "Tail,", "fins", "eel", "a", "_", "&amp;", "é", "5", "."])).map(" ".join))
def test_the_count_is_of_what_stands_in_the_row(name: str, readers: dict[str, LoadedEncoder], text: str) -> None:
    tokenizer: Any = readers[name].tokenizer
    read, whole = ((tokenizer([text], context_length=length) != 0).sum() for length in (12, 300))
    assert readers[name].count_tokens(text) == (read, whole > read)


@pytest.mark.parametrize("name", ["bert", "siglip"])
def test_texts_of_a_hugging_face_encoder(name: str, readers: dict[str, LoadedEncoder]) -> None:
    encoder = readers[name]
    texts = ["a fish", "a fish with fins", "tail"]
    vectors = encoder.embed_texts(texts)
    rows = encoder.tokenizer(texts)
    assert rows.shape == (3, 12)
    torch.testing.assert_close(vectors, encoder.model.encode_text(rows), atol=1e-5, rtol=1e-5)  # type: ignore[operator]
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    assert torch.equal(encoder.embed_texts(texts[1:]), vectors[1:])
    assert encoder.dimension == vectors.shape[1] == encoder.embed_images(noise(encoder, 1))[0].shape[1]


def test_an_encoder_like_siglip_gives_global_row_and_cells(readers: dict[str, LoadedEncoder]) -> None:
    encoder = readers["siglip"]
    pixels = noise(encoder, 4)
    pooled, tokens = encoder.embed_images(pixels)
    # To the last bits alone: without AVX-512 the attention pool is computed by other kernels than inside the model.
    torch.testing.assert_close(pooled, encoder.model.encode_image(pixels), atol=1e-6, rtol=1e-5)  # type: ignore[operator]
    assert tokens.shape == (4, 10, 10, 64)


def test_a_hugging_face_text_tower_is_known_by_content_not_by_path(
    readers: dict[str, LoadedEncoder], tmp_path: Path
) -> None:
    original = Path(readers["bert"].model.text.config._name_or_path).parent  # type: ignore[union-attr]

    def copy(name: str) -> Path:
        folder = shutil.copytree(original, tmp_path / name)
        return change_config(
            folder, lambda config: config["model_cfg"]["text_cfg"].update(hf_model_name=str(folder / "text"))
        )

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    moved = copy("moved")
    # How long a row was when the tokenizer was saved says nothing: each call sets it.
    length = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    edit(moved / "tokenizer.json", truncation=length)
    edit(moved / "tokenizer_config.json", name_or_path="elsewhere")
    edit(moved / "text/config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    assert load(moved).fingerprint == readers["bert"].fingerprint

    marks = [readers["bert"].fingerprint]
    save_tokenizer(words := copy("words"), [WORDS[1], WORDS[0], *WORDS[2:]])
    save_tokenizer(case := copy("case"), do_lower_case=False)
    edit((heads := copy("heads")) / "text/config.json", num_attention_heads=4)
    edit((padding := copy("padding")) / "text/config.json", pad_token_id=3)
    edit((side := copy("side")) / "tokenizer_config.json", padding_side="left")
    edit((special := copy("special")) / "tokenizer_config.json", pad_token="[E]")
    change_config(clean := copy("clean"), lambda config: config["model_cfg"]["text_cfg"].update(
        tokenizer_kwargs={"clean": "canonicalize"}
    ))
    for folder in (words, case, heads, padding, side, special, clean):
        marks.append(load(folder).fingerprint)
    assert len(set(marks)) == len(marks)


def test_a_text_tower_that_is_not_there_is_one_line(readers: dict[str, LoadedEncoder], tmp_path: Path) -> None:
    original = Path(readers["bert"].model.text.config._name_or_path).parent  # type: ignore[union-attr]
    folder = shutil.copytree(original, tmp_path / "moved")
    change_config(folder, lambda config: config["model_cfg"]["text_cfg"].update(hf_model_name="../gone"))
    words = r"encoders\.mine\.model: .*moved.* text tower \.\./gone, .*; correct it"
    with pytest.raises(UserError, match=words) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_half_precision_that_open_clip_cannot_run_is_one_line(tmp_path: Path) -> None:
    folder = save_bert(tmp_path)
    (folder / "open_clip_model.safetensors").unlink()
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    save_model(folder, config | {"vision_cfg": VIT["vision_cfg"]})
    assert load(folder).embed_texts(["a fish"]).shape == (1, 16)
    with pytest.raises(UserError, match=r"encoders\.mine\.precision: .*; use fp32") as error:
        load(folder, precision="bf16")
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_file_of_its_rules_is_refused(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(UserError, match=r"encoders\.mine\.model: the rules of ByT5Tokenizer are code") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_a_kind_that_cannot_be_counted(encoders: dict[str, LoadedEncoder]) -> None:
    encoder = dataclasses.replace(encoders["conv"], tokenizer=lambda texts: torch.zeros(len(texts), 12))
    with pytest.raises(UserError, match=r"encoders\.mine: function cannot count tokens; "):
        encoder.count_tokens("fish")


def test_an_encoder_that_cannot_be_loaded_is_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    bare = shutil.copytree(models["vit"], tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()
    cut = shutil.copytree(models["vit"], tmp_path / "cut")
    (cut / "open_clip_model.safetensors").write_bytes(
        (models["vit"] / "open_clip_model.safetensors").read_bytes()[:99]
    )
    other = shutil.copytree(models["vit"], tmp_path / "other")
    shutil.copy(models["conv"] / "open_clip_model.safetensors", other)
    odd = change_config(
        shutil.copytree(models["vit"], tmp_path / "odd"), lambda config: config["model_cfg"].update(foo=1)
    )
    (tmp_path / "empty").mkdir()
    files = {"none.pt": b"", "words.pt": b"no tensors\n", "zip.pt": b"PK\x05\x06" + bytes(18), "cut.npz": b"PK\x03\x04"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({}, tmp_path / "nothing.pt")
    torch.save([1], tmp_path / "list.pt")
    for settings, words in (
        ({"model": f"local-dir:{tmp_path / 'none'}"}, "mine.model: there is no folder"),
        ({"model": "ViT-B-33", "pretrained": "openai"}, r"mine.model: open_clip knows no .*; did you mean ViT-B-32\?"),
        ({"model": "vit_b_32", "pretrained": "openai"}, r"knows no 'vit_b_32'; did you mean ViT-B-32\?$"),
        ({"model": "bird-net", "pretrained": "openai"}, r"knows no 'bird-net'; see open_clip.list_models\(\)"),
        ({"model": "ViT-B-32"}, "mine.pretrained: is missing"),
        ({"model": "ViT-B-32", "pretrained": "nobody"}, "open_clip cannot load"),
        ({"model": f"local-dir:{bare}"}, "could not be loaded"),
        ({"model": f"local-dir:{tmp_path / 'empty'}"}, "open_clip_config.json"),
        ({"model": f"local-dir:{models['vit']}", "precision": "fp16"}, "mine.precision: fp16 needs a GPU"),
        *(({"model": f"local-dir:{folder}"}, "open_clip cannot load") for folder in (cut, other, odd)),
        *(
            ({"model": "ViT-S-32-alt", "pretrained": f"{tmp_path / name}"}, "open_clip cannot load")
            for name in (*files, "nothing.pt", "list.pt")
        ),
    ):
        with pytest.raises(UserError, match=words) as error:
            load_encoder("mine", Encoder(**settings), CPU)  # type: ignore[arg-type]
        assert "encoders.mine" in str(error.value)
        assert "\n" not in str(error.value)


def test_what_cannot_be_downloaded_is_one_line_that_names_the_ways_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # As without a network: nothing is asked for.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    offline = r"cannot be downloaded: no network\? {} `model: local-dir:FOLDER` \(docs/own-data\.md#encoders\); "
    for settings, instead in (
        ({"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}, "give `pretrained:` a checkpoint file or"),
        ({"model": "hf-hub:laion/nothing"}, "give"),
    ):
        with pytest.raises(UserError, match=r"encoders\.mine: '.*' " + offline.format(instead)) as error:
            load_encoder("mine", Encoder(**settings), CPU)
        assert "\n" not in str(error.value)
    assert hub_logging.get_verbosity() == hub_logging.ERROR


@pytest.mark.parametrize(
    ("vision", "size", "words"),
    [
        ({"timm_model_name": "test_vit", "timm_proj": "none"}, 160, r"gives \(4, 101, 64\)"),
        ({"timm_model_name": "test_convnext", "timm_proj": "none"}, 64, r"gives \(4, 64, 2, 2\)"),
        ({"timm_model_name": "levit_128s", "timm_pool": "avg"}, 224, "no map of cells"),
        ({"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": ""}, 64, "a learned position"),
        ({**VIT["vision_cfg"], "pool_type": "none"}, 32, r"VisionTransformer: gives \(4, 17, 16\)"),
        ({**VIT["vision_cfg"], "width": 16, "attentional_pool": "parallel"}, 32, r"gives \(4, 1, 16\)"),
    ],
)
def test_a_tower_without_a_rule_is_refused(
    vision: dict[str, object], size: int, words: str, tmp_path: Path
) -> None:
    defaults = {"timm_pool": "", "timm_proj": "linear"} if "timm_model_name" in vision else {}
    config = {**CONV, "vision_cfg": {**defaults, **vision, "image_size": size}}
    encoder = load(save_model(tmp_path, config))
    with pytest.raises(UserError, match=rf"params\.yaml: encoders\.mine: .*{words}.*; ") as error:
        encoder.embed_images(noise(encoder, 1))
    assert "\n" not in str(error.value)


def test_sizes_that_a_tower_does_not_take_are_told(tmp_path: Path) -> None:
    # timm has no way to bring the positions of this one to another size.
    vision = {"timm_model_name": "convit_tiny", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    words = r"^params\.yaml: encoders\.mine\.image_size: open_clip cannot run this model at 256 pixels \(.*\); leave it"
    with pytest.raises(UserError, match=words):
        load(save_model(tmp_path / "timm", {**CONV, "vision_cfg": vision}), image_size=256)
    # PyTorch does not interpolate fp16 on a CPU.
    vit = save_model(tmp_path / "vit", VIT)
    weights = vit / "open_clip_model.safetensors"
    save_file({name: weight.half() for name, weight in load_file(weights).items()}, weights)
    assert load(vit).dtype == torch.float32
    with pytest.raises(UserError, match=r"open_clip cannot load .*'Half'\); correct it, or leave image_size out$"):
        load(vit, image_size=48)


@pytest.mark.parametrize("trunk", ["test_convnext", "test_efficientnet", "test_nfnet"])
def test_other_convolutional_towers_follow_the_rule(trunk: str, tmp_path: Path) -> None:
    vision = {
        "timm_model_name": trunk,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    encoder = load(save_model(tmp_path, {**CONV, "vision_cfg": {**vision, "image_size": 96}}))
    pixels = noise(encoder, 2)
    pooled, tokens = encoder.embed_images(pixels)
    with torch.no_grad():
        same_direction(pooled, encoder.model.encode_image(pixels))  # type: ignore[operator]
    assert tokens.shape == (2, 3, 3, 16)
