#include "calls.h"

#include "defences.h"
#include "machine.h"
#include "session.h"

static void answer(struct call *call, s64 status, u64 value) {
    call->result[0] = (u64)status;
    call->result[1] = value;
}

static void version(struct monitor *m, struct call *call) {
    (void)m;
    answer(call, ABI_OK, ABI_VERSION);
}

static void donate(struct monitor *m, struct call *call) {
    struct page_op op = {.kind = OP_DONATE, .cpu = call->cpu, .items = mailbox};
    op.list = call->arg[0];
    op.count = call->arg[1];
    op.ticket = (u32)call->arg[2];
    if (call->arg[2] >> 32)
        return answer(call, ABI_TICKET, 0);
    if (!session_take(call))
        return;
    op_run(m, &op);
    if (op.status != ABI_OK) {
        session_drop();
        return answer(call, op.status, op.bad);
    }
    session_send(m, call, MSG_GIVEN, op.count, op.pages, 0);
}

static void reclaim(struct monitor *m, struct call *call) {
    if (call->arg[0] == 0 || call->arg[1] > ABI_MODE_ASYNC)
        return answer(call, ABI_INVALID, 0);
    if (session_take(call))
        session_send(m, call, MSG_TAKE, call->arg[0], call->arg[1], 0);
}

static void run(struct monitor *m, struct call *call) {
    if (call->arg[0] == 0)
        return answer(call, ABI_INVALID, 0);
    if (session_take(call))
        session_send(m, call, MSG_WORK, call->arg[0], 0, 0);
}

static void query(struct monitor *m, struct call *call) {
    s64 state = page_state(m, call->arg[0]);
    if (state < 0)
        answer(call, state, 0);
    else
        answer(call, ABI_OK, (u64)state);
}

static void stats(struct monitor *m, struct call *call) {
    call->result[0] = m->flex;
    call->result[1] = m->claimed;
    call->result[2] = m->wanted;
    call->result[3] = m->flushes;
}

static void secure_service(struct monitor *m, struct call *call) {
    if (session_take(call))
        session_send(m, call, MSG_SERVICE, call->arg[0], call->arg[1], call->arg[2]);
}

static void resume(struct monitor *m, struct call *call) { session_resume(m, call); }

static void idle_window(struct monitor *m, struct call *call) {
    (void)m;
    machine_idle_window(call->arg[0]);
    answer(call, ABI_OK, 0);
}

static const struct {
    u32 id;
    void (*serve)(struct monitor *m, struct call *call);
} normal_calls[] = {
    {CALL_VERSION, version}, {CALL_DONATE, donate}, {CALL_RECLAIM, reclaim},     {CALL_RUN, run},
    {CALL_QUERY, query},     {CALL_STATS, stats},   {CALL_SECURE_CALL, secure_service}, {CALL_RESUME, resume},
    {CALL_IDLE_WINDOW, idle_window},
};
_Static_assert(COUNT(normal_calls) == ABI_CALLS, "a call of monitor.toml has no row");

void call_normal(struct monitor *m, u32 id, struct call *call) {
    answer(call, ABI_NOT_SUPPORTED, 0);
    for (u64 i = 0; i < COUNT(normal_calls); i++)
        if (normal_calls[i].id == id)
            return normal_calls[i].serve(m, call);
    if (!DEFENCE(D_CALLER)) {
        u64 value = 0;
        answer(call, call_secure(m, call->cpu, id, call->arg[0], &value), value);
    }
}

static s64 alloc(struct monitor *m, u64 pages, u64 *value) {
    if (pages == 0 || pages > DRAM_PAGES - m->flex - m->claimed)
        return ABI_INVALID;
    m->wanted = pages;
    *value = ++m->ticket;
    return ABI_OK;
}

static s64 change(struct monitor *m, u32 cpu, u32 kind, u64 count, u64 *value) {
    struct page_op op = {.kind = kind, .cpu = cpu, .items = mailbox, .count = count};
    op_run(m, &op);
    *value = op.status == ABI_OK ? op.pages : op.bad;
    return op.status;
}

s64 call_secure(struct monitor *m, u32 cpu, u32 id, u64 arg, u64 *value) {
    switch (id) {
    case SCALL_ALLOC:
        return alloc(m, arg, value);
    case SCALL_CLAIM:
        return change(m, cpu, OP_CLAIM, arg, value);
    case SCALL_SCRUB:
        return change(m, cpu, OP_SCRUB, arg, value);
    case SCALL_RELEASE:
        return change(m, cpu, OP_RELEASE, arg, value);
    default:
        return ABI_NOT_SUPPORTED;
    }
}
