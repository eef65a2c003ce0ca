"""Requests of every kind, and an upstream that does with each what its script says.

Clients and upstream share a process, and scripts: the upstream finds a request's script by the
number in its prompt, acts by it, and counts what it did; the client holds the answer against it.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import canned
from canned import MARK, MODELS

PATIENCE = 30.0  # seconds; a client that waits longer was left hanging
KEYS = {app: f"vk-bench-{app}-0123456789" for app in ("steady", "unlucky", "impatient")}
FRAMINGS = ("length", "chunked", "extended", "interim", "close", "http10", "gzip")
# Dollars for a token, as LiteLLM's lists have them; each is a whole number of nano-dollars.
PRICES = {
    "openai": {"input": 2000, "output": 8000, "cache_read": 500},
    "anthropic": {"input": 3000, "output": 15000, "cache_read": 300, "cache_write": 3750,
                  "cache_write_1h": 6000},
}  # fmt: skip
LONG_PROMPT, LONG_FACTOR = 200_000, 2  # beyond so many tokens all of Claude's cost twice as much


class Usage(NamedTuple):
    """Tokens; `prompt` counts the cached ones too, `cache_write` those kept for an hour."""

    prompt: int
    completion: int
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    reasoning: int = 0

    def cost(self, provider: str) -> int:
        """Nano-dollars."""
        price = PRICES[provider]
        plain = self.prompt - self.cache_read - self.cache_write
        total = plain * price["input"] + self.completion * price["output"]
        total += self.cache_read * price["cache_read"]
        if self.cache_write:
            total += (self.cache_write - self.cache_write_1h) * price["cache_write"]
            total += self.cache_write_1h * price["cache_write_1h"]
        is_long = provider == "anthropic" and self.prompt > LONG_PROMPT
        return total * LONG_FACTOR if is_long else total


def price_list() -> dict[str, Any]:
    """The prices above in LiteLLM's format."""
    names = {"input": "input_cost_per_token", "output": "output_cost_per_token",
             "cache_read": "cache_read_input_token_cost",
             "cache_write": "cache_creation_input_token_cost",
             "cache_write_1h": "cache_creation_input_token_cost_above_1hr"}  # fmt: skip
    rows: dict[str, Any] = {}
    for provider, prices in PRICES.items():
        row = {names[kind]: nano / 1e9 for kind, nano in prices.items()}
        if provider == "anthropic":
            row.update({f"{name}_above_200k_tokens": cost * LONG_FACTOR
                        for name, cost in row.items()})  # fmt: skip
        rows[f"{provider}/{MODELS[provider]}"] = {"litellm_provider": provider, **row}
    return rows


# ---- scripts ----


class Act(NamedTuple):
    """What the upstream does with a request, and what must come of it.

    `status` is what the metric says, and the client's answer unless it `is_midway`: then that is a
    200 which ends in an error event. `label` is the provider error's.
    """

    play: Callable[[Peer, Script], None] | None  # None: it never gets there
    status: int = 200
    label: str = ""
    app: str = "unlucky"
    streamed: bool | None = None  # None: whether or not
    is_midway: bool = False
    provider: str = ""  # the only one that it is for


@dataclass
class Script:
    """One request."""

    number: int
    provider: str
    is_stream: bool
    wants_usage: bool
    act: Act
    usage: Usage
    words: int
    framing: str = "length"
    sent: bytes = b""  # the answer's content, as the upstream sent it
    tries: int = 0
    is_counted: bool = False
    on_seen: Callable[[], None] | None = None  # what waits for the first content at the client
    on_reached: Callable[[], None] | None = None  # called when the upstream has the request
    left_at: float | None = None  # when the client closed

    def request(self) -> bytes:
        """As the client sends it."""
        spoil = SPOILED.get(self.act)
        model = "gpt-absent" if spoil == "model" else MODELS[self.provider]
        prompt: Any = f"script-{self.number}. {canned.SENTENCE * (self.number % 7)}"
        if spoil == "audio":
            prompt = [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "ogg"}}]
        wire: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        if self.is_stream:
            wire["stream"] = True
        if self.wants_usage:
            wire["stream_options"] = {"include_usage": True}
        body = json.dumps(wire).encode()[: -1 if spoil == "json" else None]
        key = "vk-bench-nobody-0123456789" if spoil == "key" else KEYS[self.act.app]
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        ) % (key.encode(), len(body), body)

    def text(self) -> str:
        return " ".join(f"~w{i}" for i in range(self.words))


class Tally:
    """What the upstream did: requests, tokens, cost and errors, by the labels of the metrics."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in COUNTED}
        self.faults: list[str] = []  # what clients saw that they should not have
        self.hung = self.repeated = self.races = 0
        self.slowest_goodbye = 0.0  # from a client's close to the upstream's

    def count(self, script: Script, status: int | None = None) -> None:
        """Once for each script, at the act."""
        act, provider = script.act, script.provider
        if script.is_counted:
            return
        script.is_counted = True
        route = (act.app, provider, MODELS[provider])
        if SPOILED.get(act) in ("model", "json"):
            route = (act.app, "", "")
        elif SPOILED.get(act) == "key":
            route = ("", "", "")
        self.counts["llm_requests_total"][(*route, str(status or act.status))] += 1
        if act.label:
            self.counts["llm_provider_errors_total"][provider, act.label] += 1
        if script.is_stream and act.is_midway:
            self.counts["llm_usage_estimated_total"][route[1:]] += 1
        if act.app == "steady":
            self._count_usage(route, script.usage)

    def _count_usage(self, route: tuple[str, str, str], usage: Usage) -> None:
        tokens, details = self.counts["llm_tokens_total"], self.counts["llm_token_details_total"]
        tokens[(*route, "prompt")] += usage.prompt
        tokens[(*route, "completion")] += usage.completion
        for kind in ("cache_read", "cache_write", "reasoning"):
            details[(*route, kind)] += getattr(usage, kind)
        self.counts["llm_cost_dollars_total"][route] += usage.cost(route[1])

    def differences(self, metrics: str) -> dict[str, int]:
        """By how much each metric is off, over all its series. Tokens and cost are held against
        each other where the upstream told them all; what was estimated is another app's."""
        found: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in COUNTED}
        for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", metrics, re.M):
            key = tuple(re.findall(r'="([^"]*)"', labels))
            if name in found and (name in COUNTED_FOR_ALL or key[0] == "steady"):
                scale = 10**9 if name == "llm_cost_dollars_total" else 1
                found[name][key] = int(Decimal(value) * scale)
        return {
            name: sum(abs(found[name][key] - wanted[key]) for key in {*found[name], *wanted})
            for name, wanted in self.counts.items()
        }


COUNTED_FOR_ALL = (
    "llm_requests_total", "llm_provider_errors_total", "llm_usage_estimated_total",
)  # fmt: skip
COUNTED = (
    *COUNTED_FOR_ALL, "llm_tokens_total", "llm_token_details_total", "llm_cost_dollars_total",
)  # fmt: skip


# ---- what an upstream says ----


def plain_body(script: Script) -> bytes:
    usage, text = script.usage, script.text()
    if script.provider == "openai":
        message = '{"role":"assistant","content":"%s","refusal":null}' % text
        choice = '{"index":0,"message":%s,"logprobs":null,"finish_reason":"stop"}' % message
        head = '{"id":"chatcmpl-%d","object":"chat.completion","created":1765432100,' % script.number
        return (head + '"model":"gpt-5.2","choices":[%s],"usage":%s}'
                % (choice, chat_usage(usage))).encode()  # fmt: skip
    block = '{"type":"text","text":"%s"}' % text
    return message_shell(script, block, '"end_turn"', usage.completion).encode()


def message_shell(script: Script, content: str, stop: str, completion: int) -> str:
    return (
        '{"id":"msg_%d","type":"message","role":"assistant","model":"claude","content":[%s],'
        '"stop_reason":%s,"stop_sequence":null,"usage":%s}'
    ) % (script.number, content, stop, message_usage(script.usage, completion))


def chat_usage(usage: Usage) -> str:
    return (
        '{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":'
        '{"cached_tokens":%d},"completion_tokens_details":{"reasoning_tokens":%d}}'
    ) % (*usage[:2], sum(usage[:2]), usage.cache_read, usage.reasoning)


def message_usage(usage: Usage, completion: int) -> str:
    return (
        '{"input_tokens":%d,"cache_read_input_tokens":%d,"cache_creation_input_tokens":%d,'
        '"cache_creation":{"ephemeral_1h_input_tokens":%d},"output_tokens":%d,'
        '"output_tokens_details":{"thinking_tokens":%d}}'
    ) % (
        usage.prompt - usage.cache_read - usage.cache_write, usage.cache_read, usage.cache_write,
        usage.cache_write_1h, completion, usage.reasoning,
    )  # fmt: skip


def chat_event(script: Script, choices: str, usage: str = "null") -> bytes:
    return (
        'data: {"id":"chatcmpl-%d","object":"chat.completion.chunk","created":1765432100,'
        '"model":"gpt-5.2","choices":[%s],"usage":%s}\n\n'
    ).encode() % (script.number, choices.encode(), usage.encode())


def stream_events(script: Script, usage_chunk: bool = True) -> list[bytes]:
    words = [" " * bool(i) + f"~w{i}" for i in range(script.words)]
    if script.provider == "openai":
        deltas = ['{"role":"assistant","content":""}', *('{"content":"%s"}' % w for w in words)]
        choices = ['{"index":0,"delta":%s,"finish_reason":null}' % delta for delta in deltas]
        choices.append('{"index":0,"delta":{},"finish_reason":"stop"}')
        events = [chat_event(script, choice) for choice in choices]
        if usage_chunk:
            events.append(chat_event(script, "", chat_usage(script.usage)))
        return [*events, b"data: [DONE]\n\n"]
    texts = [
        '{"type":"message_start","message":%s}' % message_shell(script, "", "null", 1),
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        *('{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}' % w
          for w in words),
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":%d,'
        '"output_tokens_details":{"thinking_tokens":%d}}}'
        % (script.usage.completion, script.usage.reasoning),
        '{"type":"message_stop"}',
    ]  # fmt: skip
    return [f"event: {text[9:].partition(chr(34))[0]}\ndata: {text}\n\n".encode() for text in texts]


def error_body(provider: str, status: int) -> bytes:
    """As the provider spells it; the type is what its status implies."""
    kind = ERROR_TYPES[provider].get(status, "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": f"The script says {status}."}
    if provider == "openai":
        return json.dumps({"error": {**error, "param": None, "code": None}}).encode()
    return json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode()


ERROR_TYPES = {
    "openai": {429: "rate_limit_exceeded", 500: "server_error", 503: "server_error"},
    "anthropic": {
        401: "authentication_error", 402: "billing_error", 403: "permission_error",
        404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
        500: "api_error", 502: "api_error", 503: "api_error", 529: "overloaded_error",
    },
}  # fmt: skip


# ---- the upstream ----


class Upstream:
    """Listens on a port of its own for each provider's paths alike."""

    def __init__(self, port: int, tally: Tally, rng: random.Random) -> None:
        self.port, self.tally, self.random = port, tally, rng
        self.scripts: dict[int, Script] = {}
        self.peers: set[Peer] = set()

    @property
    def urls(self) -> dict[str, str]:
        return {provider: f"http://127.0.0.1:{self.port}/v1" for provider in MODELS}

    async def listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(lambda: Peer(self), "127.0.0.1", self.port, backlog=4096)

    def busy(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.script]

    def close_idle(self) -> None:
        for peer in self.peers:
            if not peer.script:
                peer.transport.close()


CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
NUMBER = re.compile(rb"script-(\d+)")


class Peer(asyncio.Protocol):
    """One of the gateway's connections."""

    transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
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
        if end < 4:
            return
        length = CONTENT_LENGTH.search(self.buffer, 0, end)
        number = NUMBER.search(self.buffer, end)
        if not length or len(self.buffer) < end + int(length[1]) or not number:
            return
        script = self.upstream.scripts[int(number[1])]
        hides = script.is_stream and script.provider == "openai"
        if hides and b'"include_usage"' not in self.buffer:
            self.upstream.tally.faults.append(f"usage was not asked for: {self.buffer!r}")
        self.buffer.clear()
        script.tries += 1
        self.script = script
        assert script.act.play
        script.act.play(self, script)
        self.served += 1
        if script.on_reached:
            script.on_reached()

    def connection_lost(self, error: object) -> None:
        self.upstream.peers.discard(self)
        script, self.script = self.script, None
        if script and script.left_at is not None:
            self.upstream.tally.count(script)
            waited = time.monotonic() - script.left_at
            self.upstream.tally.slowest_goodbye = max(self.upstream.tally.slowest_goodbye, waited)

    # ---- how it answers ----

    def write_all(self, data: bytes, closes: bool = False) -> None:
        """In up to three pieces, cut anywhere, each in a turn of the loop of its own."""
        self.upstream.tally.count(self.script) if self.script else None
        rng, loop = self.upstream.random, asyncio.get_running_loop()
        cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(3)))
        for start, stop in zip([0, *cuts], [*cuts, len(data)]):
            loop.call_soon(self.transport.write, data[start:stop])
        loop.call_soon(self.done, closes)

    def done(self, closes: bool) -> None:
        self.script = None
        if closes:
            self.transport.close()

    def answer(self, script: Script, body: bytes, status: int = 200, kind: str = "application/json",
               more: str = "") -> None:  # fmt: skip
        """A whole answer in the script's framing."""
        script.sent = body
        self.write_all(*framed(script.framing, status, kind, body, more))

    def begin(self, script: Script, then: Callable[[], None]) -> None:
        """The first half of a stream; what follows waits until the client has seen content."""
        script.on_seen = then
        events = stream_events(script)
        half = b"".join(events[: len(events) // 2 + 1])
        self.transport.write(head_of(200, EVENTS, "transfer-encoding: chunked\r\n") + chunk(half))

    def end_with(self, data: bytes, closes: bool = False, resets: bool = False) -> None:
        if self.script:
            self.upstream.tally.count(self.script)
        self.transport.write(data)
        self.done(closes)
        if resets:
            self.transport.abort()


EVENTS = "text/event-stream"


def head_of(status: int, kind: str, more: str = "", version: str = "1.1") -> bytes:
    return (f"HTTP/{version} {status} Said\r\ncontent-type: {kind}\r\nx-request-id: req_1\r\n"
            f"set-cookie: a=b\r\n{more}\r\n").encode()  # fmt: skip


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def framed(framing: str, status: int, kind: str, body: bytes, more: str = "") -> tuple[bytes, bool]:
    """The answer's bytes, and whether its end is the connection's."""
    if framing in ("close", "http10"):
        return head_of(status, kind, more, "1.0" if framing == "http10" else "1.1") + body, True
    if framing in ("chunked", "extended"):
        extension, trailers = b"", b""
        if framing == "extended":
            extension, trailers = b';name="value"', b"x-checksum: 1\r\n"
        middle = len(body) // 2
        chunks = b"".join(chunk(part, extension) for part in (body[:middle], body[middle:]) if part)
        head = head_of(status, kind, f"transfer-encoding: chunked\r\n{more}")
        return head + chunks + b"0%b\r\n%b\r\n" % (extension, trailers), False
    if framing == "gzip":
        body, more = gzip.compress(body, 1), f"content-encoding: gzip\r\n{more}"
    head = head_of(status, kind, f"content-length: {len(body)}\r\n{more}")
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" if framing == "interim" else b""
    return interim + head + body, False


# ---- what it does ----


def play_answer(peer: Peer, script: Script) -> None:
    if script.is_stream:
        events = b"".join(stream_events(script))
        return peer.answer(script, events, kind=EVENTS)
    return peer.answer(script, plain_body(script))


def play_race(peer: Peer, script: Script) -> None:
    """Closes a kept-alive connection as the request comes."""
    if not peer.served or script.tries > 1:
        return play_answer(peer, script)
    peer.upstream.tally.races += 1
    return peer.end_early(resets=bool(script.number % 2))


def play_late_death(peer: Peer, script: Script) -> None:
    """Has the request, acts on it for 2 s, and dies."""
    peer.upstream.tally.count(script)
    peer.upstream.tally.repeated += script.tries > 1
    asyncio.get_running_loop().call_later(2, peer.transport.abort)


def play_status(status: int) -> Callable[[Peer, Script], None]:
    def play(peer: Peer, script: Script) -> None:
        more = "retry-after: 7\r\n" if status == 429 else ""
        peer.answer(script, error_body(script.provider, status), status, more=more)

    return play


def play_bytes(data: bytes, closes: bool = True, resets: bool = False
               ) -> Callable[[Peer, Script], None]:  # fmt: skip
    """These bytes, and then the end of the connection."""
    return lambda peer, script: peer.end_with(data, closes, resets)


def play_body(body: bytes, status: int = 200, kind: str = "application/json", more: str = ""
              ) -> Callable[[Peer, Script], None]:  # fmt: skip
    return lambda peer, script: peer.answer(script, body, status, kind, more)


def play_error_first(peer: Peer, script: Script) -> None:
    peer.answer(script, error_event(script.provider, 429), kind=EVENTS)


def play_error_midway(peer: Peer, script: Script) -> None:
    event = error_event(script.provider, 500)
    peer.begin(script, lambda: peer.end_with(chunk(event) + b"0\r\n\r\n"))


def play_cut_midway(resets: bool) -> Callable[[Peer, Script], None]:
    """In the middle of a chunk, by FIN or RST."""

    def play(peer: Peer, script: Script) -> None:
        peer.begin(script, lambda: peer.end_with(b"40\r\ndata: {", not resets, resets))

    return play


def play_no_end(peer: Peer, script: Script) -> None:
    """A clean end of the body, but not of the stream."""
    peer.begin(script, lambda: peer.end_with(b"0\r\n\r\n"))


def play_stall(peer: Peer, script: Script) -> None:
    peer.begin(script, lambda: peer.upstream.tally.count(script))


def play_nothing(peer: Peer, script: Script) -> None:
    """The client is to leave, or the gateway to lose patience."""
    if script.act.app != "impatient":
        peer.upstream.tally.count(script)


def play_content_until_left(peer: Peer, script: Script) -> None:
    peer.begin(script, lambda: None)


def error_event(provider: str, status: int) -> bytes:
    name = b"event: error\n" if provider == "anthropic" else b""
    return b"%bdata: %b\n\n" % (name, error_body(provider, status))


def status_act(provider: str, status: int) -> Act:
    """401 and 402 are about the gateway's key; 529 and 408 are Anthropic's way to say 503, 504."""
    seen = {401: 502, 402: 502}.get(status, status)
    if provider == "anthropic":
        seen = {529: 503, 408: 504}.get(seen, seen)
    label = {401: "auth", 402: "auth", 429: "rate_limit"}.get(
        status, "client_error" if status < 500 else "server_error")  # fmt: skip
    return Act(play_status(status), seen, label, provider=provider)


BOMB = gzip.compress(b" " * (4 << 20), 9)
ANSWER = Act(play_answer, app="steady")
RACE = Act(play_race, app="steady")
LATE_DEATH = Act(play_late_death, 502, "request_error")
LEAVE_WAITING = Act(play_nothing, 499, app="impatient")
LEAVE_MIDWAY = Act(play_content_until_left, 499, app="impatient", streamed=True, is_midway=True)
REFUSED_BY_US = {
    Act(None, 401, app="unlucky"): "key", Act(None, 404, app="unlucky"): "model",
    Act(None, 400, app="unlucky"): "json",
    Act(None, 400, app="unlucky", provider="anthropic"): "audio",
}  # fmt: skip
SPOILED: Mapping[Act, str] = REFUSED_BY_US
STATUS_ACTS = [
    status_act(provider, status) for provider in MODELS
    for status in (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529)
]  # fmt: skip
FAULT_ACTS = [
    Act(play_bytes(b""), 502, "request_error"),
    Act(play_bytes(b"", False, resets=True), 502, "request_error"),
    Act(play_bytes(b"HTTP/1.1 200 OK\r\ncontent-ty"), 502, "request_error"),
    Act(play_bytes(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), 502, "bad_answer"),
    Act(play_bytes(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000), 502, "bad_answer"),
    Act(play_bytes(head_of(200, "text/plain", "content-length: 9\r\ncontent-length: 8\r\n")),
        502, "bad_answer"),
    Act(play_bytes(head_of(200, "text/plain", "content-length: 9\r\ntransfer-encoding: chunked\r\n")),
        502, "bad_answer"),
    Act(play_bytes(b"HTTP/1.1 204 No Content\r\n\r\n", closes=False), 502, "bad_answer"),
    Act(play_bytes(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), 502, "bad_answer"),
    Act(play_body(b"<html>bad gateway</html>", 502, "text/html"), 502, "server_error"),
    Act(play_body(b"", 302, more="location: http://127.0.0.1:9/\r\n"), 502, "bad_answer"),
    Act(play_body(b"<html>hello</html>", 200, "text/html"), 502, "bad_answer"),
    Act(play_body(b"[]"), 502, "bad_answer"),
    Act(play_body(b""), 502, "bad_answer"),
    Act(play_body(b"{", more="content-encoding: br\r\n"), 502, "bad_answer"),
    Act(play_bytes(head_of(200, "application/json", "content-length: 99\r\n") + b'{"id":'),
        502, "bad_answer", streamed=False),
    Act(play_bytes(head_of(200, "application/json", "transfer-encoding: chunked\r\n") + b"zz\r\n"),
        502, "bad_answer", streamed=False),
    Act(play_body(BOMB, more="content-encoding: gzip\r\n"), 502, "bad_answer", streamed=False),
    Act(play_error_first, 429, "rate_limit", streamed=True),
    Act(play_error_midway, 500, "stream_error", streamed=True, is_midway=True),
    Act(play_cut_midway(False), 502, "stream_error", streamed=True, is_midway=True),
    Act(play_cut_midway(True), 502, "stream_error", streamed=True, is_midway=True),
    Act(play_no_end, 502, "stream_error", streamed=True, is_midway=True),
]  # fmt: skip
LATE_ACTS = [  # these take as long as a deadline
    Act(play_nothing, 504, "timeout"),
    Act(play_stall, 504, "timeout", streamed=True, is_midway=True),
]
