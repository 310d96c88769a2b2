"""Extended L2 entries: what they mean, subcluster by subcluster, and what contradicts itself."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import EXTENDED_L2, Header
from fleecer.formats.qcow2.subclusters import ALL, SUBCLUSTERS, ExtendedMapping, mapping_of
from fleecer.formats.qcow2.tables import COMPRESSED, COPIED, ZERO_FLAG, Backing, Compressed, Data, Plan, Zero

C = 16384
S = C // SUBCLUSTERS
END = 1 << 30
PER_SLICE = 256


def mapping() -> ExtendedMapping:
    found = mapping_of(
        Header(
            version=3,
            cluster_bits=14,
            size=1 << 30,
            l1_size=4,
            l1_table_offset=C,
            refcount_table_offset=2 * C,
            refcount_table_clusters=1,
            incompatible_features=EXTENDED_L2,
        ),
        "disk",
    )
    assert isinstance(found, ExtendedMapping)
    return found


def table(*entries: tuple[int, int]) -> array[int]:
    """A slice whose first entries, and their bitmaps, are these."""
    entries += ((0, 0),) * (PER_SLICE - len(entries))
    return array("Q", [entry for entry, _ in entries] + [bitmap for _, bitmap in entries])


def bitmap(states: str) -> int:
    """ "a" allocated, "z" zero, "." neither, from the first subcluster on."""
    return sum({"a": 1 << at, "z": 1 << 32 + at, ".": 0}[state] for at, state in enumerate(states))


def plans(entries: array[int], skip: int, length: int, file_end: int = END) -> list[Plan]:
    found: list[Plan] = []
    mapping().plan(found, entries, 0, 100, skip, length, file_end)
    return found


def test_runs_of_subclusters_come_as_plans() -> None:
    entries = table((8 * C | COPIED, bitmap("aazz..a" + "a" * 25)), (9 * C | COPIED, ALL), (0, bitmap("z" * 4)), (0, 0))
    assert plans(entries, 0, 4 * C) == [
        Data(8 * C, 2 * S),
        Zero(2 * S, True),
        Backing(2 * S),
        Data(8 * C + 6 * S, C - 6 * S + C),
        Zero(4 * S, False),
        Backing(2 * C - 4 * S),
    ]
    assert plans(entries, S + 5, 2 * S) == [Data(8 * C + S + 5, S - 5), Zero(S + 5, True)]


clusters = st.lists(
    st.tuples(st.sampled_from([0, 8, 9, 20]), st.text("az.", min_size=SUBCLUSTERS, max_size=SUBCLUSTERS)),
    min_size=1,
    max_size=4,
)


@given(clusters, st.data())
def test_a_range_is_what_its_bytes_are_one_by_one(given_clusters: list[tuple[int, str]], data: st.DataObject) -> None:
    drawn = [(host, states if host else states.replace("a", ".")) for host, states in given_clusters]
    entries = table(*((host * C | (COPIED if host else 0), bitmap(states)) for host, states in drawn))
    skip = data.draw(st.integers(0, C - 1))
    length = data.draw(st.integers(1, len(drawn) * C - skip))
    at = skip
    for plan in plans(entries, skip, length):
        for inner in range(0, plan.length, 97):
            host, states = drawn[(at + inner) // C]
            state = states[(at + inner) % C // S]
            if isinstance(plan, Data):
                assert state == "a"
                assert plan.host_offset + inner == host * C + (at + inner) % C
            else:
                assert (state, bool(host)) == ("z", plan.allocated) if isinstance(plan, Zero) else state == "."
        at += plan.length
    assert at == skip + length
    host, most = mapping().in_place(entries, 0, skip, length, END)
    reach = 0
    while reach < length and drawn[(skip + reach) // C][1][(skip + reach) % C // S] == "a":
        place = drawn[(skip + reach) // C][0] * C + (skip + reach) % C
        if place != drawn[0][0] * C + skip + reach:
            break
        reach = min(length, ((skip + reach) // S + 1) * S - skip)
    assert most == reach
    assert host == (drawn[0][0] * C + skip if reach else 0)
    within = min(length, C - skip)
    stored = mapping().stored(entries, 0, skip, within)
    assert stored == (host if most >= within else 0)


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=8))
def test_tables_keep_their_entries(entries: list[tuple[int, int]]) -> None:
    stored = b"".join(number.to_bytes(8, "big") for entry in entries for number in entry)
    decoded = mapping().decode(stored)
    assert list(zip(decoded[: len(entries)], decoded[len(entries) :], strict=True)) == entries
    assert mapping().encode(decoded) == stored
    assert list(mapping().used(decoded)) == [at for at, entry in enumerate(entries) if any(entry)]


@pytest.mark.parametrize(
    ("entry", "bits"),
    [
        (8 * C | COPIED, 1 | 1 << 32),
        (0, 1),
        (8 * C | COPIED | ZERO_FLAG, 1),
        (ZERO_FLAG, 0),
        (8 * C + S, 1),
        (COPIED, 0),
        (END, 1),
        (COMPRESSED | 8 * C, 1),
        (COMPRESSED | 8 * C, 1 << 40),
    ],
)
def test_an_entry_that_contradicts_itself_gives_no_plan_and_is_not_written_to(entry: int, bits: int) -> None:
    entries = table((entry, bits))
    with pytest.raises(CorruptImage):
        plans(entries, 0, C)
    with pytest.raises(CorruptImage):
        mapping().host_clusters(entries, 0, 100, END)
    assert mapping().in_place(entries, 0, 0, S, END) == (0, 0)


def test_a_compressed_cluster_has_no_subclusters() -> None:
    entry = COMPRESSED | 2 << 56 | 0x12345
    entries = table((entry, 0))
    assert plans(entries, 10, 100) == [Compressed(0x12345, 3 * 512 - 0x145, 10, 100)]
    assert mapping().host_clusters(entries, 0, 100, END) == (0x12345 // C, 1)
    assert mapping().content_offset(entries, 0, 100) == 0x12345


def test_a_host_cluster_past_the_end_of_the_file_matters_only_where_something_is_in_it() -> None:
    assert plans(table((END | COPIED, bitmap("z" * 32))), 0, C) == [Zero(C, True)]
    assert mapping().content_offset(table((END | COPIED, bitmap("z."))), 0, 100) == 0
    assert mapping().content_offset(table((8 * C, bitmap("za"))), 0, 100) == 8 * C
