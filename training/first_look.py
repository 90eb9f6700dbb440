"""Fit a first look of `train.first_looks`, and write down where it wants to see more of each image.

Reads   data/index/{images,classes}.parquet and, of what the stages wrote for its encoder, the parts that its method
        declares, as training.train does; its own former output.
Writes  data/first_looks/NAME/: maps.parquet (maps/1: two maps of every image and view), model.safetensors and
        config.json, seen.csv (the images whose labels the fit was told), history.csv, metrics.json (accuracy on train
        and on the half of val that does not choose; nothing is said of test).
Costs   a fit, where one is due, and a pass of its model over all images.

It is fitted on all training images and chosen on one half of val, with train.seed, whatever train.regime and
train.control say. Maps of val and test come of the fitted model, which is told no label of theirs.

A fit is dear for what follows from it: other weights are other maps, and every image has to be embedded again. So a fit
is kept, as the bases of moments are, while images come and go: as long as method, code, settings, seed, encoder and
classes are the same, and no image whose label it was told has another one now, or none that training may know (it moved
to test, say). --refit fits it again.

    python -m training.first_look --look zoom
"""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fieldmark.command import key_parser, run
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.params import Params, load_params
from fieldmark.store import HALF, fingerprint, items, sha256, write_bytes, write_table, write_text
from training.data import INDEX, Cache, read_cache
from training.data.again import BRANCHES
from training.data.cache import header_of
from training.hashes import hash_file
from training.layers.states import state_of
from training.looks import PlannedLook, plan_look
from training.loop import assess_split
from training.methods import load_method
from training.regimes import hide_test
from training.restore import load_model, read_config
from training.runs import history_csv, write_json

SCHEMA = "maps/1"
REFIT = "fit it again (python -m training.first_look with --refit)"
BATCH = 64  # images that the model is asked about at a time, always: a batch of another size changes the last bits


def seen_of(cache: Cache) -> dict[str, str]:
    """The class of each image whose label a fit is told, by image_id."""
    told = np.flatnonzero(np.isin(cache.split, ("train", "choose"))).tolist()
    return {cache.image_ids[image]: cache.classes[int(cache.y[image])] for image in told}


def is_kept(folder: Path, identity: dict[str, Any], cache: Cache) -> bool:
    """Whether the fit in a folder stands: it was made alike, and was told nothing that it may not know now."""
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors", "seen.csv")):
        return False
    if read_config(folder / "config.json", REFIT).get("identity") != identity:
        return False
    rows = csv.reader(io.StringIO((folder / "seen.csv").read_text(encoding="utf-8")))
    now, there = seen_of(cache), set(cache.image_ids)
    return all(now.get(image_id) == class_id for image_id, class_id in rows if image_id in there)


def identity_of(planned: PlannedLook, cache: Cache, seed: int) -> dict[str, Any]:
    """What a fit follows from, the images apart."""
    read = {path: mark for path, mark in cache.fingerprints.items() if path not in INDEX}
    return {**planned.describe(), "seed": seed, "classes": cache.classes, "read": read, "code": planned.code}


def fit(planned: PlannedLook, cache: Cache, device: torch.device, seed: int, folder: Path) -> dict[str, Any]:
    """Fit the method and write model, seen.csv, history.csv and metrics.json; what config.json says of the fit.

    `cache` is on the CPU, where what a fit may not see is hidden.
    """
    (folder / "config.json").unlink(missing_ok=True)  # it says that all the others are there and of one fit
    told = hide_test(cache).only(planned.reading.reads).on(device)
    fitted = load_method(planned.method).fit(told, planned.settings, seed)
    whole = cache.on(device)
    accuracy = {split: {"accuracy": assess_split(fitted.model, whole, split)[0]} for split in ("train", "val")}
    write_bytes(folder / "model.safetensors", save(state_of(fitted.model)))
    write_text(folder / "seen.csv", "".join(f"{name},{label}\n" for name, label in sorted(seen_of(cache).items())))
    write_text(folder / "history.csv", history_csv({seed: fitted}))
    write_json(folder / "metrics.json", accuracy)
    said = ", ".join(f"{split} {numbers['accuracy']:.4f}" for split, numbers in accuracy.items())
    print(f"{planned.name}: accuracy {said}")
    # As in the config.json of a run (training/restore.py).
    return {"classes": cache.classes, "model_seed": seed, "chosen": {str(seed): fitted.chosen}}


@torch.no_grad()
def maps_of(method: str, model: nn.Module, cache: Cache) -> Tensor:
    """(n, V, 2, S, S) float16 on the CPU: the maps of all images and views, the largest value of each 1."""
    module: Any = load_method(method)
    images, found = torch.arange(len(cache.paths)), []
    for view in range(cache.views):
        chunks = []
        for chunk in images.split(BATCH):
            whole = torch.cat([chunk, chunk[-1:].expand(BATCH - len(chunk))])
            maps = module.maps_of(model, cache.batch(whole, torch.full_like(whole, view)))[: len(chunk)].float()
            chunks.append((maps / maps.amax((-1, -2), keepdim=True)).half().cpu())
        found.append(torch.cat(chunks))
    return torch.stack(found, 1)


def table_of(cache: Cache, maps: Tensor) -> pa.Table:
    """The rows of maps/1."""
    count, views, branches, side, _ = maps.shape
    values = pa.ListArray.from_arrays(
        pa.array(np.arange(count * views * branches + 1) * side * side, pa.int32()), pa.array(maps.flatten().numpy())
    )
    return pa.table({
        "image_id": np.repeat(cache.image_ids, views * branches),
        "view": pa.array(np.tile(np.repeat(np.arange(views), branches), count), pa.int16()),
        "branch": np.tile(BRANCHES, count * views),
        "side": pa.array(np.full(count * views * branches, side), pa.int16()),
        "values": values.cast(items(HALF)),
    })


def encoder_mark(data: Path, planned: PlannedLook, buckets: int) -> str:
    """The fingerprint of the encoder that made what the first look reads."""
    headers = (header_of(data, path, schema, buckets) for path, schema in planned.reading.files.items())
    return next(str(header.params["encoder"]) for header in headers if "encoder" in header.params)


def look(params: Params, path: str, name: str, data: Path, refit: bool = False) -> None:
    """Write data/first_looks/NAME; `path` is the parameters' file, for messages."""
    planned, buckets, folder = plan_look(path, params, name), params.dataset.buckets, data / "first_looks" / name
    reading, seed = planned.reading, params.train.seed
    device = choose_device(params.train.device, f"{path}: train.device:")
    set_up_torch()
    cache = read_cache(data, reading.encoder, buckets, reading.needs)
    identity = identity_of(planned, cache, seed)
    kept = not refit and is_kept(folder, identity, cache)
    config = read_config(folder / "config.json", REFIT) if kept else fit(planned, cache, device, seed, folder)
    # Read back, whether it is new or not, so that both give the same maps.
    model = load_model(folder, planned.method, planned.settings, config, REFIT).to(device)
    maps = maps_of(planned.method, model, cache.on(device))
    if not kept:
        # By the maps of its first day it is known: an edit of the code that makes the same ones changes nothing.
        config |= {"identity": identity, "maps": sha256(maps.numpy().tobytes())}
        write_json(folder / "config.json", config)
    made_by = {**planned.describe(), "encoder": encoder_mark(data, planned, buckets), "views": cache.views}
    made_by |= {"model": hash_file(folder / "model.safetensors"), "maps": config["maps"]}
    mark = fingerprint(SCHEMA, made_by)
    write_table(table_of(cache, maps), folder / "maps.parquet", SCHEMA, made_by, mark)
    print(f"{folder}: {'kept the fit' if kept else 'fitted'}; maps of {len(cache.paths)} images")


def main() -> None:
    parser = key_parser(__doc__, "--look", "train.first_looks")
    parser.add_argument("--refit", action="store_true", help="fit again; every image is then embedded again")
    parser.add_argument("--data", default="data", metavar="DIR", help="where the stages wrote (default: data)")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    look(params, arguments.params, arguments.look, Path(arguments.data), arguments.refit)


if __name__ == "__main__":
    run(main)
