/* The trusted OS's Flex-Mem: which pages it has, which it gives back, and in which order. Portable: tests run it too.
 *
 * Holdings are items as the monitor's lists have them (a page, or a block). It gives back from the end. */
#ifndef FLEXMEM_H
#define FLEXMEM_H
#include "memlayout.h"
#include "types.h"

struct flexmem {
    u32 held, claimed; /* items in the two lists */
    u32 blocks;        /* of those held */
    u64 holding[DRAM_PAGES];
    u64 claim[DRAM_PAGES]; /* oldest first */
};

struct reply {
    s64 status;
    u64 value[2];
};

/* What flexmem.c needs: mapping in its own tables, with the copies that are needed anyway made in the same loop, and calls
 * to the monitor. Each item is read once. */
u64 flexmem_map(u64 *to, const u64 *items, u64 count); /* how many of them are blocks */
void flexmem_unmap(u64 *to, u64 *also, const u64 *items, u64 count); /* with one TLB invalidation for all */
void *memcpy(void *to, const void *from, size_t bytes);
s64 monitor_call(u32 id, u64 arg, u64 *value);
extern u64 *const flexmem_mailbox;

/* Serve GIVEN, TAKE, WORK and HURRY. False: not a message of these. */
bool flexmem_message(struct flexmem *f, const u64 message[4], struct reply *reply);

static inline u64 item_bytes(u64 item) { return item & ABI_ITEM_BLOCK ? BLOCK_SIZE : PAGE_SIZE; }
static inline u64 item_address(u64 item) { return item & ~(u64)ABI_ITEM_BLOCK; }
#endif
