/*
 * Preloaded into a program that refuses to run as root, for the sake of a test: it is told another
 * user, and remains root.
 */
#include <unistd.h>

uid_t getuid(void)
{
    return 1;
}

uid_t geteuid(void)
{
    return 1;
}
