"""Clients that ask what their scripts say, and hold the answers against them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from canned import MARK
from script import STEADY, Script
from scripted import Upstream, chat_events

PATIENCE = 30.0  # seconds; a client that waits longer has been left hanging
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)")
CHUNK = re.compile(rb"[0-9a-f]+\r\n([^\r]+)\r\n")  # no content here has a CR
DELTA = re.compile(rb'"delta":\{"content":"([^"]*)"\}')


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes
    is_whole: bool


def read_answer(data: bytes) -> Answer:
    """What came so far; a chunked body without its chunks."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = CONTENT_LENGTH.search(head)
    if length:
        is_whole = len(body) == int(length[1])
    else:
        is_whole = data.endswith(b"\r\n0\r\n\r\n")
        body = b"".join(CHUNK.findall(body))
    return Answer(int(head[9:12] or 0), head, body, is_whole)


class Caller(asyncio.Protocol):
    """A client's connection, kept alive; one request at a time."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.data = bytearray()
        self.script: Script | None = None
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def ask(self, script: Script) -> Answer:
        loop = asyncio.get_running_loop()
        self.script, self.end = script, loop.create_future()
        self.data.clear()
        script.leave = self.leave
        alarm = loop.call_later(PATIENCE, self.despair)
        self.transport.write(script.request())
        await self.end
        alarm.cancel()
        return read_answer(bytes(self.data))

    def data_received(self, data: bytes) -> None:
        self.data += data
        script = self.script
        if script and script.on_seen and MARK in data:
            on_seen, script.on_seen = script.on_seen, None
            on_seen()
        if data.endswith(b"\r\n0\r\n\r\n") or read_answer(bytes(self.data)).is_whole:
            self.finish()

    def connection_lost(self, error: object) -> None:
        self.is_open = False
        self.finish()

    def finish(self) -> None:
        if self.script and not self.end.done():
            self.end.set_result(None)

    def despair(self) -> None:
        self.upstream.tally.hung += 1
        self.transport.abort()

    def leave(self) -> None:
        """By closing, by a reset, or by half a close."""
        assert self.script
        self.script.left_at = time.monotonic()
        manner = self.script.number % 3
        if manner == 0:
            self.transport.close()
        elif manner == 1:
            linger = struct.pack("ii", 1, 0)
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        else:
            self.transport.write_eof()


def complaint(script: Script, answer: Answer) -> str:
    """What is wrong with an answer, or ""."""
    if script.left_at is not None:
        return ""
    if not answer.is_whole:
        return "cut"
    act = script.act
    if act.status and answer.status != (200 if act.is_midway else act.status):
        return f"not {act.status}"
    try:
        if not act.status:
            return "" if seen_status(answer) else "no honest end"
        if act.app == STEADY:
            return wrong_stream(script, answer) if script.is_stream else wrong_body(script, answer)
        return wrong_failure(script, answer)
    except (ValueError, LookupError, TypeError) as error:
        return repr(error)


def wrong_body(script: Script, answer: Answer) -> str:
    if script.provider == "openai":
        return "" if answer.body == script.sent else "changed"
    wire = json.loads(answer.body)
    told = script.text, *script.usage[:2]
    seen = wire["choices"][0]["message"]["content"], *usage_of(wire)
    return "" if seen == told else f"not {told}"


def wrong_stream(script: Script, answer: Answer) -> str:
    usage = [usage_of(event) for event in events_of(answer) if event.get("usage")]
    if usage != [script.usage[:2]] * script.wants_usage:
        return f"usage is {usage}, not {script.usage}"
    if script.provider == "openai":
        events = chat_events(script)
        wanted = events if script.wants_usage else events[:-2] + events[-1:]
        return "" if answer.body == b"".join(wanted) else "changed"
    if b"".join(DELTA.findall(answer.body)).decode() != script.text:
        return "text is missing"
    return "" if answer.body.endswith(b"data: [DONE]\n\n") else "no [DONE]"


def seen_status(answer: Answer) -> int:
    """How an answer ended that may have been cut anywhere; 0 where that cannot be told."""
    if answer.status == 200 and (answer.body.endswith(b"data: [DONE]\n\n")):
        return 200
    last = events_of(answer)[-1] if answer.status == 200 else json.loads(answer.body)
    return 502 if last.get("error") else 0


def wrong_failure(script: Script, answer: Answer) -> str:
    if not script.act.is_midway:
        return "" if json.loads(answer.body)["error"]["message"] else "no words"
    if b"[DONE]" in answer.body:
        return "a normal end"
    *before, last = events_of(answer)
    seen = any(MARK.decode() in str(event) for event in before)
    return "" if seen and last["error"]["message"] else "no error event"


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """All but [DONE]; every event must be whole."""
    *events, rest = answer.body.split(b"\n\n")
    if rest:
        raise ValueError(f"half an event: {rest!r}")
    texts = [event.lstrip(b"\n").removeprefix(b"data: ") for event in events]
    return [json.loads(text) for text in texts if text != b"[DONE]"]


def usage_of(wire: dict[str, Any]) -> tuple[int, int]:
    return wire["usage"]["prompt_tokens"], wire["usage"]["completion_tokens"]


async def run_scripts(
    port: int, upstream: Upstream, scripts: Iterator[Script], concurrency: int
) -> int:
    """Plays them all, so many at a time; returns how many there were."""
    loop, played = asyncio.get_running_loop(), 0

    async def work() -> None:
        nonlocal played
        caller: Caller | None = None
        for script in scripts:
            if caller is None or not caller.is_open:
                new = loop.create_connection(lambda: Caller(upstream), "127.0.0.1", port)
                caller = (await new)[1]
            upstream.scripts[script.number] = script
            answer = await caller.ask(script)
            settle(upstream, script, answer)
            played += 1
            if b"\r\nconnection: close" in answer.head or script.left_at is not None:
                caller.is_open = False
        if caller:
            caller.transport.close()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return played


def settle(upstream: Upstream, script: Script, answer: Answer) -> None:
    wrong = complaint(script, answer)
    if not (script.act.status or wrong):
        script.act = script.act._replace(status=seen_status(answer))
        upstream.tally.count(script)
    if script.act.spoil:
        upstream.tally.count(script)  # the upstream never hears of it
    if wrong:
        upstream.tally.faults.append(f"{wrong}: {answer} for {script}")
    if script.left_at is None:
        upstream.scripts.pop(script.number, None)
