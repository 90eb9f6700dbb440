"""TRD against an explicit loop, its graph, its proxies, and each known defect of the public code by its name."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training.cache import Plan
from tests.training.methods.test_universal import quick, quick_settings, shake
from training.data import Batch, Cache
from training.data.nodes import Nodes
from training.folds import settle
from training.layers.blocks import Standardise
from training.layers.losses import chamfer
from training.layers.states import state_of
from training.loop import assess_split, total_loss
from training.methods import load_method
from training.methods.trd import TRD, Fault, Settings, one_at_least
from training.region_heads import Regions
from training.token_heads import Beside

WIDTH, CLASSES, NODES = 6, 3, 5  # of which the last three are crops
FAULTS = get_args(Fault)


def batch_of(images: int = 4, seed: int = 0) -> Batch:
    """The second image has one crop fewer, and the last one none."""
    generator = torch.Generator().manual_seed(seed)
    nodes = F.normalize(torch.randn(images, NODES, WIDTH, generator=generator), dim=-1)
    kinds = torch.tensor([1, 2, 4, 4, 4]).repeat(images, 1)
    kinds[1, 4], kinds[-1, 2:] = 0, 0
    y = torch.randint(CLASSES, (images,), generator=generator)
    return Batch(y, y, {"nodes": nodes * (kinds > 0)[..., None], "mask": kinds > 0, "kinds": kinds})


def whole_batch(images: int = 4, seed: int = 0) -> Batch:
    """Every image has all crops."""
    generator = torch.Generator().manual_seed(seed)
    nodes = F.normalize(torch.randn(images, NODES, WIDTH, generator=generator), dim=-1)
    kinds = torch.tensor([1, 2, 4, 4, 4]).repeat(images, 1)
    y = torch.randint(CLASSES, (images,), generator=generator)
    return Batch(y, y, {"nodes": nodes, "mask": kinds > 0, "kinds": kinds})


def head_of(**knobs: Any) -> TRD:
    """With every weight moved, in evaluation mode."""
    torch.manual_seed(0)
    settings = Settings(hidden=4, proxies=2, **knobs)
    regions = Regions(1, torch.tensor([2, 3, 4]), settings.local_kinds)
    head = TRD(Standardise(torch.randn(9, WIDTH)), regions, Beside(None), CLASSES, settings)
    shake(head)
    return head.eval()


def rows(batch: Batch, images: list[int]) -> Batch:
    values = {name: value[images] for name, value in batch.values.items()}
    return Batch(batch.y[images], batch.target[images], values)


def by_loop(head: TRD, l: Tensor, g: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """Logits (C,) without and with the assignment, and h (N, h), of crops l (N, D), all real."""
    settings, count = head.settings, len(l)
    alike = l @ l.T
    linked = torch.eye(count)
    for i in range(count):
        mean = sum(float(alike[i, j]) for j in range(count) if j != i) / max(count - 1, 1)
        for j in range(count):
            sign = 1 if settings.edges == "similar" else -1
            if i != j and sign * (float(alike[i, j]) - mean) > 1e-6:
                linked[i, j] = linked[j, i] = 1
    degree = linked.sum(1)
    graph = linked / (degree[:, None] * degree[None]).sqrt()
    x = head.project(l)
    x = graph @ (x @ head.graph.layers[0].linear.weight.T) + head.graph.layers[0].bias
    norm = head.graph.norms[0]
    x = x - norm.mean_scale * x.mean(0)
    x = F.relu(norm.weight * x / (x.square().mean(0) + 1e-5).sqrt() + norm.bias)
    h = graph @ (x @ head.graph.layers[1].linear.weight.T) + head.graph.layers[1].bias
    a, full, seen = h.mean(0), head.project(g), head.project(o)
    whole = head.whole(full)
    local, semantic = head.local(a) + whole, head.semantic(torch.cat([seen, a])) + whole
    said = head.whole(seen) + whole + semantic + settings.local_weight * local
    by_head = [torch.stack([H(node) for node in h]).amax(0) for H in head.heads]
    return said, said + torch.stack(by_head).amax(0), h


@pytest.mark.parametrize("edges", ["similar", "complementary"])
def test_it_equals_a_loop_over_images_crops_and_heads(edges: str) -> None:
    head, batch = head_of(edges=edges, local_weight=0.7), batch_of()
    logits = head(batch).logits
    for image, size in enumerate((3, 2, 3, 1)):  # the crop of the last one shows nothing
        g, o, *crops = batch.nodes[image]
        torch.testing.assert_close(logits[image], by_loop(head, torch.stack(crops[:size]), g, o)[1])


def test_losses_are_those_of_a_loop() -> None:
    head, batch = head_of(local_weight=0.7, dropout=0.0), whole_batch()
    output = head.train()(batch)
    assigned, distances = [], []
    for image, y in enumerate(batch.y):
        g, o, *crops = batch.nodes[image]
        said, _, h = by_loop(head, torch.stack(crops), g, o)
        torch.testing.assert_close(output.logits[image], said)
        for H in head.heads:
            assigned.append(F.cross_entropy(torch.stack([H(node) for node in h]).amax(0), y))
        graph = torch.stack([H.classify.weight[y] for H in head.heads])[None]  # type: ignore[union-attr, index]
        distances.append(chamfer(h[None], torch.ones(1, len(h), dtype=torch.bool), graph)[0])
    torch.testing.assert_close(output.losses["assignment"], torch.stack(assigned).mean())
    torch.testing.assert_close(output.losses["distance"], torch.stack(distances).mean())


def test_an_image_without_crops_has_one_that_shows_nothing() -> None:
    mask = torch.tensor([[False, True], [False, False]])
    local = torch.ones(2, 2, 3)
    assert one_at_least(local, mask)[1].tolist() == [[False, True], [True, False]]
    none, there = one_at_least(local[:, :0], mask[:, :0])
    assert there.tolist() == [[True], [True]]
    assert not none.any()


def test_all_proxies_move_in_a_step() -> None:
    head, batch = head_of(), whole_batch(8)
    before = state_of(head.heads)
    optimiser = torch.optim.SGD(head.parameters(), lr=1.0)
    output = head.train()(batch)
    total_loss(output, batch.target, {"assignment": 1.0, "distance": 1.0}).backward()
    optimiser.step()
    assert all((value != before[name]).any() for name, value in state_of(head.heads).items())
    for each in head.heads:  # of every class, not of those alone that the batch shows
        assert (each.classify.weight.grad.abs().sum(1) > 0).all()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def in_crops(planted: Callable[[Plan], Cache]) -> Cache:
    """Every crop shows the class a little; the picture and its object say nothing."""
    cache = planted(Plan(cue="none", train=40, val=15, test=40, ragged=False))
    nodes, generator = cache.part(Nodes).nodes.clone(), torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(len(cache.classes), nodes.shape[-1], generator=generator), dim=-1)
    noise = F.normalize(torch.randn(nodes[:, 2:].shape, generator=generator), dim=-1)
    nodes[:, 2:] = F.normalize(prototypes[cache.y][:, None] + noise, dim=-1).to(nodes.dtype)
    return cache.change(Nodes, nodes=nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edges", "distance"), [("complementary", "chamfer"), ("similar", "capped"), ("similar", "hausdorff")]
)
def test_it_finds_what_all_crops_show_together(in_crops: Cache, edges: str, distance: str) -> None:
    blind = quick("linear_probe", in_crops)
    assert assess_split(blind.model, in_crops, "test")[0] < 0.4
    fitted = quick("trd", in_crops, epochs=16, lr=[1e-2], edges=edges, distance=distance, local_weight=1.0)
    assert assess_split(fitted.model, in_crops, "test")[0] > 0.9


def test_crops_of_other_images_cost_what_the_crops_tell(in_crops: Cache) -> None:
    knobs: dict[str, Any] = {"epochs": 8, "lr": [1e-2], "local_weight": 1.0}
    scrambled = quick("trd", in_crops, faults=["scrambled_crops"], **knobs).model
    test = in_crops.images("test")
    mixed = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    right = scrambled.eval()(in_crops.batch(mixed)).logits.argmax(1) == in_crops.y[mixed]
    assert right.float().mean() < 0.5


# Known defects.


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_with_a_fault_is_made_again(planted: Callable[[Plan], Cache], fault: str) -> None:
    cache = planted(Plan(ragged=False))
    fitted = quick("trd", cache, epochs=1, edges="similar", faults=[fault])
    settings = settle(quick_settings("trd", epochs=1, edges="similar", faults=[fault]), fitted.chosen)
    again = load_method("trd").build(state_of(fitted.model), settings, len(cache.classes))
    again.load_state_dict(state_of(fitted.model))
    batch = cache.batch(cache.images("test"))
    assert torch.equal(again.eval()(batch).logits, fitted.model.eval()(batch).logits)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_an_image_is_judged_by_its_batch_where_crops_are_scrambled_or_heads_are_never_evaluated(
    fault: str | None,
) -> None:
    head, batch = head_of(edges="similar", faults=[] if fault is None else [fault], local_weight=1.0), whole_batch()
    with torch.no_grad():
        head.train()(batch)  # so that batch statistics are no longer those of the start
        head.eval()
        together = head(batch).logits
        alone = torch.cat([head(rows(batch, [image])).logits for image in range(4)])
        backwards = head(rows(batch, [3, 2, 1, 0])).logits.flip(0)
    by_its_batch = fault in ("scrambled_crops", "untrained_proxies")
    assert torch.allclose(alone, together, atol=1e-5) != by_its_batch
    # The statistics of a batch do not depend on its order; whose crops an image gets does.
    assert torch.allclose(backwards, together, atol=1e-5) == (fault != "scrambled_crops")


def test_scrambled_crops_are_the_only_difference() -> None:
    """The head itself is the same: with crops put back to front it says what it says without the fault."""
    plain, scrambled, batch = head_of(), head_of(faults=["scrambled_crops"]), whole_batch()
    local = batch.nodes[:, 2:]
    by_view = local.reshape(3, 4, WIDTH).transpose(0, 1)  # what scramble turns into `local`
    moved = batch.changed(nodes=torch.cat([batch.nodes[:, :2], by_view], 1))
    torch.testing.assert_close(scrambled(moved).logits, plain(batch).logits)


def test_untrained_proxies_stay_and_are_added_all_the_same(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan())
    start, end = (quick("trd", cache, epochs=epochs, lr=[0.1], faults=["untrained_proxies"]).model for epochs in (0, 8))
    assert not any(parameter.requires_grad for parameter in end.heads.parameters())
    trained = dict(end.heads.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in start.heads.named_parameters())
    batch = cache.batch(cache.images("test"))
    assert start.eval()(batch).logits.std() > 0.01  # all else is silent at first
    assert not quick("trd", cache, epochs=0).model.eval()(batch).logits.any()


@pytest.mark.parametrize(("faults", "first", "expected"), [
    ((), 2, [False, True, True]), (("recovery_once",), 2, [False, True, False]), ((), 1, [True, True, True]),
])  # fmt: skip
def test_recovery_stays_on_or_is_there_for_one_epoch(faults: tuple[str], first: int, expected: list[bool]) -> None:
    head, batch, found = head_of(faults=faults, recovery_epoch=first).eval(), whole_batch(), []
    for _ in expected:
        head.train()
        found.append([bool(head(batch).losses), bool(head(batch).losses)])
        head.eval()
    assert found == [[on, on] for on in expected]


def test_labels_of_assignments_are_those_of_other_images() -> None:
    right, wrong = head_of(), head_of(faults=["misordered_assignments"])
    answers = torch.randn(2, 4, CLASSES, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 1])
    for head, labels in ((right, [0, 1, 2, 1, 0, 1, 2, 1]), (wrong, [0, 0, 1, 1, 2, 2, 1, 1])):
        expected = [F.cross_entropy(answers[k, b], torch.tensor(labels[4 * k + b])) for k in range(2) for b in range(4)]
        torch.testing.assert_close(head.assignment(answers, y), torch.stack(expected).mean())
        torch.testing.assert_close(head.assignment(answers, F.one_hot(y).float()), torch.stack(expected).mean())


def test_an_untrained_graph_stays_as_it_was(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan())
    for faults, same in (([], False), (["untrained_gcn"], True)):
        start, end = (quick("trd", cache, epochs=epochs, lr=[0.1], faults=faults).model for epochs in (0, 8))
        pairs = zip(start.graph.parameters(), end.graph.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


def test_faults_of_the_graph_the_distance_and_the_norm_change_their_part_alone() -> None:
    batch, head = whole_batch(), head_of(edges="similar")
    views = head.regions(batch)
    linked = {fault: head_of(edges="similar", faults=[fault]).link(views.local, views.mask) for fault in FAULTS}
    plain = head.link(views.local, views.mask)
    assert {fault for fault, edges in linked.items() if not torch.equal(edges, plain)} == {"threshold_precedence"}
    h, y = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)), batch.y
    of_heads = {"untrained_proxies"}  # these are drawn otherwise
    far = {
        fault: head_of(edges="similar", faults=[fault]).distance(h, views.mask, y)
        for fault in FAULTS
        if fault not in of_heads
    }
    expected = head.distance(h, views.mask, y)
    assert {fault for fault, found in far.items() if not torch.equal(found, expected)} == {"single_minimum"}
    # Shared by views: running statistics are those of neither pictures nor crops.
    shared = head_of(faults=["shared_batch_norm"], object="global").train()
    with torch.no_grad():
        shared(batch)
    of_crops, of_pictures = (shared.project(x).mean((0, 1)) for x in (views.local, views.whole[:, None]))
    torch.testing.assert_close(of_crops, of_pictures, atol=0.5, rtol=0)  # each by its own in training
    apart = [shared.eval().project(x).mean((0, 1)) for x in (views.local, views.whole[:, None])]
    assert (apart[0] - apart[1]).abs().max() > 0.05  # and not at evaluation


def test_the_rate_falls_unless_it_is_to_stay(planted: Callable[[Plan], Cache], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, rates = planted(Plan()), list[list[float]]()
    step = torch.optim.lr_scheduler.CosineAnnealingLR.step

    def told(self: Any, *rest: Any) -> None:
        step(self, *rest)
        rates[-1].append(self.get_last_lr()[0])

    monkeypatch.setattr(torch.optim.lr_scheduler.CosineAnnealingLR, "step", told)
    for faults in ([], ["constant_rate"]):
        rates.append([])
        quick("trd", cache, lr=[0.01], faults=faults)
    assert rates[0][0] == rates[1][0] == 0.01
    assert rates[0][-1] == pytest.approx(0, abs=1e-6)
    assert rates[1] == pytest.approx([0.01] * len(rates[0]))
