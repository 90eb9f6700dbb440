"""The report in a browser: what it filters, what the keyboard does, how it fits a phone, and that nothing else runs.

They need Chromium, which the system has (Debian: apt install chromium).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import report
from tests.evaluation.reported import RUNS, Page, make_params, rewrite, write_run
from tests.training.cache import ENCODER
from training.train import train

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make setup)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path (apt install chromium)"),
]
HOSTILE = "<img src=x onerror=document.title='caught'>"


class Browsed:
    """A page that is open in the browser, with what it complained of and what it asked for."""

    def __init__(self, browser: Any, path: Path, address: str = "", **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = f"file://{path / 'index.html'}"
        self.page.goto(self.url + address)

    @property
    def tiles(self) -> list[str]:
        return [tile.get_attribute("aria-label") for tile in self.page.query_selector_all("#tiles button")]

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def made(data: Path) -> Path:
    """A report on which linear_probe takes one val image of class 0, which has a hostile name, for class 2."""
    rewrite(data / "index/classes.parquet", "index.classes/2", {0: {"name": HOSTILE}})
    texts = {position: {"text": f"{HOSTILE} {position}"} for position in range(18)}
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", texts)
    write_run(data, "linear_probe", [{"val/class-00/0000.png": "class-02"}] * 2)
    report(make_params(shown="linear_probe"), data)
    return data / "report"


def test_nothing_runs_but_the_page_s_own_script_and_nothing_leaves(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made)
    shown.page.click("#tiles button")
    assert HOSTILE in shown.page.inner_text("#picture-title")
    assert HOSTILE in shown.page.inner_text("#bank")
    assert shown.ask("document.title").startswith("fieldmark")
    assert shown.ask("document.querySelectorAll('img[src=x]').length") == 0
    assert shown.complaints == []
    assert [url for url in shown.requests if not url.startswith("data:image/webp;")] == [shown.url]
    # Were markup let in all the same, the policy would stop it.
    shown.ask(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    shown.ask(
        "(() => { const one = document.createElement('script'); one.textContent = 'document.title = 1';"
        " document.body.append(one); })()"
    )
    shown.page.wait_for_timeout(200)
    assert shown.ask("document.title").startswith("fieldmark")
    assert any("Content Security Policy" in complaint for complaint in shown.complaints)


def test_filters_and_the_address_that_keeps_them(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made)
    assert len(shown.tiles) == 24
    assert shown.tiles[0] == f"{HOSTILE}, taken for Class-02"  # mistakes first
    shown.page.select_option("#filters [name=answer]", "wrong")
    assert len(shown.tiles) == 2  # 0000 of val and its twin in the half that chose
    shown.page.select_option("#filters [name=split]", "val")
    assert len(shown.tiles) == 1
    assert shown.page.inner_text("#found") == "1 picture, 1 wrong"
    again = Browsed(browser, made, shown.ask("location.hash"))
    assert again.tiles == shown.tiles
    shown.page.click("#filters [type=reset]")
    assert len(shown.tiles) == 24
    shown.page.select_option("#filters [name=class]", "1")
    assert set(shown.tiles) == {"Class-01, recognised"}
    shown.page.select_option("#filters [name=taken]", "2")
    assert shown.tiles == []
    assert "No picture is like that" in shown.page.inner_text("#found")
    pair = Browsed(browser, made, "#pictures?pair=0,2")
    assert len(pair.tiles) == 16
    assert shown.complaints == pair.complaints == again.complaints == []


def test_a_pair_shows_the_pictures_that_it_counts_and_says_how_many_others_there_are(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made)
    pair = shown.page.locator("details.pair").first
    assert "1 mistake" in pair.inner_text()
    wrong = pair.locator("button.miss")
    assert wrong.count() == 1
    assert "chose" not in wrong.inner_text()
    assert "and 1 among pictures that are not counted here, marked chose or test" in pair.inner_text()


def test_on_a_phone_words_of_tables_stay_whole_and_a_tab_s_text_stands_below_it(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made, viewport={"width": 390, "height": 844})
    heights = shown.ask("[...document.querySelectorAll('#data .health td')].map((one) => one.offsetHeight)")
    assert 0 < max(heights) < 150
    assert shown.ask("document.documentElement.scrollWidth") == 390
    shown.page.click("#tiles button")
    top = "document.querySelector('dialog .{}').getBoundingClientRect().top"
    assert shown.ask(top.format("seen")) < shown.ask(top.format("notes")) < shown.ask(top.format("said"))


def test_an_address_that_makes_no_sense_does_no_harm(browser: Any, made: Path) -> None:
    for address in ("#pictures?class=99&pair=7,x&sure=a&page=-3&picture=none", "#pictures?%", "#pictures?page=1e9"):
        shown = Browsed(browser, made, address)
        assert len(shown.tiles) == 24, address
        assert shown.complaints == [], address


def test_the_keyboard_reaches_and_leaves_a_picture(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made)
    shown.page.keyboard.press("Tab")
    assert shown.ask("document.activeElement.className") == "skip"
    shown.page.keyboard.press("Enter")
    assert shown.ask("document.activeElement.id") == "main"
    shown.page.focus("#tiles button")
    ids = shown.ask("[...document.querySelectorAll('#tiles button')].map((one) => one.dataset.picture)")
    focused = "document.activeElement.dataset.picture"
    moves = [("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", 23), ("ArrowRight", 23), ("Home", 0)]
    for key, place in moves:
        shown.page.keyboard.press(key)
        assert shown.ask(focused) == ids[place]
    shown.page.keyboard.press("ArrowDown")
    across = ids.index(shown.ask(focused))
    assert across > 1
    assert shown.ask("document.querySelectorAll('#tiles button[tabindex=\"0\"]').length") == 1
    shown.page.keyboard.press("Enter")
    assert shown.ask("document.getElementById('picture').open")
    shown.page.keyboard.press("ArrowRight")
    assert f"picture={ids[across + 1]}" in shown.ask("location.hash")
    shown.page.keyboard.press("Escape")
    assert not shown.ask("document.getElementById('picture').open")
    assert shown.ask(focused) == ids[across + 1]
    assert shown.complaints == []


def test_classes_sort_and_lead_to_pictures_and_pairs_are_filled(browser: Any, made: Path) -> None:
    shown = Browsed(browser, made)
    first = "#class-table tbody tr:first-child th"
    assert shown.page.inner_text(first) == HOSTILE  # the least accurate
    shown.page.click("#class-table thead th:nth-child(1) button")
    shown.page.click("#class-table thead th:nth-child(1) button")
    assert shown.page.inner_text(first) == "Class-02"
    assert shown.page.get_attribute("#class-table thead th:nth-child(1)", "aria-sort") == "descending"
    shown.page.click(f"{first} button")
    assert set(shown.tiles) == {"Class-02, recognised"}
    assert shown.page.query_selector_all(".pair .strip .tile.miss")
    shown.page.click(".pair [data-show-pair]")
    assert len(shown.tiles) == 16
    assert shown.complaints == []


def test_lines_for_edits_leave_out_what_was_ticked(browser: Any, data: Path) -> None:
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", {2: {"text": "concept 1"}})
    report(make_params(), data)
    shown = Browsed(browser, data / "report")
    shown.page.fill("#concept-filters [name=words]", "concept 1")
    assert shown.page.inner_text("#concepts-found") == "1 concept"
    assert not shown.page.is_visible("#edits")
    shown.page.check("#bank input")
    lines = json.loads(shown.page.input_value("#edit-lines"))
    assert lines == {"class-00": ["concept 2", "concept 3", "concept 4"]}
    shown.page.uncheck("#bank input")
    assert not shown.page.is_visible("#edits")
    shown.page.click("#bank .acts .link")
    assert len(json.loads(shown.page.input_value("#edit-lines"))["class-00"]) == 4
    shown.page.select_option("#concept-filters [name=kept]", "dropped")
    shown.page.fill("#concept-filters [name=words]", "")
    assert "dropped: names the class: Class-00" in shown.page.inner_text("#bank")
    assert shown.complaints == []


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_scrolls_one_way_and_sees_the_accuracy(browser: Any, made: Path, width: int) -> None:
    shown = Browsed(browser, made, viewport={"width": width, "height": 740}, color_scheme="dark", has_touch=True)
    assert shown.ask("document.documentElement.scrollWidth") <= width
    shown.ask("document.querySelector('.accuracy').parentElement.scrollLeft = 9999")
    box = shown.page.query_selector(".accuracy tbody tr td").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    shown.page.click("#tiles button")
    assert shown.ask("document.getElementById('picture').scrollWidth <= document.getElementById('picture').clientWidth")
    assert shown.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 26)"
    assert shown.complaints == []


def test_6000_pictures_of_200_classes_stay_few_elements(
    browser: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page whose pictures are files beside it, with other data put into it."""
    monkeypatch.setattr("evaluation.page.LARGEST", 0)
    report(make_params(), data)
    folder = data / "report"
    many, count = 200, 6000
    pictures = [
        {
            "id": f"{number:016x}",
            "path": f"val/{number}.jpg",
            "split": "val",
            "group": f"camera {number % 7}",
            "y": number % many,
            "top": [[(number + (number % 9 == 0)) % many, 900], [(number + 5) % many, 50]],
            "guesses": [number % many, number % many],
            "set": [number % many],
            "taxon": "a family",
        }
        for number in range(count)
    ]
    small = next((folder / "pictures").iterdir()).read_bytes()
    for picture in pictures:
        (folder / f"pictures/{picture['id']}.webp").write_bytes(small)
    classes = [{"id": f"class-{label}", "name": f"Class {label}"} for label in range(many)]
    html = (folder / "index.html").read_text()
    numbers = Page(html).data
    before = Page(html).scripts["report-data"]
    numbers |= {"classes": classes, "order": list(range(many)), "pictures": pictures, "concepts": []}
    numbers["pairs"] = [{**pair, "telling": [[], []]} for pair in numbers["pairs"]]
    (folder / "index.html").write_text(html.replace(before, json.dumps(numbers)))

    shown = Browsed(browser, data / "report")
    assert shown.page.inner_text("#found") == "6000 pictures, 667 wrong"
    assert shown.ask("document.querySelectorAll('*').length") < 3000
    shown.page.select_option("#filters [name=group]", "camera 3")
    assert shown.page.inner_text("#found").startswith("857 pictures")
    shown.page.click("#pages button:last-child")
    assert "49 to 96 of 857" in shown.page.inner_text("#pages")
    assert shown.ask("[...document.querySelectorAll('#tiles img')].every((one) => one.complete)")
    shown.page.click("#tiles button")
    assert shown.ask("document.querySelector('#picture img').naturalWidth") == 12
    assert shown.complaints == []
    assert all(url.startswith(f"file://{folder}/") for url in shown.requests)


@pytest.mark.parametrize("method", ["concept_bottleneck", "pair_bottleneck"])
def test_a_run_of_concepts_has_a_tab_of_texts_alone(browser: Any, data: Path, method: str) -> None:
    heading = "Pairs of texts" if method == "pair_bottleneck" else "Texts"
    texts = {position: {"text": f"{HOSTILE} {position}"} for position in range(18)}
    params = make_params(shown=method, runs={**RUNS, method: ENCODER})
    rewrite(data / f"bank/{ENCODER}.parquet", "bank/1", texts)
    train(params, "params.yaml", method, data)
    report(params, data)
    shown = Browsed(browser, data / "report")
    shown.page.click("#tiles button")
    shown.page.click(f"dialog [role=tab]:has-text('{method}')")
    text = shown.page.inner_text("dialog")
    assert f"{heading} by what they add for" in text
    assert HOSTILE in text
    assert "without a patch" not in text
    assert "there is nothing to show of why" not in text
    assert shown.ask("document.querySelectorAll('dialog .heat').length") == 0
    assert shown.complaints == []
