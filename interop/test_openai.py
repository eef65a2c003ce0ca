"""The openai SDK through the gateway to an OpenAI upstream: bytes pass, and all is counted."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import openai
import openai_wire as wire
import pytest
from drive import KEY, LIMITED_KEY, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway, Launch
from openai import AsyncOpenAI, OpenAI
from openai_wire import WEATHER, call, choice, user
from pydantic import BaseModel
from upstream import JSON, Received, Reply, Upstream, json_reply

# What line splitters break on though JSON allows it, what HTML escapes, what UTF-16 needs two for.
ODD_TEXT = 'a\u2028b\u2029c\u0085d \\ " </script> 😀 \ufeff e\r\n\tf\x1f'
ROLES = [
    {"role": "developer", "content": "Be short."},
    {"role": "user", "content": "Hi", "name": "ann"},
    {"role": "assistant", "content": [wire.text("Hello.")]},
    user([wire.text("More.")]),
]
CITIES = call("call_1", "get_weather", city="Zürich"), call("call_2", "get_weather", city="Bern")
ASKS: dict[str, tuple[JSON, list[JSON]]] = {
    "text": ({}, [choice("Hello! How can I help you today?")]),
    "odd text": ({"messages": [user(ODD_TEXT)]}, [choice(ODD_TEXT * 3)]),
    "roles": ({"messages": ROLES}, [choice("More.")]),
    "refusal": ({}, [choice(refusal="I cannot help with that.")]),
    "length": ({"max_completion_tokens": 3}, [choice("One two three", finish="length")]),
    "filter": ({}, [choice("", finish="content_filter")]),
    "images": ({"messages": [user(wire.PICTURE)]}, [choice("A black pixel.")]),
    "tools": ({"tools": [WEATHER], "tool_choice": "required"}, [choice(None, *CITIES)]),
    "text and tool": ({"tools": [WEATHER]}, [choice("I look.", CITIES[0])]),
    "n": ({"n": 3}, [choice("heads"), choice("tails", finish="length"), choice("edge")]),
    "logprobs": (
        {"logprobs": True, "top_logprobs": 2, "logit_bias": {"50256": -100}},
        [choice("Hello 😀!", tokens=["Hello", " 😀", "!"])],
    ),
    "numbers": ({"temperature": 0.30, "top_p": 1e-3, "seed": 2**53 + 1}, [choice("1")]),
    "hints": ({"metadata": {"a": "b"}, "store": False, "service_tier": "flex"}, [choice("ok")]),
    "JSON": ({"response_format": {"type": "json_object"}, "stop": ["\n", "END"]}, [choice("{}")]),
}


def spliced(sent: bytes) -> bytes:
    """Return what a body becomes on its way: the alias is replaced, and nothing else."""
    assert sent.count(b'"model":"fast"') == 1
    return sent.replace(b'"model":"fast"', b'"model":"gpt-5.2"')


def without_stream_options(body: bytes) -> bytes:
    """Take the one field out again that the gateway may add."""
    field = rb'"stream_options": ?{"include_usage": ?true}'
    shorter, found = re.subn(rb", ?" + field + rb"|" + field + rb", ?", b"", body)
    assert found == 1
    return shorter


@pytest.mark.parametrize("params, choices", ASKS.values(), ids=ASKS)
def test_what_is_asked_and_answered_passes_unchanged(
    ask: Ask, upstream: Upstream, params: JSON, choices: list[JSON]
) -> None:
    upstream.script(wire.answer(*choices))
    told = ask(**params)
    body = upstream.take().body
    assert (without_stream_options(body) if ask.is_stream else body) == spliced(ask.sent)
    assert (told.model, told.id) == ("gpt-5.2-2025-12-11", wire.completion()["id"])
    assert (told.usage and told.usage.to_dict()) == (None if ask.is_stream else wire.USAGE)
    for got, meant in zip(told.choices, choices, strict=True):
        message, calls = meant["message"], map(wire.told_call, got.message.tool_calls or ())
        assert got.finish_reason == meant["finish_reason"]
        assert (got.message.content or None) == (message["content"] or None)
        assert got.message.refusal == message["refusal"]
        assert list(calls) == message.get("tool_calls", [])
        assert (got.logprobs and got.logprobs.model_dump()) == meant["logprobs"]


def test_a_tool_loop_over_two_turns(ask: Ask, upstream: Upstream) -> None:
    upstream.script(wire.answer(choice(None, *CITIES)), wire.answer(choice("Rain in both.")))
    question = user("Zürich or Bern?")
    calls = ask(messages=[question], tools=[WEATHER]).choices[0].message.tool_calls
    asked = {"role": "assistant", "content": None, "tool_calls": list(map(wire.told_call, calls))}
    results = [{"role": "tool", "tool_call_id": each.id, "content": "rain"} for each in calls]
    told = ask(messages=[question, asked, *results], tools=[WEATHER])
    assert told.choices[0].message.content == "Rain in both."
    upstream.take()
    assert upstream.take().json["messages"] == [question, asked, *results]


def test_many_at_once_get_each_its_own(gateway: Gateway, upstream: Upstream) -> None:
    def echo(received: Received) -> Reply:
        return wire.answer(choice(received.json["messages"][0]["content"]))(received)

    async def ask_all() -> None:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:

            async def ask_one(told: str) -> None:
                ask: Any = {"model": "fast", "messages": [user(told)]}
                whole = await client.chat.completions.create(**ask)
                assert whole.choices[0].message.content == told
                async with client.chat.completions.stream(**ask) as stream:
                    streamed = await stream.get_final_completion()
                assert streamed.choices[0].message.content == told

            await asyncio.gather(*(ask_one(f"{number} " * 50) for number in range(100)))

    upstream.script(*[echo] * 200)
    asyncio.run(ask_all())


class Event(BaseModel):
    name: str
    guests: list[str]


def test_parse_reads_structured_output(ask: Ask, upstream: Upstream) -> None:
    party = Event(name="Fête", guests=["Ann", "Bo"])
    upstream.script(wire.answer(choice(party.model_dump_json())))
    assert ask(response_format=Event).choices[0].message.parsed == party
    assert upstream.take().json["response_format"]["json_schema"]["strict"] is True


def test_unknown_fields_and_odd_spelling_pass(gateway: Gateway, upstream: Upstream) -> None:
    asked = (
        b'\n{ "temperature" : 0.30, "tomorrow":{"model":"fast","x":[1e400, -0]},"model"\t:  "fast",'
        b'"messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00\xf0\x9f\x98\x80"}] } \n'
    )
    answered = b'{"choices":[], "usage":{"prompt_tokens":3,"completion_tokens":1.0}, "new":1.50}\n'
    upstream.script(Reply([answered], headers={"content-type": "application/json"}), judged=False)
    url, head = f"{gateway.url}/v1/chat/completions", {"api-key": KEY}
    told = httpx2.post(url, content=asked, headers=head)
    assert (told.status_code, told.content) == (200, answered)
    assert upstream.take().body == asked.replace(b'"model"\t:  "fast"', b'"model"\t:  "gpt-5.2"')


STREAM_OPTIONS: dict[str, JSON] = {
    "absent": {},
    "null": {"stream_options": None},
    "asked": {"stream_options": {"include_usage": True}},
    "refused": {"stream_options": {"include_usage": False}},
    "other": {"stream_options": {"include_obfuscation": False}},
}


@pytest.mark.parametrize("params", STREAM_OPTIONS.values(), ids=STREAM_OPTIONS)
def test_usage_is_counted_but_shown_only_if_asked_for(
    client: OpenAI, gateway: Gateway, upstream: Upstream, params: Any
) -> None:
    grown = gateway.counting()
    told = wire.chunks(wire.completion(choice("Hello there, you.")), with_usage=True)
    upstream.script(wire.stream(*told, "[DONE]"))
    with client.chat.completions.with_streaming_response.create(
        model="fast", messages=[], stream=True, **params
    ) as answer:
        got = answer.read()
    options = params.get("stream_options") or {}
    shown = told if options.get("include_usage") else told[:-1]
    assert got == b"".join(wire.stream(*shown, "[DONE]").pieces)
    assert upstream.take().json["stream_options"] == {**options, "include_usage": True}
    line = gateway.logged(request_id=answer.headers["x-gateway-id"])
    assert (line["status"], line["usage"]) == (200, "reported")
    assert grown("llm_tokens_total", virtual_key="interop", direction="prompt") == 19
    assert grown("llm_tokens_total", virtual_key="interop", direction="completion") == 10
    assert grown("llm_token_details_total", kind="cache_read") == 8
    assert grown("llm_token_details_total", kind="reasoning") == 4
    assert grown("llm_requests_total", model="fast", provider="openai", status="200") == 1
    assert grown("llm_request_duration_seconds_count", stream="true") == 1
    assert grown("llm_stream_first_byte_seconds_count") == 1
    assert grown("llm_cost_dollars_total") > 0


def test_a_moderation_chunk_is_not_the_usage_chunk(client: OpenAI, upstream: Upstream) -> None:
    told = wire.chunks(wire.completion(choice("Hi")), with_usage=True)
    results = {"type": "moderation_results", "model": "omni-moderation-latest", "results": []}
    moderation = {**told[-1], "moderation": {"input": results, "output": results}}
    upstream.script(wire.stream(*told[:-1], moderation, told[-1], "[DONE]"))
    seen = client.chat.completions.create(model="fast", messages=[], stream=True)
    assert [chunk.to_dict() for chunk in seen] == [*told[:-1], moderation]


ERRORS = [
    (400, "context_length_exceeded", openai.BadRequestError),
    (403, "unsupported_country_region_territory", openai.PermissionDeniedError),
    (404, "model_not_found", openai.NotFoundError),
    (409, None, openai.ConflictError),
    (422, None, openai.UnprocessableEntityError),
    (429, "rate_limit_exceeded", openai.RateLimitError),
    (500, None, openai.InternalServerError),
    (502, None, openai.InternalServerError),
    (503, None, openai.InternalServerError),
]


@pytest.mark.parametrize("status, code, raised", ERRORS)
def test_an_error_of_the_upstream_passes(
    ask: Ask, gateway: Gateway, upstream: Upstream, status: int, code: str, raised: Any
) -> None:
    grown = gateway.counting()
    reply = wire.error(status, "In its own words.", code, retry_after="7", x_request_id="req_e")
    upstream.script(reply)
    with pytest.raises(raised) as caught:
        ask()
    error, response = caught.value, caught.value.response
    assert (response.content, error.status_code, error.code) == (reply.pieces[0], status, code)
    assert (error.request_id, response.headers["retry-after"]) == ("req_e", "7")
    gateway.logged(request_id=response.headers["x-gateway-id"], status=status)
    assert grown("llm_requests_total", status=str(status)) == 1
    assert grown("llm_provider_errors_total", provider="openai") == 1


@pytest.mark.parametrize("status", [401, 402])
def test_a_refused_upstream_key_is_a_502_tried_once(
    ask: Ask, gateway: Gateway, upstream: Upstream, status: int
) -> None:
    """The key is ours: a client that is told 401 would ask its user for another one."""
    grown = gateway.counting()
    ask.options["max_retries"] = 5
    upstream.script(wire.error(status, f"Incorrect API key: {UPSTREAM_KEY}.", "invalid_api_key"))
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    response = caught.value.response
    assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
    assert "Incorrect API key" not in response.text
    upstream.take()
    assert upstream.is_idle
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=502)
    assert grown("llm_provider_errors_total", provider="openai") == 1


NOBODY = {"api_key": "vk-nobody-has-this-key"}
LIMITED = {"api_key": LIMITED_KEY}
OWN_ERRORS: dict[str, Any] = {
    "malformed": ({}, {"extra_body": {"stream": "yes"}}, 400, None, openai.BadRequestError),
    "no model": ({}, {"model": ""}, 400, None, openai.BadRequestError),
    "unknown key": (NOBODY, {}, 401, "invalid_api_key", openai.AuthenticationError),
    "not allowed": (LIMITED, {}, 403, None, openai.PermissionDeniedError),
    "learns nothing": (LIMITED, {"model": "x"}, 403, None, openai.PermissionDeniedError),
    "unknown model": ({}, {"model": "x"}, 404, "model_not_found", openai.NotFoundError),
}


@pytest.mark.parametrize(
    "options, params, status, code, raised", OWN_ERRORS.values(), ids=OWN_ERRORS
)
def test_an_error_of_the_gateway_has_openais_shape(
    ask: Ask, upstream: Upstream, options: JSON, params: JSON, status: int, code: str, raised: Any
) -> None:
    ask.options.update(options)
    with pytest.raises(raised) as caught:
        ask(**params)
    error = caught.value
    assert set(error.body) == {"message", "type", "param", "code"}
    assert (error.status_code, error.code) == (status, code or error.code)
    assert error.request_id == error.response.headers["x-gateway-id"]
    assert upstream.is_idle


def test_an_error_that_is_not_json_is_wrapped(ask: Ask, upstream: Upstream) -> None:
    upstream.script(Reply([b"<h1>Bad Gateway</h1>"], 503, {"content-type": "text/html"}))
    with pytest.raises(openai.InternalServerError, match="Bad Gateway") as caught:
        ask()
    assert caught.value.status_code == 503
    assert isinstance(caught.value.body, dict) and caught.value.body["type"]


@pytest.mark.parametrize("body", [b"<html>", b"", b"[1]"])
def test_a_success_that_is_no_object_is_a_502(
    client: OpenAI, upstream: Upstream, body: bytes
) -> None:
    upstream.script(Reply([body]))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="fast", messages=[])
    assert caught.value.status_code == 502


def test_an_unreachable_upstream_is_a_502(launch: Launch) -> None:
    provider = {"api_key": UPSTREAM_KEY, "base_url": "http://127.0.0.1:1/v1"}
    models = {"fast": {"provider": "openai", "model": "gpt-5.2"}}
    gateway = launch(providers={"openai": provider}, models=models)
    grown = gateway.counting()
    with pytest.raises(openai.InternalServerError) as caught:
        Ask(gateway, "sync")()
    assert caught.value.status_code == 502
    gateway.logged(msg="access", status=502)
    assert grown("llm_requests_total", provider="openai", status="502") == 1
    assert grown("llm_provider_errors_total", provider="openai") == 1


@pytest.mark.parametrize("manner", ["sync", "sync stream"])
def test_a_late_upstream_is_a_504(launch: Launch, upstream: Upstream, manner: str) -> None:
    gateway = launch(timeouts={"first_token": 0.2, "total": 0.2})
    upstream.script(Reply([], end="mute"))
    with pytest.raises(openai.InternalServerError) as caught:
        Ask(gateway, manner)()
    assert caught.value.status_code == 504
    assert upstream.take().left.wait(1)


@pytest.mark.parametrize("status", [409, 429, 500, 502, 503])
def test_the_sdk_tries_again(ask: Ask, upstream: Upstream, status: int) -> None:
    ask.options["max_retries"] = 2
    failure = wire.error(status, "Not now.", retry_after_ms="1")
    upstream.script(failure, failure, wire.answer(choice("Now.")))
    assert ask().choices[0].message.content == "Now."
    tries = [upstream.take().headers["x-stainless-retry-count"] for _ in range(3)]
    assert tries == ["0", "1", "2"]


def test_the_sdk_honours_retry_after(client: OpenAI, upstream: Upstream) -> None:
    """Without the header the SDK waits half a second at most before it tries again."""
    failure = wire.error(429, "Slow down.", retry_after="1")
    upstream.script(failure, wire.answer(choice("Now.")))
    client.with_options(max_retries=1).chat.completions.create(model="fast", messages=[])
    first, second = upstream.take(), upstream.take()
    assert second.at - first.at >= 0.95


def test_request_headers_pass_but_for_credentials(client: OpenAI, upstream: Upstream) -> None:
    kept = {"openai-beta": "x=v1", "traceparent": "00-0af7-b7ad-01", "idempotency-key": "i1"}
    dropped = {"cookie": "a=b", "openai-organization": "org-1", "x-forwarded-for": "10.0.0.1"}
    dropped |= {"x-api-key": "sk-of-the-client", "x-gateway-strict": "1"}
    upstream.script(wire.answer(choice("Hi")))
    client.chat.completions.create(model="fast", messages=[], extra_headers={**kept, **dropped})
    got = upstream.take().headers
    assert {name: got[name] for name in kept} == kept
    assert not dropped.keys() & {name.lower() for name in got}
    assert got.getall("authorization") == [f"Bearer {UPSTREAM_KEY}"]
    assert got["user-agent"].startswith("OpenAI/Python") and "x-stainless-lang" in got
    assert KEY not in str(got)


def test_response_headers_come_back(client: OpenAI, gateway: Gateway, upstream: Upstream) -> None:
    upstream.script(wire.answer(choice("Hi")))
    answer = client.chat.completions.with_raw_response.create(model="fast", messages=[])
    assert answer.parse()._request_id == answer.headers["x-request-id"] == "req_upstream"
    assert answer.headers["openai-processing-ms"] == "7"
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"
    assert "of-the-upstream" not in str(answer.headers)
    line = gateway.logged(request_id=answer.headers["x-gateway-id"])
    meant = {
        "upstream_request_id": "req_upstream",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "virtual_key": "interop",
        "provider": "openai",
        "model": "fast",
        "stream": False,
    }
    assert meant.items() <= line.items()


def test_an_upstream_without_request_ids_gets_ours(client: OpenAI, upstream: Upstream) -> None:
    upstream.script(json_reply(wire.completion(choice("Hi"))))
    answer = client.chat.completions.with_raw_response.create(model="fast", messages=[])
    assert answer.headers["x-request-id"] == answer.headers["x-gateway-id"]


def test_a_compressed_answer_nobody_asked_for_is_read(client: OpenAI, upstream: Upstream) -> None:
    packed = gzip.compress(json.dumps(wire.completion(choice("Hi"))).encode())
    head = {"content-type": "application/json", "content-encoding": "gzip"}
    upstream.script(Reply([packed], headers=head))
    answer = client.chat.completions.create(model="fast", messages=[])
    assert answer.choices[0].message.content == "Hi"
    assert "gzip" not in upstream.take().headers.get("accept-encoding", "")


def test_routes_by_alias_provider_and_prefix(client: OpenAI, upstream: Upstream) -> None:
    for model, sent in {"home": "llama-4", "local/qwen/3": "qwen/3", "gpt-9": "gpt-9"}.items():
        upstream.script(wire.answer(choice("Hi")))
        client.chat.completions.create(model=model, messages=[])
        received = upstream.take()
        assert received.json["model"] == sent
        assert ("authorization" in received.headers) == (sent == "gpt-9"), "local has no key"


def test_models_are_those_of_the_key(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fast", "home"]
    home = {"id": "home", "object": "model", "created": 0, "owned_by": "local"}
    assert client.models.retrieve("home").to_dict() == home
    limited = client.with_options(api_key=LIMITED_KEY)
    assert [model.id for model in limited.models.list()] == ["home"]
    with pytest.raises(openai.PermissionDeniedError):
        limited.models.retrieve("fast")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such model")


def test_models_async(gateway: Gateway) -> None:
    async def names() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(names()) == ["fast", "home"]


TOLD = wire.chunks(wire.completion(choice("Hello, and so on.")), with_usage=False)
OVERLOADED = {"error": {"message": "Overloaded.", "type": "server_error"}}
# How a stream goes wrong, and the status that it would have had.
ENDS: dict[str, tuple[Reply, int]] = {
    "connection cut": (wire.stream(*TOLD[:4], end="cut"), 502),
    "clean end too early": (wire.stream(*TOLD[:4]), 502),
    "no [DONE]": (wire.stream(*TOLD), 502),
    "error event": (wire.stream(*TOLD[:4], OVERLOADED), 500),
}


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
@pytest.mark.parametrize("reply, status", ENDS.values(), ids=ENDS)
def test_a_stream_that_breaks_is_an_error(
    ask: Ask, gateway: Gateway, upstream: Upstream, reply: Reply, status: int
) -> None:
    grown = gateway.counting()
    upstream.script(reply)
    with pytest.raises(openai.APIError) as caught:
        ask()
    assert not isinstance(caught.value, openai.APIConnectionError), "it must be said, not shown"
    assert ("Overloaded." in caught.value.message) == (status == 500)
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=status)
    assert grown("llm_requests_total", status=str(status)) == 1
    assert grown("llm_provider_errors_total", provider="openai") == 1


def test_an_error_after_content_is_told_in_the_stream(client: OpenAI, upstream: Upstream) -> None:
    go = threading.Event()
    upstream.script(replace(wire.stream(TOLD[0], OVERLOADED), last_after=go))
    stream = client.chat.completions.create(model="fast", messages=[], stream=True)
    assert next(stream).to_dict() == TOLD[0]
    go.set()
    with pytest.raises(openai.APIError) as caught:
        next(stream)
    assert (caught.value.message, caught.value.type) == ("Overloaded.", "server_error")


def leave_stream(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="fast", messages=[], stream=True)
    next(stream)
    stream.close()


def leave_stream_async(client: OpenAI) -> None:
    async def leave() -> None:
        async with AsyncOpenAI(base_url=client.base_url, api_key=KEY) as other:
            stream = await other.chat.completions.create(model="fast", messages=[], stream=True)
            await anext(aiter(stream))

    asyncio.run(leave())


def leave_waiting(client: OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="fast", messages=[])


HALF_TOLD = wire.stream(*TOLD[:3], end="stall")
LEAVERS: Any = [
    (leave_stream, HALF_TOLD, "estimated"),
    (leave_stream_async, HALF_TOLD, "estimated"),
    (leave_waiting, Reply([], end="mute"), "none"),
]


@pytest.mark.parametrize("leave, reply, usage", LEAVERS)
def test_a_client_that_leaves_takes_the_upstream_with_it(
    launch: Launch, upstream: Upstream, leave: Callable[[OpenAI], None], reply: Reply, usage: str
) -> None:
    gateway = launch()
    grown = gateway.counting()
    upstream.script(reply)
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        leave(client)
        assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(msg="access", status=499, usage=usage)
    assert grown("llm_requests_total", model="fast", status="499") == 1
    assert grown("llm_usage_estimated_total", provider="openai") == (usage == "estimated")
