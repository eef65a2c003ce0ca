"""The Chat Completions wire as OpenAI speaks it: what it takes, and its answers as a body and as a
stream.

The truth is the openai SDK's own types, on both sides: requests are judged by them, and no answer
is scripted here that they would not name in full.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParams
from upstream import JSON, Answer, Received, Reply, closed, json_reply, parts, sse_reply

read_request = closed(CompletionCreateParams)
read_completion = closed(ChatCompletion)
read_chunk = closed(ChatCompletionChunk)

USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 10,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 4, "audio_tokens": 0},
}
HEADERS = {
    "x_request_id": "req_upstream",
    "openai_processing_ms": "7",
    "x_ratelimit_remaining_requests": "99",
    "set_cookie": "__cf_bm=cookie-of-the-upstream",
    "server": "server-of-the-upstream",
}

# What tests ask with.
SCHEMA: JSON = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: JSON = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wetter für eine Stadt – in °C",
        "strict": True,
        "parameters": SCHEMA,
    },
}
PIXEL = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
PICTURE = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": f"data:image/gif;base64,{PIXEL}", "detail": "low"}},
    {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
]


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


def text(told: str) -> JSON:
    return {"type": "text", "text": told}


def call(call_id: str, name: str, **arguments: Any) -> JSON:
    spelled = json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": spelled}}


def told_call(call: Any) -> JSON:
    """Return a call of the SDK's as it is on the wire, without what its helpers add."""
    function = call.function.model_dump(include={"name", "arguments"})
    return {"id": call.id, "type": call.type, "function": function}


def judge(received: Received) -> None:
    """Raise if OpenAI would not take this request."""
    read_request(received.body)


def choice(
    content: str | None = None,
    *calls: JSON,
    refusal: str | None = None,
    finish: str = "stop",
    tokens: Sequence[str] = (),
) -> JSON:
    """Return a choice; `tokens` become its logprobs, and the pieces of its stream."""
    message: JSON = {"role": "assistant", "content": content, "refusal": refusal}
    if calls:
        message["tool_calls"], finish = list(calls), "tool_calls"
    listed = [_logprob(token) for token in tokens]
    logprobs = {"content": listed, "refusal": None} if listed else None
    return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _logprob(token: str) -> JSON:
    own = {"token": token, "logprob": -0.25, "bytes": list(token.encode())}
    return {**own, "top_logprobs": [own, {"token": "?", "logprob": -9999.0, "bytes": None}]}


def completion(*choices: JSON) -> JSON:
    """Return a whole answer, as `POST /v1/chat/completions` gives it."""
    return {
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1741569952,
        "model": "gpt-5.2-2025-12-11",
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [{**each, "index": index} for index, each in enumerate(choices)],
        "usage": USAGE,
    }


def chunks(whole: JSON, with_usage: bool) -> list[JSON]:
    """Return the stream that spells the same answer; its usage comes last, if it was asked for."""
    head = {**whole, "object": "chat.completion.chunk"}
    steps = [step for each in whole["choices"] for step in _steps(each)]
    told = [{**head, "choices": [step], "usage": None} for step in steps]
    if with_usage:
        return [*told, {**head, "choices": []}]
    return [{key: chunk[key] for key in chunk if key != "usage"} for chunk in told]


def _steps(choice: JSON) -> list[JSON]:
    message, logprobs = choice["message"], choice["logprobs"]
    opened = {"role": "assistant", "content": message["content"] and "", "refusal": None}
    steps: list[JSON] = [{"delta": opened}]
    if logprobs:
        for token in logprobs["content"]:
            told = {"content": [token], "refusal": None}
            steps.append({"delta": {"content": token["token"]}, "logprobs": told})
    else:
        steps += [{"delta": {"content": part}} for part in parts(message["content"] or "")]
    steps += [{"delta": {"refusal": part}} for part in parts(message["refusal"] or "")]
    for index, made in enumerate(message.get("tool_calls", ())):
        named = {**made, "index": index, "function": {**made["function"], "arguments": ""}}
        pieces = ({"arguments": part} for part in parts(made["function"]["arguments"]))
        rest = ({"index": index, "function": piece} for piece in pieces)
        steps += [{"delta": {"tool_calls": [each]}} for each in (named, *rest)]
    steps.append({"delta": {}, "finish_reason": choice["finish_reason"]})
    empty = {"index": choice["index"], "logprobs": None, "finish_reason": None}
    return [{**empty, **step} for step in steps]


def stream(*told: JSON | str, end: str = "whole") -> Reply:
    """Return a streamed answer; "[DONE]" is for the caller to add, or to leave out."""
    for chunk in told:
        if isinstance(chunk, dict) and "error" not in chunk:
            read_chunk(json.dumps(chunk))
    return sse_reply(told, end, named=False, **HEADERS)


def answer(*choices: JSON) -> Answer:
    """Answer with these choices, as a body or as a stream, whichever the request asks for."""
    whole = completion(*choices)
    read_completion(json.dumps(whole))

    def reply(received: Received) -> Reply:
        asked = received.json
        if not asked.get("stream"):
            return json_reply(whole, 200, **HEADERS)
        options = asked.get("stream_options") or {}
        return stream(*chunks(whole, bool(options.get("include_usage"))), "[DONE]")

    return reply


def error(status: int, told: str, code: str | None = None, **headers: str) -> Reply:
    """Return an error as OpenAI answers it."""
    body = {"message": told, "type": "invalid_request_error", "param": "messages", "code": code}
    return json_reply({"error": body}, status, **headers)
