/* Exception entry and return for one level, in assembly: `.macro`s, so that each level has its own copy.
 *
 * LEVEL is el1, el2 or el3. A handler gets the frame in x0 and the vector's number in x1. */
#define FRAME_SIZE 272

.macro save_frame level
    sub sp, sp, #FRAME_SIZE
    stp x0, x1, [sp, #0]
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x19, [sp, #144]
    stp x20, x21, [sp, #160]
    stp x22, x23, [sp, #176]
    stp x24, x25, [sp, #192]
    stp x26, x27, [sp, #208]
    stp x28, x29, [sp, #224]
    mrs x1, elr_\level
    stp x30, x1, [sp, #240]
    mrs x1, spsr_\level
    str x1, [sp, #256]
.endm

.macro restore_frame level
    ldr x1, [sp, #256]
    msr spsr_\level, x1
    ldp x30, x1, [sp, #240]
    msr elr_\level, x1
    ldp x0, x1, [sp, #0]
    ldp x2, x3, [sp, #16]
    ldp x4, x5, [sp, #32]
    ldp x6, x7, [sp, #48]
    ldp x8, x9, [sp, #64]
    ldp x10, x11, [sp, #80]
    ldp x12, x13, [sp, #96]
    ldp x14, x15, [sp, #112]
    ldp x16, x17, [sp, #128]
    ldp x18, x19, [sp, #144]
    ldp x20, x21, [sp, #160]
    ldp x22, x23, [sp, #176]
    ldp x24, x25, [sp, #192]
    ldp x26, x27, [sp, #208]
    ldp x28, x29, [sp, #224]
    add sp, sp, #FRAME_SIZE
    eret
.endm

/* Sixteen vectors that all go to `handler(frame, number)`. */
.macro vector_table name, level, handler
    .balign 2048
    .global \name
\name:
    .set number, 0
    .rept 16
    .balign 128
    save_frame \level
    mov x1, #number
    b 9f
    .set number, number + 1
    .endr
9:  mov x0, sp
    bl \handler
    restore_frame \level
.endm

/* A stack per CPU, which ends at `stacks` + (CPU + 1) * 2^shift. CPU in \cpu. */
.macro set_stack cpu, stacks, shift
    ldr x9, =\stacks
    add x10, \cpu, #1
    add x9, x9, x10, lsl #\shift
    mov sp, x9
.endm
