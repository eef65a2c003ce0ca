"""The Messages wire as Anthropic speaks it: what it takes, and its answers as a body and as a
stream.

The shapes are the anthropic SDK's own types. What the server demands beyond a type is said by the
generators below, in its own words where they are known: merged turns that alternate, tool results
at once and whole, no empty text, and what each generation of Claude takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from anthropic.types import Message, RawMessageStreamEvent, beta
from anthropic.types.message_create_params import MessageCreateParams
from drive import UPSTREAM_KEY
from pydantic import ValidationError
from upstream import JSON, Answer, Received, Reply, closed, json_reply, parts, sse_reply

read_shape = closed(MessageCreateParams)
read_beta_shape = closed(beta.message_create_params.MessageCreateParams)
read_count_shape = closed(beta.message_count_tokens_params.MessageCountTokensParams)
read_message = closed(Message)
read_event = closed(RawMessageStreamEvent)

# ---- what it takes ----

SAMPLING = {"temperature", "top_p", "top_k"}
VERSIONS = OLD_VERSION, NEW_VERSION = "2023-06-01", "2026-10-21"
THINKING = ("thinking", "redacted_thinking")
UNSUPPORTED_IN_SCHEMAS = re.compile(
    "min.+|max.+|exclusive.+|pattern.*|dependent.+|multipleOf|uniqueItems|contains|propertyNames"
    "|oneOf|not|if|then|else"
)


class Claude(NamedTuple):
    """What a model takes."""

    sampling: bool
    budget: bool
    adaptive: bool
    disabled: bool
    efforts: str
    forced_tools: bool
    system_turns: bool
    prefill: bool
    max_tokens: int


def claude(name: str) -> Claude:
    """Read off a model's name what it takes."""
    found = re.fullmatch(r"claude-([a-z]+)-(\d+)(?:-(\d{1,2}))?(?:-\d{8})?", name)
    assert found, f"model: {name}"
    family, version = found[1], (int(found[2]), int(found[3] or 0))
    is_big = family in ("fable", "mythos")
    has_effort = version >= (4, 6) or (family, version) == ("opus", (4, 5))
    is_bound = version >= ((5, 1) if is_big else (5, 5)) and family != "haiku"
    return Claude(
        sampling=version < (4, 7),
        budget=version < (4, 7),
        adaptive=version >= (4, 6),
        disabled=not is_bound and not is_big,
        efforts="low medium high" * has_effort
        + " max" * (version >= (4, 6))
        + " xhigh" * (version >= (4, 7)),
        forced_tools=not is_bound,
        system_turns=version >= (4, 8),
        prefill=version < (4, 6),
        max_tokens=128_000 if version >= (4, 6) else 64_000,
    )


def judge(received: Received) -> None:
    """Raise if Anthropic would not take this request."""
    judge_head(received)
    is_new = received.headers["anthropic-version"] == NEW_VERSION
    assert not (is_new and SAMPLING & received.json.keys()), "a version without sampling"
    is_beta = "anthropic-beta" in received.headers
    complaints = list(judge_body(received.json, read_beta_shape if is_beta else read_shape))
    assert not complaints, complaints


def judge_count(received: Received) -> None:
    """Raise if Anthropic would not count this request's tokens."""
    judge_head(received)
    read_count_shape(received.body)


def judge_head(received: Received) -> None:
    head = received.headers
    assert head.getall("x-api-key") == [UPSTREAM_KEY] and "authorization" not in head, head
    assert head["anthropic-version"] in VERSIONS, head
    assert head["content-type"] == "application/json", head


def judge_body(body: JSON, read: Callable[[str], Any] = read_shape) -> Iterator[str]:
    """Yield every rule that the body breaks."""
    try:
        # The types left these out with the API version that forbids them; 2023-06-01 has them.
        read(json.dumps({key: body[key] for key in body if key not in SAMPLING}))
    except ValidationError as error:
        yield str(error)[:2000]
        return
    model = claude(body["model"])
    if not 1 <= body["max_tokens"] <= model.max_tokens:
        yield f"max_tokens: {body['max_tokens']}"
    if any(not text.strip() for text in body.get("stop_sequences", ())):
        yield "stop_sequences: each stop sequence must contain non-whitespace"
    if json.dumps(body).count('"cache_control": {') > 4:
        yield "A maximum of 4 blocks with cache_control may be provided."
    if re.search(r"@|^\+?[\d ()-]{7,}$", body.get("metadata", {}).get("user_id") or ""):
        yield "metadata.user_id: must not identify a person"
    yield from _turns(body["messages"], model)
    yield from _texts(body)
    yield from _tools(body, model)
    yield from _thinking(body, model)
    yield from _sampling(body, model)
    output = body.get("output_config", {})
    if output.get("effort") and output["effort"] not in model.efforts.split():
        yield f"output_config.effort: {output['effort']} is not supported by this model"
    if output.get("format"):
        yield from _schema(output["format"]["schema"])


def blocks(content: Any) -> list[JSON]:
    """Return a content as a list of blocks, which a string is short for."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def of_type(kind: str, content: Any) -> list[JSON]:
    return [block for block in blocks(content) if block["type"] == kind]


def _turns(messages: list[JSON], model: Claude) -> Iterator[str]:
    roles = [message["role"] for message in messages]
    if roles[:1] != ["user"]:
        yield "messages: first message must use the user role"
    if any(before == after for before, after in pairwise(roles)):
        yield f"messages: roles must alternate: {roles}"
    if "system" in roles and not model.system_turns:
        yield "messages: role system is not supported by this model"
    around = ["", *roles, "assistant"]
    for at, role in enumerate(roles):
        if role == "system" and (around[at], around[at + 2]) != ("user", "assistant"):
            yield f"role 'system' must precede an 'assistant' message or end the array: {roles}"
    if any(blocks(message["content"])[-1]["type"] in ("thinking", "redacted_thinking")
           for message in messages if message["role"] == "assistant"):  # fmt: skip
        yield "The final block in an assistant message cannot be `thinking`."
    if roles[-1:] == ["assistant"] and not model.prefill:
        yield "This model does not support assistant message prefill."
    owed: list[str] = []
    for message in messages:
        results = of_type("tool_result", message["content"])
        if [result["tool_use_id"] for result in results] != owed:
            yield f"`tool_use` {owed} without `tool_result` blocks immediately after: {results}"
        if results != blocks(message["content"])[: len(results)]:
            yield "`tool_result` blocks must come first"
        owed = [call["id"] for call in of_type("tool_use", message["content"])]
    if owed:
        yield f"`tool_use` {owed} without an answer"


def _texts(body: JSON) -> Iterator[str]:
    contents = [blocks(message["content"]) for message in body["messages"]]
    if not all(contents):
        yield "messages: all messages must have non-empty content"
    told = [block for content in contents for block in content]
    inner = [blocks(block.get("content") or ()) for block in told if block["type"] == "tool_result"]
    for block in (*blocks(body.get("system", ())), *told, *sum(inner, [])):
        if block.get("text") == "":
            yield "text content blocks must be non-empty"
    is_prefill = body["messages"][-1]["role"] == "assistant"
    if is_prefill and contents[-1] and contents[-1][-1].get("text", ".")[-1:].isspace():
        yield "final assistant content cannot end with trailing whitespace"


def _tools(body: JSON, model: Claude) -> Iterator[str]:
    tools = [tool for tool in body.get("tools", ()) if tool.get("type", "custom") == "custom"]
    names = [tool["name"] for tool in tools]
    schemas = [tool["input_schema"] for tool in tools]
    used = [of_type("tool_use", message["content"]) for message in body["messages"]]
    ids = [call["id"] for calls in used for call in calls]
    chosen = body.get("tool_choice", {"type": None})
    if len(names) != len(set(names)):
        yield "tools: Tool names must be unique."
    if any(not re.fullmatch("[a-zA-Z0-9_-]{1,128}", name) for name in names):
        yield f"tools.name: should match pattern: {names}"
    if any(schema.get("type") != "object" for schema in schemas):
        yield "tools.input_schema.type: Field required"
    if any({"oneOf", "anyOf", "allOf"} & schema.keys() for schema in schemas):
        yield "tools.input_schema: does not support oneOf, allOf, or anyOf at the top level"
    if ids and not body.get("tools"):
        yield "Requests which include `tool_use` or `tool_result` blocks must define tools"
    if any(not re.fullmatch("[a-zA-Z0-9_-]+", each) for each in ids):
        yield f"tool_use.id: should match pattern: {ids}"
    if len(set(ids)) != len(ids):
        yield "messages: `tool_use` ids must be unique"
    if chosen["type"] and not body.get("tools"):
        yield "tool_choice may only be specified while providing tools"
    if chosen["type"] == "tool" and chosen["name"] not in names:
        yield f"tool_choice: Tool {chosen['name']!r} not found in provided tools"
    if chosen["type"] in ("any", "tool"):
        if not model.forced_tools:
            yield "tool_choice: forced tool use is not supported by this model"
        if body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
            yield "Thinking may not be enabled when tool_choice forces tool use."


def _thinking(body: JSON, model: Claude) -> Iterator[str]:
    thinking = body.get("thinking", {"type": None})
    kinds = {"enabled": model.budget, "adaptive": model.adaptive, "disabled": model.disabled}
    if not kinds.get(thinking["type"], True):
        yield f"thinking.type.{thinking['type']} is not supported by this model"
    if thinking["type"] == "enabled" and not 1024 <= thinking["budget_tokens"] < body["max_tokens"]:
        yield "max_tokens must be greater than thinking.budget_tokens, which is 1024 at least"
    effort = body.get("output_config", {}).get("effort")
    if thinking["type"] == "disabled" and effort in ("xhigh", "max"):
        yield "thinking may be disabled only at effort high or below"
    turns = [blocks(each["content"]) for each in body["messages"] if each["role"] == "assistant"]
    for turn in turns:
        are_thoughts = [block["type"] in THINKING for block in turn]
        if are_thoughts != sorted(are_thoughts, reverse=True):
            yield "thinking blocks must come first in an assistant turn"
        for block in of_type("thinking", turn):
            if block["signature"] != sign(block["thinking"]):
                yield "Invalid `signature` in `thinking` block"
    last = [block["type"] for block in turns[-1]] if turns else []
    if thinking["type"] == "enabled" and "tool_use" in last and last[0] not in THINKING:
        yield "Expected `thinking` or `redacted_thinking`, but found `tool_use`."


def _sampling(body: JSON, model: Claude) -> Iterator[str]:
    given = SAMPLING & body.keys()
    if given and not model.sampling:
        yield f"{given} is deprecated for this model"
    if {"temperature", "top_p"} <= given:
        yield "`temperature` and `top_p` cannot both be specified for this model"
    if not 0 <= body.get("temperature", 0) <= 1:
        yield "temperature: range: 0..1"
    if given and body.get("thinking", {}).get("type") in ("enabled", "adaptive"):
        yield f"{given} may not be set when thinking is enabled"


def _schema(schema: JSON) -> Iterator[str]:
    where = "output_config.format.schema:"
    for keyword, value in schema.items():
        if UNSUPPORTED_IN_SCHEMAS.fullmatch(keyword) and (keyword, value) != ("minItems", 1):
            yield f"{where} {keyword} is not supported"
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield f"{where} 'additionalProperties' must be explicitly set to false"
    if not schema.get("$ref", "#/").startswith("#/"):
        yield f"{where} external $ref"
    named = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    listed = [*schema.get("anyOf", ()), *schema.get("allOf", ()), schema.get("items")]
    for inner in filter(None, named + listed):
        yield from _schema(inner)


# ---- what it answers ----

HEADERS = {"request_id": "req_011CSHoEeqs5C35K2UUqR7Fy", "anthropic_organization_id": "org-1"}
USAGE = {
    "input_tokens": 12,
    "cache_creation_input_tokens": 4,
    "cache_read_input_tokens": 8,
    "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 30,
    "output_tokens_details": {"thinking_tokens": 20},
    "service_tier": "standard",
}


def sign(thought: str) -> str:
    """Return the signature that this upstream gives, by which it knows a thought that changed."""
    return "Eq" + hashlib.sha256(thought.encode()).hexdigest() + "+/=="


def thinking(thought: str) -> JSON:
    return {"type": "thinking", "thinking": thought, "signature": sign(thought)}


def redacted() -> JSON:
    return {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4a"}


def tool_use(call_id: str, name: str, **arguments: Any) -> JSON:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def text(told: str, *urls: str) -> JSON:
    """Return a text block that cites these pages."""
    place = {"type": "web_search_result_location", "cited_text": "It rains.", "title": "A page"}
    citations = [{**place, "url": url, "encrypted_index": "Eo8="} for url in urls]
    return {"type": "text", "text": told, "citations": citations or None}


def searched(query: str) -> list[JSON]:
    """Return the traces of a search that the server made by itself."""
    page = {"type": "web_search_result", "url": "https://a.example", "title": "A page"}
    call = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search"}
    result = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1"}
    return [
        {**call, "input": {"query": query}},
        {**result, "content": [{**page, "encrypted_content": "EqgfCio="}]},
    ]


def message(*content: JSON, stop: str | None = None, **ending: Any) -> JSON:
    """Return a whole answer, as `POST /v1/messages` gives it."""
    return {
        "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
        "type": "message",
        "role": "assistant",
        "model": "claude-answered",
        "content": list(content),
        "stop_reason": stop or ("tool_use" if of_type("tool_use", content) else "end_turn"),
        "stop_sequence": None,
        **ending,
        "usage": USAGE,
    }


def events(whole: JSON) -> list[JSON]:
    """Return the stream that spells the same answer; its usage is told in part, then in full."""
    ending = {key: whole[key] for key in whole if key.startswith("stop_")}
    partly = {key: USAGE[key] for key in USAGE if key.endswith("input_tokens")}
    fully = {**partly, **{key: USAGE[key] for key in USAGE if key.startswith("output_")}}
    start = {**whole, **dict.fromkeys(ending), "content": []}
    return [
        {"type": "message_start", "message": {**start, "usage": {**partly, "output_tokens": 1}}},
        {"type": "ping"},
        *(event for index, block in enumerate(whole["content"]) for event in _block(index, block)),
        {"type": "message_delta", "delta": ending, "usage": fully},
        {"type": "message_stop"},
    ]


def _block(index: int, block: JSON) -> Iterator[JSON]:
    empty, deltas = _deltas(block)
    yield {"type": "content_block_start", "index": index, "content_block": {**block, **empty}}
    yield {"type": "ping"}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": index, "delta": delta}
    yield {"type": "content_block_stop", "index": index}


def _deltas(block: JSON) -> tuple[JSON, list[JSON]]:
    """Return what of a block is empty when it opens, and the deltas that fill it."""
    kind = block["type"]
    if kind == "text":
        told = [{"type": "text_delta", "text": part} for part in parts(block["text"])]
        cited = [{"type": "citations_delta", "citation": each} for each in block["citations"] or ()]
        return {"text": "", "citations": None}, told + cited
    if kind == "thinking":
        told = [{"type": "thinking_delta", "thinking": part} for part in parts(block["thinking"])]
        signed = {"type": "signature_delta", "signature": block["signature"]}
        return {"thinking": "", "signature": ""}, [*told, signed]
    if kind in ("tool_use", "server_tool_use"):
        spelled = ["", *parts(json.dumps(block["input"]))] if block["input"] else []
        told = [{"type": "input_json_delta", "partial_json": part} for part in spelled]
        return {"input": {}}, told
    return {}, []


def stream(*told: JSON, end: str = "whole") -> Reply:
    """Return a streamed answer of these events."""
    for event in told:
        if event["type"] not in ("ping", "error"):
            read_event(json.dumps(event))
    return sse_reply(told, end, named=True, **HEADERS)


def answer(*content: JSON, stop: str | None = None, **ending: Any) -> Answer:
    """Answer with these blocks, as a body or as a stream, whichever the request asks for."""
    whole = message(*content, stop=stop, **ending)
    read_message(json.dumps(whole))

    def reply(received: Received) -> Reply:
        if received.json.get("stream"):
            return stream(*events(whole))
        return json_reply(whole, 200, **HEADERS)

    return reply


def error_event(kind: str, told: str) -> JSON:
    error = {"type": kind, "message": told}
    return {"type": "error", "error": error, "request_id": HEADERS["request_id"]}


def error(status: int, kind: str, told: str, **headers: str) -> Reply:
    """Return an error as Anthropic answers it."""
    return json_reply(error_event(kind, told), status, **HEADERS, **headers)


# What a stream may begin with instead of an answer, and the status that a client must see.
FIRST_ERRORS = [("overloaded_error", 503), ("rate_limit_error", 429), ("api_error", 500)]
