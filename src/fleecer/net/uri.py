"""NBD URIs (doc/uri.md of the NBD project): how an export is named to any client."""

from __future__ import annotations

import os
from urllib.parse import quote

DEFAULT_PORT = 10809


def unix_uri(socket_path: str, export: str) -> str:
    """The URI of an export served at a unix socket. The socket's path is made absolute."""
    return f"nbd+unix:///{quote(export, safe='@')}?socket={quote(os.path.abspath(socket_path), safe='/')}"


def tcp_uri(host: str, port: int, export: str) -> str:
    """The URI of an export served at a TCP address."""
    shown = f"[{host}]" if ":" in host else host
    return f"nbd://{shown}:{port}/{quote(export, safe='@')}"
