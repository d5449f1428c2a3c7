"""control: the QMP server, through which programs drive replnbd, and the client that uses it.

QMP is QEMU's machine protocol (docs/interop/qmp-spec): JSON objects over a stream. The server
greets, the client negotiates with `qmp_capabilities`, then each command gets one `return` or one
`error`, and events come in between.

Words. A *message* is one JSON value on the wire. A *command* is a message {"execute": name,
"arguments": {...}, "id": any}; its *reply* echoes the id. An *event* tells all clients that
something happened. *Out-of-band* commands ("exec-oob") are for a client that negotiated "oob":
`yank` and `query-yank` take it. They overtake nothing here; a second connection does.
The *backend* is what the commands act on.

    lexer     bytes -> tokens        a table; no I/O
    wire      tokens -> messages     errors in QEMU's words; replies and events -> bytes; no I/O
    schema    arguments: names and types, errors in QEMU's words
    registry  name -> arguments and handler
    commands  all commands: replication, exports; with
              job_commands, node_commands
    backend   the Protocol that the daemon implements; control knows nothing else of replication
    session   one client: negotiation, commands in order, replies, events
    throttle  events that may come in floods, once a second
    server    the listening socket, all sessions, the event bus
    client    a blocking client for the command line and for tests

Laws.
1. The same bytes get the same answers as from QEMU, down to the text; tests/control asks both.
   What differs is written down: at `wire.NESTING_DEPTH_MAX`, `wire.MESSAGE_SIZE_MAX`,
   `wire.JsonParser`, `session.check_message`, `schema.check_arguments` and `commands.version`.
2. Commands of one client run one after the other; clients do not wait for each other.
3. No input ends the server, and nothing a client does or leaves undone takes memory beyond a
   bound: messages, nesting, clients and unread output are limited.
4. A command that has begun runs to its end, even if its client leaves. Only closing the server
   cuts it short, and only after the time allowed.
5. A handler's ReplnbdError or OSError is an answer; any other exception is our bug: logged with
   its traceback, answered "internal error", and the session lives on.
"""

from replnbd.control.backend import Backend
from replnbd.control.client import ControlClient
from replnbd.control.node_options import InetServer, MirrorOptions, NbdNodeOptions, UnixServer
from replnbd.control.server import ControlServer

__all__ = [
    "Backend",
    "ControlClient",
    "ControlServer",
    "InetServer",
    "MirrorOptions",
    "NbdNodeOptions",
    "UnixServer",
]
