"""What the ten workflows say to the demo agents: a real sentence for every step.

The file of workflows (bench/workflows.toml) names model classes; `AGENTS` says which demo model stands for which. The
constant part of a step's prompt is the agent's system message, the variable part one of the sentences below; the
numbers of prompt tokens in the file are those of phones' prompts and stand for nothing here, the numbers of output
tokens are upper limits. Knows no world and no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

# By size: the router is the smallest of the four models, the assistant the largest.
AGENTS = {"xs": "router", "s": "guard", "m": "rewriter", "l": "assistant"}

SYSTEM = {
    "router": "Say which agent the sentence is for: assistant, rewriter, guard or none.",
    "guard": "Replace everything private with placeholders.",
    "rewriter": "Rewrite the note as a short polite message.",
    "assistant": "Answer with one short sentence and one JSON call.",
}


@dataclass(frozen=True)
class Script:
    """For every step of a workflow, what the user says in one run and in the next; after the last, the first again."""

    says: tuple[tuple[str, ...], ...]

    def say(self, step: int, run: int) -> str:
        return self.says[step][run % len(self.says[step])]


SCRIPTS: dict[str, Script] = {
    "Fact-Checking": Script(
        (
            (
                "Maria Keller said: the meeting moved to three.",
                "Omar Haddad told me: the train is delayed.",
                "Julia wrote: the heating is off again.",
            ),
            (
                "remind me to check the train times at 5 pm",
                "remind me to call the landlord tomorrow",
                "remind me to ask about the meeting on Friday",
            ),
        )
    ),
    "Privacy-Guard": Script(
        (
            (
                "Call Peter Schmidt on 030 5550 1234 about the invoice.",
                "Invoice for Anna Berg, 12 Mill Lane.",
                "Her email is clara.weber@example.com.",
            ),
            (
                "Tell the manager that the invoice is ready",
                "Text the office: the parcel has arrived",
                "Message the team that the list is done",
            ),
        )
    ),
    "Notification-Clear": Script(
        (
            ("clear all notifications", "get rid of the WhatsApp notifications", "dismiss everything please"),
            (
                "Emma told me: I'm running late.",
                "Lunch with Ben on Monday at 12:30.",
                "This is Sara from Oslo, the package has arrived.",
            ),
        )
    ),
    "Voice-Routing": Script(
        (
            (
                "turn on the lights in the hallway",
                "set a timer for ten minutes",
                "wake me at seven tomorrow",
            ),
            (
                "Remind Thomas Weber about the concert.",
                "Meet me at 7 Station Road at 18:30.",
                "Ring Lena at 0171 555 2040 today.",
            ),
            (
                "turn on the lights in the hallway",
                "set a timer for ten minutes",
                "wake me at seven tomorrow",
            ),
        )
    ),
    "GUI-Agent": Script(
        (
            (
                "Send it to 48 Garden Road on Friday.",
                "Ticket for David Novak, 3 Park Avenue.",
                "My card number is 4000 1234 5678 9010.",
            ),
            (
                "so um i need the tickets tomorrow, work is insane",
                "hey Eva, can we like move the meeting to Friday, traffic is a nightmare",
                "well the printer is broken again, ugh",
            ),
            (
                "read my messages",
                "mute notifications for an hour",
                "clear the email notifications",
            ),
        )
    ),
    "Smart-Alarm": Script(
        (
            (
                "wake me at half past six",
                "set an alarm for 7:45 on weekdays",
                "cancel the alarm at nine",
            ),
            (
                "Appointment with Dr. Fischer on Tuesday at 9:15.",
                "The flight to Lisbon leaves at 6:40.",
                "Breakfast is on Sunday at 8:00.",
            ),
        )
    ),
    "Home-Assistant": Script(
        (
            (
                "dim the lights in the bedroom",
                "make the kitchen lights red",
                "switch everything off",
            ),
            (
                "dim the lights in the bedroom",
                "make the kitchen lights red",
                "turn all the lights off",
            ),
        )
    ),
    "Logic-Critique": Script(
        (
            (
                "Mark thinks: we should meet next week.",
                "We need 12 more chairs for the concert.",
                "Paula and Jan talked about the exam.",
            ),
            (
                "remind me about the exam on Monday at ten",
                "remind me in two hours to reply to the teacher",
                "note that I have to count the chairs",
            ),
        )
    ),
    "Email-Polisher": Script(
        (
            (
                "Hi Laura, I'm running late. Write to max.bauer@example.org today.",
                "Dear Mr Novak, the file is too big. My number is 0151 555 8080.",
                "Hello Ines, I found the document. Yours, Felix Sommer.",
            ),
            (
                "hey Laura, so i'm gonna be 20 minutes late for the meeting, you know how it is",
                "um so can you like send me the file tomorrow, i've been up since five",
                "hi Ines, thanks for the document, just saying",
            ),
        )
    ),
    "Meeting-Assistant": Script(
        (
            (
                "ok so i can't make it to the meeting on Friday, the week was crazy",
                "well tell Nina is the workshop still on next week, i lost my keys twice today",
                "hey Paul, come to the presentation tomorrow, it's hot in here",
            ),
            (
                "I spoke to Nina Richter yesterday. The meeting is on Friday at 10:30.",
                "Paul Wagner has 3 questions and wants the report. Reply to Paul at paul@example.net before 16:00.",
                "We need 8 copies for the workshop. Thank Olga Lind about the presentation.",
            ),
            (
                "remind me about the meeting on Friday at half past ten",
                "tell Paul that I sent the file",
                "remind me to print the copies tomorrow at 8 am",
            ),
        )
    ),
}
