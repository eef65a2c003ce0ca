"""The anthropic SDK through the gateway to Anthropic: bytes pass, and all is counted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import anthropic_wire as wire
import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_async_tool, beta_tool
from anthropic_wire import redacted, searched, thinking, tool_use
from drive import KEY, LIMITED_KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway, Launch
from openai_wire import PIXEL, SCHEMA, text, user
from pydantic import BaseModel
from upstream import JSON, Reply, Upstream, json_reply

ALIASED, NEWEST = "claude-haiku-4-5", "claude-opus-5-5"


@pytest.fixture(scope="session")
def config(upstream: Upstream) -> JSON:
    """Stand in for the other suites' configuration."""
    local = {"kind": "openai-compatible", "base_url": f"{upstream.url}/v1"}
    return {
        "providers": {
            "anthropic": {"api_key": UPSTREAM_KEY, "base_url": upstream.url},
            "local": local,
        },
        "models": {
            "fast": {"provider": "anthropic", "model": ALIASED},
            "best": {"provider": "anthropic", "model": NEWEST},
            "home": {"provider": "local", "model": "llama-4"},
        },
        "routing": [{"prefix": "claude-", "provider": "anthropic"}],
        "api_keys": [
            {"key": KEY, "app": "interop", "allowed_models": ["*"]},
            {"key": LIMITED_KEY, "app": "limited", "allowed_models": ["home"]},
        ],
    }


HELLO: JSON = {"model": "fast", "max_tokens": 2000, "messages": [user("Hello")]}


class AskClaude(Ask):
    """The anthropic SDK in the same manners; with `betas`, its beta namespace."""

    def __init__(self, gateway: Gateway, manner: str) -> None:
        super().__init__(gateway, manner)
        self.options["base_url"] = gateway.url

    def __call__(self, **params: Any) -> Any:
        params = {**HELLO, **params}
        return asyncio.run(self._talk_async(params)) if self.is_async else self._talk(params)

    def _talk(self, params: JSON) -> Any:
        http = anthropic.DefaultHttpxClient(event_hooks=self.hooks())
        with Anthropic(http_client=http, **self.options) as client:
            messages: Any = client.beta.messages if "betas" in params else client.messages
            if not self.is_stream:
                return messages.create(**params)
            with messages.stream(**params) as stream:
                return stream.get_final_message()

    async def _talk_async(self, params: JSON) -> Any:
        http = anthropic.DefaultAsyncHttpxClient(event_hooks=self.hooks())
        async with AsyncAnthropic(http_client=http, **self.options) as client:
            messages: Any = client.beta.messages if "betas" in params else client.messages
            if not self.is_stream:
                return await messages.create(**params)
            async with messages.stream(**params) as stream:
                return await stream.get_final_message()


@pytest.fixture(params=MANNERS)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> AskClaude:
    return AskClaude(gateway, request.param)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def async_client(gateway: Gateway) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=gateway.url, api_key=KEY, max_retries=0)


def spliced(sent: bytes) -> bytes:
    """Return what a body becomes on its way: the alias is replaced, and nothing else."""
    assert sent.count(b'"model":"fast"') == 1
    return sent.replace(b'"model":"fast"', b'"model":"%s"' % ALIASED.encode())


# ---- requests and answers ----

CACHE = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
TIME = {"name": "time", "input_schema": {"type": "object"}}
WEATHER = {"name": "get_weather", "input_schema": SCHEMA, "strict": True, **CACHE}
BUDGET = {"type": "enabled", "budget_tokens": 1024}
ODD_TEXT = 'a\u2028b\u0085c \\ " </script> 😀 \ufeff d\r\n\te\x1f "error" message_stop\n\ndata: {}'


def picture(data: str) -> JSON:
    source = {"type": "base64", "media_type": "image/gif", "data": data}
    return {"type": "image", "source": source}


MEDIA = [
    picture(PIXEL),
    {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}, **CACHE},
    text("What is this?"),
]
TWO_CALLS = [tool_use("toolu_1", "get_weather", city="Zürich"), tool_use("toolu_2", "time")]
# What is asked beyond "Hello", and the blocks and the end of its answer.
ASKS: dict[str, tuple[JSON, list[JSON], JSON]] = {
    "text": ({}, [wire.text("Hello! How can I help you today?")], {}),
    "odd text": ({"messages": [user(ODD_TEXT)]}, [wire.text(ODD_TEXT * 3)], {}),
    "system": ({"system": [{**text("Be brief."), **CACHE}]}, [wire.text("Hi.")], {}),
    "media": ({"messages": [user(MEDIA)]}, [wire.text("A pixel.")], {}),
    "tools": ({"tools": [WEATHER, TIME], "tool_choice": {"type": "any"}}, TWO_CALLS, {}),
    "tools named like events": (
        {"tools": [{**TIME, "name": "error"}, {**TIME, "name": "message_stop"}]},
        [tool_use("toolu_1", "error", type="error"), tool_use("toolu_2", "message_stop")],
        {},
    ),
    "thinking": ({"thinking": BUDGET}, [thinking("Hm."), redacted(), wire.text("Yes.")], {}),
    "server tools": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        [*searched("?"), wire.text("It rains.", "https://a.example")],
        {},
    ),
    "stop": (
        {"stop_sequences": ["END"], "metadata": {"user_id": "u-1"}},
        [wire.text("One")],
        {"stop": "stop_sequence", "stop_sequence": "END"},
    ),
    "length": ({"max_tokens": 1}, [wire.text("One")], {"stop": "max_tokens"}),
    "nothing": ({}, [], {"stop": "refusal"}),
    "beta": ({"betas": ["context-management-2025-06-27"]}, [wire.text("Hi.")], {}),
}


@pytest.mark.parametrize("params, content, ending", ASKS.values(), ids=ASKS)
def test_what_is_asked_and_answered_passes_unchanged(
    ask: AskClaude, upstream: Upstream, params: JSON, content: list[JSON], ending: JSON
) -> None:
    upstream.script(wire.answer(*content, **ending))
    told = ask(**params)
    assert upstream.take().body == spliced(ask.sent)
    meant = wire.message(*content, **ending)
    for got, block in zip(told.content, content, strict=True):
        assert without_nulls(got.to_dict()) == without_nulls(block)
    for name in ("id", "model", "stop_reason", "stop_sequence"):
        assert getattr(told, name) == meant[name]
    usage = told.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (12, 8, 30)
    assert ask.headers["request-id"] == wire.HEADERS["request_id"]
    assert ask.headers["anthropic-organization-id"] == "org-1"


def without_nulls(block: JSON) -> JSON:
    """Leave out what a stream need not say of a block."""
    return {key: value for key, value in block.items() if value is not None}


def test_usage_is_counted(ask: AskClaude, gateway: Gateway, upstream: Upstream) -> None:
    """Of a stream it is told in two events; what was read from a cache is a part of the prompt."""
    grown = gateway.counting()
    upstream.script(wire.answer(thinking("Hm."), wire.text("Hello, and so on.")))
    ask()
    line = gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert (line["status"], line["usage"], line["path"]) == (200, "reported", "/v1/messages")
    assert line["upstream_request_id"] == wire.HEADERS["request_id"]
    labels = {"virtual_key": "interop", "provider": "anthropic", "model": "fast"}
    assert grown("llm_tokens_total", direction="prompt", **labels) == 24
    assert grown("llm_tokens_total", direction="completion", **labels) == 30
    for kind, tokens in {"cache_read": 8, "cache_write": 4, "reasoning": 20}.items():
        assert grown("llm_token_details_total", kind=kind, **labels) == tokens
    assert grown("llm_requests_total", status="200", **labels) == 1
    assert grown("llm_stream_first_byte_seconds_count", **labels) == ask.is_stream
    assert grown("llm_usage_estimated_total") == 0
    assert grown("llm_cost_dollars_total", **labels) > 0


@pytest.mark.parametrize("content", [content for _, content, _ in ASKS.values()], ids=ASKS)
def test_a_stream_passes_byte_for_byte(
    client: Anthropic, upstream: Upstream, content: list[JSON]
) -> None:
    reply = wire.stream(*wire.events(wire.message(*content)))
    upstream.script(reply)
    with client.messages.with_streaming_response.create(**HELLO, stream=True) as answer:
        assert answer.read() == b"".join(reply.pieces)
    assert answer.headers["content-type"] == reply.headers["content-type"]


class Place(BaseModel):
    name: str
    heights: list[int]


def test_parse_reads_structured_output(client: Anthropic, upstream: Upstream) -> None:
    place = Place(name="Zürich", heights=[392, 871])
    upstream.script(wire.answer(wire.text(place.model_dump_json())))
    assert client.messages.parse(**HELLO, output_format=Place).parsed_output == place
    assert upstream.take().json["output_config"]["format"]["type"] == "json_schema"


FIRST = [thinking("Two things."), redacted(), wire.text("I look."), *TWO_CALLS]
SECOND = [thinking("Once more."), tool_use("toolu_3", "get_weather", city="Chur")]


def script_loop(upstream: Upstream) -> None:
    upstream.script(wire.answer(*FIRST), wire.answer(*SECOND), wire.answer(wire.text("Sun.")))


def check_loop(upstream: Upstream) -> None:
    """The judge sees to the order of the results and to the signatures."""
    first, second, third = (upstream.take().json["messages"] for _ in range(3))
    assert (second[: len(first)], third[: len(second)]) == (first, second)
    results = [wire.of_type("tool_result", turns[-1]["content"]) for turns in (second, third)]
    ids = [[each["tool_use_id"] for each in turn] for turn in results]
    assert ids == [["toolu_1", "toolu_2"], ["toolu_3"]]
    assert [wire.blocks(each["content"])[0]["text"] for each in results[0]] == ["rain", "noon"]


def test_a_tool_loop_with_thinking(ask: AskClaude, upstream: Upstream) -> None:
    said = {"get_weather": "rain", "time": "noon"}
    messages: list[Any] = [user("Where is it sunny?")]
    script_loop(upstream)
    params = {"messages": messages, "tools": [WEATHER, TIME], "thinking": BUDGET}
    while (told := ask(**params)).stop_reason == "tool_use":
        calls = [block for block in told.content if block.type == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": each.id, "content": said[each.name]}
            for each in calls
        ]
        messages += [{"role": "assistant", "content": told.content}, user(results)]
    assert told.content[0].text == "Sun."
    check_loop(upstream)


RUN: JSON = {**HELLO, "messages": [user("Where is it sunny?")], "thinking": BUDGET, "thread": False}


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner(client: Anthropic, upstream: Upstream, stream: bool) -> None:
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
    runner: Any = client.beta.messages.tool_runner(**RUN, tools=[get_weather, time], stream=stream)
    assert runner.until_done().content[0].text == "Sun."
    check_loop(upstream)


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner_async(
    async_client: AsyncAnthropic, upstream: Upstream, stream: bool
) -> None:
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
        async with async_client as client:
            run: Any = client.beta.messages.tool_runner
            return await run(**RUN, tools=[get_weather, time], stream=stream).until_done()

    script_loop(upstream)
    assert asyncio.run(run()).content[0].text == "Sun."
    check_loop(upstream)


# ---- heads ----


def test_request_headers_pass_but_for_credentials(client: Anthropic, upstream: Upstream) -> None:
    kept = {"x-app": "cli", "traceparent": "00-0af7-b7ad-01", "idempotency-key": "i1"}
    dropped = {"cookie": "a=b", "x-forwarded-for": "10.0.0.1", "x-gateway-strict": "1"}
    dropped |= {"api-key": "sk-of-the-client"}
    upstream.script(wire.answer(wire.text("Hi")))
    betas = ["zeta-2026-01-01", "context-management-2025-06-27", "alpha-2025-01-01"]
    client.beta.messages.create(
        **HELLO, betas=betas, extra_headers={**kept, **dropped}, extra_query={"beta": "true"}
    )
    received = upstream.take()
    got = received.headers
    assert received.query == "beta=true"
    assert {name: got[name] for name in kept} == kept
    assert got.getall("anthropic-beta") == [",".join(betas)]
    assert got.getall("anthropic-version") == [wire.NEW_VERSION]
    assert got["user-agent"].startswith("Anthropic/Python") and "x-stainless-lang" in got
    assert not dropped.keys() & {name.lower() for name in got}
    assert got.getall("x-api-key") == [UPSTREAM_KEY] and KEY not in str(got)


def test_what_a_bare_client_leaves_out_is_added(gateway: Gateway, upstream: Upstream) -> None:
    """A version it may leave out; a beta it may name in a line of its own."""
    betas = ["b-2026-01-01", "a-2025-01-01,c-2025-01-01"]
    head = [("x-api-key", KEY), *(("anthropic-beta", beta) for beta in betas)]
    upstream.script(wire.answer(wire.text("Hi")))
    assert httpx2.post(f"{gateway.url}/v1/messages", json=HELLO, headers=head).status_code == 200
    got = upstream.take().headers
    assert got.getall("anthropic-version") == [wire.OLD_VERSION]
    names = ",".join(got.getall("anthropic-beta")).replace(" ", "")
    assert names == ",".join(betas)


def test_a_key_may_be_a_bearer(gateway: Gateway, upstream: Upstream) -> None:
    upstream.script(wire.answer(wire.text("Hi")))
    with Anthropic(base_url=gateway.url, auth_token=KEY) as client:
        client.messages.create(**HELLO)
    assert KEY not in str(upstream.take().headers), "the judge sees that there is our key"


CLAUDE_CODE_HEAD = {
    "authorization": f"Bearer {KEY}",
    "accept": "application/json",
    "accept-encoding": "gzip, deflate, br, zstd",
    "anthropic-version": wire.OLD_VERSION,
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,"
    "context-management-2025-06-27,per-turn-control-2026-07-01,"
    "mid-conversation-tool-changes-2026-07-01,thinking-token-count-2026-05-13,"
    "advanced-tool-use-2025-11-20,effort-2025-11-24",
    "anthropic-dangerous-direct-browser-access": "true",
    "content-type": "application/json",
    "user-agent": "claude-cli/2.1.330 (external, sdk-cli)",
    "x-app": "cli",
    "x-claude-code-agent-id": "a1",
    "x-claude-code-session-id": "0b5ff8f4-38a5-4e8c-a1a7-3d1d8a6ed3f0",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
SEARCH, CRON = tool_use("toolu_1", "ToolSearch", query="cron"), tool_use("toolu_2", "CronList")
FOUND = [{"type": "tool_reference", "tool_name": "CronList"}]
OBJECT = {"input_schema": {"type": "object", "properties": {}}}
CLAUDE_CODE: JSON = {
    "model": NEWEST,
    "messages": [
        user([text("<system-reminder>Today.</system-reminder>"), text("hi\u2028")]),
        {"role": "system", "content": "# Environment"},
        {"role": "assistant", "content": [thinking("Search."), SEARCH]},
        user(
            [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": FOUND},
                text("Tool loaded."),
            ]
        ),
        {"role": "system", "content": [text("# Skills")]},
        {"role": "assistant", "content": [thinking("List."), CRON]},
        user([{"type": "tool_result", "tool_use_id": "toolu_2", "content": "none", **EPHEMERAL}]),
    ],
    "system": [
        text("x-anthropic-billing-header: cc_version=2.1.330.a1b; cc_entrypoint=sdk-cli;"),
        {**text("You are Claude Code."), **EPHEMERAL},
        {**text("Be brief."), **EPHEMERAL},
    ],
    "tools": [
        {"name": "Bash", "description": "Run it.", **OBJECT},
        {"name": "ToolSearch", "description": "Find a tool.", **OBJECT},
        {"name": "DeferredToolPlaceholder", **OBJECT, "defer_loading": True},
        {"name": "CronList", **OBJECT, "defer_loading": True},
    ],
    "metadata": {"user_id": json.dumps({"device_id": "d1", "session_id": "s1"})},
    "max_tokens": 128_000,
    "thinking": {"type": "adaptive", "display": "omitted"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "medium"},
    "stream": True,
}


def test_claude_code_passes_untouched(gateway: Gateway, upstream: Upstream) -> None:
    reply = wire.stream(*wire.events(wire.message(thinking("Hm."), wire.text("Hi."))))
    upstream.script(reply)
    asked = json.dumps(CLAUDE_CODE, ensure_ascii=False).encode()
    url = f"{gateway.url}/v1/messages?beta=true"
    answer = httpx2.post(url, content=asked, headers=CLAUDE_CODE_HEAD)
    assert (answer.status_code, answer.content) == (200, b"".join(reply.pieces))
    received = upstream.take()
    assert (received.body, received.query) == (asked, "beta=true")
    kept = {**CLAUDE_CODE_HEAD, "x-api-key": UPSTREAM_KEY, "accept-encoding": "identity"}
    del kept["authorization"]
    assert kept.items() <= {name.lower(): value for name, value in received.headers.items()}.items()


# ---- counting tokens ----


@pytest.mark.parametrize("namespace", ["messages", "beta"])
def test_tokens_are_counted_by_the_upstream(
    client: Anthropic, gateway: Gateway, upstream: Upstream, namespace: str
) -> None:
    grown = gateway.counting()
    counted = json_reply({"input_tokens": 14}, 200, **wire.HEADERS)
    upstream.script(counted)
    messages: Any = client.messages if namespace == "messages" else client.beta.messages
    asked = {"model": "fast", "messages": [user(MEDIA)], "tools": [TIME], "system": "Be brief."}
    answer = messages.with_raw_response.count_tokens(**asked, extra_query={"beta": "true"})
    assert answer.parse().input_tokens == 14
    assert answer.headers["request-id"] == wire.HEADERS["request_id"]
    received = upstream.take()
    assert (received.path, received.query) == ("/v1/messages/count_tokens", "beta=true")
    assert received.body == spliced(answer.http_response.request.content)
    assert (grown("llm_tokens_total"), grown("llm_requests_total")) == (0, 1), "none generated"


def test_tokens_are_counted_async(async_client: AsyncAnthropic, upstream: Upstream) -> None:
    async def count() -> int:
        async with async_client as client:
            counted = await client.messages.count_tokens(model="fast", messages=[user("Hi")])
            return counted.input_tokens

    upstream.script(json_reply({"input_tokens": 9}))
    assert asyncio.run(count()) == 9


# ---- models ----


def test_models_come_on_one_page(client: Anthropic) -> None:
    names = ["fast", "best", "home"]
    page = client.models.list(limit=1000)
    assert [model.id for model in page] == names
    assert (page.first_id, page.last_id, page.has_more) == ("fast", "home", False)
    limited = client.with_options(api_key=LIMITED_KEY)
    assert [model.id for model in limited.models.list()] == ["home"]


def test_models_are_listed_async(async_client: AsyncAnthropic) -> None:
    async def names() -> list[str]:
        async with async_client as client:
            return [model.id async for model in client.models.list(limit=1)]

    assert asyncio.run(names()) == ["fast", "best", "home"]


def test_a_model_is_one_of_anthropics(client: Anthropic) -> None:
    model = client.models.retrieve("home")
    assert (model.id, model.type, model.created_at.year) == ("home", "model", 1970)
    assert model.lifecycle == "active"
    limited = client.with_options(api_key=LIMITED_KEY)
    with pytest.raises(anthropic.PermissionDeniedError):
        limited.models.retrieve("fast")
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.type == "not_found_error"


def test_without_a_version_models_are_openais(gateway: Gateway) -> None:
    answer = httpx2.get(f"{gateway.url}/v1/models?limit=1", headers={"x-api-key": KEY}).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["fast", "best", "home"]


# ---- errors ----

BAD = "invalid_request_error"
ERRORS: list[Any] = [
    (400, BAD, anthropic.BadRequestError),
    (403, "permission_error", anthropic.PermissionDeniedError),
    (404, "not_found_error", anthropic.NotFoundError),
    (409, "conflict_error", anthropic.ConflictError),
    (413, "request_too_large", anthropic.RequestTooLargeError),
    (422, BAD, anthropic.UnprocessableEntityError),
    (429, "rate_limit_error", anthropic.RateLimitError),
    (500, "api_error", anthropic.InternalServerError),
    (504, "timeout_error", anthropic.InternalServerError),
    (529, "overloaded_error", anthropic.InternalServerError),
]


@pytest.mark.parametrize("status, kind, raised", ERRORS)
def test_an_error_of_the_upstream_passes(
    ask: AskClaude, gateway: Gateway, upstream: Upstream, status: int, kind: str, raised: Any
) -> None:
    grown = gateway.counting()
    reply = wire.error(status, kind, "In its own words.", retry_after="7")
    upstream.script(reply)
    with pytest.raises(raised) as caught:
        ask()
    error, response = caught.value, caught.value.response
    assert (response.content, error.status_code, error.type) == (reply.pieces[0], status, kind)
    assert (error.request_id, response.headers["retry-after"]) == (wire.HEADERS["request_id"], "7")
    gateway.logged(request_id=response.headers["x-gateway-id"], status=status)
    assert grown("llm_requests_total", status=str(status), model="fast") == 1
    assert grown("llm_provider_errors_total", provider="anthropic") == 1


@pytest.mark.parametrize("status, kind", [(401, "authentication_error"), (402, "billing_error")])
def test_a_refused_upstream_key_is_a_502_tried_once(
    ask: AskClaude, upstream: Upstream, status: int, kind: str
) -> None:
    ask.options["max_retries"] = 5
    upstream.script(wire.error(status, kind, f"invalid x-api-key {UPSTREAM_KEY}"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask()
    error, response = caught.value, caught.value.response
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    assert error.type == "api_error" and "invalid x-api-key" not in response.text
    upstream.take()
    assert upstream.is_idle


NOBODY, LIMITED = {"api_key": "vk-nobody-has-this-key"}, {"api_key": LIMITED_KEY}
# The options, the params, and the status and the type of the gateway's answer.
OWN_ERRORS: dict[str, tuple[JSON, JSON, int, str]] = {
    "malformed": ({}, {"extra_body": {"stream": "yes"}}, 400, BAD),
    "no model": ({}, {"model": ""}, 400, BAD),
    "unknown key": (NOBODY, {}, 401, "authentication_error"),
    "not allowed": (LIMITED, {}, 403, "permission_error"),
    "learns nothing": (LIMITED, {"model": "x"}, 403, "permission_error"),
    "unknown model": ({}, {"model": "x"}, 404, "not_found_error"),
}


@pytest.mark.parametrize("options, params, status, kind", OWN_ERRORS.values(), ids=OWN_ERRORS)
def test_an_error_of_the_gateway_has_anthropics_shape(
    ask: AskClaude, upstream: Upstream, options: JSON, params: JSON, status: int, kind: str
) -> None:
    ask.options.update(options)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(**params)
    check_own_error(caught.value, status, kind)
    assert upstream.is_idle


def check_own_error(error: anthropic.APIStatusError, status: int, kind: str) -> None:
    body: Any = error.body
    assert (body.keys(), body["type"]) == ({"type", "error", "request_id"}, "error")
    assert body["error"].keys() == {"type", "message"}
    assert (error.status_code, error.type) == (status, kind)
    assert error.request_id == body["request_id"] == error.response.headers["x-gateway-id"]


def test_an_error_that_is_not_json_is_wrapped(ask: AskClaude, upstream: Upstream) -> None:
    upstream.script(Reply([b"<h1>Bad Gateway</h1>"], 502, {"content-type": "text/html"}))
    with pytest.raises(anthropic.InternalServerError, match="Bad Gateway") as caught:
        ask()
    check_own_error(caught.value, 502, "api_error")


@pytest.mark.parametrize("manner", ["sync", "sync stream"])
def test_a_late_upstream_is_a_504(launch: Launch, upstream: Upstream, manner: str) -> None:
    gateway = launch(timeouts={"first_token": 0.2, "total": 0.2})
    upstream.script(Reply([], end="mute"))
    with pytest.raises(anthropic.InternalServerError) as caught:
        AskClaude(gateway, manner)()
    check_own_error(caught.value, 504, "timeout_error")
    assert upstream.take().left.wait(1)


@pytest.mark.parametrize("status", [409, 429, 500, 529])
def test_the_sdk_tries_again(ask: AskClaude, upstream: Upstream, status: int) -> None:
    ask.options["max_retries"] = 2
    failure = wire.error(status, "overloaded_error", "Not now.", retry_after_ms="1")
    upstream.script(failure, failure, wire.answer(wire.text("Now.")))
    assert ask().content[0].text == "Now."
    tries = [upstream.take().headers["x-stainless-retry-count"] for _ in range(3)]
    assert tries == ["0", "1", "2"]


def test_every_answer_has_a_request_id(gateway: Gateway) -> None:
    """Where no upstream gave one it is ours. A client may ask without a key whether we are up."""
    head = {"x-api-key": KEY, "anthropic-version": wire.OLD_VERSION}
    with httpx2.Client(base_url=gateway.url, headers=head) as client:
        body = {"model": "home", "messages": []}
        for answer in (
            client.get("/v1/models"),
            client.get("/v1/models/home"),
            client.get("/v1/messages"),
            client.post("/v1/messages/count_tokens", json=body),
        ):
            assert answer.headers["request-id"] == answer.headers["x-gateway-id"], answer.url
    assert httpx2.head(f"{gateway.url}/").status_code == 200


# ---- streams that go wrong ----

OVERLOADED = wire.error_event("overloaded_error", "Overloaded")


@pytest.mark.parametrize("kind, status", wire.FIRST_ERRORS)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_event_is_a_real_status(
    ask: AskClaude, upstream: Upstream, kind: str, status: int
) -> None:
    upstream.script(wire.stream(wire.error_event(kind, "Not now.")))
    with pytest.raises(anthropic.APIStatusError, match="Not now.") as caught:
        ask()
    assert (caught.value.status_code, caught.value.type) == (status, kind)


WHOLE = wire.events(wire.message(thinking("Hm."), wire.text("Hello, and so on.")))
STARTED = WHOLE[:10]
# How a stream goes wrong after its 200, and the status that it would have had.
ENDS: dict[str, tuple[Reply, int]] = {
    "connection cut": (wire.stream(*STARTED, end="cut"), 502),
    "clean end too early": (wire.stream(*STARTED), 502),
    "no message_stop": (wire.stream(*WHOLE[:-1]), 502),
    "overloaded": (wire.stream(*STARTED, OVERLOADED), 503),
    "error of no known type": (wire.stream(*STARTED, wire.error_event("odd_error", "Odd.")), 502),
}


@pytest.mark.parametrize("reply, status", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_ends_in_one_error(
    client: Anthropic, gateway: Gateway, upstream: Upstream, reply: Reply, status: int
) -> None:
    """What came before it passes; an error of the upstream's own is that error, in its words."""
    grown = gateway.counting()
    upstream.script(reply)
    with client.messages.with_streaming_response.create(**HELLO, stream=True) as answer:
        got = answer.read()
    passed = b"".join(reply.pieces)
    is_told = b"event: error" in passed
    assert got == passed if is_told else got.startswith(passed)
    assert got.count(b"event: error\n") == 1 and b"message_stop" not in got
    told = json.loads(got.strip().rpartition(b"data: ")[2])
    assert (told["type"], told["error"].keys()) == ("error", {"type", "message"})
    gateway.logged(request_id=answer.headers["x-gateway-id"], status=status)
    assert grown("llm_requests_total", status=str(status)) == 1
    assert grown("llm_provider_errors_total", provider="anthropic") == 1


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("reply", [reply for reply, _ in ENDS.values()], ids=ENDS)
def test_the_sdk_raises_where_a_stream_breaks(
    ask: AskClaude, upstream: Upstream, reply: Reply
) -> None:
    upstream.script(reply)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask()
    assert caught.value.type in ("api_error", "overloaded_error", "odd_error")


def test_an_error_after_content_is_told_in_the_stream(
    client: Anthropic, upstream: Upstream
) -> None:
    go = threading.Event()
    upstream.script(replace(wire.stream(*STARTED, OVERLOADED), last_after=go))
    stream = client.messages.create(**HELLO, stream=True)
    assert next(stream).type == "message_start"
    go.set()
    with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
        list(stream)
    assert caught.value.type == "overloaded_error"


def leave(client: Anthropic, count: int) -> str:
    stream = client.messages.create(**HELLO, stream=True)
    for _ in range(count):
        next(stream)
    stream.close()
    return stream.response.headers["x-gateway-id"]


def leave_async(client: Anthropic, count: int) -> str:
    async def talk() -> str:
        async with AsyncAnthropic(base_url=client.base_url, api_key=KEY) as other:
            stream = await other.messages.create(**HELLO, stream=True)
            for _ in range(count):
                await anext(aiter(stream))
            return stream.response.headers["x-gateway-id"]

    return asyncio.run(talk())


@pytest.mark.parametrize("leaving", [leave, leave_async])
def test_a_client_that_leaves_takes_the_upstream_with_it(
    client: Anthropic, gateway: Gateway, upstream: Upstream, leaving: Any
) -> None:
    """The prompt's tokens were told; of the answer's, what was seen of it is counted."""
    grown = gateway.counting()
    long = wire.events(wire.message(wire.text("word " * 80)))
    upstream.script(wire.stream(*long[:-3], end="stall"))
    shown = [event for event in long[:-3] if event["type"] != "ping"]
    request_id = leaving(client, len(shown))
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(request_id=request_id, status=499, usage="estimated")
    assert grown("llm_requests_total", provider="anthropic", status="499") == 1
    assert grown("llm_tokens_total", direction="prompt") == 24
    assert 80 <= grown("llm_tokens_total", direction="completion") <= 120
    assert grown("llm_usage_estimated_total", provider="anthropic", model="fast") == 1
