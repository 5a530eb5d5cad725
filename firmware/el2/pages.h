/* Page states, and the operations that are the only way to change one.
 *
 * An operation is a small program of steps. `op_step` does one step: what other CPUs can see in between is exactly what
 * a test can interleave. `op_run` does all of them. Whoever makes an operation fills in kind, cpu and its list.
 *
 *     donate   UNPROTECTED -> DONATING -> FLEX         lock, check, break each, flush, make each, unlock
 *     claim    FLEX -> CLAIMED                         lock, check, unlock
 *     scrub    CLAIMED -> SCRUBBING -> SCRUBBED        lock, check, unlock, zero each
 *     release  SCRUBBED -> UNPROTECTED                 lock, check, make each, merge, flush, merge, unlock */
#ifndef PAGES_H
#define PAGES_H
#include "memlayout.h"
#include "types.h"

/* ENTRY_DMA: UNPROTECTED for ever, since devices reach it, or EL3's answers to requests. Slots without a page have it, too. */
enum page_entry { ENTRY_UNPROTECTED, ENTRY_DONATING, ENTRY_FLEX, ENTRY_CLAIMED, ENTRY_SCRUBBING, ENTRY_SCRUBBED, ENTRY_DMA };

/* How stage 2 shows a block of DRAM. */
enum block_form {
    FORM_BLOCK,   /* one entry maps all of it */
    FORM_TABLE,   /* a table maps it page by page */
    FORM_NONE,    /* nothing maps it: donated as a block */
    FORM_BROKEN,  /* nothing maps it until the flush; then a table will */
    FORM_MERGING, /* nothing maps it until the flush; then one entry will */
};

#define L1_ENTRIES 512

struct stage2 {
    ALIGNED(4096) u64 l1[L1_ENTRIES];
    ALIGNED(4096) u64 devices[512];
    ALIGNED(4096) u64 device_pages[8][512]; /* 0x08000000 to 0x09000000 */
    ALIGNED(4096) u64 uart_page[512];
    ALIGNED(4096) u64 dram[512];
    ALIGNED(4096) u64 pages[DRAM_BLOCKS][512];
};

struct monitor {
    u32 lock; /* 0, or the CPU that has it, plus 1 */
    u32 ticket;
    u64 wanted;
    u64 flex, claimed, flushes;
    u64 broken;               /* blocks that are FORM_BROKEN */
    u16 guarded[PAGE_SLOTS / BLOCK_PAGES]; /* pages of the block that are not UNPROTECTED */
    u8 form[DRAM_BLOCKS];     /* near the start, like `guarded`: one instruction less for each page */
    u8 filled[DRAM_BLOCKS];   /* the block's table has been written: the first split does that */
    u8 entry[PAGE_SLOTS];
    struct stage2 stage2; /* last, and in it the tables: pages_init leaves those as they are */
};

enum op_kind { OP_DONATE, OP_CLAIM, OP_SCRUB, OP_RELEASE };
enum op_result { OP_MORE, OP_WAIT, OP_DONE };

struct page_op {
    u32 kind, phase, cpu;
    u32 ticket;    /* donate */
    u64 list;      /* donate: address of the normal world's list */
    u64 *items;    /* in the mailbox, where the normal world cannot change them */
    u64 count;     /* of items */
    u64 next;      /* the item the current phase is at */
    u64 pages;     /* named by the items so far checked */
    u64 bad;       /* index of the item an error is about */
    bool plain;    /* checked: all items are pages. Most lists are, and their loops are short */
    bool merges;   /* release: a block becomes one entry again */
    s64 status;
};

void pages_init(struct monitor *m);
enum op_result op_step(struct monitor *m, struct page_op *op);
void op_run(struct monitor *m, struct page_op *op);
/* The state everybody sees: PAGE_*, or an error. */
s64 page_state(const struct monitor *m, u64 address);
bool range_unprotected(const struct monitor *m, u64 address, u64 bytes);
#endif
