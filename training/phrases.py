"""English for clock times, days and durations, each with the value it means.

One rule for hours said without am or pm: they are read as on a 24-hour clock ("at seven" is 07:00), unless
the sentence names a part of the day.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


@dataclass(frozen=True)
class When:
    """A phrase and what it fixes; None for what it does not say."""

    phrase: str
    time: str | None = None  # HH:MM
    day: str | None = None
    minutes: int | None = None  # from now


def number_words(n: int, hyphen: bool = False) -> str:
    """0 to 100 in words."""
    if n < 20:
        return _ONES[n]
    if n == 100:
        return "a hundred"
    tens, ones = divmod(n, 10)
    return _TENS[tens] + (("-" if hyphen else " ") + _ONES[ones] if ones else "")


def _number(rng: Random, n: int) -> str:
    return number_words(n, rng.random() < 0.4) if n <= 100 and rng.random() < 0.4 else str(n)


def _minute(rng: Random) -> int:
    if rng.random() < 0.35:
        return 0
    return rng.randrange(0, 60, 5) if rng.random() < 0.75 else rng.randrange(60)


def _hhmm(hour: int, minute: int) -> str:
    return f"{hour % 24:02d}:{minute:02d}"


def spoken_time(time: str) -> str:
    """ "19:30" as "7:30 pm", the form replies use."""
    hour, minute = int(time[:2]), time[3:]
    clock = str((hour + 11) % 12 + 1) + ("" if minute == "00" else f":{minute}")
    return f"{clock} {'am' if hour < 12 else 'pm'}"


def _clock12(rng: Random) -> tuple[str, int, int]:
    """A time in words or digits on a 12-hour dial: phrase, hour 1 to 12, minute."""
    hour, minute = rng.randint(1, 12), _minute(rng)
    style = rng.random()
    words = rng.random() < 0.65
    say_hour = number_words(hour) if words else str(hour)
    if style < 0.5:
        before = number_words(hour % 12 + 1) if words else str(hour % 12 + 1)
        if minute == 0:
            return (
                rng.choice([say_hour, say_hour, say_hour, f"{say_hour} o'clock", f"{say_hour} sharp"]),
                hour,
                0,
            )
        if minute == 30:
            return (
                rng.choice([f"half past {say_hour}"] * 3 + [f"half {say_hour}", f"{say_hour} thirty"]),
                hour,
                30,
            )
        if minute in {15, 45}:
            a = rng.choice(["", "a "])
            if minute == 15:
                return f"{a}quarter {rng.choice(['past', 'past', 'after'])} {say_hour}", hour, 15
            return f"{a}quarter {rng.choice(['to', 'to', 'to', 'before'])} {before}", hour, 45
        if minute % 5 == 0:
            if minute < 30:
                return f"{number_words(minute)} past {say_hour}", hour, minute
            return f"{number_words(60 - minute)} to {before}", hour, minute
        if rng.random() < 0.8:  # nobody says "22 minutes to two" often
            return f"{hour}:{minute:02d}", hour, minute
        plural = "minute" if minute in {1, 59} else "minutes"
        if minute < 30:
            return f"{_number(rng, minute)} {plural} past {say_hour}", hour, minute
        return f"{_number(rng, 60 - minute)} {plural} to {before}", hour, minute
    if style < 0.7 and minute >= 10:
        return f"{number_words(hour)} {number_words(minute, rng.random() < 0.3)}", hour, minute
    if style < 0.73 and 0 < minute < 10:
        return f"{number_words(hour)} oh {number_words(minute)}", hour, minute
    if minute == 0 and rng.random() < 0.7:
        return str(hour), hour, 0
    return f"{hour}{'.' if rng.random() < 0.08 else ':'}{minute:02d}", hour, minute


def _part_hours(rng: Random, part: str) -> tuple[str, str]:
    """A clock phrase that makes sense in that part of the day, and its 24-hour value."""
    while True:
        phrase, hour, minute = _clock12(rng)
        if part == "morning" and hour <= 11:
            return phrase, _hhmm(hour, minute)
        if part == "afternoon" and (hour == 12 or hour <= 6):
            return phrase, _hhmm(hour % 12 + 12, minute)
        if part == "evening" and 4 <= hour <= 11:
            return phrase, _hhmm(hour + 12, minute)
        if part == "night" and 7 <= hour <= 11:
            return phrase, _hhmm(hour + 12, minute)


def clock(rng: Random) -> When:
    """A time of day without a preposition: "half past six", "7pm", "19:30", "9 in the evening"."""
    style = rng.random()
    if style < 0.04:
        phrase, time = rng.choice([("noon", "12:00"), ("midday", "12:00"), ("midnight", "00:00")])
        return When(phrase, time)
    if style < 0.20:  # 24-hour clock
        hour, minute = rng.randrange(24), _minute(rng)
        lead = f"{hour:02d}" if rng.random() < 0.7 else str(hour)
        return When(f"{lead}:{minute:02d}", _hhmm(hour, minute))
    if style < 0.48:  # am and pm
        half = rng.choice(["am", "pm"])
        hour, minute = rng.randint(1, 12), _minute(rng)
        mark = rng.choice([half, half, half, half.upper(), f"{half[0]}.m."])
        text = str(hour) if minute == 0 and rng.random() < 0.85 else f"{hour}:{minute:02d}"
        if rng.random() < 0.15:
            text = number_words(hour) + (f" {number_words(minute)}" if minute >= 10 else "")
            minute = minute if minute >= 10 else 0
            return When(f"{text} {mark}", _hhmm(hour % 12 + (12 if half == "pm" else 0), minute))
        gap = rng.choice(["", " ", " "])
        return When(f"{text}{gap}{mark}", _hhmm(hour % 12 + (12 if half == "pm" else 0), minute))
    if style < 0.68:
        part = rng.choice(["morning", "afternoon", "evening", "night"])
        phrase, time = _part_hours(rng, part)
        return When(f"{phrase} {'at night' if part == 'night' else f'in the {part}'}", time)
    phrase, hour, minute = _clock12(rng)
    return When(phrase, _hhmm(hour, minute))


def day(rng: Random) -> When:
    """A day: "tomorrow", "on Friday", "every day"."""
    style = rng.random()
    if style < 0.34:
        return When("tomorrow", day="tomorrow")
    if style < 0.42:
        return When("today", day="today")
    if style < 0.74:
        name = rng.choice(WEEKDAYS)
        lead = rng.choice(["on ", "on ", "on ", "", "next ", "this ", "this coming "])
        return When(lead + name, day=name.lower())
    if style < 0.84:
        phrase = rng.choice(["every day", "every day", "daily", "each day", "every single day"])
        return When(phrase, day="daily")
    if style < 0.94:
        phrase = rng.choice(
            ["on weekdays", "every weekday", "each weekday", "Monday to Friday", "from Monday to Friday",
             "on working days", "every working day"]
        )  # fmt: skip
        return When(phrase, day="weekdays")
    phrase = rng.choice(["on weekends", "at weekends", "every weekend", "at the weekend", "on the weekend"])
    return When(phrase, day="weekends")


def clock_and_day(rng: Random, at: str = "at") -> When:
    """Both, with the preposition: "tomorrow at seven", "at 9 on Friday", "tonight at 8"."""
    style = rng.random()
    if style < 0.35:
        t, d = clock(rng), day(rng)
        return When(f"{at} {t.phrase} {d.phrase}", t.time, d.day)
    if style < 0.60:
        t, d = clock(rng), day(rng)
        comma = rng.choice(["", "", "", ","])
        return When(f"{d.phrase}{comma} at {t.phrase}", t.time, d.day)
    if style < 0.80:  # tonight, this morning
        part = rng.choice(["morning", "afternoon", "evening", "night", "night", "evening"])
        phrase, time = _part_hours(rng, part)
        name = "tonight" if part == "night" else f"this {part}"
        return When(rng.choice([f"{name} at {phrase}", f"at {phrase} {name}"]), time, "today")
    part = rng.choice(["morning", "afternoon", "evening", "night"])
    phrase, time = _part_hours(rng, part)
    if rng.random() < 0.65:
        name, value = rng.choice(["tomorrow"] * 2 + ["tomorrow"]), "tomorrow"
    elif rng.random() < 0.7:
        weekday = rng.choice(WEEKDAYS)
        name, value = rng.choice(["on ", "on ", "", "next "]) + weekday, weekday.lower()
    else:
        name, value = "every", "daily"
    return When(rng.choice([f"{name} {part} at {phrase}", f"at {phrase} {name} {part}"]), time, value)


def loose_day(rng: Random) -> When:
    """A day on which no clock time is given: "tomorrow evening", "tonight"."""
    style = rng.random()
    if style < 0.7:
        return day(rng)
    part = rng.choice(["morning", "afternoon", "evening", "night"])
    if style < 0.8:
        return When("tonight" if part == "night" else f"this {part}", day="today")
    if style < 0.9:
        return When(f"tomorrow {part}", day="tomorrow")
    name = rng.choice(WEEKDAYS)
    return When(f"on {name} {part}", day=name.lower())


def duration(rng: Random) -> When:
    """A span of time: "20 minutes", "an hour and a half"."""
    style = rng.random()
    if style < 0.45:
        n = rng.randrange(5, 95, 5) if rng.random() < 0.5 else rng.randint(1, 120)
        unit = "minute" if n == 1 else rng.choice(["minutes"] * 5 + ["mins", "min"])
        return When(f"{_number(rng, n)} {unit}", minutes=n)
    if style < 0.65:
        return rng.choice(
            [
                When("half an hour", minutes=30),
                When("half an hour", minutes=30),
                When("half hour", minutes=30),
                When("a quarter of an hour", minutes=15),
                When("three quarters of an hour", minutes=45),
                When("an hour", minutes=60),
                When("an hour", minutes=60),
                When("one hour", minutes=60),
                When("1 hour", minutes=60),
                When("an hour and a half", minutes=90),
                When("one and a half hours", minutes=90),
                When("an hour and a quarter", minutes=75),
                When("a minute", minutes=1),
                When("a couple of hours", minutes=120),
                When("a couple of minutes", minutes=2),
                When("a full hour", minutes=60),
            ]
        )
    n = rng.randint(1, 12) if rng.random() < 0.6 else rng.randint(2, 4)
    unit = "hour" if n == 1 else rng.choice(["hours"] * 5 + ["hrs"])
    if style < 0.78:
        return When(f"{_number(rng, n)} {unit}", minutes=60 * n)
    if style < 0.84 and n > 1:
        return When(f"{_number(rng, n)} and a half hours", minutes=60 * n + 30)
    m = rng.randrange(5, 60, 5) if rng.random() < 0.9 else rng.randint(2, 59)
    joint = rng.choice([" and ", " and ", " ", ", "])
    hours = "an hour" if n == 1 and rng.random() < 0.6 else f"{_number(rng, n)} {unit}"
    return When(f"{hours}{joint}{_number(rng, m)} minutes", minutes=60 * n + m)


def from_now(rng: Random) -> When:
    """A moment counted from now: "in 20 minutes", "an hour from now"."""
    span = duration(rng)
    form = rng.choice(["in {}", "in {}", "in {}", "in {}", "{} from now", "after {}", "in about {}"])
    return When(form.format(span.phrase), minutes=span.minutes)
