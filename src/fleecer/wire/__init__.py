"""Wire protocols as pure codecs: bytes in, values out, and back. No sockets, no clocks, no event loop."""
