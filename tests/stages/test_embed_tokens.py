import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.layers import LayerChoice
from fieldmark.encoders.passes import Work, forward_sources
from fieldmark.encoders.pooled import projection_of
from fieldmark.params import Embed, Params
from fieldmark.pictures.views import Source, view_region
from stages import embed_tokens
from stages.embed_tokens import forward, space_needed, tokens_of
from tests.fieldmark.encoders.test_towers import register_small, save_small
from tests.project import draw, save_model, snapshot

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
# A ViT of three blocks, so that rollout is a product.
DEEP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TOKENS = {"vit": {"layers": [-2, 2], "rollout": True}, "conv": {"layers": [2, -1]}}


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("deep"), DEEP)


@pytest.fixture
def set_tokens(set_params: SetParams, deep: Path) -> SetParams:
    """set_params with a deeper `vit`, and tokens asked of `vit` and `conv`."""

    def write(tokens: dict[str, Any] = TOKENS, **blocks: dict[str, Any]) -> Params:
        blocks["encoders"] = {"vit": {"model": f"local-dir:{deep}", "batch_size": 4}} | blocks.get("encoders", {})
        return set_params(tokens=tokens, **blocks)

    return write


@pytest.fixture
def embed(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """Run index_images and embed_tokens; return how many images were embedded."""

    def run(name: str = "vit") -> int:
        run_stage("index_images")
        capsys.readouterr()
        run_stage("embed_tokens", "--encoder", name)
        return int(capsys.readouterr().out.splitlines()[-1].split(": ")[1].split()[0])

    return run


def buckets_of(name: str = "vit") -> dict[str, tuple[bytes, int]]:
    return snapshot(Path(f"data/embed/{name}/tokens"))


def contents(files: dict[str, tuple[bytes, int]]) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files.items()}


def read(name: str = "vit", buckets: int = 4) -> list[dict[str, Any]]:
    table = store.read_buckets(f"data/embed/{name}/tokens", "embed.tokens/1", buckets)
    table.validate(full=True)
    return table.to_pylist()


def test_rows_are_what_leaves_the_blocks(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    params = set_tokens(embed={"views": 1, "crops": [2]})
    assert embed() == len(dataset)
    rows = read()
    assert [(row["view"], row["layer"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)] * len(dataset)
    assert {(row["grid_h"], row["grid_w"], row["width"]) for row in rows} == {(4, 4, 32)}
    assert {len(row["vectors"]) for row in rows} == {4 * 4 * 32}

    # One picture and its second view, by the library's own forward pass.
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    visual: Any = encoder.model.visual
    found: list[torch.Tensor] = []
    maps: list[torch.Tensor] = []
    for block in visual.transformer.resblocks:
        block.register_forward_hook(lambda module, inputs, output: found.append(output))
        block.ln_1.register_forward_hook(lambda module, inputs, output: maps.append(output))
    paths = {store.sha256(Path("images", path).read_bytes()): Path("images", path) for path in dataset}
    chosen = rows[0]["image_id"]
    with Image.open(paths[chosen]) as picture:
        region, flip = view_region(chosen, 1, *picture.size)
        second = picture.crop(region)
        if flip:
            second = second.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.stack([encoder.preprocess(picture), encoder.preprocess(second)])
    with torch.inference_mode():
        visual(encoder.normalise(pixels))
    attention = [
        block.attn(inside, inside, inside, average_attn_weights=False)[1]
        for block, inside in zip(visual.transformer.resblocks, maps, strict=True)
    ]
    rollout = (attention[1] @ attention[0])[:, :, 0, 1:]
    for row in rows[:4]:
        hidden = found[row["layer"]][row["view"]].detach().numpy()
        np.testing.assert_allclose(np.reshape(row["vectors"], (16, 32)), hidden[1:], atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(row["cls"], hidden[0], atol=2e-3, rtol=2e-3)
        if row["layer"] == 1:
            expected = rollout[row["view"]].detach().numpy()
            np.testing.assert_allclose(np.reshape(row["rollout"], (2, 16)), expected, atol=1e-4)
        else:
            assert row["rollout"] is None
    # They are no unit vectors.
    assert np.linalg.norm(np.reshape(rows[0]["vectors"], (16, 32)), axis=1).min() > 1.5


@pytest.mark.parametrize("name", ["vit", "conv"])
def test_the_head_is_what_the_projection_takes(
    name: str, set_tokens: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    params = set_tokens({name: {"layers": ["head", -2]}})
    assert embed(name) == len(dataset)
    row, last = read(name)[:2]
    encoder = load_encoder(name, params.encoder(name), torch.device("cpu"))
    assert (row["layer"], last["layer"]) == {"vit": (1, 3), "conv": (3, 5)}[name]
    paths = {store.sha256(Path("images", path).read_bytes()): Path("images", path) for path in dataset}
    with Image.open(paths[last["image_id"]]) as picture:
        pooled, tokens = encoder.embed_images(encoder.preprocess(picture)[None])
    projection = projection_of(encoder)
    assert projection is not None
    cells = torch.tensor(last["vectors"]).reshape(last["grid_h"], last["grid_w"], last["width"])
    torch.testing.assert_close(torch.nn.functional.linear(cells, *projection), tokens[0], atol=2e-3, rtol=2e-3)
    if name == "vit":
        cls = torch.tensor(last["cls"])
        torch.testing.assert_close(torch.nn.functional.linear(cls, *projection), pooled[0], atol=2e-3, rtol=2e-3)
    else:
        assert last["cls"] is None


def test_stages_of_several_sizes_lie_in_one_file(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_tokens()
    assert embed("conv") == len(dataset)
    rows = read("conv")
    sizes = {(row["layer"], row["grid_h"], row["grid_w"], row["width"], len(row["vectors"])) for row in rows}
    assert sizes == {(2, 8, 8, 128, 8 * 8 * 128), (4, 2, 2, 512, 2 * 2 * 512)}
    assert {row["view"] for row in rows} == {0}
    assert all(row["cls"] is None and row["rollout"] is None for row in rows)


def test_a_tower_gives_its_tokens_too(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], tmp_path: Path
) -> None:
    register_small("swin")
    tower = {"model": "small_swin", "pretrained": str(save_small(tmp_path / "swin.safetensors", "swin"))}
    set_tokens({"swin": {"layers": [1, 2, 3]}}, towers={"swin": tower})
    assert embed("swin") == len(dataset)
    rows = read("swin")
    assert [row["layer"] for row in rows] == [1, 2, 3] * len(dataset)
    sizes = {(row["layer"], row["grid_h"], row["grid_w"], row["width"], len(row["vectors"])) for row in rows}
    assert sizes == {(1, 8, 8, 16, 1024), (2, 4, 4, 32, 512), (3, 2, 2, 64, 256)}
    assert all(row["cls"] is None and row["rollout"] is None for row in rows)
    Path("images/train/a/0.png").unlink()
    draw(Path("images/train/a/new.png"), 1000)
    assert embed("swin") == 1
    set_tokens({"swin": {"layers": [-1], "rollout": True}}, towers={"swin": tower})
    with pytest.raises(UserError, match=r"tokens\.swin\.rollout: a SwinTransformer has no CLS token"):
        embed("swin")


@pytest.mark.parametrize("name", ["vit", pytest.param("conv", marks=pytest.mark.slow)])
def test_one_image_more_embeds_one_and_changes_one_bucket(
    name: str, set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], project: Path
) -> None:
    set_tokens(embed={"views": 1})
    assert embed(name) == len(dataset)
    before = buckets_of(name)
    assert embed(name) == 0
    assert buckets_of(name) == before
    new = draw(project / "images/train/a/new.png", 1000)
    assert embed(name) == 1
    after = buckets_of(name)
    bucket = store.bucket_path("", store.bucket_of(store.sha256(new.read_bytes()), 4)).name
    assert [each for each in after if after[each] != before[each]] == [bucket]
    # As if it had been made at once.
    shutil.rmtree(project / "data/embed")
    assert embed(name) == len(dataset) + 1
    assert contents(buckets_of(name)) == contents(after)
    new.unlink()
    assert embed(name) == 0
    assert contents(buckets_of(name)) == contents(before)


def test_more_rows_than_a_row_group_are_merged_in_order(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 4 rows an image: a row group ends within one.
    monkeypatch.setattr(store, "WIDE_ROW_GROUP", 5)
    set_tokens(dataset={"buckets": 1}, embed={"views": 1})
    embed()
    path = Path("data/embed/vit/tokens/b000.parquet")
    before = path.read_bytes()
    file = pq.ParquetFile(path)
    assert file.num_row_groups == -(-4 * len(dataset) // 5)
    encodings = {
        column.path_in_schema.split(".")[0]: set(column.encodings)
        for column in map(file.metadata.row_group(0).column, range(file.metadata.num_columns))
    }
    assert not any("DICTIONARY" in each for each in encodings["vectors"])
    draw(project / "images/train/a/new.png", 1000)
    assert embed() == 1
    (project / "images/train/a/new.png").unlink()
    assert embed() == 0
    assert path.read_bytes() == before


def test_it_touches_no_node(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], run_stage: RunStage
) -> None:
    set_tokens(tokens={})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    before = snapshot(Path("data/embed/vit/images"))
    set_tokens()
    embed()
    run_stage("embed_images", "--encoder", "vit")
    assert snapshot(Path("data/embed/vit/images")) == before


def test_what_changes_a_number_embeds_all_anew(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    count = len(dataset)
    set_tokens()
    assert embed() == count
    before = contents(buckets_of())
    # The same layers in other words; what is of nodes alone.
    set_tokens({"vit": {"layers": [-1, 1], "rollout": True}}, embed={"tokens": False, "grids": [1, 2], "crops": [2]})
    assert embed() == 0
    for tokens, blocks in (
        ({"layers": [1, 2]}, {}),
        ({"layers": [1], "rollout": True}, {}),
        ({"layers": [-2, 2], "rollout": True}, {"embed": {"views": 1}}),
        ({"layers": [-2, 2], "rollout": True}, {"encoders": {"conv": {"model": "none"}}}),
    ):
        set_tokens({"vit": tokens}, **blocks)
        assert embed() == count
    assert contents(buckets_of()) == before


@pytest.mark.parametrize("name", ["vit", "conv"])
def test_company_and_order_do_not_change_bits(name: str, set_tokens: SetParams, dataset: list[str]) -> None:
    params = set_tokens(embed={"views": 1})
    encoder = load_encoder(name, params.encoder(name), torch.device("cpu"))
    product = tokens_of(encoder, LayerChoice([0, 1], 1 if name == "vit" else None), params.embed)
    sources = [Source(store.sha256(path.read_bytes()), path) for path in sorted(Path("images").glob("*/*/*.png"))[:5]]
    together = list(forward_sources(sources, [product]))
    for order in ([4], [3, 1], [4, 3, 2, 1, 0]):
        for number, (rows,) in zip(order, forward_sources([sources[i] for i in order], [product]), strict=True):
            assert store.image_of(rows) == sources[number].image_id
            assert rows.equals(together[number][0])


def test_it_says_beforehand_how_much_it_writes(
    set_tokens: SetParams,
    dataset: list[str],
    run_stage: RunStage,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_tokens(dataset={"buckets": 1}, embed={"views": 9})
    run_stage("index_images")

    def run(*arguments: str) -> list[str]:
        capsys.readouterr()
        run_stage("embed_tokens", "--encoder", "vit", *arguments)
        return capsys.readouterr().out.splitlines()

    # Two layers of 17 x 32 numbers and two heads of 16, ten views.
    each = 2 * (2 * 17 * 32 + 2 * 16) * 10
    files = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    told, head, rate, disk = run("--dry-run")
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == files
    size = re.escape(f"at most {12 * each / 1e6:.2f} MB to write, {each / 1e6:.2f} MB an image")
    assert re.fullmatch(rf"data/embed/vit/tokens: layers 1, 2; {size}; \d+ MB are free", told)
    assert head == "12 images to embed, 0 kept; 1 buckets to write"
    assert re.fullmatch(r"time: about 0:00:\d\d \(.* measured with \d+ of them\)", rate)
    assert run()[0].split("; ")[:2] == told.split("; ")[:2]
    written = Path("data/embed/vit/tokens/b000.parquet").stat().st_size
    # What Parquet says of every column is much beside so little.
    assert 0.5 * 12 * each < written < 1.2 * 12 * each
    forecast = re.fullmatch(r"on disk: about (\d+\.\d\d) MB, \d+ MB are free", disk)
    assert float(forecast[1]) == pytest.approx(written / 1e6, rel=0.1)  # type: ignore[index]
    again = run("--dry-run")
    assert "at most 0.00 MB to write" in again[0]
    assert again[1:] == ["0 images to embed, 12 kept; 0 buckets to write"]

    # One byte too few, and nothing is decoded.
    set_tokens({"vit": {"layers": [1, 2]}}, dataset={"buckets": 1}, embed={"views": 9})
    shutil.rmtree("data/embed")
    for path in project.glob("images/*/*/*"):
        path.write_bytes(b"")
    needed = 12 * 2 * 2 * 17 * 32 * 10
    monkeypatch.setattr(embed_tokens, "free_space", lambda folder: needed - 1)
    words = rf"^data/embed/vit/tokens: up to {needed / 1e6:.0f} MB are needed, and 0 MB are free; free some, or take"
    with pytest.raises(UserError, match=words):
        run()
    assert not Path("data/embed").exists()
    monkeypatch.setattr(embed_tokens, "free_space", lambda folder: needed)
    with pytest.raises(UserError, match="has changed since it was indexed"):
        run()


def test_a_bucket_lies_beside_its_former_self_while_it_is_written(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}" for number in range(3)]
    paths[0].write_bytes(b"." * 90)
    paths[1].write_bytes(b"." * 50)
    kept = [store.Kept(["a"] * 9, ["b"], False), store.Kept([], ["c"] * 6, True), store.Kept([], ["d"] * 2, True)]
    todo = list(zip(paths, kept, strict=True))
    # 100 beside 90; 60 beside 50 with 10 more than before; 20 more than 20 more.
    assert space_needed(Work(todo[:1], []), 10) == 100
    assert space_needed(Work(todo[1:], []), 10) == 60
    assert space_needed(Work(todo[2:], []), 10) == 20
    assert space_needed(Work(todo[1:] * 3, []), 10) == 60 + 2 * (10 + 20)
    assert space_needed(Work([], []), 10) == 0
    assert embed_tokens.free_space(tmp_path / "not" / "yet" / "there") > 0


def test_numbers_that_float16_cannot_hold_are_told(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], deep: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(deep, tmp_path / "large")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.transformer.resblocks.2.mlp.c_proj.bias"][3] = 1e5
    save_file(weights, folder / "open_clip_model.safetensors")
    large = {"vit": {"model": f"local-dir:{folder}"}}
    set_tokens(encoders=large)
    words = r"^image [0-9a-f]{64}: layer 2 of vit has numbers that float16 cannot hold.* out of tokens\.vit\.layers$"
    with pytest.raises(UserError, match=words):
        embed()
    assert not list(Path("data").glob("embed/**/*.p*"))
    set_tokens({"vit": {"layers": [1], "rollout": True}}, encoders=large)
    assert embed() == len(dataset)


def test_half_precision_is_near_full(set_tokens: SetParams) -> None:
    params = set_tokens()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for precision in ("fp32", "bf16"):
        settings = params.encoder("vit").model_copy(update={"precision": precision})
        encoder = load_encoder("vit", settings, torch.device("cpu"))
        outputs.append(forward(encoder, LayerChoice([1, 2], 1), pixels))
        assert tokens_of(encoder, LayerChoice([1], None), Embed()).fingerprint
    full, half = outputs
    assert [output.dtype for output in half] == [torch.float16] * 5
    assert [tuple(output.shape) for output in half] == [(3, 4, 4, 32)] * 2 + [(3, 32)] * 2 + [(3, 2, 16)]
    for one, other in zip(full, half, strict=True):
        assert torch.nn.functional.cosine_similarity(one.float(), other.float(), dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("reef", TOKENS, r"params\.yaml: neither `encoders` nor `towers` has 'reef'"),
        ("conv", {"vit": {"layers": [0]}}, r"params\.yaml: tokens\.conv: is not there, .*`tokens: \{conv: \{layers: "),
        ("vit", {"vit": {"layers": [3]}}, r"params\.yaml: tokens\.vit\.layers: 3 is not there; .* has 0 to 2, or -3"),
        ("conv", {"conv": {"layers": [-2], "rollout": True}}, r"params\.yaml: tokens\.conv\.rollout: a ResNet has no"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    name: str, tokens: dict[str, Any], words: str, set_tokens: SetParams, dataset: list[str], embed: Callable[..., int]
) -> None:
    set_tokens(tokens)
    with pytest.raises(UserError, match=f"^{words}") as error:
        embed(name)
    assert "\n" not in str(error.value)
    assert not Path("data/embed").exists()


def test_it_is_not_compiled(run_stage: RunStage) -> None:
    with pytest.raises(UserError, match=r"^--compile: .*; leave it out$"):
        run_stage("embed_tokens", "--encoder", "vit", "--compile")


def test_shards_give_what_one_process_does(
    set_tokens: SetParams, dataset: list[str], embed: Callable[..., int], run_stage: RunStage
) -> None:
    set_tokens()
    embed()
    before = contents(buckets_of())
    shutil.rmtree("data/embed")
    for rank in ("0/2", "1/2"):
        run_stage("embed_tokens", "--encoder", "vit", "--shard", rank)
    assert contents(buckets_of()) == before


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"reef": {"layers": [0]}}, r"tokens\.reef: is neither under `encoders` nor under `towers`; .* conv, vit"),
        ({"vit": {"layers": []}}, r"tokens\.vit\.layers: list should have at least 1 item"),
        ({"vit": {"layers": ["last"]}}, r"tokens\.vit\.layers\.0: input should be a layer's number or head"),
        ({"vit": {"layer": [0]}}, r"tokens\.vit\.layer: unknown key; did you mean `layers`\?"),
    ],
)  # fmt: skip
def test_what_params_cannot_say_is_one_line(tokens: dict[str, Any], words: str, set_tokens: SetParams) -> None:
    with pytest.raises(UserError, match=rf"^params\.yaml: {words}"):
        set_tokens(tokens)
