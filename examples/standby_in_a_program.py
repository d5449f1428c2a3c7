"""Run a standby inside an asyncio program: replicate, checkpoint on a timer, fail over.

    python examples/standby_in_a_program.py DISK.raw [--seconds 5] [--interval 1]

A primary may write the disk meanwhile at nbd://127.0.0.1:PORT/disk, the port being printed; the
standby's view is nbd://127.0.0.1:PORT/view. In a real manager, the timer is whatever decides when
the standby's VM is consistent, and the failover follows a lost heartbeat.
"""

import argparse
import asyncio
from typing import Any

import replnbd


def tell(event: str, data: dict[str, Any]) -> None:
    """Print what the standby reports: stages, checkpoints, jobs, I/O errors."""
    print(f"event {event} {data}")


async def checkpoint_every(standby: replnbd.Standby, interval_s: float) -> None:
    """Move the view on, again and again."""
    while True:
        await asyncio.sleep(interval_s)
        await standby.checkpoint()


async def replicate(path: str, seconds: float, interval_s: float) -> None:
    """Replicate for a while, then take over."""
    disk = replnbd.DiskConfig(name="disk", mode="secondary", top_id="view", secondary=path)
    async with replnbd.Standby([disk], listen=["nbd://127.0.0.1:0"]) as standby:
        print(f"listening on {standby.uris[0]}")
        standby.events.subscribe(tell)
        await standby.start()

        timer = asyncio.create_task(checkpoint_every(standby, interval_s))
        # This program is the standby's user as well: it stamps its own view.
        view = standby.node("disk")
        await view.pwrite(0, b"the standby was here")
        await asyncio.sleep(seconds)
        timer.cancel()

        before = await replnbd.read_bytes(view, 0, 4096)
        await standby.failover()
        assert await replnbd.read_bytes(view, 0, 4096) == before
        print(f"stage {standby.status()['disks'][0]['stage']}: the view is the disk now")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("disk")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--interval", type=float, default=1.0)
    options = parser.parse_args()
    try:
        asyncio.run(replicate(options.disk, options.seconds, options.interval))
    except replnbd.ReplnbdError as exc:
        raise SystemExit(str(exc)) from None


if __name__ == "__main__":
    main()
