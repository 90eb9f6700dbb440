"""The layouts of data sets, one module a layout, found by its name: `dataset.format` is a file of this folder.

A layout's `read(dataset)` lists images and classes by name, as a fieldmark.listing.Listing; none opens an image.
"""

import importlib

from fieldmark.listing import Listing, check_listing
from fieldmark.params import Dataset


def read_listing(dataset: Dataset) -> Listing:
    """What the data set says of itself, checked (listing.check_listing).

    Raises UserError where it is not laid out as `dataset.format` says, or where its tables do not fit its images.
    """
    found: Listing = importlib.import_module(f"fieldmark.formats.{dataset.format}").read(dataset)
    check_listing(found, dataset.root)
    return found
