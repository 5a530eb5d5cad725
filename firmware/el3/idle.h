/* When protection goes off by itself, and when a request in the request page turns it on.
 *
 * Knows times (ticks of the machine's counter) and the request's word. Does not know registers, the page or how to switch:
 * protect.c asks at each of EL3's timer interrupts, and does what is decided here. Tests build it for the host. */
#ifndef IDLE_H
#define IDLE_H
#include "types.h"

enum idle_decision { IDLE_WAIT, IDLE_OFF, IDLE_ON };

struct idle {
    u64 poll;     /* while protection is off: so often EL3 looks at the request page */
    u64 gap;      /* from one IDLE_OFF to the next at least, and from one IDLE_ON to the next */
    u64 window;   /* so long without use, then off; 0: never by itself */
    u64 used;     /* when the trusted OS was entered or left, or protection came on */
    u64 acted[2]; /* the last IDLE_ON and the last IDLE_OFF */
};

/* On any CPU, any number of them at once. Of CPUs that ask at the same time one is told to act. */
void idle_use(struct idle *s, u64 now);
void idle_set_window(struct idle *s, u64 ticks, u64 now);
enum idle_decision idle_decide(struct idle *s, u64 now, bool on, u64 request);
/* When to ask again; 0: never. */
u64 idle_next(const struct idle *s, u64 now, bool on);
#endif
