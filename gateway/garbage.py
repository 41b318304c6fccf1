"""When Python looks for objects that refer to each other in circles: not while a request waits for it.

A pass over the objects of 1,000 streams holds the loop for 15 to 30 ms. Requests leave no circles behind, nor do
clients that leave (tests/test_garbage.py); those of rare failures are found while nothing runs.
"""

from __future__ import annotations

import gc

MOST_OBJECTS = 300_000  # more containers than what is there for 1,000 streams at once: a pass is due, whoever waits
WORTH_LOOKING = 2_000  # containers made since the last pass and not freed


def look_rarely() -> None:
    """Call it before the imports: they make nothing but what stays."""
    gc.set_threshold(MOST_OBJECTS)


def keep_what_stands() -> None:
    """What is there now stays, and is not looked through any more."""
    gc.freeze()


def look_if(quiet: bool) -> None:
    """Call it now and then, and say whether any request runs."""
    if quiet and gc.get_count()[0] > WORTH_LOOKING:
        gc.collect()
