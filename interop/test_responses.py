"""The openai SDK's Responses API through the gateway: bytes pass to OpenAI; in front of Chat
Completions, Anthropic and Gemini nothing is lost, nothing invented.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import anthropic_wire
import gemini_wire
import httpx2
import openai
import openai_wire
import pytest
import responses_wire as wire
from anthropic_wire import redacted, searched, thinking, tool_use
from drive import KEY, LIMITED_KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway, Launch
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from openai_wire import PIXEL, SCHEMA, call, choice, text, user
from pydantic import BaseModel
from upstream import JSON, Answer, Received, Reply, Upstream, json_reply, sse_reply

OLD, MIDDLE = "claude-haiku-4-5", "claude-opus-4-6"
NEW, NEWEST = "claude-opus-4-8", "claude-opus-5-5"
TRANSLATED = ("chat", "claude", "gemini")
STATED = "/v1/responses/resp_1"


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    """Stand in for the other suites' upstream: one that speaks all dialects."""

    def any_shape(_: Received) -> None:
        pass

    judges: dict[str, Callable[[Received], None]] = {
        "/v1/chat/completions": openai_wire.judge,
        "/v1/messages": anthropic_wire.judge,
        **gemini_wire.JUDGES,
        "/v1/responses": wire.judge,
        "/v1/responses/compact": wire.judge_shape(wire.read_compact_shape),
        "/v1/responses/input_tokens": wire.judge_shape(wire.read_count_shape),
        **dict.fromkeys((STATED, f"{STATED}/cancel", f"{STATED}/input_items"), any_shape),
    }
    server = Upstream(judges)
    yield server
    server.close()


@pytest.fixture(scope="session")
def config(upstream: Upstream) -> JSON:
    """Stand in for the other suites' configuration."""
    local = {"kind": "openai-compatible", "base_url": f"{upstream.url}/v1"}
    return {
        "providers": {
            "openai": {"api_key": UPSTREAM_KEY, "base_url": f"{upstream.url}/v1"},
            "local": local,
            "modern": {**local, "api_key": UPSTREAM_KEY, "responses": True},
            "anthropic": {"api_key": UPSTREAM_KEY, "base_url": upstream.url},
            "gemini": {"api_key": UPSTREAM_KEY, "base_url": upstream.url},
        },
        "models": {
            "fast": {"provider": "openai", "model": "gpt-5.2"},
            "chat": {"provider": "local", "model": "llama-4"},
            "chatty": {"provider": "openai", "model": "gpt-5.2", "wire": "chat"},
            "direct": {"provider": "modern", "model": "gpt-5.2"},
            "claude": {"provider": "anthropic", "model": OLD},
            "gemini": {"provider": "gemini", "model": "gemini-3.8-flash"},
        },
        "routing": [
            {"prefix": "gpt-", "provider": "openai"},
            {"prefix": "claude-", "provider": "anthropic"},
            {"prefix": "gemini-", "provider": "gemini"},
        ],
        "api_keys": [
            {"key": KEY, "app": "interop", "allowed_models": ["*"]},
            {"key": LIMITED_KEY, "app": "limited", "allowed_models": ["chat"]},
        ],
    }


class AskResponses(Ask):
    """The Responses API in the same manners; with `text_format`, its parsing helpers."""

    def __call__(self, **params: Any) -> Any:
        params = {"model": "fast", "input": "Hello", **params}
        return asyncio.run(self._talk_async(params)) if self.is_async else self._talk(params)

    def _talk(self, params: JSON) -> Any:
        http = DefaultHttpxClient(event_hooks=self.hooks())
        with OpenAI(http_client=http, **self.options) as client:
            responses: Any = client.responses
            if not self.is_stream:
                return (responses.parse if "text_format" in params else responses.create)(**params)
            with responses.stream(**params) as stream:
                return last_of(list(stream))

    async def _talk_async(self, params: JSON) -> Any:
        http = DefaultAsyncHttpxClient(event_hooks=self.hooks())
        async with AsyncOpenAI(http_client=http, **self.options) as client:
            responses: Any = client.responses
            if not self.is_stream:
                is_parsed = "text_format" in params
                return await (responses.parse if is_parsed else responses.create)(**params)
            async with responses.stream(**params) as stream:
                return last_of([event async for event in stream])


def last_of(events: list[Any]) -> Any:
    """Return the whole response, which the last event has."""
    return events[-1].response


@pytest.fixture(params=MANNERS)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> AskResponses:
    return AskResponses(gateway, request.param)


def stream_of(gateway: Gateway, **params: Any) -> list[JSON]:
    """Return what a stream told, every event of it held against the SDK's types and grammar."""
    body = {"input": "Hello", "stream": True, **params}
    head = {"authorization": f"Bearer {KEY}"}
    answer = httpx2.post(f"{gateway.url}/v1/responses", json=body, headers=head, timeout=15)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return wire.read_stream(answer.content)


# ---- bytes pass ----

FUNCTION = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
EMPTY = {"type": "object", "properties": {}}
TIME: JSON = {"type": "function", "name": "time", "parameters": EMPTY, "strict": None}
LARK = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF'}
PATCHER = {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": LARK}
PATCH = '*** Begin Patch\n*** Add File: a "b"\\\n+Zürich 😀\u2028\n*** End Patch\n'
ODD_TEXT = 'a\u2028b\u0085c \\ " </script> 😀 \ufeff d\r\n\te\x1f response.failed\n\ndata: {}'
RAIN = wire.function_call("call_1", "get_weather", city="Zürich")
NOON = wire.function_call("call_2", "time")


def input_text(told: str) -> JSON:
    return {"type": "input_text", "text": told}


def input_image(url: str, detail: str = "low") -> JSON:
    return {"type": "input_image", "image_url": url, "detail": detail}


def input_file(**source: str) -> JSON:
    return {"type": "input_file", **source}


def output(call_id: str, told: Any) -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": told}


GIF = f"data:image/gif;base64,{PIXEL}"
PDF = "data:application/pdf;base64,JVBERi0x"
MEDIA = [
    input_text("What is this?"),
    input_image(GIF),
    input_image("https://example.com/a.png", "high"),
    input_file(filename="a.pdf", file_data=PDF),
]
# What is asked of OpenAI beyond "Hello", and its answer.
PASSED: dict[str, tuple[JSON, JSON]] = {
    "text": ({}, wire.response(wire.message("Hello! How can I help you today?"))),
    "odd text": ({"input": ODD_TEXT}, wire.response(wire.message(ODD_TEXT * 3))),
    "media": ({"input": [user(MEDIA)]}, wire.response(wire.message("A pixel."))),
    "state": (
        {"previous_response_id": "resp_1", "store": True, "truncation": "auto"},
        wire.response(wire.message("Hi.")),
    ),
    "reasoning": (
        {"reasoning": {"effort": "high", "summary": "auto"}, "max_output_tokens": 99},
        wire.response(wire.reasoning("One.", "Two."), wire.message("Yes.")),
    ),
    "calls": (
        {"tools": [FUNCTION, TIME, PATCHER], "tool_choice": "required"},
        wire.response(wire.reasoning(), RAIN, wire.custom_call("call_2", "apply_patch", PATCH)),
    ),
    "search": (
        {"tools": [{"type": "web_search"}], "tool_choice": "auto"},
        wire.response(wire.searched("?"), wire.message(wire.text("It rains.", "https://a.b"))),
    ),
    "refusal": ({}, wire.response(wire.message(wire.refusal("No.")))),
    "length": ({}, wire.incomplete("max_output_tokens", wire.message("One"))),
    "filter": ({}, wire.incomplete("content_filter")),
    "failure": ({}, wire.failed("server_error", "It broke.", wire.message("One"))),
}


@pytest.mark.parametrize("params, whole", PASSED.values(), ids=PASSED)
@pytest.mark.parametrize("model", ["fast", "direct"])
def test_what_is_asked_and_answered_passes_unchanged(
    ask: AskResponses, upstream: Upstream, model: str, params: JSON, whole: JSON
) -> None:
    upstream.script(wire.reply(whole))
    told = ask(model=model, **params)
    assert ask.sent.count(b'"model":"%b"' % model.encode()) == 1
    spliced = ask.sent.replace(b'"model":"%b"' % model.encode(), b'"model":"gpt-5.2"')
    assert upstream.take().body == spliced
    for got, meant in zip(told.output, whole["output"], strict=True):
        assert meant.items() <= without_parsed(got.to_dict()).items()
    assert (told.id, told.model, told.status) == (whole["id"], whole["model"], whole["status"])
    assert ask.headers["x-request-id"] == wire.HEADERS["x_request_id"]


def without_parsed(value: Any) -> Any:
    """Leave out what the SDK's stream helper adds."""
    if isinstance(value, list):
        return list(map(without_parsed, value))
    if not isinstance(value, dict):
        return value
    return {key: without_parsed(inner) for key, inner in value.items() if key != "parsed"}


@pytest.mark.parametrize("whole", [whole for _, whole in PASSED.values()], ids=PASSED)
def test_a_stream_passes_byte_for_byte(client: OpenAI, upstream: Upstream, whole: JSON) -> None:
    reply = wire.stream(*wire.events(whole))
    upstream.script(reply)
    create = client.responses.with_streaming_response.create
    with create(model="fast", input="Hello", stream=True) as answer:
        assert answer.read() == b"".join(reply.pieces)
    assert answer.headers["content-type"] == reply.headers["content-type"]


def test_usage_is_counted(ask: AskResponses, gateway: Gateway, upstream: Upstream) -> None:
    grown = gateway.counting()
    upstream.script(wire.answer(wire.reasoning("Hm."), wire.message("Hello, and so on.")))
    ask()
    line = gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert (line["status"], line["usage"], line["path"]) == (200, "reported", "/v1/responses")
    labels = {"virtual_key": "interop", "provider": "openai", "model": "fast"}
    assert grown("llm_tokens_total", direction="prompt", **labels) == 24
    assert grown("llm_tokens_total", direction="completion", **labels) == 30
    for kind, tokens in {"cache_read": 8, "cache_write": 4, "reasoning": 20}.items():
        assert grown("llm_token_details_total", kind=kind, **labels) == tokens
    assert grown("llm_requests_total", status="200", **labels) == 1
    assert grown("llm_usage_estimated_total") == 0


def test_what_openai_keeps_is_reached(client: OpenAI, upstream: Upstream) -> None:
    """These requests name no model; they go where Responses have their state."""
    whole = wire.response(wire.message("Hi."))
    page = {"object": "list", "data": [], "first_id": "", "last_id": "", "has_more": False}
    upstream.script(
        json_reply(whole),
        wire.stream(*wire.events(whole)),
        json_reply({**page, "data": whole["output"]}),
        json_reply({**whole, "status": "cancelled"}),
        json_reply({"id": "resp_1", "object": "response", "deleted": True}),
    )
    responses = client.responses
    assert responses.retrieve("resp_1").output_text == "Hi."
    with responses.retrieve("resp_1", stream=True, starting_after=2) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
    assert [item.type for item in responses.input_items.list("resp_1", limit=9)] == ["message"]
    assert responses.cancel("resp_1").status == "cancelled"
    responses.delete("resp_1")
    got = [upstream.take() for _ in range(5)]
    wanted = ["", "", "/input_items", "/cancel", ""]
    assert [each.path for each in got] == [STATED + path for path in wanted]
    assert {"stream=true", "starting_after=2"} <= set(got[1].query.split("&"))
    assert got[2].query == "limit=9"
    assert {each.headers["authorization"] for each in got} == {f"Bearer {UPSTREAM_KEY}"}


def test_what_costs_no_answer_passes(client: OpenAI, upstream: Upstream) -> None:
    counted = json_reply({"object": "response.input_tokens", "input_tokens": 14})
    whole = {key: wire.response(wire.message("Hi."))[key] for key in ("id", "output", "usage")}
    compacted = {**whole, "object": "response.compaction", "created_at": 1}
    upstream.script(counted, json_reply(compacted))
    asked: Any = {"model": "fast", "input": [user(MEDIA)]}
    assert client.responses.input_tokens.count(**asked).input_tokens == 14
    assert client.responses.compact(**asked).output[0].type == "message"
    assert [upstream.take().json["model"] for _ in range(2)] == ["gpt-5.2"] * 2


def test_a_websocket_is_refused_so_that_http_is_tried(gateway: Gateway) -> None:
    head = {"authorization": f"Bearer {KEY}", "connection": "Upgrade", "upgrade": "websocket"}
    head |= {"sec-websocket-version": "13", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    head |= {"openai-beta": "responses_websockets=2026-02-06"}
    assert httpx2.get(f"{gateway.url}/v1/responses", headers=head).status_code == 426


# ---- translated answers ----


def claude_search(query: str) -> list[JSON]:
    cited = anthropic_wire.text
    return [*searched(query), cited("It rains", "a:", "b:"), cited("."), cited("!", "c:")]


BERN = call("call_1", "get_weather", city="Bern"), call("call_2", "time")
CLAUDE_BERN = tool_use("call_1", "get_weather", city="Bern"), tool_use("call_2", "time")
NO = {"type": "refusal", "category": "bio", "explanation": "No."}
CALLED = [("call_1", "get_weather", '{"city":"Bern"}'), ("call_2", "time", "{}")]
GEMINI_BERN = gemini_wire.call(1, "get_weather", city="Bern"), gemini_wire.call(2, "time")
from_chat, from_claude = openai_wire.answer, anthropic_wire.answer
from_gemini = gemini_wire.answer
claude_text, gemini_text = anthropic_wire.text, gemini_wire.text
# Who is asked and answers what, and what the response then says.
ANSWERS: dict[str, tuple[str, Answer, JSON]] = {
    "chat: text": ("chat", from_chat(choice("Hi 😀\u2028!")), {"text": "Hi 😀\u2028!"}),
    "chat: length": (
        "chat",
        from_chat(choice("One", finish="length")),
        {"text": "One", "reason": "max_output_tokens"},
    ),
    "chat: filter": (
        "chat",
        from_chat(choice("One", finish="content_filter")),
        {"text": "One", "reason": "content_filter"},
    ),
    "chat: refusal": ("chat", from_chat(choice(refusal="No.")), {"refusal": "No."}),
    "chat: calls": ("chat", from_chat(choice(None, *BERN)), {"calls": CALLED}),
    "chat: text and calls": (
        "chat",
        from_chat(choice("I look.", *BERN)),
        {"text": "I look.", "calls": CALLED},
    ),
    "chat: nothing": ("chat", from_chat(choice("")), {}),
    "claude: text": (
        "claude",
        from_claude(claude_text("Hello, "), claude_text("you 😀\u2028!")),
        {"text": "Hello, you 😀\u2028!"},
    ),
    "claude: length": (
        "claude",
        from_claude(claude_text("One"), stop="max_tokens"),
        {"text": "One", "reason": "max_output_tokens"},
    ),
    "claude: full": (
        "claude",
        from_claude(claude_text("One"), stop="model_context_window_exceeded"),
        {"text": "One", "reason": "max_output_tokens"},
    ),
    "claude: stop": (
        "claude",
        from_claude(claude_text("One"), stop="stop_sequence", stop_sequence="END"),
        {"text": "One"},
    ),
    "claude: refusal": (
        "claude",
        from_claude(stop="refusal", stop_details=NO),
        {"refusal": "No."},
    ),
    "claude: silent refusal": ("claude", from_claude(stop="refusal"), {"reason": "content_filter"}),
    "claude: calls": (
        "claude",
        from_claude(claude_text("I look."), *CLAUDE_BERN),
        {"text": "I look.", "calls": CALLED},
    ),
    "claude: thinking": (
        "claude",
        from_claude(thinking("Let me see."), redacted(), claude_text("Hello.")),
        {"summary": "Let me see.", "text": "Hello."},
    ),
    "claude: search": (
        "claude",
        from_claude(*claude_search("rain?")),
        {
            "text": "It rains.!",
            "cited": [(0, 8, "a:"), (0, 8, "b:"), (9, 10, "c:")],
            "queries": ["rain?"],
        },
    ),
    "claude: nothing": ("claude", from_claude(), {}),
    "gemini: text": (
        "gemini",
        from_gemini(gemini_text("Hello, "), gemini_text("you 😀\u2028!")),
        {"text": "Hello, you 😀\u2028!"},
    ),
    "gemini: length": (
        "gemini",
        from_gemini(gemini_text("One"), finish="MAX_TOKENS"),
        {"text": "One", "reason": "max_output_tokens"},
    ),
    "gemini: filter": (
        "gemini",
        from_gemini(gemini_text("One"), finish="SAFETY"),
        {"text": "One", "reason": "content_filter"},
    ),
    "gemini: calls": (
        "gemini",
        from_gemini(gemini_text("I look."), *GEMINI_BERN),
        {"text": "I look.", "calls": [(f"given-{n}", *CALLED[n - 1][1:]) for n in (1, 2)]},
    ),
    "gemini: thoughts": (
        "gemini",
        from_gemini(gemini_wire.thought("Let me see."), gemini_text("Hello.")),
        {"summary": "Let me see.", "text": "Hello."},
    ),
}
SEARCH = {"tools": [{"type": "web_search"}]}


def answer_of(model: str, told: str = "Hi") -> Answer:
    if model == "gemini":
        return from_gemini(gemini_text(told))
    return from_chat(choice(told)) if model == "chat" else from_claude(claude_text(told))


def own_id(call_id: str) -> str:
    """Return an id as it was given, without the signature that rides in it."""
    return call_id.partition("__ts_")[0]


def summed_up(told: JSON) -> JSON:
    """Return what ANSWERS has of a response."""
    items = told["output"]
    content = [part for item in items if item["type"] == "message" for part in item["content"]]
    texts = [part for part in content if part["type"] == "output_text"]
    starts = accumulate((len(part["text"]) for part in texts), initial=0)
    cited = [
        (start + each["start_index"], start + each["end_index"], each["url"])
        for start, part in zip(starts, texts, strict=False)
        for each in part["annotations"]
    ]
    calls = [item for item in items if item["type"] == "function_call"]
    thoughts = [item["summary"] for item in items if item["type"] == "reasoning"]
    found = [item["action"]["query"] for item in items if item["type"] == "web_search_call"]
    summary = {
        "text": "".join(part["text"] for part in texts),
        "refusal": "".join(part.get("refusal", "") for part in content),
        "summary": "".join(part["text"] for summary in thoughts for part in summary),
        "calls": [
            (own_id(each["call_id"]), each["name"], each["arguments"].replace(": ", ":"))
            for each in calls
        ],
        "cited": cited,
        "queries": found,
        "reason": (told.get("incomplete_details") or {}).get("reason"),
    }
    assert told["status"] == ("incomplete" if summary["reason"] else "completed")
    return {key: value for key, value in summary.items() if value}


@pytest.mark.parametrize("model, reply, wanted", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_becomes_a_response(
    ask: AskResponses, gateway: Gateway, upstream: Upstream, model: str, reply: Answer, wanted: JSON
) -> None:
    grown = gateway.counting()
    upstream.script(reply)
    told = ask(model=model, **(SEARCH if "queries" in wanted else {}))
    assert summed_up(told.to_dict()) == wanted
    assert (told.model, told.object, told.error) == (model, "response", None)
    wanted_usage = USAGES.get(model, wire.USAGE)
    assert told.usage.to_dict() == wanted_usage
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=200, usage="reported")
    prompt, completion = wanted_usage["input_tokens"], wanted_usage["output_tokens"]
    assert grown("llm_tokens_total", model=model, direction="prompt") == prompt
    assert grown("llm_tokens_total", model=model, direction="completion") == completion


CACHED = {"input_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 0}}
USAGES: dict[str, Any] = {
    "chat": {
        **CACHED,
        "input_tokens": 19,
        "output_tokens": 10,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 29,
    },
    "gemini": {**wire.USAGE, **CACHED},
}


@pytest.mark.parametrize("model, reply, wanted", ANSWERS.values(), ids=ANSWERS)
def test_a_stream_is_as_openai_sends_it(
    gateway: Gateway, upstream: Upstream, model: str, reply: Answer, wanted: JSON
) -> None:
    upstream.script(reply)
    told = stream_of(gateway, model=model, **(SEARCH if "queries" in wanted else {}))
    assert summed_up(told[-1]["response"]) == wanted


@pytest.mark.parametrize("model, reply, wanted", ANSWERS.values(), ids=ANSWERS)
def test_a_body_is_as_openai_sends_it(
    client: OpenAI, upstream: Upstream, model: str, reply: Answer, wanted: JSON
) -> None:
    upstream.script(reply)
    params: Any = SEARCH if "queries" in wanted else {}
    raw = client.responses.with_raw_response.create(model=model, input="Hello", **params)
    whole = json.loads(raw.text)
    wire.read_response(whole)
    for item in whole["output"]:
        assert item["id"].startswith(wire.PREFIXES[item["type"]] + "_")


ECHOED: JSON = {
    "instructions": "Be brief.",
    "max_output_tokens": 4000,
    "metadata": {"a": "b"},
    "parallel_tool_calls": False,
    "temperature": 0.5,
    "text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}},
    "tool_choice": {"type": "function", "name": "time"},
    "tools": [FUNCTION, TIME, PATCHER],
}


@pytest.mark.parametrize("model", TRANSLATED)
def test_a_response_says_what_was_asked(gateway: Gateway, upstream: Upstream, model: str) -> None:
    plain = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    plain |= {"truncation": "disabled", "store": False, "previous_response_id": None}
    for asked, wanted in (({}, plain), (ECHOED, ECHOED), ({"store": True}, {"store": False})):
        upstream.script(answer_of(model, "{}"))
        told = stream_of(gateway, model=model, **asked)
        for event in (told[0], told[-1]):
            echo = event["response"]
            assert {key: echo.get(key) for key in wanted} == wanted
            assert echo["text"]["format"] == ECHOED["text"]["format"] or asked is not ECHOED


def test_open_reasoning_is_a_reasoning_item(ask: AskResponses, upstream: Upstream) -> None:
    """A compatible server tells it in a field that OpenAI does not have."""
    upstream.script(from_chat(choice("Hello.", reasoning="Let me see.")))
    thought, said = ask(model="chat").output
    parts = [*thought.summary, *(thought.content or ())]
    assert (thought.type, "".join(part.text for part in parts)) == ("reasoning", "Let me see.")
    assert said.content[0].text == "Hello."


def test_logprobs_are_asked_for_and_told(ask: AskResponses, upstream: Upstream) -> None:
    upstream.script(from_chat(choice("Hello", tokens=["Hel", "lo"])))
    include = ["message.output_text.logprobs"]
    (said,) = ask(model="chat", top_logprobs=2, include=include).output
    assert [each.token for each in said.content[0].logprobs] == ["Hel", "lo"]
    body = upstream.take().json
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


class Place(BaseModel):
    name: str
    heights: list[int]


@pytest.mark.parametrize("model", ["fast", *TRANSLATED])
def test_parse_reads_structured_output(ask: AskResponses, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871])
    told = place.model_dump_json()
    replies: dict[str, Answer] = {
        "fast": wire.answer(wire.message(told)),
        "chat": from_chat(choice(told)),
        "claude": from_claude(claude_text(told)),
        "gemini": from_gemini(gemini_text(told)),
    }
    upstream.script(replies[model])
    assert ask(model=model, text_format=Place).output_parsed == place


# ---- translated requests ----


def spelled_out(body: JSON) -> JSON:
    """Return a body of Chat's with every content as parts, so that both spellings are equal."""

    def full(content: Any) -> Any:
        return [text(content)] if isinstance(content, str) else content

    def whole(message: JSON) -> JSON:
        for made in message.get("tool_calls") or ():
            made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        return {**message, "content": full(message.get("content"))}

    return {**body, "messages": list(map(whole, body["messages"]))}


def spelled_call(call_id: str, name: str, **arguments: Any) -> JSON:
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def developer(told: str) -> JSON:
    return {"type": "message", "role": "developer", "content": [input_text(told)]}


def system(*told: str) -> JSON:
    return {"role": "system", "content": list(map(text, told))}


def asked(*told: str) -> JSON:
    return user(list(map(text, told)))


def nested(tool: JSON, *keys: str) -> JSON:
    return {"type": "function", "function": {key: tool[key] for key in keys}}


FORMAT = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
CHAT_FORMAT = {"name": "place", "schema": SCHEMA, "strict": True}
NAMED = {"type": "function", "name": "time"}
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}
CHAT_NAMED = nested(TIME, "name")
BOTH = {"tools": [FUNCTION, TIME]}
SAID = {**wire.message("I look."), "id": "msg_1", "phase": "commentary"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAABforeign"}
FOUND = {**wire.searched("?"), "id": "ws_1"}
# Outputs stand in disorder and a message between them; an agent's ids are on every item.
HISTORY: list[Any] = [
    {**user("Weather?"), "type": "message"},
    THOUGHT,
    FOUND,
    SAID,
    {**RAIN, "id": "fc_1"},
    {key: NOON[key] for key in NOON if key != "status"},
    output("call_2", [input_text("noon")]),
    user([input_text("Go on.")]),
    output("call_1", "rain"),
]
CHAT_HISTORY = [
    asked("Weather?"),
    {
        "role": "assistant",
        "content": [text("I look.")],
        "tool_calls": [
            spelled_call("call_1", "get_weather", city="Zürich"),
            spelled_call("call_2", "time"),
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [text("rain")]},
    {"role": "tool", "tool_call_id": "call_2", "content": [text("noon")]},
    asked("Go on."),
]
# What is asked of a Chat server, and what it must see of it; None is what it must not see.
CHAT_ASKS: dict[str, tuple[JSON, JSON]] = {
    "string": ({"input": "Hi"}, {"messages": [asked("Hi")]}),
    "instructions": (
        {"instructions": "Be brief."},
        {"messages": [system("Be brief."), asked("Hello")]},
    ),
    "media": (
        {"input": [user(MEDIA)]},
        {
            "messages": [
                user(
                    [
                        text("What is this?"),
                        {"type": "image_url", "image_url": {"url": GIF, "detail": "low"}},
                        {
                            "type": "image_url",
                            "image_url": {"url": MEDIA[2]["image_url"], "detail": "high"},
                        },
                        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
                    ]
                )
            ]
        },
    ),
    "history": ({"input": HISTORY, **BOTH}, {"messages": CHAT_HISTORY}),
    "simple history": (
        {"input": [user("A"), {"role": "assistant", "content": "B"}, user("C")]},
        {"messages": [asked("A"), {"role": "assistant", "content": [text("B")]}, asked("C")]},
    ),
    "call without text": (
        {"input": [user("A"), NOON, output("call_2", "noon")], **BOTH},
        {
            "messages": [
                asked("A"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [spelled_call("call_2", "time")],
                },
                {"role": "tool", "tool_call_id": "call_2", "content": [text("noon")]},
            ]
        },
    ),
    "tools": (
        BOTH,
        {
            "tools": [
                nested(FUNCTION, "name", "parameters", "strict"),
                nested(TIME, "name", "parameters"),
            ]
        },
    ),
    "no tools": (
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
        dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls")),
    ),
    "more tools": (
        {"input": [{"type": "additional_tools", "role": "developer", "tools": [TIME]}, user("A")]},
        {"tools": [nested(TIME, "name", "parameters")], "messages": [asked("A")]},
    ),
    "required": ({**BOTH, "tool_choice": "required"}, {"tool_choice": "required"}),
    "none": ({**BOTH, "tool_choice": "none"}, {"tool_choice": "none"}),
    "named": ({**BOTH, "tool_choice": NAMED}, {"tool_choice": CHAT_NAMED}),
    "allowed": (
        {**BOTH, "tool_choice": ALLOWED},
        {"tool_choice": "required", "tools": [nested(TIME, "name", "parameters")]},
    ),
    "one at a time": ({**BOTH, "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    "json_schema": (
        {"text": {"format": FORMAT, "verbosity": "low"}},
        {
            "response_format": {"type": "json_schema", "json_schema": CHAT_FORMAT},
            "verbosity": None,
        },
    ),
    "json_object": (
        {"text": {"format": {"type": "json_object"}}},
        {"response_format": {"type": "json_object"}},
    ),
    "plain text": ({"text": {"format": {"type": "text"}}}, {"response_format": None}),
    "sampling": ({"temperature": 0.3, "top_p": 0.9}, {"temperature": 0.3, "top_p": 0.9}),
    "cap": ({"max_output_tokens": 99}, {"max_tokens": 99, "max_completion_tokens": None}),
    "hints": (
        {"max_tool_calls": 1, "include": ["reasoning.encrypted_content"]},
        {"max_tool_calls": None, "include": None},
    ),
}


@pytest.mark.parametrize("params, wanted", CHAT_ASKS.values(), ids=CHAT_ASKS)
def test_a_request_becomes_one_of_chat(
    ask: AskResponses, upstream: Upstream, params: JSON, wanted: JSON
) -> None:
    upstream.script(from_chat(choice("{}")))
    assert ask(model="chat", **params).output_text == "{}"
    body = spelled_out(upstream.take().json)
    assert {key: body.get(key) for key in wanted} == wanted
    assert (body["model"], bool(body.get("stream"))) == ("llama-4", ask.is_stream)
    usage = {"include_usage": True} if ask.is_stream else None
    assert body.get("stream_options") == usage


CHAT_LARK = {"type": "grammar", "grammar": {"syntax": "lark", "definition": LARK["definition"]}}
CHAT_PATCHER = {"name": "apply_patch", "description": "Patch.", "format": CHAT_LARK}
# What is asked of OpenAI by Chat, where the config wants it so.
OPENAI_ASKS: dict[str, tuple[JSON, JSON]] = {
    "effort": ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    "verbosity": ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
    "cap": ({"max_output_tokens": 99}, {"max_completion_tokens": 99, "max_tokens": None}),
    "custom tool": (
        {"tools": [PATCHER]},
        {"tools": [{"type": "custom", "custom": CHAT_PATCHER}]},
    ),
    "custom call": (
        {
            "input": [
                user("A"),
                wire.custom_call("call_1", "apply_patch", PATCH),
                {"type": "custom_tool_call_output", "call_id": "call_1", "output": "ok"},
            ],
            "tools": [PATCHER],
        },
        {"tools": [{"type": "custom", "custom": CHAT_PATCHER}]},
    ),
    "hints": (
        {"prompt_cache_key": "k", "service_tier": "flex", "metadata": {"a": "b"}},
        {"prompt_cache_key": "k", "service_tier": "flex", "metadata": {"a": "b"}},
    ),
}


@pytest.mark.parametrize("params, wanted", OPENAI_ASKS.values(), ids=OPENAI_ASKS)
def test_openai_may_be_asked_by_chat(
    ask: AskResponses, upstream: Upstream, params: JSON, wanted: JSON
) -> None:
    upstream.script(from_chat(choice("{}")))
    assert ask(model="chatty", **params).output_text == "{}"
    body = upstream.take().json
    assert {key: body.get(key) for key in wanted} == wanted


def test_all_systems_become_one_for_chat(ask: AskResponses, upstream: Upstream) -> None:
    """Many servers take but one, and only in front."""
    three = {"role": "system", "content": "Three."}
    upstream.script(from_chat(choice("Hi")))
    items = [developer("Two."), three, user("A"), developer("Four.")]
    ask(model="chat", instructions="One.", input=items)
    first, second = spelled_out(upstream.take().json)["messages"]
    said = "".join(part["text"] for part in first["content"])
    places = [said.index(word) for word in ("One.", "Two.", "Three.", "Four.")]
    assert (first["role"], places) == ("system", sorted(places))
    assert second == asked("A")


SHOWN = [input_text("Here."), input_image(GIF), input_file(filename="a.pdf", file_data=PDF)]
SEEN: list[Any] = [user("A"), RAIN, NOON, output("call_1", SHOWN), output("call_2", "noon")]


def test_what_a_tool_shows_follows_for_chat(ask: AskResponses, upstream: Upstream) -> None:
    upstream.script(from_chat(choice("Hi")))
    ask(model="chat", input=SEEN, **BOTH)
    *_, first, second, shown = spelled_out(upstream.take().json)["messages"]
    assert [(each["role"], each["tool_call_id"]) for each in (first, second)] == [
        ("tool", "call_1"),
        ("tool", "call_2"),
    ]
    assert text("Here.") in first["content"]
    kinds = [part["type"] for part in shown["content"] if part["type"] != "text"]
    assert (shown["role"], kinds) == ("user", ["image_url", "file"])


def test_what_a_tool_shows_is_claudes_result(ask: AskResponses, upstream: Upstream) -> None:
    upstream.script(from_claude(claude_text("Hi")))
    ask(model="claude", input=SEEN, **BOTH)
    first, second = upstream.take().json["messages"][-1]["content"]
    assert [each["type"] for each in first["content"]] == ["text", "image", "document"]
    assert anthropic_wire.blocks(second["content"]) == [text("noon")]


def claude_image(**source: str) -> JSON:
    return {"type": "image", "source": source}


DOCUMENT = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0x"}
CODEX_START = [developer("One."), developer("Two."), asked("A"), asked("B")]
for each in CODEX_START[2:]:
    each["content"] = [input_text(part["text"]) for part in each["content"]]
LATER = [user("A"), developer("Be brief."), user("B")]
CLAUDE_TIME = {"name": "time", "input_schema": EMPTY}
# What is asked of which model, and what Anthropic must see of it; None is what it must not see.
CLAUDE_ASKS: dict[str, tuple[str, JSON, JSON]] = {
    "system first": (
        OLD,
        {"input": CODEX_START, "instructions": "Zero."},
        {
            "system": [text("Zero."), text("One."), text("Two.")],
            "messages": [asked("A", "B")],
        },
    ),
    "system later, old model": (
        OLD,
        {"input": LATER},
        {"system": [text("Be brief.")], "messages": [asked("A", "B")]},
    ),
    "system later, new model": (
        NEW,
        {"input": LATER},
        {"messages": [asked("A", "B"), system("Be brief.")]},
    ),
    "media": (
        OLD,
        {"input": [user([*MEDIA[1:], input_file(file_url="https://a.example/b.pdf")])]},
        {
            "messages": [
                user(
                    [
                        claude_image(type="base64", media_type="image/gif", data=PIXEL),
                        claude_image(type="url", url="https://example.com/a.png"),
                        {"type": "document", "source": DOCUMENT, "title": "a.pdf"},
                        {
                            "type": "document",
                            "source": {"type": "url", "url": "https://a.example/b.pdf"},
                        },
                    ]
                )
            ]
        },
    ),
    "tools": (
        OLD,
        {**BOTH, "tool_choice": "auto"},
        {
            "tools": [
                {"name": "get_weather", "input_schema": SCHEMA, "strict": True},
                CLAUDE_TIME,
            ],
            "tool_choice": {"type": "auto"},
        },
    ),
    "more tools": (
        OLD,
        {"input": [{"type": "additional_tools", "role": "developer", "tools": [TIME]}, user("A")]},
        {"tools": [CLAUDE_TIME], "messages": [asked("A")]},
    ),
    "search": (
        OLD,
        {"tools": [{"type": "web_search", "search_context_size": "low"}]},
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    ),
    "required": (OLD, {**BOTH, "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    "none": (OLD, {**BOTH, "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    "named": (
        OLD,
        {**BOTH, "tool_choice": NAMED},
        {"tool_choice": {"type": "tool", "name": "time"}},
    ),
    "allowed": (
        OLD,
        {**BOTH, "tool_choice": ALLOWED},
        {"tools": [CLAUDE_TIME], "tool_choice": {"type": "any"}},
    ),
    "one at a time": (
        OLD,
        {**BOTH, "parallel_tool_calls": False},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    "json_schema": (
        OLD,
        {"text": {"format": FORMAT}},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    "sampling": (OLD, {"temperature": 1.6, "top_p": 0.5}, {"temperature": 1, "top_p": None}),
    "sampling, new model": (NEW, {"temperature": 0}, {"temperature": None}),
    "cap": (OLD, {"max_output_tokens": 99}, {"max_tokens": 99}),
    "user": (OLD, {"user": "u-1"}, {"metadata": {"user_id": "u-1"}}),
    "safety_identifier": (
        OLD,
        {"safety_identifier": "u-2", "metadata": {"a": "b"}},
        {"metadata": {"user_id": "u-2"}},
    ),
    "service tier": (OLD, {"service_tier": "default"}, {"service_tier": "standard_only"}),
    "effort by budget": (
        OLD,
        {"reasoning": {"effort": "medium"}, "max_output_tokens": 9000},
        {"thinking": {"type": "enabled", "budget_tokens": 4096}, "max_tokens": 9000},
    ),
    "effort": (
        NEWEST,
        {"reasoning": {"effort": "xhigh", "summary": "auto"}},
        {
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": "xhigh"},
        },
    ),
    "no effort": (
        "claude-opus-5",
        {"reasoning": {"effort": "none"}},
        {"thinking": {"type": "disabled"}},
    ),
    "no tools offered": (OLD, {"input": HISTORY, "tools": [], "tool_choice": "auto"}, {}),
}


@pytest.mark.parametrize("model, params, wanted", CLAUDE_ASKS.values(), ids=CLAUDE_ASKS)
def test_a_request_becomes_one_that_anthropic_takes(
    ask: AskResponses, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(from_claude(claude_text("{}")))
    assert ask(model=model, **params).output_text == "{}"
    body = upstream.take().json
    for message in body["messages"]:
        message["content"] = anthropic_wire.blocks(message["content"])
    body["system"] = anthropic_wire.blocks(body.get("system", ()))
    if "thinking" in wanted:  # how it is shown is settled only where a summary is asked for
        has_display = "display" in wanted["thinking"]
        kept = {key for key in body["thinking"] if key != "display" or has_display}
        body["thinking"] = {key: body["thinking"][key] for key in kept}
    assert {key: body.get(key) for key in wanted} == wanted
    assert (body["model"], bool(body.get("stream"))) == (model, ask.is_stream)


@pytest.mark.parametrize("model", TRANSLATED)
def test_the_same_request_is_the_same_bytes(
    ask: AskResponses, upstream: Upstream, model: str
) -> None:
    upstream.script(*[answer_of(model)] * 2)
    for _ in range(2):
        ask(model=model, input=HISTORY, tools=[FUNCTION, TIME, PATCHER])
    assert upstream.take().body == upstream.take().body


# ---- tool loops ----

FIRST = [thinking("Two things."), redacted(), claude_text("I look."), *CLAUDE_BERN]
SECOND = [thinking("Once more."), tool_use("call_3", "get_weather", city="Chur")]
LOOPS: dict[str, list[Answer]] = {
    "claude": [from_claude(*FIRST), from_claude(*SECOND), from_claude(claude_text("Sun."))],
    "chat": [
        from_chat(choice("I look.", *BERN)),
        from_chat(choice(None, call("call_3", "get_weather", city="Chur"))),
        from_chat(choice("Sun.")),
    ],
    "gemini": [
        from_gemini(gemini_wire.thought("Two things."), gemini_text("I look."), *GEMINI_BERN),
        from_gemini(gemini_wire.thought("Once more."), gemini_wire.call(3, "time")),
        from_gemini(gemini_text("Sun.")),
    ],
    "fast": [
        wire.answer(wire.reasoning("Two things."), wire.message("I look."), RAIN, NOON),
        wire.answer(wire.reasoning(), wire.function_call("call_3", "get_weather", city="Chur")),
        wire.answer(wire.message("Sun.")),
    ],
}


def of_type(kind: str, items: list[Any]) -> list[Any]:
    return [item for item in items if item.type == kind]


def loop(ask: AskResponses, upstream: Upstream, script: str, forgets: bool, **params: Any) -> None:
    """Run tools until the model is done; what it said goes back as the SDK gave it."""
    upstream.script(*LOOPS[script])
    items: list[Any] = [user("Where is it sunny?")]
    params |= {"include": ["reasoning.encrypted_content"], "store": False, **BOTH}
    while calls := of_type("function_call", (told := ask(input=items, **params)).output):
        items += [item for item in told.output if not forgets or item.type != "reasoning"]
        items += [output(each.call_id, each.name) for each in calls]
        items.append(user("And now?"))
    assert told.output_text == "Sun."


@pytest.mark.parametrize("model", [OLD, MIDDLE, NEWEST])
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps all", "drops reasoning"])
def test_a_tool_loop_with_claude_that_thinks(
    ask: AskResponses, upstream: Upstream, model: str, forgets: bool
) -> None:
    """The judge sees to the signatures, and that no budget is given where a thought is missing."""
    loop(ask, upstream, "claude", forgets, model=model, reasoning={"effort": "low"})
    _, second, third = (upstream.take().json["messages"] for _ in range(3))
    kept = [each["type"] for each in FIRST if each["type"] not in anthropic_wire.THINKING]
    kept = ["thinking", "redacted_thinking"] * (not forgets) + kept
    assert [each["type"] for each in second[1]["content"]] == kept
    *results, last = second[2]["content"]
    assert [each["tool_use_id"] for each in results] == ["call_1", "call_2"]
    assert last == text("And now?")
    assert third[:3] == second, "what was said is said in the same words again"


def test_a_tool_loop_with_chat(ask: AskResponses, upstream: Upstream) -> None:
    loop(ask, upstream, "chat", False, model="chat")
    _, second, third = (upstream.take().json["messages"] for _ in range(3))
    assert [each["role"] for each in second] == ["user", "assistant", "tool", "tool", "user"]
    assert [each["content"] for each in second[2:4]] == ["get_weather", "time"]
    assert third[:5] == second, "what was said is said in the same words again"


@pytest.mark.parametrize("model", ["gemini", "gemini-2.5-flash"])
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps all", "drops reasoning"])
def test_a_tool_loop_with_gemini(
    ask: AskResponses, upstream: Upstream, model: str, forgets: bool
) -> None:
    """The judge sees to the signatures, and to the ids of those that give them."""
    loop(ask, upstream, "gemini", forgets, model=model, reasoning={"effort": "low"})
    _, second, third = (upstream.take().json["contents"] for _ in range(3))
    assert third[: len(second)] == second, "what was said is said in the same words again"
    results = gemini_wire.of_kind("functionResponse", second[2])
    assert [each["response"] for each in results] == [{"output": "get_weather"}, {"output": "time"}]


def test_a_tool_loop_with_openai(ask: AskResponses, upstream: Upstream) -> None:
    """The judge sees to the reasoning, which comes back whole where it stood."""
    loop(ask, upstream, "fast", False, model="fast")
    assert len([upstream.take() for _ in range(3)]) == 3


def test_the_model_may_be_changed_in_mid_conversation(
    ask: AskResponses, upstream: Upstream
) -> None:
    """OpenAI never sees what another vendor's reasoning was wrapped in."""
    upstream.script(from_claude(*FIRST), wire.answer(wire.message("Sun.")))
    items: list[Any] = [user("Where is it sunny?")]
    told = ask(model=OLD, input=items, reasoning={"effort": "low"}, **BOTH)
    items += told.output
    items += [output("call_1", "rain"), output("call_2", "noon")]
    assert ask(model="fast", input=items, **BOTH).output_text == "Sun."
    upstream.take()
    kinds = [item.get("type") for item in upstream.take().json["input"]]
    assert "reasoning" not in kinds and kinds.count("function_call") == 2


# ---- what agents send ----

CODEX_HEAD = {
    "authorization": f"Bearer {KEY}",
    "accept": "text/event-stream",
    "originator": "codex_exec",
    "user-agent": "codex_exec/0.169.0",
    "session-id": "s1",
    "thread-id": "t1",
    "x-client-request-id": "t1",
    "x-codex-window-id": "w1",
    "x-codex-turn-metadata": '{"turn_id":"1"}',
    "x-codex-beta-features": "remote_compaction_v2",
    "x-codex-turn-state": "state-1",
}
EXEC = {"type": "function", "name": "exec_command", "parameters": SCHEMA, "strict": False}
SEARCHES = [
    {"type": "tool_search", "execution": "client", "parameters": {"type": "object"}},
    {"type": "web_search", "external_web_access": True},
]
AGENTS = {
    "type": "namespace",
    "name": "multi_agent_v1",
    "description": "Agents.",
    "tools": [EXEC, {**EXEC, "name": "spawn"}],
}
OTHERS = {**AGENTS, "name": "mcp__docs", "tools": [{**EXEC, "name": "spawn"}]}
FREEFORM = {"type": "custom", "name": "exec", "description": "Run JavaScript."}
LITE = {**AGENTS, "name": "functions", "tools": [FREEFORM]}


def codex_item(role: str, told: str, **more: Any) -> JSON:
    content = [{"type": "output_text" if role == "assistant" else "input_text", "text": told}]
    return {"type": "message", "id": f"msg_{told}", "role": role, "content": content, **more}


CODEX_INPUT = [
    codex_item("developer", "base"),
    codex_item("developer", "permissions"),
    codex_item("user", "environment"),
    codex_item("user", "task"),
]
CODEX: JSON = {
    "input": CODEX_INPUT,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "t1",
    "client_metadata": {"x-codex-installation-id": "i1", "x-codex-turn-metadata": '{"a":1}'},
    "text": {"verbosity": "low"},
}
MORE_TOOLS = {"type": "additional_tools", "id": "at_1", "role": "developer", "tools": [LITE]}
# What differs by the model's name, and the call that Codex must see of it.
CODEXES: dict[str, tuple[JSON, JSON]] = {
    "function": (
        {"tools": [EXEC, PATCHER, *SEARCHES]},
        {"type": "function_call", "name": "exec_command", "arguments": {"city": "ls"}},
    ),
    "freeform": (
        {"tools": [EXEC, PATCHER, *SEARCHES]},
        {"type": "custom_tool_call", "name": "apply_patch", "input": PATCH},
    ),
    "namespace": (
        {"tools": [EXEC, AGENTS, OTHERS, *SEARCHES]},
        {
            "type": "function_call",
            "name": "spawn",
            "namespace": "mcp__docs",
            "arguments": {"city": "ls"},
        },
    ),
    "lite": (
        {"input": [MORE_TOOLS, *CODEX_INPUT], "reasoning": {"context": "all_turns"}},
        {
            "type": "custom_tool_call",
            "name": "exec",
            "namespace": "functions",
            "input": 'await tools.exec("ls\\n")',
        },
    ),
}


def codex(gateway: Gateway, **params: Any) -> list[JSON]:
    body = {key: value for key, value in {**CODEX, **params}.items() if value != []}
    url = f"{gateway.url}/v1/responses"
    answer = httpx2.post(url, json=body, headers=CODEX_HEAD, timeout=15)
    assert answer.status_code == 200, answer.text
    return wire.read_stream(answer.content)


def offered(body: JSON) -> list[str]:
    told = [each for tool in body["tools"] for each in tool.get("functionDeclarations", [tool])]
    tools = [tool.get("function", tool) for tool in told]
    return [tool["name"] for tool in tools if "name" in tool]


def turns(body: JSON) -> list[JSON]:
    told: list[JSON] = body["contents"] if "contents" in body else body["messages"]
    return told


def calling(wanted: JSON) -> Answer:
    """Answer with a call of the one tool offered that is meant, by the name it was offered by."""

    def reply(received: Received) -> Reply:
        body = received.json
        parts = [part for part in (wanted.get("namespace"), wanted["name"]) if part]
        (name,) = (
            each for each in offered(body) if each.endswith(parts[-1]) and each.startswith(parts[0])
        )
        arguments = wanted.get("arguments") or {"input": wanted["input"]}
        if received.path == "/v1/messages":
            block = {"type": "tool_use", "id": "call_1", "name": name, "input": arguments}
            return from_claude(thinking("Hm."), block)(received)
        if "contents" in body:
            return from_gemini(gemini_wire.call(1, name, **arguments))(received)
        return from_chat(choice(None, call("call_1", name, **arguments)))(received)

    return reply


def called_names(body: JSON) -> list[str]:
    """Return the names of the calls in a history of Chat's, Anthropic's or Gemini's."""
    told = [message.get("content") or () for message in turns(body)]
    blocks = [block for content in told for block in anthropic_wire.of_type("tool_use", content)]
    parts = [part for content in turns(body) for part in content.get("parts", ())]
    blocks += [part["functionCall"] for part in parts if "functionCall" in part]
    calls = [each for message in turns(body) for each in message.get("tool_calls") or ()]
    return [each.get("function", each)["name"] for each in (*blocks, *calls)]


@pytest.mark.parametrize("params, wanted", CODEXES.values(), ids=CODEXES)
@pytest.mark.parametrize("model", ["chat", OLD, NEWEST, "gemini"])
def test_codex_runs_a_tool(
    gateway: Gateway, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(calling(wanted), answer_of(model, "Done."))
    made = codex(gateway, model=model, **params)[-1]["response"]["output"]
    got = made[-1]
    if "arguments" in got:
        got = {**got, "arguments": json.loads(got["arguments"])}
    assert {key: got.get(key) for key in wanted} == wanted
    assert got.get("namespace") == wanted.get("namespace")
    back = [{**each, "content": None} if each["type"] == "reasoning" else each for each in made]
    told = {"type": f"{got['type']}_output", "id": "fco_1", "call_id": got["call_id"]}
    items = [*params.get("input", CODEX_INPUT), *back, {**told, "output": "ok"}]
    said = codex(gateway, model=model, **{**params, "input": items})[-1]["response"]
    assert said["output"][-1]["content"][0]["text"] == "Done."
    first, second = upstream.take().json, upstream.take().json
    assert turns(second)[: len(turns(first))] == turns(first)
    assert (called_names(second)[0] in offered(first), offered(first)) == (True, offered(second))


@pytest.mark.parametrize("model", ["chat", OLD, NEWEST, "gemini"])
def test_codex_compacts(gateway: Gateway, upstream: Upstream, model: str) -> None:
    """Its history has calls, but it offers no tools and has much to say of them."""
    items = [
        *CODEX_INPUT,
        {**THOUGHT, "content": None},
        {**RAIN, "id": "fc_1"},
        {**output("call_1", [input_image(GIF)]), "id": "fco_1"},
        codex_item("assistant", "done", phase="final_answer"),
        codex_item("user", "Summarise."),
    ]
    upstream.script(answer_of(model, "All."))
    body = {**CODEX, "input": items, "parallel_tool_calls": False}
    head = CODEX_HEAD
    answer = httpx2.post(f"{gateway.url}/v1/responses", json={**body, "model": model}, headers=head)
    told = wire.read_stream(answer.content)[-1]["response"]
    assert summed_up(told) == {"text": "All."}
    assert told["usage"] == USAGES.get(model, wire.USAGE)


@pytest.mark.parametrize("params", [params for params, _ in CODEXES.values()], ids=CODEXES)
def test_codex_passes_untouched(gateway: Gateway, upstream: Upstream, params: JSON) -> None:
    """Messages have ids, which no type of the SDK's has, so the judge is not asked."""
    made = wire.stream(*wire.events(wire.response(wire.reasoning("Hm."), wire.message("Hi."))))
    reply = replace(made, headers={**made.headers, "x-codex-turn-state": "state-2"})
    upstream.script(reply, judged=False)
    sent = json.dumps({**CODEX, **params, "model": "gpt-5.5"}, ensure_ascii=False).encode()
    head = {**CODEX_HEAD, "content-type": "application/json"}
    answer = httpx2.post(f"{gateway.url}/v1/responses", content=sent, headers=head)
    assert (answer.status_code, answer.content) == (200, b"".join(reply.pieces))
    assert answer.headers["x-codex-turn-state"] == "state-2"
    received = upstream.take()
    assert received.body == sent
    kept = {key: value for key, value in head.items() if key != "authorization"}
    assert kept.items() <= {key.lower(): value for key, value in received.headers.items()}.items()


# ---- losses and refusals ----

STRICT = {"extra_headers": {"x-gateway-strict": "1"}}
HOSTED = [
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "image_generation"},
    {"type": "mcp", "server_label": "docs", "server_url": "https://a.example"},
    {"type": "tool_search", "execution": "client"},
]


@pytest.mark.parametrize("model", TRANSLATED)
def test_hosted_tools_that_are_offered_are_named(
    ask: AskResponses, upstream: Upstream, model: str
) -> None:
    upstream.script(answer_of(model))
    tools = [*HOSTED, FUNCTION]
    assert ask(model=model, tools=tools).output_text == "Hi"
    lost = ask.headers["x-gateway-lost"]
    assert all(tool["type"] in lost for tool in HOSTED), lost
    assert offered(upstream.take().json) == ["get_weather"]
    with pytest.raises(openai.BadRequestError):
        ask(model=model, tools=tools, **STRICT)


@pytest.mark.parametrize("model", TRANSLATED)
def test_hints_are_named_and_never_refused(
    ask: AskResponses, upstream: Upstream, model: str
) -> None:
    upstream.script(answer_of(model))
    hints: JSON = {"max_tool_calls": 1}  # a cap of hosted calls, which there are none of
    extra = {"client_metadata": {"a": "b"}, "context_management": [{"type": "compaction"}]}
    ask(model=model, **hints, extra_body=extra, **STRICT)
    lost = {name.strip() for name in ask.headers["x-gateway-lost"].split(",")}
    assert {*extra} <= lost


STORED_IMAGE = {"type": "input_image", "file_id": "file-1", "detail": "auto"}
EXPENSIVE = {"type": "computer_call", "id": "cu_1", "call_id": "c1", "pending_safety_checks": []}
REFUSED: dict[str, tuple[str, JSON, str]] = {
    "previous_response_id": ("previous_response_id", {"previous_response_id": "resp_1"}, "input"),
    "conversation": ("conversation", {"conversation": "conv_1"}, ""),
    "prompt": ("prompt", {"prompt": {"id": "pmpt_1"}}, ""),
    "background": ("background", {"background": True}, ""),
    "background_options": (
        "background_options",
        {"extra_body": {"background_options": {"completion_window": "2h"}}},
        "",
    ),
    "truncation": ("truncation", {"truncation": "auto"}, ""),
    "reference": ("input", {"input": [{"type": "item_reference", "id": "msg_1"}]}, "store"),
    "bare reference": ("input", {"input": [user("A"), {"id": "msg_1"}]}, "store"),
    "stored image": ("input", {"input": [user([STORED_IMAGE])]}, ""),
    "stored file": ("input", {"input": [user([input_file(file_id="file-1")])]}, ""),
    "computer": ("input", {"input": [user("A"), EXPENSIVE]}, ""),
    "compaction": (
        "input",
        {"input": [user("A"), {"type": "compaction", "encrypted_content": "x"}]},
        "",
    ),
    "output of no call": (
        "input",
        {"input": [user("A"), {"type": "function_call_output", "output": "a"}]},
        "call_id",
    ),
    "forced tool": (
        "tool_choice",
        {"tools": HOSTED[:1], "tool_choice": {"type": "file_search"}},
        "file_search",
    ),
    "unknown tool": ("tool_choice", {**BOTH, "tool_choice": {**NAMED, "name": "nobody"}}, "nobody"),
}


@pytest.mark.parametrize("param, params, word", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("model", TRANSLATED)
def test_what_would_make_the_answer_wrong_is_refused(
    ask: AskResponses, upstream: Upstream, model: str, param: str, params: JSON, word: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=word) as caught:
        ask(model=model, **params)
    assert (caught.value.param or "").startswith(param)
    assert upstream.is_idle


@pytest.mark.parametrize("model", TRANSLATED)
def test_arguments_that_are_no_json_go_where_they_are_a_string(
    ask: AskResponses, upstream: Upstream, model: str
) -> None:
    """As after a call that was cut off; the others take objects only."""
    broken = [user("A"), {**NOON, "arguments": "[1"}, output(NOON["call_id"], "No.")]
    if model == "chat":
        upstream.script(answer_of(model))
        ask(model=model, input=broken)
        (call,) = upstream.take().json["messages"][1]["tool_calls"]
        assert call["function"]["arguments"] == "[1"
        return
    with pytest.raises(openai.BadRequestError, match="JSON") as caught:
        ask(model=model, input=broken)
    assert (caught.value.param or "").startswith("input") and upstream.is_idle


def test_chat_takes_no_file_by_its_url(ask: AskResponses, upstream: Upstream) -> None:
    with pytest.raises(openai.BadRequestError, match="URL") as caught:
        ask(model="chat", input=[user([input_file(file_url="https://a.example/b.pdf")])])
    assert (caught.value.code, upstream.is_idle) == ("unsupported_parameter", True)


def test_claude_tells_no_logprobs(ask: AskResponses, upstream: Upstream) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        ask(model="claude", top_logprobs=2)
    assert upstream.is_idle


# ---- errors ----

TOO_LONG = "prompt is too long: 210000 tokens > 200000 maximum"
# What is answered, then the status, the code (None: any), and what the SDK raises.
ERRORS: list[Any] = [
    ("claude", (400, "invalid_request_error", TOO_LONG), 400, "context_length_exceeded"),
    ("claude", (403, "permission_error", "Not yours."), 403, None),
    ("claude", (404, "not_found_error", "model: x"), 404, "model_not_found"),
    ("claude", (413, "request_too_large", "Too large."), 413, None),
    ("claude", (429, "rate_limit_error", "Slow down."), 429, None),
    ("claude", (500, "api_error", "Internal server error"), 500, None),
    ("claude", (529, "overloaded_error", "Overloaded"), 503, None),
    ("chat", (400, "Too long.", "context_length_exceeded"), 400, "context_length_exceeded"),
    ("chat", (404, "No such model.", "model_not_found"), 404, "model_not_found"),
    ("chat", (429, "Pay first.", "insufficient_quota"), 429, "insufficient_quota"),
    ("chat", (500, "It broke.", None), 500, None),
    ("fast", (400, "Too long.", "context_length_exceeded"), 400, "context_length_exceeded"),
    ("fast", (429, "Pay first.", "insufficient_quota"), 429, "insufficient_quota"),
    ("fast", (500, "It broke.", None), 500, None),
]


@pytest.mark.parametrize("model, error, status, code", ERRORS)
def test_an_error_becomes_one_of_openai(
    ask: AskResponses, upstream: Upstream, model: str, error: Any, status: int, code: str | None
) -> None:
    made = anthropic_wire.error if model == "claude" else openai_wire.error
    upstream.script(made(*error, retry_after="7"))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(model=model)
    told: Any = caught.value
    assert set(told.body) == {"message", "type", "param", "code"}
    assert (told.status_code, told.code) == (status, code or told.code)
    assert error[2 if model == "claude" else 1] in told.message
    assert told.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("model", ["fast", "chat", "claude"])
def test_a_refused_upstream_key_is_a_502_tried_once(
    ask: AskResponses, upstream: Upstream, model: str
) -> None:
    ask.options["max_retries"] = 5
    told = f"invalid x-api-key {UPSTREAM_KEY}"
    error = openai_wire.error(401, told, "invalid_api_key")
    is_claude = model == "claude"
    upstream.script(
        anthropic_wire.error(401, "authentication_error", told) if is_claude else error
    )
    with pytest.raises(openai.InternalServerError) as caught:
        ask(model=model)
    response = caught.value.response
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    assert "invalid x-api-key" not in response.text
    upstream.take()
    assert upstream.is_idle


LIMITED = {"api_key": LIMITED_KEY}
OWN_ERRORS: dict[str, tuple[JSON, JSON, int, str | None]] = {
    "no input": ({}, {"extra_body": {"input": None}, "model": "chat"}, 400, None),
    "input of no items": ({}, {"input": [1], "model": "chat"}, 400, None),
    "no model": ({}, {"model": ""}, 400, None),
    "unknown key": ({"api_key": "vk-nobody-has-this-key"}, {}, 401, "invalid_api_key"),
    "not allowed": (LIMITED, {}, 403, None),
    "unknown model": ({}, {"model": "x"}, 404, "model_not_found"),
}


@pytest.mark.parametrize("options, params, status, code", OWN_ERRORS.values(), ids=OWN_ERRORS)
def test_an_error_of_the_gateway_has_openais_shape(
    ask: AskResponses,
    upstream: Upstream,
    options: JSON,
    params: JSON,
    status: int,
    code: str | None,
) -> None:
    ask.options.update(options)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(**params)
    error: Any = caught.value
    assert set(error.body) == {"message", "type", "param", "code"}
    assert (error.status_code, error.code) == (status, code or error.code)
    assert upstream.is_idle


# ---- streams that go wrong ----


@pytest.mark.parametrize("kind, status", anthropic_wire.FIRST_ERRORS)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_event_is_a_real_status(
    ask: AskResponses, upstream: Upstream, kind: str, status: int
) -> None:
    upstream.script(anthropic_wire.stream(anthropic_wire.error_event(kind, "Not now.")))
    with pytest.raises(openai.APIStatusError, match="Not now.") as caught:
        ask(model="claude")
    assert caught.value.status_code == status


def claude_begun(*more: JSON, end: str = "whole") -> Reply:
    whole = anthropic_wire.message(thinking("Hm."), claude_text("Hello, and so on."))
    return anthropic_wire.stream(*anthropic_wire.events(whole)[:10], *more, end=end)


def chat_begun(*more: JSON, end: str = "whole") -> Reply:
    whole = openai_wire.completion(choice("Hello, and so on."))
    return openai_wire.stream(*openai_wire.chunks(whole, True)[:3], *more, end=end)


def gemini_begun(*more: JSON, end: str = "whole") -> Reply:
    whole = gemini_wire.response(gemini_text("Hello, and so on."))
    return gemini_wire.stream(*gemini_wire.chunks(whole)[:2], *more, end=end)


OVERLOADED = anthropic_wire.error_event("overloaded_error", "Overloaded")
LIMIT = anthropic_wire.error_event("rate_limit_error", "Slow down.")
CHAT_LIMIT = {"error": {"message": "Slow down.", "type": "rate_limit_error", "code": None}}
BUSY = gemini_wire.error_body(429, "RESOURCE_EXHAUSTED", "Slow down.")
# How a stream goes wrong after its 200; the status that it would have had; code and word of it.
ENDS: dict[str, tuple[str, Reply, int, str, str]] = {
    "claude, cut": ("claude", claude_begun(end="cut"), 502, "server_error", ""),
    "claude, too early": ("claude", claude_begun(), 502, "server_error", ""),
    "claude, overloaded": ("claude", claude_begun(OVERLOADED), 503, "server_error", "Overloaded"),
    "claude, limit": ("claude", claude_begun(LIMIT), 429, "rate_limit_exceeded", "Slow down."),
    "chat, cut": ("chat", chat_begun(end="cut"), 502, "server_error", ""),
    "chat, too early": ("chat", chat_begun(), 502, "server_error", ""),
    "gemini, cut": ("gemini", gemini_begun(end="cut"), 502, "server_error", ""),
    "gemini, too early": ("gemini", gemini_begun(), 502, "server_error", ""),
    "gemini, limit": ("gemini", gemini_begun(BUSY), 429, "rate_limit_exceeded", "Slow down."),
    "chat, limit": ("chat", chat_begun(CHAT_LIMIT), 429, "rate_limit_exceeded", "Slow down."),
}


@pytest.mark.parametrize("model, reply, status, code, word", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_ends_in_response_failed(
    gateway: Gateway,
    upstream: Upstream,
    model: str,
    reply: Reply,
    status: int,
    code: str,
    word: str,
) -> None:
    grown = gateway.counting()
    upstream.script(reply)
    told = stream_of(gateway, model=model)
    failure = told[-1]["response"]["error"]
    assert (told[-1]["type"], failure["code"]) == ("response.failed", code)
    assert word in failure["message"]
    assert "delta" in "".join(event["type"] for event in told), "what came before it is passed on"
    gateway.logged(status=status, model=model)
    provider = {"chat": "local", "claude": "anthropic"}.get(model, model)
    assert grown("llm_provider_errors_total", provider=provider) == 1


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("model, reply", [end[:2] for end in ENDS.values()], ids=ENDS)
def test_the_sdk_reads_a_stream_that_breaks(
    ask: AskResponses, upstream: Upstream, model: str, reply: Reply
) -> None:
    upstream.script(reply)
    told = ask(model=model)
    assert (told.status, bool(told.error.message)) == ("failed", True)


WHOLE = wire.events(wire.response(wire.reasoning("Hm."), wire.message("Hello, and so on.")))
ERROR = {**wire.error_event("server_error", "It broke."), "sequence_number": 12}
FAILED = wire.events(wire.failed("rate_limit_exceeded", "Slow down."))[-1]
# How a passed stream goes wrong after its 200, and the status that it would have had.
PASSED_ENDS: dict[str, tuple[Reply, int]] = {
    "cut": (wire.stream(*WHOLE[:12], end="cut"), 502),
    "too early": (wire.stream(*WHOLE[:-1]), 502),
    "failed": (wire.stream(*WHOLE[:12], {**FAILED, "sequence_number": 12}), 429),
    "error and failed": (wire.stream(*WHOLE[:12], ERROR, {**FAILED, "sequence_number": 13}), 429),
    "error": (wire.stream(*WHOLE[:12], ERROR), 500),
}


@pytest.mark.parametrize("reply, status", PASSED_ENDS.values(), ids=PASSED_ENDS)
def test_a_passed_stream_that_breaks_ends_in_response_failed(
    client: OpenAI, gateway: Gateway, upstream: Upstream, reply: Reply, status: int
) -> None:
    """What the upstream said of it passes; where it said nothing, the gateway does."""
    upstream.script(reply)
    create = client.responses.with_streaming_response.create
    with create(model="fast", input="Hello", stream=True) as answer:
        got = answer.read()
    passed = b"".join(reply.pieces)
    assert got.startswith(passed)
    added = [each for each in got.removeprefix(passed).split(b"\n\n") if each]
    for frame in added:
        event = json.loads(frame.rpartition(b"data: ")[2])
        wire.read_event(event)
        assert event["type"] == "response.failed" and event["sequence_number"] >= 12
    assert len(added) == (b"response.failed" not in passed)
    gateway.logged(request_id=answer.headers["x-gateway-id"], status=status)


@pytest.mark.parametrize("model", ["fast", *TRANSLATED])
def test_a_client_that_leaves_takes_the_upstream_with_it(
    client: OpenAI, gateway: Gateway, upstream: Upstream, model: str
) -> None:
    replies = {
        "fast": wire.stream(*WHOLE[:12], end="stall"),
        "chat": chat_begun(end="stall"),
        "claude": claude_begun(end="stall"),
        "gemini": gemini_begun(end="stall"),
    }
    upstream.script(replies[model])
    stream = client.responses.create(model=model, input="Hi", stream=True)
    while not next(stream).type.endswith("delta"):
        pass
    stream.close()
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    request_id = stream.response.headers["x-gateway-id"]
    line = gateway.logged(request_id=request_id, status=499, usage="estimated")
    assert 0 < line["completion_tokens"] < 50, "what was seen of the answer, and no more"


@pytest.mark.parametrize("model", TRANSLATED)
def test_a_late_upstream_is_a_504(launch: Launch, upstream: Upstream, model: str) -> None:
    gateway = launch(timeouts={"first_token": 0.2, "total": 0.2})
    upstream.script(Reply([], end="mute"))
    with pytest.raises(openai.InternalServerError) as caught:
        AskResponses(gateway, "sync stream")(model=model)
    assert caught.value.status_code == 504
    assert upstream.take().left.wait(1)


# ---- the judge ----

TAKEN = {"model": "gpt-5.2", "input": HISTORY[:1], "tools": [FUNCTION, PATCHER], "store": False}
PARTLY = {**FUNCTION, "parameters": {**SCHEMA, "required": []}}
LIKE_GIVEN = wire.response(wire.reasoning("Hm."), NOON)["output"]
JUDGED: dict[str, JSON] = {
    "unknown field": {"stop": ["a"]},
    "unknown field deep down": {"input": [{**user("A"), "x": 1}]},
    "number as text": {"max_output_tokens": "99"},
    "cap": {"max_output_tokens": 15},
    "effort": {"reasoning": {"effort": "max"}},
    "effort, old model": {"model": "gpt-4.1", "reasoning": {"effort": "low"}},
    "sampling": {"model": "gpt-5.5", "temperature": 0.5},
    "sampling while reasoning": {"top_p": 0.5, "reasoning": {"effort": "low"}},
    "no output": {"input": [user("A"), NOON]},
    "output of nothing": {"input": [user("A"), output("call_2", "a")]},
    "output of another kind": {
        "input": [wire.custom_call("call_2", "f", "x"), output("call_2", "a")]
    },
    "long id": {"input": [{**NOON, "call_id": "c" * 65}, output("c" * 65, "a")]},
    "name": {"tools": [{**TIME, "name": "a.b"}]},
    "tool twice": {"tools": [TIME, TIME]},
    "loose schema": {"tools": [PARTLY]},
    "loose format": {"text": {"format": {**FORMAT, "schema": {"type": "object"}}}},
    "unknown choice": {"tool_choice": NAMED},
    "id of another": {"input": [{**NOON, "id": "call_2"}, output("call_2", "a")]},
    "forged reasoning": {"input": [{**THOUGHT}, NOON, output("call_2", "a")]},
    "reasoning out of place": {"input": [LIKE_GIVEN[0], user("A")]},
    "reasoning in part": {
        "input": [{**LIKE_GIVEN[0], "summary": []}, NOON, output("call_2", "a")]
    },
    "said as asked": {"input": [{"role": "assistant", "content": [input_text("a")]}]},
    "no file name": {"input": [user([input_file(file_data=PDF)])]},
}


@pytest.mark.parametrize("change", JUDGED.values(), ids=JUDGED)
def test_the_judge_refuses(change: JSON) -> None:
    assert list(wire.judge_body(TAKEN)) == []
    given = {**TAKEN, "input": [*LIKE_GIVEN, output("call_2", "noon")]}
    assert list(wire.judge_body(given)) == []
    complaints = list(wire.judge_body({**TAKEN, **change}))
    assert complaints and len(complaints) <= 2, complaints


BROKEN_STREAMS: dict[str, Callable[[list[JSON]], list[JSON]]] = {
    "no end": lambda told: told[:-1],
    "no beginning": lambda told: wire.numbered(*told[1:]),
    "a number left out": lambda told: [*told[:5], *told[6:]],
    "an event left out": lambda told: wire.numbered(*told[:-3], *told[-2:]),
    "a delta left out": lambda told: wire.numbered(
        *told[:11], *(each for each in told[11:] if "delta" not in each)
    ),
    "an unknown code": lambda told: wire.numbered(
        *told[:2], *wire.events(wire.failed("server_error", "x"))[-1:], {"type": "error"}
    ),
}


@pytest.mark.parametrize("break_it", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS)
def test_the_reader_of_streams_refuses(break_it: Callable[[list[JSON]], list[JSON]]) -> None:
    def spelled(told: list[JSON]) -> bytes:
        return b"".join(sse_reply(told, "whole", named=True).pieces)

    assert wire.read_stream(spelled(WHOLE)) == WHOLE
    with pytest.raises((AssertionError, ValueError)):
        wire.read_stream(spelled(break_it(WHOLE)))
