"""The log filter: one line a request, failures too."""

from __future__ import annotations

import logging
import re

import pytest

from fleecer.block.edge import Edge
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.log import LogNode
from fleecer.errors import IoError
from fleecer.testing.memory import MemoryNode


async def test_every_request_is_one_line_with_its_range_and_outcome() -> None:
    lines: list[str] = []
    fault = FaultNode("fault0", Edge(MemoryNode("disk0", 8192), "node 'fault0'", "file", writable=True))
    node = LogNode("log0", Edge(fault, "node 'log0'", "file", writable=True), lines.append)
    await node.pread(4096, 512)
    await node.pwrite(1, b"abc")
    await node.zero(0, 4096)
    await node.discard(0, 4096)
    await node.flush()
    await node.block_status(0, 8192)
    fault.fail("read")
    with pytest.raises(IoError):
        await node.pread(0, 1)
    assert [re.sub(r"\d\.\d{6} s$", "T", line) for line in lines] == [
        "log0 read 4096+512 ok T",
        "log0 write 1+3 ok T",
        "log0 write zeroes 0+4096 ok T",
        "log0 discard 0+4096 ok T",
        "log0 flush ok T",
        "log0 block status 0+8192 ok T",
        "log0 read 0+1 read of 1 bytes at 0 on 'fault0': Input/output error T",
    ]


async def test_without_a_writer_lines_go_to_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    node = LogNode("log0", Edge(MemoryNode("disk0", 8192), "node 'log0'", "file", writable=True))
    with caplog.at_level(logging.DEBUG, logger="fleecer.block.nodes.log"):
        await node.flush()
    assert "log0 flush ok" in caplog.text
