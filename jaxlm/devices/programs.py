"""A bounded cache of the compiled functions of a model.

Each kernel of a compiled function uses memory mappings, and Linux limits a process to 65,530 of them. So each model
keeps its own compiled functions, which are freed together with it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MAX_PROGRAMS = 32  # functions of a model; a new one replaces the least recently used one


class Programs:
    """Maps (make, arguments) to the function that `make(*arguments)` returned, for the last used functions.

    Models that are derived from each other (`dataclasses.replace`) share one cache, so the arguments must include
    everything that a function depends on, such as the module. A function must not refer to the model, because then only
    the garbage collector could free both.

    Args:
      max_programs: number of functions that are kept.
    """

    def __init__(self, max_programs: int = MAX_PROGRAMS):
        self._max_programs = max_programs
        self._functions: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._functions)

    def get(self, make: Callable[..., Any], *arguments: Hashable) -> Any:
        """Returns `make(*arguments)`, which is called again only after its result was dropped from the cache."""
        key = make, arguments
        with self._lock:
            if key not in self._functions:
                self._functions[key] = make(*arguments)
            self._functions.move_to_end(key)
            while len(self._functions) > self._max_programs:
                self._functions.popitem(last=False)
            return self._functions[key]
