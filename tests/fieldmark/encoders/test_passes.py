"""How images go through an encoder: shards, memory that ends, batch sizes, compiled code, and what is said of it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from bench import embed as embed_bench
from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders import passes
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import (
    BatchRunner,
    Clock,
    CpuSlots,
    Product,
    find_batch_size,
    find_work,
    forward_sources,
    list_devices,
    out_of_memory,
    run_sources,
    update,
)
from fieldmark.params import Params
from fieldmark.pictures import views
from fieldmark.pictures.views import Source, View, image_ids_of, prepare, read_sources, source_of
from tests.project import ROOT, draw, snapshot

SetParams = Callable[..., Params]
RunStage = Callable[..., None]
FOLDER = Path("data/embed/vit/images")


def contents() -> dict[str, bytes]:
    return {name: content for name, (content, _) in snapshot(FOLDER).items()}


def sources() -> list[Source]:
    return [Source(store.sha256(path.read_bytes()), path) for path in sorted(Path("images").glob("*/*/*.png"))]


@pytest.fixture
def make_product(set_params: SetParams, dataset: list[str]) -> Callable[[int], Product]:
    """What embed_images makes with `vit`, two passes and a half of four windows an image, at a batch size."""

    def make(batch_size: int) -> Product:
        params = set_params(embed={"tokens": True, "grids": [2], "crops": [2]})
        encoder = load_encoder("vit", params.encoder("vit"), torch.device("cpu"))
        encoder.batch_size = batch_size
        return nodes_of(encoder, params.embed)

    return make


def limit(product: Product, most: int) -> tuple[Product, list[int]]:
    """The product on a device that holds `most` pictures at a time, and the sizes of the batches it was given."""
    sizes: list[int] = []

    def forward(pixels: Tensor) -> tuple[Tensor, ...]:
        sizes.append(product.encoder.batch_size)
        if product.encoder.batch_size > most:
            raise torch.OutOfMemoryError("out of memory")
        return product.forward(pixels)

    return replace(product, forward=forward), sizes


def test_two_shards_make_the_bytes_of_one_process(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(embed={"views": 1})
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    whole = contents()
    shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    other = FOLDER / ".b000.parquet.1.partial"
    other.touch()
    embedded = 0
    for rank in (1, 0):
        capsys.readouterr()
        run_stage("embed_images", "--encoder", "vit", "--shard", f"{rank}/2")
        said = re.fullmatch(rf"{FOLDER}: (\d+) images embedded, 0 kept\n", capsys.readouterr().out)
        assert said
        embedded += int(said[1])
        done = {path.name for path in FOLDER.glob("b*")}
        assert done == {f"b00{bucket}.parquet" for bucket in range(4) if rank == 0 or bucket % 2 == 1}
    assert embedded == len(dataset)
    # It may be another process's.
    assert other.exists()
    other.unlink()
    assert contents() == whole


@pytest.mark.slow
def test_several_devices_are_a_process_each(
    set_params: SetParams,
    dataset: list[str],
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_params()
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    whole = contents()
    shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    (FOLDER / ".b000.parquet.1.partial").touch()
    name = Path("images", dataset[0])
    content = name.read_bytes()
    draw(name, 1000)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_stage("embed_images", "--encoder", "vit", "--device", "cpu,cpu")
    assert stopped.value.code == 1
    assert f"error: {name}: has changed since it was indexed" in capfd.readouterr().err
    # The other process finished its share, and none left a stray.
    bucket = store.bucket_of(store.sha256(content), 4)
    assert {f"b00{number}.parquet" for number in range(4) if number % 2 != bucket % 2} <= set(contents())
    assert not list(FOLDER.glob(".*"))
    name.write_bytes(content)
    run_stage("embed_images", "--encoder", "vit")
    assert contents() == whole


def test_devices_and_shards_by_name(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list_devices("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    assert list_devices("cpu") == ["cpu"]
    if not torch.cuda.is_available():
        assert list_devices("auto") == ["cpu"]
    set_params()
    for shard in ("2/2", "-1/2", "1", "a/b", "0/0"):
        with pytest.raises(SystemExit):
            run_stage("embed_images", "--encoder", "vit", f"--shard={shard}")
        assert f"argument --shard: invalid parse_shard value: '{shard}'" in capsys.readouterr().err


@pytest.mark.parametrize("most", [5, 2, 1])
def test_a_batch_that_memory_does_not_hold_is_halved_and_nothing_is_lost(
    most: int, make_product: Callable[[int], Product], capsys: pytest.CaptureFixture[str]
) -> None:
    limited, sizes = limit(make_product(8), most)
    images = [rows for rows, in forward_sources(sources(), [limited])]
    # 4 where 5 fit: half of 8.
    fits = {5: 4, 2: 2, 1: 1}[most]
    assert limited.encoder.batch_size == fits
    expected = [rows for rows, in forward_sources(sources(), [make_product(fits)])]
    assert all(one.equals(other) for one, other in zip(images, expected, strict=True))
    # Each size that was too large was tried once.
    assert [size for size in sizes if size > fits] == [size for size in (8, 4, 2) if size > fits]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len({size for size in sizes if size > fits})
    assert f"set its batch_size in params.yaml to {fits}" in warnings[-1]


def test_memory_for_not_even_one_picture_is_one_line(make_product: Callable[[int], Product]) -> None:
    limited, _ = limit(make_product(2), 0)
    with pytest.raises(UserError, match=r"params\.yaml: vit: cpu has not the memory for one picture") as error:
        list(forward_sources(sources(), [limited]))
    assert "\n" not in str(error.value)


def test_other_errors_are_no_lack_of_memory(make_product: Callable[[int], Product]) -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**52, dtype=torch.float64)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    runner = BatchRunner(make_product(2), CpuSlots(torch.device("cpu"), 1))
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        runner.start(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))


def test_a_batch_size_is_found_and_nothing_written(
    make_product: Callable[[int], Product],
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
    project: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(passes, "TIMED_SECONDS", 0)
    # Every batch counts as a gain.
    monkeypatch.setattr(passes, "MIN_SPEEDUP", 0)
    limited, _ = limit(make_product(4), 16)
    lines = find_batch_size(limited).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["batch_size", "4", "8", "16", "32"]
    assert lines[-2].endswith("out of memory")
    assert lines[-1].startswith("params.yaml: vit: batch_size: 16 ")
    with pytest.raises(UserError, match="out of memory at batch_size 8"):
        find_batch_size(limit(make_product(8), 4)[0])
    # And stops at the first that gains nothing.
    monkeypatch.setattr(passes, "MIN_SPEEDUP", 1e9)
    run_stage("index_images")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    run_stage("embed_images", "--encoder", "vit", "--find-batch-size")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["4", "8"]
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_what_a_run_waited_for_is_told(
    make_product: Callable[[int], Product], capsys: pytest.CaptureFixture[str]
) -> None:
    product = make_product(4)
    assert update([product], sources(), 4) == 12
    closing = capsys.readouterr().err.splitlines()[-1]
    said = re.fullmatch(
        r"embed vit: 12 images in \d+\.\d\d s, \d+\.\d images/s; decode (\d+)%, forward (\d+)%, write (\d+)%", closing
    )
    assert said
    assert sum(map(int, said.groups())) == pytest.approx(100, abs=2)
    assert update([product], sources(), 4) == 0
    assert "images in" not in capsys.readouterr().err


def test_threads_that_decode_compute_alone(make_product: Callable[[int], Product]) -> None:
    before, seen = torch.get_num_threads(), []

    def cut(source: Source) -> list[View]:
        seen.append(torch.get_num_threads())
        return prepare(source, product.encoder, product.embed)

    product = make_product(4)
    torch.set_num_threads(2)
    try:
        assert len(list(run_sources(sources(), product, Clock(), cut))) > 0
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2  # of this thread, which runs the encoder
    finally:
        torch.set_num_threads(before)


def test_a_writer_is_ahead_of_by_a_few_batches_only(make_product: Callable[[int], Product]) -> None:
    limited, sizes = limit(make_product(4), 4)
    rows = forward_sources(sources(), [limited])
    assert isinstance(next(rows)[0], pa.Table)
    # Two batches for the five passes of the first image, and at most QUEUED_BATCHES more.
    assert 2 <= len(sizes) <= 3 + passes.QUEUED_BATCHES
    rows.close()  # type: ignore[attr-defined]


def can_compile() -> bool:
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return compiler is not None and subprocess.run([compiler, "--version"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C++ compiler on the CPU, and here is none")
def test_compiled_vectors_are_those_of_the_same_encoder(
    set_params: SetParams, dataset: list[str], run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    def vectors() -> np.ndarray:
        table = store.read_buckets(FOLDER, "embed.nodes/1", 4)
        return store.vectors_of(table).astype(np.float32)

    set_params()
    run_stage("index_images")
    run_stage("embed_images", "--encoder", "vit")
    plain = vectors()
    for path in FOLDER.iterdir():
        path.unlink()
    run_stage("embed_images", "--encoder", "vit", "--compile")
    assert (plain * vectors()).sum(axis=1) == pytest.approx(1, abs=2e-3)
    capsys.readouterr()
    run_stage("embed_images", "--encoder", "vit")
    assert capsys.readouterr().out == f"{FOLDER}: 0 images embedded, {len(dataset)} kept\n"


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(
    dataset: list[str],
    project: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(embed_bench, "LARGE", (300, 200))
    model = f"local-dir:{models['vit']}"
    arguments = ["--models", model, "--images", "8", "--pictures", str(project / "images"), "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["embed", *arguments])
    embed_bench.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(models["vit"].name)]
    assert [row[1:4] for row in rows] == [["as", "it", "is"], ["300", "x", "200"]]
    for row in rows:
        bare, rate, ratio, decode, allowed = map(float, row[4:9])
        assert ratio == pytest.approx(rate / bare, abs=0.01)
        assert allowed == pytest.approx(decode / (decode + bare), abs=0.01)


def test_only_what_is_to_be_embedded_becomes_a_source(
    make_product: Callable[[int], Product], run_stage: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = make_product(4)
    asked: list[str] = []

    def counted(*row: Any) -> Source:
        asked.append(row[1])
        return source_of(*row)

    monkeypatch.setattr(views, "source_of", counted)
    run_stage("index_images")
    indexed = read_sources(Path("images"))
    assert len(indexed) == len(find_work(product, indexed, 4).missing) == 12
    assert asked == []
    update([product], indexed, 4)
    assert sorted(asked) == sorted(image_ids_of(indexed).to_pylist())
    before, asked[:] = contents(), []
    assert update([product], indexed, 4) == 0
    assert asked == []
    # One image is gone from its bucket: it alone is made again, to the same bytes; a list of sources does the same.
    for given in (indexed, list(indexed)):
        gone, asked[:] = indexed[5].image_id, []
        path = store.bucket_path(FOLDER, store.bucket_of(gone, 4))
        rest = store.read_table(path, product.schema).filter(pc.field("image_id") != gone)
        store.write_table(rest, path, product.schema, product.made_by, product.fingerprint)
        assert update([product], given, 4) == 1
        assert asked == ([gone] if given is indexed else [])
        assert contents() == before


def test_sources_are_a_sequence(set_params: SetParams, run_stage: RunStage, dataset: list[str]) -> None:
    set_params()
    run_stage("index_images")
    found = read_sources(Path("images"))
    assert found[2:4] == [found[2], found[3]] == list(found)[2:4]
    assert found[-1] == list(found)[-1]
    assert [each.path for each in found] == [Path(path) for path in sorted(map(str, Path("images").glob("*/*/*.png")))]
    with pytest.raises(IndexError):
        found[len(found)]
