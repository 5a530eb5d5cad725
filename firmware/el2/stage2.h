/* The normal world's stage-2 tables: 4 KiB granule, 39-bit addresses, identity or nothing.
 *
 * Knows descriptors and forms of blocks. Does not know page states: pages.c decides. Every block has its table
 * reserved, so splitting cannot fail. An entry changes only through invalid (break before make). */
#ifndef STAGE2_H
#define STAGE2_H
#include "pages.h"

void stage2_init(struct stage2 *s);
void stage2_break_page(struct monitor *m, u64 page);
void stage2_break_block(struct monitor *m, u64 block);
/* After the flush: link the table of a broken block. */
void stage2_make(struct monitor *m, u64 block);
void stage2_map_page(struct monitor *m, u64 page);
void stage2_map_block(struct monitor *m, u64 block);
/* Whether the block became one entry again; true means a flush and stage2_merged must follow. */
bool stage2_merge(struct monitor *m, u64 block);
void stage2_merged(struct monitor *m, u64 block);
/* What the tables say: the descriptor for an address, 0 when there is none. */
u64 stage2_walk(const struct stage2 *s, u64 address);
#endif
