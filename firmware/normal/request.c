/* Attacks on the idle window and on the request page: all a kernel can say to EL3 while protection is off. */
#include "kernel.h"

#include "../el2/pages.h"
#include "el2_symbols.h"

#define PATIENCE_S 60 /* a busy host is slow */
#define STORM_S 3
#define ANSWERS_MOST (STORM_S * 20 * 2) /* as many as EL3 gives, twice */

static volatile u64 *const page = (volatile u64 *)REQUEST_PAGE;

static u64 ticks(u64 milliseconds) { return read_reg(cntfrq_el0) / 1000 * milliseconds; }

static u64 state(void) {
    u64 r[4] = {0, ~0ul, 0, 0};
    call_firmware(CALL_PROTECT_STATUS, 0, 0, 0, r);
    return r[1];
}

static void off(void) {
    while (call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL) == ABI_BUSY) /* the other CPU was in EL2 */
        pause();
}

/* Whether there was an answer. */
static bool ask(void) {
    const u64 until = read_reg(cntpct_el0) + ticks(1000 * PATIENCE_S);
    page[REQ_REQUEST] = ABI_REQUEST_ON;
    while (page[REQ_REQUEST] == ABI_REQUEST_ON && state() != 1)
        if (read_reg(cntpct_el0) > until)
            return false;
    return true;
}

/* The idle window runs out while there is Flex-Mem. */
static bool idle_with_flex(struct outcome *out, bool twin) {
    u64 value = 0, esr;
    (void)twin;
    give(VICTIM, 1);
    call_monitor(CALL_IDLE_WINDOW, ticks(20), 0, 0, NULL);
    const u64 until = read_reg(cntpct_el0) + ticks(2000);
    while ((esr = guarded(load, VICTIM, 0, &value)) && read_reg(cntpct_el0) < until)
        for (u32 i = 0; i < 100000; i++)
            pause();
    return faulted(out, esr, value, value == CANARY ? "the canary" : "something else");
}

/* Between its request and the pages a secure task waits: with protection off the request would be lost. */
static bool idle_with_request(struct outcome *out, bool twin) {
    (void)twin;
    want(1);
    call_monitor(CALL_IDLE_WINDOW, ticks(20), 0, 0, NULL);
    const u64 until = read_reg(cntpct_el0) + ticks(2000);
    while (page[REQ_STATE] == 1 && read_reg(cntpct_el0) < until)
        pause();
    out->value = page[REQ_STATE];
    out->seen = out->value == 1 ? "still on" : "it went off";
    return out->value != 1;
}

/* A request that says where its answer shall go: into EL2's counters, which EL2 has built by then. With the defence off
 * the word behind the others is believed; its three words of answer end with "on" in the count of FLEX pages. */
static bool request_address(struct outcome *out, bool twin) {
    u64 r[4] = {0, 0, 0, 0};
    volatile u64 *const target = (volatile u64 *)EL2_MONITOR;
    (void)twin;
    _Static_assert(offsetof(struct monitor, flex) == REQ_STATE * sizeof(u64), "the answer's third word");
    off();
    for (u64 i = REQ_STATE + 1; i < PAGE_SIZE / sizeof(u64); i++)
        page[i] = EL2_MONITOR;
    target[REQ_REQUEST] = ABI_REQUEST_ON;
    const bool answered = ask();
    for (u64 i = REQ_STATE + 1; i < PAGE_SIZE / sizeof(u64); i++)
        page[i] = 0;
    if (!answered) {
        out->seen = "no answer";
        return true;
    }
    call_monitor(CALL_STATS, 0, 0, 0, r);
    out->value = r[0];
    out->seen = r[0] ? "EL3 wrote to EL2's memory" : "the counters are EL2's";
    return r[0] != 0;
}

/* The page itself as Flex-Mem: EL3 would write into the trusted OS's data, and read it. */
static bool request_donated(struct outcome *out, bool twin) {
    u64 r[4], ticket = want(1);
    (void)twin;
    put_item(0, REQUEST_PAGE);
    s64 status = donate(ticket, 1, r);
    out->seen = status == ABI_OK ? "donated" : "refused";
    out->value = (u64)status;
    return status == ABI_OK;
}

/* EL2 changed while it is off, and nothing but the page to turn it on. */
static bool request_tampered(struct outcome *out, bool twin) {
    u64 r[4] = {0, 0, 0, 0};
    volatile u32 *const at = (volatile u32 *)EL2_VERSION_CALL;
    (void)twin;
    off();
    const u32 before = *at;
    *at = 0xd65f03c0; /* ret: VERSION does nothing any more */
    __asm__ volatile("dsb sy\n ic ialluis\n dsb sy\n isb");
    const bool answered = ask();
    if (answered && page[REQ_ANSWER] == ABI_OK) {
        out->value = (u64)call_monitor(CALL_VERSION, 0, 0, 0, r);
        out->seen = "EL2 runs with it";
        return out->value == (u64)ABI_NOT_SUPPORTED;
    }
    out->value = page[REQ_ANSWER];
    out->seen = !answered ? "no answer" : state() == 2 && page[REQ_STATE] == 2 ? "refused, state tampered" : "refused";
    *at = before;
    __asm__ volatile("dsb sy\n ic ialluis\n dsb sy\n isb");
    return !answered;
}

/* Each answer costs a measurement of EL2 on all CPUs. Requests that can only be refused, as fast as they go. */
static bool request_storm(struct outcome *out, bool twin) {
    volatile u32 *const at = (volatile u32 *)(EL2_RODATA_END - 4);
    u64 answers = 0;
    (void)twin;
    off();
    *at ^= 1;
    page[REQ_REQUEST] = ABI_REQUEST_ON;
    for (u64 until = read_reg(cntpct_el0) + ticks(1000 * STORM_S); read_reg(cntpct_el0) < until;)
        if (page[REQ_REQUEST] == 0) {
            answers++;
            page[REQ_REQUEST] = ABI_REQUEST_ON;
        }
    const u64 seen = state();
    *at ^= 1;
    out->value = answers;
    out->seen = seen != 2 ? "not refused" : answers == 0 ? "no answer" : answers > ANSWERS_MOST ? "as often as it asked" : "now and then";
    return seen != 2 || answers == 0 || answers > ANSWERS_MOST;
}

/* Any other words, on both CPUs, while one asks again and again: they change nothing but whether protection is on. */
static u32 stop_writing;
static u64 write_anything(u64 unused, u64 also_unused) {
    u64 random = 88172645463325252ul;
    (void)unused;
    (void)also_unused;
    while (!__atomic_load_n(&stop_writing, __ATOMIC_ACQUIRE)) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        page[random % 8] = random & 1 << 20 ? ABI_REQUEST_ON : random & 1 << 21 ? EL2_BASE + random % EL2_SIZE : random;
    }
    return 0;
}

static bool request_words(struct outcome *out, bool twin) {
    u64 value, taken, switched = 0, r[4];
    s64 status = ABI_OK;
    (void)twin;
    stop_writing = 0;
    second_begin(write_anything, 0, 0);
    out->seen = NULL;
    for (u64 until = read_reg(cntpct_el0) + ticks(1000 * STORM_S); read_reg(cntpct_el0) < until || switched < 3; switched++) {
        const u64 patience = read_reg(cntpct_el0) + ticks(1000 * PATIENCE_S);
        off();
        while (state() != 1 && read_reg(cntpct_el0) < patience)
            pause();
        if (state() != 1)
            break;
        call_monitor(CALL_STATS, 0, 0, 0, r);
        give(VICTIM, 1);
        if (r[0] || r[1] || (guarded(load, VICTIM, 0, &value) == 0 && value == CANARY))
            out->seen = r[0] || r[1] ? "pages that nobody gave" : "the canary";
        status = reclaim(1, ABI_MODE_SYNC, &taken);
        if (out->seen || status != ABI_OK || taken != 1)
            break;
    }
    __atomic_store_n(&stop_writing, 1, __ATOMIC_RELEASE);
    second_end(&value);
    out->value = switched;
    if (out->seen)
        return true;
    out->seen = state() != 1 || status != ABI_OK ? "it got stuck" : "on each time, and a fault";
    return state() != 1 || status != ABI_OK;
}

const struct attack request_attacks[] = {
    {"idle-with-flex", idle_with_flex}, {"idle-with-request", idle_with_request}, {"request-address", request_address},
    {"request-donated", request_donated}, {"request-tampered", request_tampered}, {"request-storm", request_storm},
    {"request-words", request_words}, {NULL, NULL},
};
