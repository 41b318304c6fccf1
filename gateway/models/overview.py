"""What is shown of the herd's memory: what there is, who has how much of it, and what one more load would mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.models.local import LocalOwner
from gateway.models.memory.landlord import MIB, Landlord, mib, named
from gateway.models.owner import Owner
from gateway.models.policy import Need
from gateway.state import Board, ModelState


@dataclass(frozen=True)
class Plan:
    """What loading a model would do. Sizes are MiB."""

    model: str
    fits: bool
    already_loaded: bool
    need_mb: int
    evict: tuple[str, ...]
    blocked_by: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class DeviceRow:
    """MiB."""

    name: str
    total_mb: int
    used_mb: int
    free_mb: int
    budget_mb: int
    booked_mb: int


@dataclass(frozen=True)
class ModelRow:
    """MiB on the devices that count, booked: what was measured, or what is foretold."""

    id: str
    state: ModelState
    predicted_mb: int | None
    measured_mb: int | None
    leases: int
    pinned: bool
    last_used_unix: float | None
    detail: str | None


@dataclass(frozen=True)
class MemoryView:
    """MiB. The budget is that of all models together."""

    devices: tuple[DeviceRow, ...]
    budget_mb: int
    margin_mb: int
    used_est_mb: int
    models: tuple[ModelRow, ...]
    can_load_more: bool


def hopeless(owner: LocalOwner, problem: str) -> Plan:
    """It would fail before it took anybody's room."""
    return Plan(owner.id, False, False, 0, (), (), problem)


def foretell(
    owner: LocalOwner, need: Need, landlord: Landlord, visible: Callable[[str], bool] = lambda _: True
) -> Plan:
    """What loading it now would do; `need` is what it has booked, or would book. Others are named if `visible`."""
    booked, room = owner.id in landlord.needs, landlord.ask(owner, need)
    evict, busy = room.evict, room.busy
    if booked:
        reason = f"it is {owner.state}"
    elif room.fits:
        reason = "there is room"
    elif room.never:
        reason = landlord.refusal(owner, need, room, visible).message
    elif room.evict:
        reason = f"{named(room.evict, visible)} would go: least recently used, and idle"
    elif room.look_again_at is not None:
        evict, busy = room.busy, ()
        reason = f"{named(evict, visible)} would go, in a moment: idle, and loaded only now"
    else:
        reason = f"it would wait until {named(room.busy, visible)} {'is' if len(room.busy) == 1 else 'are'} idle"
    return Plan(
        model=owner.id,
        fits=booked or not room.never,
        already_loaded=owner.backend is not None,
        need_mb=mib(need, landlord.budget),
        evict=tuple(filter(visible, evict)) if not booked else (),
        blocked_by=tuple(filter(visible, busy)) if not booked else (),
        reason=reason,
    )


def memory_view(owners: Mapping[str, Owner], board: Board, landlord: Landlord, margin_mb: int) -> MemoryView:
    """As it was found last, and what is booked now."""
    memory, needs, budget = landlord.memory, landlord.needs, landlord.budget
    devices = tuple(
        DeviceRow(
            device.name,
            device.total // MIB,
            (device.total - device.free) // MIB,
            device.free // MIB,
            budget.limits.get(device.name, device.total) // MIB,
            sum(need.get(device.name, 0) for need in needs.values()) // MIB,
        )
        for device in memory.devices
    )
    most = budget.max_models
    return MemoryView(
        devices,
        (budget.in_all or 0) // MIB,
        margin_mb,
        -(-landlord.used_bytes // MIB),
        tuple(_row(owner, board, landlord) for owner in owners.values()),
        can_load_more=(most is None or len(needs) < most) and landlord.used_bytes < (budget.in_all or 0),
    )


def _row(owner: Owner, board: Board, landlord: Landlord) -> ModelRow:
    status, budget = board.models[owner.id], landlord.budget
    need = landlord.needs.get(owner.id)
    measured = owner.measured if isinstance(owner, LocalOwner) else None
    return ModelRow(
        owner.id,
        status.state,
        mib(need, budget) if need is not None else None,
        mib(measured, budget) if measured is not None and need is not None else None,
        owner.leases,
        owner.spec.pinned,
        status.last_used_at,
        status.detail,
    )
