/* Defences that a *control* build can switch off, so that an attack's positive control can succeed.
 *
 * The release build has no such switch: DEFENCE() is the constant 1 there and the word does not exist. */
#ifndef DEFENCES_H
#define DEFENCES_H
#include "types.h"

#define D_UNMAP (1u << 0)    /* protected pages leave stage 2 */
#define D_FLUSH (1u << 1)    /* TLBs forget them */
#define D_HIDE (1u << 2)     /* the monitor's memory is not in stage 2 */
#define D_DEVICES (1u << 3)  /* only named devices are in stage 2 */
#define D_RANGE (1u << 4)    /* only managed memory can be donated */
#define D_STATE (1u << 5)    /* a page's state is checked */
#define D_COPY (1u << 6)     /* a list is read once */
#define D_LIST (1u << 7)     /* a list lies in UNPROTECTED memory */
#define D_TICKET (1u << 8)   /* donations name the open request */
#define D_WANTED (1u << 9)   /* and give no more than it wants */
#define D_CALLER (1u << 10)  /* secure calls come from the secure world only */
#define D_SCRUB (1u << 11)   /* pages are zeroed before they are mapped back */
#define D_CLAIMED (1u << 12) /* an access to a CLAIMED page waits for its scrubbing */
#define D_VERIFY (1u << 13)  /* images are compared with their measurement */
#define D_REBUILD (1u << 14) /* stage 2 is built anew after it was off */
#define D_OFF (1u << 15)     /* protection goes off only without Flex-Mem */
#define D_RESET (1u << 16)   /* Flex-Mem is zeroed before a reset */
#define D_ENTRY (1u << 17)   /* CPU_ON enters UNPROTECTED memory at EL1 only */
#define D_VECTORS (1u << 18) /* a switch of worlds changes the vector registers, too */
#define D_STRAY (1u << 19)   /* EL3's interrupt without a question is ignored */
#define D_TRAPS (1u << 20)   /* what EL1 must not touch and the machine brings to EL3 is undefined for it */
#define D_COUNT (1u << 21)   /* performance counters stop in the secure world and in EL2 */
#define D_SMMU (1u << 22)    /* devices reach the DMA window only */
#define D_DMA (1u << 23)     /* which cannot be donated */
#define D_RESTART (1u << 24) /* the SMMU is set up anew before protection is on again */
#define D_FIXED (1u << 25)   /* requests are read and answered in one page, which nobody can move */
#define D_PACE (1u << 26)    /* and only so often */
#define M_BATCH (1u << 31)   /* no defence: `tz bench` compares with one TLB invalidation per page */

#ifdef CONTROLS
extern u64 defences_off;
#define DEFENCE(which) ((defences_off & (which)) == 0)
#else
#define DEFENCE(which) 1
#endif
#endif
