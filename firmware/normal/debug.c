/* Attacks through debug and performance registers, registers of EL3's interrupts, and a CPU that goes off and on. */
#include "kernel.h"

#include "../el3/psci.h"
#include "el2_symbols.h"

/* The machine brings these to EL3, which must not stop for it. The twin acknowledges interrupts of our own group. */
static u64 acknowledge(u64 twin, u64 unused) {
    (void)unused;
    return twin ? read_reg(icc_iar1_el1) : read_reg(icc_iar0_el1);
}

static bool register_group0(struct outcome *out, bool twin) {
    u64 value = 0;
    return faulted(out, guarded(acknowledge, twin, 0, &value), value, "read");
}

#define MDSCR_DEBUG (1ul << 15 | 1ul << 13) /* monitor debug, also in the kernel */

/* Arm a watchpoint for loads and stores at `address`, on every level and in both states, and see who is stopped. */
static void watch(u64 address) {
    write_reg(oslar_el1, 0);
    write_reg(dbgwvr0_el1, address);
    write_reg(dbgwcr0_el1, 0xfful << 5 | 1ul << 13 | 3ul << 3 | 3ul << 1 | 1); /* HMC: higher levels, too */
    write_reg(mdscr_el1, read_reg(mdscr_el1) | MDSCR_DEBUG);
    isb();
}

static void watch_nothing(void) {
    write_reg(dbgwcr0_el1, 0);
    write_reg(dbgbcr0_el1, 0);
    write_reg(mdscr_el1, read_reg(mdscr_el1) & ~MDSCR_DEBUG);
    __asm__ volatile("msr daifset, #8\n isb");
}

static u64 trapped_fill(u64 address, u64 unused) {
    u64 r[4];
    (void)unused;
    watch(address);
    __asm__ volatile("msr daifclr, #8\n isb" : : : "memory");
    return (u64)service(SVC_FILL, CANARY, 0, r);
}

static u64 trapped_store(u64 address, u64 unused) {
    (void)unused;
    watch(address);
    __asm__ volatile("msr daifclr, #8\n isb" : : : "memory");
    return store(address, 1);
}

static bool debug_watch(struct outcome *out, bool twin) {
    u64 value = 0;
    if (!twin)
        give(VICTIM, 1);
    u64 esr = guarded(twin ? trapped_store : trapped_fill, twin ? TWIN : VICTIM, 0, &value);
    watch_nothing();
    out->seen = esr ? "it stopped" : "the secure world worked on";
    out->value = esr ? esr : value;
    return esr != 0 || value != (twin ? 1 : ABI_OK);
}

static u64 harmless(u64 a, u64 b) { return a + b; }

static u64 trapped_call(u64 address, u64 twin) {
    u64 r[4];
    write_reg(oslar_el1, 0);
    write_reg(dbgbvr0_el1, address);
    write_reg(dbgbcr0_el1, 1ul << 13 | 0xful << 5 | 3ul << 1 | 1); /* HMC: higher levels, too */
    write_reg(mdscr_el1, read_reg(mdscr_el1) | MDSCR_DEBUG);
    __asm__ volatile("msr daifclr, #8\n isb" : : : "memory");
    return twin ? ((function)address)(0, 0) : (u64)call_monitor(CALL_VERSION, 0, 0, 0, r);
}

/* EL2's VERSION, which EL1 cannot reach, as a breakpoint. */
static bool debug_break(struct outcome *out, bool twin) {
    u64 value = 0, esr = guarded(trapped_call, twin ? (u64)harmless : EL2_VERSION_CALL, twin, &value);
    watch_nothing();
    out->seen = esr ? "it stopped" : "EL2 answered";
    out->value = esr ? esr : value;
    return esr != 0;
}

/* How much of a long visit to the secure world a counter of cycles sees, in percent. Counting is allowed on every level. */
static u64 counted_percent(void) {
    u64 r[4];
    write_reg(pmevcntr0_el0, 0);
    u64 start = read_reg(cntpct_el0);
    while (read_reg(cntpct_el0) - start < read_reg(cntfrq_el0) / 500)
        ;
    u64 ticks = read_reg(cntpct_el0) - start, ours = read_reg(pmevcntr0_el0) & 0xffffffff;
    start = read_reg(cntpct_el0);
    service(SVC_SPIN, 2, 0, r); /* short: the counter has 32 bits */
    u64 long_ticks = read_reg(cntpct_el0) - start, theirs = (read_reg(pmevcntr0_el0) - ours) & 0xffffffff;
    return ours ? theirs * ticks * 100 / long_ticks / ours : ~0ul;
}

/* Most of several times: a host that stops the emulator for a while spoils one. */
static bool count_secure(struct outcome *out, bool twin) {
    u64 seen = 0, still = 0;
    (void)twin;
    give(VICTIM, BLOCK_PAGES);
    write_reg(pmcntenclr_el0, ~0u);
    write_reg(pmevtyper0_el0, 0x11ul | 1ul << 27); /* cycles, EL2 included */
    write_reg(pmccfiltr_el0, 1ul << 27);
    write_reg(pmccntr_el0, 0);
    write_reg(pmcr_el0, 1 | 1ul << 6);
    write_reg(pmcntenset_el0, 1ul << 31 | 1);
    isb();
    while (seen < 3 && still < 3) {
        out->value = counted_percent();
        if (out->value > 50)
            seen++;
        else
            still++;
    }
    write_reg(pmcr_el0, 0);
    out->seen = out->value == ~0ul ? "the counter does not count" : seen == 3 ? "percent of its cycles" : "percent: it stands still";
    return seen == 3;
}

/* Semihosting would let the kernel read and write the host's files. */
static u64 semihosting(u64 twin, u64 unused) {
    (void)unused;
    if (twin)
        return harmless(1, 2);
    register u64 x0 __asm__("x0") = 0x11; /* SYS_TIME */
    __asm__ volatile("mov x1, #0\n hlt #0xf000" : "+r"(x0) : : "x1", "memory");
    return x0;
}

static bool debug_semihosting(struct outcome *out, bool twin) {
    u64 value = 0;
    return faulted(out, guarded(semihosting, twin, 0, &value), value, "it answered");
}

static u64 answer(u64 a, u64 b) { return a + b; }

/* With an interrupt of its own pending a CPU that is off does not sleep in WFI. */
static u64 off_awake(u64 a, u64 b) {
    (void)a;
    (void)b;
    *(volatile u32 *)(GICR_BASE + GICR_STRIDE + 0x10000 + 0x100) = 1u << 30;
    write_reg(icc_pmr_el1, 0xff);
    write_reg(icc_igrpen1_el1, 1);
    write_reg(cntp_tval_el0, 0);
    write_reg(cntp_ctl_el0, 1);
    second_leaves();
    return (u64)call_firmware(PSCI_CPU_OFF, 0, 0, 0, NULL);
}

/* Off and on, as fast as it goes: the interrupt that wakes a CPU may find it awake. It must still be there. */
static bool psci_storm(struct outcome *out, bool twin) {
    u64 value = 0, frequency = read_reg(cntfrq_el0), until = read_reg(cntpct_el0) + 2 * frequency;
    (void)twin;
    out->seen = "it came back each time";
    for (out->value = 0; read_reg(cntpct_el0) < until || out->value < 100; out->value++) {
        second_begin(off_awake, 0, 0);
        while (call_firmware(PSCI_AFFINITY_INFO, 1, 0, 0, NULL) == 0)
            pause();
        call_firmware(PSCI_CPU_ON, 1, (u64)second_cpu, 0, NULL);
        if (!second_answers(answer, 10 * frequency) || on_second(answer, 1, 2, &value) || value != 3) {
            out->seen = "it is lost in EL3";
            return true;
        }
    }
    return false;
}

const struct attack debug_attacks[] = {
    {"register-group0", register_group0}, {"debug-watch", debug_watch}, {"debug-break", debug_break},
    {"debug-count", count_secure}, {"debug-semihosting", debug_semihosting}, {"psci-storm", psci_storm}, {NULL, NULL},
};
