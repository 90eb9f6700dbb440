"""The notes' system against explicit loops and numpy, and each of its faults for what it spoils."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pydantic
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from tests.training.cache import Plan
from training.data import Batch, Cache
from training.data.bank import Bank
from training.data.kinds import KINDS
from training.data.nodes import Nodes
from training.layers.blocks import Standardise
from training.layers.faults import BatchNorm
from training.layers.losses import info_nce
from training.loop import assess_split, predict, total_loss
from training.methods import NotPossible
from training.methods.notes_graph import (
    LOSS_WEIGHTS,
    Given,
    NotesGraph,
    Settings,
    choose_phrases,
    draw_crops,
    evenly,
    fit,
    keep_crops,
    own_reads,
    standard_phrases,
)
from training.region_heads import Regions
from training.token_heads import Beside

B, N, D, PHRASES, CLASSES, S = 6, 7, 10, 12, 3, 2
SMALL = {"hidden": 16, "select_locals": 4, "select_concepts": 5, "precision": "fp32"}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def batch_of() -> Batch:
    """Node 1 the object, then crops; the second image has three of them only."""
    nodes, mask = unit(B, N + 2, D), torch.ones(B, N + 2, dtype=torch.bool)
    mask[1, 5:] = False
    kinds = torch.full((B, N + 2), KINDS.index("crop"))
    kinds[:, 0], kinds[:, 1] = KINDS.index("global"), KINDS.index("object")
    kinds = kinds.masked_fill(~mask, KINDS.index("none"))
    y = torch.arange(B) % CLASSES
    values = {"nodes": nodes * mask[..., None], "mask": mask, "kinds": kinds}
    return Batch(y, y, {**values, "d": unit(B, S, D), "dm": torch.ones(B, S, dtype=torch.bool)})


def made(**knobs: object) -> NotesGraph:
    """With every weight moved, so that no stream is silent."""
    settings = Settings(**{**SMALL, **knobs})
    regions = Regions(1, torch.arange(2, N + 2), settings.local_kinds)
    scales = (Standardise(unit(50, D)) for _ in range(3))
    phrases = 3 * torch.randn(PHRASES, D, generator=generator())
    torch.manual_seed(0)
    given = Given(regions, *scales, phrases if settings.reads_concepts else None)
    if settings.text == "none":
        given = given._replace(text=None)
    model = NotesGraph(given, Beside(None), CLASSES, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator()))
    return model.eval()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def choice_of(model: NotesGraph, batch: Batch, image: int) -> tuple[list[int], list[int], list[int], list[int], int]:
    """In numpy: near and far phrases, crops that are kept, the phrase of each, and the crop that is contrasted."""
    settings, phrases = model.settings, model.phrases.numpy()
    g = batch.nodes[image, 1].numpy()
    crops = {n: batch.nodes[image, 2 + n].numpy() for n in range(N) if batch.mask[image, 2 + n]}
    of_phrase = [cosine(g, phrase) for phrase in phrases]
    order = sorted(range(PHRASES), key=lambda k: -of_phrase[k])
    near, far = order[: settings.select_concepts], order[: -settings.select_concepts - 1 : -1]
    reference = max(crops, key=lambda n: cosine(g, crops[n]))
    density = {n: 1 / (1 + np.linalg.norm(crop - crops[reference])) for n, crop in crops.items()}
    kept = sorted(density, key=lambda n: -density[n])[: settings.select_locals]
    said = [max(near, key=lambda k: cosine(crops[n], phrases[k])) for n in kept]
    weighed = {n: sum(of_phrase[k] * cosine(crops[n], phrases[k]) for k in near) for n in kept}
    return near, far, kept, said, max(weighed, key=lambda n: weighed[n])


def test_phrases_crops_and_the_words_of_crops_are_chosen_as_numpy_does() -> None:
    model, batch = made(), batch_of()
    views = model.regions(batch)
    found = model.choose(views.object, views.local, views.mask)
    assert found.nearby is not None
    assert found.phrase is not None
    assert found.contrasted is not None
    for image in range(B):
        near, far, kept, said, contrasted = choice_of(model, batch, image)
        torch.testing.assert_close(found.nearby.near[image], model.phrases[near])
        torch.testing.assert_close(found.nearby.far[image], model.phrases[far])
        assert found.mask[image].sum() == len(kept)
        torch.testing.assert_close(found.crops[image, : len(kept)], views.local[image, kept])
        torch.testing.assert_close(found.phrase[image, : len(kept)], model.phrases[said])
        assert kept[int(found.contrasted[image])] == contrasted


def gcn_of(model: NotesGraph, x: Tensor, linked_by: Tensor) -> Tensor:
    """The mean over nodes of three layers, node by node: x and linked_by (n, D)."""
    count = len(x)
    product = [[float(linked_by[i] @ linked_by[j]) for j in range(count)] for i in range(count)]
    mean = [sum(product[i][j] for j in range(count) if j != i) / max(count - 1, 1) for i in range(count)]
    tie = 1e-5 * max((abs(product[i][j]) for i in range(count) for j in range(count) if i != j), default=0)
    linked = [
        [i == j or product[i][j] > mean[i] + tie or product[j][i] > mean[j] + tie for j in range(count)]
        for i in range(count)
    ]
    degree = [sum(row) for row in linked]
    for step, layer in enumerate(model.network.layers):
        if step:
            norm = model.network.norms[step - 1]
            centred = x - norm.mean_scale * x.mean(0)
            x = F.relu(norm.weight * centred / (centred.square().mean(0) + 1e-5).sqrt() + norm.bias)
        moved = [layer.linear(node) for node in x]
        x = torch.stack(
            [
                sum(moved[j] / (degree[i] * degree[j]) ** 0.5 for j in range(count) if linked[i][j]) + layer.bias
                for i in range(count)
            ]
        )
    return x.mean(0)


@pytest.mark.parametrize("contrast", [False, True])
def test_logits_are_those_of_an_explicit_loop(contrast: bool) -> None:
    model, batch = made(contrast=contrast, text="description", recovery_weight=0.5), batch_of()
    said = model(batch).logits
    for image in range(B):
        _, _, kept, words, _ = choice_of(model, batch, image)
        crops, phrases = batch.nodes[image, [2 + n for n in kept]], model.phrases[words]
        x = model.scale_local(crops)
        a = gcn_of(model, model.encode(x)[:, :D] if contrast else x, crops)
        c = gcn_of(model, phrases, phrases)
        g = model.scale_whole(batch.nodes[image, 1])
        t = model.scale_text(F.normalize(batch.d[image].mean(0), dim=0))
        streams = model.streams
        expected = streams["relation"](torch.cat([g, a, t, c])) + streams["global"](g) + streams["text"](t)
        expected = expected + 0.5 * streams["local"](a) + 0.5 * streams["concept"](c)
        torch.testing.assert_close(said[image], expected, atol=1e-4, rtol=1e-4)


def test_the_losses_are_those_of_an_explicit_loop() -> None:
    model, batch = made(), batch_of()
    torch.manual_seed(1)
    found = model.train()(batch).losses
    contrast, divergence = [], []
    views = model.regions(batch)
    kept = model.choose(views.object, views.local, views.mask)
    torch.manual_seed(1)
    mean, log_variance = model.encode(model.scale_local(kept.crops)).chunk(2, dim=-1)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    for image in range(B):
        near, far, crops, _, contrasted = choice_of(model, batch, image)
        query = z[image, crops.index(contrasted)]
        keys = [model.phrases[near].mean(0), *model.phrases[far]]
        scores = torch.stack([F.cosine_similarity(query, key, dim=0) / 0.1 for key in keys])
        contrast.append(-scores.log_softmax(0)[0])
        for n in range(len(crops)):
            m, s = mean[image, n], log_variance[image, n]
            divergence.append(-0.5 * (1 + s - m.square() - s.exp()).mean())
    torch.testing.assert_close(found["contrast"], torch.stack(contrast).mean())
    torch.testing.assert_close(found["bottleneck"], torch.stack(divergence).mean())


def logits(model: NotesGraph, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch).logits


def rows(batch: Batch, images: Tensor) -> Batch:
    return Batch(batch.y[images], batch.target[images], {name: value[images] for name, value in batch.values.items()})


@pytest.mark.parametrize("faults", [(), ("idle_contrast",), ("threshold_precedence",)])
def test_the_order_of_crops_does_not_matter(faults: tuple[str, ...]) -> None:
    model, batch = made(faults=faults), batch_of()
    order = torch.cat([torch.arange(2), 2 + torch.randperm(N, generator=generator())])
    permuted = batch.changed(**{name: batch.values[name][:, order] for name in ("nodes", "mask", "kinds")})
    torch.testing.assert_close(logits(model, permuted), logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "spoils"),
    [(None, False), ("scrambled_crops", True), ("idle_contrast", False), ("threshold_precedence", False),
     ("batch_norm", False)],
)  # fmt: skip
def test_scrambled_crops_alone_let_the_batch_decide(fault: str | None, spoils: bool) -> None:
    model, batch = made(faults=(fault,) if fault else ()), batch_of()
    together = logits(model, batch)
    alone = torch.cat([logits(model, rows(batch, torch.tensor([image]))) for image in range(B)])
    assert torch.allclose(alone, together, atol=1e-4) != spoils
    again = logits(model, rows(batch, torch.arange(B).flip(0))).flip(0)
    assert torch.allclose(again, together, atol=1e-4) != spoils


def test_scrambled_crops_are_those_of_the_batch() -> None:
    batch = rows(batch_of(), torch.tensor([0, 2, 3, 4, 5]))
    model = made(faults=("scrambled_crops",), select_locals=N)
    views = model.regions(batch)
    # Crop n of image b is crop (b N + n) // B of image (b N + n) % B, in the order of likeness.
    found = model.choose(views.object, views.local, views.mask)
    for image in range(5):
        places = [divmod(image * N + n, 5) for n in range(N)]
        theirs = torch.stack([views.local[other, crop] for crop, other in places])
        expected = theirs[keep_crops(views.object[image : image + 1], theirs[None], torch.ones(1, N).bool(), N)[0]]
        torch.testing.assert_close(found.crops[image], expected)


@pytest.mark.parametrize("faults", [(), ("idle_contrast",)])
def test_what_is_contrasted_reaches_the_logits_unless_it_is_idle(faults: tuple[str, ...]) -> None:
    model, batch = made(faults=faults).train(), batch_of()
    model(batch).logits.square().sum().backward()
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.encode.parameters()]
    assert reached == [not faults] * 4
    model.zero_grad()
    output = model(batch)
    for loss in output.losses.values():
        loss.backward(retain_graph=True)
    assert all(parameter.grad.any() for parameter in model.encode.parameters())
    # Idle, the losses move no weight that any logit reads.
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("encode")]
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in others)
    model.zero_grad()
    total_loss(model(batch), batch.target, LOSS_WEIGHTS).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_random_crops_differ_from_one_evaluation_to_the_next() -> None:
    batch, faults = batch_of(), ("random_crops_at_evaluation",)
    model = made(faults=faults, num_local=3)
    torch.manual_seed(0)
    first, second = logits(model, batch), logits(model, batch)
    assert not torch.allclose(first, second, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(logits(model, batch), first)
    every = made(faults=faults)  # no more crops than num_local: nothing to draw
    torch.testing.assert_close(logits(every, batch), logits(every, batch), atol=1e-5, rtol=1e-5)
    local, mask = draw_crops(batch.l[:, 1:], batch.mask[:, 2:], 4)
    assert mask.sum(1).tolist() == [4, 3, 4, 4, 4, 4]
    for image in range(B):
        drawn = local[image][mask[image]]
        of_its_own = (drawn[:, None] == batch.l[image, 1:]).all(-1)
        assert of_its_own.any(1).all()
        assert of_its_own.sum() == len(drawn)


def test_the_precedence_fault_changes_the_edges_alone() -> None:
    right, wrong, batch = made(), made(faults=("threshold_precedence",)), batch_of()
    assert all(map(torch.equal, right.state_dict().values(), wrong.state_dict().values()))
    assert not torch.allclose(logits(right, batch), logits(wrong, batch), atol=1e-4)


def test_batch_norm_is_there_when_it_is_asked_for() -> None:
    def kinds(model: NotesGraph) -> set[type[torch.nn.Module]]:
        return {type(stream.norm) for stream in model.streams.values()}

    assert kinds(made()) == {torch.nn.LayerNorm}
    assert kinds(made(faults=("batch_norm",))) == {BatchNorm}


def test_what_is_switched_off_is_not_there() -> None:
    bare = made(concepts=False, contrast=False)
    assert set(bare.streams) == {"global", "local", "relation"}
    assert not hasattr(bare, "encode")
    assert "phrases" not in bare.state_dict()
    assert own_reads(bare.settings) == {"nodes", "kinds"}
    assert own_reads(Settings(text="description")) == {"nodes", "kinds", "concepts", "descriptions"}
    assert set(made(text="description").streams) == {"global", "local", "relation", "text", "concept"}
    for kind in ("gat", "mlp", "sage"):
        assert torch.isfinite(logits(made(graph=kind), batch_of())).all()


def test_there_are_no_more_crops_and_phrases_than_there_are() -> None:
    assert evenly(torch.arange(5), 7).tolist() == list(range(5))
    assert evenly(torch.arange(3, 12), 3).tolist() == [3, 7, 11]
    nearby = choose_phrases(unit(B, D), unit(PHRASES, D), 40)
    both = torch.cat([nearby.near, nearby.far], 1)
    assert both.shape == (B, PHRASES, D)
    assert all(len(torch.unique(each, dim=0)) == PHRASES for each in both)  # none is near and far
    assert keep_crops(unit(B, D), unit(B, N, D), torch.ones(B, N).bool(), 20).shape == (B, N)


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"contrast": False, "faults": ("idle_contrast",)}, r"idle_contrast needs contrast: true"),
        ({"graph": "mlp", "faults": ("threshold_precedence",)}, r"changes nothing without edges"),
        ({"graph": "gat", "hidden": 20}, r"multiple of heads, 8"),
        ({"faults": ("scrambled",)}, r"should be 'scrambled_crops', 'idle_contrast'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(knobs: dict[str, object], error: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=error):
        Settings(**knobs)
    assert Settings.model_validate({"faults": ["scrambled_crops"]}).faults == ("scrambled_crops",)  # as YAML has it


def test_phrases_are_standard_over_the_bank(planted: Callable[[Plan], Cache]) -> None:
    bank = planted(Plan()).part(Bank)
    K = bank.K[bank.kept].numpy()
    np.testing.assert_allclose(standard_phrases(bank).numpy(), (K - K.mean(0)) / K.std(0), atol=1e-4)
    one = replace(bank, kept=torch.arange(len(bank.K)) == 0)
    with pytest.raises(NotPossible, match=r"holds 1 kept concepts.*settings\.concepts: false"):
        standard_phrases(one)


def test_an_image_without_a_description_is_an_error(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(sentences=2))
    settings = Settings(text="description", epochs=1, weight_decay=[0.1], **SMALL)
    with pytest.raises(UserError, match=r"159 of 160 images have no description.*set describe\.enabled: true"):
        fit(cache, settings, 0)
    told = planted(Plan(sentences=2, described="all"))
    model = fit(told, settings, 0).model
    with pytest.raises(UserError, match=r"have no description"):
        predict(model, cache, cache.images("test"))
    # Texts that are not asked for need not be there.
    without = fit(cache, settings.model_copy(update={"text": "none"}), 0).model
    assert torch.isfinite(predict(without, cache, torch.arange(4))).all()


@pytest.mark.slow
def test_graph_norm_hides_what_all_crops_show(planted: Callable[[Plan], Cache]) -> None:
    """The object's crop tells nothing, and the mean of the others tells the class without an error."""
    cache = planted(Plan(cue="none", train=40, val=15, test=40))
    nodes, prototypes = cache.part(Nodes).nodes.float(), unit(4, 32)
    shown = F.normalize(nodes + 0.5 * prototypes[cache.y][:, None], dim=-1)
    shown[:, :2] = nodes[:, :2]
    cache = cache.change(Nodes, nodes=(shown * cache.part(Nodes).mask[..., None]).half())
    mean = cache.part(Nodes).nodes[:, 2:].float().sum(1)
    assert ((mean @ prototypes.T).argmax(1) == cache.y).all()
    settings = Settings(contrast=False, epochs=40, batch_size=32, weight_decay=[0.01], hidden=64, precision="fp32")
    blind, seeing = (
        assess_split(fit(cache, settings.model_copy(update={"mean_share": share}), 0).model, cache, "test")[0]
        for share in (1.0, 0.0)
    )
    assert blind < 0.5
    assert seeing > 0.9


@pytest.mark.slow
def test_it_finds_a_class_that_the_object_shows(planted: Callable[[Plan], Cache]) -> None:
    cache = planted(Plan(cue="global", train=40, val=15, test=40))
    settings = Settings(object="global", epochs=40, batch_size=32, weight_decay=[0.01], hidden=64, precision="fp32")
    assert assess_split(fit(cache, settings, 0).model, cache, "test")[0] > 0.9


def test_info_nce_is_the_cross_entropy_of_the_positive() -> None:
    scores = torch.randn(5, 4, generator=generator())
    expected = F.cross_entropy(scores, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(info_nce(scores[:, 0], scores[:, 1:]), expected)
