/* Boot, the images and their measurement, and where exceptions to EL3 go. */
#include "el3.h"

#include "../common/uart.h"
#include "digests.h"
#include "inject.h"
#include "psci.h"
#include "sha256.h"

ALIGNED(16) u8 el3_stacks[MAX_CPUS][1 << 14];
u32 el3_awake;

#ifdef CONTROLS
/* The test harness finds the text in the flash image and writes the word after it. */
struct {
    char text[24];
    u64 off;
} const volatile defences_in_flash __attribute__((section(".data"))) = {"DEFENCES SWITCHED OFF: ", 0};
u64 defences_off;
#endif

/* Every image: where in flash, where to, and what its SHA-256 must be (made by the build). */
static const struct image {
    const char *refusal;
    const u8 *from;
    u64 to, bytes;
    u8 digest[32];
} images[] = {
    {"image el2 is not the one this firmware was built with", payload_el2, EL2_BASE, EL2_BYTES, EL2_DIGEST},
    {"image sel1 is not the one this firmware was built with", payload_sel1, SEL1_BASE, SEL1_BYTES, SEL1_DIGEST},
    {"image normal is not the one this firmware was built with", payload_normal, NORMAL_BASE, NORMAL_BYTES, NORMAL_DIGEST},
};

_Noreturn void panic(const char *why, u64 value) {
    uart_text(SECURE_UART, "el3 stops: ");
    uart_text(SECURE_UART, why);
    uart_put(SECURE_UART, ' ');
    uart_hex(SECURE_UART, value);
    uart_text(SECURE_UART, "\n");
    for (;;)
        wfi();
}

static bool intact(const struct image *image) {
    u8 digest[32];
    sha256((const void *)image->to, image->bytes, digest);
    return memcmp(digest, image->digest, sizeof(digest)) == 0 || !DEFENCE(D_VERIFY);
}

bool el2_intact(void) { return intact(&images[0]); }

u64 normal_scr(void) { return protection == PROTECTION_ON ? SCR_NORMAL : SCR_UNPROTECTED; }

void enter_el1(struct frame *f, u64 entry, u64 argument) {
    memset(f, 0, sizeof(*f));
    f->elr = entry;
    f->spsr = MODE_EL1H;
    f->x[0] = argument;
}

/* EL2 at its one entry, with nothing of its own left: MMU off, no stage 2, registers as at reset. */
void enter_el2(struct frame *f, u32 cpu, bool build) {
    memset(f, 0, sizeof(*f));
    f->elr = EL2_BASE;
    f->spsr = MODE_EL2H;
    f->x[0] = cpu;
    f->x[1] = build;
#ifdef CONTROLS
    f->x[2] = defences_off;
#endif
    write_reg(hcr_el2, HCR_UNPROTECTED);
    write_reg(sctlr_el2, SCTLR_EL23_RES1);
    write_reg(vbar_el2, EL2_BASE);
    write_reg(cptr_el2, 0x33ff);
    write_reg(hstr_el2, 0);
    write_reg(vttbr_el2, 0);
    write_reg(ttbr0_el2, 0);
    write_reg(tpidr_el2, 0);
    isb();
    __asm__ volatile("tlbi alle2is\n tlbi alle1is\n ic ialluis\n dsb sy\n isb" : : : "memory");
}

static void load_images(void) {
    for (u64 i = 0; i < COUNT(images); i++) {
        memcpy((void *)images[i].to, images[i].from, images[i].bytes);
        if (!intact(&images[i]))
            panic(images[i].refusal, images[i].to);
    }
    uart_text(SECURE_UART, "el3: images verified\n");
    dsb();
    __asm__ volatile("ic ialluis\n dsb sy\n isb");
}

_Noreturn void el3_main(u32 cpu) {
    struct frame f;
    if (cpu == 0)
        mmu_build();
    mmu_on();
#ifdef CONTROLS
    defences_off = defences_in_flash.off;
#endif
    write_reg(cptr_el3, 0);
    write_reg(mdcr_el3, MDCR_NO_SECURE_DEBUG | (DEFENCE(D_COUNT) ? 0 : MDCR_SECURE_COUNT)); /* nor counting there */
    write_reg(cnthctl_el2, 3);
    if (cpu == 0) {
        gic_init_distributor();
        smmu_start();
        load_images();
        __atomic_store_n(&el3_awake, 1, __ATOMIC_RELEASE);
        gic_init_cpu(cpu);
        protect_start();
        world_boot(&f);
        el3_leave(&f);
    }
    if (cpu >= MAX_CPUS)
        for (;;)
            wfi();
    gic_init_cpu(cpu);
    cpu_park(cpu);
}

static void smc_from_el2(struct frame *f, u32 cpu) {
    switch (f->x[0]) {
    case INT_EL2_READY:
        return el2_ready(f, cpu);
    case INT_EL2_FREEZE:
        return protect_off(f, cpu);
    case INT_EL2_WINDOW:
        return protect_window(f, cpu);
    case INT_WORLD_ENTER:
    case INT_WORLD_REPLY:
    case INT_WORLD_RESUME:
        return world_serve(f, cpu);
    default:
        if (!psci_serve(f, cpu))
            f->x[0] = (u64)ABI_NOT_SUPPORTED;
    }
}

/* Only while protection is off does an SMC of EL1 come here. */
static void smc_from_el1(struct frame *f, u32 cpu) {
    switch (f->x[0]) {
    case CALL_PROTECT_ON:
        return protect_on(f, cpu);
    case CALL_PROTECT_OFF:
        f->x[0] = (u64)ABI_OFF;
        return;
    case CALL_PROTECT_STATUS:
        f->x[0] = ABI_OK;
        f->x[1] = protection == PROTECTION_TAMPERED ? 2 : 0;
        return;
    default:
        if (!psci_serve(f, cpu))
            f->x[0] = (u64)ABI_NOT_SUPPORTED;
    }
}

void el3_exception(struct frame *f, u64 vector) {
    u32 cpu = (u32)read_reg(tpidr_el3);
    bool secure = !(read_reg(scr_el3) & 1);
    if (vector == 8 && EC(read_reg(esr_el3)) == 0x17) { /* SMC of a lower level; ELR is behind it */
        if (secure) {
            if (!world_secure_call(f, cpu))
                panic("the trusted os made an unknown call", f->x[0]);
        } else if (SPSR_LEVEL(f->spsr) == 2) {
            smc_from_el2(f, cpu);
        } else {
            smc_from_el1(f, cpu);
        }
    } else if (vector == 8 && EC(read_reg(esr_el3)) == EC_REGISTER && !secure && SPSR_LEVEL(f->spsr) < 2 && DEFENCE(D_TRAPS)) {
        inject_undefined(f); /* a register of group-0 interrupts */
    } else if (vector == 10 || vector == 14) { /* FIQ */
        const u32 id = gic_acknowledge();
        if (id == RENDEZVOUS_SGI)
            rendezvous_answer(f, cpu);
        else if (id == TIMER_PPI)
            protect_tick(f, cpu);
        else if (secure)
            world_preempt(f, cpu);
    } else {
        uart_text(SECURE_UART, "el3 exception at ");
        uart_hex(SECURE_UART, f->elr);
        uart_text(SECURE_UART, " address ");
        uart_hex(SECURE_UART, read_reg(far_el3));
        uart_text(SECURE_UART, "\n");
        panic("unexpected exception", read_reg(esr_el3));
    }
}
