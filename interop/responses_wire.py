"""The Responses wire as OpenAI speaks it: what it takes, and its answers as a body and as a stream.

The shapes are the openai SDK's own types. What the server demands beyond a type is said by the
generators below, in its own words where they are known: each call has its output, reasoning comes
back whole and where it stood, and what each generation of GPT takes. The stream that `events`
spells is also what a stream in front of another vendor's answer is held against.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from drive import UPSTREAM_KEY
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.response_compact_params import ResponseCompactParams
from openai.types.responses.response_create_params import ResponseCreateParams
from openai_wire import HEADERS, NAME, Gpt, gpt
from pydantic import ValidationError
from upstream import JSON, Answer, Received, Reply, closed, json_reply, parts, sse_reply

read_shape = closed(ResponseCreateParams)
read_compact_shape = closed(ResponseCompactParams)
read_count_shape = closed(InputTokenCountParams)
_read_response = closed(Response)
_read_event = closed(ResponseStreamEvent)

# ---- what it takes ----

CALLS = ("function_call", "custom_tool_call")
OUTPUTS = ("function_call_output", "custom_tool_call_output")
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "web_search_call": "ws",
}


def judge(received: Received) -> None:
    """Raise if OpenAI would not take this request."""
    judge_head(received)
    complaints = list(judge_body(received.json))
    assert not complaints, complaints


def judge_translated(received: Received) -> None:
    """Raise if OpenAI would not take it, or if it leans on what OpenAI keeps.

    A model that does not reason answers 400 where its reasoning is asked for.
    """
    judge(received)
    body = received.json
    model = gpt(body["model"])
    wanted = ["reasoning.encrypted_content"] if model and model.efforts else None
    assert body.get("include") == wanted, body.get("include")
    assert body.get("store") is False, "store: a translated request leaves nothing behind"
    state = {"previous_response_id", "conversation", "prompt", "background", "truncation"}
    assert not state & body.keys(), state


def judge_shape(read: Callable[[bytes], Any]) -> Callable[[Received], None]:
    """Return a judge that looks at the head and the shape alone."""

    def judge_it(received: Received) -> None:
        judge_head(received)
        read(received.body)

    return judge_it


def judge_head(received: Received) -> None:
    head = received.headers
    assert head.getall("authorization") == [f"Bearer {UPSTREAM_KEY}"], head
    assert "x-api-key" not in head and head["content-type"] == "application/json", head


def judge_body(body: JSON) -> Iterator[str]:
    """Yield every rule that the body breaks."""
    try:
        read_shape(json.dumps(body))
    except ValidationError as error:
        yield _told(error)
        return
    if not body.get("model") or not body.get("input"):
        yield "Missing required parameter: 'model' or 'input'."
        return
    items = body["input"] if isinstance(body["input"], list) else []
    tools = [*body.get("tools", ())]
    tools += [each for item in items for each in item.get("tools", ()) if "role" in item]
    yield from _caps(body)
    model = gpt(body["model"])
    if model:
        yield from _generation(body, model)
    yield from _items(items)
    yield from _calls(items)
    yield from _tools(tools, body.get("tool_choice", "auto"))


def _told(error: ValidationError) -> str:
    """Tell of a mismatch, but not of a union's branches that were never meant."""
    told = error.errors(include_url=False, include_input=False, include_context=False)
    others = {
        each["loc"][:-1]
        for each in told
        if each["type"] == "literal_error" and each["loc"][-1] in ("type", "role")
    }
    meant = [
        f"{each['loc']}: {each['msg']}"
        for each in told
        if not any(each["loc"][:size] in others for size in range(len(each["loc"])))
    ]
    return "\n".join(meant)[:2000]


def _generation(body: JSON, model: Gpt) -> Iterator[str]:
    effort = (body.get("reasoning") or {}).get("effort")
    if effort and effort not in model.efforts.split():
        yield f"Unsupported value: 'reasoning.effort' does not support '{effort}' with this model."
    if body.get("reasoning") and not model.efforts:
        yield "Unsupported parameter: 'reasoning' is not supported with this model."
    thinks = model.thinks if effort is None else effort != "none"
    for param in ("temperature", "top_p"):
        if thinks and body.get(param) not in (None, 1):
            yield f"Unsupported parameter: '{param}' is not supported with this model."


def _caps(body: JSON) -> Iterator[str]:
    for param, most in {"temperature": 2, "top_p": 1}.items():
        if not 0 <= (body.get(param) or 0) <= most:
            yield f"Invalid '{param}': decimal above maximum value."
    if (body.get("max_output_tokens") or 16) < 16:
        yield "Invalid 'max_output_tokens': integer below minimum value."
    pairs = (body.get("metadata") or {}).items()
    if len(pairs) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
        yield "Invalid 'metadata'"
    if len(body.get("safety_identifier") or "") > 128:
        yield "Invalid 'safety_identifier': string too long."
    form = body.get("text", {}).get("format", {})
    if form.get("strict"):
        yield from _loose(form["schema"])
    if not NAME.fullmatch(form.get("name", "x")):
        yield "Invalid 'text.format.name': string does not match pattern."


def _items(items: list[JSON]) -> Iterator[str]:
    for item, follower in pairwise([*items, {}]):
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        prefix = PREFIXES.get(kind)
        if prefix and not item.get("id", prefix).startswith(prefix):
            yield f"Invalid 'input.id': '{item['id']}'. Expected an ID that begins with '{prefix}'."
        if kind == "reasoning" and item.get("encrypted_content") != seal(item, follower):
            yield f"Item '{item['id']}' of type 'reasoning' is not as it was given: {follower}"
        if kind == "message":
            yield from _content(item["role"], item["content"])
        if kind in OUTPUTS:
            yield from _content("user", item["output"])


def _content(role: str, content: Any) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        kind = part["type"]
        if (kind in ("output_text", "refusal")) != (role == "assistant"):
            yield f"Invalid value: '{kind}' of the {role}."
        if kind == "input_image":
            url = part.get("image_url") or ""
            if not re.match("https?://|data:image/[a-z]+;base64,", url) and not part.get("file_id"):
                yield f"Invalid 'image_url': {url[:40]}"
        if kind == "input_file":
            if not {"file_data", "file_id", "file_url"} & part.keys():
                yield "Missing required parameter: 'file_data'."
            if "file_data" in part and not part.get("filename"):
                yield "Missing required parameter: 'filename'."


def _calls(items: list[JSON]) -> Iterator[str]:
    owed: dict[str, str] = {}
    seen: set[str] = set()
    for item in items:
        kind, call_id = item.get("type"), item.get("call_id") or ""
        if kind in CALLS:
            if not NAME.fullmatch(item["name"]):
                yield f"Invalid 'input.name': {item['name']}"
            if not 0 < len(call_id) <= 64 or call_id in seen:
                yield f"Invalid 'input.call_id': too long, or not the only one: {call_id}"
            if kind == "function_call" and not isinstance(json.loads(item["arguments"]), dict):
                yield f"Invalid 'input.arguments': {item['arguments']}"
            owed[call_id] = kind
            seen.add(call_id)
        if kind in OUTPUTS and owed.pop(call_id, None) != kind.removesuffix("_output"):
            yield f"No tool call found for {kind} with call_id {call_id}."
    if owed:
        yield f"No tool output found for function calls {owed}."


def _tools(tools: list[JSON], chosen: Any) -> Iterator[str]:
    inner = [each for tool in tools if tool["type"] == "namespace" for each in tool["tools"]]
    names = [tool["name"] for tool in tools if "name" in tool]
    for tool in (*tools, *inner):
        if "name" in tool and not NAME.fullmatch(tool["name"]):
            yield f"Invalid 'tools.name': string does not match pattern: {tool['name']}"
        if tool.get("strict"):
            yield from _loose(tool["parameters"])
    if len(names) != len(set(names)):
        yield f"Tool names must be unique: {names}"
    wanted = [chosen] if isinstance(chosen, dict) else []
    if wanted and chosen["type"] == "allowed_tools":
        wanted = chosen["tools"]
    offered = {(tool["type"], tool.get("name")) for tool in tools}
    if not {(each["type"], each.get("name")) for each in wanted} <= offered:
        yield f"Tool choice {chosen} not found in 'tools' parameter."
    if chosen == "required" and not tools:
        yield "Tool choice 'required' must be specified with 'tools' parameter."


def _loose(schema: Any) -> Iterator[str]:
    """Yield where a schema is none that strict mode takes."""
    if isinstance(schema, list):
        for each in schema:
            yield from _loose(each)
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" or "properties" in schema:
        if schema.get("additionalProperties") is not False:
            yield "Invalid schema: 'additionalProperties' is required to be false."
        if sorted(schema.get("required", ())) != sorted(schema.get("properties", ())):
            yield "Invalid schema: 'required' is required to include every key in properties."
    for each in schema.values():
        yield from _loose(each)


# ---- what it answers ----

SEARCH_EVENTS = ("in_progress", "searching", "completed")
# What a part or an item is filled with, and the events that fill it.
FILLED = {
    "output_text": ("text", "output_text"),
    "refusal": ("refusal", "refusal"),
    "summary_text": ("text", "reasoning_summary_text"),
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
}
# Which items have parts, where, and what their events and indexes are called.
PARTED = {
    "message": ("content", "content_part", "content_index"),
    "reasoning": ("summary", "reasoning_summary_part", "summary_index"),
}
USAGE = {
    "input_tokens": 24,
    "input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4},
    "output_tokens": 30,
    "output_tokens_details": {"reasoning_tokens": 20},
    "total_tokens": 54,
}


def seal(item: JSON, follower: JSON) -> str:
    """Return what reasoning is encrypted to, by which this upstream knows it and its place."""
    place = follower.get("call_id") or follower.get("type") or follower.get("role") or "nothing"
    place = "message" if place == "assistant" else place
    told = json.dumps([item["id"], item["summary"], place], sort_keys=True)
    return "gAAAAAB" + hashlib.sha256(told.encode()).hexdigest() + "=="


def text(told: str, *urls: str) -> JSON:
    """Return a part that cites these pages for the whole of its text."""
    place = {"type": "url_citation", "start_index": 0, "end_index": len(told), "title": "A page"}
    cited = [{**place, "url": url} for url in urls]
    return {"type": "output_text", "text": told, "annotations": cited, "logprobs": []}


def refusal(told: str) -> JSON:
    return {"type": "refusal", "refusal": told}


def message(*content: JSON | str) -> JSON:
    told = [text(part) if isinstance(part, str) else part for part in content]
    return {"type": "message", "role": "assistant", "content": told, "status": "completed"}


def reasoning(*thoughts: str) -> JSON:
    summary = [{"type": "summary_text", "text": thought} for thought in thoughts]
    return {"type": "reasoning", "summary": summary}


def function_call(call_id: str, name: str, **arguments: Any) -> JSON:
    call = {"type": "function_call", "call_id": call_id, "name": name, "status": "completed"}
    return {**call, "arguments": json.dumps(arguments)}


def custom_call(call_id: str, name: str, told: str) -> JSON:
    return {"type": "custom_tool_call", "call_id": call_id, "name": name, "input": told}


def searched(query: str) -> JSON:
    action = {"type": "search", "query": query, "queries": [query]}
    return {"type": "web_search_call", "status": "completed", "action": action}


def response(*output: JSON, status: str = "completed", **ending: Any) -> JSON:
    """Return a whole answer, as `POST /v1/responses` gives it."""
    named = [{"id": f"{PREFIXES[item['type']]}_{_digest(item)}", **item} for item in output]
    for item, follower in pairwise([*named, {}]):
        if item["type"] == "reasoning":
            item["encrypted_content"] = seal(item, follower)
    return {
        "id": "resp_67ccd2bed1ec8190b14f964abc0542670bb6a6b452d3795b",
        "object": "response",
        "created_at": 1741569952,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "model": "gpt-5.2-2025-12-11",
        "output": named,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": "medium", "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": None if status == "failed" else USAGE,
        **ending,
    }


def _digest(item: JSON) -> str:
    return hashlib.sha256(json.dumps(item).encode()).hexdigest()[:32]


def failed(code: str, told: str, *output: JSON) -> JSON:
    return response(*output, status="failed", error={"code": code, "message": told})


def incomplete(reason: str, *output: JSON) -> JSON:
    return response(*output, status="incomplete", incomplete_details={"reason": reason})


def error_event(code: str, told: str) -> JSON:
    return {"type": "error", "code": code, "message": told, "param": None}


def numbered(*told: JSON) -> list[JSON]:
    return [{**event, "sequence_number": number} for number, event in enumerate(told)]


def events(whole: JSON) -> list[JSON]:
    """Return the stream that spells the same answer."""
    opened = {**whole, "status": "in_progress", "output": [], "usage": None}
    opened |= {"error": None, "incomplete_details": None}
    return numbered(
        {"type": "response.created", "response": opened},
        {"type": "response.in_progress", "response": opened},
        *(event for index, item in enumerate(whole["output"]) for event in _item(index, item)),
        {"type": f"response.{whole['status']}", "response": whole},
    )


def _item(index: int, item: JSON) -> Iterator[JSON]:
    place, kind = {"output_index": index}, item["type"]
    inside = {**place, "item_id": item["id"]}
    opened = _emptied(item)
    if "status" in item:
        opened["status"] = "in_progress"
    key, stem, counter = PARTED.get(kind, (kind, "", ""))
    if stem:
        opened[key] = []
    yield {"type": "response.output_item.added", **place, "item": opened}
    for number, part in enumerate(item[key] if stem else ()):
        where = {**inside, counter: number}
        yield {"type": f"response.{stem}.added", **where, "part": _emptied(part)}
        yield from _filling(part, where)
        yield {"type": f"response.{stem}.done", **where, "part": part}
    if kind in FILLED:
        yield from _filling(item, inside)
    if kind == "web_search_call":
        yield from ({"type": f"response.{kind}.{step}", **inside} for step in SEARCH_EVENTS)
    yield {"type": "response.output_item.done", **place, "item": item}


def _emptied(told: JSON) -> JSON:
    key, _ = FILLED.get(told["type"], ("", ""))
    empty: JSON = {key: ""} if key else {}
    return {**told, **empty, **({"annotations": []} if "annotations" in told else {})}


def _filling(told: JSON, where: JSON) -> Iterator[JSON]:
    key, stem = FILLED[told["type"]]
    more = {"logprobs": []} if stem == "output_text" else {}
    for piece in parts(told[key]):
        yield {"type": f"response.{stem}.delta", **where, "delta": piece, **more}
    for number, cited in enumerate(told.get("annotations", ())):
        note = {"annotation_index": number, "annotation": cited}
        yield {"type": "response.output_text.annotation.added", **where, **note}
    yield {"type": f"response.{stem}.done", **where, key: told[key], **more}


def stream(*told: JSON, end: str = "whole") -> Reply:
    """Return a streamed answer of these events; their deltas' lengths are hidden, as OpenAI's."""
    for event in told:
        read_event(event)
    hidden = [{**each, "obfuscation": "x9Ky"} if "delta" in each else each for each in told]
    return sse_reply(hidden, end, named=True, **HEADERS)


def reply(whole: JSON) -> Answer:
    """Give this answer, as a body or as a stream, whichever the request asks for."""
    read_response(whole)

    def give(received: Received) -> Reply:
        if received.json.get("stream"):
            return stream(*events(whole))
        return json_reply(whole, 200, **HEADERS)

    return give


def answer(*output: JSON) -> Answer:
    return reply(response(*output))


# ---- what a client is given ----


def read_response(whole: JSON) -> None:
    """Raise unless it is a response of the SDK's."""
    _read_response(json.dumps(_typed(whole)))


def read_event(event: JSON) -> None:
    typed = {**event, "response": _typed(event["response"])} if "response" in event else event
    try:
        _read_event(json.dumps(typed))
    except ValidationError as error:
        raise AssertionError(f"{_told(error)}\nin {event}") from None


def _typed(whole: JSON) -> JSON:
    """Leave out what the server answers, though no type has it."""
    return {key: value for key, value in whole.items() if key != "store"}


def read_stream(raw: bytes) -> list[JSON]:
    """Return the events of a stream; raise unless OpenAI could have sent it."""
    *frames, rest = raw.split(b"\n\n")
    assert not rest, f"an open end: {rest!r}"
    told = []
    for frame in (each for each in frames if not each.startswith(b":")):
        found = re.fullmatch(rb"event: (\S+)\ndata: (.*)", frame)
        assert found, f"not an event: {frame!r}"
        told.append(json.loads(found[2]))
        assert told[-1]["type"] == found[1].decode(), frame
        read_event(told[-1])
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    for event in told[:2]:
        begun = event["response"]
        assert (begun["status"], begun["output"], begun.get("usage")) == ("in_progress", [], None)
    states = [event["response"] for event in told if "response" in event]
    assert len(states) == 3 and "response" in told[-1], "it ends once, with the whole response"
    assert told[-1]["type"] == f"response.{states[-1]['status']}"
    assert len({(state["id"], state["model"], state["created_at"]) for state in states}) == 1
    if states[-1]["status"] != "failed":
        assert _pith(told) == _pith(events(states[-1]))
    return told


def _pith(told: list[JSON]) -> list[JSON]:
    """Return what a stream says of its items, whatever the pieces in which it says it."""
    kept: list[JSON] = []
    for numbered_event in told[2:-1]:
        event = {**numbered_event, "sequence_number": None}
        kind = event["type"]
        if "web_search_call" in kind or event.get("delta") == "":
            continue  # a search needs no events of its own; an empty delta says nothing
        if kind == "response.output_item.added":
            event["item"] = {**event["item"], "encrypted_content": None}  # it may come late
        before = next((each for each in reversed(kept) if "annotation" not in each), {})
        if "delta" in event and before.get("type") == kind:
            before["delta"] += event["delta"]
        else:
            kept.append(event)
    return kept
