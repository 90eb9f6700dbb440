"""The committed encoder: loads with open_clip, and knows the field marks of species it never saw."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fieldmark.command import UserError
from fieldmark.reef.drawing import draw_fish
from fieldmark.reef.species import load_species, phrases
from tools import train_reef_encoder
from tools.train_reef_encoder import WORDINGS, cell_targets, random_text, training_attributes, with_unknown_words

ENCODER = Path("data/demo/encoder")
SPECIES = load_species()
PER_SPECIES = 10


@pytest.fixture(scope="module")
def encoder():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{ENCODER}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{ENCODER}")


@pytest.fixture(scope="module")
def drawings(encoder):
    """Preprocessed drawings of the species (N, 3, H, W) and the species of each."""
    _, preprocess, _ = encoder
    pairs = [(one, k) for one in SPECIES for k in range(PER_SPECIES)]
    images = [
        preprocess(draw_fish(one.attributes, np.random.default_rng([77, index, k]), 160).image)
        for index, (one, k) in enumerate(pairs)
    ]
    return torch.stack(images), [one for one, _ in pairs]


@torch.no_grad()
def embed_texts(encoder, texts):
    model, _, tokenizer = encoder
    return F.normalize(model.encode_text(tokenizer(texts)), dim=1)


@torch.no_grad()
def embed_images(encoder, images):
    return F.normalize(torch.cat([encoder[0].encode_image(batch) for batch in images.split(64)]), dim=1)


def test_it_is_small_and_loads_as_float32(encoder):
    assert sum(path.stat().st_size for path in ENCODER.iterdir()) <= 20e6
    assert {parameter.dtype for parameter in encoder[0].parameters()} == {torch.float32}


@pytest.mark.slow
def test_every_field_mark_is_recognised_on_species_it_never_saw(encoder, drawings):
    images, owners = drawings
    vectors = embed_images(encoder, images)
    auc = {}
    for mark, phrase in phrases().items():
        score = (vectors @ embed_texts(encoder, [f"a fish with {phrase}"])[0]).numpy()
        shown = [one.attributes[mark[0]] == mark[1] for one in owners]
        auc[mark] = roc_auc_score(shown, score)
    worst = min(auc, key=auc.__getitem__)
    assert auc[worst] >= 0.80, (worst, auc[worst])
    assert np.mean(list(auc.values())) >= 0.90


@pytest.mark.slow
def test_projected_cells_average_to_the_embedding(encoder, drawings):
    visual = encoder[0].visual
    with torch.no_grad():
        cells = visual.head(visual.trunk.forward_features(drawings[0][:4]).flatten(2).transpose(1, 2))
        assert cells.shape[1] == 36
        torch.testing.assert_close(cells.mean(dim=1), visual(drawings[0][:4]), rtol=1e-4, atol=1e-5)


def test_words_never_trained_on_say_nothing(encoder):
    model, _, tokenizer = encoder
    trained = tokenizer(["a fish with a forked tail"])[0].unique()
    unknown = tokenizer(["zeppelin quarterback"])[0, 1:3]
    assert not model.token_embedding.weight[unknown].any()
    assert model.token_embedding.weight[trained[trained > 0]].any(dim=1).all()
    plain, odd = embed_texts(encoder, ["a fish with a forked tail", "a zeppelin fish with a forked tail"])
    other = embed_texts(encoder, ["a fish with a rounded tail"])[0]
    assert plain @ odd > plain @ other


def test_no_species_is_among_the_training_combinations():
    taken = [one.attributes for one in SPECIES]
    assert all(training_attributes(index, 0, SPECIES) not in taken for index in range(20000))


def test_training_texts_speak_of_the_marks_they_are_labelled_with_and_of_no_species():
    marks = list(phrases())
    rng = np.random.default_rng(0)
    lengths = Counter()
    for _ in range(2000):
        text, columns = random_text(rng, marks)
        lengths[len(columns)] += 1
        assert len({marks[column][0] for column in columns}) == len(columns)
        assert not any(re.search(rf"\b{one.name}\b", text, re.IGNORECASE) for one in SPECIES)
    assert set(lengths) == {0, 1, 2, 3}
    assert set(WORDINGS) <= set(marks)
    said = [wording for ways in WORDINGS.values() for wording in ways]
    assert len(set(said)) == len(said)


@pytest.mark.slow
def test_a_vit_is_trained_by_whole_pictures_towards_the_texts_of_the_demo(encoder, tmp_path, monkeypatch):
    """For two steps of 32 drawings: every weight of its image tower moves, and its texts are those of the demo."""
    monkeypatch.setitem(train_reef_encoder.PHASES, "vit", ((160, 2.0),))
    monkeypatch.setattr(sys, "argv", ["train", "--tower", "vit", "--out", str(tmp_path / "vit"), "--images", "32"])
    train_reef_encoder.main()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'vit'}")
    assert model.visual.grid_size == (8, 8)
    assert (model.visual.pool_type, model.visual.attn_pool) == ("tok", None)
    texts = ["a fish with a forked tail", "a fish"]
    torch.testing.assert_close(embed_texts((model.eval(), preprocess, encoder[2]), texts), embed_texts(encoder, texts))
    torch.manual_seed(0)
    before = open_clip.create_model(f"local-dir:{tmp_path / 'vit'}", load_weights=False).state_dict()
    held = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name].half().float())]
    assert [name for name in held if name.startswith("visual.")] == []
    monkeypatch.setattr(sys, "argv", ["train", "--tower", "vit"])
    with pytest.raises(UserError, match=r"^--out: data/demo/encoder is the demo's encoder; name another folder$"):
        train_reef_encoder.main()


def test_cell_targets_follow_the_boxes():
    """A box over the left half of a 2 x 2 grid; a sliver of 10 % of a cell into the right half counts as neither."""
    boxes = torch.zeros(1, 2, 2, 4)
    boxes[0, 0, 0] = torch.tensor([0.0, 0.0, 0.55, 1.0])
    target, weight = cell_targets(boxes, 2)
    assert target[0, :, 0].tolist() == [1, 0, 1, 0]
    assert weight[0, :, 0].tolist() == [1, 0, 1, 0]
    assert target[0, :, 1].tolist() == [0, 0, 0, 0]
    assert weight[0, :, 1].tolist() == [1, 1, 1, 1]


def test_an_unknown_word_is_put_after_the_start_of_some_texts():
    torch.manual_seed(0)
    tokens = torch.tensor([[9, 1, 2, 8, 0, 0]]).repeat(64, 1)
    changed = with_unknown_words(tokens, torch.tensor([5]))
    kinds = {tuple(row) for row in changed.tolist()}
    assert kinds == {(9, 1, 2, 8, 0, 0), (9, 5, 1, 2, 8, 0)}


@pytest.mark.slow
def test_a_linear_probe_is_good_and_not_perfect(encoder):
    """The default reef, drawn in full: what is left to gain is what the methods are compared on."""
    _, preprocess, _ = encoder

    def draw(split, count):
        pictures = [
            preprocess(draw_fish(one.attributes, np.random.default_rng([split, index, k]), 160).image)
            for index, one in enumerate(SPECIES)
            for k in range(count)
        ]
        labels = np.repeat(np.arange(len(SPECIES)), count)
        return embed_images(encoder, torch.stack(pictures)).numpy(), labels

    (x, y), (x_test, y_test) = draw(1, 40), draw(2, 25)
    accuracy = LogisticRegression(C=10, max_iter=1000).fit(x, y).score(x_test, y_test)
    assert 0.80 < accuracy < 0.98
