"""A request's fields, as `parse_json_object` gives them, made into objects again."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.pipeline.call import Fields


def decoded(fields: Fields) -> dict[str, Any]:
    told: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(fields))
    return told
