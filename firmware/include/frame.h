/* What an exception saves; the same on every level, and the same in start.S. */
#ifndef FRAME_H
#define FRAME_H
#include "types.h"

struct frame {
    u64 x[31];
    u64 elr, spsr, unused;
};
_Static_assert(sizeof(struct frame) == 272, "FRAME_SIZE in vectors.h");
#endif
