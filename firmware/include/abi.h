/* Made by firmware/abi/generate.py from firmware/abi/monitor.toml. Do not edit. */
#ifndef ABI_H
#define ABI_H

#define ABI_VERSION 1

#define ABI_PAGE_SHIFT 12 /* a page is 4 KiB */
#define ABI_BLOCK_SHIFT 21 /* a block is 2 MiB: 512 pages, one stage-2 entry */
#define ABI_MAX_BATCH 16384 /* items in one list: 64 MiB as pages */
#define ABI_ITEM_BLOCK 1 /* bit 0 of an item: the item is a block, not a page */
#define ABI_MODE_SYNC 0 /* RECLAIM returns when the pages are back */
#define ABI_MODE_ASYNC 1 /* RECLAIM returns when the pages are chosen */
#define ABI_REQUEST_ON 1 /* in the request page: turn protection on */

/* Page states */
#define PAGE_UNPROTECTED 0 /* the normal world reads and writes it */
#define PAGE_FLEX 1 /* Flex-Mem: only the secure world does */
#define PAGE_CLAIMED 2 /* chosen for reclaim, not yet mapped back: a normal access waits */

/* Status */
#define ABI_OK 0 /* done */
#define ABI_NOT_SUPPORTED (-1) /* no call has this id here */
#define ABI_INVALID (-2) /* an argument is malformed: alignment, count, mode, unknown bits */
#define ABI_RANGE (-3) /* an address is not normal memory: monitor, secure, device or no memory at all */
#define ABI_STATE (-4) /* a page is not in the state this call starts from */
#define ABI_DUPLICATE (-5) /* the list names a page twice */
#define ABI_TICKET (-6) /* the ticket is not that of the open request */
#define ABI_UNWANTED (-7) /* more pages than were asked for */
#define ABI_BUSY (-8) /* another CPU is in the secure world, or in the monitor: try again */
#define ABI_DENIED (-9) /* this caller may not make this call */
#define ABI_OFF (-10) /* protection is off */
#define ABI_TAMPERED (-11) /* the EL2 image is not what was measured at boot: protection stays off */
#define ABI_PREEMPTED 1 /* an interrupt came: call RESUME to go on */
#define ABI_WANT_PAGES 2 /* the secure world waits for pages: x1 pages, x2 ticket; answer with DONATE */

/* Messages to the trusted OS */
#define MSG_SERVICE 1 /* x2 service, x3 and x4 its arguments */
#define MSG_GIVEN 2 /* x2 items in the mailbox were donated, x3 pages in all */
#define MSG_TAKE 3 /* x2 pages to give back, x3 mode */
#define MSG_WORK 4 /* x2 pages at most to scrub and release */
#define MSG_HURRY 5 /* x2 address of a CLAIMED page the normal world waits for */

/* Services of the trusted OS stub */
#define SVC_ECHO 1 /* answers its two arguments */
#define SVC_WANT 2 /* asks for pages (argument 1) with `rsmem_alloc` */
#define SVC_FILL 3 /* writes a pattern (argument 1) to all its Flex-Mem */
#define SVC_CHECKSUM 4 /* sum of all 64-bit words of its Flex-Mem, and the number of pages */
#define SVC_SPIN 5 /* reads its Flex-Mem so many times (argument 1): long enough to be interrupted */

/* Words of the request page */
#define REQ_REQUEST 0 /* the normal world writes REQUEST_ON; EL3 writes 0 when it has answered, and when protection changes */
#define REQ_ANSWER 1 /* status of the last switch: OK or TAMPERED */
#define REQ_STATE 2 /* whether protection is on, as PROTECT_STATUS tells it */

/* Between the levels of the firmware */
#define INT_EL2_READY 0xc3000301u /* EL2 to EL3: this CPU's EL2 is set up, enter EL1 */
#define INT_EL2_FREEZE 0xc3000302u /* EL2 to EL3: turn stage 2 off; x1 the EL1 frame to go on with */
#define INT_EL2_WINDOW 0xc3000306u /* EL2 to EL3: the idle window is x1 ticks */
#define INT_WORLD_ENTER 0xc3000303u /* EL2 to EL3: send a message (x1 to x4) to the trusted OS; returns WORLD_* */
#define INT_WORLD_REPLY 0xc3000304u /* EL2 to EL3: answer the trusted OS's secure call (x1, x2) */
#define INT_WORLD_RESUME 0xc3000305u /* EL2 to EL3: go on where an interrupt stopped the trusted OS */
#define INT_SEL1_READY 0xf2000300u /* S-EL1 to EL3: booted */
#define INT_SEL1_DONE 0xf2000301u /* S-EL1 to EL3: the message is served (x1 status, x2, x3) */
#define INT_WORLD_DONE 0 /* the trusted OS has served the message */
#define INT_WORLD_CALLS 1 /* the trusted OS makes a secure call: x1 id, x2 argument */
#define INT_WORLD_PREEMPTED 2 /* an interrupt for the normal world came */

/* calls */
#define CALL_VERSION 0xc6000100u
#define CALL_DONATE 0xc6000101u
#define CALL_RECLAIM 0xc6000102u
#define CALL_RUN 0xc6000103u
#define CALL_QUERY 0xc6000104u
#define CALL_STATS 0xc6000105u
#define CALL_SECURE_CALL 0xc6000106u
#define CALL_RESUME 0xc6000107u
#define CALL_PROTECT_OFF 0xc3000108u
#define CALL_PROTECT_ON 0xc3000109u
#define CALL_PROTECT_STATUS 0xc300010au
#define CALL_IDLE_WINDOW 0xc600010bu

/* secure calls */
#define SCALL_ALLOC 0xf2000201u
#define SCALL_CLAIM 0xf2000202u
#define SCALL_SCRUB 0xf2000203u
#define SCALL_RELEASE 0xf2000204u

/* rows the firmware's call tables must have */
#define ABI_CALLS 9
#define ABI_SCALLS 4

#endif
