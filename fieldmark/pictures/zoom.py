"""Views of a picture that show what a map of attention asks for larger, cut from all the pixels that the file has.

An encoder's own picture of a view is reduced to its input size. Here each pixel of the input is taken from the file's
picture where a sampler's grid (sampler.py) says, so that what is magnified has detail that the first look never had.
What lies between two such places is averaged.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fieldmark.params import Embed
from fieldmark.pictures.boxes import Box, in_image, scale_region, visible_box
from fieldmark.pictures.sampler import sampled_points
from fieldmark.pictures.views import Preprocessor, Source, View, needed_side, open_indexed, view_region

# Raised when the pictures that the same map and file give change.
RULES = 2
# A pixel is the mean of at most so many places a side. Where the picture is compressed most, they lie more than a
# pixel of it apart.
MOST_PLACES = 4


def zoomed_views(source: Source, encoder: Preprocessor, maps: Tensor) -> list[View]:
    """View 0, 1, ... of an image as maps (V, K, side, side) ask for them: K pictures each, as `prepare` gives one.

    A map covers what the encoder sees of its view, mirrored where the view is. Raises UserError as open_indexed does.
    """
    height, width = input_size(encoder)
    points = sampled_points(maps.double())
    finest = step(points, height, width)[0]
    zoom = 1 / (finest * max(height, width))
    image, size = open_indexed(source, needed_side(encoder, Embed(views=len(maps) - 1), zoom))
    views = []
    for number, of_view in enumerate(points):
        region, flip = view_region(source.image_id, number, *size)
        picture = image.crop(scale_region(region, size, image.size))
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        seen = visible_box(region[2] - region[0], region[3] - region[1], encoder.preprocessing)
        pixels = torch.stack([render(picture, seen, each, encoder) for each in of_view])
        views.append(View(source.image_id, number, pixels, [in_image(seen, region, size)] * len(of_view), flip))
    return views


def input_size(encoder: Preprocessor) -> tuple[int, int]:
    """Height and width of what an encoder reads."""
    height, width = np.broadcast_to(encoder.preprocessing["size"], 2).tolist()
    return height, width


def lattice(height: int, width: int) -> Tensor:
    """(height, width, 2): x and y of the centres of pixels in [-1, 1], where -1 and 1 are the borders of a picture."""
    y, x = ((2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1 for count in (height, width))
    return torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)


def spread(points: Tensor, height: int, width: int) -> Tensor:
    """The points (K, side, side, 2) of nodes as points (K, height, width, 2) of pixels, linear between nodes."""
    where = lattice(height, width).expand(len(points), -1, -1, -1)
    return F.grid_sample(points.permute(0, 3, 1, 2), where, align_corners=True).permute(0, 2, 3, 1)


def step(points: Tensor, height: int, width: int) -> tuple[float, float]:
    """The shortest and the longest way between the places of two neighbouring pixels, in sides of what is shown.

    `points` (..., side, side, 2) are those of nodes.
    """
    places = spread(points.flatten(0, -4), height, width)
    ways = [places.diff(dim=axis).norm(dim=-1) for axis in (1, 2)]
    return min(float(each.min()) for each in ways), max(float(each.max()) for each in ways)


def render(picture: Image.Image, seen: Box, points: Tensor, encoder: Preprocessor) -> Tensor:
    """Bytes (3, H, W), as encoder.preprocess gives them: a pixel shows the places of `points` (side, side, 2) about it.

    `seen` is the box of the picture that the encoder sees. Beside the picture, where it may reach, is padding.
    """
    height, width = input_size(encoder)
    shortest, longest = step(points[None], height, width)
    # Across what is seen: a picture that is squashed has more of them along one side.
    pixels = (seen[2] - seen[0]) * picture.width, (seen[3] - seen[1]) * picture.height
    reduced = max(1, math.floor(shortest * pixels[0])), max(1, math.floor(shortest * pixels[1]))
    apart = max(longest * side / by for side, by in zip(pixels, reduced, strict=True))
    places = min(MOST_PLACES, max(1, math.ceil(apart)))
    corner, extent = torch.tensor(seen[:2]), torch.tensor([seen[2] - seen[0], seen[3] - seen[1]])
    # In [0, 1] of the picture; what lies beyond what is seen is read at its border.
    where = corner + spread(points[None], places * height, places * width).clamp(0, 1) * extent
    small = picture.reduce(reduced)
    # Its last row and column may stand for fewer pixels than the others.
    share = torch.tensor(picture.size) / (torch.tensor(small.size) * torch.tensor(reduced))
    shown = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float()
    found = F.grid_sample(shown, (2 * where * share - 1).float(), padding_mode="border", align_corners=False)
    outside = ((where < 0) | (where > 1)).any(-1)[:, None]
    found = found.masked_fill(outside, padding_of(encoder.preprocessing))
    return F.avg_pool2d(found, places)[0].round().clamp(0, 255).byte()


def padding_of(preprocessing: dict[str, Any]) -> float:
    """The grey that stands beside a picture."""
    colour = preprocessing.get("fill_color", 0)
    return float(np.mean(colour))
