/*
 * Does to its memory what it can think of, by the numbers of seed argv[2]: writes, maps, unmaps,
 * moves, grows, shrinks, protects, discards, has the kernel write, forks. What each page has to
 * hold it keeps in a table, and compares all of it when it is asked to. With argv[3] "maps" it does
 * little but map, unmap and move.
 */
#include "program.h"

#define REGIONS 48
#define MOST_PAGES 1024
#define ALL_PAGES 6000
#define CHILDREN 4
#define FORKS 40

static struct region {
    char *at;
    long pages;
    int protection;
    /* Which write each page is from; 0 is a page of zeroes. */
    uint32_t stamps[MOST_PAGES];
} regions[REGIONS];
static long all_pages;
static uint32_t stamp, who;
static uint64_t state, operations;
static int tube[2], only_maps;

static struct {
    /* 1 work, 2 compare, 3 end */
    atomic_int order[CHILDREN];
    atomic_int answer[CHILDREN];
    char words[CHILDREN][128];
} *control;
static pid_t children[CHILDREN];
static int forks, own_place = -1;

static uint64_t any(uint64_t below)
{
    state = mixed(state, operations++);
    return (state >> 11) % below;
}

/* A child leaves word and waits to be killed, so that it can be looked at. */
static void must(int holds, const char *what, long region, long page)
{
    char text[128];
    if (holds)
        return;
    snprintf(text, sizeof text, "%s (region %ld, page %ld of process %u, errno %d)", what, region, page, who, errno);
    if (own_place < 0)
        expect(0, text, operations);
    memcpy(control->words[own_place], text, sizeof text);
    control->answer[own_place] = -1;
    for (;;)
        pause();
}

static uint32_t next_stamp(void)
{
    stamp = (stamp + 1) & 0x3ffffff;
    return who << 26 | (stamp ? stamp : ++stamp);
}

static void reach(struct region *r, int protection)
{
    must(mprotect(r->at, r->pages * PAGE, protection) == 0, "mprotect", r - regions, r->pages);
}

static void compare(void)
{
    for (int i = 0; i < REGIONS; i++) {
        struct region *r = &regions[i];
        if (!r->at)
            continue;
        if (r->protection == PROT_NONE)
            reach(r, PROT_READ);
        for (long page = 0; page < r->pages; page++) {
            char *at = r->at + page * PAGE;
            if (r->stamps[page])
                must(holds(at, PAGE, r->stamps[page]), "not what was written", i, page);
            else
                must(is_zero(at, PAGE), "not zero", i, page);
        }
        if (r->protection == PROT_NONE)
            reach(r, PROT_NONE);
    }
}

static void create(struct region *r)
{
    long pages = any(16) == 0 ? MOST_PAGES : 1 + any(64);
    if (all_pages + pages > ALL_PAGES)
        return;
    r->at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(r->at != MAP_FAILED, "mmap", r - regions, pages);
    if (any(2) == 0)
        madvise(r->at, pages * PAGE, any(2) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    r->pages = pages;
    r->protection = PROT_READ | PROT_WRITE;
    memset(r->stamps, 0, sizeof r->stamps);
    all_pages += pages;
}

static void cut_off(struct region *r, long pages)
{
    must(munmap(r->at + (r->pages - pages) * PAGE, pages * PAGE) == 0, "munmap", r - regions, pages);
    r->pages -= pages;
    all_pages -= pages;
    memset(r->stamps + r->pages, 0, pages * sizeof *r->stamps);
    if (r->pages == 0)
        r->at = NULL;
}

static void behead(struct region *r, long pages)
{
    must(munmap(r->at, pages * PAGE) == 0, "munmap", r - regions, pages);
    memmove(r->stamps, r->stamps + pages, (r->pages - pages) * sizeof *r->stamps);
    memset(r->stamps + r->pages - pages, 0, pages * sizeof *r->stamps);
    r->at += pages * PAGE;
    r->pages -= pages;
    all_pages -= pages;
}

static void resize(struct region *r)
{
    long pages = 1 + any(r->pages + 64);
    if (pages > MOST_PAGES || all_pages + pages - r->pages > ALL_PAGES)
        return;
    char *at = mremap(r->at, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    /* Parts of it may be areas of their own by now. */
    if (at == MAP_FAILED)
        return;
    for (long page = pages; page < r->pages; page++)
        r->stamps[page] = 0;
    all_pages += pages - r->pages;
    r->at = at;
    r->pages = pages;
}

/*
 * From Linux 6.17 on one mremap moves several areas in turn, and fails in the middle at one that a
 * userfaultfd is registered for. What it has moved by then is fetched back.
 */
static void move_back(struct region *r, char *at)
{
    unsigned char present;
    for (long page = 0; page < r->pages; page++) {
        char *from = at + page * PAGE, *to = r->at + page * PAGE;
        if (mincore(to, PAGE, &present) == 0)
            continue;
        must(mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap back", r - regions, page);
    }
    munmap(at, r->pages * PAGE);
}

/* To a place that was just freed, maybe by another region. */
static void move(struct region *r)
{
    char *at = mmap(NULL, r->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(at != MAP_FAILED, "mmap", r - regions, r->pages);
    char *there = mremap(r->at, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
    if (there == MAP_FAILED)
        move_back(r, at);
    else
        r->at = there;
}

static void write_pages(struct region *r)
{
    if (!(r->protection & PROT_WRITE))
        return;
    long page = any(r->pages), count = 1 + any(8);
    for (; count > 0 && page < r->pages; count--, page++) {
        char *at = r->at + page * PAGE;
        switch (any(8)) {
        case 0:
            memset(at, 0, PAGE);
            r->stamps[page] = 0;
            break;
        case 1: {
            char content[PAGE];
            uint32_t new = next_stamp();
            fill(content, PAGE, new);
            must(write(tube[1], content, PAGE) == PAGE, "write to a pipe", r - regions, page);
            must(read(tube[0], at, PAGE) == PAGE, "read from a pipe", r - regions, page);
            r->stamps[page] = new;
            break;
        }
        default:
            r->stamps[page] = next_stamp();
            fill(at, PAGE, r->stamps[page]);
        }
    }
}

static void discard(struct region *r)
{
    long first = any(r->pages), count = 1 + any(r->pages - first);
    must(madvise(r->at + first * PAGE, count * PAGE, MADV_DONTNEED) == 0, "MADV_DONTNEED", r - regions, first);
    memset(r->stamps + first, 0, count * sizeof *r->stamps);
}

static void protect(struct region *r)
{
    static const int all[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
    r->protection = all[any(4)];
    reach(r, r->protection);
}

static void operate(void)
{
    struct region *r = &regions[any(REGIONS)];
    uint64_t choice = any(100);
    if (!r->at)
        create(r);
    else if (choice < (only_maps ? 30 : 65))
        write_pages(r);
    else if (choice < (only_maps ? 40 : 72))
        discard(r);
    else if (choice < (only_maps ? 50 : 78))
        protect(r);
    else if (choice < 84)
        resize(r);
    else if (choice < 90)
        move(r);
    else if (choice < 93)
        cut_off(r, 1 + any(r->pages));
    else if (choice < 96 && r->pages > 1)
        behead(r, 1 + any(r->pages - 1));
    else
        cut_off(r, r->pages);
}

static void live(int place)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    own_place = place;
    state ^= mixed(who, stamp);
    must(pipe(tube) == 0, "pipe", 0, 0);
    for (;;) {
        int order = control->order[place];
        if (order == 3)
            _exit(0);
        if (order == 2) {
            compare();
            control->order[place] = 1;
            control->answer[place] = 1;
        }
        for (int i = 0; i < 3; i++)
            operate();
        usleep(1500);
    }
}

static void fork_or_end(int place)
{
    int ending;
    if (children[place]) {
        control->order[place] = 3;
        must(waitpid(children[place], &ending, 0) == children[place], "waitpid", place, 0);
        expect(ending == 0, "a child ended badly, status", ending);
        children[place] = 0;
    } else if (forks < FORKS) {
        control->order[place] = 1;
        control->answer[place] = 0;
        int child = fork();
        expect(child >= 0, "fork", place);
        if (child == 0) {
            who = 1 + forks;
            close(tube[0]);
            close(tube[1]);
            live(place);
        }
        forks++;
        children[place] = child;
    }
}

static void listen_to(int place)
{
    if (control->answer[place] < 0) {
        say("wrong: %s", control->words[place]);
        exit(1);
    }
}

static void step(void)
{
    for (int i = 0; i < 3; i++)
        operate();
    for (int place = 0; place < CHILDREN; place++)
        if (children[place])
            listen_to(place);
    if (any(60) == 0) {
        /* It may have found something, and would not end. */
        int place = any(CHILDREN);
        listen_to(place);
        fork_or_end(place);
    }
    usleep(1500);
}

static void check(void)
{
    for (int place = 0; place < CHILDREN; place++) {
        control->answer[place] = 0;
        if (children[place])
            control->order[place] = 2;
    }
    compare();
    for (int place = 0; place < CHILDREN; place++)
        for (int patience = 20000; children[place] && control->answer[place] != 1; patience--) {
            listen_to(place);
            int ending;
            expect(patience > 0, "a child does not answer", place);
            if (waitpid(children[place], &ending, WNOHANG) > 0)
                expect(0, "a child has died, status", ending);
            usleep(1000);
        }
    /* A new supply, for the time after. */
    forks = forks > FORKS / 2 ? FORKS / 2 : forks;
}

int main(int count, char **arguments)
{
    if (count < 3)
        return 2;
    begin(arguments);
    only_maps = count > 3 && strcmp(arguments[3], "maps") == 0;
    state = strtoull(arguments[2], NULL, 10);
    control = (void *)map(PAGE, MAP_SHARED);
    expect(pipe(tube) == 0, "pipe", 0);
    for (int i = 0; i < 400; i++)
        operate();
    perform(step, check);
    return 0;
}
