"""Reaching the server, one step after another, without FLARE; only connections that go out.

Each step raises NetworkError with its likely cause, so that a check and a log line say the
same. FLARE's own connection is gRPC's, which goes through an HTTP proxy where the environment names
one; so do these steps, by gRPC's rules.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from fedfms.errors import FedfmsError
from fedfms.kits.kit import Kit

TIMEOUT_SECONDS = 5.0
_ALPN = ["h2"]  # what gRPC speaks


@dataclass(frozen=True, slots=True)
class ServerGreeting:
    """What the server says of itself; None where it runs no greeting."""

    version: str | None  # of fedfms there
    clock_ahead: float | None  # seconds by which the server's clock is ahead of this machine's
    revoked: bool | None  # whether this participant is disabled there


class NetworkError(FedfmsError):
    """The server cannot be reached, or is not the one that it should be."""

    default_code = "network"


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host.

    Raises:
        NetworkError: code dns.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NetworkError(
            f"the server's name {host} has no address here ({error.strerror or error})",
            "ask your network's administrators for a DNS entry, or set SERVER_EXTRA_HOST="
            f"{host}:ADDRESS in .env",
            code="dns",
        ) from None
    return sorted({str(entry[4][0]) for entry in found})


def connect(host: str, port: int, timeout: float = TIMEOUT_SECONDS) -> socket.socket:
    """A TCP connection to the server.

    Raises:
        NetworkError: code tcp.
    """
    try:
        return socket.create_connection((host, port), timeout)
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        raise NetworkError(
            f"nothing answers at {host}:{port} ({error.strerror or 'no answer in time'})",
            "ask the coordinator whether the server runs and on which port"
            if refused
            else f"let this machine open TCP connections to {host}:{port} in the firewall; ask the "
            "coordinator whether the server runs",
            code="tcp",
        ) from None


def shake_hands(stream: socket.socket, kit: Kit, *, identify: bool = True) -> ssl.SSLSocket:
    """Mutual TLS over a connection, with the kit's certificate and CA.

    Args:
        stream: connected; closed if this fails.
        kit: whose CA the server's certificate must come from, with the name of the kit's server.
        identify: show the kit's own certificate, and wait until the server has accepted it.

    Raises:
        NetworkError: code tls (not our CA, another name, expired, no TLS at all) or tls-refused
            (the server does not accept this kit's certificate).
    """
    address = f"{kit.about.server_host}:{kit.about.server_port}"
    try:
        context = ssl.create_default_context(cafile=str(kit.root_file))
        context.set_alpn_protocols(_ALPN)
        if identify:
            context.load_cert_chain(kit.certificate_file, kit.key_file)
        secured = context.wrap_socket(stream, server_hostname=kit.about.server_host)
    except ssl.SSLCertVerificationError as error:
        stream.close()
        raise NetworkError(
            f"the server at {address} shows a certificate that this kit does not trust: "
            f"{error.verify_message}",
            "something between here and the server may open TLS connections (ask for an exception "
            "for this address), or the kit is of another project: ask the coordinator",
            code="tls",
        ) from None
    except (OSError, ValueError) as error:
        stream.close()
        raise NetworkError(
            f"{address} does not speak TLS as the server does ({_reason(error)})",
            f"ask the coordinator whether {address} is the server's; a firewall or proxy may "
            "answer in its place",
            code="tls",
        ) from None
    if identify:
        _wait_until_accepted(secured, address)
    return secured


def _wait_until_accepted(secured: ssl.SSLSocket, address: str) -> None:
    """With TLS 1.3 a server judges the client's certificate after the client's handshake."""
    try:
        secured.recv(1)  # gRPC's server speaks first
    except TimeoutError:
        return  # another protocol than gRPC: silence is no refusal
    except OSError as error:
        secured.close()
        raise NetworkError(
            f"the server at {address} does not accept this kit's certificate ({_reason(error)})",
            "ask the coordinator for a new kit; check the clock of this machine",
            code="tls-refused",
        ) from None


def reach(kit: Kit) -> None:
    """All steps in turn: name, proxy, TCP, TLS.

    Raises:
        NetworkError: the first step that fails.
    """
    if proxy_for(kit.about.server_host) is None:
        resolve(kit.about.server_host, kit.about.server_port)
    shake_hands(connect_to_server(kit), kit).close()


def connect_to_server(kit: Kit) -> socket.socket:
    """A TCP connection to the kit's server, the way that gRPC takes: direct or through a proxy.

    Raises:
        NetworkError: code tcp, or proxy.
    """
    host, port = kit.about.server_host, kit.about.server_port
    proxy = proxy_for(host)
    return connect(host, port) if proxy is None else connect_through(proxy, host, port)


# -------------------------------------------------------------------------------------- the proxy


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that opens a way to other machines (CONNECT)."""

    variable: str  # of the environment, that names it
    host: str
    port: int
    login: str | None = None  # user:password

    def __str__(self) -> str:  # without the password: it is printed
        return f"http://{self.host}:{self.port}"


def proxy_for(host: str, environment: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy through which gRPC connects to this host; None where it connects directly.

    gRPC takes the first of grpc_proxy, https_proxy and http_proxy that is set, and of no_grpc_proxy
    and no_proxy, all in lower case; an empty one counts as set.

    Raises:
        NetworkError: code proxy; the variable is set to what gRPC cannot use, and it would connect
            directly without a word.
    """
    values = os.environ if environment is None else environment
    variable = next((n for n in ("grpc_proxy", "https_proxy", "http_proxy") if n in values), None)
    if variable is None or not values[variable]:
        return None
    around = next((values[n] for n in ("no_grpc_proxy", "no_proxy") if n in values), "")
    if any(_is_meant(host, entry.strip().lower()) for entry in around.split(",")):
        return None
    with contextlib.suppress(ValueError):
        found = urllib.parse.urlsplit(values[variable])
        if found.scheme == "http" and found.hostname and found.port:
            login, at, _ = found.netloc.rpartition("@")
            return Proxy(
                variable, found.hostname, found.port, urllib.parse.unquote(login) if at else None
            )
    raise NetworkError(
        f"{variable} names a proxy in a way that gRPC does not understand",
        f"write it as http://HOST:PORT (SITE_PROXY in .env), or add {host} to SITE_NO_PROXY",
        code="proxy",
    )


def proxy_applies(host: str) -> bool:
    """Whether a proxy is named for this host, rightly or not."""
    try:
        return proxy_for(host) is not None
    except NetworkError:
        return True


def connect_through(proxy: Proxy, host: str, port: int) -> socket.socket:
    """A connection to the server that a proxy made.

    Raises:
        NetworkError: code proxy where the proxy is not there or refuses, tcp where it cannot reach
            the server either.
    """
    tunnel = http.client.HTTPConnection(proxy.host, proxy.port, TIMEOUT_SECONDS)
    headers = {}
    if proxy.login is not None:
        login = base64.b64encode(proxy.login.encode()).decode()
        headers["Proxy-Authorization"] = f"Basic {login}"
    tunnel.set_tunnel(host, port, headers)
    try:
        tunnel.connect()
    except (OSError, http.client.HTTPException) as error:
        reached = tunnel.sock is not None
        tunnel.close()
        raise _not_through(proxy, f"{host}:{port}", error, reached) from None
    stream: socket.socket = tunnel.sock
    return stream


def _is_meant(host: str, entry: str) -> bool:
    """Whether an entry of no_proxy means a host, as gRPC has it: `*` has no meaning."""
    name = host.lower()
    if not entry:
        return False
    with contextlib.suppress(ValueError):  # a host given by its address, in a block of addresses
        return ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False)
    entry = entry.removeprefix(".")
    return name == entry or name.endswith(f".{entry}")


def _not_through(proxy: Proxy, server: str, error: Exception, reached: bool) -> NetworkError:
    """Why there is no way through a proxy, by what `http.client` raised.

    Args:
        reached: whether the proxy took the connection.
    """
    problem, fix = f"the proxy {proxy}", "ask your network's administrators"
    refused = re.match(r"Tunnel connection failed: ((\d{3}) ?[ -~]*)", str(error))
    if isinstance(error, http.client.HTTPException):
        problem = f"who answers at {proxy} is no HTTP proxy"
        fix = f"correct SITE_PROXY in .env, or {fix}"
    elif (refused and int(refused[2]) >= 500) or (reached and isinstance(error, TimeoutError)):
        why = refused[1].strip() if refused else f"no answer within {TIMEOUT_SECONDS:.0f} s"
        return NetworkError(
            f"{problem} does not reach {server} ({why})",
            "ask the coordinator whether the server runs and on which port; ask your network's "
            f"administrators whether the proxy finds {server.rpartition(':')[0]}",
            code="tcp",
        )
    elif refused:
        problem += f" refuses to connect to {server} ({refused[1].strip()})"
        fix += f" to let CONNECT to {server} through"
        if refused[2] == "407":
            fix = "write user and password into SITE_PROXY in .env: http://USER:PASSWORD@HOST:PORT"
    elif not reached:
        problem += f" cannot be reached ({getattr(error, 'strerror', None) or 'no answer in time'})"
        fix = f"correct SITE_PROXY in .env, or {fix}"
    else:
        problem += f" ended the connection when it was asked for {server} ({_reason(error)})"
        fix += " whether SITE_PROXY is an HTTP proxy"
    return NetworkError(problem, fix, code="proxy")


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or type(error).__name__
