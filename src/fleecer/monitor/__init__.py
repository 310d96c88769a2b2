"""The monitor: QMP over unix sockets, one typed function a command."""

from fleecer.monitor.server import MonitorServer

__all__ = ["MonitorServer"]
