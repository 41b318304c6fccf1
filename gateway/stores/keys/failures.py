"""How often an address may fail to authenticate: a rate per address in bounded memory. Successes never count."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict


class Failures:
    """`burst` failures at once, given back evenly over `per` seconds (GCRA: one number an address)."""

    def __init__(self, burst: int = 20, per: float = 60.0, addresses: int = 4096) -> None:
        self._interval = per / burst
        self._per = per
        self._addresses = addresses
        self._full_at: OrderedDict[str, float] = OrderedDict()  # when the address has its whole burst again

    def charge(self, address: str, now: float) -> float:
        """Counts a failure and returns 0, or counts nothing and returns the seconds until one is allowed again."""
        source = _source(address)
        debt = self._debt(source, now) + self._interval
        # the millionth: sums of floats must not cost the last of the burst
        if debt > self._per + 1e-6:
            return debt - self._per
        self._full_at[source] = now + debt
        self._full_at.move_to_end(source)
        if len(self._full_at) > self._addresses:
            self._full_at.popitem(last=False)
        return 0.0

    def refund(self, address: str, now: float) -> None:
        """Takes back a charge made before the outcome was known."""
        source = _source(address)
        if source in self._full_at:
            self._full_at[source] = now + max(0.0, self._debt(source, now) - self._interval)

    def __len__(self) -> int:
        return len(self._full_at)

    def _debt(self, source: str, now: float) -> float:
        # at most a whole burst, or a clock set back would lock an address out for as long
        return min(self._per, max(0.0, self._full_at.get(source, now) - now))


def _source(address: str) -> str:
    """Who counts as one: an IPv4 address, or an IPv6 /64, which is what one customer is given."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
