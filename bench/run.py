#!/usr/bin/env python3
"""Measure the gateway beside nginx: python3 bench/run.py [--smoke] [--only WORD] [--python PATH].

A full run prints a table and writes it to bench/RESULTS.md; it ends with 1 if a bar is missed.
--smoke runs all of it tiny and fails only where something does not work. Machines are noisy and
differ, so CPU time is never given alone: nginx and the gateway take turns, several rounds, in
front of the same upstream under the same load, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import canned
import load
import servers
from load import WrongAnswer
from servers import Process, running

RESULTS = Path(__file__).with_name("RESULTS.md")
ROUNDS = 5
MB = 1024  # kB, as /proc counts


@dataclass
class Row:
    """One line of the table; `bar` is the most that is allowed."""

    what: str
    value: float
    bar: float
    unit: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.value <= self.bar

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "**over**"
        measured, bar = f"{self.value:.3g} {self.unit}".strip(), f"{self.bar:.3g}"
        return f"| {self.what} | {measured} | {bar} | {verdict} | {self.detail} |"


@dataclass
class Bench:
    """What every scenario needs: a directory, the gateway's build, and whether to be quick."""

    home: Path
    build: servers.Build
    smoke: bool

    def pick(self, full: int, smoke: int) -> int:
        return smoke if self.smoke else full

    @contextlib.contextmanager
    def side_by_side(self, upstream: Process, path: str, provider: str = "openai",
                     own_path: str = "") -> Iterator[list[Process]]:  # fmt: skip
        """nginx in front of a path of the upstream's, and the gateway, of that or its own one."""
        url = f"http://127.0.0.1:{upstream.port}{own_path or path}"
        with running(servers.nginx_proxy(self.home, upstream, path)) as nginx:
            with running(self.build.gateway({provider: url}), "/health") as gateway:
                yield [nginx, gateway]

    def compare(self, what: str, bar: float, unit: str, pair: list[Process],
                work: Callable[[Process], int]) -> Row:  # fmt: skip
        """CPU time for each unit that `work` counts, the gateway's over nginx's."""
        rounds = []
        for number in range(self.pick(ROUNDS, 1) + 1):
            costs = []
            for server in pair:
                before = server.cpu_ns()
                units = work(server)
                costs.append((server.cpu_ns() - before) / units / 1000)
            if number:  # the first is the warm-up
                rounds.append(costs)
        nginx, gateway = (statistics.median(costs) for costs in zip(*rounds))
        ratios = [costs[1] / costs[0] for costs in rounds]
        spread = f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
        detail = f"{gateway:.1f} us, nginx {nginx:.1f}; {spread}"
        return Row(f"{what}, CPU per {unit}", statistics.median(ratios), bar, "x nginx", detail)

    def flood(self, what: str, bar: float, pair: list[Process], body: bytes) -> Row:
        """Compares what one request costs under as many as can be."""

        def work(server: Process) -> int:
            return load.wrk(server, body, self.home, self.pick(3, 1))

        return self.compare(what, bar, "request", pair, work)


def chat(bench: Bench) -> Iterator[Row]:
    """Plain completions of 1 kB."""
    body = canned.request_body(stream=False)
    with running(servers.canned_upstream(bench.home)) as upstream:
        with bench.side_by_side(upstream, "/chat.json/v1") as pair:
            for server in pair:
                if load.post(server, body) != canned.chat_body():
                    raise WrongAnswer(f"{server.name} changed the answer's bytes")
            yield bench.flood("chat", 5, pair, body)


def stream(bench: Bench) -> Iterator[Row]:
    """50 events as fast as they go."""
    body = canned.request_body(stream=True)
    with running(servers.canned_upstream(bench.home)) as upstream:
        with bench.side_by_side(upstream, "/chat.sse/v1") as pair:
            for server in pair:
                load.streams(server, body, 1, 50)
            yield bench.flood("stream of 50 events, unpaced", 2.5, pair, body)


def translated(bench: Bench) -> Iterator[Row]:
    """The same to Anthropic, beside nginx that passes OpenAI's: what translation adds."""
    with running(servers.canned_upstream(bench.home)) as upstream:
        paths = "/chat.json/v1", "anthropic", "/message.json/v1"
        body = canned.request_body(False, model=canned.CLAUDE)
        with bench.side_by_side(upstream, *paths) as pair:
            if canned.SENTENCE * 8 not in load.post(pair[1], body).decode():
                raise WrongAnswer("the gateway lost the answer's text")
            yield bench.flood("chat to Anthropic", 8, pair, body)
        paths = "/chat.sse/v1", "anthropic", "/message.sse/v1"
        body = canned.request_body(True, model=canned.CLAUDE)
        with bench.side_by_side(upstream, *paths) as pair:
            load.streams(pair[1], body, 1, 48)
            yield bench.flood("stream of 50 events to Anthropic, unpaced", 5, pair, body)


# A client's dialect, a provider, what it streams, what is said of it in the config; at most.
PAIRS: list[tuple[str, str, str, dict[str, str], float]] = [
    ("messages", "openai", "chat.sse", {"wire": "chat"}, 5),
    ("messages", "openai", "response.sse", {}, 7),
    ("responses", "anthropic", "message.sse", {}, 7),
    ("gemini", "anthropic", "message.sse", {}, 7),
    ("chat", "gemini", "gemini.sse", {}, 7),
    ("responses", "gemini", "gemini.sse", {}, 7),
]


def pairs(bench: Bench) -> Iterator[Row]:
    """Other clients and other wires: 50 events, beside nginx that passes OpenAI's."""
    plain = canned.request_body(True)
    with running(servers.canned_upstream(bench.home)) as upstream:
        with running(servers.nginx_proxy(bench.home, upstream, "/chat.sse/v1")) as nginx:
            for client, provider, streamed, said, bar in PAIRS:
                url = f"http://127.0.0.1:{upstream.port}/{streamed}/v1"
                path, body = canned.asked_in(client, canned.ALL_MODELS[provider])
                gateway = bench.build.gateway({provider: url}, about=said)
                gateway.path = path
                with running(gateway, "/health"):
                    if load.post(gateway, body).count(b"data: ") < 48:
                        raise WrongAnswer(f"{client} to {streamed}: words are lost")

                    def work(server: Process, asked: bytes = body) -> int:
                        sent = asked if server.name == "gateway" else plain
                        return load.wrk(server, sent, bench.home, bench.pick(3, 1))

                    what = f"stream of 50 events, a {client} client to {streamed}"
                    yield bench.compare(what, bar, "request", [nginx, gateway], work)


def long_conversation(bench: Bench) -> Iterator[Row]:
    """What an agent sends again with each turn."""
    count = bench.pick(30, 2)
    with running(servers.canned_upstream(bench.home)) as upstream:
        root = f"http://127.0.0.1:{upstream.port}"
        urls = {"openai": f"{root}/chat.json/v1", "anthropic": f"{root}/message.json/v1"}
        with running(bench.build.gateway(urls), "/health") as gateway:
            costs: dict[str, list[int]] = {name: [] for name in urls}
            for _ in range(count):
                for name in urls:
                    body, before = canned.conversation(canned.MODELS[name]), gateway.cpu_ns()
                    load.post(gateway, body)
                    costs[name].append(gateway.cpu_ns() - before)
    passed, whole = (statistics.median(costs[name]) / 1e6 for name in urls)
    what = f"a conversation of 200 turns and {len(body) / 1e6:.1f} MB, CPU to translate it"
    yield Row(what, whole - passed, 30, "ms", f"{whole:.1f} ms, less {passed:.1f} to pass it")


def paced(bench: Bench) -> Iterator[Row]:
    """Many streams at a model's pace: what one event costs when it comes alone."""
    count, events = bench.pick(250, 20), bench.pick(200, 20)
    body = canned.request_body(stream=True)

    def work(server: Process) -> int:
        return load.streams(server, body, count, events).events

    with running(servers.paced_upstream(bench.home, events)) as upstream:
        with bench.side_by_side(upstream, "/v1") as pair:
            yield bench.compare(f"{count} streams, an event each 20 ms", 3, "event", pair, work)


def crowd(bench: Bench) -> Iterator[Row]:
    """More streams than one core carries at that pace: none may fail, all must be counted."""
    count, events = bench.pick(1000, 20), bench.pick(250, 20)
    yield measure_crowd(bench, "http", 60, count, events)
    yield measure_crowd(bench, "https", 150, count, events)


def measure_crowd(bench: Bench, scheme: str, bar: float, count: int, events: int) -> Row:
    """`count` streams at once of so many events; `bar` is in MB."""
    pem = servers.make_certificate(bench.home) if scheme == "https" else None
    with running(servers.paced_upstream(bench.home, events, pem)) as upstream:
        url = f"{scheme}://127.0.0.1:{upstream.port}/v1"
        with running(bench.build.gateway({"openai": url}, ca=pem), "/health") as gateway:
            began = time.monotonic()
            seen = load.streams(gateway, canned.request_body(stream=True), count, events)
            seconds, peak = time.monotonic() - began, gateway.peak_kb() / MB
            check_counters(gateway, count)
    detail = f"{seen.most:,} at once, {seen.events:,} events in {seconds:.0f} s, no error"
    return Row(f"{count:,} such streams, {scheme} upstream, peak RSS", peak, bar, "MB", detail)


def check_counters(gateway: Process, requests: int) -> None:
    """The gateway's own count of what it served must be exact."""
    text = gateway.fetch("/metrics")[1].decode()
    for name, label, each in (
        ("llm_requests_total", 'status="200"', 1),
        ("llm_tokens_total", 'direction="prompt"', canned.PROMPT_TOKENS),
        ("llm_tokens_total", 'direction="completion"', canned.COMPLETION_TOKENS),
    ):
        values = re.findall(rf"^{name}{{[^}}\n]*{label}[^}}\n]*}} (\S+)", text, re.M)
        if sum(map(float, values)) != requests * each:
            raise WrongAnswer(f"{name}{{{label}}}: {values}, not {requests} x {each}")


def idle(bench: Bench) -> Iterator[Row]:
    """How fast a gateway starts, and what it takes while nobody has asked it anything."""
    for how, script, bar in (("from bytecode", False, 26), ("as a script", True, 36)):
        seconds, memory = [], []
        for _ in range(bench.pick(9, 1)):
            gateway = bench.build.gateway({}, script=script)
            with running(gateway, "/health"):
                seconds.append(gateway.ready_seconds)
                memory.append(gateway.rss_kb() / MB)
        yield Row(f"idle RSS, {how}", statistics.median(memory), bar, "MB")
        worst = f"slowest of {len(seconds)}: {max(seconds):.2f} s"
        yield Row(f"exec to first /health, {how}", statistics.median(seconds), 0.25, "s", worst)


def connections(bench: Bench) -> Iterator[Row]:
    """Idle kept-alive clients."""
    count = bench.pick(2000, 50)
    with running(bench.build.gateway({}), "/health") as gateway:
        before = gateway.rss_kb()
        clients = load.idle_connections(gateway, count)
        each = (gateway.rss_kb() - before) / count
        if gateway.fetch("/health")[0] != 200:
            raise WrongAnswer("not served beside idle connections")
        for client in clients:
            client.close()
    yield Row(f"{count:,} idle connections, RSS for each", each, 10, "kB")


def large_body(bench: Bench) -> Iterator[Row]:
    """A body that the upstream reads to its end; streamed, so that the gateway must splice it."""
    size = bench.pick(10, 1) * 1024 * MB
    large = canned.request_body(True, canned.SENTENCE * (size // len(canned.SENTENCE)))
    with running(servers.paced_upstream(bench.home, 2)) as upstream:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        with running(bench.build.gateway({"openai": url}), "/health") as gateway:
            load.post(gateway, canned.request_body(stream=True))
            before = gateway.rss_kb()
            gateway.reset_peak()
            for _ in range(3):
                load.post(gateway, large)
            peak, after = gateway.peak_kb() - before, gateway.rss_kb() - before
    what = f"body of {size // MB // 1024} MB, three times"
    yield Row(f"{what}: peak RSS", peak * 1024 / size, 5, "x its size")
    yield Row(f"{what}: RSS left behind", after / MB, 4, "MB")


Scenario = Callable[[Any], Iterator[Row]]
# A new row is yielded by a scenario; a new scenario is a function and its name here.
SCENARIOS: list[Scenario] = [
    chat, stream, translated, pairs, long_conversation, paced, crowd, idle, connections, large_body,
]  # fmt: skip


def machine(python: str) -> str:
    """Where the figures come from."""
    ask = [python, "-c", "import sys; print(sys.version.split()[0])"]
    version = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    ask = [str(servers.NGINX), "-v"]
    nginx = subprocess.run(ask, check=True, capture_output=True, text=True).stderr
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    parts = [f"gateway on {python} {version}", nginx.strip().split(": ")[-1]]
    parts += [f"{cpu[1] if cpu else 'CPU'} ({platform.machine()})", f"Linux {platform.release()}"]
    parts.append(f"load {os.getloadavg()[0]:.1f} at the start")
    return ", ".join(parts)


def missing(python: str) -> str | None:
    """What is not installed, with the command that installs it."""
    needs = {"nginx-light": servers.NGINX, "wrk": load.WRK, "openssl": servers.OPENSSL}
    absent = [package for package, found in needs.items() if not found]
    if absent:
        return f"the bench needs more than there is: apt-get install {' '.join(absent)}"
    if not Path(python).exists():
        return f"the bench measures on Debian's {python}, which is not here; see --python"
    return None


def rows(scenarios: Sequence[Scenario], bench: Any, only: str) -> Iterator[Row | None]:
    """All rows; None for a scenario that does not work, which must not hide the others."""
    for scenario in scenarios:
        if only in scenario.__name__:
            try:
                yield from scenario(bench)
            except Exception as error:
                print(f"{scenario.__name__} does not work: {error!r}", file=sys.stderr)
                yield None


def main() -> int:
    names = ", ".join(scenario.__name__ for scenario in SCENARIOS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="does it work? nothing about speed")
    parser.add_argument("--only", default="", metavar="WORD", help=f"of {names}")
    parser.add_argument("--python", default="/usr/bin/python3", help="runs the gateway")
    args = parser.parse_args()
    problem = missing(args.python)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home), servers.Build(args.python, Path(home)), args.smoke)
        lines, failed = tabulate(SCENARIOS, bench, args, is_lenient=args.smoke)
    if not (args.smoke or args.only):
        RESULTS.write_text("\n".join(lines) + "\n")
    return int(failed)


def tabulate(scenarios: Sequence[Scenario], bench: Any, args: argparse.Namespace,
             is_lenient: bool = False) -> tuple[list[str], bool]:  # fmt: skip
    """Prints the rows as they come; returns the table, and whether anything failed: if lenient,
    only what does not work."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # for the servers too
    lines = [machine(args.python), "", "| | measured | at most | | |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    failed = False
    for row in rows(scenarios, bench, args.only):
        failed |= row is None or not (row.ok or is_lenient)
        if row:
            lines.append(str(row))
            print(row, flush=True)
    return lines, failed


if __name__ == "__main__":
    sys.exit(main())
