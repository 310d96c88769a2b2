"""Fakes and checks for those who test what they build on Fleecer, and for Fleecer's own tests.

memory.py has storages and nodes in memory, one of them faulty; streams.py joins two byte streams in memory;
conformance.py runs any node through its contract.
"""
