#include "machine.h"

#include <string.h>

struct monitor monitor;
u64 memory[DRAM_PAGES][512];
u8 cached[DRAM_PAGES];
u64 mailbox[ABI_MAX_BATCH];

u64 machine_read64(u64 address) { return memory[(address - DRAM_BASE) / PAGE_SIZE][address / 8 % 512]; }
void machine_copy(u64 *to, u64 from, u64 words) {
    for (u64 i = 0; i < words; i++)
        to[i] = machine_read64(from + i * sizeof(u64));
}
void machine_zero_page(u64 address) { memset(memory[(address - DRAM_BASE) / PAGE_SIZE], 0, PAGE_SIZE); }
void machine_table_barrier(void) {}
void machine_idle_window(u64 ticks) { (void)ticks; }
void machine_flush(void) { memset(cached, 0, sizeof(cached)); }

/* As stage2_walk says for every page, by blocks: fuzzing does little else. */
void machine_cache_all(void) {
    for (u64 block = 0; block < DRAM_BLOCKS; block++) {
        u8 *const known = cached + block * BLOCK_PAGES;
        const u64 entry = monitor.stage2.dram[block];
        if ((entry & 3) == 1)
            memset(known, 1, BLOCK_PAGES);
        else if (entry)
            for (u64 i = 0; i < BLOCK_PAGES; i++)
                known[i] |= (u8)(monitor.stage2.pages[block][i] & 1);
    }
}
