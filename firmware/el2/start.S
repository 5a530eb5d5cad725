/* EL3 enters here, always: x0 the CPU, x1 whether to build everything anew, x2 defences off (control build). */
#include "memlayout.h"
#include "vectors.h"

    .section .text.start, "ax"
    .global _start
_start:
    mov x19, x0
    mov x20, x1
    mov x21, x2
    ldr x3, =el2_vectors
    msr vbar_el2, x3
    msr tpidr_el2, x0
    cbz x20, 2f
    ldr x3, =__bss_start
    ldr x4, =__bss_end
1:  stp xzr, xzr, [x3], #16
    cmp x3, x4
    b.lo 1b
2:  set_stack x19, el2_stacks, 14
    mov x30, xzr
    mov x0, x19
    mov x1, x20
    mov x2, x21
    bl el2_main

    .text
    vector_table el2_vectors, el2, el2_exception
