# A task to be read: fills memory with bytes from a seed, prints "address pages", and stops itself.
# Every fifth page stays zero; the last quarter is made inaccessible.
import ctypes, os, random, signal, sys

PAGE, PAGES = 4096, 2048
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
memory = libc.mmap(None, ctypes.c_size_t(PAGES * PAGE), 3, 0x22, -1, ctypes.c_long(0))
contents = bytearray(random.Random(int(sys.argv[1])).randbytes(PAGES * PAGE))
for page in range(0, PAGES, 5):
    contents[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
ctypes.memmove(memory, bytes(contents), len(contents))
with open(sys.argv[2], "wb") as file:
    file.write(contents)
quarter = PAGES // 4 * PAGE
if libc.mprotect(ctypes.c_void_p(memory + 3 * quarter), ctypes.c_size_t(quarter), 0):
    sys.exit("mprotect: " + os.strerror(ctypes.get_errno()))
print(memory, PAGES, flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
