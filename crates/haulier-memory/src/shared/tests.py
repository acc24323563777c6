# A task with every kind of memory that CRIU dumps with contents, and some that it does not, for
# tests.rs. Prints one line when it is ready, and another after each line it is told.
# Every page of interest begins with a tag: kind and number.
import ctypes, os, signal, sys

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.shmat.restype = ctypes.c_void_p
RW, SHARED, PRIVATE, ANON = 3, 1, 2, 0x20


def check(result, what):
    if result in (-1, None) or result == 2**64 - 1:
        sys.exit(what + ": " + os.strerror(ctypes.get_errno()))
    return result


def tag(address, kind, pages):
    for page in pages:
        text = f"{kind} {page}\n".encode()
        ctypes.memmove(address + page * PAGE, text, len(text))


def new(pages, flags, fd=-1):
    return check(libc.mmap(None, pages * PAGE, RW, flags, fd, 0), "mmap")


shared = new(1024, SHARED | ANON)
tag(shared, "anonymous", range(0, 1024, 2))
memfd = os.memfd_create("mapped")
os.ftruncate(memfd, 64 * PAGE + 100)
tag(new(64, SHARED, memfd), "memfd", range(8, 64))
os.pwrite(memfd, b"memfd 64\n", 64 * PAGE)
os.close(memfd)
unmapped = os.memfd_create("unmapped")
os.pwrite(unmapped, b"unmapped 3\n", 3 * PAGE)
segment = check(libc.shmget(0, ctypes.c_size_t(32 * PAGE), 0o1600), "shmget")
tag(check(libc.shmat(segment, None, 0), "shmat"), "system-v", range(32))
check(libc.shmctl(segment, 0, None), "shmctl")

file = open(sys.argv[1], "w+b")
for page in range(64):
    file.write(f"file {page}\n".encode().ljust(PAGE, b"."))
file.flush()
copied = new(64, PRIVATE, file.fileno())
ctypes.string_at(copied, 64 * PAGE)
tag(copied, "copied", range(10, 20))
outside = new(64, SHARED, file.fileno())
ctypes.string_at(outside, 64 * PAGE)

locked = new(16, PRIVATE | ANON)
tag(locked, "locked", range(16))
check(libc.mlock(ctypes.c_void_p(locked), ctypes.c_size_t(16 * PAGE)), "mlock")
lazy = new(16, PRIVATE | ANON)
tag(lazy, "lazy", range(16))

child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
for line in sys.stdin:
    if line == "write\n":
        tag(shared, "rewritten", [0, 2])
    if line == "unmap\n":
        libc.munmap(ctypes.c_void_p(locked), ctypes.c_size_t(8 * PAGE))
        libc.munmap(ctypes.c_void_p(copied + 12 * PAGE), ctypes.c_size_t(PAGE))
    print("done", flush=True)
os.kill(child, 9)
