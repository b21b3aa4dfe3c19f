"""Reaching the server, one step after another, without FLARE; only connections that go out.

Each step raises NetworkError with its likely cause, so that a check and a log line say the
same.
"""

from __future__ import annotations

import os
import socket
import ssl
import urllib.request
from collections.abc import Mapping

from fedfms.errors import FedfmsError
from fedfms.preflight.kit import Kit

TIMEOUT_SECONDS = 5.0
_ALPN = ["h2"]  # what gRPC speaks


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


def shake_hands(
    stream: socket.socket, kit: Kit, *, host: str | None = None, identify: bool = True
) -> ssl.SSLSocket:
    """Mutual TLS over a connection, with the kit's certificate and CA.

    Args:
        stream: connected; closed if this fails.
        kit: whose CA the server's certificate must come from.
        host: the name that certificate must have; the kit's server by default.
        identify: show the kit's own certificate, and wait until the server has accepted it.

    Raises:
        NetworkError: code tls (not our CA, another name, expired, no TLS at all) or tls-refused
            (the server does not accept this kit's certificate).
    """
    host = host or kit.about.server_host
    address = f"{kit.about.server_host}:{kit.about.server_port}"
    try:
        context = ssl.create_default_context(cafile=str(kit.root_file))
        context.set_alpn_protocols(_ALPN)
        if identify:
            context.load_cert_chain(kit.certificate_file, kit.key_file)
        secured = context.wrap_socket(stream, server_hostname=host)
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
    """All steps in turn: name, TCP, TLS.

    Raises:
        NetworkError: the first step that fails.
    """
    host, port = kit.about.server_host, kit.about.server_port
    resolve(host, port)
    shake_hands(connect(host, port), kit).close()


def proxy_for(host: str, environment: Mapping[str, str] | None = None) -> str | None:
    """The proxy variable through which gRPC would connect to this host, as NAME=VALUE; else None.

    gRPC reads grpc_proxy, https_proxy and http_proxy, in lower case, and no_grpc_proxy or no_proxy.
    """
    values = os.environ if environment is None else environment
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        if values.get(name):
            break
    else:
        return None
    exceptions = values.get("no_grpc_proxy") or values.get("no_proxy") or ""
    if urllib.request.proxy_bypass_environment(host, {"no": exceptions}):  # type: ignore[attr-defined]
        return None
    return f"{name}={values[name]}"


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or type(error).__name__
