/*
 * Some memory of its own. Linked statically, the rest of it is less than a pipe holds: nobody need read
 * what its dump writes for that to come to its end.
 */
#include "program.h"

#define BYTES MIB

static char *memory;

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
    if (count != 2)
        return 2;
    begin(arguments);
    memory = map(BYTES, MAP_PRIVATE);
    fill(memory, BYTES, 1);
    perform(step, check);
    return 0;
}
