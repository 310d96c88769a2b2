"""Mistakes in the graph: cuts and their ends, edges and their gates, claims."""

from tests.mutants.mutant import Mutant

_FLEECING = "block/fleecing.py"
_GRAPH = "block/graph.py"
_EDGE = "block/edge.py"
_CLAIMS = "block/inflight.py"

MUTANTS = [
    Mutant(
        "begun-read-not-counted",
        _EDGE,
        """
        self.busy += begun
""",
        """
        self.busy += 0
""",
        "a drain waits for the reads that were begun",
        tests=("tests/unit/block/test_at_once.py::test_a_read_that_was_begun_holds_a_drain_up_until_it_has_ended",),
    ),
    Mutant(
        "begun-flush-not-counted",
        _EDGE,
        """
        self.busy += 1
        begun = self._node.begin_flush(functools.partial(self._flush_ended, ended))
        self.busy -= not begun
        return begun
""",
        """
        return self._node.begin_flush(ended)
""",
        "a drain waits for the flushes that were begun",
        tests=("tests/unit/block/test_at_once.py::test_a_flush_that_was_begun_holds_a_drain_up_until_it_has_ended",),
    ),
    Mutant(
        "begun-flush-passes-the-gate",
        _EDGE,
        """
        if self._gate is not None:
            return False
        self.busy += 1
        begun = self._node.begin_flush""",
        """
        self.busy += 1
        begun = self._node.begin_flush""",
        "nothing is begun past a closed gate",
        tests=("tests/unit/block/test_at_once.py::test_a_flush_that_was_begun_holds_a_drain_up_until_it_has_ended",),
    ),
    Mutant(
        "begun-read-of-what-became-untrue",
        _EDGE,
        """
        if error is None and self._node.check is not None:
            try:
""",
        """
        if False:
            try:
""",
        "what was read is looked at again before it is used",
        tests=("tests/unit/block/test_at_once.py::test_what_has_become_untrue_meanwhile_is_not_read",),
    ),
    Mutant(
        "disks-cut-one-after-another",
        _FLEECING,
        """
    async with graph.drained(covered, timeout_s=timeout_s):
        try:
            filters = _shared_filters(graph)
""",
        """
    everything, plans = plans, []
    for plan in everything:
        plans = [plan]
        async with graph.drained(covered, timeout_s=timeout_s):
                done.append(_cut_one(graph, plan))
    plans = []
    if everything:
        try:
            filters = _shared_filters(graph)
""",
        "all disks of a cut are at rest together",
    ),
    Mutant(
        "gates-open-before-the-cut",
        _GRAPH,
        """
                    await _all_idle(upper, deadline, timeout_s)
                yield
""",
        """
                    await _all_idle(upper, deadline, timeout_s)
                while closed:
                    closed.pop().open_gate()
                await asyncio.sleep(0)
                yield
""",
        "gates stay closed until the cut is made",
    ),
    Mutant(
        "requests-in-flight-at-the-cut",
        _GRAPH,
        """
                    await _all_idle(upper, deadline, timeout_s)
                yield
""",
        """
                    await asyncio.sleep(0)
                yield
""",
        "no request is in flight at the instant",
    ),
    Mutant(
        "one-edge-not-drained",
        _GRAPH,
        """
                while upper := self._uppermost([edge for edge in choose() if edge not in closed]):
""",
        """
                while upper := self._uppermost([edge for edge in list(choose())[1:] if edge not in closed]):
""",
        "every edge that changes the disk is drained",
    ),
    Mutant(
        "edges-chosen-once",
        _GRAPH,
        """
                while upper := self._uppermost([edge for edge in choose() if edge not in closed]):
""",
        """
                if upper := self._uppermost([edge for edge in choose() if edge not in closed]):
""",
        "who came while a cut waited is drained too",
    ),
    Mutant(
        "filter-taken-out-undrained",
        _FLEECING,
        """
        async with graph.drained(lambda: graph.parents(filter_node), timeout_s=timeout_s):
            if _is_needless""",
        """
        async with graph.drained(lambda: [], timeout_s=timeout_s):
            if _is_needless""",
        "a filter is taken out while nothing is in flight through it",
    ),
    Mutant(
        "filter-taken-out-though-used-again",
        _FLEECING,
        """
            if _is_needless(graph, filter_node):  # somebody may have been quicker while we waited our turn
                return graph.bypass(filter_node)
""",
        """
            if graph.has(filter_node):
                return graph.bypass(filter_node)
""",
        "a filter stays until its last snapshot has ended",
    ),
    Mutant(
        "let-go-while-in-flight",
        _GRAPH,
        """
            await edge.idle()
            await self.detach(edge)
        except FleecerError as error:
""",
        """
            await self.detach(edge)
        except FleecerError as error:
""",
        "a scratch is closed when no copy into it is in flight",
    ),
    Mutant(
        "detached-while-in-flight",
        _GRAPH,
        """
        edge.close_gate()
        await edge.idle()
        await self.detach(edge)
""",
        """
        edge.close_gate()
        await self.detach(edge)
""",
        "a node is closed when nothing is in flight on its edges",
    ),
    Mutant(
        "target-not-checked",
        _FLEECING,
        """
    fleece.check_reads_by(snapshot.check)  # whoever reads the past through the target hears of it if that breaks
""",
        "",
        "a fleecing target whose snapshot broke never shows the present",
    ),
    Mutant(
        "copies-pass-the-guest-by",
        _FLEECING,
        """
    covered = graph.edges_to_cover(node, target)
    for edge""",
        """
    covered = graph.edges_to_cover(node, target)[:-1]
    for edge""",
        "whoever writes to a protected disk goes through its filter",
    ),
    Mutant(
        "busy-counted-late",
        _EDGE,
        """
            self._refuse_change("write", offset, length)
            return
        self.busy += 1
""",
        """
            self._refuse_change("write", offset, length)
            return
        await asyncio.sleep(0)
        self.busy += 1
""",
        "a request is counted in the step in which it passes the gate",
    ),
    Mutant(
        "gate-not-looked-at-again",
        _EDGE,
        """
        while self._gate is not None:
            if self._has_ended:
""",
        """
        if self._gate is not None:
            if self._has_ended:
""",
        "who waited at the gate looks at it again",
    ),
    Mutant(
        "node-looked-up-before-the-gate",
        _EDGE,
        """
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        length = len(data)
""",
        """
        node = self._node
        if self._gate is not None:
            await self._pass_gate()
        length = len(data)
""",
        "the node is looked up after the gate",
    ),
    Mutant(
        "reads-look-up-before-the-gate",
        _EDGE,
        """
        if self._gate is not None:
            await self._pass_gate()
        node = self._node
        if offset < 0 or length <= 0 or offset + length > node.size:
            return self._refuse_range("read", offset, length)
""",
        """
        node = self._node
        if self._gate is not None:
            await self._pass_gate()
        if offset < 0 or length <= 0 or offset + length > node.size:
            return self._refuse_range("read", offset, length)
""",
        "a node swapped out under drain sees no request that follows",
    ),
    Mutant(
        "padded-writes-do-not-serialise",
        _EDGE,
        """
    claim = padding.enter(start, end - start, serialising=unaligned)
""",
        """
    claim = padding.enter(start, end - start)
""",
        "a padded write reads, changes and writes whole units alone",
    ),
    Mutant(
        "zeroes-beside-a-padded-write",
        _EDGE,
        """
    claim = node.padding.enter(inner_start, inner_end - inner_start)
    try:
        if claim.blockers:
            await claim.granted()
""",
        """
    claim = node.padding.enter(inner_start, inner_end - inner_start)
    try:
""",
        "a padded write brings nothing back that was zeroed meanwhile",
    ),
    Mutant(
        "fua-forgotten",
        _EDGE,
        """
                await _shaped_pwrite(node, offset, data, serialising)
            if fua:
                await node.flush()
""",
        """
                await _shaped_pwrite(node, offset, data, serialising)
""",
        "a write with FUA is durable when it returns",
    ),
    Mutant(
        "dependents-not-woken",
        _CLAIMS,
        """
            if not dependent.blockers and waiter is not None and not waiter.done():
                waiter.set_result(True)
""",
        """
            if dependent.blockers and waiter is not None and not waiter.done():
                waiter.set_result(True)
""",
        "a claim that leaves releases those behind it",
    ),
    Mutant(
        "woken-by-the-first-to-leave",
        _CLAIMS,
        """
            if not dependent.blockers and waiter is not None and not waiter.done():
""",
        """
            if waiter is not None and not waiter.done():
""",
        "a claim waits for every earlier conflicting one",
    ),
    Mutant(
        "waits-for-one-earlier-claim-only",
        _CLAIMS,
        """
                earlier.dependents.append(claim)
                claim.blockers += 1
""",
        """
                earlier.dependents.append(claim)
                claim.blockers += 1
                break
""",
        "a claim waits for every earlier conflicting one",
    ),
    Mutant(
        "sharing-claims-pass-serialising-ones",
        _CLAIMS,
        """
        if self._claims and (serialising or self._serialising_count) and self._serialise:
""",
        """
        if self._claims and serialising and self._serialise:
""",
        "claims conflict when at least one of them serialises",
    ),
    Mutant(
        "readers-not-waited-for",
        _CLAIMS,
        """
            if earlier.start < end and start < earlier.end and (serialising or earlier.serialising):
""",
        """
            if earlier.start < end and start < earlier.end and earlier.serialising:
""",
        "a serialising claim waits for the sharing ones before it",
    ),
    Mutant(
        "overlap-one-byte-short",
        _CLAIMS,
        """
            if earlier.start < end and start < earlier.end and (serialising or earlier.serialising):
""",
        """
            if earlier.start <= start < earlier.end and (serialising or earlier.serialising):
""",
        "ranges overlap whichever begins first",
    ),
    Mutant(
        "fua-at-once-not-flushed",
        _EDGE,
        """
            if fua:
                await self.flush()
""",
        "",
        "a write with FUA is durable when it returns, also one that was done at once",
    ),
    Mutant(
        "reads-at-once-are-not-checked",
        _EDGE,
        """
        if self._gate is not None or not self._plain or node.check is not None:
""",
        """
        if self._gate is not None or not self._plain:
""",
        "a fleecing target whose job has ended never shows the present, nor at once over NBD",
    ),
    Mutant(
        "zeroes-with-fua-not-flushed",
        _EDGE,
        """
                await _shaped_zero(node, offset, length, unmap, serialising)
            if fua:
                await node.flush()
""",
        """
                await _shaped_zero(node, offset, length, unmap, serialising)
""",
        "zeroes written with FUA are durable on return",
    ),
    Mutant(
        "failed-cut-leaves-the-first-disk-cut",
        _FLEECING,
        """
            for fleece in reversed(done):
                _uncut_drained(graph, fleece)
            raise
""",
        """
            raise
""",
        "either every disk is cut or none is",
        tests=("tests/unit/block/test_copier.py::test_a_cut_that_fails_takes_back_the_filters_it_put_in",),
    ),
    Mutant(
        "flush-not-counted",
        _EDGE,
        """
        self.busy += 1
        try:
            await self._node.flush()
        finally:
            self.busy -= 1
            if self._idle is not None and not self.busy:
                self._now_idle()
""",
        """
        await self._node.flush()
""",
        "a node is closed when nothing is in flight on its edges, a flush neither",
        tests=("tests/unit/block/test_edge.py::test_idle_is_told_for_every_kind_of_request_failed_ones_too",),
    ),
    Mutant(
        "lower-gates-close-with-the-upper",
        _GRAPH,
        """
        return [edge for edge in edges if id(edge) not in below]
""",
        """
        return edges
""",
        "of two edges to be drained, one of which serves the other, the upper comes to rest first",
        tests=(
            "tests/unit/block/test_graph.py::test_edges_of_which_one_serves_the_others_requests_can_be_drained_together",
        ),
    ),
]
