"""`fleecer demo`: the whole job on a throw-away disk, with proof.

disk.py      a disk with an ext4 file system, and the blocks that the writer may have
writer.py    a client that never stops writing, and its journal
proof.py     what an image of one instant must hold, according to the journal
blockmap.py  the drawing of a snapshot
story.py     what happens, in order
"""

from __future__ import annotations

import click


@click.command(short_help="Show and prove it all on a throw-away disk.")
def demo() -> None:
    """Serve a throw-away disk with an ext4 file system, snapshot it, back it up and restore it, all while a writer that
    never pauses overwrites it, and prove that the backup equals the instant, byte for byte.

    Needs mkfs.ext4, debugfs and e2fsck (package e2fsprogs), 400 MiB in $TMPDIR, and some seconds. Exit status 0 if the
    proof holds.
    """
    from fleecer.app import runner
    from fleecer.cli.demo.story import tell

    runner.run(tell(click.echo))
