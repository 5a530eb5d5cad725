/* The Flex-Mem manager's side of the calls, as an honest kernel makes them: attacks need something to attack. */
#include "kernel.h"

static u64 items;

/* A call to its end: tried again while another CPU is in the way, resumed after interrupts. */
static s64 complete(u64 id, u64 a, u64 b, u64 c, u64 result[4]) {
    s64 status;
    do
        status = call_monitor(id, a, b, c, result);
    while (status == ABI_BUSY);
    return finished(status, result);
}

s64 finished(s64 status, u64 result[4]) {
    while (status == ABI_PREEMPTED || status == ABI_BUSY)
        status = call_monitor(CALL_RESUME, 0, 0, 0, result);
    return status;
}

s64 service(u64 number, u64 a, u64 b, u64 result[4]) { return complete(CALL_SECURE_CALL, number, a, b, result); }

u64 want(u64 pages) {
    u64 r[4];
    return service(SVC_WANT, pages, 0, r) == ABI_WANT_PAGES ? r[2] : 0;
}

void put_item(u64 index, u64 item) { ((volatile u64 *)LISTS)[index] = item; }

s64 donate(u64 ticket, u64 count, u64 result[4]) {
    return complete(CALL_DONATE, LISTS, count, ticket, result);
}

static void must(bool ok, const char *what) {
    if (!ok) {
        say("set-up failed: ");
        say(what);
        say("\n");
    }
}

void give(u64 address, u64 pages) {
    u64 r[4], ticket = want(pages);
    for (items = 0; items < pages; items++)
        put_item(items, address + items * PAGE_SIZE);
    must(donate(ticket, pages, r) == ABI_OK, "donate");
    must(service(SVC_FILL, CANARY, 0, r) == ABI_OK, "fill");
}

void give_block(u64 address) {
    u64 r[4], ticket = want(BLOCK_PAGES);
    put_item(0, address | ABI_ITEM_BLOCK);
    must(donate(ticket, 1, r) == ABI_OK, "donate a block");
    must(service(SVC_FILL, CANARY, 0, r) == ABI_OK, "fill");
}

s64 reclaim(u64 pages, u64 mode, u64 *taken) {
    u64 r[4];
    s64 status = complete(CALL_RECLAIM, pages, mode, 0, r);
    *taken = r[1];
    return status;
}

void work(void) {
    u64 r[4];
    complete(CALL_RUN, DRAM_PAGES, 0, 0, r);
}

u64 checksum(void) {
    u64 r[4];
    return service(SVC_CHECKSUM, 0, 0, r) == ABI_OK ? r[1] : ~0ul;
}

void clean_up(void) {
    u64 taken;
    call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL);
    call_monitor(CALL_IDLE_WINDOW, 0, 0, 0, NULL);
    reclaim(DRAM_PAGES, ABI_MODE_SYNC, &taken);
}
