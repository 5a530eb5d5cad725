/* EL2's machine-dependent part: what main.c, traps.c and machine.c share. */
#ifndef EL2_H
#define EL2_H
#include "pages.h"

extern struct monitor monitor;
void mmu_build(void);
void mmu_on(void);
/* To EL3: x0 to x4 in, x0 to x3 out. */
s64 smc(u64 r[5]);
#endif
