/* The calls, one table row each, and the session with the trusted OS.
 *
 * Knows ids and arguments (abi/monitor.toml). Does not know exceptions or registers: el2/traps.c brings the calls here. */
#ifndef CALLS_H
#define CALLS_H
#include "pages.h"

#define RESULTS 4

struct call {
    u32 cpu;
    u64 arg[4];         /* x1 to x4 */
    u64 result[RESULTS]; /* x0 to x3 */
};

/* Who is inside the trusted OS. One visit at a time; a preempted one is resumed from any CPU. */
enum session_state {
    SESSION_IDLE,
    SESSION_RUNNING,
    SESSION_PREEMPTED,
    SESSION_FINISHED, /* its result waits for RESUME */
    SESSION_CLOSED,   /* the machine is going down */
};

struct session {
    u32 state;
    bool awaited; /* somebody will call RESUME for the result */
    u64 result[RESULTS];
};

extern struct session session;

/* Serve a call of the normal world's kernel. Fills `result`. */
void call_normal(struct monitor *m, u32 id, struct call *call);
/* Serve a call of the trusted OS; the value is written to `value`. */
s64 call_secure(struct monitor *m, u32 cpu, u32 id, u64 arg, u64 *value);

/* The normal world touched a CLAIMED page: have it scrubbed soon. False: somebody else is at it, let it touch again. */
bool session_hurry(struct monitor *m, u32 cpu, u64 address);
/* Let nobody into the trusted OS until session_open. False: somebody is there now, or has not finished, which only
 * matters when it is not for good. */
bool session_close(bool for_good);
void session_open(void);
#endif
