"""The kinds of nodes, one file each: sources of bytes, formats over them, and filters."""
