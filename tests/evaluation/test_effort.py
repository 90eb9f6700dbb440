"""What fits took, and whether training stopped before it had stopped to gain."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.compare import compare
from evaluation.effort import seconds_of_fits, still_rising
from evaluation.plan import Cell, Plan
from evaluation.study import run_study
from fieldmark.command import UserError
from tests.evaluation.test_study import planned
from tests.training.cache import Plan as Planted
from tests.training.cache import write_cache

STUDY: dict[str, Any] = {
    "methods": ["linear_probe", "mlp"],
    "regimes": ["full"],
    "variants": {"longer": {"method": "mlp", "settings": {"epochs": 4, "lr": [0.01], "weight_decay": [0.1]}}},
    "published": {"mlp": {"figure": "CUB 99.9 | [mem]", "carries_over": "It does not."}},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Cell]]:
    folder = tmp_path_factory.mktemp("effort")
    write_cache(folder / "data", Planted(classes=6, train=8, val=12, test=6, noise=1.5))
    plan, grid = planned(folder, **STUDY)
    run_study(plan, grid, 1)
    return plan, grid


def of(grid: list[Cell], method: str) -> list[Cell]:
    return [cell for cell in grid if cell.method == method]


def set_file(plan: Plan, cell: Cell, name: str, **values: Any) -> None:
    path = plan.folder / cell.run / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_method_still_rises_where_its_last_epoch_is_the_best(study: tuple[Plan, list[Cell]]) -> None:
    plan, grid = study
    first, second = of(grid, "longer")
    config = json.loads((plan.folder / first.run / "config.json").read_text())
    for epochs, said in (((4, 4), "2 of 2"), ((3, 4), "1 of 2"), ((0, 3), "0 of 2")):
        for cell, epoch in zip((first, second), epochs, strict=True):
            set_file(plan, cell, "config.json", chosen=config["chosen"] | {"epoch": epoch})
        assert still_rising(plan, [first, second]) == said
    assert still_rising(plan, of(grid, "linear_probe")) == ""
    table = compare(plan, grid)
    assert "still rising" in table.splitlines()[3]
    assert re.search(r"^longer .*  0 of 2  ", table, re.MULTILINE)
    assert re.search(r"^linear_probe +none +[\d.]+ .*the probe$", table, re.MULTILINE)


def test_a_schedule_that_is_stopped_ends_there(study: tuple[Plan, list[Cell]]) -> None:
    plan, grid = study
    cells = of(grid, "longer")
    entry = plan.entries["longer"]
    stopped = entry.settings.model_copy(update={"stop": 2})
    plan = replace(plan, entries=plan.entries | {"longer": replace(entry, settings=stopped)})
    config = json.loads((plan.folder / cells[0].run / "config.json").read_text())
    for cell in cells:
        set_file(plan, cell, "config.json", chosen=config["chosen"] | {"epoch": 2})
        set_file(plan, cell, "timing.json", epoch_seconds=0.5)
    assert still_rising(plan, cells) == "2 of 2"
    assert seconds_of_fits(plan, cells).splitlines()[1].split()[3:] == ["2", "0.50", "1", "1.0"]


def test_the_seconds_of_a_fit_are_its_epochs_at_each_point(study: tuple[Plan, list[Cell]]) -> None:
    plan, grid = study
    for cell, seconds in zip(of(grid, "mlp"), (2.0, 4.0), strict=True):
        set_file(plan, cell, "timing.json", epoch_seconds=seconds)
    for cell in of(grid, "longer"):
        set_file(plan, cell, "timing.json", epoch_seconds=0.5)
    rows = [re.split(r"  +", line) for line in seconds_of_fits(plan, grid).splitlines()]
    assert rows[1:] == [
        ["tiny", "full", "longer", "4", "0.50", "1", "2.0"],
        ["tiny", "full", "mlp", "30", "3.00", "4", "360.0"],
    ]


def test_what_was_published_stands_on_the_page(study: tuple[Plan, list[Cell]]) -> None:
    plan, grid = study
    compare(plan, grid)
    page = (plan.folder / "answers.md").read_text()
    assert page.endswith("| mlp | CUB 99.9 &#124; [mem] | It does not. |\n")


def test_what_was_published_is_of_a_row(tmp_path: Path) -> None:
    write_cache(tmp_path / "data", Planted(classes=4, train=4, val=4, test=2))
    with pytest.raises(UserError, match=r"published\.knn: 'knn' is not there; choose from: linear_probe, mlp, longer"):
        planned(tmp_path, **STUDY | {"published": {"knn": {"figure": "", "carries_over": ""}}})
