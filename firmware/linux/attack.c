/* Attacks by Linux's root, which is the manager, too, on a page of Flex-Mem that holds the trusted OS's canary.
 *
 * Three processes, since the kernel may kill who touches such a page and keep what that one had locked: the owner maps
 * the page and waits; the attacker tries one thing; this one gives and takes back the page, and tells how it went. The
 * twin is the same with a page that is not given away and in which the owner wrote the canary itself. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attack.h"

#define PATIENCE_MS 20000 /* of the twin, which succeeds; the attack itself may hang in the kernel for good */
#define SPARE 0x7ee01000ul /* memory that the device tree does not name, and that is no secret's either: devicetree.py */

struct report got(uint64_t value) { return (struct report){value, 0}; }
struct report refused(void) { return (struct report){0, errno ? errno : -1}; }

static struct report touch(const struct target *t) { return got(t->at[1]); }

static struct report overwrite(const struct target *t) {
    t->at[1] = CANARY;
    return got(t->at[1]);
}

/* The kernel reads for us. */
static struct report by_syscall(const struct target *t) {
    int ends[2];
    uint64_t value = 0;
    if (pipe(ends) || write(ends[1], (const void *)(t->at + 1), 8) != 8 || read(ends[0], &value, 8) != 8)
        return refused();
    return got(value);
}

static struct report by_readv(const struct target *t) {
    uint64_t value = 0;
    struct iovec here = {&value, 8}, there = {(void *)(t->at + 1), 8};
    return process_vm_readv(t->owner, &here, 1, &there, 1, 0) == 8 ? got(value) : refused();
}

static struct report by_ptrace(const struct target *t) {
    int status;
    if (ptrace(PTRACE_ATTACH, t->owner, 0, 0) || waitpid(t->owner, &status, 0) < 0)
        return refused();
    errno = 0;
    long value = ptrace(PTRACE_PEEKDATA, t->owner, (void *)(t->at + 1), 0);
    return errno ? refused() : got((uint64_t)value);
}

static struct report read_at(const char *path, uint64_t offset) {
    uint64_t value = 0;
    int file = open(path, O_RDONLY);
    return file >= 0 && pread(file, &value, 8, (off_t)offset) == 8 ? got(value) : refused();
}

static struct report by_proc_mem(const struct target *t) {
    char path[32];
    snprintf(path, sizeof(path), "/proc/%d/mem", t->owner);
    return read_at(path, (uintptr_t)(t->at + 1));
}

/* kcore is an image of an ELF file. */
bool kernel_view(uint64_t physical, uint64_t *address, uint64_t *offset) {
    int file = open("/proc/kcore", O_RDONLY);
    Elf64_Ehdr head;
    Elf64_Phdr part;
    bool found = false;
    if (file < 0 || pread(file, &head, sizeof(head), 0) != sizeof(head))
        return false;
    for (int i = 0; i < head.e_phnum && !found; i++) {
        if (pread(file, &part, sizeof(part), (off_t)(head.e_phoff + (uint64_t)i * sizeof(part))) != sizeof(part))
            return false;
        found = part.p_type == PT_LOAD && part.p_paddr != ~0ul && physical - part.p_paddr < part.p_memsz;
        *address = part.p_vaddr + physical - part.p_paddr;
        *offset = part.p_offset + physical - part.p_paddr;
    }
    close(file);
    errno = found ? 0 : ENOENT;
    return found;
}

static struct report by_kcore(const struct target *t) {
    uint64_t address, offset;
    return kernel_view(t->frame, &address, &offset) ? read_at("/proc/kcore", offset + 8) : refused();
}

static struct report by_dev_mem(const struct target *t) {
    int file = open("/dev/mem", O_RDWR | O_SYNC);
    volatile uint64_t *at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, (off_t)t->frame);
    return at == MAP_FAILED ? refused() : got(at[1]);
}

/* The page itself into a pipe, and read there: the kernel copies from its own view. */
static struct report by_splice(const struct target *t) {
    int ends[2];
    uint64_t value[2] = {0, 0};
    struct iovec part = {(void *)t->at, 16};
    if (pipe(ends) || vmsplice(ends[1], &part, 1, 0) != 16 || read(ends[0], value, 16) != 16)
        return refused();
    return got(value[1]);
}

/* A child gets copies of pinned pages, which the kernel makes at once. */
static struct report by_fork(const struct target *t) {
    int ends[2], status;
    uint64_t value = 0;
    if (pipe(ends))
        return refused();
    pid_t child = fork();
    if (child < 0)
        return refused();
    if (child == 0) {
        value = t->at[1];
        _exit(write(ends[1], &value, 8) != 8);
    }
    if (waitpid(child, &status, 0) < 0 || !WIFEXITED(status) || read(ends[0], &value, 8) != 8)
        return refused();
    return got(value);
}

/* Another system in Linux's place, which knows where the page was. It tells the outcome itself, and ends the machine. */
extern const uint8_t kexec_image[], kexec_target[], kexec_lines[], kexec_end[];
#define KEXEC_AT 0x60000000ul

static void line_at(uint8_t *image, int index, bool twin, const char *text) {
    snprintf((char *)image + (kexec_lines - kexec_image) + 64 * index, 64, "\r\nrow linux-flex-kexec %s %d %s\r\n",
             twin ? "twin" : "real", index > 0, text);
}

static struct report start_instead(const struct target *t, bool twin) {
    const size_t size = (size_t)(kexec_end - kexec_image);
    const uint64_t word = t->frame + 8;
    uint8_t *image = malloc(size);
    struct kexec_segment segment = {.buf = image, .bufsz = size, .mem = (void *)KEXEC_AT, .memsz = size};
    memcpy(image, kexec_image, size);
    memcpy(image + (kexec_target - kexec_image), &word, sizeof(word));
    line_at(image, 0, twin, "the canary");
    line_at(image, 1, twin, "something else");
    line_at(image, 2, twin, "a fault");
    if (syscall(SYS_kexec_load, KEXEC_AT, 1, &segment, KEXEC_ARCH_AARCH64) == 0)
        syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
    return refused();
}
static struct report by_kexec(const struct target *t) { return start_instead(t, false); }
static struct report by_kexec_twin(const struct target *t) { return start_instead(t, true); }

static const struct {
    const char *name;
    attempt run;
    bool by_owner; /* otherwise by another process */
    bool spare;    /* on memory that Linux does not know: the kernel lets nobody map what it uses */
} attempts[] = {
    {"touch", touch, true, false}, {"overwrite", overwrite, true, false}, {"syscall", by_syscall, true, false},
    {"splice", by_splice, true, false}, {"fork", by_fork, true, false}, {"readv", by_readv, false, false},
    {"ptrace", by_ptrace, false, false}, {"proc-mem", by_proc_mem, false, false}, {"kcore", by_kcore, false, false},
    {"dev-mem", by_dev_mem, false, true}, {"kexec", by_kexec, false, false}, {"bpf", by_bpf, false, false},
    {"module", by_module, false, false},
};

static void tell(int to, const void *what, size_t bytes) {
    if (write(to, what, bytes) != (ssize_t)bytes)
        _exit(3);
}

/* Who may hang in the kernel for good must not keep open what others read to its end. */
static void leave_output(void) {
    int nothing = open("/dev/null", O_RDWR);
    dup2(nothing, 1);
    dup2(nothing, 2);
    close(nothing);
}

/* The owner: maps and pins the page, tells where, and waits; when told to, attacks. */
static void own(struct target t, int from, int to, attempt run, bool twin) {
    leave_output();
    struct pinned p = pin(1);
    char go;
    t.at = p.at;
    t.owner = getpid();
    for (uint64_t i = 0; i < PAGE / 8; i++)
        t.at[i] = twin ? CANARY : 0;
    if (!t.frame)
        frames_of(p.at, 1, &t.frame);
    tell(to, &t, sizeof(t));
    if (read(from, &go, 1) != 1)
        _exit(0);
    struct report r = run(&t);
    tell(to, &r, sizeof(r));
    for (;;)
        pause();
}

static int patience = PATIENCE_MS;

static bool hear(int from, void *to, size_t bytes) {
    struct pollfd p = {.fd = from, .events = POLLIN};
    return poll(&p, 1, patience) == 1 && read(from, to, bytes) == (ssize_t)bytes;
}

static const char *how_it_died(pid_t who) {
    int status = 0;
    for (int i = 0; i < patience / 10; i++, usleep(10000))
        if (waitpid(who, &status, WNOHANG) == who)
            return WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "it ended";
    return "it hangs";
}

/* The spare memory as the twin has it: the canary in it. */
static void write_spare(void) {
    int file = open("/dev/mem", O_RDWR | O_SYNC);
    volatile uint64_t *at = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, SPARE);
    if (at == MAP_FAILED)
        fail("the spare memory");
    at[1] = CANARY;
    munmap((void *)at, PAGE);
    close(file);
}

int attack(const char *name, bool twin) {
    unsigned chosen = 0;
    while (chosen < sizeof(attempts) / sizeof(*attempts) && strcmp(attempts[chosen].name, name))
        chosen++;
    if (chosen == sizeof(attempts) / sizeof(*attempts)) {
        printf("unknown attack\n");
        return 2;
    }
    int down[2], up[2];
    struct target t = {.frame = attempts[chosen].spare ? SPARE : 0};
    struct report r = {0, 0};
    if (pipe(down) || pipe(up))
        fail("pipe");
    if (attempts[chosen].spare && twin)
        write_spare();
    pid_t owner = fork();
    if (owner == 0) {
        close(down[1]);
        close(up[0]);
        own(t, down[0], up[1], attempts[chosen].run, twin);
    }
    close(up[1]);
    if (!hear(up[0], &t, sizeof(t)))
        fail("the owner");
    if (!twin) {
        if (donate(&t.frame, 1, want(1)).status != ABI_OK)
            fail("donate");
        if (monitor_call(CALL_SECURE_CALL, SVC_FILL, CANARY, 0).status != ABI_OK)
            fail("fill");
    }
    if (!twin)
        patience = PATIENCE_MS / 4;
    uint64_t before = monitor_call(CALL_SECURE_CALL, SVC_CHECKSUM, 0, 0).x1;
    pid_t who = owner;
    int from = up[0];
    bool heard;
    if (attempts[chosen].by_owner) {
        heard = write(down[1], "g", 1) == 1 && hear(from, &r, sizeof(r));
    } else {
        int own_up[2];
        if (pipe(own_up))
            fail("pipe");
        from = own_up[0];
        who = fork();
        if (who == 0) {
            leave_output();
            r = twin && attempts[chosen].run == by_kexec ? by_kexec_twin(&t) : attempts[chosen].run(&t);
            tell(own_up[1], &r, sizeof(r));
            _exit(0);
        }
        close(own_up[1]);
        heard = hear(from, &r, sizeof(r));
    }
    bool changed = monitor_call(CALL_SECURE_CALL, SVC_CHECKSUM, 0, 0).x1 != before, leaked = heard && r.value == CANARY;
    if (!heard)
        printf("%s", how_it_died(who));
    else if (r.error)
        printf("%s", strerror(r.error));
    else
        printf("%s", leaked ? "the canary" : r.value ? "something else" : "zeros");
    printf("%s\n", changed ? ", and the trusted OS reads other data" : "");
    fflush(stdout);
    if (!twin)
        monitor_call(CALL_RECLAIM, 1, ABI_MODE_SYNC, 0);
    kill(who, SIGKILL);
    kill(owner, SIGKILL);
    _exit(leaked || changed ? 0 : 1);
}
