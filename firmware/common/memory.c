/* What the compiler calls for structures and arrays. */
#include "arm.h"

void *memset(void *to, int value, size_t bytes) {
    u8 *at = to;
    u64 word = (u8)value * 0x0101010101010101ul;
    for (; bytes && (uintptr_t)at % 8; bytes--)
        *at++ = (u8)value;
    _Pragma("GCC unroll 8") for (; bytes >= 8; bytes -= 8, at += 8)
        *(u64 *)(void *)at = word;
    while (bytes--)
        *at++ = (u8)value;
    return to;
}

void *memcpy(void *to, const void *from, size_t bytes) {
    u8 *out = to;
    const u8 *in = from;
    if (((uintptr_t)out | (uintptr_t)in) % 8 == 0)
        _Pragma("GCC unroll 8") for (; bytes >= 8; bytes -= 8, out += 8, in += 8)
            *(u64 *)(void *)out = *(const u64 *)(const void *)in;
    while (bytes--)
        *out++ = *in++;
    return to;
}

int memcmp(const void *a, const void *b, size_t bytes) {
    const u8 *x = a, *y = b;
    for (; bytes; bytes--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}
