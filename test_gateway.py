"""Tests of gateway.py, in its own order: a table of cases for each section, and one loop over it.

    python3 -m pytest -q test_gateway.py

Nothing else need be installed, and nothing leaves this machine. What decodes piece by piece is
run over every cut of its input, since a network cuts where it likes.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import bisect
import bz2
import calendar
import contextlib
import copy
import ctypes
import dataclasses
import dis
import fcntl
import gc
import gzip
import itertools
import json
import logging
import os
import pickle
import queue
import random
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import zlib
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

import pytest

import gateway
from gateway import (
    ArgumentsDelta,
    Audio,
    Block,
    BlockStart,
    BlockStop,
    Caps,
    Chat,
    CitationDelta,
    ConfigError,
    Document,
    Finish,
    Format,
    GatewayError,
    Image,
    Losses,
    Price,
    Reply,
    Rewrites,
    SignatureDelta,
    Start,
    StreamEvent,
    Target,
    Text,
    TextDelta,
    Thinking,
    ThinkingDelta,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Turn,
    Usage,
)

HERE = Path(__file__).parent


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """`data` whole, byte by byte, and split in two at each offset."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


def blocks(events: list[bytes]) -> Iterator[list[bytes]]:
    """Every way in which whole events may come together."""
    for ends in itertools.product([False, True], repeat=len(events) - 1):
        joined = [events[0]]
        for event, begins in zip(events[1:], ends):
            if begins:
                joined.append(event)
            else:
                joined[-1] += event
        yield joined


def brief(value: object) -> str:
    """A case's name, where the case itself is too long for one or cannot be printed."""
    return ascii(value)[:60]


def refusal(function: Any, *arguments: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        function(*arguments)
    return caught.value


# ==================================================================================================
# 0. The file's own rules
# ==================================================================================================

SOURCE = (HERE / "gateway.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# =+\n# (\d+)\. (.+)$", re.MULTILINE)
IO_LINE = SOURCE[:SOURCE.index("\n# I/O starts here\n")].count("\n") + 1

# (first line, number, title) of each section; what stands above the first banner is section 0.
SECTIONS = [(0, 0, "Imports")] + [
    (SOURCE[:found.start()].count("\n") + 1, int(found[1]), found[2])
    for found in BANNER.finditer(SOURCE)]

# What reads the world outside, whichever module it lies in.
IMPURE = frozenset([
    "asyncio", "breakpoint", "datetime", "input", "locale", "logging", "open", "os", "pathlib",
    "platform", "print", "random", "resource", "secrets", "select", "selectors", "shutil", "signal",
    "socket", "ssl", "stat", "subprocess", "tempfile", "threading", "time", "traceback", "uuid"])
MUTATORS = frozenset(["add", "append", "clear", "discard", "extend", "insert", "pop", "popitem",
                      "remove", "reverse", "setdefault", "sort", "update"])
PROVIDER_NAMES = re.compile(r"openai|anthropic|claude|gpt|gemini|google|mistral|groq|deepseek"
                            r"|\bxai\b|ollama|vllm", re.IGNORECASE)
MAY_NAME_PROVIDERS = (4, 5, 10, 14)


def section_of(line: int) -> int:
    starts = [start for start, _, _ in SECTIONS]
    return SECTIONS[bisect.bisect_right(starts, line) - 1][1]


def names_in(code: types.CodeType) -> Iterator[tuple[int, str, str]]:
    """(line, opname, name) of each module-level name that is bound or used, and of each import: the
    compiler knows which names are local. Annotations are not among them: they are never run."""
    line, starts = code.co_firstlineno, dict(dis.findlinestarts(code))
    for step in dis.get_instructions(code):
        line = starts.get(step.offset) or line
        if step.opname in ("LOAD_NAME", "STORE_NAME", "LOAD_GLOBAL", "IMPORT_NAME"):
            yield line, step.opname, step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


CODE = compile(SOURCE, "gateway.py", "exec")
IS_MODULE_LEVEL = {name for name in CODE.co_names if hasattr(gateway, name)}


def annotations() -> Iterator[tuple[int, str]]:
    """(line, name) of each name in an annotation."""
    for node in ast.walk(TREE):
        for field in ("annotation", "returns"):
            for part in ast.walk(getattr(node, field, None) or ast.Pass()):
                if isinstance(part, ast.Name):
                    yield part.lineno, part.id


def test_contents_are_true() -> None:
    listed = re.findall(r"^ {4}([ \d]\d)\. (.+?) {2,}\S", gateway.__doc__ or "", re.MULTILINE)
    assert [(int(number), title) for number, title in listed] == [
        (number, title) for _, number, title in SECTIONS[1:]]
    assert [number for _, number, _ in SECTIONS] == list(range(18))
    assert section_of(IO_LINE) == 10 and section_of(IO_LINE + 10) == 11


def test_a_section_uses_only_the_sections_above_it() -> None:
    home: dict[str, int] = {}
    for line, operation, name in names_in(CODE):
        if operation == "STORE_NAME" and name in IS_MODULE_LEVEL:
            home.setdefault(name, section_of(line))
    used = [(line, name) for line, operation, name in names_in(CODE) if operation != "STORE_NAME"]
    assert len(used) > 1000, "the names were not found"
    below = [f"line {line}, section {section_of(line)}: {name} is of section {home[name]}"
             for line, name in [*used, *annotations()] if home.get(name, 0) > section_of(line)]
    assert below == [], "\n".join(below)


def test_nothing_above_the_line_touches_the_world() -> None:
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert [node.lineno for node in ast.walk(TREE)
            if isinstance(node, waits) and node.lineno < IO_LINE] == []
    imports = SECTIONS[1][0]
    assert [f"line {line}: {name}" for line, operation, name in names_in(CODE)
            if operation != "STORE_NAME" and name in IMPURE and imports < line < IO_LINE] == []


def test_no_module_level_instance_changes() -> None:
    """Neither rebound, nor changed in place by a function, nor a cache that grows."""
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []
    holders = {name for name in IS_MODULE_LEVEL if isinstance(vars(gateway)[name], (
        dict, list, set, bytearray)) or type(vars(gateway)[name]).__module__ == "gateway"}
    assert "KINDS" in holders and "TEXT" not in holders
    assert [found for function in ast.walk(TREE) if isinstance(function, ast.FunctionDef)
            for found in changes(function, holders)] == []
    assert [name for name in IS_MODULE_LEVEL if hasattr(vars(gateway)[name], "cache_info")] == []
    assert [name for name, dialect in gateway.DIALECTS.items() if vars(dialect)] == []


def changes(function: ast.FunctionDef, holders: set[str]) -> Iterator[str]:
    """Each place in a function that changes one of the module's objects."""
    for node in ast.walk(function):
        owner: Any = None
        if isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            owner = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) \
                and node.func.attr in MUTATORS:
            owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in holders:
            yield f"line {node.lineno}: {owner.id}"


def words(node: ast.AST) -> Iterator[str]:
    """Every name and string in a piece of code, docstrings left out."""
    for part in ast.walk(node):
        documented = isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if documented and ast.get_docstring(part) is not None:  # type: ignore[arg-type]
            part.body = part.body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
        for field in ("id", "attr", "arg", "name", "value"):
            word = getattr(part, field, None)
            if isinstance(word, (str, bytes)):
                yield word if isinstance(word, str) else word.decode("latin-1")


def test_few_sections_name_a_provider() -> None:
    named = []
    for node in copy.deepcopy(TREE).body[1:]:
        is_routes = isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "ROUTES"
        if section_of(node.lineno) not in MAY_NAME_PROVIDERS and not is_routes:
            named += [f"section {section_of(node.lineno)}, from line {node.lineno}: {word!r}"
                      for word in words(node) if PROVIDER_NAMES.search(word)]
    assert named == [], "\n".join(named)


def test_the_file_stays_readable() -> None:
    lines = SOURCE.splitlines()
    assert len(lines) < 11_200 and len(SOURCE.encode()) < 488 << 10
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_an_old_python_gets_a_sentence_and_no_syntax_error() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))


# ==================================================================================================
# 1. Errors
# ==================================================================================================


@pytest.mark.parametrize("status, type_", [
    (400, "invalid_request_error"), (401, "invalid_request_error"), (403, "permission_error"),
    (404, "invalid_request_error"), (413, "invalid_request_error"), (429, "rate_limit_error"),
    (500, "server_error"), (501, "server_error"), (502, "upstream_error"),
    (503, "overloaded_error"), (504, "timeout"),
])
def test_an_error_has_the_type_of_its_status(status: int, type_: str) -> None:
    assert GatewayError(status, "x").type == type_
    assert GatewayError(status, "x", type="own").type == "own"


def test_config_errors_name_the_file() -> None:
    assert str(ConfigError("c.json", "is bad")) == "c.json: is bad"
    assert str(ConfigError("", "all of it")) == "all of it"


# ==================================================================================================
# 2. Model
# ==================================================================================================


@pytest.mark.parametrize("value, counted", [
    (0, 0), (7, 7), (-1, 0), (True, 0), (1.5, 0), ("3", 0), (None, 0), ([], 0), ({}, 0),
])
def test_what_is_no_count_is_0(value: object, counted: int) -> None:
    assert gateway.count(value) == counted


TWO_MB, TEN_MB = 2_000_000, 10_000_000
HOSTILE_JSON = {
    "empty": b"", "blank": b" \n", "open": b"{", "brackets": b"[" * 100_000,
    "deep list": b'{"a":' + b"[" * 100_000, "deep object": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "10 MB integer": b'{"a":' + b"1" * TEN_MB + b"}",
    "NaN": b'{"a":NaN}', "Infinity": b'{"a":Infinity}', "-Infinity": b'{"a":[{"b":-Infinity}]}',
    "a key twice": b'{"a":1,"b":2,"a":1}', "a key twice, spelt apart": b'{"a":1,"\\u0061":1}',
    "BOM": b'\xef\xbb\xbf{"a":1}', "UTF-16": '{"a":1}'.encode("utf-16"),
    "invalid UTF-8": b'{"a":"\xff"}', "cut UTF-8": b'{"a":"\xc3"}', "overlong": b'{"a":"\xc0\xaf"}',
    "raw lone surrogate": b'{"a":"\xed\xa0\x80"}', "NUL": b'{"a":"\x00"}', "NUL behind": b"{}\x00",
    "a list": b"[1]", "a string": b'"a"', "a number": b"1", "null": b"null", "true": b"true",
    "text behind": b'{"a":1} x', "two objects": b'{"a":1}{"b":2}', "a comma behind": b'{"a":1},',
    "trailing comma": b'{"a":1,}', "only a comma": b"{,}", "leading comma": b'{,"a":1}',
    "no comma": b'{"a":1 "b":2}', "no colon": b'{"a" 1}', "no value": b'{"a":}',
    "no value at the end": b'{"a":', "bare key": b"{a:1}", "number for a key": b"{1:1}",
    "single quotes": b"{'a':1}", "comment": b'{"a":1/**/}', "raw newline": b'{"a":"x\ny"}',
    "bad escape": b'{"a":"\\x"}', "bad unicode escape": b'{"a":"\\u12g4"}',
    "leading 0": b'{"a":01}',
    "plus": b'{"a":+1}', "hexadecimal": b'{"a":0x1}', "bare point": b'{"a":.5}',
    "form feed": b'\x0c{"a":1}', "no-break space": '{\u00a0"a":1}'.encode(), "cut": b'{"a":"x',
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_refused_at_once(name: str) -> None:
    began = time.perf_counter()
    error = refusal(gateway.Body, HOSTILE_JSON[name])
    assert (error.status, error.type) == (400, "invalid_request_error")
    assert len(error.message) < 300 and "sys." not in error.message
    assert time.perf_counter() - began < 1.0  # a tenth is promised; machines that test are loaded


def test_an_error_quotes_nothing_of_the_body() -> None:
    """Neither in what the client reads, nor in the cause, which the log tells."""
    for body in (b'{"a":secret}', b'{"a":"secret\\x"}', b'{"secret":1,"secret":2}',
                 b'{"a":1}secret',
                 b'{"secret":"\xff"}', b'{"secret" 1}', b'{"a":"\\secret"}'):
        error = refusal(gateway.Body, body)
        assert "secret" not in error.message + str(error.__cause__), body


def test_what_lies_deeper_than_the_top_is_not_judged() -> None:
    """The provider may know better; only what a route is read from is strict."""
    text = b'{"a":{"b":1,"b":2},"n":1e400,"s":"\\ud800","i":12345678901234567890}'
    assert gateway.Body(text).get("a") == {"b": 2}
    assert gateway.Body(b' {"a" : [1]} ').tree() == {"a": [1]}
    assert gateway.Body(b"{}").get("a") is None


# The value of `model` stands between the marks.
SPLICED = [
    '{"model":«"a"»}', '{"model":«"a"», "messages":[]}', '{"messages":[],"model":«"a"»}',
    ' \r\n\t{ "model" \t:\n «"a"» , "x": [1, {"model": "b"}] } \n',
    '{"näme":"🦜 ü","model":«"ä🦜"»,"z":"é\u2028\u0085"}', '{"modèl":1,"model":«"é"»}',
    '{"t": 0.30, "big": 1e400, "i": 12345678901234567890, "z": -0, "model":«1.50», "e": 1E+2}',
    '{"mod\\u0065l":«"a"»,"\\u00e9":"\\ud83e\\udd9c","x":"\\ud800"}',
    '{"a\\"b{":"}","model":«null»,"c":"\\\\"}', '{"x":"\\"model\\":1","model":«"\\""»}',
    '{"model":«{"deep":["\\ud83d\\ude00","}"]}»,"x":1}', '{"a":{"b":1,"b":2},"model":«""»}',
]


@pytest.mark.parametrize("marked", SPLICED)
@pytest.mark.parametrize("value, encoded", [
    ("gpt-5.2", '"gpt-5.2"'), ("é🦜\u2028", '"é🦜\u2028"'), ('"\\\n', '"\\"\\\\\\n"'),
    ("\ud800", '"\\ud800"'), ({"a": [1, None]}, '{"a":[1,null]}'),
])
def test_a_splice_changes_no_other_byte(marked: str, value: object, encoded: str) -> None:
    before, old, after = re.split("[«»]", marked)
    document = gateway.Body((before + old + after).encode())
    assert document.with_values({"model": value}) == (before + encoded + after).encode()
    assert document.with_values({}) is document.body


@pytest.mark.parametrize("body, values, spliced", [
    ("{}", {"n": True}, '{"n":true}'), (" { } ", {"n": 1}, ' { "n":1} '),
    ('{"a":"}"}\n', {"n": 1, "o": "é"}, '{"a":"}","n":1,"o":"é"}\n'),
    ('{"a":"é", "b":2}', {"b": "è", "n": 1, "a": 0}, '{"a":0, "b":"è","n":1}'),
    ('{"n":1,"é":2,"n2":3}', {"n2": 4, "n": 5}, '{"n":5,"é":2,"n2":4}'),
])
def test_several_values_and_new_ones(body: str, values: dict[str, object], spliced: str) -> None:
    assert gateway.Body(body.encode()).with_values(values) == spliced.encode()


@pytest.mark.parametrize("body", [
    b'{"' + b"k" * TWO_MB + b'":1}', b'{"a":"' + b"x" * TWO_MB + b'"}', b"{" + b" " * TWO_MB + b"}",
    b'{"' + b"k" * TWO_MB, b'{"a"' + b" " * TWO_MB + b":", b'{"a":1' + b" " * TWO_MB + b"x",
    '{"é":"'.encode() + b"x" * TWO_MB + b'"}',
], ids=brief)
def test_a_large_body_costs_a_few_times_its_size(body: bytes) -> None:
    tracemalloc.start()
    try:
        gateway.Body(body).with_values({"model": "m"})
    except GatewayError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 5 * len(body)


@pytest.mark.parametrize("value, dumped", [
    ({"a": [1, "é"]}, '{"a":[1,"é"]}'), ("\ud83d", '"\\ud83d"'), ("🦜", '"🦜"'), (None, "null"),
])
def test_dumped_json_is_compact_and_always_utf_8(value: object, dumped: str) -> None:
    assert gateway.dump_json(value) == dumped.encode()


# ==================================================================================================
# 3. SSE
# ==================================================================================================

EVENTS: list[tuple[str, list[str]]] = [
    ("data: a\n\n", ["a"]),
    ("data:a\n\ndata:  b \n\n", ["a", " b "]),
    ("event: x\ndata: a\ndata:\ndata: b\n\n", ["a\n\nb"]),
    (": comment\n\nid: 1\nretry: 5\ndata: a\nunknown\n\n: data: no\n\n", ["a"]),
    ("event: only\n\ndata\n\n\n\n\ndata: a\n\n", ["a"]),
    ("event:x\ndata:1\n\ndata:2\n\n", ["1", "2"]),
    ("data: é🦜\u2028\u2029\x85\x1c\x0b\n\n", ["é🦜\u2028\u2029\x85\x1c\x0b"]),
    ("data: a: b\ndatax: no\n\ndata: last", ["a: b", "last"]),
    ("data: a\n\ndata: last\n", ["a", "last"]),
    ("\ndata: a\n\n", ["a"]),
    ("", []), ("\n\n", []),
]


def blocks_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The whole events of a stream that comes in these pieces, and what it ends in."""
    cutter = gateway.EventCutter(1 << 20)
    yield from map(cutter.feed, pieces)
    yield cutter.rest()


def decoded(pieces: Iterable[bytes]) -> list[bytes]:
    events = [gateway.event_data(raw) for block in blocks_of(pieces)
              for raw in gateway.split_events(block)]
    return list(filter(None, events))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("text, expected", EVENTS)
def test_events_are_the_same_however_they_are_cut(
        text: str, expected: list[str], end: str) -> None:
    stream = text.replace("\n", end).encode()
    for pieces in cuts(stream):
        events = decoded(pieces)
        assert events == [data.encode() for data in expected], pieces


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_the_cutter_gives_whole_events_at_once_and_every_byte(end: str) -> None:
    events = [text.replace("\n", end).encode() for text in (
        "data: a\n\n", ": c\n\n", "event: x\ndata: [\n\n", "data: é\u2028\n\n")]
    stream = b"".join(events) + b"data: rest"
    ends = list(itertools.accumulate(map(len, events)))
    for pieces in cuts(stream):
        budget = gateway.Budget(1000)
        cutter, out, fed = gateway.EventCutter(1000, budget.take), b"", 0
        for piece in pieces:
            fed += len(piece)
            out += cutter.feed(piece)
            assert len(out) == max([at for at in ends if at <= fed], default=0), pieces
            assert cutter.held_bytes == budget.held == fed - len(out)
        assert out + cutter.rest() == stream
        assert cutter.held_bytes == budget.held == 0


def test_line_ends_may_be_mixed() -> None:
    stream = b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\ndata: d\n\n"
    for pieces in cuts(stream):
        events = decoded(pieces)
        assert b"".join(events) == b"abcd", pieces


def test_one_event_is_bounded_and_a_stream_is_not() -> None:
    for pieces in cuts(b"data: 4567\n\n" * 5):
        cutter = gateway.EventCutter(12)
        assert sum(len(cutter.feed(piece)) for piece in pieces) == 60
    for data in (b"data: 45678901", b"data: a\n\n" + b"x" * 13):
        for pieces in cuts(data):
            error = refusal(lambda p=pieces: list(map(gateway.EventCutter(12).feed, p)))
            assert (error.status, error.provider_error) == (502, "bad_answer")


def test_all_unfinished_events_share_one_bound() -> None:
    budget = gateway.Budget(20)
    first, second = (gateway.EventCutter(1000, budget.take) for _ in range(2))
    assert first.feed(b"data: 123456") == b""
    assert refusal(second.feed, b"data: 123456").status == 502
    second.rest()
    assert first.feed(b"\n\ndata: 1") == b"data: 123456\n\n" and budget.held == 7
    assert second.feed(b"data: 1") == b""
    assert (first.rest(), second.rest(), budget.held) == (b"data: 1", b"data: 1", 0)


@pytest.mark.parametrize("name, wire", [
    ("", b'data: {"a":1}\n\n'), ("ping", b'event: ping\ndata: {"a":1}\n\n')])
def test_written_events_are_read_back(name: str, wire: bytes) -> None:
    assert gateway.sse(b'{"a":1}', name) == wire
    assert decoded([wire]) == [b'{"a":1}']


# ==================================================================================================
# 4. Dialects
# ==================================================================================================

CHAT = gateway.DIALECTS["chat"]


def test_an_error_has_the_dialects_shape() -> None:
    error = GatewayError(404, 'no "é"', "model", "model_not_found")
    body = CHAT.render_error(error, "gw-1")
    assert json.loads(body) == {"error": {
        "message": 'no "é"', "type": "invalid_request_error", "param": "model",
        "code": "model_not_found"}}
    assert CHAT.render_stream_error(error, "gw-1") == b"data: " + body + b"\n\n"


@pytest.mark.parametrize("wire, status, label, message", [
    ({"message": "slow", "type": "rate_limit_error"}, 429, "rate_limit", "slow"),
    ({"message": "x", "code": "invalid_api_key"}, 401, "auth", "x"),
    ({"message": "x", "type": "billing_error"}, 402, "auth", "x"),
    ({"message": "x", "type": "overloaded_error"}, 503, "server_error", "x"),
    ({"message": "x", "type": "new", "code": "context_length_exceeded"}, 400, "client_error", "x"),
    ({"message": "x", "code": 429}, 429, "rate_limit", "x"),
    ({"message": "x", "code": 7}, 502, "server_error", "x"),
    ({"message": ["x"], "type": {}, "code": []}, 502, "server_error", '["x"]'),
    ("in words", 502, "server_error", "in words"), ([1], 502, "server_error", "[1]"),
    ({"detail": [{"msg": "field required"}]}, 502, "server_error", '[{"msg":"field required"}]'),
    ({"detail": "No luck"}, 502, "server_error", "No luck"),
    ({"message": {}, "errors": ["a"]}, 502, "server_error", '["a"]'),
    (True, 502, "server_error", "The provider reported an error."),
])
def test_a_providers_error_keeps_its_words(
        wire: object, status: int, label: str, message: str) -> None:
    error = CHAT.parse_error(wire, 200)  # as in a stream
    assert (error.status, error.provider_error, error.message) == (status, label, message)
    assert error.is_quoted, "the log must leave these words out"
    json.loads(CHAT.render_error(error, ""))


def test_a_providers_error_that_is_nested_deeper_than_can_be_told_is_one() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert CHAT.parse_error({"message": deep}, 200).message == "The provider reported an error."


def test_an_http_status_of_its_own_stands() -> None:
    """Whatever type a provider's error names, its 502 stays a 502 and its 409 is not invented."""
    assert CHAT.parse_error({"message": "x", "type": "api_error"}, 502).status == 502
    assert CHAT.parse_error({"message": "x", "type": "conflict_error"}, 200).status == 502


@pytest.mark.parametrize("more, param", [
    ({"response_format": {}}, "response_format.type"),
    ({"tools": [{"type": "custom", "custom": {"name": "f", "format": {}}}]},
     "tools[0].custom.format.type"),
])
def test_an_empty_object_is_not_an_absent_one(more: dict[str, Any], param: str) -> None:
    wire = {"model": "m", "messages": [{"role": "user", "content": "a"}], **more}
    assert refusal(CHAT.parse_request, wire, gateway.Losses()).param == param


def test_citations_count_from_where_the_content_starts() -> None:
    cited = Text(text="hello", citations=[{"url": "u", "title": "t"}])
    reply = gateway.Reply("r", "m", [Text(text="no", is_refusal=True), cited], "stop", Usage())
    message = CHAT.render_reply(reply, gateway.Chat("m", []), 0)["choices"][0]["message"]
    place = message["annotations"][0]["url_citation"]
    assert (message["content"], place["start_index"], place["end_index"]) == ("hello", 0, 5)


def test_citations_on_a_chat_part_are_unknown() -> None:
    losses = gateway.Losses()
    CHAT.parse_request({"model": "m", "messages": [{"role": "user", "content": [
        {"type": "text", "text": "a", "citations": [1]}]}]}, losses)
    assert "unknown" in losses.names


@pytest.mark.parametrize("before, after", [
    ('{"a":1,"b":2,"c":3}', '{"b":2,"c":3}'),
    ('{ "b" : 2 , "a" : 1, "c":3 }', '{ "b" : 2, "c":3 }'),
    ('{"b":2,"a":1}', '{"b":2}'), ('{"a":1,"x":0,"b":2}', '{"b":2}'), ('{"a":1,"x":0}', "{}"),
    ('{"b":2,"a":1,"x":0}', '{"b":2}'), ('{"a":1,"b":0.30,"x":1e2}', '{"b":0.30}'), ("{}", "{}"),
])
def test_keys_are_left_out_and_all_other_bytes_stay(before: str, after: str) -> None:
    body = gateway.Body(before.encode())
    assert body.with_values({}, {"a", "x"}).decode() == after
    tree = json.loads(body.with_values({"new": [1]}, {"a", "x"}))
    assert tree == {**json.loads(after), "new": [1]}


def test_edits_reach_into_a_passed_body() -> None:
    edits = gateway.Edits({"set.deep": {"x": 1}}, ("gone", "kept.inner"), {"old": "new"})
    body = gateway.Body(b'{"gone":1,"kept":{"inner":1,"o":2},"old":"v","same":1e400}')
    losses = gateway.Losses()
    values, dropped = edits.of_passed(body, {"old": "w", "gone": 2, "set": {"x": 1}}, losses)
    assert json.loads(body.with_values(values, dropped)) == {
        "kept": {"o": 2}, "same": float("inf"), "new": "w", "set": {"x": 1, "deep": {"x": 1}}}
    assert b'"same":1e400' in body.with_values(values, dropped)
    assert list(losses.names) == ["gone", "kept.inner"]


def test_labels_are_of_the_closed_list() -> None:
    assert {gateway.error_label(status) for status in range(400, 600)} == {
        "auth", "rate_limit", "client_error", "server_error"} < set(gateway.PROVIDER_ERRORS)


@pytest.mark.parametrize("wire, usage", [
    ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}, Usage(9, 4)),
    ({"prompt_tokens": 9, "completion_tokens": 4,
      "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 2, "audio_tokens": 1},
      "completion_tokens_details": {"reasoning_tokens": 3}}, Usage(9, 4, 5, 2, 0, 3)),
    ({"prompt_tokens": 9, "prompt_tokens_details": None, "completion_tokens_details": {}},
     Usage(9)),
    ({"prompt_tokens": "9", "completion_tokens": -4}, Usage()),
    ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 20,
      "completion_tokens_details": {"reasoning_tokens": 7}}, Usage(9, 11, reasoning=7)),
    ({"prompt_tokens": 9, "prompt_tokens_details": "x", "completion_tokens_details": [1]},
     Usage(9)),
    ({}, Usage()), (None, None), ([], None), ("x", None),
])
def test_usage_is_read(wire: object, usage: Usage | None) -> None:
    assert CHAT.parse_usage(wire) == usage


@pytest.mark.parametrize("body, asks, asked", [
    (b'{"a":1}', False, b'{"a":1,"stream_options":{"include_usage":true}}'),
    (b'{"stream_options":null}', False, b'{"stream_options":{"include_usage":true}}'),
    (b'{"stream_options":{"include_usage":false,"x":[1]}}', False,
     b'{"stream_options":{"include_usage":true,"x":[1]}}'),
    (b'{"stream_options":{"include_usage":true}}', True,
     b'{"stream_options":{"include_usage":true}}'),
    (b'{"stream_options":{"x":"\\ud800"}}', False,
     b'{"stream_options":{"x":"\\ud800","include_usage":true}}'),
])
def test_usage_is_asked_for(body: bytes, asks: bool, asked: bytes) -> None:
    document = gateway.Body(body)
    values = CHAT.values_for_usage(document)
    assert (not values) is asks and document.with_values(values) == asked


def test_what_is_asked_for_is_json() -> None:
    """json.dumps spells a number too large for a float Infinity, which no JSON parser takes."""
    document = gateway.Body(b'{"stream_options":{"x":1e400}}')
    gateway.Body(document.with_values(CHAT.values_for_usage(document))).tree()


@pytest.mark.parametrize("reply, counted", [
    ({"choices": [{"message": {"content": "é"}}, {"message": {"content": ""}}]}, 30),
    ({"choices": []}, 0), ({}, 0), ({"choices": {}}, 0), ({"choices": [1, "x", None]}, 0),
])
def test_content_without_usage_is_weighed(reply: dict[str, Any], counted: int) -> None:
    assert CHAT.count_content(reply) == counted


def chunk(choices: object = (), **more: object) -> bytes:
    """One event of a stream; a choice is a delta, or (delta, finish_reason)."""
    if isinstance(choices, tuple):
        choices = [{"index": i, "delta": choice, "finish_reason": None}
                   if isinstance(choice, dict) else
                   {"index": i, "delta": {}, "finish_reason": choice}
                   for i, choice in enumerate(choices)]
    return gateway.sse(gateway.dump_json({"id": "x", "choices": choices, **more}))


def usage_chunk(prompt: int, **more: object) -> bytes:
    return chunk([], usage={"prompt_tokens": prompt, "completion_tokens": 2}, **more)


def watched(pieces: Iterable[bytes], hide_usage: bool = True,
            needs_done: bool = True) -> tuple[bytes, gateway.Watch]:
    """What a client sees of a stream that comes in these pieces, and the watch at its end."""
    cutter, watch = gateway.EventCutter(100_000), CHAT.watch(hide_usage, needs_done)
    out = b""
    for piece in pieces:
        block = cutter.feed(piece)
        if block and not (watch.ended or watch.failure):
            out += watch.feed(block)
    rest = cutter.rest()
    if rest and not (watch.ended or watch.failure):
        out += watch.feed(rest + b"\n\n")
    return out + (b"" if watch.ended else watch.end()), watch


ROLE = chunk(({"role": "assistant", "content": ""},))
HI = chunk(({"content": "hi"},))
NULL = chunk(({"content": "ho"},), usage=None)
STOP = chunk(("stop",))
DONE = b"data: [DONE]\n\n"
COMMENT = b": still here\n\n"
TRICKY = chunk(({"content": 'data: [DONE]\n\n"usage":{"error":1} \u2028 [DONE] "error"'},))
FAILED = gateway.sse(b'{"error":{"message":"no","type":"rate_limit_error"}}')
NO_USAGE = chunk([], filter={"usage": {"hate": 0}})
WHOLE = chunk(("stop",), usage={"prompt_tokens": 7, "completion_tokens": 2})
NAN = WHOLE.replace(b"{", b'{"logprob":NaN,', 1)

# What comes; what of it is seen where the usage is to be hidden; prompt tokens; how it ends.
STREAMS: dict[str, tuple[list[bytes], list[bytes], int | None, str]] = {
    "plain": ([ROLE, HI, STOP, DONE], [ROLE, HI, STOP, DONE], None, "ended"),
    "usage": ([ROLE, HI, STOP, usage_chunk(7), DONE], [ROLE, HI, STOP, DONE], 7, "ended"),
    "null in the others": ([ROLE, NULL, usage_chunk(7), DONE], [ROLE, NULL, DONE], 7, "ended"),
    "with the last content": ([HI, WHOLE, DONE], [HI, WHOLE, DONE], 7, "ended"),
    "in one with NaN": ([HI, NAN, DONE], [HI, NAN, DONE], 7, "ended"),
    "in each chunk": ([WHOLE, HI, WHOLE, usage_chunk(9), DONE], [WHOLE, HI, WHOLE, DONE], 9,
                      "ended"),
    "not the last": ([HI, usage_chunk(7), STOP, DONE], [HI, usage_chunk(7), STOP, DONE], 7,
                     "ended"),
    "twice": ([HI, usage_chunk(7), HI, usage_chunk(8), HI, DONE],
              [HI, usage_chunk(7), HI, usage_chunk(8), HI, DONE], 8, "ended"),
    "twice, then done": ([HI, usage_chunk(7), usage_chunk(8), DONE], [HI, usage_chunk(7), DONE], 8,
                         "ended"),
    "moderation": ([HI, usage_chunk(7, moderation={"a": 1}), DONE],
                   [HI, usage_chunk(7, moderation={"a": 1}), DONE], 7, "ended"),
    "comments": ([COMMENT, HI, usage_chunk(7), COMMENT, COMMENT, DONE],
                 [COMMENT, HI, COMMENT, COMMENT, DONE], 7, "ended"),
    "more after the end": ([HI, usage_chunk(7), DONE, HI, FAILED], [HI, DONE], 7, "ended"),
    "done twice": ([HI, usage_chunk(7), DONE, DONE], [HI, DONE], 7, "ended"),
    "done twice, and more between": ([HI, usage_chunk(7), DONE, usage_chunk(8), FAILED, DONE],
                                     [HI, DONE], 7, "ended"),
    "usage that is none": ([HI, NO_USAGE, DONE], [HI, NO_USAGE, DONE], None, "ended"),
    "telling words in a text": ([TRICKY, usage_chunk(7), DONE], [TRICKY, DONE], 7, "ended"),
    "spaces": ([HI, b"data:  [DONE] \n\n"], [HI, b"data:  [DONE] \n\n"], None, "ended"),
    "an error": ([HI, FAILED, HI, DONE], [HI, FAILED], None, "failed"),
    "an error after usage": ([HI, usage_chunk(7), FAILED, DONE], [HI, usage_chunk(7), FAILED], 7,
                             "failed"),
    "an error first": ([FAILED, DONE], [FAILED], None, "failed"),
    "cut": ([ROLE, HI], [ROLE, HI], None, "cut"),
    "cut after usage": ([HI, STOP, usage_chunk(7)], [HI, STOP], 7, "cut"),
    "nothing": ([COMMENT], [COMMENT], None, "cut"),
    "no JSON": ([b"data: x\n\n", b"event: y\ndata: [1]\n\n", b"data: NaN\n\n", DONE],
                [b"data: x\n\n", b"event: y\ndata: [1]\n\n", b"data: NaN\n\n", DONE], None,
                "ended"),
}


def ending(watch: gateway.Watch) -> str:
    if watch.failure is None:
        return "ended" if watch.ended else "open"
    return "cut" if watch.failure.provider_error == "stream_error" else "failed"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_passes_however_it_is_cut(name: str, end: bytes) -> None:
    events, seen, prompt, how = STREAMS[name]
    events = [event.replace(b"\n", end) for event in events]
    for pieces in itertools.chain(blocks(events), cuts(b"".join(events))):
        out, watch = watched(pieces)
        assert out == b"".join(seen).replace(b"\n", end), pieces
        assert (watch.usage and watch.usage.input) == prompt
        assert ending(watch) == how


@pytest.mark.parametrize("name", STREAMS)
def test_usage_that_was_asked_for_stays(name: str) -> None:
    events, _, prompt, how = STREAMS[name]
    stream = b"".join(events)
    last = {"ended": DONE, "failed": FAILED}.get(how)
    if last in events:
        stream = stream[:stream.index(last) + len(last)]
    for pieces in itertools.chain(blocks(events), cuts(b"".join(events))):
        out, watch = watched(pieces, hide_usage=False)
        assert out == stream, pieces
        assert (watch.usage and watch.usage.input) == prompt
        assert ending(watch) == how


@pytest.mark.parametrize("events, seen, how", [
    ([HI, STOP], [HI, STOP], "ended"), ([HI, STOP, usage_chunk(7)], [HI, STOP], "ended"),
    ([HI, STOP, DONE], [HI, STOP, DONE], "ended"), ([HI], [HI], "cut"),
    ([ROLE, chunk(("stop", {"content": "b"}))], [ROLE, chunk(("stop", {"content": "b"}))], "cut"),
    ([chunk(("stop", {"content": "b"})), chunk(("stop", "length"))],
     [chunk(("stop", {"content": "b"})), chunk(("stop", "length"))], "ended"),
    ([COMMENT], [COMMENT], "cut"), ([STOP, FAILED], [STOP, FAILED], "failed"),
])
def test_without_done_each_choice_must_finish(
        events: list[bytes], seen: list[bytes], how: str) -> None:
    for pieces in itertools.chain(blocks(events), cuts(b"".join(events))):
        out, watch = watched(pieces, needs_done=False)
        assert (out, ending(watch)) == (b"".join(seen), how), pieces


def test_done_without_its_blank_line_is_an_end() -> None:
    for pieces in cuts(HI + usage_chunk(7) + b"data: [DONE]"):
        out, watch = watched(pieces)
        assert (out, ending(watch)) == (HI + DONE, "ended"), pieces


def test_an_error_in_a_stream_is_told_as_what_it_is() -> None:
    failure = watched([FAILED])[1].failure
    assert failure and (failure.status, failure.provider_error) == (429, "rate_limit")
    cut = watched([HI])[1].failure
    assert cut and (cut.status, cut.provider_error) == (502, "stream_error")


@pytest.mark.parametrize("event, has_content", [
    (ROLE, False), (COMMENT, False), (usage_chunk(7), False), (chunk([]), False), (HI, True),
    (chunk(({"role": "assistant", "content": None, "refusal": None},)), False),
    (chunk(({},)), False), (chunk([{"index": 0}]), False), (chunk([{"delta": None}]), False),
    (chunk(({"role": "assistant", "content": "x"},)), True), (chunk(({"refusal": "x"},)), True),
    (chunk(({"reasoning_content": "x"},)), True), (STOP, True),
    (chunk(({"tool_calls": [{"index": 0}]},)), True), (chunk(({}, {"content": "x"})), True),
])
def test_the_first_token_is_content(event: bytes, has_content: bool) -> None:
    assert watched([event])[1].has_content is has_content


@pytest.mark.parametrize("events, least, most", [
    ([ROLE] + [chunk(({"content": "twenty characters .."},))] * 10, 180, 280),
    ([ROLE] + [COMMENT] * 5 + [chunk(({"content": "twenty characters .."},))] * 10, 180, 360),
    ([HI] * 100, 200, 200), ([ROLE], 0, 1), ([COMMENT, ROLE, COMMENT], 0, 3), ([], 0, 0),
], ids=["text", "pings", "short", "role", "no content", "nothing"])
def test_content_is_weighed_without_its_envelope(events: list[bytes], least: int,
                                                 most: int) -> None:
    """An aborted stream is charged by it: nothing for roles and pings, about its text for text."""
    for pieces in (events, [b"".join(events)]):
        assert least <= watched(pieces)[1].content_bytes <= most


WRONG_VALUES: list[object] = [None, True, 1, 1.5, "x", [], [1], {}, {"x": 1}, [[]], [{}], [None]]


@pytest.mark.parametrize("needs_done", [True, False])
@pytest.mark.parametrize("make", [
    lambda x: {"choices": x}, lambda x: {"choices": [x]}, lambda x: {"choices": [{"delta": x}]},
    lambda x: {"choices": [{"index": x, "delta": {"content": "a"}}]},
    lambda x: {"choices": [{"index": 0, "delta": {"content": x}}]},
    lambda x: {"choices": [{"finish_reason": x}]}, lambda x: {"choices": [], "usage": x},
    lambda x: {"choices": [], "usage": {"prompt_tokens": x, "completion_tokens": x}},
    lambda x: {"choices": [], "usage": {"prompt_tokens_details": x}},
    lambda x: {"choices": [], "usage": {"completion_tokens_details": x}},
    lambda x: {"choices": [], "usage": {}, "moderation": x}, lambda x: {"error": x},
    lambda x: {"error": {"message": x, "code": x, "type": x}}, lambda x: x,
], ids=range(14))
def test_wrong_types_in_a_stream_harm_nobody(make: Any, needs_done: bool) -> None:
    """A provider can send anything: it passes, or ends the stream as an error."""
    for value in WRONG_VALUES:
        event = gateway.sse(gateway.dump_json(make(value)))
        out, watch = watched([event + HI + DONE], hide_usage=False, needs_done=needs_done)
        assert out == event + HI + DONE or (watch.failure and out == event), value


# ==================================================================================================
# 5. Providers
# ==================================================================================================


@pytest.mark.parametrize("name", gateway.KINDS)
def test_a_kind_is_complete(name: str) -> None:
    kind = gateway.KINDS[name]
    first, *others = kind.paths
    assert first in gateway.DIALECTS
    assert all(f"/v1{other}" in gateway.ROUTES or other.startswith(":") or other.partition(" ")[0]
               in gateway.DIALECTS for other in others)
    assert all(path.startswith("/") for path in kind.paths.values())
    if kind.base_url is not None:
        assert gateway.settle_base_url(kind.base_url, kind.version) == kind.base_url
        assert kind.base_url.startswith(("https://", "http://127.0.0.1:"))
        assert kind.base_url.endswith(kind.version)
    header, form = kind.auth
    assert header in gateway.SECRET_HEADERS and form.format("KEY").endswith("KEY")
    assert all(field == field.lower() for field, _ in kind.headers)


# ==================================================================================================
# 6. Config
# ==================================================================================================

UPSTREAM_KEY, HEADER_SECRET = "sk-upstream-very-secret", "header-very-secret"
VIRTUAL_KEY, OTHER_KEY = "vk-virtual-very-secret", "vk-another-very-secret"
BASE: dict[str, Any] = {
    "listen": "127.0.0.1:8080",
    "providers": {
        "openai": {"api_key": UPSTREAM_KEY, "headers": {"X-Team": HEADER_SECRET}},
        "local": {"kind": "openai-compatible", "base_url": "http://127.0.0.1:8000/v1"}},
    "models": {"fast": {"provider": "openai", "model": "gpt-5.2"}},
    "routing": [{"prefix": "gpt-", "provider": "openai"}],
    "api_keys": [{"key": VIRTUAL_KEY, "app": "chatbot"}, {"key": OTHER_KEY, "app": "other"}],
}
GONE = "(gone)"


def changed(*changes: tuple[str, object]) -> dict[str, Any]:
    """BASE with values put at paths as the errors write them: ("api_keys[1].app", "x")."""
    tree = copy.deepcopy(BASE)
    for path, value in changes:
        *way, last = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
        place: Any = tree
        for key in way:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        if value == GONE:
            del place[last]
        else:
            place[last] = value
    return tree


def no_file(name: str) -> str:
    raise FileNotFoundError(2, "No such file or directory", name)


def parsed(config: object, env: dict[str, str] | None = None,
           read_file: Any = no_file) -> gateway.Config:
    text = config if isinstance(config, str) else json.dumps(config)
    return gateway.parse_config(text, "config.json", env or {}, read_file)


def told(config: object, env: dict[str, str] | None = None, read_file: Any = no_file) -> list[str]:
    """The lines of the error that a config is refused with; no secret may be among them."""
    with pytest.raises(ConfigError) as caught:
        parsed(config, env, read_file)
    assert "very-secret" not in str(caught.value)
    lines = [re.fullmatch("(?:warning: )?config[.]json: (.+)", line)
             for line in str(caught.value).split("\n")]
    assert all(lines), str(caught.value)
    return [line[1] for line in lines if line]


# A path, what stands there, and what is said of it after the path.
REFUSED: list[tuple[str, object, str]] = [
    ("listen", "8080", ": must be"), ("listen", 8080, ": must be"),
    ("listen", ":65536", ": must be"), ("listen", "unix:", ": needs a path"),
    ("listen", "::1:8080", ": must be"), ("listen", "a\nb:80", ": must be"),
    ("providers", GONE, ": is missing"), ("providers", [], ": must be an object"),
    ("providers.x", {}, ".kind: is missing"), ("providers.x", 5, ": must be an object, not 5"),
    ("providers.x", {"kind": "openai-compatible"}, ".base_url: is missing"),
    ("providers.x", {"kind": "opnai", "base_url": "http://h/v1"}, ".kind: must be one of"),
    ("providers.a b", {"kind": "openai", "api_key": "k"}, ": "),
    ("providers.openai.base_url", "api.openai.com/v1", ": must start with"),
    ("providers.openai.base_url", "ftp://h/v1", ": must start with"),
    ("providers.openai.base_url", "https://", ": must start with"),
    ("providers.openai.base_url", "https://h:99999", ": "),
    ("providers.openai.base_url", "https://[::1/v1", ": "),
    ("providers.openai.base_url", "https://u:very-secret@h/v1", ": must be"),
    ("providers.openai.base_url", "https://h/v1?a=1", ": must be"),
    ("providers.openai.base_url", "https://h\r\nx: 1/v1", ": must be"),
    ("providers.openai.base_url", "https://h€st/v1", ": "),
    ("providers.openai.api_key", "sk-very-secret\nx", ": must be a string"),
    ("providers.openai.api_key", "sk-very-secret\x7f", ": must be a string"),
    ("providers.openai.api_key", "sk-very-secret-€", ": "),
    ("providers.openai.headers", {"a b": "1"}, ": 'a b' is not a header"),
    ("providers.openai.headers", {"a": "1\r\nb: 2"}, ".a: must be"),
    ("providers.openai.headers", {"a": 1}, ".a: must be"),
    ("providers.openai.headers", {"a": "€"}, ".a: "),
    ("providers.openai.timeouts", {"conect": 1}, ".conect: unknown key; did you mean 'connect'?"),
    ("providers.openai.timeouts", {"idle": 0}, ".idle: must be"),
    ("providers.openai.done", "yes", ": must be true or false, not a string"),
    ("timeouts.idle", 10**400, ": this number is too long"),
    ("providers.openai.api_kye", "very-secret", ": unknown key; did you mean 'api_key'?"),
    ("models", [], ": must be an object"), ("models.fast", {}, ".provider: is missing"),
    ("models.fast.provider", "opnai",
     ": no provider 'opnai' is configured; did you mean 'openai'?"),
    ("models.fast.cost_per_million_input", -1, ": must be"),
    ("models.fast.cost_per_million_output", "1", ": must be"),
    ("models.fast.cost_per_million_input", True, ": must be"),
    ("routing[0]", {"provider": "openai"}, ": needs one of"),
    ("routing[0]", {"provider": "openai", "prefix": "a", "default": True}, ": needs one of"),
    ("routing[0]", {"prefix": "a"}, ".provider: is missing"),
    ("routing[0]", [], ": must be an object, not a list"), ("api_keys", GONE, ": is missing"),
    ("api_keys[1]", None, ": must be an object, not null"),
    ("api_keys[1]", {"app": "x"}, ".key: is missing"), ("api_keys[1].app", GONE, ": is missing"),
    ("api_keys[1].app", "a\x1bb", ": must be"), ("api_keys[1].app", "a\x7f", ": must be"),
    ("api_keys[1].key", "short", ": is shorter than 16 characters"),
    ("api_keys[1].key", VIRTUAL_KEY, ": is the key of api_keys[0] too"),
    ("api_keys[1].key", "vk very-secret 0123", ": must be ASCII"),
    ("api_keys[1].key", "vk-very-secret-é0123", ": must be ASCII"),
    ("api_keys[1].key", "vk-very-secret-0\t", ": must be"),
    ("api_keys[1].key", 1234567890123456, ": must be"),
    ("api_keys[1].allowed_models", "gpt-*", ": must be a list"),
    ("api_keys[1].allowed_models", ["a", 1], "[1]: must be"),
    ("api_keys[1].expires", "tomorrow", ": must be a day"),
    ("api_keys[1].expires", "2027-02-30", ": must be a day"),
    ("limits.body", 0, ": must be a whole number above 0"), ("limits.body", 1.5, ": must be"),
    ("limits.body", True, ": must be"), ("providers.openai.caps", {"max_stops": False}, ".max_"),
    ("limits.boddy", 1, ": unknown key; did you mean 'body'?"),
    ("timeouts.connect", -1, ": must be"), ("timeouts", 5, ": must be"),
    ("log", "xml", ': must be one of "text", "json", not a string'),
    ("log_headers", ["Authorization"], "[0]: is no header name, or one that"),
    ("log_headers", ["a b"], "[0]: is no header name"),
    ("log_headers", ["Virtual_Key"], "[0]: is no header name"),
    ("endpoints", {"v1/files": "openai"}, ".v1/files: must be a path"),
    ("providers.local.wire", "responses", ": is not spoken by provider 'local', unless"),
    ("models.fast", {"provider": "local", "wire": "responses"}, ".wire: is not spoken by"),
    ("api_keys[0].allowed_endpoints", ["v1/chat/*"], ": each must be a glob"),
    ("prices", 1, ": must be"),
    ("provider", {}, ": unknown key; did you mean 'prov"),
    ("api_keys[1].app", "a\ud800", ": must be"),
    ("log_headers", ["Status"], "[0]: is no header name, or one that"),
    ("providers.openai.headers", {"Content-Length": "5"}, ": 'Content-Length' is the connection"),
    ("zzz", 1, ": unknown key; known: listen, providers"),
]


@pytest.mark.parametrize("path, value, expected", REFUSED)
def test_a_bad_config_is_refused_with_its_path(path: str, value: object, expected: str) -> None:
    lines = told(changed((path, value)))
    assert lines[0].startswith(path + expected)
    assert len(lines) == 1 or path == "providers", "one fault is told once"


def test_a_whole_number_may_be_written_as_a_float() -> None:
    tree = changed(("limits.connections", 1e3), ("models.fast.max_output_tokens", 100.0),
                   ("providers.openai.caps", {"max_stops": 0.0}))
    config = parsed(tree)
    numbers = (config.limits.connections, config.models["fast"].max_output_tokens,
               config.providers["openai"].caps["max_stops"])
    assert numbers == (1000, 100, 0) and all(type(number) is int for number in numbers)


def test_every_refused_thing_is_told_at_once() -> None:
    """Errors and warnings, those of the environment among them, each with its path."""
    tree = changed(("listen", "x"), ("providers.openai.api_key", "${NONE}"), ("api_keys[1].app", 5),
                   ("routing[0].provider", "nobody"), ("limits.fields", "many"), ("colour", "red"),
                   ("models.fast.provider", "elsewhere"), ("api_keys[0].key", "${file:/none}"))
    assert sorted(line.partition(": ")[0] for line in told(tree)) == sorted([
        "listen", "providers.openai.api_key", "api_keys[1].app", "routing[0].provider",
        "limits.fields", "colour", "models.fast.provider", "api_keys[0].key"])


@pytest.mark.parametrize("text, expected", [
    ("", "is empty"), ("# c\n", "is empty"),
    ("null", "must be an object"), ("[]", "must be an object"),
    ('"x"', "must be an object"), ('{"a":1,}', "line 1, column "), ("{} x", "line 1, column 4: "),
    ("{}", "providers: is missing"),
    ('{"limits":{"body":NaN}}', "limits.body: NaN is not JSON"),
    ('{"limits":{"body":-Infinity}}', "limits.body: -Infinity is not JSON"),
    ('{"listen":1,"listen":2,"listen":3}', "listen: this key stands twice"),
    ('{"providers":{},"api_keys":[],"api_keys":[]}', "api_keys: this key stands twice"),
    ("[" * 100_000, "nested too deep"),
    ('{"listen":' + "[" * 990 + "]" * 990 + "}", "nested too deep"),
    ("\ufeff{}", "line 1, column 1"),
    ('{"limits":{"body":1' + "0" * 5000 + "}}", ""),
    ("{\n  # a comment,\n  // and another\n  \"listen\": :8080\n}", "line 4, column 13: "),
    ('#\n#\r\n//\n{"a": 1,\n   # "b"\n "c"}', "line 6, column 5: "),
], ids=brief)
def test_what_is_no_config_at_all(text: str, expected: str) -> None:
    assert told(text)[0].startswith(expected)


def test_a_key_twice_is_told_with_all_else_that_is_wrong() -> None:
    text = json.dumps(changed(("providers.openai.api_key", "${NONE}"), ("listen", "${LISTEN}")))
    text = text.replace('"app": "other"', '"app": "x", "app": "y"')
    text = text.replace('"models"', '"models": [], "models"')
    lines = sorted(told(text, {"LISTEN": ":80"}))
    assert lines[0].startswith("api_keys[1].app: this key stands twice") and len(lines) == 3
    assert lines[1].startswith("models: this key stands twice")
    assert lines[2].startswith("providers.openai.api_key: environment variable NONE is not set")


@pytest.mark.parametrize("path, value", [
    ("api_keys[0].key", 4711471147114711), ("providers.openai.api_key", 4711471147114711),
    ("providers.openai.api_key", 4711.4711), ("providers.openai.headers", {"x-a": 47114711}),
    ("api_keys[0]", {"vk-4711-4711": "app"}), ("providers.openai.api_key", "${sk-4711-4711}"),
    ("api_keys[0].key", "pa$SECRET4711"), ("providers.openai.base_url", "https://gw:4711x/y@h/v1"),
    ("providers.openai.base_url", "https://[4711"), ("models.fast.provider", "${SECRET}"),
    ("endpoints", {"/v1/files": "${SECRET}"}), ("routing[0].provider", "${SECRET}")])
def test_no_message_about_a_config_shows_a_secret(path: str, value: Any) -> None:
    tree = changed((path, value), ("colour", "red"))
    with pytest.raises(ConfigError) as caught:
        gateway.parse_config(json.dumps(tree), "config.json", {"SECRET": "sk-4711"}, no_file)
    assert "4711" not in str(caught.value) and str(caught.value).count("\n") >= 1


def test_an_item_that_is_wrong_is_no_empty_list() -> None:
    assert len(told(changed(("api_keys", ["x"])))) == 1


def test_comments_are_left_out() -> None:
    text = "# one\n  // two\n" + json.dumps(BASE, indent=1).replace("\n", "\n\t# more {\n")
    assert parsed(text) == parsed(BASE)
    assert parsed(changed(("api_keys[0].app", "# no // comment"))).api_keys[0].app[0] == "#"


@pytest.mark.parametrize("text", [
    "listen: :8080\nproviders:\n  openai:\n    api_key: x\n", "---\nlisten: x\n", "# c\na: [1]\n",
])
def test_yaml_gets_the_conversion(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gateway.parse_config(text, "config.yaml", {}, no_file)
    assert "yq -o=json config.yaml > config.json" in str(caught.value)
    assert "yaml.safe_load" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        gateway.parse_config(text, "config.json", {}, no_file)
    assert "config.json > new.json" in str(caught.value), "it must not be emptied by the shell"


@pytest.mark.parametrize("path, value, expected", [
    ("api_keys", [], "api_keys: is empty: nobody may call"),
    ("routing[0].provider", "opnai",
     "routing[0].provider: no provider 'opnai' is configured; did "),
    ("providers.openai.api_key", "",
     "providers.openai.api_key: is absent or empty: the provider is "),
    ("providers.openai.api_key", GONE, "providers.openai.api_key: is absent or empty"),
    ("providers.openai.api_key", "${NONE:-}", "providers.openai.api_key: is absent or empty"),
    ("limits.bodies", 1000, "limits.bodies: is below limits.body"),
])
def test_a_warning_does_not_refuse(path: str, value: object, expected: str) -> None:
    [warning] = parsed(changed((path, value))).warnings
    assert warning.startswith("warning: config.json: " + expected)


def test_a_good_config_warns_of_nothing_and_a_local_server_needs_no_key() -> None:
    config = parsed(BASE)
    assert config.warnings == () and config.providers["local"].is_on


ENV = {"KEY": "value", "EMPTY": "", "TRICK": '"}${KEY}$KEY\\'}
FILES = {"/run/secret": " from file \r\n", "/run/two": "a\nb\n\n", "/run/empty": ""}


def read_fake(name: str) -> str:
    if name == "/run/binary":
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    return FILES[name] if name in FILES else no_file(name)


@pytest.mark.parametrize("text, expanded", [
    ("${KEY}", "value"), ("a-${KEY}-${KEY}b", "a-value-valueb"), ("${KEY:-x}", "value"),
    ("${NONE:-x y}", "x y"), ("${NONE:-}", ""), ("${EMPTY:-x}", "x"), ("${EMPTY}", ""),
    ("${NONE:-a:-b}", "a:-b"), ("${TRICK}", ENV["TRICK"]), ("$${KEY}", "${KEY}"), ("$$KEY", "$KEY"),
    ("5$", "5$"), ("$5", "$5"), ("a$$b", "a$b"), ("$ {KEY}", "$ {KEY}"), ("x", "x"),
    ("${file:/run/secret}", " from file "), ("${file:/run/two}", "a\nb"),
    ("${file:/run/empty}", ""),
])
def test_the_environment_is_put_in(text: str, expanded: str) -> None:
    """After parsing, once: no value can break out of its string, or name another variable."""
    problems = gateway.Problems("config.json")
    tree = {"a": [text, 1, None], text: {"b": text}}
    assert gateway.expand(tree, ENV, read_fake, "", problems) == {
        "a": [expanded, 1, None], text: {"b": expanded}}
    assert problems.errors == []


@pytest.mark.parametrize("text, expected", [
    ("${NONE}", "environment variable NONE is not set; set it, or write ${NONE:-} if it may be em"),
    ("$KEY", "write ${NAME} for an environment variable, or $$ for a $ of the text's"),
    ("${file:/none}", "cannot read /none: No such file or directory"),
    ("${file:/run/binary}", "cannot read /run/binary: it is not UTF-8"),
    ("${}", "what stands in ${} is no variable's name"), ("${KEY", ""), ("vk-${KEY-0123456789", ""),
    ("${KEY-x}", "what stands in ${} is no variable's name"),
    ("${NONE:-${KEY}}", "the default of NONE cannot hold another variable"),
    ("${NONE:-$KEY}", "the default of NONE cannot hold another variable"),
])
def test_a_variable_that_fails_names_its_place(text: str, expected: str) -> None:
    problems = gateway.Problems("config.json")
    gateway.expand({"a": [{"b": text}]}, ENV, read_fake, "", problems)
    assert len(problems.errors) == 1
    assert problems.errors[0].startswith("config.json: a[0].b: " + expected)


def test_a_file_name_that_the_system_refuses_is_told() -> None:
    assert told(changed(("providers.openai.api_key", "${file:a\0b}")), {}, gateway.read_text)


@pytest.mark.parametrize("given, settled", [
    ("https://api.openai.com", "https://api.openai.com/v1"),
    ("https://api.openai.com/", "https://api.openai.com/v1"),
    ("https://api.openai.com/v1", "https://api.openai.com/v1"),
    ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
    ("http://[::1]:8000", "http://[::1]:8000/v1"), ("HTTP://h/x/v2beta/", "http://h/x/v2beta"),
    ("http://h/team/openai//", "http://h/team/openai/v1"), ("http://h/v1/a", "http://h/v1/a"),
])
def test_a_known_kind_knows_its_version(given: str, settled: str) -> None:
    config = parsed(changed(("providers.openai.base_url", given)))
    assert config.providers["openai"].base_url == settled


@pytest.mark.parametrize("given, settled, origin", [
    ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1", (False, "127.0.0.1", 8000)),
    ("http://h/api", "http://h/api", (False, "h", 80)),
    ("https://h", "https://h", (True, "h", 443)),
    ("https://[::1]:8443/x", "https://[::1]:8443/x", (True, "::1", 8443)),
])
def test_another_kind_is_taken_at_its_word(given: str, settled: str, origin: object) -> None:
    provider = parsed(changed(("providers.local.base_url", given))).providers["local"]
    assert (provider.base_url, provider.origin) == (settled, origin)


@pytest.mark.parametrize("listen, address", [
    (":8080", ("", "", 8080)), ("0.0.0.0:80", ("", "0.0.0.0", 80)), ("[::1]:0", ("", "::1", 0)),
    ("localhost:8080", ("", "localhost", 8080)), ("unix:/run/gw.sock", ("/run/gw.sock", "", 0)),
])
def test_listen_is_read_and_shown(listen: str, address: object) -> None:
    assert gateway.parse_listen(listen) == address
    assert str(gateway.parse_listen(listen)) == listen


def test_the_nearer_deadline_wins() -> None:
    config = parsed(changed(
        ("timeouts.idle", 50), ("timeouts.connect", 5), ("providers.openai.timeouts.idle", 40),
        ("providers.openai.timeouts.total", 0), ("models.fast.timeouts.first_token", 30)))
    deadlines = gateway.Router(config, lambda provider, model: None).resolve("fast").deadlines
    assert (deadlines.connect, deadlines.idle, deadlines.total, deadlines.first_token) == (
        5, 40, 0, 30)
    assert config.providers["local"].deadlines == config.timeouts


def test_bounds_and_deadlines_are_as_promised() -> None:
    config = parsed(BASE)
    assert dataclasses.asdict(config.limits) == {
        "head": 64 << 10, "fields": 100, "target": 8 << 10, "body": 32 << 20, "bodies": 256 << 20,
        "upload": 512 << 20, "connections": 20_000, "event": 16 << 20, "events": 256 << 20,
        "answer": 64 << 20, "grace": 30}
    assert dataclasses.asdict(config.timeouts) == {
        "connect": 10, "first_token": 600, "idle": 300, "total": 0, "head": 10, "body": 30,
        "keep_alive": 75, "write": 60}


def test_no_secret_shows_in_what_is_printed_of_an_object() -> None:
    config = parsed(BASE)
    router = gateway.Router(config, lambda provider, model: None)
    ring = gateway.Keyring(config.api_keys, float)
    app = ring.authenticate([gateway.digest(VIRTUAL_KEY)], 0.0)
    for thing in (config, config.providers, config.api_keys, router.resolve("fast"), app, ring,
                  vars(ring), router):
        assert "very-secret" not in f"{thing!r} {thing} {thing!a}"
    assert config.providers["openai"].api_key == UPSTREAM_KEY, "but it is there"


EXAMPLE = HERE / "config.example.yaml.json"


def config_keys(shape: Any) -> Iterator[str]:
    """Every key of a config file."""
    for field in dataclasses.fields(shape):
        if field.metadata:
            yield field.name
    for inner in vars(gateway).values():
        if inner is not shape and dataclasses.is_dataclass(inner) and shape is gateway.Config:
            yield from config_keys(inner)


def test_the_example_documents_every_key() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert {"base_url", "keep_alive", "allowed_models"} < set(config_keys(gateway.Config))
    assert [key for key in sorted(set(config_keys(gateway.Config)))
            if not re.search(rf"\b{key}\b", text)] == []


def test_the_example_is_a_config() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    env = {name: f"{name}-0123456789abcdef" for name in re.findall(r"\$\{(\w+)", text)}
    config = gateway.parse_config(text, EXAMPLE.name, env, lambda name: f"{name}-0123456789abcdef")
    assert config.providers and config.api_keys and config.warnings == ()


# ==================================================================================================
# 7. Policy
# ==================================================================================================

DAY = 86400.0
TODAY = float(calendar.timegm((2026, 11, 24, 12, 0, 0)))
KEYS = [gateway.ApiKey(key="vk-good-0123456789", app="good"),
        gateway.ApiKey(key="vk-also-0123456789", app="also"),
        gateway.ApiKey(key="vk-disabled-0123456789", app="disabled", disabled=True),
        gateway.ApiKey(key="vk-expired-0123456789", app="expired", expires="2026-11-23"),
        gateway.ApiKey(key="vk-last-day-0123456789", app="last day", expires="2026-11-24")]
RING = gateway.Keyring(KEYS, lambda day: calendar.timegm(time.strptime(day, "%Y-%m-%d")))
GOOD, ALSO = "vk-good-0123456789", "vk-also-0123456789"


def digests(headers: dict[str, str]) -> Sequence[bytes]:
    """Of the keys in a request's head."""
    return gateway.RequestHead("POST", "/", "", False, headers, 0).keys


@pytest.mark.parametrize("headers, app", [
    ({"authorization": f"Bearer {GOOD}"}, "good"), ({"authorization": f"bearer {GOOD}"}, "good"),
    ({"authorization": f"BEARER   {GOOD} "}, "good"), ({"x-api-key": GOOD}, "good"),
    ({"api-key": GOOD}, "good"), ({"x-goog-api-key": GOOD}, "good"),
    ({"x-gateway-key": GOOD}, "good"),
    ({"authorization": "Bearer nonsense", "x-api-key": GOOD}, "good"),
    ({"authorization": f"Bearer {GOOD}", "api-key": "nonsense"}, "good"),
    ({"authorization": "Basic Zm9v", "x-api-key": GOOD}, "good"),
    ({"x-gateway-key": ALSO, "authorization": f"Bearer {GOOD}"}, "also"),
    ({"x-gateway-key": "nonsense", "authorization": f"Bearer {GOOD}"}, None),
    ({"x-gateway-key": "", "authorization": f"Bearer {GOOD}"}, None),
    ({"authorization": "Bearer vk-last-day-0123456789"}, "last day"),
    ({"authorization": "Bearer vk-disabled-0123456789"}, None),
    ({"authorization": "Bearer vk-disabled-0123456789", "x-api-key": GOOD}, "good"),
    ({"authorization": "Bearer vk-expired-0123456789"}, None),
    ({"authorization": f"Bearer {GOOD}x"}, None), ({"authorization": f"Bearer {GOOD[:-1]}"}, None),
    ({"authorization": f"Bearer {GOOD.upper()}"}, None), ({"authorization": GOOD}, None),
    ({"authorization": f"Basic {GOOD}"}, None), ({"authorization": f"Bearer{GOOD}"}, None),
    ({"authorization": f"Bearer {GOOD}, Bearer {GOOD}"}, None), ({"cookie": GOOD}, None),
    ({"authorization": "Bearer \xff\xe9"}, None), ({"x-api-key": "x" * 60_000}, None),
    ({"authorization": "Bearer "}, None), ({"authorization": ""}, None), ({}, None),
])
def test_who_calls(headers: dict[str, str], app: str | None) -> None:
    keys = digests(headers)
    if app is not None:
        assert RING.authenticate(keys, TODAY).name == app
    else:
        assert refusal(RING.authenticate, keys, TODAY).status == 401


def test_an_answer_tells_nothing_of_a_key_that_is_not_taken() -> None:
    first, *others = [vars(refusal(RING.authenticate, [gateway.digest(key)], TODAY)) for key in (
        "nonsense", "vk-disabled-0123456789", "vk-expired-0123456789", "x" * 9999)]
    assert all(other == first for other in others)
    error = refusal(RING.authenticate, [], TODAY)
    assert (error.code, list(error.headers)) == (
        "invalid_api_key", [("www-authenticate", "Bearer")])


def test_a_key_holds_to_the_end_of_its_last_day() -> None:
    keys = [gateway.digest("vk-last-day-0123456789")]
    midnight = float(calendar.timegm((2026, 11, 25, 0, 0, 0)))
    assert RING.authenticate(keys, midnight - 1).name == "last day"
    assert refusal(RING.authenticate, keys, midnight).status == 401


def test_keys_are_held_by_their_digest_alone() -> None:
    held = pickle.dumps(RING)  # every attribute, however deep
    assert b"last day" in held and b"0123456789" not in held


@pytest.mark.parametrize("allowed, model, may", [
    (["*"], "anything/at:all", True), (["gpt-*"], "gpt-5", True), (["gpt-*"], "xgpt-5", False),
    (["gpt-*"], "GPT-5", False), (["gpt-5"], "gpt-5", True), (["gpt-5"], "gpt-5.2", False),
    (["gpt-5"], "gpt-5\n", False), (["gpt-?"], "gpt-5", True), (["gpt-[45]"], "gpt-6", False),
    (["a", "b*-x"], "bc-x", True), (["a.c"], "abc", False), ([], "a", False), (["*"], "a\nb", True),
])
def test_which_models_a_key_may_use(allowed: list[str], model: str, may: bool) -> None:
    entry = gateway.ApiKey(key=GOOD, app="a", allowed_models=tuple(allowed))
    assert gateway.make_app(entry, float).may_use(model) is may


ROUTED = changed(
    ("providers.off", {"kind": "openai", "api_key": ""}),
    ("models.local/gpt-x", {"provider": "openai", "model": "gpt-y"}),
    ("models.plain", {"provider": "local"}), ("models.gone", {"provider": "off", "model": "m"}),
    ("routing",
     [{"prefix": "gpt-4", "provider": "off"}, {"match": "gpt-*-mini", "provider": "local"},
                 {"prefix": "gpt-", "provider": "openai"},
                 {"match": "o[13]", "provider": "openai"}]))


@pytest.mark.parametrize("model, provider, upstream_model, alias", [
    ("fast", "openai", "gpt-5.2", "fast"), ("plain", "local", "plain", "plain"),
    ("local/gpt-x", "openai", "gpt-y", "local/gpt-x"), ("local/gpt-z", "local", "gpt-z", None),
    ("local/a/b", "local", "a/b", None), ("openai/fast", "openai", "fast", None),
    ("gpt-5-mini", "local", "gpt-5-mini", None), ("gpt-5-mini-x", "openai", "gpt-5-mini-x", None),
    ("o3", "openai", "o3", None),
])
def test_where_a_model_leads(model: str, provider: str, upstream_model: str,
                             alias: str | None) -> None:
    route = gateway.Router(parsed(ROUTED), lambda provider, model: None).resolve(model)
    assert (route.provider.name, route.model, route.alias) == (provider, upstream_model, alias)


@pytest.mark.parametrize("model",
                         ["unknown", "o2", "gone", "off/m", "gpt-4", "gpt-4-mini", "local/", "/x",
                          "FAST", "", "é", "x" * 100_000])
def test_where_no_model_leads(model: str) -> None:
    error = refusal(gateway.Router(parsed(ROUTED), lambda provider, model: None).resolve, model)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 300


def test_an_alias_of_a_provider_that_is_off_is_no_other_providers_model() -> None:
    """A rule for every name must not send a house's own name to a provider that it was not for."""
    tree = changed(("providers.openai.api_key", ""),
                   ("routing", [{"default": True, "provider": "local"}]))
    router = gateway.Router(parsed(tree), lambda provider, model: None)
    assert router.resolve("other").provider.name == "local"
    assert refusal(router.resolve, "fast").status == 404


def test_models_are_listed_in_the_configs_order() -> None:
    router = gateway.Router(parsed(ROUTED), lambda provider, model: None)
    app = gateway.make_app(gateway.ApiKey(key=GOOD, app="a", allowed_models=("p*", "fast")), float)
    assert router.aliases(app) == [("fast", "openai"), ("plain", "local")]


def nano(dollars: str) -> int:
    return int(Decimal(dollars) * 10**9)


TIERED = Price(nano("2"), nano("12"), nano("0.2"), None, None,
               ((200_000, Price(nano("4"), nano("18"), nano("0.4"))),))
CACHED = Price(nano("3"), nano("15"), nano("0.3"), nano("3.75"), nano("6"))


@pytest.mark.parametrize("price, usage, nano_dollars", [
    (Price(nano("0.15"), nano("0.6")), Usage(1000, 500), nano("0.00045")),
    (Price(nano("0.15"), nano("0.6")), Usage(1, 0), 150), (Price(0, 0), Usage(10**9, 10**9), 0),
    (Price(1_500_000, 0), Usage(1), 2), (Price(1_499_999, 0), Usage(1), 1),
    (Price(nano("2.5"), nano("10"), nano("1.25")), Usage(1000, 10, cache_read=600),
     nano("0.00185")),
    (Price(nano("5"), nano("15")), Usage(1000, 0, cache_read=600, cache_write=200), nano("0.005")),
    (CACHED, Usage(1000, 100, 500, 300, 100), nano("0.0036")),
    (CACHED, Usage(100, 0, cache_read=80, cache_write=80), 80 * 300 + 80 * 3750),
    (dataclasses.replace(CACHED, cache_write_1h=None), Usage(100, 0, 0, 100, 50), 100 * 3750),
    (dataclasses.replace(CACHED, cache_read=0), Usage(100, 0, cache_read=100), 0),
    (TIERED, Usage(200_000, 1000), nano("0.4") + nano("0.012")),
    (TIERED, Usage(200_001, 1000), 200_001 * 4000 + nano("0.018")),
    (TIERED, Usage(300_000, 0, cache_read=299_000), 1000 * 4000 + 299_000 * 400),
    (Price(nano("21"), nano("168")), Usage(10**12, 10**12), 189 * 10**15),
])
def test_costs_are_exact(price: Price, usage: Usage, nano_dollars: int) -> None:
    assert gateway.cost(price, usage) == nano_dollars


@pytest.mark.parametrize("dollars, expected", [
    (0.15, 150_000_000), (0.1, 100_000_000), (3, 3_000_000_000), (1e-9, 1), (1e-05, 10_000),
    (8.2, 8_200_000_000),
    (Decimal("0.3"), 300_000_000), (0.07, 70_000_000), (999_999.999999999, 999_999_999_999_999),
])
def test_dollars_are_read_as_they_stand(dollars: Any, expected: int) -> None:
    assert gateway.nano_dollars(dollars) == expected


@pytest.mark.parametrize("own, expected", [
    ({}, TIERED),
    ({"input": 1}, Price(nano("1"), nano("12"), tiers=((200_000, Price(nano("1"), nano("18"))),))),
    ({"output": 0}, Price(nano("2"), 0, nano("0.2"), tiers=(
        (200_000, Price(nano("4"), 0, nano("0.4"))),))),
    ({"input": 1, "output": 2, "cache_read": 0.5, "cache_write": 1.5},
     Price(nano("1"), nano("2"), nano("0.5"), nano("1.5"))),
])
def test_the_configs_price_wins(own: dict[str, float], expected: Price) -> None:
    alias = gateway.Alias(provider="p", **{
        f"cost_per_million_{name}": value for name, value in own.items()})
    assert gateway.override_price(TIERED, alias) == expected
    assert gateway.override_price(None, gateway.Alias(provider="p")) is None


def routed(model: str) -> gateway.Route:
    """Where a rule for every name sends a model; "fast" is an alias."""
    tree = changed(("routing", [{"default": True, "provider": "local"}]))
    return gateway.Router(parsed(tree), lambda provider, model: None).resolve(model)


def test_model_names_are_bounded() -> None:
    names = gateway.ModelNames(100)
    route = routed("any")
    assert {names.label(dataclasses.replace(route, model=f"m-{i}"), False)
            for i in range(5000)} == {"other"}
    assert len({names.label(dataclasses.replace(route, model=f"n-{i}"), True)
                for i in range(5000)}) == 101
    assert names.label(routed("n-0"), False) == "n-0"
    assert names.label(routed("n-4999"), True) == "other"
    assert names.label(routed("fast"), False) == "fast"


HOSTILE_TEXTS = ["", " ", "a b", "a=b", 'a"b', "a\\", "\\n", "a\nb", "a\r\nllm_x 1", "\x00",
                 "\x1b[31m",
                 "\x7f", "\x85", "\u2028", "\u2029", "é🦜", "\ud800", 'x"} 1\nllm_requests_total 9',
                 "time=0 level=ERROR", "x" * 500]


@pytest.mark.parametrize("name", HOSTILE_TEXTS, ids=brief)
def test_a_clients_model_name_can_do_a_label_no_harm(name: str) -> None:
    """A local server answers 200 to any name. A label can escape line feeds, quotes and
    backslashes, but nothing else, and the whole page has to be UTF-8."""
    label = gateway.ModelNames().label(routed(name), True)
    assert len(label) <= 512
    metrics = gateway.Metrics()
    metrics.tokens.add(("app", "p", label, "prompt"), 1)
    for openmetrics in (False, True):
        text = gateway.render_metrics([metrics.tokens], openmetrics)
        text.encode()
        assert text.splitlines() == text.rstrip("\n").split("\n"), "a line of its own"
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


def test_a_budget_gives_what_it_has() -> None:
    budget = gateway.Budget(10)
    assert budget.take(6) and not budget.take(5) and budget.take(4) and not budget.take(1)
    budget.give_back(6)
    assert budget.take(6) and budget.held == 10


# ==================================================================================================
# 8. Metrics
# ==================================================================================================

LABEL = r'[a-z_]+="([^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"[a-z_]+(\{{{LABEL}(,{LABEL})*\}})? -?[0-9.]+(e-?[0-9]+)?")


def sample_record(**values: Any) -> gateway.Record:
    record = gateway.Record()
    for name, value in {"status": 200, "is_stream": True, "duration": 1.5, "overhead": 0.001,
                        "ttft": 0.3, "usage": Usage(10, 5, cache_read=4, reasoning=2),
                        "usage_from": "reported", "cost": 1500, **values}.items():
        assert hasattr(record, name)
        setattr(record, name, value)
    return record


def series(metrics: gateway.Metrics, openmetrics: bool = False) -> dict[str, str]:
    lines = gateway.render_metrics(metrics.families(), openmetrics).splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_one_request_is_counted_once_everywhere() -> None:
    metrics = gateway.Metrics()
    meter = gateway.Meter(metrics, "app", "openai", "fast")
    meter.record(sample_record())
    meter.record(sample_record(status=502, provider_error="stream_error", usage_from="estimated",
                               cost=None, usage=Usage(1, 1), ttft=None, is_stream=False))
    meter.record(sample_record(status=404, usage=None, usage_from="none", ttft=None, cost=None,
                               is_stream=False))
    route = 'virtual_key="app",provider="openai",model="fast"'
    model = 'provider="openai",model="fast"'
    shown = series(metrics)
    assert {name: value for name, value in shown.items()
            if value != "0" and "_bucket" not in name} == {
        f'llm_requests_total{{{route},status="200"}}': "1",
        f'llm_requests_total{{{route},status="502"}}': "1",
        f'llm_requests_total{{{route},status="404"}}': "1",
        f'llm_request_duration_seconds_sum{{{route},stream="true"}}': "1.5",
        f'llm_request_duration_seconds_count{{{route},stream="true"}}': "1",
        f'llm_request_duration_seconds_sum{{{route},stream="false"}}': "3.0",
        f'llm_request_duration_seconds_count{{{route},stream="false"}}': "2",
        f'llm_tokens_total{{{route},direction="prompt"}}': "11",
        f'llm_tokens_total{{{route},direction="completion"}}': "6",
        f'llm_token_details_total{{{route},kind="cache_read"}}': "4",
        f'llm_token_details_total{{{route},kind="reasoning"}}': "2",
        f"llm_stream_first_byte_seconds_sum{{{route}}}": "0.3",
        f"llm_stream_first_byte_seconds_count{{{route}}}": "1",
        'llm_provider_errors_total{provider="openai",error_type="stream_error"}': "1",
        f"llm_cost_dollars_total{{{route}}}": "0.0000015",
        f"llm_usage_estimated_total{{{model}}}": "1", f"llm_unpriced_tokens_total{{{model}}}": "2",
        "llm_overhead_seconds_sum": "0.003", "llm_overhead_seconds_count": "3",
    }
    assert shown["llm_requests_in_flight"] == shown["llm_log_lines_lost_total"] == "0"
    assert list(meter.log_fields) == [
        ("virtual_key", "app"), ("provider", "openai"), ("model", "fast")]
    assert meter.log_text == gateway.render_log(meter.log_fields)


def test_buckets_are_cumulative_and_their_bounds_belong_to_them() -> None:
    histogram = gateway.Histogram("h", "about", ("a",), (0.1, 1.0, 600.0))
    for seconds in (0.05, 0.1, 0.100001, 1.0, 5.0, 600.0, 601.0):
        histogram.observe(("x",), seconds)
    lines = gateway.render_metrics([histogram], False).splitlines()
    assert lines == [
        "# HELP h about", "# TYPE h histogram", 'h_bucket{a="x",le="0.1"} 2',
        'h_bucket{a="x",le="1.0"} 4', 'h_bucket{a="x",le="600.0"} 6', 'h_bucket{a="x",le="+Inf"} 7',
        'h_sum{a="x"} 1207.250001', 'h_count{a="x"} 7']
    for bounds in (gateway.DURATION_BUCKETS, gateway.OVERHEAD_BUCKETS):
        assert list(bounds) == sorted(set(bounds))
    assert gateway.DURATION_BUCKETS[-1] == 600


def test_openmetrics_differs_where_it_must() -> None:
    counter = gateway.Counter("x_total", "about", ("a",))
    counter.add(("1",), 3)
    gauge = gateway.Gauge("g", "about")
    gauge.set((), 4)
    gauge.add((), -1)
    assert gateway.render_metrics([counter, gauge], False) == (
        '# HELP x_total about\n# TYPE x_total counter\nx_total{a="1"} 3\n'
        "# HELP g about\n# TYPE g gauge\ng 3\n")
    assert gateway.render_metrics([counter, gauge], True) == (
        '# HELP x about\n# TYPE x counter\nx_total{a="1"} 3\n'
        "# HELP g about\n# TYPE g gauge\ng 3\n# EOF\n")


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_line_is_of_the_format(openmetrics: bool) -> None:
    metrics = gateway.Metrics()
    for text in ('a"b', "a\\", "a\nb", "\\n", "é🦜", "", "{x=\"y\"} 1"):
        gateway.Meter(metrics, text, "p", text).record(sample_record(provider_error="timeout"))
    metrics.build_info.set(("1.0.0", "3.9"), 1)
    lines = gateway.render_metrics(metrics.families(), openmetrics).rstrip("\n").split("\n")
    assert [line for line in lines if line[0] != "#" and not SAMPLE.fullmatch(line)] == []
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(set(names)) == len(names) == len(metrics.families())
    assert len([line for line in lines if line.startswith("llm_cost_dollars_total")]) == 7


@pytest.mark.parametrize("number, scale, shown", [
    (0, 1, "0"), (7, 1, "7"), (0, 10**9, "0"), (1, 10**9, "0.000000001"), (10**9, 10**9, "1"),
    (1_500_000_000, 10**9, "1.5"), (100 * 10**9, 10**9, "100"),
    (123_456_789_012_345_678_901, 10**9, "123456789012.345678901"), (20, 10**6, "0.00002"),
])
def test_money_is_shown_exactly(number: int, scale: int, shown: str) -> None:
    assert gateway.show_scaled(number, scale) == shown


@pytest.mark.parametrize("value, quoted", [
    ("plain-1.0/x:y@z", "plain-1.0/x:y@z"), ("", '""'), ("a b", '"a b"'), ("a=b", '"a=b"'),
    ('a"b', '"a\\"b"'), ("a\\b", '"a\\\\b"'), ("a\r\nb", '"a\\r\\nb"'), ("\x1b[1m", '"\\u001b[1m"'),
    ("\x7f", '"\\u007f"'), ("\u2028\x85", '"\\u2028\\u0085"'), ("é", '"\\u00e9"'),
    ("\ud800", '"\\ud800"'), ("plain\n", '"plain\\n"'),
])
def test_log_values_are_quoted(value: str, quoted: str) -> None:
    assert gateway.quote_log(value) == quoted


@pytest.mark.parametrize("value", HOSTILE_TEXTS, ids=brief)
def test_no_value_forges_a_log_line(value: str) -> None:
    fields = [("msg", "access"), ("path", value), ("status", 200), ("x", value)]
    line = gateway.render_log(fields)
    assert re.fullmatch(r"[\x20-\x7e]{0,4000}", line)
    found = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^" ]+)(?= |$)', line)
    assert [name for name, _ in found] == [name for name, _ in fields]
    assert "".join(f" {name}={text}" for name, text in found) == line, "nothing between the fields"
    assert found[2] == ("status", "200")
    as_json = gateway.render_json_log(fields)
    assert re.fullmatch(r"[\x20-\x7f]{0,4000}", as_json)
    back = json.loads(as_json)
    assert back["path"][:256] == value[:256]
    assert {**back, "path": "", "x": ""} == {**dict(fields), "path": "", "x": ""}


# ==================================================================================================
# 9. HTTP
# ==================================================================================================


def parse_head(head: bytes) -> gateway.RequestHead:
    return gateway.parse_head(head, 8192, 100)


def head(*lines: bytes, first: bytes = b"POST /v1/x HTTP/1.1") -> bytes:
    """A request's head with a Host and these fields."""
    return b"\r\n".join([first, b"Host: h", *lines, b"", b""])


@pytest.mark.parametrize("raw, status", [
    (b"", 400), (b"\r\n", 400), (b"\r\n\r\n", 400), (b"GET / HTTP/1.1\r\n", 400),
    # versions and request lines
    *((head(first=line), 400) for line in (
        b"GET /", b"GET / ", b"GET / HTTP/1", b"GET / HTTP/1.", b"GET / HTTP/1.2",
        b"GET / HTTP/2.0", b"GET / HTTP/0.9", b"GET / http/1.1", b"GET / HTTP/1.1 ",
        b"GET / HTTP/01.1", b"GET / HTTP/1.10", b" GET / HTTP/1.1", b"GET  / HTTP/1.1",
        b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /a b HTTP/1.1", b"GET HTTP/1.1",
        b"/ HTTP/1.1", b" / HTTP/1.1", b"G(T / HTTP/1.1", b"GET / XTTP/1.1", b"GET /\x00 HTTP/1.1",
        b"GET /\xe9 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\r HTTP/1.1", b"GET /\n HTTP/1.1",
        b"G\x00T / HTTP/1.1", b"", b"\x16\x03\x01\x02")),
    # hosts
    (b"GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    (b"GET / HTTP/1.0\r\nHost: a\r\nhost: b\r\n\r\n", 400),
    # fields
    *((head(line), 400) for line in (
        b"Folded: a\r\n b", b"Folded: a\r\n\tb", b" leading: a", b"a : b", b"a\t: b", b": b", b"a",
        b"a b: c", b"a\x00: b", b"a: \x00", b"a: b\rc", b"a: b\nc: d", b"a: \x0b", b"a: \x1b",
        b"a: \x7f", b"\xe9: b", b"a(: b", b"a: b\r", b"a: b\r\r", b'"a": b', b"a;: b",
        b"Content-Length\x0b: 5")),
    (b"GET / HTTP/1.1\nHost: h\n\n", 400), (b"GET / HTTP/1.1\r\nHost: h\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: h\r\n\n", 400), (head() + b"x", 400),
    (head() + b"Content-Length: 5\r\n", 400),
    (head(b"Content-Length: 5", *[b"a: b"] * 99), 431),
    # lengths
    *((head(b"Content-Length: " + length), 400) for length in (
        b"", b"+5", b"-5", b"5 5", b"5,5", b"5, 5", b"5,", b",5", b"0x5", b"5_0", b"5.0", b"1e3",
        b"five", b"5;x", b"\xb2", b"9999999999999999999999", b"18446744073709551621", b'"5"',
        b"5\x0b")),
    (head(b"Content-Length: 5", b"Content-Length: 6"), 400),
    (head(b"Content-Length: 5", b"content-length: 5"), 400),
    (head(b"Content-Length: 5", b"X: y", b"Content-Length: "), 400),
    # transfer codings
    *((head(b"Transfer-Encoding: " + coding), 400) for coding in (
        b"", b"gzip", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked,",
        b"identity", b"xchunked", b"chunkedx", b"chunked;q=1", b'"chunked"', b"\x0bchunked",
        b"\xa0chunked", b"chunked\x00")),
    (head(b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    (head(b"Content-Length: 5", b"transfer-encoding: chunked"), 400),
    (head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
    (head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), 400),
    (head(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0"), 400),
    # bounds
    (head(first=b"GET /" + b"a" * 8192 + b" HTTP/1.1"), 414), (head(*[b"a: b"] * 100), 431),
])
def test_a_malformed_head_is_refused(raw: bytes, status: int) -> None:
    error = refusal(parse_head, raw)
    assert error.status == status
    parser = gateway.HeadParser(8192, 100)
    for known in (b"", head(), head(b"Content-Length: 5"), raw):
        with contextlib.suppress(GatewayError):
            parser.parse(known)
        again = refusal(parser.parse, raw)
        assert (again.status, again.message) == (status, error.message)


def test_a_head_that_comes_again_is_the_same_but_for_its_length() -> None:
    parser = gateway.HeadParser(8192, 100)
    first, length = parser.parse(head(b"a: b", b"Content-Length: 5", b"x-api-key: secret"))
    assert (length, first.headers) == (5, {"host": "h", "a": "b", "x-api-key": "secret"})
    again, length = parser.parse(head(b"a: b", b"content-length:70", b"x-api-key: secret"))
    assert (again is first, length) == (True, 70)
    for lines, told in (([b"a: b", b"Content-Length: 5", b"x-api-key: Secret"], 5),
                        ([b"a: b", b"x-api-key: secret"], 0),
                        ([b"a: b", b"x-api-key: secret", b"CONTENT-LENGTH: 9"], 9),
                        ([b"a: b", b"x-api-key: secret", b"Transfer-Encoding: chunked"], None)):
        other, length = parser.parse(head(*lines))
        assert (other is first, length) == (False, told)
    long = head(b"a: " + b"x" * gateway.MAX_KNOWN_BYTES, b"Content-Length: 5")
    assert parser.parse(long)[1] == 5 and parser.parse(long)[0] is not parser.parse(long)[0]


@pytest.mark.parametrize("raw, expected", [
    (head(), dict(method="POST", path="/v1/x", query="", length=0, is_http10=False)),
    (head(first=b"GET /a%20b/%76?x=%20y?z HTTP/1.1"), dict(path="/a b/v", query="x=%20y?z")),
    (head(first=b"GET /%zz%c3%a9%ff%00 HTTP/1.1"), dict(path="/%zzé\ufffd\0")),
    (head(first=b"GET http://h:1/v1/x?y HTTP/1.1"), dict(path="/v1/x", query="y")),
    (head(first=b"GET http://h HTTP/1.1"), dict(path="/")),
    (head(first=b"GET http://h?x=/v1/models HTTP/1.1"), dict(path="/", query="x=/v1/models")),
    (head(first=b"GET /?u=http://h/v1/x HTTP/1.1"), dict(path="/", query="u=http://h/v1/x")),
    (head(first=b"GET //h/v1/x HTTP/1.1"), dict(path="//h/v1/x")),
    (head(first=b"OPTIONS * HTTP/1.1"), dict(path="*")),
    (head(first=b"M-1!~ / HTTP/1.1"), dict(path="/")),
    (b"GET / HTTP/1.0\r\n\r\n", dict(is_http10=True, headers={}, length=0)),
    (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", dict(headers={"host": ""})),
    (b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", dict(headers={"host": "[::1]:8080"})),
    (head(b"Content-Length: 5"), dict(length=5)),
    (head(b"Content-Length:\t 007 \t"), dict(length=7)),
    (head(b"Transfer-Encoding: Chunked"), dict(length=None)),
    (head(b"A:b", b"a: c", b"E: \t", b"L: \xe9 x\ty"),
     dict(headers={"host": "h", "a": "b, c", "e": "", "l": "é x\ty"})),
    (head(b"A: \xa0b", b"a:c\xa0", b"b: \x85"),
     dict(headers={"host": "h", "a": "\xa0b, c\xa0", "b": "\x85"})),
    (head(*[b"a: b"] * 99), {}), (head(first=b"GET /" + b"a" * 8191 + b" HTTP/1.1"), {}),
    (head(b"Content_Length: 9", b"a: " + b"x" * 60_000), dict(length=0)),
])
def test_a_head_is_read(raw: bytes, expected: dict[str, object]) -> None:
    parsed_head = parse_head(raw)
    assert {name: getattr(parsed_head, name) for name in expected} == expected
    parser = gateway.HeadParser(8192, 100)
    for _ in range(2):
        known, length = parser.parse(raw)
        told = {**vars(known), "length": length}
        assert {name: told[name] for name in expected} == expected


@pytest.mark.parametrize("version, connection, keeps_alive", [
    (b"1.1", None, True), (b"1.1", b"keep-alive", True), (b"1.1", b"Close", False),
    (b"1.1", b"TE, close", False), (b"1.0", None, False), (b"1.0", b"Keep-Alive", True),
    (b"1.0", b"close", False),
])
def test_a_connection_is_kept(version: bytes, connection: bytes | None, keeps_alive: bool) -> None:
    lines = [] if connection is None else [b"Connection: " + connection]
    assert parse_head(head(*lines, first=b"GET / HTTP/" + version)).keeps_alive is keeps_alive


@pytest.mark.parametrize("raw", [
    b"", b"\r\n\r\n", b"HTTP/1.1 200 OK\n\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 600 X\r\n\r\n", b"HTTP/1.1 099 X\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\na : b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n", b"HTTP/1.1 200 OK\r\na: \x00\r\n\r\n",
    b"HTTP/1.1 200 O\rK\r\n\r\n", b"HTTP/1.1 200 OK\r\na: b\rc: d\r\n\r\n", b"<html>",
])
def test_a_malformed_answer_is_the_providers_fault(raw: bytes) -> None:
    error = refusal(gateway.parse_answer_head, raw)
    assert (error.status, error.provider_error) == (502, "bad_answer")


@pytest.mark.parametrize("first, lines, framing", [
    (b"1.1 200 OK", [], "CloseFraming"), (b"1.1 200", [b"Content-Length: 5"], "LengthFraming"),
    (b"1.1 200 ", [b"Transfer-Encoding: CHUNKED"], "ChunkedFraming"),
    (b"1.0 200 OK", [b"Content-Length: 5"], "LengthFraming"), (b"1.0 200 OK", [], "CloseFraming"),
    (b"1.1 204 No Content", [], "LengthFraming"),
    (b"1.1 304 X", [b"Content-Length: 5"], "LengthFraming"),
    (b"1.1 200 OK", [b"Content-Length: 5", b"Content-Length: 6"], None),
    (b"1.1 200 OK", [b"Content-Length: 5", b"Content-Length: 5"], None),
    (b"1.1 200 OK", [b"Content-Length: -5"], None), (b"1.1 200 OK", [b"Content-Length: "], None),
    (b"1.1 200 OK", [b"Content-Length: 99999999999999999999"], None),
    (b"1.1 200 OK", [b"Content-Length: 5", b"Transfer-Encoding: chunked"], None),
    (b"1.1 200 OK", [b"Transfer-Encoding: gzip, chunked"], None),
    (b"1.1 200 OK", [b"Transfer-Encoding: identity"], None),
    (b"1.0 200 OK", [b"Transfer-Encoding: chunked"], None),
])
def test_an_answers_framing(first: bytes, lines: list[bytes], framing: str | None) -> None:
    raw = b"\r\n".join([b"HTTP/" + first, *lines, b"", b""])
    answer = gateway.parse_answer_head(raw)
    assert answer.status == int(first[4:7]) and answer.is_http10 is (first[:3] == b"1.0")
    if framing is None:
        with pytest.raises(ValueError):
            gateway.answer_framing(answer)
    else:
        made = gateway.answer_framing(answer)
        assert type(made).__name__ == framing
        assert made.done is (answer.status in (204, 304))


def framed(framing: gateway.Framing, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The body and what comes after it. Raises ValueError."""
    body, left = b"", list(pieces)
    while left and not framing.done:
        body += framing.feed(left.pop(0))
        assert framing.done or not framing.rest
    if not framing.done:
        framing.end()
    return body, framing.rest + b"".join(left)


def crlf(text: str) -> bytes:
    """Bytes in which | stands for the end of a line."""
    return text.replace("|", "\r\n").encode("latin-1")


@pytest.mark.parametrize("wire, body, rest", [
    ("0||", "", ""), ("5|hello|0||", "hello", ""),
    ("5|hello|0||GET / ", "hello", "GET / "), ("000|||", "", "|"),
    ("1|a|2|bc|0||0||", "abc", "0||"),
    ("A|0123456789|0a|||||||0||", "0123456789|||||", ""),
    ("5;a=b;c=\"d e\xff\"|hello|0;x||", "hello", ""),
    ("5 ; a|hello|0||", "hello", ""),
    ("1|a|0|Expires: never|X: ||rest", "a", "rest"),
    ("000000d|x|0||||\r|0||", "x|0||||\r", ""),
])
def test_chunks_are_the_same_however_they_are_cut(wire: str, body: str, rest: str) -> None:
    for pieces in cuts(crlf(wire)):
        assert framed(gateway.ChunkedFraming(), pieces) == (crlf(body), crlf(rest))


@pytest.mark.parametrize("wire", [
    # sizes
    "x|", "|", "-1|a|", "+1|a|", "0x1|a|", "1_0|", " 1|a|", "1,|a|",
    "80000000|", "FFFFFFFF|", "100000000|", "0000000000000001|a|", "\xb2|", ";a|",
    # line ends
    "1\na|0||", "1|a\n0||", "1\ra|0||", "1|a0||", "1|ab|0||",
    "1|aXX0||", "1|a\n\n0||", "1|a\r\r0||", "1|a\n\r0||", "1|a\r|0||", "2|a|0||", "5|hello0||",
    "1;\na|a|0||",
    "1;a\rb|a|0||", "1;\x00|a|0||",
    # trailers
    "0|\n||", "0|a||", "0|a : b||", "0|a: b| c||", "0|a: b\nc: d||",
    "0|a: \x00||", "0|: b||",
])
def test_malformed_chunks_are_refused_as_soon_as_they_are_there(wire: str) -> None:
    for pieces in cuts(crlf(wire)):
        with pytest.raises(ValueError):
            list(map(gateway.ChunkedFraming().feed, pieces))


@pytest.mark.parametrize("wire", [
    "", "5", "5\r", "5|", "5|hell", "5|hello", "5|hello\r", "5|hello|",
    "5|hello|0", "5|hello|0|", "5|hello|0|\r", "0|a: b|",
])
def test_chunks_that_are_cut_are_no_body(wire: str) -> None:
    for pieces in cuts(crlf(wire)):
        framing = gateway.ChunkedFraming()
        assert b"hello".startswith(b"".join(map(framing.feed, pieces)))
        assert not framing.done
        with pytest.raises(ValueError):
            framing.end()


def outcomes(wire: bytes) -> set[str]:
    """How a chunked body ends, whole and in pieces of several sizes."""
    found = set()
    for size in (len(wire), 1000, 100, 1):
        try:
            framed(gateway.ChunkedFraming(), [wire[at:at + size]
                                              for at in range(0, len(wire), size)])
            found.add("read")
        except ValueError:
            found.add("refused")
    return found


@pytest.mark.parametrize("wire, outcome", [
    (b"1;" + b"x" * 4000 + b"\r\na\r\n0\r\n\r\n", "read"),
    (b"1;" + b"x" * 5000 + b"\r\na\r\n0\r\n\r\n", "refused"),
    (b"1;" + b"x" * 50_000 + b"\r\na\r\n0\r\n\r\n", "refused"),
    (b"1;xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\na\r\n" * 1000 + b"0\r\n\r\n", "refused"),
    (b"1;x\r\na\r\n" * 5000 + b"0\r\n\r\n", "read"),
    (b"0\r\n" + b"a: b\r\n" * 2000 + b"\r\n", "read"),
    (b"0\r\n" + b"a: b\r\n" * 4000 + b"\r\n", "refused"), (b"1;" + b"x" * 50_000, "refused"),
], ids=["line", "long line", "endless line", "endless extensions", "small chunks", "trailers",
        "endless trailers", "endless and cut"])
def test_what_surrounds_chunks_is_bounded_however_it_is_cut(wire: bytes, outcome: str) -> None:
    assert outcomes(wire) == {outcome}


def test_an_endless_line_is_not_held() -> None:
    for start in (b"1;", b"0\r\n"):
        framing = gateway.ChunkedFraming()
        framing.feed(start)
        with pytest.raises(ValueError):
            for _ in range(40):
                framing.feed(b"x" * 1000)


@pytest.mark.parametrize("length, wire, body, rest", [
    (0, b"", b"", b""), (0, b"x", b"", b"x"), (5, b"hello", b"hello", b""),
    (5, b"hello, world", b"hello", b", world"),
])
def test_a_length_is_kept_however_it_is_cut(length: int, wire: bytes, body: bytes,
                                            rest: bytes) -> None:
    for pieces in cuts(wire):
        assert framed(gateway.LengthFraming(length), pieces) == (body, rest)


def test_a_body_that_is_cut_is_an_error_unless_it_ends_by_closing() -> None:
    with pytest.raises(ValueError):
        framed(gateway.LengthFraming(6), [b"hello"])
    assert framed(gateway.CloseFraming(), [b"hel", b"lo"]) == (b"hello", b"")


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def inflated(coding: str, pieces: Iterable[bytes], limit: int = 1 << 24) -> bytes:
    inflater = gateway.Inflater(coding, limit)
    data = b"".join(map(inflater.feed, pieces))
    inflater.end()
    assert inflater.size == len(data)
    return data


JSON_BODY = json.dumps({"messages": [{"content": f"é {i}" * 5} for i in range(30)]}).encode()


@pytest.mark.parametrize("coding, packed, data", [
    ("gzip", gzip.compress(JSON_BODY), JSON_BODY), ("x-gzip", gzip.compress(JSON_BODY), JSON_BODY),
    ("gzip", gzip.compress(b"") + gzip.compress(b"a") + gzip.compress(JSON_BODY), b"a" + JSON_BODY),
    ("gzip", gzip.compress(b""), b""), ("deflate", zlib.compress(JSON_BODY), JSON_BODY),
    ("deflate", zlib.compress(b""), b""), ("deflate", raw_deflate(JSON_BODY), JSON_BODY),
    ("deflate", raw_deflate(b"{}"), b"{}"),
], ids=["gzip", "x-gzip", "members", "empty gzip", "deflate", "empty deflate", "raw deflate",
        "short raw deflate"])
def test_codings_are_the_same_however_they_are_cut(coding: str, packed: bytes, data: bytes) -> None:
    for pieces in cuts(packed):
        assert inflated(coding, pieces) == data, len(pieces[0])


@pytest.mark.parametrize("coding, pack", [
    ("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate)],
    ids=["gzip", "deflate", "raw deflate"])
def test_no_byte_is_left_behind_at_any_size(coding: str, pack: Any) -> None:
    """zlib may have taken all of its input and still owe output, where a step's bound was met."""
    for size in (1, *range(65_530, 65_830, 7), 65_536, 65_537, 131_073, 200_000):
        data = b"\0" * size
        assert inflated(coding, [pack(data)]) == data


def test_a_decoder_that_keeps_its_input_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As zstd's does (Python 3.14 and up), whose interface is bz2's: no `unconsumed_tail`."""
    monkeypatch.setitem(gateway.CODINGS, "like zstd", lambda start: bz2.BZ2Decompressor())
    data = bytes(range(256)) * 1000
    assert inflated("like zstd", [bz2.compress(data)]) == data


@pytest.mark.parametrize("coding, packed", [
    ("gzip", b""), ("gzip", b"plain text"), ("gzip", gzip.compress(JSON_BODY)[:-1]),
    ("gzip", gzip.compress(JSON_BODY)[:40]), ("gzip", gzip.compress(b"a") + b"garbage"),
    ("gzip", gzip.compress(JSON_BODY)[:-8] + b"\0" * 8), ("gzip", zlib.compress(JSON_BODY)),
    ("gzip", gzip.compress(b"a") + gzip.compress(b"b")[:-2]), ("deflate", b""),
    ("deflate", b"text"),
    ("deflate", zlib.compress(JSON_BODY)[:-1]),
    ("deflate", zlib.compress(JSON_BODY)[:-4] + b"wxyz"),
    ("deflate", raw_deflate(JSON_BODY)[:-1]), ("deflate", gzip.compress(JSON_BODY)),
])
def test_broken_codings_are_refused(coding: str, packed: bytes) -> None:
    for pieces in cuts(packed):
        with pytest.raises(ValueError):
            inflated(coding, pieces)


@pytest.mark.parametrize("coding, packed, limit", [
    ("gzip", gzip.compress(b"\0" * (64 << 20)), 32 << 20),
    ("deflate", zlib.compress(b"\0" * (64 << 20)), 128 << 20),
    ("deflate", raw_deflate(b"\0" * (64 << 20)), 128 << 20),
    ("gzip", gzip.compress(b"\0" * (8 << 20)) * 8, 128 << 20), ("gzip", gzip.compress(b"abc"), 2),
], ids=["limit", "ratio", "raw", "members", "small limit"])
def test_bombs_do_not_go_off(coding: str, packed: bytes, limit: int) -> None:
    inflater = gateway.Inflater(coding, limit)
    with pytest.raises(gateway.TooLarge):
        inflater.feed(packed)
    assert inflater.size <= (1 << 20) + (64 << 10) + len(packed) * gateway.MAX_INFLATE_RATIO


def test_short_texts_may_repeat_themselves() -> None:
    data = b" " * (1 << 20)
    assert inflated("gzip", [gzip.compress(data)], len(data)) == data


@pytest.mark.parametrize("status, fields, wire", [
    (200, [("a", "b"), ("c", "é")], b"HTTP/1.1 200 OK\r\na: b\r\nc: \xe9\r\n\r\n"),
    (499, [], b"HTTP/1.1 499 \r\n\r\n"), (404, [], b"HTTP/1.1 404 Not Found\r\n\r\n"),
])
def test_a_head_is_written(status: int, fields: list[tuple[str, str]], wire: bytes) -> None:
    assert gateway.render_head(status, fields) == wire
    assert gateway.parse_answer_head(wire).headers == dict(fields)


def test_chunks_that_are_written_are_read_back() -> None:
    assert gateway.render_chunk(b"") == b"", "an empty chunk would end the body"
    data = [b"a", b"\r\n", b"x" * 70_000]
    wire = b"".join(map(gateway.render_chunk, data)) + gateway.LAST_CHUNK
    assert framed(gateway.ChunkedFraming(), [wire]) == (b"".join(data), b"")


@pytest.mark.parametrize("line, passes", [
    (b"User-Agent: x/1 \xe9", True), (b"Idempotency-Key: 1", True),
    (b"X-Stainless-OS: Linux", True),
    (b"OpenAI-Beta: x", True), (b"Traceparent: 00-1", True), (b"X-Secret: no", True),
    (b"Authorization: Bearer x", False), (b"X-Api-Key: x", False), (b"Api-Key: x", False),
    (b"X-Goog-Api-Key: x", False), (b"Cookie: x", False), (b"Proxy-Authorization: x", False),
    (b"Content-Length: 5", False), (b"Content-Encoding: gzip", False), (b"TE: trailers", False),
    (b"Accept-Encoding: gzip", False), (b"Expect: 100-continue", False), (b"Origin: x", False),
    (b"Connection: keep-alive", False), (b"Keep-Alive: 5", False), (b"Upgrade: h2c", False),
    (b"Trailer: x", False), (b"Forwarded: for=x", False), (b"X-Forwarded-For: x", False),
    (b"X-Gateway-Key: x", False), (b"X-Gateway-Anything: x", False), (b"Sec-Fetch-Mode: x", False),
    (b"OpenAI-Organization: x", False), (b"OpenAI-Project: x", False),
    (b"Proxy-Connection: x", False),
    (b"Content-Type: text/plain", False), (b"Connection: close, X-Y\r\nX-Y: 1", False),
    (b"Connection: X-Y\r\nx-y: 1\r\nX-y: 2", False),
])
def test_which_fields_go_on(line: bytes, passes: bool) -> None:
    lines = parse_head(head(line)).passing_fields(gateway.REQUEST_ONLY_HERE | {"content-type"})
    name, _, value = line.decode("latin-1").partition(": ")
    assert lines == (f"{name.lower()}: {value}\r\n" if passes else "")


# ==================================================================================================
# 10. Prices
# ==================================================================================================

BUILT_IN = gateway.parse_prices(gateway.PRICES)
ROWS = [line for line in gateway.PRICES.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_price_is_whole(name: str) -> None:
    price = BUILT_IN[name]
    bounds = [0, *(above for above, _ in price.tiers)]
    assert bounds == sorted(set(bounds))
    for step in (price, *(tier for _, tier in price.tiers)):
        assert 0 <= step.input < nano("1000") and 0 <= step.output < nano("1000")
        assert step.cache_read is None or step.cache_read <= step.input
        assert step.cache_write_1h is None or step.cache_write_1h >= (step.cache_write or 0)


def test_the_table_is_sorted_and_names_no_model_twice() -> None:
    assert len(BUILT_IN) == sum(word[0].isalpha() for row in ROWS for word in row.split())
    for group in gateway.PRICES.strip().split("\n\n"):
        rows = re.split(r"(?:^|[ \n])[0-9][0-9. >k-]*(?:\n|$)", group.partition("\n")[2])
        names = [row.split() for row in rows if row]
        assert names and names == sorted(map(sorted, names))


SMALL = gateway.parse_prices(
    "# vendor  input  output  read\nm 1 2 0.5\nm-20250101 3 4 -\na/m 5 6 -\nx-mini 7 8 - 9 10\n"
    "\nt 0.000000001 2 0.1 >200k 3 4 >1000k 5 6 0.7\n")


@pytest.mark.parametrize("name, found", [
    ("m", "m"), ("m-20250101", "m-20250101"), ("m-20250202", "m"), ("m@20250202", "m"),
    ("m-2025-02-02", "m"), ("m-0613", "m"), ("m-10-2025", "m"), ("m-001", "m"), ("m-123", None),
    ("vendor/m", "m"), ("a/m", "a/m"), ("v/a/m", "a/m"), ("v/b/m-0613", "m"), ("m-mini", None),
    ("M", None), ("", None), ("x-mini-20260101", "x-mini"), ("-20250101", None), ("n", None),
])
def test_a_price_is_found(name: str, found: str | None) -> None:
    assert gateway.find_price(SMALL, name) == (None if found is None else SMALL[found])


def test_cells_and_tiers_are_exact() -> None:
    assert SMALL["x-mini"] == Price(nano("7"), nano("8"), None, nano("9"), nano("10"))
    assert SMALL["t"] == Price(1, nano("2"), nano("0.1"), tiers=(
        (200_000, Price(nano("3"), nano("4"), nano("0.1"))),
        (1_000_000, Price(nano("5"), nano("6"), nano("0.7")))))


@pytest.mark.parametrize("model, usage, dollars", [
    ("gpt-4o-mini-2024-07-18", Usage(1000, 1000), "0.00075"),
    ("gpt-4o-2024-05-13", Usage(1000, 1000), "0.02"),
    ("openai/gpt-4o", Usage(1000, 1000, cache_read=800), "0.0115"),
    ("claude-sonnet-4-5-20250929", Usage(1000, 10, cache_write=1000, cache_write_1h=400), "0.0048"),
    ("gemini/gemini-3.1-pro-preview", Usage(200_001, 1), "0.800022"),
])
def test_what_well_known_models_cost(model: str, usage: Usage, dollars: str) -> None:
    price = gateway.find_price(BUILT_IN, model)
    assert price is not None and gateway.cost(price, usage) == nano(dollars)


LITELLM = """{
 "sample_spec": {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "mode": "one of"},
 "m": {"input_cost_per_token": 3e-08, "output_cost_per_token": 1.5e-07, "max_tokens": 5,
       "cache_read_input_token_cost": 3e-09, "cache_creation_input_token_cost": 3.75e-08,
       "cache_creation_input_token_cost_above_1hr": 6e-08, "output_cost_per_token_batches": 1e-9,
       "input_cost_per_token_above_200k_tokens": 6e-08, "input_cost_per_token_priority": 9},
 "v/embed": {"mode": "embedding", "input_cost_per_token": 1e-07},
 "image": {"output_cost_per_image": 0.04}, "half": {"input_cost_per_token": 1e-06},
 "null": {"input_cost_per_token": null, "output_cost_per_token": 1e-06}
}"""


def test_litellms_list_is_read_exactly() -> None:
    prices = gateway.parse_litellm_prices(LITELLM)
    base = Price(nano("0.03"), nano("0.15"), nano("0.003"), nano("0.0375"), nano("0.06"))
    assert prices == {
        "sample_spec": Price(0, 0), "v/embed": Price(nano("0.1"), 0),
        "m": dataclasses.replace(base, tiers=(
            (200_000, dataclasses.replace(base, input=nano("0.06"))),))}


@pytest.mark.parametrize("text", [
    "", "[]", "null", "1", '{"m":[]}', '{"m":1}', "{", "[" * 100_000, '{"m":' * 100_000,
    *('{"m":{"input_cost_per_token":%s,"output_cost_per_token":0}}' % cost for cost in (
        '"1e-06"', "-1", "1", "true", "NaN", "Infinity", "[]", "1e999", "0.1")),
], ids=brief)
def test_what_is_no_price_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        gateway.parse_litellm_prices(text)


# ==================================================================================================
# 4. Dialects: translated
# ==================================================================================================

JSON = dict[str, Any]
TRANSLATED = list(gateway.DIALECTS)

# ---- law 1: parse(render(x)) = x, for what the dialect can say ----

WORDS = ["a", "Grüße", "日本", "\u2028", "\u2029", "\x85", "👩‍👩‍👧", "\U0001f99c", '"', "\\", "\n",
         "\r\n", "\t", "\0", "data: [DONE]", "\x1c", " ", "{}", "é", "'", "</x>", "event: x"]
ALL_CAPS = Caps("both", "adaptive", True, gateway.ALL_EFFORTS, mid_system=True)
REASONS = Caps(thinking="effort", efforts=gateway.EFFORTS, mid_system=True, custom_tools=True)
CAPS_OF = {"chat": REASONS, "responses": REASONS, "messages": ALL_CAPS,
           "gemini": Caps(thinking="level", efforts=gateway.EFFORTS)}
CHAT_SHAPE = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"],
          "additionalProperties": False}
PDF = "JVBERi0xLjQK"
ISSUERS = {"chat": "", "responses": "openai", "messages": "anthropic", "gemini": "gemini"}


class Making:
    """Random values: a seed gives the same ones each time."""

    def __init__(self, dialect: str, seed: int) -> None:
        self.random = random.Random(f"{dialect} {seed}")
        self.dialect = dialect
        self.is_chat = dialect == "chat"
        self.is_openai = dialect in ("chat", "responses")
        self.is_messages = dialect == "messages"
        self.count = 0

    def maybe(self, *values: Any) -> Any:
        return self.random.choice([None, *values])

    def chance(self, odds: float = 0.5) -> bool:
        return self.random.random() < odds

    def text(self, most: int = 8) -> str:
        text = "".join(self.random.choices(WORDS, k=self.random.randint(1, most)))
        return text if text.strip() or not self.is_messages else f"{text}a"  # else it is left out

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}_{self.count}"

    def value(self, depth: int = 2) -> Any:
        kinds: list[Any] = [None, True, False, 0, -7, 1.5, 10**20, "", self.text()]
        if depth:
            kinds += [[self.value(depth - 1)], {self.text(2): self.value(depth - 1)}]
        return self.random.choice(kinds)

    def arguments(self) -> JSON:
        return {self.text(2): self.value() for _ in range(self.random.randint(0, 3))}

    def cache(self) -> Any:
        if not self.is_messages or not self.chance(0.2):
            return None
        return self.maybe({"type": "ephemeral"})

    def content(self) -> Block:
        cache = self.cache()
        makers: list[Any] = [
            lambda: Text(cache, text=self.text()), lambda: Text(text=self.text()),
            lambda: Image(cache, url="https://example.com/a.png"),
            lambda: Image(cache, media_type="image/png", data="aGk="),
            lambda: Document(cache, media_type="application/pdf", data=PDF, title=self.text())]
        if self.is_messages:
            makers.append(lambda: Document(cache, media_type="text/plain", text=self.text()))
        if self.dialect == "responses":
            return self.random.choice([
                Text(text=self.text()), Image(url="https://example.com/b", detail="low"),
                Document(media_type="application/pdf", data=PDF, title=self.text()),
                Document(url="https://example.com/a.pdf")])
        if self.dialect == "gemini":
            return self.random.choice([
                Text(text=self.text()), Image(media_type="image/png", data="aGk="),
                Image(url="https://example.com/a.png", media_type="image/png"),
                Document(media_type="application/pdf", data=PDF),
                Audio(data="aGk=", format="wav")])
        if self.is_chat:
            makers += [lambda: Audio(cache, data="aGk=", format="wav"),
                       lambda: Image(url="https://example.com/b", detail="low")]
        return self.random.choice(makers)()

    def thinking(self) -> list[Block]:
        issuer = ISSUERS[self.dialect]
        if not issuer or self.chance():
            return []
        if self.is_messages and self.chance():
            return [Thinking(signature=self.name("red"), issuer=issuer, is_redacted=True)]
        signature = self.name("rs") + (":Zm9v" if issuer == "openai" else "")
        return [Thinking(signature=signature, issuer=issuer, text=self.text())]

    def call(self) -> ToolCall:
        if self.is_openai and self.chance(0.2):
            return ToolCall(id=self.name("call"), name="shell", is_custom=True, input=self.text())
        call = ToolCall(id=self.name("call"), name=self.random.choice(["f", "g"]),
                        arguments=self.arguments())
        if self.dialect == "gemini":
            call.signature, call.issuer = self.name("c2ln"), "gemini"
        return call

    def turns(self) -> Iterator[Turn]:
        if self.chance():
            yield Turn("system", [Text(self.cache(), text=self.text())])
        yield Turn("user", [self.content() for _ in range(self.random.randint(1, 3))])
        for _ in range(self.random.randint(0, 4)):
            said: list[Block] = [Text(text=self.text())] if self.chance() else []
            calls = [self.call() for _ in range(self.random.randint(0 if said else 1, 3))]
            yield Turn("assistant", [*self.thinking(), *said, *calls])
            results = [self.result(call) for call in calls]
            more = [self.content()] if self.chance() or not calls else []
            yield Turn("user", [*results, *more])
            if self.dialect != "gemini" and self.chance(0.1):
                yield Turn("system", [Text(text=self.text())])
                if not self.is_messages:  # where an answer has to follow
                    yield Turn("user", [Text(text=self.text())])

    def result(self, call: ToolCall) -> Block:
        most = 2 if self.is_messages else 1
        content: list[Block] = [Text(text=self.text()) for _ in range(self.random.randint(0, most))]
        if not self.is_chat and self.chance(0.2):
            detail = "low" if self.is_openai else ""
            content.append(Image(media_type="image/png", data="aGk=", detail=detail))
        return ToolResult(self.cache(), id=call.id, content=content,
                          is_error=not self.is_openai and self.chance(0.2))

    def tools(self) -> list[Tool]:
        strict = None if self.dialect == "gemini" else self.maybe(True)
        tools = [Tool("f", self.text(), CHAT_SHAPE, strict, cache=self.cache()),
                 Tool("g", schema={"type": "object", "properties": {}})]
        grammar = {"syntax": "lark", "definition": self.text()}
        return tools + [Tool("shell", is_custom=True, grammar=self.maybe(grammar))] * self.is_openai

    def chat(self) -> Chat:
        turns = gateway.canonical(self.turns())
        marks = 4
        for block in (block for turn in turns for block in turn.blocks):
            marks -= block.cache is not None
            block.cache = block.cache if marks >= 0 else None
        chat = Chat("m", turns, max_tokens=self.random.randint(16, 9999), stream=self.chance())
        if self.dialect != "responses":
            chat.stop = self.random.choice([[], ["END", "\n\nx"]])
        chat.user = None if self.dialect == "gemini" else self.maybe("u-1")
        has_calls = any(isinstance(block, ToolCall) for turn in turns for block in turn.blocks)
        if has_calls or self.chance():
            chat.tools = self.tools() if marks > 0 else [Tool("g", schema={"type": "object"})]
            chat.choice = self.maybe(ToolChoice("auto"), ToolChoice("none"), ToolChoice("required"),
                                     ToolChoice("tool", "g"))
            if chat.choice and chat.choice.mode != "none" and self.dialect != "gemini":
                chat.parallel = self.maybe(False)
        chat.format = self.maybe(Format({**CHAT_SHAPE, "description": self.text()}))
        if self.is_openai:
            self.only_of_openai(chat)
            return chat
        if self.dialect == "gemini":
            chat.temperature, chat.top_p, chat.top_k = self.maybe(0.7), self.maybe(0.5), 40
            chat.effort = self.maybe("low", "high")
            chat.options = self.random.choice([{}, {"seed": 7}])
            for tool in chat.tools:
                tool.schema = tool.schema if tool.name == "f" else None
            return chat
        if self.chance() and not (chat.choice and chat.choice.mode in ("required", "tool")):
            chat.thinking = {"type": "adaptive"}
            chat.effort = self.maybe(*gateway.ALL_EFFORTS)
        else:
            chat.temperature = self.maybe(0, 0.7, 1)
            chat.top_p, chat.top_k = self.maybe(0.5), self.maybe(40)
        chat.options.update({} if self.chance() else {"service_tier": "default"})
        return chat

    def only_of_openai(self, chat: Chat) -> None:
        chat.include_usage = self.is_chat and chat.stream
        chat.temperature, chat.top_p = self.maybe(0, 1.5), self.maybe(0.5)
        chat.effort = self.maybe("none", "high")
        chat.logprobs = self.maybe(0, 3) if self.is_chat else None
        some = {"seed": 7, "logit_bias": {"1": 2}} if self.is_chat else {"verbosity": "low"}
        chat.options = {"service_tier": "flex", **some} if self.chance() else {}
        if not self.is_chat:
            chat.options["store"] = False
        if chat.tools and self.chance(0.2):
            chat.choice = ToolChoice(self.random.choice(["auto", "required"]),
                                     allowed=["g", chat.tools[-1].name])
        if chat.format:
            chat.format = self.random.choice([Format(), Format(
                CHAT_SHAPE, "out", self.text(), self.maybe(True, False))])
        for tool in chat.tools:  # what is left out is written as the empty one
            tool.schema = None if tool.is_custom else {"type": "object", **(tool.schema or {})}
            if self.dialect == "responses" and not tool.is_custom and tool.strict is None:
                tool.strict = False

    def reply(self) -> Reply:
        """A whole answer; a Chat Completions message holds thoughts, a text, calls."""
        blocks: list[Block] = []
        if self.chance():
            thought = Thinking(text=self.text(), issuer=ISSUERS[self.dialect])
            if not self.is_chat:
                thought.signature = self.name("sig") + (":Zm9v" if self.is_openai else "")
            blocks.append(thought)
        if self.is_messages and self.chance(0.3):
            blocks.append(Thinking(signature="red", issuer="anthropic", is_redacted=True))
        if self.chance(0.8):
            said = self.text(40)
            place = {"start": 1, "end": len(said)} if len(said) > 1 and not self.is_messages else {}
            cited = [{"url": "https://example.com", "title": self.text()},
                     {"url": "https://example.com", "title": "", **place}] * self.chance()
            blocks.append(Text(text=said, citations=cited))
        if self.is_openai and self.chance(0.1):
            blocks.append(Text(text=self.text(), is_refusal=True))
        calls = [self.call() for _ in range(self.random.choice([0, 0, 1, 3]))]
        finish = self.random.choice(["stop", "length"])
        if calls:
            finish = "tool_calls"
        elif any(isinstance(block, Text) and block.is_refusal for block in blocks):
            finish = "refusal"
        elif self.is_messages:
            finish = self.random.choice(["stop", "stop_sequence", "length", "context", "pause",
                                         "refusal"])
        elif self.dialect == "gemini" and not blocks:
            finish = "filter"
        usage = Usage(30, 9, 10, 5, 2 if self.is_messages else 0, 4)
        if self.dialect == "gemini":
            usage.cache_write = 0
        tier = self.random.choice(["", "default"]) if self.is_openai else ""
        why = self.text() if finish == "refusal" and self.is_messages else ""
        id_ = {"chat": "chatcmpl-1", "responses": "resp_1"}.get(self.dialect, "msg_1")
        for call in calls:
            if call.signature:  # a thought brings it too
                blocks.append(Thinking(None, call.signature, call.issuer, before=call.id))
            blocks.append(call)
        return Reply(id_, "m", blocks, finish, usage, why, tier)


@pytest.mark.parametrize("name", TRANSLATED)
def test_what_was_rendered_is_parsed_back(name: str) -> None:
    dialect, target = gateway.DIALECTS[name], Target("m", CAPS_OF[name])
    for seed in range(300):
        chat, losses = Making(name, seed).chat(), Losses()
        wire, rewrites = dialect.render_request(chat, target, losses)
        assert not losses.names and not rewrites.names, (seed, losses.names)
        body = gateway.dump_json(wire)
        told = {"model": "m", "stream": chat.stream}  # which Gemini has in its path
        again = dialect.parse_request({**told, **gateway.Body(body).tree()}, losses)
        assert (again, losses.names) == (chat, {}), seed
        assert dialect.render_request(again, target, losses)[0] == json.loads(body)


# ---- law 2: a stream spells the same reply as the body ----


def pieces(rng: random.Random, text: str) -> list[str]:
    at = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(0, 3))))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)])]


def spell(reply: Reply, rng: random.Random) -> Iterator[StreamEvent]:
    """The events of a reply, its texts in random pieces."""
    yield Start(reply.id, reply.model)
    for i, block in enumerate(reply.blocks):
        if isinstance(block, Text):
            yield BlockStart(Text(is_refusal=block.is_refusal))
            yield from map(TextDelta, pieces(rng, block.text))
            yield from (CitationDelta(i, citation) for citation in block.citations)
        elif isinstance(block, Thinking):
            yield BlockStart(block if block.is_redacted else Thinking(
                issuer=block.issuer, before=block.before))
            yield from map(ThinkingDelta, pieces(rng, block.text) if block.text else [])
            if block.signature and not block.is_redacted:
                yield SignatureDelta(block.signature, block.issuer)
        elif isinstance(block, ToolCall):
            yield BlockStart(dataclasses.replace(block, arguments={}, input=""))
            said = block.input if block.is_custom else json.dumps(block.arguments)
            yield from map(ArgumentsDelta, pieces(rng, said) if said != "{}" else [])
        yield BlockStop()
    yield Finish(reply.finish, reply.usage, reply.refusal, reply.service_tier)


def chat_parsed(name: str, chunks: Iterable[bytes],
           rewrites: Rewrites | None = None) -> list[StreamEvent]:
    """The events that a dialect's parser makes of a stream in these pieces."""
    parser = gateway.DIALECTS[name].parser(rewrites or Rewrites())
    events = [said for block in blocks_of(chunks) for said in parser.feed(block)]
    return [*events, *parser.end()]


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_stream_spells_the_same_reply_as_the_body(name: str) -> None:
    dialect = gateway.DIALECTS[name]
    for seed in range(200):
        making = Making(name, seed)
        reply, chat = making.reply(), Chat("m", [], include_usage=True)
        body = json.loads(gateway.dump_json(dialect.render_reply(reply, chat, 7)))
        assert dialect.parse_reply(body, Rewrites()) == reply, seed
        renderer = dialect.renderer(chat, 7)
        assert gateway.collect(spell(reply, making.random)) == reply
        stream = b"".join(renderer.feed(event) for event in spell(reply, making.random))
        few = [[stream[:at], stream[at:]] for at in making.random.sample(range(len(stream)), 5)]
        every = [[stream[:at], stream[at:]] for at in range(len(stream))] if seed < 2 else few
        byte_by_byte = [[bytes([byte]) for byte in stream]] if seed < 9 else []
        for chunks in [[stream], *byte_by_byte, *every]:
            assert gateway.collect(chat_parsed(name, chunks)) == reply, seed


SOME_TEXTS = ["Hi", " é\u2028", '"\\n\n', "\ud83d😀", "}}]"]


def streamed_text(name: str, events: Iterable[StreamEvent]) -> bytes:
    """What a client is told, in an answer that has begun with a text."""
    renderer = gateway.DIALECTS[name].renderer(Chat("m", []), 7)
    opening: list[StreamEvent] = [Start("id", "m"), BlockStart(Text())]
    out = b"".join(map(renderer.feed, [*opening, *events, BlockStop()]))
    return out + renderer.feed(Finish("stop", Usage(1, 2)))


@pytest.mark.parametrize("name", TRANSLATED)
def test_pieces_of_text_go_over_in_runs(name: str) -> None:
    """Whatever they hold, in whatever pieces, and into every dialect as one by one."""
    stream = streamed_text(name, map(TextDelta, ["a", *SOME_TEXTS]))
    for wire in (stream, stream.replace(b"\n", b"\r\n")):
        runs = [event for event in chat_parsed(name, [wire])
                if isinstance(event, gateway.TextRun)]
        assert sum([run.pieces for run in runs], [])[-len(SOME_TEXTS):] == SOME_TEXTS, runs
        assert len(runs) == 1
    for other in TRANSLATED:
        one_by_one = map(TextDelta, runs[0].pieces)
        assert streamed_text(other, [runs[0]]) == streamed_text(other, one_by_one)


@pytest.mark.parametrize("bad", [
    b'"\\x"', b'"\xff"', b'"\\ud8"', b'"a\tb"', b'"d","e"', b'"', b'"d', b'"d\\"'])
@pytest.mark.parametrize("name", TRANSLATED)
def test_a_broken_piece_of_text_breaks_the_stream_there(name: str, bad: bytes) -> None:
    stream = streamed_text(name, map(TextDelta, ["a", "b", "c", "d"])).replace(b'"d"', bad)
    parser, said = gateway.DIALECTS[name].parser(Rewrites()), []
    with pytest.raises(GatewayError, match="not JSON"):
        for event in parser.feed(stream):
            said.append(event)
    whole = gateway.collect([*said, BlockStop()])
    assert whole.blocks == [Text(text="abc")] and parser.content_bytes == 3


@pytest.mark.parametrize("name", TRANSLATED)
def test_broken_pieces_of_text_do_not_mend_each_other(name: str) -> None:
    """Together in a list these two are the strings 'c",' and 'd'."""
    stream = streamed_text(name, map(TextDelta, ["a", "b", "c", "d"]))
    stream = stream.replace(b'"c"', b'"c\\"', 1).replace(b'"d"', b'","d"', 1)
    said = []
    with pytest.raises(GatewayError, match="not JSON"):
        for event in gateway.DIALECTS[name].parser(Rewrites()).feed(stream):
            said.append(event)
    assert gateway.collect([*said, BlockStop()]).blocks == [Text(text="ab")]


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_list_over_several_pieces_of_text_is_none(name: str) -> None:
    """Nor are brackets that would be too deep for the parser."""
    stream = streamed_text(name, map(TextDelta, ["a", "b", "c", "d", "e"]))
    for first in (b'"c",["x"', b'"c",' + b"[" * 20_000 + b'"x"'):
        broken = stream.replace(b'"c"', first, 1).replace(b'"e"', b'"e"],"q"', 1)
        said = []
        with pytest.raises(GatewayError, match="not JSON"):
            for event in gateway.DIALECTS[name].parser(Rewrites()).feed(broken):
                said.append(event)
        assert gateway.collect([*said, BlockStop()]).blocks == [Text(text="ab")]


@pytest.mark.parametrize("odd", [
    b'""', b"null", b'{"a":1}', b'"c" ', b'"c","role":"assistant"'])
def test_a_run_of_texts_goes_on_behind_an_odd_one(odd: bytes) -> None:
    stream = streamed_text("chat", map(TextDelta, ["a", "b", "c", "d", "e"]))
    events = list(gateway.DIALECTS["chat"].parser(Rewrites()).feed(stream.replace(b'"c"', odd)))
    text = "abcde" if b"c" in odd else "abde"
    assert gateway.collect(events).blocks == [Text(text=text)]
    runs = [event.pieces for event in events if isinstance(event, gateway.TextRun)]
    assert runs[-1][-2:] == ["d", "e"], events


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_stream_without_its_first_event_is_told_in_whole_events(name: str) -> None:
    renderer = gateway.DIALECTS[name].renderer(Chat("m", []), 7)
    told: list[StreamEvent] = [BlockStart(Text()), TextDelta("a"), BlockStop()]
    events = decoded([b"".join(map(renderer.feed, told))])
    assert events and all(isinstance(json.loads(event), dict) for event in events)


@pytest.mark.parametrize("name", TRANSLATED)
@pytest.mark.parametrize("strange", ["a\0b", "a\\u0000b", '"\0'])
def test_a_name_that_looks_like_a_text_s_place_is_none(name: str, strange: str) -> None:
    renderer = gateway.DIALECTS[name].renderer(Chat(strange, []), 7)
    told: list[StreamEvent] = [Start(strange, strange), BlockStart(Text()), TextDelta("Hello"),
                               TextDelta(" you"), BlockStop(), Finish("stop", Usage(1, 2))]
    reply = gateway.collect(chat_parsed(name, [b"".join(map(renderer.feed, told))]))
    assert (reply.blocks, reply.model) == ([Text(text="Hello you")], strange)


def test_a_long_run_is_cut_a_part_at_a_time() -> None:
    """What many short ones in one block would each cut is bounded."""
    texts = [str(i) for i in range(500)]
    runs = [event for event in chat_parsed("chat", [streamed_text("chat", map(TextDelta, texts))])
            if isinstance(event, gateway.TextRun)]
    assert [piece for run in runs for piece in run.pieces] == texts
    assert 3 < len(runs) < 10


def test_nothing_is_told_behind_the_end() -> None:
    """Nor where the first text would have opened its block."""
    first, *texts = gateway.split_events(streamed_text("chat", [TextDelta("a"), TextDelta("b")]))
    events = chat_parsed("chat", [b"".join([first, DONE, *texts])])
    assert [type(event) for event in events] == [gateway.Start, gateway.Finish]


def test_the_last_of_a_run_may_say_more_behind_its_text() -> None:
    events = [*gateway.split_events(streamed_text("chat", map(TextDelta, ["a", "b", "c"])))]
    events[3] = events[3].replace(b'"finish_reason":null', b'"finish_reason":"length"')
    reply = gateway.collect(chat_parsed("chat", [b"".join([*events[:4], DONE])]))
    assert (reply.finish, reply.blocks) == ("length", [Text(text="abc")])


def test_texts_with_something_new_around_each_run_too() -> None:
    stream = streamed_text("chat", map(TextDelta, ["a", *SOME_TEXTS]))
    numbers = itertools.count()
    stream = re.sub(rb'"created":7', lambda found: b'"created":%d' % next(numbers), stream)
    runs = [event.pieces for event in chat_parsed("chat", [stream])
            if isinstance(event, gateway.TextRun)]
    assert runs == [["a", *SOME_TEXTS]] and next(numbers) > len(SOME_TEXTS)


def test_nan_in_a_stream_becomes_null() -> None:
    told = {"content": [{"token": "a", "logprob": float("nan"), "top_logprobs": []}]}
    stream = gateway.sse(json.dumps({"choices": [
        {"index": 0, "delta": {"content": "a"}, "logprobs": told}]}).encode()) + STOP + DONE
    said = b"".join(map(CHAT.renderer(Chat("m", []), 7).feed, chat_parsed("chat", [stream])))
    assert b'"logprob":null' in said and b"NaN" not in said


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_stream_without_its_end_is_an_error(name: str) -> None:
    renderer = gateway.DIALECTS[name].renderer(Chat("m", []), 7)
    making = Making(name, 1)
    events = [renderer.feed(event) for event in spell(making.reply(), making.random)]
    stream = b"".join(events)
    last = stream.rindex(b"\n\n", 0, -2) + 2
    last = stream.rindex(b"data:") if name == "chat" else last
    for end in (0, len(events[0]), last):
        with pytest.raises(GatewayError, match="cut the stream") as caught:
            chat_parsed(name, [stream[:end]])
        assert "[DONE]" not in caught.value.message
        assert (caught.value.status, caught.value.provider_error) == (502, "stream_error")


# ---- Chat Completions to Messages: requests ----

NOW, OLD, BUDGET, BOTH = "claude-opus-5", "claude-3-5-haiku-20241022", "claude-opus-4-1", \
    "claude-sonnet-4-6"
FORCED = "claude-opus-5-5"
ANTHROPIC = gateway.KINDS["anthropic"]


def to_messages(params: JSON, **target: Any) -> tuple[JSON, dict[str, bool], Rewrites]:
    """A Chat Completions request as it goes to Anthropic, with what is lost on the way."""
    losses, caps = Losses(), target.pop("caps", {})
    model = params.get("model", BOTH)
    request = {"model": "alias", "messages": [{"role": "user", "content": "Hi"}], **params}
    request["model"] = "alias"
    chat = gateway.DIALECTS["chat"].parse_request(request, losses)
    taken = gateway.dataclasses.replace(gateway.find_caps(ANTHROPIC, model), **caps)
    wire, rewrites = gateway.DIALECTS["messages"].render_request(
        chat, Target(model, taken, **target), losses)
    return wire, losses.names, rewrites


def user(content: Any) -> JSON:
    return {"role": "user", "content": content}


def said(*parts: JSON) -> JSON:
    return {"messages": [user(list(parts))]}


def text(value: str, **more: Any) -> JSON:
    return {"type": "text", "text": value, **more}


def function(name: str, **about: Any) -> JSON:
    return {"type": "function", "function": {"name": name, **about}}


def call(id_: str, name: str = "f", arguments: Any = "{}") -> JSON:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(id_: str, content: Any = "ok") -> JSON:
    return {"role": "tool", "tool_call_id": id_, "content": content}


def asked(*calls: JSON, content: Any = None, **more: Any) -> JSON:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def loop(*messages: JSON, **more: Any) -> JSON:
    return {"messages": [user("Hi"), *messages], "tools": [F], **more}


def use(id_: str, name: str = "f", **arguments: Any) -> JSON:
    return {"type": "tool_use", "id": id_, "name": name, "input": arguments}


def result(id_: str, content: Any = "ok") -> JSON:
    return {"type": "tool_result", "tool_use_id": id_, "content": content}


def format_(schema: JSON, **about: Any) -> JSON:
    return {"response_format": {"type": "json_schema", "json_schema": {
        "name": "out", "schema": schema, **about}}}


def image(url: str, **more: Any) -> JSON:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def file(data: str, **more: Any) -> JSON:
    return {"type": "file", "file": {"file_data": data, **more}}


def effort(level: str, model: str, **more: Any) -> JSON:
    return {"model": model, "reasoning_effort": level, **more}


F = function("f")
F_TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
CUSTOM = {"type": "custom", "custom": {"name": "sh", "description": "Run."}}
GRAMMAR = {"type": "custom", "custom": {"name": "sh", "format": {
    "type": "grammar", "grammar": {"syntax": "lark", "definition": "start: X"}}}}
CUSTOM_SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}},
                 "required": ["input"]}
MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
PNG = "data:image/png;base64,aGk="
PNG_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                         "data": "aGk="}}
THOUGHTS = [{"type": "thinking", "thinking": "Hm", "signature": "sig"},
            {"type": "redacted_thinking", "data": "red"}]
ADAPTIVE = {"type": "adaptive", "display": "summarized"}
RULE = "Answer with one JSON object and nothing else."
LATER = {"role": "system", "content": "S"}
LATE = [user("a"), LATER, user("b")]
SPOKE = {"role": "assistant", "content": "c"}
THOUGHT_C = {"type": "thinking", "thinking": "t", "signature": "s"}
OPEN = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 1}}}
UNSET = None  # what must not be in the wire body

# Section of the tables and what it is about; the request's fields; what the wire holds of it, or
# the param of the 400; the losses, hints in brackets.
CASES: list[tuple[str, JSON, Any, str]] = [
    ("2.1 model", {}, {"model": BOTH}, ""),
    ("2.1 max_completion_tokens first", {"max_completion_tokens": 7, "max_tokens": 9},
     {"max_tokens": 7}, ""),
    ("2.1 max_tokens", {"max_tokens": 9}, {"max_tokens": 9}, ""),
    ("2.1 max_tokens absent", {}, {"max_tokens": 8192}, ""),
    ("2.1 max_tokens of no int", {"max_tokens": 9.5}, "max_tokens", ""),
    ("2.1 max_tokens of 0", {"max_completion_tokens": 0}, "max_completion_tokens", ""),
    ("0.2 R max_tokens over the model's", {"max_tokens": 999_999}, {"max_tokens": 128_000},
     "max_tokens"),
    ("2.1 temperature", {"temperature": 0.3}, {"temperature": 0.3}, ""),
    ("2.1 temperature clamped", {"temperature": 1.6}, {"temperature": 1}, "temperature"),
    ("2.1 temperature, 4.7+", {"model": NOW, "temperature": 0.3}, {"temperature": UNSET},
     "temperature"),
    ("0.2 temperature at its default", {"model": NOW, "temperature": 1, "top_p": 1.0},
     {"temperature": UNSET, "top_p": UNSET}, ""),
    ("2.1 temperature while thinking", effort("low", BOTH, temperature=0), {"temperature": UNSET},
     "temperature"),
    ("2.1 top_p", {"top_p": 0.3}, {"top_p": 0.3}, ""),
    ("2.1 top_p, 4.7+", {"model": NOW, "top_p": 0.3}, {"top_p": UNSET}, "top_p"),
    ("2.1 temperature and top_p", {"temperature": 0.5, "top_p": 0.3},
     {"temperature": 0.5, "top_p": UNSET}, "top_p"),
    ("2.1 both, older", {"model": OLD, "temperature": 0.5, "top_p": 0.3},
     {"temperature": 0.5, "top_p": 0.3}, ""),
    ("2.1 stop string", {"stop": "END"}, {"stop_sequences": ["END"]}, ""),
    ("2.1 stop list", {"stop": ["\n", "END"]}, {"stop_sequences": ["END"]}, "stop"),
    ("2.1 stop empty", {"stop": []}, {"stop_sequences": UNSET}, ""),
    ("2.1 stop blank", {"stop": " "}, {"stop_sequences": UNSET}, "stop"),
    ("2.1 n", {"n": 2}, "n", ""), ("2.1 n of 1", {"n": 1}, {"n": UNSET}, ""),
    ("2.1 n of 0", {"n": 0}, "n", ""), ("2.1 n null", {"n": None}, {}, ""),
    ("2.1 stream", {"stream": True}, {"stream": True, "stream_options": UNSET}, ""),
    ("2.1 stream false", {"stream": False}, {"stream": UNSET}, ""),
    ("2.1 include_usage", {"stream": True, "stream_options": {"include_usage": True}},
     {"stream_options": UNSET}, ""),
    ("0.2 H include_obfuscation", {"stream_options": {"include_obfuscation": False}}, {},
     "(include_obfuscation)"),
    ("2.1 tools", {"tools": [function("f", description="D", parameters=CHAT_SHAPE)]},
     {"tools": [{"name": "f", "description": "D", "input_schema": CHAT_SHAPE}]}, ""),
    ("2.1 tool without parameters", {"tools": [F]}, {"tools": [F_TOOL]}, ""),
    ("1.8 type is added", {"tools": [function("f", parameters={"properties": {}})]},
     {"tools": [F_TOOL]}, ""),
    ("2.1 strict, closed", {"tools": [function("f", parameters=CHAT_SHAPE, strict=True)]},
     {"tools": [{"name": "f", "input_schema": CHAT_SHAPE, "strict": True}]}, ""),
    ("2.1 strict, open", {"tools": [function("f", parameters=OPEN, strict=True)]},
     {"tools": [{"name": "f", "input_schema": OPEN}]}, "strict"),
    ("2.1 custom tool", {"tools": [CUSTOM]}, {"tools": [
        {"name": "sh", "description": "Run.", "input_schema": CUSTOM_SCHEMA}]}, ""),
    ("2.1 custom tool with a grammar", {"tools": [GRAMMAR]}, {"tools": [
        {"name": "sh", "description": "The input follows this lark grammar:\nstart: X",
         "input_schema": CUSTOM_SCHEMA}]}, ""),
    ("2.1 custom call", {"tools": [CUSTOM], "messages": [
        user("Hi"), asked({"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls"}}),
        answer("c")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c", "sh", input="ls")]},
                   user([result("c")])]}, ""),
    ("2.1 functions", {"functions": [{"name": "f"}], "function_call": "auto"},
     {"tools": [F_TOOL],
      "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ""),
    ("2.1 function_call", {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
     {"tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True}}, ""),
    ("2.1 tool_choice absent", {"tools": [F]}, {"tool_choice": UNSET}, ""),
    ("2.1 tool_choice auto", {"tools": [F], "tool_choice": "auto"},
     {"tool_choice": {"type": "auto"}}, ""),
    ("2.1 tool_choice required", {"tools": [F], "tool_choice": "required"},
     {"tool_choice": {"type": "any"}}, ""),
    ("2.1 tool_choice required, 5.5", {"model": FORCED, "tools": [F], "tool_choice": "required"},
     {"tool_choice": {"type": "any"}}, ""),
    ("2.1 tool_choice none", {"tools": [F], "tool_choice": "none"},
     {"tools": [F_TOOL], "tool_choice": {"type": "none"}}, ""),
    ("2.1 tool_choice named", {"tools": [F], "tool_choice": F},
     {"tool_choice": {"type": "tool", "name": "f"}}, ""),
    ("2.1 tool_choice custom", {"tools": [CUSTOM], "tool_choice": {
        "type": "custom", "custom": {"name": "sh"}}},
     {"tool_choice": {"type": "tool", "name": "sh"}}, ""),
    ("2.1 tool_choice unknown", {"tools": [F], "tool_choice": "any"}, "tool_choice", ""),
    ("0.2 S tool_choice undeclared", {"tools": [F], "tool_choice": function("g")},
     "tool_choice", ""),
    ("0.2 S tool_choice without tools", {"tool_choice": "required"}, "tool_choice", ""),
    ("2.1 no tools, no force", {"tool_choice": "auto"}, {"tool_choice": UNSET}, ""),
    ("2.1 allowed_tools auto", {"tools": [F, function("g")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [F]}}},
     {"tools": [F_TOOL], "tool_choice": {"type": "auto"}}, ""),
    ("2.1 allowed_tools, none of them", {"tools": [F], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
     {"tool_choice": {"type": "none"}}, ""),
    ("2.1 allowed_tools required of none", {"tools": [F], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}},
     "tool_choice", ""),
    ("2.1 allowed_tools required", {"tools": [F, function("g")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [F]}}},
     {"tools": [F_TOOL], "tool_choice": {"type": "any"}}, ""),
    ("2.1 force while thinking", effort("high", BOTH, tools=[F], tool_choice="required"),
     {"thinking": UNSET, "tool_choice": {"type": "any"}}, "reasoning_effort"),
    ("2.1 parallel false", {"tools": [F], "parallel_tool_calls": False},
     {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ""),
    ("2.1 parallel false, forced",
     {"tools": [F], "parallel_tool_calls": False, "tool_choice": "required"},
     {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, ""),
    ("2.1 parallel false, none",
     {"tools": [F], "parallel_tool_calls": False, "tool_choice": "none"},
     {"tool_choice": {"type": "none"}}, ""),
    ("2.1 parallel true", {"tools": [F], "parallel_tool_calls": True}, {"tool_choice": UNSET}, ""),
    ("2.1 parallel without tools", {"parallel_tool_calls": False}, {"tool_choice": UNSET}, ""),
    ("2.1 response_format text", {"response_format": {"type": "text"}},
     {"output_config": UNSET, "system": UNSET}, ""),
    ("2.1 json_schema", format_(CHAT_SHAPE, strict=True),
     {"output_config": {"format": {"type": "json_schema", "schema": CHAT_SHAPE}}}, ""),
    ("1.8 schema cleaned", format_(OPEN, description="An x."),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "type": "object", "description": "An x.", "additionalProperties": False,
         "properties": {"x": {"type": "integer", "description": "(minimum: 1)"}}}}}}, ""),
    ("1.8 oneOf", format_({"oneOf": [CHAT_SHAPE, {"type": "array", "minItems": 2,
                                              "description": "L"}]}),
     {"output_config": {"format": {"type": "json_schema", "schema": {"anyOf": [
         CHAT_SHAPE, {"type": "array", "description": "L (minItems: 2)"}]}}}}, ""),
    ("1.8 a property called minimum", format_({
        "type": "object", "properties": {"minimum": {"enum": [{"oneOf": 1}]}}}),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "type": "object", "additionalProperties": False,
         "properties": {"minimum": {"enum": [{"oneOf": 1}]}}}}}}, ""),
    ("2.1 json_schema, older", {"model": OLD, **format_(CHAT_SHAPE)},
     {"output_config": UNSET, "tool_choice": {"type": "tool", "name": "json_answer"},
      "tools": [{"name": "json_answer", "description": "Gives the answer.",
                 "input_schema": CHAT_SHAPE}]}, ""),
    ("2.1 json_schema and tools, older", {"model": OLD, "tools": [F], **format_(CHAT_SHAPE)},
     "response_format", ""),
    ("2.1 json_object", {"response_format": {"type": "json_object"}}, {"system": RULE}, ""),
    ("2.1 json_object and system", {"response_format": {"type": "json_object"}, "messages": [
        {"role": "system", "content": "S"}, user("Hi")]}, {"system": [text("S"), text(RULE)]}, ""),
    ("2.1 response_format unknown", {"response_format": {"type": "x"}}, "response_format.type", ""),
    *[(f"2.1 {key} dropped", {key: value}, {key: UNSET}, loss) for key, value, loss in [
        ("verbosity", "low", "verbosity"), ("prediction", {"type": "content"}, "(prediction)"),
        ("store", True, "(store)"), ("metadata", {"a": "b"}, "(metadata)"), ("seed", 7, "seed"),
        ("logit_bias", {"1": 2}, "logit_bias"), ("frequency_penalty", 1, "frequency_penalty"),
        ("presence_penalty", 0.5, "presence_penalty"),
        ("prompt_cache_key", "k", "(prompt_cache_key)"),
        ("prompt_cache_options", {"ttl": "30m"}, "(prompt_cache_options)"),
        ("prompt_cache_retention", "24h", "(prompt_cache_retention)"),
        ("moderation", {"model": "x"}, "(moderation)"), ("verbosity", "medium", ""),
        ("store", False, ""), ("logit_bias", {}, ""), ("frequency_penalty", 0, ""),
        ("metadata", {}, ""), ("seed", None, "")]],
    ("2.1 user", {"user": "u-1", "safety_identifier": "s"}, {"metadata": {"user_id": "u-1"}},
     "(safety_identifier)"),
    ("2.1 safety_identifier", {"safety_identifier": "s"}, {"metadata": {"user_id": "s"}}, ""),
    ("2.1 user by e-mail", {"user": "ann@example.com"}, {"metadata": UNSET}, "(user)"),
    ("2.1 user by phone", {"user": "+49 170 1234567"}, {"metadata": UNSET}, "(user)"),
    ("2.1 logprobs", {"logprobs": True}, "logprobs", ""),
    ("2.1 logprobs false", {"logprobs": False, "top_logprobs": 0}, {}, ""),
    ("2.1 top_logprobs", {"top_logprobs": 3}, "top_logprobs", ""),
    ("2.1 modalities", {"modalities": ["text", "audio"]}, "modalities", ""),
    ("2.1 modalities text", {"modalities": ["text"]}, {}, ""),
    ("2.1 audio", {"audio": {"voice": "x"}, "modalities": ["text"]}, "audio", ""),
    ("2.1 service_tier auto", {"service_tier": "auto"}, {"service_tier": "auto"}, ""),
    ("2.1 service_tier default", {"service_tier": "default"},
     {"service_tier": "standard_only"}, ""),
    ("2.1 service_tier flex", {"service_tier": "flex"}, {"service_tier": UNSET}, "(service_tier)"),
    ("2.1 web_search_options", {"web_search_options": {"user_location": {
        "type": "approximate", "approximate": {"city": "Bern", "country": "CH"}}}},
     {"tools": [{"type": "web_search_20250305", "name": "web_search", "user_location": {
         "type": "approximate", "city": "Bern", "country": "CH"}}]}, ""),
    ("2.1 web_search_options, size", {"web_search_options": {"search_context_size": "high"}},
     {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "search_context_size"),
    ("2.1 prompt_cache_breakpoint",
     said(text("a", prompt_cache_breakpoint={"mode": "explicit"})),
     {"messages": [user([text("a", cache_control=MARK)])]}, ""),
    ("2.1 prompt_cache_breakpoint 12h",
     said(text("a", prompt_cache_breakpoint={"mode": "explicit", "ttl": "12h"})),
     {"messages": [user([text("a", cache_control=HOUR)])]}, ""),
    ("2.1 cache_control", said(text("a", cache_control=HOUR), text("b")),
     {"messages": [user([text("a", cache_control=HOUR), text("b")])]}, ""),
    ("2.1 cache_control on a message", {"messages": [{**user("a"), "cache_control": MARK}]},
     {"messages": [user([text("a", cache_control=MARK)])]}, ""),
    ("2.1 cache_control on system", {"messages": [
        {"role": "system", "content": [text("S", cache_control=MARK)]}, user("Hi")]},
     {"system": [text("S", cache_control=MARK)]}, ""),
    ("2.1 cache_control on a tool", {"tools": [{**F, "cache_control": MARK}]},
     {"tools": [{**F_TOOL, "cache_control": MARK}]}, ""),
    ("2.1 cache_control, a fifth", said(*[text("a", cache_control=MARK)] * 5),
     {"messages": [user([*[text("a", cache_control=MARK)] * 4, text("a")])]}, "(cache_control)"),
    ("2.1 unknown", {"new": 1}, {"new": UNSET}, "unknown"),
    ("2.1 unknown, null", {"new": None}, {"new": UNSET}, ""),
    ("0.2 unknown in a message", {"messages": [{**user("Hi"), "new": 1}]}, {}, "unknown"),
    ("2.1 thinking without a budget", {"model": BUDGET, "thinking": {"type": "enabled"}},
     {"thinking": {"type": "enabled", "budget_tokens": gateway.THINKING_BUDGETS["medium"]}}, ""),
    ("2.1 thinking without a budget, 4.7+", {
        "model": NOW, "thinking": {"type": "enabled"}, "reasoning_effort": "high"},
     {"thinking": ADAPTIVE, "output_config": {"effort": "high"}}, ""),
    ("2.1 thinking", {"thinking": {"type": "enabled", "budget_tokens": 2000}},
     {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 10192}, ""),
    ("2.1 thinking and force", {"thinking": {"type": "adaptive"}, "tools": [F], "tool_choice": F},
     {"thinking": UNSET}, "thinking"),
    ("2.2 system joined", {"messages": [
        {"role": "developer", "content": "A"}, {"role": "system", "content": [text(""), text("B")]},
        user("Hi")]}, {"system": [text("A"), text("B")], "messages": [user("Hi")]}, ""),
    ("2.2 system later, older", {"messages": LATE},
     {"system": "S", "messages": [user([text("a"), text("b")])]}, ""),
    *[(f"2.2 system later, 4.8+, {where}", {"model": NOW, "messages": [
        {"system": {"role": "system", "content": "S"}, "assistant": SPOKE}.get(role, user(role))
        for role in where.split()]}, {"system": UNSET, "messages": expected}, "")
      for where, expected in [
          ("a system", [user("a"), LATER]), ("a system b", [user([text("a"), text("b")]), LATER]),
          ("a system assistant b", [user("a"), LATER, SPOKE, user("b")]),
          ("a assistant system b", [user("a"), SPOKE, user("b"), LATER]),
          ("a assistant system b system assistant d", [
              user("a"), SPOKE, user("b"), {**LATER, "content": [text("S"), text("S")]},
              SPOKE, user("d")]),
          ("a assistant system assistant b", [
              user("a"), {**SPOKE, "content": [text("c"), text("c")]}, user("b"), LATER])]],
    ("2.2 system last, behind an answer", {"model": NOW, "messages": [user("a"), SPOKE, LATER]},
     {"system": UNSET, "messages": [user("a"), SPOKE, user("S")]}, "messages"),
    ("2.2 system before a last answer", {
        "model": NOW, "messages": [user("a"), SPOKE, LATER, SPOKE]},
     {"system": "S", "messages": [user("a"), {**SPOKE, "content": [text("c"), text("c")]}]}, ""),
    ("2.2 no answer ends in a thought", {"messages": [
        user("a"), {"role": "assistant", "thinking_blocks": [THOUGHT_C]}, user("b"),
        {**SPOKE, "thinking_blocks": [THOUGHT_C]}, user("d")]}, {"messages": [
            user([text("a"), text("b")]), {**SPOKE, "content": [THOUGHT_C, text("c")]},
            user("d")]}, "(thinking)"),
    ("2.2 system between calls and results", {"model": NOW, **loop(
        asked(call("c")), {"role": "system", "content": "S"}, answer("c"))},
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c")]}, user([result("c")]),
                   {"role": "system", "content": "S"}]}, ""),
    ("0.2 C image in a system message", {"messages": [
        {"role": "system", "content": [image(PNG)]}, user("Hi")]}, "messages", ""),
    ("2.2 empty user text", {"messages": [user([text(""), text("a")]), user("")]},
     {"messages": [user("a")]}, ""),
    ("2.2 assistant parts", {"messages": [user("Hi"), {"role": "assistant", "content": [
        text("a"), {"type": "refusal", "refusal": "no"}]}, user("?")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": [text("a"), text("no")]},
                   user("?")]}, ""),
    ("2.2 assistant refusal", {"messages": [user("Hi"), {
        "role": "assistant", "content": None, "refusal": "no"}, user("?")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": "no"}, user("?")]}, ""),
    ("2.2 assistant empty", {"messages": [user("a"), {"role": "assistant", "content": ""},
                                          user("b")]},
     {"messages": [user([text("a"), text("b")])]}, ""),
    ("2.2 tool_calls", loop(asked(call("c", arguments='{"x": [1.0, "\\u2028"]}'), content="T"),
                            answer("c")),
     {"messages": [user("Hi"), {"role": "assistant", "content": [
         text("T"), use("c", x=[1.0, "\u2028"])]}, user([result("c")])]}, ""),
    ("2.2 no arguments", loop(asked(call("c", arguments=""), call("d", arguments=None)),
                              answer("c"), answer("d")),
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c"), use("d")]},
                   user([result("c"), result("d")])]}, ""),
    ("2.2 broken arguments", loop(asked(call("c", arguments="{")), answer("c")),
     "messages[1].tool_calls[0].function.arguments", ""),
    ("2.2 arguments of no object", loop(asked(call("c", arguments="[1]")), answer("c")),
     "messages[1].tool_calls[0].function.arguments", ""),
    ("2.2 thinking_blocks", loop(asked(call("c"), content="T", thinking_blocks=THOUGHTS,
                                       reasoning_content="Hm"), answer("c")),
     {"messages": [user("Hi"), {"role": "assistant", "content": [
         *THOUGHTS, text("T"), use("c")]}, user([result("c")])]}, ""),
    ("1.7 thinking of another issuer", {"messages": [user("Hi"), {
        "role": "assistant", "content": "T", "thinking_blocks": [
            {"type": "thinking", "thinking": "Hm", "signature": "gw1.x"},
            {"type": "thinking", "thinking": "Hm", "signature": ""}]}, user("?")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": "T"}, user("?")]},
     "(thinking)"),
    ("1.7 reasoning_content alone", {"messages": [user("Hi"), {
        "role": "assistant", "content": "T", "reasoning_content": "Hm"}, user("?")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": "T"}, user("?")]},
     "(reasoning_content)"),
    ("1.7 budget, thought kept", effort("low", BUDGET, **loop(
        asked(call("c"), thinking_blocks=THOUGHTS), answer("c"))),
     {"thinking": {"type": "enabled", "budget_tokens": 1024}}, ""),
    ("1.7 budget, thought lost", effort("low", BUDGET, **loop(asked(call("c")), answer("c"))),
     {"thinking": UNSET}, "(reasoning_effort)"),
    ("1.7 thinking first", loop(
        {"role": "assistant", "content": "A"}, asked(call("c"), thinking_blocks=THOUGHTS),
        answer("c")), {"messages": [user("Hi"), {"role": "assistant", "content": [
            *THOUGHTS, text("A"), use("c")]}, user([result("c")])]}, ""),
    ("2.2 assistant audio", {"messages": [user("Hi"), {"role": "assistant", "audio": {"id": "a"}},
                                          user("?")]}, "messages[1].audio", ""),
    ("2.2 tool parts", loop(asked(call("c")), answer("c", [text("a"), text(""), text("b")])),
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c")]},
                   user([result("c", [text("a"), text("b")])])]}, ""),
    ("2.2 tool empty", loop(asked(call("c")), answer("c", "")), {"messages": [
        user("Hi"), {"role": "assistant", "content": [use("c")]}, user([result("c", "")])]}, ""),
    ("1.9 file in a tool result", loop(asked(call("c")), answer("c", [
        file("data:application/pdf;base64," + PDF), text("a", cache_control=MARK)])),
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c")]}, user([result("c", [
         {"type": "document", "source": {"type": "base64", "media_type": "application/pdf",
                                         "data": PDF}},
         text("a", cache_control=MARK)])])]}, ""),
    ("2.2 function", {"functions": [{"name": "f"}], "messages": [
        user("Hi"), {"role": "assistant", "content": None,
                     "function_call": {"name": "f", "arguments": '{"x":1}'}},
        {"role": "function", "name": "f", "content": "ok"}]},
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("call_f_0", x=1)]},
                   user([result("call_f_0")])]}, ""),
    ("2.2 merging, results first in call order", loop(
        asked(call("c"), call("d"), content="T"), answer("d", "2"), user("u"), answer("c", "1"),
        user("v")),
     {"messages": [user("Hi"), {"role": "assistant", "content": [text("T"), use("c"), use("d")]},
                   user([result("c", "1"), result("d", "2"), text("u"), text("v")])]}, ""),
    ("2.2 merging neighbours", {"messages": [user("a"), user([text("b")]), user("c")]},
     {"messages": [user([text("a"), text("b"), text("c")])]}, ""),
    ("2.2 result of an unknown id", loop(answer("c")), "messages", ""),
    ("2.2 call without result", loop(asked(call("c")), user("?")), "messages", ""),
    ("2.2 prefill", {"messages": [user("Hi"), {"role": "assistant", "content": "So \n"}]},
     {"messages": [user("Hi"), {"role": "assistant", "content": "So"}]}, ""),
    ("2.2 prefill of parts", {"messages": [user("Hi"), {"role": "assistant", "content": [
        text("He "), text(" ")]}]},
     {"messages": [user("Hi"), {"role": "assistant", "content": "He"}]}, ""),
    ("2.2 only system", {"messages": [{"role": "system", "content": "S"}]}, "messages", ""),
    ("2.2 no messages", {"messages": []}, "messages", ""),
    ("2.2 tool blocks without tools", {"messages": [user("Hi"), asked(call("c")), answer("c")]},
     {"tools": [{"name": "f", "input_schema": {"type": "object"}}],
      "tool_choice": {"type": "none"}}, ""),
    ("2.2 name", {"messages": [{**user("Hi"), "name": "Ann"}]}, {"messages": [user("Hi")]},
     "(name)"),
    *[(f"2.3 {level}, {model}", effort(level, model), {
        "thinking": {"type": "enabled", "budget_tokens": budget},
        "max_tokens": min(8192 + budget, 64_000)}, "")
      for model in ("claude-sonnet-4-20250514", "claude-sonnet-4-5-20250929",
                    "claude-3-7-sonnet-20250219")
      for level, budget in [("minimal", 1024), ("low", 1024), ("medium", 4096), ("high", 16384),
                            ("xhigh", 32768), ("max", 32768)]],
    ("2.3 max, claude-opus-4-1", effort("max", BUDGET), {
        "thinking": {"type": "enabled", "budget_tokens": 31488}, "max_tokens": 32_000}, ""),
    *[(f"2.3 none, {model}", effort("none", model), {"thinking": UNSET, "output_config": UNSET}, "")
      for model in (BUDGET, BOTH, OLD)],
    *[(f"2.3 {level}, 4.6", effort(level, BOTH),
       {"thinking": ADAPTIVE, "output_config": {"effort": sent}}, loss)
      for level, sent, loss in [("minimal", "low", ""), ("low", "low", ""),
                                ("medium", "medium", ""), ("high", "high", ""),
                                ("xhigh", "max", "reasoning_effort"), ("max", "max", "")]],
    *[(f"2.3 {level}, 5", effort(level, model),
       {"thinking": ADAPTIVE, "output_config": {"effort": sent}}, "")
      for model in (NOW, "claude-opus-4-7", FORCED, "claude-haiku-5-5", "claude-fable-5-1")
      for level, sent in [("minimal", "low"), ("low", "low"), ("medium", "medium"),
                          ("high", "high"), ("xhigh", "xhigh"), ("max", "max")]],
    *[(f"2.3 none, {model}", effort("none", model),
       {"thinking": {"type": "disabled"}, "output_config": UNSET}, "")
      for model in (NOW, "claude-haiku-5-5")],
    *[(f"2.3 none, {model}", effort("none", model),
       {"thinking": UNSET, "output_config": {"effort": "low"}}, "reasoning_effort")
      for model in (FORCED, "claude-sonnet-5-5", "claude-fable-5", "claude-mythos-5-1")],
    ("2.3 effort of a model without", effort("high", OLD), {"thinking": UNSET}, "reasoning_effort"),
    ("2.3 effort unknown", effort("much", BOTH), "reasoning_effort", ""),
    ("2.3 budget under the cap", effort("high", BUDGET, max_tokens=2000),
     {"thinking": {"type": "enabled", "budget_tokens": 1488}, "max_tokens": 2000}, ""),
    ("2.3 budget without room", effort("high", BUDGET, max_tokens=1500),
     {"thinking": UNSET, "max_tokens": 1500}, "reasoning_effort"),
    ("2.3 effort absent", {"model": NOW}, {"thinking": UNSET, "output_config": UNSET}, ""),
    ("2.3 effort and format", effort("low", NOW, **format_(CHAT_SHAPE)),
     {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": CHAT_SHAPE}}},
     ""),
    ("1.5 illegal ids", loop(asked(call("functions.x:0")), answer("functions.x:0")),
     {"messages": [user("Hi"), {"role": "assistant", "content": [
         use("call_a8ec92fdf10c730c1a5051")]}, user([result("call_a8ec92fdf10c730c1a5051")])]},
     ""),
    ("1.9 image data", said(image(PNG)), {"messages": [user([PNG_BLOCK])]}, ""),
    ("1.9 image data, odd spelling", said(image("DATA:image/PNG;charset=x;BASE64,aGk=")),
     {"messages": [user([PNG_BLOCK])]}, ""),
    ("1.9 image URL", said(image("https://example.com/a")), {"messages": [user([
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a"}}])]}, ""),
    ("1.9 image of another type", said(image("data:image/tiff;base64,aGk=")), "image_url", ""),
    ("1.9 detail", said(image(PNG, detail="low")), {"messages": [user([PNG_BLOCK])]}, "(detail)"),
    ("1.9 detail auto", said(image(PNG, detail="auto")), {"messages": [user([PNG_BLOCK])]}, ""),
    ("1.9 PDF", said(file("data:application/pdf;base64," + PDF, filename="a.pdf")),
     {"messages": [user([{"type": "document", "title": "a.pdf", "source": {
         "type": "base64", "media_type": "application/pdf", "data": PDF}}])]}, ""),
    ("1.9 plain text", said(file("data:text/plain;base64,w6k=")), {"messages": [user([
        {"type": "document", "source": {"type": "text", "media_type": "text/plain",
                                        "data": "é"}}])]}, ""),
    ("1.9 text that is none", said(file("data:text/plain;base64,/w==")),
     "messages[0].content[0].file.file_data", ""),
    ("1.9 a file of another type", said(file("data:application/zip;base64,aGk=")), "file", ""),
    ("1.9 file_id", said({"type": "file", "file": {"file_id": "f"}}),
     "messages[0].content[0].file.file_id", ""),
    ("1.9 audio", said({"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}),
     "input_audio", ""),
    ("0.2 C unknown part", said({"type": "video"}), "messages[0].content[0].type", ""),
    ("2.2 unknown role", {"messages": [{"role": "x", "content": "a"}]}, "messages[0].role", ""),
]


FAR = {"type": "thinking", "thinking": "Hm", "signature": "SIG", "family": "opus"}
CASES += [
    ("2.2 texts of white space", {"messages": [
        {"role": "system", "content": "\n"}, user(" "), user([text("a"), text(" \n")]),
        asked(call("c"), content="\n\n"), answer("c", [text("\t")]), user("b")], "tools": [F]},
     {"messages": [user("a"), {"role": "assistant", "content": [use("c")]},
                   user([result("c", ""), text("b")])], "system": UNSET}, ""),
    ("2.2 a function called again and again", {"functions": [{"name": "f"}], "messages": [
        user("Hi"), *[message for i in range(3) for message in (
            {"role": "assistant", "content": None, "function_call": {"name": "f",
                                                                     "arguments": "{}"}},
            {"role": "function", "name": "f", "content": str(i)})]]},
     {"messages": [user("Hi"), *[message for i in range(3) for message in (
         {"role": "assistant", "content": [use(f"call_f_{i}")]},
         user([result(f"call_f_{i}", str(i))]))]]}, ""),
    ("1.5 ids that come again", {"tools": [F], "messages": [
        user("Hi"), asked(call("c")), answer("c", "1"), asked(call("c"), call("c"), call("c_2")),
        answer("c", "2"), answer("c", "3"), answer("c_2", "4"), answer("c", "5")]},
     {"messages": [user("Hi"), {"role": "assistant", "content": [use("c")]},
                   user([result("c", "1")]),
                   {"role": "assistant", "content": [use("c_2_"), use("c_3"), use("c_2")]},
                   user([result("c_2_", "2"), result("c_3", "3"), result("c_3", "5"),
                         result("c_2", "4")])]}, ""),
    ("1.7 a thought of another family is lost", {
        "model": "claude-sonnet-4-5", "reasoning_effort": "high", **loop(
            asked(call("c"), thinking_blocks=[FAR]), answer("c"))},
     {"thinking": UNSET}, "(thinking), (reasoning_effort)"),
    ("2.1 strict, what it does not take", {"tools": [function("f", strict=True, parameters={
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": [],
        "additionalProperties": False})]}, {}, "strict"),
    ("2.1 an unknown option of a search", {"web_search_options": {"foo": 1}}, {}, "unknown"),
    ("2.1 a search beside a function of its name", {
        "web_search_options": {}, "tools": [function("web_search")]},
     {"tools": [{**F_TOOL, "name": "own_web_search"},
                {"type": "web_search_20250305", "name": "web_search"}]}, ""),
    ("2.1 no thinking and yet effort", {"model": NOW, "thinking": {"type": "disabled"},
                                        "reasoning_effort": "high"},
     {"thinking": {"type": "disabled"}}, "reasoning_effort"),
    ("2.1 an address in two lines", {"user": "mail a@b.co\nnext"}, {"metadata": UNSET}, "(user)"),
    ("1.8 oneOf, anyOf and allOf", format_({
        "oneOf": [{"type": "string"}], "anyOf": [{"type": "integer"}], "allOf": [{"const": 1}]}),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "allOf": [{"anyOf": [{"type": "string"}]}], "anyOf": [{"type": "integer"}],
         "const": 1}}}}, ""),
    ("1.8 formats and maps", format_({"type": "object", "properties": {
        "a": {"type": "string", "format": "password"}, "b": {"type": "string", "format": "uuid"},
        "c": {"type": "object", "additionalProperties": {"type": "integer"}},
        "d": {"description": "D", "allOf": [{"$ref": "#/$defs/A"}]}, "e": {"format": {}}},
        "$defs": {"A": {}}}),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "type": "object", "additionalProperties": False, "$defs": {"A": {}}, "properties": {
             "a": {"type": "string", "description": "(format: \"password\")"},
             "e": {"description": "(format: {})"},
             "b": {"type": "string", "format": "uuid"},
             "c": {"type": "object", "additionalProperties": False,
                   "description": "(additionalProperties: {\"type\":\"integer\"})"},
             "d": {"description": "D", "$ref": "#/$defs/A"}}}}}}, "response_format"),
    ("1.8 an allOf that is no list", format_({"allOf": 5, "anyOf": [], "oneOf": []}),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "anyOf": [], "allOf": [{"anyOf": []}]}}}}, ""),
    ("1.8 an object or null", format_({"type": ["object", "null"]}),
     {"output_config": {"format": {"type": "json_schema", "schema": {
         "type": ["object", "null"], "additionalProperties": False}}}}, ""),
]


@pytest.mark.parametrize("params, expected, lost", [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_a_chat_request_becomes_one_of_messages(params: JSON, expected: Any, lost: str) -> None:
    if isinstance(expected, str):
        with pytest.raises(GatewayError) as caught:
            to_messages(params)
        assert (caught.value.status, caught.value.param) == (400, expected)
        return
    wire, losses, _ = to_messages(params)
    assert {key: wire.get(key) for key in expected} == expected
    assert ", ".join(f"({name})" if is_hint else name for name, is_hint in losses.items()) == lost
    assert to_messages(params)[0] == wire
    assert gateway.dump_json(to_messages(params)[0]) == gateway.dump_json(wire)


def test_names_are_made_legal_in_pairs_and_restored() -> None:
    name = "mcp.server/" + "x" * 150
    wire, losses, rewrites = to_messages(loop(
        asked(call("c", name)), answer("c"), tools=[function(name)], tool_choice=function(name)))
    (sent,) = (tool["name"] for tool in wire["tools"])
    assert len(sent) == 63 and re.fullmatch("[A-Za-z0-9_-]+", sent)
    assert wire["messages"][1]["content"][0]["name"] == wire["tool_choice"]["name"] == sent
    assert rewrites.names == {sent: name} and losses == {}
    reply = gateway.DIALECTS["messages"].parse_reply({"content": [use("d", sent)]}, rewrites)
    assert reply.blocks == [ToolCall(id="d", name=name)]


def test_the_configs_word_on_a_model_counts() -> None:
    assert to_messages({}, default_max_tokens=99)[0]["max_tokens"] == 99
    assert to_messages({"max_tokens": 99}, max_output_tokens=50)[:2] == (
        {"model": BOTH, "max_tokens": 50, "messages": [user("Hi")]}, {"max_tokens": False})
    thinking = {"type": "enabled", "budget_tokens": 4000, "display": "omitted"}
    for ceiling, asked, fitting, lost in (
            (3000, {"max_tokens": 5000}, {**thinking, "budget_tokens": 2488},
             {"max_tokens": False, "thinking": False}),
            (3000, {}, {**thinking, "budget_tokens": 2488}, {"thinking": False}),
            (5000, {"max_tokens": 6000}, thinking, {"max_tokens": False}),
            (1500, {}, None, {"thinking": False})):
        wire, losses, _ = to_messages({"thinking": thinking, **asked}, max_output_tokens=ceiling)
        assert (wire["max_tokens"], wire.get("thinking"), losses) == (ceiling, fitting, lost)
    wire, losses, _ = to_messages({"tools": [F], "tool_choice": "required"},
                                  caps={"forced_tools": "auto"})
    assert (wire["tool_choice"], losses) == ({"type": "auto"}, {"tool_choice": False})
    wire, losses, _ = to_messages(effort("xhigh", BUDGET), caps={
        "thinking": "adaptive", "efforts": ("high", "low")})
    assert (wire["output_config"], losses) == ({"effort": "high"}, {"reasoning_effort": False})


def test_strict_refuses_what_is_lost_but_no_hint() -> None:
    losses = Losses()
    losses.hint("store")
    losses.refuse()
    losses.drop("seed")
    losses.drop("store")
    losses.hint("seed")
    with pytest.raises(GatewayError, match="seed") as caught:
        losses.refuse()
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")


# ---- Messages to Chat Completions: answers ----


def message(*content: JSON, stop: str = "end_turn", usage: Any = None, **more: Any) -> JSON:
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x",
            "content": list(content), "stop_reason": stop, "stop_sequence": None,
            "usage": usage or {"input_tokens": 3, "output_tokens": 4}, **more}


DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "signature": "signature_delta"}


def block_events(index: int, block: JSON) -> Iterator[JSON]:
    empty: JSON = {"text": "", "thinking": "", "signature": "", "input": {}, "citations": None}
    yield {"type": "content_block_start", "index": index,
           "content_block": {key: empty.get(key, value) for key, value in block.items()}}
    yield {"type": "ping"}
    deltas = [{"type": DELTAS[key], key: piece} for key in ("text", "thinking", "signature")
              for piece in [block.get(key, "")[:2], block.get(key, "")[2:]] if key in block]
    if "signature" in block:
        deltas[-2:] = [{"type": "signature_delta", "signature": block["signature"]}]
    deltas += [{"type": "citations_delta", "citation": each}
               for each in block.get("citations") or ()]
    said_ = gateway.encode_json(block["input"]) if block.get("input") else ""
    deltas += [{"type": "input_json_delta", "partial_json": piece}
               for piece in ["", said_[:3], said_[3:]] if "input" in block]
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def message_events(whole: JSON) -> list[JSON]:
    """The recorded shape of the stream that spells the same answer."""
    usage = whole["usage"]
    return [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None,
                                              "usage": {**usage, "output_tokens": 1}}},
        *(event for index, block in enumerate(whole["content"])
          for event in block_events(index, block)),
        {"type": "new_kind", "x": 1},
        {"type": "message_delta", "delta": {key: whole[key] for key in whole if "stop_" in key},
         "usage": {"output_tokens": usage["output_tokens"], "input_tokens": None}},
        {"type": "message_stop"}, {"type": "error", "error": {"message": "after the end"}}]


def wire_events(events: Iterable[JSON]) -> bytes:
    return b"".join(gateway.sse(gateway.dump_json(event), event["type"]) for event in events)


def as_chat(whole: JSON, rewrites: Rewrites | None = None, **chat: Any) -> JSON:
    reply = gateway.DIALECTS["messages"].parse_reply(whole, rewrites or Rewrites())
    body = gateway.DIALECTS["chat"].render_reply(reply, Chat("m", [], **chat), 7)
    return json.loads(gateway.dump_json(body))


def as_chunks(stream: bytes, rewrites: Rewrites | None = None, **chat: Any) -> list[JSON]:
    renderer = gateway.DIALECTS["chat"].renderer(Chat("m", [], **chat), 7)
    events = chat_parsed("messages", [stream], rewrites)
    out = b"".join(renderer.feed(event) for event in events)
    lines = out.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line[:6] == "data: " for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]


def merge(chunks: list[JSON]) -> JSON:
    """The message that the chunks spell, as the SDK reads them: a list's items by their index."""
    whole: JSON = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        for key, value in choice["delta"].items():
            if key == "tool_calls":
                calls = whole.setdefault(key, [])
                for part in value:
                    if part["index"] == len(calls):
                        calls.append({**part, part["type"]: dict(part[part["type"]])})
                        del calls[-1]["index"]
                    else:
                        kind = calls[part["index"]]["type"]
                        for name, piece in part[kind].items():
                            calls[part["index"]][kind][name] += piece
            elif isinstance(value, str) and key in whole:
                whole[key] += value
            else:
                assert key not in whole, "a second list needs indexes"
                whole[key] = value
    return whole


CITED = {"type": "web_search_result_location", "url": "https://a", "title": "A", "cited_text": "x",
         "encrypted_index": "y"}
SEARCH = [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
          {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}]
THOUGHT = {"type": "thinking", "thinking": "Hmm", "signature": "sig"}
CACHES = {"input_tokens": 3, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 7,
          "output_tokens": 4, "output_tokens_details": {"thinking_tokens": 2},
          "cache_creation": {"ephemeral_1h_input_tokens": 6}, "service_tier": "standard"}


def called(id_: str, arguments: str, name: str = "f") -> JSON:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def cited(start: int, end: int) -> JSON:
    return {"type": "url_citation", "url_citation": {
        "url": "https://a", "title": "A", "start_index": start, "end_index": end}}


# What Anthropic answers; what the message says; its finish_reason.
ANSWERS: dict[str, tuple[JSON, JSON, str]] = {
    "2.4 text": (message(text("Hi \u2028👋")), {"content": "Hi \u2028👋"}, "stop"),
    "2.4 texts": (message(text("a"), text("b")), {"content": "ab"}, "stop"),
    "2.4 nothing": (message(), {"content": ""}, "stop"),
    "2.4 parallel tools": (
        message(text("T"), use("c", x={"y": [1, "é"]}), use("d"), use("e", "g"), stop="tool_use"),
        {"content": "T", "tool_calls": [called("c", '{"x":{"y":[1,"é"]}}'), called("d", "{}"),
                                        called("e", "{}", "g")]}, "tool_calls"),
    "2.4 thinking": (
        message(THOUGHT, {"type": "redacted_thinking", "data": "red"}, text("a")),
        {"content": "a", "reasoning_content": "Hmm", "thinking_blocks": [
            THOUGHT, {"type": "redacted_thinking", "data": "red"}]}, "stop"),
    "2.4 thinking without text": (
        message({**THOUGHT, "thinking": ""}, text("a")),
        {"content": "a", "thinking_blocks": [{**THOUGHT, "thinking": ""}]}, "stop"),
    "2.4 refusal": (
        message(text("a"), stop="refusal", stop_details={
            "type": "refusal", "category": None, "explanation": "No."}),
        {"content": "a", "refusal": "No."}, "content_filter"),
    "2.4 refusal unexplained": (
        message(stop="refusal", stop_details=None), {"content": ""}, "content_filter"),
    "2.4 citations": (
        message(text("ab"), text("cd👋", citations=[CITED, {"type": "char_location"}]), text("e"),
                text("f", citations=[CITED])),
        {"content": "abcd👋ef", "annotations": [cited(2, 5), cited(6, 7)]}, "stop"),
    "2.4 server tools": (
        message(*SEARCH, text("a"), {"type": "new", "x": 1}, {"type": "container_upload"}),
        {"content": "a"}, "stop"),
    "11 max_tokens": (message(text("a"), stop="max_tokens"), {"content": "a"}, "length"),
    "11 context": (message(stop="model_context_window_exceeded"), {"content": ""}, "length"),
    "11 stop_sequence": (message(text("a"), stop="stop_sequence"), {"content": "a"}, "stop"),
    "11 pause_turn": (message(*SEARCH, stop="pause_turn"), {"content": ""}, "stop"),
    "11 compaction": (message(text("a"), stop="compaction"), {"content": "a"}, "stop"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_becomes_one_of_chat(name: str) -> None:
    whole, expected, finish = ANSWERS[name]
    body = as_chat(whole)
    assert body == {
        "id": "chatcmpl-msg_1", "object": "chat.completion", "created": 7, "model": "claude-x",
        "system_fingerprint": None, "usage": body["usage"], "choices": [{
            "index": 0, "logprobs": None, "finish_reason": finish,
            "message": {"role": "assistant", "content": None, "refusal": None, **expected}}]}
    chunks = as_chunks(wire_events(message_events(whole)))
    assert merge(chunks) == {"role": "assistant", "content": "", **expected}
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + [finish], "once, and last"
    assert {(chunk["id"], chunk["object"], chunk["created"], chunk["model"], "usage" in chunk)
            for chunk in chunks} == {("chatcmpl-msg_1", "chat.completion.chunk", 7, "m", False)}
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks[1:])


def test_chunks_in_their_order() -> None:
    """8.1: id, type and name come once; indexes count calls, not blocks; thoughts whole at last."""
    whole = message(THOUGHT, *SEARCH, text("abc"), use("c", x=1), use("d"), stop="tool_use")
    chunks = as_chunks(wire_events(message_events(whole)))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""}, {"reasoning_content": "Hm"},
        {"reasoning_content": "m"}, {"content": "ab"}, {"content": "c"},
        {"tool_calls": [{"index": 0, "id": "c", "type": "function",
                         "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '":1}'}}]},
        {"tool_calls": [{"index": 1, "id": "d", "type": "function",
                         "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {"thinking_blocks": [THOUGHT]}, {}]


def test_usage_is_told_where_it_is_asked_for() -> None:
    """10: start, then what message_delta overwrites; never added."""
    usage = {"prompt_tokens": 15, "completion_tokens": 4, "total_tokens": 19,
             "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 7},
             "completion_tokens_details": {"reasoning_tokens": 2}}
    whole = message(text("a"), usage=CACHES)
    body = as_chat(whole)
    assert (body["usage"], body["service_tier"]) == (usage, "default")
    *chunks, last = as_chunks(wire_events(message_events(whole)), include_usage=True)
    assert (last["choices"], last["usage"], last["service_tier"]) == ([], usage, "default")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    parser = gateway.DIALECTS["messages"].parser(Rewrites())
    start = message_events(whole)[0]
    list(parser.feed(gateway.sse(gateway.dump_json(start))))
    assert parser.usage == Usage(15, 1, 5, 7, 6, 2), "an aborted stream is counted"
    late = [start, {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 9}},
            {"type": "message_stop"}]
    (*_, end) = chat_parsed("messages", [wire_events(late)])
    assert end == Finish("stop", Usage(21, 1, 5, 7, 6, 2), "", "default")


@pytest.mark.parametrize("tier, told", [("standard", "default"), ("priority", "priority"),
                                        ("batch", None), (None, None)])
def test_the_service_tier_is_told(tier: str | None, told: str | None) -> None:
    usage = {"input_tokens": 1, "output_tokens": 1, "service_tier": tier}
    assert as_chat(message(usage=usage)).get("service_tier") == told


def test_custom_tools_and_the_hidden_tool_are_undone() -> None:
    rewrites = Rewrites()
    rewrites.custom.add("sh")
    whole = message(use("c", "sh", input='l"s\u2028'), use("d", "sh", x=1), stop="tool_use")
    expected = [{"id": id_, "type": "custom", "custom": {"name": "sh", "input": said_}}
                for id_, said_ in [("c", 'l"s\u2028'), ("d", '{"x":1}')]]
    assert merge(as_chunks(wire_events(message_events(whole)), rewrites))["tool_calls"] == expected
    assert as_chat(whole, rewrites)["choices"][0]["message"]["tool_calls"] == expected
    rewrites = Rewrites()
    rewrites.json_tool = "json_answer"
    whole = message(use("c", "json_answer", x=[1]), stop="tool_use")
    (choice,) = as_chat(whole, rewrites)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"x":[1]}', "stop")
    assert "tool_calls" not in choice["message"]
    chunks = as_chunks(wire_events(message_events(whole)), rewrites)
    assert merge(chunks) == {"role": "assistant", "content": '{"x":[1]}'}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_deprecated_function_is_answered_alike() -> None:
    whole = message(use("c", x=1), use("d"), stop="tool_use")
    (choice,) = as_chat(whole, legacy_functions=True)["choices"]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"x":1}'}
    chunks = as_chunks(wire_events(message_events(whole)), legacy_functions=True)
    told = [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks]
    assert [each for each in told if each] == [
        {"name": "f", "arguments": ""}, {"arguments": '{"x'}, {"arguments": '":1}'}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_what_a_block_brings_at_its_start_counts() -> None:
    """Some servers say a block whole when they open it, and send no deltas."""
    events = [{"type": "message_start", "message": message()},
              {"type": "content_block_start", "index": 0, "content_block": text("ab")},
              {"type": "content_block_delta", "index": 0,
               "delta": {"type": "text_delta", "text": "c"}},
              {"type": "content_block_stop", "index": 0},
              {"type": "content_block_start", "index": 1, "content_block": use("c", x=1)},
              {"type": "content_block_stop", "index": 1},
              {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": None},
              {"type": "message_stop"}]
    reply = gateway.collect(chat_parsed("messages", [wire_events(events)]))
    assert reply.blocks == [Text(text="abc"), ToolCall(id="c", name="f", arguments={"x": 1})]


FAILURES = [("overloaded_error", 503, "server_error"), ("rate_limit_error", 429, "rate_limit"),
            ("api_error", 500, "server_error"), ("authentication_error", 401, "auth"),
            ("invalid_request_error", 400, "client_error"), ("timeout_error", 504, "server_error")]


@pytest.mark.parametrize("kind, status, label", FAILURES)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_an_error_event_is_an_error(kind: str, status: int, label: str, before: int) -> None:
    events = [*message_events(message(text("abc")))[:before],
              {"type": "error", "error": {"type": kind, "message": "Not now."}}]
    with pytest.raises(GatewayError, match="Not now.") as caught:
        chat_parsed("messages", [wire_events(events)])
    error = caught.value
    assert (error.status, error.type, error.provider_error) == (status, kind, label)


# ---- every pair of dialects: requests ----

KIND_FOR = {"chat": "openai", "responses": "openai", "messages": "anthropic", "gemini": "gemini"}
LEAST: dict[str, JSON] = {
    "chat": {"messages": [user("Hi")]}, "responses": {"input": "Hi"},
    "messages": {"max_tokens": 99, "messages": [user("Hi")]},
    "gemini": {"contents": [{"parts": [{"text": "Hi"}]}]}}


def understood(client: str, params: JSON, losses: Losses) -> Chat:
    return gateway.DIALECTS[client].parse_request(
        {**LEAST[client], **params, "model": "alias"}, losses)


def carry(client: str, wire: str, params: JSON,
          model: str) -> tuple[JSON, dict[str, bool], Rewrites]:
    """A client's request as it goes up, with what is lost on the way; a model may be KIND/NAME."""
    (kind, _, name), losses = model.rpartition("/"), Losses()
    chat = understood(client, params, losses)
    caps = gateway.find_caps(gateway.KINDS[kind or KIND_FOR[wire]], name)
    sent, rewrites = gateway.DIALECTS[wire].render_request(chat, Target(name, caps), losses)
    return sent, losses.names, rewrites


def turn(*parts: Any, role: str = "user") -> JSON:
    """Gemini's; a string is a text part."""
    return {"role": role, "parts": [
        {"text": part} if isinstance(part, str) else part for part in parts]}


def ran(name: str = "f", id_: str = "", signature: str = "", **args: Any) -> JSON:
    return {"functionCall": {"name": name, "args": args, **({"id": id_} if id_ else {})},
            **({"thoughtSignature": signature} if signature else {})}


def gave(response: Any = "ok", name: str = "f", id_: str = "", key: str = "output",
         **more: Any) -> JSON:
    return {"functionResponse": {
        "name": name, "response": response if isinstance(response, dict) else {key: response},
        **({"id": id_} if id_ else {}), **more}}


def contents(*turns: JSON, **more: Any) -> JSON:
    return {"contents": list(turns), **more}


def config(**about: Any) -> JSON:
    return {"generationConfig": about}


def declared(*tools: JSON, **calling: Any) -> JSON:
    made: JSON = {"tools": [{"functionDeclarations": list(tools)}]}
    return {**made, "toolConfig": {"functionCallingConfig": calling}} if calling else made


def thinks(**about: Any) -> JSON:
    return config(thinkingConfig=about)


def listed(*items: JSON, **more: Any) -> JSON:
    """Responses' input."""
    return {"input": list(items), **more}


def fcall(id_: str, name: str = "f", arguments: str = "{}", **more: Any) -> JSON:
    return {"type": "function_call", "call_id": id_, "name": name, "arguments": arguments, **more}


def output(id_: str, told: Any = "ok", kind: str = "function_call", **more: Any) -> JSON:
    return {"type": f"{kind}_output", "call_id": id_, "output": told, **more}


def spoken(role: str, content: Any, **more: Any) -> JSON:
    return {"role": role, "content": content, **more}


def flat(tool: JSON, **more: Any) -> JSON:
    """A tool of Chat Completions in the shape of Responses."""
    return {"type": tool["type"], **tool[tool["type"]], **more}


def typed(kind: str, **about: Any) -> JSON:
    return {"type": kind, **about}


def document(source: JSON, **more: Any) -> JSON:
    return typed("document", source=source, **more)


def asking(*parts: JSON) -> JSON:
    """A question of Chat Completions in parts."""
    return {"messages": [user(list(parts))]}


def history(*messages: JSON, **more: Any) -> JSON:
    """Messages' conversation."""
    return {"messages": [user("Hi"), *messages], **more}


NEW, NEWER, G25, G25_PRO = "gemini-3-flash", "gemini-3.7-pro", "gemini-2.5-flash", "gemini-2.5-pro"
PLAIN, GPT5, GPT52, GPT55, GPT6 = "gpt-4.1", "gpt-5", "gpt-5.2", "gpt-5.5", "gpt-6"
LOCAL = "openai-compatible/llama-4"
LONG_ID = "c" * 65
LEGAL_ID = f"call_{gateway.hashed(LONG_ID, 22)}"
SKIP = "skip_thought_signature_validator"
NO_ARGUMENTS = {"type": "object", "properties": {}}
F_CHAT = function("f", parameters=NO_ARGUMENTS)
F_FLAT = flat(F_CHAT, strict=False)
SH_CHAT = function("sh", description="Run.", parameters=CUSTOM_SCHEMA)
SH_CALL = typed("custom", id="c", custom={"name": "sh", "input": "ls"})
SH_ITEM = typed("custom_tool_call", call_id="c", name="sh", input="ls")
SH_DONE = output("c", kind="custom_tool_call")
F_USE = {"name": "f", "input_schema": {"type": "object"}}
PNG_PART = {"inlineData": {"mimeType": "image/png", "data": "aGk="}}
PDF_URI = "data:application/pdf;base64," + PDF
PDF_PART = {"inlineData": {"mimeType": "application/pdf", "data": PDF}}
PDF_BLOCK = document({"type": "base64", "media_type": "application/pdf", "data": PDF})
TEXT_BLOCK = document({"type": "text", "media_type": "text/plain", "data": "x"}, title="T")
AUDIO = typed("input_audio", input_audio={"data": "aGk=", "format": "mp3"})
GEMINI_FORMAT = {"$schema": "x", "type": "object", "properties": {
    "minLength": {"const": "a", "minLength": 1}}, "additionalProperties": False}
NAMESPACE = typed("namespace", name="ns", description="N", tools=[flat(F)])
HOSTED = ["file_search", "code_interpreter", "computer_use_preview", "image_generation", "mcp",
          "local_shell", "shell", "apply_patch", "tool_search", "programmatic_tool_calling"]
SERVER_TOOLS = ["web_fetch", "code_execution", "tool_search", "computer", "browser", "mcp_toolset",
                "bash", "text_editor", "memory"]

Row = tuple[str, JSON, Any, str]  # as in CASES; the request's `model` is the target's

CHAT_TO_GEMINI: list[Row] = [
    ("3 the model stands in the path", {"stream": True},
     {"model": UNSET, "stream": UNSET, "contents": [turn("Hi")], "generationConfig": UNSET}, ""),
    ("3.1 system", {"messages": [
        spoken("system", "A"), spoken("developer", [text("B"), text("")]), user("Hi"),
        spoken("system", "C")]},
     {"systemInstruction": {"parts": [{"text": each} for each in "ABC"]},
      "contents": [turn("Hi")]}, ""),
    *[(f"3.1 {list(params)[0]}", params, config(**sent), "") for params, sent in [
        ({"max_completion_tokens": 7, "max_tokens": 9}, {"maxOutputTokens": 7}),
        ({"max_tokens": 9}, {"maxOutputTokens": 9}), ({"temperature": 1.6}, {"temperature": 1.6}),
        ({"top_p": 0.5}, {"topP": 0.5}), ({"top_k": 40}, {"topK": 40}), ({"seed": 7}, {"seed": 7}),
        ({"stop": "END"}, {"stopSequences": ["END"]}),
        ({"stop": ["a", "b"]}, {"stopSequences": ["a", "b"]}),
        ({"response_format": {"type": "json_object"}},
         {"responseMimeType": "application/json"})]],
    ("3.1 five stops", {"stop": list("abcde")}, config(stopSequences=list("abcde")), ""),
    ("3.1 six stops", {"stop": list("abcdef")}, "stop", ""),
    ("3.1 penalties", {"model": G25, "frequency_penalty": 1, "presence_penalty": -1},
     config(frequencyPenalty=1, presencePenalty=-1), ""),
    ("3.1 penalties, 3", {"frequency_penalty": 1, "presence_penalty": 0, "seed": 1},
     config(seed=1), "frequency_penalty"),
    ("3.1 n", {"n": 2}, "n", ""), ("3.1 n of 1", {"n": 1}, {"generationConfig": UNSET}, ""),
    *[(f"3.1 {name} dropped", {name: value}, {"generationConfig": UNSET}, loss)
      for name, value, loss in [
        ("logit_bias", {"1": 2}, "logit_bias"), ("user", "u", "(user)"), ("verbosity", "low",
        "verbosity"), ("metadata", {"a": "b"}, "(metadata)"), ("store", True, "(store)"),
        ("prompt_cache_key", "k", "(prompt_cache_key)"), ("new", 1, "unknown")]],
    ("3.1 cache marks", {**asking(text("a", cache_control=MARK)), "tools": [
        {**F, "cache_control": MARK}]}, {"contents": [turn("a")]}, "(cache_control)"),
    ("1.8 json_schema", format_(GEMINI_FORMAT), config(
        responseMimeType="application/json", responseJsonSchema={
            "type": "object", "properties": {"minLength": {
                "enum": ["a"], "description": "(minLength: 1)"}},
            "additionalProperties": False}), ""),
    ("3.1 tools", {"tools": [function("f", description="D", parameters=OPEN), function("g")]},
     {"tools": [{"functionDeclarations": [
         {"name": "f", "description": "D", "parametersJsonSchema": OPEN}, {"name": "g"}]}],
      "toolConfig": UNSET}, ""),
    ("3.1 strict", {"tools": [function("f", parameters=CHAT_SHAPE, strict=True)]},
     declared({"name": "f", "parametersJsonSchema": CHAT_SHAPE}), "strict"),
    ("3.1 custom tool", {"tools": [CUSTOM]}, declared({
        "name": "sh", "description": "Run.", "parametersJsonSchema": CUSTOM_SCHEMA}), ""),
    *[(f"3.1 tool_choice {asks}", {"tools": [F, function("g")], "tool_choice": asks},
       {"toolConfig": {"functionCallingConfig": told}}, "") for asks, told in [
        ("auto", {"mode": "AUTO"}), ("none", {"mode": "NONE"}), ("required", {"mode": "ANY"}),
        (F, {"mode": "ANY", "allowedFunctionNames": ["f"]})]],
    *[(f"3.1 allowed_tools {mode}", {"tools": [F, function("g")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [F]}}},
       declared({"name": "f"}, **told), "") for mode, told in [
        ("auto", {"mode": "AUTO"}), ("required", {"mode": "ANY", "allowedFunctionNames": ["f"]})]],
    ("0.2 S tool_choice undeclared", {"tools": [F], "tool_choice": function("g")},
     "tool_choice", ""),
    ("3.1 parallel_tool_calls", {"tools": [F], "parallel_tool_calls": False},
     {"toolConfig": UNSET}, "parallel_tool_calls"),
    *[(f"3.1 effort {asks}, {model}", {"model": model, "reasoning_effort": asks}, thinks(
        includeThoughts=asks != "none", thinkingLevel=told),
       "" if asks == told.lower() else "reasoning_effort")
      for model, levels in [
        (NEW, "MINIMAL MINIMAL LOW MEDIUM HIGH HIGH HIGH"),
        ("gemini-3-pro-preview", "LOW LOW LOW MEDIUM HIGH HIGH HIGH"),
        (NEWER, "LOW LOW LOW MEDIUM HIGH HIGH HIGH"),
        ("gemini-4-flash", "LOW LOW LOW MEDIUM HIGH HIGH HIGH")]
      for asks, told in zip(gateway.EFFORTS, levels.split())],
    *[(f"3.1 effort {asks}, {model}", {"model": model, "reasoning_effort": asks}, thinks(
        includeThoughts=asks != "none", thinkingBudget=told),
       "reasoning_effort" if (model, asks) == (G25_PRO, "none") else "")
      for model, least in [(G25, 0), (G25_PRO, 128)]
      for asks, told in zip(gateway.EFFORTS, [least, 512, 1024, 8192, 24576, 24576, 24576])],
    ("3.1 effort of a model without", {"model": "gemini-2.0-flash", "reasoning_effort": "high"},
     {"generationConfig": UNSET}, "reasoning_effort"),
    ("3.1 effort absent", {"model": NEWER}, {"generationConfig": UNSET}, ""),
    ("3.1 effort unknown", {"reasoning_effort": "much"}, "reasoning_effort", ""),
    *[(f"3.1 service_tier {asks}", {"service_tier": asks}, {"serviceTier": told}, loss)
      for asks, told, loss in [
        ("default", "standard", ""), ("flex", "flex", ""), ("priority", "priority", ""),
        ("auto", UNSET, ""), ("scale", UNSET, "(service_tier)")]],
    ("3.1 modalities", {"modalities": ["text", "audio"]}, "modalities", ""),
    ("3.1 audio", {"audio": {"voice": "x"}}, "audio", ""),
    ("3.1 web_search_options", {"web_search_options": {}}, {"tools": [{"googleSearch": {}}]}, ""),
    ("3.2 users merge", {"messages": [user([text("a"), text("")]), user(""), user("b")]},
     {"contents": [turn("a", "b")]}, ""),
    ("3.2 assistant", {"messages": [user("a"), spoken("assistant", [
        text("b"), typed("refusal", refusal="c")]), spoken("assistant", ""), user("d")]},
     {"contents": [turn("a"), turn("b", "c", role="model"), turn("d")]}, ""),
    ("3.2 text and call", loop(asked(call("c", arguments='{"x":1}'), content="T"), answer("c")),
     {"contents": [turn("Hi"), turn("T", ran("f", "c", SKIP, x=1), role="model"),
                   turn(gave(id_="c"))]}, ""),
    ("3.2 call, 2.5", {"model": G25, **loop(asked(call("c")), answer("c"))},
     {"contents": [turn("Hi"), turn(ran(), role="model"), turn(gave())]}, ""),
    ("1.7 first call of each step of this turn alone", loop(
        asked(call("a")), answer("a"), user("Go"), asked(call("b"), call("c")), answer("b"),
        answer("c"), asked(call("d")), answer("d")),
     {"contents": [turn("Hi"), turn(ran("f", "a"), role="model"), turn(gave(id_="a")), turn("Go"),
                   turn(ran("f", "b", SKIP), ran("f", "c"), role="model"),
                   turn(gave(id_="b"), gave(id_="c")),
                   turn(ran("f", "d", SKIP), role="model"), turn(gave(id_="d"))]}, ""),
    ("3.2 arguments of no object", loop(asked(call("c", arguments="[1]")), answer("c")),
     "messages[1].tool_calls[0].function.arguments", ""),
    ("3.2 a result stays a string", loop(asked(call("c", "g")), answer("c", '{"$ref":"#"}'),
                                         tools=[function("g")]),
     {"contents": [turn("Hi"), turn(ran("g", "c", SKIP), role="model"),
                   turn(gave('{"$ref":"#"}', "g", "c"))]}, ""),
    ("3.2 results in call order, text behind", {"model": G25, **loop(
        asked(call("c"), call("d")), answer("d", "2"), user("u"), answer("c", "1"))},
     {"contents": [turn("Hi"), turn(ran(), ran(), role="model"), turn(gave("1"), gave("2")),
                   turn("u")]}, ""),
    ("3.2 picture in a result", loop(asked(call("c")), answer("c", [text("a"), image(PNG)])),
     {"contents": [turn("Hi"), turn(ran("f", "c", SKIP), role="model"),
                   turn(gave("a", id_="c", parts=[PNG_PART]))]}, ""),
    ("3.2 picture in a result, 2.5",
     {"model": G25, **loop(asked(call("c")), answer("c", [text("a"), image(PNG)]))},
     {"contents": [turn("Hi"), turn(ran(), role="model"), turn(gave("a"), PNG_PART)]}, ""),
    ("3.2 custom call", {"tools": [CUSTOM], "messages": [
        user("Hi"), asked(SH_CALL), answer("c")]},
     {"contents": [turn("Hi"), turn(ran("sh", "c", SKIP, input="ls"), role="model"),
                   turn(gave(name="sh", id_="c"))]}, ""),
    ("3.2 only system", {"messages": [spoken("system", "S")]}, "messages", ""),
    ("3.2 a result of no call", loop(answer("c")), "messages", ""),
    ("3.2 a call without result", loop(asked(call("c")), user("?")), "messages", ""),
    ("1.7 thoughts of another's", {"messages": [user("Hi"), spoken(
        "assistant", "T", thinking_blocks=THOUGHTS, reasoning_content="Hm"), user("?")]},
     {"contents": [turn("Hi"), turn("T", role="model"), turn("?")]}, "(thinking)"),
    ("3.1 logprobs", {"logprobs": True, "top_logprobs": 3},
     config(responseLogprobs=True, logprobs=3), ""),
    ("2.2 name", {"messages": [{**user("Hi"), "name": "Ann"}]}, {"contents": [turn("Hi")]},
     "(name)"),
    *[(f"1.9 {name}", asking(part), {"contents": [turn(told)]}, "") for name, part, told in [
        ("image data", image(PNG), PNG_PART),
        ("PDF", file(PDF_URI, filename="a.pdf"), PDF_PART),
        ("text", file("data:text/plain;base64,w6k=", filename="T"), "T\n\né"),
        ("wav", typed("input_audio", input_audio={"data": "aGk=", "format": "wav"}),
         {"inlineData": {"mimeType": "audio/wav", "data": "aGk="}}),
        ("mp3", AUDIO, {"inlineData": {"mimeType": "audio/mpeg", "data": "aGk="}})]],
    *[(f"1.9 image URL {url}", asking(image(url)), {"contents": [turn(
        {"fileData": {"mimeType": f"image/{kind}", "fileUri": url}})]}, "") for url, kind in [
        ("https://a/b.PNG?c=d.gif", "png"), ("https://a/b.webp", "webp"),
        ("https://a/b", "jpeg"), ("https://a/b.svg", "jpeg")]],
    ("1.9 file_id", asking({"type": "file", "file": {"file_id": "f"}}),
     "messages[0].content[0].file.file_id", ""),
]

RESPONSES_TO_CHAT: list[Row] = [
    ("4 input string", {}, {"messages": [user("Hi")]}, ""),
    ("4 instructions", {"instructions": "S"}, {"messages": [spoken("system", "S"), user("Hi")]},
     ""),
    *[(f"4 max_output_tokens, {model}", {"model": model, "max_output_tokens": 7},
       {field: 7, other: UNSET}, "") for model, field, other in [
        (PLAIN, "max_completion_tokens", "max_tokens"),
        (LOCAL, "max_tokens", "max_completion_tokens")]],
    *[(f"4 {name}", {name: value}, {name: value}, "") for name, value in [
        ("temperature", 1.5), ("top_p", 0.5), ("user", "u"), ("metadata", {"a": "b"}),
        ("store", False), ("service_tier", "flex"), ("prompt_cache_key", "k"),
        ("prompt_cache_retention", "24h")]],
    ("4 safety_identifier", {"safety_identifier": "s"}, {"safety_identifier": "s", "user": UNSET},
     ""),
    ("4 service_tier of Responses alone", {"service_tier": "ultrafast"}, {"service_tier": UNSET},
     "(service_tier)"),
    *[(f"4 {name}", {name: value}, {name: UNSET}, f"({name})") for name, value in [
        ("prompt_cache_options", {"mode": "explicit"}), ("moderation", {"model": "m"})]],
    ("4 stream", {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}},
     ""),
    ("4 parallel_tool_calls", {"tools": [flat(F)], "parallel_tool_calls": False},
     {"parallel_tool_calls": False, "tools": [F_CHAT]}, ""),
    ("2.2 parallel_tool_calls without tools", {"parallel_tool_calls": False, "tool_choice": "auto"},
     {"parallel_tool_calls": UNSET, "tool_choice": UNSET, "tools": UNSET}, ""),
    ("4 effort", {"model": GPT5, "reasoning": {"effort": "low", "summary": "auto"}},
     {"reasoning_effort": "low"}, ""),
    ("4 effort of a model without", {"reasoning": {"effort": "low"}}, {"reasoning_effort": UNSET},
     "reasoning_effort"),
    *[(f"4 reasoning.{key}", {"reasoning": {key: "x"}}, {}, f"({key})")
      for key in ("context", "mode", "generate_summary")],
    ("4 text.format text", {"text": {"format": {"type": "text"}}}, {"response_format": UNSET}, ""),
    ("4 text.format json_object", {"text": {"format": {"type": "json_object"}}},
     {"response_format": {"type": "json_object"}}, ""),
    ("4 text.format json_schema", {"text": {"format": typed(
        "json_schema", name="n", schema=CHAT_SHAPE, strict=True, description="D")}},
     format_(CHAT_SHAPE, name="n", strict=True, description="D"), ""),
    ("1.8 strict of an open schema", {"text": {"format": typed(
        "json_schema", name="n", schema=OPEN, strict=True)}},
     format_(OPEN, name="n", strict=False), "strict"),
    ("4 text.verbosity", {"model": GPT5, "text": {"verbosity": "low"}}, {"verbosity": "low"}, ""),
    ("4 tools", {"tools": [
        flat(function("f", description="D", parameters=CHAT_SHAPE, strict=True)),
        flat(function("g", parameters=OPEN, strict=None))]},
     {"tools": [function("f", description="D", parameters=CHAT_SHAPE, strict=True),
                function("g", parameters=OPEN)]}, ""),
    ("1.8 strict of an open tool", {"tools": [flat(function("f", parameters=OPEN, strict=True))]},
     {"tools": [function("f", parameters=OPEN)]}, "strict"),
    ("4 custom tool", {"tools": [flat(CUSTOM), typed("custom", name="x", format={
        "type": "grammar", "syntax": "lark", "definition": "start: X"})]},
     {"tools": [CUSTOM, typed("custom", custom={"name": "x", "format": {
         "type": "grammar", "grammar": {"syntax": "lark", "definition": "start: X"}}})]}, ""),
    ("4 custom tool, compatible", {"model": LOCAL, "tools": [flat(CUSTOM)]}, {"tools": [SH_CHAT]},
     ""),
    ("4 namespace", {"tools": [NAMESPACE, typed("namespace", name="o", tools=[
        flat(F), flat(CUSTOM)])]},
     {"tools": [function("ns__f", description="N", parameters=NO_ARGUMENTS), function(
         "o__f", parameters=NO_ARGUMENTS), typed("custom", custom={
             "name": "o__sh", "description": "Run."})]}, ""),
    *[(f"4 tool's {key}", {"tools": [flat(F, **{key: [{}]})]}, {"tools": [F_CHAT]}, f"({key})")
      for key in ("allowed_callers", "output_schema")],
    ("4 tool's defer_loading", {"tools": [flat(F, defer_loading=True)]}, {"tools": [F_CHAT]},
     "(defer_loading)"),
    ("4 web_search", {"model": "gpt-4o-search-preview", "tools": [typed(
        "web_search", user_location={"type": "approximate", "city": "Bern"})]},
     {"web_search_options": {"user_location": {
         "type": "approximate", "approximate": {"city": "Bern"}}}, "tools": UNSET}, ""),
    ("4 web_search of others", {"tools": [typed("web_search_preview")]}, {"tools": UNSET},
     "web_search"),
    *[(f"4 {kind} offered", {"tools": [typed(kind, x=1), flat(F)], "tool_choice": "auto"},
       {"tools": [F_CHAT], "tool_choice": "auto"}, kind) for kind in HOSTED],
    *[(f"4 {kind} forced", {"tools": [typed(kind)], "tool_choice": typed(kind)},
       "tool_choice.type", "") for kind in ("file_search", "mcp", "image_generation")],
    *[(f"4 tool_choice {asks}", {"tools": [flat(F)], "tool_choice": asks}, {"tool_choice": asks},
       "") for asks in ("auto", "none", "required")],
    ("4 tool_choice named", {"tools": [flat(F)], "tool_choice": typed("function", name="f")},
     {"tool_choice": function("f")}, ""),
    ("4 tool_choice of a namespace", {"tools": [NAMESPACE], "tool_choice": typed(
        "function", name="f", namespace="ns")}, {"tool_choice": function("ns__f")}, ""),
    ("4 tool_choice custom", {"tools": [flat(CUSTOM)], "tool_choice": typed("custom", name="sh")},
     {"tool_choice": typed("custom", custom={"name": "sh"})}, ""),
    ("4 tool_choice custom, compatible", {"model": LOCAL, "tools": [flat(CUSTOM)],
                                          "tool_choice": typed("custom", name="sh")},
     {"tool_choice": function("sh")}, ""),
    ("4 allowed_tools", {"tools": [flat(F), flat(function("g"))], "tool_choice": typed(
        "allowed_tools", mode="required", tools=[typed("function", name="f")])},
     {"tool_choice": typed("allowed_tools", allowed_tools={
         "mode": "required", "tools": [function("f")]})}, ""),
    ("4 allowed_tools, compatible", {"model": LOCAL, "tools": [flat(F), flat(function("g"))],
                                     "tool_choice": typed("allowed_tools", mode="required", tools=[
                                         typed("function", name="f")])},
     {"tool_choice": "required", "tools": [F_CHAT]}, ""),
    ("0.2 S tool_choice undeclared", {"tools": [flat(F)], "tool_choice": typed(
        "function", name="g")}, "tool_choice", ""),
    *[(f"4 {key}", {key: value}, key, "") for key, value in [
        ("previous_response_id", "resp_1"), ("conversation", "conv_1"), ("prompt", {"id": "p"}),
        ("background", True), ("background_options", {"x": 1}), ("truncation", "auto")]],
    *[(f"4 {key} at its default", {key: value}, {key: UNSET}, "") for key, value in [
        ("background", False), ("truncation", "disabled"), ("previous_response_id", None)]],
    *[(f"4 {key} dropped", {key: value}, {key: UNSET}, f"({key})") for key, value in [
        ("context_management", [{"type": "compaction"}]), ("max_tool_calls", 3),
        ("image", {"x": 1}), ("access_programs", [1]), ("include", ["file_search_call.results"]),
        ("client_metadata", {"a": "b"})]],
    ("4 logprobs", {"top_logprobs": 3, "include": ["message.output_text.logprobs"]},
     {"logprobs": True, "top_logprobs": 3}, ""),
    ("4 include honoured", {"include": ["reasoning.encrypted_content"]}, {"include": UNSET}, ""),
    ("0.2 P unknown", {"new": 1}, {"new": UNSET}, "unknown"),
    ("4 no input", {"input": None}, "input", ""),
    ("4.1 message", listed(typed("message", role="user", id="msg_1", status="completed", content=[
        typed("input_text", text="a"), typed("input_image", image_url=PNG, detail="low"),
        typed("input_file", file_data=PDF_URI, filename="a.pdf"), AUDIO])),
     {"messages": [user([text("a"), image(PNG, detail="low"), file(PDF_URI, filename="a.pdf"),
                         AUDIO])]}, ""),
    ("4.1 file_id of an image", listed(user([typed("input_image", file_id="f")])),
     "input[0].content[0].file_id", ""),
    ("4.1 file_id of a file", listed(user([typed("input_file", file_id="f")])),
     "input[0].content[0].file_id", ""),
    ("4.1 file_url", listed(user([typed("input_file", file_url="https://a/b.pdf")])), "file", ""),
    ("4.1 system later", listed(user("a"), spoken("developer", "S"), user("b")),
     {"messages": [user("a"), spoken("system", "S"), user("b")]}, ""),
    ("4.1 system later, compatible", {"model": LOCAL, "instructions": "I", **listed(
        user("a"), spoken("developer", "S"), user("b"))},
     {"messages": [spoken("system", "I\n\nS"), user([text("a"), text("b")])]}, ""),
    ("4.1 assistant", listed(user("a"), spoken("assistant", [
        typed("output_text", text="b", annotations=[]), typed("refusal", refusal="c")],
        id="msg_1", status="completed"), user("d")),
     {"messages": [user("a"), spoken("assistant", [text("b"), typed("refusal", refusal="c")]),
                   user("d")]}, ""),
    ("4.1 phase", listed(user("a"), spoken("assistant", "b", phase="commentary"), user("c")),
     {"messages": [user("a"), spoken("assistant", "b"), user("c")]}, "(phase)"),
    ("4.1 function_call", listed(user("Hi"), spoken("assistant", "T"), fcall(
        "c", arguments='{"x":1}', id="fc_1", status="completed"), fcall("d"), output("c"),
        output("d", ""), tools=[flat(F)]),
     {"messages": [user("Hi"), asked(call("c", arguments='{"x":1}'), call("d"), content="T"),
                   answer("c"), answer("d", "")]}, ""),
    ("4.1 function_call without text", listed(user("Hi"), fcall("c"), output("c")),
     {"messages": [user("Hi"), asked(call("c")), answer("c")]}, ""),
    ("4.1 broken arguments", listed(user("Hi"), fcall("c", arguments="{"), output("c")),
     {"messages": [user("Hi"), asked(call("c", arguments="{")), answer("c")]}, ""),
    ("4.1 custom_tool_call", listed(user("Hi"), SH_ITEM, SH_DONE, tools=[flat(CUSTOM)]),
     {"messages": [user("Hi"), asked(SH_CALL), answer("c")]}, ""),
    ("4.1 custom_tool_call, compatible", {"model": LOCAL, **listed(
        user("Hi"), SH_ITEM, SH_DONE, tools=[flat(CUSTOM)])},
     {"messages": [user("Hi"), asked(call("c", "sh", '{"input":"ls"}')), answer("c")]}, ""),
    ("4.1 a picture in an output", listed(user("Hi"), fcall("c"), output("c", [
        typed("input_text", text="a"), typed("input_image", image_url=PNG)]), user("b")),
     {"messages": [user("Hi"), asked(call("c")), answer("c", "a"), user([
         text("From the tool call c:"), image(PNG), text("b")])]}, ""),
    ("4.1 no call_id", listed(user("Hi"), fcall("c"), typed("function_call_output", output="")),
     "input[2].call_id", ""),
    ("4.1 namespace", listed(user("Hi"), fcall("c", namespace="ns"), output(
        "c", name="f", namespace="ns"), tools=[NAMESPACE]),
     {"messages": [user("Hi"), asked(call("c", "ns__f")), answer("c")]}, ""),
    ("4.1 reasoning", listed(user("Hi"), typed("reasoning", id="rs_1", summary=[
        typed("summary_text", text="Hm")], encrypted_content="Zm9v"), fcall("c"), output("c")),
     {"messages": [user("Hi"), asked(call("c")), answer("c")]}, "(thinking)"),
    ("4.1 item_reference", listed(user("Hi"), typed("item_reference", id="msg_1")),
     "input[1].type", ""),
    ("4.1 additional_tools", listed(typed("additional_tools", role="developer", tools=[flat(F)]),
                                    user("Hi")), {"messages": [user("Hi")], "tools": [F_CHAT]}, ""),
    *[(f"4.1 {kind}", listed(user("Hi"), typed(kind, id="x", action={"a": 1})),
       {"messages": [user("Hi")]}, "(hosted_calls)")
      for kind in ("web_search_call", "file_search_call", "code_interpreter_call",
                   "image_generation_call", "mcp_call")],
    *[(f"4.1 {kind}", listed(user("Hi"), typed(kind, id="x")), "input[1].type", "")
      for kind in ("compaction", "computer_call", "computer_call_output", "local_shell_call",
                   "shell_call", "apply_patch_call", "apply_patch_call_output", "program",
                   "mcp_list_tools", "mcp_approval_request", "configuration_update",
                   "compaction_trigger", "program_output")],
    ("4.1 ordering", listed(user("Hi"), fcall("c"), fcall("d"), output("d", "2"), user("u"),
                            output("c", "1")),
     {"messages": [user("Hi"), asked(call("c"), call("d")), answer("c", "1"), answer("d", "2"),
                   user("u")]}, ""),
    ("4.1 only system", listed(spoken("developer", "S")), "messages", ""),
    ("1.5 long ids", listed(user("Hi"), fcall(LONG_ID), output(LONG_ID)),
     {"messages": [user("Hi"), asked(call(LEGAL_ID)),
                   answer(LEGAL_ID)]}, ""),
]

RESPONSES_TO_MESSAGES: list[Row] = [
    ("5 instructions and leading items", listed(
        spoken("developer", "D"), user("a"), user("b"), instructions="S"),
     {"system": [text("S"), text("D")], "messages": [user([text("a"), text("b")])]}, ""),
    ("5 one assistant turn", listed(
        user("Hi"), typed("reasoning", id="rs_1", summary=[], encrypted_content="Zm9v"),
        spoken("assistant", [typed("output_text", text="T")]), fcall("c", arguments='{"x":1}'),
        fcall("d"), output("d", "2"), output("c", "1"), user("b"), tools=[flat(F)]),
     {"messages": [user("Hi"), spoken("assistant", [text("T"), use("c", x=1), use("d")]),
                   user([result("c", "1"), result("d", "2"), text("b")])]}, "(thinking)"),
    ("5 output list", listed(user("Hi"), fcall("c"), output("c", [
        typed("input_text", text="a"), typed("input_image", image_url=PNG, detail="auto"),
        typed("input_file", file_data=PDF_URI)]), tools=[flat(F)]),
     {"messages": [user("Hi"), spoken("assistant", [use("c")]), user([result("c", [
         text("a"), PNG_BLOCK, PDF_BLOCK])])]}, ""),
    ("5 effort", {"reasoning": {"effort": "high", "summary": "auto"}},
     {"thinking": {"type": "adaptive", "display": "summarized"},
      "output_config": {"effort": "high"}}, ""),
    ("5 effort, budget", {"model": BUDGET, "reasoning": {"effort": "low"}},
     {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 9216}, ""),
    ("5 text.format", {"text": {"format": typed("json_schema", name="n", schema=CHAT_SHAPE)}},
     {"output_config": {"format": typed("json_schema", schema=CHAT_SHAPE)}}, ""),
    ("2.1 json_object", {"text": {"format": {"type": "json_object"}}}, {"system": RULE}, ""),
    ("5 web_search", {"tools": [typed("web_search", user_location={
        "type": "approximate", "city": "Bern"})]},
     {"tools": [typed("web_search_20250305", name="web_search", user_location={
         "type": "approximate", "city": "Bern"})]}, ""),
    ("5 a hosted tool offered", {"tools": [typed("file_search")]}, {"tools": UNSET},
     "file_search"),
    ("5 max_output_tokens", {"max_output_tokens": 7}, {"max_tokens": 7}, ""),
    ("5 max_output_tokens absent", {}, {"max_tokens": 8192}, ""),
    ("5 tool_choice", {"tools": [flat(F)], "tool_choice": typed("function", name="f")},
     {"tool_choice": {"type": "tool", "name": "f"}}, ""),
    ("5 allowed_tools", {"tools": [flat(F), flat(function("g"))], "tool_choice": typed(
        "allowed_tools", mode="required", tools=[typed("function", name="g")])},
     {"tool_choice": {"type": "any"}, "tools": [{"name": "g", "input_schema": NO_ARGUMENTS}]}, ""),
    ("2.1 parallel", {"tools": [flat(F)], "parallel_tool_calls": False},
     {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ""),
    ("2.1 custom tool", listed(user("Hi"), SH_ITEM, SH_DONE, tools=[flat(CUSTOM)]),
     {"tools": [{"name": "sh", "description": "Run.", "input_schema": CUSTOM_SCHEMA}],
      "messages": [user("Hi"), spoken("assistant", [use("c", "sh", input="ls")]),
                   user([result("c")])]}, ""),
    ("4 namespace", listed(user("Hi"), fcall("c", namespace="ns"), output("c"), tools=[NAMESPACE]),
     {"tools": [{"name": "ns__f", "description": "N", "input_schema": NO_ARGUMENTS}],
      "messages": [user("Hi"), spoken("assistant", [use("c", "ns__f")]), user([result("c")])]}, ""),
    ("2.2 tool blocks without tools", listed(user("Hi"), fcall("c"), output("c")),
     {"tools": [F_USE], "tool_choice": {"type": "none"}}, ""),
    ("2.1 temperature", {"temperature": 1.5}, {"temperature": 1}, "temperature"),
    ("2.1 store and the like", {"store": True, "metadata": {"a": "b"}, "prompt_cache_key": "k"},
     {"metadata": UNSET, "store": UNSET}, "(store), (metadata), (prompt_cache_key)"),
    ("1.9 file_url", listed(user([typed("input_file", file_url="https://a/b")])),
     {"messages": [user([document({"type": "url", "url": "https://a/b"})])]}, ""),
    ("1.9 audio", listed(user([AUDIO])), "input_audio", ""),
    ("2.2 system later", {"model": NOW, **listed(user("a"), spoken("developer", "S"), user("b"))},
     {"messages": [user([text("a"), text("b")]), spoken("system", "S")]}, ""),
]

RESPONSES_TO_GEMINI: list[Row] = [
    ("5 all at once", listed(
        spoken("developer", "D"), user("Hi"), spoken("assistant", "T"), fcall("c"), fcall("d"),
        output("d", "2"), output("c", [typed("input_image", image_url=PNG)]), user("u"),
        instructions="S", tools=[flat(F)], max_output_tokens=7, temperature=0.5),
     {"systemInstruction": {"parts": [{"text": "S"}, {"text": "D"}]},
      "contents": [turn("Hi"), turn("T", ran("f", "c"), ran("f", "d"), role="model"),
                   turn(gave("", id_="c", parts=[PNG_PART]), gave("2", id_="d")), turn("u")],
      "generationConfig": {"maxOutputTokens": 7, "temperature": 0.5},
      "tools": [{"functionDeclarations": [{"name": "f"}]}]}, ""),
    ("5 effort", {"reasoning": {"effort": "minimal"}},
     thinks(includeThoughts=True, thinkingLevel="MINIMAL"), ""),
    ("5 web_search", {"tools": [typed("web_search")]}, {"tools": [{"googleSearch": {}}]}, ""),
    ("5 foreign reasoning", listed(user("Hi"), typed(
        "reasoning", id="rs_1", summary=[], encrypted_content="Zm9v"), fcall("c"), output("c")),
     {"contents": [turn("Hi"), turn(ran("f", "c", SKIP), role="model"), turn(gave(id_="c"))]},
     "(thinking)"),
]

MESSAGES_TO_CHAT: list[Row] = [
    ("6.1 system string", {"system": "S"}, {"messages": [spoken("system", "S"), user("Hi")]}, ""),
    ("6.1 system blocks", {"system": [
        text("x-anthropic-billing-header: cc_version=1"), text("A", cache_control=MARK),
        text("B")]}, {"messages": [spoken("system", "A\n\nB"), user("Hi")]}, "(cache_control)"),
    ("6.1 max_tokens", {}, {"max_completion_tokens": 99, "max_tokens": UNSET}, ""),
    ("6.1 max_tokens, compatible", {"model": LOCAL},
     {"max_tokens": 99, "max_completion_tokens": UNSET}, ""),
    ("6.1 max_tokens of 0", {"max_tokens": 0}, "max_tokens", ""),
    ("6.1 max_tokens absent", {"max_tokens": None}, "max_tokens", ""),
    ("6.1 stop_sequences", {"stop_sequences": list("abcd")}, {"stop": list("abcd")}, ""),
    ("6.1 five stop_sequences", {"stop_sequences": list("abcde")}, "stop", ""),
    ("6.1 stop_sequences, o3", {"model": "o3", "stop_sequences": ["a"]}, "stop", ""),
    ("6.1 stop_sequences, o4-mini", {"model": "o4-mini", "stop_sequences": ["a"]}, "stop", ""),
    *[(f"6.1 temperature, {model} {level}", {
        "model": model, "temperature": 0.5, "top_p": 0.5, "output_config": {"effort": level}},
       {"temperature": sent, "top_p": sent}, loss) for model, level, sent, loss in [
        (PLAIN, None, 0.5, ""), (LOCAL, None, 0.5, ""), (GPT52, None, 0.5, ""),
        (GPT52, "none", 0.5, ""), (GPT52, "low", UNSET, "temperature, top_p"),
        (GPT5, None, UNSET, "temperature, top_p"), ("o3", None, UNSET, "temperature, top_p"),
        (GPT55, None, UNSET, "temperature, top_p"), (GPT55, "none", 0.5, "")]],
    ("12 temperature of 1", {"model": GPT5, "temperature": 1, "top_p": 1.0},
     {"temperature": UNSET, "top_p": UNSET}, ""),
    ("6.1 top_k", {"top_k": 40}, {"top_k": UNSET}, "top_k"),
    ("6.1 stream", {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}},
     ""),
    ("6.1 tools", {"tools": [
        {"name": "f", "description": "D", "input_schema": CHAT_SHAPE, "type": "custom"},
        {"name": "g", "input_schema": {"type": "object"}, "strict": True}]},
     {"tools": [function("f", description="D", parameters=CHAT_SHAPE),
                function("g", parameters=NO_ARGUMENTS)]}, "strict"),
    ("1.8 strict that is clean", {"tools": [
        {"name": "f", "input_schema": CHAT_SHAPE, "strict": True}]},
     {"tools": [function("f", parameters=CHAT_SHAPE, strict=True)]}, ""),
    *[(f"6.1 tool's {key}", {"tools": [{**F_USE, key: value}]}, {"tools": [F_CHAT]}, f"({key})")
      for key, value in [
        ("cache_control", MARK), ("eager_input_streaming", True), ("defer_loading", True),
        ("input_examples", [{}]), ("allowed_callers", ["direct"])]],
    *[(f"6.1 {kind} offered", {"tools": [typed(f"{kind}_20250101", name="x"), F_USE]},
       {"tools": [F_CHAT]}, kind) for kind in SERVER_TOOLS],
    *[(f"6.1 {kind} forced", {"tools": [typed(f"{kind}_20250101", name="x")],
                              "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", "")
      for kind in ("code_execution", "bash")],
    ("6.1 web_search", {"model": "gpt-5-search-api", "tools": [typed(
        "web_search_20250305", name="web_search", user_location={
            "type": "approximate", "city": "Bern"})]},
     {"web_search_options": {"user_location": {"type": "approximate", "approximate": {
         "city": "Bern"}}}, "tools": UNSET}, ""),
    ("6.1 web_search of others", {"tools": [typed("web_search_20250305", name="web_search")]},
     {"tools": UNSET, "web_search_options": UNSET}, "web_search"),
    *[(f"6.1 tool_choice {asks['type']}", {"tools": [F_USE], "tool_choice": asks},
       {"tool_choice": told, "parallel_tool_calls": UNSET}, "") for asks, told in [
        ({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, function("f"))]],
    ("6.1 tool_choice without tools", {"tool_choice": {
        "type": "auto", "disable_parallel_tool_use": True}},
     {"tool_choice": UNSET, "parallel_tool_calls": UNSET}, ""),
    ("6.1 disable_parallel_tool_use", {"tools": [F_USE], "tool_choice": {
        "type": "any", "disable_parallel_tool_use": True}},
     {"tool_choice": "required", "parallel_tool_calls": False}, ""),
    *[(f"6.1 a budget of {budget}", {"model": GPT5, "thinking": {
        "type": "enabled", "budget_tokens": budget}}, {"reasoning_effort": level}, "")
      for budget, level in [(1024, "low"), (4095, "low"), (4096, "medium"), (16383, "medium"),
                            (16384, "high")]],
    *[(f"6.1 {kind} {level}", {"model": GPT52, "thinking": {"type": kind},
                               "output_config": {"effort": level}}, {"reasoning_effort": level}, "")
      for kind in ("adaptive", "between_tools") for level in ("low", "xhigh", None)],
    *[(f"6.1 disabled, {model}", {"model": model, "thinking": {"type": "disabled"}},
       {"reasoning_effort": level}, loss) for model, level, loss in [
        ("gpt-5.1", "none", ""), (GPT5, "minimal", "reasoning_effort"), (PLAIN, UNSET, ""),
        ("o3", "low", "reasoning_effort"), (LOCAL, UNSET, "")]],
    *[(f"6.1 effort, {model}", {"model": model, "output_config": {"effort": "high"}},
       {"reasoning_effort": UNSET}, "reasoning_effort") for model in (PLAIN, LOCAL)],
    *[(f"6.1 {level}, {model}", {"model": model, "output_config": {"effort": level}},
       {"reasoning_effort": sent}, "reasoning_effort") for model, level, sent in [
        (GPT5, "max", "high"), (GPT52, "minimal", "low"), (GPT52, "max", "xhigh")]],
    *[(f"6 tools, {model} {level}", {"model": model, "tools": [F_USE],
                                     "output_config": {"effort": level}},
       {"reasoning_effort": sent}, loss) for model, level, sent, loss in [
        ("gpt-5.4", None, "none", ""), (GPT55, None, "none", ""), (GPT6, "none", "none", ""),
        (GPT55, "high", "none", "reasoning_effort"), (GPT52, "high", "high", "")]],
    ("6.1 output_config.format", {"output_config": {"format": typed(
        "json_schema", schema=CHAT_SHAPE)}}, format_(CHAT_SHAPE, name="output"), ""),
    ("6.1 output_format, as a beta had it", {"output_format": typed(
        "json_schema", schema=CHAT_SHAPE)}, format_(CHAT_SHAPE, name="output"), ""),
    *[(f"6.1 a thread to {thread['type']}", {"thread": thread}, "thread", "") for thread in [
        typed("create"), typed("continue", previous_message_id="msg_1")]],
    ("6.1 user_id", {"metadata": {"user_id": "u"}}, {"user": "u", "metadata": UNSET}, ""),
    ("6.1 a long user_id", {"metadata": {"user_id": "u" * 65}},
     {"user": gateway.hashed("u" * 65, 40)}, ""),
    ("6.1 service_tier auto", {"service_tier": "auto"}, {"service_tier": "auto"}, ""),
    ("6.1 service_tier standard_only", {"service_tier": "standard_only"},
     {"service_tier": "default"}, ""),
    ("6.1 mcp_servers", {"mcp_servers": [{"url": "https://a"}]}, {"mcp_servers": UNSET},
     "mcp_servers"),
    *[(f"6.1 {key}", {key: value}, {key: UNSET}, f"({key})") for key, value in [
        ("speed", "fast"), ("container", "c"), ("context_management", {"edits": [{}]}),
        ("diagnostics", {"x": 1}), ("inference_geo", "eu"), ("user_profile_id", "p"),
        ("cache_control", MARK)]],
    ("0.2 P unknown", {"new": 1}, {"new": UNSET}, "unknown"),
    ("6.2 one text block", {"messages": [user([text("a", cache_control=HOUR)])]},
     {"messages": [user("a")]}, "(cache_control)"),
    ("6.2 media", {"messages": [user([
        PNG_BLOCK, typed("image", source={"type": "url", "url": "https://a"}), PDF_BLOCK,
        {**TEXT_BLOCK, "context": "C", "citations": {"enabled": True}}])]},
     {"messages": [user([image(PNG), image("https://a"), file(PDF_URI, filename="document.pdf"),
                         text("C"), text("T\n\nx")])]}, "citations"),
    ("1.9 PDF by URL", {"messages": [user([document({"type": "url", "url": "https://a"})])]},
     "file", ""),
    ("1.9 file_id", {"messages": [user([document({"type": "file", "file_id": "f"})])]},
     "messages[0].content[0].source.type", ""),
    ("6.2 search_result", {"messages": [user([typed(
        "search_result", title="T", source="https://a", content=[text("x"), text("y")],
        citations={"enabled": True})])]}, {"messages": [user("T\nhttps://a\nx\ny")]},
     "citations"),
    ("6.2 search_result in a result", history(spoken("assistant", [use("c")]), user([result("c", [
        typed("search_result", title="T", source="S", content=[text("x")])])])),
     {"messages": [user("Hi"), asked(call("c")), answer("c", "T\nS\nx")]}, ""),
    ("6.2 tool_reference", history(spoken("assistant", [use("c")]), user([result("c", [
        typed("tool_reference", tool_name="g")])]), tools=[{**F_USE, "defer_loading": True}]),
     {"messages": [user("Hi"), asked(call("c")), answer("c", "Tool g loaded.")],
      "tools": [F_CHAT]}, "(defer_loading)"),
    ("6.2 browser_state", {"messages": [user([typed("browser_state")])]},
     "messages[0].content[0].type", ""),
    ("6.2 results first", history(spoken("assistant", [text("T"), use("c", x=1), use("d")]), user([
        text("a"), result("d", [text("1"), text("2")]), PNG_BLOCK, result("c", []), text("b")])),
     {"messages": [user("Hi"), asked(call("c", arguments='{"x":1}'), call("d"), content="T"),
                   answer("c", ""), answer("d", "1\n2"), user([
                       text("a"), image(PNG), text("b")])]}, ""),
    ("6.2 media in results", history(spoken("assistant", [use("c"), use("d")]), user([
        result("c", [text("1"), PNG_BLOCK]), result("d", [PDF_BLOCK]), text("a")])),
     {"messages": [user("Hi"), asked(call("c"), call("d")), answer("c", "1"), answer("d", ""),
                   user([text("From the tool call c:"), image(PNG), text("From the tool call d:"),
                         file(PDF_URI, filename="document.pdf"), text("a")])]}, ""),
    ("6.2 thoughts", history(spoken("assistant", [*THOUGHTS, text("T")]), user("?")),
     {"messages": [user("Hi"), spoken("assistant", "T"), user("?")]}, "(thinking)"),
    ("6.2 server tools", history(spoken("assistant", [*SEARCH, text("T")]), user("?")),
     {"messages": [user("Hi"), spoken("assistant", "T"), user("?")]}, "(content)"),
    ("6.2 only thoughts", history(spoken("assistant", THOUGHTS), user("?")),
     {"messages": [user([text("Hi"), text("?")])]}, "(thinking)"),
    ("6.2 system later", history(spoken("assistant", [use("c")]), user([result("c")]),
                                 spoken("system", "S")),
     {"messages": [user("Hi"), asked(call("c")), answer("c"), spoken("system", "S")]}, ""),
    ("6.2 system between call and result", history(
        spoken("assistant", [use("c")]), spoken("system", "S"), user([result("c")])),
     {"messages": [user("Hi"), asked(call("c")), answer("c"), spoken("system", "S")]}, ""),
    ("4.1 system later, compatible", {"model": LOCAL, "system": "A", **history(
        spoken("system", "B"))}, {"messages": [spoken("system", "A\n\nB"), user("Hi")]}, ""),
    ("6.2 prefill", history(spoken("assistant", "So ")),
     {"messages": [user("Hi"), spoken("assistant", "So ")]}, ""),
    ("1.5 long ids", history(spoken("assistant", [use(LONG_ID)]), user([result(LONG_ID)])),
     {"messages": [user("Hi"), asked(call(LEGAL_ID)),
                   answer(LEGAL_ID)]}, ""),
]

MESSAGES_TO_RESPONSES: list[Row] = [
    ("6.1 what is always said", {}, {
        "store": False, "include": ["reasoning.encrypted_content"], "max_output_tokens": 99,
        "input": [user([typed("input_text", text="Hi")])], "instructions": UNSET}, ""),
    ("6.1 system", {"system": [text("A"), text("B")]}, {"instructions": "A\n\nB"}, ""),
    ("6.1 stop_sequences", {"stop_sequences": ["a"]}, {"stop": UNSET}, "stop"),
    ("6.1 stream", {"stream": True}, {"stream": True, "stream_options": UNSET}, ""),
    ("6.1 tools", {"tools": [{"name": "f", "input_schema": CHAT_SHAPE},
                             {"name": "g", "input_schema": CHAT_SHAPE, "strict": True}]},
     {"tools": [flat(function("f", parameters=CHAT_SHAPE, strict=False)),
                flat(function("g", parameters=CHAT_SHAPE, strict=True))]}, ""),
    ("6.1 web_search", {"tools": [typed("web_search_20250305", name="web_search")]},
     {"tools": [typed("web_search")]}, ""),
    *[(f"6.1 tool_choice {asks['type']}", {"tools": [F_USE], "tool_choice": asks},
       {"tool_choice": told}, "") for asks, told in [
        ({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, typed("function", name="f"))]],
    ("6.1 disable_parallel_tool_use", {"tools": [F_USE], "tool_choice": {
        "type": "auto", "disable_parallel_tool_use": True}}, {"parallel_tool_calls": False}, ""),
    *[(f"6.1 thinking {asks}", asks, {"reasoning": told}, loss) for asks, told, loss in [
        ({}, UNSET, ""), ({"thinking": {"type": "adaptive"}}, {"summary": "auto"}, ""),
        ({"thinking": {"type": "enabled", "budget_tokens": 5000}},
         {"effort": "medium", "summary": "auto"}, ""),
        ({"thinking": {"type": "adaptive", "display": "omitted"},
          "output_config": {"effort": "high"}}, {"effort": "high"}, ""),
        ({"thinking": {"type": "disabled"}}, {"effort": "none"}, ""),
        ({"output_config": {"effort": "max"}}, {"effort": "xhigh"}, "reasoning.effort")]],
    ("6.1 effort of a model without", {"model": PLAIN, "output_config": {"effort": "high"}},
     {"reasoning": UNSET, "include": UNSET}, "reasoning.effort"),
    ("6.1 output_config.format", {"output_config": {"format": typed(
        "json_schema", schema=CHAT_SHAPE)}},
     {"text": {"format": typed("json_schema", name="output", schema=CHAT_SHAPE)}}, ""),
    ("6.1 user_id and tier", {"metadata": {"user_id": "u"}, "service_tier": "standard_only"},
     {"user": "u", "service_tier": "default"}, ""),
    ("6.2 a tool loop", history(
        spoken("assistant", [*THOUGHTS, text("T"), use("c", x=1), use("d")]),
        user([result("d", [text("1"), PNG_BLOCK]), result("c"), text("b")])),
     {"input": [user([typed("input_text", text="Hi")]), spoken("assistant", "T"),
                fcall("c", arguments='{"x":1}'), fcall("d"), output("c"), output("d", [
                    typed("input_text", text="1"),
                    typed("input_image", image_url=PNG, detail="auto")]),
                user([typed("input_text", text="b")])]}, "(thinking)"),
    ("6.2 system later", history(spoken("system", "S")),
     {"input": [user([typed("input_text", text="Hi")]),
                spoken("developer", [typed("input_text", text="S")])]}, ""),
    ("1.9 media", {"messages": [user([
        PNG_BLOCK, PDF_BLOCK, document({"type": "url", "url": "https://a"}), TEXT_BLOCK])]},
     {"input": [user([
         typed("input_image", image_url=PNG, detail="auto"),
         typed("input_file", filename="document.pdf", file_data=PDF_URI),
         typed("input_file", file_url="https://a"), typed("input_text", text="T\n\nx")])]}, ""),
    ("1.5 long ids", history(spoken("assistant", [use(LONG_ID)]), user([result(LONG_ID)])),
     {"input": [user([typed("input_text", text="Hi")]),
                fcall(LEGAL_ID), output(LEGAL_ID)]}, ""),
]

MESSAGES_TO_GEMINI: list[Row] = [
    ("7 system", {"system": "A", **history(spoken("system", "B"))},
     {"systemInstruction": {"parts": [{"text": "A"}, {"text": "B"}]}, "contents": [turn("Hi")]},
     ""),
    ("7 a tool loop", history(
        spoken("assistant", [text("T"), use("c", x=1), use("d")]),
        user([{**result("d", "no"), "is_error": True}, result("c"), text("b")])),
     {"contents": [turn("Hi"), turn("T", ran("f", "c", x=1), ran("f", "d"), role="model"),
                   turn(gave(id_="c"), gave("no", id_="d", key="error")), turn("b")]}, ""),
    ("7 image in a result", history(spoken("assistant", [use("c")]), user([
        result("c", [text("a"), PNG_BLOCK])])),
     {"contents": [turn("Hi"), turn(ran("f", "c", SKIP), role="model"),
                   turn(gave("a", id_="c", parts=[PNG_PART]))]}, ""),
    *[(f"7 tool_choice {asks['type']}", {"tools": [F_USE], "tool_choice": asks},
       {"toolConfig": {"functionCallingConfig": told}}, "") for asks, told in [
        ({"type": "auto"}, {"mode": "AUTO"}), ({"type": "any"}, {"mode": "ANY"}),
        ({"type": "none"}, {"mode": "NONE"}),
        ({"type": "tool", "name": "f"}, {"mode": "ANY", "allowedFunctionNames": ["f"]})]],
    ("7 disable_parallel_tool_use", {"tools": [F_USE], "tool_choice": {
        "type": "auto", "disable_parallel_tool_use": True}}, {}, "parallel_tool_calls"),
    ("7 numbers", {"temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop_sequences": list("abcde")},
     config(maxOutputTokens=99, temperature=0.5, topP=0.5, topK=4, stopSequences=list("abcde")),
     ""),
    ("7 six stop_sequences", {"stop_sequences": list("abcdef")}, "stop", ""),
    *[(f"7 budget {budget}, {model}", {"model": model, "thinking": {
        "type": "enabled", "budget_tokens": budget}},
       config(maxOutputTokens=99, thinkingConfig={"includeThoughts": True, **told}), "")
      for model, budget, told in [
        (G25, 2000, {"thinkingBudget": 2000}), (G25, 30_000, {"thinkingBudget": 24576}),
        (G25_PRO, 64, {"thinkingBudget": 128}), (G25_PRO, 40_000, {"thinkingBudget": 32768}),
        (NEW, 4095, {"thinkingLevel": "LOW"}), (NEW, 4096, {"thinkingLevel": "MEDIUM"}),
        (NEW, 16384, {"thinkingLevel": "HIGH"})]],
    *[(f"7 {asks}, {model}", {"model": model, **asks},
       config(maxOutputTokens=99, **({"thinkingConfig": told} if told else {})), loss)
      for model, asks, told, loss in [
        (NEW, {"thinking": {"type": "adaptive"}}, {"includeThoughts": True}, ""),
        (NEW, {"thinking": {"type": "adaptive", "display": "omitted"},
               "output_config": {"effort": "low"}},
         {"includeThoughts": False, "thinkingLevel": "LOW"}, ""),
        (NEWER, {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
         {"includeThoughts": True, "thinkingLevel": "HIGH"}, "reasoning_effort"),
        (NEW, {"thinking": {"type": "disabled"}},
         {"includeThoughts": False, "thinkingLevel": "MINIMAL"}, "reasoning_effort"),
        (G25, {"thinking": {"type": "disabled"}},
         {"includeThoughts": False, "thinkingBudget": 0}, ""), (NEW, {}, None, "")]],
    ("7 output_config.format", {"output_config": {"format": typed(
        "json_schema", schema=CHAT_SHAPE)}},
     config(maxOutputTokens=99, responseMimeType="application/json",
            responseJsonSchema=CHAT_SHAPE), ""),
    ("7 hints", {"metadata": {"user_id": "u"}, "service_tier": "auto", "system": [
        text("S", cache_control=MARK)]}, {"serviceTier": UNSET}, "(cache_control), (user)"),
    ("1.7 Anthropic's thoughts", history(spoken("assistant", [*THOUGHTS, text("T")]), user("?")),
     {"contents": [turn("Hi"), turn("T", role="model"), turn("?")]}, "(thinking)"),
    ("1.9 media", {"messages": [user([PNG_BLOCK, PDF_BLOCK, TEXT_BLOCK, document(
        {"type": "url", "url": "https://a/b"})])]},
     {"contents": [turn(PNG_PART, PDF_PART, "T\n\nx", {"fileData": {
         "mimeType": "application/pdf", "fileUri": "https://a/b"}})]}, ""),
]

# What Gemini's own schema dialect says, and the JSON Schema of it.
GEMINI_SCHEMA = {"type": "OBJECT", "property_ordering": ["a"], "properties": {
    "type": {"type": "STRING", "nullable": True, "format": "enum", "enum": ["A"], "example": "A"},
    "a_b": {"type": "ARRAY", "minItems": "1", "items": {"type": "INTEGER", "maximum": 4.0}},
    "c": {"anyOf": [{"type": "NUMBER"}, {"type": "STRING", "format": "date-time"}],
          "type": "TYPE_UNSPECIFIED"}}}
JSON_SCHEMA = {"type": "object", "properties": {
    "type": {"type": ["string", "null"], "enum": ["A", None]},
    "a_b": {"type": "array", "minItems": 1, "items": {"type": "integer", "maximum": 4}},
    "c": {"anyOf": [{"type": "number"}, {"type": "string", "format": "date-time"}]}}}
GF = {"name": "f"}


def minted(number: int, name: str = "f") -> str:
    return f"call_{number}_{gateway.hashed(name, 8)}"


GEMINI_TO_CHAT: list[Row] = [
    ("7b systemInstruction", {"systemInstruction": {"parts": [{"text": "A"}, {"text": "B"}]}},
     {"messages": [spoken("system", "A\n\nB"), user("Hi")]}, ""),
    ("7b snake_case", {"system_instruction": {"parts": [{"text": "A"}]}, "generation_config": {
        "max_output_tokens": 7, "response_mime_type": "application/json",
        "response_json_schema": {**CHAT_SHAPE, "x_y": 1}}},
     {"messages": [spoken("system", "A"), user("Hi")], "max_completion_tokens": 7,
      **format_({**CHAT_SHAPE, "x_y": 1}, name="output")}, ""),
    ("7b numbers and enums in any spelling", {"generationConfig": {
        "topK": 4.0, "maxOutputTokens": "7", "candidateCount": 1.0}, **declared(
            GF, mode="any", allowedFunctionNames=["f"])},
     {"max_completion_tokens": 7, "tool_choice": function("f")}, "top_k"),
    ("7b roles", contents({"parts": [{"text": "a"}]}, turn("b", role="MODEL"),
                          turn("c", role="function"), turn("", role="model"), turn("d")),
     {"messages": [user("a"), spoken("assistant", "b"), user([text("c"), text("d")])]}, ""),
    ("7b media", contents(turn(
        {"inline_data": {"mime_type": "image/png", "data": "-_-_"}}, PDF_PART,
        {"inlineData": {"mimeType": "text/plain", "data": "w6k"}},
        {"inlineData": {"mimeType": "audio/mpeg", "data": "aGk"}},
        {"fileData": {"mimeType": "image/png", "fileUri": "https://a"}})),
     {"messages": [user([image("data:image/png;base64,+/+/"),
                         file(PDF_URI, filename="document.pdf"), text("é"),
                         typed("input_audio", input_audio={"data": "aGk=", "format": "mp3"}),
                         image("https://a")])]}, ""),
    ("7b PDF by URL", contents(turn({"fileData": {
        "mimeType": "application/pdf", "fileUri": "https://a"}})), "file", ""),
    *[(f"7b fileData {uri}", contents(turn({"fileData": {"mimeType": kind, "fileUri": uri}})),
       param, "") for uri, kind, param in [
        ("gs://a/b", "image/png", "contents[0].parts[0].fileData.fileUri"),
        ("https://generativelanguage.googleapis.com/v1beta/files/x", "image/png",
         "contents[0].parts[0].fileData.fileUri"),
        ("https://www.youtube.com/watch?v=x", "video/mp4",
         "contents[0].parts[0].fileData.fileUri"),
        ("https://a/b.mp4", "video/mp4", "contents[0].parts[0].fileData.mimeType")]],
    ("7b video", contents(turn({"inlineData": {"mimeType": "video/mp4", "data": "aGk="}})),
     "contents[0].parts[0].inlineData.mimeType", ""),
    ("7b calls and results by id", contents(
        turn("Hi"), turn("T", ran("f", "c", x=1), ran("f", "d"), role="model"),
        turn(gave("2", id_="d"), gave("1", id_="c"), "b")),
     {"messages": [user("Hi"), asked(call("c", arguments='{"x":1}'), call("d"), content="T"),
                   answer("c", "1"), answer("d", "2"), user("b")]}, ""),
    ("7b calls and results by name", contents(
        turn("Hi"), turn({"functionCall": {"name": "f"}}, ran("g"), ran("f"), role="model"),
        turn(gave("g", "g"), gave("1"), gave("2"))),
     {"messages": [user("Hi"), asked(call(minted(1)), call(minted(2, "g"), "g"), call(minted(3))),
                   answer(minted(1), "1"), answer(minted(2, "g"), "g"), answer(minted(3), "2")]},
     ""),
    ("7b minted ids differ in every step", contents(
        turn("Hi"), turn(ran(), role="model"), turn(gave("1")), turn(ran(), role="model"),
        turn(gave("2"))),
     {"messages": [user("Hi"), asked(call(minted(1))), answer(minted(1), "1"),
                   asked(call(minted(2))), answer(minted(2), "2")]}, ""),
    *[(f"7b response {response}", contents(turn("Hi"), turn(ran("f", "c"), role="model"), turn(
        gave(response, id_="c"))), {"messages": [user("Hi"), asked(call("c")), answer("c", told)]},
       "") for response, told in [
        ({"output": "a"}, "a"), ({"output": {"x": [1]}}, '{"x":[1]}'), ({"output": ""}, ""),
        ({"output": "a", "y": 1}, '{"output":"a","y":1}'), ({"a_b": 1}, '{"a_b":1}'), ({}, "")]],
    ("7b picture of a result", contents(turn("Hi"), turn(ran("f", "c"), role="model"), turn(
        gave("a", id_="c", parts=[PNG_PART]))),
     {"messages": [user("Hi"), asked(call("c")), answer("c", "a"), user([
         text("From the tool call c:"), image(PNG)])]}, ""),
    ("7b thoughts", contents(turn("Hi"), turn(
        {"text": "Hm", "thought": True, "thoughtSignature": "c2ln"},
        {"text": "no", "thought": True}, "T", role="model"), turn("?")),
     {"messages": [user("Hi"), spoken("assistant", "T"), user("?")]}, "(thinking)"),
    ("7b code that was run", contents(turn("Hi"), turn(
        {"executableCode": {"code": "1"}}, "T", role="model"), turn("?")),
     {"messages": [user("Hi"), spoken("assistant", "T"), user("?")]}, "(parts)"),
    ("7b parametersJsonSchema", declared({**GF, "description": "D", "parametersJsonSchema": OPEN}),
     {"tools": [function("f", description="D", parameters=OPEN)]}, ""),
    ("7b parameters", declared({**GF, "parameters": GEMINI_SCHEMA}, {"name": "g"}),
     {"tools": [function("f", parameters=JSON_SCHEMA), function("g", parameters=NO_ARGUMENTS)]},
     ""),
    ("7b responseSchema", config(responseMimeType="application/json",
                                 responseSchema=GEMINI_SCHEMA), format_(JSON_SCHEMA, name="output"),
     ""),
    ("7b responseMimeType", config(responseMimeType="application/json"),
     {"response_format": {"type": "json_object"}}, ""),
    ("7b responseMimeType text/plain", config(responseMimeType="text/plain"),
     {"response_format": UNSET}, ""),
    ("7b responseMimeType text/x.enum", config(responseMimeType="text/x.enum"),
     "generationConfig.responseMimeType", ""),
    ("7b googleSearch", {"model": "gpt-5-search-api", "tools": [{"googleSearch": {}}]},
     {"web_search_options": {}}, ""),
    ("7b googleSearch of others", {"tools": [{"google_search": {}}]}, {"tools": UNSET},
     "web_search"),
    *[(f"7b {key}", {"tools": [{key: {}, "functionDeclarations": [GF]}]}, {"tools": [F_CHAT]}, key)
      for key in ("codeExecution", "urlContext", "fileSearch", "computerUse", "googleMaps",
                  "mcpServers")],
    *[(f"7b mode {calling}", declared(GF, {"name": "g"}, **calling), told, "")
      for calling, told in [
        ({"mode": "AUTO"}, {"tool_choice": "auto"}), ({"mode": "VALIDATED"},
        {"tool_choice": "auto"}), ({"mode": "ANY"}, {"tool_choice": "required"}),
        ({"mode": "NONE"}, {"tool_choice": "none"}),
        ({"mode": "ANY", "allowedFunctionNames": ["g"]}, {"tool_choice": function("g")}),
        ({"mode": "ANY", "allowedFunctionNames": ["f", "g"]}, {"tool_choice": typed(
            "allowed_tools", allowed_tools={"mode": "required", "tools": [
                function("f"), function("g")]})})]],
    ("7b VALIDATED over some", {"model": LOCAL, **declared(
        GF, {"name": "g"}, mode="VALIDATED", allowedFunctionNames=["f"])},
     {"tool_choice": "auto", "tools": [F_CHAT]}, ""),
    ("7b ANY over several, compatible", {"model": LOCAL, **declared(
        GF, {"name": "g"}, {"name": "h"}, mode="ANY", allowedFunctionNames=["f", "g"])},
     {"tool_choice": "required", "tools": [F_CHAT, function("g", parameters=NO_ARGUMENTS)]}, ""),
    ("7b mode unknown", declared(GF, mode="SOME"), "toolConfig.functionCallingConfig.mode", ""),
    *[(f"7b {list(asks)[0]}", config(**asks), told, loss) for asks, told, loss in [
        ({"maxOutputTokens": 7}, {"max_completion_tokens": 7}, ""),
        ({"temperature": 1.5}, {"temperature": 1.5}, ""), ({"topP": 0.5}, {"top_p": 0.5}, ""),
        ({"stopSequences": ["a"]}, {"stop": ["a"]}, ""), ({"topK": 4}, {"top_k": UNSET}, "top_k"),
        ({"seed": 1}, {"seed": 1}, ""), ({"frequencyPenalty": 1}, {"frequency_penalty": 1}, ""),
        ({"presencePenalty": 1}, {"presence_penalty": 1}, ""),
        ({"mediaResolution": "LOW"}, {}, "(mediaResolution)")]],
    ("7b five stopSequences", config(stopSequences=list("abcde")), "stop", ""),
    *[(f"7b {key}", config(**{key: value}), f"generationConfig.{key}", "") for key, value in [
        ("candidateCount", 2), ("responseModalities", ["TEXT", "IMAGE"]),
        ("speechConfig", {"x": 1})]],
    ("7b responseModalities of text", config(responseModalities=["Text"]), {}, ""),
    ("7b cachedContent", {"cachedContent": "c"}, "cachedContent", ""),
    ("7b continuationToken", {"continuationToken": "c"}, "continuationToken", ""),
    *[(f"7b {asks}, {model}", {"model": model, **thinks(**asks)}, {"reasoning_effort": told}, loss)
      for model, asks, told, loss in [
        (GPT5, {"thinkingLevel": "LOW"}, "low", ""), (GPT5, {"thinking_level": "minimal"},
        "minimal", ""), (GPT52, {"thinkingLevel": "XHIGH"}, "xhigh", ""),
        (GPT5, {"thinkingLevel": "THINKING_LEVEL_UNSPECIFIED"}, UNSET, ""),
        (GPT52, {"thinkingBudget": 0}, "none", ""), (GPT52, {"thinkingBudget": -1}, UNSET, ""),
        (GPT52, {"thinkingBudget": 4095}, "low", ""), (GPT52, {"thinkingBudget": 4096}, "medium",
        ""), (GPT52, {"thinkingBudget": "16384"}, "high", ""), (PLAIN, {"thinkingBudget": 0},
        UNSET, ""), (PLAIN, {"includeThoughts": True}, UNSET, "")]],
    ("7b logprobs", config(responseLogprobs=True, logprobs=3),
     {"logprobs": True, "top_logprobs": 3}, ""),
    ("7b safetySettings", {"safetySettings": [{"category": "X"}]}, {}, "safetySettings"),
    ("7b hints", {"labels": {"a": "b"}, "store": True, "serviceTier": "flex"},
     {"store": UNSET, "service_tier": UNSET}, "(labels), (store), (serviceTier)"),
    ("0.2 P unknown", {"new": 1}, {"new": UNSET}, "unknown"),
    ("7b no contents", {"contents": None}, "contents", ""),
    ("7b only a system", {"contents": [], "systemInstruction": {"parts": [{"text": "S"}]}},
     "messages", ""),
]

GEMINI_TO_RESPONSES: list[Row] = [
    ("7b instructions and items", contents(
        turn("Hi"), turn("T", ran("f", "c", x=1), role="model"), turn(gave(id_="c")),
        systemInstruction={"parts": [{"text": "S"}]}),
     {"instructions": "S", "input": [
         user([typed("input_text", text="Hi")]), spoken("assistant", "T"),
         fcall("c", arguments='{"x":1}'), output("c")]}, ""),
    ("7b PDF by URL", contents(turn({"fileData": {
        "mimeType": "application/pdf", "fileUri": "https://a"}})),
     {"input": [user([typed("input_file", file_url="https://a")])]}, ""),
    ("7b audio", contents(turn({"inlineData": {"mimeType": "audio/wav", "data": "aGk="}})),
     "input_audio", ""),
    ("7b only in Chat Completions", config(seed=1, frequencyPenalty=1, stopSequences=["a"]),
     {"seed": UNSET, "stop": UNSET}, "stop, seed, frequency_penalty"),
    ("7b thinkingLevel", thinks(thinkingLevel="HIGH", includeThoughts=True),
     {"reasoning": {"effort": "high", "summary": "auto"}}, ""),
    ("7b thoughts unasked", thinks(thinkingLevel="HIGH"), {"reasoning": {"effort": "high"}}, ""),
    ("7b ANY over several", declared(GF, {"name": "g"}, mode="ANY", allowedFunctionNames=[
        "f", "g"]),
     {"tool_choice": typed("allowed_tools", mode="required", tools=[
         typed("function", name="f"), typed("function", name="g")])}, ""),
    ("7b googleSearch", {"tools": [{"googleSearch": {}}]}, {"tools": [typed("web_search")]}, ""),
    ("7b schema", config(responseMimeType="application/json", responseJsonSchema=CHAT_SHAPE),
     {"text": {"format": typed("json_schema", name="output", schema=CHAT_SHAPE)}}, ""),
]

GEMINI_TO_MESSAGES: list[Row] = [
    ("7b system", {"systemInstruction": {"parts": [{"text": "A"}]}}, {"system": "A"}, ""),
    ("7b media", contents(turn(
        PNG_PART, PDF_PART, {"fileData": {"mimeType": "image/gif", "fileUri": "https://a"}},
        {"fileData": {"mimeType": "application/pdf", "fileUri": "https://b"}},
        {"inlineData": {"mimeType": "text/plain", "data": "eA==", "displayName": "T"}})),
     {"messages": [user([
         PNG_BLOCK, PDF_BLOCK, typed("image", source={"type": "url", "url": "https://a"}),
         document({"type": "url", "url": "https://b"}), TEXT_BLOCK])]}, ""),
    ("7b audio", contents(turn({"inlineData": {"mimeType": "audio/wav", "data": "aGk="}})),
     "input_audio", ""),
    ("7b a tool loop", contents(
        turn("Hi"), turn("T", ran(), ran("f", x=1), role="model"),
        turn(gave("no", key="error"), gave({"a": 1})), turn("b"), **declared(GF)),
     {"messages": [user("Hi"), spoken("assistant", [
         text("T"), use(minted(1)), use(minted(2), x=1)]), user([
             {**result(minted(1), "no"), "is_error": True}, result(minted(2), '{"a":1}'),
             text("b")])],
      "tools": [{"name": "f", "input_schema": NO_ARGUMENTS}]}, ""),
    ("7b parameters", declared({**GF, "parameters": {"properties": {"a": {"type": "STRING"}}}}),
     {"tools": [{"name": "f", "input_schema": {
         "type": "object", "properties": {"a": {"type": "string"}}}}]}, ""),
    *[(f"7b mode {calling}", declared(GF, {"name": "g"}, **calling), told, "")
      for calling, told in [
        ({"mode": "AUTO"}, {"tool_choice": {"type": "auto"}}),
        ({"mode": "NONE"}, {"tool_choice": {"type": "none"}}),
        ({"mode": "ANY"}, {"tool_choice": {"type": "any"}}),
        ({"mode": "ANY", "allowedFunctionNames": ["g"]},
         {"tool_choice": {"type": "tool", "name": "g"}}),
        ({"mode": "VALIDATED", "allowedFunctionNames": ["g"]},
         {"tool_choice": {"type": "auto"}, "tools": [
             {"name": "g", "input_schema": NO_ARGUMENTS}]})]],
    ("7b ANY over several", declared(GF, {"name": "g"}, {"name": "h"}, mode="ANY",
                                     allowedFunctionNames=["f", "g"]),
     {"tool_choice": {"type": "any"}, "tools": [
         {"name": name, "input_schema": NO_ARGUMENTS} for name in "fg"]}, ""),
    ("7b numbers", config(maxOutputTokens=7, temperature=1.5, topK=4.0, stopSequences=["a"]),
     {"max_tokens": 7, "temperature": 1, "top_k": 4, "stop_sequences": ["a"]}, "temperature"),
    ("7b topK, 4.7+", {"model": NOW, **config(topK=4)}, {"top_k": UNSET}, "top_k"),
    ("7b seed and penalties", config(seed=1, presencePenalty=1), {"seed": UNSET},
     "seed, presence_penalty"),
    ("7b responseMimeType", config(responseMimeType="application/json"), {"system": RULE}, ""),
    ("7b schema", config(responseMimeType="application/json", responseSchema=GEMINI_SCHEMA),
     {"output_config": {"format": typed("json_schema", schema={
         **JSON_SCHEMA, "additionalProperties": False, "properties": {
             **JSON_SCHEMA["properties"], "a_b": {"type": "array", "minItems": 1, "items": {
                 "type": "integer", "description": "(maximum: 4)"}}}})}}, ""),
    ("7b thinkingLevel", {"model": NOW, **thinks(thinkingLevel="XHIGH", includeThoughts=True)},
     {"thinking": {"type": "adaptive", "display": "summarized"},
      "output_config": {"effort": "xhigh"}}, ""),
    ("7b thinkingLevel, budget", {"model": BUDGET, **thinks(thinkingLevel="MEDIUM")},
     {"thinking": {"type": "enabled", "budget_tokens": 4096}}, ""),
    ("7b thinkingBudget", {"model": BUDGET, **thinks(thinkingBudget=2000)},
     {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 10192}, ""),
    ("7b thinkingBudget of 0", {"model": NOW, **thinks(thinkingBudget=0)},
     {"thinking": {"type": "disabled"}}, ""),
    ("7b thinkingBudget of -1", {"model": NOW, **thinks(thinkingBudget=-1)},
     {"thinking": UNSET}, ""),
    ("7b thinkingBudget over the cap", {"model": BUDGET, **config(
        maxOutputTokens=2000, thinkingConfig={"thinkingBudget": 8000})},
     {"thinking": {"type": "enabled", "budget_tokens": 1488}, "max_tokens": 2000}, ""),
    ("7b thinkingBudget, adaptive only", {"model": NOW, **thinks(
        thinkingBudget=8000, includeThoughts=True)},
     {"thinking": {"type": "adaptive", "display": "summarized"},
      "output_config": {"effort": "medium"}}, ""),
    ("7b thinkingBudget of 0, cannot be disabled", {"model": FORCED, **thinks(thinkingBudget=0)},
     {"thinking": UNSET, "output_config": {"effort": "low"}}, "reasoning_effort"),
    ("7b thinkingBudget of a model without", {"model": OLD, **thinks(thinkingBudget=2000)},
     {"thinking": UNSET}, "reasoning_effort"),
    ("7b googleSearch", {"tools": [{"googleSearch": {}}]},
     {"tools": [typed("web_search_20250305", name="web_search")]}, ""),
    ("1.7 Gemini's thoughts", contents(turn("Hi"), turn(
        {"text": "Hm", "thought": True, "thoughtSignature": "c2ln"}, "T",
        ran("f", "c", "c2ln"), role="model"), turn(gave(id_="c")), **declared(GF)),
     {"messages": [user("Hi"), spoken("assistant", [text("T"), use("c")]), user([result("c")])]},
     "(thinking)"),
]

CHAT_TO_GEMINI += [
    ("3.1 web search and tools", {"model": "gemini-2.5-flash", "tools": [function("f")],
                                  "web_search_options": {}},
     {"tools": [{"functionDeclarations": [{"name": "f"}]}]}, "web_search"),
    ("3.1 a place to search from", {"web_search_options": {"search_context_size": "low"}},
     {"tools": [{"googleSearch": {}}]}, "web_search"),
    ("3.1 thinking of a model without", {
        "model": "gemini-2.0-flash", "thinking": {"type": "adaptive"}},
     {"generationConfig": UNSET}, "thinking"),
    ("1.8 a map", {"tools": [{"type": "function", "function": {"name": "m", "parameters": {
        "type": "object", "additionalProperties": {"type": "string"}}}}]},
     {"tools": [{"functionDeclarations": [{"name": "m", "parametersJsonSchema": {
         "type": "object", "additionalProperties": {"type": "string"}}}]}]}, ""),
    ("1.8 definitions, allOf of one", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"definitions": {"X": {"type": "string"}}, "allOf": [
            {"type": "object", "properties": {"a": {"$ref": "#/definitions/X"}}}]}}}},
     {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": {
         "$defs": {"X": {"type": "string"}}, "type": "object",
         "properties": {"a": {"$ref": "#/$defs/X"}}}}}, ""),
    ("1.8 names that would meet", {"tools": [function("1x"), function("_1x")]},
     {"tools": [{"functionDeclarations": [
         {"name": "_1x_" + gateway.hashed("1x", 8)}, {"name": "_1x"}]}]}, "")]
MESSAGES_TO_GEMINI += [
    ("3.2 a document in a result", history(spoken("assistant", [use("c")]), user([result("c", [
        text("a"), typed("document", title="T", source={
            "type": "text", "media_type": "text/plain", "data": "b"})])]), tools=[F_USE]),
     {"contents": [turn("Hi"), turn(ran(id_="c", signature=gateway.NO_SIGNATURE), role="model"),
                   turn(gave("a\nT\n\nb", id_="c"))]}, "")]
MESSAGES_TO_RESPONSES += [
    ("6.1 domains to search in", {"tools": [typed(
        "web_search_20250305", name="web_search", allowed_domains=["x.org"])]},
     {"tools": [typed("web_search")]}, "web_search")]
RESPONSES_TO_MESSAGES += [
    ("5 filters of a search", {"tools": [typed("web_search", external_web_access=True, filters={
        "allowed_domains": ["x.org"]})]},
     {"tools": [typed("web_search_20250305", name="web_search")]}, "web_search")]
GEMINI_TO_MESSAGES += [
    ("7b what is null is not there", {"tools": [{
        "functionDeclarations": [{"name": "f"}], "googleSearch": None, "codeExecution": None}]},
     {"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]}, ""),
    ("7b domains not to search in", {"tools": [{"googleSearch": {"excludeDomains": ["x.org"]}}]},
     {"tools": [typed("web_search_20250305", name="web_search")]}, "web_search"),
    ("7b a part that nobody knows", contents(turn("a", {"hologram": {"a": 1}})), "contents[0]."
     "parts[1].hologram", ""),
    ("7b code that was run", contents(turn("a"), turn({"executableCode": {}}, "b", role="model"),
                                      turn("c")),
     {"messages": [user("a"), spoken("assistant", "b"), user("c")]}, "(parts)"),
    ("7b one for a list of one", {"contents": {"role": "user", "parts": {"text": "a"}},
                                  "systemInstruction": {"parts": {"text": "S"}}},
     {"messages": [user("a")], "system": "S"}, ""),
    ("1.9 a file by its ending", contents(turn({"fileData": {"fileUri": "https://x/cat.png?s"}})),
     {"messages": [user([typed("image", source={"type": "url", "url": "https://x/cat.png?s"})])]},
     ""),
    ("7b defs, maps and null", declared({"name": "f", "parameters": {
        "type": "OBJECT", "defs": {"X": {"type": "STRING"}}, "properties": {
            "a": {"ref": "#/defs/X"}, "b": {"anyOf": [{"type": "STRING"}], "nullable": True},
            "c": {"type": "OBJECT", "additionalProperties": {"type": "STRING"}}}}}),
     {"tools": [{"name": "f", "input_schema": {
         "type": "object", "$defs": {"X": {"type": "string"}}, "properties": {
             "a": {"$ref": "#/$defs/X"}, "b": {"anyOf": [{"type": "string"}, {"type": "null"}]},
             "c": {"type": "object", "additionalProperties": {"type": "string"}}}}}]}, "")]

SEARCHES = [typed("web_search_20250305", name="web_search")]
RESPONSES_TO_MESSAGES += [
    ("5 no search now", {"tools": [typed("web_search")], "tool_choice": "none"},
     {"tools": SEARCHES, "tool_choice": {"type": "none"}}, ""),
    ("5 a search forced", {"tools": [typed("web_search")], "tool_choice": typed("web_search")},
     {"tools": SEARCHES, "tool_choice": {"type": "tool", "name": "web_search"}}, ""),
    ("5 a search required", {"tools": [typed("web_search")], "tool_choice": "required"},
     {"tools": SEARCHES, "tool_choice": {"type": "any"}}, ""),
    ("4 a search that is not allowed", {
        "tools": [typed("web_search"), flat(function("f"))], "tool_choice": typed(
            "allowed_tools", mode="auto", tools=[typed("function", name="f")])},
     {"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
      "tool_choice": {"type": "auto"}}, ""),
    ("4 only hosted tools that are not there", {
        "tools": [flat(function("f")), typed("mcp")], "tool_choice": typed(
            "allowed_tools", mode="required", tools=[typed("mcp")])}, "tool_choice.tools", "")]
RESPONSES_TO_GEMINI += [
    ("5 no search now", {"tools": [typed("web_search")], "tool_choice": "none"},
     {"tools": UNSET}, "")]
MESSAGES_TO_RESPONSES += [
    ("6.1 a search forced", {"tools": SEARCHES, "tool_choice": {
        "type": "tool", "name": "web_search"}},
     {"tools": [typed("web_search")], "tool_choice": typed("web_search")}, ""),
    ("6.1 a search required", {"tools": SEARCHES, "tool_choice": {"type": "any"}},
     {"tools": [typed("web_search")], "tool_choice": "required"}, ""),
    ("6.1 what is false tells nothing", {"tools": [{**F_USE, "defer_loading": False}]}, {}, "")]
MESSAGES_TO_CHAT += [
    ("6.2 a call of the user's", history(user([use("c")])), "messages", ""),
    ("6.2 an assistant's texts", history(spoken("assistant", [text("a"), text("b")]), user("c")),
     {"messages": [user("Hi"), spoken("assistant", "ab"), user("c")]}, ""),
    ("1.8 a closed object of nothing", {"tools": [{"name": "f", "strict": True, "input_schema": {
        "type": "object", "properties": {}, "additionalProperties": False}}]},
     {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {
         "type": "object", "properties": {}, "additionalProperties": False}}}]}, "")]

LONG_ID = f"call_{gateway.hashed('c' * 50, 22)}"
UPLOAD = {"type": "container_upload", "file_id": "f"}
MESSAGES_TO_CHAT += [
    ("6.1 a schema's nulls", {"tools": [{"name": "f", "input_schema": {
        "type": "object", "properties": None, "required": None}}]}, {"tools": [F_CHAT]}, ""),
    ("6.1 the billing line", {"system": "x-anthropic-billing-header: a=b;\nBe brief."},
     {"messages": [spoken("system", "Be brief."), user("Hi")]}, ""),
    ("6.1 the default speed", {"speed": "standard"}, {}, ""),
    ("6.1 stop_sequences, o3-mini", {"model": "o3-mini", "stop_sequences": ["a"]},
     {"stop": ["a"]}, ""),
    ("6.2 a file of the user's", {"messages": [user([UPLOAD, text("a")])]},
     {"messages": [user("a")]}, "content"),
    ("6 a system's turn without words", history(
        {"role": "system", "output_config": {"effort": "low"}}, user("a")),
     {"messages": [user([text("Hi"), text("a")])]}, "(output_config)"),
    ("6 tools that come and go", history(
        spoken("assistant", "a"), spoken("system", [typed("tool_addition", tools=[]), text("S")]),
        user("b")),
     {"messages": [user("Hi"), spoken("assistant", "a"), spoken("system", "S"), user("b")]},
     "content"),
    ("6.2 traces of the provider's", history(
        spoken("assistant", [typed("fallback"), typed("mcp_tool_listing"), text("a")]), user("b")),
     {"messages": [user("Hi"), spoken("assistant", "a"), user("b")]}, "(content)"),
    ("6.2 a picture in a result whose id is long", history(
        spoken("assistant", [use("c" * 50)]), user([result("c" * 50, [typed(
            "image", source={"type": "url", "url": "https://a"})])]), tools=[F_USE]),
     {"messages": [user("Hi"), asked(call(LONG_ID)), answer(LONG_ID, ""), user(
         [text(f"From the tool call {LONG_ID}:"), image("https://a")])]}, "")]
EMPTY_TEXT = {"inlineData": {"mimeType": "text/plain", "data": ""}}
TWICE = flat(function("f", description="D"))
GEMINI_TO_CHAT += [
    ("7b a schema of no type", config(responseSchema={"type": "OBJECT"}),
     "generationConfig.responseMimeType", ""),
    *[(f"7 a call in pieces, {key}", contents(
        turn("Hi"), turn({"functionCall": {"name": "f", key: value}}, role="model")),
       f"contents[1].parts[0].functionCall.{key}", "") for key, value in [
        ("partialArgs", [{"jsonPath": "$.a"}]), ("willContinue", True)]],
    ("7 arguments in pieces", declared(GF, mode="AUTO", streamFunctionCallArguments=True),
     "toolConfig.functionCallingConfig.streamFunctionCallArguments", ""),
    ("7 a result in pieces", contents(
        turn("Hi"), turn(ran("f", "c"), role="model"), turn({"functionResponse": {
            "name": "f", "id": "c", "response": {"output": "1"}, "willContinue": True}})),
     "contents[2].parts[0].functionResponse.willContinue", ""),
    ("7b a result whose id no call has", contents(
        turn("Hi"), turn({"functionCall": {"name": "f"}}, role="model"), turn(gave("1", id_="x"))),
     {"messages": [user("Hi"), asked(call(minted(1))), answer(minted(1), "1")]}, ""),
    ("7b a result without an id beside one with", contents(
        turn("Hi"), turn(ran("f", "z"), {"functionCall": {"name": "f"}}, role="model"),
        turn(gave("2"), gave("1", id_="z"))),
     {"messages": [user("Hi"), asked(call("z"), call(minted(2))), answer("z", "1"),
                   answer(minted(2), "2")]}, ""),
    ("1.9 media types in other spellings", contents(turn(
        {"inlineData": {"mimeType": "image/jpg", "data": "aGk="}},
        {"inlineData": {"mimeType": "Audio/WAV; codecs=1", "data": "aGk="}})),
     {"messages": [user([image("data:image/jpeg;base64,aGk="), typed(
         "input_audio", input_audio={"data": "aGk=", "format": "wav"})])]}, ""),
    ("1.9 an empty document", contents(turn("a", EMPTY_TEXT)), {"messages": [user("a")]}, ""),
    ("7b logprobs unasked", config(logprobs=5), "generationConfig.logprobs", ""),
    *[(f"7b a function's {key}", declared({**GF, key: value}), {"tools": [F_CHAT]}, f"({key})")
      for key, value in [("response", {"type": "OBJECT"}), ("behavior", "BLOCKING")]],
    ("7b retrievalConfig", {"toolConfig": {"retrievalConfig": {"languageCode": "de"}}}, {},
     "retrievalConfig"),
    ("7b a thought that nobody signed", contents(
        turn("a"), turn({"text": "Hm", "thought": True}, "b", role="model"), turn("c")),
     {"messages": [user("a"), spoken("assistant", "b"), user("c")]}, "(thinking)")]
MESSAGES_TO_GEMINI += [
    ("6.2 a document's title", {"messages": [user([document({
        "type": "base64", "media_type": "application/pdf", "data": "aGk="}, title="Contract 7")])]},
     {"contents": [turn("Contract 7", {"inlineData": {
         "mimeType": "application/pdf", "data": "aGk="}})]}, "")]
MESSAGES_TO_RESPONSES += [
    ("6.2 a document's title", {"messages": [user([document(
        {"type": "url", "url": "https://a/b"}, title="Contract 7")])]},
     {"input": [user([typed("input_file", file_url="https://a/b", filename="Contract 7")])]}, "")]
RESPONSES_TO_CHAT += [
    ("4 tools that are said again", listed(
        typed("additional_tools", tools=[TWICE]), user("Hi"),
        typed("additional_tools", tools=[TWICE]), tools=[TWICE]),
     {"tools": [function("f", description="D", parameters=NO_ARGUMENTS)]}, ""),
    ("4 a file beside an empty URL", listed(user([typed(
        "input_file", file_url="", filename="a.pdf", file_data=PDF_URI)])),
     {"messages": [user([file(PDF_URI, filename="a.pdf")])]}, ""),
    ("4 a summary of thoughts", {"model": GPT5, "reasoning": {
        "effort": "low", "summary": "detailed"}}, {"reasoning_effort": "low"}, "(summary)"),
    ("4 any summary", {"model": GPT5, "reasoning": {"effort": "low", "summary": "auto"}},
     {"reasoning_effort": "low"}, ""),
    ("4 a refusal of others", listed(
        user([typed("refusal", refusal="a")]), spoken("developer", [
            typed("refusal", refusal="b"), typed("input_text", text="c")])),
     {"messages": [user("a"), spoken("system", "b\n\nc")]}, ""),
    ("5 who called", listed(user("Hi"), fcall("c", caller={"type": "direct"}), output("c"),
                            tools=[TWICE]),
     {"messages": [user("Hi"), asked(call("c")), answer("c")]}, "")]
CHAT_TO_GEMINI += [
    ("1.8 what a schema cannot say", format_({
        "type": "object", "properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 1}]}}},
        description="D"),
     config(responseMimeType="application/json", responseJsonSchema={
         "type": "object", "properties": {"a": {
             "description": '(allOf: [{"type":"string"},{"minLength":1}])'}},
         "description": "D"}), "")]

PAIRS: list[tuple[str, str, str, list[Row]]] = [  # client, wire, model unless a row names one
    ("chat", "gemini", NEW, CHAT_TO_GEMINI), ("responses", "chat", PLAIN, RESPONSES_TO_CHAT),
    ("responses", "messages", BOTH, RESPONSES_TO_MESSAGES),
    ("responses", "gemini", NEW, RESPONSES_TO_GEMINI),
    ("messages", "chat", PLAIN, MESSAGES_TO_CHAT),
    ("messages", "responses", GPT52, MESSAGES_TO_RESPONSES),
    ("messages", "gemini", NEW, MESSAGES_TO_GEMINI), ("gemini", "chat", PLAIN, GEMINI_TO_CHAT),
    ("gemini", "responses", GPT52, GEMINI_TO_RESPONSES),
    ("gemini", "messages", BOTH, GEMINI_TO_MESSAGES)]


def check(client: str, wire: str, model: str, row: Row) -> None:
    _, params, expected, lost = row
    params = {"model": model, **params}
    model = params.pop("model")
    if isinstance(expected, str):
        with pytest.raises(GatewayError) as caught:
            carry(client, wire, params, model)
        assert (caught.value.status, caught.value.param) == (400, expected)
        return
    before = json.dumps(params)
    sent, losses, _ = carry(client, wire, params, model)
    assert {key: sent.get(key) for key in expected} == expected
    assert ", ".join(f"({name})" if is_hint else name for name, is_hint in losses.items()) == lost
    again = carry(client, wire, json.loads(before), model)[0]
    assert gateway.dump_json(again) == gateway.dump_json(sent), "prompt caches depend on it"


@pytest.mark.parametrize("client, wire, model, row", [
    pytest.param(client, wire, model, row, id=f"{row[0]} ({client} to {wire})")
    for client, wire, model, rows in PAIRS for row in rows])
def test_a_request_in_another_dialect(client: str, wire: str, model: str, row: Row) -> None:
    check(client, wire, model, row)


Asking = tuple[str, str, str, JSON]  # client, wire, model, request
LONG = "mcp.server/" + "x" * 150
NAMED: list[Asking] = [
    ("chat", "gemini", NEW, loop(asked(call("c", LONG)), answer("c"), tools=[function(LONG)],
                                 tool_choice=function(LONG))),
    ("chat", "gemini", NEW, loop(asked(call("c", "2nd")), answer("c"), tools=[function("2nd")],
                                 tool_choice=function("2nd"))),
    ("responses", "chat", PLAIN, listed(
        user("Hi"), fcall("c", LONG), output("c"), tools=[flat(function(LONG))],
        tool_choice=typed("function", name=LONG))),
    ("messages", "chat", PLAIN, history(
        spoken("assistant", [use("c", LONG)]), user([result("c")]),
        tools=[{**F_USE, "name": LONG}], tool_choice={"type": "tool", "name": LONG})),
    ("messages", "responses", GPT5, history(
        spoken("assistant", [use("c", LONG)]), user([result("c")]),
        tools=[{**F_USE, "name": LONG}], tool_choice={"type": "tool", "name": LONG})),
    *[("gemini", wire, model, contents(
        turn("Hi"), turn(ran("a.b:c", "c"), role="model"), turn(gave(name="a.b:c", id_="c")),
        **declared({"name": "a.b:c"}, mode="ANY", allowedFunctionNames=["a.b:c"])))
      for wire, model in [("chat", PLAIN), ("responses", GPT5), ("messages", BOTH)]]]
LEGAL = {"chat": "[A-Za-z0-9_-]{1,64}", "responses": "[A-Za-z0-9_-]{1,64}",
         "messages": "[A-Za-z0-9_-]{1,128}", "gemini": "[A-Za-z_][A-Za-z0-9_.:-]{0,127}"}


def strings(tree: Any) -> Iterator[str]:
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            yield from strings(value)
        elif isinstance(value, str):
            yield value


@pytest.mark.parametrize("client, wire, model, params", NAMED, ids=[
    f"{case[0]} to {case[1]}" for case in NAMED])
def test_a_name_is_legal_wherever_it_stands_and_restored(
        client: str, wire: str, model: str, params: JSON) -> None:
    sent, losses, rewrites = carry(client, wire, params, model)
    ((name, asked_for),) = rewrites.names.items()
    assert re.fullmatch(LEGAL[wire], name) and losses == {}
    places = {"chat": 3, "responses": 3, "messages": 3, "gemini": 4}  # in results too
    assert list(strings(sent)).count(name) == places[wire] and asked_for not in strings(sent)
    for reply in replies(wire, ANSWER_CALLING[wire](name), rewrites):
        assert [block.name for block in reply.blocks] == [asked_for]


# ---- every pair of dialects: answers ----


def completion(finish: str = "stop", usage: Any = None, **said_: Any) -> JSON:
    return {"id": "chatcmpl-1", "model": "m", "choices": [{
        "index": 0, "message": {"role": "assistant", "content": None, **said_},
        "finish_reason": finish}], "usage": usage or {"prompt_tokens": 3, "completion_tokens": 4}}


def responded(*items: JSON, usage: Any = None, **more: Any) -> JSON:
    return {"id": "resp_1", "object": "response", "model": "m", "status": "completed",
            "output": [{"id": f"item_{i}", **item} for i, item in enumerate(items)],
            "usage": usage or {"input_tokens": 3, "output_tokens": 4}, **more}


def generated(*parts: Any, finish: str = "STOP", usage: Any = None, **more: Any) -> JSON:
    return {"responseId": "r1", "modelVersion": "m", "usageMetadata": usage or {
        "promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7},
        "candidates": [{"content": turn(*parts, role="model"), "finishReason": finish, "index": 0,
                        **more}]}


ANSWER_CALLING: dict[str, Callable[[str], JSON]] = {
    "chat": lambda name: completion("tool_calls", tool_calls=[call("c", name)]),
    "responses": lambda name: responded(fcall("c", name)),
    "messages": lambda name: message(use("c", name), stop="tool_use"),
    "gemini": lambda name: generated(ran(name, "c"))}


def halves(said_: str) -> list[str]:
    return [piece for piece in (said_[:2], said_[2:]) if piece]


def chat_events(whole: JSON) -> Iterator[JSON]:
    (choice,) = whole["choices"]
    deltas: list[JSON] = [{"role": "assistant", "content": ""}]
    message_ = choice["message"]
    deltas += [{key: piece} for key in ("reasoning_content", "content", "refusal")
               for piece in halves(message_.get(key) or "")]
    deltas += [{key: message_[key]} for key in (
        "annotations", "images", "audio", "reasoning_details")
               if key in message_]
    for i, each in enumerate(message_.get("tool_calls", ())):
        kind, name = each["type"], "input" if each["type"] == "custom" else "arguments"
        deltas.append({"tool_calls": [{**each, "index": i, kind: {**each[kind], name: ""}}]})
        deltas += [{"tool_calls": [{"index": i, kind: {name: piece}}]}
                   for piece in halves(each[kind][name])]
    for delta in deltas:
        yield {**whole, "choices": [{"index": 0, "delta": delta}], "usage": None}
    yield {**whole, "choices": [{**choice, "message": None, "delta": {}}], "usage": None}
    yield {**whole, "choices": []}


ITEM_TEXTS = {"function_call": ("arguments", "function_call_arguments"),
              "custom_tool_call": ("input", "custom_tool_call_input")}


def item_events(i: int, item: JSON) -> Iterator[JSON]:
    place = {"output_index": i, "item_id": item["id"]}
    key, name = ITEM_TEXTS.get(item["type"], ("content", ""))
    key = "summary" if item["type"] == "reasoning" else key
    empty = {**item, key: "" if name else []}
    empty.pop("encrypted_content", None)
    yield {"type": "response.output_item.added", "output_index": i, "item": empty}
    for piece in halves(item[key]) if name else ():
        yield {"type": f"response.{name}.delta", **place, "delta": piece}
    for n, part in enumerate([] if name else item[key]):
        kind = part["type"].replace("summary", "reasoning_summary")
        added = "reasoning_summary_part" if key == "summary" else "content_part"
        where = {**place, f"{key}_index": n}
        told = "refusal" if kind == "refusal" else "text"
        yield {"type": f"response.{added}.added", **where, "part": {**part, told: ""}}
        for piece in halves(part[told]):
            yield {"type": f"response.{kind}.delta", **where, "delta": piece}
        for note in part.get("annotations", ()):
            yield {"type": "response.output_text.annotation.added", **where, "annotation": note}
        yield {"type": f"response.{kind}.done", **where, told: part[told]}
    yield {"type": "response.output_item.done", "output_index": i, "item": item}


def response_events(whole: JSON) -> Iterator[JSON]:
    for name in ("created", "in_progress"):
        yield {"type": f"response.{name}", "response": {**whole, "output": [], "usage": None}}
    for i, item in enumerate(whole["output"]):
        yield from item_events(i, item)
    yield {"type": f"response.{whole['status']}", "response": whole}


def generated_events(whole: JSON) -> Iterator[JSON]:
    (candidate,) = whole.get("candidates") or [{}]
    for part in candidate.get("content", {}).get("parts", ()):
        for piece in halves(part["text"]) if part.get("text") else [None]:
            said_ = part if piece is None else {**part, "text": piece}
            if piece == part.get("text", "")[:2] != part.get("text"):
                said_ = {key: value for key, value in said_.items() if key != "thoughtSignature"}
            yield {**whole, "usageMetadata": {"promptTokenCount": 1}, "candidates": [
                {"content": {"role": "model", "parts": [said_]}, "index": 0}]}
    if candidate:
        last = {**candidate, "content": {"role": "model", "parts": [{"text": ""}]}}
        yield {**whole, "candidates": [last]}
    else:
        yield whole


def unnamed(events: Iterable[JSON]) -> bytes:
    return b"".join(gateway.sse(gateway.dump_json(event)) for event in events)


SPELLERS: dict[str, Callable[[JSON], bytes]] = {  # what spells a whole answer of each upstream
    "chat": lambda whole: unnamed(chat_events(whole)) + b"data: [DONE]\n\n",
    "responses": lambda whole: wire_events(response_events(whole)),
    "messages": lambda whole: wire_events(message_events(whole)),
    "gemini": lambda whole: unnamed(generated_events(whole))}


def replies(upstream: str, whole: JSON, rewrites: Rewrites | None = None) -> list[gateway.Reply]:
    """As read from the body and from the stream."""
    rewrites = rewrites or Rewrites()
    return [gateway.DIALECTS[upstream].parse_reply(whole, rewrites),
            gateway.collect(chat_parsed(upstream, [SPELLERS[upstream](whole)], rewrites))]


# ---- what a client makes of a stream, each in its own way and by its own rules ----


def read_events(stream: bytes, is_named: bool) -> list[JSON]:
    """The events of a stream; where they are named, each twice alike."""
    events = []
    for block in stream.decode().split("\n\n")[:-1]:
        *names, data = block.split("\n")
        events.append(json.loads(data[len("data: "):]))
        assert names == ([f"event: {events[-1]['type']}"] if is_named else [])
    return events


def read_chat(stream: bytes) -> JSON:
    stream, done, rest = stream.partition(b"data: [DONE]\n\n")
    chunks = read_events(stream, False)
    *choices, usage = chunks
    ends = [chunk["choices"][0]["finish_reason"] for chunk in choices]
    assert done and not rest and usage["choices"] == [] and ends[:-1] == [None] * (len(ends) - 1)
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in chunks}) == 1
    whole = merge(choices)
    message_ = {"refusal": None, **whole, "content": whole["content"] or None}
    return {**usage, "choices": [{"index": 0, "message": message_, "logprobs": None,
                                  "finish_reason": ends[-1]}], "object": "chat.completion"}


def read_messages(stream: bytes) -> JSON:
    start, *events, delta, stop = read_events(stream, True)
    assert (start["type"], delta["type"], stop) == (
        "message_start", "message_delta", {"type": "message_stop"})
    blocks: list[JSON] = []
    is_open = False
    for event in events:
        kind = event["type"][len("content_block_"):]
        assert is_open == (kind != "start")
        blocks += [dict(event["content_block"], json="")] if kind == "start" else []
        assert event["index"] == len(blocks) - 1
        is_open = kind != "stop"
        about, block = event.get("delta", {}), blocks[-1]
        if "citation" in about:
            block.setdefault("citations", []).append(about["citation"])
        elif "signature" in about:
            block["signature"] = about["signature"]
        elif kind == "delta":
            key = about["type"][:-len("_delta")].replace("input_json", "json")
            (said_,) = (value for name, value in about.items() if name != "type")
            block[key] += said_
        if kind == "stop" and "input" in block:
            block["input"] = json.loads(block["json"] or "{}")
    assert not is_open
    for block in blocks:
        del block["json"]
    return {**start["message"], "content": blocks, **delta["delta"],
            "usage": {**start["message"]["usage"], **delta["usage"]}}


ITEM_PREFIX = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_",
               "custom_tool_call": "ctc_", "web_search_call": "ws_"}


def read_responses(stream: bytes) -> JSON:
    """As openai's helper: an item is added, told and done; the last event repeats all."""
    events = read_events(stream, True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, progress, *told, last = events
    assert [created["type"], progress["type"]] == ["response.created", "response.in_progress"]
    output_, open_, said_ = [], None, {}  # type: list[JSON], JSON | None, dict[Any, str]
    for event in told:
        kind = event["type"][len("response."):]
        assert event["output_index"] == len(output_) and (open_ is None) == (
            kind == "output_item.added")
        if kind == "output_item.added":
            open_, said_ = event["item"], {}
            assert open_["id"].startswith(ITEM_PREFIX[open_["type"]])
            continue
        assert open_ is not None
        if kind == "output_item.done":
            assert event["item"]["id"] == open_["id"] and said_told(event["item"]) == said_
            output_.append(event["item"])
            open_ = None
            continue
        assert event["item_id"] == open_["id"]
        at = event.get("content_index", event.get("summary_index"))
        if kind.endswith(".delta"):
            said_[at] = said_.get(at, "") + event["delta"]
        elif not kind.startswith(("content_part", "reasoning_summary_part", "output_text.annot",
                                  "web_search_call")):
            key = next(key for key in ("text", "refusal", "arguments", "input") if key in event)
            assert event[key] == said_.get(at, ""), kind
    response = last["response"]
    assert len({item["id"] for item in output_}) == len(output_)
    assert last["type"] == f"response.{response['status']}" and response["output"] == output_
    assert {created["response"]["id"], progress["response"]["id"]} == {response["id"]}
    return response


def said_told(item: JSON) -> dict[Any, str]:
    """The texts of an item, by the index of their part."""
    if "content" in item or "summary" in item:
        parts = item.get("content", []) or item.get("summary", [])
        said_ = {i: part.get("text", part.get("refusal")) for i, part in enumerate(parts)}
    else:
        said_ = {None: item.get("arguments", item.get("input"))}
    return {at: each for at, each in said_.items() if each}


def read_gemini(stream: bytes) -> JSON:
    *chunks, last = read_events(stream, False)
    assert not any("usageMetadata" in chunk or "finishReason" in chunk["candidates"][0]
                   for chunk in chunks)
    assert len({(each["responseId"], each["modelVersion"]) for each in [*chunks, last]}) == 1
    parts = [part for chunk in [*chunks, last] for each in chunk.get("candidates", ())
             for part in each["content"]["parts"]]
    for each in last.get("candidates", ()):
        each["content"]["parts"] = parts
    return last


READERS: dict[str, Callable[[bytes], JSON]] = {
    "chat": read_chat, "messages": read_messages, "responses": read_responses,
    "gemini": read_gemini}


def seen(upstream: str, client: str, whole: JSON, chat: Chat | None = None,
         rewrites: Rewrites | None = None) -> list[JSON]:
    """An answer as the client gets it: in a body, and in a stream."""
    chat, rewrites = chat or Chat("m", []), rewrites or Rewrites()
    chat.include_usage = True
    dialect, source = gateway.DIALECTS[client], gateway.DIALECTS[upstream]
    reply = source.parse_reply(whole, rewrites)
    reply.model = chat.model
    renderer = dialect.renderer(chat, 7)
    stream = b"".join(map(renderer.feed, chat_parsed(
        upstream, [SPELLERS[upstream](whole)], rewrites)))
    body = gateway.dump_json(dialect.render_reply(reply, chat, 7))
    return [json.loads(body), READERS[client](stream)]


def merged_parts(parts: list[JSON]) -> list[JSON]:
    """Neighbouring texts in one, as an SDK shows them; a signature ends one."""
    made: list[JSON] = []
    for part in parts:
        before = made[-1] if made else {}
        is_same = part.get("thought") == before.get("thought") and "thoughtSignature" not in before
        if "text" in part and "text" in before and is_same:
            made[-1] = {**before, **part, "text": before["text"] + part["text"]}
        else:
            made.append(part)
    return made


def heart(client: str, body: JSON) -> tuple[Any, str]:
    """What an answer says, and its end."""
    if client == "chat":
        (choice,) = body["choices"]
        return {key: value for key, value in choice["message"].items()
                if value not in (None, "") and key != "role"}, choice["finish_reason"]
    if client == "messages":
        assert all(block["caller"] == {"type": "direct"} for block in body["content"]
                   if block["type"] == "tool_use")  # whom the SDKs of some languages need
        return [{key: value for key, value in block.items() if key != "caller"}
                for block in body["content"]], body["stop_reason"]
    if client == "responses":
        items = [{key: value for key, value in item.items() if key not in ("id", "status")}
                 for item in body["output"]]
        return items, (body["incomplete_details"] or {"reason": body["status"]})["reason"]
    (candidate,) = body.get("candidates") or [None]
    if candidate is None:
        return body["promptFeedback"], ""
    *parts, last = [*merged_parts(candidate["content"]["parts"]), {"text": ""}]
    if parts[-1:] == [last]:  # so that no content is without parts
        parts.pop()
    return parts, candidate["finishReason"]


def spoke(said_: str, *notes: JSON) -> JSON:
    return typed("message", role="assistant", content=[
        typed("output_text", text=said_, annotations=list(notes), logprobs=[])])


def refused(said_: str) -> JSON:
    return typed("message", role="assistant", content=[typed("refusal", refusal=said_)])


def thought_of(said_: str, *, signature: str = "") -> JSON:
    return typed("reasoning", summary=[typed("summary_text", text=said_)] if said_ else [],
                 **({"encrypted_content": signature} if signature else {}))


def about_url(end: int, start: int = 0) -> JSON:
    return {"type": "url_citation", "url": "https://a", "title": "A", "start_index": start,
            "end_index": end}


GROUNDED = {"groundingMetadata": {
    "groundingChunks": [{"web": {"uri": "https://a", "title": "A"}}],
    "groundingSupports": [{"groundingChunkIndices": [0], "segment": {
        "startIndex": 3, "endIndex": 6}}]}}  # in bytes
NOTED = [{"type": "url_citation", "url_citation": {
    "url": "https://a", "title": "A", "start_index": 0, "end_index": 3}}]
SAME_CITED = {**CITED, "cited_text": "", "encrypted_index": ""}
CALL_1 = {"x": {"y": [1, "é"]}}
SAID_1 = '{"x":{"y":[1,"é"]}}'

# Section and what it is about; upstream and its answer; by client what it says, and its end.
SEEN: list[tuple[str, str, JSON, dict[str, tuple[Any, str]]]] = [
    ("3.3 text", "gemini", generated("abc\u2028", "d👋"), {
        "chat": ({"content": "abc\u2028d👋"}, "stop"),
        "messages": ([text("abc\u2028d👋")], "end_turn"),
        "responses": ([spoke("abc\u2028d👋")], "completed")}),
    ("3.3 thoughts", "gemini", generated({"text": "Hmm", "thought": True}, "abc"), {
        "chat": ({"content": "abc", "reasoning_content": "Hmm"}, "stop"),
        "messages": ([{**THOUGHT, "signature": ""}, text("abc")], "end_turn"),
        "responses": ([thought_of("Hmm"), spoke("abc")], "completed")}),
    ("3.3 calls", "gemini", generated("abc", ran("f", "c", **CALL_1), {
        "functionCall": {"name": "g"}}), {
        "chat": ({"content": "abc", "tool_calls": [
            called("c", SAID_1), called("call_r1_1", "{}", "g")]}, "tool_calls"),
        "messages": ([text("abc"), use("c", **CALL_1), use("call_r1_1", "g")], "tool_use"),
        "responses": ([spoke("abc"), fcall("c", arguments=SAID_1), fcall("call_r1_1", "g")],
                      "completed")}),
    ("3.3 code that ran", "gemini", generated(
        {"executableCode": {"code": "1"}}, "abc", {"codeExecutionResult": {"output": "1"}}),
     {"chat": ({"content": "abc"}, "stop"), "messages": ([text("abc")], "end_turn")}),
    ("3.3 grounding", "gemini", generated("é abc", **GROUNDED), {
        "chat": ({"content": "é abc", "annotations": [{"type": "url_citation", "url_citation": {
            "url": "https://a", "title": "A", "start_index": 2, "end_index": 5}}]}, "stop")}),
    ("3.3 a blocked prompt", "gemini", {
        "responseId": "r1", "modelVersion": "m", "promptFeedback": {"blockReason": "SAFETY"}}, {
        "chat": ({}, "content_filter"), "messages": ([], "refusal"),
        "responses": ([], "content_filter")}),
    ("6.3 text", "chat", completion(content="abc"), {
        "messages": ([text("abc")], "end_turn"), "responses": ([spoke("abc")], "completed"),
        "gemini": ([{"text": "abc"}], "STOP")}),
    ("6.3 thoughts", "chat", completion(content="abc", reasoning_content="Hmm"), {
        "messages": ([{**THOUGHT, "signature": ""}, text("abc")], "end_turn"),
        "responses": ([thought_of("Hmm"), spoke("abc")], "completed"),
        "gemini": ([{"text": "Hmm", "thought": True}, {"text": "abc"}], "STOP")}),
    ("6.3 refusal", "chat", completion(refusal="Never"), {
        "messages": ([text("Never")], "refusal"), "responses": ([refused("Never")], "completed"),
        "gemini": ([{"text": "Never"}], "SAFETY")}),
    ("6.3 calls", "chat", completion("tool_calls", content="abc", tool_calls=[
        call("c", arguments=SAID_1), call("d", "g", "")]), {
        "messages": ([text("abc"), use("c", **CALL_1), use("d", "g")], "tool_use"),
        "responses": ([spoke("abc"), fcall("c", arguments=SAID_1), fcall("d", "g")], "completed"),
        "gemini": ([{"text": "abc"}, ran("f", "c", **CALL_1), ran("g", "d")], "STOP")}),
    ("6.3 custom call", "chat", completion("tool_calls", tool_calls=[
        typed("custom", id="c", custom={"name": "sh", "input": 'l"s\u2028'})]), {
        "messages": ([use("c", "sh", input='l"s\u2028')], "tool_use"),
        "responses": ([{**SH_ITEM, "input": 'l"s\u2028'}], "completed"),
        "gemini": ([ran("sh", "c", input='l"s\u2028')], "STOP")}),
    ("6.3 citations", "chat", completion(content="abc", annotations=NOTED), {
        "responses": ([spoke("abc", about_url(3))], "completed")}),
    ("6.3 citations of a part", "chat", completion(content="abc", annotations=[
        {"type": "url_citation", "url_citation": about_url(2, 1)}]), {
        "responses": ([spoke("abc", about_url(2, 1))], "completed")}),
    ("6.3 nothing at all", "chat", completion(content=""), {
        "messages": ([], "end_turn"), "responses": ([], "completed"), "gemini": ([], "STOP")}),
    ("5 all kinds", "messages", message(
        text("ab"), *SEARCH, text("cde", citations=[CITED]), use("c", **CALL_1), use("d"),
        stop="tool_use"), {
        "responses": ([spoke("ab"), typed("web_search_call", action=typed(
            "search", query=SEARCH[0]["input"].get("query", ""))), spoke("cde", about_url(3)),
            fcall("c", arguments=SAID_1), fcall("d")], "completed"),
        "gemini": ([{"text": "abcde"}, ran("f", "c", **CALL_1), ran("f", "d")], "STOP")}),
    ("5 refusal", "messages", message(text("a"), stop="refusal", stop_details={
        "type": "refusal", "category": None, "explanation": "No."}), {
        "responses": ([spoke("a"), refused("No.")], "completed"),
        "gemini": ([{"text": "a"}], "SAFETY")}),
    ("5 refusal of nothing", "messages", message(stop="refusal"), {
        "responses": ([], "content_filter"), "gemini": ({"blockReason": "SAFETY"}, "")}),
    ("8.5 Responses, all kinds", "responses", responded(
        thought_of("Hmm"), spoke("abc", about_url(3)), fcall("c", arguments=SAID_1),
        {**SH_ITEM, "call_id": "d"}), {
        "chat": ({"content": "abc", "reasoning_content": "Hmm", "annotations": NOTED,
                  "tool_calls": [called("c", SAID_1), {**SH_CALL, "id": "d"}]}, "tool_calls"),
        "messages": ([{**THOUGHT, "signature": ""}, {**text("abc"), "citations": [SAME_CITED]},
                      use("c", **CALL_1), use("d", "sh", input="ls")], "tool_use"),
        "gemini": ([{"text": "Hmm", "thought": True}, {"text": "abc"}, ran("f", "c", **CALL_1),
                    ran("sh", "d", input="ls")], "STOP")}),
    ("8.5 Responses, citations of a part", "responses", responded(
        spoke("abc", about_url(2, 1))), {
        "chat": ({"content": "abc", "annotations": [{
            "type": "url_citation", "url_citation": {
                "url": "https://a", "title": "A", "start_index": 1, "end_index": 2}}]}, "stop")}),
    ("8.5 Responses, summaries", "responses", responded(typed("reasoning", summary=[
        typed("summary_text", text="abc"), typed("summary_text", text="def")])), {
        "chat": ({"reasoning_content": "abc\n\ndef"}, "stop")}),
    ("8.5 Responses, refusal", "responses", responded(refused("Never")), {
        "messages": ([text("Never")], "refusal"), "chat": ({"refusal": "Never"}, "stop"),
        "gemini": ([{"text": "Never"}], "SAFETY")}),
]


@pytest.mark.parametrize("upstream, whole, client, expected", [
    pytest.param(upstream, whole, client, expected, id=f"{name} ({upstream} to {client})")
    for name, upstream, whole, clients in SEEN for client, expected in clients.items()])
def test_an_answer_in_another_dialect(
        upstream: str, whole: JSON, client: str, expected: tuple[Any, str]) -> None:
    body, streamed = seen(upstream, client, whole)
    assert heart(client, body) == expected
    assert heart(client, streamed) == expected
    prefix = {"chat": "chatcmpl-", "messages": "msg_", "responses": "resp_"}.get(client, "")
    assert body.get("id", "").startswith(prefix)
    assert {**streamed, "choices": 0, "candidates": 0} == {**body, "choices": 0, "candidates": 0}


def grounded(*supports: JSON, **chunk: Any) -> JSON:
    return {"groundingMetadata": {
        "groundingChunks": [chunk or {"web": {"uri": "https://a", "title": "A"}}],
        "groundingSupports": [{"groundingChunkIndices": [0], "segment": each}
                              for each in supports]}}


@pytest.mark.parametrize("parts, segment, block, start, end", [
    (["aaaa", "bbbb"], {"partIndex": 1, "endIndex": 4}, 0, 4, 8),
    (["é", "bé"], {"partIndex": 1, "startIndex": 1, "endIndex": 3}, 0, 2, 3),
    ([{"text": "aaaa", "thoughtSignature": "c2ln"}, "bbbb"], {"endIndex": 3}, 0, 0, 3),
    ([{"text": "aaaa", "thoughtSignature": "c2ln"}, "bbbb"], {"partIndex": 1, "endIndex": 3},
     2, 0, 3),
    ([{"text": "hm", "thought": True}, "aaaa"],
     {"partIndex": 1, "startIndex": 2, "endIndex": 9}, 1, 2, 4),
])
def test_a_citation_of_geminis_names_its_part(
        parts: Any, segment: JSON, block: int, start: int, end: int) -> None:
    told = gateway.DIALECTS["gemini"].parse_reply(
        generated(*parts, **grounded(segment)), Rewrites())
    cited = told.blocks[block]
    assert isinstance(cited, Text)
    assert cited.citations == [{"url": "https://a", "title": "A", "start": start, "end": end}]


def test_the_pieces_of_an_answer_that_come_back_are_one_text() -> None:
    """The SDKs' chats keep each chunk of a stream as a content of its own."""
    said_ = [turn("Hi", role="user"),
             *(turn(text_, role="model") for text_ in ("First.", "\n\n", "Second.")),
             turn("And?", role="user"), turn("a", ran("f", "c"), "b", role="model")]
    asked = gateway.DIALECTS["gemini"].parse_request({"model": "m", "contents": said_}, Losses())
    assert asked.turns[1].blocks == [Text(text="First.\n\nSecond.")]
    assert [type(block) for block in asked.turns[3].blocks] == [Text, ToolCall, Text]


def test_a_responses_stream_that_completes_incompletely_is_cut() -> None:
    """As vLLM tells it."""
    last = responded(spoke("a"), status="incomplete",
                     incomplete_details={"reason": "max_output_tokens"})
    told = chat_parsed("responses", [event(typed(f"response.{name}", response=last))
                                     for name in ("created", "completed")])
    assert gateway.collect(told).finish == "length"


def test_citations_stand_in_the_text_that_geminis_clients_see() -> None:
    """Texts in a row are one part, and each page is told once; indexes count bytes."""
    cited, other = {"url": "https://a", "title": "A"}, {"url": "https://b", "title": "B"}
    reply = Reply("msg_1", "m", [
        Text(text="é"), Text(text="über 😀", citations=[cited, {**other, "start": 5, "end": 6}]),
        Thinking(text="Hmm"), ToolCall(id="c", name="f"), Text(text="fin", citations=[cited])],
        "stop", Usage(1, 2))
    (candidate,) = gateway.DIALECTS["gemini"].render_reply(reply, Chat("m", []), 7)["candidates"]
    parts = [part.get("text") for part in candidate["content"]["parts"]]
    assert parts == ["éüber 😀", "Hmm", None, "fin"]
    pages = [{"web": {"uri": f"https://{name}", "title": name.upper()}} for name in "ab"]
    places = [({"startIndex": 2, "endIndex": 12, "text": "über 😀"}, [0]),
              ({"startIndex": 8, "endIndex": 12, "text": "😀"}, [1]),
              ({"partIndex": 3, "startIndex": 0, "endIndex": 3, "text": "fin"}, [0])]
    grounding = {"groundingChunks": pages, "groundingSupports": [
        {"segment": segment, "groundingChunkIndices": chunks} for segment, chunks in places]}
    assert candidate["groundingMetadata"] == grounding
    renderer = gateway.DIALECTS["gemini"].renderer(Chat("m", []), 7)
    told = b"".join(map(renderer.feed, spell(reply, random.Random(1)))).split(b"data: ")[-1]
    places[2] = ({"startIndex": 12, "endIndex": 15, "text": "fin"}, [0])  # in all that came
    for support, (segment, _) in zip(grounding["groundingSupports"], places):
        support["segment"] = segment
    assert json.loads(told)["candidates"][0]["groundingMetadata"] == grounding


SIGNED = {"text": "", "thoughtSignature": "c2ln"}


@pytest.mark.parametrize("last, is_told", [
    ([generated(SIGNED, **GROUNDED)], True), ([generated(SIGNED, finish=""),
                                               generated(**GROUNDED)], False),
    ([generated(ran("f", "c"), **GROUNDED)], True)])
@pytest.mark.parametrize("client", ["responses", "messages", "chat"])
def test_a_citation_comes_before_what_ends_its_text_or_is_counted(
        client: str, last: list[JSON], is_told: bool) -> None:
    parser = gateway.DIALECTS["gemini"].parser(Rewrites())
    renderer = gateway.DIALECTS[client].renderer(Chat("m", []), 7)
    events = [said_ for chunk in [generated("é abc", finish=""), *last]
              for said_ in parser.feed(event(chunk))] + parser.end()
    told = b"".join(map(renderer.feed, events))
    assert (b"https://a" in told) == (is_told or client == "chat")
    assert bool(renderer.lost | parser.rewrites.lost) != (is_told or client == "chat")


@pytest.mark.parametrize("end", [SIGNED, ran("f", "c")])
def test_logprobs_of_geminis_are_those_of_the_text_before(end: JSON) -> None:
    told = gateway.DIALECTS["gemini"].parse_reply(generated("He", end, logprobsResult={
        "chosenCandidates": [{"token": "He", "logProbability": -0.1}]}), Rewrites())
    assert isinstance(told.blocks[0], Text) and told.blocks[0].logprobs[0]["token"] == "He"


@pytest.mark.parametrize("about, is_lost", [
    (grounded({"endIndex": 1}, maps={"uri": "u", "title": "t"}), False),
    (grounded({"endIndex": 1}, retrievedContext={"uri": "u"}), False),
    (grounded({"endIndex": 1}, retrievedContext={"text": "of a store"}), True),
    ({"citationMetadata": {"citations": [{"uri": "u", "endIndex": 2}]}}, True)])
def test_sources_of_every_kind_are_cited_or_counted(about: JSON, is_lost: bool) -> None:
    rewrites = Rewrites()
    (said_,) = gateway.DIALECTS["gemini"].parse_reply(generated("a", **about), rewrites).blocks
    assert isinstance(said_, Text) and bool(said_.citations) != is_lost
    assert rewrites.lost == ({"annotations"} if is_lost else set())


TARGETS = {"chat": PLAIN, "responses": GPT5, "messages": BOTH, "gemini": NEW}
GEMINI_FILTERS = [
    "SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION", "PUP_LIMITED_DISABLED",
    "MODEL_ARMOR"]
BROKEN = ["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
          "MALFORMED_RESPONSE", "MISSING_THOUGHT_SIGNATURE"]
CALLING: dict[str, JSON] = {
    "chat": {"tool_calls": [call("c")]}, "messages": use("c"), "gemini": ran("f", "c"),
    "responses": fcall("c")}


def ended(upstream: str, reason: str, calls_: bool = False) -> JSON:
    """An answer that says abc, and calls perhaps, and ends so."""
    more = [CALLING[upstream]] * calls_
    if upstream == "chat":
        return completion(reason, content="abc", **(more[0] if more else {}))
    if upstream == "messages":
        return message(text("abc"), *more, stop=reason)
    if upstream == "gemini":
        return generated("abc", *more, finish=reason)
    details = {} if reason == "completed" else {
        "status": "incomplete", "incomplete_details": {"reason": reason}}
    return responded(spoke("abc"), *more, **details)


FULL = {"chat": "stop", "messages": "end_turn", "responses": "completed", "gemini": "STOP"}
CALLS = {"chat": "tool_calls", "messages": "tool_use", "responses": "completed", "gemini": "STOP"}
SHORT = {"chat": "length", "messages": "max_tokens", "responses": "max_output_tokens",
         "gemini": "MAX_TOKENS"}
BLOCKED = {"chat": "content_filter", "messages": "refusal", "responses": "content_filter",
           "gemini": "SAFETY"}
ENDS: list[tuple[str, Iterable[str], bool, JSON]] = [  # upstream, reasons, whether it calls, means
    ("messages", ["end_turn", "stop_sequence", "pause_turn", "compaction", "new"], False, FULL),
    ("messages", ["tool_use"], True, CALLS),
    ("messages", ["max_tokens", "model_context_window_exceeded"], False, SHORT),
    ("gemini", ["STOP", "OTHER", "NO_IMAGE", "IMAGE_OTHER", "FINISH_REASON_UNSPECIFIED", "NEW",
                *BROKEN], False, FULL),
    ("gemini", ["STOP"], True, CALLS), ("gemini", ["MAX_TOKENS", "CONTINUATION"], False, SHORT),
    ("gemini", GEMINI_FILTERS, False, BLOCKED),
    ("chat", ["stop", "eos"], False, FULL), ("chat", ["length"], False, SHORT),
    ("chat", ["stop", "tool_calls", "function_call"], True, CALLS),
    ("chat", ["content_filter"], False, BLOCKED),
    ("responses", ["completed", "steered"], False, FULL), ("responses", ["completed"], True, CALLS),
    ("responses", ["max_output_tokens", "max_messages"], False, SHORT),
    ("responses", ["content_filter"], False, BLOCKED)]


@pytest.mark.parametrize("upstream, reason, calls_, means", [
    (upstream, reason, calls_, means)
    for upstream, reasons, calls_, means in ENDS for reason in reasons])
def test_an_end_means_the_same_everywhere(upstream: str, reason: str, calls_: bool,
                                          means: JSON) -> None:
    whole = ended(upstream, reason, calls_)
    for client in [each for each in TRANSLATED if each != upstream]:
        told = [heart(client, body)[1] for body in seen(upstream, client, whole)]
        assert told == [means[client]] * 2, client


@pytest.mark.parametrize("block", [
    {"type": "thinking", "thinking": "x", "signature": "y"}, use("d"), typed("browser_state")])
def test_a_result_holds_only_what_a_tool_can_give(block: JSON) -> None:
    params = history(spoken("assistant", [use("c")]), user([
        {"type": "tool_result", "tool_use_id": "c", "content": [block]}]), tools=[F_USE])
    for wire, model in [("chat", PLAIN), ("responses", GPT5), ("gemini", NEW)]:
        with pytest.raises(GatewayError) as caught:
            carry("messages", wire, params, model)
        assert caught.value.param == "messages[2].content[0].content[0].type"


OF_A_FILE = {"type": "file_citation", "file_id": "f", "filename": "a.pdf", "index": 1}


@pytest.mark.parametrize("upstream, whole, lost", [
    ("chat", completion(content="abc", images=[image(PNG)]), "images"),
    ("chat", completion(content="abc", audio={"id": "a", "data": "eA=="}), "audio"),
    ("chat", completion(content="abc", reasoning_details=[{"type": "reasoning.encrypted"}]),
     "reasoning_details"),
    ("chat", completion(content="abc", annotations=[OF_A_FILE]), "annotations"),
    ("responses", responded(spoke("abc", OF_A_FILE)), "annotations"),
    ("messages", message({**text("abc"), "citations": [{"type": "page_location"}]}), "citations"),
    *[("gemini", generated("abc", {
        "inlineData": {"mimeType": "image/png", "data": "eA=="}, **signed}), "parts")
      for signed in ({}, {"thoughtSignature": "c2ln"})],
    ("responses", responded({**spoke("abc"), "phase": "commentary"}), "phase"),
])
def test_what_no_other_dialect_can_say_of_an_answer_is_named(
        upstream: str, whole: JSON, lost: str) -> None:
    body, stream = Rewrites(), Rewrites()
    gateway.DIALECTS[upstream].parse_reply(whole, body)
    chat_parsed(upstream, [SPELLERS[upstream](whole)], stream)
    assert body.lost == stream.lost == {lost}


FAILING: dict[str, tuple[str, JSON]] = {
    "custom": ("chat", completion("tool_calls", tool_calls=[call("c", "sh", '{"input":"l')])),
    **{f"finish {reason}": ("chat", completion(reason)) for reason in ("error", "abort")},
    "arguments": ("chat", completion("tool_calls", tool_calls=[call("c", arguments="{")])),
    **{reason: ("gemini", generated(finish=reason)) for reason in BROKEN},
    "no candidates": ("gemini", {"responseId": "r1", "modelVersion": "m"}),
    "failed": ("responses", responded(status="failed", error={
        "code": "server_error", "message": "Broken."}))}


@pytest.mark.parametrize("name", FAILING)
def test_an_answer_that_failed_is_an_error(name: str) -> None:
    upstream, whole = FAILING[name]
    rewrites = Rewrites()
    rewrites.custom.add("sh")
    with pytest.raises(GatewayError) as body:
        gateway.DIALECTS[upstream].parse_reply(whole, rewrites)
    with pytest.raises(GatewayError) as stream:
        chat_parsed(upstream, [SPELLERS[upstream](whole)], rewrites)
    assert body.value.status >= 500 and stream.value.status >= 500


@pytest.mark.parametrize("arguments, told", [
    ('{"input":"l', "l"), ('{"input": "l\\ns\\u00e9\\"\\', 'l\ns\xe9"'),
    ('{"input":"a\\ud83d\\', "a\ud83d"), ('{"input":"a\\u12', "a"), ('{"inp', ""),
    ('{"input":', ""),
    ('{"input":"ls"}', "ls"), ('{"other":1}', '{"other":1}')])
def test_the_input_of_a_custom_call_that_was_cut_off_is_told_as_far_as_it_came(
        arguments: str, told: str) -> None:
    rewrites = Rewrites()
    rewrites.custom.add("sh")
    whole = completion("length", tool_calls=[call("c", "sh", arguments)])
    for body in seen("chat", "responses", whole, rewrites=rewrites):
        (item,) = body["output"]
        assert (item["type"], item["input"]) == ("custom_tool_call", told)


@pytest.mark.parametrize("upstream", ["chat", "responses"])
def test_a_call_that_was_cut_off_is_none_for_clients_that_would_run_it(upstream: str) -> None:
    whole = {"chat": completion("length", content="abc", tool_calls=[call("c", arguments="{")]),
             "responses": responded(spoke("abc"), fcall("c", arguments="{"), status="incomplete",
                                    incomplete_details={"reason": "max_output_tokens"})}[upstream]
    for body in seen(upstream, "gemini", whole):
        assert heart("gemini", body) == ([{"text": "abc"}], "MAX_TOKENS")


@pytest.mark.parametrize("client", [name for name in TRANSLATED if name != "messages"])
@pytest.mark.parametrize("model, keeps", [
    ("claude-sonnet-4-6", True), ("house-model", True), ("claude-opus-4-6", False)])
def test_a_thought_goes_back_to_its_own_family_only(client: str, model: str, keeps: bool) -> None:
    whole = {**message({**THOUGHT, "signature": SIGNATURE}, text("T")),
             "model": "claude-sonnet-4-6-20260217"}
    for body in seen("messages", client, whole, Chat("m", [], shows_thinking=True)):
        sent, losses, _ = carry(client, "messages", echo(client, body), model)
        assert (SIGNATURE.encode() in gateway.dump_json(sent)) == keeps
        assert ("thinking" in losses) != keeps and b'"family"' not in gateway.dump_json(sent)


@pytest.mark.parametrize("items, kept", [
    (["reasoning", "message"], ["reasoning", "message"]), (["reasoning"], []),
    (["reasoning", "web_search_call", "reasoning", "message"], ["reasoning", "message"])])
@pytest.mark.parametrize("client", [name for name in TRANSLATED if name != "responses"])
def test_a_thought_goes_back_only_with_what_it_led_to(
        client: str, items: list[str], kept: list[str]) -> None:
    made = {"reasoning": thought_of("Hmm", signature="QQ"), "message": spoke("T"),
            "web_search_call": typed("web_search_call", content=[])}
    whole = responded(*map(made.__getitem__, items))
    for shows in (True, False):
        for body in seen("responses", client, whole, Chat("m", [], shows_thinking=shows)):
            params = echo(client, body)
            params[gateway.DIALECTS[client].history].append(
                turn("And?") if client == "gemini" else user("And?"))
            sent, _, _ = carry(client, "responses", params, GPT5)
            shown = [item.get("type") or item["role"] for item in sent["input"]]
            assert shown == ["user", *[{"message": "assistant"}.get(each, each) for each in kept],
                             "user"]


def usage_of(dialect: str, written: int = 100) -> JSON:
    """One usage, as each dialect tells it: 1000 read (600 cached), 200 said (50 in thoughts)."""
    read = {"cached_tokens": 600, "cache_write_tokens": written}
    return {
        "chat": {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200,
                 "prompt_tokens_details": read,
                 "completion_tokens_details": {"reasoning_tokens": 50}},
        "responses": {"input_tokens": 1000, "output_tokens": 200, "total_tokens": 1200,
                      "input_tokens_details": read,
                      "output_tokens_details": {"reasoning_tokens": 50}},
        "messages": {"input_tokens": 400 - written, "cache_read_input_tokens": 600,
                     "cache_creation_input_tokens": written, "output_tokens": 200,
                     "output_tokens_details": {"thinking_tokens": 50}},
        "gemini": {"promptTokenCount": 1000, "cachedContentTokenCount": 600,
                   "candidatesTokenCount": 150, "thoughtsTokenCount": 50,
                   "totalTokenCount": 1200}}[dialect]


SAYING: dict[str, Callable[[JSON], JSON]] = {
    "chat": lambda usage: completion(content="abc", usage=usage),
    "responses": lambda usage: responded(spoke("abc"), usage=usage),
    "messages": lambda usage: message(text("abc"), usage=usage),
    "gemini": lambda usage: generated("abc", usage=usage)}


@pytest.mark.parametrize("upstream, client", list(itertools.permutations(TRANSLATED, 2)))
def test_usage_is_told_in_every_dialects_own_sums(upstream: str, client: str) -> None:
    written = 0 if upstream == "gemini" else 100
    for body in seen(upstream, client, SAYING[upstream](usage_of(upstream))):
        assert body["usageMetadata" if client == "gemini" else "usage"] == usage_of(client, written)


# Upstream, what it tells, what that counts.
USAGES: list[tuple[str, JSON, Usage]] = [
    ("chat", {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None},
     Usage(5, 2)),
    ("responses", {"input_tokens": 5, "output_tokens": 2}, Usage(5, 2)),
    ("messages", {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": None,
                  "cache_creation": {"ephemeral_1h_input_tokens": 3},
                  "cache_creation_input_tokens": 4}, Usage(9, 2, 0, 4, 3)),
    ("gemini", {"promptTokenCount": 5, "toolUsePromptTokenCount": 3, "candidatesTokenCount": 2,
                "totalTokenCount": 10}, Usage(8, 2)),
    ("gemini", {"promptTokenCount": 5, "candidatesTokenCount": 7, "thoughtsTokenCount": 4,
                "totalTokenCount": 12}, Usage(5, 7, reasoning=4)),  # Vertex AI's
    ("gemini", {"promptTokenCount": 5, "thoughtsTokenCount": 4, "totalTokenCount": 9},
     Usage(5, 4, reasoning=4)),
]


@pytest.mark.parametrize("upstream, usage, counted", USAGES, ids=[row[0] for row in USAGES])
def test_what_an_upstream_tells_is_counted(upstream: str, usage: JSON, counted: Usage) -> None:
    assert [reply.usage for reply in replies(upstream, SAYING[upstream](usage))] == [counted] * 2


def test_log_probabilities_have_bytes_for_responses() -> None:
    tops = [{"token": "é", "logprob": -0.1, "bytes": None}]
    whole = completion(content="é")
    whole["choices"][0]["logprobs"] = {"content": [{**tops[0], "top_logprobs": tops}]}
    expected = {"token": "é", "logprob": -0.1, "bytes": [195, 169]}
    reply_ = CHAT.parse_reply(whole, Rewrites())
    renderer = gateway.DIALECTS["responses"].renderer(Chat("m", []), 7)
    stream = b"".join(map(renderer.feed, gateway.events_of(reply_)))
    done = next(each for each in map(json.loads, decoded([stream]))
                if each["type"] == "response.output_text.done")
    told = renderer.response["output"][0]["content"][0]["logprobs"]  # type: ignore[attr-defined]
    assert done["logprobs"] == told == [{**expected, "top_logprobs": [expected]}]


@pytest.mark.parametrize("name", TRANSLATED)
def test_an_event_has_the_name_that_its_data_say(name: str) -> None:
    making = Making(name, 3)
    renderer = gateway.DIALECTS[name].renderer(Chat("m", []), 7)
    stream = b"".join(map(renderer.feed, spell(making.reply(), making.random)))
    named = 0
    for raw in gateway.split_events(stream):
        told = re.match(rb"event: (.*)\n", raw)
        if told:
            named += 1
            assert json.loads(gateway.event_data(raw))["type"] == told[1].decode()
    assert (named > 0) == (name in ("messages", "responses"))


def test_no_usage_at_all_is_told_as_0() -> None:
    for client in ("messages", "responses"):
        for body in seen("chat", client, completion(content="abc", usage={"x": 1})):
            assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (0, 0)


# ---- what must come back, through clients that know nothing of it ----

SIGNATURE = "c2ln+/8="
RED = {"type": "redacted_thinking", "data": "red"}
# By issuer its answer, and what of its next request holds all that must come back.
SIGNED: dict[str, tuple[JSON, Callable[[JSON], Any], Any]] = {
    "messages": (
        message(THOUGHT, RED, text("T"), use("c", x=1), use("d"), stop="tool_use"),
        lambda sent: sent["messages"][1]["content"],
        [THOUGHT, RED, text("T"), use("c", x=1), use("d")]),
    "responses": (
        responded(thought_of("Hmm", signature="QQ"), spoke("T"), thought_of("Ah", signature="QR"),
                  fcall("c"), thought_of("", signature="QS"), fcall("d")),
        lambda sent: [{**item, "summary": 0} if item["type"] == "reasoning" else item
                      for item in sent["input"]
                      if item.get("type") in ("reasoning", "function_call")],
        [typed("reasoning", id="item_0", encrypted_content="QQ", summary=0),
         typed("reasoning", id="item_2", encrypted_content="QR", summary=0), fcall("c"),
         typed("reasoning", id="item_4", encrypted_content="QS", summary=0), fcall("d")]),
    "gemini": (
        generated({"text": "Hmm", "thought": True}, "T", ran("f", "c", SIGNATURE, x=1),
                  ran("f", "d")),
        lambda sent: sent["contents"][1],
        turn("T", ran("f", "c", SIGNATURE, x=1), ran("f", "d"), role="model")),
}


def echo(client: str, body: JSON) -> JSON:
    """The next request of a client that sends an answer back as it came, with its results."""
    if client == "chat":
        said_ = body["choices"][0]["message"]
        return loop(said_, *[answer(each["id"]) for each in said_.get("tool_calls", ())])
    if client == "responses":
        ids = [item["call_id"] for item in body["output"] if "call_id" in item]
        return listed(user("Hi"), *body["output"], *map(output, ids), tools=[flat(F)])
    if client == "messages":
        ids = [block["id"] for block in body["content"] if block["type"] == "tool_use"]
        return history(spoken("assistant", body["content"]), user(list(map(result, ids))),
                       tools=[F_USE])
    said_ = body["candidates"][0]["content"]
    ids = [part["functionCall"]["id"] for part in said_["parts"] if "functionCall" in part]
    return contents(turn("Hi"), said_, turn(*[gave(id_=id_) for id_ in ids]), **declared(GF))


CARRIERS = [(client, issuer, shows) for client in TRANSLATED for issuer in SIGNED
            for shows in (True, False)
            if client != issuer and (shows or client in ("messages", "gemini"))]


@pytest.mark.parametrize("client, issuer, shows", CARRIERS)
def test_what_is_signed_goes_through_every_client_and_back(client: str, issuer: str,
                                                           shows: bool) -> None:
    whole, find, expected = SIGNED[issuer]
    for body in seen(issuer, client, whole, Chat("m", [], shows_thinking=shows)):
        assert shows == ('"Hm' in json.dumps(body))
        params = echo(client, body)
        sent, losses, _ = carry(client, issuer, params, TARGETS[issuer])
        assert find(sent) == expected
        assert are_hints(losses), "Gemini's thoughts themselves need not come back"
        for other in [each for each in TRANSLATED if each not in (client, issuer)]:
            sent, losses, _ = carry(client, other, params, TARGETS[other])
            assert is_unmarked(sent) and b"Hm" not in gateway.dump_json(sent)
            assert are_hints(losses)
        dialect = gateway.DIALECTS[client]
        assert is_unmarked(gateway.without_marks(params[dialect.history]))


def hung_on_the_next(parts: list[JSON]) -> list[JSON]:
    """As some clients of Gemini's keep the signature of a thought: without the thought."""
    kept, held = [], {}
    for part in parts:
        if part.get("thought"):
            held = {key: part[key] for key in ("thoughtSignature",) if key in part}
        else:
            kept.append({**held, **part})
            held = {}
    return kept


def without_empty(parts: list[JSON]) -> list[JSON]:
    return [part for part in parts if part.get("text") != ""]


@pytest.mark.parametrize("texts", [[], ["T"]])
@pytest.mark.parametrize("kept", [hung_on_the_next, without_empty])
def test_a_thought_survives_clients_that_move_its_signature_or_drop_empty_parts(
        texts: list[str], kept: Callable[[list[JSON]], list[JSON]]) -> None:
    whole = message(THOUGHT, *map(text, texts), use("c"), stop="tool_use")
    for body in seen("messages", "gemini", whole):
        said_ = body["candidates"][0]["content"]
        said_["parts"] = kept(said_["parts"])
        sent, _, _ = carry("gemini", "messages", echo("gemini", body), TARGETS["messages"])
        assert sent["messages"][1]["content"] == [THOUGHT, *map(text, texts), use("c")]


def is_unmarked(sent: Any) -> bool:
    """Whether nothing of what this gateway put there is left."""
    body = gateway.dump_json(sent)
    return not any(mark in body for mark in (*gateway.MARKS, SIGNATURE.encode()))


def are_hints(losses: dict[str, bool]) -> bool:
    return all(losses.values()) and set(losses) <= {"thinking", "reasoning_content"}


@pytest.mark.parametrize("client", ["chat", "responses", "messages"])
def test_a_signature_of_a_call_survives_a_client_that_keeps_ids_alone(client: str) -> None:
    whole, find, expected = SIGNED["gemini"]
    for body in seen("gemini", client, whole):
        params = without(echo(client, body), {
            "thinking_blocks", "reasoning_content", "extra_content", "encrypted_content"})
        for messages in params.values():
            for each in messages if client == "messages" else ():
                if isinstance(each.get("content"), list):
                    each["content"] = [block for block in each["content"]
                                       if block["type"] != "thinking"]
        sent, _, _ = carry(client, "gemini", params, NEW)
        assert find(sent) == expected


def without(tree: Any, keys: set[str]) -> Any:
    if isinstance(tree, list):
        return [without(item, keys) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: without(value, keys) for key, value in tree.items() if key not in keys}


def test_an_empty_signed_text_is_no_text() -> None:
    """1.7: Gemini may sign at the end of a stream; it goes out as a thought without words."""
    whole = generated("abc", {"text": "", "thoughtSignature": SIGNATURE})
    for client in ("chat", "responses", "messages"):
        for body in seen("gemini", client, whole):
            said_ = heart(client, body)[0]
            if client == "chat":
                assert said_.pop("content") == "abc" and set(said_) == {"thinking_blocks"}
            else:
                assert [item["type"] for item in said_][1:] in (["thinking"], ["reasoning"])


def test_an_unsigned_thought_that_nobody_asked_for_is_hidden() -> None:
    """6.3, 7: text never turns up as text; not asked for, it does not turn up at all."""
    hidden = Chat("m", [], shows_thinking=False)
    whole = completion(content="abc", reasoning_content="Hmm")
    for body in seen("chat", "messages", whole, hidden):
        assert body["content"] == [text("abc")]
    for body in seen("chat", "gemini", whole, hidden):
        assert heart("gemini", body)[0] == [{"text": "abc"}]


# ---- tools that a wire does not know ----

SHELLS: list[tuple[str, str, str]] = [("chat", "messages", BOTH), ("chat", "gemini", NEW), *[
    ("responses", wire, model) for wire, model in [
        ("chat", LOCAL), ("messages", BOTH), ("gemini", NEW)]]]


@pytest.mark.parametrize("client, wire, model", SHELLS)
def test_a_custom_tool_is_a_function_on_the_way(client: str, wire: str, model: str) -> None:
    said_ = 'l"s\u2028\n'
    params: JSON = {"tools": [CUSTOM if client == "chat" else flat(CUSTOM)]}
    sent, losses, rewrites = carry(client, wire, params, model)
    assert losses == {} and "custom" not in json.dumps(sent)
    answers = {"chat": completion("tool_calls", tool_calls=[
                   call("c", "sh", gateway.encode_json({"input": said_}))]),
               "messages": message(use("c", "sh", input=said_), stop="tool_use"),
               "gemini": generated(ran("sh", "c", input=said_))}
    for body in seen(wire, client, answers[wire], rewrites=rewrites):
        told_, end = heart(client, body)
        assert end == CALLS[client]
        assert told_ == ([{**SH_ITEM, "input": said_}] if client == "responses" else {
            "tool_calls": [{**SH_CALL, "custom": {"name": "sh", "input": said_}}]})


@pytest.mark.parametrize("wire, model", [("chat", PLAIN), ("chat", LOCAL), ("messages", BOTH),
                                         ("gemini", NEW)])
def test_a_namespace_is_restored(wire: str, model: str) -> None:
    params = {"tools": [NAMESPACE, typed("namespace", name="o", tools=[flat(F), flat(CUSTOM)])]}
    _, _, rewrites = carry("responses", wire, params, model)
    answers: dict[str, JSON] = {
        "chat": completion("tool_calls", tool_calls=[
            call("a", "ns__f"), call("b", "o__f"), call("c", "o__sh", '{"input":"ls"}')
            if model == LOCAL else {**SH_CALL, "custom": {"name": "o__sh", "input": "ls"}}]),
        "messages": message(use("a", "ns__f"), use("b", "o__f"), use("c", "o__sh", input="ls")),
        "gemini": generated(ran("ns__f", "a"), ran("o__f", "b"), ran("o__sh", "c", input="ls"))}
    chat = understood("responses", params, Losses())
    for body in seen(wire, "responses", answers[wire], chat, rewrites):
        assert heart("responses", body)[0] == [
            fcall("a", namespace="ns"), fcall("b", namespace="o"), {**SH_ITEM, "namespace": "o"}]


# ---- what only one dialect has ----

ECHOED: JSON = {
    "instructions": "S", "max_output_tokens": 7, "metadata": {"a": "b"}, "temperature": 0.5,
    "parallel_tool_calls": False, "reasoning": {"effort": "low"}, "tool_choice": "none",
    "text": {"format": {"type": "json_object"}}, "tools": [flat(F)], "top_p": 0.5}
UNASKED: JSON = {
    "instructions": None, "max_output_tokens": None, "metadata": {}, "temperature": None,
    "parallel_tool_calls": True, "tool_choice": "auto", "text": {"format": {"type": "text"}},
    "tools": [], "top_p": None}


@pytest.mark.parametrize("asks, expected", [({}, UNASKED), (ECHOED, ECHOED)])
def test_a_response_repeats_its_request(asks: JSON, expected: JSON) -> None:
    """4.2: the SDK's type needs all of it."""
    for body in seen("chat", "responses", completion(content="abc"),
                     understood("responses", asks, Losses())):
        assert {key: body[key] for key in expected} == expected
        assert {key: body[key] for key in (
            "object", "created_at", "model", "truncation", "store", "previous_response_id",
            "error")} == {"object": "response", "created_at": 7, "model": "alias",
                          "truncation": "disabled", "store": False, "previous_response_id": None,
                          "error": None}
        assert all(item["status"] == "completed" for item in body["output"])


SUITED: list[tuple[str, JSON, bool]] = [  # model, request, whether /responses is to be asked
    (PLAIN, {}, False), (GPT5, {}, True), ("o3", {}, True), (GPT55, {"tools": [F_USE]}, True),
    (GPT55, {"stop_sequences": ["a"]}, False), ("chatgpt-4o-latest", {}, False)]


@pytest.mark.parametrize("model, params, is_suited", SUITED)
def test_reasoning_models_are_asked_in_responses(model: str, params: JSON,
                                                 is_suited: bool) -> None:
    chat = understood("messages", params, Losses())
    caps = gateway.find_caps(gateway.KINDS["openai"], model)
    assert gateway.DIALECTS["responses"].suits(chat, caps) is is_suited


def test_what_only_chat_completions_has_is_asked_there() -> None:
    caps = gateway.find_caps(gateway.KINDS["openai"], GPT5)
    for more in (config(seed=1), config(frequencyPenalty=1), config(presencePenalty=1)):
        chat = understood("gemini", more, Losses())
        assert not gateway.DIALECTS["responses"].suits(chat, caps)


# ---- what models of other vendors take ----

LOW_HIGH = ("low", "medium", "high")
CAPS_HELD = ("sampling", "thinking", "efforts", "default_effort", "chat_tools", "max_stops",
             "max_tokens_field")
OLD_GPT = ("both", "none", (), "none", "yes", 4, "max_completion_tokens")
O_SERIES = ("none", "effort", LOW_HIGH, "medium", "yes")
GPT_5 = ("none", "effort", ("minimal", *LOW_HIGH), "medium", "yes", 4, "max_completion_tokens")
UP_TO_XHIGH = ("none", *LOW_HIGH, "xhigh")
LATEST_GPT = ("idle", "effort", (*UP_TO_XHIGH, "max"), "medium", "idle", 4,
              "max_completion_tokens")
MORE_MODELS: list[tuple[str, str, tuple[Any, ...]]] = [  # kind, name, what it takes
    *[("openai", name, OLD_GPT) for name in (
        "gpt-3.5-turbo", "gpt-4o-2024-08-06", "gpt-4.1-mini", "chatgpt-4o-latest",
        "ft:gpt-4o-mini-2024-07-18:acme::x")],
    *[("openai", name, (*O_SERIES, stops, "max_completion_tokens"))
      for name, stops in [("o1", 4), ("o1-2024-12-17", 4), ("o3", 0), ("o3-mini", 4),
                          ("o4-mini-2025-04-16", 0)]],
    *[("openai", name, GPT_5) for name in ("gpt-5", "gpt-5-mini", "gpt-5-2025-08-07")],
    ("openai", "gpt-5.1", ("idle", "effort", ("none", *LOW_HIGH), "none", "yes", *GPT_5[5:])),
    ("openai", "gpt-5.2-codex", ("idle", "effort", UP_TO_XHIGH, "none", "yes", *GPT_5[5:])),
    ("openai", "gpt-5.4", ("idle", "effort", UP_TO_XHIGH, "none", "idle", *GPT_5[5:])),
    *[("openai", name, ("idle", "effort", UP_TO_XHIGH, "medium", "idle", *GPT_5[5:]))
      for name in ("gpt-5.5", "gpt-5.6")],
    *[("openai", name, LATEST_GPT) for name in ("gpt-6", "gpt-6.1-mini")],
    ("azure", "gpt-5", GPT_5), ("openrouter", "openai/o3", (*O_SERIES, 0, GPT_5[-1])),
    ("openai-compatible", "gpt-oss-120b", ("both", "none", (), "none", "yes", 4, "max_tokens")),
    *[("gemini", name, ("both", kind, efforts, "none", "yes", 5, "max_tokens"))
      for name, kind, efforts in [
        ("gemini-2.0-flash", "none", ()), ("gemini-2.5-flash", "budget", ()),
        ("gemini-2.5-flash-lite", "budget", ()), ("gemini-2.5-pro", "budget", ()),
        ("gemini-3-pro-preview", "level", LOW_HIGH), ("gemini-3.6-pro", "level", LOW_HIGH),
        ("gemini-3-flash-preview", "level", ("minimal", *LOW_HIGH)),
        ("gemini-3.6-flash", "level", ("minimal", *LOW_HIGH)),
        ("gemini-3.7-flash", "level", LOW_HIGH), ("gemini-4-pro", "level", LOW_HIGH),
        ("gemini-flash-latest", "level", LOW_HIGH), ("gemini-pro-latest", "level", LOW_HIGH)]],
]


@pytest.mark.parametrize("kind, name, held", MORE_MODELS, ids=[row[1] for row in MORE_MODELS])
def test_what_another_vendors_model_takes(kind: str, name: str, held: tuple[Any, ...]) -> None:
    caps = gateway.find_caps(gateway.KINDS[kind], name)
    assert tuple(getattr(caps, each) for each in CAPS_HELD) == held


@pytest.mark.parametrize("kind, kept, lost", [
    ("vllm", 40, {}), ("llamacpp", 40, {}), ("ollama", None, {"top_k": False}),
    ("openai-compatible", None, {"top_k": False})])
def test_local_servers_get_what_they_take(kind: str, kept: int | None, lost: Any) -> None:
    caps, losses = gateway.find_caps(gateway.KINDS[kind], "llama-4"), Losses()
    asked = Chat("m", [Turn("user", [Text(text="a")])], top_k=40,
                 stop=["a"] * (4 if kind == "openai-compatible" else 9))
    wire, _ = CHAT.render_request(asked, Target("llama-4", caps), losses)
    assert (wire.get("top_k"), losses.names) == (kept, lost)
    assert wire["stop"] == asked.stop


@pytest.mark.parametrize("name, can", [
    ("gemini-2.5-flash", True), ("gemini-2.5-pro", False), ("gemini-3-flash", False),
    ("gemini-flash-latest", False)])
def test_some_geminis_can_be_kept_from_thinking(name: str, can: bool) -> None:
    assert gateway.find_caps(gateway.KINDS["gemini"], name).can_disable_thinking is can


MORE_ROWS = [
    ("messages", "responses", GPT52, [
        ("0.2 R max_tokens raised to 16", {"max_tokens": 7}, {"max_output_tokens": 16},
         "max_tokens")]),
    ("messages", "chat", PLAIN, [
        ("6.2 is_error", history(spoken("assistant", [use("c")]), user([
            {**result("c", "no"), "is_error": True}])),
         {"messages": [user("Hi"), asked(call("c")), answer("c", "Error: no")]}, "")]),
    ("chat", "gemini", NEW, [
        ("1.9 detail", asking(image(PNG, detail="low")), {"contents": [turn(PNG_PART)]},
         "(detail)")]),
    ("responses", "chat", PLAIN, [
        ("0.2 H include_obfuscation", {"stream": True, "stream_options": {
            "include_obfuscation": True}}, {}, "(include_obfuscation)"),
    ]),
]


@pytest.mark.parametrize("client, wire, model, row", [
    pytest.param(client, wire, model, row, id=f"{row[0]} ({client} to {wire})")
    for client, wire, model, rows in MORE_ROWS for row in rows])
def test_a_row_of_several_tables(client: str, wire: str, model: str, row: Any) -> None:
    check(client, wire, model, row)


@pytest.mark.parametrize("client, issuer", [
    (client, issuer) for client, issuer, shows in CARRIERS if client != "gemini" and shows])
def test_no_thought_of_anothers_is_passed(client: str, issuer: str) -> None:
    """0.1, 1.7, 6.3: after a switch to the client dialect's own vendor, where bytes pass."""
    for body in seen(issuer, client, SIGNED[issuer][0]):
        told = echo(client, body)[gateway.DIALECTS[client].history]
        assert "Hm" not in json.dumps(gateway.without_marks(told))


def test_a_refusal_is_seen_behind_a_text() -> None:
    """11: refusal -> a refusal part, or incomplete/content_filter."""
    for body in seen("messages", "responses", message(text("abc"), stop="refusal")):
        assert body["status"] == "incomplete" or "refusal" in json.dumps(body["output"])


def test_a_cancelled_response_is_an_error() -> None:
    """11: failed / cancelled -> error."""
    with pytest.raises(GatewayError):
        gateway.DIALECTS["responses"].parse_reply(
            responded(spoke("abc"), status="cancelled"), Rewrites())


# ---- streams whose events are out of order, or tell only the end ----


def added(index: int, item: JSON) -> JSON:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def done(index: int, item: JSON) -> JSON:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def moved(name: str, index: int, **more: Any) -> JSON:
    return {"type": f"response.{name}", "output_index": index, **more}


def block_at(index: int, block: JSON) -> JSON:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta_at(index: int, kind: str, **more: Any) -> JSON:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}


BEGUN = {"type": "response.created", "response": {"id": "resp_1", "model": "m"}}
COMPLETED = {"type": "response.completed", "response": {"output": []}}
MESSAGE_ENDS = [{"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {}},
                {"type": "message_stop"}]
SPOKEN_ITEM = typed("message", content=[typed("output_text", text="hi")])
ODD_STREAMS: list[tuple[str, str, list[JSON], list[Block], str]] = [
    ("calls that interleave", "responses", [
        BEGUN, added(0, fcall("a", "delete", "")), added(1, fcall("b", "list", "")),
        moved("function_call_arguments.delta", 1, delta='{"n":'),
        moved("function_call_arguments.delta", 0, delta='{"path":"/x"}'),
        moved("function_call_arguments.delta", 1, delta="1}"), done(0, fcall("a", "delete")),
        done(1, fcall("b", "list")), COMPLETED],
     [ToolCall(id="a", name="delete", arguments={"path": "/x"}),
      ToolCall(id="b", name="list", arguments={"n": 1})], "tool_calls"),
    ("a call whose end is not told", "responses", [
        BEGUN, added(0, fcall("a", "f", "")), added(1, fcall("b", "g", "")),
        moved("function_call_arguments.delta", 1, delta='{"n":1}'), COMPLETED],
     [ToolCall(id="a", name="f"), ToolCall(id="b", name="g", arguments={"n": 1})], "tool_calls"),
    ("only what is done", "responses", [
        BEGUN, done(0, typed("reasoning", id="rs_1", summary=[], encrypted_content="e")),
        done(1, SPOKEN_ITEM), done(2, fcall("a", "f", '{"n":1}')), COMPLETED],
     [Thinking(signature="rs_1:e", issuer="openai"), Text(text="hi"),
      ToolCall(id="a", name="f", arguments={"n": 1})], "tool_calls"),
    ("a told item, then one that is only done", "responses", [
        BEGUN, added(0, fcall("a", "f", "")),
        moved("function_call_arguments.delta", 0, delta='{"n":1}'),
        done(0, fcall("a", "f", '{"n":1}')), done(1, SPOKEN_ITEM), COMPLETED],
     [ToolCall(id="a", name="f", arguments={"n": 1}), Text(text="hi")], "tool_calls"),
    ("only the end", "responses", [BEGUN, {"type": "response.completed", "response": {
        "output": [SPOKEN_ITEM]}}], [Text(text="hi")], "stop"),
    ("parts that are only done", "responses", [
        BEGUN, added(0, typed("message", content=[])), moved(
            "content_part.added", 0, part=typed("output_text", text="")),
        moved("output_text.done", 0, text="hi"), done(0, SPOKEN_ITEM),
        added(1, fcall("a", "f", "")), moved("function_call_arguments.done", 1,
                                             arguments='{"n":1}'), COMPLETED],
     [Text(text="hi"), ToolCall(id="a", name="f", arguments={"n": 1})], "tool_calls"),
    ("calls that interleave", "messages", [
        {"type": "message_start", "message": {"id": "1", "usage": {}}},
        block_at(0, typed("text", text="")), delta_at(0, "text_delta", text="a"),
        block_at(1, use("c")), delta_at(1, "input_json_delta", partial_json='{"n":1}'),
        block_at(2, typed("server_tool_use", id="s", name="web_search", input={})),
        delta_at(0, "text_delta", text="b"), {"type": "content_block_stop", "index": 1},
        delta_at(2, "input_json_delta", partial_json='{"query":"q"}'),
        {"type": "content_block_stop", "index": 0}, *MESSAGE_ENDS],
     [Text(text="ab"), ToolCall(id="c", name="f", arguments={"n": 1}), gateway.Search(query="q")],
     "tool_calls"),
]


@pytest.mark.parametrize("name, events, blocks, finish", [
    pytest.param(*row[1:], id=f"{row[1]}: {row[0]}") for row in ODD_STREAMS])
def test_every_item_is_told_whole_and_in_turn(
        name: str, events: list[JSON], blocks: list[Block], finish: str) -> None:
    stream = wire_events(events)
    for chunks_ in ([stream], [stream[at:at + 1] for at in range(len(stream))]):
        found = gateway.collect(chat_parsed(name, chunks_))
        assert (found.blocks, found.finish) == (blocks, finish)


@pytest.mark.parametrize("name, opening, more", [
    ("responses", [BEGUN, added(0, fcall("a", "f", "")), added(1, fcall("b", "g", ""))],
     lambda text: moved("function_call_arguments.delta", 1, delta=text)),
    ("messages", [block_at(0, use("a")), block_at(1, use("b"))],
     lambda text: delta_at(1, "input_json_delta", partial_json=text)),
    ("chat", [{"choices": [{"delta": {"tool_calls": [
        {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]}}]}],
     lambda text: {"choices": [{"delta": {"content": text}}]})])
def test_what_waits_for_its_turn_is_bounded(
        name: str, opening: list[JSON], more: Callable[[str], JSON]) -> None:
    parser = gateway.DIALECTS[name].parser(Rewrites())
    opened = [gateway.sse(gateway.dump_json(each)) for each in opening]
    piece = gateway.sse(gateway.dump_json(more("x" * (1 << 20))))
    with pytest.raises(GatewayError, match="too much at once") as caught:
        for block in [*opened, *[piece] * 17]:
            list(parser.feed(block))
    assert caught.value.status == 502


@pytest.mark.parametrize("name, said", [
    ("chat", b"data: [DONE]\n\n"), ("messages", wire_events([{"type": "message_stop"}])),
    ("responses", wire_events([{"type": "response.completed", "response": {}}]))])
def test_a_stream_that_says_nothing_is_none(name: str, said: bytes) -> None:
    with pytest.raises(GatewayError, match="says nothing") as caught:
        chat_parsed(name, [said])
    assert caught.value.status == 502


def test_a_bare_signature_of_geminis_is_kept() -> None:
    events = chat_parsed("gemini", [gateway.sse(gateway.dump_json(
        generated("abc", {"thoughtSignature": "c2ln"})))])
    assert [event.signature for event in events if isinstance(event, SignatureDelta)] == ["c2ln"]


def test_geminis_usage_need_not_be_in_its_last_chunk() -> None:
    used = {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5}}
    said_ = {"candidates": [{"content": {"parts": [{"text": "a"}], "role": "model"}, "index": 0}]}
    pieces = [gateway.sse(gateway.dump_json(chunk)) for chunk in (
        said_, *[{**said_, **used}] * 4, {"candidates": [{"finishReason": "STOP"}]})]
    assert chat_parsed("gemini", [b"".join(pieces)])[-1].usage == Usage(10, 5)


@pytest.mark.parametrize("kind, place", [
    ("reasoning_summary_text", "summary_index"), ("reasoning_text", "content_index")])
def test_the_parts_of_a_thought_are_kept_apart(kind: str, place: str) -> None:
    key = {"summary_index": "summary", "content_index": "content"}[place]
    item = typed("reasoning", id="rs_1", **{key: [
        typed(kind.removeprefix("reasoning_"), text="a"),
        typed(kind.removeprefix("reasoning_"), text="b")]})
    parts = [{"type": "response.reasoning_summary_part.added", "output_index": 0, place: i}
             for i in range(2)]
    deltas = [moved(f"{kind}.delta", 0, **{place: i}, delta=each) for i, each in enumerate("ab")]
    for told in ([*parts, *deltas], [parts[0], deltas[0], parts[1], deltas[1]], parts, []):
        events = chat_parsed("responses", [wire_events([
            BEGUN, added(0, {**item, key: []}), *told, done(0, item),
            {"type": "response.completed", "response": {"output": [item]}}])])
        assert gateway.collect(events).blocks[0].text == "a\n\nb", told


def test_ids_of_custom_calls_come_again_for_functions() -> None:
    """As some servers count them, anew in each answer."""
    freeform = {"id": "c", "type": "custom", "custom": {"name": "x", "input": "i"}}
    messages = [user("Hi"), asked(freeform), answer("c"), asked(call("c")), answer("c")]
    sent, _, _ = carry("chat", "responses", {"messages": messages, "tools": [F]}, GPT52)
    assert [item["type"] for item in sent["input"] if "type" in item] == [
        "custom_tool_call", "custom_tool_call_output", "function_call", "function_call_output"]


def test_an_envelope_of_nobodys_is_a_broken_one() -> None:
    forged = "gw1.WyIiLCJzIiwidCIsIiIsIiJd"  # ["","s","t","",""]
    body = {"model": "m", "max_tokens": 9, "messages": [user("a"), spoken("assistant", [
        {"type": "thinking", "thinking": "t", "signature": forged}, text("b")]), user("c")]}
    for name in TRANSLATED:
        chat = gateway.DIALECTS["messages"].parse_request(body, Losses())
        wire, _ = gateway.DIALECTS[name].render_request(chat, Target("m", CAPS_OF[name]), Losses())
        assert forged not in json.dumps(wire)
    placed = "gw1." + base64.b64encode(b'["","s","t","call_9",""]').decode()
    assert gateway.unseal(Thinking(text="t"), placed, "anthropic") == Thinking(text="t")
    assert gateway.unseal(Thinking(text="t"), placed, "anthropic").before == ""


def test_thoughts_that_come_late_stand_before_the_texts_before_them() -> None:
    a, b, late, own = Text(text="a"), Text(text="b"), Thinking("x", "s", "anthropic"), Thinking(
        "y", "s", "gemini")
    call = ToolCall(id="c", name="f")
    assert gateway.in_order([a, b, late, late]) == [late, late, a, b]
    assert gateway.in_order([a, call, b, late, own, a]) == [a, call, late, b, own, a]
    assert gateway.in_order([a, late, b]) == [a, late, b]


def test_the_only_part_of_an_all_of_is_taken_in() -> None:
    a, b = {"a": {"type": "string"}}, {"b": {"type": "integer"}}
    schema = {"type": "object", "properties": a, "required": ["a"], "$defs": {"A": {}},
              "definitions": {"B": {}}, "allOf": [
                  {"type": "string", "properties": b, "required": ["b", "a"], "title": "T"}]}
    assert gateway.gemini_schema(schema) == {
        "type": "object", "properties": {**a, **b}, "required": ["a", "b"], "title": "T",
        "$defs": {"A": {}, "B": {}}, "description": '(type: "string")'}


def rendered(kind: str, model: str, wire: JSON, client: str = "messages") -> tuple[JSON, JSON]:
    """What a provider of a kind is asked in Chat Completions, and the losses."""
    losses = Losses()
    chat = gateway.DIALECTS[client].parse_request({"model": "m", **wire}, losses)
    target = Target(model, gateway.find_caps(gateway.KINDS[kind], model))
    return CHAT.render_request(chat, target, losses)[0], losses.names


UNSIGNED = {"type": "thinking", "thinking": "I must", "signature": ""}


@pytest.mark.parametrize("kind, told", [("deepseek", "I must"), ("vllm", None)])
def test_a_model_that_needs_its_thoughts_gets_them_back(kind: str, told: str | None) -> None:
    wire, losses = rendered(kind, "deepseek-v4", {"max_tokens": 9, "messages": [
        user("q"), spoken("assistant", [UNSIGNED, use("c")]), user([result("c")]),
        spoken("assistant", "A"), user("r")]})
    thoughts = [message.get("reasoning_content") for message in wire["messages"]]
    assert thoughts == [None, told, None, told and "", None]
    assert losses == ({} if told else {"thinking": True})


@pytest.mark.parametrize("id_", ["toolu_01AbC", "call_1", "D681PevKs_a95c35cc", "a", "abc-12345"])
def test_ids_of_calls_are_made_short_in_pairs(id_: str) -> None:
    body = {"max_tokens": 9, "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "metadata": {"user_id": "u"}, "messages": [
                user("q"), spoken("assistant", [use(id_), use("D681PevKs")]),
                user([result(id_), result("D681PevKs")])]}
    wire, _ = rendered("mistral", "mistral-large-latest", body)
    called = [call["id"] for call in wire["messages"][1]["tool_calls"]]
    assert called == [message["tool_call_id"] for message in wire["messages"][2:]]
    assert called[1] == "D681PevKs" and re.fullmatch("[A-Za-z0-9]{9}", called[0])
    edits = gateway.make_edits(gateway.Provider(kind="mistral"), gateway.NO_ALIAS)
    edits.apply(wire, Losses())
    assert "user" not in wire and "stream_options" not in wire


def test_a_compaction_is_the_text_of_all_before_it() -> None:
    wire, losses = rendered("openai", "gpt-4.1", {"max_tokens": 9, "messages": [
        user("q"), spoken("assistant", [typed("compaction", content="ALL")]), user("r"),
        spoken("assistant", [typed("compaction", content=None), text("s")]), user("t")]})
    assert [message["content"] for message in wire["messages"]] == ["q", "ALL", "r", "s", "t"]
    assert losses == {}


@pytest.mark.parametrize("content, said_, lost", [
    ("a", "a", {}), ([text("a"), text("b")], "a\nb", {}),
    ([text("a"), typed("image", source={"type": "url", "url": "https://a/b"})], "a",
     {"source": False})])
def test_a_document_may_be_made_of_content(content: Any, said_: str, lost: JSON) -> None:
    wire, losses = rendered("openai", "gpt-4.1", {"max_tokens": 9, "messages": [user([
        typed("document", title="T.txt", source={"type": "content", "content": content})])]})
    assert said_ in wire["messages"][0]["content"] and losses == lost


@pytest.mark.parametrize("model, thinking", [
    ("gpt-daybreak-blue-latest", "effort"), ("gpt-oss-120b", "none"), ("gpt-35-turbo", "none"),
    ("gpt-realtime", "none"), ("gpt-audio-1.5", "none"), ("gpt-image-1", "none"),
    ("gpt-3.5-turbo", "none"), ("gpt-4o", "none"), ("gpt-5.6-sol", "effort")])
def test_a_gpt_without_a_version_is_the_newest(model: str, thinking: str) -> None:
    assert gateway.find_caps(gateway.KINDS["openai"], model).thinking == thinking


@pytest.mark.parametrize("finish", sorted(gateway.GEMINI_BROKEN))
def test_a_broken_answer_of_thoughts_alone_is_an_error(finish: str) -> None:
    thought = {"text": "Hm", "thought": True}
    with pytest.raises(GatewayError, match=finish):
        gateway.DIALECTS["gemini"].parse_reply(generated(thought, finish=finish), Rewrites())
    found = gateway.DIALECTS["gemini"].parse_reply(generated("a", finish=finish), Rewrites())
    assert found.blocks == [Text(text="a")]


@pytest.mark.parametrize("name, wire, status, words", [
    ("messages", {"type": "error", "error": {"type": "overloaded_error", "message": "Full"}}, 503,
     "Full"),
    ("responses", {"error": {"code": "rate_limit_exceeded", "message": "Slow"}}, 429, "Slow"),
    ("messages", {"type": "message"}, 502, "no content"), ("responses", {}, 502, "no output")])
def test_an_error_in_place_of_an_answer_is_told(
        name: str, wire: JSON, status: int, words: str) -> None:
    with pytest.raises(GatewayError, match=words) as caught:
        gateway.DIALECTS[name].parse_reply(wire, Rewrites())
    assert caught.value.status == status


@pytest.mark.parametrize("name, wire", [
    ("messages", {"content": [{"type": "tool_use", "name": "f"}, {"type": "tool_use", "name": "f"}],
                  "stop_reason": "tool_use"}),
    ("responses", {"output": [typed("function_call", name="f"), typed("function_call", name="f")]}),
    ("chat", {"choices": [{"message": {"tool_calls": [
        {"function": {"name": "f"}}, {"function": {"name": "f"}}]}}]})])
def test_ids_that_are_missing_are_made(name: str, wire: JSON) -> None:
    rewrites = Rewrites()
    rewrites.answer_id = "gw-12-000001"
    found = gateway.DIALECTS[name].parse_reply(wire, rewrites)
    ids = [call_.id for call_ in found.blocks if isinstance(call_, ToolCall)]
    assert found.id == "gw-12-000001" and len({*ids}) == 2
    assert all("gw-12-000001" in id_ for id_ in ids)


@pytest.mark.parametrize("wire, client", [("chat", "responses"), ("responses", "chat")])
def test_arguments_that_were_cut_off_are_told_as_they_came(wire: str, client: str) -> None:
    cut_off = '{"path":"/tmp/x","con'
    if wire == "chat":
        told: JSON = {"choices": [{"message": {"tool_calls": [called("c", cut_off)]},
                                   "finish_reason": "length"}]}
    else:
        told = responded(fcall("c", arguments=cut_off), status="incomplete",
                         incomplete_details={"reason": "max_output_tokens"})
    found = gateway.DIALECTS[wire].parse_reply(told, Rewrites())
    body = gateway.DIALECTS[client].render_reply(found, Chat("m", []), 7)
    assert json.dumps(cut_off)[1:-1] in json.dumps(body)


def test_an_empty_object_is_an_answer_too() -> None:
    rewrites = Rewrites()
    rewrites.json_tool = "json_answer"
    whole = message(use("c", "json_answer"), stop="tool_use")
    assert as_chat(whole, rewrites)["choices"][0]["message"]["content"] == "{}"
    chunks_ = as_chunks(wire_events(message_events(whole)), rewrites)
    assert merge(chunks_)["content"] == "{}"


@pytest.mark.parametrize("url", ["data:image/svg+xml,<svg/>", "DATA:image/png,x"])
def test_a_data_uri_that_is_not_base64_is_refused(url: str) -> None:
    with pytest.raises(GatewayError, match="base64") as caught:
        understood("chat", {"messages": [user([typed("image_url", image_url={"url": url})])]},
                   Losses())
    assert caught.value.status == 400
    jpg = "data:image/jpg;base64,aGk="
    chat_ = understood("chat", {"messages": [
        user([typed("image_url", image_url={"url": jpg})])]}, Losses())
    assert chat_.turns[0].blocks == [Image(media_type="image/jpeg", data="aGk=")]


def test_a_block_behind_the_usage_is_seen() -> None:
    chunk = {"candidates": [{"content": turn("a", role="model"), "index": 0}]}
    blocked = {**chunk, "usageMetadata": {}, "promptFeedback": {"blockReason": "SAFETY"}}
    stream = b"".join(event(each) for each in (chunk, blocked))
    assert gateway.collect(chat_parsed("gemini", [stream])).finish == "filter"


def test_deprecated_functions_are_called_one_at_a_time() -> None:
    sent, losses, _ = carry("chat", "responses", {"functions": [{"name": "f"}]}, GPT52)
    assert sent["parallel_tool_calls"] is False and not losses


def test_compactions_are_billed() -> None:
    steps = [{"type": "compaction", "input_tokens": 100, "output_tokens": 50},
             {"type": "message", "input_tokens": 1, "output_tokens": 2}]
    told = {"input_tokens": 1, "output_tokens": 2, "iterations": steps}
    assert gateway.DIALECTS["messages"].parse_usage(told) == Usage(101, 52)


# ---- Chat Completions streams, as servers send them ----


def chat_stream(*deltas: Any, finish: Any = "stop", **last: Any) -> bytes:
    chunks = [{"id": "chatcmpl-1", "model": "m", "choices": [{"index": 0, "delta": delta}]}
              for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": finish}], **last})
    return b"".join(gateway.sse(gateway.dump_json(each)) for each in chunks) + b"data: [DONE]\n\n"


def part(index: Any, arguments: str, id_: Any = None, name: Any = None) -> JSON:
    return {"index": index, "id": id_, "function": {"name": name, "arguments": arguments}}


def calls(*parts: JSON, **more: Any) -> JSON:
    return {"tool_calls": list(parts), **more}


def made(id_: str, **arguments: Any) -> ToolCall:
    return ToolCall(id=id_, name="f", arguments=arguments)


# 8.5: what servers send, the blocks that it spells, the finish.
CHAT_ODD: dict[str, tuple[bytes, list[Block], str]] = {
    "interleaved": (chat_stream(
        calls(part(0, "", "a", "f")), calls(part(1, '{"x"', "b", "f")), calls(part(0, '{"x":')),
        calls(part(1, ":2}")), calls(part(0, "1}")), finish="tool_calls"),
        [made("a", x=1), made("b", x=2)], "tool_calls"),
    "whole in one delta": (chat_stream(
        calls(part(0, '{"x":1}', "a", "f"), part(1, "", "b", "f")), finish="tool_calls"),
        [made("a", x=1), made("b")], "tool_calls"),
    "no index": (chat_stream(
        calls(part(None, '{"x":1', "a", "f")), calls(part(None, "}")),
        calls(part(None, "{}", "b", "f")), finish="tool_calls"),
        [made("a", x=1), made("b")], "tool_calls"),
    "index 0 for each": (chat_stream(
        calls(part(0, '{"x":1}', "a", "f")), calls(part(0, '{"x":2}', "b", "f"))),
        [made("a", x=1), made("b", x=2)], "tool_calls"),
    "finish stop": (chat_stream(calls(part(0, "{}", "a", "f"))), [made("a")], "tool_calls"),
    "no ids": (chat_stream(calls(part(0, "{}", None, "f")), calls(part(1, "{}", "", "f"))),
               [made("call_chatcmpl-1_0"), made("call_chatcmpl-1_1")], "tool_calls"),
    "reasoning with content": (
        chat_stream({"reasoning_content": "R", "content": "C"}, {"content": "D"}),
        [Thinking(text="R"), Text(text="CD")], "stop"),
    "reasoning": (chat_stream({"reasoning": "R"}, {"reasoning": "S"}),
                  [Thinking(text="RS")], "stop"),
    "text after a call": (
        chat_stream(calls(part(0, '{"x"', "a", "f")), {"content": "C"}, calls(part(0, ":1}")),
                    {"content": "D"}),
        [made("a", x=1), Text(text="CD")], "tool_calls"),
    "refusal": (chat_stream({"content": ""}, {"refusal": "No"}),
                [Text(text="No", is_refusal=True)], "refusal"),
    "filter": (chat_stream({"content": "a"}, finish="content_filter"), [Text(text="a")], "filter"),
    "finish unknown": (chat_stream({"content": "a"}, finish="eos"), [Text(text="a")], "stop"),
    "finish null": (chat_stream({"content": "a"}, finish=None), [Text(text="a")], "length"),
    "finish null with a call": (
        chat_stream(calls(part(0, "{}", "a", "f")), finish=None), [made("a")], "tool_calls"),
    "a call in both ways": (chat_stream(*(
        {"function_call": {"name": name, "arguments": piece}, **calls(part(0, piece, "a", name))}
        for name, piece in (("f", "{"), ("f", "}")))), [made("a")], "tool_calls"),
    "length with a call": (chat_stream(calls(part(0, "{}", "a", "f")), finish="length"),
                           [made("a")], "length"),
    "nulls and more": (
        chat_stream({"content": None, "tool_calls": None, "refusal": None},
                    {"content": "a", "x": 1}, [], None) + b"data: {}\n\n",
        [Text(text="a")], "stop"),
}


@pytest.mark.parametrize("name", CHAT_ODD)
def test_a_chat_stream_is_read_however_its_server_writes(name: str) -> None:
    stream, blocks, finish = CHAT_ODD[name]
    reply = gateway.collect(chat_parsed("chat", [stream]))
    assert (reply.blocks, reply.finish) == (blocks, finish)


def test_a_live_call_streams_and_usage_may_come_with_the_finish() -> None:
    stream = chat_stream(calls(part(0, "", "a", "f")), calls(part(0, '{"x":')),
                         calls(part(0, "1}")), usage={"prompt_tokens": 5, "completion_tokens": 2})
    events = chat_parsed("chat", [stream])
    assert [event for event in events if isinstance(event, ArgumentsDelta)] == [
        ArgumentsDelta('{"x":'), ArgumentsDelta("1}")]
    assert events[-1] == Finish("tool_calls", Usage(5, 2))
    with pytest.raises(GatewayError):
        chat_parsed("chat", [chat_stream({"content": "a"}, finish="error")])
    with pytest.raises(GatewayError, match="Slow down") as caught:
        chat_parsed("chat", [b'data: {"error":{"message":"Slow down","code":429}}\n\n'])
    assert caught.value.status == 429


def test_a_custom_call_becomes_one_of_messages() -> None:
    said_ = 'l"s\u2028\n'
    blocks: list[Block] = [ToolCall(id="c", name="sh", is_custom=True, input=said_)]
    reply = Reply("1", "m", blocks, "tool_calls", Usage())
    dialect, rng = gateway.DIALECTS["messages"], random.Random(1)
    renderer = dialect.renderer(Chat("m", []), 7)
    stream = b"".join(renderer.feed(event) for event in spell(reply, rng))
    wrapped = [ToolCall(id="c", name="sh", arguments={"input": said_})]
    assert gateway.collect(chat_parsed("messages", [stream])).blocks == wrapped
    body = dialect.render_reply(reply, Chat("m", []), 7)
    assert dialect.parse_reply(body, Rewrites()).blocks == wrapped
    assert body["stop_reason"] == "tool_use"


def chat_piece(**told: Any) -> bytes:
    return event({"id": "1", "choices": [{"index": 0, "delta": told}]})


NAME, REST = {"name": "f", "arguments": '{"x":'}, {"arguments": "1}"}


@pytest.mark.parametrize("pieces", [
    [{"id": "a", "type": "function"}, {"function": NAME}, {"function": REST}],
    [{"id": "a", "function": {"name": "", "arguments": '{"x":'}},
     {"function": {"name": "f", "arguments": "1}"}}],
    [{"function": {"arguments": '{"x":'}}, {"id": "a", "function": {"name": "f"}},
     {"function": REST}]])
def test_a_name_may_come_after_its_call_began(pieces: list[JSON]) -> None:
    stream = [chat_piece(tool_calls=[{"index": 0, **piece}]) for piece in pieces]
    told = gateway.collect(chat_parsed("chat", [*stream, event(b"[DONE]")]))
    assert told.blocks == [ToolCall(id="a", name="f", arguments={"x": 1})]


def test_a_call_that_never_gets_a_name_is_an_error() -> None:
    with pytest.raises(GatewayError, match="without its name"):
        chat_parsed("chat", [chat_piece(tool_calls=[{"index": 0, "id": "a"}]), event(b"[DONE]")])
    assert not gateway.collect(chat_parsed(
        "chat", [chat_piece(tool_calls=[{"index": 0}]), event(b"[DONE]")])).blocks


def test_calls_of_one_answer_are_each_their_own_whatever_their_ids() -> None:
    told = CHAT.parse_reply(completion("tool_calls", tool_calls=[
        call("c", "f", ""), call("c", "g", '{"x":1}')]), Rewrites())
    assert [(block.name, block.arguments) for block in told.blocks
            if isinstance(block, ToolCall)] == [("f", {}), ("g", {"x": 1})]


@pytest.mark.parametrize("wire", ["chat", "responses", "gemini"])
def test_an_id_that_the_conversation_has_already_is_made_another(wire: str) -> None:
    """Some servers count anew in each answer, and Messages' clients take an id for one call."""
    conversation = history(spoken("assistant", [use("c")]), user([result("c")]), tools=[F_USE])
    _, _, rewrites = carry("messages", wire, conversation, {
        "chat": PLAIN, "responses": GPT5, "gemini": NEW}[wire])
    for _ in range(2):
        told = gateway.DIALECTS[wire].parse_reply(ANSWER_CALLING[wire]("f"), rewrites)
        (id_,) = (block.id for block in told.blocks if isinstance(block, ToolCall))
        assert id_ != "c" and id_.startswith("c_")


def test_many_calls_of_one_id_stay_short_and_apart() -> None:
    told = CHAT.parse_reply(completion("tool_calls", tool_calls=[call("c")] * 50), Rewrites())
    ids = [block.id for block in told.blocks if isinstance(block, ToolCall)]
    assert len(set(ids)) == 50 and max(map(len, ids)) == len("c_12345678")


def test_a_deprecated_call_beside_others_is_its_own() -> None:
    told = CHAT.parse_reply(completion(
        "tool_calls", tool_calls=[call("c", "f", '{"a":1}')],
        function_call={"name": "g", "arguments": '{"b":1}'}), Rewrites())
    assert [block.arguments for block in told.blocks if isinstance(block, ToolCall)] == [
        {"a": 1}, {"b": 1}]


def test_an_id_that_is_repeated_with_each_piece_is_one_call() -> None:
    rewrites = Rewrites()
    rewrites.call_ids.add("c")
    parser = CHAT.parser(rewrites)
    pieces = [chat_piece(tool_calls=[{"index": 0, "id": "c", "function": {
        "name": "f", "arguments": said_}}]) for said_ in ('{"x":', "1", "}")]
    told = gateway.collect([each for piece in [*pieces, event(b"[DONE]")]
                            for each in parser.feed(piece)])
    (made_,) = told.blocks
    assert isinstance(made_, ToolCall) and made_.arguments == {"x": 1} and made_.id != "c"


@pytest.mark.parametrize("client", ["messages", "responses", "chat"])
@pytest.mark.parametrize("said_", [[], [{"content": "abc"}]])
def test_an_annotation_may_come_before_its_text(client: str, said_: list[JSON]) -> None:
    note = chat_piece(content="", annotations=[{"type": "url_citation", "url_citation": {
        "url": "https://a", "title": "A", "start_index": 0, "end_index": 1}}])
    parser = CHAT.parser(Rewrites())
    renderer = gateway.DIALECTS[client].renderer(Chat("m", []), 7)
    stream = [note, *(chat_piece(**each) for each in said_), event(b"[DONE]")]
    told = b"".join(renderer.feed(each) for piece in stream for each in parser.feed(piece))
    assert (b"https://a" in told) == bool(said_)
    assert parser.rewrites.lost == (set() if said_ else {"annotations"})


def test_a_mark_of_byte_order_hides_no_event() -> None:
    told = gateway.collect(chat_parsed(
        "chat", [b"\xef\xbb\xbf" + chat_piece(content="a"), event(b"[DONE]")]))
    assert told.blocks == [Text(text="a")]


@pytest.mark.parametrize("body, words, kind", [
    (b"over", "over", "overloaded_error"),
    (b'{"detail": [{"msg": "field required"}]}', "field required", "overloaded_error")])
def test_words_of_an_error_reach_another_dialects_client(
        gate_for: Any, body: bytes, words: str, kind: str) -> None:
    gate = gate_for(always(reply(body, status="529 Over")), provider={"kind": "anthropic"},
                    models={"house": {"provider": "openai", "model": "up"}})
    answer_ = gate.call(chat())
    assert (answer_.status, answer_.error["type"]) == (503, kind)
    assert words in answer_.error["message"]


@pytest.mark.parametrize("words", [
    "prompt is too long: 9 tokens", "The input token count (9) exceeds the maximum",
    "This model's maximum context length is 512 tokens. However, your prompt contains 513.",
    "request (1221 tokens) exceeds the available context size (256 tokens), try increasing it"])
def test_a_prompt_that_is_too_long_is_known_in_several_providers_words(words: str) -> None:
    error = CHAT.parse_error({"message": words, "type": "BadRequestError", "code": 400}, 400)
    assert error.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_is_told_the_usage_that_is_counted(gate_for: Any, stream: bool) -> None:
    """Where the provider tells none: agents make room by it."""
    told = streamed(chat_piece(content="abcdefgh"), event({
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), DONE)
    body = gateway.dump_json({**completion(content="abcdefgh"), "usage": None})
    gate = gate_for(always(told if stream else reply(body)), provider={"wire": "chat"})
    sent = gateway.dump_json({"model": "house", "max_tokens": 9, "messages": [user("Hi")],
                              "stream": stream})
    answer_ = gate.client().send(request(sent, path=MESSAGES)).answer().body
    usage = json.loads(answer_)["usage"] if not stream else next(
        each["usage"] for each in map(json.loads, re.findall(rb"data: (.*)", answer_))
        if each["type"] == "message_delta")
    line = gate.access()
    assert line["usage"] == "estimated" and int(line["prompt_tokens"]) == -(-len(sent) // 3)
    assert {name: str(usage[f"{name}_tokens"]) for name in ("input", "output")} == {
        "input": line["prompt_tokens"], "output": line["completion_tokens"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("client", ["messages", "gemini"])
def test_an_answer_that_cannot_be_read_is_paid_for(
        gate_for: Any, client: str, stream: bool) -> None:
    bad = {"id": "c", "function": {"name": "f", "arguments": "true"}}
    body = gateway.dump_json(completion("tool_calls", tool_calls=[bad]))
    told = streamed(chat_piece(tool_calls=[{"index": 0, **bad}]), event({
        "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}), DONE)
    gate = gate_for(always(told if stream else reply(body)), provider={"wire": "chat"})
    path = PATH_OF.get(client) or "/v1beta/models/house:generateContent"
    asked = asking(client) if stream else request(gateway.dump_json({
        "model": "house", "max_tokens": 9, "messages": [user("Hi")]} if client == "messages" else {
        "contents": [turn("Hi", role="user")]}), path=path)
    gate.client().send(asked).answer()
    line = gate.access()
    assert line["status"] == "502" and line["usage"] == ("estimated" if stream else "reported")


def test_what_sdks_key_on_in_an_error_is_told() -> None:
    """That threads are not kept, how long to wait, and that a prompt is too long."""
    told = {name: json.loads(gateway.DIALECTS[name].render_error(GatewayError(
        429, "Words.", code="context_length_exceeded", headers=[("retry-after", "7")]), "id"))
        for name in TRANSLATED}
    assert told["messages"]["error"]["message"] == "prompt is too long: Words."
    assert told["gemini"]["error"] == {
        "code": 429, "status": "RESOURCE_EXHAUSTED", "message":
        "The input token count exceeds the maximum number of tokens allowed: Words.",
        "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "7s"}]}
    assert told["chat"]["error"]["message"] == told["responses"]["error"]["message"] == "Words."
    with pytest.raises(GatewayError) as caught:
        gateway.DIALECTS["messages"].parse_request(
            {"model": "m", "max_tokens": 9, "thread": typed("create"), "messages": []}, Losses())
    error = json.loads(gateway.DIALECTS["messages"].render_error(caught.value, "id"))["error"]
    assert error["type"] == "invalid_request_error"
    assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": []}


def test_an_estimate_depends_on_no_cut() -> None:
    """What came before the first content is none, in whichever read it came."""
    events = [FIRST, delta("a" * 40), delta("b" * 40), delta("c" * 40)]
    counted = set()
    for cut in range(1, len(events)):
        watch = CHAT.watch(hide_usage=True, needs_done=True)
        for piece in (b"".join(events[:cut]), b"".join(events[cut:])):
            watch.feed(piece)
        counted.add(watch.content_bytes)
    assert counted == {120}


# ---- what models take ----

EFFORT = gateway.ALL_EFFORTS
# Name at the provider; sampling, thinking, may be disabled, efforts, forced tools, mid-conversation
# system, structured output, tokens.
MODELS: list[tuple[Any, ...]] = [
    ("claude-3-opus-20240229", "both", "none", False, (), "yes", False, False, 8192),
    ("claude-3-5-sonnet-20241022", "both", "none", False, (), "yes", False, False, 8192),
    ("claude-3-7-sonnet-20250219", "both", "budget", False, (), "yes", False, False, 64_000),
    ("claude-sonnet-4-20250514", "both", "budget", False, (), "yes", False, False, 64_000),
    ("claude-opus-4-20250514", "both", "budget", False, (), "yes", False, False, 32_000),
    ("claude-opus-4-1-20250805", "one", "budget", False, (), "yes", False, False, 32_000),
    ("claude-haiku-4-5-20251001", "one", "budget", False, (), "yes", False, True, 64_000),
    ("claude-sonnet-4-5", "one", "budget", False, (), "yes", False, True, 64_000),
    ("claude-opus-4-5", "one", "budget", False, EFFORT[:3], "yes", False, True, 64_000),
    ("claude-opus-4-6", "one", "both", False, (*EFFORT[:3], "max"), "yes", False, True, 128_000),
    ("claude-sonnet-4-6", "one", "both", False, (*EFFORT[:3], "max"), "yes", False, True, 128_000),
    ("claude-opus-4-7", "none", "adaptive", False, EFFORT, "yes", False, True, 128_000),
    ("claude-opus-4-8", "none", "adaptive", False, EFFORT, "yes", True, True, 128_000),
    ("claude-opus-5", "none", "adaptive", True, EFFORT, "yes", True, True, 128_000),
    ("claude-sonnet-5-20260601", "none", "adaptive", True, EFFORT, "yes", True, True, 128_000),
    ("claude-fable-5", "none", "adaptive", False, EFFORT, "yes", True, True, 128_000),
    ("claude-mythos-5", "none", "adaptive", False, EFFORT, "yes", True, True, 128_000),
    ("claude-haiku-5-5", "none", "adaptive", True, EFFORT, "yes", True, True, 128_000),
    ("claude-opus-5-5", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("claude-sonnet-5-5", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("claude-fable-5-1", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("claude-mythos-6", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("claude-opus-latest", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("claude-opus-9", "none", "adaptive", False, EFFORT, "refused", True, True, 128_000),
    ("eu.anthropic.claude-opus-5-5-20261001-v1:0", "none", "adaptive", False, EFFORT, "refused",
     True, True, 128_000),
    ("something-new", "none", "adaptive", False, EFFORT, "yes", True, True, 128_000),
]


@pytest.mark.parametrize("row", MODELS, ids=[row[0] for row in MODELS])
def test_what_a_model_takes_is_read_off_its_name(row: tuple[Any, ...]) -> None:
    assert gateway.find_caps(ANTHROPIC, row[0]) == Caps(*row[1:])


def test_a_model_of_no_known_family_takes_what_its_kind_says() -> None:
    compatible = gateway.KINDS["openai-compatible"]
    assert gateway.find_caps(compatible, "llama-4") == compatible.caps == Caps()


# ---- hostile input ----

BIG: dict[str, JSON] = {
    "chat": {
        "model": "m", "max_tokens": 99, "max_completion_tokens": 99, "temperature": 0.5,
        "top_p": 0.5, "top_k": 4, "stop": ["a"], "n": 1, "stream": True, "stream_options": {
            "include_usage": True, "include_obfuscation": False},
        "tools": [function("f", description="D", parameters=CHAT_SHAPE, strict=True), GRAMMAR,
                  {**F, "cache_control": MARK}],
        "functions": [{"name": "h", "parameters": CHAT_SHAPE}], "function_call": "auto",
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [F, {"type": "custom", "custom": {"name": "sh"}}]}},
        "parallel_tool_calls": False, **format_(OPEN, description="D", strict=True),
        "reasoning_effort": "low", "verbosity": "low", "prediction": {"type": "content"},
        "store": True, "metadata": {"a": "b"}, "seed": 1, "logit_bias": {"1": 1}, "user": "u",
        "frequency_penalty": 1, "presence_penalty": 1, "prompt_cache_key": "k",
        "prompt_cache_options": {"ttl": "30m"}, "prompt_cache_retention": "24h",
        "moderation": {"model": "x"}, "safety_identifier": "s", "logprobs": False,
        "top_logprobs": 0, "modalities": ["text"], "service_tier": "auto",
        "thinking": {"type": "adaptive"},
        "web_search_options": {"search_context_size": "low", "user_location": {
            "type": "approximate", "approximate": {"city": "Bern"}}},
        "messages": [
            {"role": "system", "content": [text("S", cache_control=MARK)]},
            {"role": "user", "name": "Ann", "cache_control": MARK, "content": [
                text("a", prompt_cache_breakpoint={"mode": "explicit", "ttl": "12h"}),
                image(PNG, detail="low"), file("data:text/plain;base64,aGk=", filename="a.txt"),
                file("data:application/pdf;base64," + PDF)]},
            asked(call("c"), {"id": "d", "type": "custom",
                              "custom": {"name": "sh", "input": "ls"}},
                  content=[text("T")], refusal="R", annotations=[], reasoning_content="Hm",
                  thinking_blocks=THOUGHTS, audio=None),
            answer("c"), answer("d", [text("ok")]),
            {"role": "assistant", "content": None,
             "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "ok"}]},
    "messages": {
        "model": "m", "max_tokens": 99, "system": [text("S", cache_control=MARK)],
        "temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop_sequences": ["a"], "stream": True,
        "tools": [{"name": "f", "description": "D", "input_schema": CHAT_SHAPE, "strict": True,
                   "type": "custom", "cache_control": MARK, "input_examples": [{}]}],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "thinking": {"type": "adaptive"}, "metadata": {"user_id": "u"}, "service_tier": "auto",
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": CHAT_SHAPE}},
        "messages": [
            user([text("a", cache_control=MARK, citations=[]), PNG_BLOCK, {
                "type": "document", "title": "t", "source": {
                    "type": "text", "media_type": "text/plain", "data": "x"}},
                {"type": "image", "source": {"type": "url", "url": "https://a"}}]),
            {"role": "assistant", "content": [*THOUGHTS, *SEARCH, text("T"), use("c", x=1)]},
            user([{**result("c", [text("ok")]), "is_error": True}]),
            {"role": "system", "content": "S"}]},
    "responses": {
        "model": "m", "instructions": "S", "max_output_tokens": 99, "temperature": 0.5,
        "top_p": 0.5, "stream": True, "store": False, "parallel_tool_calls": False,
        "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"}, "user": "u", "safety_identifier": "s",
        "include": ["reasoning.encrypted_content"], "max_tool_calls": 3, "top_logprobs": 0,
        "text": {"verbosity": "low", "format": {
            "type": "json_schema", "name": "out", "schema": CHAT_SHAPE, "strict": True}},
        "tools": [
            {"type": "function", "name": "f", "description": "D", "parameters": CHAT_SHAPE,
             "strict": True}, {"type": "function", "name": "h", "parameters": CHAT_SHAPE},
            {"type": "custom", "name": "sh", "format": {
                "type": "grammar", "syntax": "lark", "definition": "x"}},
            {"type": "namespace", "name": "ns", "tools": [
                {"type": "function", "name": "g", "parameters": CHAT_SHAPE}]}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "function", "name": "f"}]},
        "input": [
            {"role": "developer", "content": "D"},
            {"type": "message", "role": "user", "id": "msg_1", "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "https://a", "detail": "low"},
                {"type": "input_file", "filename": "a.pdf",
                 "file_data": "data:application/pdf;base64," + PDF}]},
            {"type": "reasoning", "id": "rs_1", "encrypted_content": "Zm9v", "summary": [
                {"type": "summary_text", "text": "Hm"}]},
            {"type": "message", "role": "assistant", "id": "msg_2", "status": "completed",
             "content": [{"type": "output_text", "text": "T", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f",
             "arguments": "{}", "status": "completed"},
            {"type": "custom_tool_call", "id": "ctc_1", "call_id": "d", "name": "sh",
             "input": "ls"},
            {"type": "function_call_output", "call_id": "c", "output": [
                {"type": "input_text", "text": "ok"}]},
            {"type": "custom_tool_call_output", "call_id": "d", "output": "ok"}]},
    "gemini": {
        "model": "m", "stream": True,
        "systemInstruction": {"parts": [{"text": "S"}]},
        "generationConfig": {
            "maxOutputTokens": 99, "temperature": 0.5, "topP": 0.5, "topK": 4,
            "stopSequences": ["a"], "seed": 1, "candidateCount": 1,
            "responseMimeType": "application/json", "responseJsonSchema": CHAT_SHAPE,
            "thinkingConfig": {"includeThoughts": True, "thinkingLevel": "LOW"}},
        "tools": [{"functionDeclarations": [
            {"name": "f", "description": "D", "parametersJsonSchema": CHAT_SHAPE},
            {"name": "g", "parameters": {"type": "OBJECT", "properties": {
                "x": {"type": "STRING", "nullable": True},
                "y": {"anyOf": [{"type": "STRING"}], "nullable": True}}}}]}],
        "toolConfig": {"functionCallingConfig": {
            "mode": "ANY", "allowedFunctionNames": ["f", "g"]}},
        "contents": [
            {"role": "user", "parts": [
                {"text": "a"}, {"inlineData": {"mimeType": "image/png", "data": "aGk="}},
                {"fileData": {"mimeType": "image/png", "fileUri": "https://a"}}]},
            {"role": "model", "parts": [
                {"text": "Hm", "thought": True, "thoughtSignature": "c2ln"}, {"text": "T"},
                {"functionCall": {"id": "c", "name": "f", "args": {"x": 1}},
                 "thoughtSignature": "c2ln"}]},
            {"role": "user", "parts": [{"functionResponse": {
                "id": "c", "name": "f", "response": {"output": "ok"}}}]}]},
}
VALUES: list[Any] = [None, True, False, 0, -1, 1.5, 1e400, "", "x", "\ud800", [], ["x"], [None],
                     [[]], [{}], {}, {"x": 1}, {"type": "x"}]


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys: Iterable[Any] = tree if isinstance(tree, dict) else ()
    for key in range(len(tree)) if isinstance(tree, list) else keys:
        yield from nodes(tree[key], (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


def translated(name: str, request: JSON) -> str | None:
    """Tries to translate a request for each dialect; the param where it is refused."""
    try:
        for other, dialect in gateway.DIALECTS.items():
            chat = gateway.DIALECTS[name].parse_request(request, Losses())
            target = Target("m", CAPS_OF[other])
            gateway.dump_json(dialect.render_request(chat, target, Losses())[0])
    except GatewayError as error:
        assert error.status == 400 and error.param and len(error.message) < 400, error
        return error.param
    return None


@pytest.mark.parametrize("name", TRANSLATED)
def test_wrong_types_are_refused_and_named(name: str) -> None:
    assert translated(name, BIG[name]) is None
    for path in list(nodes(BIG[name]))[1:]:
        for value in VALUES:
            translated(name, replaced(BIG[name], path, value))
    free = {"args", "response", "responseJsonSchema", "parametersJsonSchema", "reasoning",
            "thoughtSignature", "summary", "max_tool_calls", "parameters", "schema",
            "input_schema", "metadata", "logit_bias", "moderation", "prediction",
            "prompt_cache_options", "thinking", "annotations", "cache_control",
            "input", "citations", "input_examples"}
    for path in list(nodes(BIG[name]))[1:]:
        keys = [key for key in path if isinstance(key, str)]
        if not free.intersection(keys) and not set(path) & {"server_tool_use"}:
            assert_named(name, path)


def assert_named(name: str, path: tuple[Any, ...]) -> None:
    """A value of a type that no field takes is refused by the field's own name."""
    if name == "messages" and path[:3] == ("messages", 1, "content") and path[3:4] in ((2,), (3,)):
        return  # a server tool's traces, which nobody reads
    if path[-1] == "type" and path[-2] in ("user_location", "prediction"):
        return
    wrong = 1.5 if not isinstance(path[-1], str) or path[-1] not in (
        "temperature", "top_p", "topP", "frequency_penalty", "presence_penalty") else "x"
    param = translated(name, replaced(BIG[name], path, wrong))
    if path[-1] in ("mode", "type") and param is None:
        return
    named = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]
    assert param == named, (path, param)


@pytest.mark.parametrize("make", [
    lambda deep: {"tools": [function("f", parameters=deep, strict=True)]}, format_,
    lambda deep: loop(asked(call("c", arguments=json.dumps(deep))), answer("c")),
], ids=["parameters", "schema", "arguments"])
def test_what_nests_too_deeply_is_refused(make: Any) -> None:
    for depth in (50, sys.getrecursionlimit() // 3, sys.getrecursionlimit() - 150):
        deep: JSON = {"type": "object"}
        for _ in range(depth):
            deep = {"type": "object", "additionalProperties": False, "properties": {"x": deep}} \
                if depth < 400 else {"x": deep}
        try:
            gateway.dump_json(to_messages(make(deep))[0])
        except GatewayError as error:
            assert error.status == 400
        except RecursionError:
            pytest.fail("a traceback")


@pytest.mark.parametrize("name", TRANSLATED)
def test_wrong_types_in_an_answer_are_the_providers_fault(name: str) -> None:
    dialect = gateway.DIALECTS[name]
    making = Making(name, 2)
    reply = making.reply()
    reply.blocks = [*reply.blocks, ToolCall(id="c", name="f", arguments={"x": 1})]
    whole = json.loads(gateway.dump_json(dialect.render_reply(reply, Chat("m", []), 7)))
    renderer = dialect.renderer(Chat("m", [], include_usage=True), 7)
    stream = b"".join(renderer.feed(event) for event in spell(reply, making.random))
    wires = list(map(gateway.event_data, gateway.split_events(stream)))
    for value in [each for each in VALUES if each != 1e400]:
        for path in nodes(whole):
            if path:
                harmless(dialect.parse_reply, replaced(whole, path, value), Rewrites())
        for i, data in enumerate(wires):
            if data == b"[DONE]":
                continue
            for path in nodes(json.loads(data)):
                changed = gateway.sse(gateway.dump_json(replaced(json.loads(data), path, value)))
                harmless(spelt, name, [*map(gateway.sse, wires[:i]), changed,
                                       *map(gateway.sse, wires[i + 1:])])


def spelt(name: str, chunks: list[bytes]) -> Reply:
    return gateway.collect(chat_parsed(name, chunks))


def harmless(read: Any, *arguments: Any) -> None:
    try:
        read(*arguments)
    except GatewayError as error:
        assert error.status >= 400 and error.provider_error


@pytest.mark.parametrize("data", [
    b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\xff"}}',
    b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\x01"}}',
    b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\x"}}',
    b"NaN", b"[" * 100_000, b"[]", b"\xff",
], ids=["UTF-8", "control", "escape", "NaN", "deep", "list", "bytes"])
@pytest.mark.parametrize("name", TRANSLATED)
def test_an_event_that_is_no_json_is_the_providers_fault(name: str, data: bytes) -> None:
    start = wire_events(message_events(message(text("abc")))[:2]) if name == "messages" else b""
    with pytest.raises(GatewayError) as caught:
        chat_parsed(name, [start, b"data: ", data, b"\n\n"])
    assert caught.value.status == 502


# ---- cost ----


def steps(run: Any) -> int:
    """How many lines of gateway.py it takes."""
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != gateway.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines


def long_chat(turns: int, size: int) -> JSON:
    messages: list[JSON] = [user("Hi")]
    for i in range(turns):
        messages += [asked(call(f"c{i}", arguments=json.dumps({"x": "y" * size})), content="T"),
                     answer(f"c{i}", "z" * size), user("u")]
    return {"messages": messages, "tools": [F]}


def test_nothing_is_quadratic() -> None:
    """Lines run grow with the turns, and not with the size of what they hold."""
    few, many = (steps(lambda n=n: to_messages(long_chat(n, 10))) for n in (20, 200))
    assert many < 11 * few
    assert steps(lambda: to_messages(long_chat(20, 20_000))) == few
    deltas = [{"type": "content_block_delta", "index": 0,
               "delta": {"type": "text_delta", "text": "abc"}}]
    start, end = message_events(message(text("a")))[:2], message_events(message())[2:-1]
    few, many = (steps(lambda n=n: as_chunks(wire_events([*start, *deltas * n, *end])))
                 for n in (50, 1000))
    assert many < 21 * few


# ==================================================================================================
# Harness: a gateway in a thread, a scripted provider, raw clients
# ==================================================================================================

APP_KEY, NARROW_KEY = "vk-wire-0123456789abcdef", "vk-other-0123456789abcdef"
PROVIDER_KEY = "sk-upstream-0123456789abcdef"
PROMPT, COMPLETION = "PROMPT-marker", "COMPLETION-marker"
SECRETS = (APP_KEY, NARROW_KEY, PROVIDER_KEY, PROMPT, COMPLETION)
OUTPUT: list[str] = []  # all that gateways said of themselves: log, heads, errors, metrics
WAIT = 5.0  # seconds; only a failing test waits that long
PATH = "/v1/chat/completions"
F_SETPIPE_SZ = 1031  # Linux; fcntl names it from Python 3.10 on
SWEEP_SECONDS = gateway.SWEEP_SECONDS
LISTS = gateway.PriceLists(gateway.parse_prices(gateway.PRICES), {})


class Over(Exception):
    """A script has ended its connection."""


class Sent(NamedTuple):
    """A request as it reached the provider."""

    line: str
    fields: list[tuple[str, str]]
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)


def read_head(file: Any) -> tuple[str, list[tuple[str, str]]]:
    """The first line and the fields, names in lower case."""
    lines: list[str] = []
    while not lines or lines[-1]:
        line = file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError
        lines.append(line[:-2].decode("latin-1"))
    fields = [line.split(": ", 1) for line in lines[1:-1]]
    return lines[0], [(name.lower(), value) for name, value in fields]


class Wire:
    """A connection from the gateway, as a script plays on it."""

    def __init__(self, upstream: Upstream, sock: socket.socket) -> None:
        self.upstream, self.sock = upstream, sock
        self.file = sock.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.sock.close()


Step = Union[bytes, Callable[[Wire], None]]
Script = list[Step]


def READ(wire: Wire) -> None:
    """Reads one request."""
    line, fields = read_head(wire.file)
    body = wire.file.read(int(dict(fields)["content-length"]))
    wire.upstream.requests.put(Sent(line, fields, body))


def CLOSE(wire: Wire) -> None:
    wire.close()
    raise Over


def RESET(wire: Wire) -> None:
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    CLOSE(wire)


def HALF_CLOSE(wire: Wire) -> None:
    wire.sock.shutdown(socket.SHUT_WR)


def GO(wire: Wire) -> None:
    """Waits until the test says so."""
    assert wire.upstream.go.acquire(timeout=WAIT)


def TELL(wire: Wire) -> None:
    """Tells the test that the script has come this far."""
    wire.upstream.told.release()


def drip(data: bytes) -> Step:
    """Sends byte by byte, so that each is read alone."""
    def step(wire: Wire) -> None:
        for at in range(len(data)):
            wire.sock.sendall(data[at:at + 1])
            wire.upstream.settle()
    return step


def always(answer: bytes | Callable[[Sent], bytes]) -> Script:
    """Answers every request of a connection."""
    def step(wire: Wire) -> None:
        while True:
            READ(wire)
            sent = wire.upstream.requests.queue[-1]
            wire.sock.sendall(answer if isinstance(answer, bytes) else answer(sent))
    return [step]


class Upstream:
    """A scripted provider: each connection plays the next script."""

    def __init__(self, scripts: Iterable[Script], tls: ssl.SSLContext | None = None) -> None:
        self.requests: queue.Queue[Sent] = queue.Queue()
        self.left: queue.Queue[None] = queue.Queue()  # an item a connection that the gateway ended
        self.go, self.told = threading.Semaphore(0), threading.Semaphore(0)
        self.connects = 0
        self.settle: Callable[[], None]
        self._tls = tls
        self._wires: list[Wire] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(iter(scripts),), daemon=True).start()

    def _accept(self, scripts: Iterator[Script]) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connects += 1
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._play, args=(sock, next(scripts)), daemon=True).start()

    def _play(self, sock: socket.socket, script: Script) -> None:
        try:
            wire = Wire(self, self._tls.wrap_socket(sock, server_side=True) if self._tls else sock)
        except OSError:  # the gateway refuses the certificate
            return
        self._wires.append(wire)
        try:
            for step in script:
                wire.sock.sendall(step) if isinstance(step, bytes) else step(wire)
            while wire.file.read1(1 << 16):
                pass
            self.left.put(None)
        except (OSError, EOFError):
            self.left.put(None)
        except (Over, ValueError, RuntimeError):
            pass  # by the script's will, or at the test's end
        finally:
            wire.close()

    def close(self) -> None:
        for sock in [self._listener, *(wire.sock for wire in self._wires)]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.go.release(100)


class Answer(NamedTuple):
    """An answer as it reached the client."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return dict(self.fields)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, whole."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        return error  # type: ignore[no-any-return]

    @property
    def data(self) -> list[bytes]:
        return re.findall(rb"^data: (.*)$", self.body, re.MULTILINE)

    @property
    def events(self) -> list[Any]:
        return [data if data == b"[DONE]" else json.loads(data) for data in self.data]


class Client:
    """A raw connection to a gateway."""

    def __init__(self, address: tuple[str, int] | str, receive_buffer: int = 0) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(WAIT)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(address)
        self.file = self.sock.makefile("rb")

    def send(self, *data: bytes) -> Client:
        self.sock.sendall(b"".join(data))
        return self

    def head(self) -> tuple[int, list[tuple[str, str]]]:
        line, fields = read_head(self.file)
        OUTPUT.append(f"{line} {fields}")
        assert line.startswith("HTTP/1.1 ")
        return int(line[9:12]), fields

    def chunk(self) -> bytes:
        """One chunk of a body, b"" at its end."""
        data = self.exactly(int(self.file.readline(), 16))
        assert self.file.readline() == b"\r\n"
        return data

    def exactly(self, size: int) -> bytes:
        data: bytes = self.file.read(size)
        assert len(data) == size, "the answer is cut"
        return data

    def answer(self, is_head: bool = False) -> Answer:
        status, fields = self.head()
        headers = dict(fields)
        if is_head:
            body = b""
        elif "transfer-encoding" in headers:
            body = b"".join(iter(self.chunk, b""))
        else:
            body = (self.exactly(int(headers["content-length"])) if "content-length" in headers
                    else self.file.read())
        if status >= 400 or b'"error"' in body:
            OUTPUT.append(body.decode("utf-8", "replace").replace(COMPLETION, "")
                          if status == 200 else body.decode())
        return Answer(status, fields, body)

    def is_closed(self) -> bool:
        """Waits for the end of the connection; False where there is more to read."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


def request(body: bytes = b"", *fields: str, method: str = "POST", path: str = PATH,
            key: str = APP_KEY, version: str = "HTTP/1.1") -> bytes:
    """A request's bytes; `fields` are header lines, and may say the length themselves."""
    lines = [f"{method} {path} {version}", "Host: gw", *fields]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    if not any(line.lower().startswith(("content-length", "transfer-enc")) for line in fields):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chat(stream: bool = False, model: str = "house", **more: object) -> bytes:
    return json.dumps({"model": model, "stream": stream, **more,
                       "messages": [{"role": "user", "content": PROMPT}]}).encode()


USAGE = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200}
REPLY = json.dumps({
    "id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-real",
    "choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"role": "assistant", "content": COMPLETION}}],
    "usage": USAGE}, indent=1).encode()


def event(value: object) -> bytes:
    return b"data: %b\n\n" % (value if isinstance(value, bytes) else json.dumps(value).encode())


def delta(content: str = COMPLETION, **more: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}, **more}], "usage": None})


FIRST = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
LAST = delta("", finish_reason="stop")
USAGE_CHUNK = event({"choices": [], "usage": USAGE})
FINAL = event(b"[DONE]")
STREAMED = FIRST + delta() + delta("é\u2028") + LAST + FINAL


def reply(body: bytes = REPLY, *fields: str, status: str = "200 OK",
          kind: str = "application/json") -> bytes:
    """A provider's plain answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


END = b"0\r\n\r\n"
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
               b"Transfer-Encoding: chunked\r\nx-request-id: req-up\r\n\r\n")


def streamed(*pieces: bytes) -> bytes:
    return STREAM_HEAD + chunks(*pieces) + END


LOG_FIELD = re.compile(r'([^\s=]+)=("(?:[^"\\]|\\.)*"|[^\s"]*)(?: |$)')


def parse_log(line: str) -> dict[str, str]:
    """A key=value line; it must be whole and nothing else."""
    assert LOG_FIELD.sub("", line.rstrip("\n")) == ""
    return {key: json.loads(value) if value[:1] == '"' else value
            for key, value in LOG_FIELD.findall(line)}


class Gate:
    """A gateway that serves in a thread, by a clock that can be put forward."""

    def __init__(self, scripts: Iterable[Script], tls: ssl.SSLContext | None = None,
                 app: gateway.Application | None = None, reads_log: bool = True,
                 **config: Any) -> None:
        self.upstream = Upstream(scripts, tls)
        self.skew = self.wall_skew = 0.0
        self._app = app
        self._config = gateway.parse_config(
            json.dumps(config_for(self.upstream.port, "https" if tls else "http", **config)),
            "test", {}, gateway.read_text)
        self.log: queue.Queue[str] = queue.Queue()
        reader, self._log_fd = os.pipe()
        self.log_reader = os.fdopen(reader, encoding="utf-8", newline="\n")
        self._log_thread = threading.Thread(target=self._read_log, daemon=True)
        if reads_log:
            with contextlib.suppress(OSError):  # elsewhere 64 KiB must do
                fcntl.fcntl(self._log_fd, F_SETPIPE_SZ, 1 << 20)
            self._log_thread.start()
        self._clients: list[Client] = []
        self._ready, self._swept = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(WAIT)
        self.upstream.settle = self.settle

    def clock(self) -> float:
        return time.monotonic() + self.skew

    def wall_clock(self) -> float:
        return time.time() + self.wall_skew

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        config = self._config
        log = gateway.Log(self._log_fd, config.log == "json", self.clock, self.wall_clock)
        self.gateway = gateway.make_gateway(config, LISTS, gateway.Metrics(), log)
        self.server = gateway.Server(self._app or self.gateway, config.limits, config.timeouts,
                                     gateway.id_maker(), self.clock, self.wall_clock)
        sock = gateway.open_socket(gateway.parse_listen(config.listen))
        self.address = sock.getsockname()
        await self.server.listen(sock)
        self.server.sweep(self._sweep)
        self._ready.set()
        await self._stop.wait()
        await self.server.drain()
        self.gateway.pool.close()

    def _read_log(self) -> None:
        for line in self.log_reader:
            OUTPUT.append(line)
            self.log.put(line)

    def _sweep(self, now: float) -> None:
        self.gateway.pool.sweep(now)
        self._swept.set()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.upstream.close()
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT)
        os.close(self._log_fd)
        if self._log_thread.is_alive():
            self._log_thread.join(WAIT)
        self.log_reader.close()
        assert not self._thread.is_alive()
        held = (self.gateway.events.held, self.server.bodies.held,
                self.gateway.metrics.in_flight.values[()])
        assert held == (0, 0, 0)  # however its exchanges went

    def later(self, seconds: float) -> None:
        """Puts the clock of all deadlines forward, once the sweeper has seen what came so far."""
        self.settle()
        self._swept.clear()
        assert self._swept.wait(WAIT)
        self.skew += seconds

    def settle(self) -> None:
        """Two turns of the loop: whatever lay in its sockets has been read."""
        for _ in range(2):
            turned = threading.Event()
            self.loop.call_soon_threadsafe(turned.set)
            assert turned.wait(WAIT)

    def client(self, receive_buffer: int = 0) -> Client:
        self._clients.append(Client(self.address, receive_buffer))
        return self._clients[-1]

    def call(self, body: bytes = b"", *fields: str, **how: str) -> Answer:
        client = Client(self.address)
        try:
            client.send(request(body, *fields, **how))
            return client.answer(is_head=how.get("method") == "HEAD")
        finally:
            client.close()

    def get(self, path: str, *fields: str, **how: str) -> Answer:
        return self.call(b"", *fields, method="GET", path=path, **how)

    def log_line(self) -> dict[str, str]:
        return parse_log(self.log.get(timeout=WAIT))

    def access(self) -> dict[str, str]:
        """The next line of the access log; its exchange is in the metrics by then."""
        return next(fields for fields in iter(self.log_line, {}) if fields["msg"] == "access")

    def series(self, name: str, **labels: str) -> dict[str, float]:
        """The samples of a metric that have these labels."""
        text = self.get("/metrics", key="").body.decode()
        OUTPUT.append(text)
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return {sample: float(number) for sample, number in samples
                if re.fullmatch(rf"{name}(\{{.*)?", sample) and all(w in sample for w in wanted)}

    def total(self, name: str, **labels: str) -> float:
        return sum(self.series(name, **labels).values())


def eventually(is_so: Callable[[], bool]) -> None:
    """Asks again and again, of what no event tells."""
    deadline = time.monotonic() + WAIT
    while True:
        with contextlib.suppress(OSError, EOFError):
            if is_so():
                return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def config_for(port: int, scheme: str = "http", provider: Any = None, **more: Any) -> Any:
    """A config whose provider listens on `port`; `provider` adds to that one's settings."""
    return {
        "listen": "127.0.0.1:0",
        "providers": {"openai": {"api_key": PROVIDER_KEY, **(provider or {}),
                                 "base_url": f"{scheme}://127.0.0.1:{port}/v1"}},
        "models": {"house": {"provider": "openai", "model": "gpt-real",
                             "cost_per_million_input": 2, "cost_per_million_output": 8}},
        "routing": [{"prefix": "gpt-", "provider": "openai"}],
        "api_keys": [{"key": APP_KEY, "app": "chatbot", "allowed_models": ["*"]},
                     {"key": NARROW_KEY, "app": "narrow", "allowed_models": ["house", "tiny-*"]}],
        **more, "limits": {"grace": 0.2, **more.get("limits", {})}}


@pytest.fixture
def gate_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gate]]:
    """Starts gateways in front of a provider that plays these scripts, the last one repeatedly."""
    gates: list[Gate] = []
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", 0.02)  # nobody likes to wait

    def start(*scripts: Script, **config: Any) -> Gate:
        gates.append(Gate(itertools.chain(scripts, itertools.repeat((scripts or ([],))[-1])),
                          **config))
        return gates[-1]

    yield start
    for gate in gates:
        gate.close()


@pytest.fixture(autouse=True)
def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No task may die of an error that nobody awaits."""
    yield
    said = [record.getMessage() for when in ("call", "teardown")
            for record in caplog.get_records(when) if record.levelno >= logging.WARNING]
    OUTPUT.extend([caplog.text, *said])
    assert not said


# ==================================================================================================
# 11. Upstream
# ==================================================================================================


def framings(body: bytes, kind: bytes) -> dict[str, Script]:
    """The ways to send one body."""
    ok, half = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % kind, len(body) // 2
    raw = zlib.compressobj(wbits=-15)
    by_length = b"%bContent-Length: %d\r\n\r\n%b" % (ok, len(body), body)
    chunked = ok + b"Transfer-Encoding: chunked\r\n"

    def coded(name: bytes, data: bytes) -> bytes:
        return b"%bContent-Encoding: %b\r\n\r\n%b%b" % (chunked, name, chunks(data), END)

    return {
        "length": [by_length],
        "chunked": [chunked + b"\r\n" + chunks(body) + END],
        "chunks of one byte": [chunked + b"\r\n" + chunks(
            *(body[at:at + 1] for at in range(len(body)))) + END],
        "extensions and trailers": [
            chunked + b"Trailer: x\r\n\r\n%X;a=b;c=\"d\"\r\n%b\r\n00%x ; e\r\n%b\r\n0\r\nx: y\r\n"
            b"\r\n" % (half, body[:half], len(body) - half, body[half:])],
        "until close": [ok + b"\r\n" + body, CLOSE],
        "HTTP/1.0": [ok.replace(b"1.1", b"1.0", 1) + b"\r\n" + body, CLOSE],
        "HTTP/1.0 with a length": [by_length.replace(b"1.1", b"1.0", 1)],
        "interim answers first": [b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n"
                                  b"Link: </x>\r\n\r\n" + by_length],
        "no reason, odd fields": [by_length.replace(b"200 OK", b"200", 1).replace(
            b"Content-Length: ", b"cOnTeNt-LeNgTh:\t ", 1)],
        "gzip": [coded(b"gzip", gzip.compress(body))],
        "gzip members": [coded(b"gzip", gzip.compress(body[:half]) + gzip.compress(body[half:]))],
        "deflate": [coded(b"deflate", zlib.compress(body))],
        "raw deflate": [coded(b"Deflate", raw.compress(body) + raw.flush())],
    }


@pytest.mark.parametrize("name", framings(b"", b""))
@pytest.mark.parametrize("send", [bytes, drip])
@pytest.mark.parametrize("stream", [False, True])
def test_every_framing_brings_the_same_body(gate_for: Any, name: str, send: Any,
                                            stream: bool) -> None:
    body, kind = (STREAMED, b"text/event-stream") if stream else (REPLY, b"application/json")
    script = framings(body, kind)[name]
    gate = gate_for([READ, send(script[0]), *script[1:]])
    answer = gate.call(chat(stream, stream_options={"include_usage": True}))
    assert (answer.status, answer.body) == (200, body)
    assert "content-encoding" not in answer.headers and "trailer" not in answer.headers


@pytest.mark.parametrize("name, connects", [
    *((name, 1) for name in ("length", "chunked", "extensions and trailers", "gzip",
                             "interim answers first")),
    ("until close", 3), ("HTTP/1.0", 3), ("HTTP/1.0 with a length", 3),
])
@pytest.mark.parametrize("stream", [False, True])
def test_connections_are_reused_after_a_clean_answer(gate_for: Any, name: str, connects: int,
                                                     stream: bool) -> None:
    body, kind = (STREAMED, b"text/event-stream") if stream else (REPLY, b"application/json")
    gate = gate_for([READ, *framings(body, kind)[name]] * 3)
    for _ in range(3):
        assert gate.call(chat(stream)).status == 200
        gate.access()
    assert gate.upstream.connects == connects


@pytest.mark.parametrize("answer", [
    reply(REPLY, "Connection: close"), reply(REPLY, "connection: Keep-Alive, CLOSE"),
    reply() + b"x", streamed(STREAMED) + b"HTTP/1.1 200 OK\r\n\r\n",
    streamed(FIRST, event({"error": {"message": "no"}})),
    reply().replace(b"-Length: ", b"-Length: +"),
], ids=range(6))
def test_connections_in_doubt_are_not_reused(gate_for: Any, answer: bytes) -> None:
    gate = gate_for([READ, answer], always(reply()))
    gate.call(chat(b"event-stream" in answer))
    assert gate.call(chat()).body == REPLY
    gate.upstream.left.get(timeout=WAIT)


def test_a_stream_that_is_whole_before_its_last_chunk_ends_at_once(gate_for: Any) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(STREAMED), GO, END, *always(reply())])
    assert gate.call(chat(True)).body == STREAMED
    gate.upstream.go.release()
    gate.settle()
    assert gate.call(chat()).body == REPLY
    assert gate.upstream.connects == 1


def test_a_last_chunk_that_never_comes_is_not_waited_for(gate_for: Any) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(STREAMED)])
    assert gate.call(chat(True)).body == STREAMED
    gate.later(2)
    gate.upstream.left.get(timeout=WAIT)


def test_idle_connections_are_closed_in_time(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    gate.call(chat())
    gate.later(56)
    gate.upstream.left.get(timeout=WAIT)
    assert gate.call(chat()).status == 200
    assert gate.upstream.connects == 2


@pytest.mark.parametrize("end", [CLOSE, RESET, HALF_CLOSE])
def test_connections_closed_while_idle_are_never_noticed_by_clients(gate_for: Any,
                                                                    end: Step) -> None:
    gate = gate_for([READ, reply(), end])
    client = gate.client()
    for _ in range(60):
        assert client.send(request(chat())).answer().body == REPLY
    assert gate.upstream.requests.qsize() == 60


def test_what_comes_unasked_on_an_idle_connection_spoils_it(gate_for: Any) -> None:
    unasked = reply(b'{"not": "asked"}')
    gate = gate_for([READ, reply(), GO, unasked, TELL, *always(reply())], always(reply()))
    gate.call(chat())
    gate.upstream.go.release()
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.settle()
    assert gate.call(chat()).body == REPLY
    assert gate.upstream.connects == 2


@pytest.mark.parametrize("end", [CLOSE, RESET])
def test_a_reused_connection_that_dies_at_once_is_replaced(gate_for: Any, end: Step) -> None:
    gate = gate_for([READ, reply(), READ, end], always(reply()))
    assert [gate.call(chat()).status, gate.call(chat()).status] == [200, 200]
    assert (gate.upstream.connects, gate.upstream.requests.qsize()) == (2, 3)
    gate.access()
    gate.access()
    assert gate.total("llm_provider_errors_total") == 0


@pytest.mark.parametrize("then, wait, sent", [
    ([CLOSE], 0, 3),  # replaced once, and no more: the next one closes too
    ([GO, CLOSE], 1.1, 2), ([GO, RESET], 1.1, 2),  # it had the time to act
    ([b"H", CLOSE], 0, 2), ([b"HTTP/1.1 100 Continue\r\n\r\n", CLOSE], 0, 2),  # it acted
])
def test_no_request_is_sent_again_that_may_have_been_acted_on(gate_for: Any, then: Script,
                                                              wait: float, sent: int) -> None:
    gate = gate_for([READ, reply(), READ, *then], [READ, CLOSE], always(reply()))
    assert gate.call(chat()).status == 200
    client = gate.client().send(request(chat()))
    for _ in range(2):
        gate.upstream.requests.get(timeout=WAIT)
    gate.later(wait)
    gate.upstream.go.release()
    assert client.answer().status == 502
    assert gate.upstream.requests.qsize() == sent - 2


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(40 << 20))

# What a provider does instead of a good plain answer, and how that may be labelled.
BREAKS: dict[str, tuple[Script, str]] = {
    "closed unanswered": ([CLOSE], "request_error"),
    "reset unanswered": ([RESET], "request_error"),
    "closed in the head": ([b"HTTP/1.1 200 OK\r\nContent-Le", CLOSE], "request_error"),
    "reset in the head": ([b"HTTP/1.1 200 OK\r\nContent-Le", GO, RESET], "request_error"),
    "closed after an interim head": ([b"HTTP/1.1 103 Early Hints\r\n\r\n", CLOSE],
                                     "request_error"),
    "no HTTP": ([b"\x15\x03\x01\x00\x02\x02\x46\r\n\r\n"], "bad_answer"),
    "HTTP/2": ([b"HTTP/2 200\r\ncontent-length: 0\r\n\r\n"], "bad_answer"),
    "a bad field": ([OK + b"Bad Field: x\r\n\r\n"], "bad_answer"),
    "a folded field": ([OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n"], "bad_answer"),
    "an endless head": ([OK + b"x: " + b"y" * (70 << 10)], "bad_answer"),
    "switched protocols": ([b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"],
                           "bad_answer"),
    "both lengths": ([OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
                      + chunks(b"{}") + END], "bad_answer"),
    "two lengths": ([OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} "], "bad_answer"),
    "a signed length": ([OK + b"Content-Length: +2\r\n\r\n{}"], "bad_answer"),
    "a listed length": ([OK + b"Content-Length: 2, 3\r\n\r\n{} "], "bad_answer"),
    "an unknown transfer coding": ([OK + b"Transfer-Encoding: gzip\r\n\r\n{}", CLOSE],
                                   "bad_answer"),
    "a chunked HTTP/1.0": ([CHUNKED.replace(b"1.1", b"1.0", 1) + chunks(b"{}") + END],
                           "bad_answer"),
    "an unknown content coding": ([reply(b"{}", "Content-Encoding: br")], "bad_answer"),
    "gzip that is none": ([reply(b"{}", "Content-Encoding: gzip")], "bad_answer"),
    "gzip that is cut": ([reply(gzip.compress(REPLY)[:-9], "Content-Encoding: gzip")],
                         "bad_answer"),
    "a gzip bomb": ([reply(BOMB, "Content-Encoding: gzip")], "bad_answer"),
    "bare LFs": ([reply().replace(b"\r", b"")], "bad_answer"),
    "a cut length": ([reply()[:-1], CLOSE], "request_error bad_answer"),
    "a reset body": ([reply()[:-1], GO, RESET], "request_error bad_answer"),
    "cut chunks": ([CHUNKED + chunks(REPLY), CLOSE], "request_error bad_answer"),
    "cut trailers": ([CHUNKED + chunks(REPLY) + b"0\r\nx: y\r\n", CLOSE],
                     "request_error bad_answer"),
    "a chunk too long": ([CHUNKED + b"2\r\n{}}\r\n"], "bad_answer"),
    "a huge chunk": ([CHUNKED + b"80000000\r\n"], "bad_answer"),
    "endless extensions": ([CHUNKED + b"2;" + b"x" * (20 << 10)], "bad_answer"),
    "endless trailers": ([CHUNKED + b"0\r\n" + b"x: y\r\n" * 9000], "bad_answer"),
    "a cut close-delimited body": ([OK + b"\r\n" + REPLY[:-1], CLOSE],
                                   "request_error bad_answer"),
    "no JSON": ([reply(b"{oops}")], "bad_answer"),
    "JSON, but a list": ([reply(b"[1]")], "bad_answer"),
    "JSON with no end of brackets": ([reply(b"[" * 100_000)], "bad_answer"),
    "nothing": ([reply(b"")], "bad_answer"),
    "no content": ([b"HTTP/1.1 204 No Content\r\n\r\n"], "bad_answer"),
    "another success": ([reply(status="201 Created")], "bad_answer"),
    "not modified": ([b"HTTP/1.1 304 Not Modified\r\n\r\n"], "bad_answer"),
    "too much by length": ([reply(bytes(70_000))], "bad_answer"),
    "too much by chunks": ([CHUNKED + chunks(bytes(70_000)), GO], "bad_answer"),
    **{f"a redirect, {status}": ([reply(b"{}", "Location: http://127.0.0.1:9/v1", status=status)],
                                 "bad_answer") for status in
       ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent")},
}


def test_a_provider_that_is_not_there(gate_for: Any) -> None:
    gate = gate_for()
    gate.upstream.close()
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (502, "upstream_unreachable")
    assert "ConnectionRefused" in gate.access()["error"]
    assert gate.total("llm_provider_errors_total", error_type="request_error") == 1


def test_a_blank_line_in_an_errors_body_is_no_bare_head(gate_for: Any) -> None:
    body = b'{\n\n"error": {"message": "slow down"}}'
    told = reply(body, status="429 Too Many")
    gate = gate_for([READ, told[:-20], GO, told[-20:]])
    client = gate.client().send(request(chat(True)))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(1)
    gate.later(1)
    gate.upstream.go.release()
    answer = client.answer()
    assert (answer.status, answer.body) == (429, body)


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_breaks_before_its_answer_is_usable(gate_for: Any, name: str,
                                                            stream: bool) -> None:
    script, labels = BREAKS[name]
    gate = gate_for([READ, *script], limits={"answer": 60_000, "event": 60_000})
    client = gate.client().send(request(chat(stream)))
    if GO in script:
        gate.upstream.requests.get(timeout=WAIT)
        gate.settle()
        gate.upstream.go.release()
    answer = client.answer()
    assert (answer.status, answer.error["message"] != "") == (502, True)
    assert PROVIDER_KEY not in str(answer) and answer.headers["content-type"] == "application/json"
    line = gate.access()
    assert line["status"] == "502" and line["error"]
    assert gate.total("llm_requests_total", status="502") == gate.total("llm_requests_total") == 1
    errors = gate.series("llm_provider_errors_total", provider="openai")
    assert sum(errors.values()) == 1
    if not stream:  # a stream may break at another point
        assert line["usage"] == "none"
        assert [label for label in labels.split() if f'error_type="{label}"' in str(errors)]
    assert gate.upstream.connects == 1
    assert client.send(request(method="GET", path="/health")).answer().status == 200


STREAM_BREAKS: dict[str, Script] = {
    "closed": [CLOSE],
    "reset": [RESET],
    "ended without [DONE]": [chunks(LAST) + END],
    "closed after the last event": [chunks(LAST), CLOSE],
    "ended in an event": [chunks(delta()[:-3]) + END],
    "closed in [DONE]": [chunks(b"data: [DON"), CLOSE],
    "a bad chunk": [b"zz\r\n"],
    "an event that is too large": [chunks(*[b"data: " + bytes(30_000)] * 3)],
    "an error": [chunks(event({"error": {"message": "Overloaded", "type": "server_error"}}))],
    "an error, then the end": [chunks(event({"error": {"message": "no"}}), FINAL) + END],
}


@pytest.mark.parametrize("name", STREAM_BREAKS)
def test_a_stream_that_breaks_ends_in_an_error(gate_for: Any, name: str) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(FIRST, delta()), GO, *STREAM_BREAKS[name]],
                    limits={"event": 60_000})
    client = gate.client().send(request(chat(True)))
    assert client.head()[0] == 200
    assert client.chunk() == FIRST + delta()
    gate.upstream.go.release()
    answer = Answer(200, [], b"".join(iter(client.chunk, b"")))
    OUTPUT.append(str(answer.events[-1]))
    errors = [event["error"] for event in answer.events if event != b"[DONE]" and "error" in event]
    assert len(errors) == 1 and errors[0]["message"]
    assert "error" in answer.events[-1]  # nor [DONE] after it
    line = gate.access()
    assert line["status"] in ("500", "502") and line["usage"] == "estimated"
    assert gate.total("llm_requests_total", status=line["status"]) == 1
    assert gate.total("llm_provider_errors_total", provider="openai") == 1
    if CLOSE not in STREAM_BREAKS[name] and RESET not in STREAM_BREAKS[name]:
        gate.upstream.left.get(timeout=WAIT)
    assert client.send(request(method="GET", path="/health")).answer().status == 200


OPEN_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize("tail", [b"", FINAL])
def test_a_close_delimited_stream_is_whole_with_its_last_event(gate_for: Any, tail: bytes) -> None:
    gate = gate_for([READ, OPEN_HEAD + FIRST + delta() + LAST + tail, CLOSE])
    answer = gate.call(chat(True))
    assert (answer.events[-1] == b"[DONE]") == bool(tail)
    assert b'"error"' in answer.body or tail


def test_a_stream_may_end_without_done_where_the_config_says_so(gate_for: Any) -> None:
    gate = gate_for([READ, streamed(FIRST, delta(), LAST), READ, streamed(FIRST, delta())],
                    provider={"done": False})
    assert gate.call(chat(True)).body == FIRST + delta() + LAST
    assert "error" in gate.call(chat(True)).events[-1]


@pytest.mark.parametrize("client", ["chat", "responses", "gemini"])
def test_a_translated_stream_without_end_is_cut(gate_for: Any, client: str) -> None:
    """Some dialects repeat the whole answer at its end, so it must be held."""
    renderer = gateway.DIALECTS["messages"].renderer(Chat("up", []), 7)
    start, *more = map(renderer.feed, [
        Start("1", "up"), BlockStart(Text()), *[TextDelta("x" * 1000)] * 9])
    gate = gate_for([READ, STREAM_HEAD + chunks(start, *more[:4]), GO, chunks(*more[4:])],
                    provider={"kind": "anthropic"}, limits={"answer": 5000},
                    models={"house": {"provider": "openai", "model": "up"}})
    connection = gate.client().send(asking(client))
    assert connection.head()[0] == 200
    gate.upstream.go.release()
    body = b"".join(iter(connection.chunk, b""))
    last = json.loads(decoded([body])[-1])
    assert "too large" in json.dumps(last.get("response", last)["error"])
    assert gate.access()["status"] == "502"
    gate.upstream.left.get(timeout=WAIT)


# ---- deadlines, by a clock that is put forward ----

PING, CREATED = b": ping\n\n", STREAM_HEAD + chunks(FIRST)
DEADLINES: dict[str, tuple[bool, dict[str, float], Script, list[float], str]] = {
    # name: (stream, timeouts, script, seconds that pass before each GO, the deadline that ends it)
    "a plain answer that never comes": (False, {}, [], [601], "total"),
    "a stream that never comes": (True, {}, [], [601], "first_token"),
    "only a head": (True, {}, [STREAM_HEAD], [601], "first_token"),
    "pings and a role, no token": (True, {}, [STREAM_HEAD + chunks(PING), GO, chunks(FIRST), GO],
                                   [400, 201], "first_token"),
    "a stream that stalls": (True, {}, [CREATED + chunks(delta())], [301], "idle"),
    "a stream that stalls in an event": (True, {}, [CREATED + chunks(delta(), delta()[:9])], [301],
                                         "idle"),
    "a plain answer that stalls": (False, {}, [reply()[:-1]], [301], "idle"),
    "an interim answer, then nothing": (False, {}, [b"HTTP/1.1 100 Continue\r\n\r\n"], [601],
                                        "total"),
    "a plain answer that drips": (False, {}, [reply()[:-3], GO, b"\n", GO, b"}"],
                                  [250, 250, 101], "total"),
    "a stream that drips": (True, {}, [CREATED + chunks(delta())] + [GO, chunks(delta())] * 4
                            + [GO, chunks(FINAL) + END], [250] * 5, ""),
    "a total of its own": (True, {"total": 500},
                           [CREATED + chunks(delta())] + [GO, chunks(delta())] * 2, [250, 251],
                           "total"),
    "a first token that takes its time": (True, {}, [GO, streamed(STREAMED)], [599], ""),
    "shorter ones": (True, {"first_token": 3}, [], [4], "first_token"),
}


@pytest.mark.parametrize("name", DEADLINES)
def test_a_deadline_ends_what_takes_too_long_and_nothing_else(gate_for: Any, name: str) -> None:
    stream, timeouts, script, passing, late = DEADLINES[name]
    gate = gate_for([READ, *(step for s in script for step in
                             ([s, TELL] if isinstance(s, bytes) else [s]))], timeouts=timeouts)
    client = gate.client().send(request(chat(stream)))
    gate.upstream.requests.get(timeout=WAIT)
    for seconds in passing:
        if script and script[0] is not GO:
            assert gate.upstream.told.acquire(timeout=WAIT)
        gate.later(seconds)
        gate.upstream.go.release()
    answer = client.answer()
    if not late:
        assert (answer.status, answer.events[-1]) == (200, b"[DONE]")
        return
    error = answer.error if answer.status == 504 else answer.events[-1]["error"]
    assert late in error["message"] + error["code"] and error["type"] == "timeout"
    assert answer.status == 504 or b"[DONE]" not in answer.body
    assert gate.access()["status"] == "504"
    assert gate.total("llm_provider_errors_total", error_type="timeout") == 1
    gate.upstream.left.get(timeout=1)


def test_a_deadline_is_met_within_a_second(gate_for: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", SWEEP_SECONDS)
    gate = gate_for([READ, CREATED + chunks(delta())], timeouts={"idle": 0.3})
    client = gate.client().send(request(chat(True)))
    client.head()
    assert client.chunk()
    started = time.monotonic()
    assert b"timeouts.idle" in client.chunk()
    assert 0.2 < time.monotonic() - started < 1.3


def test_a_provider_and_an_alias_have_deadlines_of_their_own(gate_for: Any) -> None:
    gate = gate_for([READ], timeouts={"first_token": 1000, "total": 2000}, models={
        "house": {"provider": "openai", "timeouts": {"first_token": 5}}})
    client = gate.client().send(request(chat(True)))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(6)
    assert client.answer().status == 504


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_provider_that_does_not_accept(gate_for: Any, scheme: str) -> None:
    """TLS counts as part of the connecting; a full backlog leaves SYNs unanswered."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        address = silent.getsockname()
        fillers = [socket.socket() for _ in range(4 if scheme == "http" else 0)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        gate = gate_for(timeouts={"connect": 0.2}, providers={"openai": {
            "api_key": PROVIDER_KEY, "base_url": f"{scheme}://127.0.0.1:{address[1]}/v1"}})
        answer = gate.call(chat())
        for filler in fillers:
            filler.close()
    assert (answer.status, answer.error["code"]) == (504, "connect_timeout")
    assert "connect" in answer.error["message"]
    assert gate.total("llm_provider_errors_total", error_type="timeout") == 1


@pytest.mark.parametrize("step", [86400.0, -86400.0, 1.0])
def test_a_step_of_the_wall_clock_changes_no_deadline(gate_for: Any, step: float) -> None:
    gate = gate_for([READ, CREATED + chunks(delta()), GO, chunks(FINAL) + END])
    client = gate.client().send(request(chat(True)))
    client.head()
    assert client.chunk()
    gate.wall_skew += step
    gate.later(1)
    gate.upstream.go.release()
    assert client.chunk() and client.chunk() == b""
    assert float(gate.access()["duration_ms"]) < 5000


# ---- silence ----

ALIVE = {"chat": b": keep-alive\n\n", "responses": b": keep-alive\n\n",
         "messages": b'event: ping\ndata: {"type":"ping"}\n\n', "gemini": b"\n"}


def asking(client: str, model: str = "house") -> bytes:
    """A request for a stream."""
    asked = Chat(model, [Turn("user", [Text(text="a")])], max_tokens=9, stream=True)
    body, _ = gateway.DIALECTS[client].render_request(
        asked, Target(model, CAPS_OF[client]), Losses())
    path = PATH_OF.get(client) or f"/v1beta/models/{model}:streamGenerateContent?alt=sse"
    return request(gateway.dump_json(body), path=path)


def test_a_silent_stream_tells_that_it_lives(gate_for: Any) -> None:
    """Before its first event too: what follows is the rest of the same answer."""
    gate = gate_for([READ, GO, CREATED + chunks(delta()), GO, chunks(LAST, FINAL) + END])
    client = gate.client().send(asking("chat"))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    status, fields = client.head()
    assert (status, dict(fields)["content-type"]) == (200, "text/event-stream")
    assert ("x-accel-buffering", "no") in fields
    assert dict(fields)["x-gateway-id"] == dict(fields)["x-request-id"]
    said = [client.chunk()]
    gate.later(16)
    said.append(client.chunk())
    gate.upstream.go.release()
    said.append(client.chunk())
    gate.later(14)
    gate.later(2)
    said.append(client.chunk())
    gate.upstream.go.release()
    said += iter(client.chunk, b"")
    alive = ALIVE["chat"]
    assert b"".join(said) == alive * 2 + FIRST + delta() + alive + LAST + FINAL
    head = sum(len(f"{name}: {value}\r\n") for name, value in fields) + len("HTTP/1.1 200 OK\r\n")
    logged = gate.access()
    assert int(logged["bytes_out"]) == head + 2 + len(chunks(*said) + END)
    assert (logged["status"], logged["usage"]) == ("200", "estimated")


@pytest.mark.parametrize("client_", ALIVE)
def test_an_error_after_a_sign_of_life_is_told_in_the_stream(gate_for: Any, client_: str) -> None:
    told = reply(b'{"error": {"message": "No luck", "type": "rate_limit_error"}}',
                 status="429 Too Many")
    gate = gate_for([READ, GO, told])
    client = gate.client().send(asking(client_))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    assert client.head()[0] == 200 and client.chunk() == ALIVE[client_]
    gate.upstream.go.release()
    body = b"".join(iter(client.chunk, b""))
    last = json.loads(decoded([body])[-1])
    assert "No luck" in json.dumps(last.get("response", last)["error"])
    assert gate.access()["status"] == "429"
    assert client.send(request(method="GET", path="/health")).answer().status == 200


def test_the_bytes_of_a_sign_of_life_count_also_where_nothing_follows(gate_for: Any) -> None:
    gate = gate_for([READ, GO])
    client = gate.client().send(asking("chat"))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    client.head()
    assert client.chunk() == ALIVE["chat"]
    client.close()
    logged = gate.access()
    assert logged["status"] == "499" and int(logged["bytes_out"]) > len(ALIVE["chat"])
    gate.upstream.go.release()


def test_a_sign_of_life_tells_what_is_lost(gate_for: Any) -> None:
    gate = gate_for([READ, GO], provider={"kind": "anthropic"})
    client = gate.client().send(request(chat(True, seed=1)))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    assert dict(client.head()[1])["x-gateway-lost"] == "seed"
    gate.upstream.go.release()


def test_an_old_client_hears_that_its_stream_lives(gate_for: Any) -> None:
    """Without chunks, so that the connection's end is the stream's."""
    gate = gate_for([READ, GO, streamed(STREAMED)])
    client = gate.client().send(request(chat(True), version="HTTP/1.0"))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    assert dict(client.head()[1])["connection"] == "close"
    assert client.exactly(len(ALIVE["chat"])) == ALIVE["chat"]
    gate.upstream.go.release()
    assert client.file.read() == STREAMED


@pytest.mark.parametrize("stream, settings", [(False, {}), (True, {"sse_keepalive": 0}),
                                              (True, {"sse_keepalive": 20})])
def test_what_is_not_to_tell_that_it_lives_is_silent(
        gate_for: Any, stream: bool, settings: Any) -> None:
    gate = gate_for([READ, GO, streamed(STREAMED) if stream else reply()], **settings)
    client = gate.client().send(request(chat(stream)))
    gate.upstream.requests.get(timeout=WAIT)
    gate.later(16)
    gate.upstream.go.release()
    assert client.answer().body == (STREAMED if stream else REPLY)


# ---- slow readers ----

LARGE = delta("x" * (6 << 20))  # no buffer takes it at once
FLOOD = chunks(delta("x" * 1000)) * 50


def flood(megabytes: int) -> Step:
    """Sends so much of a stream, and tells when it is stuck or done."""
    def step(wire: Wire) -> None:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        for _ in range((megabytes << 20) // len(FLOOD)):
            wire.sock.settimeout(0.3)
            left = memoryview(FLOOD)
            while left:
                try:
                    left = left[wire.sock.send(left):]
                except socket.timeout:
                    wire.sock.settimeout(None)
                    TELL(wire)
        wire.sock.settimeout(None)
        TELL(wire)
    return step


@pytest.mark.parametrize("first", [FIRST, LARGE], ids=["small", "large"])
def test_readers_that_stall_cost_little(gate_for: Any, first: bytes) -> None:
    """A first event that is larger than all buffers must not open the flood-gates either."""
    gate = gate_for([READ, STREAM_HEAD + chunks(first), flood(50)])
    count = 10 if first == FIRST else 1
    tracemalloc.start()
    try:
        for _ in range(count):
            gate.client(4096).send(request(chat(True)))
        for _ in range(count):
            assert gate.upstream.told.acquire(timeout=2 * WAIT)
        gate.settle()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < count * (512 << 10) + 2 * len(first) + (1 << 20)


def test_a_stalled_reader_of_packed_events_costs_little(gate_for: Any) -> None:
    """One read of them holds megabytes, of which no more is unpacked than the client takes."""
    said = b"".join(delta("x" * 1000 + str(number ** 9)) for number in range(6000)) + FINAL
    packed = gzip.compress(said)
    assert 50 < len(said) / len(packed) < gateway.MAX_INFLATE_RATIO
    gate = gate_for([READ, reply(packed, "Content-Encoding: gzip", kind="text/event-stream"), TELL])
    client = gate.client(4096)
    tracemalloc.start()
    try:
        stalled(gate, client)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20
    assert client.answer().body == said
    assert client.send(request(method="GET", path="/health")).answer().status == 200


def stalled(gate: Gate, client: Client) -> None:
    """Sends a streamed request and waits until nothing moves."""
    client.send(request(chat(True)))
    assert gate.upstream.told.acquire(timeout=2 * WAIT)
    gate.settle()


def test_a_slow_reader_is_no_fault_of_the_providers(gate_for: Any) -> None:
    """While the client takes its time, the provider's deadline must not run."""
    gate = gate_for([READ, STREAM_HEAD, flood(12), chunks(FINAL) + END],
                    timeouts={"write": 10_000})
    client = gate.client(4096)
    stalled(gate, client)
    gate.later(400)
    gate.later(1)
    assert client.answer().events[-1] == b"[DONE]"
    assert gate.access()["status"] == "200"


@pytest.mark.parametrize("script", [[flood(8), TELL], [GO, chunks(LARGE), TELL]],
                         ids=["more to come", "no more to come"])
@pytest.mark.parametrize("timeouts, late", [({}, "idle"), ({"total": 300}, "total")])
def test_a_deadline_counts_again_when_the_reader_has_caught_up(gate_for: Any, timeouts: Any,
                                                               script: Script, late: str) -> None:
    gate = gate_for([READ, CREATED, *script], timeouts={"write": 10_000, **timeouts})
    client = gate.client(4096)
    gate.upstream.go.release()
    stalled(gate, client)
    client.head()
    gate.later(1)
    size = 0
    while size < 6 << 20:
        size += len(client.chunk())
    while gate.upstream.told.acquire(timeout=0.3):
        pass
    gate.later(301)
    rest = b"".join(iter(client.chunk, b""))
    assert b"timeouts.%b" % late.encode() in rest
    assert gate.access()["status"] == "504"


def test_a_total_that_passes_while_the_reader_stalls_is_told(gate_for: Any) -> None:
    gate = gate_for([READ, CREATED, GO, chunks(LARGE), TELL],
                    timeouts={"write": 10_000, "total": 300})
    client = gate.client(4096)
    gate.upstream.go.release()
    stalled(gate, client)
    gate.later(301)
    assert "timeouts.total" in client.answer().events[-1]["error"]["message"]


def test_unfinished_events_are_bounded_together(gate_for: Any) -> None:
    gate = gate_for([READ, CREATED + chunks(b"data: " + bytes(70_000)), TELL],
                    limits={"events": 100_000})
    clients = [gate.client().send(request(chat(True))) for _ in range(2)]
    for _ in clients:
        assert gate.upstream.told.acquire(timeout=WAIT)
    assert gate.access()["status"] in ("502", "503")


# ---- clients that leave ----


@pytest.mark.parametrize("streaming", [False, True], ids=["waiting", "streaming"])
@pytest.mark.parametrize("leave", [
    Client.close, Client.reset, lambda client: client.sock.shutdown(socket.SHUT_WR),
], ids=["close", "reset", "half-close"])
def test_a_client_that_leaves_cancels_its_request(gate_for: Any, leave: Any,
                                                  streaming: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(gateway, "SWEEP_SECONDS", SWEEP_SECONDS)
    gate = gate_for([READ, *([CREATED + chunks(delta())] if streaming else [])])
    client = gate.client().send(request(chat(True)))
    if streaming:
        client.head()
        assert client.chunk()
    gate.upstream.requests.get(timeout=WAIT)
    assert gate.total("llm_requests_in_flight") == 1
    leave(client)
    gate.upstream.left.get(timeout=1)
    line = gate.access()
    assert (line["status"], line["usage"]) == ("499", "estimated" if streaming else "none")
    assert gate.total("llm_requests_total", status="499", virtual_key="chatbot") == 1
    assert gate.total("llm_requests_in_flight") == gate.total("llm_provider_errors_total") == 0


def test_a_client_that_leaves_a_plain_request_cancels_it(gate_for: Any) -> None:
    gate = gate_for([READ, reply()[:-1]])
    client = gate.client().send(request(chat()))
    gate.upstream.requests.get(timeout=WAIT)
    client.close()
    gate.upstream.left.get(timeout=1)
    assert gate.access()["status"] == "499"


def test_a_client_that_leaves_in_its_body_reaches_no_provider(gate_for: Any) -> None:
    gate = gate_for()
    gate.client().send(request(chat(), "Content-Length: 999")).close()
    line = gate.access()
    assert (line["status"], line["virtual_key"]) == ("499", "chatbot")
    assert gate.upstream.connects == 0


# ---- a thousand ways ----


def faults(seed: int) -> Iterator[tuple[bool, Script]]:
    """Answers cut or garbled at random."""
    chance = random.Random(seed)
    bodies = [(body, name) for body in (REPLY, STREAMED) for name in framings(b"", b"")]
    while True:
        body, name = chance.choice(bodies)
        is_stream = body is STREAMED
        kind = b"text/event-stream" if is_stream else b"application/json"
        data = bytes(framings(body, kind)[name][0])  # type: ignore[arg-type]
        at = chance.randrange(len(data) + 1)
        noise = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        yield is_stream, [READ, *chance.choice([
            [data[:at]], [data[:at] + noise], [data[:at] + noise + data[at:]],
            [data[:at] + noise + data[at + len(noise):]], [data[:at], TELL, data[at + 1:]],
        ]), chance.choice([CLOSE, RESET, HALF_CLOSE])]


def test_whatever_a_provider_does_the_client_gets_an_honest_answer(gate_for: Any) -> None:
    plan = list(itertools.islice(faults(1), 250))
    current: list[tuple[bool, Script]] = []

    class Plan:
        """The script of the request that is being made, also for a second connection of its."""

        def __iter__(self) -> Iterator[Step]:
            return iter(current[0][1])

    gate = gate_for(Plan(), timeouts={"idle": 1, "first_token": 1, "total": 2})
    client = gate.client()
    files = gate.total("process_open_fds")
    for is_stream, script in plan:
        current[:] = [(is_stream, script)]
        answer = client.send(request(chat(is_stream))).answer()
        if answer.status == 200 and is_stream:
            failed = b'"error"' in answer.data[-1]
            assert failed != (answer.data[-1] == b"[DONE]"), script
        elif answer.status == 200:
            assert isinstance(json.loads(answer.body), dict), script
        else:
            assert answer.status >= 400 and json.loads(answer.body)["error"], script
        assert gate.access()["status"] == str(answer.status) or answer.status == 200
    assert gate.total("llm_requests_total") == len(plan)
    assert gate.total("llm_requests_in_flight") == 0
    eventually(lambda: gate.total("process_open_fds") <= files + 2)


# ---- TLS ----


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.pem and NAME.key of two authorities and of servers: good ones, and bad ones."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    authority = f"req -x509 {new} -days 9 -addext keyUsage=critical,keyCertSign,digitalSignature"

    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "stranger"):
        openssl(f"{authority} -keyout {name}.key -out {name}.pem -subj /CN={name}")
    openssl(f"{authority} -keyout self-signed.key -out self-signed.pem -subj /CN=127.0.0.1 "
            "-addext subjectAltName=IP:127.0.0.1")
    for name, host, days, ca in (
            ("good", "IP:127.0.0.1", 9, "ca"), ("expired", "IP:127.0.0.1", -1, "ca"),
            ("wrong-host", "DNS:other.example", 9, "ca"),
            ("unknown", "IP:127.0.0.1", 9, "stranger")):
        (folder / "ext").write_text(f"subjectAltName={host}\nauthorityKeyIdentifier=keyid\n")
        openssl(f"req {new} -keyout {name}.key -out {name}.csr -subj /CN=server")
        openssl(f"x509 -req -in {name}.csr -CA {ca}.pem -CAkey {ca}.key -CAcreateserial "
                f"-days {days} -extfile ext -out {name}.pem")
    return folder


@pytest.fixture
def tls_gate_for(gate_for: Any, certificates: Path, monkeypatch: Any) -> Callable[..., Gate]:
    """Starts gateways that trust one authority, in front of a provider with that certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))

    def start(name: str, *scripts: Script, old: bool = False) -> Gate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
        if old:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        return gate_for(*scripts, tls=context)  # type: ignore[no-any-return]

    return start


def test_tls_is_spoken_and_kept_alive(tls_gate_for: Any) -> None:
    gate = tls_gate_for("good", [READ, reply(), READ, streamed(STREAMED), READ, reply()])
    assert gate.call(chat()).body == REPLY
    assert gate.call(chat(True)).body == STREAMED
    assert gate.call(chat()).body == REPLY
    assert gate.upstream.connects == 1


# ---- through a proxy ----

class Proxied(NamedTuple):
    gate: Gate  # whose provider is https://other.example
    proxy: Upstream


@pytest.fixture
def proxied(gate_for: Any, certificates: Path,
            monkeypatch: Any) -> Iterator[Callable[..., Proxied]]:
    """Starts a gateway behind a proxy that plays this script; TUNNEL in it is where it says yes
    and is the provider from then on, with that certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    proxies: list[Upstream] = []

    def start(*script: Step, certificate: str = "wrong-host") -> Proxied:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{certificate}.pem",
                                certificates / f"{certificate}.key")

        def tunnel(wire: Wire) -> None:
            wire.upstream.requests.put(Sent(*read_head(wire.file), b""))
            wire.sock.sendall(b"HTTP/1.1 200 Connection established\r\nvia: x\r\n\r\n")
            wire.sock = context.wrap_socket(wire.sock, server_side=True)
            wire.file = wire.sock.makefile("rb")

        proxies.append(Upstream(itertools.repeat(
            [tunnel if step is TUNNEL else step for step in script])))
        monkeypatch.setenv("HTTPS_PROXY", f"http://us%3Aer:p%40ss@127.0.0.1:{proxies[-1].port}")
        provider = {"api_key": PROVIDER_KEY, "base_url": "https://other.example/v1"}
        return Proxied(gate_for(providers={"openai": provider}), proxies[-1])

    yield start
    for proxy in proxies:
        proxy.close()


def TUNNEL(wire: Wire) -> None:
    """Stands for what `proxied` makes of it."""


def test_a_provider_is_reached_through_a_proxy(proxied: Any) -> None:
    gate, proxy = proxied(TUNNEL, READ, reply(), READ, streamed(STREAMED))
    assert gate.call(chat()).body == REPLY
    assert gate.call(chat(True)).body == STREAMED
    asked, sent = (proxy.requests.get(timeout=WAIT) for _ in range(2))
    assert asked.line == "CONNECT other.example:443 HTTP/1.1"
    credentials = base64.b64encode(b"us:er:p@ss").decode()
    assert asked.fields == [("host", "other.example:443"),
                            ("proxy-authorization", f"Basic {credentials}")]
    assert ("host", "other.example") in sent.fields and credentials not in str(sent)
    assert proxy.connects == 1  # a tunnel is kept as a connection is


@pytest.mark.parametrize("script, certificate, reason", [
    ([b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"], "good", "the proxy answered 407"),
    ([b"What?\r\n\r\n"], "good", "the proxy answered no HTTP"),
    ([lambda wire: read_head(wire.file), CLOSE], "good", "the proxy gave no answer"),
    ([b"x" * (1 << 17)], "good", "the proxy gave no answer"), ([TUNNEL], "good", "certificate"),
    ([TUNNEL], "unknown", "unable to get local issuer")])
def test_a_proxy_that_does_not_connect(
        proxied: Any, script: Script, certificate: str, reason: str) -> None:
    gate, _ = proxied(*script, certificate=certificate)
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (502, "upstream_unreachable")
    assert reason in gate.access()["error"]
    eventually(lambda: not gate.gateway.pool._open)


@pytest.mark.parametrize("env, host, is_proxied", [
    ({"HTTPS_PROXY": "http://p:3128"}, "a.com", True), ({"HTTPS_PROXY": ""}, "a.com", False),
    ({"https_proxy": "p:3128"}, "a.com", True), ({"HTTP_PROXY": "http://p"}, "a.com", False),
    *(({"HTTPS_PROXY": "http://p:3128", "NO_PROXY": listed}, host, is_proxied)
      for listed, host, is_proxied in (
          ("a.com", "api.A.com", False), (".a.com, b", "api.a.com", False), ("b,*", "x", False),
          ("api.a.com", "api.a.com", False), ("i.a.com", "api.a.com", True),
          (",", "api.a.com", True), ("", "localhost", False), ("", "127.0.0.9", False)))])
def test_what_goes_through_a_proxy(env: Any, host: str, is_proxied: bool) -> None:
    proxy = gateway.parse_proxy(env)
    for is_tls in (True, False):
        serves = proxy is not None and proxy.serves(gateway.Origin(is_tls, host, 443))
        assert serves == (is_proxied and is_tls)


@pytest.mark.parametrize("url", ["socks5://p:1", "http://", "http://p:x", "https://u:secret@p:1",
                                 "http://u:secret@p:99999"])
def test_a_bad_proxy_is_an_error_of_the_config(command: Any, monkeypatch: Any, url: str) -> None:
    Path("config.json").write_text(json.dumps(config_for(9)))
    monkeypatch.setenv("HTTPS_PROXY", url)
    status, _, errors = command("-check")
    assert (status, errors) == (2, "HTTPS_PROXY: must be http://[USER:PASSWORD@]HOST:PORT\n")
    monkeypatch.setenv("HTTPS_PROXY", "http://u:secret@p:3128")
    status, said_, _ = command("-check")
    assert (status, "proxy      p:3128," in said_, "secret" in said_) == (0, True, False)


@pytest.mark.parametrize("name, reason", [
    ("expired", "certificate has expired"), ("wrong-host", "IP address mismatch"),
    ("self-signed", "self[- ]signed certificate"), ("unknown", "unable to get local issuer"),
])
def test_a_certificate_in_doubt_is_refused_with_the_reason(tls_gate_for: Any, name: str,
                                                           reason: str) -> None:
    gate = tls_gate_for(name, [READ, reply()])
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (502, "upstream_unreachable")
    assert re.search(reason, gate.access()["error"])
    assert not re.search(reason, answer.error["message"])
    assert gate.upstream.requests.empty()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused(tls_gate_for: Any) -> None:
    gate = tls_gate_for("good", [READ, reply()], old=True)
    assert gate.call(chat()).status == 502
    assert re.search("(?i)protocol", gate.access()["error"])


class NoTls:
    """Stands for a TLS context of a provider that knows no TLS."""

    def wrap_socket(self, sock: socket.socket, server_side: bool) -> socket.socket:
        return sock


def test_plain_http_on_the_tls_port_is_told_in_the_log(gate_for: Any) -> None:
    gate = gate_for([b"HTTP/1.1 400 Bad Request\r\n\r\n", CLOSE], tls=NoTls())
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (502, "upstream_unreachable")
    assert re.search("(?i)wrong version|packet length|record layer", gate.access()["error"])


def test_a_handshake_that_stalls_meets_its_deadline(gate_for: Any) -> None:
    gate = gate_for([], tls=NoTls(), timeouts={"connect": 0.1})
    assert (gate.call(chat()).status, gate.upstream.connects) == (504, 1)
    assert "timeouts.connect" in gate.access()["error"]
    gate.upstream.left.get(timeout=WAIT)


def test_a_tls_stream_that_is_truncated_is_an_error(tls_gate_for: Any) -> None:
    gate = tls_gate_for("good", [READ, OPEN_HEAD + FIRST + delta(), CLOSE],
                        [READ, OPEN_HEAD + STREAMED, CLOSE])
    assert "error" in gate.call(chat(True)).events[-1]
    assert gate.call(chat(True)).body == STREAMED


# ==================================================================================================
# 12. Gateway
# ==================================================================================================

# ---- bytes pass ----

ODD = (b'{ "messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00 \xc3\xa9 ' + PROMPT.encode()
       + b'"}],\n"temperature" :0.30, "new_field":{"a":1,"a":2, "n":1e2},"model":\t"%b" ,'
       b'"stream":false,"top_p":1.0}\n')


@pytest.mark.parametrize("model, sent", [
    (b"gpt-real", b"gpt-real"), (b"house", b"gpt-real"), (b"openai/gpt-x", b"gpt-x"),
    (b"h\\u006fuse", b"gpt-real"),
])
def test_a_body_passes_but_for_the_model(gate_for: Any, model: bytes, sent: bytes) -> None:
    odd = ODD.replace(b"%b", b"%s")
    gate = gate_for(always(reply(ODD)))
    answer = gate.call(odd.replace(b"%s", model))
    assert gate.upstream.requests.get().body == odd.replace(b"%s", sent)
    assert answer.body == ODD


def joined(fields: Iterable[Iterable[str]]) -> dict[str, str]:
    """Fields by name, repeated ones joined as any hop may (RFC 9110, section 5.3)."""
    by_name: dict[str, list[str]] = {}
    for name, value in fields:
        by_name.setdefault(name, []).append(value)
    return {name: ", ".join(values) for name, values in by_name.items()}


def test_fields_of_a_request_pass_but_for_what_is_ours(gate_for: Any) -> None:
    gate = gate_for(always(reply()), provider={"headers": {"X-Team": "ours"}})
    kept = ["user-agent: sdk/1", "openai-beta: x=1", "idempotency-key: k", "x-stainless-os: L",
            "x-twice: a", "x-twice: b", "traceparent: 00-1", "accept: */*"]
    dropped = ["cookie: c", "x-api-key: " + NARROW_KEY, "api-key: x", "x-goog-api-key: x",
               "openai-organization: o", "openai-project: p", "accept-encoding: gzip, br",
               "origin: http://o", "sec-fetch-mode: cors", "forwarded: for=1", "x-forwarded-for: 1",
               "x-gateway-note: n", "connection: x-mine, keep-alive", "x-mine: 1", "te: trailers",
               "keep-alive: 5", "proxy-authorization: Basic x", "x-team: theirs",
               "x-real-ip: 10.0.0.1", "x-amzn-oidc-data: e30", "x-ms-token-aad-access-token: e30",
               "cf-access-jwt-assertion: e30", "x-auth-request-email: a@b", "via: 1.1 nginx",
               "content-type: application/json; charset=utf-8"]
    body = chat(model="gpt-real")
    gate.call(body, *kept, *dropped)
    sent = gate.upstream.requests.get()
    assert sent.line == "POST /v1/chat/completions HTTP/1.1"
    assert joined(sent.fields) == joined([
        *(field.split(": ") for field in kept), ("x-team", "ours"),
        ("host", f"127.0.0.1:{gate.upstream.port}"), ("authorization", f"Bearer {PROVIDER_KEY}"),
        ("accept-encoding", "identity"), ("content-type", "application/json"),
        ("content-length", str(len(body)))])


def test_fields_of_an_answer_come_back_but_for_what_is_the_hops(gate_for: Any) -> None:
    kept = ["openai-processing-ms: 7", "x-ratelimit-remaining-tokens: 9", "x-twice: a",
            "x-twice: b", "x-latin: caf\xe9"]
    dropped = ["set-cookie: c=1", "alt-svc: h3", "server: theirs", "date: yesterday",
               "keep-alive: timeout=5", "connection: x-mine", "x-mine: 1", "x-gateway-id: forged",
               "x-accel-redirect: /health", "strict-transport-security: max-age=1"]
    answer = reply().replace(b"\r\n", b"\r\n" + "".join(
        f"{field}\r\n" for field in kept + dropped).encode("latin-1"), 1)
    gate = gate_for(always(answer))
    fields = joined(gate.call(chat()).fields)
    ours = {name: fields.pop(name) for name in ("date", "x-gateway-id", "x-request-id")}
    assert fields == joined([*(field.split(": ") for field in kept),
                             ("content-type", "application/json"),
                             ("content-length", str(len(REPLY)))])
    assert ours["date"] != "yesterday" and ours["x-gateway-id"] != "forged"


@pytest.mark.parametrize("theirs, logged", [
    (["x-request-id: req-1"], "req-1"), (["request-id: req-2"], "req-2"), ([], None),
    (["x-request-id: " + "r" * 3000], "r" * 128 + "..."),
])
def test_ids_of_ours_and_theirs(gate_for: Any, theirs: list[str], logged: str | None) -> None:
    gate = gate_for(always(reply(REPLY, *theirs)))
    headers, line = gate.call(chat()).headers, gate.access()
    assert headers["x-gateway-id"] == line["request_id"]
    assert line.get("upstream_request_id") == logged
    assert headers["x-request-id"] == (logged or line["request_id"])
    refused = gate.call(b"{").headers
    assert refused["x-request-id"] == refused["x-gateway-id"] == gate.access()["request_id"]
    assert refused["x-gateway-id"] != headers["x-gateway-id"]


# ---- the usage chunk ----

HIDDEN = (FIRST + delta() + LAST, USAGE_CHUNK, FINAL)


@pytest.mark.parametrize("options, asked_of_provider, seen", [
    ({}, {"include_usage": True}, False),
    ({"stream_options": None}, {"include_usage": True}, False),
    ({"stream_options": {"include_usage": False, "include_obfuscation": False}},
     {"include_usage": True, "include_obfuscation": False}, False),
    ({"stream_options": {"include_usage": True, "x": 1}}, {"include_usage": True, "x": 1}, True),
])
def test_usage_is_asked_for_and_its_chunk_taken_out(gate_for: Any, options: Any, seen: bool,
                                                    asked_of_provider: Any) -> None:
    gate = gate_for(always(streamed(*HIDDEN)))
    answer = gate.call(chat(True, **options))
    assert json.loads(gate.upstream.requests.get().body)["stream_options"] == asked_of_provider
    assert answer.body == b"".join(HIDDEN if seen else HIDDEN[::2])
    line = gate.access()
    assert (line["prompt_tokens"], line["completion_tokens"]) == ("1000", "200")
    assert line["usage"] == "reported"


def test_a_plain_request_asks_for_nothing_more(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    body = chat(model="gpt-real")
    gate.call(body)
    assert gate.upstream.requests.get().body == body


MODERATED = event({"choices": [], "usage": USAGE, "moderation": {"flagged": False}})
FILTERED = event({"choices": [], "prompt_filter_results": [{"note": '"usage":{'}]})
BESIDE = event({"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": USAGE})
CRLF_USAGE = USAGE_CHUNK.replace(b"\n", b"\r\n")
SPACED_USAGE = USAGE_CHUNK.replace(b'"usage": {', b'"usage" :\t{').replace(b": []", b":[ ]")
USAGE_STREAMS: dict[str, tuple[list[bytes], list[bytes]]] = {
    # name: (what the provider sends, what of it a client sees that asked for no usage)
    "plain": ([FIRST, delta(), LAST, USAGE_CHUNK, FINAL], [FIRST, delta(), LAST, FINAL]),
    "CRLF": ([FIRST.replace(b"\n", b"\r\n"), CRLF_USAGE, FINAL.replace(b"\n", b"\r\n")],
             [FIRST.replace(b"\n", b"\r\n"), FINAL.replace(b"\n", b"\r\n")]),
    "moderated": ([FIRST, LAST, MODERATED, FINAL], [FIRST, LAST, MODERATED, FINAL]),
    "moderated and counted": ([FIRST, LAST, MODERATED, USAGE_CHUNK, FINAL],
                              [FIRST, LAST, MODERATED, FINAL]),
    "filtered": ([FILTERED, FIRST, LAST, USAGE_CHUNK, FINAL], [FILTERED, FIRST, LAST, FINAL]),
    "not the last": ([FIRST, USAGE_CHUNK, LAST, FINAL], [FIRST, USAGE_CHUNK, LAST, FINAL]),
    "twice": ([FIRST, USAGE_CHUNK, delta(), USAGE_CHUNK, FINAL],
              [FIRST, USAGE_CHUNK, delta(), FINAL]),
    "beside a choice": ([FIRST, BESIDE, FINAL], [FIRST, BESIDE, FINAL]),
    "odd spaces": ([FIRST, LAST, SPACED_USAGE, FINAL], [FIRST, LAST, FINAL]),
    "a comment before the end": ([FIRST, USAGE_CHUNK, PING, FINAL], [FIRST, PING, FINAL]),
    "after the end": ([FIRST, LAST, FINAL, USAGE_CHUNK], [FIRST, LAST, FINAL]),
    "words in a text": ([FIRST, delta('"usage": {"error": [DONE] data: [DONE]'), LAST, FINAL],
                        [FIRST, delta('"usage": {"error": [DONE] data: [DONE]'), LAST, FINAL]),
}


@pytest.mark.parametrize("name", USAGE_STREAMS)
def test_every_cut_of_a_stream_looks_the_same(gate_for: Any, name: str) -> None:
    sent, seen = (b"".join(events) for events in USAGE_STREAMS[name])

    def cut(at: int) -> Step:
        def step(wire: Wire) -> None:
            wire.sock.sendall(STREAM_HEAD + chunks(*([sent[:at]] if at else [])))
            wire.upstream.settle()
            wire.sock.sendall(chunks(sent[at:]) + END)
        return step

    gate = gate_for([step for at in range(len(sent)) for step in (READ, cut(at))])
    client, lines = gate.client(), []
    for at in range(len(sent)):
        answer = client.send(request(chat(True))).answer()
        assert (answer.status, answer.body) == (200, seen), at
        lines.append(gate.access())
    assert len({(line["usage"], line["prompt_tokens"]) for line in lines}) == 1
    assert gate.upstream.connects == 1 or name == "after the end"


def test_events_go_out_as_soon_as_they_are_whole(gate_for: Any) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(FIRST), GO,
                     chunks(delta("a") + delta("b")[:-1]), GO, chunks(b"\n"), GO,
                     chunks(USAGE_CHUNK), TELL, GO, chunks(FINAL) + END])
    client = gate.client().send(request(chat(True)))
    client.head()
    for expected in (FIRST, delta("a"), delta("b")):
        assert client.chunk() == expected
        gate.upstream.go.release()
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.upstream.go.release()
    assert (client.chunk(), client.chunk()) == (FINAL, b"")


def test_small_events_are_not_held_back_for_larger_packets(gate_for: Any) -> None:
    """With Nagle's algorithm each would wait some 40 ms for the client's delayed ACK."""
    pair = [READ, STREAM_HEAD + chunks(FIRST), GO, chunks(FINAL) + END]
    gate = gate_for(pair * 20)
    client = gate.client()
    started = time.monotonic()
    for _ in range(20):
        client.send(request(chat(True))).head()
        assert client.chunk() == FIRST
        gate.upstream.go.release()
        assert (client.chunk(), client.chunk()) == (FINAL, b"")
    assert time.monotonic() - started < 0.5


# ---- errors of a provider ----


def failure(status: int, kind: str = "server_error", message: str = "as it says",
            **more: Any) -> tuple[int, bytes]:
    error = {"message": message, "type": kind, "param": None, "code": None, **more}
    return status, json.dumps({"error": error}, indent=1).encode()


KEEPS = "error"  # the answer's body is the provider's
OUR_KEY = failure(400, "invalid_request_error", f"Incorrect key {PROVIDER_KEY}; {PROVIDER_KEY}.")
PROVIDER_ERRORS = [  # (status, body), the client's status, the error's type or KEEPS, the label
    (failure(400, "invalid_request_error", param="messages"), 400, KEEPS, "client_error"),
    (failure(404, "invalid_request_error", code="model_not_found"), 404, KEEPS, "client_error"),
    (failure(409), 409, KEEPS, "client_error"), (failure(422), 422, KEEPS, "client_error"),
    (failure(429, "rate_limit_error"), 429, KEEPS, "rate_limit"),
    (failure(429, code="insufficient_quota"), 429, KEEPS, "rate_limit"),
    (failure(500), 500, KEEPS, "server_error"), (failure(503), 503, KEEPS, "server_error"),
    (failure(529, "overloaded_error"), 529, KEEPS, "server_error"),
    (failure(401, message=f"Incorrect API key provided: {PROVIDER_KEY}"), 502,
     "upstream_auth_error", "auth"),
    (failure(402, "billing_error"), 502, "upstream_billing_error", "auth"),
    (failure(403, "permission_error", "Your region is not served."), 403, KEEPS, "client_error"),
    (failure(403, code="invalid_api_key"), 502, "upstream_auth_error", "auth"),
    (failure(403, message="Incorrect API key provided: sk-up***cdef."), 502, "upstream_auth_error",
     "auth"),
    ((503, b"<html>Service Unavailable</html>"), 503, "overloaded_error", "server_error"),
    ((500, b""), 500, "server_error", "server_error"),
    ((400, b"[1]"), 400, "invalid_request_error", "client_error"),
    ((502, b"\xff\xfe nginx"), 502, "upstream_error", "server_error"),
]


@pytest.mark.parametrize("sent, status, kind, label", PROVIDER_ERRORS,
                         ids=lambda value: str(value)[:40] if isinstance(value, tuple) else "")
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_a_provider(gate_for: Any, sent: tuple[int, bytes], status: int, kind: str,
                              label: str, stream: bool) -> None:
    answer = reply(sent[1], "Retry-After: 7", "x-should-retry: true", status=f"{sent[0]} Odd Words")
    gate = gate_for(always(answer))
    got = gate.call(chat(stream))
    assert got.status == status and PROVIDER_KEY not in str(got)
    if kind is KEEPS:
        assert got.body == sent[1] and got.headers["retry-after"] == "7"
        assert got.headers["content-type"] == "application/json"
    else:
        assert got.error["type"] == kind
        assert sent[1].decode("utf-8", "replace") not in got.error["message"] or label != "auth"
        assert (got.headers["x-should-retry"] == "false") == (label == "auth")
    line = gate.access()
    assert (line["status"], line["usage"]) == (str(status), "none")
    assert "as it says" not in str(line)
    assert gate.total("llm_requests_total", status=str(status), model="house") == 1
    assert gate.total("llm_provider_errors_total", provider="openai", error_type=label) == 1
    assert gate.total("llm_tokens_total") == gate.total("llm_cost_dollars_total") == 0
    assert gate.call(chat()).status == status
    assert gate.upstream.connects == 1


@pytest.mark.parametrize("body", [
    OUR_KEY[1], PROVIDER_KEY.encode(), f"<p>{'x' * 165} key {PROVIDER_KEY}</p>".encode(),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_the_providers_key_is_masked_in_its_errors(gate_for: Any, body: bytes,
                                                   zipped: bool) -> None:
    gate = gate_for(always(reply(gzip.compress(body), "Content-Encoding: gzip", status="400 Bad")
                           if zipped else reply(body, status="400 Bad")))
    got = gate.call(chat())
    assert got.status == 400
    assert PROVIDER_KEY[:16] not in got.body.decode()  # nor a good part of it
    assert PROVIDER_KEY[:16] not in str(gate.access())


@pytest.mark.parametrize("error, status, kind", [
    ({"message": "slow down", "type": "rate_limit_error", "code": "rate_limit_exceeded"}, 429,
     "rate_limit_error"),
    ({"message": "slow down", "code": 429}, 429, None),
    ({"message": "Overloaded", "type": "overloaded_error"}, 503, "overloaded_error"),
    ({"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"},
     400, "invalid_request_error"),
    ({"message": f"Incorrect key {PROVIDER_KEY}", "code": "invalid_api_key"}, 502,
     "upstream_auth_error"),
    ({"message": f"Look at {PROVIDER_KEY}", "type": "server_error"}, 500, "server_error"),
    ({"type": "odd"}, 502, "odd"), ("no object", 502, None),
])
def test_an_error_that_is_the_first_event_has_its_real_status(gate_for: Any, error: Any,
                                                              status: int, kind: Any) -> None:
    gate = gate_for([READ, streamed(PING, event({"error": error}))], always(reply()))
    got = gate.call(chat(True))
    assert got.status == status and got.headers["content-type"] == "application/json"
    assert kind in (None, got.error["type"]) and PROVIDER_KEY not in str(got)
    line = gate.access()
    assert (line["status"], line["usage"]) == (str(status), "none")  # nothing was generated
    assert not any(secret in str(line) for secret in SECRETS)
    assert gate.total("llm_provider_errors_total") == 1
    assert gate.total("llm_tokens_total") == 0


def test_the_providers_key_is_masked_in_an_error_of_a_stream(gate_for: Any) -> None:
    last = event({"error": {"message": f"Look at {PROVIDER_KEY}"}})
    gate = gate_for([READ, STREAM_HEAD + chunks(FIRST, delta()), GO, chunks(last)])
    client = gate.client().send(request(chat(True)))
    client.head()
    client.chunk()
    gate.upstream.go.release()
    said = client.chunk()
    assert b"Look at" in said and PROVIDER_KEY.encode() not in said
    assert PROVIDER_KEY not in str(gate.access())


@pytest.mark.parametrize("answer, status", [
    (reply(), 502), (reply(b"<html>", kind="text/html"), 502), (streamed(), 502),
    (streamed(FINAL), 200), (reply(STREAMED, kind="text/event-stream"), 200),
    (reply(STREAMED, kind="text/plain"), 200),
])
def test_a_stream_that_is_none(gate_for: Any, answer: bytes, status: int) -> None:
    got = gate_for(always(answer)).call(chat(True))
    assert got.status == status
    assert got.events[-1] == b"[DONE]" if status == 200 else got.error


@pytest.mark.parametrize("odd", [
    {"usage": {"prompt_tokens": "7", "completion_tokens": -1, "prompt_tokens_details": 5}},
    {"usage": {"prompt_tokens_details": [1], "completion_tokens_details": "x"}},
    {"usage": [1]}, {"choices": 7}, {"choices": [7, {"message": 7}, {"delta": 7}]},
    {"choices": [{"index": [], "delta": {"content": 7}}]}, {"choices": [{"delta": [7]}]},
    {"error": None}, {"model": 7},
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_here_need_understand_passes(gate_for: Any, odd: Any, stream: bool) -> None:
    body = FIRST + delta() + event({"choices": [], **odd}) + FINAL if stream else json.dumps(
        odd).encode()
    gate = gate_for(always(reply(body, kind="text/event-stream" if stream else "application/json")))
    answer = gate.call(chat(stream, stream_options={"include_usage": True}))
    assert (answer.status, answer.body) == (200, body)
    first = event({"choices": [], **odd}) + FINAL
    if stream:  # also as the first event
        gate = gate_for(always(streamed(first)))
        assert gate.call(chat(True, stream_options={"include_usage": True})).body == first


# ---- who may ----


@pytest.mark.parametrize("fields, key, status", [
    ([], APP_KEY, 200), ([f"authorization: bEARER  {APP_KEY}"], "", 200),
    ([f"X-Api-Key: {APP_KEY}"], "", 200), ([f"api-key: {APP_KEY}"], "", 200),
    ([f"x-gateway-key: {APP_KEY}"], "another", 200), ([f"x-api-key: {APP_KEY}"], "another", 200),
    ([], "", 401), ([], "wrong-0123456789abcdef", 401), ([], APP_KEY + "x", 401),
    ([f"authorization: Basic {APP_KEY}"], "", 401), (["x-gateway-key: wrong"], APP_KEY, 401),
    ([], "vk-disabled-0123456789", 401), ([], "vk-expired-0123456789", 401),
    (["x-api-key: caf\xe9"], "", 401),
])
def test_keys(gate_for: Any, fields: list[str], key: str, status: int) -> None:
    gate = gate_for(always(reply()), api_keys=[
        {"key": APP_KEY, "app": "chatbot"}, {"key": "vk-disabled-0123456789", "app": "a",
                                         "disabled": True},
        {"key": "vk-expired-0123456789", "app": "b", "expires": "2020-01-01"}])
    answer, line = gate.call(chat(), *fields, key=key), gate.access()
    assert answer.status == status
    assert line["virtual_key"] == ("chatbot" if status == 200 else "")
    assert gate.total("llm_requests_total", virtual_key=line["virtual_key"], status=str(status),
                      provider="openai" if status == 200 else "") == 1
    if status == 401:
        assert answer.error["code"] == "invalid_api_key"
        assert "www-authenticate" in answer.headers and gate.upstream.connects == 0


def test_wrong_disabled_and_expired_keys_answer_alike(gate_for: Any) -> None:
    gate = gate_for(api_keys=[
        {"key": "vk-disabled-0123456789", "app": "a", "disabled": True},
        {"key": "vk-expired-0123456789", "app": "b", "expires": "2020-01-01"}])
    assert len({gate.call(chat(), key=key).body for key in (
        "vk-disabled-0123456789", "vk-expired-0123456789", "vk-nobodys-0123456789")}) == 1


@pytest.mark.parametrize("key, model, status, code", [
    (APP_KEY, "nobody-knows", 404, "model_not_found"),
    (APP_KEY, "off/gpt-x", 404, "model_not_found"),
    (APP_KEY, "asleep", 404, "model_not_found"), (NARROW_KEY, "gpt-x", 403, "model_not_allowed"),
    (NARROW_KEY, "nobody-knows", 403, "model_not_allowed"),
    (NARROW_KEY, "tiny-nothing", 404, "model_not_found"),
    *[(key, model, status, code) for model in ("x" * 5000, "openai/x" + "-beta" * 200_000)
      for key, status, code in ((APP_KEY, 404, "model_not_found"),
                                (NARROW_KEY, 403, "model_not_allowed"))],
    *[(APP_KEY, name, 404, "model_not_found") for name in (
        APP_KEY, f"x/{APP_KEY}", f"{APP_KEY}:generateContent")],
    (APP_KEY, "forged\r\nx: y\u2028\x1b", 404, "model_not_found"),
])
def test_models_that_are_refused(gate_for: Any, key: str, model: str, status: int,
                                 code: str) -> None:
    gate = gate_for(models={"house": {"provider": "openai"}, "asleep": {"provider": "off"}},
                    providers={"openai": {"api_key": PROVIDER_KEY}, "off": {"kind": "openai"}})
    answer, line = gate.call(chat(model=model), key=key), gate.access()
    assert answer.status == status and len(answer.body) < 1000
    assert APP_KEY not in str(line) and APP_KEY not in str(answer)
    assert (answer.error["code"], answer.error["param"]) == (code, "model")
    assert (line["provider"], line["model"]) == ("", "")
    assert gate.total("llm_requests_total", virtual_key=line["virtual_key"], model="") == 1


BAD_BODIES: dict[str, bytes] = {
    "empty": b"", "no JSON": b"{oops}", "a list": b"[]", "a string": b'"x"', "null": b"null",
    "NaN": b'{"model": "house", "x": NaN}', "Infinity": b'{"model": "house", "x": -Infinity}',
    "not UTF-8": b'{"model": "house", "x": "\xff"}', "a BOM": b'\xef\xbb\xbf{"model": "house"}',
    "UTF-16": '{"model": "house"}'.encode("utf-16"),
    "a key twice": b'{"model": "house", "model": "house"}',
    "a key twice, escaped": b'{"model": "house", "m\\u006fdel": "house"}',
    "more behind": b'{"model": "house"} x', "a comma": b'{"model": "house",}',
    "no model": b"{}", "an empty model": b'{"model": ""}', "a number": b'{"model": 7}',
    "a list of models": b'{"model": ["house"]}', "stream of 1": b'{"model": "house", "stream": 1}',
    "stream of words": b'{"model": "house", "stream": "true"}',
    "brackets": b'{"model": "house", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "braces": b'{"x":' * 100_000, "digits": b'{"model": "house", "x": ' + b"9" * 10_000_000 + b"}",
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_in_no_time(gate_for: Any, name: str) -> None:
    gate = gate_for()
    client = gate.client().send(request(BAD_BODIES[name]))
    gate.settle()
    started = time.monotonic()
    answer = client.answer()
    assert time.monotonic() - started < 0.5
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert gate.access()["virtual_key"] == "chatbot"
    assert gate.upstream.connects == 0
    assert client.send(request(method="GET", path="/health")).answer().status == 200


# ---- the other endpoints ----


def test_the_models_that_a_key_may_use(gate_for: Any) -> None:
    models = {name: {"provider": provider} for name, provider in (
        ("zeta", "openai"), ("house", "openai"), ("asleep", "off"), ("tiny-b", "local"),
        ("tiny-a/x", "local"))}
    gate = gate_for(models=models, providers={
        "openai": {"api_key": PROVIDER_KEY}, "off": {"kind": "openai", "api_key": ""},
        "local": {"kind": "openai-compatible", "base_url": "http://127.0.0.1:9/v1"}})

    def listed(key: str) -> list[str]:
        data = json.loads(gate.get("/v1/models", key=key).body)
        assert data["object"] == "list"
        return [model["id"] for model in data["data"]]

    assert listed(APP_KEY) == ["zeta", "house", "tiny-b", "tiny-a/x"]
    assert listed(NARROW_KEY) == ["house", "tiny-b", "tiny-a/x"]
    assert json.loads(gate.get("/v1/models/tiny-a%2Fx").body) == {
        "id": "tiny-a/x", "object": "model", "created": 0, "owned_by": "local"}
    assert gate.get("/v1/models/tiny-a/x?q=1").status == 200
    for path, key, status in (
            ("/zeta", NARROW_KEY, 403), ("/x", NARROW_KEY, 403), ("/x", APP_KEY, 404),
            ("/asleep", APP_KEY, 404), ("", "", 401), ("/zeta", "", 401)):
        answer = gate.get("/v1/models" + path, key=key)
        assert answer.status == status and answer.error["message"]


def test_health(gate_for: Any) -> None:
    gate = gate_for()
    for path in ("/health", "/health/live", "/health?x=1"):
        answer = gate.get(path, key="")
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})
    gate.gateway.is_draining = True
    assert gate.get("/health", key="").status == 503
    assert gate.get("/health/live", key="").status == 200


def test_the_two_forms_of_metrics(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    gate.call(chat())
    gate.access()
    plain = gate.get("/metrics", key="")
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    opened = gate.get("/metrics", "Accept: application/openmetrics-text;version=1.0.0,*/*;q=0.1",
                      key="")
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.body.endswith(b"# EOF\n") and b"# EOF" not in plain.body
    assert b"# TYPE llm_requests counter" in opened.body
    assert b"# TYPE llm_requests_total counter" in plain.body
    for text in (plain.body.decode(), opened.body.decode()):
        OUTPUT.append(text)
        for line in text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE|EOF).*|[a-z_0-9]+(\{([a-z_]+="[^"]*",?)*\})? \S+',
                                line)


# ---- metering ----

DETAILED = {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200,
            "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 100},
            "completion_tokens_details": {"reasoning_tokens": 50}}
PRICED = {"house": {"provider": "openai", "model": "gpt-real", "cost_per_million_input": 2,
                    "cost_per_million_output": 8, "cost_per_million_cache_read": 0.5,
                    "cost_per_million_cache_write": 2.5}}
DOLLARS = (300 * 2 + 600 * 0.5 + 100 * 2.5 + 200 * 8) / 1e6


@pytest.mark.parametrize("stream", [False, True])
def test_every_metric_of_a_good_request(gate_for: Any, stream: bool) -> None:
    told = {"choices": [], "usage": DETAILED}
    answer = (streamed(FIRST, delta(), event(told), FINAL) if stream else
              reply(json.dumps(told).encode()))
    gate = gate_for(always(answer), models=PRICED)
    assert gate.call(chat(stream)).status == 200
    line = gate.access()
    route = dict(virtual_key="chatbot", provider="openai", model="house")

    def one(name: str, **labels: str) -> float:
        """The value of the metric's only series with these labels and the route's."""
        (number,) = gate.series(name, **labels).values()
        return number

    assert one("llm_requests_total", **route, status="200") == 1
    flag = "true" if stream else "false"
    assert one("llm_request_duration_seconds_count", **route, stream=flag) == 1
    assert one("llm_request_duration_seconds_bucket", **route, stream=flag, le="600.0") == 1
    assert one("llm_request_duration_seconds_sum", **route) < WAIT
    for direction, number in (("prompt", 1000), ("completion", 200)):
        assert one("llm_tokens_total", **route, direction=direction) == number
    for kind, number in (("cache_read", 600), ("cache_write", 100), ("reasoning", 50)):
        assert one("llm_token_details_total", **route, kind=kind) == number
    assert one("llm_cost_dollars_total", **route) == DOLLARS == float(line["cost"])
    assert gate.total("llm_stream_first_byte_seconds_count", **route) == stream
    assert one("llm_overhead_seconds_count") == 1
    assert one("llm_requests_in_flight") == 0
    for name in ("llm_provider_errors_total", "llm_usage_estimated_total",
                 "llm_unpriced_tokens_total"):
        assert gate.series(name) == {}
    assert {key: line[key] for key in ("cache_read_tokens", "cache_write_tokens",
                                       "reasoning_tokens", "usage")} == {
        "cache_read_tokens": "600", "cache_write_tokens": "100", "reasoning_tokens": "50",
        "usage": "reported"}
    assert ("ttft_ms" in line) == stream


@pytest.mark.parametrize("stream", [False, True])
def test_usage_that_is_not_told_is_estimated(gate_for: Any, stream: bool) -> None:
    whole = {"choices": [{"message": {"role": "assistant", "content": "word " * 80}}]}
    answer = (streamed(FIRST, *[delta("word ")] * 80, LAST, FINAL) if stream else
              reply(json.dumps(whole).encode()))
    gate = gate_for(always(answer))
    body = chat(stream)
    gate.call(body)
    line = gate.access()
    assert line["usage"] == "estimated"
    assert int(line["prompt_tokens"]) == -(-len(body) // 3)
    assert 80 <= int(line["completion_tokens"]) <= 125  # 400 bytes
    assert gate.total("llm_usage_estimated_total", provider="openai", model="house") == 1
    tokens = [int(line["prompt_tokens"]), int(line["completion_tokens"])]
    assert gate.total("llm_tokens_total") == sum(tokens)
    assert gate.total("llm_cost_dollars_total") == pytest.approx(
        (tokens[0] * 2 + tokens[1] * 8) / 1e6)


def test_an_aborted_stream_is_paid_for(gate_for: Any) -> None:
    gate = gate_for([READ, CREATED + chunks(*[delta("word ")] * 80), TELL])
    body = chat(True)
    client = gate.client().send(request(body))
    assert gate.upstream.told.acquire(timeout=WAIT)
    client.head()
    size = 0
    while size < len(FIRST) + 80 * len(delta("word ")):
        size += len(client.chunk())
    client.close()
    line = gate.access()
    assert (line["status"], line["usage"]) == ("499", "estimated")
    assert int(line["prompt_tokens"]) == -(-len(body) // 3)
    assert 80 <= int(line["completion_tokens"]) <= 125
    assert gate.total("llm_cost_dollars_total", model="house") == float(line["cost"]) > 0
    assert gate.total("llm_requests_total", status="499", model="house") == 1


def test_an_aborted_stream_that_said_nothing_has_no_output(gate_for: Any) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(PING, FIRST)])
    client = gate.client().send(request(chat(True)))
    client.head()
    while FIRST not in client.chunk():
        pass
    client.close()
    assert int(gate.access()["completion_tokens"]) <= 2


def test_an_aborted_stream_counts_what_was_reported(gate_for: Any) -> None:
    gate = gate_for([READ, CREATED + chunks(BESIDE)])
    client = gate.client().send(request(chat(True)))
    client.head()
    seen = b""
    while b'"usage"' not in seen:
        seen += client.chunk()
    client.close()
    assert gate.access()["prompt_tokens"] == "1000"


def test_tokens_without_a_price(gate_for: Any) -> None:
    gate = gate_for(always(reply()), models={"house": {"provider": "openai", "model": "odd-1"}})
    gate.call(chat())
    assert "cost" not in gate.access()
    assert gate.total("llm_unpriced_tokens_total", provider="openai", model="house") == 1200
    assert gate.series("llm_cost_dollars_total") == {}


def test_the_list_prices_count_where_the_config_has_none(gate_for: Any) -> None:
    name = next(name for name, price in LISTS.built_in.items()
                if name.startswith("gpt-") and price.input and not price.tiers)
    gate = gate_for(always(reply()), models={"house": {"provider": "openai", "model": name}})
    gate.call(chat())
    price = LISTS.built_in[name]
    assert float(gate.access()["cost"]) == (1000 * price.input + 200 * price.output) / 1e15


def test_a_models_name_is_counted_once_it_is_known(gate_for: Any) -> None:
    gate = gate_for([READ, reply(b"{}", status="404 Not Found"), READ, reply(),
                     READ, reply(b"{}", status="500 Oh")])
    for label in ("other", "gpt-new", "gpt-new"):
        gate.call(chat(model="gpt-new"))
        assert gate.access()["model"] == label
    assert gate.total("llm_requests_total", model="gpt-new") == 2


def test_strangers_make_no_series(gate_for: Any) -> None:
    gate = gate_for(always(lambda sent: reply(b"{}", status="404 Not Found")))
    client = gate.client()

    def ask(number: int) -> None:
        for asked in (
                request(chat(model=f"gpt-{number}")), request(chat(model=f"no-{number}")),
                request(chat(), key=f"no-such-key-{number:09}"), request(path=f"/no/{number}"),
                request(chat(), path=f"{PATH}?q={number}"), request(method=f"M{number}"),
                request(method="GET", path=f"/v1/models/{number}")):
            assert client.send(asked).answer().status >= 400
            gate.access()

    ask(0)
    before = set(gate.series(".*"))
    for number in range(1, 30):
        ask(number)
    assert set(gate.series(".*")) == before


def test_under_the_cap_names_count_and_above_it_none(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    client = gate.client()
    for number in range(105):
        client.send(request(chat(model=f"gpt-{number}"))).answer()
        gate.access()
    assert len(gate.series("llm_requests_total")) == 101
    assert gate.total("llm_requests_total", model="other") == 5


def test_sums_are_exact(gate_for: Any) -> None:
    """Tokens and money equal the sum of what the provider reported."""
    def answer(sent: Sent) -> bytes:
        asked = json.loads(sent.body)
        usage = {"prompt_tokens": asked["seed"], "completion_tokens": 3 * asked["seed"]}
        if asked["stream"]:
            return streamed(FIRST, LAST, event({"choices": [], "usage": usage}), FINAL)
        return reply(json.dumps({"usage": usage}).encode())

    gate = gate_for(always(answer), models={"house": {
        "provider": "openai", "cost_per_million_input": 0.15, "cost_per_million_output": 0.6}})
    client = gate.client()
    for seed in range(1, 101):
        assert client.send(request(chat(seed % 3 == 0, seed=seed))).answer().status == 200
        gate.access()
    total = sum(range(1, 101))
    assert gate.total("llm_tokens_total", direction="prompt") == total
    assert gate.total("llm_tokens_total", direction="completion") == 3 * total
    (cost,) = gate.series("llm_cost_dollars_total").values()
    assert cost == round(total * (0.15 + 3 * 0.6) / 1e6, 9)


# ---- the log ----


def test_an_access_line(gate_for: Any) -> None:
    gate = gate_for(always(reply(REPLY, "x-request-id: req-up")))
    gate.get("/health")
    body = chat()
    answer = gate.call(body)
    line = gate.access()
    assert list(line) == [
        "time", "level", "msg", "request_id", "method", "path", "status", "duration_ms",
        "virtual_key", "provider", "model", "stream", "prompt_tokens", "completion_tokens", "cost",
        "usage", "bytes_in", "bytes_out", "upstream_request_id"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert {key: line[key] for key in ("level", "msg", "method", "path", "status", "provider",
                                       "virtual_key", "model", "stream", "bytes_in")} == {
        "level": "INFO", "msg": "access", "method": "POST", "path": PATH, "status": "200",
        "provider": "openai", "virtual_key": "chatbot", "model": "house", "stream": "false",
        "bytes_in": str(len(body))}
    assert int(line["bytes_out"]) > len(answer.body)
    assert 0 <= float(line["duration_ms"]) < 1000 * WAIT


def test_an_access_line_as_json(gate_for: Any) -> None:
    gate = gate_for(always(reply()), log="json", log_headers=["X-User"])
    gate.call(chat(True), 'x-user: "a" = b\\')
    line = json.loads(gate.log.get(timeout=WAIT))
    assert list(line)[:12] == ["time", "level", "msg", "request_id", "method", "path", "status",
                               "duration_ms", "virtual_key", "provider", "model", "stream"]
    assert (line["status"], line["stream"], line["x-user"]) == (502, True, '"a" = b\\')


def test_the_length_of_a_body_can_be_logged(gate_for: Any) -> None:
    """Also of a head that was remembered without it."""
    gate = gate_for(always(reply()), log="json", log_headers=["Content-Length"])
    for text in ("Hi", "Hello"):
        body = json.dumps({"model": "house", "messages": [], "user": text}).encode()
        assert gate.call(body).status == 200
        assert json.loads(gate.log.get(timeout=WAIT))["content-length"] == str(len(body))


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics"])
def test_good_probes_are_logged_only_on_demand(gate_for: Any, path: str) -> None:
    quiet, loud = gate_for(), gate_for(log_probes=True)
    for gate, seen in ((quiet, "/v1/models"), (loud, path)):
        gate.get(path)
        gate.get("/v1/models")
        assert gate.access()["path"] == seen
    assert quiet.call(method="PUT", path=path).status == 405
    assert quiet.access()["path"] == path


NASTY = 'x" status=200 msg="forged \\ \t\x80\x85\xa0'


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_request_forges_a_line(gate_for: Any, form: str) -> None:
    gate = gate_for(log=form, log_headers=["x-user"])
    path = "/v1/%0d%0atime=now%20level=INFO%1b%5b31m%e2%80%a8%c2%85%22%00%ff" + "y" * 2000
    gate.call(chat(model="a\nb"), f"x-user: {NASTY}", path=path)
    raw = gate.log.get(timeout=WAIT)
    gate.get("/v1/models")
    assert "/v1/models" in gate.log.get(timeout=WAIT)  # the next line is the next request's
    line = parse_log(raw) if form == "text" else json.loads(raw)
    assert re.fullmatch(r"[ -~]+\n", raw) and len(raw) < 4096
    assert (line["x-user"], str(line["status"])) == (NASTY, "404")
    assert "\r\ntime=now" in line["path"]


def test_a_failure_that_nobody_foresaw(gate_for: Any, monkeypatch: Any) -> None:
    gate = gate_for()

    def fail(model: str) -> None:
        raise KeyError(PROMPT)

    monkeypatch.setattr(gate.gateway.router, "resolve", fail)
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    line = gate.log_line()
    assert (line["msg"], line["error"]) == ("crash", "KeyError") and "fail" in line["at"]
    assert gate.access()["status"] == "500"


def test_lost_lines_are_counted_and_nothing_waits_for_them(gate_for: Any) -> None:
    """A reader that sleeps, then one that is gone."""
    gate = gate_for(always(reply()), reads_log=False)
    client, path = gate.client(), "/" + "x" * 300
    for _ in range(1000):
        assert client.send(request(method="GET", path=path)).answer().status == 404
    lost = gate.total("llm_log_lines_lost_total")
    assert 0 < lost < 1000
    gate.log_reader.close()
    assert client.send(request(chat())).answer().status == 200
    assert client.send(request(method="GET", path=path)).answer().status == 404
    assert gate.total("llm_log_lines_lost_total") == lost + 2


@pytest.mark.parametrize("taken, kept, lost", [
    ([4000, 4000], 12, 0), ([0, 4000], 5, 7), ([1100, 4000], 7, 5), ([1090, 4000], 6, 6),
    ([4000, 1090], 8, 4), ([1090, 0], 1, 11)])
def test_lines_share_a_write_and_each_that_is_lost_is_counted(
        tmp_path: Any, monkeypatch: Any, taken: list[int], kept: int, lost: int) -> None:
    """Twelve lines of 550 bytes in two writes, of which the disk takes so many bytes."""
    write, room = os.write, iter(taken)
    with open(tmp_path / "log", "wb+") as file:
        log = gateway.Log(file.fileno(), False, time.monotonic, time.time)
        monkeypatch.setattr(gateway.os, "write", lambda fd, data: write(fd, data[:next(room)]))
        log.write(["x" * 549] * 12)
        monkeypatch.undo()
        log.write(["y"])
        whole = (tmp_path / "log").read_bytes().split(b"\n")
    assert (whole.count(b"x" * 549), log.lost, whole[-2:]) == (kept, lost, [b"y", b""])
    assert b"" not in whole[:-1]


def test_one_that_cannot_be_recorded_takes_no_others_with_it(
        gate_for: Any, monkeypatch: Any) -> None:
    gate = gate_for(always(reply()))
    meter = gate.gateway.meter

    def fail(exchange: Any) -> Any:
        if exchange.path == "/v1/odd":
            raise KeyError(PROMPT)
        return meter(exchange)

    monkeypatch.setattr(gate.gateway, "meter", fail)
    paths = ["/v1/chat/completions", "/v1/odd", "/v1/chat/completions"]
    gate.client().send(b"".join(request(chat(), path=path) for path in paths))
    said = sorted(gate.log_line()["msg"] for _ in paths)
    assert said == ["access", "access", "crash"]
    assert gate.total("llm_requests_in_flight") == 0


def test_a_number_of_tokens_that_nobody_has_counted_is_no_reason_to_fail(gate_for: Any) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 10**400, "total_tokens": 1e300}
    gate = gate_for(always(reply(json.dumps({"choices": [], "usage": usage}).encode())))
    assert gate.call(chat(model="house")).status == 200
    line = gate.access()
    assert (line["prompt_tokens"], line["completion_tokens"]) == ("7", str(1 << 53))


@pytest.mark.parametrize("error", [None, KeyError])
def test_what_ended_is_recorded_before_its_last_bytes_go_out(error: Any) -> None:
    said: list[Any] = []

    def record() -> None:
        said.append("recorded")
        if error:
            raise error

    async def talk() -> None:
        outbox, transport = gateway.Outbox(record), type("", (), {"write": said.append})
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        outbox.put(transport, b"a")
        outbox.put(transport, b"b")
        assert not said
        await asyncio.sleep(0)

    asyncio.run(talk())
    assert said == ["recorded", b"a", b"b"]


def test_a_refused_head_is_logged_with_what_went_out_and_no_words_of_pythons(gate_for: Any) -> None:
    gate = gate_for()
    answer_ = gate.client().send(b"nonsense\r\n\r\n").answer()
    line = gate.access()
    assert (answer_.status, line["status"], "Error" in line["error"]) == (400, "400", False)
    assert int(line["bytes_out"]) > len(answer_.body)


def test_a_key_in_the_place_of_a_models_name_is_not_logged(gate_for: Any) -> None:
    gate = gate_for()
    assert gate.get(f"/v1/models/{NARROW_KEY}").status == 404
    line = gate.access()
    assert line["path"] == "/v1/models/***" and NARROW_KEY not in str(line)


# ---- Messages, passed ----

def named(*events: dict[str, Any]) -> bytes:
    return b"".join(b"event: %b\n%b" % (each["type"].encode(), event(each)) for each in events)


OPENING = named({"type": "message_start", "message": {"id": "msg_1", "usage": {
    "input_tokens": 900, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 40,
    "output_tokens": 1}}})
SAID = named({"type": "content_block_start", "index": 0, "content_block": {
    "type": "text", "text": ""}}, {"type": "ping"}, {"type": "content_block_delta", "index": 0,
                                   "delta": {"type": "text_delta", "text": COMPLETION}})
CLOSING = named({"type": "content_block_stop", "index": 0}, {
    "type": "message_delta", "delta": {"stop_reason": "end_turn"},
    "usage": {"output_tokens": 200, "cache_read_input_tokens": None}}, {"type": "message_stop"})
TOLD = OPENING + SAID + CLOSING
OVERLOADED = named({"type": "error", "error": {"type": "overloaded_error", "message": "Full"}})
MESSAGES = "/v1/messages"


@pytest.fixture
def messages_gate(gate_for: Any) -> Callable[..., Gate]:
    return lambda *scripts: gate_for(*scripts, provider={"kind": "anthropic"})  # type: ignore


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_a_message_is_watched_however_it_is_cut(size: int) -> None:
    watch, cutter = gateway.DIALECTS["messages"].watch(False, True), gateway.EventCutter(1 << 20)
    stream, seen = TOLD + OVERLOADED, b""
    for at in range(0, len(stream), size):
        block = cutter.feed(stream[at:at + size])
        seen += watch.feed(block) if block and not watch.ended else b""
        assert watch.has_content is (COMPLETION.encode() in seen)
    assert (seen, watch.ended, watch.failure) == (TOLD, True, None)
    assert watch.usage == Usage(1000, 200, 60, 40)


def test_what_a_message_tells_first_counts() -> None:
    watch = gateway.DIALECTS["messages"].watch(False, True)
    assert watch.feed(OPENING + OVERLOADED + CLOSING) == OPENING + OVERLOADED
    assert watch.failure and not watch.ended


def test_a_message_that_is_left_is_weighed() -> None:
    watch = gateway.DIALECTS["messages"].watch(False, True)
    watch.feed(OPENING + SAID + SAID)
    content = len(json.dumps(COMPLETION)) - 2
    assert watch.usage == Usage(1000, 1, 60, 40) and not watch.ended
    assert 2 * content <= watch.content_bytes <= 2 * content + len(SAID)


@pytest.mark.parametrize("fields, version", [
    ([], "2023-06-01"), (["Anthropic-Version: 2026-10-21"], "2026-10-21")])
def test_messages_pass_with_their_query_and_betas(messages_gate: Any, fields: list[str],
                                                  version: str) -> None:
    odd = ODD.replace(b"%b", b"%s")
    gate = messages_gate(always(reply(b'{"usage": {"input_tokens": 7, "output_tokens": 2}}')))
    answer = gate.call(odd.replace(b"%s", b"house"), "Anthropic-Beta: b-1, a-2", "x-app: cli",
                       *fields, path=f"{MESSAGES}?beta=true")
    sent = gate.upstream.requests.get()
    assert sent.body == odd.replace(b"%s", b"gpt-real")
    assert sent.line == f"POST {MESSAGES}?beta=true HTTP/1.1"
    assert sent.headers["anthropic-beta"] == "b-1, a-2"
    assert (sent.headers["anthropic-version"], sent.headers["x-app"]) == (version, "cli")
    assert sent.headers["x-api-key"] == PROVIDER_KEY and "authorization" not in sent.headers
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert gate.total("llm_tokens_total", direction="prompt") == 7


def test_a_message_streams_byte_for_byte_and_is_counted(messages_gate: Any) -> None:
    gate = messages_gate(always(streamed(OPENING, SAID, CLOSING)))
    assert gate.call(chat(True), path=MESSAGES).body == TOLD
    line = gate.access()
    assert (line["usage"], line["status"], line["cache_read_tokens"]) == ("reported", "200", "60")
    assert gate.total("llm_tokens_total", direction="prompt") == 1000
    assert gate.total("llm_tokens_total", direction="completion") == 200


@pytest.mark.parametrize("pieces, status, kind, logged", [
    ([OVERLOADED], 503, "overloaded_error", "503"),
    ([OPENING, OVERLOADED], 503, "overloaded_error", "503"),
    ([OPENING, SAID, OVERLOADED], 200, "overloaded_error", "503"),
    ([OPENING, SAID], 200, "api_error", "502"),
])
def test_a_message_that_fails_says_so(messages_gate: Any, pieces: list[bytes], status: int,
                                      kind: str, logged: str) -> None:
    gate = messages_gate([READ, streamed(*pieces)])
    answer = gate.call(chat(True), path=MESSAGES)
    last = answer.events[-1] if status == 200 else json.loads(answer.body)
    assert (answer.status, last["type"], last["error"]["type"]) == (status, "error", kind)
    assert gate.access()["status"] == logged
    assert b"message_stop" not in answer.body


def test_a_stream_that_nobody_asked_for_is_no_answer(gate_for: Any) -> None:
    gate = gate_for([READ, streamed(STREAMED)])
    assert gate.call(chat()).status == 502
    assert gate.access()["status"] == "502"


def test_tokens_are_counted_by_the_provider(messages_gate: Any) -> None:
    gate = messages_gate(always(reply(b'{"input_tokens": 3}')))
    answer = gate.call(chat(), path=f"{MESSAGES}/count_tokens?beta=true")
    assert answer.body == b'{"input_tokens": 3}'
    assert gate.upstream.requests.get().line.split()[1] == f"{MESSAGES}/count_tokens?beta=true"


@pytest.mark.parametrize("path, fields, key, status, kind", [
    (MESSAGES, [], "", 401, "authentication_error"),
    (MESSAGES, [], NARROW_KEY, 403, "permission_error"),
    ("/v1/models/nope", ["anthropic-version: 2023-06-01"], NARROW_KEY, 403, "permission_error"),
    ("/v1/nothing", ["anthropic-version: 2023-06-01"], "", 404, "not_found_error"),
])
def test_a_refusal_is_in_the_callers_dialect(gate_for: Any, path: str, fields: list[str], key: str,
                                             status: int, kind: str) -> None:
    method = "GET" if "models" in path else "POST"
    answer = gate_for([]).call(chat(model="gpt-x"), *fields, path=path, key=key, method=method)
    told = json.loads(answer.body)
    assert (answer.status, told["type"], told["error"]["type"]) == (status, "error", kind)
    assert told["request_id"] == answer.headers["request-id"]




def test_models_are_listed_in_the_callers_dialect(gate_for: Any) -> None:
    gate = gate_for([], models={name: {"provider": "openai"} for name in "abc"})
    page = json.loads(gate.get("/v1/models?limit=1000", "anthropic-version: x").body)
    assert [entry["display_name"] for entry in page["data"]] == ["a", "b", "c"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "a", "c")
    assert json.loads(gate.get("/v1/models").body)["object"] == "list"
    assert json.loads(gate.get("/v1/models/a", "anthropic-version: x").body)["type"] == "model"


# ---- endpoints whose bytes pass ----


def test_embeddings_pass_and_are_counted(gate_for: Any) -> None:
    answered = b'{"data": [{"embedding": [0.10, 1e-7]}], "usage": {"prompt_tokens": 8}}'
    gate = gate_for(always(reply(answered)))
    answer = gate.call(b'{"input": ["\\u00e9"], "model": "house"}', path="/v1/embeddings")
    assert answer.body == answered
    sent = gate.upstream.requests.get()
    assert sent.line.split()[1] == "/v1/embeddings"
    assert sent.body == b'{"input": ["\\u00e9"], "model": "gpt-real"}'
    assert gate.total("llm_tokens_total", direction="prompt") == 8
    assert gate.access()["usage"] == "reported"


def test_completions_stream_and_are_counted(gate_for: Any) -> None:
    said = [event({"choices": [{"index": 0, "text": COMPLETION, "finish_reason": None}]}),
            event({"choices": [], "usage": USAGE}), FINAL]
    gate = gate_for(always(streamed(*said)))
    body = b'{"model": "house", "prompt": "x", "stream": true}'
    assert gate.call(body, path="/v1/completions").body == said[0] + said[2]
    assert json.loads(gate.upstream.requests.get().body)["stream_options"]["include_usage"]
    assert gate.access()["completion_tokens"] == "200"


def test_a_provider_without_the_endpoint_is_named_no_further(messages_gate: Any) -> None:
    answer = messages_gate([]).call(b'{"model": "house"}', path="/v1/embeddings")
    assert (answer.status, answer.error["param"]) == (404, "model")


# ---- what once went wrong ----


def test_comments_are_told_from_events_in_one_way_only() -> None:
    """A pattern that can match them in two takes twice as long for each more."""
    assert gateway.COMMENTS.fullmatch(b": PROCESSING\n\n" * 2000 + b"data: x") is None
    assert gateway.COMMENTS.fullmatch(b": PROCESSING\n\n:\r\n\r\n" * 2000)


def test_many_comments_before_a_stream_hold_nobody_up(gate_for: Any) -> None:
    gate = gate_for([READ, streamed(b": PROCESSING\n\n" * 500, STREAMED)])
    answer = gate.call(chat(stream=True))
    assert answer.body == b": PROCESSING\n\n" * 500 + STREAMED


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_under_a_200_tells_no_key(gate_for: Any, stream: bool) -> None:
    told = {"error": {"message": f"Bad key {PROVIDER_KEY}", "type": "server_error"}}
    answer = streamed(event(told)) if stream else reply(json.dumps(told).encode())
    gate = gate_for([READ, answer], provider={"wire": "chat"})
    body = {"max_tokens": 99, **json.loads(chat(stream=stream))}
    answer_ = gate.call(json.dumps(body).encode(), path=MESSAGES)
    assert answer_.status >= 500 and PROVIDER_KEY.encode() not in answer_.body


def test_a_bad_head_behind_a_stream_gets_an_answer_of_its_own(gate_for: Any) -> None:
    gate = gate_for(always(streamed(STREAMED)))
    client = gate.client().send(request(chat(stream=True)))
    assert client.answer().status == 200
    assert client.send(b"GET /health HTTP/1.1\r\nHost : gw\r\n\r\n").answer().status == 400


@pytest.mark.parametrize("named", ["xboundary=A; boundary=B", "boundary=A; boundary=B", "", "x=A"])
def test_a_form_has_one_boundary(named: str) -> None:
    with pytest.raises(GatewayError) as caught:
        gateway.Form(b"--A\r\n\r\n\r\n--A--", f"multipart/form-data; {named}")
    assert caught.value.status == 400


def test_an_upload_is_no_overhead(gate_for: Any) -> None:
    gate = gate_for([READ, reply()])
    sent = request(chat())
    client = gate.client().send(sent[:-5])
    gate.settle()
    gate.skew += 5
    assert client.send(sent[-5:]).answer().status == 200
    assert gate.access()["status"] == "200"
    assert gate.total("llm_overhead_seconds_sum") < 4


@pytest.mark.parametrize("name", TRANSLATED)
def test_an_error_of_many_lines_is_one_event(name: str) -> None:
    pretty = json.dumps({"error": {"message": "No", "type": "server_error"}}, indent=2).encode()
    told = gateway.DIALECTS[name].error_event(b" ".join(pretty.splitlines()))
    *before, event_ = decoded([told])
    assert "No" in json.dumps(json.loads(event_))
    assert [json.loads(each)["type"] for each in before] == (
        ["response.created", "response.in_progress"] if name == "responses" else [])


WORD = event({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})


def test_comments_without_end_are_passed_on(gate_for: Any) -> None:
    pings = b": ping\n\n" * 10_000
    gate = gate_for(always(streamed(pings, WORD, FINAL)), limits={"event": 4096})
    assert gate.call(chat(stream=True)).body == pings + WORD + FINAL


def test_a_burst_of_events_is_no_large_one(gate_for: Any) -> None:
    gate = gate_for(always(streamed(*[WORD] * 100, FINAL)), limits={"event": 4096})
    assert gate.call(chat(stream=True)).body == WORD * 100 + FINAL


def test_a_mark_that_is_absent_is_looked_for_once() -> None:
    class Counted(bytes):
        looks = 0

        def find(self, mark: Any, *place: Any) -> int:
            Counted.looks += mark == b'"error"'
            return bytes.find(self, mark, *place)

    watch = gateway.DIALECTS["messages"].watch(False, True)
    watch.feed(Counted(wire_events([{"type": "message_delta"}] * 100)))
    assert Counted.looks == 1


def test_nothing_follows_the_last_chunk(gate_for: Any) -> None:
    """Where a coding's own end is missing behind the stream's."""
    packed = zlib.compressobj(wbits=31)
    first = packed.compress(WORD) + packed.flush(zlib.Z_SYNC_FLUSH)
    last = (packed.compress(FINAL) + packed.flush())[:-4]
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    gate = gate_for([READ, head + chunks(first), GO, chunks(last) + END], serving(reply()))
    client = gate.client().send(request(chat(stream=True)))
    assert client.head()[0] == 200
    gate.upstream.go.release()
    assert client.file.read(len(chunks(WORD) + chunks(FINAL) + END)) == (
        chunks(WORD) + chunks(FINAL) + END)
    assert client.send(request(chat())).answer().status == 200


@pytest.mark.parametrize("came, is_bare", [
    (b"GET / HTTP/1.1\nHost: x\n\n", True), (b"GET / HTTP/1.1\r\nHost: x\n\r\n", True),
    (b"GET / HTTP/1.1\r\nHost: x\r\n", False),
    (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n{\n\n}\n\r\n", False)])
def test_blank_lines_in_a_body_are_no_bare_head(came: bytes, is_bare: bool) -> None:
    wire = gateway.Wire(1000, gateway.Outbox())
    wire.buffer += came
    assert wire.has_bare_head() == is_bare


def test_a_connection_that_nobody_waits_for_any_more_is_dropped(gate_for: Any) -> None:
    """It is made in the turn of the loop in which its request is cancelled."""
    async def leave() -> list[Any]:
        pool, dropped = gate.gateway.pool, []  # type: Any, list[Any]
        pool._open_connection = lambda origin: asyncio.sleep(0, "made")
        pool.drop = dropped.append
        provider = next(iter(gate.gateway.config.providers.values()))
        task = asyncio.ensure_future(pool._connect(provider, 10))
        for _ in range(2):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert task.cancelled()
        return dropped

    gate = gate_for([])
    assert asyncio.run_coroutine_threadsafe(leave(), gate.loop).result(WAIT) == ["made"]


def test_the_refused_hold_no_place(gate_for: Any) -> None:
    gate = gate_for(always(reply()), limits={"connections": 1})
    first = gate.client().send(request(method="GET", path="/health"))
    assert first.answer().status == 200
    refused = [gate.client().send(request(method="GET", path="/health")) for _ in range(3)]
    assert [client.answer().status for client in refused] == [503] * 3
    assert len(gate.server._clients) == 1 and all(client.is_closed() for client in refused)
    first.close()
    eventually(lambda: not gate.server._clients)
    assert gate.get("/health").status == 200


def test_what_is_announced_counts_as_it_comes(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    idle = [gate.client().send(posted("Content-Length: 33554432")) for _ in range(8)]
    gate.settle()
    assert gate.call(chat()).status == 200 and len(idle) == 8


@pytest.mark.parametrize("length", [1, 2])
def test_a_body_of_many_steps_is_whole(gate_for: Any, length: int) -> None:
    gate = gate_for(serving(reply()))
    body = chat(x="y" * (length * (1 << 16) + 7))
    assert gate.call(body).status == 200
    assert gate.upstream.requests.get(timeout=WAIT).body == body.replace(b"house", b"gpt-real", 1)
    eventually(lambda: gate.server.bodies.held == 0)


def test_arguments_without_end_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(gateway, "MAX_KEPT_CHARACTERS", 1000)
    start = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}
    more = {"index": 0, "function": {"arguments": "x" * 100}}
    chunks_ = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]}
               for piece in [start, *[more] * 10]]
    with pytest.raises(GatewayError, match="too much"):
        chat_parsed("chat", map(event, chunks_))


@pytest.mark.parametrize("body, message", [
    (b'{"detail": "No luck"}', "No luck"), (b'[{"error": {"message": "Broken"}}]', "Broken"),
    (b'{"error": "Broken"}', "Broken"), (b"<html>", "html")])
@pytest.mark.parametrize("name", TRANSLATED)
def test_an_error_after_a_keepalive_is_an_error(name: str, body: bytes, message: str) -> None:
    exchange = gateway.Exchange("gw-1", 0.0)
    exchange.dialect, exchange.is_stream = gateway.DIALECTS[name], True
    made = gateway.make_gateway(parsed(BASE), LISTS, gateway.Metrics(),
                                gateway.Log(1, False, time.monotonic, time.time))
    signed = made.signed(exchange, gateway.Response(422, [], body))
    last = json.loads(decoded([signed.event])[-1])
    error = last.get("response", last)["error"]
    assert message in json.dumps(error) and isinstance(error, dict)


@pytest.mark.parametrize("body", [
    b'{"error": {"message": "x", "type": "invalid_request_error", "code": "invalid_api_key"}}',
    b'{"error": {"message": "Incorrect API key provided: sk***ef"}}'])
@pytest.mark.parametrize("status", [400, 403])
def test_a_bad_key_is_told_in_our_words_whatever_its_status(
        gate_for: Any, status: int, body: bytes) -> None:
    gate = gate_for(always(reply(body, status=f"{status} No")))
    answer = gate.call(chat())
    assert (answer.status, answer.error["type"]) == (502, "upstream_auth_error")
    assert answer.headers["x-should-retry"] == "false"


def test_a_bad_key_in_a_stream_is_told_in_our_words(gate_for: Any) -> None:
    said = event({"error": {"message": "x", "type": "invalid_request_error",
                            "code": "invalid_api_key"}})
    answer = gate_for(always(streamed(said))).call(chat(stream=True))
    assert (answer.status, answer.error["type"]) == (502, "upstream_auth_error")


@pytest.mark.parametrize("name", ["key", "k%65y", "%6bey"])
def test_a_key_in_a_query_goes_no_further(gate_for: Any, name: str) -> None:
    gate = gate_for(serving(reply(b"{}")), provider={"kind": "gemini"}, api_keys=ALL_OPEN)
    for path in ("/v1beta/models/house:generateContent", "/openai/v1beta/files"):
        gate.client().send(request(b'{"contents": []}', path=f"{path}?{name}={APP_KEY}&monkey=1",
                                   key="")).answer()
        assert gate.upstream.requests.get(timeout=WAIT).line.split()[1].endswith("?monkey=1")


def test_a_lost_name_that_no_header_can_hold_is_escaped(gate_for: Any) -> None:
    gate = gate_for(always(reply()), provider={"drop": ["\u65e5"]})
    answer = gate.call(b'{"model": "house", "messages": [], "\xe6\x97\xa5": 1}')
    assert (answer.status, answer.headers["x-gateway-lost"]) == (200, "\\u65e5")


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.raises(OSError, match="no socket"):
        gateway.open_unix_socket(str(path))
    assert path.read_text() == "x"


@pytest.mark.parametrize("value, counted", [(10.0, 10), (0.5, 0), (True, 0), (-1, 0), ("1", 0)])
def test_whole_numbers_are_counted(value: object, counted: int) -> None:
    assert gateway.count(value) == counted


def test_a_line_fits_into_a_pipe() -> None:
    long = "\U0001f600" * 300
    for line in (gateway.render_log([("path", long)]), gateway.render_json_log([("path", long)])):
        assert len(line) < 600


# ---- any dialect in front of any ----

KIND_OF = {"chat": "openai-compatible", "responses": "openai", "messages": "anthropic",
           "gemini": "gemini"}
PATH_OF = {"chat": PATH, "responses": "/v1/responses", "messages": MESSAGES}
TOOL = Tool("f", "Finds", CHAT_SHAPE)
ASKED_TURNS = [
    Turn("system", [Text(text="Be brief.")]),
    Turn("user", [Text(text="What is this?"), Image(media_type="image/png", data="aGk=")]),
    Turn("assistant", [Text(text="I look."), ToolCall(id="call_1", name="f", arguments={"x": "é"}),
                       ToolCall(id="call_2", name="f")]),
    Turn("user", [ToolResult(id="call_1", content=[Text(text="one")]),
                  ToolResult(id="call_2", content=[Text(text="two")]), Text(text="And now?")])]
SAID_BLOCKS: list[Block] = [
    Text(text="Again \u2028."), ToolCall(id="call_3", name="f", arguments={"x": "y" * 99}),
    ToolCall(id="call_4", name="f")]


@contextlib.contextmanager
def no_circles() -> Iterator[None]:
    """What is done here leaves none of our objects to the collector: those wait for it, with the
    bodies that they hold, and it takes its time from every other exchange."""
    gc.collect()
    gc.disable()
    older = set(map(id, gc.get_objects()))  # another test's gateway may be left only now
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [each for each in gc.garbage if id(each) not in older
                and type(each).__module__ == gateway.__name__]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("wire", TRANSLATED)
@pytest.mark.parametrize("client", TRANSLATED)
def test_any_dialect_stands_in_front_of_any(gate_for: Any, client: str, wire: str,
                                            stream: bool) -> None:
    """What was asked arrives, what is said comes back, and every token is counted."""
    speaks, hears = gateway.DIALECTS[client], gateway.DIALECTS[wire]
    reply_ = Reply("1", "up", SAID_BLOCKS, "tool_calls", Usage(30, 9, 10, 0, 0, 4))
    if stream:
        renderer = hears.renderer(Chat("up", [], include_usage=True), 7)
        answer = streamed(*filter(None, map(renderer.feed, gateway.events_of(reply_))))
    else:
        answer = reply(gateway.dump_json(hears.render_reply(reply_, Chat("up", []), 7)))
    gate = gate_for([READ, answer], provider={"kind": KIND_OF[wire]}, models={"house": {
        "provider": "openai", "model": "up", **({"wire": wire} if wire == "responses" else {})}})
    asked = Chat("house", ASKED_TURNS, tools=[TOOL], max_tokens=99, stream=stream)
    body, _ = speaks.render_request(asked, Target("house", CAPS_OF[client]), Losses())
    path = PATH_OF.get(client) or "/v1beta/models/house:" + (
        "streamGenerateContent?alt=sse" if stream else "generateContent")
    with no_circles():
        answer_ = gate.call(gateway.dump_json(body), path=path)
        assert answer_.status == 200, answer_.body
        assert gate.access()["usage"] == "reported"
    came = json.loads(gate.upstream.requests.get(timeout=WAIT).body)
    heard = hears.parse_request({"model": "up", "stream": stream, **came}, Losses())
    assert [kept(turn) for turn in heard.turns] == [kept(turn) for turn in ASKED_TURNS]
    assert [tool.name for tool in heard.tools] == ["f"]
    told = gateway.collect(chat_parsed(client, [answer_.body])) if stream else (
        speaks.parse_reply(json.loads(answer_.body), Rewrites()))
    assert (told.blocks, told.finish) == (SAID_BLOCKS, "tool_calls")
    assert (told.usage.input, told.usage.output, told.usage.cache_read) == (30, 9, 10)
    assert gate.total("llm_tokens_total", direction="prompt") == 30


REFUSED: dict[str, JSON] = {
    "messages": {"type": "error", "error": {"type": "authentication_error", "message": "bad key"}},
    "gemini": {"error": {"code": 401, "status": "UNAUTHENTICATED", "message": "bad key"}},
    "chat": {"error": {"code": "invalid_api_key", "message": "bad key"}}}


@pytest.mark.parametrize("is_later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("wire", list(REFUSED))
@pytest.mark.parametrize("client", TRANSLATED)
def test_our_refused_key_is_no_fault_of_a_streams_client(
        gate_for: Any, client: str, wire: str, is_later: bool) -> None:
    if client == wire:
        return
    renderer = gateway.DIALECTS[wire].renderer(Chat("m", []), 7)
    said = [Start("id", "m"), BlockStart(Text()), TextDelta("a")]
    opening = list(filter(None, map(renderer.feed, said))) if is_later else []
    gate = gate_for([READ, streamed(*opening, event(REFUSED[wire]))],
                    provider={"kind": KIND_OF[wire]},
                    models={"house": {"provider": "openai", "model": "up"}})
    answer_ = gate.client().send(asking(client)).answer()
    assert answer_.status == (200 if is_later else 502)
    assert b"bad key" not in answer_.body and b"refused the gateway's key" in answer_.body
    if not is_later:
        assert answer_.headers["x-should-retry"] == "false"
    assert "bad key" not in str(gate.access())


@pytest.mark.parametrize("client", ["messages", "gemini"])
def test_a_stream_may_end_without_done_in_another_dialect(gate_for: Any, client: str) -> None:
    last = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    gate = gate_for([READ, streamed(FIRST, delta(), last)],
                    provider={"kind": "openai-compatible", "done": False},
                    models={"house": {"provider": "openai", "model": "up"}})
    told = gateway.collect(chat_parsed(client, [gate.client().send(asking(client)).answer().body]))
    assert (told.blocks, told.finish) == ([Text(text=COMPLETION)], "stop")


def test_an_error_in_an_array_is_read(gate_for: Any) -> None:
    told = [{"error": {"code": 429, "message": "quota", "status": "RESOURCE_EXHAUSTED", "details": [
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "30.2s"}]}}]
    answer_ = reply(json.dumps(told).encode(), status="429 No")
    gate = gate_for(always(answer_), provider={"kind": "gemini"},
                    models={"house": {"provider": "openai", "model": "up"}})
    got = gate.call(chat(True, model="house"))
    assert (got.status, got.headers["retry-after"], got.error["message"]) == (429, "31", "quota")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_what_is_lost_of_an_answer_is_told(gate_for: Any, stream: bool) -> None:
    picture = {"inlineData": {"mimeType": "image/png", "data": "aGk="}}
    body = gateway.dump_json(generated("a", picture))
    gate = gate_for(always(streamed(event(generated("a", picture))) if stream else reply(body)),
                    provider={"kind": "gemini"},
                    models={"house": {"provider": "openai", "model": "up"}})
    got = gate.call(chat(stream, model="house"))
    assert got.status == 200
    assert stream or got.headers["x-gateway-lost"] == "parts"
    assert gate.access() and gate.total("llm_params_dropped_total", param="parts") == 1


def kept(turn: Turn) -> list[Any]:
    """What stays of a turn in every dialect."""
    return [turn.role, *((type(block), getattr(block, "text", ""), getattr(block, "arguments", ""))
                         for block in turn.blocks)]


# ==================================================================================================
# 13. Server
# ==================================================================================================

LINE, HOST, AUTH = f"POST {PATH} HTTP/1.1", "Host: gw", f"Authorization: Bearer {APP_KEY}"


def head_of(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def posted(*lines: str, body: bytes = b"") -> bytes:
    """A request whose head is good but for these lines."""
    return head_of(LINE, HOST, AUTH, *lines) + body


LENGTH = f"Content-Length: {len(chat())}"
TE, SPLIT = "Transfer-Encoding: chunked", chunks(chat())
MALFORMED: dict[str, bytes] = {
    **{f"the line {line!r}": head_of(line, HOST, AUTH) for line in (
        f"POST {PATH}", f"POST {PATH} HTTP/2.0", f"POST {PATH} HTTP/1.10", f"POST {PATH} HTTP/0.9",
        f"POST {PATH} http/1.1", f"POST {PATH} HTTP/1", f"POST {PATH} HTTP/1.1 ", f" {LINE}",
        f"POST  {PATH} HTTP/1.1", f"POST\t{PATH} HTTP/1.1", f"POST {PATH}  HTTP/1.1",
        f"P@ST {PATH} HTTP/1.1", f"{PATH} HTTP/1.1", f"POST {PATH}\x01 HTTP/1.1",
        f"POST {PATH}\xe9 HTTP/1.1", f"POST {PATH} x HTTP/1.1", "PRI * HTTP/2.0", "\x16\x03\x01",
        "CONNECT example.org:443 HTTP/1.1", "GET xopenai HTTP/1.1", f"POST {PATH[1:]} HTTP/1.1")},
    **{f"the field {field!r}": posted(field, LENGTH, body=chat()) for field in (
        "X: a\r\n b", "X: a\r\n\tb", "X: a\rb", "X: a\nY: b", "X: a\x00b", "X : a", "X\t: a", ": a",
        "X(Y): a", "X\xe9: a", "no colon", " X: a", "X: a\x7fb", "X: \x1b[1m", "X: a\r\n\r")},
    "bare LFs": head_of(LINE, HOST, AUTH, LENGTH).replace(b"\r", b"") + chat(),
    "no Host": head_of(LINE, AUTH, LENGTH) + chat(),
    "two Hosts": posted(HOST, LENGTH, body=chat()),
    "two empty Hosts": head_of(LINE, "Host:", "Host:", AUTH, LENGTH) + chat(),
    "a Host with a space": head_of(LINE, "Host: a b", AUTH, LENGTH) + chat(),
    "a Host with a path": head_of(LINE, "Host: a/b", AUTH, LENGTH) + chat(),
    **{f"the length {value!r}": posted(f"Content-Length:{value}", body=chat()) for value in (
        " +5", " -5", " 5 5", " 0x5", " 5_0", " 1e2", "", " 5, 6", " \xb2", " 5;", " 5.0",
        " 18446744073709551621" * 3, " 9" * 40)},
    "two lengths that differ": posted(LENGTH, "Content-Length: 9", body=chat()),
    "both lengths": posted(LENGTH, TE, body=SPLIT + END),
    "both lengths, turned": posted(TE, LENGTH, body=SPLIT + END),
    **{f"the coding {coding!r}": posted(f"Transfer-Encoding:{coding}", body=SPLIT) for coding in (
        " gzip, chunked", " chunked, gzip", " identity", " xchunked", " chunked;q=1", "",
        " chunked, chunked", ' "chunked"', " chunked,", " chunked\x0b")},
    "two codings": posted(TE, TE, body=SPLIT + END),
    "a chunked HTTP/1.0": head_of(f"POST {PATH} HTTP/1.0", HOST, AUTH, TE) + SPLIT + END,
    **{f"the chunk {chunk[:12]!r}": posted(TE, body=chunk) for chunk in (
        b"80000000\r\n", b"ffffffffff\r\n", b"-1\r\n", b"+5\r\nhello", b"0x5\r\nhello",
        b" 5\r\nhello", b"5\nhello\r\n", b"5\n\nhello\r\n", b"g\r\n", b"\r\n", b"5\r\nhello5\r\n",
        b"5\r\nhell\r\n0\r\n",
        b"5\r\nhello\n0\r\n\r\n", b"5;\x00\r\nhello", b"5;a\nb\r\nhello", b"5 5\r\nhello")},
    "endless extensions": posted(TE, body=b"1;" + b"x" * (30 << 10)),
    "endless short extensions": posted(TE, body=(b"1;" + b"x" * 500 + b"\r\nx\r\n") * 60),
    "endless trailers": posted(TE, body=SPLIT + b"0\r\n" + b"x: y\r\n" * 6000),
    "one endless trailer": posted(TE, body=SPLIT + b"0\r\nx: " + b"y" * (30 << 10)),
    "a bad trailer": posted(TE, body=SPLIT + b"0\r\nx : y\r\n\r\n"),
    "a folded trailer": posted(TE, body=SPLIT + b"0\r\nx: y\r\n z\r\n\r\n"),
}
SMUGGLED = request(method="GET", path="/health")


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_ends_the_connection(gate_for: Any, name: str) -> None:
    gate = gate_for(always(reply()), timeouts={"head": 0.2, "body": 0.2})
    client = gate.client().send(MALFORMED[name] + SMUGGLED)
    answer = client.answer()
    assert 400 <= answer.status < 500 and answer.error["type"]
    assert answer.headers["connection"] == "close"
    assert client.is_closed()  # and nothing of what followed was answered
    assert gate.access()["status"] == str(answer.status)
    assert gate.upstream.connects == 0
    assert gate.get("/health").status == 200


def test_odd_but_good_requests(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    body = chat()
    for sent in (
        b"\r\n\r\n" + request(body), request(body, "X:", "Y:\t a\x80\xff \t"),
        request(body, "content-length:  %d\t" % len(body)), request(body, *["X: y"] * 90),
        posted(TE, body=b"00%X ;a=b; c=\"d\"\r\n%b\r\n00\r\nx: y\r\nz:\r\n\r\n" % (
            len(body), body)),
        posted("transfer-encoding: Chunked", body=chunks(*(body[at:at + 1] for at in range(
            len(body)))) + END),
        head_of(f"POST {PATH} HTTP/1.0", AUTH, LENGTH) + body,
        head_of(LINE, "Host:", AUTH, LENGTH) + body,
        request(body, path=f"http://gw.example:80{PATH}"), request(body, "Connection: x"),
        request(body, path="/v1/ch%61t/completions"), request(body, path=f"{PATH}?q=1&x=%20"),
    ):
        assert gate.client().send(sent).answer().status == 200, sent


@pytest.mark.parametrize("sent, status, limits", [
    (head_of(LINE, HOST, AUTH, *["X: y"] * 101), 431, {}),
    (head_of(LINE, HOST, AUTH, "X: " + "y" * (65 << 10)), 431, {}),
    (head_of(LINE, HOST, "X: " + "y" * 300), 431, {"head": 200}),
    (head_of(LINE, *["X: y"] * 9), 431, {"fields": 8}),
    (b"y" * (65 << 10), 431, {}),
    (head_of(f"GET /{'x' * 8192} HTTP/1.1", HOST), 414, {}),
    (head_of(f"GET /{'x' * 100} HTTP/1.1", HOST), 414, {"target": 100}),
    (posted("Content-Length: 33554433"), 413, {}),
    (posted("Content-Length: 33554433", "Expect: 100-continue"), 413, {}),
    (posted("Content-Length: 101"), 413, {"body": 100}),
    (posted("Content-Length: 999999999999999"), 413, {}),
    (posted(TE, body=chunks(bytes(101))), 413, {"body": 100}),
    (posted(TE, "Expect: 100-continue", body=chunks(bytes(101))), 413, {"body": 100}),
    (posted("Content-Encoding: gzip", f"Content-Length: {len(BOMB)}", body=BOMB), 413, {}),
    (posted("Content-Encoding: br", "Content-Length: 9", body=bytes(9)), 415, {}),
    (posted("Content-Encoding: gzip, gzip", "Content-Length: 9", body=bytes(9)), 415, {}),
], ids=range(16))
def test_bounds(gate_for: Any, sent: bytes, status: int, limits: Any) -> None:
    gate = gate_for(limits=limits)
    client = gate.client().send(sent)
    if TE.encode() in sent and b"Expect" in sent:  # how large it is, only its chunks tell
        assert client.head()[0] == 100
    answer = client.answer()
    assert (answer.status, answer.error["type"]) == (status, "invalid_request_error")
    assert gate.access()["status"] == str(status)
    assert gate.upstream.connects == 0
    if status == 415:
        assert "gzip, " in answer.headers["accept-encoding"] and "gzip" in answer.error["message"]


def test_the_largest_that_is_taken(gate_for: Any) -> None:
    gate = gate_for(always(reply()), limits={"body": 5000, "target": 100, "fields": 9})
    body = chat(x="y" * (5000 - len(chat(x=""))))
    assert len(body) == 5000
    assert gate.call(body, path=PATH + "?" + "q" * (99 - len(PATH))).status == 200
    assert gate.call(body, *["X: y"] * 6).status == 200
    assert gate.client().send(posted(TE, body=chunks(body) + END)).answer().status == 200


@pytest.mark.parametrize("fields", [[], ["Expect: 100-continue"]])
def test_no_body_is_read_before_its_key_is_known(gate_for: Any, fields: list[str]) -> None:
    gate = gate_for()
    client = gate.client().send(request(b"", "Content-Length: 33554432", *fields, key="wrong" * 4))
    answer = client.answer()
    assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_a_refused_body_that_still_comes_does_not_cost_the_answer(gate_for: Any) -> None:
    """A close with bytes unread would make the kernel send a reset, which may overtake it."""
    gate = gate_for()
    client = gate.client().send(request(bytes(8 << 20), key="wrong" * 4))
    assert client.answer().status == 401
    assert client.is_closed()


def test_expect_100_continue(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    for fields, body in (([LENGTH], chat()), ([TE], SPLIT + END)):
        client = gate.client().send(posted(*fields, "expect: 100-Continue"))
        assert client.head() == (100, [])
        assert client.send(body).answer().status == 200
        assert client.send(request(chat())).answer().status == 200


def test_all_bodies_together_are_bounded(gate_for: Any) -> None:
    gate = gate_for(always(reply()), limits={"bodies": 10_000})
    large = chat(x="y" * 6000)
    first = gate.client().send(posted(f"Content-Length: {len(large)}", "Expect: 100-continue"))
    assert first.head()[0] == 100
    refused = gate.call(large)
    assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
    refused = gate.client().send(posted(TE, body=chunks(large) + END)).answer()
    assert refused.status == 503
    assert first.send(large).answer().status == 200
    for _ in range(3):
        assert gate.call(large).status == 200
    gate.client().send(posted("Content-Length: 9000", "Expect: 100-continue")).close()
    while gate.access()["status"] != "499":
        pass
    assert gate.call(large).status == 200
    zipped = gzip.compress(chat(x="y" * 12_000))
    assert gate.call(zipped, "Content-Encoding: gzip").status == 503
    assert gate.call(large).status == 200


@pytest.mark.parametrize("sent, what", [
    (b"", ""), (b"P", "head"), (b"POST / HTTP/1.1\r\nHost: x\r\n", "head"), (b"\r\n", ""),
    (posted("Content-Length: 5", body=b"hell"), "body"),
    (posted(TE, body=b"5\r\nhell"), "body"), (posted(TE), "body"),
    (request(method="GET", path="/no", key="") + b"G", "head"),
])
def test_slow_clients(gate_for: Any, sent: bytes, what: str) -> None:
    gate = gate_for(timeouts={"head": 0.2, "body": 0.2, "keep_alive": 0.2})
    client = gate.client().send(sent)
    if b"/no" in sent:
        assert client.answer().status == 404
    if what:
        answer = client.answer()
        assert (answer.status, answer.error["type"]) == (408, "timeout")
        assert what in answer.error["message"] and answer.headers["connection"] == "close"
    assert client.is_closed()
    assert gate.upstream.connects == 0


def test_silent_connections_are_kept_in_mind(gate_for: Any) -> None:
    gate = gate_for([READ, GO])
    gate.client().send(request(chat()))
    gate.upstream.requests.get(timeout=WAIT)
    wires = [*gate.server._clients, *gate.gateway.pool._open]
    kept = [wire.transport.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_KEEPALIVE) for wire in wires]
    assert len(kept) == 2 and all(kept)


def test_tls_on_a_plain_port_is_refused_at_once(gate_for: Any) -> None:
    client = gate_for().client().send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    assert client.answer().status == 400 and client.is_closed()


def test_an_idle_connection_is_closed_in_silence(gate_for: Any) -> None:
    gate = gate_for()
    client = gate.client()
    assert client.send(request(method="GET", path="/health")).answer().status == 200
    gate.later(74)
    assert client.send(request(method="GET", path="/health")).answer().status == 200
    gate.later(76)
    assert client.is_closed()


def test_a_head_has_one_deadline_and_a_body_one_for_each_piece(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    dripping, body = gate.client().send(b"GET /hea"), chat()
    gate.later(6)
    dripping.send(b"lth HTTP/1.1\r\n")
    gate.later(6)
    assert dripping.answer().status == 408
    client = gate.client().send(posted(LENGTH))
    for at in range(0, 50, 10):
        client.send(body[at:at + 10])
        gate.later(20)
    assert client.send(body[50:]).answer().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_is_cut_off(gate_for: Any, stream: bool) -> None:
    body = json.dumps({"x": "y" * (12 << 20)}).encode()
    script = [STREAM_HEAD + chunks(FIRST), flood(50)] if stream else [reply(body)]
    gate = gate_for([READ, *script], timeouts={"write": 0.2})
    client = gate.client(4096).send(request(chat(stream)))
    line = gate.access()
    assert line["status"] == "499"
    gate.gateway.pool.close()
    with pytest.raises((ConnectionError, EOFError, AssertionError)):
        client.answer()


def test_an_old_client_that_never_reads_sees_no_end(gate_for: Any) -> None:
    gate = gate_for([READ, STREAM_HEAD + chunks(FIRST), flood(50)], timeouts={"write": 0.2})
    client = gate.client(4096).send(request(chat(True), version="HTTP/1.0"))
    assert gate.access()["status"] == "499"
    gate.gateway.pool.close()
    with pytest.raises(ConnectionResetError):
        client.file.read()


def test_a_client_that_reads_slowly_is_not(gate_for: Any) -> None:
    body = json.dumps({"x": "y" * (8 << 20)}).encode()
    gate = gate_for([READ, reply(body)])
    client = gate.client(4096).send(request(chat()))
    client.head()
    for _ in range(8):
        client.exactly(1 << 20)
        gate.later(50)
    assert client.exactly(len(body) - (8 << 20))
    assert gate.access()["status"] == "200"


def test_too_many_connections(gate_for: Any) -> None:
    gate = gate_for(limits={"connections": 2})
    first, second = gate.client(), gate.client()
    for client in (first, second):
        assert client.send(request(method="GET", path="/health")).answer().status == 200
    third = gate.client()
    answer = third.answer()
    assert answer.status == 503 and answer.error["message"]
    assert answer.headers["connection"] == "close" and third.is_closed()
    third.close()
    assert gate.access()["status"] == "503"
    assert first.send(request(method="GET", path="/health")).answer().status == 200
    first.close()
    gate.settle()
    assert gate.get("/health").status == 200


def test_pipelined_requests_are_answered_in_order(gate_for: Any) -> None:
    gate = gate_for([READ, GO, reply(b'{"n": 1}'), READ, streamed(FIRST, FINAL), READ,
                     reply(b'{"n": 3}')])
    client = gate.client().send(
        request(chat()), request(chat(True)), request(method="GET", path="/health"),
        request(b"x", path="/no"), posted(TE, body=SPLIT + END), b"\r\n",
        request(method="GET", path="/v1/models"), b"BAD\r\n\r\n", request(method="GET", path="/no"))
    gate.upstream.requests.get(timeout=WAIT)
    assert gate.upstream.requests.empty()
    gate.upstream.go.release()
    assert [client.answer().body for _ in range(2)] == [b'{"n": 1}', FIRST + FINAL]
    assert [client.answer().status for _ in range(2)] == [200, 404]
    assert client.answer().body == b'{"n": 3}'
    assert [client.answer().status for _ in range(2)] == [200, 400]
    assert client.is_closed()


def test_small_unread_bodies_are_skipped(gate_for: Any) -> None:
    gate = gate_for()
    client = gate.client()
    for size in (1, 5000, 60_000):
        client.send(request(bytes(size), key="wrong" * 4))
        assert client.answer().status == 401
        assert client.send(request(b"GET / HTTP/1.1", method="GET", path="/health")
                           ).answer().status == 200
    assert client.send(request(SPLIT + END, TE, path="/no")).answer().status == 404


@pytest.mark.parametrize("path, status, length", [
    ("/health", 200, True), ("/v1/models", 200, True), ("/metrics", 200, True), ("/no", 404, True),
    (PATH, 405, True), ("/v1/models/none", 404, True), ("/", 200, True),
])
def test_a_head_has_no_body(gate_for: Any, path: str, status: int, length: bool) -> None:
    client = gate_for().client()
    client.send(request(method="HEAD", path=path), request(method="GET", path="/health"))
    answer = client.answer(is_head=True)
    assert answer.status == status and (int(answer.headers["content-length"]) > 0) == length
    assert client.answer().body == b'{"status":"ok"}'


def test_a_stream_asks_the_proxy_in_front_to_hold_nothing_back(gate_for: Any) -> None:
    head = STREAM_HEAD.replace(b"\r\n", b"\r\nx-accel-buffering: yes\r\n", 1)
    gate = gate_for([READ, head + chunks(STREAMED) + END, READ, reply()])
    told = [gate.client().send(request(chat(stream))).answer().fields for stream in (True, False)]
    held = [[value for name, value in fields if name == "x-accel-buffering"] for fields in told]
    assert held == [["no"], []]


def test_an_answer_that_is_cut_is_not_whole_to_old_clients_either(gate_for: Any) -> None:
    """To whom the end of the connection is the body's."""
    cut = b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"
    gate = gate_for([READ, cut, CLOSE], api_keys=ALL_OPEN)
    client = gate.client().send(request(b"", path="/v1/files", version="HTTP/1.0"))
    assert client.head()[0] == 200
    with pytest.raises(ConnectionResetError):
        client.file.read()
    assert gate.access()["status"] == "502"


def test_http_1_0(gate_for: Any) -> None:
    gate = gate_for([step for script in (reply(), streamed(STREAMED), reply(), streamed(STREAMED))
                     for step in (READ, script)])
    closing = gate.client().send(request(chat(), version="HTTP/1.0"))
    assert closing.answer().headers["connection"] == "close" and closing.is_closed()
    answer = gate.client().send(request(chat(True), version="HTTP/1.0")).answer()
    assert answer.body == STREAMED and "transfer-encoding" not in answer.headers
    client = gate.client().send(request(chat(), "Connection: Keep-Alive", version="HTTP/1.0"))
    answer = client.answer()
    assert (answer.body, answer.headers["connection"]) == (REPLY, "keep-alive")
    client.send(request(chat(True), "Connection: keep-alive", version="HTTP/1.0"))
    answer = client.answer()  # only the end of the connection can end it
    assert answer.body == STREAMED
    assert [value for name, value in answer.fields if name == "connection"] == ["close"]


@pytest.mark.parametrize("fields", [["Connection: close"], ["Connection: x, Close"],
                                    ["connection: x", "connection: close"]])
def test_a_client_that_wants_to_close(gate_for: Any, fields: list[str]) -> None:
    client = gate_for(always(streamed(STREAMED))).client().send(request(chat(True), *fields))
    answer = client.answer()
    assert (answer.body, answer.headers["connection"]) == (STREAMED, "close")
    assert client.is_closed()


@pytest.mark.parametrize("method, path, fields, status, allow", [
    ("GET", PATH, [], 405, "POST"), ("POST", "/health", [], 405, "GET, HEAD"),
    ("DELETE", "/v1/models/x", [], 405, "GET, HEAD"), ("OPTIONS", PATH, [], 405, "POST"),
    ("GET", "/no", [], 404, None), ("POST", "/v1/chat/completions/", [], 404, None),
    ("POST", "/v1//chat/completions", [], 404, None), ("OPTIONS", "*", [], 404, None),
    ("GET", "/../health", [], 404, None),
    ("GET", "/%00", [], 404, None), ("GET", "/healthz", [], 404, None),
    ("GET", PATH, ["Upgrade: WebSocket", "Connection: Upgrade"], 426, None),
    ("GET", "/no", ["Upgrade: websocket", "Connection: Upgrade"], 404, None),
])
def test_paths_and_methods(gate_for: Any, method: str, path: str, fields: list[str], status: int,
                           allow: str | None) -> None:
    gate = gate_for()
    client = gate.client().send(request(b"", *fields, method=method, path=path))
    answer = client.answer()
    assert answer.status == status and answer.error["message"]
    assert answer.headers.get("allow") == allow
    assert ("upgrade" in answer.headers) == (status == 426)
    assert client.send(request(method="GET", path="/health")).answer().status == 200


def deflated_raw(data: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-15)
    return squeezer.compress(data) + squeezer.flush()


@pytest.mark.parametrize("coding, squeeze, status", [
    ("gzip", gzip.compress, 200), ("X-GZip", gzip.compress, 200), ("deflate", zlib.compress, 200),
    ("deflate", deflated_raw, 200), ("identity", bytes, 200),
    ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]), 200),
    ("gzip", lambda data: gzip.compress(data)[:-1], 400), ("gzip", bytes, 400),
    ("deflate", gzip.compress, 400), ("gzip", lambda data: gzip.compress(data) + b"junk", 400),
    ("gzip", lambda data: b"", 400),
])
@pytest.mark.parametrize("chunked", [False, True])
def test_coded_request_bodies(gate_for: Any, coding: str, squeeze: Any, status: int,
                              chunked: bool) -> None:
    gate = gate_for(always(reply()))
    body = chat(model="gpt-real", x="y" * 9000)
    data = squeeze(body)
    fields = [f"Content-Encoding: {coding}"] + [TE] * chunked
    pieces = (data[at:at + 10] for at in range(0, len(data), 10))
    answer = gate.call(chunks(*pieces) + END if chunked else data, *fields)
    assert answer.status == status
    if status == 200:
        sent = gate.upstream.requests.get()
        assert sent.body == body and "content-encoding" not in sent.headers
    assert gate.access()["bytes_in"] == str(len(body)) or status != 200


def test_every_cut_of_a_request(gate_for: Any) -> None:
    gate = gate_for(always(reply()))
    sent = posted(TE, "X: y", body=chunks(chat()[:20], chat()[20:]) + b"0\r\nx: y\r\n\r\n")
    client = gate.client()
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(1, len(sent)):
        client.send(sent[:at])
        gate.settle()
        assert client.send(sent[at:]).answer().body == REPLY, at
        gate.access()


def test_many_clients_at_once(gate_for: Any) -> None:
    gate = gate_for(always(lambda sent: streamed(STREAMED) if b"true" in sent.body else reply()))
    clients = [gate.client() for _ in range(100)]
    for turn in range(3):
        for number, client in enumerate(clients):
            client.send(request(chat((number + turn) % 2 == 0)))
        for number, client in enumerate(clients):
            assert client.answer().body == (STREAMED if (number + turn) % 2 == 0 else REPLY)
            gate.access()
    assert gate.upstream.connects <= 100
    assert gate.total("llm_requests_total", status="200") == 300


# ==================================================================================================
# 14. Demo
# ==================================================================================================

SCHEMA = {"type": "object", "properties": {
    "city": {"type": "string"}, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer"}}}
FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ARGUMENTS = {"city": "demo", "unit": "C", "days": 1}


@pytest.fixture
def ask_demo(gate_for: Any, monkeypatch: Any) -> Callable[..., Answer]:
    """Asks the demo's upstream."""
    monkeypatch.setattr(gateway, "DEMO_DELAY_SECONDS", 0)
    gate = gate_for(app=gateway.DemoUpstream())

    def ask(path: str = PATH, content: object = "Hi!", **more: object) -> Answer:
        body = {"model": "m", "messages": [{"role": "user", "content": content}], **more}
        return gate.call(json.dumps(body).encode(), path=path)  # type: ignore[no-any-return]

    return ask


def test_the_demo_counts_tokens_and_errs_in_the_dialect_of_its_path(ask_demo: Any) -> None:
    counted = ask_demo(MESSAGES + "/count_tokens")
    assert (counted.status, list(json.loads(counted.body))) == (200, ["input_tokens"])
    counted = ask_demo("/v1/responses/input_tokens", input="Hi")
    assert (counted.status, json.loads(counted.body)["object"]) == (200, "response.input_tokens")
    assert json.loads(ask_demo(MESSAGES, content=5).body)["type"] == "error"


def test_the_demo_says_it_back(ask_demo: Any) -> None:
    answer = ask_demo()
    assert answer.body == ask_demo().body  # it is deterministic
    whole = json.loads(answer.body)
    assert "You said: Hi!" in whole["choices"][0]["message"]["content"]
    assert whole["usage"]["total_tokens"] == sum(
        whole["usage"][key] for key in ("prompt_tokens", "completion_tokens")) > 2
    parts = [{"type": "text", "text": text} for text in ("one", "two")]
    assert b"one two" in ask_demo(content=parts).body


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_the_demo_streams(ask_demo: Any, options: Any) -> None:
    answer = ask_demo(stream=True, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = answer.events
    assert done == b"[DONE]"
    said = "".join(choice["delta"].get("content") or "" for chunk in chunks
                   for choice in chunk["choices"])
    assert said == json.loads(ask_demo().body)["choices"][0]["message"]["content"]
    assert [bool(chunk["choices"]) for chunk in chunks].count(False) == bool(options)


def test_the_demo_calls_a_tool(ask_demo: Any) -> None:
    choice = json.loads(ask_demo(tools=[FUNCTION]).body)["choices"][0]
    call = choice["message"]["tool_calls"][0]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "weather")
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    pieces = [piece for event in ask_demo(tools=[FUNCTION], stream=True).events[:-1]
              for piece in event["choices"][0]["delta"].get("tool_calls", [])]
    assert {piece["index"] for piece in pieces} == {0} and pieces[0]["id"] == call["id"]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == (
        call["function"]["arguments"])
    assert b"tool_calls" not in ask_demo(tools=[FUNCTION], tool_choice="none").body
    result = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]},
              {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    assert b"sunny" in ask_demo(tools=[FUNCTION], messages=result).body


def test_the_demo_speaks_messages_too(ask_demo: Any) -> None:
    def ask(**more: object) -> Answer:
        return ask_demo("/v1/messages", max_tokens=99, **more)  # type: ignore[no-any-return]

    whole, answer = json.loads(ask().body), ask(stream=True)
    assert whole["type"] == "message" and "Hi!" in whole["content"][0]["text"]
    names = re.findall(r"^event: (.*)$", answer.body.decode(), re.MULTILINE)
    assert names == [event["type"] for event in answer.events]
    assert names[:2] + names[-3:] == ["message_start", "content_block_start", "content_block_stop",
                                      "message_delta", "message_stop"]
    assert whole["content"][0]["text"] == "".join(
        event["delta"]["text"] for event in answer.events if event["type"] == "content_block_delta")
    call = json.loads(ask(tools=[{"name": "weather", "input_schema": SCHEMA}]).body)
    assert call["stop_reason"] == "tool_use" and call["content"][0]["input"] == ARGUMENTS


def test_the_demo_refuses_what_it_does_not_know(ask_demo: Any) -> None:
    assert ask_demo("/v1/other").status == 404
    assert ask_demo(model=float("nan")).status == 400


# ==================================================================================================
# 16. Workers
# ==================================================================================================

FILE = Path(gateway.__file__).resolve()


class Process:
    """A gateway in a process of its own."""

    def __init__(self, *arguments: str, start: Sequence[str] = (str(FILE),), **how: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, text=True, **how)
        self.said: list[str] = []

    def until(self, wanted: str) -> str:
        """Reads its output up to the line that holds this."""
        watchdog = threading.Timer(6 * WAIT, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout or ():
                self.said.append(line)
                if wanted in line:
                    return line
        finally:
            watchdog.cancel()
        raise AssertionError(f"{wanted!r} was never said: {self.stop()}")

    def ready(self) -> Any:
        """Where it listens: an address for a Client."""
        address = parse_log(self.until('msg="starting server"'))["addr"]
        if address.startswith("unix:"):
            return address[5:]
        host, _, port = address.rpartition(":")
        return host or "127.0.0.1", int(port)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = WAIT) -> int:
        return self.process.wait(seconds)

    def stop(self) -> str:
        """All that it said, once it is dead."""
        if self.process.poll() is None:
            self.process.kill()
        rest, errors = ("", "") if self.process.stdout is None or self.process.stdout.closed \
            else self.process.communicate()
        said = "".join(self.said) + rest + errors
        OUTPUT.append(said)
        return said


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a gateway with a config, or with arguments."""
    processes: list[Process] = []

    def start(*arguments: str, config: Any = None, **how: Any) -> Process:
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
            arguments = ("-config", str(tmp_path / "config.json"), *arguments)
        processes.append(Process(*arguments, **how))
        return processes[-1]

    yield start
    for process in processes:
        assert "Traceback" not in process.stop()


@pytest.fixture
def upstream_for() -> Iterator[Callable[..., Upstream]]:
    upstreams: list[Upstream] = []

    def start(script: Script) -> Upstream:
        upstreams.append(Upstream(itertools.repeat(script)))
        return upstreams[-1]

    yield start
    for upstream in upstreams:
        upstream.close()


HELD: Script = [READ, STREAM_HEAD + chunks(FIRST), GO, chunks(delta(), LAST, FINAL) + END]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_what_is_in_flight_finish(run: Any, upstream_for: Any, number: int) -> None:
    upstream = upstream_for(HELD)
    process = run(config=config_for(upstream.port, limits={"grace": 30}))
    address = process.ready()
    idle, half, *clients = [Client(address) for _ in range(7)]
    for client in clients:
        client.send(request(chat(True))).head()
        assert client.chunk() == FIRST
    half.send(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    assert idle.send(request(method="GET", path="/health")).answer().status == 200
    process.signal(number)
    assert idle.is_closed()
    with pytest.raises(OSError):
        Client(address)
    answer = half.send(b"\r\n").answer()
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert process.process.poll() is None
    upstream.go.release(len(clients))
    for client in clients:
        rest = b"".join(iter(client.chunk, b""))
        assert rest == delta() + LAST + FINAL
    assert process.wait() == 0  # though the clients would keep their connections
    assert process.stop().count("status=200") == len(clients)


def test_a_stop_serves_who_came_before_it(run: Any, upstream_for: Any) -> None:
    """Though the kernel has not handed them over yet."""
    process = run(config=config_for(upstream_for(always(reply())).port, limits={"grace": 30}))
    address = process.ready()
    kept = Client(address).send(request(chat()))
    assert kept.answer().status == 200
    process.signal(signal.SIGSTOP)
    clients = [kept, *(Client(address) for _ in range(300))]
    for client in clients:
        client.send(request(chat()))
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGCONT)
    assert [client.answer().status for client in clients] == [200] * len(clients)
    assert process.wait() == 0


def test_a_stop_does_not_wait_for_ever(run: Any, upstream_for: Any) -> None:
    process = run(config=config_for(upstream_for(HELD).port, limits={"grace": 0.3}))
    client = Client(process.ready()).send(request(chat(True)))
    client.head()
    process.signal(signal.SIGTERM)
    process.wait(3)
    said = process.stop()
    assert "msg=access" in said  # the exchange that was cut is counted too
    assert "status=499" not in said  # it was not the client that left


def test_an_idle_connection_is_closed_behind_its_last_answer(gate_for: Any) -> None:
    """Part of which may still wait here for a slow reader."""
    server = gate_for().server
    calls: list[str] = []

    class Sending(asyncio.Transport):
        def close(self) -> None:
            calls.append("close")

        def abort(self) -> None:
            calls.append("abort")

    client = gateway.Client(server)
    client.transport, client.phase = Sending(), "keep_alive"
    client._end_waiting()
    other = gateway.Server(server._app, server.limits, server.timeouts, str, time.time, time.time)
    other._clients.add(client)
    asyncio.run(other.drain())
    assert calls == ["close", "close"]


def test_a_client_that_leaves_during_a_drain_has_left(gate_for: Any) -> None:
    gate = gate_for([READ, CREATED + chunks(FIRST), GO])
    client = gate.client().send(request(chat(True)))
    client.head()
    gate.server.is_draining = True
    client.reset()
    assert gate.access()["status"] == "499"
    gate.server.is_draining = False


def test_a_second_signal_stops_at_once(run: Any, upstream_for: Any) -> None:
    process = run(config=config_for(upstream_for(HELD).port))
    address = process.ready()
    client, idle = Client(address).send(request(chat(True))), Client(address)
    client.head()
    idle.send(request(method="GET", path="/health")).answer()
    process.signal(signal.SIGTERM)
    assert idle.is_closed()
    process.signal(signal.SIGTERM)
    process.wait(1)


def test_running_out_of_descriptors_is_survived(run: Any, upstream_for: Any) -> None:
    def few() -> None:
        gateway.resource.setrlimit(gateway.resource.RLIMIT_NOFILE, (90, 90))

    process = run(config=config_for(upstream_for(always(reply())).port), preexec_fn=few)
    address = process.ready()
    process.signal(signal.SIGSTOP)  # or it would refuse them one by one as they come
    clients = [Client(address) for _ in range(150)]
    process.signal(signal.SIGCONT)
    process.until("out of system resource")
    for client in clients:
        client.reset()
    eventually(lambda: Client(address).send(request(chat())).answer().status == 200)


def test_a_log_that_nobody_reads_any_more(run: Any, upstream_for: Any) -> None:
    process = run(config=config_for(upstream_for(always(reply())).port))
    client = Client(process.ready())
    process.process.stdout.close()
    for _ in range(3):
        assert client.send(request(chat())).answer().status == 200
    metrics = client.send(request(method="GET", path="/metrics")).answer().body.decode()
    OUTPUT.append(metrics)
    assert "llm_log_lines_lost_total 3\n" in metrics
    for name in ("llm_build_info{", "process_cpu_seconds_total ", "process_open_fds ",
                 "process_resident_memory_bytes ", "process_start_time_seconds "):
        assert f"\n{name}" in metrics
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


def test_closed_standard_descriptors_are_not_taken_by_sockets(run: Any, upstream_for: Any,
                                                              tmp_path: Path) -> None:
    path = str(tmp_path / "gw.sock")
    config = config_for(upstream_for(always(reply())).port)
    process = run(config={**config, "listen": f"unix:{path}"},
                  preexec_fn=lambda: os.closerange(0, 3))
    eventually(lambda: Client(path).send(request(chat())).answer().body == REPLY)
    process.signal(signal.SIGTERM)
    assert process.wait() == 0


def test_a_unix_socket(run: Any, command: Any, upstream_for: Any, tmp_path: Path) -> None:
    config = {**config_for(upstream_for(always(reply())).port),
              "listen": f"unix:{tmp_path / 'gw.sock'}"}
    first = run(config=config)
    path = first.ready()
    assert Client(path).send(request(chat())).answer().body == REPLY
    assert command("-health")[0] == 0
    second = run(config=config)
    assert second.wait() == 1 and "use" in second.stop()  # in use
    first.process.kill()
    first.wait()
    assert command("-health")[0] == 1
    third = run(config=config)  # what the dead one left behind is no hindrance
    assert Client(third.ready()).send(request(chat())).answer().body == REPLY


def test_an_address_in_use(run: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        process = run(config={**config_for(9), "listen": listen})
        assert process.wait() == 1
    said = process.stop()
    assert listen in said and said.count("\n") == 1


# ==================================================================================================
# 17. Command line
# ==================================================================================================


@pytest.fixture
def command(capfd: Any, tmp_path: Path, monkeypatch: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in a folder of its own, to its end: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = gateway.main(arguments)
        said = capfd.readouterr()
        OUTPUT.extend(said)
        return status, said.out, said.err

    return run


BY_ANOTHER = f"import runpy; runpy.run_path({str(FILE)!r}, run_name='__main__')"  # as debuggers do


@pytest.mark.parametrize("start", [[str(FILE)], ["-m", "gateway"], ["-c", BY_ANOTHER]])
def test_version(start: list[str]) -> None:
    for flag in ("-version", "--version"):
        done = subprocess.run([sys.executable, *start, flag], cwd=FILE.parent, capture_output=True,
                              text=True, timeout=2 * WAIT, check=True)
        assert (done.stdout, done.stderr) == (f"gateway.py {gateway.__version__}\n", "")


@pytest.mark.parametrize("start", [["-m", "gateway"], [str(FILE)]])
def test_what_compiling_took_is_given_back(run: Any, tmp_path: Path, start: list[str]) -> None:
    uncompiled = ["-B", "-X", f"pycache_prefix={tmp_path}", *start]
    process = run(config=config_for(9), start=uncompiled, cwd=FILE.parent)
    process.ready()
    status = Path(f"/proc/{process.process.pid}/status")
    if status.exists() and hasattr(ctypes.CDLL(None), "malloc_trim"):
        now, peak = (int(re.findall(rf"{name}:\s+(\d+) kB", status.read_text())[0])
                     for name in ("VmRSS", "VmHWM"))
        assert now < 0.7 * peak


@pytest.mark.parametrize("listen, reason", [
    ("unix:/nowhere/gw.sock", "No such file"), ("unix:/tmp/" + "x" * 200, "too long"),
    ("192.0.2.1:80", "assign"),
])
def test_an_address_that_cannot_be_had(command: Any, listen: str, reason: str) -> None:
    Path("config.json").write_text(json.dumps({**config_for(9), "listen": listen}))
    status, said, errors = command()
    assert (status, said, errors.count("\n")) == (1, "", 1)
    assert listen in errors and reason in errors


def test_help_fits_one_screen(command: Any) -> None:
    status, said, errors = command("-help")
    assert (status, errors) == (0, "")
    assert said.count("\n") <= 24 and max(map(len, said.splitlines())) <= 100
    for flag in ("-config", "-check", "-health", "-demo", "-version"):
        assert flag in said


@pytest.mark.parametrize("arguments, status", [
    (["-version"], 0), (["-help"], 0), (["-check"], 0), (["-check", "-config", "bad"], 2),
    (["-nonsense"], 2)])
@pytest.mark.parametrize("deaf", ["stdout", "stderr"])
def test_a_reader_that_has_gone_changes_no_exit_status(
        tmp_path: Path, arguments: list[str], status: int, deaf: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_for(9, provider={"api_key": ""})))
    (tmp_path / "bad").write_text("{}")
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, deaf: writer}
    done = subprocess.run([sys.executable, str(FILE), *arguments], cwd=tmp_path, timeout=60,
                          check=False, text=True, **streams)
    os.close(writer)
    assert done.returncode == status
    assert "Traceback" not in str(done.stderr) and "ignored" not in str(done.stderr)


@pytest.mark.parametrize("start", [["-m", "gateway"], [str(FILE)]])
def test_an_interrupt_before_it_serves(tmp_path: Path, start: list[str]) -> None:
    os.mkfifo(tmp_path / "config.json")
    process = Process("-check", "-config", str(tmp_path / "config.json"), start=start,
                      cwd=FILE.parent)
    with open(tmp_path / "config.json", "wb"):  # which waits until it is read
        process.signal(signal.SIGINT)
        assert process.wait() in (130, -signal.SIGINT)
    said = process.stop()
    assert "KeyboardInterrupt" in said and "excepthook" not in said


def test_a_signal_that_means_reload_stops_nothing(run: Any) -> None:
    process = run(config={**config_for(9), "listen": "127.0.0.1:0"})
    client = Client(process.ready())
    process.signal(signal.SIGHUP)
    assert "restart" in process.until("SIGHUP")
    assert client.send(request(method="GET", path="/health")).answer().status == 200
    client.close()


def test_a_file_of_prices_that_cannot_be_read_names_the_config(command: Any) -> None:
    Path("config.json").write_text(json.dumps(config_for(9, prices="/nowhere")))
    status, _, errors = command("-check")
    assert status == 2 and errors.startswith("config.json: prices: cannot read /nowhere")


@pytest.mark.parametrize("listen, told", [(None, ":8080 answers 500"), (5, "listen: must be")])
def test_health_reads_listen_as_the_server_does(
        command: Any, monkeypatch: Any, listen: Any, told: str) -> None:
    monkeypatch.setattr(gateway, "ask_health", lambda address: 500)
    Path("config.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"listen": listen}).encode())  # as some editors write it
    status, _, errors = command("-health")
    assert status == 1 and told in errors


@pytest.mark.parametrize("arguments, told", [
    (["-confg", "x"], "-config"), (["--chek"], "-check"), (["serve.json"], "serve.json"),
    (["-config"], "-config"), (["-check", "-demo"], "-demo"), (["-check=1"], "check"),
    (["-config", "/nowhere/config.json"], "/nowhere/config.json"),
])
def test_a_bad_command_line(command: Any, arguments: list[str], told: str) -> None:
    status, said, errors = command(*arguments)
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert told in errors


def test_without_a_config_a_hint_of_two_lines(command: Any) -> None:
    status, said, errors = command()
    assert (status, said, errors.count("\n")) == (2, "", 2)
    assert "-demo" in errors and "config.json" in errors


@pytest.mark.parametrize("name, arguments", [
    ("config.json", ["-check"]), ("config.yaml", ["--check"]),
    ("other", ["-config", "other", "-check"]), ("other", ["--config=other", "--check"]),
])
def test_a_check_prints_what_it_would_serve_and_no_secret(command: Any, name: str, monkeypatch: Any,
                                                          arguments: list[str]) -> None:
    monkeypatch.setenv("PROVIDERS_KEY", PROVIDER_KEY)
    config = config_for(9, provider={"api_key": "${PROVIDERS_KEY}", "headers": {"X-S": APP_KEY}})
    config["api_keys"][1]["expires"] = "2020-01-31"
    Path(name).write_text("# a comment\n" + json.dumps(config, indent=2))
    status, said, errors = command(*arguments)
    assert (status, errors) == (0, "")
    for shown in ("127.0.0.1:0", "openai", "house", "gpt-", "chatbot", "tiny-*   expired"):
        assert shown in said
    assert not any(secret in said for secret in SECRETS)


@pytest.mark.parametrize("arguments", [[], ["-check"]])
def test_a_bad_config_tells_all_that_is_wrong_and_starts_nothing(command: Any,
                                                                 arguments: list[str]) -> None:
    config = config_for(9, provider={"api_key": "${NOT_SET_HERE}"}, timeouts={"hed": 1},
                        log="loud", limits={"body": -1})
    config["models"]["house"]["provider"] = "opnai"
    config["api_keys"][0]["key"] = "short"
    Path("config.json").write_text(json.dumps(config))
    status, said, errors = command(*arguments)
    assert (status, said) == (2, "")
    for path, fix in (("providers.openai.api_key", "${NOT_SET_HERE:-}"), ("timeouts.hed", "head"),
                      ("log", "json"), ("limits.body", "above 0"), ("api_keys[0].key", "16"),
                      ("models.house.provider", "openai")):
        assert any(line.startswith(f"config.json: {path}: ") and fix in line
                   for line in errors.splitlines()), path


def test_a_yaml_file_gets_the_line_that_converts_it(command: Any) -> None:
    Path("config.yaml").write_text("listen: ':8080'\nproviders:\n  openai: {}\n")
    status, said, errors = command()
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "yq -o=json config.yaml" in errors


def test_health_asks_the_gateway_of_its_config(run: Any, command: Any) -> None:
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    config = {**config_for(9, provider={"api_key": "${ONLY_THERE}"}), "listen": f":{port}"}
    process = run(config=config, env={**os.environ, "ONLY_THERE": PROVIDER_KEY})
    process.ready()
    assert command("-health") == (0, "", "")  # it needs none of the config's secrets
    process.signal(signal.SIGTERM)
    process.wait()
    status, said, errors = command("-health")
    assert (status, said, errors.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Draining\r\n\r\n", b"SSH-2.0-x\r\n", b""])
def test_health_believes_no_other_server(command: Any, upstream_for: Any, answer: bytes) -> None:
    listen = f"127.0.0.1:{upstream_for([answer, CLOSE]).port}"
    Path("config.json").write_text(json.dumps({"listen": listen}))
    status, _, errors = command("-health")
    assert (status, errors.count("\n")) == (1, 1) and listen in errors


@pytest.mark.parametrize("taken", [False, True])
def test_the_demo_prints_a_line_that_works_when_pasted(run: Any, taken: bool) -> None:
    with contextlib.ExitStack() as stack:
        if taken:
            with contextlib.suppress(OSError):  # then another holds it, which is as good
                stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        process = run("-demo")
        address = process.ready()
        assert address[0] == "127.0.0.1" and (address[1] != 8080 or not taken)
        process.until("curl")
        while process.said[-1].endswith("\\\n"):
            process.until("")
        pasted = "".join(process.said[-3:])
        assert pasted.lstrip().startswith("curl -N")
        done = subprocess.run(["sh", "-c", pasted], capture_output=True, text=True, timeout=WAIT,
                              check=True)
        assert done.stdout.startswith("data: {") and done.stdout.endswith("data: [DONE]\n\n")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_missing_certificate_store_is_told_at_the_start(run: Any) -> None:
    config = {**config_for(9), "providers": {"openai": {"api_key": PROVIDER_KEY}}}
    process = run(config=config, env={**os.environ, "SSL_CERT_FILE": "/nowhere",
                                      "SSL_CERT_DIR": "/nowhere"})
    process.ready()
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "ca-certificates" in process.stop()


# ==================================================================================================
# 12. Gateway: endpoints of which only bytes pass
# ==================================================================================================


def TAKE_HEAD(wire: Wire) -> None:
    """Reads a request up to its body."""
    wire.upstream.requests.put(Sent(*read_head(wire.file), b""))


def taking(size: int) -> Step:
    """Reads so much of a body, as it is framed."""
    return lambda wire: wire.upstream.requests.put(Sent("", [], wire.file.read(size)))


def serving(answer: bytes) -> Script:
    """Answers every request of a connection, also such as have no body."""
    def step(wire: Wire) -> None:
        while True:
            line, fields = read_head(wire.file)
            body = wire.file.read(int(dict(fields).get("content-length", 0)))
            wire.upstream.requests.put(Sent(line, fields, body))
            wire.sock.sendall(answer)
    return [step]


def went_to(gate: Gate) -> str:
    """The target of the request that reached the provider."""
    return gate.upstream.requests.get(timeout=WAIT).line.split()[1]


ALL_OPEN = [{"key": APP_KEY, "app": "chatbot", "allowed_endpoints": ["*"]}]


@pytest.fixture
def providers_for(gate_for: Any) -> Callable[..., Gate]:
    """A gateway with these providers, each at /NAME/v1 of the one upstream."""
    def start(script: Script, providers: dict[str, Any], **config: Any) -> Gate:
        upstream = gate_for(script).upstream
        gate: Gate = gate_for(providers={name: {
            "api_key": PROVIDER_KEY, "base_url": f"http://127.0.0.1:{upstream.port}/{name}/v1",
            **about} for name, about in providers.items()}, **{
                "models": {}, "routing": [], "api_keys": ALL_OPEN, **config})
        gate.upstream.close()
        gate.upstream = upstream
        return gate
    return start


# ---- forms ----

FORM_TYPE = 'Content-Type: Multipart/Form-Data; boundary="B-0"; charset=utf-8'
FORM_MODEL = b'name="model"', b"house"
SOUND = (b'name="file"; filename="model"\r\nContent-Type: audio/wav',
         bytes(range(256)) + b'\r\n--B-1\r\nContent-Disposition: form-data; name="model"')


def form(*parts: tuple[bytes, bytes], end: bytes = b"--\r\n") -> bytes:
    return b"--B-0\r\n" + b"\r\n--B-0\r\n".join(
        b"Content-Disposition: form-data; %b\r\n\r\n%b" % part for part in parts
    ) + b"\r\n--B-0" + end


@pytest.mark.parametrize("path", ["/audio/transcriptions", "/audio/translations", "/images/edits",
                                  "/images/variations"])
@pytest.mark.parametrize("model, sent", [(b"house", b"gpt-real"), (b"gpt-x", b"gpt-x"),
                                         (b"openai/long-name", b"long-name")])
@pytest.mark.parametrize("turned", [False, True])
def test_a_form_passes_but_for_the_model(gate_for: Any, path: str, model: bytes, sent: bytes,
                                         turned: bool) -> None:
    parts = [SOUND, (b'name="n"', b""), FORM_MODEL, (b'name="models"', b"x")]
    body = form(*(parts[::-1] if turned else parts), end=b"--")
    gate = gate_for(always(reply(b'{"text": 1.0, "usage": {"input_tokens": 9}}')))
    answer = gate.call(body.replace(b"\nhouse\r", b"\n%b\r" % model), FORM_TYPE, path=f"/v1{path}")
    assert answer.body == b'{"text": 1.0, "usage": {"input_tokens": 9}}'
    got = gate.upstream.requests.get()
    assert got.body == body.replace(b"\nhouse\r", b"\n%b\r" % sent)
    assert (got.line.split()[1], f'Content-Type: {got.headers["content-type"]}') == (
        f"/v1{path}", FORM_TYPE)
    assert gate.access()["prompt_tokens"] == "9"


GOOD_FORM = form(FORM_MODEL, SOUND)
BAD_FORMS: dict[str, tuple[str, bytes]] = {
    "no boundary": ("Content-Type: multipart/form-data", GOOD_FORM),
    "an empty boundary": ('Content-Type: multipart/form-data; boundary=""', GOOD_FORM),
    "another boundary": (FORM_TYPE.replace("B-0", "B-9"), GOOD_FORM),
    "empty": (FORM_TYPE, b""), "no end": (FORM_TYPE, form(FORM_MODEL, end=b"\r\n")),
    "cut": (FORM_TYPE, GOOD_FORM[:-9]), "no start": (FORM_TYPE, GOOD_FORM[1:60]),
    "JSON": (FORM_TYPE, chat()), "a form that says it is JSON": ("X: y", GOOD_FORM),
    "no model": (FORM_TYPE, form(SOUND)), "an empty model": (FORM_TYPE, form((FORM_MODEL[0], b""))),
    "a model in a file": (FORM_TYPE, form((b'name="model"; filename="x"', b"house"))),
    "stream of words": (FORM_TYPE, form(FORM_MODEL, (b'name="stream"', b"yes"))),
    "two models": (FORM_TYPE, form(FORM_MODEL, (FORM_MODEL[0], b"gpt-secret"))),
    **{f"two models, one as {other!r}": (FORM_TYPE, form(FORM_MODEL, (other, b"gpt-secret")))
       for other in (b'NAME="model"', b'name="m\\odel"', b'name=\t"model"', b'name ="model"',
                     b'name="model"; filename="x"', b"name*=utf-8''model",
                     b'name="x"; name="model"',
                     b'name="model"\r\nX: filename', b'name="x"\r\nContent-Disposition: form-data; '
                     b'name="model"', b'name="model"\r\n folded', b'name="x"\nName: model', b"")},
    "two boundaries": (FORM_TYPE, form(FORM_MODEL, SOUND).replace(b"--B-0--", b"--B-01\r\n\r\n--")),
    "too many parts": (FORM_TYPE, form(FORM_MODEL, *[(b'name="x"', b"")] * 1000)),
}


@pytest.mark.parametrize("body", [
    GOOD_FORM.replace(b'; name="model"', b"; name=model"), b"preamble\r\n" + GOOD_FORM,
    GOOD_FORM.replace(b'; name="model"', b';name="model"')], ids=["bare", "preamble", "close"])
def test_forms_are_read_as_they_may_be_written(gate_for: Any, body: bytes) -> None:
    gate = gate_for(always(reply()))
    assert gate.call(body, FORM_TYPE, path="/v1/audio/transcriptions").status == 200
    assert gate.upstream.requests.get().body == body.replace(b"\r\nhouse\r", b"\r\ngpt-real\r")


@pytest.mark.parametrize("name", BAD_FORMS)
def test_a_bad_form_is_refused(gate_for: Any, name: str) -> None:
    field, body = BAD_FORMS[name]
    gate = gate_for(always(reply()))
    answer = gate.call(body, field, path="/v1/audio/transcriptions")
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert gate.upstream.connects == 0


@pytest.mark.parametrize("model, path, status", [
    ("house", "/audio/transcriptions", 200), ("gpt-x", "/audio/transcriptions", 403),
    ("tiny-none", "/images/edits", 404), ("house", "/chat/completions", 400),
])
def test_a_forms_model_is_judged_as_any(gate_for: Any, model: str, path: str, status: int) -> None:
    gate = gate_for(always(reply()), provider={"kind": "anthropic"} if status == 400 else {})
    body = form((FORM_MODEL[0], model.encode()), SOUND)
    answer = gate.call(body, FORM_TYPE, path=f"/v1{path}", key=NARROW_KEY)
    assert answer.status == status and gate.upstream.connects == (status == 200)


ASKED_FOR_STREAMS = [
    ("/audio/transcriptions", FORM_TYPE, form(SOUND, (b'name="stream"', b"true"), FORM_MODEL)),
    ("/images/generations", "X: y", b'{"model": "house", "stream": true}'),
    ("/audio/speech", "X: y", b'{"model": "house", "stream_format": "sse"}')]


@pytest.mark.parametrize("path, field, body", ASKED_FOR_STREAMS)
def test_what_was_asked_for_as_a_stream_may_come_as_none(
        gate_for: Any, path: str, field: str, body: bytes) -> None:
    gate = gate_for(serving(reply(b'{"text": "x", "usage": {"input_tokens": 9}}')))
    assert gate.call(body, field, path=f"/v1{path}").body[:1] == b"{"
    assert gate.access()["prompt_tokens"] == "9"
    gate = gate_for(serving(reply(SPEECH, kind="audio/mpeg")))
    assert gate.call(body, field, path=f"/v1{path}").body == SPEECH
    assert gate.access()["usage"] == "none"


@pytest.mark.parametrize("path, field, body", ASKED_FOR_STREAMS)
def test_a_stream_of_no_dialect_goes_on_while_it_brings_something(
        gate_for: Any, path: str, field: str, body: bytes) -> None:
    """And no tokens are made up for it: a form's bytes are no prompt."""
    told = named({"type": "transcript.text.delta", "delta": "x"})
    gate = gate_for([READ, STREAM_HEAD + chunks(told), GO, chunks(told), GO, END],
                    timeouts={"first_token": 200, "idle": 150})
    client = gate.client().send(request(body, field, path=f"/v1{path}"))
    client.head()
    for _ in range(2):
        assert client.chunk() == told
        gate.later(120)
        gate.upstream.go.release()
    assert client.chunk() == b""
    line = gate.access()
    assert (line["status"], line["usage"]) == ("200", "none")


@pytest.mark.parametrize("path, field, body", ASKED_FOR_STREAMS)
def test_streams_of_no_dialect_pass(gate_for: Any, path: str, field: str, body: bytes) -> None:
    """OpenAI ends them with an event of their own, without [DONE]."""
    told = named({"type": "transcript.text.delta", "delta": "x"},
                 {"type": "transcript.text.done", "text": "x", "usage": {"input_tokens": 9}})
    gate = gate_for(always(streamed(told)))
    answer = gate.call(body, field, path=f"/v1{path}")
    assert (answer.status, answer.body) == (200, told)
    line = gate.access()
    assert (line["status"], line["prompt_tokens"], line["stream"]) == ("200", "9", "true")


# ---- answers that are no JSON ----

SPEECH = bytes(range(256)) * 40
SPEECH_HEAD = reply(b"", kind="audio/mpeg").partition(b"Content-Length")[0]


@pytest.mark.parametrize("script, status", [
    ([reply(SPEECH, kind="audio/mpeg")], "200"),
    ([SPEECH_HEAD + TE.encode() + b"\r\n\r\n" + chunks(SPEECH[:1], SPEECH[1:]) + END], "200"),
    ([SPEECH_HEAD + b"\r\n" + SPEECH, CLOSE], "200"),
    ([reply(SPEECH + b"x", kind="audio/mpeg")[:-1], CLOSE], "502"),
    ([SPEECH_HEAD + TE.encode() + b"\r\n\r\n" + chunks(SPEECH), CLOSE], "502"),
    ([SPEECH_HEAD + TE.encode() + b"\r\n\r\n" + chunks(SPEECH), RESET], "502"),
], ids=["length", "chunked", "until it closes", "cut length", "cut chunks", "reset"])
@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/responses/r/audio"])
def test_sound_comes_down_unheld_and_a_cut_is_no_end(gate_for: Any, script: Script, status: str,
                                                     path: str) -> None:
    *pieces, last = [step for step in script if isinstance(step, bytes)]
    gate = gate_for([READ, *pieces, last[:300], GO, last[300:], *script[len(pieces) + 1:]])
    client = gate.client().send(request(chat(), path=path))
    code, fields = client.head()
    assert (code, dict(fields)["content-type"]) == (200, "audio/mpeg")
    assert "transfer-encoding" in dict(fields)
    body = client.chunk()  # before all is there
    gate.upstream.go.release()
    with contextlib.suppress(ConnectionError, ValueError):  # ValueError: no chunk where one must be
        while len(body) < len(SPEECH) or status == "200":
            piece = client.chunk()
            body += piece
            if not piece:
                break
        else:
            assert client.is_closed()
    assert SPEECH.startswith(body) and (status == "502" or body == SPEECH)
    assert gate.access()["status"] == status


# ---- which provider ----

TWO = {"one": {"kind": "openai"}, "two": {"kind": "openai"}}


@pytest.mark.parametrize("providers, endpoints, path, target", [
    ({"one": {"kind": "openai"}, "local": {"kind": "openai-compatible"},
      "claude": {"kind": "anthropic"}}, {}, "/v1/files", "/one/v1/files"),
    ({"one": {"kind": "openai"}, "off": {"kind": "openai", "api_key": ""}}, {}, "/v1/batches/b",
     "/one/v1/batches/b"),
    ({"one": {"kind": "openai"}}, {}, "/v1/responses/resp_1/input_items",
     "/one/v1/responses/resp_1/input_items"),
    ({"local": {"kind": "openai-compatible", "responses": True}, "claude": {"kind": "anthropic"}},
     {}, "/v1/responses/resp_1", "/local/v1/responses/resp_1"),
    ({"local": {"kind": "openai-compatible", "responses": True}, "one": {"kind": "openai"}},
     {}, "/v1/responses/resp_1", "/one/v1/responses/resp_1"),
    ({"local": {"kind": "openai-compatible"}}, {}, "/v1/responses/resp_1", None),
    (TWO, {}, "/v1/files", None), ({"claude": {"kind": "anthropic"}}, {}, "/v1/files", None),
    ({"off": {"kind": "openai", "api_key": ""}}, {}, "/v1/files", None),
    (TWO, {"/v1/files": "two"}, "/v1/files/file-1/content", "/two/v1/files/file-1/content"),
    (TWO, {"/v1/files": "two", "/v1/batches": "one"}, "/v1/batches", "/one/v1/batches"),
    (TWO, {"/v1/files/": "two"}, "/v1/files/f", "/two/v1/files/f"),
    (TWO, {"/v1/file": "two"}, "/v1/files", None),
    (TWO, {"/v1": "one", "/v1/files/": "two"}, "/v1/files/f", "/two/v1/files/f"),
    (TWO, {"/v1": "one", "/v1/files": "two"}, "/v1/vector_stores/v", "/one/v1/vector_stores/v"),
    (TWO, {"/": "one"}, "/things", "/one/v1/things"),
    ({"claude": {"kind": "anthropic"}}, {"/v1/files": "claude"}, "/v1/files", "/claude/v1/files"),
    ({"one": {"kind": "openai"}, "off": {"kind": "openai", "api_key": ""}}, {"/v1/files": "off"},
     "/v1/files", None),
])
def test_paths_without_a_model_find_their_provider(
        providers_for: Any, providers: Any, endpoints: Any, path: str, target: str | None) -> None:
    gate = providers_for(serving(reply(b"{}")), providers, endpoints=endpoints)
    answer = gate.get(path)
    if target:
        assert (answer.status, went_to(gate)) == (200, target)
    else:
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "endpoints" in answer.error["message"] and gate.upstream.connects == 0


@pytest.mark.parametrize("method, path, sent, status", [
    ("GET", "/v1/files?purpose=batch&limit=2", b"", "200 OK"),
    ("DELETE", "/v1/files/f", b"", "200 OK"), ("POST", "/v1/batches", b"{ \n}", "201 Created"),
    ("GET", "/v1/responses/r?include=a&include=b", b"", "200 OK"),
    ("DELETE", "/v1/responses/r", b"", "200 OK"),
    ("POST", "/v1/responses/r/cancel", b"", "200 OK"), ("PATCH", "/v1/files/f", b"x", "200 OK"),
    ("HEAD", "/v1/files/f", b"", "200 OK"), ("DELETE", "/v1/files/f", b"", "204 No Content"),
])
def test_methods_and_answers_pass(gate_for: Any, method: str, path: str, sent: bytes,
                                  status: str) -> None:
    body = b"" if status[:3] == "204" or method == "HEAD" else b'{ "id" :1.0}\n'
    gate = gate_for(serving(reply(
        body, "x-request-id: req-up", "Set-Cookie: c=1", "openai-version: 1", status=status)
        if status[:3] != "204" else b"HTTP/1.1 204 No Content\r\nx-request-id: req-up\r\n\r\n"),
        api_keys=ALL_OPEN)
    client = gate.client().send(request(sent, "x-custom: a", "Cookie: c=1", method=method,
                                        path=path), request(method="GET", path="/health"))
    answer = client.answer(is_head=method == "HEAD" or status[:3] == "204")
    got = gate.upstream.requests.get()
    assert (answer.status, answer.body) == (int(status[:3]), body)
    assert answer.headers["x-request-id"] == "req-up" and "set-cookie" not in answer.headers
    assert got.line == f"{'GET' if method == 'HEAD' else method} {path} HTTP/1.1"
    assert got.body == sent and got.headers["x-custom"] == "a" and "cookie" not in got.headers
    assert got.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert ("content-length" in got.headers) == (method in ("POST", "PATCH"))
    if method == "HEAD" or status[:3] == "204":  # RFC 9110, section 8.6
        assert "content-length" not in answer.headers
    assert client.answer().body == b'{"status":"ok"}'
    assert gate.access()["provider"] == "openai"


@pytest.mark.parametrize("sent, status", [
    (failure(404, "invalid_request_error"), 404), (failure(429), 429), (failure(500), 500),
    (failure(400, message=f"Look at {PROVIDER_KEY}."), 400), (failure(401), 502),
    (failure(402), 502), (failure(403), 403), (failure(403, code="invalid_api_key"), 502),
    ((503, b"<html>"), 503), ((302, b"{}"), 502),
], ids=lambda value: str(value)[:40] if isinstance(value, tuple) else "")
@pytest.mark.parametrize("path", ["/v1/files", "/v1/audio/speech", "/openai/v1/any"])
def test_errors_pass_where_only_bytes_do(gate_for: Any, sent: tuple[int, bytes], status: int,
                                         path: str) -> None:
    gate = gate_for(serving(reply(sent[1], "Retry-After: 7", "Location: http://127.0.0.1:9/",
                                  status=f"{sent[0]} Odd")), api_keys=ALL_OPEN)
    answer = gate.call(chat(), path=path)
    assert answer.status == status and PROVIDER_KEY not in str(answer)
    if status == sent[0] and sent[1][:1] == b"{":
        assert answer.body == sent[1].replace(PROVIDER_KEY.encode(), b"***")
        assert answer.headers["retry-after"] == "7"
    else:
        assert answer.error["type"] and (status != 502 or "location" not in answer.headers)
    assert gate.access()["status"] == str(status)


# ---- uploads ----

HALVES = b"\x00\x01first\r\n", b"0\r\n\r\nsecond\xff"
BOTH_HALVES = f"Content-Length: {len(HALVES[0] + HALVES[1])}"


@pytest.mark.parametrize("field, frame, end", [
    (BOTH_HALVES, bytes, b""), (TE, chunks, END)], ids=["length", "chunked"])
@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]])
def test_an_upload_goes_up_as_it_comes(gate_for: Any, field: str, frame: Any, end: bytes,
                                       expect: list[str]) -> None:
    first, second = frame(HALVES[0]), frame(HALVES[1]) + end
    gate = gate_for([TAKE_HEAD, taking(len(first)), taking(len(second)), reply(b'{"id": 1}')],
                    limits={"body": 5, "bodies": 5}, api_keys=ALL_OPEN)
    client = gate.client().send(request(b"", field, FORM_TYPE, "Content-Encoding: gzip", *expect,
                                        path="/v1/files"))
    if expect:
        assert client.head() == (100, [])
    head = gate.upstream.requests.get(timeout=WAIT)
    assert f'Content-Type: {head.headers["content-type"]}' == FORM_TYPE
    assert head.headers["content-encoding"] == "gzip" and "expect" not in head.headers
    name, _, value = field.lower().partition(": ")
    assert head.headers[name] == value
    assert ("content-length" in head.headers) == (field == BOTH_HALVES)
    client.send(first)
    assert gate.upstream.requests.get(timeout=WAIT).body == first
    assert client.send(second).answer().body == b'{"id": 1}'
    assert gate.upstream.requests.get(timeout=WAIT).body == second
    assert gate.access()["bytes_in"] == BOTH_HALVES.split()[1]
    assert client.send(request(method="GET", path="/health")).answer().status == 200


@pytest.mark.parametrize("sent, status", [
    (request(b"", "Content-Length: 101", path="/v1/files"), 413),
    (request(b"", "Content-Length: 101", "Expect: 100-continue", path="/v1/files"), 413),
    (request(bytes(100), path="/v1/files"), 200),
    (request(chunks(bytes(99), bytes(2)), TE, path="/v1/files"), 413),
    (request(b"-1\r\n", TE, path="/v1/files"), 400),
    (request(bytes(101), path="/openai/v1/any"), 413),
], ids=["length", "expected", "just", "chunked", "malformed", "another path"])
def test_uploads_are_bounded(gate_for: Any, sent: bytes, status: int) -> None:
    gate = gate_for(serving(reply(b"{}")), limits={"upload": 100}, api_keys=ALL_OPEN)
    answer = gate.client().send(sent).answer()
    assert answer.status == status and gate.access()["status"] == str(status)
    assert status == 200 or answer.error["message"]


@pytest.mark.parametrize("then", [[], [CLOSE], [RESET]], ids=["stays", "closes", "resets"])
@pytest.mark.parametrize("field, frame", [
    ("Content-Length: 1000", bytes), (TE, chunks)], ids=["length", "chunked"])
def test_an_answer_before_the_uploads_end_counts(gate_for: Any, then: Script, field: str,
                                                 frame: Any) -> None:
    status, body = failure(413, "invalid_request_error")
    gate = gate_for([TAKE_HEAD, reply(body, status=f"{status} Too Large"), TELL, GO, *then],
                    serving(reply(b"{}")), api_keys=ALL_OPEN)
    client = gate.client().send(request(frame(b"x"), field, path="/v1/files"))
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.settle()  # the answer is there
    gate.upstream.go.release()
    eventually(lambda: not then or any(each.at_eof for each in gate.gateway.pool._open))
    answer = client.send(frame(b"x")).answer()
    assert (answer.status, answer.body) == (413, body)
    assert answer.headers["connection"] == "close"
    assert gate.get("/v1/files").status == 200 and gate.upstream.connects == 2


@pytest.mark.parametrize("field, frame, end", [
    ("Content-Length: 8", bytes, b""), (TE, chunks, END)], ids=["length", "chunked"])
def test_a_connection_with_half_a_body_is_not_kept(gate_for: Any, field: str, frame: Any,
                                                   end: bytes) -> None:
    """The rest of the body comes, and is its last piece, when the answer is there."""
    early = reply(b"{}", status="413 Too Large")
    gate = gate_for([TAKE_HEAD, taking(len(frame(b"half"))), early, TELL], serving(reply(b"{}")),
                    api_keys=ALL_OPEN)
    client = gate.client().send(request(frame(b"half"), field, path="/v1/files"))
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.settle()
    assert client.send(frame(b"rest") + end).answer().status == 413
    assert gate.get("/v1/files").status == 200 and gate.upstream.connects == 2


@pytest.mark.parametrize("field, frame, end", [
    ("Content-Length: 8", bytes, b""), (TE, chunks, END)], ids=["length", "chunked"])
@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints",
                                    "104 Upload Resumption Supported"])
def test_an_interim_answer_ends_no_upload(gate_for: Any, field: str, frame: Any, end: bytes,
                                          status: str) -> None:
    gate = gate_for([TAKE_HEAD, taking(len(frame(b"half"))), f"HTTP/1.1 {status}\r\n\r\n".encode(),
                     TELL, taking(len(frame(b"rest") + end)), reply(b"{}")], api_keys=ALL_OPEN)
    client = gate.client().send(request(frame(b"half"), field, path="/v1/files"))
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.settle()
    assert client.send(frame(b"rest") + end).answer().status == 200
    bodies = [gate.upstream.requests.get(timeout=WAIT).body for _ in range(3)]
    assert bodies[1:] == [frame(b"half"), frame(b"rest") + end]


def test_an_early_answer_counts_more_than_a_client_that_is_late(gate_for: Any) -> None:
    gate = gate_for([TAKE_HEAD, reply(b"{}", status="413 Too Large"), TELL], api_keys=ALL_OPEN)
    client = gate.client().send(request(b"half", "Content-Length: 8", path="/v1/files"))
    assert gate.upstream.told.acquire(timeout=WAIT)
    gate.settle()
    gate.later(31)
    assert client.answer().status == 413


@pytest.mark.parametrize("leave", [Client.close, Client.reset], ids=["closes", "resets"])
@pytest.mark.parametrize("field, frame", [
    ("Content-Length: 1000", bytes), (TE, chunks)], ids=["length", "chunked"])
def test_a_client_that_leaves_in_its_upload_cancels_it(gate_for: Any, leave: Any, field: str,
                                                       frame: Any) -> None:
    gate = gate_for([TAKE_HEAD, taking(len(frame(b"half")))], api_keys=ALL_OPEN)
    client = gate.client().send(request(frame(b"half"), field, path="/v1/files"))
    for _ in range(2):
        gate.upstream.requests.get(timeout=WAIT)
    leave(client)
    assert gate.access()["status"] == "499"
    gate.upstream.left.get(timeout=WAIT)


def fill(client: Client) -> None:
    """Sends until nobody takes any more."""
    client.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.sock.send(bytes(1 << 16))


@pytest.mark.parametrize("leaves", [True, False])
def test_an_upload_that_its_provider_does_not_take_ends(gate_for: Any, leaves: bool) -> None:
    gate = gate_for([TAKE_HEAD, GO], api_keys=ALL_OPEN)
    client = gate.client().send(request(b"", "Content-Length: 99999999", path="/v1/files"))
    gate.upstream.requests.get(timeout=WAIT)
    for _ in range(20):
        fill(client)
        gate.settle()
    if leaves:
        client.reset()
    gate.later(301)
    try:
        assert gate.access()["status"] in (("499", "504") if leaves else ("504",))
    finally:
        gate.upstream.go.release()
    gate.upstream.left.get(timeout=WAIT)


# ---- /PROVIDER/... ----


@pytest.mark.parametrize("path, target", [
    ("/openai/v1/files", "/v1/files"), ("/openai/files", "/v1/files"),
    ("/openai/v1/a%20b:c@d", "/v1/a%20b:c@d"), ("/openai/v1/v1/x", "/v1/v1/x"),
    ("/openai/v1/files/", "/v1/files/"), ("/openai/", "/v1/"), ("/openai", "/v1"),
    (f"/openai/v1/x?limit=2&key={APP_KEY}&after=a%2Fb", "/v1/x?limit=2&after=a%2Fb"),
    (f"/openai/v1/x?key={APP_KEY}", "/v1/x"),
    ("/openai/v1/x?api-version=2025-01-01&alt=sse", "/v1/x?api-version=2025-01-01&alt=sse"),
    ("/nobody/v1/files", None), ("/v1/openai/files", None), ("/OpenAI/v1/files", None),
])
def test_a_path_may_name_its_provider(gate_for: Any, path: str, target: str | None) -> None:
    gate = gate_for(serving(reply(b"{}")), api_keys=ALL_OPEN)
    answer = gate.get(path)
    assert answer.status == (200 if target else 404)
    assert went_to(gate) == target if target else gate.upstream.connects == 0


def test_fields_pass_to_a_named_provider_but_for_what_is_ours(providers_for: Any) -> None:
    gate = providers_for(serving(reply(b"{}")), {"claude": {
        "kind": "anthropic", "headers": {"X-Team": "ours"}}})
    kept = ["anthropic-beta: b", "user-agent: sdk/1", "content-type: application/x", "accept: a"]
    gate.call(b"x", *kept, f"x-api-key: {APP_KEY}", f"x-gateway-key: {APP_KEY}", "cookie: c",
              "x-gateway-strict: 1", "x-team: theirs", "api-key: x", "x-goog-api-key: x",
              "accept-encoding: br", method="PUT", path="/claude/v1/x")
    sent = gate.upstream.requests.get()
    assert sent.line == "PUT /claude/v1/x HTTP/1.1"
    assert joined(sent.fields) == joined([
        *(field.split(": ") for field in kept), ("x-team", "ours"), ("x-api-key", PROVIDER_KEY),
        ("anthropic-version", "2023-06-01"), ("host", f"127.0.0.1:{gate.upstream.port}"),
        ("accept-encoding", "identity"), ("content-length", "1")])


SHARED_THINGS = [("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/files/f/content"),
                 ("GET", "/v1/batches/b"), ("GET", "/openai/v1/files"),
                 ("POST", "/openai/v1/chat/completions")]
OWN_THINGS = [("GET", "/v1/models"), ("GET", "/v1/models/house"), ("POST", PATH),
              ("GET", "/v1/responses/r"), ("POST", "/v1/audio/speech"),
              ("POST", "/openai/deployments/house/chat/completions")]


@pytest.mark.parametrize("globs, open_to", [
    (None, OWN_THINGS), (["*"], OWN_THINGS + SHARED_THINGS), ([], []),
    (["/v1/files*"], SHARED_THINGS[:3]), (["/v1/*"], OWN_THINGS + SHARED_THINGS[:4]),
    (["/openai/v1/files", "/v1/models"], [OWN_THINGS[0], SHARED_THINGS[4]]),
    (["/v1/batches/?"], [SHARED_THINGS[3]]), (["/openai/deployments/*"], OWN_THINGS[5:]),
])
def test_which_endpoints_a_key_may_use(gate_for: Any, globs: Any, open_to: Any) -> None:
    key = {"key": APP_KEY, "app": "a", **({} if globs is None else {"allowed_endpoints": globs})}
    gate = gate_for(serving(reply(b"{}")), api_keys=[key])
    for method, path in OWN_THINGS + SHARED_THINGS:
        answer = gate.call(chat() if method == "POST" else b"", method=method, path=path)
        assert answer.status == (200 if (method, path) in open_to else 403), path
        assert answer.status == 200 or answer.error["code"] == "endpoint_not_allowed"


@pytest.mark.parametrize("path", [
    "/v1/responses/../files", "/v1/responses/r/../../files", "/v1/responses/%2e%2e/files",
    "/v1/responses/..%2Ffiles", "/v1/models/../files", "/v1/responses/./../files",
])
def test_no_path_climbs_out_of_what_a_key_may_use(gate_for: Any, path: str) -> None:
    """A provider's front end may resolve the dots, with our key."""
    gate = gate_for(serving(reply(b"{}")))
    assert gate.get(path).status in (400, 403, 404)
    assert gate.upstream.connects == 0


# ---- Azure ----


@pytest.mark.parametrize("kind, sent", [
    ("openai", "/v1/{}"), ("azure", "/v1/openai/deployments/gpt-real/{}?api-version=2024-10-21")])
@pytest.mark.parametrize("path, field, body", [
    ("chat/completions", "X: y", chat()), ("embeddings", "X: y", b'{"input": "x"}'),
    ("audio/transcriptions", FORM_TYPE, GOOD_FORM),
    ("audio/transcriptions", FORM_TYPE, form(SOUND)),
], ids=["chat", "embeddings", "form", "form without model"])
def test_azures_clients_name_the_model_in_the_path(gate_for: Any, kind: str, sent: str, path: str,
                                                   field: str, body: bytes) -> None:
    gate = gate_for(always(reply()), provider={"kind": kind})
    answer = gate.call(body, f"api-key: {APP_KEY}", field, key="",
                       path=f"/openai/deployments/house/{path}?api-version=2025-01-01&x=1")
    assert answer.body == b"".join(reply().partition(b"\r\n\r\n")[2:])
    got = gate.upstream.requests.get()
    query = "&x=1" if kind == "azure" else "?x=1"
    assert got.line.split()[1] == sent.format(path) + query
    key = ("api-key", PROVIDER_KEY) if kind == "azure" else (
        "authorization", f"Bearer {PROVIDER_KEY}")
    assert key in got.fields and APP_KEY not in str(got)
    assert gate.access()["model"] == "house" and b"house" not in got.body


def test_azures_clients_ask_for_the_rest_with_a_version(gate_for: Any) -> None:
    """Which is no provider that is named `openai`, past aliases and what a key may use."""
    gate = gate_for(always(reply()))
    body = b'{"model": "house", "input": "Hi"}'
    gate.call(body, path="/openai/responses?api-version=2025-03-01-preview")
    got = gate.upstream.requests.get(timeout=WAIT)
    assert got.line.split()[1] == "/v1/responses" and b'"gpt-real"' in got.body
    listed = json.loads(gate.get("/openai/models?api-version=2025-03-01-preview").body)["data"]
    assert "house" in [model["id"] for model in listed]
    assert gate.call(body, path="/openai/responses").status == 403


def test_azures_stream_is_a_boolean_too(gate_for: Any) -> None:
    answer_ = gate_for().call(chat(stream="yes"), path="/openai/deployments/house/chat/completions")
    assert (answer_.status, answer_.error["param"]) == (400, "stream")


def test_azure_streams_and_is_translated_for(gate_for: Any) -> None:
    gate = gate_for(always(streamed(STREAMED)), provider={"kind": "azure"})
    assert gate.call(chat(True)).body == STREAMED
    body = json.dumps({"model": "house", "max_tokens": 9, "stream": True,
                       "messages": [{"role": "user", "content": PROMPT}]}).encode()
    assert b"message_stop" in gate.call(body, path=MESSAGES).body
    assert len({gate.upstream.requests.get().line for _ in range(2)}) == 1


# ---- the client's own authorization ----

OWN = f"Authorization: Bearer {'own-token-' * 3}"
VIRTUAL = f"x-gateway-key: {APP_KEY}"


@pytest.mark.parametrize("fields, status", [
    ([OWN, VIRTUAL], 200), ([VIRTUAL], 401), ([OWN, f"x-api-key: {APP_KEY}"], 401),
    ([f"Authorization: Bearer {APP_KEY}"], 401), ([OWN, "x-gateway-key: wrong"], 401),
    ([f"Authorization: Bearer {APP_KEY}", VIRTUAL], 401),
    ([f"Authorization: bearer   {NARROW_KEY}", VIRTUAL], 401),
])
@pytest.mark.parametrize("path", [MESSAGES, "/openai/v1/any"])
def test_the_clients_authorization_goes_up_and_no_key_of_ours(
        gate_for: Any, fields: list[str], status: int, path: str) -> None:
    gate = gate_for(serving(reply(b'{"usage": {}}')), api_keys=[
        *ALL_OPEN, {"key": NARROW_KEY, "app": "narrow", "allowed_endpoints": ["*"]}],
        provider={"kind": "anthropic", "forward_auth": True})
    assert gate.call(chat(), *fields, path=path, key="").status == status
    assert gate.upstream.connects == (status == 200)
    if status == 200:
        sent = gate.upstream.requests.get()
        assert sent.headers["authorization"] == OWN.partition(": ")[2]
        assert APP_KEY not in str(sent) and PROVIDER_KEY not in str(sent)


@pytest.mark.parametrize("status", [400, 401, 402, 403])
@pytest.mark.parametrize("path", [MESSAGES, "/openai/v1/any"])
def test_errors_about_the_clients_own_account_pass(gate_for: Any, status: int, path: str) -> None:
    body = failure(status, "authentication_error", "invalid x-api-key")[1]
    gate = gate_for(serving(reply(body, status=f"{status} No")), api_keys=ALL_OPEN,
                    provider={"kind": "anthropic", "forward_auth": True, "api_key": ""})
    answer = gate.call(chat(), OWN, VIRTUAL, path=path, key="")
    assert (answer.status, answer.body) == (status, body)


def test_who_brings_his_own_authorization_speaks_the_providers_dialect(gate_for: Any) -> None:
    gate = gate_for([], provider={"kind": "anthropic", "forward_auth": True})
    answer = gate.call(chat(), OWN, VIRTUAL, key="")
    assert (answer.status, answer.error["code"]) == (400, "unsupported_dialect")
    assert gate.upstream.connects == 0


# ---- what a kind does not take ----


@pytest.mark.parametrize("kind, sent, went, lost", [
    ("groq", '{"model":"house", "logprobs":true,"x":1.0, "top_logprobs":null }',
     '{"model":"gpt-real","x":1.0 }', "logprobs"),
    ("mistral", '{"max_completion_tokens": 5 ,"model": "house","messages": []}',
     '{"model": "gpt-real","messages": [],"max_tokens":5}', ""),
    ("ollama", '{"max_completion_tokens": 5 ,"model": "house","messages": []}',
     '{"model": "gpt-real","messages": [],"max_tokens":5}', ""),
    ("mistral", '{"model": "house","stream": true,"x": 1.0}',
     '{"model": "gpt-real","stream": true,"x": 1.0}', ""),
    ("perplexity", '{"tools": [1], "model":"house", "stream":true, "stream_options": {}}',
     '{"model":"gpt-real", "stream":true}', "tools, stream_options"),
    ("cohere", '{"n":2,"model":"house","metadata":{"n":2}}', '{"model":"gpt-real"}', "n, metadata"),
    ("cohere", '{"n":1,"model":"house","parallel_tool_calls":true,"metadata":{}}',
     '{"model":"gpt-real"}', ""),
    ("deepseek", '{"model":"house","messages":[{"role":"developer","content":"x"},7],"x":1.0}',
     '{"model":"gpt-real","messages":[{"role":"system","content":"x"},7],"x":1.0}', ""),
    ("openai", '{"model":"house","messages":[{"role":"developer","content":"x"}],"x":1.0}',
     '{"model":"gpt-real","messages":[{"role":"developer","content":"x"}],"x":1.0}', ""),
    ("xai", '{"model":"house","logprobs":true}', '{"model":"gpt-real","logprobs":true}', ""),
    ({"kind": "vllm", "drop": ["a.b"], "rename": {"c": "d.e"}, "set": {"f": [1]}},
     '{"a": {"b": 1, "g": 2}, "c": 3, "model": "house"}',
     '{"a": {"g":2}, "model": "gpt-real","d":{"e":3},"f":[1]}', "a.b"),
    ({"kind": "vllm", "drop": ["stream_options"]}, '{"model":"house","stream":true}',
     '{"model":"gpt-real","stream":true}', ""),
], ids=range(12))
def test_a_kinds_row_and_the_config_change_a_passed_body(
        gate_for: Any, kind: Any, sent: str, went: str, lost: str) -> None:
    answered = streamed(STREAMED) if '"stream":' in sent else reply()
    gate = gate_for(always(answered), provider=kind if isinstance(kind, dict) else {"kind": kind})
    answer = gate.call(sent.encode())
    got = gate.upstream.requests.get().body.decode()
    assert json.loads(got) == json.loads(went.replace(" }", "}"))
    assert [value for name, value in answer.fields if name == "x-gateway-lost"] == (
        [lost] if lost else [])
    for name in filter(None, lost.split(", ")):
        assert gate.total("llm_params_dropped_total", param=name, provider="openai") == 1
    assert ("1.0" in got) == ("1.0" in went)  # what is not edited keeps its bytes


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("by", ["key", "alias", "header"])
def test_under_strict_nothing_is_left_out_of_a_passed_body(
        gate_for: Any, path: str, by: str) -> None:
    strict = {"strict": True}
    gate = gate_for(
        always(reply()), provider={"drop": ["seed"]},
        api_keys=[{"key": APP_KEY, "app": "chatbot", **(strict if by == "key" else {})}],
        models={"house": {"provider": "openai", **(strict if by == "alias" else {})}})
    fields = ["x-gateway-strict: 1"] if by == "header" else []
    assert gate.call(chat(seed=1), *fields, path=path).status == 400
    assert gate.upstream.connects == 0
    assert gate.call(chat(), *fields, path=path).status == 200


def test_strict_refuses_no_hint_and_nothing_of_our_own(gate_for: Any) -> None:
    gate = gate_for(always(streamed(WORD, FINAL)), provider={"kind": "perplexity"})
    body = json.dumps({"model": "house", "max_tokens": 9, "stream": True, "messages": [user("Hi")]})
    answer = gate.call(body.encode(), "x-gateway-strict: 1", path=MESSAGES)
    assert answer.status == 200 and "x-gateway-lost" not in answer.headers
    gate = gate_for(always(reply()), provider={"kind": "cohere", "drop": ["metadata.user_id"]})
    body = chat(store=True, metadata={"user_id": "u"})
    assert gate.call(body, "x-gateway-strict: 1").status == 200


def test_an_endpoint_of_the_config_takes_what_names_no_model(gate_for: Any) -> None:
    keys = [*ALL_OPEN, {"key": NARROW_KEY, "app": "narrow", "allowed_models": ["house"]}]
    gate = gate_for(serving(reply(b'{"usage": {"total_tokens": 7}}')), api_keys=keys,
                    endpoints={"/v1/moderations/": "openai"})
    assert gate.call(b'{"input":"x"}', path="/v1/moderations").status == 200
    assert gate.upstream.requests.get(timeout=WAIT).body == b'{"input":"x"}'
    assert gate.access()["prompt_tokens"] == "7"
    assert gate.call(b'{"input":"x"}', path="/v1/moderations", key=NARROW_KEY).status == 403
    assert gate.call(b'{"input":"x"}', path="/v1/embeddings").status == 400


@pytest.mark.parametrize("kind, model", [
    ("azure", "openai/.."), ("azure", "openai/../x"), ("azure", "openai/x/../y"),
    ("azure", "openai/."), ("azure", "openai/./x"), ("gemini", "openai/../x")])
def test_no_models_name_climbs_out_of_its_path(gate_for: Any, kind: str, model: str) -> None:
    gate = gate_for(always(reply()), provider={"kind": kind})
    assert gate.call(chat(model=model)).status == 400
    assert gate.upstream.connects == 0


def test_an_endpoint_of_a_provider_that_is_off_is_none(providers_for: Any) -> None:
    gate = providers_for([], {"off": {"kind": "openai", "api_key": ""}},
                         endpoints={"/v1/rerank": "off"})
    answer = gate.call(b'{"input":"x"}', path="/v1/rerank")
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["openai/gpt-4o", "openai%2Fgpt-4o", "house"])
def test_azures_paths_name_any_model(gate_for: Any, path: str) -> None:
    gate = gate_for(always(reply()))
    body = b'{"messages": []}'
    assert gate.call(body, path=f"/openai/deployments/{path}/chat/completions").status == 200


def test_an_error_under_a_200_is_one(gate_for: Any) -> None:
    body = b'{"error": {"message": "No luck with %b", "code": 502}}' % PROVIDER_KEY.encode()
    gate = gate_for(always(reply(body)))
    answer = gate.call(chat())
    told = json.loads(answer.body)["error"]["message"]
    assert (answer.status, told) == (502, "No luck with ***")
    assert gate.access()["usage"] == "none"
    assert gate.total("llm_provider_errors_total") == 1


# ---- lists of models ----


def listed_by(gate: Gate, **how: str) -> list[str]:
    return [each["id"] for each in json.loads(gate.get("/v1/models", **how).body)["data"]]


@pytest.mark.parametrize("kind, told, names", [
    ("openai", {"data": [{"id": "b"}, {"id": "a/c"}, {"id": 7}, 7]}, ["openai/b", "openai/a/c"]),
    ("anthropic", {"data": [{"id": "claude-x"}], "has_more": False}, ["openai/claude-x"]),
    ("gemini", {"models": [{"name": "models/gemini-x"}]}, ["openai/gemini-x"]),
    ("openai", {}, []), ("openai", {"data": 7}, []), ("openai", [{"id": "b"}], ["openai/b"]),
    ("openai", {"data": [{"id": "o/n"}], "models": [{"name": "o/n"}]}, ["openai/o/n"]),
])
def test_a_providers_own_models_are_listed_for_5_minutes(gate_for: Any, kind: str, told: Any,
                                                         names: list[str]) -> None:
    gate = gate_for(serving(reply(json.dumps(told).encode())),
                    provider={"kind": kind, "list_models": True})
    assert listed_by(gate) == ["house", *names] == listed_by(gate)
    asked = "/v1/models" + {"anthropic": "?limit=1000", "gemini": "?pageSize=1000"}.get(kind, "")
    assert went_to(gate) == asked
    gate.later(299)
    assert listed_by(gate) == ["house", *names] and gate.upstream.requests.empty()
    gate.later(2)
    assert listed_by(gate) == ["house", *names] and went_to(gate) == asked


def test_a_key_sees_the_listed_models_that_it_may_use(gate_for: Any) -> None:
    told = {"data": [{"id": name} for name in ("tiny-1", "tiny-2", "large")]}
    gate = gate_for(serving(reply(json.dumps(told).encode())), provider={"list_models": True},
                    api_keys=[{"key": APP_KEY, "app": "a", "allowed_models": ["openai/tiny-*"]}])
    assert listed_by(gate) == ["openai/tiny-1", "openai/tiny-2"]


@pytest.mark.parametrize("script", [
    [CLOSE], [reply(status="401 No")], [reply(b"[]")], [reply(b"{}")[:-1], CLOSE],
    [reply(b"x", status="302 Found")],
], ids=["closed", "refused", "a list", "cut", "elsewhere"])
def test_a_provider_that_cannot_list_its_models_is_left_out(gate_for: Any, script: Script) -> None:
    gate = gate_for([TAKE_HEAD, *script], serving(reply(b'{"data": [{"id": "b"}]}')),
                    provider={"list_models": True})
    assert listed_by(gate) == ["house"]
    if CLOSE in script:
        gate.later(11)  # it is asked again soon
        assert listed_by(gate) == ["house", "openai/b"]


@pytest.mark.parametrize("answered", [b"", reply(b"{}")[:-1]], ids=["nothing", "half"])
@pytest.mark.parametrize("leaves", [True, False])
def test_a_list_that_stalls_leaves_no_connection_behind(gate_for: Any, answered: bytes,
                                                        leaves: bool) -> None:
    gate = gate_for([TAKE_HEAD, answered], provider={"list_models": True})
    client = gate.client().send(request(method="GET", path="/v1/models"))
    gate.upstream.requests.get(timeout=WAIT)
    gate.settle()
    if leaves:
        client.close()
    else:
        gate.later(11)
        assert client.answer().status == 200
    gate.upstream.left.get(timeout=WAIT)


@pytest.mark.parametrize("query, page, more", [
    ("", 20, True), ("?limit=2", "ab", True), ("?limit=2&after_id=b", "cd", True),
    ("?after_id=w&limit=2", "xy", True), ("?after_id=x&limit=2", "yz", False),
    ("?after_id=z", "", False), ("?limit=1000", 26, False), ("?after_id=none&limit=1", "a", True),
    ("?limit=0", 20, True), ("?limit=x", 20, True),
])
def test_anthropics_list_has_pages(gate_for: Any, query: str, page: Any, more: bool) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    gate = gate_for([], models={name: {"provider": "openai"} for name in letters})
    told = json.loads(gate.get(f"/v1/models{query}", "anthropic-version: x").body)
    names = letters[:page] if isinstance(page, int) else page
    assert [each["id"] for each in told["data"]] == list(names)
    assert (told["has_more"], told["first_id"], told["last_id"]) == (
        more, names[:1] or None, names[-1:] or None)
    assert {key for each in told["data"] for key in each} <= {
        "type", "id", "display_name", "lifecycle", "created_at"}


CODEX_NEEDS = {
    "slug", "display_name", "supported_reasoning_levels", "shell_type", "visibility",
    "supported_in_api", "priority", "base_instructions", "supports_reasoning_summaries",
    "support_verbosity", "truncation_policy", "supports_parallel_tool_calls",
    "experimental_supported_tools"}


@pytest.mark.parametrize("path, fields, top, name, keys", [
    ("/v1/models", [], "data", "id", {"object", "owned_by"}),
    ("/v1/models?client_version=0.169.0", [], "models", "slug", CODEX_NEEDS),
    ("/v1/models", ["x-goog-api-key: " + APP_KEY], "models", "name",
     {"displayName", "supportedGenerationMethods"}),
    ("/v1/models?pageSize=9&key=" + APP_KEY, [], "models", "name", {"displayName"}),
    ("/v1beta/models", [], "models", "name", {"displayName"}),
    ("/v1/models", ["anthropic-version: x"], "data", "id", {"display_name", "lifecycle"}),
])
def test_each_dialect_has_its_list(gate_for: Any, path: str, fields: list[str], top: str, name: str,
                                   keys: set[str]) -> None:
    gate = gate_for([], models={each: {"provider": "openai"} for each in ("house", "a/b")})
    entries = json.loads(gate.get(path, *fields).body)[top]
    start = "models/" if name == "name" else ""
    assert [each[name] for each in entries] == [f"{start}house", f"{start}a/b"]
    assert all(keys <= each.keys() for each in entries)
    one, _, query = path.partition("?")
    assert json.loads(gate.get(f"{one}/a/b?{query}", *fields).body)[name] == f"{start}a/b"


# ---- Gemini's keys and paths ----

ASKED = json.dumps({"contents": [{"role": "user", "parts": [{"text": PROMPT}]}]}).encode()
GENERATE, GEMINI_STREAM = (f"/v1beta/models/house:{action}" for action in (
    "generateContent", "streamGenerateContent?alt=sse"))


@pytest.mark.parametrize("fields, query, status", [
    ([f"x-goog-api-key: {APP_KEY}"], "", 200), ([], f"?key={APP_KEY}", 200),
    ([], f"?a=1&key={APP_KEY}&b=2", 200), ([], "?key=wrong", 401), ([], "", 401),
    ([], f"?monkey={APP_KEY}", 401), ([f"x-goog-api-key: {APP_KEY}"], "?key=wrong", 200),
    (["x-gateway-key: wrong"], f"?key={APP_KEY}", 401),
])
@pytest.mark.parametrize("version", ["v1", "v1beta"])
def test_geminis_keys(gate_for: Any, fields: list[str], query: str, status: int,
                      version: str) -> None:
    gate = gate_for(always(reply(b"{}")), provider={"kind": "gemini"})
    path = f"/{version}/models/house:generateContent"
    answer = gate.call(ASKED, *fields, path=path + query, key="")
    assert answer.status == status and APP_KEY not in str(answer)
    line = gate.access()
    assert (line["path"], APP_KEY in str(line)) == (path, False)
    if status == 401:
        error = json.loads(answer.body)["error"]
        assert (error["code"], error["status"]) == (401, "UNAUTHENTICATED")
        assert gate.upstream.connects == 0
        return
    sent = gate.upstream.requests.get()
    assert sent.line.split()[1].startswith("/v1/models/gpt-real:generateContent")
    assert ("a=1&b=2" in sent.line) == ("a=1" in query) and "key=" not in sent.line
    assert sent.headers["x-goog-api-key"] == PROVIDER_KEY and APP_KEY not in str(sent)


@pytest.mark.parametrize("path, sent", [
    ("house:generateContent", "gpt-real:generateContent"),
    ("house:streamGenerateContent?alt=sse", "gpt-real:streamGenerateContent?alt=sse"),
    ("house:streamGenerateContent", "gpt-real:streamGenerateContent?alt=sse"),
    ("house:streamGenerateContent?alt=sse&prettyPrint=false",
     "gpt-real:streamGenerateContent?alt=sse&prettyPrint=false"),
    ("openai/a%20%C3%A9%3F:generateContent?x=%20", "a%20%C3%A9%3F:generateContent?x=%20"),
    ("openai/tunedModels/t:generateContent", "tunedModels/t:generateContent"),
    ("openai/a:b:countTokens", "a:b:countTokens"), ("house:embedContent", "gpt-real:embedContent"),
    ("house:batchEmbedContents", "gpt-real:batchEmbedContents"),
    ("house:explode", None), ("house", None),
])
def test_geminis_paths(gate_for: Any, path: str, sent: str | None) -> None:
    ends = streamed(gemini_chunk("", finishReason="STOP")) if "stream" in path else reply(b"{}")
    gate = gate_for(always(ends), provider={"kind": "gemini"})
    answer = gate.call(ASKED, path=f"/v1beta/models/{path}")
    assert answer.status == (200 if sent else 404)
    if sent:
        got = gate.upstream.requests.get()
        assert (got.line.split()[1], got.body) == (f"/v1/models/{sent}", ASKED)


def test_an_alias_is_replaced_in_a_batch_of_embeddings_too(gate_for: Any) -> None:
    """Gemini refuses a batch whose requests name another model than the path."""
    gate = gate_for(always(reply(b"{}")), provider={"kind": "gemini"})
    body = b'{"requests": [{"model": "models/house", "content": {}}]}'
    gate.call(body, path="/v1beta/models/house:batchEmbedContents")
    assert json.loads(gate.upstream.requests.get().body)["requests"][0]["model"] == (
        "models/gpt-real")


# ---- Responses and Gemini, passed ----


def gemini_chunk(text: str = COMPLETION, **more: Any) -> bytes:
    return event({"candidates": [{"content": {"role": "model", "parts": [{"text": text}]},
                                  "index": 0, **more}],
                  "usageMetadata": {"promptTokenCount": 1000}}).replace(b"\n\n", b"\r\n\r\n")


GEMINI_USAGE = {"promptTokenCount": 1000, "candidatesTokenCount": 150, "thoughtsTokenCount": 50,
                "totalTokenCount": 1200}
GEMINI_PIECES = [gemini_chunk(), gemini_chunk("\u00e9\u2028"), event({
    "candidates": [{"finishReason": "STOP", "index": 0}], "usageMetadata": GEMINI_USAGE})]
RESPONSES_USAGE = {"input_tokens": 1000, "output_tokens": 200,
                   "output_tokens_details": {"reasoning_tokens": 50}}
OUTLINE = {"id": "resp_1", "status": "in_progress", "output": []}
RESPONSES_PIECES = [
    named({"type": "response.created", "response": OUTLINE}), named({"type": "response.new"}),
    named({"type": "response.output_text.delta", "delta": COMPLETION}),
    named({"type": "response.completed", "response": {
        **OUTLINE, "status": "completed", "error": None, "usage": RESPONSES_USAGE}})]
SPOKEN: dict[str, tuple[str, str, bytes, list[bytes]]] = {
    # name: (the provider's kind, the path of a stream, the body, the stream's events)
    "responses": ("openai", "/v1/responses", b'{ "model":\t"house","stream":true,"input":"\\u00e9" '
                  b',"temperature":0.30,"new":{"a":1,"a":2}}', RESPONSES_PIECES),
    "gemini": ("gemini", GEMINI_STREAM, b'{ "contents":[{"parts":[{"text":"\\u00e9"}]}],"new":'
               b'{"a":1,"a":2},"generationConfig":{"topP":0.30}}', GEMINI_PIECES),
}


@pytest.mark.parametrize("name", SPOKEN)
@pytest.mark.parametrize("model", [b"house", b"openai/gpt-real"])
def test_a_dialects_bytes_pass_and_are_counted(gate_for: Any, name: str, model: bytes) -> None:
    kind, path, body, pieces = SPOKEN[name]
    gate = gate_for([READ, streamed(*pieces)], provider={"kind": kind})
    path = path.replace("house", model.decode())
    answer = gate.call(body.replace(b"house", model), path=path)
    assert answer.body == b"".join(pieces)
    assert answer.headers["content-type"].startswith("text/event-stream")
    sent = gate.upstream.requests.get()
    assert sent.body == body.replace(b"house", b"gpt-real")
    assert sent.line.split()[1] == path.replace("beta", "").replace(model.decode(), "gpt-real")
    line = gate.access()
    assert (line["usage"], line["prompt_tokens"], line["completion_tokens"],
            line["reasoning_tokens"]) == ("reported", "1000", "200", "50")
    assert gate.total("llm_tokens_total", direction="completion") == 200


CEILINGS: list[tuple[str, str, bytes, bytes]] = [
    ("mistral", PATH, b'{"model": "house", "max_completion_tokens": 5000}',
     b'{"model": "gpt-real","max_tokens":100}'),
    ("openai", "/v1/completions", b'{"model": "house", "max_tokens": 500}',
     b'{"model": "gpt-real", "max_tokens": 100}'),
    ("openai", PATH, b'{"model": "house", "max_tokens": 5000,  "max_completion_tokens":7}',
     b'{"model": "gpt-real", "max_tokens": 100,  "max_completion_tokens":7}'),
    ("openai", "/v1/responses", b'{"model": "house", "input": "a", "max_output_tokens": 101}',
     b'{"model": "gpt-real", "input": "a", "max_output_tokens": 100}'),
    ("anthropic", "/v1/messages", b'{"model": "house", "max_tokens": 100, "messages": []}',
     b'{"model": "gpt-real", "max_tokens": 100, "messages": []}'),
    ("anthropic", "/v1/messages", b'{"model": "house", "max_tokens": 500, "thinking": '
     b'{"type": "enabled", "budget_tokens": 400}, "messages": []}',
     b'{"model": "gpt-real", "max_tokens": 100, "thinking": {"type":"disabled"}, "messages": []}'),
    ("gemini", "/v1beta/models/house:generateContent",
     b'{"contents": [], "generationConfig": {"maxOutputTokens": "101", "topP": 1}}',
     b'{"contents": [], "generationConfig": {"maxOutputTokens":100,"topP":1}}')]


@pytest.mark.parametrize("kind, path, body, sent", CEILINGS)
def test_a_ceiling_holds_where_bytes_pass(
        gate_for: Any, kind: str, path: str, body: bytes, sent: bytes) -> None:
    gate = gate_for(always(reply(b"{}")), provider={"kind": kind, "max_output_tokens": 100})
    answer_ = gate.call(body, path=path)
    assert gate.upstream.requests.get(timeout=WAIT).body == sent
    assert (answer_.headers.get("x-gateway-lost") == "max_tokens") == (b"500" in body or
                                                                       b"101" in body)


@pytest.mark.parametrize("name", SPOKEN)
def test_a_plain_answer_of_a_dialect_passes_and_is_counted(gate_for: Any, name: str) -> None:
    kind, path, body, _ = SPOKEN[name]
    usage = b'{ "usage": %b, "usageMetadata": %b, "n":1.0}\n' % (
        json.dumps(RESPONSES_USAGE).encode(), json.dumps(GEMINI_USAGE).encode())
    gate = gate_for(always(reply(usage)), provider={"kind": kind})
    path = path.replace("streamG", "g").replace("?alt=sse", "")
    assert gate.call(body.replace(b"true", b"false"), path=path).body == usage
    line = gate.access()
    assert (line["prompt_tokens"], line["completion_tokens"]) == ("1000", "200")


GEMINI_ERROR = event({"error": {"code": 429, "message": "Full", "status": "RESOURCE_EXHAUSTED"}})
BARE_ERROR = named({"type": "error", "code": "rate_limit_exceeded", "message": "Full"})
FAILED_RESPONSE = named({"type": "response.failed", "response": {
    **OUTLINE, "status": "failed", "error": {"code": "rate_limit_exceeded", "message": "Full"}}})
ENDS: dict[str, tuple[str, list[Step], str]] = {
    # name: (dialect, what comes after some content, the status in the log)
    **{f"{name}, {how}": (name, script, "502") for name in SPOKEN for how, script in (
        ("cut", [CLOSE]), ("reset", [RESET]), ("ended early", [END, CLOSE]),
        ("cut in an event", [chunks(b"data: {"), CLOSE]))},
    "gemini, failed": ("gemini", [chunks(GEMINI_ERROR) + END], "429"),
    "responses, failed": ("responses", [chunks(FAILED_RESPONSE) + END], "429"),
    "responses, an error and failed": ("responses", [chunks(BARE_ERROR + FAILED_RESPONSE) + END],
                                       "429"),
    "responses, an error, then failed": ("responses", [chunks(BARE_ERROR), GO,
                                                       chunks(FAILED_RESPONSE) + END], "429"),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("array", [False, True])
def test_a_stream_that_fails_says_so_in_its_dialect(gate_for: Any, name: str, array: bool) -> None:
    dialect, script, status = ENDS[name]
    kind, path, body, pieces = SPOKEN[dialect]
    gate = gate_for([READ, STREAM_HEAD + chunks(*pieces[:3 if kind == "openai" else 2]), GO,
                     *script], provider={"kind": kind})
    client = gate.client().send(request(body, path=path.partition("?")[0] if array else path))
    code, fields = client.head()
    assert (code, client.chunk()[:1] == b"[") == (200, array and kind == "gemini")
    for _ in range(2):
        gate.upstream.go.release()
    said = b"".join(iter(client.chunk, b""))
    if array and kind == "gemini":
        assert dict(fields)["content-type"] == "application/json" and said[-1:] == b"}"
        last = json.loads(b"[" + said.lstrip(b",") + b"]")[-1]
    else:
        last = Answer(200, [], said).events[-1]
    assert b"response.completed" not in said and b"[DONE]" not in said
    if kind == "gemini":
        assert last["error"]["code"] == {"502": 503}.get(status, int(status))
    else:
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"]["code"] in ("server_error", "rate_limit_exceeded")
    line = gate.access()
    assert (line["status"], line["usage"]) == (status, "estimated")


@pytest.mark.parametrize("name, first, status", [
    ("gemini", GEMINI_ERROR, 429), ("responses", BARE_ERROR, 429), ("gemini", b"", 502),
    ("responses", RESPONSES_PIECES[0] + FAILED_RESPONSE, 429), ("responses", b"", 502),
])
def test_a_stream_that_fails_at_once_has_a_real_status(gate_for: Any, name: str, first: bytes,
                                                       status: int) -> None:
    kind, path, body, _ = SPOKEN[name]
    gate = gate_for([READ, streamed(*filter(None, [first]))], provider={"kind": kind})
    answer = gate.call(body, path=path)
    error = json.loads(answer.body)["error"]
    told = {"gemini": {502: 503}.get(status, status), "openai": error["code"]}[kind]
    assert (answer.status, error["code"]) == (status, told)


@pytest.mark.parametrize("pieces", [GEMINI_PIECES, [gemini_chunk(finishReason="STOP")]])
@pytest.mark.parametrize("cut", [1, 7, 10_000])
def test_a_gemini_stream_may_be_an_array(gate_for: Any, pieces: list[bytes], cut: int) -> None:
    whole = b"".join(pieces)
    gate = gate_for([READ, streamed(*(whole[at:at + cut] for at in range(0, len(whole), cut)))],
                    provider={"kind": "gemini"})
    answer = gate.call(ASKED, path=GEMINI_STREAM.replace("?alt=sse", ""))
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == Answer(200, [], whole.replace(b"\r", b"")).events


def test_a_translated_gemini_stream_may_be_an_array(gate_for: Any) -> None:
    gate = gate_for([READ, streamed(STREAMED), READ, streamed(STREAMED.replace(FINAL, b""))],
                    provider={"kind": "vllm"})
    path = GEMINI_STREAM.replace("?alt=sse", "")
    assert json.loads(gate.call(ASKED, path=path).body)[-1]["candidates"][0]["finishReason"]
    cut = gate.call(ASKED, path=path).body
    assert json.loads(cut + b"]")[-1]["error"]["code"] == 503


# ---- what another vendor's answer left in a passed conversation ----

ENVELOPE_GW, GEMINI_ENVELOPE = "gw1.W10=", "Z3cxLlsid"


@pytest.mark.parametrize("kind, path, history, before, after", [
    ("openai", PATH, "messages",
     [{"role": "assistant", "content": "x", "thinking_blocks": [{"signature": "s"}], "n": 1},
      {"tool_calls": [{"id": "c__ts_QUJD", "extra_content": {"google": {}}, "function": {
          "name": "f", "arguments": '{"id": "c__ts_QUJD", "extra_content": 1}'}}]},
      {"role": "tool", "tool_call_id": "c__ts_QUJD", "content": "c__ts_QUJD gw1."}],
     [{"role": "assistant", "content": "x", "n": 1},
      {"tool_calls": [{"id": "c", "function": {
          "name": "f", "arguments": '{"id": "c__ts_QUJD", "extra_content": 1}'}}]},
      {"role": "tool", "tool_call_id": "c", "content": "c__ts_QUJD gw1."}]),
    ("openai", "/v1/responses", "input",
     [{"type": "reasoning", "id": "r", "encrypted_content": ENVELOPE_GW, "summary": []},
      {"type": "reasoning", "id": "r", "encrypted_content": "gAAA", "summary": []},
      {"type": "function_call", "call_id": "c__ts_QUJD", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "c__ts_QUJD", "output": "x"}],
     [{"type": "reasoning", "id": "r", "encrypted_content": "gAAA", "summary": []},
      {"type": "function_call", "call_id": "c", "arguments": "{}"},
      {"type": "function_call_output", "call_id": "c", "output": "x"}]),
    ("anthropic", MESSAGES, "messages",
     [{"role": "assistant", "content": [
         {"type": "thinking", "thinking": "t", "signature": ENVELOPE_GW},
         {"type": "thinking", "thinking": "t", "signature": "EqQB"},
         {"type": "tool_use", "id": "c__ts_QUJD", "name": "f", "input": {"a": 1}}]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c__ts_QUJD"}]}],
     [{"role": "assistant", "content": [
         {"type": "thinking", "thinking": "t", "signature": "EqQB"},
         {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]),
    ("anthropic", MESSAGES, "messages",  # a tool's own arguments are nobody's marks
     [{"role": "assistant", "content": [
         {"type": "tool_use", "id": "c__ts_QUJD",
          "input": {"id": "a__ts_b", "extra_content": 1}}]}],
     [{"role": "assistant", "content": [
         {"type": "tool_use", "id": "c", "input": {"id": "a__ts_b", "extra_content": 1}}]}]),
    ("gemini", GENERATE, "contents",
     [{"role": "model", "parts": [
         {"text": "t", "thought": True, "thoughtSignature": GEMINI_ENVELOPE},
         {"functionCall": {"name": "f", "args": {}}, "thoughtSignature": GEMINI_ENVELOPE},
         {"functionCall": {"name": "g"}, "thoughtSignature": "AAAA"}, {"text": "x"}]}],
     [{"role": "model", "parts": [
         {"functionCall": {"name": "f", "args": {}}},
         {"functionCall": {"name": "g"}, "thoughtSignature": "AAAA"}, {"text": "x"}]}]),
    ("openai", PATH, "messages",
     [{"role": "assistant", "content": "x", "reasoning_content": "t"}],
     [{"role": "assistant", "content": "x"}]),
    ("openai-compatible", PATH, "messages",  # some servers want theirs back
     [{"role": "assistant", "content": "x", "reasoning_content": "t"}],
     [{"role": "assistant", "content": "x", "reasoning_content": "t"}]),
    ("anthropic", f"{MESSAGES}/count_tokens", "messages",
     [{"role": "assistant", "content": [{"type": "tool_use", "id": "c__ts_QUJD", "name": "f"}]}],
     [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f"}]}]),
], ids=["chat", "responses", "messages", "arguments", "gemini", "reasoning", "own reasoning",
        "count_tokens"])
def test_a_passed_conversation_loses_other_vendors_marks(
        gate_for: Any, kind: str, path: str, history: str, before: Any, after: Any) -> None:
    gate = gate_for(always(reply(b"{}")), provider={"kind": kind})
    rest = b', "temperature" :0.30, "tools": [{"extra_content": 1}]}'
    model = b"" if kind == "gemini" else b'"model": "gpt-real", '
    gate.call(b'{%b"%b": %b%b' % (model, history.encode(), json.dumps(before).encode(), rest),
              path=path)
    sent = gate.upstream.requests.get().body
    assert sent.endswith(rest) and json.loads(sent)[history] == after


def test_a_conversation_that_only_speaks_of_marks_passes_as_it_is(gate_for: Any) -> None:
    body = (b'{"model":"house", "max_tokens":9, "messages":[{"role":"user","content":'
            b'"what is thinking_blocks?"},{"role":"assistant","content":[{"type":"tool_use","id":'
            b'"c","name":"f","input":{"x":0.30, "y":1E5,"z":"\\u00e9"}}]}]}')
    gate = gate_for([READ, reply(b"{}")], provider={"kind": "anthropic"})
    assert gate.call(body, path=MESSAGES).status == 200
    came = gate.upstream.requests.get(timeout=WAIT).body
    assert came == body.replace(b'"house"', b'"gpt-real"')


@pytest.mark.parametrize("turn_", [
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "T", "signature": "gw1.a"}]},
    {"role": "assistant", "content": None, "thinking_blocks": [{"type": "thinking"}]},
    {"role": "model", "parts": [{"text": "T", "thought": True, "thoughtSignature": "gw1.a"}]}])
def test_a_turn_of_which_nothing_is_left_goes(turn_: JSON) -> None:
    others = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    assert gateway.without_marks([others[0], turn_, others[1]]) == others


# ---- counts ----


@pytest.mark.parametrize("path, body, field", [
    (f"{MESSAGES}/count_tokens?beta=true",
     lambda text: {"model": "house", "messages": [{"role": "user", "content": text}]},
     "input_tokens"),
    ("/v1/responses/input_tokens", lambda text: {"model": "house", "input": text}, "input_tokens"),
    ("/v1beta/models/house:countTokens", lambda text: {"contents": [{"parts": [{"text": text}]}]},
     "totalTokens"),
    ("/v1beta/models/house:countTokens", lambda text: {"generateContentRequest": {
        "contents": [{"parts": [{"text": text}]}]}}, "totalTokens"),
])
def test_tokens_are_estimated_where_the_provider_cannot_count(gate_for: Any, path: str, body: Any,
                                                              field: str) -> None:
    gate = gate_for([], provider={"kind": "openai-compatible"})
    answers = [gate.call(json.dumps(body("x" * size)).encode(), path=path) for size in (3, 3003)]
    small, large = (json.loads(answer.body)[field] for answer in answers)
    assert (large - small, small >= 8) == (1000, True)  # on the high side
    assert all(answer.headers["x-gateway-estimate"] == field for answer in answers)
    assert gate.call(b'{"model": "house", "messages": 7, "contents": 7}', path=path).status == 400
    assert gate.upstream.connects == 0


@pytest.mark.parametrize("path, provider", [
    (f"{MESSAGES}/count_tokens", "anthropic"), ("/v1/responses/input_tokens", "openai"),
    ("/v1beta/models/house:countTokens", "gemini")])
def test_who_can_count_is_asked(gate_for: Any, path: str, provider: str) -> None:
    gate = gate_for(always(reply(b'{ "n":1.0}')), provider={"kind": provider})
    answer = gate.call(chat(), path=path)
    assert answer.body == b'{ "n":1.0}' and "x-gateway-estimate" not in answer.headers


# ---- in which of its dialects a provider is asked ----

THINKS, PLAIN_TEXT = "openai/gpt-5.2", "openai/gpt-4.1"
CHAT_WIRE, RESPONSES_WIRE = "/v1/chat/completions", "/v1/responses"


@pytest.mark.parametrize("client, model, more, provider, wire", [
    ("messages", THINKS, {}, {}, RESPONSES_WIRE), ("gemini", THINKS, {}, {}, RESPONSES_WIRE),
    ("messages", "openai/o3", {}, {}, RESPONSES_WIRE), ("messages", PLAIN_TEXT, {}, {}, CHAT_WIRE),
    ("gemini", PLAIN_TEXT, {}, {}, CHAT_WIRE), ("chat", THINKS, {}, {}, CHAT_WIRE),
    ("responses", PLAIN_TEXT, {}, {}, RESPONSES_WIRE),
    ("messages", THINKS, {"stop_sequences": ["x"]}, {}, CHAT_WIRE),
    ("gemini", THINKS, {"generationConfig": {"stopSequences": ["x"]}}, {}, CHAT_WIRE),
    ("gemini", THINKS, {"generationConfig": {"seed": 7}}, {}, CHAT_WIRE),
    ("gemini", THINKS, {"generationConfig": {"presencePenalty": 1}}, {}, CHAT_WIRE),
    ("messages", THINKS, {}, {"wire": "chat"}, CHAT_WIRE),
    ("messages", PLAIN_TEXT, {}, {"wire": "responses"}, RESPONSES_WIRE),
    ("messages", THINKS, {"stop_sequences": ["x"]}, {"wire": "responses"}, RESPONSES_WIRE),
    ("chat", PLAIN_TEXT, {}, {"wire": "responses"}, RESPONSES_WIRE),
    ("responses", THINKS, {}, {"wire": "chat"}, CHAT_WIRE),
    ("messages", THINKS, {}, {"kind": "vllm"}, CHAT_WIRE),
    ("responses", THINKS, {}, {"kind": "vllm"}, CHAT_WIRE),
    ("responses", THINKS, {}, {"kind": "vllm", "responses": True}, RESPONSES_WIRE),
    ("messages", THINKS, {}, {"kind": "vllm", "responses": True}, CHAT_WIRE),
])
def test_the_wire_suits_the_model_and_what_is_asked(gate_for: Any, client: str, model: str,
                                                    more: Any, provider: Any, wire: str) -> None:
    path, asked = {
        "chat": (PATH, json.loads(chat())), "responses": ("/v1/responses", {"input": PROMPT}),
        "messages": (MESSAGES, {"max_tokens": 99, **json.loads(chat())}),
        "gemini": (f"/v1beta/models/{model}:generateContent", json.loads(ASKED))}[client]
    body = {**asked, **more, **({} if client == "gemini" else {"model": model})}
    gate = gate_for(always(reply(b"{}", status="500 No")), provider=provider)
    gate.call(json.dumps(body).encode(), path=path)
    assert went_to(gate) == wire


def test_an_alias_has_the_last_word_on_its_wire(gate_for: Any) -> None:
    gate = gate_for(always(reply(b"{}", status="500 No")), provider={"wire": "responses"}, models={
        "house": {"provider": "openai", "model": "gpt-5.2", "wire": "chat"}})
    gate.call(json.dumps({"max_tokens": 99, **json.loads(chat())}).encode(), path=MESSAGES)
    assert went_to(gate) == CHAT_WIRE


# ---- what is asked of a server before it is used ----


@pytest.mark.parametrize("method, path, fields, key, status", [
    ("GET", "/v1/responses", ["Upgrade: websocket", "Connection: Upgrade"], APP_KEY, 426),
    ("GET", "/v1/responses", [], APP_KEY, 405), ("HEAD", "/", [], "", 200),
    ("GET", "/", [], "", 200), ("HEAD", "/v1/models", [], "", 401),
])
def test_what_is_asked_before_a_server_is_used(gate_for: Any, method: str, path: str,
                                               fields: list[str], key: str, status: int) -> None:
    gate = gate_for([])
    client = gate.client().send(request(b"", *fields, method=method, path=path, key=key))
    answer = client.answer(is_head=method == "HEAD")
    assert (answer.status, answer.headers.get("upgrade")) == (
        status, "HTTP/1.1" if status == 426 else None)
    assert client.send(request(method="GET", path="/health")).answer().status == 200


# ==================================================================================================
# Secrets
# ==================================================================================================


def test_no_secret_was_ever_told(gate_for: Any) -> None:
    """In all that the tests above made gateways say: logs, heads, errors, metrics, output."""
    gate = gate_for([READ, CLOSE])
    gate.call(chat())
    gate.access()
    gate.series("")
    told = "\n".join(OUTPUT)
    for kind in ("msg=access", "HTTP/1.1 502 ", '{"error":{', "llm_requests_total{"):
        assert kind in told
    for secret in (*SECRETS, "vk-disabled-0123456789", "vk-expired-0123456789"):
        assert secret not in told, told[max(told.index(secret) - 200, 0):][:400]
