"""Names, rooms, apps, things to be reminded of and things to say: what sentences are filled with.

Every list is split once into a training part and a held-out part; a `Words` draws from one of the two only.
A share of the fillers is made of invented words and loose words, so that the model learns to copy what it has never
seen. The held-out part has few of them: nobody calls a room "kyjioy".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random

from .text import items

HELD_OUT_SHARE = 0.15
# Changed when somebody has looked at what the model misses on the held-out side: the split is then drawn anew.
SPLIT = "5"
ODD_WHEN_HELD_OUT = 0.3  # of the share of invented and loose words on the training side


def is_held_out(item: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a list item belongs to the held-out part; depends on the item alone."""
    return int.from_bytes(hashlib.sha256(f"{SPLIT}/{item}".encode()).digest()[:4], "big") < share * (1 << 32)


_LISTS = items("words")
_COLORS, _VERBS, _TAILS = _LISTS["colors"], _LISTS["verbs"], _LISTS["tails"]
_ADJECTIVES, _PLACES = _LISTS["adjectives"], _LISTS["places"]
# The two sides of the split share these: they carry the grammar, not what is copied.
SHARED = frozenset({"colors", "verbs", "verbs to people", "verbs to items", "tails", "adjectives", "places"})
SHARED |= {"occasions", "news", "onsets"}
LISTED = {word.lower() for listed in _LISTS.values() for item in listed for word in item.split()}
_FREQUENT = [
    "to",
    "me",
    "the",
    "a",
    "my",
    "I'm",
    "that",
    "know",
    "tell",
    "say",
    "remind",
    "reminder",
    "note",
    "message",
    "text",
    "alarm",
    "light",
    "lights",
    "on",
    "off",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ee", "ou", "ia", "ya", "oo", "ei"]
_CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "d", "x", "nd", "rt", "sh", "ng", "ff", "lls", "ck"]


def _part(items: Sequence[str], held_out: bool) -> list[str]:
    return [item for item in items if is_held_out(item) == held_out]


class Words:
    """Draws fillers from one side of the split."""

    def __init__(self, held_out: bool) -> None:
        self.held_out = held_out
        part = {name: _part(listed, held_out) for name, listed in _LISTS.items() if name not in SHARED}
        self._names, self._surnames, self._relations = part["names"], part["surnames"], part["relations"]
        self._rooms, self._apps = part["rooms"], part["apps"]
        self._items, self.things, self._activities = part["items"], part["things"], part["activities"]
        self.events, self.clauses, self.cities = part["events"], part["clauses"], part["cities"]
        every = {
            word
            for name, listed in _LISTS.items()
            if name != "onsets"
            for item in listed
            for word in item.split()
        }
        self._any = _part(sorted(every), held_out)
        self._loose_things, self._loose_kinds = part["loose things"], part["loose kinds"]
        self._loose_people, self._loose_doings = part["loose people"], part["loose doings"]

    def _odd(self, rng: Random, share: float) -> bool:
        """Whether to fill in something odd, where the training side does so in `share` of the cases."""
        return rng.random() < share * (ODD_WHEN_HELD_OUT if self.held_out else 1.0)

    def _style(self, rng: Random, odd_from: float) -> float:
        """0 to 1, where `odd_from` and above stands for something odd."""
        return odd_from if self._odd(rng, 1.0 - odd_from) else rng.random() * odd_from

    def invented(self, rng: Random) -> str:
        """A word that is on no list, of either side, lower case."""
        while (word := self._invent(rng)) in LISTED:
            pass
        return word

    def _invent(self, rng: Random) -> str:
        if rng.random() < 0.12:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        if rng.random() < 0.06:
            return (
                rng.choice(_LISTS["onsets"])
                + rng.choice("áéíóúäöüøåñçßłšžćêèàôî")
                + rng.choice(_LISTS["onsets"])
                + rng.choice(_VOWELS)
            )
        syllables = [
            rng.choice(_LISTS["onsets"]) + rng.choice(_VOWELS) for _ in range(rng.choice([1, 2, 2, 3]))
        ]
        return "".join(syllables) + rng.choice(_CODAS)

    def phrase(self, rng: Random) -> str:
        """One to three everyday words that somebody might put together: "walnut chapel", "lid of the jar"."""
        style, thing = rng.random(), rng.choice(self._loose_things)
        if style < 0.25:
            return thing
        if style < 0.45:
            return f"{rng.choice(self._loose_kinds)} {thing}"
        if style < 0.65:
            return f"{rng.choice(self._loose_things)} {thing}"
        if style < 0.75:
            return f"{rng.choice([*self._loose_things, *self._loose_kinds])}-{thing}"
        if style < 0.82:
            return f"{rng.choice(self._loose_kinds)} {rng.choice(self._loose_things)} {thing}"
        if style < 0.88:
            return f"{rng.choice(self._any)}-{rng.choice(self._any)} {thing}"
        if style < 0.95:
            joint = rng.choice(
                ["of the", "in the", "for the", "with a", "and the", "on the", "of", "from the"]
            )
            return f"{rng.choice(self._loose_things)} {joint} {thing}"
        return f"{thing} {rng.choice(['of', 'and', 'in a'])} {thing}"  # twice the same word

    def name(self, rng: Random) -> str:
        return self.invented(rng).capitalize() if self._odd(rng, 0.35) else rng.choice(self._names)

    def surname(self, rng: Random) -> str:
        return self.invented(rng).capitalize() if self._odd(rng, 0.35) else rng.choice(self._surnames)

    def city(self, rng: Random) -> str:
        return rng.choice(self.cities) if rng.random() < 0.8 else self.surname(rng)

    def person(self, rng: Random) -> tuple[str, str]:
        """(as said, as the call names them): ("my sister", "sister"), ("Anna Berg", "Anna Berg")."""
        style = rng.random()
        if style < 0.52:
            name = self.name(rng)
            return name, name
        if style < 0.72:
            name = f"{self.name(rng)} {self.surname(rng)}"
            return name, name
        if style < 0.80:
            title = rng.choice(
                ["Dr.", "Dr", "Mr.", "Mrs.", "Mr", "Ms", "Aunt", "Uncle", "Professor", "Grandma"]
            )
            name = f"{title} {self.surname(rng) if title[-1] in '.rs' else self.name(rng)}"
            return name, name
        if self._odd(rng, 0.45):
            relation = rng.choice(self._loose_people)
            if rng.random() < 0.5:
                relation = f"{rng.choice([*self._loose_things, *self._loose_kinds])} {relation}"
            elif rng.random() < 0.2:
                relation = self.invented(rng)
        else:
            relation = rng.choice(self._relations)
        if style < 0.86 and relation in {"mum", "mom", "dad", "grandma", "grandpa"}:
            name = relation if rng.random() < 0.5 else relation.capitalize()
            return name, name
        return f"{rng.choice(['my', 'my', 'my', 'the', 'our'])} {relation}", relation

    def room(self, rng: Random) -> tuple[str, str]:
        """(with article, without): ("the kitchen", "kitchen"), ("Leo's room", "Leo's room")."""
        style = self._style(rng, 0.55)
        if style < 0.10:
            room = f"{self.name(rng)}'s {rng.choice(['room', 'room', 'bedroom', 'office', 'desk'])}"
            return room, room
        if style < 0.55:
            room = rng.choice(self._rooms)
        else:
            room = self.invented(rng) if rng.random() < 0.35 else self.phrase(rng)
            room += rng.choice(
                ["", "", "", " room", " corner", " area", " hall", " floor", " wing", " house"]
            )
        return f"{rng.choice(['the', 'the', 'the', 'the', 'my', 'our'])} {room}", room

    def app(self, rng: Random) -> str:
        if not self._odd(rng, 0.5):
            return rng.choice(self._apps)
        if rng.random() < 0.55:
            words = [
                rng.choice(rng.choice([self._loose_things, self._loose_kinds]))
                for _ in range(rng.choice([1, 2, 2, 3]))
            ]
            if rng.random() < 0.1:
                words[-1] = words[0]
            return (
                "".join(map(str.capitalize, words))
                if rng.random() < 0.2
                else " ".join(map(str.capitalize, words))
            )
        word = self.invented(rng).capitalize()
        return word + rng.choice(["", "", "", "App", "Chat", " News", " Mail", "ly"])

    def color(self, rng: Random) -> str:
        return rng.choice(_COLORS)

    def item(self, rng: Random) -> str:
        one = rng.choice(self._items)
        if self._odd(rng, 0.4):
            one = rng.choice([f"{self.invented(rng)} {one}", self.phrase(rng), self.phrase(rng)])
        if rng.random() < 0.2:
            one += f"{rng.choice([' and', ',', ' or'])} {rng.choice(self._items)}"
        return one

    def salad(self, rng: Random, longest: int = 6) -> str:
        """Words that do not belong together: nothing to rely on but copying."""
        words = [
            rng.choice(self._any) if rng.random() < 0.6 else self.invented(rng)
            for _ in range(rng.randint(1, longest))
        ]
        if rng.random() < 0.4:  # what was said before, to go on differently from there
            for _ in range(rng.randint(1, 2)):
                again = rng.choice([*words, *words, *_FREQUENT])
                words.insert(rng.randrange(len(words) + 1), again)
        if rng.random() < 0.15:
            words.insert(
                rng.randrange(len(words) + 1), str(rng.choice([rng.randint(2, 99), rng.randint(100, 2030)]))
            )
        return " ".join(words)

    def thing(self, rng: Random) -> str:
        """Something one has or deals with: "the invoice", "our guitar tunnel"."""
        if self._odd(rng, 0.35):
            return f"{rng.choice(['the', 'the', 'my', 'a', 'our', 'some', ''])} {self.phrase(rng)}".lstrip()
        return rng.choice(self.things)

    def doing(self, rng: Random) -> str:
        """A verb that takes a thing."""
        return rng.choice(self._loose_doings) if self._odd(rng, 0.4) else rng.choice(_VERBS)

    def task(self, rng: Random) -> str:
        """Something to do, as it follows "remind me to"."""
        style = self._style(rng, 0.82)
        who = self.person(rng)[0]
        if style < 0.30:
            text = f"{self.doing(rng)} {self.thing(rng)}"
        elif style < 0.44:
            verb = rng.choice(_LISTS["verbs to people"])
            text = f"call {who} back" if verb == "call back" else f"{verb} {who}"
            if verb == "wish":
                text += " a happy birthday"
            elif rng.random() < 0.3:
                text += f" about {self.thing(rng)}"
        elif style < 0.58:
            text = f"{rng.choice(_LISTS['verbs to items'])} {self.item(rng)}"
            if rng.random() < 0.2:
                text += f" for {who}"
        elif style < 0.74:
            text = (
                f"{rng.choice(self._loose_doings)} {self.phrase(rng)}"
                if self._odd(rng, 0.3)
                else rng.choice(self._activities)
            )
        elif style < 0.82:
            verb = rng.choice(["pick up", "ask", "help", "drive", "collect", "invite", "tell", "remind"])
            text = f"{verb} {who}" + rng.choice(["", "", f" with {self.thing(rng)}", "'s parents"])
        elif rng.random() < 0.5:
            text = f"{rng.choice(_VERBS)} the {self.invented(rng)}"
        else:
            return f"{rng.choice(_VERBS)} {self.salad(rng, 4)}"
        if rng.random() < 0.34:
            text += f" {self.tail(rng)}"
        return text

    def tail(self, rng: Random) -> str:
        """What may follow something that would be complete without it."""
        style = rng.random()
        if style < 0.45:
            return rng.choice(_TAILS)
        if style < 0.60:
            return f"{rng.choice(['for', 'for', 'with', 'from', 'to'])} {self.person(rng)[0]}"
        if style < 0.70:
            return f"{rng.choice(['in', 'in', 'near', 'from'])} {self.city(rng)}"
        if style < 0.85:
            place = self.phrase(rng) if self._odd(rng, 0.5) else rng.choice(self._rooms)
            return f"{rng.choice(['in', 'from', 'behind', 'next to', 'by', 'to'])} the {place}"
        return f"{rng.choice(['and', 'with', 'for', 'without'])} {self.thing(rng)}"

    def event(self, rng: Random) -> str:
        """Something to think of, as it follows "remind me about"."""
        style = self._style(rng, 0.8)
        if style < 0.5:
            text = rng.choice(self.events)
            if self._odd(rng, 0.3):
                text = f"{rng.choice(['the', 'the', 'my', 'a', 'our'])} {self.phrase(rng)}"
        elif style < 0.6:
            text = f"{self.name(rng)}'s {rng.choice(_LISTS['occasions'])}"
        elif style < 0.7:
            text = self.thing(rng)
        elif style < 0.8:
            meal = rng.choice(["dinner", "lunch", "coffee", "a call", "drinks", "tea", "the meeting"])
            text = f"{meal} with {self.person(rng)[0]}"
        elif rng.random() < 0.5:
            text = f"the {self.invented(rng)} {rng.choice(_LISTS['occasions'])}"
        else:
            return self.salad(rng, 4)
        if rng.random() < 0.28:
            text += rng.choice(
                [
                    f" with {self.name(rng)}",
                    f" at {rng.choice(_PLACES)}",
                    " in town",
                    f" in {self.surname(rng)}",
                    f" {self.tail(rng)}",
                ]
            )
        return text

    def clause(self, rng: Random, loose: bool = True) -> str:
        """Something to say to somebody; with `loose` now and then words that make no phrase."""
        style = self._style(rng, 0.84) if loose else rng.random() * 0.84
        if style < 0.45:
            text = rng.choice(self.clauses)
            if loose and self._odd(rng, 0.3):
                text = rng.choice(
                    [
                        f"the {self.phrase(rng)} {rng.choice(['is', 'was', 'looks'])} {rng.choice(self._loose_kinds)}",
                        f"I {rng.choice(['saw', 'found', 'lost', 'want', 'need', 'like'])} {self.thing(rng)}",
                        f"{rng.choice(['bring', 'take', 'give me', 'where is', 'who has'])} {self.thing(rng)}",
                        f"{rng.choice(self._loose_doings)} {self.thing(rng)} {rng.choice(_TAILS)}",
                    ]
                )
        elif style < 0.57:
            verb = rng.choice(["is", "is", "was", "is still", "will be"])
            text = f"{self.thing(rng)} {verb} {rng.choice(_ADJECTIVES)}"
        elif style < 0.67:
            text = (
                f"I'm at {rng.choice(_PLACES)}" if rng.random() < 0.4 else f"meet me at {rng.choice(_PLACES)}"
            )
        elif style < 0.77:
            lead = rng.choice(
                ["can you", "could you", "please", "I need to", "we have to", "you should", "I'll", "let's"]
            )
            text = f"{lead} {self.task(rng)}"
        elif style < 0.80:
            text = f"we need {self.item(rng)}"
        elif style < 0.84:
            text = f"{self.name(rng)} {rng.choice(_LISTS['news'])}"
        else:
            text = self.salad(rng, 7)
        if rng.random() < (0.18 if self.held_out else 0.3):
            joint = rng.choice([", ", " and ", " but ", ". "])
            first = text.split()[0]
            alike = [clause for clause in self.clauses if clause.split()[0] == first and clause != text]
            text += joint + rng.choice(alike if alike and rng.random() < 0.4 else self.clauses)
        return text
