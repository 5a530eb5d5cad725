/* The SMMU (Arm IHI 0070, stage 1): every PCI function of bus 0 sees the DMA window and nothing else; others see nothing.
 *
 * The window is memory that cannot be donated, so what devices see never changes. The tables lie in EL2's memory, which
 * stage 2 hides, as it hides the registers. While protection is off a kernel can change both: they are made anew before
 * EL2 is measured, so that no device writes to it between its measurement and its start. */
#include "el3.h"

enum { CR0 = 0x20, CR0_ACK = 0x24, STRTAB_BASE = 0x80, STRTAB_CFG = 0x88, CMDQ_BASE = 0x90, CMDQ_PROD = 0x98, CMDQ_CONS = 0x9c };
#define SMMU_ON 1u
#define COMMANDS_ON 8u
#define STREAMS_LOG2 8 /* bus 0: device and function */
#define COMMANDS_LOG2 4
#define CONFIG_FORGET_ALL 0x04ul
#define TLB_FORGET_ALL 0x30ul
#define SYNC 0x46ul

struct tables {
    ALIGNED(16384) u64 stream[1 << STREAMS_LOG2][8];
    ALIGNED(4096) u64 level1[512];
    ALIGNED(4096) u64 level2[512];
    ALIGNED(4096) u64 command[1 << COMMANDS_LOG2][2];
    ALIGNED(64) u64 context[8];
};
_Static_assert(sizeof(struct tables) <= SMMU_TABLES_SIZE, "SMMU_TABLES_SIZE");

static volatile u32 *reg(u64 offset) { return (volatile u32 *)(SMMU_BASE + offset); }
static void set64(u64 offset, u64 value) { *(volatile u64 *)(SMMU_BASE + offset) = value; }

static void set_cr0(u32 value) {
    *reg(CR0) = value;
    while (*reg(CR0_ACK) != value)
        pause();
}

static void build(struct tables *t) {
    memset(t, 0, sizeof(*t));
    for (u64 at = DMA_BASE; at < DMA_BASE + DMA_SIZE; at += BLOCK_SIZE)
        t->level2[(at - DRAM_BASE) / BLOCK_SIZE] = at | 1ul << 10 | 3ul << 8 | 1ul << 6 | S1_BLOCK; /* accessed, read-write */
    t->level1[DRAM_BASE >> 30] = (u64)t->level2 | S1_TABLE;
    /* Valid, AArch64, 4 GiB of addresses by 4 KiB pages, no second table, faults end the access. */
    t->context[0] = 32ul | 1ul << 8 | 1ul << 10 | 3ul << 12 | 1ul << 30 | 1ul << 31 | 1ul << (32 + 9) | 1ul << (32 + 14);
    t->context[1] = (u64)t->level1;
    t->context[3] = 0xff; /* memory attribute 0: write-back */
    for (u64 i = 0; i < COUNT(t->stream); i++)
        t->stream[i][0] = (u64)t->context | 5ul << 1 | 1; /* valid, stage 1 */
    t->command[0][0] = CONFIG_FORGET_ALL;
    t->command[0][1] = 31;
    t->command[1][0] = TLB_FORGET_ALL;
    t->command[2][0] = SYNC;
    dsb();
}

void smmu_start(void) {
    struct tables *t = (struct tables *)SMMU_TABLES;
    if (!DEFENCE(D_SMMU))
        return;
    set_cr0(0);
    build(t);
    set64(STRTAB_BASE, (u64)t->stream);
    *reg(STRTAB_CFG) = STREAMS_LOG2;
    set64(CMDQ_BASE, (u64)t->command | COMMANDS_LOG2);
    *reg(CMDQ_PROD) = *reg(CMDQ_CONS) = 0;
    set_cr0(COMMANDS_ON);
    *reg(CMDQ_PROD) = 3;
    for (u64 i = 0; *reg(CMDQ_CONS) != 3; i++)
        if (i > 100000000)
            panic("the smmu takes no commands", *reg(CMDQ_CONS));
    set_cr0(COMMANDS_ON | SMMU_ON);
}
