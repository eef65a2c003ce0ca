"""The openai SDK through the gateway to an Anthropic upstream: nothing lost, nothing invented."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic_wire as wire
import openai
import pytest
from anthropic_wire import redacted, searched, thinking, tool_use
from drive import KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway
from openai import OpenAI
from openai_wire import PICTURE, PIXEL, SCHEMA, WEATHER, call, text, user
from pydantic import BaseModel, Field
from upstream import JSON, Upstream

OLD, MIDDLE = "claude-haiku-4-5", "claude-opus-4-6"
NEW, NEWEST = "claude-opus-4-8", "claude-opus-5-5"


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Stand in for the other suites' gateway. This kind knows its version; the URL has none."""
    config: JSON = {
        "providers": {"anthropic": {"api_key": UPSTREAM_KEY, "base_url": upstream.url}},
        "models": {"fast": {"provider": "anthropic", "model": OLD}},
        "routing": [{"prefix": "claude-", "provider": "anthropic"}],
        "api_keys": [{"key": KEY, "app": "interop", "allowed_models": ["*"]}],
    }
    process = Gateway(config, tmp_path_factory.mktemp("gateway"))
    yield process
    process.stop()


def spelled_out(body: JSON) -> JSON:
    """Return the body with every content as blocks, so that both its spellings compare equal."""

    def full(block: JSON) -> JSON:
        is_result = block["type"] == "tool_result"
        return {**block, "content": wire.blocks(block["content"])} if is_result else block

    def whole(message: JSON) -> JSON:
        return {**message, "content": list(map(full, wire.blocks(message["content"])))}

    messages = list(map(whole, body["messages"]))
    return {**body, "messages": messages, "system": wire.blocks(body.get("system", ()))}


def system(content: Any) -> JSON:
    return {"role": "system", "content": content}


def said(content: Any) -> JSON:
    return {"role": "assistant", "content": content}


def file(name: str, data: str) -> JSON:
    return {"type": "file", "file": {"filename": name, "file_data": data}}


def document(title: str, kind: str, media_type: str, data: str) -> JSON:
    source = {"type": kind, "media_type": media_type, "data": data}
    return {"type": "document", "source": source, "title": title}


def image(**source: str) -> JSON:
    return {"type": "image", "source": source}


def effort(level: str, **params: Any) -> JSON:
    return {"reasoning_effort": level, **params}


PROLOGUE = [{"role": "developer", "content": "One."}, system([text("Two."), text("")])]
LATER = [user("A"), system("Be brief."), user("B")]
FILES = [
    file("a.pdf", "data:application/pdf;base64,JVBERi0x"),
    file("a.txt", "DATA:text/plain;charset=utf-8;BASE64,SGVsbG8="),
]
CACHED = [{**text("Long."), "cache_control": {"type": "ephemeral", "ttl": "1h"}}, text("Short.")]
TIME = {"type": "function", "function": {"name": "time"}}
BOTH = {"tools": [WEATHER, TIME]}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
FORMATTED = {"format": {"type": "json_schema", "schema": SCHEMA}}
CLAUDE_TIME = {"name": "time", "input_schema": {"type": "object", "properties": {}}}
CLAUDE_WEATHER = {
    "name": "get_weather",
    "description": WEATHER["function"]["description"],
    "input_schema": SCHEMA,
    "strict": True,
}

# What is asked of which model, and what Anthropic must see of it; None is what it must not see.
ASKS: dict[str, tuple[str, JSON, JSON]] = {
    "system first": (
        OLD,
        {"messages": [*PROLOGUE, user([text(""), text("Hi")]), user("")]},
        {"system": [text("One."), text("Two.")], "messages": [user([text("Hi")])]},
    ),
    "system later, old model": (
        OLD,
        {"messages": LATER},
        {"system": [text("Be brief.")], "messages": [user([text("A"), text("B")])]},
    ),
    "system later, new model": (
        NEW,
        {"messages": LATER},
        {"messages": [user([text("A"), text("B")]), system([text("Be brief.")])]},
    ),
    "images": (
        OLD,
        {"messages": [user(PICTURE)]},
        {
            "messages": [
                user(
                    [
                        text("What is this?"),
                        image(type="base64", media_type="image/gif", data=PIXEL),
                        image(type="url", url="https://example.com/a.png"),
                    ]
                )
            ]
        },
    ),
    "files": (
        OLD,
        {"messages": [user(FILES)]},
        {
            "messages": [
                user(
                    [
                        document("a.pdf", "base64", "application/pdf", "JVBERi0x"),
                        document("a.txt", "text", "text/plain", "Hello"),
                    ]
                )
            ]
        },
    ),
    "prefill": (
        OLD,
        {"messages": [user("Hi"), said([text("He "), text(" ")])]},
        {"messages": [user([text("Hi")]), said([text("He")])]},
    ),
    "cache marks": (OLD, {"messages": [user(CACHED)]}, {"messages": [user(CACHED)]}),
    "tools": (
        OLD,
        {**BOTH, "tool_choice": "auto"},
        {"tools": [CLAUDE_WEATHER, CLAUDE_TIME], "tool_choice": {"type": "auto"}},
    ),
    "required": (OLD, {**BOTH, "tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    "none": (OLD, {**BOTH, "tool_choice": "none"}, {"tool_choice": {"type": "none"}}),
    "named": (
        OLD,
        {**BOTH, "tool_choice": TIME},
        {"tool_choice": {"type": "tool", "name": "time"}},
    ),
    "allowed tools": (
        OLD,
        {**BOTH, "tool_choice": ALLOWED},
        {"tools": [CLAUDE_TIME], "tool_choice": {"type": "any"}},
    ),
    "one at a time": (
        OLD,
        {**BOTH, "parallel_tool_calls": False},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    ),
    "forced while thinking": (
        OLD,
        effort("high", tools=[WEATHER], tool_choice="required"),
        {"tool_choice": {"type": "any"}, "thinking": None},
    ),
    "json_schema": (OLD, {"response_format": FORMAT}, {"output_config": FORMATTED}),
    "sampling": (OLD, {"temperature": 1.6, "top_p": 0.5}, {"temperature": 1, "top_p": None}),
    "sampling, new model": (NEW, {"temperature": 0}, {"temperature": None}),
    "sampling while thinking": (OLD, effort("low", temperature=0), {"temperature": None}),
    "stop": (OLD, {"stop": "END"}, {"stop_sequences": ["END"]}),
    "stop list": (OLD, {"stop": ["\n", "END"]}, {"stop_sequences": ["END"]}),
    "stop of spaces": (OLD, {"stop": [" "]}, {"stop_sequences": None}),
    "user": (OLD, {"user": "u-1", "seed": 1}, {"metadata": {"user_id": "u-1"}, "seed": None}),
    "user by e-mail": (OLD, {"user": "ann@example.com"}, {"metadata": None}),
    "service tier": (OLD, {"service_tier": "default"}, {"service_tier": "standard_only"}),
    "cap": (OLD, {"max_tokens": 9, "max_completion_tokens": 7}, {"max_tokens": 7}),
    "effort by budget": (
        OLD,
        effort("medium", max_completion_tokens=9000),
        {"thinking": {"type": "enabled", "budget_tokens": 4096}, "max_tokens": 9000},
    ),
    "effort over the cap": (
        OLD,
        effort("high", max_completion_tokens=2000),
        {"thinking": {"type": "enabled", "budget_tokens": 1488}, "max_tokens": 2000},
    ),
    "effort without room": (OLD, effort("high", max_tokens=1200), {"thinking": None}),
    "effort without a cap": (
        OLD,
        effort("xhigh"),
        {"thinking": {"type": "enabled", "budget_tokens": 32768}},
    ),
    "effort, adaptive": (
        MIDDLE,
        effort("high"),
        {
            "thinking": {"type": "adaptive", "display": "summarized"},
            "output_config": {"effort": "high"},
        },
    ),
    "effort and format": (
        NEWEST,
        effort("xhigh", response_format=FORMAT),
        {"output_config": {"effort": "xhigh", **FORMATTED}},
    ),
    "minimal": (NEW, effort("minimal"), {"output_config": {"effort": "low"}}),
    "no effort": ("claude-opus-5", effort("none"), {"thinking": {"type": "disabled"}}),
    "no effort, always thinks": (
        NEWEST,
        effort("none"),
        {"thinking": None, "output_config": {"effort": "low"}},
    ),
    "extension": (
        MIDDLE,
        {"extra_body": {"thinking": {"type": "adaptive"}}},
        {"thinking": {"type": "adaptive"}},
    ),
}


@pytest.mark.parametrize("model, params, wanted", ASKS.values(), ids=ASKS)
def test_a_request_becomes_one_that_anthropic_takes(
    ask: Ask, upstream: Upstream, model: str, params: JSON, wanted: JSON
) -> None:
    upstream.script(wire.answer(wire.text("Hello!")))
    assert ask(model=model, **params).choices[0].message.content == "Hello!"
    body = spelled_out(upstream.take().json)
    assert {key: body.get(key) for key in wanted} == wanted
    assert (body["model"], bool(body.get("stream"))) == (model, ask.is_stream)


RAIN, NOON = call("call_1", "get_weather", city="Zürich"), call("functions.time:2", "time")
HISTORY = [
    user("Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [RAIN, NOON]},
    {"role": "tool", "tool_call_id": NOON["id"], "content": [text("noon")]},
    {"role": "tool", "tool_call_id": RAIN["id"], "content": "rain"},
    user("Go on."),
    {"role": "assistant", "content": None, "function_call": {"name": "time", "arguments": ""}},
    {"role": "function", "name": "time", "content": "one"},
]


def test_an_agents_history_is_put_in_order(ask: Ask, upstream: Upstream) -> None:
    """It has ids of another vendor, results in disorder, a deprecated call, and offers no tools."""
    upstream.script(wire.answer(wire.text("Rain.")))
    ask(messages=HISTORY)
    body = spelled_out(upstream.take().json)
    told = [[block["type"] for block in message["content"]] for message in body["messages"]]
    assert told == [
        ["text"],
        ["tool_use", "tool_use"],
        ["tool_result", "tool_result", "text"],
        ["tool_use"],
        ["tool_result"],
    ]
    results = [block["content"] for block in body["messages"][2]["content"][:2]]
    assert results == [[text("rain")], [text("noon")]]
    assert {tool["name"] for tool in body["tools"]} == {"get_weather", "time"}


def test_the_same_request_is_the_same_bytes(ask: Ask, upstream: Upstream) -> None:
    upstream.script(*[wire.answer(wire.text("Hello!"))] * 2)
    ask(messages=HISTORY, user="u-1")
    ask(messages=HISTORY, user="u-1")
    assert upstream.take().body == upstream.take().body


BERN = tool_use("toolu_1", "get_weather", city="Bern"), tool_use("toolu_2", "time")
NO = {"type": "refusal", "category": "bio", "explanation": "No."}
# What Claude says, how it ends, and what of it OpenAI's message has.
ANSWERS: dict[str, tuple[list[JSON], JSON, JSON]] = {
    "text": (
        [wire.text("Hello, "), wire.text("you 😀\u2028!")],
        {},
        {"content": "Hello, you 😀\u2028!", "finish": "stop"},
    ),
    "cut": ([wire.text("One")], {"stop": "max_tokens"}, {"content": "One", "finish": "length"}),
    "full": (
        [wire.text("One")],
        {"stop": "model_context_window_exceeded"},
        {"content": "One", "finish": "length"},
    ),
    "stop": (
        [wire.text("One")],
        {"stop": "stop_sequence", "stop_sequence": "END"},
        {"content": "One", "finish": "stop"},
    ),
    "nothing": ([], {}, {"finish": "stop"}),
    "refusal": (
        [],
        {"stop": "refusal", "stop_details": NO},
        {"refusal": "No.", "finish": "content_filter"},
    ),
    "parallel calls": (
        [wire.text("I look."), *BERN],
        {},
        {
            "content": "I look.",
            "calls": [("toolu_1", "get_weather", '{"city":"Bern"}'), ("toolu_2", "time", "{}")],
            "finish": "tool_calls",
        },
    ),
    "thinking": (
        [thinking("Let me see."), redacted(), wire.text("Hello.")],
        {},
        {
            "content": "Hello.",
            "reasoning_content": "Let me see.",
            "thinking_blocks": [thinking("Let me see."), redacted()],
            "finish": "stop",
        },
    ),
    "server tools": (
        [*searched("?"), wire.text("It rains", "a:", "b:"), wire.text("."), wire.text("!", "c:")],
        {},
        {
            "content": "It rains.!",
            "cited": [(0, 8, "a:"), (0, 8, "b:"), (9, 10, "c:")],
            "finish": "stop",
        },
    ),
}


def summed_up(choice: Any) -> JSON:
    """Return what ANSWERS has of a choice."""
    message = choice.message.to_dict()
    calls = [(each["id"], each["function"]) for each in message.get("tool_calls") or ()]
    cited = [each["url_citation"] for each in message.get("annotations") or ()]
    told = {
        "finish": choice.finish_reason,
        "calls": [(key, each["name"], each["arguments"].replace(": ", ":")) for key, each in calls],
        "cited": [(each["start_index"], each["end_index"], each["url"]) for each in cited],
    }
    for key in ("content", "refusal", "reasoning_content", "thinking_blocks"):
        told[key] = message.get(key)
    return {key: value for key, value in told.items() if value}


@pytest.mark.parametrize("content, ending, wanted", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_becomes_one_of_openai(
    ask: Ask, gateway: Gateway, upstream: Upstream, content: list[JSON], ending: JSON, wanted: JSON
) -> None:
    grown = gateway.counting()
    upstream.script(wire.answer(*content, **ending))
    told = ask(**ask.with_usage)
    assert list(map(summed_up, told.choices)) == [wanted]
    assert (told.model, ask.headers["x-request-id"]) == ("fast", wire.HEADERS["request_id"])
    usage = told.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (24, 30, 54)
    assert usage.prompt_tokens_details.cached_tokens == 8
    assert usage.prompt_tokens_details.cache_write_tokens == 4
    assert usage.completion_tokens_details.reasoning_tokens == 20
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=200, usage="reported")
    assert grown("llm_tokens_total", provider="anthropic", model="fast", direction="prompt") == 24
    assert grown("llm_tokens_total", direction="completion") == 30
    assert grown("llm_token_details_total", kind="cache_write") == 4


class Place(BaseModel):
    """Somewhere, in a schema with much that Anthropic's structured output does not take."""

    name: str = Field(min_length=1, pattern="^[A-Z]")
    heights: list[int] = Field(min_length=2)
    inside: Place | None = None


@pytest.mark.parametrize("model", [OLD, NEWEST])
def test_parse_reads_structured_output(ask: Ask, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871], inside=Place(name="Alps", heights=[1, 2]))
    upstream.script(wire.answer(wire.text(place.model_dump_json())))
    assert ask(model=model, response_format=Place).choices[0].message.parsed == place
    assert upstream.take().json["output_config"]["format"]["type"] == "json_schema"


FIRST = [thinking("Two things."), redacted(), wire.text("I look."), *BERN]
SECOND = [thinking("Once more."), tool_use("toolu_3", "get_weather", city="Chur")]


@pytest.mark.parametrize("model", [OLD, MIDDLE, NEWEST])
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps all", "drops unknown fields"])
def test_a_tool_loop_with_thinking(
    ask: Ask, upstream: Upstream, model: str, forgets: bool
) -> None:
    """The judge sees to the signatures, and that no budget is given where a thought is missing."""
    upstream.script(wire.answer(*FIRST), wire.answer(*SECOND), wire.answer(wire.text("Sun.")))
    messages: list[Any] = [user("Where is it sunny?")]
    params = {"model": model, "messages": messages, "reasoning_effort": "low", **BOTH}
    while (message := ask(**params).choices[0].message).tool_calls:
        known = message.model_dump(include={"role", "content", "tool_calls"})
        messages.append(known if forgets else message)
        ids = [each.id for each in message.tool_calls]
        messages += [{"role": "tool", "tool_call_id": each, "content": each} for each in ids]
        messages.append(user("And now?"))
    assert message.content == "Sun."
    _, second, third = (spelled_out(upstream.take().json)["messages"] for _ in range(3))
    kept = [each["type"] for each in FIRST if each["type"] not in wire.THINKING or not forgets]
    assert [each["type"] for each in second[1]["content"]] == kept
    *results, last = second[2]["content"]
    assert [each["tool_use_id"] for each in results] == ["toolu_1", "toolu_2"]
    assert [each["content"] for each in results] == [[text("toolu_1")], [text("toolu_2")]]
    assert last == text("And now?")
    assert third[:3] == second, "what was said is said in the same words again"


def test_a_custom_tool_is_emulated(ask: Ask, upstream: Upstream) -> None:
    tool = {"type": "custom", "custom": {"name": "shell", "description": "Run it."}}
    upstream.script(wire.answer(tool_use("toolu_1", "shell", input="ls -l")))
    (made,) = ask(extra_body={"tools": [tool]}).choices[0].message.tool_calls
    assert made.to_dict()["custom"] == {"name": "shell", "input": "ls -l"}


@pytest.mark.parametrize("ask", MANNERS[:2], indirect=True)
def test_a_deprecated_function_is_called(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(tool_use("toolu_1", "time")))
    (choice,) = ask(functions=[{"name": "time"}], function_call={"name": "time"}).choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.to_dict() == {"name": "time", "arguments": "{}"}
    assert upstream.take().json["tool_choice"] == {
        "type": "tool",
        "name": "time",
        "disable_parallel_tool_use": True,
    }


STRICT = {"extra_headers": {"x-gateway-strict": "1"}}


def test_losses_are_named_or_refused(ask: Ask, gateway: Gateway, upstream: Upstream) -> None:
    grown = gateway.counting()
    lossy: JSON = {"seed": 7, "logit_bias": {"1": 1}, "store": True, "extra_body": {"new": 1}}
    upstream.script(*[wire.answer(wire.text("Hi"))] * 2)
    ask(**lossy)
    lost = {name.strip() for name in ask.headers["x-gateway-lost"].split(",")}
    assert lost == {"seed", "logit_bias", "store", "unknown"}
    gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert grown("llm_params_dropped_total", provider="anthropic", param="seed") == 1
    with pytest.raises(openai.BadRequestError, match="seed"):
        ask(**lossy, **STRICT)
    ask(store=True, **STRICT)
    assert ask.headers["x-gateway-lost"] == "store", "a hint is never refused"


AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
STORED = {"type": "file", "file": {"file_id": "file-1"}}
BROKEN = {**RAIN, "function": {"name": "get_weather", "arguments": "[1"}}
REFUSED: dict[str, tuple[str, JSON]] = {
    "n": ("n", {"n": 2}),
    "logprobs": ("logprobs", {"logprobs": True}),
    "modalities": ("modalities", {"modalities": ["text", "audio"]}),
    "audio": ("input_audio", {"messages": [user([AUDIO])]}),
    "stored file": ("messages", {"messages": [user([STORED])]}),
    "arguments": ("messages", {"messages": [user("a"), {**HISTORY[1], "tool_calls": [BROKEN]}]}),
}


@pytest.mark.parametrize("param, params", REFUSED.values(), ids=REFUSED)
def test_what_would_make_the_answer_wrong_is_refused(
    ask: Ask, upstream: Upstream, param: str, params: JSON
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**params)
    assert (caught.value.param or "").startswith(param)
    assert upstream.is_idle


BAD, TOO_LONG = "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum"
# What Anthropic answers, then the status, the code (None: any), and what the SDK raises.
ERRORS: list[Any] = [
    ((400, BAD, "max_tokens: Field required"), 400, None, openai.BadRequestError),
    ((400, BAD, TOO_LONG), 400, "context_length_exceeded", openai.BadRequestError),
    ((403, "permission_error", "Not yours."), 403, None, openai.PermissionDeniedError),
    ((404, "not_found_error", "model: x"), 404, "model_not_found", openai.NotFoundError),
    ((409, "conflict_error", "Busy."), 409, None, openai.ConflictError),
    ((413, "request_too_large", "Too large."), 413, None, openai.APIStatusError),
    ((422, BAD, "Odd."), 422, None, openai.UnprocessableEntityError),
    ((429, "rate_limit_error", "Slow down."), 429, None, openai.RateLimitError),
    ((500, "api_error", "Internal server error"), 500, None, openai.InternalServerError),
    ((504, "timeout_error", "Late."), 504, None, openai.InternalServerError),
    ((529, "overloaded_error", "Overloaded"), 503, None, openai.InternalServerError),
]


@pytest.mark.parametrize("error, status, code, raised", ERRORS)
def test_an_error_becomes_one_of_openai(
    ask: Ask, upstream: Upstream, error: Any, status: int, code: str, raised: Any
) -> None:
    upstream.script(wire.error(*error, retry_after="7"))
    with pytest.raises(raised) as caught:
        ask()
    told = caught.value
    assert set(told.body) == {"message", "type", "param", "code"} and error[2] in told.message
    assert (told.status_code, told.code) == (status, code or told.code)
    assert told.response.headers["retry-after"] == "7"
    assert told.request_id == wire.HEADERS["request_id"]


@pytest.mark.parametrize("status, kind", [(401, "authentication_error"), (402, "billing_error")])
def test_a_refused_upstream_key_is_a_502_tried_once(
    ask: Ask, upstream: Upstream, status: int, kind: str
) -> None:
    ask.options["max_retries"] = 5
    upstream.script(wire.error(status, kind, f"invalid x-api-key {UPSTREAM_KEY}"))
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    response = caught.value.response
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    assert "invalid x-api-key" not in response.text
    upstream.take()
    assert upstream.is_idle


@pytest.mark.parametrize("kind, status", wire.FIRST_ERRORS)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_event_is_a_real_status(
    ask: Ask, upstream: Upstream, kind: str, status: int
) -> None:
    upstream.script(wire.stream(wire.error_event(kind, "Not now.")))
    with pytest.raises(openai.APIStatusError, match="Not now.") as caught:
        ask()
    assert caught.value.status_code == status


STARTED = wire.events(wire.message(thinking("Hm."), wire.text("Hello, and so on.")))[:10]


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
    assert grown("llm_provider_errors_total", provider="anthropic") == 1


def test_an_error_after_content_is_told_in_the_stream(client: OpenAI, upstream: Upstream) -> None:
    go = threading.Event()
    overloaded = wire.error_event("overloaded_error", "Overloaded")
    upstream.script(replace(wire.stream(*STARTED, overloaded), last_after=go))
    stream = client.chat.completions.create(model="fast", messages=[user("Hi")], stream=True)
    next(stream)
    go.set()
    with pytest.raises(openai.APIError, match="Overloaded") as caught:
        list(stream)
    assert caught.value.type == "overloaded_error"


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
    assert [(each.index, each.id) for each in calls] == [(0, "toolu_1"), (1, "toolu_2")]


def test_only_what_anthropic_understands_is_sent(client: OpenAI, upstream: Upstream) -> None:
    kept = {"idempotency-key": "i1", "traceparent": "00-0af7-b7ad-01"}
    head = {**kept, "openai-beta": "x", "openai-organization": "org-1"}
    upstream.script(wire.answer(wire.text("Hi")))
    client.chat.completions.create(model="fast", messages=[user("Hi")], extra_headers=head)
    got = upstream.take().headers
    assert {name: got[name] for name in kept} == kept
    assert got["anthropic-version"] == wire.OLD_VERSION
    assert not [name for name in got if name.lower().startswith(("openai-", "x-stainless-"))]


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
    assert grown("llm_requests_total", provider="anthropic", status="499") == 1
    assert grown("llm_tokens_total", direction="prompt") == 24
