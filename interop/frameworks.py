"""Frameworks that apps are written with, each in front of each wire; not a part of the test run.

    python -m venv FOLDER
    FOLDER/bin/pip install -r interop/requirements.txt langchain langchain-anthropic \
        langchain-google-genai langchain-openai litellm
    LITELLM_LOCAL_MODEL_COST_MAP=True FOLDER/bin/python interop/frameworks.py

Each is asked one thing, plain and streamed, calls a tool as the model says, hands the result back
and must end with the model's last words; then it is asked for structured output. The upstream
judges what the gateway translated as its own server would; what passes is the framework's own.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litellm
from agents import MODELS, WORDS, Agent, answers, config, judges
from drive import KEY, Gateway
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_google_genai import ChatGoogleGenerativeAI
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from upstream import Answer, Received, Reply, Upstream

Ask = Callable[[str], Any]  # of a model
QUESTION = {"role": "user", "content": "Hello"}


class City(BaseModel):
    """A city."""

    city: str
    people: int


BERN = City(city="Bern", people=134_000)
CALL = Agent([], {}, "get_weather", {"city": "Bern"})


def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    assert city == "Bern"
    return "sunny"


def langchain(make: Callable[[str], Any]) -> dict[str, Ask]:
    def plain(model: str) -> str:
        agent: Any = create_agent(make(model), [get_weather], system_prompt="Be kind.")
        told = agent.invoke({"messages": [QUESTION]})["messages"]
        return str([each for each in told if each.type == "ai"][-1].text)

    def stream(model: str) -> str:
        agent: Any = create_agent(make(model), [get_weather], system_prompt="Be kind.")
        told = agent.stream({"messages": [QUESTION]}, stream_mode="messages")
        return "".join(str(piece.text) for piece, _ in told)

    return {
        "plain": plain,
        "stream": stream,
        "structured": lambda model: make(model).with_structured_output(City).invoke("Which?"),
    }


def lite(prefix: str, base: str) -> dict[str, Ask]:
    about = {"api_base": base, "api_key": KEY, "max_retries": 0}
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}

    def ask(model: str, stream: bool) -> str:
        messages: list[Any] = [QUESTION]
        asked: Any = {"model": f"{prefix}/{model}", "tools": [tool], "stream": stream, **about}
        while True:
            told: Any = litellm.completion(messages=messages, **asked)
            told = litellm.stream_chunk_builder(list(told), messages=messages) if stream else told
            said = told.choices[0].message
            if not said.tool_calls:
                return str(said.content)
            messages.append(said.model_dump())
            for call in said.tool_calls:
                content = get_weather(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})

    def structured(model: str) -> City:
        told: Any = litellm.completion(
            f"{prefix}/{model}", [QUESTION], response_format=City, **about
        )
        return City.model_validate_json(told.choices[0].message.content)

    return {
        "plain": lambda model: ask(model, False),
        "stream": lambda model: ask(model, True),
        "structured": structured,
    }


def frameworks(url: str) -> dict[tuple[str, str], dict[str, Ask]]:
    """By name and the wire that each speaks, what it is asked in which manner."""
    v1, about = f"{url}/v1", {"api_key": KEY, "max_retries": 0}
    return {
        ("langchain", "chat"): langchain(lambda model: ChatOpenAI(
            model=model, base_url=v1, use_responses_api=False, **about)),
        ("langchain", "responses"): langchain(lambda model: ChatOpenAI(
            model=model, base_url=v1, use_responses_api=True, **about)),
        ("langchain", "messages"): langchain(lambda model: ChatAnthropic(
            model=model, base_url=url, max_tokens=99, **about)),
        ("langchain", "gemini"): langchain(lambda model: ChatGoogleGenerativeAI(
            model=model, base_url=url, **about)),
        ("litellm", "chat"): lite("openai", v1),
        ("litellm", "messages"): lite("anthropic", url),
        ("litellm", "gemini"): lite("gemini", f"{url}/v1beta"),
    }  # fmt: skip


def structured_answer(wire: str) -> Answer:
    """By the tool that the request offers for it, else as text."""

    def reply(received: Received) -> Reply:
        tools = received.json.get("tools") or []
        tools = tools[0].get("functionDeclarations", tools) if tools else tools
        if not tools:
            return answers(wire, CALL, BERN.model_dump_json())[1](received)
        name = tools[0].get("function", tools[0])["name"]
        return answers(wire, Agent([], {}, name, BERN.model_dump()))[0](received)

    return reply


def run(upstream: Upstream, ask: Ask, manner: str, wire: str, passes: bool) -> str:
    """What went wrong, or nothing."""
    script = [structured_answer(wire)] if manner == "structured" else answers(wire, CALL)
    upstream.script(*script, judged=not passes)
    try:
        told = ask(f"on-{wire}")
    except Exception as error:
        told = repr(error)[:800]
    is_right = told == BERN if manner == "structured" else str(told).endswith(WORDS)
    return "\n".join([*([] if is_right else [f"said {told}"]), *upstream.settle()])


def main() -> int:
    warnings.simplefilter("ignore")
    logging.disable()
    litellm.suppress_debug_info = True
    upstream, failed = Upstream(judges()), False
    about = config(upstream.url)
    about["models"]["on-responses"]["wire"] = "responses"  # for clients that speak Chat, too
    with tempfile.TemporaryDirectory() as scratch:
        gateway = Gateway(about, Path(scratch))
        try:
            for (name, spoken), manners in frameworks(gateway.url).items():
                for wire in MODELS:
                    for manner, ask in manners.items():
                        wrong = run(upstream, ask, manner, wire, spoken == wire)
                        failed |= bool(wrong)
                        label = f"{name:10} {spoken:9} on {wire:9} {manner:10}"
                        print(label, wrong or "ok", flush=True)
        finally:
            gateway.stop()
            upstream.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
