"""How the tests drive the gateway: the real program in a process of its own, and the openai SDK in
front of it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, DefaultHttpxClient, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from upstream import JSON, MAX_WAIT

PROGRAM = Path(__file__).parent.parent / "gateway.py"
KEY = "vk-interop-0123456789abcdef"
LIMITED_KEY = "vk-interop-limited-0123456789"
UPSTREAM_KEY = "sk-upstream-interop-0123456789"
STREAM_MANNERS = ("sync stream", "async stream")
MANNERS = ("sync", "async", *STREAM_MANNERS)


class Gateway:
    """`gateway.py -config FILE`, the lines of its log, and its metrics."""

    def __init__(self, config: JSON, folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({"listen": "127.0.0.1:0", "log": "json", **config}))
        self._stderr = folder / "stderr"
        self._lines: list[JSON] = []
        self._has_ended = False
        self._news = threading.Condition()
        command = [sys.executable, str(PROGRAM), "-config", str(file)]
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.url = f"http://{self.logged(msg='starting server')['addr']}"
        except BaseException:
            self._process.kill()
            raise

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with self._news:
                self._lines.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self._has_ended = True
            self._news.notify_all()

    def logged(self, nth: int = 1, **wanted: Any) -> JSON:
        """Return the first, or nth, line of the log with these values, waiting for it."""

        def found() -> list[JSON]:
            return [line for line in self._lines if wanted.items() <= line.items()][nth - 1 : nth]

        with self._news:
            self._news.wait_for(lambda: found() or self._has_ended, MAX_WAIT)
            lines = found()
            assert lines, f"no {wanted} in {self._lines[-5:]}\n{self._stderr.read_text()}"
            return lines[0]

    def scrape(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Return the value of each sample, by its name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=MAX_WAIT) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = (sample for family in families for sample in family.samples)
        return {(each.name, frozenset(each.labels.items())): each.value for each in samples}

    def counting(self) -> Callable[..., float]:
        """Return a function that tells how much a metric, over all series with the labels, grew."""
        before = self.scrape()

        def grown(name: str, **labels: str) -> float:
            now = self.scrape()
            series = [key for key in now if key[0] == name and labels.items() <= key[1]]
            return sum(now[key] - before.get(key, 0) for key in series)

        return grown

    def stop(self) -> None:
        """End it as a supervisor does: it must end well, and must have told no secret."""
        self._process.terminate()
        status = self._process.wait(MAX_WAIT)
        self._reader.join(MAX_WAIT)
        told = json.dumps(self._lines) + self._stderr.read_text()
        assert status == 0, told
        for word in (KEY, LIMITED_KEY, UPSTREAM_KEY, "Traceback"):
            assert word not in told


Launch = Callable[..., Gateway]


class Ask:
    """The openai SDK in one of four manners: `ask(**params)` returns the whole answer in each.

    `sent` and `headers` keep the last request's body as the SDK sent it, and its answer's head.
    """

    def __init__(self, gateway: Gateway, manner: str) -> None:
        self.is_stream = manner.endswith("stream")
        self.is_async = manner.startswith("async")
        self.options: JSON = dict(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0)
        self.sent = b""
        self.headers = httpx2.Headers()

    @property
    def with_usage(self) -> JSON:
        """What to ask for so that this manner's answer tells its usage."""
        return {"stream_options": {"include_usage": True}} if self.is_stream else {}

    def __call__(self, **params: Any) -> Any:
        params = {"model": "fast", "messages": [{"role": "user", "content": "Hello"}], **params}
        # The SDK's parsing helpers raise where an answer is cut short, so only classes go there.
        is_parsed = isinstance(params.get("response_format"), type)
        if self.is_async:
            return asyncio.run(self._ask_async(params, is_parsed))
        return self._ask(params, is_parsed)

    def _ask(self, params: JSON, is_parsed: bool) -> Any:
        http = DefaultHttpxClient(event_hooks=self.hooks())
        with OpenAI(http_client=http, **self.options) as client:
            chat = client.chat.completions
            if not self.is_stream:
                return (chat.parse if is_parsed else chat.create)(**params)
            with chat.stream(**params) as stream:
                whole = stream.until_done().current_completion_snapshot
                return stream.get_final_completion() if is_parsed else whole

    async def _ask_async(self, params: JSON, is_parsed: bool) -> Any:
        http = DefaultAsyncHttpxClient(event_hooks=self.hooks())
        async with AsyncOpenAI(http_client=http, **self.options) as client:
            chat = client.chat.completions
            if not self.is_stream:
                return await (chat.parse if is_parsed else chat.create)(**params)
            async with chat.stream(**params) as stream:
                whole = (await stream.until_done()).current_completion_snapshot
                return await stream.get_final_completion() if is_parsed else whole

    def hooks(self) -> Any:
        """Return what an SDK's HTTP client calls with each request and each answer."""

        async def keep_sent(request: httpx2.Request) -> None:
            self._keep_sent(request)

        async def keep_headers(response: httpx2.Response) -> None:
            self._keep_headers(response)

        if self.is_async:
            return {"request": [keep_sent], "response": [keep_headers]}
        return {"request": [self._keep_sent], "response": [self._keep_headers]}

    def _keep_sent(self, request: httpx2.Request) -> None:
        self.sent = request.content

    def _keep_headers(self, response: httpx2.Response) -> None:
        self.headers = response.headers
