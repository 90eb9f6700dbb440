"""Batch mode: what is uploaded and made once only, however a run ends; what fails is asked again; what it costs."""

import json
import signal
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.llm.answers import Item, Unaskable, estimate, live_answers, plan_calls, preview
from fieldmark.llm.batch import read_uploads, record_path
from fieldmark.llm.client import LIMITS
from fieldmark.llm.journal import Entry, Journal, journal_path, read_journal
from fieldmark.llm.prompts import Message
from stages import generate_concepts
from tests.fieldmark.llm import workspace
from tests.fieldmark.llm.workspace import ELSEWHERE, KEY, PRICES, PROMPT, Workspace, answers, items_of, plain
from tests.openai_server import (
    Course,
    OpenAIServer,
    answered,
    completion,
    drop,
    drop_mid_body,
    failure,
    hold,
    unheard,
)

OUTPUT = Path("data/answers.parquet")
STAGE = "test_stage"
Row = dict[str, Any]
llm_of = partial(workspace.llm_of, mode="batch", batch_poll_s=0.01, prices=PRICES)


def ask(server: OpenAIServer, texts: str, **values: Any) -> list[Row]:
    return live_answers(STAGE, items_of(texts), PROMPT, llm_of(server, **values), OUTPUT, attach=plain)


def outcomes(rows: list[Row]) -> list[tuple[str, int]]:
    return [(row["status"], row["attempts"]) for row in rows]


def broken(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """The outcome of a request that is answered with this text."""
    return answered(completion({"model": "tiny"}, text, finish_reason))


def refused(status_code: int, code: str = "") -> dict[str, Any]:
    return answered({"error": {"message": f"scripted, {KEY}", "code": code, "type": code}}, status_code)


def test_a_batch_answers_what_a_call_would(server: OpenAIServer) -> None:
    [row] = ask(server, "a")
    assert (row["source"], row["status"], row["response_json"]) == ("batch", "ok", '{"x":"a"}')
    assert row["cost_usd"] == pytest.approx(0.0001)
    assert (row["attempts"], row["model_reported"], row["input_tokens"]) == (1, "tiny-2026-01-01", 100)
    assert (server.kinds, server.calls) == (["upload", "create", "retrieve", "content"], [])
    store.write_table(store.make_table("llm.answers/1", [row]), OUTPUT, "llm.answers/1", {}, "mark")

    assert ask(server, "a", mode="live") == [row]
    [other] = ask(server, "b", mode="live")
    same = {key: value for key, value in server.batched[0].items() if key not in ("messages", *LIMITS)}
    assert same == {key: value for key, value in server.calls[0].items() if key not in ("messages", *LIMITS)}
    assert other["cost_usd"] == pytest.approx(0.0002)
    assert ask(server, "ab") == [row, other]
    assert (len(server.calls), len(server.batched)) == (1, 1)


def test_files_hold_no_more_than_they_may(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ask(server, "abcde", batch_requests=2)
    assert [row["response_json"] for row in rows] == [f'{{"x":"{text}"}}' for text in "abcde"]
    assert [server.files[file].count(b"\n") for file in server.uploads] == [2, 2, 1]
    assert len(server.batches) == 3
    sizes = {file: len(server.files[file]) for file in server.uploads}
    monkeypatch.setattr("fieldmark.llm.batch.LARGEST_FILE", max(sizes.values()))
    assert outcomes(ask(server, "fghijk")) == [("ok", 1)] * 6
    assert [server.files[file].count(b"\n") for file in server.uploads[3:]] == [2, 2, 2]
    monkeypatch.setattr("fieldmark.llm.batch.LARGEST_FILE", 1)
    assert outcomes(ask(server, "lm")) == [("ok", 1)] * 2
    assert len(server.uploads) == 8


def test_killed_at_every_step_a_run_uploads_and_pays_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OpenAIServer() as server:
        workspace = Workspace(monkeypatch, server.base_url)
        workspace.write(mode="batch", batch_poll_s=0.01)
        workspace.write_classes("Ray", "Eel", "Cod")

        def kill_at(kind: str, *, done: bool) -> None:
            reached = threading.Event()
            server.detours[kind].append(hold(reached, done=done))
            process = workspace.start("generate_concepts")
            try:
                assert reached.wait(60), process.communicate(timeout=1)
            finally:
                process.kill()
                process.communicate()

        kill_at("create", done=False)
        assert (len(server.uploads), len(server.batches)) == (1, 0)
        server.courses.append(Course(looks=10**9))
        kill_at("create", done=True)
        assert len(server.batches) == 1
        kill_at("retrieve", done=False)
        server.course_of["batch-0"].looks = 0
        kill_at("content", done=False)
        workspace.run(generate_concepts.main)
        assert [row["status"] for row in answers()] == ["ok"] * 3
        assert (len(server.uploads), len(server.batches), len(server.batched)) == (1, 1, 3)
        # Two runs did not know whether there was a batch; those after them had its id.
        assert server.kinds.count("list") == 2
        kinds = list(server.kinds)
        workspace.run(generate_concepts.main)
        assert server.kinds == kinds


def test_killed_while_it_reads_a_run_keeps_each_answer(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Journal.add

    def dies(self: Journal, entry: Entry, write: Callable[[bytes], int]) -> None:
        add(self, entry, write)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", dies)
        with pytest.raises(RuntimeError):
            ask(server, "abc")
    first = set(read_journal(journal_path(STAGE), Everything()))
    assert len(first) == 1
    assert outcomes(ask(server, "abc")) == [("ok", 1)] * 3
    assert (len(server.uploads), len(server.batches)) == (1, 1)
    assert len(journal_path(STAGE).read_bytes().splitlines()) == 3
    assert read_uploads(STAGE, Everything()) == []


class Everything:
    def __contains__(self, key: object) -> bool:
        return True


def test_a_batch_whose_making_went_unheard_is_found(server: OpenAIServer) -> None:
    server.detours["create"].append(unheard)
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert server.kinds == ["upload", "create", "list", "retrieve", "content"]
    server.detours["create"].append(unheard)
    with pytest.raises(UserError, match="run again, it goes on"):
        ask(server, "b", max_attempts=1)
    for _ in range(3):
        server.make_batch({"input_file_id": "file-0"})
    server.page = 1
    del server.kinds[:]
    assert outcomes(ask(server, "b")) == [("ok", 1)]
    assert server.kinds == ["list"] * 4 + ["retrieve", "content"]
    assert len(server.batched) == 2


def test_a_torn_line_of_the_record_is_none(server: OpenAIServer) -> None:
    server.detours["create"] += [drop] * 3
    with pytest.raises(UserError, match="run again"):
        ask(server, "a")
    with record_path(STAGE).open("ab") as record:
        record.write(b'{"base_url": "htt')
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert (len(server.uploads), len(server.batches)) == (1, 1)
    ask(server, "a")
    assert read_uploads(STAGE, Everything()) == []


@pytest.mark.parametrize("kind", ["upload", "create", "retrieve", "content"])
@pytest.mark.parametrize("trouble", [failure(500), failure(429), drop, drop_mid_body])
def test_passing_trouble_is_tried_again(server: OpenAIServer, kind: str, trouble: Any) -> None:
    server.detours[kind] += [trouble] * 2
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert server.kinds.count(kind) == 3
    assert (len(server.uploads), len(server.batches)) == (1, 1)


@pytest.mark.parametrize("kind", ["upload", "create", "retrieve", "content"])
def test_lasting_trouble_ends_in_one_line_and_is_resumed(server: OpenAIServer, kind: str) -> None:
    server.detours[kind] += [failure(500)] * 3
    with pytest.raises(UserError, match="run again, it goes on") as caught:
        ask(server, "a")
    assert "\n" not in str(caught.value)
    assert server.kinds.count(kind) == 3
    server.detours[kind].append(failure(401, message=f"no {KEY}"))
    with pytest.raises(UserError, match="refuses the key") as caught:
        ask(server, "a")
    assert KEY not in str(caught.value)
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert (len(server.uploads), len(server.batches)) == (1, 1)


def test_what_the_server_does_not_know_is_the_users_to_decide(server: OpenAIServer) -> None:
    server.detours["upload"].append(failure(404))
    with pytest.raises(UserError, match="needs a server with OpenAI's Batch API"):
        ask(server, "a")
    server.detours["retrieve"].append(failure(404))
    with pytest.raises(UserError, match="if batch-0 is gone for good, remove the lines with file-0 from"):
        ask(server, "a")
    record_path(STAGE).unlink()
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert len(server.batches) == 2


def test_an_answer_without_an_id_is_none(server: OpenAIServer) -> None:
    for answer in (b"[]", b"{}", b'{"id": null}', b"<html>"):
        server.detours["upload"].append(lambda handler, request, answer=answer: handler.send_bytes(200, answer))
    with pytest.raises(UserError, match="no id but"):
        ask(server, "a")
    assert not record_path(STAGE).read_bytes()


def test_what_failed_goes_into_a_further_batch(server: OpenAIServer) -> None:
    expired = {"response": None, "error": {"code": "batch_expired", "message": "too late"}}
    server.courses += [
        Course(lines={0: refused(500), 1: expired, 2: None, 3: refused(400), 4: refused(429)}),
        Course(lines={0: refused(500), 1: refused(503)}),
        Course(lines={0: refused(500)}),
    ]
    rows = ask(server, "abcdef")
    assert outcomes(rows) == [("error", 3), ("ok", 3), ("ok", 2), ("error", 1), ("ok", 2), ("ok", 1)]
    assert [server.files[file].count(b"\n") for file in server.uploads] == [6, 4, 2]
    assert rows[0]["response_json"] == '{"error":"500: scripted, ***"}'
    assert rows[0]["cost_usd"] is None
    assert len(read_journal(journal_path(STAGE), Everything())) == 4
    assert outcomes(ask(server, "abcdef"))[0] == ("ok", 1)
    assert server.files[server.uploads[-1]].count(b"\n") == 2


def test_an_expired_batch_keeps_what_is_done(server: OpenAIServer) -> None:
    server.courses.append(Course(looks=3, status="expired", answers=2))
    assert outcomes(ask(server, "abcd")) == [("ok", 1), ("ok", 1), ("ok", 2), ("ok", 2)]
    assert len(server.batched) == 4


def test_a_cancelled_batch_keeps_what_is_done_and_stops(server: OpenAIServer) -> None:
    server.courses.append(Course(status="cancelled", answers=2, lines={1: None}))
    with pytest.raises(UserError, match="batch-0 was cancelled with 2 of 3 requests unanswered; run again"):
        ask(server, "abc")
    assert len(server.batches) == 1
    assert outcomes(ask(server, "abc")) == [("ok", 1)] * 3
    assert (len(server.batches), len(server.batched)) == (2, 3)


def test_a_failed_batch_says_why_and_is_not_resumed(server: OpenAIServer) -> None:
    server.courses += [Course(status="failed", error=("model_not_found", f"no model\n 'tiny' for {KEY}"))] * 2
    with pytest.raises(UserError, match=r"batch-\d failed .*no model 'tiny' for \*\*\*") as caught:
        ask(server, "abcd", batch_requests=2)
    assert "\n" not in str(caught.value)
    assert outcomes(ask(server, "abcd", batch_requests=2)) == [("ok", 1)] * 4
    assert len(server.batches) == 4


def test_a_full_queue_is_waited_for(server: OpenAIServer) -> None:
    full = Course(status="failed", error=("token_limit_exceeded", "Enqueued token limit reached"))
    server.courses += [Course(looks=3), full, Course(looks=2), Course()]
    assert outcomes(ask(server, "abcdef", batch_requests=2)) == [("ok", 1)] * 6
    assert (len(server.uploads), len(server.batches), len(server.batched)) == (3, 4, 6)
    server.courses.append(full)
    with pytest.raises(UserError, match=r"Enqueued token limit reached.*lower llm.batch_requests"):
        ask(server, "ghi")


@pytest.mark.parametrize("said", ["no JSON", "{}"])
def test_an_invalid_answer_is_asked_for_once_more(server: OpenAIServer, said: str) -> None:
    server.courses += [Course(lines={0: broken(said)}), Course(lines={0: broken(said)})]
    rows = ask(server, "ab", max_attempts=5)
    assert outcomes(rows) == [("invalid", 2), ("ok", 1)]
    assert [row["input_tokens"] for row in rows] == [200, 100]
    assert [row["cost_usd"] for row in rows] == pytest.approx([0.0002, 0.0001])
    assert len(server.batches) == 2
    question, answer, objection = json.loads(server.files[server.uploads[1]])["body"]["messages"]
    assert (question, answer["content"]) == (items_of("a")[0].messages[0], said)
    assert "cannot be used" in objection["content"]


def test_a_bad_answer_stands_where_asking_again_fails(server: OpenAIServer) -> None:
    server.courses += [
        Course(lines={0: broken("{}")}),
        Course(lines={0: refused(500)}),
        Course(lines={0: refused(400)}),
    ]
    [row] = ask(server, "a", max_attempts=5)
    assert outcomes([row]) == [("invalid", 3)]
    assert row["cost_usd"] == pytest.approx(0.0001)


def test_a_truncated_answer_gets_more_room_and_a_refusal_no_second_try(server: OpenAIServer) -> None:
    no = answered(completion({"model": "tiny"}, None, refusal="no"))
    server.courses += [Course(lines={0: broken("{", "length"), 1: no}), Course(lines={0: broken("{}")})]
    rows = ask(server, "ab", max_output_tokens=70)
    assert outcomes(rows) == [("ok", 3), ("refused", 1)]
    assert rows[0]["input_tokens"] == 300
    bodies = [json.loads(server.files[file].splitlines()[0])["body"] for file in server.uploads]
    assert [[body[limit] for limit in LIMITS if limit in body] for body in bodies] == [[70], [140], [140]]


@pytest.mark.parametrize("trouble", [refused(401), refused(429, "insufficient_quota"), refused(404)])
def test_a_request_that_shows_that_none_can_succeed_stops_the_run(server: OpenAIServer, trouble: Any) -> None:
    server.courses.append(Course(lines={0: trouble}))
    with pytest.raises(UserError, match=r"refuses what is in batch batch-0 \(\d+: scripted, \*\*\*\)"):
        ask(server, "ab")
    assert len(server.batches) == 1
    assert outcomes(ask(server, "ab")) == [("ok", 1)] * 2
    assert len(server.batched) == 2


def test_a_file_of_something_else_is_read_again_and_not_paid_again(server: OpenAIServer) -> None:
    server.detours["content"].append(lambda handler, request: handler.send_bytes(200, b"<html>log in</html>"))
    with pytest.raises(UserError, match=r"holds what is no answer of a batch: '<html>log in</html>'"):
        ask(server, "a")
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert len(server.batches) == 1


def test_line_separators_within_an_answer_tear_nothing(server: OpenAIServer) -> None:
    text = "a\u2028b\x85c"
    server.detours["content"].append(
        lambda handler, request: handler.send_bytes(
            200, json.dumps(json.loads(request["serve"]()), ensure_ascii=False).encode() + b"\n"
        )
    )
    server.courses.append(Course(lines={0: broken(json.dumps({"x": text}, ensure_ascii=False))}))
    [row] = ask(server, "a")
    assert json.loads(row["response_json"]) == {"x": text}


def test_what_is_no_longer_asked_but_was_paid_for_is_kept(server: OpenAIServer) -> None:
    server.courses.append(Course(looks=10**9))
    interrupt_at(server, "retrieve", 0.2)
    with pytest.raises(KeyboardInterrupt):
        ask(server, "abc", batch_poll_s=60.0)
    server.course_of["batch-0"].looks = 0
    assert outcomes(ask(server, "ad")) == [("ok", 1)] * 2
    assert outcomes(ask(server, "abcd")) == [("ok", 1)] * 4
    assert len(server.batched) == 4


def test_a_file_that_asks_more_than_is_wanted_makes_no_batch(server: OpenAIServer) -> None:
    server.detours["create"] += [drop] * 3
    with pytest.raises(UserError):
        ask(server, "ab")
    assert outcomes(ask(server, "a")) == [("ok", 1)]
    assert (len(server.uploads), len(server.batches), len(server.batched)) == (2, 1, 1)
    assert outcomes(ask(server, "ab")) == [("ok", 1)] * 2
    assert len(server.batched) == 2


def interrupt_at(server: OpenAIServer, kind: str, seconds: float = 0.0) -> None:
    """Ctrl-C so many seconds behind the answer to a request of this kind."""
    main = threading.main_thread().ident or 0

    def turn(handler: Any, request: dict[str, Any]) -> None:
        handler.send_json(200, request["serve"]())
        threading.Timer(seconds, lambda: signal.pthread_kill(main, signal.SIGINT)).start()

    server.detours[kind].append(turn)


def test_ctrl_c_says_what_goes_on(server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.courses += [Course(), Course(looks=10**9)]
    server.detours["retrieve"].append(lambda handler, request: handler.send_json(200, request["serve"]()))
    interrupt_at(server, "retrieve", 0.2)
    with pytest.raises(KeyboardInterrupt):
        ask(server, "abc", batch_requests=2, batch_poll_s=60.0)
    said = capsys.readouterr().err
    assert "2 of 3 answered; batch-1 goes on at the server, the same command reads" in said
    server.course_of["batch-1"].looks = 0
    assert outcomes(ask(server, "abc", batch_requests=2)) == [("ok", 1)] * 3
    assert len(server.batches) == 2


def test_ctrl_c_ends_a_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OpenAIServer() as server:
        workspace = Workspace(monkeypatch, server.base_url)
        workspace.write(mode="batch", batch_poll_s=3600.0)
        workspace.write_classes("Ray")
        server.courses.append(Course(looks=10**9))
        looked = threading.Event()

        def turn(handler: Any, request: dict[str, Any]) -> None:
            handler.send_json(200, request["serve"]())
            looked.set()

        server.detours["retrieve"].append(turn)
        process = workspace.start("generate_concepts")
        try:
            assert looked.wait(60)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 130
        assert "batch-0 goes on at the server" in said
        assert "Traceback" not in said


def test_another_server_has_its_own_batches(server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.courses.append(Course(looks=10**9))
    # While it waits to look again: in the midst of an answer, Python may drop an interrupt in a finaliser.
    interrupt_at(server, "retrieve", 0.2)
    with pytest.raises(KeyboardInterrupt):
        ask(server, "ab", batch_poll_s=60.0)
    with OpenAIServer(server.answer) as other:
        assert outcomes(ask(other, "ac")) == [("ok", 1)] * 2
        assert (len(other.uploads), len(other.batched)) == (1, 2)
    said = capsys.readouterr().err
    assert f"1 of these questions are in batches at {server.base_url}, which are not read now" in said
    server.course_of["batch-0"].looks = 0
    assert outcomes(ask(server, "ab")) == [("ok", 1)] * 2
    assert len(server.batches) == 1


def test_live_mode_says_what_is_paid_twice(server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt_at(server, "create")
    with pytest.raises(KeyboardInterrupt):
        ask(server, "ab")
    ask(server, "ac", mode="live")
    assert "1 of the 2 questions are in batches that are not read yet" in capsys.readouterr().err


def test_the_dry_run_counts_half_the_price(server: OpenAIServer) -> None:
    plan = plan_calls(STAGE, items_of("abc"), PROMPT, llm_of(server), OUTPUT)
    live = estimate(plan, llm_of(server, mode="live")).usd
    assert live is not None
    assert estimate(plan, llm_of(server)).usd == pytest.approx(live / 2)
    said = preview(STAGE, plan, llm_of(server))
    assert "3 calls to tiny by batch" in said
    assert f"price: at most ${live / 2:.4f}, 50% of live" in said
    assert "batch" not in preview(STAGE, plan, llm_of(server, mode="live"))
    assert "unknown price" in preview(STAGE, plan, llm_of(server, prices={}, base_url=ELSEWHERE))
    interrupt_at(server, "create")
    with pytest.raises(KeyboardInterrupt):
        ask(server, "ab")
    plan = plan_calls(STAGE, items_of("abc"), PROMPT, llm_of(server), OUTPUT)
    assert "of these calls, 2 are in batches already" in preview(STAGE, plan, llm_of(server))


def test_limits_hold_before_the_first_upload_and_between_batches(server: OpenAIServer) -> None:
    with pytest.raises(UserError, match=r"llm\.max_calls: 3 calls"):
        ask(server, "abc", max_calls=2)
    with pytest.raises(UserError, match=r"llm\.max_usd: 3 calls may cost"):
        ask(server, "abc", max_usd=0.0029, max_output_tokens=1000)
    assert server.kinds == []
    # Each answer is counted as 100 + 50 tokens, though 1 was asked for at most.
    server.courses.append(Course(lines={0: refused(500)}))
    with pytest.raises(UserError, match=r"\$0.0001 is spent, and 1 calls that failed may cost \$0.0000 in a further"):
        ask(server, "ab", max_output_tokens=1, max_usd=0.0001)
    assert len(server.batches) == 1


def test_what_cannot_be_asked_is_a_row(server: OpenAIServer) -> None:
    def attach(item: Item) -> list[Message]:
        if item.subject_id != "id of b":
            raise Unaskable("no picture")
        return item.messages

    rows = live_answers(STAGE, items_of("abc"), PROMPT, llm_of(server), OUTPUT, attach=attach)
    assert outcomes(rows) == [("error", 0), ("ok", 1), ("error", 0)]
    assert len(server.batched) == 1
    assert outcomes(live_answers(STAGE, items_of("ac"), PROMPT, llm_of(server), OUTPUT, attach=attach)) == [
        ("error", 0),
        ("error", 0),
    ]
    assert len(server.uploads) == 1


def test_nothing_secret_is_stored(server: OpenAIServer) -> None:
    server.courses.append(Course(lines={0: broken(f'{{"x": {KEY}'), 1: refused(500)}))
    ask(server, "ab", max_attempts=2)
    assert len(server.batches) == 2
    for path in (journal_path(STAGE), record_path(STAGE)):
        assert KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize("kind", ["upload", "create", "list", "retrieve", "content"])
def test_no_redirect_is_followed(server: OpenAIServer, kind: str) -> None:
    if kind == "list":
        # Only after a lost answer does anybody look through the list.
        server.detours["create"].append(unheard)
    with OpenAIServer() as stranger:
        new = stranger.base_url.replace("127.0.0.1", "localhost")
        server.detours[kind].append(lambda handler, request: handler.send_json(307, {}, {"Location": f"{new}/files"}))
        with pytest.raises(UserError) as caught:
            ask(server, "a")
        assert (stranger.kinds, stranger.uploads, stranger.calls) == ([], [], [])
    assert f"answers with a redirect (307) to {new}/files;" in str(caught.value)
    assert [row["status"] for row in ask(server, "a")] == ["ok"]


def test_what_is_noted_of_a_file_is_a_line_that_can_be_read(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of questions that are asked again the record holds what was answered before, long or not."""
    longest = 4_000
    monkeypatch.setattr("fieldmark.llm.batch.LONGEST_NOTE", longest)
    long = broken(json.dumps({"y": "z" * 1_000}))
    server.courses.append(Course(lines=dict.fromkeys(range(8), long)))
    assert outcomes(ask(server, "abcdefgh")) == [("ok", 2)] * 8
    lines = record_path(STAGE).read_bytes().splitlines()
    assert max(map(len, lines)) < longest + 200
    assert server.files[server.uploads[0]].count(b"\n") == 8
    assert len(server.uploads) > 3
    assert len(server.batched) == 16


def test_no_more_batches_are_under_way_than_may_be(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next file is written when one has ended; what a run that is stopped did not send the next one sends."""
    monkeypatch.setattr("fieldmark.llm.batch.MOST_OPEN", 2)
    attached: list[str] = []

    def attach(item: Item) -> list[Message]:
        attached.append(item.messages[0]["content"])
        if attached == list("abcd"):
            raise KeyboardInterrupt
        return item.messages

    def under_way() -> int:
        return sum(batch["status"] in ("validating", "in_progress") for batch in server.batches.values())

    most = []
    find = server.make_batch
    monkeypatch.setattr(server, "make_batch", lambda request: (find(request), most.append(under_way()))[0])
    llm = llm_of(server, batch_requests=1)
    with pytest.raises(KeyboardInterrupt):
        live_answers(STAGE, items_of("abcdefg"), PROMPT, llm, OUTPUT, attach=attach)
    rows = live_answers(STAGE, items_of("abcdefg"), PROMPT, llm, OUTPUT, attach=attach)
    assert outcomes(rows) == [("ok", 1)] * 7
    assert (max(most), len(server.uploads), len(server.batched)) == (2, 7, 7)


def test_once_the_limit_is_passed_no_further_file_is_sent(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is under way then is read; the next run, with a higher limit, sends the rest."""
    monkeypatch.setattr("fieldmark.llm.batch.MOST_OPEN", 2)
    # A call may cost 0.000026 and costs 0.0001.
    values = {"batch_requests": 1, "max_output_tokens": 25}
    with pytest.raises(UserError, match=r"max_usd: \$0\.0004 is spent, more than 0\.00025; 4 of 8 answers are kept"):
        ask(server, "abcdefgh", max_usd=0.00025, **values)
    assert (len(server.uploads), len(server.batched)) == (4, 4)
    assert outcomes(ask(server, "abcdefgh", **values)) == [("ok", 1)] * 8
    assert (len(server.uploads), len(server.batched)) == (8, 8)


def test_answers_are_on_the_disk_before_their_batch_counts_as_ended(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share one wait for the disk; if the power fails before it, the batch is read again."""
    done: list[str] = []
    sync, keep = Journal.sync, Journal.keep

    def synced(self: Journal) -> None:
        done.append("sync")
        sync(self)

    def kept(self: Journal, line: bytes) -> int:
        done.extend(["ended"] * (b'"ended"' in line))
        return keep(self, line)

    monkeypatch.setattr(Journal, "sync", synced)
    monkeypatch.setattr(Journal, "keep", kept)
    ask(server, "abcd", batch_requests=2)
    assert done == ["sync", "ended", "sync", "ended"]
