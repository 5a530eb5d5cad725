/* Attacks through the monitor's calls: donations that must be refused, calls of others, lists that change, residue. */
#include "kernel.h"

static bool accepted(struct outcome *out, s64 status) {
    out->seen = status == ABI_OK ? "accepted" : "refused";
    out->value = (u64)status;
    return status == ABI_OK;
}

/* Give one item that is not ours to give. */
static bool give_item(struct outcome *out, u64 item) {
    u64 r[4], ticket = want(BLOCK_PAGES);
    put_item(0, item);
    return accepted(out, donate(ticket, 1, r));
}

static bool donate_el2(struct outcome *out, bool twin) { return give_item(out, twin ? VICTIM : EL2_BASE); }
static bool donate_secure(struct outcome *out, bool twin) { return give_item(out, twin ? VICTIM : SEL1_BASE); }
static bool donate_device(struct outcome *out, bool twin) { return give_item(out, twin ? VICTIM : UART_BASE); }
static bool donate_beyond(struct outcome *out, bool twin) { return give_item(out, twin ? VICTIM : 1ul << 39); }
static bool donate_block_end(struct outcome *out, bool twin) {
    return give_item(out, (twin ? VICTIM : EL2_BASE) | ABI_ITEM_BLOCK);
}

static bool donate_list(struct outcome *out, const u64 *items, u64 count) {
    u64 r[4], ticket = want(2 * BLOCK_PAGES);
    for (u64 i = 0; i < count; i++)
        put_item(i, items[i]);
    return accepted(out, donate(ticket, count, r));
}

static bool donate_twice(struct outcome *out, bool twin) {
    give(VICTIM, 1);
    return donate_list(out, (const u64[]){twin ? VICTIM + PAGE_SIZE : VICTIM}, 1);
}

static bool donate_duplicate(struct outcome *out, bool twin) {
    return donate_list(out, (const u64[]){VICTIM, twin ? VICTIM + PAGE_SIZE : VICTIM}, 2);
}

static bool donate_overlap(struct outcome *out, bool twin) {
    return donate_list(out, (const u64[]){VICTIM | ABI_ITEM_BLOCK, twin ? VICTIM2 : VICTIM + 7 * PAGE_SIZE}, 2);
}

static bool donate_claimed(struct outcome *out, bool twin) {
    u64 taken;
    give(VICTIM, 1);
    reclaim(1, ABI_MODE_ASYNC, &taken);
    return donate_list(out, (const u64[]){twin ? VICTIM + PAGE_SIZE : VICTIM}, 1);
}

static bool donate_unasked(struct outcome *out, bool twin) {
    u64 r[4], ticket = want(1);
    put_item(0, VICTIM);
    donate(ticket, 1, r); /* the request is served */
    if (twin)
        ticket = want(1);
    put_item(0, VICTIM + PAGE_SIZE);
    return accepted(out, donate(ticket, 1, r));
}

static bool donate_replay(struct outcome *out, bool twin) {
    u64 r[4], old = want(1), now = want(1);
    put_item(0, VICTIM);
    return accepted(out, donate(twin ? now : old, 1, r));
}

static bool donate_more(struct outcome *out, bool twin) {
    u64 r[4], ticket = want(1);
    put_item(0, VICTIM);
    put_item(1, VICTIM + PAGE_SIZE);
    return accepted(out, donate(ticket, twin ? 1 : 2, r));
}

static bool donate_from(struct outcome *out, u64 list) {
    u64 r[4], ticket = want(1);
    return accepted(out, finished(call_monitor(CALL_DONATE, list, 1, ticket, r), r));
}

/* The list lies in Flex-Mem: whether it is accepted says what is in it. */
static bool list_in_flex(struct outcome *out, bool twin) {
    u64 r[4];
    give(VICTIM, 1);
    service(SVC_FILL, VICTIM + PAGE_SIZE, 0, r);
    put_item(0, VICTIM + PAGE_SIZE);
    return donate_from(out, twin ? LISTS : VICTIM + 8);
}

/* In the monitor's memory: the mailbox still has the last list. */
static bool list_in_el2(struct outcome *out, bool twin) {
    u64 taken;
    give(VICTIM, 1);
    reclaim(1, ABI_MODE_SYNC, &taken);
    put_item(0, VICTIM);
    return donate_from(out, twin ? LISTS : MAILBOX_BASE);
}

/* Every malformed call there is, and the well-formed one beside it. */
static bool malformed(struct outcome *out, bool twin) {
    u64 r[4], ticket = want(1), bad = 0;
    put_item(0, VICTIM);
    if (twin)
        return accepted(out, donate(ticket, 1, r));
    const struct {
        u64 id, a, b, c;
    } calls[] = {
        {CALL_DONATE, LISTS, 0, ticket}, {CALL_DONATE, LISTS, ABI_MAX_BATCH + 1, ticket}, {CALL_DONATE, LISTS, ~0ul, ticket},
        {CALL_DONATE, LISTS, 1ul << 61, ticket}, {CALL_DONATE, LISTS + 4, 1, ticket}, {CALL_DONATE, 0, 1, ticket},
        {CALL_DONATE, ~7ul, 1, ticket}, {CALL_DONATE, DRAM_END - 8, 2, ticket}, {CALL_DONATE, LISTS, 1, ticket + (1ul << 32)},
        {CALL_DONATE, SEL1_BASE, 1, ticket}, {CALL_RECLAIM, 0, 0, 0}, {CALL_RECLAIM, 1, 2, 0}, {CALL_RECLAIM, 1, ~0ul, 0},
        {CALL_RUN, 0, 0, 0}, {CALL_QUERY, VICTIM + 1, 0, 0}, {CALL_QUERY, EL2_BASE, 0, 0}, {CALL_QUERY, ~0ul << 12, 0, 0},
        {CALL_RESUME, 0, 0, 0}, {CALL_SECURE_CALL, ~0ul, 0, 0}, {0, 0, 0, 0}, {~0ul, 0, 0, 0}, {CALL_VERSION | 1ul << 32, 0, 0, 0},
        {INT_WORLD_ENTER, 0, 0, 0}, {INT_EL2_FREEZE, 0, 0, 0}, {INT_SEL1_DONE, 0, 0, 0},
    };
    for (u64 i = 0; i < COUNT(calls); i++)
        bad += call_monitor(calls[i].id, calls[i].a, calls[i].b, calls[i].c, r) >= 0;
    /* items */
    const u64 items[] = {VICTIM + 2, VICTIM + 8, VICTIM | 0x800, (VICTIM + PAGE_SIZE) | ABI_ITEM_BLOCK, ~0ul, 0, 1};
    for (u64 i = 0; i < COUNT(items); i++) {
        put_item(0, items[i]);
        bad += donate(ticket, 1, r) >= 0;
    }
    for (u64 id = CALL_IDLE_WINDOW + 1; id < CALL_IDLE_WINDOW + 64; id++)
        bad += call_monitor(id, VICTIM, 1, 1, r) != ABI_NOT_SUPPORTED;
    out->seen = bad ? "accepted" : "all refused";
    out->value = bad;
    return bad;
}

/* The internal calls by SMC. */
static bool internal_smc(struct outcome *out, bool twin) {
    const u64 ids[] = {INT_EL2_READY, INT_EL2_FREEZE, INT_WORLD_ENTER, INT_WORLD_REPLY, INT_WORLD_RESUME, INT_EL2_WINDOW, INT_SEL1_READY,
                       INT_SEL1_DONE, SCALL_ALLOC, SCALL_CLAIM, SCALL_SCRUB, SCALL_RELEASE};
    u64 r[4], served = 0;
    for (u64 i = 0; i < COUNT(ids); i++)
        served += call_firmware(twin ? CALL_PROTECT_STATUS : ids[i], 0, 0, 0, r) != ABI_NOT_SUPPORTED;
    out->seen = served ? "served" : "not supported";
    out->value = served;
    return served;
}

/* The trusted OS's calls, made by the kernel: take its page away while it works with it. */
static bool secure_call(struct outcome *out, bool twin) {
    u64 r[4], value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 before = checksum();
    call_monitor(SCALL_CLAIM, 1, 0, 0, r);
    call_monitor(SCALL_SCRUB, 1, 0, 0, r);
    call_monitor(SCALL_RELEASE, 1, 0, 0, r);
    u64 esr = guarded(store, VICTIM, 1, &value), after = checksum();
    faulted(out, esr, after - before, "the secure world works on our page");
    return before != after;
}

/* A second CPU changes the list while the monitor reads it. */
static u32 stop_changing;
static u64 change_list(u64 a, u64 b) {
    while (!__atomic_load_n(&stop_changing, __ATOMIC_ACQUIRE)) {
        put_item(0, a);
        put_item(0, b);
    }
    return 0;
}

static bool list_race(struct outcome *out, bool twin) {
    u64 r[4], value, taken, wrong = 0, accepted_calls = 0;
    (void)twin;
    stop_changing = 0;
    give(VICTIM2, 1);
    /* VICTIM is ours to give, VICTIM2 is given. Once the call is accepted, VICTIM is what must be protected. */
    second_begin(change_list, VICTIM, VICTIM2);
    u64 until = read_reg(cntpct_el0) + 3 * read_reg(cntfrq_el0);
    while (!wrong && (accepted_calls == 0 || read_reg(cntpct_el0) < until)) {
        u64 ticket = want(1);
        if (donate(ticket, 1, r) != ABI_OK)
            continue;
        accepted_calls++;
        wrong += guarded(load, VICTIM, 0, &value) == 0;
        if (!wrong)
            reclaim(1, ABI_MODE_SYNC, &taken); /* the page given last comes back first */
    }
    __atomic_store_n(&stop_changing, 1, __ATOMIC_RELEASE);
    second_end(&value);
    out->seen = wrong ? "another page than the checked one was taken" : "what was checked is protected";
    out->value = wrong ? wrong : accepted_calls;
    return wrong;
}

static bool residue(struct outcome *out, u64 mode) {
    u64 value = 0, taken;
    give(VICTIM, 4);
    reclaim(4, mode, &taken);
    u64 esr = guarded(load, VICTIM + 3 * PAGE_SIZE + 8, 0, &value);
    faulted(out, esr, value, value == CANARY ? "the canary" : "zeros");
    return esr == 0 && value != 0;
}

static bool residue_sync(struct outcome *out, bool twin) { (void)twin; return residue(out, ABI_MODE_SYNC); }
static bool residue_async(struct outcome *out, bool twin) { (void)twin; return residue(out, ABI_MODE_ASYNC); }
static bool claimed_early(struct outcome *out, bool twin) { (void)twin; return residue(out, ABI_MODE_ASYNC); }

static bool residue_block(struct outcome *out, bool twin) {
    u64 value = 0, taken, sum = 0;
    (void)twin;
    give_block(VICTIM);
    reclaim(BLOCK_PAGES, ABI_MODE_SYNC, &taken);
    u64 esr = 0;
    for (u64 at = VICTIM; at < VICTIM + BLOCK_SIZE && !esr; at += 64, sum |= value)
        esr = guarded(load, at, 0, &value);
    faulted(out, esr, sum, sum ? "the canary" : "zeros");
    return esr == 0 && sum;
}

const struct attack call_attacks[] = {
    {"donate-el2", donate_el2}, {"donate-secure", donate_secure}, {"donate-device", donate_device},
    {"donate-beyond", donate_beyond}, {"donate-block-el2", donate_block_end}, {"donate-twice", donate_twice},
    {"donate-duplicate", donate_duplicate}, {"donate-overlap", donate_overlap}, {"donate-claimed", donate_claimed},
    {"donate-unasked", donate_unasked}, {"donate-replay", donate_replay}, {"donate-more", donate_more},
    {"list-in-flex", list_in_flex}, {"list-in-el2", list_in_el2}, {"list-race", list_race}, {"malformed", malformed},
    {"internal-smc", internal_smc}, {"secure-call", secure_call}, {"residue-sync", residue_sync},
    {"residue-async", residue_async}, {"residue-block", residue_block}, {"claimed-early", claimed_early}, {NULL, NULL},
};
