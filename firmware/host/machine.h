/* The monitor's machine, played on the host: memory, the worst TLB there can be, and a trusted OS in a coroutine. */
#ifndef HOST_MACHINE_H
#define HOST_MACHINE_H
#include "../el2/machine.h"
#include "../el2/pages.h"

extern struct monitor monitor;
extern u64 memory[DRAM_PAGES][512];
/* Pages some CPU's TLB may still know: everything that was mapped since the last flush. */
extern u8 cached[DRAM_PAGES];
void machine_cache_all(void);
/* NULL, or which invariant does not hold. Assumes that no operation is under way. */
const char *pages_wrong(const struct monitor *m);
#endif
