"""The processes of a bench: nginx as upstream and as proxy, the paced upstream, the gateway.

Each is one process with its own pid, so that its CPU time and memory can be read from /proc.
"""

from __future__ import annotations

import contextlib
import glob
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import canned

BENCH = Path(__file__).resolve().parent
GATEWAY = BENCH.parent / "gateway.py"
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
OPENSSL = shutil.which("openssl")
START_SECONDS = STOP_SECONDS = 10
NO_HEADERS: Mapping[str, str] = {}

# One process, no master: what is measured is the pid that was started.
NGINX_CONF = """
daemon off; master_process off; pid %(dir)s/pid; error_log stderr error;
events { worker_connections 10000; }
http {
  access_log off; keepalive_requests 100000000; keepalive_timeout 300;
  client_body_temp_path %(dir)s/body; proxy_temp_path %(dir)s/proxy;
  fastcgi_temp_path %(dir)s/f; uwsgi_temp_path %(dir)s/u; scgi_temp_path %(dir)s/s;
  client_max_body_size 0; types { application/json json; text/event-stream sse; }
  %(http)s
}
"""
# A static file refuses POST with 405, which names the file anew. SSI finds nothing to do in it,
# but takes its length away: streams are chunked, as everywhere.
CANNED_CONF = """
  %(headers)s
  server {
    listen 127.0.0.1:%(port)d backlog=4096; root %(dir)s;
    location ~ ^/(.*)/v1/ { error_page 405 =200 /$1; return 405; }
    location ~ [.]sse$ { ssi on; ssi_types text/event-stream; }
  }
"""
PROXY_CONF = """
  upstream canned { server %(upstream)s; keepalive 1024; keepalive_requests 100000000; }
  access_log /dev/null combined;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering %(buffering)s;
  server {
    listen 127.0.0.1:%(port)d backlog=4096;
    location / { proxy_pass http://canned; }
  }
"""


class Process:
    """A server that answers on 127.0.0.1:port, and what /proc says about it."""

    def __init__(self, name: str, port: int, argv: list[str], home: Path,
                 stdout: int = subprocess.DEVNULL, **extra: Any) -> None:  # fmt: skip
        self.name, self.port = name, port
        self.path = "/v1/chat/completions"
        self.ready_seconds = 0.0
        self.errors = home / f"{name}.stderr"
        self.started = time.monotonic()
        with self.errors.open("wb") as stderr:
            self.popen = subprocess.Popen(
                argv, cwd=home, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, **extra
            )  # fmt: skip
        self.proc = Path(f"/proc/{self.popen.pid}")

    def wait_ready(self, path: str | None) -> None:
        """Until the first 200 on `path` (None: the first connection), counted from exec."""
        while time.monotonic() < self.started + START_SECONDS and self.popen.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                if path is None or self.fetch(path)[0] == 200:
                    self.ready_seconds = time.monotonic() - self.started
                    return
            time.sleep(0.001)  # nothing to await: the port is all that the outside can see
        raise RuntimeError(f"{self.name} did not start: {self.last_words()}")

    def fetch(self, path: str, body: bytes | None = None, headers: Mapping[str, str] = NO_HEADERS
              ) -> tuple[int, bytes]:  # fmt: skip
        """GET, or POST of a body, on a connection of its own: status and the answer's body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST" if body else "GET", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def stop(self) -> None:
        """By SIGTERM; one that does not end well, or has printed a traceback, has failed."""
        self.popen.terminate()
        try:
            code: int | None = self.popen.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = None
        words = self.last_words()
        if code != 0 or "Traceback" in words:
            raise RuntimeError(f"{self.name} stopped with {code} (None: killed): {words}")

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def last_words(self) -> str:
        return self.errors.read_text(errors="replace")[-2000:] or "(no output)"

    def cpu_ns(self) -> int:
        """CPU time of all threads. The ticks of /proc/PID/stat are 10 ms, too coarse."""
        paths = glob.glob(f"{self.proc}/task/*/schedstat")
        return sum(int(Path(path).read_text().split()[0]) for path in paths)

    def rss_kb(self) -> int:
        """Resident memory now, summed exactly (VmRSS is kept roughly since Linux 6.2)."""
        return self._field("smaps_rollup", "Rss")

    def peak_kb(self) -> int:
        return self._field("status", "VmHWM")

    def reset_peak(self) -> None:
        (self.proc / "clear_refs").write_text("5")

    def _field(self, file: str, name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", (self.proc / file).read_text(), re.M)
        assert match, f"no {name} in {file}"
        return int(match[1])


@contextlib.contextmanager
def running(process: Process, path: str | None = None) -> Iterator[Process]:
    """Ready at the start, ended at the end, whatever happens between."""
    try:
        process.wait_ready(path)
        yield process
    except BaseException:
        process.kill()
        if process.name == "gateway":
            print(f"the gateway's last words: {process.last_words()}", file=sys.stderr)
        raise
    process.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def canned_upstream(home: Path) -> Process:
    """nginx that answers whatever is posted below /NAME/v1/ with the file of that name."""
    root = home / "upstream"
    root.mkdir(exist_ok=True)
    (root / "chat.json").write_bytes(canned.chat_body())
    (root / "chat.sse").write_bytes(b"".join(canned.stream_events(50)))
    (root / "message.json").write_bytes(canned.message_body())
    (root / "message.sse").write_bytes(b"".join(canned.message_events(50)))
    (root / "gemini.sse").write_bytes(b"".join(canned.gemini_events(48)))
    (root / "response.sse").write_bytes(b"".join(canned.responses_events(48)))
    headers = [f'add_header {k} "{v}";' for k, v in canned.ANSWER_HEADERS.items()]
    return _nginx("upstream", home, CANNED_CONF, headers=" ".join(headers))


def nginx_proxy(home: Path, upstream: Process, base: str) -> Process:
    """The yardstick: nginx in front of `upstream`, whose paths start with `base`."""
    buffering = "on" if "json" in base else "off"
    address = f"127.0.0.1:{upstream.port}"
    proxy = _nginx("nginx", home, PROXY_CONF, upstream=address, buffering=buffering)
    proxy.path = f"{base}/chat/completions"
    return proxy


def _nginx(name: str, home: Path, http: str, **values: str) -> Process:
    home = home / name
    home.mkdir(exist_ok=True)
    port = free_port()
    fields: dict[str, Any] = {"dir": home, "port": port, **values}
    (home / "nginx.conf").write_text(NGINX_CONF % {"dir": home, "http": http % fields})
    argv = [str(NGINX), "-p", str(home), "-c", str(home / "nginx.conf")]
    return Process(name, port, argv, home)


def paced_upstream(home: Path, events: int, pem: Path | None = None) -> Process:
    port = free_port()
    argv = [sys.executable, str(BENCH / "paced.py"), str(port), "--events", str(events)]
    return Process("paced", port, argv + (["--tls", str(pem)] if pem else []), home)


def make_certificate(home: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 that is its own CA; key and certificate in one."""
    pem = home / "upstream.pem"
    subprocess.run(
        [str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1",
         "-addext", "keyUsage=digitalSignature,keyCertSign", "-keyout", pem, "-out", home / "ca"],
        check=True, capture_output=True,
    )  # fmt: skip
    with pem.open("ab") as out:
        out.write((home / "ca").read_bytes())
    return pem


class Build:
    """How the gateway is run: by which Python, from bytecode (as its image does) or as a script."""

    def __init__(self, python: str, home: Path) -> None:
        self.python, self.home = python, home
        code = "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)"
        compiled = str(home / "gateway.pyc")  # alone in its directory: no source beside it
        subprocess.run([python, "-c", code, str(GATEWAY), compiled], check=True)

    def gateway(self, urls: Mapping[str, str], ca: Path | None = None, script: bool = False,
                stdout: int = subprocess.DEVNULL, about: Mapping[str, str] = NO_HEADERS,
                **settings: Any) -> Process:  # fmt: skip
        """The gateway in front of these base URLs by provider, with more settings of its config;
        `about` is said of each provider."""
        port = free_port()
        config = {
            "listen": f"127.0.0.1:{port}",
            "providers": {name: {"api_key": canned.UPSTREAM_KEY, "base_url": url, **about}
                          for name, url in urls.items()},
            "models": {canned.ALL_MODELS[name]: {"provider": name} for name in urls},
            "api_keys": [{"key": canned.VIRTUAL_KEY, "app": "bench", "allowed_models": ["*"]}],
            **settings,
        }  # fmt: skip
        (self.home / "config.json").write_text(json.dumps(config, indent=2))
        argv = [self.python, *([str(GATEWAY)] if script else ["-m", "gateway"])]
        env = {**os.environ, **({"SSL_CERT_FILE": str(ca)} if ca else {})}
        argv += ["-config", str(self.home / "config.json")]
        return Process("gateway", port, argv, self.home, stdout=stdout, env=env)
