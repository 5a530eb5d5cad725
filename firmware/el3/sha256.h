#ifndef SHA256_H
#define SHA256_H
#include "types.h"
/* FIPS 180-4. `data` is aligned to 4 bytes. */
void sha256(const void *data, u64 bytes, u8 digest[32]);
#endif
