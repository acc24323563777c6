/*
 * Forks children all the time, at most 50 at once. Each writes pages of its own over those it has
 * from its parent, and checks them until it is told to end; every third ends soon by itself, and
 * every fifth soon executes this program anew, with memory that it fills like that of the others.
 */
#include "program.h"

#define CHILDREN 50
#define PAGES 64L
#define PARENT 1000

static char *memory;
static struct control {
    /* What the child of that place is to do: 1 live, 2 check and say so, 3 end. */
    atomic_int order[CHILDREN];
    /* What it has found: 0 nothing yet, 1 all well, minus the number of the wrong page and 1. */
    atomic_long found[CHILDREN];
} *control;
static int control_file;
static const char *own_program;
static pid_t children[CHILDREN];
static long forks, rewritten;

/* Of every four pages a child writes one, and never touches another one. */
static uint64_t seed_of(long who, long own, long page)
{
    return page % 4 == 1 ? 2000 + who : page % 4 == 3 ? 100000 + who + own * 64 : PARENT + page;
}

static long strange_page(long who, long own)
{
    for (long page = 0; page < PAGES; page++)
        if (!holds(memory + page * PAGE, PAGE, seed_of(who, own, page)))
            return page;
    return -1;
}

static void execute(int place, long who)
{
    char words[3][16];
    snprintf(words[0], sizeof words[0], "%d", control_file);
    snprintf(words[1], sizeof words[1], "%d", place);
    snprintf(words[2], sizeof words[2], "%ld", who);
    execl(own_program, own_program, folder, words[0], words[1], words[2], NULL);
    _exit(3);
}

static void live(int place, long who, int executed)
{
    long own = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (long page = 1; page < PAGES; page += 2)
        fill(memory + page * PAGE, PAGE, seed_of(who, own, page));
    for (int age = 0;; age++) {
        int order = control->order[place];
        if (order == 3 || (who % 3 == 0 && age > 10))
            _exit(0);
        if (who % 5 == 0 && age > 5 && !executed)
            execute(place, who);
        if (order == 2) {
            long strange = strange_page(who, own);
            control->found[place] = strange < 0 ? 1 : -strange - 1;
            control->order[place] = 1;
        }
        own++;
        for (long page = 3; page < PAGES; page += 4)
            fill(memory + page * PAGE, PAGE, seed_of(who, own, page));
        usleep(10000);
    }
}

static void take_leave(int place, int options)
{
    int ending;
    if (waitpid(children[place], &ending, options) == children[place]) {
        expect(ending == 0, "a child ended badly, status", ending);
        children[place] = 0;
    }
}

static void step(void)
{
    int place = forks % CHILDREN;
    if (children[place]) {
        control->order[place] = 3;
        take_leave(place, 0);
    }
    expect(children[place] == 0, "a child does not end", place);
    control->order[place] = 1;
    control->found[place] = 0;
    forks++;
    /* Copied by the child, or copied by the parent at its next write: both ways. */
    children[place] = fork();
    expect(children[place] >= 0, "fork", place);
    if (children[place] == 0)
        live(place, forks, 0);
    for (int i = 0; i < CHILDREN; i++)
        if (children[i])
            take_leave(i, WNOHANG);
    long page = rewritten++ % (PAGES / 2) * 2;
    fill(memory + page * PAGE, PAGE, PARENT + page);
    usleep(8000);
}

static void check(void)
{
    for (long page = 0; page < PAGES; page++)
        expect(holds(memory + page * PAGE, PAGE, PARENT + page), "page of the parent", page);
    for (int i = 0; i < CHILDREN; i++)
        if (children[i])
            control->order[i] = 2;
    for (int i = 0; i < CHILDREN; i++) {
        for (int patience = 20000; children[i] && control->found[i] == 0; patience--) {
            take_leave(i, WNOHANG);
            expect(patience > 0, "a child does not answer", i);
            usleep(1000);
        }
        expect(control->found[i] >= 0, "page of a child", -control->found[i] - 1);
        control->found[i] = 0;
    }
}

static void make_memory(void)
{
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, control_file, 0);
    expect(control != MAP_FAILED, "mmap of a memfd", control_file);
    memory = map(PAGES * PAGE, MAP_PRIVATE);
    for (long page = 0; page < PAGES; page++)
        fill(memory + page * PAGE, PAGE, PARENT + page);
}

int main(int count, char **arguments)
{
    own_program = arguments[0];
    if (count == 5) {
        control_file = atoi(arguments[2]);
        make_memory();
        live(atoi(arguments[3]), atol(arguments[4]), 1);
    }
    if (count != 2)
        return 2;
    begin(arguments);
    control_file = memfd_create("control", 0);
    expect(ftruncate(control_file, sizeof *control) == 0, "ftruncate of a memfd", control_file);
    make_memory();
    perform(step, check);
    return 0;
}
