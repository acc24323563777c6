/*
 * Once the file "fork" exists, forks children that leave their family: each is nobody's, in a session
 * of its own, and reads all of the memory that it has from here, in no order, before it says whether it
 * was right. This process reads none of it before it is asked.
 */
#include "program.h"

#define CHILDREN 6
#define PAGES 8192L

static char *memory;
static struct control {
    atomic_int born, right, wrong;
} *control;

static void leave(int number)
{
    setsid();
    control->born++;
    for (long i = 0; i < PAGES; i++) {
        /* A prime: every page comes once. */
        long page = (i * 4099 + number * 1000) % PAGES;
        if (!holds(memory + page * PAGE, PAGE, 7000 + page)) {
            char path[4096];
            control->wrong++;
            snprintf(path, sizeof path, "%s/wrong", folder);
            close(open(path, O_WRONLY | O_CREAT, 0644));
            _exit(1);
        }
    }
    control->right++;
    while (!exists("end"))
        usleep(20000);
    _exit(0);
}

static void step(void)
{
    static int forks;
    if (forks < CHILDREN && exists("fork")) {
        int ending;
        pid_t child = fork();
        expect(child >= 0, "fork", forks);
        if (child == 0) {
            if (fork() == 0)
                leave(forks);
            _exit(0);
        }
        expect(waitpid(child, &ending, 0) == child && ending == 0, "a child ended badly", forks);
        forks++;
    }
    usleep(5000);
}

static void check(void)
{
    for (int patience = 60000; control->right + control->wrong < CHILDREN; patience--) {
        expect(patience > 0, "children do not come to an end, of", control->born);
        usleep(1000);
    }
    expect(control->wrong == 0, "children with strange memory", control->wrong);
    for (long page = 0; page < PAGES; page++)
        expect(holds(memory + page * PAGE, PAGE, 7000 + page), "page", page);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    control = (struct control *)map(PAGE, MAP_SHARED);
    memory = map(PAGES * PAGE, MAP_PRIVATE);
    for (long page = 0; page < PAGES; page++)
        fill(memory + page * PAGE, PAGE, 7000 + page);
    perform(step, check);
    return 0;
}
