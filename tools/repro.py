"""Run `dvc repro`, and say which stage runs, which of how many, and what it and those behind it took the last time.

Reads   dvc.yaml, params.yaml, dvc.lock; .cache/times/stages.json; what DVC and the stages print.
Writes  what they print, each line once and without what DVC says of its own work, to stdout and stderr as it came;
        .cache/times/stages.json, the seconds that each stage took when it ran here last.
Costs   nothing beside the stages.

How long it takes is told, never guessed: when a stage runs that does not depend on one that ran before it, how long it
and all that depends on it took, each the last time it ran here. Those that turn out not to have to run take nothing,
and a stage that keeps what it made before takes longer for more new images than it had then. Where one of them has not
run here yet, nothing is said; the bars of the stages that take long tell their own rest.

Exits as DVC does. Ctrl-C and SIGTERM end the stage that runs, and this when it has wound up.

    python -m tools.repro
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from ruamel.yaml import YAML

from fieldmark.command import counted, run
from fieldmark.lock import LOCK, covers, paths_of, read_stages
from fieldmark.store import write_text
from tools.inputs import PIPELINE, defined_stages

TIMES = Path(".cache/times/stages.json")
RUNS = re.compile(r"Running stage '(.+)':")
RESTORED = re.compile(r"Stage '(.+)' is cached - skipping run, checking out outputs")
UNCHANGED = re.compile(r"Stage '(.+)' didn't change, skipping")
# What DVC 3 says of its own work.
ASIDE = re.compile(
    r"""\s* | >\ .* | '.+'\ didn't\ change,\ skipping | (Updating|Generating)\ lock\ file\ '.+'
    | Verifying\ data\ sources\ in\ stage:\ '.+' | Data\ and\ pipelines\ are\ up\ to\ date\. | Use\ `dvc\ push`.*
    | To\ track\ the\ changes\ with\ git,\ run: | \tgit\ add\ .* | To\ enable\ auto\ staging,\ run:
    | \tdvc\ config\ core\.autostage\ true | WARNING:\ '.+'\ is\ empty\.""",
    re.VERBOSE,
)


class Progress:
    """Turns what `dvc repro` prints into what people read, line by line, and takes the time of each stage."""

    def __init__(
        self, stages: Mapping[str, str], seconds: dict[str, float], behind: Callable[[str], set[str]]
    ) -> None:
        """`stages`: what each does; `seconds`: what each took; `behind`: those that depend on one."""
        self.stages, self.seconds, self.behind = stages, seconds, behind
        self.seen = 0  # stages that DVC has come to
        self.foreseen: set[str] = set()  # what depends on a stage that ran
        self.running: tuple[str, float] | None = None  # a stage, and when it began
        self.said: set[str] = set()

    def read(self, line: str) -> Iterator[str]:
        """What to print for a line."""
        if found := UNCHANGED.fullmatch(line):
            self.pass_on()
        elif found := RESTORED.fullmatch(line):
            self.pass_on()
            yield f"{self.place(found[1])}: as it was made before"
        elif found := RUNS.fullmatch(line):
            self.pass_on()
            yield from self.start(found[1])
        elif self.is_news(line):
            yield line

    def is_news(self, line: str) -> bool:
        """Whether a line is neither DVC's own nor was there before."""
        if ASIDE.fullmatch(line) or line in self.said:
            return False
        self.said.add(line)
        return True

    def start(self, name: str) -> Iterator[str]:
        self.running = name, time.perf_counter()
        yield f"{self.place(name)}: {self.stages.get(name, 'no longer in dvc.yaml')}"
        if name not in self.foreseen:
            behind = self.behind(name)
            self.foreseen |= behind
            took = [self.seconds.get(each) for each in (name, *behind)]
            if None not in took:
                also = f" and the {counted(len(behind), 'stage', 'stages')} behind it" if behind else ""
                yield f"  it{also} took {lasting(sum(filter(None, took)))}, each the last time it ran here"

    def place(self, name: str) -> str:
        return f"stage {self.seen} of {len(self.stages)}, {name}"

    def pass_on(self) -> None:
        """DVC has come to another stage."""
        self.end()
        self.seen += 1

    def end(self) -> None:
        """The stage that runs has ended well."""
        if self.running is not None:
            name, began = self.running
            self.seconds[name] = round(time.perf_counter() - began, 1)
            self.running = None


def lasting(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe_stages() -> dict[str, str]:
    """What each stage of dvc.yaml does, by the name that DVC calls it."""
    stages = YAML(typ="safe", pure=True).load(PIPELINE.read_text(encoding="utf-8"))["stages"]
    found = {}
    for name in defined_stages():
        base, _, key = name.partition("@")
        found[name] = stages[base].get("do", stages[base])["desc"].replace("${key}", key)
    return found


def stages_behind(name: str) -> set[str]:
    """The stages that depend on one, followed through, as dvc.lock knows them."""
    stages = {each: entry for each, entry in read_stages().items() if each in defined_stages()} if LOCK.exists() else {}
    found, new = set(), [name]
    while new:
        outs = paths_of(stages.get(new.pop(), {}), "outs")
        for other, stage in stages.items():
            if other not in found and any(
                covers(dep, out) or covers(out, dep) for dep in paths_of(stage, "deps") for out in outs
            ):
                found.add(other)
                new.append(other)
    return found


def read_times() -> dict[str, float]:
    try:
        return dict(json.loads(TIMES.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}  # nothing ran here yet, or the file is spoilt: then nothing is told


def relay(source: IO[bytes], target: IO[bytes], is_news: Callable[[str], bool]) -> None:
    """Copy what comes as it comes, but lines without news. A bar, which goes back to the start of its line, is kept."""
    rest = b""
    while chunk := os.read(source.fileno(), 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line or b"\r" in line or is_news(line.decode(errors="replace")):
                target.write(line + b"\n")
        if b"\r" in rest:
            target.write(rest)
            rest = b""
        target.flush()
    target.write(rest)
    target.flush()


def follow(dvc: subprocess.Popen[bytes], progress: Progress) -> int:
    """Print what is to be read until DVC and its stage have ended; DVC's exit status."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # which a terminal sends to the stage itself
            dvc.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    assert dvc.stdout is not None
    assert dvc.stderr is not None
    errors = threading.Thread(target=relay, args=(dvc.stderr, sys.stderr.buffer, progress.is_news))
    errors.start()
    for line in dvc.stdout:
        for said in progress.read(line.decode(errors="replace").removesuffix("\n")):
            print(said, flush=True)
    errors.join()
    return dvc.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    progress = Progress(describe_stages(), read_times(), stages_behind)
    dvc = subprocess.Popen(["dvc", "repro"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    status = follow(dvc, progress)
    if status == 0:
        progress.end()
    write_text(TIMES, json.dumps(progress.seconds, indent=2) + "\n")
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    run(main)
