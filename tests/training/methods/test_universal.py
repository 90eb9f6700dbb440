"""What every method is held to, and what every trained one (CONTRIBUTING.md says how a new one comes in).

Test 11, the smoke run's time, is a line of a benchmark: no test asserts a time.
"""

import copy
import functools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fieldmark.command import UserError
from fieldmark.params import Block
from tests.training.cache import Plan
from training import loop, methods
from training.data import Batch, Cache, Part, kind_of, part_kinds
from training.data.again import Again
from training.data.asked import Asked
from training.data.attributes import Attributes
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.cell_descriptions import CellDescriptions
from training.data.descriptions import Descriptions
from training.data.edges import Edges
from training.data.kinds import Kinds
from training.data.labels import Labels
from training.data.links import Incoming, Links
from training.data.moments import Moments
from training.data.nodes import Globals, Nodes
from training.data.parts import ObjectParts
from training.data.projection import Projection
from training.data.tokens import Cls, Rollout, Tokens
from training.folds import settle
from training.knobs import say_knobs
from training.layers import logistic
from training.layers.logistic import assess
from training.layers.states import state_of
from training.links import LinkSettings
from training.loop import Schedule, assess_split, decayed_groups, predict, total_loss
from training.methods import BUDGET, Fitted, load_method, reads_of, search_points, single_points
from training.regimes import hide_test
from training.restore import build
from training.start import starting_point
from training.token_heads import BesideSettings

METHODS = sorted(file.stem for file in Path("training/methods").glob("[a-z]*.py"))
UNTRAINED = ["zero_shot", "description_zero_shot"]
TRAINED = [method for method in METHODS if method not in UNTRAINED]
LOOPED = [method for method in TRAINED if issubclass(load_method(method).Settings, Schedule)]  # trained by the loop
OF_TEXTS_TOO = ["prior_lda", "plda", "gda", "proker"]  # probes that set texts beside images
PROBES = [method for method in METHODS if "features" in load_method(method).Settings.model_fields]
LINKED = [method for method in METHODS if issubclass(load_method(method).Settings, LinkSettings)]  # images that send
# Those that see patches or tokens; probes see what `features` say.
LOCAL = [
    method
    for method in LOOPED
    if load_method(method).READS & {"nodes", "tokens"} and method not in ("tip_adapter", "engine", *PROBES)
] + ["pair_bottleneck"]
# 4 means hold no 32 images, nor do 4 that share the spread of other classes, nor do 4 beside texts that outvote them,
# nor weighted means of cosines with texts (labo), nor what neighbours are told (label_propagation).
HOLD_LESS = ["prototypes", "transfer_lda", "prior_lda", "plda", "gda", "labo", "label_propagation"]
BY_HEART = [method for method in TRAINED if method not in HOLD_LESS]
LEAVING_OUT = ["ridge", "rbf_ridge"]  # these choose by training images and need no val
Planted = Callable[[Plan], Cache]
OfWhole = Callable[[str, dict[str, Any]], Fitted]


FEATURES = {"features": ["global", "nodes", "pooled"]}  # of a probe that reads all it can
# Of the fit that many tests share: strengths at which the last bits of a loss do not say where L-BFGS stops.
SHARED = {**FEATURES, "l2": [1.0, 0.1], "start_l2": 0.1, "text_scale": [1.0], "nec": 2.0}
FIRST_STEPS = {"max_iterations": 5, "nec": 2.0}  # of a fit that reads all that a long one reads
# Settings under which it has every part.
WHOLE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(PROBES, FEATURES),
    **dict.fromkeys(OF_TEXTS_TOO, FEATURES | {"texts": "both"}),
    "concept_graph": {"description": True, "cell_texts": True, "nodes": "selected", "unseen": "both"},
    "description_zero_shot": {"class_names": True},
    "prolip": {"texts": "both"},
    "part_rcnn": {"mode": "strong"},
    "relational_proxies": {"boxes": True},
    "notes_graph": {"text": "description"},
    "pll_fg": {"vote": True},
    "correct_smooth": {"with_probe": {"method": "ridge", "settings": FEATURES}, "correct": [0.5], "smooth": [0.5]},
    "tape": FEATURES | {"texts": "both", "explanation": ["asked/guess/reasons"]},
    "engine": {"states": ["cls/rollout", "nodes", "pooled"], "early_exit": True},
}
BESIDE = {"method": "ridge", "settings": {"features": ["global", "pooled"]}}
# Settings under which it reads what it cannot read under those.
OTHERWISE: dict[str, list[dict[str, Any]]] = {
    method: [{"with_probe": BESIDE}, {"nodes": "tokens", **knobs}]
    for method, knobs in {"attention_pool": {}, "concept_graph": {"texts": 0}}.items()
}
# Settings under which 160 images are enough to find the cue in one of 12 cells (test 12).
WITH_THE_CUE: dict[str, dict[str, Any]] = {
    "efficient_probing": {"lr": [1e-2]},
    "engine": {"lr": [1e-2]},
    "s3n": {"lr": [3e-2], "weight_decay": [1.0], "hidden": 256},
    "swinfc": {"lr": [1e-2], "weight_decay": [3.0]},
    "pll_fg": {"lr": [3e-3], "weight_decay": [3.0]},
    "cate": {"lr": [3e-3]},
    "proden": {"lr": [1e-2], "weight_decay": [1.0], "epochs": 20},
    "ma_cnn": {"lr": [3e-2], "parts": 8},
    "part_rcnn": {"lr": [3e-3], "parts": 8},
    "trd": {
        **{"lr": [1e-2], "weight_decay": [3.0], "dropout": 0.1},
        **{"edges": "similar", "proxies": 16, "local_weight": 3.0},
    },
    "notes_graph": {"lr": [3e-3], "mean_share": 0.0, "contrast": False},
    "pair_bottleneck": {"basis": "pca", "directions": 36, "nec": None},
}
# ma_cnn looks for channels that peak together, notes_graph for the object first, trd takes the mean over a graph of
# crops, where this cue shows in one node of eight, and pair_bottleneck looks for what shows at the same place:
# tests/training/methods/test_NAME.py plants its own.
OF_ITS_OWN_CUE = ["ma_cnn", "notes_graph", "trd", "pair_bottleneck"]
# Settings under which it reads texts of classes, where one of these has no image.
OF_UNSEEN = {"concept_graph": {"unseen": "both"}}
# Alone or beside a probe, as training/token_heads.py says.
HEADS = [method for method in LOOPED if issubclass(load_method(method).Settings, BesideSettings)]
OF_NODES = {"method": "ridge", "settings": {"features": ["nodes"]}}
OTHERWISE |= {method: [{"with_probe": BESIDE}, {"with_probe": OF_NODES}] for method in HEADS}
OTHERWISE["s3n"].append({"look": "zoom"})
OTHERWISE["pmrc"] += [{"regions": "maps"}]
OTHERWISE["pair_bottleneck"] = [{"basis": "pca"}, {"basis": "span"}]
OTHERWISE["pll_fg"] += [{"attributes": "table"}, {"nodes": "tokens"}]
STATES = ["global", "cls", "again/zoom", "descriptions", "asked/guess/reasons"]
OTHERWISE["engine"] += [{"states": [name, "pooled"]} for name in STATES]
OTHERWISE["tape"] += [{"guesses": "asked/guess/guesses"}]
# Every probe can read a second look, and what was said of an image.
SAID = [{"features": ["again/zoom"]}, {"features": ["descriptions"]}, {"features": ["asked/guess/reasons"]}]
BY_LINKS = {"features": ["inherited/near"]}  # an image that is described inherits nothing
OTHERWISE |= {method: [*OTHERWISE.get(method, []), *SAID] for method in PROBES}
OTHERWISE["gaga"] += [{"annotations": "descriptions"}]
OTHERWISE["correct_smooth"] = [
    {"with_probe": {"method": "ridge", "settings": {"features": [name]}}, "correct": [0.5], "smooth": [0.5]}
    for name in ("global", "nodes", "pooled", "isqrt", "descriptions", "asked/guess/reasons")
]


def quick(method: str, cache: Cache, seed: int = 0, **knobs: object) -> Fitted:
    """A method fitted in a moment."""
    return load_method(method).fit(lend(method, cache), quick_settings(method, **knobs), seed)


def quick_settings(method: str, **knobs: object) -> Block:
    """Fewer epochs and one point of the grid, where a method has such knobs."""
    wanted = {"epochs": 4, "batch_size": 32, "weight_decay": [0.01], "hidden": 32, "precision": "fp32", **knobs}
    if method == "tip_adapter":
        wanted |= {"alpha": [10.0], "beta": [10.0]}
    of_method = load_method(method).Settings
    return of_method(**{name: value for name, value in wanted.items() if name in of_method.model_fields})


def lend(method: str, cache: Cache) -> Cache:
    """With other classes for a method that learns from them: its own stand for them, since any will do here."""
    return replace(cache, others=cache) if getattr(load_method(method), "BORROWS", False) else cache


@pytest.fixture(scope="module")
def planted(planted: Planted, device: torch.device) -> Planted:
    """A plan's cache on each device that is here."""
    return lambda plan: planted(plan).on(device)


@pytest.fixture(scope="module")
def cache(planted: Planted) -> Cache:
    return planted(Plan())


@pytest.fixture(scope="module")
def probed(planted: Planted) -> Callable[[Plan], float]:
    """The linear probe's accuracy on the test images of a plan; one fit for equal plans."""

    @functools.cache
    def accuracy(plan: Plan) -> float:
        cache = planted(plan)
        return assess_split(quick("linear_probe", cache).model, cache, "test")[0]

    return accuracy


@pytest.fixture(scope="module")
def of_cache(cache: Cache) -> Callable[[str], tuple[Fitted, Tensor]]:
    """A method fitted to `cache` and shaken, and what it said of the test images before that; one fit a method."""

    @functools.cache
    def fit(method: str) -> tuple[Fitted, Tensor]:
        fitted = quick(method, cache, **SHARED)
        said = predict(fitted.model, cache, cache.images("test"))
        shake(fitted.model)
        return fitted, said

    return fit


@pytest.fixture
def model(of_cache: Callable[[str], tuple[Fitted, Tensor]], method: str) -> torch.nn.Module:
    return of_cache(method)[0].model


@pytest.fixture
def said(of_cache: Callable[[str], tuple[Fitted, Tensor]], method: str) -> Tensor:
    """What the method says of the test images of `cache`, fitted to it as SHARED says."""
    return of_cache(method)[1]


def shake(model: torch.nn.Module) -> None:
    """Move every trained weight, so that no part is silent because training began it at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch).logits


@pytest.mark.parametrize("method", LOOPED)
def test_1_the_optimiser_holds_exactly_what_requires_a_gradient(model: torch.nn.Module, method: str) -> None:
    optimiser = torch.optim.AdamW(decayed_groups(model, 0.1))
    held = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {parameter for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", LOOPED)
def test_1_every_parameter_gets_a_gradient(model: torch.nn.Module, cache: Cache, method: str) -> None:
    batch = cache.batch(cache.images("train"))
    output = model.train()(batch)
    total_loss(output, batch.y, dict.fromkeys(output.losses, 1.0)).backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    model.zero_grad()
    assert silent == []


@pytest.mark.parametrize("method", METHODS)
def test_2_an_image_is_judged_alike_alone_and_in_any_batch(
    model: torch.nn.Module, cache: Cache, method: str
) -> None:
    images = cache.images("test")
    together = logits(model, cache.batch(images))
    some = slice(None, None, 4)  # of every class, and of as many nodes as any
    alone = torch.cat([logits(model, cache.batch(image[None])) for image in images[some]])
    backwards = logits(model, cache.batch(images.flip(0))).flip(0)
    torch.testing.assert_close(alone, together[some], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backwards, together, atol=1e-4, rtol=1e-4)


def pad(batch: Batch, extra: int) -> Batch:
    """`extra` more nodes that do not exist, with noise where it must not matter."""
    shapes = {
        "nodes": (0, 0, 0, extra), "mask": (0, extra), "box": (0, 0, 0, extra), "concept_idx": (0, 0, 0, extra),
        "concept_weight": (0, 0, 0, extra), "selected": (0, extra), "density": (0, extra),
        "adjacency": (0, 0, 0, extra, 0, extra), "kinds": (0, extra),
    }  # fmt: skip
    padded = batch.changed(**{name: F.pad(getattr(batch, name), shape) for name, shape in shapes.items()})
    gone = ~padded.mask
    also = tuple(other.changed(nodes=F.pad(other.nodes, shapes["nodes"])) for other in batch.also)
    for other in also:
        other.nodes[gone] = 9.0
    padded.nodes[gone], padded.concept_weight[gone], padded.density[gone], padded.selected[gone] = 9.0, 0.5, 3.0, True
    padded.adjacency[gone] = padded.adjacency.transpose(1, 2)[gone] = 1.0
    return padded.changed(also=also)


@pytest.mark.parametrize("method", METHODS)
def test_3_padding_does_not_matter(model: torch.nn.Module, cache: Cache, method: str) -> None:
    batch = cache.batch(cache.images("test"))
    padded = pad(batch, 3)
    torch.testing.assert_close(logits(model, padded), logits(model, batch), atol=1e-4, rtol=1e-4)
    scores = model(padded).node_scores
    if scores is not None:
        assert scores[~padded.mask].abs().sum() == 0
        assert scores.min() >= 0
        assert scores.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_4_the_order_of_patches_does_not_matter(model: torch.nn.Module, cache: Cache, method: str) -> None:
    batch = cache.batch(cache.images("test"))
    # Who reads kinds knows the object by its place, behind the whole picture.
    first = 2 if "kinds" in load_method(method).READS else 1
    rest = torch.randperm(batch.nodes.shape[1] - first, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.arange(first), first + rest])
    names = ("nodes", "mask", "kinds", "concept_idx", "concept_weight", "selected", "density", "adjacency")
    permuted = batch.changed(
        box=batch.box[:, order[1:] - 1], **{name: getattr(batch, name)[:, order] for name in names}
    )
    permuted = permuted.changed(adjacency=permuted.adjacency[:, :, order])
    torch.testing.assert_close(logits(model, permuted), logits(model, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_5_evaluation_repeats_itself(model: torch.nn.Module, cache: Cache, method: str) -> None:
    batch = cache.batch(cache.images("test"))
    assert torch.equal(logits(model, batch), logits(model, batch))


@pytest.mark.parametrize("method", METHODS)
def test_6_evaluation_does_not_look_at_labels(model: torch.nn.Module, cache: Cache, method: str) -> None:
    batch = cache.batch(cache.images("test"))
    blind = batch.changed(y=torch.zeros_like(batch.y), target=torch.zeros_like(batch.target))
    assert torch.equal(logits(model, blind), logits(model, batch))
    assert model.eval()(batch).losses == {}


@pytest.mark.parametrize("method", BY_HEART)
def test_7_it_can_learn_32_images_by_heart(planted: Planted, method: str) -> None:
    cache = planted(Plan(train=8, val=16, test=1, cue="none", concepts=10))  # more concepts than dimensions
    assert len(cache.images("train")) == 32
    # Val holds the training images, so that the choice of the epoch and of l2 favours what is learned by heart.
    by_heart = with_val(cache, cache.images("train"))
    # What leaving out would choose is given: pure noise is told best by a fit that learns nothing.
    weak = {"with_probe": {"method": "ridge", "settings": {"penalty": [1e-3]}}} if method == "correct_smooth" else {}
    fitted = quick(method, by_heart, epochs=40, lr=[1e-2], l2=[1.0, 1e-4], penalty=[1e-3], **weak)
    assert assess_split(fitted.model, by_heart, "train")[0] >= 0.99


def with_val(cache: Cache, images: Tensor) -> Cache:
    """The same cache whose val images are copies of `images` (as many as val has)."""
    val = cache.images("val")
    assert len(val) == len(images)
    source = torch.arange(len(cache.paths))
    source[val] = images
    copied = cache.take(source)
    return replace(copied, paths=cache.paths, split=cache.split)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_8_shuffled_labels_leave_chance_on_val(planted: Planted, method: str) -> None:
    cache = planted(Plan(val=50))
    y = cache.y.clone()
    for split in ("train", "val"):
        images = cache.images(split)
        y[images] = y[images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]]
    shuffled = replace(cache, y=y, target=y)
    accuracy, _ = assess_split(quick(method, shuffled).model, shuffled, "val")
    # 4 classes, 200 images: a deviation is 3 points, and choosing on val among a few fits adds some.
    assert accuracy < 0.25 + 4 * 0.031


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["one patch", "no patch", "no concepts", "no edges", "half"])
def test_9_the_loss_is_finite_in_every_corner(
    model: torch.nn.Module, cache: Cache, method: str, case: str
) -> None:
    batch = cache.batch(cache.images("train")[:6])
    if case in ("one patch", "no patch"):
        n = 2 if case == "one patch" else 1
        names = ("nodes", "mask", "kinds", "concept_idx", "concept_weight", "selected", "density")
        batch = batch.changed(box=batch.box[:, : n - 1], **{name: getattr(batch, name)[:, :n] for name in names})
        batch = batch.changed(adjacency=batch.adjacency[:, :1].new_zeros(6, n, n, 2))
    elif case == "no concepts":
        batch = batch.changed(concept_idx=batch.concept_idx[..., :0], concept_weight=batch.concept_weight[..., :0])
    elif case == "no edges":
        batch = batch.changed(adjacency=torch.zeros_like(batch.adjacency))
    else:
        batch = batch.changed(nodes=batch.nodes.half(), concept_weight=batch.concept_weight.half())
    assert batch.d.shape[1] == 0
    for mode in (True, False):
        output = model.train(mode)(batch)
        assert torch.isfinite(total_loss(output, batch.y, dict.fromkeys(output.losses, 1.0)))


@pytest.mark.parametrize("method", METHODS)
def test_10_a_saved_model_says_the_same(
    of_cache: Callable[[str], tuple[Fitted, Tensor]], cache: Cache, method: str, tmp_path: Path
) -> None:
    fitted, _ = of_cache(method)
    assert_saved(fitted.model, method, settle(quick_settings(method, **SHARED), fitted.chosen), cache, tmp_path)


def assert_saved(model: torch.nn.Module, method: str, settings: Block, cache: Cache, folder: Path) -> None:
    """A model that is made of the saved state alone is what it was."""
    images = cache.images("test")
    save_file(state_of(model), folder / "model.safetensors")
    other = build(method, settings, len(cache.classes), load_file(folder / "model.safetensors")).to(cache.device)
    assert torch.equal(predict(other, cache, images), predict(model, cache, images))


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_12_it_is_no_worse_than_the_linear_probe_where_its_cue_is_the_only_one(
    planted: Planted, probed: Callable[[Plan], float], method: str
) -> None:
    # The cue may lie in the object, which is there for those alone that read it.
    has_object = "object" in load_method(method).Settings.model_fields
    # Who hears others hears its own class alone: else what they hear is a noise that the probe has not.
    heard = {"links": 20, "linked": 1.0} if method in LINKED else {}
    cue: Any = "local" if method in LOCAL else "global"
    plan = Plan(cue=cue, train=40, val=15, test=40, object=has_object, **heard)
    cache = planted(plan)
    knobs = {"epochs": 40, "hidden": 64, **WITH_THE_CUE.get(method, {})}
    ours = assess_split(quick(method, cache, **knobs).model, cache, "test")[0]
    assert ours >= probed(plan)
    assert ours > 0.9 or method in OF_ITS_OWN_CUE


# Where the global vector is noise, so is what texts say of it; links are not, whoever they lead to.
@pytest.mark.parametrize("method", [method for method in PROBES if method not in ("gda", "proker", *LINKED)])
def test_12_a_probe_of_nodes_sees_a_cue_that_the_global_vector_lacks(planted: Planted, method: str) -> None:
    cache, knobs = planted(Plan(cue="local", train=40, val=15, test=40)), WITH_THE_CUE.get(method, {})
    blind, ours = (
        assess_split(quick(method, cache, features=[name], l2=[0.1], **knobs).model, cache, "test")[0]
        for name in ("global", "nodes")
    )
    # Mean and maximum over nine nodes dilute the one that carries the cue; chance is 0.25.
    assert blind < 0.4
    assert ours > 0.65


# In la_tag training images alone send.
@pytest.mark.parametrize("method", [method for method in LINKED if method != "la_tag"])
def test_images_without_a_label_send_where_all_do(planted: Planted, method: str) -> None:
    """As a run gives it: what is judged has no class and no target."""
    cache = planted(Plan(classes=3, train=4, val=4, test=2))
    val = cache.images("val").numpy()
    split = cache.split.copy()
    split[val[::2]] = "choose"
    cache = replace(cache, split=split)
    fitted = quick(method, hide_test(cache), sources="all", epochs=1)
    assert predict(fitted.model, cache, cache.images("test")).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_few_shots_a_class_without_images_and_no_val(cache: Cache, method: str) -> None:
    split = cache.split.copy()
    split[(split == "val") | ((split == "train") & (cache.y == 0).cpu().numpy())] = "none"
    bare = lend(method, replace(cache, split=split))
    module = load_method(method)
    settings = module.Settings(**{"epochs": 2} if "epochs" in module.Settings.model_fields else {})
    fixed = single_points(settings)[-1]
    assert search_points(fixed) == 1
    if search_points(settings) > 1 and method not in LEAVING_OUT:
        with pytest.raises(
            UserError, match=r"val holds no image, so nothing can choose among .*; give each of them one"
        ):
            module.fit(bare, settings, 0)
    fitted = module.fit(bare, fixed, 0)
    assert all(row.keys() == fitted.history[0].keys() for row in fitted.history)
    assert math.isnan(fitted.history[-1]["val_accuracy"])
    seen = predict(fitted.model, bare, bare.images("train"))
    assert torch.isfinite(seen).all()
    if method in TRAINED:  # nothing speaks for the class but its texts
        assert (seen.argmax(1) == 0).float().mean() < 0.1


@pytest.mark.parametrize("method", TRAINED)
def test_probabilities_that_are_sure_teach_what_classes_do(cache: Cache, said: Tensor, method: str) -> None:
    told = replace(cache, target=F.one_hot(cache.target, len(cache.classes)).float())
    images = cache.images("test")
    by_probability = predict(quick(method, told, **SHARED).model, told, images)
    torch.testing.assert_close(said, by_probability, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("method", TRAINED)
def test_training_reads_what_it_is_told_and_not_the_truth(cache: Cache, said: Tensor, method: str) -> None:
    y = cache.y.clone()
    y[cache.images("train")] = 0
    lied = replace(cache, y=y)
    assert torch.equal(said, predict(quick(method, lied, **SHARED).model, lied, cache.images("test")))


def change(cache: Cache, parts: Collection[str]) -> Cache:
    """The cache with other parts, by the words of READS; the rest is as it was."""
    words = {Moments: "moments", Asked: "asked"}
    parts = {words.get(kind_of(part), part) for part in parts}
    generator = torch.Generator().manual_seed(0)
    bank, of_names = cache.part(Bank), cache.part(Bank).of_kind("name")
    other = F.normalize(torch.randn(bank.K.shape, generator=generator), dim=1).to(bank.K.device)
    changed = of_names & ("names" in parts) | ~of_names & ("concepts" in parts)
    own = bank.own.roll(1, dims=1) if "owners" in parts else bank.own
    cache = cache.change(Bank, K=torch.where(changed[:, None], other, bank.K), owners=own)
    order = torch.randperm(len(cache.part(Labels).density), generator=generator)
    by_row: dict[str, type[Part]] = {
        "labels": Labels, "boxes": Boxes, "descriptions": Descriptions, "cell_descriptions": CellDescriptions,
        "moments": Moments, "again": Again, "tokens": Tokens, "cls": Cls, "rollout": Rollout, "parts": ObjectParts,
        "asked": Asked,
    }  # fmt: skip
    for name in by_row.keys() & parts:
        # One image has sentences; they go to one of another class.
        rows = order if "descriptions" not in name else torch.arange(len(cache.paths)).roll(8)
        cache = cache.with_part(cache.part(by_row[name]).take(rows, rows))
    if "projection" in parts:
        cache = cache.change(Projection, weight=cache.part(Projection).weight.flip(1))
    if "globals" in parts and cache.has(Globals):
        cache = cache.change(Globals, g=cache.part(Globals).g[order])
    if "nodes" in parts:
        cache = cache.change(Nodes, nodes=cache.part(Nodes).nodes[order])
    if "kinds" in parts:
        kinds = cache.part(Kinds).kinds.clone()
        kinds[:, -1] = 0
        cache = cache.change(Kinds, kinds=kinds)
    if "attributes" in parts:
        cache = cache.change(Attributes, table=cache.part(Attributes).table.roll(1, dims=0))
    if "links" in parts:
        incoming = cache.part(Links).incoming
        turned = {name: Incoming(edges.start, edges.source.roll(1), edges.weight) for name, edges in incoming.items()}
        cache = cache.change(Links, incoming=turned)
    return cache.change(Edges, count=torch.zeros_like(cache.part(Edges).count)) if "edges" in parts else cache


@pytest.fixture(scope="module")
def whole(planted: Planted) -> Cache:
    """Every part that a method reads, the global vectors by themselves too."""
    plan = Plan(classes=3, train=8, val=4, test=4, rings=3, sentences=2, described="all", told=True, ragged=False)
    cache = planted(plan)
    return cache.with_part(Globals(cache.part(Nodes).nodes[:, 0].clone()))


def only_point(method: str, knobs: dict[str, Any]) -> Block:
    """One point of the grid, the last: what is read is read whatever val would choose, and a search takes long.

    It is read at the first steps of a fit as well.
    """
    few = {"epochs": 1, **FIRST_STEPS} | ({} if "with_probe" in knobs else {"start_l2": 1.0})
    return single_points(quick_settings(method, **{**few, **knobs}))[-1]


def fit_point(method: str, cache: Cache, knobs: dict[str, Any]) -> Fitted:
    return load_method(method).fit(lend(method, cache), only_point(method, knobs), 0)


def predicted(method: str, cache: Cache, knobs: dict[str, Any]) -> Tensor:
    return predict_whole(fit_point(method, cache, knobs), cache)


def predict_whole(fitted: Fitted, cache: Cache) -> Tensor:
    return predict(fitted.model, cache, torch.arange(len(cache.paths)))


@pytest.fixture(scope="module")
def of_whole(whole: Cache) -> OfWhole:
    """A method fitted on `whole`; one fit for equal knobs."""
    made: dict[str, Fitted] = {}

    def fit(method: str, knobs: dict[str, Any]) -> Fitted:
        key = f"{method} {knobs}"
        if key not in made:
            made[key] = fit_point(method, whole, knobs)
        return made[key]

    return fit


@pytest.mark.parametrize("method", WHOLE)
def test_10_a_saved_model_with_every_part_says_the_same(
    whole: Cache, of_whole: OfWhole, method: str, tmp_path: Path
) -> None:
    knobs = WHOLE[method]
    fitted = of_whole(method, knobs)
    model = copy.deepcopy(fitted.model)
    shake(model)
    assert_saved(model, method, settle(only_point(method, knobs), fitted.chosen), whole, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_what_it_does_not_declare_to_read_cannot_change_it(whole: Cache, of_whole: OfWhole, method: str) -> None:
    reads = load_method(method).READS
    # Node 0 is the global vector: who reads nodes reads it.
    rest = frozenset(part_kinds()) - reads - ({"globals"} if "nodes" in reads else set())
    rest -= {"pooled"} if "moments" in reads else set()
    rest -= {"moments"} if "pooled" in reads else set()
    knobs = WHOLE.get(method, {})
    assert torch.equal(predicted(method, change(whole, rest), knobs), predict_whole(of_whole(method, knobs), whole))


def reads(method: str, knobs: dict[str, Any], part: str) -> bool:
    """Whether a method says that it reads a part, a word of READS, under these knobs."""
    return kind_of(part) in {kind_of(name) for name in reads_of(method, only_point(method, knobs))}


@pytest.mark.parametrize("method", METHODS)
def test_what_it_declares_to_read_changes_it(whole: Cache, of_whole: OfWhole, planted: Planted, method: str) -> None:
    """So that a declaration without one of them would not pass the test above."""
    every = [WHOLE.get(method, {}), *OTHERWISE.get(method, [])]
    lacking = planted(Plan(classes=6, train=6, val=4, test=4)) if method in OF_UNSEEN else None
    if lacking is not None:
        unseen = (lacking.split == "train") & (lacking.y == 0).cpu().numpy()
        lacking = replace(lacking, split=np.where(unseen, "unused", lacking.split))
        told = predicted(method, lacking, OF_UNSEEN[method])
    for part in load_method(method).READS:
        changed = change(whole, frozenset({part}))
        # Some of the settings read it: those that say so are asked first.
        found = any(
            not torch.equal(predicted(method, changed, knobs), predict_whole(of_whole(method, knobs), whole))
            for knobs in sorted(every, key=lambda knobs: not reads(method, knobs, part))
        )
        if not found and lacking is not None:
            changed = change(lacking, frozenset({part}))
            found = not torch.equal(predicted(method, changed, OF_UNSEEN[method]), told)
        if not found and part == "links":
            one = planted(Plan(classes=3, train=8, val=4, test=4, sentences=2))  # the first image alone is described
            changed = change(one, frozenset({part}))
            found = not torch.equal(predicted(method, changed, BY_LINKS), predicted(method, one, BY_LINKS))
        assert found, part


@pytest.mark.parametrize("method", METHODS)
def test_it_needs_no_more_than_it_declares(whole: Cache, of_whole: OfWhole, method: str) -> None:
    module, knobs = load_method(method), WHOLE.get(method, {})
    told = whole.only(module.READS)
    assert torch.equal(predicted(method, told, knobs), predict_whole(of_whole(method, knobs), whole))
    settings = module.Settings()
    reads = reads_of(method, settings)
    assert {kind_of(name) for name in reads} <= {kind_of(name) for name in module.READS}
    assert torch.equal(predicted(method, whole.only(reads), {}), predict_whole(of_whole(method, {}), whole))


@pytest.mark.parametrize("method", METHODS)
def test_what_it_declares_and_does_not_get_is_missed_with_a_clear_error(whole: Cache, method: str) -> None:
    module, knobs = load_method(method), WHOLE.get(method, {})
    # Of the parts of a knob, the nodes hold the global vectors too.
    reads = reads_of(method, module.Settings(**knobs))
    for part in reads - {"names", "concepts"}:  # these are zero where they are not declared
        with pytest.raises(UserError, match=r"READS"):
            predicted(method, whole.only(reads - {part}), knobs)


@pytest.mark.parametrize("method", METHODS)
def test_every_knob_says_what_it_is(method: str) -> None:
    for line in say_knobs(method).splitlines()[1:]:
        assert re.search(r"\S  +# \S", line) or line == "loss_weights:", line


@pytest.mark.parametrize("method", METHODS)
def test_the_search_keeps_to_the_budget(method: str) -> None:
    settings = load_method(method).Settings()
    points = single_points(settings)
    assert len(points) == search_points(settings) <= BUDGET
    assert all(search_points(point) == 1 for point in points)
    assert len({point.model_dump_json() for point in points}) == len(points)


@pytest.mark.parametrize("method", METHODS)
def test_12_it_looks_at_val_no_more_often_than_its_rivals(
    planted: Planted, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings times the moments at which val is looked at; a start at the rival is the rival's own search."""
    cache = planted(Plan(train=6))  # a step an epoch: looks are counted, whatever is learned
    looks, labels = 0, cache.y[cache.images("val")]

    def counted(logits: Tensor, y: Tensor) -> tuple[float, float]:
        nonlocal looks
        looks += torch.equal(y, labels)
        return assess(logits, y)

    class Counted(logistic.Tally):
        def result(self) -> tuple[float, float]:
            nonlocal looks
            looks += torch.equal(torch.cat([y for _, y in self.waiting]), labels)
            return super().result()

    starting_point(cache, None, None)  # and is remembered
    monkeypatch.setattr(methods, "assess", counted)
    for module in (logistic, loop):  # not ridge: what it says of val chooses nothing
        monkeypatch.setattr(module, "Tally", Counted)
    module = load_method(method)
    small = {"max_iterations": 1}
    if method in LOOPED and method != "tip_adapter":
        # As many epochs as looks: behind each of more than these it would look no more often.
        small |= {"hidden": 8, "batch_size": 48, "epochs": BUDGET // search_points(module.Settings())}
    known = {name: value for name, value in small.items() if name in module.Settings.model_fields}
    module.fit(lend(method, cache), module.Settings(**known), 0)
    assert (method in LOOPED) <= looks <= BUDGET
