"""A minimal HTTP client: sends a JSON request by POST and reads the whole reply before a deadline.

    connection = Connection("https://api.openai.com/v1/chat/completions", {"Authorization": "Bearer ..."})
    response = await post(connection, body, timeout=120)

Common clients limit the wait for each piece of a reply, so a server that sends one byte a second can block them
forever. Here the timeout covers connecting, sending and the whole reply, and the size of a reply is limited. Redirects
are not followed, so headers never reach another host. Compressed replies are refused, because a few bytes may unpack to
gigabytes. A connection stays open between requests. HTTPS_PROXY, HTTP_PROXY and NO_PROXY are obeyed, except for
requests to this machine.
"""

import asyncio
import base64
import functools
import http.client
import itertools
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

MAX_BODY = 32 * 2**20  # bytes of a reply
MAX_HEADERS = 200  # lines
MAX_LINE = 2**16  # bytes of a header line
HEX_DIGITS = frozenset(b"0123456789abcdefABCDEF")


class HTTPError(Exception):
    """The request got no usable reply. The message is one line. retry: True if another try may succeed."""

    def __init__(self, message: str, retry: bool = True):
        super().__init__(message)
        self.retry = retry


@dataclass
class Response:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


class Connection:
    """A connection to one URL. The first request opens it. The next request opens it again if it was closed."""

    def __init__(self, url: str, headers: dict[str, str]):
        self.url: SplitResult = urlsplit(url)
        self.host = self.url.hostname
        self.port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self.proxy = find_proxy(self.url.scheme, self.host)
        self.headers = headers
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    def is_open(self) -> bool:
        return self.writer is not None and not self.reader.at_eof()  # the server may have closed it meanwhile

    def close(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None


async def post(connection: Connection, body: bytes, timeout: float) -> Response:
    """Sends one request and reads the reply. HTTPError if the whole reply does not arrive within `timeout` seconds."""
    try:
        return await asyncio.wait_for(send_and_read(connection, body), timeout)
    except asyncio.TimeoutError:
        reason = HTTPError(f"no whole reply within {timeout:g} s")
    except ssl.SSLCertVerificationError as e:
        reason = HTTPError(f"its certificate is not trusted ({e.verify_message}); SSL_CERT_FILE names the trusted ones")
    except HTTPError as e:
        reason = e
    except (OSError, EOFError, ValueError) as e:  # ValueError: a line longer than MAX_LINE
        reason = HTTPError(f"{type(e).__name__}: {e}")
    except BaseException:  # cancelled: the next request would read the rest of this reply
        connection.close()
        raise
    connection.close()
    raise reason


async def send_and_read(connection: Connection, body: bytes) -> Response:
    if not connection.is_open():
        connection.close()
        await open_connection(connection)
    connection.writer.write(request_head(connection, len(body)) + body)
    await connection.writer.drain()
    version, status, headers = await read_head(connection.reader)
    response = Response(status, headers, await read_body(connection.reader, status, headers))
    ends_with_close = "content-length" not in headers and "transfer-encoding" not in headers
    if version == "HTTP/1.0" or ends_with_close or "close" in headers.get("connection", "").lower():
        connection.close()
    return response


# ---------------------------------------------------------------------------------------------------------------------
# Connecting and sending


async def open_connection(connection: Connection) -> None:
    secure = connection.url.scheme == "https"
    options = {"ssl": trusted_certificates(), "server_hostname": connection.host} if secure else {}
    if connection.proxy and secure:
        options["sock"] = await asyncio.to_thread(open_tunnel, connection)
    elif connection.proxy:
        options |= {"host": connection.proxy.hostname, "port": connection.proxy.port or 80}
    else:
        options |= {"host": connection.host, "port": connection.port}
    connection.reader, connection.writer = await asyncio.open_connection(limit=MAX_LINE, **options)


@functools.cache
def trusted_certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def find_proxy(scheme: str, host: str) -> SplitResult | None:
    """The proxy that the environment names for this host, as a split URL. None for a direct connection."""
    if host == "localhost" or host == "::1" or host.startswith("127.") or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(scheme)
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None


def proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return {"Proxy-Authorization": f"Basic {base64.b64encode(user).decode()}"}


def open_tunnel(connection: Connection, timeout: float = 30.0) -> socket.socket:
    """Opens a tunnel through the proxy to the host -> its socket, before TLS."""
    proxy = connection.proxy
    tunnel = http.client.HTTPConnection(proxy.hostname, proxy.port or 80, timeout=timeout)
    tunnel.set_tunnel(connection.host, connection.port, headers=proxy_headers(proxy))
    tunnel.connect()
    tunnel.sock.setblocking(False)
    return tunnel.sock


def request_head(connection: Connection, length: int) -> bytes:
    url = connection.url
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    if url.port:
        host += f":{url.port}"
    through_proxy = connection.proxy and url.scheme == "http"
    target = (f"http://{host}" if through_proxy else "") + url.path
    headers = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": str(length),
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "User-Agent": "slm-post-training",
        **(proxy_headers(connection.proxy) if through_proxy else {}),
        **connection.headers,
    }
    return "".join([f"POST {target} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in headers.items()), "\r\n"]).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


async def read_head(reader: asyncio.StreamReader) -> tuple[str, int, dict[str, str]]:
    """Reads status and headers, skipping interim replies (status 1xx). -> (version, status, headers)"""
    for _ in range(10):
        line = await reader.readline()
        if not line:
            raise HTTPError("the server closed the connection without a reply")
        version, status = (line.decode("latin-1").split(None, 2) + ["", ""])[:2]
        if version not in ("HTTP/1.0", "HTTP/1.1") or not (len(status) == 3 and status.isascii() and status.isdigit()):
            raise HTTPError("the reply is not HTTP/1.1")
        headers = await read_headers(reader)
        if int(status) >= 200:
            return version, int(status), headers
    raise HTTPError("the server sends interim replies without end")


async def read_headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers = {}
    for _ in range(MAX_HEADERS):
        line = await reader.readline()
        if not line:
            raise HTTPError("the server closed the connection within the headers")
        if not line.strip():
            return headers
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    raise HTTPError(f"the reply has more than {MAX_HEADERS} header lines", retry=False)


async def read_body(reader: asyncio.StreamReader, status: int, headers: dict[str, str]) -> bytes:
    if status in (204, 304):
        return b""
    if headers.get("content-encoding", "identity").lower() not in ("identity", ""):
        raise HTTPError("the reply is compressed, which was not asked for", retry=False)
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return await read_chunked_body(reader)
    if "content-length" in headers:
        length = headers["content-length"]
        if not (length.isascii() and length.isdigit()):
            raise HTTPError("its Content-Length is not a number")
        if len(length) > 12 or int(length) > MAX_BODY:
            raise too_large()
        return await reader.readexactly(int(length))
    body = bytearray()
    while block := await reader.read(2**16):
        body += block
        if len(body) > MAX_BODY:
            raise too_large()
    return bytes(body)


async def read_chunked_body(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    for n in itertools.count(1):
        if n % 1000 == 0:
            await asyncio.sleep(0)  # chunks that have arrived are read without a pause, which would hold up the timeout
        size = (await reader.readline()).split(b";")[0].strip()
        if not size or len(size) > 12 or not HEX_DIGITS.issuperset(size):
            raise HTTPError("a chunk of the reply has no size")
        if int(size, 16) == 0:
            await read_headers(reader)  # trailers
            return bytes(body)
        if len(body) + int(size, 16) > MAX_BODY:
            raise too_large()
        body += await reader.readexactly(int(size, 16))
        await reader.readline()


def too_large() -> HTTPError:
    return HTTPError(f"the reply is larger than {MAX_BODY // 2**20} MB", retry=False)
