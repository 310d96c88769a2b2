"""The qcow2 node: a disk image with allocation on demand, snapshots and a backing node, over a file node.

opening.py    open, create, check
node.py       the requests, their claims, and what can be done at once
reading.py    look-up in the tables, and what it leads to
writing.py    in place and to new clusters, copy-on-write, zero and discard, new tables
image.py      what the parts share: file, header, L1 table, the end of writing after a failure
metadata.py   the bounded cache of table slices
allocator.py  refcounts: free and used host clusters
commit.py     metadata on its way to the file, in the order that survives a power cut
"""

from fleecer.block.nodes.qcow2.node import Qcow2Node
from fleecer.block.nodes.qcow2.opening import check_qcow2, create_qcow2, open_qcow2, read_header

__all__ = ["Qcow2Node", "check_qcow2", "create_qcow2", "open_qcow2", "read_header"]
