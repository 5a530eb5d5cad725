/* What holds for pages, blocks and tables whenever no operation is under way. */
#include "../el2/stage2.h"
#include "machine.h"

const char *pages_wrong(const struct monitor *m) {
    u64 flex = 0, claimed = 0;
    if (m->lock)
        return "the lock is held";
    if (m->broken)
        return "a block waits for its table";
    for (u64 block = 0; block < DRAM_BLOCKS; block++) {
        u64 guarded = 0;
        for (u64 page = block * BLOCK_PAGES; page < (block + 1) * BLOCK_PAGES; page++) {
            u64 address = DRAM_BASE + page * PAGE_SIZE;
            bool mapped = stage2_walk(&m->stage2, address) != 0, valid = m->stage2.pages[block][page % BLOCK_PAGES] != 0;
            if (!valid && m->filled[block] && m->form[block] != FORM_TABLE)
                return "a table nobody walks does not map all of its block";
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
