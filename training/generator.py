"""Writes the demo assistant's sentences: a template, its slots filled, a frame around it, a little noise.

Deterministic in (seed, side of the split). The held-out side uses held-out templates *and* held-out
names, the training side neither. A sentence that a person wrote by hand for the evaluation is never produced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random

from . import phrases
from .forms import choose, fill, normalise, templates, trained
from .phrases import When, spoken_time
from .schema import SPANS, Call, Example, Value
from .text import items
from .words import LISTED, Words

_FRAMES = items("frames")
_QUESTIONS = ("can you", "could you", "would you", "will you", "are you able", "is it possible")

# Every intent is a section of text/templates.txt; its share of the sentences, in parts per hundred or so.
INTENTS: dict[str, float] = {
    "alarm_set": 11,
    "alarm_cancel_time": 3.5,
    "alarm_cancel_all": 2,
    "alarm_cancel_day": 2,
    "timer": 7,
    "reminder": 24,
    "lights_on": 4,
    "lights_off": 3.5,
    "lights_dim": 2,
    "lights_bright": 2,
    "lights_level": 3,
    "lights_color": 2.5,
    "lights_all": 1.5,
    "lights_all_other": 1,
    "read_app": 2.5,
    "read_all": 1.5,
    "clear_app": 1.7,
    "clear_all": 1.2,
    "mute_app": 3,
    "mute_all": 2.5,
    "unmute_app": 1.7,
    "unmute_all": 1.2,
    "message": 16,
    "greeting": 1,
    "thanks": 0.7,
    "about": 0.7,
    "other": 9,
}


@dataclass
class _Draft:
    """One sentence being written: slots add to `call` as they are filled."""

    rng: Random
    words: Words
    call: Call

    def put(self, when: When, minutes_key: str = "minutes", time_key: str = "time") -> str:
        for key, value in ((time_key, when.time), ("day", when.day), (minutes_key, when.minutes)):
            if value is not None:
                self.call[key] = value
        return when.phrase

    def span(self, key: str, text: str, said: str | None = None) -> str:
        self.call[key] = text
        return text if said is None else said

    # The slots. Each returns what is said.
    def t(self) -> str:
        return self.put(phrases.clock(self.rng))

    def d(self) -> str:
        return self.put(phrases.day(self.rng))

    def atd(self) -> str:
        if self.rng.random() < 0.45:
            return f"{self.rng.choice(['at'] * 5 + ['by', 'around'])} {self.t()}"
        return self.put(phrases.clock_and_day(self.rng))

    def td(self) -> str:
        if self.rng.random() < 0.55:
            return self.t()
        return self.put(phrases.clock_and_day(self.rng)).removeprefix("at ").removeprefix("on ")

    def dn(self) -> str:
        """A day after "for"."""
        return self.d().removeprefix("on ").removeprefix("at ").removeprefix("from ")

    def dp(self) -> str:
        """A day as owner: "tomorrow's"."""
        name = self.rng.choice(["tomorrow", "tomorrow", "today", *phrases.WEEKDAYS])
        self.call["day"] = name.lower()
        return f"{name}'s"

    def dur(self) -> str:
        return self.put(phrases.duration(self.rng))

    def durn(self) -> str:
        hours = self.rng.random() < 0.15
        n = self.rng.randint(1, 12) if hours else self.rng.randint(1, 90)
        self.call["minutes"] = n * 60 if hours else n
        said = phrases.number_words(n, True) if self.rng.random() < 0.3 else str(n)
        return f"{said}{self.rng.choice([' ', ' ', '-'])}{'hour' if hours else 'minute'}"

    def do(self) -> str:
        return self.span("text", self.words.task(self.rng))

    def about(self) -> str:
        return self.span("text", self.words.event(self.rng))

    def later(self) -> str:
        style = self.rng.random()
        if style < 0.30:
            return self.put(phrases.clock_and_day(self.rng))
        if style < 0.55:
            return f"{self.rng.choice(['at'] * 6 + ['by', 'around'])} {self.t()}"
        if style < 0.75:
            return self.put(phrases.loose_day(self.rng))
        return self.soon()

    def maybe(self) -> str:
        return self.later() if self.rng.random() < 0.6 else ""

    def soon(self) -> str:
        return self.put(phrases.from_now(self.rng), "in_minutes")

    def theroom(self) -> str:
        said, room = self.words.room(self.rng)
        return self.span("room", room, said)

    def room(self) -> str:
        return self.span("room", self.words.room(self.rng)[1])

    def pct(self) -> str:
        n = self.rng.randrange(5, 101, 5) if self.rng.random() < 0.6 else self.rng.randint(1, 100)
        special = {
            50: ["half", "half power"],
            100: ["full", "maximum", "full power"],
            1: ["the minimum", "minimum"],
        }
        self.call["brightness"] = n
        if n in special and self.rng.random() < 0.6:
            return self.rng.choice(special[n])
        said = phrases.number_words(n) if self.rng.random() < 0.25 else str(n)
        return said + self.rng.choice([" percent", " percent", " per cent", "%", "%"])

    def color(self) -> str:
        name = self.words.color(self.rng)
        self.call["color"] = name
        return name

    def onoff(self) -> str:
        state = self.rng.choice(["on", "off", "off"])
        self.call["state"] = state
        return state

    def app(self) -> str:
        return self.span("app", self.words.app(self.rng))

    def until(self) -> str:
        return self.put(phrases.clock(self.rng), time_key="until")

    def period(self) -> str:
        if self.rng.random() < 0.45:
            return f"until {self.until()}"
        return f"for {self.rng.choice(['', '', 'the next '])}{self.dur()}".replace(
            "next an ", "next "
        ).replace("next a ", "next ")

    def maybe_period(self) -> str:
        return self.period() if self.rng.random() < 0.5 else ""

    def to(self) -> str:
        said, person = self.words.person(self.rng)
        return self.span("to", person, said)

    def msg(self) -> str:
        return self.span("text", self.words.clause(self.rng))

    def plain(self) -> str:
        """The same where no "that" or colon marks its beginning: whole phrases, no loose words."""
        return self.span("text", self.words.clause(self.rng, loose=False))

    def order(self) -> str:
        return self.span("text", f"to {self.words.task(self.rng)}")

    def msgs(self) -> str:
        return self.span(
            "text",
            self.rng.choice(
                ["hello", "hi", "thank you", "sorry", "good night", "happy birthday", "congratulations"]
            )
            if self.rng.random() < 0.7
            else self.words.salad(self.rng, 3),
        )

    def ask(self) -> str:
        rng, words = self.rng, self.words
        style = rng.random()
        if style < 0.4:
            text = f"to {words.task(rng)}"
        elif style < 0.75:
            who = rng.choice(["he", "she", "they", "it", "we", words.name(rng)])
            verb = rng.choice(["can", "will", "could", "wants to", "has to", "is going to"])
            text = f"{rng.choice(['if', 'whether', 'when', 'why'])} {who} {verb} {words.task(rng)}"
        else:
            text = f"{rng.choice(['where', 'when', 'how', 'if', 'why'])} {words.event(rng)} is"
        return self.span("text", text)

    # Slots of sentences that ask for nothing the assistant can do.
    def free(self, slot: str) -> str:
        rng, words = self.rng, self.words
        makers: dict[str, Callable[[], str]] = {
            "name": lambda: words.name(rng),
            "surname": lambda: words.surname(rng),
            "place": lambda: words.city(rng),
            "thing": lambda: words.event(rng),
            "item": lambda: words.item(rng),
            "num": lambda: str(rng.choice([rng.randint(2, 99), rng.randint(1900, 2030)])),
            "adj": lambda: rng.choice(
                ["ready", "open", "expensive", "late", "good", "important", "closed", "free", "new"]
            ),
            "word": lambda: words.invented(rng),
            "salad": lambda: words.salad(rng),
            "to": lambda: words.person(rng)[0],
            "theroom": lambda: words.room(rng)[0],
            "room": lambda: words.room(rng)[1],
        }
        return makers[slot]()

    def fill(self, slot: str, asks: bool) -> str:
        if not asks:
            return self.free(slot)
        return str(getattr(self, slot)())


_CALLS: dict[str, Call] = {
    "alarm_set": {"tool": "set_alarm"},
    "alarm_cancel_time": {"tool": "cancel_alarm"},
    "alarm_cancel_all": {"tool": "cancel_alarm", "time": "all"},
    "alarm_cancel_day": {"tool": "cancel_alarm", "time": "all"},
    "timer": {"tool": "set_timer"},
    "reminder": {"tool": "set_reminder"},
    "lights_on": {"tool": "set_lights", "state": "on"},
    "lights_off": {"tool": "set_lights", "state": "off"},
    "lights_dim": {"tool": "set_lights", "state": "dim"},
    "lights_bright": {"tool": "set_lights", "state": "bright"},
    "lights_level": {"tool": "set_lights"},
    "lights_color": {"tool": "set_lights"},
    "lights_all": {"tool": "set_lights", "room": "all"},
    "lights_all_other": {"tool": "set_lights", "room": "all"},
    "read_app": {"tool": "read_notifications"},
    "read_all": {"tool": "read_notifications", "app": "all"},
    "clear_app": {"tool": "clear_notifications"},
    "clear_all": {"tool": "clear_notifications", "app": "all"},
    "mute_app": {"tool": "mute_notifications"},
    "mute_all": {"tool": "mute_notifications", "app": "all"},
    "unmute_app": {"tool": "unmute_notifications"},
    "unmute_all": {"tool": "unmute_notifications", "app": "all"},
    "message": {"tool": "send_message"},
}
_SKILLS = "I can set alarms and reminders, switch lights, handle notifications and send messages."
_NONE_REPLIES = {
    "greeting": f"Hello! {_SKILLS}",
    "thanks": "You're welcome.",
    "about": _SKILLS,
    "other": "Sorry, I can't do that. I know alarms, reminders, lights, notifications and messages.",
}
_DAYS = {"daily": "every day", "weekdays": "on weekdays", "weekends": "on weekends"}


def _when(call: Call, key: str = "time") -> str:
    day = str(call.get("day", ""))
    day = _DAYS.get(day, day if day in {"", "today", "tomorrow"} else f"on {day.capitalize()}")
    clock = f"at {spoken_time(str(call[key]))}" if key in call and call[key] != "all" else ""
    return "".join(f" {part}" for part in (clock, day) if part)


def _minutes(value: Value) -> str:
    return f"{value} minute" + ("" if value == 1 else "s")


def reply(call: Call) -> str:
    """The natural half of the answer. One form per call: greedy decoding has nothing to waver about.

    Names and texts are in the call only: copied once they are half the work, and half the mistakes.
    """
    tool = str(call["tool"])
    if tool == "set_alarm":
        return f"Alarm set{_when(call).replace(' at ', ' for ', 1)}."
    if tool == "cancel_alarm":
        return f"{'Alarm' if call['time'] != 'all' else 'All alarms'}{_when(call)} cancelled."
    if tool == "set_timer":
        return f"Timer set for {_minutes(call['minutes'])}."
    if tool == "set_reminder":
        soon = f" in {_minutes(call['in_minutes'])}" if "in_minutes" in call else ""
        return f"I'll remind you{_when(call)}{soon}."
    if tool == "set_lights":
        where = "All lights" if call["room"] == "all" else "Lights"
        if "brightness" in call:
            return f"{where} set to {call['brightness']}%."
        state = {"dim": "dimmed", "bright": "brightened"}.get(str(call.get("state")), str(call.get("state")))
        return f"{where} {call.get('color', state)}."
    what = "all notifications" if call.get("app") == "all" else "these notifications"
    if tool == "read_notifications":
        return f"Here are {what}."
    if tool == "clear_notifications":
        return f"Cleared {what}."
    if tool == "mute_notifications":
        span = f" for {_minutes(call['minutes'])}" if "minutes" in call else ""
        return f"Muted {what}{span}{_when(call, 'until').replace(' at ', ' until ', 1)}."
    if tool == "unmute_notifications":
        return f"Unmuted {what}."
    if tool == "send_message":
        return "Sending your message."
    raise ValueError(f"{tool!r} has no reply")


class Generator:
    """An endless, seeded source of examples from one side of the split."""

    def __init__(self, seed: int, held_out: bool = False, avoid: frozenset[str] = frozenset()) -> None:
        self.rng = Random(f"{seed}/{'held-out' if held_out else 'training'}")
        self.held_out = held_out
        self.avoid = avoid  # normalised sentences never to produce
        self.words = Words(held_out)

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        while True:
            example = self._one()
            if example is not None and normalise(example.say) not in self.avoid:
                return example

    def _one(self) -> Example | None:
        """None where a held-out template happens to say what a training template can say too."""
        intent = self.rng.choices(list(INTENTS), list(INTENTS.values()))[0]
        template = self.rng.choice(templates("templates", intent, self.held_out))
        asks = intent in _CALLS
        draft = _Draft(self.rng, self.words, dict(_CALLS.get(intent, {"tool": "none"})))
        template, _, kind = template.partition("#")
        if kind in {"dim", "bright"}:
            draft.call["state"] = kind
        say = choose(self.rng, template.removeprefix("= "))
        if self.held_out and normalise(say) in trained("templates", intent):
            return None
        say = fill(say, lambda slot: draft.fill(slot, asks))
        say = " ".join(say.split()).replace(" ,", ",").replace(" :", ":")
        say = say.replace(" 's ", "'s ").replace(" n't", "n't")
        say = self._frame(say, draft.call, sentence=template.startswith("= "), free_end=intent == "message")
        example = Example(say, "", draft.call)
        example = self._noise(example)
        return replace(example, reply=reply(example.call) if asks else _NONE_REPLIES[intent])

    def _frame(self, say: str, call: Call, sentence: bool, free_end: bool) -> str:
        """Politeness in front and behind; with `free_end` not behind, where it would join the message."""
        rng, question = self.rng, False
        if not sentence and rng.random() < 0.42:
            forbids = say.lower().startswith(("don't", "do not", "never"))
            prefix = rng.choice(_FRAMES["openings"] if forbids else _FRAMES["prefixes"])
            question = prefix.startswith(_QUESTIONS)
            say = f"{prefix} {say}"
        elif sentence and rng.random() < 0.1:
            say = f"{rng.choice(_FRAMES['openings'])} {say}"
        if not free_end and rng.random() < 0.16:
            say = f"{say} {rng.choice(_FRAMES['suffixes'])}".replace(" ,", ",")
        reason = rng.choice(_FRAMES["reasons"])
        where = rng.random()
        if where < 0.04:
            say = f"{reason}{rng.choice([', ', ', ', ' so ', ', so '])}{say}"
        elif where < 0.07 and not free_end:
            say = f"{say}{rng.choice([', ', ', ', ' because ', ' since '])}{reason}"
        # The call has a room or a text as it is written inside a sentence. Whether an invented word is a name,
        # and keeps a capital letter, nobody could tell.
        copied = any(say.startswith(str(call[key])) for key in SPANS & set(call))
        if rng.random() < 0.55 and not (copied and say.split()[0].strip(",:").lower() not in LISTED):
            say = say[0].upper() + say[1:]
        end = rng.random()
        if question:
            return say + ("?" if end < 0.6 else "")
        return say + ("." if end < 0.3 else "!" if end < 0.34 else "")

    def _noise(self, example: Example) -> Example:
        """What thumbs do: everything in lower case, no apostrophes, a capital missing. Spans follow."""
        rng = self.rng
        if rng.random() < 0.14:
            example = _respell(example, str.lower)
        if rng.random() < 0.05:
            example = _respell(example, lambda text: text.replace("'", ""))
        return example


def _respell(example: Example, change: Callable[[str], str]) -> Example:
    call = {
        key: change(value) if key in SPANS and isinstance(value, str) else value
        for key, value in example.call.items()
    }
    return replace(example, say=change(example.say), call=call)
