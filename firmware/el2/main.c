/* EL2 starts, at boot and whenever protection is turned on again. The entry is always `_start`. */
#include "el2.h"

#include "arm.h"
#include "defences.h"

#define HCR ((1ul << 31) | (1ul << 19) | (1ul << 1) | (1ul << 0)) /* EL1 is AArch64, SMC traps, set/way becomes clean, stage 2 */
#define VTCR 0x80023559ul /* 39-bit addresses from level 1, 4 KiB, write-back inner shareable walks */

ALIGNED(16) u8 el2_stacks[MAX_CPUS][1 << 14];
struct monitor monitor __attribute__((section(".tables"))); /* pages_init writes it: zeros first would be written twice */
#ifdef CONTROLS
u64 defences_off;
#endif

_Noreturn void el2_main(u64 cpu, bool build, u64 off) {
    (void)cpu;
#ifdef CONTROLS
    defences_off = off;
#else
    (void)off;
#endif
    if (build) {
        mmu_build();
        dsb();
    }
    mmu_on();
    if (build)
        pages_init(&monitor);
    write_reg(cptr_el2, 0x33ff); /* no traps of vector instructions */
    write_reg(mdcr_el2, (read_reg(pmcr_el0) >> 11 & 31) | (DEFENCE(D_COUNT) ? MDCR_NO_COUNT : 0));
    write_reg(cnthctl_el2, 3);
    write_reg(cntvoff_el2, 0);
    write_reg(hstr_el2, 0);
    write_reg(vpidr_el2, read_reg(midr_el1));
    write_reg(vmpidr_el2, read_reg(mpidr_el1));
    write_reg(vtcr_el2, VTCR);
    write_reg(vttbr_el2, monitor.stage2.l1);
    write_reg(hcr_el2, HCR);
    isb();
    __asm__ volatile("tlbi alle1\n dsb sy\n isb" : : : "memory");
    smc((u64[5]){INT_EL2_READY});
    for (;;)
        ; /* EL3 goes on with EL1 */
}
