"""Judge explanations: do concepts that name a part point at it, and do the top patches carry the decision?

Reads   what training.train reads for the method's encoder E, data/index/parts.parquet, the norms in
        data/embed/E/images/; data/runs/RUN/ where that run is of these settings and this cache: its model is judged,
        else the method is fitted here.
Writes  data/explanations/RUN.E/: tables.txt and tables.json. All figures are of val.
Costs   a fit where there is no run; then a pass over val for each patch of an image. Memory for the cache and, beside
        it, the patches of val in float32.

Parts: the module pointing says what a part is, which patch stands for it, what a hit is, and against which rivals; and
how place and concept together stand for it, weighed on the other half of val.

Decisions: the TOP patches of highest rank are removed, or they are the only local nodes that are left, and the
probability of the predicted class is read again. A removed node is masked and loses its edges; coarser nodes and the
global one stay. Patches are ranked by the model's own node scores, or by how much that probability falls where a patch
alone is removed. The second ranking reads the model that it then explains, one patch at a time. Three rivals stand
against the top patches: the TOP nearest the centre, the TOP of highest norm, and those at the places that another image
would choose. A model with a global stream sees the whole picture all the while: so it is stated what all patches
together do, and where that is nothing, there is nothing to explain. What labels say of an image as a whole (its
concepts, its rings) stays as it was.

A true label is read for one thing only: to draw whole classes anew for an interval.

    python -m evaluation.explanations --run concept_graph
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from evaluation.pointing import (
    PARTS,
    PLACE_RIVALS,
    RIVALS,
    Hits,
    PartWords,
    Placed,
    judge_parts,
    judged_patches,
    others,
    part_concepts,
    place_parts,
    rank_parts,
)
from evaluation.statistics import LEVEL, bootstrap, flip_p, holm, interval
from evaluation.words import lay_out, on_these_classes, percent, points, points_range, written_p
from fieldmark.command import UserError, run, stage_parser
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.params import Params, load_params
from fieldmark.store import read_buckets, read_table, write_text
from training.controls import Control
from training.data import Cache, check_origins, read_cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.nodes import Nodes
from training.data.rows import Rows, column
from training.explain import keep_nodes
from training.loop import EVALUATION_BATCH, predict
from training.methods import load_method
from training.metrics import Floats, Ints
from training.regimes import Full, hide_test
from training.restore import load_model
from training.runs import write_json
from training.train import PlannedRun, plan_run

SPLIT, CHOOSING = "val", "choose"
NEEDED = frozenset({"nodes", "boxes", "concepts", "owners"})  # to say what points where, beside what the method reads
TOP = 3  # patches removed or kept
DRAWS = 10_000  # of the bootstrap


# The decision.

@torch.no_grad()
def read_out(model: nn.Module, cache: Cache, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (n, C) and node scores (n, N) of images in view 0, as if they had no local nodes but `keep` (n, N).

    The scores are None where the model gives none. All but the model and its cache lies on the CPU.
    """
    model.eval()
    found = [
        model(keep_nodes(cache.batch(some), kept.to(cache.device)))
        for some, kept in zip(images.split(EVALUATION_BATCH), keep.split(EVALUATION_BATCH), strict=True)
    ]
    scores = None if found[0].node_scores is None else torch.cat([output.node_scores[:, 1:].cpu() for output in found])
    return torch.cat([output.logits.float().cpu() for output in found]), scores


def top(rank: Tensor, patches: Tensor) -> Tensor:
    """(n, N) bool: the TOP patches of highest rank (n, N); all patches of an image that has fewer."""
    best = rank.masked_fill(~patches, -torch.inf).topk(min(TOP, rank.shape[1]), dim=1).indices
    return torch.zeros_like(patches).scatter_(1, best, True) & patches


class Effect(NamedTuple):
    """What a choice of patches does to the decisions of n images, (2, n): first removed, then kept alone."""

    fall: Floats  # of the predicted class's probability
    flip: Floats  # 1 where another class is predicted


class Decisions(NamedTuple):
    """What the top patches of each ranking do to decisions, and what their rivals do."""

    own: dict[str, Effect]  # by ranking
    rivals: dict[str, dict[str, Effect]]  # by ranking, by rival
    alone: Effect  # (1, n): of the global node alone, where no local node is left


def judge_decisions(
    model: nn.Module, cache: Cache, images: Tensor, box: Tensor, patches: Tensor, norms: Tensor, seed: int
) -> Decisions | None:
    """What the top patches of `images` (n,) do to decisions. None where the model reads no nodes or scores none.

    `box` (n, N, 4), `patches` and `norms` (n, N) are those of the images' local nodes in view 0.
    """
    if not cache.has(Nodes):
        return None
    local = cache.part(Nodes).mask[images * cache.views, 1:].cpu()
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
    centrality = -((box[..., :2] + box[..., 2:]) / 2 - 0.5).square().sum(-1)

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
class Comparison:
    """What is judged against one rival: the means of both over images, and how far it is ahead."""

    what: str
    rival: str
    images: int
    own: float
    theirs: float
    difference: float  # above 0: ahead
    over_images: tuple[float, float]  # or over their groups
    over_classes: tuple[float, float]
    p: float  # two-sided, over images or their groups
    p_holm: float = 1.0  # corrected for the comparisons of the table
    verdict: str = ""


def against_rivals(
    what: str,
    names: Sequence[str],
    own: Floats,
    theirs: Floats,
    images: Ints,
    y: Ints,
    sign: int = 1,
    groups: Ints | None = None,
) -> list[Comparison]:
    """What is judged (`own`, (m,)) against each of R rivals (`theirs`, (R, m)).

    `images` (m,) says which image each value is of; an image may have several. `y` holds the images' classes. With sign
    1 more is better, with -1 less. With the images' `groups`, these are drawn anew where else images are.
    """
    gain = (sign * (own - theirs))[:, None].astype(np.float32)
    units = images if groups is None else groups[images]
    over_images = bootstrap(gain, units, DRAWS, 0, whole=groups is not None)
    over_classes = bootstrap(gain, y[images], DRAWS, 0)
    p = flip_p(gain, units, DRAWS, 0)
    return [
        Comparison(
            what,
            name,
            len(np.unique(images)),
            float(own.mean()),
            float(theirs[number].mean()),
            float(gain[number].mean()),
            interval(over_images[:, number], 0.95),
            interval(over_classes[:, number], 0.95),
            float(p[number]),
        )
        for number, name in enumerate(names)
    ]


def with_verdicts(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one table, their p corrected for their number, each with its verdict in words."""
    judged = []
    for one, p in zip(comparisons, holm([one.p for one in comparisons]), strict=True):
        verdict = "no difference shown"
        if p < LEVEL:
            verdict = ("won" if one.difference > 0 else "lost") + on_these_classes(one.over_classes)
        judged.append(replace(one, p_holm=p, verdict=verdict))
    return judged


def compare_parts(
    hits: Mapping[str, Hits] | Mapping[str, Placed], y: Ints, names: Sequence[str] = RIVALS
) -> list[Comparison]:
    """Each part against each rival, then all parts together; y (n,) holds the classes of the images judged."""
    found = []
    for name, one in hits.items():
        found += against_rivals(name, names, one.own, one.rivals, one.images, y)
    if not hits:
        return found
    own, rivals, images = (
        np.concatenate([getattr(one, field) for one in hits.values()], axis=-1) for field in ("own", "rivals", "images")
    )
    return found + against_rivals("all parts", names, own, rivals, images, y)


def compare_decisions(decisions: Decisions, y: Ints) -> list[Comparison]:
    """Each ranking against each rival: its patches should change more when removed, and less when kept alone.

    y (n,) holds the classes of the images judged.
    """
    images, found = np.arange(len(y)), []
    for ranking, own in decisions.own.items():
        rivals = decisions.rivals[ranking]
        for side, (done, sign) in enumerate((("removed", 1), ("kept alone", -1))):
            for field, effect in (("fall", "probability falls"), ("flip", "decision flips")):
                theirs = np.stack([getattr(rival, field)[side] for rival in rivals.values()])
                what = f"{ranking}, {done}: {effect}"
                found += against_rivals(what, list(rivals), getattr(own, field)[side], theirs, images, y, sign)
    return found


# Words.


def table_of(comparisons: Sequence[Comparison], title: str, random: Mapping[str, float] | None = None) -> str:
    """A table as text. `random`, a figure by what is judged, becomes a column of its own."""
    head = [title, "images", *([] if random is None else ["random"]), "own", "rival", "its"]
    lines = [[*head, "ahead by", "over images", "over classes", "p (Holm)", "verdict"]]
    for one in comparisons:
        beside = [] if random is None else [percent(random[one.what])]
        figures = [f"{one.images}", *beside, percent(one.own), one.rival, percent(one.theirs), points(one.difference)]
        over = map(points_range, (one.over_images, one.over_classes))
        lines.append([one.what, *figures, *over, written_p(one.p_holm), one.verdict])
    return lay_out(lines)


def as_text(content: Mapping[str, Any], tables: Mapping[str, Sequence[Comparison]]) -> str:
    """tables.txt: the tables, and the notes that they must not be read without."""
    head = f"{content['method']} on {content['encoder']}: {SPLIT}, {content['images']} images"
    counts = ", ".join(f"{name} {count}" for name, count in content["concepts"].items()) or "none"
    fall, flip = (percent(content["global alone"][name]) for name in ("probability falls", "decision flips"))
    blocks = [f"{head}, {content['patches']:g} patches each, model {content['model']}"]
    if tables["parts"]:
        blocks.append(table_of(tables["parts"], "part", content["random"]))
    else:
        blocks.append("parts: no two parts are both marked and named by concepts: there is nothing to judge")
    if tables["places"]:
        found = content["place and concept"]
        weighed = f"lam {found['own']:g}, with concepts of other parts {found['others']:g}, "
        title = f"{weighed}chosen on {found['images']} other images of {SPLIT}; lam 0 is the place alone"
        blocks.append(f"{title}\n{table_of(tables['places'], 'part, by place + lam x concept')}")
    elif tables["parts"]:
        blocks.append(f"place and concept: no other image of {SPLIT} chooses how they are weighed: nothing to judge")
    if any(one.own or one.theirs for one in tables["decisions"]):
        blocks.append(table_of(tables["decisions"], f"top {TOP} patches by"))
    else:
        blocks.append("decisions: no choice of patches changes any: this model does not use them, nothing to judge")
    foot = [
        "hits, probabilities and flips in %; ahead by: in points, above 0 where the explanation is the better one",
        "95 % bootstrap intervals; p: two-sided, over images, Holm-corrected for the rows of a table",
        f"concepts that name one part alone: {counts}",
        f"without any local node the probability falls by {fall}, and {flip} % of the decisions flip",
        f"{SPLIT}: the half of it that had no part in the choice of the model's settings and epoch",
    ]
    return "\n\n".join([*blocks, "\n".join(foot)]) + "\n"


# What is read.


def read_points(data: Path, cache: Cache, parts: Mapping[str, PartWords]) -> dict[str, Floats]:
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


def read_parts(data: Path) -> dict[str, PartWords]:
    """Those of PARTS that the data set marks. Raises UserError where it marks none."""
    path = data / "index/parts.parquet"
    marked = set(read_table(path, "index.parts/1", ["part"])["part"].to_pylist())
    found = {name: part for name, part in PARTS.items() if part.points & marked}
    if not found:
        raise UserError(f"{path}: marks no part that evaluation/pointing.py knows (PARTS): nothing to judge")
    return found


def read_norms(data: Path, encoder: str, cache: Cache, buckets: int) -> Tensor:
    """(n, N+1) float32: the length that each node's vector had before it was made of unit length, in view 0."""
    columns = ["path", "image_id", "status"]
    index = read_table(data / "index/images.parquet", "index.images/1", columns)
    image_ids = index.filter(pc.field("status") == "ok").sort_by("path")["image_id"].combine_chunks()
    columns = ["image_id", "view", "node", "norm"]
    folder = data / f"embed/{encoder}/images"
    nodes = read_buckets(folder, "embed.nodes/1", buckets, columns)
    table, row = Rows(image_ids, cache.views, buckets).place(nodes.filter(pc.field("view") == 0), folder)
    norms = torch.zeros(len(image_ids), cache.part(Nodes).mask.shape[1])
    norms[torch.from_numpy(row // cache.views), torch.from_numpy(column(table, "node").astype(np.int64))] = (
        torch.from_numpy(column(table, "norm").copy())
    )
    return norms


def read_model(
    folder: Path, planned: PlannedRun, encoder: str, cache: Cache, seed: int, device: torch.device
) -> tuple[nn.Module, str]:
    """The model to judge, on a device, and in words which it is.

    It is that of the run in `folder` (data/runs/RUN) where the run has the planned settings and was trained on this
    cache; else the method is fitted here. Raises UserError where the run's weights do not fit the method as it is now.
    """
    method, settings = planned.method, planned.settings
    wanted = {
        "method": method,
        "encoder": encoder,
        "also": list(planned.reading.also),
        "settings": settings.model_dump(),
        "regime": Full().model_dump(),
        "control": Control().model_dump(),
        "classes": cache.classes,
        "fingerprints": cache.fingerprints,
    }
    config = folder / "config.json"
    run = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "chosen" not in run or any(run.get(key) != value for key, value in wanted.items()):
        return load_method(method).fit(hide_test(cache).on(device), settings, seed).model, f"fitted here, seed {seed}"
    model = load_model(folder, method, settings, run, "run training.train again").to(device)
    return model, f"of {folder}, seed {run['model_seed']}"


def judge_explanations(params: Params, path: str, name: str, encoder: str | None, data: Path) -> str:
    """Write the tables of a run of train.runs and return them as text. `path` is the parameters' file, for messages.

    Raises UserError where the run is unknown, its method gives no node scores, or the data set marks no part of PARTS.
    """
    planned = plan_run(path, params, name)
    method, reading = planned.method, planned.reading
    encoder = encoder or reading.encoder
    params.encoder(encoder)
    buckets, seed = params.dataset.buckets, params.train.seed
    parts = read_parts(data)
    set_up_torch()
    cache = read_cache(data, encoder, buckets, reading.reads | NEEDED, reading.also, reading.also_reads)
    read = check_origins(data, encoder, buckets, reading.reads, reading.also, reading.also_reads)
    told = replace(cache.only(reading.reads), fingerprints=read)
    device = choose_device(params.train.device, f"{path}: train.device:")
    norms = read_norms(data, encoder, cache, buckets)[:, 1:]
    bank = cache.part(Bank)
    texts = read_table(bank.path, "bank/1", ["concept_idx", "text"]).sort_by("concept_idx")["text"].to_pylist()
    concepts = part_concepts(texts, bank.kept, parts)
    model, which = read_model(data / "runs" / name, planned, encoder, told, seed, device)
    told = told.on(device)

    images = cache.images(SPLIT)
    patches, box = torch.from_numpy(judged_patches(cache, images)), cache.part(Boxes).box[images * cache.views, 1:]
    decisions = judge_decisions(model, told, images, box, patches, norms[images], seed)
    if decisions is None:
        raise UserError(f"{method}: gives no node scores to judge; choose a method that does, such as concept_graph")
    predicted = predict(model, told, images).argmax(1).cpu()
    marks = read_points(data, cache, parts)
    hits = judge_parts(cache, images, norms, concepts, marks, predicted, seed)
    choosing, train = cache.images(CHOOSING), cache.images("train")
    chosen, ranked = (
        rank_parts(cache, some, train, norms, concepts, marks, classes)
        for some, classes in ((choosing, predict(model, told, choosing).argmax(1).cpu()), (images, predicted))
    )
    placed, weights = place_parts(chosen, ranked)

    y = cache.y[images].numpy()
    tables = {
        "parts": with_verdicts(compare_parts(hits, y)),
        "places": with_verdicts(compare_parts(placed, y, PLACE_RIVALS)),
        "decisions": with_verdicts(compare_decisions(decisions, y)),
    }
    random = {part: found.random for part, found in hits.items()}
    everything = {"all parts": np.concatenate(list(random.values()))} if random else {}
    content = {
        "method": method,
        "encoder": encoder,
        "settings": planned.settings.model_dump(),
        "model": which,
        "split": SPLIT,
        "images": len(images),
        "patches": float(patches.sum(1).double().mean()),
        "concepts": {part: int(chosen.sum()) for part, chosen in concepts.items()},
        "place and concept": None if weights is None else weights._asdict(),
        "random": {part: float(chance.mean()) for part, chance in (random | everything).items()},
        "global alone": {
            "probability falls": float(decisions.alone.fall.mean()),
            "decision flips": float(decisions.alone.flip.mean()),
        },
        "rows": {name: [asdict(one) for one in table] for name, table in tables.items()},
        "fingerprints": cache.fingerprints,
    }
    text = as_text(content, tables)
    folder = data / "explanations" / f"{name}.{encoder}"
    write_json(folder / "tables.json", content)
    write_text(folder / "tables.txt", text)
    return text


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    parser.add_argument("--run", required=True, metavar="NAME", help="a run of train.runs with node scores")
    parser.add_argument("--encoder", metavar="NAME", help="instead of the one that train.runs.NAME.encoder names")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    data = Path(arguments.data)
    print(judge_explanations(params, arguments.params, arguments.run, arguments.encoder, data), end="")


if __name__ == "__main__":
    run(main)
