"""L2 look-ups, refcounts of every width, and compressed clusters, without a file."""

from __future__ import annotations

import sys
import tracemalloc
import zlib
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.compressed import unpack_cluster
from fleecer.formats.qcow2.header import COMPRESSION_DEFLATE, COMPRESSION_ZSTD, Header
from fleecer.formats.qcow2.refcounts import RefcountWidth, References, lay_out_refcounts
from fleecer.formats.qcow2.tables import (
    COMPRESSED,
    COPIED,
    ZERO_FLAG,
    Backing,
    Compressed,
    Data,
    Mapping,
    Plan,
    Zero,
    decode_table,
    encode_table,
)

C = 4096
END = 1 << 30


def mapping(version: int = 3, cluster_bits: int = 12) -> Mapping:
    return Mapping(
        Header(
            version=version,
            cluster_bits=cluster_bits,
            size=1 << 30,
            l1_size=1,
            l1_table_offset=C,
            refcount_table_offset=2 * C,
            refcount_table_clusters=1,
        ),
        "disk",
    )


def plans(entries: list[int], skip: int = 0, length: int | None = None, file_end: int = END) -> list[Plan]:
    found: list[Plan] = []
    length = len(entries) * C - skip if length is None else length
    mapping().plan(found, array("Q", entries), 0, 100, skip, length, file_end)
    return found


def test_neighbours_in_the_file_come_as_one_plan() -> None:
    assert plans([8 * C | COPIED, 9 * C, 10 * C | COPIED]) == [Data(8 * C, 3 * C)]
    assert plans([8 * C, 10 * C, 11 * C, 9 * C]) == [Data(8 * C, C), Data(10 * C, 2 * C), Data(9 * C, C)]


def test_kinds_are_told_apart() -> None:
    found = plans([0, 0, ZERO_FLAG, 8 * C | ZERO_FLAG | COPIED, 3 * C | ZERO_FLAG, 20 * C | COPIED, 0])
    assert found == [Backing(2 * C), Zero(C, False), Zero(2 * C, True), Data(20 * C, C), Backing(C)]


def test_a_range_inside_clusters_is_cut_to_its_bytes() -> None:
    assert plans([8 * C, 9 * C], 100, C) == [Data(8 * C + 100, C)]
    assert plans([0, ZERO_FLAG], 4000, 196) == [Backing(96), Zero(100, False)]


def test_a_run_goes_on_from_the_plan_before() -> None:
    found: list[Plan] = []
    for at in range(3):
        mapping().plan(found, array("Q", [(8 + at) * C]), 0, at, 0, C, END)
    assert found == [Data(8 * C, 3 * C)]


@given(st.lists(st.tuples(st.sampled_from([0, ZERO_FLAG, 8 * C | COPIED, 9 * C]), st.integers(1, 40)), max_size=12))
def test_a_long_range_is_what_its_clusters_are_one_by_one(runs: list[tuple[int, int]]) -> None:
    entries = [entry for entry, count in runs for _ in range(count)]
    one_by_one: list[Plan] = []
    for index in range(len(entries)):
        mapping().plan(one_by_one, array("Q", entries), index, index, 0, C, END)
    assert plans(entries) == one_by_one


def test_a_compressed_cluster_is_described_by_bytes() -> None:
    # x = 62 - (12 - 8) = 58: the offset below, the number of further sectors above.
    entry = COMPRESSED | 2 << 58 | 0x12345
    assert plans([entry], 10, 100) == [Compressed(0x12345, 3 * 512 - 0x145, 10, 100)]
    clusters = mapping().host_clusters(array("Q", [entry]), 0, 0, END)
    assert clusters == (0x12, 1)
    assert mapping().host_clusters(array("Q", [COMPRESSED | 2 << 58 | 0x12E00]), 0, 0, END) == (0x12, 2)


@pytest.mark.parametrize(
    "entry",
    [8 * C | 2, 8 * C + 512, 8 * C | 1 << 56, COPIED, COPIED | ZERO_FLAG, END, COMPRESSED, COMPRESSED | 1 << 57],
)
def test_an_entry_that_breaks_the_format_gives_no_plan(entry: int) -> None:
    for entries in ([entry], [entry - C if C < entry < 1 << 40 else 0, entry], [0, entry]):
        with pytest.raises(CorruptImage):
            plans(entries)


def test_version_2_has_no_zero_flag() -> None:
    with pytest.raises(CorruptImage):
        mapping(version=2).plan([], array("Q", [ZERO_FLAG]), 0, 0, 0, C, END)


def test_only_copied_clusters_can_be_written_in_place_and_runs_end_at_others() -> None:
    entries = array("Q", [8 * C | COPIED, 9 * C | COPIED, 10 * C, 12 * C | COPIED, 13 * C | COPIED | ZERO_FLAG])
    assert mapping().in_place(entries, 0, 0, 5 * C, END) == (8 * C, 2 * C)
    assert mapping().in_place(entries, 0, 100, 5 * C - 100, END) == (8 * C + 100, 2 * C - 100)
    assert mapping().in_place(entries, 0, 1, C, END) == (8 * C + 1, C), "it may end inside a cluster"
    assert mapping().in_place(entries, 0, 0, 1, END) == (8 * C, 1)
    assert mapping().in_place(entries, 2, 0, 3 * C, END) == (0, 0)
    assert mapping().in_place(entries, 3, 0, 2 * C, END) == (12 * C, C)
    assert mapping().in_place(entries, 0, 0, 5 * C, 9 * C) == (8 * C, C)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_tables_keep_their_entries(entries: list[int]) -> None:
    data = b"".join(entry.to_bytes(8, "big") for entry in entries)
    assert list(decode_table(data)) == entries
    assert encode_table(array("Q", entries)) == data


@given(st.integers(0, 6), st.data())
def test_refcounts_of_every_width_are_kept_apart(order: int, data: st.DataObject) -> None:
    width = RefcountWidth(order)
    block = bytearray(64)
    model = [0] * width.entries_in(64)
    steps = st.tuples(st.integers(0, len(model) - 1), st.integers(0, width.maximum))
    for index, count in data.draw(st.lists(steps, max_size=40)):
        width.put(block, index, count)
        model[index] = count
    start = data.draw(st.integers(0, len(model) - 1))
    assert [width.get(block, at) for at in range(len(model))] == model == list(width.decode(block))
    free = next((at for at in range(start, len(model)) if not model[at]), -1)
    assert width.find_free(block, start) == free
    if free >= 0:
        run = next((at for at in range(free, len(model)) if model[at]), len(model)) - free
        most = data.draw(st.integers(1, len(model)))
        assert width.free_run(block, free, most) == min(run, most)
        width.put_ones(block, free, run)
        model[free : free + run] = [1] * run
        assert list(width.decode(block)) == model


def test_sub_byte_refcounts_start_at_the_lowest_bit() -> None:
    block = bytearray(2)
    RefcountWidth(0).put(block, 1, 1)
    RefcountWidth(1).put(block, 7, 2)
    RefcountWidth(2).put(block, 1, 5)
    assert block == bytes([0b01010010, 0b10000000])


@given(st.sampled_from([9, 12]), st.integers(0, 6), st.sets(st.integers(0, 5000), min_size=1, max_size=50))
def test_a_refcount_structure_counts_what_was_referred_to_and_itself(bits: int, order: int, used: set[int]) -> None:
    references = References()
    for cluster in used:
        references.add(cluster)
    first = references.end
    layout = lay_out_refcounts(references, order, bits, first, "disk")
    pieces = list(layout.pieces)
    image = bytearray(max(offset + len(data) for offset, data in pieces))
    for offset, data in pieces:
        assert offset >= first << bits
        assert not any(image[offset : offset + len(data)])
        image[offset : offset + len(data)] = data
    width = RefcountWidth(order)
    per_block = width.entries_in(1 << bits)
    table = decode_table(image[layout.table_offset : layout.table_offset + (layout.table_clusters << bits)])
    counted = {
        number * per_block + at
        for number, offset in enumerate(table)
        if offset
        for at, count in enumerate(width.decode(image[offset : offset + (1 << bits)]))
        if count
    }
    own = {offset >> bits for offset in table if offset}
    own.update(range(layout.table_offset >> bits, (layout.table_offset >> bits) + layout.table_clusters))
    assert counted == used | own
    assert not used & own


def test_a_count_that_does_not_fit_is_refused() -> None:
    references = References()
    references.add(5, 1, 2)
    with pytest.raises(CorruptImage, match="cluster 5 has 2 references; refcount_bits 1 is too few"):
        lay_out_refcounts(references, 0, 9, 6, "disk")


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(("kind", "pack"), [(COMPRESSION_DEFLATE, deflated), (COMPRESSION_ZSTD, zstd.compress)])
def test_a_compressed_cluster_must_be_exactly_one_cluster(kind: int, pack: object) -> None:
    assert callable(pack)
    content = bytes(range(256)) * 256
    assert unpack_cluster(pack(content) + b"\xff" * 300, 65536, kind, "disk", 7) == content
    with pytest.raises(CorruptImage, match="at 7 expands beyond the cluster size 65536"):
        unpack_cluster(pack(content + b"x"), 65536, kind, "disk", 7)
    with pytest.raises(CorruptImage, match="at 7 holds 65535 bytes"):
        unpack_cluster(pack(content[:-1]), 65536, kind, "disk", 7)
    with pytest.raises(CorruptImage, match="at 7"):
        unpack_cluster(b"\xff" * 512, 65536, kind, "disk", 7)
    with pytest.raises(CorruptImage, match="at 7"):
        unpack_cluster(pack(content)[:20], 65536, kind, "disk", 7)


@pytest.mark.parametrize("kind", [COMPRESSION_DEFLATE, COMPRESSION_ZSTD])
def test_a_bomb_takes_no_more_memory_than_a_cluster_or_two(kind: int) -> None:
    bomb = deflated(bytes(100 << 20)) if kind == COMPRESSION_DEFLATE else zstd.compress(bytes(100 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImage, match="expands beyond"):
            unpack_cluster(bomb, 65536, kind, "disk", 7)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_zstd_window_larger_than_any_cluster_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    data = packer.compress(bytes(1000)) + packer.flush()
    with pytest.raises(CorruptImage, match="cannot be unpacked"):
        unpack_cluster(data, 65536, COMPRESSION_ZSTD, "disk", 7)
