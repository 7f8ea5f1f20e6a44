"""ipc and tcp through ZeroMQ: every socket option in one table, and one pump per socket for its life.

A pump is woken by the socket's file descriptor and drains it without waiting, bounded in messages and bytes: awaiting
each `recv` costs twelve microseconds a message where this costs less than one. The descriptor is edge-triggered and a
send can swallow the edge, so the pump looks again after sends and after each bounded drain. Nothing ever cancels a
receive, and no timeout wraps one: that loses messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import SOCK_STREAM, getaddrinfo
from typing import Final

import zmq

from ddrl_bus.errors import AddressInUseError, UnreachableError, UsageError
from ddrl_bus.transport.base import OnMessage, SocketKind, scheme
from ddrl_bus.transport.security import RELOAD_S, ZAP_ADDRESS, Guard
from ddrl_bus.transport.wire import MAX_FRAME, SMALL_FRAME, Buffer

COPY_BELOW: Final = 128 << 10
"""Bytes under which a copying send is faster than a zero-copy one."""
_NOBLOCK: Final = int(zmq.NOBLOCK)  # plain integers: combining pyzmq's flags takes a microsecond
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
ASK_FIRST: Final = 2
"""Messages of one drain before which the socket is asked whether there is one: a receive that finds none raises, which
costs as much as five questions. After so many there is a backlog."""
BIND_AGAIN_S: Final = 0.05
DRAIN_MESSAGES: Final = 16
DRAIN_BYTES: Final = 1 << 20
"""Both bound one turn of the pump: what was received is taken, and its sender given credit for more, before the next
is received. More bytes at once would also make libzmq fault in memory for the next ones. A DEALER takes one message a
turn: whoever awaits it goes on before the socket is asked for another."""

SLOWEST_MS: Final = 60_000
"""What one frame may take. Only a whole frame proves to a heartbeat that the peer lives: with a shorter timeout a large
one is never delivered over a narrow line. A host that is gone shows sooner, for nobody acknowledges the heartbeats'
packets."""

OPTIONS: Final[dict[int, int]] = {
    zmq.LINGER: 500,  # ms; delivery is by acknowledgement, this only lets a last credit or reply out
    zmq.SNDHWM: 2048,  # messages; credits bound the queue links far below, and a small one drops the newest weights
    zmq.RCVHWM: 2048,
    zmq.MAXMSGSIZE: MAX_FRAME,
    zmq.HANDSHAKE_IVL: 5_000,  # ms
    zmq.HEARTBEAT_IVL: 1_000,
    zmq.HEARTBEAT_TIMEOUT: SLOWEST_MS,
    zmq.HEARTBEAT_TTL: SLOWEST_MS,
    zmq.TCP_MAXRT: 5_000,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 1_000,  # nodes start in any order: this is how late a peer is found at most
    zmq.CONNECT_TIMEOUT: 2_000,  # the kernel asks a host that is gone ever more seldom: after 30 s, 16 s from now
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,  # s
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.IPV6: 1,
    zmq.IMMEDIATE: 0,  # what is queued while a connection is down goes out later; its lane says who may take it
}
KIND_OPTIONS: Final[dict[SocketKind, dict[int, int]]] = {
    # A SUB holds but subscriptions, and would wait for a peer that is gone to take them. Its frames are small.
    SocketKind.SUB: {zmq.LINGER: 0, zmq.HEARTBEAT_TIMEOUT: 5_000, zmq.HEARTBEAT_TTL: 5_000},
    SocketKind.DEALER: {zmq.LINGER: 0},  # who closes waits for no answer
    SocketKind.XPUB: {
        zmq.XPUB_VERBOSE: 1,  # see every subscription, also of a topic that is known
        zmq.MAXMSGSIZE: 1024,  # a topic, whose bytes libzmq keeps as some 40 each; ours have up to 260, a handshake 400
        zmq.HEARTBEAT_TIMEOUT: 5_000,
        zmq.HEARTBEAT_TTL: 5_000,
    },
    SocketKind.ROUTER: {zmq.ROUTER_MANDATORY: 1},  # an unknown peer is an error, not a silent drop
}
_TYPES: Final = {
    SocketKind.PUSH: zmq.PUSH,
    SocketKind.PULL: zmq.PULL,
    SocketKind.XPUB: zmq.XPUB,
    SocketKind.SUB: zmq.SUB,
    SocketKind.DEALER: zmq.DEALER,
    SocketKind.ROUTER: zmq.ROUTER,
}


class ZmqBackend:
    """One ZeroMQ context, and the sockets made of it; they live in the running event loop.

    With a guard, the handler that libzmq asks about each handshake is there before anything is bound. It answers from
    the event loop: a loop that hangs lets nobody in.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self._context = zmq.Context()
        self._sockets: list[ZmqSocket] = []
        self._guard = guard
        self._timer: asyncio.TimerHandle | None = None
        if guard is not None and guard.pair is not None:
            self._zap = ZmqSocket(self._context, SocketKind.ROUTER, self._on_zap)
            self._zap.raw.bind(ZAP_ADDRESS)
            self._refresh_later(guard)

    def socket(
        self,
        kind: SocketKind,
        on_message: OnMessage | None,
        *,
        bind: Sequence[str] = (),
        connect: Sequence[str] = (),
        link: str = "",
    ) -> ZmqSocket:
        socket = ZmqSocket(self._context, kind, on_message, link, self._guard)
        self._sockets.append(socket)
        try:
            for address in sorted(bind, key=socket.guards):  # CURVE is for all that is bound after it is set
                socket.bind(address)
            for address in connect:
                socket.connect(address)
        except Exception:
            socket.close()
            raise
        return socket

    def _on_zap(self, parts: list[Buffer]) -> None:
        assert self._guard is not None
        peer, _, *request = (bytes(part) for part in parts)
        try:
            self._zap.send(peer, b"", *self._guard.zap(request))
        except Exception:  # without an answer nobody comes in
            logging.getLogger(__name__).exception("a handshake was not answered")

    def _refresh_later(self, guard: Guard) -> None:
        self._timer = asyncio.get_running_loop().call_later(RELOAD_S, self._refresh, guard)

    def _refresh(self, guard: Guard) -> None:
        self._refresh_later(guard)
        fewer_rights = guard.refresh()
        for socket in self._sockets:
            socket.renew(fewer_rights)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        if self._timer is not None:
            self._timer.cancel()
            self._zap.close()
        self._context.term()


class ZmqSocket:
    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: SocketKind,
        on_message: OnMessage | None,
        link: str = "",
        guard: Guard | None = None,
    ) -> None:
        self.raw = context.socket(_TYPES[kind])
        for option, value in (OPTIONS | KIND_OPTIONS.get(kind, {})).items():
            self.raw.setsockopt(option, value)
        # pyzmq's own override looks for options that are never passed here, which takes as long as sending.
        self._send: Callable[..., object] = super(zmq.Socket, self.raw).send
        self._on_message = on_message
        self._when_writable: list[Callable[[], None]] = []
        self._publishes = kind is SocketKind.XPUB
        self._at_once = 1 if kind is SocketKind.DEALER else DRAIN_MESSAGES
        self._pump_due = self._draining = False
        self._locks: list[int] = []
        self.speakers: frozenset[str] | None = None
        self._link = link
        self._guard = guard
        self._user: str | None = None
        self._guarded: list[str] = []
        self._unbound: list[str] = []
        self._dialled: dict[str, str | None] = {}
        self._loop = asyncio.get_running_loop()
        self._fd = int(self.raw.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._pump, 1)
        self._pump_soon()

    def bind(self, address: str) -> None:
        if scheme(address) == "ipc":
            self._locks.append(_claim(address))
        numeric = _numeric(address)
        if self.guards(address):
            self._serve_curve()
            self._guarded.append(numeric)
        try:
            self.raw.bind(numeric)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(
                    f"cannot bind {address}: the address is in use; stop the process that holds it, "
                    "or give this topology another `port:`"
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(
                    f"cannot bind {address}: this machine has no such address; correct `hosts:`, or start this host's "
                    "share on the machine that has it"
                ) from None
            raise UsageError(f"cannot bind {address}: {error}") from None

    def connect(self, address: str) -> None:
        if self.guards(address):
            self._dialled[address] = None
            self._dial(address)
        else:
            self.raw.connect(address)

    def guards(self, address: str) -> bool:
        return self._guard is not None and self._guard.guards(address)

    def _serve_curve(self) -> None:
        assert self._guard is not None
        assert self._guard.pair is not None
        self.raw.setsockopt(zmq.ZAP_DOMAIN, self._link.encode())
        self.raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else everybody may come where no handler answers
        self.raw.setsockopt(zmq.CURVE_SECRETKEY, self._guard.pair.secret.encode())
        self.raw.setsockopt(zmq.CURVE_SERVER, 1)

    def _dial(self, address: str) -> None:
        """Connect with the key that the server must have, or stay away while none is allowed."""
        assert self._guard is not None
        assert self._guard.pair is not None
        key, before = self._guard.server_key(address), self._dialled[address]
        if key == before:
            return
        if before is not None:
            self.raw.disconnect(address)
        if key is not None:
            self.raw.setsockopt(zmq.CURVE_SERVERKEY, key.encode())
            self.raw.setsockopt(zmq.CURVE_PUBLICKEY, self._guard.pair.public.encode())
            self.raw.setsockopt(zmq.CURVE_SECRETKEY, self._guard.pair.secret.encode())
            self.raw.connect(address)
        self._dialled[address] = key

    def renew(self, fewer_rights: bool) -> None:
        """The allow-list was looked at. What was bound is bound anew, for that ends every connection: they come back by
        a handshake, those whose key is still allowed."""
        if self.raw.closed:
            return
        for address in self._dialled:
            self._dial(address)
        if fewer_rights:
            for address in set(self._guarded) - set(self._unbound):
                self.raw.unbind(address)
                self._unbound.append(address)
        self._bind_again()

    def _bind_again(self) -> None:
        """libzmq lets go of an address a moment after `unbind`."""
        if self.raw.closed or not self._unbound:
            return
        try:
            self.raw.bind(self._unbound[-1])
            self._unbound.pop()
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE:  # its network is away, perhaps
                logging.getLogger(__name__).warning("%s: not bound again yet: %s", self._unbound[-1], error)
        self._pump_soon()  # it lets go only if asked for events
        self._loop.call_later(BIND_AGAIN_S, self._bind_again)

    def blame(self) -> None:
        if self._guard is not None and self._user is not None:
            self._guard.refused(self._user)

    def send(self, *parts: Buffer) -> bool:
        send, last = self._send, parts[-1]
        try:
            for part in parts[:-1]:
                send(part, _MORE)
            send(last, _NOBLOCK, copy=len(last) < COPY_BELOW)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:  # a ROUTER's peer is gone
                return False
            raise
        if self._on_message is not None and not self._draining:  # that asks again after each message
            self._pump_soon()
        return True

    def when_writable(self, callback: Callable[[], None]) -> None:
        self._when_writable.append(callback)
        self._pump_soon()

    def subscribe(self, topic: bytes) -> None:
        self.raw.setsockopt(zmq.SUBSCRIBE, topic)

    def unsubscribe(self, topic: bytes) -> None:
        self.raw.setsockopt(zmq.UNSUBSCRIBE, topic)

    def close(self) -> None:
        if self.raw.closed:
            return
        self._loop.remove_reader(self._fd)
        self.raw.close()
        for lock in self._locks:
            os.close(lock)

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self, told: int = 0) -> None:
        """`told`: the messages that the descriptor speaks of, for which the socket need not be asked."""
        self._pump_due = False
        if self._on_message is not None:
            self._draining = True
            try:
                self._drain(self._on_message, told)
            finally:
                self._draining = False
        elif told and not self.raw.closed:
            self.raw.getsockopt(_EVENTS)  # unasked, the descriptor stays readable: the loop would spin
        if self._when_writable and not self.raw.closed and int(self.raw.getsockopt(_EVENTS)) & zmq.POLLOUT:
            waiting, self._when_writable = self._when_writable, []
            for callback in waiting:
                callback()

    def _drain(self, on_message: OnMessage, told: int) -> None:
        recv, events, nbytes, received = self.raw.recv, self.raw.getsockopt, 0, 0
        while received < self._at_once and nbytes < DRAIN_BYTES:
            if self.raw.closed:
                return
            if told <= received < ASK_FIRST and not int(events(_EVENTS)) & _POLLIN:
                return
            try:
                frame = recv(_NOBLOCK, copy=False)
            except zmq.Again:
                return
            parts = [_body(frame)]
            while frame.more:
                frame = recv(_NOBLOCK, copy=False)
                parts.append(_body(frame))
            if not self._guarded or self._is_let_in(frame):
                on_message(parts)
            received += 1
            nbytes += len(parts[-1])
        self._pump_soon()

    def _is_let_in(self, frame: zmq.Frame) -> bool:
        """Whether a message may be read at all; `speakers` and `blame` are about it then."""
        assert self._guard is not None
        try:
            self._user = str(frame.get("User-Id"))
        except zmq.ZMQError:  # over ipc, whose folder is ours alone; a guarded address gives everybody an id
            self._user = self.speakers = None
            return True
        self.speakers = self._guard.speakers(self._link, self._user)
        if not self.speakers:
            self._guard.unread()
        elif self._publishes:
            self._guard.subscribed(self._link, self._user, more=bytes(frame.buffer[:1]) == b"\x01")
        return bool(self.speakers)


def _body(frame: zmq.Frame) -> Buffer:
    # Small frames are slices of libzmq's read buffer: a view would keep all of it alive, at any alignment.
    return frame.bytes if len(frame) <= SMALL_FRAME else frame.buffer


def _numeric(address: str) -> str:
    """libzmq dials names, and binds numbers only.

    Raises:
        UnreachableError: the name has no address yet.
        UsageError: it has one that others cannot dial.
    """
    name, _, port = address.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return address
    if scheme(address) != "tcp" or name == "*" or not port.isdigit():
        return address
    try:
        found = getaddrinfo(name, int(port), type=SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UnreachableError(f"cannot bind {address}: {name} has no address here: {error}") from None
    ip = ipaddress.ip_address(found)
    if ip.is_loopback:
        raise UsageError(
            f"cannot bind {address}: {name} is {ip} on this machine, where no other host reaches it; "
            "give `hosts:` the address that they dial, or correct /etc/hosts"
        )
    return f"tcp://[{ip}]:{port}" if ip.version == 6 else f"tcp://{ip}:{port}"


def _claim(address: str) -> int:
    """Lock an ipc address for this process: libzmq would take a living process's path away without a word.

    The lock goes with the process, however it ends.
    """
    path = Path(address.removeprefix("ipc://"))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise AddressInUseError(
            f"cannot bind {address}: another process holds it; is this node running already?"
        ) from None
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return lock
