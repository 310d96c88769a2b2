"""Disk image formats as pure code: bytes to values, values to bytes, and the formats' rules. Nothing here does I/O."""
