/* Reset, in flash, on every CPU; then EL3's own copy in secure RAM. */
#include "memlayout.h"
#include "vectors.h"

    .section .text.start, "ax"
    .global _start
_start:
    msr daifset, #15
    mrs x19, mpidr_el1
    and x19, x19, #0xff
    ldr x20, =el3_awake
    cbnz x19, 3f
    adr x0, _start
    ldr x1, =__el3_start
    ldr x2, =__el3_copied
1:  ldp x3, x4, [x0], #16
    stp x3, x4, [x1], #16
    cmp x1, x2
    b.lo 1b
    ldr x2, =__el3_end
2:  stp xzr, xzr, [x1], #16
    cmp x1, x2
    b.lo 2b
    b 4f
3:  ldr w0, [x20] /* the first CPU makes it 1; a reset makes it 0 before */
    cmp w0, #1
    b.ne 3b
4:  ic iallu
    dsb sy
    isb
    set_stack x19, el3_stacks, 14
    ldr x1, =el3_vectors
    msr vbar_el3, x1
    msr tpidr_el3, x19
    mov x0, x19
    mov x30, xzr
    ldr x1, =el3_main
    br x1

    .text
/* Leave EL3 for the first time on this CPU: x0 is the frame to enter with. */
    .global el3_leave
el3_leave:
    mrs x19, tpidr_el3
    mov x1, x0
    set_stack x19, el3_stacks, 14
    sub sp, sp, #FRAME_SIZE
    mov x2, #FRAME_SIZE
1:  sub x2, x2, #8
    ldr x3, [x1, x2]
    str x3, [sp, x2]
    cbnz x2, 1b
    restore_frame el3

    vector_table el3_vectors, el3, el3_exception

/* The vector registers and their control registers, to and from x0. */
    .arch_extension simd
    .global fp_save
fp_save:
    stp q0, q1, [x0, #0]
    stp q2, q3, [x0, #32]
    stp q4, q5, [x0, #64]
    stp q6, q7, [x0, #96]
    stp q8, q9, [x0, #128]
    stp q10, q11, [x0, #160]
    stp q12, q13, [x0, #192]
    stp q14, q15, [x0, #224]
    stp q16, q17, [x0, #256]
    stp q18, q19, [x0, #288]
    stp q20, q21, [x0, #320]
    stp q22, q23, [x0, #352]
    stp q24, q25, [x0, #384]
    stp q26, q27, [x0, #416]
    stp q28, q29, [x0, #448]
    stp q30, q31, [x0, #480]
    mrs x1, fpcr
    mrs x2, fpsr
    add x0, x0, #512
    stp x1, x2, [x0]
    ret

    .global fp_restore
fp_restore:
    ldp q0, q1, [x0, #0]
    ldp q2, q3, [x0, #32]
    ldp q4, q5, [x0, #64]
    ldp q6, q7, [x0, #96]
    ldp q8, q9, [x0, #128]
    ldp q10, q11, [x0, #160]
    ldp q12, q13, [x0, #192]
    ldp q14, q15, [x0, #224]
    ldp q16, q17, [x0, #256]
    ldp q18, q19, [x0, #288]
    ldp q20, q21, [x0, #320]
    ldp q22, q23, [x0, #352]
    ldp q24, q25, [x0, #384]
    ldp q26, q27, [x0, #416]
    ldp q28, q29, [x0, #448]
    ldp q30, q31, [x0, #480]
    add x0, x0, #512
    ldp x1, x2, [x0]
    msr fpcr, x1
    msr fpsr, x2
    ret

    .section .payload, "a"
    .balign 4096
    .global payload_el2, payload_sel1, payload_normal, payload_end
payload_el2:
    .incbin "el2.bin"
    .balign 16
payload_sel1:
    .incbin "sel1.bin"
    .balign 16
payload_normal:
    .incbin "normal.bin"
    .balign 16
payload_end:
