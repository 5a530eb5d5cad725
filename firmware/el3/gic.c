/* GICv3: everything belongs to the normal world but one SGI, with which EL3 calls the other CPUs, and EL3's timer. */
#include "el3.h"

static volatile u32 *reg(u64 base, u64 offset) { return (volatile u32 *)(base + offset); }

void gic_init_distributor(void) {
    *reg(GICD_BASE, 0) = 0x37; /* affinity routing and all three groups */
    for (u64 i = 1; i < 32; i++)
        *reg(GICD_BASE, 0x80 + 4 * i) = ~0u; /* SPIs: non-secure group 1 */
}

void gic_init_cpu(u32 cpu) {
    u64 redistributor = GICR_BASE + cpu * GICR_STRIDE, sgi = redistributor + 0x10000;
    *reg(redistributor, 0x14) &= ~2u; /* WAKER: awake */
    while (*reg(redistributor, 0x14) & 4)
        ;
    *reg(sgi, 0x80) = ~(1u << RENDEZVOUS_SGI | 1u << TIMER_PPI); /* group 0: ours */
    *reg(sgi, 0xd00) = 0;
    *reg(sgi, 0x40c) &= 0x00ffffff; /* their priority is the highest */
    *reg(sgi, 0x41c) &= 0xffff00ff;
    *reg(sgi, 0x100) = 1u << RENDEZVOUS_SGI | 1u << TIMER_PPI;

    write_reg(icc_sre_el3, 0xf);
    isb();
    write_reg(scr_el3, SCR_NORMAL);
    isb();
    write_reg(icc_sre_el2, 0xf);
    write_reg(icc_sre_el1, 0x7);
    write_reg(scr_el3, SCR_SECURE);
    isb();
    write_reg(icc_sre_el1, 0x7);
    write_reg(icc_ctlr_el3, 0);
    write_reg(icc_pmr_el1, 0xff);
    write_reg(icc_igrpen0_el1, 1);
    isb();
}

void gic_interrupt(u32 cpu) {
    dsb();
    write_reg(icc_sgi0r_el1, (u64)RENDEZVOUS_SGI << 24 | 1u << cpu);
    isb();
}

u32 gic_acknowledge(void) {
    u32 id = (u32)read_reg(icc_iar0_el1) & 0xffffff;
    if (id < 1020)
        write_reg(icc_eoir0_el1, id);
    isb();
    return id;
}
