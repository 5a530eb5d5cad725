/* el3/protect.c on the host, with registers and one CPU played: the switch of protection, its timer and the request page.
 * Driven by tests/monitor/test_switch.py through ctypes. */
#include "types.h"

#define REGISTERS_PLAYED
#define read_reg(name) (played_##name)
#define write_reg(name, value) ((void)(played_##name = (u64)(value)))
#define isb() ((void)0)
#define dsb() ((void)0)
#define wfi() ((void)0)
#define pause() ((void)0)
#define forget_el1() ((void)0)
#define agree(line) ((void)(line))

static u64 played_cntpct_el0, played_cntfrq_el0, played_cntps_cval_el1, played_cntps_ctl_el1, played_scr_el3, played_hcr_el2,
    played_elr_el2, played_spsr_el2, played_esr_el2, played_vbar_el2, played_mpidr_el1;

static u64 played_page[512];
#define DRAM_BASE ((u64)(uintptr_t)played_page - (EL2_OFFSET - PAGE_SIZE))

#include "../el3/protect.c"

enum next { EL1, EL2_ASKED, EL2_STARTED, WRONG };

u32 online = 1;
struct frame resume_frame[MAX_CPUS];
static bool changed;
static u32 measured;
static struct frame el1; /* what the normal world must find unchanged, whatever happened */

bool el2_intact(void) {
    measured++;
    return !changed;
}

void enter_el2(struct frame *f, u32 cpu, bool build) {
    (void)cpu;
    (void)build;
    memset(f, 0, sizeof(*f));
    f->elr = EL2_BASE;
    f->spsr = MODE_EL2H;
}

void smmu_start(void) {}
void gic_interrupt(u32 cpu) { (void)cpu; }

static bool same(const struct frame *a, const struct frame *b) { return memcmp(a, b, sizeof(*a)) == 0; }

/* EL2 has started, and says so. */
static bool goes_on_as(struct frame *f, const struct frame *expected) {
    el2_ready(f, 0);
    return same(f, expected);
}

static bool asked(const struct frame *f) {
    return f->elr == played_vbar_el2 + 0x400 && f->spsr == MODE_EL2H && played_elr_el2 == el1.elr && played_spsr_el2 == el1.spsr &&
           EC(played_esr_el2) == EC_IDLE && memcmp(f->x, el1.x, sizeof(f->x)) == 0;
}

void switch_reset(u64 now, u64 frequency, u64 seed) {
    memset(played_page, 0, sizeof(played_page));
    memset(&idle, 0, sizeof(idle));
    for (u64 i = 0; i < COUNT(el1.x); i++)
        el1.x[i] = seed *= 6364136223846793005ul;
    el1.elr = seed & ~3ul;
    el1.spsr = seed >> 63 ? 0x60000005 : 0; /* EL1h or EL0 */
    protection = PROTECTION_ON;
    changed = false;
    measured = 0;
    played_scr_el3 = SCR_NORMAL;
    played_vbar_el2 = EL2_BASE + 0x800;
    played_cntfrq_el0 = frequency;
    played_cntpct_el0 = now;
    protect_start();
    timer_set();
}

void switch_time(u64 now) { played_cntpct_el0 = now; }
void switch_change(bool now) { changed = now; }
void switch_visit(void) { protect_used(); }
u32 switch_measured(void) { return measured; }
u32 switch_protection(void) { return protection; }
u64 switch_timer(void) { return played_cntps_ctl_el1 ? played_cntps_cval_el1 : 0; }
u64 switch_read(u64 word) { return played_page[word]; }
void switch_write(u64 word, u64 value) { played_page[word] = value; }
bool switch_hvc(void) { return played_scr_el3 >> 8 & 1; }

/* The timer's interrupt. At EL1, or at EL2 as when it serves a call. */
u32 switch_tick(bool at_el1) {
    struct frame f = el1, before;
    if (!at_el1)
        f.spsr = MODE_EL2H;
    before = f;
    protect_tick(&f, 0);
    if (same(&f, &before))
        return EL1;
    if (!at_el1)
        return WRONG;
    if (f.elr == EL2_BASE)
        return goes_on_as(&f, &el1) ? EL2_STARTED : WRONG;
    return asked(&f) ? EL2_ASKED : WRONG;
}

/* EL2_FREEZE. */
s64 switch_freeze(void) {
    struct frame f = {.x = {INT_EL2_FREEZE, (u64)(uintptr_t)&el1}, .elr = EL2_BASE, .spsr = MODE_EL2H}, before = f;
    protect_off(&f, 0);
    if (same(&f, &el1))
        return ABI_OK;
    before.x[0] = f.x[0];
    return same(&f, &before) ? (s64)f.x[0] : ABI_DENIED;
}

/* PROTECT_ON, while it is off. */
s64 switch_on(void) {
    struct frame f = el1, expected = el1;
    protect_on(&f, 0);
    expected.x[0] = f.elr == EL2_BASE ? ABI_OK : (u64)ABI_TAMPERED;
    return (f.elr == EL2_BASE ? goes_on_as(&f, &expected) : same(&f, &expected)) ? (s64)expected.x[0] : ABI_DENIED;
}

/* EL2_WINDOW. */
void switch_window(u64 ticks) {
    struct frame f = {.x = {INT_EL2_WINDOW, ticks}, .spsr = MODE_EL2H};
    protect_window(&f, 0);
}
