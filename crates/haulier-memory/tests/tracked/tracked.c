/* A task to be tracked. Without arguments it obeys commands from stdin, one answer line each; with
 * "block KIND" it makes one blocking call and tells how that ended. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
static volatile sig_atomic_t handled;
static char **arguments;

static void on_signal(int number) { (void)number; handled++; }

static void handle(int number)
{
	struct sigaction action = { .sa_handler = on_signal };
	sigaction(number, &action, NULL);
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void fill(unsigned long at, unsigned long pages, uint64_t seed)
{
	uint64_t state = seed * 2654435761u + 88172645463325252ull;
	for (unsigned long page = 0; page < pages; page++) {
		volatile uint64_t *words = (volatile uint64_t *)(at + page * PAGE);
		words[next(&state) % 512] = next(&state);
	}
}

struct writer { unsigned long at, pages; uint64_t seed; };

static void *write_forever(void *argument)
{
	struct writer *writer = argument;
	uint64_t state = writer->seed + 1;
	for (;;) {
		uint64_t page = next(&state) % writer->pages;
		volatile uint64_t *words = (volatile uint64_t *)(writer->at + page * PAGE);
		words[next(&state) % 512] += next(&state);
	}
	return NULL;
}

static long answer_number;
static int to_child = -1, from_child = -1;

static void serve(void);

static int command(char *line)
{
	char name[32] = "";
	unsigned long a = 0, b = 0, c = 0;
	sscanf(line, "%31s %lx %lx %lx", name, &a, &b, &c);
	void *at = (void *)a;
	answer_number = 0;
#define IS(word) (strcmp(name, word) == 0)
	if (IS("map"))
		return mmap(at, b * PAGE, c, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != at;
	if (IS("huge"))
		return madvise(at, b * PAGE, MADV_HUGEPAGE);
	if (IS("unmap"))
		return munmap(at, b * PAGE);
	if (IS("write"))
		return fill(a, b, c), 0;
	if (IS("touch")) {
		for (unsigned long page = 0; page < b; page++)
			answer_number += *(volatile char *)(a + page * PAGE);
		return 0;
	}
	if (IS("discard"))
		return madvise(at, b * PAGE, MADV_DONTNEED);
	if (IS("move"))
		return mremap(at, b * PAGE, b * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)c) != (void *)c;
	if (IS("protect"))
		return mprotect(at, b * PAGE, c);
	if (IS("lock"))
		return mlock(at, b * PAGE);
	if (IS("read")) { /* by the kernel, not by us */
		int file = open("/proc/self/exe", O_RDONLY);
		ssize_t len = pread(file, at, b * PAGE, 0);
		close(file);
		return len <= 0;
	}
	if (IS("pieces")) { /* b mappings side by side */
		mmap(at, b * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		for (unsigned long page = 1; page < b; page += 2)
			if (mprotect((char *)at + page * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC))
				return 1;
		return 0;
	}
	if (IS("scatter")) { /* b mappings, each with a hole behind it */
		for (unsigned long piece = 0; piece < b; piece++) {
			char *start = (char *)at + 2 * piece * PAGE;
			if (mmap(start, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != start)
				return 1;
			*start = 1;
		}
		return 0;
	}
	if (IS("threads")) {
		for (unsigned long number = 0; number < c; number++) {
			pthread_t thread;
			struct writer *writer = malloc(sizeof *writer);
			*writer = (struct writer){ a, b, number };
			if (pthread_create(&thread, NULL, write_forever, writer))
				return 1;
		}
		return 0;
	}
	if (IS("uffd")) {
		int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
		struct uffdio_api api = { .api = UFFD_API };
		struct uffdio_register reg = { .range = { a, b * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
		return ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg);
	}
	if (IS("seccomp")) { /* the call is fatal from here on */
		struct sock_filter code[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog filter = { 4, code };
		return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
	}
	if (IS("timer")) {
		struct itimerval interval = { { 0, 1000 }, { 0, 1000 } };
		handle(SIGALRM);
		return setitimer(ITIMER_REAL, &interval, NULL);
	}
	if (IS("user"))
		return setgid(65534) || setuid(65534);
	if (IS("handled"))
		return answer_number = handled, 0;
	if (IS("descriptors")) { /* how many are open, as a sum of their numbers plus one */
		for (int fd = 0; fd < 1024; fd++)
			if (fcntl(fd, F_GETFD) >= 0)
				answer_number += fd + 1;
		return 0;
	}
	if (IS("fork")) {
		int in[2], out[2];
		if (pipe(in) || pipe(out))
			return 1;
		answer_number = fork();
		if (answer_number == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			dup2(in[0], 0);
			dup2(out[1], 1);
			close(in[1]);
			close(out[0]);
			serve();
		}
		close(in[0]);
		close(out[1]);
		to_child = in[1];
		from_child = out[0];
		return answer_number < 0;
	}
	if (IS("child")) { /* the rest is a command for the child */
		char text[128];
		char *rest = line + strlen("child ");
		if (write(to_child, rest, strlen(rest)) < 0)
			return 1;
		return read(from_child, text, sizeof text) <= 0;
	}
	if (IS("exec")) {
		execv("/proc/self/exe", arguments);
		return 1;
	}
	if (IS("exit"))
		_exit(0);
	return 1;
}

static void serve(void)
{
	char line[128], text[64];
	for (;;) {
		size_t len = 0;
		while (len < sizeof line - 1) {
			ssize_t got = read(0, line + len, 1);
			if (got < 0 && errno == EINTR)
				continue;
			if (got <= 0)
				_exit(0);
			if (line[len++] == '\n')
				break;
		}
		line[len] = 0;
		int failed = command(line);
		int size = snprintf(text, sizeof text, "%s %ld\n", failed ? "failed" : "ok", failed ? errno : answer_number);
		if (write(1, text, size) != size)
			_exit(1);
	}
}

static long block(const char *kind)
{
	struct timespec some = { 0, 400 * 1000 * 1000 };
	struct timeval same = { 0, 400 * 1000 };
	char byte;
#define KIND(word) if (strcmp(kind, word) == 0)
	handle(SIGUSR1);
	KIND("nanosleep") return nanosleep(&some, &some);
	KIND("clock_nanosleep") {
		struct timespec until;
		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_sec += 1;
		return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	}
	KIND("read") return read(0, &byte, 1);
	KIND("futex") {
		int word = 0;
		return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &some, NULL, 0);
	}
	KIND("poll") return poll(NULL, 0, 400);
	KIND("poll_read") {
		struct pollfd poll_read = { 0, POLLIN, 0 };
		return poll(&poll_read, 1, -1);
	}
	KIND("ppoll") {
		sigset_t none;
		sigemptyset(&none);
		return ppoll(NULL, 0, &some, &none);
	}
	KIND("select") return select(0, NULL, NULL, NULL, &same);
	KIND("wait") {
		pid_t child = fork();
		if (child == 0) {
			nanosleep(&some, NULL);
			_exit(0);
		}
		return waitpid(child, NULL, 0) == child;
	}
	KIND("semtimedop") {
		struct sembuf take = { 0, -1, 0 };
		int set = semget(IPC_PRIVATE, 1, 0600);
		long result = semtimedop(set, &take, 1, &some);
		int error = errno;
		semctl(set, 0, IPC_RMID);
		errno = error;
		return result;
	}
	KIND("receive") {
		int pair[2];
		socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
		setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &same, sizeof same);
		return recv(pair[0], &byte, 1, 0);
	}
	KIND("epoll") return epoll_wait(epoll_create1(0), &(struct epoll_event){ 0 }, 1, 400);
	KIND("epoll_read") {
		int set = epoll_create1(0);
		struct epoll_event event = { .events = EPOLLIN };
		epoll_ctl(set, EPOLL_CTL_ADD, 0, &event);
		return epoll_wait(set, &event, 1, -1);
	}
	KIND("epoll_signal") return epoll_wait(epoll_create1(0), &(struct epoll_event){ 0 }, 1, -1);
	KIND("read_signal") return read(0, &byte, 1);
	KIND("pause_signal") return pause();
	KIND("suspend_signal") {
		sigset_t set, none;
		sigemptyset(&none);
		sigfillset(&set);
		sigprocmask(SIG_SETMASK, &set, NULL);
		return sigsuspend(&none);
	}
	KIND("take_signal") {
		sigset_t set;
		sigemptyset(&set);
		sigaddset(&set, SIGUSR1);
		sigprocmask(SIG_BLOCK, &set, NULL);
		return sigtimedwait(&set, NULL, NULL);
	}
	return -2;
}

int main(int count, char **list)
{
	arguments = list;
	if (count == 3) {
		errno = 0;
		long result = block(list[2]);
		printf("%ld %d %d\n", result, result < 0 ? errno : 0, (int)handled);
		return 0;
	}
	serve();
}
