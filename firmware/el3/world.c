/* The switch between the normal world's EL2 and the trusted OS. One visit at a time: EL2 keeps the order, and we check it. */
#include "el3.h"

#define EL1_REGISTERS(X)                                                                                              \
    X(sctlr_el1) X(cpacr_el1) X(ttbr0_el1) X(ttbr1_el1) X(tcr_el1) X(esr_el1) X(far_el1) X(afsr0_el1) X(afsr1_el1)     \
    X(mair_el1) X(amair_el1) X(vbar_el1) X(contextidr_el1) X(tpidr_el0) X(tpidrro_el0) X(tpidr_el1) X(sp_el0) X(sp_el1) \
    X(elr_el1) X(spsr_el1) X(par_el1) X(cntkctl_el1) X(csselr_el1) X(mdscr_el1)
#define ONE(name) +1
#define EL1_COUNT (EL1_REGISTERS(ONE))

struct context {
    struct frame frame;
    u64 el1[EL1_COUNT];
    ALIGNED(16) u64 fp[66];
};

enum trusted_os { OS_BOOTING, OS_WAITING, OS_INSIDE, OS_CALLING, OS_STOPPED };

static struct context secure, normal[MAX_CPUS];
static u32 state, visitor;

/* `whole`: with EL1's system registers. While EL2 serves a call of the trusted OS they stay: EL2 uses none of them, they
 * hold no data, and they are most of what a switch costs. */
static void save(struct context *c, const struct frame *f, bool whole) {
    u64 i = 0;
    c->frame = *f;
#define SAVE(name) c->el1[i++] = read_reg(name);
    if (whole) {
        EL1_REGISTERS(SAVE)
    }
    fp_save(c->fp);
}

static void restore(const struct context *c, struct frame *f, bool whole) {
    u64 i = 0;
    *f = c->frame;
#define RESTORE(name) write_reg(name, c->el1[i++]);
    if (whole) {
        EL1_REGISTERS(RESTORE)
    }
    if (DEFENCE(D_VECTORS))
        fp_restore(c->fp);
}

void world_boot(struct frame *f) {
    memset(f, 0, sizeof(*f));
    f->elr = SEL1_BASE;
    f->spsr = MODE_EL1H;
    write_reg(sctlr_el1, SCTLR_EL1_RES1);
    write_reg(scr_el3, SCR_SECURE);
}

static void enter(struct frame *f, u32 cpu) {
    const bool whole = state != OS_CALLING;
    save(&normal[cpu], f, whole);
    restore(&secure, f, whole);
    write_reg(scr_el3, SCR_SECURE);
    isb();
    visitor = cpu;
    state = OS_INSIDE;
    protect_used();
}

static void leave(struct frame *f, u32 cpu, u32 next, u64 kind, const u64 value[3]) {
    const bool whole = next != OS_CALLING;
    save(&secure, f, whole);
    state = next;
    protect_used();
    restore(&normal[cpu], f, whole);
    f->x[0] = kind;
    for (u32 i = 0; i < 3; i++)
        f->x[i + 1] = value[i];
    write_reg(scr_el3, normal_scr());
    isb();
}

/* From EL2: WORLD_ENTER, WORLD_REPLY, WORLD_RESUME. */
void world_serve(struct frame *f, u32 cpu) {
    const u64 id = f->x[0], a[4] = {f->x[1], f->x[2], f->x[3], f->x[4]};
    const u32 needed = id == INT_WORLD_ENTER ? OS_WAITING : id == INT_WORLD_REPLY ? OS_CALLING : OS_STOPPED;
    if (state != needed || (needed == OS_CALLING && visitor != cpu) || protection != PROTECTION_ON)
        panic("el2 entered the trusted os out of order", id);
    enter(f, cpu);
    for (u64 i = 0; i < 4 && id == INT_WORLD_ENTER; i++)
        f->x[i] = a[i];
    for (u64 i = 0; i < 2 && id == INT_WORLD_REPLY; i++)
        f->x[i] = a[i];
}

/* From the trusted OS. False: no call it can make. */
bool world_secure_call(struct frame *f, u32 cpu) {
    const u64 value[3] = {f->x[1], f->x[2], f->x[3]}, call[3] = {f->x[0], f->x[1], 0};
    if (f->x[0] == INT_SEL1_READY && state == OS_BOOTING) {
        save(&secure, f, true);
        state = OS_WAITING;
        memset(&normal[cpu], 0, sizeof(normal[cpu])); /* nothing of the trusted OS stays in a register */
        normal[cpu].el1[0] = SCTLR_EL1_RES1;
        restore(&normal[cpu], f, true);
        write_reg(scr_el3, normal_scr());
        enter_el1(&resume_frame[cpu], NORMAL_BASE, 0);
        enter_el2(f, cpu, true);
    } else if (f->x[0] == INT_SEL1_DONE && state == OS_INSIDE) {
        leave(f, cpu, OS_WAITING, INT_WORLD_DONE, value);
    } else if (f->x[0] >> 24 == 0xf2 && state == OS_INSIDE) {
        leave(f, cpu, OS_CALLING, INT_WORLD_CALLS, call);
    } else {
        return false;
    }
    return true;
}

void world_preempt(struct frame *f, u32 cpu) {
    const u64 nothing[3] = {0, 0, 0};
    if (state == OS_INSIDE && visitor == cpu)
        leave(f, cpu, OS_STOPPED, INT_WORLD_PREEMPTED, nothing);
}
