"""The owner of a model whose llama-server is our child, as others see it: leased, asked to load, to go, to change."""

from __future__ import annotations

from gateway.errors import CorralError, InsufficientMemory
from gateway.models.ends import Means, signature
from gateway.models.life import Living
from gateway.models.policy import Need
from gateway.models.registry import ModelSpec
from gateway.models.run import NotWanted
from gateway.state import ModelState

__all__ = ["LocalOwner", "Means"]


class LocalOwner(Living):
    @property
    def pid(self) -> int | None:
        return self._run.process.pid if self._run is not None and self._run.process.running else None

    def load(self) -> None:
        self._asked = True
        super().load()

    async def eject(self, force: bool) -> None:
        while not force and self.backend is None and self.leases and not self._off.is_set():
            self._stir.clear()  # it is being loaded for those who wait: they are served first
            await self._stir.wait()
        if self._off.is_set():
            self._wanted = bool(self.leases)
            if self.state is ModelState.CRASHED and not self._wanted:
                self._set(ModelState.OFF, error_message=None)
            return
        self._forced |= force
        self._go("it was ejected", "eject")
        self._wake.set()
        await self._off.wait()

    def reset(self) -> None:
        self._crashes = []
        self._not_before = 0.0
        if self.state in (ModelState.FAILED, ModelState.CRASHED):
            self._failed_as = None
            self._set(ModelState.OFF, error_message=None, detail=None)
            self._events.emit("model.reset", self.id, model=self.id)
        self._wanted = self.kept or bool(self.leases) or self.backend is not None
        self._wake.set()

    def change(self, spec: ModelSpec) -> None:
        super().change(spec)
        if self.state in (ModelState.FAILED, ModelState.CRASHED):
            self.reset()  # it failed with another configuration
        elif not self._off.is_set():
            self._stale = True
            if not self.leases:
                self._go_stale()
        else:
            self._wake.set()  # there may be something against it now

    def kill(self) -> None:
        self._closing = True  # its end is no crash
        if self._run is not None:
            self._run.process.kill()

    async def notice_death(self, generation: int) -> None:
        run = self._run
        if run is None or generation != self.generation:
            return
        if await run.process.ended_within(0.5) and generation == self.generation:
            self._not_ready()  # else it lives, and only the connection broke

    async def estimate(self) -> Need:
        """What it would book; nothing for one whose file is not here yet."""
        if self.spec.path is None or self.spec.problem:
            return {}
        return (await self._plan(self.spec.path, port=0)).sizes.need

    def lease_ended(self, generation: int) -> None:
        super().lease_ended(generation)
        if self._going is not None and not self.serving:
            self._wake.set()

    def _unused(self) -> None:
        self._stir.set()
        if self._stale and self._going is None and self.backend is not None:
            self._go_stale()
        if self.backend is None and self.detail is not None and not (self.kept or self._asked):
            self._wanted = False
            self._means.landlord.give_up(self, NotWanted())
        self._means.landlord.look()
        if self._going is not None:
            self._wake.set()

    def _too_late(self) -> CorralError:
        if self.detail is not None:
            return InsufficientMemory(f"{self.id} {self.detail}", retry_after=10)
        return super()._too_late()

    def _raise_if_hopeless(self) -> None:
        if self.state is ModelState.FAILED and self.spec.path and signature(self.spec.path) != self._failed_as:
            self.reset()  # the file is another one by now
            self.want()
        super()._raise_if_hopeless()
