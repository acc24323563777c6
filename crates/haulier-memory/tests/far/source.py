# A task at the source: maps memory at an address, writes it, and stands. Byte 1234 of page n is
# (n * 7 + seed) % 255 + 1, the others are random; every fifth page is zero.
import ctypes, os, sys

PAGE = 4096
address, pages, seed = (int(argument) for argument in sys.argv[1:4])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
flags = 0x02 | 0x20 | 0x100000 | 0x4000  # private, anonymous, at this address, no reserve
length = ctypes.c_size_t(pages * PAGE)
if libc.mmap(ctypes.c_void_p(address), length, 3, flags, -1, ctypes.c_long(0)) != address:
    sys.exit("mmap: " + str(ctypes.get_errno()))
for n in range(pages):
    if n % 5 != 4:
        page = bytearray(os.urandom(PAGE))
        page[1234] = (n * 7 + seed) % 255 + 1
        ctypes.memmove(address + n * PAGE, bytes(page), PAGE)
print("ready", flush=True)
sys.stdin.readline()
