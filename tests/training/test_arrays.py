"""Arrays that are kept of what was read: never of another source, never in a run's way."""

import errno
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fieldmark.command import UserError
from tests.training.cache import ALL, ENCODER, Plan, tensors, write_cache, write_moments
from training import hashes
from training.data import arrays, read_cache
from training.data.arrays import Arrays, Zeros, clear, keep, map_array
from training.data.moments import Moments
from training.data.nodes import Nodes

PLAN = Plan(classes=3, train=4, val=2, test=2, nodes=6, dimension=8, views=2, sentences=3, rings=3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where arrays lie: a folder of this test's own."""
    folder = tmp_path / "cache/arrays"
    monkeypatch.setattr(arrays, "arrays_folder", lambda: folder)
    monkeypatch.setattr(arrays, "in_use", set())
    monkeypatch.setattr(arrays, "said", set())
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "data/bucket/b000.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(64)))
    return path


class Reader:
    """Reads the bytes of a file as numbers, and counts how often."""

    def __init__(self, source: Path) -> None:
        self.source, self.count = source, 0

    def __call__(self, zeros: Zeros) -> Arrays:
        self.count += 1
        content = self.source.read_bytes()
        large = zeros((len(content), 2))
        large[:] = np.frombuffer(content, np.uint8)[:, None]
        return {"large": large, "small": np.asfortranarray(large[:5].astype(np.int32)), "none": np.zeros((0, 3), bool)}


def same(found: Arrays, content: bytes) -> bool:
    values = np.repeat(np.frombuffer(content, np.uint8)[:, None], 2, axis=1)
    small = found["small"].dtype == np.int32 and np.array_equal(found["small"], values[:5])
    none = found["none"].shape == (0, 3) and found["none"].dtype == bool
    return small and none and found["large"].dtype == np.float16 and np.array_equal(found["large"], values)


def test_what_was_read_once_is_mapped_from_then_on(folder: Path, source: Path) -> None:
    reader = Reader(source)
    for _ in range(3):
        found = keep("bytes", [source], reader)
        assert same(found, source.read_bytes())
        found["large"][:] = 1  # stays here
        found["small"][:] = 1
    assert reader.count == 1
    [entry] = [path for path in folder.iterdir() if path.is_dir()]
    assert sorted(path.name for path in entry.iterdir()) == ["arrays.json", "large.npy", "none.npy", "small.npy"]
    keep(["bytes", "of other images"], [source], reader)
    assert reader.count == 2


@pytest.mark.parametrize("settled", [True, False])
def test_arrays_of_a_source_that_changed_are_not_used(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    """The same size, and the same time of change as far as a program can set it."""
    if settled:
        monkeypatch.setattr(hashes, "SETTLED_NS", -(10**18))
    reader = Reader(source)
    keep("bytes", [source], reader)
    keep("bytes", [source], reader)
    assert (folder / "sums.json").exists() == settled
    before = source.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    source.write_bytes(bytes(range(1, 65)))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_mtime_ns == before.st_mtime_ns
    assert same(keep("bytes", [source], reader), bytes(range(1, 65)))
    assert reader.count == 2
    # The bytes count, and not the file: the former ones are still known.
    source.unlink()
    source.write_bytes(bytes(range(64)))
    assert same(keep("bytes", [source], reader), bytes(range(64)))
    assert reader.count == 2


def test_a_file_whose_hash_is_known_is_not_read_to_find_its_arrays(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", -(10**18))
    keep("bytes", [source], Reader(source))
    monkeypatch.setattr(arrays, "hash_file", None)
    assert same(keep("bytes", [source], Reader(source)), source.read_bytes())
    # A broken list of hashes is none.
    monkeypatch.undo()
    monkeypatch.setattr(arrays, "arrays_folder", lambda: folder)
    (folder / "sums.json").write_text("{")
    assert same(keep("bytes", [source], Reader(source)), source.read_bytes())


def test_what_is_replaced_while_it_is_read_is_not_kept(folder: Path, source: Path) -> None:
    def read(zeros: Zeros) -> Arrays:
        found = Reader(source)(zeros)
        time.sleep(0.02)
        source.write_bytes(b"new" * 9)
        return found

    assert same(keep("bytes", [source], read), bytes(range(64)))
    assert not list(folder.glob("*/"))


def test_all_parts_are_the_same_from_arrays(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    write_cache(data, PLAN)
    first = read_cache(data, ENCODER, 3, ALL)
    readers = ("nodes.read_vectors", "nodes.place_boxes", "labels.read_labels", "edges.read_edges",
               "moments.read_moments", "descriptions.read_descriptions", "rows.read_views")  # fmt: skip
    with monkeypatch.context() as patch:
        for name in readers:
            patch.setattr(f"training.data.{name}", refuse)
        second = read_cache(data, ENCODER, 3, ALL)
    monkeypatch.setattr(arrays, "arrays_folder", lambda: source_file(data))
    without = read_cache(data, ENCODER, 3, ALL)
    for cache in (second, without):
        assert tensors(cache).keys() == tensors(first).keys()
        for name, tensor in tensors(first).items():
            assert tensor.dtype == tensors(cache)[name].dtype
            assert torch.equal(tensor, tensors(cache)[name]), name


def refuse(*given: Any) -> Arrays:
    raise AssertionError("it was read again")


def source_file(data: Path) -> Path:
    return data / "index/images.parquet"


def test_an_array_may_be_larger_than_memory(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path, rows = tmp_path / "large.npy", int(1.5 * memory) // 2**20
    np.lib.format.open_memmap(path, "w+", np.float16, (rows, 2**19))  # a hole: it takes no room on the disk
    mapped = map_array(path)
    mapped[-1, 5] = 3
    assert mapped.shape == (rows, 2**19)
    assert mapped[-1, 4:7].tolist() == [0, 3, 0]
    assert map_array(path)[-1, 5] == 0


def test_another_index_has_arrays_of_its_own(folder: Path, tmp_path: Path) -> None:
    """The same vectors of other images, or in another order."""
    write_cache(tmp_path / "a", PLAN)
    write_cache(tmp_path / "b", Plan(**{**PLAN.__dict__, "val": 3}))
    whole = read_cache(tmp_path / "b", ENCODER, 3, {"nodes", "pooled"})
    for part in ("images", "moments"):
        shutil.rmtree(tmp_path / f"a/embed/{ENCODER}/{part}")
        shutil.copytree(tmp_path / f"b/embed/{ENCODER}/{part}", tmp_path / f"a/embed/{ENCODER}/{part}")
    some = read_cache(tmp_path / "a", ENCODER, 3, {"nodes", "pooled"})
    assert len(some.paths) == len(whole.paths) - 3
    places = [whole.paths.index(path) for path in some.paths]
    taken = whole.take(torch.tensor(places))
    assert torch.equal(some.part(Nodes).nodes, taken.part(Nodes).nodes)
    assert torch.equal(some.part(Moments).vectors["pooled"], taken.part(Moments).vectors["pooled"])


def test_arrays_may_be_deleted_at_any_time(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cache(data, PLAN)
    first = read_cache(data, ENCODER, 3, ALL)
    before = {name: tensor.clone() for name, tensor in tensors(first).items()}
    mapped = read_cache(data, ENCODER, 3, ALL)
    for victim in [*folder.glob("*/*.npy")][::2]:
        victim.unlink()
    half = read_cache(data, ENCODER, 3, ALL)
    shutil.rmtree(folder)
    for cache in (mapped, half, read_cache(data, ENCODER, 3, ALL)):
        assert all(torch.equal(before[name], tensor) for name, tensor in tensors(cache).items())


def read_in_a_process(data: Path, folder: Path, start: Any, found: Any) -> None:
    arrays.arrays_folder = lambda: folder  # type: ignore[assignment]
    start.wait()
    cache = read_cache(data, ENCODER, 3, ALL)
    found.put({name: float(tensor.double().sum()) for name, tensor in tensors(cache).items()})


def test_processes_that_write_the_same_at_once_read_the_same(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cache(data, PLAN)
    context = multiprocessing.get_context("fork")
    start, found = context.Barrier(4), context.Queue()
    processes = [context.Process(target=read_in_a_process, args=(data, folder, start, found)) for _ in range(4)]
    for process in processes:
        process.start()
    sums = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    cache = read_cache(data, ENCODER, 3, ALL)
    expected = {name: float(tensor.double().sum()) for name, tensor in tensors(cache).items()}
    assert sums == [expected] * 4
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("trouble", ["no folder", "full", "too large a file"])
def test_where_nothing_can_be_kept_runs_read_as_before_and_say_so_once(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble == "no folder":
        folder.parent.write_text("a file")
    elif trouble == "full":

        def fail(*given: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", fail)
    reader = Reader(source)
    source.write_bytes(bytes(64) * 10_000)
    try:
        if trouble == "too large a file":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        for count in (1, 2, 3):
            assert same(keep("bytes", [source], reader), source.read_bytes())
            assert reader.count == count
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err.count("keeps no arrays") == 1
    assert not list(folder.glob("*/"))


def test_what_fits_nowhere_is_one_line(folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MEMORY_SHARE", 0.0)

    def fail(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UserError, match=r"fit neither into memory nor on this disk \(No space left.*FIELDMARK_CACHE"):
        keep("bytes", [source], Reader(source))


def test_a_folder_is_gone_through_once_a_while_and_where_the_limit_is_near(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "looked", {})
    looks = 0

    def count(folder: Path, needed: int) -> int:
        nonlocal looks
        looks += 1
        return clear(folder, needed)

    monkeypatch.setattr(arrays, "clear", count)
    for number in range(20):
        keep(f"array {number}", [source], Reader(source))
    assert looks == 1
    taken = sum(file.stat().st_size for file in folder.glob("*/*.npy"))
    monkeypatch.setattr(arrays, "LIMIT", 2 * taken)
    # What it asks for and does not get written counts until it looks again.
    monkeypatch.setitem(arrays.looked, folder, (time.monotonic(), 2 * taken))
    keep("one more", [source], Reader(source))
    assert looks == 2
    assert len(list(folder.glob("*/"))) == 21
    monkeypatch.setattr(arrays, "LOOK_S", 0)
    keep("another", [source], Reader(source))
    assert looks > 2


def test_the_least_recently_used_go_beyond_the_limit_and_none_in_use(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep("one", [source], Reader(source))
    [one] = folder.glob("*/")
    size = sum(file.stat().st_size for file in one.iterdir())
    monkeypatch.setattr(arrays, "LIMIT", int(3.5 * size))
    monkeypatch.setattr(arrays, "LOOK_S", 0)
    keep("two", [source], Reader(source))
    [two] = set(folder.glob("*/")) - {one}
    keep("three", [source], Reader(source))
    [three] = set(folder.glob("*/")) - {one, two}
    for seconds, entry in enumerate((two, one, three)):
        os.utime(entry / "arrays.json", (seconds, seconds))
    keep("four", [source], Reader(source))  # all are in use
    assert set(folder.glob("*/")) == {one, two, three}
    assert "keeps no arrays" in capsys.readouterr().err

    arrays.in_use.clear()  # as another process sees them
    keep("one", [source], Reader(source))
    keep("four", [source], Reader(source))
    [four] = set(folder.glob("*/")) - {one, two, three}
    assert set(folder.glob("*/")) == {one, three, four}  # two was used before them
    monkeypatch.setattr(arrays, "LIMIT", size // 2)
    arrays.in_use.clear()
    assert same(keep("five", [source], Reader(source)), source.read_bytes())
    assert not list(folder.glob("*/"))


def test_what_a_killed_process_left_goes_after_a_day(folder: Path, source: Path) -> None:
    for name, age in ((".a.partial", 2 * 24 * 3600), (".b.partial", 60), ("c", 2 * 24 * 3600)):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.npy").write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    keep("bytes", [source], Reader(source))
    assert {path.name for path in folder.glob("*/") if len(path.name) < 20} == {".b.partial"}


def test_moments_of_one_name_are_not_those_of_another(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_cache(data, PLAN)
    write_moments(data, ENCODER, "isqrt", 12, seed=5)
    cache = read_cache(data, ENCODER, 3, {"pooled", "moments/isqrt"})
    again = read_cache(data, ENCODER, 3, {"moments/isqrt"})
    vectors = cache.part(Moments).vectors
    assert not torch.equal(vectors["pooled"], vectors["isqrt"])
    assert torch.equal(again.part(Moments).vectors["isqrt"], vectors["isqrt"])
