"""How long and how large an answer may be: a server that sends a byte now and then, or never ends, holds nobody up.

httpx's timeouts bound one read, of which an answer can have any number. Here the whole call has a deadline, which the
connections themselves keep, and a body ends at LARGEST_BODY.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

import httpcore2
import httpx2

# An answer of 100 thousand tokens, thoughts included, takes half a megabyte.
LARGEST_BODY = 4 * 2**20
# The files of batches are streamed to disk: fieldmark.llm.batch bounds them.
STREAMED = "/content"


class TooLong(httpx2.TransportError):
    """An answer whose body is larger than any answer; asked again, it would be paid for again.

    openai's client makes it the cause of an APIConnectionError.
    """


def read_whole(response: httpx2.Response) -> None:
    """Read a body, packed or not, of a failure or not, to its end or to LARGEST_BODY. Raises TooLong."""
    if response.request.url.path.endswith(STREAMED):
        return
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > LARGEST_BODY:
            response.close()
            raise TooLong(f"the answer is longer than {LARGEST_BODY // 2**20} MB")
    # Where httpx itself keeps a body that was read.
    response._content = bytes(body)


class Deadline:
    """The moment at which the reads of this thread end; may be shared by threads."""

    def __init__(self) -> None:
        self.of_thread = threading.local()

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Let the reads of this thread end after so long."""
        self.of_thread.end = time.monotonic() + seconds
        try:
            yield
        finally:
            del self.of_thread.end

    def cut(self, timeout: float | None) -> float | None:
        """What is left of a read's timeout. Raises httpcore2.ReadTimeout where nothing is."""
        end = getattr(self.of_thread, "end", None)
        if end is None:
            return timeout
        left: float = end - time.monotonic()
        if left <= 0:
            raise httpcore2.ReadTimeout("the answer takes too long")
        return left if timeout is None else min(timeout, left)

    def hold_for(self, client: httpx2.Client) -> None:
        """Let every connection of a client, through proxies too, keep the deadline.

        httpx has no way to give a transport its network and keep the proxies of the environment, so that this reaches
        into it.
        """
        for transport in (client._transport, *client._mounts.values()):
            pool: Any = getattr(transport, "_pool", None)
            if pool is not None:
                pool._network_backend = Network(pool._network_backend, self)


class Network(httpcore2.NetworkBackend):
    """Connections that keep a deadline."""

    def __init__(self, network: httpcore2.NetworkBackend, deadline: Deadline) -> None:
        self.network, self.deadline = network, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self.network.connect_tcp(host, port, timeout, local_address, socket_options)
        return Stream(stream, self.deadline)

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.NetworkStream:
        return Stream(self.network.connect_unix_socket(path, timeout, socket_options), self.deadline)

    def sleep(self, seconds: float) -> None:
        self.network.sleep(seconds)


class Stream(httpcore2.NetworkStream):
    """A connection whose reads end at the deadline of the thread that reads."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self.stream, self.deadline = stream, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self.deadline.cut(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, timeout)

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return Stream(self.stream.start_tls(ssl_context, server_hostname, timeout), self.deadline)

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)
