"""What a share of descriptions is worth: the most informative pictures against as many drawn by chance.

Reads   data/ of a data set all of whose pictures are described, with the links of `--links`; params.yaml.
Writes  nothing. It prints a table: of each share how many pictures are described, and accuracy out of fold.
Costs   a ridge for each fold, share and draw: reef some three minutes on two cores, by default.

Descriptions of the others are taken away in memory, as `describe.share` would not have asked for them; what the stage
then asks is held by tests. Choosing looks at vectors of all pictures and at no label. A picture without a description
inherits that of its linked training pictures (`inherited/NAME`). Development pictures are judged out of fold (5 folds,
train and val); test stays out. Intervals are paired bootstraps over the pictures, 95 %, of informative less the mean of
the draws; they hold the folds and, of chance, these draws as they are.

    python -m tools.describe_share
    python -m tools.describe_share --encoder reef --links near --draws 3 --shares 0.01 0.05
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fieldmark.command import UserError, run, stage_parser
from fieldmark.devices import set_up_torch
from fieldmark.informative import budget, cluster_count, most_informative
from fieldmark.params import load_params
from fieldmark.store import sha256
from training.data import Cache, read_cache
from training.data.descriptions import Descriptions, require_described
from training.folds import HELD_OUT
from training.loop import predict
from training.methods import reads_of, ridge
from training.regimes import Folds, hide_test

FOLDS, BOOTSTRAPS = 5, 2000
Chosen = dict[str, list[Tensor]]  # by how they were chosen, the pictures of each draw


def described_only(cache: Cache, images: Tensor) -> Cache:
    """The cache where these pictures (m,) alone are described."""
    part = cache.part(Descriptions)
    kept = torch.zeros_like(part.dm)
    kept[images] = part.dm[images]
    return cache.change(Descriptions, dm=kept)


def choose(cache: Cache, share: float, draws: int) -> Chosen:
    """The pictures to describe: the most informative ones, and `draws` times as many by chance."""
    count = budget(len(cache.paths), share)
    vectors = cache.globals(torch.arange(len(cache.paths)))
    informative = most_informative(vectors, cache.image_ids, count, cluster_count(len(cache.paths)))
    orders = [
        sorted(range(len(cache.paths)), key=lambda image, draw=draw: sha256(f"{draw} {cache.image_ids[image]}"))  # type: ignore[misc]
        for draw in range(draws)
    ]
    return {"informative": [informative], "chance": [torch.tensor(order[:count]) for order in orders]}


def out_of_fold(cache: Cache, features: Sequence[str]) -> np.ndarray:
    """(n,) float: whether each development picture is told rightly by a ridge without it; nan for test pictures."""
    right = np.full(len(cache.paths), np.nan)
    for number in range(FOLDS):
        fold = Folds(folds=FOLDS).apply(cache, number)
        model = ridge.fit(hide_test(fold), ridge.Settings(features=list(features)), 0).model
        images = fold.images(HELD_OUT)
        said = predict(model, fold, images).argmax(1)
        right[images.numpy()] = (said == fold.y[images]).numpy()
    return right


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % of the mean of (n,), by drawing pictures again."""
    rng = np.random.default_rng(0)
    means = [rng.choice(difference, len(difference)).mean() for _ in range(BOOTSTRAPS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def percent(value: float) -> str:
    return f"{100 * value:5.1f}"


def main() -> None:
    parser = stage_parser(__doc__)
    parser.add_argument("--encoder", default="reef", help="a key of `encoders` (default: reef)")
    parser.add_argument("--links", default="near", help="a key of `links` (default: near)")
    parser.add_argument("--draws", type=int, default=5, help="how often pictures are chosen by chance (default: 5)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.25, 1.0], help="of the pictures")
    args = parser.parse_args()
    set_up_torch()
    params, inherited = load_params(args.params), f"inherited/{args.links}"
    arms = {"text alone": [inherited], "picture and text": ["global", inherited]}
    reads = reads_of("ridge", ridge.Settings(features=arms["picture and text"]))
    cache = read_cache(Path("data"), args.encoder, params.dataset.buckets, reads)
    if not cache.part(Descriptions).dm.any():
        raise UserError("data/descriptions/descriptions.parquet: holds nothing; run describe_images with share 1.0")
    require_described(cache.part(Descriptions).dm)
    plain = out_of_fold(cache, ["global"])
    judged = ~np.isnan(plain)
    what = f"{judged.sum()} development pictures of {len(cache.classes)} classes"
    print(f"{what}, ridge, {FOLDS} folds, {args.draws} draws")
    print(f"picture alone: {percent(plain[judged].mean())}")
    print(f"{'share':>6} {'calls':>6}  {'':18} {'informative':>11} {'chance (draws)':>22}  difference [95 %]")
    for share in args.shares:
        chosen = choose(cache, share, args.draws)
        for arm, features in arms.items():
            right = {
                how: [out_of_fold(described_only(cache, images), features)[judged] for images in each]
                for how, each in (chosen.items() if share < 1 else [("informative", chosen["informative"])])
            }
            ours = right["informative"][0]
            line = f"{share:6g} {len(chosen['informative'][0]):6}  {arm:18} {percent(ours.mean()):>11}"
            if "chance" in right:
                draws, gain = [each.mean() for each in right["chance"]], ours - np.mean(right["chance"], axis=0)
                low, high = interval(gain)
                spread = f"{percent(np.mean(draws))} ({percent(min(draws))} ..{percent(max(draws))})"
                line += f" {spread:>22}  {100 * gain.mean():+5.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            print(line, flush=True)


if __name__ == "__main__":
    run(main)
