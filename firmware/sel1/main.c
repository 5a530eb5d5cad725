/* The trusted OS stub: its map, its loop, and the services of docs/monitor-abi.md. Holds no model and no key yet. */
#include "../common/uart.h"
#include "arm.h"
#include "flexmem.h"
#include "frame.h"

static ALIGNED(4096) u64 level1[512];
static ALIGNED(4096) u64 low[512];
static ALIGNED(4096) u64 own[512]; /* secure RAM from EL3_BASE on: our text executes, EL3 is not there */
static ALIGNED(4096) u64 dram[512];
static ALIGNED(4096) u64 flex[DRAM_BLOCKS][512];
static struct flexmem flexmem;
u64 *const flexmem_mailbox = (u64 *)MAILBOX_BASE;
extern u8 __text_end[];

#define DATA (S1_NORMAL | S1_NO_EXECUTE | S1_PRIVILEGED_NO_EXECUTE)

static void build_map(void) {
    for (u64 at = SECURE_RAM + BLOCK_SIZE; at < SECURE_RAM + SECURE_RAM_SIZE; at += BLOCK_SIZE)
        low[at / BLOCK_SIZE] = at | DATA | S1_BLOCK;
    for (u64 at = SEL1_BASE; at < SECURE_RAM + BLOCK_SIZE; at += PAGE_SIZE)
        own[at / PAGE_SIZE % 512] = at | (at < (u64)__text_end ? S1_NORMAL | S1_READ_ONLY : DATA) | S1_PAGE;
    low[SECURE_RAM / BLOCK_SIZE] = (u64)own | S1_TABLE;
    low[SECURE_UART / BLOCK_SIZE] = (SECURE_UART & ~(BLOCK_SIZE - 1)) | S1_DEVICE | S1_NO_EXECUTE | S1_PRIVILEGED_NO_EXECUTE | S1_BLOCK;
    for (u64 block = 0; block < DRAM_BLOCKS; block++)
        dram[block] = (u64)flex[block] | S1_TABLE;
    dram[(MAILBOX_BASE - DRAM_BASE) / BLOCK_SIZE] = MAILBOX_BASE | DATA | S1_NORMAL_WORLD | S1_BLOCK;
    level1[0] = (u64)low | S1_TABLE;
    level1[1] = (u64)dram | S1_TABLE;
    write_reg(mair_el1, MAIR);
    write_reg(tcr_el1, TCR_4GIB | 1ul << 23); /* no TTBR1 */
    write_reg(ttbr0_el1, level1);
    dsb();
    isb();
    __asm__ volatile("tlbi vmalle1is\n dsb sy\n isb");
    write_reg(sctlr_el1, SCTLR_EL1_RES1 | SCTLR_MMU | SCTLR_WXN);
    isb();
}

/* Entries of `flex`, which follow each other as the pages do. A block's first entry is set like a page's: most lists have
 * no blocks, and the loop over a list is short. Its other entries follow, and it is counted. */
static u64 *const entries = flex[0];
static u64 entry_of(u64 item) { return (item - DRAM_BASE) / PAGE_SIZE; }
#define FLEX_BITS (DATA | S1_NORMAL_WORLD | S1_PAGE) /* with bit 0, as blocks' items have */

static u64 rest_of_blocks(const u64 *items, u64 count, bool valid) {
    u64 blocks = 0;
    for (u64 i = 0; i < count; i++)
        if (items[i] & ABI_ITEM_BLOCK) {
            for (u64 j = 1; j < BLOCK_PAGES; j++)
                entries[entry_of(items[i]) + j] = valid ? (items[i] + j * PAGE_SIZE) | FLEX_BITS : 0;
            blocks++;
        }
    return blocks;
}

u64 flexmem_map(u64 *to, const u64 *items, u64 count) {
    u64 any = 0, blocks = 0;
    _Pragma("GCC unroll 4") for (u64 i = 0; i < count; i++) {
        const u64 item = __atomic_load_n(&items[i], __ATOMIC_RELAXED);
        to[i] = item;
        entries[entry_of(item)] = item | FLEX_BITS;
        any |= item;
    }
    if (any & ABI_ITEM_BLOCK)
        blocks = rest_of_blocks(to, count, true);
    __asm__ volatile("dsb ishst\n isb" : : : "memory");
    return blocks;
}

void flexmem_unmap(u64 *to, u64 *also, const u64 *items, u64 count) {
    u64 any = 0;
    _Pragma("GCC unroll 4") for (u64 i = 0; i < count; i++) {
        const u64 item = items[i];
        to[i] = also[i] = item;
        entries[entry_of(item)] = 0;
        any |= item;
    }
    if (any & ABI_ITEM_BLOCK)
        rest_of_blocks(to, count, false);
    __asm__ volatile("dsb ishst\n tlbi vmalle1is\n dsb ish\n isb" : : : "memory");
}

static void smc(u64 r[4]) {
    register u64 x0 __asm__("x0") = r[0];
    register u64 x1 __asm__("x1") = r[1];
    register u64 x2 __asm__("x2") = r[2];
    register u64 x3 __asm__("x3") = r[3];
    __asm__ volatile("smc #0" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3) : : "memory");
    r[0] = x0;
    r[1] = x1;
    r[2] = x2;
    r[3] = x3;
}

s64 monitor_call(u32 id, u64 arg, u64 *value) {
    u64 r[4] = {id, arg};
    smc(r);
    *value = r[1];
    return (s64)r[0];
}

static u64 for_each_word(u64 pattern, bool write) {
    u64 sum = 0;
    for (u32 i = 0; i < flexmem.held; i++) {
        volatile u64 *at = (volatile u64 *)item_address(flexmem.holding[i]);
        for (u64 w = 0; w < item_bytes(flexmem.holding[i]) / 8; w++) {
            if (write)
                at[w] = pattern;
            sum += at[w];
        }
    }
    return sum;
}

static struct reply service(const u64 message[4]) {
    u64 value = 0;
    switch (message[1]) {
    case SVC_ECHO:
        return (struct reply){ABI_OK, {message[2], message[3]}};
    case SVC_WANT: {
        s64 status = monitor_call(SCALL_ALLOC, message[2], &value);
        return status == ABI_OK ? (struct reply){ABI_WANT_PAGES, {message[2], value}} : (struct reply){status, {0, 0}};
    }
    case SVC_FILL:
        return (struct reply){ABI_OK, {for_each_word(message[2], true), 0}};
    case SVC_CHECKSUM: {
        u64 pages = 0;
        for (u32 i = 0; i < flexmem.held; i++)
            pages += item_bytes(flexmem.holding[i]) / PAGE_SIZE;
        return (struct reply){ABI_OK, {for_each_word(0, false), pages}};
    }
    case SVC_SPIN:
        if (flexmem.held) /* as an engine would: data in vector registers while it is interrupted */
            __asm__ volatile(".arch_extension simd\n ld1 {v7.2d}, [%0]" : : "r"(item_address(flexmem.holding[0])) : "memory");
        for (u64 i = 0; i < message[2]; i++)
            value += for_each_word(0, false);
        return (struct reply){ABI_OK, {value, 0}};
    default:
        return (struct reply){ABI_NOT_SUPPORTED, {0, 0}};
    }
}

_Noreturn void sel1_main(void) {
    build_map();
    u64 r[4] = {INT_SEL1_READY};
    for (;;) {
        smc(r);
        struct reply reply = {.status = ABI_NOT_SUPPORTED};
        if (r[0] == MSG_SERVICE)
            reply = service(r);
        else
            flexmem_message(&flexmem, r, &reply);
        r[0] = INT_SEL1_DONE;
        r[1] = (u64)reply.status;
        r[2] = reply.value[0];
        r[3] = reply.value[1];
    }
}

_Noreturn void sel1_exception(struct frame *f, u64 vector) {
    uart_text(SECURE_UART, "the trusted os faults: vector ");
    uart_hex(SECURE_UART, vector);
    uart_text(SECURE_UART, " esr ");
    uart_hex(SECURE_UART, read_reg(esr_el1));
    uart_text(SECURE_UART, " address ");
    uart_hex(SECURE_UART, read_reg(far_el1));
    uart_text(SECURE_UART, " at ");
    uart_hex(SECURE_UART, f->elr);
    uart_text(SECURE_UART, "\n");
    for (;;)
        wfi();
}
