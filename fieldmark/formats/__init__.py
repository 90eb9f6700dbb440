"""The layouts of data sets, one module a layout. Each lists images and classes by name; none opens an image."""

from fieldmark.formats import cub, imagefolder, manifest
from fieldmark.formats.listing import Listing
from fieldmark.params import Dataset

READERS = {"imagefolder": imagefolder.read, "cub": cub.read, "manifest": manifest.read}


def read_listing(dataset: Dataset) -> Listing:
    """What the data set says of itself. Raises UserError where it is not laid out as `dataset.format` says."""
    return READERS[dataset.format](dataset)
