"""Send GET and HEAD to strangers' URLs: check addresses at every hop, bound the time, send secrets to their host alone.

No library's client lets the caller choose the address for a name. Without that choice, a name could point into the
server's own network after it was checked.
"""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources.addresses import Endpoint, Reach, check_public, resolve_host
from loraplex.adapters.sources.sources import redact

MAX_REDIRECTS = 5

STALL_SECONDS = 30.0
"""Seconds without a byte after which a connection counts as dead."""

CHUNK_BYTES = 1 << 18

AGENT = "loraplex"


@dataclass(frozen=True)
class Deadline:
    """The time at which a download has to be over."""

    end: float  # time.monotonic()

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds left. Raises AdapterUnavailable when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise AdapterUnavailable("the download took longer than it may (--download-timeout)")
        return left


class Interrupted(AdapterUnavailable):
    """Say that the connection broke; another attempt may go on from the same byte."""


class NotGiven(AdapterNotFound):
    """Say that the host does not have the file, or does not give it."""

    def __init__(self, message: str, code: str) -> None:
        """code: of the header X-Error-Code, by which the Hub tells the reason."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Answer:
    """The head of a good answer; `chunks` can be read once, while the connection is open."""

    status: int
    headers: http.client.HTTPMessage
    chunks: Iterator[bytes]


class HttpClient:
    """Send requests, each on a connection of its own."""

    def __init__(self, reach: Reach, tls: ssl.SSLContext | None = None, stall_seconds: float = STALL_SECONDS) -> None:
        """tls: which certificates are trusted; None: the system's, or those of $SSL_CERT_FILE."""
        self._reach = reach
        self._tls = tls or ssl.create_default_context()
        self._stall = stall_seconds

    @contextmanager
    def open(
        self,
        url: str,
        deadline: Deadline,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        secret: Mapping[str, str] | None = None,
        plain: str | None = None,
    ) -> Iterator[Answer]:
        """Send a request, follow redirects, and open the answer, whose status is 200 or 206.

        `headers` go to every hop, `secret` ones to the first hop's host only. `plain`: a host (with port) that may be
        asked without TLS, as the hosts of --allow-host may. Raises AdapterNotFound (404, 401 and the like),
        AdapterRefused (an address or redirect that is not allowed), Interrupted, AdapterUnavailable (all else).
        """
        secret = {**_basic(url), **(secret or {})}
        origin = _origin(url)
        for _ in range(MAX_REDIRECTS + 1):
            own = secret if _origin(url) == origin else {}
            with self._ask(url, deadline, method, {**(headers or {}), **own}, plain) as (answer, target):
                if target is None:
                    yield answer
                    return
                url = target
        raise AdapterRefused("bad_source", f"{redact(url)} redirects more than {MAX_REDIRECTS} times")

    @contextmanager
    def _ask(
        self, url: str, deadline: Deadline, method: str, headers: Mapping[str, str], plain: str | None
    ) -> Iterator[tuple[Answer, str | None]]:
        """Send one hop's request and open its answer, with the URL that the answer redirects to."""
        parts = urlsplit(url)
        shown = redact(url)
        host, path = parts.hostname or "", urlunsplit(("", "", parts.path or "/", parts.query, ""))
        secure = self._is_secure(url, plain)
        port = parts.port or (443 if secure else 80)
        connection = self._connection(host, port, secure, min(self._stall, deadline.left()), plain)
        watch = threading.Timer(deadline.left(), connection.cut)  # a peer that sends a byte now and then never stalls
        watch.daemon = True
        watch.start()
        try:
            with _told(shown, connection):
                agent = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
                connection.request(method, path, headers={**agent, **headers})
                response = connection.getresponse()
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                yield Answer(response.status, response.headers, iter(())), self._target(url, location)
                return
            _check_status(response, shown)
            yield Answer(response.status, response.headers, _chunks(response, shown, connection, deadline)), None
        finally:
            watch.cancel()
            connection.close()

    def _is_secure(self, url: str, plain: str | None) -> bool:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return True
        if parts.scheme != "http" or not (parts.netloc == plain or self._reach.names(parts.hostname or "")):
            raise AdapterRefused(
                "forbidden", f"{redact(url)} is not https://; the operator can allow the host (--allow-host)"
            )
        return False

    def _target(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        try:
            parts = urlsplit(target)
            usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or any(ord(char) <= 32 for char in target):
            raise AdapterRefused("bad_source", f"{redact(url)} redirects to what is no URL")
        if url.startswith("https:") and parts.scheme == "http":
            raise AdapterRefused("forbidden", f"{redact(url)} redirects to {redact(target)}, which is not https://")
        return target

    def _connection(self, host: str, port: int, secure: bool, timeout: float, plain: str | None) -> _Connection:
        tls = self._tls if secure else None
        proxy = urlsplit(getproxies().get("https" if secure else "http", ""))
        if proxy.hostname and not proxy_bypass(f"{host}:{port}") and not self._reach.names(host):
            if _is_address(host):
                check_public(host, [host], self._reach)
            own = [Endpoint(0, proxy.hostname, proxy.port or 80)]  # the operator's; it resolves the host itself
            connection = _Connection(host, port, own, timeout, tls)
            login = _basic(proxy.geturl())
            connection.set_tunnel(host, port, {f"Proxy-{key}": value for key, value in login.items()})
            return connection
        named = Reach((*self._reach.allowed, host)) if plain is not None and _hostport(host, port) == plain else None
        return _Connection(host, port, resolve_host(host, port, named or self._reach), timeout, tls)


class _Connection(http.client.HTTPConnection):
    """Connect to endpoints that are checked already."""

    def __init__(
        self, host: str, port: int, endpoints: list[Endpoint], timeout: float, tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = 443 if tls else 80  # what the Host header leaves out
        self.was_cut = False
        self._plain: socket.socket | None = None
        self._endpoints = endpoints
        self._pinned_tls = tls
        self._seconds = timeout

    def connect(self) -> None:
        failure: OSError | None = None
        for endpoint in self._endpoints:
            try:
                self.sock = socket.create_connection((endpoint.address, endpoint.port), self._seconds)
                break
            except OSError as error:
                failure = error
        else:
            raise failure or OSError("no address")
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if getattr(self, "_tunnel_host", None):
            self._tunnel()  # type: ignore[attr-defined]
        if self._pinned_tls is not None:
            self.sock = self._pinned_tls.wrap_socket(self.sock, server_hostname=self.host)
        self._plain = self.sock  # http.client forgets its own while the answer is still being read

    def cut(self) -> None:
        """End the connection from another thread, and whatever waits for it."""
        self.was_cut = True
        if self._plain is not None:
            with suppress(OSError):  # not an SSLSocket's own, which would have what follows read without decrypting
                socket.socket.shutdown(self._plain, socket.SHUT_RDWR)


def _chunks(
    response: http.client.HTTPResponse, shown: str, connection: _Connection, deadline: Deadline
) -> Iterator[bytes]:
    """Yield the body of `response`. Raises Interrupted when the body ends too early."""
    length, count = response.length, 0
    while True:
        deadline.left()
        with _told(shown, connection):
            chunk = response.read1(CHUNK_BYTES)
        if not chunk or connection.was_cut:  # what comes after a cut may be anything
            break
        count += len(chunk)
        yield chunk
    if connection.was_cut or (length is not None and count < length):
        deadline.left()
        raise Interrupted(f"{shown} broke off after {count} of {length} bytes")


@contextmanager
def _told(shown: str, connection: _Connection) -> Iterator[None]:
    """Turn the errors of a connection into ours, without the secrets of the URL."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise AdapterUnavailable(f"{shown}: its certificate is not trusted: {error.verify_message}") from None
    except TimeoutError:
        raise Interrupted(f"{shown} does not answer") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if connection.was_cut:
            raise AdapterUnavailable("the download took longer than it may (--download-timeout)") from None
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise Interrupted(f"{shown} cannot be read: {reason}") from None


def _check_status(response: http.client.HTTPResponse, shown: str) -> None:
    status = response.status
    if status in (200, 206):
        return
    what = f"{shown} answers {status} {response.reason}"[:300]
    if status == 429 or status >= 500 or status == 408:
        raise AdapterUnavailable(what)
    if status == 416:
        raise Interrupted(what)
    if status in (401, 403):
        what = f"{what}: it is private, or not there; give a token or a URL that may read it"
    raise NotGiven(what, response.headers.get("X-Error-Code", ""))


def _basic(url: str) -> dict[str, str]:
    """Make the header for the user and password of `url`."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"Authorization": "Basic " + base64.b64encode(login).decode()}


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _hostport(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return shown if port in (80, 443) else f"{shown}:{port}"
