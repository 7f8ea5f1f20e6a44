"""The nodes: where bus and algorithm meet."""
