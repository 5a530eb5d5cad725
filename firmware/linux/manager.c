/* The Flex-Mem manager: a program of Linux's root that gives memory to the secure world and takes it back under pressure.
 *
 * It pins memory, learns where it lies, stops mapping it (so that nobody meets a protected page through this process),
 * and donates it. Pressure (PSI), little available memory, or `take` makes it reclaim; a chunk whose pages are all back
 * goes to the kernel again.
 * While nothing is given for a while protection goes off by itself; any call turns it on again (monitor.c), if it can be.
 * Lines on standard input: give PAGES, take PAGES, fill VALUE, sum, stats, window MILLISECONDS (0: never off), protection,
 * quit. One line of answer for each.
 *
 * It must not die while it has given memory: the kernel would use protected pages. It ends on quit and SIGTERM, after
 * taking everything back, and asks the kernel never to choose it when memory is short. */
#include "monitor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define CHUNKS 448
#define PRESSURE "some 20000 1000000" /* stalls of 20 ms within a second */
#define SHORT_KIB (64 * 1024)         /* of available memory: without swap the kernel kills before it stalls for long */
#define LOOK_MS 200                   /* so often, while there is something to take back */
#define IDLE_MS 5000                  /* without use, and protection goes off */
#define AT_ONCE (16 * CHUNK)          /* pages taken back when the kernel is short of memory */

struct chunk {
    int ring;
    uint64_t frames[CHUNK];
};

static struct chunk *chunks;
static uint64_t given;
static volatile sig_atomic_t ending;

/* The counter's ticks: CNTFRQ_EL0 of them are a second. */
static struct result window(uint64_t milliseconds) {
    uint64_t frequency;
    __asm__("mrs %0, cntfrq_el0" : "=r"(frequency));
    return monitor_call(CALL_IDLE_WINDOW, frequency / 1000 * milliseconds, 0, 0);
}

static void give(uint64_t pages) {
    uint64_t done = 0, ticket;
    if (monitor_call(CALL_VERSION, 0, 0, 0).status == ABI_TAMPERED) {
        printf("refused: EL2 was tampered with, protection stays off\n");
        return;
    }
    ticket = want(pages);
    while (done < pages && given < CHUNKS) {
        struct chunk *c = &chunks[given];
        struct pinned p = pin(CHUNK);
        frames_of(p.at, CHUNK, c->frames);
        c->ring = p.ring;
        munmap(p.at, CHUNK * PAGE);
        struct result r = donate(c->frames, CHUNK, ticket);
        if (r.status != ABI_OK) {
            close(p.ring);
            printf("refused: status %ld at %lu\n", (long)r.status, (unsigned long)r.x1);
            return;
        }
        given++;
        done += CHUNK;
    }
    printf("gave %lu pages\n", (unsigned long)done);
}

static bool is_back(const struct chunk *c) {
    for (uint64_t i = 0; i < CHUNK; i++)
        if (monitor_call(CALL_QUERY, c->frames[i], 0, 0).x1 != PAGE_UNPROTECTED)
            return false;
    return true;
}

static bool is_short(void) {
    char text[512];
    int file = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    ssize_t got = read(file, text, sizeof(text) - 1);
    close(file);
    text[got > 0 ? got : 0] = 0;
    const char *line = strstr(text, "MemAvailable:");
    return line && strtoul(line + 13, NULL, 10) < SHORT_KIB;
}

/* The trusted OS gives back what it was given last, in most cases. */
static uint64_t take(uint64_t pages) {
    struct result r = monitor_call(CALL_RECLAIM, pages, ABI_MODE_ASYNC, 0);
    while (monitor_call(CALL_RUN, CHUNK, 0, 0).x2)
        ;
    for (uint64_t i = given; i-- > 0;)
        if (is_back(&chunks[i])) {
            close(chunks[i].ring);
            chunks[i] = chunks[--given];
        }
    return r.x1;
}

static void command(char *line) {
    unsigned long value = 0;
    char word[16] = "";
    sscanf(line, "%15s %li", word, (long *)&value);
    if (!strcmp(word, "give") && value && value % CHUNK == 0) {
        give(value);
    } else if (!strcmp(word, "take") && value) {
        printf("took %lu pages\n", (unsigned long)take(value));
    } else if (!strcmp(word, "fill")) {
        printf("filled, status %ld\n", (long)monitor_call(CALL_SECURE_CALL, SVC_FILL, value, 0).status);
    } else if (!strcmp(word, "sum")) {
        struct result r = monitor_call(CALL_SECURE_CALL, SVC_CHECKSUM, 0, 0);
        printf("sum %#lx of %lu pages\n", (unsigned long)r.x1, (unsigned long)r.x2);
    } else if (!strcmp(word, "stats")) {
        struct result r = monitor_call(CALL_STATS, 0, 0, 0);
        printf("flex %ld claimed %lu wanted %lu\n", (long)r.status, (unsigned long)r.x1, (unsigned long)r.x2);
    } else if (!strcmp(word, "window")) {
        printf("window, status %ld\n", (long)window(value).status);
    } else if (!strcmp(word, "protection")) { /* no call: that would turn it on */
        static const char *const names[] = {"off", "on", "tampered"};
        const uint64_t state = monitor_says(REQ_STATE);
        printf("protection %s\n", state < 3 ? names[state] : "unknown");
    } else if (!strcmp(word, "quit")) {
        ending = 1;
    } else {
        printf("unknown: give PAGES (a multiple of %lu), take PAGES, fill VALUE, sum, stats, window MILLISECONDS, "
               "protection, quit\n", CHUNK);
    }
}

static void end(int signal) {
    (void)signal;
    ending = 1;
}

static void spare_us(void) {
    int file = open("/proc/self/oom_score_adj", O_WRONLY);
    if (file < 0 || write(file, "-1000", 5) != 5)
        fail("/proc/self/oom_score_adj");
    close(file);
    struct rlimit files = {1024, 4096};
    setrlimit(RLIMIT_NOFILE, &files);
    mlockall(MCL_CURRENT);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0); /* poll() sees what was not read */
    monitor_open();
    if (argc == 4 && !strcmp(argv[1], "attack"))
        return attack(argv[2], !strcmp(argv[3], "twin"));
    chunks = calloc(CHUNKS, sizeof(*chunks));
    if (!chunks)
        fail("calloc");
    spare_us();
    struct sigaction action = {.sa_handler = end};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    int pressure = open("/proc/pressure/memory", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (pressure < 0 || write(pressure, PRESSURE, sizeof(PRESSURE)) < 0)
        fail("/proc/pressure/memory");
    struct pollfd on[] = {{.fd = 0, .events = POLLIN}, {.fd = pressure, .events = POLLPRI}};
    window(IDLE_MS);
    printf("manager ready\n");
    static char line[128];
    while (!ending) {
        if (poll(on, 2, given ? LOOK_MS : -1) < 0)
            continue;
        if (given && (on[1].revents & POLLPRI || is_short()))
            printf("%s: took %lu pages\n", on[1].revents & POLLPRI ? "pressure" : "short", (unsigned long)take(AT_ONCE));
        if (on[0].revents & (POLLIN | POLLHUP)) {
            if (!fgets(line, sizeof(line), stdin))
                break;
            command(line);
        }
    }
    printf("ending: took %lu pages\n", (unsigned long)take(given * CHUNK + 1));
    return given != 0;
}
