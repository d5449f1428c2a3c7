"""Events: how a lower room tells a higher one that something happened, without knowing it.

An event is a QMP event: a name in capitals (or `x-replnbd-...`) and a JSON object. Jobs, filters,
the server and the replication stages emit; the control socket, the log and library users listen.
Listeners run at once, in the emitter's turn of the loop: they must not block and must not raise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]

log = logging.getLogger(__name__)


class EventBus:
    """One per daemon. Emitting costs nothing but the listeners' own time."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(name, data)` for every event from now on; returns the unsubscriber."""
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    def emit(self, name: str, /, **data: Any) -> None:  # noqa: ANN401 - a JSON object's values
        """Tell every listener. `data` keys are QMP member names with `_` for `-`."""
        members = {key.replace("_", "-"): value for key, value in data.items()}
        for listener in tuple(self._listeners):
            try:
                listener(name, members)
            except Exception:
                # A listener's bug must not fail the write or the job that emitted the event.
                log.exception("event listener failed on %s", name)
