"""The real encoders and photographs of ../shared, where they are there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Encoder
from tests.project import ROOT

MODELS = ROOT.parent / "shared/models"
BIRDS = ROOT.parent / "shared/data/cub100"

pytestmark = pytest.mark.skipif(
    not (MODELS.is_dir() and BIRDS.is_dir()), reason="needs the shared test material beside the checkout: ../shared"
)


@pytest.fixture(scope="module", params=["birds-lit", "birds-lit0"])
def encoder(request: pytest.FixtureRequest) -> Iterator[LoadedEncoder]:
    # The text tower's path in these encoders counts from the repository's root.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        settings = Encoder(model=f"local-dir:../shared/models/{request.param}", batch_size=20)
        yield load_encoder(request.param, settings, torch.device("cpu"))


@pytest.fixture(scope="module")
def photographs() -> list[tuple[str, Path]]:
    """(class folder, path) of two official test photographs of each of ten classes that birds-lit was aligned on."""
    folder = BIRDS / "CUB_200_2011"
    split = (folder / "train_test_split.txt").read_text().splitlines()
    images = (folder / "images.txt").read_text().splitlines()
    testing = {line.split()[0] for line in split if line.split()[1] == "0"}
    paths = [line.split()[1] for line in images if line.split()[0] in testing]
    seen = (BIRDS / "seen_classes.txt").read_text().split()[::5]
    return [
        (name, folder / "images" / path)
        for name in seen
        for path in [path for path in paths if path.startswith(f"{name}/")][:2]
    ]


def test_texts_are_counted_as_the_tower_reads_them(encoder: LoadedEncoder) -> None:
    assert encoder.count_tokens("A bird with a red head.") == (9, False)
    # One token a word, [CLS] and [SEP].
    assert encoder.count_tokens("bird " * 75) == (77, False)
    assert encoder.count_tokens("bird " * 76) == (77, True)
    assert encoder.count_tokens("bird " * 2000) == (77, True)
    for text in ("", "Häher, grün", "Black-footed Albatross (Phoebastria nigripes)"):
        assert encoder.count_tokens(text) == (int((encoder.tokenizer([text]) != 0).sum()), False)
    full, longer = encoder.embed_texts(["bird " * 75, "bird " * 75 + "fish"])
    assert torch.equal(full, longer)


def test_cells_of_photographs_average_to_the_global_row(
    encoder: LoadedEncoder, photographs: list[tuple[str, Path]]
) -> None:
    pixels = torch.stack([encoder.preprocess(Image.open(path)) for _, path in photographs[:4]])
    pooled, tokens = encoder.embed_images(pixels)
    assert tokens.shape == (4, 9, 9, 384)
    assert (tokens.mean(dim=(1, 2)) - pooled).abs().max() < 1e-4
    assert tokens.std(dim=(1, 2)).mean() > 0.01


# birds-lit0 never saw a bird of these classes.
@pytest.mark.parametrize("encoder", ["birds-lit"], indirect=True)
def test_photographs_find_their_class_name(encoder: LoadedEncoder, photographs: list[tuple[str, Path]]) -> None:
    names = list(dict.fromkeys(name for name, _ in photographs))
    assert (len(names), len(photographs)) == (10, 20)
    texts = encoder.embed_texts([name.split(".")[1].replace("_", " ") for name in names])
    images, _ = encoder.embed_images(torch.stack([encoder.preprocess(Image.open(path)) for _, path in photographs]))
    guesses = (normalize(images, dim=-1) @ normalize(texts, dim=-1).T).argmax(dim=1).tolist()
    right = [names[guess] == name for guess, (name, _) in zip(guesses, photographs, strict=True)]
    # Chance is 2 of 20; it was .84 among fifty classes when the encoder was made.
    assert sum(right) >= 12
