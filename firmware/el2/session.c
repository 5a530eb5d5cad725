#include "calls.h"
#include "machine.h"
#include "session.h"

struct session session;

static bool move_session(u32 from, u32 to) {
    return __atomic_compare_exchange_n(&session.state, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

static void leave(u32 state) { __atomic_store_n(&session.state, state, __ATOMIC_RELEASE); }

/* Serve the trusted OS's calls until it is done or interrupted. The session is RUNNING and ours. */
static bool serve(struct monitor *m, u32 cpu, struct world_exit exit) {
    while (exit.kind == INT_WORLD_CALLS) {
        u64 value = 0;
        s64 status = call_secure(m, cpu, (u32)exit.value[0], exit.value[1], &value);
        exit = world_reply(status, value);
    }
    if (exit.kind == INT_WORLD_PREEMPTED)
        return false;
    for (u64 i = 0; i < 3; i++)
        session.result[i] = exit.value[i];
    session.result[3] = 0;
    return true;
}

static void finish(bool done, struct call *call) {
    if (done) {
        for (u64 i = 0; i < RESULTS; i++)
            call->result[i] = session.result[i];
        leave(SESSION_IDLE);
    } else {
        session.awaited = true;
        call->result[0] = ABI_PREEMPTED;
        leave(SESSION_PREEMPTED);
    }
}

bool session_take(struct call *call) {
    if (move_session(SESSION_IDLE, SESSION_RUNNING))
        return true;
    call->result[0] = (u64)ABI_BUSY;
    return false;
}

void session_drop(void) { leave(SESSION_IDLE); }

void session_send(struct monitor *m, struct call *call, u64 message, u64 a, u64 b, u64 c) {
    finish(serve(m, call->cpu, world_enter((const u64[]){message, a, b, c})), call);
}

void session_resume(struct monitor *m, struct call *call) {
    if (move_session(SESSION_FINISHED, SESSION_RUNNING)) {
        finish(true, call);
    } else if (move_session(SESSION_PREEMPTED, SESSION_RUNNING)) {
        finish(serve(m, call->cpu, world_resume()), call);
    } else {
        call->result[0] = (u64)(session.state == SESSION_IDLE ? ABI_INVALID : ABI_BUSY);
    }
}

bool session_hurry(struct monitor *m, u32 cpu, u64 address) {
    if (move_session(SESSION_IDLE, SESSION_RUNNING)) {
        session.awaited = false;
        bool done = serve(m, cpu, world_enter((const u64[]){MSG_HURRY, address, 0, 0}));
        leave(done ? SESSION_IDLE : SESSION_PREEMPTED);
        return done;
    }
    if (move_session(SESSION_PREEMPTED, SESSION_RUNNING)) { /* that visit first: there is only one */
        bool done = serve(m, cpu, world_resume());
        leave(!done ? SESSION_PREEMPTED : session.awaited ? SESSION_FINISHED : SESSION_IDLE);
    }
    return false;
}

bool session_close(bool for_good) {
    if (move_session(SESSION_IDLE, SESSION_CLOSED))
        return true;
    return for_good && (move_session(SESSION_FINISHED, SESSION_CLOSED) || move_session(SESSION_PREEMPTED, SESSION_CLOSED));
}

void session_open(void) { leave(SESSION_IDLE); }
