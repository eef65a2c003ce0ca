"""The Chat Completions wire as OpenAI speaks it: what it takes, and its answers as a body and as a
stream.

The truth is the openai SDK's own types, on both sides: requests are judged by them, and no answer
of OpenAI's is scripted here that they would not name in full. What the server demands beyond a
type is said by the generators below: calls that are answered at once, tools that are there before
they are chosen, and what each generation of its models takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParams
from pydantic import ValidationError
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


# ---- what it takes ----

NAME = re.compile("[A-Za-z0-9_-]{1,64}")
PICTURE_URL = re.compile("https?://.+|data:image/(png|jpeg|gif|webp);base64,.+")
PDF_URL = re.compile("data:application/pdf;base64,.+")
MAX_ID, MAX_USER, MAX_SAFETY_IDENTIFIER, MAX_TOOLS, MAX_STOPS = 40, 64, 128, 128, 4
EFFORTS = {  # by the first version that takes them
    (0, 0): "",
    (5, 0): "minimal low medium high",
    (5, 1): "none low medium high",
    (5, 2): "none low medium high xhigh",
    (6, 0): "none low medium high xhigh max",
}


class Gpt(NamedTuple):
    """What a model takes."""

    efforts: str
    thinks: bool  # where no effort is given
    thinks_with_tools: bool
    stops: bool


def gpt(name: str) -> Gpt | None:
    """Read off a model's name what it takes; of another vendor's nothing is known."""
    found = re.match(r"(o\d)|(?:chat)?gpt-(\d+)(?:\.(\d+))?", name)
    if not found:
        return None
    if found[1]:
        return Gpt("low medium high", True, True, not re.match("o3(?!-mini)|o4", name))
    version = int(found[2]), int(found[3] or 0)
    return Gpt(
        efforts=next(EFFORTS[since] for since in reversed(EFFORTS) if since <= version),
        thinks=version == (5, 0) or version >= (5, 5),
        thinks_with_tools=version < (5, 4),
        stops=True,
    )


def judge(received: Received) -> None:
    """Raise if OpenAI would not take this request."""
    read_request(received.body)
    complaints = list(judge_body(received.json))
    assert not complaints, complaints


def judge_body(body: JSON) -> Iterator[str]:
    """Yield every rule that the body breaks."""
    try:
        read_request(json.dumps(body))
    except ValidationError as error:
        yield str(error)[:2000]
        return
    yield from _turns(body["messages"])
    yield from _parts(body["messages"])
    yield from _tools(body)
    yield from _options(body)
    model = gpt(body["model"])
    if model:
        yield from _generation(body, model)


def _turns(messages: list[JSON]) -> Iterator[str]:
    owed: set[str] = set()
    for message in messages:
        if message["role"] == "tool":
            if message["tool_call_id"] not in owed:
                yield f"role 'tool' must be a response to 'tool_calls': {message}"
            owed.discard(message["tool_call_id"])
            continue
        if owed:
            yield f"'tool_calls' must be followed by tool messages responding to each: {owed}"
        calls = message.get("tool_calls")
        owed = {call["id"] for call in calls or ()}
        if calls == []:
            yield "messages.tool_calls: [] is too short"
        has_more = calls or {"function_call", "refusal", "audio"} & message.keys()
        if message.get("content") is None and not has_more:
            yield f"messages.content: expected a string, got null: {message}"
    if owed:
        yield f"'tool_calls' must be followed by tool messages responding to each: {owed}"


def _parts(messages: list[JSON]) -> Iterator[str]:
    contents = [message.get("content") for message in messages]
    if [] in contents:
        yield "messages.content: [] is too short"
    for part in sum((content for content in contents if isinstance(content, list)), []):
        if not PICTURE_URL.fullmatch(part.get("image_url", {}).get("url", "https://a")):
            yield f"messages.content.image_url: unsupported image: {part}"
        file = part.get("file", {"file_id": ""})
        if "file_id" not in file and not (
            file.get("filename") and PDF_URL.fullmatch(file.get("file_data", ""))
        ):
            yield f"messages.content.file: expected a PDF and its filename: {part}"


def _tools(body: JSON) -> Iterator[str]:
    tools = body.get("tools")
    functions = [tool["function"] for tool in tools or () if tool["type"] == "function"]
    names = [tool[tool["type"]]["name"] for tool in tools or ()]
    calls = [call for message in body["messages"] for call in message.get("tool_calls") or ()]
    called = [call[call["type"]]["name"] for call in calls]
    if tools is not None and not 1 <= len(tools) <= MAX_TOOLS:
        yield f"tools: an array of 1 to {MAX_TOOLS}, but it has {len(tools)}"
    if not tools and {"tool_choice", "parallel_tool_calls"} & body.keys():
        yield "'tool_choice' and 'parallel_tool_calls' are only allowed when 'tools' are specified"
    if not all(map(NAME.fullmatch, names + called)):
        yield f"tools.function.name: does not match the pattern: {names} {called}"
    if any(len(call["id"]) > MAX_ID for call in calls):
        yield f"messages.tool_calls.id: string too long: {calls}"
    chosen = body.get("tool_choice") or ""
    if "function" in chosen and chosen["function"]["name"] not in names:
        yield f"Tool choice {chosen} not found in 'tools' parameter."
    for function in functions:
        schema = function.get("parameters", {"type": "object", "properties": {}})
        if schema.get("type") != "object" or "properties" not in schema:
            yield f"Invalid schema for function: object schema missing properties: {function}"
        if function.get("strict"):
            yield from _strict(schema)


def _options(body: JSON) -> Iterator[str]:
    stop = body.get("stop")
    if isinstance(stop, list) and not 1 <= len(stop) <= MAX_STOPS:
        yield f"stop: an array of 1 to {MAX_STOPS}, but it has {len(stop)}"
    if body.get("stream_options") is not None and not body.get("stream"):
        yield "The 'stream_options' parameter is only allowed when 'stream' is enabled."
    for name, length in (("user", MAX_USER), ("safety_identifier", MAX_SAFETY_IDENTIFIER)):
        if len(body.get(name) or "") > length:
            yield f"{name}: string too long. Expected {length} at most"
    form = body.get("response_format", {}).get("json_schema")
    if form and not NAME.fullmatch(form["name"]):
        yield f"response_format.json_schema.name: does not match the pattern: {form['name']}"
    if form and form.get("strict"):
        yield from _strict(form["schema"])


def _strict(schema: JSON) -> Iterator[str]:
    where = "Invalid schema: in strict mode"
    properties = schema.get("properties", {})
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield f"{where} 'additionalProperties' is required to be false"
    if set(schema.get("required", ())) != properties.keys():
        yield f"{where} 'required' must include every key in properties"
    named = [*properties.values(), *schema.get("$defs", {}).values()]
    for inner in filter(None, [*named, *schema.get("anyOf", ()), schema.get("items")]):
        yield from _strict(inner)


def _generation(body: JSON, model: Gpt) -> Iterator[str]:
    effort, kinds = body.get("reasoning_effort"), [tool["type"] for tool in body.get("tools") or ()]
    thinks = model.thinks if effort is None else effort != "none"
    if model.efforts and body.get("max_tokens") is not None:
        yield "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    if effort is not None and effort not in model.efforts.split():
        yield f"reasoning_effort: {effort!r} is not supported with this model"
    for name in ("temperature", "top_p"):
        if thinks and body.get(name) not in (None, 1):
            yield f"{name}: only the default (1) value is supported with this model"
    if thinks and not model.thinks_with_tools and "function" in kinds:
        yield "Function tools with reasoning_effort are not supported: use 'none' or /v1/responses"
    if body.get("stop") and not model.stops:
        yield "'stop' is not supported with this model"


# ---- what it answers ----


def choice(
    content: str | None = None,
    *calls: JSON,
    refusal: str | None = None,
    finish: str | None = None,
    reasoning: str = "",
    tokens: Sequence[str] = (),
) -> JSON:
    """Return a choice; `tokens` become its logprobs, and the pieces of its stream.

    The reasoning is what other servers of this wire tell; OpenAI's own does not.
    """
    message: JSON = {"role": "assistant", "content": content, "refusal": refusal}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = list(calls)
    finish = finish or ("tool_calls" if calls else "stop")
    listed = [_logprob(token) for token in tokens]
    logprobs = {"content": listed, "refusal": None} if listed else None
    return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}


def _logprob(token: str) -> JSON:
    own = {"token": token, "logprob": -0.25, "bytes": list(token.encode())}
    return {**own, "top_logprobs": [own, {"token": "?", "logprob": -9999.0, "bytes": None}]}


def completion(*choices: JSON, usage: JSON | None = USAGE) -> JSON:
    """Return a whole answer, as `POST /v1/chat/completions` gives it."""
    return {
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1741569952,
        "model": "gpt-5.2-2025-12-11",
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [{**each, "index": index} for index, each in enumerate(choices)],
        "usage": usage,
    }


def chunks(whole: JSON, with_usage: bool) -> list[JSON]:
    """Return the stream that spells the same answer; its usage comes last, if it was asked for."""
    head = {**whole, "object": "chat.completion.chunk"}
    steps = [step for each in whole["choices"] for step in _steps(each)]
    told = [{**head, "choices": [step], "usage": None} for step in steps]
    if with_usage and whole["usage"]:
        return [*told, {**head, "choices": []}]
    return [{key: chunk[key] for key in chunk if key != "usage"} for chunk in told]


def _steps(choice: JSON) -> list[JSON]:
    message, logprobs = choice["message"], choice["logprobs"]
    opened = {"role": "assistant", "content": message["content"] and "", "refusal": None}
    steps: list[JSON] = [{"delta": opened}]
    thought = parts(message.get("reasoning_content", ""))
    steps += [{"delta": {"reasoning_content": part}} for part in thought]
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
            read_chunk(json.dumps(without_reasoning(chunk)))
    return sse_reply(told, end, named=False, **HEADERS)


def without_reasoning(value: Any) -> Any:
    """Leave out the one field that no SDK's type names, though many servers send it."""
    if isinstance(value, list):
        return list(map(without_reasoning, value))
    if not isinstance(value, dict):
        return value
    kept = {key: value[key] for key in value if key != "reasoning_content"}
    return {key: without_reasoning(each) for key, each in kept.items()}


def answer(*choices: JSON, usage: JSON | None = USAGE) -> Answer:
    """Answer with these choices, as a body or as a stream, whichever the request asks for."""
    whole = completion(*choices, usage=usage)
    read_completion(json.dumps(without_reasoning(whole)))

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
