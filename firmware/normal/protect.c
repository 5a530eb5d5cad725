/* Attacks on the switch: protection off while Flex-Mem exists, and EL2 changed while it is off. */
#include "kernel.h"

#include <stddef.h>

#include "../el2/pages.h"
#include "el2_symbols.h"

static s64 off(void) { return call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL); }
static s64 on(void) { return call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL); }

static bool off_with_flex(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    s64 status = off();
    u64 esr = guarded(load, VICTIM, 0, &value);
    out->seen = status == ABI_OK ? "protection went off" : "refused";
    out->value = esr ? (u64)status : value;
    return esr == 0 && value == CANARY;
}

/* Change bytes of EL2 while it is off, turn it on, put them back. Achieved when it came on. */
static bool tamper(struct outcome *out, u64 address, u32 with, bool twin) {
    u64 value;
    volatile u32 *at = (volatile u32 *)address;
    s64 status = off();
    if (status != ABI_OK) {
        out->seen = "could not turn off";
        out->value = (u64)status;
        return false;
    }
    u64 readable = guarded(load, address, 0, &value);
    u32 before = *at;
    if (!twin)
        *at = with;
    __asm__ volatile("dsb sy\n ic ialluis\n dsb sy\n isb");
    status = on();
    u64 r[4] = {0, 0, 0, 0};
    if (status != ABI_OK) {
        call_firmware(CALL_PROTECT_STATUS, 0, 0, 0, r);
        *at = before;
        out->seen = readable ? "fault" : r[1] == 2 ? "refused, state tampered" : "refused";
        out->value = (u64)status;
        return false;
    }
    out->seen = "EL2 runs with it";
    return true;
}

static bool tamper_code(struct outcome *out, bool twin) {
    u64 r[4] = {0, 0, 0, 0};
    if (!tamper(out, EL2_VERSION_CALL, 0xd65f03c0, twin)) /* ret: VERSION does nothing any more */
        return false;
    s64 status = call_monitor(CALL_VERSION, 0, 0, 0, r);
    out->value = (u64)status; /* NOT_SUPPORTED: our instruction ran in EL2 */
    return status == (twin ? ABI_OK : ABI_NOT_SUPPORTED);
}

static bool tamper_entry(struct outcome *out, bool twin) { return tamper(out, EL2_BASE + 60, 0xd503201f, twin); }
static bool tamper_vectors(struct outcome *out, bool twin) { return tamper(out, EL2_VECTORS + 2048 - 4, 1, twin); }
static bool tamper_constants(struct outcome *out, bool twin) { return tamper(out, EL2_RODATA_END - 4, 1, twin); }
static bool tamper_last(struct outcome *out, bool twin) { return tamper(out, EL2_RODATA_END - 8, 1, twin); }

/* What is not measured because it is built anew: tables and states. */
static bool forged_tables(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    off();
    /* Map the monitor's own block into stage 2, as the missing entry would be if we were right about it. */
    u64 entry = EL2_MONITOR + offsetof(struct monitor, stage2.dram) + (EL2_BASE - DRAM_BASE) / BLOCK_SIZE * 8;
    u64 esr = guarded(store, entry, EL2_BASE | 0x7fd, &value);
    s64 status = on();
    if (esr == 0)
        esr = guarded(load, EL2_BASE, 0, &value);
    return faulted(out, esr, status == ABI_OK ? value : (u64)status, "EL2's code");
}

static bool forged_states(struct outcome *out, bool twin) {
    u64 r[4], value = 0;
    (void)twin;
    off();
    u64 esr = guarded(store, EL2_MONITOR + offsetof(struct monitor, flex), 77, &value);
    if (on() != ABI_OK || esr) {
        out->seen = esr ? "could not write" : "stayed off";
        return false;
    }
    call_monitor(CALL_STATS, 0, 0, 0, r);
    out->seen = r[0] == 77 ? "our count" : "built anew";
    out->value = r[0];
    return r[0] == 77;
}

/* While it is off, EL2 must not be enterable. */
static u64 hvc(u64 a, u64 b) {
    (void)b;
    u64 r[4];
    return (u64)call_monitor(a, 0, 0, 0, r);
}

static bool hvc_while_off(struct outcome *out, bool twin) {
    u64 value = 0;
    if (!twin)
        off();
    u64 esr = guarded(hvc, CALL_VERSION, 0, &value);
    on();
    return faulted(out, esr, value, "EL2 answered");
}

/* A busy second CPU, which masks interrupts, keeps reading through the switch: its stage 2 is on again too. */
static u32 stop_waiting;
static u64 wait_and_read(u64 address, u64 unused) {
    (void)unused;
    u64 value = *(volatile u64 *)address;
    while (!__atomic_load_n(&stop_waiting, __ATOMIC_ACQUIRE))
        pause();
    return value + *(volatile u64 *)address;
}

static bool on_reaches_all(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    start_second_cpu();
    off();
    stop_waiting = 0;
    second_begin(wait_and_read, VICTIM, 0);
    for (u32 i = 0; i < 100000; i++)
        pause();
    on();
    give(VICTIM, 1);
    __atomic_store_n(&stop_waiting, 1, __ATOMIC_RELEASE);
    u64 esr = second_end(&value);
    return faulted(out, esr, value, "the canary");
}

/* Off and on again and again, with Flex-Mem in between, while the other CPU reads, and is in EL2 as often as it can be. */
static u32 stop_storm;
static u64 storm_seen, storm_reads, storm_turns;
static u64 read_and_call(u64 address, u64 unused) {
    u64 value;
    (void)unused;
    while (!__atomic_load_n(&stop_storm, __ATOMIC_ACQUIRE)) {
        value = 0;
        storm_reads += guarded(load, address, 0, &value) == 0;
        storm_seen |= value == CANARY;
        __atomic_fetch_add(&storm_turns, 1, __ATOMIC_RELEASE);
        guarded(hvc, CALL_VERSION, 0, &value); /* undefined while it is off */
    }
    return 0;
}

static bool switch_storm(struct outcome *out, bool twin) {
    u64 value, taken, switched = 0;
    s64 status = ABI_OK;
    (void)twin;
    stop_storm = 0;
    storm_seen = storm_reads = storm_turns = 0;
    second_begin(read_and_call, VICTIM, 0);
    u64 until = read_reg(cntpct_el0) + 3 * read_reg(cntfrq_el0); /* a busy host is slow */
    while (status == ABI_OK && switched < 100 && (switched < 3 || read_reg(cntpct_el0) < until)) {
        while ((status = off()) == ABI_BUSY) /* the other CPU was in EL2 */
            ;
        if (status == ABI_OK)
            status = on();
        switched += status == ABI_OK;
        give(VICTIM, 1);
        /* Long enough for a whole read of the other CPU, also where it runs only now and then. */
        u64 turns = __atomic_load_n(&storm_turns, __ATOMIC_ACQUIRE) + 2;
        while (__atomic_load_n(&storm_turns, __ATOMIC_ACQUIRE) < turns && read_reg(cntpct_el0) < until)
            pause();
        reclaim(1, ABI_MODE_SYNC, &taken);
    }
    __atomic_store_n(&stop_storm, 1, __ATOMIC_RELEASE);
    second_end(&value);
    out->seen = storm_seen ? "the canary" : status != ABI_OK || !storm_reads ? "it got stuck" : "zeros and faults";
    out->value = switched;
    return storm_seen || status != ABI_OK || !storm_reads;
}

const struct attack protect_attacks[] = {
    {"switch-storm", switch_storm},
    {"off-with-flex", off_with_flex}, {"tamper-code", tamper_code}, {"tamper-entry", tamper_entry},
    {"tamper-vectors", tamper_vectors}, {"tamper-constants", tamper_constants}, {"tamper-last-word", tamper_last},
    {"forged-tables", forged_tables}, {"forged-states", forged_states}, {"hvc-while-off", hvc_while_off},
    {"on-reaches-all-cpus", on_reaches_all}, {NULL, NULL},
};
