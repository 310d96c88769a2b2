"""raw: the format that is none (QEMU's driver of that name): the child's bytes, under a name of their own."""

from __future__ import annotations

from fleecer.block.nodes.filter import FilterNode


class RawNode(FilterNode):
    """Hands everything on."""

    driver = "raw"

    __slots__ = ()
