/* Exceptions of the normal world: calls, faults of stage 2, SMCs it may or may not make.
 *
 * EL2 runs with interrupts masked and touches nothing but the monitor; whatever it does not know, EL1 gets back as the
 * fault it would see without EL2. */
#include "../el3/psci.h"
#include "arm.h"
#include "calls.h"
#include "defences.h"
#include "el2.h"
#include "frame.h"
#include "inject.h"
#include "machine.h"
#include "memlayout.h"
#include "stage2.h"

#define FAULT_ALIGNMENT 0x21 /* Linux turns it into SIGBUS or EFAULT in most places; docs/firmware.md */
#define FAULT_EXTERNAL 0x10

static void inject_abort(struct frame *f, u64 esr) {
    bool from_el1 = SPSR_LEVEL(f->spsr) == 1, data = EC(esr) == EC_DATA_ABORT;
    u64 class = (data ? EC_DATA_ABORT : EC_INSTRUCTION_ABORT) + from_el1;
    u64 write = data ? esr & (1 << 6) : 0;
    inject(f, class << 26 | ESR_LENGTH | write | (data ? FAULT_ALIGNMENT : FAULT_EXTERNAL), read_reg(far_el2));
}

static void hvc_of_el1(struct frame *f, u32 cpu) {
    struct call call;
    call.cpu = cpu;
    for (u64 i = 0; i < COUNT(call.arg); i++)
        call.arg[i] = f->x[i + 1];
    for (u64 i = 0; i < RESULTS; i++)
        call.result[i] = 0; /* one by one: an initialiser becomes a call of memset, half of a short call's time */
    call_normal(&monitor, f->x[0] >> 32 ? 0 : (u32)f->x[0], &call);
    for (u64 i = 0; i < RESULTS; i++)
        f->x[i] = call.result[i];
}

/* A call by whoever can map the trap page: Linux's root, without a module. It may do no more than the kernel may by HVC. */
static bool is_call(const struct frame *f, u64 esr, u64 address) {
    return address == TRAP_PAGE && EC(esr) == EC_DATA_ABORT && !(f->spsr & 0x10);
}

static void stage2_fault(struct frame *f, u32 cpu, u64 esr) {
    u64 address = (read_reg(hpfar_el2) >> 4 & 0xfffffffffful) << ABI_PAGE_SHIFT;
    if (is_call(f, esr, address)) {
        f->elr += 4;
        return hvc_of_el1(f, cpu);
    }
    switch (page_state(&monitor, address)) {
    case PAGE_UNPROTECTED: /* its block is being split or merged, or it came back just now */
        return;
    case PAGE_CLAIMED:
#ifdef CONTROLS
        if (!DEFENCE(D_CLAIMED)) {
            stage2_map_page(&monitor, (address - DRAM_BASE) / PAGE_SIZE);
            return machine_flush();
        }
#endif
        session_hurry(&monitor, cpu, address);
        return;
    default:
        inject_abort(f, esr);
    }
}

static void forward(struct frame *f) {
    u64 r[5] = {f->x[0], f->x[1], f->x[2], f->x[3], 0};
    f->x[0] = (u64)smc(r);
}

/* EL1 goes on at `f` when protection is off; this returns only when it could not be. */
static s64 turn_off(struct frame *f, bool by_itself) {
    if (!session_close(false)) /* first, so that no donation comes between the check and the end */
        return ABI_BUSY;
    s64 status = ABI_STATE;
    const bool wanted = by_itself && monitor.wanted; /* the request would be lost */
    if (!(monitor.flex || monitor.claimed || wanted) || !DEFENCE(D_OFF))
        status = smc((u64[5]){INT_EL2_FREEZE, (u64)f});
    session_open();
    return status;
}

static void protect_off(struct frame *f) {
    f->x[0] = ABI_OK;
    f->x[0] = (u64)turn_off(f, false);
}

/* Flex-Mem survives a reset in DRAM: nobody can be in the trusted OS any more, and its pages are zeroed. */
static void power(struct frame *f) {
    if (!session_close(true)) {
        f->elr -= 4;
        return;
    }
    for (u64 page = 0; page < DRAM_PAGES && DEFENCE(D_RESET); page++)
        if (page_state(&monitor, DRAM_BASE + page * PAGE_SIZE) != PAGE_UNPROTECTED)
            machine_zero_page(DRAM_BASE + page * PAGE_SIZE);
    forward(f);
}

static void smc_of_el1(struct frame *f) {
    f->elr += 4;
    switch (f->x[0]) {
    case CALL_PROTECT_OFF:
        return protect_off(f);
    case CALL_PROTECT_ON:
        f->x[0] = ABI_OK; /* it is */
        return;
    case CALL_PROTECT_STATUS:
        f->x[0] = ABI_OK;
        f->x[1] = 1;
        return;
    case PSCI_SYSTEM_OFF:
    case PSCI_SYSTEM_RESET:
        return power(f);
    case PSCI_CPU_ON:
        if (DEFENCE(D_ENTRY) && !range_unprotected(&monitor, f->x[2], 4)) {
            f->x[0] = (u64)PSCI_INVALID_ADDRESS;
            return;
        }
        return forward(f);
    case SMCCC_VERSION:
    case PSCI_VERSION:
    case PSCI_CPU_OFF:
    case PSCI_AFFINITY_INFO:
    case PSCI_FEATURES:
        return forward(f);
    default:
        f->x[0] = (u64)ABI_NOT_SUPPORTED;
    }
}

void el2_exception(struct frame *f, u64 vector) {
    u64 esr = read_reg(esr_el2);
    u32 cpu = (u32)read_reg(tpidr_el2);
    if (vector != 8 && vector != 12)
        for (;;)
            wfi(); /* a fault of our own: this CPU stops, protection stays */
    switch (EC(esr)) {
    case EC_HVC:
        return hvc_of_el1(f, cpu);
    case EC_SMC:
        return smc_of_el1(f);
    case EC_DATA_ABORT:
    case EC_INSTRUCTION_ABORT:
        return stage2_fault(f, cpu, esr);
    case EC_IDLE: /* if it is refused, EL3 asks again later */
        turn_off(f, true);
        return;
    default:
        inject_undefined(f);
    }
}
