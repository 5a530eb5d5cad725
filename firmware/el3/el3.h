/* EL3: what its files share. */
#ifndef EL3_H
#define EL3_H
#include "abi.h"
#include "arm.h"
#include "defences.h"
#include "frame.h"
#include "memlayout.h"

#define SCR_SECURE 0x30434ul                 /* RW, FIQ to EL3, RES1 */
#define SCR_NORMAL 0x30535ul                 /* the same with NS and HVC enabled */
#define SCR_UNPROTECTED (0x30535ul & ~0x100ul) /* no HVC: nothing enters EL2 */
#define HCR_UNPROTECTED (1ul << 31)          /* EL1 is AArch64, and that is all */
#define RENDEZVOUS_SGI 15
#define TIMER_PPI 29 /* the secure physical timer's */

enum protection { PROTECTION_OFF, PROTECTION_ON, PROTECTION_TAMPERED };
extern u32 protection;

/* main.c */
_Noreturn void panic(const char *why, u64 value);
/* Whether the image in memory is the one in the list; measure only EL2 and it is what boot measured. */
bool el2_intact(void);
void enter_el2(struct frame *f, u32 cpu, bool build);
void enter_el1(struct frame *f, u64 entry, u64 argument);
_Noreturn void el3_leave(const struct frame *f);
/* SCR_EL3 of the normal world now. */
u64 normal_scr(void);

/* world.c */
void world_boot(struct frame *f);
void world_serve(struct frame *f, u32 cpu);
bool world_secure_call(struct frame *f, u32 cpu);
void world_preempt(struct frame *f, u32 cpu);

/* psci.c */
bool psci_serve(struct frame *f, u32 cpu);
_Noreturn void cpu_park(u32 cpu);
extern u32 online; /* one bit per CPU; changes under the rendezvous lock */
extern struct frame resume_frame[MAX_CPUS]; /* EL1, to go on with when this CPU's EL2 is ready */

/* protect.c */
bool rendezvous_lock(void);
void rendezvous_unlock(void);
void rendezvous_answer(struct frame *f, u32 cpu);
void protect_off(struct frame *f, u32 cpu);
void protect_on(struct frame *f, u32 cpu);
void protect_window(struct frame *f, u32 cpu);
/* EL3's timer, one for each CPU that is on. Each interrupt, and each change of what it waits for, sets it anew. */
void protect_start(void);
void protect_used(void);
void protect_tick(struct frame *f, u32 cpu);
void timer_set(void);
void timer_stop(void);
void el2_ready(struct frame *f, u32 cpu);

/* smmu.c: from here on devices reach the DMA window only. */
void smmu_start(void);

/* gic.c */
void gic_init_distributor(void);
void gic_init_cpu(u32 cpu);
void gic_interrupt(u32 cpu);
u32 gic_acknowledge(void);

/* mmu.c */
void mmu_build(void);
void mmu_on(void);

void fp_save(u64 *to);
void fp_restore(const u64 *from);
#endif
