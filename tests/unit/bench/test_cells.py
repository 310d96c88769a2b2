"""The list of cells and how it is chosen from."""

from __future__ import annotations

from bench.cells import all_cells, chosen
from bench.figures import LIMIT


def test_names_are_unique_and_end_in_format_and_place() -> None:
    names = [cell.name for cell in all_cells()]
    assert len(set(names)) == len(names)
    for cell in all_cells():
        _, kind, place = cell.name.split("/")
        assert kind in ("raw", "qcow2", "overlay")
        assert place == cell.place


def test_every_cell_has_fleecer_and_a_peer_or_a_limit() -> None:
    for cell in all_cells():
        assert {"fleecer", "qsd"} <= set(cell.families), cell.name
        assert cell.measures, cell.name


def test_there_are_ten_headlines_each_a_measure_with_an_aim() -> None:
    telling = chosen(all_cells(), [], quick=True)
    assert len(telling) == 10
    for cell in telling:
        (measure,) = [measure for measure in cell.measures if measure.name == cell.headline]
        assert {"qsd", LIMIT} & set(measure.aims), cell.name


def test_cold_runs_are_made_on_disks_only() -> None:
    assert {cell.place for cell in all_cells() if cell.name.startswith("cold-")} == {"disk"}


def test_small_requests_aim_at_three_times_for_reads_and_on_tmpfs_and_at_twice_else() -> None:
    aims = {cell.name: cell.measures[0].aims["qsd"] for cell in all_cells() if "4k" in cell.name}
    assert aims["randread-4k-depth-16/raw/disk"] == 3
    assert aims["randwrite-4k-depth-16/raw/disk"] == 2
    assert aims["randwrite-4k-depth-16/raw/tmpfs"] == 3
    assert aims["randread-4k-depth-1/qcow2/tmpfs"] == 1


def test_a_pattern_takes_the_cells_that_have_it_in_their_names() -> None:
    assert [cell.name for cell in chosen(all_cells(), ["memory/"], quick=False)] == ["memory/qcow2/disk"]
    assert chosen(all_cells(), ["no-such"], quick=False) == []
    cold = chosen(all_cells(), ["cold-*raw"], quick=False)
    assert [cell.name for cell in cold] == ["cold-read/raw/disk", "cold-randread/raw/disk"]
