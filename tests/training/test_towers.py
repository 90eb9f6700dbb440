"""Every plain baseline on a tower alone: no text, no bank, no label, from pictures to a judged run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fieldmark.command import UserError
from fieldmark.params import Params, load_params
from stages import build_graphs, embed_images, embed_tokens, index_images, pool_tokens
from tests.project import PARAMS
from tests.tools.towers import write_small
from training.train import plan_run, train

TOWERS = ("reef-vit", "reef-swin")
COLOURS = {"orange": (230, 120, 20), "purple": (120, 30, 160), "green": (30, 150, 60)}
COUNTS = {"train": 8, "val": 6, "test": 6}  # pictures a class
MOMENTS = {"pooled": {"kind": "pooled"}, "isqrt": {"kind": "isqrt", "directions": 8}}
FEATURES = {"features": ["global", "nodes", "pooled", "isqrt"]}
QUICK = {"epochs": 5, "batch_size": 8, "weight_decay": [0.01], "precision": "fp32"}
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_probe": ("linear_probe", FEATURES),
    "ridge": ("ridge", FEATURES),
    "rbf_ridge": ("rbf_ridge", FEATURES),
    "lda": ("lda", FEATURES),
    "probes": ("probes", {}),
    "knn": ("knn", {}),
    "prototypes": ("prototypes", {}),
    "mlp": ("mlp", QUICK),
    "attention_pool": ("attention_pool", QUICK),
    "attention_pool_tokens": ("attention_pool", QUICK | {"nodes": "tokens"}),
    "attention_pool_beside": ("attention_pool", QUICK | {"with_probe": True}),
    "efficient_probing": ("efficient_probing", QUICK | {"lr": [1e-2]}),
    "efficient_probing_beside": ("efficient_probing", QUICK | {"with_probe": True}),
}
OF_TEXTS = (
    *("zero_shot", "description_zero_shot", "tip_adapter", "lpp", "concept_bottleneck", "concept_graph"),
    *("prior_lda", "gda", "proker", "prolip"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose towers are the only encoders that it has embedded anything with, all of their stages run."""
    folder = tmp_path_factory.mktemp("project")
    write_small(folder / "towers")
    draw_pictures(folder / "images")
    towers = {name: {"model": f"local-dir:{folder}/towers/{name}", "batch_size": 12} for name in TOWERS}
    runs = {
        f"{name}-{tower}": {"method": method, "encoder": tower, "settings": settings}
        for tower in TOWERS
        for name, (method, settings) in [*BASELINES.items(), *((each, (each, {})) for each in OF_TEXTS)]
    }
    content = PARAMS | {
        "dataset": {"root": "images", "buckets": 2},
        "encoders": {"none": {"model": "none"}},
        "towers": towers,
        "embed": {"tokens": True, "grids": [2]},
        "tokens": {"reef-vit": {"layers": [-2, -1], "rollout": True}, "reef-swin": {"layers": [-3, -2, -1]}},
        "moments": dict.fromkeys(TOWERS, MOMENTS),
        "graphs": {"nodes": ["global", "grid"]},
        "train": {"runs": runs},
        "report": {"reference": "linear_probe-reef-vit"},
    }
    (folder / "params.yaml").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "data").mkdir()
        (folder / "data/none").touch()
        patch.setattr("sys.argv", ["index_images"])
        index_images.main()
        for tower in TOWERS:
            for stage in (embed_images, embed_tokens, pool_tokens, build_graphs):
                patch.setattr("sys.argv", [stage.__name__, "--encoder", tower])
                stage.main()
    return folder


@pytest.fixture(scope="module")
def params(project: Path) -> Params:
    """Of all runs, which take long to parse."""
    return load_params(project / "params.yaml")


def draw_pictures(folder: Path) -> None:
    """A patch of a class's colour somewhere on grey noise."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.repeat(rng.integers(60, 200, (40, 40, 1), dtype=np.uint8), 3, axis=2)
                row, column = rng.integers(0, 16, 2)
                pixels[row : row + 24, column : column + 24] = colour
                picture = Image.fromarray(pixels).resize((160, 160), Image.Resampling.NEAREST)
                picture.save(folder / split / name / f"{number}.png")


# On the second tower, one that reads moments and one that reads tokens: what differs from tower to tower are these.
@pytest.mark.parametrize(
    ("baseline", "tower"),
    [
        pytest.param(
            baseline,
            tower,
            marks=()
            if tower == TOWERS[0] or baseline in ("linear_probe", "attention_pool_tokens")
            else pytest.mark.slow,
        )
        for tower in TOWERS
        for baseline in BASELINES
    ],
)
def test_a_baseline_stands_on_a_tower_alone(project: Path, params: Params, baseline: str, tower: str) -> None:
    run = f"{baseline}-{tower}"
    train(params, str(project / "params.yaml"), run, project / "data")
    metrics = json.loads((project / "data/runs" / run / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.8  # chance is a third, and a colour is told by anything that looks
    assert not any((project / "data" / folder).exists() for folder in ("bank", "labels", "concepts"))


@pytest.mark.parametrize("method", OF_TEXTS)
def test_a_method_of_texts_says_that_a_tower_has_none(project: Path, params: Params, method: str) -> None:
    path, run = project / "params.yaml", f"{method}-reef-vit"
    what = rf"train\.runs\.{run}\.encoder: 'reef-vit' is a tower, .* and {method} reads .*; choose"
    with pytest.raises(UserError, match=what) as error:
        plan_run(str(path), params, run)
    assert "\n" not in str(error.value)
