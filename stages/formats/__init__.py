"""The layouts of data sets, one module a layout. Each lists images and classes by name; none opens an image."""

from stages.formats import cub, imagefolder, manifest
from stages.formats.listing import Listing
from stages.params import Dataset

READERS = {"imagefolder": imagefolder.read, "cub": cub.read, "manifest": manifest.read}


def read_listing(dataset: Dataset) -> Listing:
    """What the data set says of itself. Raises UserError where it is not laid out as `dataset.format` says."""
    return READERS[dataset.format](dataset)
