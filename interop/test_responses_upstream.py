"""The anthropic SDK, and the openai SDK's Chat Completions, through the gateway to a Responses
upstream: nothing lost, nothing invented, and all reasoning back where it stood.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import anthropic_wire
import httpx2
import openai
import openai_wire
import pytest
import responses_wire as wire
from drive import KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway
from openai_wire import PICTURE, PIXEL, SCHEMA, WEATHER, choice, user
from openai_wire import text as part
from pydantic import BaseModel
from responses_wire import function_call, message, reasoning, refusal
from test_anthropic_upstream import BOTH, FORMAT, HISTORY, PROLOGUE, STRICT, system
from test_messages import CLAUDE_CODE, CLAUDE_CODE_HEAD, AskClaude, check_own_error, picture
from test_messages import TIME as CLAUDE_TIME
from test_messages import WEATHER as CLAUDE_WEATHER
from upstream import JSON, Reply, Upstream, json_reply

THINKER, CLAUDE = "gpt-5.5", "claude-haiku-4-5"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    judges = {
        "/v1/responses": wire.judge_translated,
        "/v1/chat/completions": openai_wire.judge,
        "/v1/messages": anthropic_wire.judge,
    }
    server = Upstream(judges)
    yield server
    server.close()


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Stand in for the other suites' gateway."""

    def openais(model: str) -> JSON:
        return {"provider": "openai", "model": model, "wire": "responses"}

    config: JSON = {
        "providers": {
            "openai": {"api_key": UPSTREAM_KEY, "base_url": f"{upstream.url}/v1"},
            "anthropic": {"api_key": UPSTREAM_KEY, "base_url": upstream.url},
        },
        "models": {"fast": openais("gpt-5.2"), "deep": openais(THINKER), "old": openais("gpt-4.1")},
        "routing": [
            {"prefix": "gpt-", "provider": "openai"},
            {"prefix": "claude-", "provider": "anthropic"},
        ],
        "api_keys": [{"key": KEY, "app": "interop", "allowed_models": ["*"]}],
    }
    process = Gateway(config, tmp_path_factory.mktemp("gateway"))
    yield process
    process.stop()


@pytest.fixture(params=MANNERS)
def ask_claude(request: pytest.FixtureRequest, gateway: Gateway) -> AskClaude:
    return AskClaude(gateway, request.param)


def lost(ask: Ask) -> set[str]:
    return {name.strip() for name in ask.headers.get("x-gateway-lost", "").split(",")} - {""}


# ---- requests ----


def said(content: Any) -> JSON:
    return {"role": "assistant", "content": content}


def input_text(told: str) -> JSON:
    return {"type": "input_text", "text": told}


def input_image(url: str, detail: str = "auto") -> JSON:
    return {"type": "input_image", "image_url": url, "detail": detail}


def asked(*told: str) -> JSON:
    return user(list(map(input_text, told)))


def called(call_id: str, name: str, **arguments: Any) -> JSON:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output(call_id: str, told: Any) -> JSON:
    return {"type": "function_call_output", "call_id": call_id, "output": told}


def spelled_out(body: JSON) -> JSON:
    """Return the body with what may be spelled in several ways spelled in one.

    Contents are parts, arguments are objects, roles of the system are one; what the server fills
    in by itself is left out of items.
    """

    def parts(role: str, content: Any) -> Any:
        kind = "output_text" if role == "assistant" else "input_text"
        content = [{"type": kind, "text": content}] if isinstance(content, str) else content
        own = ("annotations", "logprobs")
        return [{key: part[key] for key in part if key not in own} for part in content]

    def item(told: JSON) -> JSON:
        kept = {key: told[key] for key in told if key not in ("id", "status")}
        if "role" in kept:
            role = "system" if kept["role"] == "developer" else kept["role"]
            return {"role": role, "content": parts(role, kept["content"])}
        if "arguments" in kept:
            kept["arguments"] = json.loads(kept["arguments"])
        if isinstance(kept.get("output"), str):
            kept["output"] = " ".join(kept["output"].split())
        return kept

    return {**body, "input": list(map(item, parts_of_input(body["input"])))}


def parts_of_input(told: Any) -> list[JSON]:
    return [user(told)] if isinstance(told, str) else told


def used(call_id: str, name: str, **arguments: Any) -> JSON:
    return anthropic_wire.tool_use(call_id, name, **arguments)


def result(call_id: str, content: Any, **more: Any) -> JSON:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def document(**source: str) -> JSON:
    return {"type": "document", "source": source, "title": "a.pdf"}


def effort(level: str, **more: Any) -> JSON:
    return {"thinking": {"type": "adaptive"}, "output_config": {"effort": level}, **more}


def budget(tokens: int) -> JSON:
    thinking = {"type": "enabled", "budget_tokens": tokens}
    return {"thinking": thinking, "max_tokens": 21_000}


GIF = f"data:image/gif;base64,{PIXEL}"
PDF = "data:application/pdf;base64,JVBERi0x"
FLAT_TIME = {"type": "function", "name": "time", "strict": False}
BILLING = part("x-anthropic-billing-header: cc_version=2.1.330.a1b; cc_entrypoint=sdk-cli;")
TOOLS = {"tools": [CLAUDE_WEATHER, CLAUDE_TIME]}
SEARCH_RESULT = {
    "type": "search_result",
    "source": "https://a.example",
    "title": "A page",
    "content": [part("It rains.")],
}
SHOWN = [part("Here."), picture(PIXEL)]
TURNS = [
    user("Weather?"),
    said([part("I look."), used("toolu_1", "get_weather", city="Bern"), used("toolu_2", "time")]),
    user(
        [
            result("toolu_1", SHOWN),
            result("toolu_2", "broken", is_error=True),
            part("Go on."),
        ]
    ),
]
ITEMS = [
    asked("Weather?"),
    said([{"type": "output_text", "text": "I look."}]),
    called("toolu_1", "get_weather", city="Bern"),
    called("toolu_2", "time"),
    output("toolu_1", [input_text("Here."), input_image(GIF)]),
    output("toolu_2", "Error: broken"),
    asked("Go on."),
]
FORMATTED = {"format": {"type": "json_schema", "schema": SCHEMA}}
USER_ID = {"metadata": {"user_id": "u-1"}}
# What is asked by Messages of which model, and what OpenAI must see of it.
CLAUDE_ASKS: dict[str, tuple[str, JSON, JSON]] = {
    "text": ("deep", {}, {"input": [asked("Hello")], "max_output_tokens": 2000}),
    "system": ("deep", {"system": "Be brief."}, {"instructions": "Be brief."}),
    "system blocks": (
        "deep",
        {"system": [BILLING, part("One."), part("Two.")]},
        {"instructions": "One.\n\nTwo."},
    ),
    "system later": (
        "deep",
        {"messages": [user("A"), system("Be brief."), user("B")]},
        {"input": [asked("A"), system([input_text("Be brief.")]), asked("B")]},
    ),
    "media": (
        "deep",
        {
            "messages": [
                user(
                    [
                        picture(PIXEL),
                        {"type": "image", "source": {"type": "url", "url": "https://a.b/a.png"}},
                        document(type="base64", media_type="application/pdf", data="JVBERi0x"),
                        {
                            "type": "document",
                            "source": {"type": "url", "url": "https://a.b/b.pdf"},
                        },
                        part("What?"),
                    ]
                )
            ]
        },
        {
            "input": [
                user(
                    [
                        input_image(GIF),
                        input_image("https://a.b/a.png"),
                        {"type": "input_file", "filename": "a.pdf", "file_data": PDF},
                        {"type": "input_file", "file_url": "https://a.b/b.pdf"},
                        input_text("What?"),
                    ]
                )
            ]
        },
    ),
    "history": ("deep", {"messages": TURNS, **TOOLS}, {"input": ITEMS}),
    "history without tools": ("deep", {"messages": TURNS}, {"input": ITEMS}),
    "tools": (
        "deep",
        {"tools": [{**CLAUDE_TIME, "type": "custom", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [FLAT_TIME]},
    ),
    "search": (
        "deep",
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "web_search"}]},
    ),
    "auto": ("deep", {**TOOLS, "tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
    "any": ("deep", {**TOOLS, "tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
    "none": ("deep", {**TOOLS, "tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    "named": (
        "deep",
        {**TOOLS, "tool_choice": {"type": "tool", "name": "time"}},
        {"tool_choice": {"type": "function", "name": "time"}},
    ),
    "one at a time": (
        "deep",
        {**TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"parallel_tool_calls": False},
    ),
    "small budget": (
        "deep",
        budget(2000),
        {"reasoning": {"effort": "low", "summary": "auto"}, "max_output_tokens": 21_000},
    ),
    "budget": ("deep", budget(5000), {"reasoning": {"effort": "medium", "summary": "auto"}}),
    "big budget": ("deep", budget(20_000), {"reasoning": {"effort": "high", "summary": "auto"}}),
    "effort": ("deep", effort("xhigh"), {"reasoning": {"effort": "xhigh", "summary": "auto"}}),
    "too much effort": (
        "deep",
        effort("max"),
        {"reasoning": {"effort": "xhigh", "summary": "auto"}},
    ),
    "disabled": (
        "deep",
        {"thinking": {"type": "disabled"}},
        {"reasoning": {"effort": "none"}},
    ),
    "old model": ("old", effort("high"), {"reasoning": None}),
    "format": (
        "deep",
        {"output_config": FORMATTED},
        {"text": {"format": {"type": "json_schema", "name": "output", "schema": SCHEMA}}},
    ),
    "small cap": ("deep", {"max_tokens": 9}, {"max_output_tokens": 16}),
    "tier": ("deep", {"service_tier": "standard_only"}, {"service_tier": "default"}),
}


def without_strict(value: Any) -> Any:
    """Leave out what is left to the gateway where the schema allows it."""
    if isinstance(value, list):
        return list(map(without_strict, value))
    if not isinstance(value, dict):
        return value
    return {key: without_strict(each) for key, each in value.items() if key != "strict"}


@pytest.mark.parametrize("model, params, wanted", CLAUDE_ASKS.values(), ids=CLAUDE_ASKS)
def test_what_messages_asks_becomes_a_request_that_openai_takes(
    ask_claude: AskClaude, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(wire.answer(message("{}")))
    told = ask_claude(model=model, **params)
    assert [block.to_dict()["text"] for block in told.content] == ["{}"]
    body = without_strict(spelled_out(upstream.take().json))
    for tool in body.get("tools", ()):
        tool.pop("parameters", None)
        tool.pop("description", None)
    assert {key: body.get(key) for key in wanted} == without_strict(wanted)
    assert bool(body.get("stream")) == ask_claude.is_stream


@pytest.mark.parametrize("ask_claude", MANNERS[:1], indirect=True)
def test_who_asks_is_said(ask_claude: AskClaude, upstream: Upstream) -> None:
    upstream.script(*[wire.answer(message("Hi"))] * 2)
    ask_claude(model="deep", metadata={"user_id": "u-1"})
    ask_claude(model="deep", metadata={"user_id": "u" * 200})
    names = ("user", "safety_identifier")
    first, second = (upstream.take().json for _ in range(2))
    assert "u-1" in [first.get(name) for name in names]
    assert all(len(second.get(name) or "") <= 128 for name in names)


@pytest.mark.parametrize("ask_claude", MANNERS[:1], indirect=True)
@pytest.mark.parametrize("model, kept", [("fast", 0.5), ("old", 0.5), ("deep", None)])
def test_sampling_is_for_models_that_do_not_reason(
    ask_claude: AskClaude, upstream: Upstream, model: str, kept: float | None
) -> None:
    upstream.script(wire.answer(message("Hi")))
    ask_claude(model=model, extra_body={"temperature": 0.5, "top_k": 4})
    assert upstream.take().json.get("temperature") == kept
    assert lost(ask_claude) == {"top_k"} | ({"temperature"} if kept is None else set())


@pytest.mark.parametrize("model", ["gpt-5.5", "gpt-5.2"])
def test_stops_go_to_chat(ask_claude: AskClaude, upstream: Upstream, model: str) -> None:
    """Responses has no stop; both names are routed, so no `wire` decides."""
    upstream.script(openai_wire.answer(choice("One")))
    assert ask_claude(model=model, stop_sequences=["END"]).content[0].text == "One"
    received = upstream.take()
    assert (received.path, received.json["stop"]) == ("/v1/chat/completions", ["END"])


def test_a_reasoning_model_is_asked_by_responses(ask_claude: AskClaude, upstream: Upstream) -> None:
    upstream.script(wire.answer(message("Hi")))
    assert ask_claude(model="gpt-5.5", **TOOLS).content[0].text == "Hi"
    assert upstream.take().path == "/v1/responses"


@pytest.mark.parametrize("ask_claude", MANNERS, indirect=True)
def test_long_names_and_ids_fit_and_come_back(ask_claude: AskClaude, upstream: Upstream) -> None:
    name, call_id = "mcp__" + "n" * 100, "toolu_" + "1" * 100

    def answered(received: Any) -> Reply:
        (tool,) = received.json["tools"]
        return wire.answer(function_call("call_9", tool["name"], a=1))(received)

    upstream.script(answered)
    turns = [user("A"), said([used(call_id, name)]), user([result(call_id, "b")])]
    tool = {**CLAUDE_TIME, "name": name}
    told = ask_claude(model="deep", messages=turns, tools=[tool])
    assert (told.content[0].id, told.content[0].name) == ("call_9", name)
    body = upstream.take().json
    (made,) = (item for item in body["input"] if item.get("type") == "function_call")
    assert made["name"] == body["tools"][0]["name"]


def test_claude_code_is_served(gateway: Gateway, upstream: Upstream) -> None:
    upstream.script(wire.answer(reasoning("Hm."), message("Hi.")))
    head = {**CLAUDE_CODE_HEAD, "accept-encoding": "identity"}
    url, body = f"{gateway.url}/v1/messages?beta=true", {**CLAUDE_CODE, "model": "deep"}
    answer = httpx2.post(url, json=body, headers=head, timeout=15)
    assert (answer.status_code, b"message_stop" in answer.content) == (200, True), answer.text
    sent = upstream.take().json
    names = [tool["name"] for tool in sent["tools"]]
    assert {"Bash", "ToolSearch", "CronList"} <= set(names)
    outputs = [item["output"] for item in sent["input"] if item.get("type", "").endswith("output")]
    assert "CronList" in json.dumps(outputs[0]), "a found tool is said to be there"
    assert "billing" not in json.dumps(sent)


# ---- answers for Messages ----

CALLS = function_call("call_1", "get_weather", city="Bern"), function_call("call_2", "time")
THINKS = {"thinking": {"type": "adaptive"}}
TOOL_USES = [("call_1", "get_weather", {"city": "Bern"}), ("call_2", "time", {})]
# What OpenAI says, and what of it Anthropic's message has.
ANSWERS: dict[str, tuple[JSON, JSON]] = {
    "text": (
        wire.response(message("Hello, ", "you 😀\u2028!")),
        {"text": "Hello, you 😀\u2028!", "stop": "end_turn"},
    ),
    "two messages": (
        wire.response(message("One. "), message("Two.")),
        {"text": "One. Two.", "stop": "end_turn"},
    ),
    "length": (
        wire.incomplete("max_output_tokens", message("One")),
        {"text": "One", "stop": "max_tokens"},
    ),
    "messages": (
        wire.incomplete("max_messages", message("One")),
        {"text": "One", "stop": "max_tokens"},
    ),
    "steered": (wire.incomplete("steered", message("One")), {"text": "One", "stop": "end_turn"}),
    "filter": (wire.incomplete("content_filter"), {"stop": "refusal"}),
    "refusal": (
        wire.response(message(refusal("No."))),
        {"text": "No.", "stop": "refusal"},
    ),
    "calls": (
        wire.response(message("I look."), *CALLS),
        {"text": "I look.", "calls": TOOL_USES, "stop": "tool_use"},
    ),
    "reasoning": (
        wire.response(reasoning("One.", "Two."), message("Yes.")),
        {"thoughts": ["One.Two."], "text": "Yes.", "stop": "end_turn"},
    ),
    "silent reasoning": (
        wire.response(reasoning(), *CALLS),
        {"thoughts": [""], "calls": TOOL_USES, "stop": "tool_use"},
    ),
    "hosted search": (
        wire.response(wire.searched("?"), message(wire.text("It rains.", "https://a.b"))),
        {"text": "It rains.", "stop": "end_turn"},
    ),
    "nothing": (wire.response(), {"stop": "end_turn"}),
}


def summed_up(told: Any) -> JSON:
    """Return what ANSWERS has of a message."""
    blocks = told.content
    thoughts = [block.thinking for block in blocks if block.type == "thinking"]
    summary = {
        "text": "".join(block.text for block in blocks if block.type == "text"),
        "thoughts": ["".join(each.split("\n")) for each in thoughts],
        "calls": [(each.id, each.name, each.input) for each in blocks if each.type == "tool_use"],
        "stop": told.stop_reason,
    }
    return {key: value for key, value in summary.items() if value}


@pytest.mark.parametrize("whole, wanted", ANSWERS.values(), ids=ANSWERS)
def test_a_response_becomes_a_message(
    ask_claude: AskClaude, gateway: Gateway, upstream: Upstream, whole: JSON, wanted: JSON
) -> None:
    grown = gateway.counting()
    upstream.script(wire.reply(whole))
    told = ask_claude(model="deep", **THINKS)
    assert summed_up(told) == wanted
    assert (told.model, told.role, told.type) == ("deep", "assistant", "message")
    usage = told.usage
    assert (usage.input_tokens, usage.output_tokens) == (12, 30)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (8, 4)
    assert usage.output_tokens_details.thinking_tokens == 20
    gateway.logged(request_id=ask_claude.headers["x-gateway-id"], status=200, usage="reported")
    assert grown("llm_tokens_total", provider="openai", model="deep", direction="prompt") == 24
    assert grown("llm_tokens_total", direction="completion") == 30


class Place(BaseModel):
    name: str
    heights: list[int]


@pytest.mark.parametrize("model", ["fast", "deep"])
def test_parse_reads_structured_output(ask: Ask, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871])
    upstream.script(wire.answer(message(place.model_dump_json())))
    told = ask(model=model, response_format=Place)
    assert told.choices[0].message.parsed == place
    form = upstream.take().json["text"]["format"]
    assert (form["type"], form["strict"]) == ("json_schema", True)


# ---- reasoning comes back ----

FIRST = [reasoning("Two things."), message("I look."), *CALLS]
SECOND = [reasoning(), function_call("call_3", "get_weather", city="Chur")]
# Two thoughts, each before the call that it led to.
APART = [reasoning("One."), CALLS[0], reasoning("Two."), CALLS[1]]
SCRIPTS = {"in front": [FIRST, SECOND], "apart": [APART, SECOND]}


def script_loop(upstream: Upstream, script: str) -> None:
    upstream.script(*[wire.answer(*said) for said in SCRIPTS[script]])
    upstream.script(wire.answer(message("Sun.")))


def check_loop(upstream: Upstream, script: str, forgets: bool) -> None:
    """The judge sees that reasoning is whole and where it stood; here, that it is there at all."""
    first, second, third = (upstream.take().json["input"] for _ in range(3))
    assert third[: len(second)] == second, "what was said is said in the same words again"
    kinds = [item.get("type", "message") for item in second[len(first) :]]
    made = [item["type"] for item in SCRIPTS[script][0]]
    made = [kind for kind in made if not forgets or kind != "reasoning"]
    assert kinds[: len(made)] == made
    outputs = [item for item in second if item.get("type") == "function_call_output"]
    assert [item["call_id"] for item in outputs] == ["call_1", "call_2"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps all", "drops thinking"])
def test_a_tool_loop_of_messages(
    ask_claude: AskClaude, upstream: Upstream, script: str, forgets: bool
) -> None:
    script_loop(upstream, script)
    messages: list[Any] = [user("Where is it sunny?")]
    params = {"model": "deep", "messages": messages, **TOOLS, **THINKS}
    while (told := ask_claude(**params)).stop_reason == "tool_use":
        kept = [block for block in told.content if not forgets or block.type != "thinking"]
        calls = [block for block in told.content if block.type == "tool_use"]
        messages += [said(kept), user([result(each.id, each.name) for each in calls])]
    assert told.content[0].text == "Sun."
    check_loop(upstream, script, forgets)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps all", "drops unknown fields"])
def test_a_tool_loop_of_chat(ask: Ask, upstream: Upstream, script: str, forgets: bool) -> None:
    script_loop(upstream, script)
    messages: list[Any] = [user("Where is it sunny?")]
    params = {"model": "fast", "messages": messages, "reasoning_effort": "low", **BOTH}
    while (told := ask(**params).choices[0].message).tool_calls:
        known = told.model_dump(include={"role", "content", "tool_calls"})
        messages.append(known if forgets else told)
        ids = [each.id for each in told.tool_calls]
        messages += [{"role": "tool", "tool_call_id": each, "content": each} for each in ids]
    assert told.content == "Sun."
    check_loop(upstream, script, forgets)


def test_reasoning_stays_with_its_issuer(ask_claude: AskClaude, upstream: Upstream) -> None:
    """The judge of Anthropic knows its own signatures, and would see any other."""
    upstream.script(wire.answer(*FIRST))
    upstream.script(anthropic_wire.answer(anthropic_wire.text("Sun.")))
    told = ask_claude(model="deep", **TOOLS, **THINKS)
    results = [result(each, each) for each in ("call_1", "call_2")]
    turns = [user("Hello"), said(told.content), user(results)]
    assert ask_claude(model=CLAUDE, messages=turns, **TOOLS).content[0].text == "Sun."
    upstream.take()
    kinds = [block["type"] for block in upstream.take().json["messages"][1]["content"]]
    assert kinds == ["text", "tool_use", "tool_use"]


# ---- Chat Completions ----


def flat(tool: JSON, **more: Any) -> JSON:
    return {"type": "function", **tool["function"], **more}


TEXT_FORMAT = {"type": "json_schema", "name": "place", "strict": True, "schema": SCHEMA}
SHELL = {"type": "custom", "custom": {"name": "shell", "description": "Run it."}}
CHAT_TIME = {"type": "function", "function": {"name": "time"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CHAT_TIME]}}
# What is asked by Chat, and what OpenAI must see of it.
CHAT_ASKS: dict[str, tuple[JSON, JSON]] = {
    "text": ({"max_tokens": 99}, {"input": [asked("Hello")], "max_output_tokens": 99}),
    "images": (
        {"messages": [user(PICTURE)]},
        {
            "input": [
                user(
                    [
                        input_text("What is this?"),
                        input_image(GIF, "low"),
                        input_image("https://example.com/a.png"),
                    ]
                )
            ]
        },
    ),
    "history": (
        {"messages": HISTORY[:5], **BOTH},
        {
            "input": [
                asked("Weather?"),
                called("call_1", "get_weather", city="Zürich"),
                called("functions.time:2", "time"),
                output("call_1", "rain"),
                output("functions.time:2", "noon"),
                asked("Go on."),
            ]
        },
    ),
    "tool": ({"tools": [WEATHER]}, {"tools": [flat(WEATHER)]}),
    "custom tool": (
        {"tools": [SHELL]},
        {"tools": [{"type": "custom", "name": "shell", "description": "Run it."}]},
    ),
    "named": (
        {**BOTH, "tool_choice": CHAT_TIME},
        {"tool_choice": {"type": "function", "name": "time"}},
    ),
    "required": ({**BOTH, "tool_choice": "required"}, {"tool_choice": "required"}),
    "one at a time": ({**BOTH, "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
    "format": ({"response_format": FORMAT}, {"text": {"format": TEXT_FORMAT}}),
    "json_object": (
        {"response_format": {"type": "json_object"}},
        {"text": {"format": {"type": "json_object"}}},
    ),
    "verbosity": ({"verbosity": "low"}, {"text": {"verbosity": "low"}}),
    "sampling": ({"temperature": 0.3, "top_p": 0.9}, {"temperature": 0.3, "top_p": 0.9}),
    "cache": ({"prompt_cache_key": "k"}, {"prompt_cache_key": "k"}),
    "tier": ({"service_tier": "flex"}, {"service_tier": "flex"}),
}


@pytest.mark.parametrize("params, wanted", CHAT_ASKS.values(), ids=CHAT_ASKS)
def test_what_chat_asks_becomes_a_request_that_openai_takes(
    ask: Ask, upstream: Upstream, params: JSON, wanted: JSON
) -> None:
    upstream.script(wire.answer(message("{}")))
    assert ask(**params).choices[0].message.content == "{}"
    body = spelled_out(upstream.take().json)
    assert {key: body.get(key) for key in wanted} == wanted


def test_what_is_said_first_comes_first(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(message("Hi")))
    ask(messages=[*PROLOGUE, user("Hi")])
    body = spelled_out(upstream.take().json)
    *first, last = body["input"]
    told = [part["text"] for item in first for part in item["content"]]
    assert "".join([body.get("instructions") or "", *told]).replace("\n", "") == "One.Two."
    assert last == asked("Hi")


def test_effort_becomes_reasoning(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(message("Hi")))
    ask(reasoning_effort="high")
    assert upstream.take().json["reasoning"]["effort"] == "high"


CITED = wire.response(message("A: ", wire.text("It rains.", "https://a.b")))
# What OpenAI says, and what of it a Chat message has.
CHAT_ANSWERS: dict[str, tuple[JSON, JSON]] = {
    "text": (wire.response(message("Hi 😀\u2028!")), {"content": "Hi 😀\u2028!", "finish": "stop"}),
    "cited": (
        CITED,
        {"content": "A: It rains.", "cited": [(3, 12, "https://a.b")], "finish": "stop"},
    ),
    "length": (
        wire.incomplete("max_output_tokens", message("One")),
        {"content": "One", "finish": "length"},
    ),
    "filter": (wire.incomplete("content_filter"), {"finish": "content_filter"}),
    "refusal": (
        wire.response(message(refusal("No."))),
        {"refusal": "No.", "finish": "stop"},
    ),
    "calls": (
        wire.response(message("I look."), *CALLS),
        {
            "content": "I look.",
            "calls": [("call_1", "get_weather", {"city": "Bern"}), ("call_2", "time", {})],
            "finish": "tool_calls",
        },
    ),
    "reasoning": (
        wire.response(reasoning("Let me see."), message("Yes.")),
        {"content": "Yes.", "thought": "Let me see.", "finish": "stop"},
    ),
}


def chat_summed_up(choice: Any) -> JSON:
    """Return what CHAT_ANSWERS has of a choice."""
    message = choice.message.to_dict()
    cited = [each["url_citation"] for each in message.get("annotations") or ()]
    summary = {
        "content": message.get("content"),
        "refusal": message.get("refusal"),
        "thought": message.get("reasoning_content"),
        "calls": [
            (each.id, each.function.name, json.loads(each.function.arguments))
            for each in choice.message.tool_calls or ()
        ],
        "cited": [(each["start_index"], each["end_index"], each["url"]) for each in cited],
        "finish": choice.finish_reason,
    }
    return {key: value for key, value in summary.items() if value}


@pytest.mark.parametrize("whole, wanted", CHAT_ANSWERS.values(), ids=CHAT_ANSWERS)
def test_a_response_becomes_a_completion(
    ask: Ask, upstream: Upstream, whole: JSON, wanted: JSON
) -> None:
    upstream.script(wire.reply(whole))
    told = ask(**ask.with_usage)
    assert list(map(chat_summed_up, told.choices)) == [wanted]
    usage = told.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (24, 30, 54)
    assert usage.prompt_tokens_details.cached_tokens == 8
    assert usage.prompt_tokens_details.cache_write_tokens == 4
    assert usage.completion_tokens_details.reasoning_tokens == 20
    assert told.model == "fast"


def test_a_custom_tool_stays_one(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(wire.custom_call("call_1", "shell", "ls -l")))
    (made,) = ask(extra_body={"tools": [SHELL]}).choices[0].message.tool_calls
    assert made.to_dict()["custom"] == {"name": "shell", "input": "ls -l"}


AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
REFUSED: dict[str, tuple[str, JSON]] = {
    "n": ("n", {"n": 2}),
    "modalities": ("modalities", {"modalities": ["text", "audio"]}),
    "audio": ("messages", {"messages": [user([AUDIO])]}),
}


@pytest.mark.parametrize("param, params", REFUSED.values(), ids=REFUSED)
def test_what_would_make_the_answer_wrong_is_refused(
    ask: Ask, upstream: Upstream, param: str, params: JSON
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**params)
    assert param in (caught.value.param or "") or param == "messages"
    assert upstream.is_idle


def test_losses_are_named_or_refused(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(message("Hi")))
    ask(seed=7, logit_bias={"1": 1})
    assert lost(ask) == {"seed", "logit_bias"}
    with pytest.raises(openai.BadRequestError, match="seed"):
        ask(seed=7, **STRICT)


# ---- errors ----

CONTEXT = "context_length_exceeded"
# What OpenAI answers, then the status and the type that Anthropic's clients see.
ERRORS: list[Any] = [
    ((400, "Bad."), 400, "invalid_request_error"),
    ((400, "Your input exceeds the context window.", CONTEXT), 400, "invalid_request_error"),
    ((403, "Not yours."), 403, "permission_error"),
    ((404, "No such model.", "model_not_found"), 404, "not_found_error"),
    ((429, "Slow down.", "rate_limit_exceeded"), 429, "rate_limit_error"),
    ((500, "It broke."), 500, "api_error"),
]


@pytest.mark.parametrize("error, status, kind", ERRORS)
def test_an_error_becomes_one_of_anthropic(
    ask_claude: AskClaude, upstream: Upstream, error: Any, status: int, kind: str
) -> None:
    upstream.script(openai_wire.error(*error, retry_after="7"))
    with pytest.raises(anthropic.APIStatusError, match=error[1]) as caught:
        ask_claude(model="deep")
    assert (caught.value.status_code, caught.value.type) == (status, kind)
    assert caught.value.response.headers["retry-after"] == "7"


@pytest.mark.parametrize("error, status", [error[:2] for error in ERRORS])
def test_an_error_stays_one_of_openai(
    ask: Ask, upstream: Upstream, error: Any, status: int
) -> None:
    upstream.script(openai_wire.error(*error, retry_after="7"))
    with pytest.raises(openai.APIStatusError, match=error[1]) as caught:
        ask()
    assert (caught.value.status_code, caught.value.code) == (status, (*error, None)[2])
    assert caught.value.response.headers["retry-after"] == "7"


FAILURES = [("server_error", {500, 502}), ("rate_limit_exceeded", {429})]


def failing(code: str, is_stream: bool) -> Reply:
    """Answer that it failed: as a body with a 200, or as a stream's first news."""
    if is_stream:
        return wire.stream(*wire.numbered(wire.error_event(code, "Not now.")))
    return json_reply(wire.failed(code, "Not now."))


@pytest.mark.parametrize("code, statuses", FAILURES)
def test_a_failed_response_is_a_real_status(
    ask_claude: AskClaude, upstream: Upstream, code: str, statuses: set[int]
) -> None:
    upstream.script(failing(code, ask_claude.is_stream))
    with pytest.raises(anthropic.APIStatusError, match="Not now.") as caught:
        ask_claude(model="deep")
    assert caught.value.status_code in statuses


@pytest.mark.parametrize("code, statuses", FAILURES)
def test_a_failed_response_is_a_real_status_for_chat(
    ask: Ask, upstream: Upstream, code: str, statuses: set[int]
) -> None:
    upstream.script(failing(code, ask.is_stream))
    with pytest.raises(openai.APIStatusError, match="Not now.") as caught:
        ask()
    assert caught.value.status_code in statuses


WHOLE = wire.events(wire.response(reasoning("Hm."), message("Hello, and so on.")))
FAILED = wire.events(wire.failed("rate_limit_exceeded", "Slow down."))[-1]
LIMITED = {**FAILED, "sequence_number": 13}
ERROR = {**wire.error_event("server_error", "It broke."), "sequence_number": 13}
# How a stream goes wrong after its 200, and a word of what is then said.
ENDS: dict[str, tuple[Reply, str]] = {
    "cut": (wire.stream(*WHOLE[:13], end="cut"), ""),
    "too early": (wire.stream(*WHOLE[:-1]), ""),
    "failed": (wire.stream(*WHOLE[:13], LIMITED), "Slow down."),
    "error": (wire.stream(*WHOLE[:13], ERROR), "It broke."),
    "error and failed": (
        wire.stream(*WHOLE[:13], ERROR, {**LIMITED, "sequence_number": 14}),
        "",
    ),
}


@pytest.mark.parametrize("ask_claude", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("reply, word", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_raises(
    ask_claude: AskClaude, gateway: Gateway, upstream: Upstream, reply: Reply, word: str
) -> None:
    grown = gateway.counting()
    upstream.script(reply)
    with pytest.raises(anthropic.APIStatusError, match=word) as caught:
        ask_claude(model="deep")
    assert caught.value.type in ("api_error", "rate_limit_error")
    gateway.logged(request_id=ask_claude.headers["x-gateway-id"])
    assert grown("llm_provider_errors_total", provider="openai") == 1


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("reply, word", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_raises_for_chat(
    ask: Ask, upstream: Upstream, reply: Reply, word: str
) -> None:
    upstream.script(reply)
    with pytest.raises(openai.APIError, match=word) as caught:
        ask()
    assert not isinstance(caught.value, openai.APIConnectionError), "it must be said, not shown"


def test_a_refused_upstream_key_is_a_502(ask_claude: AskClaude, upstream: Upstream) -> None:
    upstream.script(openai_wire.error(401, f"Incorrect API key: {UPSTREAM_KEY}", "invalid_api_key"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask_claude(model="deep")
    check_own_error(caught.value, 502, "api_error")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_what_is_said_is_told_at_once(gateway: Gateway, upstream: Upstream) -> None:
    """The last event waits until the client has seen the first words."""
    go = threading.Event()
    upstream.script(replace(wire.stream(*WHOLE), last_after=go))
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
        params: Any = {"model": "deep", "max_tokens": 99, "messages": [user("Hi")]}
        stream = client.messages.create(**params, stream=True)
        while next(stream).type != "content_block_delta":
            pass
        go.set()
        assert list(stream)[-1].type == "message_stop"


def test_a_client_that_leaves_takes_the_upstream_with_it(
    gateway: Gateway, upstream: Upstream
) -> None:
    upstream.script(wire.stream(*WHOLE[:13], end="stall"))
    with anthropic.Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
        params: Any = {"model": "deep", "max_tokens": 99, "messages": [user("Hi")]}
        stream = client.messages.create(**params, stream=True)
        next(stream)
        stream.close()
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(request_id=stream.response.headers["x-gateway-id"], status=499)
