"""What TLS costs: a disk read and written in order over TCP, in clear text and encrypted.

nbdcopy (libnbd, GnuTLS) is the client, so both ends encrypt on this machine; nbdkit is the peer.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from statistics import median

from bench_cells import tell
from bench_events import Rows, Settings
from bench_load import MIB
from bench_servers import Nbdkit, Replnbd, Server

CONNECTIONS = (1, 4)


class WithTls(Server):
    """A server on TCP whose clients must use TLS; its certificate is made on the spot."""

    def make_files(self) -> None:
        import trustme  # for nobody who measures something else

        super().make_files()
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(str(self.directory / "ca-cert.pem"))
        issued.private_key_pem.write_to_path(str(self.directory / "server-key.pem"))
        with open(self.directory / "server-cert.pem", "wb") as chain:
            chain.writelines(blob.bytes() for blob in issued.cert_chain_pems)

    def uri(self, export: str) -> str:
        certificates = f"tls-certificates={self.directory}"
        return f"nbds://localhost:{self.port}/{export}?{certificates}"


class ReplnbdTls(WithTls, Replnbd):
    """replnbd with a listener that demands TLS."""

    name = "replnbd-tls"

    def command(self) -> list[str]:
        command = super().command()
        config = Path(command[-1])
        text = config.read_text().replace(f'"{self.uri("")}"', f'"nbds://127.0.0.1:{self.port}"')
        config.write_text(
            f'{text}\n[tls]\ncertificate = "server-cert.pem"\nkey = "server-key.pem"\n'
        )
        return command


class NbdkitTls(WithTls, Nbdkit):
    """nbdkit, the same."""

    name = "nbdkit-tls"

    def command(self) -> list[str]:
        command = super().command()
        at = command.index("file")
        return [
            *command[:at], "--tls=require", f"--tls-certificates={self.directory}", *command[at:]
        ]  # fmt: skip


KINDS: tuple[type[Server], ...] = (Replnbd, ReplnbdTls, Nbdkit, NbdkitTls)


def tls(settings: Settings) -> Rows:
    """MiB/s of a plain export, and the server's processor time for each MiB."""
    kinds = [kind for kind in KINDS if kind.name.removesuffix("-tls") in settings.servers]
    source = settings.directory / "source.raw"
    source.write_bytes(os.urandom(settings.size))
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    servers = [kind(settings.directory / kind.name, settings.size, tcp=True) for kind in kinds]
    try:
        for turn in range(settings.repeat):
            for connections in CONNECTIONS:
                for server in servers[:: 1 if turn % 2 == 0 else -1]:
                    disk = server.uri("disk")
                    for verb, ends in (("write", (str(source), disk)), ("read", (disk, "null:"))):
                        what = f"{verb}, {connections} connection{'s' * (connections > 1)}"
                        tell(f"{turn + 1}/{settings.repeat} {what} {server.name}")
                        figures = copy(server, ends, connections, settings.size)
                        found.setdefault(what, {}).setdefault(server.name, []).append(figures)
    finally:
        for server in servers:
            server.close()
    rows = []
    for what, each in found.items():
        row: dict[str, object] = {"what": what}
        row |= {name: median(rate for rate, _ in runs) for name, runs in each.items()}
        row |= {f"{name}: CPU µs": median(cpu for _, cpu in runs) for name, runs in each.items()}
        rows.append(row)
    return rows


def copy(server: Server, ends: tuple[str, str], connections: int, size: int) -> tuple[float, float]:
    """One nbdcopy of the whole disk: MiB/s, and the server's µs for each MiB."""
    command = ["nbdcopy", f"--connections={connections}", "--no-extents", *ends]
    used, begin = server.cpu_s(), time.perf_counter()
    subprocess.run(command, check=True)
    took = time.perf_counter() - begin
    return size / MIB / took, (server.cpu_s() - used) * 1e6 * MIB / size
