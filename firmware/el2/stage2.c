#include "stage2.h"

#include "defences.h"
#include "machine.h"

#define VALID 1ul
#define TABLE 3ul /* at levels 1 and 2 */
#define PAGE 3ul  /* at level 3 */
#define BLOCK 1ul
#define NORMAL_MEMORY STAGE2_MEMORY
#define DEVICE_MEMORY ((0x1ul << 2) | (3ul << 6) | (1ul << 10) | (1ul << 54)) /* nGnRE, read-write, never executed */
#define ADDRESS_MASK 0x0000fffffffff000ul
#define GIB (1ul << 30)

static u64 table_at(const void *table) { return (u64)(uintptr_t)table | TABLE; }

static void map_device_pages(struct stage2 *s, u64 base, u64 bytes) {
    for (u64 at = base; at < base + bytes; at += PAGE_SIZE)
        s->device_pages[(at - GICD_BASE) / BLOCK_SIZE][at / PAGE_SIZE % 512] = at | DEVICE_MEMORY | PAGE;
}

void stage2_init(struct stage2 *s) {
    for (u64 i = 0; i < COUNT(s->device_pages); i++)
        s->devices[GICD_BASE / BLOCK_SIZE + i] = table_at(s->device_pages[i]);
    map_device_pages(s, GICD_BASE, GICD_SIZE);
    map_device_pages(s, GICR_BASE, GICR_STRIDE * MAX_CPUS);
    /* 0x09000000 is the first block after the tables above: the UART's page only. */
    s->devices[UART_BASE / BLOCK_SIZE] = table_at(s->uart_page);
    s->uart_page[0] = UART_BASE | DEVICE_MEMORY | PAGE;
    for (u64 at = PCI_BASE; at < DRAM_BASE; at += BLOCK_SIZE) /* behind the SMMU */
        s->devices[at / BLOCK_SIZE] = at | DEVICE_MEMORY | BLOCK;
    for (u64 block = 0; block < DRAM_BLOCKS; block++)
        s->dram[block] = (DRAM_BASE + block * BLOCK_SIZE) | NORMAL_MEMORY | BLOCK;
    s->l1[0] = table_at(s->devices);
    s->l1[DRAM_BASE / GIB] = table_at(s->dram);
#ifdef CONTROLS
    if (!DEFENCE(D_HIDE))
        for (u64 at = EL2_BASE; at < EL2_BASE + EL2_SIZE; at += BLOCK_SIZE)
            s->dram[(at - DRAM_BASE) / BLOCK_SIZE] = at | NORMAL_MEMORY | BLOCK;
    if (!DEFENCE(D_DEVICES))
        for (u64 i = 0; i < 512; i++)
            s->devices[i] = (i * BLOCK_SIZE) | DEVICE_MEMORY | BLOCK;
#endif
    machine_table_barrier();
}

static void fill(struct monitor *m, u64 block, bool mapped) {
    u64 *const table = m->stage2.pages[block], first = stage2_descriptor(block * BLOCK_PAGES);
    _Pragma("GCC unroll 8") for (u64 i = 0; i < BLOCK_PAGES; i++)
        table[i] = mapped ? first + i * PAGE_SIZE : 0;
    m->filled[block] = true;
}

static void link_table(struct monitor *m, u64 block) {
    machine_table_barrier();
    m->stage2.dram[block] = table_at(m->stage2.pages[block]);
    m->form[block] = FORM_TABLE;
}

void stage2_split(struct monitor *m, u64 block) {
    if (!m->filled[block])
        fill(m, block, true);
    m->stage2.dram[block] = 0;
    m->form[block] = FORM_BROKEN;
    m->broken++;
}

void stage2_break_block(struct monitor *m, u64 block) {
    if (!DEFENCE(D_UNMAP))
        return;
    m->stage2.dram[block] = 0;
    m->form[block] = FORM_NONE;
}

void stage2_link(struct monitor *m, u64 block) {
    link_table(m, block);
    m->broken--;
}

void stage2_table(struct monitor *m, u64 block) {
    fill(m, block, false);
    link_table(m, block);
}

void stage2_map_block(struct monitor *m, u64 block) {
    if (m->form[block] == FORM_NONE)
        stage2_merged(m, block);
    else if (m->form[block] == FORM_TABLE)
        fill(m, block, true); /* it was taken page by page; stage2_merge follows */
}

void stage2_merged(struct monitor *m, u64 block) {
    machine_table_barrier();
    m->stage2.dram[block] = (DRAM_BASE + block * BLOCK_SIZE) | NORMAL_MEMORY | BLOCK;
    m->form[block] = FORM_BLOCK;
}

u64 stage2_walk(const struct stage2 *s, u64 address) {
    if (address / GIB >= L1_ENTRIES)
        return 0;
    u64 entry = s->l1[address / GIB];
    for (u64 size = BLOCK_SIZE; (entry & TABLE) == TABLE; size /= 512) {
        const u64 *table = (const u64 *)(uintptr_t)(entry & ADDRESS_MASK);
        entry = table[address / size % 512];
        if (size == PAGE_SIZE)
            break;
    }
    return entry & VALID ? entry : 0;
}
