"""Turn the plain-text files of published text graphs into nodes.csv and edges.csv, which format text_graph reads.

    WHAT     SOURCE, a folder
    cora     cora.content, cora.cites, and in mccallum/cora/ papers and extractions/: Cora as LINQS publishes it, with
             McCallum's titles and abstracts
    cane     data.txt, graph.txt, group.txt: Cora with abstracts in order, as the repository of CANE has it
    pubmed   Pubmed-Diabetes.NODE.paper.tab, Pubmed-Diabetes.DIRECTED.cites.tab and pubmed.json, or the first two in
             data/, or in Pubmed-Diabetes/data/
    arxiv    mapping/, raw/ of ogbn-arxiv, as .csv or .csv.gz, and titleabs.tsv or titleabs.tsv.gz

Reads    these files. Never a pickle, a .pt or an .npz of objects: reading one runs the code of whoever wrote it.
Writes   DESTINATION/nodes.csv (id, title, text, label, split) and DESTINATION/edges.csv (src cites dst).
Costs    seconds; ogbn-arxiv a minute and 2 GB of memory.

Splits. arxiv: by year as published, up to 2017 train, 2018 val, from 2019 on test. The others have no published split
of these nodes: 60 % train, 20 % val and 20 % test, as TAPE (He et al., ICLR 2024 [code]) has them, but drawn by the
hash of seed and id and not in TAPE's order, so that figures do not compare image by image; or --splits FILE, a CSV with
the columns id and split.

What the files lack is counted and said: papers without a text stay, and index_images lists them as of no use; papers
without a label, and edges that lead to none of the papers, are left out.

    python -m tools.text_graph cora downloads/cora_orig data/cora
    python -m tools.text_graph arxiv downloads/ogbn_arxiv data/arxiv
"""

import argparse
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fieldmark.command import UserError, counted, run
from fieldmark.documents import EDGES, NODES
from fieldmark.listing import SPLITS, read_csv
from fieldmark.store import sha256, write_atomic

# Shares of the papers that train and that choose; the others test.
TRAIN, VAL = 0.6, 0.2
RUNS_CODE = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npz", ".npy", ".joblib")
PLANETOID = ("x", "tx", "allx", "y", "ty", "ally", "graph")
# What label=1, 2 and 3 of Pubmed-Diabetes stand for [mem: README of LINQS].
DIABETES = {
    "1": "Diabetes Mellitus, Experimental", "2": "Diabetes Mellitus Type 1", "3": "Diabetes Mellitus Type 2",
}  # fmt: skip
TRAIN_UNTIL, VAL_UNTIL = 2017, 2018


@dataclass
class Paper:
    label: str
    title: str = ""
    text: str = ""
    split: str = ""


@dataclass
class Graph:
    """Papers by id, and who cites whom."""

    papers: dict[str, Paper]
    edges: Iterable[tuple[str, str]]  # (citing, cited)
    said: list[str] = field(default_factory=list)  # what was found on the way, for people


def is_pickle(path: Path) -> bool:
    """Whether a file is one of those whose reading runs code: torch's, Python's, Planetoid's ind.NAME.x."""
    prefix, _, kind = path.name.rpartition(".")
    return path.suffix.lower() in RUNS_CODE or (prefix.startswith("ind.") and kind in PLANETOID)


def check_source(source: Path, what: str) -> None:
    """Raises UserError where the source is no folder, or a pickle."""
    if is_pickle(source):
        remedy = f"name the folder with the plain-text files of {what} (python -m tools.text_graph --help)"
        raise UserError(f"{source}: is a pickle, and reading one runs the code of whoever wrote it; {remedy}")
    if not source.is_dir():
        raise UserError(f"{source}: is no folder; name the one with the files of {what}")


def find(source: Path, *names: str) -> Path:
    """The first of these files that is there, plain or gzipped. Raises UserError naming pickles that lie there."""
    for name in names:
        for path in (source / name, source / f"{name}.gz"):
            if path.is_file():
                return path
    pickles = sorted(path.name for path in source.rglob("*") if is_pickle(path))
    what = f"{source}: has no {names[0]}"
    if pickles:
        why = f"what is there ({pickles[0]}) is a pickle, and reading one runs the code of whoever wrote it"
        raise UserError(f"{what}; {why}; get the plain-text files")
    raise UserError(f"{what}; unpack all of it there (python -m tools.text_graph --help names the files)")


def open_text(path: Path) -> IO[str]:
    """A text file, plain or gzipped, that is read line by line; bytes that are not UTF-8 count as Latin-1."""
    whole = path.read_bytes()
    if path.suffix == ".gz":
        try:
            whole = gzip.decompress(whole)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: is no whole gzip ({error}); get it again") from None
    try:
        return io.StringIO(whole.decode())
    except UnicodeDecodeError:
        return io.StringIO(whole.decode("latin-1"))


def fields(path: Path, count: int, skip: int = 0, separator: str = "\t") -> Iterator[list[str]]:
    """The lines of a table, split into `count` fields, after `skip` lines. Raises UserError for one that has fewer."""
    for number, line in enumerate(open_text(path), start=1):
        if number <= skip or not line.strip():
            continue
        row = line.rstrip("\r\n").split(separator)
        if len(row) < count:
            raise UserError(f"{path}: line {number} has not {count} fields: {line.strip()[:60]!r}; get it again")
        yield row


def read_cora(source: Path) -> Graph:
    """Cora by LINQS; texts by the file of each paper that `papers` names last, as TAPE takes them [code]."""
    papers = {row[0]: Paper(row[-1]) for row in fields(find(source, "cora.content"), 3)}
    cites = [(row[1], row[0]) for row in fields(find(source, "cora.cites"), 2)]  # cited, citing
    texts = find(source, "mccallum/cora/papers").parent
    file_of = {row[0]: row[1] for row in fields(texts / "papers", 2) if row[0] in papers}
    lacking = 0
    for name, paper in papers.items():
        file = file_of.get(name, "")
        # Some archives have the colons of these names as underlines.
        places = [texts / "extractions" / each for each in (file, file.replace(":", "_"))]
        place = next((each for each in places if each.is_file()), None)
        if place is None:
            lacking += 1
            continue
        for line in open_text(place):
            key, colon, value = line.partition(":")
            if colon and key == "Title":
                paper.title = value.strip()
            elif colon and key == "Abstract":
                paper.text = value.strip()
    said = [f"{counted(lacking, 'paper has', 'papers have')} no file in {texts / 'extractions'}"] if lacking else []
    return Graph(papers, cites, said)


def read_cane(source: Path) -> Graph:
    """Cora as CANE has it: line k of data.txt and group.txt is node k. Its classes have numbers, no names."""
    texts = [line.strip() for line in open_text(find(source, "data.txt"))]
    groups = [line.strip() for line in open_text(find(source, "group.txt"))]
    if len(texts) != len(groups):
        what = f"data.txt has {len(texts)} lines, group.txt {len(groups)}"
        raise UserError(f"{source}: {what}; they do not belong together")
    papers = {
        str(number): Paper(f"group-{group}", text=text)
        for number, (text, group) in enumerate(zip(texts, groups, strict=True))
        if group
    }
    bare = len(texts) - len(papers)
    said = [f"{counted(bare, 'paper has', 'papers have')} no label, and no place"] if bare else []
    return Graph(papers, [(row[0], row[1]) for row in fields(find(source, "graph.txt"), 2)], said)


def read_pubmed(source: Path) -> Graph:
    """Pubmed-Diabetes by LINQS; texts by PMID, or in the order of the papers, as TAPE takes them [code]."""
    places = ("", "data/", "Pubmed-Diabetes/data/")
    node = find(source, *(f"{place}Pubmed-Diabetes.NODE.paper.tab" for place in places))
    cites = find(source, *(f"{place}Pubmed-Diabetes.DIRECTED.cites.tab" for place in places))
    papers = {}
    for row in fields(node, 2, skip=2):
        label = row[1].removeprefix("label=")
        if label not in DIABETES:
            raise UserError(f"{node}: paper {row[0]}: {row[1][:40]!r} is no label; it is label=1, 2 or 3")
        papers[row[0]] = Paper(DIABETES[label])
    path = find(source, "pubmed.json")
    try:
        records = json.load(open_text(path))
        by_id = {str(record["PMID"]): record for record in records if "PMID" in record}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no list of records in JSON ({error}); get it again") from None
    if not by_id and len(records) != len(papers):
        what = f"has {len(records)} records without PMID, and {node} {len(papers)} papers"
        raise UserError(f"{path}: {what}; get both again")
    ordered = by_id or dict(zip(papers, records, strict=True))
    for name, paper in papers.items():
        record = ordered.get(name, {})
        paper.title, paper.text = ((record.get(key) or "").strip() for key in ("TI", "AB"))
    edges = []
    for row in fields(cites, 4, skip=2):
        src, dst = (end.removeprefix("paper:") for end in (row[1], row[3]))
        edges.append((src, dst))
    how = "by PMID" if by_id else "in the order of the papers"
    return Graph(papers, edges, [f"texts of {path.name} are joined {how}"])


def read_arxiv(source: Path) -> Graph:
    """ogbn-arxiv. A paper's id is its number in the mapping, the node's place there is that in raw/."""
    names = [row[1] for row in fields(find(source, "mapping/nodeidx2paperid.csv"), 2, skip=1, separator=",")]
    categories = find(source, "mapping/labelidx2arxivcategeory.csv")
    labels = {row[0]: category(row[1]) for row in fields(categories, 2, skip=1, separator=",")}
    label_of = [row[0] for row in fields(find(source, "raw/node-label.csv"), 1)]
    years = [int(row[0]) for row in fields(find(source, "raw/node_year.csv"), 1)]
    if not len(names) == len(label_of) == len(years):
        what = f"{len(names)} papers, {len(label_of)} labels and {len(years)} years"
        raise UserError(f"{source}: has {what}; the files do not belong together")
    papers = {
        name: Paper(labels[label], split=split_of(year))
        for name, label, year in zip(names, label_of, years, strict=True)
    }
    # Quotes are a part of titles, and the first and last row of the full file are none [code: ogb].
    for row in csv.reader(open_text(find(source, "titleabs.tsv")), delimiter="\t", quoting=csv.QUOTE_NONE):
        if len(row) >= 3 and row[0] in papers:
            papers[row[0]].title, papers[row[0]].text = row[1].strip(), row[2].strip()
    edges = fields(find(source, "raw/edge.csv"), 2, separator=",")
    return Graph(papers, ((names[int(src)], names[int(dst)]) for src, dst, *_ in edges))


def category(name: str) -> str:
    """`arxiv cs na` as people write it: cs.NA."""
    archive, _, subject = name.strip().removeprefix("arxiv ").partition(" ")
    return f"{archive}.{subject.upper()}"


def split_of(year: int) -> str:
    return "train" if year <= TRAIN_UNTIL else "val" if year <= VAL_UNTIL else "test"


def draw_splits(names: Iterable[str], seed: int) -> dict[str, str]:
    """The split of each paper: those of the lowest hashes train, the next ones choose, the others test."""
    ordered = sorted(names, key=lambda name: sha256(f"{seed}:{name}"))
    ends = (round(TRAIN * len(ordered)), round((TRAIN + VAL) * len(ordered)))
    return {
        name: "train" if place < ends[0] else "val" if place < ends[1] else "test" for place, name in enumerate(ordered)
    }


def read_splits(path: Path, names: Mapping[str, Paper]) -> dict[str, str]:
    """The splits of a CSV with id and split. Raises UserError where a paper has none."""
    splits = {row["id"].strip(): row["split"].strip() for row in read_csv(path, ["id", "split"])}
    for name in names:
        if splits.get(name) not in SPLITS:
            raise UserError(f"{path}: paper {name}: its split is {splits.get(name)!r}; write train, val or test")
    return splits


READERS: dict[str, Callable[[Path], Graph]] = {
    "cora": read_cora, "cane": read_cane, "pubmed": read_pubmed, "arxiv": read_arxiv,
}  # fmt: skip


def write_rows(path: Path, header: list[str], rows: Iterable[Iterable[str]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomic(path, write)


def convert(graph: Graph, destination: Path) -> list[str]:
    """Write nodes.csv and edges.csv; what there is to say of them."""
    papers, said = graph.papers, list(graph.said)
    rows = ([name, each.title, each.text, each.label, each.split] for name, each in papers.items())
    write_rows(destination / NODES, ["id", "title", "text", "label", "split"], rows)
    edges = list(graph.edges)
    known = [edge for edge in edges if edge[0] in papers and edge[1] in papers]
    write_rows(destination / EDGES, ["src", "dst", "kind"], ([src, dst, "cites"] for src, dst in known))
    bare = sum(not (each.title or each.text) for each in papers.values())
    if bare:
        said.append(f"{counted(bare, 'paper has', 'papers have')} neither title nor text")
    if len(known) < len(edges):
        said.append(f"{len(edges) - len(known)} of {len(edges)} edges lead to none of the papers, and are left out")
    classes, counts = {each.label for each in papers.values()}, dict.fromkeys(SPLITS, 0)
    for each in papers.values():
        counts[each.split] += 1
    splits = ", ".join(f"{count} {split}" for split, count in counts.items())
    said.append(f"{destination}: {len(papers)} papers of {len(classes)} classes ({splits}), {len(known)} edges")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(READERS), help="which text graph")
    parser.add_argument("source", type=Path, help="the folder with its files")
    parser.add_argument("destination", type=Path, help="the folder that is written, dataset.root of params.yaml")
    parser.add_argument("--seed", type=int, default=0, help="draws other splits (default: 0); arxiv has its own")
    parser.add_argument("--splits", type=Path, metavar="FILE", help="a CSV with the columns id and split")
    arguments = parser.parse_args()
    check_source(arguments.source, arguments.what)
    graph = READERS[arguments.what](arguments.source)
    if not graph.papers:
        raise UserError(f"{arguments.source}: names no paper; get the files again")
    if arguments.splits is not None:
        splits = read_splits(arguments.splits, graph.papers)
    elif arguments.what != "arxiv":
        splits = draw_splits(graph.papers, arguments.seed)
    else:
        splits = {name: each.split for name, each in graph.papers.items()}
    for name, each in graph.papers.items():
        each.split = splits[name]
    *remarks, last = convert(graph, arguments.destination)
    for remark in remarks:
        print(remark, file=sys.stderr)
    print(last)


if __name__ == "__main__":
    run(main)
