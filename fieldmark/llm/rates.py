"""How fast a client may ask: requests and tokens a minute, and the rests that a server asks for.

One Rates serves all threads of a client. Whoever may not start yet sleeps until it may, or until the run stops.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping

# After a rest that all threads wait for, each waits up to this share longer, so that they do not come back at once.
SPREAD = 0.25
# A server's headers say when its allowance is full again, which is later than when there is some: wait no longer.
LONGEST_RESET_S = 60.0
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")


class Bucket:
    """A token bucket that starts empty and may be overdrawn: the next take waits until the last one is paid off.

    It saves up to `savings` while nobody asks. A minute's takes pass its allowance by these and the last take at most.
    """

    def __init__(self, per_minute: float, savings: float, now: float) -> None:
        self.per_second, self.savings = per_minute / 60, savings
        self.level = 0.0
        self.at = now

    def wait(self, now: float) -> float:
        """Seconds until the next take."""
        self.level = min(self.savings, self.level + (now - self.at) * self.per_second)
        self.at = now
        # A millionth is rounding: nobody could wait that short.
        return -self.level / self.per_second if self.level < -1e-6 else 0.0


class Rates:
    """Lets calls start no faster than so many requests and tokens a minute (None: any number), with rests between."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        stopping: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stopping, self.clock = stopping, clock
        self.lock = threading.Lock()
        # Requests start evenly spaced: some servers count by the second. Tokens are taken by estimates that are mostly
        # too high; without savings, what is given back could not be used.
        self.requests = Bucket(requests_per_minute, 0, clock()) if requests_per_minute else None
        self.tokens = Bucket(tokens_per_minute, tokens_per_minute / 4, clock()) if tokens_per_minute else None
        self.rest_until = clock()

    def take(self, tokens: int) -> bool:
        """Wait until a call of about so many tokens may start. False where the run stops first."""
        while not self.stopping.is_set():
            with self.lock:
                now = self.clock()
                charges = [(bucket, n) for bucket, n in ((self.requests, 1), (self.tokens, tokens)) if bucket]
                rest = max(0.0, self.rest_until - now) * random.uniform(1, 1 + SPREAD)
                wait = max(rest, *(bucket.wait(now) for bucket, _ in charges), 0.0)
                if not wait:
                    for bucket, amount in charges:
                        bucket.level -= amount
                    return True
            self.stopping.wait(wait)
        return False

    def give_back(self, tokens: int) -> None:
        """Correct a take by what the call did not use; a negative number is what it used beyond."""
        if self.tokens:
            with self.lock:
                self.tokens.level += tokens

    def rest(self, seconds: float) -> None:
        """Let no call start for so long."""
        with self.lock:
            self.rest_until = max(self.rest_until, self.clock() + seconds)


def reset_after(headers: Mapping[str, str], tokens: int) -> float:
    """Seconds until a server lets another call of so many tokens in, by its x-ratelimit headers [mem]; 0: at once."""
    waits = [0.0]
    for kind, needed in (("requests", 1), ("tokens", tokens)):
        left, reset = headers.get(f"x-ratelimit-remaining-{kind}", ""), headers.get(f"x-ratelimit-reset-{kind}", "")
        # As a float: an int of 5,000 digits is an error.
        if left.isdecimal() and float(left) < needed:
            waits.append(duration(reset) or 0.0)
    return min(max(waits), LONGEST_RESET_S)


def duration(text: str) -> float | None:
    """Seconds of "1s", "6m0s", "120ms", "1h2m3.5s" or a bare number of seconds; None where it is none of these."""
    parts = DURATION.findall(text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return sum(float(number) * SECONDS[unit] for number, unit in parts)
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None
