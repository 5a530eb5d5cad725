/* What the portable part of the monitor asks of the machine. el2/machine.c answers on Arm, host/machine.c in tests. */
#ifndef MACHINE_H
#define MACHINE_H
#include "abi.h"
#include "types.h"

/* Read normal memory. The caller has checked that the address is managed and UNPROTECTED. */
u64 machine_read64(u64 address);
/* Copy words of such memory, each read once. */
void machine_copy(u64 *to, u64 from, u64 words);
/* Zero one page. */
void machine_zero_page(u64 address);
void *memset(void *to, int value, size_t bytes);
/* What was written before is seen by table walks before what is written after. */
void machine_table_barrier(void);
/* All CPUs forget all stage-2 translations, and those derived from them. */
void machine_flush(void);

/* Protection goes off by itself after so many ticks without use. */
void machine_idle_window(u64 ticks);

/* Lists between the monitor and the trusted OS. In the monitor's memory; whoever has the session uses it. */
extern u64 mailbox[ABI_MAX_BATCH];

/* What a visit to the trusted OS ended with: a WORLD_* kind, and up to three values. */
struct world_exit {
    u64 kind, value[3];
};
struct world_exit world_enter(const u64 message[4]);
struct world_exit world_reply(s64 status, u64 value);
struct world_exit world_resume(void);
#endif
