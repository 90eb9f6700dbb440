"""Texts about cells, planted: ones that speak of their cell, ones that were shuffled, ones that are about nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation.cell_texts import (
    RIVALS,
    Grids,
    Said,
    agreement,
    as_text,
    concept_vectors,
    held_by,
    judge,
    judge_cells,
    mean_win,
    point_out,
)
from evaluation.pointing import PARTS
from fieldmark.command import UserError
from fieldmark.store import make_table, read_header, write_table
from tests.training.cache import ENCODER, Plan, write_cache
from training.data import Cache, read_cache
from training.data.bank import Bank
from training.data.boxes import Boxes
from training.data.labels import Labels

GRIDS = Grids.of([2])
FISH = {name: PARTS[name] for name in ("tail", "eye")}


def planted_texts(images: int = 60, noise: float = 0.5, seed: int = 0) -> tuple[Said, torch.Tensor]:
    """A sentence about each of the four cells of each picture, near to what the cell shows."""
    generator = torch.Generator().manual_seed(seed)
    concepts = F.normalize(torch.randn(images, 4, 16, generator=generator), dim=-1)
    vectors = F.normalize(concepts + noise * torch.randn(concepts.shape, generator=generator) / 4, dim=-1)
    image, cell = np.divmod(np.arange(images * 4), 4)
    return Said([""] * len(image), vectors.flatten(0, 1).numpy(), image, cell), concepts


def shares(said: Said, concepts: torch.Tensor) -> dict[str, float]:
    known = np.ones(concepts.shape[:2], bool)
    return {name: float(np.nanmean(wins)) for name, wins in agreement(said, concepts, known, GRIDS).items()}


def test_texts_of_their_own_cell_agree_and_shuffled_ones_do_not() -> None:
    said, concepts = planted_texts()
    assert min(shares(said, concepts).values()) > 0.95
    rng = np.random.default_rng(0)
    shuffled = said._replace(vectors=said.vectors[rng.permutation(len(said.vectors))])
    for name, wins in agreement(shuffled, concepts, np.ones((60, 4), bool), GRIDS).items():
        found = judge(name, wins.ravel(), np.full(wins.size, 0.5), np.repeat(np.arange(60), 4))
        assert found.over[0] < 0 < found.over[1]


def test_a_text_of_the_picture_but_of_no_place_agrees_with_the_picture_alone() -> None:
    said, concepts = planted_texts()
    picture = F.normalize(torch.randn(60, 1, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    concepts = F.normalize(3 * picture + concepts, dim=-1)
    whole = said._replace(vectors=picture.expand(-1, 4, -1).flatten(0, 1).numpy())
    found = shares(whole, concepts)
    assert found[RIVALS[0]] > 0.95
    assert found[RIVALS[1]] == pytest.approx(0.5)  # each cell once above and once below each other one


def test_one_sentence_about_every_cell_that_was_spoken_of_is_at_chance() -> None:
    # Of 9 cells 4 are foreground, not the same in each picture; these are near to the sentence, the rest is not.
    grids, rng = Grids.of([3]), np.random.default_rng(0)
    image = np.repeat(np.arange(80), 4)
    cell = np.stack([rng.choice(9, 4, replace=False, p=np.arange(1, 10) / 45) for _ in range(80)]).ravel()
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(80, 9, 16, generator=generator)
    concepts[image, cell, 0] += 3
    concepts = F.normalize(concepts, dim=-1)
    # About what is nearest to it, more is said.
    often = 1 + 2 * (concepts[image, cell, 0] > 0.6).long().numpy()
    image, cell = np.repeat(image, often), np.repeat(cell, often)
    said = Said(["a tail"] * len(image), np.tile(np.eye(16)[0], (len(image), 1)), image, cell)
    known = np.ones((80, 9), bool)
    for wins in agreement(said, concepts, known, grids).values():
        np.testing.assert_array_equal(np.isnan(wins), said.per_cell((80, 9)) == 0)
        assert np.nanmean(wins) == pytest.approx(0.5, abs=1e-9)
    # The tail lies in one of the foreground cells. A text that names it in each knows nothing of where.
    held = np.zeros((80, 9))
    held[np.arange(80), [rng.choice(cell[image == one]) for one in range(80)]] = 1
    hits = point_out(said, FISH, {"tail": held}, grids)["tail"]
    assert len(hits.hit) == 320
    assert hits.hit.mean() == pytest.approx(hits.random.mean()) == pytest.approx(hits.place.mean()) == 0.25


def test_agreement_is_what_a_loop_counts() -> None:
    said, concepts = planted_texts(images=7, noise=4.0)
    rng = np.random.default_rng(0)
    known, kept = rng.random((7, 4)) < 0.8, rng.permutation(28)[:20]
    kept = np.concatenate([kept, kept[:5]])  # of some cells two sentences, of some none
    vectors = F.normalize(torch.from_numpy(said.vectors[kept]) + torch.from_numpy(rng.random((25, 16))).float(), dim=-1)
    said = Said([""] * 25, vectors.numpy(), said.image[kept], said.cell[kept])
    told = {(image, cell) for image, cell in zip(said.image.tolist(), said.cell.tolist(), strict=True)}
    told = {place for place in told if known[place]}
    found = agreement(said, concepts, known, GRIDS)
    for image, cell in np.ndindex(7, 4):
        sentences = vectors[torch.from_numpy((said.image == image) & (said.cell == cell))]
        for name, rivals in (
            (RIVALS[0], [(other, cell) for other in range(7) if other != image]),
            (RIVALS[1], [(image, other) for other in range(4) if other != cell]),
        ):
            wins = [
                float(sentence @ concepts[image, cell]) > float(sentence @ concepts[place])
                for sentence in sentences
                for place in rivals
                if {place, (image, cell)} <= told
            ]
            expected = np.mean(wins) if wins else np.nan
            np.testing.assert_allclose(found[name][image, cell], expected, atol=1e-6)


def test_ties_count_half_and_no_rival_counts_nothing() -> None:
    rivals, exist = np.array([[0.0, 1.0], [2.0, 9.0], [1.0, 1.0]]), np.array([[1, 1], [1, 0], [0, 0]], bool)
    np.testing.assert_array_equal(mean_win(np.ones((3, 1)), rivals, exist), [0.75, 0.0, np.nan])


def test_a_cell_s_concepts_are_those_of_the_patches_in_it(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    images = cache.images("val")
    found, known = concept_vectors(cache, images, GRIDS)
    bank, labels, box = cache.part(Bank), cache.part(Labels), cache.part(Boxes).box
    centred = bank.K - bank.K[bank.kept].mean(0)
    for position, image in enumerate(images.tolist()):
        for cell, (x0, y0, x1, y1) in enumerate(GRIDS.boxes):
            total = torch.zeros(bank.K.shape[1])
            area = min(float((b[2] - b[0]) * (b[3] - b[1])) for b in box[image, 1:] if b.any())
            for node in range(1, box.shape[1]):
                left, top, right, bottom = box[image, node].tolist()
                x, y, own = (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)
                if box[image, node].any() and own <= 2 * area and x0 <= x < x1 and y0 <= y < y1:
                    said = zip(labels.concept_idx[image, node], labels.concept_weight[image, node], strict=True)
                    total += sum((float(weight) * centred[concept] for concept, weight in said), torch.zeros(1))
            assert known[position, cell] == bool(total.any())
            torch.testing.assert_close(found[position, cell], F.normalize(total, dim=0), atol=1e-4, rtol=1e-3)


def test_a_text_hits_where_its_cell_holds_the_part() -> None:
    # Of four pictures three show a tail: in cells 2, 2 and 3 (from 1); the last shows none.
    at = np.array([[[0.9, 0.1]], [[0.8, 0.2]], [[0.1, 0.9]], [[np.nan, np.nan]]], np.float32)
    held = {"tail": held_by(GRIDS.boxes, at), "eye": held_by(GRIDS.boxes, np.full((4, 1, 2), np.nan, np.float32))}
    np.testing.assert_array_equal(held["tail"][:3], [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    texts = ["a forked tail", "a fish with a tail", *["a tail"] * 4, "a fish with an eye", "blue"]
    image, cell = np.array([0, 1, 2, 2, 3, 0, 0, 0]), np.array([1, 0, 2, 1, 1, 1, 1, 3])
    found = point_out(Said(texts, np.zeros((8, 2)), image, cell), FISH, held, GRIDS)
    assert list(found) == ["tail"]  # no picture shows an eye
    tail = found["tail"]
    # The last picture shows none; what is said twice of the first one's cell counts once.
    assert tail.image.tolist() == [0, 1, 2, 2]
    assert tail.hit.tolist() == [1, 0, 0, 1]
    # Of the cells that were spoken of: 2 of the first picture, 1 of the next, 2 of the third.
    assert tail.random.tolist() == [0.5, 0, 0.5, 0.5]
    # Of the others with a tail where something is said of that cell, how many have it there; of two cells, none is.
    np.testing.assert_array_equal(tail.place, [0, np.nan, 1, np.nan])


def test_cells_of_several_grids_are_rivals_of_their_size_alone() -> None:
    grids = Grids.of([2, 3])
    assert len(grids.boxes) == 13
    held = {"tail": held_by(grids.boxes, np.array([[[0.9, 0.1]], [[0.9, 0.1]]], np.float32))}
    image, cell = np.divmod(np.arange(26), 13)
    said = Said(["blue"] * 26, np.zeros((26, 2)), image, cell)
    said.texts[1] = said.texts[6] = "a tail"
    found = point_out(said, FISH, held, grids)["tail"]
    assert found.hit.tolist() == [1, 1]
    np.testing.assert_allclose(found.random, [1 / 4, 1 / 9])


def cache_of(folder: Path) -> Cache:
    write_cache(folder, Plan(classes=3, train=4, val=16, test=2, nodes=5, sentences=4, described="all"))
    return read_cache(folder, ENCODER, 3, {"nodes", "boxes", "labels", "concepts", "owners"})


def test_the_command_reads_what_the_stages_write(tmp_path: Path) -> None:
    cache_of(tmp_path)
    path, schema = tmp_path / "descriptions/cells.parquet", "descriptions.cells/1"
    text = judge_cells(tmp_path, ENCODER, 3)
    found = json.loads((tmp_path / f"explanations/cells.{ENCODER}/tables.json").read_text())
    assert (tmp_path / f"explanations/cells.{ENCODER}/tables.txt").read_text() == text
    assert [row["name"] for row in found["agreement"]] == list(RIVALS)
    assert found["fingerprints"]["descriptions/cells.parquet"] == read_header(path, schema).fingerprint
    assert "val, 96 texts about cells of 24 of 24 pictures" in text
    # Texts that are drawn by chance agree with nothing.
    assert all(row["over"][0] < 0 < row["over"][1] for row in found["agreement"])
    header = read_header(path, schema)
    write_table(make_table(schema, []), path, schema, header.params, header.fingerprint)
    with pytest.raises(UserError, match=r"cells\.parquet: says nothing of a cell of a picture of val; name cells in"):
        judge_cells(tmp_path, ENCODER, 3)


def test_few_pictures_are_said_to_be_few() -> None:
    said, concepts = planted_texts(images=5)
    wins = agreement(said, concepts, np.ones((5, 4), bool), GRIDS)
    images = np.repeat(np.arange(5), 4)
    judged = [judge(name, own.ravel(), np.full(20, 0.5), images) for name, own in wins.items()]
    assert "fewer than 20 say nothing of others" in as_text("title", judged, [], [])
