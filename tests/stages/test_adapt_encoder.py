"""adapt_encoder on a tiny real encoder: it learns, it is kept, and what it writes is an encoder like any other."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.tokenizer import HFTokenizer

from fieldmark.command import UserError
from fieldmark.encoders.clip import LoadedEncoder, load_encoder
from fieldmark.params import Encoder, Params, load_params
from stages import adapt_encoder
from tests.project import snapshot, write_concepts
from tests.stages.tuned import CLASSES, draw_classes, sentences, write_index
from tools.doctor import Doctor
from tools.preflight import named_paths

FOLDER = Path("data/adapted/mine")
QUICK = {
    "base": "vit", "classes": "data/none", "epochs": 3, "patience": 3, "batch_size": 8, "learning_rate": 1e-2,
    "projection_rate": 1e-2, "temperature": 0.5,
}  # fmt: skip
Run = Callable[..., None]
SetParams = Callable[..., Params]


@pytest.fixture
def animals(project: Path) -> Path:
    draw_classes(project)
    draw_classes(project, "test", 1)
    write_index()
    write_concepts(sentences())
    return project


def provenance() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "provenance.json").read_text()))


def load(model: str) -> LoadedEncoder:
    return load_encoder("mine", Encoder(model=model, batch_size=4), torch.device("cpu"))


def test_it_learns_and_its_folder_is_an_encoder_like_any_other(
    animals: Path, set_params: SetParams, run_stage: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(adapt={"mine": QUICK | {"epochs": 6, "patience": 6}})
    run_stage("adapt_encoder", "--name", "mine")
    rows = list(csv.DictReader((FOLDER / "history.csv").open()))
    losses = [float(row["loss"]) for row in rows[1:]]
    assert losses[-1] < losses[0] - 0.1
    made = provenance()
    assert made["base_model"] == load_params().encoders["vit"].model
    assert sorted(made["learned_classes"] + made["held_out_classes"]) == CLASSES
    assert len(made["held_out_classes"]) == 2
    assert made["val_accuracy"]["kept"] == max(float(row["val_accuracy"]) for row in rows)
    assert not {path.suffix for path in FOLDER.iterdir()} - {".json", ".safetensors", ".csv", ".txt"}
    tuned, base = load(f"local-dir:{FOLDER}"), load(made["base_model"])
    assert base.fingerprint == made["identity"]["base"]
    assert (tuned.fingerprint == base.fingerprint) == (made["kept_epoch"] == 0)
    # The rest of the pipeline takes it by its folder.
    set_params(encoders={"mine": {"model": f"local-dir:{FOLDER}", "batch_size": 4}}, dataset={"root": "images"})
    run_stage("embed_images", "--encoder", "mine")
    assert "48 images embedded" not in capsys.readouterr().err
    assert len(list(Path("data/embed/mine/images").iterdir())) == 4


def test_what_it_has_seen_is_written_as_studies_read_it(
    animals: Path, set_params: SetParams, run_stage: Run
) -> None:
    Path("five.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    set_params(adapt={"mine": QUICK | {"classes": "five.txt", "epochs": 1}})
    run_stage("adapt_encoder", "--name", "mine")
    assert (FOLDER / "seen_classes.txt").read_text().split() == CLASSES[:5]
    seen = (FOLDER / "seen_images.txt").read_text().split()
    assert len(seen) == 30
    assert all(path.startswith("train/") and "fox" not in path for path in seen)
    from evaluation.plan import read_clean

    clean = read_clean(f"not {FOLDER}/seen_classes.txt", Path("data"))
    assert {path.split("/")[1] for path in clean} == {"fox"}
    assert not read_clean(f"not {FOLDER}/seen_images.txt", Path("data")) & set(seen)
    assert set(json.loads((FOLDER / "texts.json").read_text())) == set(CLASSES[:5])


def test_padding_stays_where_the_text_tower_is_open_clips_own(models: dict[str, Path]) -> None:
    """SigLIP's looks at padding and pools its last place, though its tokenizer is one of Hugging Face's."""
    encoder = load(f"local-dir:{models['vit']}")
    tokens = encoder.tokenizer(["an ant", "a bee with wings"])
    foreign = replace(encoder, tokenizer=HFTokenizer.__new__(HFTokenizer))
    assert torch.equal(adapt_encoder.without_padding(foreign, tokens), tokens)


def test_sentences_that_are_names_or_were_dropped_are_not_read(animals: Path, set_params: SetParams) -> None:
    found = adapt_encoder.read_sentences(["ant", "bee"])
    assert found == {"ant": ["a red animal", "an animal in red"], "bee": ["a green animal", "an animal in green"]}


def test_a_class_without_a_sentence_stops_what_is_adapted_and_not_what_is_kept(
    animals: Path, set_params: SetParams, run_stage: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(adapt={"mine": QUICK | {"epochs": 1}})
    run_stage("adapt_encoder", "--name", "mine")
    write_concepts(sentences()[4:])
    run_stage("adapt_encoder", "--name", "mine")
    assert "kept; 0 sentences are new and 2 are gone since" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"keeps no sentence of class ant; take it out of what .*adapt\.mine\.classes"):
        run_stage("adapt_encoder", "--name", "mine", "--refit")


def test_no_epoch_that_helps_leaves_the_base_bit_for_bit(
    animals: Path, set_params: SetParams, run_stage: Run, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The oracle of a zero adapter, through the file: what was tuned in vain is undone."""
    reached = iter([0.5, 0.5, 0.25])
    monkeypatch.setattr("stages.adapt_encoder.accuracy_of", lambda *_: next(reached))
    set_params(adapt={"mine": QUICK | {"patience": 2}})
    run_stage("adapt_encoder", "--name", "mine")
    assert "it is its base" in capsys.readouterr().err
    made = provenance()
    assert (made["kept_epoch"], made["epochs"]) == (0, 2)
    tuned, base = load(f"local-dir:{FOLDER}"), load(made["base_model"])
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    for first, second in zip(tuned.embed_images(pixels), base.embed_images(pixels), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(tuned.embed_texts(["a red animal"]), base.embed_texts(["a red animal"]))


@pytest.mark.slow
def test_a_prompt_that_is_edited_adapts_nothing_anew_and_refit_does(
    animals: Path, set_params: SetParams, run_stage: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(adapt={"mine": QUICK})
    run_stage("adapt_encoder", "--name", "mine")
    before = snapshot(FOLDER)
    run_stage("adapt_encoder", "--name", "mine")
    assert "kept; its texts are those of today" in capsys.readouterr().out
    write_concepts(sentences("one {} creature"))
    run_stage("adapt_encoder", "--name", "mine")
    assert "6 sentences are new and 6 are gone since; --refit adapts to them" in capsys.readouterr().out
    assert snapshot(FOLDER) == before
    run_stage("adapt_encoder", "--name", "mine", "--refit")
    assert "one red creature" in (FOLDER / "texts.json").read_text()
    write_concepts(sentences())
    run_stage("adapt_encoder", "--name", "mine", "--refit")
    # The same seed, texts and pictures: the same bytes.
    assert {name: content for name, (content, _) in snapshot(FOLDER).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_an_image_that_moves_to_test_is_unlearned(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    set_params(adapt={"mine": QUICK | {"epochs": 1}})
    run_stage("adapt_encoder", "--name", "mine")
    before = snapshot(FOLDER)
    draw_classes(animals, "test", 2)  # new pictures do not matter
    write_index()
    run_stage("adapt_encoder", "--name", "mine")
    assert snapshot(FOLDER) == before
    write_index({"train/ant/0.png": ("ant", "test")})
    run_stage("adapt_encoder", "--name", "mine")
    assert "train/ant/0.png" not in (FOLDER / "seen_images.txt").read_text()


def test_other_settings_or_classes_make_it_anew(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    Path("some.txt").write_text("\n".join(CLASSES[:4]))
    set_params(adapt={"mine": QUICK | {"epochs": 1, "classes": "some.txt"}})
    run_stage("adapt_encoder", "--name", "mine")
    Path("some.txt").write_text("\n".join(CLASSES[1:5]))
    run_stage("adapt_encoder", "--name", "mine")
    assert (FOLDER / "seen_classes.txt").read_text().split() == CLASSES[1:5]
    set_params(adapt={"mine": QUICK | {"epochs": 1, "classes": "some.txt", "seed": 1, "rank": None}})
    run_stage("adapt_encoder", "--name", "mine")
    assert provenance()["identity"]["settings"]["rank"] is None


def test_the_control_deals_sentences_among_the_classes_that_are_learned(
    animals: Path, set_params: SetParams, run_stage: Run
) -> None:
    params = set_params(adapt={"mine": QUICK, "control": QUICK | {"texts": "dealt"}})
    images = adapt_encoder.read_images("train")
    own, dealt = (
        adapt_encoder.gather(name, params.adapt[name], images, Path("images")) for name in ("mine", "control")
    )
    assert own.texts.sentences == dealt.texts.sentences
    assert not torch.equal(own.texts.owners, dealt.texts.owners)
    assert torch.equal(own.held_texts.owners, dealt.held_texts.owners)
    assert own.learned == dealt.learned


def test_dry_run_writes_nothing(
    animals: Path, set_params: SetParams, run_stage: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(adapt={"mine": QUICK})
    run_stage("adapt_encoder", "--name", "mine", "--dry-run")
    said = capsys.readouterr().out
    assert "24 pictures of 4 classes to learn from, 12 of 2 others to choose by, 12 sentences; " in said
    assert "time: about 0:00:" in said
    assert not FOLDER.exists()


def test_what_cannot_be_is_refused(animals: Path, set_params: SetParams, run_stage: Run) -> None:
    with pytest.raises(UserError, match=r"adapt\.mine\.base: 'other' is not under `encoders`; choose one of: "):
        set_params(adapt={"mine": QUICK | {"base": "other"}})
    with pytest.raises(UserError, match=r"adapt\.mine\.base: vit lies in data/adapted itself"):
        set_params(adapt={"mine": QUICK}, encoders={"vit": {"model": "local-dir:data/adapted/other"}})
    with pytest.raises(UserError, match=r"finetune\.mine: adapt\.mine writes to data/adapted/mine too"):
        set_params(adapt={"mine": QUICK}, finetune={"mine": {"base": "vit", "classes": "data/none"}})
    Path("three.txt").write_text("ant\nbee\ncat\n")
    set_params(adapt={"mine": QUICK | {"classes": "three.txt"}})
    with pytest.raises(UserError, match=r"adapt\.mine\.classes: 3 classes are too few"):
        run_stage("adapt_encoder", "--name", "mine")
    Path("three.txt").write_text("ant\nwolf\n")
    with pytest.raises(UserError, match=r"three\.txt, line 2: 'wolf' has no training image"):
        run_stage("adapt_encoder", "--name", "mine")
    with pytest.raises(UserError, match=r"adapt\.yours: is not there; choose one of: mine"):
        run_stage("adapt_encoder", "--name", "yours")


def test_an_encoder_that_a_stage_will_make_need_not_be_there_before(set_params: SetParams) -> None:
    params = set_params(
        adapt={"mine": QUICK}, encoders={"mine": {"model": "local-dir:data/adapted/mine", "batch_size": 4}}
    )
    assert not [key for key, _, _ in named_paths(params) if key == "encoders.mine.model"]
    assert [key for key, _, _ in named_paths(params) if key == "adapt.mine.classes"]
    doctor = Doctor("params.yaml", params, calls=False)
    assert doctor.encoder("mine") == "is tuned by the first run, and not tried before"
