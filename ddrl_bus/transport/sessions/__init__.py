"""What the three links promise, without I/O: events in, actions out; no socket, no clock, no asyncio.

Every method that depends on time takes `now` in seconds from any monotonic clock. A shell feeds in what arrives, does
what comes back, and calls `poll` now and then. The seeded simulator in the tests is such a shell.
"""
