"""Rates on a clock that the tests turn: allowances kept, credit given back, rests shared and left one by one."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.llm.rates import LONGEST_RESET_S, SPREAD, Rates, duration, reset_after


class Clock(threading.Event):
    """A clock that also stands for `stopping`: whoever waits turns it on by as much."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout
        self.waits.append(timeout)
        self.now += timeout
        return self.is_set()


def rates_of(clock: Clock, requests: int | None = None, tokens: int | None = None) -> Rates:
    return Rates(requests, tokens, clock, clock)


def test_without_limits_nobody_waits() -> None:
    clock = Clock()
    rates = rates_of(clock)
    assert all(rates.take(10**9) for _ in range(100))
    assert clock.waits == []


def test_requests_start_evenly_spaced() -> None:
    clock = Clock()
    rates = rates_of(clock, requests=30)
    starts = []
    for _ in range(4):
        assert rates.take(0)
        starts.append(clock.now - 1000)
    assert starts == pytest.approx([0, 2, 4, 6])
    clock.now += 600
    for _ in range(2):
        assert rates.take(0)
        starts.append(clock.now - 1000)
    assert starts[4:] == pytest.approx([606, 608])


def test_tokens_wait_for_what_was_taken_and_not_given_back() -> None:
    clock = Clock()
    rates = rates_of(clock, tokens=600)
    rates.take(100)
    rates.take(1)
    assert sum(clock.waits) == pytest.approx(10)
    rates.give_back(-99)
    rates.take(0)
    assert sum(clock.waits) == pytest.approx(20)
    rates.take(1000)
    rates.give_back(1000)
    rates.take(0)
    assert sum(clock.waits) == pytest.approx(20)


def test_the_slower_of_two_limits_decides() -> None:
    clock = Clock()
    rates = rates_of(clock, requests=60, tokens=60)
    rates.take(5)
    rates.take(0)
    rates.take(0)
    assert clock.waits == pytest.approx([5, 1])


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000), st.floats(0, 1)), min_size=1, max_size=60),
    st.integers(1, 200),
    st.integers(1, 20_000),
)
def test_no_minute_sees_more_than_its_allowance(
    calls: list[tuple[int, int, float]], requests: int, tokens: int
) -> None:
    """Calls after another (idle seconds before, tokens expected, share used), each over before the next begins."""
    clock = Clock()
    rates = rates_of(clock, requests, tokens)
    starts: list[tuple[float, int]] = []
    for idle, expected, share in calls:
        clock.now += idle / 10
        assert rates.take(expected)
        used = int(expected * share)
        rates.give_back(expected - used)
        starts.append((clock.now, used))
    for begin, _ in starts:
        minute = [used for start, used in starts if begin <= start < begin + 60 - 1e-3]
        assert len(minute) <= requests
        assert sum(minute) <= 1.25 * tokens + minute[-1] + 1


def test_what_was_expected_and_not_used_lets_more_calls_run_at_once() -> None:
    """600 tokens a minute pay for 15 calls of 40; as each takes 10 s and expects 140, 2.5 must run at once."""
    clock = Clock()
    rates = rates_of(clock, tokens=600)
    ends: list[float] = []
    calls = 0
    while clock.now < 1000 + 3600:
        assert rates.tokens
        wait = rates.tokens.wait(clock.now)
        if not wait and len(ends) < 8:
            assert rates.take(140)
            calls += 1
            ends.append(clock.now + 10)
            continue
        clock.now = min([clock.now + wait] * bool(wait) + ends)
        while ends and ends[0] <= clock.now:
            ends.pop(0)
            rates.give_back(100)
    assert 0.95 * 15 * 60 < calls < 1.05 * 15 * 60


def test_a_rest_is_for_all_and_its_end_is_not() -> None:
    waits = []
    for _ in range(20):
        clock = Clock()
        rates = rates_of(clock)
        rates.rest(100)
        rates.rest(10)
        assert rates.take(0)
        assert rates.take(0)
        waits += clock.waits
    assert len(waits) == len(set(waits)) == 20
    assert all(100 <= wait <= 100 * (1 + SPREAD) for wait in waits)


def test_stopping_ends_every_wait() -> None:
    stopping = threading.Event()
    rates = Rates(None, None, stopping)
    rates.rest(3600)
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(rates.take(0)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    stopping.set()
    for thread in threads:
        thread.join(30)
    assert taken == [False] * 4
    assert not Rates(None, None, stopping).take(0)


def test_threads_share_one_allowance() -> None:
    clock = Clock()
    rates = rates_of(clock, tokens=60)
    threads = [threading.Thread(target=lambda: [rates.take(1) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rates.tokens
    # 200 tokens at one a second: 199 were paid off, one is owed.
    assert clock.now - 1000 >= 199 - 1e-3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("6m0s", 360),
        ("120ms", 0.12),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400),
        ("7.66s", 7.66),
        ("12", 12),
        ("0.5", 0.5),
        ("", None),
        ("soon", None),
        ("1s later", None),
        ("-1s", None),
        ("1.s", None),
        ("nan", None),
        ("2026-01-01T00:00:00Z", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("left", "reset", "seconds"),
    [
        ({"requests": "1", "tokens": "100"}, {"requests": "9s", "tokens": "9s"}, 0),
        ({"requests": "0", "tokens": "100"}, {"requests": "9s", "tokens": "20s"}, 9),
        ({"requests": "0", "tokens": "99"}, {"requests": "9s", "tokens": "20s"}, 20),
        ({"requests": "0"}, {"requests": "6m0s"}, LONGEST_RESET_S),
        ({"requests": "0"}, {}, 0),
        ({"requests": "none"}, {"requests": "9s"}, 0),
        ({}, {}, 0),
    ],
)
def test_a_server_s_allowance_is_heeded(left: dict[str, str], reset: dict[str, str], seconds: float) -> None:
    headers = {f"x-ratelimit-remaining-{kind}": value for kind, value in left.items()}
    headers |= {f"x-ratelimit-reset-{kind}": value for kind, value in reset.items()}
    assert reset_after(headers, 100) == seconds
