/* The monitor as a shared library: real calls, a real trusted OS list, no hardware. Driven by tests/monitor through ctypes.
 *
 * The trusted OS is a coroutine, so that it can be interrupted between any two of its calls, as on the machine. */
#include <string.h>
#include <ucontext.h>

#include "../el2/calls.h"
#include "../sel1/flexmem.h"
#include "machine.h"

u64 *const flexmem_mailbox = mailbox;
static struct flexmem flexmem;
static u8 mapped_by_os[DRAM_PAGES];
static u8 dirty[DRAM_PAGES]; /* memory that a reset has to zero */
static const char *broken;

static ucontext_t monitor_side, os_side;
static u64 os_stack[1 << 15];
static struct world_exit os_exit;
static u64 os_message[4];
static struct reply os_answer;
static u64 interrupt_in; /* calls of the trusted OS until an interrupt comes; 0: never */

static struct world_exit visit(void) {
    swapcontext(&monitor_side, &os_side);
    return os_exit;
}

static void leave_os(u64 kind, u64 a, u64 b, u64 c) {
    os_exit = (struct world_exit){kind, {a, b, c}};
    swapcontext(&os_side, &monitor_side);
}

struct world_exit world_enter(const u64 message[4]) {
    memcpy(os_message, message, sizeof(os_message));
    return visit();
}

struct world_exit world_reply(s64 status, u64 value) {
    os_answer.status = status;
    os_answer.value[0] = value;
    return visit();
}

struct world_exit world_resume(void) { return visit(); }

s64 monitor_call(u32 id, u64 arg, u64 *value) {
    if (interrupt_in && --interrupt_in == 0)
        leave_os(INT_WORLD_PREEMPTED, 0, 0, 0);
    leave_os(INT_WORLD_CALLS, id, arg, 0);
    *value = os_answer.value[0];
    if (os_answer.status != ABI_OK && id != SCALL_ALLOC)
        broken = "the monitor refused a call of the trusted OS";
    return os_answer.status;
}

u64 flexmem_map(u64 *to, const u64 *items, u64 count) {
    u64 blocks = 0;
    for (u64 i = 0; i < count; i++) {
        u64 bytes = item_bytes(to[i] = items[i]);
        blocks += items[i] & ABI_ITEM_BLOCK;
        for (u64 page = (item_address(items[i]) - DRAM_BASE) / PAGE_SIZE; bytes; page++, bytes -= PAGE_SIZE) {
            if (mapped_by_os[page] || cached[page])
                broken = "a page is given that is in use";
            mapped_by_os[page] = dirty[page] = 1;
            memory[page][0] = memory[page][511] = 0x5ec7e7; /* a secret */
        }
    }
    return blocks;
}

void flexmem_unmap(u64 *to, u64 *also, const u64 *items, u64 count) {
    for (u64 i = 0; i < count; i++) {
        u64 bytes = item_bytes(to[i] = also[i] = items[i]);
        for (u64 page = (item_address(items[i]) - DRAM_BASE) / PAGE_SIZE; bytes; page++, bytes -= PAGE_SIZE) {
            if (!mapped_by_os[page])
                broken = "a page is taken that was not given";
            mapped_by_os[page] = 0;
        }
    }
}

static void serve(void) {
    struct reply reply = {.status = ABI_NOT_SUPPORTED};
    if (os_message[0] == MSG_SERVICE && os_message[1] == SVC_WANT) {
        u64 ticket = 0;
        reply.status = monitor_call(SCALL_ALLOC, os_message[2], &ticket);
        if (reply.status == ABI_OK)
            reply = (struct reply){ABI_WANT_PAGES, {os_message[2], ticket}};
    } else if (os_message[0] == MSG_SERVICE && os_message[1] == SVC_ECHO) {
        reply = (struct reply){ABI_OK, {os_message[2], os_message[3]}};
    } else {
        flexmem_message(&flexmem, os_message, &reply);
    }
    leave_os(INT_WORLD_DONE, (u64)reply.status, reply.value[0], reply.value[1]);
}

static void os_main(void) {
    for (;;)
        serve();
}

void host_reset(void) {
    memset(&monitor, 0xff, sizeof(monitor)); /* as EL2 finds memory after protection was off */
    memset(&flexmem, 0, sizeof(flexmem));
    memset(&session, 0, sizeof(session));
    memset(mapped_by_os, 0, sizeof(mapped_by_os));
    for (u64 page = 0; page < DRAM_PAGES; page++)
        if (dirty[page])
            memset(memory[page], 0, sizeof(memory[page]));
    memset(dirty, 0, sizeof(dirty));
    broken = NULL;
    interrupt_in = 0;
    pages_init(&monitor);
    machine_flush();
    getcontext(&os_side);
    os_side.uc_stack.ss_sp = os_stack;
    os_side.uc_stack.ss_size = sizeof(os_stack);
    makecontext(&os_side, os_main, 0);
}

void host_interrupt_in(u64 calls) { interrupt_in = calls; }

void host_call(u32 cpu, u32 id, const u64 args[4], u64 result[RESULTS]) {
    struct call call = {.cpu = cpu};
    memcpy(call.arg, args, sizeof(call.arg));
    machine_cache_all();
    call_normal(&monitor, id, &call);
    machine_cache_all();
    memcpy(result, call.result, sizeof(call.result));
}

/* The normal world's kernel writes to memory it can reach. False: it cannot. */
bool host_write(u64 address, u64 value) {
    u64 page = (address - DRAM_BASE) / PAGE_SIZE;
    machine_cache_all();
    if (page >= DRAM_PAGES || !cached[page])
        return false;
    memory[page][address / 8 % 512] = value;
    dirty[page] = 1;
    return true;
}

/* It reads: 0 a value, 1 a fault that ends the access, 2 a fault to try again after (CLAIMED). */
u32 host_read(u32 cpu, u64 address, u64 *value) {
    u64 page = (address - DRAM_BASE) / PAGE_SIZE;
    machine_cache_all();
    if (page < DRAM_PAGES && cached[page]) {
        *value = memory[page][address / 8 % 512];
        return 0;
    }
    if (page_state(&monitor, address & ~(PAGE_SIZE - 1)) != PAGE_CLAIMED)
        return 1;
    session_hurry(&monitor, cpu, address);
    return 2;
}

s64 host_state(u64 address) { return page_state(&monitor, address); }

/* NULL, or what is wrong. Only between calls. */
const char *host_wrong(void) {
    if (broken)
        return broken;
    for (u64 page = 0; page < DRAM_PAGES; page++) {
        if (!dirty[page])
            continue; /* nobody ever wrote there */
        bool secret = memory[page][0] == 0x5ec7e7 || memory[page][511] == 0x5ec7e7;
        if (secret && (cached[page] || monitor.entry[page] == ENTRY_UNPROTECTED))
            return "the normal world can read a secret";
        if (mapped_by_os[page] && monitor.entry[page] != ENTRY_FLEX)
            return "the trusted OS uses a page that is not FLEX";
    }
    return session.state == SESSION_PREEMPTED ? NULL : pages_wrong(&monitor);
}
