"""The qcow2 image format (versions 2 and 3) as pure code. It follows QEMU's document docs/interop/qcow2.rst.

header.py      the header, its extensions, features and limits
tables.py      L1 and L2 entries; a look-up turns them into plans
refcounts.py   refcounts of every width, references counted, a refcount structure laid out
compressed.py  one compressed cluster, unpacked within bounds
snapshots.py, bitmaps.py   the tables of internal snapshots and of bitmaps, as far as they refer to clusters
check.py       references against refcounts: corruptions and leaks; refcounts rebuilt
truncation.py  whether the file was cut short
create.py      a new image
steps.py       how the pure walks ask for bytes
"""
