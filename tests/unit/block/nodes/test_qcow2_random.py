"""Random concurrent requests on qcow2 nodes of many geometries, against a model in memory and three judges."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.qcow2_world import Model, checked, guest, new_image, open_image, qemu_check

from fleecer.testing.memory import MemoryStorage, random_turns

GEOMETRIES: list[tuple[int, dict[str, Any], int | None]] = [
    # size, how to create it, length of the backing file
    (300_317, {"cluster_size": 512}, None),
    (300_317, {"cluster_size": 512, "refcount_bits": 64}, 100_000),
    (1_200_000, {"cluster_size": 512, "refcount_bits": 1}, 1_500_000),
    (2_000_000, {"cluster_size": 4096, "refcount_bits": 1}, None),
    (2_000_000, {"cluster_size": 4096, "refcount_bits": 2, "version": 3}, 700_001),
    (2_000_000, {"cluster_size": 4096, "version": 2}, None),
    (2_000_000, {"cluster_size": 4096, "version": 2}, 2_100_000),
    (5_000_000, {"cluster_size": 65536, "refcount_bits": 64}, 3_000_000),
    (5_000_000, {"cluster_size": 65536, "refcount_bits": 4, "lazy_refcounts": True}, None),
    (2_000_317, {"cluster_size": 16384, "extended_l2": True}, None),
    (2_000_317, {"cluster_size": 16384, "extended_l2": True}, 1_300_001),
    (5_000_000, {"cluster_size": 65536, "extended_l2": True, "refcount_bits": 1}, 6_000_000),
]


@pytest.mark.peer
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(("size", "options", "backed"), GEOMETRIES)
async def test_random_requests_leave_what_the_model_says(
    size: int, options: dict[str, Any], backed: int | None, paused: bool, tmp_path: Path
) -> None:
    seed = size ^ options["cluster_size"] ^ (backed or 0) ^ paused
    below = None if backed is None else random.Random(seed).randbytes(backed)
    if below is not None:
        options = {**options, "backing_file": "base.raw", "backing_format": "raw"}
        (tmp_path / "base.raw").write_bytes(below)
    storage = await new_image(size, **options)
    backing = None if below is None else MemoryStorage(below, name="backing", read_only=True)
    model = Model((below or b"")[:size].ljust(size, b"\0"), seed)
    for reopened in range(3):
        if paused:
            storage.pause = random_turns(seed + reopened, 2)
        # Small caches: slices are dropped, and commits forced.
        caches: dict[str, Any] = {"l2_cache_bytes": 32768, "refcount_cache_bytes": 16384} if reopened else {}
        node = await open_image(storage, backing=backing, discard_freed=reopened == 1, **caches)
        for _ in range(8 if paused else 25):
            await model.round(guest(node), 8, 12 * options["cluster_size"])
        await model.compare(guest(node))
        await node.close()
        storage.pause = None
        report = await checked(storage)
        assert (report.corruptions, report.leaks) == (0, 0), report.messages
        assert qemu_check(storage.data, tmp_path) == (0, 0)
    node = await open_image(storage, backing=backing, read_only=True)
    await model.compare(guest(node))
