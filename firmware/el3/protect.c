/* On-demand protection: stage 2 off on all CPUs, and on again over an EL2 that is what it was at boot.
 *
 * A rendezvous brings all other CPUs into EL3 (our SGI reaches a CPU that masks interrupts, too) and holds them there.
 * Nothing of EL2 survives being off: its registers are set anew and it builds its tables and states from nothing.
 *
 * EL3's timer asks idle.c. While protection is off a word in the request page is all the normal world can say without an
 * SMC. Anybody there may write to it: the page is fixed, can be nobody's secret, and a request can only turn protection on. */
#include "el3.h"
#include "idle.h"

#define POLLS_PER_SECOND 100
#define ANSWERS_PER_SECOND 20

u32 protection = PROTECTION_ON;
static struct idle idle;

enum order { HOLD, GO_ON, TURN_OFF, TURN_ON };

static u64 now(void) {
    isb();
    return read_reg(cntpct_el0);
}

void timer_set(void) {
    const u64 next = idle_next(&idle, now(), protection == PROTECTION_ON);
    write_reg(cntps_cval_el1, next);
    write_reg(cntps_ctl_el1, next != 0);
    isb();
}

void timer_stop(void) {
    write_reg(cntps_ctl_el1, 0);
    isb();
}

void protect_used(void) { idle_use(&idle, read_reg(cntpct_el0)); }

static volatile u64 *request_page(void) {
    volatile u64 *page = (volatile u64 *)REQUEST_PAGE;
#ifdef CONTROLS
    if (!DEFENCE(D_FIXED) && page[REQ_STATE + 1]) /* as a firmware that lets its caller choose */
        return (volatile u64 *)page[REQ_STATE + 1];
#endif
    return page;
}

/* The normal world maps the page uncached. */
static u64 request(void) {
    volatile u64 *page = request_page();
    agree(page);
    return page[REQ_REQUEST];
}

static void answer(s64 status) {
    volatile u64 *page = request_page();
    page[REQ_ANSWER] = (u64)status;
    page[REQ_STATE] = protection;
    dsb();
    page[REQ_REQUEST] = 0;
    agree(page);
}

void protect_start(void) {
    const u64 second = read_reg(cntfrq_el0);
    idle.poll = second / (DEFENCE(D_PACE) ? POLLS_PER_SECOND : 100 * POLLS_PER_SECOND);
    idle.gap = DEFENCE(D_PACE) ? second / ANSWERS_PER_SECOND : 0;
    answer(ABI_OK);
}

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
    forget_el1();
}

/* Another CPU called. Reached from EL1 of the normal world, from EL2 or from the secure world.
 *
 * Or nobody did: the interrupt that wakes a parked CPU can come after that CPU has seen by itself that it is wanted. It
 * would wait here for an order nobody gives, or follow an old one; so only those answer who were asked. */
void rendezvous_answer(struct frame *f, u32 cpu) {
    if (!(__atomic_fetch_and(&rendezvous.asked, ~(1u << cpu), __ATOMIC_ACQ_REL) >> cpu & 1) && DEFENCE(D_STRAY))
        return timer_set(); /* it waits for something else now */
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
    timer_set();
    __atomic_fetch_and(&rendezvous.here, ~(1u << cpu), __ATOMIC_ACQ_REL);
}

/* EL2_FREEZE: x1 is EL1's frame, to go on with. Answers EL2 when it cannot be. */
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
    protection = PROTECTION_OFF;
    stage2_off();
    answer(ABI_OK);
    timer_set();
    dismiss(TURN_OFF);
}

/* Unless it answers BUSY or TAMPERED, `f` is EL2's, and EL1 goes on at `next` when that one is ready. The other CPUs stay
 * held until EL2 has built its tables (el2_ready). */
static s64 turn_on(struct frame *f, u32 cpu, const struct frame *next) {
    if (!rendezvous_lock())
        return ABI_BUSY;
    gather(cpu);
    if (DEFENCE(D_RESTART))
        smmu_start();
    if (!el2_intact()) {
        protection = PROTECTION_TAMPERED;
        answer(ABI_TAMPERED);
        dismiss(GO_ON);
        return ABI_TAMPERED;
    }
    resume_frame[cpu] = *next;
    protection = PROTECTION_ON;
    rebuilder = cpu + 1;
    write_reg(scr_el3, SCR_NORMAL);
    enter_el2(f, cpu, DEFENCE(D_REBUILD));
    return ABI_OK;
}

/* PROTECT_ON from EL1. */
void protect_on(struct frame *f, u32 cpu) {
    struct frame next = *f;
    next.x[0] = ABI_OK;
    const s64 status = turn_on(f, cpu, &next);
    if (status == ABI_BUSY)
        f->elr -= 4; /* answer the one who has the lock, and come again */
    else if (status == ABI_TAMPERED)
        f->x[0] = (u64)ABI_TAMPERED;
}

/* EL2_WINDOW. The other CPUs' timers follow: any interrupt of ours sets them. */
void protect_window(struct frame *f, u32 cpu) {
    const u32 others = __atomic_load_n(&online, __ATOMIC_ACQUIRE) & ~(1u << cpu);
    idle_set_window(&idle, f->x[1], now());
    timer_set();
    for (u32 other = 0; other < MAX_CPUS; other++)
        if (others >> other & 1)
            gic_interrupt(other);
    f->x[0] = ABI_OK;
}

/* Only EL2 knows whether there is Flex-Mem. It is entered as by an exception of EL1, of a class no machine raises. */
static void ask_el2(struct frame *f) {
    write_reg(elr_el2, f->elr);
    write_reg(spsr_el2, f->spsr);
    write_reg(esr_el2, EC_IDLE << 26);
    f->elr = read_reg(vbar_el2) + 0x400;
    f->spsr = MODE_EL2H;
}

/* EL2 and the trusted OS are not stopped for it: they are in use. */
void protect_tick(struct frame *f, u32 cpu) {
    const bool on = protection == PROTECTION_ON;
    const enum idle_decision decision =
        el1_of_normal_world(f) ? idle_decide(&idle, now(), on, on ? 0 : request()) : IDLE_WAIT;
    if (decision == IDLE_OFF) {
        ask_el2(f);
    } else if (decision == IDLE_ON) {
        const struct frame next = *f;
        turn_on(f, cpu, &next);
    }
    timer_set();
}

/* EL2_READY: go on where EL1 was. */
void el2_ready(struct frame *f, u32 cpu) {
    *f = resume_frame[cpu];
    if (rebuilder == cpu + 1) {
        rebuilder = 0;
        protect_used();
        timer_set();
        answer(ABI_OK);
        dismiss(TURN_ON);
    }
}
