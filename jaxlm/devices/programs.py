"""The compiled functions of one model, with a bound.

Each kernel of a compiled function takes memory mappings, of which Linux lets a process have 65,530.  So compiled
functions are kept by the model that they serve, and are freed together with it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MOST = 32  # functions that a model keeps; the one that was used least recently is dropped for a new one


class Programs:
    """Maps (make, arguments) to the function that `make(*arguments)` returned, for the `most` last used ones.

    Models that are derived from each other (`dataclasses.replace`) share one, so the arguments have to name all that a
    function depends on, the module above all.  A function must not refer to the model: both could then be freed by the
    garbage collector alone.
    """

    def __init__(self, most: int = MOST):
        self._most = most
        self._made: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._made)

    def get(self, make: Callable[..., Any], *arguments: Hashable) -> Any:
        """Returns `make(*arguments)`, which is called once for equal arguments as long as its result is kept."""
        key = make, arguments
        with self._lock:
            if key not in self._made:
                self._made[key] = make(*arguments)
            self._made.move_to_end(key)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
            return self._made[key]
