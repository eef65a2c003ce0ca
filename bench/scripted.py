"""An upstream that does with each request what its script says, and counts it."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from canned import MODELS
from script import IMPATIENT, STEADY, Act, Script, Tally, Usage

# ---- what it says ----


def plain_body(script: Script) -> bytes:
    if script.provider == "anthropic":
        block = '{"type":"text","text":"%s"}' % script.text
        return message(script, block, '"end_turn"', script.usage.completion).encode()
    return (
        '{"id":"chatcmpl-%d","object":"chat.completion","created":1765432100,"model":"gpt-5.2",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"%s","refusal":null},'
        '"logprobs":null,"finish_reason":"stop"}],"usage":%s}'
        % (script.number, script.text, chat_usage(script.usage))
    ).encode()


def message(script: Script, content: str, stop: str, completion: int) -> str:
    usage = script.usage
    return (
        '{"id":"msg_%d","type":"message","role":"assistant","model":"claude","content":[%s],'
        '"stop_reason":%s,"stop_sequence":null,"usage":{"input_tokens":%d,'
        '"cache_read_input_tokens":%d,"cache_creation_input_tokens":%d,'
        '"cache_creation":{"ephemeral_1h_input_tokens":%d},"output_tokens":%d,'
        '"output_tokens_details":{"thinking_tokens":%d}}}'
    ) % (
        script.number, content, stop, usage.prompt - usage.cache_read - usage.cache_write,
        usage.cache_read, usage.cache_write, usage.cache_write_1h, completion, usage.reasoning,
    )  # fmt: skip


def chat_usage(usage: Usage) -> str:
    return (
        '{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":'
        '{"cached_tokens":%d},"completion_tokens_details":{"reasoning_tokens":%d}}'
    ) % (*usage[:2], sum(usage[:2]), usage.cache_read, usage.reasoning)


def stream_events(script: Script) -> list[bytes]:
    return (chat_events if script.provider == "openai" else message_events)(script)


def chat_events(script: Script) -> list[bytes]:
    """The last but one is the usage chunk."""
    deltas = ['{"role":"assistant","content":""}']
    deltas += ['{"content":"%s"}' % piece for piece in script.pieces]
    choices = ['{"index":0,"delta":%s,"finish_reason":null}' % delta for delta in deltas]
    choices.append('{"index":0,"delta":{},"finish_reason":"stop"}')
    told = [(choice, "null") for choice in choices] + [("", chat_usage(script.usage))]
    head = '{"id":"chatcmpl-%d","object":"chat.completion.chunk","created":1765432100,"choices":'
    texts = [head % script.number + "[%s],\"usage\":%s}" % each for each in told]
    return [f"data: {text}\n\n".encode() for text in (*texts, "[DONE]")]


def message_events(script: Script) -> list[bytes]:
    delta = '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}'
    usage = '{"output_tokens":%d,"output_tokens_details":{"thinking_tokens":%d}}'
    usage %= script.usage.completion, script.usage.reasoning
    texts = [
        '{"type":"message_start","message":%s}' % message(script, "", "null", 1),
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        *(delta % piece for piece in script.pieces),
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":%s}' % usage,
        '{"type":"message_stop"}',
    ]
    return [f"event: {json.loads(text)['type']}\ndata: {text}\n\n".encode() for text in texts]


def error_body(provider: str, status: int) -> bytes:
    """As the provider spells it."""
    kind = ERROR_TYPES[provider].get(status, "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": f"The script says {status}."}
    if provider == "anthropic":
        return json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode()
    return json.dumps({"error": {**error, "param": None, "code": None}}).encode()


def error_event(provider: str, status: int) -> bytes:
    name = b"event: error\n" if provider == "anthropic" else b""
    return b"%bdata: %b\n\n" % (name, error_body(provider, status))


ERROR_TYPES = {
    "openai": {
        429: "rate_limit_exceeded", 500: "server_error", 502: "server_error", 503: "server_error",
    },
    "anthropic": {
        401: "authentication_error", 402: "billing_error", 403: "permission_error",
        404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
        500: "api_error", 502: "api_error", 503: "api_error", 529: "overloaded_error",
    },
}  # fmt: skip


def head(status: int, kind: str, more: str = "", version: str = "1.1") -> bytes:
    lines = f"content-type: {kind}\r\nx-request-id: req_1\r\nset-cookie: a=b\r\n{more}\r\n"
    return f"HTTP/{version} {status} Said\r\n{lines}".encode()


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def framed(framing: str, status: int, kind: str, body: bytes, more: str) -> tuple[bytes, bool]:
    """A whole answer, and whether its end is the connection's."""
    if framing in ("close", "http10"):
        return head(status, kind, more, "1.0" if framing == "http10" else "1.1") + body, True
    if framing in ("chunked", "extended"):
        extension = b';name="value"' if framing == "extended" else b""
        trailers = b"x-checksum: 1\r\n" if framing == "extended" else b""
        halves = body[: len(body) // 2], body[len(body) // 2 :]
        chunks = b"".join(chunk(half, extension) for half in halves if half)
        last = b"0%b\r\n%b\r\n" % (extension, trailers)
        return head(status, kind, f"{CHUNKED}{more}") + chunks + last, False
    if framing == "gzip":
        body, more = gzip.compress(body, 1), f"content-encoding: gzip\r\n{more}"
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" if framing == "interim" else b""
    return interim + head(status, kind, f"content-length: {len(body)}\r\n{more}") + body, False


# ---- the server ----

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
NUMBER = re.compile(rb"script-(\d+)")
JSON_TYPE, EVENTS = "application/json", "text/event-stream"
LENGTH, CHUNKED = "content-length: 99\r\n", "transfer-encoding: chunked\r\n"


class Upstream:
    """Speaks both wires on one port."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self.port, self.random = port, rng
        self.tally = Tally()
        self.scripts: dict[int, Script] = {}  # those that are under way
        self.peers: set[Peer] = set()
        self.urls = dict.fromkeys(MODELS, f"http://127.0.0.1:{port}/v1")

    async def listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Peer(self), "127.0.0.1", self.port, backlog=4096)

    @property
    def busy(self) -> int:
        return sum(peer.script is not None for peer in self.peers)

    def close_idle(self) -> None:
        for peer in self.peers:
            if peer.script is None:
                peer.transport.close()


class Peer(asyncio.Protocol):
    """One of the gateway's connections."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream, self.tally = upstream, upstream.tally
        self.buffer = bytearray()
        self.script: Script | None = None  # while it is acted on
        self.served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.upstream.peers.add(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        length = CONTENT_LENGTH.search(self.buffer, 0, end) if end > 3 else None
        if not length or len(self.buffer) < end + int(length[1]):
            return
        request = bytes(self.buffer)
        self.buffer.clear()
        number = NUMBER.search(request, end)
        script = self.upstream.scripts.get(int(number[1])) if number else None
        if script is None or script.act.play is None:
            self.tally.faults.append(f"the upstream did not expect {request!r}")
            return
        if script.is_stream and script.provider == "openai" and b'"include_usage"' not in request:
            self.tally.faults.append(f"usage was not asked for: {request!r}")
        script.tries += 1
        self.script = script
        script.act.play(self, script)
        self.served += 1

    def connection_lost(self, error: object) -> None:
        self.upstream.peers.discard(self)
        script, self.script = self.script, None
        if script and script.left_at is not None:
            self.tally.count(script)
            waited = time.monotonic() - script.left_at
            self.tally.slowest_goodbye = max(self.tally.slowest_goodbye, waited)
            self.upstream.scripts.pop(script.number, None)

    def answer(self, script: Script, body: bytes, status: int = 200,
               kind: str = JSON_TYPE, more: str = "") -> None:  # fmt: skip
        """A whole answer in the script's framing, cut anywhere into up to three pieces, each sent
        in a turn of the loop of its own."""
        self.tally.count(script)
        script.sent = body
        data, closes = framed(script.framing, status, kind, body, more)
        rng, loop = self.upstream.random, asyncio.get_running_loop()
        cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(3)))
        for start, stop in zip([0, *cuts], [*cuts, len(data)]):
            loop.call_soon(self.transport.write, data[start:stop])
        loop.call_soon(self.done, closes)

    def begin(self, script: Script, then: Callable[[], None] | None) -> bytes:
        """The first half of a stream; what follows waits until the client has seen content.
        Returns the other half."""
        script.on_seen = then
        events = stream_events(script)
        half = len(events) // 2 + 1
        self.transport.write(head(200, EVENTS, CHUNKED) + chunk(b"".join(events[:half])))
        return b"".join(events[half:])

    def end(self, data: bytes, closes: bool = False, resets: bool = False) -> None:
        """The last that the client's request gets."""
        if self.script:
            self.tally.count(self.script)
        self.transport.write(data)
        self.done(closes, resets)

    def done(self, closes: bool = False, resets: bool = False) -> None:
        self.script = None
        if resets:
            linger = struct.pack("ii", 1, 0)
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        elif closes:
            self.transport.close()


# ---- what it does: plays are called with the connection and the script ----

Play = Callable[[Peer, Script], None]


def answer(peer: Peer, script: Script) -> None:
    if script.is_stream:
        return peer.answer(script, b"".join(stream_events(script)), kind=EVENTS)
    return peer.answer(script, plain_body(script))


def race(peer: Peer, script: Script) -> None:
    """A kept-alive connection closes as the request comes."""
    if not peer.served or script.tries > 1:
        return answer(peer, script)
    peer.tally.races += 1
    return peer.done(closes=True, resets=bool(script.number % 2))


def late_death(peer: Peer, script: Script) -> None:
    """Has the request for 2 s, may have acted on it, and dies."""
    peer.tally.count(script)
    peer.tally.repeated += script.tries > 1
    asyncio.get_running_loop().call_later(2, peer.done, True)


def says(
    status: int, body: bytes | None = None, kind: str = JSON_TYPE, more: str = ""
) -> Play:
    """A whole answer; the provider's error of that status, where not said otherwise."""

    def play(peer: Peer, script: Script) -> None:
        content = error_body(script.provider, status) if body is None else body
        peer.answer(script, content, status, kind, more)

    return play


def sends(data: bytes, closes: bool = True, resets: bool = False) -> Play:
    """These bytes, and then the end of the connection."""
    return lambda peer, script: peer.end(data, closes, resets)


def midway(data: bytes, closes: bool = False, resets: bool = False) -> Play:
    """Half of a stream, these bytes of the body, and perhaps the end of the connection."""

    def play(peer: Peer, script: Script) -> None:
        peer.begin(script, lambda: peer.end(data, closes, resets))

    return play


def error_first(peer: Peer, script: Script) -> None:
    peer.answer(script, error_event(script.provider, 429), kind=EVENTS)


def error_midway(peer: Peer, script: Script) -> None:
    data = chunk(error_event(script.provider, 500)) + b"0\r\n\r\n"
    peer.begin(script, lambda: peer.end(data))


def cut_anywhere(peer: Peer, script: Script) -> None:
    """A good answer, but not all of it. Counted by the client: it depends on how far it came."""
    whole = b"".join(stream_events(script)) if script.is_stream else plain_body(script)
    kind = EVENTS if script.is_stream else JSON_TYPE
    data, _ = framed(script.framing, 200, kind, whole, "")
    rng = peer.upstream.random
    peer.transport.write(data[: rng.randrange(len(data))])
    peer.done(closes=True, resets=rng.random() < 0.5)


def waits(peer: Peer, script: Script) -> None:
    """Says nothing; the gateway is to lose patience."""
    peer.tally.count(script)


def stalls(peer: Peer, script: Script) -> None:
    """Stops midway."""
    peer.begin(script, lambda: peer.tally.count(script))


def left_waiting(peer: Peer, script: Script) -> None:
    """Says nothing; the client leaves."""
    assert script.leave
    asyncio.get_running_loop().call_soon(script.leave)


def left_midway(peer: Peer, script: Script) -> None:
    peer.begin(script, script.leave)


def status_act(provider: str, status: int) -> Act:
    """401 and 402 are about the gateway's key; Anthropic's 529 is everybody's 503."""
    seen = {401: 502, 402: 502}.get(status, status)
    if provider == "anthropic":
        seen = {529: 503, 408: 504}.get(seen, seen)
    label = "client_error" if status < 500 else "server_error"
    label = {401: "auth", 402: "auth", 429: "rate_limit"}.get(status, label)
    return Act(says(status, more="retry-after: 7\r\n"), seen, label, provider=provider)


BOMB = gzip.compress(b" " * (4 << 20), 9)

ANSWERS = [Act(answer, app=STEADY)]
RACES = [Act(race, app=STEADY)]
LEFT = [
    Act(left_waiting, 499, app=IMPATIENT),
    Act(left_midway, 499, app=IMPATIENT, streamed=True, is_midway=True),
]
REFUSED_BY_US = [
    Act(None, 401, spoil="key"), Act(None, 404, spoil="model"), Act(None, 400, spoil="json"),
    Act(None, 400, spoil="audio", provider="anthropic"),
]  # fmt: skip
STATUSES = [
    status_act(provider, status) for provider in MODELS
    for status in (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529)
]  # fmt: skip
FAULTS = [
    Act(sends(b""), 502, "request_error"),
    Act(sends(b"", resets=True), 502, "request_error"),
    Act(sends(b"HTTP/1.1 200 OK\r\ncontent-ty"), 502, "request_error"),
    Act(sends(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), 502, "bad_answer"),
    Act(sends(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000), 502, "bad_answer"),
    Act(sends(head(200, EVENTS, LENGTH + "content-length: 98\r\n")), 502, "bad_answer"),
    Act(sends(head(200, EVENTS, LENGTH + CHUNKED)), 502, "bad_answer"),
    Act(sends(b"HTTP/1.1 204 No Content\r\n\r\n", closes=False), 502, "bad_answer"),
    Act(sends(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), 502, "bad_answer"),
    Act(says(502, b"<html>bad gateway</html>", "text/html"), 502, "server_error"),
    Act(says(302, b"", more="location: http://127.0.0.1:9/\r\n"), 502, "bad_answer"),
    Act(says(200, b"<html>hello</html>", "text/html"), 502, "bad_answer"),
    Act(says(200, b"[]"), 502, "bad_answer"),
    Act(says(200, b""), 502, "bad_answer"),
    Act(says(200, b"{", more="content-encoding: br\r\n"), 502, "bad_answer"),
    Act(says(200, BOMB, more="content-encoding: gzip\r\n"), 502, "bad_answer", streamed=False),
    Act(sends(head(200, JSON_TYPE, LENGTH) + b'{"id":'), 502, "bad_answer", streamed=False),
    Act(sends(head(200, JSON_TYPE, CHUNKED) + b"zz\r\n"), 502, "bad_answer", streamed=False),
    Act(error_first, 429, "rate_limit", streamed=True),
    Act(error_midway, 500, "stream_error", streamed=True, is_midway=True),
    Act(midway(b"40\r\ndata: {", closes=True), 502, "stream_error", streamed=True, is_midway=True),
    Act(midway(b"40\r\ndata: {", resets=True), 502, "stream_error", streamed=True, is_midway=True),
    Act(midway(b"0\r\n\r\n"), 502, "stream_error", streamed=True, is_midway=True),
]
DEADLINES = [  # these take as long as one
    Act(waits, 504, "timeout"),
    Act(stalls, 504, "timeout", streamed=True, is_midway=True),
]
CUTS = [Act(cut_anywhere, 0)]
LATE_DEATHS = [Act(late_death, 502, "request_error")]
