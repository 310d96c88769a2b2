"""Mistakes above and around the graph: jobs, exports and connections, the NBD node, eager steps."""

from tests.mutants.mutant import Mutant

_BACKUP = "jobs/backup.py"
_CONNECTION = "export/connection.py"
_EXPORT = "export/export.py"
_NBD = "block/nodes/nbd.py"
_NBD_SERVER = "wire/nbd/server.py"
_EAGER = "eager.py"
_SERVER = "export/server.py"
_SENDS = "net/sends.py"
_STREAM = "net/stream.py"
_SENDS_TESTS = ("tests/unit/net/test_sends.py",)

MUTANTS = [
    Mutant(
        "target-readable-after-its-job",
        _BACKUP,
        """
            self.fleece.copier.break_snapshot(snapshot, f"fleecing job {quoted(self.job_id)} has ended")
""",
        """
            self.fleece.check_reads_by(None)
""",
        "a target whose job has ended answers errors: it would show the present",
    ),
    Mutant(
        "backup-done-before-flushed",
        _BACKUP,
        """
        await self._while_wanted(snapshot.scratch.flush())
""",
        "",
        "a full backup is durable when it is done",
    ),
    Mutant(
        "backup-leaves-the-rest-out",
        _BACKUP,
        """
            await copier.copy(start, length)
            if not""",
        """
            if not copier.must_preserve(start, length):
                await copier.copy(start, length)
            if not""",
        "a full backup holds the whole disk of its instant",
    ),
    Mutant(
        "flush-of-one-connection-only",
        _CONNECTION,
        """
            if request.command == CMD_FLUSH and self._begin_flush(request):
                return
""",
        """
            if request.command == CMD_FLUSH and "wrote" not in self.__dict__:
                self._in_flight += 1
                self._flush_ended(request, None)
                return
            self.wrote = True
""",
        "a flush covers the writes of every connection",
    ),
    Mutant(
        "answered-before-written",
        _CONNECTION,
        """
                await export.execute(request)
                spares.give(request.data)
                codec.reply_done(request)
""",
        """
                codec.reply_done(request)
                await export.execute(request)
                spares.give(request.data)
""",
        "a write is answered when it has ended",
    ),
    Mutant(
        "answers-lost-when-late",
        _CONNECTION,
        """
        if not self._send_due:
            self._send_due = True
            asyncio.get_running_loop().call_soon(self._send_and_go_on)
""",
        """
        self._settle()
""",
        "every request gets a reply",
    ),
    Mutant(
        "reads-begun-while-refusing",
        _CONNECTION,
        """
                if length and request.command == CMD_READ and not self._refusing:
""",
        """
                if length and request.command == CMD_READ:
""",
        "a connection that is going begins nothing new",
        tests=("tests/unit/export/test_at_once.py::test_no_read_is_begun_any_more_when_the_server_stops",),
    ),
    Mutant(
        "flushes-begun-while-refusing",
        _CONNECTION,
        """
        if request.error or self._refusing:
            return False
        export = self.export
""",
        """
        if request.error:
            return False
        export = self.export
""",
        "a connection that is going begins nothing new",
        tests=(
            "tests/unit/export/test_at_once.py::test_a_server_stops_only_after_a_flush_that_was_begun_and_begins_no_other",
        ),
    ),
    Mutant(
        "fua-ignored",
        _EXPORT,
        """
        fua = flags & CMD_FLAG_FUA != 0
""",
        """
        fua = False
""",
        "a request with FUA is durable when it is answered",
        # Our own client has no FUA, it flushes instead; so the simulation never sends it.
        tests=("tests/unit/export/test_connection.py::test_fua_is_answered_only_after_a_flush",),
    ),
    Mutant(
        "at-once-found-once-for-all",
        _CONNECTION,
        """
            tried, is_found = False, False
""",
        """
            tried = False
""",
        "what reads and writes at once is found anew after a request that may have changed it",
        # It takes two requests in one piece, of which the first has to wait: the simulation's guests ask one by one.
        tests=("tests/unit/export/test_at_once.py::test_what_is_done_at_once_waits_for_what_was_asked_before_it",),
    ),
    Mutant(
        "replies-in-a-row-given-back-while-queued",
        _CONNECTION,
        """
        if stream.queued_bytes and not queued_bytes:
            self._sending.append((stream.sent_bytes, replies))
        else:
            spares.give(replies)
""",
        """
        spares.give(replies)
""",
        "no buffer is used again before the kernel has taken it",
        tests=("tests/unit/export/test_at_once.py::test_short_replies_that_a_client_has_not_read_yet_do_not_change",),
    ),
    Mutant(
        "failure-at-once-not-answered",
        _CONNECTION,
        """
        if at_once.failed is not None:
            self._fail(*at_once.failed)
""",
        "",
        "every request gets one final reply, also one that failed at once",
        # The simulation's guests write one by one, and with its faults they mostly have to wait.
        tests=(
            "tests/unit/export/test_at_once.py::test_a_write_that_fails_at_once_is_answered_so_and_those_around_it_are_done",
        ),
    ),
    Mutant(
        "done-at-once-whoever-comes-before",
        _NBD_SERVER,
        """
                    if not write(offset, view[data_start:data_end]):
                        at_once.tried = True
                        break
""",
        """
                    if not write(offset, view[data_start:data_end]):
                        start = data_end
                        continue
""",
        "every request is answered, also one that is not done at once",
    ),
    Mutant(
        "requests-behind-a-long-read-lost",
        _CONNECTION,
        """
                if self._waiting:
                    self._leave(requests[index + 1 :])
                    break
                is_found = False
""",
        """
                if self._waiting:
                    break
                is_found = False
""",
        "every request is answered, also behind a long read that its client does not read",
        # The simulation's clients read all that they asked for before they ask again.
        tests=("tests/unit/export/test_connection.py::test_requests_behind_a_long_read_keep_order_when_it_is_held_up",),
    ),
    Mutant(
        "flush-not-sent",
        _NBD,
        """
                await self._client.flush()
            except IoError as error:
""",
        """
                self._client.can_flush
            except IoError as error:
""",
        "a flush of an NBD node is one of its server",
    ),
    Mutant(
        "task-not-told-that-it-waits",
        _EAGER,
        """
        _mark(self._awaited, being_awaited=True)
        return self._awaited
""",
        """
        return self._awaited
""",
        "a coroutine that was stepped at once goes on when what it waits for is there",
    ),
    Mutant(
        "backup-done-though-its-flush-failed",
        _BACKUP,
        """
        if self._failure is not None:
            raise self._failure
""",
        "",
        "a backup whose copying, or whose flush, failed has failed",
    ),
    Mutant(
        "removed-export-drops-its-clients",
        _SERVER,
        """
        await asyncio.gather(*(client.stop() for client in clients))
""",
        """
        for client in clients:
            client.drop()
""",
        "requests in flight on an export that is removed end, and are answered",
        tests=(
            "tests/unit/export/test_connection.py::test_what_comes_while_a_client_is_sent_away_is_refused_not_forgotten",
        ),
    ),
    Mutant(
        "failed-flush-of-a-server-forgotten",
        _NBD,
        """
                self._poison = self._poison or error
""",
        """
                raise IoError(error.errno, self.name, "flush", detail=told(error)) from error
""",
        "the first failed flush is final, whatever the server says to the next",
        tests=(
            "tests/unit/block/nodes/test_nbd.py::test_the_first_failed_flush_is_final_whatever_the_server_says_later",
        ),
    ),
    Mutant(
        "cancelled-backup-passes-for-whole",
        _BACKUP,
        """
        self._complete = not self._over.done()
""",
        """
        self._complete = True
""",
        "a target over the disk may be read after its job only if it has got the whole disk",
        tests=(
            "tests/unit/jobs/test_backup.py::test_a_full_backup_that_is_cancelled_stops_soon_and_leaves_the_disk_alone",
        ),
    ),
    Mutant(
        "reply-buffer-given-back-while-queued",
        _CONNECTION,
        """
        sending, taken = self._sending, self.stream.taken_bytes
""",
        """
        sending, taken = self._sending, self.stream.sent_bytes
""",
        "a reply's buffer is used again only when the kernel has taken it",
    ),
    Mutant(
        "bytes-of-reads-stay-counted",
        _CONNECTION,
        """
        self._in_flight_bytes -= held_bytes
""",
        """
        self._in_flight_bytes -= len(request.data)
""",
        "what has ended holds no request up",
        tests=("tests/unit/export/test_connection.py::test_requests_in_flight_are_bounded_by_bytes",),
    ),
    Mutant(
        "fua-answered-when-written",
        _CONNECTION,
        """
        if request.flags & CMD_FLAG_FUA:  # from here on it is no more than a flush
""",
        """
        if False:
""",
        "a write with FUA is answered when it is durable",
        tests=(
            "tests/unit/export/test_at_once.py::test_a_write_with_fua_fails_where_what_was_written_cannot_be_made_durable",
        ),
    ),
    Mutant(
        "memory-free-while-sent-aside",
        _STREAM,
        """
        return self._aside_at if self._aside else self.sent_bytes - self.queued_bytes
""",
        """
        return self.sent_bytes - self.queued_bytes
""",
        "a reply's buffer is used again only when the kernel has taken it",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "send-overtakes-what-is-sent-aside",
        _STREAM,
        """
        if self._queue or self._aside:
            self._enqueue(pieces)
""",
        """
        if self._queue:
            self._enqueue(pieces)
""",
        "bytes are sent in the order of send",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "close-forgets-what-is-sent-aside",
        _STREAM,
        """
            if not self._queue and not self._aside:
                self._end_in_order(self._sock)
""",
        """
            if not self._queue:
                self._end_in_order(self._sock)
""",
        "what was sent before close reaches the peer before its end",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "ended-while-the-kernel-sends",
        _STREAM,
        """
        if self._aside:
            with contextlib""",
        """
        if False:
            with contextlib""",
        "a stream has ended when the memory of what it sent is free",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "rest-of-what-was-sent-aside-is-lost",
        _STREAM,
        """
        rest = _after(pieces, max(0, result))
""",
        """
        rest = _after(pieces, max(0, result)) if result < 0 else []
""",
        "what the kernel had no room for is sent next",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "number-free-while-the-kernel-sends",
        _STREAM,
        """
                sock.shutdown(socket.SHUT_RDWR)
""",
        """
                sock.close()
""",
        "what was for one client reaches no other: its socket keeps its number until the kernel has sent",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "ring-used-untried",
        _SENDS,
        """
        self._is_refused = self._is_refused or result != -errno.EAGAIN
""",
        "",
        "no reply is entrusted to a ring that has no workers",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "trial-closed-while-it-goes-on",
        _SENDS,
        """
        if not self._users and self._ring is not None and self._trial is None:
""",
        """
        if not self._users and self._ring is not None:
""",
        "the sockets of a trial keep their numbers until it has ended",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "failed-worker-asked-again",
        _SENDS,
        """
                self._is_refused = True
            loop.call_soon""",
        """
                pass
            loop.call_soon""",
        "where workers fail, the loop sends",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "refused-message-stays-in-the-ring",
        _SENDS,
        """
        words[self._tail] = tail  # it was not taken
""",
        "",
        "what the loop sends itself is not sent once more",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "worker-waits-for-who-does-not-read",
        _SENDS,
        """
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
""",
        """
            socket.MSG_NOSIGNAL,
""",
        "what is begun ends soon, whether or not its reader reads",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "two-sends-in-one-slot",
        _SENDS,
        """
        self._free.pop()
""",
        "",
        "what the kernel is told of a send stays until that has ended",
        tests=_SENDS_TESTS,
    ),
    Mutant(
        "aside-though-somebody-is-latency-bound",
        _SERVER,
        """
        return self.turn_bytes >= LONG_TURN_BYTES and not self._shared_turns
""",
        """
        return True
""",
        "no worker takes a processor while somebody else is there who asks for little",
        tests=("tests/unit/export/test_connection.py",),
    ),
    Mutant(
        "turns-at-once-without-limit",
        _SERVER,
        """
        for _ in range(TURNS_MAX):
""",
        """
        while True:
""",
        "who asks for much does not make up for all that others ever took at once",
        tests=("tests/unit/export/test_connection.py",),
    ),
    Mutant(
        "short-turns-at-once",
        _SERVER,
        """
        if self.turn_bytes >= LONG_TURN_BYTES:
            until_s""",
        """
        if True:
            until_s""",
        "who asks for little waits for one short turn",
        tests=("tests/unit/export/test_connection.py",),
    ),
]
