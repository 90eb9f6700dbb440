"""Questions of one's own against a counting server: what is asked of whom, what it costs, what its answers become."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.prompts import load_prompt
from fieldmark.llm.subjects import image_pairs
from stages.ask import main
from tests.fieldmark.llm.workspace import REPOSITORY, Row, Workspace, answers
from tests.openai_server import OpenAIServer, content, refusal
from tools import collect_words

# By name: superclass, scientific name, aliases.
CLASSES = {
    "Blue tang": ("Surgeonfish", "Paracanthurus hepatus", ["hippo tang"]),
    "Sailfin tang": ("Surgeonfish", None, None),
    "Secret bandit": (None, None, None),
}
IDS = {name: name.lower().replace(" ", "-") for name in CLASSES}


def write_classes() -> None:
    rows = [
        {
            "class_id": IDS[name],
            "name": name,
            "superclass": superclass,
            "scientific_name": latin,
            "aliases": aliases,
            "from_images": True,
        }
        for name, (superclass, latin, aliases) in CLASSES.items()
    ]
    table = store.make_table("index.classes/2", rows)
    store.write_table(table, "data/index/classes.parquet", "index.classes/2", {}, "classes")


def write_images(splits: Sequence[str] = ("train", "val", "test")) -> list[Row]:
    """A picture of each class in each split, in folders that give it away, and a file that is none."""
    rows = []
    for number, (split, name) in enumerate((split, name) for split in splits for name in CLASSES):
        path = Path("data/photos", split, name, f"{IDS[name]}-{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 60), (number, 80, 120)).save(path)
        row = {"path": path.relative_to("data/photos").as_posix(), "image_id": store.sha256(path.read_bytes())}
        rows.append({**row, "class_id": IDS[name], "split": split, "status": "ok"})
    broken = {"path": "train/broken.jpg", "image_id": None, "class_id": "x", "split": "train", "status": "broken"}
    table = store.make_table("index.images/1", [*rows, broken])
    store.write_table(table, "data/index/images.parquet", "index.images/1", {}, "images")
    return rows


def write_descriptions(said: dict[str, list[str]]) -> None:
    rows = [
        {"image_id": image_id, "rank": rank, "text": text}
        for image_id, sentences in said.items()
        for rank, text in enumerate(sentences)
    ]
    path = "data/descriptions/descriptions.parquet"
    store.write_table(store.make_table("descriptions/1", rows), path, "descriptions/1", {}, "descriptions")


def write_links(links: Sequence[tuple[str, str, float]]) -> None:
    """(src, dst, weight)."""
    rows = [{"src": source, "dst": target, "weight": weight, "kind": "knn"} for source, target, weight in links]
    store.write_table(store.make_table("links/1", rows), "data/links/near.parquet", "links/1", {}, "links")


def write_prompt(name: str, body: str, subject: str = "class", variables: str = "", more: str = "") -> None:
    schema = "{type: object, required: [text], properties: {text: {type: string}}}"
    front = f"purpose: a test\nsubject: {subject}\nvariables: [{variables}]\nschema: {schema}\n{more}"
    Path("prompts", f"{name}.md").write_text(f"---\n{front}---\n# user\n{body}\n")


@pytest.fixture
def asked(workspace: Workspace, server: OpenAIServer) -> Callable[..., Workspace]:
    """Put questions into params.yaml, given as blocks of `ask`; the prompt is that of their name."""
    write_classes()
    server.answer = about

    def write(**questions: dict[str, Any]) -> Workspace:
        workspace.blocks["ask"] = {
            name: {"prompt": f"prompts/{name}.md", "links": "data/none", **values} for name, values in questions.items()
        }
        workspace.write()
        return workspace

    return write


def texts(name: str) -> list[tuple[str, int, str, int, str]]:
    rows = store.read_table(f"data/asked/{name}/texts.parquet", "asked/1").to_pylist()
    return [tuple(row.values()) for row in rows]


def questions(server: OpenAIServer) -> list[str]:
    """The text of each call's last message."""
    said = [call["messages"][-1]["content"] for call in server.calls]
    return [each if isinstance(each, str) else each[0]["text"] for each in said]


def about(request: dict[str, Any]) -> dict[str, Any]:
    """Guesses and reasons where a picture or a list of classes is asked about, else a text."""
    if '"guesses"' in json.dumps(request["messages"]).replace("\\", ""):
        return {"guesses": ["SAILFIN  Tang", "Hippo tang", "a shoe"], "reasons": ["A fish like a Blue tang."]}
    return {"text": f"said of {request['messages'][-1]['content']}"}


def test_pictures_classes_and_texts_are_asked_about_once_each_and_an_edit_asks_that_question_alone(
    server: OpenAIServer, asked: Callable[..., Workspace]
) -> None:
    workspace, images = asked(guess={}, mood={}, shorten={}), write_images()
    write_descriptions({row["image_id"]: [f"A fish {number}.", "It is red."] for number, row in enumerate(images)})
    write_prompt("mood", "What is {{ name }} like, beside {{ siblings | join(', ') }}?", variables="name, siblings")
    counts = {"guess": 9, "mood": 3, "shorten": 9}

    def ask_all() -> dict[str, int]:
        calls = {}
        for name in counts:
            before = len(server.calls)
            workspace.run(main, "--ask", name)
            calls[name] = len(server.calls) - before
        return calls

    assert ask_all() == counts
    first = {path: path.read_bytes() for path in Path("data/asked").rglob("*.*")}
    assert len(first) == 9
    assert ask_all() == {"guess": 0, "mood": 0, "shorten": 0}
    prompt = Path("prompts/mood.md")
    before = prompt.read_text()
    prompt.write_text(before.replace("like", "about"))
    assert ask_all() == {"guess": 0, "mood": 3, "shorten": 0}
    same = {path: path.read_bytes() for path in first if path.parent.name != "mood"}
    assert same == {path: first[path] for path in same}
    prompt.write_text(before)
    assert ask_all() == {"guess": 0, "mood": 0, "shorten": 0}
    assert {path: path.read_bytes() for path in first} == first
    # A name of one's own is no part of a question: under another one nothing is paid again.
    asked(other={"prompt": "prompts/guess.md"}).run(main, "--ask", "other")
    assert texts("other") == texts("guess")
    assert sum(counts.values()) + 3 == len(server.calls)


def test_of_a_picture_nothing_is_told_but_the_list_of_all_classes(
    server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images()
    asked(guess={"count": 2, "image_px": 64}).run(main, "--ask", "guess")
    assert len(set(questions(server))) == len({json.dumps(call["messages"][:-1]) for call in server.calls}) == 1
    assert "\n- Blue tang\n- Sailfin tang\n- Secret bandit\n" in questions(server)[0]
    assert 'Give the 2 most likely as "guesses"' in questions(server)[0]
    for call in server.calls:
        sent = json.dumps(call)
        assert not [word for word in (*IDS.values(), ".png", "hepatus", "Surgeonfish") if word in sent]
    ids = sorted(row["image_id"] for row in images)
    assert [row["subject_id"] for row in answers("data/asked/guess/answers.parquet")] == ids
    assert texts("guess") == [
        (image_id, 0, *each)
        for image_id in ids
        for each in (
            ("guesses", 0, "SAILFIN Tang"), ("guesses", 1, "Hippo tang"), ("guesses", 2, "a shoe"),
            ("reasons", 0, "A fish like a fish."),
        )
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "ask: asked 9, cached 0, spent $0.0018, failed: none" in said
    assert "9 names of classes or their groups are masked" in said
    assert "of 27 guesses 9 name no class, and count as none: 'a shoe'" in said


@pytest.mark.parametrize("variables", ["name", "siblings", "superclass", "neighbours"])
@pytest.mark.parametrize("subject", ["image", "text"])
def test_what_knows_the_class_asks_about_training_images_alone(
    subject: str, variables: str, server: OpenAIServer, asked: Callable[..., Workspace]
) -> None:
    images = write_images()
    write_descriptions({row["image_id"]: [f"A fish {number}."] for number, row in enumerate(images)})
    write_prompt("told", f"{{{{ {variables} }}}}", subject, variables)
    for splits in (["train", "val", "test"], ["val"], ["train", "test"]):
        workspace = asked(told={"splits": splits})
        with pytest.raises(UserError, match=rf"^params\.yaml: ask\.told\.splits: .*the class \({variables}\), which"):
            workspace.run(main, "--ask", "told")
    if variables != "neighbours":
        asked(told={"splits": ["train"]}).run(main, "--ask", "told")
        train = {row["image_id"] for row in images if row["split"] == "train"}
        assert {row["subject_id"] for row in answers("data/asked/told/answers.parquet")} == train
        assert store.read_header("data/asked/told/texts.parquet", "asked/1").params["told"] is True
    # Texts of two classes of one superclass make one question there.
    of_two = (subject, variables) == ("text", "superclass")
    assert len(server.calls) == (0 if variables == "neighbours" else 2 if of_two else 3)


def test_the_split_says_who_is_asked_about(server: OpenAIServer, asked: Callable[..., Workspace]) -> None:
    images = write_images()
    asked(guess={"splits": ["val"]}).run(main, "--ask", "guess")
    ids = {row["image_id"] for row in images if row["split"] == "val"}
    assert {row["subject_id"] for row in answers("data/asked/guess/answers.parquet")} == ids
    asked(guess={"splits": ["val", "test"]}).run(main, "--ask", "guess")
    assert len(server.calls) == 6


def test_each_pair_of_siblings_is_asked_about_once(server: OpenAIServer, asked: Callable[..., Workspace]) -> None:
    write_images()
    body = "How does {{ first.name }} differ from {{ second.name }}, {{ second.scientific_name }}?"
    write_prompt("differ", body, "pair", "first, second")
    asked(differ={"samples": 2}).run(main, "--ask", "differ")
    rows = answers("data/asked/differ/answers.parquet")
    assert [(row["subject_id"], row["sample"]) for row in rows] == [("blue-tang sailfin-tang", n) for n in (0, 1)]
    assert questions(server) == ["How does Blue tang differ from Sailfin tang, None?"] * 2
    asked(differ={"pairs": "all", "mask": False}).run(main, "--ask", "differ")
    assert len(server.calls) == 4
    said = [(subject, text) for subject, _, _, _, text in texts("differ")]
    assert said[1:] == [
        ("blue-tang secret-bandit", "said of How does Blue tang differ from Secret bandit, None?"),
        ("sailfin-tang secret-bandit", "said of How does Sailfin tang differ from Secret bandit, None?"),
    ]
    for row in store.read_table("data/index/classes.parquet", "index.classes/2").to_pylist():
        assert row["class_id"] in IDS.values()


def test_no_pair_is_a_clear_error(server: OpenAIServer, asked: Callable[..., Workspace]) -> None:
    write_images()
    workspace = asked(differ={})
    workspace.write_classes("One", "Two")
    write_prompt("differ", "{{ first.name }}", "pair", "first")
    with pytest.raises(UserError, match=r"no two classes share a superclass .*; set pairs: all"):
        workspace.run(main, "--ask", "differ")


def test_pairs_of_training_pictures_are_sent_together_and_nobody_says_of_which_classes(
    server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images()
    train = {row["image_id"] for row in images if row["split"] == "train"}
    assert len(train) == 3
    workspace = asked(apart={"prompt": "prompts/contrast_pictures.md", "splits": ["train"], "drawn": 2})
    said = {"first": ["A fish with BARS."], "second": ["a fish  with bars", "a fish with spots"]}
    server.answer = lambda request: said
    workspace.run(main, "--ask", "apart")
    assert len(server.calls) == 2
    pairs = [row["subject_id"].split(" ") for row in answers("data/asked/apart/answers.parquet")]
    assert all(set(pair) <= train and len(set(pair)) == 2 for pair in pairs)
    for call in server.calls:
        text, *pictures = call["messages"][-1]["content"]
        assert [part["type"] for part in pictures] == ["image_url"] * 2
        assert pictures[0] != pictures[1]
        put = json.dumps([message["content"] for message in call["messages"][:-1]]) + text["text"]
        assert not any(name.casefold() in put.casefold() for name in (*IDS, *IDS.values()))
    # One pair more is one call more, and what is held is not asked again.
    asked(apart={"prompt": "prompts/contrast_pictures.md", "splits": ["train"], "drawn": 3}).run(main, "--ask", "apart")
    assert len(server.calls) == 3
    # What was said most often becomes the words of no class.
    capsys.readouterr()
    workspace.run(collect_words.main, "--ask", "apart", "--out", "words.json")
    assert json.loads(Path("words.json").read_text()) == {"*": ["A fish with BARS", "a fish with spots"]}
    texts = store.read_table("data/asked/apart/texts.parquet", "asked/1")
    blind = {"subject": "image", "told": False, "guesses": None}
    store.write_table(texts, "data/asked/single/texts.parquet", "asked/1", blind, "mark")
    with pytest.raises(UserError, match=r"holds no words of training pictures alone; name a question of subj"):
        workspace.run(collect_words.main, "--ask", "single", "--out", "words.json")
    with pytest.raises(UserError, match=r"ask\.apart\.splits: .* asks about pairs of pictures; .*; write \[train\]$"):
        asked(apart={"prompt": "prompts/contrast_pictures.md"}).run(main, "--ask", "apart")
    write_prompt("apart", "{{ name }}", "image_pair", "name")
    with pytest.raises(UserError, match=r"apart\.md: variables: name: pairs of pictures are asked about with"):
        asked(apart={"splits": ["train"]}).run(main, "--ask", "apart")


def test_an_image_more_changes_two_pairs_at_most() -> None:
    ids = [store.sha256(f"picture {number}".encode()) for number in range(50)]
    before, after = set(image_pairs(ids[:-1], 100)), set(image_pairs(ids, 100))
    assert len(before) == 49
    assert len(before - after) == 1
    assert len(after - before) == 2
    assert image_pairs(ids, 7) == image_pairs(list(reversed(ids)), 100)[:7]
    assert image_pairs(ids[:1], 5) == []


def test_too_many_pairs_are_refused_before_one_is_rendered(
    server: OpenAIServer, asked: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images()
    write_prompt("differ", "{{ first.name }}", "pair", "first")
    monkeypatch.setattr("fieldmark.llm.subjects.MOST_PAIRS", 2)
    with pytest.raises(UserError, match=r"differ\.md: asks about 3 pairs of classes, over 2; set pairs: siblings$"):
        asked(differ={"pairs": "all"}).run(main, "--ask", "differ")
    asked(differ={}).run(main, "--ask", "differ")
    assert len(server.calls) == 1


def test_documents_have_no_picture_to_ask_about(asked: Callable[..., Workspace]) -> None:
    workspace = asked(guess={})
    workspace.blocks["dataset"] = {"root": "notes", "format": "text_graph"}
    workspace.write()
    with pytest.raises(UserError, match=r"ask\.guess: prompts/guess\.md sends pictures, and documents have none; ask"):
        workspace.run(main, "--ask", "guess")


def test_neighbours_are_the_nearest_training_texts_of_the_same_class(
    server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(8):
        class_id = "sailfin-tang" if number in (5, 6) else "blue-tang"
        row = {"path": f"{number}.png", "image_id": store.sha256(str(number)), "class_id": class_id}
        rows.append({**row, "split": "val" if number == 7 else "train", "status": "ok"})
    store.write_table(
        store.make_table("index.images/1", rows), "data/index/images.parquet", "index.images/1", {}, "images"
    )
    ids = [row["image_id"] for row in rows]
    # 4 has no text, 5 and 6 are of another class, 7 is of val.
    write_descriptions({image_id: [f"Text {number}."] for number, image_id in enumerate(ids) if number != 4})
    near = [(1, 0.5), (2, 0.9), (3, 0.7), (4, 1.0), (5, 0.95), (7, 0.99)]
    into_first = [(ids[other], ids[0], weight) for other, weight in near]
    write_links([*into_first, (ids[0], ids[1], 0.5), (ids[5], ids[2], 1.0)])
    workspace = asked(combine={"splits": ["train"], "links": "data/links/near.parquet", "neighbours": 2})
    workspace.run(main, "--ask", "combine")
    asked_about = {row["subject_id"] for row in answers("data/asked/combine/answers.parquet")}
    assert asked_about == {ids[0], ids[1]}
    [first] = [text for text in questions(server) if "1. Text 2.\n\n2. Text 3.\n" in text]
    assert "A text:\n\nText 0." in first
    assert not [text for text in questions(server) if "Text 7" in text]
    said = capsys.readouterr().err
    assert "ask: 1 of 7 images have no description and 4 of 6 texts have no neighbour of their class" in said


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"combine": {"splits": ["train"]}}, r"ask\.combine\.links: prompts/combine\.md uses neighbours; name a table"),
        ({"shorten": {"links": "data/links/near.parquet"}}, r"ask\.shorten\.links: .*uses no neighbours; set it to"),
        ({"mood": {"splits": ["train"]}}, r"ask\.mood\.splits: prompts/mood\.md asks about a class; take it out"),
        ({"concepts": {}}, r"prompts/concepts\.md: subject: is missing; say one of class, pair, image, image_pair,"),
        ({"shorten": {}}, r"descriptions\.parquet: says nothing of any image that prompts/shorten\.md asks about"),
        ({"other": {}}, r"ask\.NAME: is not there; choose one of: other"),
    ],
)
def test_what_contradicts_itself_is_one_line_before_any_call(
    question: dict[str, Any], said: str, server: OpenAIServer, asked: Callable[..., Workspace]
) -> None:
    workspace, [name] = asked(**question), question
    write_images()
    write_descriptions({})
    write_prompt("mood", "{{ name }}", "class", "name")
    with pytest.raises(UserError, match=said) as caught:
        workspace.run(main, "--ask", "NAME" if name == "other" else name)
    assert "\n" not in str(caught.value)
    assert server.calls == []


def test_limits_and_the_mode_that_asks_nobody(
    server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    write_images()
    workspace = asked(guess={})
    workspace.run(main, "--ask", "guess", "--dry-run")
    assert "ask: 9 items, 0 cached, 9 calls to tiny" in capsys.readouterr().out
    workspace.run(main, "--ask", "guess", "--show")
    said = capsys.readouterr().out
    assert said.startswith("# system (prompts/guess.md)\n\nYou know reef fish")
    assert said.endswith("(the picture)\n")
    workspace.write(max_calls=8)
    with pytest.raises(UserError, match=r"llm\.max_calls: 9 calls are needed"):
        workspace.run(main, "--ask", "guess")
    workspace.write(max_calls=None, max_usd=0.0001)
    with pytest.raises(UserError, match=r"llm\.max_usd: 9 calls may cost"):
        workspace.run(main, "--ask", "guess")
    workspace.write(max_usd=None, mode="import")
    with pytest.raises(UserError, match=r"^params\.yaml: ask\.guess: llm\.mode import asks nobody"):
        workspace.run(main, "--ask", "guess")
    Path("dvc.lock").write_text('{"stages": {"ask@guess": {"outs": [{"path": "data/asked/guess/answers.parquet"}]}}}')
    workspace.write(mode="live")
    with pytest.raises(UserError, match=r"dvc pull data/asked/guess/answers\.parquet"):
        workspace.run(main, "--ask", "guess")
    assert server.calls == []


def test_too_few_answers_are_named_and_asked_for_again(
    server: OpenAIServer, asked: Callable[..., Workspace]
) -> None:
    images = write_images(["train"])
    workspace = asked(guess={})
    server.script += [refusal("no"), content("no JSON"), content("nor this")]
    workspace.write(concurrency=1)
    with pytest.raises(UserError, match=r"1 of 3 answered, .*missing: data/photos/train/.*\(refused\)"):
        workspace.run(main, "--ask", "guess")
    rows = answers("data/asked/guess/answers.parquet")
    assert sorted(row["status"] for row in rows) == ["invalid", "ok", "refused"]
    assert len({subject for subject, *_ in texts("guess")}) == 1
    before = len(server.calls)
    workspace.run(main, "--ask", "guess")
    assert len(server.calls) == before + 2
    assert len({subject for subject, *_ in texts("guess")}) == len(images)


def test_recordings_answer_in_mode_replay(
    server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    [*images] = write_images(["train"])
    workspace = asked(guess={})
    sha = load_prompt("prompts/guess.md").sha
    records = [
        {
            "prompt": "guess",
            "prompt_sha": sha,
            "image_id": row["image_id"],
            "sample": 0,
            "model": "authored",
            "created_at": "2026-11-26T00:00:00Z",
            "response": {"guesses": [row["class_id"]], "reasons": []},
        }
        for row in images
    ]
    Path("recordings").mkdir()
    Path("recordings/guess.jsonl").write_text("\n".join(map(json.dumps, records)))
    workspace.write(mode="replay", recordings="recordings")
    workspace.run(main, "--ask", "guess", "--dry-run")
    assert "ask: 3 items, all from recordings, 0 calls" in capsys.readouterr().out
    workspace.run(main, "--ask", "guess")
    assert [(subject, text) for subject, *_, text in texts("guess")] == sorted(
        (row["image_id"], row["class_id"]) for row in images
    )
    assert {row["source"] for row in answers("data/asked/guess/answers.parquet")} == {"replay"}
    Path("prompts/guess.md").write_text(Path("prompts/guess.md").read_text() + "\n")
    with pytest.raises(UserError, match=r"was edited since its answers were recorded"):
        workspace.run(main, "--ask", "guess")
    assert server.calls == []


def test_batches_and_calls_answer_the_same_questions(server: OpenAIServer, asked: Callable[..., Workspace]) -> None:
    write_images()
    workspace = asked(guess={})
    workspace.write(mode="batch", batch_poll_s=0.01)
    workspace.run(main, "--ask", "guess")
    assert (len(server.batches), len(server.batched), len(server.calls)) == (1, 9, 0)
    workspace.write(mode="live")
    workspace.run(main, "--ask", "guess")
    assert server.calls == []


@pytest.mark.parametrize("path", sorted((REPOSITORY / "prompts").glob("*.md")), ids=lambda path: path.stem)
def test_every_prompt_for_questions_of_one_s_own_renders_with_what_its_subject_has(
    path: Path, server: OpenAIServer, asked: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = load_prompt(path)
    if prompt.subject is None:
        pytest.skip("is asked by a stage of its own")
    images = [row for row in write_images() for _ in range(2)]
    write_descriptions({row["image_id"]: ["Title", "A sentence."] for row in images})
    ids = {row["image_id"]: row["class_id"] for row in images if row["split"] == "train"}
    # Two of a class, so that there are neighbours.
    table = store.read_table("data/index/images.parquet", "index.images/1").to_pylist()
    for row in table:
        row["class_id"] = "blue-tang" if row["image_id"] in ids else row["class_id"]
    store.write_table(
        store.make_table("index.images/1", table), "data/index/images.parquet", "index.images/1", {}, "images"
    )
    write_links([(source, target, 0.5) for source in ids for target in ids if source != target])
    near = "neighbours" in prompt.variables
    told = near or "name" in prompt.variables
    settings = {"splits": ["train"]} if told or prompt.subject == "image_pair" else {}
    settings |= {"links": "data/links/near.parquet"} if near else {}
    asked(**{path.stem: settings}).run(main, "--ask", path.stem, "--show")
    said = capsys.readouterr().out
    assert "# user" in said
    assert "{{" not in said
    assert "None" not in said
