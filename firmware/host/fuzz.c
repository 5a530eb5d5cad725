/* Fuzzing the call decoder: any bytes are a sequence of calls, and after each the invariants hold.
 *
 * LLVMFuzzerTestOneInput is libFuzzer's entry (clang -fsanitize=fuzzer). Without clang `main` below mutates a corpus by
 * itself and keeps what reaches new edges, by gcc's -fsanitize-coverage=trace-pc: fuzz SEED EXECUTIONS. A finding aborts. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../el2/calls.h"
#include "machine.h"

void host_reset(void);
void host_interrupt_in(u64 calls);
void host_call(u32 cpu, u32 id, const u64 args[4], u64 result[RESULTS]);
bool host_write(u64 address, u64 value);
u32 host_read(u32 cpu, u64 address, u64 *value);
const char *host_wrong(void);
int LLVMFuzzerTestOneInput(const u8 *data, size_t size);

#define LIST (DRAM_BASE + (DRAM_PAGES - 8) * PAGE_SIZE)

/* A number that is likely to matter, or any: two bytes of input. */
static u64 number(u8 kind, u8 value) {
    switch (kind & 15) {
    case 0:
        return value;
    case 1:
        return ~(u64)value;
    case 2:
        return DRAM_BASE + value * PAGE_SIZE;
    case 3:
        return DRAM_BASE + (DRAM_PAGES - value) * PAGE_SIZE;
    case 4:
        return (DRAM_BASE + value % 3 * BLOCK_SIZE) | ABI_ITEM_BLOCK;
    case 5:
        return LIST + value;
    case 6:
        return 1ul << (value & 63);
    case 7:
        return (1ul << (value & 63)) - 1;
    case 8:
        return BLOCK_PAGES + value;
    case 9:
        return ABI_MAX_BATCH + value;
    case 10:
        return EL2_BASE + value;
    default:
        return DRAM_BASE + (value & 15) * PAGE_SIZE;
    }
}

static void finding(const char *why, u32 id) {
    fprintf(stderr, "broken: %s, after call %#x\n", why, id);
    abort();
}

/* Records of eight bytes: what, and up to three numbers. The manager's honest steps are single records, too. */
int LLVMFuzzerTestOneInput(const u8 *data, size_t size) {
    static const u32 ids[] = {CALL_VERSION, CALL_DONATE, CALL_RECLAIM, CALL_RUN, CALL_QUERY, CALL_STATS, CALL_SECURE_CALL, CALL_RESUME,
                               CALL_IDLE_WINDOW};
    u64 r[RESULTS] = {0}, ticket = 0, value;
    host_reset();
    for (; size >= 8; size -= 8, data += 8) {
        const u64 a = number(data[2], data[3]), b = number(data[4], data[5]), c = number(data[6], data[7]);
        u32 id = ids[data[1] % COUNT(ids)];
        host_interrupt_in(data[0] >> 5);
        switch (data[0] & 7) {
        case 0: /* any call */
            host_call(data[1] >> 7, id, (const u64[4]){a, b, c, a ^ b}, r);
            break;
        case 1: /* any id */
            id = (u32)(a << 16 ^ b);
            host_call(0, id, (const u64[4]){a, b, c, 0}, r);
            break;
        case 2:
            id = CALL_SECURE_CALL;
            host_call(0, id, (const u64[4]){SVC_WANT, a, 0, 0}, r);
            ticket = r[0] == ABI_WANT_PAGES ? r[2] : ticket;
            break;
        case 3: /* give what the list says */
            id = CALL_DONATE;
            host_call(0, id, (const u64[4]){LIST, data[1] % 4 + 1, ticket, 0}, r);
            break;
        case 4: /* write to the list */
            host_write(LIST, a);
            host_write(LIST + 8, b);
            host_write(LIST + 16, c);
            host_write(LIST + 24, a + PAGE_SIZE);
            break;
        case 5:
            host_write(a & ~7ul, b);
            break;
        case 6:
            host_read(data[1] & 1, a & ~7ul, &value);
            break;
        default:
            id = data[1] & 1 ? CALL_RECLAIM : CALL_RUN;
            host_call(0, id, (const u64[4]){a, data[1] >> 1 & 1, 0, 0}, r);
        }
        if (session.state == SESSION_PREEMPTED && data[1] & 64) {
            host_interrupt_in(0);
            host_call(1, CALL_RESUME, (const u64[4]){0}, r);
        }
        const char *wrong = size < 16 || size % 32 == 0 ? host_wrong() : NULL; /* it looks at every page */
        if (wrong)
            finding(wrong, id);
    }
    return 0;
}

#ifndef LIBFUZZER
#define OURS __attribute__((no_sanitize_coverage)) /* no part of what is tested */
#define LONGEST 256
#define KEPT 4096
static u8 reached[1 << 16];
static u64 edges, previous, executed;
static struct {
    u8 bytes[LONGEST];
    u64 size;
} corpus[KEPT];
static u64 kept = 1;

void __sanitizer_cov_trace_pc(void);
OURS void __sanitizer_cov_trace_pc(void) {
    u64 here = (u64)(uintptr_t)__builtin_return_address(0);
    u8 *edge = &reached[(here ^ previous) % sizeof(reached)];
    edges += !*edge;
    *edge = 1;
    previous = here >> 1;
}

static u64 seed;
OURS static u64 draw(u64 below) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % below;
}

OURS static void mutate(u8 *bytes, u64 *size) {
    for (u64 changes = draw(6) + 1; changes > 0; changes--) {
        u64 record = *size ? draw(*size / 8) * 8 : 0;
        switch (draw(4)) {
        case 0: /* another record, of another input */
            if (*size + 8 <= LONGEST) {
                memmove(bytes + record + 8, bytes + record, *size - record);
                *size += 8;
                for (u64 i = 0; i < 8; i++)
                    bytes[record + i] = (u8)draw(256);
            }
            break;
        case 1:
            if (*size > 8) {
                memmove(bytes + record, bytes + record + 8, *size - record - 8);
                *size -= 8;
            }
            break;
        case 2:
            if (*size)
                bytes[draw(*size)] = (u8)draw(256);
            break;
        default:
            if (*size)
                bytes[draw(*size)] ^= (u8)(1u << draw(8));
        }
    }
}

OURS int main(int argc, char **argv) {
    u64 most = argc == 3 ? strtoul(argv[2], NULL, 0) : 0;
    seed = argc == 3 ? strtoul(argv[1], NULL, 0) * 2654435761u + 1 : 0;
    if (!most) {
        fprintf(stderr, "usage: fuzz SEED EXECUTIONS\n");
        return 2;
    }
    for (; executed < most; executed++) {
        u8 bytes[LONGEST];
        u64 from = draw(kept), size = corpus[from].size, before = edges;
        memcpy(bytes, corpus[from].bytes, sizeof(bytes));
        mutate(bytes, &size);
        LLVMFuzzerTestOneInput(bytes, size);
        if (edges > before && kept < KEPT) {
            memcpy(corpus[kept].bytes, bytes, sizeof(bytes));
            corpus[kept++].size = size;
        }
        if ((executed + 1) % 1000000 == 0) /* a long run tells how far it came */
            fprintf(stderr, "%lu executions, %lu edges, %lu inputs kept\n", executed + 1, edges, kept);
    }
    printf("%lu executions, %lu edges, %lu inputs kept\n", executed, edges, kept);
    return 0;
}
#endif
