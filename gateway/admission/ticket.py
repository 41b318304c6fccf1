"""What a queue knows of those who come, and the bytes that they may hold."""

from __future__ import annotations

import msgspec

from gateway.errors import QueueFull


class Ticket(msgspec.Struct, eq=False, gc=False):
    """What the queue wants to know of a request. `deadline` is on the loop's clock, in seconds."""

    key_id: str
    places: int  # `n` answers need n slots
    size: int  # bytes that are held while it waits
    deadline: float
    priority: str = "normal"  # high, normal, low
    weight: float = 1.0  # of its key, above 0: one with 2.0 gets twice the share
    cost: float = 1.0  # expected tokens: the prompt and the bound of each answer


class ByteBudget:
    """Bounds the bodies held by all requests that wait, at all models, and by those that are being read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, size: int) -> None:
        """Raises QueueFull."""
        if self.held + size > self.limit:
            raise QueueFull(
                f"requests hold {self.held} bytes already; MAX_QUEUED_BYTES allows {self.limit}", retry_after=5
            )
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size
