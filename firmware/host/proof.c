/* What Frama-C's Eva proves (tests/monitor/test_proof.py): whatever a call's arguments, its list and the page states are,
 * the code that decides about them stays inside its arrays. For the machine's real number of pages.
 *
 * Eva knows one CPU and no assembler, and forgets which items were checked: the phases after CHECK are not part of it. */
#define __atomic_load_n(at, order) (*(at))
#define __atomic_store_n(at, value, order) (*(at) = (value))
#define __atomic_thread_fence(order) ((void)0)
#define __atomic_compare_exchange_n(at, old, new, weak, order, other) (*(at) == *(old) ? (*(at) = (new), true) : false)
#define __builtin_expect(what, usual) (what)
#define __asm__(...)
#include "../el2/pages.c"

#ifndef ROOM
#define ROOM ABI_MAX_BATCH
#endif

extern volatile u64 any;
void Frama_C_make_unknown(char *at, size_t bytes);
static struct monitor monitor;
static u64 list[ROOM];

/*@ requires \valid(to + (0 .. words - 1));
    assigns to[0 .. words - 1] \from from; */
void machine_copy(u64 *to, u64 from, u64 words);

void proof(void) {
    struct page_op op = {.kind = OP_DONATE, .items = list};
    Frama_C_make_unknown((char *)monitor.entry, sizeof(monitor.entry));
    Frama_C_make_unknown((char *)monitor.guarded, sizeof(monitor.guarded));
    monitor.ticket = (u32)any;
    monitor.wanted = any;
    page_state(&monitor, any);
    range_unprotected(&monitor, any, any);
    op.list = any;
    op.count = any;
    op.ticket = (u32)any;
    if (check_list(&monitor, &op) == ABI_OK)
        check_items(&monitor, &op);
}
