"""Our monitor with QEMU's own QMP client library (which sends no line ends)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from fleecer.daemon import Daemon
from fleecer.monitor import MonitorServer
from fleecer.storage.pool import running_pool
from fleecer.units import MiB

pytestmark = pytest.mark.peer


async def test_qemus_client_library_drives_a_fleecing_job(tmp_path: Path) -> None:
    for name in ("disk", "target"):
        with (tmp_path / f"{name}.raw").open("wb") as file:
            file.truncate(MiB)
    quitting = asyncio.Event()
    async with Daemon(raise_internal_errors=True) as daemon:
        monitor = MonitorServer(daemon, quitting.set)
        monitor.listen_unix(str(tmp_path / "qmp"))
        client = QMPClient("test")
        await client.connect(str(tmp_path / "qmp"))
        statuses: list[str] = []
        listener = EventListener(names=("JOB_STATUS_CHANGE",))

        async def execute(command: str, **arguments: Any) -> Any:
            return await client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

        with client.listen(listener):
            assert (await execute("query-version"))["package"].startswith("fleecer-")
            for name in ("disk", "target"):
                filename = str(tmp_path / f"{name}.raw")
                await execute("blockdev-add", driver="file", node_name=name, filename=filename)
            socket = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
            await execute("nbd-server-start", addr=socket)
            await execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
            await execute(
                "blockdev-backup", device="disk", target="target", sync="none", job_id="j", auto_dismiss=False
            )
            assert [job["status"] for job in await execute("query-jobs")] == ["running"]
            with pytest.raises(ExecuteError, match="node 'target' is in use by job 'j'") as caught:
                await execute("blockdev-del", node_name="target")
            assert caught.value.error_class == "GenericError"
            with pytest.raises(ExecuteError, match="has not been found") as caught:
                await execute("x-nothing")
            assert caught.value.error_class == "CommandNotFound"
            asked: list[asyncio.Task[Any]] = [
                asyncio.ensure_future(execute(name)) for name in ("query-jobs", "query-block-exports")
            ]
            assert [(await answer)[0]["id"] for answer in asked] == ["j", "e"]
            await execute("job-cancel", id="j")
            await execute("job-dismiss", id="j")
            while statuses[-1:] != ["null"]:
                event: Any = await listener.get()
                statuses.append(event["data"]["status"])
        assert statuses == ["created", "running", "aborting", "concluded", "null"]
        await execute("quit")
        await quitting.wait()
        await client.disconnect()
        await monitor.close()
    await running_pool().close()
