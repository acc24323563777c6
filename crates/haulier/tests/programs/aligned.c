/*
 * A little memory, and a thread that waits with its stack pointer at the beginning of a page: CRIU's lazy
 * dumps then leave no page behind.
 */
#include "program.h"

#define BYTES MIB

static char *memory;

static void *aligned(void *unused)
{
    (void)unused;
    /* pause(2), or what it is made of; again, should it be interrupted. */
#if defined(__x86_64__)
    __asm__ volatile("and $-4096, %%rsp\n1: mov $34, %%eax\nsyscall\njmp 1b" ::: "memory");
#elif defined(__aarch64__)
    __asm__ volatile("mov x9, sp\nand x9, x9, #-4096\nmov sp, x9\n"
                     "1: mov x0, #0\nmov x1, #0\nmov x2, #0\nmov x3, #0\nmov x8, #73\nsvc #0\nb 1b"
                     ::: "memory");
#else
#error "no way is known here to wait with an aligned stack"
#endif
    __builtin_unreachable();
}

static void step(void)
{
    usleep(2000);
}

static void check(void)
{
    expect(holds(memory, BYTES, 1), "memory", 0);
}

int main(int count, char **arguments)
{
    pthread_t thread;
    if (count != 2)
        return 2;
    begin(arguments);
    memory = map(BYTES, MAP_PRIVATE);
    fill(memory, BYTES, 1);
    expect(pthread_create(&thread, NULL, aligned, NULL) == 0, "pthread_create", 0);
    usleep(10000);
    perform(step, check);
    return 0;
}
