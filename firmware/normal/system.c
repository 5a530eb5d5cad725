/* Attacks through devices, PSCI and system registers. */
#include "kernel.h"

#include "../el3/psci.h"

/* QEMU's fw_cfg copies to any address it is told: a DMA engine that no page table stops. Big-endian. */
static u64 fw_cfg_dma(u64 target, u64 unused) {
    volatile u32 *order = (volatile u32 *)(LISTS + 0x1000);
    (void)unused;
    order[0] = __builtin_bswap32(8 | 2); /* select item 0, the signature, and read it to memory */
    order[1] = __builtin_bswap32(4);
    order[2] = __builtin_bswap32((u32)(target >> 32));
    order[3] = __builtin_bswap32((u32)target);
    dsb();
    *(volatile u32 *)(FW_CFG_BASE + 16) = 0;
    *(volatile u32 *)(FW_CFG_BASE + 20) = __builtin_bswap32((u32)(u64)order);
    dsb();
    return order[0];
}

static bool dma_fw_cfg(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 before = checksum(), esr = guarded(fw_cfg_dma, VICTIM, 0, &value), after = checksum();
    faulted(out, esr, after - before, before == after ? "no change" : "the device wrote to Flex-Mem");
    return before != after;
}

static u64 load32(u64 address, u64 unused) {
    (void)unused;
    return *(volatile u32 *)address;
}

static bool device(struct outcome *out, u64 address) {
    u64 value = 0;
    return faulted(out, guarded(load32, address, 0, &value), value, "the device answers");
}

static bool device_virtio(struct outcome *out, bool twin) { (void)twin; return device(out, VIRTIO_MMIO); }
static bool device_fw_cfg(struct outcome *out, bool twin) { (void)twin; return device(out, FW_CFG_BASE); }

static bool reader_at(struct outcome *out, u64 entry) {
    u64 *order = (u64 *)(LISTS + 0x2000);
    u64 value;
    stop_second_cpu();
    give(VICTIM, 1);
    order[0] = VICTIM;
    order[1] = (u64)&order[2];
    order[2] = 0;
    dsb();
    s64 status = call_firmware(PSCI_CPU_ON, 1, entry, (u64)order, NULL);
    for (u32 i = 0; i < 3000000 && load((u64)&order[2], 0) == 0; i++)
        pause();
    value = load((u64)&order[2], 0);
    out->seen = value == CANARY ? "the canary" : status ? "refused" : "the CPU got nothing";
    out->value = value ? value : (u64)status;
    return value == CANARY;
}

/* A CPU that starts must start at EL1, behind stage 2. It ends this boot's second CPU. */
static bool psci_level(struct outcome *out, bool twin) { (void)twin; return reader_at(out, (u64)lone_reader); }

static bool psci_entry(struct outcome *out, u64 entry) {
    stop_second_cpu();
    s64 status = call_firmware(PSCI_CPU_ON, 1, entry, 0, NULL);
    out->seen = status ? "refused" : "started";
    out->value = (u64)status;
    return status == 0;
}

static bool psci_el2(struct outcome *out, bool twin) { return psci_entry(out, twin ? (u64)second_cpu : EL2_BASE); }
static bool psci_secure(struct outcome *out, bool twin) { return psci_entry(out, twin ? (u64)second_cpu : SEL1_BASE); }

static bool psci_bad_cpu(struct outcome *out, bool twin) {
    const u64 targets[] = {0, 2, 255, 1ul << 32, ~0ul};
    u64 started = 0;
    if (twin)
        return psci_entry(out, (u64)second_cpu);
    for (u64 i = 0; i < COUNT(targets); i++)
        started += call_firmware(PSCI_CPU_ON, targets[i], (u64)second_cpu, 0, NULL) >= 0;
    out->seen = started ? "started" : "all refused";
    out->value = started;
    return started;
}

/* DRAM survives a reset. The mark tells the second boot that it is the second. */
static bool reset_residue(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    if (load(MARK, 0) != CANARY) {
        give(VICTIM, 1);
        store(MARK, CANARY);
        say("resetting\n");
        call_firmware(PSCI_SYSTEM_RESET, 0, 0, 0, NULL);
    }
    store(MARK, 0);
    u64 esr = guarded(load, VICTIM, 0, &value);
    faulted(out, esr, value, value == CANARY ? "the canary" : "zeros");
    return value == CANARY;
}

/* Registers of the levels above. The twin is one of ours. */
#define REGISTER(name, register, own)                                                        \
    static u64 use_##name(u64 twin, u64 unused) {                                            \
        (void)unused;                                                                        \
        return twin ? read_reg(own) : read_reg(register);                                    \
    }                                                                                        \
    static bool name(struct outcome *out, bool twin) {                                       \
        u64 value = 0;                                                                       \
        return faulted(out, guarded(use_##name, twin, 0, &value), value, "read");            \
    }
REGISTER(register_vttbr, vttbr_el2, ttbr0_el1)
REGISTER(register_hcr, hcr_el2, sctlr_el1)
REGISTER(register_scr, scr_el3, sctlr_el1)
REGISTER(register_vbar, vbar_el3, vbar_el1)

static u64 flush_stage2(u64 twin, u64 unused) {
    (void)unused;
    if (twin)
        __asm__ volatile("tlbi vmalle1");
    else
        __asm__ volatile("tlbi alle1is");
    return 0;
}

static bool register_tlbi(struct outcome *out, bool twin) {
    u64 value = 0;
    return faulted(out, guarded(flush_stage2, twin, 0, &value), value, "done");
}

/* EL3's call to the other CPUs is a group-0 interrupt: nobody else may raise it. The twin raises one of our own. */
static u64 raise_group0(u64 twin, u64 unused) {
    (void)unused;
    __asm__ volatile("msr icc_sgi0r_el1, %0\n isb" : : "r"(15ul << 24 | 1) : "memory");
    return twin;
}

static bool group0_interrupt(struct outcome *out, bool twin) {
    volatile u32 *groups = (volatile u32 *)(GICR_BASE + 0x10000 + 0x80);
    volatile u32 *pending = (volatile u32 *)(GICR_BASE + 0x10000 + 0x200);
    u64 value = 0;
    if (twin) { /* SGI 3 is ours: pending bits of our interrupts do change */
        *pending = 1u << 3;
        out->seen = "pending";
        out->value = *pending;
        bool changed = *pending >> 3 & 1;
        *(volatile u32 *)(GICR_BASE + 0x10000 + 0x280) = 1u << 3;
        return changed;
    }
    *groups = ~0u; /* make it ours: ignored */
    *pending = 1u << 15;
    guarded(raise_group0, 0, 0, &value);
    out->value = (*groups & 1u << 15) | (*pending & 1u << 15);
    out->seen = out->value ? "it is ours" : "ignored";
    return out->value;
}

/* The physical timer's interrupt, which stays masked here: in the secure world it comes all the same. */
static void timer(u64 ticks) {
    *(volatile u32 *)(GICR_BASE + 0x10000 + 0x100) = 1u << 30;
    write_reg(icc_pmr_el1, 0xff);
    write_reg(icc_igrpen1_el1, 1);
    write_reg(cntp_tval_el0, ticks);
    write_reg(cntp_ctl_el0, ticks ? 1 : 0);
    isb();
}

static u64 vector_canaries(void) {
    static u64 v[64];
    u64 found = 0;
    __asm__ volatile(".arch_extension simd\n"
                     "st1 {v0.2d, v1.2d, v2.2d, v3.2d}, [%0], #64\n st1 {v4.2d, v5.2d, v6.2d, v7.2d}, [%0], #64\n"
                     "st1 {v8.2d, v9.2d, v10.2d, v11.2d}, [%0], #64\n st1 {v12.2d, v13.2d, v14.2d, v15.2d}, [%0], #64\n"
                     "st1 {v16.2d, v17.2d, v18.2d, v19.2d}, [%0], #64\n st1 {v20.2d, v21.2d, v22.2d, v23.2d}, [%0], #64\n"
                     "st1 {v24.2d, v25.2d, v26.2d, v27.2d}, [%0], #64\n st1 {v28.2d, v29.2d, v30.2d, v31.2d}, [%0], #64\n"
                     : "+r"((u64){(u64)v})
                     :
                     : "memory");
    for (u64 i = 0; i < COUNT(v); i++)
        found += v[i] == CANARY;
    return found;
}

/* Interrupt the trusted OS again and again while it works, and look at what it leaves in registers. Visits until there
 * were interrupts enough: on a busy host the emulator's timer can be late by more than a visit. */
static bool preempt_storm(struct outcome *out, bool twin) {
    const u64 passes = 20, enough = 10, most_visits = 100, frequency = read_reg(cntfrq_el0);
    u64 r[4] = {0, 0, 0, 0}, stops = 0, leaks = 0;
    (void)twin;
    give(VICTIM, BLOCK_PAGES);
    const u64 expected = passes * checksum();
    out->seen = NULL;
    for (u64 visit = 0; visit < most_visits && stops < enough && !out->seen; visit++) {
        timer(frequency / 2000);
        s64 status = call_monitor(CALL_SECURE_CALL, SVC_SPIN, passes, 0, r);
        while (status == ABI_PREEMPTED || status == ABI_BUSY) {
            stops += status == ABI_PREEMPTED;
            leaks += vector_canaries();
            if (call_monitor(CALL_SECURE_CALL, SVC_ECHO, 1, 2, r) != ABI_BUSY)
                say("set-up failed: two visits at once\n");
            timer(frequency / 2000);
            status = call_monitor(CALL_RESUME, 0, 0, 0, r);
        }
        if (status != ABI_OK || r[1] != expected) {
            out->seen = status != ABI_OK ? "a wrong status" : "a wrong sum";
            out->value = status != ABI_OK ? (u64)status : r[1];
        }
    }
    timer(0);
    if (out->seen)
        return true;
    out->value = stops;
    out->seen = leaks ? "the canary in a vector register" : stops == 0 ? "no interrupt came" : "interrupts, no secret";
    return leaks || stops == 0;
}

const struct attack system_attacks[] = {
    {"preempt-storm", preempt_storm},
    {"dma-fw-cfg", dma_fw_cfg}, {"device-virtio", device_virtio}, {"device-fw-cfg", device_fw_cfg}, {"psci-level", psci_level}, {"psci-el2", psci_el2}, {"psci-secure", psci_secure},
    {"psci-bad-cpu", psci_bad_cpu}, {"reset-residue", reset_residue}, {"register-vttbr", register_vttbr},
    {"register-hcr", register_hcr}, {"register-scr", register_scr}, {"register-vbar", register_vbar},
    {"register-tlbi", register_tlbi}, {"group0-interrupt", group0_interrupt}, {NULL, NULL},
};
