"""Make the demo's encoder: a small open_clip model that knows the field marks of reef fish, but none of the species.

Writes   data/demo/encoder/open_clip_config.json and open_clip_model.safetensors (float16, at most 20 MB); load them
         with open_clip.create_model_and_transforms("local-dir:data/demo/encoder").
Reads    data/demo/species.yaml, only to leave those 24 combinations of field marks out of the training drawings.
Costs    about 20 minutes on 2 idle cores with bfloat16 (3 to draw, 14 for the image tower, 3 for the text tower), more
         on busy ones, and 3 GB of memory. Run by hand; the result is committed.

    python -m tools.train_reef_encoder [--out DIR] [--images N] [--seed S]
    python -m tools.train_reef_encoder --tower vit --out data/encoders/reef-vit-lit --images 8000

Three steps. (1) Draw fish with random field marks. (2) Train the image tower: one learned unit vector a field mark,
a sigmoid loss (SigLIP, Zhai et al. 2023 [mem]) between it and the embedding of the picture; the same loss on every cell
of the feature map, where the part's box says which cells show the mark, makes the dense tokens local. The tower pools
by averaging and projects linearly, so the average of the projected cells is the embedding of the picture.
(3) Freeze it and train the text tower by the same loss against phrases of one or a few field marks in varied words.
Words never seen in training have a zero token embedding: they say nothing.

`--tower vit` makes another encoder, which no demo needs and nobody commits: a small ViT of open_clip's that pools by
its CLS token, trained towards the text tower of the demo's encoder, which stays as it is. Whole pictures alone train
it, and no cell, as with CLIP's own ViTs: so it stands in for these where the question is which of its cells show a mark
(`encoders.NAME.dense`). What is found on it says nothing of a real one.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fieldmark.command import UserError, run
from fieldmark.reef.drawing import draw_fish
from fieldmark.reef.species import Species, load_species, phrases, random_attributes

OUT = Path("data/demo/encoder")
PIXELS = 160  # of a training drawing; the towers see it resized
# (pixels the tower sees, epochs): cheap first, then at the size of use. A ViT has positions, and keeps its size.
PHASES = {"resnet": ((112, 4.0), (192, 1.5)), "vit": ((PIXELS, 5.0),)}
BATCH = {"resnet": 128, "vit": 32}
LEARNING_RATE = {"resnet": 2e-3, "vit": 1e-3}
CELL_WEIGHT = 0.5
TEXT_STEPS = 1500
TEXT_BATCH = 256  # phrases a step
TEXT_IMAGES = 8000

CONFIG: dict[str, dict[str, Any]] = {
    "model_cfg": {
        "embed_dim": 128,
        "init_logit_bias": 0.0,
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": PHASES["resnet"][-1][0],
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}

# open_clip's own ViT, of 8 x 8 cells.
VIT = {"layers": 4, "width": 128, "head_width": 32, "patch_size": 20, "image_size": PIXELS}

# The drawn parts whose boxes show an attribute; other attributes are marks with a box of their own name.
SHOWN_BY = {
    "body_shape": ("body",),
    "tail_shape": ("tail",),
    "dorsal_fin": ("dorsal_fin",),
    "body_colour": ("body",),
    "fin_colour": ("tail", "dorsal_fin"),
}

# Further wordings of a field mark beside its phrase; {c} in a colour's wording is one of COLOURS.
COLOURS = {
    "yellow": ("yellow", "golden", "lemon-yellow", "golden yellow", "bright yellow"),
    "blue": ("blue", "deep blue", "sky-blue", "bright blue"),
    "orange": ("orange", "bright orange", "apricot orange"),
    "silver": ("silver", "silvery", "silvery white", "silvery grey", "pale silver"),
    "green": ("green", "grass-green", "leaf green", "bright green"),
    "purple": ("purple", "violet", "rich purple", "plum-coloured"),
    "dark": ("dark", "black", "blackish", "dusky"),
    "red": ("red", "bright red", "crimson", "scarlet"),
    "white": ("white", "pale", "whitish", "translucent white"),
}
BODY_WORDINGS = (
    "a {c} body", "{c} body colouration", "{c} flanks", "{c} scales", "a {c} overall colour", "{c} skin",
    "a body that is {c}", "a {c} head and body", "{c} sides",
)  # fmt: skip
FIN_WORDINGS = (
    "{c} fins", "{c} fins and tail", "a {c} tail fin", "a {c} dorsal fin", "a {c} tail", "fins that are {c}",
    "{c} dorsal and tail fins", "{c} tail and fins", "{c} anal and pelvic fins",
)  # fmt: skip
WORDINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("body_shape", "slender"): (
        "a slim body", "a slender elongated body", "an elongated body", "a long, slim, streamlined body",
        "a torpedo-shaped body", "a slender shape", "a narrow spindle-shaped body",
    ),
    ("body_shape", "oval"): (
        "an oval-shaped body", "an egg-shaped body", "a rounded oval body", "a plump oval body", "an oval outline",
        "a moderately deep oval body",
    ),
    ("body_shape", "tall"): (
        "a deep body", "a disc-shaped body", "a tall, round, compressed body", "a high-backed disc-like body",
        "a deep-bodied disc shape", "a round coin-like body", "a very tall body", "a tall round body",
    ),
    ("tail_shape", "forked"): (
        "a deeply forked tail", "a forked caudal fin", "a V-shaped tail", "a tail with two pointed lobes",
        "a swallow-like forked tail", "a forked tail fin",
    ),
    ("tail_shape", "rounded"): (
        "a rounded caudal fin", "a fan-shaped tail", "a round tail fin", "a tail with a rounded edge",
        "a softly rounded tail fin", "a rounded, fan-like tail",
    ),
    ("tail_shape", "pointed"): (
        "a pointed caudal fin", "a tail that ends in a point", "a spear-shaped tail", "a lance-shaped tail",
        "a tapering pointed tail fin", "a diamond-shaped pointed tail",
    ),
    ("tail_shape", "square"): (
        "a square-cut tail", "a tail with a straight edge", "a straight-edged tail fin", "a square caudal fin",
        "a truncate tail", "a tail cut off straight",
    ),
    ("dorsal_fin", "sail"): (
        "a sail-like dorsal fin", "a high sail-shaped dorsal fin", "a tall triangular dorsal fin",
        "a very tall dorsal fin", "a dorsal fin raised like a sail", "a large sail on its back",
    ),
    ("dorsal_fin", "low"): (
        "a low, even dorsal fin", "a long low dorsal fin", "a low ridge-like dorsal fin", "a short dorsal fin",
        "a low fin along the back", "a low-cut dorsal fin",
    ),
    ("dorsal_fin", "spiny"): (
        "a spiky dorsal fin", "a jagged dorsal fin with spines", "a saw-toothed dorsal fin",
        "sharp spines on the dorsal fin", "a dorsal fin of separate spines", "a row of spines along the back",
    ),
    ("bars", "single"): (
        "a single dark bar", "one dark vertical bar behind the head", "a dark vertical bar behind the gill",
        "a single vertical band behind the gill cover", "one bold dark band across the body",
        "a dark band just behind the head", "a single broad vertical bar",
    ),
    ("bars", "many"): (
        "dark vertical bars", "several vertical bars", "many dark bars across the body", "a row of dark vertical bands",
        "repeated dark bars on the flank", "black vertical bars down the sides", "a barred body",
        "a body crossed by dark vertical bars",
    ),
    ("stripes", "single"): (
        "a single horizontal stripe", "one dark stripe from gill to tail", "a dark lengthwise stripe",
        "a dark stripe along the side", "one dark line along the middle of the flank", "a single dark lateral stripe",
        "a dark horizontal stripe along the body",
    ),
    ("stripes", "many"): (
        "thin dark horizontal stripes", "many thin stripes along the body", "several fine lengthwise stripes",
        "fine horizontal lines on the flank", "several dark lines along the side", "a finely striped body",
        "narrow horizontal stripes from gill to tail",
    ),
    ("spots", "scattered"): (
        "small dark spots", "many dark spots on the flank", "a spotted body", "scattered dark spots",
        "dark speckles over the body", "small black spots scattered over the side", "peppery dark dots on the flank",
    ),
    ("spots", "back"): (
        "a large dark spot on the back", "a single eyespot below the dorsal fin", "a dark spot ringed with white",
        "a white-ringed dark spot on the upper flank", "one big dark spot on the upper side",
        "a pale-ringed eyespot on the back", "an eyespot on the flank",
    ),
    ("eye_mask", "mask"): (
        "a dark band through the eye", "a dark eye mask", "a black mask over the eye", "a dark bar through the eye",
        "a mask-like dark band across the face", "a dark stripe running through the eye", "a masked face",
    ),
    ("tail_spot", "spot"): (
        "a dark spot at the tail base", "a black spot where the tail begins", "a dark blotch at the root of the tail",
        "a dark spot just before the tail", "a round dark spot on the tail stalk", "a black spot on the tail base",
    ),
    ("cheek", "patch"): (
        "a pale cheek patch", "a white spot on the cheek", "a pale spot below the eye", "a bright patch under the eye",
        "a light patch on the gill cover", "a white cheek", "a pale blotch on the cheek",
    ),
}  # fmt: skip
TEMPLATES = (
    "a fish with {}", "a fish with {}", "a fish with {}", "a photo of a fish with {}", "a fish that has {}", "{}",
    "an underwater photo of a fish with {}", "a reef fish with {}", "the fish has {}",
)  # fmt: skip
PLAIN = ("a fish", "a photo of a fish", "a reef fish", "an underwater photo of a fish")


@dataclass(frozen=True)
class Drawings:
    """N drawings. `pixels` (N, 160, 160, 3) uint8; `shows` (N, V) bool, V field marks; `boxes` (N, V, 2, 4) float32,
    up to two boxes x0, y0, x1, y1 in [0, 1] that show the mark, empty ones zero."""

    pixels: npt.NDArray[np.uint8]
    shows: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.float32]


# ------------------------------------------------------------------------------------------------- 1. drawings


def training_attributes(index: int, seed: int, exclude: list[Species]) -> dict[str, str]:
    """The field marks of training drawing `index`: random, and never those of a species in `exclude`."""
    return random_attributes(np.random.default_rng([seed, index, 0]), exclude)


def draw_chunk(indices: Sequence[int], seed: int, exclude: list[Species]) -> Drawings:
    """The training drawings of these indices; each depends on its own index and the seed only."""
    marks = list(phrases())
    pixels = np.empty((len(indices), PIXELS, PIXELS, 3), np.uint8)
    shows = np.zeros((len(indices), len(marks)), np.bool_)
    boxes = np.zeros((len(indices), len(marks), 2, 4), np.float32)
    for row, index in enumerate(indices):
        attributes = training_attributes(index, seed, exclude)
        drawing = draw_fish(attributes, np.random.default_rng([seed, index, 1]), PIXELS)
        pixels[row] = np.asarray(drawing.image)
        box_of = {box.part: box for box in drawing.parts}
        for column, (attribute, value) in enumerate(marks):
            if attributes[attribute] == value:
                shows[row, column] = True
                for slot, part in enumerate(SHOWN_BY.get(attribute, (attribute,))):
                    box = box_of[part]
                    boxes[row, column, slot] = (box.x0, box.y0, box.x1, box.y1)
    return Drawings(pixels, shows, boxes)


def draw_all(count: int, seed: int, exclude: list[Species]) -> Drawings:
    """`count` training drawings, in two processes."""
    chunks = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    parts: list[Drawings] = []
    progress = Progress("draw", count)
    with ProcessPoolExecutor(max_workers=2) as pool:
        for part in pool.map(draw_chunk, chunks, [seed] * len(chunks), [exclude] * len(chunks)):
            parts.append(part)
            progress.step(len(part.pixels))
    return Drawings(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.shows for part in parts]),
        np.concatenate([part.boxes for part in parts]),
    )


class Progress:
    """One line on stderr: done, rate and time left."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.start, self.last = what, total, 0, time.monotonic(), 0.0

    def step(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last > 5 or self.done >= self.total:
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / rate
            print(f"{self.what}: {self.done}/{self.total}, {rate:.0f}/s, {left:.0f} s left {note}", file=sys.stderr)
            self.last = now


# ---------------------------------------------------------------------------------------------- 2. image tower


def to_input(pixels: npt.NDArray[np.uint8], size: int) -> Tensor:
    """Pictures (B, H, W, 3) as the tower's input (B, 3, size, size), normalised as CONFIG says."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return ((images - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


def cell_targets(boxes: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Which cells of a `grid` x `grid` map show each mark: targets and weights (B, grid * grid, V) from boxes
    (B, V, 2, 4). A cell shows a mark when they share at least a quarter of the smaller one; a cell that shares less,
    but not nothing, has weight 0."""
    edges = torch.arange(grid + 1) / grid
    low, high = edges[:-1], edges[1:]
    width = (torch.minimum(boxes[..., None, 2], high) - torch.maximum(boxes[..., None, 0], low)).clamp(min=0)
    height = (torch.minimum(boxes[..., None, 3], high) - torch.maximum(boxes[..., None, 1], low)).clamp(min=0)
    shared = height[..., :, None] * width[..., None, :]  # (B, V, 2, rows, columns)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    smaller = area.clamp(min=1e-6, max=1 / grid**2)[..., None, None]
    share = (shared / smaller).amax(dim=2).flatten(2).transpose(1, 2)
    return (share >= 0.25).float(), ((share >= 0.25) | (share == 0)).float()


def config_of(tower: str) -> dict[str, dict[str, Any]]:
    """open_clip's configuration of the encoder with this image tower."""
    return CONFIG if tower == "resnet" else {**CONFIG, "model_cfg": {**CONFIG["model_cfg"], "vision_cfg": VIT}}


def embed_batch(visual: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Embeddings (B, D) of a tower's input, and those of its cells (B, cells, D) where they are trained too."""
    with torch.autocast("cpu", torch.bfloat16):
        features = visual.trunk.forward_features(pixels) if isinstance(visual, TimmModel) else visual(pixels)
    if not isinstance(visual, TimmModel):
        return features.float(), None
    cells = visual.head(features.float().flatten(2).transpose(1, 2))
    return cells.mean(dim=1), cells


def train_image_tower(visual: Any, tower: str, drawings: Drawings, seed: int, texts: Tensor | None = None) -> None:
    """Train `visual`, the tower of open_clip's that `tower` names, in place.

    Towards `texts` (V, D), those of the field marks; None: towards a vector a mark that is learned with it.
    """
    torch.manual_seed(seed)
    marks = drawings.shows.shape[1]
    vectors = nn.Parameter(F.normalize(torch.randn(marks, CONFIG["model_cfg"]["embed_dim"]), dim=1))
    if texts is not None:
        vectors = nn.Parameter(texts, requires_grad=False)
    scales = nn.Parameter(torch.tensor([2.3, 2.3]))  # log scale of picture and cell
    biases = nn.Parameter(torch.tensor([-1.0, -2.0]))
    visual.train().to(memory_format=torch.channels_last)
    decayed = [p for p in visual.parameters() if p.ndim > 1]
    plain = [p for p in visual.parameters() if p.ndim <= 1] + [vectors, scales, biases]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=LEARNING_RATE[tower]
    )
    many = BATCH[tower]
    batches = [(size, int(epochs * len(drawings.pixels)) // many) for size, epochs in PHASES[tower]]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE[tower], total_steps=sum(steps for _, steps in batches), pct_start=0.1
    )
    order = shuffled(len(drawings.pixels), seed)
    for size, steps in batches:
        progress = Progress(f"image tower at {size} px", steps * many)
        for _ in range(steps):
            rows = np.sort([next(order) for _ in range(many)])
            shows, boxes = torch.from_numpy(drawings.shows[rows]).float(), torch.from_numpy(drawings.boxes[rows])
            pooled, cells = embed_batch(visual, to_input(drawings.pixels[rows], size))
            unit = F.normalize(vectors, dim=1)
            logits = scales[0].exp() * F.normalize(pooled, dim=1) @ unit.T + biases[0]
            loss = F.binary_cross_entropy_with_logits(logits, shows)
            total, note = loss, f"loss {loss.item():.3f}"
            if cells is not None:
                target, weight = cell_targets(boxes, math.isqrt(cells.shape[1]))
                cell_logits = scales[1].exp() * F.normalize(cells, dim=2) @ unit.T + biases[1]
                cell_loss = F.binary_cross_entropy_with_logits(cell_logits, target, weight)
                total, note = loss + CELL_WEIGHT * cell_loss, f"{note} cells {cell_loss.item():.3f}"
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.step(many, note)
    visual.eval()


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Indices below `count` for ever, in a new random order each epoch."""
    rng = np.random.default_rng([seed, 2])
    while True:
        yield from rng.permutation(count).tolist()


@torch.no_grad()
def embed_images(visual: TimmModel, pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Unit embeddings (N, D) of pictures (N, H, W, 3)."""
    out = []
    many, size = BATCH["resnet"], PHASES["resnet"][-1][0]
    for start in range(0, len(pixels), many):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(visual(to_input(pixels[start : start + many], size)).float())
    return F.normalize(torch.cat(out), dim=1)


# ----------------------------------------------------------------------------------------------- 3. text tower


def wordings(attribute: str, value: str) -> list[str]:
    """Every way to say a field mark; its phrase comes first."""
    said = [phrases()[attribute, value], *WORDINGS.get((attribute, value), ())]
    patterns = {"body_colour": BODY_WORDINGS, "fin_colour": FIN_WORDINGS}.get(attribute, ())
    said += [pattern.format(c=colour) for pattern in patterns for colour in COLOURS[value]]
    return said


def random_text(rng: np.random.Generator, marks: list[tuple[str, str]]) -> tuple[str, list[int]]:
    """A text and the columns of the marks it speaks of: none (5 %), one (75 %), two or three."""
    count = rng.choice([0, 1, 2, 3], p=[0.05, 0.75, 0.14, 0.06])
    if count == 0:
        return PLAIN[rng.integers(len(PLAIN))], []
    columns: list[int] = []
    while len(columns) < count:
        column = int(rng.integers(len(marks)))
        if marks[column][0] not in {marks[other][0] for other in columns}:
            columns.append(column)
    said = []
    for column in columns:
        ways = wordings(*marks[column])
        said.append(ways[0] if rng.random() < 0.25 else ways[rng.integers(len(ways))])
    text = said[0] if count == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(text), columns


def train_text_tower(model: open_clip.CLIP, drawings: Drawings, seed: int) -> None:
    """Train the text tower of `model` in place against the embeddings of its frozen image tower."""
    torch.manual_seed(seed + 1)
    rng = np.random.default_rng([seed, 3])
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    marks = list(phrases())
    images = embed_images(model.visual, drawings.pixels[:TEXT_IMAGES])
    shows = torch.from_numpy(drawings.shows[:TEXT_IMAGES]).float()

    texts = [random_text(rng, marks) for _ in range(TEXT_STEPS * TEXT_BATCH // 4)]
    tokens = tokenizer([text for text, _ in texts])
    wanted = torch.zeros(len(texts), len(marks))
    for row, (_, columns) in enumerate(texts):
        wanted[row, columns] = 1
    known = torch.zeros(CONFIG["model_cfg"]["text_cfg"]["vocab_size"], 1)
    known[tokens.unique()] = 1
    unknown = torch.nonzero(known[:, 0] == 0)[:, 0]
    with torch.no_grad():
        model.token_embedding.weight.mul_(known)
    model.token_embedding.weight.register_hook(lambda gradient: gradient * known)

    vision = {id(p) for p in model.visual.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in vision]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=TEXT_STEPS, pct_start=0.1)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-1.0)
    progress = Progress("text tower", TEXT_STEPS)
    for _ in range(TEXT_STEPS):
        chosen = torch.randint(len(texts), (TEXT_BATCH,))
        pictures = torch.randint(len(images), (512,))
        batch = with_unknown_words(tokens[chosen], unknown)
        vectors = F.normalize(model.encode_text(batch).float(), dim=1)
        logits = model.logit_scale.exp() * images[pictures] @ vectors.T + model.logit_bias
        needed = wanted[chosen]
        true = (shows[pictures] @ needed.T >= needed.sum(dim=1)).float()
        loss = F.binary_cross_entropy_with_logits(logits, true)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.step(1, f"loss {loss.item():.3f}")


@torch.no_grad()
def borrow_texts(model: open_clip.CLIP) -> Tensor:
    """Give `model` the text tower of the demo's encoder; returns the unit vectors (V, D) of the field marks.

    That of a mark is the mean over all ways to say it.
    """
    state = load_file(OUT / "open_clip_model.safetensors")
    held = {name: tensor.float() for name, tensor in state.items() if not name.startswith("visual.")}
    model.load_state_dict(model.state_dict() | held)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    said = [[f"a fish with {way}" for way in wordings(*mark)] for mark in phrases()]
    vectors = [F.normalize(model.encode_text(tokenizer(texts)), dim=1).mean(dim=0) for texts in said]
    return F.normalize(torch.stack(vectors), dim=1)


def with_unknown_words(tokens: Tensor, unknown: Tensor) -> Tensor:
    """In one text of four, put a random unknown token after the start, so that the tower learns to pass over it."""
    padded = torch.cat([tokens[:, :1], unknown[torch.randint(len(unknown), (len(tokens), 1))], tokens[:, 1:-1]], dim=1)
    chosen = (torch.rand(len(tokens), 1) < 0.25) & (tokens[:, -1:] == 0)
    return torch.where(chosen, padded, tokens)


# ----------------------------------------------------------------------------------------------------- the end


def save(model: open_clip.CLIP, folder: Path) -> None:
    """Write the weights as float16 beside the configuration."""
    weights = {name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
               for name, value in model.state_dict().items()}  # fmt: skip
    save_file(weights, folder / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write (default: {OUT})")
    parser.add_argument("--images", type=int, default=20000, help="training drawings (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower", choices=[*PHASES], default="resnet", help="the image tower (default: resnet)")
    args = parser.parse_args()
    if args.tower != "resnet" and args.out == OUT:
        raise UserError(f"--out: {OUT} is the demo's encoder; name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    config = json.dumps(config_of(args.tower), indent=2) + "\n"
    (args.out / "open_clip_config.json").write_text(config, encoding="utf-8")
    torch.manual_seed(args.seed)
    model = open_clip.create_model(f"local-dir:{args.out}", load_weights=False)
    if args.tower == "resnet":
        drawings = draw_all(args.images, args.seed, load_species())
        train_image_tower(model.visual, args.tower, drawings, args.seed)
        train_text_tower(model, drawings, args.seed)
    else:
        texts = borrow_texts(model)
        train_image_tower(model.visual, args.tower, draw_all(args.images, args.seed, load_species()), args.seed, texts)
    save(model, args.out)


if __name__ == "__main__":
    run(main)
