"""/metrics as Prometheus reads it: by its own parsers, its linter, and a server that scrapes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai_wire as wire
import pytest
import yaml
from drive import KEY, PROGRAM, Ask, Gateway, Launch
from openai import InternalServerError, OpenAI
from openai_wire import choice
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from upstream import JSON, MAX_WAIT, Upstream

CALL = {"virtual_key", "provider", "model"}
LABELS: dict[str, set[str]] = {
    "llm_requests": CALL | {"status"},
    "llm_request_duration_seconds": CALL | {"stream"},
    "llm_tokens": CALL | {"direction"},
    "llm_token_details": CALL | {"kind"},
    "llm_stream_first_byte_seconds": CALL,
    "llm_provider_errors": {"provider", "error_type"},
    "llm_cost_dollars": CALL,
    "llm_usage_estimated": {"provider", "model"},
}
OTHERS = {"llm_unpriced_tokens", "llm_requests_in_flight", "llm_overhead_seconds", "llm_build_info"}
PROCESS = {"cpu_seconds", "resident_memory_bytes", "start_time_seconds", "open_fds"}


@pytest.fixture(scope="module")
def used(gateway: Gateway, upstream: Upstream) -> Gateway:
    """Return a gateway that has something of everything to tell."""
    hi, half = wire.answer(choice("Hi")), wire.chunks(wire.completion(choice("Hi")), False)[:2]
    upstream.script(hi, hi, wire.error(503, "Not now."), wire.stream(*half, end="stall"))
    Ask(gateway, "sync")()
    Ask(gateway, "sync stream")()
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(InternalServerError):
            client.chat.completions.create(model="fast", messages=[])
        client.chat.completions.create(model="home", messages=[], stream=True).close()
    gateway.logged(msg="access", status=499)
    return gateway


def fetch(url: str, accept: str = "text/plain") -> tuple[str, str]:
    """Return the content type and the text."""
    request = urllib.request.Request(url, headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=MAX_WAIT) as answer:
        return answer.headers["content-type"], answer.read().decode()


READERS: list[Any] = [
    ("text/plain; version=0.0.4", parser.text_string_to_metric_families),
    ("application/openmetrics-text", openmetrics_parser.text_string_to_metric_families),
]


@pytest.mark.parametrize("kind, read", READERS, ids=["text", "OpenMetrics"])
def test_prometheus_own_parser_reads_every_family(
    used: Gateway, kind: str, read: Callable[[str], Iterator[Any]]
) -> None:
    told, text = fetch(f"{used.url}/metrics", kind)
    assert told.startswith(kind)
    families = {family.name: family for family in read(text)}
    assert {*LABELS, *OTHERS, *(f"process_{name}" for name in PROCESS)} <= families.keys()
    assert all(family.documentation for family in families.values())
    assert "unknown" not in {family.type for family in families.values()}
    for name, labels in LABELS.items():
        assert families[name].samples
        assert all(set(each.labels) - {"le"} == labels for each in families[name].samples)


def test_the_linter_has_nothing_to_say(used: Gateway) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: apt-get install prometheus"
    _, text = fetch(f"{used.url}/metrics")
    check = [promtool, "check", "metrics"]
    told = subprocess.run(check, input=text, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[str]:
    """Run a real server that scrapes the target each second, and hand out the URL of its API."""
    program = shutil.which("prometheus")
    assert program, "prometheus is missing: apt-get install prometheus"
    job = {"job_name": "gateway", "static_configs": [{"targets": [target]}]}
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [{**job, "scrape_interval": "1s"}]}))
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command.append("--web.listen-address=127.0.0.1:0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            log = process.stderr or ()
            found = (re.search(r'msg="Listening on" address=(\S+)', line) for line in log)
            yield f"http://{next(filter(None, found))[1]}/api/v1"
        finally:
            process.terminate()


def query(api: str, expression: str) -> list[JSON]:
    _, text = fetch(f"{api}/query?{urllib.parse.urlencode({'query': expression})}")
    result: list[JSON] = json.loads(text)["data"]["result"]
    return result


def test_a_prometheus_server_scrapes_it(
    launch: Launch, upstream: Upstream, tmp_path: Path
) -> None:
    """Its first scrape comes some five seconds after its start: so long it waits for targets."""
    gateway = launch(log_probes=True)
    upstream.script(wire.answer(choice("Hi")))
    Ask(gateway, "sync")()
    gateway.logged(path="/v1/chat/completions")
    with prometheus(gateway.url.removeprefix("http://"), tmp_path) as api:
        gateway.logged(path="/metrics", nth=2)  # the first was stored before the second began
        (up,) = query(api, "up")
        (requests,) = query(api, "llm_requests_total")
    labels = {"virtual_key": "interop", "provider": "openai", "model": "fast", "status": "200"}
    assert (up["value"][1], requests["value"][1]) == ("1", "1")
    assert labels.items() <= requests["metric"].items()


def test_yaml_reads_the_example_config() -> None:
    text = PROGRAM.with_name("config.example.yaml.json").read_text()
    data = [line for line in text.splitlines() if not line.lstrip().startswith(("#", "//"))]
    assert yaml.safe_load(text) == json.loads("\n".join(data))
