/* Every interleaving of the steps of operations on two CPUs over three pages, on the code the firmware runs.
 *
 * Two of the pages share a block. At every step the worst is assumed: TLBs hold all that was mapped since the last
 * flush, and the secure world writes a secret to every FLEX page. Prints each reachable state as a line that
 * tests/monitor compares with the Python model's, and stops at the first broken invariant with exit code 1. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine.h"
#include "../el2/stage2.h"

static const u64 pages[3] = {0, 1, BLOCK_PAGES};
static const struct {
    u64 count, page[2];
} lists[] = {{1, {0}}, {1, {1}}, {1, {2}}, {2, {0, 1}}, {2, {2, 0}}, {2, {1, 1}}};
#define LISTS COUNT(lists)
#define KINDS 4

/* All that differs between two reachable states. */
struct state {
    u8 entry[3], in_table[3], cached[3], secret[3], form[2], filled[2], in_dram[2], others_in_table[2], lock;
    u8 busy[2], kind[2], list[2], phase[2], next[2], merges[2];
};

static struct page_op ops[2];
static u64 items[2][2];
static struct state current;
static struct state *states;
static u64 count, capacity;
static u32 *buckets;
#define BUCKETS (1u << 22)

static u64 hash(const struct state *s) {
    u64 h = 14695981039346656037ul;
    for (u64 i = 0; i < sizeof(*s); i++)
        h = (h ^ ((const u8 *)s)[i]) * 1099511628211ul;
    return h;
}

static void fail(const char *why) {
    fprintf(stderr, "broken: %s\n", why);
    exit(1);
}

static bool walked(u32 form) { return form == FORM_TABLE || form == FORM_BROKEN; }

static void load(const struct state *s) {
    monitor.lock = s->lock;
    monitor.ticket = 1;
    monitor.wanted = 100;
    monitor.flex = monitor.claimed = 1000;
    monitor.broken = (s->form[0] == FORM_BROKEN) + (s->form[1] == FORM_BROKEN);
    for (u64 b = 0; b < 2; b++) {
        monitor.form[b] = s->form[b];
        monitor.filled[b] = s->filled[b];
        monitor.guarded[b] = 0;
        for (u64 i = 0; i < BLOCK_PAGES; i++) /* the descriptor's bits do not matter here, only that it is valid */
            monitor.stage2.pages[b][i] = s->filled[b] ? (s->others_in_table[b] || !walked(s->form[b]) ? 3 : 0) : i % 2 * 3;
        monitor.stage2.dram[b] = 0;
        if (s->in_dram[b])
            monitor.stage2.dram[b] = s->form[b] == FORM_TABLE ? (u64)(uintptr_t)monitor.stage2.pages[b] | 3 : 1;
    }
    for (u64 i = 0; i < 3; i++) {
        u64 block = pages[i] / BLOCK_PAGES;
        monitor.entry[pages[i]] = s->entry[i];
        monitor.guarded[block] += s->entry[i] != ENTRY_UNPROTECTED;
        if (s->filled[block])
            monitor.stage2.pages[block][pages[i] % BLOCK_PAGES] = s->in_table[i] || !walked(s->form[block]) ? 3 : 0;
        cached[pages[i]] = s->cached[i];
        memory[pages[i]][0] = s->secret[i];
    }
    for (u32 cpu = 0; cpu < 2; cpu++) {
        ops[cpu] = (struct page_op){.kind = s->kind[cpu], .cpu = cpu, .phase = s->phase[cpu], .next = s->next[cpu]};
        ops[cpu].merges = s->merges[cpu];
        ops[cpu].plain = true;
        ops[cpu].count = lists[s->list[cpu]].count;
        ops[cpu].items = items[cpu];
        ops[cpu].ticket = 1;
        ops[cpu].list = DRAM_BASE + (BLOCK_PAGES + 8 + cpu) * PAGE_SIZE;
        for (u64 i = 0; i < ops[cpu].count; i++) {
            items[cpu][i] = DRAM_BASE + pages[lists[s->list[cpu]].page[i]] * PAGE_SIZE;
            memory[BLOCK_PAGES + 8 + cpu][i] = items[cpu][i];
        }
    }
}

static void save(struct state *s, const u8 busy[2], const u8 list[2]) {
    memset(s, 0, sizeof(*s));
    s->lock = (u8)monitor.lock;
    for (u64 b = 0; b < 2; b++) {
        s->form[b] = monitor.form[b];
        s->filled[b] = monitor.filled[b];
        s->in_dram[b] = monitor.stage2.dram[b] != 0;
        /* A table nobody walks maps all of its block, or is rubbish: what is in it is no part of the state. */
        const bool table = walked(monitor.form[b]);
        if (table && !s->filled[b])
            fail("a table is walked that nobody filled");
        s->others_in_table[b] = table && monitor.stage2.pages[b][5] != 0;
        for (u64 i = 3; i < BLOCK_PAGES && s->filled[b]; i++)
            if ((monitor.stage2.pages[b][i] != 0) != (s->others_in_table[b] || !table))
                fail("pages nobody named differ");
        for (u64 i = 0; i < 3; i++)
            if (pages[i] / BLOCK_PAGES == b)
                s->in_table[i] = table && monitor.stage2.pages[b][pages[i] % BLOCK_PAGES] != 0;
    }
    u16 guarded[2] = {0, 0};
    for (u64 i = 0; i < 3; i++) {
        s->entry[i] = monitor.entry[pages[i]];
        s->cached[i] = cached[pages[i]];
        s->secret[i] = (u8)memory[pages[i]][0];
        guarded[pages[i] / BLOCK_PAGES] += s->entry[i] != ENTRY_UNPROTECTED;
    }
    if (guarded[0] != monitor.guarded[0] || guarded[1] != monitor.guarded[1])
        fail("a block's count of guarded pages is wrong");
    for (u32 cpu = 0; cpu < 2; cpu++)
        if (busy[cpu]) {
            s->busy[cpu] = 1;
            s->list[cpu] = list[cpu];
            s->kind[cpu] = (u8)ops[cpu].kind;
            s->phase[cpu] = (u8)ops[cpu].phase;
            s->next[cpu] = (u8)ops[cpu].next;
            s->merges[cpu] = ops[cpu].merges;
        }
}

/* The worst that TLBs and the secure world can do at this moment, and what must hold nevertheless. */
static void worst(void) {
    for (u64 i = 0; i < 3; i++) {
        u64 page = pages[i];
        cached[page] |= stage2_walk(&monitor.stage2, DRAM_BASE + page * PAGE_SIZE) != 0;
        if (monitor.entry[page] == ENTRY_FLEX)
            memory[page][0] = 1;
        if (cached[page] && memory[page][0])
            fail("the normal world can read a secret");
        if (cached[page] && monitor.entry[page] != ENTRY_UNPROTECTED && monitor.entry[page] != ENTRY_DONATING)
            fail("the normal world reaches a page that is not UNPROTECTED");
    }
}

static void add(const struct state *s) {
    u32 *bucket = &buckets[hash(s) % BUCKETS];
    while (*bucket) {
        if (memcmp(&states[*bucket - 1], s, sizeof(*s)) == 0)
            return;
        if (++bucket == buckets + BUCKETS)
            bucket = buckets;
    }
    if (count == capacity) {
        capacity = capacity ? capacity * 2 : 1 << 16;
        states = realloc(states, capacity * sizeof(*states));
        if (!states || capacity > BUCKETS / 2)
            fail("too many states for this program");
    }
    states[count++] = *s;
    *bucket = (u32)count;
}

static void try(u32 cpu, int kind, u8 list) {
    struct state next;
    u8 busy[2] = {current.busy[0], current.busy[1]}, chosen[2] = {current.list[0], current.list[1]};
    if (!busy[cpu]) {
        struct state begun = current;
        begun.kind[cpu] = (u8)kind;
        begun.list[cpu] = chosen[cpu] = list;
        begun.phase[cpu] = begun.next[cpu] = begun.merges[cpu] = 0;
        load(&begun);
    } else {
        load(&current);
    }
    enum op_result result = op_step(&monitor, &ops[cpu]);
    if (result == OP_WAIT)
        return;
    busy[cpu] = result == OP_MORE;
    worst();
    save(&next, busy, chosen);
    add(&next);
}

int main(void) {
    pages_init(&monitor);
    buckets = calloc(BUCKETS, sizeof(*buckets));
    memset(cached, 1, sizeof(cached));
    u8 none[2] = {0, 0};
    worst();
    save(&current, none, none);
    add(&current);
    u64 transitions = 0, quiet = 0;
    for (u64 at = 0; at < count; at++) {
        current = states[at];
        quiet += !current.busy[0] && !current.busy[1];
        for (u32 cpu = 0; cpu < 2; cpu++)
            for (int kind = 0; kind < (current.busy[cpu] ? 1 : KINDS); kind++)
                for (u8 list = 0; list < (current.busy[cpu] ? 1 : LISTS); list++, transitions++)
                    try(cpu, kind, list);
    }
    for (u64 at = 0; at < count; at++) {
        const struct state *s = &states[at];
        for (u64 i = 0; i < 3; i++)
            printf("%d%d%d", s->entry[i], s->cached[i], s->secret[i]);
        printf(" %d%d %d", s->form[0], s->form[1], s->lock);
        for (u32 cpu = 0; cpu < 2; cpu++)
            if (s->busy[cpu])
                printf(" %d.%d.%d.%d.%d", s->kind[cpu], s->list[cpu], s->phase[cpu], s->next[cpu], s->merges[cpu]);
            else
                printf(" -");
        puts("");
    }
    fprintf(stderr, "%lu states, %lu of them quiet, %lu transitions\n", count, quiet, transitions);
    return 0;
}
