"""Coding agents through the gateway, each in front of each wire; not a part of the test run.

    npm install --prefix FOLDER @anthropic-ai/claude-code @openai/codex @google/gemini-cli
    python interop/agents.py FOLDER

Each agent is asked one thing, calls its shell as the model says, and must end with the model's last
words. The upstream judges every request as its own server would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import anthropic_wire
import gemini_wire
import openai_wire
import responses_wire
from drive import KEY, UPSTREAM_KEY, Gateway
from upstream import JSON, Answer, Received, Upstream

WORDS = "The shell says so."
MODELS = {  # by the wire that they are behind
    "chat": ("local", "llama-4"),
    "responses": ("openai", "gpt-5.5"),
    "messages": ("anthropic", "claude-opus-5-5"),
    "gemini": ("gemini", "gemini-3.8-flash"),
}
CODEX = (
    'model_provider="gw"',
    'model_providers.gw={name="gw",base_url="%s/v1",env_key="GW_KEY",wire_api="responses"}',
)


class Agent(NamedTuple):
    """How it is called, and how its shell is."""

    argv: list[str]
    env: Mapping[str, str]
    shell: str
    arguments: Mapping[str, str]


def agents(url: str) -> dict[str, Agent]:
    codex = [part for line in CODEX for part in ("-c", line % url if "%" in line else line)]
    free = ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    return {
        "claude": Agent(
            ["-p", "Hello", "--allowedTools", "Bash", "--model"],
            {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": KEY},
            "Bash",
            {"command": "echo so", "description": "Says so"},
        ),
        "codex": Agent(
            ["exec", *free, *codex, "Hello", "-m"],
            {"GW_KEY": KEY},
            "exec_command",
            {"cmd": "echo so"},
        ),
        "gemini": Agent(
            ["-y", "-p", "Hello", "-m"],
            {
                "GOOGLE_GEMINI_BASE_URL": url,
                "GEMINI_API_KEY": KEY,
                "GEMINI_CLI_TRUST_WORKSPACE": "true",
            },
            "run_shell_command",
            {"command": "echo so"},
        ),
    }


def answers(wire: str, agent: Agent, words: str = WORDS) -> list[Answer]:
    """A call of the shell, then the last words."""
    name, about = agent.shell, agent.arguments
    if wire == "chat":
        calls = openai_wire.choice("I look.", openai_wire.call("c1", name, **about))
        return [openai_wire.answer(calls), openai_wire.answer(openai_wire.choice(words))]
    if wire == "messages":
        text, use = anthropic_wire.text, anthropic_wire.tool_use("toolu_1", name, **about)
        return [anthropic_wire.answer(text("I look."), use), anthropic_wire.answer(text(words))]
    if wire == "responses":
        call = responses_wire.function_call("call_1", name, **about)
        said = responses_wire.message(words)
        return [responses_wire.answer(call), responses_wire.answer(said)]
    wanted = gemini_wire.call(1, name, **about)
    return [gemini_wire.answer(wanted), gemini_wire.answer(gemini_wire.text(words))]


def config(url: str) -> JSON:
    about = {"api_key": UPSTREAM_KEY, "base_url": url}
    chat = {**about, "base_url": f"{url}/v1"}
    return {
        "providers": {
            "openai": chat,
            "local": {**chat, "kind": "openai-compatible"},
            "anthropic": about,
            "gemini": about,
        },
        "models": {
            f"on-{wire}": {"provider": provider, "model": model}
            for wire, (provider, model) in MODELS.items()
        },
        "api_keys": [{"key": KEY, "app": "agent", "allowed_models": ["*"]}],
    }


def run(folder: Path, home: Path, name: str, agent: Agent, wire: str) -> str:
    """What went wrong, or nothing."""
    program = folder / "node_modules" / ".bin" / name
    env: dict[str, Any] = {**os.environ, **agent.env, "HOME": str(home)}
    done = subprocess.run(
        [program, *agent.argv, f"on-{wire}"],
        cwd=home,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "" if WORDS in done.stdout else f"{done.stdout[-800:]}\n{done.stderr[-800:]}"


def judges() -> dict[str, Callable[[Received], None]]:
    return {
        "/v1/chat/completions": openai_wire.judge,
        "/v1/responses": responses_wire.judge,
        "/v1/messages": anthropic_wire.judge,
        **gemini_wire.JUDGES,
    }


def main(folder: Path) -> int:
    upstream, failed = Upstream(judges()), False
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        (home / ".gemini").mkdir()
        (home / ".gemini" / "settings.json").write_text(
            '{"security": {"auth": {"selectedType": "gemini-api-key"}}}'
        )
        gateway = Gateway(config(upstream.url), home)
        try:
            for name, agent in agents(gateway.url).items():
                for wire in MODELS:
                    # What Codex tells OpenAI itself the SDK's types do not know in full.
                    is_known = (name, wire) != ("codex", "responses")
                    upstream.script(*answers(wire, agent), judged=is_known)
                    wrong = run(folder, home, name, agent, wire)
                    wrong += "\n".join(upstream.settle())
                    failed |= bool(wrong)
                    print(f"{name:7} on {wire:10} {wrong or 'ok'}", flush=True)
        finally:
            gateway.stop()
            upstream.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
