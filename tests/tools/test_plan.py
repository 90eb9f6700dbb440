"""What is said beforehand, held against the files that the stages then wrote and the arrays that runs read of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.params import load_params
from tests.tools.conftest import run_module
from tools.plan import Planner, Rates, buckets_for, read_rates, scale_table, what_fits
from tools.sizes import memory_of
from training.data.cache import read_cache
from training.data.part import kind_of
from training.train import plan_run

IMAGES, CLASSES = 24, 3
# Bytes on disk: random numbers stand for those of an encoder.
TOLERANCE = 0.15


@pytest.fixture
def planner(asked: Path) -> Planner:
    return Planner(load_params("params.yaml"), CLASSES, None)


def size_of(folder: Path) -> int:
    """Bytes of a folder's buckets without the header that says what made them, which outweighs so few rows."""
    total = 0
    for path in folder.glob("*.parquet"):
        table, file = pq.read_table(path, partitioning=None).replace_schema_metadata(None), io.BytesIO()
        store.write_parquet([table], file, table.schema)
        assert 0 <= path.stat().st_size - file.tell() < 3000
        total += file.tell()
    return total


def test_bytes_are_those_that_the_stages_wrote(planner: Planner) -> None:
    params = planner.params
    drawn = {"vit": planner.draw(params)["vit"]}
    plan = planner.plan(IMAGES, params, drawn, params.dataset.buckets, None)
    said = {line.path: line.size for line in plan.lines if not line.path.startswith("runs")}
    assert set(said) == {
        "embed/vit/images", "embed/vit/tokens", "embed/vit/moments/pooled", "embed/vit/moments/isqrt", "graphs/vit",
        "labels/vit",
    }  # fmt: skip
    for path, size in said.items():
        assert size == pytest.approx(size_of(Path("data", path)), rel=TOLERANCE), path


def test_memory_is_that_of_the_arrays_that_a_run_reads(planner: Planner) -> None:
    drawn = planner.draw(planner.params)["vit"]
    for name in ("attention_pool", "concept_graph", "moments"):
        reading = plan_run("params.yaml", planner.params, name).reading
        cache = read_cache("data", "vit", 2, reading.needs)
        words = {word: memory_of(word, "vit", drawn) for word in reading.needs}
        kinds = {kind_of(word) for word, size in words.items() if size}
        held = sum(tensor.nbytes for kind in kinds for tensor in cache.part(kind).tensors().values())
        assert IMAGES * sum(words.values()) == pytest.approx(held, rel=0.1), name


@pytest.mark.slow
def test_a_knob_saves_what_it_is_said_to_save(planner: Planner) -> None:
    params = planner.params
    now = planner.plan(IMAGES, params, planner.draw(params), 2, None)
    found = dict(planner.savings(now))
    saved = {said: now.size - other.size for said, other in found.items()}
    assert {"embed.views: 0", "embed.tokens: false", "tokens: without vit", "labels.top: 8"} <= set(saved)
    assert all(size > 0 for said, size in saved.items() if "image_size" not in said), saved
    # Half of all rows are of the view that is drawn.
    assert found["embed.views: 0"].size_under("images") < 0.7 * now.size_under("images")


def test_rates_make_hours_and_are_of_the_same_encoders(asked: Path, write_other: Callable[..., object]) -> None:
    params = load_params("params.yaml")
    encoder = {
        "settings": params.encoder("vit").model_dump(mode="json"), "device": "cpu", "nodes": 20.0, "tokens": 20.0,
        "moments": 20.0, "linked": 1000.0, "labelled": 1000.0,
    }  # fmt: skip
    content = {
        "machine": "a machine", "classes": 3, "index": {"images_per_s": 10, "index_bytes": 100, "thumb_bytes": 1000},
        "encoders": {"vit": encoder, "twin": encoder},
    }  # fmt: skip
    file = asked / "rates.json"
    file.write_text(json.dumps(content))
    try:
        rates = read_rates(file, params)
        planner = Planner(params, 3, rates)
        drawn = planner.draw(params)
        small, large = (planner.plan(count, params, drawn, 16, rates) for count in (1000, 10_000))
        assert small.seconds is not None
        assert large.seconds == pytest.approx(10 * small.seconds)
        # Two passes an image at 20 a second.
        [nodes] = [line for line in small.lines if line.path == "embed/twin/images"]
        assert nodes.seconds == pytest.approx(100)
        table = scale_table([small, large], [1, 8])
        assert "| 10,000 " in table
        assert "on 8 workers" in table
        assert any(line.startswith("disk: ") for line in what_fits(large))
        encoder["settings"] = encoder["settings"] | {"image_size": 48}  # type: ignore[operator]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match="has no rates of"):
            read_rates(file, params)
    finally:
        file.unlink()


@pytest.mark.slow
def test_a_plan_is_printed(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_module("tools.plan", "--save", str(asked / "rates.json"), "--workers", "4")
    said = capsys.readouterr().out
    assert "24 images of 3 classes in 16 buckets" in said
    assert "dataset.buckets: 16 in place of 2" in said
    assert "embed_images" in said
    assert "| write" in said
    assert Rates.model_validate_json((asked / "rates.json").read_text()).encoders["vit"].nodes > 0
    run_module("tools.plan", "--rates", "rates.json", "--images", "1e5", "1e8", "--workers", "1", "64")
    (asked / "rates.json").unlink()
    assert "| 100,000,000 | " in capsys.readouterr().out


def test_buckets_stay_of_a_handy_size() -> None:
    assert buckets_for(10, 1000) == 16
    assert buckets_for(1_000_000, 1000) == 256
    assert buckets_for(1_000_000, 1_000_000) == 4096
    assert buckets_for(10**9, 10**6) == 65_536
