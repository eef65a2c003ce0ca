#!/usr/bin/env python3
"""Load the gateway for long, and hold it to its promises: python3 bench/soak.py [--smoke] [...].

Prints a table and ends with 1 if a promise is broken. --smoke does all of it tiny. Everything is on
loopback: this process plays the clients and the upstream, and keeps its own count of what it did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import load
import run
import script
import scripted
import servers
from callers import run_scripts
from run import MB, Bench, Row
from script import Act, Mix, Script, write_scripts
from scripted import Peer, Upstream
from servers import Process, running

T = TypeVar("T")
WORKERS = 64
SETTLE_SECONDS = 5.0
SPARE_DESCRIPTORS = 128  # of the gateway's and ours beside one for each client and provider
MIXED: Mix = [
    (84, scripted.ANSWERS), (3, scripted.STATUSES), (4, scripted.FAULTS),
    (2, scripted.REFUSED_BY_US), (7, scripted.LEFT),
]  # fmt: skip
BAD: Mix = [(1, scripted.FAULTS), (1, scripted.STATUSES), (0.1, scripted.DEADLINES)]
IMPATIENT: Mix = [(90, scripted.ANSWERS), (10, scripted.LEFT)]
QUICK = {"first_token": 1.5, "idle": 1.5, "total": 3.0}


@dataclass
class Soak(Bench):
    """What every scenario needs."""

    args: argparse.Namespace

    @contextlib.contextmanager
    def rig(self, stdout: int = subprocess.DEVNULL, **settings: Any) -> Iterator[Rig]:
        """A gateway in front of a scripted upstream."""
        rng = random.Random(self.args.seed)
        upstream = Upstream(servers.free_port(), rng)
        prices = self.home / "prices.json"
        prices.write_text(json.dumps(script.price_list()))
        settings["api_keys"] = [{"key": key, "app": app} for app, key in script.KEYS.items()]
        settings["prices"] = str(prices)
        gateway = self.build.gateway(upstream.urls, stdout=stdout, **settings)
        with running(gateway, "/health"):
            yield Rig(gateway, upstream, rng)


@dataclass
class Rig:
    """A gateway, and what plays both of its sides."""

    gateway: Process
    upstream: Upstream
    rng: random.Random
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does this while the upstream listens."""

        async def whole() -> T:
            listener = await self.upstream.listen()
            try:
                return await work()
            finally:
                listener.close()
                for peer in self.upstream.peers:
                    peer.transport.abort()

        return asyncio.run(whole())

    async def play(self, count: int, mix: Mix, workers: int = WORKERS) -> int:
        """So many requests, until nothing of them is left; returns how many."""
        scripts = write_scripts(self.rng, itertools.islice(self.numbers, count), mix)
        played = await run_scripts(self.gateway.port, self.upstream, scripts, workers)
        await self.until(lambda: not self.upstream.busy and not self.reading("requests_in_flight"))
        return played

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits for what only asking tells, but not for ever: what is measured next will show."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while not holds() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def metrics(self) -> str:
        return self.gateway.fetch("/metrics")[1].decode()

    def off(self, *names: str) -> int:
        """By how much the gateway's count of these differs from the upstream's."""
        differences = self.upstream.tally.differences(self.metrics())
        series = [(name, *each) for name in names for each in differences[name].items()]
        for each in series[:9]:
            print("off:", *each, file=sys.stderr)
        return sum(abs(value) for _, _, value in series)

    def reading(self, name: str) -> int:
        found = re.search(rf"^(?:llm_)?{name} (\S+)$", self.metrics(), re.M)
        return int(float(found[1])) if found else 0

    def open_files(self) -> int:
        return self.reading("process_open_fds")

    async def left_behind(self, before: int) -> int:
        """Descriptors, and requests under way, that outlive everything."""
        self.upstream.close_idle()
        await self.until(lambda: self.open_files() <= before)
        return max(self.open_files() - before, 0) + self.reading("requests_in_flight")

    def faults(self) -> int:
        """What clients and upstream complained of."""
        for fault in self.upstream.tally.faults[:3]:
            print(fault[:900], file=sys.stderr)
        return len(self.upstream.tally.faults)


def exactness(soak: Soak) -> Iterator[Row]:
    """Whatever happens to requests, the gateway counts what the upstream counted."""
    count = soak.args.requests or soak.pick(100_000, 2_000)
    with soak.rig() as rig:
        tally, before, began = rig.upstream.tally, rig.open_files(), time.monotonic()

        async def work() -> int:
            await rig.play(count, MIXED)
            return await rig.left_behind(before)

        left = rig.run(work)
        what, seconds = f"{count:,} mixed requests:", time.monotonic() - began
        requests, tokens = tally.counts[script.REQUESTS], tally.counts[script.TOKENS]
        detail = f"{len({key[-1] for key in requests})} statuses in {len(requests)} series"
        detail += f", {count / seconds:,.0f} requests/s"
        yield Row(f"{what} off in requests", rig.off(script.REQUESTS), 0, "", detail)
        off = rig.off(script.ERRORS, script.ESTIMATED)
        yield Row(f"{what} off in errors and estimates", off, 0, "")
        detail = f"of {sum(tokens.values()):,}"
        yield Row(f"{what} off in tokens", rig.off(script.TOKENS, script.DETAILS), 0, "", detail)
        detail = f"of {sum(tally.counts[script.COST].values()) / 1e9:,.2f}"
        yield Row(f"{what} off in cost", rig.off(script.COST) / 1e9, 0, "$", detail)
        yield Row(f"{what} wrong answers", rig.faults(), 0, "")
        yield Row(f"{what} clients left hanging", tally.hung, 0, "")
        yield Row(f"{what} left behind", left, 0, "", "descriptors and requests under way")
        goodbye = tally.slowest_goodbye
        yield Row("clients left: until the upstream is", goodbye, soak.pick(1, 10), "s", "slowest")


def memory(soak: Soak) -> Iterator[Row]:
    """Many requests, a tenth of them cancelled."""
    count, batches = soak.args.memory or soak.pick(1_000_000, 3_000), 25
    sizes, played = [], 0
    deadline = time.monotonic() + soak.args.seconds
    with soak.rig() as rig:
        before = rig.open_files()

        async def work() -> int:
            nonlocal played
            for _ in range(batches):
                if time.monotonic() < deadline:
                    played += await rig.play(count // batches, IMPATIENT)
                    sizes.append(rig.gateway.rss_kb() / MB)
            return await rig.left_behind(before)

        left = rig.run(work)
        faults = rig.faults()
    settled = sizes[len(sizes) // 5 :]
    strayed = max(abs(size - settled[0]) for size in settled)
    detail = f"{sizes[0]:.1f}, after warm-up {settled[0]:.1f}, in the end {sizes[-1]:.1f} MB"
    what = f"{played:,} requests, a tenth cancelled:"
    yield Row(f"{what} RSS strays by", strayed, soak.pick(2, 10), "MB", detail)
    yield Row(f"{what} left behind", left, 0, "", "descriptors and requests under way")
    yield Row(f"{what} wrong answers", faults, 0, "")


def streams(soak: Soak) -> Iterator[Row]:
    """Many at once; none may fail or lose an event."""
    count, events = soak.args.streams or soak.pick(2000, 50), soak.pick(100, 10)
    yield run.measure_crowd(soak, "http", 60 * max(count, 1000) / 1000, count, events)


def idle(soak: Soak) -> Iterator[Row]:
    """Idle clients, while others are served."""
    wanted = soak.args.idle or soak.pick(10_000, 200)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(wanted, files // 2 - SPARE_DESCRIPTORS)
    with soak.rig() as rig:

        async def work() -> tuple[float, int]:
            await rig.play(500, MIXED)
            size, before = rig.gateway.rss_kb(), rig.open_files()
            clients = load.idle_connections(rig.gateway, count)
            await rig.play(500, MIXED)
            each = (rig.gateway.rss_kb() - size) / count
            for client in clients:
                client.close()
            return each, await rig.left_behind(before)

        each, left = rig.run(work)
        faults = rig.faults()
    detail = "" if count == wanted else f"not {wanted:,}: only {files:,} descriptors here"
    what = f"{count:,} idle connections while 500 requests are served:"
    yield Row(f"{what} RSS for each", each, soak.pick(10, 30), "kB", detail)
    yield Row(f"{what} wrong answers", faults, 0, "")
    yield Row(f"{what} left behind", left, 0, "")


def descriptors(soak: Soak) -> Iterator[Row]:
    """More clients than there are descriptors: it stays alive, and recovers when they leave."""
    lasting = soak.pick(10, 3)  # seconds in which it might spin
    log = soak.home / "log"
    with log.open("wb") as file, soak.rig(stdout=file.fileno()) as rig:
        pid, before = rig.gateway.popen.pid, rig.open_files()
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]

        async def work() -> tuple[float, float, float, int]:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (before + 20, hard))
            lines, cpu = len(log.read_bytes().splitlines()), rig.gateway.cpu_ns()
            clients = load.connections(rig.gateway, 100)
            await asyncio.sleep(lasting)
            lines = len(log.read_bytes().splitlines()) - lines
            cpu = rig.gateway.cpu_ns() - cpu
            for client in clients:
                client.close()
            began = time.monotonic()
            await rig.play(200, [(1, scripted.ANSWERS)], 4)
            seconds = time.monotonic() - began
            return lines / lasting, cpu / lasting / 1e9, seconds, await rig.left_behind(before)

        lines, cpu, seconds, left = rig.run(work)
        faults = rig.faults()
    what = "descriptors exhausted by 100 clients:"
    yield Row(f"{what} CPU", cpu, 0.05, "s/s", f"over {lasting} s")
    yield Row(f"{what} log lines", lines, 5, "/s")
    yield Row(f"{what} until it serves again", seconds, soak.pick(3, 30), "s", "200 requests")
    yield Row(f"{what} wrong answers then", faults, 0, "")
    yield Row(f"{what} left behind", left, 0, "")


def stdout(soak: Soak) -> Iterator[Row]:
    """A log that takes no lines: requests go on, and each lost line is counted."""
    count = soak.pick(5_000, 300)
    reader, closed = os.pipe()
    unread, full_pipe = os.pipe()
    full_disk = os.open("/dev/full", os.O_WRONLY)
    os.close(reader)
    os.set_blocking(full_pipe, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(full_pipe, bytes(4096))
    os.set_blocking(full_pipe, True)
    for what, fd in (("a closed pipe", closed), ("a full disk", full_disk),
                     ("a pipe that nobody reads", full_pipe)):  # fmt: skip
        with soak.rig(stdout=fd) as rig:
            before = rig.reading("log_lines_lost_total")  # some tell of the start
            rig.run(lambda: rig.play(count, MIXED))
            off = rig.reading("log_lines_lost_total") - before - count
            yield Row(f"stdout is {what}: off in lost lines", abs(off), 0, "", f"of {count:,}")
            yield Row(f"stdout is {what}: requests lost", rig.faults(), 0, "")
    for fd in (closed, full_disk, unread, full_pipe):
        os.close(fd)


def sigterm(soak: Soak) -> Iterator[Row]:
    """Streams that are under way when the gateway is told to stop."""
    count = 100
    held: list[Callable[[], None]] = []

    def hold(peer: Peer, asked: Script) -> None:
        rest = peer.begin(asked, lambda: held.append(lambda: peer.end(end)))
        end = scripted.chunk(rest) + b"0\r\n\r\n"

    with soak.rig() as rig:

        async def work() -> None:
            held_act = Act(hold, app=script.STEADY, streamed=True)
            scripts = write_scripts(rig.rng, range(count), [(1, [held_act])])
            streams = asyncio.ensure_future(
                run_scripts(rig.gateway.port, rig.upstream, scripts, count))  # fmt: skip
            await rig.until(lambda: len(held) == count)
            rig.gateway.popen.send_signal(signal.SIGTERM)
            await rig.until(lambda: not accepts(rig.gateway))
            for finish in held:
                finish()
            await streams
            code = await asyncio.to_thread(rig.gateway.popen.wait, servers.STOP_SECONDS)
            if code:
                rig.upstream.tally.faults.append(f"it ended with {code}")

        rig.run(work)
        detail = f"{len(held)} under way, exit status {rig.gateway.popen.returncode}"
        yield Row("SIGTERM under 100 streams: cut", count - len(held) + rig.faults(), 0, "", detail)


def accepts(gateway: Process) -> bool:
    try:
        return gateway.fetch("/health")[0] == 200
    except OSError:
        return False


def faults(soak: Soak) -> Iterator[Row]:
    """Upstreams that fail in every way."""
    count = soak.args.faults or soak.pick(1000, 150)
    for name, mix, compared in (
        ("upstream faults", BAD, (script.REQUESTS, script.ERRORS, script.ESTIMATED)),
        ("answers cut anywhere", [(1, scripted.CUTS)], (script.REQUESTS,)),
    ):
        with soak.rig(timeouts=QUICK) as rig:
            tally, before = rig.upstream.tally, rig.open_files()

            async def work(rig: Rig = rig, mix: Mix = mix, before: int = before) -> int:
                await rig.play(count, mix)
                return await rig.left_behind(before)

            left = rig.run(work)
            what = f"{count:,} {name}:"
            yield Row(f"{what} clients left hanging", tally.hung, 0, "")
            yield Row(f"{what} wrong ends", rig.faults(), 0, "")
            yield Row(f"{what} connections leaked", left, 0, "")
            yield Row(f"{what} off in metrics", rig.off(*compared), 0, "")


def races(soak: Soak) -> Iterator[Row]:
    """Kept-alive connections that the upstream closes as the next request comes."""
    count = soak.args.faults or soak.pick(1000, 100)
    wave = min(count, 250)
    with soak.rig() as rig:

        async def work() -> None:
            while rig.upstream.tally.races < count and not rig.upstream.tally.faults:
                await rig.play(100, [(1, scripted.RACES)], 16)
            for _ in range(0, count, wave):
                await rig.play(wave, [(1, scripted.ANSWERS)], wave)  # so that connections are kept
                await rig.play(wave, [(1, scripted.LATE_DEATHS)], wave)

        rig.run(work)
        tally = rig.upstream.tally
        what = f"{tally.races:,} keep-alive races: failures seen by clients"
        yield Row(what, rig.faults(), 0, "")
        what = f"{-(-count // wave) * wave:,} upstreams that die after 2 s: requests sent twice"
        yield Row(what, tally.repeated, 0, "")


SCENARIOS = [exactness, memory, streams, idle, descriptors, stdout, sigterm, faults, races]


def main() -> int:
    names = ", ".join(scenario.__name__ for scenario in SCENARIOS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="all of it, tiny")
    parser.add_argument("--only", default="", metavar="WORD", help=f"of {names}")
    parser.add_argument("--python", default="/usr/bin/python3", help="runs the gateway")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    for name, about in (
        ("requests", "mixed ones for exactness (100,000)"), ("memory", "for memory (1,000,000)"),
        ("streams", "at once (2,000)"), ("idle", "connections (10,000)"),
        ("faults", "and races (1,000)"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=about)
    parser.add_argument("--seconds", type=float, default=3600, help="at most, for memory")
    args = parser.parse_args()
    problem = run.missing(args.python)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    print(f"seed {args.seed}")
    with tempfile.TemporaryDirectory() as home:
        soak = Soak(Path(home), servers.Build(args.python, Path(home)), args.smoke, args)
        return int(run.tabulate(SCENARIOS, soak, args)[1])


if __name__ == "__main__":
    sys.exit(main())
