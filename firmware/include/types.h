/* Short names for sizes, and the few macros everybody needs. */
#ifndef TYPES_H
#define TYPES_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t s64;

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define ALIGNED(bytes) __attribute__((aligned(bytes)))
#endif
