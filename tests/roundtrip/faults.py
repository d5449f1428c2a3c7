"""What may happen to a pair, at any moment: to the network between them, and to either daemon."""

from __future__ import annotations

import time

from pair import Pair
from peers import Way
from peers.proxy import End

TRUNCATED_MAX = 400_000
SLOW = 12 << 20
"""Bytes a second, while something is to happen in the middle of a synchronisation."""


def none(pair: Pair) -> None:
    """Nothing."""


def drop(pair: Pair) -> None:
    """The connections end."""
    pair.network.drop()


def reset(pair: Pair) -> None:
    """The connections are reset."""
    pair.network.reset()


def truncate(pair: Pair) -> None:
    """After any byte, one way or the other."""
    way = pair.rng.choice(list(Way))
    most = TRUNCATED_MAX if way is Way.TO_SERVER else 2000
    pair.network.cut_after(pair.rng.randint(0, most), way, pair.rng.choice(list(End)))


def silence(pair: Pair) -> None:
    """For a while nothing comes through; for long enough, at times, that the link gives up."""
    ways = pair.rng.choice([(), (Way.TO_SERVER,), (Way.TO_CLIENT,)])
    pair.network.silence(*ways)
    time.sleep(pair.rng.choice([0.05, 0.3, 2.0]))
    pair.network.resume()


def delay(pair: Pair) -> None:
    """Every byte takes longer from now on, until the network is healed."""
    pair.network.delay(pair.rng.uniform(0.001, 0.05))


def refuse(pair: Pair) -> None:
    """Nobody is let in for a while."""
    pair.refuse(pair.target)
    time.sleep(pair.rng.uniform(0, 0.3))
    pair.heal(pair.target)


def kill_source(pair: Pair) -> None:
    """kill -9."""
    pair.kill_source()


def kill_target(pair: Pair) -> None:
    """kill -9."""
    pair.kill_target()


def kill_both(pair: Pair) -> None:
    """kill -9, both before either is started again."""
    pair.source.kill()
    pair.target.kill()
    pair.guests_ended()
    _start_both(pair)


def kill_starting(pair: Pair) -> None:
    """kill -9 of both, and once more while they start."""
    pair.source.kill()
    pair.target.kill()
    pair.guests_ended()
    for host in pair.source, pair.target:
        host.start_and_die(pair.rng.uniform(0.1, 0.6))
    _start_both(pair)


def _start_both(pair: Pair) -> None:
    first, second = pair.rng.sample([pair.source, pair.target], 2)
    for host in first, second:
        if host is pair.source:
            pair.start_source()
        else:
            host.start()
    pair.check_views()


def restart_source(pair: Pair) -> None:
    """In order."""
    pair.restart_source()


def restart_target(pair: Pair) -> None:
    """In order."""
    pair.restart_target()


NETWORK = (drop, reset, truncate, silence, delay, refuse)
DEATHS = (kill_source, kill_target, kill_both, kill_starting, restart_source, restart_target)
FAULTS = (*NETWORK, *DEATHS)


def amid_sync(pair: Pair, *faults_at: float) -> None:
    """While the target is brought up to date, when each of these parts of it is done, do a fault of
    the walk's choice. The network is slow meanwhile, and well afterwards."""
    for part in faults_at:
        pair.network.limit(SLOW)
        reach(pair, part)
        fault = pair.rng.choice(FAULTS)
        pair.note(f"  {fault.__name__} at {part:.2f}")
        fault(pair)
    pair.heal()


def reach(pair: Pair, part: float) -> None:
    """Until so much of what is BEHIND has been copied; a second at most."""
    deadline = time.monotonic() + 1
    most = 0
    while time.monotonic() < deadline:
        link = pair.links()[0]
        most = max(most, int(link.get("behind-bytes", 0)))
        if link["state"] == "syncing" and link["behind-bytes"] <= most * (1 - part):
            return
        if link["state"] == "live" and not link["behind-bytes"] and part > 0:
            return
        time.sleep(0.001)
