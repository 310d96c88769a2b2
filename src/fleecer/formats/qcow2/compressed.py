"""One compressed cluster, unpacked within bounds (qcow2.rst, "Compressed Clusters Descriptor", "compression_type").

Invariants: no more than one cluster and one byte of output is ever made, whatever the input says; a zstd frame that
wants a larger window than the largest cluster is refused. Only an output of exactly one cluster is accepted.
"""

from __future__ import annotations

import sys
import zlib

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2.header import CLUSTER_BITS_MAX, COMPRESSION_ZSTD
from fleecer.ranges import Buffer

_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: CLUSTER_BITS_MAX}


def unpack_cluster(data: Buffer, cluster_size: int, compression_type: int, path: str, host_offset: int) -> bytes:
    """The cluster packed at the start of `data`; what follows in its last sector is another's and ignored.

    `host_offset` is for messages. Raises CorruptImage if the data is damaged or not exactly one cluster.
    """
    try:
        if compression_type == COMPRESSION_ZSTD:
            unpacked = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS).decompress(bytes(data), cluster_size + 1)
        else:
            unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size + 1)
    except (zlib.error, zstd.ZstdError) as error:
        raise CorruptImage(path, f"compressed cluster at {host_offset} cannot be unpacked: {error}") from error
    if len(unpacked) > cluster_size:
        raise CorruptImage(path, f"compressed cluster at {host_offset} expands beyond the cluster size {cluster_size}")
    if len(unpacked) < cluster_size:
        problem = (
            f"compressed cluster at {host_offset} holds {len(unpacked)} bytes, not the cluster size {cluster_size}"
        )
        raise CorruptImage(path, problem)
    return unpacked
