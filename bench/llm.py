"""Calls a second of the LLM stages beside what latency and concurrency allow, and their memory at two sizes.

A server in a process of its own answers with two concepts after 200 ms; the client asks with 32 threads, through the
code of the stages, journal included, in a fresh process and folder each time. "Bare" is calls in flight / latency. Peak
memory is counted from when the questions are made. The bars: 0.9 x bare, and memory that grows by the rows alone, which
are returned: 1.6 kB each.

    python -m bench.llm [--calls N]
"""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from fieldmark.llm.answers import Item, live_answers
from fieldmark.llm.prompts import load_prompt
from fieldmark.params import Llm
from tests.openai_server import OpenAIServer

CONCURRENCY, LATENCY_S, BAR = 32, 0.2, 0.9
SIZES = (1_000, 20_000)
SPAWN = multiprocessing.get_context("spawn")


class Measured(NamedTuple):
    seconds: float
    base_mb: float
    peak_mb: float


def serve(latency: float, pipe: Connection) -> None:
    """Send the address of a server, and keep it up until the other end closes."""
    with OpenAIServer(latency=latency) as server:
        pipe.send(server.base_url)
        pipe.poll(None)


def peak_mb() -> float:
    """The most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(base_url: str, calls: int, pipe: Connection) -> None:
    """Ask so many questions and send what that took."""
    prompt = load_prompt("prompts/concepts.md")
    llm = Llm(mode="live", base_url=base_url, model="tiny", api_key_env="BENCH_KEY", concurrency=CONCURRENCY)
    text = "What tells a class from the others of its group, based on just a photo? " * 20
    items = [Item(str(n), 0, [{"role": "user", "content": f"{text}{n}"}]) for n in range(calls)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FIELDMARK_CACHE": folder, "BENCH_KEY": "none"}
        base, started = peak_mb(), perf_counter()
        rows = live_answers("bench", items, prompt, llm, Path(folder, "none"), attach=lambda item: item.messages)
        seconds = perf_counter() - started
        pipe.send(Measured(seconds, base, peak_mb()))
    if any(row["status"] != "ok" for row in rows):
        sys.exit("not every question was answered")


def run(calls: int, latency: float) -> Measured:
    """One measurement: a server and a client, each in a fresh process."""
    here, there = SPAWN.Pipe()
    server = SPAWN.Process(target=serve, args=(latency, there), daemon=True)
    server.start()
    client_here, client_there = SPAWN.Pipe()
    client = SPAWN.Process(target=measure, args=(here.recv(), calls, client_there))
    client.start()
    client.join()
    here.close()
    there.close()
    if client.exitcode:
        sys.exit(f"the client ended with {client.exitcode}")
    measured: Measured = client_here.recv()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2_000, help="calls for the rate (default: 2000)")
    calls = parser.parse_args().calls
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    bare = CONCURRENCY / LATENCY_S
    measured = run(calls, LATENCY_S)
    rate = calls / measured.seconds
    print(f"{calls} calls, {CONCURRENCY} in flight, {LATENCY_S * 1000:.0f} ms latency")
    print(f"{'bare':14s} {bare:6.1f} calls/s")
    print(f"{'stage':14s} {rate:6.1f} calls/s, {rate / bare:.2f} x bare (bar: {BAR})")
    print("memory, no latency")
    peaks = []
    for size in SIZES:
        measured = run(size, 0.0)
        peaks.append(measured.peak_mb - measured.base_mb)
        print(f"{size:8,} calls {measured.peak_mb:6.1f} MB, {peaks[-1]:.1f} of it since the start")
    print(f"{'growth':14s} {(peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0]) * 1024:6.1f} kB a call")


if __name__ == "__main__":
    main()
