"""Converters of published text graphs, on tiny files of the same layouts and on true excerpts where these are."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.documents import read_documents, read_edges
from tests.project import ROOT
from tools.text_graph import draw_splits, is_pickle, main

LAYOUTS = ROOT.parent / "shared/data/layouts"
needs_layouts = pytest.mark.skipif(not LAYOUTS.is_dir(), reason="needs ../shared/data/layouts, which is not here")
Convert = Callable[..., Path]
Edges = list[tuple[str, str]]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Run the command; the folder that it wrote."""

    def run(what: str, source: Path, *options: str) -> Path:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["text_graph", what, str(source), str(out), *options])
        main()
        return out

    return run


def papers_in(folder: Path) -> dict[str, tuple[str, str, str]]:
    return {each.name: (each.title, each.text, each.label) for each in read_documents(folder)}


def edges_in(folder: Path) -> Edges:
    edges, warnings = read_edges(folder, set(papers_in(folder)))
    assert warnings == []
    return [(row["src"], row["dst"]) for row in edges]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


CORA: dict[str, str | bytes] = {
    "cora.content": "31336\t0\t1\tNeural_Networks\n1061127\t1\t0\tRule_Learning\n7\t0\t0\tTheory\n8\t0\t0\tTheory\n",
    # cited, citing
    "cora.cites": "31336\t1061127\n7\t31336\n7\t999\n",
    # The file that is named last counts; what follows the name is of no interest.
    "mccallum/cora/papers": (
        "31336\tftp:##old.ps\tOld, A.\n31336\tftp:##new.ps\tNew, A.\n1061127\tb.ps\tB.\n7\tc.ps\tC.\n5\tz.ps\tZ.\n"
    ),
    "mccallum/cora/extractions/ftp_##new.ps": (
        "URL: ftp:##new.ps\nTitle: Nets: a view\nAuthor: A\nAbstract: We show. It works.\nReference: Title: none\n"
    ),
    "mccallum/cora/extractions/ftp_##old.ps": "Title: Not this\n",
    "mccallum/cora/extractions/b.ps": "Title: Caf\xe9 rules\n".encode("latin-1"),
    "mccallum/cora/extractions/c.ps": "Abstract: No title here.\n",
}


def test_cora(tmp_path: Path, convert: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    """A title that is missing stays missing: the paper before does not lend its own."""
    folder = convert("cora", write(tmp_path / "cora", CORA))
    assert papers_in(folder) == {
        "31336": ("Nets: a view", "We show. It works.", "Neural_Networks"),
        "1061127": ("Café rules", "", "Rule_Learning"),
        "7": ("", "No title here.", "Theory"),
        "8": ("", "", "Theory"),
    }
    assert edges_in(folder) == [("1061127", "31336"), ("31336", "7")]
    said = capsys.readouterr()
    assert "1 of 3 edges lead to none of the papers" in said.err
    assert "1 paper has no file in" in said.err
    assert "1 paper has neither title nor text" in said.err
    assert "4 papers of 3 classes (2 train, 1 val, 1 test), 2 edges" in said.out


NODE = "Pubmed-Diabetes.NODE.paper.tab"
CITES = "Pubmed-Diabetes.DIRECTED.cites.tab"
PUBMED: dict[str, str | bytes] = {
    f"data/{NODE}": (
        "NODE\tpaper\ncat=1,2,3:label\tnumeric:w-rat:0.0\tstring:summary\n"
        "12187484\tlabel=1\tw-rat=0.09\tsummary=w-rat\n2344352\tlabel=3\tw-rat=0.1\tsummary=w-rat\n"
    ),
    f"data/{CITES}": "DIRECTED\tcites\nNO_FEATURES\n33824\tpaper:2344352\t|\tpaper:12187484\n",
}
RECORDS = [{"TI": "Rats.", "AB": None}, {"TI": None, "AB": "Of type two."}]


@pytest.mark.parametrize("by_id", [True, False])
def test_pubmed(tmp_path: Path, convert: Convert, by_id: bool) -> None:
    records = RECORDS
    if by_id:  # in another order
        records = [{**RECORDS[1], "PMID": "2344352"}, {**RECORDS[0], "PMID": "12187484"}]
    folder = convert("pubmed", write(tmp_path / "pubmed", {**PUBMED, "pubmed.json": json.dumps(records)}))
    assert papers_in(folder) == {
        "12187484": ("Rats.", "", "Diabetes Mellitus, Experimental"),
        "2344352": ("", "Of type two.", "Diabetes Mellitus Type 2"),
    }
    assert edges_in(folder) == [("2344352", "12187484")]


def test_texts_of_other_papers_are_refused(tmp_path: Path, convert: Convert) -> None:
    source = write(tmp_path / "pubmed", {**PUBMED, "pubmed.json": json.dumps(RECORDS[:1])})
    with pytest.raises(UserError, match=r"pubmed.json: has 1 records without PMID, and .* 2 papers; get both again"):
        convert("pubmed", source)


ARXIV: dict[str, str | bytes] = {
    "mapping/nodeidx2paperid.csv.gz": gzip.compress(b"node idx,paper id\n0,9657784\n1,39886162\n2,116214155\n"),
    "mapping/labelidx2arxivcategeory.csv.gz": gzip.compress(b"label idx,category\n0,arxiv cs na\n1,arxiv cs mm\n"),
    "raw/node-label.csv.gz": gzip.compress(b"1\n0\n1\n"),
    "raw/node_year.csv.gz": gzip.compress(b"2017\n2018\n2019\n"),
    "raw/edge.csv.gz": gzip.compress(b"0,2\n2,1\n"),
    # Quotes are data; the first and the last row are junk; rows of other papers are left out, the order is another.
    "titleabs.tsv.gz": gzip.compress(
        b'titleabs.tsv\n116214155\tA "third\tHe said "no.\n42\tElse\tElse\n9657784\tFirst\tWe show.\n'
        b"39886162\tSecond\tAnd more.\n\x00\x00\n"
    ),
}  # fmt: skip


def test_arxiv(tmp_path: Path, convert: Convert) -> None:
    folder = convert("arxiv", write(tmp_path / "arxiv", ARXIV))
    assert papers_in(folder) == {
        "9657784": ("First", "We show.", "cs.MM"),
        "39886162": ("Second", "And more.", "cs.NA"),
        "116214155": ('A "third', 'He said "no.', "cs.MM"),
    }
    assert {each.name: each.split for each in read_documents(folder)} == {
        "9657784": "train", "39886162": "val", "116214155": "test",
    }  # fmt: skip
    assert edges_in(folder) == [("9657784", "116214155"), ("116214155", "39886162")]


def test_splits_of_a_file(tmp_path: Path, convert: Convert) -> None:
    source = write(tmp_path / "cora", CORA)
    splits = tmp_path / "splits.csv"
    splits.write_text("id,split\n31336,test\n1061127,val\n7,train\n8,train\n")
    folder = convert("cora", source, "--splits", str(splits))
    assert {each.name: each.split for each in read_documents(folder)} == {
        "31336": "test", "1061127": "val", "7": "train", "8": "train",
    }  # fmt: skip
    splits.write_text("id,split\n31336,test\n1061127,val\n7,train\n8,dev\n")
    with pytest.raises(UserError, match="paper 8: its split is 'dev'; write train, val or test"):
        convert("cora", source, "--splits", str(splits))


def test_drawn_splits() -> None:
    """60, 20 and 20 %, by the hash of seed and id: in whatever order they come, and another seed draws others."""
    names = [str(number) for number in range(1000)]
    splits = draw_splits(names, 0)
    assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [600, 200, 200]
    assert draw_splits(names[::-1], 0) == splits
    assert draw_splits(names, 1) != splits


@pytest.mark.parametrize("name", ["cora.pt", "pubmed.pkl", "ind.cora.allx", "ind.pubmed.graph", "cora_fixed.pth"])
def test_pickles_are_refused(tmp_path: Path, convert: Convert, name: str) -> None:
    """By name, unread: in place of a folder, and in a folder without the files that are wanted."""
    path = write(tmp_path / "cora", {name: b"cos\nsystem\n(S'touch hacked'\ntR."}) / name
    assert is_pickle(path)
    for source in (path, path.parent):
        with pytest.raises(UserError, match=f"{name}.* is a pickle, and reading one runs the code of whoever wrote it"):
            convert("cora", source)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(tmp_path: Path, convert: Convert) -> None:
    with pytest.raises(UserError, match="nowhere: is no folder; name the one with the files of cora"):
        convert("cora", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cora: has no cora.cites; unpack all of it there"):
        convert("cora", write(tmp_path / "cora", {"cora.content": CORA["cora.content"]}))
    write(tmp_path / "cora", {"cora.cites": "31336 1061127\n"})
    with pytest.raises(UserError, match=r"cora.cites: line 1 has not 2 fields: '31336 1061127'; get it again"):
        convert("cora", tmp_path / "cora")
    broken = write(tmp_path / "arxiv", {**ARXIV, "raw/edge.csv.gz": b"\x1f\x8b\x08\x00"})
    with pytest.raises(UserError, match=r"edge.csv.gz: is no whole gzip"):
        convert("arxiv", broken)


@needs_layouts
def test_cane_s_cora_is_read_whole(convert: Convert, capsys: pytest.CaptureFixture[str]) -> None:
    """The counts that its README names."""
    folder = convert("cane", LAYOUTS / "cora_text/cane_cora")
    papers = papers_in(folder)
    labels = [label for *_, label in papers.values()]
    assert {f"group-{group}": count for group, count in enumerate([645, 195, 351, 292, 321, 252, 155])} == {
        label: labels.count(label) for label in set(labels)
    }
    assert "66 papers have no label" in capsys.readouterr().err
    assert papers["0"][1].startswith("Several computer algorithms discovering patterns")
    edges = edges_in(folder)
    assert (len(edges), sum(src == dst for src, dst in edges)) == (5214, 230)
    assert len({frozenset(edge) for edge in edges}) == 5001
    assert edges[0] == ("2196", "143")


@needs_layouts
def test_true_excerpts(tmp_path: Path, convert: Convert) -> None:
    """Lines of the publishers' own files: links of Cora and PubMed; labels, years and papers of ogbn-arxiv."""
    cites = (LAYOUTS / "cora_linqs/cora.cites").read_text()
    pairs = [tuple(line.split("\t")) for line in cites.splitlines()]
    names = sorted({name for pair in pairs for name in pair})
    content = "".join(f"{name}\t0\tTheory\n" for name in names)
    source = write(tmp_path / "cora", {
        **CORA, "cora.content": content, "cora.cites": cites,
        "mccallum/cora/papers": "".join(f"{name}\tb.ps\n" for name in names),
    })  # fmt: skip
    assert edges_in(convert("cora", source)) == [(citing, cited) for cited, citing in pairs]

    cites = (LAYOUTS / f"pubmed_diabetes/{CITES}").read_text()
    rows = [line.split("\t") for line in cites.splitlines()[2:]]
    pairs = [(row[1].removeprefix("paper:"), row[3].removeprefix("paper:")) for row in rows]
    names = sorted({name for pair in pairs for name in pair})
    nodes = "NODE\tpaper\nhead\n" + "".join(f"{name}\tlabel=2\tsummary=\n" for name in names)
    records = json.dumps([{"TI": f"Title {name}", "AB": None} for name in names])
    source = write(tmp_path / "pubmed", {NODE: nodes, CITES: cites, "pubmed.json": records})
    assert edges_in(convert("pubmed", source)) == pairs

    files = {
        f"{folder}/{name}": (LAYOUTS / "ogbn_arxiv" / folder / name).read_text().splitlines()
        for folder, name in (
            ("mapping", "nodeidx2paperid.csv"), ("raw", "node-label.csv"), ("raw", "node_year.csv"),
        )
    }  # fmt: skip
    count = min(len(files["mapping/nodeidx2paperid.csv"]) - 1, len(files["raw/node-label.csv"]))
    lines = {name: rows[: count + name.startswith("mapping")] for name, rows in files.items()}
    labels = (LAYOUTS / "ogbn_arxiv/mapping/labelidx2arxivcategeory.csv.gz").read_bytes()
    source = write(tmp_path / "arxiv", {
        **{name: "\n".join(rows) for name, rows in lines.items()},
        "mapping/labelidx2arxivcategeory.csv.gz": labels,
        "raw/edge.csv": "0,1\n", "titleabs.tsv": "9657784\tOne\tTwo\n",
    })  # fmt: skip
    folder = convert("arxiv", source)
    found = {each.name: each for each in read_documents(folder)}
    assert len(found) == count
    assert (found["9657784"].title, found["9657784"].label, found["9657784"].split) == ("One", "cs.CR", "train")
