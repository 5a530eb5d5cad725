/* Attacks through devices that copy memory: a virtio disk and virtio-rng, PCI functions behind the SMMU.
 *
 * The kernel owns them: configuration, windows, queues, addresses. What they reach is the SMMU's to say. */
#include "kernel.h"

#include <stddef.h>

#include "../el2/pages.h"
#include "el2_symbols.h"

#define WINDOW PCI_BASE
#define DISK 0x10421af4u   /* virtio-blk */
#define RANDOM 0x10441af4u /* virtio-rng */
#define BYTES 512ul        /* one sector */
#define QUEUE DMA_BASE     /* what the device must read itself lies in the window: descriptors, available, used, head */
#define HEAD (QUEUE + 3 * PAGE_SIZE)
#define SCRATCH (QUEUE + 4 * PAGE_SIZE)
#define DEVICE_WRITES 2ul
#define MORE 1ul

static volatile u32 *config(u64 function, u64 offset) { return (volatile u32 *)(ECAM_BASE + (function << 12) + offset); }

static u64 find_function(u32 id) {
    for (u64 function = 0; function < 256; function += 8)
        if (*config(function, 0) == id)
            return function;
    say("set-up failed: no such device\n");
    return 0;
}

/* The device's registers, BAR 4, at an address of ours. */
static u64 open_function(u32 id, u64 address) {
    u64 function = find_function(id);
    *config(function, 0x20) = (u32)address;
    *config(function, 0x24) = 0;
    *config(function, 4) = 6; /* memory, bus master */
    return function;
}

/* virtio 1.2, 4.1: where a part of the device is in its BAR. */
static u64 part(u64 function, u32 type, u32 *more) {
    for (u64 at = *config(function, 0x34) & 0xff; at; at = *config(function, at) >> 8 & 0xff) {
        u32 head = *config(function, at);
        if ((head & 0xff) == 9 && head >> 24 == type) {
            if (more)
                *more = *config(function, at + 16);
            return WINDOW + *config(function, at + 8);
        }
    }
    return 0;
}

static void describe(u64 index, u64 address, u64 bytes, u64 flags) {
    store(QUEUE + 16 * index, address);
    store(QUEUE + 16 * index + 8, bytes | flags << 32 | (index + 1) << 48);
}

/* Reset the device, give it the chain of descriptors from 0 on, and wait until it has used it, or for half a second. */
static bool request(u32 id) {
    u32 multiplier = 0;
    u64 function = open_function(id, WINDOW), common = part(function, 1, NULL), notify = part(function, 2, &multiplier);
    volatile u8 *status = (volatile u8 *)(common + 20);
    *status = 0;
    *status = 3; /* acknowledged, driver */
    *(volatile u32 *)(common + 8) = 1;
    *(volatile u32 *)(common + 12) = 3; /* version 1, and addresses are the SMMU's to translate */
    *status = 11;
    store(QUEUE + PAGE_SIZE, 1ul << 16); /* one available: descriptor 0 */
    store(QUEUE + 2 * PAGE_SIZE, 0);
    *(volatile u16 *)(common + 22) = 0;
    *(volatile u16 *)(common + 24) = 8;
    for (u64 i = 0; i < 3; i++) {
        *(volatile u32 *)(common + 32 + 8 * i) = (u32)(QUEUE + i * PAGE_SIZE);
        *(volatile u32 *)(common + 36 + 8 * i) = 0;
    }
    *(volatile u16 *)(common + 28) = 1;
    *status = 15;
    dsb();
    *(volatile u16 *)(notify + *(volatile u16 *)(common + 30) * multiplier) = 0;
    u64 until = read_reg(cntpct_el0) + read_reg(cntfrq_el0) / 2;
    while (read_reg(cntpct_el0) < until && !(load(QUEUE + 2 * PAGE_SIZE, 0) >> 16 & 0xffff))
        pause();
    bool used = load(QUEUE + 2 * PAGE_SIZE, 0) >> 16 & 0xffff;
    *status = 0;
    *config(function, 4) = 0;
    return used;
}

/* The disk's first sector, from memory or back. */
static void disk_copy(u64 address, bool back) {
    store(HEAD, back ? 0 : 1);
    store(HEAD + 8, 0);
    describe(0, HEAD, 16, MORE);
    describe(1, address, BYTES, MORE | (back ? DEVICE_WRITES : 0));
    describe(2, HEAD + 64, 1, DEVICE_WRITES);
    request(DISK);
}

static void disk_fill(u64 value) {
    for (u64 i = 0; i < BYTES; i += 8)
        store(SCRATCH + i, value);
    disk_copy(SCRATCH, false);
}

/* What the device reads at an address, by way of the disk. */
static u64 disk_load(u64 address) {
    disk_fill(0);
    disk_copy(address, false);
    store(SCRATCH + 8, 0);
    disk_copy(SCRATCH, true);
    return load(SCRATCH + 8, 0);
}

static bool seen_by_device(struct outcome *out, u64 value, u64 secret, const char *name) {
    out->value = value;
    out->seen = value == secret ? name : value ? "something else" : "the device gets nothing";
    return value == secret;
}

static bool dma_read(struct outcome *out, bool twin) {
    (void)twin;
    give(VICTIM, 1);
    return seen_by_device(out, disk_load(VICTIM), CANARY, "the canary");
}

static bool changed_by_device(struct outcome *out, u64 before) {
    u64 after = checksum();
    out->value = after - before;
    out->seen = before == after ? "no change" : "the device wrote to Flex-Mem";
    return before != after;
}

static bool dma_write(struct outcome *out, bool twin) {
    (void)twin;
    give(VICTIM, 1);
    u64 before = checksum();
    disk_fill(1);
    disk_copy(VICTIM, true);
    return changed_by_device(out, before);
}

/* EL2's count of Flex-Mem: a device that writes there writes to tables and states, too. */
static bool dma_el2(struct outcome *out, bool twin) {
    u64 r[4];
    (void)twin;
    disk_fill(77);
    disk_copy(EL2_MONITOR + offsetof(struct monitor, flex) - 8, true); /* and the neighbours: wanted, claimed, flushes */
    call_monitor(CALL_STATS, 0, 0, 0, r);
    out->value = r[0];
    out->seen = r[0] == 77 ? "EL2 believes the device" : "no change";
    return r[0] == 77;
}

static bool dma_secure(struct outcome *out, bool twin) {
    store(SCRATCH + 2 * PAGE_SIZE + 8, CANARY);
    u64 value = disk_load(twin ? SCRATCH + 2 * PAGE_SIZE : SEL1_BASE);
    out->value = value;
    out->seen = value ? "what is there" : "the device gets nothing";
    return value != 0;
}

/* The window a device reaches, given away: what the trusted OS keeps there the device reads. */
static bool dma_window(struct outcome *out, bool twin) {
    u64 r[4], ticket = want(1);
    (void)twin;
    put_item(0, SCRATCH + 3 * PAGE_SIZE);
    s64 status = donate(ticket, 1, r);
    if (status != ABI_OK) {
        out->seen = "refused";
        out->value = (u64)status;
        return false;
    }
    service(SVC_FILL, CANARY, 0, r);
    return seen_by_device(out, disk_load(SCRATCH + 3 * PAGE_SIZE), CANARY, "the canary");
}

static u64 smmu_off(u64 address, u64 unused) {
    (void)unused;
    *(volatile u32 *)address = 0; /* CR0 */
    return 0;
}

static bool smmu_registers(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 esr = guarded(smmu_off, SMMU_BASE + 0x20, 0, &value);
    if (esr)
        return faulted(out, esr, 0, "");
    return seen_by_device(out, disk_load(VICTIM), CANARY, "the canary");
}

/* A second stream table would do, too; this one says "bypass" in the first word. */
static bool smmu_tables(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    give(VICTIM, 1);
    u64 function = find_function(DISK);
    u64 esr = guarded(store, SMMU_TABLES + function * 64, 4ul << 1 | 1, &value);
    if (esr)
        return faulted(out, esr, 0, "");
    return seen_by_device(out, disk_load(VICTIM), CANARY, "the canary");
}

/* While protection is off the SMMU is anybody's. */
static bool smmu_while_off(struct outcome *out, bool twin) {
    u64 value = 0;
    (void)twin;
    call_firmware(CALL_PROTECT_OFF, 0, 0, 0, NULL);
    guarded(smmu_off, SMMU_BASE + 0x20, 0, &value);
    if (call_firmware(CALL_PROTECT_ON, 0, 0, 0, NULL) != ABI_OK) {
        out->seen = "stayed off";
        return false;
    }
    give(VICTIM, 1);
    return seen_by_device(out, disk_load(VICTIM), CANARY, "the canary");
}

/* A device's window, moved onto Flex-Mem: whoever uses the page would talk to the device. The twin moves it where it may be. */
static bool bar_move(struct outcome *out, bool twin) {
    u64 value = 0, to = twin ? WINDOW + 0x1000000 : VICTIM;
    give(VICTIM, 1);
    u64 function = open_function(DISK, to), esr = guarded(load, to, 0, &value);
    bool intact = checksum() == CANARY * (PAGE_SIZE / 8);
    *config(function, 4) = 0;
    faulted(out, esr, value, "the device answers there");
    if (!intact)
        out->seen = "the trusted OS talks to the device";
    return esr == 0 || !intact;
}

/* The device writes random bytes to where its queue says; the queue lies in the window. */
static bool dma_random(struct outcome *out, bool twin) {
    const u64 target = twin ? SCRATCH : VICTIM;
    give(VICTIM, 1);
    store(SCRATCH, 0);
    u64 before = checksum();
    describe(0, target, BYTES, DEVICE_WRITES);
    bool used = request(RANDOM);
    if (!twin)
        return changed_by_device(out, before);
    out->value = load(target, 0);
    out->seen = used && out->value ? "the device wrote" : "it does not work";
    return out->value;
}

const struct attack dma_attacks[] = {
    {"dma-read", dma_read}, {"dma-write", dma_write}, {"dma-el2", dma_el2}, {"dma-secure", dma_secure},
    {"dma-window", dma_window}, {"dma-random", dma_random}, {"smmu-registers", smmu_registers},
    {"smmu-tables", smmu_tables}, {"smmu-while-off", smmu_while_off}, {"bar-move", bar_move}, {NULL, NULL},
};
