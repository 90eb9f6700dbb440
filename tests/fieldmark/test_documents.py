from pathlib import Path

import pytest

from fieldmark.command import UserError
from fieldmark.documents import LONGEST, Document, read_documents, read_edges, split_sentences
from fieldmark.store import sha256


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It is 3.5 m long.  And\nwide.", ["It is 3.5 m long.", "And wide."]),
        ("See Smith et al. Nature, fig. 2. Then stop.", ["See Smith et al. Nature, fig. 2.", "Then stop."]),
        ("Some, e.g. Auks, dive. J. Doe saw it.", ["Some, e.g. Auks, dive.", "J. Doe saw it."]),
        ('He said "no." (Then) he left.', ['He said "no."', "(Then) he left."]),
        ("no capital follows. here it goes on", ["no capital follows. here it goes on"]),
        ("First paragraph\n\nSecond paragraph", ["First paragraph", "Second paragraph"]),
    ],
    ids=str,
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize("words", [LONGEST, LONGEST + 1, 3 * LONGEST + 7])
def test_a_long_sentence_goes_in_pieces_of_even_length(words: int) -> None:
    given = [f"w{number}" for number in range(words)]
    pieces = [piece.split() for piece in split_sentences(" ".join(given))]
    assert [word for piece in pieces for word in piece] == given
    sizes = [len(piece) for piece in pieces]
    assert len(sizes) == -(-words // LONGEST)
    assert max(sizes) <= LONGEST
    assert max(sizes) - min(sizes) <= 1


def test_a_document_is_known_by_what_it_says() -> None:
    document = Document("7", "A title", "One. Two.", "a", None, None)
    assert document.image_id == sha256('["A title","One. Two."]')
    assert document.sentences == [(0, "A title"), (1, "One."), (2, "Two.")]
    assert document._replace(title="").sentences == [(1, "One."), (2, "Two.")]
    assert document._replace(title="", text="").image_id is None
    joined = document._replace(title="", text="A title\nOne. Two.")
    assert joined.sentences != document.sentences
    assert joined.image_id != document.image_id


def write(folder: Path, nodes: str, edges: str = "src,dst\n") -> Path:
    (folder / "nodes.csv").write_text(nodes)
    (folder / "edges.csv").write_text(edges)
    return folder


def test_nodes_are_read(tmp_path: Path) -> None:
    write(tmp_path, 'id,text,label,title,split,group\nb,"Two, 2.",y,A  title,test,g\na,One.,x,,,\n')
    assert read_documents(tmp_path) == [
        Document("a", "", "One.", "x", None, None), Document("b", "A title", "Two, 2.", "y", "test", "g"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("id,text\n1,one\n", r"nodes.csv: has no column label"),
        ("id,text,label\n", "nodes.csv: names no document"),
        ("id,text,label\n,one,x\n", "nodes.csv: row 1: id is empty; fill it in, or remove the row"),
        ("id,text,label\n1,one,\n", "nodes.csv: row 1: label is empty"),
        ("id,text,label\n1,one,x\n1,two,x\n", "nodes.csv: row 2: id '1' stands in a row before it too; remove one"),
        ("id,text,label,split\n1,one,x,dev\n", "row 1: split is 'dev'; use train, val, test, or nothing"),
        ("id,text,label,tittle\n1,one,x,dev\n", "has a column 'tittle'; did you mean 'title'"),
    ],
    ids=str,
)
def test_nodes_that_cannot_stand(tmp_path: Path, nodes: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_documents(write(tmp_path, nodes))
    assert "\n" not in str(error.value)


def test_edges_are_read(tmp_path: Path) -> None:
    write(tmp_path, "", "src,dst,weight,kind\n a ,b,,\nb,a,0.5,cites\n")
    edges, warnings = read_edges(tmp_path, {"a", "b"})
    assert edges == [
        {"src": "a", "dst": "b", "weight": 1.0, "kind": "given"},
        {"src": "b", "dst": "a", "weight": 0.5, "kind": "cites"},
    ]
    assert warnings == []


def test_a_few_edges_of_other_documents_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path, "", "src,dst\na,b\nb,a\na,elsewhere\n")
    edges, [warning] = read_edges(tmp_path, {"a", "b"})
    assert len(edges) == 2
    assert "1 of 3 edges have an end that is no id of nodes.csv, the first 'elsewhere'; they are left out" in warning


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ("src,dst\na,1\nb,2\n", "2 of 2 edges have an end that is no id of nodes.csv, the first '1'; the two files do"),
        ("src,dst,weight\na,b,much\n", "edges.csv: row 1: weight is 'much'; write a number above 0, or leave it empty"),
        ("src,dst,weight\na,b,-1\n", "row 1: weight is '-1'"),
        ("src,dst,weight\na,b,inf\n", "row 1: weight is 'inf'"),
        ("from,to\na,b\n", r"edges.csv: has no column src"),
    ],
    ids=str,
)
def test_edges_that_cannot_stand(tmp_path: Path, edges: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_edges(write(tmp_path, "", edges), {"a", "b"})
