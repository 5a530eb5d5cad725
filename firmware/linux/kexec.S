/* What Linux's root starts in its place: a program at EL1, with the MMU off, that reads one word and says on the UART
 * what it was. attack.c fills in the word's address and the three lines. */
    .section .rodata
    .balign 4096
    .global kexec_image, kexec_target, kexec_lines, kexec_end
kexec_image:
    adr x0, vectors
    msr vbar_el1, x0
    isb
    ldr x1, kexec_target
    ldr x2, [x1]
    ldr x3, canary
    adr x0, kexec_lines
    cmp x2, x3
    b.eq say
    add x0, x0, #64
    b say
    .balign 2048
vectors:
    .rept 16
    .balign 128
    b fault
    .endr
fault:
    adr x0, kexec_lines + 128
say:
    mov x1, #0x09000000
1:  ldrb w2, [x0], #1
    cbz w2, 3f
2:  ldr w3, [x1, #0x18]
    tbnz w3, #5, 2b
    str w2, [x1]
    b 1b
3:  ldr w0, system_off
    smc #0
    b .
    .balign 8
canary: .quad 0xca4a27f00d5ec7e7
system_off: .word 0x84000008
    .balign 8
kexec_target: .quad 0
kexec_lines: .skip 192
    .balign 4096
kexec_end:
    .section .note.GNU-stack, "", %progbits
