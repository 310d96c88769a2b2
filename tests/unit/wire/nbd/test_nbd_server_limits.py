"""What a hostile client can make the server's codec hold: lengths are checked before memory is taken."""

from __future__ import annotations

import errno
import tracemalloc

import pytest
from tests.nbd_world import HELLO, Shelf, entering, feed, info_option, option, option_replies, request, sent

from fleecer.errors import RemoteProtocolError
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ExportInfo, ServerCodec
from fleecer.wire.nbd import constants as nbd

DISK = ExportInfo(name="disk", size=1 << 40, read_only=False)
FROZEN = ExportInfo(name="frozen", size=1 << 40, read_only=True)


def negotiating() -> ServerCodec:
    codec = ServerCodec(Shelf(DISK, FROZEN))
    feed(codec, HELLO)
    sent(codec)
    return codec


def transmitting(name: str = "disk") -> ServerCodec:
    codec = ServerCodec(Shelf(DISK, FROZEN))
    feed(codec, entering(name))
    sent(codec)
    return codec


def failure(codec: ServerCodec) -> str:
    assert codec.finished
    assert isinstance(codec.failure, RemoteProtocolError)
    return str(codec.failure)


def test_an_option_of_64_kib_is_read_and_a_longer_one_ends_the_session_at_its_header() -> None:
    codec = negotiating()
    feed(codec, option(77, bytes(64 * KiB)))
    assert [reply.kind for reply in option_replies(sent(codec))] == [nbd.REP_ERR_UNSUP]
    assert not codec.finished
    feed(codec, nbd.OPTION.pack(nbd.OPTION_MAGIC, 77, 64 * KiB + 1))
    assert "65537 bytes, the limit is 65536" in failure(codec)


@pytest.mark.parametrize("number", range(16))
def test_an_option_of_four_gib_takes_no_memory(number: int) -> None:
    codec = negotiating()
    tracemalloc.start()
    feed(codec, nbd.OPTION.pack(nbd.OPTION_MAGIC, number, 0xFFFFFFFF))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "4294967295 bytes" in failure(codec)
    assert peak < 64 * KiB


def test_the_129th_option_ends_the_session() -> None:
    codec = negotiating()
    feed(codec, option(nbd.OPT_LIST) * 128)
    assert not codec.finished
    feed(codec, option(nbd.OPT_LIST))
    assert "more than 128 options" in failure(codec)


def test_a_mebibyte_of_options_ends_the_session() -> None:
    codec = negotiating()
    feed(codec, option(77, bytes(64 * KiB)) * 16)
    assert not codec.finished
    feed(codec, option(77, b"x"))
    assert "more than 1048576 bytes" in failure(codec)


def test_a_half_open_connection_holds_little() -> None:
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    codecs = [negotiating() for _ in range(20)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (after - before) / len(codecs) < 8 * KiB


def test_a_write_of_32_mib_is_taken_and_a_longer_one_ends_the_session_at_its_header() -> None:
    codec = transmitting()
    (write,) = feed(codec, request(nbd.CMD_WRITE, 0, data=bytes(32 * MiB)))
    assert len(write.data) == 32 * MiB
    tracemalloc.start()
    feed(codec, request(nbd.CMD_WRITE, 0, 32 * MiB + 1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "the limit is 33554432" in failure(codec)
    assert peak < 64 * KiB


def test_a_read_of_four_gib_is_refused_without_memory_for_it() -> None:
    codec = transmitting()
    tracemalloc.start()
    (read,) = feed(codec, request(nbd.CMD_READ, 0, 0xFFFFFFFF))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.error == errno.EINVAL
    assert peak < 64 * KiB


def test_the_payload_of_a_refused_write_is_consumed_and_forgotten() -> None:
    codec = transmitting("frozen")
    for size in (100, 300 * KiB):
        write, flush = feed(codec, request(nbd.CMD_WRITE, 0, data=b"x" * size) + request(nbd.CMD_FLUSH))
        assert write.error == errno.EPERM
        assert len(write.data) == 0
        assert flush.command == nbd.CMD_FLUSH


@pytest.mark.parametrize("character", ["n", "é", "€", "😀"])
def test_an_error_text_is_cut_between_characters_at_4096_bytes(character: str) -> None:
    codec = transmitting()
    (read,) = feed(codec, request(nbd.CMD_READ, 0, 1))
    codec.reply_error(read, errno.EIO, "x" + character * 5000)
    data = sent(codec)
    error, length = nbd.ERROR_BODY.unpack_from(data, nbd.CHUNK.size)
    text = data[nbd.CHUNK.size + nbd.ERROR_BODY.size :]
    assert error == nbd.EIO
    assert 4093 <= length == len(text) <= 4096
    assert text.decode() == "x" + character * ((length - 1) // len(character.encode()))


def test_an_error_text_with_nul_or_half_a_surrogate_is_made_legal() -> None:
    codec = transmitting()
    (read,) = feed(codec, request(nbd.CMD_READ, 0, 1))
    codec.reply_error(read, errno.EIO, "a\0b\ud800c")
    assert sent(codec).endswith(b"a b?c")


@pytest.mark.parametrize("size", [4096, 4097])
def test_every_refusal_of_the_longest_name_fits_the_protocol(size: int) -> None:
    codec = negotiating()
    feed(codec, info_option(nbd.OPT_GO, "\x01" * size))
    (reply,) = option_replies(sent(codec))
    assert reply.kind in (nbd.REP_ERR_UNKNOWN, nbd.REP_ERR_INVALID)
    assert 0 < len(reply.data) <= 4096
    assert reply.data.decode().isprintable()
