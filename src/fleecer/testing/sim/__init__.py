"""Simulation: the real code, on a loop with virtual time, over disks and networks that fail as a seed says."""
