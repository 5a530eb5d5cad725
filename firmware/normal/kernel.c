/* Boot, exceptions, the second CPU, its own page tables, and the loop that runs attacks named on the UART. */
#include "kernel.h"

#include "../common/uart.h"
#include "../el3/psci.h"
#include "frame.h"

ALIGNED(16) u8 stacks[2][1 << 14];
u64 recovery[2];
extern u8 recover[];
static ALIGNED(4096) u64 level1[512], low[512], dram[512], alias1[512], alias2[512];

void say(const char *text) { uart_text(UART_BASE, text); }
void say_hex(u64 value) { uart_hex(UART_BASE, value); }

static void build_map(void) {
    for (u64 i = 0; i < 512; i++) {
        u64 at = i * BLOCK_SIZE;
        bool memory = at < 0x08000000 || (at >= SECURE_RAM && at < SECURE_RAM + SECURE_RAM_SIZE);
        low[i] = at | (memory ? S1_NORMAL : S1_DEVICE) | S1_BLOCK; /* nothing is forbidden on our side */
        dram[i] = (DRAM_BASE + at) | S1_NORMAL | S1_BLOCK;
    }
    level1[0] = (u64)low | S1_TABLE;
    level1[1] = (u64)dram | S1_TABLE;
    level1[ALIAS >> 30] = (u64)alias1 | S1_TABLE;
}

static void mmu_on(void) {
    write_reg(mair_el1, 0x4400ff00ul); /* and 2, 3: device, non-cacheable */
    write_reg(tcr_el1, 25ul | (1ul << 8) | (1ul << 10) | (3ul << 12) | (1ul << 23) | (2ul << 32));
    write_reg(ttbr0_el1, level1);
    dsb();
    isb();
    __asm__ volatile("tlbi vmalle1\n dsb sy\n isb");
    write_reg(sctlr_el1, SCTLR_EL1_RES1 | SCTLR_MMU);
    isb();
}

void forget(u64 address) {
    __asm__ volatile("dsb ishst\n tlbi vaae1is, %0\n dsb ish\n isb" : : "r"(address >> 12) : "memory");
}

void alias_map(u64 physical, u64 bits, bool block) {
    alias1[0] = block ? (physical & ~(BLOCK_SIZE - 1)) | bits | S1_BLOCK : (u64)alias2 | S1_TABLE;
    alias2[0] = physical | bits | S1_PAGE;
    __asm__ volatile("dsb ishst\n tlbi vmalle1is\n dsb ish\n isb" : : : "memory");
}

void alias_table(u64 physical) {
    alias1[0] = physical | S1_TABLE;
    __asm__ volatile("dsb ishst\n tlbi vmalle1is\n dsb ish\n isb" : : : "memory");
}

void alias_more(u64 index, u64 table) {
    alias1[index] = table | S1_TABLE;
    forget(ALIAS + index * BLOCK_SIZE);
}

u64 load(u64 address, u64 unused) {
    (void)unused;
    return *(volatile u64 *)address;
}

u64 store(u64 address, u64 value) {
    *(volatile u64 *)address = value;
    return value;
}

/* The second CPU serves one job at a time. */
static struct {
    function f;
    u64 a, b, esr, value;
    u32 state; /* 0 not there, 1 waiting, 2 has a job, 3 has finished it */
} job;

static u32 job_state(void) { return __atomic_load_n(&job.state, __ATOMIC_ACQUIRE); }
static void set_job(u32 state) { __atomic_store_n(&job.state, state, __ATOMIC_RELEASE); }

_Noreturn static void second_main(void) {
    set_job(1);
    for (;;) {
        while (job_state() != 2)
            pause();
        job.esr = guarded(job.f, job.a, job.b, &job.value);
        set_job(3);
    }
}

void start_second_cpu(void) {
    if (job_state())
        return;
    s64 status = call_firmware(PSCI_CPU_ON, 1, (u64)second_cpu, 0, NULL);
    if (status) {
        say("second cpu refused ");
        say_hex((u64)status);
        say("\n");
    }
    while (job_state() == 0)
        pause();
}

void second_leaves(void) { set_job(0); }

static u64 cpu_off(u64 a, u64 b) {
    (void)a;
    (void)b;
    second_leaves();
    return (u64)call_firmware(PSCI_CPU_OFF, 0, 0, 0, NULL);
}

void stop_second_cpu(void) {
    start_second_cpu();
    second_begin(cpu_off, 0, 0);
    while (call_firmware(PSCI_AFFINITY_INFO, 1, 0, 0, NULL) == 0)
        pause();
}

void second_begin(function f, u64 a, u64 b) {
    start_second_cpu();
    job.f = f;
    job.a = a;
    job.b = b;
    set_job(2);
}

u64 second_end(u64 *value) {
    while (job_state() != 3)
        pause();
    u64 esr = job.esr;
    *value = job.value;
    set_job(1);
    return esr;
}

/* The CPU was turned on: it takes a job and finishes it. */
bool second_answers(function f, u64 ticks) {
    u64 until = read_reg(cntpct_el0) + ticks, value;
    while (job_state() != 1)
        if (read_reg(cntpct_el0) > until)
            return false;
    second_begin(f, 0, 0);
    while (job_state() != 3)
        if (read_reg(cntpct_el0) > until)
            return false;
    second_end(&value);
    return true;
}

u64 on_second(function f, u64 a, u64 b, u64 *value) {
    second_begin(f, a, b);
    return second_end(value);
}

void normal_exception(struct frame *f, u64 vector) {
    u64 *saved = (u64 *)read_reg(tpidr_el1);
    if (vector == 4 && *saved) { /* ours, synchronous, and expected */
        f->x[0] = read_reg(esr_el1);
        f->elr = (u64)recover;
        f->spsr = MODE_EL1H;
        return;
    }
    say("unexpected exception: vector ");
    say_hex(vector);
    say(" esr ");
    say_hex(read_reg(esr_el1));
    say(" far ");
    say_hex(read_reg(far_el1));
    say(" at ");
    say_hex(f->elr);
    say("\n");
    call_firmware(PSCI_SYSTEM_OFF, 0, 0, 0, NULL);
    for (;;)
        wfi();
}

bool faulted(struct outcome *out, u64 esr, u64 value, const char *otherwise) {
    out->seen = esr ? "fault" : otherwise;
    out->value = esr ? esr : value;
    return esr == 0;
}

static bool same(const char *a, const char *b) {
    for (; *a && *a == *b; a++, b++)
        ;
    return *a == *b;
}

static const struct attack *find(const char *id) {
    const struct attack *const tables[] = {memory_attacks, call_attacks, protect_attacks, system_attacks, debug_attacks, dma_attacks,
                                           request_attacks};
    for (u64 i = 0; i < COUNT(tables); i++)
        for (const struct attack *attack = tables[i]; attack->id; attack++)
            if (same(attack->id, id))
                return attack;
    return NULL;
}

static void read_line(char *to, u64 size) {
    u64 n = 0;
    for (char c; (c = uart_get(UART_BASE)) != '\n';)
        if (n + 1 < size)
            to[n++] = c;
    to[n] = 0;
}

static void run(const char *id, bool twin) {
    const struct attack *attack = find(id);
    struct outcome out = {"nothing", 0};
    if (!attack) {
        say("unknown attack ");
        say(id);
        say("\n");
        return;
    }
    bool achieved = attack->run(&out, twin);
    say("outcome ");
    say(id);
    say(twin ? " twin " : " real ");
    say(achieved ? "achieved " : "blocked ");
    say_hex(out.value);
    say(" ");
    say(out.seen);
    say("\n");
    clean_up();
}

static void measure(const char *id) {
    for (const struct bench *bench = benches; bench->id; bench++)
        if (same(bench->id, id)) {
            bench->run();
            say("timed ");
            say(id);
            say("\n");
            clean_up();
            return;
        }
    say("unknown measurement\n");
}

_Noreturn void normal_main(u64 cpu) {
    if (cpu == 0)
        build_map();
    mmu_on();
    if (cpu)
        second_main();
    say("attacker ready\n");
    for (;;) {
        char line[64];
        read_line(line, sizeof(line)); /* "real ID", "twin ID", "time NAME", "off" */
        if (same(line, "off"))
            call_firmware(PSCI_SYSTEM_OFF, 0, 0, 0, NULL);
        line[4] = 0;
        if (same(line, "time"))
            measure(line + 5);
        else
            run(line + 5, same(line, "twin"));
    }
}
