"""What a run reads: its parts, their files, and the code behind it; and the plan of all runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fieldmark.params import load_params
from tests.project import ROOT
from tests.training.cache import Plan, write_cache
from tests.training.test_train import PARAMS
from training.controls import Control
from training.hashes import hash_data
from training.inputs import code_of, reading_of
from training.methods import load_method, method_names
from training.plan_runs import plan
from training.regimes import Full, Noise

INDEX = {"index/images.parquet", "index/classes.parquet"}
EMBED, BANK = "embed/tiny/images", "bank/tiny.parquet"
FILES = {
    "linear_probe": {EMBED},
    "attention_pool": {EMBED},
    "zero_shot": {EMBED, BANK},
    "concept_graph": {EMBED, BANK, "labels/tiny", "graphs/tiny"},
    "label_propagation": {"links/near.parquet"},
    "link_gnn": {EMBED, "links/near.parquet"},
}


@pytest.mark.parametrize("method", FILES)
def test_a_run_reads_what_its_method_declares(method: str) -> None:
    reading = reading_of(method, load_method(method).Settings(), "tiny", [], Control(), Full())
    assert reading.reads == reading.needs
    assert set(reading.files) == FILES[method] | INDEX


def test_settings_control_and_regime_add_what_they_need() -> None:
    graph = load_method("concept_graph").Settings
    both = {"descriptions/descriptions.parquet", "embed/tiny/text.parquet"}
    told = graph.model_validate({"description": True})
    assert both <= set(reading_of("concept_graph", told, "tiny", [], Control(), Full()).files)
    unheard = graph.model_validate({"description": True, "streams": ["global"]})  # no stream reads it
    assert not both & set(reading_of("concept_graph", unheard, "tiny", [], Control(), Full()).files)
    beside = reading_of("concept_graph", graph(), "tiny", ["wide"], Control(), Full())
    assert "embed/wide/images" in beside.files
    assert beside.also_reads == {"nodes"}
    texts = reading_of("concept_graph", graph(), "tiny", [], Control(name="unrelated_texts"), Full())
    assert {"embed/tiny/controls.parquet", "embed/tiny/text.parquet"} <= set(texts.files)
    assert "boxes" in texts.needs - texts.reads
    # A regime that asks a probe on the global vectors.
    bank = load_method("concept_bottleneck").Settings()
    noisy = reading_of("concept_bottleneck", bank, "tiny", [], Control(), Noise(wrong="confused", share=0.1))
    assert "globals" in noisy.needs


def code(method: str, control: Control | None = None, **knobs: object) -> dict[str, str]:
    settings, control = load_method(method).Settings.model_validate(knobs), control or Control()
    reading = reading_of(method, settings, "tiny", [], control, Full())
    return code_of(ROOT / "training/train.py", reading.methods, reading.needs, control)


def test_code_that_is_loaded_by_its_name_is_followed_where_a_run_loads_it() -> None:
    probe, graph = code("linear_probe"), code("concept_graph")
    shared = {"training/train.py", "training/loop.py", "training/data/nodes.py", "fieldmark/store.py"}
    assert shared <= probe.keys() & graph.keys()
    assert "training/methods/linear_probe.py" in probe
    own = {"training/methods/concept_graph.py", "training/layers/graphs.py", "training/data/edges.py"}
    assert own <= graph.keys() - probe.keys()
    assert not [file for file in probe if file.startswith(("stages/", "evaluation/", "fieldmark/labels/"))]
    controlled = code("concept_graph", Control(name="random_vectors"))
    assert {"training/controls/random_vectors.py", "fieldmark/labels/labelling.py"} <= controlled.keys() - graph.keys()
    beside = code("concept_graph", with_probe={"method": "ridge", "settings": {"features": ["pooled"]}})
    assert "training/methods/ridge.py" in beside.keys() - graph.keys()


# A fresh process a method, and yet torch is imported once: what it loads is the same for all.
LOADED = """
import json, os, sys
import torch
for method in sys.argv[1:]:
    if os.fork() == 0:
        from training.methods import load_method
        load_method(method)
        modules = [m for n, m in sys.modules.items() if n.split(".")[0] in ("training", "fieldmark")]
        print(json.dumps([method, [m.__file__ for m in modules if getattr(m, "__file__", None)]]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""


@pytest.mark.parametrize(
    "methods",
    # Not those over links: PyTorch Geometric takes seconds to import.
    [["concept_graph", "linear_probe"], pytest.param(method_names(), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_what_python_loads_for_a_run_is_in_its_code(methods: list[str]) -> None:
    """Nothing is overlooked: a process that makes the run, imports and all, loads no other file of ours."""
    words = [sys.executable, "-c", LOADED, *methods]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert sorted(found) == methods
    # load_method looks through all parts of the cache for their names; a run executes those that it reads.
    others = {str(file.relative_to(ROOT)) for file in (ROOT / "training/data").glob("*.py")}
    for method, files in found.items():
        loaded = {str(Path(file).relative_to(ROOT)) for file in files}
        assert loaded - others <= code(method).keys(), method


def test_other_bytes_are_other_marks(tmp_path: Path) -> None:
    write_cache(tmp_path, Plan())
    files = [*sorted(FILES["concept_graph"]), "embed/none/images", "none.parquet"]
    before = hash_data(tmp_path, files, 3)
    assert before["embed/none/images"] is before["none.parquet"] is None
    assert before == hash_data(tmp_path, files, 3)
    bucket = tmp_path / "labels/tiny/b001.parquet"
    bucket.write_bytes(bucket.read_bytes() + b"x")
    after = hash_data(tmp_path, files, 3)
    assert {name for name in files if before[name] != after[name]} == {"labels/tiny"}


def test_the_plan_has_a_file_a_run_and_no_other(tmp_path: Path) -> None:
    path, data = tmp_path / "params.yaml", tmp_path / "data"
    path.write_text(PARAMS)
    write_cache(data, Plan())
    (data / "inputs").mkdir()
    (data / "inputs/gone.json").write_text("{}")
    plan(load_params(path), str(path), data)
    written = {file.name: json.loads(file.read_text()) for file in (data / "inputs").iterdir()}
    assert written.keys() == {"zero_shot.json", "linear_probe.json", "concept_graph.json"}
    assert set(written["zero_shot.json"]["files"]) == FILES["zero_shot"] | INDEX
    first = {file: file.read_bytes() for file in (data / "inputs").iterdir()}
    shutil.rmtree(data / "inputs")
    plan(load_params(path), str(path), data)
    assert first == {file: file.read_bytes() for file in (data / "inputs").iterdir()}
    assert str(tmp_path) not in "".join(content.decode() for content in first.values())
