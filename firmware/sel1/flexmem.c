#include "flexmem.h"

#define SLICE_PAGES 512 /* so many pages between two points where an interrupt can stop us */

static void given(struct flexmem *f, u64 count) {
    for (u64 i = 0; i < count; i++) {
        u64 item = flexmem_mailbox[i];
        flexmem_map(item_address(item), item_bytes(item));
        f->holding[f->held++] = item;
    }
}

/* The last block held becomes pages, so that part of it can go. */
static void split_last(struct flexmem *f) {
    u64 base = item_address(f->holding[--f->held]);
    for (u64 i = 0; i < BLOCK_PAGES; i++)
        f->holding[f->held++] = base + i * PAGE_SIZE;
}

/* Pages chosen from the end of the holdings: unmapped here, CLAIMED there. At most one mailbox full. */
static s64 choose(struct flexmem *f, u64 pages, u64 *chosen) {
    u64 count = 0;
    *chosen = 0;
    while (f->held > 0 && count < ABI_MAX_BATCH && *chosen < pages) {
        u64 item = f->holding[f->held - 1];
        if (item_bytes(item) / PAGE_SIZE > pages - *chosen) {
            split_last(f);
            continue;
        }
        f->held--;
        flexmem_unmap(item_address(item), item_bytes(item));
        flexmem_mailbox[count++] = item;
        *chosen += item_bytes(item) / PAGE_SIZE;
    }
    flexmem_unmapped();
    if (count == 0)
        return ABI_OK;
    for (u64 i = 0; i < count; i++)
        f->claim[f->claimed++] = flexmem_mailbox[i];
    u64 value;
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
            flexmem_mailbox[count++] = f->claim[from];
            slice += item_bytes(f->claim[from++]) / PAGE_SIZE;
        }
        status = scrub_and_release(count, &done);
        *released += done;
    }
    f->claimed -= (u32)from;
    for (u64 i = 0; i < f->claimed; i++)
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
    case MSG_GIVEN: {
        u64 count = message[1], pages = 0;
        given(f, count);
        for (u64 i = 0; i < count; i++)
            pages += item_bytes(flexmem_mailbox[i]) / PAGE_SIZE;
        reply->status = ABI_OK;
        reply->value[0] = pages;
        return true;
    }
    case MSG_TAKE:
        reply->status = take(f, message[1], message[2], &reply->value[0]);
        return true;
    case MSG_WORK:
        reply->status = work(f, message[1], &reply->value[0]);
        for (u64 i = 0; i < f->claimed; i++)
            reply->value[1] += item_bytes(f->claim[i]) / PAGE_SIZE;
        return true;
    case MSG_HURRY:
        reply->status = hurry(f, message[1]);
        return true;
    default:
        return false;
    }
}
