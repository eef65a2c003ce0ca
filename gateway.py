#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""An LLM gateway in one file, on Python's standard library alone.

    python3 gateway.py -demo                  try it: embedded upstream, no key needed
    python3 gateway.py -config config.json    serve
    python3 gateway.py -help                  the other commands

Apps speak to it with a virtual key each; it knows the providers' keys, routes by the model's name,
and counts requests, tokens and money per app for Prometheus.

One request's way: section 13 reads a head and asks section 12, whose `generate` is the story: the
key is judged (7), the body is read (9), the model is looked up (7), the bytes are passed or
translated (4), sent to the provider (11), watched for usage on their way back (4), written by
section 13, and recorded once (12) in the log and the metrics (8).

Contents

     1. Errors              what may go wrong, said once
     2. Model               what every dialect is translated through
     3. SSE                 server-sent events, both ways
     4. Dialects            wire formats, each read from both ends
     5. Providers           the kinds of upstream, as a table
     6. Config              the file, checked as a whole
     7. Policy              who may, which way, what it costs
     8. Metrics             counted exactly, rendered for Prometheus
     9. HTTP                heads and bodies, bytes in and bytes out
    10. Prices              data: a row a price
    11. Upstream            connections to providers
    12. Gateway             one exchange, from request to record
    13. Server              connections from clients
    14. Demo                the embedded upstream
    15. Page                what a person sees at /
    16. Workers             sockets, signals, the life of the process
    17. Command line        arguments, and main

Two rules hold everywhere, and the tests keep them: a section uses only the sections above it, and
nothing above the line "I/O starts here" awaits, opens, sleeps, or reads the clock, the environment
or random numbers. What those sections need of the outside is handed in.

Licence

Copyright (c) 2026 the gateway.py authors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("gateway.py needs Python 3.9 or newer; this is " + sys.version.split()[0])

import asyncio
import asyncio.sslproto
import base64
import bisect
import calendar
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import fnmatch
import functools
import hashlib
import http
import itertools
import json
import os
import re
import resource
import select
import signal
import socket
import ssl
import stat
import struct
import time
import traceback
import urllib.parse
import zlib
from dataclasses import dataclass, field
from decimal import Decimal
from typing import (
    AbstractSet, Any, Awaitable, Callable, Container, Dict, FrozenSet, Generic, Iterable, Iterator,
    List, Mapping, NamedTuple, NoReturn, Protocol, Sequence, Set, Tuple, Type, TypeVar, Union, cast,
)

__version__ = "1.0.0"

JSON = Dict[str, Any]
Headers = Dict[str, str]  # names in lower case; repeated fields are joined with commas


# ==============================
# 1. Errors
#
# An error is raised anywhere and rendered once, in the client's dialect. Its message is what the
# client may read; what only the log may see is its __cause__.
# ==============================

# The error types of OpenAI's API by status; other dialects have tables of their own in section 4.
ERROR_TYPES = {
    401: "invalid_request_error", 403: "permission_error", 404: "invalid_request_error",
    408: "timeout", 429: "rate_limit_error", 500: "server_error", 502: "upstream_error",
    503: "overloaded_error", 504: "timeout", 529: "overloaded_error",
}


class GatewayError(Exception):
    """An answer that is an error.

    `type` is the dialect's word for it (by default from the status), `headers` go out with it.
    `provider_error` is one of PROVIDER_ERRORS where a provider is to blame, else "". `is_quoted`:
    the words are the provider's own, so that they may quote the prompt; the log leaves them out.
    """

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: Sequence[Tuple[str, str]] = (), *,
                 type: str | None = None, provider_error: str = "",
                 is_quoted: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers
        fallback = "invalid_request_error" if status < 500 else "server_error"
        self.type = type or ERROR_TYPES.get(status, fallback)
        self.provider_error = provider_error
        self.is_quoted = is_quoted


# request_error: no connection, or it failed before a usable answer. stream_error: failed after the
# first byte went out. The other labels say what the provider answered.
PROVIDER_ERRORS = ("request_error", "stream_error", "timeout", "auth", "rate_limit", "client_error",
                   "server_error", "bad_answer")


def upstream_error(status: int, message: str, label: str, **more: Any) -> GatewayError:
    return GatewayError(status, message, provider_error=label, **more)


class ConfigError(Exception):
    """A config that cannot be served: every problem of the file, a line each."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}" if where else message)


def clipped(text: str, limit: int = 128) -> str:
    """What a message or a log line may quote of a client's text."""
    return text if len(text) <= limit else text[:limit] + "..."


# ==============================
# 2. Model
#
# The small model that every dialect is translated through.
# ==============================


@dataclass
class Usage:
    """`input` counts the whole prompt (uncached + cache_read + cache_write), `output` holds
    `reasoning`."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0  # part of cache_write: it has a price of its own
    reasoning: int = 0


def estimated_usage(known: Usage | None, prompt_bytes: int, content_bytes: int) -> Usage:
    """What was not told: the prompt as its bytes / 3, the output as the bytes of content / 4."""
    known = known or Usage()
    return dataclasses.replace(known, input=known.input or -(-prompt_bytes // 3),
                               output=max(known.output, -(-content_bytes // 4)))


MAX_COUNT = 1 << 53  # what is more nobody has counted


def count(value: object) -> int:
    if type(value) is int:  # True is none
        return min(value, MAX_COUNT) if value > 0 else 0
    if isinstance(value, float) and value.is_integer() and value > 0:
        return min(int(value), MAX_COUNT)
    return 0


# ------------------------------
# JSON as it is on the wire: strict where a route is read from it, and cut into members so that a
# value can be replaced with every other byte left as it came.
# ------------------------------

MAX_INT_DIGITS = 4300  # where int() has no bound of its own, 10 MB of digits take it minutes


def bounded_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise ValueError("a number is too long")
    return int(digits)


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(
    parse_int=None if hasattr(sys, "get_int_max_str_digits") else bounded_int,
    parse_constant=refuse_constant)
MEMBERS_DECODER = json.JSONDecoder(  # an object in a body is a tuple of pairs, so that a key which
    object_pairs_hook=tuple, parse_int=DECODER.parse_int,  # stands twice is seen
    parse_constant=refuse_constant)
LENIENT_DECODER = json.JSONDecoder(parse_int=DECODER.parse_int)  # some providers send NaN


def make_decode(decoder: json.JSONDecoder) -> Callable[[str], Any]:
    """decoder.decode, which looks for white space around each text with a regex."""
    def decode(text: str) -> Any:
        try:
            value, end = decoder.scan_once(text, 0)  # type: ignore[attr-defined]
        except StopIteration:
            end = -1
        return value if end == len(text) else decoder.decode(text)

    return decode


decode_json, decode_leniently, decode_members = map(
    make_decode, (DECODER, LENIENT_DECODER, MEMBERS_DECODER))


def json_object(raw: bytes) -> JSON | None:
    """None for anything else."""
    try:
        tree = decode_leniently(raw.decode())
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)
encode_string = json.encoder.encode_basestring


def make_encode() -> Callable[[object], str]:
    """ENCODER.encode, which makes its encoder in C anew for each value."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return ENCODER.encode
    encode = make(None, ENCODER.default, encode_string, None, ":", ",", False, False, False)
    return lambda value: "".join(encode(value, 0))


encode_finite = make_encode()


def encode_json(value: object) -> str:
    try:
        return encode_finite(value)
    except ValueError:
        return encode_finite(finite(value))


def finite(value: object) -> object:
    """The value without infinity (1e400 is JSON, but what Python makes of it has no spelling) and
    without NaN, which some providers send."""
    if isinstance(value, float) and not -float("inf") <= value <= float("inf"):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    is_infinite = isinstance(value, float) and abs(value) == float("inf")
    return (10**309 if value > 0 else -10**309) if is_infinite else value  # type: ignore[operator]


def dump_json(value: object) -> bytes:
    return utf8(encode_json(value))


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:  # of a lone surrogate
        return text.encode(errors="backslashreplace")


class Body:
    """A JSON object as it came, whose top-level values can be replaced one by one. Raises
    GatewayError(400) for any other body, one nested too deeply, and a top-level key that stands
    twice."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        try:
            members = decode_members(body.decode())
            if not isinstance(members, tuple):
                raise ValueError("it is another value")
            self._members = dict(members)
            if len(self._members) < len(members):
                raise ValueError("a top-level key stands twice")
        except UnicodeDecodeError as error:
            raise GatewayError(400, "The body is not valid UTF-8.") from error
        except RecursionError as error:
            raise GatewayError(400, "The body's JSON is nested too deeply.") from error
        except ValueError as error:
            reason = str(error).partition(";")[0]  # what follows is advice for programmers
            raise GatewayError(400, f"The body is not a JSON object: {reason}.") from error

    def get(self, key: str) -> Any:
        value = self._members.get(key)
        return self.tree()[key] if isinstance(value, (tuple, list)) else value

    def inner(self, key: str, name: str) -> Any:
        """A member of the object that a member is."""
        value = self._members.get(key)
        return dict(value).get(name) if isinstance(value, tuple) else None

    def tree(self) -> JSON:
        tree: JSON = decode_json(self.body.decode())
        return tree

    def forget(self) -> None:
        """It may be large, and the answer may take minutes."""
        self.body, self._members = b"", {}

    def with_values(
            self, values: Mapping[str, object], dropped: AbstractSet[str] = frozenset()) -> bytes:
        """The body with these top-level values put in place, or at the end where they are new, and
        the `dropped` keys left out."""
        if not values and not dropped:
            return self.body
        body = memoryview(self.body)  # slices of it are no copies
        pieces: List[bytes | memoryview] = []
        at, last, is_first = 0, self.body.index(b"{") + 1, True
        spans: Spans = {}
        if dropped or not self._members.keys().isdisjoint(values):
            text = self.body.decode()
            spans = in_bytes(text, scan_members(text))
        for key, (start, end) in spans.items():
            if key in dropped:  # with the comma before it, or behind it where nothing is before
                pieces.append(body[at:last])
                comma = self.body.find(b",", end) if is_first else -1
                at = max(end, comma + 1)
            else:
                is_first = False
                if key in values:
                    pieces += [body[at:start], dump_json(values[key])]
                    at = end
            last = end
        new = {key: value for key, value in values.items() if key not in self._members}
        if new:
            brace = self.body.rindex(b"}")
            is_bare = self._members.keys() <= dropped
            pieces += [body[at:brace], b"" if is_bare else b",", dump_json(new)[1:-1]]
            at = brace
        return b"".join([*pieces, body[at:]])


MAX_PREAMBLE_BYTES = 4096


class Form:
    """A multipart/form-data body, read as far as a route needs it (RFC 7578). Raises
    GatewayError(400) for a form that another server might read differently."""

    def __init__(self, body: bytes, content_type: str) -> None:
        self.body = body
        found = re.findall(r'[;\s]boundary="?([^";,\s]{1,70})', content_type, re.IGNORECASE)
        if len(found) != 1:
            raise GatewayError(400, "The form's content-type names not one boundary.")
        self._boundary = b"\r\n--" + found[0].encode("latin-1")
        self._fields: Dict[str, List[Span | None]] = {}  # None: a file
        for name, span in self._parts():
            self._fields.setdefault(name, []).append(span)

    def _parts(self) -> Iterator[Tuple[str, Span | None]]:
        """Each part's name, and where its value starts and ends."""
        body, boundary = self.body, self._boundary
        malformed = GatewayError(
            400, "The form is malformed, cut short, or has too many parts.")
        start = (b"\r\n" + body[:MAX_PREAMBLE_BYTES]).find(boundary)
        if start < 0:
            raise malformed
        at = start + len(boundary) - 2
        for _ in range(MAX_PARTS):
            if body.startswith(b"--", at):
                return
            head = PART_HEAD.match(body, at)
            end = body.find(boundary, head.end()) if head else -1
            if not head or end < 0:
                break
            name, is_file = part_name(head[1])
            yield name, None if is_file else (head.end(), end)
            at = end + len(boundary)
        raise malformed

    def _find(self, name: str) -> Span | None:
        """Where a field's value stands. A second of its name is a 400: which of them counts, two
        servers may see differently."""
        spans = self._fields.get(name, [None])
        if len(spans) > 1:
            raise GatewayError(400, f"The form's {name!r} stands twice.", name)
        return spans[0]

    def get(self, key: str) -> Any:
        span = self._find(key)
        value = self.body[slice(*span)].decode("utf-8", "replace") if span else None
        return value == "true" if key == "stream" and value in ("true", "false") else value

    def forget(self) -> None:
        self.body = b""

    def with_values(
            self, values: Mapping[str, object], dropped: AbstractSet[str] = frozenset()) -> bytes:
        body = self.body
        spans = {key: span for key in values for span in [self._find(key)] if span}
        for key in sorted(spans, key=spans.__getitem__, reverse=True):  # the others stay in place
            start, end = spans[key]
            body = body[:start] + f"{values[key]}".encode() + body[end:]
        return body


MAX_PARTS = 1000
PART_HEAD = re.compile(rb"[ \t]*\r\n((?:[!-9;-~]+:[^\r\n\0]*\r\n)*)\r\n")
DISPOSITION = re.compile(rb"^content-disposition:(.*)\r$", re.IGNORECASE | re.MULTILINE)
PARAMETER = rb'[ \t]*;[ \t]*([^\s;="]+)=("(?:[^"\\]|\\.)*"|[^\s;"]*)'
FORM_DATA = re.compile(rb"[ \t]*form-data((?:%b)*);?[ \t]*" % PARAMETER, re.IGNORECASE)


def part_name(head: bytes) -> Tuple[str, bool]:
    """Of a form's part, and whether it is a file."""
    told = DISPOSITION.findall(head)
    found = FORM_DATA.fullmatch(told[0]) if len(told) == 1 else None
    members = [(key.lower(), value)
               for key, value in re.findall(PARAMETER, found[1] if found else b"")]
    about = dict(members)
    name = about.get(b"name", b"").strip(b'"')
    if len(about) < len(members) or not name or b"\\" in name or b"name*" in about:
        raise GatewayError(400, "The head of one of the form's parts is malformed.")
    return name.decode("utf-8", "replace"), (
        not about.keys().isdisjoint((b"filename", b"filename*")))


Span = Tuple[int, int]
Spans = Dict[str, Span]  # where an object's members' values start and end
SPACE = r"[ \t\n\r]*"
KEY = rf'"([^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*)"{SPACE}:'
FIRST_KEY = re.compile(rf"{SPACE}\{{{SPACE}(?:{KEY}|\}}){SPACE}")
NEXT_KEY = re.compile(rf"{SPACE}(?:,{SPACE}{KEY}|\}}){SPACE}")


def scan_members(text: str) -> Spans:
    """The spans of the members of the JSON object that `text` is."""
    spans: Spans = {}
    found = FIRST_KEY.match(text)
    while found and (name := found[1]) is not None:
        if "\\" in name:
            name = DECODER.decode(f'"{name}"')
        _, end = DECODER.raw_decode(text, found.end())
        spans[name] = found.end(), end
        found = NEXT_KEY.match(text, end)
    return spans


def in_bytes(text: str, spans: Spans) -> Spans:
    if text.isascii():
        return spans
    counted, at, characters = {}, 0, 0
    for key, (start, end) in spans.items():
        first = at + len(text[characters:start].encode())
        at = first + len(text[start:end].encode())
        characters = end
        counted[key] = first, at
    return counted


# ------------------------------
# A conversation. Turns hold ordered blocks; system turns stand in the list, where they were said.
# ------------------------------


@dataclass
class Block:
    """`cache` is a cache mark as it came, `signature` a proof that only its `issuer` can check."""

    cache: JSON | None = None
    signature: str = ""
    issuer: str = ""

    def but(self: SomeBlock, **changes: Any) -> SomeBlock:
        """A copy with changes; dataclasses.replace costs five times as much."""
        return type(self)(**{**vars(self), **changes})


@dataclass
class Text(Block):
    text: str = ""
    is_refusal: bool = False
    citations: List[JSON] = field(default_factory=list)  # {"url", "title"}
    logprobs: List[JSON] = field(default_factory=list)  # as OpenAI tells them


@dataclass
class Image(Block):
    """By `url` or as base64 `data`."""

    url: str = ""
    media_type: str = ""
    data: str = ""
    detail: str = ""


@dataclass
class Document(Block):
    """By `url`, as base64 `data` or as `text`."""

    url: str = ""
    media_type: str = ""
    data: str = ""
    text: str = ""
    title: str = ""


@dataclass
class Audio(Block):
    data: str = ""
    format: str = ""


@dataclass
class Thinking(Block):
    """What its issuer keeps closed (`is_redacted`) is all signature. `before` is the call that
    followed it, where a wire cannot say so by its order; `family` the models that alone take it."""

    text: str = ""
    is_redacted: bool = False
    before: str = field(default="", compare=False)
    family: str = field(default="", compare=False)


@dataclass
class ToolCall(Block):
    """With freeform `input` instead of `arguments` where the tool is custom, or what came of
    arguments that were cut off."""

    id: str = ""
    name: str = ""
    arguments: JSON = field(default_factory=dict)
    is_custom: bool = False
    input: str = ""
    fault: Tuple[str, str] = field(default=("", ""), compare=False)  # of its arguments; their place


@dataclass
class ToolResult(Block):
    id: str = ""
    content: List[Block] = field(default_factory=list)
    is_error: bool = False


@dataclass
class Search(Block):
    """One that ran at the provider, in an answer."""

    query: str = ""


@dataclass
class Opaque(Block):
    """What only its issuer understands."""

    wire: JSON = field(default_factory=dict)


@dataclass
class Turn:
    role: str  # system, user or assistant
    blocks: List[Block]


@dataclass
class Tool:
    """A custom tool takes freeform text, by its `grammar`, if any: {"syntax", "definition"}."""

    name: str
    description: str = ""
    schema: JSON | None = None
    strict: bool | None = None
    is_custom: bool = False
    grammar: JSON | None = None
    cache: JSON | None = None
    namespace: str = ""  # which its name begins with, as NAMESPACE__NAME


@dataclass
class ToolChoice:
    """`mode` is auto, required, none or tool; `name` the one tool, `allowed` those on offer."""

    mode: str
    name: str = ""
    allowed: List[str] | None = None


@dataclass
class Format:
    """Any JSON object, or one by a schema."""

    schema: JSON | None = None
    name: str = ""
    description: str = ""
    strict: bool | None = None


@dataclass
class Chat:
    """One request. Of `options` a renderer takes those that it knows and names the others."""

    model: str
    turns: List[Turn]
    tools: List[Tool] = field(default_factory=list)
    choice: ToolChoice | None = None
    parallel: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: List[str] = field(default_factory=list)
    effort: str | None = None
    budget: int | None = None  # of thinking, in tokens, which goes before effort
    thinking: JSON | None = None  # Anthropic's own form, which goes before both
    format: Format | None = None
    user: str | None = None
    logprobs: int | None = None  # how many alternatives
    web_search: JSON | None = None
    stream: bool = False
    include_usage: bool = False
    legacy_functions: bool = False  # asked for by `functions`, to be answered alike
    options: JSON = field(default_factory=dict)
    shows_thinking: bool = field(default=True, compare=False)  # else only what must come back
    estimate: int = field(default=0, compare=False)  # of the prompt's tokens
    echo: JSON = field(default_factory=dict, compare=False)  # what an answer repeats, as it came


@dataclass
class Reply:
    """One whole answer. `finish` is stop, stop_sequence, length, context, tool_calls, refusal,
    filter or pause; `refusal` the provider's explanation."""

    id: str
    model: str
    blocks: List[Block]
    finish: str
    usage: Usage
    refusal: str = ""
    service_tier: str = ""


@dataclass(frozen=True)
class Caps:
    """What a model takes."""

    # temperature and top_p: "both" together, "one" of them, "none", or "idle": while effort is none
    sampling: str = "both"
    thinking: str = "none"  # "budget", "both", "adaptive", "effort", "level" or "none"
    can_disable_thinking: bool = False
    efforts: Tuple[str, ...] = ()
    forced_tools: str = "yes"  # "refused" is passed on all the same; "auto" asks for no more
    mid_system: bool = False  # system messages after the first turn
    json_schema: bool = True
    max_output: int = 128_000
    max_tokens_field: str = "max_tokens"  # in Chat Completions
    custom_tools: bool = False  # custom tools, and a choice of allowed ones
    default_effort: str = "none"
    chat_tools: str = "yes"  # tools in Chat Completions; "idle": while effort is none
    max_stops: int = 4
    top_k: bool = False  # in OpenAI's wires
    short_ids: bool = False  # of calls: nine letters and digits
    needs_thoughts: bool = False  # of its own, with the calls that followed them


class Target(NamedTuple):
    model: str
    caps: Caps
    default_max_tokens: int = 8192
    max_output_tokens: int | None = None  # a ceiling of the config's


class Rewrites:
    """What rendering changed and parsing the answer must change back."""

    def __init__(self) -> None:
        self.names: Dict[str, str] = {}  # by the name that went out, the client's own
        self.custom: Set[str] = set()  # custom tools, by name, that went out as functions
        self.json_tool = ""  # a hidden tool whose arguments are the answer
        self.answer_id = ""  # for an answer without one
        self.prompt_bytes = 0  # for one without usage
        self.call_ids: Set[str] = set()  # that the conversation has already
        self.lost: Set[str] = set()  # what of the answer no other dialect can say


class Losses:
    """What the target cannot say, by name. Hints are told but never refused."""

    def __init__(self) -> None:
        self.names: Dict[str, bool] = {}  # name -> whether it is but a hint

    def drop(self, name: str) -> None:
        self.names[name] = False

    def hint(self, name: str) -> None:
        self.names.setdefault(name, True)

    def refuse(self) -> None:
        names = [name for name, is_hint in self.names.items() if not is_hint]
        if names:
            told = ", ".join(names)
            raise unsupported(names[0], f"The model's provider cannot be told: {told} (strict).")


def unsupported(param: str, what: str = "") -> GatewayError:
    what = what or f"'{param}' is not supported by the model's provider."
    return GatewayError(400, what, param, "unsupported_parameter")


def bad_answer(message: str) -> GatewayError:
    return upstream_error(502, message, "bad_answer")


def canonical(turns: Iterable[Turn]) -> List[Turn]:
    """Turns as every parser leaves them: no empty text, neighbours of one role merged, and tool
    results right behind their calls: first in the turn, in the order of the calls."""
    turns = merged(turns)
    if not any(isinstance(block, ToolResult) for turn in turns for block in turn.blocks):
        return turns
    placed: List[Turn] = []
    answers: Dict[str, List[Block]] = {}  # by the id of a call, the turn behind it
    for turn in turns:
        rest = Turn(turn.role, [])
        for block in turn.blocks:
            place = answers.get(block.id) if isinstance(block, ToolResult) else None
            (rest.blocks if place is None else place).append(block)
        placed.append(rest)
        ids = call_ids(turn)
        if ids:
            placed.append(Turn("user", []))
            answers.update(dict.fromkeys(ids, placed[-1].blocks))
    turns = merged(placed)
    ids = []
    for turn in turns:
        if turn.role == "assistant":
            ids = call_ids(turn)
        elif blocks_of(turn.blocks, ToolResult):
            order = {id_: i for i, id_ in enumerate(ids)}
            turn.blocks.sort(key=lambda block: order.get(block.id, len(order))
                             if isinstance(block, ToolResult) else len(order) + 1)
    return turns


SomeBlock = TypeVar("SomeBlock", bound=Block)


def blocks_of(blocks: Iterable[Block], kind: Type[SomeBlock]) -> List[SomeBlock]:
    return [block for block in blocks if isinstance(block, kind)]


def call_ids(turn: Turn) -> List[str]:
    return [call.id for call in blocks_of(turn.blocks, ToolCall)]


def joined_texts(texts: Iterable[Text]) -> Text:
    """One text of several, their citations in their places."""
    whole, pieces, at = Text(), [], 0
    for text in texts:
        size = len(text.text)
        whole.citations += [{**each, "start": at + each.get("start", 0),
                             "end": at + each.get("end", size)} for each in text.citations]
        whole.logprobs += text.logprobs
        pieces.append(text.text)
        at += size
    whole.text = "".join(pieces)
    return whole


def is_refusal(block: Block) -> bool:
    return isinstance(block, Text) and block.is_refusal


def is_empty(block: Block) -> bool:
    """Whether it is a text, or a document, that says nothing."""
    if isinstance(block, Document):
        return not (block.text or block.data or block.url)
    return isinstance(block, Text) and not block.text


def merged(turns: Iterable[Turn]) -> List[Turn]:
    result: List[Turn] = []
    for turn in turns:
        blocks = list(itertools.filterfalse(is_empty, turn.blocks))
        if result and result[-1].role == turn.role:
            result[-1].blocks += blocks
        elif blocks:
            result.append(Turn(turn.role, blocks))
    return result


# ------------------------------
# A stream is a reply in pieces: Start (BlockStart delta* BlockStop)* Finish. Each kind of block has
# its own delta, so nobody need remember which block is open to read one.
# ------------------------------


class Start(NamedTuple):
    id: str
    model: str
    usage: Usage | None = None  # as far as it is known


class BlockStart(NamedTuple):
    block: Block  # without what its deltas bring


class TextDelta(NamedTuple):
    text: str


class TextRun(NamedTuple):
    """Several pieces of a text, and how JSON spells each, without its quotes: they came so, and
    any dialect's strings are those of every other."""

    pieces: List[str]
    strings: List[bytes]


class ThinkingDelta(NamedTuple):
    text: str


class SignatureDelta(NamedTuple):
    signature: str  # whole: it replaces
    issuer: str


class ArgumentsDelta(NamedTuple):
    text: str  # a fragment of JSON, or of a custom tool's input


class CitationDelta(NamedTuple):
    block: int  # which block it belongs to, counted from 0; it may come after its end
    citation: JSON


class BlockStop(NamedTuple):
    logprobs: Sequence[JSON] = ()  # of a text


class Finish(NamedTuple):
    finish: str
    usage: Usage
    refusal: str = ""
    service_tier: str = ""


StreamEvent = Union[Start, BlockStart, TextDelta, TextRun, ThinkingDelta, SignatureDelta,
                    ArgumentsDelta, CitationDelta, BlockStop, Finish]
Events = List[StreamEvent]


def collect(events: Iterable[StreamEvent]) -> Reply:
    reply = Reply("", "", [], "stop", Usage())
    said: List[str] = []
    for event in events:
        if isinstance(event, (TextDelta, ThinkingDelta, ArgumentsDelta)):
            said.append(event.text)
        elif isinstance(event, TextRun):
            said += event.pieces
        elif isinstance(event, BlockStart):
            reply.blocks.append(event.block)
            said = []
        elif isinstance(event, BlockStop):
            closed = reply.blocks[-1]
            if isinstance(closed, Text):
                closed.logprobs = [*event.logprobs]
            try:
                close_block(closed, "".join(said))
            except GatewayError:  # arguments that were cut off; of others the parser told
                closed.input = "".join(said)  # type: ignore[attr-defined]
        elif isinstance(event, Start):
            reply.id, reply.model = event.id, event.model
        elif isinstance(event, Finish):
            reply.finish, reply.usage, reply.refusal, reply.service_tier = event
        elif isinstance(event, SignatureDelta):
            reply.blocks[-1].signature, reply.blocks[-1].issuer = event
        else:
            cited = reply.blocks[event.block]
            if isinstance(cited, Text):
                cited.citations.append(event.citation)
    for text in blocks_of(reply.blocks, Text):  # a place that is all of it is none
        for about in text.citations:
            if (about.get("start"), about.get("end")) == (0, len(text.text)):
                del about["start"], about["end"]
    return reply


def events_of(reply: Reply) -> Iterator[StreamEvent]:
    """The stream that spells a reply."""
    yield Start(reply.id, reply.model)
    for i, block in enumerate(reply.blocks):
        if isinstance(block, Text):
            yield BlockStart(Text(is_refusal=block.is_refusal))
            yield TextDelta(block.text)
            yield from (CitationDelta(i, citation) for citation in block.citations)
        elif isinstance(block, Thinking):
            signature = block.signature if block.is_redacted else ""
            yield BlockStart(block.but(text="", signature=signature))
            yield ThinkingDelta(block.text)
            if block.signature != signature:
                yield SignatureDelta(block.signature, block.issuer)
        elif isinstance(block, ToolCall):
            yield BlockStart(block.but(arguments={}, input=""))
            yield ArgumentsDelta(block.input if block.is_custom else
                                 block.input or encode_json(block.arguments))
        else:
            yield BlockStart(block)
        yield BlockStop(block.logprobs if isinstance(block, Text) else ())
    yield Finish(reply.finish, reply.usage, reply.refusal, reply.service_tier)


def close_block(block: Block, said: str) -> None:
    if isinstance(block, (Text, Thinking)):
        block.text = said
    elif isinstance(block, ToolCall) and block.is_custom:
        block.input = said
    elif isinstance(block, ToolCall):
        try:
            block.arguments = parse_arguments(said)
        except ValueError as error:
            raise bad_answer(f"The model's arguments for a tool: {error}.") from error


def parse_arguments(text: str) -> JSON:
    """A call's arguments; none at all are an empty object. Raises ValueError."""
    try:
        arguments = decode_json(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError("must be valid JSON") from error
    if not isinstance(arguments, dict):
        raise ValueError("must be a JSON object")
    return arguments


NUMBER = (int, float)
TEXT_OR_LIST = (str, list)
TEXT_OR_OBJECT = (str, dict)
SAYS_NOTHING = (False, "standard")  # of a hint
TYPE_NAMES: Dict[object, str] = {
    str: "a string", bool: "true or false", int: "an integer", float: "a number",
    NUMBER: "a number", list: "a list", dict: "an object", TEXT_OR_LIST: "a string or a list",
    TEXT_OR_OBJECT: "a string or an object"}


class Fields:
    """An object of a client's, and its place in the request. A value of the wrong type is a 400;
    null counts as absent; what nobody reads is unknown."""

    def __init__(self, wire: JSON, losses: Losses, place: str = "",
                 parent: Fields | None = None) -> None:
        self.wire = wire
        self.losses = losses
        self.place = place
        self._unread = wire.copy()
        # Of the whole request; the objects themselves in a list would be a circle of garbage.
        self._all_unread: List[JSON] = parent._all_unread if parent else []
        self._all_unread.append(self._unread)

    def wrong(self, key: str, what: str, code: str | None = None) -> GatewayError:
        param = clipped(f"{self.place}{key}")
        return GatewayError(400, f"'{param}' {what}.", param, code)

    def unsupported(self, key: str, what: str) -> GatewayError:
        return self.wrong(key, what, "unsupported_parameter")

    def get(self, key: str, kind: Any = str) -> Any:
        value = self.wire.get(key)
        if value is None:
            return None
        self._unread.pop(key, None)
        if type(value) is kind or isinstance(value, kind) and not isinstance(value, bool):
            return value
        raise self.wrong(key, f"must be {TYPE_NAMES[kind]}")

    def need(self, key: str, kind: Any = str) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def one_of(self, key: str, choices: Iterable[str]) -> str:
        value: str = self.need(key)
        if value not in choices:
            raise self.wrong(key, f"must be one of: {', '.join(choices)}")
        return value

    def child(self, key: str, default: JSON | None = None) -> Fields:
        value = self.get(key, dict)
        if value is None:
            value = self.need(key, dict) if default is None else default
        return type(self)(value, self.losses, f"{self.place}{key}.", self)

    def items(self, key: str, kind: type) -> Iterator[Tuple[str, Any]]:
        for i, item in enumerate(self.get(key, list) or ()):
            if not isinstance(item, kind):
                raise self.wrong(f"{key}[{i}]", f"must be {TYPE_NAMES[kind]}")
            yield f"{self.place}{key}[{i}].", item

    def children(self, key: str) -> Iterator[Fields]:
        return (type(self)(item, self.losses, place, self)
                for place, item in self.items(key, dict))

    def strings(self, key: str) -> List[str]:
        return [item for _, item in self.items(key, str)]

    def skip(self, *keys: str) -> bool:
        for key in keys:
            self._unread.pop(key, None)
        return any(self.wire.get(key) not in (None, "", [], {}) for key in keys)

    def refuse(self, *keys: str) -> None:
        """What would make the answer another where no other dialect can say it."""
        for key in keys:
            if self.skip(key) and self.wire[key]:
                raise self.unsupported(key, "is not supported by the model's provider")

    def hint(self, *keys: str) -> None:
        """What says something here that no other dialect can."""
        for key in keys:
            if key in self.wire and self.skip(key) and self.wire[key] not in SAYS_NOTHING:
                self.losses.hint(key)

    def name_unknown(self) -> None:
        if any(value is not None for unread in self._all_unread for value in unread.values()):
            self.losses.drop("unknown")


def parse_data_uri(uri: str) -> Tuple[str, str] | None:
    """(media type, base64 data); None of any other URI."""
    head, comma, data = uri.partition(",")
    scheme, _, media = head.partition(":")
    parts = media.lower().split(";")
    if scheme.lower() != "data" or not comma or "base64" not in parts[1:]:
        return None
    return parts[0] or "text/plain", data


# ==============================
# 3. SSE
#
# Server-sent events (HTML Living Standard, section 9.2). Lines end in LF, CRLF or CR, and are cut
# as bytes: str.splitlines would also cut at U+2028, which is legal inside JSON strings.
# ==============================


def sse(data: bytes, event: str = "") -> bytes:
    name = b"event: %b\n" % event.encode() if event else b""
    return b"%bdata: %b\n\n" % (name, data)


BOM = b"\xef\xbb\xbf"  # one may stand before all events
EVENT_HEAD = re.compile(rb"(?:event: [^\r\n]*\n)?data: ")
BLANK_LINE = re.compile(rb"\r\n\r?\n|\n\r?\n|\r\r\n?")


def split_events(block: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(block):
        end = event_end(block, at)
        yield block[at:end]
        at = end


def last_blank_line(block: bytes, before: int) -> int:
    """Where it ends; 0 where there is none."""
    end = block.rfind(b"\n\n", 0, before) + 2
    if block.find(b"\r", max(end - 3, 0), before) < 0:  # as nearly always
        return end if end > 1 else 0
    end = 0
    for blank in (b"\n\n", b"\n\r\n", b"\r\r"):
        at = block.rfind(blank, max(end - len(blank) + 1, 0), before)  # only one that ends later
        end = at + len(blank) if at >= 0 else end
    return end


def event_end(block: bytes, at: int) -> int:
    """Where the event at `at` ends, its blank line included."""
    end = block.find(b"\n\n", at, at + 4096) + 2
    if end < 2 and block.find(b"\r", at, at + 4096) < 0:  # a long one
        end = block.find(b"\n\n", at) + 2
    if end > 1 and block.find(b"\r", at, end) < 0:  # as nearly always; the regex crawls
        return end
    blank = BLANK_LINE.search(block, at)
    return blank.end() if blank else len(block)


def event_at(block: bytes, at: int) -> Tuple[bytes, int]:
    """The data of the event that begins there, and where it ends. Its name is left out: the data
    say it too."""
    head = EVENT_HEAD.match(block, at)
    end = block.find(b"\n\n", at, at + 4096)
    if head and end >= 0:
        said = block[head.end():end]
        if b"\n" not in said and b"\r" not in said:  # as nearly always
            return said, end + 2
    end = event_end(block, at)
    data = []
    for line in block[at:end].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        key, _, value = line.partition(b":")
        if key == b"data":
            data.append(value[1:] if value[:1] == b" " else value)
    return b"\n".join(data), end


def event_data(raw: bytes) -> bytes:
    """Of one whole event."""
    return event_at(raw, 0)[0]


def event_span(block: bytes, at: int) -> Tuple[int, int]:
    return last_blank_line(block, at), event_end(block, at)


class EventCutter:
    """`feed` returns whole events, byte for byte as they came, and keeps the one that is still
    arriving. Raises GatewayError(502) where that one outgrows `limit` bytes, or all that are kept
    together what `reserve` grants."""

    def __init__(self, limit: int, reserve: Callable[[int], bool] = lambda size: True) -> None:
        self._limit = limit
        self._reserve = reserve
        self._held: List[bytes] = []
        self._seam = b""
        self.held_bytes = 0

    def feed(self, chunk: bytes) -> bytes:
        if not self._held and chunk.endswith((b"\n\n", b"\r\n\r\n")):
            return chunk
        # Only the seam and the new bytes are searched: joining each time would make one long
        # event quadratic.
        window = self._seam + chunk
        cut = last_blank_line(window, len(window)) - len(self._seam)
        if cut <= 0:
            self._hold(chunk)
            return b""
        whole = b"".join([*self._held, chunk[:cut]])
        self.rest()
        self._hold(chunk[cut:])
        return whole

    def _hold(self, piece: bytes) -> None:
        if not piece:
            return
        self._held.append(piece)
        self._seam = (self._seam + piece[-3:])[-3:]
        self.held_bytes += len(piece)
        if self.held_bytes > self._limit or not self._reserve(len(piece)):
            self.held_bytes -= len(piece)
            raise bad_answer("The provider sent an event that is too large.")

    def rest(self) -> bytes:
        if not self._held:
            return b""
        self._reserve(-self.held_bytes)
        rest, self._held, self._seam, self.held_bytes = b"".join(self._held), [], b"", 0
        return rest


# ==============================
# 4. Dialects
#
# A dialect is one wire format, read from both ends. Nothing here looks a model or a provider up:
# what a target takes is handed down.
# ==============================


# ------------------------------
# A signature is checked by its issuer only, and must come back as it was. Through a client of
# another vendor's it travels in an envelope; one on a call rides in the call's id, which every
# client returns.
# ------------------------------

ENVELOPE = "gw1."
RIDER = "__ts_"
TO_URL_SAFE, FROM_URL_SAFE = str.maketrans("+/", "-_", "="), str.maketrans("-_", "+/")


def seal(block: Block, native: str, keeps_text: bool = False) -> str:
    """A signature as the `native` issuer's dialect carries it."""
    if block.issuer == native or not block.signature:
        return block.signature
    packed = [block.issuer, block.signature]
    if isinstance(block, Thinking):
        packed += [block.text if keeps_text else "", block.before, "closed" * block.is_redacted,
                   block.family]
    return ENVELOPE + base64.urlsafe_b64encode(dump_json(packed)).decode()


def unseal(thinking: Thinking, signature: str, native: str) -> Thinking:
    """The block with a signature that came back; a broken envelope holds none."""
    if not signature.startswith(ENVELOPE):
        thinking.signature, thinking.issuer = signature, native if signature else ""
        return thinking
    try:
        packed = DECODER.decode(base64.urlsafe_b64decode(signature[len(ENVELOPE):]).decode())
        issuer, proof, text, before, closed, *family = map(str, packed)
    except (ValueError, TypeError, RecursionError):
        return thinking
    if issuer:
        thinking.issuer, thinking.signature, thinking.family = issuer, proof, "".join(family)
        thinking.before, thinking.is_redacted = before, closed != ""
        thinking.text = text or thinking.text
    return thinking


FAMILY = re.compile("opus|sonnet|haiku|fable|mythos")


def family_of(model: str) -> str:
    """Whose thoughts no other family takes; "" where that is not known."""
    found = FAMILY.search(model)
    return found[0] if found else ""


def own_id(prefix: str, id_: str) -> str:
    return id_ if id_.startswith(prefix) else prefix + id_


def is_in_call(block: Block) -> bool:
    """Whether a thought is no more than the signature of the call behind it."""
    return isinstance(block, Thinking) and block.before != "" and block.issuer == "gemini"


def carried_id(call: ToolCall) -> str:
    """The id that a client sees."""
    if not call.signature:
        return call.id
    return f"{call.id}{RIDER}{call.signature.translate(TO_URL_SAFE)}"


def plain_id(id_: str) -> str:
    return id_.partition(RIDER)[0]


def carrying_call(id_: str, name: str, **about: Any) -> ToolCall:
    """A call as it came back."""
    plain, _, rider = id_.partition(RIDER)
    rider = rider.translate(FROM_URL_SAFE) + "=" * (-len(rider) % 4)
    return ToolCall(None, rider, "gemini" if rider else "", plain, name, **about)


# Where a passed body holds any of these, another vendor's answer may have left them there.
MADE_ID = "rs_gw_"  # of a thought that its own vendor did not number
MARKS = (ENVELOPE.encode(), RIDER.encode(), MADE_ID.encode(), b"thinking_blocks", b"extra_content",
         b"Z3cxL", b'"signature":""', b'"signature": ""')
REASONING = "reasoning_content"  # Chat Completions' thoughts, which OpenAI's own servers refuse
FOREIGN_FIELDS = frozenset(["thinking_blocks", "extra_content"])
ID_FIELDS = frozenset(["id", "tool_call_id", "call_id", "tool_use_id"])
TOOL_FIELDS = frozenset(["input", "args", "response"])  # what a call holds is the tool's own
SIGNATURE_FIELDS = ("signature", "encrypted_content", "thoughtSignature", "thought_signature")


def without_marks(value: Any, foreign: FrozenSet[str] = FOREIGN_FIELDS) -> Any:
    """A conversation for the vendor whose dialect it is in, as its own answers would have left it:
    ids cut back, signatures of others left out with what they stand on."""
    if isinstance(value, list):
        kept = [(item, without_marks(item, foreign)) for item in value if not (
            isinstance(item, dict) and is_marked(item) and "functionCall" not in item)]
        return [own for item, own in kept if own == item or not is_silent(own)]
    if not isinstance(value, dict):
        return value
    has_thoughts = "thinking_blocks" in value or any(
        map(encode_json(value.get("tool_calls")).__contains__, (RIDER, "extra_content")))
    return {key: plain_id(item) if key in ID_FIELDS and isinstance(item, str) else
            item if key in TOOL_FIELDS else without_marks(item, foreign)
            for key, item in value.items() if key not in foreign
            and not (key == REASONING and has_thoughts)
            and not (key in SIGNATURE_FIELDS and is_marked({key: item}))}


def is_silent(turn: Any) -> bool:
    """Whether nothing is left of it."""
    return isinstance(turn, dict) and turn.get("role") in ("assistant", "model") and not any(
        map(turn.get, ("content", "tool_calls", "function_call", "parts", "refusal")))


def is_marked(item: JSON) -> bool:
    """Base64 of the envelope's first bytes is Z3cxL."""
    return (item.get("type") == "thinking" and not item.get("signature")
            or text_of(item, "id").startswith(MADE_ID) or any(
                text_of(item, key).startswith((ENVELOPE, "Z3cxL")) for key in SIGNATURE_FIELDS))


# ------------------------------
# What the dialects have in common
# ------------------------------


class Watch:
    """Watches a passed stream: whole events in, what the client may see out. `has_content` is true
    once the first token is there. Only blocks that hold a telling word are looked into: to parse
    every event costs ten times as much as to pass it."""

    is_generation = True  # whose tokens are estimated where none are told

    def __init__(self, dialect: Dialect, hide_usage: bool, needs_done: bool) -> None:
        self._dialect, self._hide_usage, self._needs_done = dialect, hide_usage, needs_done
        self.usage: Usage | None = None
        self.has_content = self.ended = False
        self.failure: GatewayError | None = None
        self._bytes = self._events = 0
        self._first = b""  # the first event with content

    def feed(self, block: bytes) -> bytes:
        raise NotImplementedError

    def end(self) -> bytes:
        if not self.ended and not self.failure:
            self.failure = cut_stream(self._dialect)
        return b""

    def fail(self, error: GatewayError) -> bytes:
        """What tells of it in the place where the stream is; b"" where that makes no difference."""
        return b""

    @property
    def content_bytes(self) -> int:
        """An estimate: all bytes, less for each event what the first with content held around it.
        To count exactly is to parse every event."""
        said = self.said_in(parse_chunk(self._first))
        around = len(self._first) - sum(len(dump_json(each)) - 2 for each in said)
        return max(self._bytes - self._events * around, self._events)

    def said_in(self, wire: JSON) -> List[Any]:
        """The content that an event brings."""
        raise NotImplementedError


class MarkedWatch(Watch):
    """Looks only into the events that hold one of `marks`: those that begin and end an answer, and
    what may be an error."""

    content_mark = b""
    noise: Tuple[bytes, ...] = ()  # marks events that bring no content, or repeat it
    marks: Tuple[bytes, ...] = ()

    def feed(self, block: bytes) -> bytes:
        self._look_for_content(block)
        end, places = 0, {mark: block.find(mark) for mark in self.marks}
        while not (self.ended or self.failure):
            at = min([place for place in places.values() if place >= 0], default=-1)
            if at < 0:
                return block
            chunk, _, end = chunk_around(block, at)
            self.look_at(chunk)
            for mark, place in places.items():  # one that is nowhere is not looked for again
                places[mark] = block.find(mark, end) if 0 <= place < end else place
        return block[:end]

    def _look_for_content(self, block: bytes) -> None:
        at = block.find(self.content_mark)
        if at >= 0:
            self.has_content = True
            start, end = event_span(block, at)
            self._first = self._first or block[start:end]
            self._bytes += len(block) - start
            self._events += block.count(self.content_mark, at)
            for mark in self.noise:
                noisy = block.find(mark, at)
                while noisy >= 0:
                    start, end = event_span(block, noisy)
                    self._bytes -= end - start
                    noisy = block.find(mark, end)

    def look_at(self, wire: JSON) -> None:
        raise NotImplementedError


def cut_stream(dialect: Dialect) -> GatewayError:
    return upstream_error(
        502, f"The provider cut the stream before {dialect.last_event}.", "stream_error")


class DeltaTemplate:
    """Renders an event whose only moving part is one JSON string: what stands around it is encoded
    once, at half the cost. `event` is one whose string is "\\0"."""

    def __init__(self, event: bytes) -> None:
        before, place, after = event.partition(b'":"\\u0000"')  # which no string holds
        self._before, self._after = before + place[:3], place[-1:] + after
        self._between = self._after + self._before

    def __call__(self, text: str) -> bytes:
        return self.around([utf8(encode_string(text))[1:-1]])

    def around(self, strings: List[bytes]) -> bytes:
        """An event for each of these strings as JSON spells them, without their quotes."""
        return b"%b%b%b" % (self._before, self._between.join(strings), self._after)


IN_STRING = rb'[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*'
STRING = rb'"((?!")%b)"' % IN_STRING  # that is not empty
FLAT = rb"[^{}\[\]\r\n]*"  # members that are no objects or lists


class TextEvents:
    """Finds runs of events that bring no more than a piece of text each, which nine of ten do:
    they go over as the strings that stand in them, at a fifth of what it costs to parse each one
    and render it. `data` describes theirs; its group is what stands in the quotes."""

    _is_string = re.compile(IN_STRING).fullmatch

    def __init__(self, data: bytes) -> None:
        self._event = re.compile(
            rb"(?:event: ?[^\r\n]*\r?\n)?data: ?%b[ \t]*\r?\n\r?\n" % data)

    def run_at(self, block: bytes, start: int) -> Tuple[TextRun, int] | None:
        """And where it ends. Raises ValueError where a string is none of JSON's."""
        first = self._event.match(block, start)
        if not first:
            return None
        strings, end = self._alike(block, first)
        if end == first.end() < len(block):  # these say something else around each text
            scanner: Any = self._event.scanner(block, end)  # type: ignore[attr-defined]
            found: List[re.Match[bytes]] = [first, *iter(scanner.match, None)]
            strings, end = [each[1] for each in found], found[-1].end()
        # No string takes a line end in, so that one which is not closed cannot reach the next.
        pieces = decode_json(f'["{LINES.join(strings).decode()}"]')
        if not all(pieces):
            strings = list(filter(None, strings))
            pieces = list(filter(None, pieces))
        return TextRun(pieces, strings), end

    def _alike(self, block: bytes, first: re.Match[bytes]) -> Tuple[List[bytes], int]:
        """The strings of this event and of those behind it that say the same around theirs, and
        where the last one ends: to cut there and compare the whole costs a fifth of a match for
        each, which looks at every byte."""
        start, end = first.span(1)
        before, after = block[first.start():start], block[end:first.end()]
        if not block.startswith(before, first.end()):
            return [first[1]], first.end()
        between, seam = after + before, after[:SEAM_BYTES]
        rest = between[len(seam):]
        pieces = block[start:first.end() + MAX_RUN_BYTES].split(seam)[1:-1]
        strings = [first[1], *[piece[len(rest):] for piece in pieces]]
        run = between.join(strings)
        if b'"' in b"".join(strings) or not block.startswith(run, start):
            alike = itertools.takewhile(lambda piece: piece.startswith(rest) and (
                self._is_string(piece, len(rest))), pieces)
            strings = [first[1], *[piece[len(rest):] for piece in alike]]
            run = between.join(strings)
        end = start + len(run)
        if not block.startswith(after, end):  # the last one says more
            end -= len(between) + len(strings.pop())
        return strings, end + len(after)


SEAM_BYTES = 16
MAX_RUN_BYTES = 16 << 10  # at once: else many short runs would each cut all that follows
LINES = b'",\n"'


class Parser:
    """Reads an upstream's stream. `usage` and `content_bytes` are readable at any time, so that an
    aborted stream is counted."""

    text_events: TextEvents
    needs_done = True  # else a stream of Chat Completions also ends well without its [DONE]
    is_generation = True

    def __init__(self, dialect: Dialect, rewrites: Rewrites) -> None:
        self.rewrites = rewrites
        self.usage: Usage | None = None
        self.content_bytes = 0
        self.ended = False
        self._dialect = dialect
        self._open: Block | None = None
        self._text_is_open = self._has_begun = False
        self._arguments: List[str] = []  # of an open call
        self._is_wrapped = False  # where a function stands for its custom tool
        self._logprobs: List[JSON] = []  # of an open text
        self._broken: GatewayError | None = None
        self._call_ids = rewrites.call_ids.copy()
        self._block_count = self._calls = 0
        self._id = self._model = self._finish = self._service_tier = ""
        self._kept = 0  # characters that wait

    def feed(self, block: bytes) -> Iterator[StreamEvent]:
        """What a block of whole events tells. Raises GatewayError."""
        at = len(BOM) if not self._has_begun and block.startswith(BOM) else 0
        while at < len(block):
            run = self._run_at(block, at) if self._text_is_open else None
            if run:
                yield from run[0]
                at = run[1]
                continue
            data, at = event_at(block, at)
            if data:
                yield from self.read_event(data)

    def _run_at(self, block: bytes, at: int) -> Tuple[Events, int] | None:
        try:
            found = self.text_events.run_at(block, at)
        except ValueError:
            self._text_is_open = False  # the event that is broken is to be found by itself
            return None
        if not found:
            return None
        run, end = found
        self.content_bytes += sum(map(len, run.pieces))
        return [*self.before_run(run, block[at:end]), run], end

    def before_run(self, run: TextRun, events: bytes) -> Events:
        """What they tell beside their texts."""
        return []

    def settle(self) -> None:
        """Reads what was put off, at the end of a stream, however it went."""

    def read_event(self, data: bytes) -> Events:
        raise NotImplementedError

    def keep(self, size: int) -> None:
        self._kept += size
        if self._kept > MAX_KEPT_CHARACTERS:
            raise bad_answer("The provider tells too much at once to be put in order.")

    def end(self) -> Events:
        if not self.ended:
            raise cut_stream(self._dialect)
        return []

    def parse(self, data: bytes) -> JSON:
        try:
            wire = decode_leniently(data.decode())
        except (ValueError, RecursionError) as error:
            raise bad_answer("The provider sent an event that is not JSON.") from error
        if not isinstance(wire, dict):
            raise bad_answer("The provider sent an event that is no object.")
        return wire

    def start(self, answer: JSON) -> Events:
        """The first event, once."""
        if self._has_begun:
            return []
        self._has_begun, self._id = True, text_of(answer, "id") or self.rewrites.answer_id
        self._model = text_of(answer, "model")
        return [Start(self._id, self._model, self.usage)]

    def make_call(self, id_: str, name: str, is_custom: bool = False) -> ToolCall:
        name = self.rewrites.names.get(name, name)
        id_ = id_ or f"call_{self._id[-24:]}_{self._calls}"
        told, number = id_, self._calls
        while id_ in self._call_ids:  # some servers count anew in each answer
            id_, number = f"{told}_{hashed(f'{self._id}{told}{number}', 8)}", number + 1
        self._call_ids.add(id_)
        self._calls += 1
        return ToolCall(id=id_, name=name, is_custom=is_custom or name in self.rewrites.custom)

    def open(self, block: Block) -> Events:
        events = [*self.close(), BlockStart(block)]
        self._open, self._block_count, self._arguments = block, self._block_count + 1, []
        self._text_is_open = isinstance(block, Text) and not block.is_refusal
        self._is_wrapped = isinstance(block, ToolCall) and block.name in self.rewrites.custom
        return events

    def say(self, text: str) -> Events:
        self.content_bytes += len(text)
        if isinstance(self._open, ToolCall):
            self.keep(len(text))
            self._arguments.append(text)
        is_told = text and self._open and not self._is_wrapped
        return [DELTAS[type(self._open)](text)] if is_told else []

    def close(self) -> Events:
        self._text_is_open = False
        if self._open is None:
            return []
        events: Events = [BlockStop(self._logprobs if isinstance(self._open, Text) else ())]
        arguments = "".join(self._arguments)
        is_custom = isinstance(self._open, ToolCall) and self._open.is_custom
        if arguments and (self._is_wrapped or not is_custom):
            try:
                close_block(ToolCall(), arguments)
            except GatewayError as error:
                self._broken = error
        if self._is_wrapped:
            events.insert(0, ArgumentsDelta(unwrap_custom(arguments)))
        self._open, self._logprobs = None, []
        return events

    def finished(self, finish: str, refusal: str = "", tier: str = "") -> Events:
        """The last events. Arguments that are no JSON are an error, unless they were cut off."""
        if not self._has_begun:
            raise bad_answer("The provider's answer says nothing.")
        events = self.close()
        if self._broken and finish != "length":
            raise self._broken
        usage = self.usage or estimated_usage(
            None, self.rewrites.prompt_bytes, self.content_bytes)
        return [*events, Finish(finish, usage, refusal, tier)]


MAX_KEPT_CHARACTERS = 16 << 20


class ItemParser(Parser):
    """Its events name the item that they tell of: one is told to its end, then the next."""

    number = ""  # the field that names it
    events: Mapping[str, Callable[[Any, JSON], Events]] = {}  # what reads them, by type

    def __init__(self, dialect: Dialect, rewrites: Rewrites) -> None:
        super().__init__(dialect, rewrites)
        self._live: object = None  # the item that is being told
        self._later: Dict[object, List[JSON]] = {}  # what is told of others, by item

    def read_event(self, data: bytes) -> Events:
        wire = self.parse(data)
        item = wire.get(self.number)
        if self.ended:
            return []
        if isinstance(item, int) and self._live not in (None, item):
            self.keep(len(encode_json(wire)))
            self._later.setdefault(item, []).append(wire)
            self._text_is_open = False
            return []
        events = self.read_wire(wire)
        if self._later:
            events += self._catch_up()
            self._text_is_open = self._text_is_open and not self._later
        return events

    def read_wire(self, wire: JSON) -> Events:
        read = self.events.get(text_of(wire, "type"))
        return read(self, wire) if read else []  # new kinds may appear

    def _catch_up(self) -> Events:
        events: Events = []
        while self._live is None and self._later:
            waiting = self._later.pop(next(iter(self._later)))
            events += [said for each in waiting for said in self.read_wire(each)]
        return events

    def close_item(self) -> Events:
        self._live = None
        return self.close()

    def close_all(self) -> Events:
        """Also the items whose end was not told."""
        events = self.close_item()
        while self._later:
            events += self._catch_up() + self.close_item()
        return events


CUT_INPUT = re.compile(
    r'\s*\{\s*"input"\s*:\s*("(?:[^"\\]|\\(?:u[0-9a-fA-F]{4}|[^u]))*)', re.DOTALL)


def unwrap_custom(arguments: str) -> str:
    """Of arguments that were cut off what came of the input."""
    try:
        value = parse_arguments(arguments).get("input")
    except ValueError:
        found = CUT_INPUT.match(arguments)
        value = decode_json(f'{found[1]}"') if found else ""
    return value if isinstance(value, str) else arguments


DELTAS: Dict[type, Callable[[str], StreamEvent]] = {
    Text: TextDelta, Thinking: ThinkingDelta, ToolCall: ArgumentsDelta}
RENDERS = {  # what a renderer calls its methods
    Start: "_start", BlockStart: "_block_start", SignatureDelta: "_signature",
    CitationDelta: "_citation", BlockStop: "_block_stop", Finish: "_finish"}


def say_nothing(text: str) -> bytes:
    return b""


class Renderer:
    """Has a method for each kind of event but the deltas of the open block."""

    def __init__(self, chat: Chat, created: int) -> None:
        self._chat = chat
        self._open: Block = Text()
        self._say: Callable[[str], bytes] = say_nothing  # a delta of the open block
        self._said = 0  # characters of it
        self.lost: Set[str] = set()  # what came too late to be told

    def feed(self, event: StreamEvent) -> bytes:
        if isinstance(event, TextRun):
            self._said += sum(map(len, event.pieces))
            return self.say_run(event)
        if isinstance(event, (TextDelta, ThinkingDelta, ArgumentsDelta)):
            self._said += len(event.text)
            return self._say(event.text) if event.text else b""
        out: bytes = getattr(self, RENDERS[event.__class__])(event)
        if isinstance(event, BlockStop):
            self._say = say_nothing  # a method of our own would be a circle of garbage
        return out

    def _signature(self, event: SignatureDelta) -> bytes:
        self._open.signature, self._open.issuer = event
        return b""

    def say_run(self, run: TextRun) -> bytes:
        """Of the open text, which every dialect but one says by a template."""
        return cast(DeltaTemplate, self._say).around(run.strings)

    def fail(self, error: GatewayError) -> bytes:
        """What says that the stream failed; nothing where the dialect's own word for it does."""
        return b""


LONG_PROMPT = re.compile("prompt is too long|input token count .*exceeds|maximum context length|"
                         "available context size|maximum prompt length")  # of several providers


class Dialect(Protocol):
    name: str = ""
    usage_field: str = "usage"  # of an answer
    keepalive: bytes = b": keep-alive\n\n"  # what says no more than that a stream is alive
    id_fields: Tuple[str, ...] = ("x-request-id",)  # of an answer, where its SDKs look for the id
    streams_arrays: bool = False  # where a stream is not asked for as server-sent events
    history: str = ""  # the field of a request that holds the conversation
    answer: str = ""  # the list of an answer that holds all that is said, where there is one
    told: bytes = b'"assistant"'  # stands in every body that holds an answer
    last_event: str = "its end"  # of a stream, in the words of an error
    long_prompt: str = ""  # its words for one that is too long: clients key on them
    plain_fields: Tuple[Tuple[str, str, Any], ...] = ()  # name on the wire, name in Chat, type

    def parse_request(self, wire: JSON, losses: Losses) -> Chat:
        """Raises GatewayError(400) naming the field."""

    def render_request(self, chat: Chat, target: Target, losses: Losses) -> Tuple[JSON, Rewrites]:
        """The same chat gives the same bytes, since prompt caches depend on it.
        Raises GatewayError(400) for what would make the answer wrong."""
        request = ENDS[self.name].writer(chat, target, losses)
        try:
            return request.render(), request.rewrites
        except RecursionError as error:
            raise GatewayError(400, "The request is nested too deeply.") from error

    def parse_reply(self, wire: JSON, rewrites: Rewrites) -> Reply:
        """Raises GatewayError(502)."""

    def render_reply(self, reply: Reply, chat: Chat, created: int) -> JSON:
        """`created` in unix seconds."""

    def parser(self, rewrites: Rewrites) -> Parser:
        return ENDS[self.name].parser(self, rewrites)

    def renderer(self, chat: Chat, created: int) -> Renderer:
        return ENDS[self.name].renderer(chat, created)

    def watch(self, hide_usage: bool, needs_done: bool) -> Watch:
        return ENDS[self.name].watch(self, hide_usage, needs_done)

    def words_of(self, error: GatewayError) -> str:
        if error.code != "context_length_exceeded" or self.long_prompt in error.message:
            return error.message
        return f"{self.long_prompt}: {error.message}"

    def render_error(self, error: GatewayError, request_id: str) -> bytes:
        """As a body; here OpenAI's."""
        return dump_json({"error": {"message": error.message, "type": error.type,
                                    "param": error.param, "code": error.code}})

    def error_event(self, body: bytes) -> bytes:
        return sse(body)

    def render_stream_error(self, error: GatewayError, request_id: str) -> bytes:
        return self.error_event(self.render_error(error, request_id))

    def read_call(self, body: Body | Form, path: str) -> Tuple[str, bool]:
        """The model's name, and whether a stream is asked for."""
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise GatewayError(400, "'model' must be a non-empty string.", "model")
        return model, self.read_stream(body)

    def read_stream(self, body: Body | Form) -> bool:
        stream = body.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise GatewayError(400, "'stream' must be true or false.", "stream")
        return bool(stream)

    def values_for_model(self, body: Body | Form, model: str) -> JSON:
        """What names the model in a passed body."""
        return {} if body.get("model") == model else {"model": model}

    def values_for_ceiling(self, body: Body, most: int) -> JSON:
        """What keeps a passed body's answer below so many tokens."""
        return capped({key: body.get(key) for key, name, _ in self.plain_fields
                       if name == "max_tokens"}, most)

    def suits(self, chat: Chat, caps: Caps) -> bool:
        """Whether a provider that speaks several dialects is to be asked in this one."""
        return True

    def is_spoken_in(self, headers: Headers, query: str) -> bool:
        """Whether a request for what all dialects ask for alike is in this one."""
        return False

    def render_model(self, name: str, owner: str) -> JSON:
        """In a list."""

    def render_models(self, models: List[Tuple[str, str]], query: str) -> JSON:
        """Of names and owners."""
        return {"models": [self.render_model(*model) for model in models]}

    def parse_error(self, wire: object, status: int) -> GatewayError:
        """A provider's error object, or what stands in its place, with the status that it gives
        itself: in a stream the HTTP status is 200."""
        detail = wire if isinstance(wire, dict) else {"message": wire}
        code, type_ = detail.get("code"), text_of(detail, "type")
        type_ = "" if type_ == "error" else type_  # of the event
        message = told_words(detail) or "The provider reported an error."
        if status == 200:
            named = (text_of(detail, "code"), type_, *(
                text_of(each, "reason") for each in list_of_objects(detail, "details")))
            status = next(filter(None, map(ERROR_STATUSES.get, named)), 502)
            if isinstance(code, int) and 400 <= code < 600 and status != 401:
                status = code
        if LONG_PROMPT.search(message):
            code = "context_length_exceeded"  # agents key on it
        elif status == 404 and (type_ == "not_found_error" or detail.get("status") == "NOT_FOUND"):
            code = code if isinstance(code, str) else "model_not_found"
        return upstream_error(
            status, message, error_label(status), type=type_ or None, is_quoted=True,
            param=text_of(detail, "param") or None,
            code=str(code) if isinstance(code, (str, int)) and code != status else None)

    def check_answers(self, wire: JSON) -> None:
        """Raises GatewayError where an error stands in the answer's place, or nothing."""
        if not isinstance(wire.get(self.answer), list):
            raise self.parse_error(wire["error"], 200) if wire.get("error") else (
                bad_answer(f"The provider's answer has no {self.answer}."))

    def parse_usage(self, wire: object) -> Usage | None:
        """None where it is no object."""

    def usage_in(self, reply: JSON) -> Usage | None:
        return self.parse_usage(reply.get(self.usage_field))

    def count_content(self, reply: JSON) -> int:
        return len(dump_json(reply.get(self.answer)))

    def render_estimate(self, wire: JSON) -> JSON:
        """The answer to a request to count a prompt's tokens, where the provider cannot."""
        return {}

    def values_for_usage(self, body: Body) -> JSON:
        """What makes a streamed answer end in its usage; nothing where it does so by itself."""
        return {}

    def parse_plain_fields(self, root: Fields, chat: Chat) -> None:
        for key, name, kind in self.plain_fields:
            value = root.get(key, kind) if key in root.wire else None
            if value is None or getattr(chat, name) is not None:  # said by another name before
                continue
            if name == "max_tokens" and value < 1:
                raise root.wrong(key, "must be at least 1")
            setattr(chat, name, value)


def parse_content(
        holder: Fields, key: str, parts: Mapping[str, Callable[[Fields], Block]]) -> List[Block]:
    """A string, or a list of parts read by their type ("" for any other); empty text is none."""
    content = holder.get(key, TEXT_OR_LIST)
    if isinstance(content, str):
        return [Text(text=content)] if content else []
    blocks: List[Block] = []
    for part in holder.children(key):
        block = parts.get(part.need("type"), parts[""])(part)
        block.cache = parse_cache(part)
        context = isinstance(block, Document) and part.get("context")
        if context:
            blocks.append(Text(text=context))
        if not is_empty(block):
            blocks.append(block)
    return blocks


def messages_of(root: Fields, key: str, roles: Mapping[str, str]) -> Iterator[Turn | Fields]:
    """One that is a role and a text and no more, as most are, is a turn already."""
    for place, wire in root.items(key, dict):
        role, text = wire.get("role"), wire.get("content")
        if len(wire) == 2 and type(text) is str and type(role) is str and role in roles:
            yield Turn(roles[role], [Text(text=text)] if text else [])
        else:
            yield Fields(wire, root.losses, place, root)


def parse_cache(part: Fields) -> JSON | None:
    """A cache mark: Anthropic's own form as it stands, or OpenAI's breakpoint."""
    if part.wire.keys().isdisjoint(CACHE_MARKS):
        return None
    mark: JSON | None = part.get("cache_control", dict)
    if mark is None and part.get("prompt_cache_breakpoint", dict) is not None:
        point = part.child("prompt_cache_breakpoint")
        point.skip("mode")
        is_short = point.get("ttl") in (None, "5m", "30m")
        mark = {"type": "ephemeral", **({} if is_short else {"ttl": "1h"})}
    return mark


CACHE_MARKS = frozenset(["cache_control", "prompt_cache_breakpoint"])
WEB_SEARCH = "web_search"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_USER_CHARACTERS = 64
# What a turn may hold, where not all.
TURN_BLOCKS: Dict[str, Any] = {
    "system": Text, "assistant": (Text, Thinking, ToolCall, Opaque),
    "user": (Text, Image, Document, Audio, ToolResult, Thinking, Opaque)}


def hashed(text: str, length: int) -> str:
    return hashlib.sha1(utf8(text), usedforsecurity=False).hexdigest()[:length]


class RequestWriter:
    """Renders one request; what the target cannot say goes into the losses."""

    legal_name = re.compile("[A-Za-z0-9_-]{1,64}")  # of a tool
    legal_id = re.compile("[A-Za-z0-9_-]+")  # of a call
    issuer = ""  # of the signatures that this wire takes
    takes_cache = False
    has_search = False  # as a tool that can be chosen
    refuses_blanks = False  # texts of white space
    effort_field = "reasoning_effort"  # among the losses

    def __init__(self, chat: Chat, target: Target, losses: Losses) -> None:
        self.chat = chat
        self.target = target
        self.caps = target.caps
        self.losses = losses
        self.rewrites = Rewrites()
        told = [id_ for turn in chat.turns for id_ in call_ids(turn)]
        self.rewrites.call_ids = set(told)
        self.repeats_ids = len(self.rewrites.call_ids) < len(told)
        self.tools = {tool.name: tool for tool in reversed(chat.tools)}
        self.choice = chat.choice or ToolChoice("auto")
        if self.choice.allowed == [] and self.choice.mode == "auto":
            self.choice = ToolChoice("none")
        self.wire: JSON = {"model": target.model}

    def render(self) -> JSON:
        raise NotImplementedError

    def tool_name(self, name: str) -> str:
        if self.legal_name.fullmatch(name):
            return name
        legal = f"_{name}"
        if not self.legal_name.fullmatch(legal) or legal in self.tools:
            legal = f"{re.sub('[^A-Za-z0-9_]', '_', name)[:54]}_{hashed(name, 8)}"
        legal = legal if self.legal_name.fullmatch(legal) else f"_{legal}"
        self.rewrites.names[legal] = name
        return legal

    def call_id(self, id_: str) -> str:
        """The same for a call and its result."""
        return id_ if self.legal_id.fullmatch(id_) else f"call_{hashed(id_, 22)}"

    def turns(self) -> List[Turn]:
        """What this wire has words for, checked; the system's first where the model takes none
        later."""
        turns, calls, kept = self.chat.turns, [], []  # type: List[Turn], List[str], List[Turn]
        is_whole = True
        if not self.caps.mid_system and any(turn.role == "system" for turn in turns[1:]):
            turns = canonical(sorted(turns, key=lambda turn: turn.role != "system"))
        for turn in turns:
            if calls or set(map(type, turn.blocks)) != {Text}:
                check_turn(turn, calls)
                if turn.role != "system":
                    calls = call_ids(turn)
                if turn.role == "user" and any(
                        block.issuer != self.issuer for block in blocks_of(turn.blocks, Opaque)):
                    self.losses.drop("content")  # a file that the model should read
            blocks = list(filter(self._has_words_for, turn.blocks))
            is_whole = is_whole and len(blocks) == len(turn.blocks)
            kept.append(Turn(turn.role, blocks))
        if all(turn.role == "system" for turn in turns):
            raise GatewayError(400, "'messages' must hold a user message.", "messages")
        return kept if is_whole else merged(kept)

    def _has_words_for(self, block: Block) -> bool:
        if self.refuses_blanks and isinstance(block, Text) and not block.text.strip():
            return False
        inner = block.content if isinstance(block, ToolResult) else []
        if not self.takes_cache and any(each.cache for each in (block, *inner)):
            self.losses.hint("cache_control")
        if isinstance(block, Thinking) and not (
                block.signature and block.issuer == self.issuer and self._is_of_family(block)):
            self.losses.hint("thinking")  # it is never told to another vendor
            return False
        if isinstance(block, Opaque) and block.issuer != self.issuer:
            self.losses.hint("content")
            return False
        return True

    def _is_of_family(self, block: Thinking) -> bool:
        own = family_of(self.target.model)
        return not own or block.family in ("", own)

    def offered_tools(self) -> List[Tool]:
        chat, choice = self.chat, self.choice
        if not (chat.tools or chat.choice):
            return []
        names, allowed = set(self.tools), set(choice.allowed or [])
        if self.chat.web_search is not None and self.has_search:
            names.add(WEB_SEARCH)
        for name in [choice.name] * (choice.mode == "tool") + (choice.allowed or []):
            if name not in names:
                raise GatewayError(400, f"'tool_choice' names {clipped(name, 64)!r}, which 'tools' "
                                        "does not have.", "tool_choice")
        if choice.mode == "required" and (not names or choice.allowed == []):
            raise GatewayError(400, "'tool_choice' needs 'tools'.", "tool_choice")
        if not self.takes_cache and any(tool.cache for tool in chat.tools):
            self.losses.hint("cache_control")
        return [tool for tool in chat.tools
                if choice.allowed is None or tool.name in allowed]

    def as_function(self, tool: Tool) -> Tuple[str, JSON]:
        """Its description and schema; a custom tool's function takes one string."""
        if not tool.is_custom:
            return tool.description, tool.schema or {"properties": {}}
        self.rewrites.custom.add(tool.name)
        description = tool.description
        if tool.grammar:
            description = (f"{description}\nThe input follows this {tool.grammar['syntax']} "
                           f"grammar:\n{tool.grammar['definition']}").strip()
        return description, {"properties": {"input": {"type": "string"}}, "required": ["input"]}

    def asked_effort(self) -> str | None:
        """A budget of Anthropic's form counts as a level."""
        thinking = self.chat.thinking or {}
        if thinking.get("type") == "disabled":
            return "none"
        effort, budget = self.chat.effort, self.asked_budget()
        if effort is None and budget:
            return "low" if budget < 4096 else "medium" if budget < 16384 else "high"
        if effort is not None and effort not in EFFORTS:
            raise GatewayError(400, f"'{self.effort_field}' must be one of: {', '.join(EFFORTS)}.",
                               self.effort_field)
        return effort

    def asked_budget(self) -> int:
        thinking = self.chat.thinking or {}
        told = count(thinking.get("budget_tokens")) if thinking.get("type") == "enabled" else 0
        return self.chat.budget or told

    def nearest_effort(self, effort: str) -> str:
        """The level, or the nearest that the model has, the higher first; "" where it has none."""
        levels = [level for level in EFFORTS if level in self.caps.efforts]
        if effort in levels:
            return effort
        self.losses.drop(self.effort_field)
        above = [level for level in levels if EFFORTS.index(level) > EFFORTS.index(effort)]
        return (above or levels[-1:] or [""])[0]

    def capped_tokens(self) -> int | None:
        asked, ceiling = self.chat.max_tokens, self.target.max_output_tokens
        if asked is None or ceiling is None or asked <= ceiling:
            return asked
        self.losses.drop("max_tokens")
        return ceiling

    def checked_stops(self) -> List[str]:
        if len(self.chat.stop) > self.caps.max_stops:
            raise unsupported(
                "stop", f"This model takes {self.caps.max_stops} stop sequences at most.")
        return self.chat.stop

    def lose_options(self, known: Container[str]) -> None:
        for name, value in self.chat.options.items():
            if name not in known:
                lose(self.losses, name, value)


def check_turn(turn: Turn, calls: List[str]) -> None:
    if not all(isinstance(block, TURN_BLOCKS[turn.role]) for block in turn.blocks):
        raise unsupported(
            "messages", "A call of the user's is none." if turn.role == "user" else
            f"The {turn.role}'s messages can hold text only for this model.")
    if turn.role != "user":
        return
    results = [block.id for block in blocks_of(turn.blocks, ToolResult)]
    for ids, others, said in (
            (results, calls, "result {!r} answers no tool call of the message before it."),
            (calls, results, "call {!r} has no result in the message after it.")):
        known = set(others)
        alone = [id_ for id_ in ids if id_ not in known]
        if alone:
            raise GatewayError(400, f"The tool {said.format(clipped(alone[0], 64))}", "messages")


def is_object(schema: JSON) -> bool:
    kind = schema.get("type")
    return kind == "object" or "properties" in schema or isinstance(kind, list) and "object" in kind


def is_strict_schema(schema: object) -> bool:
    """Whether all its objects are closed, and all their properties required."""
    if isinstance(schema, list):
        return all(map(is_strict_schema, schema))
    if not isinstance(schema, dict):
        return True
    required, properties = schema.get("required"), part_of(schema, "properties")
    required = required if isinstance(required, list) else []
    is_open = schema.get("additionalProperties") is not False or not (
        set(properties).issubset(map(str, required)))
    return not (is_object(schema) and is_open) and all(map(is_strict_schema, schema.values()))


def typed_object(schema: JSON) -> JSON:
    return {"type": "object", **{key: value for key, value in schema.items()
                                 if key != "type" and value is not None}}


def call_arguments(call: ToolCall) -> JSON:
    if call.fault[0]:
        raise GatewayError(400, *call.fault)
    return {"input": call.input} if call.is_custom else call.arguments


def as_object(value: object) -> JSON:
    return value if isinstance(value, dict) else {}


def part_of(wire: object, key: str) -> JSON:
    value = wire.get(key) if isinstance(wire, dict) else None
    return value if isinstance(value, dict) else {}


def text_of(wire: JSON, key: str) -> str:
    value = wire.get(key)
    return value if isinstance(value, str) else ""


def list_of_objects(wire: JSON, key: str) -> List[JSON]:
    value = wire.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def without_none(**members: Any) -> JSON:
    return {key: value for key, value in members.items() if value not in (None, "", [])}


def in_paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def told_words(error: JSON) -> str:
    """What an error says, in a string or in whatever a framework makes of it."""
    told = next(filter(None, map(error.get, ("message", "detail", "msg", "errors"))), "")
    try:
        told = clipped(encode_json(told), 200) if isinstance(told, (dict, list)) else told
    except RecursionError:
        return ""
    return told if isinstance(told, str) else ""


def capped(told: JSON, most: int) -> JSON:
    return {key: most for key, value in told.items() if count(value) > most}


def error_label(status: int) -> str:
    if status in (401, 402):
        return "auth"
    if status == 429:
        return "rate_limit"
    return "client_error" if status < 500 else "server_error"


class ChatCompletions(Dialect):
    """OpenAI's Chat Completions (platform.openai.com/docs/api-reference/chat)."""

    name, history = "chat", "messages"
    # Not by its name, which some clients take for the end itself.
    last_event = 'its last event ("done": false in the config is for those who send none)'
    plain_fields = (
        ("max_completion_tokens", "max_tokens", int), ("max_tokens", "max_tokens", int),
        ("temperature", "temperature", NUMBER), ("top_p", "top_p", NUMBER), ("top_k", "top_k", int),
        ("reasoning_effort", "effort", str), ("thinking", "thinking", dict),
        ("user", "user", str), ("web_search_options", "web_search", dict))

    def parse_request(self, wire: JSON, losses: Losses) -> Chat:
        root = Fields(wire, losses)
        stop = root.get("stop", TEXT_OR_LIST)
        chat = Chat(
            root.need("model"), canonical(parse_chat_turns(root)),
            parallel=root.get("parallel_tool_calls", bool), choice=parse_chat_choice(root),
            stop=[stop] if isinstance(stop, str) else root.strings("stop"),
            format=parse_format(root, "response_format"), stream=bool(root.get("stream", bool)))
        self.parse_plain_fields(root, chat)
        if chat.thinking == {"type": "enabled"}:  # as some servers have it, without a budget
            chat.thinking, chat.effort = None, chat.effort or "medium"
        chat.tools = [parse_tool(item.child(kind), kind, parse_cache(item))
                      for item in root.children("tools")
                      for kind in [item.one_of("type", TOOL_KINDS)]]
        if not RARE_IN_CHAT.isdisjoint(wire):
            self._parse_rare_fields(root, chat)
        chat.options = {key: root.get(key, OPTIONS[key].kind) for key, value in wire.items()
                        if key in OPTIONS and value is not None}
        root.name_unknown()
        return chat

    def _parse_rare_fields(self, root: Fields, chat: Chat) -> None:
        if root.get("n", int) not in (None, 1):
            raise unsupported("n", "'n' must be 1 for this model.")
        for key, is_asked in (("audio", root.get("audio", dict) is not None),
                              ("modalities", set(root.strings("modalities")) - {"text"})):
            if is_asked:
                raise unsupported(key, "This model answers in text only.")
        functions = [parse_tool(item, "function", None) for item in root.children("functions")]
        chat.legacy_functions = bool(functions) and not chat.tools
        chat.tools += functions
        alternatives = root.get("top_logprobs", int)
        if root.get("logprobs", bool):
            chat.logprobs = alternatives or 0
        elif alternatives:
            raise root.wrong("top_logprobs", "needs 'logprobs'")
        options = root.child("stream_options", {})
        chat.include_usage = bool(options.get("include_usage", bool))
        if options.get("include_obfuscation", bool) is not None:
            root.losses.hint("include_obfuscation")

    def parse_reply(self, wire: JSON, rewrites: Rewrites) -> Reply:
        if not list_of_objects(wire, "choices") and not wire.get("error"):
            raise bad_answer("The provider's answer has no choices.")
        parser = ChatParser(self, rewrites)
        return collect([*parser.read(wire, "message"), *parser.finish()])

    def render_reply(self, reply: Reply, chat: Chat, created: int) -> JSON:
        texts, calls = blocks_of(reply.blocks, Text), blocks_of(reply.blocks, ToolCall)
        thinking = blocks_of(reply.blocks, Thinking)
        content = joined_texts(text for text in texts if not text.is_refusal)
        refusal = "".join(text.text for text in texts if text.is_refusal) or reply.refusal
        for block, after in zip(reply.blocks, reply.blocks[1:]):
            if isinstance(block, Thinking) and isinstance(after, ToolCall):
                block.before = after.id
        message: JSON = {
            "role": "assistant", "content": content.text or (None if calls or refusal else ""),
            "refusal": refusal or None,
            **without_none(
                annotations=[annotation(each, 0, len(content.text)) for each in content.citations],
                reasoning_content="".join(block.text for block in thinking),
                thinking_blocks=render_thinking_blocks(thinking))}
        if calls and chat.legacy_functions:
            message["function_call"] = render_function(calls[0])
        elif calls:
            message["tool_calls"] = list(map(render_chat_call, calls))
        finish = chat_finish(reply.finish, bool(calls), chat.legacy_functions,
                             any(text.is_refusal for text in texts))
        return {**chat_head("chat.completion", reply.id, reply.model, created),
                "choices": [chat_choice("message", message, finish, content.logprobs)],
                "usage": render_openai_usage(reply.usage, CHAT_USAGE),
                **without_none(service_tier=reply.service_tier)}

    def render_model(self, name: str, owner: str) -> JSON:
        return {"id": name, "object": "model", "created": 0, "owned_by": owner}

    def render_models(self, models: List[Tuple[str, str]], query: str) -> JSON:
        return {"object": "list", "data": [self.render_model(*model) for model in models]}

    def parse_usage(self, wire: object) -> Usage | None:
        return parse_openai_usage(wire, CHAT_USAGE)

    def count_content(self, reply: JSON) -> int:
        return sum(
            len(dump_json(choice.get("message"))) for choice in list_of_objects(reply, "choices"))

    def values_for_usage(self, body: Body) -> JSON:
        if body.inner("stream_options", "include_usage") is True:
            return {}
        options = as_object(body.get("stream_options"))
        return {"stream_options": {**options, "include_usage": True}}


class Option(NamedTuple):
    kind: Any
    is_hint: bool = True
    default: Any = None  # which says nothing


RARE_IN_CHAT = frozenset(["n", "audio", "modalities", "functions", "logprobs", "top_logprobs",
                          "stream_options"])  # to look for each costs a fiftieth of a chat
OPTIONS: Dict[str, Option] = {
    "store": Option(bool, default=False), "metadata": Option(dict, default={}),
    "prompt_cache_key": Option(str), "prompt_cache_options": Option(dict, default={}),
    "prompt_cache_retention": Option(str), "prediction": Option(dict),
    "service_tier": Option(str, default="auto"), "moderation": Option(dict),
    "seed": Option(int, False), "logit_bias": Option(dict, False, {}),
    "frequency_penalty": Option(NUMBER, False, 0), "presence_penalty": Option(NUMBER, False, 0),
    "verbosity": Option(str, False, "medium"), "safety_identifier": Option(str),
}


# What says nothing.
NO_LOSS = {"n": 1, "logprobs": False, "top_logprobs": 0, "parallel_tool_calls": True,
           "tool_choice": "auto", **{name: option.default for name, option in OPTIONS.items()}}


def lose(losses: Losses, path: str, value: object) -> None:
    """Names a field that is left out, unless it says nothing; it may be an option's member."""
    name = path.partition(".")[0]
    if value != NO_LOSS.get(path):
        is_hint = name == "user" or name in OPTIONS and OPTIONS[name].is_hint
        (losses.hint if is_hint else losses.drop)(path)


# ---- from the wire ----


def parse_chat_turns(root: Fields) -> Iterator[Turn]:
    root.need("messages", list)
    function_ids: Dict[str, str] = {}  # by the name of a deprecated function, its last call's
    numbers = itertools.count()
    for message in messages_of(root, "messages", PLAIN_CHAT_ROLES):
        if isinstance(message, Turn):
            yield message
            continue
        role = message.one_of("role", CHAT_ROLES)
        blocks = parse_content(message, "content", CHAT_PARTS)
        if role == "function":
            name = message.need("name")
            blocks = [ToolResult(id=function_ids.get(name, name), content=blocks)]
        elif role == "tool":
            blocks = [ToolResult(id=plain_id(message.need("tool_call_id")), content=blocks)]
        elif role == "assistant":
            blocks = parse_chat_assistant(message, blocks)
            if message.get("function_call", dict) is not None:  # deprecated, and without an id
                call = parse_function(message.child("function_call"))
                call.id = function_ids[call.name] = f"call_{call.name}_{next(numbers)}"
                blocks.append(call)
        if message.get("name") and role != "function":
            message.losses.hint("name")
        cache = parse_cache(message)
        if cache and blocks:
            blocks[-1].cache = cache
        yield Turn(CHAT_ROLES[role], blocks)


PLAIN_CHAT_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
CHAT_ROLES = {**PLAIN_CHAT_ROLES, "tool": "user", "function": "user"}


JPEG = {"image/jpg": "image/jpeg"}


def image_at(about: Fields, key: str) -> Image:
    url, detail = about.need(key), about.get("detail") or ""
    media_type, data = parse_data_uri(url) or ("", "")
    media_type = JPEG.get(media_type, media_type)
    if not media_type and url[:5].lower() == "data:":
        raise about.wrong(key, "must be in base64 where it is a data: URI")
    return Image(url="" if media_type else url, media_type=media_type, data=data, detail=detail)


def parse_file(file: Fields) -> Block:
    if file.get("file_id") is not None:
        raise file.unsupported("file_id", "names a file in another vendor's store")
    uri = parse_data_uri(file.need("file_data"))
    if uri is None:
        raise file.wrong("file_data", "must be a data: URI in base64")
    document = Document(media_type=uri[0], title=file.get("filename") or "")
    if document.media_type.startswith("text/"):
        document.text = decoded_text(uri[1], file, "file_data")
    else:
        document.data = uri[1]
    return document


def decoded_text(data: str, about: Fields, key: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except ValueError as error:
        raise about.wrong(key, "must be UTF-8 text in base64") from error


def refuse_part(part: Fields) -> Block:
    raise part.unsupported("type", "is not known")


def parse_audio_part(part: Fields) -> Block:
    audio = part.child("input_audio")
    return Audio(data=audio.need("data"), format=audio.need("format"))


CHAT_PARTS: Dict[str, Callable[[Fields], Block]] = {
    "text": lambda part: Text(text=part.need("text")),
    "refusal": lambda part: Text(text=part.need("refusal"), is_refusal=True),
    "image_url": lambda part: image_at(part.child("image_url"), "url"),
    "file": lambda part: parse_file(part.child("file")),
    "input_audio": parse_audio_part, "": refuse_part,
}


def parse_chat_assistant(message: Fields, content: List[Block]) -> List[Block]:
    if message.get("audio", dict) is not None:
        raise message.unsupported("audio", "cannot be sent to this model")
    blocks: List[Block] = [parse_thinking(block) for block in message.children("thinking_blocks")]
    if message.get("reasoning_content") and not blocks:
        message.losses.hint("reasoning_content")
    message.hint("annotations", "reasoning", "reasoning_details")
    refusal = message.get("refusal")
    blocks += content + ([Text(text=refusal, is_refusal=True)] if refusal else [])
    blocks += map(parse_chat_call, message.children("tool_calls"))
    return in_place(blocks)


def in_place(blocks: List[Block]) -> List[Block]:
    """Each thought before the call that followed it."""
    thoughts: Dict[str, List[Block]] = {}
    for thought in blocks_of(blocks, Thinking):
        thoughts.setdefault(thought.before, []).append(thought)
    known = {call.id for call in blocks_of(blocks, ToolCall)}
    return [each for block in blocks for each in (
        [*thoughts.get(block.id, []), block] if isinstance(block, ToolCall) else
        [] if isinstance(block, Thinking) and block.before in known else [block])]


THOUGHT_KINDS = ("thinking", "redacted_thinking")  # in Messages, and in Chat's thinking_blocks


def parse_thinking(block: Fields) -> Thinking:
    """Its signature is Anthropic's unless it is in an envelope."""
    family = block.get("family") or ""
    if block.one_of("type", THOUGHT_KINDS) == "redacted_thinking":
        return Thinking(None, block.need("data"), "anthropic", is_redacted=True, family=family)
    thinking = Thinking(text=block.get("thinking") or "", family=family)
    return unseal(thinking, block.get("signature") or "", "anthropic")


def parse_chat_call(call: Fields) -> ToolCall:
    call.skip("index")  # some clients give a stream's back
    if call.get("type") == "custom":
        custom = call.child("custom")
        return carrying_call(
            call.need("id"), custom.need("name"), is_custom=True, input=custom.need("input"))
    made = parse_function(call.child("function"), call.need("id"))
    google = call.child("extra_content", {}).child("google", {})
    signature = google.get("thought_signature")
    if signature:
        made.signature, made.issuer = signature, "gemini"
    return made


def parse_function(function: Fields, id_: str = "") -> ToolCall:
    """Arguments that are no object are a fault only where they are more than a string."""
    told = function.get("arguments") or ""
    call = carrying_call(id_, flat_name(function))
    try:
        call.arguments = parse_arguments(told)
    except ValueError as error:
        fault = function.wrong("arguments", str(error))
        call.input, call.fault = told, (fault.message, fault.param or "")
    return call


def flat_name(holder: Fields) -> str:
    """With its namespace, for those who know none."""
    space, name = holder.get("namespace"), holder.need("name")
    return f"{space}__{name}" if space else name


def parse_tool(about: Fields, kind: str, cache: JSON | None) -> Tool:
    tool = Tool(about.need("name"), about.get("description") or "",
                is_custom=kind == "custom", cache=cache or parse_cache(about))
    if not tool.is_custom:
        tool.schema, tool.strict = about.get("parameters", dict), about.get("strict", bool)
        return tool
    form = about.child("format", {"type": "text"})
    if form.one_of("type", ("text", "grammar")) == "grammar":
        grammar = form if form.wire.get("grammar") is None else form.child("grammar")
        tool.grammar = {key: grammar.need(key) for key in ("syntax", "definition")}
    return tool


TOOL_KINDS = ("function", "custom")  # by is_custom


def parse_chat_choice(root: Fields) -> ToolChoice | None:
    key = "function_call" if root.wire.get("tool_choice") is None else "tool_choice"
    root.get("function_call", TEXT_OR_OBJECT)
    choice = root.get(key, TEXT_OR_OBJECT)
    if choice is None:
        return None
    if isinstance(choice, str):
        return ToolChoice(root.one_of(key, ("auto", "required", "none")))
    about = root.child(key)
    if key == "tool_choice":
        kind = about.one_of("type", (*TOOL_KINDS, "allowed_tools"))
        about = about.child(kind)
        if kind == "allowed_tools":
            about.need("tools", list)
            return ToolChoice(about.one_of("mode", ("auto", "required")), allowed=[
                item.child(item.one_of("type", TOOL_KINDS)).need("name")
                for item in about.children("tools")])
    return ToolChoice("tool", about.need("name"))


def parse_format(holder: Fields, key: str) -> Format | None:
    if holder.wire.get(key) is None:
        return None
    form = holder.child(key)
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    if kind != "json_schema":
        return None if kind == "text" else Format()
    about = form.child(kind) if key == "response_format" else form
    return Format(about.get("schema", dict) or {"type": "object"}, about.need("name"),
                  about.get("description") or "", about.get("strict", bool))


# ---- to the wire ----


class OpenAIRequest(RequestWriter):
    """For OpenAI's two APIs: what is {"type": KIND, KIND: ABOUT} in Chat Completions is
    {"type": KIND, **ABOUT} in Responses, which takes custom tools from every model and is strict
    with functions unless it is told not to be."""

    is_flat = False

    def __init__(self, chat: Chat, target: Target, losses: Losses) -> None:
        super().__init__(chat, target, losses)
        self.takes_custom = self.is_flat or self.caps.custom_tools

    def typed(self, kind: str, about: JSON) -> JSON:
        return {"type": kind, **(about if self.is_flat else {kind: about})}

    def add_tools(self, hosted: Iterable[JSON] = ()) -> None:
        chat, offered = self.chat, self.offered_tools()
        tools = [*map(self._tool, chat.tools if self.takes_custom else offered), *hosted]
        if not tools:
            return
        self.wire["tools"] = tools
        if chat.choice:
            self.wire["tool_choice"] = self._choice()
        if chat.parallel is not None:
            self.wire["parallel_tool_calls"] = chat.parallel

    def _tool(self, tool: Tool) -> JSON:
        about: JSON = {"name": self.tool_name(tool.name)}
        if tool.is_custom and self.takes_custom:
            grammar = tool.grammar and self.typed("grammar", tool.grammar)
            about.update(without_none(description=tool.description, format=grammar))
            return self.typed("custom", about)
        description, schema = self.as_function(tool)
        about.update(
            **without_none(description=description),
            parameters={"properties": {}, **typed_object(schema)}, **self._strictness(tool))
        return self.typed("function", about)

    def _strictness(self, tool: Tool) -> JSON:
        strict = tool.strict
        if strict and (tool.schema is None or not is_strict_schema(tool.schema)):
            self.losses.drop("strict")
            strict = None
        return without_none(strict=bool(strict) if self.is_flat else strict)

    def _choice(self) -> Any:
        choice = self.choice
        if choice.allowed and self.takes_custom:
            return self.typed("allowed_tools", {
                "mode": choice.mode, "tools": list(map(self._named, choice.allowed))})
        return self._named(choice.name) if choice.mode == "tool" else choice.mode

    def _named(self, name: str) -> JSON:
        tool = self.tools.get(name)
        if tool is None:
            return {"type": name}  # the search
        kind = TOOL_KINDS[tool.is_custom and self.takes_custom]
        return self.typed(kind, {"name": self.tool_name(name)})

    def render_format(self) -> JSON | None:
        """Strict only where the schema is as strict mode wants it."""
        form = self.chat.format
        if form is None:
            return None
        if form.schema is None:
            return {"type": "json_object"}
        strict = form.strict and is_strict_schema(form.schema)
        if form.strict and not strict:
            self.losses.drop("strict")
        return self.typed("json_schema", {
            "name": form.name or "output", "schema": form.schema,
            **without_none(strict=strict, description=form.description)})

    def add_sampling(self, effort: str | None) -> None:
        caps, is_idle = self.caps, (effort or self.caps.default_effort) == "none"
        is_taken = caps.sampling in ("both", "one") or caps.sampling == "idle" and is_idle
        for name in ("temperature", "top_p"):
            value = getattr(self.chat, name)
            if value is not None and is_taken:
                self.wire[name] = value
            elif value not in (None, 1):
                self.losses.drop(name)
        if self.chat.top_k is not None and caps.top_k:
            self.wire["top_k"] = self.chat.top_k
        elif self.chat.top_k is not None:
            self.losses.drop("top_k")

    def checked_user(self) -> str | None:
        user = self.chat.user
        return user if not user or len(user) <= MAX_USER_CHARACTERS else hashed(user, 40)


SHORT_ID = re.compile("[A-Za-z0-9]{9}")


class ChatRequest(OpenAIRequest):
    """What OpenAI's own servers refuse is left out for all that speak like them."""

    legal_id = re.compile(".{1,40}", re.DOTALL)

    def render(self) -> JSON:
        chat, wire, caps = self.chat, self.wire, self.caps
        wire["messages"] = [message for turn in self.turns() for message in self._messages(turn)]
        self.add_tools()
        self._add_effort()
        most = self.capped_tokens()
        if most is not None:
            wire[caps.max_tokens_field] = most
        self.add_sampling(wire.get("reasoning_effort"))
        wire.update(without_none(stop=self.checked_stops(), user=self.checked_user(),
                                 response_format=self.render_format()))
        if chat.web_search is not None and "search" in self.target.model:
            wire["web_search_options"] = chat.web_search
        elif chat.web_search is not None:
            self.losses.drop("web_search")
        if chat.logprobs is not None:
            wire.update(logprobs=True, top_logprobs=chat.logprobs)
        options = dict(chat.options)
        if not caps.custom_tools and options.pop("verbosity", None) not in (None, "medium"):
            self.losses.drop("verbosity")
        wire.update(options)
        if chat.stream:
            wire.update(stream=True, stream_options={"include_usage": True})
        return wire

    def call_id(self, id_: str) -> str:
        is_legal = not self.caps.short_ids or SHORT_ID.fullmatch(id_)
        return super().call_id(id_) if is_legal else hashed(id_, 9)

    def _has_words_for(self, block: Block) -> bool:
        """Thoughts that nobody signed are those of a model that is asked here."""
        is_own = self.caps.needs_thoughts and isinstance(block, Thinking) and not block.issuer
        return is_own or super()._has_words_for(block)

    def _messages(self, turn: Turn) -> Iterator[JSON]:
        """Pictures and files of results follow in a message of the user's."""
        text = turn.blocks[0] if len(turn.blocks) == 1 else None
        if isinstance(text, Text) and not (text.is_refusal or self.caps.needs_thoughts):
            yield {"role": turn.role, "content": text.text}  # as nearly always
            return
        for text in blocks_of(turn.blocks, Text):
            text.is_refusal = text.is_refusal and turn.role == "assistant"
        pictures: List[JSON] = []
        for block in blocks_of(turn.blocks, ToolResult):
            id_ = self.call_id(block.id)
            others = [part for part in block.content if not isinstance(part, Text)]
            if others:
                pictures += self._parts([Text(text=f"From the tool call {id_}:"), *others])
            said = "\n".join(part.text for part in blocks_of(block.content, Text))
            yield {"role": "tool", "tool_call_id": id_,  # which has no flag
                   "content": f"Error: {said}" if block.is_error else said}
        parts = self._parts(block for block in turn.blocks if type(block) in self.kinds)
        calls = [self._call(call) for call in blocks_of(turn.blocks, ToolCall)]
        if parts and turn.role != "user" and not any(
                part["type"] == "refusal" for part in parts):  # some servers take no list here
            seam = "\n\n" if turn.role == "system" else ""
            parts = [{"type": "text", "text": seam.join(part["text"] for part in parts)}]
        if pictures or parts or calls:
            message = {"role": turn.role, "content": plain_content([*pictures, *parts]) or None,
                       **without_none(tool_calls=calls)}
            if self.caps.needs_thoughts and turn.role == "assistant":
                message["reasoning_content"] = in_paragraphs(
                    *(thought.text for thought in blocks_of(turn.blocks, Thinking)))
            yield message

    def _parts(self, blocks: Iterable[Block]) -> List[JSON]:
        parts = [self.kinds[type(block)](self, block) for block in blocks]
        return [{"type": kind, kind: about} for kind, about in parts]

    def _text(self, block: Text) -> Tuple[str, object]:
        return "refusal" if block.is_refusal else "text", block.text

    def _image(self, block: Image) -> Tuple[str, object]:
        return "image_url", {"url": url_of(block), **without_none(detail=block.detail)}

    def _document(self, block: Document) -> Tuple[str, object]:
        if block.url:
            raise unsupported("file", "A document by URL cannot be sent to this model.")
        if block.text:
            return "text", titled_text(block)
        return "file", {"filename": block.title or "document.pdf", "file_data": url_of(block)}

    def _audio(self, block: Audio) -> Tuple[str, object]:
        return "input_audio", {"data": block.data, "format": block.format}

    kinds: Mapping[type, Callable[[Any, Any], Tuple[str, object]]] = {
        Text: _text, Image: _image, Document: _document, Audio: _audio}

    def _call(self, call: ToolCall) -> JSON:
        name, id_ = self.tool_name(call.name), self.call_id(call.id)
        if call.is_custom and self.takes_custom:
            return {"id": id_, "type": "custom", "custom": {"name": name, "input": call.input}}
        arguments = call.input if call.fault[0] else encode_json(call_arguments(call))
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _add_effort(self) -> None:
        """Newer models take tools here only while they do not think."""
        effort, caps = self.asked_effort(), self.caps
        is_idle = caps.chat_tools == "idle" and "tools" in self.wire
        if effort not in (None, "none") and (is_idle or caps.thinking != "effort"):
            self.losses.drop("reasoning_effort")
        effort = "none" if is_idle else effort
        if effort is not None and caps.thinking == "effort":
            self.wire["reasoning_effort"] = self.nearest_effort(effort)


def url_of(block: Image | Document) -> str:
    return block.url or f"data:{block.media_type};base64,{block.data}"


def titled_text(block: Document) -> str:
    return in_paragraphs(block.title, block.text)


def plain_content(blocks: List[JSON]) -> Any:
    if len(blocks) == 1 and list(blocks[0]) == ["type", "text"]:
        return blocks[0]["text"]
    return blocks


def render_thinking_blocks(blocks: List[Thinking]) -> List[JSON]:
    """But for those whose calls carry the signature."""
    return [{**render_thinking_block(block), **without_none(family=block.family)}
            for block in blocks if block.signature and not is_in_call(block)]


def render_thinking_block(block: Thinking) -> JSON:
    if block.is_redacted and block.issuer == "anthropic":
        return {"type": "redacted_thinking", "data": block.signature}
    return {"type": "thinking", "thinking": block.text, "signature": seal(block, "anthropic")}


def render_function(call: ToolCall) -> JSON:
    return {"name": call.name, "arguments": call.input or encode_json(call.arguments)}


def render_chat_call(call: ToolCall) -> JSON:
    wire: JSON = {"id": carried_id(call), "type": TOOL_KINDS[call.is_custom]}
    if call.is_custom:
        return {**wire, "custom": {"name": call.name, "input": call.input}}
    return {**wire, "function": render_function(call), **extra_content(call)}


def extra_content(call: ToolCall) -> JSON:
    """Where Google's own endpoint of this dialect puts a signature."""
    google = {"google": {"thought_signature": call.signature}}
    return {"extra_content": google} if call.signature else {}


# What the two APIs call what was asked and said; the parts of each stand in its details.
CHAT_USAGE = ("prompt_tokens", "completion_tokens")
RESPONSES_USAGE = ("input_tokens", "output_tokens")


def parse_openai_usage(wire: object, names: Tuple[str, str]) -> Usage | None:
    """The Responses API's names come in other answers too."""
    if not isinstance(wire, dict):
        return None
    asked, said = names
    read, written = part_of(wire, f"{asked}_details"), part_of(wire, f"{said}_details")
    total = wire.get("total_tokens")
    alone = None if said in wire else total  # some tell no more
    prompt = count(wire.get(asked, wire.get("input_tokens", alone)))
    output = count(wire.get(said, wire.get("output_tokens")))
    reasoning = count(written.get("reasoning_tokens"))
    if reasoning and prompt + output + reasoning == total:  # some leave the thoughts out of it
        output += reasoning
    return Usage(prompt, output, count(read.get("cached_tokens")),
                 count(read.get("cache_write_tokens")), 0, reasoning)


def render_openai_usage(usage: Usage, names: Tuple[str, str]) -> JSON:
    asked, said = names
    return {asked: usage.input, said: usage.output, "total_tokens": usage.input + usage.output,
            f"{asked}_details": {"cached_tokens": usage.cache_read,
                                 "cache_write_tokens": usage.cache_write},
            f"{said}_details": {"reasoning_tokens": usage.reasoning}}


def annotation(citation: JSON, start: int, end: int) -> JSON:
    return {"type": "url_citation", "url_citation": cited_at(citation, start, end)}


def cited_at(citation: JSON, start: int, end: int) -> JSON:
    """In a text from `start` to `end`; some providers tell the place in it, the others mean all."""
    return {"url": citation["url"], "title": citation["title"],
            "start_index": start + citation.get("start", 0),
            "end_index": start + citation["end"] if "end" in citation else end}


def parse_citation(about: JSON) -> JSON:
    start, end = count(about.get("start_index")), count(about.get("end_index"))
    return {"url": text_of(about, "url"), "title": text_of(about, "title"),
            **({"start": start, "end": end} if end else {})}


def chat_head(kind: str, id_: str, model: str, created: int) -> JSON:
    return {"id": own_id("chatcmpl-", id_), "object": kind, "created": created, "model": model,
            "system_fingerprint": None}


def chat_choice(part: str, said: JSON, finish: str | None, logprobs: Sequence[JSON]) -> JSON:
    told = {"content": [*logprobs], "refusal": None} if logprobs else None
    return {"index": 0, part: said, "logprobs": told, "finish_reason": finish}


CHAT_FINISHES = {"stop": "stop", "length": "length", "tool_calls": "tool_calls",
                 "function_call": "tool_calls", "content_filter": "filter"}
FINISHES_IN_CHAT = {"length": "length", "context": "length", "refusal": "content_filter",
                    "filter": "content_filter"}


def chat_finish(finish: str, has_calls: bool, legacy: bool, has_refused: bool) -> str:
    """A refusal in the model's words ends as any answer does; its SDKs raise on the filter's."""
    if finish == "tool_calls" and has_calls:
        return "function_call" if legacy else "tool_calls"
    if finish == "refusal" and has_refused:
        return "stop"
    return FINISHES_IN_CHAT.get(finish, "stop")


class KnownCall(NamedTuple):
    id: str  # as the server says it, which the call's may not be
    number: int  # of its own
    call: ToolCall


BESIDE_CHOICES = frozenset(["citations", "search_results"])
BESIDE_CONTENT = frozenset(["images", "audio", "reasoning_details"])


class ChatParser(Parser):
    """One block is open at a time: a call stays open to the end, since more of it may come,
    and what is said beside it waits."""

    def __init__(self, dialect: ChatCompletions, rewrites: Rewrites) -> None:
        super().__init__(dialect, rewrites)
        self._open_key: object = None
        self._waiting: Dict[object, Tuple[Block, List[str]]] = {}
        self._by_index: Dict[object, KnownCall] = {}
        self._unnamed: Dict[object, Tuple[str, List[str]]] = {}  # calls whose name is to come
        self._early: List[JSON] = []  # citations of a text that is still to come
        self._text_block = -1
        self._has_refused = False

    text_events = TextEvents(
        rb'\{' + FLAT + rb'"choices": ?\[\{"index": ?0, ?"delta": ?\{"content": ?' + STRING
        + rb'\}(?:, ?"logprobs": ?null)?, ?"finish_reason": ?null\}\]' + FLAT + rb"\}")

    def start(self, answer: JSON) -> Events:
        self._text_is_open = self._text_is_open or not self._has_begun  # the first may come so
        return super().start(answer)

    def before_run(self, run: TextRun, events: bytes) -> Events:
        return [] if self._open is not None else self._begin("content", Text())

    def read_event(self, data: bytes) -> Events:
        if self.ended:
            return []
        if data.strip() == b"[DONE]":
            self.ended = True
            if not (self._finish or self._calls):
                self._finish = "length"  # nobody said that it is whole
            return self.finish()
        return self.read(self.parse(data), "delta")

    def end(self) -> Events:
        if self.ended or self.needs_done or not self._finish:
            return super().end()
        self.ended = True
        return self.finish()

    def read(self, wire: JSON, part: str) -> Events:
        """A chunk, or with `part` "message" a whole answer."""
        if wire.get("error"):
            raise self._dialect.parse_error(wire["error"], 200)
        if wire.get("usage"):
            self.usage = self._dialect.parse_usage(wire["usage"]) or self.usage
        self._service_tier = text_of(wire, "service_tier") or self._service_tier
        events = self.start(wire)
        self._lose(BESIDE_CHOICES, wire)
        for choice in list_of_objects(wire, "choices")[:1]:
            delta = part_of(choice, part)
            if part == "message":  # each is a call of its own
                delta = {**delta, "tool_calls": [{**call, "index": i} for i, call in enumerate(
                    list_of_objects(delta, "tool_calls"))]}
            events += self._read_delta(delta)
            self._logprobs += list_of_objects(part_of(choice, "logprobs"), "content")
            reason = text_of(choice, "finish_reason")
            if reason in ("error", "abort"):
                raise upstream_error(502, "The provider failed.", "stream_error")
            self._finish = CHAT_FINISHES.get(reason, "stop") if reason else self._finish
        return events

    def _read_delta(self, delta: JSON) -> Events:
        events: Events = []
        if not [key for key, said in delta.items() if said and key != "role"]:
            return events
        thought = text_of(delta, "reasoning_content") or text_of(delta, "reasoning")
        said = [("reasoning", thought), ("content", text_of(delta, "content")),
                *listed_content(delta), ("refusal", text_of(delta, "refusal"))]
        for key, text in said:
            if text:
                block = Thinking() if key == "reasoning" else Text(is_refusal=key == "refusal")
                events += self._say(key, block, text)
        for item in list_of_objects(delta, "annotations"):
            about = part_of(item, "url_citation")
            if not about:
                self.rewrites.lost.add("annotations")
            elif self._text_block >= 0:
                events.append(CitationDelta(self._text_block, parse_citation(about)))
            else:
                self.keep(len(encode_json(about)))
                self._early.append(parse_citation(about))
        calls = list_of_objects(delta, "tool_calls")
        old = part_of(delta, "function_call")
        if old and all(part_of(call, "function").get("arguments") != old.get("arguments")
                       for call in calls):  # some servers tell a call in both ways
            calls.append({"index": len(calls), "function": old})
        for call in calls:
            events += self._read_call(call)
        self._has_refused = self._has_refused or bool(delta.get("refusal"))
        self._lose(BESIDE_CONTENT, delta)
        return events

    def _lose(self, names: FrozenSet[str], told: JSON) -> None:
        if not names.isdisjoint(told):
            self.rewrites.lost.update(name for name in names if told.get(name))

    def _read_call(self, call: JSON) -> Events:
        """A call or a piece of one. Some servers leave the index out, or say 0 for each: a new id
        with a name is then a new call."""
        about = part_of(call, "custom") or part_of(call, "function")
        id_, name, index = text_of(call, "id"), text_of(about, "name"), call.get("index")
        if not isinstance(index, int):
            index = -1
        known = self._by_index.get(index)
        arguments = part_of(about, "arguments")  # some servers' are no string
        said = encode_json(arguments) if arguments else text_of(about, "arguments")
        said = said or text_of(about, "input")
        if known is None and (not name or index in self._unnamed):
            told, pieces = self._unnamed.pop(index, ("", []))
            id_ = told or id_
            pieces += [said] if said else []
            self.keep(len(said) + 64)
            if not name:
                self._unnamed[index] = (id_, pieces)
                return []
            said = "".join(pieces)
        if known is None or name and (id_ != known.id if id_ else index < 0):
            number, made = self._calls, self.make_call(id_, name, call.get("type") == "custom")
            known = self._by_index[index] = KnownCall(id_, number, made)
        return self._say(known.number, known.call, said)

    def _say(self, key: object, block: Block, text: str) -> Events:
        if key == self._open_key:
            return self.say(text)
        if isinstance(self._open, ToolCall):
            self.keep(len(text))
            self._waiting.setdefault(key, (block, []))[1].append(text)
            return []
        return self._begin(key, block) + self.say(text)

    def _begin(self, key: object, block: Block) -> Events:
        events, self._open_key = self.open(block), key
        if key == "content":
            self._text_block = self._block_count - 1
            events += [CitationDelta(self._text_block, each) for each in self._early]
            self._early = []
        return events

    def finish(self) -> Events:
        events: Events = []
        for block, pieces in self._waiting.values():
            events += self.open(block) + self.say("".join(pieces))
        if any(id_ or pieces for id_, pieces in self._unnamed.values()):
            raise bad_answer("The provider called a tool without its name.")
        if self._early:
            self.rewrites.lost.add("annotations")
        finish = self._finish or "stop"
        if finish == "stop" and self._calls:
            finish = "tool_calls"
        elif finish in ("stop", "filter") and self._has_refused:
            finish = "refusal"
        return events + self.finished(finish, "", self._service_tier)


def listed_content(delta: JSON) -> Iterator[Tuple[str, str]]:
    """Mistral's models that reason answer in parts."""
    for part in list_of_objects(delta, "content"):
        if part.get("type") == "thinking":
            for thought in list_of_objects(part, "thinking"):
                yield "reasoning", text_of(thought, "text")
        else:
            yield "content", text_of(part, "text")


class ChatRenderer(Renderer):
    def __init__(self, chat: Chat, created: int) -> None:
        super().__init__(chat, created)
        self._created = created
        self._head = b""  # of each chunk: what stands before its choices
        self._ends = [0]  # of the blocks in the content, after a first end at its start
        self._citations: List[CitationDelta] = []
        self._calls = 0
        self._has_refused = False
        self._thinking: List[Thinking] = []
        self._thought: List[str] = []

    def _chunk(self, delta: JSON, finish: str | None = None,
               logprobs: Sequence[JSON] = ()) -> bytes:
        if not self._head:
            self._begin("")  # some providers leave out their first event
        choice = dump_json(chat_choice("delta", delta, finish, logprobs))
        usage = b',"usage":null' if self._chat.include_usage else b""
        return sse(b'%b,"choices":[%b]%b}' % (self._head, choice, usage))

    def _begin(self, id_: str) -> None:
        head = chat_head("chat.completion.chunk", id_, self._chat.model, self._created)
        self._head = dump_json(head)[:-1]

    def _start(self, event: Start) -> bytes:
        self._begin(event.id)
        return self._chunk({"role": "assistant", "content": ""})

    def _block_start(self, event: BlockStart) -> bytes:
        before, block = self._open, event.block
        self._open, self._said = block, 0
        if isinstance(block, ToolCall):
            if isinstance(before, Thinking):
                before.before = block.id
            return self._call_start(block)
        if isinstance(block, Thinking):
            self._open = thought = block.but()
            self._thinking.append(thought)
            self._thought = []
            say = DeltaTemplate(self._chunk({"reasoning_content": "\0"}))
            self._say = lambda text: say(self._keep(text))
            return b""
        self._has_refused = self._has_refused or is_refusal(block)
        key = "refusal" if is_refusal(block) else "content"
        self._say = DeltaTemplate(self._chunk({key: "\0"}))
        return b""

    def _keep(self, thought: str) -> str:
        self._thought.append(thought)
        return thought

    def _call_start(self, call: ToolCall) -> bytes:
        kind, key = ("custom", "input") if call.is_custom else ("function", "arguments")
        index, self._calls = self._calls, self._calls + 1

        def delta(about: JSON, **head: Any) -> bytes:
            return self._chunk({"function_call": about} if self._chat.legacy_functions else {
                "tool_calls": [{"index": index, **head, kind: about}]})

        if self._chat.legacy_functions and index:  # there is but one
            return b""
        self._say = DeltaTemplate(delta({key: "\0"}))
        return delta({"name": call.name, key: ""}, id=carried_id(call), type=kind,
                     **extra_content(call))

    def _citation(self, event: CitationDelta) -> bytes:
        self._citations.append(event)  # the SDK takes all of them in one chunk only
        return b""

    def _block_stop(self, event: BlockStop) -> bytes:
        block, is_content = self._open, isinstance(self._open, Text) and not self._open.is_refusal
        self._ends.append(self._ends[-1] + (self._said if is_content else 0))
        if isinstance(block, Thinking):
            block.text = "".join(self._thought)
        elif isinstance(block, ToolCall) and not block.is_custom and not self._said:
            return self._say("{}")
        return self._chunk({}, logprobs=event.logprobs) if event.logprobs else b""

    def _finish(self, event: Finish) -> bytes:
        annotations = [annotation(citation, *self._ends[block:block + 2])
                       for block, citation in self._citations]
        lists = without_none(
            thinking_blocks=render_thinking_blocks(self._thinking), annotations=annotations)
        out = self._chunk(lists) if lists else b""
        if event.refusal:
            out += self._chunk({"refusal": event.refusal})
        if event.service_tier:
            self._head += b"," + dump_json({"service_tier": event.service_tier})[1:-1]
        finish = chat_finish(event.finish, self._calls > 0, self._chat.legacy_functions,
                             self._has_refused)
        out += self._chunk({}, finish)
        if self._chat.include_usage:
            usage = render_openai_usage(event.usage, CHAT_USAGE)
            out += sse(b'%b,"choices":[],"usage":%b}' % (self._head, dump_json(usage)))
        return out + sse(b"[DONE]")


TEXT_DELTA = re.compile(
    rb'"delta": ?\{(?:"role": ?"assistant", ?)?"content": ?"(?!")')
USAGE = re.compile(rb'"usage"\s*:\s*\{')
DONE = re.compile(rb"data:[ \t]*\[DONE\]")
PLAIN_DONES = (b"\ndata: [DONE]\n\n", b"\ndata: [DONE]\r\n\r\n")
COMMENTS = re.compile(rb"(?:(?::[^\r\n]*)?[\r\n])*")  # in one way only, lest it backtrack


def find_usage(block: bytes, before: int) -> int:
    """Where the last "usage" that holds an object starts, or -1. The regex crawls: it is only for
    unusual white space."""
    at = block.rfind(b'"usage":{', 0, before)
    at = max(at, block.rfind(b'"usage": {', max(at, 0), before))
    if at < 0:
        nulls = (block.count(b'"usage":null', 0, before)
                 + block.count(b'"usage": null', 0, before))
        if block.count(b'"usage"', 0, before) > nulls:
            at = max([found.start() for found in USAGE.finditer(block, 0, before)], default=-1)
    return at


def find_done(block: bytes) -> int:
    """Where the event of the stream's first [DONE] ends, or -1; the word in a text is none."""
    for plain in PLAIN_DONES:  # as nearly always; the longer a word is, the sooner it is found
        if block.endswith(plain) and not block.startswith(plain[1:]):
            return block.index(plain) + len(plain)
    at = block.find(b"[DONE]")
    while at >= 0:  # a regex would crawl through all that stands before it
        line = block.rfind(b"data:", max(at - 256, 0), at)
        if line >= 0 and block[line - 1:line] in b"\r\n" and DONE.match(block, line):
            return event_end(block, at + len(b"[DONE]"))
        at = block.find(b"[DONE]", at + 1)
    return -1


class ChatWatch(Watch):
    """With `hide_usage` the usage chunk that we asked for is held until the next event shows
    that it was the last before [DONE], and dropped. Without `needs_done` a stream also ends well
    when each of its choices gave a finish_reason."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._held = b""
        self._open_choices: Dict[object, bool] = {}

    def feed(self, block: bytes) -> bytes:
        text = None if self.has_content else TEXT_DELTA.search(block)
        self.has_content = self.has_content or text is not None  # nearly always the first content
        begins = text.start() if text else 0 if self.has_content else -1
        if begins < 0 or not self._needs_done:
            begins = max(begins, self._look_at_each(block))
        done = find_done(block)
        if done >= 0:
            self.ended = True
            block = block[:done]
        if b'"error"' in block:
            block = self._cut_at_error(block)
        passed = self._settle_held(block) if self._held else (
            self._take_usage(block) if b'"usage"' in block else block)
        if self.has_content and not (self.ended and self.usage):
            if not self._first:
                begins, end = event_span(block, begins)
                self._first = block[begins:end]
            self._bytes += len(block) - max(begins, 0)
            self._events += block.count(b"\ndata:", begins) + 1
        return passed

    def end(self) -> bytes:
        if not self._needs_done and self._open_choices and not any(self._open_choices.values()):
            self.ended = True
        return super().end()  # what is still held was ours, however it ended

    def _look_at_each(self, block: bytes) -> int:
        """Where the first content begins, or -1; where no [DONE] is to come, it sees which choices
        are open."""
        begins, at = -1, 0
        for raw in split_events(block):
            for choice in list_of_objects(parse_chunk(raw), "choices"):
                self._open_choices[str(choice.get("index"))] = not choice.get("finish_reason")
                said = said_by(choice)
                if not self.has_content and (said or choice.get("finish_reason")):
                    self.has_content, self._first, begins = True, raw, at
            at += len(raw)
            if self.has_content and self._needs_done:
                break
        return begins

    def said_in(self, wire: JSON) -> List[Any]:
        return [said for choice in list_of_objects(wire, "choices") for said in said_by(choice)]

    def _cut_at_error(self, block: bytes) -> bytes:
        at = 0
        for raw in split_events(block):
            at += len(raw)
            chunk = parse_chunk(raw) if b'"error"' in raw else {}
            if chunk.get("error"):
                self.failure = self._dialect.parse_error(chunk["error"], 200)
                self.ended = False
                return block[:at]
        return block

    def _take_usage(self, block: bytes) -> bytes:
        at = find_usage(block, len(block))
        while at >= 0:
            chunk, start, end = chunk_around(block, at)
            usage = self._dialect.parse_usage(chunk.get("usage"))
            if usage is not None:
                self.usage = usage
                break
            at = find_usage(block, start)
        if at < 0 or not (self._hide_usage and chunk.get("choices") == []
                          and part_of(chunk, "usage") and not chunk.get("moderation")):
            return block
        self._held = block[start:end]
        return b"".join([memoryview(block)[:start], self._settle_held(block[end:])])

    def _settle_held(self, block: bytes) -> bytes:
        follows = COMMENTS.match(block).end()  # type: ignore[union-attr]  # it matches everywhere
        if follows == len(block):
            return block
        held, self._held = self._held, b""
        if DONE.match(block, follows):
            return block
        return held + self._take_usage(block)


class LooseWatch(ChatWatch):
    """Of an endpoint whose events nobody here knows: it ends where its body does."""

    is_generation = False

    def _look_at_each(self, block: bytes) -> int:
        self.has_content = self.has_content or b"data:" in block
        return 0

    def end(self) -> bytes:
        self.ended = not self.failure
        return super().end()


def said_by(choice: JSON) -> List[Any]:
    """What a chunk brings; `text` is the Completions API's."""
    said = {**part_of(choice, "delta"), "text": choice.get("text")}
    return [value for key, value in said.items() if key != "role" and value]


def parse_chunk(raw: bytes) -> JSON:
    """{} for anything but an object, which passes too."""
    return json_object(event_data(raw)) or {}


def chunk_around(block: bytes, at: int) -> Tuple[JSON, int, int]:
    """Of the event that holds this place, and where it starts and ends."""
    start = last_blank_line(block, at)
    data, end = event_at(block, start)
    return json_object(data) or {}, start, end


class Messages(Dialect):
    """Anthropic's Messages (docs.claude.com/en/api/messages)."""

    name, history, answer = "messages", "messages", "content"
    keepalive = sse(b'{"type":"ping"}', "ping")
    id_fields = ("x-request-id", "request-id")
    long_prompt = "prompt is too long"
    plain_fields = (
        ("max_tokens", "max_tokens", int), ("temperature", "temperature", NUMBER),
        ("top_p", "top_p", NUMBER), ("top_k", "top_k", int), ("thinking", "thinking", dict))

    def parse_request(self, wire: JSON, losses: Losses) -> Chat:
        root = Fields(wire, losses)
        if root.get("thread", dict) is not None:  # SDKs go on without where they hear this code
            raise root.wrong("thread", "needs a provider that keeps conversations; send all "
                             "messages", NO_THREADS)
        turns = canonical(parse_messages_turns(root))
        root.need("max_tokens", int)
        chat = Chat(root.need("model"), turns, stop=root.strings("stop_sequences"),
                    stream=bool(root.get("stream", bool)))
        self.parse_plain_fields(root, chat)
        thinking = chat.thinking or {"type": "disabled"}
        chat.shows_thinking = (
            thinking.get("type") != "disabled" and thinking.get("display") != "omitted")
        for item in root.children("tools"):
            parse_messages_tool(item, chat)
        if not RARE_IN_MESSAGES.isdisjoint(wire):
            self._parse_rare_fields(root, chat)
        root.name_unknown()
        chat.estimate = estimate_tokens(chat)
        return chat

    def _parse_rare_fields(self, root: Fields, chat: Chat) -> None:
        output = root.child("output_config", {})
        chat.effort, chat.user = output.get("effort"), root.child("metadata", {}).get("user_id")
        if root.get("tool_choice", dict) is not None:
            choice = root.child("tool_choice")
            mode = MESSAGES_CHOICES[choice.one_of("type", MESSAGES_CHOICES)]
            chat.choice = ToolChoice(mode, choice.need("name") if mode == "tool" else "")
            single = choice.get("disable_parallel_tool_use", bool)
            chat.parallel = None if single is None else not single
        for holder, key in ((root, "output_format"), (output, "format")):  # the former of a beta
            if holder.get(key, dict) is not None:
                form = holder.child(key)
                form.one_of("type", ("json_schema",))
                chat.format = Format(form.need("schema", dict))
        tier = root.get("service_tier")
        if tier is not None:
            chat.options["service_tier"] = {"standard_only": "default"}.get(tier, "auto")
        if root.skip("mcp_servers"):
            root.losses.drop("mcp_servers")
        root.hint(*MESSAGES_HINTS)

    def parse_reply(self, wire: JSON, rewrites: Rewrites) -> Reply:
        """Read as the stream that it could have been."""
        self.check_answers(wire)
        parser = MessagesParser(self, rewrites)
        events = parser.message_start({"message": wire})
        for block in list_of_objects(wire, "content"):
            events += parser.block_start({"content_block": block}) + parser.close_item()
        return collect([*events, *parser.message_delta({"delta": wire}), *parser.finish({})])

    def render_reply(self, reply: Reply, chat: Chat, created: int) -> JSON:
        has_calls = bool(blocks_of(reply.blocks, ToolCall))
        return {**message_head(reply.id, reply.model),
                "content": [wire for block in reply.blocks
                            for wire in render_answer_block(block, chat)],
                **messages_end(reply.finish, has_calls, reply.refusal),
                "usage": render_messages_usage(reply.usage)}

    def render_error(self, error: GatewayError, request_id: str) -> bytes:
        fallback = "invalid_request_error" if error.status < 500 else "api_error"
        kind = MESSAGES_ERRORS.get(error.status, fallback)
        if error.is_quoted and error.type in MESSAGES_ERRORS.values() and (
                error.type != "invalid_request_error"):
            kind = error.type
        about = {"details": {"error_code": NO_THREADS, "unsupported": []}} if (
            error.code == NO_THREADS) else {}
        return dump_json({"type": "error", "request_id": request_id, "error": {
            "type": kind, "message": self.words_of(error), **about}})

    def error_event(self, body: bytes) -> bytes:
        return sse(body, "error")

    def values_for_ceiling(self, body: Body, most: int) -> JSON:
        lowered = super().values_for_ceiling(body, most)
        thinking = as_object(body.get("thinking"))
        if lowered and count(thinking.get("budget_tokens")) >= most:
            lowered["thinking"] = fitting_thinking(thinking, most) or {"type": "disabled"}
        return lowered

    def is_spoken_in(self, headers: Headers, query: str) -> bool:
        return "anthropic-version" in headers

    def render_model(self, name: str, owner: str) -> JSON:
        return {"type": "model", "id": name, "display_name": name, "lifecycle": "active",
                "created_at": "1970-01-01T00:00:00Z"}

    def render_models(self, models: List[Tuple[str, str]], query: str) -> JSON:
        asked = {key: told[0] for key, told in urllib.parse.parse_qs(query).items()}
        names = [name for name, _ in models]
        start = names.index(asked["after_id"]) + 1 if asked.get("after_id") in names else 0
        told = asked.get("limit", "")
        limit = int(told) if re.fullmatch("[1-9][0-9]{0,3}", told) else 20
        page = models[start:start + limit]
        ids: List[str | None] = [name for name, _ in page] or [None]
        return {"data": [self.render_model(*model) for model in page],
                "has_more": start + limit < len(models), "first_id": ids[0], "last_id": ids[-1]}

    def render_estimate(self, wire: JSON) -> JSON:
        return {"input_tokens": self.parse_request({"max_tokens": 1, **wire}, Losses()).estimate}

    def parse_usage(self, wire: object) -> Usage | None:
        """Its input_tokens leave out the cached parts; ours count the whole prompt."""
        if not isinstance(wire, dict):
            return None
        read = count(wire.get("cache_read_input_tokens"))
        written = count(wire.get("cache_creation_input_tokens"))
        asked, said = count(wire.get("input_tokens")), count(wire.get("output_tokens"))
        for step in list_of_objects(wire, "iterations"):
            if step.get("type") == "compaction":  # which the sums leave out
                asked += count(step.get("input_tokens"))
                said += count(step.get("output_tokens"))
        return Usage(
            asked + read + written, said, read, written,
            count(part_of(wire, "cache_creation").get("ephemeral_1h_input_tokens")),
            count(part_of(wire, "output_tokens_details").get("thinking_tokens")))


BILLING = "x-anthropic-billing-header"  # a system line of Claude Code's, new in every request
MESSAGES_HINTS = ("cache_control", "container", "context_management", "diagnostics",
                  "inference_geo", "speed", "user_profile_id", "workspace_id")
RARE_IN_MESSAGES = frozenset(["output_config", "output_format", "metadata", "tool_choice",
                              "service_tier", "mcp_servers", *MESSAGES_HINTS])
MESSAGES_TOOL_HINTS = (
    "eager_input_streaming", "defer_loading", "input_examples", "allowed_callers")
MESSAGES_CHOICES = {"auto": "auto", "any": "required", "tool": "tool", "none": "none"}
CHOICES_IN_MESSAGES = {mode: kind for kind, mode in MESSAGES_CHOICES.items()}
MESSAGES_ERRORS = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error",
    403: "permission_error", 404: "not_found_error", 408: "timeout_error", 409: "conflict_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
    529: "overloaded_error"}

# What a provider's error says of itself, where its HTTP status cannot (in a stream it is 200).
ERROR_STATUSES = {
    **{type_: status for status, type_ in MESSAGES_ERRORS.items() if status != 409},
    "overloaded_error": 503, "context_length_exceeded": 400, "invalid_api_key": 401,
    "model_not_found": 404, "rate_limit_exceeded": 429, "insufficient_quota": 429,
    "API_KEY_INVALID": 401, "server_error": 500, "api_error": 500, "server_is_overloaded": 503,
    "invalid_prompt": 400}


# ---- from the wire ----


def parse_messages_turns(root: Fields) -> Iterator[Turn]:
    system = parse_content(root, "system", MESSAGES_PARTS)
    for block in blocks_of(system, Text):
        if block.text.startswith(BILLING):
            block.text = block.text.partition("\n")[2]
    yield Turn("system", system)
    root.need("messages", list)
    for message in messages_of(root, "messages", MESSAGES_ROLES):
        if isinstance(message, Turn):
            yield message
            continue
        role = message.one_of("role", MESSAGES_ROLES)
        if role != "system":
            message.need("content", TEXT_OR_LIST)
        message.hint("clear_at", "output_config")
        blocks = parse_content(message, "content", MESSAGES_PARTS)
        if role == "system" and blocks_of(blocks, Opaque):
            message.losses.drop("content")  # tools that come or go
            blocks = [block for block in blocks if not isinstance(block, Opaque)]
        yield Turn(role, blocks)


MESSAGES_ROLES = {role: role for role in ("user", "assistant", "system")}
NO_THREADS = "thread_unsupported_request"
TRACES = re.compile("server_tool_use|mcp_tool_use|mcp_tool_listing|.+_tool_result|compaction|"
                    "container_upload|fallback|tool_addition|tool_removal")


def parse_trace(block: Fields) -> Block:
    """Of a tool that ran at the provider."""
    if not TRACES.fullmatch(block.need("type")):
        raise block.unsupported("type", "cannot be sent to this model")
    block.skip(*block.wire)
    return Opaque(issuer="anthropic", wire={
        key: value for key, value in block.wire.items() if key != "cache_control"})


def parse_compaction(block: Fields) -> Block:
    """All that was said before it, in the provider's words; it failed where there are none."""
    block.skip(*block.wire)
    return Text(text=block.get("content") or "")


def parse_text_block(block: Fields) -> Block:
    block.skip("citations")  # of an answer that comes back
    return Text(text=block.need("text"))


def parse_source(source: Fields, kinds: Iterable[str]) -> JSON:
    kind = source.one_of("type", kinds)
    if kind == "url":
        return {"url": source.need("url")}
    return {"media_type": source.need("media_type"),
            "text" if kind == "text" else "data": source.need("data")}


def lose_citations(block: Fields) -> None:
    if block.child("citations", {}).get("enabled", bool):
        block.losses.drop("citations")


def parse_document_block(block: Fields) -> Block:
    lose_citations(block)
    title, source = block.get("title") or "", block.child("source")
    if source.get("type") != "content":
        return Document(title=title, **parse_source(source, ("base64", "text", "url", "content")))
    parts = parse_content(source, "content", RESULT_PARTS)
    texts = [part.text for part in blocks_of(parts, Text)]
    if len(texts) < len(parts):
        block.losses.drop("source")  # pictures
    return Document(title=title, media_type="text/plain", text="\n".join(texts))


def parse_search_result(block: Fields) -> Block:
    lose_citations(block)
    content = parse_content(block, "content", MESSAGES_PARTS)
    texts = [part.text for part in blocks_of(content, Text)]
    return Text(text="\n".join([block.need("title"), block.need("source"), *texts]))


def parse_tool_use(block: Fields) -> Block:
    block.skip("caller")
    return carrying_call(
        block.need("id"), block.need("name"), arguments=block.get("input", dict) or {})


def parse_tool_result(block: Fields) -> Block:
    block.skip("toolset_name")
    return ToolResult(
        id=plain_id(block.need("tool_use_id")), is_error=bool(block.get("is_error", bool)),
        content=parse_content(block, "content", RESULT_PARTS))


MESSAGES_PARTS: Dict[str, Callable[[Fields], Block]] = {
    "text": parse_text_block, "document": parse_document_block,
    "image": lambda block: Image(**parse_source(block.child("source"), ("base64", "url"))),
    "thinking": parse_thinking, "redacted_thinking": parse_thinking,
    "search_result": parse_search_result, "compaction": parse_compaction,
    "tool_reference": lambda block: Text(text=f"Tool {block.need('tool_name')} loaded."),
    "tool_use": parse_tool_use, "tool_result": parse_tool_result,
    "": parse_trace,
}
RESULT_PARTS = {**{kind: MESSAGES_PARTS[kind] for kind in (
    "text", "document", "image", "search_result", "tool_reference")}, "": refuse_part}


# Tools that run at a provider, or whose schema only Anthropic's models know.
HOSTED_TOOLS = (
    "web_fetch", "code_execution", "tool_search", "computer", "browser", "mcp_toolset", "bash",
    "text_editor", "memory", "advisor")


def parse_messages_tool(item: Fields, chat: Chat) -> None:
    kind = item.get("type") or "custom"
    if kind == "custom":
        item.hint(*MESSAGES_TOOL_HINTS)
        chat.tools.append(Tool(
            item.need("name"), item.get("description") or "", item.need("input_schema", dict),
            item.get("strict", bool), cache=item.get("cache_control", dict)))
        return
    name = next((name for name in HOSTED_TOOLS if kind.startswith(name)), "tools")
    parse_hosted_tool(item, name, chat)


def parse_hosted_tool(item: Fields, name: str, chat: Chat) -> None:
    """A search, as Chat Completions says it; any other is lost, by its `name`."""
    item.skip(*item.wire)
    if not item.wire["type"].startswith(WEB_SEARCH):
        item.losses.drop(name)
        return
    if any(value not in (None, True, [], {}) for key, value in item.wire.items()
           if key not in SEARCH_FIELDS):
        item.losses.drop(WEB_SEARCH)
    place = {key: value for key, value in part_of(item.wire, "user_location").items()
             if key != "type"}
    chat.web_search = without_none(
        user_location={"type": "approximate", "approximate": place} if place else None,
        search_context_size=item.wire.get("search_context_size"))


SEARCH_FIELDS = frozenset(
    ["type", "name", "cache_control", "user_location", "search_context_size"])


def estimate_tokens(chat: Chat) -> int:
    """Of the prompt, on the high side: a token for three bytes, 8 more a message, 1,600 an image,
    tools included."""
    def size_of(block: Block) -> int:
        if isinstance(block, Text):
            return len(utf8(block.text))
        if isinstance(block, Image):
            return 3 * 1600
        if isinstance(block, ToolResult):
            return sum(map(size_of, block.content))
        if isinstance(block, ToolCall):
            return len(dump_json(call_arguments(block))) + len(block.name)
        texts = [getattr(block, name, "") for name in ("text", "data", "title")]
        return sum(len(utf8(text)) for text in texts)

    turns = [24 + sum(map(size_of, turn.blocks)) for turn in chat.turns]
    tools = [dump_json([tool.name, tool.description, tool.schema]) for tool in chat.tools]
    return -(-(sum(turns) + sum(map(len, tools))) // 3)


# ---- to the wire ----

IMAGE_TYPES = frozenset(["image/jpeg", "image/png", "image/gif", "image/webp"])
MAX_CACHE_MARKS = 4
JSON_TOOL = "json_answer"
CONTACT = re.compile(r".+@.+\..+|\+?[0-9() .-]{7,}", re.DOTALL)
MIN_BUDGET, MIN_WORDS = 1024, 512  # tokens of thought, and what must be left beside them
THINKING_BUDGETS = {
    "minimal": 1024, "low": 1024, "medium": 4096, "high": 16384, "xhigh": 32768, "max": 32768}
SERVICE_TIERS = {"auto": "auto", "default": "standard_only"}


def render_source(block: Image | Document) -> JSON:
    if block.url:
        return {"type": "url", "url": block.url}
    return {"type": "base64", "media_type": block.media_type, "data": block.data}


def fitting_thinking(thinking: JSON, max_tokens: int) -> JSON:
    """A budget is a part of the whole answer's tokens. {} where too few are left to think."""
    budget = min(count(thinking.get("budget_tokens")), max_tokens - MIN_WORDS)
    return {**thinking, "budget_tokens": budget} if budget >= MIN_BUDGET else {}


class MessagesRequest(RequestWriter):
    legal_name = re.compile("[A-Za-z0-9_-]{1,128}")
    issuer, takes_cache, has_search, refuses_blanks = "anthropic", True, True, True

    def __init__(self, chat: Chat, target: Target, losses: Losses) -> None:
        super().__init__(chat, target, losses)
        self._cache_marks = 0

    def render(self) -> JSON:
        chat, wire = self.chat, self.wire
        if chat.logprobs is not None:
            raise unsupported("logprobs")
        self._add_turns()
        self._add_tools()
        self._add_choice()
        self._add_format()
        self._add_thinking()
        self._add_sampling()
        stops = [stop for stop in chat.stop if stop.strip()]
        if len(stops) < len(chat.stop):
            self.losses.drop("stop")
        user = chat.user or chat.options.get("safety_identifier")
        if user and (len(user) > 256 or CONTACT.fullmatch(user)):
            self.losses.hint("user")  # ids that look like addresses are refused
            user = None
        tier = SERVICE_TIERS.get(chat.options.get("service_tier", ""))
        wire.update(without_none(stop_sequences=stops, metadata=user and {"user_id": user},
                                 stream=chat.stream or None, service_tier=tier))
        self.lose_options(["service_tier"] * bool(tier) + ["safety_identifier"] * (not chat.user))
        return wire

    def tool_name(self, name: str) -> str:
        """A function may have the name that the search has here."""
        if name != WEB_SEARCH or self.chat.web_search is None or name not in self.tools:
            return super().tool_name(name)
        self.rewrites.names[f"own_{name}"] = name
        return f"own_{name}"

    def blocks(self, blocks: Iterable[Block]) -> List[JSON]:
        return [self.marked(self.kinds[type(block)](self, block), block.cache) for block in blocks]

    def marked(self, wire: JSON, cache: JSON | None) -> JSON:
        if not cache or wire.get("type") in THOUGHT_KINDS:
            return wire
        self._cache_marks += 1
        if self._cache_marks > MAX_CACHE_MARKS:
            self.losses.hint("cache_control")
            return wire
        return {**wire, "cache_control": cache}

    def _image(self, block: Image) -> JSON:
        if block.detail not in ("", "auto"):
            self.losses.hint("detail")
        if not block.url and block.media_type not in IMAGE_TYPES:
            raise unsupported(
                "image_url", "An image must be JPEG, PNG, GIF or WebP for this model.")
        return {"type": "image", "source": render_source(block)}

    def _document(self, block: Document) -> JSON:
        source = render_source(block)
        if not block.url and not block.data:
            source = {"type": "text", "media_type": "text/plain", "data": block.text}
        elif not block.url and block.media_type != "application/pdf":
            raise unsupported("file", "A file must be a PDF or plain text for this model.")
        return {"type": "document", "source": source, **without_none(title=block.title)}

    def _audio(self, block: Audio) -> JSON:
        raise unsupported("input_audio", "This model does not take audio.")

    def _call(self, block: ToolCall) -> JSON:
        return {"type": "tool_use", "id": self.call_id(block.id),
                "name": self.tool_name(block.name), "input": call_arguments(block)}

    def _result(self, block: ToolResult) -> JSON:
        return {"type": "tool_result", "tool_use_id": self.call_id(block.id),
                "content": plain_content(
                    self.blocks(filter(self._has_words_for, block.content))) or "",
                **({"is_error": True} if block.is_error else {})}

    kinds: Mapping[type, Callable[[Any, Any], JSON]] = {
        Text: lambda self, block: render_text_block(block), Image: _image, Document: _document,
        Audio: _audio, Thinking: lambda self, block: render_thinking_block(block),
        ToolCall: _call, ToolResult: _result, Opaque: lambda self, block: block.wire}

    def _add_turns(self) -> None:
        """Later system turns stay where the model takes them, so that what is cached before them
        holds."""
        system: List[JSON] = []
        messages: List[JSON] = []
        later: List[JSON] = []  # of the system: it has to stand between a user's turn and an answer
        turns = self.turns()
        for turn in with_own_ids(turns, self.rewrites.call_ids) if self.repeats_ids else turns:
            content = self.blocks(thoughts_first(turn))
            if turn.role == "assistant":
                self._drop_last_thoughts(content)
            if turn.role == "system":
                place = later if messages and self.caps.mid_system else system
                place += content
            elif content:
                if later and turn.role == "assistant" and messages[-1]["role"] == "user":
                    messages.append({"role": "system", "content": later})
                    later = []
                if messages and messages[-1]["role"] == turn.role:
                    messages[-1]["content"] += content
                else:
                    messages.append({"role": turn.role, "content": content})
        if later and messages[-1]["role"] == "user":
            messages.append({"role": "system", "content": later})
        elif later and turns[-1].role == "system":  # nobody else would be left to answer
            messages.append({"role": "user", "content": later})
            self.losses.drop("messages")
        else:
            system += later
        if messages and messages[-1]["role"] == "assistant":
            messages[-1]["content"] = trim_prefill(messages[-1]["content"])
            self._drop_last_thoughts(messages[-1]["content"])
        messages = [{**message, "content": plain_content(message["content"])}
                    for message in messages if message["content"]]
        if not messages:
            raise GatewayError(400, "'messages' must hold a user message.", "messages")
        if self.chat.format is not None and self.chat.format.schema is None:
            system.append({"type": "text", "text": "Answer with one JSON object and nothing else."})
        if system:
            self.wire["system"] = plain_content(system)
        self.wire["messages"] = messages

    def _drop_last_thoughts(self, answer: List[JSON]) -> None:
        """It must not end in one."""
        while answer and answer[-1]["type"] in THOUGHT_KINDS:
            answer.pop()
            self.losses.hint("thinking")

    def _add_tools(self) -> None:
        tools = list(map(self._tool, self.offered_tools()))
        if self.chat.web_search is not None:
            options = Fields(self.chat.web_search, self.losses, "web_search_options.")
            tools.append(render_web_search(options))
            options.name_unknown()
        if tools:
            self.wire["tools"] = tools

    def _tool(self, tool: Tool) -> JSON:
        description, schema = self.as_function(tool)
        schema = typed_object(schema)
        wire: JSON = {"name": self.tool_name(tool.name), **without_none(description=description),
                      "input_schema": schema}
        if tool.strict and clean_schema(schema) == schema:
            wire["strict"] = True
        elif tool.strict:
            self.losses.drop("strict")
        return self.marked(wire, tool.cache)

    def _add_choice(self) -> None:
        """A history with calls needs their tools, though none is offered."""
        chat, mode = self.chat, self.choice.mode
        if "tools" not in self.wire:
            if self.rewrites.call_ids:
                names = dict.fromkeys(self.tool_name(call.name) for turn in chat.turns
                                      for call in blocks_of(turn.blocks, ToolCall))
                self.wire["tools"] = [
                    {"name": name, "input_schema": {"type": "object"}} for name in names]
                self.wire["tool_choice"] = {"type": "none"}
            return
        if mode in ("required", "tool") and self.caps.forced_tools == "auto":
            self.losses.drop("tool_choice")
            mode = "auto"
        wire: JSON = {"type": CHOICES_IN_MESSAGES[mode]}
        if mode == "tool":
            wire["name"] = self.tool_name(self.choice.name)
        if mode != "none" and (chat.parallel is False or chat.legacy_functions):
            wire["disable_parallel_tool_use"] = True
        if chat.choice or len(wire) > 1:
            self.wire["tool_choice"] = wire

    def _add_format(self) -> None:
        form, wire = self.chat.format, self.wire
        if form is None or form.schema is None:
            return
        if self.caps.json_schema:
            schema = clean_schema(form.schema)
            if has_maps(form.schema):
                self.losses.drop("response_format")
            if form.description:
                schema.setdefault("description", form.description)
            wire["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
            return
        if self.chat.tools:
            raise unsupported("response_format",
                              "This model cannot be given tools and a response format at once.")
        self.rewrites.json_tool = JSON_TOOL
        wire.setdefault("tools", []).append({
            "name": JSON_TOOL, "description": form.description or "Gives the answer.",
            "input_schema": typed_object(form.schema)})
        wire["tool_choice"] = {"type": "tool", "name": JSON_TOOL}

    def _add_thinking(self) -> None:
        """Effort too, and the cap of the whole answer, against which a budget counts."""
        chat, wire = self.chat, self.wire
        param = "reasoning_effort" if chat.thinking is None else "thinking"
        thinking = chat.thinking or self._thinking_by_effort()
        if chat.thinking and chat.effort and self.asked_effort() != "none":
            self._add_effort(chat.effort)
        elif chat.thinking and chat.effort not in (None, "none"):
            self.losses.drop("reasoning_effort")
        if thinking and thinking.get("type") != "disabled":
            if wire.get("tool_choice", {}).get("type") in ("any", "tool"):
                self.losses.drop(param)  # no tool can be forced while it thinks
                thinking = {}
            elif thinking.get("type") == "enabled" and self._lacks_thinking():
                self.losses.hint(param)
                thinking = {}
        budget = count(thinking.get("budget_tokens"))
        ceiling = min(self.target.max_output_tokens or self.caps.max_output, self.caps.max_output)
        wanted = chat.max_tokens or self.target.default_max_tokens + budget
        if chat.max_tokens and chat.max_tokens > ceiling:
            self.losses.drop("max_tokens")
        wire["max_tokens"] = min(wanted, ceiling)
        if budget and (chat.thinking is None or wanted > ceiling):
            thinking = fitting_thinking(thinking, wire["max_tokens"])
            if not thinking or chat.thinking not in (None, thinking):
                self.losses.drop(param)
        if thinking:
            wire["thinking"] = thinking

    def _thinking_by_effort(self) -> JSON:
        caps, effort = self.caps, self.asked_effort()
        if effort is None:
            return {}
        if effort == "none":
            if caps.can_disable_thinking:
                return {"type": "disabled"}
            if caps.thinking == "adaptive" and caps.efforts:
                self._add_effort("low")
                self.losses.drop("reasoning_effort")
            return {}
        if caps.thinking == "none":
            self.losses.drop("reasoning_effort")
            return {}
        if caps.thinking == "budget":
            budget = self.chat.budget or THINKING_BUDGETS[effort]
            return {"type": "enabled", "budget_tokens": budget}
        self._add_effort(effort)
        return {"type": "adaptive", "display": "summarized"}

    def _add_effort(self, effort: str) -> None:
        level = self.nearest_effort("low" if effort == "minimal" else effort)
        if level:
            self.wire.setdefault("output_config", {})["effort"] = level

    def _lacks_thinking(self) -> bool:
        """An open tool loop that lost its thinking on the way is refused while thinking is on, and
        accepted without."""
        last = next((message["content"] for message in reversed(self.wire["messages"])
                     if message["role"] == "assistant"), "")
        kinds = {block["type"] for block in last} if isinstance(last, list) else set()
        return "tool_use" in kinds and kinds.isdisjoint(THOUGHT_KINDS)

    def _add_sampling(self) -> None:
        """Newer models take none of it, and none of them any while thinking."""
        thinks = self.wire.get("thinking", {}).get("type") not in (None, "disabled")
        for name in ("temperature", "top_p", "top_k"):
            value = getattr(self.chat, name)
            if value is None:
                continue
            is_second = (
                name == "top_p" and "temperature" in self.wire and self.caps.sampling == "one")
            if self.caps.sampling == "none" or thinks or is_second:
                if name == "top_k" or value != 1:  # the default of the others
                    self.losses.drop(name)
                continue
            self.wire[name] = value
            if name == "temperature" and value > 1:
                self.losses.drop(name)
                self.wire[name] = 1


def with_own_ids(turns: List[Turn], told: Set[str]) -> List[Turn]:
    """Elsewhere the place tells which call a result is for, and an id that was `told` may come
    again."""
    used, counts = told.copy(), {}  # type: Set[str], Dict[str, int]

    def own(id_: str) -> str:
        counts[id_] = number = counts.get(id_, 0) + 1
        if number == 1:
            return id_
        fresh = f"{id_}_{number}"
        while fresh in used:
            fresh += "_"
        used.add(fresh)
        return fresh

    renamed: List[Turn] = []
    waiting: Dict[str, List[str]] = {}  # by what was told, the own ids, the next one last
    for turn in turns:
        fresh = [(id_, own(id_)) for id_ in call_ids(turn)]
        if turn.role == "assistant":
            waiting = {}
            for id_, name in reversed(fresh):
                waiting.setdefault(id_, []).append(name)
        names = iter(fresh)
        blocks: List[Block] = []
        for block in turn.blocks:
            if isinstance(block, ToolCall):
                blocks.append(block.but(id=next(names)[1]))
            elif isinstance(block, ToolResult):
                left = waiting.get(block.id, [block.id])
                blocks.append(block.but(id=left.pop() if len(left) > 1 else left[0]))
            else:
                blocks.append(block)
        renamed.append(Turn(turn.role, blocks))
    return renamed


def thoughts_first(turn: Turn) -> List[Block]:
    return turn.blocks if turn.role != "assistant" else sorted(
        turn.blocks, key=lambda block: not isinstance(block, Thinking))


def trim_prefill(content: List[JSON]) -> List[JSON]:
    while content and content[-1]["type"] == "text":
        last = content.pop()
        text = last["text"].rstrip()
        if text:
            return [*content, {**last, "text": text}]
    return content


def render_web_search(options: Fields) -> JSON:
    place = options.child("user_location", {})
    place.skip("type")
    location = place.child("approximate", {})
    told = without_none(**{
        key: location.get(key) for key in ("city", "country", "region", "timezone")})
    if options.get("search_context_size") not in (None, "medium"):
        options.losses.drop("search_context_size")
    return {"type": "web_search_20250305", "name": "web_search",
            **({"user_location": {"type": "approximate", **told}} if told else {})}


# What structured output does not take; the SDK moves it into the description too.
UNSUPPORTED_KEYWORD = re.compile(
    "minimum|maximum|exclusive.+|multipleOf|(min|max)(Length|Contains|Properties)|maxItems|pattern"
    "|patternProperties|uniqueItems|contains|not|if|then|else|propertyNames|depend.+|unevaluated.+")
SCHEMA_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4",
                  "ipv6", "uuid")
SCHEMA_MAPS = frozenset(["properties", "$defs", "definitions"])
SCHEMA_VALUES = frozenset(["enum", "const", "default", "examples", "required"])


def tell(schema: JSON, keywords: JSON) -> None:
    """In the words of its description, what it cannot say otherwise."""
    about, told = schema.get("description"), ", ".join(
        f"{key}: {encode_json(value)}" for key, value in keywords.items())
    if told:
        schema["description"] = f"{about + ' ' if isinstance(about, str) else ''}({told})"


def only_one(every: object) -> bool:
    """Whether it is an `allOf` that says what its only part says."""
    return isinstance(every, list) and len(every) == 1 and isinstance(every[0], dict)


def take_in(schema: JSON, part: JSON, told: JSON) -> None:
    """Puts what the only part of an `allOf` says beside what its schema says."""
    for key, value in part.items():
        own = schema.get(key)
        if own is None:
            schema[key] = value
        elif key in SCHEMA_MAPS and isinstance(own, dict) and isinstance(value, dict):
            schema[key] = {**value, **own}
        elif key == "required" and isinstance(own, list) and isinstance(value, list):
            schema[key] = [*own, *(name for name in value if name not in own)]
        elif own != value:
            told[key] = value


def has_maps(schema: object) -> bool:
    """Whether it has objects whose keys are free, which closed ones are not."""
    if isinstance(schema, list):
        return any(map(has_maps, schema))
    return isinstance(schema, dict) and (
        isinstance(schema.get("additionalProperties"), dict) or any(map(has_maps, schema.values())))


def clean_schema(schema: Any) -> Any:
    """For `output_config.format`: what it cannot enforce is told in words."""
    if isinstance(schema, list):
        return [clean_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    clean: JSON = {}
    told: JSON = {}
    for key, value in schema.items():
        is_open = key == "additionalProperties" and isinstance(value, dict)
        if (UNSUPPORTED_KEYWORD.fullmatch(key) or key == "minItems" and value not in (0, 1)
                or key == "format" and value not in SCHEMA_FORMATS or is_open):
            told[key] = value
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            clean[key] = {name: clean_schema(item) for name, item in value.items()}
        elif key in SCHEMA_VALUES:
            clean[key] = value
        elif key == "oneOf" and "anyOf" in schema:
            clean["allOf"] = [*clean.get("allOf", []), {"anyOf": clean_schema(value)}]
        elif key == "allOf":  # another than a list says nothing; its only part is taken in below
            if isinstance(value, list) and not only_one(value):
                clean[key] = [*clean.get(key, []), *clean_schema(value)]
        else:
            clean["anyOf" if key == "oneOf" else key] = clean_schema(value)
    if only_one(schema.get("allOf")):
        take_in(clean, clean_schema(schema["allOf"][0]), told)
    tell(clean, told)
    if is_object(schema):
        clean["additionalProperties"] = False
    return clean


# ---- answers ----

MESSAGES_STOPS = {"end_turn": "stop", "stop_sequence": "stop_sequence", "tool_use": "tool_calls",
                  "max_tokens": "length", "model_context_window_exceeded": "context",
                  "refusal": "refusal", "pause_turn": "pause"}
STOPS_IN_MESSAGES = {
    **{finish: stop for stop, finish in MESSAGES_STOPS.items()}, "filter": "refusal"}
CITATION = "web_search_result_location"  # those of documents have no counterpart elsewhere


def message_head(id_: str, model: str) -> JSON:
    return {"id": own_id("msg_", id_), "type": "message", "role": "assistant", "model": model}


def messages_end(finish: str, has_calls: bool, refusal: str) -> JSON:
    stop = "tool_use" if finish == "stop" and has_calls else STOPS_IN_MESSAGES.get(finish)
    details = refusal and {"type": "refusal", "category": None, "explanation": refusal}
    return {"stop_reason": stop or "end_turn", "stop_sequence": None,
            **without_none(stop_details=details)}


def render_messages_usage(usage: Usage) -> JSON:
    wire: JSON = {
        "input_tokens": max(usage.input - usage.cache_read - usage.cache_write, 0),
        "cache_read_input_tokens": usage.cache_read,
        "cache_creation_input_tokens": usage.cache_write, "output_tokens": usage.output}
    long = usage.cache_write_1h
    if long:
        wire["cache_creation"] = {"ephemeral_1h_input_tokens": long,
                                  "ephemeral_5m_input_tokens": usage.cache_write - long}
    if usage.reasoning:
        wire["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
    return wire


def render_answer_block(block: Block, chat: Chat) -> Iterator[JSON]:
    """Of thoughts that were not asked for only what must come back."""
    if isinstance(block, Text):
        yield render_text_block(block)
    elif isinstance(block, Thinking) and (chat.shows_thinking or block.signature):
        yield render_thinking_block(
            block if chat.shows_thinking else block.but(text=""))
    elif isinstance(block, ToolCall):
        yield {"type": "tool_use", "id": carried_id(block), "name": block.name,
               "input": call_arguments(block), "caller": {"type": "direct"}}


def render_text_block(block: Text) -> JSON:
    wire: JSON = {"type": "text", "text": block.text}
    if block.citations:
        wire["citations"] = list(map(render_citation, block.citations))
    return wire


def render_citation(citation: JSON) -> JSON:
    return {"type": CITATION, "cited_text": "", "encrypted_index": "", "url": citation["url"],
            "title": citation["title"]}


class MessagesParser(ItemParser):
    """Usage is cumulative: what message_delta tells replaces, field by field."""

    number = "index"

    def __init__(self, dialect: Messages, rewrites: Rewrites) -> None:
        super().__init__(dialect, rewrites)
        self._usage: JSON = {}
        self._input: JSON | None = None  # of a call: what its end has to tell, if anything
        self._asked: List[str] | None = None  # of a search at the provider
        self._refusal = ""

    text_events = TextEvents(
        rb'\{"type":"content_block_delta","index":\d+,"delta":\{"type":"text_delta",'
        rb'"text":' + STRING + rb"\} *\}")

    def message_start(self, wire: JSON) -> Events:
        self._note_usage(part_of(wire, "message"))
        return self.start(part_of(wire, "message"))

    def message_delta(self, wire: JSON) -> Events:
        delta = part_of(wire, "delta")
        reason = text_of(delta, "stop_reason")
        self._finish = MESSAGES_STOPS.get(reason, "stop") if reason else self._finish
        self._refusal = text_of(part_of(delta, "stop_details"), "explanation") or self._refusal
        self._note_usage(wire)
        return []

    def _note_usage(self, wire: JSON) -> None:
        told = part_of(wire, "usage")
        if told:
            self._usage.update({key: value for key, value in told.items() if value is not None})
            self._service_tier = text_of(told, "service_tier") or self._service_tier
            self.usage = self._dialect.parse_usage(self._usage)

    def block_start(self, wire: JSON) -> Events:
        """Some servers' blocks bring all at once, as in a plain answer. A server tool's traces are
        no block: no call of the client's."""
        block = part_of(wire, "content_block")
        kind, name = text_of(block, "type"), text_of(block, "name")
        closed, self._live = self.close_item(), wire.get(self.number)
        is_answer = kind == "tool_use" and name == self.rewrites.json_tool != ""
        if kind == "text" or is_answer:
            made: Block = Text()
        elif kind in THOUGHT_KINDS:
            made = Thinking(signature=text_of(block, "data"), issuer="anthropic",
                            is_redacted=kind != "thinking", family=family_of(self._model))
        elif kind == "server_tool_use" and name == "web_search":
            self._asked = [encode_json(block["input"])] if block.get("input") else []
            return closed
        elif kind != "tool_use":
            self.rewrites.lost.add("content")
            return closed
        else:
            made = self.make_call(text_of(block, "id"), name)
        self._input = part_of(block, "input") or ({} if is_answer else None)
        events = [*closed, *self.open(made),
                  *self.say(text_of(block, kind if kind == "thinking" else "text"))]
        deltas: List[JSON] = [{"citation": each} for each in list_of_objects(block, "citations")]
        if block.get("signature"):
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        for delta in deltas:
            events += self.block_delta({"delta": delta})
        return events

    def block_delta(self, wire: JSON) -> Events:
        delta, block = part_of(wire, "delta"), self._open
        if self._asked is not None:
            self._asked.append(text_of(delta, "partial_json"))
        if block is None:
            return []
        about, kind = part_of(delta, "citation"), text_of(delta, "type")
        text = text_of(delta, MESSAGES_DELTAS.get(kind, ""))
        if about and about.get("type") != CITATION:
            self.rewrites.lost.add("citations")
        if about.get("type") == CITATION:
            cited = CitationDelta(self._block_count - 1, parse_citation(about))
            return [cited] if isinstance(block, Text) else []
        if kind == "signature_delta":
            is_signature = text and isinstance(block, Thinking)
            return [SignatureDelta(text, "anthropic")] if is_signature else []
        if kind == "input_json_delta" and text:
            self._input = None
        return self.say(text)

    def close_item(self) -> Events:
        if self._open is None and self._asked is None:
            self._live = self._input = None
            return []
        is_left = self._open is not None and self._input is not None
        events = self.say(encode_json(self._input)) if is_left else []
        self._input = None
        return events + super().close_item() + self._searched()

    def _searched(self) -> Events:
        if self._asked is None:
            return []
        asked, self._asked = parse_chunk(sse(utf8("".join(self._asked)))), None
        return self.open(Search(query=text_of(asked, "query"))) + self.close()

    def finish(self, wire: JSON) -> Events:
        self.ended, last = True, self.close_all()
        finish = self._finish or "stop"
        if self.rewrites.json_tool and finish == "tool_calls":
            finish = "stop"
        tier = {"standard": "default", "batch": ""}.get(self._service_tier, self._service_tier)
        return last + self.finished(finish, self._refusal, tier)

    def fail(self, wire: JSON) -> Events:
        raise self._dialect.parse_error(wire.get("error"), 200)

    events = {
        "message_start": message_start, "content_block_start": block_start,
        "content_block_delta": block_delta,
        "content_block_stop": lambda self, wire: self.close_item(),
        "message_delta": message_delta, "message_stop": finish, "error": fail}


MESSAGES_DELTAS = {"text_delta": "text", "thinking_delta": "thinking",
                   "signature_delta": "signature", "input_json_delta": "partial_json"}


class MessagesWatch(MarkedWatch):
    """Usage is cumulative here too."""

    content_mark = b'"content_block_delta"'
    marks = (b'"message_', b'"error"')
    _usage: Mapping[str, Any] = {}

    def look_at(self, wire: JSON) -> None:
        kind = wire.get("type")
        told = part_of(wire.get("message") if kind == "message_start" else wire, "usage")
        if kind in ("message_start", "message_delta") and told:
            told = {key: value for key, value in told.items() if value is not None}
            self._usage = {**self._usage, **told}
            self.usage = self._dialect.parse_usage(self._usage)
        self.has_content = self.has_content or kind == "message_delta"
        self.ended = kind == "message_stop"
        if kind == "error":
            self.failure = self._dialect.parse_error(wire.get("error"), 200)

    def said_in(self, wire: JSON) -> List[Any]:
        delta = part_of(wire, "delta")
        return [text_of(delta, MESSAGES_DELTAS.get(text_of(delta, "type"), ""))]


def messages_event(name: str, **data: object) -> bytes:
    return sse(dump_json({"type": name, **data}), name)


def messages_delta(index: int, kind: str, value: JSON) -> bytes:
    return messages_event("content_block_delta", index=index, delta={"type": kind, **value})


FIRST_DELTAS = {kind: messages_delta(0, kind, {key: "\0"}) for kind, key in MESSAGES_DELTAS.items()}


class MessagesRenderer(Renderer):
    def __init__(self, chat: Chat, created: int) -> None:
        super().__init__(chat, created)
        self._index = self._block = -1  # of what was told, and of all
        self._is_open = self._has_calls = False

    def _delta(self, kind: str, **value: object) -> bytes:
        return messages_delta(self._index, kind, value)

    def _start(self, event: Start) -> bytes:
        return messages_event("message_start", message={
            **message_head(event.id, self._chat.model), "content": [], "stop_reason": None,
            "stop_sequence": None,
            "usage": render_messages_usage(event.usage or Usage(self._chat.estimate))})

    def _block_start(self, event: BlockStart) -> bytes:
        block = self._open = event.block
        self._block += 1
        is_hidden = isinstance(block, Search) or isinstance(block, Thinking) and not (
            self._chat.shows_thinking or block.signature)
        return b"" if is_hidden else self._open_block(block)  # a thought's signature may follow

    def _open_block(self, block: Block) -> bytes:
        self._index += 1
        self._is_open = True
        kind, wire = "text_delta", next(render_answer_block(block, self._chat), {})
        if isinstance(block, Thinking):
            kind = "thinking_delta"
            if not block.is_redacted:
                wire = {"type": "thinking", "thinking": "", "signature": ""}
        elif isinstance(block, ToolCall):
            kind = "input_json_delta"
            self._has_calls = True
            wire["input"] = {}
        say = self._say = DeltaTemplate(
            FIRST_DELTAS[kind].replace(b'"index":0', b'"index":%d' % self._index))
        out = messages_event("content_block_start", index=self._index, content_block=wire)
        if isinstance(block, ToolCall) and block.is_custom:  # in an object with one string
            self._say = lambda text: say(encode_string(text)[1:-1])
            out += say('{"input":"')
        return out

    def _citation(self, event: CitationDelta) -> bytes:
        """After the end of its block it has no place in this wire."""
        if event.block != self._block or not self._is_open:
            self.lost.add("citations")
            return b""
        return self._delta("citations_delta", citation=render_citation(event.citation))

    def _block_stop(self, event: BlockStop) -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        is_custom = isinstance(self._open, ToolCall) and self._open.is_custom
        out = self._delta("input_json_delta", partial_json='"}') if is_custom else b""
        return out + messages_event("content_block_stop", index=self._index)

    def _finish(self, event: Finish) -> bytes:
        return messages_event(
            "message_delta", delta=messages_end(event.finish, self._has_calls, event.refusal),
            usage=render_messages_usage(event.usage)) + messages_event("message_stop")

    def _signature(self, event: SignatureDelta) -> bytes:
        self._open = self._open.but(signature=event.signature, issuer=event.issuer)
        opened = b"" if self._is_open else self._open_block(self._open)
        return opened + self._delta("signature_delta", signature=seal(self._open, "anthropic"))


class Responses(Dialect):
    """OpenAI's Responses (platform.openai.com/docs/api-reference/responses)."""

    name, history, answer, told = "responses", "input", "output", b'"type"'
    plain_fields = (
        ("max_output_tokens", "max_tokens", int), ("temperature", "temperature", NUMBER),
        ("top_p", "top_p", NUMBER), ("user", "user", str))

    def parse_request(self, wire: JSON, losses: Losses) -> Chat:
        root = Fields(wire, losses)
        chat = Chat(root.need("model"), [], parallel=root.get("parallel_tool_calls", bool),
                    stream=bool(root.get("stream", bool)))
        if not RARE_IN_RESPONSES.isdisjoint(wire):
            self._parse_rare_fields(root, chat)
        instructions = root.get("instructions")
        turns = [Turn("system", [Text(text=instructions)])] if instructions else []
        turns += parse_items(root, chat)
        chat.turns = canonical(turns)
        for item in root.children("tools"):
            parse_responses_tool(item, chat)
        named = {tool.name: tool for tool in reversed(chat.tools)}
        chat.tools = [tool for tool in chat.tools
                      if named[tool.name] is tool or named[tool.name] != tool]  # one said again
        chat.choice = parse_responses_choice(root, chat)
        self.parse_plain_fields(root, chat)
        root.name_unknown()
        chat.echo = {key: wire[key] for key in RESPONSES_ECHO if wire.get(key) is not None}
        return chat

    def _parse_rare_fields(self, root: Fields, chat: Chat) -> None:
        for key, advice in RESPONSES_STATE.items():
            if root.skip(key) and root.wire[key] not in (False, "disabled"):
                raise root.unsupported(key, f"needs a provider that keeps conversations; {advice}")
        reasoning, text = root.child("reasoning", {}), root.child("text", {})
        chat.effort, chat.format = reasoning.get("effort"), parse_format(text, "format")
        include = root.strings("include")
        alternatives, asked = root.get("top_logprobs", int), "message.output_text.logprobs"
        chat.logprobs = alternatives or 0 if alternatives or asked in include else None
        root.hint(*RESPONSES_HINTS)
        told = {**{key: root.get(key, OPTIONS[key].kind) for key in root.wire
                   if key in OPTIONS and key not in RESPONSES_HINTS},
                "verbosity": text.get("verbosity")}
        chat.options = {key: value for key, value in told.items() if value is not None}
        if chat.options.get("service_tier") == "ultrafast":  # which this API alone has
            root.losses.hint("service_tier")
            del chat.options["service_tier"]
        if set(include) - {"reasoning.encrypted_content", asked}:
            root.losses.hint("include")
        reasoning.hint("generate_summary", "context", "mode")
        if reasoning.get("summary") not in (None, "auto"):
            root.losses.hint("summary")
        root.child("stream_options", {}).hint("include_obfuscation")

    def parse_reply(self, wire: JSON, rewrites: Rewrites) -> Reply:
        """Read as the end of the stream that it could have been."""
        self.check_answers(wire)
        parser = ResponsesParser(self, rewrites)
        events = parser.start(wire)
        kind = {"incomplete": "response.incomplete", "failed": "response.failed",
                "cancelled": "response.failed"}
        ended = {"type": kind.get(text_of(wire, "status"), "response.completed"), "response": wire}
        return collect([*events, *parser.finish(ended)])

    def render_reply(self, reply: Reply, chat: Chat, created: int) -> JSON:
        renderer = ResponsesRenderer(chat, created)
        for event in events_of(reply):
            renderer.feed(event)
        return renderer.response

    def error_event(self, body: bytes) -> bytes:
        """With the events that its SDK wants before it."""
        renderer = ResponsesRenderer(Chat("", []), 0)
        error = self.parse_error(parse_chunk(sse(body)).get("error"), 500)
        return renderer.feed(Start("", "")) + renderer.fail(error)

    def render_stream_error(self, error: GatewayError, request_id: str) -> bytes:
        return render_failure(error, request_id, 0)

    def suits(self, chat: Chat, caps: Caps) -> bool:
        """Models that reason; what it cannot say goes by Chat Completions."""
        return (caps.thinking == "effort" and not chat.stop and chat.logprobs is None
                and not ONLY_IN_CHAT.intersection(chat.options))

    def is_spoken_in(self, headers: Headers, query: str) -> bool:
        return "client_version=" in query  # Codex asks so

    def render_model(self, name: str, owner: str) -> JSON:
        return {"slug": name, "display_name": name, **CODEX_MODEL}

    def render_estimate(self, wire: JSON) -> JSON:
        counted = estimate_tokens(self.parse_request({"model": "m", **wire}, Losses()))
        return {"input_tokens": counted, "object": "response.input_tokens"}

    def parse_usage(self, wire: object) -> Usage | None:
        return parse_openai_usage(wire, RESPONSES_USAGE)


STATELESS = "send the whole conversation as 'input', with store: false"
# What needs a provider's memory, and what to do instead.
RESPONSES_STATE = {
    "previous_response_id": STATELESS, "conversation": STATELESS,
    "prompt": "send the prompt itself as 'instructions'", "background": "leave it out",
    "background_options": "leave it out", "truncation": "leave it out"}
RESPONSES_HINTS = ("max_tool_calls", "context_management", "client_metadata", "access_programs",
                   "image", "prompt_cache_options", "moderation")
RARE_IN_RESPONSES = frozenset([*RESPONSES_STATE, *RESPONSES_HINTS, *OPTIONS, "reasoning", "text",
                               "include", "top_logprobs", "stream_options"])
ONLY_IN_CHAT = frozenset(["seed", "logit_bias", "frequency_penalty", "presence_penalty"])
SAID_IN_RESPONSES = frozenset(OPTIONS) - ONLY_IN_CHAT - {"prediction"}
# What Codex's list of models needs of each.
CODEX_MODEL = {
    "supported_reasoning_levels": [], "shell_type": "default", "visibility": "list",
    "supported_in_api": True, "priority": 0, "base_instructions": "",
    "supports_reasoning_summaries": True, "support_verbosity": False,
    "truncation_policy": {"mode": "tokens", "limit": 10_000},
    "supports_parallel_tool_calls": True, "experimental_supported_tools": []}
# An answer repeats of its request:
RESPONSES_ECHO: JSON = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None}, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None}


# ---- from the wire ----


def parse_items(root: Fields, chat: Chat) -> Iterator[Turn]:
    items = root.need("input", TEXT_OR_LIST)
    if isinstance(items, str):
        yield Turn("user", [Text(text=items)])
        return
    for item in messages_of(root, "input", ITEM_ROLES):
        if isinstance(item, Turn):
            yield item
            continue
        kind = item.get("type") or ("message" if "role" in item.wire else "item_reference")
        item.skip("id", "status", "caller")
        item.hint("phase")
        if kind == "message":
            role = ITEM_ROLES[item.one_of("role", ITEM_ROLES)]
            yield Turn(role, parse_content(item, "content", RESPONSES_PARTS))
        elif kind == "additional_tools":
            item.skip("role")
            for tool in item.children("tools"):
                parse_responses_tool(tool, chat)
        elif kind in ITEMS:
            role, parse = ITEMS[kind]
            yield Turn(role, [parse(item)])
        elif kind == "item_reference":
            raise item.unsupported("type", f"needs a provider that keeps items; {STATELESS}")
        elif kind.endswith("_call") and kind not in CLIENT_CALLS:
            item.losses.hint("hosted_calls")  # that are done
            item.skip(*item.wire)
        else:
            raise item.unsupported("type", "cannot be sent to this model")


ITEM_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
CALL_ITEMS = ("function_call", "custom_tool_call")  # by is_custom
CLIENT_CALLS = ("computer_call", "local_shell_call", "shell_call", "apply_patch_call")


def parse_reasoning(item: Fields) -> Block:
    item.skip("content")
    parts = [part.get("text") or "" for part in item.children("summary") if part.skip("type")]
    signature, id_ = item.get("encrypted_content") or "", text_of(item.wire, "id")
    if signature and not signature.startswith(ENVELOPE):
        signature = f"{id_}:{signature}"
    return unseal(Thinking(text="\n\n".join(parts)), signature, "openai")


def parse_custom_call(item: Fields) -> Block:
    return carrying_call(item.need("call_id"), flat_name(item), is_custom=True,
                         input=item.need("input"))


def parse_output(item: Fields) -> Block:
    item.skip("name", "namespace")
    return ToolResult(id=plain_id(item.need("call_id")),
                      content=parse_content(item, "output", RESPONSES_PARTS))


ITEMS: Dict[str, Tuple[str, Callable[[Fields], Block]]] = {
    "reasoning": ("assistant", parse_reasoning),
    "function_call": ("assistant", lambda item: parse_function(item, item.need("call_id"))),
    "custom_tool_call": ("assistant", parse_custom_call),
    "function_call_output": ("user", parse_output),
    "custom_tool_call_output": ("user", parse_output)}


def parse_input_text(part: Fields) -> Block:
    part.skip("annotations", "logprobs")
    return Text(text=part.need("text"))


def parse_input_image(part: Fields) -> Block:
    if part.get("file_id") is not None:
        raise part.unsupported("file_id", "names a file in another vendor's store")
    return image_at(part, "image_url")


def parse_input_file(part: Fields) -> Block:
    part.skip("detail")
    url = part.get("file_url")
    if url:
        return Document(url=url, title=part.get("filename") or "")
    return parse_file(part)


RESPONSES_PARTS: Dict[str, Callable[[Fields], Block]] = {
    "input_text": parse_input_text, "output_text": parse_input_text, "text": parse_input_text,
    "refusal": lambda part: Text(text=part.need("refusal"), is_refusal=True),
    "input_image": parse_input_image, "input_file": parse_input_file,
    "input_audio": parse_audio_part, "": refuse_part}


def parse_responses_tool(item: Fields, chat: Chat, space: str = "") -> None:
    kind = item.need("type")
    if kind in TOOL_KINDS:
        item.hint(*RESPONSES_TOOL_HINTS)
        tool = parse_tool(item, kind, None)
        if space:
            tool.namespace, tool.name = space, f"{space}__{tool.name}"
        chat.tools.append(tool)
    elif kind == "namespace":
        about, first = item.get("description") or "", len(chat.tools)
        for child in item.children("tools"):
            parse_responses_tool(child, chat, item.need("name"))
        for tool in chat.tools[first:first + 1]:  # it is about all of them: once is enough
            tool.description = in_paragraphs(about, tool.description)
    else:
        parse_hosted_tool(item, kind if kind in RESPONSES_TOOLS else "tools", chat)


RESPONSES_TOOL_HINTS = ("allowed_callers", "defer_loading", "output_schema")
RESPONSES_TOOLS = frozenset([
    "file_search", "code_interpreter", "computer", "computer_use_preview", "image_generation",
    "mcp", "local_shell", "shell", "apply_patch", "tool_search", "programmatic_tool_calling"])


def parse_responses_choice(root: Fields, chat: Chat) -> ToolChoice | None:
    choice = root.get("tool_choice", TEXT_OR_OBJECT)
    if choice is None or isinstance(choice, str):
        mode = choice and root.one_of("tool_choice", ("auto", "required", "none"))
        is_offered = chat.tools or chat.web_search is not None
        return ToolChoice(mode) if mode and (is_offered or mode == "required") else None
    about = root.child("tool_choice")
    kind = about.need("type")
    if kind == "allowed_tools":
        about.need("tools", list)
        mode, names = about.one_of("mode", ("auto", "required")), []
        for item in about.children("tools"):
            if item.need("type") in TOOL_KINDS:
                names.append(flat_name(item))
            elif item.need("type").startswith(WEB_SEARCH) and chat.web_search is not None:
                names.append(WEB_SEARCH)
            item.skip(*item.wire)
        if mode == "required" and not names:
            raise about.unsupported("tools", "has none that the model's provider has")
        if WEB_SEARCH not in names:
            chat.web_search = None
        return ToolChoice(mode, allowed=names)
    if kind.startswith(WEB_SEARCH) and chat.web_search is not None:
        about.skip(*about.wire)
        return ToolChoice("tool", WEB_SEARCH)
    if kind not in TOOL_KINDS:
        raise about.unsupported("type", f"forces the tool {clipped(kind, 40)!r}, which the model's "
                                        "provider does not have")
    return ToolChoice("tool", flat_name(about))


# ---- to the wire ----


class ResponsesRequest(OpenAIRequest):
    legal_id = re.compile(".{1,64}", re.DOTALL)
    issuer, has_search, is_flat = "openai", True, True
    effort_field = "reasoning.effort"

    def render(self) -> JSON:
        chat, wire = self.chat, self.wire
        self._add_input()
        self.add_tools(self._search())
        if chat.legacy_functions and "tools" in wire:
            wire["parallel_tool_calls"] = False
        self._add_reasoning()
        if chat.stop:
            self.losses.drop("stop")
        if chat.logprobs is not None:
            raise unsupported("logprobs")
        most = self.capped_tokens()
        if most is not None:
            wire["max_output_tokens"] = max(16, most)
            if most < 16:
                self.losses.drop("max_tokens")
        self.add_sampling(part_of(wire, "reasoning").get("effort"))
        options = {name: value for name, value in chat.options.items() if name in SAID_IN_RESPONSES}
        text = without_none(
            verbosity=options.pop("verbosity", None), format=self.render_format())
        wire.update(options, **without_none(user=self.checked_user(), text=text or None,
                                            stream=chat.stream or None), store=False)
        self.lose_options(SAID_IN_RESPONSES)
        return wire

    def _add_input(self) -> None:
        items: List[JSON] = []
        custom: Set[str] = set()
        turns = self.turns()
        if turns and turns[0].role == "system":
            self.wire["instructions"] = "\n\n".join(
                block.text for block in blocks_of(turns.pop(0).blocks, Text))
        for turn in turns:
            parts: List[JSON] = []
            for block in turn.blocks:
                if isinstance(block, ToolCall):  # whose id may come again
                    (custom.add if block.is_custom else custom.discard)(block.id)
                item = self._item(block, turn.role, custom)
                if item is not None:
                    items.append(item)
                else:
                    parts.append(self._part(block))
            if parts:
                role = {"system": "developer"}.get(turn.role, turn.role)
                items.append({"role": role, "content": parts})
        led = [item for item, after in zip(items, [*items[1:], {"role": "user"}]) if not (
            item.get("type") == "reasoning" and (
                after.get("type") == "reasoning" or after.get("role", "assistant") != "assistant"))]
        if len(led) < len(items):
            self.losses.hint("thinking")  # what it led to is not there, without which it is refused
        self.wire["input"] = led

    def _item(self, block: Block, role: str, custom: Set[str]) -> JSON | None:
        """What stands by itself; None for a part of a message."""
        if isinstance(block, ToolCall):
            said = {"input": block.input} if block.is_custom else {
                "arguments": block.input or encode_json(block.arguments)}
            return {"type": CALL_ITEMS[block.is_custom], "call_id": self.call_id(block.id),
                    "name": self.tool_name(block.name), **said}
        if isinstance(block, ToolResult):
            return {"type": f"{CALL_ITEMS[block.id in custom]}_output",
                    "call_id": self.call_id(block.id), "output": self._output(block)}
        if isinstance(block, Thinking):
            id_, _, encrypted = block.signature.partition(":")
            summary = [{"type": "summary_text", "text": block.text}] if block.text else []
            return {"type": "reasoning", "id": id_, "summary": summary,
                    "encrypted_content": encrypted}
        if isinstance(block, Text) and role == "assistant":
            return {"role": "assistant", "content": block.text}
        return None

    def _output(self, block: ToolResult) -> Any:
        parts = list(map(self._part, block.content))
        if all(part["type"] == "input_text" for part in parts):
            said = "\n".join(part["text"] for part in parts)
            return f"Error: {said}" if block.is_error else said
        return [{"type": "input_text", "text": "Error:"}] * block.is_error + parts

    def _part(self, block: Block) -> JSON:
        if isinstance(block, Text):
            return {"type": "input_text", "text": block.text}
        if isinstance(block, Image):
            return {"type": "input_image", "image_url": url_of(block),
                    "detail": block.detail or "auto"}
        if isinstance(block, Document) and block.text:
            return {"type": "input_text", "text": titled_text(block)}
        if isinstance(block, Document) and block.url:
            return {"type": "input_file", "file_url": block.url,
                    **without_none(filename=block.title)}
        if isinstance(block, Document):
            return {"type": "input_file", "filename": block.title or "document.pdf",
                    "file_data": url_of(block)}
        raise unsupported("input_audio", "This model does not take audio.")

    def _search(self) -> Iterator[JSON]:
        search = self.chat.web_search
        if search is not None:
            place = part_of(part_of(search, "user_location"), "approximate")
            yield {"type": "web_search", **without_none(
                user_location={"type": "approximate", **place} if place else None,
                search_context_size=search.get("search_context_size"))}

    def _add_reasoning(self) -> None:
        asked, caps = self.asked_effort(), self.caps
        if caps.thinking != "effort":
            if asked not in (None, "none"):
                self.losses.drop("reasoning.effort")
            return
        reasoning = without_none(effort=asked and self.nearest_effort(asked))
        if asked != "none" and self.chat.shows_thinking:
            reasoning["summary"] = "auto"
        if reasoning:
            self.wire["reasoning"] = reasoning
        self.wire["include"] = ["reasoning.encrypted_content"]


# ---- answers ----


class ResponsesParser(ItemParser):
    """Items come one after another. Where only the `done` events come, they tell all."""

    number = "output_index"

    def __init__(self, dialect: Responses, rewrites: Rewrites) -> None:
        super().__init__(dialect, rewrites)
        self._has_refused = False
        self._is_told = False  # whether the item came in pieces
        self._place: Tuple[object, object] = (None, None)  # of the last one, in a thought
        self._text_block = -1

    text_events = TextEvents(
        rb'\{"type": ?"response\.output_text\.delta",' + FLAT + rb'"delta": ?' + STRING
        + rb'(?:, ?"logprobs": ?\[\])?' + FLAT + rb"\}")

    def read_wire(self, wire: JSON) -> Events:
        kind = text_of(wire, "type")
        if kind in RESPONSES_DELTAS and self._open is not None:
            return self._tell(self._seam(wire) + text_of(wire, "delta"))
        if kind in RESPONSES_WHOLES and self._open is not None and not self._is_told:
            return self._tell(text_of(wire, RESPONSES_WHOLES[kind]))
        return super().read_wire(wire)

    def before_run(self, run: TextRun, events: bytes) -> Events:
        self._is_told = True
        return []

    def _seam(self, wire: JSON) -> str:
        """Between the parts of a thought."""
        place, before = (wire.get("summary_index"), wire.get("content_index")), self._place
        self._place = place
        is_next = isinstance(self._open, Thinking) and self._is_told and place != before
        return "\n\n" if is_next else ""

    def _tell(self, text: str) -> Events:
        self._is_told = self._is_told or bool(text)
        return self.say(text)

    def item_added(self, wire: JSON) -> Events:
        item, self._is_told, self._live = part_of(wire, "item"), False, wire.get(self.number)
        kind = text_of(item, "type")
        if kind == "reasoning":
            return self.open(Thinking())
        if kind in CALL_ITEMS:
            id_, name = text_of(item, "call_id"), text_of(item, "name")
            return self.open(self.make_call(id_, name, kind == "custom_tool_call"))
        if kind != "message":
            self.rewrites.lost.add("output")
        return self.close()

    def part_added(self, wire: JSON) -> Events:
        kind = text_of(part_of(wire, "part"), "type")
        if kind == "refusal":
            self._has_refused = True
        elif kind != "output_text":
            return []
        self._is_told = False
        events = self.open(Text(is_refusal=kind == "refusal"))
        self._text_block = self._block_count - 1
        return events

    def annotation_added(self, wire: JSON) -> Events:
        about = part_of(wire, "annotation")
        if about.get("type") != "url_citation":  # of a file in the provider's store
            self.rewrites.lost.add("annotations")
        elif self._text_block >= 0:
            return [CitationDelta(self._text_block, parse_citation(about))]
        return []

    def item_done(self, wire: JSON) -> Events:
        """It repeats the item; where only its end is told, it tells all."""
        item, events = part_of(wire, "item"), []  # type: JSON, Events
        kind = text_of(item, "type")
        if item.get("phase"):
            self.rewrites.lost.add("phase")
        if kind != "message" and self._open is None:
            events += self.item_added(wire)
        if kind == "message" and not self._is_told:
            for number, part in enumerate(list_of_objects(item, "content")):
                said = text_of(part, "text") or text_of(part, "refusal")
                if said and (number or self._open is None):
                    events += self.part_added({"part": part})
                events += self.say(said)
                for each in list_of_objects(part, "annotations"):
                    events += self.annotation_added({"annotation": each})
        elif kind == "reasoning" and isinstance(self._open, Thinking):
            texts = [text_of(part, "text") for key in ("summary", "content")
                     for part in list_of_objects(item, key)]
            events += [] if self._is_told else self.say("\n\n".join(texts))
            encrypted = text_of(item, "encrypted_content")
            if encrypted:
                events.append(SignatureDelta(f"{text_of(item, 'id')}:{encrypted}", "openai"))
        elif isinstance(self._open, ToolCall) and not self._is_told:
            events += self.say(text_of(item, "arguments") or text_of(item, "input"))
        self._is_told = False
        return events + self.close_item()

    def finish(self, wire: JSON) -> Events:
        about, events = part_of(wire, "response"), self.close_all()
        self.usage = self._dialect.parse_usage(about.get("usage")) or self.usage
        if wire.get("type") == "response.failed":
            raise self._dialect.parse_error(about.get("error"), 200)
        self.ended = True
        if not self._block_count:
            for item in list_of_objects(about, "output"):
                events += self.item_done({"item": item})
        reason = text_of(part_of(about, "incomplete_details"), "reason")
        finish = "tool_calls" if self._calls else "refusal" if self._has_refused else "stop"
        if wire.get("type") == "response.incomplete" or about.get("status") == "incomplete":
            finish = {"content_filter": "filter", "steered": "stop"}.get(reason, "length")
        return events + self.finished(finish, "", text_of(about, "service_tier"))

    def fail(self, wire: JSON) -> Events:
        raise self._dialect.parse_error(wire.get("error") or wire, 200)

    events = {
        "response.created": lambda self, wire: self.start(part_of(wire, "response")),
        "response.output_item.added": item_added,
        "response.content_part.added": part_added, "response.output_item.done": item_done,
        "response.output_text.annotation.added": annotation_added, "error": fail,
        "response.completed": finish, "response.incomplete": finish, "response.failed": finish}


RESPONSES_DELTAS = frozenset(f"response.{name}.delta" for name in (
    "output_text", "refusal", "function_call_arguments", "custom_tool_call_input",
    "reasoning_summary_text", "reasoning_text"))
RESPONSES_WHOLES = {"response.output_text.done": "text", "response.refusal.done": "refusal",
                    "response.function_call_arguments.done": "arguments",
                    "response.custom_tool_call_input.done": "input"}


class ResponsesRenderer(Renderer):
    """Every item is announced, told and repeated whole; the last event repeats all of them."""

    def __init__(self, chat: Chat, created: int) -> None:
        super().__init__(chat, created)
        self.sequence = 0
        self._has_refused = False
        self._output: List[JSON] = []
        self._pieces: List[str] = []
        self._cited: List[JSON] = []
        self.response: JSON = {
            "id": "", "object": "response", "created_at": created, "status": "in_progress",
            "background": False, "error": None, "incomplete_details": None, "model": chat.model,
            "output": [], "previous_response_id": None, "store": False, "truncation": "disabled",
            "usage": None, **RESPONSES_ECHO, **chat.echo}

    def _event(self, name: str, /, **data: object) -> bytes:
        return self._numbered(name, encode_json(data)[1:-1])

    def _numbered(self, name: str, members: str) -> bytes:
        kind, number = f"response.{name}", self.sequence
        self.sequence += 1
        return sse(utf8(f'{{"type":"{kind}",{members},"sequence_number":{number}}}'), kind)

    def _start(self, event: Start) -> bytes:
        self.response["id"] = own_id("resp_", event.id)
        members = encode_json({"response": self.response})[1:-1]
        return self._numbered("created", members) + self._numbered("in_progress", members)

    def _block_start(self, event: BlockStart) -> bytes:
        block = self._open = event.block.but()
        self._has_refused = self._has_refused or is_refusal(block)
        self._pieces, self._cited = [], []
        item = self._item(block)
        item.update({key: first for key, first in (
            ("status", "in_progress"), ("content", [])) if key in item})
        item.pop("encrypted_content", None)
        place: JSON = {"item_id": item["id"], "output_index": len(self._output)}
        out = self._event("output_item.added", output_index=len(self._output), item=item)
        if isinstance(block, Search):
            return out + b"".join(self._event(f"web_search_call.{state}", **place)
                                  for state in ("in_progress", "searching", "completed"))
        name, more = self._grammar(block)
        self._place = {**place, **more}
        if isinstance(block, Text):
            out += self._event("content_part.added", **self._place, part=self._part(block, ""))
        head = encode_json({"type": f"response.{name}.delta", **self._place})[:-1]
        before = utf8(f"event: response.{name}.delta\ndata: {head},\"delta\":")
        after = b',"logprobs":[]' if name == "output_text" else b""
        self._told = b'%b"%%b"%b,"sequence_number":%%d}\n\n' % (before.replace(b"%", b"%%"), after)
        self._say = self._open_summary if isinstance(block, Thinking) else self._delta
        return out

    def _delta(self, text: str) -> bytes:
        return self.say_run(TextRun([text], [utf8(encode_string(text))[1:-1]]))

    def say_run(self, run: TextRun) -> bytes:
        self._pieces += run.pieces
        first, self.sequence = self.sequence, self.sequence + len(run.pieces)
        numbered = zip(run.strings, range(first, self.sequence))
        return self._told * len(run.pieces) % tuple(itertools.chain.from_iterable(numbered))

    def _open_summary(self, text: str) -> bytes:
        """Of a thought that says something."""
        self._say = self._delta
        return self._event("reasoning_summary_part.added", **self._place,
                           part={"type": "summary_text", "text": ""}) + self._delta(text)

    @staticmethod
    def _grammar(block: Block) -> Tuple[str, JSON]:
        """The name of its events, and how they say where they belong."""
        if isinstance(block, Thinking):
            return "reasoning_summary_text", {"summary_index": 0}
        if isinstance(block, ToolCall):
            return ("custom_tool_call_input" if block.is_custom else "function_call_arguments"), {}
        return "refusal" if is_refusal(block) else "output_text", {"content_index": 0}

    def _part(self, block: Block, text: str) -> JSON:
        """{} where an item has none."""
        if isinstance(block, Thinking):
            return {"type": "summary_text", "text": text}
        if not isinstance(block, Text):
            return {}
        if block.is_refusal:
            return {"type": "refusal", "refusal": text}
        notes = [{"type": "url_citation", **cited_at(each, 0, len(text))} for each in self._cited]
        return {"type": "output_text", "text": text, "annotations": notes,
                "logprobs": block.logprobs}

    def _item(self, block: Block) -> JSON:
        n = f"{self.response['id'][len('resp_'):]}_{len(self._output)}"
        if isinstance(block, Thinking):
            id_, _, sealed = seal(block, "openai").partition(":")
            return {"type": "reasoning",
                    "id": id_ if block.issuer == "openai" else f"{MADE_ID}{n}",
                    "summary": [self._part(block, block.text)] if block.text else [],
                    **without_none(encrypted_content=sealed or id_)}
        if isinstance(block, ToolCall):
            return self._call(block, n)
        if isinstance(block, Search):
            return {"type": "web_search_call", "id": f"ws_{n}", "status": "completed",
                    "action": {"type": "search", "query": block.query}}
        text = block.text if isinstance(block, Text) else ""
        return {"type": "message", "id": f"msg_{n}", "role": "assistant", "status": "completed",
                "content": [self._part(block, text)]}

    def _call(self, call: ToolCall, n: str) -> JSON:
        space = next((tool.namespace for tool in self._chat.tools if tool.name == call.name), "")
        about: JSON = {"call_id": carried_id(call), "name": call.name}
        if space:
            about.update(namespace=space, name=call.name[len(space) + 2:])
        if call.is_custom:
            return {"type": "custom_tool_call", "id": f"ctc_{n}", **about, "input": call.input}
        return {"type": "function_call", "id": f"fc_{n}", **about, "status": "completed",
                "arguments": call.input}

    def _citation(self, event: CitationDelta) -> bytes:
        """Told at the end of its text, which may be its place; after it, it has none any more."""
        if event.block == len(self._output):
            self._cited.append(event.citation)
        else:
            self.lost.add("annotations")
        return b""

    def _block_stop(self, event: BlockStop) -> bytes:
        block, out = self._open, b""
        if isinstance(block, ToolCall) and not (self._pieces or block.is_custom):
            out = self._say("{}")
        said = "".join(self._pieces)
        if isinstance(block, ToolCall):
            block.input = said  # of arguments too, as they came: they may be cut off
        else:
            close_block(block, said)
        if isinstance(block, Text):
            block.logprobs = list(map(with_bytes, event.logprobs))
        name, _ = self._grammar(block)
        part, key = self._part(block, said), RESPONSES_WHOLES.get(f"response.{name}.done", "text")
        out += b"".join([self._event("output_text.annotation.added", **self._place, annotation=note,
                                     annotation_index=i)
                         for i, note in enumerate(part.get("annotations", ()))])
        if said or isinstance(block, (Text, ToolCall)):
            more: JSON = {"logprobs": part["logprobs"]} if name == "output_text" else {}
            out += self._event(f"{name}.done", **self._place, **{key: said}, **more)
            if part:
                about = "reasoning_summary" if isinstance(block, Thinking) else "content"
                out += self._event(f"{about}_part.done", **self._place, part=part)
        item = self._item(block)
        out += self._event("output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        return out

    def _finish(self, event: Finish) -> bytes:
        reason = {"length": "max_output_tokens", "context": "max_output_tokens",
                  "filter": "content_filter"}.get(event.finish)
        out = b""
        if event.refusal:
            said: Events = [BlockStart(Text(is_refusal=True)), TextDelta(event.refusal),
                            BlockStop()]
            out = b"".join(map(self.feed, said))
        elif event.finish == "refusal" and not self._has_refused:
            reason = "content_filter"
        status = "incomplete" if reason else "completed"
        self.response.update(
            status=status, incomplete_details={"reason": reason} if reason else None,
            output=self._output, usage=render_openai_usage(event.usage, RESPONSES_USAGE),
            **without_none(service_tier=event.service_tier))
        return out + self._event(status, response=self.response)

    def fail(self, error: GatewayError) -> bytes:
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        if error.code == "context_length_exceeded":
            code = error.code
        told = {"code": code, "message": error.message}
        self.response.update(status="failed", error=told, output=self._output)
        return self._event("failed", response=self.response)


def with_bytes(about: JSON) -> JSON:
    """A token's log probability: Chat Completions may leave its bytes null."""
    told = {**about, "bytes": about.get("bytes") or list(utf8(text_of(about, "token")))}
    if "top_logprobs" in about:
        told["top_logprobs"] = list(map(with_bytes, list_of_objects(about, "top_logprobs")))
    return told


SEQUENCE_NUMBER = re.compile(rb'"sequence_number": ?([0-9]{1,15})')


def render_failure(error: GatewayError, id_: str, sequence: int) -> bytes:
    renderer = ResponsesRenderer(Chat("", []), 0)
    renderer.response["id"], renderer.sequence = own_id("resp_", id_), sequence
    return renderer.fail(error)


class ResponsesWatch(MarkedWatch):
    """Only its last event tells the usage."""

    content_mark, noise = b'.delta"', (b'.done"', b'.added"')
    marks = (b'"response.created"', b'"response.completed"', b'"response.incomplete"',
             b'"response.failed"', b'"error"')

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self._id, self._last = "", b""
        self._error: GatewayError | None = None  # after which the response itself fails

    def feed(self, block: bytes) -> bytes:
        self._last = block if SEQUENCE_NUMBER.search(block) else self._last
        return super().feed(block)

    def look_at(self, wire: JSON) -> None:
        kind, about = text_of(wire, "type"), part_of(wire, "response")
        if kind == "response.created":
            self._id = text_of(about, "id")
        elif kind in ("response.completed", "response.incomplete"):
            self.ended = self.has_content = True
            self.usage = self._dialect.parse_usage(about.get("usage"))
        elif kind in ("response.failed", "error"):
            told = about.get("error") or wire.get("error") or wire
            self._error = self._dialect.parse_error(told, 200)
            is_last = kind == "response.failed" or not self._id
            self.failure = self._error if is_last else None

    def end(self) -> bytes:
        self.failure = self.failure or self._error
        return super().end()

    def fail(self, error: GatewayError) -> bytes:
        """In the sequence of the events that passed."""
        told = SEQUENCE_NUMBER.findall(self._last)
        return render_failure(error, self._id, int(told[-1]) + 1 if told else 0)

    def said_in(self, wire: JSON) -> List[Any]:
        return [text_of(wire, "delta")]


class GenerateContent(Dialect):
    """Gemini's generateContent (ai.google.dev/api/generate-content). The model's name and whether
    it streams stand in the path; for `parse_request` they are put into the body."""

    name, history, told, streams_arrays = "gemini", "contents", b'"model"', True
    usage_field = "usageMetadata"
    keepalive = b"\n"  # its SDKs take neither comments nor names of events
    long_prompt = "The input token count exceeds the maximum number of tokens allowed"
    plain_fields = (
        ("maxOutputTokens", "max_tokens", int), ("temperature", "temperature", NUMBER),
        ("topP", "top_p", NUMBER), ("topK", "top_k", int))

    def parse_request(self, wire: JSON, losses: Losses) -> Chat:
        root = CamelFields(wire, losses)
        root.need("contents", list)
        chat = Chat(root.need("model"), canonical(GeminiContents().turns(root)),
                    stream=bool(root.get("stream", bool)))
        for turn in chat.turns:  # the SDKs' chats keep each piece of a stream as a content
            if turn.role == "assistant":
                turn.blocks = list(with_joined_texts(turn.blocks))
        for item in root.children("tools"):
            parse_gemini_tools(item, chat)
        chat.choice = parse_gemini_choice(root.child("toolConfig", {}), chat)
        config = root.child("generationConfig", {})
        self.parse_plain_fields(config, chat)
        chat.stop, chat.format = config.strings("stopSequences"), parse_gemini_format(config)
        if config.get("candidateCount", int) not in (None, 1):
            raise config.unsupported("candidateCount", "must be 1 for this model")
        if set(map(str.upper, config.strings("responseModalities"))) - {"TEXT"}:
            raise config.unsupported("responseModalities", "can be TEXT only for this model")
        alternatives = config.get("logprobs", int)
        if config.get("responseLogprobs", bool):
            chat.logprobs = alternatives or 0
        elif alternatives:
            raise config.wrong("logprobs", "needs 'responseLogprobs'")
        config.refuse("speechConfig")
        root.refuse("cachedContent", "continuationToken")
        chat.options = without_none(**{name: config.get(key, OPTIONS[name].kind)
                                       for key, name in GEMINI_OPTIONS.items()})
        self._parse_thinking(config.child("thinkingConfig", {}), chat)
        if root.skip("safetySettings"):
            losses.drop("safetySettings")
        root.hint("labels", "store", "serviceTier")
        config.hint("mediaResolution")
        root.name_unknown()
        return chat

    @staticmethod
    def _parse_thinking(about: Fields, chat: Chat) -> None:
        chat.shows_thinking = bool(about.get("includeThoughts", bool))
        level, budget = about.get("thinkingLevel"), about.get("thinkingBudget", int)
        if level is not None:
            chat.effort = None if level.endswith("UNSPECIFIED") else level.lower()
        elif budget == 0:
            chat.effort = "none"
        elif budget is not None and budget > 0:
            chat.budget = budget

    def parse_reply(self, wire: JSON, rewrites: Rewrites) -> Reply:
        parser = GeminiParser(self, rewrites)
        events = parser.read(wire)
        return collect([*events, *parser.finish()])

    def render_reply(self, reply: Reply, chat: Chat, created: int) -> JSON:
        blocks = list(with_joined_texts(reply.blocks))
        parts, texts = list(answer_parts(blocks, chat.shows_thinking)), blocks_of(blocks, Text)
        places = (i for i, part in enumerate(parts) if part.keys() == {"text"})
        more = gemini_more([(each, gemini_segment(each, text.text, part=place))
                            for text, place in zip(texts, places) for each in text.citations],
                           [each for text in texts for each in text.logprobs])
        return gemini_end(parts, reply.finish, reply.usage, more, bool(reply.blocks),
                          gemini_head(reply.id, reply.model))

    def render_error(self, error: GatewayError, request_id: str) -> bytes:
        status = GEMINI_ERRORS.get(error.status, "INTERNAL")
        code = 503 if status == "UNAVAILABLE" else error.status
        wait = dict(error.headers).get("retry-after", "")
        details = [{"@type": RETRY_INFO, "retryDelay": f"{wait}s"}] if wait.isdecimal() else []
        return dump_json({"error": {"code": code, "message": self.words_of(error),
                                    "status": status, **without_none(details=details)}})

    def read_call(self, body: Body | Form, path: str) -> Tuple[str, bool]:
        name, _, action = path.partition("/models/")[2].rpartition(":")
        return name, action == "streamGenerateContent"

    def values_for_ceiling(self, body: Body, most: int) -> JSON:
        for key in ("generationConfig", "generation_config"):
            config = as_object(body.get(key))
            lowered = capped({name: whole_number(config.get(name)) for name in (
                "maxOutputTokens", "max_output_tokens")}, most)
            if lowered:
                return {key: {**config, **lowered}}
        return {}

    def values_for_model(self, body: Body | Form, model: str) -> JSON:
        """It stands within: in `requests`, in `generateContentRequest`, as models/NAME."""
        def named(value: Any) -> Any:
            if isinstance(value, list):
                return list(map(named, value))
            has_name = isinstance(value, dict) and value.get("model")
            return {**value, "model": f"models/{model}"} if has_name else value

        told = {key: body.get(key) for key in ("requests", "generateContentRequest")}
        made = {key: named(value) for key, value in told.items()}
        if isinstance(body.get("model"), str):
            made["model"] = f"models/{model}"
        return {key: value for key, value in made.items() if value != told.get(key)}

    def is_spoken_in(self, headers: Headers, query: str) -> bool:
        return "x-goog-api-key" in headers or query.startswith("key=") or "&key=" in query

    def render_model(self, name: str, owner: str) -> JSON:
        return {"name": f"models/{name}", "version": "1", "displayName": name,
                "supportedGenerationMethods": ["generateContent", "countTokens"]}

    def count_content(self, reply: JSON) -> int:
        return len(dump_json(reply.get("candidates", [])))

    def render_estimate(self, wire: JSON) -> JSON:
        asked = part_of(in_camel_case(wire), "generateContentRequest") or wire
        chat = self.parse_request({"model": "m", **asked}, Losses())
        return {"totalTokens": estimate_tokens(chat)}

    def parse_usage(self, wire: object) -> Usage | None:
        """Thoughts are not among the candidates' tokens, but in some answers of Vertex AI."""
        if not isinstance(wire, dict):
            return None
        said, thoughts, asked = (count(wire.get(f"{name}TokenCount")) for name in (
            "candidates", "thoughts", "prompt"))
        asked += count(wire.get("toolUsePromptTokenCount"))
        if asked + said != count(wire.get("totalTokenCount")):
            said += thoughts
        return Usage(asked, said, count(wire.get("cachedContentTokenCount")), reasoning=thoughts)


class CamelFields(Fields):
    """Protobuf's JSON: names in two spellings, whole numbers also as floats and strings."""

    def __init__(self, wire: JSON, losses: Losses, place: str = "",
                 parent: Fields | None = None) -> None:
        super().__init__(in_camel_case(wire), losses, place, parent)

    def get(self, key: str, kind: Any = str) -> Any:
        value = self.wire.get(key)
        if kind is int and isinstance(value, (float, str)):
            self.wire[key] = whole_number(value)
        elif kind is list and isinstance(value, dict):  # one may stand for a list of one
            self.wire[key] = [value]
        return super().get(key, kind)


def in_camel_case(wire: JSON) -> JSON:
    return {camel(key): value for key, value in wire.items()}


def camel(name: str) -> str:
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)


def whole_number(value: Any) -> Any:
    """An integer that is spelled otherwise; another value as it is."""
    try:
        return int(value) if float(value).is_integer() else value
    except (TypeError, ValueError, OverflowError):
        return value


GEMINI_OPTIONS = {"seed": "seed", "frequencyPenalty": "frequency_penalty",
                  "presencePenalty": "presence_penalty"}
GEMINI_TIERS = {"default": "standard", "flex": "flex", "priority": "priority"}
RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"
GEMINI_ERRORS = {
    400: "INVALID_ARGUMENT", 413: "INVALID_ARGUMENT", 422: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ABORTED",
    429: "RESOURCE_EXHAUSTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 529: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED"}
GEMINI_MODES = {"AUTO": "auto", "VALIDATED": "auto", "MODE_UNSPECIFIED": "auto",
                "ANY": "required", "NONE": "none"}


# ---- from the wire ----


class GeminiContents:
    """Calls without ids get them, and results find their calls: by id, else by name in order."""

    def __init__(self) -> None:
        self._made = 0
        self._open: Dict[str, Dict[str, None]] = {}  # by name, ids of the calls without result
        self._told: Set[str] = set()  # the ids that results of one turn name
        self._free: Dict[str, Iterator[str]] = {}  # by name, those that they do not

    def turns(self, root: Fields) -> Iterator[Turn]:
        for content, role in ((root.child("systemInstruction", {}), "system"),
                              *((each, "") for each in root.children("contents"))):
            said = (content.get("role") or "user").lower()
            parts = list(content.children("parts"))
            self._told = {text_of(part_of(part.wire, "functionResponse"), "id") for part in parts}
            self._free = {}
            blocks = [block for part in parts for block in self._part(part)]
            if any(part.wire.get("thought") for part in parts) and not any(
                    part.wire.get("thoughtSignature") for part in parts):
                root.losses.hint("thinking")
            yield Turn(role or {"model": "assistant"}.get(said, "user"), in_order(blocks))

    def _part(self, part: Fields) -> List[Block]:
        signature, is_thought = part.get("thoughtSignature") or "", part.get("thought", bool)
        part.hint("videoMetadata", "mediaResolution")
        text = part.get("text")
        if text is not None and is_thought:
            return signed_thinking(text, signature)
        if text is not None:
            return [*([Text(text=text)] if text else []), *signed_thinking("", signature)]
        if part.get("functionCall", dict) is not None:
            call = self._call(part.child("functionCall"))
            thoughts = signed_thinking("", signature)
            if thoughts and thoughts[0].issuer == "gemini":
                call.signature, call.issuer = signature, "gemini"
                return [call]
            return [*thoughts, call]
        if part.get("functionResponse", dict) is not None:
            return [self._result(part.child("functionResponse"))]
        media = parse_gemini_media(part)
        if media is None:
            kind = next((key for key, value in part.wire.items() if value is not None), "")
            if kind and kind not in GEMINI_TRACES:
                raise part.unsupported(kind, "cannot be sent to this model")
            part.losses.hint("parts")
            part.skip(*part.wire)
        return [media] if media else []

    def _call(self, call: Fields) -> ToolCall:
        name = call.need("name")
        call.refuse("partialArgs", "willContinue")
        self._made += 1
        id_ = call.get("id") or f"call_{self._made}_{hashed(name, 8)}"
        self._open.setdefault(name, {})[id_] = None
        return ToolCall(id=id_, name=name, arguments=call.get("args", dict) or {})

    def _result(self, about: Fields) -> ToolResult:
        """Of the call with its id, else of the first with its name."""
        name, response = about.need("name"), about.get("response", dict) or {}
        waiting, id_ = self._open.get(name, {}), about.get("id") or ""
        if id_ not in waiting:
            if name not in self._free:  # once a turn: to look anew for each result is quadratic
                self._free[name] = iter([each for each in waiting if each not in self._told])
            id_ = next(self._free[name], id_ or name)
        waiting.pop(id_, None)
        is_error = list(response) == ["error"]
        said = next(iter(response.values())) if is_error or list(response) == ["output"] else (
            response or "")
        text = said if isinstance(said, str) else encode_json(said)
        media = [each for each in map(parse_gemini_media, about.children("parts"))
                 if each and not is_empty(each)]
        about.refuse("willContinue")
        about.hint("scheduling")
        return ToolResult(id=id_, is_error=is_error,
                          content=[*([Text(text=text)] if text else []), *media])


def in_order(blocks: List[Block]) -> List[Block]:
    """A thought that was hidden comes back behind the text that it led to."""
    placed: List[Block] = []
    texts: List[Block] = []  # the last ones
    for block, after in zip(blocks, [*blocks[1:], Thinking()]):
        is_late = isinstance(block, Thinking) and block.issuer != "gemini" and (
            isinstance(after, Thinking))
        if isinstance(block, Text):
            texts.append(block)
        elif is_late:
            placed.append(block)
        else:
            placed += [*texts, block]
            texts = []
    return placed + texts


GEMINI_MARKS = frozenset(["thoughtSignature", "thought", "partMetadata"])  # beside a part's data
# What was run at the provider, and what may stand beside it.
GEMINI_TRACES = GEMINI_MARKS | {
    "executableCode", "codeExecutionResult", "toolCall", "toolResponse"}


def signed_thinking(text: str, signature: str) -> List[Block]:
    """The signature is Gemini's own, or another's envelope, made to look like one."""
    if not signature:
        return []
    try:
        plain = base64.b64decode(signature.translate(FROM_URL_SAFE) + "==").decode()
    except ValueError:
        plain = ""
    sealed = plain if plain.startswith(ENVELOPE) else signature
    return [unseal(Thinking(text=text), sealed, "gemini")]


def parse_gemini_media(part: Fields) -> Block | None:
    is_inline = part.get("inlineData", dict) is not None
    if not is_inline and part.get("fileData", dict) is None:
        return None
    about = part.child("inlineData" if is_inline else "fileData")
    title = about.get("displayName") or ""
    url = "" if is_inline else about.need("fileUri")
    kind = (about.get("mimeType") or guessed_type(url)).lower().partition(";")[0].strip()
    kind = JPEG.get(kind, kind)
    if url and (not url.startswith(("http://", "https://")) or GOOGLE_FILES.match(url)):
        raise about.unsupported("fileUri", "names a file in another vendor's store")
    data = "" if url else about.need("data").translate(FROM_URL_SAFE)
    data += "=" * (-len(data) % 4)
    family = kind.partition("/")[0]
    if family == "image":
        return Image(url=url, media_type=kind, data=data)
    if kind == "application/pdf":
        return Document(url=url, media_type=kind, data=data, title=title)
    if family == "audio" and not url:
        return Audio(data=data, format=AUDIO_FORMATS.get(kind, kind[len("audio/"):]))
    if family != "text" or url:
        raise about.unsupported("mimeType", "cannot be sent to this model")
    return Document(media_type=kind, text=decoded_text(data, about, "data"), title=title)


GOOGLE_FILES = re.compile(
    r"https?://(?:generativelanguage\.googleapis\.com/|(?:www\.)?youtube\.com/|youtu\.be/)")
AUDIO_FORMATS = {"audio/mpeg": "mp3", "audio/x-wav": "wav", "audio/wave": "wav"}


def parse_gemini_tools(item: Fields, chat: Chat) -> None:
    for about in item.children("functionDeclarations"):
        schema = about.get("parametersJsonSchema", dict)
        if schema is None and about.get("parameters", dict) is not None:
            schema = json_schema(about.wire["parameters"])
        about.hint("response", "responseJsonSchema", "behavior")
        chat.tools.append(Tool(about.need("name"), about.get("description") or "", schema))
    for key, about in item.wire.items():
        if key == "googleSearch" and about is not None:
            chat.web_search = {}
            if about:
                item.losses.drop("web_search")
        elif key != "functionDeclarations" and about is not None:
            item.losses.drop(key if key in GEMINI_TOOLS else "tools")
    item.skip(*item.wire)


GEMINI_TOOLS = ("codeExecution", "urlContext", "fileSearch", "computerUse", "googleMaps",
                "mcpServers", "googleSearchRetrieval", "enterpriseWebSearch")
NUMERIC_KEYWORDS = frozenset(["minItems", "maxItems", "minLength", "maxLength", "minProperties",
                              "maxProperties", "minimum", "maximum"])


def json_schema(schema: Any) -> Any:
    """The JSON Schema of what Gemini's own schema dialect says."""
    if not isinstance(schema, dict):
        return schema
    about = in_camel_case(schema)
    made: JSON = {}
    for key, value in about.items():
        if key == "type" and isinstance(value, str):
            if value.upper() != "TYPE_UNSPECIFIED":
                made[key] = value.lower()
        elif key in ("properties", "defs") and isinstance(value, dict):
            made[key.replace("defs", "$defs")] = {
                name: json_schema(item) for name, item in value.items()}
        elif key == "ref" and isinstance(value, str):
            made["$ref"] = value.replace("#/defs/", "#/$defs/", 1)
        elif key in ("items", "additionalProperties"):
            made[key] = json_schema(value)
        elif key == "anyOf" and isinstance(value, list):
            made[key] = [json_schema(item) for item in value]
        elif key in NUMERIC_KEYWORDS:
            made[key] = whole_number(value)
        elif key not in ("nullable", "example", "propertyOrdering") and (key, value) != (
                "format", "enum"):
            made[key] = value
    if about.get("nullable") is True and "type" in made:
        made["type"] = [made["type"], "null"]
        if isinstance(made.get("enum"), list):
            made["enum"] = [*made["enum"], None]
    elif about.get("nullable") is True and isinstance(made.get("anyOf"), list):
        made["anyOf"].append({"type": "null"})
    return made


def parse_gemini_choice(config: Fields, chat: Chat) -> ToolChoice | None:
    if config.skip("retrievalConfig"):
        config.losses.drop("retrievalConfig")
    config.hint("includeServerSideToolInvocations")
    if config.get("functionCallingConfig", dict) is None:
        return None
    about = config.child("functionCallingConfig")
    about.refuse("streamFunctionCallArguments")
    mode, names = (about.get("mode") or "AUTO").upper(), about.strings("allowedFunctionNames")
    known = set(names)
    if mode not in GEMINI_MODES:
        raise about.wrong("mode", f"must be one of: {', '.join(GEMINI_MODES)}")
    if mode == "ANY" and len(names) == 1:
        return ToolChoice("tool", names[0])
    if mode == "ANY":
        return ToolChoice("required", allowed=names or None)
    chat.tools = [tool for tool in chat.tools if not names or tool.name in known]
    return ToolChoice(GEMINI_MODES[mode])


def parse_gemini_format(config: Fields) -> Format | None:
    kind = (config.get("responseMimeType") or "text/plain").lower()
    schema = config.get("responseJsonSchema", dict)
    if config.get("responseSchema", dict) is not None:
        schema = json_schema(config.wire["responseSchema"])
    if kind not in ("text/plain", "application/json"):
        raise config.unsupported("responseMimeType", "is not supported by the model's provider")
    if kind == "text/plain" and schema is not None:
        raise config.wrong("responseMimeType", "must be application/json beside a schema")
    return Format(schema) if kind == "application/json" else None


# ---- to the wire ----


class GeminiRequest(RequestWriter):
    """From Gemini 3 on (thinking by "level") calls have ids, the first of a step is signed, results
    hold media, and penalties are refused."""

    legal_name = re.compile("[A-Za-z_][A-Za-z0-9_.:-]{0,127}")
    issuer = "gemini"

    def __init__(self, chat: Chat, target: Target, losses: Losses) -> None:
        super().__init__(chat, target, losses)
        self.is_new = self.caps.thinking == "level"
        self.config: JSON = {}

    def render(self) -> JSON:
        self.wire = {}  # its name stands in the path
        self._add_contents()
        self._add_tools()
        self._add_config()
        self._add_thinking()
        if self.config:
            self.wire["generationConfig"] = self.config
        return self.wire

    def _add_contents(self) -> None:
        turns, names = self.turns(), {}  # type: List[Turn], Dict[str, str]
        asked = max([i for i, turn in enumerate(turns) if turn.role == "user" and not all(
            isinstance(block, ToolResult) for block in turn.blocks)], default=-1)
        contents, system = [], []
        for i, turn in enumerate(turns):
            blocks = with_signed_calls(turn.blocks)
            names.update({call.id: call.name for call in blocks_of(blocks, ToolCall)})
            results = [part for block in blocks_of(blocks, ToolResult)
                       for part in self._result(block, names[block.id])]
            parts = [part for block in blocks
                     for part in (*title_part(block), *self._part(block))]
            if turn.role == "system":
                system += parts
            if turn.role == "assistant" and i > asked and self.is_new:
                first_call = next((part for part in parts if "functionCall" in part), {})
                first_call.setdefault("thoughtSignature", NO_SIGNATURE)
            role = "model" if turn.role == "assistant" else "user"
            contents += [{"role": role, "parts": each} for each in (results, parts)
                         if each and turn.role != "system"]
        if system:
            self.wire["systemInstruction"] = {"parts": system}
        self.wire["contents"] = contents

    def _part(self, block: Block) -> List[JSON]:
        if isinstance(block, Text):
            return [{"text": block.text}]
        if isinstance(block, Thinking):
            return [{"text": block.text, "thoughtSignature": block.signature,
                     **({"thought": True} if block.text else {})}]
        if isinstance(block, ToolCall):
            call: JSON = {"name": self.tool_name(block.name), "args": call_arguments(block)}
            if self.is_new:
                call["id"] = block.id
            signature = block.signature if block.issuer == "gemini" else ""
            return [{"functionCall": call, **without_none(thoughtSignature=signature)}]
        if isinstance(block, Image) and block.detail not in ("", "auto"):
            self.losses.hint("detail")
        if isinstance(block, (Image, Document, Audio)):
            return [render_gemini_media(block)]
        return []  # a result, which stands before all parts

    def _result(self, block: ToolResult, name: str) -> List[JSON]:
        texts = [titled_text(each) if isinstance(each, Document) else each.text
                 for each in block.content if isinstance(each, (Text, Document))]
        texts = [text for text in texts if text]
        media = [part for each in block.content if not getattr(each, "text", "")
                 for part in self._part(each)]
        about: JSON = {"name": self.tool_name(name),
                       "response": {"error" if block.is_error else "output": "\n".join(texts)}}
        if self.is_new:
            about.update(id=block.id, **without_none(parts=media))
        return [{"functionResponse": about}, *([] if self.is_new else media)]

    def _add_tools(self) -> None:
        choice, tools = self.choice, [self._tool(tool) for tool in self.offered_tools()]
        made: List[JSON] = [{"functionDeclarations": tools}] if tools else []
        search = self.chat.web_search
        can_search = self.is_new or not tools  # older models search or call, not both
        if search or search is not None and not can_search:
            self.losses.drop("web_search")
        if search is not None and can_search and choice.mode != "none":
            made.append({"googleSearch": {}})
        if made:
            self.wire["tools"] = made
        if tools and self.chat.choice:
            mode = {"auto": "AUTO", "none": "NONE"}.get(choice.mode, "ANY")
            names = [choice.name] if choice.mode == "tool" else choice.allowed or []
            names = list(map(self.tool_name, names)) if mode == "ANY" else []
            self.wire["toolConfig"] = {"functionCallingConfig": {
                "mode": mode, **without_none(allowedFunctionNames=names)}}
        if self.chat.parallel is False and tools:
            self.losses.drop("parallel_tool_calls")

    def _tool(self, tool: Tool) -> JSON:
        description, schema = self.as_function(tool)
        if tool.strict:
            self.losses.drop("strict")
        has_any = any(map(schema.get, ("properties", "$ref", "anyOf", "oneOf", "allOf",
                                       "patternProperties"))) or (
            schema.get("additionalProperties") not in (None, True, False, {}))
        return {"name": self.tool_name(tool.name), **without_none(
            description=description,
            parametersJsonSchema=typed_object(schema) if has_any else None)}

    def _add_config(self) -> None:
        chat, config = self.chat, self.config
        for key, name, _ in GenerateContent.plain_fields:
            value = self.capped_tokens() if name == "max_tokens" else getattr(chat, name)
            if value is not None:
                config[key] = value
        known = {name: key for key, name in GEMINI_OPTIONS.items()
                 if name == "seed" or not self.is_new}
        config.update({known[name]: value for name, value in chat.options.items() if name in known})
        config.update(without_none(stopSequences=self.checked_stops()))
        if chat.logprobs is not None:
            config.update(without_none(responseLogprobs=True, logprobs=chat.logprobs or None))
        form = chat.format
        if form is not None:
            config["responseMimeType"] = "application/json"
        if form is not None and form.schema is not None:
            config["responseJsonSchema"] = schema = gemini_schema(form.schema)
            if form.description:
                schema.setdefault("description", form.description)
        if chat.user:
            self.losses.hint("user")
        tier = GEMINI_TIERS.get(chat.options.get("service_tier", ""))
        self.wire.update(without_none(serviceTier=tier))
        self.lose_options([*known, *(["service_tier"] if tier else [])])

    def _add_thinking(self) -> None:
        chat, asked = self.chat, self.asked_effort()
        if asked is None:
            if chat.thinking is not None and self.caps.thinking == "none":
                self.losses.drop("thinking")
            elif chat.thinking is not None and chat.shows_thinking:
                self.config["thinkingConfig"] = {"includeThoughts": True}
            return
        about: JSON = {"includeThoughts": asked != "none" and chat.shows_thinking}
        if self.is_new:
            about["thinkingLevel"] = self.nearest_effort(asked).upper()
        elif self.caps.thinking == "budget":
            budget = self.asked_budget() or GEMINI_BUDGETS.get(asked, 24576)
            least, most = (0, 24576) if self.caps.can_disable_thinking else (128, 32768)
            about["thinkingBudget"] = max(least, min(budget, most))
            if asked == "none" and least:
                self.losses.drop("reasoning_effort")
        else:
            self.losses.drop("reasoning_effort")
            return
        self.config["thinkingConfig"] = about


def with_signed_calls(blocks: List[Block]) -> List[Block]:
    """Where a call's own signature was lost, the thought before it holds it too."""
    calls = {call.id: call for call in blocks_of(blocks, ToolCall)}
    signed = {thought.before: thought.signature for thought in blocks_of(blocks, Thinking)}
    for id_, call in calls.items():
        if id_ in signed and not call.signature:
            call.signature, call.issuer = signed[id_], "gemini"
    return [block for block in blocks if not (
        isinstance(block, Thinking) and block.before in calls)]


GEMINI_BUDGETS = {"none": 0, "minimal": 512, "low": 1024, "medium": 8192}
NO_SIGNATURE = "skip_thought_signature_validator"  # for calls whose own is lost


FILE_NAME = re.compile(r"\S+\.\w{1,5}")  # says little, and has no place here


def title_part(block: Block) -> List[JSON]:
    """The title of a document that has no words of its own."""
    if not isinstance(block, Document) or block.text or FILE_NAME.fullmatch(block.title):
        return []
    return [{"text": block.title}] if block.title else []


def render_gemini_media(block: Image | Document | Audio) -> JSON:
    if isinstance(block, Audio):
        kind = {"mp3": "mpeg"}.get(block.format, block.format)
        return {"inlineData": {"mimeType": f"audio/{kind}", "data": block.data}}
    if isinstance(block, Document) and block.text:
        return {"text": titled_text(block)}
    if not block.url:
        return {"inlineData": {"mimeType": block.media_type, "data": block.data}}
    kind = block.media_type or guessed_type(block.url) or (
        "image/jpeg" if isinstance(block, Image) else "application/pdf")
    return {"fileData": {"mimeType": kind, "fileUri": block.url}}


def guessed_type(url: str) -> str:
    ending = url.partition("?")[0].rpartition(".")[2].lower()
    image = f"image/{'jpeg' if ending == 'jpg' else ending}"
    return image if image in IMAGE_TYPES else "application/pdf" if ending == "pdf" else ""


GEMINI_KEYWORDS = frozenset([
    "$id", "$defs", "$ref", "$anchor", "type", "format", "title", "description", "enum", "items",
    "prefixItems", "minItems", "maxItems", "minimum", "maximum", "anyOf", "oneOf", "properties",
    "additionalProperties", "required", "propertyOrdering"])


def gemini_schema(schema: Any) -> Any:
    """For `responseJsonSchema`, which refuses what it does not know."""
    if isinstance(schema, list):
        return [gemini_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    clean: JSON = {}
    told: JSON = {}
    for key, value in schema.items():
        if key == "const":
            clean["enum"] = [value]
        elif key in SCHEMA_MAPS and isinstance(value, dict):
            name = key.replace("definitions", "$defs")
            clean[name] = {**clean.get(name, {}), **{
                each: gemini_schema(item) for each, item in value.items()}}
        elif key == "$ref" and isinstance(value, str):
            clean[key] = value.replace("#/definitions/", "#/$defs/", 1)
        elif key in GEMINI_KEYWORDS:
            clean[key] = value if key in SCHEMA_VALUES else gemini_schema(value)
        elif not key.startswith("$") and not (key == "allOf" and only_one(value)):
            told[key] = value
    if only_one(schema.get("allOf")):
        take_in(clean, gemini_schema(schema["allOf"][0]), told)
    tell(clean, told)
    return clean


# ---- answers ----

GEMINI_FINISHES = {"MAX_TOKENS": "length", "CONTINUATION": "length", **dict.fromkeys((
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION", "PUP_LIMITED_DISABLED",
    "MODEL_ARMOR"), "filter")}
GEMINI_BROKEN = frozenset(["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
                           "MALFORMED_RESPONSE", "MISSING_THOUGHT_SIGNATURE"])
FINISHES_IN_GEMINI = {"length": "MAX_TOKENS", "context": "MAX_TOKENS", "filter": "SAFETY",
                      "refusal": "SAFETY"}


class TextPlace:
    """Where a text of Gemini's went: the block, and the characters of it that stand before."""

    def __init__(self, block: int, before: int, text: str) -> None:
        self.block, self._before, self._text = block, before, utf8(text)
        self._is_ascii = text.isascii()

    def of_byte(self, at: int) -> int:
        """The character of the block that begins there."""
        return self._before + (min(at, len(self._text)) if self._is_ascii else
                               len(self._text[:at].decode(errors="ignore")))


def is_said(part: JSON) -> bool:
    return part.get("thought") is not True and bool(text_of(part, "text"))


def halves(part: JSON) -> List[JSON]:
    """A text, and the signature that ends it."""
    if not is_said(part) or not part.get("thoughtSignature"):
        return [part]
    return [{**part, "thoughtSignature": ""},
            {"text": "", "thoughtSignature": part["thoughtSignature"]}]


class GeminiParser(Parser):
    """Each part comes whole; usage is cumulative; a stream ends when its connection does."""

    def __init__(self, dialect: GenerateContent, rewrites: Rewrites) -> None:
        super().__init__(dialect, rewrites)
        self._text_block = -1  # the last one's number
        self._text: List[str] = []
        self._put_off = b""  # the event with the last usage, unread

    text_events = TextEvents(
        rb'\{"candidates": ?\[\{"content": ?\{(?:"role": ?"model", ?)?"parts": ?\[\{"text": ?'
        + STRING + rb'\}\](?:, ?"role": ?"model")?\}(?:, ?"index": ?0)?\}\]'
        rb'(?:, ?"usageMetadata": ?\{[^{}\r\n]*(?:\{[^{}\r\n]*\}[^{}\r\n]*)*\})?' + FLAT + rb"\}")

    def before_run(self, run: TextRun, events: bytes) -> Events:
        self._text += run.pieces
        at = events.rfind(b'"usageMetadata"')
        if at >= 0:
            start, end = event_span(events, at)
            self._put_off = events[start:end]
        return []

    def settle(self) -> None:
        if self._put_off:
            told = parse_chunk(self._put_off).get("usageMetadata")
            self.usage, self._put_off = self._dialect.parse_usage(told), b""

    def read_event(self, data: bytes) -> Events:
        return self.read(self.parse(data))

    def end(self) -> Events:
        if not self._finish:
            return super().end()
        self.ended = True
        return self.finish()

    def read(self, wire: JSON) -> Events:
        if wire.get("error"):
            raise self._dialect.parse_error(wire["error"], 200)
        told = self._dialect.parse_usage(wire.get("usageMetadata"))
        self.usage, self._put_off = told or self.usage, b"" if told else self._put_off
        events: Events = []
        self._id = self._id or text_of(wire, "responseId") or self.rewrites.answer_id
        self._model = self._model or text_of(wire, "modelVersion")
        for candidate in list_of_objects(wire, "candidates")[:1]:
            events += self._read_candidate(candidate)
            self._finish = text_of(candidate, "finishReason") or self._finish
        if text_of(part_of(wire, "promptFeedback"), "blockReason"):
            self._finish = "SAFETY"
        return self._begun(events) if events else []

    def _begun(self, events: Events) -> Events:
        """The stream begins with the first word, so that an answer without one can be refused."""
        return [*self.start({"id": self._id, "model": self._model}), *events]

    def _read_candidate(self, candidate: JSON) -> Events:
        """What is told about a text is read before what ends it: a signature or a call."""
        grounding, events = part_of(candidate, "groundingMetadata"), []  # type: JSON, Events
        pieces = [(number, piece) for number, part in enumerate(
            list_of_objects(part_of(candidate, "content"), "parts")) for piece in halves(part)]
        # Where the whole answer is one chunk, citations name a part of it, else the text so far.
        names_parts = bool(grounding) and self._text_block < 0
        places: Dict[int, TextPlace] = {}
        block, at = -1, 0  # of the next text
        said = 1 + max([i for i, (_, piece) in enumerate(pieces) if is_said(piece)], default=-1)
        for number, piece in pieces[:said]:
            events += self._read_part(piece)
            if names_parts and is_said(piece):
                block, at = self._text_block, at if block == self._text_block else 0
                places[number] = TextPlace(block, at, piece["text"])
                at += len(piece["text"])
        self._logprobs += gemini_logprobs(part_of(candidate, "logprobsResult"))
        if part_of(candidate, "citationMetadata"):
            self.rewrites.lost.add("annotations")  # of what it recites
        events += self._read_grounding(grounding, places) if grounding else []
        return events + [event for _, piece in pieces[said:] for event in self._read_part(piece)]

    def _read_grounding(self, about: JSON, places: Mapping[int, TextPlace]) -> Events:
        """Its indexes count bytes of a part."""
        pages = [next((page for kind in ("web", "maps", "retrievedContext")
                       for page in [part_of(chunk, kind)] if text_of(page, "uri")), {})
                 for chunk in list_of_objects(about, "groundingChunks")]
        events: Events = []
        so_far = TextPlace(self._text_block, 0, "".join(self._text))
        for support in list_of_objects(about, "groundingSupports"):
            segment, indexes = part_of(support, "segment"), support.get("groundingChunkIndices")
            place = places.get(count(segment.get("partIndex")), so_far)
            start, end = (place.of_byte(count(segment.get(key)))
                          for key in ("startIndex", "endIndex"))
            for index in indexes if isinstance(indexes, list) else []:
                page = pages[index] if isinstance(index, int) and 0 <= index < len(pages) else {}
                if page and place.block >= 0:
                    events.append(CitationDelta(place.block, {
                        "url": text_of(page, "uri"), "title": text_of(page, "title"),
                        "start": start, "end": end}))
                else:
                    self.rewrites.lost.add("annotations")
        return events

    def _read_part(self, part: JSON) -> Events:
        call, text = part_of(part, "functionCall"), text_of(part, "text")
        signature = text_of(part, "thoughtSignature")
        if call:
            return self._read_call(call, signature)
        kind, events = (Thinking if part.get("thought") is True else Text), []  # type: Any, Events
        is_text = "text" in part or part.keys() <= GEMINI_MARKS
        if not is_text:
            self.rewrites.lost.add("parts")  # a picture, code that was run
        if text:
            if type(self._open) is not kind:
                events += self.open(kind())
                if kind is Text:
                    self._text_block, self._text = self._block_count - 1, []
            events += self.say(text)
            self._text += [text] if kind is Text else []
        if signature and is_text:
            if not isinstance(self._open, Thinking):
                events += self.open(Thinking())
            events += [SignatureDelta(signature, "gemini"), *self.close()]
        return events

    def _read_call(self, about: JSON, signature: str) -> Events:
        call = self.make_call(text_of(about, "id"), text_of(about, "name"))
        arguments, events = part_of(about, "args"), []  # type: JSON, Events
        if signature:  # which comes back in one of two ways
            call.signature, call.issuer = signature, "gemini"
            events = [*self.open(Thinking(before=call.id)), SignatureDelta(signature, "gemini")]
        events += self.open(call) + (self.say(encode_json(arguments)) if arguments else [])
        return events + self.close()

    def finish(self) -> Events:
        self.settle()
        has_said = self._calls or self._text_block >= 0
        if self._finish in GEMINI_BROKEN and not has_said:
            raise bad_answer(f"The provider gave no answer: {self._finish}.")
        if not self._finish and not self._block_count:
            raise bad_answer("The provider's answer has no candidates.")
        at_end = "tool_calls" if self._calls else "stop"
        return self._begun([]) + self.finished(GEMINI_FINISHES.get(self._finish, at_end))


def gemini_logprobs(result: JSON) -> List[JSON]:
    """As OpenAI tells them."""
    def told(candidate: JSON) -> JSON:
        token = text_of(candidate, "token")
        return {"token": token, "logprob": candidate.get("logProbability"),
                "bytes": list(utf8(token))}

    chosen = list_of_objects(result, "chosenCandidates")
    tops: List[JSON] = [*list_of_objects(result, "topCandidates"), *({} for _ in chosen)]
    return [{**told(each), "top_logprobs": list(map(told, list_of_objects(top, "candidates")))}
            for each, top in zip(chosen, tops)]


def gemini_head(id_: str, model: str) -> JSON:
    return {"modelVersion": model, "responseId": id_}


def gemini_chunk(parts: List[JSON], head: JSON, **more: object) -> JSON:
    return {"candidates": [{"content": {"role": "model", "parts": parts}, **more, "index": 0}],
            **head}


def with_joined_texts(blocks: Iterable[Block]) -> Iterator[Block]:
    """Texts in a row are one part: many clients take a citation's place for one in all they see."""
    seen = (block for block in blocks if not isinstance(block, Search))
    for is_text, group in itertools.groupby(seen, lambda block: isinstance(block, Text)):
        if is_text:
            yield joined_texts(blocks_of(group, Text))
        else:
            yield from group


def gemini_segment(citation: JSON, text: str, before: int = 0, part: int = 0) -> JSON:
    """Where this stands in a part whose first bytes, so many, stand before the text."""
    start, end = citation.get("start", 0), citation.get("end", len(text))
    first, said = before + len(utf8(text[:start])), text[start:end]
    return {**without_none(partIndex=part or None), "startIndex": first,
            "endIndex": first + len(utf8(said)), "text": said}


def gemini_more(cited: List[Tuple[JSON, JSON]], logprobs: List[JSON]) -> JSON:
    """What a candidate tells beside its parts; the citations with their segments."""
    def told(each: JSON) -> JSON:
        return {"token": each.get("token"), "logProbability": each.get("logprob")}

    pages: Dict[Tuple[str, str], int] = {}  # each told once
    supports = [{"segment": segment, "groundingChunkIndices": [
                    pages.setdefault((each["url"], each["title"]), len(pages))]}
                for each, segment in cited]
    chunks = [{"web": {"uri": url, "title": title}} for url, title in pages]
    tops = [{"candidates": list(map(told, list_of_objects(each, "top_logprobs")))}
            for each in logprobs]
    return without_none(
        groundingMetadata={"groundingChunks": chunks, "groundingSupports": supports} if cited
        else None,
        logprobsResult={"chosenCandidates": list(map(told, logprobs)), "topCandidates": tops}
        if logprobs else None)


def gemini_end(parts: List[JSON], finish: str, usage: Usage, more: JSON, has_said: bool,
               head: JSON) -> JSON:
    wire: JSON = {"promptFeedback": {"blockReason": "SAFETY"}, **head}
    reason = FINISHES_IN_GEMINI.get(finish, "STOP")
    if has_said or reason != "SAFETY":
        wire = gemini_chunk(parts or [{"text": ""}], head, finishReason=reason, **more)
    return {**wire, "usageMetadata": {
        "promptTokenCount": usage.input,
        "candidatesTokenCount": max(usage.output - usage.reasoning, 0),
        "totalTokenCount": usage.input + usage.output,
        **without_none(cachedContentTokenCount=usage.cache_read or None,
                       thoughtsTokenCount=usage.reasoning or None)}}


def answer_parts(blocks: Iterable[Block], shows_thinking: bool) -> Iterator[JSON]:
    """Of hidden thoughts only the signature goes out: with the next call, or in an empty text. A
    call whose arguments were cut off does not: its SDK would run it."""
    held = ""
    for block in blocks:
        if is_in_call(block):
            continue
        if isinstance(block, Thinking) and shows_thinking:
            yield {"text": block.text, "thought": True,
                   **without_none(thoughtSignature=gemini_signature(block))}
        elif isinstance(block, Thinking):
            if held:
                yield {"text": "", "thoughtSignature": held}
            held = gemini_signature(block)
        elif isinstance(block, ToolCall) and (block.is_custom or not block.input):
            call = {"id": block.id, "name": block.name, "args": call_arguments(block)}
            signature = block.signature or held
            yield {"functionCall": call, **without_none(thoughtSignature=signature)}
            held = held if block.signature else ""
        elif isinstance(block, Text):
            yield {"text": block.text}
    if held:
        yield {"text": "", "thoughtSignature": held}


def gemini_signature(block: Thinking) -> str:
    """With the text, since clients hang it on other parts."""
    if block.issuer == "gemini" or not block.signature:
        return block.signature
    return base64.b64encode(seal(block, "gemini", keeps_text=True).encode()).decode()


class GeminiRenderer(Renderer):
    def __init__(self, chat: Chat, created: int) -> None:
        super().__init__(chat, created)
        self._shows = chat.shows_thinking
        self._head: JSON = {}
        self._pieces: List[str] = []
        self._held: List[Block] = []  # thoughts whose signature was not told yet
        self._texts: List[str] = []  # of the blocks so far; "" of those that are none
        self._cited: List[CitationDelta] = []
        self._logprobs: List[JSON] = []
        self._has_spoken = False

    def _chunk(self, parts: List[JSON]) -> bytes:
        return sse(dump_json(gemini_chunk(parts, self._head)))

    def _start(self, event: Start) -> bytes:
        self._head = gemini_head(event.id, self._chat.model)
        return b""

    def _block_start(self, event: BlockStart) -> bytes:
        block = self._open = event.block.but()
        self._has_spoken = True
        self._pieces = []
        about = {"thought": True} if isinstance(block, Thinking) else {}
        self._template = say = DeltaTemplate(self._chunk([{"text": "\0", **about}]))
        self._say = self._keep
        if isinstance(block, Text) or isinstance(block, Thinking) and self._shows:
            self._say = lambda text: self._keep(text) + say(text)
        return b""

    def _keep(self, piece: str) -> bytes:
        self._pieces.append(piece)
        return b""

    def say_run(self, run: TextRun) -> bytes:
        self._pieces += run.pieces
        return self._template.around(run.strings)

    def _citation(self, event: CitationDelta) -> bytes:
        self._cited.append(event)  # told at the end, of the whole text
        return b""

    def _block_stop(self, event: BlockStop) -> bytes:
        """A call goes out whole."""
        block, said = self._open, "".join(self._pieces)
        self._logprobs += event.logprobs
        self._texts.append(said if isinstance(block, Text) else "")
        try:
            close_block(block, said)
        except GatewayError:
            return b""  # arguments that were cut off
        if isinstance(block, Text) or not block.signature and isinstance(block, Thinking) or (
                is_in_call(block)):
            return b""
        if isinstance(block, Thinking) and self._shows and block.issuer == "gemini":
            return self._chunk([{"text": "", "thought": True, "thoughtSignature": block.signature}])
        self._held.append(block)
        return b"" if isinstance(block, Thinking) else self._let_go()

    def _let_go(self) -> bytes:
        held, self._held = self._held, []
        return b"".join(self._chunk([part]) for part in answer_parts(held, shows_thinking=False))

    def _finish(self, event: Finish) -> bytes:
        ends = [0, *itertools.accumulate(len(utf8(text)) for text in self._texts)]
        cited = [(about, gemini_segment(about, self._texts[block], ends[block]))
                 for block, about in self._cited]
        more = gemini_more(cited, self._logprobs)
        return self._let_go() + sse(dump_json(gemini_end(
            [], event.finish, event.usage, more, self._has_spoken, self._head)))


class GeminiWatch(MarkedWatch):
    """Usage is on every chunk, cumulative: the last counts."""

    content_mark = b'"parts"'
    marks = (b'"error"', b'"finishReason"', b'"promptFeedback"')
    _is_complete = False

    def feed(self, block: bytes) -> bytes:
        passed = super().feed(block)
        at, usage = passed.rfind(b'"usageMetadata"'), None
        while at >= 0 and usage is None:
            chunk, start, _ = chunk_around(passed, at)
            usage = self._dialect.parse_usage(chunk.get("usageMetadata"))
            at = passed.rfind(b'"usageMetadata"', 0, start)
        self.usage = usage or self.usage
        return passed

    def look_at(self, wire: JSON) -> None:
        reasons = [text_of(each, "finishReason") for each in list_of_objects(wire, "candidates")]
        self._is_complete = self._is_complete or any(reasons) or "promptFeedback" in wire
        self.has_content = self.has_content or self._is_complete
        if wire.get("error"):
            self.failure = self._dialect.parse_error(wire["error"], 200)

    def end(self) -> bytes:
        self.ended = self._is_complete
        return super().end()

    def said_in(self, wire: JSON) -> List[Any]:
        return [text_of(part, "text") for each in list_of_objects(wire, "candidates")
                for part in list_of_objects(part_of(each, "content"), "parts")]


class Ends(NamedTuple):
    """Of one dialect: how it is written to a provider and read from it, written to a client, and
    watched where it passes."""

    writer: Callable[[Chat, Target, Losses], RequestWriter]
    parser: Callable[[Any, Rewrites], Parser]
    renderer: Callable[[Chat, int], Renderer]
    watch: Callable[..., Watch]


ENDS = {
    "chat": Ends(ChatRequest, ChatParser, ChatRenderer, ChatWatch),
    "responses": Ends(ResponsesRequest, ResponsesParser, ResponsesRenderer, ResponsesWatch),
    "messages": Ends(MessagesRequest, MessagesParser, MessagesRenderer, MessagesWatch),
    "gemini": Ends(GeminiRequest, GeminiParser, GeminiRenderer, GeminiWatch)}
DIALECTS: Dict[str, Dialect] = {dialect.name: dialect for dialect in (
    ChatCompletions(), Responses(), Messages(), GenerateContent())}


# ==============================
# 5. Providers
#
# What is known of each kind of upstream. A new provider that speaks a known dialect is a config
# entry, or a row here.
# ==============================


class Kind(NamedTuple):
    base_url: str | None  # None: the config must give it
    version: str  # the path segment that a base_url may leave out
    paths: Mapping[str, str]  # below base_url: its dialect's, then those of which only bytes pass
    auth: Tuple[str, str]  # the header that carries the key, and how
    needs_key: bool = True
    headers: Tuple[Tuple[str, str], ...] = ()  # where a client sends none of that name
    has_list_prices: bool = True  # else its models cost what the config says
    caps: Caps = Caps()  # of models of no known family
    drop: Tuple[str, ...] = ()  # fields of the body that it refuses
    rename: Tuple[Tuple[str, str], ...] = ()
    # What gives away another vendor's answer in a conversation, and the fields that go.
    foreign: Tuple[Tuple[bytes, ...], FrozenSet[str]] = (MARKS, FOREIGN_FIELDS)
    has_developer: bool = True  # as a role, beside system
    keeps: Tuple[str, ...] = ()  # what it keeps for its clients: endpoints that name no model
    whole_list: str = ""  # the query that puts its list of models on one page


BEARER = ("authorization", "Bearer {}")
# With our key these choose whose account is charged, which is the config's to say.
WHO_PAYS = frozenset(["openai-organization", "openai-project"])
RESPONSES = {"responses": "/responses", **{path: path for path in (
    "/responses/compact", "/responses/input_tokens")}}
CHAT = {"chat": "/chat/completions", **{path: path for path in (
    "/completions", "/embeddings", "/moderations", "/rerank", "/images/generations",
    "/images/edits", "/images/variations", "/audio/speech", "/audio/transcriptions",
    "/audio/translations")}}
AZURE_CHAT = {name: f"/openai/deployments/{{model}}{path}?api-version=2024-10-21"
         for name, path in CHAT.items()}
MESSAGES = {"messages": "/messages", "/messages/count_tokens": "/messages/count_tokens"}
GEMINI = {"gemini": "/models/{model}:generateContent",
          "gemini stream": "/models/{model}:streamGenerateContent?alt=sse",
          **{name: f"/models/{{model}}{name}" for name in (
              ":countTokens", ":embedContent", ":batchEmbedContents")}}
DEPLOYMENTS = "/openai/deployments/"  # so do Azure's clients ask, with the model's name behind it
AZURE = ("/openai/responses", "/openai/models")  # and so for these, with a version in the query
# The newer 2026-10-21 answers 400 to sampling parameters and to documents of the assistant's.
ANTHROPIC_VERSION = ("anthropic-version", "2023-06-01")

ALL_EFFORTS = ("low", "medium", "high", "xhigh", "max")
GPT_EFFORTS = ("none", "low", "medium", "high")
OPENAI_CAPS = Caps(
    mid_system=True, max_tokens_field="max_completion_tokens", custom_tools=True)

ALL_FOREIGN = ((*MARKS, REASONING.encode()), FOREIGN_FIELDS | {REASONING})

LOCAL = Kind(None, "", CHAT, BEARER, needs_key=False, has_list_prices=False)


def like_openai(base_url: str, version: str = "/v1", **known: Any) -> Kind:
    return Kind(base_url, version, CHAT, BEARER, **known)


OLD_FIELD = (("max_completion_tokens", "max_tokens"),)

KINDS: Dict[str, Kind] = {
    "openai": Kind("https://api.openai.com/v1", "/v1", {**RESPONSES, **CHAT}, BEARER,
                   caps=OPENAI_CAPS, foreign=ALL_FOREIGN,
                   keeps=("/files", "/batches", "/responses")),
    "azure": Kind(None, "", AZURE_CHAT, ("api-key", "{}"), caps=OPENAI_CAPS, foreign=ALL_FOREIGN),
    "openai-compatible": LOCAL,
    "anthropic": Kind("https://api.anthropic.com/v1", "/v1", MESSAGES, ("x-api-key", "{}"),
                      headers=(ANTHROPIC_VERSION,), whole_list="?limit=1000",
                      caps=Caps("none", "adaptive", efforts=ALL_EFFORTS, mid_system=True)),
    "gemini": Kind("https://generativelanguage.googleapis.com/v1beta", "/v1beta", GEMINI,
                   ("x-goog-api-key", "{}"), whole_list="?pageSize=1000",
                   caps=Caps(thinking="level", efforts=GPT_EFFORTS[1:], max_stops=5)),
    # docs.mistral.ai/api: what it does not know is a 422, stream_options too
    # (github.com/openai/openai-agents-python/issues/442), and its streams tell their usage unasked.
    # Its roles are system, user, assistant and tool, its ids of calls nine letters and digits.
    "mistral": like_openai("https://api.mistral.ai/v1", has_developer=False,
                           rename=(*OLD_FIELD, ("seed", "random_seed")),
                           caps=Caps(short_ids=True), drop=(
                               "stream_options", "user", "store", "logit_bias", "verbosity",
                               "safety_identifier", "prompt_cache_retention",
                               "prompt_cache_options", "moderation")),
    # console.groq.com/docs/openai: logprobs, logit_bias and top_logprobs are a 400.
    "groq": like_openai("https://api.groq.com/openai/v1",
                        drop=("logprobs", "logit_bias", "top_logprobs")),
    # api-docs.deepseek.com: `max_tokens` is the only name of it, developer no role
    # (github.com/eclipse-theia/theia/issues/15144), and reasoning_content has to come back.
    "deepseek": like_openai("https://api.deepseek.com/v1", rename=OLD_FIELD, has_developer=False,
                            caps=Caps(needs_thoughts=True)),
    "xai": like_openai("https://api.x.ai/v1"),  # docs.x.ai/docs/api-reference
    "openrouter": like_openai("https://openrouter.ai/api/v1"),  # openrouter.ai/docs/api-reference
    "together": like_openai("https://api.together.xyz/v1", rename=OLD_FIELD),  # docs.together.ai
    "fireworks": like_openai("https://api.fireworks.ai/inference/v1"),  # docs.fireworks.ai
    # inference-docs.cerebras.ai/resources/openai: these are a 400.
    "cerebras": like_openai("https://api.cerebras.ai/v1", drop=(
        "frequency_penalty", "logit_bias", "presence_penalty", "parallel_tool_calls",
        "service_tier")),
    # docs.perplexity.ai: it has no tools of its clients', and no version in its address.
    "perplexity": like_openai("https://api.perplexity.ai", "", rename=OLD_FIELD, drop=(
        "tools", "tool_choice", "parallel_tool_calls", "stream_options")),
    # docs.api.nvidia.com
    "nvidia": like_openai("https://integrate.api.nvidia.com/v1", rename=OLD_FIELD),
    "huggingface": like_openai("https://router.huggingface.co/v1", rename=OLD_FIELD),
    "sambanova": like_openai("https://api.sambanova.ai/v1"),  # docs.sambanova.ai
    # docs.cohere.com/docs/compatibility-api lists what it takes.
    "cohere": like_openai("https://api.cohere.ai/compatibility/v1", rename=OLD_FIELD, drop=(
        "parallel_tool_calls", "logit_bias", "top_logprobs", "n", "store", "metadata")),
    # They take what they are given, but for the newer name; one of them ignores top_k.
    **{name: LOCAL._replace(base_url=f"http://127.0.0.1:{port}/v1", version="/v1", rename=OLD_FIELD,
                            caps=Caps(max_stops=64, top_k=name != "ollama"))
       for name, port in (("ollama", 11434), ("vllm", 8000), ("lmstudio", 1234),
                          ("llamacpp", 8080))},
}

# What the models of a family take, from a version on; later rows override earlier ones. Versions
# are read off the provider's name for a model; one without is taken as the newest of its family.
FAMILIES = tuple(map(re.compile, (
    r"claude-(?:(?P<first>\d+)-(?:(?P<then>\d)-)?)?(?P<family>%s)" % FAMILY.pattern +
    r"(?:-(?P<major>\d+))?(?:-(?P<minor>\d{1,2}))?(?!\d)",
    r"(?P<family>gpt)-(?P<major>3(?=5)|\d+)(?:\.?(?P<minor>\d+))?",
    r"(?P<family>gpt)-(?!oss|image|realtime|audio)[a-z]",
    r"(?:^|/)(?P<family>o3-mini)",
    r"(?:^|/)(?P<family>o)(?P<major>\d)",
    r"gemini-(?P<major>\d+)(?:\.(?P<minor>\d+))?-(?P<family>pro)",
    r"(?P<family>gemini)(?:-(?P<major>\d+)(?:\.(?P<minor>\d+))?)?")))
ANY = tuple(FAMILY.pattern.split("|"))
MODEL_CAPS: Tuple[Tuple[Tuple[str, ...], float, JSON], ...] = (
    (ANY, 0, {"sampling": "both", "thinking": "none", "efforts": (), "mid_system": False,
              "json_schema": False, "max_output": 8192}),
    (ANY, 3.7, {"thinking": "budget", "max_output": 64_000}),
    (("opus",), 4, {"max_output": 32_000}),
    (("opus",), 4.1, {"sampling": "one"}),
    (ANY, 4.5, {"sampling": "one", "json_schema": True, "max_output": 64_000}),
    (("opus",), 4.5, {"efforts": ("low", "medium", "high")}),
    (ANY, 4.6, {"thinking": "both", "efforts": ("low", "medium", "high", "max"),
                "max_output": 128_000}),
    (("opus",), 4.7, {"sampling": "none", "thinking": "adaptive", "efforts": ALL_EFFORTS}),
    (("opus",), 4.8, {"mid_system": True}),
    (ANY, 5, {"sampling": "none", "thinking": "adaptive", "efforts": ALL_EFFORTS,
              "mid_system": True}),
    (("opus", "sonnet"), 5, {"can_disable_thinking": True}),
    (("opus", "sonnet"), 5.5, {"can_disable_thinking": False, "forced_tools": "refused"}),
    (("haiku",), 5.5, {"can_disable_thinking": True}),
    (("fable", "mythos"), 5.1, {"forced_tools": "refused"}),
    (("gpt", "o", "o3-mini"), 0, {"max_tokens_field": "max_completion_tokens"}),
    (("o", "o3-mini"), 1, {"sampling": "none", "thinking": "effort", "efforts": GPT_EFFORTS[1:],
                 "default_effort": "medium"}),
    (("o",), 3, {"max_stops": 0}),
    (("gpt",), 5, {"sampling": "none", "thinking": "effort", "default_effort": "medium",
                   "efforts": ("minimal", *GPT_EFFORTS[1:])}),
    (("gpt",), 5.1, {"sampling": "idle", "efforts": GPT_EFFORTS, "default_effort": "none"}),
    (("gpt",), 5.2, {"efforts": (*GPT_EFFORTS, "xhigh")}),
    (("gpt",), 5.4, {"chat_tools": "idle"}),
    (("gpt",), 5.5, {"default_effort": "medium"}),
    (("gpt",), 6, {"efforts": (*GPT_EFFORTS, "xhigh", "max")}),
    (("gemini", "pro"), 0, {"thinking": "none", "efforts": (), "max_stops": 5}),
    (("gemini", "pro"), 2.5, {"thinking": "budget"}),
    (("gemini",), 2.5, {"can_disable_thinking": True}),
    (("gemini", "pro"), 3, {"thinking": "level", "can_disable_thinking": False,
                            "efforts": GPT_EFFORTS[1:]}),
    (("gemini",), 3, {"efforts": ("minimal", *GPT_EFFORTS[1:])}),
    (("gemini",), 3.7, {"efforts": GPT_EFFORTS[1:]}),
)


def find_caps(kind: Kind, model: str) -> Caps:
    found = next(filter(None, (pattern.search(model) for pattern in FAMILIES)), None)
    if not found:
        return kind.caps
    about = found.groupdict()
    major = about.get("first") or about.get("major")
    minor = about.get("then") or about.get("minor") or 0
    version = float(f"{major}.{minor}") if major and len(major) < 3 else 99.0
    caps = kind.caps
    for families, since, changes in MODEL_CAPS:
        if about["family"] in families and version >= since:
            caps = dataclasses.replace(caps, **changes)
    return caps


# ==============================
# 6. Config
#
# The file is JSON with comment lines. It is read into frozen dataclasses whose fields say how to
# read them and what they default to, so that parsing, errors and defaults are one table; what each
# is for stands in config.example.yaml.json. Every problem is collected and all are told at once.
# ==============================

MIN_KEY_CHARACTERS = 16
MIN_SECRET_CHARACTERS = 8  # of a provider's key, to be masked
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # and surrogates, which have no UTF-8
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
VARIABLE = re.compile(rf"\$\$(?=[{{A-Za-z_])|\$\{{([^}}]*)(\}}|$)|\$({VARIABLE_NAME.pattern})")
COMMENT_LINE = re.compile(r"^[ \t]*(#|//).*$", re.MULTILINE)


class Problems:
    """The errors and warnings of one config file, each with its path."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.errors: List[str] = []
        self.warnings: List[str] = []

    def error(self, path: str, message: str) -> None:
        self.errors.append(
            f"{self.where}: {path}: {message}" if path else f"{self.where}: {message}")

    def has_error(self, path: str) -> bool:
        """Of it, or of an item in it."""
        place = f"{self.where}: {path}"
        return any(error.startswith((f"{place}: ", f"{place}[")) for error in self.errors)

    def warn(self, path: str, message: str) -> None:
        self.warnings.append(f"warning: {self.where}: {path}: {message}")


Read = Callable[[Any, str, Problems], Any]


def kind_of(value: object) -> str:
    return TYPE_NAMES.get(type(value), "null")


def shown(value: object) -> str:
    return repr(value) if is_number(value) else kind_of(value)


class Broken(str):
    """Stands for a value that has an error already, so that no second one is told of it."""


class Expanded(str):
    """What came out of a variable: perhaps a secret, even where none belongs."""


class Fault(str):
    """Stands for a value that JSON cannot hold, and says why; told where its path is known."""


def has_type(kind: type, value: object, path: str, problems: Problems) -> bool:
    if not isinstance(value, (kind, Broken)):
        problems.error(path, f"must be {TYPE_NAMES[kind]}, not {shown(value)}")
    return isinstance(value, kind)


def scalar(expected: str, accepts: Callable[[Any], bool],
           convert: Callable[[Any], Any] = lambda value: value) -> Read:
    def read(value: Any, path: str, problems: Problems) -> Any:
        if isinstance(value, Broken):
            return value
        if accepts(value):
            return convert(value)
        what = shown(value)
        if "string" in expected:  # perhaps a secret
            what = "this one" if isinstance(value, str) else kind_of(value)
        problems.error(path, f"must be {expected}, not {what}")
        return Broken("?")
    return read


def is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # type: ignore[arg-type]


def is_clean(value: object) -> bool:
    return isinstance(value, str) and not CONTROL.search(value)


TEXT = scalar(
    "a non-empty string without control characters", lambda value: value != "" and is_clean(value))
OPTIONAL_TEXT = scalar("a string without control characters", is_clean)
HEADER_TEXT = scalar("a string of ASCII without control characters",
                     lambda value: is_clean(value) and value.isascii())
FLAG = scalar("true or false", lambda value: isinstance(value, bool))
SIZE = scalar("a whole number above 0", lambda value: count(value) > 0, count)
COUNT = scalar("a whole number, 0 or more",
               lambda value: is_number(value) and value >= 0 and value % 1 == 0, int)
SECONDS = scalar("a number of seconds above 0", lambda value: is_number(value) and value > 0, float)
OPTIONAL_SECONDS = scalar(
    "a number of seconds, 0 for none", lambda value: is_number(value) and value >= 0, float)
PRICE = scalar("a number of dollars per million tokens, 0 or more",
               lambda value: is_number(value) and 0 <= value < 10**6)


def one_of(*names: str) -> Read:
    return scalar(
        "one of " + ", ".join(f'"{name}"' for name in names), lambda value: value in names)


def list_of(read_item: Read) -> Read:
    def read(value: Any, path: str, problems: Problems) -> Any:
        if not has_type(list, value, path, problems):
            return ()
        items = [read_item(item, f"{path}[{i}]", problems) for i, item in enumerate(value)]
        return tuple(item for item in items if item is not None)
    return read


def map_of(read_item: Read) -> Read:
    def read(value: Any, path: str, problems: Problems) -> Any:
        if not has_type(dict, value, path, problems):
            return {}
        for name in value:
            if not name or not is_clean(name):
                problems.error(path, "a name in it is empty or has control characters")
        return {name: read_item(item, f"{path}.{name}", problems) for name, item in value.items()}
    return read


def read_headers(value: Any, path: str, problems: Problems) -> Any:
    fields = map_of(HEADER_TEXT)(value, path, problems)
    for name in fields:
        if not TOKEN.fullmatch(name):
            problems.error(path, f"{name!r} is not a header name")
        if name.lower() in ("connection", "content-length", "te", "transfer-encoding", "upgrade"):
            problems.error(path, f"{name!r} is the connection's own")
    return tuple((name.lower(), text) for name, text in fields.items())


def read_json_object(value: Any, path: str, problems: Problems) -> Any:
    return value if has_type(dict, value, path, problems) else None


PLAIN_KEY = re.compile("[A-Za-z_]{1,32}")


def check_keys_known(value: JSON, known: Iterable[str], path: str, problems: Problems) -> None:
    for key in value:
        if key in known:
            continue
        near = suggest(key, known)
        is_shown = near or PLAIN_KEY.fullmatch(key)  # else it is perhaps a secret
        hint = near or "; known: " + ", ".join(known)
        problems.error(join(path, key) if is_shown else path, "unknown key" + hint)


def suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def some_of(readers: Mapping[str, Read]) -> Read:
    """An object with some of these keys; what is left out is left to others."""
    def read(value: Any, path: str, problems: Problems) -> Any:
        if not has_type(dict, value, path, problems):
            return {}
        check_keys_known(value, readers, path, problems)
        return {name: readers[name](item, join(path, name), problems)
                for name, item in value.items() if name in readers and item is not None}
    return read


def table_of(shape: Type[Any]) -> Read:
    fields = {f.name: f.metadata for f in dataclasses.fields(shape) if f.metadata}
    read_some = some_of({name: about["read"] for name, about in fields.items()})

    def read(value: Any, path: str, problems: Problems) -> Any:
        got = read_some(value, path, problems)
        if not isinstance(value, dict):
            return None
        for name, about in fields.items():
            if about["required"] and value.get(name) is None:
                problems.error(join(path, name), "is missing")
        return shape(**{name: item for name, item in got.items() if item is not None})
    return read


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def setting(read: Read, default: Any = None, *, required: bool = False,
            secret: bool = False) -> Any:
    return field(default_factory=lambda: default, repr=not secret,
                 metadata={"read": read, "required": required})


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, but for two counts and the seconds of `grace`."""

    head: int = setting(SIZE, 64 << 10)
    fields: int = setting(SIZE, 100)
    target: int = setting(SIZE, 8 << 10)
    body: int = setting(SIZE, 32 << 20)
    bodies: int = setting(SIZE, 256 << 20)
    connections: int = setting(SIZE, 20_000)
    upload: int = setting(SIZE, 512 << 20)
    event: int = setting(SIZE, 16 << 20)
    events: int = setting(SIZE, 256 << 20)
    answer: int = setting(SIZE, 64 << 20)
    grace: float = setting(OPTIONAL_SECONDS, 30.0)


@dataclass(frozen=True)
class Timeouts:
    """Deadlines in seconds: four towards providers, four towards clients."""

    connect: float = setting(SECONDS, 10.0)
    first_token: float = setting(SECONDS, 600.0)
    idle: float = setting(SECONDS, 300.0)
    total: float = setting(OPTIONAL_SECONDS, 0.0)  # 0: 600 for a plain answer, none for a stream
    head: float = setting(SECONDS, 10.0)
    body: float = setting(SECONDS, 30.0)
    keep_alive: float = setting(SECONDS, 75.0)
    write: float = setting(SECONDS, 60.0)


@dataclass(frozen=True)
class Tuning:
    """What may be said of a provider and, over it, of an alias."""

    timeouts: JSON = setting(some_of({
        "connect": SECONDS, "first_token": SECONDS, "idle": SECONDS,
        "total": OPTIONAL_SECONDS}), {})
    default_max_tokens: int | None = setting(SIZE)
    max_output_tokens: int | None = setting(SIZE)
    caps: JSON = setting(some_of({
        "sampling": one_of("both", "one", "none", "idle"),
        "thinking": one_of("budget", "both", "adaptive", "effort", "level", "none"),
        "can_disable_thinking": FLAG, "efforts": list_of(one_of(*EFFORTS)),
        "default_effort": one_of(*EFFORTS), "forced_tools": one_of("yes", "refused", "auto"),
        "mid_system": FLAG, "json_schema": FLAG, "max_output": SIZE,
        "max_tokens_field": one_of("max_tokens", "max_completion_tokens"), "custom_tools": FLAG,
        "chat_tools": one_of("yes", "idle"), "max_stops": COUNT, "top_k": FLAG,
        "short_ids": FLAG, "needs_thoughts": FLAG}), {})
    wire: str | None = setting(one_of("chat", "responses"))
    set: JSON = setting(read_json_object, {})
    drop: Tuple[str, ...] = setting(list_of(TEXT), ())
    rename: Dict[str, str] = setting(map_of(TEXT), {})


class Origin(NamedTuple):
    """Where connections to a provider lead."""

    is_tls: bool
    host: str
    port: int


@dataclass(frozen=True)
class Provider(Tuning):
    api_key: str = setting(HEADER_TEXT, "", secret=True)
    base_url: str = setting(HEADER_TEXT, "")
    kind: str = setting(one_of(*KINDS), "")
    headers: Tuple[Tuple[str, str], ...] = setting(read_headers, (), secret=True)
    done: bool = setting(FLAG, True)
    responses: bool = setting(FLAG, False)
    list_models: bool = setting(FLAG, False)
    forward_auth: bool = setting(FLAG, False)
    name: str = ""
    deadlines: Timeouts = Timeouts()

    @functools.cached_property
    def origin(self) -> Origin:
        parts = urllib.parse.urlsplit(self.base_url)
        is_tls = parts.scheme == "https"
        return Origin(is_tls, parts.hostname or "", parts.port or (443 if is_tls else 80))

    @property
    def row(self) -> Kind:
        return KINDS[self.kind]

    @functools.cached_property
    def secrets(self) -> Tuple[str, ...]:
        """What no client may see; what is short is a word of any text, as a local server's key."""
        keys = [self.api_key] if len(self.api_key) >= MIN_SECRET_CHARACTERS else []
        return (*keys, *(value for _, value in self.headers if len(value) >= MIN_KEY_CHARACTERS))

    @functools.cached_property
    def paths(self) -> Mapping[str, str]:
        return {**self.row.paths, **RESPONSES} if self.responses else self.row.paths

    @functools.cached_property
    def wires(self) -> List[Dialect]:
        return [DIALECTS[name] for name in self.paths if name in DIALECTS]

    @property
    def is_on(self) -> bool:
        return bool(self.api_key) or not self.row.needs_key or self.forward_auth


@dataclass(frozen=True)
class Alias(Tuning):
    """A model's name of the house's own, and what it stands for."""

    provider: str = setting(TEXT, required=True)
    model: str = setting(TEXT)
    cost_per_million_input: float | None = setting(PRICE)
    cost_per_million_output: float | None = setting(PRICE)
    cost_per_million_cache_read: float | None = setting(PRICE)
    cost_per_million_cache_write: float | None = setting(PRICE)
    strict: bool = setting(FLAG, False)


@dataclass(frozen=True)
class Rule:
    """Where a model goes that is no alias: the first rule that fits decides."""

    provider: str = setting(TEXT, required=True)
    prefix: str | None = setting(TEXT)
    match: str | None = setting(TEXT)
    default: bool = setting(FLAG, False)

    def fits(self, model: str) -> bool:
        return (self.default or self.prefix is not None and model.startswith(self.prefix)
                or self.match is not None and fnmatch.fnmatchcase(model, self.match))


def is_date(value: object) -> bool:
    found = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value) if isinstance(value, str) else None
    year, month, day = map(int, found.groups()) if found else (0, 0, 0)
    return (year >= 1970 and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1])


@dataclass(frozen=True)
class ApiKey:
    """A virtual key and the app that holds it."""

    key: str = setting(TEXT, required=True, secret=True)
    app: str = setting(TEXT, required=True)
    allowed_models: Tuple[str, ...] = setting(list_of(TEXT), ("*",))
    allowed_endpoints: Tuple[str, ...] | None = setting(list_of(TEXT))
    strict: bool = setting(FLAG, False)
    disabled: bool = setting(FLAG, False)
    expires: str = setting(scalar('a day as "2027-01-31"', is_date), "")


@dataclass(frozen=True)
class Config:
    listen: str = setting(TEXT, ":8080")
    providers: Dict[str, Provider] = setting(map_of(table_of(Provider)), {}, required=True)
    models: Dict[str, Alias] = setting(map_of(table_of(Alias)), {})
    routing: Tuple[Rule, ...] = setting(list_of(table_of(Rule)), ())
    api_keys: Tuple[ApiKey, ...] = setting(list_of(table_of(ApiKey)), (), required=True)
    endpoints: Dict[str, str] = setting(map_of(TEXT), {})
    limits: Limits = setting(table_of(Limits), Limits())
    timeouts: Timeouts = setting(table_of(Timeouts), Timeouts())
    log: str = setting(one_of("text", "json"), "text")
    log_headers: Tuple[str, ...] = setting(list_of(TEXT), ())
    log_probes: bool = setting(FLAG, False)
    sse_keepalive: float = setting(OPTIONAL_SECONDS, 15.0)
    prices: str = setting(OPTIONAL_TEXT, "")
    warnings: Tuple[str, ...] = ()


def expand(tree: Any, env: Mapping[str, str], read_file: Callable[[str], str], path: str,
           problems: Problems) -> Any:
    """The tree with ${VAR}, ${VAR:-default} and ${file:PATH} replaced in its strings.

    Values are expanded after parsing, never in the text, so that none can break out of its string.
    """
    if isinstance(tree, dict):
        return {key: expand(value, env, read_file, join(path, key), problems)
                for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand(value, env, read_file, f"{path}[{i}]", problems)
                for i, value in enumerate(tree)]
    if isinstance(tree, Fault):
        problems.error(path, tree)
        return Broken("?")
    if not isinstance(tree, str) or "$" not in tree:
        return tree
    told = len(problems.errors)

    def value_of(found: re.Match[str]) -> str:
        try:
            return variable_value(found, env, read_file)
        except ValueError as error:
            problems.error(path, str(error))
            return ""

    text = VARIABLE.sub(value_of, tree)
    return Broken("?") if len(problems.errors) > told else Expanded(text)


def variable_value(
        found: re.Match[str], env: Mapping[str, str], read_file: Callable[[str], str]) -> str:
    """What stands in a variable's place; raises ValueError that says how to mend it."""
    braced, end, bare = found.groups()
    if bare:
        raise ValueError("write ${NAME} for an environment variable, or $$ for a $ of the text's")
    if braced is None:
        return "$"
    if not end:
        raise ValueError("'${' is not closed by '}'; write $${ for the text itself")
    if braced.startswith("file:"):
        try:
            return read_file(braced[5:]).rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "it is not UTF-8")
            raise ValueError(f"cannot read {braced[5:]}: {reason}") from error
    name, has_default, default = braced.partition(":-")
    if not VARIABLE_NAME.fullmatch(name):
        raise ValueError("what stands in ${} is no variable's name; write ${NAME} or "
                         "${NAME:-default}")
    if "$" in default:
        raise ValueError(f"the default of {name} cannot hold another variable")
    if env.get(name) or (name in env and not has_default):
        return env[name]
    if not has_default:
        raise ValueError(f"environment variable {name} is not set; set it, or write ${{{name}:-}} "
                         "if it may be empty")
    return default


def parse_config(
        text: str, where: str, env: Mapping[str, str], read_file: Callable[[str], str]) -> Config:
    """A config file's text, checked as a whole; raises ConfigError with every problem."""
    problems = Problems(where)
    config: Config | None = None
    try:
        tree = expand(parse_config_json(text, where), env, read_file, "", problems)
        config = table_of(Config)(tree, "", problems)
        if config is not None:
            config = settle(config, problems)
    except RecursionError:
        problems.error("", "nested too deeply")
    except ValueError as error:
        problems.error("", str(error))
    if problems.errors or config is None:
        raise ConfigError("", "\n".join(problems.errors + problems.warnings))
    return dataclasses.replace(config, warnings=tuple(problems.warnings))


YAML_HINT = ("this looks like YAML, and the config is JSON; convert it once: "
             "yq -o=json {0} > {1}   (or: python3 -c 'import json, sys, yaml; "
             "json.dump(yaml.safe_load(sys.stdin), sys.stdout, indent=2)' < {0} > {1})")


def parse_config_json(text: str, where: str) -> Any:
    """The JSON tree, its comment lines left blank so that line numbers stay right. Raises
    ValueError or RecursionError."""
    def unique(pairs: List[Tuple[str, Any]]) -> JSON:
        tree: JSON = {}
        for name, value in pairs:
            tree[name] = Fault("this key stands twice in its object") if name in tree else value
        return tree

    def short_int(digits: str) -> Any:
        return int(digits) if len(digits) < 20 else Fault("this number is too long")

    plain = COMMENT_LINE.sub("", text)
    if not plain.strip():
        raise ValueError("is empty; config.example.yaml.json shows what may stand in it")
    try:
        return json.loads(plain, object_pairs_hook=unique, parse_int=short_int,
                          parse_constant=lambda name: Fault(f"{name} is not JSON"))
    except json.JSONDecodeError as error:
        if not plain.lstrip().startswith(("{", "[", "\ufeff")) and ":" in plain:
            new = "new.json" if where == "config.json" else "config.json"
            raise ValueError(YAML_HINT.format(where, new)) from error
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error


def settle(config: Config, problems: Problems) -> Config:
    try:
        if not isinstance(config.listen, Broken):
            parse_listen(config.listen)
    except ValueError as error:
        problems.error("listen", str(error))
    settled = [settle_provider(name, provider, config.timeouts, problems)
               for name, provider in config.providers.items() if provider is not None]
    providers = {provider.name: provider for provider in settled if provider is not None}
    models = {alias: model for alias, model in config.models.items() if model is not None}
    for alias, model in models.items():
        check_provider(model.provider, config, f"models.{alias}.provider", problems.error)
        if model.provider in providers:
            check_wire(f"models.{alias}", model.wire, providers[model.provider], problems)
    for i, rule in enumerate(config.routing):
        check_provider(rule.provider, config, f"routing[{i}].provider", problems.warn)
        if [rule.prefix is not None, rule.match is not None, rule.default].count(True) != 1:
            problems.error(f"routing[{i}]", 'needs one of "prefix", "match" and "default": true')
    for prefix, name in config.endpoints.items():
        check_provider(name, config, f"endpoints.{prefix}", problems.error)
        if not prefix.startswith("/"):
            problems.error(f"endpoints.{prefix}", 'must be a path, which begins with "/"')
    for i, entry in enumerate(config.api_keys):
        for glob in entry.allowed_endpoints or ():
            if not isinstance(glob, Broken) and not glob.startswith(("/", "*", "[", "?")):
                problems.error(f"api_keys[{i}].allowed_endpoints",
                               'each must be a glob of paths, which begin with "/"')
    check_keys(config.api_keys, problems)
    sizes = (config.limits.bodies, config.limits.body)
    if not any(isinstance(size, Broken) for size in sizes) and sizes[0] < sizes[1]:
        problems.warn("limits.bodies", "is below limits.body: no body of that size is ever read")
    for i, name in enumerate(config.log_headers):
        if not isinstance(name, Broken) and (
                not TOKEN.fullmatch(name) or name.lower() in SECRET_HEADERS | LOG_FIELDS):
            problems.error(f"log_headers[{i}]", "is no header name, or one that carries secrets or "
                                                "is the log's own")
    return dataclasses.replace(config, providers=providers, models=models)


def check_provider(
        name: str | None, config: Config, path: str, tell: Callable[[str, str], None]) -> None:
    if name is not None and not isinstance(name, Broken) and name not in config.providers:
        named = "" if isinstance(name, Expanded) else f" {name!r}"
        tell(path, f"no provider{named} is configured" + suggest(name, config.providers))


LOG_FIELDS = frozenset([
    "time", "level", "msg", "request_id", "method", "path", "status", "duration_ms", "virtual_key",
    "provider", "model", "stream", "prompt_tokens", "completion_tokens", "cache_read_tokens",
    "cache_write_tokens", "reasoning_tokens", "cost", "usage", "bytes_in", "bytes_out", "ttft_ms",
    "upstream_request_id", "error"])
KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
SECRET_HEADERS = frozenset(["authorization", "proxy-authorization", "cookie", "x-gateway-key",
                            *KEY_HEADERS])


def settle_provider(
        name: str, provider: Provider, timeouts: Timeouts, problems: Problems) -> Provider | None:
    path, kind = f"providers.{name}", provider.kind or name
    if isinstance(kind, Broken):
        return None
    row = KINDS.get(kind)
    if not TOKEN.fullmatch(name):
        problems.error(path, "a provider's name is made of letters, digits and -_.")
    if row is None:
        problems.error(f"{path}.kind", f"is missing, and {name!r} is no known kind; set it, and "
                                       "give base_url (known: " + ", ".join(KINDS) + ")")
        return None
    base_url = provider.base_url or row.base_url
    if base_url is None:
        problems.error(f"{path}.base_url", f"is missing; kind {kind!r} has no address of its own")
        return None
    try:
        if not isinstance(base_url, Broken):
            base_url = settle_base_url(base_url, row.version)
    except ValueError as error:
        problems.error(f"{path}.base_url", str(error))
    settled = dataclasses.replace(provider, name=name, kind=kind, base_url=base_url,
                                  deadlines=dataclasses.replace(timeouts, **provider.timeouts))
    check_wire(path, provider.wire, settled, problems)
    if not settled.is_on:
        problems.warn(f"{path}.api_key", "is absent or empty: the provider is off, its models "
                                         "are not listed and answer 404")
    return settled


def check_wire(path: str, wire: str | None, provider: Provider, problems: Problems) -> None:
    if wire is not None and not isinstance(wire, Broken) and wire not in provider.paths:
        problems.error(f"{path}.wire", f"is not spoken by provider {provider.name!r}" + (
            ', unless it has "responses": true' if wire in RESPONSES else ""))


def settle_base_url(url: str, version: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:  # whose words quote it
        raise ValueError("has a host or a port that is none") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError('must start with "http://" or "https://" and name a host')
    if parts.username or parts.password or parts.query or parts.fragment or " " in url:
        raise ValueError("must be free of user names, queries, fragments and spaces")
    path = parts.path.rstrip("/")
    if version and not re.search(r"/v\d+[a-z0-9]*(/|$)", path):
        path += version
    return f"{parts.scheme}://{parts.netloc}{path}"


def check_keys(keys: Sequence[ApiKey], problems: Problems) -> None:
    first: Dict[str, int] = {}
    for i, entry in enumerate(keys):
        key, path = entry.key, f"api_keys[{i}].key"
        if key is None or isinstance(key, Broken):
            continue
        if len(key) < MIN_KEY_CHARACTERS:
            problems.error(path, f"is shorter than {MIN_KEY_CHARACTERS} characters")
        if not key.isascii() or " " in key:
            problems.error(path, "must be ASCII without spaces, for a header")
        if key in first:
            problems.error(path, f"is the key of api_keys[{first[key]}] too")
        first.setdefault(key, i)
    if not keys and not problems.has_error("api_keys"):
        problems.warn("api_keys", "is empty: nobody may call")


class Address(NamedTuple):
    """Where to listen: a path for a unix socket, else a host ("" for all) and a port."""

    path: str
    host: str
    port: int

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(listen: str) -> Address:
    """":8080", "host:port", "[::1]:8080" or "unix:/run/gw.sock"; raises ValueError."""
    if listen.startswith("unix:"):
        if not listen[5:]:
            raise ValueError('needs a path after "unix:"')
        return Address(listen[5:], "", 0)
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]]*)):(\d{1,5})", listen)
    if not found or int(found[3]) > 65535:
        raise ValueError('must be ":8080", "host:port", "[::1]:8080" or "unix:/path"')
    return Address("", found[1] or found[2] or "", int(found[3]))


# ==============================
# 7. Policy
#
# Who may call, where a model's name leads, what a reply costs. Time comes in as an argument.
# ==============================


@dataclass(frozen=True)
class App:
    """A virtual key's holder, as a request meets it. The key itself is not kept."""

    name: str
    allowed: FrozenSet[str]
    globs: Tuple[re.Pattern[str], ...]
    is_strict: bool
    expires: float  # unix seconds; inf for never, 0 where the key is disabled
    endpoints: Tuple[re.Pattern[str], ...] | None = None  # None: all but what shows others' things

    def may_use(self, model: str) -> bool:
        return (model in self.allowed or "*" in self.allowed or len(model) <= MAX_MODEL_CHARACTERS
                and any(glob.match(model) for glob in self.globs))

    def check_may_use(self, model: str) -> None:
        if not self.may_use(model):
            raise GatewayError(
                403, "This API key may not use the requested model.", "model", "model_not_allowed")

    def check_may_call(self, paths: Iterable[str], is_shared: bool) -> None:
        """By one of the path's spellings. `is_shared`: one key of the provider's shows what all
        apps left there."""
        may_call = not is_shared if self.endpoints is None else any(
            glob.match(path) for glob in self.endpoints for path in paths)
        if not may_call:
            raise GatewayError(403, "This API key may not use this endpoint (allowed_endpoints).",
                               code="endpoint_not_allowed")


MAX_MODEL_CHARACTERS = 512  # of a name that the config does not hold: patterns are tried on it


def digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()


class Keyring:
    """The virtual keys, by digest: one look-up whatever the key, so that none can be guessed by
    timing; wrong, disabled and expired keys answer alike."""

    def __init__(self, keys: Iterable[ApiKey], parse_day: Callable[[str], float]) -> None:
        self._apps = {digest(entry.key): make_app(entry, parse_day) for entry in keys}

    def knows(self, key: str) -> bool:
        return digest(key) in self._apps

    def authenticate(self, presented: Sequence[bytes], now: float) -> App:
        """The app of the first digest that is a key's; `now` in unix seconds. Raises 401."""
        for key in presented:
            app = self._apps.get(key)
            if app is not None and now < app.expires:
                return app
        message = ("The API key is not valid." if presented else
                   "An API key is missing: send it as 'Authorization: Bearer KEY'.")
        raise GatewayError(
            401, message, code="invalid_api_key", headers=[("www-authenticate", "Bearer")])


def make_app(entry: ApiKey, parse_day: Callable[[str], float]) -> App:
    globs = [name for name in entry.allowed_models if re.search(r"[*?[]", name)]
    expires = parse_day(entry.expires) + 86400 if entry.expires else float("inf")
    return App(entry.app, frozenset(entry.allowed_models),
               compiled(globs), entry.strict, 0 if entry.disabled else expires,
               None if entry.allowed_endpoints is None else compiled(entry.allowed_endpoints))


def compiled(globs: Iterable[str]) -> Tuple[re.Pattern[str], ...]:
    return tuple(re.compile(fnmatch.translate(glob)) for glob in globs)


def presented_keys(headers: Mapping[str, str], query: str) -> List[str]:
    """Every key that a request carries; x-gateway-key, where sent, is the only one judged."""
    if "x-gateway-key" in headers:
        return [headers["x-gateway-key"]]
    if "key=" in query:
        told = urllib.parse.parse_qs(query).get("key", [""])
        headers = {"x-goog-api-key": told[0], **headers}
    found = [headers[name] for name in KEY_HEADERS if headers.get(name)]
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if token and scheme.lower() == "bearer":
        found.insert(0, token.strip())
    return found


@dataclass(frozen=True)
class Price:
    """What a model's tokens cost, in integer nano-dollars per million tokens: $0.15 is 150_000_000.

    None: there is no such price. The cache then costs what `input` does, an hour of it what
    `cache_write` does; 0 is a price.
    """

    input: int
    output: int
    cache_read: int | None = None
    cache_write: int | None = None
    cache_write_1h: int | None = None
    tiers: Tuple[Tuple[int, Price], ...] = ()  # (tokens, price), ascending; each price is whole

    def at(self, prompt_tokens: int) -> Price:
        """The price of a request whose whole prompt, cached parts included, has so many tokens."""
        price = self
        for above, tier in self.tiers:
            if prompt_tokens > above:
                price = tier
        return price


def cost(price: Price, usage: Usage) -> int:
    price = price.at(usage.input)
    written = price.input if price.cache_write is None else price.cache_write
    written_1h = written if price.cache_write_1h is None else price.cache_write_1h
    read = price.input if price.cache_read is None else price.cache_read
    plain = max(usage.input - usage.cache_read - usage.cache_write, 0)
    short_lived = max(usage.cache_write - usage.cache_write_1h, 0)
    total = (plain * price.input + usage.cache_read * read + short_lived * written
             + usage.cache_write_1h * written_1h + usage.output * price.output)
    return (total + 500_000) // 1_000_000


NANO_DOLLARS = 10**9
PRICE_FIELDS = ("input", "output", "cache_read", "cache_write", "cache_write_1h")


def nano_dollars(dollars: float | Decimal | str) -> int:
    return int(Decimal(str(dollars)) * NANO_DOLLARS)


@dataclass(frozen=True)
class Route:
    """Where a request goes. `model` is the provider's name for it, `alias` its bounded name in
    metrics, or None where a rule found it and the upstream has yet to know it."""

    provider: Provider
    model: str
    alias: str | None
    price: Price | None
    deadlines: Timeouts
    target: Target
    edits: Edits
    is_strict: bool = False
    wire: str | None = None  # the dialect that the provider is to be asked in, where one is told


class Edits(NamedTuple):
    """What the config changes in a provider's body. Names may be dotted paths."""

    set: JSON
    drop: Tuple[str, ...]
    rename: Dict[str, str]

    def apply(self, body: JSON, losses: Losses, ours: Container[str] = ()) -> None:
        """What is dropped is lost, but for `ours`, which no client asked for."""
        for path in self.drop:
            value = take_path(body, path)
            if value is not None and path not in ours:
                lose(losses, path, value)
        for path, name in self.rename.items():
            value = take_path(body, path)
            if value is not None:
                put_path(body, name, value)
        for path, value in self.set.items():
            put_path(body, path, copy.deepcopy(value))

    def of_passed(self, body: Body, values: JSON, losses: Losses) -> Tuple[JSON, Set[str]]:
        """The same for a passed body that `values` go into: all top-level values to put in place,
        and the keys to leave out."""
        paths = (*self.drop, *self.rename, *self.rename.values(), *self.set)
        tops = {path.split(".")[0] for path in paths}
        before = {key: value for key, value in {**body.tree(), **values}.items() if key in tops}
        after = copy.deepcopy(before)
        self.apply(after, losses)
        changed = {key: value for key, value in after.items() if value != before.get(key)}
        gone = before.keys() - after.keys()
        kept = {key: value for key, value in values.items() if key not in gone}
        return {**kept, **changed}, gone


def take_path(body: JSON, path: str) -> Any:
    *outer, last = path.split(".")
    for key in outer:
        body = part_of(body, key)
    return body.pop(last, None)


def put_path(body: JSON, path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for key in outer:
        if not isinstance(body.get(key), dict):
            body[key] = {}
        body = body[key]
    body[last] = value


def make_edits(provider: Provider, alias: Alias) -> Edits:
    row = provider.row
    return Edits({**provider.set, **alias.set}, row.drop + provider.drop + alias.drop,
                 {**dict(row.rename), **provider.rename, **alias.rename})


def make_target(provider: Provider, model: str, alias: Alias) -> Target:
    caps = {**provider.caps, **alias.caps}
    return Target(model, dataclasses.replace(find_caps(provider.row, model), **caps),
                  alias.default_max_tokens or provider.default_max_tokens or 8192,
                  alias.max_output_tokens or provider.max_output_tokens)


NO_ALIAS = Alias(provider="")


class Router:
    def __init__(self, config: Config, find_price: Callable[[Provider, str], Price | None]) -> None:
        self._find_price = find_price
        self._providers = {name: p for name, p in config.providers.items() if p.is_on}
        self._aliases = {name: self._route(alias.provider, alias.model or name, name, alias)
                         for name, alias in config.models.items()
                         if alias.provider in self._providers}
        self._off = set(config.models).difference(self._aliases)
        self._configured = set(config.providers)
        self._rules = [rule for rule in config.routing if rule.provider in self._configured]

    def _route(self, provider_name: str, model: str, name: str | None = None,
               alias: Alias = NO_ALIAS) -> Route:
        provider = self._providers[provider_name]
        price, deadlines = self._find_price(provider, model), provider.deadlines
        if alias is not NO_ALIAS:
            price = override_price(price, alias)
            deadlines = dataclasses.replace(deadlines, **alias.timeouts)
        return Route(provider, model, name, price, deadlines, make_target(provider, model, alias),
                     make_edits(provider, alias), alias.strict, alias.wire or provider.wire)

    def resolve(self, model: str) -> Route:
        if model in self._aliases:
            return self._aliases[model]
        name, _, rest = model.partition("/")
        if model in self._off or len(model) > MAX_MODEL_CHARACTERS:
            name = ""
        elif not rest or name not in self._configured:
            fits = (rule.provider for rule in self._rules if rule.fits(model))
            name, rest = next(fits, ""), model
        if name in self._providers:  # one that is off hands its models to nobody else
            return self._route(name, rest)
        raise GatewayError(
            404, f"The model {clipped(model)!r} does not exist.", "model", "model_not_found")

    def route_to(self, provider: str) -> Route:
        """For what names no model. Raises 404 where the provider is off."""
        if provider not in self._providers:
            raise no_keeper()
        return self._route(provider, "", "")

    def find_keeper(self, path: str, endpoints: Mapping[str, str]) -> Tuple[Provider, str]:
        """The provider that a path without a model goes to, and the path there. Raises 404."""
        _, first, *_ = path.split("/", 2)
        if first in self._providers:
            return self._providers[first], path[len(first) + 1:]
        named = longest_prefix(path, endpoints)
        have = [endpoints[named]] if named else [
            name for name, provider in self._providers.items()
            if path[len("/v1"):].startswith(provider.row.keeps)]
        have = have or [name for name, provider in self._providers.items()
                        if path.startswith("/v1/responses/") and provider.responses]
        if len(have) != 1 or have[0] not in self._providers:
            raise no_keeper()
        return self._providers[have[0]], path

    def is_provider(self, name: str) -> bool:
        return name in self._providers

    def listing(self) -> List[Provider]:
        return [provider for provider in self._providers.values() if provider.list_models]

    def aliases(self, app: App) -> List[Tuple[str, str]]:
        return [(name, route.provider.name) for name, route in self._aliases.items()
                if app.may_use(name)]


def no_keeper() -> GatewayError:
    return GatewayError(404, "Which provider this path goes to is not configured: name it under "
                             "'endpoints', or write /PROVIDER before the path.", code="not_found")


def longest_prefix(path: str, prefixes: Iterable[str]) -> str:
    """Of whole segments; "" where none fits."""
    return max((prefix for prefix in prefixes
                if path == prefix or path.startswith(prefix.rstrip("/") + "/")),
               key=len, default="")


def override_price(price: Price | None, alias: Alias) -> Price | None:
    said = {name: getattr(alias, f"cost_per_million_{name}") for name in PRICE_FIELDS[:4]}
    own: Dict[str, Any] = {
        name: nano_dollars(value) for name, value in said.items() if value is not None}
    if not own:
        return price

    def overridden(base: Price) -> Price:
        if "input" in own:  # a cache price of the list's would not belong to it
            base = Price(base.input, base.output, tiers=base.tiers)
        return dataclasses.replace(base, **own)

    base = overridden(price or Price(0, 0))
    is_flat = own.keys() >= {"input", "output"}
    return dataclasses.replace(base, tiers=() if is_flat else tuple(
        (above, overridden(tier)) for above, tier in base.tiers))


PLAIN_MODEL = re.compile(r"[!-~]{1,128}")


class ModelNames:
    """Bounds the `model` label: an alias is its own; another name counts as itself once an
    upstream has answered 200 to it and while fewer than `cap` have, else as "other"."""

    def __init__(self, cap: int = 100) -> None:
        self._cap = cap
        self._known: Set[str] = set()

    def label(self, route: Route, answered: bool) -> str:
        if route.alias is not None:
            return route.alias
        if answered and len(self._known) < self._cap and PLAIN_MODEL.fullmatch(route.model):
            self._known.add(route.model)
        return route.model if route.model in self._known else "other"


class Budget:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> bool:
        if self.held + size > self.limit:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        self.held -= size


# ==============================
# 8. Metrics
#
# Counters are integers and exact; money is nano-dollars until it is rendered. A Meter per app and
# route binds label values once, so that recording a request is a few additions.
# ==============================

Labels = Tuple[str, ...]
DURATION_BUCKETS = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OVERHEAD_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0)


class Counter:
    """A family of counters; `scale` divides its integers when they are shown."""

    type = "counter"

    def __init__(self, name: str, about: str, labels: Labels = (), scale: int = 1) -> None:
        self.name, self.about, self.labels, self.scale = name, about, labels, scale
        self.values: Dict[Labels, int] = {} if labels else {(): 0}

    def add(self, labels: Labels, amount: int = 1) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def samples(self) -> Iterator[Tuple[str, Labels, Labels, str]]:
        for values, number in self.values.items():
            yield "", (), values, show_scaled(number, self.scale)


class Gauge(Counter):
    type = "gauge"

    def set(self, labels: Labels, value: int) -> None:
        self.values[labels] = value


class Histogram:
    """A family of histograms over fixed buckets, in seconds."""

    type = "histogram"

    def __init__(self, name: str, about: str, labels: Labels, buckets: Tuple[float, ...]) -> None:
        self.name, self.about, self.labels, self.buckets = name, about, labels, buckets
        self.values: Dict[Labels, List[float]] = {}  # a count a bucket, one above, then the sum

    def observe(self, labels: Labels, seconds: float) -> None:
        cell = self.values.get(labels)
        if cell is None:
            cell = self.values[labels] = [0] * (len(self.buckets) + 1) + [0.0]
        cell[bisect.bisect_left(self.buckets, seconds)] += 1
        cell[-1] += seconds

    def samples(self) -> Iterator[Tuple[str, Labels, Labels, str]]:
        bounds = [repr(bound) for bound in self.buckets] + ["+Inf"]
        for values, cell in self.values.items():
            total = 0
            for bound, number in zip(bounds, cell):
                total += int(number)
                yield "_bucket", ("le",), (*values, bound), str(total)
            yield "_sum", (), values, repr(round(cell[-1], 9))
            yield "_count", (), values, str(total)


Family = Union[Counter, Gauge, Histogram]


def show_scaled(number: int, scale: int) -> str:
    if scale == 1:
        return str(number)
    digits = len(str(scale)) - 1
    whole, part = divmod(number, scale)
    return f"{whole}.{part:0{digits}d}".rstrip("0").rstrip(".")


ROUTE_LABELS = ("virtual_key", "provider", "model")


class Metrics:
    def __init__(self) -> None:
        route, model = ROUTE_LABELS, ROUTE_LABELS[1:]
        self.requests = Counter(
            "llm_requests_total", "Requests by their final status.", (*route, "status"))
        self.durations = Histogram(
            "llm_request_duration_seconds", "From a request's head to the end of its answer.",
            (*route, "stream"), DURATION_BUCKETS)
        self.tokens = Counter(
            "llm_tokens_total", "Tokens by direction: prompt and completion.",
            (*route, "direction"))
        self.token_details = Counter(
            "llm_token_details_total", "Parts of the tokens: cache_read, cache_write, reasoning.",
            (*route, "kind"))
        self.first_byte = Histogram(
            "llm_stream_first_byte_seconds", "From a request's head to its stream's first content.",
            route, DURATION_BUCKETS)
        self.provider_errors = Counter(
            "llm_provider_errors_total", f"Failures of providers: {', '.join(PROVIDER_ERRORS)}.",
            ("provider", "error_type"))
        self.cost = Counter(
            "llm_cost_dollars_total", "Dollars, by the prices of the config or the built-in list.",
            route, scale=NANO_DOLLARS)
        self.estimated = Counter(
            "llm_usage_estimated_total", "Requests whose tokens were estimated.", model)
        self.unpriced = Counter(
            "llm_unpriced_tokens_total", "Tokens of models without a price.", model)
        self.dropped = Counter(
            "llm_params_dropped_total", "Parts of requests that a provider's wire cannot say.",
            ("param", "provider"))
        self.overhead = Histogram(
            "llm_overhead_seconds", "The gateway's own part of the time to an answer's head.", (),
            OVERHEAD_BUCKETS)
        self.in_flight = Gauge("llm_requests_in_flight", "Requests being answered.")
        self.lost_lines = Counter(
            "llm_log_lines_lost_total", "Log lines that could not be written.")
        self.build_info = Gauge("llm_build_info", "The gateway's version.", ("version", "python"))

    def families(self) -> List[Family]:
        return list(vars(self).values())


class Record:
    """What is known of an exchange at its end. Class attributes are its defaults: to set each one
    costs more than to count it."""

    status = 0
    is_stream = False
    duration = 0.0  # seconds
    overhead = 0.0  # seconds of it that were the gateway's own, up to the answer's head
    ttft: float | None = None  # seconds to a stream's first content
    usage: Usage | None = None
    usage_from = "reported"  # where there is any, or "estimated"
    cost: int | None = None  # nano-dollars
    provider_error = ""  # one of PROVIDER_ERRORS


class Meter:
    def __init__(self, metrics: Metrics, app: str, provider: str, model: str) -> None:
        self._metrics = metrics
        self._route = route = (app, provider, model)
        self._prompt, self._completion = (*route, "prompt"), (*route, "completion")
        self._plain, self._stream = (*route, "false"), (*route, "true")
        self.log_fields = list(zip(ROUTE_LABELS, route))
        self.log_text = render_log(self.log_fields)

    def record(self, record: Record) -> None:
        metrics, route = self._metrics, self._route
        metrics.requests.add((*route, str(record.status)))
        metrics.durations.observe(
            self._stream if record.is_stream else self._plain, record.duration)
        metrics.overhead.observe((), record.overhead)
        if record.ttft is not None:
            metrics.first_byte.observe(route, record.ttft)
        if record.provider_error:
            metrics.provider_errors.add((route[1], record.provider_error))
        usage = record.usage
        if usage is None:
            return
        metrics.tokens.add(self._prompt, usage.input)
        metrics.tokens.add(self._completion, usage.output)
        if usage.cache_read or usage.cache_write or usage.reasoning:
            for kind in ("cache_read", "cache_write", "reasoning"):
                metrics.token_details.add((*route, kind), getattr(usage, kind))
        if record.cost is not None:
            metrics.cost.add(route, record.cost)
        else:
            metrics.unpriced.add(route[1:], usage.input + usage.output)
        if record.usage_from == "estimated":
            metrics.estimated.add(route[1:])


def escape_label(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def render_metrics(families: Iterable[Family], openmetrics: bool) -> str:
    lines = []
    for family in families:
        name = family.name
        if openmetrics and family.type == "counter":
            name = name.removesuffix("_total")
        lines += [f"# HELP {name} {family.about}", f"# TYPE {name} {family.type}"]
        for suffix, extra, values, number in family.samples():
            labels = ",".join(f'{label}="{escape_label(value)}"'
                              for label, value in zip((*family.labels, *extra), values))
            braces = f"{{{labels}}}" if labels else ""
            lines.append(f"{family.name}{suffix}{braces} {number}")
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


# ------------------------------
# Log lines. A value can hold anything a client sends, so it is quoted unless it is plain, and
# nothing in it can end the line or forge another.
# ------------------------------

PLAIN_LOG_VALUE = re.compile(r"[A-Za-z0-9_./:@%+,\-]{1,256}")
MAX_LOG_VALUE, SHORT_LOG_VALUE = 256, 40


def quote_log(value: str) -> str:
    if PLAIN_LOG_VALUE.fullmatch(value):
        return value
    return json.dumps(log_value(value)).replace("\x7f", "\\u007f")


def render_log(fields: Iterable[Tuple[str, object]]) -> str:
    return "".join([f" {key}={quote_log(str(value))}" for key, value in fields])


def render_json_log(fields: Iterable[Tuple[str, object]]) -> str:
    return json.dumps({key: log_value(value) if isinstance(value, str) else value
                       for key, value in fields})


def log_value(value: str) -> str:
    """What a line holds of it: its escapes may take twelve bytes a character."""
    if len(value) <= SHORT_LOG_VALUE:
        return value
    value = clipped(value, MAX_LOG_VALUE)
    return value if len(json.dumps(value)) <= 2 * MAX_LOG_VALUE else clipped(value, SHORT_LOG_VALUE)


# ==============================
# 9. HTTP
#
# HTTP/1.1 (RFC 9112) as bytes in and bytes out. Strict where smuggling lives: a regex judges each
# line of a head as a whole.
# ==============================

MAX_CHUNK_LINE_BYTES = 4096
MAX_CHUNK_WASTE_BYTES = 16 << 10  # extensions and trailers of one body
MAX_INFLATE_RATIO = 200
INFLATE_STEP_BYTES = 64 << 10
FREE_INFLATED_BYTES = 1 << 20  # below it any ratio will do: short JSON repeats itself

FIELD = re.compile(rf"{TOKEN.pattern}:[\t\x20-\x7e\x80-\xff]*")
REQUEST_LINE = re.compile(rf"({TOKEN.pattern}) ([\x21-\x7e]+) HTTP/1\.([01])")
STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
TRAILERS = re.compile(rb"(?:%b\r\n)*\r\n" % FIELD.pattern.encode("latin-1"))
HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+;=:\[\]%-]*")
ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*(.*)")
DIGITS = re.compile(r"[0-9]{1,15}")
PLAIN_CHUNK_LINE = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,6})\r\n")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")

# RFC 9110, section 7.6.1: these speak of one connection only.
HOP_BY_HOP = frozenset(["connection", "keep-alive", "proxy-authenticate", "proxy-authorization",
                        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"])


@dataclass(eq=False)
class RequestHead:
    """A request's head. Clients say the same again and again: HeadParser remembers it, and what
    follows from it is worked out once. `length` is its body's, None where the body is chunked; a
    head that is remembered tells none."""

    method: str
    path: str  # percent-decoded, without the query
    query: str
    is_http10: bool
    headers: Headers
    length: int | None
    _passing: Dict[FrozenSet[str], str] = field(default_factory=dict, init=False)

    @functools.cached_property
    def keeps_alive(self) -> bool:
        options = self.headers.get("connection", "").lower()
        return "keep-alive" in options if self.is_http10 else "close" not in options

    @functools.cached_property
    def keys(self) -> Tuple[bytes, ...]:
        """The digests of all that may be a virtual key."""
        return tuple(map(digest, presented_keys(self.headers, self.query)))

    def passing_fields(self, dropped: FrozenSet[str]) -> str:
        """The lines that go on to a provider."""
        lines = self._passing.get(dropped)
        if lines is None:
            lines = self._passing[dropped] = passing_fields(self.headers, dropped)
        return lines


def parse_field(line: str) -> Tuple[str, str]:
    if not FIELD.fullmatch(line):
        raise ValueError("a field is malformed")
    name, _, value = line.partition(":")
    return name.lower(), value.strip(" \t")


ParseField = Callable[[str], Tuple[str, str]]


def known_fields() -> ParseField:
    """A `parse_field` that remembers: most fields of a head were in the one before it."""
    return functools.lru_cache(maxsize=1024)(parse_field)


MAX_KNOWN_BYTES = 2048  # of a head whose fields are worth remembering


def parse_fields(head: bytes, known: ParseField) -> Tuple[str, List[Tuple[str, str]]]:
    """A head's first line and its fields. Raises ValueError."""
    if not head.endswith(b"\r\n\r\n"):
        raise ValueError("its blank line is missing")
    start, *lines = head[:-4].decode("latin-1").split("\r\n")
    return start, list(map(known if len(head) <= MAX_KNOWN_BYTES else parse_field, lines))


def joined(fields: List[Tuple[str, str]]) -> Headers:
    headers = dict(fields)
    if len(headers) < len(fields):
        headers = {}
        for name, value in fields:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def parse_head(head: bytes, max_target: int, max_fields: int,
               known: ParseField = parse_field) -> RequestHead:
    """A request's head with its blank line. Raises GatewayError 400, 414 or 431."""
    try:
        start, fields = parse_fields(head, known)
        method, target, minor = REQUEST_LINE.fullmatch(start).groups()  # type: ignore[union-attr]
    except (ValueError, AttributeError):
        raise GatewayError(400, "The request's head is malformed.") from None
    if len(target) > max_target:
        raise GatewayError(414, f"The request's target is longer than {max_target} bytes.")
    if len(fields) > max_fields:
        raise GatewayError(431, f"The request has more than {max_fields} header fields.")
    headers = joined(fields)
    is_http10 = minor == "0"
    if not HOST.fullmatch(headers.get("host", "" if is_http10 else ",")):
        raise GatewayError(400, "The request needs exactly one Host.")
    path, _, query = (target if target[0] == "/" else origin_form(target)).partition("?")
    return RequestHead(method, urllib.parse.unquote(path) if "%" in path else path, query,
                       is_http10, headers, request_length(headers, is_http10))


LENGTH_LINE = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,15})(?=\r\n)")
KNOWN_HEADS = 256


class HeadParser:
    """Parses requests' heads, and remembers them without the one line that differs each time."""

    def __init__(self, max_target: int, max_fields: int) -> None:
        self._bounds = max_target, max_fields
        self._parse = functools.partial(parse_head, known=known_fields())
        self._recall = functools.lru_cache(maxsize=KNOWN_HEADS)(self._parse)

    def parse(self, head: bytes) -> Tuple[RequestHead, int | None]:
        """And its body's length, None for chunked. Raises as `parse_head` does."""
        max_target, max_fields = self._bounds
        told = LENGTH_LINE.search(head)
        if told and len(head) <= MAX_KNOWN_BYTES and head.endswith(b"\r\n\r\n"):
            rest = head[:told.start()] + head[told.end():]
            try:
                known = self._recall(rest, max_target, max_fields - 1)
                if known.length == 0 and "content-length" not in known.headers:  # told once
                    return known, int(told[1])
            except GatewayError:
                pass  # its words are to be of the whole head
        parsed = self._parse(head, max_target, max_fields)
        return parsed, parsed.length


def origin_form(target: str) -> str:
    found = ABSOLUTE_FORM.fullmatch(target)
    if not found and target != "*":
        raise GatewayError(400, "The request's target is malformed.")
    return "/" + found[1].lstrip("/") if found else target


def request_length(headers: Headers, is_http10: bool) -> int | None:
    """The body's length, None for chunked; whatever two servers might read differently is 400."""
    length = headers.get("content-length")
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked" or length is not None or is_http10:
            raise GatewayError(400, "The request's Transfer-Encoding must be 'chunked', alone.")
        return None
    if length is None:
        return 0
    if not DIGITS.fullmatch(length):
        raise GatewayError(400, "The request's Content-Length is not one number.")
    return int(length)


class AnswerHead(NamedTuple):
    status: int
    is_http10: bool
    headers: Headers
    fields: List[Tuple[str, str]]  # one by one


def parse_answer_head(head: bytes, known: ParseField = parse_field) -> AnswerHead:
    """Raises GatewayError(502)."""
    try:
        start, fields = parse_fields(head, known)
        minor, status = STATUS_LINE.fullmatch(start).groups()  # type: ignore[union-attr]
    except (ValueError, AttributeError) as error:
        raise bad_answer("The provider's answer is not HTTP.") from error
    return AnswerHead(int(status), minor == "0", joined(fields), fields)


class Framing:
    """Where a body ends. `feed` takes what came and returns what belongs to the body; `done` says
    that it is whole, `rest` then holds what came after it. `end` is for EOF. Both raise ValueError
    where the body is malformed or cut."""

    done = False
    rest = b""

    def feed(self, data: bytes) -> bytes:
        raise NotImplementedError

    def end(self) -> None:
        raise ValueError("it was cut")


class LengthFraming(Framing):
    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        if len(data) > self.left:
            data, self.rest = data[:self.left], data[self.left:]
        self.left -= len(data)
        self.done = self.left == 0
        return data


class CloseFraming(Framing):
    """A body that ends with its connection: whether it is whole, only its content can tell."""

    def feed(self, data: bytes) -> bytes:
        return data

    def end(self) -> None:
        self.done = True


class ChunkedFraming(Framing):
    """RFC 9112, section 7.1. Extensions are skipped, trailers checked and dropped."""

    def __init__(self) -> None:
        self._kept = b""  # a line that is still arriving
        self._left = 0  # bytes of the open chunk, its CRLF included
        self._in_trailers = False
        self._waste = 0

    def feed(self, data: bytes) -> bytes:
        data, at = self._kept + data if self._kept else data, 0
        self._kept = b""
        pieces: List[bytes] = []
        while at < len(data) and not self.done:
            if self._left:
                end = at + self._left
                pieces.append(self._take(data[at:end]))
                at = end
            elif self._in_trailers:
                at = self._end_trailers(data, at)
            elif data.startswith(LAST_CHUNK, at):
                at, self.done = at + len(LAST_CHUNK), True
            else:
                start, at = at, self._take_whole(data, at, pieces)
                at = at if at > start else self._open_chunk(data, at)
        self.rest = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_whole(self, data: bytes, at: int, pieces: List[bytes]) -> int:
        """The chunks that are plain and here to their ends, as nearly always."""
        found = PLAIN_CHUNK_LINE.match(data, at)
        while found:
            start = found.end()
            end = start + int(found[1], 16)
            if not data.startswith(b"\r\n", end):
                break
            pieces.append(data[start:end])
            at = end + 2
            found = PLAIN_CHUNK_LINE.match(data, at)
        return at

    def _take(self, piece: bytes) -> bytes:
        """Of a chunk that is still arriving, or whose end is no CRLF."""
        before = self._left
        self._left -= len(piece)
        data = piece[:max(before - 2, 0)]
        if not b"\r\n"[2 - min(before, 2):].startswith(piece[len(data):]):
            raise ValueError("a chunk is longer than it says")
        return data

    def _open_chunk(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if end < 0 or end - at > MAX_CHUNK_LINE_BYTES:
            return self._keep(data, at, MAX_CHUNK_LINE_BYTES)
        found = CHUNK_LINE.fullmatch(data, at, end)
        size = int(found[1], 16) if found else 1 << 31
        if size >= 1 << 31:
            raise ValueError("a chunk's size is malformed")
        self._waste += max(end - at - 16, 0)
        if self._waste > MAX_CHUNK_WASTE_BYTES:
            raise ValueError("its chunk extensions are endless")
        self._left = size + 2 if size else 0
        self._in_trailers = size == 0
        return end + 2

    def _end_trailers(self, data: bytes, at: int) -> int:
        end = at if data.startswith(b"\r\n", at) else data.find(b"\r\n\r\n", at) + 2
        if end == 1 or end - at > MAX_CHUNK_WASTE_BYTES:  # 1 is not found: -1 + 2
            return self._keep(data, at, MAX_CHUNK_WASTE_BYTES)
        if not TRAILERS.fullmatch(data, at, end + 2):
            raise ValueError("its trailers are malformed")
        self.done = True
        return end + 2

    def _keep(self, data: bytes, at: int, limit: int) -> int:
        self._kept = data[at:]
        if len(self._kept) > limit:
            raise ValueError("a chunk's size line or its trailers are endless")
        return len(data)


def answer_framing(head: AnswerHead) -> Framing:
    """RFC 9112, section 6.3; two lengths or a bad one are a ValueError."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if head.status in (204, 304):
        return LengthFraming(0)
    if coding is not None:
        if coding.lower() != "chunked" or length is not None or head.is_http10:
            raise ValueError("its framing is ambiguous")
        return ChunkedFraming()
    if length is None:
        return CloseFraming()
    if not DIGITS.fullmatch(length):
        raise ValueError("its length is malformed")
    return LengthFraming(int(length))


class TooLarge(ValueError):
    """Decoded, a body outgrows its bound."""


MAX_MEMBERS = 1000  # each costs a copy of what follows it


class Inflater:
    """Decodes one content coding piece by piece; raises ValueError for bad data, and TooLarge for
    bombs: more than `limit` bytes, or a ratio that no text has."""

    def __init__(self, coding: str, limit: float) -> None:
        if coding not in CODINGS:
            raise ValueError(f"its content-encoding {clipped(coding, 20)!r} is unknown")
        self._coding = coding
        self._limit = limit
        self._decoder: Any = None
        self._members = 1
        self._has_more = False  # the last step was as long as a step may be
        self._waiting = b""
        self._in = self.size = 0

    def feed(self, data: bytes) -> bytes:
        return b"".join(self.steps(data))

    def steps(self, data: bytes) -> Iterator[bytes]:
        """The same in pieces of a bounded size; what is not asked for waits for the next call."""
        self._in += len(data)
        self._waiting += data
        if self._decoder is None:
            if len(self._waiting) < 2:  # it takes two bytes to tell a zlib header
                return
            self._decoder = CODINGS[self._coding](self._waiting)
        while self.is_waiting:
            try:
                piece = self._step()
            except CODING_ERRORS as error:
                raise ValueError(f"it is not valid {self._coding}") from error
            if piece:
                yield piece

    @property
    def is_waiting(self) -> bool:
        """Whether it holds more than it gave out."""
        decoder = self._decoder
        return decoder is not None and bool(
            self._waiting or self._has_more and not decoder.eof)

    def _step(self) -> bytes:
        data = self._waiting
        if self._decoder.eof:  # gzip members may follow each other
            self._members += 1
            if self._members > MAX_MEMBERS:
                raise TooLarge("it has too many members")
            self._decoder = CODINGS[self._coding](data)
        decoder = self._decoder
        piece: bytes = decoder.decompress(data, INFLATE_STEP_BYTES)
        self._has_more = len(piece) == INFLATE_STEP_BYTES
        self._waiting = (
            decoder.unused_data if decoder.eof else getattr(decoder, "unconsumed_tail", b""))
        self.size += len(piece)
        if self.size > self._limit:
            raise TooLarge("it is too large when decoded")
        if self.size > max(self._in * MAX_INFLATE_RATIO, FREE_INFLATED_BYTES):
            raise TooLarge("it is a compression bomb")
        return piece

    def end(self) -> None:
        if self._decoder is None or not self._decoder.eof:
            raise ValueError(f"its {self._coding} is cut")


def open_deflate(start: bytes) -> Any:
    has_header = start[0] & 15 == zlib.DEFLATED and int.from_bytes(start[:2], "big") % 31 == 0
    return zlib.decompressobj(15 if has_header else -15)


CODINGS: Dict[str, Callable[[bytes], Any]] = {
    "gzip": lambda start: zlib.decompressobj(31), "x-gzip": lambda start: zlib.decompressobj(31),
    "deflate": open_deflate,
}
CODING_ERRORS: Tuple[Type[Exception], ...] = (zlib.error, EOFError)
try:
    from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # 3.14 and up
except ImportError:
    pass
else:
    CODINGS["zstd"] = lambda start: zstd.ZstdDecompressor()
    CODING_ERRORS = (*CODING_ERRORS, zstd.ZstdError)


REASONS = {status.value: status.phrase for status in http.HTTPStatus}


def render_head(status: int, fields: Iterable[Tuple[str, str]]) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} {REASONS.get(status, '')}", *map(": ".join, fields),
                        "\r\n"]).encode("latin-1")


LAST_CHUNK = b"0\r\n\r\n"


def render_chunk(data: bytes, is_last: bool = False, before: bytes = b"") -> bytes:
    """Behind what stands `before` it: to copy a block once, not thrice, spares the caches."""
    end = LAST_CHUNK if is_last else b""
    return b"%b%x\r\n%b\r\n%b" % (before, len(data), data, end) if data else before + end


# What a client's request keeps to itself: credentials, cookies, what only this hop means, and what
# a proxy in front of us tells of the person who calls (address, name, tokens of the house).
REQUEST_ONLY_HERE = HOP_BY_HOP | SECRET_HEADERS | frozenset([
    "host", "content-length", "content-encoding", "accept-encoding", "expect", "origin", "referer",
    "forwarded", "via", "x-real-ip", "x-client-ip", "client-ip", "true-client-ip",
    "cf-connecting-ip", "fastly-client-ip", "fly-client-ip", "x-cluster-client-ip",
    "x-azure-clientip", "remote-user", "x-client-cert", "x-amzn-trace-id"]) | WHO_PAYS
PREFIXES_ONLY_HERE = (
    "sec-", "x-forwarded-", "x-gateway-", "x-original-", "x-envoy-", "x-auth-request-",
    "x-webauth-", "x-remote-", "x-amzn-oidc-", "x-ms-token-", "x-ms-client-principal",
    "x-goog-iap-", "x-goog-authenticated-", "cf-access-", "ssl-client-", "x-ssl-client-")
# What of a provider's answer stays here: its hop's, and what would steer that proxy, or make the
# provider's policy that of our host.
ANSWER_ONLY_HERE = HOP_BY_HOP | frozenset([
    "content-length", "content-encoding", "set-cookie", "alt-svc", "server", "date", "via",
    "x-request-id", "request-id", "x-gateway-id", "x-accel-redirect", "x-accel-buffering",
    "x-accel-expires", "x-accel-charset", "x-accel-limit-rate", "x-sendfile", "clear-site-data",
    "strict-transport-security", "nel", "report-to", "reporting-endpoints"])


def only_here(dropped: FrozenSet[str], headers: Headers) -> FrozenSet[str]:
    """What does not go on. What Connection names speaks of one connection too."""
    named = headers.get("connection", "").lower()
    if named in ("", "keep-alive", "close"):
        return dropped
    return dropped.union(name.strip() for name in named.split(","))


def field_lines(fields: Iterable[Tuple[str, str]]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in fields])


def passing_fields(headers: Headers, dropped: FrozenSet[str]) -> str:
    dropped = only_here(dropped, headers)
    return field_lines(field for field in headers.items() if field[0] not in dropped
                       and not field[0].startswith(PREFIXES_ONLY_HERE))


# ==============================
# 10. Prices
#
# What models cost: data, and how lists of it are read.
# ==============================

MAX_DOLLARS_PER_TOKEN = Decimal("0.1")  # a dearer one was given for more than a token
# -20250929, @20250929, -2025-08-07, -0613 or -2512, -10-2025, -001; and words that change no price
SUFFIX = re.compile(
    r"([-@]([0-9]{8}|[0-9]{4}(-[0-9]{2}-[0-9]{2})?|[0-9]{2}-[0-9]{4}|00[0-9])"
    r"|-(latest|preview|beta|experimental|(non-)?reasoning|multi-agent))$")
LITELLM_FIELDS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
}
LITELLM_KEY = re.compile(f"({'|'.join(LITELLM_FIELDS)})(?:_above_([0-9]+)k_tokens)?")


def find_price(prices: Mapping[str, Price], model: str) -> Price | None:
    """The price of `model`, which may have vendors before it (`a/b/model`) and suffixes behind it.
    The exact name wins, so that a dated row or another vendor's row may differ."""
    names, longer = [model, model.partition("/")[2], model.rpartition("/")[2]], [""]
    while names != longer:
        for name in names:
            if name in prices:
                return prices[name]
        names, longer = [SUFFIX.sub("", name) for name in names], names
    return None


def parse_prices(table: str) -> Dict[str, Price]:
    prices: Dict[str, Price] = {}
    models: List[str] = []
    for line in table.splitlines():
        words = line.partition("#")[0].split()
        models += [word for word in words if word[0].isalpha()]
        cells = " ".join(word for word in words if not word[0].isalpha())
        if cells:
            prices.update(dict.fromkeys(models, _parse_cells(cells)))
            models = []
    return prices


def _parse_cells(cells: str) -> Price:
    steps = {}
    for step in f"0k {cells}".split(">"):
        above, *texts = step.split()
        steps[int(above.rstrip("k")) * 1000] = {
            field: nano_dollars(text) for field, text in zip(PRICE_FIELDS, texts) if text != "-"}
    return _build_price(steps)


def _build_price(steps: Dict[int, Dict[str, int]]) -> Price:
    prices = []
    fields: Dict[str, Any] = {}
    for above in sorted(steps):
        fields.update(steps[above])
        prices.append((above, Price(**fields)))
    return dataclasses.replace(prices[0][1], tiers=tuple(prices[1:]))


def parse_litellm_prices(text: str) -> Dict[str, Price]:
    """A list in the format of LiteLLM's `model_prices_and_context_window.json`. Models without a
    flat price for tokens in and out are left out. Raises ValueError for any other file."""
    try:
        rows = json.loads(text, parse_float=Decimal)  # int(3e-08 * 1e15) is 29_999_999
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ValueError("a price list is an object that holds an object for each model")
    prices = {}
    for model, row in rows.items():
        steps: Dict[int, Dict[str, int]] = {0: {}}
        if row.get("mode") == "embedding":
            steps[0]["output"] = 0  # often left out, and there is none
        for key, value in row.items():
            match = LITELLM_KEY.fullmatch(key)
            if match and value is not None:
                tier = steps.setdefault(int(match[2] or 0) * 1000, {})
                tier[LITELLM_FIELDS[match[1]]] = _parse_token_cost(value, f"{model}.{key}")
        if steps[0].keys() >= {"input", "output"}:
            prices[model] = _build_price(steps)
    return prices


def _parse_token_cost(dollars: object, where: str) -> int:
    if not (isinstance(dollars, (int, Decimal)) and 0 <= dollars < MAX_DOLLARS_PER_TOKEN):
        raise ValueError(f"{where}: {dollars!s:.40} is not a price in dollars per token")
    return round(dollars * 10**6 * NANO_DOLLARS)


# List prices of 2026-11-23 in dollars per million tokens: the models of one price, then what they
# cost by PRICE_FIELDS; `-`: there is no such price. Behind `>200k` are those of a request whose
# whole prompt is longer: they hold for all its tokens, and what is left out there stays as it was.
# A name stands without its SUFFIX where it costs the same.
PRICES = """\
# anthropic
claude-3-7-sonnet claude-4-sonnet claude-sonnet-4 claude-sonnet-4-5 claude-sonnet-4-6
3 15 0.3 3.75 6
claude-3-haiku 0.25 1.25 0.03 0.3
claude-3-opus claude-4-opus claude-opus-4 claude-opus-4-1 15 75 1.5 18.75 30
claude-fable-5 claude-mythos claude-mythos-5 10 50 1 12.5 20
claude-fable-5-1 claude-mythos-5-1 10 50 0.25 12.5 20
claude-haiku-4-5 1 5 0.1 1.25 2
claude-haiku-5-5 0.1 0.5 0.01 0.125 0.2
claude-opus-4-5 claude-opus-4-6 claude-opus-4-7 claude-opus-4-8 claude-opus-5 5 25 0.5 6.25 10
claude-opus-5-5 4 20 0.2 5 8
claude-sonnet-5 2 10 0.2 2.5 4
claude-sonnet-5-5 2 10 0.1 2.5 4

# deepseek
deepseek-chat deepseek-reasoner 0.28 0.42 0.028
deepseek-coder 0.14 0.28 0.014
deepseek-flash deepseek-v4-flash deepseek-v4-flash-vision-exp 0.3 1.2 0.006 0
deepseek-r1 0.55 2.19 0.14
deepseek-v3 0.27 1.1 0.07 0
deepseek-v3.2 0.28 0.4 0.028
deepseek-v4-pro 1.32 3.96 0.044 0

# gemini
deep-research deep-research-max deep-research-pro 2 12
gemini-2.5-computer-use 1.25 10 - >200k 2.5 15
gemini-2.5-flash gemini-3.5-flash-lite gemini-flash-lite 0.3 2.5 0.03
gemini-2.5-flash-lite 0.1 0.4 0.01
gemini-2.5-pro 1.25 10 0.125 >200k 2.5 15 0.25
gemini-2.5-pro-preview-tts 1 20 0.125
gemini-3-flash 0.5 3 0.05
gemini-3.1-flash-lite 0.25 1.5 0.025
gemini-3.1-pro gemini-3.1-pro-preview-customtools gemini-pro 2 12 0.2 >200k 4 18 0.4
gemini-3.5-flash 1.5 9 0.15
gemini-3.6-flash gemini-3.7-flash gemini-3.8-flash gemini-flash 0.75 3.75 0.075
gemini-4-argon 2 10 0.1
gemini-embedding 0.15 0
gemini-embedding-2 0.2 0
gemini-exp gemma-3-27b-it learnlm-1.5-pro 0 0 - >128k 0 0
gemini-gemma-2-27b-it gemini-gemma-2-9b-it 0.35 1.05
gemini-omni-1.1-flash gemini-omni-flash 1.5 9
gemini-robotics-er-2 1 5 0.1
gemini-robotics-er-2-streaming 1 5
gemma-4-26b-a4b-it gemma-4-31b-it lyria-3-clip lyria-3-pro lyria-3.5 lyria-3.5-clip lyria-3.5-pro
lyria-realtime-exp 0 0

# groq
llama-guard-3-8b 0.2 0.2
meta-llama/llama-prompt-guard-2-22m 0.03 0.03
meta-llama/llama-prompt-guard-2-86m 0.04 0.04
openai/gpt-oss-120b 0.15 0.6 0.075
openai/gpt-oss-20b 0.075 0.3 0.0375
openai/gpt-oss-safeguard-20b 0.075 0.3 0.037
qwen/qwen3.8-27b 0.8 4

# mistral
codestral mistral-code mistral-code-fim 0.3 0.9 0.03
codestral-embed 0.15 0 0.015
codestral-mamba mistral-tiny 0.25 0.25 0.025
devstral devstral-medium mistral-code-agent 0.4 2 0.04
devstral-small mistral-small 0.1 0.3 0.01
glm-5-2 zai-glm zai-glm-5 zai-glm-5-2 zai-glm-5-3 1.4 4.4 0.14
labs-leanstral-1-5 labs-leanstral-1-5-1 0 0
magistral-medium mistral-medium mistral-medium-3 mistral-medium-3-5 mistral-medium-3.5
mistral-vibe-cli mistral-vibe-cli-with-tools 1.5 7.5 0.15
magistral-small mistral-small-2603 mistral-small-latest mistral-vibe-cli-fast 0.15 0.6 0.015
ministral-14b ministral-3-14b 0.2 0.2 0.02
ministral-3-3b ministral-3b 0.1 0.1 0.01
ministral-3-8b ministral-8b 0.15 0.15 0.015
mistral-embed 0.1 0
mistral-large mistral-large-3 0.5 1.5 0.05
mistral-large-4 mistral-large-4-0 0.68 2.09 0.068
open-mistral-nemo 0.3 0.3 0.03
pixtral-large 2 6 0.2
voxtral-small 0.1 0.4 0.01

# openai
chat 5 30 0.5
chatgpt-4o gpt-4o-2024-05-13 5 15
computer-use 3 12
daybreak-blue gpt-5.6 gpt-5.6-sol gpt-daybreak-blue 4 20 0.4 5 >272k 8 30 0.8
daybreak-red gpt-5.6-cyber gpt-daybreak-red 12.5 75 1.25 15.625 >272k 25 112.5 2.5
gpt-3.5-turbo 0.5 1.5
gpt-3.5-turbo-1106 1 2
gpt-3.5-turbo-16k 3 4
gpt-4 30 60
gpt-4-0125-preview gpt-4-1106-preview gpt-4-turbo 10 30
gpt-4.1 o3 o4-mini-deep-research 2 8 0.5
gpt-4.1-mini 0.4 1.6 0.1
gpt-4.1-nano 0.1 0.4 0.025
gpt-4o gpt-4o-search 2.5 10 1.25
gpt-4o-audio gpt-audio gpt-audio-1.5 2.5 10
gpt-4o-mini gpt-4o-mini-search 0.15 0.6 0.075
gpt-4o-mini-audio 0.15 0.6
gpt-4o-mini-realtime gpt-audio-mini gpt-realtime-mini 0.6 2.4
gpt-4o-realtime 5 20
gpt-5 gpt-5-chat gpt-5-codex gpt-5-search-api gpt-5.1 gpt-5.1-chat gpt-5.1-codex gpt-5.1-codex-max
1.25 10 0.125
gpt-5-mini gpt-5.1-codex-mini 0.25 2 0.025
gpt-5-nano 0.05 0.4 0.005
gpt-5-pro 15 120
gpt-5.2 gpt-5.2-chat gpt-5.2-codex gpt-5.3-chat gpt-5.3-codex 1.75 14 0.175
gpt-5.2-pro 21 168
gpt-5.4 2.5 15 0.25 - >272k 5 22.5 0.5
gpt-5.4-mini 0.75 4.5 0.075
gpt-5.4-nano 0.2 1.25 0.02
gpt-5.4-pro gpt-5.5-pro 30 180 - - >272k 60 270
gpt-5.5 5 30 0.5 - >272k 10 45 1
gpt-5.5-cyber 12.5 75 1.25
gpt-5.6-luna 0.2 1.2 0.02 0.25 >272k 0.4 1.8 0.04
gpt-5.6-terra 2 12 0.2 2.5 >272k 4 18 0.4
gpt-6-astra 10 50 1 12.5 >272k 20 75 2
gpt-6-luna 0.1 0.5 0.01 0.125 >272k 0.2 0.75 0.02
gpt-6-sol 2 10 0.2 2.5 >272k 4 15 0.4
gpt-6.1-sol 2 10 0.1 2.5 >272k 4 15 0.2
gpt-realtime gpt-realtime-1.5 4 16
gpt-rosalind-discovery gpt-rosalind-research 5 25 0.5
o1 15 60 7.5
o1-pro 150 600
o3-deep-research 10 40 2.5
o3-mini 1.1 4.4 0.55
o3-pro 20 80
o4-mini 1.1 4.4 0.275
text-embedding-3-large 0.13 0
text-embedding-3-small 0.02 0
text-embedding-ada text-embedding-ada-002-v2 0.1 0

# xai
grok-4.20 grok-4.20-non-reasoning-gv2 grok-4.20-reasoning-gv2 grok-4.3 1.25 2.5 0.2 >200k 2.5 5 0.4
grok-4.5 grok-build 2 6 0.3 >200k 4 12 0.6
grok-4.6 grok-4.7 2 6 0.5 >200k 4 12 1
grok-build-0.1 grok-code-fast grok-code-fast-1 1 2 0.2 >200k 2 4 0.4
"""


# ==============================
# I/O starts here
# ==============================


# ==============================
# 11. Upstream
#
# Connections to providers: made, kept alive, and dropped at the first doubt. Deadlines cost no
# timers: each connection carries one, and the sweeper of section 13 looks at all of them several
# times a second.
# ==============================

MAX_HEAD_BYTES = 64 << 10
MAX_READ_BYTES = 64 << 10  # at once from a provider, so that a slow client makes us hold little
MAX_IDLE_CONNECTIONS = 256  # kept per origin
KEEP_IDLE_SECONDS = 55.0  # many servers close after 60
SETTLE_SECONDS = 1.0  # for the end of a body whose content has ended
RACE_SECONDS = 1.0  # a kept-alive connection that dies unanswered within it was closed in the race
FOREVER = float("inf")
INTERIM = re.compile(rb"HTTP/1\.[01] 1(?!01)")  # to switch protocols is a last answer


# Without the first each event of a stream waits for the one before to be acknowledged; asyncio sets
# it only where a socket knows its protocol, as accepted ones do not. The others, as Go's: NATs and
# load balancers forget a connection that is silent for minutes.
TCP_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
               (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *(
    (socket.IPPROTO_TCP, getattr(socket, name), 15)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL") if hasattr(socket, name))]


class Outbox:
    """What is written in one turn of the loop goes out together at the start of the next. Who is
    sent something must be woken, and the sender pays for it: a peer that is awake already costs
    nothing, and to write at once is to wake it each time, for an eighth of all CPU time. `before`
    is called first."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before
        self._pieces: List[Tuple[asyncio.Transport, bytes]] = []
        self._is_due = False

    def put(self, transport: asyncio.Transport, data: bytes) -> None:
        self._pieces.append((transport, data))
        if not self._is_due:
            self.call()
        if len(data) > MAX_READ_BYTES:  # what the socket does not take, the transport must count
            self.flush()

    def call(self) -> None:
        if not self._is_due:
            asyncio.get_running_loop().call_soon(self.flush)
        self._is_due = True

    def flush(self) -> None:
        self._is_due = False
        try:
            self._before()
        finally:
            pieces, self._pieces = self._pieces, []
            for transport, data in pieces:
                transport.write(data)


class Wire(asyncio.Protocol):
    """A connection, its deadline, and what came and was not read yet.

    It costs half of what asyncio's streams do, since only one coroutine ever reads; and what comes
    goes to a `sink` at once where there is one: to wake a reader takes a second turn of the loop.
    With more than 30 attributes an instance shares no keys with the others, for 1.3 kB each.
    """

    transport: asyncio.Transport

    def __init__(self, max_head: int, outbox: Outbox) -> None:
        self.buffer = bytearray()
        self.fed = 0  # bytes that came
        self.sink: Callable[[bytes], None] | None = None
        self.at_eof = False
        self.error: BaseException | None = None
        self.deadline = FOREVER
        self.phase = ""  # the timeout that `deadline` stands for
        self.renewal = 0.0  # seconds that each piece of data adds; 0 where none does
        self._seen = 0
        self._max_head = max_head
        self._outbox = outbox
        self._wanted = 0  # bytes in the buffer before who waits is woken
        self._waiter: asyncio.Future[None] | None = None
        self._drainer: asyncio.Future[None] | None = None
        self._is_paused = self._is_full = False

    def expect(self, phase: str, now: float, seconds: float, renews: bool = False) -> None:
        self.phase, self.deadline = phase, now + seconds
        self.renewal = seconds if renews else 0.0

    def is_over(self, now: float) -> bool:
        """Whether the deadline has passed, which data may renew."""
        if self.renewal and self.fed != self._seen:
            self._seen, self.deadline = self.fed, now + self.renewal
        return now >= self.deadline

    # ---- what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # asyncio reads into 256 KiB, which malloc maps and unmaps anew for each read.
        if hasattr(transport, "max_size"):
            transport.max_size = MAX_READ_BYTES
        sock = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            for option in TCP_OPTIONS:
                sock.setsockopt(*option)

    def data_received(self, data: bytes) -> None:
        self.fed += len(data)
        if self.sink is not None:
            self.sink(data)
            return
        self.buffer += data
        if self._waiter is not None:
            if len(self.buffer) >= self._wanted:
                self.wake()
        elif len(self.buffer) > self._max_head:
            self.pause()

    def eof_received(self) -> bool:
        self.at_eof = True
        self.wake()
        return self.transport.get_extra_info("sslcontext") is None

    def connection_lost(self, error: Exception | None) -> None:
        self.fail(error or self.error)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        if self._drainer is not None and not self._drainer.done():
            self._drainer.set_result(None)

    # ---- for the coroutine that reads and writes ----

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: BaseException | None) -> None:
        """Ends all reading, with this error where there is one."""
        self.error = error
        self.at_eof = True
        self.wake()

    def more(self, wanted: int = 0) -> asyncio.Future[None]:
        """To be awaited: data, one piece or as many bytes in the buffer. Raises the connection's
        error, and EOFError at its end."""
        if self.at_eof:
            raise self.error or EOFError
        if self._is_paused:
            self.resume()
        self._wanted = wanted
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter

    def pause(self) -> None:
        if not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self.transport.resume_reading()

    def take(self, size: int) -> bytes:
        data = bytes(memoryview(self.buffer)[:size])
        del self.buffer[:size]
        return data

    async def read_head(self) -> bytes:
        """All up to a blank line; OverflowError where that is too much."""
        at = self.buffer.find(b"\r\n\r\n")
        while at < 0 and len(self.buffer) <= self._max_head:
            seen = len(self.buffer)
            await self.more()
            at = self.buffer.find(b"\r\n\r\n", max(seen - 3, 0))
        if at < 0 or at > self._max_head:
            raise OverflowError
        return self.take(at + 4)

    async def read_exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            await self.more(size)
        return self.take(size)

    async def read(self) -> bytes:
        """What has come, at least a byte; b"" at the end."""
        try:
            while not self.buffer:
                await self.more()
        except EOFError:
            return b""
        return self.take(len(self.buffer))

    def write(self, data: bytes) -> None:
        self._outbox.put(self.transport, data)

    async def drain(self) -> None:
        """Waits until the transport holds less than its limit; raises ConnectionResetError."""
        self._outbox.flush()
        if self._is_full:
            self._drainer = asyncio.get_running_loop().create_future()
            await self._drainer
        if self.transport.is_closing():
            raise ConnectionResetError

    def has_bare_head(self) -> bool:
        """Whether what waits here ends a head with bare LFs, which `read_head` would never find."""
        return b"\r\n\r\n" not in self.buffer and (
            b"\n\n" in self.buffer or b"\n\r\n" in self.buffer)


class Connection(Wire):
    def __init__(self, origin: Origin, outbox: Outbox) -> None:
        super().__init__(MAX_HEAD_BYTES, outbox)
        self.origin = origin
        self.final = FOREVER
        self.is_held = False  # no deadline runs but `final`
        self.awaits_head = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._poll = select.poll()
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def has_answer(self) -> bool:
        """Whether one has begun; interim ones are passed over."""
        while INTERIM.match(self.buffer) and b"\r\n\r\n" in self.buffer:
            self.take(self.buffer.index(b"\r\n\r\n") + 4)
        return bool(self.buffer) and not INTERIM.match(self.buffer)

    def is_late(self, now: float) -> bool:
        if self.is_held:
            self._seen = -1  # the next look after it renews the deadline
            return now >= self.final
        return self.is_over(now) or now >= self.final

    def fail_late(self, now: float) -> None:
        phase = "total" if now >= self.final else self.phase
        self.deadline = self.final = FOREVER
        self.resume_writing()
        self.fail(upstream_error(
            504, f"The provider did not answer in time (timeouts.{phase}).", "timeout",
            code=f"{phase}_timeout"))

    def is_fit(self) -> bool:
        """Whether it can carry another request: nothing may have come since the last answer. The
        socket is asked, since the loop may not yet have seen what the kernel has."""
        return not (
            self.at_eof or self.buffer or self.transport.is_closing() or self._poll.poll(0))


class Answer:
    """A provider's answer: its head, and its body as it comes."""

    def __init__(self, connection: Connection, head: AnswerHead, max_bytes: int) -> None:
        self.connection = connection
        self.status = head.status
        self.headers, self.fields = head.headers, head.fields
        self._max_bytes = max_bytes
        if head.status == 101:
            raise bad_answer("The provider switched protocols.")
        self._inflater: Inflater | None = None
        self._wants_more = False
        self._error: BaseException | None = None
        try:
            self.framing = answer_framing(head)
            coding = head.headers.get("content-encoding")
            if coding is not None and coding.lower() != "identity":
                # What is held is bounded where it is held.
                self._inflater = Inflater(coding.lower(), float("inf"))
        except ValueError as error:
            raise unusable(error) from error
        self.is_persistent = not (head.is_http10 or isinstance(self.framing, CloseFraming)
                                  or "close" in head.headers.get("connection", "").lower())

    async def read_all(self) -> bytes:
        framing = self.framing
        if isinstance(framing, LengthFraming) and not self._inflater:
            size, connection = framing.left, self.connection
            self._check_size(size)
            try:
                while len(connection.buffer) < size:
                    await connection.more(size)
            except (EOFError, OSError) as error:
                raise bad_answer("The provider cut its answer.") from error
            framing.left, framing.done = 0, True
            return connection.take(size)
        pieces: List[bytes] = []
        size = 0

        def take(piece: bytes) -> bool:
            nonlocal size
            pieces.append(piece)
            size += len(piece)
            self._check_size(size)
            return True

        await self.pump(take)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise unusable(ValueError(f"it is larger than {self._max_bytes} bytes"))

    async def pump(self, sink: Callable[[bytes], bool]) -> None:
        """Hands each piece of the body to `sink` as it comes, until the body is whole or `sink`
        returns False; what comes then waits in the connection. Raises GatewayError 502, 504."""
        connection = self.connection
        connection.is_held = False
        self._sink = sink
        self._wants_more = not self.framing.done
        if self._wants_more or self._inflater:  # which may hold what the sink did not take
            connection.sink = self._on_data
            self._on_data(connection.take(len(connection.buffer)) if self._wants_more else b"")
        while self._wants_more and not self._error and not connection.at_eof:
            await connection.more()
        connection.sink = None
        del self._sink  # whose owner holds this answer: a circle of garbage
        self._error = self._error or connection.error
        self._finish()

    def _on_data(self, data: bytes) -> None:
        try:
            piece = self.framing.feed(data) if data else b""
            pieces = self._inflater.steps(piece) if self._inflater else [piece] if piece else ()
            self._wants_more = all(map(self._sink, pieces)) and not self.framing.done
        except Exception as error:  # raised where `pump` waits, not in the event loop
            self._error = error
        if self._error or not self._wants_more:
            self.connection.sink = None
            self.connection.wake()

    def _finish(self) -> None:
        try:
            if self._wants_more and not self._error:
                self.framing.end()
            inflater = self._inflater
            if inflater and self.framing.done and not (inflater.is_waiting or self._error):
                inflater.end()
        except ValueError as error:
            self._error = error
        if isinstance(self._error, ValueError):
            raise unusable(self._error) from self._error
        if isinstance(self._error, OSError):
            raise upstream_error(
                502, "The provider's connection broke.", "stream_error") from self._error
        if self._error:
            raise self._error

    def hold(self) -> None:
        """Stops reading until the next `pump`; what the client takes its time for is no fault of
        the provider's."""
        self.connection.is_held = True
        self.connection.pause()

    @property
    def can_be_reused(self) -> bool:
        connection = self.connection
        return (self.is_persistent and self.framing.done and not self.framing.rest
                and not self._error and not connection.at_eof and not connection.buffer
                and not connection.transport.get_write_buffer_size())


def unusable(error: ValueError) -> GatewayError:
    return bad_answer(f"The provider's answer is unusable: {error}.")


class Proxy(NamedTuple):
    """What stands between us and the providers over https."""

    host: str
    port: int
    credentials: str  # a line of the head, or none
    bypassed: Tuple[str, ...]  # hosts and domains that are reached without it

    def serves(self, origin: Origin) -> bool:
        host = origin.host.lower()
        is_here = host == "localhost" or host.startswith("127.") or host == "::1"
        return origin.is_tls and not is_here and not any(
            domain == "*" or f".{host}".endswith(f".{domain}") for domain in self.bypassed)


def parse_proxy(env: Mapping[str, str]) -> Proxy | None:
    """HTTPS_PROXY and NO_PROXY as curl and Go read them. Raises ConfigError."""
    url, bypassed = (env.get(name) or env.get(name.lower()) or "" for name in (
        "HTTPS_PROXY", "NO_PROXY"))
    if not url:
        return None
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError
    except ValueError:  # whose words would quote a password
        raise ConfigError("HTTPS_PROXY", "must be http://[USER:PASSWORD@]HOST:PORT") from None
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    secret = base64.b64encode(f"{user}:{password}".encode()).decode()
    return Proxy(parts.hostname, port, f"proxy-authorization: Basic {secret}\r\n" if user else "",
                 tuple(each.strip().lower().lstrip(".") for each in bypassed.split(",")
                       if each.strip()))


class Pool:
    """Connections to providers. What is idle and what is open is decided in plain code; only
    `send` and what it calls await."""

    def __init__(self, clock: Callable[[], float], proxy: Proxy | None) -> None:
        self._clock = clock
        self._proxy = proxy
        self._known = known_fields()
        self._idle: Dict[Origin, List[Connection]] = {}
        self._open: Set[Connection] = set()
        self._tls: ssl.SSLContext | None = None
        self._outbox = Outbox()

    async def send(self, provider: Provider, deadlines: Timeouts, payload: Sequence[bytes],
                   is_stream: bool, max_bytes: int,
                   upload: Callable[[Connection], Awaitable[bool]] | None = None) -> Answer:
        """Sends a request and awaits its answer's head. Raises GatewayError 502 and 504. `upload`
        sends a body that is not held, and tells whether all of it went.

        A kept-alive connection that dies unanswered at once was closed by the provider in the
        race with our request, which is then sent again on a new one, once.
        """
        connection = None if upload else self._take_idle(provider.origin)
        is_sent = True
        while True:
            is_reused, started = connection is not None, self._clock()
            if connection is None:
                connection = await self._connect(provider, deadlines.connect)
            before = connection.fed
            self._expect_answer(connection, deadlines, is_stream)
            try:
                for piece in payload:  # not drained: the answer may come before all is sent
                    connection.write(piece)
                if upload:
                    connection.deadline = connection.final = FOREVER
                    is_sent = await upload(connection)
                    self._expect_answer(connection, deadlines, is_stream)
                head = parse_answer_head(await connection.read_head(), self._known)
                while head.status < 200 and head.status != 101:  # an interim answer
                    head = parse_answer_head(await connection.read_head(), self._known)
                connection.awaits_head = False
                answer = Answer(connection, head, max_bytes)
                answer.is_persistent = answer.is_persistent and is_sent
                break
            except BaseException as error:
                self.drop(connection)
                is_unanswered = (
                    isinstance(error, (EOFError, OSError)) and connection.fed == before)
                if not (is_unanswered and is_reused and self._clock() - started < RACE_SECONDS):
                    raise_failure(error, provider, is_unanswered)
                connection = None
        if not is_stream:
            connection.expect("idle", self._clock(), deadlines.idle, renews=True)
        return answer

    def _expect_answer(self, connection: Connection, deadlines: Timeouts, is_stream: bool) -> None:
        now = self._clock()
        total = deadlines.total or (FOREVER if is_stream else 600.0)
        connection.final, connection.awaits_head = now + total, True
        connection.expect("first_token", now, deadlines.first_token if is_stream else total)

    def _take_idle(self, origin: Origin) -> Connection | None:
        kept = self._idle.get(origin, [])
        while kept:
            connection = kept.pop()  # the youngest: the others may grow old and go
            if connection.is_fit():
                return connection
            self.drop(connection)
        return None

    async def _connect(self, provider: Provider, seconds: float) -> Connection:
        attempt = asyncio.ensure_future(self._open_connection(provider.origin))
        try:
            await asyncio.wait({attempt}, timeout=seconds)
            if not attempt.done():
                raise upstream_error(504, f"Provider {provider.name!r} did not accept a connection "
                                     "in time (timeouts.connect).", "timeout",
                                     code="connect_timeout")
            return attempt.result()
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors; a bad name a ValueError
            raise unreachable(provider) from error
        except BaseException:  # it may be done by now, and have a connection
            attempt.add_done_callback(self._discard)
            attempt.cancel()
            raise

    def _discard(self, attempt: asyncio.Future[Connection]) -> None:
        if not attempt.cancelled() and not attempt.exception():
            self.drop(attempt.result())

    async def _open_connection(self, origin: Origin) -> Connection:
        proxy = self._proxy if self._proxy and self._proxy.serves(origin) else None
        next_hop = proxy or origin
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(origin, self._outbox), next_hop.host, next_hop.port,
            ssl=self.tls if origin.is_tls and not proxy else None, happy_eyeballs_delay=0.25)
        if proxy:
            await self._open_tunnel(connection, proxy)
        self._open.add(connection)
        return connection

    async def _open_tunnel(self, connection: Connection, proxy: Proxy) -> None:
        """RFC 9110, section 9.3.6: what the proxy grants carries TLS to the provider. Raises
        OSError."""
        origin, transport = connection.origin, connection.transport
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        target = f"{host}:{origin.port}"
        try:
            transport.write(f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n"
                            f"{proxy.credentials}\r\n".encode())
            line = (await connection.read_head()).partition(b"\r\n")[0].decode("latin-1")
            found = STATUS_LINE.fullmatch(line)
            status = found[2] if found else "no HTTP"
            if not status.startswith("2"):
                raise OSError(f"the proxy answered {status}")
            secure = await asyncio.get_running_loop().start_tls(
                transport, connection, self.tls, server_hostname=origin.host)
            connection.connection_made(cast(asyncio.Transport, secure))
        except BaseException as error:
            transport.abort()
            if isinstance(error, (EOFError, OverflowError)):
                raise OSError("the proxy gave no answer") from error
            raise

    @property
    def tls(self) -> ssl.SSLContext:
        """Verifies against the system's store; made at its first use, since it takes megabytes."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            self._tls.set_alpn_protocols(["http/1.1"])
            # From 3.11 on asyncio reads TLS through a buffer of 256 KiB for each connection.
            if hasattr(asyncio.sslproto.SSLProtocol, "max_size"):
                asyncio.sslproto.SSLProtocol.max_size = 32 << 10
        return self._tls

    def release(self, answer: Answer, is_whole: bool = True) -> None:
        """Keeps the connection of a whole answer where nothing speaks against it. A body whose
        content has ended may lack its last chunk: that is awaited in passing."""
        connection = answer.connection
        if not (is_whole and answer.is_persistent):
            self.drop(connection)
            return
        connection.final = FOREVER
        connection.resume()
        if answer.framing.done:
            self._keep_or_drop(answer)
        else:
            connection.expect("settle", self._clock(), SETTLE_SECONDS)
            connection.sink = lambda data: self._settle(answer, data)
            if connection.buffer:
                self._settle(answer, connection.take(len(connection.buffer)))

    def _settle(self, answer: Answer, data: bytes) -> None:
        try:
            has_more = bool(answer.framing.feed(data))
        except ValueError:
            has_more = True
        if has_more:
            self.drop(answer.connection)
        elif answer.framing.done:
            self._keep_or_drop(answer)

    def _keep_or_drop(self, answer: Answer) -> None:
        connection = answer.connection
        connection.sink = None
        kept = self._idle.setdefault(connection.origin, [])
        if answer.can_be_reused and len(kept) < MAX_IDLE_CONNECTIONS:
            connection.expect("kept", self._clock(), KEEP_IDLE_SECONDS)
            kept.append(connection)
        else:
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.transport.abort()

    def sweep(self, now: float) -> None:
        for connection in list(self._open):
            if connection.awaits_head and connection.has_bare_head():
                connection.fail(bad_answer("The provider's answer is not HTTP."))
            if connection.is_late(now):
                if connection.phase in ("kept", "settle"):
                    self.drop(connection)
                else:
                    connection.fail_late(now)
        for origin, kept in list(self._idle.items()):
            fit = [c for c in kept if c in self._open and not c.at_eof]
            for connection in set(kept).difference(fit):
                self.drop(connection)
            self._idle[origin] = fit

    def close(self) -> None:
        for connection in list(self._open):
            self.drop(connection)


def raise_failure(error: BaseException, provider: Provider, is_unanswered: bool) -> NoReturn:
    """What an error before the answer means to a client."""
    if is_unanswered:
        raise unreachable(provider) from error
    if isinstance(error, OverflowError):
        raise bad_answer("The head of the provider's answer is too large.") from error
    if isinstance(error, (EOFError, OSError)):
        raise upstream_error(
            502, "The provider closed in the head of its answer.", "request_error") from error
    raise error


def unreachable(provider: Provider) -> GatewayError:
    return upstream_error(502, f"Could not reach provider {provider.name!r}.", "request_error",
                          type="upstream_unreachable")


# ==============================
# 12. Gateway
#
# One exchange, from request to record. Handlers return a Response and write nothing; errors are
# raised anywhere and rendered once; `record` is told once of each exchange, and is the only place
# that logs it and touches its metrics.
# ==============================

BAD_KEY = re.compile(
    rb"invalid_api_key|api_key_invalid|authentication_error|unregistered caller"
    rb"|(?:incorrect|invalid) (?:x-)?api[ -]key|api key (?:not valid|was reported)", re.IGNORECASE)
MAX_LINE_BYTES = 4096  # of the log
CODE_WORD = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
JSON_TYPE = ("content-type", "application/json")


class Log:
    """Lines on stdout. One that cannot be written at once is lost, and counted: a full disk or a
    reader that sleeps must not stop the gateway."""

    def __init__(self, fd: int, as_json: bool, clock: Callable[[], float],
                 wall_clock: Callable[[], float]) -> None:
        self._fd = fd
        self._as_json = as_json
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._may_block = not stat.S_ISREG(os.fstat(fd).st_mode)
        self.clock = clock  # monotonic, for durations and deadlines
        self.wall_clock = wall_clock  # unix seconds
        self.lost = 0
        self._is_torn = False  # the last line is there in part
        self._second = (0, "")
        self._troubled = float("-inf")

    def line(self, level: str, message: str, fields: Sequence[Tuple[str, object]] = ()) -> None:
        told = [("time", self._now()), ("level", level), ("msg", message), *fields]
        self.write([render_json_log(told) if self._as_json else render_log(told)[1:]])

    def access_line(self, exchange: Exchange, meter: Meter) -> str:
        own, told = own_log_fields(exchange), told_log_fields(exchange)
        if self._as_json:
            return render_json_log([
                ("time", self._now()), ("level", "INFO"), ("msg", "access"),
                ("request_id", exchange.id), ("method", exchange.method), ("path", exchange.path),
                ("status", exchange.status), ("duration_ms", round(exchange.duration * 1000, 1)),
                *meter.log_fields, ("stream", exchange.is_stream), *own.items(), *told])
        return (
            f"time={self._now()} level=INFO msg=access request_id={exchange.id} "
            f"method={quote_log(exchange.method)} path={quote_log(exchange.path)} "
            f"status={exchange.status} duration_ms={exchange.duration * 1000:.1f}"
            f"{meter.log_text} stream={'true' if exchange.is_stream else 'false'}"
            + " %s=%s" * len(own) % tuple(itertools.chain.from_iterable(own.items()))
            + render_log(told))

    def _now(self) -> str:
        now = self.wall_clock()
        if int(now) != self._second[0]:
            self._second = int(now), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        return f"{self._second[1]}.{int(now % 1 * 1000):03}Z"

    def trouble(self, message: str) -> None:
        """What the event loop complains of, once a second."""
        if self.clock() - self._troubled >= 1.0:
            self._troubled = self.clock()
            self.line("ERROR", "loop", [("error", message)])

    def crash(self, error: BaseException) -> None:
        """An error that nobody foresaw: where it happened, but not its words, which may quote what
        a client sent."""
        frames = traceback.extract_tb(error.__traceback__)
        places = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        self.line("ERROR", "crash", [("error", type(error).__name__), ("at", places)])

    def write(self, lines: Iterable[str]) -> None:
        """Several in a write, as far as a pipe that is ready takes them without waiting."""
        block = b""
        for line in lines:
            data = line.encode() + b"\n"
            if len(block) + len(data) >= select.PIPE_BUF:
                self._put(block)
                block = b""
            block += data
        self._put(block)

    def _put(self, block: bytes) -> None:
        if not block:
            return
        data, written = b"\n" * self._is_torn + block, 0
        with contextlib.suppress(OSError):
            if not self._may_block or len(data) <= MAX_LINE_BYTES and any(
                    event & select.POLLOUT for _, event in self._poll.poll(0)):
                written = os.write(self._fd, data)
        self.lost += data.count(b"\n", max(written, self._is_torn))
        self._is_torn = not data[:written].endswith(b"\n") if written else self._is_torn


class ClientLeft(Exception):
    """Before its request was whole."""


class Request(Protocol):
    """A request as a handler sees it: its head, and a body that is read when it is asked for."""

    head: RequestHead
    headers: Headers
    length: int | None  # of the body, None where it is chunked

    async def body(self) -> bytes: ...

    async def pump(self, put: Callable[[bytes], Awaitable[bool]]) -> bool: ...


class Source(Protocol):
    async def pump(self, sink: Callable[[bytes], bool]) -> None: ...

    def hold(self) -> None: ...


class Stream:
    """A streamed body. The server pumps `source` through `feed` and writes what that returns, one
    write out for each piece in, until `ended`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.first = b""  # goes out with the head
        self.ended = False

    def feed(self, piece: bytes) -> bytes:
        return piece

    def end(self) -> bytes:
        self.ended = True
        return b""

    def fail(self, error: GatewayError) -> bytes | None:
        """What tells the client; None where nothing can."""

    def close(self) -> None:
        """Called once, however the stream went."""


class Response:
    def __init__(self, status: int, fields: Sequence[Tuple[str, str]], body: bytes = b"",
                 stream: Stream | None = None) -> None:
        self.status = status
        self.fields = list(fields)
        self.body = body
        self.stream = stream
        self.event = b""  # an error's body as an event, for a client that was promised a stream


class Exchange(Record):
    """One request and what becomes of it."""

    method = ""
    path = ""
    app = ""
    dialect = DIALECTS["chat"]  # the client's
    route: Route | None = None
    is_generation = False
    is_strict = False  # losses are refused
    is_array = False  # a stream of one JSON array
    is_shared = False  # it shows what all apps left under one key of the provider's
    error = ""
    upstream_id = ""
    model = ""  # as the client names it
    answered = False  # the provider said 200
    bytes_in = 0
    bytes_out = 0
    logged_headers: Sequence[Tuple[str, str]] = ()
    keepalive = 0.0  # seconds of a stream's silence that the server breaks; 0: none
    lost_fields: Sequence[Tuple[str, str]] = ()  # of the answer's head: what the request lost

    def __init__(self, id_: str, started: float) -> None:
        self.id = id_
        # The clock's seconds. What lies between `ready` (the body was read) and `sent` (to the
        # provider), and behind `came` (its answer, or the first event), is the gateway's own time.
        self.started = self.ready = self.sent = self.came = started

    def fail(self, error: GatewayError) -> None:
        self.status = error.status
        self.provider_error = error.provider_error
        self.error = error.message
        if error.is_quoted:
            word = error.code or error.type
            self.error = "The provider reported an error" + (
                f": {word}" if CODE_WORD.fullmatch(word) else ".")
        if error.__cause__ is not None:
            self.error += f" ({type(error.__cause__).__name__}: {error.__cause__})"


class Gateway:
    def __init__(self, config: Config, router: Router, keyring: Keyring, pool: Pool,
                 metrics: Metrics, log: Log) -> None:
        self.config = config
        self.router = router
        self.keyring = keyring
        self.pool = pool
        self.metrics = metrics
        self.log = log
        self.clock = log.clock
        self.is_draining = False
        self._names = ModelNames()
        self._meters: Dict[Tuple[str, str, str], Meter] = {}
        self._listed: Dict[str, Tuple[float, List[str]]] = {}  # until when, a provider's own models
        self._log_headers = [name.lower() for name in config.log_headers]
        self._defaults = {name: default_lines(provider, ())
                          for name, provider in config.providers.items()}
        self._endpoints = {path.rstrip("/") or "/": name for path, name in config.endpoints.items()}
        self.events = Budget(config.limits.events)
        self._lines = {(provider.name, wire): provider_lines(
            provider, urllib.parse.urlsplit(provider.base_url).path + provider.paths[wire])
                       for provider in config.providers.values() for wire in provider.paths}

    # ---- one exchange ----

    async def handle(self, exchange: Exchange, request: Request) -> Response:
        exchange.method, exchange.path = request.head.method, self.masked(request.head.path)
        if self._log_headers:
            exchange.logged_headers = fields_of(
                {"content-length": str(request.length), **request.headers} if request.length
                else request.headers, self._log_headers)
        try:
            head = request.head
            name, methods = find_route(head.path, head.method)
            if not methods and is_azures(head):
                head = request.head = plain_head(head, exchange)
                name, methods = find_route(head.path, head.method)
            elif not methods and (self.router.is_provider(head.path[1:].partition("/")[0])
                                  or longest_prefix(head.path, self._endpoints)):
                methods = ANY_METHOD
            exchange.dialect = DIALECTS[name] if name else asked_in(request.headers, head.query)
            handler = find_handler(head, methods)
            exchange.is_shared = methods is ANY_METHOD and not head.path.startswith("/v1/resp")
            exchange.is_generation = handler in COUNTED
            if exchange.is_generation:
                self.metrics.in_flight.add((), 1)
            response = await handler(self, exchange, request)
        except GatewayError as error:
            return self.refuse(exchange, error)
        except (ConnectionError, ClientLeft):
            raise
        except RecursionError:
            return self.refuse(exchange, bad_answer("The provider's answer is nested too deeply.")
                               if exchange.answered else
                               GatewayError(400, "The request is nested too deeply."))
        except Exception as error:
            self.log.crash(error)
            return self.refuse(exchange, GatewayError(500, "The gateway failed."))
        exchange.status = exchange.status or response.status
        return self.signed(exchange, response)

    def refuse(self, exchange: Exchange, error: GatewayError) -> Response:
        exchange.fail(error)
        exchange.came = self.clock()
        body = exchange.dialect.render_error(error, exchange.id)
        return self.signed(exchange, Response(error.status, [JSON_TYPE, *error.headers], body))

    def signed(self, exchange: Exchange, response: Response) -> Response:
        if exchange.is_stream and response.stream is None:
            told, body = told_error(response.body), response.body
            if not part_of(told, "error"):  # which a client of a stream would not see as one
                body = exchange.dialect.render_error(
                    plain_error(response.status, body), exchange.id)
            elif body.strip()[:1] == b"[":
                body = dump_json(told)
            response.event = exchange.dialect.error_event(
                b" ".join(body.splitlines()))  # a provider's may stand in many lines
        exchange.overhead = exchange.sent - exchange.ready + self.clock() - exchange.came
        id_ = exchange.upstream_id or exchange.id
        response.fields += [(name, id_) for name in exchange.dialect.id_fields]
        response.fields.append(("x-gateway-id", exchange.id))
        return response

    async def generate(self, exchange: Exchange, request: Request) -> Response:
        """Answers one generation request; the order of the steps is what clients rely on."""
        body, route = await self.admit(exchange, request)
        exchange.is_array = (exchange.is_stream and exchange.dialect.streams_arrays
                             and "alt=sse" not in request.head.query)
        if exchange.is_stream and not exchange.is_array:
            exchange.keepalive = self.config.sse_keepalive
        name = exchange.dialect.name
        if name in route.provider.paths and route.wire in (None, name):
            return await self.pass_through(exchange, request, route, body, name)
        if isinstance(body, Form):
            raise GatewayError(400, "The body must be a JSON object.")
        return await self.translate(exchange, request, route, body)

    async def admit(self, exchange: Exchange, request: Request,
                    keeper: str | None = None) -> Tuple[Body | Form, Route]:
        """`keeper` is the provider of what may name no model."""
        app = self.authenticate(exchange, request)  # 401
        raw, kind = await request.body(), request.headers.get("content-type", "")  # 408, 413, 503
        body = Form(raw, kind) if kind.lower().startswith("multipart/form-data") else Body(raw)
        exchange.bytes_in = len(body.body)
        exchange.ready = exchange.sent = exchange.came = self.clock()
        if keeper and not exchange.model and body.get("model") is None:
            app.check_may_use("")  # 403 for a key that may not use every model
            exchange.is_stream = exchange.dialect.read_stream(body)  # 400
            route = self.router.route_to(keeper)
        else:
            model, exchange.is_stream = (
                (exchange.model, exchange.dialect.read_stream(body)) if exchange.model else
                exchange.dialect.read_call(body, request.head.path))  # 400
            app.check_may_use(model)  # 403
            route = self.resolve(model)  # 404
            exchange.model = model
        exchange.route = route
        exchange.is_strict = (
            app.is_strict or route.is_strict or request.headers.get("x-gateway-strict") == "1")
        return body, route

    def resolve(self, model: str) -> Route:
        try:
            return self.router.resolve(model)
        except GatewayError:  # whose words quote the name
            return self.router.resolve(self.masked(model))

    def masked(self, path: str) -> str:
        """Without the virtual keys that stand where a name should: they are for no log."""
        if path in ROUTES:
            return path
        return "/".join(map(self._masked_name, path.split("/")))

    def _masked_name(self, name: str) -> str:
        key, colon, action = name.rpartition(":")
        return "***" if self.keyring.knows(name) else (
            f"***:{action}" if colon and self.keyring.knows(key) else name)

    async def pass_through(self, exchange: Exchange, request: Request, route: Route,
                           body: Body | Form, path: str) -> Response:
        """`path` is the name of one in the kind's row: the dialect's, or another."""
        dialect, losses = exchange.dialect, Losses()
        is_dialect = path == dialect.name
        is_known = is_dialect or path in CHAT_STREAMS
        hides_usage, values = False, {}  # type: bool, JSON
        if is_known and isinstance(body, Body):
            if exchange.is_stream and "stream_options" not in route.edits.drop:
                values = dialect.values_for_usage(body)
            hides_usage, most = bool(values), route.target.max_output_tokens
            if most is not None:
                values.update(self.lowered(dialect, body, most, losses))
        if isinstance(body, Body) and (is_dialect or path in COUNTS):
            values.update(own_history(dialect, body, route.provider.row))
        payload = self.render_passed(exchange, request, route, body, path, values, losses)
        self.settle_losses(exchange, route, losses)  # 400
        body.forget()
        answer = await self.send(exchange, route, payload)  # 502, 504
        if answer.status != 200:
            return await self.pass_error(exchange, route, answer)
        fields = [*answer_fields(answer), *exchange.lost_fields]
        kind = answer.headers.get("content-type", "json")
        if not is_known:  # what was asked for by `stream` is not always what comes
            exchange.is_stream = kind.lower().startswith("text/event-stream")
            answer.connection.expect("idle", self.clock(), route.deadlines.idle, renews=True)
        if exchange.is_stream:
            watch = (dialect.watch(hides_usage, route.provider.done) if is_known
                     else LooseWatch(dialect, False, False))
            stream = PassedStream(self, exchange, route, answer, watch, watch.fail)
            return await self.open_stream(exchange, stream, fields)
        if not is_dialect and "json" not in kind:
            return Response(200, fields, stream=HandedOn(self, exchange, answer))
        raw = await self.read_answer(answer, exchange)
        reply = parse_answer(raw)
        if reply.get("error") and is_dialect and ANSWER_FIELDS.isdisjoint(reply):
            error = dialect.parse_error(reply["error"], 200)  # under a 200
            if error.status in (401, 402):
                raise key_refused(error.status)
            exchange.fail(error)
            return Response(error.status, fields, mask(raw, route.provider))
        exchange.usage = dialect.usage_in(reply)
        if is_dialect and not exchange.usage:
            self.estimate(exchange, dialect.count_content(reply))
        return Response(200, fields, raw)

    def lowered(self, dialect: Dialect, body: Body, most: int, losses: Losses) -> JSON:
        """What keeps a passed body below the config's ceiling."""
        values = dialect.values_for_ceiling(body, most)
        if values:
            losses.drop("max_tokens")
        return values

    async def translate(
            self, exchange: Exchange, request: Request, route: Route, body: Body) -> Response:
        """The provider speaks another dialect: request and answer go through the model."""
        dialect, losses, caps = exchange.dialect, Losses(), route.target.caps
        if route.provider.forward_auth:
            raise GatewayError(400, "The model's provider takes its own dialect only "
                                    "(forward_auth).", "model", "unsupported_dialect")
        tree = {**body.tree(), "model": exchange.model, "stream": exchange.is_stream}
        chat = dialect.parse_request(tree, losses)  # 400
        body.forget()
        wires = route.provider.wires
        wire = next((each for each in wires if route.wire == each.name
                     or route.wire is None and each.suits(chat, caps)), wires[-1])
        tree, rewrites = wire.render_request(chat, route.target, losses)  # 400
        rewrites.answer_id, rewrites.prompt_bytes = exchange.id, exchange.bytes_in
        route.edits.apply(tree, losses, ours=["stream_options"])
        self.settle_losses(exchange, route, losses)  # 400
        lines, _ = self.request_lines(exchange, route, wire.name)
        lines += self._defaults[route.provider.name] + field_lines(
            fields_of(request.headers, TRANSLATED_FIELDS))
        payload = with_head(lines, dump_json(tree))
        del tree
        chat.turns.clear()
        answer = await self.send(exchange, route, payload)  # 502, 504
        if answer.status != 200:
            raise await self.translated_error(exchange, route, answer, wire)
        created, retry = int(self.log.wall_clock()), fields_of(answer.headers, RETRY_FIELDS)
        if exchange.is_stream:
            parser = wire.parser(rewrites)
            parser.needs_done = route.provider.done
            stream = TranslatedStream(
                self, exchange, route, answer, parser, dialect.renderer(chat, created))
            fields = [*retry, *exchange.lost_fields, ("content-type", "text/event-stream")]
            return await self.open_stream(exchange, stream, fields)
        told = parse_answer(await self.read_answer(answer, exchange))  # 502
        try:
            reply = wire.parse_reply(told, rewrites)
        except GatewayError as error:  # an error under a 200; what cannot be read is paid for too
            exchange.usage = wire.usage_in(told)
            error = translated(error, route.provider)
            raise error from error.__cause__
        reply.model = chat.model
        if part_of(told, wire.usage_field):
            exchange.usage = reply.usage
        else:
            reply.usage = self.estimate(exchange, wire.count_content(told))
        if rewrites.lost:
            self.count_lost(rewrites.lost, route)
            losses.names.update(dict.fromkeys(rewrites.lost, False))
        answered = dump_json(dialect.render_reply(reply, chat, created))
        return Response(200, [JSON_TYPE, *retry, *lost_fields(losses)], answered)

    def authenticate(self, exchange: Exchange, request: Request) -> App:
        app = self.keyring.authenticate(request.head.keys, self.log.wall_clock())
        exchange.app = app.name
        app.check_may_call((request.head.path, exchange.path), exchange.is_shared)
        return app

    def settle_losses(self, exchange: Exchange, route: Route, losses: Losses) -> None:
        """Refuses them where that is asked for, else counts them."""
        if exchange.is_strict:
            losses.refuse()
        if losses.names:
            exchange.lost_fields = lost_fields(losses)
            self.count_lost(losses.names, route)

    def count_lost(self, names: Iterable[str], route: Route) -> None:
        for name in names:
            self.metrics.dropped.add((name, route.provider.name))

    def request_lines(
            self, exchange: Exchange, route: Route, path: str) -> Tuple[str, FrozenSet[str]]:
        """Where streams have a path of their own, it is named so."""
        lines, dropped = self._lines[route.provider.name, path]
        if "{model}" not in lines:
            return lines, dropped
        if exchange.is_stream:
            lines, _ = self._lines.get((route.provider.name, f"{path} stream"), (lines, dropped))
        name = quoted(f"/{route.model}")[1:]  # none of its segments may lead elsewhere
        return lines.replace("{model}", name, 1), dropped

    def render_passed(self, exchange: Exchange, request: Request, route: Route,
                      body: Body | Form, path: str, values: JSON, losses: Losses) -> List[bytes]:
        """The request to the provider: the client's own bytes, but for what must differ."""
        head, provider = request.head, route.provider
        lines, dropped = self.request_lines(exchange, route, path)
        if route.model:
            values = {**values, **exchange.dialect.values_for_model(body, route.model)}
        gone: Set[str] = set()
        if isinstance(body, Form):
            lines = lines.replace("content-type: application/json\r\n", "")
            dropped -= {"content-type"}
        elif any(route.edits):
            values, gone = route.edits.of_passed(body, values, losses)
        content = body.with_values(values, gone)
        query = head.query and passing_query(head.query)
        if query:
            start = "&" if "?" in lines.partition("\r\n")[0] else "?"
            lines = lines.replace(" HTTP/1.1", f"{start}{query} HTTP/1.1", 1)
        if provider.forward_auth:
            lines += forwarded_auth(head.headers, self.keyring)
        lines += head.passing_fields(dropped)
        if provider.row.headers:
            lines += default_lines(provider, head.headers)
        return with_head(lines, content)

    async def send(self, exchange: Exchange, route: Route, payload: Sequence[bytes]) -> Answer:
        """One attempt today; others will follow here."""
        exchange.sent = self.clock()
        answer = await self.pool.send(
            route.provider, route.deadlines, payload, exchange.is_stream, self.config.limits.answer)
        self.note_answer(exchange, answer)
        return answer

    def note_answer(self, exchange: Exchange, answer: Answer) -> None:
        headers = answer.headers
        exchange.came, exchange.answered = self.clock(), answer.status == 200
        exchange.upstream_id = clipped(headers.get("x-request-id") or headers.get("request-id", ""))

    # ---- answers ----

    async def read_answer(self, answer: Answer, exchange: Exchange | None = None) -> bytes:
        try:
            body = await answer.read_all()
        except BaseException:
            self.pool.drop(answer.connection)
            raise
        self.pool.release(answer)
        if exchange:
            exchange.came = self.clock()
        return body

    async def open_stream(self, exchange: Exchange, stream: PassedStream | TranslatedStream,
                          fields: List[Tuple[str, str]]) -> Response:
        """A stream whose first event is awaited while the status can still be told honestly."""
        try:
            check_event_stream(stream.answer)
            await stream.answer.pump(stream.feed_first)
            exchange.came = self.clock()
            if not stream.first and not stream.ended:
                stream.first = stream.end()
            failure = stream.failure
            if failure and exchange.ttft is None:  # else what was said goes out before it
                raise key_refused(failure.status) if failure.status in (401, 402) else failure
        except BaseException as error:
            stream.close()
            if isinstance(error, GatewayError) and not stream.has_content():
                exchange.usage = None  # nothing was generated
            raise
        if exchange.is_array:
            fields = [JSON_TYPE, *(field for field in fields if field[0] != "content-type")]
            return Response(200, fields, stream=ArrayStream(stream))
        return Response(200, fields, stream=stream)

    async def pass_error(self, exchange: Exchange, route: Route, answer: Answer) -> Response:
        """A provider's error: status, words and retry-after are kept, unless they are about our
        key, which is no fault of the client's."""
        status, fields = answer.status, answer_fields(answer)
        body = await self.read_error_body(exchange, route, answer)
        exchange.status, exchange.provider_error = status, error_label(status)
        exchange.error = f"The provider answered {status}."
        if told_error(body) is None:
            body = exchange.dialect.render_error(plain_error(status, body), exchange.id)
            fields = [JSON_TYPE, *(field for field in fields if field[0] != "content-type")]
        return Response(status, fields, body)

    async def translated_error(
            self, exchange: Exchange, route: Route, answer: Answer, wire: Dialect) -> GatewayError:
        """A provider's error in the client's dialect: its words are kept, and retry-after."""
        body = await self.read_error_body(exchange, route, answer)
        told = told_error(body)
        error = translated(
            plain_error(answer.status, body) if told is None else
            wire.parse_error(told.get("error") or told, answer.status), route.provider)
        error.headers = fields_of(answer.headers, RETRY_FIELDS) or retry_delay(told)
        return error

    async def read_error_body(self, exchange: Exchange, route: Route, answer: Answer) -> bytes:
        """Raises GatewayError(502) where the status is no error, or speaks of our key."""
        body = await self.read_answer(answer, exchange)
        if not 400 <= answer.status < 600:
            raise upstream_error(502, f"The provider answered {answer.status}; only 200 is an "
                                      "answer.", "bad_answer")
        if route.provider.forward_auth:  # it is the client's own key
            return body
        if answer.status in (401, 402) or answer.status in (400, 403) and BAD_KEY.search(body):
            raise key_refused(answer.status)
        return mask(body, route.provider)

    def estimate(self, exchange: Exchange, content_bytes: int) -> Usage:
        usage = estimated_usage(exchange.usage, exchange.bytes_in, content_bytes)
        exchange.usage, exchange.usage_from = usage, "estimated"
        return usage

    # ---- other endpoints ----

    async def forward(self, exchange: Exchange, request: Request) -> Response:
        """An endpoint that no dialect is read for: bytes pass to where the body's model lives."""
        keeper = self._endpoints.get(request.head.path)
        body, route = await self.admit(exchange, request, keeper)
        path = endpoint_of(request.head.path)
        if path in route.provider.paths:
            return await self.pass_through(exchange, request, route, body, path)
        estimate = path in COUNTS and isinstance(body, Body) and (
            exchange.dialect.render_estimate(body.tree()))
        if not estimate:
            raise GatewayError(
                404, f"The provider of the requested model has no {path}.", "model", "not_found")
        fields = [JSON_TYPE, ("x-gateway-estimate", next(iter(estimate)))]
        return Response(200, fields, dump_json(estimate))

    async def call_model(self, exchange: Exchange, request: Request) -> Response:
        """What is to be done stands behind the model's name."""
        action = endpoint_of(request.head.path)
        is_chat = action in (":generateContent", ":streamGenerateContent")
        return await (self.generate if is_chat else self.forward)(exchange, request)

    async def hand_on(self, exchange: Exchange, request: Request) -> Response:
        """What names no model, to the provider that the path or the config names; the body goes up
        as it comes, and the answer down."""
        self.authenticate(exchange, request)
        head = request.head
        if head.method == "POST" and re.fullmatch("/v1/responses/[^/]*", head.path):
            raise GatewayError(404, "There is no such endpoint.", code="not_found")  # with a model
        provider, path = self.router.find_keeper(head.path, self._endpoints)
        exchange.route = route = self.router.route_to(provider.name)
        query = without_parts(head.query, "key")
        method = "GET" if head.method == "HEAD" else head.method
        target = (target_of(provider.base_url, path) or "/") + (f"?{query}" if query else "")
        lines, dropped = provider_lines(provider, target, method, "")
        if provider.forward_auth:
            lines += forwarded_auth(head.headers, self.keyring)
        lines += head.passing_fields(dropped - {"content-encoding"})
        lines += default_lines(provider, head.headers)
        has_body = request.length != 0
        if has_body or method in ("POST", "PUT", "PATCH"):
            lines += field_lines([("transfer-encoding", "chunked") if request.length is None else
                                  ("content-length", str(request.length))])

        async def upload(connection: Connection) -> bool:
            return await self.upload(exchange, request, connection, route.deadlines.idle)

        answer = await self.pool.send(
            provider, route.deadlines, [f"{lines}\r\n".encode("latin-1")], True,
            self.config.limits.answer, upload if has_body else None)
        answer.connection.expect("idle", self.clock(), route.deadlines.idle, renews=True)
        self.note_answer(exchange, answer)
        if answer.status >= 300:
            return await self.pass_error(exchange, route, answer)
        if head.method == "HEAD" or answer.framing.done:
            self.pool.drop(answer.connection)
            return Response(answer.status, answer_fields(answer))
        return Response(answer.status, answer_fields(answer),
                        stream=HandedOn(self, exchange, answer))

    async def upload(self, exchange: Exchange, request: Request, connection: Connection,
                     idle: float) -> bool:
        """Sends the body as it comes, no faster than the provider takes it; returns whether all of
        it went: an answer may come before its end."""
        is_chunked = request.length is None

        def came(data: bytes) -> None:
            connection.buffer += data
            if connection.has_answer():
                connection.resume_writing()  # nobody need take the rest

        async def put(piece: bytes) -> bool:
            exchange.bytes_in += len(piece)
            if connection.has_answer() or connection.at_eof:
                return False
            connection.write(render_chunk(piece) if is_chunked else piece)
            connection.expect("idle", self.clock(), idle)
            try:
                await connection.drain()
            except ConnectionResetError:
                if not connection.has_answer():
                    raise
            connection.deadline = FOREVER
            if connection.error and not connection.has_answer():
                raise connection.error
            return not (connection.has_answer() or connection.at_eof)

        connection.sink = came
        try:
            is_whole = await request.pump(put)
        except GatewayError:
            if not connection.has_answer():  # which counts more than a client that is late
                raise
            is_whole = False
        finally:
            connection.sink = None
        if is_whole and is_chunked:
            connection.write(LAST_CHUNK)
        return is_whole

    async def list_models(self, exchange: Exchange, request: Request) -> Response:
        app = self.authenticate(exchange, request)
        models = self.router.aliases(app)
        providers = self.router.listing()
        lists = await asyncio.gather(*map(self.models_of, providers))
        models += [(f"{provider.name}/{name}", provider.name)
                   for provider, names in zip(providers, lists) for name in names
                   if app.may_use(f"{provider.name}/{name}")]
        return Response(200, [JSON_TYPE], dump_json(
            exchange.dialect.render_models(models, request.head.query)))

    async def models_of(self, provider: Provider) -> List[str]:
        """By the provider's own list; none where it cannot be asked."""
        until, names = self._listed.get(provider.name, (float("-inf"), []))
        if self.clock() < until:
            return names
        target = target_of(provider.base_url, "/models") + provider.row.whole_list
        lines, _ = provider_lines(provider, target, "GET", "")
        head = f"{lines}{self._defaults[provider.name]}\r\n".encode("latin-1")
        soon = dataclasses.replace(provider.deadlines, total=MAX_LIST_SECONDS)
        told: JSON | None = None
        try:
            answer = await self.pool.send(provider, soon, [head], False, self.config.limits.answer)
            body = (await self.read_answer(answer)).strip()
            if answer.status == 200:  # some send the list itself
                told = json_object(b'{"data":%b}' % body if body[:1] == b"[" else body)
        except GatewayError:
            pass
        listed = list_of_objects(told or {}, "data") or list_of_objects(told or {}, "models")
        told_names = (text_of(each, "id") or text_of(each, "name").partition("/")[2]
                      for each in listed)
        names = [name for name in told_names if name]
        believed = MAX_LIST_SECONDS if told is None else LIST_SECONDS
        self._listed[provider.name] = self.clock() + believed, names
        return names

    async def show_model(self, exchange: Exchange, request: Request) -> Response:
        app = self.authenticate(exchange, request)
        asked = request.head.path.partition("/models/")[2]
        if not asked:
            raise GatewayError(404, "There is no such endpoint.", code="not_found")
        app.check_may_use(asked)
        owner = self.resolve(asked).provider.name
        return Response(200, [JSON_TYPE], dump_json(exchange.dialect.render_model(asked, owner)))

    async def health(self, exchange: Exchange, request: Request) -> Response:
        if self.is_draining and request.head.path == "/health":
            return Response(503, [JSON_TYPE], b'{"status":"draining"}')
        return Response(200, [JSON_TYPE], b'{"status":"ok"}')

    async def show_metrics(self, exchange: Exchange, request: Request) -> Response:
        openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
        self.metrics.lost_lines.values[()] = self.log.lost
        text = render_metrics([*self.metrics.families(), *process_metrics()], openmetrics)
        kind = ("application/openmetrics-text; version=1.0.0; charset=utf-8" if openmetrics
                else "text/plain; version=0.0.4; charset=utf-8")
        return Response(200, [("content-type", kind)], text.encode())

    async def show_page(self, exchange: Exchange, request: Request) -> Response:
        text = f"gateway.py {__version__}\n\n" + "".join(
            f"{' '.join(methods):5} {path}\n" for path, (_, methods) in sorted(ROUTES.items()))
        return Response(200, [("content-type", "text/plain; charset=utf-8")], text.encode())

    # ---- the record ----

    def record(self, ended: Iterable[Exchange]) -> None:
        lines = []
        for exchange in ended:
            try:
                meter = self.account(exchange)
                if exchange.path not in PROBES or exchange.status != 200 or self.config.log_probes:
                    lines.append(self.log.access_line(exchange, meter))
            except Exception as error:  # the others are to be recorded all the same
                self.log.crash(error)
        self.log.write(lines)

    def account(self, exchange: Exchange) -> Meter:
        if exchange.is_generation:
            self.metrics.in_flight.add((), -1)
        meter, route = self.meter(exchange), exchange.route
        if exchange.usage is not None and route is not None and route.price is not None:
            exchange.cost = cost(route.price, exchange.usage)
        if exchange.is_generation:
            meter.record(exchange)
        return meter

    def meter(self, exchange: Exchange) -> Meter:
        route = exchange.route
        key = (exchange.app, route.provider.name if route else "",
               self._names.label(route, exchange.answered) if route else "")
        meter = self._meters.get(key)
        if meter is None:
            meter = self._meters[key] = Meter(self.metrics, *key)
        return meter


Tally = TypeVar("Tally", Watch, Parser)


class ProviderStream(Stream, Generic[Tally]):
    def __init__(self, gateway: Gateway, exchange: Exchange, route: Route, answer: Answer,
                 tally: Tally, tell: Callable[[GatewayError], bytes]) -> None:
        super().__init__(answer)
        self.answer = answer
        self.failure: GatewayError | None = None
        self._gateway = gateway
        self._exchange = exchange
        self._route = route
        self._tally: Tally = tally
        self._tell = tell  # of a failure, in the place where the stream is; b"" for the usual words
        self._cutter = EventCutter(gateway.config.limits.event, gateway.events.take)

    def feed_first(self, piece: bytes) -> bool:
        """Until there is more than comments, or many of them."""
        self.first += self.feed(piece)
        return not self.ended and len(self.first) < MAX_READ_BYTES and (
            COMMENTS.fullmatch(self.first) is not None)

    def has_content(self) -> bool:
        return self._tally.content_bytes > 0

    def note_first_content(self) -> None:
        now = self._gateway.clock()
        self._exchange.ttft = now - self._exchange.started
        self.answer.connection.expect("idle", now, self._route.deadlines.idle, renews=True)

    def fail(self, error: GatewayError) -> bytes:
        self.note_failure(error)
        dialect = self._exchange.dialect
        return self._tell(error) or dialect.render_stream_error(error, self._exchange.id)

    def note_failure(self, error: GatewayError) -> None:
        error.message = mask_text(error.message, self._route.provider)
        self.failure = error
        self.ended = True
        self._exchange.fail(error)
        self._exchange.provider_error = "timeout" if error.status == 504 else "stream_error"

    def close(self) -> None:
        self._cutter.rest()
        tally, gateway, exchange = self._tally, self._gateway, self._exchange
        is_whole = tally.ended and not self.failure
        gateway.pool.release(self.answer, is_whole)
        exchange.usage = tally.usage
        if tally.is_generation and not (is_whole and tally.usage):
            gateway.estimate(exchange, tally.content_bytes)


class PassedStream(ProviderStream[Watch]):
    """Same dialect on both sides: whole events, as they came."""

    def feed(self, piece: bytes) -> bytes:
        block = self._cutter.feed(piece)
        return self._watched(block) if block else b""

    def _watched(self, block: bytes) -> bytes:
        watch = self._tally
        out = watch.feed(block)
        if watch.has_content and self._exchange.ttft is None:
            self.note_first_content()
        if watch.failure:
            self.note_failure(watch.failure)
            out = mask(out, self._route.provider)
        self.ended = watch.ended or self.ended
        return out

    def end(self) -> bytes:
        rest = self._cutter.rest()  # an event without its blank line counts where it is whole
        data = event_data(rest).strip()
        is_whole = data == b"[DONE]" or json_object(data) is not None
        out = self._watched(rest + b"\n\n") if is_whole else b""
        if not self.ended:
            out += self._tally.end()
            if self._tally.failure:
                out += self.fail(self._tally.failure)
            self.ended = True
        return out


class HandedOn(Stream):
    """A body that nobody looks into."""

    def __init__(self, gateway: Gateway, exchange: Exchange, answer: Answer) -> None:
        super().__init__(answer)
        self._gateway = gateway
        self._exchange = exchange
        self._answer = answer

    def fail(self, error: GatewayError) -> None:
        self._exchange.fail(error)

    def close(self) -> None:
        self._gateway.pool.release(self._answer, self._answer.framing.done)


class ArrayStream(Stream):
    """The events of a stream as one JSON array, which is closed only after a clean end."""

    def __init__(self, inner: PassedStream | TranslatedStream) -> None:
        super().__init__(inner.source)
        self._inner = inner
        self._before = b"["
        self.first = self._array(inner.first)

    def _array(self, block: bytes) -> bytes:
        out = []
        for raw in split_events(block):
            data = event_data(raw)
            if data:
                out.append(self._before + data)
                self._before = b","
        self.ended = self._inner.ended
        if self.ended and not self._inner.failure:
            out.append(b"]")
        return b"".join(out)

    def feed(self, piece: bytes) -> bytes:
        return self._array(self._inner.feed(piece))

    def end(self) -> bytes:
        return self._array(self._inner.end())

    def fail(self, error: GatewayError) -> bytes:
        return self._array(self._inner.fail(error))

    def close(self) -> None:
        self._inner.close()


class TranslatedStream(ProviderStream[Parser]):
    def __init__(self, gateway: Gateway, exchange: Exchange, route: Route, answer: Answer,
                 parser: Parser, renderer: Renderer) -> None:
        super().__init__(gateway, exchange, route, answer, parser, renderer.fail)
        self._renderer = renderer
        self._has_spoken = False

    def feed(self, piece: bytes) -> bytes:
        return self._translate(lambda: self._tally.feed(self._cutter.feed(piece)))

    def end(self) -> bytes:
        out = self._translate(lambda: self._tally.feed(self._cutter.rest()))
        return out if self.ended else out + self._translate(self._tally.end)

    def _translate(self, read: Callable[[], Iterable[StreamEvent]]) -> bytes:
        out: List[bytes] = []
        try:
            for event in read():
                if self._exchange.ttft is None and isinstance(event, CONTENT_EVENTS):
                    self.note_first_content()
                out.append(self._renderer.feed(event))
            if self._tally.content_bytes > self._gateway.config.limits.answer:
                raise bad_answer("The provider's answer is too large.")  # some repeat it whole
        except GatewayError as told:
            error = translated(told, self._route.provider)
            if not any(out) and not self._has_spoken:
                raise error from error.__cause__
            out.append(self.fail(error))
        self.ended = self._tally.ended or self.ended
        self._has_spoken = self._has_spoken or any(out)
        return b"".join(out)

    def close(self) -> None:
        self._tally.settle()
        lost = self._tally.rewrites.lost | self._renderer.lost
        self._gateway.count_lost(lost, self._route)
        super().close()


CONTENT_EVENTS = (TextDelta, TextRun, ThinkingDelta, ArgumentsDelta)
Handler = Callable[[Gateway, Exchange, Request], Awaitable[Response]]

ANY_METHOD: Dict[str, Handler] = dict.fromkeys(
    ("GET", "POST", "PUT", "PATCH", "DELETE"), Gateway.hand_on)

# Every endpoint: its path, its dialect ("": as it is asked), and a handler for each method. A path
# that ends in "/" stands for all below it.
ROUTES: Dict[str, Tuple[str, Dict[str, Handler]]] = {
    "/": ("", {"GET": Gateway.show_page}),
    "/health": ("", {"GET": Gateway.health}),
    "/health/live": ("", {"GET": Gateway.health}),
    "/metrics": ("", {"GET": Gateway.show_metrics}),
    "/v1/chat/completions": ("chat", {"POST": Gateway.generate}),
    **{f"/v1{path}": (name, {"POST": Gateway.forward})
       for name, paths in (("chat", CHAT), ("responses", RESPONSES)) for path in paths
       if path != name},
    "/v1/responses": ("responses", {"POST": Gateway.generate}),
    "/v1/messages": ("messages", {"POST": Gateway.generate}),
    "/v1/messages/count_tokens": ("messages", {"POST": Gateway.forward}),
    "/v1/models": ("", {"GET": Gateway.list_models}),
    "/v1/models/": ("", {"GET": Gateway.show_model}),
    "/v1beta/models": ("gemini", {"GET": Gateway.list_models}),
    "/v1beta/models/": ("gemini", {"GET": Gateway.show_model, "POST": Gateway.call_model}),
    **{f"/v1/{name}{end}": ("chat", ANY_METHOD) for name, end in (
        ("files", ""), ("files", "/"), ("batches", ""), ("batches", "/"), ("responses", "/"))},
}
COUNTED = (Gateway.generate, Gateway.forward, Gateway.call_model, Gateway.hand_on)
PREFIXES = tuple(path for path in ROUTES if path.endswith("/") and path != "/")
LIST_SECONDS = 300.0  # that a provider's list of models is believed
MAX_LIST_SECONDS = 10.0  # that it may take; so long one that could not be had is not asked for
CHAT_STREAMS = frozenset(["/completions"])  # end as those of Chat Completions do
COUNTS = frozenset(["/messages/count_tokens", "/responses/input_tokens", ":countTokens"])
PROBES = frozenset(["/health", "/health/live", "/metrics"])


def find_route(path: str, method: str) -> Tuple[str, Dict[str, Handler]]:
    if path in ROUTES:
        return ROUTES[path]
    path = next((prefix for prefix in PREFIXES if path.startswith(prefix)), path)
    if path == "/v1/models/" and method == "POST":
        path = "/v1beta/models/"
    return ROUTES.get(path, ("", {}))


def is_azures(head: RequestHead) -> bool:
    return head.path.startswith(DEPLOYMENTS) or (
        head.path.startswith(AZURE) and "api-version=" in head.query)


def plain_head(head: RequestHead, exchange: Exchange) -> RequestHead:
    """As other clients ask. The paths of deployments name the model."""
    if not head.path.startswith(DEPLOYMENTS):
        return dataclasses.replace(head, path=f"/v1/{head.path.split('/', 2)[2]}")
    asked = head.path[len(DEPLOYMENTS):]
    path = next((path for path in CHAT.values() if asked.endswith(path)), "")
    exchange.model = asked[:-len(path)] if path else asked.partition("/")[0]
    return dataclasses.replace(
        head, path=f"/v1{path}" if path else f"/v1/{asked.partition('/')[2]}")


def target_of(base_url: str, path: str) -> str:
    """A target below a provider's address; a version that both name counts once."""
    base = urllib.parse.urlsplit(base_url).path
    version = base.rpartition("/")[2]
    if re.fullmatch(r"v\d+[a-z0-9]*", version) and path.startswith(f"/{version}/"):
        path = path[len(version) + 1:]
    return base + quoted(path.removesuffix("/")) + "/" * path.endswith("/")


def own_history(dialect: Dialect, body: Body, row: Kind) -> JSON:
    """The conversation as the provider takes it, where it is not as it came: without what other
    vendors' answers left, and without a role that it does not know."""
    marks, foreign = row.foreign
    has_marks = dialect.told in body.body and any(map(body.body.__contains__, marks))
    has_developer = not row.has_developer and b'"developer"' in body.body
    if not (has_marks or has_developer):
        return {}
    told = own = body.get(dialect.history)
    if has_marks:
        own = without_marks(told, foreign)
    if has_developer and isinstance(own, list):
        own = [{**turn, "role": "system"} if isinstance(turn, dict)
               and turn.get("role") == "developer" else turn for turn in own]
    return {} if own == told else {dialect.history: own}


def quoted(path: str) -> str:
    """For a request's target; it must not lead out of what it stands below."""
    if not {"", ".", ".."}.isdisjoint(path.split("/")[1:]):
        raise GatewayError(400, "The path must have no empty and no dot segments.")
    return urllib.parse.quote(path, safe="/:@!$&'()*+,;=~")


def forwarded_auth(headers: Headers, keyring: Keyring) -> str:
    """The client's own, which must not be a key of ours."""
    if "x-gateway-key" not in headers or "authorization" not in headers:
        raise GatewayError(401, "This provider takes the client's own Authorization; send the "
                                "gateway's key in x-gateway-key.", code="invalid_api_key")
    if keyring.knows(headers["authorization"].partition(" ")[2].strip()):
        raise GatewayError(401, "The Authorization is a key of the gateway's; it is not for the "
                                "provider.", code="invalid_api_key")
    return field_lines([("authorization", headers["authorization"])])


def endpoint_of(path: str) -> str:
    """Below the version, or behind a model's name."""
    if "/models/" in path:
        return ":" + path.rpartition(":")[2]
    return path[len("/v1"):]


def passing_query(query: str) -> str:
    """Without a key, and without the form of a stream, which is ours to choose."""
    return without_parts(query, "key", "alt", "api-version", "")


def without_parts(query: str, *names: str) -> str:
    return "&".join(part for part in query.split("&") if urllib.parse.unquote_plus(
        part.partition("=")[0]) not in names)


def find_handler(head: RequestHead, methods: Mapping[str, Handler]) -> Handler:
    if not methods:
        raise GatewayError(404, "There is no such endpoint.", code="not_found")
    if head.headers.get("upgrade", "").lower() == "websocket":
        raise GatewayError(426, "WebSockets are not spoken here; use HTTP.",
                           headers=[("upgrade", "HTTP/1.1"), ("connection", "upgrade")])
    method = "GET" if head.method == "HEAD" else head.method
    if method not in methods:
        allowed = ", ".join([*methods, "HEAD"] if "GET" in methods else methods)
        raise GatewayError(405, f"This endpoint takes {allowed}.", code="method_not_allowed",
                           headers=[("allow", allowed)])
    return methods[method]


def asked_in(headers: Headers, query: str) -> Dialect:
    spoken = [dialect for dialect in DIALECTS.values() if dialect.is_spoken_in(headers, query)]
    return spoken[0] if spoken else DIALECTS["chat"]


def provider_lines(provider: Provider, target: str, method: str = "POST",
                   content_type: str = "application/json") -> Tuple[str, FrozenSet[str]]:
    """The request line and the fields that are the same in every request to a provider, and the
    names of a client's fields that do not go to it."""
    name, form = provider.row.auth
    fields = {"host": urllib.parse.urlsplit(provider.base_url).netloc,
              "accept-encoding": "identity"}
    if content_type:
        fields["content-type"] = content_type
    if provider.api_key and not provider.forward_auth:
        fields[name] = form.format(provider.api_key)
    fields.update(provider.headers)
    lines = field_lines(fields.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}", REQUEST_ONLY_HERE.union(fields)


def default_lines(provider: Provider, sent: Container[str]) -> str:
    return field_lines(field for field in provider.row.headers
                       if field[0] not in sent and field[0] not in dict(provider.headers))


def with_head(lines: str, body: bytes) -> List[bytes]:
    head = f"{lines}content-length: {len(body)}\r\n\r\n".encode("latin-1")
    return [head + body] if len(body) < MAX_READ_BYTES else [head, body]


def answer_fields(answer: Answer) -> List[Tuple[str, str]]:
    dropped = only_here(ANSWER_ONLY_HERE, answer.headers)
    return [field for field in answer.fields if field[0] not in dropped]


TRANSLATED_FIELDS = ("idempotency-key", "traceparent")
RETRY_FIELDS = ("retry-after", "retry-after-ms", "x-should-retry")
TRANSLATED_TYPES = {"api_error": "server_error", "not_found_error": "invalid_request_error",
                    "request_too_large": "invalid_request_error", "timeout_error": "timeout"}
MAX_LOST_BYTES = 400
ANSWER_FIELDS = frozenset(["choices", "output", "content", "candidates"])


def fields_of(headers: Headers, names: Iterable[str]) -> List[Tuple[str, str]]:
    return [(name, headers[name]) for name in names if name in headers]


def retry_delay(told: JSON | None) -> List[Tuple[str, str]]:
    """Some say "31.4s" in the error's details."""
    for detail in list_of_objects(part_of(told, "error"), "details"):
        found = re.fullmatch(r"(\d{1,6})(\.\d+)?s", text_of(detail, "retryDelay"))
        if found:
            return [("retry-after", str(int(found[1]) + bool(found[2])))]
    return []


def lost_fields(losses: Losses) -> List[Tuple[str, str]]:
    if not losses.names:
        return []
    names = ", ".join(losses.names).encode("ascii", "backslashreplace").decode()
    return [("x-gateway-lost", clipped(names, MAX_LOST_BYTES))]


def told_error(body: bytes) -> JSON | None:
    """An error's object; where a stream was asked for, it may stand in an array."""
    text = body.strip()
    return json_object(text[1:-1] if text[:1] + text[-1:] == b"[]" else text)


def parse_answer(raw: bytes) -> JSON:
    """A plain answer; one that is no JSON object is none. Raises GatewayError(502)."""
    reply = json_object(raw)
    if reply is None:
        raise bad_answer("The provider's answer is not a JSON object.")
    return reply


def check_event_stream(answer: Answer) -> None:
    """A stream that is none would end in silence at the client."""
    kind = answer.headers.get("content-type", "text/event-stream").partition(";")[0].strip()
    if not kind.lower().startswith("text/") or kind.lower() == "text/html":
        raise upstream_error(502, "The provider did not answer with a stream "
                                  f"but with {clipped(kind, 60)!r}.", "bad_answer")


def key_refused(status: int) -> GatewayError:
    """Our key was refused, or our account is empty. The client's key is fine, and to try again is
    no help; the SDKs obey x-should-retry."""
    what, kind = (("has no money left for it", "upstream_billing_error") if status == 402 else
                  ("refused the gateway's key", "upstream_auth_error"))
    return upstream_error(502, f"The provider {what}; its operator must act.", "auth", type=kind,
                          headers=[("x-should-retry", "false")])


def translated(error: GatewayError, provider: Provider) -> GatewayError:
    """A provider's error as clients of another dialect may see it."""
    if error.status in (401, 402):
        return key_refused(error.status)
    error.status = {529: 503, 408: 504}.get(error.status, error.status)
    error.type = TRANSLATED_TYPES.get(error.type, error.type)
    error.message = mask_text(error.message, provider)
    return error


def mask(body: bytes, provider: Provider) -> bytes:
    for secret in provider.secrets:
        body = body.replace(secret.encode(), b"***")
    return body


def mask_text(text: str, provider: Provider) -> str:
    for secret in provider.secrets:
        text = text.replace(secret, "***")
    return text


def plain_error(status: int, body: bytes) -> GatewayError:
    words = body[:200].decode("utf-8", "replace")
    return upstream_error(
        status, f"The provider answered {status}: {words}", error_label(status), is_quoted=True)


class Dollars(float):
    """Dollars in a log line, which would otherwise come out as 3.2e-05."""

    def __str__(self) -> str:
        return f"{self:.9f}".rstrip("0").rstrip(".")


def own_log_fields(exchange: Exchange) -> Dict[str, object]:
    """What needs no quotes."""
    fields: Dict[str, object] = {}
    usage = exchange.usage
    if usage is not None:
        fields["prompt_tokens"], fields["completion_tokens"] = usage.input, usage.output
        for name in ("cache_read", "cache_write", "reasoning"):
            if getattr(usage, name):
                fields[f"{name}_tokens"] = getattr(usage, name)
    if exchange.cost is not None:
        fields["cost"] = Dollars(exchange.cost / NANO_DOLLARS)
    fields["usage"] = exchange.usage_from if usage else "none"
    fields["bytes_in"], fields["bytes_out"] = exchange.bytes_in, exchange.bytes_out
    if exchange.ttft is not None:
        fields["ttft_ms"] = round(exchange.ttft * 1000, 1)
    return fields


def told_log_fields(exchange: Exchange) -> List[Tuple[str, str]]:
    """What others said."""
    told = (("upstream_request_id", exchange.upstream_id), ("error", exchange.error))
    return [*(field for field in told if field[1]), *exchange.logged_headers]


def process_metrics() -> Iterator[Family]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = Counter("process_cpu_seconds_total", "CPU time of the process.", scale=10**6)
    cpu.add((), int((usage.ru_utime + usage.ru_stime) * 10**6))
    yield cpu
    for name, about, value in process_readings():
        gauge = Gauge(name, about)
        gauge.set((), value)
        yield gauge


def process_readings() -> Iterator[Tuple[str, str, int]]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        yield "process_max_fds", "Most file descriptors that may be open.", soft
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/stat", encoding="ascii") as file:
            booted = next(int(line.split()[1]) for line in file if line.startswith("btime"))
        open_fds = len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        return
    yield "process_open_fds", "File descriptors that are open.", open_fds
    yield "process_virtual_memory_bytes", "Virtual memory.", int(fields[20])
    yield ("process_resident_memory_bytes", "Resident memory.",
           int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
    yield ("process_start_time_seconds", "When the process started, in unix seconds.",
           booted + int(fields[19]) // os.sysconf("SC_CLK_TCK"))


# ==============================
# 13. Server
#
# Connections from clients. A connection cannot hang: whenever its task waits, it is for one of
#   a head     deadline `keep_alive` while nothing of it is there, `head` from its first byte on
#   a body     deadline `body`, renewed by every byte
#   the answer the provider's deadlines (section 11), and the client itself: one that leaves is
#              noticed by the sweeper, and its exchange is cancelled (499)
#   a write    deadline `write`, renewed by progress
# and `sweep` looks at every connection several times a second.
# ==============================

SWEEP_SECONDS = 0.25
HIGH_WATER_BYTES = 64 << 10
SMALL_REST_BYTES = 64 << 10  # of a refused request's body: read and dropped, else we close
LINGER_SECONDS = 2.0
BACKLOG = 1024
HANG_UPS = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
ACCEPTS_AT_ONCE = 32  # also how often asyncio tries in vain, each time, without descriptors
ACCEPT_RETRY_SECONDS = 0.25  # asyncio's is one; it then takes as many as are free, dead ones too
TLS_HANDSHAKE = b"\x16"  # how it begins: there will be no head
UNBUFFERED = ("x-accel-buffering", "no")  # else nginx holds a stream's events back to its end
NO_HEAD = RequestHead("", "", "", False, {}, 0)  # stands for one that could not be read


class Client(Wire):
    def __init__(self, server: Server) -> None:
        super().__init__(server.limits.head, server.outbox)
        self._server = server
        self.task: asyncio.Task[None] | None = None
        self.exchange: Exchange | None = None  # while one is open
        self.has_left = False
        self.lingers = False  # the client may still be sending
        self.head = NO_HEAD
        self.is_committed = False  # a stream's head went out before its handler was done
        self.written = self.written_before = 0  # all, and before this answer
        self._quiet_since = (-1, 0.0)  # bytes written by then, and when that was seen
        self._sent = 0
        self._write_deadline = FOREVER

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(HIGH_WATER_BYTES)
        self.task = asyncio.get_running_loop().create_task(self._server.serve_connection(self))

    async def read_head(self) -> bytes:
        """A request's head. Raises EOFError, and GatewayError 400, 408, 431."""
        head = b"\r\n"
        while head == b"\r\n":  # RFC 9112, section 2.2: an empty line before it is passed over
            try:
                head = await super().read_head()
            except OverflowError:
                raise GatewayError(431, "The request's head is larger than "
                                        f"{self._max_head} bytes.") from None
            if head[:2] == b"\r\n":
                head = head[2:]
        return head

    def begin(self, head: RequestHead) -> None:
        self.phase, self.deadline, self.renewal = "answer", FOREVER, 0.0
        self.head, self.is_committed, self._quiet_since = head, False, (-1, 0.0)
        self.written_before = self.written

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._outbox.put(self.transport, data)

    def is_quiet(self, exchange: Exchange, now: float) -> bool:
        if not exchange.keepalive:
            return False
        if self._quiet_since[0] != self.written or self.transport.get_write_buffer_size():
            self._quiet_since = (self.written, now)
        return now - self._quiet_since[1] >= exchange.keepalive

    def sweep(self, now: float, timeouts: Timeouts) -> None:
        if self.phase == "keep_alive" and self.buffer:
            self.expect("head", now, timeouts.head)
        if self.phase == "head" and (self.has_bare_head() or self.buffer[:1] == TLS_HANDSHAKE):
            self.deadline = FOREVER
            self.fail(GatewayError(400, "The request's head is malformed."))
        if self.is_over(now):
            self._end_waiting()
        if self.phase == "answer" and (self.at_eof or self._is_paused and self.has_hung_up()):
            self.leave()
        self._sweep_writes(now, timeouts.write)

    def _end_waiting(self) -> None:
        self.deadline = FOREVER
        if self.phase == "keep_alive" or self.phase == "head" and not self.buffer.strip(b"\r\n"):
            self.transport.close()  # behind what is still to be sent
        else:
            self.fail(GatewayError(408, f"The request's {self.phase} did not arrive in time."))

    def _sweep_writes(self, now: float, seconds: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._write_deadline = FOREVER
        elif self.written - unsent != self._sent or self._write_deadline == FOREVER:
            self._sent, self._write_deadline = self.written - unsent, now + seconds
        elif now >= self._write_deadline:
            self.cut()
            self.leave()

    def cut(self) -> None:
        """Ends an answer that is not whole: to HTTP/1.0 the connection's end is the body's, and
        only its reset is not."""
        if self.head.is_http10:
            self.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def has_hung_up(self) -> bool:
        """Asked of the socket: where reading is paused asyncio sees no end."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), HANG_UPS)
        return bool(poll.poll(0))

    def leave(self) -> None:
        if not self.has_left and self.task is not None and self.exchange is not None:
            self.has_left = True
            self.task.cancel()


class Application(Protocol):
    """What a server serves: the gateway, or the demo's upstream."""

    async def handle(self, exchange: Exchange, request: Request) -> Response: ...

    def refuse(self, exchange: Exchange, error: GatewayError) -> Response: ...

    def record(self, ended: Iterable[Exchange]) -> None: ...


class ClientRequest:
    """A request whose body is read when a handler asks for it, so that nobody without a valid key
    makes us hold one."""

    def __init__(self, server: Server, client: Client, head: RequestHead,
                 length: int | None) -> None:
        self.head = head
        self.headers = head.headers
        self.length = length
        self._server = server
        self._client = client
        self.is_read = length == 0
        self._taken = 0
        self._is_begun = False

    async def body(self) -> bytes:
        """The whole body, decoded. Raises GatewayError 400, 408, 413, 415, 503."""
        headers, length = self.headers, self.length
        coding = headers.get("content-encoding", "identity").lower()
        if coding != "identity" and coding not in CODINGS:
            known = ", ".join(CODINGS)
            raise GatewayError(415, f"The content-encoding must be one of: {known}.",
                               headers=[("accept-encoding", known)])
        check_size(BODY, length or 0, self._server.limits.body)
        if self.is_read:
            return b""
        client = self._client
        self._is_begun = True
        self._take(min(length or 0, MAX_READ_BYTES))
        if length is None or length > len(client.buffer):
            self._expect_body()
        try:
            if length is not None and len(client.buffer) >= length == self._taken:
                body = client.take(length)  # as nearly always
            else:
                body = await (self._read_chunked() if length is None else self._read_whole(length))
        except EOFError as error:
            raise ClientLeft from error
        self.is_read = True
        client.expect("answer", 0.0, FOREVER)
        return body if coding == "identity" else self._inflate(body, coding)

    async def _read_whole(self, length: int) -> bytes:
        """What is announced counts as it comes, lest those who only announce lock others out."""
        while len(self._client.buffer) < length:
            while len(self._client.buffer) < self._taken:
                await self._client.more(self._taken)
            self._take(min(length - self._taken, MAX_READ_BYTES))
        self._take(length - self._taken)
        return self._client.take(length)

    async def _read_chunked(self) -> bytes:
        pieces: List[bytes] = []

        async def put(piece: bytes) -> bool:
            pieces.append(piece)
            self._take(len(piece))
            return True

        await self._feed(ChunkedFraming(), put, BODY, self._server.limits.body)
        return b"".join(pieces)

    async def _feed(self, framing: Framing, put: Callable[[bytes], Awaitable[bool]],
                    what: str, limit: int) -> bool:
        """Until the body is whole, or `put` returns False; returns whether it took all of it."""
        client, server = self._client, self._server
        goes_on, size = True, 0
        while goes_on and not framing.done:
            client.expect("body", server.clock(), server.timeouts.body, renews=True)
            try:
                data = await client.read()
            except OSError as error:
                raise ClientLeft from error
            if not data:
                raise ClientLeft
            try:
                piece = framing.feed(data)
            except ValueError as error:
                raise GatewayError(400, f"The request's body is malformed: {error}.") from error
            client.expect("answer", 0.0, FOREVER)  # while the other side takes its time
            size += len(piece)
            check_size(what, size, limit)
            goes_on = await put(piece)
        client.buffer[:0] = framing.rest
        return goes_on

    async def pump(self, put: Callable[[bytes], Awaitable[bool]]) -> bool:
        """Hands the body on as it comes, unheld and still coded; returns whether it was whole.
        Raises GatewayError 400, 408, 413."""
        length, limit = self.length, self._server.limits.upload
        check_size("upload", length or 0, limit)
        self._is_begun = True
        self._expect_body()
        framing = ChunkedFraming() if length is None else LengthFraming(length)
        is_taken = await self._feed(framing, put, "upload", limit)
        self.is_read = framing.done
        return is_taken

    def _expect_body(self) -> None:
        client, server = self._client, self._server
        client.expect("body", server.clock(), server.timeouts.body, renews=True)
        if "100-continue" in self.headers.get("expect", "").lower() and not self.head.is_http10:
            client.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _inflate(self, body: bytes, coding: str) -> bytes:
        inflater = Inflater(coding, self._server.limits.body)
        pieces: List[bytes] = []
        try:
            for at in range(0, len(body), MAX_READ_BYTES):
                pieces.append(inflater.feed(body[at:at + MAX_READ_BYTES]))
                self._take(len(pieces[-1]))
            inflater.end()
        except TooLarge as error:
            raise GatewayError(413, f"The request's body is refused: {error}.") from error
        except ValueError as error:
            raise GatewayError(400, f"The request's body is malformed: {error}.") from error
        return b"".join(pieces)

    def _take(self, size: int) -> None:
        if not self._server.bodies.take(size):
            raise GatewayError(503, "Too many request bodies are in memory; try again.",
                               headers=[("retry-after", "1")])
        self._taken += size

    def give_back(self) -> None:
        if self._taken:
            self._server.bodies.give_back(self._taken)
            self._taken = 0

    @property
    def can_be_skipped(self) -> bool:
        return self.is_read or (self.length is not None and not self._is_begun
                                 and self.length <= SMALL_REST_BYTES
                                 and "expect" not in self.headers)

    async def skip(self) -> None:
        if not self.is_read:
            self._client.expect("body", self._server.clock(), self._server.timeouts.body)
            await self._client.read_exactly(self.length or 0)


BODY = "request's body"


def check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise GatewayError(413, f"The {what} is larger than {limit} bytes.")


class Server:
    def __init__(self, app: Application, limits: Limits, timeouts: Timeouts,
                 new_id: Callable[[], str], clock: Callable[[], float],
                 wall_clock: Callable[[], float]) -> None:
        self.limits = limits
        self.timeouts = timeouts
        self.clock = clock
        self.bodies = Budget(limits.bodies)
        self.outbox = Outbox(self.settle)
        self.is_draining = False
        self._heads = HeadParser(limits.target, limits.fields)
        self._app = app
        self._new_id = new_id
        self._wall_clock = wall_clock
        self._clients: Set[Client] = set()
        self._ended: List[Exchange] = []  # and not recorded yet
        self._listeners: List[asyncio.base_events.Server] = []
        self._date = (0, "")
        self._timer: asyncio.TimerHandle | None = None

    async def listen(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        asyncio.constants.ACCEPT_RETRY_DELAY = ACCEPT_RETRY_SECONDS  # type: ignore[assignment,misc]
        self._listeners.append(await loop.create_server(
            lambda: Client(self), sock=sock, backlog=ACCEPTS_AT_ONCE))
        sock.listen(BACKLOG)

    # ---- one connection ----

    async def serve_connection(self, client: Client) -> None:
        try:
            if len(self._clients) >= self.limits.connections:
                await self.refuse(client, GatewayError(503, "Too many connections."))
                client.lingers = False  # or the refused would hold the descriptors of the others
            else:
                self._clients.add(client)
                while await self.serve_request(client):
                    pass
            await self.close(client)
        except (OSError, EOFError, GatewayError, ClientLeft, asyncio.CancelledError):
            pass  # the client left; a task that ends cancelled would print noise before 3.12
        finally:
            client.transport.abort()
            self._clients.discard(client)

    async def serve_request(self, client: Client) -> bool:
        """Serves one request; returns whether another may follow on this connection."""
        client.expect("keep_alive", self.clock(), self.timeouts.keep_alive)
        try:
            head, length = self._heads.parse(await client.read_head())
        except EOFError:
            return False
        except GatewayError as error:
            await self.refuse(client, error)
            return False
        client.begin(head)
        client.exchange = exchange = Exchange(self._new_id(), self.clock())
        request = ClientRequest(self, client, head, length)
        try:
            response = await self._app.handle(exchange, request)
            request.give_back()
            stays = (request.can_be_skipped and head.keeps_alive and not self.is_draining
                     and not (head.is_http10 and (response.stream or client.is_committed)))
            client.lingers = not (request.is_read or stays)
            await self.write_response(client, response, stays)
        except (ConnectionError, ClientLeft, asyncio.CancelledError) as error:
            is_cut = isinstance(error, asyncio.CancelledError) and not client.has_left
            exchange.status = 503 if is_cut else 499
            exchange.error = "limits.grace was over." if is_cut else "The client left."
            raise
        finally:
            request.give_back()
            self.record(client, exchange)
        if stays:
            await request.skip()
        return stays and not self.is_draining and not client.transport.is_closing()

    async def refuse(self, client: Client, error: GatewayError) -> None:
        client.lingers, client.head, client.is_committed = True, NO_HEAD, False
        client.exchange = exchange = Exchange(self._new_id(), self.clock())
        client.written_before = client.written
        try:
            await self.write_response(client, self._app.refuse(exchange, error), False)
        finally:
            self.record(client, exchange)

    def record(self, client: Client, exchange: Exchange) -> None:
        client.exchange = None
        exchange.bytes_out = client.written - client.written_before
        exchange.duration = self.clock() - exchange.started
        self._ended.append(exchange)
        self.outbox.call()

    def settle(self) -> None:
        """Records what has ended, before the last bytes of it go out. Together, since code that
        runs many times over is in the CPU's caches: it costs half."""
        ended, self._ended = self._ended, []
        if ended:
            self._app.record(ended)

    async def close(self, client: Client) -> None:
        """Closes so that the last answer arrives: what the client may still send would make the
        kernel answer with a reset, and the client lose what it has not read."""
        client.transport.set_write_buffer_limits(0)
        await client.drain()
        if client.lingers and not client.transport.is_closing():
            client.transport.write_eof()
            client.expect("linger", self.clock(), LINGER_SECONDS)
            while await client.read():
                pass

    # ---- answers ----

    async def write_response(self, client: Client, response: Response, stays: bool) -> None:
        head, fields = client.head, [("date", self.date()), *response.fields]
        if not stays:
            fields.append(("connection", "close"))
        elif head.is_http10:
            fields.append(("connection", "keep-alive"))
        if response.stream is not None:
            await self.write_stream(client, response.status, fields, response.stream)
        elif client.is_committed:
            client.write(
                response.event if head.is_http10 else render_chunk(response.event, True))
        else:
            if response.status != 204 and (response.body or head.method != "HEAD"):
                fields.append(("content-length", str(len(response.body))))
            data = render_head(response.status, fields)
            if head.method != "HEAD":
                data += response.body
            client.write(data)
        if client.transport.get_write_buffer_size():
            await client.drain()

    def write_keepalive(self, client: Client, exchange: Exchange) -> None:
        is_http10 = client.head.is_http10
        if not client.is_committed:
            client.is_committed = True
            fields = [("date", self.date()), ("content-type", "text/event-stream"),
                      *((name, exchange.id) for name in exchange.dialect.id_fields),
                      ("x-gateway-id", exchange.id), *exchange.lost_fields,
                      UNBUFFERED, ("connection", "close") if is_http10 else
                      ("transfer-encoding", "chunked")]
            client.write(render_head(200, fields))
        said = exchange.dialect.keepalive
        client.write(said if is_http10 else render_chunk(said))

    async def write_stream(self, client: Client, status: int, fields: List[Tuple[str, str]],
                           stream: Stream) -> None:
        is_chunked = not client.head.is_http10
        is_full = False

        def framed(data: bytes, before: bytes = b"") -> bytes:
            return render_chunk(data, stream.ended, before) if is_chunked else before + data

        def sink(piece: bytes) -> bool:
            nonlocal is_full
            data = framed(stream.feed(piece))
            if data:
                client.write(data)
            is_full = client.transport.get_write_buffer_size() > HIGH_WATER_BYTES
            return not (stream.ended or is_full or client.transport.is_closing())

        fields.append(UNBUFFERED)
        if is_chunked:
            fields.append(("transfer-encoding", "chunked"))
        try:
            opening = b"" if client.is_committed else render_head(status, fields)
            client.is_committed = True
            client.write(framed(stream.first, opening))
            stream.first = b""
            while not stream.ended:
                if is_full:
                    await client.drain()
                is_full = False
                await stream.source.pump(sink)
                if client.transport.is_closing():
                    raise ConnectionResetError
                if is_full and not stream.ended:
                    stream.source.hold()
                elif not stream.ended:
                    client.write(framed(stream.end()))
        except GatewayError as error:
            last = None if stream.ended else stream.fail(error)
            if last is not None:
                client.write(framed(last))
        finally:
            stream.close()
            if not (stream.ended or client.transport.is_closing()):
                self.outbox.flush()
                client.cut()

    def date(self) -> str:
        now = int(self._wall_clock())
        if now != self._date[0]:
            day = time.gmtime(now)
            names = DAYS[day.tm_wday], MONTHS[day.tm_mon - 1]  # strftime's are the locale's
            self._date = now, time.strftime("{}, %d {} %Y %H:%M:%S GMT".format(*names), day)
        return self._date[1]

    # ---- all connections ----

    def sweep(self, others: Callable[[float], None]) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(SWEEP_SECONDS, self.sweep, others)
        now = self.clock()
        for client in list(self._clients):
            client.sweep(now, self.timeouts)
            if client.exchange is not None and client.is_quiet(client.exchange, now):
                self.write_keepalive(client, client.exchange)
        others(now)

    async def drain(self) -> None:
        """Stops accepting, closes what is idle, and waits for what is not, for `grace` seconds."""
        self.is_draining = True
        for _ in range(BACKLOG // ACCEPTS_AT_ONCE + 4):  # turns, to take in what has come so far
            await asyncio.sleep(0)
        for listener in self._listeners:
            listener.close()
        self.outbox.flush()
        for client in self._clients:
            if client.phase == "keep_alive" and not client.buffer:
                client.transport.close()  # behind what is still to be sent
        tasks = {client.task for client in self._clients if client.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.limits.grace)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1.0)
        if self._timer is not None:
            self._timer.cancel()


DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


# ==============================
# 14. Demo
#
# The upstream behind -demo: a real HTTP server on loopback that speaks OpenAI's two wires and
# Anthropic's. It says back what it heard, calls the first tool that it is offered, and counts a
# token for four characters.
# ==============================

DEMO_DELAY_SECONDS = 0.03  # between the words of a stream


class DemoSource:
    def __init__(self, events: List[bytes]) -> None:
        self._events = events

    async def pump(self, sink: Callable[[bytes], bool]) -> None:
        while self._events:
            await asyncio.sleep(DEMO_DELAY_SECONDS)
            if not sink(self._events.pop(0)):
                return

    def hold(self) -> None:
        pass


class DemoUpstream:
    """Plays the provider, as an app of the server's."""

    async def handle(self, exchange: Exchange, request: Request) -> Response:
        asked = request.head.path
        path = asked.removesuffix("/count_tokens").removesuffix("/input_tokens")
        dialect = DEMO_PATHS.get(path)
        try:
            if dialect is None:
                raise GatewayError(404, "There is no such endpoint.")
            exchange.dialect, tree = dialect, Body(await request.body()).tree()
            if path != asked:
                return Response(200, [JSON_TYPE], dump_json(dialect.render_estimate(tree)))
            chat = dialect.parse_request(tree, Losses())
            if not chat.turns:
                raise GatewayError(400, "'messages' must hold a message.", "messages")
        except GatewayError as error:
            return self.refuse(exchange, error)
        reply = demo_reply(chat)
        if not chat.stream:
            return Response(200, [JSON_TYPE], dump_json(dialect.render_reply(reply, chat, 0)))
        renderer = dialect.renderer(chat, 0)
        events = [renderer.feed(event) for event in demo_events(reply)]
        return Response(200, [("content-type", "text/event-stream")],
                        stream=Stream(DemoSource(list(filter(None, events)))))

    def refuse(self, exchange: Exchange, error: GatewayError) -> Response:
        return Response(
            error.status, [JSON_TYPE], exchange.dialect.render_error(error, exchange.id))

    def record(self, ended: Iterable[Exchange]) -> None:
        """The gateway in front of it keeps the records."""


DEMO_PATHS = {f"/v1/{path}": DIALECTS[name] for path, name in (
    ("chat/completions", "chat"), ("messages", "messages"), ("responses", "responses"))}


def demo_reply(chat: Chat) -> Reply:
    results = blocks_of(chat.turns[-1].blocks, ToolResult)
    heard = demo_text(results[0].content if results else chat.turns[-1].blocks)
    asked = len(demo_text([block for turn in chat.turns for block in turn.blocks])) // 4 + 1
    if chat.tools and not results and not (chat.choice and chat.choice.mode == "none"):
        tool = chat.tools[0]
        call = ToolCall(id="call_demo", name=tool.name, arguments=demo_arguments(tool.schema or {}))
        return Reply("demo", chat.model, [call], "tool_calls", Usage(asked, 10))
    text = f"Hello from the demo upstream. {'The tool' if results else 'You'} said: {heard}"
    return Reply("demo", chat.model, [Text(text=text)], "stop", Usage(asked, len(text) // 4 + 1))


def demo_text(blocks: Iterable[Block]) -> str:
    return " ".join(text.text for text in blocks_of(blocks, Text))


def demo_arguments(schema: JSON) -> JSON:
    samples = {"number": 1.5, "integer": 1, "boolean": True, "array": [], "object": {},
               "null": None}
    return {name: [*demo_choices(about), samples.get(str(about.get("type")), "demo")][0]
            for name, about in part_of(schema, "properties").items() if isinstance(about, dict)}


def demo_choices(about: JSON) -> List[Any]:
    return about["enum"] if isinstance(about.get("enum"), list) else []


def demo_events(reply: Reply) -> Iterator[StreamEvent]:
    """Word by word."""
    for event in events_of(reply):
        words = re.findall(r"\S+\s*", event.text) if isinstance(event, TextDelta) else []
        yield from map(TextDelta, words) if words else [event]


DEMO_CONFIG = """{
  "listen": "127.0.0.1:8080",
  "providers": {
    "openai": {"api_key": "demo-upstream-key", "base_url": "http://127.0.0.1:${UPSTREAM_PORT}"},
    "anthropic": {"api_key": "demo-upstream-key", "base_url": "http://127.0.0.1:${UPSTREAM_PORT}"}
  },
  "models": {
    "gpt-demo": {"provider": "openai",
                 "cost_per_million_input": 1, "cost_per_million_output": 2},
    "claude-demo": {"provider": "anthropic",
                    "cost_per_million_input": 1, "cost_per_million_output": 2}
  },
  "api_keys": [{"key": "demo-key-0123456789", "app": "demo"}]
}"""

DEMO_HINT = r"""
Try it from another terminal:

  curl -N http://127.0.0.1:8080/v1/chat/completions -H 'Authorization: Bearer demo-key-0123456789' \
    -H 'Content-Type: application/json' \
    -d '{"model": "gpt-demo", "stream": true, "messages": [{"role": "user", "content": "Hi!"}]}'

  curl http://127.0.0.1:8080/metrics
"""


# ==============================
# 15. Page
#
# What a browser shows: the version and the endpoints, by `Gateway.show_page`.
# ==============================


# ==============================
# 16. Workers
#
# Sockets, signals, the life of the process. One process serves today.
# ==============================


def open_socket(address: Address) -> socket.socket:
    if address.path:
        return open_unix_socket(address.path)
    if not address.host and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", address.port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    family = socket.AF_INET
    if address.host:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address.host, address.port), family=family)


def open_unix_socket(path: str) -> socket.socket:
    """A socket that a dead process left behind is replaced; one that answers is in use."""
    sock = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "a file that is no socket has this name") from None
            os.unlink(path)
        except OSError:
            pass
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    sock.bind(path)
    return sock


def return_memory() -> None:
    """glibc keeps the 25 MB that compiling this file took; and the first large block that is freed
    raises its threshold for giving memory back, so that a body of 10 MB leaves 10 MB behind."""
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, 256 << 10)
    except (OSError, AttributeError):
        pass  # another C library


M_MMAP_THRESHOLD = -3


def raise_descriptor_limit(wanted: int) -> int:
    """Raises the soft limit of descriptors as far as it goes; returns how many client connections
    it carries, each with one to a provider."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = 2 * wanted + SPARE_DESCRIPTORS
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (ValueError, OSError):
            pass  # macOS refuses what is above its kern.maxfilesperproc
    return max(min(wanted, (soft - SPARE_DESCRIPTORS) // 2), 1)


SPARE_DESCRIPTORS = 64


class PriceLists(NamedTuple):
    built_in: Mapping[str, Price]
    own: Mapping[str, Price]

    def find(self, provider: Provider, model: str) -> Price | None:
        name = f"{provider.kind}/{model}"
        price = find_price(self.own, name)
        if price is None and provider.row.has_list_prices:
            price = find_price(self.built_in, name)
        return price


def make_gateway(config: Config, prices: PriceLists, metrics: Metrics, log: Log) -> Gateway:
    return Gateway(config, Router(config, prices.find), Keyring(config.api_keys, day_start),
                   Pool(log.clock, parse_proxy(os.environ)), metrics, log)


def day_start(day: str) -> float:
    return float(calendar.timegm(time.strptime(day, "%Y-%m-%d")))


def id_maker() -> Callable[[], str]:
    start = os.urandom(6).hex()
    number = itertools.count(1)
    return lambda: f"gw-{start}-{next(number):06x}"


def say(text: str, fd: int = 1) -> None:
    """Prints at once; a reader that has gone or a full disk is no reason to end."""
    try:
        os.write(fd, utf8(f"{text}\n"))
    except OSError:
        pass


async def serve(config: Config, prices: PriceLists, sock: socket.socket,
                log: Log, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once."""
    return_memory()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: log.trouble(str(context.get("message", ""))))
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            server.settle()
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, lambda: log.line(
        "WARN", "SIGHUP is ignored: a changed config needs a restart"))
    address = parse_listen(config.listen)
    if not address.path:
        address = address._replace(port=sock.getsockname()[1])
    connections = raise_descriptor_limit(config.limits.connections)
    if connections < config.limits.connections:
        log.line("WARN", "fewer connections than limits.connections: raise `ulimit -n`",
                 [("connections", connections)])
    limits = dataclasses.replace(config.limits, connections=connections)
    metrics = Metrics()
    metrics.build_info.set((__version__, ".".join(map(str, sys.version_info[:3]))), 1)
    gateway = make_gateway(config, prices, metrics, log)
    server = Server(gateway, limits, config.timeouts, id_maker(), log.clock, log.wall_clock)
    await server.listen(sock)
    server.sweep(gateway.pool.sweep)
    log.line("INFO", "starting server", [("addr", str(address)), ("version", __version__)])
    on_ready()
    await stop.wait()
    gateway.is_draining = True
    log.line("INFO", "draining", [("grace", config.limits.grace)])
    await server.drain()
    gateway.pool.close()
    log.line("INFO", "stopped")


async def serve_demo(log: Log) -> None:
    upstream_socket = socket.create_server(("127.0.0.1", 0))
    upstream = Server(DemoUpstream(), Limits(), Timeouts(), id_maker(), log.clock, log.wall_clock)
    await upstream.listen(upstream_socket)
    try:
        sock = socket.create_server(("127.0.0.1", 8080))
    except OSError:
        sock = socket.create_server(("127.0.0.1", 0))
    ports = {"UPSTREAM_PORT": str(upstream_socket.getsockname()[1])}
    hint = DEMO_HINT.replace("8080", str(sock.getsockname()[1]))
    prices = PriceLists(parse_prices(PRICES), {})
    await serve(parse_config(DEMO_CONFIG, "-demo", ports, str), prices, sock, log,
                lambda: say(hint))


# ==============================
# 17. Command line
# ==============================

USAGE_TEXT = """\
usage: gateway.py [-config FILE] [-check | -health | -demo | -version | -help]

An LLM gateway in one file: apps call it with a virtual key each, it calls the providers.

  -config FILE   the config (default: config.json, else config.yaml if it holds JSON)
  -check         validate the config and print what it would serve
  -health        ask a running gateway's /health; exit 0 if it is well, else 1
  -demo          serve an embedded upstream, no config and no key needed
  -version       print the version
  -help          print this

Endpoints: POST /v1/chat/completions, /v1/responses, /v1/messages,
/v1beta/models/MODEL:generateContent; GET /v1/models, /health, /metrics; `GET /` lists all.
Exit status: 0 after a drained stop, 1 for a port in use, 2 for a bad command line or config.
SIGTERM drains: what is in flight finishes, within `limits.grace` seconds."""

NO_CONFIG = """\
gateway.py: no config.json here; write one (see config.example.yaml.json) or name it: -config FILE
To try it without: python3 gateway.py -demo"""


class UsageError(Exception):
    pass


class CommandError(Exception):
    pass


def parse_command_line(arguments: Sequence[str]) -> Tuple[str, str]:
    """(command, config file); the command is "serve" by default. Raises UsageError."""
    command, config = "serve", ""
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag[1:].removeprefix("-") if flag.startswith("-") else ""
        if name == "config":
            if not equals and not rest:
                raise UsageError("-config needs a file")
            config = value if equals else rest.pop(0)
        elif name in COMMANDS and not equals:
            if command not in ("serve", name):
                raise UsageError(f"-{command} and -{name} do not go together")
            command = name
        else:
            near = difflib.get_close_matches(name, [*COMMANDS, "config"], 1)
            raise UsageError(f"unknown argument {flag!r}" + (
                f"; did you mean -{near[0]}?" if near else "; see -help"))
    return command, config


def read_text(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:  # some editors begin with a mark
        return file.read()


def read_config(named: str) -> Tuple[str, str]:
    """The config's path and text. Raises ConfigError, with the hint where there is none."""
    found = [named] if named else list(filter(os.path.exists, ("config.json", "config.yaml")))
    if not found:
        raise ConfigError("", NO_CONFIG)
    try:
        return found[0], read_text(found[0])
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        raise ConfigError(found[0], f"cannot be read: {reason}") from error


def load_config(named: str) -> Tuple[Config, PriceLists]:
    """The config, its warnings printed, and the prices. Raises ConfigError."""
    path, text = read_config(named)
    config = parse_config(text, path, os.environ, read_text)
    parse_proxy(os.environ)  # for its errors, told before a port is opened
    prices = load_prices(config, path)
    for warning in config.warnings:
        say(warning, 2)
    return config, prices


def load_prices(config: Config, path: str) -> PriceLists:
    try:
        own = parse_litellm_prices(read_text(config.prices)) if config.prices else {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"{path}: prices", f"cannot read {config.prices}, which must be in "
                          f"LiteLLM's JSON format: {reason}") from error
    return PriceLists(parse_prices(PRICES), own)


def command_serve(named: str) -> None:
    config, prices = load_config(named)
    warn_of_missing_store(config)
    try:
        sock = open_socket(parse_listen(config.listen))
    except (OSError, UnicodeError) as error:  # of a name that is none
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot listen on {config.listen}: {reason}") from error
    log = Log(1, config.log == "json", time.monotonic, time.time)
    asyncio.run(serve(config, prices, sock, log))


def warn_of_missing_store(config: Config) -> None:
    """Without the system's certificates no provider over https can be verified."""
    paths = ssl.get_default_verify_paths()
    has_store = bool(paths.cafile) or bool(paths.capath and os.listdir(paths.capath))
    if not has_store and any(p.origin.is_tls for p in config.providers.values() if p.is_on):
        say("warning: this system has no certificate store, so every provider over https will be "
            "refused; install the package `ca-certificates`, or set SSL_CERT_FILE", 2)


def command_demo(named: str) -> None:
    asyncio.run(serve_demo(Log(1, False, time.monotonic, time.time)))


def command_check(named: str) -> None:
    config, _ = load_config(named)
    say(f"listen     {config.listen}")
    proxy = parse_proxy(os.environ)
    if proxy:
        say(f"proxy      {proxy.host}:{proxy.port}, to providers over https")
    for provider in config.providers.values():
        state = "" if provider.is_on else "   off: no api_key"
        say(f"provider   {provider.name}: {provider.kind} at {provider.base_url}{state}")
    off = {name: "" if provider.is_on else "   off" for name, provider in config.providers.items()}
    for name, alias in config.models.items():
        say(f"model      {name} -> {alias.provider}/{alias.model or name}{off[alias.provider]}")
    for rule in config.routing:
        what = ("everything else" if rule.default else
                f"{rule.prefix}*" if rule.prefix is not None else rule.match)
        say(f"route      {what} -> {rule.provider}{off.get(rule.provider, '   not configured')}")
    for entry in config.api_keys:
        is_over = make_app(entry, day_start).expires <= time.time()
        state = "   disabled" if entry.disabled else "   expired" * is_over
        say(f"app        {entry.app}: {', '.join(entry.allowed_models)}{state}")
    say("The config is good.")


def command_health(named: str) -> None:
    """Reads `listen` alone, so that it needs none of the config's secrets."""
    path, text = read_config(named)
    problems = Problems(path)
    try:
        tree = parse_config_json(text, path)
        if not isinstance(tree, dict):
            raise ValueError("must be an object")
        listen = tree.get("listen")
        listen = TEXT(expand(":8080" if listen is None else listen, os.environ, read_text,
                             "listen", problems), "listen", problems)
    except (ValueError, RecursionError) as error:
        raise ConfigError(path, str(error)) from error
    if problems.errors:
        raise ConfigError("", "\n".join(problems.errors))
    try:
        status = ask_health(parse_listen(listen))
    except (OSError, ValueError) as error:
        raise CommandError(f"{listen} does not answer: {error}") from error
    if status != 200:
        raise CommandError(f"{listen} answers {status}")


def ask_health(address: Address) -> int:
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    if address.path:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(5.0)
        connection.connect(address.path)
    else:
        connection = socket.create_connection((host, address.port), 5.0)
    with connection:
        connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
        answer = connection.makefile("rb").readline()
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if not found:
        raise ValueError("the answer is not HTTP")
    return int(found[1])


COMMANDS: Dict[str, Callable[[str], None]] = {
    "serve": command_serve, "check": command_check, "health": command_health,
    "demo": command_demo, "version": lambda _: say(f"gateway.py {__version__}"),
    "help": lambda _: say(USAGE_TEXT),
}


def hold_standard_descriptors() -> None:
    """Opens /dev/null where stdin, stdout or stderr are closed, lest a socket take their place and
    be written log lines."""
    descriptor = 0
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    hold_standard_descriptors()
    command = ""
    try:
        command, config = parse_command_line(arguments)
        COMMANDS[command](config)
    except (CommandError, UsageError) as error:
        say(f"gateway.py: {error}", 2)
        return 1 if isinstance(error, CommandError) else 2
    except ConfigError as error:
        say(str(error), 2)
        return 1 if command == "health" else 2  # which Docker keeps for itself
    return 0


class ScriptEnd(Exception):
    """Raised by `run_script`, and told to nobody."""


def run_script() -> NoReturn:
    """`main`, behind the end of the script. As long as it has not ended Python keeps its syntax
    tree, 28 MB of this one; all that is called then is the hook for the error that ended it. Under
    -m, or a debugger, there are frames around ours, and no such tree or no such end."""
    def go_on(*_: object) -> NoReturn:
        sys.excepthook = sys.__excepthook__
        try:
            sys.exit(main(sys.argv[1:]))
        except (Exception, KeyboardInterrupt) as error:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1 if isinstance(error, Exception) else 130)

    if sys._getframe(1).f_back is not None:
        go_on()
    sys.excepthook = go_on
    raise ScriptEnd


if __name__ == "__main__":
    run_script()
