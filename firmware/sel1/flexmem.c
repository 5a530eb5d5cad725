#include "flexmem.h"

#define SLICE_PAGES 512 /* so many pages between two points where an interrupt can stop us */

static u64 pages_of(const u64 *items, u64 count) {
    u64 pages = 0;
    for (u64 i = 0; i < count; i++)
        pages += item_bytes(items[i]) / PAGE_SIZE;
    return pages;
}

static void given(struct flexmem *f, u64 count) {
    u64 *const items = f->holding + f->held;
    memcpy(items, flexmem_mailbox, count * sizeof(u64)); /* and nothing but our copy is used from here on */
    flexmem_map(items, count);
    f->held += (u32)count;
}

/* The last block held becomes pages, so that part of it can go. */
static void split_last(struct flexmem *f) {
    u64 base = item_address(f->holding[--f->held]);
    for (u64 i = 0; i < BLOCK_PAGES; i++)
        f->holding[f->held++] = base + i * PAGE_SIZE;
}

/* Pages chosen from the end of the holdings: unmapped here, CLAIMED there. At most one mailbox full, and none before a
 * block of which only a part is to go. */
static s64 choose(struct flexmem *f, u64 pages, u64 *chosen) {
    u64 *const claims = f->claim + f->claimed, value, count = 0, taken = 0;
    *chosen = 0;
    if (f->held > 0 && f->holding[f->held - 1] & ABI_ITEM_BLOCK && pages < BLOCK_PAGES)
        split_last(f);
    for (const u64 *item = f->holding + f->held; count < f->held && count < ABI_MAX_BATCH && taken < pages; count++) {
        const u64 size = *--item & ABI_ITEM_BLOCK ? BLOCK_PAGES : 1;
        if (size > pages - taken)
            break;
        taken += size;
    }
    if (count == 0)
        return ABI_OK;
    f->held -= (u32)count;
    memcpy(claims, f->holding + f->held, count * sizeof(u64));
    f->claimed += (u32)count;
    flexmem_unmap(claims, count);
    memcpy(flexmem_mailbox, claims, count * sizeof(u64));
    *chosen = taken;
    return monitor_call(SCALL_CLAIM, count, &value);
}

static s64 scrub_and_release(u64 count, u64 *pages) {
    u64 value;
    s64 status = monitor_call(SCALL_SCRUB, count, &value);
    if (status == ABI_OK)
        status = monitor_call(SCALL_RELEASE, count, pages);
    return status;
}

/* Scrub and release the oldest claims, at most `pages` (but a whole item at least). */
static s64 work(struct flexmem *f, u64 pages, u64 *released) {
    u64 from = 0;
    s64 status = ABI_OK;
    *released = 0;
    while (from < f->claimed && *released < pages && status == ABI_OK) {
        u64 count = 0, slice = 0, done = 0;
        while (from < f->claimed && slice < SLICE_PAGES && *released + slice < pages) {
            const u64 item = f->claim[from++];
            flexmem_mailbox[count++] = item;
            slice += item & ABI_ITEM_BLOCK ? BLOCK_PAGES : 1;
        }
        status = scrub_and_release(count, &done);
        *released += done;
    }
    f->claimed -= (u32)from;
    for (u64 i = 0; i < f->claimed && from; i++)
        f->claim[i] = f->claim[i + from];
    return status;
}

static s64 take(struct flexmem *f, u64 pages, u64 mode, u64 *taken) {
    u64 chosen = 0, released = 0;
    s64 status = ABI_OK;
    *taken = 0;
    do {
        status = choose(f, pages - *taken, &chosen);
        *taken += chosen;
        if (status == ABI_OK && mode == ABI_MODE_SYNC)
            status = work(f, ~0ul, &released);
    } while (status == ABI_OK && chosen && *taken < pages);
    return status;
}

/* One claim first, because somebody waits for it. Answering OK when it is not claimed (any more) is right: try again. */
static s64 hurry(struct flexmem *f, u64 address) {
    for (u64 i = 0; i < f->claimed; i++) {
        u64 item = f->claim[i], pages;
        if (address - item_address(item) >= item_bytes(item))
            continue;
        for (u64 j = i; j + 1 < f->claimed; j++)
            f->claim[j] = f->claim[j + 1];
        f->claimed--;
        flexmem_mailbox[0] = item;
        return scrub_and_release(1, &pages);
    }
    return ABI_OK;
}

bool flexmem_message(struct flexmem *f, const u64 message[4], struct reply *reply) {
    reply->value[0] = reply->value[1] = 0;
    switch (message[0]) {
    case MSG_GIVEN:
        reply->status = ABI_OK;
        reply->value[0] = message[2];
        given(f, message[1]);
        return true;
    case MSG_TAKE:
        reply->status = take(f, message[1], message[2], &reply->value[0]);
        return true;
    case MSG_WORK:
        reply->status = work(f, message[1], &reply->value[0]);
        reply->value[1] = pages_of(f->claim, f->claimed);
        return true;
    case MSG_HURRY:
        reply->status = hurry(f, message[1]);
        return true;
    default:
        return false;
    }
}
