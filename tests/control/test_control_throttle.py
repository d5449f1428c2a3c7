"""Throttled events, on a clock that is moved by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replnbd.control.throttle import INTERVAL_S, Throttle


class ManualTimer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[ManualTimer] = []

    def call_later(
        self, delay: float, callback: Callable[[tuple[Any, ...]], None], kind: tuple[Any, ...]
    ) -> ManualTimer:
        timer = ManualTimer(self.now + delay, lambda: callback(kind))
        self.timers.append(timer)
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [t for t in self.timers if t.when <= end and not t.cancelled]:
            timer = min(due, key=lambda t: t.when)
            self.timers.remove(timer)
            self.now = timer.when
            timer.callback()
        self.now = end


class Recorder:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.sent: list[tuple[float, Any]] = []
        self.throttle = Throttle(self._send, self.clock.call_later)

    def _send(self, message: dict[str, Any]) -> None:
        self.sent.append((self.clock.now, message["data"]["n"]))

    def error(self, n: int, device: str = "d", operation: str = "write") -> None:
        data = {"device": device, "operation": operation, "n": n}
        self.throttle.pass_on({"event": "BLOCK_IO_ERROR", "data": data})


def test_first_goes_out_at_once_and_the_last_at_the_end_of_each_interval() -> None:
    recorder = Recorder()
    for n in range(20):
        recorder.error(n)
        recorder.clock.advance(INTERVAL_S / 8)
    assert recorder.sent == [(0, 0), (1, 7), (2, 15)]
    recorder.clock.advance(10)
    assert recorder.sent == [(0, 0), (1, 7), (2, 15), (3, 19)]
    assert recorder.clock.timers == []


def test_after_a_quiet_interval_the_next_goes_out_at_once() -> None:
    recorder = Recorder()
    recorder.error(1)
    recorder.clock.advance(INTERVAL_S * 1.5)
    recorder.error(2)
    assert recorder.sent == [(0, 1), (1.5, 2)]


def test_devices_and_operations_do_not_hold_each_other_back() -> None:
    recorder = Recorder()
    recorder.error(1)
    recorder.error(2, device="e")
    recorder.error(3, operation="read")
    assert recorder.sent == [(0, 1), (0, 2), (0, 3)]


def test_other_events_are_never_held_back() -> None:
    recorder = Recorder()
    for n in range(3):
        recorder.throttle.pass_on({"event": "JOB_STATUS_CHANGE", "data": {"n": n}})
    assert recorder.sent == [(0, 0), (0, 1), (0, 2)]


def test_close_sends_what_is_held_and_stops_the_clock() -> None:
    recorder = Recorder()
    recorder.error(1)
    recorder.error(2)
    recorder.throttle.close()
    assert recorder.sent == [(0, 1), (0, 2)]
    recorder.clock.advance(10)
    assert recorder.sent == [(0, 1), (0, 2)]


def report(recorder: Recorder, n: int, node: str, kind: str) -> None:
    data = {"type": kind, "error": "gone", "node-name": node, "sector-num": 0, "n": n}
    recorder.throttle.pass_on({"event": "QUORUM_REPORT_BAD", "data": data})


def test_a_bad_child_is_reported_once_a_second_for_each_of_its_operations() -> None:
    recorder = Recorder()
    for n in range(0, 40, 4):
        report(recorder, n, "nbd0", "write")
        report(recorder, n + 1, "nbd0", "read")
        report(recorder, n + 2, "nbd1", "write")
        report(recorder, n + 3, "nbd0", "flush")
        recorder.clock.advance(INTERVAL_S / 20)
    assert recorder.sent == [(0, 0), (0, 1), (0, 2), (0, 3)]
    recorder.clock.advance(10)
    assert recorder.sent[4:] == [(1, 36), (1, 37), (1, 38), (1, 39)]
