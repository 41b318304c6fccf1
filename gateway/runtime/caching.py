"""The response cache as a part of the house: made from the settings, opened with it and closed with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.environment import instance_name
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway.pipeline.cache.meaning import HerdEmbedder, Meaning
    from gateway.runtime import Runtime
    from gateway.stores.cache.answers import Answers
    from gateway.stores.records.db import Place


@contextlib.asynccontextmanager
async def caching(runtime: Runtime) -> AsyncIterator[None]:
    """The runtime's spine has a cache for as long as the block runs, if the settings ask for one.

    Raises ConfigError.
    """
    settings = runtime.settings
    if not settings.cache_enabled:
        yield
        return
    from gateway.pipeline.cache.seats import ResponseCache  # only who caches pays for it

    async with contextlib.AsyncExitStack() as stack:
        answers = _answers(runtime)
        stack.push_async_callback(answers.close)
        cache = ResponseCache(
            answers, settings, lambda: runtime.manager.owners, runtime.queues, runtime.budget, runtime.metrics
        )
        stack.callback(cache.close)
        if settings.redis_url:
            from gateway.models.fingerprint import Contents

            cache.stamp = contents = Contents()
            stack.callback(contents.close)
        if settings.cache_embedding_model:
            cache.meaning = meaning = _meaning(runtime, settings.cache_embedding_model, stack)
            stack.push_async_callback(meaning.close)
        runtime.spine.cache = cache
        try:
            yield
        finally:
            runtime.spine.cache = None


def _answers(runtime: Runtime) -> Answers:
    settings = runtime.settings
    if settings.redis_url:
        from gateway.stores.cache.shared import RedisAnswers

        return RedisAnswers.at(settings.redis_url, settings.cache_ttl_seconds)
    from gateway.stores.cache.answers import FileAnswers

    return FileAnswers(_place(runtime, "cache"), settings.cache_ttl_seconds)


def _meaning(runtime: Runtime, name: str, stack: contextlib.AsyncExitStack) -> Meaning:
    from gateway.backend import Backend
    from gateway.pipeline.cache.meaning import Embed, HerdEmbedder, Meaning, RemoteEmbedder
    from gateway.stores.cache.vectors import DEFAULT_SIMILARITY, Meanings

    settings, registry = runtime.settings, runtime.manager.registry
    embed: Embed
    if name.startswith(("http://", "https://")):
        shown = name.partition("://")[2].rpartition("@")[2]
        embed = RemoteEmbedder(Backend(name, connect_timeout=settings.backend_connect_timeout))
    else:
        spec = next((spec for spec in registry.specs.values() if name == spec.id or name in spec.aliases), None)
        if spec is None or (registry.single and len(registry.specs) == 1):
            raise ConfigError(
                [f"CACHE_EMBEDDING_MODEL={name!r}: must be a model of the models file or of MODELS_DIR, or a URL"]
            )
        shown, embed = spec.id, HerdEmbedder(runtime.manager, runtime.queues, spec.id)
        stack.enter_context(_loading(embed))
    index = Meanings(_place(runtime, "meanings"), settings.cache_ttl_seconds)
    similarity = DEFAULT_SIMILARITY if settings.cache_similarity is None else settings.cache_similarity
    return Meaning(shown, embed, index, similarity)


@contextlib.contextmanager
def _loading(embed: HerdEmbedder) -> Iterator[None]:
    """The embedding model is asked for at the start, so that the first prompts find it."""
    task = asyncio.create_task(embed.load(), name="load the embedding model")
    try:
        yield
    finally:
        task.cancel()


def _place(runtime: Runtime, what: str) -> Place:
    """Beside the records, under a name of its own."""
    from gateway.stores.records.db import Place

    audit = runtime.settings.audit_db
    local = Path(tempfile.gettempdir()) / f"corral-{os.getuid()}"
    return Place(audit.with_name(f"{audit.stem}-{what}{audit.suffix}"), local, instance_name())
