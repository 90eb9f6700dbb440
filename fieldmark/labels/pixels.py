"""How much the pixels under each node differ: density rule `pixel` of labelling.py.

Hpix_n = -sum_v p_v log2 p_v, in bits, p_v the share of grey value v among the pixels in the box of node n: 256 bins
[design]. The density is Hpix_n / 8: 0 where all pixels are alike, 1 where all 256 values stand there equally often. A
box of n pixels holds log2 n bits at most, so that small boxes never reach 1.

Pixels are those of the thumbnails, which are whole pictures, 192 px at most: boxes of all views refer to these.
"""

import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from fieldmark.command import UserError

BITS = 8  # of a grey value
# A side of a box this close to an edge of pixels, in pixels, lies on it: thirds of a picture are no exact numbers.
ON_EDGE = 1e-3


def read_grey(webp: bytes) -> np.ndarray:
    """Grey values (H, W) uint8 of an encoded picture, by Pillow's mode L."""
    # Studies label nodes by this rule too, and evaluation/ imports no PIL: it comes with the first picture asked for.
    from PIL import Image

    with Image.open(io.BytesIO(webp)) as image:
        return np.asarray(image.convert("L"))


def pixel_ranges(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Boxes (n, 4), x0 y0 x1 y1 in [0,1], as left top right bottom in pixels, rounded outward: one pixel at least."""
    size = np.array([width, height])
    low = np.floor(boxes[:, :2] * size + ON_EDGE).astype(int).clip(0, size - 1)
    high = np.ceil(boxes[:, 2:] * size - ON_EDGE).astype(int).clip(low + 1, size)
    return np.concatenate([low, high], axis=1)


def pixel_entropy(grey: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Hpix (n,) in bits of boxes (n, 4) on grey values (H, W) uint8."""
    height, width = grey.shape
    # Views of one picture share boxes, node 0 of all of them if nothing else.
    ranges, which = np.unique(pixel_ranges(boxes, width, height), axis=0, return_inverse=True)
    counts = np.stack([
        np.bincount(grey[top:bottom, left:right].reshape(-1), minlength=2**BITS) for left, top, right, bottom in ranges
    ])
    total = counts.sum(axis=1, keepdims=True)
    entropy = (counts / total * np.log2(total / np.maximum(counts, 1))).sum(axis=1)
    return entropy[which.reshape(-1)]


def pixel_density(thumbs: pa.Table, image_ids: Sequence[str], boxes: np.ndarray) -> np.ndarray:
    """Hpix / 8 (V, n) float32 of the boxes (V, n, 4) of views, `image_ids` (V,) their images.

    `thumbs` has image_id and webp, and each is decoded once. Raises UserError where it lacks an image.
    """
    row = {image_id: number for number, image_id in enumerate(thumbs.column("image_id").to_pylist())}
    views: dict[str, list[int]] = defaultdict(list)
    for view, image_id in enumerate(image_ids):
        views[image_id].append(view)
    density = np.empty(boxes.shape[:2], dtype=np.float32)
    for image_id, same in views.items():
        if image_id not in row:
            raise UserError(f"data/thumbs: lacks image {image_id}; run index_images again (dvc repro)")
        grey = read_grey(thumbs.column("webp")[row[image_id]].as_py())
        density[same] = pixel_entropy(grey, boxes[same].reshape(-1, 4)).reshape(len(same), -1) / BITS
    return density
