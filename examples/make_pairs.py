"""Makes pairs.jsonl: what somebody says to the home of make_commands.py, and two answers, of which the first is the better one.

    python examples/make_pairs.py > examples/pairs.jsonl

Where the home can do what is asked, the better answer is the command. The worse one has a slot that is wrong, missing or made up,
or talks where a program waits for a command. Where the home can't, since it has no such device or the request leaves out what it
must say, the better answer refuses or asks for what is missing, as a command too; the worse one makes something up, or gives
no reason. No request is one of commands.jsonl, and none comes twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from random import Random
from typing import Any, NamedTuple

import make_commands
from make_commands import CHORES, DAYS, GENRES, LABELS, PEOPLE, PIECES, ROOMS, SYSTEM, TITLES, Command, politely

NUM_ROWS = 600
SEED = 11


class Case(NamedTuple):
    request: str
    better: str
    worse: str


# fmt: off
NOT_HERE = {
    "oven": ("preheat the oven to {} degrees", (160, 180, 200, 220)), "car": ("start the car in {} minutes", (5, 10, 15)),
    "front door": ("unlock the front door for {}", PEOPLE), "safe": ("open the safe for {}", PEOPLE),
    "vacuum": ("vacuum the {}", ROOMS), "camera": ("show me the camera in the {}", ROOMS),
    "sprinkler": ("water the lawn for {} minutes", (10, 20, 30)), "kettle": ("boil {} cups of water", (2, 3, 4)),
    "bath": ("run a bath at {} degrees", (36, 38, 40)), "pool": ("heat the pool to {} degrees", (24, 26, 28)),
    "window": ("open the window in the {}", ROOMS), "projector": ("start the projector in the {}", ROOMS),
    "dishwasher": ("run the dishwasher at {} degrees", (50, 60, 70)), "television": ("turn on the television in the {}", ROOMS),
}
"""Devices that this home has not: what is asked of them."""
WRONG = {
    "room": ROOMS, "device": ("light", "fan", "blinds", "speaker"), "label": LABELS, "title": TITLES, "what": GENRES,
    "to": PEOPLE, "day": ("today", "tomorrow", *(name[:3].lower() for name in DAYS)), "unit": ("kg", "l"),
}
COUNTED = ("time", "level", "celsius", "minutes", "amount")
MADE_UP = {
    "set": ("minutes", 30), "heat": ("minutes", 60), "timer": ("repeat", 2), "alarm": ("label", "wake up"),
    "event": ("minutes", 60), "remind": ("repeat", "daily"), "buy": ("store", "market"), "play": ("level", 80),
    "message": ("time", "18:00"),
}
"""By action, a slot that nobody asked for."""
BARE = ("I'm sorry, I can't help with that.", "That is not possible.", "I am only a language model.", "Error.")
# fmt: on


def written(command: Command) -> str:
    return json.dumps(command, separators=(",", ":"))


def wrong_slot(rng: Random, request: str, command: Command) -> str:
    """One slot says something else: another room, half a day later, a larger number."""
    slot = rng.choice([name for name in command if name in WRONG or name in COUNTED])
    return written(command | {slot: other(rng, slot, command[slot])})


def other(rng: Random, slot: str, value: Any) -> Any:
    if slot == "time":
        hour, minute = value.split(":")
        return f"{(int(hour) + 12) % 24:02}:{minute}" if rng.random() < 0.5 else f"{hour}:{(int(minute) + 15) % 60:02}"
    if slot == "level":
        return 100 - value if value != 50 else 5
    if slot in COUNTED:
        return value + rng.choice((1, 2, 10))
    return rng.choice([known for known in WRONG[slot] if known != value])


def missing_slot(rng: Random, request: str, command: Command) -> str:
    slot = rng.choice(list(command)[1:])
    return written({name: value for name, value in command.items() if name != slot})


def made_up_slot(rng: Random, request: str, command: Command) -> str:
    slot, value = MADE_UP[command["action"]]
    return written(command | {slot: value})


def talk(rng: Random, request: str, command: Command) -> str:
    """Says that it is done, where a program waits for a command."""
    return rng.choice(
        ("Sure! I have done it: {}.", "Of course. {}: consider it done!", "You said: {}. I will see to it.")
    ).format(request)


def wrapped(rng: Random, request: str, command: Command) -> str:
    form = rng.choice(("Here is the command: {}", "```json\n{}\n```", "{}\nIs there anything else that I can do for you?"))
    return form.format(written(command))


WORSE = (wrong_slot, missing_slot, wrong_slot, made_up_slot, talk, wrapped)


def done(rng: Random) -> Case:
    """A request that the home can meet."""
    request, command = rng.choice(make_commands.INTENTS)(rng)
    return Case(politely(rng, request), written(command), rng.choice(WORSE)(rng, request, command))


def refused(rng: Random) -> Case:
    """A request for a device that is not there."""
    device, (form, values) = rng.choice(list(NOT_HERE.items()))
    value = rng.choice(values)
    invented = written({"action": "set", "device": device, "level": value if isinstance(value, int) else 100})
    worse = rng.choice((invented, invented, rng.choice(BARE)))
    return Case(politely(rng, form.format(value)), written({"action": "refuse", "reason": f"there is no {device}"}), worse)


def asked_back(rng: Random) -> Case:
    """A request that leaves out what the home must know."""
    room, chore, title, person = rng.choice(ROOMS), rng.choice(CHORES), rng.choice(TITLES), rng.choice(PEOPLE)
    request, about, guess = rng.choice(
        (
            (f"remind me to {chore}", "time", {"action": "remind", "text": chore, "day": "today", "time": "18:00"}),
            (f"add {title} to my calendar", "time", {"action": "event", "title": title, "day": "today", "time": "12:00"}),
            (f"wake me up {day_said(rng)}", "time", {"action": "alarm", "day": "tomorrow", "time": "07:00"}),
            (f"set a timer for the {rng.choice(LABELS)}", "minutes", {"action": "timer", "minutes": 10}),
            (f"heat the {room}", "celsius", {"action": "heat", "room": room, "celsius": 21}),
            (f"play something in the {room}", "what", {"action": "play", "what": "jazz", "room": room}),
            (f"send {person} a message", "text", {"action": "message", "to": person, "text": "hello"}),
            (f"we need {rng.choice(PIECES)}", "amount", {"action": "buy", "amount": 6}),
        )
    )
    worse = rng.choice((written(guess), written(guess), rng.choice(BARE)))
    return Case(politely(rng, request), written({"action": "ask", "missing": about}), worse)


def day_said(rng: Random) -> str:
    return rng.choice(("tomorrow", *(f"on {name}" for name in DAYS)))


KINDS: tuple[Callable[[Random], Case], ...] = (done, done, refused, done, done, asked_back)


def cases(rng: Random, but: frozenset[str]) -> Iterator[Case]:
    """Without end, the kinds in turn. No request is one of `but`, and none comes twice."""
    seen = set(but)
    for kind in cycle(KINDS):
        case = kind(rng)
        while case.request in seen:
            case = kind(rng)
        seen.add(case.request)
        yield case


def requests_of_commands() -> frozenset[str]:
    return frozenset(request for request, _ in make_commands.made())


def made() -> list[Case]:
    rng = Random(SEED)
    rows = list(islice(cases(rng, requests_of_commands()), NUM_ROWS))
    rng.shuffle(rows)
    return rows


def main() -> None:
    for request, better, worse in made():
        row = {
            "system": SYSTEM,
            "conversations": [{"from": "human", "value": request}],
            "chosen": {"from": "gpt", "value": better},
            "rejected": {"from": "gpt", "value": worse},
        }
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
