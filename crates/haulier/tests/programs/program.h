/*
 * What the programs here have in common. In folder argv[1] each writes numbered lines to "status":
 * "ready K" when all is in place, then "wait" again and again while it works, until the file "go-K"
 * exists, then "good K", or "wrong: ..." and its end. When "end" exists as well, "done". The lines
 * land where the descriptor's offset says.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define MIB (1L << 20)
#define WORDS (PAGE / 8)

static const char *folder;
static int status, line, turn;

__attribute__((unused)) static void say(const char *format, ...)
{
    char text[256];
    int length = snprintf(text, sizeof text, "%d ", ++line);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(text + length, sizeof text - length - 1, format, arguments);
    va_end(arguments);
    text[length++] = '\n';
    if (write(status, text, length) != length)
        exit(2);
}

/* Only for the process that says things: others report to it. */
__attribute__((unused)) static void expect(int holds, const char *what, long where)
{
    if (!holds) {
        say("wrong: %s at %ld, turn %d, errno %d", what, where, turn, errno);
        exit(1);
    }
}

static int exists(const char *name)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

/* splitmix64: neighbouring seeds and words have nothing in common. */
static uint64_t mixed(uint64_t seed, uint64_t index)
{
    uint64_t z = (seed << 32) + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

__attribute__((unused)) static void fill(void *at, long bytes, uint64_t seed)
{
    uint64_t *words = at;
    for (long i = 0; i < bytes / 8; i++)
        words[i] = mixed(seed, i);
}

__attribute__((unused)) static int holds(const void *at, long bytes, uint64_t seed)
{
    const uint64_t *words = at;
    for (long i = 0; i < bytes / 8; i++)
        if (words[i] != mixed(seed, i))
            return 0;
    return 1;
}

__attribute__((unused)) static int is_zero(const void *at, long bytes)
{
    const uint64_t *words = at;
    for (long i = 0; i < bytes / 8; i++)
        if (words[i])
            return 0;
    return 1;
}

__attribute__((unused)) static char *map(long bytes, int flags)
{
    char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
    expect(at != MAP_FAILED, "mmap", bytes);
    return at;
}

static void begin(char **arguments)
{
    char path[4096];
    folder = arguments[1];
    snprintf(path, sizeof path, "%s/status", folder);
    status = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (status < 0)
        exit(2);
}

__attribute__((unused)) static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Works step by step, and checks whenever it is asked to. */
__attribute__((unused)) static void perform(void (*step)(void), void (*check)(void))
{
    for (turn = 1;; turn++) {
        char go[32];
        snprintf(go, sizeof go, "go-%d", turn);
        say("ready %d", turn);
        for (long said = now_ms(); !exists(go);) {
            if (exists("end")) {
                say("done");
                return;
            }
            step();
            /* The monotonic clock of another host may lag behind. */
            if (now_ms() - said >= 20 || now_ms() < said) {
                said = now_ms();
                say("wait");
            }
        }
        check();
        say("good %d", turn);
    }
}
