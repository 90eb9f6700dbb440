import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from fieldmark.command import UserError
from fieldmark.store import COLUMNS, bucket_path, read_buckets, read_header, read_table, sha256, vectors_of, write_table
from tests.training.cache import ALL, ENCODER, Plan, write_cache, write_other
from training.data import Cache, part_kinds, read_cache
from training.data.bank import Bank
from training.data.labels import Labels
from training.data.nodes import Nodes

PLAN = Plan(classes=3, train=5, val=2, test=2, nodes=6, dimension=8, views=2, sentences=3, rings=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder, PLAN)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "data"))


def test_every_value_arrives_where_the_files_have_it(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, ALL)
    nodes = read_buckets(folder / f"embed/{ENCODER}/images", "embed.nodes/1", PLAN.buckets)
    labels = read_buckets(folder / f"labels/{ENCODER}", "labels/1", PLAN.buckets)
    graphs = read_buckets(folder / f"graphs/{ENCODER}", "graphs/1", PLAN.buckets)
    assert cache.paths == sorted(cache.paths)
    assert "train/broken.png" not in cache.paths
    assert cache.views == 2
    assert len(cache.images("train")) == 15
    images = torch.arange(len(cache.paths))
    for view in (0, 1):
        batch = cache.batch(images, torch.full_like(images, view))
        for image, path in enumerate(cache.paths):
            assert cache.classes[int(batch.y[image])] == path.split("/")[1]
            own = pc.and_(pc.equal(nodes["image_id"], sha256(path)), pc.equal(nodes["view"], view))
            rows, labelled = nodes.filter(own), labels.filter(own)
            count = rows.num_rows
            assert batch.mask[image].tolist() == [True] * count + [False] * (batch.mask.shape[1] - count)
            np.testing.assert_array_equal(batch.nodes[image, :count], vectors_of(rows).astype(np.float32))
            np.testing.assert_array_equal(batch.box[image, : count - 1, 2], rows["x1"].to_numpy()[1:])
            for node, (concepts, weights) in enumerate(
                zip(labelled["concept_idx"].to_pylist(), labelled["concept_weight"].to_pylist(), strict=True)
            ):
                assert batch.concept_idx[image, node].tolist() == concepts
                np.testing.assert_array_equal(batch.concept_weight[image, node], np.array(weights, np.float32))
            assert batch.selected[image, :count].tolist() == labelled["selected"].to_pylist()
            np.testing.assert_array_equal(batch.density[image, :count], labelled["density"].to_numpy())
            np.testing.assert_array_equal(
                batch.ring_gains[image], np.array(labelled["ring_gains"].to_pylist()[0], np.float32)
            )
            shown = labelled["selected_concepts"].to_pylist()[0]
            assert batch.selected_concepts[image].tolist() == shown + [-1] * (PLAN.shown - len(shown))
            graph = graphs.filter(
                pc.and_(pc.equal(graphs["image_id"], sha256(path)), pc.equal(graphs["view"], view))
            ).to_pylist()[0]
            dense = np.zeros(batch.adjacency.shape[1:], np.float32)
            for source, target, spatial, semantic in zip(
                *(graph[name] for name in ("src", "dst", "spatial", "semantic")), strict=True
            ):
                dense[source, target] = spatial, semantic
            np.testing.assert_array_equal(batch.adjacency[image], dense)
    assert torch.equal(batch.adjacency, batch.adjacency.transpose(1, 2))


def test_vectors_that_do_not_fit_into_memory_stay_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, images = read_cache(folder, ENCODER, PLAN.buckets, ALL), torch.arange(20)
    files = sorted(folder.rglob("*"))
    made: list[np.ndarray] = []

    def memmap(*given: Any, **named: Any) -> np.ndarray:
        made.append(np_memmap(*given, **named))
        return made[-1]

    np_memmap = np.memmap
    monkeypatch.setattr(np, "memmap", memmap)
    monkeypatch.setattr("training.data.rows.MEMORY_SHARE", 0.0)
    streamed = read_cache(folder, ENCODER, PLAN.buckets, ALL)
    assert streamed.part(Nodes).nodes.data_ptr() == made[0].ctypes.data
    assert torch.equal(streamed.batch(images).nodes, held.batch(images).nodes)
    assert sorted(folder.rglob("*")) == files


def test_descriptions_come_in_the_order_of_their_rank(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, ALL)
    batch = cache.batch(torch.arange(len(cache.paths)))
    described = cache.paths.index("train/class-00/0000.png")
    assert batch.dm.sum(1).nonzero().flatten().tolist() == [described]
    assert batch.d.shape[1] == 3
    texts = read_table(folder / f"embed/{ENCODER}/text.parquet", "embed.text/1")
    vectors = dict(zip(texts["text"].to_pylist(), vectors_of(texts).astype(np.float32), strict=True))
    for rank in range(3):
        np.testing.assert_array_equal(batch.d[described, rank], vectors[f"sentence {rank}"])


def test_bank_knows_owners_and_names(folder: Path) -> None:
    bank = read_cache(folder, ENCODER, PLAN.buckets, ALL).part(Bank)
    assert bank.own.sum(0).tolist() == [6, 5, 5]
    assert int(bank.of_kind("name").sum()) == 6
    assert not (bank.of_kind("name") & bank.kept).any()
    assert not bank.own[bank.of_kind("generic")].any()


def test_no_description_leaves_no_sentence(planted: Callable[[Plan], Cache]) -> None:
    batch = planted(Plan()).batch(torch.arange(3))
    assert batch.d.shape == (3, 0, 32)
    assert batch.dm.shape == (3, 0)


def test_no_ring_gains_and_no_concepts_leave_none(planted: Callable[[Plan], Cache]) -> None:
    batch = planted(Plan(shown=0)).batch(torch.arange(3))
    assert batch.ring_gains.shape == (3, 0)
    assert batch.selected_concepts.shape == (3, 0)


def remark(path: Path, params: dict[str, str] | None = None, mark: str | None = None) -> None:
    """Write a table again with other params or another fingerprint."""
    metadata = pq.read_schema(path).metadata
    schema = metadata[b"schema"].decode()
    write_table(read_table(path, schema), path, schema, params or {}, mark or metadata[b"fingerprint"].decode())


def drop_first(path: Path) -> None:
    """Take the first image's rows out of a table."""
    metadata = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
    table = pq.read_table(path)
    kept = table.filter(pc.not_equal(table["image_id"], table["image_id"][0])).replace_schema_metadata(metadata)
    pq.write_table(kept, path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("labels", r"labels/tiny: was not made from .*embed/tiny/images.*run label_patches"),
        ("graphs", r"graphs/tiny: was not made from .*embed/tiny/images.*run build_graphs"),
        ("bank", r"bank/tiny.parquet: was not made from .*run select_concepts"),
    ],
)
def test_files_of_another_encoder_are_refused(copy: Path, name: str, message: str) -> None:
    if name == "bank":
        remark(copy / f"bank/{ENCODER}.parquet", {"embed": "another"})
    else:
        for bucket in range(PLAN.buckets):
            remark(bucket_path(copy / f"{name}/{ENCODER}", bucket), {"embed": "another"})
    with pytest.raises(UserError, match=message):
        read_cache(copy, ENCODER, PLAN.buckets, ALL)


def test_labels_of_a_former_bank_are_refused(copy: Path) -> None:
    path = copy / f"bank/{ENCODER}.parquet"
    origins = {
        "embed": read_fingerprint(bucket_path(copy / f"embed/{ENCODER}/images", 0)),
        "text": read_fingerprint(copy / f"embed/{ENCODER}/text.parquet"),
    }
    remark(path, origins, "a newer bank")
    with pytest.raises(UserError, match=r"labels/tiny: was not made from .*bank/tiny.parquet.*run label_patches"):
        read_cache(copy, ENCODER, PLAN.buckets, ALL)


def read_fingerprint(path: Path) -> str:
    return pq.read_schema(path).metadata[b"fingerprint"].decode()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (f"embed/{ENCODER}/images", "embed_images"),
        (f"labels/{ENCODER}", "label_patches"),
        (f"graphs/{ENCODER}", "build_graphs"),
    ],
)
def test_a_missing_image_names_bucket_and_stage(copy: Path, name: str, stage: str) -> None:
    path = bucket_path(copy / name, 1)
    drop_first(path)
    with pytest.raises(UserError, match=rf"b001.parquet: lacks image [0-9a-f]{{64}} \(view 0\); run {stage}"):
        read_cache(copy, ENCODER, PLAN.buckets, ALL)


def test_a_corrupt_or_missing_bucket_is_one_line(copy: Path) -> None:
    path = bucket_path(copy / f"graphs/{ENCODER}", 2)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"b002\.parquet: is not readable Parquet"):
        read_cache(copy, ENCODER, PLAN.buckets, ALL)
    path.unlink()
    with pytest.raises(UserError, match=r"b002\.parquet: is missing"):
        read_cache(copy, ENCODER, PLAN.buckets, ALL)


def test_nodes_of_other_encoders_stand_beside_its_own(copy: Path) -> None:
    write_other(copy, "wide", 12)
    write_other(copy, "narrow", 5, seed=1)
    cache = read_cache(copy, ENCODER, 3, ALL, ["wide", "narrow"], {"nodes"})
    shape = cache.part(Nodes).mask.shape
    assert [tuple(parts.part(Nodes).nodes.shape) for parts in cache.also] == [(*shape, 12), (*shape, 5)]
    own = read_cache(copy, ENCODER, 3, ALL)
    assert torch.equal(cache.part(Nodes).nodes, own.part(Nodes).nodes)
    assert cache.fingerprints.keys() - own.fingerprints.keys() == {"embed/wide/images", "embed/narrow/images"}
    assert own.also == ()

    table = read_buckets(copy / "embed/narrow/images", "embed.nodes/1", 3)
    image = table.filter((pc.field("image_id") == sha256(cache.paths[4])) & (pc.field("view") == 1)).sort_by("node")
    batch = cache.batch(torch.tensor([4]), torch.tensor([1]))
    assert [other.nodes.dtype for other in batch.also] == [torch.float32, torch.float32]
    assert np.array_equal(batch.also[1].nodes[0, : len(image)].numpy(), vectors_of(image).astype(np.float32))
    assert not batch.also[1].nodes[0, len(image) :].any()


def test_nodes_at_other_places_cannot_stand_beside(copy: Path) -> None:
    write_other(copy, "moved", 8)
    path = bucket_path(copy / "embed/moved/images", 0)
    table = read_table(path, "embed.nodes/1")
    place = table.schema.get_field_index("x0")
    table = table.set_column(place, table.schema.field(place), pc.add(table["x0"], pa.scalar(0.05, pa.float32())))
    write_table(table, path, "embed.nodes/1", {}, read_header(path, "embed.nodes/1").fingerprint)
    with pytest.raises(UserError, match=r"embed/moved: its nodes are not those of tiny.*embed both with"):
        read_cache(copy, ENCODER, 3, ALL, ["moved"], {"nodes"})


def test_only_what_is_declared_is_read(copy: Path) -> None:
    for name in ("graphs", "labels", "bank"):
        shutil.rmtree(copy / name)
    cache = read_cache(copy, ENCODER, PLAN.buckets, {"globals"})
    assert cache.fingerprints.keys() == {f"embed/{ENCODER}/images", "index/images.parquet", "index/classes.parquet"}
    images = torch.arange(len(cache.paths))
    whole = read_cache(copy, ENCODER, PLAN.buckets, {"nodes", "boxes"})
    for view in (0, 1):
        views = torch.full_like(images, view)
        assert torch.equal(cache.batch(images, views).g, whole.batch(images, views).g)
        assert torch.equal(cache.globals(images, view), whole.globals(images, view))
    with pytest.raises(UserError, match=r"bank/tiny\.parquet: is missing"):
        read_cache(copy, ENCODER, PLAN.buckets, {"globals", "names"})
    with pytest.raises(UserError, match=r"READS: 'vectors' is no part of the cache; choose from: boxes, concepts"):
        read_cache(copy, ENCODER, PLAN.buckets, {"vectors"})


def test_what_is_not_declared_cannot_be_seen(folder: Path) -> None:
    cache = read_cache(folder, ENCODER, PLAN.buckets, {"globals", "concepts"})
    batch = cache.batch(torch.arange(3))
    for field, part in (("nodes", "nodes"), ("adjacency", "edges"), ("density", "labels"), ("d", "descriptions")):
        with pytest.raises(UserError, match=rf"{field}: is of the part `{part}`, which the method's READS does not"):
            getattr(batch, field)
    with pytest.raises(UserError, match=r"Labels: the method's READS does not name `labels`"):
        cache.part(Labels)
    with pytest.raises(AttributeError):
        batch.telepathy  # noqa: B018
    bank = cache.only({"concepts"}).part(Bank)
    assert not bank.K[bank.of_kind("name")].any()
    assert bank.K[~bank.of_kind("name")].any(1).all()
    with pytest.raises(UserError, match=r"`owners`, and the method's READS does not name it"):
        _ = bank.own


def test_every_part_is_found_by_its_names() -> None:
    kinds = part_kinds()
    names = {"globals", "nodes", "boxes", "labels", "edges", "names", "concepts", "owners", "descriptions"}
    assert kinds.keys() == names
    fields = [field for kind in set(kinds.values()) for field in kind.shows]
    assert len(fields) == len(set(fields))
    for kind in set(kinds.values()):
        assert set(kind.files("one").values()) <= COLUMNS.keys()
