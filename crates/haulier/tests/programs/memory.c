/*
 * Memory of every kind, checked by content. It stands still while it moves.
 */
#include "program.h"

#define CHILDREN 3
#define FRAMES 64
#define BLOCKS 3000

/* The number after a label in a file of /proc. */
static long number_in(const char *path, const char *label)
{
    char text[8192];
    int fd = open(path, O_RDONLY);
    long length = read(fd, text, sizeof text - 1);
    close(fd);
    text[length > 0 ? length : 0] = 0;
    char *found = strstr(text, label);
    expect(found != NULL, label, 0);
    return atol(found + strlen(label));
}

static long resident_kib(void)
{
    return number_in("/proc/self/status", "VmRSS:");
}

/* ---- regions ---- */

#define UNTOUCHED (64 * MIB)
#define ZEROED (8 * MIB)
#define SPARSE (1024 * MIB)
#define GUARDED (4 * MIB)
#define HOLED (8 * MIB)
#define HUGE (8 * MIB)
#define LOCKED (4 * PAGE)
#define STRIPE (16 * PAGE)

static char *untouched, *zeroed, *sparse, *guarded, *holed, *huge, *locked, *read_only, *moved;
static char *blocks[BLOCKS];
static char unset[MIB], set[64 * PAGE] = {1};
static const long sparse_pages[] = {0, 1, 511, 512, 12345, 100000, SPARSE / PAGE - 1};

static void make_regions(void)
{
    untouched = map(UNTOUCHED, MAP_PRIVATE);
    zeroed = map(ZEROED, MAP_PRIVATE);
    for (long at = 0; at < ZEROED; at += PAGE)
        *(volatile char *)(zeroed + at) = 0;

    sparse = map(SPARSE, MAP_PRIVATE | MAP_NORESERVE);
    /* A touched page is to stay alone. */
    madvise(sparse, SPARSE, MADV_NOHUGEPAGE);
    for (unsigned i = 0; i < sizeof sparse_pages / sizeof *sparse_pages; i++)
        fill(sparse + sparse_pages[i] * PAGE, PAGE, 100 + i);

    guarded = map(GUARDED, MAP_PRIVATE);
    fill(guarded, GUARDED, 200);
    for (long at = 0; at < GUARDED; at += 2 * STRIPE)
        mprotect(guarded + at, STRIPE, PROT_NONE);

    read_only = map(MIB, MAP_PRIVATE);
    fill(read_only, MIB, 201);
    mprotect(read_only, MIB, PROT_READ);

    holed = map(HOLED, MAP_PRIVATE);
    fill(holed, HOLED, 202);
    for (long at = 0; at < HOLED; at += 4 * STRIPE)
        madvise(holed + at, STRIPE, MADV_DONTNEED);

    huge = map(HUGE, MAP_PRIVATE);
    madvise(huge, HUGE, MADV_HUGEPAGE);
    fill(huge, HUGE, 203);

    locked = map(LOCKED, MAP_PRIVATE);
    fill(locked, LOCKED, 204);
    expect(mlock(locked, LOCKED) == 0, "mlock", 0);

    /* Moved by mremap to where it can grow; then a page of it is given back. */
    char *before = map(MIB, MAP_PRIVATE);
    fill(before, MIB, 205);
    moved = mremap(before, MIB, 3 * MIB, MREMAP_MAYMOVE);
    expect(moved != MAP_FAILED, "mremap", 0);
    munmap(moved + 2 * MIB, PAGE);

    for (int i = 0; i < BLOCKS; i++) {
        blocks[i] = malloc(200);
        fill(blocks[i], 200, 10000 + i);
    }
    fill(unset, sizeof unset, 206);
    fill(set, sizeof set, 207);
}

static void check_sparse(void)
{
    unsigned next = 0;
    for (long page = 0; page < SPARSE / PAGE; page++) {
        char *at = sparse + page * PAGE;
        if (next < sizeof sparse_pages / sizeof *sparse_pages && page == sparse_pages[next]) {
            expect(holds(at, PAGE, 100 + next), "sparse", page);
            next++;
        } else {
            expect(*(uint64_t *)at == 0, "between the sparse pages", page);
        }
    }
}

static void check_guarded(void)
{
    for (long at = 0; at < GUARDED; at += 2 * STRIPE) {
        /* The kernel would read it for us, and says EFAULT. */
        expect(access(guarded + at, F_OK) == -1 && errno == EFAULT, "guard is gone", at);
        mprotect(guarded + at, STRIPE, PROT_READ | PROT_WRITE);
    }
    expect(holds(guarded, GUARDED, 200), "behind PROT_NONE", 0);
    for (long at = 0; at < GUARDED; at += 2 * STRIPE)
        mprotect(guarded + at, STRIPE, PROT_NONE);
}

static void check_holed(void)
{
    const uint64_t *words = (uint64_t *)holed;
    for (long i = 0; i < HOLED / 8; i++) {
        int hole = i * 8 % (4 * STRIPE) < STRIPE;
        expect(words[i] == (hole ? 0 : mixed(202, i)), hole ? "MADV_DONTNEED" : "holed", i * 8);
    }
}

static void check_regions(void)
{
    expect(is_zero(untouched, UNTOUCHED), "never touched", 0);
    expect(is_zero(zeroed, ZEROED), "touched with zeroes", 0);
    check_sparse();
    check_guarded();
    expect(holds(read_only, MIB, 201), "PROT_READ", 0);
    check_holed();
    expect(holds(huge, HUGE, 203), "MADV_HUGEPAGE", 0);
    expect(holds(locked, LOCKED, 204), "mlock", 0);
    expect(number_in("/proc/self/status", "VmLck:") >= LOCKED / 1024, "no longer locked", 0);
    expect(holds(moved, MIB, 205), "mremap", 0);
    expect(is_zero(moved + MIB, MIB) && is_zero(moved + 2 * MIB + PAGE, MIB - PAGE), "grown", 0);
    for (int i = 0; i < BLOCKS; i++)
        expect(holds(blocks[i], 200, 10000 + i), "malloc", i);
    expect(holds(unset, sizeof unset, 206), ".bss", 0);
    expect(holds(set, sizeof set, 207), ".data", 0);
}

/* ---- a family that shares pages until one of them writes ---- */

#define SHARED_PAGES 4096L

static char *shared;
static struct {
    atomic_int round;
    /* What a child last verified, or minus the page that was wrong. */
    atomic_long verdict[CHILDREN + 1];
} *control;

/* Number `who` (0 is the parent) writes, in round r, those pages whose remainder is r's. */
static uint64_t shared_seed(long who, long page, long upto)
{
    long every = 3 + who;
    for (long r = upto; r > 0 && r > upto - every; r--)
        if (page % every == r % every)
            return 1000000 + r * 100 + who;
    return 300;
}

static void diverge(long who, long r)
{
    for (long page = r % (3 + who); page < SHARED_PAGES; page += 3 + who)
        fill(shared + page * PAGE, PAGE, shared_seed(who, page, r));
}

/* The first page that is not as it should be, or -1. */
static long strange_page(long who, long r)
{
    for (long page = 0; page < SHARED_PAGES; page++)
        if (!holds(shared + page * PAGE, PAGE, shared_seed(who, page, r)))
            return page;
    return -1;
}

static void live_as_child(long who)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int done = 0;; usleep(2000)) {
        int wanted = control->round;
        if (wanted == done)
            continue;
        long strange = strange_page(who, done);
        diverge(who, wanted);
        done = wanted;
        control->verdict[who] = strange < 0 ? wanted : -strange - 1;
    }
}

static void make_family(void)
{
    control = (void *)map(PAGE, MAP_SHARED);
    shared = map(SHARED_PAGES * PAGE, MAP_PRIVATE);
    for (long page = 0; page < SHARED_PAGES; page++)
        fill(shared + page * PAGE, PAGE, 300);
    for (long who = 1; who <= CHILDREN; who++)
        if (fork() == 0)
            live_as_child(who);
}

/* Everyone checks what the round before left, and writes anew. */
static void check_family(void)
{
    int before = control->round;
    long strange = strange_page(0, before);
    expect(strange < 0, "page shared with children", strange);
    diverge(0, before + 1);
    control->round = before + 1;
    for (long who = 1; who <= CHILDREN; who++) {
        int patience = 30000, ending;
        while (control->verdict[who] != before + 1 && control->verdict[who] >= 0 && patience-- > 0) {
            if (waitpid(-1, &ending, WNOHANG) > 0)
                expect(0, "a child has died, status", ending);
            usleep(1000);
        }
        expect(patience > 0, "child does not answer", who);
        expect(control->verdict[who] >= 0, "page of a child", -control->verdict[who] - 1);
    }
}

/* ---- the stack, and what happens on top of it ---- */

static void stand(void)
{
    check_family();
    for (turn = 1;; turn++) {
        char go[32];
        snprintf(go, sizeof go, "go-%d", turn);
        long before = resident_kib();
        say("ready %d", turn);
        while (!exists(go)) {
            if (exists("end"))
                return;
            usleep(50000);
            say("wait");
        }
        /* What nobody wrote must not have become memory on the way. */
        long after = resident_kib();
        expect(after < before + 16 * 1024, "KiB became resident", after - before);
        check_regions();
        check_family();
        say("good %d", turn);
    }
}

static void deeper(int frame)
{
    char block[16 * PAGE];
    fill(block, sizeof block, 400 + frame);
    if (frame + 1 < FRAMES)
        deeper(frame + 1);
    else
        stand();
    expect(holds(block, sizeof block, 400 + frame), "stack frame", frame);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    make_regions();
    make_family();
    deeper(0);
    say("done");
    return 0;
}
