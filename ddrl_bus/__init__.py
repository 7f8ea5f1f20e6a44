"""Distributed deep reinforcement learning as an asyncio message bus on ZeroMQ.

Importing this package loads neither torch nor zmq.
"""

__version__ = "0.1.0"
