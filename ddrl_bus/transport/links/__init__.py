"""The six link ends: sender and receiver, publisher and subscriber, client and server.

Each is a thin shell: a session core decides, sockets of whatever backend carry, the ledger counts. Everything runs in
one event loop; nothing here blocks, and nothing waits on a socket.
"""

from ddrl_bus.transport.links.end import Check, life
from ddrl_bus.transport.links.latest import Publisher, Subscriber
from ddrl_bus.transport.links.queue import Receiver, Sender
from ddrl_bus.transport.links.request import Client, Request, Server

__all__ = ["Check", "Client", "Publisher", "Receiver", "Request", "Sender", "Server", "Subscriber", "life"]
