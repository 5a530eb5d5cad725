#define _GNU_SOURCE
#include "monitor.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define TRAP_PAGE 0x0b000000ul /* include/memlayout.h, whose PAGE_SIZE is not Linux's */
#define REQUEST_PAGE 0x7efff000ul
#define PATIENCE_MS 60000 /* EL3 looks every 10; a busy host is slow */

static volatile uint64_t *trap, *request;
static uint64_t *list, list_address;
static sigjmp_buf no_answer;
static volatile sig_atomic_t calling;

void fail(const char *what) {
    perror(what);
    exit(2);
}

/* Without SA_NODEFER the jump would leave the signal blocked. Any other SIGBUS ends the program, as without us. */
static void on_sigbus(int number) {
    if (calling)
        siglongjmp(no_answer, 1);
    signal(number, SIG_DFL);
}

void monitor_open(void) {
    const struct sigaction action = {.sa_handler = on_sigbus, .sa_flags = SA_NODEFER};
    int memory = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
    if (memory < 0)
        fail("/dev/mem");
    trap = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, TRAP_PAGE);
    request = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, REQUEST_PAGE);
    if (trap == MAP_FAILED || request == MAP_FAILED)
        fail("the trap page or the request page");
    close(memory);
    sigaction(SIGBUS, &action, NULL);
    struct pinned page = pin(1);
    list = page.at;
    madvise(list, PAGE, MADV_DONTFORK);
    frames_of(list, 1, &list_address);
}

uint64_t monitor_says(uint64_t word) { return request[word]; }

/* If another request was faster, EL3 does not look at ours. */
bool monitor_wake(void) {
    request[REQ_REQUEST] = ABI_REQUEST_ON;
    for (int i = 0; request[REQ_REQUEST] == ABI_REQUEST_ON && request[REQ_STATE] != 1; i++) {
        if (i == PATIENCE_MS)
            fail("a request for protection has no answer");
        usleep(1000);
    }
    return request[REQ_STATE] == 1;
}

static struct result store_to_trap(uint64_t id, uint64_t a, uint64_t b, uint64_t c) {
    register uint64_t x0 __asm__("x0") = id;
    register uint64_t x1 __asm__("x1") = a;
    register uint64_t x2 __asm__("x2") = b;
    register uint64_t x3 __asm__("x3") = c;
    register uint64_t x4 __asm__("x4") = 0;
    __asm__ volatile("str xzr, [%5]" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3), "+r"(x4) : "r"(trap) : "memory");
    return (struct result){(int64_t)x0, x1, x2, x3};
}

struct result monitor_once(uint64_t id, uint64_t a, uint64_t b, uint64_t c) {
    struct result r = {ABI_OFF, 0, 0, 0};
    if (request[REQ_STATE] != 1) /* a store could become an error that the kernel does not survive; QEMU's is SIGBUS */
        return r;
    if (sigsetjmp(no_answer, 0) == 0) { /* it may go off right now */
        calling = 1;
        r = store_to_trap(id, a, b, c);
    }
    calling = 0;
    return r;
}

struct result monitor_call(uint64_t id, uint64_t a, uint64_t b, uint64_t c) {
    struct result r;
    do
        r = monitor_once(id, a, b, c);
    while (r.status == ABI_BUSY || (r.status == ABI_OFF && monitor_wake()));
    if (r.status == ABI_OFF)
        r.status = ABI_TAMPERED;
    while (r.status == ABI_PREEMPTED || r.status == ABI_BUSY)
        r = monitor_once(CALL_RESUME, 0, 0, 0);
    return r;
}

struct pinned pin(uint64_t pages) {
    struct pinned p = {.pages = pages};
    struct io_uring_params parameters = {0};
    p.at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p.at == MAP_FAILED)
        fail("mmap");
    madvise(p.at, pages * PAGE, MADV_NOHUGEPAGE);
    p.ring = (int)syscall(SYS_io_uring_setup, 1, &parameters);
    if (p.ring < 0)
        fail("io_uring_setup");
    struct iovec buffer = {p.at, pages * PAGE};
    if (syscall(SYS_io_uring_register, p.ring, IORING_REGISTER_BUFFERS, &buffer, 1))
        fail("io_uring_register");
    return p;
}

void frames_of(const void *at, uint64_t pages, uint64_t *to) {
    int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (map < 0 || pread(map, to, pages * 8, (off_t)((uintptr_t)at / PAGE * 8)) != (ssize_t)(pages * 8))
        fail("/proc/self/pagemap");
    close(map);
    for (uint64_t i = 0; i < pages; i++) {
        if (!(to[i] >> 63) || !(to[i] & ((1ul << 55) - 1)))
            fail("a page without a frame");
        to[i] = (to[i] & ((1ul << 55) - 1)) * PAGE;
    }
}

uint64_t want(uint64_t pages) {
    struct result r = monitor_call(CALL_SECURE_CALL, SVC_WANT, pages, 0);
    if (r.status != ABI_WANT_PAGES)
        fail("the trusted OS does not want pages");
    return r.x2;
}

struct result donate(const uint64_t *items, uint64_t count, uint64_t ticket) {
    memcpy(list, items, count * sizeof(*items));
    return monitor_call(CALL_DONATE, list_address, count, ticket);
}
