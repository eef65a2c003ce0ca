"""Scripts: what a client asks, what the upstream does with it, and what must come of that.

Clients and upstream of a soak share a process. The upstream finds a request's script by the number
in its prompt, acts by it and counts what it did; the client holds its answer against it.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple, Tuple

import canned
from canned import MARK, MODELS

if TYPE_CHECKING:
    from scripted import Peer

# Who asks, each with a key of its own: whose requests all end well; whose fail at the upstream or
# are refused; and who leaves before the answer's end.
STEADY, UNLUCKY, IMPATIENT = "steady", "unlucky", "impatient"
KEYS = {app: f"vk-bench-{app}-0123456789" for app in (STEADY, UNLUCKY, IMPATIENT)}
FRAMINGS = ("length", "chunked", "extended", "interim", "close", "http10", "gzip")

# Nano-dollars for a token.
PRICES = {
    "openai": {"input": 2000, "output": 8000, "cache_read": 500},
    "anthropic": {"input": 3000, "output": 15000, "cache_read": 300, "cache_write": 3750,
                  "cache_write_1h": 6000},
}  # fmt: skip
LITELLM_NAMES = {
    "input": "input_cost_per_token",
    "output": "output_cost_per_token",
    "cache_read": "cache_read_input_token_cost",
    "cache_write": "cache_creation_input_token_cost",
    "cache_write_1h": "cache_creation_input_token_cost_above_1hr",
}
LONG_PROMPT, LONG_FACTOR = 200_000, 2  # beyond so many tokens all of Claude's cost twice as much


def price_list() -> dict[str, Any]:
    """The prices in LiteLLM's format."""
    rows: dict[str, Any] = {}
    for provider, prices in PRICES.items():
        row = {LITELLM_NAMES[kind]: nano / 1e9 for kind, nano in prices.items()}
        if provider == "anthropic":
            long = {f"{name}_above_200k_tokens": cost * LONG_FACTOR for name, cost in row.items()}
            row.update(long)
        rows[f"{provider}/{MODELS[provider]}"] = row
    return rows


class Usage(NamedTuple):
    """Tokens. `prompt` counts the cached ones too, `cache_write` those kept for an hour."""

    prompt: int
    completion: int
    cache_read: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    reasoning: int = 0

    def cost(self, provider: str) -> int:
        """Nano-dollars."""
        price = PRICES[provider]
        plain = self.prompt - self.cache_read - self.cache_write
        total = plain * price["input"] + self.completion * price["output"]
        total += self.cache_read * price["cache_read"]
        if provider == "anthropic":
            total += (self.cache_write - self.cache_write_1h) * price["cache_write"]
            total += self.cache_write_1h * price["cache_write_1h"]
            total *= LONG_FACTOR if self.prompt > LONG_PROMPT else 1
        return total


class Act(NamedTuple):
    """What becomes of a request.

    `play` is the upstream's part, None where the gateway itself refuses. `status` is what the
    metric says, and the client's answer, unless the failure comes `is_midway`: then that is a 200
    that ends in an error event. 0: only the client can tell. `label` is the provider error's.
    `streamed` and `provider` say what the act is for, where it is not for all. `spoil` is what is
    wrong with the request.
    """

    play: Callable[[Peer, Script], None] | None
    status: int = 200
    label: str = ""
    app: str = UNLUCKY
    streamed: bool | None = None
    is_midway: bool = False
    provider: str = ""
    spoil: str = ""


@dataclass
class Script:
    """One request."""

    number: int
    provider: str
    is_stream: bool
    wants_usage: bool
    act: Act
    usage: Usage
    words: int
    framing: str
    sent: bytes = b""  # the answer's content, as the upstream sent it
    tries: int = 0  # how often the upstream got it
    is_counted: bool = False
    on_seen: Callable[[], None] | None = None  # to be called when the client sees content
    leave: Callable[[], None] | None = None  # makes the client leave
    left_at: float | None = None  # when it did

    def __str__(self) -> str:
        kind = "stream" if self.is_stream else "plain"
        told = f"the provider said {self.sent[-300:]!r}"
        return f"a {kind} request to {self.provider}, {self.framing}, {self.act}; {told}"

    def request(self) -> bytes:
        """As the client sends it."""
        spoil = self.act.spoil
        prompt: Any = f"script-{self.number}. {canned.SENTENCE * (self.number % 7)}"
        if spoil == "audio":
            prompt = [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]
        wire: dict[str, Any] = {
            "model": "absent" if spoil == "model" else MODELS[self.provider],
            "messages": [{"role": "user", "content": prompt}],
        }
        if self.is_stream:
            wire["stream"] = True
        if self.wants_usage:
            wire["stream_options"] = {"include_usage": True}
        body = json.dumps(wire).encode()[: -1 if spoil == "json" else None]
        key = "vk-bench-nobody-0123456789" if spoil == "key" else KEYS[self.act.app]
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        ) % (key.encode(), len(body), body)

    @property
    def pieces(self) -> list[str]:
        """The answer's text as a stream's deltas bring it."""
        return [f"{' ' * (i > 0)}{MARK.decode()}w{i}" for i in range(self.words)]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Mix = Sequence[Tuple[float, Sequence[Act]]]  # acts, and how often one of them is taken


def write_scripts(rng: random.Random, numbers: Iterable[int], mix: Mix) -> Iterator[Script]:
    weights, choices = [weight for weight, _ in mix], [acts for _, acts in mix]
    for number in numbers:
        act = rng.choice(rng.choices(choices, weights)[0])
        provider = act.provider or rng.choice(list(MODELS))
        is_stream = rng.random() < 0.5 if act.streamed is None else act.streamed
        wants_usage = is_stream and rng.random() < 0.5
        yield Script(number, provider, is_stream, wants_usage, act, write_usage(rng, provider),
                     rng.randrange(1, 9), rng.choice(FRAMINGS))  # fmt: skip


def write_usage(rng: random.Random, provider: str) -> Usage:
    prompt = rng.randrange(1, rng.choice((100, 10_000, 300_000)))
    completion = rng.randrange(1, 5000)
    cache_read = rng.choice((0, prompt // 2))
    cache_write = rng.choice((0, prompt // 3)) if provider == "anthropic" else 0
    cache_write_1h = rng.choice((0, cache_write))
    reasoning = rng.choice((0, completion // 2))
    return Usage(prompt, completion, cache_read, cache_write, cache_write_1h, reasoning)


# ---- the count ----

REQUESTS, ERRORS = "llm_requests_total", "llm_provider_errors_total"
ESTIMATED, TOKENS = "llm_usage_estimated_total", "llm_tokens_total"
DETAILS, COST = "llm_token_details_total", "llm_cost_dollars_total"
NOT_SPENT_BY_STEADY = (REQUESTS, ERRORS, ESTIMATED)  # the others are held for STEADY alone


class Tally:
    """What the upstream did, by the gateway's metrics and their labels."""

    def __init__(self) -> None:
        names = (REQUESTS, ERRORS, ESTIMATED, TOKENS, DETAILS, COST)
        self.counts: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in names}
        self.faults: list[str] = []  # what somebody saw that should not be
        self.hung = self.repeated = self.races = 0
        self.slowest_goodbye = 0.0  # seconds from a client's close to the upstream's

    def count(self, script: Script) -> None:
        """Once for each script, at the act."""
        if script.is_counted:
            return
        script.is_counted = True
        act, provider = script.act, script.provider
        route = (act.app, provider, MODELS[provider])
        if act.spoil == "key":
            route = ("", "", "")
        elif act.spoil in ("model", "json"):
            route = (act.app, "", "")
        self.counts[REQUESTS][(*route, str(act.status))] += 1
        if act.label:
            self.counts[ERRORS][provider, act.label] += 1
        if act.is_midway:
            self.counts[ESTIMATED][route[1:]] += 1
        if act.app == STEADY:
            self._count_usage(route, script.usage)

    def _count_usage(self, route: tuple[str, str, str], usage: Usage) -> None:
        self.counts[TOKENS][(*route, "prompt")] += usage.prompt
        self.counts[TOKENS][(*route, "completion")] += usage.completion
        for kind in ("cache_read", "cache_write", "reasoning"):
            self.counts[DETAILS][(*route, kind)] += getattr(usage, kind)
        self.counts[COST][route] += usage.cost(route[1])

    def differences(self, metrics: str) -> dict[str, dict[tuple[str, ...], int]]:
        """By metric, the series that are off, and by how much."""
        off: dict[str, dict[tuple[str, ...], int]] = {}
        found = dict(self.read(metrics))
        for name, counts in self.counts.items():
            keys = {key for told, key in found if told == name} | {*counts}
            off[name] = {key: found.get((name, key), 0) - counts[key] for key in keys}
            off[name] = {key: value for key, value in off[name].items() if value}
        return off

    def read(self, metrics: str) -> Iterator[tuple[tuple[str, tuple[str, ...]], int]]:
        """The gateway's own counts of the same."""
        for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", metrics, re.M):
            key = tuple(re.findall(r'="([^"]*)"', labels))
            if name in self.counts and (name in NOT_SPENT_BY_STEADY or key[0] == STEADY):
                yield (name, key), int(Decimal(value) * (10**9 if name == COST else 1))
