"""Power cuts at every moment of small workloads: every medium is sound, and a wrong order of writes is found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.qcow2_world import checked, qemu_check
from tests.sim.breaks import BREAKS

from fleecer.testing.memory import MemoryStorage
from fleecer.testing.sim.powercut import SETTINGS, Setting, Workload, judge_workload, workloads

EVERY = 40
PARTS = 4
"""One in `EVERY` workloads of three operations, always the same. `python -m fleecer.testing.sim --cuts 3` tries all."""

ORDERS: dict[str, Workload] = {
    "maps reach the file before counts": Workload("fresh", ("write 0 8", "flush"), at_once=False),
    "no flush between data and maps": Workload("snapshot", ("write 4 12", "flush"), at_once=False),
    "no flush at the end": Workload("fresh", ("write 0 8", "flush"), at_once=False),
    "freed clusters are used at once": Workload("snapshot", ("discard 0 8", "flush"), at_once=False),
}
"""Rules of the order of writes, and a workload that shows the absence of each."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_power_cut_in_one_operation_leaves_what_was_flushed_and_a_sound_image(setting: Setting) -> None:
    media = 0
    for workload in workloads(1):
        if workload.setting == setting:
            judged = judge_workload(workload)
            assert not judged.error, f"{workload}: {judged.error}"
            media += judged.states
    assert media > 60, "hardly any medium was judged"


@pytest.mark.parametrize("part", range(PARTS))
def test_a_power_cut_in_three_operations_leaves_what_was_flushed_and_a_sound_image(part: int) -> None:
    for workload in list(workloads(3))[::EVERY][part::PARTS]:
        judged = judge_workload(workload)
        assert not judged.error, f"{workload}: {judged.error}"


@pytest.mark.parametrize(("rule", "workload"), ORDERS.items(), ids=list(ORDERS))
def test_a_wrong_order_of_writes_is_found(rule: str, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not judge_workload(workload).error
    BREAKS[rule](monkeypatch)
    assert judge_workload(workload).error, "it was not found out"


QCOW2: tuple[Setting, ...] = ("fresh", "backing", "snapshot")


def sampled(broken: bool) -> list[bytearray]:
    """Media of some workloads: one in thirty, and of each workload the last, which is the bad one if there is any."""
    media: list[bytearray] = []
    for setting in QCOW2:
        for operations in (("write 0 8", "flush"), ("zero 0 16", "write 4 12"), ("discard 0 8", "write 0 8", "flush")):
            seen: list[bytearray] = []
            judged = judge_workload(Workload(setting, operations, at_once=False), look=seen.append)
            assert broken or not judged.error
            media += [*seen[::30], seen[-1]]
    return media


@pytest.mark.peer
@pytest.mark.parametrize("broken", [False, True])
def test_qemu_img_finds_corruption_where_our_check_does_and_nowhere_else(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if broken:
            BREAKS["maps reach the file before counts"](patch)
        media = sampled(broken)
    verdicts = set()
    for medium in media:
        ours = asyncio.run(checked(MemoryStorage(bytes(medium)))).corruptions > 0
        corruptions, _ = qemu_check(medium, tmp_path)
        assert (corruptions > 0) == ours
        verdicts.add(ours)
    assert verdicts == ({False, True} if broken else {False})
    assert len(media) >= 20
