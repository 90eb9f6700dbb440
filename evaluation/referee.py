"""What texts say of classes that have no images, or a few: plda asked for many sets of texts at the price of one.

Classes have roles: those of `fit` teach with all their images, those of `settings` choose the knobs, those of `report`
are told apart. With p_t the mean of teaching class t, S the covariance within them and m_0 the mean of p, the
map from texts to images (training/layers/text_map.py) is linear in p:

    e_c = m_0 + sum_t a_ct (p_t - m_0)                   a (C, T) follows from texts alone
    r_t = sum_u b_tu (p_u - m_0)                         how far t lies from what the map without it says; b (T, T)

At 0 images a class lies at e_c, logit_c(x) = <e_c - m_0, x - m_0 - (e_c - m_0) / 2> with <u, v> = u S^-1 v. At one and
more it lies between e_c and the mean m_c of its images, axis by axis of the covariance of r, and logits are those of
PLDA (training/methods/plda.py has the equations). All of it follows from inner products: those of p, of the images x
that are asked about and of m_c are made once a split of classes (`learn`, `ask`); a set of texts, be it a file, a
control or attributes, costs a ridge over T classes and a few small products (`place`, `logits`). Without texts a = 0.
The logits are those of training.methods.plda, which a test holds. Nothing is read from files here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.statistics import DRAWS, LEVEL, Paired, bootstrap, holm, interval, paired_differences
from fieldmark.concepts.selection import discriminability
from training.layers.blocks import Span, Standardise
from training.layers.gaussian import Spread
from training.layers.logistic import L2_WITHOUT_VAL
from training.layers.ridge import Rows, basis_of_rows, judge_left_out
from training.layers.sparse import fit_sparse
from training.layers.text_map import PENALTIES, TEACHERS, TextMap, least_error
from training.methods import plda
from training.methods.plda import FLAT
from training.methods.prototypes import class_means
from training.metrics import Bools, Floats, Ints
from training.regimes import by_draw

SHRINKAGES = tuple(plda.Settings().shrinkage)  # of the covariance within classes
PRIOR_SHRINKAGES = tuple(plda.Settings().prior_shrinkage)  # of that of class means
PENALTIES_OF_ROWS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of a dense layer, as shares of the mean spread
FIT, SETTINGS = 0.5, 0.1  # shares of the classes, where roles are drawn
FEWEST = 2  # classes that choose, or are told apart
FEWEST_DRAWS = round(1 / LEVEL) - 1  # of a control: a file that says nothing beats R draws in one of R + 1 cases
OWNERLESS = ("shuffled", "permuted")  # controls that keep all vectors and change whose they are
CONTENTLESS = ("random", "unrelated")  # controls for what reads vectors and no owners


class Roles(NamedTuple):
    """Positions of classes, ascending, each in one of three roles."""

    fit: Tensor
    settings: Tensor
    report: Tensor


def rotated_roles(classes: Sequence[str], splits: int) -> list[Roles]:
    """`splits` times half of the classes for the fit, a tenth for settings and the others to report on.

    In an order by sha256 of class_id, each split begins a step further, so that in all of them every class is reported
    on about as often. Raises ValueError for too few classes.
    """
    count = len(classes)
    fit, settings = round(FIT * count), max(FEWEST, round(SETTINGS * count))
    if fit < TEACHERS or count - fit - settings < FEWEST:
        raise ValueError(f"{count} classes are too few")
    key = by_draw(0)
    order = sorted(range(count), key=lambda place: key(classes[place]))
    turned = (np.roll(order, -round(split * count / splits)) for split in range(splits))
    parts = (np.split(one, [fit, fit + settings]) for one in turned)
    return [Roles(*(torch.from_numpy(np.sort(part)) for part in one)) for one in parts]


class Taught(NamedTuple):
    """What the teaching classes say: all images in the axes of their covariance, about m_0. In float64."""

    roles: Roles
    x: Tensor  # (n, r): every image
    means: Tensor  # p (T, r)
    spread: Spread
    gram: Tensor  # (T, T): p p^T, not divided by S
    size: int  # F
    noise: float  # the mean over teaching classes of 1 / their images


def learn(x: Tensor, y: Tensor, roles: Roles) -> Taught:
    """From vectors x (n, F) of images, standardised by those that teach, and their classes y (n,)."""
    size, span = x.shape[1], Span(x.double())
    x = span.into(x.double())
    teaches = torch.isin(y, roles.fit)
    told = (y[teaches, None] == roles.fit).double()
    means, covariance, _ = class_means(x[teaches], told)
    spread, centre = Spread(covariance, size), means.mean(0)
    p = (means - centre) @ spread.axes
    noise = told.sum(0).reciprocal().mean().item()
    return Taught(roles, (x - centre) @ spread.axes, p, spread, p @ p.T, size, noise)


class Knobs(NamedTuple):
    """Of a split and a number of images, the same for every set of texts."""

    shrinkage: float
    prior_shrinkage: float


class Asked(NamedTuple):
    """C classes to be told apart by n images, with k images of each in D draws: inner products under S^-1."""

    classes: Tensor  # (C,)
    images: Tensor  # (n,) positions of the images that are asked about
    y: Tensor  # (n,) their positions in `classes`
    counts: Tensor  # k_c (C,)
    teachers: Tensor  # (T, n): <p, x>
    gram: Tensor  # (T, T): <p, p>
    own: Tensor  # (D, C, n): <m, x>
    own_teachers: Tensor  # (D, C, T): <m, p>
    own_norm: Tensor  # (D, C): <m, m>
    taught: Taught
    knobs: Knobs


def ask(
    taught: Taught, y: Tensor, pool: Tensor, ranks: Tensor, classes: Tensor, k: int | None, knobs: Knobs
) -> Asked:
    """Ask about the images of `classes` that are not in the pool (n,), where k of the pool are told (None: all of it).

    y (n,); ranks (D, n): the place of each image of the pool within its class in each draw, from 0.
    """
    scale = ((1 - knobs.shrinkage) * taught.spread.values + knobs.shrinkage * taught.spread.mean).rsqrt()
    x, p = taught.x * scale, taught.means * scale
    of_class = y == classes[:, None]  # (C, n)
    wanted = of_class.any(0)
    images, support = (wanted & ~pool).nonzero()[:, 0], (wanted & pool).nonzero()[:, 0]
    draws = ranks[: 1 if k in (0, None) else len(ranks), support]
    taken = draws >= 0 if k is None else draws < k
    shares = (taken[:, None] & of_class[:, support]).double()  # (D, C, m)
    counts = shares[0].sum(1)
    means = shares @ x[support] / counts.clamp(min=1)[:, None]
    query = x[images]
    own = means.flatten(0, 1)
    return Asked(
        classes=classes,
        images=images,
        y=of_class[:, images].double().argmax(0),
        counts=counts,
        teachers=p @ query.T,
        gram=p @ p.T,
        own=(own @ query.T).unflatten(0, means.shape[:2]),
        own_teachers=(own @ p.T).unflatten(0, means.shape[:2]),
        own_norm=means.square().sum(-1),
        taught=taught,
        knobs=knobs,
    )


class Placed(NamedTuple):
    """Where texts put the classes."""

    weights: Tensor  # a (C, T)
    missed: Tensor  # b (T, T)
    penalty: float
    text_map: TextMap | None = None


def place(taught: Taught, texts: Tensor, asked: Tensor | None = None) -> Placed:
    """By texts (C, E) of all classes, or by other ones `asked` (C, E) of those that are asked about.

    Leaving teaching classes out chooses the penalty, by the squared error as in plda.
    """
    count = len(taught.gram)
    text_map = TextMap(texts[taught.roles.fit], torch.eye(count))
    missed = {penalty: torch.eye(count, dtype=torch.float64) - text_map.left_out(penalty) for penalty in PENALTIES}
    penalty = min(missed, key=lambda penalty: squared_lengths(missed[penalty], taught.gram).mean().item())
    weights = text_map.predict(texts if asked is None else asked, penalty)
    return Placed(weights, missed[penalty], penalty, text_map)


def squared_lengths(rows: Tensor, gram: Tensor) -> Tensor:
    """(C,) of combinations of p, rows (C, T) of weights; gram (T, T) are the inner products of p."""
    return ((rows @ gram) * rows).sum(1)


def nowhere(taught: Taught, classes: int) -> Placed:
    """Without texts: every class is expected at m_0."""
    count = len(taught.gram)
    missed = torch.eye(count, dtype=torch.float64) * count / (count - 1)  # a class is left out of m_0 too
    weights = torch.zeros(classes, count, dtype=torch.float64)
    return Placed(weights, missed, 0.0)


def logits(asked: Asked, placed: Placed) -> Tensor:
    """(D, C, n): of the map alone where no class has an image, else of PLDA."""
    if not asked.counts.any():
        return shared_logits(asked, placed, torch.zeros_like(asked.counts))
    b, b_0, axes = axes_of(asked, placed)
    k = asked.counts[:, None]  # (C, 1)
    s, s_0 = b * k / (b * k + 1), b_0 * k / (b_0 * k + 1)
    few = asked.counts.mean()
    w, w_0 = 1 / (1 + b / (b * few + 1)), 1 / (1 + b_0 / (b_0 * few + 1))  # w = (I + B - A B)^-1 mu, along each axis
    expected, seen = placed.weights[asked.classes] @ asked.gram @ axes.T, asked.own_teachers @ axes.T  # (D or 1, C, J)
    round_mu = (1 - s_0) * expected + s_0 * seen  # with the share of all other axes
    mu = (1 - s) * expected + s * seen
    along = (w * mu - w_0 * round_mu) @ (axes @ asked.teachers)
    norm = (w * mu.square() - w_0 * round_mu.square()).sum(-1, keepdim=True)
    return w_0 * shared_logits(asked, placed, s_0[:, 0]) + along - norm / 2


def shared_logits(asked: Asked, placed: Placed, s: Tensor) -> Tensor:
    """(D, C, n) where the mean of its images has the share s (C,) of where a class lies, on every axis."""
    a = placed.weights[asked.classes]
    rest = 1 - s
    norm = s.square() * asked.own_norm + rest.square() * squared_lengths(a, asked.gram)
    norm = norm + 2 * s * rest * torch.einsum("dct,ct->dc", asked.own_teachers, a)
    return s[:, None] * asked.own + (rest[:, None] * (a @ asked.teachers)) - norm[..., None] / 2


def axes_of(asked: Asked, placed: Placed) -> tuple[Tensor, Tensor, Tensor]:
    """B, the covariance of class means about where texts expect them: b (J,) along axes, b_0 () along all others.

    The axes, of length 1 under S^-1, are combinations of p: (J, T), 0 where no more than noise was seen.
    """
    missed, shrinkage = placed.missed, asked.knobs.prior_shrinkage
    lengths, turn = torch.linalg.eigh(missed @ asked.gram @ missed.T)
    b = (lengths / len(lengths) - asked.taught.noise).clamp(min=0)
    axes = turn.T @ missed * torch.where(b > 0, lengths, torch.inf).rsqrt()[:, None]
    b_0 = (shrinkage * b.sum() / asked.taught.size).clamp(min=FLAT)
    return (1 - shrinkage) * b + b_0, b_0, axes


def hits(asked: Asked, placed: Placed) -> Tensor:
    """(D, n) float32: whether each image is told right; classes that are equal share the hit (`right`)."""
    return right(logits(asked, placed), asked.y)


def right(said: Tensor, y: Tensor) -> Tensor:
    """(D, n) float32 of logits (D, C, n). Equal logits share the hit, so that saying nothing is worth 1 / C."""
    best = said == said.amax(1, keepdim=True)
    own = best.gather(1, y.expand(len(said), 1, -1))[:, 0]
    return own.float() / best.sum(1)


def zero_shot(g: Tensor, asked: Asked, texts: Tensor) -> Tensor:
    """(1, n): classes by the cosine of their text, texts (C, D), and the global vector, g (n', D) of all images."""
    return right((texts[asked.classes].float() @ g[asked.images].float().T)[None], asked.y)


def choose_knobs(taught: Taught, y: Tensor, pool: Tensor, ranks: Tensor, k: int | None) -> Knobs:
    """Those at which the settings classes are told apart best without a text, at k images, or 1 where k is 0.

    The same for a file and all its controls: what differs between them is the texts alone.
    """
    nothing = nowhere(taught, int(y.max()) + 1)
    accuracy: dict[Knobs, float] = {}
    for shrinkage in SHRINKAGES:
        points = [Knobs(shrinkage, prior_shrinkage) for prior_shrinkage in PRIOR_SHRINKAGES]
        asked = ask(taught, y, pool, ranks, taught.roles.settings, 1 if k == 0 else k, points[0])
        for knobs in points:  # the prior's has no part in inner products
            accuracy[knobs] = hits(asked._replace(knobs=knobs), nothing).mean().item()
    return max(accuracy, key=accuracy.__getitem__)


class Answers(NamedTuple):
    """Of each image, whether it was told right, the mean over draws of a control: seeds are splits of classes."""

    right: np.ndarray  # (S, n) float32, a share of draws; where there is one split, seeds are the draws of images
    draws: Floats  # accuracy in each draw of a control, (1,) where it has none


def gather(told: Sequence[Sequence[Tensor]], images: Sequence[Tensor], count: int) -> Answers:
    """From hits (D, n_s) by draw of the control and by split, about images (n_s,) of each split, of `count` in all."""
    asked = sum(len(part) for part in images)
    each = [sum(hit.sum(1).mean().item() for hit in splits) / asked for splits in told]
    rows = []
    for split, part in enumerate(images):
        mean = torch.stack([splits[split] for splits in told]).mean(0)
        mean = mean if len(images) == 1 else mean.mean(0, keepdim=True)
        rows.append(torch.zeros(len(mean), count).index_copy(1, part, mean))
    return Answers(torch.cat(rows).numpy(), np.array(each))


def part_of(images: Sequence[Tensor], count: int) -> Ints:
    """(S, count): 0 where a split of classes asks about an image, else -1."""
    part = np.full((len(images), count), -1)
    for split, asked in enumerate(images):
        part[split, asked.numpy()] = 0
    return part


class Row(NamedTuple):
    """A question: a method with k images, what texts reach in it, and how far that is from each control."""

    name: str
    accuracy: float
    interval: tuple[float, float]  # 95 %, over classes and splits
    others: dict[str, float]  # accuracy by control
    over: dict[str, Paired]  # texts - control
    reach: dict[str, float]  # the best draw of a control that draws
    draws: dict[str, int]  # of each control
    against: tuple[str, ...]  # the controls that the verdict is about
    p: float  # the largest of `against`, corrected for all rows of the file

    @property
    def few_units(self) -> bool:
        return not all(self.over[name].judged for name in self.against)

    @property
    def few_draws(self) -> bool:
        """Whether a file that says nothing beats every draw of a control of `against` too often, by chance."""
        return min(self.draws[name] for name in self.against) < FEWEST_DRAWS

    @property
    def judged(self) -> bool:
        """Whether there are enough units and draws for a verdict."""
        return not (self.few_units or self.few_draws)

    @property
    def shown(self) -> bool:
        """Whether texts beat each of `against`, in the mean by the corrected p and every single draw of it."""
        return (
            self.judged
            and self.p < LEVEL
            and all(self.over[name].difference > 0 for name in self.against)
            and all(self.accuracy > self.reach[name] for name in self.against)
        )


def judge(
    questions: Mapping[str, tuple[Mapping[str, Answers], tuple[str, ...]]],
    y: Ints,
    part: Mapping[str, Ints],
    groups: Ints | None = None,
) -> list[Row]:
    """A row for each question: its answers by name, `texts` among them, and the controls that its verdict is about.

    y (n,) classes of all images; part by question, which images it asks about in which split. A p over classes is that
    of chance signs (evaluation/statistics.py). A file that says nothing is one more draw of its own controls, so that
    it beats R draws of one by chance in 1 of R + 1 cases, whatever the p: under FEWEST_DRAWS there is no verdict.
    """
    rows = []
    for name, (answers, against) in questions.items():
        own, names = answers["texts"], [other for other in answers if other != "texts"]
        counted = part[name] >= 0
        seeds = max(len(one.right) for one in answers.values())
        same = [np.broadcast_to(answers[one].right, (seeds, len(y))) for one in ("texts", *names)]
        first = np.broadcast_to(same[0], (len(names), seeds, len(y)))
        paired = paired_differences(first, np.stack(same[1:]), y, groups, part[name], by_class=True)
        over = dict(zip(names, paired, strict=True))
        means = bootstrap(own.right[None], y, DRAWS, 0, part[name])
        others = {other: accuracy_of(answers[other], counted) for other in names}
        reach = {other: float(answers[other].draws.max()) for other in names}
        p = max(over[other].p for other in against)
        ends = interval(means[:, 0], 0.95)
        within, draws = (max(ends[0], 0.0), ends[1]), {other: len(answers[other].draws) for other in names}
        rows.append(Row(name, accuracy_of(own, counted), within, others, over, reach, draws, against, p))
    corrected = holm([row.p for row in rows])
    return [row._replace(p=p) for row, p in zip(rows, corrected, strict=True)]


def accuracy_of(answers: Answers, counted: Bools) -> float:
    """The mean over the images and splits that count (S, n) bool."""
    counted = np.broadcast_to(counted, answers.right.shape)
    return float(answers.right[counted].mean())


class Texts(NamedTuple):
    """The kept concepts of a file: distinct texts, and which class owns which."""

    texts: tuple[str, ...]
    K: Tensor  # (M, D), unit length
    own: Tensor  # (M, C) bool

    @property
    def owned(self) -> tuple[Tensor, Tensor]:
        """Concept and class of each pair of them, in the order of classes: (pairs,) each."""
        label, concept = self.own.T.nonzero(as_tuple=True)
        return concept, label


def class_vectors(K: Tensor, own: Tensor) -> Tensor:
    """(C, D): the direction of the mean text of each class; K (M, D), own (M, C) bool.

    A class without a text gets that of all other classes: it is told by the images of others, as without texts.
    """
    label, concept = own.T.nonzero(as_tuple=True)
    sums = torch.zeros(own.shape[1], K.shape[1]).index_add(0, label, K[concept])
    vectors = F.normalize(sums, dim=1)
    bare = ~own.any(0)
    vectors[bare] = F.normalize(vectors[~bare].mean(0), dim=0)
    return vectors


def concept_worth(asked: Asked, placed: Placed, texts: Texts, temperature: float) -> tuple[Tensor, Tensor]:
    """What the log loss at 0 images would rise by without each pair of concept and class: (pairs,), and which pairs.

    Nats an image, over images of all classes that are told apart; the map stays as it was fitted. Pairs of classes that
    are not asked about, and those that are all that a class has, are left out.
    """
    assert placed.text_map is not None
    concept, label = texts.owned
    said = logits(asked, placed)[0] / temperature  # (C, n)
    own = said.gather(0, asked.y[None])[0]
    before = (said.logsumexp(0) - own).mean()
    found, pairs = [], []
    for place_of, class_of in enumerate(asked.classes.tolist()):
        rows = (label == class_of).nonzero()[:, 0]
        if len(rows) < 2:
            continue
        vectors = texts.K[concept[rows]]
        without = F.normalize(vectors.sum(0) - vectors, dim=1)
        a = placed.text_map.predict(without, placed.penalty)
        changed = (a @ asked.teachers - ((a @ asked.gram) * a).sum(1, keepdim=True) / 2) / temperature  # (rows, n)
        others = torch.cat([said[:place_of], said[place_of + 1 :]]).logsumexp(0)
        after = torch.logaddexp(others, changed) - torch.where(asked.y == place_of, changed, own)
        found.append(after.mean(1) - before)
        pairs.append(rows)
    empty = torch.zeros(0)
    return (torch.cat(found), torch.cat(pairs)) if found else (empty, empty.long())


class Steps(NamedTuple):
    """From what texts reach at 0 images to what images do: hits (1, n) of each, about the images of one split."""

    texts: Tensor  # a map from texts to images
    told: Tensor  # attributes as texts foretell them, and a map from attributes to images
    attributes: Tensor  # the true attributes, and that map
    images: Tensor  # the means of all images of the pool
    groups: dict[str, Tensor]  # as `told`, but for the true columns of one group
    content: dict[str, tuple[float, float]]  # squared error of what texts foretell of a group, and of the mean
    seen: dict[str, tuple[float, float]]  # the same of what images foretell


def decompose(
    taught: Taught,
    y: Tensor,
    pool: Tensor,
    ranks: Tensor,
    asked: Asked,
    texts: Tensor,
    attributes: Tensor,
    groups: Mapping[str, Sequence[int]],
    knobs: Knobs,
) -> Steps:
    """What is missing at 0 images: asked is at k = 0, texts (C, E), attributes (C, A), columns of each group.

    Every map is fitted on the teaching classes. Attributes of the classes that are asked about are foretold from their
    texts by the same ridge; from images, by the means of their pool.
    """
    fit, report = taught.roles.fit, taught.roles.report
    told = foretell(texts, attributes, fit)
    of_pool = ((y == torch.arange(len(attributes))[:, None]) & pool).double()
    means = of_pool @ taught.x / of_pool.sum(1, keepdim=True).clamp(min=1)
    means[fit] = taught.means
    by_images = foretell(means, attributes, fit)

    def hit(columns: Tensor) -> Tensor:
        return hits(asked, place(taught, attributes, columns))

    mixed: dict[str, Tensor] = {}
    content: dict[str, tuple[float, float]] = {}
    seen: dict[str, tuple[float, float]] = {}
    centre = attributes[fit].mean(0)
    for group, columns in groups.items():
        put = told.clone()
        put[:, list(columns)] = attributes[:, list(columns)]
        mixed[group] = hit(put)
        true = attributes[report][:, list(columns)]
        chance = (true - centre[list(columns)]).square().sum().item()
        for found, source in ((content, told), (seen, by_images)):
            found[group] = (true - source[report][:, list(columns)]).square().sum().item(), chance
    everything = ask(taught, y, pool, ranks, asked.classes, None, knobs)
    images = hits(everything, nowhere(taught, len(attributes)))
    return Steps(hits(asked, place(taught, texts)), hit(told), hit(attributes), images, mixed, content, seen)


def foretell(vectors: Tensor, wanted: Tensor, fit: Tensor) -> Tensor:
    """wanted (C, A) of all classes from vectors (C, E), by ridge on the classes `fit`, which choose its penalty."""
    text_map = TextMap(vectors[fit], wanted[fit])
    return text_map.predict(vectors, least_error(text_map, PENALTIES))


def by_rank(said: Tensor, y: Tensor, chains: Tensor) -> list[tuple[Tensor, Tensor]]:
    """At each rank, whether images are told their taxon among those within the same taxon of the next rank.

    said (C, n) logits at 0 images; y (n,); chains (C, R) the taxon of each class at each rank, -1 where it has none;
    above the highest rank everything is one. For each rank, hits (n,), and of which images (n,) bool: those of taxa
    that have others beside them.
    """
    found = []
    for rank in range(chains.shape[1]):
        taxon = chains[:, rank]
        above = chains[:, rank + 1] if rank + 1 < chains.shape[1] else torch.zeros_like(taxon)
        among = (above[:, None] == above[y]) & (taxon >= 0)[:, None]  # (C, n)
        guess = said.masked_fill(~among, float("-inf")).argmax(0)
        beside = (among & (taxon[:, None] != taxon[y])).any(0) & (taxon[y] >= 0)
        found.append(((taxon[guess] == taxon[y]).float(), beside))
    return found


def fewer_texts(texts: Texts, most: int) -> Texts:
    """At most so many of the texts, from all classes in turn, of each class those of the lowest sha256 first."""
    if len(texts.K) <= most:
        return texts
    key = by_draw(0)
    order = torch.tensor(sorted(range(len(texts.K)), key=lambda place: key(texts.texts[place])))
    own = texts.own[order]
    turn = own.long().cumsum(0).masked_fill(~own, len(own) + 1).amin(1)  # the first in which a class takes it
    chosen = order[turn.argsort(stable=True)[:most]].sort().values
    return Texts(tuple(texts.texts[place] for place in chosen.tolist()), texts.K[chosen], texts.own[chosen])


class Bottleneck(NamedTuple):
    """A linear layer over concept scores at each wanted number of them: logits (n, C).

    Of the sparse ones also the numbers reached, and how far from an optimum their choice ended (layers/sparse.py).
    """

    logits: list[Tensor]
    nec: list[float]
    violation: list[float]


def bottleneck(train: Tensor, y: Tensor, query: Tensor, K: Tensor, classes: int, wanted: Sequence[float]) -> Bottleneck:
    """Classes from likeness to concepts K (M, D) alone, as training/methods/concept_bottleneck.py scores them.

    train (m, D) and query (n, D) global vectors, y (m,). `wanted` ascends; a number that M does not exceed, as inf, is
    every concept: a ridge whose penalty leaving images out chooses. What L1 keeps is fitted anew as that method does,
    but at one strength, L2_WITHOUT_VAL, since no image is left to choose it. Who owns a concept is not read.
    """
    standardise = Standardise(train)
    x, asked = standardise(train) @ K.T, standardise(query) @ K.T
    fewer = [nec for nec in wanted if nec < len(K)]
    sparse = [fit_sparse(x, y, x[:0], y[:0], classes, nec, (L2_WITHOUT_VAL,)) for nec in fewer]
    with torch.no_grad():
        said = [layer.linear(asked) for layer in sparse]
    if rest := len(wanted) - len(fewer):
        span = torch.linalg.svd(K.T, full_matrices=False)
        turn = span.U * span.S  # of M concepts, min(M, D) dimensions
        said += [dense(standardise(train) @ turn, y, standardise(query) @ turn, classes)] * rest
    reached, off = ([layer.history[0][what] for layer in sparse] for what in ("nec", "violation"))
    return Bottleneck(said, reached, off)


def dense(x: Tensor, y: Tensor, query: Tensor, classes: int) -> Tensor:
    """Scores (n, C) of query (n, F) by ridge on x (m, F), y (m,), penalties as shares of the mean spread."""
    told = F.one_hot(y, classes).double()
    x = x.double()
    rows = Rows(len(x), 1, x.shape[1], len(x), lambda chunk: x[chunk][None], lambda chunk: told[chunk])
    basis, mean = basis_of_rows(rows)
    unit = basis.spread.mean().item()
    penalties = [unit * share for share in PENALTIES_OF_ROWS]
    judged = judge_left_out(basis, penalties)
    best = max(range(len(penalties)), key=lambda place: (judged[place].accuracy, -judged[place].loss))
    weight = basis.solve(penalties[best])
    weight = x.T @ weight if len(weight) != x.shape[1] else weight
    return (query.double() - mean) @ weight + basis.mean


def most_telling(K: Tensor, own: Tensor, means: Tensor, scale: float, most: int) -> Tensor:
    """(M,) bool: of each class the `most` texts that tell classes apart best (discriminability; concepts/selection.py).

    It does not ask whether a text tells its own class. K (M, D), own (M, C), means (C, D) of the images that train. The
    same for texts and for what stands in their place.
    """
    gain = torch.from_numpy(discriminability((K @ means.T).double().numpy(), scale))
    chosen = torch.zeros(len(K), dtype=torch.bool)
    for column in own.T:
        rows = column.nonzero()[:, 0]
        chosen[rows[gain[rows].argsort(descending=True, stable=True)[:most]]] = True
    return chosen
