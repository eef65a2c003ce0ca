"""The anthropic SDK, and Claude Code's requests, in front of Chat Completions: nothing lost in
silence, nothing invented, and only what OpenAI takes sent to it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import anthropic
import anthropic_wire
import httpx2
import openai_wire as wire
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_async_tool, beta_tool
from drive import KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Gateway, Launch
from openai_wire import PIXEL, SCHEMA, call, choice, text, user
from pydantic import BaseModel
from test_messages import CLAUDE_CODE, CLAUDE_CODE_HEAD, AskClaude, check_own_error, picture
from upstream import JSON, Answer, Reply, Upstream, json_reply, sse_reply

ROUTES = ["fast", "home"]  # of kind "openai", and "openai-compatible"


@pytest.fixture(scope="session")
def config(upstream: Upstream) -> JSON:
    """Stand in for the other suites' configuration: no provider here speaks Messages."""
    base_url = f"{upstream.url}/v1"
    return {
        "providers": {
            "openai": {"api_key": UPSTREAM_KEY, "base_url": base_url, "wire": "chat"},
            "local": {"kind": "openai-compatible", "base_url": base_url},
        },
        "models": {
            "fast": {"provider": "openai", "model": "gpt-5.2"},
            "home": {"provider": "local", "model": "llama-4"},
        },
        "routing": [{"prefix": prefix, "provider": "openai"} for prefix in ("gpt-", "o")],
        "api_keys": [{"key": KEY, "app": "interop", "allowed_models": ["*"]}],
    }


@pytest.fixture(params=MANNERS)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> AskClaude:
    return AskClaude(gateway, request.param)


@pytest.fixture
def once(gateway: Gateway) -> AskClaude:
    """The SDK in one manner, where all that matters is what goes up."""
    return AskClaude(gateway, "sync")


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as made:
        yield made


def lost(ask: AskClaude) -> set[str]:
    names = ask.headers.get("x-gateway-lost", "").split(",")
    return {name.strip() for name in names} - {""}


# ---- requests ----


def said(content: Any) -> JSON:
    return {"role": "assistant", "content": content}


def system(content: Any) -> JSON:
    return {"role": "system", "content": content}


def used(call_id: str, name: str, **arguments: Any) -> JSON:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def result(call_id: str, content: Any = None, **more: Any) -> JSON:
    told = {} if content is None else {"content": content}
    return {"type": "tool_result", "tool_use_id": call_id, **told, **more}


def document(source: JSON, **more: str) -> JSON:
    return {"type": "document", "source": source, **more}


def called(*calls: JSON, content: str | None = None) -> JSON:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def picture_part(url: str) -> JSON:
    return {"type": "image_url", "image_url": {"url": url}}


def spelled_out(body: JSON) -> JSON:
    """Return the body with what may be spelled in several ways spelled in one.

    A content of texts alone becomes one string, whose white space does not count; nor does that
    of arguments. The system's role may be the developer's, and two fields have two names.
    """

    def content(told: Any) -> Any:
        if isinstance(told, list) and all(part["type"] == "text" for part in told):
            told = "\n".join(part["text"] for part in told)
        return " ".join(told.split()) if isinstance(told, str) else told

    def message(told: JSON) -> JSON:
        role = "system" if told["role"] == "developer" else told["role"]
        for made in told.get("tool_calls", ()):
            function = made["function"]
            function["arguments"] = json.dumps(json.loads(function["arguments"]))
        return {**told, "role": role, "content": content(told.get("content"))}

    spelled = {**body, "messages": list(map(message, body["messages"]))}
    for name in ("tools", "response_format"):
        if name in spelled:
            spelled[name] = without_strict(spelled[name])
    for name, other in (("safety_identifier", "user"), ("max_tokens", "max_completion_tokens")):
        if name in spelled:
            spelled[other] = spelled.pop(name)
    return spelled


def for_model(model: str, wanted: JSON) -> JSON:
    """Put the system's texts first, where a server may take them nowhere else."""
    texts = [each["content"] for each in wanted.get("messages", ()) if each["role"] == "system"]
    if model != "home" or not texts:
        return wanted
    rest = [each for each in wanted["messages"] if each["role"] != "system"]
    return {**wanted, "messages": [system(" ".join(texts)), *rest]}


def without_strict(value: Any) -> Any:
    """Whether a valid schema is said to be strict is free; the judge sees to the others."""
    if isinstance(value, list):
        return list(map(without_strict, value))
    if not isinstance(value, dict):
        return value
    return {key: without_strict(value[key]) for key in value if key != "strict"}


EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
BILLING = text("x-anthropic-billing-header: cc_version=2.1.330.a1b; cc_entrypoint=sdk-cli;")
WEATHER = {
    "name": "get_weather",
    "description": "Wetter für eine Stadt – in °C",
    "input_schema": SCHEMA,
    "strict": True,
    "eager_input_streaming": True,
    "input_examples": [{"city": "Bern"}],
    **EPHEMERAL,
}
NOTHING = {"type": "object", "properties": {}}
TIME = {"type": "custom", "name": "time", "input_schema": NOTHING}
OPEN = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOLS = {"tools": [WEATHER, TIME]}
SENT_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": WEATHER["description"],
        "parameters": SCHEMA,
    },
}
SENT_TIME = {"type": "function", "function": {"name": "time", "parameters": NOTHING}}
NAMED = {"type": "function", "function": {"name": "time"}}
FORMAT = {"format": {"type": "json_schema", "schema": OPEN}}
SENT_FORMAT = {"type": "json_schema", "json_schema": {"name": "output", "schema": OPEN}}
PDF = document({"type": "base64", "media_type": "application/pdf", "data": "JVBERi0x"})
PLAIN = {"type": "text", "media_type": "text/plain", "data": "It rains."}
FOUND = {
    "type": "search_result",
    "source": "https://a.example",
    "title": "A page",
    "content": [text("It rains."), text("It pours.")],
    "citations": {"enabled": True},
}
LOADED = [{"type": "tool_reference", "tool_name": name} for name in ("cron", "mail")]
PIXEL_URL = f"data:image/gif;base64,{PIXEL}"
FAR_PICTURE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "EqAB+/=="}
TWO = said([THOUGHT, text("I look."), used("t1", "get_weather", city="Zürich"), used("t2", "time")])
SENT_TWO = called(call("t1", "get_weather", city="Zürich"), call("t2", "time"), content="I look.")


def answered(*results: JSON) -> JSON:
    """Ask what follows on two calls, the results of which are given."""
    return {"messages": [user("Hi"), TWO, user(list(results))], **TOOLS}


def sent(*messages: JSON) -> JSON:
    return {"messages": [user("Hi"), SENT_TWO, *messages]}


def tool(call_id: str, content: str) -> JSON:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# What is asked, and what an upstream of either kind must see of it; None is what it must not see.
ASKS: dict[str, tuple[JSON, JSON]] = {
    "system": ({"system": "Be brief."}, {"messages": [system("Be brief."), user("Hello")]}),
    "system in blocks": (
        {"system": [BILLING, {**text("One."), **EPHEMERAL}, text("Two.")]},
        {"messages": [system("One. Two."), user("Hello")]},
    ),
    "system later": (
        {"messages": [user("A"), system("B"), said("C"), user("D"), system([text("E")])]},
        {"messages": [user("A"), system("B"), said("C"), user("D"), system("E")]},
    ),
    "user in blocks": (
        {"messages": [user([text("A"), {**text("B"), **EPHEMERAL}])]},
        {"messages": [user("A B")]},
    ),
    "images": (
        {"messages": [user([text("What?"), picture(PIXEL), FAR_PICTURE])]},
        {
            "messages": [
                user(
                    [
                        text("What?"),
                        picture_part(PIXEL_URL),
                        picture_part("https://example.com/a.png"),
                    ]
                )
            ]
        },
    ),
    "plain text": (
        {"messages": [user([document(PLAIN, title="A page"), text("So?")])]},
        {"messages": [user("A page It rains. So?")]},
    ),
    "plain text with a context": (
        {"messages": [user([document(PLAIN, title="A page", context="Of May.")])]},
        {"messages": [user("Of May. A page It rains.")]},
    ),
    "search result": (
        {"messages": [user([FOUND, text("So?")])]},
        {"messages": [user("A page https://a.example It rains. It pours. So?")]},
    ),
    "tools": (TOOLS, {"tools": [SENT_WEATHER, SENT_TIME]}),
    "no properties": (
        {"tools": [{"name": "time", "input_schema": {"type": "object"}}]},
        {"tools": [SENT_TIME]},
    ),
    "auto": ({**TOOLS, "tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
    "any": ({**TOOLS, "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
    "none": ({**TOOLS, "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    "named": ({**TOOLS, "tool_choice": {"type": "tool", "name": "time"}}, {"tool_choice": NAMED}),
    "one at a time": (
        {**TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"tool_choice": "auto", "parallel_tool_calls": False},
    ),
    "many at a time": (
        {**TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": False}},
        {"tool_choice": "required"},
    ),
    "choice without tools": (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "tools": []},
        {"tool_choice": None, "parallel_tool_calls": None, "tools": None},
    ),
    "results": (
        answered(result("t1", "rain"), result("t2", [text("noon")])),
        sent(tool("t1", "rain"), tool("t2", "noon")),
    ),
    "results in disorder, and more": (
        answered(text("Go on."), result("t2", "noon"), result("t1", "rain"), picture(PIXEL)),
        sent(
            tool("t1", "rain"),
            tool("t2", "noon"),
            user([text("Go on."), picture_part(PIXEL_URL)]),
        ),
    ),
    "failed": (
        answered(result("t1", "no city", is_error=True), result("t2", [text("x")], is_error=True)),
        sent(tool("t1", "Error: no city"), tool("t2", "Error: x")),
    ),
    "empty": (answered(result("t1"), result("t2", [])), sent(tool("t1", ""), tool("t2", ""))),
    "found by a tool": (
        answered(result("t1", [FOUND]), result("t2", LOADED, **EPHEMERAL)),
        sent(
            tool("t1", "A page https://a.example It rains. It pours."),
            tool("t2", "Tool cron loaded. Tool mail loaded."),
        ),
    ),
    "system between call and result": (
        {"messages": [user("Hi"), TWO, system("S"), user([result("t1", "a"), result("t2", "b")])]},
        {"messages": [user("Hi"), SENT_TWO, tool("t1", "a"), tool("t2", "b"), system("S")]},
    ),
    "nothing but a thought": (
        {"messages": [user("A"), said([THOUGHT]), user("B")]},
        {"messages": [user("A B")]},
    ),
    "traces of server tools": (
        {"messages": [user("A"), said([*anthropic_wire.searched("?"), text("B")]), user("C")]},
        {"messages": [user("A"), said("B"), user("C")]},
    ),
    "no text beside a call": (
        {
            "messages": [user("Hi"), said([used("t1", "time")]), user([result("t1", "noon")])],
            **TOOLS,
        },
        {
            "messages": [
                user("Hi"),
                called(call("t1", "time")),
                tool("t1", "noon"),
            ]
        },
    ),
    "stop": ({"stop_sequences": ["\n", "END"]}, {"stop": ["\n", "END"]}),
    "format": ({"output_config": FORMAT}, {"response_format": SENT_FORMAT}),
    "user": ({"metadata": {"user_id": "u-1"}}, {"user": "u-1", "metadata": None}),
    "long user": (
        {"metadata": {"user_id": json.dumps({"device_id": "d" * 64, "session_id": "s" * 9})}},
        {"metadata": None},
    ),
    "tier": ({"service_tier": "standard_only"}, {"service_tier": "default"}),
    "cap": ({"max_tokens": 7}, {"max_completion_tokens": 7}),
    "top_k": ({"extra_body": {"top_k": 5}}, {"top_k": None}),
    "defaults": (
        {},
        {"temperature": None, "stop": None, "tools": None, "reasoning_effort": None, "n": None},
    ),
}


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("params, wanted", ASKS.values(), ids=ASKS)
def test_a_request_becomes_one_that_openai_takes(
    once: AskClaude, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    """The judge sees to the rest: that no cache mark, thought or unknown field is left in it."""
    upstream.script(wire.answer(choice("Hello!")))
    told = once(model=model, **params)
    assert (told.content[0].text, told.model) == ("Hello!", model)
    body = upstream.take().json
    assert ("max_tokens" in body) == (model == "home")
    spelled, wanted = spelled_out(body), for_model(model, wanted)
    assert {key: spelled.get(key) for key in wanted} == wanted


def effort(level: str | None = None, kind: str = "adaptive", **params: Any) -> JSON:
    output = {"output_config": {"effort": level}} if level else {}
    return {"thinking": {"type": kind}, **output, **params}


def budget(tokens: int) -> JSON:
    return {
        "thinking": {"type": "enabled", "budget_tokens": tokens},
        "max_tokens": tokens + 1,
    }


def sampled(**more: Any) -> JSON:
    return {"extra_body": {"temperature": 0.5, "top_p": 0.9}, **more}


def thinks(level: str | None) -> JSON:
    return {"reasoning_effort": level}


WARM, COLD = {"temperature": 0.5, "top_p": 0.9}, {"temperature": None, "top_p": None}
# Of which model what is asked, what it must see, and what is named as lost.
GENERATIONS: dict[str, tuple[str, JSON, JSON, set[str]]] = {
    "low budget": ("gpt-5.2", budget(4095), thinks("low"), set()),
    "middle budget": ("gpt-5.2", budget(4096), thinks("medium"), set()),
    "high budget": ("gpt-5.2", budget(16384), thinks("high"), set()),
    "effort": ("gpt-5.2", effort("xhigh"), thinks("xhigh"), set()),
    "effort alone": ("gpt-5.2", {"output_config": {"effort": "low"}}, thinks("low"), set()),
    "effort between tools": ("gpt-5.2", effort("medium", "between_tools"), thinks("medium"), set()),
    "no effort named": ("gpt-5.2", effort(), thinks(None), set()),
    "disabled": ("gpt-5.2", effort(None, "disabled"), thinks("none"), set()),
    "disabled, cannot be": (
        *("gpt-5", effort(None, "disabled")),
        *(thinks("minimal"), {"reasoning_effort"}),
    ),
    "disabled, never thinks": ("gpt-4.1", effort(None, "disabled"), thinks(None), set()),
    "disabled, local": ("home", effort(None, "disabled"), thinks(None), set()),
    "max": ("gpt-6", effort("max"), thinks("max"), set()),
    "max, not known": ("gpt-5.2", effort("max"), thinks("xhigh"), {"reasoning_effort"}),
    "xhigh, not known": ("gpt-5.1", effort("xhigh"), thinks("high"), {"reasoning_effort"}),
    "o-series": ("o4-mini", effort("max"), thinks("high"), {"reasoning_effort"}),
    "effort of none": ("gpt-4.1", effort("high"), thinks(None), {"reasoning_effort"}),
    "effort, local": ("home", effort("high"), thinks(None), {"reasoning_effort"}),
    "tools while thinking": ("gpt-5.2", effort("high", **TOOLS), thinks("high"), set()),
    "tools or thinking": (
        *("gpt-5.4", effort("high", **TOOLS)),
        *(thinks("none"), {"reasoning_effort"}),
    ),
    "tools, newest": ("gpt-5.5", TOOLS, thinks("none"), set()),
    "tools or thinking, newest": (
        *("gpt-6", effort("high", **TOOLS)),
        *(thinks("none"), {"reasoning_effort"}),
    ),
    "sampling": ("gpt-4.1", sampled(), WARM, set()),
    "sampling, local": ("home", sampled(), WARM, set()),
    "sampling, idle": ("gpt-5.2", sampled(), WARM, set()),
    "sampling, disabled": ("gpt-5.5", sampled(**effort(None, "disabled")), WARM, set()),
    "sampling while thinking": ("gpt-5.2", sampled(**effort("low")), COLD, set(WARM)),
    "sampling, thinks by itself": ("gpt-5.5", sampled(), COLD, set(WARM)),
    "sampling, gpt-5": ("gpt-5", sampled(), COLD, set(WARM)),
    "sampling, o-series": ("o3", sampled(), COLD, set(WARM)),
    "stop, o-series": ("o1", {"stop_sequences": ["END"]}, {"stop": ["END"]}, set()),
}


@pytest.mark.parametrize("model, params, wanted, losses", GENERATIONS.values(), ids=GENERATIONS)
def test_each_generation_is_asked_for_what_it_takes(
    once: AskClaude, upstream: Upstream, model: str, params: JSON, wanted: JSON, losses: set[str]
) -> None:
    """Of the marks on the tools nothing is said here."""
    upstream.script(wire.answer(choice("Hello!")))
    once(model=model, **params)
    body = upstream.take().json
    assert {key: body.get(key) for key in wanted} == wanted
    hints = {"cache_control", "eager_input_streaming", "input_examples", "strict"}
    assert lost(once) - hints == losses


def test_a_pdf_is_a_file_with_a_name(once: AskClaude, upstream: Upstream) -> None:
    """OpenAI takes none without; what names it is the title, or a word of ours."""
    upstream.script(wire.answer(choice("A page.")))
    once(messages=[user([{**PDF, "title": "a.pdf", "context": "Of May."}, PDF, text("What?")])])
    (message,) = upstream.take().json["messages"]
    files = [part["file"] for part in message["content"] if part["type"] == "file"]
    assert [file["file_data"] for file in files] == ["data:application/pdf;base64,JVBERi0x"] * 2
    assert files[0]["filename"] == "a.pdf"
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert any("Of May." in told for told in texts) and texts[-1] == "What?"


def test_pictures_of_tools_follow_the_results(once: AskClaude, upstream: Upstream) -> None:
    upstream.script(wire.answer(choice("A pixel.")))
    results = result("t1", [text("Seen."), picture(PIXEL)]), result("t2", [PDF, FAR_PICTURE])
    once(**answered(*results, text("What is it?")))
    *_, first, second, last = upstream.take().json["messages"]
    assert (first, second) == (tool("t1", "Seen."), tool("t2", ""))
    kinds = [part["type"] for part in last["content"]]
    shown = [kind for kind in kinds if kind != "text"]
    assert (last["role"], shown, kinds[-1]) == ("user", ["image_url", "file", "image_url"], "text")
    labels = " ".join(part["text"] for part in last["content"][:-1] if part["type"] == "text")
    assert "t1" in labels and "t2" in labels and last["content"][-1] == text("What is it?")


LONG_NAME = "mcp__" + "a-rather-long-name_" * 4 + "of_a_tool"
LONG_ID = "toolu_" + "x" * 60


@pytest.mark.parametrize("model", ROUTES)
def test_long_names_and_ids_fit_and_come_back(
    ask: AskClaude, upstream: Upstream, model: str
) -> None:
    """The judge sees to their length and to the pairs; two names may begin alike."""
    other = f"{LONG_NAME}_2"
    names: list[str] = []

    def reply(received: Any) -> Reply:
        names.extend(each["function"]["name"] for each in received.json["tools"])
        calls = [call(f"call_{name[-8:]}", name) for name in names]
        return wire.answer(choice(None, *calls))(received)

    upstream.script(reply)
    history = [user("Hi"), said([used(LONG_ID, LONG_NAME)]), user([result(LONG_ID, "x")])]
    tools = [{"name": name, "input_schema": NOTHING} for name in (LONG_NAME, other)]
    named = {"type": "tool", "name": other}
    told = ask(model=model, messages=history, tools=tools, tool_choice=named)
    assert [block.name for block in told.content] == [LONG_NAME, other]
    body = upstream.take().json
    assert body["tool_choice"]["function"]["name"] == names[1] != names[0]
    (made,) = body["messages"][1]["tool_calls"]
    assert (made["function"]["name"], made["id"]) == (names[0], body["messages"][2]["tool_call_id"])


def test_marks_of_another_vendor_stay_here(once: AskClaude, upstream: Upstream) -> None:
    """A signature of Gemini's that came in a call's id is not OpenAI's to see."""
    ridden = "call_1__ts_" + "QUJD" * 40
    history = [user("Hi"), said([used(ridden, "time")]), user([result(ridden, "noon")])]
    upstream.script(wire.answer(choice("Noon.")))
    once(messages=history, **TOOLS)
    _, made, told = upstream.take().json["messages"]
    assert (made["tool_calls"], told["tool_call_id"]) == ([call("call_1", "time")], "call_1")


HOSTED: list[JSON] = [
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
    {"type": "web_search_20260318", "name": "web_search"},
    {"type": "web_fetch_20260318", "name": "web_fetch"},
    {"type": "code_execution_20260521", "name": "code_execution"},
    {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"},
    {"type": "computer_toolset_20260801", "name": "computer"},
    {"type": "browser_toolset_20260801", "name": "browser"},
    {"type": "mcp_toolset", "mcp_server_name": "files"},
    {"type": "brand_new_20270101", "name": "brand_new"},
]


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("hosted", HOSTED, ids=lambda hosted: hosted["type"])
def test_hosted_tools_that_are_offered_are_left_out(
    once: AskClaude, upstream: Upstream, model: str, hosted: JSON
) -> None:
    """Coding agents offer some in every request. Named they are, and `strict` refuses."""
    upstream.script(*[wire.answer(choice("Hi"))] * 2)
    automatic = {"tool_choice": {"type": "auto"}}
    once(model=model, tools=[TIME, hosted], **automatic)
    assert without_strict(upstream.take().json["tools"]) == [SENT_TIME]
    assert lost(once), "it is named"
    once(model=model, tools=[hosted], **automatic)
    assert not {"tools", "tool_choice"} & upstream.take().json.keys()
    with pytest.raises(anthropic.BadRequestError):
        once(model=model, tools=[TIME, hosted], **STRICT)


@pytest.mark.parametrize("kind", ["bash_20250124", "text_editor_20250728", "memory_20250818"])
def test_tools_without_a_schema_are_offered_or_named(
    once: AskClaude, upstream: Upstream, kind: str
) -> None:
    upstream.script(wire.answer(choice("Hi")))
    editor = {"text_editor": "str_replace_based_edit_tool"}
    name = editor.get(kind[:-9], kind[:-9])
    once(tools=[TIME, {"type": kind, "name": name}])
    names = [each["function"]["name"] for each in upstream.take().json["tools"]]
    assert names == ["time", name] or (names == ["time"] and lost(once))


STRICT = {"extra_headers": {"x-gateway-strict": "1"}}


@pytest.mark.parametrize("model", ROUTES)
def test_losses_are_named_or_refused(
    ask: AskClaude, gateway: Gateway, upstream: Upstream, model: str
) -> None:
    """A preference may be refused, what costs or traces only never is."""
    grown = gateway.counting()
    tools = [{"name": "f", "input_schema": OPEN, "strict": True}]
    lossy: JSON = {"model": model, "tools": tools, "extra_body": {"top_k": 5, "new": 1}}
    hints: JSON = {"model": model, "system": [BILLING, {**text("Hi"), **EPHEMERAL}]}
    upstream.script(*[wire.answer(choice("Hi"))] * 2)
    ask(**lossy)
    assert lost(ask) == {"top_k", "strict", "unknown"}
    gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert grown("llm_params_dropped_total", param="top_k") == 1
    with pytest.raises(anthropic.BadRequestError, match="top_k") as caught:
        ask(**lossy, **STRICT)
    assert caught.value.type == "invalid_request_error"
    ask(**hints, inference_geo="eu", **STRICT)
    assert lost(ask) == {"cache_control", "inference_geo"}


def test_what_says_nothing_is_no_loss(once: AskClaude, upstream: Upstream) -> None:
    upstream.script(wire.answer(choice("Hi")))
    once(system=[BILLING, text("Hi")], tools=[TIME], thinking={"type": "disabled"}, speed=None)
    assert lost(once) == set()


def test_what_anthropic_said_itself_is_no_loss(once: AskClaude, upstream: Upstream) -> None:
    """A conversation that moved here has marks of its first provider; strict takes them too."""
    made = {**used("t1", "time"), "caller": {"type": "direct"}}
    before = said([{**THOUGHT, "signature": "EqAB"}, {**text("I look."), "citations": None}, made])
    upstream.script(wire.answer(choice("Noon.")))
    once(messages=[user("Hi"), before, user([result("t1", "noon")])], tools=[TIME], **STRICT)


STORED = {"type": "image", "source": {"type": "file", "file_id": "file_1"}}
STORED_PDF = document({"type": "file", "file_id": "file_1"})
FAR_PDF = document({"type": "url", "url": "https://example.com/a.pdf"})
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
BROWSER = {"type": "browser_state", "tabs": []}
# What is refused, and a word of the reason.
REFUSED: dict[str, tuple[JSON, str]] = {
    "stored image": ({"messages": [user([STORED])]}, "source|file"),
    "stored document": ({"messages": [user([STORED_PDF])]}, "source|file"),
    "document by URL": ({"messages": [user([FAR_PDF])]}, "document|file|url"),
    "unknown block": ({"messages": [user([{"type": "video", "source": {}}])]}, "messages"),
    "browser": (answered(result("t1", [BROWSER]), result("t2")), "browser|messages"),
    "nothing to say": ({"max_tokens": 0}, "max_tokens"),
    "no cap": ({"extra_body": {"max_tokens": None}}, "max_tokens"),
    "five stops": ({"stop_sequences": list("abcde")}, "stop"),
    "forced hosted tool": (
        {"tools": [TIME, SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}},
        "tool_choice",
    ),
    "forced hosted tools": (
        {"tools": [SEARCH], "tool_choice": {"type": "any"}},
        "tool",
    ),
    "unknown tool": ({**TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
    "no result": ({"messages": [user("Hi"), TWO, user("So?")], **TOOLS}, "t1"),
    "result of nothing": ({"messages": [user([result("t9", "x")])], **TOOLS}, "t9"),
    "no messages": ({"messages": []}, "messages"),
    "wrong type": ({"extra_body": {"temperature": "hot"}}, "temperature"),
    "wrong role": ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
}


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("params, reason", REFUSED.values(), ids=REFUSED)
def test_what_would_make_the_answer_wrong_is_refused(
    once: AskClaude, upstream: Upstream, model: str, params: JSON, reason: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=f"(?i){reason}") as caught:
        once(model=model, **params)
    check_own_error(caught.value, 400, "invalid_request_error")
    assert upstream.is_idle


@pytest.mark.parametrize("model", ["o3", "o4-mini"])
def test_stops_of_models_that_take_none_are_refused(
    once: AskClaude, upstream: Upstream, model: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match="stop"):
        once(model=model, stop_sequences=["END"])
    assert upstream.is_idle


def test_the_same_request_is_the_same_bytes(once: AskClaude, upstream: Upstream) -> None:
    upstream.script(*[wire.answer(choice("Hello!"))] * 2)
    asked = answered(result("t1", [FOUND, picture(PIXEL)]), result("t2"), text("So?"))
    once(**asked, metadata={"user_id": "u" * 200})
    once(**asked, metadata={"user_id": "u" * 200})
    assert upstream.take().body == upstream.take().body


# ---- Claude Code ----


def events_of(body: bytes) -> list[JSON]:
    """Return the events of a stream, each of which Anthropic could have sent in its place."""
    told = []
    for piece in body.decode().split("\n\n")[:-1]:
        if piece.strip("\n"):
            name, data = piece.removeprefix("event: ").split("\ndata: ")
            told.append(json.loads(data))
            assert name == told[-1]["type"]
            if name not in ("ping", "error"):
                anthropic_wire.read_event(data)
    return told


def check_order(events: list[JSON]) -> None:
    """A message starts, its blocks open and close one after another, and it ends."""
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    steps = {"content_block_start": 1, "content_block_stop": -1}
    depths = list(accumulate(steps.get(kind, 0) for kind in kinds))
    assert set(depths) <= {0, 1} and depths[-1] == 0
    assert all(depth for depth, kind in zip(depths, kinds, strict=True) if kind.endswith("_delta")
               and kind != "message_delta")
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert starts == list(range(len(starts)))


def post(gateway: Gateway, body: JSON, **head: str) -> httpx2.Response:
    asked = json.dumps(body, ensure_ascii=False).encode()
    url = f"{gateway.url}/v1/messages?beta=true"
    return httpx2.post(url, content=asked, headers={**CLAUDE_CODE_HEAD, **head})


CODE_UP = [
    system("You are Claude Code. Be brief."),
    user("<system-reminder>Today.</system-reminder> hi"),
    system("# Environment"),
    called(call("toolu_1", "ToolSearch", query="cron")),
    tool("toolu_1", "Tool CronList loaded."),
    user("Tool loaded."),
    system("# Skills"),
    called(call("toolu_2", "CronList")),
    tool("toolu_2", "none"),
]


@pytest.mark.parametrize("model", ["fast", "home", "gpt-4.1", "gpt-5.5", "gpt-6"])
def test_claude_code_is_served(gateway: Gateway, upstream: Upstream, model: str) -> None:
    """Its thinking is not to be shown; of the rest nothing may be refused."""
    upstream.script(wire.answer(choice("Hi.", call("c1", "Bash"), reasoning="Hm.")))
    answer = post(gateway, {**CLAUDE_CODE, "model": model, "max_tokens": 32000})
    assert answer.status_code == 200, answer.text
    check_order(events_of(answer.content))
    received = upstream.take()
    body = spelled_out(received.json)
    assert body["messages"] == for_model(model, {"messages": CODE_UP})["messages"]
    names = [each["function"]["name"] for each in body["tools"]]
    assert names == [each["name"] for each in CLAUDE_CODE["tools"]]
    assert (body["max_completion_tokens"], received.query) == (32000, "")
    assert not [name for name in received.headers if name.startswith(("anthropic", "x-"))]
    names = {name.strip() for name in answer.headers["x-gateway-lost"].split(",")}
    assert names >= {"cache_control", "context_management"}


def test_claude_code_may_be_held_to_the_hints(gateway: Gateway, upstream: Upstream) -> None:
    """What it always sends, a model that thinks takes, or it is but a hint."""
    upstream.script(wire.answer(choice("Hi.")))
    asked = {**CLAUDE_CODE, "model": "fast", "max_tokens": 32000}
    assert post(gateway, asked, **STRICT["extra_headers"]).status_code == 200


def test_the_search_of_claude_code_is_answered(gateway: Gateway, upstream: Upstream) -> None:
    upstream.script(wire.answer(choice("I cannot search.")))
    asked = {"model": "fast", "max_tokens": 9, "messages": [user("Search.")], "stream": True}
    answer = post(gateway, {**asked, "tools": [SEARCH], "tool_choice": {"type": "auto"}})
    assert answer.status_code == 200 and "web_search" in answer.headers["x-gateway-lost"]
    assert "tools" not in upstream.take().json


def test_claude_code_compacts_a_history_without_tools(
    once: AskClaude, upstream: Upstream
) -> None:
    """Anthropic wants tools where calls are in the history; OpenAI does not."""
    upstream.script(wire.answer(choice("A summary.")))
    once(messages=[user("Hi"), TWO, user([result("t1", "a"), result("t2", "b"), text("Sum up.")])])
    assert "tools" not in upstream.take().json


# ---- answers ----

CITIES = call("call_1", "get_weather", city="Zürich"), call("functions.time:2", "time")
USED = [used("call_1", "get_weather", city="Zürich"), used("functions.time:2", "time")]
ASKED = {"thinking": {"type": "adaptive", "display": "summarized"}}
UNSIGNED = {"type": "thinking", "thinking": "Let me see.", "signature": ""}
# What is asked, what the model says, and what Anthropic's message has of it.
ANSWERS: dict[str, tuple[JSON, JSON, list[JSON], str]] = {
    "text": ({}, choice("Hello, you 😀\u2028!"), [text("Hello, you 😀\u2028!")], "end_turn"),
    "nothing": ({}, choice(None), [], "end_turn"),
    "empty": ({}, choice(""), [], "end_turn"),
    "cut": ({}, choice("One", finish="length"), [text("One")], "max_tokens"),
    "filter": ({}, choice("One", finish="content_filter"), [text("One")], "refusal"),
    "refusal": ({}, choice(None, refusal="I cannot."), [text("I cannot.")], "refusal"),
    "calls": (TOOLS, choice(None, *CITIES), USED, "tool_use"),
    "text and calls": (TOOLS, choice("I look.", *CITIES), [text("I look."), *USED], "tool_use"),
    "calls that stop": (TOOLS, choice(None, *CITIES, finish="stop"), USED, "tool_use"),
    "thought asked for": (
        ASKED,
        choice("Hello.", reasoning="Let me see."),
        [UNSIGNED, text("Hello.")],
        "end_turn",
    ),
    "thought and calls": (
        {**ASKED, **TOOLS},
        choice(None, *CITIES, reasoning="Let me see."),
        [UNSIGNED, *USED],
        "tool_use",
    ),
    "thought not asked for": (
        {},
        choice("Hello.", reasoning="Let me see."),
        [text("Hello.")],
        "end_turn",
    ),
    "thought refused": (
        {"thinking": {"type": "disabled"}},
        choice("Hello.", reasoning="Let me see."),
        [text("Hello.")],
        "end_turn",
    ),
}


def plain(block: JSON) -> JSON:
    """Leave out what an answer need not say of a block, and who calls a tool, which it must."""
    caller = {"type": "direct"} if block["type"] == "tool_use" else None
    assert block.get("caller") == caller
    return {key: value for key, value in block.items() if value is not None and key != "caller"}


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("params, told, wanted, stop", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_becomes_one_of_anthropics(
    ask: AskClaude,
    upstream: Upstream,
    model: str,
    params: JSON,
    told: JSON,
    wanted: list[JSON],
    stop: str,
) -> None:
    upstream.script(wire.answer(told))
    message = ask(model=model, **params)
    assert [plain(block.to_dict()) for block in message.content] == wanted
    assert (message.stop_reason, message.stop_sequence, message.model) == (stop, None, model)
    assert (message.type, message.role, bool(message.id)) == ("message", "assistant", True)
    assert ask.headers["request-id"] == "req_upstream"


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("params, told, wanted, stop", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_is_in_anthropics_own_types(
    gateway: Gateway,
    upstream: Upstream,
    model: str,
    params: JSON,
    told: JSON,
    wanted: list[JSON],
    stop: str,
) -> None:
    """No field is there that Anthropic's SDK does not name, and none is missing."""
    upstream.script(*[wire.answer(told)] * 2)
    asked = {"model": model, "max_tokens": 9, "messages": [user("Hi")], **params}
    anthropic_wire.read_message(post(gateway, asked).content)
    streamed = post(gateway, {**asked, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.content)
    check_order(events)
    shown = [each["content_block"] for each in events if each["type"] == "content_block_start"]
    assert [block["type"] for block in shown] == [block["type"] for block in wanted]
    assert events[-2]["delta"]["stop_reason"] == stop


WRITTEN = {**wire.USAGE, "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 4}}
# What the upstream counts, and what of it the client sees: new, read, written, told, thought.
USAGES: dict[str, tuple[JSON | None, tuple[int, ...]]] = {
    "cache read": (wire.USAGE, (11, 8, 0, 10, 4)),
    "cache written": (WRITTEN, (7, 8, 4, 10, 4)),
    "bare": ({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}, (3, 0, 0, 2, 0)),
    "none": (None, ()),
}


@pytest.mark.parametrize("counted, wanted", USAGES.values(), ids=USAGES)
def test_usage_is_told_and_counted(
    ask: AskClaude, gateway: Gateway, upstream: Upstream, counted: JSON, wanted: tuple[int, ...]
) -> None:
    grown = gateway.counting()
    upstream.script(wire.answer(choice("Hello, and so on."), usage=counted))
    usage = ask(model="home").usage
    thought = usage.output_tokens_details and usage.output_tokens_details.thinking_tokens
    read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    told = (usage.input_tokens, read, written, usage.output_tokens, thought)
    line = gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert line["usage"] == ("reported" if counted else "estimated")
    guess = int(line["prompt_tokens"]), 0, 0, int(line["completion_tokens"]), 0
    assert tuple(number or 0 for number in told) == (wanted if counted else guess)
    assert min(guess[0], guess[3]) > 0
    labels = {"virtual_key": "interop", "provider": "local", "model": "home"}
    assert grown("llm_requests_total", status="200", **labels) == 1
    assert grown("llm_usage_estimated_total", provider="local") == (not counted)
    if counted:
        prompt = counted["prompt_tokens"]
        assert grown("llm_tokens_total", direction="prompt", **labels) == prompt
        assert grown("llm_tokens_total", direction="completion", **labels) == wanted[3]
        assert grown("llm_token_details_total", kind="cache_read", **labels) == wanted[1]


def test_a_stream_starts_with_a_guess_and_ends_with_the_truth(
    client: Anthropic, upstream: Upstream
) -> None:
    upstream.script(wire.answer(choice("Hello.")))
    asked: Any = {"model": "fast", "max_tokens": 9, "messages": [user("word " * 90)]}
    start, *_, delta, _ = client.messages.create(**asked, stream=True)
    assert start.type == "message_start" and start.message.usage.input_tokens >= 90
    assert start.message.model == "fast"
    assert delta.type == "message_delta" and delta.usage.input_tokens == 11
    assert (delta.usage.cache_read_input_tokens, delta.usage.output_tokens) == (8, 10)


# ---- how other servers speak ----

TOLD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def chunk(finish: str | None = None, usage: JSON | None = None, **delta: Any) -> JSON:
    step = {"index": 0, "delta": delta, "finish_reason": finish}
    return {**TOLD, "choices": [step], **({"usage": usage} if usage else {})}


def fragment(index: int | None = None, told: str = "", *named: str) -> JSON:
    """Return a piece of a call; `named` is the id and the name, which open one."""
    place = {} if index is None else {"index": index}
    if not named:
        return {**place, "function": {"arguments": told}}
    head = {"id": named[0], "type": "function"}
    return {**place, **head, "function": {"name": named[1], "arguments": told}}


def calls(*fragments: JSON) -> JSON:
    return chunk(tool_calls=list(fragments))


A, B = used("a", "f", x=1), used("b", "g", y=2)
DONE = chunk("tool_calls")
# The chunks of a stream that other servers send, and the blocks and the end that they spell.
ODD_STREAMS: dict[str, tuple[list[JSON], list[JSON], str]] = {
    "at once": (
        [calls(fragment(0, '{"x":1}', "a", "f")), calls(fragment(1, '{"y":2}', "b", "g")), DONE],
        [A, B],
        "tool_use",
    ),
    "in one chunk": (
        [calls(fragment(0, '{"x":1}', "a", "f"), fragment(1, '{"y":2}', "b", "g")), DONE],
        [A, B],
        "tool_use",
    ),
    "interleaved": (
        [
            calls(fragment(0, "", "a", "f"), fragment(1, "", "b", "g")),
            *(calls(fragment(1, '{"y"')), calls(fragment(0, '{"x"'))),
            *(calls(fragment(1, ":2}")), calls(fragment(0, ":1}")), DONE),
        ],
        [A, B],
        "tool_use",
    ),
    "no index": (
        [
            *(calls(fragment(None, '{"x"', "a", "f")), calls(fragment(None, ":1}"))),
            *(calls(fragment(None, '{"y":2}', "b", "g")), DONE),
        ],
        [A, B],
        "tool_use",
    ),
    "no arguments": ([calls(fragment(0, "", "a", "f")), DONE], [used("a", "f")], "tool_use"),
    "stop after calls": (
        [calls(fragment(0, '{"x":1}', "a", "f")), chunk("stop")],
        [A],
        "tool_use",
    ),
    "text after calls": (
        [calls(fragment(0, '{"x":1}', "a", "f")), chunk(content="So."), DONE],
        [A, text("So.")],
        "tool_use",
    ),
    "thought and text in one chunk": (
        [chunk(reasoning_content="Hm.", content="Yes."), chunk("stop")],
        [{"type": "thinking", "thinking": "Hm.", "signature": ""}, text("Yes.")],
        "end_turn",
    ),
    "usage with the end": ([chunk(content="Yes."), chunk("stop", wire.USAGE)], [text("Yes.")],
                           "end_turn"),
    "end with the text": ([chunk("stop", content="Yes.")], [text("Yes.")], "end_turn"),
    "unknown end": ([chunk(content="Yes."), chunk("eos")], [text("Yes.")], "end_turn"),
    "no end named": ([chunk(content="Yes.")], [text("Yes.")], "max_tokens"),
    "a chunk without choices": (
        [{**TOLD, "choices": []}, chunk(content="Yes."), chunk("stop")],
        [text("Yes.")],
        "end_turn",
    ),
}


@pytest.mark.parametrize("told, wanted, stop", ODD_STREAMS.values(), ids=ODD_STREAMS)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_odd_streams_are_read(
    ask: AskClaude, upstream: Upstream, told: list[JSON], wanted: list[JSON], stop: str
) -> None:
    upstream.script(sse_reply([*told, "[DONE]"], "whole", named=False))
    message = ask(model="home", **ASKED, **TOOLS)
    key = "type", "text"
    blocks = [plain(block.to_dict()) for block in message.content]
    assert sorted(blocks, key=lambda block: block["type"] == key[1]) == sorted(
        wanted, key=lambda block: block["type"] == key[1]
    )
    assert message.stop_reason == stop


@pytest.mark.parametrize("told", [told for told, _, _ in ODD_STREAMS.values()], ids=ODD_STREAMS)
def test_odd_streams_come_in_order(gateway: Gateway, upstream: Upstream, told: list[JSON]) -> None:
    upstream.script(sse_reply([*told, "[DONE]"], "whole", named=False))
    asked = {"model": "home", "max_tokens": 9, "messages": [user("Hi")], **ASKED, "stream": True}
    check_order(events_of(post(gateway, asked).content))


def odd_answer(told: JSON) -> Answer:
    """Answer as OpenAI does, with a choice that it would not give."""

    def reply(received: Any) -> Reply:
        whole = wire.completion(told)
        if not received.json.get("stream"):
            return json_reply(whole)
        return sse_reply([*wire.chunks(whole, True), "[DONE]"], "whole", named=False)

    return reply


def test_a_call_without_an_id_gets_one(ask: AskClaude, upstream: Upstream) -> None:
    nameless = [{**call("", "time"), "id": None}, {**call("", "time"), "id": ""}]
    upstream.script(odd_answer(choice(None, *nameless)))
    ids = [block.id for block in ask(model="home", **TOOLS).content]
    assert all(ids) and len(set(ids)) == 2


BROKEN = call("c1", "time")
BROKEN["function"]["arguments"] = '{"a": 1'


def test_broken_arguments_are_the_upstreams_fault(ask: AskClaude, upstream: Upstream) -> None:
    """In a stream the pieces are out before it shows."""
    upstream.script(wire.answer(choice(None, BROKEN)))
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(model="home", **TOOLS)
    assert caught.value.type == "api_error"
    assert ask.is_stream or caught.value.status_code == 502


@pytest.mark.parametrize("finish", ["error", "abort"])
def test_an_end_that_is_a_failure_is_one(ask: AskClaude, upstream: Upstream, finish: str) -> None:
    upstream.script(odd_answer(choice("Half", finish=finish)))
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(model="home")
    assert caught.value.type == "api_error"


LISTED = [text("Yes.")]
OBJECT = {"index": 0, **call("a", "f")}
OBJECT["function"]["arguments"] = {"city": "Bern"}
# A choice that has what no table names, as a message and as a delta.
UNREADABLE: dict[str, tuple[JSON, str]] = {
    "content in parts": ({"content": LISTED}, "Yes."),
    "arguments as an object": ({"content": None, "tool_calls": [OBJECT]}, "Bern"),
}


@pytest.mark.parametrize("said, word", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_cannot_be_read_is_not_swallowed(
    gateway: Gateway, upstream: Upstream, is_stream: bool, said: JSON, word: str
) -> None:
    """It is read, or it is the upstream's fault; an empty answer would be a lie."""
    told = {**TOLD, "choices": [{"index": 0, "message": said, "finish_reason": "stop"}]}
    events = [chunk(**said), chunk("stop"), "[DONE]"]
    upstream.script(sse_reply(events, "whole", named=False) if is_stream else json_reply(told))
    asked = {"model": "home", "max_tokens": 9, "messages": [user("Hi")], "stream": is_stream}
    answer = post(gateway, asked)
    is_error = '"type":"error"' in answer.text.replace(" ", "")
    assert word in answer.text or is_error


# ---- several turns ----

FIRST = choice("I look.", call("call_1", "get_weather", city="Zürich"), call("call_2", "time"))
SECOND = choice(None, call("call_3", "get_weather", city="Chur"))


def script_loop(upstream: Upstream) -> None:
    upstream.script(*map(wire.answer, (FIRST, SECOND, choice("Sun."))))


def check_loop(upstream: Upstream) -> None:
    """The judge sees to the order of the results; what was said is said again in the same words."""
    first, second, third = (spelled_out(upstream.take().json)["messages"] for _ in range(3))
    assert (second[: len(first)], third[: len(second)]) == (first, second)
    assert second[len(first) :] == [
        called(*FIRST["message"]["tool_calls"], content="I look."),
        *(tool("call_1", "rain"), tool("call_2", "noon")),
    ]
    assert third[len(second) :] == [
        called(*SECOND["message"]["tool_calls"]),
        tool("call_3", "rain"),
    ]


@pytest.mark.parametrize("model", ROUTES)
def test_a_tool_loop(ask: AskClaude, upstream: Upstream, model: str) -> None:
    results = {"get_weather": "rain", "time": "noon"}
    messages: list[Any] = [user("Where is it sunny?")]
    script_loop(upstream)
    params = {"model": model, "messages": messages, **TOOLS, **ASKED}
    while (told := ask(**params)).stop_reason == "tool_use":
        made = [block for block in told.content if block.type == "tool_use"]
        messages.append({"role": "assistant", "content": told.content})
        messages.append(user([result(each.id, results[each.name]) for each in made]))
    assert told.content[0].text == "Sun."
    check_loop(upstream)


def runner_params(model: str, stream: bool, tools: list[Any]) -> JSON:
    """It first asks for a thread that the server keeps, and goes on without one."""
    asked = {"model": model, "max_tokens": 2000, "messages": [user("Where is it sunny?")]}
    return {**asked, "tools": tools, "stream": stream}


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner(client: Anthropic, upstream: Upstream, model: str, stream: bool) -> None:
    @beta_tool
    def get_weather(city: str) -> str:
        """Tell the weather."""
        assert city in ("Zürich", "Chur")
        return "rain"

    @beta_tool
    def time() -> str:
        """Tell the time."""
        return "noon"

    script_loop(upstream)
    params = runner_params(model, stream, [get_weather, time])
    runner: Any = client.beta.messages.tool_runner(**params)
    assert runner.until_done().content[0].text == "Sun."
    check_loop(upstream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_async(gateway: Gateway, upstream: Upstream, stream: bool) -> None:
    @beta_async_tool
    async def get_weather(city: str) -> str:
        """Tell the weather."""
        assert city in ("Zürich", "Chur")
        return "rain"

    @beta_async_tool
    async def time() -> str:
        """Tell the time."""
        return "noon"

    async def run() -> Any:
        async with AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
            params = runner_params("fast", stream, [get_weather, time])
            return await client.beta.messages.tool_runner(**params).until_done()

    script_loop(upstream)
    assert asyncio.run(run()).content[0].text == "Sun."
    check_loop(upstream)


class Place(BaseModel):
    name: str
    heights: list[int]


@pytest.mark.parametrize("model", ROUTES)
def test_parse_reads_structured_output(client: Anthropic, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871])
    upstream.script(wire.answer(choice(place.model_dump_json())))
    asked: Any = {"model": model, "max_tokens": 99, "messages": [user("Where?")]}
    assert client.messages.parse(**asked, output_format=Place).parsed_output == place
    form = upstream.take().json["response_format"]["json_schema"]
    assert form["schema"]["properties"].keys() == {"name", "heights"}


# ---- heads ----


def test_only_what_openai_understands_is_sent(client: Anthropic, upstream: Upstream) -> None:
    kept = {"idempotency-key": "i1", "traceparent": "00-0af7-b7ad-01"}
    head = {**kept, "x-app": "cli", "cookie": "a=b", "openai-organization": "org-1"}
    upstream.script(*[wire.answer(choice("Hi"))] * 2)
    for model in ROUTES:
        asked: Any = {"model": model, "max_tokens": 9, "messages": [user("Hi")]}
        client.beta.messages.create(**asked, betas=["a-2026-01-01"], extra_headers=head)
        received = upstream.take()
        got = received.headers
        assert {name: got[name] for name in kept} == kept and received.query == ""
        own = ("anthropic-", "x-", "openai-", "cookie")
        assert not [name for name in got if name.lower().startswith(own)]
        assert KEY not in str(got)
        assert got.getall("authorization", []) == [f"Bearer {UPSTREAM_KEY}"] * (model == "fast")


# ---- errors ----

BAD, TOO_LONG = "invalid_request_error", "context_length_exceeded"
# What OpenAI answers (status, type, code), and the status and the type that its client sees.
ERRORS: dict[str, tuple[int, str, str | None, int, str]] = {
    "bad": (400, BAD, None, 400, BAD),
    "too long": (400, BAD, TOO_LONG, 400, BAD),
    "forbidden": (403, "request_forbidden", "unsupported_country", 403, "permission_error"),
    "unknown model": (404, BAD, "model_not_found", 404, "not_found_error"),
    "late": (408, "timeout", None, 504, "timeout_error"),
    "conflict": (409, BAD, None, 409, "conflict_error"),
    "too large": (413, BAD, None, 413, "request_too_large"),
    "odd": (422, BAD, None, 422, BAD),
    "rate": (429, "tokens", "rate_limit_exceeded", 429, "rate_limit_error"),
    "quota": (429, "insufficient_quota", "insufficient_quota", 429, "rate_limit_error"),
    "failed": (500, "server_error", None, 500, "api_error"),
    "bad gateway": (502, "server_error", None, 502, "api_error"),
    "late gateway": (504, "server_error", None, 504, "timeout_error"),
}


def failure(kind: str | None, code: Any = None) -> JSON:
    return {"error": {"message": "Not now.", "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize("status, kind, code, seen, seen_kind", ERRORS.values(), ids=ERRORS)
def test_an_error_becomes_one_of_anthropics(
    ask: AskClaude,
    upstream: Upstream,
    status: int,
    kind: str,
    code: str | None,
    seen: int,
    seen_kind: str,
) -> None:
    head = {"retry_after": "7", "retry_after_ms": "7000", "x_request_id": "req_e"}
    upstream.script(json_reply(failure(kind, code), status, **head))
    with pytest.raises(anthropic.APIStatusError, match=r"Not now\.") as caught:
        ask()
    told = caught.value
    body: Any = told.body
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert (told.status_code, told.type, told.request_id) == (seen, seen_kind, "req_e")
    given = told.response.headers
    assert (given["retry-after"], given["retry-after-ms"]) == ("7", "7000")
    is_long = body["error"]["message"].lower().startswith("prompt is too long")
    assert is_long == (code == TOO_LONG), "Claude Code compacts where it reads these words"


def test_an_overloaded_upstream_is_one(ask: AskClaude, upstream: Upstream) -> None:
    upstream.script(json_reply(failure("server_error"), 503, retry_after="7"))
    with pytest.raises(anthropic.APIStatusError, match="Not now.") as caught:
        ask()
    told = (caught.value.status_code, caught.value.type)
    assert told in ((529, "overloaded_error"), (503, "api_error"), (503, "overloaded_error"))


@pytest.mark.parametrize("status", [401, 402])
def test_a_refused_upstream_key_is_a_502_tried_once(
    ask: AskClaude, upstream: Upstream, status: int
) -> None:
    ask.options["max_retries"] = 5
    upstream.script(wire.error(status, f"Incorrect API key: {UPSTREAM_KEY}.", "invalid_api_key"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask()
    error, response = caught.value, caught.value.response
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    assert error.type == "api_error" and "Incorrect API key" not in response.text
    upstream.take()
    assert upstream.is_idle


def test_an_error_that_is_not_json_is_wrapped(ask: AskClaude, upstream: Upstream) -> None:
    upstream.script(Reply([b"<h1>Bad Gateway</h1>"], 502, {"content-type": "text/html"}))
    with pytest.raises(anthropic.InternalServerError, match="Bad Gateway") as caught:
        ask()
    check_own_error(caught.value, 502, "api_error")


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1]", b'{"choices":[]}', b'{"choices":1}'])
def test_a_success_that_is_no_answer_is_a_502(
    once: AskClaude, upstream: Upstream, body: bytes
) -> None:
    upstream.script(Reply([body]))
    with pytest.raises(anthropic.InternalServerError) as caught:
        once()
    assert (caught.value.status_code, caught.value.type) == (502, "api_error")


@pytest.mark.parametrize("manner", ["sync", "sync stream"])
def test_a_late_upstream_is_a_504(launch: Launch, upstream: Upstream, manner: str) -> None:
    gateway = launch(timeouts={"first_token": 0.2, "total": 0.2})
    upstream.script(Reply([], end="mute"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        AskClaude(gateway, manner)()
    check_own_error(caught.value, 504, "timeout_error")
    assert upstream.take().left.wait(1)


@pytest.mark.parametrize("status", [409, 429, 500, 503])
def test_the_sdk_tries_again(ask: AskClaude, upstream: Upstream, status: int) -> None:
    ask.options["max_retries"] = 2
    failure = wire.error(status, "Not now.", retry_after_ms="1")
    upstream.script(failure, failure, wire.answer(choice("Now.")))
    assert ask().content[0].text == "Now."


# ---- streams that go wrong ----


STARTED = wire.chunks(wire.completion(choice("Hello, and so on.", reasoning="Hm.")), False)[:5]
HELLO: JSON = {"max_tokens": 9, "messages": [user("Hi")], "stream": True, **ASKED}
# How a stream goes wrong after its 200, and the type of the error that its client sees.
ENDS: dict[str, tuple[Reply, str]] = {
    "connection cut": (wire.stream(*STARTED, end="cut"), "api_error"),
    "clean end too early": (wire.stream(*STARTED), "api_error"),
    "no [DONE]": (wire.stream(*STARTED, wire.chunks(wire.completion(choice("")), False)[-1]),
                  "api_error"),
    "failed": (wire.stream(*STARTED, failure("server_error")), "api_error"),
    "overloaded": (wire.stream(*STARTED, failure("overloaded_error")), "overloaded_error"),
    "too many": (
        wire.stream(*STARTED, failure("tokens", "rate_limit_exceeded")),
        "rate_limit_error",
    ),
    "of no known type": (wire.stream(*STARTED, failure(None, 500)), "api_error"),
    "no JSON": (wire.stream(*STARTED, "{"), "api_error"),
}


@pytest.mark.parametrize("model", ROUTES)
@pytest.mark.parametrize("reply, kind", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_ends_in_one_error(
    gateway: Gateway, upstream: Upstream, model: str, reply: Reply, kind: str
) -> None:
    grown = gateway.counting()
    upstream.script(reply)
    answer = post(gateway, {**HELLO, "model": model})
    events = events_of(answer.content)
    kinds = [event["type"] for event in events]
    assert (answer.status_code, kinds[0], kinds[-1]) == (200, "message_start", "error")
    assert kinds.count("error") == 1 and not {"message_delta", "message_stop"} & set(kinds)
    error = events[-1]["error"]
    assert (error.keys(), error["type"]) == ({"type", "message"}, kind)
    gateway.logged(request_id=answer.headers["x-gateway-id"])
    assert grown("llm_provider_errors_total") == 1
    assert grown("llm_requests_total", status="200") == 0


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("reply, kind", ENDS.values(), ids=ENDS)
def test_the_sdk_raises_where_a_stream_breaks(
    ask: AskClaude, upstream: Upstream, reply: Reply, kind: str
) -> None:
    upstream.script(reply)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask()
    assert caught.value.type == kind


@pytest.mark.parametrize("kind, code, status, seen", [
    ("server_error", None, 500, "api_error"),
    ("tokens", "rate_limit_exceeded", 429, "rate_limit_error"),
    ("insufficient_quota", "insufficient_quota", 429, "rate_limit_error"),
    ("invalid_request_error", "context_length_exceeded", 400, BAD),
])
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_event_is_a_real_status(
    ask: AskClaude, upstream: Upstream, kind: str, code: str | None, status: int, seen: str
) -> None:
    upstream.script(wire.stream(failure(kind, code)))
    with pytest.raises(anthropic.APIStatusError, match="Not now.") as caught:
        ask()
    assert (caught.value.status_code, caught.value.type) == (status, seen)


def test_an_error_after_content_is_told_in_the_stream(
    client: Anthropic, upstream: Upstream
) -> None:
    go = threading.Event()
    upstream.script(replace(wire.stream(*STARTED, failure("overloaded_error")), last_after=go))
    stream: Any = client.messages.create(**{**HELLO, "model": "fast"})
    while next(stream).type != "content_block_delta":
        pass
    go.set()
    with pytest.raises(anthropic.APIStatusError, match="Not now.") as caught:
        list(stream)
    assert caught.value.type == "overloaded_error"


def test_what_is_said_is_told_at_once(client: Anthropic, upstream: Upstream) -> None:
    """No text waits for the next: the last piece comes only when the one before was seen."""
    go = threading.Event()
    told = [*STARTED, *wire.chunks(wire.completion(choice("")), True)[-2:], "[DONE]"]
    upstream.script(replace(wire.stream(*told), last_after=go))
    stream: Any = client.messages.create(**{**HELLO, "model": "fast"})
    seen = ""
    while not seen:
        event = next(stream)
        is_text = event.type == "content_block_delta" and event.delta.type == "text_delta"
        seen += event.delta.text if is_text else ""
    go.set()
    assert list(stream)[-1].type == "message_stop"


def test_a_client_that_leaves_takes_the_upstream_with_it(
    client: Anthropic, gateway: Gateway, upstream: Upstream
) -> None:
    grown = gateway.counting()
    upstream.script(wire.stream(*STARTED, end="stall"))
    stream: Any = client.messages.create(**{**HELLO, "model": "fast"})
    next(stream)
    stream.close()
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(request_id=stream.response.headers["x-gateway-id"], status=499)
    assert grown("llm_requests_total", provider="openai", status="499") == 1
    assert grown("llm_usage_estimated_total", provider="openai") == 1


# ---- counting tokens ----

COUNTED: JSON = {"messages": [user("word " * 300)], "system": "Be brief."}
# What is counted, and the least that it must come to: a model's tokens are seldom shorter.
COUNTS: dict[str, tuple[JSON, int]] = {
    "text": (COUNTED, 500),
    "umlauts": ({"messages": [user("ä" * 300)]}, 200),
    "messages": ({"messages": [user("a"), said("b")] * 20 + [user("c")]}, 41 * 8),
    "tools": ({**COUNTED, **TOOLS}, 560),
    "images": ({"messages": [user([picture(PIXEL), FAR_PICTURE])]}, 3200),
    "images of tools": (answered(result("t1", [picture(PIXEL)]), result("t2")), 1600),
    "thinking": ({**COUNTED, "thinking": {"type": "adaptive"}}, 500),
    "hosted tools": ({**COUNTED, "tools": [SEARCH]}, 500),
    "a result": (answered(result("t1", "word " * 300), result("t2")), 500),
}


@pytest.mark.parametrize("model", [*ROUTES, "gpt-5.5"])
@pytest.mark.parametrize("asked, least", COUNTS.values(), ids=COUNTS)
def test_tokens_are_estimated_on_the_high_side(
    client: Anthropic, gateway: Gateway, upstream: Upstream, model: str, asked: Any, least: int
) -> None:
    grown = gateway.counting()
    for namespace in (client.messages, client.beta.messages):
        answer = namespace.with_raw_response.count_tokens(model=model, **asked)
        assert least <= answer.parse().input_tokens <= 3 * least
        assert answer.headers["x-gateway-estimate"] == "input_tokens"
        assert answer.headers["request-id"] == answer.headers["x-gateway-id"]
    assert upstream.is_idle
    assert (grown("llm_tokens_total"), grown("llm_requests_total")) == (0, 2), "none generated"


def test_a_count_may_be_asked_for_as_claude_code_does(gateway: Gateway) -> None:
    """It asks for each tool alone, and for all with a word, many at once."""
    asked = {"model": "fast", "messages": [user("foo")], "tools": CLAUDE_CODE["tools"]}
    url = f"{gateway.url}/v1/messages/count_tokens?beta=true"
    answers = [httpx2.post(url, json=asked, headers=CLAUDE_CODE_HEAD) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json().keys() == {"input_tokens"}


# A body that cannot be counted, and the status and the type of what it gets.
UNCOUNTABLE: dict[str, tuple[JSON, int, str]] = {
    "no messages": ({"model": "fast"}, 400, BAD),
    "odd messages": ({"model": "fast", "messages": "Hi"}, 400, BAD),
    "odd role": ({"model": "fast", "messages": [{"role": "x", "content": "a"}]}, 400, BAD),
    "unknown model": ({"model": "x", "messages": [user("Hi")]}, 404, "not_found_error"),
}


@pytest.mark.parametrize("body, status, kind", UNCOUNTABLE.values(), ids=UNCOUNTABLE)
def test_what_cannot_be_counted_is_an_error(
    gateway: Gateway, body: JSON, status: int, kind: str
) -> None:
    url = f"{gateway.url}/v1/messages/count_tokens"
    answer = httpx2.post(url, json=body, headers=CLAUDE_CODE_HEAD)
    told = answer.json()
    assert (answer.status_code, told["type"], told["error"]["type"]) == (status, "error", kind)


def test_tokens_are_counted_async(gateway: Gateway) -> None:
    async def count() -> int:
        async with AsyncAnthropic(base_url=gateway.url, api_key=KEY) as client:
            counted = await client.messages.count_tokens(model="fast", messages=[user("Hi")])
            return counted.input_tokens

    assert asyncio.run(count()) >= 8


# ---- the judge ----


def function(**about: Any) -> JSON:
    return {"type": "function", "function": {"name": "f", **about}}


def modelled(name: str, **more: Any) -> JSON:
    return {"model": name, **more}


CALLED, HI, SAID = called(call("t1", "f")), user("Hi"), tool("t1", "r")
LONG = "x" * 65
# What is changed of a body that OpenAI takes, so that it breaks one rule.
REFUSED_BY_OPENAI: dict[str, JSON] = {
    "unknown field": {"top_k": 1},
    "unknown field of a message": {"messages": [{**HI, "cache_control": {"type": "ephemeral"}}]},
    "thoughts": {"messages": [HI, {**said("A"), "thinking_blocks": []}, HI]},
    "picture in a result": {"messages": [HI, CALLED, {**SAID, "content": [picture_part("a:")]}]},
    "no result": {"messages": [HI, CALLED, HI]},
    "a result missing": {"messages": [HI, called(call("t1", "f"), call("t2", "f")), SAID, HI]},
    "call at the end": {"messages": [HI, CALLED]},
    "result of nothing": {"messages": [HI, SAID]},
    "no content": {"messages": [HI, said(None)]},
    "empty content": {"messages": [user([])]},
    "no calls": {"messages": [HI, {**said("A"), "tool_calls": []}]},
    "picture": {"messages": [user([picture_part("data:image/bmp;base64,AA==")])]},
    "file": {"messages": [user([{"type": "file", "file": {"file_data": "data:text/plain,a"}}])]},
    "no tools": {"tools": []},
    "choice without tools": {"tool_choice": "none"},
    "parallel without tools": {"parallel_tool_calls": True},
    "choice": {"tools": [function()], "tool_choice": {**function(), "function": {"name": "g"}}},
    "name": {"tools": [function(name="a.b")]},
    "long name": {"tools": [function(name=LONG)]},
    "long id": {"messages": [HI, called(call(LONG, "f")), tool(LONG, "r")]},
    "schema": {"tools": [function(parameters={"type": "object"})]},
    "open schema": {"tools": [function(strict=True, parameters={**SCHEMA, "required": []})]},
    "open format": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "strict": True, "schema": NOTHING},
        }
    },
    "stops": {"stop": list("abcde")},
    "no stops": {"stop": []},
    "stop": modelled("o3", stop="a"),
    "stream options": {"stream_options": {"include_usage": True}},
    "user": {"user": LONG},
    "old cap": modelled("gpt-5", max_tokens=9),
    "effort": modelled("gpt-4.1", reasoning_effort="low"),
    "no effort": modelled("gpt-5", reasoning_effort="none"),
    "xhigh": modelled("gpt-5.1", reasoning_effort="xhigh"),
    "max": modelled("gpt-5.6", reasoning_effort="max"),
    "temperature": modelled("o1", temperature=0),
    "temperature while thinking": modelled("gpt-5.2", temperature=0, reasoning_effort="low"),
    "temperature, thinks by itself": modelled("gpt-5.5", temperature=0),
    "tools while thinking": modelled("gpt-5.4", tools=[function()], reasoning_effort="low"),
    "tools, thinks by itself": modelled("gpt-6", tools=[function()]),
}


@pytest.mark.parametrize("change", REFUSED_BY_OPENAI.values(), ids=REFUSED_BY_OPENAI)
def test_the_judge_of_openai_refuses(change: JSON) -> None:
    body = {"model": "gpt-4.1", "messages": [HI, CALLED, SAID], "temperature": 1}
    assert list(wire.judge_body(body)) == []
    assert len(list(wire.judge_body({**body, **change}))) == 1


@pytest.mark.parametrize("name", ["llama-4", "qwen/3", "gpt-oss-120b"])
def test_the_judge_knows_nothing_of_other_models(name: str) -> None:
    odd = {"max_tokens": 9, "temperature": 0, "reasoning_effort": "max", "tools": [function()]}
    assert list(wire.judge_body({"model": name, "messages": [HI], **odd})) == []
