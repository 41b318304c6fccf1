"""Where media may be fetched from: http and https at public addresses. Pure: nothing is resolved here.

Everything has one spelling only. What another program might read as another host is refused, not mended.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin

MAX_URL = 4096

_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORTS = {"http": 80, "https": 443}
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))

# Names that stand for something near, whatever they resolve to (RFC 6761, RFC 6762, RFC 8375, and custom).
_NEAR = ("localhost", "local", "localdomain", "internal", "intranet", "private", "lan", "home", "corp", "arpa", "onion")

_CLOSED_V4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",
    "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's platform, behind a public address
    "169.254.0.0/16",  # link-local; metadata of most clouds
    "172.16.0.0/12",
    "192.0.0.0/24",  # protocol assignments; Oracle's metadata
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
)
_OPEN_V6 = "2000::/3"  # all that was ever given out; loopback, unique local, link-local, multicast lie outside
_CLOSED_V6 = (
    "2001::/23",  # protocol assignments: Teredo, which holds an IPv4 address, benchmarks, ORCHID
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4, holds an IPv4 address
    "3fff::/20",  # documentation
)
_NAT64 = "64:ff9b::/96"  # how a network without IPv4 reaches all of it


class Refused(ValueError):
    """This URL is not fetched; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be fetched if its host turns out to be public. `url` is ASCII, without a fragment."""

    url: str
    host: str  # lower case, IPv6 without brackets
    port: int
    is_address: bool  # nothing to resolve


def parse_target(url: str) -> Target:
    """Raises Refused."""
    if len(url) > MAX_URL:
        raise Refused(f"its URL is longer than {MAX_URL} characters")
    if not url.isprintable() or " " in url or "\\" in url:
        raise Refused("its URL holds spaces, backslashes or control characters")
    match = _URL.fullmatch(url)
    if match is None:
        raise Refused("its URL does not begin with http:// or https://")
    scheme, authority, rest = match[1].lower(), match[2], match[3]
    if "@" in authority:
        raise Refused("its URL holds a user or a password")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise Refused("its URL does not name a host in plain letters (write international names as xn--…)")
    port = int(parts[3]) if parts[3] else _PORTS[scheme]
    if port not in _PORTS.values() and not 1024 <= port <= 65535:
        raise Refused(f"its port is {port}: only 80, 443 and those from 1024 to 65535 are used")
    host = (parts[1] or parts[2]).lower()
    is_address = _is_ipv6(host) if parts[1] else _is_ipv4(host)
    shown = f"[{host}]" if parts[1] else host
    path = quote(rest if rest.startswith("/") else f"/{rest}", safe=_PRINTABLE)
    at = "" if port == _PORTS[scheme] else f":{port}"
    return Target(f"{scheme}://{shown}{at}{path}", host, port, is_address)


def redirected(target: Target, location: str) -> Target:
    """Where a redirect leads. Raises Refused."""
    try:
        return parse_target(urljoin(target.url, location))
    except Refused:
        raise
    except ValueError:  # urljoin's own
        raise Refused(f"{target.host} redirects to a URL that cannot be read") from None


def is_public(address: str) -> bool:
    """Whether an address, as a resolver or a URL gives it, lies in the open Internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    closed_v4, open_v6, closed_v6, nat64 = _networks()
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in closed_v4)
    if parsed.scope_id is not None:
        return False
    if parsed in nat64:
        return is_public(str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)))
    return parsed in open_v6 and not any(parsed in network for network in closed_v6)


@functools.cache
def _networks() -> tuple[
    tuple[ipaddress.IPv4Network, ...],
    ipaddress.IPv6Network,
    tuple[ipaddress.IPv6Network, ...],
    ipaddress.IPv6Network,
]:
    return (
        tuple(map(ipaddress.IPv4Network, _CLOSED_V4)),
        ipaddress.IPv6Network(_OPEN_V6),
        tuple(map(ipaddress.IPv6Network, _CLOSED_V6)),
        ipaddress.IPv6Network(_NAT64),
    )


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        raise Refused(f"{host[:64]} is not an IPv6 address") from None
    return True


def _is_ipv4(host: str) -> bool:
    """Whether it is an address; else it is a full name. Raises Refused for what is neither, such as 0x7f.1."""
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):  # no name ends so; getaddrinfo takes some of these for addresses
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise Refused(f"{host[:64]} is not an IPv4 address of four decimal numbers") from None
        return True
    if len(labels) < 2 or len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise Refused(f"{host[:64]} is not a full host name")
    if labels[-1] in _NEAR:
        raise Refused(f"{host[:64]} has no public address")
    return False
