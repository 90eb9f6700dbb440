"""Intervene on a bottleneck: what becomes of each class without a concept, or with one text more.

Reads   data/runs/RUN/ of a run of concept_bottleneck, and what that run reads; the text encoder, for --add.
Writes  to stdout; what the stages made stays as it is.
Costs   seconds; with --add loading the encoder and a fit of the last layer.

`--without CONCEPT` takes a concept's term out of every class and leaves all other weights: each picture counts as an
average one in it. `--add TEXT` sets a text beside the concepts that the run reads and fits the last layer anew, under
the settings that val chose and on what the run's regime shows; a concept that is taken out as well is then not there in
the fit. Judged are the pictures of the half of val that chose nothing. The interval is over these pictures, or over
groups where the index names any, paired (evaluation/statistics.py); of a class there are too few for one.

    python -m tools.intervene --run bottleneck --without "a fish with a yellow tail"
    python -m tools.intervene --run bottleneck --add "a fish with a blue ring around the eye"
"""

import copy
import difflib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow as pa
import torch
from torch import Tensor

from evaluation.runs import group_numbers, groups_of
from evaluation.statistics import paired_difference
from evaluation.words import lay_out, percent, points, points_range
from fieldmark.command import UserError, counted, run, stage_parser
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.encoders.clip import load_encoder
from fieldmark.params import Params, load_params
from fieldmark.store import read_folder_header, read_table
from training.data import Cache, read_cache
from training.data.bank import Bank
from training.folds import settle
from training.loop import predict
from training.methods import concept_bottleneck
from training.methods.concept_bottleneck import ConceptBottleneck, Settings
from training.metrics import Ints
from training.regimes import hide_test, read_regime
from training.restore import Restored, restore

DATA = Path("data")
METHOD = "concept_bottleneck"
UNITS = {"images": ("picture", "pictures"), "groups": ("group", "groups")}  # that an interval may be over


class Effect(NamedTuple):
    """What an intervention does to n pictures."""

    before: Tensor  # (n, C) logits
    after: Tensor
    y: Tensor  # (n,)
    groups: Ints | None = None  # (n,), where the index names any


def find_rows(texts: Sequence[str | None], read: Collection[int], asked: Sequence[str]) -> list[int]:
    """The rows of the bank that have these texts, of those that are read.

    Raises UserError for a text that the run does not read, with those like it.
    """
    known = {(texts[row] or "").casefold(): row for row in sorted(read, reverse=True)}
    for text in asked:
        if text.casefold() not in known:
            close = difflib.get_close_matches(text.casefold(), known, n=3, cutoff=0.3)
            hint = "; ".join(texts[known[one]] or "" for one in close)
            raise UserError(f"--without: the run reads no concept {text!r}{f'; it reads: {hint}' if hint else ''}")
    return [known[text.casefold()] for text in asked]


def without(model: ConceptBottleneck, rows: Sequence[int]) -> ConceptBottleneck:
    """The model without the terms of these rows of the bank."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.linear.weight[:, torch.isin(model.row, torch.tensor(rows, device=model.row.device))] = 0
    return changed


def embed(params: Params, name: str, texts: Sequence[str], device: torch.device) -> Tensor:
    """Unit vectors (k, D) of texts by encoder `name`, on the CPU.

    Raises UserError where it is another one than the pictures were embedded with.
    """
    encoder, folder = load_encoder(name, params.encoder(name), device, params.towers), DATA / f"embed/{name}/images"
    if read_folder_header(folder, "embed.nodes/1", params.dataset.buckets).params["encoder"] != encoder.fingerprint:
        raise UserError(
            f"{folder}: was made with another {name} than encoders.{name} names now (other weights or parameters);"
            " bring it back, or run embed_images and what follows again (dvc repro)"
        )
    return torch.nn.functional.normalize(encoder.embed_texts(list(texts)).float().cpu(), dim=1)


def fit_with(
    cache: Cache, settings: Settings, model: ConceptBottleneck, vectors: Tensor, dropped: Sequence[int], seed: int
) -> ConceptBottleneck:
    """A model fitted anew on the concepts that `model` reads, without rows of the bank, beside unit vectors (k, D).

    The cache is as training saw it, under the run's regime. The vectors are the last k rows of the model's.
    """
    bank = cache.part(Bank)
    kept = torch.zeros_like(bank.kept)
    kept[model.row] = True
    kept[list(dropped)] = False
    more = torch.ones(len(vectors), dtype=torch.bool, device=kept.device)
    wider = replace(
        bank,
        K=torch.cat([bank.K, vectors.to(bank.K)]),
        kind=(*bank.kind, *("visual",) * len(vectors)),
        kept=torch.cat([kept, more]),
        owners=None,
    )
    # The choice of `concepts` is made: chosen again, a text might be left out, and others come in for it.
    settings = settings.model_copy(update={"concepts": None})
    fitted = concept_bottleneck.fit(hide_test(cache.with_part(wider)), settings, seed)
    return cast(ConceptBottleneck, fitted.model)


def refit(
    params: Params, path: str, asked: Restored, cache: Cache, vectors: Tensor, dropped: Sequence[int]
) -> ConceptBottleneck:
    """`fit_with` of a run as it was trained: its regime's images and labels, and what val chose."""
    told = read_regime(path, "train.regime", params.train.regime).apply(cache, params.train.seed)
    chosen = cast(Settings, settle(asked.settings, asked.config["chosen"][str(asked.seed)]))
    return fit_with(told, chosen, cast(ConceptBottleneck, asked.model), vectors, dropped, asked.seed)


def unused(model: ConceptBottleneck, added: Sequence[str]) -> list[str]:
    """A line for each added text that no class has a weight for; the texts are the model's last rows."""
    weight = model.linear.weight[:, model.linear.weight.shape[1] - len(added) :]
    return [
        f"no class has a weight for {text!r}: nec leaves it out"
        for text, used in zip(added, weight.any(0).tolist(), strict=True)
        if not used
    ]


def describe(effect: Effect, names: Sequence[str]) -> str:
    """The effect in words and as a table, a class a row, the greatest loss first."""
    right = [(logits.argmax(1) == effect.y).numpy() for logits in (effect.before, effect.after)]
    own = (effect.after - effect.before).gather(1, effect.y[:, None])[:, 0] - (effect.after - effect.before).mean(1)
    found = paired_difference(right[1], right[0], effect.y.numpy(), effect.groups)
    said = [
        f"{counted(len(effect.y), 'picture', 'pictures')} of val: {percent(right[0].mean())} % before,"
        f" {percent(right[1].mean())} % after: {points(found.difference)} {points_range(found.over)}"
        f" (95 % over {counted(found.units, *UNITS[found.unit])})",
        "",
    ]
    rows = []
    for label, name in enumerate(names):
        of_class = (effect.y == label).numpy()
        if of_class.any():
            before, after = (one[of_class].mean() for one in right)
            moved = own[torch.from_numpy(of_class)].mean().item()
            rows.append((after - before, moved, name, int(of_class.sum()), before, after))
    rows.sort(key=lambda row: (row[0], row[1]))
    table = [["class", "pictures", "before", "after", "its logit"]]
    table += [[name, str(n), percent(was), percent(now), f"{moved:+.2f}"] for _, moved, name, n, was, now in rows]
    foot = "its logit: how a class's logit moves on its own pictures, less the mean over classes"
    return "\n".join([*said, lay_out(table), foot])


def intervene(params: Params, path: str, name: str, removed: Sequence[str], added: Sequence[str], device: str) -> str:
    """What becomes of run `name`; `path` is the parameters' file, for messages."""
    asked: Restored = restore(params, path, name, DATA)
    if asked.method != METHOD:
        raise UserError(f"{path}: train.runs.{name}: is of {asked.method}; interventions are on {METHOD} alone")
    set_up_torch()
    model, cache = cast(ConceptBottleneck, asked.model), read_cache(
        DATA, asked.encoder, params.dataset.buckets, asked.reads, asked.also, asked.also_reads
    )
    bank: pa.Table = read_table(DATA / f"bank/{asked.encoder}.parquet", "bank/1", ["concept_idx", "text"])
    dropped = find_rows(bank.sort_by("concept_idx")["text"].to_pylist(), model.row.tolist(), removed)
    notes: list[str] = []
    if added:
        vectors = embed(params, asked.encoder, added, choose_device(device))
        changed = refit(params, path, asked, cache, vectors, dropped)
        notes = unused(changed, added)
    else:
        changed = without(model, dropped)
    images = cache.images("val")
    index = read_table(DATA / "index/images.parquet", "index.images/1", ["path", "group", "status"])
    groups = group_numbers([cache.paths[image] for image in images.tolist()], groups_of(index))
    effect = Effect(predict(model, cache, images), predict(changed, cache, images), cache.y[images], groups)
    table = read_table(DATA / "index/classes.parquet", "index.classes/2", ["class_id", "name"])
    names = dict(zip(table["class_id"].to_pylist(), table["name"].to_pylist(), strict=True))
    return "\n".join([*notes, describe(effect, [names[class_id] for class_id in cache.classes])])


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--run", required=True, metavar="NAME", help=f"a run of train.runs, of {METHOD}")
    parser.add_argument("--without", action="append", default=[], metavar="CONCEPT", help="taken out; may be repeated")
    parser.add_argument("--add", action="append", default=[], metavar="TEXT", help="set beside; may be repeated")
    parser.add_argument("--device", default="auto", help="of the text encoder (default: auto)")
    given = parser.parse_args()
    if not given.without and not given.add:
        raise UserError("tools.intervene: give --without CONCEPT or --add TEXT")
    print(intervene(load_params(given.params), given.params, given.run, given.without, given.add, given.device))


if __name__ == "__main__":
    run(main)
