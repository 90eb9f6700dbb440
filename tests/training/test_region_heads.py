"""The object and the local views of a batch are the nodes of their kinds, and of no other."""

from pathlib import Path

import pytest
import torch

from fieldmark.store import bucket_path, read_header, read_table, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training.data import Cache, read_cache
from training.layers.faults import scramble
from training.methods import NotPossible
from training.region_heads import OWN, Regions, RegionSettings

PLAN = Plan(views=2)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Node 1 the object; of grid and crop by turns the others."""
    write_cache(tmp_path, PLAN)
    for bucket in range(PLAN.buckets):
        path = bucket_path(tmp_path / f"embed/{ENCODER}/images", bucket)
        table, mark = read_table(path, "embed.nodes/1"), read_header(path, "embed.nodes/1")
        rows = table.to_pylist()
        kinds = ["crop" if row["node"] % 2 and row["kind"] == "grid" else row["kind"] for row in rows]
        table = table.set_column(table.schema.get_field_index("kind"), table.schema.field("kind"), [kinds])
        write_table(table, path, "embed.nodes/1", mark.params, mark.fingerprint)
    return read_cache(tmp_path, ENCODER, PLAN.buckets, OWN | {"boxes"})


def test_views_are_the_nodes_of_their_kinds(cache: Cache) -> None:
    batch = cache.batch(torch.arange(6))
    for regions, nodes in (("grid", [2, 4, 6, 8]), ("crop", [3, 5, 7]), ("all", [2, 3, 4, 5, 6, 7, 8])):
        found = Regions.measure(cache, RegionSettings(regions=regions))
        views = found(batch)
        assert torch.equal(views.whole, batch.nodes[:, 0])
        assert torch.equal(views.object, batch.nodes[:, 1])
        assert torch.equal(views.local, batch.nodes[:, nodes])
        assert torch.equal(views.mask, batch.mask[:, nodes])
        assert torch.equal(found.boxes(batch), batch.box[:, [node - 1 for node in nodes]])
        again = Regions.from_state(found.state_dict(), RegionSettings(regions=regions))
        assert all(map(torch.equal, again(batch), views))
    assert torch.equal(Regions.measure(cache, RegionSettings(object="global"))(batch).object, batch.nodes[:, 0])


def test_a_batch_of_images_with_fewer_nodes_has_fewer_local_views(cache: Cache) -> None:
    """As those of new pictures may be."""
    regions, batch = Regions.measure(cache, RegionSettings(regions="crop")), cache.batch(torch.arange(6))
    whole = regions(batch)
    for count, local in ((6, 2), (2, 0), (1, 0)):
        cut = {name: getattr(batch, name)[:, :count] for name in ("nodes", "mask", "kinds")}
        fewer = batch.changed(box=batch.box[:, : count - 1], **cut)
        views = regions(fewer)
        assert torch.equal(views.local, whole.local[:, :local])
        assert torch.equal(views.mask, whole.mask[:, :local])
        assert torch.equal(views.object, batch.nodes[:, min(count - 1, 1)])
        assert torch.equal(regions.boxes(fewer), regions.boxes(batch)[:, :local])


def test_what_is_not_there_is_said(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(NotPossible, match=r"no nodes of kind token: set embed\.regions"):
        Regions.measure(cache, RegionSettings(regions="token"))
    write_cache(tmp_path / "none", Plan(object=False))
    without = read_cache(tmp_path / "none", ENCODER, PLAN.buckets, OWN)
    with pytest.raises(NotPossible, match=r"no object nodes: set embed\.regions, or settings\.object: global"):
        Regions.measure(without, RegionSettings())
    assert Regions.measure(without, RegionSettings(object="global")).local.tolist() == list(range(1, 9))


def test_scrambled_crops_are_those_of_other_images() -> None:
    batch, count = 3, 4
    local = (100 * torch.arange(batch)[:, None] + torch.arange(count))[..., None].float()
    mask = local[..., 0] != 201
    found, exists = scramble(local, mask)
    by_view = [100 * b + n for n in range(count) for b in range(batch)]  # a list of views, each of all images
    assert found.flatten().tolist() == by_view
    assert exists.flatten().tolist() == [number != 201 for number in by_view]
    assert torch.equal(scramble(local[:1], mask[:1])[0], local[:1])
