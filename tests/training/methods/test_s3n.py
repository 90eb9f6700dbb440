"""S3N's head: the equations against a loop over images and peaks, what draws and what does not, its four losses."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.pictures.sampler import over_picture
from tests.training.cache import GRID, Plan
from training.data import Batch, Cache
from training.data.tokens import as_shape
from training.layers.blocks import Standardise
from training.layers.response import peaks, salient_map
from training.layers.sampler import sampling_grid
from training.methods import load_method, reads_of
from training.methods.s3n import S3N, SIDE, Settings, highest, maps_of, smoothed
from training.token_heads import Beside

WIDTH, CLASSES = 10, 12


def batch_of(tokens: Tensor) -> Batch:
    y = torch.arange(len(tokens)) % CLASSES
    return Batch(y, y, {"tokens": tokens, "token_grid": as_shape(GRID)})


def made(warm_up: int = 0, **knobs: object) -> tuple[S3N, Tensor]:
    """A head that has something to say, and the tokens of six images, those of the last one all alike."""
    torch.manual_seed(0)
    tokens = torch.randn(6, math.prod(GRID), WIDTH)
    tokens[5] = tokens[5, 0]
    settings = Settings(hidden=8, dropout=0.0, **knobs)
    head = S3N(Standardise(tokens.flatten(0, 1)), Beside(None), CLASSES, settings, warm_up)
    for parameter in head.parameters():
        if parameter is not head.log_radius:
            torch.nn.init.normal_(parameter)
    return head.eval(), tokens


def response(head: S3N, tokens: Tensor) -> Tensor:
    return salient_map(head.scale(tokens), GRID, head.classify_raw.weight, head.classify_raw.bias, SIDE)


def gaussian(at: tuple[int, int], score: float, radius: float) -> Tensor:
    """Around a peak at (row, column), 1 there."""
    cells = torch.arange(SIDE)
    squared = (cells[:, None] - at[0]) ** 2 + (cells - at[1]) ** 2
    return torch.exp(-squared / (2 * (radius * math.sqrt(score) * SIDE) ** 2))


def test_it_is_a_loop_over_images_and_their_peaks() -> None:
    head, tokens = made(base_ratio=0.1, radius=0.1, complementary_radius=0.2)
    said, maps = head.answers(batch_of(tokens)), maps_of(head, batch_of(tokens))
    for image, x in enumerate(head.scale(tokens)):
        values = response(head, tokens[image : image + 1])[0]
        found = [tuple(cell) for cell in peaks(values[None])[0].nonzero().tolist() if values[tuple(cell)] > 0]
        q_d, q_c = torch.full((2, SIDE, SIDE), 0.1).unbind()
        if found:
            strong, weak = max(found, key=lambda at: values[at].item()), min(found, key=lambda at: values[at].item())
            q_d = q_d + gaussian(strong, values[strong].item(), 0.1) * values[strong]
            q_c = q_c + gaussian(weak, values[weak].item(), 0.2) / values[weak]
        torch.testing.assert_close(maps[image], over_picture(torch.stack([q_d, q_c]), GRID))

        features = [x.mean(0)]
        for q, branch in ((q_d, head.discriminative), (q_c, head.complementary)):
            grid = sampling_grid(q[None], GRID)
            read = F.grid_sample(x.T.unflatten(1, GRID)[None], grid, align_corners=True).flatten(2)[0].T
            features.append(F.gelu(branch.norm(branch.buffer(read))).mean(0))
        expected = (
            head.classify(torch.cat(features)),
            head.classify_raw(features[0]),
            head.discriminative.classify(features[1]),
            head.complementary.classify(features[2]),
        )
        for stream, one in zip(said, expected, strict=True):
            torch.testing.assert_close(stream[image], one, atol=1e-4, rtol=1e-4)
    assert torch.equal(head(batch_of(tokens)).logits, said.joint)


def test_an_image_without_a_peak_is_read_as_it_came_like_any_other() -> None:
    """The public code fails on one: its batch loses an image, or holds values that are no numbers."""
    head, tokens = made()
    alike, even = torch.tensor([5]), torch.tensor(Settings().base_ratio)
    assert (maps_of(head, batch_of(tokens))[alike] == even).all()
    for batch in (batch_of(tokens), batch_of(tokens[alike]), batch_of(tokens[alike].expand(4, -1, -1))):
        for mode in (True, False):
            output = head.train(mode)(batch)
            assert output.logits.shape == (len(batch.y), CLASSES)
            loss = sum(output.losses.values(), F.cross_entropy(output.logits, batch.y))
            head.zero_grad()
            loss.backward()
            assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)
    torch.nn.init.zeros_(head.classify_raw.weight)  # as a head begins
    assert (maps_of(head, batch_of(tokens)) == even).all()


def test_evaluation_draws_nothing_from_the_first_epoch_on() -> None:
    for warm_up in (0, 10**6):
        head, tokens = made(warm_up)
        first, before = head(batch_of(tokens)).logits, torch.get_rng_state()
        assert torch.equal(head(batch_of(tokens)).logits, first)
        assert torch.equal(torch.get_rng_state(), before)
        assert head.left == warm_up
        assert torch.equal(maps_of(head.train(), batch_of(tokens)), maps_of(head, batch_of(tokens)))


def test_training_draws_by_the_seed_how_peaks_are_dealt() -> None:
    head, tokens = made()
    scores = response(head, tokens)
    found = peaks(scores)
    head.train()
    dealt, shares = [], torch.zeros(2, *found.shape)
    for seed in (0, 0, *range(1, 400)):
        torch.manual_seed(seed)
        dealt.append(head.deal(scores, found))
        by_d, by_c = dealt[-1]
        assert torch.equal(by_d | by_c, found)
        assert not (by_d & by_c).any()
        shares += torch.stack(dealt[-1]) / 401
    assert all(map(torch.equal, dealt[0], dealt[1]))
    assert any(not torch.equal(dealt[0][0], by_d) for by_d, _ in dealt[2:])
    # A peak of score s is D's with probability s; a deviation is 1/40 at most.
    torch.testing.assert_close(shares[0][found], scores[found], atol=0.1, rtol=0)
    highest_peak = scores == 1
    assert (shares[0][highest_peak] > 0.999).all()


@pytest.mark.slow
def test_warm_up_is_a_share_of_the_images_that_train_beside_a_probe(planted: Callable[[Plan], Cache]) -> None:
    """Images that no fit without them tells are left out there: warm-up may not wait for them."""
    cache = planted(Plan(classes=4, train=6, val=4, test=1))
    alone = cache.y == 0  # a class of one group, which is in one fold
    cache = replace(cache, groups=["one" if alone[image] else group for image, group in enumerate(cache.groups)])
    ridge = {"method": "ridge", "settings": {"penalty": [1.0]}}
    knobs = {"epochs": 3, "weight_decay": [0.1], "hidden": 8, "warm_up": 1 / 3, "batch_size": 6}
    left = []
    for with_probe in (None, ridge):
        model = load_method("s3n").fit(cache, Settings(**knobs, with_probe=with_probe, stop=0), 0).model
        left.append(int(model.left))
    assert left == [24, 18]


@pytest.mark.parametrize(("warm_up", "dealt"), [(12, [True, True, False, False]), (6, [True, False]), (0, [False])])
def test_in_warm_up_every_peak_is_in_both(warm_up: int, dealt: list[bool]) -> None:
    head, tokens = made(warm_up)
    scores = response(head, tokens)
    found = peaks(scores)
    head.train()
    said = [head.deal(scores, found) for _ in dealt]
    assert [bool(torch.equal(by_d, found) and torch.equal(by_c, found)) for by_d, by_c in said] == dealt


def test_the_lowest_and_the_highest_peak_are_the_first_of_equal_ones() -> None:
    scores = torch.tensor([[[1.0, 0, 0.5], [0, 0, 0], [0.5, 0, 1.0]], [[0.0] * 3] * 3])
    found = peaks(scores)
    found[1] = False
    assert highest(scores, found).nonzero().tolist() == [[0, 0, 0]]
    assert highest(-scores, found).nonzero().tolist() == [[0, 0, 2]]


def test_o_and_c_are_smoothed_and_d_is_not() -> None:
    head, tokens = made(smooth_ratio=0.85)
    batch = batch_of(tokens)
    torch.manual_seed(0)
    losses = head.train()(batch).losses
    torch.manual_seed(0)
    said = head.answers(batch)
    for name, ratio in (("raw", 0.85), ("discriminative", 1.0), ("complementary", 0.85)):
        by_image = []
        for logits, y in zip(getattr(said, name), batch.y.tolist(), strict=True):
            told = [ratio if c == y else (1 - ratio) / (CLASSES - 1) for c in range(CLASSES)]
            by_image.append(-(torch.tensor(told) * logits.log_softmax(0)).sum())
        torch.testing.assert_close(losses[name], torch.stack(by_image).mean())
    assert head.eval()(batch).losses == {}


def test_smoothing_takes_probabilities_and_a_class_alone() -> None:
    logits, y = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    torch.testing.assert_close(smoothed(logits, F.one_hot(y, CLASSES).float(), 0.7), smoothed(logits, y, 0.7))
    assert smoothed(logits[:, :1], torch.zeros(5, dtype=torch.long), 0.5) == 0
    torch.testing.assert_close(smoothed(logits[:, :2], y % 2, 0.5), smoothed(logits[:, :2], 1 - y % 2, 0.5))


@pytest.mark.parametrize(
    ("stream", "classifier", "radii"),
    [
        ("joint", False, [True, True]),
        ("raw", True, [False, False]),
        ("discriminative", False, [True, False]),
        ("complementary", False, [False, True]),
    ],
)
def test_no_gradient_goes_through_the_response_map(stream: str, classifier: bool, radii: list[bool]) -> None:
    """The raw classifier learns of its own answer alone, and what is sampled trains the radii."""
    head, tokens = made()
    getattr(head.train().answers(batch_of(tokens)), stream).square().sum().backward()
    learned = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in head.named_parameters()
    }
    assert bool(learned["classify_raw.weight"].any()) == classifier
    assert (learned["log_radius"] != 0).tolist() == radii


def test_places_are_told_in_full_precision_under_autocast() -> None:
    head, tokens = made()
    seen = []
    handle = head.discriminative.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    with torch.autocast("cpu", torch.bfloat16):
        head(batch_of(tokens))
    head(batch_of(tokens))
    handle.remove()
    assert torch.equal(*seen)


def test_it_reads_more_of_the_cell_that_its_classifier_finds() -> None:
    head, _ = made()
    tokens = torch.zeros(2, math.prod(GRID), WIDTH)
    direction = F.normalize(head.classify_raw.weight[0] - head.classify_raw.weight[1:].mean(0), dim=0)
    tokens[0, 5], tokens[1, 5] = 30 * direction, 30 * direction
    with torch.no_grad():
        head.classify_raw.weight.mul_(0.01)
        head.classify_raw.weight[0] = 5 * direction
    head.scale = Standardise(torch.randn(1000, WIDTH))
    seen = []
    head.discriminative.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    head(batch_of(tokens))
    share = seen[0].mean(1)  # of each token in what is read: (2, T)
    assert share.argmax(1).tolist() == [5, 5]
    assert (share[:, 5] > 1.5 / math.prod(GRID)).all()


def test_with_a_look_d_and_c_are_of_the_two_pictures() -> None:
    """By the equations; what stands in the cells moves O alone, and nothing is drawn in training."""
    torch.manual_seed(0)
    looks, tokens = torch.randn(6, 2, 7), torch.randn(6, math.prod(GRID), WIDTH)
    settings = Settings(hidden=8, dropout=0.0, look="zoom")
    scale, look = Standardise(tokens.flatten(0, 1)), Standardise(looks.flatten(0, 1))
    head = S3N(scale, Beside(None), CLASSES, settings, look=look)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)

    def batch(cells: Tensor) -> Batch:
        y = torch.arange(6) % CLASSES
        return Batch(y, y, {"tokens": cells, "token_grid": as_shape(GRID), "again/zoom": looks})

    said = head.train().answers(batch(tokens))
    for image in range(6):
        o = ((tokens[image] - scale.mean) / scale.scale).mean(0)
        d, c = (
            F.gelu(branch.norm(branch.buffer((g - look.mean) / look.scale)))
            for branch, g in zip((head.discriminative, head.complementary), looks[image], strict=True)
        )
        torch.testing.assert_close(said.joint[image], head.classify(torch.cat([o, d, c])), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.raw[image], head.classify_raw(o), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.discriminative[image], head.discriminative.classify(d), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.complementary[image], head.complementary.classify(c), atol=1e-4, rtol=1e-4)
    other = head.answers(batch(torch.randn_like(tokens)))
    assert torch.equal(other.discriminative, said.discriminative)
    assert torch.equal(other.complementary, said.complementary)
    assert not torch.allclose(other.raw, said.raw)


def test_a_look_is_read_beside_the_tokens_and_has_a_name() -> None:
    module = load_method("s3n")
    assert reads_of("s3n", module.Settings(look="zoom")) == {"tokens", "again/zoom"}
    assert reads_of("s3n", module.Settings(look="zoom", layer=4)) == {"tokens/4", "again/zoom"}
    with pytest.raises(ValueError, match="a key under train"):
        module.Settings(look="../zoom")
