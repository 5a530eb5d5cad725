#define _GNU_SOURCE
#include "monitor.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define TRAP_PAGE 0x0b000000ul /* include/memlayout.h, whose PAGE_SIZE is not Linux's */

static volatile uint64_t *trap;
static uint64_t *list, list_address;

void fail(const char *what) {
    perror(what);
    exit(2);
}

void monitor_open(void) {
    int memory = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
    if (memory < 0)
        fail("/dev/mem");
    trap = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, TRAP_PAGE);
    if (trap == MAP_FAILED)
        fail("the trap page");
    close(memory);
    struct pinned page = pin(1);
    list = page.at;
    madvise(list, PAGE, MADV_DONTFORK);
    frames_of(list, 1, &list_address);
}

struct result monitor_once(uint64_t id, uint64_t a, uint64_t b, uint64_t c) {
    register uint64_t x0 __asm__("x0") = id;
    register uint64_t x1 __asm__("x1") = a;
    register uint64_t x2 __asm__("x2") = b;
    register uint64_t x3 __asm__("x3") = c;
    register uint64_t x4 __asm__("x4") = 0;
    __asm__ volatile("str xzr, [%5]" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3), "+r"(x4) : "r"(trap) : "memory");
    return (struct result){(int64_t)x0, x1, x2, x3};
}

struct result monitor_call(uint64_t id, uint64_t a, uint64_t b, uint64_t c) {
    struct result r;
    do
        r = monitor_once(id, a, b, c);
    while (r.status == ABI_BUSY);
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
