"""Exports: nodes offered over NBD. A request becomes a call on an edge, its outcome a reply."""

from fleecer.export.export import Export
from fleecer.export.server import Server

__all__ = ["Export", "Server"]
