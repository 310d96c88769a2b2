"""Numbers of the NBD protocol (its section "Values"), named as there without the NBD_ prefix; and the limits we keep.

Data only. Plain integers, because the transmission phase compares them for every request.
"""

from __future__ import annotations

import errno
import struct
from typing import Final

from fleecer.units import KiB, MiB

# Magic numbers.
INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

# Handshake flags; the client's flags have the same bits.
FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
EXPORT_NAME_PADDING_BYTES: Final = 124

# Transmission flags.
FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_ROTATIONAL: Final = 1 << 4
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

# Options.
OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11
OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "EXPORT_NAME",
    OPT_ABORT: "ABORT",
    OPT_LIST: "LIST",
    OPT_STARTTLS: "STARTTLS",
    OPT_INFO: "INFO",
    OPT_GO: "GO",
    OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
}

# Replies to options.
REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT + 1
REP_ERR_POLICY: Final = REP_ERROR_BIT + 2
REP_ERR_INVALID: Final = REP_ERROR_BIT + 3
REP_ERR_PLATFORM: Final = REP_ERROR_BIT + 4
REP_ERR_TLS_REQD: Final = REP_ERROR_BIT + 5
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT + 6
REP_ERR_SHUTDOWN: Final = REP_ERROR_BIT + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR_BIT + 8
REP_ERR_TOO_BIG: Final = REP_ERROR_BIT + 9
REP_ERROR_MEANINGS: Final = {
    REP_ERR_UNSUP: "it does not know the option",
    REP_ERR_POLICY: "its policy forbids it",
    REP_ERR_INVALID: "it takes the option for invalid",
    REP_ERR_PLATFORM: "its platform does not support it",
    REP_ERR_TLS_REQD: "it demands TLS first",
    REP_ERR_UNKNOWN: "it has no such export",
    REP_ERR_SHUTDOWN: "it is shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "it demands that block sizes are asked for",
    REP_ERR_TOO_BIG: "the request or its answer is too large",
}

# Items of information about an export.
INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

# Commands and their flags.
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
COMMAND_NAMES: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "write zeroes",
    CMD_BLOCK_STATUS: "block status",
}
CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

# Structured reply chunks.
REPLY_FLAG_DONE: Final = 1 << 0
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_ERROR_BIT: Final = 1 << 15
REPLY_TYPE_ERROR: Final = REPLY_TYPE_ERROR_BIT + 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_ERROR_BIT + 2

# Error values, and both translations between them and POSIX numbers ("Error values").
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108
ERROR_OF_ERRNO: Final = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.ENOTSUP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}
ERRNO_OF_ERROR: Final = {
    EPERM: errno.EPERM,
    EIO: errno.EIO,
    ENOMEM: errno.ENOMEM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.ENOTSUP,
    ESHUTDOWN: errno.ESHUTDOWN,
}

# Layouts, big-endian throughout.
U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
GREETING: Final = struct.Struct(">QQH")  # INIT_MAGIC, OPTION_MAGIC, handshake flags
OPTION: Final = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, type, length
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags
INFO_EXPORT_BODY: Final = struct.Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE_BODY: Final = struct.Struct(">HIII")  # type, minimum, preferred, maximum
REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")  # a chunk's header and the data's offset
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")  # a chunk's header, the hole's offset and size
HOLE_BODY: Final = struct.Struct(">QI")
ERROR_BODY: Final = struct.Struct(">IH")  # error, length of the message that follows
OFFSET: Final = struct.Struct(">Q")
EXTENT: Final = struct.Struct(">II")  # length, flags

# Limits. The first three are the protocol's, the others ours.
STRING_MAX_BYTES: Final = 4096
BLOCK_SIZE_MIN_MAX: Final = 64 * KiB
BLOCK_SIZE_PREFERRED_MIN: Final = 512
SIZE_MAX: Final = (1 << 63) - 1
PAYLOAD_MAX_BYTES: Final = 32 * MiB
OPTION_MAX_BYTES: Final = 64 * KiB
OPTIONS_MAX: Final = 128
OPTIONS_TOTAL_MAX_BYTES: Final = 1 * MiB
EXTENTS_SENT_MAX: Final = 128 * KiB
EXTENTS_TAKEN_MAX: Final = 1 * MiB
JOINED_MAX_BYTES: Final = 1 * KiB
"""Up to here a payload is copied behind its header; above, both are sent as two pieces of one gathered write."""
