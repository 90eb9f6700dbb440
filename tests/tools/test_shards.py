"""What lies on disk for each encoder: listed as it is, and removed where params.yaml no longer names it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import Params, load_params
from tests.project import image_id, unit, write_index, write_nodes, write_texts
from tools.shards import Stored, list_parts

VECTORS = {image_id(n): unit(np.random.default_rng(n).standard_normal((3, 8))) for n in range(12)}
# What the tests' `old` and `conv` have, in the order of the list.
PLACES = ["data/embed/{}/images", "data/embed/{}/text.parquet", "data/bank/{}.parquet",
          "data/labels/{}", "data/graphs/{}"]  # fmt: skip
RunStage = Callable[..., None]


def write_bank(path: Path, mark: str) -> None:
    row = {"concept_idx": 0, "text": "a fin", "class_ids": ["a"], "kind": "visual", "vector": [1.0], "kept": True}
    store.write_table(pa.Table.from_pylist([row], schema=store.arrow_schema("bank/1", 1)), path, "bank/1", {}, mark)


def write_graphs(folder: Path, mark: str) -> None:
    for bucket, ids in enumerate(store.split_buckets(list(VECTORS), 4)):
        lists = {"src": [], "dst": [], "spatial": [], "semantic": []}
        table = store.make_table("graphs/1", [{"image_id": each, "view": 0, **lists} for each in ids])
        store.write_table(table, store.bucket_path(folder, bucket), "graphs/1", {}, mark)


@pytest.fixture
def made(set_params: Callable[..., Params]) -> None:
    """Shards of `conv`, which params.yaml names, and of `old`, which it does not."""
    set_params()
    write_index(dict.fromkeys(VECTORS, ("a", "train")))
    for name in ("conv", "old"):
        write_nodes(Path(f"data/embed/{name}/images"), VECTORS, mark=f"{name}-0123456789")
        write_texts(Path(f"data/embed/{name}/text.parquet"), {"a fin": VECTORS[image_id(0)][0]})
        write_bank(Path(f"data/bank/{name}.parquet"), f"{name}-bank")
        for folder in ("labels", "graphs"):
            write_graphs(Path(f"data/{folder}/{name}"), f"{name}-{folder}")


def parts() -> dict[str, Stored]:
    return {str(part.path): part for part in list_parts(load_params("params.yaml"))}


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("data").rglob("*")) if path.is_file()}


def test_every_part_of_every_encoder_is_listed(made: None) -> None:
    listed = parts()
    assert list(listed) == [place.format(name) for name in ("conv", "old") for place in PLACES]
    assert {part.state for part in listed.values()} == {"complete"}
    for name in ("conv", "old"):
        nodes, texts, _, _, graphs = (listed[place.format(name)] for place in PLACES)
        assert {listed[place.format(name)].named for place in PLACES} == {name == "conv"}
        assert (nodes.fingerprint, nodes.images, nodes.rows) == (f"{name}-0123456789"[:8], 12, 36)
        assert nodes.size == sum(path.stat().st_size for path in nodes.path.iterdir())
        assert (texts.images, texts.rows) == (None, 1)
        assert (graphs.images, graphs.rows) == (12, 12)


def test_each_folder_of_moments_is_a_line(made: None) -> None:
    for name in ("isqrt", "pooled"):
        write_nodes(Path(f"data/embed/conv/moments/{name}"), VECTORS)
    Path("data/embed/conv/moments/isqrt/basis.safetensors").write_bytes(b"basis")
    Path("data/embed/conv/projection.safetensors").touch()
    listed = [part for path, part in parts().items() if "moments" in path]
    assert [str(part.path) for part in listed] == [f"data/embed/conv/moments/{name}" for name in ("isqrt", "pooled")]
    assert {part.state for part in listed} == {"complete"}
    assert listed[0].size == listed[1].size + len(b"basis")


def test_a_tower_is_listed_and_kept_as_an_encoder_is(
    made: None, set_params: Callable[..., Params], run_stage: RunStage
) -> None:
    write_nodes(Path("data/embed/dino/images"), VECTORS)
    write_graphs(Path("data/graphs/dino"), "dino-graphs")
    set_params(towers={"dino": {"model": "vit_small_patch14_dinov2"}})
    own = {path: part for path, part in parts().items() if "dino" in path}
    assert list(own) == ["data/embed/dino/images", "data/graphs/dino"]
    assert all(part.named and part.state == "complete" for part in own.values())
    before = files()
    with pytest.raises(UserError, match=r"params\.yaml: towers\.dino: is in use; take it out first$"):
        run_stage("tools.shards", "--remove", "dino")
    assert files() == before
    set_params()
    run_stage("tools.shards", "--remove", "dino")
    assert files() == {path: content for path, content in before.items() if "dino" not in path}


def test_what_is_wrong_is_said(made: None, set_params: Callable[..., Params]) -> None:
    images = Path("data/embed/old/images")
    lost = len(store.read_table(store.bucket_path(images, 1), "embed.nodes/1")) // 3
    store.bucket_path(images, 1).unlink()
    assert parts()[str(images)].state == f"3 of 4 buckets, lacks {lost} images of the index"
    store.bucket_path(images, 2).write_bytes(b"PAR1")
    assert "b002.parquet is not readable" in parts()[str(images)].state
    write_nodes(images, {**VECTORS, image_id(99): VECTORS[image_id(0)]})
    assert parts()[str(images)].state == "1 images that the index does not have"
    write_nodes(Path("another"), VECTORS, mark="another")
    store.bucket_path("another", 0).replace(store.bucket_path(images, 0))
    assert "of 2 fingerprints" in parts()[str(images)].state
    Path("data/embed/old/text.parquet").write_bytes(b"")
    assert parts()["data/embed/old/text.parquet"].state == "text.parquet is not readable"
    set_params(dataset={"buckets": 3})
    assert parts()["data/labels/conv"].state == "1 files more than dataset.buckets = 3"
    Path("data/index/images.parquet").unlink()
    set_params()
    assert parts()["data/labels/conv"].state == "complete"


def test_runs_of_methods_that_are_gone_are_listed(made: None) -> None:
    for method in ("zero_shot", "gone"):
        folder = Path("data/runs", method)
        folder.mkdir(parents=True)
        (folder / "predictions.parquet").write_bytes(Path("data/bank/conv.parquet").read_bytes())
        (folder / "metrics.json").write_text("{}")
    runs = {path: part for path, part in parts().items() if path.startswith("data/runs")}
    assert list(runs) == ["data/runs/gone"]
    assert not runs["data/runs/gone"].named
    assert runs["data/runs/gone"].size == Path("data/bank/conv.parquet").stat().st_size + 2


def test_removing_takes_the_encoder_that_is_gone_and_nothing_else(
    made: None, run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    old = {path for path in before if "/old" in path}
    run_stage("tools.shards")
    size = f"{sum(len(before[path]) for path in old) / 1_000_000:.1f} MB"
    assert f"old is not in params.yaml: --remove old frees {size}" in capsys.readouterr().out
    run_stage("tools.shards", "--remove", "old")
    said = capsys.readouterr().out
    assert said.startswith(f"old: {size} removed from data")
    assert "dvc gc" in said
    assert files() == {path: content for path, content in before.items() if path not in old}
    assert not Path("data/embed/old").exists()
    run_stage("tools.shards")
    assert "old" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("conv", r"params\.yaml: encoders\.conv: is in use; take it out first"),
        ("odl", "--remove odl: nothing of it lies under data; there is: conv, old"),
        ("..", "nothing of it lies"),
        ("", "nothing of it lies"),
        ("old/images", "nothing of it lies"),
    ],
)
def test_what_must_not_be_removed_stays(name: str, said: str, made: None, run_stage: RunStage) -> None:
    before = files()
    with pytest.raises(UserError, match=said) as error:
        run_stage("tools.shards", "--remove", name)
    assert "\n" not in str(error.value)
    assert files() == before


def test_a_link_is_removed_and_not_what_it_leads_to(made: None, run_stage: RunStage) -> None:
    Path("elsewhere").mkdir()
    Path("data/embed/old").rename("elsewhere/old")
    run_stage("tools.shards", "--remove", "old")
    assert not Path("data/embed/old").is_symlink()
    assert Path("elsewhere/old/text.parquet").is_file()


def test_nothing_there_is_an_empty_list(
    set_params: Callable[..., Params], run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params()
    run_stage("tools.shards")
    assert capsys.readouterr().out.splitlines() == ["path  in params.yaml  made by  images  rows  MB  state"]
