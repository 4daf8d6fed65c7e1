"""curation/http_client.py against raw sockets: slow, endless, oversized and malformed replies, connections, proxies."""

import asyncio
import base64
import contextlib
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from mock_endpoint import closed_port

from curation import http_client
from curation.http_client import Connection, HTTPError, post

JSON = b"{}"


@contextlib.contextmanager
def raw_server(answer, tls=None):
    """A server on loopback that reads requests and calls answer(connection, request) for each, until one returns False.
    Yields an object with .url, .requests (bytes) and .connections (how many)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=32)
    state = type(
        "State", (), {"requests": [], "connections": 0, "url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}
    )
    opened = []

    def serve_one(connection):
        with (
            contextlib.suppress(OSError),
            tls.wrap_socket(connection, server_side=True) if tls else connection as connection,
        ):
            data = b""
            while block := connection.recv(65536):
                data += block
                head, _, body = data.partition(b"\r\n\r\n")
                length = [
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ]
                if b"\r\n\r\n" in data and len(body) >= sum(length):
                    state.requests.append(data)
                    data = b""
                    if answer(connection, state.requests[-1]) is False:
                        return

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.settimeout(300)
                state.connections += 1
                opened.append(connection)
                threading.Thread(target=serve_one, args=[connection], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield state
    finally:
        for s in (listener, *opened):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()


def ask(url, timeout=200.0, headers=None, body=JSON, times=1):
    """The responses to `times` requests over one connection."""

    async def run():
        with contextlib.closing(Connection(url, headers or {})) as connection:
            return [await post(connection, body, timeout) for _ in range(times)]

    return asyncio.run(run())


async def ask_again_once_closed(url):
    """Two bodies: the second request is made once the server has closed the connection of the first."""
    with contextlib.closing(Connection(url, {})) as connection:
        first = await post(connection, JSON, 200)
        for _ in range(20_000):
            if not connection.is_open():
                break
            await asyncio.sleep(0.01)
        return [first.body, (await post(connection, JSON, 200)).body]


def reply(data, close=False):
    def answer(connection, request):
        connection.sendall(data)
        return not close

    return answer


def test_a_connection_is_reused_and_the_request_is_whole():
    with raw_server(reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A:  b \r\n\r\n{}")) as server:
        responses = ask(server.url + "/x", headers={"Authorization": "Bearer k"}, body=b'{"a": 1}', times=3)
    assert [(r.status, r.body, r.headers["x-a"]) for r in responses] == [(200, b"{}", "b")] * 3
    assert server.connections == 1 and len(server.requests) == 3
    lines = server.requests[0].decode().split("\r\n")
    assert lines[0] == "POST /v1/x HTTP/1.1" and lines[-1] == '{"a": 1}'
    assert "Accept-Encoding: identity" in lines and "Authorization: Bearer k" in lines
    assert f"Host: {server.url.split('/')[2]}" in lines


@pytest.mark.parametrize("data, body", [
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{\"a\r\n1;x=y\r\n\"\r\nA\r\n: 1234567}\r\n0\r\nX: y\r\n\r\n", b'{"a": 1234567}'),
    (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n0\r\n\r\n", b""),
    (b"HTTP/1.1 200 OK\r\n\r\n{\"until\": \"close\"}", b'{"until": "close"}'),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
    (b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}", b"{}"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"{}"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", b""),
])  # fmt: skip
def test_bodies_in_every_framing(data, body):
    with raw_server(reply(data, close=True)) as server:
        assert asyncio.run(ask_again_once_closed(server.url)) == [body] * 2
        assert server.connections == 2


@pytest.mark.parametrize("data, words", [
    (b"", "without a reply"),
    (b"hello\r\n\r\n", "not HTTP/1.1"),
    (b"HTTP/1.1 abc OK\r\n\r\n", "not HTTP/1.1"),
    (b"HTTP/2 200\r\n\r\n", "not HTTP/1.1"),
    (b"\xff" * 100_000, "ValueError"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", "ValueError"),
    (b"HTTP/1.1 200 OK\r\nX: y", "within the headers"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300, "header lines"),
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 30, "without end"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "3 bytes read"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not a number"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "larger than 32 MB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n", "larger than 32 MB"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n", "larger than 32 MB"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", "no size"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab", "bytes read"),
    (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2000\r\n\r\n" + gzip.compress(bytes(2_000_000), mtime=0), "compressed"),
])  # fmt: skip
def test_malformed_replies_are_one_line(data, words):
    with raw_server(reply(data, close=True)) as server, pytest.raises(HTTPError) as e:
        ask(server.url)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("head", [
    b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n",
])  # fmt: skip
def test_the_timeout_is_for_the_whole_reply(head):
    """One byte every 50 ms would keep a client for ever that counts the time between bytes."""

    def drip(connection, request):
        connection.sendall(head)
        for _ in range(400):
            connection.sendall(b"x")
            time.sleep(0.05)
        return False

    with raw_server(drip) as server:
        started = time.monotonic()
        with pytest.raises(HTTPError, match="no whole reply within 0.2 s"):
            ask(server.url, timeout=0.2)
        assert 0.15 < time.monotonic() - started < 20, "the server drips for 20 s"


def test_the_rest_of_a_timed_out_reply_is_not_the_next_reply():
    asked_again = threading.Event()

    def slow_first(connection, request):
        if b"first" in request:
            asked_again.wait(20)
        else:
            asked_again.set()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + request[-5:])

    async def run(url):
        with contextlib.closing(Connection(url, {})) as connection:
            with pytest.raises(HTTPError):
                await post(connection, b"first", 0.3)
            return (await post(connection, b"other", 200)).body

    with raw_server(slow_first) as server:
        assert asyncio.run(run(server.url)) == b"other" and server.connections == 2


@pytest.mark.parametrize("chunked", [False, True])
def test_the_size_of_a_reply_is_limited(monkeypatch, chunked):
    monkeypatch.setattr(http_client, "MAX_BODY", 2**20)
    sent = []

    def stream(connection, request):
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"Transfer-Encoding: chunked\r\n" * chunked + b"\r\n")
        block = b"10000\r\n" + b"x" * 65536 + b"\r\n" if chunked else b"x" * 65536
        while True:
            connection.sendall(block)
            sent.append(len(block))

    with raw_server(stream) as server, pytest.raises(HTTPError, match="larger than 1 MB") as e:
        ask(server.url)
    assert not e.value.retry and sum(sent) < 50e6


def test_small_chunks_do_not_delay_the_timeout():
    """While chunks are read that have all arrived, other tasks and timers have their turns."""
    turns = []

    async def run():
        async def other():
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        reader, task = asyncio.StreamReader(), asyncio.create_task(other())
        reader.feed_data(b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        body = await http_client.read_chunked_body(reader)
        task.cancel()
        return body

    assert asyncio.run(run()) == b"x" * 5000 and len(turns) >= 5


def test_a_refused_connection_is_one_line():
    with closed_port() as url, pytest.raises(HTTPError, match="Connect") as e:
        ask(url)
    assert e.value.retry and "\n" not in str(e.value)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_https_needs_a_trusted_certificate(tmp_path, monkeypatch):
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2".split()
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answer = reply(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    with raw_server(answer, context) as server:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(HTTPError, match="not trusted.*SSL_CERT_FILE"):
            ask(url)
        assert not server.requests, "nothing is sent before the certificate is known"
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        http_client.trusted_certificates.cache_clear()
        try:
            assert [r.body for r in ask(url, times=2)] == [b"{}"] * 2 and len(server.requests) == 2
            with pytest.raises(HTTPError, match="not trusted"):
                ask(url.replace("localhost", "127.0.0.1"))
        finally:
            http_client.trusted_certificates.cache_clear()


# ---- proxies


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_a_proxy_is_used_for_other_hosts_only(no_proxies):
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with raw_server(reply(ok)) as proxy, raw_server(reply(ok)) as server:
        no_proxies.setenv("http_proxy", proxy.url.replace("http://", "http://me:p%40ss@").removesuffix("/v1"))
        ask(server.url)
        assert not proxy.requests and len(server.requests) == 1, "this machine is asked directly"
        ask("http://teacher.invalid:8000/v1/chat/completions")
        lines = proxy.requests[0].decode().split("\r\n")
        assert lines[0] == "POST http://teacher.invalid:8000/v1/chat/completions HTTP/1.1"
        assert f"Proxy-Authorization: Basic {base64.b64encode(b'me:p@ss').decode()}" in lines
        no_proxies.setenv("no_proxy", "teacher.invalid")
        with pytest.raises(HTTPError):
            ask("http://teacher.invalid:8000/v1", timeout=20)
        assert len(proxy.requests) == 1


def test_https_goes_through_a_tunnel_that_sees_no_key(no_proxies):
    with raw_server(reply(b"HTTP/1.1 403 Forbidden\r\n\r\n", close=True)) as proxy:
        no_proxies.setenv("https_proxy", proxy.url.removesuffix("/v1"))
        with pytest.raises(HTTPError, match="403"):
            ask("https://teacher.invalid/v1", headers={"Authorization": "Bearer k3y"})
        assert proxy.requests[0].startswith(b"CONNECT teacher.invalid:443 HTTP/1") and b"k3y" not in proxy.requests[0]
