#include "pages.h"

#include "defences.h"
#include "machine.h"
#include "stage2.h"

/* Phases, in the order they come in; which of them a kind has is `program`. */
enum phase { LOCK, CHECK, BREAK, MAKE_FLUSH, MAKE, MAP, MERGE, MERGE_FLUSH, MERGED, UNLOCK, ZERO, END };

static const u8 program[][9] = {
    [OP_DONATE] = {LOCK, CHECK, BREAK, MAKE_FLUSH, MAKE, UNLOCK, END},
    [OP_CLAIM] = {LOCK, CHECK, UNLOCK, END},
    [OP_SCRUB] = {LOCK, CHECK, UNLOCK, ZERO, END},
    [OP_RELEASE] = {LOCK, CHECK, MAP, MERGE, MERGE_FLUSH, MERGED, UNLOCK, END},
};

/* What CHECK moves a page from and to. */
static const u8 from_entry[] = {ENTRY_UNPROTECTED, ENTRY_FLEX, ENTRY_CLAIMED, ENTRY_SCRUBBED};
static const u8 to_entry[] = {ENTRY_DONATING, ENTRY_CLAIMED, ENTRY_SCRUBBING, ENTRY_UNPROTECTED};

static u64 page_of(u64 item) { return ((item & ~(u64)ABI_ITEM_BLOCK) - DRAM_BASE) / PAGE_SIZE; }
/* The slot of a page, in range whatever the item is. `not_plain` is 0 when the item is a page of that slot: bits below a
 * page's size come to lie above all of it. A slot without a page is in no state that an operation starts from. */
static u64 slot_of(u64 item) { return item / PAGE_SIZE % PAGE_SLOTS; }
static u64 not_plain(u64 item) {
    const u64 offset = item - DRAM_BASE;
    return (offset >> ABI_PAGE_SHIFT | offset << (64 - ABI_PAGE_SHIFT)) ^ slot_of(item);
}
_Static_assert(DRAM_BASE / PAGE_SIZE % PAGE_SLOTS == 0, "slot_of");
static u64 block_of(u64 item) { return page_of(item) / BLOCK_PAGES; }
static bool is_block(u64 item) { return item & ABI_ITEM_BLOCK; }
static u64 pages_in(u64 item) { return is_block(item) ? BLOCK_PAGES : 1; }

/* Another CPU may look at an entry while we change it. Such a look decides nothing that a later one does not correct; the
 * order that matters is made by the lock, by flushes, and by the fences of CHECK and ZERO (one per page costs too much). */
static u8 get(const struct monitor *m, u64 page) { return __atomic_load_n(&m->entry[page], __ATOMIC_RELAXED); }
static void set(struct monitor *m, u64 page, u8 entry) { __atomic_store_n(&m->entry[page], entry, __ATOMIC_RELAXED); }

/* An item that names `page`: it, or all of its block. */
static void set_item(struct monitor *m, u64 item, u64 page, u8 entry) {
    if (!is_block(item))
        set(m, page, entry);
    else
        for (u64 i = 0; i < BLOCK_PAGES; i++)
            set(m, page / BLOCK_PAGES * BLOCK_PAGES + i, entry);
}

static s64 check_entry(const struct monitor *m, u64 page, u8 from) {
    const u8 entry = get(m, page);
    return entry == ENTRY_DMA ? ABI_RANGE : entry != from && DEFENCE(D_STATE) ? ABI_STATE : ABI_OK;
}

static s64 check_item(const struct monitor *m, u64 item, u8 from) {
    u64 mask = is_block(item) ? BLOCK_SIZE - 1 : PAGE_SIZE - 1, address = item & ~(u64)ABI_ITEM_BLOCK;
    if (address & mask)
        return ABI_INVALID;
    if (address < DRAM_BASE || address >= DRAM_END)
        return DEFENCE(D_RANGE) ? ABI_RANGE : ABI_OK;
    const u64 page = (address - DRAM_BASE) / PAGE_SIZE;
    s64 status = ABI_OK;
    if (!is_block(item))
        return check_entry(m, page, from);
    for (u64 i = 0; i < BLOCK_PAGES && status == ABI_OK; i++)
        status = check_entry(m, page / BLOCK_PAGES * BLOCK_PAGES + i, from);
    return status;
}

/* A page in the wrong state because the same list already named it. */
static bool named_before(const struct page_op *op, u64 index) {
    u64 first = page_of(op->items[index]), end = first + pages_in(op->items[index]);
    for (u64 i = 0; i < index; i++) {
        u64 other = page_of(op->items[i]);
        if (other < end && first < other + pages_in(op->items[i]))
            return true;
    }
    return false;
}

/* What an operation adds to a block's count of guarded pages, for each page. */
static inline int guard(u32 kind) { return kind == OP_DONATE ? 1 : kind == OP_RELEASE ? -1 : 0; }

static void move(struct monitor *m, const struct page_op *op, u64 item, bool back) {
    const u64 page = page_of(item);
    if (page >= DRAM_PAGES)
        return; /* only in a control */
    set_item(m, item, page, back ? from_entry[op->kind] : to_entry[op->kind]);
    m->guarded[page / BLOCK_PAGES] += (u16)((back ? -guard(op->kind) : guard(op->kind)) * (int)pages_in(item));
}

static s64 check_list(struct monitor *m, struct page_op *op) {
    if (op->count == 0 || op->count > ABI_MAX_BATCH)
        return ABI_INVALID;
    if (op->kind != OP_DONATE)
        return ABI_OK;
    if (op->list % sizeof(u64))
        return ABI_INVALID;
    if (!range_unprotected(m, op->list, op->count * sizeof(u64)) && DEFENCE(D_LIST))
        return ABI_RANGE;
    if ((op->ticket != m->ticket || m->wanted == 0) && DEFENCE(D_TICKET))
        return ABI_TICKET;
    return ABI_OK;
}

/* Keeps the compiler from adding an array's offset anew for each page of a list. */
#define IN_REGISTER(pointer) __asm__("" : "+r"(pointer))

/* Single pages in the state they should be in, from the list's start: how many there are. Most lists are nothing else. */
static inline __attribute__((always_inline)) u64 move_plain(struct monitor *m, const u64 *items, u64 count, u32 kind) {
    const u64 from = from_entry[kind];
    u8 *entry = m->entry;
    u16 *guarded = m->guarded;
    u64 i;
    IN_REGISTER(entry);
    IN_REGISTER(guarded);
    _Pragma("GCC unroll 4") for (i = 0; i < count; i++) {
        const u64 item = items[i], slot = slot_of(item), now = __atomic_load_n(&entry[slot], __ATOMIC_RELAXED);
        if (__builtin_expect(not_plain(item) | (now ^ from), 0))
            break;
        __atomic_store_n(&entry[slot], to_entry[kind], __ATOMIC_RELAXED);
        if (guard(kind))
            guarded[slot / BLOCK_PAGES] += (u16)guard(kind);
    }
    return i;
}

static u64 check_plain(struct monitor *m, const struct page_op *op, u64 most) {
    const u64 *const items = op->items, count = op->count < most ? op->count : most;
    return op->kind == OP_DONATE  ? move_plain(m, items, count, OP_DONATE)
           : op->kind == OP_CLAIM ? move_plain(m, items, count, OP_CLAIM)
           : op->kind == OP_SCRUB ? move_plain(m, items, count, OP_SCRUB)
                                  : move_plain(m, items, count, OP_RELEASE);
}

static s64 check_items(struct monitor *m, struct page_op *op) {
    const u64 wanted = op->kind == OP_DONATE && DEFENCE(D_WANTED) ? m->wanted : ~0ul;
    s64 status = ABI_OK;
    if (op->kind == OP_DONATE)
        machine_copy(op->items, op->list, op->count); /* once: the list can change under us */
    u64 i = check_plain(m, op, wanted), pages = i;
    op->plain = i == op->count;
    for (; i < op->count; i++) {
        const u64 item = op->items[i];
        status = check_item(m, item, from_entry[op->kind]);
        if (status == ABI_OK && pages + pages_in(item) > wanted)
            status = ABI_UNWANTED;
        if (status != ABI_OK)
            break;
        move(m, op, item, false);
        pages += pages_in(item);
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* what was written before an entry became what we saw */
    op->pages = status == ABI_OK ? pages : 0;
    if (status == ABI_OK)
        return ABI_OK;
    if (status == ABI_STATE && named_before(op, i))
        status = ABI_DUPLICATE;
    op->bad = i;
    for (i = 0; i < op->bad; i++)
        move(m, op, op->items[i], true);
    return status;
}

static void count_pages(struct monitor *m, const struct page_op *op) {
    if (op->kind == OP_DONATE) {
        m->flex += op->pages;
        m->wanted -= op->pages < m->wanted ? op->pages : m->wanted;
    } else if (op->kind == OP_CLAIM) {
        m->flex -= op->pages;
        m->claimed += op->pages;
    } else if (op->kind == OP_RELEASE) {
        m->claimed -= op->pages;
    }
}

static void flush(struct monitor *m) {
    m->flushes++;
    if (DEFENCE(D_FLUSH))
        machine_flush();
}

#ifdef CONTROLS
/* What measurements compare with: an invalidation for each page. */
static void flush_each(struct monitor *m) {
    if (!DEFENCE(M_BATCH))
        flush(m);
}

/* The item that is in the normal world's list now, as a monitor would take it that reads the list twice. */
static u64 read_again(const struct page_op *op, u64 *items, u64 i) {
    if (!DEFENCE(D_COPY) && program[op->kind][op->phase] == BREAK)
        items[i] = machine_read64(op->list + i * sizeof(u64));
    return items[i];
}
#else
static void flush_each(struct monitor *m) { (void)m; }
#define read_again(op, items, i) ((items)[i])
#endif

static void zero(struct monitor *m, u64 item) {
    for (u64 i = 0, page = page_of(item); i < pages_in(item) && DEFENCE(D_SCRUB); i++)
        machine_zero_page(DRAM_BASE + (page + i) * PAGE_SIZE);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    set_item(m, item, page_of(item), ENTRY_SCRUBBED);
}

/* The part of a phase that is about one item, a block or a page. */
static void do_item(struct monitor *m, struct page_op *op, u32 phase, u64 item) {
    const u64 page = page_of(item), block = block_of(item);
    if (page >= DRAM_PAGES)
        return; /* only in a control */
    switch (phase) {
    case BREAK:
        is_block(item) ? stage2_break_block(m, block) : stage2_break_page(m, page);
        flush_each(m);
        break;
    case MAKE:
        stage2_make(m, block);
        set_item(m, item, page, ENTRY_FLEX);
        break;
    case MAP:
        is_block(item) ? stage2_map_block(m, block) : stage2_map_page(m, page);
        flush_each(m);
        break;
    case MERGE:
        op->merges |= stage2_merge(m, block);
        break;
    case MERGED:
        if (m->form[block] == FORM_MERGING)
            stage2_merged(m, block);
        break;
    case ZERO:
        zero(m, item);
        break;
    }
}

/* Blocks that donated pages lie in: tables in place of one entry, before and after the flush. A long list has pages of
 * most blocks, so it looks at blocks; they are in this form only if the list, whose operation has the lock, names them. */
static void split_blocks(struct monitor *m, const u64 *items, u64 count, bool link) {
    const bool list_is_long = count >= DRAM_BLOCKS;
    for (u64 i = 0; i < (list_is_long ? DRAM_BLOCKS : count); i++) {
        const u64 block = list_is_long ? i : block_of(items[i]);
        if (link)
            stage2_make(m, block);
        else if (m->guarded[block] && m->form[block] == FORM_BLOCK)
            stage2_split(m, block);
    }
}

/* The same as do_item for items that are all pages, with nothing else in the loops. */
static void do_plain(struct monitor *m, struct page_op *op, u32 phase, const u64 *items, u64 count) {
    u8 *entry = m->entry;
    u64 *table = stage2_entry(m, 0);
    IN_REGISTER(entry);
    IN_REGISTER(table);
#define EACH for (u64 i = 0; i < count; i++)
    switch (phase) {
    case BREAK:
        split_blocks(m, items, count, false);
        _Pragma("GCC unroll 4") EACH table[slot_of(items[i])] = 0;
        break;
    case MAKE:
        if (m->broken)
            split_blocks(m, items, count, true);
        _Pragma("GCC unroll 4") EACH __atomic_store_n(&entry[slot_of(items[i])], ENTRY_FLEX, __ATOMIC_RELAXED);
        break;
    case MAP:
        EACH stage2_map_page(m, slot_of(items[i]));
        break;
    case MERGE:
        EACH op->merges |= stage2_merge(m, slot_of(items[i]) / BLOCK_PAGES);
        break;
    case ZERO:
        EACH machine_zero_page(items[i]);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        EACH set(m, slot_of(items[i]), ENTRY_SCRUBBED);
        break;
    default:
        EACH do_item(m, op, phase, items[i]);
    }
#undef EACH
}

static void do_items(struct monitor *m, struct page_op *op, u64 end) {
    const u32 phase = program[op->kind][op->phase];
    if (op->plain && DEFENCE(~0ul))
        do_plain(m, op, phase, op->items + op->next, end - op->next);
    else
        for (u64 i = op->next; i < end; i++)
            do_item(m, op, phase, read_again(op, op->items, i));
}

static bool take_lock(struct monitor *m, u32 cpu) {
    u32 nobody = 0;
    return __atomic_compare_exchange_n(&m->lock, &nobody, cpu + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static void drop_lock(struct monitor *m) { __atomic_store_n(&m->lock, 0, __ATOMIC_RELEASE); }

/* One step: of a phase about items at most so many of them. */
static enum op_result advance(struct monitor *m, struct page_op *op, u64 most) {
    switch (program[op->kind][op->phase]) {
    case LOCK:
        if (!take_lock(m, op->cpu))
            return OP_WAIT;
        break;
    case CHECK:
        op->status = check_list(m, op);
        if (op->status == ABI_OK)
            op->status = check_items(m, op);
        if (op->status != ABI_OK) {
            drop_lock(m);
            return OP_DONE;
        }
        count_pages(m, op);
        break;
    case MAKE_FLUSH:
        flush(m);
        break;
    case MERGE_FLUSH:
        if (op->merges)
            flush(m);
        break;
    case UNLOCK:
        drop_lock(m);
        break;
    case END:
        return OP_DONE;
    default:
        {
            u64 end = most < op->count - op->next ? op->next + most : op->count;
            if (program[op->kind][op->phase] != MERGED || op->merges)
                do_items(m, op, end);
            op->next = end;
        }
        if (op->next < op->count)
            return OP_MORE;
        op->next = 0;
    }
    op->phase++;
    return program[op->kind][op->phase] == END ? OP_DONE : OP_MORE;
}

enum op_result op_step(struct monitor *m, struct page_op *op) { return advance(m, op, 1); }

void op_run(struct monitor *m, struct page_op *op) {
    while (advance(m, op, ~0ul) != OP_DONE)
        ;
}

void pages_init(struct monitor *m) {
    memset(m, 0, offsetof(struct monitor, stage2.pages));
    memset(m->entry + DRAM_PAGES, ENTRY_DMA, PAGE_SLOTS - DRAM_PAGES);
    stage2_init(&m->stage2);
    for (u64 page = (DMA_BASE - DRAM_BASE) / PAGE_SIZE; page < (DMA_BASE + DMA_SIZE - DRAM_BASE) / PAGE_SIZE; page++)
        if (page < DRAM_PAGES && DEFENCE(D_DMA)) /* tests have less memory */
            m->entry[page] = ENTRY_DMA;
    if ((REQUEST_PAGE - DRAM_BASE) / PAGE_SIZE < DRAM_PAGES && DEFENCE(D_DMA))
        m->entry[(REQUEST_PAGE - DRAM_BASE) / PAGE_SIZE] = ENTRY_DMA;
}

s64 page_state(const struct monitor *m, u64 address) {
    if (address % PAGE_SIZE)
        return ABI_INVALID;
    if (address < DRAM_BASE || address >= DRAM_END)
        return ABI_RANGE;
    switch (get(m, page_of(address))) {
    case ENTRY_UNPROTECTED:
    case ENTRY_DMA:
    case ENTRY_DONATING:
        return PAGE_UNPROTECTED;
    case ENTRY_FLEX:
        return PAGE_FLEX;
    default:
        return PAGE_CLAIMED;
    }
}

bool range_unprotected(const struct monitor *m, u64 address, u64 bytes) {
    const u64 end = address + bytes;
    if (address < DRAM_BASE || address >= DRAM_END || end < address || end > DRAM_END)
        return false;
    for (u64 at = address & ~(PAGE_SIZE - 1); at < end; at += PAGE_SIZE)
        if (get(m, page_of(at)) != ENTRY_UNPROTECTED)
            return false;
    return true;
}
