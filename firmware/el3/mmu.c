/* EL3's own map: flash read-only, devices, secure RAM (only our code executes), normal DRAM as normal-world memory. */
#include "el3.h"

static ALIGNED(4096) u64 level1[512];
static ALIGNED(4096) u64 level2[512];
static ALIGNED(4096) u64 level3[512]; /* the first block of secure RAM, where our code is */

extern u8 __text_end[], __rodata_end[];

void mmu_build(void) {
    const u64 data = S1_NORMAL | S1_NO_EXECUTE, device = S1_DEVICE | S1_NO_EXECUTE;
    for (u64 at = FLASH_BASE; at < 0x04000000; at += BLOCK_SIZE)
        level2[at / BLOCK_SIZE] = at | data | S1_READ_ONLY | S1_BLOCK;
    for (u64 at = GICD_BASE; at < 0x0a000000; at += BLOCK_SIZE)
        level2[at / BLOCK_SIZE] = at | device | S1_BLOCK;
    for (u64 at = SECURE_RAM + BLOCK_SIZE; at < SECURE_RAM + SECURE_RAM_SIZE; at += BLOCK_SIZE)
        level2[at / BLOCK_SIZE] = at | data | S1_BLOCK;
    for (u64 i = 0; i < 512; i++) {
        u64 at = SECURE_RAM + i * PAGE_SIZE;
        u64 rights = at < (u64)__text_end ? S1_NORMAL | S1_READ_ONLY : at < (u64)__rodata_end ? data | S1_READ_ONLY : data;
        level3[i] = at | rights | S1_PAGE;
    }
    level2[SECURE_RAM / BLOCK_SIZE] = (u64)level3 | S1_TABLE;
    level1[0] = (u64)level2 | S1_TABLE;
    level1[1] = DRAM_BASE | data | S1_NORMAL_WORLD | S1_BLOCK;
}

void mmu_on(void) {
    write_reg(mair_el3, MAIR);
    write_reg(tcr_el3, TCR_SINGLE);
    write_reg(ttbr0_el3, level1);
    dsb();
    isb();
    __asm__ volatile("tlbi alle3\n dsb sy\n isb");
    write_reg(sctlr_el3, SCTLR_EL23_RES1 | SCTLR_MMU | SCTLR_WXN);
    isb();
}
