"""A scripted upstream on loopback: it gives the answers a test laid ready, and judges and keeps
all that reaches it.

It runs in a thread, since half of the clients in front of it are synchronous. What a request must
look like is not its business: `judges` has one function for each path, which raises.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict
from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

JSON = dict[str, Any]
MAX_WAIT = 15.0  # seconds; only a failing test waits that long


def closed(tp: Any) -> Callable[[bytes | str], Any]:
    """Return a strict reader of JSON for an SDK's type that forbids every field it does not name.

    The SDKs' own types are open: a TypedDict lets unknown keys pass, a model keeps them, and of an
    `Iterable` pydantic judges nothing until somebody iterates. The rules are therefore changed in
    the core schema, where they are plain data. Where an SDK itself opened a TypedDict it stays so.
    """

    def close(node: Any) -> Any:
        if isinstance(node, (list, tuple)):
            return type(node)(map(close, node))
        if not isinstance(node, dict):
            return node
        node = {key: close(value) for key, value in node.items()}
        if node.get("type") == "generator":
            node["type"] = "list"
        elif "extras_schema" in node:
            pass  # a JSON schema may have any keyword
        elif node.get("type") == "model-fields" or node.get("extra_behavior") == "ignore":
            node["extra_behavior"] = "forbid"
        return node

    adapter = TypeAdapter(tp)
    adapter.rebuild()  # the models put off building their schema until it is needed
    validator = SchemaValidator(close(adapter.core_schema))
    return lambda text: validator.validate_json(text, strict=True)


@dataclass
class Received:
    """A request as it came. `left` is set when its client closes before the answer's end."""

    path: str
    headers: CIMultiDict[str]
    body: bytes
    at: float
    query: str = ""
    left: threading.Event = field(default_factory=threading.Event)

    @property
    def json(self) -> JSON:
        value: JSON = json.loads(self.body)
        return value


@dataclass
class Reply:
    """One answer; more than one piece, or an `end` other than "whole", makes it a chunked one.

    `end` is "whole", "cut" (the connection breaks where more was promised), "stall" (nothing
    follows until the client leaves), or "mute" (not even a head comes).
    """

    pieces: list[bytes]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    end: str = "whole"
    last_after: threading.Event | None = None  # what the last piece waits for


# A function of the request, which may ask for a plain or a streamed answer.
Answer = Callable[[Received], Reply]


class Upstream:
    """The server: `script` lays answers ready, `take` hands out what was received, oldest first."""

    def __init__(self, judges: Mapping[str, Callable[[Received], None]]) -> None:
        self._judges = judges
        self._faults: list[str] = []
        self._scripts: deque[tuple[Reply | Answer, bool]] = deque()
        self._received: queue.Queue[Received] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(MAX_WAIT)

    def script(self, *replies: Reply | Answer, judged: bool = True) -> None:
        """Lay answers ready; `judged=False` is for requests that no SDK would send."""
        self._scripts.extend((reply, judged) for reply in replies)

    def take(self) -> Received:
        """Return the oldest request that was not yet taken, waiting for it."""
        return self._received.get(timeout=MAX_WAIT)

    @property
    def is_idle(self) -> bool:
        """Whether every request that came was taken."""
        return self._received.empty()

    def settle(self) -> list[str]:
        """Forget everything, and return what was wrong with it."""
        faults = self._faults + [f"never asked for: {script}" for script, _ in self._scripts]
        self._faults, self._received = [], queue.Queue()
        self._scripts.clear()
        return faults

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(MAX_WAIT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(MAX_WAIT)

    async def _start(self) -> str:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body, headers = await request.read(), request.headers.copy()
        received = Received(request.path, headers, body, time.monotonic(), request.query_string)
        self._received.put(received)
        try:
            reply = self._choose(received)
        except Exception as error:  # the test must fail, whatever the client makes of the answer
            self._faults.append(f"{error!r}"[:4000] + f"\nin {body!r}")
            reply = json_reply({"error": {"message": "The judge says no."}}, 400)
        return await self._answer(request, received, reply)

    def _choose(self, received: Received) -> Reply:
        script, judged = self._scripts.popleft()
        if judged:
            self._judges[received.path](received)
        return script(received) if callable(script) else script

    async def _answer(
        self, request: web.Request, received: Received, reply: Reply
    ) -> web.StreamResponse:
        if reply.end == "whole" and len(reply.pieces) == 1:
            return web.Response(body=reply.pieces[0], status=reply.status, headers=reply.headers)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        try:
            if reply.end != "mute":
                await response.prepare(request)
            for piece in reply.pieces:
                if reply.last_after and piece is reply.pieces[-1]:
                    await asyncio.to_thread(reply.last_after.wait, MAX_WAIT)
                await response.write(piece)
            if reply.end in ("stall", "mute"):
                await asyncio.Event().wait()
        except (asyncio.CancelledError, ConnectionError):
            received.left.set()
            raise
        if reply.end == "cut" and request.transport is not None:
            request.transport.abort()
        return response


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """Return a plain JSON answer; `retry_after="1"` is the header `retry-after: 1`."""
    body = json.dumps(value, ensure_ascii=False).encode()
    return Reply([body], status, _head("application/json", headers))


def sse_reply(events: Iterable[JSON | str], end: str, named: bool, **headers: str) -> Reply:
    """Return a stream of events, one piece each; if `named`, with an `event:` line of its type."""

    def piece(event: JSON | str) -> bytes:
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        name = f"event: {event['type']}\n" if named and isinstance(event, dict) else ""
        return f"{name}data: {data}\n\n".encode()

    head = _head("text/event-stream; charset=utf-8", headers)
    return Reply(list(map(piece, events)), 200, head, end)


def _head(content_type: str, headers: Mapping[str, str]) -> Mapping[str, str]:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return {"content-type": content_type, **named}


def parts(text: str, size: int = 7) -> Iterable[str]:
    """Cut a text as a model's deltas do; the empty text has no parts."""
    return (text[at : at + size] for at in range(0, len(text), size))
