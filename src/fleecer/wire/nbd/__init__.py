"""The NBD protocol, both roles, in memory only.

`ServerCodec` and `ClientCodec` own the buffer that bytes are received into and the list of buffers to be sent. Their
owner moves bytes between those and a socket, and does what the parsed requests ask:

    room = codec.receive_buffer()        # receive some bytes into it
    for request in codec.received(n):    # then parse; replies to options are in codec.outgoing already
        codec.reply_done(request)
    send(codec.outgoing); codec.outgoing.clear()
    if codec.finished: ...               # nothing more is parsed; codec.failure tells whether the peer broke a rule

The rules are those of the protocol document (doc/proto.md of the NBD project), cited by section and name in the code.
Fixed newstyle only, with structured replies, metadata contexts and block sizes; no TLS and no extended headers.
"""

from fleecer.wire.nbd.client import ClientCodec
from fleecer.wire.nbd.messages import Catalogue, ExportInfo, ExportUnknown, Reply, Request
from fleecer.wire.nbd.server import AtOnce, ServerCodec

__all__ = ["AtOnce", "Catalogue", "ClientCodec", "ExportInfo", "ExportUnknown", "Reply", "Request", "ServerCodec"]
