"""The keys by which answers are known that people have paid for. They must not change by accident: everybody would pay
again. Who edits a prompt of the repository, or what is put to a model, changes them here on purpose."""

from fieldmark.llm.answers import Item, item_key
from fieldmark.llm.prompts import load_prompt
from fieldmark.params import Params, check_params
from stages import describe_images
from stages.generate_concepts import questions_of
from tests.project import ROOT

CLASSES = [
    {"class_id": "a", "name": "Blue tang", "scientific_name": "Paracanthurus hepatus", "note": None},
    {"class_id": "b", "name": "Sailfin tang", "scientific_name": None, "note": None},
]
IMAGE = "0" * 64


def params() -> Params:
    prompts = {name: str(ROOT / f"prompts/{file}.md") for name, file in (
        ("prompt", "concepts"), ("generic_prompt", "generic_concepts"), ("contrast_prompt", "contrast")
    )}  # fmt: skip
    described = {"prompt": str(ROOT / "prompts/describe.md"), "cell_prompt": str(ROOT / "prompts/describe_cell.md")}
    return check_params(
        "params.yaml",
        {
            "domain": {
                "noun": "fish",
                "group": "reef fish",
                "attributes": ["tail", "bars and stripes"],
                "not_shown": ["sound"],
            },
            "dataset": {"root": "photos"},
            "llm": {"model": "tiny", "temperature": 0.5},
            "concepts": {"generic": 3, "contrast": True, "samples": 2, **prompts},
            "describe": {"enabled": True, "nodes": [2], **described},
            "encoders": {"toy": {"model": "toy"}},
            "train": {"runs": {"zero_shot": {"method": "zero_shot", "encoder": "toy"}}},
            "report": {"reference": "zero_shot"},
        },
    )


def test_concepts_are_known_by_the_keys_that_they_always_had() -> None:
    questions = questions_of([{**row, "superclass": "tangs"} for row in CLASSES], [], params())
    keys = {
        (name, item.subject_id, item.sample): item_key(item, question.prompt, params().llm)
        for name, question in questions.items()
        for item in question.items
        if (name, item.subject_id) != ("concepts", "b")
    }
    assert keys == {
        ("concepts", "a", 0): "a4d76affdcc4f3ab93e076b9904ebed1a3a65ab61c1e6acd7cfdf79408a2f5ed",
        ("concepts", "a", 1): "7f295c133ed221141f5f6e721f03ada6b8a7421bc256f37d198d64a286a3dbff",
        ("generic", "*", 0): "90454cef89551f13b2aa7a2c71acd30cb3f73d79ccb2cb060c75bb398d3bbaf3",
        ("contrast", "a", 0): "9b731216bc06f4e39e4d9f2d6b5e8dba51b6e377ee937463f9d9dfe1ac29e17a",
        ("contrast", "b", 0): "753b84946fe2033af016afe4209fbe04204d2e5089548aa7e7438efdefa5d363",
    }


def test_descriptions_are_known_by_the_keys_that_they_always_had() -> None:
    settings = params()

    def key(items: list[Item], path: str) -> str:
        return item_key(items[0], load_prompt(path), settings.llm)

    whole, cells = load_prompt(settings.describe.prompt), load_prompt(settings.describe.cell_prompt)
    of_image = describe_images.items_of([IMAGE], whole, settings)
    of_cell = describe_images.cell_items(describe_images.cells_of([IMAGE], [2])[:1], cells, settings)
    assert key(of_image, whole.path) == "7653ca570c9c4306133e74594ecfcd85aa19774764a93e0f510fe40a3354cb74"
    assert key(of_cell, cells.path) == "6196ed65ea28b3fd670854528adf5a2a5860bfa9d5d87a805439d5327623efb6"
