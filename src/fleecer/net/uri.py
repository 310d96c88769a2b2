"""NBD URIs (doc/uri.md of the NBD project): how an export is named to any client."""

from __future__ import annotations

import os
import socket
from urllib.parse import quote

DEFAULT_PORT = 10809
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - recognised, not listened at


def unix_uri(socket_path: str, export: str) -> str:
    """The URI of an export served at a unix socket. The socket's path is made absolute."""
    path = quote(os.fsencode(os.path.abspath(socket_path)), safe="/")
    return f"nbd+unix:///{quote(export, safe='@')}?socket={path}"


def tcp_uri(host: str, port: int, export: str) -> str:
    """The URI of an export served at a TCP address. For every address of this machine it has the machine's name."""
    if host in _EVERY_ADDRESS:
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"nbd://{shown}:{port}/{quote(export, safe='@')}"
