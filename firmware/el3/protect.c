/* On-demand protection: stage 2 off on all CPUs, and on again over an EL2 that is what it was at boot.
 *
 * A rendezvous brings all other CPUs into EL3 (our SGI reaches a CPU that masks interrupts, too) and holds them there.
 * Nothing of EL2 survives being off: its registers are set anew and it builds its tables and states from nothing. */
#include "el3.h"

u32 protection = PROTECTION_ON;

enum order { HOLD, GO_ON, TURN_OFF, TURN_ON };

static u32 rebuilder; /* the CPU whose EL2 builds while the others are held, plus 1 */

static struct {
    u32 lock, order; /* asked: CPUs that have not come yet; here: that came; busy: those that were in EL2 or the secure world */
    u32 asked, here, busy;
} rendezvous;

bool rendezvous_lock(void) {
    u32 nobody = 0;
    return __atomic_compare_exchange_n(&rendezvous.lock, &nobody, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

void rendezvous_unlock(void) { __atomic_store_n(&rendezvous.lock, 0, __ATOMIC_RELEASE); }

static bool el1_of_normal_world(const struct frame *f) {
    return (read_reg(scr_el3) & 1) && SPSR_LEVEL(f->spsr) < 2;
}

/* All other CPUs that are on stand in EL3 now. True: none of them was in EL2 or in the secure world. */
static bool gather(u32 cpu) {
    u32 others = __atomic_load_n(&online, __ATOMIC_ACQUIRE) & ~(1u << cpu);
    rendezvous.here = rendezvous.busy = 0;
    __atomic_store_n(&rendezvous.order, HOLD, __ATOMIC_RELEASE);
    __atomic_store_n(&rendezvous.asked, others, __ATOMIC_RELEASE);
    for (u32 other = 0; other < MAX_CPUS; other++)
        if (others >> other & 1)
            gic_interrupt(other);
    while (__atomic_load_n(&rendezvous.here, __ATOMIC_ACQUIRE) != others)
        pause();
    return __atomic_load_n(&rendezvous.busy, __ATOMIC_ACQUIRE) == 0;
}

static void dismiss(u32 order) {
    __atomic_store_n(&rendezvous.order, order, __ATOMIC_RELEASE);
    while (__atomic_load_n(&rendezvous.here, __ATOMIC_ACQUIRE))
        pause();
    rendezvous_unlock();
}

static void stage2_off(void) {
    write_reg(hcr_el2, HCR_UNPROTECTED);
    write_reg(scr_el3, SCR_UNPROTECTED);
    isb();
    __asm__ volatile("tlbi alle1\n dsb sy\n isb" : : : "memory");
}

/* Another CPU called. Reached from EL1 of the normal world, from EL2 or from the secure world.
 *
 * Or nobody did: the interrupt that wakes a parked CPU can come after that CPU has seen by itself that it is wanted. It
 * would wait here for an order nobody gives, or follow an old one; so only those answer who were asked. */
void rendezvous_answer(struct frame *f, u32 cpu) {
    if (!(__atomic_fetch_and(&rendezvous.asked, ~(1u << cpu), __ATOMIC_ACQ_REL) >> cpu & 1) && DEFENCE(D_STRAY))
        return;
    if (!el1_of_normal_world(f))
        __atomic_fetch_or(&rendezvous.busy, 1u << cpu, __ATOMIC_ACQ_REL);
    __atomic_fetch_or(&rendezvous.here, 1u << cpu, __ATOMIC_ACQ_REL);
    u32 order;
    while ((order = __atomic_load_n(&rendezvous.order, __ATOMIC_ACQUIRE)) == HOLD)
        pause();
    if (order == TURN_OFF) {
        stage2_off();
    } else if (order == TURN_ON) {
        resume_frame[cpu] = *f;
        write_reg(scr_el3, SCR_NORMAL);
        enter_el2(f, cpu, false);
    }
    __atomic_fetch_and(&rendezvous.here, ~(1u << cpu), __ATOMIC_ACQ_REL);
}

/* EL2_FREEZE: x1 is the frame of the EL1 that asked. Answers EL2 when it cannot be. */
void protect_off(struct frame *f, u32 cpu) {
    if (!rendezvous_lock()) {
        f->x[0] = (u64)ABI_BUSY;
        return;
    }
    bool free = gather(cpu);
    if (!free || !el2_intact()) {
        f->x[0] = (u64)(free ? ABI_TAMPERED : ABI_BUSY);
        dismiss(GO_ON);
        return;
    }
    *f = *(const struct frame *)f->x[1];
    f->x[0] = ABI_OK;
    protection = PROTECTION_OFF;
    stage2_off();
    dismiss(TURN_OFF);
}

/* PROTECT_ON from EL1. The other CPUs stay held until EL2 has built its tables (el2_ready). */
void protect_on(struct frame *f, u32 cpu) {
    if (!rendezvous_lock()) {
        f->elr -= 4;
        return;
    }
    gather(cpu);
    if (DEFENCE(D_RESTART))
        smmu_start();
    if (!el2_intact()) {
        protection = PROTECTION_TAMPERED;
        f->x[0] = (u64)ABI_TAMPERED;
        dismiss(GO_ON);
        return;
    }
    f->x[0] = ABI_OK;
    resume_frame[cpu] = *f;
    protection = PROTECTION_ON;
    rebuilder = cpu + 1;
    write_reg(scr_el3, SCR_NORMAL);
    enter_el2(f, cpu, DEFENCE(D_REBUILD));
}

/* EL2_READY: go on where EL1 was. */
void el2_ready(struct frame *f, u32 cpu) {
    *f = resume_frame[cpu];
    if (rebuilder == cpu + 1) {
        rebuilder = 0;
        dismiss(TURN_ON);
    }
}
