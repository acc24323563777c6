/*
 * Memory of which each page changes a little, again and again: a word that counts, somewhere else in
 * each. How far each has counted is kept elsewhere.
 */
#include "program.h"

#define PAGES 4096L

static char *memory;
static uint64_t counts[PAGES];

static volatile uint64_t *counter(long page)
{
    return (volatile uint64_t *)(memory + page * PAGE) + mixed(3, page) % WORDS;
}

static void step(void)
{
    static uint64_t turns;
    for (int i = 0; i < 20; i++) {
        long page = mixed(4, turns++) % PAGES;
        expect(*counter(page) == counts[page], "counter of page", page);
        *counter(page) = ++counts[page];
    }
    usleep(2000);
}

static void check(void)
{
    for (long page = 0; page < PAGES; page++) {
        uint64_t counted = *counter(page);
        expect(counted == counts[page], "counter of page", page);
        /* The rest is what it was in the beginning. */
        *counter(page) = mixed(page, counter(page) - (uint64_t *)(memory + page * PAGE));
        expect(holds(memory + page * PAGE, PAGE, page), "page", page);
        *counter(page) = counted;
    }
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    memory = map(PAGES * PAGE, MAP_PRIVATE);
    for (long page = 0; page < PAGES; page++) {
        fill(memory + page * PAGE, PAGE, page);
        *counter(page) = 0;
    }
    perform(step, check);
    return 0;
}
