"""What a service manager does before it runs a service with sockets (sd_listen_fds(3)).

    python activate.py KIND:NAME:ADDRESS... -- COMMAND

Opens what the words say as the descriptors from 3 on, and becomes COMMAND. KIND is unix or tcp (it
listens at ADDRESS, a path or a port), or what no service manager would pass: stream (of TCP, does
not listen), datagram, file, nothing. NAME is what LISTEN_FDNAMES calls it.
"""

import os
import socket
import sys

FIRST = 3


def opened(kind: str, address: str) -> int | None:
    """A descriptor above those that are passed."""
    if kind == "nothing":
        return None
    if kind == "file":
        return os.open(address, os.O_RDWR | os.O_CREAT)
    if kind == "tcp":
        return socket.create_server(("127.0.0.1", int(address))).detach()
    if kind == "stream":
        return socket.socket(socket.AF_INET).detach()
    sock = socket.socket(
        socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
    )
    sock.bind(address)
    if kind == "unix":
        sock.listen()
    return sock.detach()


def main() -> None:
    """Open, pass, and become the command."""
    end = sys.argv.index("--")
    words = [word.split(":", 2) for word in sys.argv[1:end]]
    descriptors = [opened(kind, address) for kind, _, address in words]
    for index in range(len(words)):  # out of the way of each other
        if (descriptor := descriptors[index]) is not None:
            os.dup2(descriptor, 100 + index)
            os.close(descriptor)
    for index, descriptor in enumerate(descriptors):
        if descriptor is not None:
            os.dup2(100 + index, FIRST + index)
            os.close(100 + index)
    os.environ["LISTEN_PID"] = str(os.getpid())
    os.environ["LISTEN_FDS"] = str(len(words))
    os.environ["LISTEN_FDNAMES"] = ":".join(name for _, name, _ in words)
    os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])


if __name__ == "__main__":
    main()
