"""Bytes on files and block devices: the only place that reads, writes, locks and syncs images."""
