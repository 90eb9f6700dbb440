import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fieldmark.command import UserError
from fieldmark.params import Params, Proxy, Tower, load_params
from tests.project import PARAMS, ROOT


@pytest.fixture
def refuse(project: Path) -> Callable[..., None]:
    """Say that a parameter file is refused in one line that names it and holds some words."""

    def check(content: dict[str, Any] | str, *words: str) -> None:
        path = project / "mine.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError) as error:
            load_params(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        for word in words:
            assert word in message

    return check


def changed(key: str, value: Any) -> dict[str, Any]:
    """Good parameters with one dotted key set."""
    content = json.loads(json.dumps(PARAMS))
    content["encoders"] = {"conv": {"model": "ViT-B-32", "pretrained": "openai"}}
    *blocks, last = key.split(".")
    block = content
    for name in blocks:
        block = block.setdefault(name, {})
    block[last] = value
    return content


def test_dense_is_a_rule_or_a_proxy_under_towers(project: Path, refuse: Callable[..., None]) -> None:
    content = changed("encoders.conv.dense", {"proxy": "dino"})
    refuse(content, "encoders.conv.dense.proxy: 'dino' is not under `towers`; choose one of: none yet")
    content["towers"] = {"dino": {"model": "vit_small_patch14_dinov2.lvd142m"}}
    path = project / "mine.yaml"
    for given, expected in ((content, Proxy(proxy="dino")), (changed("encoders.conv.dense", "self"), "self")):
        path.write_text(json.dumps(given))
        assert load_params(path).encoder("conv").dense == expected
    path.write_text(json.dumps(changed("encoders.conv.image_size", 64)))
    assert load_params(path).encoder("conv").dense == "last"
    words = "encoders.conv.dense: input should be last, value, self, neighbour or {proxy: TOWER}, but it is "
    for value in ("selfish", None, True, ["value"], {"proxy": 3}, {"tower": "dino"}):
        refuse(changed("encoders.conv.dense", value), words)


def test_the_repository_states_every_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = load_params()

    def unset(block: Any, key: str = "") -> list[str]:
        fields = type(block).model_fields
        left_out = [f"{key}{name}" for name in fields if name not in block.model_fields_set]
        for name in fields:
            value = getattr(block, name)
            for part, each in value.items() if isinstance(value, dict) else [("", value)]:
                if hasattr(each, "model_fields_set"):
                    left_out += unset(each, f"{key}{name}.{part}." if part else f"{key}{name}.")
        return left_out

    # The first run states what a run may have; what the others leave out is none of a stage's knobs.
    first = next(iter(params.train.runs))
    others = tuple(f"train.runs.{name}." for name in params.train.runs if name != first)
    assert [key for key in unset(params) if not key.startswith(others)] == []


def test_good_parameters_load(project: Path) -> None:
    (project / "params.yaml").write_text(json.dumps(changed("labels.temperature", 1)))
    params = load_params()
    assert isinstance(params, Params)
    assert params.encoder("conv").precision == "fp32"
    assert params.train.runs["zero_shot"].settings == {}
    with pytest.raises(UserError, match=r"encoders\.reef: .*choose one of: conv$"):
        params.encoder("reef")


def test_what_a_moment_takes_where_nothing_is_said(project: Path) -> None:
    content = changed("moments.conv", {"isqrt": {}, "pooled": {"kind": "pooled"}, "second": {"kind": "bilinear"}})
    (project / "params.yaml").write_text(json.dumps(content))
    found = load_params().moments["conv"]
    assert (found["isqrt"].kind, found["isqrt"].chosen_layer, found["isqrt"].chosen_directions) == ("isqrt", -1, 128)
    assert found["pooled"].chosen_directions is None
    assert found["second"].chosen_directions is None


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ({"reef": {"pooled": {"kind": "pooled"}}}, ["moments.reef: is neither under", "choose one of: conv"]),
        ({"conv": {}}, ["moments.conv: asks for no vector", "take it out"]),
        ({"conv": {"Isqrt": {}}}, ["moments.conv.Isqrt: is used as a folder name"]),
        ({"conv": {"nodes": {}}}, ["moments.conv.nodes: is what probes call a vector of nodes"]),
        ({"conv": {"pooled": {"kind": "mean"}}}, ["moments.conv.pooled.kind: 'mean', under the name of the pooled"]),
        ({"conv": {"p": {"kind": "pooled", "layer": -1}}}, ["moments.conv.p.layer: the pooled vector is of no layer"]),
        ({"conv": {"p": {"kind": "pooled", "directions": 2}}}, ["moments.conv.p.directions: pooled is not measured"]),
        ({"conv": {"m": {"kind": "max", "directions": 2}}}, ["moments.conv.m.directions: max is not measured along"]),
        ({"conv": {"m": {"kind": "median"}}}, ["moments.conv.m.kind: input should be 'pooled', 'isqrt'"]),
        ({"conv": {"m": {"layer": "last"}}}, ["moments.conv.m.layer: input should be a layer's number, head or pro"]),
        ({"conv": {"m": {"directions": 0}}}, ["moments.conv.m.directions: input should be greater than or equal to 1"]),
        ({"conv": {"m": {"direction": 8}}}, ["moments.conv.m.direction: unknown key; did you mean `directions`?"]),
    ],
)  # fmt: skip
def test_moments_that_cannot_be(moments: dict[str, Any], words: list[str], refuse: Callable[..., None]) -> None:
    refuse(changed("moments", moments), *words)


def test_a_tower_embeds_images_and_has_no_text(project: Path) -> None:
    content = changed("towers", {"dino": {"model": "vit_small_patch14_dinov2.lvd142m", "image_size": 224}})
    (project / "params.yaml").write_text(json.dumps(content))
    params = load_params()
    assert list(params.image_encoders) == ["conv", "dino"]
    assert params.image_encoder("conv") == params.encoder("conv")
    tower = params.image_encoder("dino")
    assert isinstance(tower, Tower)
    assert (tower.image_size, tower.pretrained, tower.precision) == (224, None, "fp32")
    with pytest.raises(UserError, match=r"towers\.dino: a tower has no text side; choose one of `encoders`: conv$"):
        params.encoder("dino")
    with pytest.raises(UserError, match=r"neither `encoders` nor `towers` has 'reef'; choose one of: conv, dino$"):
        params.image_encoder("reef")


def test_a_run_on_several_encoders(refuse: Callable[..., None], project: Path) -> None:
    content = changed("towers", {"dino": {"model": "vit_small_patch14_dinov2.lvd142m"}})
    both = {"method": "zero_shot", "encoder": "conv", "also": ["dino"], "settings": {"depth": 3}}
    content["train"]["runs"]["both"] = both
    (project / "params.yaml").write_text(json.dumps(content))
    params = load_params()
    assert list(params.train.runs) == ["zero_shot", "both"]
    assert params.train.runs["both"].settings == {"depth": 3}
    for name, change, words in [
        ("My/Run", {}, ["train.runs.My/Run: is used as a folder name"]),
        ("both", {"encoder": "reef"}, ["train.runs.both.encoder: 'reef' is neither", "choose one of: conv, dino"]),
        ("both", {"also": ["reef"]}, ["train.runs.both.also: 'reef' is neither", "choose one of: conv, dino"]),
        ("both", {"also": ["conv"]}, ["train.runs.both.also: names an encoder twice"]),
        ("both", {"alos": ["dino"]}, ["train.runs.both.alos: unknown key; did you mean `also`?"]),
    ]:
        runs = content["train"]["runs"]
        content["train"]["runs"] = {"zero_shot": runs["zero_shot"], name: both | change}
        refuse(content, *words)


def test_a_tower_may_stand_alone(project: Path) -> None:
    content = changed("towers", {"dino": {"model": "vit_small_patch14_dinov2.lvd142m"}})
    content["train"]["runs"]["alone"] = {"method": "linear_probe", "encoder": "dino"}
    (project / "params.yaml").write_text(json.dumps(content))
    assert load_params().train.runs["alone"].encoder == "dino"


def test_a_tower_that_cannot_stand(refuse: Callable[..., None]) -> None:
    resnet = {"model": "resnet50.a1_in1k"}
    refuse(changed("towers", {"conv": resnet}), "towers.conv: encoders.conv writes to data/embed/conv too", "rename")
    refuse(changed("towers", {"My/CNN": resnet}), "towers.My/CNN: is used as a folder name")
    refuse(changed("towers.cnn", {**resnet, "image_sise": 1}), "towers.cnn.image_sise: unknown key", "`image_size`")
    refuse(changed("towers.cnn", {**resnet, "library": "tim"}), "towers.cnn.library: there is no ", "one of: timm")
    refuse(changed("towers.cnn", {**resnet, "image_size": 8}), "towers.cnn.image_size: ", "16")


def test_a_run_has_settings_of_its_own(project: Path) -> None:
    (project / "params.yaml").write_text(json.dumps(changed("train.runs.zero_shot.settings", {"depth": 3})))
    assert load_params().train.runs["zero_shot"].settings == {"depth": 3}


@pytest.mark.parametrize(
    ("word", "found"), [("off", "off"), ("false", "off"), ("'off'", "off"), ("on", "on"), ("true", "on")]
)
def test_a_switch_may_have_been_written_by_another_yaml(project: Path, word: str, found: str) -> None:
    content = json.dumps(changed("clean.visibility", "WORD")).replace('"WORD"', word)
    (project / "params.yaml").write_text(content)
    assert load_params().clean.visibility == found


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("domian", {}, ["domian: unknown key", "did you mean `domain`?"]),
        ("train.seed5", 3, ["train.seed5: unknown key", "did you mean `seeds`?"]),
        ("emed", {}, ["emed: unknown key", "did you mean `embed`?"]),
        ("encoders.conv.prescision", "fp32", ["encoders.conv.prescision: unknown key", "`precision`"]),
        (
            "llm.prices.m",
            {"input": 1, "output": 1, "foo": 2},
            ["llm.prices.m.foo: unknown key", "known here: input, output"],
        ),
        ("demo.reef.seeds", 1, ["demo.reef.seeds: unknown key", "`seed`"]),
        ("demo.lake", {}, ["demo.lake: ", "'reef'"]),
        ("train.sed", 1, ["train.sed: unknown key", "`seed`"]),
    ],
)
def test_an_unknown_key(refuse: Callable[..., None], key: str, value: Any, words: list[str]) -> None:
    refuse(changed(key, value), *words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dataset.buckets", "3", ["dataset.buckets: ", "valid integer", "'3'"]),
        ("dataset.buckets", 3.0, ["dataset.buckets: ", "3.0"]),
        ("dataset.buckets", True, ["dataset.buckets: ", "True"]),
        ("dataset.buckets", 65_537, ["dataset.buckets: ", "65536"]),
        ("dataset.val_fraction", 1, ["dataset.val_fraction: ", "less than 1"]),
        ("embed.tokens", "yes", ["embed.tokens: ", "'yes'"]),
        ("embed.grids", [2, 0], ["embed.grids.1: "]),
        ("encoders.conv", None, ["encoders.conv: ", "None"]),
        ("encoders.conv.precision", "fp8", ["encoders.conv.precision: ", "'bf16'", "'fp8'"]),
        ("encoders", {}, ["encoders: "]),
        ("graphs.nodes", ["global", "patch"], ["graphs.nodes.1: ", "'patch'"]),
        ("clean.name_templates", [], ["clean.name_templates: "]),
        ("clean.visibility", "of", ["clean.visibility: ", "'on' or 'off'", "'of'"]),
        ("clean.visibility", 0, ["clean.visibility: ", "'on' or 'off'"]),
        ("train.runs", ["zero_shot"], ["train.runs: ", "['zero_shot']"]),
        ("train.runs", {}, ["train.runs: "]),
    ],
)
def test_a_wrong_value(refuse: Callable[..., None], key: str, value: Any, words: list[str]) -> None:
    refuse(changed(key, value), *words)


def test_infinity_is_no_number(refuse: Callable[..., None]) -> None:
    refuse(
        changed("labels.temperature", float("inf")).__repr__().replace("inf", ".inf"), "labels.temperature: "
    )


def test_a_missing_block_or_key(refuse: Callable[..., None]) -> None:
    content = changed("train.seed", 0)
    del content["domain"]
    refuse(content, "domain: is missing; add it")
    content = changed("train.seed", 0)
    del content["train"]["runs"]["zero_shot"]["encoder"]
    refuse(content, "train.runs.zero_shot.encoder: is missing")
    del content["domain"]
    refuse(content, "domain: is missing", "(and 1 more)")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "train.runs.zero_shot.encoder",
            "reef",
            ["train.runs.zero_shot.encoder: 'reef'", "choose one of: conv"],
        ),
        (
            "train.runs.__init__",
            {"method": "zero_shot", "encoder": "conv"},
            ["train.runs.__init__: is used as a folder name"],
        ),
        ("encoders.My/CLIP", {"model": "x"}, ["encoders.My/CLIP: is used as a folder name", "lower-case"]),
        (
            "report.reference",
            "linear_probe",
            ["report.reference: 'linear_probe'", "choose one of: zero_shot"],
        ),
        ("graphs.nodes", ["grid"], ["graphs.nodes: `global`"]),
        *[
            ("clean.name_templates", [template], ["clean.name_templates: "])
            for template in (
                "a photo",
                "a photo of {nam}",
                "{name} {",
                "{} {name}",
                "{name.x}",
                "{name[x]}",
                "{name!z}",
                "{{name}}",
                "{name} {name.__class__}",
                "{name} {noun.__init__.__globals__}",
                "{name:>1000000000}",
                "{name} {noun:1000000000}",
            )
        ],
    ],
)
def test_a_contradiction(refuse: Callable[..., None], key: str, value: Any, words: list[str]) -> None:
    refuse(changed(key, value), *words)


def test_text_that_is_no_parameters(refuse: Callable[..., None], project: Path) -> None:
    refuse("a: 1\nb: [1,\n", "is not YAML", "line ")
    refuse("seed: 1\ntrain:\n  seed: 1\n  seed: 2\n", "line 4: ", 'duplicate key "seed"')
    refuse("a: !!python/name:os.system x\n", "is not YAML")
    refuse("", "holds no parameters")
    refuse("- a\n", "holds no parameters")
    refuse("1: a\n", "1: keys should be strings")
    refuse("a: \x00\n", "is not YAML")
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read .*--params"):
        load_params(project / "none.yaml")


@pytest.mark.parametrize("address", ["https://me:hunter22@host/v1", "https://hunter22@host/v1", "https://host?hunter22"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(project: Path, address: str) -> None:
    (project / "params.yaml").write_text(json.dumps(changed("llm.base_url", address)))
    with pytest.raises(UserError, match=r"params\.yaml: llm\.base_url: holds a ") as caught:
        load_params()
    assert "hunter22" not in str(caught.value)


def test_what_dvc_cannot_read_is_one_line(refuse: Callable[..., None]) -> None:
    refuse("a: 1\nb: {model: hf-hub:x/y}\n", "line 2: DVC cannot read it", 'quotes, as in {model: "hf-hub')


@pytest.mark.parametrize("text", ["a: " + "[" * 1200, "[" * 1200, "a: " + "{a: " * 1200, "- " * 1200 + "a"])
def test_brackets_without_end_are_one_line(refuse: Callable[..., None], text: str) -> None:
    refuse(text, "nested too deeply")
