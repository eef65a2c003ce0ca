"""The openai and the anthropic SDK through the gateway to a Gemini upstream: nothing lost, nothing
invented, and every signature back where it was given.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import anthropic_wire
import gemini_wire as wire
import httpx2
import openai
import pytest
from anthropic import Anthropic
from drive import KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway
from gemini_wire import call, thought
from openai import OpenAI
from openai_wire import PICTURE, PIXEL, SCHEMA, WEATHER, told_call, user
from openai_wire import text as part
from pydantic import BaseModel, Field
from test_anthropic_upstream import (
    ALLOWED,
    AUDIO,
    BOTH,
    BROKEN,
    FILES,
    FORMAT,
    HISTORY,
    LATER,
    PROLOGUE,
    STORED,
    STRICT,
    TIME,
    effort,
    summed_up,
    system,
)
from test_messages import CLAUDE_CODE, CLAUDE_CODE_HEAD, AskClaude
from upstream import JSON, MAX_WAIT, Received, Upstream

OLD, OLD_LITE, OLD_PRO = "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-2.5-pro"
MIDDLE, MIDDLE_PRO = "gemini-3.5-flash", "gemini-3.1-pro-preview"
NEW, CLAUDE = "gemini-3.8-flash", "claude-haiku-4-5"


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Stand in for the other suites' gateway. This kind knows its version; the URL has none."""
    provider: JSON = {"api_key": UPSTREAM_KEY, "base_url": upstream.url}
    config: JSON = {
        "providers": {"gemini": provider, "anthropic": provider},
        "models": {"fast": {"provider": "gemini", "model": NEW}},
        "routing": [
            {"prefix": "gemini-", "provider": "gemini"},
            {"prefix": "claude-", "provider": "anthropic"},
        ],
        "api_keys": [{"key": KEY, "app": "interop", "allowed_models": ["*"]}],
    }
    process = Gateway(config, tmp_path_factory.mktemp("gateway"))
    yield process
    process.stop()


@pytest.fixture(params=MANNERS)
def claude(request: pytest.FixtureRequest, gateway: Gateway) -> AskClaude:
    ask = AskClaude(gateway, request.param)
    ask.options["timeout"] = MAX_WAIT  # without one the SDK streams where much may be told
    return ask


@pytest.fixture(params=MANNERS)
def both(request: pytest.FixtureRequest, gateway: Gateway) -> tuple[Ask, AskClaude]:
    """Return the two SDKs in the same manner."""
    return Ask(gateway, request.param), AskClaude(gateway, request.param)


@pytest.fixture
def claude_client(gateway: Gateway) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as made:
        yield made


# ---- what goes up ----


def turn(*told: JSON) -> JSON:
    return {"role": "user", "parts": list(told)}


def asked(text: str) -> JSON:
    return turn(wire.text(text))


def inline(mime_type: str, data: str) -> JSON:
    return {"inlineData": {"mimeType": mime_type, "data": data}}


def linked(mime_type: str, uri: str) -> JSON:
    return {"fileData": {"mimeType": mime_type, "fileUri": uri}}


def mode(name: str, *allowed: str) -> JSON:
    config = {"mode": name, "allowedFunctionNames": list(allowed)} if allowed else {"mode": name}
    return {"toolConfig": {"functionCallingConfig": config}}


def offered(*declared: JSON) -> JSON:
    return {"tools": [{"functionDeclarations": list(declared)}]}


def thinks(**config: Any) -> JSON:
    return {"thinkingConfig": {"includeThoughts": True, **config}}


def checked(body: JSON, wanted: JSON) -> None:
    """Compare what is wanted of a body; None is what it must not have."""
    flat: JSON = {**body, **body.get("generationConfig", {})}
    if not flat.get("thinkingConfig", {}).get("includeThoughts", True):
        del flat["thinkingConfig"]["includeThoughts"]
    assert {key: flat.get(key) for key in wanted} == wanted


GEMINI_TIME: JSON = {"name": "time"}
GEMINI_WEATHER: JSON = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "parametersJsonSchema": SCHEMA,
}
ODD_SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"const": "a"},
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]", "maxLength": 9},
        "items": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}},
    },
    "required": ["kind"],
    "$schema": "http://json-schema.org/draft-07/schema#",
}
CLEAN_SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a"]},
        "name": {
            "type": "string",
            "description": '(minLength: 1, pattern: "^[A-Z]", maxLength: 9)',
        },
        "items": {
            "type": "array",
            "items": {"type": "number", "description": "(exclusiveMinimum: 0)"},
        },
    },
    "required": ["kind"],
}
A_TXT = "a.txt\n\nHello"  # its title has no other place
JSON_MODE = {"responseMimeType": "application/json"}
PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": -0.5}
BARE_IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/picture"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "mp3"}}


def formatted(schema: JSON) -> JSON:
    described = {"name": "place", "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


# What is asked of which model by Chat Completions, and what Gemini must see of it.
ASKS: dict[str, tuple[str, JSON, JSON]] = {
    "system first": (
        NEW,
        {"messages": [*PROLOGUE, user([part(""), part("Hi")]), user("")]},
        {
            "systemInstruction": {"parts": [wire.text("One."), wire.text("Two.")]},
            "contents": [asked("Hi")],
        },
    ),
    "system later": (
        NEW,
        {"messages": [system("Be kind."), *LATER]},
        {
            "systemInstruction": {"parts": [wire.text("Be kind."), wire.text("Be brief.")]},
            "contents": [turn(wire.text("A"), wire.text("B"))],
        },
    ),
    "empty answer": (
        NEW,
        {"messages": [user("A"), {"role": "assistant", "content": ""}, user("B")]},
        {"contents": [turn(wire.text("A"), wire.text("B"))], "systemInstruction": None},
    ),
    "images": (
        NEW,
        {"messages": [user([*PICTURE, BARE_IMAGE])]},
        {
            "contents": [
                turn(
                    wire.text("What is this?"),
                    inline("image/gif", PIXEL),
                    linked("image/png", "https://example.com/a.png"),
                    linked("image/jpeg", "https://example.com/picture"),
                )
            ]
        },
    ),
    "files": (
        NEW,
        {"messages": [user(FILES)]},
        {"contents": [turn(inline("application/pdf", "JVBERi0x"), wire.text(A_TXT))]},
    ),
    "audio": (
        NEW,
        {"messages": [user([AUDIO, SOUND])]},
        {"contents": [turn(inline("audio/wav", "UklGRg=="), inline("audio/mpeg", "UklGRg=="))]},
    ),
    "tools": (
        NEW,
        {**BOTH, "tool_choice": "auto"},
        {**offered(GEMINI_WEATHER, GEMINI_TIME), **mode("AUTO")},
    ),
    "tools by themselves": (OLD, BOTH, {**offered(GEMINI_WEATHER, GEMINI_TIME)}),
    "required": (NEW, {**BOTH, "tool_choice": "required"}, mode("ANY")),
    "none": (NEW, {**BOTH, "tool_choice": "none"}, mode("NONE")),
    "named": (NEW, {**BOTH, "tool_choice": TIME}, mode("ANY", "time")),
    "allowed tools": (
        NEW,
        {**BOTH, "tool_choice": ALLOWED},
        mode("ANY", "time"),
    ),
    "allowed tools, auto": (
        NEW,
        {
            **BOTH,
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [TIME]},
            },
        },
        offered(GEMINI_TIME),
    ),
    "search": (NEW, {"web_search_options": {}}, {"tools": [{"googleSearch": {}}]}),
    "json_schema": (
        OLD,
        {"response_format": FORMAT},
        {**JSON_MODE, "responseJsonSchema": SCHEMA, "responseSchema": None},
    ),
    "odd schema": (NEW, formatted(ODD_SCHEMA), {"responseJsonSchema": CLEAN_SCHEMA}),
    "json_object": (
        NEW,
        {"response_format": {"type": "json_object"}},
        {**JSON_MODE, "responseJsonSchema": None},
    ),
    "text format": (NEW, {"response_format": {"type": "text"}}, {"responseMimeType": None}),
    "sampling": (
        OLD,
        {"temperature": 1.6, "top_p": 0.5, "seed": 7, **PENALTIES},
        {
            **{"temperature": 1.6, "topP": 0.5, "seed": 7},
            **{"frequencyPenalty": 0.5, "presencePenalty": -0.5},
        },
    ),
    "sampling, new model": (
        NEW,
        {"temperature": 0.2, "seed": 7, **PENALTIES},
        {"temperature": 0.2, "seed": 7, "frequencyPenalty": None, "presencePenalty": None},
    ),
    "stop": (NEW, {"stop": "END"}, {"stopSequences": ["END"]}),
    "stop list": (NEW, {"stop": ["\n", "END"]}, {"stopSequences": ["\n", "END"]}),
    "logprobs": (
        OLD,
        {"logprobs": True, "top_logprobs": 3},
        {"responseLogprobs": True, "logprobs": 3},
    ),
    "one": (NEW, {"n": 1}, {"candidateCount": None}),
    "cap": (NEW, {"max_tokens": 9, "max_completion_tokens": 7}, {"maxOutputTokens": 7}),
    "no cap": (NEW, {}, {"generationConfig": None, "tools": None, "toolConfig": None}),
    "default tier": (NEW, {"service_tier": "default"}, {"serviceTier": "standard"}),
    "flex": (NEW, {"service_tier": "flex"}, {"serviceTier": "flex"}),
    "any tier": (NEW, {"service_tier": "auto"}, {"serviceTier": None}),
    "hints": (
        NEW,
        {**BOTH, "user": "u", "store": True, "metadata": {}, "parallel_tool_calls": False},
        {"store": None, "labels": None, "toolConfig": None},
    ),
    "no effort, 2.5": (OLD, effort("none"), {"thinkingConfig": {"thinkingBudget": 0}}),
    "no effort, 2.5 lite": (OLD_LITE, effort("none"), {"thinkingConfig": {"thinkingBudget": 0}}),
    "no effort, 2.5 pro": (OLD_PRO, effort("none"), {"thinkingConfig": {"thinkingBudget": 128}}),
    "minimal, 2.5": (OLD, effort("minimal"), thinks(thinkingBudget=512)),
    "low, 2.5": (OLD_PRO, effort("low"), thinks(thinkingBudget=1024)),
    "medium, 2.5": (OLD_LITE, effort("medium"), thinks(thinkingBudget=8192)),
    "high, 2.5": (OLD, effort("high"), thinks(thinkingBudget=24576)),
    "xhigh, 2.5": (OLD_PRO, effort("xhigh"), thinks(thinkingBudget=24576)),
    "no effort, 3.5": (MIDDLE, effort("none"), {"thinkingConfig": {"thinkingLevel": "MINIMAL"}}),
    "minimal, 3.5": (MIDDLE, effort("minimal"), thinks(thinkingLevel="MINIMAL")),
    "minimal, 3.1 pro": (MIDDLE_PRO, effort("minimal"), thinks(thinkingLevel="LOW")),
    "no effort, 3.8": (NEW, effort("none"), {"thinkingConfig": {"thinkingLevel": "LOW"}}),
    "minimal, 3.8": (NEW, effort("minimal"), thinks(thinkingLevel="LOW")),
    "low, 3.8": (NEW, effort("low"), thinks(thinkingLevel="LOW")),
    "medium, 4": ("gemini-4-argon", effort("medium"), thinks(thinkingLevel="MEDIUM")),
    "xhigh, 3.8": (NEW, effort("xhigh"), thinks(thinkingLevel="HIGH")),
    "absent effort": (NEW, {}, {"thinkingConfig": None}),
}


@pytest.mark.parametrize("model, params, wanted", ASKS.values(), ids=ASKS)
def test_a_chat_becomes_a_request_that_gemini_takes(
    ask: Ask, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(wire.answer(wire.text("Hello!")))
    assert ask(model=model, **params).choices[0].message.content == "Hello!"
    check_path(received := upstream.take(), model, ask.is_stream)
    checked(received.json, wanted)


def check_path(received: Received, model: str, is_stream: bool) -> None:
    method = "streamGenerateContent" if is_stream else "generateContent"
    assert received.path == f"/v1beta/models/{model}:{method}"


def said(*content: Any) -> JSON:
    return {"role": "assistant", "content": list(content)}


def tool_use(name: str = "get_weather", call_id: str = "t1", **arguments: Any) -> JSON:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(content: Any, call_id: str = "t1", **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def source(kind: str, **where: str) -> JSON:
    return {"type": kind, "source": where}


def returned(name: str, parts: list[JSON] | None = None, **response: Any) -> JSON:
    told = {"name": name, "id": "t1", "response": response}
    return {"functionResponse": {**told, "parts": parts} if parts else told}


def budget(tokens: int, **more: Any) -> JSON:
    return {"thinking": {"type": "enabled", "budget_tokens": tokens, **more}, "max_tokens": 32000}


PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0x"}
GIF = source("image", type="base64", media_type="image/gif", data=PIXEL)
TOOLS: JSON = {
    "tools": [
        {"name": "get_weather", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
        {"name": "time", "input_schema": {"type": "object", "properties": {}}},
    ]
}
DECLARED = offered({"name": "get_weather", "parametersJsonSchema": SCHEMA}, GEMINI_TIME)
CALLED = [user("Hi"), said(tool_use(city="Bern"))]
PLACED = {"thoughtSignature": wire.PLACEHOLDER}
CALL: JSON = {"functionCall": {"name": "get_weather", "args": {"city": "Bern"}, "id": "t1"}}


AFTER = [turn(returned("get_weather", output="rain")), asked("Go on.")]


def looped(*told: JSON) -> JSON:
    return {"contents": [asked("Hi"), {"role": "model", "parts": [{**CALL, **PLACED}]}, *told]}


def output(**config: Any) -> JSON:
    return {"output_config": config}


ADAPTIVE = {"thinking": {"type": "adaptive"}}
# The same by Messages.
CLAUDE_ASKS: dict[str, tuple[str, JSON, JSON]] = {
    "system": (
        NEW,
        {"system": [part("One."), part("Two.")]},
        {"systemInstruction": {"parts": [wire.text("One."), wire.text("Two.")]}},
    ),
    "media": (
        NEW,
        {
            "messages": [
                user(
                    [
                        GIF,
                        source("image", type="url", url="https://example.com/a.webp"),
                        source("document", type="url", url="https://example.com/a.pdf"),
                        {"type": "document", "source": PDF},
                        source("document", type="text", media_type="text/plain", data="Hello"),
                        part("What?"),
                    ]
                )
            ]
        },
        {
            "contents": [
                turn(
                    inline("image/gif", PIXEL),
                    linked("image/webp", "https://example.com/a.webp"),
                    linked("application/pdf", "https://example.com/a.pdf"),
                    inline("application/pdf", "JVBERi0x"),
                    wire.text("Hello"),
                    wire.text("What?"),
                )
            ]
        },
    ),
    "tools": (NEW, {**TOOLS, "tool_choice": {"type": "auto"}}, {**DECLARED, **mode("AUTO")}),
    "any": (NEW, {**TOOLS, "tool_choice": {"type": "any"}}, mode("ANY")),
    "tool": (
        NEW,
        {
            **TOOLS,
            "tool_choice": {"type": "tool", "name": "time", "disable_parallel_tool_use": True},
        },
        mode("ANY", "time"),
    ),
    "none": (NEW, {**TOOLS, "tool_choice": {"type": "none"}}, mode("NONE")),
    "result": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([result("rain")])]},
        looped(turn(returned("get_weather", output="rain"))),
    ),
    "result that is JSON": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([result('{"$ref": 1}')])]},
        looped(turn(returned("get_weather", output='{"$ref": 1}'))),
    ),
    "error": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([result("No.", is_error=True)])]},
        looped(turn(returned("get_weather", error="No."))),
    ),
    "empty result": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([{"type": "tool_result", "tool_use_id": "t1"}])]},
        looped(turn(returned("get_weather", output=""))),
    ),
    "picture in a result": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([result([part("See."), GIF])])]},
        looped(turn(returned("get_weather", [inline("image/gif", PIXEL)], output="See."))),
    ),
    "result and text": (
        NEW,
        {**TOOLS, "messages": [*CALLED, user([result("rain"), part("Go on.")])]},
        {"contents": [asked("Hi"), {"role": "model", "parts": [CALL]}, *AFTER]},
    ),
    "sampling": (
        OLD,
        {"temperature": 0.5, "top_p": 0.5, "top_k": 40, "stop_sequences": ["a", "b"]},
        {"temperature": 0.5, "topP": 0.5, "topK": 40, "stopSequences": ["a", "b"]},
    ),
    "cap": (NEW, {"max_tokens": 7}, {"maxOutputTokens": 7}),
    "no thinking asked": (NEW, {}, {"thinkingConfig": None}),
    "budget, 2.5": (OLD, budget(3000), thinks(thinkingBudget=3000)),
    "budget over the range, 2.5": (OLD, budget(30000), thinks(thinkingBudget=24576)),
    "budget, 2.5 pro": (OLD_PRO, budget(30000), thinks(thinkingBudget=30000)),
    "little, 3.8": (NEW, budget(3000), thinks(thinkingLevel="LOW")),
    "more, 3.8": (NEW, budget(9000), thinks(thinkingLevel="MEDIUM")),
    "much, 3.8": (NEW, budget(16384), thinks(thinkingLevel="HIGH")),
    "omitted": (
        NEW,
        budget(9000, display="omitted"),
        {"thinkingConfig": {"thinkingLevel": "MEDIUM"}},
    ),
    "adaptive": (
        NEW,
        {**ADAPTIVE, **output(effort="medium")},
        thinks(thinkingLevel="MEDIUM"),
    ),
    "adaptive, 2.5": (OLD, {**ADAPTIVE, **output(effort="low")}, thinks(thinkingBudget=1024)),
    "disabled": (
        NEW,
        {"thinking": {"type": "disabled"}},
        {"thinkingConfig": {"thinkingLevel": "LOW"}},
    ),
    "disabled, 2.5": (
        OLD,
        {"thinking": {"type": "disabled"}},
        {"thinkingConfig": {"thinkingBudget": 0}},
    ),
    "format": (
        NEW,
        output(format={"type": "json_schema", "schema": SCHEMA}),
        {**JSON_MODE, "responseJsonSchema": SCHEMA},
    ),
    "hints": (
        NEW,
        {"metadata": {"user_id": "u-1"}, "service_tier": "auto"},
        {"labels": None, "serviceTier": None},
    ),
}


@pytest.mark.parametrize("model, params, wanted", CLAUDE_ASKS.values(), ids=CLAUDE_ASKS)
def test_a_message_becomes_a_request_that_gemini_takes(
    claude: AskClaude, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(wire.answer(wire.text("Hello!")))
    if {"temperature"} & params.keys():  # the SDK's types left them out, not so its clients
        params = {"extra_body": params}
    assert claude(model=model, **params).content[0].text == "Hello!"
    check_path(received := upstream.take(), model, claude.is_stream)
    checked(received.json, wanted)


@pytest.mark.parametrize("model", [OLD, NEW])
def test_an_agents_history_is_put_in_order(ask: Ask, upstream: Upstream, model: str) -> None:
    """It has ids of another vendor, results in disorder, a deprecated call, and offers no tools."""
    upstream.script(*[wire.answer(wire.text("Rain."))] * 2)
    ask(model=model, messages=HISTORY, user="u-1")
    ask(model=model, messages=HISTORY, user="u-1")
    first, second = upstream.take(), upstream.take()
    assert first.body == second.body, "the same request is the same bytes"
    contents = first.json["contents"]
    roles = [content["role"] for content in contents]
    assert roles == ["user", "model", "user", "user", "model", "user"]
    results = [wire.of_kind("functionResponse", content) for content in contents]
    assert all(("id" in each) is (model == NEW) for turn in results for each in turn)
    told = [[(each["name"], each["response"]["output"]) for each in turn] for turn in results]
    assert told[2] == [("get_weather", "rain"), ("time", "noon")]
    assert told[5] == [("time", "one")]


def test_a_tool_whose_name_gemini_forbids_is_renamed(ask: Ask, upstream: Upstream) -> None:
    tool: JSON = {"type": "function", "function": {"name": "3d_print"}}
    upstream.script(wire.answer(call(1, "_3d_print")), wire.answer(wire.text("Done.")))
    params: JSON = {"tools": [tool], "tool_choice": tool}
    message = ask(**params).choices[0].message
    (called,) = message.tool_calls
    assert called.function.name == "3d_print"
    body = upstream.take().json
    assert body["toolConfig"]["functionCallingConfig"]["allowedFunctionNames"] == ["_3d_print"]
    results = [{"role": "tool", "tool_call_id": called.id, "content": "ok"}]
    ask(**params, messages=[user("Print."), message, *results])
    assert upstream.take().json["contents"][1]["parts"][0]["functionCall"]["name"] == "_3d_print"


def test_claude_code_is_understood(gateway: Gateway, upstream: Upstream) -> None:
    """Its bill is nobody's, what it defers is offered, and its old thoughts stay with Anthropic."""
    upstream.script(wire.answer(thought("Hm."), wire.text("Hi.")))
    url = f"{gateway.url}/v1/messages?beta=true"
    answer = httpx2.post(url, json={**CLAUDE_CODE, "model": "fast"}, headers=CLAUDE_CODE_HEAD)
    assert answer.status_code == 200 and b"event: message_stop" in answer.content, answer.text
    body = upstream.take().json
    spelled = json.dumps(body)
    assert "x-anthropic-billing-header" not in spelled and "Search." not in spelled
    assert "# Environment" in spelled and "# Skills" in spelled
    declared = [each["name"] for each in body["tools"][0]["functionDeclarations"]]
    assert {"Bash", "ToolSearch", "CronList"} <= set(declared)
    found = [
        each["response"]["output"]
        for content in body["contents"]
        for each in wire.of_kind("functionResponse", content)
    ]
    assert "CronList" in found[0] and found[1] == "none"


class Place(BaseModel):
    """Somewhere, in a schema with much that Gemini's structured output does not take."""

    name: str = Field(min_length=1, pattern="^[A-Z]")
    heights: list[int] = Field(min_length=2)
    inside: Place | None = None


@pytest.mark.parametrize("model", [OLD, NEW])
def test_parse_reads_structured_output(ask: Ask, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871], inside=Place(name="Alps", heights=[1, 2]))
    upstream.script(wire.answer(wire.text(place.model_dump_json())))
    assert ask(model=model, response_format=Place).choices[0].message.parsed == place
    schema = upstream.take().json["generationConfig"]["responseJsonSchema"]
    assert schema["properties"]["heights"]["minItems"] == 2, "what Gemini takes is kept"


def test_only_what_gemini_understands_is_sent(client: OpenAI, upstream: Upstream) -> None:
    kept = {"idempotency-key": "i1", "traceparent": "00-0af7-b7ad-01"}
    head = {**kept, "openai-beta": "x", "anthropic-version": "2023-06-01"}
    upstream.script(wire.answer(wire.text("Hi")))
    client.chat.completions.create(model="fast", messages=[user("Hi")], extra_headers=head)
    got = upstream.take().headers
    assert {name: got[name] for name in kept} == kept
    foreign = ("openai-", "anthropic-", "x-stainless-")
    assert not [name for name in got if name.lower().startswith(foreign)]


# ---- what comes down ----

BERN = call(1, "get_weather", city="Bern"), call(2, "time")
ODD_TEXT = 'you 😀\u2028!\x1f" data: {}\n\n'
CODE = [
    {"executableCode": {"language": "PYTHON", "code": "print(1)"}},
    {"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "1"}},
]
CALLS = [("given-1", "get_weather", '{"city":"Bern"}'), ("given-2", "time", "{}")]
CITED = wire.grounding((0, len("Zürich 😀".encode()), "a:"), (13, 15, "b:"))


def content(*blocks: Any) -> JSON:
    return {"content": list(blocks)}


# What Gemini says, and what of it OpenAI's message has, and Anthropic's.
ANSWERS: dict[str, tuple[list[JSON], JSON, JSON, JSON]] = {
    "text": (
        [wire.text("Hello, "), wire.text(ODD_TEXT)],
        {},
        {"content": f"Hello, {ODD_TEXT}", "finish": "stop"},
        content(f"Hello, {ODD_TEXT}"),
    ),
    "signed text": (
        [wire.signed(wire.text("Hello."))],
        {},
        {"content": "Hello.", "finish": "stop"},
        content("Hello."),
    ),
    "signed end": (
        [wire.text("Hello."), wire.signed(wire.text(""))],
        {},
        {"content": "Hello.", "finish": "stop"},
        content("Hello."),
    ),
    "nothing": ([], {}, {"finish": "stop"}, content()),
    "parallel calls": (
        [wire.text("I look."), *BERN],
        {},
        {"content": "I look.", "calls": CALLS, "finish": "tool_calls"},
        content("I look.", *CALLS),
    ),
    "same call twice": (
        [call(1, "time"), call(2, "time")],
        {},
        {"calls": [("given-1", "time", "{}"), ("given-2", "time", "{}")], "finish": "tool_calls"},
        content(("given-1", "time", "{}"), ("given-2", "time", "{}")),
    ),
    "thoughts": (
        [thought("Let me "), thought("see."), wire.text("Hello.")],
        {},
        {"content": "Hello.", "reasoning_content": "Let me see.", "finish": "stop"},
        content("Hello."),
    ),
    "server tools": (
        [*CODE, wire.text("It is 1.")],
        {},
        {"content": "It is 1.", "finish": "stop"},
        content("It is 1."),
    ),
    "citations": (
        [wire.text("Zürich 😀: rain!")],
        CITED,
        {
            "content": "Zürich 😀: rain!",
            "cited": [(0, 8, "a:"), (9, 11, "b:")],
            "finish": "stop",
        },
        content("Zürich 😀: rain!"),
    ),
}


def own(call_id: str) -> str:
    """Return an id as it was given, without the signature that rides in it."""
    return call_id.partition("__ts_")[0]


def summed(choice: Any) -> JSON:
    """Return what ANSWERS has of a choice."""
    told = {key: value for key, value in summed_up(choice).items() if key != "thinking_blocks"}
    if "calls" in told:
        told["calls"] = [(own(key), *rest) for key, *rest in told["calls"]]
    return told


@pytest.mark.parametrize(
    "told, more, wanted", [(a, b, c) for a, b, c, _ in ANSWERS.values()], ids=ANSWERS
)
def test_an_answer_becomes_one_of_openai(
    ask: Ask, gateway: Gateway, upstream: Upstream, told: list[JSON], more: JSON, wanted: JSON
) -> None:
    grown = gateway.counting()
    upstream.script(wire.answer(*told, **more))
    answer = ask(**ask.with_usage)
    assert list(map(summed, answer.choices)) == [wanted]
    assert answer.model == "fast"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (24, 30, 54)
    assert usage.prompt_tokens_details.cached_tokens == 8
    assert usage.completion_tokens_details.reasoning_tokens == 20
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=200, usage="reported")
    assert grown("llm_tokens_total", provider="gemini", model="fast", direction="prompt") == 24
    assert grown("llm_tokens_total", direction="completion") == 30
    assert grown("llm_token_details_total", kind="reasoning") == 20


def blocks(message: Any) -> list[Any]:
    """Return what ANSWERS has of a message: its texts, and its calls."""
    told: list[Any] = []
    for block in message.content:
        if block.type == "text":
            told.append(block.text)
        elif block.type == "tool_use":
            spelled = json.dumps(block.input, separators=(",", ":"))
            told.append((own(block.id), block.name, spelled))
    return told


@pytest.mark.parametrize(
    "told, more, wanted", [(a, b, d) for a, b, _, d in ANSWERS.values()], ids=ANSWERS
)
def test_an_answer_becomes_one_of_anthropic(
    claude: AskClaude, gateway: Gateway, upstream: Upstream, told: list[JSON], more: JSON,
    wanted: JSON,
) -> None:
    grown = gateway.counting()
    upstream.script(wire.answer(*told, **more))
    message = claude(**budget(9000))
    texts = [each for each in wanted["content"] if isinstance(each, str)]
    assert "".join(each for each in blocks(message) if isinstance(each, str)) == "".join(texts)
    calls = [each for each in wanted["content"] if not isinstance(each, str)]
    assert [each for each in blocks(message) if not isinstance(each, str)] == calls
    assert all(each.text for each in message.content if each.type == "text")
    thoughts = "".join(each["text"] for each in told if each.get("thought"))
    assert thoughts == "".join(b.thinking for b in message.content if b.type == "thinking")
    assert message.stop_reason == ("tool_use" if calls else "end_turn")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (16, 8, 30)
    assert usage.output_tokens_details.thinking_tokens == 20
    assert message.model == "fast"
    gateway.logged(request_id=claude.headers["x-gateway-id"], status=200, usage="reported")
    assert grown("llm_tokens_total", provider="gemini", model="fast", direction="prompt") == 24


def test_thoughts_that_the_answer_counts_already(ask: Ask, upstream: Upstream) -> None:
    usage = {**wire.USAGE, "candidatesTokenCount": 30}
    upstream.script(wire.answer(wire.text("Hi"), usage=usage))
    told = ask(**ask.with_usage).usage
    assert (told.prompt_tokens, told.completion_tokens, told.total_tokens) == (24, 30, 54)


FILTERED = (
    *("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"),
    *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION", "ESCALATION"),
    *("PUP_LIMITED_DISABLED", "MODEL_ARMOR"),
)
FAILED = (
    *("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"),
    *("MALFORMED_RESPONSE", "MISSING_THOUGHT_SIGNATURE"),
)
ENDED = ("STOP", "OTHER", "NO_IMAGE", "IMAGE_OTHER", "FINISH_REASON_UNSPECIFIED", *FAILED)
FINISHES = {
    **dict.fromkeys(ENDED, ("stop", "end_turn")),
    **dict.fromkeys(("MAX_TOKENS", "CONTINUATION"), ("length", "max_tokens")),
    **dict.fromkeys(FILTERED, ("content_filter", "refusal")),
}


def test_every_reason_to_finish_is_known() -> None:
    assert FINISHES.keys() == {reason.value for reason in wire.types.FinishReason}


@pytest.mark.parametrize("reason", FINISHES)
@pytest.mark.parametrize("ask", ["sync", "sync stream"], indirect=True)
def test_a_reason_to_finish_becomes_openais(ask: Ask, upstream: Upstream, reason: str) -> None:
    upstream.script(wire.answer(wire.text("One"), finish=reason))
    (choice,) = ask().choices
    assert (choice.message.content, choice.finish_reason) == ("One", FINISHES[reason][0])


@pytest.mark.parametrize("reason", FINISHES)
@pytest.mark.parametrize("claude", ["sync", "sync stream"], indirect=True)
def test_a_reason_to_finish_becomes_anthropics(
    claude: AskClaude, upstream: Upstream, reason: str
) -> None:
    upstream.script(wire.answer(wire.text("One"), finish=reason))
    message = claude()
    assert (message.content[0].text, message.stop_reason) == ("One", FINISHES[reason][1])


@pytest.mark.parametrize("reason", FAILED)
def test_a_failure_without_content_is_one(
    both: tuple[Ask, AskClaude], upstream: Upstream, reason: str
) -> None:
    """Nothing was said yet, so that even a stream can still be a 502, and tried again."""
    ask, claude = both
    upstream.script(*[wire.answer(finish=reason)] * 2)
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    assert caught.value.status_code == 502
    with pytest.raises(anthropic.InternalServerError) as refused:
        claude()
    assert (refused.value.status_code, refused.value.type) == (502, "api_error")


@pytest.mark.parametrize("reason", ["SAFETY", "OTHER", "PROHIBITED_CONTENT", "JAILBREAK"])
def test_a_blocked_prompt_is_filtered(
    both: tuple[Ask, AskClaude], upstream: Upstream, reason: str
) -> None:
    ask, claude = both
    upstream.script(*[wire.blocked(reason)] * 2)
    (choice,) = ask().choices
    assert (choice.message.content or None, choice.finish_reason) == (None, "content_filter")
    message = claude()
    assert (message.content, message.stop_reason) == ([], "refusal")


def test_chunks_are_as_openai_sends_them(client: OpenAI, upstream: Upstream) -> None:
    """The role comes once, indexes count calls, and no usage comes if nobody asked for it."""
    upstream.script(wire.answer(*FIRST))
    chunks = list(client.chat.completions.create(model="fast", messages=[user("Hi")], stream=True))
    assert len({(chunk.id, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert not any(chunk.usage for chunk in chunks)
    (choices,) = zip(*(chunk.choices for chunk in chunks), strict=True)
    roles, ends = [each.delta.role for each in choices], [each.finish_reason for each in choices]
    assert (roles[0], set(roles[1:])) == ("assistant", {None})
    assert (ends[-1], set(ends[:-1])) == ("tool_calls", {None})
    calls = [each for choice in choices for each in choice.delta.tool_calls or () if each.id]
    assert [(each.index, own(each.id)) for each in calls] == [(0, "given-1"), (1, "given-2")]


def test_events_are_as_anthropic_sends_them(claude_client: Anthropic, upstream: Upstream) -> None:
    """Each event is one that its types name in full, and one block is open at a time."""
    upstream.script(wire.answer(*FIRST))
    params: JSON = {"model": "fast", "messages": [user("Hi")], **budget(9000)}
    answer = claude_client.messages.with_raw_response.create(**params, stream=True)
    lines = list(answer.http_response.iter_lines())
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    names = [line[7:] for line in lines if line.startswith("event: ")]
    assert names == [event["type"] for event in told]
    for event in told:
        anthropic_wire.read_event(json.dumps(event)) if event["type"] != "ping" else None
    spans = [(e["type"][14:], e["index"]) for e in told if e["type"].startswith("content_block_s")]
    assert spans == [(kind, at) for at in range(len(spans) // 2) for kind in ("start", "stop")]
    assert [names[0], *names[-2:]] == ["message_start", "message_delta", "message_stop"]


# ---- tool loops ----

FIRST = [thought("Two things."), wire.text("I look."), *BERN]
SECOND = [thought("Once more."), call(3, "get_weather", city="Chur")]
THIRD = [call(4, "time"), call(5, "time")]
LOOP = [FIRST, SECOND, THIRD, [wire.signed(wire.text("Sun."))], [wire.text("Yes.")]]


def script_loop(upstream: Upstream) -> None:
    upstream.script(*(wire.answer(*told) for told in LOOP))


def check_loop(upstream: Upstream, model: str) -> None:
    """The judge sees to the signatures, to the order of the results and to their ids."""
    contents = [upstream.take().json["contents"] for _ in LOOP]
    for shorter, longer in zip(contents, contents[1:], strict=False):
        assert longer[: len(shorter)] == shorter, "what was said is said in the same words again"
    last = contents[-1]
    kinds = [[*part] for content in last for part in content["parts"] if "thought" in part]
    assert kinds == [], "thoughts are not replayed"
    assert wire.of_kind("text", last[1]) == ["I look."]
    calls = [wire.of_kind("functionCall", content) for content in last]
    assert [len(each) for each in calls] == [0, 2, 0, 1, 0, 2, 0, 0, 0]
    outputs = [wire.of_kind("functionResponse", last[at]) for at in (2, 4, 6)]
    if wire.gemini(model).has_ids:
        for made in (calls, outputs):
            ids = [each["id"] for turn in made for each in turn]
            assert ids == [wire.given(number) for number in range(1, 6)]
    told = [[each["response"] for each in turn] for turn in outputs]
    said_by_time = [{"output": "0"}, {"output": "1"}]
    assert told == [said_by_time, [{"output": "0"}], said_by_time]


def keeps_all(message: Any) -> Any:
    return message


def keeps_standard_fields(message: Any) -> Any:
    """As clients do that build their messages anew: only the id can bring a signature back."""
    kept = {"role": message.role, "content": message.content}
    calls = list(map(told_call, message.tool_calls or ()))
    return {**kept, "tool_calls": calls} if calls else kept


def keeps_extra_content(message: Any) -> Any:
    """As a history that was begun at Google's own endpoint: ids are plain."""
    told: JSON = message.to_dict()
    calls = [{**each, "id": own(each["id"])} for each in told.get("tool_calls") or ()]
    return {**told, "tool_calls": calls} if calls else told


@pytest.mark.parametrize("model", [OLD, MIDDLE, NEW])
@pytest.mark.parametrize("keep", [keeps_all, keeps_standard_fields, keeps_extra_content])
def test_a_tool_loop_by_openai(ask: Ask, upstream: Upstream, model: str, keep: Any) -> None:
    script_loop(upstream)
    messages: list[Any] = [user("Where is it sunny?")]
    params: JSON = {"model": model, "messages": messages, "reasoning_effort": "low", **BOTH}
    seen: list[str] = []
    while (message := ask(**params).choices[0].message).tool_calls:
        kept = keep(message)
        messages.append(kept)
        ids = [each["id"] if isinstance(each, dict) else each.id for each in calls_of(kept)]
        seen += ids
        results = [{"tool_call_id": key, "content": str(at)} for at, key in enumerate(ids)]
        messages += [{"role": "tool", **each} for each in reversed(results)]
    assert message.content == "Sun."
    assert len(set(seen)) == len(seen) == 5
    messages += [keep(message), user("Sure?")]
    assert ask(**params).choices[0].message.content == "Yes."
    check_loop(upstream, model)


def calls_of(message: Any) -> Any:
    return message["tool_calls"] if isinstance(message, dict) else message.tool_calls


def keeps_content(block: Any) -> JSON | None:
    return block.to_dict()


def drops_thinking(block: Any) -> JSON | None:
    return None if block.type == "thinking" else block.to_dict()


def cuts_ids(block: Any) -> JSON | None:
    """As a history in which only the thinking block can bring a signature back."""
    told: JSON = block.to_dict()
    return {**told, "id": own(told["id"])} if block.type == "tool_use" else told


@pytest.mark.parametrize("model", [OLD, MIDDLE, NEW])
@pytest.mark.parametrize("keep", [keeps_content, drops_thinking, cuts_ids])
def test_a_tool_loop_by_anthropic(
    claude: AskClaude, upstream: Upstream, model: str, keep: Any
) -> None:
    script_loop(upstream)
    messages: list[Any] = [user("Where is it sunny?")]
    params: JSON = {"model": model, "messages": messages, **budget(3000), **TOOLS}
    while (message := claude(**params)).stop_reason == "tool_use":
        kept = list(filter(None, map(keep, message.content)))
        ids = [each["id"] for each in kept if each["type"] == "tool_use"]
        results = [result(str(at), key) for at, key in enumerate(ids)]
        messages += [said(*kept), user(results[::-1])]
    assert blocks(message) == ["Sun."]
    messages += [said(*filter(None, map(keep, message.content))), user("Sure?")]
    assert blocks(claude(**params)) == ["Yes."]
    check_loop(upstream, model)


def test_a_signature_is_where_googles_own_endpoint_has_it(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(*BERN))
    first, second = (each.to_dict() for each in ask().choices[0].message.tool_calls)
    signature = first["extra_content"]["google"]["thought_signature"]
    assert wire.url_safe(signature) == wire.url_safe(wire.sign(BERN[0]))
    assert first["id"].startswith("given-1__ts_") and "=" not in first["id"]
    assert (second["id"], second.get("extra_content")) == ("given-2", None)


def test_a_conversation_moves_between_vendors(ask: Ask, upstream: Upstream) -> None:
    """No vendor sees another's marks: Claude gets plain ids, Gemini no thoughts of Claude's."""
    thinking = anthropic_wire.thinking("Two things.")
    use = anthropic_wire.tool_use("toolu_9", "time")
    upstream.script(
        wire.answer(*BERN),
        anthropic_wire.answer(thinking, use),
        wire.answer(wire.text("Sun.")),
    )
    messages: list[Any] = [user("Where is it sunny?")]
    for model in ("fast", CLAUDE, "fast"):
        message = ask(model=model, messages=messages, **BOTH).choices[0].message
        ids = [each.id for each in message.tool_calls or ()]
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": each, "content": "ok"} for each in ids]
    assert message.content == "Sun."
    _, second, third = (upstream.take() for _ in range(3))
    assert b"__ts_" not in second.body and b"extra_content" not in second.body
    assert b"Two things." not in third.body


# ---- what is lost, refused, or goes wrong ----


def test_losses_are_named_or_refused(ask: Ask, gateway: Gateway, upstream: Upstream) -> None:
    grown = gateway.counting()
    lossy: JSON = {"logit_bias": {"1": 1}, "frequency_penalty": 1, "store": True}
    lossy["extra_body"] = {"new": 1}
    upstream.script(*[wire.answer(wire.text("Hi"))] * 2)
    ask(**lossy)
    lost = {name.strip() for name in ask.headers["x-gateway-lost"].split(",")}
    assert lost == {"logit_bias", "frequency_penalty", "store", "unknown"}
    gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert grown("llm_params_dropped_total", provider="gemini", param="logit_bias") == 1
    with pytest.raises(openai.BadRequestError, match="logit_bias|frequency_penalty"):
        ask(**lossy, **STRICT)
    ask(store=True, **STRICT)
    assert ask.headers["x-gateway-lost"] == "store", "a hint is never refused"


REFUSED: dict[str, tuple[str, JSON]] = {
    "n": ("n", {"n": 2}),
    "modalities": ("modalities", {"modalities": ["text", "audio"]}),
    "stored file": ("messages", {"messages": [user([STORED])]}),
    "arguments": ("messages", {"messages": [user("a"), {**HISTORY[1], "tool_calls": [BROKEN]}]}),
    "only system": ("messages", {"messages": [system("Be brief.")]}),
    "unknown tool": ("tool_choice", {"tools": [WEATHER], "tool_choice": TIME}),
}


@pytest.mark.parametrize("param, params", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("ask", ["sync", "sync stream"], indirect=True)
def test_what_would_make_the_answer_wrong_is_refused(
    ask: Ask, upstream: Upstream, param: str, params: JSON
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**params)
    assert (caught.value.param or "").startswith(param)
    assert upstream.is_idle


CLAUDE_REFUSED: dict[str, JSON] = {
    "stored file": {"messages": [user([source("document", type="file", file_id="file_1")])]},
    "stops": {"stop_sequences": list("abcdef")},
    "unknown tool": {**TOOLS, "tool_choice": {"type": "tool", "name": "x"}},
    "prewarming": {"max_tokens": 0},
}


@pytest.mark.parametrize("params", CLAUDE_REFUSED.values(), ids=CLAUDE_REFUSED)
@pytest.mark.parametrize("claude", ["sync", "sync stream"], indirect=True)
def test_what_would_make_the_message_wrong_is_refused(
    claude: AskClaude, upstream: Upstream, params: JSON
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude(**params)
    assert caught.value.type == "invalid_request_error"
    assert upstream.is_idle


TOO_LONG = "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."
BAD = "invalid_request_error"
# What Google answers, then OpenAI's status and code (None: any), and Anthropic's status and type.
ERRORS: list[Any] = [
    ((400, "INVALID_ARGUMENT", "Odd."), 400, None, 400, BAD),
    ((400, "FAILED_PRECONDITION", "Not here."), 400, None, 400, BAD),
    ((400, "INVALID_ARGUMENT", TOO_LONG), 400, "context_length_exceeded", 400, BAD),
    ((403, "PERMISSION_DENIED", "Not yours."), 403, None, 403, "permission_error"),
    ((404, "NOT_FOUND", "models/x is not found"), 404, "model_not_found", 404, "not_found_error"),
    ((409, "ABORTED", "Busy."), 409, None, 409, None),
    ((413, "INVALID_ARGUMENT", "Too large."), 413, None, 413, "request_too_large"),
    ((429, "RESOURCE_EXHAUSTED", "Slow.", wire.RETRY), 429, None, 429, "rate_limit_error"),
    ((500, "INTERNAL", "Odd."), 500, None, 500, "api_error"),
    ((503, "UNAVAILABLE", "The model is overloaded."), 503, None, None, None),
    ((504, "DEADLINE_EXCEEDED", "Late."), 504, None, 504, "timeout_error"),
]


@pytest.mark.parametrize("error, status, code, claude_status, kind", ERRORS)
def test_an_error_becomes_one_of_the_client(
    both: tuple[Ask, AskClaude], upstream: Upstream,
    error: Any, status: int, code: str | None, claude_status: int | None, kind: str | None,
) -> None:
    ask, claude = both
    upstream.script(*[wire.error(*error)] * 2)
    with pytest.raises(openai.APIStatusError) as caught:
        ask()
    told = caught.value
    assert set(told.body) == {"message", "type", "param", "code"} and error[2] in told.message
    assert (told.status_code, told.code) == (status, code or told.code)
    wait = "32" if wire.RETRY in error else None
    assert told.response.headers.get("retry-after") == wait
    with pytest.raises(anthropic.APIStatusError) as raised:
        claude()
    failure = raised.value
    assert error[2] in failure.message and failure.response.headers.get("retry-after") == wait
    assert failure.status_code in ((claude_status,) if claude_status else (503, 529))
    assert failure.type == (kind or failure.type)
    if error[2] == TOO_LONG:
        assert failure.body["error"]["message"].lower().startswith("prompt is too long")


@pytest.mark.parametrize("error", wire.KEY_ERRORS.values(), ids=wire.KEY_ERRORS)
def test_a_refused_upstream_key_is_a_502_tried_once(
    both: tuple[Ask, AskClaude], upstream: Upstream, error: Any
) -> None:
    ask, claude = both
    ask.options["max_retries"] = claude.options["max_retries"] = 5
    upstream.script(*[wire.error(*error)] * 2)
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    with pytest.raises(anthropic.InternalServerError) as raised:
        claude()
    for response in (caught.value.response, raised.value.response):
        assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
        assert error[2] not in response.text
    upstream.take(), upstream.take()
    assert upstream.is_idle


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("status, kind", wire.FIRST_ERRORS)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_chunk_is_a_real_status(
    ask: Ask, upstream: Upstream, status: int, kind: str, is_wrapped: bool
) -> None:
    told = wire.error_body(status, kind, "Not now.")
    failure = wire.error(status, kind, "Not now.")
    wrapped = replace(failure, pieces=[b"[" + failure.pieces[0] + b"]"])
    upstream.script(wrapped if is_wrapped else wire.stream(told))
    with pytest.raises(openai.APIStatusError, match="Not now.") as caught:
        ask()
    assert caught.value.status_code == status


STARTED = wire.chunks(wire.response(thought("Hm."), wire.text("Hello, and so on.")))[:3]
OVERLOADED = wire.error_body(503, "UNAVAILABLE", "Overloaded")


@pytest.mark.parametrize("end", ["cut", "whole"])
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_a_stream_without_its_end_is_an_error(
    ask: Ask, gateway: Gateway, upstream: Upstream, end: str
) -> None:
    grown = gateway.counting()
    upstream.script(wire.stream(*STARTED, end=end))
    with pytest.raises(openai.APIError) as caught:
        ask()
    assert not isinstance(caught.value, openai.APIConnectionError), "it must be said, not shown"
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=502)
    assert grown("llm_provider_errors_total", provider="gemini") == 1


def test_an_error_after_content_is_told_in_the_stream(
    client: OpenAI, claude_client: Anthropic, upstream: Upstream
) -> None:
    go, go_too = threading.Event(), threading.Event()
    reply = wire.stream(*STARTED, OVERLOADED)
    upstream.script(replace(reply, last_after=go), replace(reply, last_after=go_too))
    stream = client.chat.completions.create(model="fast", messages=[user("Hi")], stream=True)
    next(stream)
    go.set()
    with pytest.raises(openai.APIError, match="Overloaded"):
        list(stream)
    params: JSON = {"model": "fast", "max_tokens": 99, "messages": [user("Hi")]}
    events = claude_client.messages.create(**params, stream=True)
    assert next(events).type == "message_start"
    go_too.set()
    with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
        list(events)


def test_a_client_that_leaves_takes_the_upstream_with_it(
    client: OpenAI, gateway: Gateway, upstream: Upstream
) -> None:
    grown = gateway.counting()
    upstream.script(wire.stream(*STARTED, end="stall"))
    stream = client.chat.completions.create(model="fast", messages=[user("Hi")], stream=True)
    next(stream)
    stream.close()
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(request_id=stream.response.headers["x-gateway-id"], status=499)
    assert grown("llm_requests_total", provider="gemini", status="499") == 1
    assert grown("llm_tokens_total", direction="prompt") == 20


# ---- the judge ----

MADE = {"role": "model", "parts": [wire.signed(BERN[0])]}
BARE = {"role": "model", "parts": [BERN[0]]}
BACK = turn({"functionResponse": {"name": "get_weather", "id": "given-1", "response": {}}})
LATE = turn({"functionResponse": {"name": "time", "id": "given-1", "response": {}}})


def held(**config: Any) -> JSON:
    return {"generationConfig": config}


def contents(*told: JSON) -> JSON:
    return {"contents": [asked("Hi"), *told]}


def declared(**function: Any) -> JSON:
    return {"tools": [{"functionDeclarations": [{"name": "f", **function}]}]}


def marked(turn: JSON, **changes: Any) -> JSON:
    """Return a turn with its only call changed."""
    (told,) = turn["parts"]
    kind = "functionCall" if "functionCall" in told else "functionResponse"
    return {**turn, "parts": [{**told, kind: {**told[kind], **changes}}]}


BACK_BY_PLACE = marked(BACK, id=None)
REFUSED_BY_GEMINI: dict[str, tuple[str, JSON]] = {
    "unknown field": (NEW, {"seed": 1}),
    "unknown field deep down": (NEW, contents(asked("a"), turn({"text": "a", "x": 1}))),
    "keyword in a schema": (NEW, declared(parameters={"$schema": "x"})),
    "both schemas of a tool": (
        NEW,
        declared(parameters={"type": "OBJECT"}, parametersJsonSchema=SCHEMA),
    ),
    "empty schema of a tool": (NEW, declared(parametersJsonSchema={"type": "object"})),
    "name of a tool": (NEW, declared(name="3d")),
    "role": (NEW, {"contents": [{"role": "system", "parts": [wire.text("a")]}, asked("a")]}),
    "model last": (NEW, contents({"role": "model", "parts": [wire.text("a")]})),
    "no parts": (NEW, {"contents": [turn()]}),
    "empty text": (NEW, {"contents": [asked("")]}),
    "two in one": (NEW, {"contents": [turn({**wire.text("a"), **inline("a/b", "AA==")})]}),
    "system": (NEW, {"systemInstruction": turn(inline("image/gif", PIXEL))}),
    "no result": (NEW, contents(MADE, asked("a"))),
    "result of another": (NEW, contents(MADE, LATE)),
    "text beside a result": (NEW, contents(MADE, turn(*BACK["parts"], wire.text("a")))),
    "no signature": (NEW, contents(BARE, BACK)),
    "placeholder in vain": (
        NEW,
        contents({"role": "model", "parts": [{**BERN[0], **PLACED}]}, BACK),
    ),
    "forged signature": (
        NEW,
        contents({"role": "model", "parts": [{**BERN[0], "thoughtSignature": "AAAA"}]}, BACK),
    ),
    "id of a call": (OLD, contents(BARE, BACK)),
    "no id": (NEW, contents(marked(MADE, id=None), BACK_BY_PLACE)),
    "id of nobody": (NEW, contents(MADE, marked(BACK, id="given-9"))),
    "mode": (NEW, {**declared(), **mode("SOME")}),
    "allowed": (NEW, {**declared(), **mode("AUTO", "f")}),
    "not declared": (NEW, {**declared(), **mode("ANY", "g")}),
    "mode without tools": (NEW, mode("AUTO")),
    "search and functions": (OLD, {"tools": [*declared()["tools"], {"googleSearch": {}}]}),
    "penalty": (NEW, held(presencePenalty=1)),
    "stops": (NEW, held(stopSequences=list("abcdef"))),
    "temperature": (NEW, held(temperature=2.1)),
    "both schemas": (
        NEW,
        held(**JSON_MODE, responseSchema={"type": "OBJECT"}, responseJsonSchema=SCHEMA),
    ),
    "no mime type": (NEW, held(responseJsonSchema=SCHEMA)),
    "keyword": (NEW, held(**JSON_MODE, responseJsonSchema={"anyOf": [{"minLength": 1}]})),
    "level": (OLD, held(thinkingConfig={"thinkingLevel": "LOW"})),
    "unknown level": (NEW, held(thinkingConfig={"thinkingLevel": "MINIMAL"})),
    "budget": (NEW, held(thinkingConfig={"thinkingBudget": 1024})),
    "no thought": (OLD_PRO, held(thinkingConfig={"thinkingBudget": 0})),
    "tier": (NEW, {"serviceTier": "unspecified"}),
}


@pytest.mark.parametrize("model, change", REFUSED_BY_GEMINI.values(), ids=REFUSED_BY_GEMINI)
def test_the_judge_refuses(model: str, change: JSON) -> None:
    body = {"contents": [asked("Hi")], "systemInstruction": turn(wire.text("a"))}
    body |= held(thinkingConfig={"includeThoughts": True})
    assert list(wire.judge_body(body, model)) == []
    assert len(set(wire.judge_body({**body, **change}, model))) == 1


@pytest.mark.parametrize("told", [FIRST, THIRD, [wire.signed(wire.text("Hi there"))]])
@pytest.mark.parametrize("model", [OLD, NEW])
def test_the_judge_takes_what_its_upstream_gave(model: str, told: list[JSON]) -> None:
    parts = list(wire.as_model_tells(tuple(told), wire.gemini(model)))
    results = [
        {"functionResponse": {**{key: each[key] for key in each if key != "args"}, "response": {}}}
        for each in wire.of_kind("functionCall", {"parts": parts})
    ]
    back = {"role": "model", "parts": parts}
    body = contents(back, turn(*results) if results else asked("And?"))
    assert list(wire.judge_body(body, model)) == []
