#!/usr/bin/env python3
"""Fuzz the parsers of gateway.py: python interop/fuzz.py --seconds N [TARGET].

Each target draws its input from libFuzzer's bytes and holds two things: that nothing is raised but
what the parser's docstring says, and what must be true of any result, such as that it does not
matter where a stream was cut. Without TARGET all of them take turns, chosen by the input itself.
The first breach ends the run with a traceback and a status other than 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["gateway"]):
    import gateway as gw
from gateway import DIALECTS, GatewayError, Losses, Rewrites, Target

JSON = dict[str, Any]
Draw = atheris.FuzzedDataProvider
LIMIT = 4096  # bytes of an event
MAX_EDITS = 5

# ---- what the inputs are made of ----

CHAT_REQUEST: JSON = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "s", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        {"role": "user", "name": "n", "content": [
            {"type": "text", "text": "t", "prompt_cache_breakpoint": {"ttl": "12h"}},
            {"type": "image_url", "image_url": {
                "url": "data:image/png;base64,AA==", "detail": "low"}},
            {"type": "file", "file": {
                "file_data": "data:text/plain;base64,AAAA", "filename": "f"}}]},
        {"role": "assistant", "content": "a", "refusal": "r", "reasoning_content": "h",
         "thinking_blocks": [{"type": "thinking", "thinking": "h", "signature": "s"},
                             {"type": "redacted_thinking", "data": "d"}],
         "tool_calls": [
             {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
             {"id": "d", "type": "custom", "custom": {"name": "g", "input": "i"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        {"role": "tool", "tool_call_id": "d", "content": [{"type": "text", "text": "r"}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{\"a\": 1}"}},
        {"role": "function", "name": "f", "content": "r"}],
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "strict": True, "parameters": {
            "type": "object", "properties": {"a": {"type": "string", "minLength": 1}},
            "required": ["a"], "additionalProperties": False}}},
        {"type": "custom", "custom": {"name": "g", "format": {"type": "grammar", "grammar": {
            "syntax": "lark", "definition": "start: \"a\""}}}}],
    "functions": [{"name": "h", "parameters": {"type": "object"}}],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}},
    "function_call": {"name": "h"}, "parallel_tool_calls": False, "temperature": 1.5, "top_p": 0.5,
    "top_k": 1, "max_completion_tokens": 9, "max_tokens": 9, "stop": ["\n"], "n": 1,
    "reasoning_effort": "high", "user": "u", "safety_identifier": "s", "store": True, "seed": 1,
    "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": {"type": "object", "anyOf": [{"$ref": "#/$defs/a"}],
                                                "$defs": {"a": {"type": "object"}}}}},
    "thinking": {"type": "enabled", "budget_tokens": 2000}, "logprobs": False, "top_logprobs": 0,
    "web_search_options": {"user_location": {"type": "approximate", "approximate": {"city": "c"}}},
    "metadata": {"a": "b"}, "service_tier": "auto", "stream": True, "modalities": ["text"],
    "stream_options": {"include_usage": True}, "audio": None, "prediction": None, "x": 1}
MESSAGES_REQUEST: JSON = {
    "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": [
            {"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}},
            {"type": "image", "source": {
                "type": "base64", "media_type": "image/png", "data": "AA=="}},
            {"type": "image", "source": {"type": "url", "url": "https://a.example"}},
            {"type": "document", "title": "d", "source": {
                "type": "text", "media_type": "text/plain", "data": "d"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "h", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"}, {"type": "server_tool_use", "id": "s"},
            {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "is_error": True,
                                      "content": [{"type": "text", "text": "r"}]}]},
        {"role": "system", "content": "later"}, {"role": "assistant", "content": "a "}],
    "tools": [{"name": "f", "description": "d", "strict": True, "type": "custom",
               "input_schema": {"type": "object", "properties": {"a": {}}}}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "temperature": 0.5, "top_p": 0.5, "top_k": 1, "stop_sequences": ["\n"],
    "thinking": {"type": "enabled", "budget_tokens": 2000}, "metadata": {"user_id": "u"},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
    "stream": True, "service_tier": "standard_only", "x": 1}

CHAT_USAGE: JSON = {
    "prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18,
    "prompt_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 1}}
MESSAGES_USAGE: JSON = {
    "input_tokens": 9, "output_tokens": 9, "cache_read_input_tokens": 1, "service_tier": "standard",
    "cache_creation_input_tokens": 2, "cache_creation": {"ephemeral_1h_input_tokens": 1},
    "output_tokens_details": {"thinking_tokens": 1}}
CALLS = [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
         {"index": 1, "id": "d", "type": "custom", "custom": {"name": "g", "input": "i"}}]
DELTAS: list[JSON] = [
    {"role": "assistant", "content": ""}, {"content": "a"}, {"refusal": "r"},
    {"reasoning_content": "h"}, {"reasoning": "h"}, {"tool_calls": CALLS},
    {"thinking_blocks": [{"type": "thinking", "thinking": "h", "signature": "s"}]},
    {"function_call": {"name": "f", "arguments": "{}"}},
    {"annotations": [{"type": "url_citation", "url_citation": {
        "url": "u", "title": "t", "start_index": 0, "end_index": 1}}]}, {}]
CHAT_REPLY: JSON = {
    "id": "i", "object": "chat.completion", "created": 1, "model": "m", "service_tier": "default",
    "usage": CHAT_USAGE, "choices": [{
        "index": 0, "logprobs": None, "finish_reason": "tool_calls",
        "message": {key: value for delta in DELTAS for key, value in delta.items()
                    if key != "function_call"}}]}
CHAT_EVENTS: list[JSON] = [
    *({"id": "i", "model": "m", "usage": None, "choices": [
        {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}]}
      for delta in DELTAS),
    {"id": "i", "choices": [], "usage": CHAT_USAGE}, {"choices": [], "moderation": {}},
    {"error": {"message": "m", "type": "server_error", "code": 500, "param": None}}]
BLOCKS: list[JSON] = [
    {"type": "thinking", "thinking": "h", "signature": "s"},
    {"type": "redacted_thinking", "data": "d"},
    {"type": "text", "text": "t", "citations": [
        {"type": "web_search_result_location", "url": "u", "title": "t", "cited_text": "c"}]},
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
    {"type": "tool_use", "id": "d", "name": "json_answer", "input": {"a": 1}},
    {"type": "tool_use", "id": "e", "name": "custom", "input": {"input": "i"}}]
MESSAGES_REPLY: JSON = {
    "id": "i", "type": "message", "role": "assistant", "model": "m", "content": BLOCKS,
    "stop_reason": "end_turn", "stop_sequence": None, "usage": MESSAGES_USAGE,
    "stop_details": {"type": "refusal", "explanation": "e"}}
MESSAGES_EVENTS: list[JSON] = [
    {"type": "message_start", "message": {**MESSAGES_REPLY, "content": []}}, {"type": "ping"},
    *({"type": "content_block_start", "index": 0, "content_block": block} for block in BLOCKS),
    *({"type": "content_block_delta", "index": 0, "delta": delta} for delta in (
        {"type": "text_delta", "text": "t"}, {"type": "thinking_delta", "thinking": "h"},
        {"type": "signature_delta", "signature": "s"},
        {"type": "input_json_delta", "partial_json": "{}"},
        {"type": "citations_delta", "citation": BLOCKS[2]["citations"][0]})),
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_details": {
        "explanation": "e"}}, "usage": MESSAGES_USAGE},
    {"type": "message_stop"},
    {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}]
RESPONSES_REQUEST: JSON = {
    "model": "m", "instructions": "s", "max_output_tokens": 9, "temperature": 1.5, "top_p": 0.5,
    "input": [
        {"type": "message", "role": "developer", "content": "d", "id": "msg_1"},
        {"role": "user", "content": [
            {"type": "input_text", "text": "t"},
            {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"},
            {"type": "input_file", "filename": "f", "file_data": "data:text/plain;base64,AAAA"}]},
        {"type": "reasoning", "id": "rs_1", "encrypted_content": "e", "summary": [
            {"type": "summary_text", "text": "h"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n",
         "arguments": "{\"a\": 1}"},
        {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "i"},
        {"type": "function_call_output", "call_id": "c", "output": "r"},
        {"type": "custom_tool_call_output", "call_id": "d", "output": [
            {"type": "input_text", "text": "r"}]},
        {"type": "additional_tools", "role": "developer", "tools": [
            {"type": "function", "name": "k", "parameters": {"type": "object"}}]},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "a", "annotations": []},
            {"type": "refusal", "refusal": "r"}]}],
    "tools": [
        {"type": "namespace", "name": "n", "tools": [
            {"type": "function", "name": "f", "strict": True, "parameters": {
                "type": "object", "properties": {"a": {}}, "required": ["a"],
                "additionalProperties": False}}]},
        {"type": "custom", "name": "g", "format": {
            "type": "grammar", "syntax": "lark", "definition": "start: \"a\""}},
        {"type": "web_search", "user_location": {"type": "approximate", "city": "c"}},
        {"type": "tool_search", "execution": "client"}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
        {"type": "custom", "name": "g"}]},
    "reasoning": {"effort": "high", "summary": "auto"}, "parallel_tool_calls": False,
    "text": {"verbosity": "low", "format": {"type": "json_schema", "name": "n", "schema": {}}},
    "include": ["reasoning.encrypted_content", "message.output_text.logprobs"], "top_logprobs": 0,
    "store": False, "stream": True, "metadata": {"a": "b"}, "user": "u", "truncation": "disabled",
    "previous_response_id": None, "background": False, "service_tier": "auto", "x": 1}
GEMINI_REQUEST: JSON = {
    "model": "m", "stream": True, "system_instruction": {"parts": [{"text": "s"}]},
    "contents": [
        {"role": "user", "parts": [
            {"text": "t"}, {"inline_data": {"mime_type": "image/png", "data": "AA_-"}},
            {"fileData": {"mimeType": "application/pdf", "fileUri": "https://a.example"}}]},
        {"role": "model", "parts": [
            {"text": "h", "thought": True, "thoughtSignature": "Z3cxLg=="},
            {"text": "a", "thoughtSignature": "c2ln"},
            {"functionCall": {"id": "c", "name": "f", "args": {"a": 1}},
             "thoughtSignature": "c2ln"},
            {"functionCall": {"name": "f"}}, {"executableCode": {"code": "1"}}]},
        {"role": "function", "parts": [
            {"functionResponse": {"id": "c", "name": "f", "response": {"output": "r"}, "parts": [
                {"inlineData": {"mimeType": "image/png", "data": "AA=="}}]}},
            {"functionResponse": {"name": "f", "response": {"error": "r"}}}]}],
    "tools": [{"functionDeclarations": [
        {"name": "f", "description": "d", "parameters": {
            "type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True,
                                                   "minLength": "1"}}}},
        {"name": "g.h", "parameters_json_schema": {"type": "object", "properties": {"a": {}}}}]},
        {"googleSearch": {}}],
    "toolConfig": {"functionCallingConfig": {"mode": "any", "allowedFunctionNames": ["f", "g.h"]}},
    "generationConfig": {
        "maxOutputTokens": "9", "temperature": 1.5, "topP": 0.5, "topK": 4.0, "seed": 1,
        "stopSequences": ["\n"], "candidateCount": 1, "presencePenalty": 0.5, "logprobs": 1,
        "responseMimeType": "application/json", "responseSchema": {"type": "OBJECT"},
        "thinkingConfig": {"include_thoughts": True, "thinkingBudget": 2000}},
    "safetySettings": [{"category": "c", "threshold": "t"}], "labels": {"a": "b"}, "x": 1}
RESPONSES_USAGE: JSON = {
    "input_tokens": 9, "output_tokens": 9, "total_tokens": 18,
    "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 1},
    "output_tokens_details": {"reasoning_tokens": 1}}
ITEMS: list[JSON] = [
    {"type": "reasoning", "id": "rs_1", "encrypted_content": "e", "summary": [
        {"type": "summary_text", "text": "h"}]},
    {"type": "message", "id": "msg_1", "role": "assistant", "content": [
        {"type": "output_text", "text": "t", "annotations": [
            {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}]},
        {"type": "refusal", "refusal": "r"}]},
    {"type": "web_search_call", "id": "ws_1"},
    {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "custom_tool_call", "id": "ctc_1", "call_id": "d", "name": "custom", "input": "i"}]
RESPONSES_REPLY: JSON = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "output": ITEMS,
    "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"},
    "service_tier": "default", "usage": RESPONSES_USAGE}
PLACE: JSON = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "sequence_number": 7}
RESPONSES_EVENTS: list[JSON] = [
    {"type": "response.created", "response": {**RESPONSES_REPLY, "output": []}},
    *({"type": f"response.output_item.{when}", "output_index": 0, "item": item}
      for item in ITEMS for when in ("added", "done")),
    *({"type": "response.content_part.added", **PLACE, "part": part}
      for part in ITEMS[1]["content"]),
    *({"type": f"response.{kind}.delta", **PLACE, "delta": "t", "logprobs": []} for kind in (
        "output_text", "refusal", "function_call_arguments", "custom_tool_call_input",
        "reasoning_summary_text")),
    {"type": "response.reasoning_summary_part.added", **PLACE, "summary_index": 1},
    {"type": "response.output_text.annotation.added", **PLACE,
     "annotation": ITEMS[1]["content"][0]["annotations"][0]},
    {"type": "response.completed", "response": RESPONSES_REPLY},
    {"type": "response.incomplete", "response": RESPONSES_REPLY},
    {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "m"}}},
    {"type": "error", "error": {"code": "rate_limit_exceeded", "message": "m"}}]
PARTS: list[JSON] = [
    {"text": "h", "thought": True, "thoughtSignature": "c2ln"}, {"text": "t"},
    {"text": "", "thoughtSignature": "c2ln"},
    {"functionCall": {"id": "c", "name": "f", "args": {"a": 1}}, "thoughtSignature": "c2ln"},
    {"functionCall": {"name": "custom", "args": {"input": "i"}}}, {"executableCode": {"code": "1"}}]
GEMINI_REPLY: JSON = {
    "candidates": [{
        "content": {"role": "model", "parts": PARTS}, "index": 0, "finishReason": "STOP",
        "groundingMetadata": {
            "groundingChunks": [{"web": {"uri": "u", "title": "t"}}], "groundingSupports": [
                {"segment": {"startIndex": 0, "endIndex": 1}, "groundingChunkIndices": [0]}]},
        "logprobsResult": {"chosenCandidates": [{"token": "t", "logProbability": -1}],
                           "topCandidates": [{"candidates": [{"token": "t"}]}]}}],
    "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 8, "thoughtsTokenCount": 1,
                      "totalTokenCount": 18, "cachedContentTokenCount": 1},
    "modelVersion": "m", "responseId": "i"}
GEMINI_EVENTS: list[JSON] = [
    *({**GEMINI_REPLY, "candidates": [{"content": {"role": "model", "parts": [part]}}]}
      for part in PARTS),
    GEMINI_REPLY, {"promptFeedback": {"blockReason": "SAFETY"}},
    {"error": {"code": 503, "message": "m", "status": "UNAVAILABLE"}}]
REQUESTS = {"chat": CHAT_REQUEST, "messages": MESSAGES_REQUEST, "responses": RESPONSES_REQUEST,
            "gemini": GEMINI_REQUEST}
REPLIES = {"chat": CHAT_REPLY, "messages": MESSAGES_REPLY, "responses": RESPONSES_REPLY,
           "gemini": GEMINI_REPLY}
STREAMS = {"chat": CHAT_EVENTS, "messages": MESSAGES_EVENTS, "responses": RESPONSES_EVENTS,
           "gemini": GEMINI_EVENTS}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, 10**30, "", "x", "{}", "\ud800", "\u2028\0", "tool",
    [], [None], [[]], [{}], {}, {"type": None}, {"type": []}, {"type": "text"}, {"": {"": []}},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]
HEADS = [
    b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nA: b, c\r\n\r\n",
    b"GET http://a/%2e HTTP/1.0\r\nconnection: keep-alive, x\r\nx: 1\r\nx: 2\r\n\r\n",
    b"PUT / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nsec-a: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n",
    b"HTTP/1.0 204\r\ntransfer-encoding: chunked\r\n\r\n"]
CHUNKS = [b"3\r\nabc\r\n", b"a;x=\"y\"\r\n0123456789\r\n", b"0\r\n\r\n", b"0\r\na: b\r\n\r\n",
          b"\r\n"]
LINES = [b"data: {}", b"data:a", b"event: x", b": c", b"data", b"id: 1", b"", b"", b"retry",
         "data: \u2028é".encode(), b"data: [DONE]", b'data: {"usage":{"prompt_tokens":1}}']


def edited(draw: Draw, tree: Any) -> Any:
    """A copy in which a few values anywhere are replaced, removed, moved or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.ConsumeIntInRange(0, MAX_EDITS)):
        places = list(places_in(tree))
        if not places:
            break
        holder, key = places[draw.ConsumeIntInRange(0, len(places) - 1)]
        act = draw.ConsumeIntInRange(0, 3)
        if act == 0:
            del holder[key]
        elif act == 1:
            other, place = places[draw.ConsumeIntInRange(0, len(places) - 1)]
            holder[key] = copy.deepcopy(other[place])
        elif act == 2 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(ODD[draw.ConsumeIntInRange(0, len(ODD) - 1)])
    return tree


def places_in(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Every holder and key of a value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from places_in(value)


def bytes_of(draw: Draw, samples: list[bytes], joint: bytes = b"") -> bytes:
    """Samples in any number and order, with a few bytes of anything between them."""
    pieces = []
    while draw.remaining_bytes() and len(pieces) < 40:
        choice = draw.ConsumeIntInRange(0, len(samples))
        raw = choice == len(samples)
        pieces.append(draw.ConsumeBytes(draw.ConsumeIntInRange(0, 9)) if raw else samples[choice])
    return joint.join(pieces)


def cut(draw: Draw, data: bytes) -> list[bytes]:
    """The same data in pieces; of what is left to draw, each byte is a piece's length."""
    pieces = []
    for size in draw.ConsumeBytes(200):
        pieces.append(data[: size % 23])
        data = data[size % 23 :]
    return [*pieces, data]


def events_of(draw: Draw, name: str) -> list[bytes]:
    """Events of a dialect's stream, edited, in any order."""
    events = []
    while draw.remaining_bytes() > 200 and len(events) < 12:
        event = STREAMS[name][draw.ConsumeIntInRange(0, len(STREAMS[name]) - 1)]
        event = edited(draw, event) if draw.ConsumeBool() else event
        spaced = (", ", ": ") if draw.ConsumeBool() else (",", ":")
        data = json.dumps(event, separators=spaced).encode()
        events.append(gw.sse(data, "x" * (name in ("messages", "responses"))))
    return [*events, b"data: [DONE]\n\n"] if draw.ConsumeBool() else events


def outcome(run: Callable[[], Any], *allowed: type[Exception]) -> Any:
    """What it returns, or the kind of exception that it is allowed to raise."""
    try:
        return run()
    except allowed as error:
        if isinstance(error, GatewayError):
            gw.dump_json([error.message, error.param, error.code])
            assert 400 <= error.status < 600, error.status
        return type(error)


# ---- targets ----


PARSER = gw.HeadParser(100, 9)  # what it remembers of one head must not change another


def head(draw: Draw) -> None:
    """A request's head; what passes on of it must be as good a head."""
    data = bytes_of(draw, [line + b"\r\n" for each in HEADS for line in each.split(b"\r\n")])
    found = outcome(lambda: gw.parse_head(data, 100, 9), GatewayError)
    known = outcome(lambda: PARSER.parse(data), GatewayError)
    assert isinstance(known, tuple) == isinstance(found, gw.RequestHead), (known, found, data)
    if isinstance(found, gw.RequestHead):
        told = {**vars(known[0]), "length": known[1], "headers": found.headers}
        assert all(told[name] == value for name, value in vars(found).items()
                   if name != "_passing"), told
        assert found.headers.items() - known[0].headers.items() <= {
            ("content-length", found.headers.get("content-length"))}
        assert len(found.headers) <= 9 and not {"\r", "\n", "\0"} & set(str(found.headers))
        assert ("content-length" in found.headers) + ("transfer-encoding" in found.headers) < 2
        passed = found.passing_fields(gw.REQUEST_ONLY_HERE)
        again = gw.parse_head(f"GET / HTTP/1.0\r\n{passed}\r\n".encode("latin-1"), 100, 9)
        assert again.headers.items() <= found.headers.items(), passed


def answer_head(draw: Draw) -> None:
    data = bytes_of(draw, [line + b"\r\n" for each in HEADS for line in each.split(b"\r\n")])
    found = outcome(lambda: gw.parse_answer_head(data), GatewayError)
    if isinstance(found, gw.AnswerHead):
        outcome(lambda: gw.answer_framing(found), ValueError)


def chunked(draw: Draw) -> None:
    """A chunked body is the same wherever it is cut."""
    data = bytes_of(draw, CHUNKS)
    pieces = cut(draw, data)

    def decode(pieces: list[bytes]) -> Any:
        framing, body, late = gw.ChunkedFraming(), b"", b""
        for piece in pieces:
            if framing.done:
                late += piece
            else:
                body += framing.feed(piece)
        return body, framing.done, framing.rest + late

    whole = outcome(lambda: decode([data]), ValueError)
    assert outcome(lambda: decode(pieces), ValueError) == whole, (whole, pieces)
    sent = b"".join(map(gw.render_chunk, pieces)) + gw.LAST_CHUNK
    assert decode([sent]) == (data, True, b"")


def inflater(draw: Draw) -> None:
    coding = ("gzip", "deflate", "br")[draw.ConsumeIntInRange(0, 2)]

    def decode() -> None:
        decoder = gw.Inflater(coding, 1000)
        for piece in cut(draw, draw.ConsumeBytes(300)):
            decoder.feed(piece)
        decoder.end()

    outcome(decode, ValueError)


def cutter(draw: Draw) -> None:
    """Whole events, byte for byte, and what was reserved for them is given back."""
    data = bytes_of(draw, LINES, (b"\n", b"\r\n", b"\r")[draw.ConsumeIntInRange(0, 2)])
    held = 0

    def reserve(size: int) -> bool:
        nonlocal held
        held += size
        return True

    cutter = gw.EventCutter(LIMIT, reserve)
    blocks = [cutter.feed(piece) for piece in cut(draw, data)]
    assert held == cutter.held_bytes
    assert b"".join(blocks) + cutter.rest() == data
    assert held == cutter.held_bytes == 0
    for block in filter(None, blocks):
        assert block.endswith((b"\n\n", b"\n\r\n", b"\r\r")), block


def decoder(draw: Draw) -> None:
    """Events are the same wherever the bytes are cut, and whatever ends the lines."""
    lines = bytes_of(draw, LINES, b"\n").replace(b"\r", b"").split(b"\n")
    seeds = [end.join(lines) for end in (b"\n", b"\r\n", b"\r")]
    cuts = draw.ConsumeBytes(200)

    def decode(pieces: list[bytes]) -> list[Any]:
        cutter = gw.EventCutter(LIMIT)
        blocks = [*map(cutter.feed, pieces), cutter.rest()]
        events = [gw.event_data(raw) for block in blocks for raw in gw.split_events(block)]
        return list(filter(None, events))

    first = decode([seeds[0]])
    for seed in seeds:
        pieces = cut(Draw(cuts), seed)
        assert decode(pieces) == first, (first, pieces)


def watch(draw: Draw) -> None:
    """A passed stream goes out the same, and is judged the same, wherever it is cut."""
    hide, needs_done = draw.ConsumeBool(), draw.ConsumeBool()
    name = list(DIALECTS)[draw.ConsumeIntInRange(0, 3)]
    data = b"".join(events_of(draw, name))
    pieces = cut(draw, data)

    def play(pieces: list[bytes]) -> Any:
        watch, cutter = DIALECTS[name].watch(hide, needs_done), gw.EventCutter(LIMIT * 9)
        out = b""
        for block in filter(None, map(cutter.feed, pieces)):
            out += watch.feed(block)
            if watch.ended or watch.failure:
                break
        else:
            out += watch.end()
        assert watch.ended or watch.failure
        assert watch.content_bytes >= 0
        return out, watch.usage, watch.ended, watch.failure and watch.failure.message

    whole = play([data])
    assert play(pieces) == whole, (whole, play(pieces))
    assert hide or data.startswith(whole[0]), whole


def body(draw: Draw) -> None:
    """What Body accepts is what json accepts, and only what is replaced changes."""
    samples = [json.dumps(each).encode() for each in [*ODD, *CHAT_EVENTS]]
    data = bytes_of(draw, [*samples, b"{", b"}", b'"a"', b":", b",", b" ", b'"\\u0061"', b"\xc3"])
    found = outcome(lambda: gw.Body(data), GatewayError)
    options: Any = {"object_pairs_hook": Pairs, "parse_constant": gw.refuse_constant}
    pairs = outcome(lambda: json.loads(data.decode(), **options), ValueError, RecursionError)
    is_good = isinstance(pairs, Pairs) and len(pairs.tree) == len(pairs)
    assert isinstance(found, gw.Body) == is_good, (data, found)
    if isinstance(found, gw.Body):
        assert found.tree() == json.loads(data)
        changed = found.with_values({"a": "ü", "b": [1]})
        assert json.loads(changed) == {**found.tree(), "a": "ü", "b": [1]}
        assert found.with_values({}) == data
        outcome(lambda: DIALECTS["chat"].read_call(found, ""), GatewayError)


class Pairs(list):  # type: ignore[type-arg]
    """A JSON object that remembers keys which stand twice."""

    @property
    def tree(self) -> JSON:
        return dict(self)


def request(name: str, draw: Draw) -> None:
    """A request in one dialect, and what it comes to in each."""
    wire = json.loads(json.dumps(edited(draw, REQUESTS[name])))
    if not isinstance(wire.get("model"), str) or not wire["model"]:
        return  # that is judged before
    caps = gw.find_caps(gw.KINDS["anthropic"], MODELS[draw.ConsumeIntInRange(0, len(MODELS) - 1)])
    chat = outcome(lambda: DIALECTS[name].parse_request(wire, Losses()), GatewayError)
    if not isinstance(chat, gw.Chat):
        return
    for dialect in DIALECTS.values():
        render_twice(dialect, chat, Target(chat.model, caps))


def render_twice(dialect: Any, chat: Any, target: Any) -> None:
    """The same chat gives the same bytes, which a server of that dialect can read."""
    first = copy.deepcopy(chat)
    made = outcome(lambda: dialect.render_request(first, target, Losses()), GatewayError)
    if made is not GatewayError:
        sent = gw.dump_json(made[0])
        assert gw.dump_json(dialect.render_request(chat, target, Losses())[0]) == sent
        told = {"model": "m", "stream": False, **json.loads(sent)}
        outcome(lambda: dialect.parse_request(told, Losses()), GatewayError)


MODELS = ("claude-haiku-4-5", "claude-sonnet-4-6", "claude-opus-4-1", "claude-opus-5-5", "llama",
          "gpt-4.1", "gpt-5.2", "gpt-5.5", "o3", "gemini-2.5-pro", "gemini-3-flash")


def reply(name: str, draw: Draw) -> None:
    """A plain answer in one dialect, and what a client of each is told."""
    wire = json.loads(json.dumps(edited(draw, REPLIES[name])))
    found = outcome(lambda: DIALECTS[name].parse_reply(wire, rewrites()), GatewayError)
    if isinstance(found, gw.Reply):
        for dialect in DIALECTS.values():
            told = gw.dump_json(dialect.render_reply(found, a_chat(), 1))
            outcome(lambda d=dialect, t=told: d.parse_reply(json.loads(t), Rewrites()),
                    GatewayError)  # fmt: skip
    outcome(lambda: DIALECTS[name].parse_usage(wire.get("usage")))
    outcome(lambda: DIALECTS[name].count_content(wire))
    error = DIALECTS[name].parse_error(edited(draw, STREAMS[name][-1]["error"]), 502)
    for dialect in DIALECTS.values():
        json.loads(dialect.render_error(error, "id"))


def stream(name: str, draw: Draw) -> None:
    """A stream in one dialect: its events follow the grammar, and every client can be told."""
    data = b"".join(events_of(draw, name))
    parser = DIALECTS[name].parser(rewrites())
    renderers = [dialect.renderer(a_chat(), 1) for dialect in DIALECTS.values()]
    said: list[Any] = []

    def play() -> None:
        for event in parser.feed(data):
            said.append(event)
            for renderer in renderers:
                renderer.feed(event)

    outcome(play, GatewayError)
    assert parser.content_bytes >= 0
    hold_grammar(said)
    outcome(lambda: gw.collect(said), GatewayError)


def hold_grammar(said: list[Any]) -> None:
    """A delta belongs to the block that is open, and nothing follows the end."""
    names = [type(event).__name__ for event in said]
    is_open = False
    for at, name in enumerate(names):
        assert name != "Finish" or at == len(names) - 1, names
        assert is_open or name not in NEEDS_BLOCK, names
        is_open = name == "BlockStart" or (is_open and name != "BlockStop")


NEEDS_BLOCK = ("TextDelta", "ThinkingDelta", "SignatureDelta", "ArgumentsDelta", "BlockStop")


def a_chat() -> Any:
    return gw.Chat("m", [], include_usage=True)


def rewrites() -> Any:
    """As where a hidden tool and a custom one went out."""
    made = Rewrites()
    made.json_tool, made.names, made.custom = "json_answer", {"f": "g"}, {"custom"}
    return made


TARGETS: dict[str, Callable[[Draw], None]] = {
    "head": head, "answer_head": answer_head, "chunked": chunked, "inflater": inflater,
    "cutter": cutter, "decoder": decoder, "watch": watch, "body": body,
    **{f"{kind.__name__}_{name}": lambda draw, k=kind, n=name: k(n, draw)
       for kind in (request, reply, stream) for name in DIALECTS},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", nargs="?", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1, help="another one searches elsewhere")
    parser.add_argument("--again", metavar="FILE", help="plays an input that a run left behind")
    args = parser.parse_args()
    chosen = [TARGETS[args.target]] if args.target else list(TARGETS.values())

    def run(data: bytes) -> None:
        if data:
            chosen[data[0] % len(chosen)](Draw(data[1:]))

    with tempfile.TemporaryDirectory() as corpus:
        for number in range(3 * len(chosen)):
            seed = bytes([number]) + random.Random(number).randbytes(500)
            (Path(corpus) / str(number)).write_bytes(seed)
        options = {"max_total_time": args.seconds, "seed": args.seed, "max_len": 1000,
                   "len_control": 0, "timeout": 10, "rss_limit_mb": 1500, "verbosity": 0,
                   "artifact_prefix": f"{tempfile.gettempdir()}/fuzz-"}  # fmt: skip
        flags = [f"-{name}={value}" for name, value in options.items()]
        atheris.Setup([sys.argv[0], *flags, args.again or corpus], run)
        atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
