"""The judge: what it lets pass, and that each kind of wrong content is found and named."""

from __future__ import annotations

import array
from pathlib import Path

import pytest

from tests.soak.judge import ZEROES, Limits, Piece, Verdict, check_zero_runs, difference, judge
from tests.soak.ledger import ABANDONED, IN_FLIGHT, RING, TRIM, WRITE, ZERO, Ledger, Op
from tests.soak.stamps import BASE_WRITER, SECTOR, Layout, Stamp

LAYOUT = Layout((8192, 8192), (0, 160), 2, 99)
OWN = LAYOUT.runs(0, 0)[0][0]  # a sector of writer 0
BASED = 0  # of disk 1


class Scene:
    """A ledger, and the content of both disks as operations leave it. Each tick of `now` is one moment."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(str(path / "ledger"), LAYOUT)
        self.disks = [bytearray(LAYOUT.sectors[0] * SECTOR), bytearray(LAYOUT.sectors[1] * SECTOR)]
        self.disks[1][: LAYOUT.based[1] * SECTOR] = LAYOUT.base(1)
        self.number = 0

    def write(self, disk: int, first: int, end: int, *, acknowledge: bool = True, kind: int = WRITE) -> int:
        """Writer 0 does an operation; returns its number."""
        self.number += 1
        self.ledger.begin(0, self.number, kind, disk, first, end)
        for sector in range(first, end):
            content = LAYOUT.stamped(disk, Stamp(0, self.number), sector) if kind == WRITE else bytes(SECTOR)
            self.put(disk, sector, content)
        if acknowledge:
            self.ledger.settle(disk, first, end, self.number * 2 + (kind != WRITE))
        return self.number

    def put(self, disk: int, sector: int, content: bytes) -> None:
        self.disks[disk][sector * SECTOR : (sector + 1) * SECTOR] = content

    def judge(self, operations: tuple[Op, ...] = (), *, limits: Limits | None = None) -> Verdict:
        before = self.ledger.before()
        after = self.ledger.after(before)
        limits = limits or Limits(before.acked, after.submitted, after.zeroed)
        pieces = [Piece(disk, 0, bytes(content)) for disk, content in enumerate(self.disks)]
        return judge(LAYOUT, limits, pieces, operations)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_what_a_discard_left_alone_may_still_lose_a_write_and_show_the_zeroes_before_it(scene: Scene) -> None:
    durable = scene.write(0, OWN, OWN + 2)
    zeroed = scene.write(0, OWN, OWN + 2, kind=ZERO)
    written = scene.write(0, OWN, OWN + 2)
    content = bytes(scene.disks[0][OWN * SECTOR : (OWN + 2) * SECTOR])
    before = scene.ledger.begin(0, written + 1, TRIM, 0, OWN, OWN + 2)
    assert list(before) == [zeroed, zeroed]
    scene.ledger.settle_trim(0, OWN, written + 1, before, content[:SECTOR] + bytes(SECTOR))
    assert list(scene.ledger.zeroed[0][OWN : OWN + 2]) == [zeroed, written + 1]
    assert list(scene.ledger.acked[0][OWN : OWN + 2]) == [written * 2, written * 2 + 3]
    after = scene.ledger.after(scene.ledger.before())
    low = [array.array("Q", view) for view in scene.ledger.acked]
    low[0][OWN] = low[0][OWN + 1] = durable * 2  # as a power cut may leave them
    scene.put(0, OWN, bytes(SECTOR))
    scene.put(0, OWN + 1, bytes(SECTOR))
    assert not scene.judge(limits=Limits(low, after.submitted, after.zeroed)).wrong
    assert scene.judge().wrong, "nothing was cut: only the other one is zero"


def test_every_sector_has_one_owner() -> None:
    for disk, size in enumerate(LAYOUT.sectors):
        owned = [
            sector for writer in range(2) for low, high in LAYOUT.runs(disk, writer) for sector in range(low, high)
        ]
        assert sorted(owned) == list(range(size))
        assert all(LAYOUT.owners(disk)[low] == 1 for low, _ in LAYOUT.runs(disk, 1))


def test_a_stamp_is_read_back_only_at_its_own_place_and_whole() -> None:
    content = LAYOUT.stamped(1, Stamp(0, 7), 33)
    assert LAYOUT.read(1, 33, content) == (0, 7)
    assert LAYOUT.read(0, 33, content) is None
    assert LAYOUT.read(1, 34, content) is None
    assert LAYOUT._replace(salt=1).read(1, 33, content) is None
    assert LAYOUT.read(1, 33, content[:256] + LAYOUT.stamped(1, Stamp(0, 8), 33)[256:]) is None
    assert LAYOUT.read(1, 33, b"\1" + content[1:]) is None


def test_disks_as_at_first_and_with_what_was_acknowledged_pass(scene: Scene) -> None:
    assert not scene.judge().wrong
    number = scene.write(0, OWN, OWN + 3)
    scene.write(1, BASED, BASED + 2, kind=ZERO)
    verdict = scene.judge()
    assert not verdict.wrong
    assert verdict.found[0][OWN : OWN + 4] == [number, number, number, ZEROES]
    assert verdict.found[1][BASED : BASED + 3] == [ZEROES, ZEROES, 0]


def test_an_older_operation_than_what_was_acknowledged_is_wrong(scene: Scene) -> None:
    scene.write(0, OWN, OWN + 1)
    old = bytes(scene.disks[0][OWN * SECTOR : (OWN + 1) * SECTOR])
    scene.write(0, OWN, OWN + 1)
    scene.put(0, OWN, old)
    verdict = scene.judge()
    place = f"disk 0 sector {OWN} (byte {OWN * SECTOR})"
    bounds = "expected writer 0, from operation 2 to operation 2, last zeroed by operation 0"
    assert verdict.wrong == [f"{place}: {bounds}; found operation 1 of writer 0"]
    assert verdict.wrong_bytes == SECTOR


def test_an_operation_in_flight_may_be_there_or_not(scene: Scene) -> None:
    before = bytes(scene.disks[0])
    scene.write(0, OWN, OWN + 4, acknowledge=False)
    assert not scene.judge().wrong
    scene.disks[0][:] = before
    assert not scene.judge().wrong


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAYOUT.stamped(0, Stamp(0, 9), OWN), "found operation 9 of writer 0"),
        (LAYOUT.stamped(0, Stamp(1, 1), OWN), "found operation 1 of writer 1"),
        (LAYOUT.stamped(0, Stamp(0, 1), OWN + 1), "found no whole stamp"),
        (LAYOUT.stamped(0, Stamp(0, 1), OWN)[:256] + bytes(256), "found no whole stamp"),
        (LAYOUT.stamped(0, Stamp(BASE_WRITER, 0), OWN), "found what the backing file holds"),
        (bytes(SECTOR), "found zeroes"),
    ],
    ids=["never submitted", "of another writer", "of another sector", "torn", "of a backing file", "zeroes"],
)
def test_a_sector_with_anything_else_is_wrong(scene: Scene, content: bytes, words: str) -> None:
    scene.write(0, OWN, OWN + 1)
    scene.put(0, OWN, content)
    assert [words in line for line in scene.judge().wrong] == [True]


def test_zeroes_need_an_operation_that_made_them(scene: Scene) -> None:
    scene.put(1, BASED, bytes(SECTOR))
    assert len(scene.judge().wrong) == 1
    scene.write(1, BASED, BASED + 1, kind=ZERO, acknowledge=False)
    assert not scene.judge().wrong
    scene.write(1, BASED, BASED + 1)
    scene.put(1, BASED, bytes(SECTOR))
    assert len(scene.judge().wrong) == 1


def test_data_under_the_number_of_an_operation_that_made_zeroes_is_wrong(scene: Scene) -> None:
    number = scene.write(0, OWN, OWN + 1, kind=ZERO)
    scene.put(0, OWN, LAYOUT.stamped(0, Stamp(0, number), OWN))
    assert len(scene.judge().wrong) == 1


def test_the_backing_content_after_a_write_is_wrong(scene: Scene) -> None:
    scene.write(1, BASED, BASED + 1)
    scene.disks[1][:SECTOR] = LAYOUT.base(1)[:SECTOR]
    assert len(scene.judge().wrong) == 1


# One instant: operations are (first submitted, last acknowledged) on one clock; both disks are of one snapshot.


def operation(number: int, sent: int, acknowledged: int, disk: int, first: int, end: int, kind: int = WRITE) -> Op:
    return Op(0, number, sent, acknowledged, disk, first, end, kind)


def test_a_later_operation_without_an_earlier_one_on_another_disk_is_no_instant(scene: Scene) -> None:
    low = Limits(*(list(map(array.array, "QQ", scene.ledger.acked)) for _ in range(3)))
    absent = bytes(scene.disks[0])
    scene.write(0, OWN, OWN + 1)
    scene.write(1, OWN, OWN + 1)
    scene.disks[0][:] = absent
    limits = Limits(low.low, scene.ledger.after(scene.ledger.before()).submitted, low.zeroed)
    one_after_the_other = (operation(1, 10, 20, 0, OWN, OWN + 1), operation(2, 30, 40, 1, OWN, OWN + 1))
    verdict = scene.judge(one_after_the_other, limits=limits)
    assert len(verdict.wrong) == 1
    assert "no single instant: operation 2" in verdict.wrong[0]
    side_by_side = (operation(1, 10, 35, 0, OWN, OWN + 1), operation(2, 30, 40, 1, OWN, OWN + 1))
    assert not scene.judge(side_by_side, limits=limits).wrong
    never_answered = (operation(1, 10, IN_FLIGHT, 0, OWN, OWN + 1), operation(2, 30, 40, 1, OWN, OWN + 1))
    assert not scene.judge(never_answered, limits=limits).wrong


def test_an_operation_in_part_is_no_instant(scene: Scene) -> None:
    scene.write(0, OWN, OWN + 2, acknowledge=False)
    scene.put(0, OWN + 1, bytes(SECTOR))
    verdict = scene.judge((operation(1, 10, IN_FLIGHT, 0, OWN, OWN + 2),))
    assert len(verdict.wrong) == 1
    assert "in part" in verdict.wrong[0]


def test_a_discard_in_part_is_fine(scene: Scene) -> None:
    scene.write(0, OWN, OWN + 2)
    kept = bytes(scene.disks[0][OWN * SECTOR : (OWN + 1) * SECTOR])
    scene.write(0, OWN, OWN + 2, kind=TRIM, acknowledge=False)
    scene.put(0, OWN, kept)
    scene.write(1, OWN, OWN + 1, acknowledge=False)
    around = (operation(2, 10, 20, 0, OWN, OWN + 2, TRIM), operation(3, 30, 40, 1, OWN, OWN + 1))
    assert not scene.judge(around).wrong


def test_zeroes_of_an_abandoned_discard_do_not_deny_the_write_before_it(scene: Scene) -> None:
    scene.write(0, OWN, OWN + 2, kind=ZERO)
    before = scene.ledger.before()
    scene.write(0, OWN, OWN + 2)
    scene.write(0, OWN, OWN + 1, kind=TRIM, acknowledge=False)
    scene.ledger.acknowledge(0, 2, before.at_ns + 1)
    scene.ledger.acknowledge(0, 3, ABANDONED)
    after = scene.ledger.after(before)
    assert not scene.judge(tuple(after.operations), limits=Limits(before.acked, after.submitted, after.zeroed)).wrong


def test_zeroes_tell_which_operations_they_are_older_than(scene: Scene) -> None:
    scene.write(0, OWN, OWN + 1, kind=ZERO, acknowledge=False)
    scene.write(0, OWN, OWN + 1, acknowledge=False)
    scene.write(1, OWN, OWN + 1, acknowledge=False)
    scene.put(0, OWN, bytes(SECTOR))
    around = (
        operation(1, 10, 20, 0, OWN, OWN + 1, ZERO),
        operation(2, 30, 40, 0, OWN, OWN + 1),
        operation(3, 50, 60, 1, OWN, OWN + 1),
    )
    assert "operation 2" in scene.judge(around).wrong[0]
    assert not scene.judge((around[0], around[1]._replace(acknowledged_ns=55), around[2])).wrong


# The ledger.


def test_operations_around_a_snapshot_are_those_not_over_before_it(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"), LAYOUT)
    for number in range(1, 5):
        ledger.begin(0, number, WRITE, 0, number, number + 1)
    ledger.acknowledge(0, 1, 1000)
    ledger.acknowledge(0, 2, ABANDONED)
    before = ledger.before()
    ledger.acknowledge(0, 3, before.at_ns + 5)
    assert [op.number for op in ledger.after(before).operations] == [2, 3, 4]
    ledger.acknowledge(0, 4, ABANDONED)
    ledger.enter_contents([array.array("Q", view) for view in ledger.acked])
    assert [op.number for op in ledger.after(before).operations] == [3]


def test_more_operations_than_the_ring_remembers_are_an_error_and_not_a_gap(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"), LAYOUT)
    before = ledger.before()
    ledger.set_stat(0, "newest", RING)
    with pytest.raises(RuntimeError, match="during one snapshot command"):
        ledger.after(before)
    ledger.begin(0, 1, WRITE, 0, 0, 1)
    ledger.begin(0, 1 + RING, WRITE, 0, 1, 2)
    with pytest.raises(RuntimeError, match="operation 1 of writer 0 was in flight for more than"):
        ledger.acknowledge(0, 1, 5)


def test_what_any_writers_flush_covered_is_the_floor(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"), LAYOUT)
    ledger.durable[0][1][5] = 8
    ledger.durable[1][1][5] = 6
    ledger.durable[1][1][6] = 3
    assert ledger.floor(1)[5:8].tolist() == [8, 3, 0]


# Readings after the first.


def test_a_difference_names_the_first_sector() -> None:
    reference = bytes(range(256)) * 8
    assert not difference(reference, reference)
    assert not difference(reference, reference[100:200], 100)
    assert "first 2:" in difference(reference, reference[:1024] + b"x" + reference[1025:])
    assert difference(reference, reference[:512] + b"x", 2000)


def test_a_zero_run_over_data_is_found() -> None:
    reference = bytes(1000) + b"x" + bytes(1000)
    assert not check_zero_runs(reference, [(0, 1000), (1001, 1000)])
    assert check_zero_runs(reference, [(0, 10), (990, 20)]).endswith("data at 1000")
