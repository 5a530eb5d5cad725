/* Programs under Linux that call the monitor: what they share. Root only, no kernel module.
 *
 * A store to the trap page, which stage 2 never shows, is a call: EL2 finds id and arguments in x0 to x4, as with HVC. */
#ifndef MONITOR_H
#define MONITOR_H
#include <stdbool.h>
#include <stdint.h>

#include "../include/abi.h"

#define PAGE 4096ul
#define CHUNK 512ul /* pages that are pinned, given and freed together */
#define CANARY 0xca4a27f00d5ec7e7ul

struct result {
    int64_t status;
    uint64_t x1, x2, x3;
};

/* Ends the program with a message when there is no way to the monitor. */
void monitor_open(void);
/* OFF when protection is: nothing is at the trap page then, and the kernel sends SIGBUS. */
struct result monitor_once(uint64_t id, uint64_t a, uint64_t b, uint64_t c);
/* Ask EL3 for protection, in the request page, and wait for the answer. False: EL2 was tampered with, and it stays off. */
bool monitor_wake(void);
/* A REQ_* word of the request page. */
uint64_t monitor_says(uint64_t word);
/* To its end: with protection on, again while another CPU is in the way, resumed after interrupts. May answer TAMPERED. */
struct result monitor_call(uint64_t id, uint64_t a, uint64_t b, uint64_t c);

/* Pages that neither move nor go, whether or not anything maps them: pinned as an io_uring's buffer. */
struct pinned {
    void *at;
    uint64_t pages;
    int ring; /* closing it unpins */
};
struct pinned pin(uint64_t pages);
/* Physical addresses of mapped pages. */
void frames_of(const void *at, uint64_t pages, uint64_t *to);
/* Ask the trusted OS to want so many pages: the ticket. */
uint64_t want(uint64_t pages);
/* DONATE what the list names: at most CHUNK items. */
struct result donate(const uint64_t *items, uint64_t count, uint64_t ticket);
void fail(const char *what);

/* `manager attack NAME real|twin`: the exit code is 0 when the attack got what it wanted. */
int attack(const char *name, bool twin);
#endif
