"""params.yaml as a typed object: every knob of the pipeline, checked before anything runs.

An unknown key, a wrong type, a value out of range or two values that contradict each other is a UserError of one line
that names the file, the key and the remedy. Nothing is coerced: `"3"` is not 3. What params.yaml leaves out takes the
default written here; the params.yaml of the repository states every knob.
"""

import difflib
import operator
import re
import reprlib
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from fieldmark.command import UserError

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
# An empty file that stands where no file is wanted: a dependency of a DVC stage cannot be left out.
NONE = "data/none"
# What lies in data/again beside the second looks, by their names: what each first look reads.
PLANS, PLAN_STAGE = "inputs", "plan_first_looks"
# Where adapt_encoder and finetune write, a folder each.
ADAPTED = "data/adapted"
# What describe_images says of images, and text graphs of documents.
DESCRIPTIONS = "data/descriptions/descriptions.parquet"
FORMATS = Path(__file__).parent / "formats"
TOWERS = Path(__file__).parent / "encoders/towers"


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Found = TypeVar("Found", bound=Block)


class Domain(Block):
    """What the pictures show, in the words that prompts and texts use."""

    noun: str
    group: str
    attributes: list[str] = []
    not_shown: list[str] = []


# Formats whose tables may stand apart from the pictures, or be one file.
TABLES_APART = ("manifest", "coco", "inat2021", "fathomnet2025", "camtrap_dp")


class Dataset(Block):
    format: str = "imagefolder"
    root: str
    images: str | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    val_list: str = NONE
    group_by: Literal["none", "sequence"] = "none"
    seed: int = 0
    buckets: Annotated[int, Field(ge=1, le=65_536)] = 16
    without_images: bool = False
    frames_per_second: Annotated[float, Field(gt=0, le=1000)] = 1.0

    @property
    def folder(self) -> Path:
        """Where the paths of data/index/images.parquet start from."""
        root = Path(self.root)
        if self.images is not None:
            return Path(self.images)
        return root.parent if self.format in TABLES_APART and not root.is_dir() else root


class Reef(Block):
    seed: int = 0
    size: Annotated[int, Field(ge=32, le=1024)] = 160
    train_per_class: Count = 40
    test_per_class: Count = 25


class Price(Block):
    """US dollars per million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Llm(Block):
    mode: Literal["replay", "import", "live", "batch"] = "replay"
    recordings: str = "data/demo/answers"
    base_url: str | None = None
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    organization: str | None = None
    headers: dict[str, str] = {}
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    max_output_tokens: Count = 2000
    response_format: Literal["json_schema", "json_object", "text"] = "json_schema"
    concurrency: Count = 8
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    batch_requests: Annotated[int, Field(ge=1, le=50_000)] = 50_000
    batch_poll_s: Annotated[float, Field(gt=0)] = 30.0
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_attempts: Count = 5
    max_calls: Annotated[int, Field(ge=0)] | None = None
    max_usd: Annotated[float, Field(ge=0)] | None = None
    min_coverage: Fraction = 1.0
    prices: dict[str, Price] = {}


class Concepts(Block):
    imported: Annotated[str, Field(alias="import")] = NONE
    edits: str = NONE
    prompt: str = "prompts/concepts.md"
    generic_prompt: str = "prompts/generic_concepts.md"
    generic: Annotated[int, Field(ge=0)] = 0
    contrast_prompt: str = "prompts/contrast.md"
    contrast: bool = False
    siblings: str = NONE
    per_class: Count = 10
    samples: Count = 1


class Describe(Block):
    enabled: bool = False
    prompt: str = "prompts/describe.md"
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    by: str = NONE
    image_px: Annotated[int, Field(ge=64)] = 512
    sentences: Count = 4
    nodes: list[Annotated[int, Field(ge=2, le=8)]] = []  # n x n cells of each picture, for each n
    cell_prompt: str = "prompts/describe_cell.md"
    cell_sentences: Count = 2


class Ask(Block):
    """A question of one's own. What it is asked about stands in the prompt's front matter (`subject`)."""

    prompt: str
    links: str
    neighbours: Count = 3
    splits: Annotated[list[Literal["train", "val", "test"]], Field(min_length=1)] = ["train", "val", "test"]
    pairs: Literal["siblings", "all"] = "siblings"
    drawn: Count = 100
    count: Count = 5
    samples: Count = 1
    image_px: Annotated[int, Field(ge=64)] = 512
    mask: bool = True


def read_switch(value: Any) -> Any:
    """`on` or `off` as a text: in YAML 1.1, which other programs may write, the words stand for true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Clean(Block):
    name_templates: Annotated[list[str], Field(min_length=1)] = ["a photo of a {name}, a type of {noun}."]
    max_words: Count = 25
    visibility: Annotated[Literal["on", "off"], BeforeValidator(read_switch)] = "on"


class Proxy(Block):
    """A rule for dense tokens that takes what is alike in a picture from a tower."""

    proxy: str


def read_dense(value: Any) -> Any:
    """The rule of `encoders.NAME.dense`."""
    if isinstance(value, dict) and set(value) == {"proxy"} and isinstance(value["proxy"], str):
        return Proxy(**value)
    if not isinstance(value, Proxy) and value not in ("last", "value", "self", "neighbour"):
        raise PydanticCustomError("dense", "Input should be last, value, self, neighbour or {proxy: TOWER}")
    return value


class Encoder(Block):
    """A text-aligned image encoder that open_clip loads."""

    model: str
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: Count = 32
    image_size: Annotated[int, Field(ge=16)] | None = None
    dense: Annotated[Literal["last", "value", "self", "neighbour"] | Proxy, PlainValidator(read_dense)] = "last"


class Tower(Block):
    """An image-only encoder: it has no text side, so that nothing of a text is ever compared with it."""

    library: str = "timm"
    model: str
    pretrained: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: Count = 32
    image_size: Annotated[int, Field(ge=16)] | None = None


class Adapt(Block):
    """An encoder that is tuned on training pictures of chosen classes and on the sentences of these classes."""

    base: str
    classes: str
    texts: Literal["own", "dealt"] = "own"
    val_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    blocks: Annotated[int, Field(ge=0)] = 1
    rank: Count | None = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Annotated[int, Field(ge=2)] = 64
    epochs: Count = 5
    patience: Count = 2
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    projection_rate: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    seed: int = 0


class Finetune(Block):
    """A tower, or an encoder's image tower, that is tuned on the labels of training pictures alone."""

    base: str
    classes: str
    blocks: Annotated[int, Field(ge=0)] = 1
    rank: Count | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    epochs: Count = 12
    patience: Count = 3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    head_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    seed: int = 0


# Sides of the windows that are crops, in shares of the object's, and how many of each (fieldmark/pictures/regions.py):
# those of MMAL-Net for CUB, 128, 192 and 256 pixels of 448, and those of TRD, a third of the object.
WINDOWS: dict[str, list[tuple[float, int]]] = {
    "map": [(2 / 7, 2), (3 / 7, 3), (4 / 7, 2)], "grid": [(1 / 3, 9)], "random": [(1 / 3, 8)],
}  # fmt: skip
Side = Annotated[float, Field(gt=0, le=1)]


class Regions(Block):
    """Views of the object and of its parts, each embedded by a forward pass of its own (docs/own-data.md)."""

    object: Literal["map", "box", "whole"] = "map"
    crops: Literal["map", "grid", "random"] = "map"
    map: Literal["norm", "similarity", "attention"] = "norm"
    sides: list[Side] | None = None
    count: list[Count] | None = None

    @property
    def windows(self) -> list[tuple[float, int]]:
        """The side of the crops of each size, in shares of the object's, and how many there are."""
        own = WINDOWS[self.crops]
        sides = [side for side, _ in own] if self.sides is None else self.sides
        if self.crops == "grid":
            return [(side, round(1 / side) ** 2) for side in sides]
        return list(zip(sides, [count for _, count in own] if self.count is None else self.count, strict=True))

    @property
    def reads_map(self) -> bool:
        return "map" in (self.object, self.crops)

    @property
    def reads_rollout(self) -> bool:
        return self.reads_map and self.map == "attention"

    @property
    def made_by(self) -> dict[str, Any]:
        """All of it that changes what is made."""
        of_map = {"map": self.map} if self.reads_map else {}
        return {"object": self.object, "crops": self.crops, "windows": [list(each) for each in self.windows], **of_map}


class Embed(Block):
    views: Annotated[int, Field(ge=0, le=16)] = 0
    tokens: bool = False
    grids: list[Count] = [2, 4]
    crops: list[Annotated[int, Field(ge=2)]] = []
    regions: Regions | None = None

    @property
    def uncut(self) -> "Embed":
        """The same views, without anything that is cut from them."""
        return self.model_copy(update={"crops": [], "regions": None})


def layer_check(*names: str) -> PlainValidator:
    """That a value is a layer's number or one of these names."""
    *first, last = "a layer's number", *names
    words = f"Input should be {', '.join(first)} or {last}"

    def check(value: Any) -> Any:
        if type(value) is not int and value not in names:
            raise PydanticCustomError("layer", words)
        return value

    return PlainValidator(check)


# A layer of an image tower, counted from 0 or from the end; `head` is behind the last (fieldmark/encoders/layers.py).
Layer = Annotated[int | Literal["head"], layer_check("head")]
# What moments are made of: also `projected`, the cells of `head` after the projection into the space of texts.
MomentLayer = Annotated[int | Literal["head", "projected"], layer_check("head", "projected")]


class Tokens(Block):
    """Which hidden states of one encoder or tower are stored."""

    layers: Annotated[list[Layer], Field(min_length=1)]
    rollout: bool = False


class Moment(Block):
    """A vector of a whole image, made of what an encoder or tower holds before its projection, or of that projected."""

    kind: Literal["pooled", "isqrt", "bilinear", "mean", "max"] = "isqrt"
    layer: MomentLayer | None = None
    directions: Count | None = None

    @property
    def chosen_layer(self) -> int | Literal["head", "projected"]:
        """The layer whose tokens it is made of: the last, where none is named."""
        return -1 if self.layer is None else self.layer

    @property
    def chosen_directions(self) -> int | None:
        """How many directions tokens are measured along; None: they are taken as they are."""
        return 128 if self.kind == "isqrt" and self.directions is None else self.directions


class Controls(Block):
    """Which texts that say nothing of the classes are embedded with one encoder."""

    seed: int = 0
    per_class: Count = 32


class Select(Block):
    per_class: Count = 8
    max_cosine: Fraction = 0.95
    coverage: Annotated[float, Field(ge=0)] = 0.0
    fallback: Literal["none", "prototypes", "auto"] = "none"


class Labels(Block):
    mode: Literal["softmax", "splice"] = "softmax"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    sparsity: Annotated[float, Field(gt=0)] = 0.25
    top: Count = 16
    density: Literal["neg_entropy", "entropy", "gaga", "product", "pixel"] = "neg_entropy"
    inside_object: bool = False
    redundancy: Annotated[float, Field(ge=0)] = 0.5
    select_locals: Count = 12
    select_concepts: Count = 20
    rings: Annotated[int, Field(ge=2)] = 4
    ring_centre: Literal["density", "peak"] = "density"
    ring_gamma: Annotated[float, Field(gt=0)] = 4.0
    ring_radii: Literal["equal_count", "equal_width"] = "equal_count"


# What probes name in `features` beside the vectors of `moments`.
NODE_FEATURES = ("global", "nodes")
NodeKind = Literal["global", "object", "token", "grid", "crop"]


class Graphs(Block):
    nodes: list[NodeKind] = list(get_args(NodeKind))
    sigma: Annotated[float, Field(gt=0)] = 0.25
    spatial_threshold: Fraction = 0.1
    neighbours: Count = 5


class Links(Block):
    """Which images, or documents, are linked.

    `vectors` and `texts` are files that DVC has to see a change of; data/none where the kind reads none. `both_ways`:
    given edges send in both directions.
    """

    kind: Literal["knn", "text", "group", "given"]
    vectors: str
    texts: str
    names: list[str] = []
    k: Count = 20
    both_ways: bool = False


class Run(Block):
    """One run of `train`: a method over what was cached of an encoder or tower, and of others beside it (`also`).

    That the method is there, that it can read these encoders and what its settings mean is checked in training/.
    """

    method: str
    encoder: str
    also: list[str] = []
    settings: dict[str, Any] = {}


class FirstLook(Block):
    """A method, over what was cached of an encoder or tower, that says where it wants to see more of a picture.

    That the method gives such maps, and what its settings mean, is checked in training/.
    """

    method: str
    encoder: str
    settings: dict[str, Any] = {}


class Train(Block):
    """`regime` and `control` are checked where they are used, in training/."""

    seed: int = 0
    seeds: Count = 1
    regime: dict[str, Any] = {"kind": "full"}
    control: dict[str, Any] = {"name": "none"}
    budget: Count = 16
    device: Literal["auto", "cpu", "cuda"] = "auto"
    first_looks: dict[str, FirstLook] = {}
    runs: Annotated[dict[str, Run], Field(min_length=1)]


class Report(Block):
    reference: str = "linear_probe"
    run: str | None = None


class Params(Block):
    domain: Domain
    dataset: Dataset
    demo: dict[Literal["reef"], Reef] = {}
    llm: Llm
    concepts: Concepts = Concepts()
    describe: Describe = Describe()
    ask: dict[str, Ask] = {}
    clean: Clean = Clean()
    encoders: Annotated[dict[str, Encoder], Field(min_length=1)]
    towers: dict[str, Tower] = {}
    adapt: dict[str, Adapt] = {}
    finetune: dict[str, Finetune] = {}
    embed: Embed = Embed()
    tokens: dict[str, Tokens] = {}
    moments: dict[str, dict[str, Moment]] = {}
    controls: dict[str, Controls] = {}
    select: Select = Select()
    labels: Labels = Labels()
    graphs: Graphs = Graphs()
    links: dict[str, Links] = {}
    train: Train
    report: Report = Report()

    def encoder(self, name: str) -> Encoder:
        """The settings of one text-aligned encoder. Raises UserError where params.yaml has none of that name."""
        known = ", ".join(self.encoders)
        if name in self.towers:
            raise UserError(f"params.yaml: towers.{name}: a tower has no text side; choose one of `encoders`: {known}")
        if name not in self.encoders:
            raise UserError(f"params.yaml: encoders.{name}: is not there; choose one of: {known}")
        return self.encoders[name]

    def image_encoder(self, name: str) -> Encoder | Tower:
        """The settings of one encoder or tower. Raises UserError where params.yaml has none of that name."""
        if name not in self.image_encoders:
            known = ", ".join(self.image_encoders)
            raise UserError(f"params.yaml: neither `encoders` nor `towers` has {name!r}; choose one of: {known}")
        return self.image_encoders[name]

    def makes(self, encoder: Encoder | Tower) -> bool:
        """Whether a stage, adapt_encoder or finetune, makes what this encoder or tower is loaded from."""
        made = [Path(ADAPTED) / name for name in (*self.adapt, *self.finetune)]
        return any(place.is_relative_to(folder) for place in places_of(encoder) for folder in made)

    @property
    def image_encoders(self) -> dict[str, Encoder | Tower]:
        """Everything that embeds images, by name."""
        return {**self.encoders, **self.towers}


def places_of(encoder: Encoder | Tower) -> list[Path]:
    """Where an encoder or a tower may lie: the folder of its model, and its file."""
    return [Path(place) for place in (encoder.model.removeprefix("local-dir:"), encoder.pretrained) if place]


def read_yaml(path: str | Path, remedy: str = "") -> dict[str, Any]:
    """A YAML file whose content is a mapping. Raises UserError, with `remedy`: unreadable, not YAML, something else."""
    try:
        # YAML 1.2, as DVC reads it: 1e-3 is a number.
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}){remedy}") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: {line}is not YAML: {' '.join(str(error.problem).split())}; correct it") from None
    except YAMLError as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: brackets or blocks are nested too deeply to be read; correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no parameters; start from one of the repository")
    return content


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file. Raises UserError: unreadable, not YAML, or a value that cannot stand."""
    content = read_yaml(path, "; run from the project's root, or name it with --params")
    refuse_for_dvc(path)
    return check_params(path, content)


def refuse_for_dvc(path: str | Path) -> None:
    """Raises UserError where DVC cannot read a file of YAML: its parser in C asks for more quotes than YAML 1.2."""
    try:
        YAML(typ="safe").load(Path(path).read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        remedy = 'put the text there between quotes, as in {model: "hf-hub:ORG/NAME"}'
        raise UserError(f"{path}: line {line}: DVC cannot read it ({error.problem}); {remedy}") from None


def check_params(path: str | Path, content: dict[str, Any]) -> Params:
    """The parameters of a file with this content. Raises UserError for a value that cannot stand."""
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        raise UserError(explain_error(str(path), error, content)) from None
    check_contradictions(str(path), params)
    return params


def explain_error(
    path: str, error: ValidationError, content: Any, prefix: str = "", model: type[BaseModel] = Params
) -> str:
    """One line for one of a ValidationError's complaints: file, key, what is wrong, what to do.

    A missing key goes last: an unknown one may be that one misspelt.
    """
    complaints = error.errors()
    first = min(complaints, key=lambda complaint: complaint["type"] == "missing")
    location = [str(part) for part in first["loc"] if part != "[key]"]
    key = prefix + ".".join(location)
    if first["type"] == "extra_forbidden":
        known = known_keys(model, location[:-1])
        close = closest(location[-1], known)
        here = f"remove it; known here: {', '.join(known)}" if known else "remove it"
        remedy = f"did you mean `{close}`?" if close else here
        message = f"{path}: {key}: unknown key; {remedy}"
    elif first["type"] == "missing":
        message = f"{path}: {key}: is missing; add it (the repository's params.yaml explains each key)"
    else:
        said = first["msg"][0].lower() + first["msg"][1:]
        message = f"{path}: {key}: {said}, but it is {reprlib.repr(first['input'])}; correct it"
    more = len(complaints) - 1
    return message + (f" (and {more} more)" if more else "")


def closest(key: str, known: list[str]) -> str | None:
    """The known key that was meant: one with another letter (`seed5` is `seeds`, not `seed`), else the most alike."""
    differ = (each for each in known if len(each) == len(key) and sum(map(operator.ne, each, key)) == 1)
    return next(differ, None) or next(iter(difflib.get_close_matches(key, known, n=1)), None)


def read_block(path: str, key: str, given: Any, model: type[Found]) -> Found:
    """A block of settings as it stands under `key` ("" is the whole file), checked. Raises UserError naming both."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise UserError(explain_error(path, error, given, f"{key}." if key else "", model)) from None


def problem_of_address(url: str) -> str | None:
    """What is wrong with the address of a server that is asked and what to do, or None. It does not repeat the address.

    User, password and query are refused: params.yaml and dvc.lock are shared, and a path is put behind the address.
    """
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        complete = False
    if not complete or not (url.isascii() and url.isprintable()) or " " in url:
        return "is no address; write it as https://HOST/v1 or http://HOST:PORT/v1"
    if "@" in parts.netloc:
        return "holds a user or a password, which no file may hold; put it in the environment (llm.api_key_env)"
    if "?" in url or "#" in url:
        remedy = "leave out what begins with ? or #, and send it as a header (llm.headers with env:VARIABLE)"
        return f"holds a query, behind which no path can stand and which may be a secret; {remedy}"
    return None


def known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys that the block at `location` has; none where the parameters do not say which."""
    block: Any = model
    for part in location:
        if isinstance(block, type) and issubclass(block, BaseModel):
            block = block.model_fields[part].annotation
        else:
            block = (None, *get_args(block))[-1]
        if NoneType in get_args(block):  # a block, or null
            block = get_args(block)[0]
    return [field.alias or name for name, field in getattr(block, "model_fields", {}).items()]


def check_links(key: str, links: Links, params: Params, refuse: Callable[[str, str, str], None]) -> None:
    """That `links` names what its kind reads, and what some stage makes."""
    texts = DESCRIPTIONS if links.kind == "text" else NONE
    if links.texts != texts:
        refuse(f"{key}.texts", f"{links.texts!r} is nothing that kind {links.kind} reads", f"write {texts}")
    folders = {f"data/embed/{name}/images": list[str]() for name in params.image_encoders}
    folders |= {f"data/embed/{name}/moments": list(names) for name, names in params.moments.items()}
    of_texts = {f"data/embed/{name}/text.parquet": list[str]() for name in params.encoders}
    if links.both_ways and links.kind != "given":
        refuse(f"{key}.both_ways", f"is of given edges, and this is kind {links.kind}", "take it out")
    known = folders if links.kind == "knn" else of_texts if links.kind == "text" else {NONE: list[str]()}
    if links.vectors not in known:
        what = f"{links.vectors!r} is nothing that kind {links.kind} reads, or that a stage makes"
        refuse(f"{key}.vectors", what, f"choose one of: {', '.join(known)}")
    names = known[links.vectors]
    if names and not links.names:
        refuse(f"{key}.names", "is empty", f"name vectors of `moments`, some of: {', '.join(names)}")
    for name in links.names:
        if name not in names or links.names.count(name) > 1:
            remedy = f"choose from: {', '.join(names)}, each once" if names else "take it out"
            refuse(f"{key}.names", f"{name!r} is none of the vectors in {links.vectors}", remedy)


def check_contradictions(path: str, params: Params) -> None:
    """What each value alone cannot show: names that point nowhere, parts that exclude each other."""

    def refuse(key: str, what: str, remedy: str) -> None:
        raise UserError(f"{path}: {key}: {what}; {remedy}")

    problem = None if params.llm.base_url is None else problem_of_address(params.llm.base_url)
    if problem:
        raise UserError(f"{path}: llm.base_url: {problem}")
    formats = sorted(file.stem for file in FORMATS.glob("[a-z]*.py"))
    if params.dataset.format not in formats:
        what = f"there is no fieldmark/formats/{params.dataset.format}.py"
        refuse("dataset.format", what, f"choose one of: {', '.join(formats)}")
    blocks: list[tuple[str, Iterable[str]]] = [
        ("encoders", params.encoders), ("towers", params.towers), ("train.runs", params.train.runs),
        ("train.first_looks", params.train.first_looks), ("ask", params.ask),
    ]  # fmt: skip
    for block, names in blocks:
        for name in names:
            if not NAME.fullmatch(name):
                refuse(f"{block}.{name}", "is used as a folder name", "use lower-case letters, digits, - and _")
    libraries = sorted(file.stem for file in TOWERS.glob("[a-z]*.py"))
    for name, tower in params.towers.items():
        if tower.library not in libraries:
            what = f"there is no fieldmark/encoders/towers/{tower.library}.py"
            refuse(f"towers.{name}.library", what, f"choose one of: {', '.join(libraries)}")
        if name in params.encoders:
            refuse(f"towers.{name}", f"encoders.{name} writes to data/embed/{name} too", "rename one of them")
    for name, settings in params.encoders.items():
        if isinstance(settings.dense, Proxy) and settings.dense.proxy not in params.towers:
            known = ", ".join(params.towers) or "none yet, so add it there"
            what = f"{settings.dense.proxy!r} is not under `towers`"
            refuse(f"encoders.{name}.dense.proxy", what, f"choose one of: {known}")
    for block, bases in (("adapt", params.encoders), ("finetune", params.image_encoders)):
        for name, tuned in getattr(params, block).items():
            key = f"{block}.{name}"
            if not NAME.fullmatch(name):
                refuse(key, "is used as a folder name", "use lower-case letters, digits, - and _")
            if tuned.base not in bases:
                where = "under `encoders`" if block == "adapt" else "under `encoders` or `towers`"
                refuse(f"{key}.base", f"{tuned.base!r} is not {where}", f"choose one of: {', '.join(bases)}")
            if any(place.is_relative_to(ADAPTED) for place in places_of(bases[tuned.base])):
                what = f"{tuned.base} lies in {ADAPTED} itself, and no stage waits for itself"
                refuse(f"{key}.base", what, "name another")
    for name in params.adapt:
        if name in params.finetune:
            refuse(f"finetune.{name}", f"adapt.{name} writes to {ADAPTED}/{name} too", "rename one of them")
    folders = [f"data/embed/{name}/images" for name in params.image_encoders]
    if params.describe.by not in (NONE, *folders):
        what = f"{params.describe.by!r} is no vectors of pictures"
        refuse("describe.by", what, f"choose one of: {', '.join(folders)}, or {NONE} where share is 1")
    if params.describe.share < 1 and params.describe.by == NONE:
        what = f"a share of {params.describe.share:g} needs vectors to choose pictures by"
        refuse("describe.by", what, f"set it to one of: {', '.join(folders)}, or describe.share to 1.0")
    for name in params.tokens:
        if name not in params.image_encoders:
            known = ", ".join(params.image_encoders)
            refuse(f"tokens.{name}", "is neither under `encoders` nor under `towers`", f"choose one of: {known}")
    for name, vectors in params.moments.items():
        if name not in params.image_encoders:
            known = ", ".join(params.image_encoders)
            refuse(f"moments.{name}", "is neither under `encoders` nor under `towers`", f"choose one of: {known}")
        if not vectors:
            refuse(f"moments.{name}", "asks for no vector", "name one, as in `pooled: {kind: pooled}`, or take it out")
        for vector, moment in vectors.items():
            key = f"moments.{name}.{vector}"
            if not NAME.fullmatch(vector):
                refuse(key, "is used as a folder name", "use lower-case letters, digits, - and _")
            if vector in NODE_FEATURES:
                refuse(key, "is what probes call a vector of nodes", "give it another name")
            if vector == "pooled" and moment.kind != "pooled":
                refuse(f"{key}.kind", f"{moment.kind!r}, under the name of the pooled vector", "give it another name")
            if moment.kind == "pooled" and moment.layer is not None:
                refuse(f"{key}.layer", "the pooled vector is of no layer", "take it out")
            if moment.kind not in ("isqrt", "bilinear") and moment.directions is not None:
                refuse(f"{key}.directions", f"{moment.kind} is not measured along directions", "take it out")
    for name, links in params.links.items():
        if not NAME.fullmatch(name):
            refuse(f"links.{name}", "is used as a file name", "use lower-case letters, digits, - and _")
        check_links(f"links.{name}", links, params, refuse)
    for name in params.controls:
        if name not in params.encoders:
            known = ", ".join(params.encoders)
            refuse(f"controls.{name}", "is not under `encoders`", f"choose one of: {known}")
    for name, run in params.train.runs.items():
        for key, encoder in (("encoder", run.encoder), *(("also", other) for other in run.also)):
            if encoder not in params.image_encoders:
                known = ", ".join(params.image_encoders)
                what = f"{encoder!r} is neither under `encoders` nor under `towers`"
                refuse(f"train.runs.{name}.{key}", what, f"choose one of: {known}")
        if len({run.encoder, *run.also}) <= len(run.also):
            refuse(f"train.runs.{name}.also", "names an encoder twice, or that of `encoder` again", "name each once")
    for name, look in params.train.first_looks.items():
        key = f"train.first_looks.{name}"
        if look.encoder not in params.image_encoders:
            known = ", ".join(params.image_encoders)
            what = f"{look.encoder!r} is neither under `encoders` nor under `towers`"
            refuse(f"{key}.encoder", what, f"choose one of: {known}")
        if name == PLANS:
            refuse(key, f"is the folder in data/again that {PLAN_STAGE} writes", "give it another name")
    reference = params.report.reference
    if reference not in params.train.runs:
        known = ", ".join(params.train.runs)
        refuse("report.reference", f"{reference!r} is not under `train.runs`", f"choose one of: {known}")
    if params.report.run is not None and params.report.run not in params.train.runs:
        known = ", ".join(params.train.runs)
        refuse("report.run", f"{params.report.run!r} is not under `train.runs`", f"choose one of: {known}, or null")
    if params.dataset.format == "text_graph":
        for block in ("towers", "adapt", "finetune", "tokens", "moments"):
            if getattr(params, block):
                refuse(block, "is made of pictures, and documents have none", "set it to {}")
        if params.train.first_looks:
            refuse("train.first_looks", "look at pictures, and documents have none", "set it to {}")
        if params.select.fallback != "none":
            refuse("select.fallback", "prototypes are of patches, and documents have none", "set it to none")
        if params.describe.enabled:
            refuse("describe.enabled", "documents have a text of their own", "set it to false")
    if params.dataset.images is not None and params.dataset.format not in TABLES_APART:
        what = f"is for the formats {', '.join(TABLES_APART)}; others find images under root"
        refuse("dataset.images", what, "set it to null")
    regions = params.embed.regions
    if regions is not None:
        key, own = "embed.regions.count", WINDOWS[regions.crops]
        sides, counts = (len(own if each is None else each) for each in (regions.sides, regions.count))
        if regions.crops == "grid" and regions.count is not None:
            refuse(key, "a grid has as many crops as fit into the object", "take it out")
        if regions.crops != "grid" and sides != counts:
            refuse(key, f"{sides} sides need as many counts, and there are {counts}", "write one for each of `sides`")
    if "global" not in params.graphs.nodes:
        refuse("graphs.nodes", "`global` is not among them, and every graph needs it", "add it")
    for template in params.clean.name_templates:
        try:
            fields = list(string.Formatter().parse(template))
        except ValueError:
            fields = []
        used = [(name, spec, conversion) for _, name, spec, conversion in fields if name is not None]
        # Nothing but the two words: an attribute reaches into the program, and a width may be a billion.
        names_it = ("name", "", None) in used and set(used) <= {("name", "", None), ("noun", "", None)}
        if not names_it:
            what = f"{template!r} must use {{name}}, may use {{noun}}, and nothing else in braces"
            refuse("clean.name_templates", what, "correct it")
