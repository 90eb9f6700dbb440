import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.pooled import pool_batch
from fieldmark.moments import Basis, pool
from fieldmark.params import Params
from stages import pool_tokens
from tests.fieldmark.encoders.test_towers import register_small, save_small
from tests.project import ROOT, draw

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
Make = Callable[..., list[str]]
MOMENTS: dict[str, Any] = {
    "pooled": {"kind": "pooled"},
    "isqrt": {"directions": 8},
    "raw": {"kind": "bilinear", "layer": 0},
    "some": {"kind": "bilinear", "layer": 0, "directions": 4},
    "mean": {"kind": "mean", "layer": "head"},
    "max": {"kind": "max", "layer": -1},
    "projected": {"kind": "bilinear", "layer": "projected", "directions": 4},
}
# Of the tiny ViT: its width is 32, and `head` is what its projection takes.
LENGTHS = {"pooled": 32, "isqrt": 36, "raw": 528, "some": 10, "mean": 32, "max": 32, "projected": 10}
FOLDER = Path("data/embed/vit/moments")


@pytest.fixture
def set_moments(set_params: SetParams) -> SetParams:
    """set_params with moments asked of `vit`."""

    def write(moments: dict[str, Any] = MOMENTS, name: str = "vit", **blocks: dict[str, Any]) -> Params:
        return set_params(moments={name: moments}, **blocks)

    return write


@pytest.fixture
def make(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Make:
    """Run index_images and pool_tokens; return what it says."""

    def run(*arguments: str, name: str = "vit") -> list[str]:
        run_stage("index_images")
        capsys.readouterr()
        run_stage("pool_tokens", "--encoder", name, *arguments)
        return capsys.readouterr().out.splitlines()

    return run


def embedded(said: list[str]) -> dict[str, int]:
    """How many images it says to have embedded, by folder."""
    found = [re.fullmatch(r".*/moments/(\w+): (\d+) images embedded, \d+ kept", line) for line in said]
    return {each[1]: int(each[2]) for each in found if each}


def files(folder: Path = FOLDER) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of change of every file, by its path."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def contents(found: dict[str, tuple[bytes, int]]) -> dict[str, bytes]:
    return {name: content for name, (content, _) in found.items()}


def read(moment: str, name: str = "vit") -> Any:
    table = store.read_buckets(f"data/embed/{name}/moments/{moment}", "embed.moments/1", 4)
    table.validate(full=True)
    return table


def no_pass(*arguments: Any) -> Any:
    raise AssertionError("an image was decoded")


def test_rows_are_moments_of_what_the_tower_holds(set_moments: SetParams, dataset: list[str], make: Make) -> None:
    params = set_moments(embed={"views": 1, "crops": [2]})
    assert embedded(make()) == dict.fromkeys(MOMENTS, len(dataset))
    encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
    paths = {store.sha256(Path("images", path).read_bytes()): Path("images", path) for path in dataset}
    chosen = sorted(paths)[0]
    with Image.open(paths[chosen]) as picture:
        pixels = encoder.preprocess(picture)[None]
    pooled, cells = pool_batch(encoder, pixels, [0, 1, 2, 3])
    tokens = dict(enumerate(each.flatten(1, 2) for each in cells))
    layers = {"pooled": None, "isqrt": 1, "raw": 0, "some": 0, "mean": 2, "max": 1, "projected": 3}
    for name, layer in layers.items():
        table = read(name)
        kind = MOMENTS[name].get("kind", "isqrt")
        rows = table.to_pylist()
        assert len(rows) == 2 * len(dataset)
        assert {(row["view"], row["layer"], row["kind"]) for row in rows} == {(0, layer, kind), (1, layer, kind)}
        assert store.vectors_of(table).shape[1] == LENGTHS[name]
        vectors = {(row["image_id"], row["view"]): row["vector"] for row in rows}
        path = FOLDER / name / "basis.safetensors"
        assert path.exists() == ("directions" in MOMENTS[name])
        basis = Basis(**load_file(path)) if path.exists() else None
        # In a batch of its own it has the same bits.
        expected = pooled if layer is None else pool(kind, tokens[layer], basis)
        np.testing.assert_array_equal(np.array(vectors[chosen, 0], dtype=np.float16), expected[0].half().numpy())
        assert vectors[chosen, 1] != vectors[chosen, 0]


def test_the_projection_leads_to_the_global_embedding(
    set_moments: SetParams, dataset: list[str], make: Make, run_stage: RunStage, tmp_path: Path
) -> None:
    register_small("swin")
    tower = {"model": "small_swin", "pretrained": str(save_small(tmp_path / "swin.safetensors", "swin"))}
    for name in ("conv", "vit"):
        set_moments({"pooled": MOMENTS["pooled"]}, name)
        make(name=name)
        run_stage("embed_images", "--encoder", name)
        nodes = store.read_buckets(f"data/embed/{name}/images", "embed.nodes/1", 4)
        nodes = nodes.filter((nodes["kind"].to_numpy() == "global").tolist())
        projection = load_file(f"data/embed/{name}/projection.safetensors")
        pooled = torch.tensor(store.vectors_of(read("pooled", name)).astype(np.float32))
        found = pooled @ projection["weight"].T + projection.get("bias", torch.zeros(1))
        cosines = torch.nn.functional.cosine_similarity(found, torch.tensor(store.vectors_of(nodes).astype(np.float32)))
        assert float(cosines.min()) > 0.9999
    set_moments({"pooled": MOMENTS["pooled"]}, "swin", towers={"swin": tower})
    make(name="swin")
    assert load_file("data/embed/swin/projection.safetensors") == {}
    # The third machine has the same bytes, and the second run leaves the file alone.
    before = Path("data/embed/swin/projection.safetensors").stat().st_mtime_ns
    make(name="swin")
    assert Path("data/embed/swin/projection.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["vit", pytest.param("conv", marks=pytest.mark.slow)])
def test_one_image_more_changes_one_bucket_of_each_folder(
    name: str, set_moments: SetParams, dataset: list[str], make: Make, project: Path
) -> None:
    folder = Path(f"data/embed/{name}")
    set_moments(name=name, embed={"views": 1})
    make(name=name)
    before = files(folder)
    assert set(embedded(make(name=name)).values()) == {0}
    assert files(folder) == before
    # Training images, on which a basis would be fitted anew: it does not move.
    for seed in (1000, 1001):
        new = draw(project / "images/train/a/new.png", seed)
        assert embedded(make(name=name)) == dict.fromkeys(MOMENTS, 1)
        after = files(folder)
        bucket = store.bucket_path("", store.bucket_of(store.sha256(new.read_bytes()), 4)).name
        changed = {each for each in after if after[each] != before[each]}
        assert changed == {f"moments/{each}/{bucket}" for each in MOMENTS}
        new.unlink()
        assert set(embedded(make(name=name)).values()) == {0}
        assert contents(files(folder)) == contents(before)
        before = files(folder)


@pytest.mark.slow
def test_a_basis_is_kept_until_what_it_stands_for_changes(
    set_moments: SetParams, dataset: list[str], make: Make, project: Path
) -> None:
    path = FOLDER / "isqrt/basis.safetensors"
    set_moments()
    make()
    before = files()
    kept = path.read_bytes()
    for seed in range(4):
        draw(project / f"images/train/b/new{seed}.png", 2000 + seed)
    make()
    assert path.read_bytes() == kept
    # The same sample gives the same basis; another sample another one, and then every row along it is made again.
    assert embedded(make("--refit")) == {name: 16 if "directions" in MOMENTS[name] else 0 for name in MOMENTS}
    assert path.read_bytes() != kept
    again = files()
    assert set(embedded(make("--refit")).values()) == {0}
    assert files() == again
    for change in ({"directions": 7}, {"directions": 8, "layer": 0}):
        set_moments(MOMENTS | {"isqrt": change})
        found = embedded(make())
        assert {name for name, count in found.items() if count} == {"isqrt"}
        assert path.read_bytes() != kept
    # Numbered from the end or from the front, a layer is the same.
    set_moments(MOMENTS | {"isqrt": {"directions": 8, "layer": -2}})
    assert set(embedded(make()).values()) == {0}
    for image in (project / "images/train/b").glob("new*"):
        image.unlink()
    set_moments()
    make("--refit")
    assert contents(files()) == contents(before)


def test_a_name_more_or_less_leaves_the_others_alone(set_moments: SetParams, dataset: list[str], make: Make) -> None:
    set_moments({name: MOMENTS[name] for name in ("pooled", "isqrt")})
    make()
    before = files()
    set_moments()
    assert {name for name, count in embedded(make()).items() if count} == MOMENTS.keys() - {"pooled", "isqrt"}
    assert {name: file for name, file in files().items() if name in before} == before
    set_moments({"pooled": MOMENTS["pooled"], "isqrt": {"kind": "mean"}})
    make()
    left = files()
    assert {Path(name).parts[0] for name in left} == {"pooled", "isqrt"}
    assert "isqrt/basis.safetensors" not in left
    assert {name: file for name, file in left.items() if "pooled" in name} == {
        name: file for name, file in before.items() if "pooled" in name
    }


def test_one_pass_makes_them_all(
    set_moments: SetParams, dataset: list[str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    def counted(encoder: ImageEncoder, pixels: Tensor, layers: list[int]) -> Any:
        shown.append(len(pixels))
        return pool_batch(encoder, pixels, layers)

    monkeypatch.setattr(pool_tokens, "pool_batch", counted)
    set_moments()
    make()
    # A blank picture, six training images for the basis, and all twelve.
    assert sum(shown) == 1 + 6 + len(dataset)
    shown.clear()
    shutil.rmtree(FOLDER / "max")
    make()
    assert sum(shown) == 1 + len(dataset)


def test_stored_tokens_give_the_same_bits(
    set_moments: SetParams,
    dataset: list[str],
    make: Make,
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
    project: Path,
) -> None:
    tokens = {"vit": {"layers": [0, -1, "head"]}}
    stored = {name: moment for name, moment in MOMENTS.items() if name != "projected"}
    set_moments(stored, tokens=tokens, embed={"views": 1})
    make()
    before = files()
    run_stage("embed_tokens", "--encoder", "vit")
    for name in stored.keys() - {"pooled"}:
        shutil.rmtree(FOLDER / name)
    with monkeypatch.context() as patch:
        patch.setattr("fieldmark.encoders.passes.prepare", no_pass)
        said = make()
        assert embedded(said) == {name: 0 if name == "pooled" else len(dataset) for name in stored}
        assert contents(files()) == contents(before)
        # The pooled vector is not among them.
        shutil.rmtree(FOLDER / "pooled")
        with pytest.raises(AssertionError, match="decoded"):
            make()
    # Nor is a new image.
    make()
    new = draw(project / "images/train/a/new.png", 1000)
    assert embedded(make()) == dict.fromkeys(stored, 1)
    new.unlink()
    assert embedded(make()) == dict.fromkeys(stored, 0)
    assert contents(files()) == contents(before)
    # Tokens of other views are none of these.
    set_moments(stored, tokens=tokens, embed={"views": 0})
    with monkeypatch.context() as patch:
        patch.setattr("fieldmark.encoders.passes.prepare", no_pass)
        with pytest.raises(AssertionError, match="decoded"):
            make()


def test_shards_give_what_one_process_does(set_moments: SetParams, dataset: list[str], make: Make) -> None:
    set_moments()
    make()
    before = contents(files())
    shutil.rmtree(FOLDER)
    for rank in ("1/2", "0/2"):
        make("--shard", rank)
    assert contents(files()) == before


@pytest.mark.slow
def test_several_devices_start_from_one_basis(
    set_moments: SetParams, dataset: list[str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_moments()
    make()
    before = contents(files())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for path in FOLDER.glob("*/b*"):
        path.unlink()
    make("--device", "cpu,cpu", "--refit")
    assert contents(files()) == before


def test_it_says_beforehand_what_it_would_do(
    set_moments: SetParams, dataset: list[str], make: Make, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The search for a batch size stops at the second one, each tried once.
    monkeypatch.setattr("fieldmark.encoders.passes.TIMED_SECONDS", 0)
    monkeypatch.setattr("fieldmark.encoders.passes.MIN_SPEEDUP", 1e9)
    set_moments()
    make()
    shutil.rmtree(FOLDER)

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (project / "data/embed").rglob("*")}

    before = state()
    said, first, head, rate, disk = make("--dry-run")
    assert said == f"{FOLDER}: numbers a vector: " + ", ".join(f"{name} {LENGTHS[name]}" for name in MOMENTS)
    assert first == "first of all 6 training images more, for the directions of isqrt, some, projected"
    assert head == "12 images to embed, 0 kept; 28 buckets to write"
    assert re.fullmatch(r"time: about 0:00:\d\d \(.* measured with \d+ of them\)", rate)
    assert re.fullmatch(r"on disk: about 0\.\d\d MB, \d+ MB are free", disk)
    assert make("--find-batch-size")[0].split() == ["batch_size", "images/s"]
    assert state() == before
    make()
    before = state()
    assert make("--dry-run")[1:] == ["0 images to embed, 12 kept; 0 buckets to write"]
    assert make("--dry-run", "--refit")[1].startswith("first of all 6 training images more")
    assert state() == before


def test_numbers_that_float16_cannot_hold_are_told(
    set_moments: SetParams, dataset: list[str], make: Make, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["vit"], tmp_path / "large")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.transformer.resblocks.1.mlp.c_proj.bias"][3] = 1e5
    save_file(weights, folder / "open_clip_model.safetensors")
    large = {"vit": {"model": f"local-dir:{folder}", "batch_size": 4}}
    words = r"max of layer 1 of vit has numbers that float16 cannot hold, or .*; .* take max out of moments\.vit$"
    set_moments({"max": {"kind": "max"}}, encoders=large)
    with pytest.raises(UserError, match=rf"^image [0-9a-f]{{64}}: {words}"):
        make()
    assert not list(FOLDER.rglob("*.p*"))
    # What comes of a layer below is as good as ever.
    set_moments({"max": {"kind": "max", "layer": 0}}, encoders=large)
    assert embedded(make()) == {"max": len(dataset)}


@pytest.mark.parametrize(
    ("name", "moments", "words"),
    [
        ("reef", MOMENTS, r"params\.yaml: neither `encoders` nor `towers` has 'reef'"),
        ("conv", MOMENTS, r"params\.yaml: moments\.conv: is not there, .*`moments: \{conv: \{pooled: \{kind: pooled"),
        ("vit", {"max": {"kind": "max", "layer": 2}}, r"params\.yaml: moments\.vit\.max\.layer: 2 is not there; "),
        ("vit", {"isqrt": {}}, r"params\.yaml: moments\.vit\.isqrt\.directions: 128 are more than the 32 numbers of a"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    name: str, moments: dict[str, Any], words: str, set_moments: SetParams, dataset: list[str], make: Make
) -> None:
    set_moments(moments)
    with pytest.raises(UserError, match=f"^{words}") as error:
        make(name=name)
    assert "\n" not in str(error.value)
    assert not Path("data/embed").exists()


def test_directions_need_training_images(
    set_moments: SetParams, dataset: list[str], make: Make, run_stage: RunStage
) -> None:
    set_moments({"pooled": MOMENTS["pooled"], "mean": MOMENTS["mean"]})
    make()
    index = Path("data/index/images.parquet")
    rows = [row | {"split": "test"} for row in store.read_table(index, "index.images/1").to_pylist()]
    store.write_table(store.make_table("index.images/1", rows), index, "index.images/1", {}, "index")
    run_stage("pool_tokens", "--encoder", "vit")
    set_moments()
    with pytest.raises(UserError, match=r"^data/index/images\.parquet: has no training image to fit directions on; "):
        run_stage("pool_tokens", "--encoder", "vit")


def test_a_broken_basis_is_told(set_moments: SetParams, dataset: list[str], make: Make) -> None:
    set_moments()
    make()
    path = FOLDER / "isqrt/basis.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"^{path}: is not readable \(.*\); remove it and run pool_tokens, or"):
        make()


def test_it_is_not_compiled(run_stage: RunStage) -> None:
    with pytest.raises(UserError, match=r"^--compile: .*; leave it out$"):
        run_stage("pool_tokens", "--encoder", "vit", "--compile")


# Runs the stage again and again, each time in a process of its own that dies by SIGKILL where it would rename its
# second file; says each time which files are there, and ends when a run lives.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from stages import pool_tokens

def replace(*paths):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)

rename, os.replace = os.replace, replace
code = 1
while code:
    process = os.fork()
    if process == 0:
        left = 1
        sys.argv = ["pool_tokens", "--encoder", "vit"]
        pool_tokens.main()
        sys.stdout.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(code, *sorted(map(str, Path("data/embed").rglob("*.[ps]*"))), flush=True)
"""


@pytest.mark.slow
def test_killed_at_every_rename_it_goes_on_where_it_was(set_moments: SetParams, dataset: list[str], make: Make) -> None:
    set_moments({name: MOMENTS[name] for name in ("pooled", "isqrt")}, dataset={"buckets": 2})
    make()
    folder = Path("data/embed/vit")
    before = files(folder)
    shutil.rmtree("data/embed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    runs = [line.split() for line in done.stdout.splitlines() if line.startswith(("-9", "0 "))]
    # The projection, the basis, and two buckets of two folders, one more each time.
    assert [code for code, *_ in runs] == ["-9"] * (len(before) - 1) + ["0"]
    for count, (_, *found) in enumerate(runs, 1):
        whole = [path for path in found if not path.endswith(".partial")]
        assert len(whole) == min(count, len(before))
        assert len(found) - len(whole) <= 2
    assert contents(files(folder)) == contents(before)
