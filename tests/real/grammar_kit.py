"""Grammars, and requests that are to obey them."""

from __future__ import annotations

import re
from typing import Any

# With bounds, so that a model that knows nothing comes to an end.
JSON = r"""
root   ::= object
value  ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" (string ":" member ("," string ":" member){0,2})? "}"
member ::= string | number | array | "true" | "null"
array  ::= "[" (number ("," number){0,3})? "]"
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" ["\\/bfnrt]){0,9} "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,3}) ("." [0-9]{1,2})?
"""
ONLY = 'root ::= "<" [xyz]{3,5} ">"'
OBEYED = re.compile(r"<[xyz]{3,5}>")

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 200},
    "/v1/completions": {"prompt": "hi", "max_tokens": 200},
    "/completion": {"prompt": "hi", "n_predict": 200},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 200},
    "/v1/responses": {"input": "hi", "max_output_tokens": 200},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 200},
}
