"""The NATS door: jobs of a JetStream work queue go through the spine, as many at once as there are places.

Many workers share one queue. Each takes a job only when it can begin it; a job whose worker says nothing for ACK_WAIT
is delivered to another. `link` has the connection, `layout` what is made in JetStream, `pull` how jobs are asked for,
`work` what becomes of one; `workers.jobs` decides how often it is tried.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterator

from nats.aio.msg import Msg

from gateway.environment import instance_name
from gateway.models.subjects import collisions, subject_name
from gateway.runtime import Runtime
from gateway.state import ModelState, ServiceState
from gateway.stores.keys.file import Key
from gateway.workers.nats.cancel import Cancels
from gateway.workers.nats.health import Health, Served
from gateway.workers.nats.job import Delivery, InHand
from gateway.workers.nats.layout import CANCEL_SUBJECT, REQUEST_SUBJECT, ensure_consumer, last_sequence, lay_out
from gateway.workers.nats.link import Away, Link, servers_of
from gateway.workers.nats.pull import LOOK_SECONDS, Puller, Room
from gateway.workers.nats.replies import Replies
from gateway.workers.nats.store import Store
from gateway.workers.nats.work import Means, Work

log = logging.getLogger("corral.nats")

KEY_ID = "nats"
END_SECONDS = 5.0  # to say the last word on jobs, when the service ends
POLITE_SECONDS = 1.0  # between looks for jobs that lie waiting while all places are taken
FAILED_SECONDS = 5.0  # between jobs for a model that has failed here, and may do elsewhere


@contextlib.asynccontextmanager
async def taking_jobs(runtime: Runtime) -> AsyncIterator[Worker]:
    """Take jobs for as long as the block runs; those that still run at its end are given back. Raises ConfigError."""
    settings = runtime.settings
    assert settings.nats_url is not None
    worker = Worker(runtime, servers_of(settings.nats_url))
    with worker.listening():
        async with worker.link.kept():
            tasks = [
                asyncio.create_task(worker.tell_progress(), name="NATS progress"),
                asyncio.create_task(worker.health.tell(), name="NATS health"),
            ]
            try:
                yield worker
            finally:
                await worker.end()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


class Worker:
    def __init__(self, runtime: Runtime, servers: list[str]) -> None:
        self._runtime = runtime
        self.name = f"{instance_name()}-{os.getpid()}"
        self.link = Link(
            servers, runtime.settings.nats_creds_file, f"corral {self.name}", self._ready, runtime.metrics.nats_up.set
        )
        self._store: Store | None = None
        self._cancels = Cancels(self.link)
        self._replies = Replies(self._the_store)
        self._models: dict[str, _Model] = {}  # by the name in subjects
        self._registry: object = None
        self._hands: set[InHand] = set()  # of models that are not configured any more, too
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: set[str] = set()
        self._ending = False
        self._key_missed = False
        self.health = Health(runtime, self.link, self.name, self._served)
        self._means = Means(
            runtime=runtime,
            link=self.link,
            store=self._the_store,
            key=self._key,
            worker=self.name,
            lay_out=self._lay_out,
            reply_of=self._replies.of,
            unwanted=self._cancels.unwanted,
            ending=lambda: self._ending or self._draining,
            count=lambda result: runtime.metrics.nats_jobs.labels(result).inc(),
            slow_down=self._slow_down,
        )

    # --- its life

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of the service's state, and of models that come and go."""
        stop_listening = self._runtime.board.listen(self._board_changed)
        self._runtime.ticks.append(self._tick)
        self._tick(0.0)
        try:
            yield
        finally:
            stop_listening()
            self._runtime.ticks.remove(self._tick)

    async def end(self) -> None:
        """Cut what still runs, and say the last word on everything in hand."""
        self._ending = True
        self._take_no_more()
        for hand in self._hands:
            hand.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=END_SECONDS if self.link.up.is_set() else 0.1)
        for task in self._tasks:
            task.cancel()
        await self.link.flush()

    async def _ready(self) -> None:
        """There is a new connection."""
        await self._lay_out()
        await self.link.subscribe(f"{CANCEL_SUBJECT}>", self._cancel)
        await self.link.subscribe(f"{REQUEST_SUBJECT}*", self._replies.heard)
        await self._cancels.learn()
        for model in self._models.values():
            model.puller.renew()
        self.health.look()

    async def consumer(self, name: str) -> float:
        """See to it that it is there; gives its ack wait in seconds. Raises Away."""
        await self._lay_out()
        return await ensure_consumer(self.link.js, name, self._warn)

    async def _lay_out(self) -> None:
        self._store = Store(await lay_out(self.link.js, self._warn))
        self._replies.stream_is_at(await last_sequence(self.link.js))

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            log.warning("NATS: %s", problem)

    def _the_store(self) -> Store:
        if self._store is None:
            raise Away("NATS was not reached yet")
        return self._store

    @property
    def _draining(self) -> bool:
        return self._runtime.board.status in (ServiceState.DRAINING, ServiceState.STOPPED)

    # --- models

    def _tick(self, _: float) -> None:
        registry = self._runtime.manager.registry
        if registry is self._registry or self._ending:
            return
        self._registry = registry
        for problem in collisions(registry.specs):
            log.error("NATS: %s; only the first one gets jobs", problem)
        names: dict[str, str] = {}
        for model_id in registry.specs:
            names.setdefault(subject_name(model_id), model_id)
        for name in self._models.keys() - names.keys():
            self._stop(self._models.pop(name))
        for name, model_id in names.items():
            model = self._models.get(name)
            if model is None or model.id != model_id:
                if model is not None:
                    self._stop(model)
                self._models[name] = model = _Model(self, model_id, name)
                model.task = asyncio.create_task(model.puller.run(), name=f"jobs of {name}")

    def _board_changed(self, model_id: str | None) -> None:
        if model_id is None and self._draining:
            self._take_no_more()
        self.health.look()

    def _take_no_more(self) -> None:
        """What NATS has sent already still comes, and is given back at once."""
        for model in self._models.values():
            self._stop(model)

    def _stop(self, model: _Model) -> None:
        if model.task is not None:
            model.task.cancel()
            self.spawn(model.puller.leave(), f"no more jobs of {model.name}")

    # --- jobs

    async def _cancel(self, message: Msg) -> None:
        req_id = message.subject.removeprefix(CANCEL_SUBJECT)
        self._cancels.add(req_id, time.time())
        for hand in self._hands:
            if hand.req_id == req_id and not hand.cancelled:
                hand.cancelled = True
                hand.stop()

    def take(self, model: _Model, message: Msg) -> None:
        """A job was delivered."""
        delivery = Delivery.of(message)
        hand = InHand(delivery, model.id, delivery.fallback_id, model.puller.ack_wait)
        queue = self._runtime.queues.get(model.id)
        # HTTP may have taken the places since this job was asked for
        full = queue is not None and queue.active >= queue.capacity
        hand.crowded = full and any(not other.placed for other in model.in_hand)
        model.in_hand.add(hand)
        self._hands.add(hand)
        self.spawn(self._work(model, hand), f"delivery {delivery.fallback_id}")

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, model: _Model, hand: InHand) -> None:
        try:
            await Work(self._means, hand, model.name).do()
        except Away as error:
            log.warning("%s will be delivered again: %s", hand.req_id, error)
        except Exception:
            log.exception("a job broke off; it will be delivered again", extra={"request_id": hand.req_id})
        finally:
            model.in_hand.discard(hand)
            self._hands.discard(hand)
            model.puller.look()

    def room(self, model: _Model) -> Room:
        """How many jobs of a model can be begun now. See Room."""
        queue = self._runtime.queues.get(model.id)
        now = time.monotonic()
        if queue is None or queue.closed or self._ending or now < model.waits_until or self._key() is None:
            return Room(0)
        if self._runtime.board.models[model.id].state is ModelState.FAILED:
            model.wait(FAILED_SECONDS)
            return Room(0 if model.in_hand else 1, patient=False)
        waiting = sum(not hand.placed for hand in model.in_hand)
        free = queue.capacity - queue.active - max(queue.waiting, waiting)
        if free > 0:
            return Room(free)
        if waiting or now < model.polite_until:
            return Room(0)
        model.polite_until = now + POLITE_SECONDS  # one job may wait here, so that HTTP alone does not get all places
        return Room(1, patient=False)

    def _slow_down(self, model_id: str, seconds: float) -> None:
        model = self._models.get(subject_name(model_id))
        if model is not None:
            model.wait(seconds)

    def _key(self) -> Key | None:
        key_id = self._runtime.settings.nats_key_id
        if key_id is None:
            return Key(KEY_ID)
        key = self._runtime.keys.by_id(key_id)
        usable = key is not None and key.has("infer")
        if not usable and not self._key_missed:
            log.error("NATS_KEY_ID=%s: there is no such key with the scope infer; no jobs are taken", key_id)
        self._key_missed = not usable
        return key if usable else None

    # --- what is told

    def _served(self) -> list[Served]:
        return [Served(model.id, name, len(model.in_hand)) for name, model in self._models.items()]

    async def tell_progress(self) -> None:
        """JetStream gives a job to another worker when it hears nothing of it."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for hand in list(self._hands):
                if now >= hand.progress_due:
                    hand.progress_due = now + hand.ack_wait / 3
                    with contextlib.suppress(Away):
                        await self.link.publish(hand.delivery.ack, b"+WPI")


class _Model:
    """What the worker has of one model."""

    def __init__(self, worker: Worker, model_id: str, name: str) -> None:
        self.id, self.name = model_id, name
        self.in_hand: set[InHand] = set()
        self.waits_until = self.polite_until = 0.0  # on the monotonic clock
        self.task: asyncio.Task[None] | None = None
        self.puller = Puller(
            worker.link,
            name,
            lambda: worker.room(self),
            lambda message: worker.take(self, message),
            worker.consumer,
        )

    def wait(self, seconds: float) -> None:
        self.waits_until = max(self.waits_until, time.monotonic() + seconds)
