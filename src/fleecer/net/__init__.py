"""Sockets: streams that carry bytes without copying them more than they must, listeners, and the NBD client."""
