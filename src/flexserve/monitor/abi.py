"""The Flex-Monitor's interface. Made by firmware/abi/generate.py from firmware/abi/monitor.toml. Do not edit."""

from enum import IntEnum

VERSION = 1
PAGE_SHIFT = 12  # a page is 4 KiB
BLOCK_SHIFT = 21  # a block is 2 MiB: 512 pages, one stage-2 entry
MAX_BATCH = 16384  # items in one list: 64 MiB as pages
ITEM_BLOCK = 1  # bit 0 of an item: the item is a block, not a page
MODE_SYNC = 0  # RECLAIM returns when the pages are back
MODE_ASYNC = 1  # RECLAIM returns when the pages are chosen
REQUEST_ON = 1  # in the request page: turn protection on


class State(IntEnum):
    """Page states."""

    UNPROTECTED = 0  # the normal world reads and writes it
    FLEX = 1  # Flex-Mem: only the secure world does
    CLAIMED = 2  # chosen for reclaim, not yet mapped back: a normal access waits


class Status(IntEnum):
    """Status."""

    OK = 0  # done
    NOT_SUPPORTED = -1  # no call has this id here
    INVALID = -2  # an argument is malformed: alignment, count, mode, unknown bits
    RANGE = -3  # an address is not normal memory: monitor, secure, device or no memory at all
    STATE = -4  # a page is not in the state this call starts from
    DUPLICATE = -5  # the list names a page twice
    TICKET = -6  # the ticket is not that of the open request
    UNWANTED = -7  # more pages than were asked for
    BUSY = -8  # another CPU is in the secure world, or in the monitor: try again
    DENIED = -9  # this caller may not make this call
    OFF = -10  # protection is off
    TAMPERED = -11  # the EL2 image is not what was measured at boot: protection stays off
    PREEMPTED = 1  # an interrupt came: call RESUME to go on
    WANT_PAGES = 2  # the secure world waits for pages: x1 pages, x2 ticket; answer with DONATE


class Message(IntEnum):
    """Messages to the trusted OS."""

    SERVICE = 1  # x2 service, x3 and x4 its arguments
    GIVEN = 2  # x2 items in the mailbox were donated, x3 pages in all
    TAKE = 3  # x2 pages to give back, x3 mode
    WORK = 4  # x2 pages at most to scrub and release
    HURRY = 5  # x2 address of a CLAIMED page the normal world waits for


class Service(IntEnum):
    """Services of the trusted OS stub."""

    ECHO = 1  # answers its two arguments
    WANT = 2  # asks for pages (argument 1) with `rsmem_alloc`
    FILL = 3  # writes a pattern (argument 1) to all its Flex-Mem
    CHECKSUM = 4  # sum of all 64-bit words of its Flex-Mem, and the number of pages
    SPIN = 5  # reads its Flex-Mem so many times (argument 1): long enough to be interrupted


class RequestWord(IntEnum):
    """Words of the request page."""

    REQUEST = 0  # the normal world writes REQUEST_ON; EL3 writes 0 when it has answered, and when protection changes
    ANSWER = 1  # status of the last switch: OK or TAMPERED
    STATE = 2  # whether protection is on, as PROTECT_STATUS tells it


class Internal(IntEnum):
    """Between the levels of the firmware."""

    EL2_READY = 0xC3000301  # EL2 to EL3: this CPU's EL2 is set up, enter EL1
    EL2_FREEZE = 0xC3000302  # EL2 to EL3: turn stage 2 off; x1 the EL1 frame to go on with
    EL2_WINDOW = 0xC3000306  # EL2 to EL3: the idle window is x1 ticks
    WORLD_ENTER = 0xC3000303  # EL2 to EL3: send a message (x1 to x4) to the trusted OS; returns WORLD_*
    WORLD_REPLY = 0xC3000304  # EL2 to EL3: answer the trusted OS's secure call (x1, x2)
    WORLD_RESUME = 0xC3000305  # EL2 to EL3: go on where an interrupt stopped the trusted OS
    SEL1_READY = 0xF2000300  # S-EL1 to EL3: booted
    SEL1_DONE = 0xF2000301  # S-EL1 to EL3: the message is served (x1 status, x2, x3)
    WORLD_DONE = 0  # the trusted OS has served the message
    WORLD_CALLS = 1  # the trusted OS makes a secure call: x1 id, x2 argument
    WORLD_PREEMPTED = 2  # an interrupt for the normal world came


class Call(IntEnum):
    """Calls of the normal world."""

    VERSION = 0xC6000100
    DONATE = 0xC6000101
    RECLAIM = 0xC6000102
    RUN = 0xC6000103
    QUERY = 0xC6000104
    STATS = 0xC6000105
    SECURE_CALL = 0xC6000106
    RESUME = 0xC6000107
    PROTECT_OFF = 0xC3000108
    PROTECT_ON = 0xC3000109
    PROTECT_STATUS = 0xC300010A
    IDLE_WINDOW = 0xC600010B


class SecureCall(IntEnum):
    """Calls of the trusted OS."""

    ALLOC = 0xF2000201
    CLAIM = 0xF2000202
    SCRUB = 0xF2000203
    RELEASE = 0xF2000204
