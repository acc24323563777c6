/*
 * 64 threads, each writing pages of its own all the time and checking what it finds. What a page
 * has to hold is told by a count kept elsewhere.
 */
#include "program.h"

#define THREADS 64
#define PAGES 64L

static struct {
    char *memory;
    uint32_t counts[PAGES];
    /* The wrong page and 1. */
    atomic_long wrong;
    atomic_long writes;
    pthread_mutex_t lock;
} writers[THREADS];

static int right(long who, long page)
{
    uint32_t written = writers[who].counts[page];
    char *at = writers[who].memory + page * PAGE;
    return written ? holds(at, PAGE, who * 64 + page + written * 10000L) : is_zero(at, PAGE);
}

static void *write_on(void *argument)
{
    long who = (long)argument;
    for (uint64_t n = 0;; n++) {
        /* Half of the writes go to an eighth of the pages. */
        long page = mixed(who, n) % (n % 2 ? PAGES : PAGES / 8);
        pthread_mutex_lock(&writers[who].lock);
        if (!right(who, page))
            writers[who].wrong = page + 1;
        writers[who].counts[page]++;
        fill(writers[who].memory + page * PAGE, PAGE, who * 64 + page + writers[who].counts[page] * 10000L);
        writers[who].writes++;
        pthread_mutex_unlock(&writers[who].lock);
        usleep(4000);
    }
    return NULL;
}

static void step(void)
{
    for (int who = 0; who < THREADS; who++)
        expect(writers[who].wrong == 0, "page of a thread", who * 1000 + writers[who].wrong - 1);
    usleep(10000);
}

static void check(void)
{
    for (int who = 0; who < THREADS; who++) {
        pthread_mutex_lock(&writers[who].lock);
        for (long page = 0; page < PAGES; page++)
            expect(right(who, page), "page of a thread", who * 1000 + page);
        pthread_mutex_unlock(&writers[who].lock);
    }
    for (int who = 0; who < THREADS; who++) {
        long before = writers[who].writes;
        for (int patience = 20000; writers[who].writes == before; patience--) {
            expect(patience > 0, "a thread stands still", who);
            usleep(1000);
        }
    }
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    for (long who = 0; who < THREADS; who++) {
        pthread_t thread;
        pthread_attr_t small;
        writers[who].memory = map(PAGES * PAGE, MAP_PRIVATE);
        pthread_mutex_init(&writers[who].lock, NULL);
        pthread_attr_init(&small);
        pthread_attr_setstacksize(&small, 64 * 1024);
        expect(pthread_create(&thread, &small, write_on, (void *)who) == 0, "pthread_create", who);
    }
    perform(step, check);
    return 0;
}
