"""Format `nabirds`: NABirds (Van Horn et al., 2015), 555 kinds of birds in a tree of 1,011 nodes, as it is shipped.

The layout is that of CUB (fieldmark/formats/cub.py): root has images.txt, classes.txt, hierarchy.txt, ..., parts/ and
images/0817/IMAGE.jpg. Numbers of images are texts with dashes, and their files have none. What is checked is that there
is a tree, and the published counts.

Classes are the leaves of the tree; its other nodes, 268 of which have the name of a class, are superclasses and
lineage. Parts count from 0, and boxes in pixels from 0; over a hundred boxes reach beyond the border, by up to 221: the
index cuts them. So its files have it; about 334 boxes of the copy that was seen were corrected by others. There is no
validation split.
"""

from fieldmark.annotations import Published, check_published, root_of
from fieldmark.command import UserError
from fieldmark.formats import cub
from fieldmark.listing import Listing
from fieldmark.params import Dataset

PUBLISHED = Published(555, {"train": 23929, "test": 24633})


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where one is missing, malformed or contradicts another."""
    root = root_of(dataset.root, "images.txt")
    tree = root / "hierarchy.txt"
    if not tree.is_file():
        raise UserError(f"{tree}: is not there; without it each of 1,011 nodes would be a class: take it from NABirds")
    listing = cub.read(dataset)
    check_published(listing, root, PUBLISHED)
    return listing
