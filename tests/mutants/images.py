"""Mistakes in what stores data: the file node and the qcow2 node."""

from tests.mutants.mutant import Mutant

_FILE = "block/nodes/file.py"
_FILE_STORAGE = "storage/file.py"
_NODE = "block/nodes/qcow2/node.py"
_WRITING = "block/nodes/qcow2/writing.py"
_SUBCLUSTERS = "block/nodes/qcow2/subclusters.py"
_COMMIT = "block/nodes/qcow2/commit.py"
_ALLOCATOR = "block/nodes/qcow2/allocator.py"
_METADATA = "block/nodes/qcow2/metadata.py"

MUTANTS = [
    Mutant(
        "sync-covers-what-came-meanwhile",
        _FILE,
        """
            self._synced = covered
""",
        """
            self._synced = self._changes
""",
        "a flush covers what had returned when it began",
    ),
    Mutant(
        "joins-the-sync-that-runs",
        _FILE,
        """
        heard = [ended for wanted, ended in self._flushes if wanted <= covered]
""",
        """
        heard = [ended for wanted, ended in self._flushes]
""",
        "a flush that comes while one runs shares the next one",
    ),
    Mutant(
        "failed-sync-forgotten",
        _FILE,
        """
                self._poison = error
                error = self._poisoned(error)
                self.give_up(Problem(told(error)))
""",
        """
                error = self._poisoned(error)
""",
        "the first failed flush is final",
    ),
    Mutant(
        "zeroes-leave-nothing-to-flush",
        _FILE,
        """
            self._emptied()
            self._changed(offset + length)
            self._pooled.leave(claim)
""",
        """
            self._emptied()
            self._pooled.leave(claim)
""",
        "writing zeroes is a change, which the next flush makes durable",
    ),
    Mutant(
        "reads-inline-over-a-thread",
        _FILE,
        "return not self._pooled.would_wait(offset, len(into)) and self.storage.try_pread_into(offset, into)",
        "return self.storage.try_pread_into(offset, into)",
        "nothing is read inline on a range that a thread is changing",
    ),
    Mutant(
        "writes-inline-over-a-thread",
        _FILE,
        """
        if self._pooled.overlaps(offset, length):
            return False
""",
        "\n",
        "nothing is written inline on a range at which a thread is at work",
    ),
    Mutant(
        "writes-in-threads-share",
        _FILE,
        """
        claim = pooled.enter(offset, length, serialising=True)
""",
        """
        claim = pooled.enter(offset, length)
""",
        "what changes a file in a thread has its range alone",
    ),
    Mutant(
        "reads-in-threads-do-not-wait",
        _FILE,
        """
            if claim.blockers:
                await claim.granted()
            return await self.storage.pread(offset, length)
""",
        """
            return await self.storage.pread(offset, length)
""",
        "a read does not tear",
    ),
    Mutant(
        "tables-before-data",
        _COMMIT,
        """
        await self._write(batch.counts)
        await file.flush()
        if batch.table_entries""",
        """
        await self._write(batch.counts)
        if batch.table_entries""",
        "data and refcounts are durable before the tables that name them",
    ),
    Mutant(
        "counts-after-tables",
        _COMMIT,
        """
            await self._store_counts(batch)
            await self._store_maps(batch)
""",
        """
            await self._store_maps(batch)
            await self._store_counts(batch)
""",
        "refcounts are durable before the tables that need them",
    ),
    Mutant(
        "tables-not-flushed",
        _COMMIT,
        """
            await self._write(batch.l1_entries)
        await file.flush()
""",
        """
            await self._write(batch.l1_entries)
""",
        "what a commit wrote is durable when it ends",
    ),
    Mutant(
        "tables-copied-late",
        _COMMIT,
        """
        await self._write(batch.maps)
        if batch.l1_entries:
""",
        """
        await self._write([(s.offset, encode_table(s.data)) for s in batch.pinned if isinstance(s.data, array)])
        if batch.l1_entries:
""",
        "the parts of a commit belong to one instant",
    ),
    Mutant(
        "joins-the-commit-that-runs",
        _COMMIT,
        """
        wanted = self._begun + 1
""",
        """
        wanted = self._begun + (not self._running)
""",
        "a flush returns after a commit that began after its call",
    ),
    Mutant(
        "two-commits-at-once",
        _COMMIT,
        """
            if not self._running:
                # In""",
        """
            if not self._running or self.dirty:
                # In""",
        "one commit runs at a time",
    ),
    Mutant(
        "failed-commit-forgotten",
        _COMMIT,
        """
        except FleecerError as error:
            self._image.poison(error)
        except BaseException""",
        """
        except FleecerError:
            pass
        except BaseException""",
        "the first failure of a commit is final",
    ),
    Mutant(
        "freed-clusters-used-before-the-commit",
        _COMMIT,
        """
        batch = self._take()
        try:
            await self._store_counts(batch)
""",
        """
        batch = self._take()
        await self._allocator.release(batch.freed)
        batch.freed.clear()
        try:
            await self._store_counts(batch)
""",
        "a cluster is used again only when nothing durable names it",
    ),
    Mutant(
        "freed-at-once",
        _ALLOCATOR,
        """
        first = offset >> self._bits
        freed = self.freed
""",
        """
        first = offset >> self._bits
        if (slice_ := self._cached(first)) is not None and count == 1:
            self._width.put(slice_.data, first % self._per_slice, 0)
            self.cache.mark_dirty(slice_)
            self._cursor = min(self._cursor, first)
            return
        freed = self.freed
""",
        "a cluster is used again only when nothing durable names it",
    ),
    Mutant(
        "claimed-below-the-lookup",
        _NODE,
        '''
        """See `Node.pread`. Raises CorruptImage where the tables do not make sense for the range."""
''',
        """
        plans = await self._reader.plan(offset, length)
        claim = self._in_flight.enter(offset, length)
        try:
            if claim.blockers:
                await claim.granted()
            parts = []
            for plan in plans:
                parts.append(bytes(await self._reader._carry_out(plan, offset)))
                offset += plan.length
            return b"".join(parts)
        finally:
            self._in_flight.leave(claim)
""",
        "a request claims its range before it looks anything up",
    ),
    Mutant(
        "reads-do-not-wait-for-their-claim",
        _NODE,
        """
            if claim.blockers:
                await claim.granted()
            return await self._reader.read(offset, length)
""",
        """
            return await self._reader.read(offset, length)
""",
        "a read waits for who changes the mapping of its clusters",
    ),
    Mutant(
        "claims-by-bytes",
        _NODE,
        """
        claim = in_flight.enter(start, stop - start, serialising=True)
""",
        """
        claim = in_flight.enter(offset, len(data), serialising=True)
""",
        "claims are rounded to clusters, since a new cluster is filled as a whole",
    ),
    Mutant(
        "allocating-writes-share",
        _NODE,
        """
        claim = in_flight.enter(start, stop - start, serialising=True)
""",
        """
        claim = in_flight.enter(start, stop - start)
""",
        "an allocation holds its range until it is linked",
    ),
    Mutant(
        "no-claims-in-qcow2",
        _NODE,
        """
        self._in_flight = InFlight(serialise=serialise)
""",
        """
        self._in_flight = InFlight(serialise=False)
""",
        "a serialising copy and every overlapping request wait for each other",
    ),
    Mutant(
        "discard-claims-nothing",
        _NODE,
        """
        start, stop, _ = self._claim_bounds(first, last - first)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
""",
        """
        start, stop, _ = self._claim_bounds(first, last - first)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
""",
        "discard waits for requests in its clusters",
    ),
    Mutant(
        "zero-claims-nothing",
        _NODE,
        """
        start, stop, end = self._claim_bounds(offset, length)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
            if claim.blockers:
                await claim.granted()
""",
        """
        start, stop, end = self._claim_bounds(offset, length)
        claim = self._in_flight.enter(start, stop - start, serialising=True)
        try:
""",
        "writing zeroes waits for requests in its clusters",
    ),
    Mutant(
        "linked-before-written",
        _WRITING,
        """
        length = min(len(view), ((cluster + run.clusters) << bits) - offset)
        try:
            await self._fill(run, entries, first, offset, view[:length])
""",
        """
        length = min(len(view), ((cluster + run.clusters) << bits) - offset)
        before = array("Q", entries)
        for at in range(run.clusters):
            entries[first + at] = run.offset + (at << bits) | COPIED
        self._reader.cache.mark_dirty(slice_)
        try:
            await self._fill(run, before, first, offset, view[:length])
""",
        "an entry names a cluster only after its data has been written",
    ),
    Mutant(
        "filled-from-new-data",
        _WRITING,
        """
        # What cannot be written in place, up to where it can again. Bad entries are found before anything is written.
""",
        """
        if not entries[first] & (COPIED | COMPRESSED | ZERO_FLAG):
            blank = await self._allocator.allocate(1)
            await self._file.pwrite(blank.offset, zeroes(self._cluster_size))
            entries[first] = blank.offset | COPIED | ZERO_FLAG
""",
        "the rest of a new cluster is filled with what the old one, or the backing file, held",
    ),
    Mutant(
        "reused-cluster-taken-for-blank",
        _WRITING,
        """
            if blank and run.fresh and self._file.node.limits.reads_zero_when_new:
""",
        """
            if blank and self._file.node.limits.reads_zero_when_new:
""",
        "a cluster that was used before is filled as a whole",
    ),
    Mutant(
        "failed-write-keeps-its-entry",
        _WRITING,
        """
            await self._fill(run, entries, first, offset, view[:length])
        except BaseException:
            if not set_aside:
                self._allocator.free(run.offset, run.clusters)
            raise
""",
        """
            await self._fill(run, entries, first, offset, view[:length])
        except BaseException:
            self._allocator.free(run.offset, run.clusters)
            entries[first] = run.offset | COPIED
            self._reader.cache.mark_dirty(slice_)
            raise
""",
        "what a failed write had allocated is given back, and its entries stand as they were",
    ),
    Mutant(
        "failed-write-frees-what-was-set-aside",
        _WRITING,
        """
            if not set_aside:
                self._allocator.free(run.offset, run.clusters)
            raise
""",
        """
            self._allocator.free(run.offset, run.clusters)
            raise
""",
        "a cluster that an entry still names is not free",
    ),
    Mutant(
        "written-under-the-zero-flag",
        _NODE,
        """
        host = slice_.data[cluster & self._slice_mask] - COPIED
""",
        """
        host = slice_.data[cluster & self._slice_mask] - COPIED & ~ZERO_FLAG
""",
        "what reads as zeroes is not written in place",
    ),
    Mutant(
        "zeroed-cluster-used-in-part",
        _WRITING,
        """
            run, old = Run(host, 1, fresh=False), [None]
""",
        """
            run, old = Run(host, 1, fresh=True), [None]
""",
        "a cluster that was set aside is filled as a whole",
    ),
    Mutant(
        "kept-cluster-freed",
        _WRITING,
        """
                if gone is not None and emptied <= ZERO_FLAG:
""",
        """
                if gone is not None:
""",
        "a cluster that an entry still names is not free",
    ),
    Mutant(
        "discard-exposes-the-backing-file",
        _WRITING,
        """
        if not self.backed and (unmap or not entry):
            return 0
""",
        """
        if unmap or not entry:
            return 0
""",
        "what was discarded does not read as the backing file",
    ),
    Mutant(
        "old-cluster-not-given-back",
        _WRITING,
        """
                if gone is not None and emptied <= ZERO_FLAG:
                    self._allocator.free(gone.first << bits, gone.clusters)
""",
        """
                if gone is not None and emptied == ZERO_FLAG + 1:
                    self._allocator.free(gone.first << bits, gone.clusters)
""",
        "no cluster leaks while nothing fails",
    ),
    Mutant(
        "two-make-one-table",
        _WRITING,
        """
                await self._tables.run(index, lambda: self._make_table(index))
                continue
""",
        """
                await self._make_table(index)
                continue
""",
        "concurrent writers make an L2 table once",
    ),
    Mutant(
        "table-linked-before-written",
        _WRITING,
        """
        run = await self._allocator.allocate(1)
        try:
            await self._file.pwrite(run.offset, content)
""",
        """
        run = await self._allocator.allocate(1)
        image.l1[index] = run.offset | COPIED
        image.l1_dirty.add(index)
        try:
            await self._file.pwrite(run.offset, content)
""",
        "an L1 entry names a table only after it has been written",
    ),
    Mutant(
        "links-more-than-it-got",
        _WRITING,
        """
        self._link(slice_, run.offset, offset, length)
        for gone in old[""",
        """
        self._link(slice_, run.offset, offset, min(len(view), ((cluster + new) << bits) - offset))
        for gone in old[""",
        "only clusters that were allocated are linked",
        tests=("tests/unit/block/nodes/test_qcow2_random.py",),
    ),
    Mutant(
        "freed-clusters-discarded-when-free",
        _ALLOCATOR,
        """
        ordered = sorted(emptied)
        if self._discard_freed:
            await self._discard(ordered)
        for number, cluster in enumerate(ordered, 1):
            if number % _RELEASES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
            slice_ = await self._fetch(cluster)
            self._width.put(slice_.data, cluster % self._per_slice, 0)
            self.cache.mark_dirty(slice_)
            if cluster < self._cursor:
                self._cursor = cluster
                self._free_end = 0
""",
        """
        ordered = sorted(emptied)
        for number, cluster in enumerate(ordered, 1):
            if number % _RELEASES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
            slice_ = await self._fetch(cluster)
            self._width.put(slice_.data, cluster % self._per_slice, 0)
            self.cache.mark_dirty(slice_)
            if cluster < self._cursor:
                self._cursor = cluster
                self._free_end = 0
        if self._discard_freed:
            await self._discard(ordered)
""",
        "a freed cluster is discarded in the file before it can be used again",
        tests=(
            "tests/unit/block/nodes/test_qcow2_node.py::test_freed_clusters_are_discarded_in_the_file_before_they_can_be_used",
        ),
    ),
    Mutant(
        "begun-read-claims-nothing",
        _FILE,
        """
        return self._pooled.begin_read(offset, offset + length, self.storage.begin_pread, offset, length, ended)
""",
        """
        return self.storage.begin_pread(offset, length, ended)
""",
        "a read that was begun claims its range of the file",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_read_that_was_begun_and_a_write_of_its_range_wait_for_each_other",
        ),
    ),
    Mutant(
        "begun-read-passes-a-change",
        "block/inflight.py",
        """
        if self._serialising_count and self.would_wait(start, end - start):
            return False
        claim = Claim(start, end, serialising=False)
""",
        """
        claim = Claim(start, end, serialising=False)
""",
        "no read is begun where the file is being changed",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_read_that_was_begun_and_a_write_of_its_range_wait_for_each_other",
        ),
    ),
    Mutant(
        "begun-read-of-an-image-claims-nothing",
        _NODE,
        """
        return self._in_flight.begin_read(start, stop, child.begin_pread, place, length, ended)
""",
        """
        return child.begin_pread(place, length, ended)
""",
        "a read that was begun claims its clusters",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_read_of_an_image_that_was_begun_keeps_its_clusters_where_they_are",
        ),
    ),
    Mutant(
        "cancelled-flush-takes-the-sync-along",
        "storage/lanes.py",
        """
    if result.done():
        return
    if error is None:
""",
        """
    if error is None:
""",
        "a flush that is cancelled takes neither the others' flush nor its outcome along",
        tests=("tests/unit/block/nodes/test_file.py::test_a_cancelled_flush_leaves_the_others_waiting_for_their_sync",),
    ),
    Mutant(
        "begun-flush-commits-no-tables",
        _COMMIT,
        """
        if self._running or self.dirty or self._image.failure is not None:
            return False
""",
        """
        if self._running or self._image.failure is not None:
            return False
""",
        "a flush makes the tables durable by which what was written is found",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_flush_of_an_image_is_begun_only_where_no_table_is_to_be_committed",
        ),
    ),
    Mutant(
        "begun-flush-fails-once-only",
        _COMMIT,
        """
        if isinstance(error, FleecerError):
            self._image.poison(error)
        ended(error)
""",
        """
        ended(error)
""",
        "the first failed flush of an image is final",
        tests=("tests/unit/block/test_at_once.py::test_a_flush_of_an_image_that_was_begun_and_fails_is_final",),
    ),
    Mutant(
        "sync-tells-of-no-error",
        _FILE_STORAGE,
        """
        ended(self._failed(OSError(-result, os.strerror(-result)), "flush", 0, 0) if result else None)
""",
        """
        ended(None)
""",
        "a sync that failed is told as that",
        tests=("tests/unit/storage/test_syncs.py::test_a_sync_that_failed_names_the_file",),
    ),
    Mutant(
        "new-name-not-synced",
        _FILE_STORAGE,
        """
        if self._unsynced_directory is not None:
            return False
        if self._is_in_memory:
""",
        """
        if self._is_in_memory:
""",
        "the first sync of a new file makes its name durable too",
        tests=("tests/unit/storage/test_syncs.py::test_a_new_file_is_synced_by_a_thread_which_syncs_its_name_too",),
    ),
    Mutant(
        "close-beside-a-running-commit",
        _NODE,
        """
        while (self._commits.dirty or self._commits.running) and self._image.failure is None:
""",
        """
        while self._commits.dirty and self._image.failure is None:
""",
        "an image is closed when the commit that runs has ended, also one nobody waits for",
        tests=(
            "tests/unit/block/nodes/test_qcow2_cancel.py::test_an_image_is_closed_only_after_the_commit_that_a_cancelled_flush_left_running",
        ),
    ),
    Mutant(
        "grown-at-once-unnoticed",
        _FILE,
        """
            if offset + length > self.size:
                self._changed(offset + length)
""",
        "",
        "a file that grew by a write done at once is as large as it is",
        tests=("tests/unit/block/nodes/test_file.py::test_the_size_follows_writes_and_zeroes_past_the_end",),
    ),
    Mutant(
        "held-slice-dropped",
        _METADATA,
        """
            if slice_.used or slice_.pins or offset in self.dirty:
""",
        """
            if slice_.used or offset in self.dirty:
""",
        "a slice that a writer holds is never dropped from the cache",
        tests=("tests/unit/block/nodes/test_qcow2_metadata.py::test_a_dirty_slice_stays_until_its_commit_is_through",),
    ),
    Mutant(
        "refcount-table-named-before-it-is-durable",
        _ALLOCATOR,
        """
        try:
            await image.file.flush()
        except FleecerError as error:
            image.poison(error)
            raise
        await image.patch_header(""",
        """
        await image.patch_header(""",
        "the header names a refcount table only after it is durable",
        tests=(
            "tests/unit/block/nodes/test_qcow2_power_cut.py::test_a_power_cut_while_the_refcount_table_moves_leaves_a_sound_image",
        ),
    ),
    Mutant(
        "new-cluster-at-once-beside-a-reader",
        _WRITING,
        """
            and not self._in_flight.overlaps(cluster << bits, count << bits)
""",
        """
            and not self._in_flight.would_wait(cluster << bits, count << bits)
""",
        "a serialising write and every overlapping request wait for each other, also where the write is done at once",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_new_cluster_is_not_written_at_once_while_anybody_uses_the_old_one",
        ),
    ),
    Mutant(
        "new-cluster-at-once-in-a-shared-table",
        _WRITING,
        """
            self._image.l1[cluster >> self._reader.l2_bits] & (COPIED | self.mapping.odd_bits) == COPIED
            and not""",
        """
            not""",
        "an L2 table that a snapshot has too is not changed",
        tests=("tests/unit/block/test_at_once.py::test_new_clusters_wait_for_tables_and_commits",),
    ),
    Mutant(
        "new-cluster-at-once-over-metadata",
        _WRITING,
        """
        if not self._image.metadata.isdisjoint(hosts):
""",
        """
        if not hosts:
""",
        "metadata is never handed out, whatever the refcounts say",
        tests=("tests/unit/block/test_at_once.py::test_new_clusters_wait_for_tables_and_commits",),
    ),
    Mutant(
        "half-written-at-once-taken-for-blank",
        _WRITING,
        """
            self._allocator.take(run)
            self._allocator.free(run.offset, count)
""",
        "",
        "what a failed write left behind never shows",
        tests=(
            "tests/unit/block/test_at_once.py::test_a_write_at_once_that_fails_gives_its_clusters_back_and_leaves_nothing_to_be_seen",
        ),
    ),
    Mutant(
        "used-cluster-taken-for-blank-at-once",
        _WRITING,
        """
            blank = run.fresh and self._file.node.limits.reads_zero_when_new
""",
        """
            blank = self._file.node.limits.reads_zero_when_new
""",
        "a cluster that was used before is filled as a whole",
    ),
    Mutant(
        "written-in-part-at-once",
        _FILE_STORAGE,
        """
                self._pwrite(offset, data, count)
""",
        """
                return False
""",
        "what is said not to have been done was not done in part",
        tests=("tests/unit/storage/test_file_storage.py::test_short_reads_and_writes_are_continued",),
    ),
    Mutant(
        "alone-whoever-reads",
        _NODE,
        """
        return not self._in_flight.overlaps(start, stop - start) and write(offset, data)
""",
        """
        return write(offset, data)
""",
        "a serialising write at once is one where nobody else is in the cluster",
        tests=("tests/unit/block/test_at_once.py::test_a_serialising_write_in_place_at_once_is_alone",),
    ),
    Mutant(
        "backing-shows-through-zeroes",
        _NODE,
        """
            return 0 if entry or table & self._odd_bits else self._in_backing(offset + length)
""",
        """
            return 0 if table & self._odd_bits else self._in_backing(offset + length)
""",
        "only what is not allocated, and nothing else, is read from the backing node",
        tests=("tests/unit/block/test_at_once.py::test_short_reads_of_an_overlay_at_once_are_of_what_is_on_top",),
    ),
    Mutant(
        "backing-shows-through-zeroed-subclusters",
        "formats/qcow2/subclusters.py",
        """
        return not (found.allocated | found.zero) & self.mask(skip, length)
""",
        """
        return not found.allocated & self.mask(skip, length)
""",
        "only what is not allocated, and nothing else, is read from the backing node",
        tests=("tests/unit/block/test_at_once.py::test_short_reads_of_an_overlay_at_once_are_of_what_is_on_top",),
    ),
    Mutant(
        "backing-read-past-who-changes-the-cluster",
        _NODE,
        """
        if self._in_flight.would_wait(offset & self._cluster_mask, self._cluster_size):
            return False
        return read(place, into) if place > 0 else read_backing(offset, into)
""",
        """
        return read(place, into) if place > 0 else read_backing(offset, into)
""",
        "a read waits for who changes the mapping of its clusters",
        tests=(
            "tests/unit/block/test_at_once.py::test_no_cluster_is_read_or_written_at_once_while_somebody_has_it_alone",
        ),
    ),
    Mutant(
        "free-clusters-known-after-a-release",
        _ALLOCATOR,
        """
                self._cursor = cluster
                self._free_end = 0
""",
        """
                self._cursor = cluster
""",
        "a cluster is handed out once",
    ),
    Mutant(
        "subcluster-claimed-by-bits-next-to-it",
        _SUBCLUSTERS,
        """
        entries[index + len(entries) // 2] = bitmap & ~(mask << SUBCLUSTERS) | mask
""",
        """
        entries[index + len(entries) // 2] = bitmap & ~(mask << SUBCLUSTERS) | mask | mask << 1
""",
        "a subcluster is allocated when all of it was written",
        tests=("tests/unit/block/nodes/test_qcow2_random.py",),
    ),
    Mutant(
        "subcluster-filled-in-part",
        _SUBCLUSTERS,
        """
        before = await self._reader.read(start, offset - start) if start < offset else b""
""",
        """
        before = bytes(offset - start)
""",
        "what a write leaves of a subcluster stays as it was",
        tests=("tests/unit/block/nodes/test_qcow2_random.py",),
    ),
    Mutant(
        "subclusters-linked-before-written",
        _SUBCLUSTERS,
        """
        await self._fill_up(entries, host, offset, view)
        self._link(slice_, host, offset, len(view))
        return len(view)
""",
        """
        self._link(slice_, host, offset, len(view))
        await self._fill_up(entries, host, offset, view)
        return len(view)
""",
        "a bitmap says that a subcluster is allocated only after all of it has been written",
        tests=("tests/unit/block/nodes/test_qcow2_random.py",),
    ),
    Mutant(
        "emptied-subclusters-of-a-packed-cluster",
        _SUBCLUSTERS,
        """
                elif entries[index] & COMPRESSED:
                    await""",
        """
                elif entries[index] & COMPRESSED and not unmap:
                    await""",
        "the bitmap of a compressed cluster is 0",
        tests=("tests/interop/test_qcow2_peers.py::test_a_compressed_image_is_read_and_overwritten",),
    ),
    Mutant(
        "shared-cluster-written-by-subclusters",
        _SUBCLUSTERS,
        """
        host = entries[index] - COPIED
        return host if 0 < host < self._file.size and not host & self.mapping.odd_bits else 0
""",
        """
        host = entries[index] & ~COPIED
        return host if 0 < host < self._file.size and not host & self.mapping.odd_bits else 0
""",
        "a cluster that a snapshot has too is not written to",
        tests=("tests/unit/block/nodes/test_qcow2_power_cut.py::test_a_power_cut_leaves_internal_snapshots_intact",),
    ),
    Mutant(
        "status-of-subclusters-without-bound",
        "block/nodes/qcow2/reading.py",
        """
        while offset < end and (entries_max is None or (seen < entries_max and len(plans) < PLANS_MAX)):
""",
        """
        while offset < end and (entries_max is None or seen < entries_max):
""",
        "a status answer takes bounded memory and time",
        tests=("tests/unit/block/nodes/test_qcow2_node.py::test_status_stops_after_a_bounded_number_of_subclusters",),
    ),
    Mutant(
        "what-failed-left-is-found-later",
        _FILE_STORAGE,
        """
            self.size = max(self.size, os.fstat(self._fd).st_size)
""",
        """
            os.fstat(self._fd)
""",
        "what a failed write left behind does not turn up later",
        tests=(
            "tests/unit/storage/test_file_storage.py::test_what_a_write_that_failed_left_past_the_end_is_there_at_once",
        ),
    ),
]
