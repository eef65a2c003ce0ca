"""The load: wrk for short answers, a bare asyncio client for streams, plain sockets to idle."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import canned
from servers import Process

WRK = shutil.which("wrk")
WRK_CONNECTIONS = 32
SCRIPT = Path(__file__).with_name("post.lua")
STREAM_END = b"data: [DONE]\n\n\r\n0\r\n\r\n"


class WrongAnswer(Exception):
    """Something does not work; speed is no matter here."""


def wrk(server: Process, body: bytes, home: Path, seconds: int) -> int:
    """Requests answered in `seconds`, over kept-alive connections; any error is a failure."""
    (home / "request.json").write_bytes(body)
    headers = [x for k, v in canned.REQUEST_HEADERS.items() for x in ("-H", f"{k}: {v}")]
    url = f"http://127.0.0.1:{server.port}{server.path}"
    options = ["-t1", f"-c{WRK_CONNECTIONS}", f"-d{seconds}s", "--timeout", "10s"]
    argv = [str(WRK), *options, *headers, "-s", str(SCRIPT), url, "--", str(home / "request.json")]
    output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    result = re.search(r"requests=(\d+) errors=(\d+)", output)
    if not result or result[2] != "0" or result[1] == "0":
        raise WrongAnswer(f"{server.name}: wrk says {output[-400:]}")
    return int(result[1])


def http_request(path: str, body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1"]
    lines += [f"{k}: {v}" for k, v in canned.REQUEST_HEADERS.items()]
    lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@dataclass
class Crowd:
    """What a crowd of streams saw together."""

    events: int = 0
    begun: int = 0
    ended: int = 0
    most: int = 0  # streams open at once, each with its answer begun


class StreamClient(asyncio.Protocol):
    """One stream: counts marks and looks at how it begins and ends, no more."""

    def __init__(self, request: bytes, crowd: Crowd) -> None:
        self.request, self.crowd = request, crowd
        self.start = self.tail = b""
        self.events = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.start:
            self.start = data
            self.crowd.begun += 1
            self.crowd.most = max(self.crowd.most, self.crowd.begun - self.crowd.ended)
        self.events += data.count(canned.MARK)
        self.tail = (self.tail + data)[-len(STREAM_END) :]
        if self.tail == STREAM_END:
            self.transport.close()

    def connection_lost(self, error: object) -> None:
        self.crowd.ended += bool(self.start)
        self.crowd.events += self.events
        if self.start.startswith(b"HTTP/1.1 200 ") and self.tail == STREAM_END:
            self.done.set_result(None)
        else:
            seen = f"{self.start[:200]!r} ... {self.tail!r}, {self.events} events, {error}"
            self.done.set_exception(WrongAnswer(f"a stream ended wrongly: {seen}"))


async def _streams(server: Process, body: bytes, count: int, seconds: float) -> Crowd:
    crowd, request = Crowd(), http_request(server.path, body)
    loop = asyncio.get_running_loop()

    async def one() -> None:
        client = StreamClient(request, crowd)
        await loop.create_connection(lambda: client, "127.0.0.1", server.port)
        await client.done

    await asyncio.wait_for(asyncio.gather(*[one() for _ in range(count)]), seconds)
    return crowd


def streams(server: Process, body: bytes, count: int, events: int, seconds: float = 120) -> Crowd:
    """Open `count` streams at once, read all to their ends; each must have exactly `events`."""
    try:
        crowd = asyncio.run(_streams(server, body, count, seconds))
    except asyncio.TimeoutError:
        raise WrongAnswer(f"{server.name}: streams still open after {seconds:.0f} s") from None
    if crowd.events != count * events:
        raise WrongAnswer(f"{server.name}: {crowd.events} events, not {count} x {events}")
    return crowd


def post(server: Process, body: bytes) -> bytes:
    """One request that must be answered with 200; returns the answer's body."""
    status, content = server.fetch(server.path, body, canned.REQUEST_HEADERS)
    if status != 200:
        raise WrongAnswer(f"{server.name}: {status} {content[:300]!r}")
    return content


def connections(server: Process, count: int) -> list[socket.socket]:
    """Connections that say nothing."""
    return [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(count)]


def idle_connections(server: Process, count: int) -> list[socket.socket]:
    """Kept-alive connections, each of which has asked once and now says nothing."""
    idle = []
    for _ in range(count):
        idle += connections(server, 1)
        connection = idle[-1]
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        if not connection.recv(65536).startswith(b"HTTP/1.1 200 "):
            raise WrongAnswer("an idle connection's first request was not answered")
    return idle
