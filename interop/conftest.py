"""What all suites share: one upstream, a gateway for each module, the SDK in its four manners."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anthropic_wire
import gemini_wire
import openai_wire
import pytest
from drive import KEY, LIMITED_KEY, MANNERS, UPSTREAM_KEY, Ask, Gateway, Launch
from openai import OpenAI
from upstream import JSON, Upstream


@pytest.fixture(scope="session")
def upstream() -> Iterator[Upstream]:
    judges = {
        "/v1/chat/completions": openai_wire.judge,
        "/v1/messages": anthropic_wire.judge,
        "/v1/messages/count_tokens": anthropic_wire.judge_count,
        **gemini_wire.JUDGES,
    }
    server = Upstream(judges)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def settled(upstream: Upstream) -> Iterator[None]:
    """Hold each test to its script: every request was valid, every answer was fetched."""
    yield
    assert upstream.settle() == []


@pytest.fixture(scope="session")
def config(upstream: Upstream) -> JSON:
    base_url = f"{upstream.url}/v1"
    return {
        "providers": {
            "openai": {"api_key": UPSTREAM_KEY, "base_url": base_url},
            "local": {"kind": "openai-compatible", "base_url": base_url},
        },
        "models": {
            "fast": {"provider": "openai", "model": "gpt-5.2"},
            "home": {"provider": "local", "model": "llama-4"},
        },
        "routing": [{"prefix": "gpt-", "provider": "openai"}],
        "api_keys": [
            {"key": KEY, "app": "interop", "allowed_models": ["*"]},
            {"key": LIMITED_KEY, "app": "limited", "allowed_models": ["home"]},
        ],
    }


@pytest.fixture(scope="module")
def gateway(config: JSON, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    process = Gateway(config, tmp_path_factory.mktemp("gateway"))
    yield process
    process.stop()


@pytest.fixture
def launch(config: JSON, tmp_path: Path) -> Iterator[Launch]:
    """Start a gateway for this test alone, with some of the configuration changed."""
    with ExitStack() as stack:

        def start(**changes: object) -> Gateway:
            process = Gateway({**config, **changes}, tmp_path)
            stack.callback(process.stop)
            return process

        yield start


@pytest.fixture(params=MANNERS)
def ask(request: pytest.FixtureRequest, gateway: Gateway) -> Ask:
    return Ask(gateway, request.param)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made
