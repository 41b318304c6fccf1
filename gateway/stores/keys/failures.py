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

    def wait(self, address: str, now: float) -> float:
        """Seconds until a failure is allowed again; 0 if one is now."""
        over = self._debt(source(address), now) + self._interval - self._per
        return over if over > 1e-6 else 0.0  # the millionth: sums of floats must not cost the last of the burst

    def charge(self, address: str, now: float) -> float:
        """Counts a failure and returns 0, or counts nothing and returns the seconds until one is allowed again."""
        wait = self.wait(address, now)
        if wait:
            return wait
        who = source(address)
        self._full_at[who] = now + self._debt(who, now) + self._interval
        self._full_at.move_to_end(who)
        if len(self._full_at) > self._addresses:
            self._full_at.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)

    def _debt(self, who: str, now: float) -> float:
        # at most a whole burst, or a clock set back would lock an address out for as long
        return min(self._per, max(0.0, self._full_at.get(who, now) - now))


def source(address: str) -> str:
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
