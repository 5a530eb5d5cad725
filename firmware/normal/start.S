/* The attacker's kernel: bare metal at EL1, two CPUs. */
#include "vectors.h"
    .section .text.start, "ax"
    .global _start
_start:
    ldr x3, =__bss_start
    ldr x4, =__bss_end
1:  stp xzr, xzr, [x3], #16
    cmp x3, x4
    b.lo 1b
    mov x19, #0
    b 2f
    .global second_cpu
second_cpu:
    mov x19, #1
2:  ldr x3, =normal_vectors
    msr vbar_el1, x3
    mov x3, #(3 << 20)
    msr cpacr_el1, x3
    ldr x3, =recovery
    add x3, x3, x19, lsl #3
    msr tpidr_el1, x3
    set_stack x19, stacks, 14
    mov x30, xzr
    mov x0, x19
    bl normal_main

    .text
    vector_table normal_vectors, el1, normal_exception

/* u64 guarded(function, a, b, &value): 0, or the ESR of the exception that ended the function. */
    .global guarded, recover
guarded:
    stp x29, x30, [sp, #-112]!
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    str x3, [sp, #96]
    mrs x9, tpidr_el1
    mov x10, sp
    str x10, [x9]
    mov x9, x0
    mov x0, x1
    mov x1, x2
    blr x9
    ldr x3, [sp, #96]
    str x0, [x3]
    mov x0, #0
1:  mrs x9, tpidr_el1
    str xzr, [x9]
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp x29, x30, [sp], #112
    ret
recover: /* x0: ESR */
    mrs x9, tpidr_el1
    ldr x10, [x9]
    mov sp, x10
    b 1b

/* u64 call_monitor(id, a, b, c, result[4]) by HVC; call_firmware by SMC. */
    .global call_monitor, call_firmware
call_monitor:
    str x4, [sp, #-16]!
    hvc #0
    b 3f
call_firmware:
    str x4, [sp, #-16]!
    smc #0
3:  ldr x4, [sp], #16
    cbz x4, 4f
    stp x0, x1, [x4]
    stp x2, x3, [x4, #16]
4:  ret

/* What a CPU that starts here with the MMU off does: read the word at x0's first address, leave it at the second. */
    .global lone_reader
lone_reader:
    ldp x1, x2, [x0]
    ldr x3, [x1]
    str x3, [x2]
    dsb sy
5:  wfi
    b 5b
