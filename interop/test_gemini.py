"""The google-genai SDK through the gateway: to Gemini every byte passes, to Chat Completions and to
Messages what it asks and what it is answered is translated.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic_wire
import gemini_wire as wire
import httpx2
import openai_wire
import pytest
from drive import KEY, LIMITED_KEY, MANNERS, STREAM_MANNERS, UPSTREAM_KEY, Ask, Gateway
from google import genai
from google.genai import errors, types
from openai_wire import SCHEMA, choice
from openai_wire import call as tool_call
from pydantic import BaseModel
from upstream import JSON, Answer, Reply, Upstream, json_reply

OLD, NEW, EMBEDDING = "gemini-2.5-flash", "gemini-3.8-flash", "gemini-embedding-2"
CHAT, HOME, CLAUDE, NEWEST = "gpt-4.1", "llama-4", "claude-haiku-4-5", "claude-opus-5-5"


@pytest.fixture(scope="module")
def gateway(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    provider: JSON = {"api_key": UPSTREAM_KEY, "base_url": upstream.url}
    chat = {**provider, "base_url": f"{upstream.url}/v1"}
    config: JSON = {
        "providers": {
            "gemini": provider,
            "anthropic": provider,
            "openai": chat,
            "local": {**chat, "kind": "openai-compatible"},
        },
        "models": {
            "fast": {"provider": "gemini", "model": NEW},
            "embed": {"provider": "gemini", "model": EMBEDDING},
            "chat": {"provider": "openai", "model": CHAT},
            "home": {"provider": "local", "model": HOME},
            "haiku": {"provider": "anthropic", "model": CLAUDE},
        },
        "routing": [
            {"prefix": "gemini-", "provider": "gemini"},
            {"prefix": "claude-", "provider": "anthropic"},
        ],
        "api_keys": [
            {"key": KEY, "app": "interop", "allowed_models": ["*"]},
            {"key": LIMITED_KEY, "app": "limited", "allowed_models": ["home"]},
        ],
    }
    process = Gateway(config, tmp_path_factory.mktemp("gateway"))
    yield process
    process.stop()


@dataclass
class Told:
    """A whole answer, or a stream's chunks put together as a reader of it does."""

    chunks: list[types.GenerateContentResponse]

    @property
    def parts(self) -> list[JSON]:
        """Return the parts on the wire's terms; texts of one kind are joined, empty ones left."""
        joined: list[JSON] = []
        for each in (part for chunk in self.chunks for part in chunk.parts or ()):
            part = each.model_dump(mode="json", by_alias=True, exclude_none=True)
            before = joined[-1] if joined else {}
            is_more = "text" in before and part.keys() <= before.keys() and "text" in part
            if is_more and before.get("thought") == part.get("thought"):
                joined[-1] = {**before, "text": before["text"] + part["text"]}
            elif part != {"text": ""}:
                joined.append(part)
        return joined

    @property
    def text(self) -> str:
        return "".join(p["text"] for p in self.parts if "text" in p and not p.get("thought"))

    @property
    def last(self) -> types.GenerateContentResponse:
        return self.chunks[-1]

    @property
    def finish(self) -> str | None:
        reasons = [each.finish_reason for chunk in self.chunks for each in chunk.candidates or ()]
        assert not any(reasons[:-1]), "the reason comes once, and last"
        return reasons[-1].value if reasons and reasons[-1] else None

    @property
    def usage(self) -> JSON:
        told = self.last.usage_metadata
        assert told
        counts = told.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {key: count for key, count in counts.items() if isinstance(count, int)}


class AskGemini(Ask):
    """The google-genai SDK in the same manners; `options` are of its client."""

    def __init__(self, gateway: Gateway, manner: str) -> None:
        super().__init__(gateway, manner)
        self.options: JSON = {"api_key": KEY}
        self.http: JSON = {"base_url": gateway.url}

    def client(self) -> genai.Client:
        if self.is_async:
            self.http["httpx_async_client"] = httpx2.AsyncClient(event_hooks=self.hooks())
        else:
            self.http["httpx_client"] = httpx2.Client(event_hooks=self.hooks())
        return genai.Client(**self.options, http_options=types.HttpOptions(**self.http))

    def __call__(self, contents: Any = "Hello", *, model: str = "fast", **config: Any) -> Told:
        params: JSON = {"model": model, "contents": contents, "config": config}
        return asyncio.run(self._tell_async(params)) if self.is_async else self._tell(params)

    def _tell(self, params: JSON) -> Told:
        models = self.client().models
        if self.is_stream:
            return Told(list(models.generate_content_stream(**params)))
        return Told([models.generate_content(**params)])

    async def _tell_async(self, params: JSON) -> Told:
        models = self.client().aio.models
        if self.is_stream:
            return Told([each async for each in await models.generate_content_stream(**params)])
        return Told([await models.generate_content(**params)])


@pytest.fixture(params=MANNERS)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> AskGemini:
    return AskGemini(gateway, request.param)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[genai.Client]:
    with genai.Client(api_key=KEY, http_options={"base_url": gateway.url}) as made:
        yield made


def path_of(model: str, is_stream: bool) -> str:
    return f"models/{model}:{'streamGenerateContent' if is_stream else 'generateContent'}"


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# ---- to Gemini: bytes pass ----

ODD_TEXT = 'a\u2028b\u0085c \\ " </script> 😀 \ufeff d\r\n\te\x1f "error" finishReason\n\ndata: {}'
GIF = types.Part.from_bytes(data=b"\xfb\xff\xfeGIF", mime_type="image/gif")
PAGE = types.Part.from_uri(file_uri="https://example.com/a.pdf", mime_type="application/pdf")
FUNCTION = types.FunctionDeclaration(
    name="get_weather", description="Wetter", parameters_json_schema=SCHEMA
)
TYPED = types.FunctionDeclaration(
    name="time",
    parameters=types.Schema(
        type=types.Type.OBJECT,
        properties={
            "zone": types.Schema(type=types.Type.STRING, nullable=True, format="enum", enum=["a"]),
            "min_items": types.Schema(
                type=types.Type.ARRAY, min_items=1, items=types.Schema(type=types.Type.INTEGER)
            ),
        },
        required=["zone"],
        property_ordering=["zone", "min_items"],
    ),
)
TOOLS = [types.Tool(function_declarations=[FUNCTION, TYPED])]


def mode(name: str, *allowed: str) -> types.ToolConfig:
    config = {"mode": name, "allowed_function_names": list(allowed) or None}
    return types.ToolConfig.model_validate({"function_calling_config": config})


BERN = wire.call(1, "get_weather", city="Bern"), wire.call(2, "time", zone="a")
SAMPLING = {"temperature": 0.3, "top_p": 0.95, "top_k": 64, "seed": 7, "stop_sequences": ["END"]}
SAFETY = {"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}
# What is asked of which model, and the parts and the end of its answer.
PASSED: dict[str, tuple[str, Any, JSON, list[JSON], JSON]] = {
    "text": ("fast", "Hello", {}, [wire.text("Hello! How can I help you?")], {}),
    "odd text": ("fast", ODD_TEXT, {}, [wire.text(ODD_TEXT * 3)], {}),
    "system": ("fast", "Hi", {"system_instruction": ["A", "B"]}, [wire.text("Hi.")], {}),
    "media": ("fast", [GIF, PAGE, "What?"], {}, [wire.text("A pixel.")], {}),
    "tools": ("fast", "Hi", {"tools": TOOLS, "tool_config": mode("ANY")}, [*BERN], {}),
    "old tools": (OLD, "Hi", {"tools": TOOLS}, [*BERN], {}),
    "thinking": (
        "fast",
        "Hi",
        {"thinking_config": {"include_thoughts": True, "thinking_level": "low"}},
        [wire.thought("Hm."), wire.signed(wire.text("Yes."))],
        {},
    ),
    "budget": (
        OLD,
        "Hi",
        {"thinking_config": {"thinking_budget": 512}},
        [wire.text("Yes."), wire.signed(wire.text(""))],
        {},
    ),
    "sampling": ("fast", "Hi", SAMPLING, [wire.text("One")], {}),
    "hints": ("fast", "Hi", {"labels": {"a_b": "c"}, "safety_settings": [SAFETY]}, [], {}),
    "schema": (
        "fast",
        "Hi",
        {"response_mime_type": "application/json", "response_json_schema": SCHEMA},
        [wire.text('{"city":"Bern"}')],
        {},
    ),
    "cut": ("fast", "Hi", {"max_output_tokens": 1}, [wire.text("One")], {"finish": "MAX_TOKENS"}),
    "search": (
        "fast",
        "Hi",
        {"tools": [types.Tool(google_search=types.GoogleSearch())]},
        [wire.text("It rains.")],
        wire.grounding((0, 9, "https://a.example")),
    ),
}


@pytest.mark.parametrize("model, said, config, parts, more", PASSED.values(), ids=PASSED)
def test_what_is_asked_and_answered_passes_unchanged(
    ask: AskGemini, upstream: Upstream,
    model: str, said: Any, config: JSON, parts: list[JSON], more: JSON,
) -> None:
    upstream.script(wire.answer(*parts, **more))
    told = ask(said, model=model, **config)
    received = upstream.take()
    assert digest(received.body) == digest(ask.sent)
    real = NEW if model == "fast" else model
    assert received.path.endswith(path_of(real, ask.is_stream))
    assert KEY not in str(received.headers)
    meant = list(wire.as_model_tells(tuple(parts), wire.gemini(real)))
    as_told = Told([types.GenerateContentResponse.model_validate(wire.response(*meant))])
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    assert told.text == text
    calls = [part for part in told.parts if "functionCall" in part]
    assert calls == [part for part in as_told.parts if "functionCall" in part]
    assert told.finish == more.get("finish", "STOP")
    assert told.last.model_version == "gemini-answered"
    assert told.usage == {key: n for key, n in wire.USAGE.items() if isinstance(n, int)}
    assert ask.headers["server-timing"] == wire.HEADERS["server_timing"]


def test_usage_is_counted(ask: AskGemini, gateway: Gateway, upstream: Upstream) -> None:
    """Each chunk tells it anew, and more of it; what was read from a cache is in the prompt."""
    grown = gateway.counting()
    upstream.script(wire.answer(wire.thought("Hm."), wire.text("Hello, and so on.")))
    ask()
    line = gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert (line["status"], line["usage"]) == (200, "reported")
    labels = {"virtual_key": "interop", "provider": "gemini", "model": "fast"}
    assert grown("llm_tokens_total", direction="prompt", **labels) == 24
    assert grown("llm_tokens_total", direction="completion", **labels) == 30
    for kind, tokens in {"cache_read": 8, "reasoning": 20}.items():
        assert grown("llm_token_details_total", kind=kind, **labels) == tokens
    assert grown("llm_requests_total", status="200", **labels) == 1
    assert grown("llm_stream_first_byte_seconds_count", **labels) == ask.is_stream
    assert grown("llm_usage_estimated_total") == 0


HELLO: JSON = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}


def post(gateway: Gateway, path: str, body: Any = HELLO, key: str = KEY) -> httpx2.Response:
    head = {"x-goog-api-key": key, "content-type": "application/json"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(f"{gateway.url}/v1beta/{path}", content=content, headers=head)


@pytest.mark.parametrize("parts", [each[3] for each in PASSED.values()], ids=PASSED)
def test_a_stream_passes_byte_for_byte(
    gateway: Gateway, upstream: Upstream, parts: list[JSON]
) -> None:
    told = wire.as_model_tells(tuple(parts), wire.gemini(NEW))
    reply = wire.stream(*wire.chunks(wire.response(*told)))
    upstream.script(reply)
    answer = post(gateway, f"{path_of('fast', True)}?alt=sse")
    assert digest(answer.content) == digest(b"".join(reply.pieces))
    assert answer.headers["content-type"] == reply.headers["content-type"]


def test_a_stream_without_sse_is_an_array(gateway: Gateway, upstream: Upstream) -> None:
    grown = gateway.counting()
    chunks = wire.chunks(wire.response(wire.text(ODD_TEXT)))
    upstream.script(wire.stream(*chunks))
    answer = post(gateway, path_of("fast", True))
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json() == chunks
    gateway.logged(request_id=answer.headers["x-gateway-id"], status=200, usage="reported")
    assert grown("llm_tokens_total", direction="completion") == 30


@pytest.mark.parametrize("version", ["v1", "v1beta"])
def test_a_key_in_the_url_goes_no_further(
    gateway: Gateway, upstream: Upstream, version: str
) -> None:
    """The log of the gateway is searched for it at its end."""
    upstream.script(wire.answer(wire.text("Hi")))
    url = f"{gateway.url}/{version}/{path_of('fast', True)}?key={KEY}&alt=sse"
    assert httpx2.post(url, json=HELLO).status_code == 200
    assert upstream.take().query == "alt=sse"


CLI_CONFIG = {"temperature": 1, "topP": 0.95, "topK": 64}
CLI: JSON = {
    "contents": [
        {"role": "user", "parts": [{"text": "This is the Gemini CLI. Today's date is…"}]},
        {"role": "model", "parts": [{"text": "Got it. Thanks for the context!"}]},
        {"role": "user", "parts": [{"text": "hi"}]},
    ],
    "systemInstruction": {"role": "user", "parts": [{"text": "You are an agent."}]},
    "tools": [
        {
            "functionDeclarations": [
                {"name": "read_file", "description": "Read it.", "parametersJsonSchema": SCHEMA}
            ]
        }
    ],
    "generationConfig": {
        **CLI_CONFIG,
        "thinkingConfig": {"includeThoughts": True, "thinkingLevel": "HIGH"},
    },
}


def test_the_gemini_cli_passes_untouched(gateway: Gateway, upstream: Upstream) -> None:
    reply = wire.stream(*wire.chunks(wire.response(wire.thought("Hm."), wire.text("Hi."))))
    upstream.script(reply)
    body = json.dumps(CLI, ensure_ascii=False, indent=2).encode()
    answer = post(gateway, f"{path_of(NEW, True)}?alt=sse", body)
    assert (answer.status_code, answer.content) == (200, b"".join(reply.pieces))
    assert digest(upstream.take().body) == digest(body)


@pytest.mark.parametrize("model", [CLAUDE, NEWEST, "chat", "home"])
def test_the_gemini_cli_gets_other_models(
    gateway: Gateway, upstream: Upstream, model: str
) -> None:
    """What it says of sampling in every request is not handed to models that take none of it."""
    is_claude = model.startswith("claude-")
    hi = anthropic_wire.answer(anthropic_wire.text("Hi.")) if is_claude else told_by_chat("Hi.")
    upstream.script(hi)
    answer = post(gateway, f"{path_of(model, True)}?alt=sse", CLI)
    assert answer.status_code == 200 and b'"Hi."' in answer.content, answer.text
    body = upstream.take().json
    assert body["tools"] and len(body["messages"]) == (3 if is_claude else 4)


MIXED: JSON = {
    "contents": [
        {"role": "user", "parts": [{"text": "Weather?"}]},
        {
            "role": "model",
            "parts": [{"function_call": {"name": "get_weather", "args": {"city": "Bern"}}}],
        },
        {
            "role": "user",
            "parts": [{"function_response": {"name": "get_weather", "response": {"a_b": "rain"}}}],
        },
    ],
    "system_instruction": {"parts": [{"text": "Be brief."}]},
    "tools": [{"function_declarations": [{"name": "get_weather", "parameters": {
        "type": "object", "properties": {"a_b": {"type": "string", "min_length": "1"}}}}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
    "generationConfig": {"max_output_tokens": 99, "topP": 0.5, "stop_sequences": ["END"]},
}


def told_by_chat(content: str | None, *calls: JSON, **more: Any) -> Answer:
    return openai_wire.answer(choice(content, *calls, **more))


@pytest.mark.parametrize("model", ["chat", "haiku", OLD])
def test_both_spellings_in_one_body_are_read(
    gateway: Gateway, upstream: Upstream, model: str
) -> None:
    """As the litellm SDK sends them."""
    answers = {
        "chat": told_by_chat("Rain."),
        "haiku": anthropic_wire.answer(anthropic_wire.text("Rain.")),
        OLD: wire.answer(wire.text("Rain.")),
    }
    upstream.script(answers[model], judged=model != OLD)  # a length that is text is not the SDK's
    answer = post(gateway, path_of(model, False), MIXED)
    assert answer.status_code == 200, answer.text
    assert "Rain." in answer.text
    spelled = upstream.take().body.decode()
    assert "a_b" in spelled and "END" in spelled and "Be brief." in spelled and "99" in spelled
    assert "max_output_tokens" in spelled or model != OLD


# ---- what Chat Completions and Messages must see ----


def user(content: Any) -> JSON:
    return {"role": "user", "content": content}


def content(role: str, *parts: Any) -> types.Content:
    made = [types.Part(text=part) if isinstance(part, str) else part for part in parts]
    return types.Content(role=role, parts=made)


def called(name: str, call_id: str | None = None, **args: Any) -> types.Part:
    return types.Part(function_call=types.FunctionCall(id=call_id, name=name, args=args))


def returned(name: str, call_id: str | None = None, **response: Any) -> types.Part:
    told = types.FunctionResponse(id=call_id, name=name, response=response)
    return types.Part(function_response=told)


def thinks(**config: Any) -> JSON:
    return {"thinking_config": config}


def data_url(mime_type: str, data: str) -> JSON:
    return {"type": "image_url", "image_url": {"url": f"data:{mime_type};base64,{data}"}}


STANDARD = "+//+R0lG"  # GIF's bytes in the alphabet that all but Google use
TYPED_SCHEMA = {
    "type": "object",
    "properties": {
        "zone": {"type": ["string", "null"], "enum": ["a", None]},
        "min_items": {"type": "array", "minItems": 1, "items": {"type": "integer"}},
    },
    "required": ["zone"],
}
DECLARED = [
    {"name": "get_weather", "description": "Wetter", "parameters": SCHEMA},
    {"name": "time", "parameters": TYPED_SCHEMA},
]
CHAT_TOOLS = [{"type": "function", "function": each} for each in DECLARED]
CLAUDE_TOOLS = [
    {("input_schema" if key == "parameters" else key): each[key] for key in each}
    for each in DECLARED
]
HISTORY = [
    content("user", "Weather", " and time?"),
    content("model", types.Part(text="I think.", thought=True), "I look."),
    content("model", called("get_weather", city="Bern")),
    content("model", called("get_weather", city="Chur"), called("time", zone="a")),
    content("user", returned("time", output="noon")),
    content("user", returned("get_weather", output="rain"), returned("get_weather", b=1)),
    content("user", "", "Go on."),
]
JSON_MODE = {"response_mime_type": "application/json"}
# What is asked, what Chat Completions must see of it, and Messages; None is what must not be seen.
ASKS: dict[str, tuple[Any, JSON, JSON, JSON]] = {
    "text": ("Hi", {}, {"messages": [user("Hi")]}, {"messages": [user("Hi")]}),
    "system": (
        [content("user", "", "Hi")],
        {"system_instruction": "Be brief."},
        {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]},
        {"system": [{"type": "text", "text": "Be brief."}], "messages": [user("Hi")]},
    ),
    "image": (
        [GIF, types.Part.from_uri(file_uri="https://e.com/a.png", mime_type="image/png")],
        {},
        {
            "messages": [
                user(
                    [
                        data_url("image/gif", STANDARD),
                        {"type": "image_url", "image_url": {"url": "https://e.com/a.png"}},
                    ]
                )
            ]
        },
        {
            "messages": [
                user(
                    [
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/gif",
                                "data": STANDARD,
                            },
                        },
                        {"type": "image", "source": {"type": "url", "url": "https://e.com/a.png"}},
                    ]
                )
            ]
        },
    ),
    "tools": ("Hi", {"tools": TOOLS}, {"tools": CHAT_TOOLS}, {"tools": CLAUDE_TOOLS}),
    "auto": (
        "Hi",
        {"tools": TOOLS, "tool_config": mode("AUTO")},
        {"tool_choice": "auto"},
        {"tool_choice": {"type": "auto"}},
    ),
    "any": (
        "Hi",
        {"tools": TOOLS, "tool_config": mode("ANY")},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "any"}},
    ),
    "one of them": (
        "Hi",
        {"tools": TOOLS, "tool_config": mode("ANY", "time")},
        {"tool_choice": {"type": "function", "function": {"name": "time"}}},
        {"tool_choice": {"type": "tool", "name": "time"}},
    ),
    "no tools now": (
        "Hi",
        {"tools": TOOLS, "tool_config": mode("NONE")},
        {"tool_choice": "none"},
        {"tool_choice": {"type": "none"}},
    ),
    "validated": (
        "Hi",
        {"tools": TOOLS, "tool_config": mode("VALIDATED", "time")},
        {"tools": CHAT_TOOLS[1:]},
        {"tools": CLAUDE_TOOLS[1:]},
    ),
    "sampling": (
        "Hi",
        {"temperature": 1.5, "max_output_tokens": 99, "seed": 7, "presence_penalty": 0.5},
        {"temperature": 1.5, "seed": 7, "presence_penalty": 0.5},
        {"temperature": 1, "max_tokens": 99},
    ),
    "top_k": ("Hi", {"top_k": 64}, {"top_k": None}, {"top_k": 64}),
    "stop": ("Hi", {"stop_sequences": ["END"]}, {"stop": ["END"]}, {"stop_sequences": ["END"]}),
    "hints": (
        "Hi",
        {"labels": {"a": "b"}, "safety_settings": [SAFETY]},
        {"metadata": None},
        {"metadata": None},
    ),
    "format": (
        "Hi",
        {**JSON_MODE, "response_json_schema": SCHEMA},
        {"response_format.type": "json_schema", "response_format.json_schema.schema": SCHEMA},
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
    "little thought": (
        "Hi",
        {**thinks(thinking_budget=2000, include_thoughts=True), "max_output_tokens": 9000},
        {},
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
    ),
    "thought over the cap": (
        "Hi",
        {**thinks(thinking_budget=9000), "max_output_tokens": 3000},
        {},
        {"thinking.budget_tokens": 2488},
    ),
    "no thought": ("Hi", thinks(thinking_budget=0), {"reasoning_effort": None}, {}),
    "as much as it likes": ("Hi", thinks(thinking_budget=-1), {"reasoning_effort": None}, {}),
    "level": (
        "Hi",
        {**thinks(thinking_level="medium"), "max_output_tokens": 9000},
        {},
        {"thinking.budget_tokens": 4096},
    ),
}


def seen(body: JSON, path: str) -> Any:
    """Return what is at a path of keys, None if nothing is; a text may be a list of one."""
    value: Any = body
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def plain(body: JSON) -> JSON:
    """Return the body with a lone text as a string, so that both its spellings compare equal."""

    def short(content: Any) -> Any:
        is_text = isinstance(content, list) and len(content) == 1 and content[0]["type"] == "text"
        return content[0]["text"] if is_text else content

    messages = [{**each, "content": short(each.get("content"))} for each in body["messages"]]
    return {**body, "messages": messages}


@pytest.mark.parametrize(
    "said, config, wanted", [(a, b, c) for a, b, c, _ in ASKS.values()], ids=ASKS
)
def test_a_request_becomes_one_that_openai_takes(
    ask: AskGemini, upstream: Upstream, said: Any, config: JSON, wanted: JSON
) -> None:
    upstream.script(told_by_chat("Hello!"))
    assert ask(said, model="chat", **config).text == "Hello!"
    body = plain(upstream.take().json)
    assert {path: seen(body, path) for path in wanted} == wanted
    assert (body["model"], bool(body.get("stream"))) == (CHAT, ask.is_stream)


@pytest.mark.parametrize(
    "said, config, wanted", [(a, b, d) for a, b, _, d in ASKS.values()], ids=ASKS
)
def test_a_request_becomes_one_that_anthropic_takes(
    ask: AskGemini, upstream: Upstream, said: Any, config: JSON, wanted: JSON
) -> None:
    upstream.script(anthropic_wire.answer(anthropic_wire.text("Hello!")))
    assert ask(said, model="haiku", **config).text == "Hello!"
    body = plain(upstream.take().json)
    if "system" in wanted:
        body["system"] = anthropic_wire.blocks(body["system"])
    assert {path: seen(body, path) for path in wanted} == wanted
    assert (body["model"], bool(body.get("stream"))) == (CLAUDE, ask.is_stream)


def test_an_agents_history_is_put_in_order(ask: AskGemini, upstream: Upstream) -> None:
    """It has no ids, results in disorder, and one turn in the many chunks that it came in."""
    upstream.script(
        told_by_chat("A"), told_by_chat("A"), anthropic_wire.answer(anthropic_wire.text("B"))
    )
    for model in ("chat", "chat", "haiku"):
        ask(HISTORY, model=model, tools=TOOLS)
    first, second, third = (upstream.take() for _ in range(3))
    assert first.body == second.body, "the same request is the same bytes"
    asked, made, *results, last = first.json["messages"]
    assert (made["content"], "I think." in first.body.decode()) == ("I look.", False)
    calls = [(each["id"], each["function"]) for each in made["tool_calls"]]
    assert len({call_id for call_id, _ in calls}) == 3
    assert [result["tool_call_id"] for result in results] == [call_id for call_id, _ in calls]
    assert [plain_text(each["content"]) for each in results] == ["rain", '{"b":1}', "noon"]
    assert plain_text(last["content"]) == "Go on."
    asked, made, answered = third.json["messages"]
    kinds = [block["type"] for block in made["content"]]
    assert kinds == ["text", "tool_use", "tool_use", "tool_use"]
    kinds = [block["type"] for block in answered["content"]]
    assert kinds == ["tool_result", "tool_result", "tool_result", "text"]


def plain_text(content: Any) -> str:
    told = content if isinstance(content, str) else content[0]["text"]
    return str(told).replace(": ", ":")


REFUSED: dict[str, tuple[Any, JSON]] = {
    "stored file": (
        [types.Part.from_uri(file_uri="gs://b/a.png", mime_type="image/png")],
        {},
    ),
    "video": (
        [types.Part.from_uri(file_uri="https://youtu.be/x", mime_type="video/mp4")],
        {},
    ),
    "candidates": ("Hi", {"candidate_count": 2}),
    "modalities": ("Hi", {"response_modalities": ["IMAGE"]}),
    "cached content": ("Hi", {"cached_content": "cachedContents/a"}),
    "unknown tool": ("Hi", {"tools": TOOLS, "tool_config": mode("ANY", "nothing")}),
}


@pytest.mark.parametrize("model", ["chat", "haiku"])
@pytest.mark.parametrize("said, config", REFUSED.values(), ids=REFUSED)
def test_what_would_make_the_answer_wrong_is_refused(
    gateway: Gateway, upstream: Upstream, model: str, said: Any, config: JSON
) -> None:
    with pytest.raises(errors.ClientError) as caught:
        AskGemini(gateway, "sync")(said, model=model, **config)
    assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
    assert upstream.is_idle


def test_losses_are_named(ask: AskGemini, upstream: Upstream) -> None:
    upstream.script(told_by_chat("Hi"))
    ask(model="chat", top_k=4, safety_settings=[SAFETY], labels={"a": "b"})
    lost = {name.strip() for name in ask.headers["x-gateway-lost"].split(",")}
    assert lost == {"top_k", "safetySettings", "labels"}


# ---- what comes back ----

USAGES = {
    "chat": {
        **{"promptTokenCount": 19, "cachedContentTokenCount": 8, "thoughtsTokenCount": 4},
        **{"candidatesTokenCount": 6, "totalTokenCount": 29},
    },
    "haiku": {
        **{"promptTokenCount": 24, "cachedContentTokenCount": 8, "thoughtsTokenCount": 20},
        **{"candidatesTokenCount": 10, "totalTokenCount": 54},
    },
}
USE = anthropic_wire.tool_use
CALLS = [("c1", "get_weather", {"city": "Zürich"}), ("c2", "time", {})]
CHAT_CALLS = tool_call("c1", "get_weather", city="Zürich"), tool_call("c2", "time")
CITED = anthropic_wire.text("It rains.", "https://a.example")
# Which model answers what, and the text, the calls and the end that Gemini's answer has.
ANSWERS: dict[str, tuple[str, Answer, str, list[Any], str]] = {
    "chat: text": ("chat", told_by_chat(ODD_TEXT), ODD_TEXT, [], "STOP"),
    "chat: cut": ("chat", told_by_chat("One", finish="length"), "One", [], "MAX_TOKENS"),
    "chat: filter": ("chat", told_by_chat("One", finish="content_filter"), "One", [], "SAFETY"),
    "chat: calls": (
        "chat",
        told_by_chat("I look.", *CHAT_CALLS),
        *("I look.", CALLS, "STOP"),
    ),
    "claude: text": (
        "haiku",
        anthropic_wire.answer(anthropic_wire.text("Hello, "), anthropic_wire.text(ODD_TEXT)),
        *(f"Hello, {ODD_TEXT}", [], "STOP"),
    ),
    "claude: cut": (
        "haiku",
        anthropic_wire.answer(anthropic_wire.text("One"), stop="max_tokens"),
        *("One", [], "MAX_TOKENS"),
    ),
    "claude: full": (
        "haiku",
        anthropic_wire.answer(
            anthropic_wire.text("One"), stop="model_context_window_exceeded"
        ),
        *("One", [], "MAX_TOKENS"),
    ),
    "claude: stop": (
        "haiku",
        anthropic_wire.answer(
            anthropic_wire.text("One"), stop="stop_sequence", stop_sequence="END"
        ),
        *("One", [], "STOP"),
    ),
    "claude: refusal": (
        "haiku",
        anthropic_wire.answer(anthropic_wire.text("One"), stop="refusal"),
        *("One", [], "SAFETY"),
    ),
    "claude: calls": (
        "haiku",
        anthropic_wire.answer(USE("c1", "get_weather", city="Zürich"), USE("c2", "time")),
        *("", CALLS, "STOP"),
    ),
    "claude: citations": ("haiku", anthropic_wire.answer(CITED), "It rains.", [], "STOP"),
}


@pytest.mark.parametrize("model, answer, text, calls, finish", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_becomes_one_of_gemini(
    ask: AskGemini, gateway: Gateway, upstream: Upstream,
    model: str, answer: Answer, text: str, calls: list[Any], finish: str,
) -> None:
    grown = gateway.counting()
    upstream.script(answer)
    told = ask(model=model)
    assert (told.text, told.finish) == (text, finish)
    made = [part["functionCall"] for part in told.parts if "functionCall" in part]
    assert [(each["id"], each["name"], each.get("args", {})) for each in made] == calls
    assert told.usage == USAGES[model]
    assert {chunk.model_version for chunk in told.chunks} == {model}
    assert len({chunk.response_id for chunk in told.chunks}) == 1 and told.last.response_id
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=200, usage="reported")
    prompt = USAGES[model]["promptTokenCount"]
    assert grown("llm_tokens_total", model=model, direction="prompt") == prompt


def test_a_citation_has_its_place(ask: AskGemini, upstream: Upstream) -> None:
    """As Google's own example puts them into the text, here counting bytes as the API says."""
    says = anthropic_wire.text
    upstream.script(anthropic_wire.answer(
        says("Zürich: "), says("It rains.", "https://a.example", "https://b.example"), says(" So "),
        says("stay in.", "https://a.example")))
    told = ask(model="haiku")
    (candidate,) = told.last.candidates or ()
    grounding, text = candidate.grounding_metadata, told.text.encode()
    assert grounding
    uris = [chunk.web.uri for chunk in grounding.grounding_chunks or () if chunk.web]
    supports = grounding.grounding_supports or []
    for support in reversed(supports):
        place = support.segment
        assert place and place.end_index and place.text
        assert text[place.start_index : place.end_index].decode() == place.text
        marks = "".join(f"[{uris[index]}]" for index in support.grounding_chunk_indices or ())
        text = text[: place.end_index] + marks.encode() + text[place.end_index :]
    a, b = "[https://a.example]", "[https://b.example]"
    assert text.decode() == f"Zürich: It rains.{a}{b} So stay in.{a}"


def test_nothing_but_a_refusal_is_a_blocked_prompt(ask: AskGemini, upstream: Upstream) -> None:
    upstream.script(anthropic_wire.answer(stop="refusal"))
    told = ask(model="haiku")
    feedback = told.last.prompt_feedback
    assert (told.text, feedback and feedback.block_reason) == ("", types.BlockedReason.SAFETY)


@pytest.mark.parametrize("model", ["chat", "haiku"])
@pytest.mark.parametrize("is_sse", [True, False])
def test_a_stream_is_as_google_sends_it(
    gateway: Gateway, upstream: Upstream, model: str, is_sse: bool
) -> None:
    """Data and blank lines and nothing else, or one array; all fields are Gemini's."""
    claudes = anthropic_wire.answer(anthropic_wire.text("I look."), USE("c1", "time"))
    chats = told_by_chat("I look.", tool_call("c1", "time"))
    upstream.script({"chat": chats, "haiku": claudes}[model])
    answer = post(gateway, path_of(model, True) + ("?alt=sse" if is_sse else ""))
    if is_sse:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.endswith(("\n\n", "\r\n\r\n"))
        lines = [line for line in answer.text.splitlines() if line]
        assert all(line.startswith("data: ") for line in lines)
        chunks = [json.loads(line[6:]) for line in lines]
    else:
        assert answer.headers["content-type"].startswith("application/json")
        chunks = answer.json()
    for chunk in chunks:
        wire.read_response(json.dumps(chunk))
        assert chunk["candidates"][0]["content"]["parts"], "or the SDK's chats forget the turn"
    ends = [each.get("finishReason") for chunk in chunks for each in chunk.get("candidates", ())]
    assert (ends[-1], set(ends[:-1])) == ("STOP", {None})
    assert "totalTokenCount" in chunks[-1]["usageMetadata"]


# ---- chats, tools that the SDK calls by itself, structured output ----


def get_weather(city: str) -> str:
    """Tell the weather."""
    assert city in ("Bern", "Chur")
    return "rain"


def noon() -> str:
    """Tell the time."""
    return "noon"


BERN_BY_CHAT = tool_call("c1", "get_weather", city="Bern")
THINK = {"thinking_config": {"include_thoughts": True, "thinking_budget": 2048}}
LOOPS: dict[str, tuple[str, JSON, list[Answer]]] = {
    "gemini": (
        "fast",
        {},
        [
            wire.answer(
                wire.thought("Two."),
                *(wire.call(1, "get_weather", city="Bern"), wire.call(2, "noon")),
            ),
            wire.answer(wire.call(3, "get_weather", city="Chur")),
            wire.answer(wire.signed(wire.text("Sun."))),
            wire.answer(wire.text("Yes.")),
        ],
    ),
    "old gemini": (
        OLD,
        {},
        [
            wire.answer(wire.call(1, "get_weather", city="Bern"), wire.call(2, "noon")),
            wire.answer(wire.call(3, "get_weather", city="Chur")),
            wire.answer(wire.text("Sun.")),
            wire.answer(wire.text("Yes.")),
        ],
    ),
    "chat": (
        "chat",
        {},
        [
            told_by_chat("I look.", BERN_BY_CHAT, tool_call("c2", "noon")),
            told_by_chat(None, tool_call("c3", "get_weather", city="Chur")),
            told_by_chat("Sun."),
            told_by_chat("Yes."),
        ],
    ),
    "claude": (
        "haiku",
        {**THINK, "max_output_tokens": 9000},
        [
            anthropic_wire.answer(
                anthropic_wire.thinking("Two things."),
                anthropic_wire.redacted(),
                anthropic_wire.text("I look."),
                *(USE("c1", "get_weather", city="Bern"), USE("c2", "noon")),
            ),
            anthropic_wire.answer(
                anthropic_wire.thinking("Once more."), USE("c3", "get_weather", city="Chur")
            ),
            anthropic_wire.answer(anthropic_wire.text("Sun.")),
            anthropic_wire.answer(anthropic_wire.text("Yes.")),
        ],
    ),
}


@pytest.mark.parametrize("model, config, answers", LOOPS.values(), ids=LOOPS)
def test_a_chat_calls_tools_and_remembers(
    ask: AskGemini, upstream: Upstream, model: str, config: JSON, answers: list[Answer]
) -> None:
    """The judges see to signatures, results, and their ids, which the SDK does not send where it
    calls by itself; a streamed turn it tells again in as many contents as it had chunks."""
    upstream.script(*answers)
    config = {**config, "tools": [get_weather, noon]}
    config["automatic_function_calling"] = {"disable": ask.is_stream}
    params: JSON = {"model": model, "config": config}
    said = ["Where is it sunny?", "Sure?"]
    texts = asyncio.run(talk_async(ask, params, said)) if ask.is_async else talk(ask, params, said)
    assert [text.replace("I look.", "") for text in texts] == ["Sun.", "Yes."]
    bodies = [upstream.take().json for _ in answers]
    turns = [body.get("contents") or body["messages"] for body in bodies]
    for shorter, longer in zip(turns, turns[1:], strict=False):
        assert longer[: len(shorter)] == shorter, "what was said is said in the same words again"
    assert "rain" in json.dumps(turns[1]) and "noon" in json.dumps(turns[1])
    if model == "haiku":
        thoughts = anthropic_wire.of_type("thinking", bodies[2]["messages"][1]["content"])
        assert thoughts == [anthropic_wire.thinking("Two things.")]
        assert bodies[2]["thinking"]["type"] == "enabled", "no thought was lost"


def talk(ask: AskGemini, params: JSON, said: list[str]) -> list[str]:
    chat = ask.client().chats.create(**params)
    if not ask.is_stream:
        return [chat.send_message(each).text or "" for each in said]
    told = []
    for message in said:
        chunks = list(chat.send_message_stream(message))
        while results := results_of(chunks):
            chunks = list(chat.send_message_stream(results))
        told.append(Told(chunks).text)
    return told


async def talk_async(ask: AskGemini, params: JSON, said: list[str]) -> list[str]:
    chat = ask.client().aio.chats.create(**params)
    if not ask.is_stream:
        return [(await chat.send_message(each)).text or "" for each in said]
    told = []
    for message in said:
        chunks = [chunk async for chunk in await chat.send_message_stream(message)]
        while results := results_of(chunks):
            chunks = [chunk async for chunk in await chat.send_message_stream(results)]
        told.append(Told(chunks).text)
    return told


def results_of(chunks: list[types.GenerateContentResponse]) -> list[types.Part]:
    """Call what an answer calls, as an app does that streams."""
    calls = [call for chunk in chunks for call in chunk.function_calls or ()]
    said = {"get_weather": "rain", "noon": "noon"}
    return [returned(call.name, call.id, result=said[call.name]) for call in calls]


class Place(BaseModel):
    name: str
    heights: list[int]
    inside: str | None = None


@pytest.mark.parametrize("model", ["fast", OLD, "chat", "haiku"])
def test_structured_output_is_parsed(client: genai.Client, upstream: Upstream, model: str) -> None:
    place = Place(name="Zürich", heights=[392, 871])
    told = place.model_dump_json()
    answers = {
        "chat": told_by_chat(told),
        "haiku": anthropic_wire.answer(anthropic_wire.text(told)),
    }
    upstream.script(answers.get(model, wire.answer(wire.text(told))))
    config = types.GenerateContentConfig(**JSON_MODE, response_schema=Place)
    answer = client.models.generate_content(model=model, contents="Where?", config=config)
    assert answer.parsed == place
    body = upstream.take().json
    if model in ("fast", OLD):
        return
    spelled = json.dumps(body)
    assert '"object"' in spelled and "property_ordering" not in spelled and "OBJECT" not in spelled


def test_thoughts_are_shown_to_who_asked(ask: AskGemini, upstream: Upstream) -> None:
    told = anthropic_wire.thinking("Let me see."), anthropic_wire.text("Hello.")
    upstream.script(*[anthropic_wire.answer(*told)] * 2)
    shown = ask(model="haiku", **THINK, max_output_tokens=9000)
    thoughts = [part["text"] for part in shown.parts if part.get("thought")]
    assert ("".join(thoughts), shown.text) == ("Let me see.", "Hello.")
    hidden = ask(model="haiku", **thinks(thinking_budget=2048), max_output_tokens=9000)
    assert not any(part.get("thought") for part in hidden.parts)
    assert hidden.text == "Hello."


def test_its_other_transport_reads_a_stream(gateway: Gateway, upstream: Upstream) -> None:
    """Where aiohttp is installed, the SDK's asynchronous half uses it, with a parser of its own."""

    async def tell() -> list[str]:
        async with genai.Client(api_key=KEY, http_options={"base_url": gateway.url}).aio as client:
            params: Any = {"model": "chat", "contents": "Hi"}
            stream = await client.models.generate_content_stream(**params)
            return [chunk.text or "" async for chunk in stream]

    upstream.script(told_by_chat(ODD_TEXT))
    assert "".join(asyncio.run(tell())) == ODD_TEXT


# ---- other methods ----


def test_tokens_are_counted_by_the_upstream(client: genai.Client, upstream: Upstream) -> None:
    upstream.script(json_reply({"totalTokens": 31}))
    assert client.models.count_tokens(model="fast", contents="Hi").total_tokens == 31
    received = upstream.take()
    assert received.path.endswith(f"/models/{NEW}:countTokens")
    assert received.json == HELLO


@pytest.mark.parametrize("model", [EMBEDDING, "embed"])
def test_texts_are_embedded_by_the_upstream(
    client: genai.Client, upstream: Upstream, model: str
) -> None:
    """The body names the model too, and must name the one that the path has."""
    upstream.script(json_reply({"embeddings": [{"values": [1.0, 0.5]}]}))
    told = client.models.embed_content(model=model, contents="Hi")
    assert told.embeddings and told.embeddings[0].values == [1.0, 0.5]
    received = upstream.take()
    assert received.path.endswith(f"/models/{EMBEDDING}:batchEmbedContents")
    assert [each["model"] for each in received.json["requests"]] == [f"models/{EMBEDDING}"]


def test_models_are_listed_as_google_lists_them(client: genai.Client, gateway: Gateway) -> None:
    names = [f"models/{name}" for name in ("fast", "embed", "chat", "home", "haiku")]
    assert [model.name for model in client.models.list()] == names
    limited = genai.Client(api_key=LIMITED_KEY, http_options={"base_url": gateway.url})
    assert [model.name for model in limited.models.list()] == ["models/home"]
    for version in ("v1", "v1beta"):
        answer = httpx2.get(f"{gateway.url}/{version}/models?key={KEY}").json()
        assert [model["name"] for model in answer["models"]] == names


def test_a_model_is_one_of_googles(client: genai.Client) -> None:
    assert client.models.get(model="home").name == "models/home"
    with pytest.raises(errors.ClientError) as caught:
        client.models.get(model="no-such-model")
    assert (caught.value.code, caught.value.status) == (404, "NOT_FOUND")


# ---- errors ----

STATUSES = [
    (400, "INVALID_ARGUMENT"),
    (403, "PERMISSION_DENIED"),
    (404, "NOT_FOUND"),
    (409, "ABORTED"),
    (429, "RESOURCE_EXHAUSTED"),
    (500, "INTERNAL"),
    (503, "UNAVAILABLE"),
    (504, "DEADLINE_EXCEEDED"),
]


@pytest.mark.parametrize("code, status", STATUSES)
def test_an_error_of_gemini_passes(
    ask: AskGemini, gateway: Gateway, upstream: Upstream, code: int, status: str
) -> None:
    reply = wire.error(code, status, "In its own words.", wire.RETRY)
    upstream.script(reply)
    with pytest.raises(errors.APIError) as caught:
        ask()
    told = caught.value
    assert (told.code, told.status, told.message) == (code, status, "In its own words.")
    assert told.details == json.loads(reply.pieces[0])
    gateway.logged(request_id=ask.headers["x-gateway-id"], status=code)


@pytest.mark.parametrize("error", wire.KEY_ERRORS.values(), ids=wire.KEY_ERRORS)
def test_a_refused_upstream_key_is_a_502(
    ask: AskGemini, upstream: Upstream, error: Any
) -> None:
    upstream.script(wire.error(*error))
    with pytest.raises(errors.ServerError) as caught:
        ask()
    assert error[2] not in str(caught.value)
    assert caught.value.code in (502, 503)


# What another vendor answers, and what Gemini's client sees of it.
FOREIGN: list[tuple[str, Reply, int, str]] = [
    ("chat", openai_wire.error(400, "Odd."), 400, "INVALID_ARGUMENT"),
    ("chat", openai_wire.error(403, "Odd."), 403, "PERMISSION_DENIED"),
    ("chat", openai_wire.error(404, "Odd."), 404, "NOT_FOUND"),
    ("chat", openai_wire.error(429, "Odd.", retry_after="7"), 429, "RESOURCE_EXHAUSTED"),
    ("chat", openai_wire.error(500, "Odd."), 500, "INTERNAL"),
    ("chat", openai_wire.error(503, "Odd."), 503, "UNAVAILABLE"),
    ("haiku", anthropic_wire.error(400, "invalid_request_error", "Odd."), 400, "INVALID_ARGUMENT"),
    ("haiku", anthropic_wire.error(413, "request_too_large", "Odd."), 413, "INVALID_ARGUMENT"),
    ("haiku", anthropic_wire.error(409, "conflict_error", "Odd."), 409, "ABORTED"),
    ("haiku", anthropic_wire.error(504, "timeout_error", "Odd."), 504, "DEADLINE_EXCEEDED"),
    ("haiku", anthropic_wire.error(529, "overloaded_error", "Odd."), 503, "UNAVAILABLE"),
]


@pytest.mark.parametrize("model, reply, code, status", FOREIGN)
def test_an_error_becomes_one_of_google(
    ask: AskGemini, upstream: Upstream, model: str, reply: Reply, code: int, status: str
) -> None:
    upstream.script(reply)
    with pytest.raises(errors.APIError, match="Odd.") as caught:
        ask(model=model)
    check_own_error(caught.value, code, status)
    assert ask.headers.get("retry-after") == reply.headers.get("retry-after")


def check_own_error(error: errors.APIError, code: int, status: str) -> None:
    assert (error.code, error.status) == (code, status)
    assert error.details.keys() == {"error"}
    assert {"code", "message", "status"} <= error.details["error"].keys()


NOBODY = {"api_key": "vk-nobody-has-this-key"}
# The options, the model, and the code and the status of the gateway's answer.
OWN_ERRORS: dict[str, tuple[JSON, str, int, str]] = {
    "unknown key": (NOBODY, "fast", 401, "UNAUTHENTICATED"),
    "not allowed": ({"api_key": LIMITED_KEY}, "fast", 403, "PERMISSION_DENIED"),
    "unknown model": ({}, "x", 404, "NOT_FOUND"),
}


@pytest.mark.parametrize("options, model, code, status", OWN_ERRORS.values(), ids=OWN_ERRORS)
def test_an_error_of_the_gateway_has_googles_shape(
    ask: AskGemini, upstream: Upstream, options: JSON, model: str, code: int, status: str
) -> None:
    ask.options.update(options)
    with pytest.raises(errors.ClientError) as caught:
        ask(model=model)
    check_own_error(caught.value, code, status)
    assert NOBODY["api_key"] not in str(caught.value)
    assert upstream.is_idle


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"contents": 1}'])
def test_a_malformed_body_is_a_400(gateway: Gateway, upstream: Upstream, body: bytes) -> None:
    answer = post(gateway, path_of("haiku", False), body)
    assert answer.status_code == 400
    assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"
    assert upstream.is_idle


CHAT_CHUNKS = openai_wire.chunks(
    openai_wire.completion(choice("Hello, and so on.")), with_usage=True
)
CLAUDE_EVENTS = anthropic_wire.events(
    anthropic_wire.message(anthropic_wire.text("Hello, and so on."))
)
GEMINI_CHUNKS = wire.chunks(wire.response(wire.text("Hello, and so on.")))
OVERLOADED = wire.error_body(503, "UNAVAILABLE", "Overloaded")
CHAT_ERROR = {"error": {"message": "Overloaded", "type": "server_error", "code": None}}
CLAUDE_ERROR = anthropic_wire.error_event("overloaded_error", "Overloaded")
# How a stream goes wrong after its 200.
BROKEN: dict[str, tuple[str, Reply]] = {
    "gemini: cut": ("fast", wire.stream(*GEMINI_CHUNKS[:2], end="cut")),
    "gemini: too early": ("fast", wire.stream(*GEMINI_CHUNKS[:2])),
    "gemini: overloaded": ("fast", wire.stream(*GEMINI_CHUNKS[:2], OVERLOADED)),
    "chat: cut": ("chat", openai_wire.stream(*CHAT_CHUNKS[:3], end="cut")),
    "chat: too early": ("chat", openai_wire.stream(*CHAT_CHUNKS[:3])),
    "chat: overloaded": ("chat", openai_wire.stream(*CHAT_CHUNKS[:3], CHAT_ERROR)),
    "claude: cut": ("haiku", anthropic_wire.stream(*CLAUDE_EVENTS[:6], end="cut")),
    "claude: too early": ("haiku", anthropic_wire.stream(*CLAUDE_EVENTS[:6])),
    "claude: overloaded": ("haiku", anthropic_wire.stream(*CLAUDE_EVENTS[:6], CLAUDE_ERROR)),
}


@pytest.mark.parametrize("model, reply", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_the_sdk_raises_where_a_stream_breaks(
    ask: AskGemini, gateway: Gateway, upstream: Upstream, model: str, reply: Reply
) -> None:
    """Its code must be a number, or the SDK dies of it."""
    grown = gateway.counting()
    upstream.script(reply)
    with pytest.raises(errors.ServerError) as caught:
        ask(model=model)
    assert isinstance(caught.value.code, int) and caught.value.status
    line = gateway.logged(request_id=ask.headers["x-gateway-id"])
    assert line["status"] >= 500
    assert grown("llm_provider_errors_total") == 1


@pytest.mark.parametrize("ask", STREAM_MANNERS, indirect=True)
def test_an_error_as_first_chunk_is_a_real_status(ask: AskGemini, upstream: Upstream) -> None:
    upstream.script(wire.stream(OVERLOADED), anthropic_wire.stream(CLAUDE_ERROR))
    for model in ("fast", "haiku"):
        with pytest.raises(errors.ServerError, match="Overloaded") as caught:
            ask(model=model)
        assert caught.value.code == 503


@pytest.mark.parametrize("model", ["fast", "haiku"])
def test_a_client_that_leaves_takes_the_upstream_with_it(
    gateway: Gateway, upstream: Upstream, model: str
) -> None:
    grown = gateway.counting()
    foreign = anthropic_wire.stream(*CLAUDE_EVENTS[:6], end="stall")
    upstream.script({"fast": wire.stream(*GEMINI_CHUNKS[:2], end="stall"), "haiku": foreign}[model])
    url = f"{gateway.url}/v1beta/{path_of(model, True)}?alt=sse"
    with httpx2.stream("POST", url, json=HELLO, headers={"x-goog-api-key": KEY}) as answer:
        next(answer.iter_bytes())
    assert upstream.take().left.wait(1), "the upstream was not left within a second"
    gateway.logged(request_id=answer.headers["x-gateway-id"], status=499)
    assert grown("llm_requests_total", status="499") == 1


# ---- the scripted upstream itself ----


@pytest.mark.parametrize("model", [OLD, NEW])
@pytest.mark.parametrize("parts", [each[3] for each in PASSED.values()], ids=PASSED)
def test_the_sdk_reads_both_spellings_alike(
    upstream: Upstream, parts: list[JSON], model: str
) -> None:
    upstream.script(*[wire.answer(*parts)] * 2)
    params: Any = {"model": model, "contents": "Hi"}
    with genai.Client(api_key=UPSTREAM_KEY, http_options={"base_url": upstream.url}) as client:
        whole = Told([client.models.generate_content(**params)])
        streamed = Told(list(client.models.generate_content_stream(**params)))
    assert (streamed.text, streamed.finish) == (whole.text, whole.finish)
    told = [[p for p in each.parts if "functionCall" in p] for each in (whole, streamed)]
    assert told[0] == told[1]
    assert streamed.usage == whole.usage
