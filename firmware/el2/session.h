/* Visits to the trusted OS, for calls.c. Messages are MSG_* of the interface. */
#ifndef SESSION_H
#define SESSION_H
#include "calls.h"

/* Take the session, or answer BUSY. */
bool session_take(struct call *call);
void session_drop(void);
/* With the session taken: send a message, serve it, fill the call's result, and leave the session. */
void session_send(struct monitor *m, struct call *call, u64 message, u64 a, u64 b, u64 c);
/* Go on with a preempted visit. */
void session_resume(struct monitor *m, struct call *call);
#endif
