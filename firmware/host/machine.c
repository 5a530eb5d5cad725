#include "machine.h"

#include <string.h>

#include "../el2/stage2.h"

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
void machine_flush(void) { memset(cached, 0, sizeof(cached)); }

void machine_cache_all(void) {
    for (u64 page = 0; page < DRAM_PAGES; page++)
        cached[page] |= stage2_walk(&monitor.stage2, DRAM_BASE + page * PAGE_SIZE) != 0;
}
