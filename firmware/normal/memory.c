/* Attacks by plain access: Flex-Mem, the monitor's memory, secure memory; by every view EL1 can make; with stale TLBs. */
#include "kernel.h"

#include <stddef.h>

#include "../el2/pages.h"
#include "el2_symbols.h"

static u64 add(u64 address, u64 value) {
    u64 old;
    __asm__ volatile("ldadd %2, %0, [%1]" : "=&r"(old) : "r"(address), "r"(value) : "memory");
    return old;
}

static u64 exclusive(u64 address, u64 unused) {
    u64 old;
    u32 failed;
    (void)unused;
    __asm__ volatile("ldxr %0, [%2]\n stxr %w1, %0, [%2]" : "=&r"(old), "=&r"(failed) : "r"(address) : "memory");
    return old;
}

static u64 zero_line(u64 address, u64 unused) {
    (void)unused;
    __asm__ volatile("dc zva, %0" : : "r"(address) : "memory");
    return 0;
}

static u64 pair(u64 address, u64 unused) {
    u64 a, b;
    (void)unused;
    __asm__ volatile("ldp %0, %1, [%2]" : "=r"(a), "=r"(b) : "r"(address) : "memory");
    return b;
}

static u64 vector_load(u64 address, u64 unused) {
    u64 a;
    (void)unused;
    __asm__ volatile(".arch_extension simd\n ld1 {v0.2d}, [%1]\n mov %0, v0.d[1]" : "=r"(a) : "r"(address) : "memory", "v0");
    return a;
}

static u64 run_there(u64 address, u64 unused) {
    (void)unused;
    return ((function)address)(0, 0);
}

static u64 load_without_mmu(u64 address, u64 unused) {
    u64 value, sctlr = read_reg(sctlr_el1);
    (void)unused;
    __asm__ volatile("msr sctlr_el1, %2\n isb\n ldr %0, [%1]\n msr sctlr_el1, %3\n isb"
                     : "=&r"(value)
                     : "r"(address), "r"(sctlr & ~1ul), "r"(sctlr)
                     : "memory");
    return value;
}

/* Reads that must not see the canary. */
static bool leak(struct outcome *out, u64 esr, u64 value) {
    return faulted(out, esr, value, value == CANARY ? "the canary" : "something else") && value == CANARY;
}

static bool by(struct outcome *out, function f) {
    u64 value = 0;
    give(VICTIM, 2);
    u64 esr = guarded(f, VICTIM, 0, &value);
    return leak(out, esr, value);
}

static bool flex_read(struct outcome *out, bool twin) { (void)twin; return by(out, load); }
static bool flex_exclusive(struct outcome *out, bool twin) { (void)twin; return by(out, exclusive); }
static bool flex_pair(struct outcome *out, bool twin) { (void)twin; return by(out, pair); }
static bool flex_vector(struct outcome *out, bool twin) { (void)twin; return by(out, vector_load); }

/* Writes that must not change what the trusted OS reads. */
static bool change(struct outcome *out, function f, u64 offset, u64 operand) {
    u64 value = 0;
    give(VICTIM, 1);
    u64 before = checksum(), esr = guarded(f, VICTIM + offset, operand, &value), after = checksum();
    faulted(out, esr, after - before, before == after ? "no change" : "the secure world reads other data");
    return before != after;
}

static bool flex_write(struct outcome *out, bool twin) { (void)twin; return change(out, store, 8, 1); }
static bool flex_atomic(struct outcome *out, bool twin) { (void)twin; return change(out, add, 16, 1); }
static bool flex_zero(struct outcome *out, bool twin) { (void)twin; return change(out, zero_line, 0, 0); }

static bool flex_unaligned(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    store(VICTIM, 0);
    give(VICTIM + PAGE_SIZE, 1);
    u64 esr = guarded(load, VICTIM + PAGE_SIZE - 4, 0, &value);
    return faulted(out, esr, value, "half of the canary") && value >> 32 == (CANARY & 0xffffffff);
}

static bool flex_exec(struct outcome *out, bool twin) {
    u64 value = 0, r[4];
    (void)twin;
    give(VICTIM, 1);
    service(SVC_FILL, 0xd65f03c0d2800540ul, 0, r); /* mov x0, #42; ret */
    __asm__ volatile("ic ialluis\n dsb sy\n isb");
    u64 esr = guarded(run_there, VICTIM, 0, &value);
    return faulted(out, esr, value, "it ran") && value == 42;
}

static bool flex_second_cpu(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 esr = on_second(load, VICTIM, 0, &value);
    return leak(out, esr, value);
}

static bool alias(struct outcome *out, u64 bits, bool block) {
    u64 value = 0;
    give(VICTIM, 1);
    alias_map(VICTIM, bits, block);
    u64 esr = guarded(load, ALIAS, 0, &value);
    return leak(out, esr, value);
}

#define UNCACHED ((3ul << 2) | (3ul << 8) | (1ul << 10))
static bool alias_page(struct outcome *out, bool twin) { (void)twin; return alias(out, S1_NORMAL, false); }
static bool alias_block(struct outcome *out, bool twin) { (void)twin; return alias(out, S1_NORMAL, true); }
static bool alias_uncached(struct outcome *out, bool twin) { (void)twin; return alias(out, UNCACHED, false); }
static bool alias_device(struct outcome *out, bool twin) { (void)twin; return alias(out, S1_DEVICE, false); }

static bool mmu_off(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 esr = guarded(load_without_mmu, VICTIM, 0, &value);
    write_reg(sctlr_el1, SCTLR_EL1_RES1 | SCTLR_MMU);
    isb();
    return leak(out, esr, value);
}

/* The walker as a copy engine: a table that lies in Flex-Mem, whose entries are secret. */
static bool walk_table(struct outcome *out, bool twin) {
    u64 value = 0, r[4];
    (void)twin;
    store(TWIN, CANARY);
    give(VICTIM, 1);
    service(SVC_FILL, TWIN | S1_NORMAL | S1_PAGE, 0, r);
    alias_table(VICTIM);
    u64 esr = guarded(load, ALIAS, 0, &value);
    return leak(out, esr, value);
}

/* On the second CPU: QEMU forgets this one's translations itself when it switches worlds. */
static bool cached_before(struct outcome *out, u64 address, u64 given, bool block) {
    u64 value = 0;
    store(address, 0);
    on_second(load, address, 0, &value);
    if (block)
        give_block(given);
    else
        give(given, 1);
    u64 esr = on_second(load, address, 0, &value);
    return leak(out, esr, value);
}

static bool tlb_other(struct outcome *out, bool twin) { (void)twin; return cached_before(out, VICTIM, VICTIM, false); }
static bool tlb_block(struct outcome *out, bool twin) {
    (void)twin;
    return cached_before(out, VICTIM2 + 5 * PAGE_SIZE, VICTIM2, true);
}

static u64 harmless(u64 a, u64 b) { return a + b; }

/* The monitor's own memory. */
static bool reach(struct outcome *out, function f, u64 address, u64 twin_address, bool twin, const char *otherwise) {
    u64 value = 0;
    return faulted(out, guarded(f, twin ? twin_address : address, 0, &value), value, otherwise);
}

static bool el2_read(struct outcome *out, bool twin) { return reach(out, load, EL2_BASE, TWIN, twin, "EL2's code"); }
static bool el2_write(struct outcome *out, bool twin) { return reach(out, store, MAILBOX_BASE, TWIN, twin, "written"); }
static bool el2_exec(struct outcome *out, bool twin) { return reach(out, run_there, EL2_MACHINE_FLUSH, (u64)harmless, twin, "it ran"); }

#define TABLE_ENTRY(page) \
    (EL2_MONITOR + offsetof(struct monitor, stage2.pages) + ((page) - DRAM_BASE) / PAGE_SIZE * sizeof(u64))

static bool el2_tables(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 esr = guarded(store, TABLE_ENTRY(VICTIM), VICTIM | 0x7ff, &value);
    if (esr == 0)
        esr = guarded(load, VICTIM, 0, &value);
    return leak(out, esr, value);
}

/* What the machine itself keeps secure. The twin is the same access to memory of our own. */
static bool el3_read(struct outcome *out, bool twin) { return reach(out, load, EL3_BASE, TWIN, twin, "read"); }
static bool el3_write(struct outcome *out, bool twin) { return reach(out, store, EL3_BASE + 0x80000, TWIN, twin, "written"); }
static bool el3_exec(struct outcome *out, bool twin) { return reach(out, run_there, EL3_BASE, (u64)harmless, twin, "it ran"); }
static bool sel1_read(struct outcome *out, bool twin) { return reach(out, load, SEL1_BASE, TWIN, twin, "read"); }
static bool sel1_atomic(struct outcome *out, bool twin) { return reach(out, add, SEL1_BASE, TWIN, twin, "changed"); }
static bool flash_read(struct outcome *out, bool twin) { return reach(out, load, FLASH_BASE, TWIN, twin, "read"); }
static bool secure_uart(struct outcome *out, bool twin) {
    return reach(out, load, SECURE_UART + 0x18, UART_BASE + 0x18, twin, "its flags");
}
static bool secure_gpio(struct outcome *out, bool twin) {
    return reach(out, load, SECURE_GPIO, UART_BASE + 0x18, twin, "read");
}

static bool memory_race(struct outcome *out, bool twin);

const struct attack memory_attacks[] = {
    {"flex-read", flex_read}, {"flex-write", flex_write}, {"flex-exec", flex_exec}, {"flex-atomic", flex_atomic},
    {"flex-exclusive", flex_exclusive}, {"flex-zero", flex_zero}, {"flex-pair", flex_pair}, {"flex-vector", flex_vector},
    {"flex-unaligned", flex_unaligned}, {"flex-second-cpu", flex_second_cpu}, {"alias-page", alias_page},
    {"alias-block", alias_block}, {"alias-uncached", alias_uncached}, {"alias-device", alias_device}, {"mmu-off", mmu_off},
    {"walk-table", walk_table}, {"tlb-other-cpu", tlb_other}, {"tlb-block", tlb_block},
    {"race-access", memory_race}, {"el2-read", el2_read}, {"el2-write", el2_write}, {"el2-exec", el2_exec},
    {"el2-tables", el2_tables}, {"el3-read", el3_read}, {"el3-write", el3_write}, {"el3-exec", el3_exec},
    {"sel1-read", sel1_read}, {"sel1-atomic", sel1_atomic}, {"flash-read", flash_read}, {"secure-uart", secure_uart},
    {"secure-gpio", secure_gpio}, {NULL, NULL},
};

/* One CPU reads without pause while the other gives, has filled and takes back. */
static u32 stop_reading;
static u64 race_seen;

static u64 read_until_canary(u64 address, u64 unused) {
    (void)unused;
    while (!__atomic_load_n(&stop_reading, __ATOMIC_ACQUIRE)) {
        u64 now = 0;
        __asm__ volatile("ldr %0, [%1]" : "=r"(now) : "r"(address) : "memory");
        if (now == CANARY)
            race_seen = now;
    }
    return 0;
}

static u64 keep_reading(u64 address, u64 unused) {
    u64 value;
    (void)unused;
    while (!__atomic_load_n(&stop_reading, __ATOMIC_ACQUIRE))
        guarded(read_until_canary, address, 0, &value); /* a fault ends the inner loop only */
    return 0;
}

static bool memory_race(struct outcome *out, bool twin) {
    u64 value, taken;
    (void)twin;
    stop_reading = 0;
    race_seen = 0;
    second_begin(keep_reading, VICTIM, 0);
    for (u32 i = 0; i < 200; i++) {
        give(VICTIM, 1);
        reclaim(1, i % 2 ? ABI_MODE_SYNC : ABI_MODE_ASYNC, &taken);
        work();
    }
    __atomic_store_n(&stop_reading, 1, __ATOMIC_RELEASE);
    second_end(&value);
    out->seen = race_seen ? "the canary" : "zeros and faults";
    out->value = race_seen;
    return race_seen;
}
