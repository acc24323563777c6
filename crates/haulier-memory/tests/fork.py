# A task that is its own CRIU: it registers memory, hands its userfaultfd to the daemon whose socket
# it is given, forks, and has both copies read all pages. Page n must hold the byte n % 255 + 1.
import array, ctypes, fcntl, os, socket, struct, sys

PAGE, PAGES, SYS_USERFAULTFD = 4096, 256, 323
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
memory = libc.mmap(None, ctypes.c_size_t(PAGES * PAGE), 3, 0x22, -1, ctypes.c_long(0))
libc.madvise(ctypes.c_void_p(memory), ctypes.c_size_t(PAGES * PAGE), 15)
uffd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
if uffd < 0:
    sys.exit("userfaultfd: " + os.strerror(ctypes.get_errno()))
features = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
fcntl.ioctl(uffd, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, features, 0)))
fcntl.ioctl(uffd, 0xC020AA00, bytearray(struct.pack("QQQQ", memory, PAGES * PAGE, 1, 0)))
print(memory, flush=True)
path = sys.stdin.readline().strip()

criu = socket.socket(socket.AF_UNIX)
criu.connect(path)
criu.sendall(struct.pack("i", 77))
criu.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
os.close(uffd)


def check(who, pages):
    for page in pages:
        found = ctypes.string_at(memory + page * PAGE + 99, 1)[0]
        if found != page % 255 + 1:
            print(f"{who}: page {page} holds {found}", file=sys.stderr)
            return 1
    return 0


bad = check("before", range(0, 16))
child = os.fork()
if child == 0:
    os._exit(check("child", range(PAGES)))
print("forked", flush=True)
bad |= check("parent", reversed(range(PAGES)))
bad |= os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
criu.sendall(struct.pack("I", 0x52535446))
sys.exit(bad)
