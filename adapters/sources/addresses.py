"""Decide which addresses downloads may connect to: none of this machine or its networks, unless the operator allows it.

A name is resolved once, every address of the name is checked, and the connection goes to an address that was checked.
So the name cannot point elsewhere a moment later.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_ALSO_LOCAL = [ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "64:ff9b:1::/48", "5f00::/16")]
"""Networks that some releases of Python count as global and that are not."""


@dataclass(frozen=True)
class Endpoint:
    """One checked address of a host."""

    family: int  # of the socket
    address: str
    port: int


@dataclass(frozen=True)
class Reach:
    """The hosts that downloads may connect to beside the public ones."""

    allowed: tuple[str, ...] = ()  # names, *.suffixes, addresses and networks (10.0.0.0/8)

    def __post_init__(self) -> None:
        for rule in self.allowed:
            name = rule.removeprefix("*.")
            if not name or any(char in name for char in "*@?# ") or ("/" in rule and _network(rule) is None):
                raise ValueError(f"{rule!r} is no host: expected a name, *.name, an address or a network (10.0.0.0/8)")

    def names(self, host: str) -> bool:
        """Return whether a rule allows `host` by name, or as an address."""
        host = host.lower().rstrip(".")
        for rule in map(str.lower, self.allowed):
            if host == rule or (rule.startswith("*.") and host.endswith(rule[1:])):
                return True
        try:
            return self.holds(ipaddress.ip_address(host))
        except ValueError:
            return False

    def holds(self, address: Address) -> bool:
        """Return whether one of the allowed networks holds `address`."""
        networks = [network for network in map(_network, self.allowed) if network is not None]
        return any(address.version == network.version and address in network for network in networks)


def resolve_host(host: str, port: int, reach: Reach) -> list[Endpoint]:
    """Resolve `host` to its addresses, at least one.

    Raises AdapterRefused ("forbidden") if an address is private and not allowed, AdapterUnavailable if there is no
    address, AdapterNotFound if `host` cannot be a name.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise AdapterNotFound(f"{host[:80]!r} cannot be the name of a host") from None
    except OSError as error:
        raise AdapterUnavailable(f"the address of {host!r} cannot be found: {error.strerror}") from None
    endpoints = [Endpoint(family, str(address[0]), port) for family, _, _, _, address in found]
    if not reach.names(host):
        check_public(host, [endpoint.address for endpoint in endpoints], reach)
    return endpoints


def check_public(host: str, addresses: Sequence[str], reach: Reach) -> None:
    """Raise AdapterRefused ("forbidden") if one of `addresses` is of a private, local or reserved network."""
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        if not reach.holds(address) and not is_public(address):
            raise AdapterRefused(
                "forbidden",
                f"{host!r} has an address that is not public, and adapters are not read from there; the operator can "
                "allow it (--allow-host)",
            )


def is_public(address: Address) -> bool:
    """Return whether `address`, or the IPv4 address inside it, is of the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner:
            return is_public(inner)
    if any(address.version == network.version and address in network for network in _ALSO_LOCAL):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _network(rule: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(rule)
    except ValueError:
        return None
