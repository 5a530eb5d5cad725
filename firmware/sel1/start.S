/* The trusted OS: one entry, one stack, since one CPU at a time is in it. */
#include "vectors.h"
    .section .text.start, "ax"
    .global _start
_start:
    ldr x3, =sel1_vectors
    msr vbar_el1, x3
    mov x3, #(3 << 20)
    msr cpacr_el1, x3
    ldr x3, =__bss_start
    ldr x4, =__bss_end
1:  stp xzr, xzr, [x3], #16
    cmp x3, x4
    b.lo 1b
    ldr x3, =__stack_end
    mov sp, x3
    mov x30, xzr
    bl sel1_main
    .text
    vector_table sel1_vectors, el1, sel1_exception
