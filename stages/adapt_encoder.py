"""Tune an encoder on training pictures of chosen classes and on the sentences of these classes (AdaptCLIPZS).

Reads   data/index/images.parquet and the training images of the chosen classes; data/concepts/concepts.parquet (kept
        sentences of these classes, no names); the encoder that `adapt.NAME.base` names; `adapt.NAME` of params.yaml.
Writes  data/adapted/NAME: an open_clip folder, which `encoders` may name as `model: local-dir:data/adapted/NAME`;
        provenance.json, seen_classes.txt, seen_images.txt, seen.csv, texts.json, history.csv.
Costs   for each epoch a pass of every picture, forward and back through what is tuned, and one of every picture of
        the classes held out. Pictures are decoded anew each epoch, and two batches of them are held at most.
        --dry-run times a few steps, writes nothing, and says what is to come.

One sentence of its class is drawn for each picture and step; the loss, and what of it is the paper's, stands in
fieldmark/encoders/alignment.py, what is tuned in fieldmark/encoders/tuning.py. A share of the chosen classes is held
out: its pictures and sentences say after each epoch how well classes that were not learned are told by their sentences.
The best epoch is kept, the first among equals; epoch 0 is the base as it was. No picture of val or test is opened.

This is the one way from a prompt to an image embedding. So the folder is kept, with the texts it was made from, while
texts and images come and go: an edited prompt adapts nothing anew, and --refit does. It is made anew by itself where
the base, the settings or the list of classes change, and where an image that was shown is no longer for training or
has another class. A run that is interrupted begins again.

`texts: dealt` is the control: the same sentences dealt anew among the classes that are learned.

    python -m stages.adapt_encoder --name birds
    python -m stages.adapt_encoder --name birds --dry-run
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer
from torch import Tensor
from torch.nn.functional import normalize

from fieldmark import store
from fieldmark.chosen import Image, choose_classes, hold_out, named_in, of_classes, read_images
from fieldmark.command import UserError, key_parser, run
from fieldmark.devices import choose_device, set_up_torch
from fieldmark.encoders import tuning
from fieldmark.encoders.alignment import (
    Texts,
    alignment_loss,
    class_probabilities,
    deal_texts,
    draw_text,
    own_texts,
)
from fieldmark.encoders.checkpoints import Seen, check_writable, folder_of, is_kept, write_encoder, write_folder
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.memory import keep_memory
from fieldmark.params import Adapt, Params, load_params
from fieldmark.pictures.epochs import iterate_batches
from fieldmark.pictures.views import Source, source_of

CONCEPTS = Path("data/concepts/concepts.parquet")
# Raised when the same inputs and settings give another encoder.
RULES = 1


class Data(NamedTuple):
    """What one encoder is adapted on."""

    learned: list[Source]
    held_out: list[Source]
    class_of: dict[str, str]  # by image_id
    texts: Texts  # of the classes that are learned
    held_texts: Texts
    sentences: dict[str, list[str]]  # all of them, by class, as they were read


def read_sentences(classes: list[str]) -> dict[str, list[str]]:
    """The kept sentences of these classes but their names."""
    rows = store.read_table(CONCEPTS, "concepts/1", ["text", "class_id", "kind", "kept"]).to_pylist()
    found: dict[str, list[str]] = {name: [] for name in classes}
    for row in rows:
        if row["kept"] and row["kind"] != "name" and row["class_id"] in found:
            found[row["class_id"]].append(row["text"])
    return {name: sorted(set(texts)) for name, texts in found.items()}


def gather(name: str, settings: Adapt, images: dict[str, Image], folder: Path) -> Data:
    """The pictures and sentences of the chosen classes. `images` are all that may be shown.

    Raises UserError for a class without a sentence.
    """
    key = f"params.yaml: adapt.{name}.classes"
    classes = choose_classes(settings.classes, {image.class_id for image in images.values()}, key)
    learned, held = hold_out(classes, settings.val_share, settings.seed, key)
    sentences = read_sentences(classes)
    if lacking := [each for each, texts in sentences.items() if not texts]:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise UserError(f"{CONCEPTS}: keeps no sentence of class {lacking[0]}{more}; take it out of what {key} names")
    shown = {each: sentences[each] for each in learned}
    if settings.texts == "dealt":
        shown = deal_texts(shown, settings.seed)

    def sources(names: list[str]) -> list[Source]:
        found = of_classes(images, names)
        return [source_of(folder, image_id, image.path, image.box) for image_id, image in found.items()]

    return Data(
        sources(learned), sources(held), {image_id: image.class_id for image_id, image in images.items()},
        own_texts(shown), own_texts({each: sentences[each] for each in held}), sentences,
    )  # fmt: skip


def identity_of(encoder: LoadedEncoder, settings: Adapt) -> dict[str, Any]:
    """What a folder is kept for: all it follows from but images and texts."""
    classes = named_in(settings.classes)
    return {"base": encoder.fingerprint, "settings": settings.model_dump(), "classes": classes, "rules": RULES}


def embed_pictures(encoder: LoadedEncoder, pixels: Tensor) -> Tensor:
    """Bytes (n, 3, H, W) to unit vectors (n, D), with gradients."""
    model: Any = encoder.model
    shown = encoder.normalise(pixels.to(encoder.device)).to(memory_format=torch.channels_last)
    return normalize(model.encode_image(shown, normalize=False).float(), dim=1)


def embed_sentences(encoder: LoadedEncoder, sentences: list[str]) -> Tensor:
    """Texts (n) to unit vectors (n, D), with gradients. A text that comes more than once passes once."""
    model: Any = encoder.model
    each = sorted(set(sentences))
    rows = embed_tokens(model, without_padding(encoder, encoder.tokenizer(each)).to(encoder.device))
    return rows[[each.index(sentence) for sentence in sentences]]


def embed_tokens(model: Any, tokens: Tensor) -> Tensor:
    return normalize(model.encode_text(tokens, normalize=False).float(), dim=1)


def without_padding(encoder: LoadedEncoder, tokens: Tensor) -> Tensor:
    """Token numbers (n, L) without the columns behind the longest text: a Hugging Face tower looks at none of them.

    It is five times as fast for sentences of a dozen words. Towers of open_clip's own may look at padding, or pool it.
    """
    model: Any = encoder.model
    if not isinstance(getattr(model, "text", None), HFTextEncoder) or not isinstance(encoder.tokenizer, HFTokenizer):
        return tokens
    pad: Any = encoder.tokenizer.tokenizer.pad_token_id
    return tokens[:, : int((tokens != pad).any(dim=0).nonzero().max()) + 1]


def loss_of(
    encoder: LoadedEncoder, batch: list[Source], pixels: Tensor, data: Data, scale: float, epoch: int, seed: int
) -> Tensor:
    """The loss of a batch: its pictures, and a sentence of its class drawn for each."""
    texts = data.texts
    column = {name: number for number, name in enumerate(texts.classes)}
    owners = [column[data.class_of[source.image_id]] for source in batch]
    drawn = [
        draw_text(source.image_id, epoch, seed, texts.of_class[owner])
        for source, owner in zip(batch, owners, strict=True)
    ]
    with tuning.half_precision(encoder.device):
        pictures = embed_pictures(encoder, pixels)
        sentences = embed_sentences(encoder, [texts.sentences[each] for each in drawn])
    positives = texts.owners[drawn][:, owners].T.to(encoder.device)  # (pictures, sentences)
    return alignment_loss(scale * pictures @ sentences.T, positives)


@torch.inference_mode()
def accuracy_of(encoder: LoadedEncoder, sources: list[Source], data: Data, scale: float, batch_size: int) -> float:
    """How many pictures of the classes held out their sentences tell, among these classes."""
    texts = data.held_texts
    with tuning.half_precision(encoder.device):
        rows = [
            embed_sentences(encoder, texts.sentences[start : start + batch_size])
            for start in range(0, len(texts.sentences), batch_size)
        ]
    sentences, owners, right = torch.cat(rows), texts.owners.to(encoder.device), 0
    for batch, pixels in iterate_batches(sources, encoder, 0, batch_size):
        with tuning.half_precision(encoder.device):
            pictures = embed_pictures(encoder, pixels)
        # In float32: what a softmax is taken of is not rounded to eight bits.
        told = class_probabilities(scale * pictures @ sentences.T, owners).argmax(dim=1).tolist()
        right += sum(
            texts.classes[each] == data.class_of[source.image_id] for each, source in zip(told, batch, strict=True)
        )
    return right / len(sources)


def adapt(encoder: LoadedEncoder, data: Data, settings: Adapt, name: str) -> list[dict[str, Any]]:
    """Tune an encoder in place, as it was after its best epoch; the epochs, as in history.csv."""
    tuned = begin(encoder, settings, name)
    scale = encoder.logit_scale / settings.temperature
    optimizer = tuning.make_optimizer(
        tuned.inner, tuned.projections, settings.learning_rate, settings.projection_rate, settings.weight_decay
    )

    def accuracy() -> float:
        return accuracy_of(encoder, data.held_out, data, scale, settings.batch_size)

    def loss(batch: list[Source], pixels: Tensor, epoch: int) -> Tensor:
        return loss_of(encoder, batch, pixels, data, scale, epoch, settings.seed)

    history = tuning.run_epochs(
        f"adapt {name}", data.learned, encoder, optimizer, tuned.all, settings, loss, accuracy, "held out", accuracy()
    )
    tuning.end_tuning(encoder.model)
    return history


def begin(encoder: LoadedEncoder, settings: Adapt, name: str) -> tuning.Tuned:
    """Make what is to be tuned tunable. Raises UserError where there is nothing."""
    key = f"params.yaml: encoders.{encoder.name}"
    parts = [tuning.image_parts(encoder.model, key), tuning.text_parts(encoder.model, key)]
    tuned = tuning.start_tuning(parts, settings.blocks, settings.rank, torch.Generator().manual_seed(settings.seed))
    if not tuned.all:
        raise UserError(f"{key}: has no projection, and blocks: 0 leaves nothing to tune; raise adapt.{name}.blocks")
    return tuned


def provenance_of(
    identity: dict[str, Any], data: Data, settings: Adapt, model: str, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """provenance.json: what a folder was made from, and how it came out."""
    best = tuning.best_of(history)
    return {
        "made_by": "adapt_encoder",
        "identity": identity,
        "base_model": model,
        "learned_classes": data.texts.classes,
        "held_out_classes": data.held_texts.classes,
        "texts": store.sha256(store.canonical_json(data.sentences)),
        "images": store.sha256("\n".join(sorted(source.image_id for source in data.learned + data.held_out))),
        "epochs": history[-1]["epoch"],
        "kept_epoch": best["epoch"],
        "val_accuracy": {"base": history[0]["val_accuracy"], "kept": best["val_accuracy"]},
        "seed": settings.seed,
    }


def preview(encoder: LoadedEncoder, data: Data, settings: Adapt, name: str) -> str:
    """What a run would do, for --dry-run, from a few steps that are thrown away."""
    tuned = begin(encoder, settings, name)
    scale = encoder.logit_scale / settings.temperature

    def loss(batch: list[Source], pixels: Tensor) -> Tensor:
        return loss_of(encoder, batch, pixels, data, scale, 0, settings.seed)

    time = tuning.say_time(data.learned, encoder, encoder.device, settings, loss)
    count = sum(each.numel() for each in tuned.all)
    sentences = sum(map(len, data.sentences.values()))
    return (
        f"{len(data.learned)} pictures of {len(data.texts.classes)} classes to learn from, {len(data.held_out)} of"
        f" {len(data.held_texts.classes)} others to choose by, {sentences} sentences; {count:,} numbers tuned\n"
        f"{time}, and passes of those held out"
    )


def changes(folder: Path) -> str:
    """What came to the texts of a folder that is kept, or went, since it was made."""
    kept = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    then = {text for texts in kept.values() for text in texts}
    now = {text for texts in read_sentences(list(kept)).values() for text in texts}
    if then == now:
        return "its texts are those of today"
    return f"{len(now - then)} sentences are new and {len(then - now)} are gone since; --refit adapts to them"


def report(folder: Path, history: list[dict[str, Any]]) -> None:
    best = tuning.best_of(history)
    before, after = history[0]["val_accuracy"], best["val_accuracy"]
    print(f"{folder}: classes held out {before:.4f} before, {after:.4f} after; epoch {best['epoch']} is kept")
    if not best["epoch"]:
        print(f"warning: {folder}: no epoch was better on the classes held out: it is its base", file=sys.stderr)


def make(params: Params, name: str, device: str, *, refit: bool, dry_run: bool) -> None:
    """Write data/adapted/NAME, or say what that takes."""
    if name not in params.adapt:
        known = ", ".join(params.adapt) or "none is there"
        raise UserError(f"params.yaml: adapt.{name}: is not there; choose one of: {known}")
    settings, folder = params.adapt[name], folder_of(name)
    # What a cell holds is another question: global vectors are tuned.
    base = params.encoder(settings.base).model_copy(update={"precision": "fp32", "dense": "last"})
    check_writable(base, f"params.yaml: adapt.{name}.base")
    encoder = load_encoder(settings.base, base, choose_device(device))
    everything, training = read_images(), read_images("train")
    identity, home = identity_of(encoder, settings), params.dataset.folder
    index, shown = [{image_id: image.class_id for image_id, image in each.items()} for each in (everything, training)]
    if not refit and is_kept(folder, identity, index, learnable=shown, choosable=shown):
        print(f"{folder}: kept; {changes(folder)}")
        return
    data = gather(name, settings, training, home)
    if dry_run:
        print(f"{folder}: {preview(encoder, data, settings, name)}")
        return
    history = adapt(encoder, data, settings, name)
    write_folder(
        folder, lambda place: write_encoder(encoder, base, place, folder),
        provenance_of(identity, data, settings, base.model, history),
        [Seen(each.image_id, data.class_of[each.image_id], training[each.image_id].path, role)
         for role, images in (("learned", data.learned), ("chose", data.held_out)) for each in images],
        history, data.sentences,
    )  # fmt: skip
    report(folder, history)


def main() -> None:
    parser = key_parser(__doc__, "--name", "adapt")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--refit", action="store_true", help="adapt again; every vector of it has to be made anew")
    parser.add_argument("--dry-run", action="store_true", help="print images, sentences and time; write nothing")
    arguments = parser.parse_args()
    keep_memory()
    set_up_torch()
    params = load_params(arguments.params)
    make(params, arguments.name, arguments.device, refit=arguments.refit, dry_run=arguments.dry_run)


if __name__ == "__main__":
    run(main)
