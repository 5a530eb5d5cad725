/* The normal world's first code when it is to be Linux.
 *
 * Enters a Linux kernel that lies in DRAM already, as its boot protocol wants: x0 the device tree, the rest 0. */
#include "memlayout.h"

    .section .text.start, "ax"
    .global _start
_start:
    ldr x0, =LINUX_TREE
    mov x1, xzr
    mov x2, xzr
    mov x3, xzr
    ldr x4, =LINUX_KERNEL
    br x4
