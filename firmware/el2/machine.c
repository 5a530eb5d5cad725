/* The machine the portable part asks for, on Arm: EL2's own map, zeroing, TLB invalidation, the way to EL3. */
#include "machine.h"

#include "arm.h"
#include "el2.h"
#include "memlayout.h"

u64 mailbox[ABI_MAX_BATCH] __attribute__((section(".mailbox")));

static ALIGNED(4096) u64 level1[512];
static ALIGNED(4096) u64 level2[512];
static ALIGNED(4096) u64 level3[512]; /* the block our code is in */
extern u8 __text_end[], __bss_start[];

void mmu_build(void) {
    const u64 data = S1_NORMAL | S1_NO_EXECUTE;
    for (u64 i = 0; i < 512; i++) {
        u64 at = EL2_BASE + i * PAGE_SIZE;
        u64 rights = at < (u64)__text_end ? S1_NORMAL | S1_READ_ONLY : at < (u64)__bss_start ? data | S1_READ_ONLY : data;
        level2[i] = (DRAM_BASE + i * BLOCK_SIZE) | data | S1_BLOCK;
        level3[i] = at | rights | S1_PAGE;
    }
    level2[(EL2_BASE - DRAM_BASE) / BLOCK_SIZE] = (u64)level3 | S1_TABLE;
    level1[DRAM_BASE >> 30] = (u64)level2 | S1_TABLE;
}

void mmu_on(void) {
    write_reg(mair_el2, MAIR);
    write_reg(tcr_el2, TCR_SINGLE);
    write_reg(ttbr0_el2, level1);
    dsb();
    isb();
    __asm__ volatile("tlbi alle2\n dsb sy\n isb");
    write_reg(sctlr_el2, SCTLR_EL23_RES1 | SCTLR_MMU | SCTLR_WXN);
    isb();
}

u64 machine_read64(u64 address) { return *(const volatile u64 *)address; }

/* Eight at a time: QEMU's TLB has one place for two pages whose numbers end alike, and one word from each in turn is slow. */
void machine_copy(u64 *to, u64 from, u64 words) {
    const volatile u64 *at = (const volatile u64 *)from;
    u64 i = 0;
    for (; i + 8 <= words; i += 8) {
        u64 w[8];
        _Pragma("GCC unroll 8") for (u64 j = 0; j < 8; j++)
            w[j] = at[i + j];
        _Pragma("GCC unroll 8") for (u64 j = 0; j < 8; j++)
            to[i + j] = w[j];
    }
    for (; i < words; i++)
        to[i] = at[i];
}

/* Pairs of registers: QEMU's DC ZVA costs more than four of them. */
#define ZERO_64 "stp xzr, xzr, [%0], #16\n stp xzr, xzr, [%0], #16\n stp xzr, xzr, [%0], #16\n stp xzr, xzr, [%0], #16\n"
void machine_zero_page(u64 address) {
    for (u64 end = address + PAGE_SIZE; address < end;)
        __asm__ volatile(ZERO_64 ZERO_64 ZERO_64 ZERO_64 : "+r"(address) : : "memory");
}

void machine_table_barrier(void) { __asm__ volatile("dsb ishst" : : : "memory"); }

void machine_flush(void) { __asm__ volatile("dsb ishst\n tlbi vmalls12e1is\n dsb ish\n isb" : : : "memory"); }

s64 smc(u64 r[5]) {
    register u64 x0 __asm__("x0") = r[0];
    register u64 x1 __asm__("x1") = r[1];
    register u64 x2 __asm__("x2") = r[2];
    register u64 x3 __asm__("x3") = r[3];
    register u64 x4 __asm__("x4") = r[4];
    __asm__ volatile("smc #0"
                     : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3), "+r"(x4)
                     :
                     : "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16", "x17", "memory", "cc");
    r[0] = x0;
    r[1] = x1;
    r[2] = x2;
    r[3] = x3;
    return (s64)x0;
}

void machine_idle_window(u64 ticks) { smc((u64[5]){INT_EL2_WINDOW, ticks}); }

static struct world_exit visit(u64 r[5]) {
    smc(r);
    return (struct world_exit){r[0], {r[1], r[2], r[3]}};
}

struct world_exit world_enter(const u64 message[4]) {
    return visit((u64[5]){INT_WORLD_ENTER, message[0], message[1], message[2], message[3]});
}

struct world_exit world_reply(s64 status, u64 value) { return visit((u64[5]){INT_WORLD_REPLY, (u64)status, value}); }

struct world_exit world_resume(void) { return visit((u64[5]){INT_WORLD_RESUME}); }
