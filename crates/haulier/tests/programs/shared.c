/*
 * The ways in which memory changes without a write by its owner, or belongs to several, all of
 * them under way while it moves: discards, read() into memory, private file pages copied at a
 * write, and memory shared by parent and child: anonymous, memfd, SysV, a file of /dev/shm.
 */
#include "program.h"
#include <sys/ipc.h>
#include <sys/shm.h>

#define PAGES 256L
#define SHARED 5
#define HALF (PAGES / 2)

static char *discarded, *buffer, *private_file, *places[SHARED];
static const char *const names[SHARED] = {
    "MAP_SHARED", "memfd", "SysV", "/dev/shm", "file"};
static uint32_t present[PAGES], filled[PAGES], written[PAGES];
static int source = -1;
static uint64_t steps;
static struct {
    atomic_long count;
    /* What the child counts up in its half of each, and whether it should rest, and does. */
    atomic_int rest, rests;
    uint32_t versions[SHARED][PAGES];
    atomic_long wrong;
} *control;

static uint64_t shared_seed(int which, long page)
{
    return 5000000 + which * 1000 + page + control->versions[which][page] * 10000L;
}

static int shared_right(int which, long page)
{
    char *at = places[which] + page * PAGE;
    return control->versions[which][page] ? holds(at, PAGE, shared_seed(which, page)) : is_zero(at, PAGE);
}

static void rewrite_shared(int which, long page)
{
    control->versions[which][page]++;
    fill(places[which] + page * PAGE, PAGE, shared_seed(which, page));
}

static void live_as_child(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (uint64_t n = 0;; n++) {
        while (control->rest) {
            control->rests = 1;
            usleep(1000);
        }
        control->rests = 0;
        int which = n % SHARED;
        long page = HALF + mixed(7, n) % HALF;
        if (!shared_right(which, page))
            control->wrong = 1 + which * 1000 + page;
        rewrite_shared(which, page);
        control->count++;
        usleep(2000);
    }
}

/* A page of which the content is `seed`, read from a file rather than written by us. */
static void read_into(long page, uint64_t seed)
{
    char content[PAGE];
    fill(content, PAGE, seed);
    expect(pwrite(source, content, PAGE, 0) == PAGE, "pwrite", page);
    memset(content, 0, PAGE);
    expect(pread(source, buffer + page * PAGE, PAGE, 0) == PAGE, "pread", page);
}

static void step(void)
{
    uint64_t n = steps++;
    long page = mixed(3, n) % PAGES;
    if (n % 3 == 0) {
        madvise(discarded + page * PAGE, PAGE, MADV_DONTNEED);
        present[page] = 0;
    } else {
        present[page] = n;
        fill(discarded + page * PAGE, PAGE, n);
    }
    page = mixed(4, n) % PAGES;
    filled[page]++;
    read_into(page, 200000 + filled[page] * 1000L + page);
    page = mixed(5, n) % PAGES;
    if (n % 4 == 0) {
        /* The file's own content again. */
        madvise(private_file + page * PAGE, PAGE, MADV_DONTNEED);
        written[page] = 0;
    } else if (n % 4 == 1) {
        written[page] = n;
        fill(private_file + page * PAGE, PAGE, 900000 + n);
    }
    rewrite_shared(n % SHARED, mixed(6, n) % HALF);
    expect(control->wrong == 0, "shared page, as the child sees it", control->wrong - 1);
    usleep(2000);
}

static void check(void)
{
    for (long page = 0; page < PAGES; page++) {
        char *at = discarded + page * PAGE;
        expect(present[page] ? holds(at, PAGE, present[page]) : is_zero(at, PAGE), "discarded", page);
        at = buffer + page * PAGE;
        expect(filled[page] ? holds(at, PAGE, 200000 + filled[page] * 1000L + page) : is_zero(at, PAGE),
               "read() into", page);
        at = private_file + page * PAGE;
        expect(holds(at, PAGE, written[page] ? 900000 + written[page] : 800000 + page), "private file", page);
    }
    control->rest = 1;
    for (int patience = 20000; !control->rests; patience--) {
        expect(patience > 0, "the child does not answer", 0);
        usleep(1000);
    }
    for (int which = 0; which < SHARED; which++)
        for (long page = 0; page < PAGES; page++)
            expect(shared_right(which, page), names[which], page);
    long before = control->count;
    control->rests = 0;
    control->rest = 0;
    for (int patience = 20000; control->count == before; patience--) {
        expect(patience > 0, "the child stands still", 0);
        usleep(1000);
    }
}

static int file_of(const char *name, long bytes)
{
    char path[4096];
    if (name[0] == '/')
        snprintf(path, sizeof path, "%s", name);
    else
        snprintf(path, sizeof path, "%s/%s", folder, name);
    int file = open(path, O_RDWR | O_CREAT, 0600);
    expect(file >= 0 && ftruncate(file, bytes) == 0, name, bytes);
    return file;
}

static char *map_file(int file, int flags)
{
    char *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, file, 0);
    expect(at != MAP_FAILED, "mmap of a file", file);
    return at;
}

static void make_files(void)
{
    char content[PAGE];
    int file = file_of("private-file", PAGES * PAGE);
    for (long page = 0; page < PAGES; page++) {
        fill(content, PAGE, 800000 + page);
        expect(pwrite(file, content, PAGE, page * PAGE) == PAGE, "pwrite", page);
    }
    private_file = map_file(file, MAP_PRIVATE);
    close(file);
}

int main(int count, char **arguments)
{
    if (count != 2)
        return 2;
    begin(arguments);
    control = (void *)map(4 * PAGE, MAP_SHARED);
    discarded = map(PAGES * PAGE, MAP_PRIVATE);
    buffer = map(PAGES * PAGE, MAP_PRIVATE);
    madvise(discarded, PAGES * PAGE, MADV_NOHUGEPAGE);
    source = file_of("source-file", PAGE);
    make_files();
    places[0] = map(PAGES * PAGE, MAP_SHARED);
    int memory = memfd_create("shared", 0);
    expect(memory >= 0 && ftruncate(memory, PAGES * PAGE) == 0, "memfd_create", 0);
    places[1] = map_file(memory, MAP_SHARED);
    int segment = shmget(IPC_PRIVATE, PAGES * PAGE, 0600);
    places[2] = shmat(segment, NULL, 0);
    expect(places[2] != (char *)-1, "shmat", segment);
    int object = file_of("/dev/shm/haulier-workload", PAGES * PAGE);
    /* Without a name it belongs to us alone. */
    unlink("/dev/shm/haulier-workload");
    places[3] = map_file(object, MAP_SHARED);
    places[4] = map_file(file_of("shared-file", PAGES * PAGE), MAP_SHARED);
    if (fork() == 0)
        live_as_child();
    perform(step, check);
    return 0;
}
