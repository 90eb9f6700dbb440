"""Second looks: rows of resampled pictures, kept bucket by bucket; an image without a map is an error."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.pooled import pool_batch
from fieldmark.params import Params
from fieldmark.pictures.views import Source, read_sources
from fieldmark.pictures.zoom import zoomed_views
from tests.project import draw, snapshot

VIEWS, SIDE = 2, 9
RunStage = Callable[..., None]


def map_of(image_id: str, view: int, branch: str) -> np.ndarray:
    seed = int(store.sha256(f"{image_id} {view} {branch}")[:8], 16)
    return np.random.default_rng(seed).uniform(0.05, 1, (SIDE, SIDE)).astype(np.float16)


def write_maps(image_ids: Sequence[str], encoder: str, mark: str = "first") -> None:
    rows = [
        {"image_id": each, "view": view, "branch": branch, "side": SIDE, "values": map_of(each, view, branch).ravel()}
        for each in image_ids
        for view in range(VIEWS)
        for branch in ("complementary", "discriminative")
    ]
    table = pa.Table.from_pylist(rows, schema=store.arrow_schema("maps/1"))
    made_by = {"encoder": encoder, "views": VIEWS}
    store.write_table(table, "data/first_looks/zoom/maps.parquet", "maps/1", made_by, mark)


@pytest.fixture
def params(set_params: Callable[..., Params]) -> Params:
    return set_params(train={"first_looks": {"zoom": {"method": "s3n", "encoder": "vit"}}})


@pytest.fixture
def encoder(params: Params) -> str:
    return load_encoder("vit", params.encoder("vit"), torch.device("cpu")).fingerprint


@pytest.fixture
def look(run_stage: RunStage, capsys: pytest.CaptureFixture[str]) -> Callable[[], int]:
    """Run look_again; return how many images were embedded."""

    def run() -> int:
        capsys.readouterr()
        run_stage("look_again", "--look", "zoom")
        return int(capsys.readouterr().out.splitlines()[-1].split(": ")[1].split()[0])

    return run


def indexed(run_stage: RunStage) -> list[Source]:
    run_stage("index_images")
    return read_sources(Path("images"))


def buckets() -> dict[str, tuple[bytes, int]]:
    return snapshot(Path("data/again/zoom"))


def test_rows_are_what_the_encoder_pools_of_the_resampled_pictures(
    params: Params, encoder: str, dataset: list[str], run_stage: RunStage, look: Callable[[], int]
) -> None:
    sources = indexed(run_stage)
    write_maps([source.image_id for source in sources], encoder)
    assert look() == len(dataset)
    table = store.read_buckets("data/again/zoom", "again/1", 4)
    keys = list(zip(*(table[name].to_pylist() for name in ("image_id", "view", "branch")), strict=True))
    assert len(keys) == len(dataset) * VIEWS * 2
    vectors = dict(zip(keys, store.vectors_of(table).astype(np.float32), strict=True))

    vit, source = load_encoder("vit", params.encoder("vit"), torch.device("cpu")), sources[3]
    # The map of each picture, by its branch: a swap would show.
    for branch in ("discriminative", "complementary"):
        maps = torch.from_numpy(np.stack([[map_of(source.image_id, view, branch)] for view in range(VIEWS)]))
        for view in zoomed_views(source, vit, maps.float()):
            pooled: Tensor = pool_batch(vit, vit.normalise(view.pixels), [])[0]
            found = vectors[source.image_id, view.number, branch]
            np.testing.assert_allclose(found, pooled[0].numpy(), rtol=2e-3, atol=2e-3)


def test_one_image_more_is_one_image_looked_at_and_one_bucket_written(
    encoder: str, dataset: list[str], run_stage: RunStage, look: Callable[[], int]
) -> None:
    before_ids = [source.image_id for source in indexed(run_stage)]
    write_maps(before_ids, encoder)
    assert look() == len(dataset)
    before = buckets()
    assert look() == 0
    assert buckets() == before
    extra = draw(Path("images/test/a/extra.png"), 99)
    write_maps([source.image_id for source in indexed(run_stage)], encoder)
    assert look() == 1
    changed = [name for name, state in buckets().items() if state != before[name]]
    assert len(changed) == 1
    extra.unlink()
    indexed(run_stage)
    write_maps(before_ids, encoder)
    assert look() == 0
    assert {name: content for name, (content, _) in buckets().items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_another_first_look_embeds_all_anew(
    encoder: str, dataset: list[str], run_stage: RunStage, look: Callable[[], int]
) -> None:
    image_ids = [source.image_id for source in indexed(run_stage)]
    write_maps(image_ids, encoder)
    look()
    write_maps(image_ids, encoder, mark="refitted")
    assert look() == len(dataset)


def test_an_image_without_its_maps_is_an_error_and_nothing_is_written(
    encoder: str, dataset: list[str], run_stage: RunStage, look: Callable[[], int]
) -> None:
    image_ids = sorted(source.image_id for source in indexed(run_stage))
    write_maps(image_ids[:-1], encoder)
    with pytest.raises(UserError, match=rf"quet: lacks the maps of image {image_ids[-1]} \(view 0\); run first_look"):
        look()
    write_maps(image_ids, "another")
    with pytest.raises(UserError, match=r"maps\.parquet: was made with another vit than it is .*; run embed_tok"):
        look()
    assert not Path("data/again/zoom").exists()


def test_a_look_that_params_do_not_name(params: Params, run_stage: RunStage) -> None:
    with pytest.raises(UserError, match=r"train\.first_looks\.other: is not there; choose one of: zoom, or add it"):
        run_stage("look_again", "--look", "other")


def test_dry_run_writes_nothing(
    encoder: str, dataset: list[str], run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    write_maps([source.image_id for source in indexed(run_stage)], encoder)
    run_stage("look_again", "--look", "zoom", "--dry-run")
    assert f"data/again/zoom: {len(dataset)} images to embed" in capsys.readouterr().out
    assert not Path("data/again/zoom").exists()
