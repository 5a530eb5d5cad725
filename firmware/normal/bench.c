/* Measurements, as `flexserve tz bench` asks for them. Prints samples; medians and limits are Python's.
 *
 * Scattered pages: every other one of 128 MiB, in no order. The second CPU is on and busy unless said otherwise. */
#include "kernel.h"

#define POOL 0x60000000ul   /* 128 MiB: half of its pages are given away, the others stay in use */
#define REGION 0x58000000ul /* 64 MiB: the contiguous carve-out */
#define SPARE 0x70000000ul  /* 64 MiB: where its pages move to */
#define PAGES ABI_MAX_BATCH
#define TABLES 0x4a000000ul /* page tables of the process whose pages move */

static u64 now(void) {
    isb();
    return read_reg(cntpct_el0);
}

static void sample(const char *name, u64 ticks) {
    u64 frequency = read_reg(cntfrq_el0);
    say("sample ");
    say(name);
    say(" ");
    say_hex(ticks * 1000000000ul / frequency);
    say("\n");
}

static void check(bool ok, const char *what) {
    if (!ok) {
        say("set-up failed: ");
        say(what);
        say("\n");
    }
}

/* Fisher and Yates, from a fixed seed: the same order in every run. */
static void scattered_list(void) {
    u64 random = 88172645463325252ul;
    for (u64 i = 0; i < PAGES; i++)
        put_item(i, POOL + 2 * i * PAGE_SIZE);
    for (u64 i = PAGES - 1; i > 0; i--) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        u64 j = random % (i + 1), item = load(LISTS + 8 * i, 0);
        put_item(i, load(LISTS + 8 * j, 0));
        put_item(j, item);
    }
}

static u64 protect(u64 count, u64 pages) {
    u64 r[4], ticket = want(pages), start = now();
    s64 status = donate(ticket, count, r);
    u64 ticks = now() - start;
    check(status == ABI_OK && r[1] == pages, "protect");
    return ticks;
}

static u64 recall(u64 mode) {
    u64 taken, start = now();
    s64 status = reclaim(PAGES, mode, &taken);
    u64 ticks = now() - start;
    check(status == ABI_OK && taken == PAGES, "recall");
    return ticks;
}

/* What nobody can be faster than on this machine: the same pages zeroed by us, who map them anyway, and nothing else. */
static u64 zeroing(void) {
    u64 start = now();
    for (u64 i = 0; i < PAGES; i++)
        memset((void *)load(LISTS + 8 * i, 0), 0, PAGE_SIZE);
    return now() - start;
}

static void bench_pages_alone(void) {
    scattered_list();
    for (u32 round = 0; round < 7; round++) {
        sample("zeroing", zeroing());
        sample("protect", protect(PAGES, PAGES));
        sample("recall", recall(ABI_MODE_SYNC));
        protect(PAGES, PAGES);
        sample("async", recall(ABI_MODE_ASYNC));
        work();
    }
}

static void bench_pages(void) {
    start_second_cpu();
    bench_pages_alone();
}

static void bench_blocks(void) {
    start_second_cpu();
    for (u64 i = 0; i < PAGES / BLOCK_PAGES; i++)
        put_item(i, (POOL + i * BLOCK_SIZE) | ABI_ITEM_BLOCK);
    for (u32 round = 0; round < 7; round++) {
        sample("protect_blocks", protect(PAGES / BLOCK_PAGES, PAGES));
        sample("recall_blocks", recall(ABI_MODE_SYNC));
    }
}

/* The contiguous region is in use by a process, as memory under pressure is: each page is copied elsewhere and mapped
 * there, with one TLB invalidation each, as Linux 6.1 does; then the region is protected in one call. */
static u64 carve_out(void) {
    volatile u64 *table = (volatile u64 *)TABLES;
    u64 start = now();
    for (u64 i = 0; i < PAGES; i++) {
        const u64 at = ALIAS + i * PAGE_SIZE, from = REGION + i * PAGE_SIZE, to = SPARE + i * PAGE_SIZE;
        table[i] = 0;
        forget(at);
        memcpy((void *)to, (const void *)from, PAGE_SIZE);
        table[i] = to | S1_NORMAL | S1_PAGE;
    }
    dsb();
    return now() - start + protect(PAGES / BLOCK_PAGES, PAGES);
}

static void bench_carve_out(void) {
    volatile u64 *table = (volatile u64 *)TABLES;
    start_second_cpu();
    for (u64 i = 0; i < PAGES / BLOCK_PAGES; i++)
        alias_more(i, TABLES + i * PAGE_SIZE);
    for (u32 round = 0; round < 3; round++) {
        for (u64 i = 0; i < PAGES; i++)
            table[i] = (REGION + i * PAGE_SIZE) | S1_NORMAL | S1_PAGE;
        for (u64 i = 0; i < PAGES / BLOCK_PAGES; i++)
            put_item(i, (REGION + i * BLOCK_SIZE) | ABI_ITEM_BLOCK);
        forget(ALIAS);
        sample("carve_out", carve_out());
        recall(ABI_MODE_SYNC);
    }
}

/* With -icount a tick is a number of instructions. The second CPU stays off. */
static void bench_calls(void) {
    u64 r[4];
    const u64 calls = 10000;
    for (u32 round = 0; round < 3; round++) {
        u64 start = now();
        for (u64 i = 0; i < calls; i++)
            __asm__ volatile("" : : : "memory");
        u64 loop = now() - start;
        start = now();
        for (u64 i = 0; i < calls; i++) {
            register u64 x0 __asm__("x0") = CALL_VERSION;
            __asm__ volatile("hvc #0" : "+r"(x0) : : "x1", "x2", "x3", "memory");
        }
        sample("hvc_10000", now() - start - loop);
        start = now();
        for (u64 i = 0; i < calls / 10; i++)
            service(SVC_ECHO, 1, 2, r);
        sample("secure_call_1000", now() - start);
    }
}

static void bench_switch(void) {
    start_second_cpu();
    for (u32 round = 0; round < 9; round++) {
        s64 status;
        u64 start;
        do { /* the other CPU's EL2 may not have started again yet */
            start = now();
            status = call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL);
        } while (status == ABI_BUSY);
        sample("switch_off", now() - start);
        start = now();
        check(call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL) == ABI_OK && status == ABI_OK, "switch");
        sample("switch_on", now() - start);
    }
}

/* The way of a normal world without SMCs: off by the idle window, on by a word in the request page. */
static void bench_request(void) {
    volatile u64 *const page = (volatile u64 *)REQUEST_PAGE;
    start_second_cpu();
    for (u32 round = 0; round < 9; round++) {
        const u64 window = read_reg(cntfrq_el0) / 10;
        check(call_monitor(CALL_IDLE_WINDOW, window, 0, 0, NULL) == ABI_OK, "window");
        u64 start = now();
        while (page[REQ_STATE] == 1)
            pause();
        sample("idle_off", now() - start);
        start = now();
        page[REQ_REQUEST] = ABI_REQUEST_ON;
        while (page[REQ_REQUEST] == ABI_REQUEST_ON)
            pause();
        sample("request_on", now() - start);
        check(page[REQ_ANSWER] == ABI_OK && page[REQ_STATE] == 1, "request");
    }
}

/* With -icount: the longest time between two looks at the counter is that in which EL3's timer came. */
static u64 longest_gap(u64 ticks) {
    u64 start = now(), last = start, longest = 0;
    for (u64 at; (at = now()) - start < ticks; last = at)
        longest = at - last > longest ? at - last : longest;
    return longest;
}

static void bench_polls(void) {
    const u64 half_second = read_reg(cntfrq_el0) / 2;
    for (u32 round = 0; round < 3; round++) {
        sample("gap_on", longest_gap(half_second / 10));
        check(call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL) == ABI_OK, "off");
        sample("gap_off", longest_gap(half_second / 10));
        check(call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL) == ABI_OK, "on");
    }
}

/* The named workload of stage2_overhead_percent: 2^16 records of 168 bytes, sorted by heaps. Many TLB misses. */
static u64 record(u64 i) { return POOL + i * 168 + PAGE_SIZE; }

static void sift(u64 root, u64 end) {
    volatile u64 *heap;
    for (u64 child; (child = 2 * root + 1) < end; root = child) {
        if (child + 1 < end && load(record(child + 1), 0) > load(record(child), 0))
            child++;
        u64 a = load(record(root), 0), b = load(record(child), 0);
        if (a >= b)
            return;
        heap = (volatile u64 *)record(root);
        *heap = b;
        store(record(child), a);
    }
}

static u64 sort_time(void) {
    const u64 records = 1ul << 16;
    u64 random = 88172645463325252ul;
    for (u64 i = 0; i < records; i++) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        store(record(i), random);
    }
    u64 start = now();
    for (u64 i = records / 2; i-- > 0;)
        sift(i, records);
    for (u64 end = records; end-- > 1;) {
        u64 first = load(record(0), 0);
        store(record(0), load(record(end), 0));
        store(record(end), first);
        sift(0, end);
    }
    u64 ticks = now() - start;
    for (u64 i = 1; i < records; i++)
        check(load(record(i - 1), 0) <= load(record(i), 0), "sort");
    return ticks;
}

static void bench_stage2(void) {
    for (u32 round = 0; round < 9; round++) {
        sample("workload_on", sort_time());
        check(call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL) == ABI_OK, "off");
        sample("workload_off", sort_time());
        check(call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL) == ABI_OK, "on");
    }
}

const struct bench benches[] = {
    {"pages", bench_pages}, {"pages-alone", bench_pages_alone}, {"blocks", bench_blocks}, {"carve-out", bench_carve_out}, {"calls", bench_calls},
    {"switch", bench_switch}, {"request", bench_request}, {"polls", bench_polls}, {"stage2", bench_stage2}, {NULL, NULL},
};
