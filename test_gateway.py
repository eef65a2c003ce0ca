"""Tests of gateway.py, in its own order: a table of cases for each section, and one loop over it.

    python3 -m pytest -q test_gateway.py

Nothing else need be installed, and nothing leaves this machine. What decodes piece by piece is
run over every cut of its input, since a network cuts where it likes.
"""

from __future__ import annotations

import ast
import bisect
import bz2
import calendar
import copy
import dataclasses
import dis
import gzip
import itertools
import json
import pickle
import re
import time
import tracemalloc
import types
import zlib
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import gateway
from gateway import ConfigError, Event, GatewayError, Price, Usage

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
    assert len(lines) < 7000 and len(SOURCE.encode()) < 280_000
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

EVENTS: list[tuple[str, list[tuple[str, str]]]] = [
    ("data: a\n\n", [("", "a")]),
    ("data:a\n\ndata:  b \n\n", [("", "a"), ("", " b ")]),
    ("event: x\ndata: a\ndata:\ndata: b\n\n", [("x", "a\n\nb")]),
    (": comment\n\nid: 1\nretry: 5\ndata: a\nunknown\n\n: data: no\n\n", [("", "a")]),
    ("event: only\n\ndata\n\n\n\n\ndata: a\n\n", [("", "a")]),
    ("event:x\ndata:1\n\ndata:2\n\n", [("x", "1"), ("", "2")]),
    ("data: é🦜\u2028\u2029\x85\x1c\x0b\n\n", [("", "é🦜\u2028\u2029\x85\x1c\x0b")]),
    ("data: a: b\ndatax: no\n\ndata: last", [("", "a: b"), ("", "last")]),
    ("data: a\n\ndata: last\n", [("", "a"), ("", "last")]),
    ("\ndata: a\n\n", [("", "a")]),
    ("", []), ("\n\n", []),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("text, expected", EVENTS)
def test_events_are_the_same_however_they_are_cut(
        text: str, expected: list[tuple[str, str]], end: str) -> None:
    stream = text.replace("\n", end).encode()
    for pieces in cuts(stream):
        decoder = gateway.SSEDecoder(1000)
        events = [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()
        assert events == [Event(name, data.encode()) for name, data in expected], pieces


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
        decoder = gateway.SSEDecoder(1000)
        events = [event for piece in pieces for event in decoder.feed(piece)] + decoder.end()
        assert b"".join(event.data for event in events) == b"abcd", pieces


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
    assert gateway.SSEDecoder(100).feed(wire) == [Event(name, b'{"a":1}')]


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
    ({"message": ["x"], "type": {}, "code": []}, 502, "server_error",
     "The provider reported an error."),
    ("in words", 502, "server_error", "in words"),
    ([1], 502, "server_error", "The provider reported an error."),
    (True, 502, "server_error", "The provider reported an error."),
])
def test_a_providers_error_keeps_its_words(
        wire: object, status: int, label: str, message: str) -> None:
    error = CHAT.parse_error(wire, 502)
    assert (error.status, error.provider_error, error.message) == (status, label, message)
    assert error.is_quoted, "the log must leave these words out"
    json.loads(CHAT.render_error(error, ""))


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
    assert CHAT.asks_for_usage(document) is asks
    assert document.with_values(CHAT.values_for_usage(document)) == asked


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

# What comes; what of it is seen where the usage is to be hidden; prompt tokens; how it ends.
STREAMS: dict[str, tuple[list[bytes], list[bytes], int | None, str]] = {
    "plain": ([ROLE, HI, STOP, DONE], [ROLE, HI, STOP, DONE], None, "ended"),
    "usage": ([ROLE, HI, STOP, usage_chunk(7), DONE], [ROLE, HI, STOP, DONE], 7, "ended"),
    "null in the others": ([ROLE, NULL, usage_chunk(7), DONE], [ROLE, NULL, DONE], 7, "ended"),
    "with the last content": ([HI, WHOLE, DONE], [HI, WHOLE, DONE], 7, "ended"),
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
    "usage that is none": ([HI, NO_USAGE, DONE], [HI, NO_USAGE, DONE], None, "ended"),
    "telling words in a text": ([TRICKY, usage_chunk(7), DONE], [TRICKY, DONE], 7, "ended"),
    "spaces": ([HI, b"data:  [DONE] \n\n"], [HI, b"data:  [DONE] \n\n"], None, "ended"),
    "an error": ([HI, FAILED, HI, DONE], [HI, FAILED], None, "failed"),
    "an error after usage": ([HI, usage_chunk(7), FAILED, DONE], [HI, usage_chunk(7), FAILED], 7,
                             "failed"),
    "an error first": ([FAILED, DONE], [FAILED], None, "failed"),
    "cut": ([ROLE, HI], [ROLE, HI], None, "cut"),
    "cut after usage": ([HI, STOP, usage_chunk(7)], [HI, STOP, usage_chunk(7)], 7, "cut"),
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
    assert kind.paths and set(kind.paths) <= set(gateway.DIALECTS)
    assert all(path.startswith("/") for path in kind.paths.values())
    if kind.base_url is not None:
        assert gateway.settle_base_url(kind.base_url, kind.version) == kind.base_url
        assert kind.base_url.startswith("https://") and kind.base_url.endswith(kind.version)
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
    ("limits.body", True, ": must be"), ("limits.boddy", 1, ": unknown key; did you mean 'body'?"),
    ("timeouts.connect", -1, ": must be"), ("timeouts", 5, ": must be"),
    ("log", "xml", ': must be one of "text", "json", not a string'),
    ("log_headers", ["Authorization"], "[0]: is no header name, or one that"),
    ("log_headers", ["a b"], "[0]: is no header name"), ("prices", 1, ": must be"),
    ("provider", {}, ": unknown key; did you mean 'prov"),
    ("zzz", 1, ": unknown key; known: listen, providers"),
]


@pytest.mark.parametrize("path, value, expected", REFUSED)
def test_a_bad_config_is_refused_with_its_path(path: str, value: object, expected: str) -> None:
    lines = told(changed((path, value)))
    assert lines[0].startswith(path + expected)
    assert len(lines) == 1 or path == "providers", "one fault is told once"


def test_every_refused_thing_is_told_at_once() -> None:
    """Errors and warnings, those of the environment among them, each with its path."""
    tree = changed(("listen", "x"), ("providers.openai.api_key", "${NONE}"), ("api_keys[1].app", 5),
                   ("routing[0].provider", "nobody"), ("limits.fields", "many"), ("colour", "red"),
                   ("models.fast.provider", "elsewhere"), ("api_keys[0].key", "${file:/none}"))
    assert sorted(line.partition(": ")[0] for line in told(tree)) == sorted([
        "listen", "providers.openai.api_key", "api_keys[1].app", "routing[0].provider",
        "limits.fields", "colour", "models.fast.provider", "api_keys[0].key"])


@pytest.mark.parametrize("text, expected", [
    ("", "line 1, column 1: "), ("null", "must be an object"), ("[]", "must be an object"),
    ('"x"', "must be an object"), ('{"a":1,}', "line 1, column "), ("{} x", "line 1, column 4: "),
    ("{}", "providers: is missing"), ('{"limits":{"body":NaN}}', "NaN is not JSON"),
    ('{"limits":{"body":-Infinity}}', "-Infinity is not JSON"), ("[" * 100_000, "nested too deep"),
    ('{"listen":' + "[" * 700 + "]" * 700 + "}", "nested too deep"),
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
    lines = told(text, {"LISTEN": ":80"})
    assert lines[0].startswith("key 'app' stands twice") and len(lines) == 2
    assert lines[1].startswith("providers.openai.api_key: environment variable NONE is not set")


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


@pytest.mark.parametrize("path, value, expected", [
    ("api_keys", [], "api_keys: is empty: nobody may call"),
    ("routing[0].provider", "opnai",
     "routing[0].provider: no provider 'opnai' is configured; did "),
    ("providers.openai.api_key", "",
     "providers.openai.api_key: is absent or empty: the provider is "),
    ("providers.openai.api_key", GONE, "providers.openai.api_key: is absent or empty"),
    ("providers.openai.api_key", "${NONE:-}", "providers.openai.api_key: is absent or empty"),
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
    ("$KEY", "write ${KEY} for the environment variable, or $$KEY for the text itself"),
    ("${file:/none}", "cannot read /none: No such file or directory"),
    ("${file:/run/binary}", "cannot read /run/binary: it is not UTF-8"),
    ("${}", ""), ("${KEY", ""), ("vk-${KEY-0123456789", ""),
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
        "connections": 20_000, "event": 16 << 20, "events": 256 << 20, "answer": 64 << 20,
        "grace": 30}
    assert dataclasses.asdict(config.timeouts) == {
        "connect": 10, "first_token": 600, "idle": 300, "total": 0, "head": 10, "body": 30,
        "keep_alive": 75, "write": 60}


def test_no_secret_shows_in_what_is_printed_of_an_object() -> None:
    config = parsed(BASE)
    router = gateway.Router(config, lambda provider, model: None)
    ring = gateway.Keyring(config.api_keys, float)
    app = ring.authenticate({"x-api-key": VIRTUAL_KEY}, 0.0)
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
    if app is not None:
        assert RING.authenticate(headers, TODAY).name == app
    else:
        assert refusal(RING.authenticate, headers, TODAY).status == 401


def test_an_answer_tells_nothing_of_a_key_that_is_not_taken() -> None:
    first, *others = [vars(refusal(RING.authenticate, {"x-api-key": key}, TODAY)) for key in (
        "nonsense", "vk-disabled-0123456789", "vk-expired-0123456789", "x" * 9999)]
    assert all(other == first for other in others)
    error = refusal(RING.authenticate, {}, TODAY)
    assert (error.code, list(error.headers)) == (
        "invalid_api_key", [("www-authenticate", "Bearer")])


def test_a_key_holds_to_the_end_of_its_last_day() -> None:
    headers = {"x-api-key": "vk-last-day-0123456789"}
    midnight = float(calendar.timegm((2026, 11, 25, 0, 0, 0)))
    assert RING.authenticate(headers, midnight - 1).name == "last day"
    assert refusal(RING.authenticate, headers, midnight).status == 401


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
    ("gpt-4-mini", "local", "gpt-4-mini", None), ("gpt-4", "openai", "gpt-4", None),
    ("o3", "openai", "o3", None),
])
def test_where_a_model_leads(model: str, provider: str, upstream_model: str,
                             alias: str | None) -> None:
    route = gateway.Router(parsed(ROUTED), lambda provider, model: None).resolve(model)
    assert (route.provider.name, route.model, route.alias) == (provider, upstream_model, alias)


@pytest.mark.parametrize("model",
                         ["unknown", "o2", "gone", "off/m", "local/", "/x", "FAST", "", "é",
                                   "x" * 100_000])
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
    ({}, TIERED), ({"input": 1}, Price(nano("1"), nano("12"))),
    ({"output": 0}, Price(nano("2"), 0, nano("0.2"))),
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
                 "time=0 level=ERROR", "x" * 100_000]


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
    fields = [("msg", "access"), ("path", value), ("status", 200), ("stream", True), ("x", value)]
    line = gateway.render_log(fields)
    assert re.fullmatch(r"[\x20-\x7e]{0,4000}", line)
    found = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^" ]+)(?= |$)', line)
    assert [name for name, _ in found] == [name for name, _ in fields]
    assert "".join(f" {name}={text}" for name, text in found) == line, "nothing between the fields"
    assert found[2:4] == [("status", "200"), ("stream", "true")]
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
    assert refusal(parse_head, raw).status == status


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
    lines = gateway.passing_fields(parse_head(head(line)),
                                   gateway.REQUEST_ONLY_HERE | {"content-type"})
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
    assert len(BUILT_IN) == len(ROWS)
    for group in gateway.PRICES.strip().split("\n\n"):
        names = [row.split()[0] for row in group.splitlines()[1:]]
        assert names and names == sorted(names)


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
