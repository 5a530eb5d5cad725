#include "flexmem.h"

#define SLICE_PAGES 512 /* so many pages between two points where an interrupt can stop us */

static u64 pages_of(const u64 *items, u64 count) {
    u64 pages = 0;
    for (u64 i = 0; i < count; i++)
        pages += item_bytes(items[i]) / PAGE_SIZE;
    return pages;
}

static void given(struct flexmem *f, u64 count) {
    f->blocks += (u32)flexmem_map(f->holding + f->held, flexmem_mailbox, count);
    f->held += (u32)count;
}

/* The last block held becomes pages, so that part of it can go. */
static void split_last(struct flexmem *f) {
    u64 base = item_address(f->holding[--f->held]);
    for (u64 i = 0; i < BLOCK_PAGES; i++)
        f->holding[f->held++] = base + i * PAGE_SIZE;
    f->blocks--;
}

/* How many items from the end of the holdings make at most so many pages, and how many pages. At most one mailbox full. */
static u64 items_for(struct flexmem *f, u64 pages, u64 *taken) {
    const u64 most = f->held < ABI_MAX_BATCH ? f->held : ABI_MAX_BATCH;
    u64 count = 0;
    *taken = 0;
    if (f->blocks == 0)
        return *taken = most < pages ? most : pages;
    for (const u64 *item = f->holding + f->held; count < most && *taken < pages; count++) {
        const u64 size = *--item & ABI_ITEM_BLOCK ? BLOCK_PAGES : 1;
        if (size > pages - *taken)
            break;
        f->blocks -= size > 1;
        *taken += size;
    }
    return count;
}

/* Pages chosen from the end of the holdings: unmapped here, CLAIMED there. None before a block of which only a part is to
 * go. */
static s64 choose(struct flexmem *f, u64 pages, u64 *chosen) {
    u64 value;
    if (f->held > 0 && f->holding[f->held - 1] & ABI_ITEM_BLOCK && pages < BLOCK_PAGES)
        split_last(f);
    const u64 count = items_for(f, pages, chosen);
    if (count == 0)
        return ABI_OK;
    f->held -= (u32)count;
    flexmem_unmap(f->claim + f->claimed, flexmem_mailbox, f->holding + f->held, count);
    f->claimed += (u32)count;
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
