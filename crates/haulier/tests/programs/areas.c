/*
 * 10 000 areas of memory, told apart by their protection so that they do not merge. Some pages of
 * them are rewritten all the time, and some areas change their protection there and back.
 */
#include "program.h"

#define AREAS 10000L
#define PAGES 2L

static char *memory;
static uint32_t counts[AREAS];
static uint64_t steps;

static int protection(long area)
{
    return area % 2 ? PROT_READ : PROT_READ | PROT_WRITE;
}

/* Every tenth area is never written. */
static int right(long area)
{
    char *at = memory + area * PAGES * PAGE;
    if (area % 10 == 4)
        return is_zero(at, PAGES * PAGE);
    return holds(at, PAGE, area + counts[area] * 20000L) && is_zero(at + PAGE, PAGE);
}

static void rewrite(long area)
{
    char *at = memory + area * PAGES * PAGE;
    expect(mprotect(at, PAGES * PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect", area);
    counts[area]++;
    if (area % 10 != 4)
        fill(at, PAGE, area + counts[area] * 20000L);
    expect(mprotect(at, PAGES * PAGE, protection(area)) == 0, "mprotect", area);
}

static void step(void)
{
    for (int i = 0; i < 20; i++) {
        long area = mixed(1, steps++) % AREAS;
        expect(right(area), "area", area);
        rewrite(area);
    }
    usleep(2000);
}

static void check(void)
{
    for (long area = 0; area < AREAS; area++)
        expect(right(area), "area", area);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    memory = map(AREAS * PAGES * PAGE, MAP_PRIVATE);
    madvise(memory, AREAS * PAGES * PAGE, MADV_NOHUGEPAGE);
    for (long area = 0; area < AREAS; area++)
        rewrite(area);
    perform(step, check);
    return 0;
}
