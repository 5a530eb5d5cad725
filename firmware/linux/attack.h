/* What the attacks of Linux's root share: what is attacked, and what came of it. */
#ifndef ATTACK_H
#define ATTACK_H
#include "monitor.h"

#include <sys/types.h>

struct target {
    volatile uint64_t *at; /* in the owner */
    uint64_t frame;
    pid_t owner;
};

/* What was read, or why nothing (an errno). */
struct report {
    uint64_t value;
    int error;
};

typedef struct report (*attempt)(const struct target *t);

struct report got(uint64_t value);
struct report refused(void);

/* Where the kernel maps a physical address for itself, and where /proc/kcore shows that. False: kcore does not tell. */
bool kernel_view(uint64_t physical, uint64_t *address, uint64_t *offset);

/* inside.c: our code in the kernel. */
struct report by_bpf(const struct target *t);
struct report by_module(const struct target *t);
#endif
