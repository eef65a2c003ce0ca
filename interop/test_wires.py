"""The scripted upstreams: the SDKs read what they tell, and their judges refuse what is wrong."""

from __future__ import annotations

import json
from typing import Any

import anthropic_wire
import openai_wire
import pytest
from anthropic import Anthropic
from anthropic_wire import redacted, searched, text, thinking, tool_use
from drive import UPSTREAM_KEY
from openai import OpenAI
from openai_wire import SCHEMA, call, choice, told_call, user
from pydantic import ValidationError
from upstream import JSON, Upstream

OLD, NEW, NEWEST = "claude-haiku-4-5", "claude-opus-4-8", "claude-opus-5-5"


def test_the_anthropic_sdk_reads_both_spellings_alike(upstream: Upstream) -> None:
    content = [
        *(thinking("Let me see."), redacted(), *searched("rain?")),
        text("It rains.", "https://a.example", "https://b.example"),
        *(tool_use("t1", "f", city="Zürich"), tool_use("t2", "g")),
    ]
    upstream.script(*[anthropic_wire.answer(*content)] * 2, judged=False)
    params: Any = {"model": OLD, "max_tokens": 9, "messages": [user("Hi")]}
    with Anthropic(base_url=upstream.url, api_key=UPSTREAM_KEY) as client:
        whole = client.messages.create(**params)
        with client.messages.stream(**params) as stream:
            streamed = stream.get_final_message()
    assert streamed.to_dict()["content"] == whole.to_dict()["content"]
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_the_openai_sdk_reads_both_spellings_alike(upstream: Upstream) -> None:
    choices = choice("A", call("c1", "f", a=1), call("c2", "g")), choice("B")
    upstream.script(*[openai_wire.answer(*choices)] * 2)
    params: Any = {"model": "gpt-5.2", "messages": [user("Hi")]}
    with OpenAI(base_url=f"{upstream.url}/v1", api_key=UPSTREAM_KEY) as client:
        whole = client.chat.completions.create(**params)
        with client.chat.completions.stream(**params) as stream:
            streamed = stream.until_done().current_completion_snapshot
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.message.content == other.message.content
        calls = [each.message.tool_calls or () for each in (one, other)]
        assert list(map(told_call, calls[0])) == list(map(told_call, calls[1]))


REFUSED_BY_OPENAI: list[JSON] = [
    {"x": 1},
    {"messages": [{**user("Hi"), "x": 1}]},
    {"messages": [user([{"type": "text"}])]},
    {"messages": 1},
    {"stream": "yes"},
    {"n": "2"},
]


@pytest.mark.parametrize("change", REFUSED_BY_OPENAI, ids=json.dumps)
def test_the_judge_of_openai_refuses(change: JSON) -> None:
    body = {"model": "m", "messages": [user("Hi")], "stop": ["a"], "tools": [openai_wire.WEATHER]}
    openai_wire.read_request(json.dumps(body))
    with pytest.raises(ValidationError):
        openai_wire.read_request(json.dumps({**body, **change}))


def said(content: Any) -> JSON:
    return {"role": "assistant", "content": content}


def formatted(schema: JSON) -> JSON:
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


HI, CALLED = user("Hi"), said([tool_use("t1", "f")])
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "r"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
BUDGET = {"type": "enabled", "budget_tokens": 1024}
FORCED = {"tools": [TOOL], "tool_choice": {"type": "any"}}
FORGED = {"type": "thinking", "thinking": "a", "signature": "b"}
REFUSED_BY_ANTHROPIC: dict[str, JSON] = {
    "unknown field": {"seed": 1},
    "unknown field deep down": {"messages": [user([{"type": "text", "text": "a", "x": 1}])]},
    "number as text": {"max_tokens": "9"},
    "assistant first": {"messages": [said("a"), HI]},
    "unmerged turns": {"messages": [HI, HI]},
    "prefill": {"model": NEW, "messages": [HI, said("a")]},
    "space at the end": {"messages": [HI, said("a ")]},
    "system turn": {"messages": [HI, {"role": "system", "content": "a"}]},
    "system before a question": {
        "model": NEW, "messages": [HI, {"role": "system", "content": "a"}, HI]},
    "system behind an answer": {
        "model": NEW, "messages": [HI, said("a"), {"role": "system", "content": "a"}]},
    "thought at the end": {"messages": [HI, said([thinking("b")]), HI]},
    "empty text": {"messages": [user("")]},
    "empty system": {"system": [{"type": "text", "text": ""}]},
    "no content": {"messages": [user([])]},
    "no result": {"messages": [HI, CALLED, HI], "tools": [TOOL]},
    "call at the end": {"messages": [HI, CALLED], "tools": [TOOL]},
    "result of nothing": {"messages": [user([RESULT])], "tools": [TOOL]},
    "result last": {"messages": [HI, CALLED, user([text("a"), RESULT])], "tools": [TOOL]},
    "no tools": {"messages": [HI, CALLED, user([RESULT])]},
    "tool twice": {"tools": [TOOL, TOOL]},
    "tool name": {"tools": [{**TOOL, "name": "a.b"}]},
    "schema of a tool": {"tools": [{**TOOL, "input_schema": {}}]},
    "unknown choice": {**FORCED, "tool_choice": {"type": "tool", "name": "g"}},
    "forced": {"model": NEWEST, **FORCED},
    "forced while thinking": {**FORCED, "thinking": BUDGET},
    "budget": {"thinking": {**BUDGET, "budget_tokens": 2000}},
    "budget, new model": {"model": NEW, "thinking": BUDGET},
    "adaptive, old model": {"thinking": {"type": "adaptive"}},
    "disabled": {"model": NEWEST, "thinking": {"type": "disabled"}},
    "lost thought": {"messages": [HI, CALLED, user([RESULT])], "tools": [TOOL], "thinking": BUDGET},
    "forged thought": {"messages": [HI, said([FORGED, text("a")]), HI]},
    "late thought": {"messages": [HI, said([text("a"), thinking("b"), text("c")]), HI]},
    "effort": {"output_config": {"effort": "low"}},
    "temperature": {"temperature": 1.1},
    "temperature, new model": {"model": NEW, "temperature": 1},
    "temperature and top_p": {"temperature": 1, "top_p": 1},
    "temperature while thinking": {"temperature": 1, "thinking": BUDGET},
    "stop": {"stop_sequences": [" "]},
    "max_tokens": {"max_tokens": 64_001},
    "open schema": formatted({"type": "object"}),
    "open schema deep down": formatted({"type": "array", "items": {"type": "object"}}),
    "minLength": formatted({"type": "string", "minLength": 1}),
    "person": {"metadata": {"user_id": "ann@example.com"}},
}


@pytest.mark.parametrize("change", REFUSED_BY_ANTHROPIC.values(), ids=REFUSED_BY_ANTHROPIC)
def test_the_judge_of_anthropic_refuses(change: JSON) -> None:
    body = {"model": OLD, "max_tokens": 2000, "messages": [HI], **formatted(SCHEMA)}
    assert list(anthropic_wire.judge_body(body)) == []
    assert len(list(anthropic_wire.judge_body({**body, **change}))) == 1
