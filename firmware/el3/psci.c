/* Starting and stopping CPUs and the machine. A CPU that is off waits here, in WFI. */
#include "psci.h"

#include "el3.h"

u32 online = 1;
struct frame resume_frame[MAX_CPUS];
static u32 wanted_on; /* bits */
extern u32 el3_awake;

static bool is(u32 mask, u32 cpu) { return __atomic_load_n(&mask, __ATOMIC_ACQUIRE) >> cpu & 1; }

_Noreturn void cpu_park(u32 cpu) {
    timer_stop();
    while (!is(__atomic_load_n(&wanted_on, __ATOMIC_ACQUIRE), cpu)) {
        gic_acknowledge();
        if (!is(__atomic_load_n(&wanted_on, __ATOMIC_ACQUIRE), cpu))
            wfi();
    }
    gic_acknowledge();
    __atomic_fetch_and(&wanted_on, ~(1u << cpu), __ATOMIC_ACQ_REL);
    struct frame f = resume_frame[cpu];
    write_reg(scr_el3, normal_scr());
    write_reg(hcr_el2, HCR_UNPROTECTED);
    write_reg(sctlr_el1, SCTLR_EL1_RES1);
    if (protection == PROTECTION_ON && DEFENCE(D_ENTRY))
        enter_el2(&f, cpu, false);
    __atomic_fetch_or(&online, 1u << cpu, __ATOMIC_ACQ_REL);
    rendezvous_unlock(); /* whoever turned us on took it */
    timer_set();
    el3_leave(&f);
}

static s64 cpu_on(struct frame *f) {
    u64 target = f->x[1];
    if (target >= MAX_CPUS)
        return PSCI_INVALID_PARAMETERS;
    if (is(online, (u32)target))
        return PSCI_ALREADY_ON;
    enter_el1(&resume_frame[target], f->x[2], f->x[3]);
#ifdef CONTROLS
    if (!DEFENCE(D_ENTRY)) /* as a firmware that starts CPUs on the highest normal level would */
        resume_frame[target].spsr = MODE_EL2H;
#endif
    __atomic_fetch_or(&wanted_on, 1u << target, __ATOMIC_ACQ_REL);
    gic_interrupt((u32)target);
    return 0;
}

_Noreturn static void power(u32 pin) {
    volatile u32 *gpio = (volatile u32 *)SECURE_GPIO;
    __atomic_store_n(&el3_awake, 0, __ATOMIC_RELEASE); /* after a reset the other CPUs wait for us again */
    dsb();
    gpio[0x400 / 4] |= 1u << pin; /* output */
    gpio[(1u << pin)] = 0;
    gpio[(1u << pin)] = 1u << pin;
    for (;;)
        wfi();
}

static bool known(u64 id) {
    static const u32 ids[] = {SMCCC_VERSION, PSCI_VERSION, PSCI_CPU_OFF, PSCI_CPU_ON, PSCI_AFFINITY_INFO, PSCI_SYSTEM_OFF,
                              PSCI_SYSTEM_RESET, PSCI_FEATURES};
    for (u64 i = 0; i < COUNT(ids); i++)
        if (ids[i] == id)
            return true;
    return false;
}

bool psci_serve(struct frame *f, u32 cpu) {
    switch (f->x[0]) {
    case SMCCC_VERSION:
        f->x[0] = 0x10001;
        return true;
    case PSCI_VERSION:
        f->x[0] = 0x10000;
        return true;
    case PSCI_FEATURES:
        f->x[0] = known(f->x[1]) ? 0 : (u64)PSCI_NOT_SUPPORTED;
        return true;
    case PSCI_AFFINITY_INFO:
        f->x[0] = f->x[1] >= MAX_CPUS ? (u64)PSCI_INVALID_PARAMETERS : !is(online, (u32)f->x[1]);
        return true;
    case PSCI_CPU_ON:
    case PSCI_CPU_OFF:
        if (!rendezvous_lock()) {
            f->elr -= 4; /* answer the one who has it, and come again */
            return true;
        }
        if (f->x[0] == PSCI_CPU_OFF) {
            __atomic_fetch_and(&online, ~(1u << cpu), __ATOMIC_ACQ_REL);
            rendezvous_unlock();
            cpu_park(cpu);
        }
        f->x[0] = (u64)cpu_on(f);
        if (f->x[0] != 0)
            rendezvous_unlock();
        return true;
    case PSCI_SYSTEM_OFF:
        power(0);
    case PSCI_SYSTEM_RESET:
        power(1);
    default:
        return false;
    }
}
