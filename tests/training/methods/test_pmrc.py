"""The graph of regions, and how they are found, against loops and closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.cache import GRID, Plan
from tests.training.methods.test_universal import quick
from training.data import Batch, Cache
from training.data.kinds import KINDS
from training.data.parts import ObjectParts
from training.data.tokens import as_shape
from training.layers.blocks import Standardise
from training.layers.boxes import centre_and_sides, keep_apart
from training.layers.losses import rank_hinge, reverse_cross_entropy
from training.methods import reads_of
from training.methods.pmrc import APART, PMRC, Found, Maps, Message, Navigator, Settings, log_edges, messages
from training.region_heads import Regions
from training.token_heads import Beside

IMAGES, LOCAL, WIDTH, CLASSES, CELLS = 4, 9, 10, 3, GRID[0] * GRID[1]
Planted = Callable[[Plan], Cache]


def batch_of() -> Batch:
    """Images of LOCAL crops, of which the second has two and the last none."""
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(IMAGES, 1 + LOCAL, WIDTH, generator=generator)
    mask = torch.ones(IMAGES, 1 + LOCAL, dtype=torch.bool)
    mask[1, 3:] = mask[3, 1:] = False
    kinds = torch.tensor([KINDS.index(kind) for kind in ("global", *["crop"] * LOCAL)]) * mask
    corner = 0.6 * torch.rand(IMAGES, LOCAL, 2, generator=generator)
    tokens = torch.randn(IMAGES, CELLS, WIDTH, generator=generator)
    y = torch.arange(IMAGES) % CLASSES
    return Batch(
        y,
        y,
        {
            "nodes": nodes * mask[..., None], "mask": mask, "kinds": kinds, "tokens": tokens,
            "box": torch.cat([corner, corner + 0.3], dim=2), "token_grid": as_shape(GRID),
        },
    )  # fmt: skip


def made(**knobs: Any) -> PMRC:
    torch.manual_seed(0)
    settings, batch = Settings(**{"hidden": 8, "count": 4, "dropout": 0.0, **knobs}), batch_of()
    scale = Standardise(batch.nodes[batch.mask])
    if settings.regions == "maps":
        find: Navigator | Maps = Maps(Standardise(batch.tokens.flatten(0, 1)), settings)
    else:
        regions = Regions(0, torch.arange(1, 1 + LOCAL), settings.of_nodes.local_kinds)
        find = Navigator(scale, regions, settings)
    head = PMRC(scale, find, Beside(None), CLASSES, settings)
    for classify in (head.classify, head.classify_whole, head.classify_region):
        nn.init.normal_(classify.weight)
    return head.eval()


def some_centres(seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, R, 2), and which regions are real: all, three, one, none."""
    centre = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(seed))
    real = torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    return centre, real


def test_an_edge_is_a_gaussian_of_the_distance_of_centres() -> None:
    sigma, (centre, _) = 0.25, some_centres()
    e = log_edges(centre, sigma).exp()
    for image in range(4):
        for i in range(5):
            for j in range(5):
                distance = math.dist(centre[image, i].tolist(), centre[image, j].tolist())
                assert e[image, i, j].item() == pytest.approx(math.exp(-(distance**2) / (2 * sigma**2)), rel=1e-4)
    known = torch.tensor([[[0.1, 0.2], [0.1 + sigma * math.sqrt(2), 0.2]]])
    torch.testing.assert_close(log_edges(known, sigma).exp(), torch.tensor([[[1, math.exp(-1)], [math.exp(-1), 1]]]))
    torch.testing.assert_close(e, e.transpose(1, 2))
    torch.testing.assert_close(log_edges(centre + torch.tensor([0.3, -0.2]), sigma).exp(), e)


def test_rows_sum_to_one_over_the_other_regions_that_are_real() -> None:
    centre, real = some_centres()
    weight, e = messages(centre, real, 0.25), log_edges(centre, 0.25).exp()
    for image, count in enumerate((5, 3, 1, 0)):
        expected = torch.zeros(5, 5)
        for i in range(count):
            others = [j for j in range(count) if j != i]
            for j in others:
                expected[i, j] = e[image, i, j] / sum(e[image, i, k] for k in others)
        torch.testing.assert_close(weight[image], expected)


def test_a_wide_graph_hears_all_alike_and_a_narrow_one_the_nearest_alone() -> None:
    centre, real = some_centres()
    everyone = torch.full((5, 5), 1 / 4).fill_diagonal_(0)
    torch.testing.assert_close(messages(centre, real, 1e4)[0], everyone)
    distance = torch.cdist(centre[0], centre[0]).fill_diagonal_(torch.inf)
    assert torch.equal(messages(centre, real, 1e-3)[0], F.one_hot(distance.argmin(1), 5).float())


def test_a_message_is_a_weighted_mean_of_the_others_beside_one_s_own() -> None:
    torch.manual_seed(0)
    (centre, real), message, v = some_centres(), Message(8), torch.randn(4, 5, 8)
    weight = messages(centre, real, 0.25)
    found = message(v, weight)
    for image in range(4):
        for i in range(5):
            heard = sum((weight[image, i, j] * v[image, j] for j in range(5)), torch.zeros(8))
            said = message.graph.own.weight @ v[image, i] + message.graph.neighbours.weight @ heard
            expected = message.norm(v[image, i] + F.relu(said + message.graph.neighbours.bias))
            torch.testing.assert_close(found[image, i], expected)


def test_regions_in_another_order_hear_the_same() -> None:
    head, (centre, real), v = made(), some_centres(), torch.randn(4, 5, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = head.pass_messages(Found(v, centre, real, None))
    moved = head.pass_messages(Found(v[:, order], centre[:, order], real[:, order], None))
    torch.testing.assert_close(moved, found[:, order])


def test_regions_are_the_nodes_that_score_highest_and_keep_apart() -> None:
    head, batch = made(), batch_of()
    find = head.find
    assert isinstance(find, Navigator)
    found = find(batch)
    local, mask = find.project.standardise(batch.nodes[:, 1:]), batch.mask[:, 1:]
    scores = find.score(find.project.standardise(batch.nodes[:, 1:])).squeeze(-1)
    place, real = keep_apart(scores, batch.box, mask, 4, APART)
    assert torch.equal(found.real, real)
    assert APART == 0.25
    assert found.scores is not None
    for image in range(IMAGES):
        for rank in real[image].nonzero().flatten().tolist():
            node = int(place[image, rank])
            expected = find.project.norm(find.project.linear(local[image, node]))
            torch.testing.assert_close(found.v[image, rank], expected)
            torch.testing.assert_close(found.centre[image, rank], centre_and_sides(batch.box)[0][image, node])
            torch.testing.assert_close(found.scores[image, rank], scores[image, node])
    assert real.sum(1).tolist()[3] == 0


def test_the_picture_and_its_regions_make_the_logits_whatever_fills_the_rest() -> None:
    head, batch = made(), batch_of()
    found = head.find(batch)
    v = head.pass_messages(found)
    expected = [
        head.classify(torch.cat([head.whole(batch.g[image]), *(v[image] * found.real[image, :, None])]))
        for image in range(IMAGES)
    ]
    torch.testing.assert_close(head(batch).logits, torch.stack(expected))


def test_where_regions_lie_counts() -> None:
    """The reference code finds the cells and never looks at where they are."""
    head, batch = made(), batch_of()
    box = batch.box.clone()
    box[0] = torch.cat([box[0, :, :2] / 9, box[0, :, :2] / 9 + 0.01], dim=1)
    assert not torch.allclose(head(batch.changed(box=box)).logits[0], head(batch).logits[0], atol=1e-3)
    find = made(regions="maps").find
    assert isinstance(find, Maps)
    assert torch.autograd.grad(find(batch).centre[..., 0].sum(), find.branch.weight)[0].any()


def test_a_map_is_a_softmax_over_cells_and_its_centre_the_mean_of_their_places() -> None:
    head, batch = made(regions="maps"), batch_of()
    find = head.find
    assert isinstance(find, Maps)
    found = find(batch)
    x = find.scale(batch.tokens)
    for image in range(IMAGES):
        for branch in range(4):
            a = torch.stack([find.branch.weight[branch] @ token for token in x[image]]).softmax(0)
            places = [((cell % GRID[1] + 0.5) / GRID[1], (cell // GRID[1] + 0.5) / GRID[0]) for cell in range(CELLS)]
            expected = sum(share * torch.tensor(place) for share, place in zip(a, places, strict=True))
            torch.testing.assert_close(found.centre[image, branch], expected)
            pooled = sum(share * token for share, token in zip(a, x[image], strict=True))
            torch.testing.assert_close(found.v[image, branch], find.project(pooled))
    assert found.real.all()
    assert found.scores is None
    with torch.no_grad():
        find.branch.weight[1] = 90 * x[2, 7]
    torch.testing.assert_close(find(batch).centre[2, 1], torch.tensor([3.5 / 4, 1.5 / 3]))


def test_each_loss_is_what_it_says() -> None:
    head, batch = made(loss_weights={"reverse": 0.1}).train(), batch_of()
    output, found = head(batch), head.find(batch)
    assert found.scores is not None
    losses, y = output.losses, batch.target
    whole = F.cross_entropy(head.classify_whole(head.whole(batch.g)), y)
    torch.testing.assert_close(losses["whole"], whole)
    sure = torch.stack([head.classify_region(v).log_softmax(1)[:, label] for v, label in zip(found.v, y, strict=True)])
    torch.testing.assert_close(losses["regions"], -sure[found.real].mean())
    torch.testing.assert_close(losses["rank"], rank_hinge(found.scores, sure, found.real))
    torch.testing.assert_close(losses["reverse"], reverse_cross_entropy(output.logits, y))
    assert made().train()(batch).losses.keys() == {"whole", "regions", "rank"}
    assert made(regions="maps").train()(batch).losses.keys() == {"whole", "regions"}


def test_the_navigator_learns_by_the_order_of_regions_alone() -> None:
    head, batch = made().train(), batch_of()
    find, output = head.find, head(batch)
    assert isinstance(find, Navigator)
    score = list(find.score.parameters())
    rest = F.cross_entropy(output.logits, batch.target) + output.losses["whole"] + output.losses["regions"]
    assert torch.autograd.grad(rest, score, retain_graph=True, allow_unused=True) == (None,) * len(score)
    assert torch.autograd.grad(output.losses["rank"], score[0])[0].any()


@pytest.mark.slow
def test_the_navigator_finds_the_patch_that_shows_the_class(planted: Planted) -> None:
    cache = planted(Plan(cue="local", train=40, val=15, test=40, object=False))
    shares = []
    for rank in (0.0, 1.0):
        head = quick("pmrc", cache, epochs=20, count=4, hidden=64, lr=[3e-3], loss_weights={"rank": rank}).model
        assert isinstance(head, PMRC)
        images = cache.images("test")
        with torch.no_grad():
            centre = head.eval().find(cache.batch(images)).centre[:, 0]
        shown = centre_and_sides(cache.part(ObjectParts).part_box[images, 0])[0]
        shares.append(((centre.cpu() - shown.cpu()).abs().amax(1) < 1e-3).float().mean().item())
    assert shares[0] < 0.4
    assert shares[1] > 0.8


def test_what_is_read_follows_from_how_regions_are_found() -> None:
    assert reads_of("pmrc", Settings()) == {"nodes", "kinds", "boxes"}
    assert reads_of("pmrc", Settings(regions="maps")) == {"globals", "tokens"}
    assert reads_of("pmrc", Settings(regions="maps", layer=3)) == {"globals", "tokens/3"}
    with pytest.raises(ValidationError, match="layer: only regions: maps reads tokens"):
        Settings(layer=3)
