/* The whole address map. docs/firmware.md shows it as a table.
 *
 * Below 1 GiB: devices and secure memory, which stage 2 shows to the normal world page by page, by name.
 * From 1 GiB on: DRAM. Its last 16 MiB are the monitor's; the rest is managed page by page. */
#ifndef MEMLAYOUT_H
#define MEMLAYOUT_H
#include "abi.h"

#define PAGE_SIZE (1ul << ABI_PAGE_SHIFT)
#define BLOCK_SIZE (1ul << ABI_BLOCK_SHIFT)
#define BLOCK_PAGES (BLOCK_SIZE / PAGE_SIZE)

/* Secure: the machine itself keeps the normal world out. */
#define FLASH_BASE 0x00000000ul
#define SECURE_UART 0x09040000ul
#define SECURE_GPIO 0x090b0000ul
#define SECURE_RAM 0x0e000000ul
#define SECURE_RAM_SIZE 0x01000000ul
#define EL3_BASE SECURE_RAM
#define EL3_SIZE 0x00100000ul
#define SEL1_BASE 0x0e100000ul

/* Devices of the normal world. What is not mapped by el2/stage2.c is out of its reach. */
#define GICD_BASE 0x08000000ul
#define GICD_SIZE 0x00010000ul
#define GICR_BASE 0x080a0000ul
#define GICR_STRIDE 0x00020000ul
#define UART_BASE 0x09000000ul
#define FW_CFG_BASE 0x09020000ul
#define SMMU_BASE 0x09050000ul
#define VIRTIO_MMIO 0x0a000000ul
#define TRAP_PAGE 0x0b000000ul /* nothing: an access by AArch64 code is a call, as HVC is; programs have no HVC */
#define PCI_BASE 0x10000000ul  /* windows of PCI devices, and from ECAM_BASE on their configuration; up to DRAM */
#define ECAM_BASE 0x3f000000ul

/* Arrays over pages have a power of two of slots, so that no number leaves them. Tests have less memory. */
#ifndef DRAM_PAGES
#define DRAM_PAGES (EL2_OFFSET / PAGE_SIZE)
#define PAGE_SLOTS (1ul << 18)
#else
#define PAGE_SLOTS DRAM_PAGES
#endif
#ifndef DRAM_BASE
#define DRAM_BASE 0x40000000ul
#endif
#define EL2_OFFSET 0x3f000000ul
#define DRAM_BLOCKS (DRAM_PAGES / BLOCK_PAGES)
#define DRAM_END (DRAM_BASE + DRAM_PAGES * PAGE_SIZE)
#define EL2_BASE (DRAM_BASE + EL2_OFFSET)
#define EL2_SIZE 0x01000000ul
#define MAILBOX_BASE (EL2_BASE + 0x00800000ul)
#define MAILBOX_SIZE (ABI_MAX_BATCH * 8ul)
#define SMMU_TABLES (EL2_BASE + 0x00c00000ul)
#define SMMU_TABLES_SIZE 0x00010000ul
/* The only memory that devices reach: a block below the last one of normal memory. No page of it is ever donated. */
#define DMA_BASE (EL2_BASE - 2 * BLOCK_SIZE)
#define DMA_SIZE BLOCK_SIZE
/* The last page of normal memory: where a normal world that cannot make SMCs asks for protection. Never donated. */
#define REQUEST_PAGE (EL2_BASE - PAGE_SIZE)
#define NORMAL_BASE 0x40080000ul
/* Where QEMU's loader puts Linux, its device tree and its first files; worlds/trustzone/linux.py knows them, too. */
#define LINUX_KERNEL 0x40200000ul
#define LINUX_TREE 0x47000000ul
#define LINUX_FILES 0x48000000ul

#define MAX_CPUS 2
#endif
