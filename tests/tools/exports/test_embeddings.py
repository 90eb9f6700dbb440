"""Embeddings exported for other tools: what comes back is what was there, and equal inputs give equal bytes."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params
from tests.project import ROOT, image_id, unit, write_index, write_nodes
from tools.exports import embeddings

IMAGES = Path("data/embed/conv/images")
KINDS = ["global", "token", "grid"]
BOXES = [(0, 0, 1, 1), (0.1, 0, 0.5, 0.5), (0.5, 0.5, 1, 0.9)]
SPLITS = ("train", "val", "test")
VECTORS = {
    image_id(n): unit(np.random.default_rng(n).standard_normal((3, 8))).astype(np.float16) for n in range(9)
}
Row = dict[str, Any]
Export = Callable[..., None]


@pytest.fixture
def made(set_params: Callable[..., Params]) -> list[Row]:
    """Nine images of two classes in three splits; the index's usable rows, sorted by path."""
    set_params()
    write_nodes(IMAGES, VECTORS, kinds=KINDS, boxes=BOXES)
    write_index({each: ("ba"[n % 2], SPLITS[n % 3]) for n, each in enumerate(VECTORS)})
    index = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    broken = {**index[0], "path": "broken.png", "image_id": None, "status": "broken"}
    table = store.make_table("index.images/1", [*index, broken])
    store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "index")
    classes = [{"class_id": name, "name": name.upper(), "from_images": True} for name in "ab"]
    table = store.make_table("index.classes/2", classes)
    store.write_table(table, "data/index/classes.parquet", "index.classes/2", {}, "classes")
    for bucket, ids in enumerate(store.split_buckets(list(VECTORS), 4)):
        thumbs = store.make_table("thumbs/1", [{"image_id": each, "webp": each[:9].encode()} for each in ids])
        store.write_table(thumbs, store.bucket_path("data/thumbs", bucket), "thumbs/1", {}, "thumbs")
    return index


@pytest.fixture
def export(run_stage: Callable[..., None]) -> Export:
    def run(to: str, out: str, *more: str) -> None:
        run_stage("tools.export", "--encoder", "conv", "--to", to, out, *more)

    return run


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """The samples of a shard, as WebDataset groups them: neighbours whose names agree up to the first dot."""
    samples: dict[str, dict[str, bytes]] = {}
    last = None
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            assert key == last or key not in samples
            last = key
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
            content = tar.extractfile(member)
            assert content is not None
            samples.setdefault(key, {})[extension] = content.read()
    return samples


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_safetensors_hold_what_the_buckets_hold(made: list[Row], export: Export) -> None:
    export("safetensors", "out/x.safetensors")
    with safe_open("out/x.safetensors", "np") as file:
        about = json.loads(file.metadata()["fieldmark"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert about["paths"] == [row["path"] for row in made]
    assert (about["classes"], about["names"], about["splits"]) == (["a", "b"], ["A", "B"], list(SPLITS))
    assert about["fingerprints"] == {
        "data/embed/conv/images": "embed",
        "data/index/images.parquet": "index",
        "data/index/classes.parquet": "classes",
    }
    assert (about["encoder"], about["view"], about["params"]) == ("conv", 0, {"encoder": "one"})
    assert tensors["vectors"].dtype == np.float16
    np.testing.assert_array_equal(tensors["vectors"], np.stack([VECTORS[row["image_id"]] for row in made]))
    np.testing.assert_array_equal(tensors["boxes"], np.broadcast_to(np.float32(BOXES), (9, 3, 4)))
    assert (tensors["norms"] == 1).all()
    assert [[about["kinds"][code] for code in codes] for codes in tensors["kinds"]] == [KINDS] * 9
    assert [about["classes"][y] for y in tensors["y"]] == [row["class_id"] for row in made]
    assert [about["splits"][code] for code in tensors["split"]] == [row["split"] for row in made]
    assert [bytes(digest).hex() for digest in tensors["image_id"]] == [row["image_id"] for row in made]


def test_shards_hold_what_the_buckets_hold(made: list[Row], export: Export) -> None:
    export("webdataset", "out/shards", "--thumbs")
    by_id = {row["image_id"]: row for row in made}
    assert set(contents("out/shards")) == {
        "dataset.json", *(f"{split}-{bucket:03d}.tar" for split in SPLITS for bucket in range(4))
    }  # fmt: skip
    found = {}
    for split in SPLITS:
        for bucket in range(4):
            samples = read_tar(Path(f"out/shards/{split}-{bucket:03d}.tar"))
            assert list(samples) == sorted(samples)
            assert {store.bucket_of(key, 4) for key in samples} <= {bucket}
            assert {by_id[key]["split"] for key in samples} <= {split}
            found.update(samples)
    assert set(found) == set(VECTORS)
    for key, sample in found.items():
        array = np.load(io.BytesIO(sample["npy"]))
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, VECTORS[key])
        about, row = json.loads(sample["json"]), by_id[key]
        assert {name: about[name] for name in ("path", "class_id", "split")} == {
            name: row[name] for name in ("path", "class_id", "split")
        }
        assert (about["y"], about["kinds"], about["norms"]) == ("ab".index(row["class_id"]), KINDS, [1.0] * 3)
        np.testing.assert_array_equal(np.float32(about["boxes"]), np.float32(BOXES))
        assert sample["webp"] == key[:9].encode()
    dataset = json.loads(Path("out/shards/dataset.json").read_text())
    assert dataset["classes"] == ["a", "b"]
    assert "paths" not in dataset


def test_webdataset_reads_the_shards(made: list[Row], export: Export) -> None:
    webdataset = pytest.importorskip("webdataset")
    export("webdataset", "shards")
    samples = list(webdataset.WebDataset("shards/train-{000..003}.tar", shardshuffle=False).decode())
    assert {sample["__key__"] for sample in samples} == {row["image_id"] for row in made if row["split"] == "train"}
    np.testing.assert_array_equal(samples[0]["npy"], VECTORS[samples[0]["__key__"]])


def test_thumbnails_only_where_asked(made: list[Row], export: Export) -> None:
    export("webdataset", "shards")
    assert {tuple(sample) for path in Path("shards").glob("*.tar") for sample in read_tar(path).values()} == {
        ("npy", "json")
    }


def test_equal_inputs_equal_bytes(made: list[Row], export: Export, project: Path) -> None:
    """In this process and in others, whose hashes are salted otherwise; and over an export that is there already."""
    export("safetensors", "x.safetensors")
    export("webdataset", "shards", "--thumbs")
    first, shards = Path("x.safetensors").read_bytes(), contents("shards")
    export("safetensors", "x.safetensors")
    export("webdataset", "shards", "--thumbs")
    assert (Path("x.safetensors").read_bytes(), contents("shards")) == (first, shards)
    words = [sys.executable, "-m", "tools.export", "--encoder", "conv", "--to"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([*words, "safetensors", "y.safetensors"], check=True, env=env, capture_output=True)
    assert Path("y.safetensors").read_bytes() == first


def test_images_with_fewer_nodes_are_padded(made: list[Row], export: Export) -> None:
    short = next(iter(VECTORS))
    write_nodes(IMAGES, {**VECTORS, short: VECTORS[short][:2]}, kinds=KINDS, boxes=BOXES)
    export("safetensors", "x.safetensors")
    export("webdataset", "shards")
    with safe_open("x.safetensors", "np") as file:
        vectors, kinds = file.get_tensor("vectors"), file.get_tensor("kinds")
    place = [row["image_id"] for row in made].index(short)
    assert kinds[place, 2] == -1
    assert not vectors[place, 2].any()
    assert (np.delete(kinds, place, axis=0) >= 0).all()
    samples = {key: files for path in Path("shards").glob("*.tar") for key, files in read_tar(path).items()}
    assert np.load(io.BytesIO(samples[short]["npy"])).shape == (2, 8)


def test_another_view(
    set_params: Callable[..., Params], dataset: list[str], run_stage: Callable[..., None], export: Export
) -> None:
    """Of real embeddings, augmented views too."""
    set_params(embed={"views": 1})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "conv")
    export("safetensors", "0.safetensors")
    export("safetensors", "1.safetensors", "--view", "1")
    arrays = []
    for view in "01":
        with safe_open(f"{view}.safetensors", "np") as file:
            arrays.append((file.get_tensor("vectors"), file.get_tensor("image_id")))
    for view, (vectors, digests) in enumerate(arrays):
        assert vectors.shape == (12, 9, 16)
        for vector, digest in zip(vectors, digests, strict=True):
            each = bytes(digest).hex()
            path = store.bucket_path(IMAGES, store.bucket_of(each, 4))
            rows = [row for row in store.read_images(path, "embed.nodes/1", [each]).to_pylist() if row["view"] == view]
            np.testing.assert_array_equal(vector, np.float16([row["vector"] for row in rows]))
    with pytest.raises(UserError, match=r"--view 2: data/embed/conv/images holds 2 \(0 is the first\)"):
        export("safetensors", "2.safetensors", "--view", "2")
    assert not Path("2.safetensors").exists()


def test_what_is_missing_is_one_line(made: list[Row], export: Export, run_stage: Callable[..., None]) -> None:
    def refused(match: str, *words: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            export(*words)
        assert "\n" not in str(error.value)

    with pytest.raises(UserError, match=r"has 'none'; choose one of"):
        run_stage("tools.export", "--encoder", "none", "--to", "safetensors", "x")
    with pytest.raises(UserError, match=r"data/embed/vit/images/b000\.parquet: is missing"):
        run_stage("tools.export", "--encoder", "vit", "--to", "safetensors", "x")
    Path("folder").mkdir()
    refused("folder: is a folder; name a file", "safetensors", "folder")
    Path("folder/other.tar").touch()
    refused(r"folder: holds other\.tar, which this export does not write", "webdataset", "folder")
    refused(r"folder/other\.tar: is a file; name a folder", "webdataset", "folder/other.tar")
    refused(r"folder/other\.tar/x: cannot be written: \w", "safetensors", "folder/other.tar/x")
    assert [path.name for path in Path("folder").iterdir()] == ["other.tar"]
    thumb = store.bucket_path("data/thumbs", store.bucket_of(made[0]["image_id"], 4))
    nodes = store.bucket_path(IMAGES, store.bucket_of(made[0]["image_id"], 4))
    thumb.unlink()
    refused(rf"{thumb}: is missing", "webdataset", "shards", "--thumbs")
    whole = nodes.read_bytes()
    nodes.write_bytes(whole[:-20])
    refused(rf"{nodes}: is not readable Parquet", "safetensors", "x")
    write_nodes(IMAGES, {key: value for key, value in VECTORS.items() if key != made[0]["image_id"]}, kinds=KINDS)
    refused(rf"{nodes}: lacks image {made[0]['image_id']} \(view 0\); run embed_images", "safetensors", "x")
    Path("data/index/images.parquet").unlink()
    refused(r"data/index/images\.parquet: is missing", "webdataset", "shards")


def test_a_header_that_no_reader_takes_is_told(
    made: list[Row], export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors reads no header over 100 MB, which the paths of a million images are."""
    monkeypatch.setattr(embeddings, "SCHEMA", "x" * 100_000_001)
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be written .*; .* export --to webdataset"):
        export("safetensors", "x.safetensors")
    assert not Path("x.safetensors").exists()


def test_thumbnails_in_safetensors_are_refused(
    made: list[Row], export: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        export("safetensors", "x", "--thumbs")
    assert stop.value.code == 2
    assert "--thumbs goes with --to webdataset" in capsys.readouterr().err
