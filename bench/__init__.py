"""The benchmark: Fleecer and its peers side by side, in turn, on one machine and the same files.

    python -m bench --list          what there is to measure
    python -m bench --quick         the ten most telling ratios, about two minutes
    python -m bench                 all of it, for hours; --only PATTERN takes a part

A *cell* is one piece of work on one format in one place. A *subject* is who does it: Fleecer, a qemu-storage-daemon,
nbdkit, or the floor, which is fio straight on the file. In each round every subject does the cell once, in a server
process of its own, and a ratio is taken between runs of one round. No figure here passes or fails a test.

`figures`, `chart` and `report` are pure; `fio` and `process` drive programs; `images` and `subjects` are what is
measured; `works` and `snapshot_works` do it; `cells` lists it; `runner` takes the turns.
"""
