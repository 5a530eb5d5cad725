"""Pure policy: events in, effects out; no I/O, no threads, no clock."""
