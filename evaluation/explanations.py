"""Judge explanations: do concepts that name a part point at it, and do the top patches carry the decision.

Reads   what training.train reads for the method's encoder E, data/index/parts.parquet, the norms in
        data/embed/E/images/; data/runs/METHOD/ where that run is of these settings and this cache: its model is judged,
        else the method is fitted here.
Writes  data/explanations/METHOD.E/: tables.txt and tables.json. All figures are of val.
Costs   a fit where there is no run; then a pass over val for each patch of an image. Memory for the cache and, beside
        it, the patches of val in float32.

One scale for all images: the score of concept k is s_k = sum over an image's patches n of u_n . (K_k - K), u_n being
the patch's vector at its norm before it was made of unit length, and K the mean of the bank's kept concepts. An encoder
that pools its map by the mean has the sum of u_n along its global vector, and s_k is then that vector's score, term by
term. Patches are an image's finest local nodes (see `finest`): never the whole picture, and no hit is bought by a
larger box. The patch that most raises the score is the one with the largest term.

A part is named by the kept concepts whose text has a word of it and no word of another (PARTS, PLACES). An image is
asked with those that its predicted class owns, since they would be shown to explain that decision; where that class
owns none, with all that name the part. A true label is read for one thing only: to resample classes for an interval.

A hit: the patch's box holds the part's point (the centre of its box; either wing is a wing). Judged on the images that
show the part and another, against: the patch that the same concepts choose on another image that shows the part, at its
place in this one; the place that hits the part most often on training images; and the patches that concepts naming the
other parts choose on the same image. A random patch is there for orientation.

The decision: the TOP patches of highest rank are removed (masked, with their edges; coarser nodes and the global one
stay), or they are the only local nodes left, and the probability of the predicted class is read again. Patches are
ranked by the model's own node scores, or by how much that probability falls where the patch alone is removed (which
reads the model that it then explains, one patch at a time); against the TOP nearest the centre, of the highest norm, or
at the places of another image's. A global stream sees the whole picture all the while: what all patches together do is
stated, and where that is nothing, there is nothing to explain. What labels say of an image as a whole (its concepts,
its rings) stays as it was.

    python -m evaluation.explanations --method concept_graph
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.statistics import LEVEL, bootstrap, holm, interval, p_value
from evaluation.words import lay_out, on_these_classes, percent, points, points_range, written_p
from fieldmark.command import UserError, run, stage_parser
from fieldmark.params import Block, Params, load_params
from fieldmark.store import read_buckets, read_table, write_text
from training.controls import Control
from training.data import Batch, Cache, Rows, column, read_cache
from training.loop import EVALUATION_BATCH, Schedule, predict, set_up_torch
from training.methods import load_method, read_settings
from training.metrics import Bools, Floats, Ints
from training.regimes import Full, hide_test
from training.train import write_json

SPLIT = "val"
TOP = 3  # patches removed or kept
OTHERS = 10  # other images that stand against each
DRAWS = 10_000  # of the bootstrap


class Part(NamedTuple):
    words: frozenset[str]  # what names it in a text
    points: frozenset[str]  # what data sets call it: cub, reef


def part(words: str, *points: str) -> Part:
    return Part(frozenset(words.split()), frozenset(points))


PARTS = {
    "bill": part("bill bills beak beaks mandible mandibles", "beak"),
    "crown": part("crown crowns cap caps", "crown"),
    "belly": part("belly bellies underbelly abdomen", "belly"),
    "wing": part("wing wings wingbar wingbars", "left wing", "right wing"),
    "tail": part("tail tails", "tail"),
    "forehead": part("forehead foreheads", "forehead"),
    "eye": part("eye eyes mask", "left eye", "right eye", "eye"),
    "throat": part("throat throats chin", "throat"),
    "nape": part("nape napes", "nape"),
    "breast": part("breast breasts chest chests", "breast"),
    "back": part("back backs mantle", "back"),
    "leg": part("leg legs foot feet", "left leg", "right leg"),
    "head": part("head heads", "head"),
    "cheek": part("cheek cheeks", "cheek"),
    "body": part("body bodies", "body"),
    "dorsal fin": part("dorsal", "dorsal_fin"),
    "bars": part("bar bars", "bars"),
    "stripes": part("stripe stripes", "stripes"),
    "spots": part("spots", "spots"),
}
# Words that name a place, whether or not the data set marks it: a text with one more than its part's own names no part.
PLACES = part(
    "back base bib body breast cheek cheeks chest collar coverts crest eyebrow face flank flanks head lores neck rump"
    " shoulder shoulders side sides supercilium underparts underside undertail upperparts"
).words


def named_part(text: str, parts: Mapping[str, Part]) -> str | None:
    """The part of `parts` that a text names; None where it names none, several, or another place beside it."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    named = [name for name, part in parts.items() if words & part.words]
    return named[0] if len(named) == 1 and not words & PLACES - parts[named[0]].words else None


def part_concepts(texts: Sequence[str | None], kept: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """By part, the rows of the bank (M,) that are kept and name it; a part that none names is left out."""
    found = [named_part(text, parts) if text else None for text in texts]
    rows = {name: torch.tensor([one == name for one in found]) & kept for name in parts}
    return {name: chosen for name, chosen in rows.items() if chosen.any()}


def directions(concepts: Tensor, kept: Tensor, chosen: Tensor, own: Tensor, predicted: Tensor) -> Tensor:
    """(n, D): what each image is asked with, the mean over concepts of K_k - K.

    `concepts` (M, D), `kept` and `chosen` (M,), `own` (M, C), `predicted` (n,): of the chosen ones those that the
    predicted class owns, all of them where it owns none.
    """
    rows = chosen[:, None] & own
    rows = torch.where(rows.any(0), rows, chosen[:, None]).float()  # (M, C)
    by_class = rows.T @ concepts / rows.sum(0)[:, None]
    return (by_class - concepts[kept].mean(0))[predicted]


def finest(boxes: Tensor, mask: Tensor) -> Bools:
    """(n, N): the local nodes that are patches, those whose boxes (n, N, 4) are at most twice as large as the least."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).masked_fill(~mask, torch.inf)
    return (mask & (area <= 2 * area.min(1, keepdim=True).values)).numpy()


def covers(boxes: Floats, points: Floats) -> Bools:
    """(n, N): whether a box of (n, N, 4) holds one of the image's points (n, P, 2); nan is held by none."""
    x, y = points[:, None, :, 0], points[:, None, :, 1]
    x0, y0, x1, y1 = (boxes[:, :, None, side] for side in range(4))
    return np.asarray(((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).any(2))


def best_patch(direction: Tensor, vectors: Tensor, patches: Bools) -> Ints:
    """(n,): the patch with the largest term. direction (n, D), vectors (n, N, D), patches (n, N)."""
    terms = torch.einsum("nd,nkd->nk", direction, vectors).masked_fill(~torch.from_numpy(patches), -torch.inf)
    return terms.argmax(1).numpy()


def others(count: int, seed: int) -> Iterator[Ints]:
    """OTHERS permutations of `count` images, or count - 1, none of which leaves an image where it is."""
    order = np.random.default_rng(seed).permutation(count)
    for step in range(1, min(OTHERS, count - 1) + 1):
        other = np.empty(count, dtype=np.int64)
        other[order] = np.roll(order, step)
        yield other


class Marked(NamedTuple):
    """Where n images show a part."""

    seen: Bools  # (n,) whether it is visible
    covered: Bools  # (n, N) whether a local node's box holds it


def best_cell(marked: Marked, patches: Bools) -> int:
    """The local node that holds a part on most images; patches (n, N)."""
    return int((marked.covered & patches).sum(0).argmax())


class Hits(NamedTuple):
    """How often patches hit a part, on the m images that show it and another one."""

    images: Ints  # (m,) positions among those judged
    own: Floats  # (m,) 0 or 1
    rivals: Floats  # (RIVALS, m) in [0,1]: of another image and another part, means
    random: Floats  # (m,) the mean over patches


RIVALS = ("another image", "best fixed place", "another part")


def judge_part(
    name: str,
    asked: Mapping[str, Tensor],
    vectors: Tensor,
    patches: Bools,
    marked: Mapping[str, Marked],
    cell: int,
    seed: int,
) -> Hits | None:
    """Hits of a part and of its rivals; None where fewer than two images show it and another.

    By part, on n images: `asked` (n, D) is what they are asked with, `marked` where they show it. `vectors` (n, N, D)
    are at their norms, `cell` is the best fixed place.
    """
    rest = [part for part in asked if part != name]
    if not rest:
        return None
    images = np.flatnonzero(marked[name].seen & np.any([marked[part].seen for part in rest], axis=0))
    if len(images) < 2:
        return None
    direction, u, mine = asked[name][images], vectors[images], patches[images]
    hit, row = marked[name].covered[images].astype(np.float64), np.arange(len(images))
    other_image = [hit[row, best_patch(direction, u[other], mine)] for other in others(len(images), seed)]
    other_part = np.stack([hit[row, best_patch(asked[part][images], u, mine)] for part in rest])
    shown = np.stack([marked[part].seen[images] for part in rest])
    return Hits(
        images,
        hit[row, best_patch(direction, u, mine)],
        np.stack([np.mean(other_image, axis=0), hit[:, cell], (other_part * shown).sum(0) / shown.sum(0)]),
        (hit * mine).sum(1) / mine.sum(1),
    )


def judged_patches(cache: Cache, images: Tensor) -> Bools:
    """(n, N): which local nodes of view 0 are patches."""
    rows = images * cache.views
    return finest(cache.boxes[rows, 1:], cache.mask[rows, 1:])


def judge_parts(
    cache: Cache,
    images: Tensor,
    norms: Tensor,
    concepts: Mapping[str, Tensor],
    points: Mapping[str, Floats],
    predicted: Tensor,
    seed: int,
) -> dict[str, Hits]:
    """Hits by part on `images` (n,), without parts that no text names or that fewer than two show beside another.

    norms (all images, N) are of local nodes, `concepts` part_concepts', `points` read_points', predicted (n,) classes.
    """
    bank, train = cache.bank, cache.images("train")
    train_patches, patches = judged_patches(cache, train), judged_patches(cache, images)

    def mark(part: str, of: Tensor) -> Marked:
        at, boxes = points[part][of.numpy()], cache.boxes[of * cache.views, 1:].numpy()
        return Marked(~np.isnan(at[..., 0]).all(1), covers(boxes, at))

    marked = {part: mark(part, images) for part in concepts}
    cells = {part: best_cell(mark(part, train), train_patches) for part in concepts}
    asked = {part: directions(bank.K, bank.kept, rows, bank.own, predicted) for part, rows in concepts.items()}
    vectors = cache.vectors[images * cache.views, 1:].float() * norms[images][..., None]
    hits = {part: judge_part(part, asked, vectors, patches, marked, cells[part], seed) for part in concepts}
    return {part: found for part, found in hits.items() if found is not None}


# The decision.


def keep_nodes(batch: Batch, keep: Tensor) -> Batch:
    """The batch as if its images had only these local nodes (B, N), and the global one."""
    mask = batch.mask & torch.cat([torch.ones_like(keep[:, :1]), keep], dim=1)
    return replace(
        batch,
        mask=mask,
        nodes=batch.nodes * mask[..., None],
        concept_weight=batch.concept_weight * mask[..., None],
        selected=batch.selected & mask,
        density=batch.density * mask,
        adjacency=batch.adjacency * (mask[:, :, None] & mask[:, None, :])[..., None],
    )


@torch.no_grad()
def read_out(model: nn.Module, cache: Cache, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (n, C) and node scores (n, N) of images that have only the local nodes `keep` (n, N), in view 0."""
    model.eval()
    found = [
        model(keep_nodes(cache.batch(some), kept))
        for some, kept in zip(images.split(EVALUATION_BATCH), keep.split(EVALUATION_BATCH), strict=True)
    ]
    scores = None if found[0].node_scores is None else torch.cat([output.node_scores[:, 1:] for output in found])
    return torch.cat([output.logits.float() for output in found]), scores


def top(rank: Tensor, patches: Tensor) -> Tensor:
    """(n, N) bool: the TOP patches of highest rank (n, N), all of them where there are no more."""
    best = rank.masked_fill(~patches, -torch.inf).topk(min(TOP, rank.shape[1]), dim=1).indices
    return torch.zeros_like(patches).scatter_(1, best, True) & patches


class Effect(NamedTuple):
    """What a choice of patches does to the decisions of n images, (2, n): when it is removed, when it alone is kept."""

    fall: Floats  # of the predicted class's probability
    flip: Floats  # 1 where another class is predicted


class Decisions(NamedTuple):
    own: dict[str, Effect]  # by ranking
    rivals: dict[str, dict[str, Effect]]  # by ranking, by rival
    alone: Effect  # of the global node, no local one left; (1, n)


def judge_decisions(
    model: nn.Module, cache: Cache, images: Tensor, patches: Tensor, norms: Tensor, seed: int
) -> Decisions | None:
    """What the top patches do to decisions; patches and norms are (n, N). None where the model gives no node scores."""
    local = cache.mask[images * cache.views, 1:]
    logits, scores = read_out(model, cache, images, local)
    if scores is None:
        return None
    predicted = logits.argmax(1)

    def probability(logits: Tensor) -> Tensor:
        return logits.softmax(1).gather(1, predicted[:, None])[:, 0]

    whole = probability(logits)

    def effect(*keeps: Tensor) -> Effect:
        changed = [read_out(model, cache, images, keep)[0] for keep in keeps]
        return Effect(
            np.stack([(whole - probability(one)).double().numpy() for one in changed]),
            np.stack([(one.argmax(1) != predicted).double().numpy() for one in changed]),
        )

    def of(chosen: Tensor) -> Effect:
        return effect(local & ~chosen, chosen)

    drop = torch.zeros_like(scores)
    for node in patches.any(0).nonzero()[:, 0].tolist():
        alone = torch.arange(patches.shape[1]) == node
        drop[:, node] = whole - probability(read_out(model, cache, images, local & ~alone)[0])
    boxes = cache.boxes[images * cache.views, 1:]
    centrality = -((boxes[..., :2] + boxes[..., 2:]) / 2 - 0.5).square().sum(-1)

    fixed = {"centre": of(top(centrality, patches)), "highest norm": of(top(norms, patches))}
    own, rivals = {}, {}
    for name, rank in (("node scores", scores), ("fall of one", drop)):
        own[name] = of(top(rank, patches))
        swapped = [of(top(rank[torch.from_numpy(other)], patches)) for other in others(len(images), seed)]
        mean = Effect(*(np.mean([getattr(one, field) for one in swapped], axis=0) for field in Effect._fields))
        rivals[name] = {**fixed, "another image": mean}
    return Decisions(own, rivals, effect(torch.zeros_like(local)))


# Verdicts.


@dataclass(frozen=True)
class Row:
    """What is judged beside one rival, as means over images, and how far it is ahead."""

    what: str
    rival: str
    images: int
    own: float
    theirs: float
    difference: float  # above 0: ahead
    over_images: tuple[float, float]
    over_classes: tuple[float, float]
    p: float  # two-sided, over images
    p_holm: float = 1.0  # corrected for all rows of the table
    verdict: str = ""


def compare_rows(
    what: str, names: Sequence[str], own: Floats, theirs: Floats, images: Ints, y: Ints, sign: int = 1
) -> list[Row]:
    """A row a rival: own (m,) and theirs (R, m), of `images` (m,) that may repeat; more is better where sign is 1."""
    gain = (sign * (own - theirs))[:, None].astype(np.float32)
    over_images, over_classes = (bootstrap(gain, units, DRAWS, 0) for units in (images, y[images]))
    return [
        Row(
            what,
            name,
            len(np.unique(images)),
            float(own.mean()),
            float(theirs[number].mean()),
            float(gain[number].mean()),
            interval(over_images[:, number], 0.95),
            interval(over_classes[:, number], 0.95),
            p_value(over_images[:, number]),
        )
        for number, name in enumerate(names)
    ]


def with_verdicts(rows: Sequence[Row]) -> list[Row]:
    """The rows of one table with p corrected for their number, and the verdict in words."""
    judged = []
    for row, p in zip(rows, holm([row.p for row in rows]), strict=True):
        verdict = "no difference shown"
        if p < LEVEL:
            verdict = ("won" if row.difference > 0 else "lost") + on_these_classes(row.over_classes)
        judged.append(replace(row, p_holm=p, verdict=verdict))
    return judged


def part_rows(hits: Mapping[str, Hits], y: Ints) -> list[Row]:
    """A row a part and rival, and those of all parts together; y (n,) are the classes of the images judged."""
    rows = [row for name, one in hits.items() for row in compare_rows(name, RIVALS, one.own, one.rivals, one.images, y)]
    if not hits:
        return rows
    own, rivals, images = (
        np.concatenate([getattr(one, field) for one in hits.values()], axis=-1) for field in ("own", "rivals", "images")
    )
    return rows + compare_rows("all parts", RIVALS, own, rivals, images, y)


def decision_rows(decisions: Decisions, y: Ints) -> list[Row]:
    """Removed patches should change more than a rival's, kept ones less."""
    images, rows = np.arange(len(y)), []
    for ranking, own in decisions.own.items():
        rivals = decisions.rivals[ranking]
        for side, (done, sign) in enumerate((("removed", 1), ("kept alone", -1))):
            for field, measure in (("fall", "probability falls"), ("flip", "decision flips")):
                theirs = np.stack([getattr(rival, field)[side] for rival in rivals.values()])
                what = f"{ranking}, {done}: {measure}"
                rows += compare_rows(what, list(rivals), getattr(own, field)[side], theirs, images, y, sign)
    return rows


# Words.


def table_of(rows: Sequence[Row], title: str, random: Mapping[str, float] | None = None) -> str:
    """`random`, by what is judged, is a column of its own."""
    head = [title, "images", *([] if random is None else ["random"]), "own", "rival", "its"]
    lines = [[*head, "ahead by", "over images", "over classes", "p (Holm)", "verdict"]]
    for row in rows:
        beside = [] if random is None else [percent(random[row.what])]
        figures = [f"{row.images}", *beside, percent(row.own), row.rival, percent(row.theirs), points(row.difference)]
        over = map(points_range, (row.over_images, row.over_classes))
        lines.append([row.what, *figures, *over, written_p(row.p_holm), row.verdict])
    return lay_out(lines)


def as_text(content: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> str:
    """The tables, and what they must not be read without."""
    head = f"{content['method']} on {content['encoder']}: {SPLIT}, {content['images']} images"
    counts = ", ".join(f"{name} {count}" for name, count in content["concepts"].items()) or "none"
    fall, flip = (percent(content["global alone"][name]) for name in ("probability falls", "decision flips"))
    blocks = [f"{head}, {content['patches']:g} patches each, model {content['model']}"]
    if rows["parts"]:
        blocks.append(table_of(rows["parts"], "part", content["random"]))
    else:
        blocks.append("parts: no two parts are both marked and named by concepts: there is nothing to judge")
    if any(row.own or row.theirs for row in rows["decisions"]):
        blocks.append(table_of(rows["decisions"], f"top {TOP} patches by"))
    else:
        blocks.append("decisions: no choice of patches changes any: this model does not use them, nothing to judge")
    foot = [
        "hits, probabilities and flips in %; ahead by: in points, above 0 where the explanation is the better one",
        "95 % bootstrap intervals; p: two-sided, over images, Holm-corrected for the rows of a table",
        f"concepts that name one part alone: {counts}",
        f"without any local node the probability falls by {fall}, and {flip} % of the decisions flip",
        f"{SPLIT} also chose the model's settings and epoch",
    ]
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


# What is read.


def read_points(data: Path, cache: Cache, parts: Mapping[str, Part]) -> dict[str, Floats]:
    """By part, its points (n, P, 2) on every image of the cache; nan where it is not visible."""
    path = data / "index/parts.parquet"
    position = {path: number for number, path in enumerate(cache.paths)}
    found = {name: np.full((len(cache.paths), len(part.points), 2), np.nan, np.float32) for name, part in parts.items()}
    slot = {point: (name, number) for name, part in parts.items() for number, point in enumerate(sorted(part.points))}
    for row in read_table(path, "index.parts/1", ["path", "part", "x", "y", "visible"]).to_pylist():
        if row["visible"] and row["x"] is not None and row["part"] in slot and row["path"] in position:
            name, number = slot[row["part"]]
            found[name][position[row["path"]], number] = row["x"], row["y"]
    return found


def read_parts(data: Path) -> dict[str, Part]:
    """Those of PARTS that the data set marks. Raises UserError where it marks none."""
    path = data / "index/parts.parquet"
    marked = set(read_table(path, "index.parts/1", ["part"])["part"].to_pylist())
    found = {name: part for name, part in PARTS.items() if part.points & marked}
    if not found:
        raise UserError(f"{path}: marks no part that evaluation/explanations.py knows (PARTS): nothing to judge")
    return found


def read_norms(data: Path, encoder: str, cache: Cache, buckets: int) -> Tensor:
    """(n, N+1) float32: the length of every node's vector before it was made 1, in view 0."""
    columns = ["path", "image_id", "status"]
    index = read_table(data / "index/images.parquet", "index.images/1", columns)
    image_ids = index.filter(pc.field("status") == "ok").sort_by("path")["image_id"].combine_chunks()
    columns = ["image_id", "view", "node", "norm"]
    nodes = read_buckets(data / f"embed/{encoder}/images", "embed.nodes/1", buckets, columns)
    table, row = Rows(image_ids, cache.views, buckets).place(nodes.filter(pc.field("view") == 0))
    norms = torch.zeros(len(image_ids), cache.mask.shape[1])
    norms[torch.from_numpy(row // cache.views), torch.from_numpy(column(table, "node").astype(np.int64))] = (
        torch.from_numpy(column(table, "norm").copy())
    )
    return norms


def read_model(
    folder: Path, method: str, encoder: str, settings: Block, cache: Cache, seed: int
) -> tuple[nn.Module, str]:
    """The model of a run (data/runs/METHOD) that is of these settings and this cache, else one fitted here; and which.

    Raises UserError where a run's weights do not fit the method as it is now.
    """
    module, hidden = load_method(method), hide_test(cache)
    wanted = {
        "method": method,
        "encoder": encoder,
        "settings": settings.model_dump(),
        "regime": Full().model_dump(),
        "control": Control().model_dump(),
        "classes": cache.classes,
        "fingerprints": cache.fingerprints,
    }
    config = folder / "config.json"
    run = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if not isinstance(settings, Schedule) or any(run.get(key) != value for key, value in wanted.items()):
        return module.fit(hidden, settings, seed).model, f"fitted here, seed {seed}"
    # No epoch: the method builds its model and leaves it as it starts.
    start = {"epochs": 0, "lr": settings.lr[:1], "weight_decay": settings.weight_decay[:1]}
    model = module.fit(hidden, settings.model_copy(update=start), seed).model
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder}: its model is not this {method} ({reason}); run training.train again") from None
    return model, f"of {folder}, seed {run['model_seed']}"


def explain(params: Params, path: str, method: str, encoder: str | None, data: Path) -> str:
    """Write the tables of a method; returns them as text. `path` is the parameters' file, for messages."""
    if method not in params.train.methods:
        known = ", ".join(params.train.methods)
        raise UserError(f"{path}: train.methods: has no {method}; choose one of: {known}, or add it")
    encoder = encoder or params.train.methods[method].encoder
    params.encoder(encoder)
    buckets, seed = params.dataset.buckets, params.train.seed
    parts = read_parts(data)
    settings = read_settings(path, params, method)
    set_up_torch()
    cache = read_cache(data, encoder, buckets)
    norms = read_norms(data, encoder, cache, buckets)[:, 1:]
    bank = cache.bank
    texts = read_table(bank.path, "bank/1", ["concept_idx", "text"]).sort_by("concept_idx")["text"].to_pylist()
    concepts = part_concepts(texts, bank.kept, parts)
    model, which = read_model(data / "runs" / method, method, encoder, settings, cache, seed)

    images = cache.images(SPLIT)
    patches = torch.from_numpy(judged_patches(cache, images))
    decisions = judge_decisions(model, cache, images, patches, norms[images], seed)
    if decisions is None:
        raise UserError(f"{method}: gives no node scores to judge; choose a method that does, such as concept_graph")
    predicted = predict(model, cache, images).argmax(1)
    hits = judge_parts(cache, images, norms, concepts, read_points(data, cache, parts), predicted, seed)

    y = cache.y[images].numpy()
    rows = {"parts": with_verdicts(part_rows(hits, y)), "decisions": with_verdicts(decision_rows(decisions, y))}
    random = {part: found.random for part, found in hits.items()}
    everything = {"all parts": np.concatenate(list(random.values()))} if random else {}
    content = {
        "method": method,
        "encoder": encoder,
        "settings": settings.model_dump(),
        "model": which,
        "split": SPLIT,
        "images": len(images),
        "patches": float(patches.sum(1).double().mean()),
        "concepts": {part: int(chosen.sum()) for part, chosen in concepts.items()},
        "random": {part: float(chance.mean()) for part, chance in (random | everything).items()},
        "global alone": {
            "probability falls": float(decisions.alone.fall.mean()),
            "decision flips": float(decisions.alone.flip.mean()),
        },
        "rows": {name: [asdict(row) for row in table] for name, table in rows.items()},
        "fingerprints": cache.fingerprints,
    }
    text = as_text(content, rows)
    folder = data / "explanations" / f"{method}.{encoder}"
    write_json(folder / "tables.json", content)
    write_text(folder / "tables.txt", text)
    return text


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    parser.add_argument("--method", required=True, metavar="NAME", help="a method of train.methods with node scores")
    parser.add_argument("--encoder", metavar="NAME", help="instead of the one that train.methods.NAME.encoder names")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    print(explain(params, arguments.params, arguments.method, arguments.encoder, Path(arguments.data)), end="")


if __name__ == "__main__":
    run(main)
