"""Judge concept files, whoever wrote them, on a prepared data set: what their texts say of its classes, and what not.

Reads   FILE ..., each a concept file in any layout of fieldmark/concepts/files.py; data/index/; of the encoder E
        data/embed/E/images, data/embed/E/moments/NAME as --features says, and text.parquet and controls.parquet where
        they are there; data/controls/unrelated.txt; `domain`, `clean` and `encoders.E` of params.yaml.
Writes  a page to stdout; with --markdown and --json files. Vectors of texts are kept in .cache/referee/E.parquet.
Costs   a pass of the text tower for each kept text that is new, then a minute or two for the first file on two quiet
        cores and less for each further one; with --bottleneck-draws 19, as a verdict on a bottleneck takes, it fits 39
        bottlenecks a file where it fits 7. Memory: 8 bytes x draws x classes that are told apart x images that are
        asked about, for each split and number of images (cub100: 40 MB in all; it grows as the square of the number of
        classes). It asks no language model, and opens no test picture.

Texts are cleaned as the pipeline cleans them. Images of train and val are parted in two halves, class by class: one
tells what images look like (all of it in the teaching classes, k images of a class that is told apart), about the other
it is asked. Every question is asked of --splits rotated splits of the classes, 50 % to teach, 10 % to choose the one
setting and 40 % to report on, or of the one that --fit and --settings name: for an encoder that was aligned with some
classes, these belong into --fit. How it is asked stands in evaluation/referee.py and docs/referee.md.

    python -m tools.referee gpt4.json --encoder reef
    python -m tools.referee gpt3.json gpt4.json deepseek.csv --encoder birds-lit0 --features pooled --json figures.json
    python -m tools.referee gpt4.json --encoder reef --worth
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from evaluation import referee
from evaluation.leaks import KINDS, Names
from evaluation.referee import Answers, Asked, Knobs, Placed, Roles, Taught, Texts, class_vectors
from evaluation.referee_tables import FileResult, Page, Setting, Side, as_json, as_markdown, as_text
from evaluation.statistics import holm, paired_differences
from evaluation.taxonomy import Taxonomy, lineages_of
from evaluation.worth import Worth, worth
from fieldmark import store
from fieldmark.checkout import cache_folder
from fieldmark.command import UserError, encoder_parser, run
from fieldmark.concepts import gate
from fieldmark.concepts.cleaning import clean_class
from fieldmark.concepts.files import read_concept_file
from fieldmark.concepts.names import domain_words
from fieldmark.devices import choose_device
from fieldmark.halves import halve
from fieldmark.llm.imported import row_of
from fieldmark.memory import keep_memory
from fieldmark.params import Params, load_params
from tools.predict import DATA, say
from training.control_texts import CONTROL_TEXTS
from training.controls.owners_permuted import cycle
from training.controls.vectors_shuffled import shuffled
from training.data import Cache, read_cache
from training.data.attributes import ATTRIBUTES, number_of
from training.layers.features import Features, FeatureSettings, parts_of
from training.metrics import fit_temperature
from training.regimes import by_draw, read_classes

SHOTS: tuple[int, ...] = (0, 1, 2)  # images a class
WORTH: tuple[int | None, ...] = (0, 1, 2, 4, 8, None)  # None: all of the half
NEC = (5.0, 10.0, float("inf"))  # effective concepts a class
PER_CLASS = 10  # texts a class that a bottleneck reads, those that tell classes apart best
FEW_DRAWS = 3  # of a control of the bottleneck, which takes seconds where the map takes thousandths; no verdict
CONTROLS = ("random", "shuffled", "permuted", "unrelated")
ZERO_SHOT = "zero-shot, 0 images"
Row = dict[str, Any]


class ConceptFile(NamedTuple):
    """A file, its texts as concepts/1 has them, and what its texts give away."""

    name: str
    rows: list[Row]  # of concepts/1, names apart
    covered: int  # classes that stand there with a text
    naming: dict[str, dict[str, float]]  # of all and of the kept texts, the share that names each of KINDS

    @property
    def kept(self) -> list[Row]:
        return [row for row in self.rows if row["kept"]]


def read_file(
    path: Path, name: str, classes: list[Row], params: Params, names: Names, most: int | None
) -> ConceptFile:
    """Read and clean a file, `name` on the page; of the kept texts of a class at most `most`, of the lowest sha256.

    Raises UserError where nothing of it is kept.
    """
    texts = read_concept_file(path, classes)
    rows = []
    for row in classes:
        own = texts.get(row["class_id"], [])
        found = clean_class(row, [row_of(row["class_id"], own)] if own else [], params.domain, params.clean)
        found = [one for one in found if one["kind"] != "name"]
        ranked = sorted((one for one in found if one["kept"]), key=lambda one: one["concept_id"])
        for one in ranked[most:] if most is not None else []:
            one.update(kept=False, drop_reason="over --per-class")
        rows += found
    if not any(row["kept"] for row in rows):
        reasons = Counter(row["drop_reason"] for row in rows).most_common()
        said = ", ".join(f"{count} {reason}" for reason, count in reasons) or "it has none"
        raise UserError(f"{path}: none of its texts can be a concept ({said}); see `clean` in params.yaml")
    naming = {
        which: shares(names, [row for row in rows if row["kept"] or which == "all"]) for which in ("all", "kept")
    }
    return ConceptFile(name, rows, sum(map(bool, texts.values())), naming)


def called(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths by which they differ. Raises UserError where one stands there twice."""
    parts = [path.absolute().parts for path in paths]
    if repeated := [path.name for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1]:
        raise UserError(f"{repeated[0]}: stands there twice; name each file once")
    length = next(length for length in itertools.count(1) if len({own[-length:] for own in parts}) == len(parts))
    return ["/".join(own[-length:]) for own in parts]


def shares(names: Names, rows: list[Row]) -> dict[str, float]:
    found = Counter(kind for row in rows for kind in names.named_in(row["text"], row["class_id"]))
    return {kind: found[kind] / len(rows) for kind in KINDS}


def embed(
    texts: Sequence[str], params: Params, name: str, device: torch.device
) -> tuple[dict[str, np.ndarray], float]:
    """The unit vector (D,) of each text by the text tower of an encoder, and the encoder's scale of cosines.

    Texts that are known are not embedded anew. Raises UserError where the images were embedded by another one.
    """
    from fieldmark.encoders.clip import load_encoder  # brings libraries that take seconds
    from fieldmark.encoders.texts import SCHEMA, embed_texts

    encoder = load_encoder(name, params.encoder(name), device, params.towers)
    images = DATA / f"embed/{name}/images"
    made_by = store.read_folder_header(images, "embed.nodes/1", params.dataset.buckets).params["encoder"]
    if made_by != encoder.fingerprint:
        raise UserError(f"{images}: was made by another encoder {name}; run embed_images again (dvc repro)")
    kept = cache_folder() / f"referee/{name}.parquet"
    known = made_before(kept, SCHEMA, encoder.fingerprint)
    found = {
        **made_before(DATA / f"embed/{name}/text.parquet", SCHEMA, encoder.fingerprint),
        **made_before(DATA / CONTROL_TEXTS.format(name), "embed.controls/1", encoder.fingerprint),
        **known,
    }
    missing = {text: "concept" for text in texts if text not in found}
    if missing:
        table = embed_texts(missing, encoder)
        found |= dict(zip(table["text"].to_pylist(), store.vectors_of(table), strict=True))
        if known:
            table = pa.concat_tables([store.read_table(kept, SCHEMA), table])
        kept.parent.mkdir(parents=True, exist_ok=True)
        made_by = {"encoder": encoder.fingerprint, "logit_scale": encoder.logit_scale}
        store.write_table(table, kept, SCHEMA, made_by, store.fingerprint(SCHEMA, made_by, []))
    return {text: found[text].astype(np.float32) for text in texts}, encoder.logit_scale


def made_before(path: Path, schema: str, encoder: str) -> dict[str, np.ndarray]:
    """The vectors of texts in a file; of none where there is no file, or one of another encoder."""
    if not path.is_file() or store.read_header(path, schema).params["encoder"] != encoder:
        return {}
    table = store.read_table(path, schema, ["text", "vector"])
    return dict(zip(table["text"].to_pylist(), store.vectors_of(table), strict=True))


def read_images(params: Params, encoder: str, features: Sequence[str]) -> Cache:
    """The images of train and val, with what `features` name and the global vector."""
    cache = read_cache(DATA, encoder, params.dataset.buckets, {"globals", *parts_of(features)})
    return cache.take(torch.from_numpy(np.flatnonzero(np.isin(cache.split, ("train", "choose", "val")))))


class Images(NamedTuple):
    """The images of train and val, and how they are used."""

    cache: Cache
    pool: Tensor  # (n,) bool: those that may be told
    ranks: Tensor  # (D, n): the place of each image of the pool within its class, by draw; -1 elsewhere


def groups_of(cache: Cache) -> np.ndarray | None:
    """The number of each image's group (n,); None where every image is one of its own."""
    _, numbers = np.unique(cache.groups, return_inverse=True)
    return None if numbers.max() + 1 == len(numbers) else numbers


def use(cache: Cache, draws: int) -> Images:
    whole = np.ones(len(cache.split), dtype=bool)
    pool = halve(cache.split, whole, cache.groups, cache.y.numpy()) == "choose"
    ranks = np.full((draws, len(pool)), -1)
    for draw in range(draws):
        key, taken = by_draw(draw), Counter[int]()
        for image in sorted(np.flatnonzero(pool).tolist(), key=lambda image: key(cache.paths[image])):
            label = int(cache.y[image])
            ranks[draw, image] = taken[label]
            taken[label] += 1
    return Images(cache, torch.from_numpy(pool), torch.from_numpy(ranks))


def choose_roles(classes: list[str], splits: int, fit: Path | None, settings: Path | None) -> list[Roles]:
    """Rotated splits, or the one that files name. Raises UserError."""
    if fit is None and settings is None:
        try:
            return referee.rotated_roles(classes, splits)
        except ValueError as error:
            raise UserError(f"{DATA / 'index/classes.parquet'}: {error} to teach, to choose and to report on") from None
    if fit is None or settings is None:
        raise UserError("--fit and --settings: name both, files with a class a line, or none")
    named = [read_classes(path, classes) for path in (fit, settings)]
    if both := set(named[0]) & set(named[1]):
        raise UserError(f"{settings}: class {min(both)} is in {fit} too; take it out of one of them")
    rest = [name for name in classes if name not in {*named[0], *named[1]}]
    for path, found, least in ((fit, named[0], referee.TEACHERS), (settings, named[1], referee.FEWEST)):
        if len(found) < least:
            raise UserError(f"{path}: names {len(found)} classes; name {least} or more")
    if len(rest) < referee.FEWEST:
        raise UserError(f"{fit} and {settings}: leave {len(rest)} classes to report on; name fewer")
    places = [torch.tensor(sorted(map(classes.index, part))) for part in (*named, rest)]
    return [Roles(*places)]


class Split(NamedTuple):
    """One split of the classes, ready to be asked with any texts."""

    taught: Taught
    asked: dict[int | None, Asked]  # by k
    knobs: dict[int | None, Knobs]


def prepare(images: Images, roles: Roles, settings: FeatureSettings, ks: Sequence[int | None]) -> Split:
    cache, pool, ranks = images
    teaches = torch.isin(cache.y, roles.fit).numpy()
    features = Features.measure(replace(cache, split=np.where(teaches, "train", "unused")), settings)
    taught = referee.learn(features.of(cache, torch.arange(len(cache.split))), cache.y, roles)
    knobs = {k: referee.choose_knobs(taught, cache.y, pool, ranks, k) for k in ks}
    asked = {k: referee.ask(taught, cache.y, pool, ranks, roles.report, k, knobs[k]) for k in ks}
    return Split(taught, asked, knobs)


class Voices(NamedTuple):
    """Class texts (C, D) by which a file is judged: its own, and those of each draw of each control."""

    own: Tensor
    names: Tensor
    controls: dict[str, list[Tensor]]


def voices_of(texts: Texts, names: Tensor, unrelated: Tensor, draws: int) -> Voices:
    """Controls are drawn over all classes at once, alike for those that teach and those that are told apart."""
    made: dict[str, list[Tensor]] = {name: [] for name in CONTROLS}
    owned = texts.own.any(1).nonzero()[:, 0]
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        made["random"].append(class_vectors(random_units(texts.K, generator), texts.own))
        own = texts.own.clone()
        own[owned] = own[shuffled(owned, generator)]
        made["shuffled"].append(class_vectors(texts.K, own))
        made["permuted"].append(class_vectors(texts.K, texts.own[:, cycle(texts.own.shape[1], generator)]))
        made["unrelated"].append(class_vectors(strangers_of(texts.K, unrelated, generator), texts.own))
    return Voices(class_vectors(texts.K, texts.own), names, made)


def beside(voices: Voices) -> Tensor:
    """Names and texts side by side, as plda takes both."""
    return torch.cat([voices.names, voices.own], dim=1)


class Answered(NamedTuple):
    """Everything that is asked of a file by the map and by zero-shot."""

    questions: dict[str, tuple[dict[str, Answers], tuple[str, ...]]]
    placed: list[Placed]  # of its own texts, by split
    shuffled: list[list[Placed]]  # by split, by draw


def ask_all(splits: Sequence[Split], voices: Voices, g: Tensor, ks: Sequence[int | None]) -> Answered:
    count, classes = len(g), len(voices.own)
    sets = {"texts": [voices.own], **voices.controls, "names": [voices.names], "names + texts": [beside(voices)]}
    placed = {
        name: [[referee.place(split.taught, one) for split in splits] for one in each] for name, each in sets.items()
    }
    placed["none"] = [[referee.nowhere(split.taught, classes) for split in splits]]
    images = [split.asked[ks[0]].images for split in splits]
    both = F.normalize(voices.names + voices.own, dim=1)
    questions: dict[str, tuple[dict[str, Answers], tuple[str, ...]]] = {}
    looked = {**sets, "names + texts": [both]}
    zero = {
        name: [[referee.zero_shot(g, split.asked[ks[0]], one) for split in splits] for one in each]
        for name, each in looked.items()
    }
    told = {name: referee.gather(each, images, count) for name, each in zero.items()}
    questions[ZERO_SHOT] = told, referee.OWNERLESS
    for k in ks:
        answers = {
            name: referee.gather(
                [[referee.hits(split.asked[k], one[at]) for at, split in enumerate(splits)] for one in each],
                images,
                count,
            )
            for name, each in placed.items()
        }
        name = "map, 0 images" if k == 0 else f"prior, {'all' if k is None else k} image{'s' if k != 1 else ''}"
        questions[name] = answers, referee.OWNERLESS
    by_split = [[draw[at] for draw in placed["shuffled"]] for at in range(len(splits))]
    return Answered(questions, placed["texts"][0], by_split)


class Shown(NamedTuple):
    """The images that a bottleneck trains on and is asked about, of the classes that it tells apart."""

    classes: Tensor  # positions
    train: Tensor  # (m, D) global vectors of the pool
    y: Tensor  # (m,) positions in `classes`
    query: Tensor  # (n, D)
    images: Tensor  # (n,) their positions
    truth: Tensor  # (n,) positions in `classes`


def show(images: Images, roles: Sequence[Roles], named: bool) -> Shown:
    """Of all classes; where files name the roles, of those that do not teach: the encoder may have seen the others."""
    cache, pool, _ = images
    classes = torch.cat([roles[0].settings, roles[0].report, *([] if named else [roles[0].fit])]).sort().values
    of_class = cache.y == classes[:, None]
    label = of_class.double().argmax(0)
    train, query = ((of_class.any(0) & side).nonzero()[:, 0] for side in (pool, ~pool))
    return Shown(classes, cache.globals(train), label[train], cache.globals(query), query, label[query])


class Layers(NamedTuple):
    """A bottleneck: hits (1, n) by wanted number, the numbers that were reached, how far they are off an optimum."""

    hits: list[Tensor]
    nec: list[float]
    violation: list[float]


def layers_of(shown: Shown, K: Tensor) -> Layers:
    made = referee.bottleneck(shown.train, shown.y, shown.query, K, len(shown.classes), NEC)
    return Layers([referee.right(said.T[None], shown.truth) for said in made.logits], made.nec, made.violation)


class Bottlenecks(NamedTuple):
    """The questions of the bottleneck, and how its layers were made."""

    questions: dict[str, tuple[dict[str, Answers], tuple[str, ...]]]
    nec: list[float]  # reached by the texts
    violation: float  # the largest, of controls too
    choices: int  # texts that it chose among


def ask_bottleneck(
    shown: Shown,
    texts: Texts,
    unrelated: Tensor,
    apart: Mapping[str, Layers],
    scale: float,
    count: int,
    draws: int,
) -> Bottlenecks:
    """Questions of the bottleneck; `apart` are the layers that are the same for every file.

    Texts and controls choose among as many vectors, each of which stands there once: of a file that has more texts than
    there are unrelated ones, some are left out.
    """
    texts = referee.fewer_texts(texts, len(unrelated))
    means = torch.zeros(len(shown.classes), shown.train.shape[1]).index_add(0, shown.y, shown.train)
    means /= torch.bincount(shown.y, minlength=len(means))[:, None]
    own = texts.own[:, shown.classes]

    def layers(K: Tensor) -> Layers:
        chosen = referee.most_telling(K, own, means, scale, PER_CLASS)
        return layers_of(shown, K[chosen])

    made = {"texts": [layers(texts.K)], "random": [], "unrelated": [], **{name: [one] for name, one in apart.items()}}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        made["random"].append(layers(random_units(texts.K, generator)))
        made["unrelated"].append(layers(strangers_of(texts.K, unrelated, generator)))
    questions: dict[str, tuple[dict[str, Answers], tuple[str, ...]]] = {}
    for place, nec in enumerate(NEC):
        answers = {
            name: referee.gather([[one.hits[place]] for one in each], [shown.images], count)
            for name, each in made.items()
        }
        questions[f"bottleneck, NEC {nec:g}".replace("inf", "all")] = answers, referee.CONTENTLESS
    off = [value for each in made.values() for one in each for value in one.violation]
    return Bottlenecks(questions, made["texts"][0].nec, max(off, default=0.0), len(texts.K))


def random_units(K: Tensor, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(K.shape, generator=generator), dim=1)


def strangers_of(K: Tensor, unrelated: Tensor, generator: torch.Generator) -> Tensor:
    """As many vectors of texts about other things; each as often as it takes, for a file may hold more than those."""
    order = [torch.randperm(len(unrelated), generator=generator) for _ in range(-(-len(K) // len(unrelated)))]
    return unrelated[torch.cat(order)[: len(K)]]


def read_attributes(classes: list[str]) -> tuple[Tensor, dict[str, list[int]]] | None:
    """Attributes (C, A) in [0, 1] and the columns of each group; None where the data set has none of some class.

    Those with numbers alone are as CUB writes them, how many in a hundred people saw it: has_bill_shape::hooked is of
    the group has_bill_shape. One with words for values is a group, with a column a word.
    """
    path = DATA / ATTRIBUTES
    rows = store.read_table(path, "index.attributes/1").to_pylist() if path.is_file() else []
    if set(classes) - {row["class_id"] for row in rows}:
        return None
    words = {row["attribute"] for row in rows if number_of(row["value"]) is None}
    column_of: dict[tuple[str, str], int] = {}
    groups: dict[str, list[int]] = {}
    for group, column in sorted({key_of(row, words) for row in rows}):
        column_of[group, column] = len(column_of)
        groups.setdefault(group, []).append(column_of[group, column])
    table = torch.zeros(len(classes), len(column_of), dtype=torch.float64)
    place = {class_id: row for row, class_id in enumerate(classes)}
    for row in rows:
        if row["class_id"] in place:
            value = 1.0 if row["attribute"] in words else float(row["value"]) / 100
            table[place[row["class_id"]], column_of[key_of(row, words)]] = value
    return table, groups


def key_of(row: Row, words: set[str]) -> tuple[str, str]:
    """The group and the column of a row of index.attributes."""
    if row["attribute"] in words:
        return row["attribute"], row["value"]
    group, _, value = row["attribute"].partition("::")
    return group, value


def missing(
    splits: Sequence[Split], images: Images, own: Tensor, attributes: tuple[Tensor, dict[str, list[int]]]
) -> Row:
    """What is missing at 0 images: accuracy at each step, what each step adds, and a row a group of attributes."""
    cache, pool, ranks = images
    table, groups = attributes
    steps = [
        referee.decompose(
            split.taught, cache.y, pool, ranks, split.asked[0], own, table, groups, split.knobs[0]
        )
        for split in splits
    ]
    asked, count = [split.asked[0].images for split in splits], len(pool)
    y, of_group = cache.y.numpy(), groups_of(cache)
    part = referee.part_of(asked, count)

    def answers(found: Sequence[Tensor]) -> Answers:
        return referee.gather([found], asked, count)

    names = ("texts", "told", "attributes", "images")
    chain = {name: answers([getattr(step, name) for step in steps]) for name in names}
    counted = part >= 0
    found: Row = {"accuracy": {name: referee.accuracy_of(one, counted) for name, one in chain.items()}, "adds": {}}
    for before, after in itertools.pairwise(names):
        [paired] = paired_differences(chain[after].right[None], chain[before].right, y, of_group, part, by_class=True)
        found["adds"][after] = (paired.difference, paired.over)
    rows = []
    for group, columns in groups.items():
        mixed = answers([step.groups[group] for step in steps])
        told = chain["told"].right
        [paired] = paired_differences(mixed.right[None], told, y, of_group, part, by_class=True, draws=2000)
        known, seen = (
            1 - sum(getattr(step, what)[group][0] for step in steps)
            / max(sum(getattr(step, what)[group][1] for step in steps), 1e-12)
            for what in ("content", "seen")
        )  # fmt: skip
        rows.append(
            {"group": group, "columns": len(columns), "adds": paired.difference, "interval": paired.over,
             "content": known, "seen": seen}
        )  # fmt: skip
    found["groups"] = sorted(rows, key=lambda row: -row["adds"])
    return found


def carrying(splits: Sequence[Split], placed: Sequence[Placed], images: Images, texts: Texts) -> list[Row]:
    """Pairs of concept and class from the one that the map at 0 images misses most, the mean over splits."""
    classes, (concept, label) = images.cache.classes, texts.owned
    total, times = torch.zeros(len(concept), dtype=torch.float64), torch.zeros(len(concept))
    for split, one in zip(splits, placed, strict=True):
        asked = split.asked[0]
        # Of the images that are asked about: where the few classes that choose are all told right, it would be 0.
        temperature = fit_temperature(referee.logits(asked, one)[0].T.numpy(), asked.y.numpy())
        worth_of, pairs = referee.concept_worth(asked, one, texts, temperature)
        total[pairs] += worth_of
        times[pairs] += 1
    rows = [
        {"text": texts.texts[concept[at]], "class_id": classes[label[at]], "nats": (total[at] / times[at]).item()}
        for at in times.nonzero()[:, 0].tolist()
    ]
    return sorted(rows, key=lambda row: -row["nats"])


def deepest_rank(
    splits: Sequence[Split], answered: Answered, images: Images, taxonomy: Taxonomy | None
) -> tuple[list[Row], list[int]]:
    """A row a rank, the class itself first: texts against their shuffled control, among taxa of the same next rank.

    Also the ranks that are left out: those of which a split has no image that has other taxa beside its own.
    """
    if taxonomy is None:
        return [], []
    cache, chains = images.cache, torch.from_numpy(taxonomy.chains)
    count, y = len(images.pool), cache.y.numpy()
    rows: list[Row] = []
    unasked = []
    for rank in range(taxonomy.ranks):
        told: dict[str, list[list[Tensor]]] = {"texts": [[]], "shuffled": [[] for _ in answered.shuffled[0]]}
        asked = []
        for at, split in enumerate(splits):
            one = split.asked[0]
            own = chains[one.classes]
            each = [
                referee.by_rank(referee.logits(one, placed)[0], one.y, own)[rank]
                for placed in (answered.placed[at], *answered.shuffled[at])
            ]
            beside_it = each[0][1]
            asked.append(one.images[beside_it])
            told["texts"][0].append(each[0][0][None, beside_it])
            for draw, (hit, _) in enumerate(each[1:]):
                told["shuffled"][draw].append(hit[None, beside_it])
        if not all(len(part) for part in asked):
            unasked.append(rank)
            continue
        answers = {name: referee.gather(each, asked, count) for name, each in told.items()}
        [row] = referee.judge(
            {"rank": (answers, ("shuffled",))}, y, {"rank": referee.part_of(asked, count)}, groups_of(cache)
        )
        taxa = len(np.unique(taxonomy.chains[taxonomy.chains[:, rank] >= 0, rank]))
        rows.append({"rank": rank, "taxa": taxa, "row": row})
    corrected = holm([row["row"].p for row in rows])
    return [{**row, "row": row["row"]._replace(p=p)} for row, p in zip(rows, corrected, strict=True)], unasked


def judge_gate(cache: Cache, texts: Texts) -> Row:
    """The project's own gate, on training images and the half of val that chooses."""

    def side(split: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = cache.images(split)
        return cache.globals(chosen).numpy(), np.array([cache.classes[label] for label in cache.y[chosen]])

    owners = [{cache.classes[label] for label in row.nonzero()[:, 0].tolist()} for row in texts.own]
    return gate.judge(side("train"), side("choose"), texts.K.double().numpy(), owners)


def worth_of(answered: Answered, splits: Sequence[Split], y: np.ndarray, part: np.ndarray) -> list[Worth]:
    """Of the questions of the map and of plda; all images of the pool count as their mean number a class asked."""
    of_pool = torch.cat([split.asked[None].counts for split in splits]).mean().item()
    answers = [each for name, (each, _) in answered.questions.items() if name != ZERO_SHOT]
    asked = [(of_pool if k is None else float(k), each) for k, each in zip(WORTH, answers, strict=True)]
    below = [(k, each) for k, each in asked[:-1] if k < of_pool] + asked[-1:]
    arms = {arm: [each[arm] for _, each in below] for arm in ("texts", "shuffled", "none")}
    return worth([k for k, _ in below], arms, y, part)


def compare(
    results: Sequence[FileResult], y: np.ndarray, groups: np.ndarray | None, part: Mapping[str, np.ndarray]
) -> list[Side]:
    """Every pair of files, question by question: p corrected for all questions of all pairs."""
    found = []
    for at, a in enumerate(results):
        for b in results[at + 1 :]:
            for name in a.answers:
                right = a.answers[name].right, b.answers[name].right
                [paired] = paired_differences(right[0][None], right[1], y, groups, part[name], by_class=True)
                found.append(Side(a.name, b.name, name, paired, paired.p))
    return [side._replace(p=p) for side, p in zip(found, holm([side.p for side in found]), strict=True)]


def texts_of(file: ConceptFile, classes: list[str], vectors: Mapping[str, np.ndarray]) -> Texts:
    """The kept concepts of a file, in the order of its texts."""
    owners: dict[str, list[int]] = {}
    place = {class_id: number for number, class_id in enumerate(classes)}
    for row in file.kept:
        owners.setdefault(row["text"], []).append(place[row["class_id"]])
    own = torch.zeros(len(owners), len(classes), dtype=torch.bool)
    for number, labels in enumerate(owners.values()):
        own[number, labels] = True
    return Texts(tuple(owners), torch.from_numpy(np.stack([vectors[text] for text in owners])), own)


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="concept files; several are compared")
    said = "vectors that texts are mapped to: global, or keys of `moments` (default: global)"
    parser.add_argument("--features", default="global", metavar="NAME,...", help=said)
    parser.add_argument("--splits", type=int, default=5, metavar="N", help="rotated splits of classes (default: 5)")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="the classes that teach, one a line: one split")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="the classes that choose, with --fit")
    parser.add_argument("--draws", type=int, default=20, metavar="N", help="of images and of controls (default: 20)")
    said = f"of the controls of a bottleneck; {referee.FEWEST_DRAWS} give a verdict (default: {FEW_DRAWS})"
    parser.add_argument("--bottleneck-draws", type=int, default=FEW_DRAWS, metavar="N", help=said)
    parser.add_argument("--per-class", type=int, metavar="N", help="judge by no more than N kept texts a class")
    parser.add_argument("--worth", action="store_true", help="say how many images a class texts are worth, no more")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page as Markdown, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, too")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    arguments = parser.parse_args()
    for option in ("splits", "draws", "bottleneck_draws", "per_class"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')}: {value} is none; name 1 or more")
    ends = called(arguments.files)
    names = arguments.features.split(",")
    try:
        settings = FeatureSettings(features=names)
    except ValidationError as error:
        raise UserError(f"--features: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    keep_memory()
    params = load_params(arguments.params)
    params.encoder(arguments.encoder)
    rows = store.read_table(DATA / "index/classes.parquet", "index.classes/2").to_pylist()
    card = domain_words(params.domain.noun, params.domain.group, *params.domain.attributes)
    files = [
        read_file(path, end, rows, params, Names(rows, card), arguments.per_class)
        for path, end in zip(tqdm(arguments.files, desc="clean", unit="file"), ends, strict=True)
    ]
    cache = read_images(params, arguments.encoder, names)
    roles = choose_roles(cache.classes, arguments.splits, arguments.fit, arguments.settings)
    images = use(cache, arguments.draws)
    page = judge_files(params, arguments, settings, rows, files, images, roles)
    print(as_text(page), end="")
    if arguments.markdown is not None:
        store.write_text(arguments.markdown, as_markdown(page))
        say(f"{arguments.markdown}: written")
    if arguments.json is not None:
        store.write_text(arguments.json, json.dumps(as_json(page), indent=2) + "\n")
        say(f"{arguments.json}: written")


def judge_files(
    params: Params,
    arguments: Any,
    settings: FeatureSettings,
    rows: list[Row],
    files: Sequence[ConceptFile],
    images: Images,
    roles: Sequence[Roles],
) -> Page:
    """All that the page says of the files."""
    from stages.embed_controls import UNRELATED, read_unrelated

    cache, device = images.cache, choose_device(arguments.device)
    name_rows = {row["class_id"]: clean_class(row, [], params.domain, params.clean) for row in rows}
    unrelated = read_unrelated(UNRELATED)
    wanted = {row["text"] for file in files for row in file.kept}
    wanted |= {row["text"] for of_class in name_rows.values() for row in of_class} | set(unrelated)
    vectors, scale = embed(sorted(wanted), params, arguments.encoder, device)
    strangers = torch.from_numpy(np.stack([vectors[text] for text in unrelated]))
    of_names = np.stack([sum(vectors[row["text"]] for row in name_rows[name]) for name in cache.classes])
    class_names = F.normalize(torch.from_numpy(of_names), dim=1)
    ks = WORTH if arguments.worth else SHOTS
    splits = [prepare(images, one, settings, ks) for one in tqdm(roles, desc="splits of classes", unit="split")]
    g = cache.globals(torch.arange(len(cache.split)))
    y, count = cache.y.numpy(), len(cache.split)
    asked = referee.part_of([split.asked[0].images for split in splits], count)
    attributes = read_attributes(cache.classes)
    lineages = lineages_of(pa.Table.from_pylist(rows), cache.classes)
    taxonomy = None if lineages is None else Taxonomy(tuple(cache.classes), lineages)
    shown = show(images, roles, arguments.fit is not None)
    apart: dict[str, Layers] = {}
    if not arguments.worth:
        axes = torch.linalg.svd(shown.train - shown.train.mean(0), full_matrices=False).Vh
        apart = {"names": layers_of(shown, class_names[shown.classes]), "none": layers_of(shown, axes)}
    results, part = [], {}
    for file in tqdm(files, desc="judge", unit="file"):
        texts = texts_of(file, cache.classes, vectors)
        voices = voices_of(texts, class_names, strangers, arguments.draws)
        answered = ask_all(splits, voices, g, ks)
        part = dict.fromkeys(answered.questions, asked)
        found: Row = {}
        if arguments.worth:
            found["worth"] = worth_of(answered, splits, y, asked)
        else:
            asked_of = ask_bottleneck(shown, texts, strangers, apart, scale, count, arguments.bottleneck_draws)
            answered.questions.update(asked_of.questions)
            found |= {"nec": asked_of.nec, "violation": asked_of.violation, "choices": asked_of.choices}
            found["distinct"] = len(texts.K)
            part |= dict.fromkeys(asked_of.questions, referee.part_of([shown.images], count))
            found["rows"] = referee.judge(answered.questions, y, part, groups_of(cache))
            found["gate"] = gate.say(judge_gate(cache, texts))
            found["carrying"] = carrying(splits, answered.placed, images, texts)
            found["missing"] = None if attributes is None else missing(splits, images, voices.own, attributes)
            found["ranks"], found["unasked"] = deepest_rank(splits, answered, images, taxonomy)
        results.append(
            FileResult(
                name=file.name,
                classes=len(cache.classes),
                counts=texts.own.sum(0).tolist(),
                covered=file.covered,
                texts=len(file.rows),
                reasons=dict(Counter(row["drop_reason"] for row in file.rows if not row["kept"]).most_common()),
                naming=file.naming,
                bare=[name for name, has in zip(cache.classes, texts.own.any(0).tolist(), strict=True) if not has],
                answers={name: answers["texts"] for name, (answers, _) in answered.questions.items()},
                **found,
            )
        )
    setting = Setting(
        encoder=arguments.encoder,
        features=",".join(settings.features),
        roles=[tuple(map(len, one)) for one in roles],
        draws=arguments.draws,
        bottleneck_draws=arguments.bottleneck_draws,
        images=int((asked >= 0).any(0).sum()),
        told=int(images.pool.sum()),
        knobs=sorted({knobs for split in splits for knobs in split.knobs.values()}),
        per_class=arguments.per_class,
    )
    sides = compare(results, y, groups_of(cache), part) if len(results) > 1 and not arguments.worth else []
    return Page(setting, results, sides)


if __name__ == "__main__":
    run(main)
