"""The item cache: what is asked, what is not asked twice, and what it may cost."""

import contextlib
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.answers import (
    ASKING,
    FREE,
    IN_A_ROW,
    Item,
    Unaskable,
    charge,
    check_coverage,
    check_limits,
    cost,
    estimate,
    item_key,
    live_answers,
    plan_calls,
    preview,
    price_of,
    rows_of,
    settle,
    summarise,
)
from fieldmark.llm.journal import Entry, Journal, journal_path, read_journal
from fieldmark.llm.prompts import Message, Prompt
from fieldmark.llm.turn import Spent
from fieldmark.params import Llm, Price
from tests.fieldmark.llm import workspace
from tests.fieldmark.llm.workspace import ELSEWHERE, PRICES, PROMPT, items_of, plain, row_with
from tests.openai_server import OpenAIServer, content, drop, failure, refusal, without_usage

OUTPUT = Path("data/answers.parquet")
STAGE = "test_stage"
llm_of = partial(workspace.llm_of, concurrency=4, max_attempts=2, prices=PRICES)


def ask(server: OpenAIServer, *texts: str, **values: Any) -> list[dict[str, Any]]:
    return live_answers(STAGE, items_of(texts), PROMPT, llm_of(server, **values), OUTPUT, attach=plain)


def write(rows: list[dict[str, Any]]) -> None:
    store.write_table(store.make_table("llm.answers/1", rows), OUTPUT, "llm.answers/1", {}, "mark")


def test_a_row_says_what_was_asked_and_what_it_cost(server: OpenAIServer) -> None:
    [row] = ask(server, "hello")
    assert row.pop("created_at").endswith("Z")
    assert row == {
        "item_key": item_key(items_of(["hello"])[0], PROMPT, llm_of(server)),
        "subject_id": "id of hello",
        "sample": 0,
        "prompt_sha": PROMPT.sha,
        "status": "ok",
        "response_json": '{"x":"hello"}',
        "model_requested": "tiny",
        "model_reported": "tiny-2026-01-01",
        "response_id": "chatcmpl-1",
        "finish_reason": "stop",
        "input_tokens": 100,
        "output_tokens": 50,
        "cost_usd": pytest.approx(0.0002),
        "attempts": 1,
        "source": "live",
    }


def test_answers_are_held_by_the_output_then_by_the_journal(server: OpenAIServer) -> None:
    first = ask(server, "a", "b")
    assert ask(server, "b", "a", "c")[:2] == first[::-1]
    assert len(server.calls) == 3
    write(first)
    journal_path(STAGE).unlink()
    assert ask(server, "a", "b") == first
    assert len(server.calls) == 3


def test_equal_questions_are_asked_once(server: OpenAIServer) -> None:
    items = [Item("one", 0, [{"role": "user", "content": "x"}]), Item("two", 0, [{"role": "user", "content": "x"}])]
    rows = live_answers(STAGE, items, PROMPT, llm_of(server), OUTPUT, attach=plain)
    assert [row["subject_id"] for row in rows] == ["one", "two"]
    assert len(server.calls) == 1


@pytest.mark.parametrize("trouble", [refusal("no"), content("{"), content("", "length"), failure(400), drop])
def test_what_failed_is_a_row_and_is_asked_again(server: OpenAIServer, trouble: Any) -> None:
    server.script.append(trouble)
    [row] = ask(server, "a", max_attempts=1)
    assert row["status"] != "ok"
    write([row])
    [row] = ask(server, "a", max_attempts=1)
    assert row["status"] == "ok"
    assert len(server.calls) == 2


@pytest.mark.parametrize(("source", "calls"), [("replay", 1), ("live", 0), ("batch", 0), ("import", 1), ("edited", 0)])
def test_only_what_was_earned_stands_for_an_answer(server: OpenAIServer, source: str, calls: int) -> None:
    [row] = ask(server, "a")
    journal_path(STAGE).unlink()
    write([{**row, "source": source}])
    assert ask(server, "a")[0]["source"] == ("live" if calls else source)
    assert len(server.calls) == 1 + calls


def test_what_only_the_old_output_holds_is_journalled_before_it_goes(server: OpenAIServer) -> None:
    rows = ask(server, "a", "b")
    journal_path(STAGE).unlink()
    write(rows)
    write(ask(server, "c"))
    assert len(server.calls) == 3
    assert ask(server, "a", "b") == rows
    assert len(server.calls) == 3


@given(
    st.lists(st.tuples(st.text(max_size=5), st.integers(0, 2)), unique=True, max_size=6),
    st.sampled_from(["tiny", "big"]),
    st.sampled_from([None, 0.0, 0.5]),
)
def test_keys_differ_where_the_question_does(
    asked: list[tuple[str, int]], model: str, temperature: float | None
) -> None:
    llm = Llm(model=model, temperature=temperature)
    items = [Item("id", sample, [{"role": "user", "content": text}]) for text, sample in asked]
    keys = {item_key(item, PROMPT, llm) for item in items}
    assert len(keys) == len(items)
    others = [Llm(model="other", temperature=temperature), Llm(model=model, temperature=1.5)]
    assert all(item_key(item, PROMPT, other) not in keys for item in items for other in others)


def test_keys_do_not_depend_on_where_and_how_patiently_one_asks() -> None:
    [item] = items_of(["a"])
    key = item_key(item, PROMPT, Llm(model="tiny"))
    patient = Llm(
        mode="live",
        model="tiny",
        base_url="http://x",
        concurrency=1,
        timeout_s=1.0,
        max_attempts=9,
        max_usd=1.0,
        max_output_tokens=9999,
        response_format="text",
    )
    assert item_key(item, PROMPT, patient) == key
    moved = Prompt("prompts/moved.md", "1" * 64, "another purpose", (), PROMPT.schema, ())
    assert item_key(item, moved, patient) == key
    assert item_key(item, Prompt("p.md", PROMPT.sha, "", (), {"type": "object"}, ()), patient) != key


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_calls": 2}, "llm.max_calls: 3 calls are needed, more than 2"),
        ({"max_usd": 0.001}, "llm.max_usd: 3 calls may cost"),
        ({"max_usd": 9.0, "prices": {}, "base_url": ELSEWHERE}, "llm.prices has no 'tiny'"),
    ],
)
def test_limits_hold_before_the_first_call(server: OpenAIServer, limits: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ask(server, "a", "b", "c", **limits)
    assert server.calls == []
    ask(server, "a", "b", "c")
    ask(server, "a", "b", "c", **limits)
    assert len(server.calls) == 3


@pytest.mark.parametrize(
    ("limits", "spent", "said"),
    [
        ({"max_calls": 5}, Spent(3, 9.0), None),
        ({"max_calls": 5}, Spent(4, 0.0), r"llm\.max_calls: 2 calls are needed beside 4 that this and other .* than 5"),
        ({"max_usd": 0.01}, Spent(9, 0.001), None),
        (
            {"max_usd": 0.01},
            Spent(9, 0.009),
            r"llm\.max_usd: 2 calls may cost \$0\.0080 beside \$0\.0090 that this and",
        ),
    ],
)
def test_limits_count_what_others_asked(
    server: OpenAIServer, limits: dict[str, Any], spent: Spent, said: str | None
) -> None:
    llm = llm_of(server, **limits)
    plan = plan_calls(STAGE, items_of(["a", "b"]), PROMPT, llm, OUTPUT)
    with contextlib.ExitStack() as stack:
        if said:
            stack.enter_context(pytest.raises(UserError, match=said))
        check_limits(plan, llm, spent)


@pytest.mark.parametrize(
    ("tokens", "attempts", "usd"),
    [
        ((1000, 500), 1, 0.001 + 0.001),
        ((0, 0), 1, 0.0004 + 0.0004),
        ((None, 500), 2, 0.0016 + 0.001),
        ((1000, None), 2, 0.001 + 0.008),
        ((None, None), 1, 0.0008 + 0.004),
    ],
)
def test_an_answer_counts_for_what_it_must_have_cost(tokens: Any, attempts: int, usd: float) -> None:
    row = row_with(input_tokens=tokens[0], output_tokens=tokens[1], attempts=attempts, response_json="x" * 1600)
    llm = Llm(model="tiny", prices=PRICES, max_output_tokens=2000)
    assert charge(row, 800, llm) == pytest.approx(usd)
    assert charge(row, 800, Llm(model="tiny")) is None


def test_spending_stops_where_the_estimate_was_too_low(server: OpenAIServer) -> None:
    # Each answer is counted as 100 + 50 tokens, though 1 was asked for at most.
    with pytest.raises(UserError, match="is spent"):
        ask(server, *"abcdefghijklmnop", max_output_tokens=1, max_usd=0.00021, concurrency=1)
    assert len(server.calls) < 5


def test_a_server_that_answers_no_more_is_not_asked_to_the_end(server: OpenAIServer) -> None:
    server.script += [failure(500)] * IN_A_ROW * 2
    many = [f"question {number}" for number in range(10 * IN_A_ROW)]
    with pytest.raises(UserError, match=r"20 questions in a row got no answer.*the last said.*0 of 200 answers"):
        ask(server, *many, concurrency=1, max_attempts=1)
    assert len(server.calls) <= IN_A_ROW + 1  # one had begun
    server.script.clear()
    server.script += [failure(500)] * (IN_A_ROW - 1)
    rows = ask(server, *many, concurrency=1, max_attempts=1)  # one less, and then answers: it goes on
    assert [row["status"] for row in rows] == ["error"] * (IN_A_ROW - 1) + ["ok"] * (len(many) - IN_A_ROW + 1)


def test_what_cannot_be_asked_says_nothing_of_the_server(server: OpenAIServer) -> None:
    def attach(item: Item) -> list[Message]:
        if item.subject_id != "id of last":
            raise Unaskable("no picture")
        return plain(item)

    items = items_of([*(f"picture {number}" for number in range(2 * IN_A_ROW)), "last"])
    rows = live_answers(STAGE, items, PROMPT, llm_of(server), OUTPUT, attach=attach)
    assert [row["status"] for row in rows] == ["error"] * 2 * IN_A_ROW + ["ok"]


def test_what_is_lost_on_its_way_counts_against_the_limit(server: OpenAIServer) -> None:
    """The server may have written the answer, and bill it. 1 token in and 40 out: $0.000081 a call."""
    server.script += [drop] * 40
    limits = {"max_output_tokens": 40, "max_usd": 0.0014, "max_attempts": 5}
    with pytest.raises(UserError, match=r"\$0.0016 is spent.*; 0 of 8 answers are kept"):
        ask(server, *"abcdefgh", concurrency=1, **limits)
    # Four questions of five calls each, and one that had begun.
    assert 20 <= len(server.calls) <= 25
    server.script.clear()
    server.script += [drop, failure(500)]
    [row] = ask(server, "a", **limits)
    assert read_journal(journal_path(STAGE), {row["item_key"]})[row["item_key"]].charged == pytest.approx(0.000281)


def test_what_no_server_saw_costs_nothing(server: OpenAIServer) -> None:
    gone = llm_of(server, base_url="http://127.0.0.1:9", max_usd=0.001, max_output_tokens=40)
    [row, *_] = live_answers(STAGE, items_of("abcdefgh"), PROMPT, gone, OUTPUT, attach=plain)
    assert (row["status"], row["attempts"]) == ("error", 2)


def test_the_preview_counts(server: OpenAIServer) -> None:
    ask(server, "a")
    llm = llm_of(server, max_output_tokens=1000)
    image = {"type": "image", "image_id": "0" * 64, "px": 600}
    picture = Item("i", 0, [{"role": "user", "content": [{"type": "text", "text": "abcd"}, image]}])
    items = [*items_of(["a", "12345"]), picture]
    plan = plan_calls(STAGE, items, PROMPT, llm, OUTPUT)
    assert estimate(plan, llm) == (2, 2 + 1 + 85 + 4 * 170, 2000, pytest.approx((768 + 4000) / 1e6))
    assert "3 items, 1 cached, 2 calls to tiny" in preview(STAGE, plan, llm)
    assert "unknown price" in preview(STAGE, plan, llm_of(server, prices={}, base_url=ELSEWHERE))
    assert len(server.calls) == 1


def test_a_server_on_this_machine_costs_nothing_unless_it_has_a_price(server: OpenAIServer) -> None:
    """No price is needed for llm.max_usd, and a server that counts no tokens leaves nothing unknown."""
    server.script.append(without_usage('{"x": "y"}'))
    [row] = ask(server, "a", prices={}, max_usd=0.0)
    assert (row["status"], row["input_tokens"], row["cost_usd"]) == ("ok", None, 0.0)
    assert (price_of(llm_of(server)), price_of(llm_of(server, prices={}))) == (PRICES["tiny"], FREE)
    assert price_of(llm_of(server, prices={}, base_url=ELSEWHERE)) is None


def test_cost_is_unknown_rather_than_wrong() -> None:
    price = Price(input=1.0, output=3.0)
    assert cost(2_000_000, 1_000_000, price) == 5.0
    assert cost(1, 1, None) is None
    assert cost(None, 1, price) is None
    assert cost(1, None, price) is None


def test_another_server_is_told_of(server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server, "a")
    assert "warning" not in capsys.readouterr().err
    ask(server, "a", base_url="http://elsewhere/v1")
    said = capsys.readouterr().err
    assert f"come from {server.base_url}" in said
    assert len(server.calls) == 1


def test_what_cannot_be_asked_is_a_row(server: OpenAIServer) -> None:
    def attach(item: Item) -> list[Message]:
        if item.subject_id == "id of a":
            raise Unaskable("no picture")
        return item.messages

    rows = live_answers(STAGE, items_of(["a", "b"]), PROMPT, llm_of(server), OUTPUT, attach=attach)
    assert [(row["status"], row["attempts"]) for row in rows] == [("error", 0), ("ok", 1)]
    assert "no picture" in rows[0]["response_json"]
    write(rows)


def test_a_stop_keeps_what_is_answered(server: OpenAIServer) -> None:
    good = [content(json.dumps({"x": "y"}))] * 3
    server.script += [*good, failure(429, "insufficient_quota")]
    with pytest.raises(UserError, match="no money left"):
        ask(server, *"abcdefgh", concurrency=1)
    assert len(server.calls) == 4
    ask(server, *"abcdefgh")
    assert len(server.calls) == 4 + 5


def test_ctrl_c_ends_pauses_and_keeps_what_is_answered(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script += [content('{"x": "y"}')] * 2 + [failure(500, retry_after=500)] * 2

    def attach(item: Item) -> list[Message]:
        if item.subject_id == "id of d":
            while len(read_journal(journal_path(STAGE), KeysAll())) < 2:
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.2)
        return item.messages

    with pytest.raises(KeyboardInterrupt):
        live_answers(STAGE, items_of("abcdef"), PROMPT, llm_of(server, concurrency=2), OUTPUT, attach=attach)
    assert "of 6 calls answered" in capsys.readouterr().err
    answered = len(read_journal(journal_path(STAGE), KeysAll()))
    calls = len(server.calls)
    server.script.clear()
    ask(server, *"abcdef")
    assert len(server.calls) == calls + 6 - answered


class KeysAll:
    def __contains__(self, key: object) -> bool:
        return True


def test_a_second_ctrl_c_does_not_cut_the_wait_short() -> None:
    """One that comes while a thread is waited for: Thread.join would take that thread for ended."""
    pool, answered = ThreadPoolExecutor(1, ASKING), []
    pool.submit(lambda: answered.append(time.sleep(0.5)))
    main = threading.main_thread().ident or 0
    impatient = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
    impatient.start()
    settle(pool)
    impatient.join()
    assert answered == [None]


def test_a_thread_that_its_pool_lost_sight_of_ends_before_the_journal_does() -> None:
    """A Ctrl-C in the moment in which a pool starts a thread leaves the thread out of those that it waits for."""
    pool, answered = ThreadPoolExecutor(1, ASKING), []
    pool.submit(lambda: answered.append(time.sleep(0.3)))
    pool._threads.clear()
    settle(pool)
    assert answered == [None]


def test_an_entry_is_written_before_it_is_returned(server: OpenAIServer) -> None:
    with Journal(journal_path(STAGE)) as journal:
        journal.append(Entry(row_with(item_key="k"), None))
        assert "k" in read_journal(journal_path(STAGE), ["k"])


def test_coverage_names_the_missing(server: OpenAIServer) -> None:
    server.script.append(refusal("I would rather not"))
    rows = ask(server, "a", "b", concurrency=1)
    names = {"id of a": "A ray", "id of b": "B ray"}
    with pytest.raises(UserError, match=r"1 of 2 answered, .*missing: A ray \(refused\); .*I would rather not"):
        check_coverage(rows, names, llm_of(server), OUTPUT)
    check_coverage(rows, names, llm_of(server, min_coverage=0.5), OUTPUT)
    check_coverage([], {}, llm_of(server), OUTPUT)
    with pytest.raises(UserError, match=r"0 of 2 answered, .*missing: A ray \(not asked\), B ray \(not asked\); write"):
        check_coverage([], names, llm_of(server), OUTPUT)


def test_no_more_questions_wait_than_there_is_room_for(server: OpenAIServer) -> None:
    new = dict(zip("abcdefghij", items_of("abcdefghij"), strict=True))
    taken: list[str] = []

    class Counted(dict[str, Item]):
        def items(self) -> Any:
            for key, item in new.items():
                taken.append(key)
                yield key, item

    with ThreadPoolExecutor(2) as pool:
        for done, row in enumerate(rows_of(pool, lambda key, item: {"item_key": key}, Counted(), 4)):
            assert row is not None
            # Those that are done at once are replaced at once.
            assert len(taken) <= done + 2 * 4
    assert sorted(taken) == list(new)


def test_the_summary_counts_each_question_once() -> None:
    asked = {"attempts": 2, "input_tokens": 100, "output_tokens": 50, "cost_usd": 0.1, "source": "live", "status": "ok"}
    other = {**asked, "attempts": 1, "input_tokens": None, "output_tokens": None, "cost_usd": None, "status": "refused"}
    own = {**other, "attempts": 0, "source": "import", "status": "ok"}
    rows = [
        {**asked, "item_key": "a"},
        {**asked, "item_key": "a"},
        {**asked, "item_key": "b", "cost_usd": 0.2, "source": "batch"},
        {**other, "item_key": "c"},
        {**own, "item_key": "d"},
    ]
    found = summarise(rows)
    assert found == {
        "rows": 5,
        "status": {"ok": 4, "refused": 1},
        "source": {"batch": 1, "import": 1, "live": 3},
        "attempts": 5,
        "input_tokens": 200,
        "output_tokens": 100,
        "cost_usd": 0.1 + 0.2,
        "unpriced": 1,
    }
    assert json.dumps(summarise(rows[::-1])) == json.dumps(found)
    assert summarise([])["cost_usd"] == 0.0
