import json
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
from safetensors.torch import save_file

from fieldmark.command import UserError
from fieldmark.store import (
    COLUMNS,
    bucket_path,
    make_table,
    read_buckets,
    read_header,
    read_table,
    sha256,
    vectors_of,
    write_table,
)
from tests.training.cache import ALL, ENCODER, GRID, HEADS, Plan, write_again, write_cache, write_moments, write_other
from training.data import Cache, arrays, feature_blocks, part_kinds, read_cache
from training.data.attributes import Attributes
from training.data.bank import Bank
from training.data.labels import Labels
from training.data.moments import Moments
from training.data.nodes import Nodes
from training.data.parts import ObjectParts
from training.data.projection import Projection
from training.data.tokens import Tokens
from training.regimes import restrict_classes

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


def without_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "arrays_folder", lambda: Path(__file__))


def test_vectors_that_do_not_fit_into_memory_stay_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, images = read_cache(folder, ENCODER, PLAN.buckets, ALL), torch.arange(20)
    files = sorted(folder.rglob("*"))
    made: list[np.ndarray] = []

    def memmap(*given: Any, **named: Any) -> np.ndarray:
        made.append(np_memmap(*given, **named))
        return made[-1]

    np_memmap = np.memmap
    monkeypatch.setattr(np, "memmap", memmap)
    without_arrays(monkeypatch)
    monkeypatch.setattr(arrays, "MEMORY_SHARE", 0.0)
    streamed = read_cache(folder, ENCODER, PLAN.buckets, ALL)
    on_disk = {array.ctypes.data for array in made}
    for part in (streamed.part(Nodes), streamed.part(Moments)):
        assert {tensor.data_ptr() for tensor in part.tensors().values() if tensor.dtype == torch.float16} <= on_disk
    assert torch.equal(streamed.batch(images).nodes, held.batch(images).nodes)
    assert torch.equal(streamed.batch(images).pooled, held.batch(images).pooled)
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
        np.testing.assert_array_equal(batch.d[described, rank], vectors[f"sentence {rank} of image 0"])


def test_sentences_about_cells_come_cell_by_cell(copy: Path) -> None:
    path, schema = copy / "descriptions/cells.parquet", "descriptions.cells/1"
    rows = read_table(path, schema).to_pylist()
    # The second cell has two sentences, the first none: they come in the order of cells, then of ranks.
    kept = [{**rows[place], "cell": cell, "rank": rank} for place, cell, rank in ((0, 3, 0), (1, 2, 1), (2, 2, 0))]
    write_table(make_table(schema, kept), path, schema, {"nodes": [2]}, "other rows")
    cache = read_cache(copy, ENCODER, PLAN.buckets, ALL)
    batch = cache.batch(torch.arange(len(cache.paths)))
    described = cache.paths.index("train/class-00/0000.png")
    assert batch.cdm.sum(1).nonzero().flatten().tolist() == [described]
    texts = read_table(copy / f"embed/{ENCODER}/text.parquet", "embed.text/1")
    vectors = dict(zip(texts["text"].to_pylist(), vectors_of(texts).astype(np.float32), strict=True))
    for place, row in enumerate((2, 1, 0)):
        np.testing.assert_array_equal(batch.cd[described, place], vectors[rows[row]["text"]])


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
    assert batch.cd.shape == (3, 0, 32)


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
        (f"embed/{ENCODER}/moments/pooled", "pool_tokens"),
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
    with pytest.raises(UserError, match=r"'vectors' is no part of the cache; choose from: again/NAME, asked/NAME"):
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


def test_moments_arrive_where_the_files_have_them(copy: Path) -> None:
    write_moments(copy, ENCODER, "isqrt", 10, seed=3)
    write_moments(copy, ENCODER, "mean", 7, seed=4)
    cache = read_cache(copy, ENCODER, 3, {"pooled", "moments/isqrt"})
    sizes = {"pooled": 12, "isqrt": 10}
    tables = {name: read_buckets(copy / f"embed/{ENCODER}/moments/{name}", "embed.moments/1", 3) for name in sizes}
    assert {f"embed/{ENCODER}/moments/{name}" for name in sizes} == cache.fingerprints.keys() - {
        "index/images.parquet", "index/classes.parquet",
    }  # fmt: skip
    images = torch.arange(len(cache.paths))
    for view in (0, 1):
        batch = cache.batch(images, torch.full_like(images, view))
        assert batch.moments.keys() == sizes.keys()
        assert batch.pooled is batch.moments["pooled"]
        for name, table in tables.items():
            keys = zip(table["image_id"].to_pylist(), table["view"].to_pylist(), strict=True)
            vectors = dict(zip(keys, vectors_of(table), strict=True))
            assert batch.moments[name].dtype == torch.float32
            for image, image_id in enumerate(cache.image_ids):
                np.testing.assert_array_equal(batch.moments[name][image], vectors[image_id, view].astype(np.float32))
    some = cache.take(torch.tensor([5, 2]))
    views = torch.tensor([1, 0])
    told, whole = some.batch(torch.tensor([0, 1]), views), cache.batch(images[[5, 2]], views)
    assert all(torch.equal(told.moments[name], whole.moments[name]) for name in sizes)


def test_one_name_of_moments_is_all_that_is_seen_of_them(copy: Path) -> None:
    write_moments(copy, ENCODER, "isqrt", 10)
    cache = read_cache(copy, ENCODER, 3, {"moments/pooled", "moments/isqrt"})
    assert set(cache.only({"moments"}).part(Moments).vectors) == {"pooled", "isqrt"}
    batch = cache.only({"moments/isqrt"}).batch(torch.arange(3))
    assert list(batch.moments) == ["isqrt"]
    with pytest.raises(UserError, match=r"pooled: is of the part `pooled`, which the method's READS does not name"):
        _ = batch.pooled
    with pytest.raises(UserError, match=r"max: is of the part `moments/max`, which the method's READS does not name"):
        batch.moments["max"]
    assert cache.only({"pooled"}).batch(torch.arange(3)).has("moments/pooled")
    with pytest.raises(UserError, match=r"Moments: the method's READS does not name `moments` or `pooled`"):
        cache.only({"globals"}).part(Moments)
    with pytest.raises(UserError, match=r"READS: `moments` alone names no vector to read"):
        read_cache(copy, ENCODER, 3, {"moments"})
    for wrong in ("moments/", "moments/..", "moments/a/b", "pooled/x", "nodes/x"):
        with pytest.raises(UserError, match=rf"'{wrong}' is no part of the cache; choose from: .*, moments/NAME, "):
            read_cache(copy, ENCODER, 3, {wrong})


def test_a_run_without_nodes_needs_no_file_of_them(copy: Path) -> None:
    whole = read_cache(copy, ENCODER, 3, {"pooled", "globals"})
    write_moments(copy, "wide", "pooled", 5)
    for name in (f"embed/{ENCODER}/images", "graphs", "labels", "bank"):
        shutil.rmtree(copy / name)
    cache = read_cache(copy, ENCODER, 3, {"pooled"}, ["wide"], {"pooled"})
    images = torch.arange(len(cache.paths))
    assert cache.views == 2
    batch = cache.batch(images, torch.ones_like(images))
    assert torch.equal(batch.pooled, whole.batch(images, torch.ones_like(images)).pooled)
    assert batch.also[0].pooled.shape == (len(images), 5)
    # Of what has no views there is one.
    assert read_cache(copy, ENCODER, 3, set()).views == 1


def test_moments_that_are_not_there_name_folder_and_stage(copy: Path) -> None:
    with pytest.raises(UserError, match=r"embed/tiny/moments/bilinear: is missing; run pool_tokens \(dvc repro\)"):
        read_cache(copy, ENCODER, 3, {"moments/bilinear"})
    path = bucket_path(copy / f"embed/{ENCODER}/moments/pooled", 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"moments/pooled/b001\.parquet: is not readable Parquet"):
        read_cache(copy, ENCODER, 3, {"pooled"})


def test_moments_of_other_weights_than_the_nodes_are_refused(copy: Path) -> None:
    write_moments(copy, ENCODER, "isqrt", 4, made_by={"encoder": "another"})
    what = r"moments/isqrt: was made by another encoder tiny than .*/images \(.*\); run pool_tokens again"
    with pytest.raises(UserError, match=what):
        read_cache(copy, ENCODER, 3, {"globals", "moments/isqrt"})
    with pytest.raises(UserError, match=r"was made by another encoder tiny than .*; run pool_tokens again"):
        read_cache(copy, ENCODER, 3, {"pooled", "moments/isqrt"})
    # Another encoder's are its own matter.
    write_moments(copy, "wide", "isqrt", 4, made_by={"encoder": "another"})
    assert read_cache(copy, ENCODER, 3, {"pooled"}, ["wide"], {"moments/isqrt"}).also


def test_all_that_is_read_has_the_same_views(copy: Path) -> None:
    folder = copy / f"embed/{ENCODER}/moments/pooled"
    rows = read_buckets(folder, "embed.moments/1", 3).to_pylist()
    for bucket in range(3):
        path = bucket_path(folder, bucket)
        table = read_table(path, "embed.moments/1")
        header = read_header(path, "embed.moments/1")
        more = pc.add(table["view"], pa.scalar(2, pa.int16())).cast(pa.int16())
        moved = table.set_column(1, table.schema.field("view"), more)
        write_table(pa.concat_tables([table, moved]), path, "embed.moments/1", header.params, header.fingerprint)
    assert len(read_buckets(folder, "embed.moments/1", 3)) == 2 * len(rows)
    with pytest.raises(UserError, match=r"b00\d\.parquet: holds view 3, and what is read beside it has 2 views"):
        read_cache(copy, ENCODER, 3, {"globals", "pooled"})
    assert read_cache(copy, ENCODER, 3, {"pooled"}).views == 4


def test_tokens_of_each_layer_arrive_where_the_files_have_them(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_buckets(copy / f"embed/{ENCODER}/tokens", "embed.tokens/1", 3).to_pylist()
    stored = {(row["image_id"], row["view"], row["layer"]): row for row in rows}
    words = {"tokens", "tokens/1", "tokens/rollout", "cls", "cls/rollout", "rollout"}
    caches = [read_cache(copy, ENCODER, 3, words)]
    without_arrays(monkeypatch)
    monkeypatch.setattr(arrays, "MEMORY_SHARE", 0.0)
    caches.append(read_cache(copy, ENCODER, 3, words))  # they stay on the disk
    order = torch.tensor([4, 1, 12])
    caches.append(caches[1].take(order))
    for cache in caches:
        images = torch.arange(len(cache.paths))
        for view in (0, 1):
            batch = cache.batch(images, torch.full_like(images, view))
            assert batch.token_grid == batch.grid_of("tokens/1") == GRID
            assert batch.tokens.shape == (len(images), 12, PLAN.dimension + 4)
            assert batch.rollout.shape == (len(images), HEADS, 12)
            assert {each.dtype for each in (batch.tokens, batch.cls, batch.rollout)} == {torch.float32}
            for image, image_id in enumerate(cache.image_ids):
                deep, before = stored[image_id, view, 2], stored[image_id, view, 1]
                assert batch.tokens[image].flatten().tolist() == deep["vectors"]
                assert batch.cls[image].tolist() == deep["cls"]
                assert batch.of("cls/rollout")[image].tolist() == before["cls"]
                for word in ("tokens/1", "tokens/rollout"):
                    assert batch.of(word)[image].flatten().tolist() == before["vectors"]
                assert batch.rollout[image].flatten().tolist() == before["rollout"]
    # Of cells on the disk, none are brought to memory where some of the images are taken.
    first, taken = (cache.part(Tokens).layers["tokens"].vectors for cache in caches[1:])
    assert taken.data_ptr() == first.data_ptr()
    named = caches[0].only({"tokens/1", "cls/rollout"}).batch(order)
    for word in ("tokens", "tokens/rollout", "cls"):
        with pytest.raises(UserError, match=rf"{word}: is of the part `{word}`, which the method's READS does not"):
            named.of(word)
    seen = caches[0].only({"cls"}).batch(order)
    for field in ("tokens", "token_grid", "rollout"):
        with pytest.raises(UserError, match=rf"{field}: is of the part `{field.split('_')[0]}s?`, which the method's"):
            getattr(seen, field)


def test_tokens_that_are_not_whole_are_refused(copy: Path) -> None:
    folder = copy / f"embed/{ENCODER}/tokens"
    folder.rename(copy / "away")
    with pytest.raises(UserError, match=r"embed/tiny/tokens: is missing; run embed_tokens \(dvc repro\)"):
        read_cache(copy, ENCODER, 3, {"tokens"})
    (copy / "away").rename(folder)
    with pytest.raises(UserError, match=r"holds no layer 7, but 1, 2; name one of these as the layer, or add"):
        read_cache(copy, ENCODER, 3, {"tokens/7"})
    drop_first(bucket_path(folder, 1))
    for name in ("tokens", "cls", "rollout"):
        with pytest.raises(UserError, match=r"b001.parquet: lacks image [0-9a-f]{64} \(view 0\); run embed_tokens"):
            read_cache(copy, ENCODER, 3, {name})
    for bucket in range(3):
        path = bucket_path(folder, bucket)
        rows = [{**row, "cls": None, "rollout": None} for row in read_table(path, "embed.tokens/1").to_pylist()]
        rows = [{**row, "grid_h": 3, "grid_w": 2} if row["view"] and bucket == 2 else row for row in rows]
        header = read_header(path, "embed.tokens/1")
        table = make_table("embed.tokens/1", rows)
        write_table(table, path, "embed.tokens/1", header.params, header.fingerprint)
    for name, remedy in (("cls", "only a tower with a CLS token has one"), ("rollout", r"set tokens\.tiny\.rollout")):
        with pytest.raises(UserError, match=rf"embed/tiny/tokens: holds no {name}; {remedy}"):
            read_cache(copy, ENCODER, 3, {name})
    with pytest.raises(UserError, match=r"tokens: maps of layer 2 differ in size; run embed_tokens again"):
        read_cache(copy, ENCODER, 3, {"tokens"})


@pytest.mark.parametrize("bias", [True, False])
def test_the_projection_is_a_matrix_and_a_bias(copy: Path, bias: bool) -> None:
    path = copy / f"embed/{ENCODER}/projection.safetensors"
    path.unlink()
    with pytest.raises(UserError, match=r"projection\.safetensors: is missing; run pool_tokens"):
        read_cache(copy, ENCODER, 3, {"projection"})
    tensors = {"weight": torch.arange(96.0).view(8, 12)} | ({"bias": torch.arange(8.0)} if bias else {})
    nodes = read_header(bucket_path(copy / f"embed/{ENCODER}/images", 0), "embed.nodes/1")
    save_file(tensors, path, {"made_by": json.dumps({"encoder": nodes.params["encoder"]})})
    cache = read_cache(copy, ENCODER, 3, {"projection", "pooled", "globals"})
    assert torch.equal(cache.part(Projection).weight, tensors["weight"])
    assert torch.equal(cache.part(Projection).bias, tensors.get("bias", torch.zeros(8)))
    assert cache.fingerprints[f"embed/{ENCODER}/projection.safetensors"] == sha256(path.read_bytes())
    assert torch.equal(cache.take(torch.arange(3)).part(Projection).weight, tensors["weight"])

    save_file(tensors, path, {"made_by": json.dumps({"encoder": "another"})})
    with pytest.raises(UserError, match=r"projection\.safetensors: was made by another encoder tiny .*pool_tokens"):
        read_cache(copy, ENCODER, 3, {"projection", "pooled"})
    save_file({}, path)
    with pytest.raises(UserError, match=r"projection\.safetensors: holds no matrix: the head of tiny projects by more"):
        read_cache(copy, ENCODER, 3, {"projection"})
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UserError, match=r"projection\.safetensors: is not readable"):
        read_cache(copy, ENCODER, 3, {"projection"})


def test_marked_parts_arrive_where_the_file_has_them(copy: Path) -> None:
    path = copy / "index/parts.parquet"
    rows = read_table(path, "index.parts/1").to_pylist()
    # Of an image that is not used, and of a part with a box alone.
    rows += [{"path": "train/broken.png", "part": "head", "x": 0.5, "y": 0.5, "visible": True}]
    rows += [{"path": rows[0]["path"], "part": "fin", "visible": True, "box": [0.1, 0.2, 0.3, 0.4]}]
    write_table(make_table("index.parts/1", rows), path, "index.parts/1", {}, "other")
    cache = read_cache(copy, ENCODER, 3, {"nodes", "parts"})
    images = torch.arange(len(cache.paths))
    batch = cache.batch(images, images % 2)
    assert batch.part_box.shape == (len(images), 3, 4)  # fin, head, tail
    stored = {(row["path"], row["part"]): row for row in rows}
    for image, name in enumerate(cache.paths):
        for number, part in enumerate(("fin", "head", "tail")):
            row = stored.get((name, part), {"visible": False, "box": None})
            assert batch.part_seen[image, number] == row["visible"]
            expected = row["box"] or ([row["x"], row["y"]] * 2 if row["visible"] else [0.0] * 4)
            torch.testing.assert_close(batch.part_box[image, number], torch.tensor(expected))
    assert not batch.part_seen[:, 2].all()
    assert torch.equal(cache.take(images[3:5]).batch(images[:2]).part_box, batch.part_box[3:5])


def test_a_data_set_without_marks_has_no_parts(copy: Path) -> None:
    write_table(make_table("index.parts/1", []), copy / "index/parts.parquet", "index.parts/1", {}, "other")
    cache = read_cache(copy, ENCODER, 3, {"globals", "parts"})
    assert cache.part(ObjectParts).part_box.shape == (len(cache.paths), 0, 4)
    assert cache.batch(torch.arange(2)).part_seen.shape == (2, 0)


def test_attributes_are_words_or_shares_of_people(copy: Path) -> None:
    path = copy / "index/attributes.parquet"
    rows = read_table(path, "index.attributes/1").to_pylist()
    classes = sorted({row["class_id"] for row in rows})
    rows += [{"class_id": classes[0], "attribute": "size", "value": "12"}]
    rows += [{"class_id": classes[1], "attribute": "size", "value": "large"}]  # words, for one of them is a word
    rows += [{"class_id": classes[0], "attribute": "bill", "value": "long"}]  # a class has two values
    rows += [{"class_id": classes[2], "attribute": "crest", "value": value} for value in ("50", "nan")]
    write_table(make_table("index.attributes/1", rows), path, "index.attributes/1", {}, "other")
    cache = read_cache(copy, ENCODER, 3, {"globals", "attributes"})
    assert path.relative_to(copy).as_posix() in cache.fingerprints
    part = cache.part(Attributes)
    assert part.names == tuple(sorted(part.names))
    assert {"bill: hooked", "bill: long", "crest", "hooked", "size: 12", "size: large"} <= set(part.names)
    for label, class_id in enumerate(cache.classes):
        for column, name in enumerate(part.names):
            attribute, _, word = name.partition(": ")
            said = [row["value"] for row in rows if (row["class_id"], row["attribute"]) == (class_id, attribute)]
            assert part.table[label, column] == (word in said if word else any(float(value) >= 50 for value in said))
    assert torch.equal(cache.batch(torch.arange(2)).g, cache.globals(torch.arange(2)))
    few = restrict_classes(cache, cache.classes[1:])
    assert few.part(Attributes).table.equal(part.table[1:])


def test_a_data_set_without_attributes_has_none(copy: Path) -> None:
    path = copy / "index/attributes.parquet"
    write_table(make_table("index.attributes/1", []), path, "index.attributes/1", {}, "other")
    cache = read_cache(copy, ENCODER, 3, {"globals", "attributes"})
    assert cache.part(Attributes).table.shape == (len(cache.classes), 0)


def test_every_part_is_found_by_its_names() -> None:
    kinds = part_kinds()
    words = {name.partition("/")[0] for name in ALL}
    assert kinds.keys() == {*words, "globals", "projection"}
    fields = [field for kind in set(kinds.values()) for field in kind.shows]
    assert len(fields) == len(set(fields))
    for kind in set(kinds.values()):
        words = kind.provides - {"again", "asked", "moments"}  # which name nothing by themselves
        assert set(kind.files("one", words).values()) <= {*COLUMNS, "safetensors"}


def test_second_looks_arrive_where_the_files_have_them(copy: Path) -> None:
    write_again(copy, "zoom", 5, seed=1)
    write_again(copy, "other", 7, seed=2)
    cache = read_cache(copy, ENCODER, 3, {"globals", "again/zoom"})
    images = torch.arange(len(cache.paths))
    assert "again/zoom" in cache.fingerprints
    assert "again/other" not in cache.fingerprints
    table = read_buckets(copy / "again/zoom", "again/1", 3)
    keys = zip(*(table[name].to_pylist() for name in ("image_id", "view", "branch")), strict=True)
    vectors = dict(zip(keys, vectors_of(table), strict=True))
    for view in (0, 1):
        blocks = feature_blocks("again/zoom", cache.batch(images, torch.full_like(images, view)))
        assert [block.shape for block in blocks] == [(len(images), 5)] * 2
        for branch, block in zip(("discriminative", "complementary"), blocks, strict=True):
            expected = np.stack([vectors[image_id, view, branch] for image_id in cache.image_ids])
            np.testing.assert_array_equal(block, expected.astype(np.float32))
    told = cache.take(torch.tensor([5, 2])).batch(torch.tensor([1, 0]), torch.tensor([1, 0]))
    whole = cache.batch(torch.tensor([2, 5]), torch.tensor([1, 0]))
    assert torch.equal(told.of("again/zoom"), whole.of("again/zoom"))
    with pytest.raises(UserError, match=r"again/other: is of the part `again/other`, which the method"):
        feature_blocks("again/other", cache.only({"again/zoom"}).batch(images))


def test_second_looks_that_are_not_there_or_of_other_weights_are_refused(copy: Path) -> None:
    with pytest.raises(UserError, match=r"again/none: is missing; run look_again \(dvc repro\)"):
        read_cache(copy, ENCODER, 3, {"again/none"})
    with pytest.raises(UserError, match=r"READS: `again` alone names none; say again/NAME"):
        read_cache(copy, ENCODER, 3, {"again"})
    write_again(copy, "zoom", 5, encoder="another")
    with pytest.raises(UserError, match=r"was made by another encoder tiny than .*; run \w+ again"):
        read_cache(copy, ENCODER, 3, {"globals", "again/zoom"})
    write_again(copy, "zoom", 5)
    drop_first(bucket_path(copy / "again/zoom", 1))
    with pytest.raises(UserError, match=r"zoom/b001\.parquet: lacks image [0-9a-f]{64} \(view 0\); run look_again"):
        read_cache(copy, ENCODER, 3, {"again/zoom"})
