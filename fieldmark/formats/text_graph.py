"""Format `text_graph`: documents and the edges between them, as two tables.

`dataset.root` is a folder with nodes.csv and edges.csv (fieldmark/documents.py says what stands in them) and, if there
is one, classes.csv (see listing.read_class_table). A document is a row of the index, its path its id in nodes.csv; it
has no picture. The classes are the labels. An edge is a row of data/index/links.parquet; docs/own-data.md says how it
becomes a link. Converters for Cora, PubMed and ogbn-arxiv: tools/text_graph.py.
"""

from pathlib import Path

from fieldmark.command import UserError
from fieldmark.documents import NODES, read_documents, read_edges
from fieldmark.listing import Listing, Row, read_class_table
from fieldmark.params import Dataset


def read(dataset: Dataset) -> Listing:
    """List the documents. Raises UserError naming the file and the row that cannot stand."""
    root = Path(dataset.root)
    if not root.is_dir():
        raise UserError(f"params.yaml: dataset.root: {root} is not a folder; name the one that holds {NODES}")
    documents = read_documents(root)
    rows: list[Row] = [
        {
            "path": each.name, "name": each.label, "split": each.split, "group": each.group, "image_id": each.image_id,
            **({} if each.image_id else {"status": "broken", "error": "has no text"}),
        }
        for each in documents
    ]  # fmt: skip
    edges, warnings = read_edges(root, {each.name for each in documents})
    return Listing(rows, read_class_table(root), links=edges, documents=True, warnings=warnings)
