/* The normal world's stage-2 tables: 4 KiB granule, 39-bit addresses, identity or nothing.
 *
 * Knows descriptors and forms of blocks. Does not know page states: pages.c decides. Every block has its table
 * reserved, so splitting cannot fail. The first split fills it; from then on, while nothing of the block is taken page by
 * page, the table maps all of it. An entry changes only through invalid (break before make). */
#ifndef STAGE2_H
#define STAGE2_H
#include "defences.h"
#include "pages.h"

#define STAGE2_MEMORY ((0xful << 2) | (3ul << 6) | (3ul << 8) | (1ul << 10)) /* write-back, read-write, shareable, accessed */

void stage2_init(struct stage2 *s);
void stage2_split(struct monitor *m, u64 block); /* nothing maps it; its table waits for stage2_link */
void stage2_link(struct monitor *m, u64 block);
void stage2_table(struct monitor *m, u64 block); /* from nothing to a table that maps nothing */
void stage2_break_block(struct monitor *m, u64 block);
void stage2_map_block(struct monitor *m, u64 block);
void stage2_merged(struct monitor *m, u64 block);
/* What the tables say: the descriptor for an address, 0 when there is none. */
u64 stage2_walk(const struct stage2 *s, u64 address);

/* What is done for each page of a list: here, so that it becomes part of the loop over it. */
static inline u64 stage2_descriptor(u64 page) { return (DRAM_BASE + page * PAGE_SIZE) | STAGE2_MEMORY | 3; }

/* The tables follow each other as the blocks do. */
static inline u64 *stage2_entry(struct monitor *m, u64 page) { return (u64 *)m->stage2.pages + page; }

static inline void stage2_break_page(struct monitor *m, u64 page) {
    if (!DEFENCE(D_UNMAP))
        return;
    if (__builtin_expect(m->form[page / BLOCK_PAGES] == FORM_BLOCK, 0))
        stage2_split(m, page / BLOCK_PAGES);
    *stage2_entry(m, page) = 0;
}

/* After the flush: link the table of a broken block. */
static inline void stage2_make(struct monitor *m, u64 block) {
    if (__builtin_expect(m->form[block] == FORM_BROKEN, 0))
        stage2_link(m, block);
}

/* Whether the block became one entry again; true means a flush and stage2_merged must follow. */
static inline bool stage2_merge(struct monitor *m, u64 block) {
    if (__builtin_expect(m->guarded[block] != 0, 1) || m->form[block] != FORM_TABLE)
        return false;
    m->stage2.dram[block] = 0;
    m->form[block] = FORM_MERGING;
    return true;
}

static inline void stage2_map_page(struct monitor *m, u64 page) {
    const u8 form = m->form[page / BLOCK_PAGES];
    if (__builtin_expect(form != FORM_TABLE, 0)) {
        if (form == FORM_BLOCK)
            return; /* only in a control that left it mapped */
        stage2_table(m, page / BLOCK_PAGES);
    }
    *stage2_entry(m, page) = stage2_descriptor(page);
}
#endif
