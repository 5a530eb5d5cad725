#include "idle.h"

#include "abi.h"

static u64 get(const u64 *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
static void set(u64 *at, u64 value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }

/* Another CPU may have noted a time that is later than ours. */
static u64 since(u64 then, u64 now) { return now > then ? now - then : 0; }

void idle_use(struct idle *s, u64 now) { set(&s->used, now); }

void idle_set_window(struct idle *s, u64 ticks, u64 now) {
    set(&s->window, ticks);
    idle_use(s, now);
}

static bool is_due(const struct idle *s, u64 now, bool on, u64 request) {
    const u64 window = get(&s->window);
    return on ? window && since(get(&s->used), now) >= window : request == ABI_REQUEST_ON;
}

enum idle_decision idle_decide(struct idle *s, u64 now, bool on, u64 request) {
    u64 *const acted = &s->acted[on], last = get(acted);
    if (!is_due(s, now, on, request) || since(last, now) < s->gap)
        return IDLE_WAIT;
    if (!__atomic_compare_exchange_n(acted, &last, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return IDLE_WAIT;
    return on ? IDLE_OFF : IDLE_ON;
}

u64 idle_next(const struct idle *s, u64 now, bool on) {
    const u64 window = get(&s->window), used = get(&s->used);
    if (!on)
        return now + s->poll;
    if (window == 0)
        return 0;
    if (window > ~0ul - used)
        return ~0ul;
    if (used + window > now)
        return used + window;
    return now + (window / 2 > s->gap ? window / 2 : s->gap); /* it was due, and could not be */
}
