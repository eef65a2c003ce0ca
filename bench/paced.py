"""An upstream that streams at a model's pace: python3 bench/paced.py PORT [--events N] [--tls PEM].

Every POST gets one chat stream, an event each INTERVAL. One timer serves all streams: a timer and
a task for each would cost more than the proxies that are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import re
import signal
import ssl

import canned

INTERVAL = 0.020
SLOTS = 10  # streams do not all speak in the same instant: a tenth of them each 2 ms
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


class Pacer:
    """A wheel of slots; each turn of INTERVAL lets every stream send its next event."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.slots: list[list[Stream]] = [[] for _ in range(SLOTS)]
        self.turn = self.joined = 0

    def add(self, stream: Stream) -> None:
        """Spread evenly, in order of arrival."""
        self.slots[self.joined % SLOTS].append(stream)
        self.joined += 1

    def tick(self, due: float) -> None:
        """Late ticks are not made up for: a burst would be a pace of its own."""
        loop = asyncio.get_running_loop()
        self.slots[self.turn] = [s for s in self.slots[self.turn] if s.send_next(self.pieces)]
        self.turn = (self.turn + 1) % SLOTS
        following = max(loop.time(), due + INTERVAL / SLOTS)
        loop.call_at(following, self.tick, following)


class Stream(asyncio.Protocol):
    """One connection: reads a request whole, then sends the pieces one by one; then the next."""

    transport: asyncio.Transport

    def __init__(self, pacer: Pacer) -> None:
        self.pacer = pacer
        self.buffer = bytearray()
        self.sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        length = CONTENT_LENGTH.search(self.buffer, 0, end)
        if length and len(self.buffer) >= end + int(length[1]):
            self.buffer.clear()
            self.sent = 0
            self.pacer.add(self)

    def send_next(self, pieces: list[bytes]) -> bool:
        """False when there is no more to send, or nobody to send it to."""
        if self.transport.is_closing():
            return False
        self.transport.write(pieces[self.sent])
        self.sent += 1
        return self.sent < len(pieces)


def pieces_of(events: int) -> list[bytes]:
    """The answer as it is written: the head with the first event, the end with the last."""
    pieces = [b"%x\r\n%s\r\n" % (len(e), e) for e in canned.stream_events(events)]
    fields = {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"}
    lines = [f"{k}: {v}\r\n" for k, v in {**fields, **canned.ANSWER_HEADERS}.items()]
    pieces[0] = f"HTTP/1.1 200 OK\r\n{''.join(lines)}\r\n".encode() + pieces[0]
    # Usage, [DONE] and the end leave in one write, as they do from real servers.
    return [*pieces[:-2], b"".join(pieces[-2:]) + b"0\r\n\r\n"]


async def serve(port: int, events: int, pem: str | None) -> None:
    """Until SIGTERM."""
    context = None
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    pacer = Pacer(pieces_of(events))
    factory = functools.partial(Stream, pacer)
    await loop.create_server(factory, "127.0.0.1", port, ssl=context, backlog=4096)
    pacer.tick(loop.time())
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--tls", metavar="PEM", help="a file with certificate and key")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.events, args.tls))


if __name__ == "__main__":
    main()
