"""Say beforehand what a data set will take: hours of every stage, bytes of every artefact, what fits, what would save.

Reads   params.yaml, data/index, and a few pictures and encoders of it; with --rates the rates of an earlier run in
        place of pictures.
Writes  to stdout; with --save FILE the rates as JSON, to plan with on a machine that has no pictures.
Costs   to load each encoder and tower, and some five seconds for each of their stages; --no-measure and --rates pass no
        picture.

Hours are those of the rates measured here, divided by --workers: buckets are shared out, and workers wait for nothing
of each other. A stage is timed alone on the whole machine, with files that were read before: on another day, and from
a slow disk, rates differ by a factor of two. Training is not timed, for it depends on method and settings; nor is what
is asked of a language model (`--dry-run` of those stages). Bytes come from drawn rows (tools/sizes.py). DVC keeps a
copy of every output beside, unless the file system shares the blocks (docs/sharing.md).

With one number of images a table has a line a stage, and what fits and what would save is said. With several it has a
line a number, and nothing else.

    python -m tools.plan
    python -m tools.plan --images 1e6 --workers 8
    python -m tools.plan --save rates.json
    python -m tools.plan --rates rates.json --images 1e4 1e5 1e6 1e7 1e8 --workers 1 8 64
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from pydantic import ValidationError

from fieldmark import store
from fieldmark.command import UserError, run, stage_parser
from fieldmark.devices import choose_device
from fieldmark.encoders.base import ImageEncoder
from fieldmark.encoders.clip import LoadedEncoder
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.nodes import nodes_of
from fieldmark.encoders.passes import Product, free_space, measure, measure_rate, parse_count
from fieldmark.params import Block, Params, load_params, places_of
from fieldmark.pictures.decode import map_ahead
from fieldmark.pictures.views import Source, count_passes, read_sources
from stages.index_images import hash_files, look_at
from tools.sizes import (
    IMAGES,
    Drawn,
    draw_artefacts,
    label_drawn,
    link,
    memory_of,
    moments_products,
    size_of_predictions,
    tokens_product,
)
from training.data.placement import SHARE
from training.train import plan_run

INDEX = Path("data/index")
# By the folder under data/, or under data/embed/ENCODER.
STAGES = {
    "images": "embed_images", "tokens": "embed_tokens", "moments": "pool_tokens", "graphs": "build_graphs",
    "labels": "label_patches",
}  # fmt: skip
Artefacts = dict[str, Drawn]  # by folder, of one encoder
# Pictures that are indexed to measure the rate.
INDEXED = 128
# DVC hashes what lies under dataset.root itself, which takes as long as the images are many; a manifest is one file.
MANIFEST_FROM = 100_000
# A bucket is read whole by label_patches and build_graphs, and made anew where one of its images changes.
BUCKET_IMAGES, BUCKET_BYTES, MOST_BUCKETS, FEWEST_BUCKETS = 6_250, 256e6, 65_536, 16


class IndexRates(Block):
    """What index_images takes."""

    images_per_s: float
    index_bytes: float  # of an image in data/index
    thumb_bytes: float


class EncoderRates(Block):
    """What the stages of an encoder take; None for a stage that params.yaml did not ask for."""

    settings: dict[str, Any]  # of the encoder, in params.yaml
    device: str
    nodes: float  # passes a second of embed_images, decoding and writing included
    tokens: float | None  # of embed_tokens
    moments: float | None  # of pool_tokens
    linked: float  # nodes a second of build_graphs
    labelled: float | None  # of label_patches


class Rates(Block):
    """What was measured on one machine."""

    machine: str
    classes: int
    index: IndexRates
    encoders: dict[str, EncoderRates]


class Line(NamedTuple):
    """One artefact."""

    stage: str
    path: str  # under data/
    seconds: float | None  # of the stage on one worker, at the first of its artefacts; None: not measured
    size: float  # bytes


class Plan(NamedTuple):
    """All that is to come for so many images."""

    images: int
    buckets: int
    lines: list[Line]
    memory: dict[str, float]  # bytes of the arrays that a run reads, by run

    @property
    def size(self) -> float:
        return sum(line.size for line in self.lines)

    @property
    def seconds(self) -> float | None:
        """On one worker; None where nothing was measured."""
        known = [line.seconds for line in self.lines if line.seconds is not None]
        return sum(known) if known else None

    def size_under(self, *parts: str) -> float:
        """Bytes of the artefacts whose path has one of these parts."""
        return sum(line.size for line in self.lines if set(parts) & set(line.path.split("/")))


class Planner:
    """The encoders of params.yaml, and what was measured."""

    def __init__(self, params: Params, classes: int, rates: Rates | None) -> None:
        self.params, self.classes, self.rates = params, classes, rates
        self.encoders = {name: self.load(params, name) for name in params.image_encoders if self.is_there(name)}

    def is_there(self, name: str) -> bool:
        """Whether an encoder can be loaded: one that a stage is to tune may not be."""
        settings = self.params.image_encoder(name)
        return not self.params.makes(settings) or any(place.exists() for place in places_of(settings))

    def load(self, params: Params, name: str) -> ImageEncoder:
        return load_image_encoder(name, params.image_encoder(name), choose_device("auto"), params.towers)

    def plan(
        self, images: int, params: Params, drawn: dict[str, Artefacts], buckets: int, rates: Rates | None
    ) -> Plan:
        """What `images` take under `params`, whose artefacts are drawn, by encoder."""
        lines = []
        if rates is not None:
            lines.append(Line(
                "index_images", "index", images / rates.index.images_per_s, rates.index.index_bytes * images
            ))
            lines.append(Line("", "thumbs", None, rates.index.thumb_bytes * images))
        for name, artefacts in drawn.items():
            done = ""
            for path, artefact in artefacts.items():
                stage, seconds = stage_of(path), None
                if rates is not None and stage != done:
                    seconds = seconds_of(stage, rates.encoders[name], params, artefacts[f"embed/{name}/images"])
                spent = None if seconds is None else seconds * images
                lines.append(Line("" if stage == done else stage, path, spent, artefact.size.of(images, buckets)))
                done = stage
        size = size_of_predictions(self.classes, params.train.seeds)
        lines += [Line("train", f"runs/{run}/predictions.parquet", None, size * images) for run in params.train.runs]
        return Plan(images, buckets, lines, self.memory(images, drawn))

    def memory(self, images: int, drawn: dict[str, Artefacts]) -> dict[str, float]:
        """Bytes of the arrays that each run reads, as far as they grow with the images."""
        found = {}
        for name in self.params.train.runs:
            reading = plan_run("params.yaml", self.params, name).reading
            words = [(reading.encoder, word) for word in reading.needs]
            words += [(other, word) for other in reading.also for word in reading.also_reads]
            found[name] = images * sum(memory_of(word, key, drawn[key]) for key, word in words if key in drawn)
        return found

    def draw(self, params: Params) -> dict[str, Artefacts]:
        return {name: draw_artefacts(encoder, params, self.classes) for name, encoder in self.encoders.items()}

    def savings(self, now: Plan) -> Iterator[tuple[str, Plan]]:
        """What would be under other settings, one knob changed at a time."""
        for said, params in variants(self.params):
            yield said, self.plan(now.images, params, self.draw(params), now.buckets, self.rates)
        for name, encoder in self.encoders.items():
            yield from self.smaller(name, encoder, now)

    def smaller(self, name: str, encoder: ImageEncoder, now: Plan) -> Iterator[tuple[str, Plan]]:
        """With pictures of two thirds of the side, in whole cells; nothing where the encoder takes no other size."""
        rows, side = rows_of_map(encoder), int(np.max(encoder.preprocessing["size"]))
        size = side // rows * -(-2 * rows // 3)
        block = "encoders" if name in self.params.encoders else "towers"
        chosen = getattr(self.params, block)
        chosen = chosen | {name: chosen[name].model_copy(update={"image_size": size})}
        params, said = self.params.model_copy(update={block: chosen}), f"{block}.{name}.image_size: {size}"
        try:
            other = self.load(params, name)
            drawn = self.draw(self.params) | {name: draw_artefacts(other, params, self.classes)}
        except UserError as error:
            print(f"{said}: is not possible ({error})")
            return
        rates = self.rates
        if rates is not None:
            gain = bare_rate(nodes_of(other, params.embed)) / bare_rate(nodes_of(encoder, params.embed))
            rates = faster(rates, name, gain)
        yield said, self.plan(now.images, params, drawn, now.buckets, rates)


def rows_of_map(encoder: ImageEncoder) -> int:
    """Rows of the map of an encoder."""
    blank = encoder.preprocess(Image.new("RGB", (8, 8)))[None].to(encoder.device)
    return int(encoder.embed_images(blank)[1].shape[1])


def bare_rate(product: Product) -> float:
    """Passes a second of an encoder alone."""
    encoder = product.encoder
    blank = encoder.preprocess(Image.new("RGB", (8, 8))).to(encoder.device)
    return measure_rate(product, encoder.normalise(blank.expand(encoder.batch_size, *blank.shape)))


def faster(rates: Rates, name: str, gain: float) -> Rates:
    """The same where the passes of one encoder are faster; decoding is as slow as it is, and so this is the most."""
    found = rates.encoders[name]
    passes = {key: value * gain for key in ("nodes", "tokens", "moments") if (value := getattr(found, key)) is not None}
    return rates.model_copy(update={"encoders": rates.encoders | {name: found.model_copy(update=passes)}})


def stage_of(path: str) -> str:
    """The stage that makes a folder under data/."""
    first, *rest = path.split("/")
    return STAGES[rest[1] if first == "embed" else first]


def seconds_of(stage: str, rates: EncoderRates, params: Params, nodes: Drawn) -> float | None:
    """Seconds an image of a stage."""
    count, views = len(nodes.rows) / IMAGES, params.embed.views + 1
    work, rate = {
        "embed_images": (count_passes(params.embed), rates.nodes),
        "embed_tokens": (views, rates.tokens),
        "pool_tokens": (views, rates.moments),
        "build_graphs": (count, rates.linked),
        "label_patches": (count, rates.labelled),
    }[stage]
    return None if rate is None else work / rate


def variants(params: Params) -> Iterator[tuple[str, Params]]:
    """Parameters that ask for less, one knob at a time, and what to write."""
    embed, graphs = params.embed, params.graphs

    def changed(block: str, **values: Any) -> Params:
        return params.model_copy(update={block: getattr(params, block).model_copy(update=values)})

    if embed.views:
        yield "embed.views: 0", changed("embed", views=0)
    if embed.tokens:
        yield "embed.tokens: false", changed("embed", tokens=False)
    if embed.grids:
        fewer = sorted(embed.grids)[:-1]
        yield f"embed.grids: {fewer}", changed("embed", grids=fewer)
    if embed.crops:
        fewer = sorted(embed.crops)[:-1]
        yield f"embed.crops: {fewer}", changed("embed", crops=fewer)
    if embed.regions is not None:
        yield "embed.regions: null", changed("embed", regions=None)
    for name in params.tokens:
        left = {key: value for key, value in params.tokens.items() if key != name}
        yield f"tokens: without {name}", params.model_copy(update={"tokens": left})
    for encoder, moments in params.moments.items():
        for name, moment in moments.items():
            if (moment.chosen_directions or 1) > 1:
                half = (moment.chosen_directions or 1) // 2
                fewer_directions = moments | {name: moment.model_copy(update={"directions": half})}
                of_all = params.moments | {encoder: fewer_directions}
                yield f"moments.{encoder}.{name}.directions: {half}", params.model_copy(update={"moments": of_all})
    for kind in ("token", "crop"):
        if kind in graphs.nodes and getattr(embed, f"{kind}s"):
            kinds = [each for each in graphs.nodes if each != kind]
            yield f"graphs.nodes: [{', '.join(kinds)}]", changed("graphs", nodes=kinds)
    if params.labels.top > 1:
        yield f"labels.top: {params.labels.top // 2}", changed("labels", top=params.labels.top // 2)


def measure_rates(planner: Planner, sources: Sequence[Source]) -> Rates:
    """Rates of this machine, from a few pictures of the data set, taken evenly from all of it."""
    encoders = {}
    for name, encoder in planner.encoders.items():
        params, some = planner.params, sources[:: max(1, len(sources) // (4 * encoder.batch_size))]
        print(f"measuring {name}", flush=True)
        found = measure([nodes_of(encoder, params.embed)], some)
        tokens, moments = tokens_product(encoder, params), moments_products(encoder, params)
        nodes = pa.concat_tables(rows for rows, in found.tables)
        classes, of_text = planner.classes, isinstance(encoder, LoadedEncoder)
        encoders[name] = EncoderRates(
            settings=params.image_encoder(name).model_dump(mode="json"),
            device=str(encoder.device),
            nodes=found.rate * count_passes(params.embed),
            tokens=measure([tokens], some).rate * (params.embed.views + 1) if tokens else None,
            moments=measure(moments, some).rate * (params.embed.views + 1) if moments else None,
            linked=len(nodes) / seconds_to(link, nodes, params),
            labelled=len(nodes) / seconds_to(label_drawn, nodes, params, classes, encoder) if of_text else None,
        )  # fmt: skip
    return Rates(
        machine=describe_machine(), classes=planner.classes, index=measure_index(planner.params), encoders=encoders
    )


def seconds_to(make: Callable[..., pa.Table], *arguments: Any) -> float:
    """Seconds that a function takes, the second time."""
    make(*arguments)
    started = perf_counter()
    make(*arguments)
    return perf_counter() - started


def measure_index(params: Params) -> IndexRates:
    """Rate of hashing and looking at pictures, and bytes of their thumbnails and rows."""
    folder = params.dataset.folder
    table = read_index().select(["path", "box"])
    every = table.to_pylist()
    rows = every[:: max(1, len(every) // INDEXED)][:INDEXED]
    for row in rows:
        row["status"] = "ok"
    started = perf_counter()
    hash_files(folder, rows)
    workers = os.cpu_count() or 1
    webps = [webp for webp in map_ahead(lambda row: look_at(folder, row), rows, workers, 64) if webp is not None]
    rate = len(rows) / (perf_counter() - started)
    written = sum(path.stat().st_size for path in INDEX.glob("*.parquet"))
    return IndexRates(
        images_per_s=rate, index_bytes=written / len(every), thumb_bytes=sum(map(len, webps)) / max(1, len(webps))
    )


def read_index() -> pa.Table:
    """The usable images of the index. Raises UserError where there is none."""
    table = store.read_table(INDEX / "images.parquet", "index.images/1", ["path", "box", "status"])
    table = table.filter(pc.equal(table["status"], "ok"))
    if store.are_documents(INDEX / "images.parquet") or not len(table):
        raise UserError(f"{INDEX}/images.parquet: has no picture to plan for")
    return table


def describe_machine() -> str:
    cores = os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    kind = platform.processor() or platform.machine()
    return f"{cores} cores ({kind}), {memory_of_machine() / 1e9:.0f} GB of memory, GPU: {', '.join(gpus) or 'none'}"


def memory_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_rates(path: Path, params: Params) -> Rates:
    """Rates of an earlier run. Raises UserError where they are of other encoders."""
    try:
        rates = Rates.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--rates {path}: cannot be read ({reason}); make it with --save {path}") from None
    for name, settings in params.image_encoders.items():
        known = rates.encoders.get(name)
        wanted = settings.model_dump(mode="json")
        if known is None or known.settings != wanted:
            raise UserError(f"--rates {path}: has no rates of {name} as params.yaml has it; measure again, with --save")
        for block, rate in (("tokens", known.tokens), ("moments", known.moments)):
            if name in getattr(params, block) and rate is None:
                raise UserError(f"--rates {path}: has no rate of {block}.{name}; measure again, with --save")
    return rates


def buckets_for(images: int, node_bytes: float) -> int:
    """The dataset.buckets to recommend: a power of two, at least FEWEST_BUCKETS, so that each is of a handy size."""
    wanted = max(images / BUCKET_IMAGES, images * node_bytes / BUCKET_BYTES, FEWEST_BUCKETS)
    return min(1 << (math.ceil(wanted) - 1).bit_length(), MOST_BUCKETS)


def duration(seconds: float | None, workers: int = 1) -> str:
    """Hours."""
    if seconds is None:
        return "-"
    hours = seconds / 3600 / workers
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def volume(size: float) -> str:
    """Bytes, in the unit that fits."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if abs(size) >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def markdown(rows: list[list[str]]) -> str:
    """A table of Markdown, its first row the head, its columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def stage_table(plan: Plan, workers: int) -> str:
    """A line an artefact."""
    rows = [["stage", "on 1 worker", f"on {workers}", "data/", "bytes an image", "bytes"]]
    for line in [*plan.lines, Line("total", "", plan.seconds, plan.size)]:
        rows.append([
            line.stage, duration(line.seconds), duration(line.seconds, workers), line.path,
            f"{line.size / plan.images:,.0f}", volume(line.size),
        ])  # fmt: skip
    return markdown(rows)


def scale_table(plans: list[Plan], workers: list[int]) -> str:
    """A line a number of images."""
    rows = [[
        "images", "`dataset.buckets`", *(f"on {count} worker{'s' if count > 1 else ''}" for count in workers),
        "index, thumbs", "nodes", "tokens", "moments", "graphs", "labels", "predictions", "all", "largest run reads",
    ]]  # fmt: skip
    for plan in plans:
        parts = [("index", "thumbs"), ("images",), ("tokens",), ("moments",), ("graphs",), ("labels",), ("runs",)]
        rows.append([
            f"{plan.images:,}", f"{plan.buckets:,}", *(duration(plan.seconds, count) for count in workers),
            *(volume(plan.size_under(*names)) for names in parts),
            volume(plan.size), volume(max(plan.memory.values(), default=0)),
        ])  # fmt: skip
    return markdown(rows)


def what_fits(plan: Plan) -> Iterator[str]:
    """Disk, memory and GPU of this machine, a line each."""
    free, memory = free_space(Path("data")), memory_of_machine()
    verdict = "fits, with DVC's copy" if 2 * plan.size <= free else "fits without DVC's copy alone (docs/sharing.md)"
    if plan.size > free:
        verdict = "does not fit"
    yield f"disk: {volume(plan.size)}, and {volume(free)} are free: {verdict}"
    for name, needed in plan.memory.items():
        held = "stays in memory" if needed <= memory / 2 else "is read from the disk again and again"
        yield f"memory: run {name} reads {volume(needed)} of arrays, of {volume(memory)}: {held}"
    for number in range(torch.cuda.device_count()):
        room = SHARE * torch.cuda.mem_get_info(number)[0]
        whole = [name for name, needed in plan.memory.items() if needed <= room]
        yield f"GPU {number}: {volume(room)} for parts; runs that lie there whole: {', '.join(whole) or 'none'}"


def advice(plan: Plan, params: Params) -> Iterator[str]:
    """Which format and how many buckets."""
    if plan.buckets != params.dataset.buckets:
        yield f"dataset.buckets: {plan.buckets} in place of {params.dataset.buckets}, before anything is embedded"
    if plan.images > MANIFEST_FROM and params.dataset.format != "manifest":
        yield f"dataset.format: manifest in place of {params.dataset.format}, so that DVC hashes one file and no folder"


def savings_table(now: Plan, found: list[tuple[str, Plan]]) -> str:
    """What each knob would save, most bytes first."""
    rows = [["write", "saves bytes", "saves time on 1 worker"]]
    for said, other in sorted(found, key=lambda each: each[1].size):
        spared = None if now.seconds is None or other.seconds is None else now.seconds - other.seconds
        rows.append([said, volume(now.size - other.size), duration(spared)])
    return markdown(rows)


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--images", type=images_of, nargs="+", metavar="N", help="default: those of the index")
    parser.add_argument("--classes", type=parse_count, metavar="N", help="default: those of the rates, or the index")
    workers = "machines like this one, or like that of --rates (default: 1)"
    parser.add_argument("--workers", type=parse_count, nargs="+", default=[1], metavar="N", help=workers)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--rates", type=Path, metavar="FILE", help="rates that --save wrote, here or elsewhere")
    chosen.add_argument("--no-measure", action="store_true", help="bytes alone, no time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the rates that are measured")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    rates = None if arguments.rates is None else read_rates(arguments.rates, params)
    classes = arguments.classes or (rates.classes if rates else count_classes())
    planner = Planner(params, classes, rates)
    if rates is None and not arguments.no_measure:
        read_index()
        planner.rates = measure_rates(planner, read_sources(params.dataset.folder))
        if arguments.save is not None:
            store.write_text(arguments.save, planner.rates.model_dump_json(indent=2) + "\n")
    drawn = planner.draw(params)
    node_bytes = sum(each[f"embed/{name}/images"].size.image for name, each in drawn.items())
    counts = arguments.images or [len(read_index())]
    plans = [planner.plan(count, params, drawn, buckets_for(count, node_bytes), planner.rates) for count in counts]
    if planner.rates is not None:
        print(f"rates: {planner.rates.machine}")
    if len(plans) > 1:
        print(scale_table(plans, arguments.workers))
        return
    [plan] = plans
    print(f"{plan.images:,} images of {classes} classes in {plan.buckets} buckets", end="\n\n")
    print(stage_table(plan, arguments.workers[0]), end="\n\n")
    print(*what_fits(plan), *advice(plan, params), sep="\n", end="\n\n")
    print(savings_table(plan, list(planner.savings(plan))))


def images_of(text: str) -> int:
    """1000 or 1e3. Raises ValueError, which argparse reports."""
    return parse_count(f"{float(text):.0f}")


def count_classes() -> int:
    return len(store.read_table(INDEX / "classes.parquet", "index.classes/2", ["class_id"]))


if __name__ == "__main__":
    run(main)
