"""What a process has in the kernel: unlinked files, offsets, queues, locks, mappings.

Of file argv[2] it holds the lock. In folder argv[1] it writes numbered lines to "status": "ready K" when all is in place, then "wait"
until the file "go-K" exists, then "good K", or "wrong: ..." and its end. When "end" exists as well,
"done". The lines land where the descriptor's offset says.
"""

import array
import ctypes
import fcntl
import hashlib
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

FOLDER = sys.argv[1]
PAGE = mmap.PAGESIZE
MIB = 1 << 20
status = open(f"{FOLDER}/status", "wb", buffering=0)
line = 0
role = "parent"


def say(text):
    global line
    line += 1
    status.write(f"{line} {text}\n".encode())


def expect(holds, what):
    if not holds:
        raise AssertionError(f"{role}: {what}")


def content(seed, length):
    """Bytes that depend on the seed, and on their place."""
    return hashlib.shake_128(str(seed).encode()).digest(length)


def path(name):
    return f"{FOLDER}/{name}"


def receive(stream, length):
    received = b""
    while len(received) < length:
        received += stream.recv(length - len(received))
    return received


def await_queued(stream, length):
    """Until so much is queued, which stays there."""
    while len(stream.recv(length, socket.MSG_PEEK)) < length:
        time.sleep(0.002)


class Files:
    """Open regular files, one of them unlinked, one locked, one mapped and written to."""

    def __init__(self):
        self.unlinked = open(path("unlinked"), "w+b", buffering=0)
        self.unlinked.write(content("unlinked", MIB))
        self.unlinked.seek(12345)
        os.unlink(path("unlinked"))
        # The same open file under a second number: they share one offset.
        self.again = os.dup(self.unlinked.fileno())

        self.mapped_unlinked_file = open(path("mapped-unlinked"), "w+b", buffering=0)
        self.mapped_unlinked_file.write(content("mapped", 16 * PAGE))
        self.mapped_unlinked = mmap.mmap(self.mapped_unlinked_file.fileno(), 16 * PAGE)
        os.unlink(path("mapped-unlinked"))

        with open(path("read"), "wb") as file:
            file.write(content("read", MIB))
        self.read = open(path("read"), "rb", buffering=0)
        self.read.seek(54321)

        self.log = open(path("log"), "ab", buffering=0)
        self.log.write(b"0\n")

        # On a file that is this host's own. Another open file tells who holds it.
        self.locked = open(sys.argv[2], "r+b")
        fcntl.flock(self.locked, fcntl.LOCK_EX)
        self.rival = open(sys.argv[2], "rb")

        # Every third page is written to: those are the process's own, the others the file's.
        with open(path("private"), "wb") as file:
            file.write(content("private", 48 * PAGE))
        with open(path("private"), "rb") as file:
            self.private = mmap.mmap(
                file.fileno(), 48 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        for page in range(0, 48, 3):
            self.private[page * PAGE : (page + 1) * PAGE] = content(page, PAGE)

        self.memfd = open(os.memfd_create("of-the-workload"), "w+b", buffering=0)
        self.memfd.write(content("memfd", 100000))
        self.memfd.seek(777)

    def check(self, turn):
        expect(os.fstat(self.unlinked.fileno()).st_nlink == 0, "the unlinked file has a name")
        expect(self.unlinked.tell() == 12345, "offset of the unlinked file")
        expect(os.lseek(self.again, 0, os.SEEK_CUR) == 12345, "offset of its duplicate")
        expect(self.unlinked.read(1000) == content("unlinked", MIB)[12345:13345], "unlinked file")
        expect(os.lseek(self.again, 0, os.SEEK_CUR) == 13345, "they no longer share an offset")
        expect(os.pread(self.again, MIB + 1, 0) == content("unlinked", MIB), "all of it")
        self.unlinked.seek(12345)

        expect(self.mapped_unlinked[:] == content("mapped", 16 * PAGE), "mapped unlinked file")
        # Still one thing: what is written to the file shows in the mapping.
        os.pwrite(self.mapped_unlinked_file.fileno(), bytes([turn]), PAGE)
        expect(self.mapped_unlinked[PAGE] == turn, "mapping of the unlinked file")
        os.pwrite(self.mapped_unlinked_file.fileno(), content("mapped", PAGE + 1)[PAGE:], PAGE)

        expect(self.read.tell() == 54321, "offset of a file")
        expect(self.read.read(1000) == content("read", MIB)[54321:55321], "file")
        self.read.seek(54321)

        self.log.write(f"{turn}\n".encode())
        with open(path("log")) as log:
            expect(log.read() == "".join(f"{t}\n" for t in range(turn + 1)), "appended lines")

        try:
            fcntl.flock(self.rival, fcntl.LOCK_EX | fcntl.LOCK_NB)
            expect(False, "the lock is gone")
        except BlockingIOError:
            pass

        for page in range(48):
            own = content("private", 48 * PAGE)[page * PAGE : (page + 1) * PAGE]
            wanted = content(page, PAGE) if page % 3 == 0 else own
            expect(self.private[page * PAGE : (page + 1) * PAGE] == wanted, f"private page {page}")
        with open(path("private"), "rb") as file:
            expect(file.read() == content("private", 48 * PAGE), "the file under a private mapping")

        expect(self.memfd.tell() == 777, "offset of the memfd")
        expect(os.pread(self.memfd.fileno(), 200000, 0) == content("memfd", 100000), "memfd")


class Events:
    """An eventfd with a count, an epoll that watches it and a pipe, a signal that waits."""

    def __init__(self):
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.pipe, self.pipe_in = os.pipe()
        self.silent, self.silent_in = os.pipe()
        self.epoll = select.epoll()
        for fd in (self.event, self.pipe, self.silent):
            self.epoll.register(fd, select.EPOLLIN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
        signal.setitimer(signal.ITIMER_VIRTUAL, 5000, 7)

    def arm(self, turn):
        os.eventfd_write(self.event, 40 + turn)
        os.write(self.pipe_in, content(turn, 30000))
        os.kill(os.getpid(), signal.SIGUSR1)

    def check(self, turn):
        ready = {fd for fd, _ in self.epoll.poll(0)}
        expect(ready == {self.event, self.pipe}, f"epoll reports {ready}")
        expect(os.eventfd_read(self.event) == 40 + turn, "count of the eventfd")
        expect(os.read(self.pipe, 65536) == content(turn, 30000), "bytes in the pipe")
        expect(self.epoll.poll(0) == [], "epoll reports what is empty")
        expect(signal.sigpending() == {signal.SIGUSR1}, f"pending: {signal.sigpending()}")
        expect(signal.sigtimedwait({signal.SIGUSR1}, 0).si_pid == os.getpid(), "whose signal")
        remaining, interval = signal.getitimer(signal.ITIMER_VIRTUAL)
        expect(interval == 7 and 1000 < remaining <= 5000, f"timer: {remaining}, {interval}")


class Family:
    """A child, with socket pairs to it, and memory that both write."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.memory[:] = content("shared", 4 * MIB)
        self.stream, stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.packets, packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            self.stream, self.packets, self.answers = stream, packets, answers
            self.child()

    def arm(self, turn):
        """Fills the queues, both ways; the child does not read before it is told to."""
        for packet in range(5):
            self.packets.send(content(f"{turn} {packet}", 1000 + packet))
        self.stream.sendall(content(f"{turn} down", 50000))
        await_queued(self.stream, 40000)

    def check(self, turn):
        for page in range(0, 4 * MIB, 64 * PAGE):
            self.memory[page : page + 8] = struct.pack("Q", turn)
        # The mark for the child carries a descriptor: what arrives before it was queued.
        probe, probe_in = os.pipe()
        socket.send_fds(self.stream, [b"!"], [probe_in])
        answer = os.read(self.answers, 4096).decode()
        expect(answer == f"good {turn}", f"the child says: {answer}")
        expect(os.read(probe, 10) == b"sent over", "a descriptor in a message")
        for fd in (probe, probe_in):
            os.close(fd)
        expect(receive(self.stream, 40000) == content(f"{turn} up", 40000), "bytes from the child")
        expect(self.memory[8:16] == struct.pack("Q", turn + 1000), "what the child wrote")
        self.memory[8:16] = content("shared", 16)[8:]

    def child(self):
        global role
        role = "child"
        turn = 0
        try:
            while True:
                turn += 1
                self.stream.sendall(content(f"{turn} up", 40000))
                # The mark that comes after the bytes queued says that it is time.
                await_queued(self.stream, 50001)
                self.child_check(turn)
                os.write(self.answers, f"good {turn}".encode())
        except BaseException as error:
            os.write(self.answers, repr(error).encode())
            os._exit(1)

    def child_check(self, turn):
        queued = receive(self.stream, 50000)
        expect(queued == content(f"{turn} down", 50000), "bytes queued in the socket pair")
        mark, fds, _, _ = socket.recv_fds(self.stream, 1, 1)
        expect(mark == b"!" and len(fds) == 1, "the mark")
        os.write(fds[0], b"sent over")
        os.close(fds[0])
        for packet in range(5):
            wanted = content(f"{turn} {packet}", 1000 + packet)
            expect(self.packets.recv(4096) == wanted, f"packet {packet}")
        self.packets.setblocking(False)
        try:
            expect(self.packets.recv(10) is None, "one packet too many")
        except BlockingIOError:
            pass
        wanted = bytearray(content("shared", 4 * MIB))
        for page in range(0, 4 * MIB, 64 * PAGE):
            wanted[page : page + 8] = struct.pack("Q", turn)
        expect(self.memory[:] == wanted, "memory shared with the parent")
        self.memory[8:16] = struct.pack("Q", turn + 1000)


def main():
    family, files, events = Family(), Files(), Events()
    heap = array.array("Q", range(2_000_000))
    turn = 0
    while True:
        turn += 1
        family.arm(turn)
        events.arm(turn)
        say(f"ready {turn}")
        while not os.path.exists(path(f"go-{turn}")):
            if os.path.exists(path("end")):
                return say("done")
            time.sleep(0.05)
            say("wait")
        files.check(turn)
        events.check(turn)
        family.check(turn)
        expect(all(value == place for place, value in enumerate(heap)), "heap")
        say(f"good {turn}")


try:
    main()
except BaseException as error:
    say(f"wrong: {error!r}")
    raise
