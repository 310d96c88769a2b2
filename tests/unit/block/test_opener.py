"""Opening nodes: what is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.open_files import open_files
from tests.serving_world import Serving

from fleecer.block.edge import Edge
from fleecer.block.graph import Graph
from fleecer.block.node import HOLE, ZERO
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.block.opener import CHAIN_MAX, Opener
from fleecer.block.options import parse_options
from fleecer.errors import FleecerError, InUse, IoError, PermissionConflict, UsageError
from fleecer.storage.file import create_file
from fleecer.storage.pool import running_pool
from fleecer.units import KiB

SIZE = 256 * KiB
BACKING_FORMAT_EXTENSION = b"\xe2\x79\x2a\xca"


async def make_qcow2(path: Path, backing: str | None = None, backing_format: str | None = None) -> None:
    """An image; one with a backing file and no format has that of old tools, which recorded none."""
    node = FileNode("new", await create_file(str(path)))
    edge = Edge(node, "test", "file", writable=True, may_grow=True)
    recorded = "raw" if backing is not None and backing_format is None else backing_format
    await create_qcow2(edge, SIZE, cluster_size=4 * KiB, backing_file=backing, backing_format=recorded)
    await node.close()
    if recorded != backing_format:
        content = path.read_bytes()
        assert content.count(BACKING_FORMAT_EXTENSION) == 1
        path.write_bytes(content.replace(BACKING_FORMAT_EXTENSION, b"none"))


def make_raw(path: Path, content: bytes | None = None) -> bytes:
    content = random.Random(3).randbytes(SIZE) if content is None else content
    path.write_bytes(content)
    return content


class World:
    """A graph, and openers into it, in a directory of images."""

    def __init__(self, images: Path) -> None:
        self.images = images
        self.graph = Graph()

    def options(self, **members: Any) -> dict[str, Any]:
        return {name.replace("_", "-"): value for name, value in members.items()}

    async def add(self, *, allow_backing: tuple[str, ...] = (), **members: Any) -> Any:
        opener = Opener(self.graph, allow_backing=allow_backing)
        return await opener.add(parse_options(self.options(**members)))

    def file(self, name: str, **members: Any) -> dict[str, Any]:
        return self.options(driver="file", filename=str(self.images / name), **members)

    async def qcow2(self, name: str, **members: Any) -> Any:
        return await self.add(driver="qcow2", node_name="disk", file=self.file(name), **members)

    async def refused(self, attempt: Any) -> str:
        """The text of the error that `attempt` ends with. Nothing may be left: no node, edge or descriptor."""
        nodes, before = self.graph.nodes(), open_files(self.images)
        edges = {node.name: self.graph.parents(node) for node in nodes}
        with pytest.raises(FleecerError) as caught:
            await attempt
        assert self.graph.nodes() == nodes, "nodes were left"
        assert {node.name: self.graph.parents(node) for node in nodes} == edges, "edges were left"
        assert open_files(self.images) == before, "descriptors were left"
        text = str(caught.value)
        assert "\n" not in text
        return text

    def reader(self, node: Any) -> Edge:
        return self.graph.attach(node, "reader", "test")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    images = tmp_path / "images"
    images.mkdir()
    made = World(images)
    make_raw(images / "warm-up.raw")
    await made.add(
        driver="file", node_name="warm-up", filename=str(images / "warm-up.raw")
    )  # starts the pool's threads
    await made.graph.remove("warm-up")
    yield made
    await made.graph.close()
    await running_pool().close()


# What can be opened.


async def test_a_chain_is_followed_and_read_only_below_its_top(world: World) -> None:
    content = make_raw(world.images / "base.raw")
    await make_qcow2(world.images / "middle.qcow2", "base.raw", "raw")
    await make_qcow2(world.images / "top.qcow2", "middle.qcow2", "qcow2")
    node = await world.qcow2("top.qcow2")
    assert bytes(await world.reader(node).pread(0, SIZE)) == content
    assert [(n.driver, n.read_only) for n in world.graph.nodes()] == [
        ("file", False),
        ("file", True),
        ("file", True),
        ("raw", True),
        ("qcow2", True),
        ("qcow2", False),
    ]


async def test_the_backing_of_the_header_can_be_overridden_or_left_out(world: World) -> None:
    await make_qcow2(world.images / "top.qcow2", "absent.raw", "raw")
    content = make_raw(world.images / "other.raw")
    node = await world.qcow2("top.qcow2", backing=world.file("other.raw"))
    assert bytes(await world.reader(node).pread(0, SIZE)) == content
    await world.graph.close()
    node = await world.qcow2("top.qcow2", backing=None)
    assert not any(await world.reader(node).pread(0, SIZE))


async def test_a_nested_node_goes_with_its_parent_named_or_not(world: World) -> None:
    await make_qcow2(world.images / "top.qcow2")
    file = world.file("top.qcow2", node_name="file0")
    await world.add(driver="qcow2", node_name="disk", file=file)
    with pytest.raises(InUse, match=r"^node 'file0' belongs to node 'disk' \(file\) and goes with it$"):
        await world.graph.remove("file0")
    await world.graph.remove("disk")
    assert not world.graph.nodes()


async def test_a_node_given_by_name_stays_when_its_parent_goes(world: World) -> None:
    make_raw(world.images / "a.raw")
    await world.add(**world.file("a.raw", node_name="file0"))
    await world.add(driver="raw", node_name="disk", file="file0")
    with pytest.raises(InUse, match=r"^node 'file0' is in use by node 'disk' \(file\); remove that first$"):
        await world.graph.remove("file0")
    await world.graph.remove("disk")
    assert [node.name for node in world.graph.nodes()] == ["file0"]


@pytest.mark.parametrize(
    "members",
    [
        {"driver": "throttle", "iops-total": 100},
        {"driver": "delay", "read-s": 0.001},
        {"driver": "log"},
        {"driver": "raw"},
        {"driver": "fault", "rules": [{"operation": "read", "after": 5}]},
    ],
)
async def test_filters_are_opened_over_what_they_name(world: World, members: dict[str, Any]) -> None:
    content = make_raw(world.images / "a.raw")
    node = await world.add(**members, node_name="disk", file=world.file("a.raw"))
    assert bytes(await world.reader(node).pread(0, 512)) == content[:512]
    assert node.driver == members["driver"]


@pytest.mark.parametrize("driver", ["throttle", "delay", "log", "raw", "fault"])
async def test_an_image_grows_also_below_a_filter(world: World, driver: str) -> None:
    members: dict[str, dict[str, Any]] = {"fault": {"rules": []}, "throttle": {"iops-total": 1000}}
    await make_qcow2(world.images / "a.qcow2")
    below = world.options(driver=driver, file=world.file("a.qcow2"), **members.get(driver, {}))
    node = await world.add(driver="qcow2", node_name="disk", file=below)
    edge = world.graph.attach(node, "writer", "test", writable=True)
    await edge.pwrite(0, b"x" * SIZE)
    assert bytes(await edge.pread(0, SIZE)) == b"x" * SIZE


async def test_fault_rules_are_obeyed(world: World) -> None:
    make_raw(world.images / "a.raw")
    rules = [{"operation": "read", "errno": 28, "times": 1, "offset": 4096, "length": 512}]
    node = await world.add(driver="fault", node_name="disk", file=world.file("a.raw"), rules=rules)
    reader = world.reader(node)
    await reader.pread(0, 512)
    with pytest.raises(IoError, match="No space left"):
        await reader.pread(4096, 1)
    await reader.pread(4096, 1)


async def test_a_nested_node_is_writable_exactly_if_its_parent_is(world: World) -> None:
    make_raw(world.images / "a.raw")
    for read_only in (True, False):
        await world.add(driver="raw", node_name="disk", file=world.file("a.raw"), read_only=read_only)
        assert [node.read_only for node in world.graph.nodes()] == [read_only, read_only]
        await world.graph.remove("disk")


async def test_null_and_nbd_nodes_are_opened(world: World, tmp_path: Path) -> None:
    null = await world.add(driver="null-co", node_name="null", size=SIZE)
    assert null.size == SIZE
    serving = Serving()
    serving.server.listen_unix(str(tmp_path / "nbd"))
    server = {"type": "unix", "path": str(tmp_path / "nbd")}
    node = await world.add(driver="nbd", node_name="disk", server=server, export="disk", read_only=True)
    reader = world.reader(node)
    assert bytes(await reader.pread(0, 512)) == serving.data[:512]
    await world.graph.detach(reader)
    tcp = serving.server.listen_tcp("127.0.0.1", 0)
    server = {"type": "inet", "host": "127.0.0.1", "port": str(tcp.address[1])}
    await world.add(driver="nbd", node_name="over-tcp", server=server, export="disk")
    await world.graph.remove("disk")
    await world.graph.remove("over-tcp")
    await serving.close()


async def test_the_new_scheme_can_be_put_together_from_options(world: World) -> None:
    content = make_raw(world.images / "a.raw")
    make_raw(world.images / "scratch.raw", bytes(SIZE))
    await world.add(driver="raw", node_name="disk", file=world.file("a.raw"))
    cbw = await world.add(
        driver="copy-before-write", node_name="cbw", file="disk", target=world.file("scratch.raw", discard="unmap")
    )
    assert isinstance(cbw, CopyBeforeWriteNode)
    guest = world.graph.attach(cbw, "guest", "nbd", writable=True)
    access = await world.add(driver="snapshot-access", node_name="past", file="cbw", discard="unmap")
    past = world.graph.attach(access, "reader", "nbd", writable=True)
    await guest.pwrite(1000, b"new")
    assert bytes(await past.pread(0, SIZE)) == content
    await past.discard(0, 64 * KiB)
    with pytest.raises(IoError, match="discarded by a reader"):
        await past.pread(0, 1)
    await world.graph.drain_and_detach(past)
    await world.graph.remove("past")
    await world.graph.drain_and_detach(guest)
    await world.graph.remove("cbw")
    assert [node.name for node in world.graph.nodes() if not node.name.startswith("#")] == ["disk"]


async def test_a_filter_whose_timed_out_copy_is_still_under_way_is_closed_after_it(world: World) -> None:
    make_raw(world.images / "a.raw")
    make_raw(world.images / "scratch.raw", bytes(SIZE))
    await world.add(driver="raw", node_name="disk", file=world.file("a.raw"))
    slow = await world.add(driver="fault", node_name="slow", file=world.file("scratch.raw"))
    assert isinstance(slow, FaultNode)
    cbw = await world.add(driver="copy-before-write", node_name="cbw", file="disk", target="slow", cbw_timeout=0.01)
    guest = world.graph.attach(cbw, "guest", "nbd", writable=True)
    held = slow.hold("write")
    await guest.pwrite(0, b"x")  # the copy is given up
    await held.reached()
    await world.graph.drain_and_detach(guest)
    removing = asyncio.ensure_future(world.graph.remove("cbw"))
    await asyncio.sleep(0.01)
    assert not removing.done()
    held.release()
    await removing
    await world.graph.remove("slow")


async def test_discards_are_ignored_where_the_options_say_so(world: World) -> None:
    content = make_raw(world.images / "a.raw")
    node = await world.add(driver="raw", node_name="disk", file=world.file("a.raw"), discard="ignore")
    guest = world.graph.attach(node, "guest", "nbd", writable=True)
    await guest.discard(0, SIZE)
    assert bytes(await guest.pread(0, SIZE)) == content
    make_raw(world.images / "b.raw")
    assert (await world.add(driver="raw", node_name="other", file=world.file("b.raw"))).limits.can_discard


# What is refused, in which words.


async def test_names_are_required_and_well_formed(world: World) -> None:
    make_raw(world.images / "a.raw")
    file = world.file("a.raw")
    assert await world.refused(world.add(**file)) == (
        "block device options: node-name is missing; give the node a name"
    )
    for name in ("", "#block7"):
        told = await world.refused(world.add(**file, node_name=name))
        assert told == f"node name '{name}' must not be empty, nor begin with '#'"
    await world.add(**file, node_name="disk")
    assert await world.refused(world.qcow2("a.raw")) == "node name 'disk' is taken; choose another"
    assert await world.refused(world.add(driver="raw", node_name="top", file="disc")) == "node 'disc' does not exist"


async def test_a_name_taken_while_the_image_was_opened_is_refused_and_the_image_closed(world: World) -> None:
    make_raw(world.images / "a.raw")
    make_raw(world.images / "b.raw")
    outcomes = await asyncio.gather(
        *(world.add(**world.file(name, node_name="disk")) for name in ("a.raw", "b.raw")), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(UsageError) == 1
    assert len(world.graph.nodes()) == 1
    assert len(open_files(world.images)) == 1


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("absent", "image '{path}' does not exist"),
        ("directory", "image '{path}' is a directory; only regular files and block devices will do"),
        ("FIFO", "image '{path}' is a FIFO; only regular files and block devices will do"),
        ("socket", "image '{path}' is a socket; only regular files and block devices will do"),
        ("device", "image '/dev/null' is a character device; only regular files and block devices will do"),
    ],
)
@pytest.mark.parametrize("place", ["image", "backing"])
async def test_what_is_no_image_file_is_refused(world: World, what: str, told: str, place: str, tmp_path: Path) -> None:
    path = world.images / "odd"
    if what == "directory":
        path.mkdir()
    elif what == "FIFO":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif what == "device":
        path.symlink_to("/dev/null")
    if place == "image":
        text = await world.refused(world.qcow2("odd"))
        assert text == told.format(path=path).replace("'/dev/null'", f"'{path}'")
    else:
        await make_qcow2(world.images / "top.qcow2", "odd", "raw")
        text = await world.refused(world.qcow2("top.qcow2", allow_backing=("/dev",)))
        if what == "absent":
            told = f"image '{world.images}/top.qcow2': its backing file '{path}' does not exist"
        assert text == told.format(path=path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes are too few for a qcow2 header of 72"),
        (b"QFI\xfb" + bytes(20), "24 bytes are too few for a qcow2 header of 72"),
        (bytes(SIZE), "magic number 0x00000000 is not that of qcow2, 0x514649fb"),
        (b"QFI\xfb\x00\x00\x00\x07" + bytes(4096), "qcow2 version 7 is neither 2 nor 3"),
    ],
)
async def test_what_is_no_qcow2_image_is_refused_and_given_back(world: World, content: bytes, told: str) -> None:
    make_raw(world.images / "a.qcow2", content)
    assert await world.refused(world.qcow2("a.qcow2")) == f"image '{world.images}/a.qcow2': {told}"
    named = world.file("a.qcow2", node_name="file0")
    assert told in await world.refused(world.add(driver="qcow2", node_name="disk", file=named))
    await world.add(**named)  # neither its name nor its lock is held any more


async def test_a_truncated_qcow2_image_is_refused(world: World) -> None:
    await make_qcow2(world.images / "a.qcow2")
    os.truncate(world.images / "a.qcow2", 5000)
    text = await world.refused(world.qcow2("a.qcow2"))
    assert text.startswith(f"image '{world.images}/a.qcow2': ")
    assert "passes the file's end at 5000" in text


async def test_a_backing_file_without_a_recorded_format_is_never_guessed(world: World) -> None:
    make_raw(world.images / "base.raw", b"QFI\xfb" + bytes(SIZE - 4))
    await make_qcow2(world.images / "top.qcow2", "base.raw")
    assert await world.refused(world.qcow2("top.qcow2")) == (
        f"image '{world.images}/top.qcow2': its backing file 'base.raw' has no recorded format, and guessing is not "
        "safe; record it with: qemu-img rebase -u -b 'base.raw' -F FORMAT '" + f"{world.images}/top.qcow2'"
    )


async def test_a_guests_forged_header_in_a_raw_backing_file_stays_data(world: World) -> None:
    make_raw(world.images / "secret.raw", b"s" * SIZE)
    await make_qcow2(world.images / "base.raw", "secret.raw", "raw")  # what a guest could write into its disk
    await make_qcow2(world.images / "top.qcow2", "base.raw", "raw")
    node = await world.qcow2("top.qcow2")
    assert bytes(await world.reader(node).pread(0, 4)) == b"QFI\xfb"


async def test_a_backing_format_that_is_not_known_is_named(world: World) -> None:
    make_raw(world.images / "base.vmdk")
    await make_qcow2(world.images / "top.qcow2", "base.vmdk", "vm\x1bdk")
    text = await world.refused(world.qcow2("top.qcow2"))
    assert text.endswith("top.qcow2': its backing file 'base.vmdk' has format 'vm\\x1bdk'; raw and qcow2 are known")


async def test_control_characters_in_a_header_do_not_reach_a_terminal(world: World) -> None:
    for number, name in enumerate(("\x1b[2Jx", "../\x1b[2J/y", "/\x1b]0;z\x07/y")):
        await make_qcow2(world.images / f"{number}.qcow2", name, None if number == 0 else "raw")
        assert (await world.refused(world.qcow2(f"{number}.qcow2"))).isprintable()


async def test_a_backing_file_outside_needs_leave(world: World, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    content = make_raw(tmp_path / "bases" / "base.raw")
    await make_qcow2(world.images / "top.qcow2", "../bases/base.raw", "raw")
    assert await world.refused(world.qcow2("top.qcow2")) == (
        f"image '{world.images}/top.qcow2': its backing file '../bases/base.raw' is outside '{world.images}'; "
        f"--allow-backing '{tmp_path}/bases' would allow it"
    )
    node = await world.qcow2("top.qcow2", allow_backing=(str(tmp_path / "bases"),))
    assert bytes(await world.reader(node).pread(0, SIZE)) == content


async def test_a_link_does_not_lead_outside_either(world: World, tmp_path: Path) -> None:
    make_raw(tmp_path / "secret.raw")
    (world.images / "base.raw").symlink_to(tmp_path / "secret.raw")
    await make_qcow2(world.images / "top.qcow2", "base.raw", "raw")
    assert "is outside" in await world.refused(world.qcow2("top.qcow2"))


async def test_a_chain_does_not_lead_outside_further_down(world: World, tmp_path: Path) -> None:
    make_raw(tmp_path / "secret.raw")
    await make_qcow2(world.images / "middle.qcow2", "../secret.raw", "raw")
    await make_qcow2(world.images / "top.qcow2", "middle.qcow2", "qcow2")
    text = await world.refused(world.qcow2("top.qcow2"))
    assert text.startswith(f"image '{world.images}/middle.qcow2': its backing file '../secret.raw' is outside")


@pytest.mark.parametrize("named", ["json:{}", "nbd://localhost/disk", "file:base.raw"])
async def test_a_backing_file_is_never_a_protocol(world: World, named: str) -> None:
    await make_qcow2(world.images / "top.qcow2", named, "raw")
    text = await world.refused(world.qcow2("top.qcow2"))
    assert text.endswith(f"its backing file '{named}' has a protocol prefix, which a header may not use")


@pytest.mark.parametrize("kind", ["self", "two", "hard link"])
async def test_loops_are_found(world: World, kind: str) -> None:
    if kind == "self":
        await make_qcow2(world.images / "top.qcow2", "top.qcow2", "qcow2")
        last = ("top.qcow2", "top.qcow2")
    elif kind == "two":
        await make_qcow2(world.images / "top.qcow2", "other.qcow2", "qcow2")
        await make_qcow2(world.images / "other.qcow2", "top.qcow2", "qcow2")
        last = ("other.qcow2", "top.qcow2")
    else:
        await make_qcow2(world.images / "top.qcow2", "hard.qcow2", "qcow2")
        os.link(world.images / "top.qcow2", world.images / "hard.qcow2")
        last = ("top.qcow2", "hard.qcow2")
    for read_only in (False, True):
        text = await world.refused(world.qcow2("top.qcow2", read_only=read_only))
        assert text == (
            f"image '{world.images}/{last[0]}': its backing file '{last[1]}' is an image above it in the chain; "
            "that is a loop"
        )


async def test_chains_are_limited_in_length(world: World) -> None:
    content = make_raw(world.images / "0.raw")
    for number in range(1, CHAIN_MAX + 1):
        below = f"{number - 1}.qcow2" if number > 1 else "0.raw"
        await make_qcow2(world.images / f"{number}.qcow2", below, "qcow2" if number > 1 else "raw")
    assert await world.refused(world.qcow2(f"{CHAIN_MAX}.qcow2")) == (
        f"image '{world.images}/1.qcow2': its backing chain is longer than 64 images, which is the limit"
    )
    node = await world.qcow2(f"{CHAIN_MAX - 1}.qcow2")
    assert bytes(await world.reader(node).pread(0, SIZE)) == content
    assert await world.reader(node).block_status(0, SIZE)


async def test_an_image_in_use_is_refused_and_what_was_opened_before_it_given_back(world: World) -> None:
    make_raw(world.images / "base.raw")
    await make_qcow2(world.images / "top.qcow2", "base.raw", "raw")
    await world.add(**world.file("base.raw", node_name="writer"))
    text = await world.refused(world.qcow2("top.qcow2"))
    assert text == (
        f"image '{world.images}/base.raw' is open in this daemon already, as node 'writer'; use that node, or close it "
        "first"
    )
    await world.graph.remove("writer")
    await world.qcow2("top.qcow2")


async def test_a_filter_above_a_disk_that_others_write_to_is_refused(world: World) -> None:
    make_raw(world.images / "a.raw")
    make_raw(world.images / "scratch.raw", bytes(SIZE))
    make_raw(world.images / "small.raw", bytes(SIZE - 512))
    disk = await world.add(driver="raw", node_name="disk", file=world.file("a.raw"))
    members: dict[str, Any] = {"driver": "copy-before-write", "node_name": "cbw", "file": "disk"}
    assert await world.refused(world.add(**members, target=world.file("small.raw"))) == (
        f"target '{_last_name(world)}' has {SIZE - 512} bytes, the disk 'disk' has {SIZE}; they must be equal"
    )
    writer = world.graph.attach(disk, "export 'disk'", "nbd", writable=True)
    text = await world.refused(world.add(**members, target=world.file("scratch.raw")))
    assert text.startswith("node 'cbw' (filtered) cannot have node 'disk': export 'disk' (nbd) writes to it")
    await world.graph.detach(writer)
    assert await world.refused(world.add(driver="snapshot-access", node_name="past", file="disk")) == (
        "node 'disk' is no copy-before-write filter with a snapshot"
    )


def _last_name(world: World) -> str:
    """The name that the node before the next one got."""
    return f"#block{int(world.graph.fresh_name().removeprefix('#block')) - 1:03d}"


async def test_a_read_only_node_is_not_written_through(world: World) -> None:
    await make_qcow2(world.images / "a.qcow2")
    await world.add(**world.file("a.qcow2", node_name="file0", read_only=True))
    text = await world.refused(world.add(driver="qcow2", node_name="disk", file="file0"))
    assert text == "node 'disk' (file) wants to write to node 'file0', which is read-only"
    node = await world.add(driver="qcow2", node_name="disk", file="file0", read_only=True)
    with pytest.raises(PermissionConflict):
        world.graph.attach(node, "guest", "nbd", writable=True)
    assert [e.flags for e in await world.reader(node).block_status(0, SIZE)] == [HOLE | ZERO]


async def test_a_server_that_is_not_there_is_named(world: World, tmp_path: Path) -> None:
    server: dict[str, str] = {"type": "unix", "path": str(tmp_path / "none")}
    text = await world.refused(world.add(driver="nbd", node_name="disk", server=server))
    assert text == f"connect on '{tmp_path}/none': No such file or directory"
    server = {"type": "inet", "host": "127.0.0.1", "port": "99999"}
    text = await world.refused(world.add(driver="nbd", node_name="disk", server=server))
    assert text == "port '99999' is not a number up to 65535"
    serving = Serving()
    serving.server.listen_unix(str(tmp_path / "nbd"))
    server = {"type": "unix", "path": str(tmp_path / "nbd")}
    with pytest.raises(FleecerError, match="export 'nope' does not exist"):
        await world.add(driver="nbd", node_name="disk", server=server, export="nope")
    assert not world.graph.nodes()
    await serving.close()


async def test_an_image_in_a_chain_that_was_cut_short_is_named(world: World) -> None:
    base = world.images / "base.qcow2"
    await make_qcow2(base)
    node = await world.qcow2("base.qcow2")
    edge = world.graph.attach(node, "writer", "test", writable=True)
    await edge.pwrite(0, b"x" * SIZE)
    await world.graph.detach(edge)
    await world.graph.remove("disk")
    end = base.stat().st_size - 4 * KiB
    os.truncate(base, end)
    await make_qcow2(world.images / "top.qcow2", "base.qcow2", "qcow2")
    assert await world.refused(world.qcow2("top.qcow2")) == (
        f"image '{base}': cluster 63 of the disk is at byte {end}, past the end of the file at {end}: "
        "the image was cut short; restore it from a backup"
    )


@pytest.mark.parametrize("between", [False, True])
async def test_an_image_that_grows_is_refused_above_a_filter_that_keeps_the_past(world: World, between: bool) -> None:
    path = world.images / "disk.qcow2"
    await make_qcow2(path)
    (world.images / "scratch").write_bytes(bytes(path.stat().st_size))
    target = world.file("scratch")
    await world.add(driver="copy-before-write", node_name="past", file=world.file("disk.qcow2"), target=target)
    file = {"driver": "throttle", "file": "past"} if between else "past"
    text = await world.refused(world.add(driver="qcow2", node_name="disk", file=file))
    assert text == (
        "node 'disk' makes its file grow, and copy-before-write node 'past' keeps the past of one that does not; "
        "put that filter above this node, or open this one read-only"
    )
    node = await world.add(driver="qcow2", node_name="disk", file="past", read_only=True)
    assert not any(await world.reader(node).pread(0, SIZE))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"driver": "qcow3", "file": "x"}, "driver 'qcow3' is not known; known are copy-before-write, delay, "),
        ({"driver": "file"}, "option filename is missing"),
        ({"driver": "file", "filename": "x", "cache": {}}, "option 'cache' is not known; known are auto-read-only, "),
        (
            {"driver": "raw", "file": {"driver": "file", "filename": 7}},
            "file.filename is 7; it must be text",
        ),
        ({"filename": "x"}, "option driver is missing"),
        ([], "what is given is a list; it must be an object"),
    ],
)
def test_options_that_are_wrong_are_named(value: object, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(value)
    text = str(caught.value)
    assert text.startswith("block device options: ")
    assert told in text
