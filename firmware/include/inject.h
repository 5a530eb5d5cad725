/* EL1 takes an exception as if the machine had raised it. For EL2 and EL3. */
#ifndef INJECT_H
#define INJECT_H
#include "arm.h"
#include "frame.h"

#define ESR_LENGTH (1ul << 25)

static inline void inject(struct frame *f, u64 esr, u64 far) {
    u64 level = SPSR_LEVEL(f->spsr);
    u64 offset = level == 1 ? (f->spsr & 1 ? 0x200 : 0) : f->spsr & 0x10 ? 0x600 : 0x400;
    write_reg(esr_el1, esr);
    write_reg(far_el1, far);
    write_reg(elr_el1, f->elr);
    write_reg(spsr_el1, f->spsr);
    f->elr = read_reg(vbar_el1) + offset;
    f->spsr = MODE_EL1H;
}

static inline void inject_undefined(struct frame *f) { inject(f, ESR_LENGTH, 0); }
#endif
