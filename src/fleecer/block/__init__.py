"""The block graph: nodes, the edges between them, and what keeps overlapping requests apart."""
