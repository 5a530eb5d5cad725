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
static u64 block_of(u64 item) { return page_of(item) / BLOCK_PAGES; }
static bool is_block(u64 item) { return item & ABI_ITEM_BLOCK; }
static u64 pages_in(u64 item) { return is_block(item) ? BLOCK_PAGES : 1; }

/* Another CPU may look at an entry while we change it. */
static u8 get(const struct monitor *m, u64 page) { return __atomic_load_n(&m->entry[page], __ATOMIC_ACQUIRE); }
static void set(struct monitor *m, u64 page, u8 entry) { __atomic_store_n(&m->entry[page], entry, __ATOMIC_RELEASE); }

static void set_item(struct monitor *m, u64 item, u8 entry) {
    for (u64 i = 0, page = page_of(item); i < pages_in(item); i++)
        set(m, page + i, entry);
}

static s64 check_item(const struct monitor *m, u64 item, u8 from) {
    u64 mask = is_block(item) ? BLOCK_SIZE - 1 : PAGE_SIZE - 1, address = item & ~(u64)ABI_ITEM_BLOCK;
    if (address & mask)
        return ABI_INVALID;
    if (address < DRAM_BASE || address >= DRAM_END)
        return DEFENCE(D_RANGE) ? ABI_RANGE : ABI_OK;
    for (u64 i = 0, page = page_of(item); i < pages_in(item); i++)
        if (get(m, page + i) != from && DEFENCE(D_STATE))
            return ABI_STATE;
    return ABI_OK;
}

static bool managed(u64 item) { return page_of(item) < DRAM_PAGES; }

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

static void move(struct monitor *m, const struct page_op *op, u64 item, bool back) {
    if (!managed(item))
        return; /* only in a control */
    set_item(m, item, back ? from_entry[op->kind] : to_entry[op->kind]);
    if (op->kind == OP_DONATE)
        m->guarded[block_of(item)] += back ? -pages_in(item) : pages_in(item);
    if (op->kind == OP_RELEASE)
        m->guarded[block_of(item)] += back ? pages_in(item) : -pages_in(item);
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

static s64 check_items(struct monitor *m, struct page_op *op) {
    u64 i;
    s64 status = ABI_OK;
    for (i = 0; i < op->count && status == ABI_OK; i++) {
        if (op->kind == OP_DONATE)
            op->items[i] = machine_read64(op->list + i * sizeof(u64)); /* once: the list can change under us */
        u64 item = op->items[i];
        status = check_item(m, item, from_entry[op->kind]);
        if (status == ABI_OK && op->kind == OP_DONATE && op->pages + pages_in(item) > m->wanted && DEFENCE(D_WANTED))
            status = ABI_UNWANTED;
        if (status != ABI_OK)
            break;
        move(m, op, item, false);
        op->pages += pages_in(item);
    }
    if (status == ABI_OK)
        return ABI_OK;
    if (status == ABI_STATE && named_before(op, i))
        status = ABI_DUPLICATE;
    op->bad = i;
    op->pages = 0;
    while (i-- > 0)
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

/* The part of a phase that is about one item. */
static void do_item(struct monitor *m, struct page_op *op, u64 item) {
    if (!managed(item))
        return; /* only in a control */
    u64 page = page_of(item), block = block_of(item);
    switch (program[op->kind][op->phase]) {
    case BREAK:
#ifdef CONTROLS
        if (!DEFENCE(D_COPY)) {
            item = machine_read64(op->list + op->next * sizeof(u64));
            op->items[op->next] = item;
            page = page_of(item);
        }
#endif
        is_block(item) ? stage2_break_block(m, block) : stage2_break_page(m, page);
        break;
    case MAKE:
        stage2_make(m, block);
        set_item(m, item, ENTRY_FLEX);
        break;
    case MAP:
        is_block(item) ? stage2_map_block(m, block) : stage2_map_page(m, page);
        break;
    case MERGE:
        if (stage2_merge(m, block))
            op->merges = true;
        break;
    case MERGED:
        if (m->form[block] == FORM_MERGING)
            stage2_merged(m, block);
        break;
    case ZERO:
        for (u64 i = 0; i < pages_in(item) && DEFENCE(D_SCRUB); i++)
            machine_zero_page(DRAM_BASE + (page + i) * PAGE_SIZE);
        set_item(m, item, ENTRY_SCRUBBED);
        break;
    default:
        break;
    }
}

static bool take_lock(struct monitor *m, u32 cpu) {
    u32 nobody = 0;
    return __atomic_compare_exchange_n(&m->lock, &nobody, cpu + 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

static void drop_lock(struct monitor *m) { __atomic_store_n(&m->lock, 0, __ATOMIC_RELEASE); }

enum op_result op_step(struct monitor *m, struct page_op *op) {
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
        do_item(m, op, op->items[op->next]);
        if (++op->next < op->count)
            return OP_MORE;
        op->next = 0;
    }
    op->phase++;
    return program[op->kind][op->phase] == END ? OP_DONE : OP_MORE;
}

void op_run(struct monitor *m, struct page_op *op) {
    while (op_step(m, op) != OP_DONE)
        ;
}

void pages_init(struct monitor *m) { stage2_init(&m->stage2); }

s64 page_state(const struct monitor *m, u64 address) {
    if (address % PAGE_SIZE)
        return ABI_INVALID;
    if (address < DRAM_BASE || address >= DRAM_END)
        return ABI_RANGE;
    switch (get(m, page_of(address))) {
    case ENTRY_UNPROTECTED:
    case ENTRY_DONATING:
        return PAGE_UNPROTECTED;
    case ENTRY_FLEX:
        return PAGE_FLEX;
    default:
        return PAGE_CLAIMED;
    }
}

bool range_unprotected(const struct monitor *m, u64 address, u64 bytes) {
    if (address < DRAM_BASE || address >= DRAM_END || bytes > DRAM_END - address)
        return false;
    for (u64 at = address & ~(PAGE_SIZE - 1); at < address + bytes; at += PAGE_SIZE)
        if (get(m, page_of(at)) != ENTRY_UNPROTECTED)
            return false;
    return true;
}

const char *pages_wrong(const struct monitor *m) {
    u64 flex = 0, claimed = 0;
    if (m->lock)
        return "the lock is held";
    for (u64 block = 0; block < DRAM_BLOCKS; block++) {
        u64 guarded = 0;
        for (u64 page = block * BLOCK_PAGES; page < (block + 1) * BLOCK_PAGES; page++) {
            u64 address = DRAM_BASE + page * PAGE_SIZE;
            bool mapped = stage2_walk(&m->stage2, address) != 0;
            guarded += m->entry[page] != ENTRY_UNPROTECTED;
            flex += m->entry[page] == ENTRY_FLEX;
            claimed += m->entry[page] == ENTRY_CLAIMED || m->entry[page] == ENTRY_SCRUBBED;
            if (m->entry[page] == ENTRY_DONATING || m->entry[page] == ENTRY_SCRUBBING)
                return "a page is between two states";
            if (mapped != (m->entry[page] == ENTRY_UNPROTECTED))
                return "a page is mapped and protected, or neither";
        }
        if (guarded != m->guarded[block])
            return "a block's count of guarded pages is wrong";
        if ((guarded == 0) != (m->form[block] == FORM_BLOCK))
            return "a block is not merged, or is mapped though a page of it is protected";
    }
    return flex == m->flex && claimed == m->claimed ? NULL : "a counter is wrong";
}
