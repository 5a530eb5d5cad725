/* The attacker's kernel: what its files share. */
#ifndef KERNEL_H
#define KERNEL_H
#include "abi.h"
#include "arm.h"
#include "memlayout.h"

#define CANARY 0xca4a27f00d5ec7e7ul
#define VICTIM 0x50000000ul  /* a block of its own: pages here are given away */
#define VICTIM2 0x50200000ul /* another */
#define LISTS 0x48000000ul   /* lists for DONATE, and other scratch memory */
#define TWIN 0x48100000ul    /* a page like a victim's that is never given away */
#define MARK 0x48200000ul    /* survives a reset */
#define ALIAS 0x4000000000ul /* a second view, made by alias_map */

typedef u64 (*function)(u64 a, u64 b);

u64 guarded(function f, u64 a, u64 b, u64 *value);
s64 call_monitor(u64 id, u64 a, u64 b, u64 c, u64 result[4]);
s64 call_firmware(u64 id, u64 a, u64 b, u64 c, u64 result[4]);
extern u8 second_cpu[], lone_reader[];

/* kernel.c */
void say(const char *text);
void say_hex(u64 value);
void start_second_cpu(void);
void stop_second_cpu(void);
void second_begin(function f, u64 a, u64 b); /* and go on here */
u64 second_end(u64 *value);
void second_leaves(void); /* said by the second CPU itself, before it goes off */
bool second_answers(function f, u64 ticks); /* within so much time */
u64 on_second(function f, u64 a, u64 b, u64 *value);
/* Map ALIAS to a physical address with the given stage-1 descriptor bits, as a page or as a block. */
void alias_map(u64 physical, u64 bits, bool block);
/* Make the second-level table of ALIAS lie at this physical address. */
void alias_table(u64 physical);
/* Make the index'th second-level entry of ALIAS a table of pages. */
void alias_more(u64 index, u64 table);
void forget(u64 address);
u64 load(u64 address, u64 unused);
u64 store(u64 address, u64 value);

/* flex.c: the manager's side, as an honest kernel would do it. */
s64 service(u64 number, u64 a, u64 b, u64 result[4]);
s64 finished(s64 status, u64 result[4]); /* resume while preempted */
u64 want(u64 pages);
s64 donate(u64 ticket, u64 count, u64 result[4]);
void put_item(u64 index, u64 item);
/* Give pages from `address` on, one item each, filled with the canary. */
void give(u64 address, u64 pages);
void give_block(u64 address);
s64 reclaim(u64 pages, u64 mode, u64 *taken);
void work(void); /* let the trusted OS scrub and release all that is CLAIMED */
u64 checksum(void);
void clean_up(void);

/* An attack answers whether it got what it wanted; `seen` is what it saw, for the table. */
struct outcome {
    const char *seen;
    u64 value;
};
struct attack {
    const char *id;
    bool (*run)(struct outcome *out, bool twin);
};
extern const struct attack memory_attacks[], call_attacks[], protect_attacks[], system_attacks[], debug_attacks[], dma_attacks[],
    request_attacks[];
/* Measurements: `time NAME` on the UART. */
struct bench {
    const char *id;
    void (*run)(void);
};
extern const struct bench benches[];
bool faulted(struct outcome *out, u64 esr, u64 value, const char *otherwise);
#endif
