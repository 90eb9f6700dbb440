"""Tune a tower, or the image tower of an encoder, on the labels of training pictures alone.

Reads   data/index/images.parquet and the images it names, those of train and of the half of val that chooses; the
        encoder or tower that `finetune.NAME.base` names; `finetune.NAME` of params.yaml. No text.
Writes  data/adapted/NAME: a folder that `towers` may name as `model: local-dir:data/adapted/NAME`, or, of a tower of
        torchvision's, as `pretrained: data/adapted/NAME/model.safetensors`; provenance.json, seen_classes.txt,
        seen_images.txt, seen.csv, history.csv. The classifier is not kept: what a tower gives are vectors.
Costs   for each epoch a pass of every picture, forward and back through what is tuned, and one of every picture that
        chooses. Pictures are decoded anew each epoch, and two batches of them are held at most. --dry-run times a few
        steps, writes nothing, and says what is to come.

A linear classifier on the tower's global vector, by cross-entropy; its last blocks are tuned with it
(fieldmark/encoders/tuning.py). `blocks: 0` is the frozen control: the classifier alone is trained, and what is written
is the base. The epoch with the best accuracy on the half of val that chooses is kept, the first among equals.

Which weights come out hangs on labels. So the folder says whose it has seen, and is kept while images come and go, as
what adapt_encoder writes is; --refit tunes again. A run that is interrupted begins again.

    python -m stages.finetune --name birds-cnn
    python -m stages.finetune --name birds-cnn --dry-run
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fieldmark import store
from fieldmark.chosen import INDEX, Image, choose_classes, named_in, of_classes, read_images
from fieldmark.command import UserError, key_parser, run
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.encoders import tuning
from fieldmark.encoders.checkpoints import Seen, as_tower, folder_of, is_kept, write_folder, write_tower
from fieldmark.encoders.loading import load_image_encoder
from fieldmark.encoders.towers import LoadedTower
from fieldmark.labels.splits import read_split
from fieldmark.memory import keep_memory
from fieldmark.params import Encoder, Finetune, Params, load_params
from fieldmark.pictures.epochs import iterate_batches
from fieldmark.pictures.views import Source, source_of

# Raised when the same inputs and settings give another tower.
RULES = 1


class Data(NamedTuple):
    """What one tower is tuned on."""

    learned: list[Source]
    choosing: list[Source]
    label: dict[str, int]  # the place of an image's class, by image_id
    classes: list[str]


def gather(name: str, settings: Finetune, shown: dict[str, Image], choosing: dict[str, str], folder: Path) -> Data:
    """The pictures of the chosen classes: `shown` may be shown with labels, and those of `choosing` choose the epoch.

    Raises UserError where no class has a picture that chooses.
    """
    key = f"params.yaml: finetune.{name}.classes"
    known = {image.class_id for image_id, image in shown.items() if image_id not in choosing}
    classes = choose_classes(settings.classes, known, key)
    place = {each: number for number, each in enumerate(classes)}
    images = of_classes(shown, classes)
    sources = {image_id: source_of(folder, image_id, image.path, image.box) for image_id, image in images.items()}
    chosen = [source for image_id, source in sources.items() if image_id in choosing]
    if not chosen:
        raise UserError(f"{key}: none of them has an image in the half of val that chooses; raise dataset.val_fraction")
    return Data(
        [source for image_id, source in sources.items() if image_id not in choosing], chosen,
        {image_id: place[image.class_id] for image_id, image in images.items()}, classes,
    )  # fmt: skip


def logits_of(tower: LoadedTower, head: nn.Linear, pixels: Tensor) -> Tensor:
    """Bytes (n, 3, H, W) to logits (n, classes), float32."""
    shown = tower.normalise(pixels.to(tower.device)).to(memory_format=torch.channels_last)
    with tuning.half_precision(tower.device):
        return torch.as_tensor(head(tower.features(shown)[0])).float()


@torch.inference_mode()
def accuracy_of(tower: LoadedTower, head: nn.Linear, data: Data, batch_size: int) -> float:
    right = 0
    for batch, pixels in iterate_batches(data.choosing, tower, 0, batch_size):
        told = logits_of(tower, head, pixels).argmax(dim=1).tolist()
        right += sum(each == data.label[source.image_id] for each, source in zip(told, batch, strict=True))
    return right / len(data.choosing)


def begin(tower: LoadedTower, data: Data, settings: Finetune, name: str) -> tuple[tuning.Tuned, nn.Linear]:
    """Make what is to be tuned tunable; the classifier starts at zero."""
    parts = [tuning.image_parts(tower.model, f"params.yaml: finetune.{name}.base")]
    tuned = tuning.start_tuning(parts, settings.blocks, settings.rank, torch.Generator().manual_seed(settings.seed))
    head = nn.Linear(tower.dimension, len(data.classes)).to(tower.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return tuned, head


def finetune(tower: LoadedTower, data: Data, settings: Finetune, name: str) -> list[dict[str, Any]]:
    """Tune a tower in place, as it was after its best epoch; the epochs, as in history.csv."""
    tuned, head = begin(tower, data, settings, name)
    outer = [*head.parameters(), *tuned.projections]
    everything = [*tuned.inner, *outer]
    optimizer = tuning.make_optimizer(
        tuned.inner, outer, settings.learning_rate, settings.head_rate, settings.weight_decay
    )

    def loss(batch: list[Source], pixels: Tensor, _: int) -> Tensor:
        labels = torch.tensor([data.label[source.image_id] for source in batch], device=tower.device)
        return cross_entropy(logits_of(tower, head, pixels), labels)

    def accuracy() -> float:
        return accuracy_of(tower, head, data, settings.batch_size)

    history = tuning.run_epochs(
        f"finetune {name}", data.learned, tower, optimizer, everything, settings, loss, accuracy, "val"
    )
    tuning.end_tuning(tower.model)
    return history


def provenance_of(
    identity: dict[str, Any], data: Data, settings: Finetune, model: str, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """provenance.json: what a folder was made from, and how it came out."""
    best = tuning.best_of(history)
    return {
        "made_by": "finetune",
        "identity": identity,
        "base_model": model,
        "learned_classes": data.classes,
        "images": store.sha256("\n".join(sorted(source.image_id for source in data.learned + data.choosing))),
        "epochs": history[-1]["epoch"],
        "kept_epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "seed": settings.seed,
    }


def preview(tower: LoadedTower, data: Data, settings: Finetune, name: str) -> str:
    """What a run would do, for --dry-run, from a few steps that are thrown away."""
    tuned, head = begin(tower, data, settings, name)

    def loss(_: list[Source], pixels: Tensor) -> Tensor:
        return logits_of(tower, head, pixels).sum()

    time = tuning.say_time(data.learned, tower, tower.device, settings, loss)
    count = sum(each.numel() for each in tuned.all)
    return (
        f"{len(data.learned)} pictures of {len(data.classes)} classes to learn from, {len(data.choosing)} to choose by;"
        f" {count:,} numbers of the tower tuned\n"
        f"{time}, and passes of those that choose"
    )


def make(params: Params, name: str, device: str, *, refit: bool, dry_run: bool) -> None:
    """Write data/adapted/NAME, or say what that takes."""
    if name not in params.finetune:
        known = ", ".join(params.finetune) or "none is there"
        raise UserError(f"params.yaml: finetune.{name}: is not there; choose one of: {known}")
    settings, folder = params.finetune[name], folder_of(name)
    base = params.image_encoder(settings.base)
    # What a cell holds is another question: global vectors are tuned.
    base = base.model_copy(update={"precision": "fp32"} | ({"dense": "last"} if isinstance(base, Encoder) else {}))
    encoder = load_image_encoder(settings.base, base, choose_device(device))
    tower = as_tower(encoder, f"params.yaml: finetune.{name}.base")
    everything, training, choosing = read_images(), read_images("train"), read_split(INDEX, "choose")
    shown = {each: image for each, image in everything.items() if each in training or each in choosing}
    named = named_in(settings.classes)
    identity = {"base": tower.fingerprint, "settings": settings.model_dump(), "classes": named, "rules": RULES}
    classes = [{image_id: image.class_id for image_id, image in each.items()} for each in (everything, training, shown)]
    if not refit and is_kept(folder, identity, *classes):
        print(f"{folder}: kept")
        return
    data = gather(name, settings, shown, choosing, params.dataset.folder)
    if dry_run:
        print(f"{folder}: {preview(tower, data, settings, name)}")
        return
    history = finetune(tower, data, settings, name)
    write_folder(
        folder, lambda place: write_tower(tower, base, place),
        provenance_of(identity, data, settings, base.model, history),
        [Seen(each.image_id, shown[each.image_id].class_id, shown[each.image_id].path, role)
         for role, images in (("learned", data.learned), ("chose", data.choosing)) for each in images],
        history,
    )  # fmt: skip
    best = tuning.best_of(history)
    print(f"{folder}: accuracy {best['val_accuracy']:.4f} on {len(data.choosing)} images of val; epoch {best['epoch']}")


def main() -> None:
    parser = key_parser(__doc__, "--name", "finetune")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--refit", action="store_true", help="tune again; every vector of it has to be made anew")
    parser.add_argument("--dry-run", action="store_true", help="print images and time; write nothing")
    arguments = parser.parse_args()
    keep_memory()
    set_up_torch()
    params = load_params(arguments.params)
    make(params, arguments.name, arguments.device, refit=arguments.refit, dry_run=arguments.dry_run)


if __name__ == "__main__":
    run(main)
