"""The judge of a simulation: what it allows, and what it must not."""

from __future__ import annotations

import pytest

from fleecer.testing.sim.oracle import SECTOR_BYTES, Change, History, SnapshotOracle, Violation, read_stamp, stamp


def written(history: History, first: int = 0, end: int = 1) -> Change:
    """A write that has begun and returned."""
    change = history.begin(first, end)
    history.finish(change)
    return change


def allowed(history: History, sector: int = 0) -> set[int]:
    """What a read that begins now may give."""
    return history.allowed(sector, history.begin_read())


def test_a_stamp_tells_the_write_and_the_place() -> None:
    assert len(stamp(7, 3)) == SECTOR_BYTES
    assert read_stamp(stamp(7, 3), 3) == 7
    assert read_stamp(bytes(SECTOR_BYTES), 3) == 0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(stamp(7, 4), id="of another sector"),
        pytest.param(stamp(7, 3)[:256] + stamp(8, 3)[256:], id="torn"),
        pytest.param(bytes(16) + stamp(7, 3)[16:], id="begins with zeroes"),
        pytest.param(stamp(7, 3)[:-1] + b"\x01", id="one bit is wrong"),
    ],
)
def test_a_sector_that_no_write_left_so_is_a_violation(data: bytes) -> None:
    with pytest.raises(Violation, match="torn or not its own"):
        read_stamp(data, 3)


def test_a_write_that_returned_replaces_what_was_before() -> None:
    history = History(1)
    assert allowed(history) == {0}
    first = written(history)
    assert allowed(history) == {first.number}


def test_while_a_write_is_under_way_both_are_possible() -> None:
    history = History(1)
    history.begin(0, 1)
    assert allowed(history) == {0, 1}


def test_of_two_writes_at_the_same_time_either_may_be_the_last() -> None:
    history = History(1)
    one, other = history.begin(0, 1), history.begin(0, 1)
    history.finish(other)
    history.finish(one)
    assert allowed(history) == {one.number, other.number}


def test_a_read_may_give_what_was_replaced_while_it_ran_but_not_before() -> None:
    history = History(1)
    old = written(history)
    began = history.begin_read()
    new = written(history)
    assert history.allowed(0, began) == {old.number, new.number}
    history.check_read(0, stamp(old.number, 0), began)
    with pytest.raises(Violation, match=r"reads as write 1; allowed: \[2\]"):
        history.check_read(0, stamp(old.number, 0), history.begin_read())


def test_a_failed_write_may_show_or_not_for_ever_and_replaces_nothing() -> None:
    history = History(1)
    old = written(history)
    history.finish(failed := history.begin(0, 1), failed=True)
    assert allowed(history) == {old.number, failed.number}
    new = written(history)
    assert allowed(history) == {failed.number, new.number}


def test_a_discard_keeps_or_zeroes_and_zeroing_only_zeroes() -> None:
    history = History(1)
    old = written(history)
    history.finish(history.begin(0, 1, discard=True))
    assert allowed(history) == {0, old.number}
    history.finish(history.begin(0, 1, zero=True))
    assert allowed(history) == {0}


def test_a_snapshot_has_what_had_returned_and_one_answer_for_ever() -> None:
    history = History(2)
    written(history, 0, 2)
    history.begin(0, 1)  # held back above the disk: not in it
    oracle = SnapshotOracle("s", history.image())
    oracle.check_read(0, stamp(1, 0) + stamp(1, 1))
    with pytest.raises(Violation, match="sector 0 reads as 2; at its instant it was"):
        oracle.check_read(0, stamp(2, 0))


def test_where_the_answer_is_on_the_way_a_snapshot_may_have_it_but_not_now_and_then() -> None:
    history = History(1)
    history.begin(0, 1)
    oracle = SnapshotOracle("s", history.image(answers_on_the_way=True))
    oracle.check_read(0, stamp(1, 0))
    with pytest.raises(Violation):
        oracle.check_read(0, bytes(SECTOR_BYTES))


def test_a_status_that_says_zero_where_data_is_is_a_violation() -> None:
    history = History(2)
    written(history, 1, 2)
    oracle = SnapshotOracle("s", history.image())
    oracle.check_zero(0, SECTOR_BYTES)
    with pytest.raises(Violation, match="sector 1 is said to be zero"):
        oracle.check_zero(0, 2 * SECTOR_BYTES)


class Cut:
    """A history whose clock is set by hand."""

    def __init__(self) -> None:
        self.moment = 0
        self.history = History(1)
        self.history.clock = lambda: self.moment

    def write(self) -> Change:
        """A write at the next moment."""
        self.moment += 1
        return written(self.history)

    def flush(self) -> None:
        """A flush at the next moment."""
        covered = self.history.begin_flush()
        self.moment += 1
        self.history.finish_flush(covered)

    def survives(self, number: int, moment: int | None = None) -> bool:
        """Whether a power cut may leave that write."""
        try:
            self.history.check_after_cut(self.moment if moment is None else moment, stamp(number, 0))
        except Violation:
            return False
        return True


def test_before_a_flush_a_power_cut_may_take_a_write_and_after_it_not() -> None:
    cut = Cut()
    cut.write()
    assert cut.survives(0)
    assert cut.survives(1)
    cut.flush()
    assert not cut.survives(0)
    assert cut.survives(1)
    assert cut.survives(0, moment=1)
    assert cut.history.flushes_before(1) == 1  # the sector's beginning, which is durable
    assert cut.history.flushes_before(cut.moment) == 2


def test_a_flush_covers_what_had_returned_when_it_was_called() -> None:
    cut = Cut()
    covered = cut.history.begin_flush()
    cut.write()
    cut.history.finish_flush(covered)
    assert cut.survives(0)


def test_what_began_after_the_cut_is_not_there() -> None:
    cut = Cut()
    cut.write()
    cut.write()
    assert not cut.survives(2, moment=1)
