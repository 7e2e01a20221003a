"""Which addresses downloads may connect to."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest

from loraplex.adapters.errors import AdapterRefused, AdapterUnavailable
from loraplex.adapters.sources.addresses import Reach, is_public, resolve_host

PRIVATE = [
    *(
        "127.0.0.1",
        "127.255.0.9",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
    ),
    *("100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1"),
    *("fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *("2002:7f00:1::", "2001:0:1:1:1:1:f5ff:fffe", "2001:db8::1"),
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_every_guise(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to."""
    known: dict[str, list[str]] = {}

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, 1, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def test_one_private_address_is_enough_to_refuse(names: dict[str, list[str]]) -> None:
    names["example.org"] = ["8.8.8.8"]
    assert [endpoint.address for endpoint in resolve_host("example.org", 443, Reach())] == ["8.8.8.8"]
    names["example.org"] = ["8.8.8.8", "10.0.0.1"]
    with pytest.raises(AdapterRefused, match=r"'example.org'.*--allow-host") as caught:
        resolve_host("example.org", 443, Reach())
    assert caught.value.code == "forbidden"
    assert "10.0.0.1" not in str(caught.value), "callers learn nothing of the network"
    with pytest.raises(AdapterUnavailable, match="cannot be found"):
        resolve_host("nowhere.example", 443, Reach())


@pytest.mark.parametrize(
    ("rule", "admits", "refuses"),
    [
        ("models.corp", "models.corp", "other.corp"),
        ("models.corp", "MODELS.corp.", "xmodels.corp"),
        ("*.corp", "a.b.corp", "corp"),
        ("*.corp", "a.corp", "a.notcorp"),
        ("10.0.0.0/8", "ten.example", "eleven.example"),
        ("10.0.0.1", "ten.example", "eleven.example"),
    ],
)
def test_hosts_that_are_allowed(names: dict[str, list[str]], rule: str, admits: str, refuses: str) -> None:
    for name in (admits, refuses):
        names[name] = ["192.168.0.1"]
    names["ten.example"], names["eleven.example"] = ["10.0.0.1"], ["172.16.0.1"]
    assert resolve_host(admits, 443, Reach((rule,)))
    with pytest.raises(AdapterRefused):
        resolve_host(refuses, 443, Reach((rule,)))


@pytest.mark.parametrize("rule", ["", "*", "a*b", "http://x", "10.0.0.0/40", "user@host", "a/b"])
def test_rules_that_are_none(rule: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        Reach((rule,))
