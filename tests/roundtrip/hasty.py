"""Runs a replnbd whose link is in a hurry: python hasty.py BYTES COMMAND... (replnbd's words).

It finds its standby again, proves and asks within fractions of a second, where a replnbd that has
a network to spare takes seconds: what a walk of a minute meets would else take an hour. So many
BYTES may be on their way to it.
"""

from __future__ import annotations

import sys

from replnbd.cli import main
from replnbd.replication import forwarder, link, session, target

HASTE = {
    "BACK_OFF_S": (0.02, 0.2),
    "REFUSED_S": 0.2,
    "FAILED_COPY_S": 0.1,
    "PROVE_S": 0.15,
    "HEARTBEAT_S": 0.3,
    "FAREWELL_S": 0.5,
}

if __name__ == "__main__":
    for name, value in HASTE.items():
        (module,) = [each for each in (link, session) if name in vars(each)]
        vars(module)[name] = value
    target.CONNECT_TIMEOUT_S = target.RESPONSE_TIMEOUT_S = 1.2
    forwarder.QUEUE_BYTES_MAX = int(sys.argv[1])
    sys.argv = ["replnbd", *sys.argv[2:]]
    main()
