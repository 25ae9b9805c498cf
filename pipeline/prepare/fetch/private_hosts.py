"""Keeps the rows of a list from reaching private addresses: this machine, its network, a cloud's metadata service.

The check applies to the address to which a socket connects, after redirects and name resolution. Only a proxy sees
where it connects to itself, so with a proxy only addresses that are written in a URL are checked.
"""

import ipaddress
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that contain an IPv4 address in their last 32 bits."""

LOCAL_NAMES = ("localhost", "local", "internal", "localdomain")

DEFAULT_PORTS = {"http": 80, "https": 443}

Endpoint = tuple[str, int]
"""A host (name or address) and a port."""


class PrivateAddressError(OSError):
    """A connection to an address that is not public and was not named by the user."""


def is_public(address: str) -> bool:
    """Whether an IP address, given as text, belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
    return ip.is_global and not ip.is_multicast


def endpoint_of(url: str) -> Endpoint:
    """Host and port of a URL. Raises ValueError for an invalid port."""
    parts = urlsplit(url)
    return (parts.hostname or "").lower(), parts.port or DEFAULT_PORTS.get(parts.scheme, 0)


def check_name(url: str, own_hosts: Iterable[Endpoint]) -> None:
    """Raises PrivateAddressError if the URL itself contains a private address."""
    endpoint = endpoint_of(url)
    name = endpoint[0].rstrip(".")
    is_private = name.rpartition(".")[2] in LOCAL_NAMES
    with suppress(ValueError):
        is_private = not is_public(name)
    if is_private and endpoint not in tuple(own_hosts):
        raise PrivateAddressError(_refusal(name))


@contextmanager
def public_hosts_only(own_hosts: Iterable[Endpoint]) -> Iterator[None]:
    """Context in which sockets of this process connect only to public addresses and to `own_hosts`.

    Any other connection raises PrivateAddressError. Only one thread at a time may use it.
    """
    _guard.allowed = {address for endpoint in own_hosts for address in _addresses(endpoint)}
    if not _guard.is_installed:
        sys.addaudithook(_guard.audit)  # never removed; Python calls it at each connection
        _guard.is_installed = True
    try:
        yield
    finally:
        _guard.allowed = None


def _addresses(endpoint: Endpoint) -> set[Endpoint]:
    with suppress(OSError):
        return {info[4][:2] for info in socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)}  # type: ignore[misc]
    return set()


class _Guard:
    is_installed = False
    allowed: set[Endpoint] | None = None
    """None: every address is allowed."""

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "socket.connect" or self.allowed is None or not isinstance(args[1], tuple):
            return
        host, port = args[1][:2]
        if (host, port) not in self.allowed and not _is_public_address(host):
            raise PrivateAddressError(_refusal(host))


def _is_public_address(host: str) -> bool:
    """False for a name too, because the address that it resolves to would not be checked."""
    try:
        return is_public(host)
    except ValueError:
        return False


_guard = _Guard()


def _refusal(host: str) -> str:
    return f"{host} is not a public address; --allow-private-hosts lets lists lead there"
