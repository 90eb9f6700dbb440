"""The referee's page: what tools.referee found of concept files, as text, Markdown and figures. Pure functions."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.referee import (
    CONTENTLESS,
    FEWEST_DRAWS,
    OWNERLESS,
    PRIOR_SHRINKAGES,
    SHRINKAGES,
    Answers,
    Knobs,
    Row,
)
from evaluation.statistics import LEVEL, UNITS, Paired
from evaluation.words import lay_out, percent, points, points_range, written_p
from evaluation.worth import Worth
from fieldmark.command import counted, name_some, printable
from training.layers.logistic import L2_WITHOUT_VAL
from training.layers.sparse import TOLERANCE

OVER = ("random", "shuffled", "permuted", "names", "none")  # controls whose differences are shown
COLUMNS = ("random", "shuffled", "permuted", "unrelated", "names", "names + texts", "none")
SHOWN = 8  # concepts and groups of attributes that are named
STEPS = {
    "texts": "the texts, through the map",
    "told": "attributes foretold from the texts",
    "attributes": "the true attributes",
    "images": "the means of all images of the pool",
}
CLAIMS: dict[tuple[str, ...], str] = {
    OWNERLESS: "that the texts say something of their own classes",
    CONTENTLESS: "that the texts say more of these pictures than random or unrelated ones, whoever owns them,",
}  # by what is to be beaten
MISSING = {"told": "map", "attributes": "content", "images": "what attributes do not say, or no map carries"}


class Setting(NamedTuple):
    """How all files were asked."""

    encoder: str
    features: str
    roles: list[tuple[int, ...]]  # by split, the numbers of classes that teach, choose and are reported on
    draws: int
    bottleneck_draws: int
    images: int  # that are asked about
    told: int  # of the pool
    knobs: list[Knobs]  # that were chosen
    per_class: int | None


class FileResult(NamedTuple):
    """What was found of one file. `rows` and the like are empty where only its worth was asked, and the reverse."""

    name: str
    classes: int
    counts: list[int]  # of kept texts, by class
    covered: int
    texts: int
    reasons: dict[str, int]
    naming: dict[str, dict[str, float]]
    bare: list[str]  # classes that keep no text
    answers: dict[str, Answers]
    rows: Sequence[Row] = ()
    gate: str = ""
    carrying: Sequence[dict[str, Any]] = ()
    missing: dict[str, Any] | None = None
    ranks: Sequence[dict[str, Any]] = ()
    worth: Sequence[Worth] = ()
    unasked: Sequence[int] = ()  # ranks of which a split of the classes has no image that could be asked
    nec: Sequence[float] = ()  # effective concepts a class that the bottleneck has, where so many were wanted
    violation: float = 0.0  # the largest of a sparse layer's choice, of texts and of controls
    distinct: int = 0  # kept texts, one of several classes counted once
    choices: int = 0  # of these that the bottleneck chooses among


class Side(NamedTuple):
    """Two files on one question: a - b, p corrected for all of them."""

    a: str
    b: str
    question: str
    paired: Paired
    p: float


class Page(NamedTuple):
    setting: Setting
    files: Sequence[FileResult]
    sides: Sequence[Side]


Block = tuple[str, list[list[str]] | None, list[str]]  # a heading, a table, lines


def blocks(page: Page) -> list[Block]:
    """The page in its order."""
    found = [about(page.setting)]
    for file in page.files:
        found.append(coverage(file))
        found += [worth_table(file)] if file.worth else [questions(file), concepts(file)]
        found += [missing(file.missing)] if file.missing else []
        found += [ranks(file)] if file.ranks or file.unasked else []
    return [*found, *([sides(page.sides)] if page.sides else [])]


def chosen(name: str, values: Collection[float], grid: Sequence[float]) -> str:
    """Which points of a grid were taken, and where it ends."""
    taken = ", ".join(map(str, sorted(values)))
    return f"{name} chosen: {taken} of {', '.join(map(str, grid))} ({min(grid)} and {max(grid)} are its edges)"


def about(setting: Setting) -> Block:
    fit, settings, report = setting.roles[0]
    splits = counted(len(setting.roles), "split of the classes", "rotated splits of the classes")
    return (
        f"Concept files, judged with {setting.encoder}",
        None,
        [
            f"vectors: {setting.features}; {splits}: {fit} teach, {settings} choose, {report} are told apart (chance"
            f" {percent(1 / report)} %); {setting.draws} draws, {setting.bottleneck_draws} of a bottleneck's controls",
            f"{setting.images} images of train and val are asked about, {setting.told} others may be told; no test"
            " image is opened",
            chosen("shrinkage", {knobs.shrinkage for knobs in setting.knobs}, SHRINKAGES),
            chosen("shrinkage of the prior", {knobs.prior_shrinkage for knobs in setting.knobs}, PRIOR_SHRINKAGES),
            *([f"no more than {setting.per_class} kept texts a class"] if setting.per_class else []),
        ],
    )


def coverage(file: FileResult) -> Block:
    counts = np.array(file.counts)
    kept, dropped = int(counts.sum()), sum(file.reasons.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in file.reasons.items()) or "none"
    bare = f": {name_some(file.bare, 5)}" if file.bare else ""
    lines = [
        f"{file.texts} texts of {file.covered} of {file.classes} classes; {kept} kept, {int(np.median(counts))} a class"
        f" ({counts.min()} to {counts.max()}); {counted(len(file.bare), 'class keeps', 'classes keep')} none{bare}",
        f"dropped {dropped}: {reasons}",
        "name "
        + "; ".join(
            f"{what}: {percent(file.naming['all'][kind])} % of all texts, {percent(file.naming['kept'][kind])} % of"
            " those kept"
            for kind, what in (("own", "their class"), ("other", "another class"), ("group", "a group"))
        ),
    ]
    return file.name, None, [*lines, *([f"gate: {file.gate}"] if file.gate else [])]


def questions(file: FileResult) -> Block:
    names = [name for name in COLUMNS if any(name in row.others for row in file.rows)]
    over = [name for name in OVER if any(name in row.over for row in file.rows)]
    table = [["accuracy, %", "texts", "95 %", *names, *(f"- {name}" for name in over), "p", "says"]]
    for row in file.rows:
        line = [row.name, percent(row.accuracy), f"[{percent(row.interval[0])}, {percent(row.interval[1])}]"]
        line += [percent(row.others[name]) if name in row.others else "" for name in names]
        line += [said(row.over.get(name)) for name in over]
        table.append([*line, written_p(row.p), verdict(row)])
    return (
        f"{file.name}: what its texts reach",
        table,
        [
            *(line for against in CLAIMS for line in claim(against, file.rows)),
            "differences in points with 95 % intervals over classes and splits (over draws where there is one split);"
            " says yes: better than every draw of shuffled and of permuted (of random and of unrelated in a bottleneck,"
            f" which does not read whose a text is), and p under {LEVEL}, corrected (Holm) for {len(file.rows)}"
            " questions",
            "random: random unit vectors; shuffled: the same vectors between classes; permuted: a class has another's;"
            " unrelated: texts about other things; names: class names alone; none: no text, images of other classes"
            " alone (in a bottleneck the leading directions of its images)",
            *bottleneck_lines(file),
        ],
    )


def claim(against: tuple[str, ...], rows: Sequence[Row]) -> list[str]:
    """In which questions that have these controls to beat a file does, and why others have no verdict."""
    rows = [row for row in rows if row.against == against]
    if not rows:
        return []
    yes, why = [row.name for row in rows if row.shown], no_verdict(rows)
    if not any(row.judged for row in rows):
        return [f"{CLAIMS[against]} has no verdict: {why}"]
    found = f"shown in: {'; '.join(yes)}" if yes else "shown in no question"
    return [f"{CLAIMS[against]} is {found}" + (f"; others have no verdict: {why}" if why else "")]


def no_verdict(rows: Sequence[Row]) -> str:
    """Why some rows have none; empty where all have one."""
    why = [f"fewer than {UNITS} classes"] if any(row.few_units for row in rows) else []
    if any(row.few_draws for row in rows):
        draws = min(row.draws[name] for row in rows for name in row.against)
        option = "--bottleneck-draws" if rows[0].against == CONTENTLESS else "--draws"
        why.append(
            f"{counted(draws, 'draw', 'draws')} of a control, all of which a file that says nothing beats in one case"
            f" of {draws + 1} ({option} {FEWEST_DRAWS} or more)"
        )
    return "; ".join(why)


def bottleneck_lines(file: FileResult) -> list[str]:
    """How the sparse layers were fitted, where there are any."""
    lines = []
    if file.choices < file.distinct:
        lines.append(
            f"a bottleneck chooses among {file.choices} of {file.distinct} distinct texts, for there are no more"
            " unrelated ones"
        )
    if file.nec:
        lines.append(
            f"NEC reached by the texts: {', '.join(f'{nec:.1f}' for nec in file.nec)}; L1 chooses the weights, and they"
            f" are fitted anew at an L2 strength of {L2_WITHOUT_VAL}"
        )
    if file.violation > TOLERANCE:
        lines.append(
            f"a sparse layer's choice ended {file.violation:.2g} of its penalty off an optimum, more than the"
            f" {TOLERANCE:g} that is asked: its NEC and accuracy may be off"
        )
    return lines


def verdict(row: Row) -> str:
    if not row.judged:
        return "no verdict"
    return "yes" if row.shown else "not shown"


def said(paired: Paired | None) -> str:
    return "" if paired is None else f"{points(paired.difference)} {points_range(paired.over)}"


def concepts(file: FileResult) -> Block:
    table = [["nats", "class", "concept"]]
    first, last = file.carrying[:SHOWN], file.carrying[max(SHOWN, len(file.carrying) - SHOWN) :]
    table += [[f"{1000 * row['nats']:+.2f}", row["class_id"], row["text"]] for row in (*first, *last)]
    positive = sum(row["nats"] > 0 for row in file.carrying)
    return (
        f"{file.name}: which concepts carry it",
        table,
        [
            "thousandths of a nat an image that the map at 0 images loses without the concept: most, and least",
            f"{positive} of {len(file.carrying)} concepts help; no interval: with so many, some seem to by chance",
        ],
    )


def missing(found: dict[str, Any]) -> Block:
    table = [["at 0 images", "accuracy, %", "adds", "which is"]]
    for name, what in STEPS.items():
        adds = found["adds"].get(name)
        line = [what, percent(found["accuracy"][name]), "", ""]
        if adds is not None:
            line[2:] = [f"{points(adds[0])} {points_range(adds[1])}", MISSING[name]]
        table.append(line)
    table.append(["all right", "100.0", points(1 - found["accuracy"]["images"]), "what the encoder does not see"])
    table.append(["attributes put in", "", "adds", "texts foretell, images show (share of spread explained)"])
    for row in found["groups"][:SHOWN]:
        known = f"{percent(row['content'])} %, {percent(row['seen'])} %"
        table.append([row["group"], "", f"{points(row['adds'])} {points_range(row['interval'])}", known])
    return "what is missing", table, ["each group alone in its true columns, the others as texts foretell them"]


def ranks(file: FileResult) -> Block:
    table = [["rank", "taxa", "texts", "shuffled", "texts - shuffled", "p", "says"]]
    for each in file.ranks:
        row = each["row"]
        name = "class" if each["rank"] == 0 else str(each["rank"])
        over = row.over["shuffled"]
        table.append(
            [name, str(each["taxa"]), percent(row.accuracy), percent(row.others["shuffled"]), said(over),
             written_p(row.p), verdict(row)]
        )  # fmt: skip
    deepest = next((each["rank"] for each in file.ranks if each["row"].shown), None)
    found = {None: "at no rank", 0: "down to the class itself"}.get(deepest, f"down to rank {deepest}")
    why = no_verdict([each["row"] for each in file.ranks])
    lines = [f"texts tell taxa of one next rank apart {found}; at 0 images", *([f"no verdict: {why}"] if why else [])]
    if file.unasked:
        left = ", ".join("the class itself" if rank == 0 else f"rank {rank}" for rank in file.unasked)
        lines.append(f"left out: {left}; in a split of the classes no image has another taxon beside its own")
    return f"{file.name}: by rank", table if file.ranks else None, lines


def worth_table(file: FileResult) -> Block:
    head = ["images a class", "texts, %", "shuffled, %", "none, %", "worth, images", "95 %"]
    table = [[*head, "shuffled are worth", "texts - shuffled", "95 %"]]
    for row in file.worth:
        figures = [percent(value) for value in (row.texts, row.shuffled, row.none)]
        found = [images(row.images), images_range(row.interval), images(row.shuffled_images)]
        found += [images(row.over), images_range(row.over_interval)]
        last = row is file.worth[-1]  # where the curve ends, it cannot say what lies behind
        table.append([f"{row.k:g}", *figures, *([""] * len(found) if last else found)])
    first, end = file.worth[0], file.worth[-1].k
    than = f"their lead over the same texts shuffled is {images(first.over)} images {images_range(first.over_interval)}"
    return (
        f"{file.name}: what its texts are worth",
        table,
        [
            f"beside no image the texts are worth {in_words(first, end)} a class; {than}",
            "worth: by how many more images a class nothing but images reaches the same accuracy; in straight lines"
            f" between the numbers of images above; more: than the {end:g} at which the curve without texts ends",
        ],
    )


def images(value: float) -> str:
    return {float("inf"): "more", float("-inf"): "less"}.get(value) or f"{value:z.2f}"


def images_range(ends: tuple[float, float]) -> str:
    return f"[{images(ends[0])}, {images(ends[1])}]"


def in_words(row: Worth, end: float) -> str:
    """What texts are worth beside no image, on a curve that ends at so many images."""
    low, high = row.interval
    if row.images == float("inf"):
        least = "" if low == float("inf") else f", {images(low)} at the least (95 %)"
        return f"more images than the {end:g}{least}"
    if high < 1:
        return f"less than one image ({images(row.images)} {images_range(row.interval)})"
    return f"{images(row.images)} images {images_range(row.interval)}"


def sides(found: Sequence[Side]) -> Block:
    table = [["a", "b", "question", "a - b", "p"]]
    for side in found:
        table.append([side.a, side.b, side.question, said(side.paired), written_p(side.p)])
    clear = [side for side in found if side.p < LEVEL and side.paired.judged]
    lines = [f"p corrected (Holm) for {len(found)} comparisons, 95 % intervals over classes and splits"]
    lines += [
        f"{side.a if side.paired.difference > 0 else side.b} is better in {side.question} than"
        f" {side.b if side.paired.difference > 0 else side.a}"
        for side in clear
    ] or ["no file is shown to be better than another"]
    return "side by side", table, lines


def as_text(page: Page) -> str:
    parts = []
    for heading, table, lines in blocks(page):
        parts.append("\n".join([heading, *([lay_out(table)] if table else []), *lines]))
    return printable("\n\n".join(parts)) + "\n"


def as_markdown(page: Page) -> str:
    parts = []
    for heading, table, lines in blocks(page):
        parts.append(f"## {heading}")
        if table:
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
        parts.append("\n".join(f"- {line}" for line in lines))
    return printable("\n\n".join(parts)) + "\n"


def finite(row: Worth) -> dict[str, Any]:
    """A row of figures, null where texts are worth more images than the curve has: JSON has no infinity."""

    def known(value: Any) -> Any:
        if isinstance(value, tuple):
            return [known(each) for each in value]
        return None if value in (float("inf"), float("-inf")) else value

    return {name: known(value) for name, value in row._asdict().items()}


def as_json(page: Page) -> dict[str, Any]:
    """The same figures for programs, with every concept and every group of attributes."""
    files = []
    for file in page.files:
        found = file._asdict()
        found.pop("answers")
        rows = [
            {
                **row._asdict(),
                "over": {name: one._asdict() for name, one in row.over.items()},
                "judged": row.judged,
                "shown": row.shown,
            }
            for row in file.rows
        ]
        levels = [
            {**each, "row": {**each["row"]._asdict(), "over": each["row"].over["shuffled"]._asdict()}}
            for each in file.ranks
        ]
        files.append({**found, "rows": rows, "ranks": levels, "worth": [finite(each) for each in file.worth]})
    sides = [{**side._asdict(), "paired": side.paired._asdict()} for side in page.sides]
    knobs = [each._asdict() for each in page.setting.knobs]
    return {"setting": {**page.setting._asdict(), "knobs": knobs}, "files": files, "sides": sides}
