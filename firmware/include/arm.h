/* Registers, barriers and stage-1 descriptors. */
#ifndef ARM_H
#define ARM_H
#include "types.h"

#ifndef REGISTERS_PLAYED /* by host/switch.c */
#define read_reg(name) ({ u64 v_; __asm__ volatile("mrs %0, " #name : "=r"(v_)); v_; })
#define write_reg(name, value) __asm__ volatile("msr " #name ", %0" : : "r"((u64)(value)) : "memory")
#define isb() __asm__ volatile("isb" : : : "memory")
#define dsb() __asm__ volatile("dsb sy" : : : "memory")
#define wfi() __asm__ volatile("wfi" : : : "memory")
#define pause() __asm__ volatile("yield" : : : "memory")
#define forget_el1() __asm__ volatile("tlbi alle1\n dsb sy\n isb" : : : "memory")
/* Memory and our cache agree about this line, which others use uncached. */
#define agree(line) __asm__ volatile("dc civac, %0\n dsb sy" : : "r"(line) : "memory")
#endif

#define MODE_EL1H 0x3c5ul /* with all interrupts masked */
#define MODE_EL2H 0x3c9ul
#define SPSR_LEVEL(spsr) (((spsr) >> 2) & 3)

#define EC(esr) ((esr) >> 26)
#define EC_HVC 0x16
#define EC_SMC 0x17
#define EC_REGISTER 0x18
#define EC_INSTRUCTION_ABORT 0x20
#define EC_DATA_ABORT 0x24
#define EC_IDLE 0x3ful /* no machine's: EL3 asks EL2 whether protection can go off */

#define MDCR_NO_SECURE_DEBUG (1ul << 16)
#define MDCR_SECURE_COUNT (1ul << 17) /* EL3's register */
#define MDCR_NO_COUNT (1ul << 17)     /* EL2's */

/* Stage 1, 4 KiB granule, 4 GiB of addresses: tables start at level 1. */
#define S1_TABLE 3ul
#define S1_BLOCK 1ul
#define S1_PAGE 3ul
#define S1_DEVICE ((0ul << 2) | (1ul << 10) | (1ul << 6 & 0))
#define S1_NORMAL ((1ul << 2) | (3ul << 8) | (1ul << 10))
#define S1_NORMAL_WORLD (1ul << 5)
#define S1_READ_ONLY (1ul << 7)
#define S1_NO_EXECUTE (1ul << 54)
#define S1_PRIVILEGED_NO_EXECUTE (1ul << 53)
#define MAIR 0xff00ul /* 0: device, 1: write-back memory */
#define TCR_4GIB (32ul | (1ul << 8) | (1ul << 10) | (3ul << 12)) /* T0SZ, write-back walks, inner shareable */
#define TCR_SINGLE (TCR_4GIB | (1ul << 31) | (1ul << 23))        /* EL2 and EL3 */
#define SCTLR_MMU ((1ul << 0) | (1ul << 2) | (1ul << 12))        /* MMU, data and instruction cache */
#define SCTLR_WXN (1ul << 19)
#define SCTLR_EL23_RES1 0x30c50830ul
#define SCTLR_EL1_RES1 0x30d00800ul

static inline u32 cpu_index(void) { return (u32)(read_reg(mpidr_el1) & 0xff); }

void *memset(void *to, int value, size_t bytes);
void *memcpy(void *to, const void *from, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);
#endif
