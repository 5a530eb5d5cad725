/* A PL011: lines out, bytes in. No interrupts. */
#ifndef UART_H
#define UART_H
#include "types.h"

static inline void uart_put(u64 base, char c) {
    volatile u32 *uart = (volatile u32 *)base;
    while (uart[6] & (1u << 5)) /* FR: transmit FIFO full */
        ;
    uart[0] = (u8)c;
}

static inline void uart_text(u64 base, const char *text) {
    for (; *text; text++)
        uart_put(base, *text);
}

static inline void uart_hex(u64 base, u64 value) {
    uart_text(base, "0x");
    for (int shift = 60; shift >= 0; shift -= 4)
        if (value >> shift || shift == 0)
            uart_put(base, "0123456789abcdef"[(value >> shift) & 15]);
}

static inline char uart_get(u64 base) {
    volatile u32 *uart = (volatile u32 *)base;
    while (uart[6] & (1u << 4)) /* FR: receive FIFO empty */
        __asm__ volatile("yield");
    return (char)uart[0];
}
#endif
