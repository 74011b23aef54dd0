"""Makes commands.jsonl: what somebody says to a home assistant, and the command as JSON that a program can run.

    python examples/make_commands.py > examples/commands.jsonl

Times become 24-hour, days their three letters, numbers and amounts digits, units their symbols; a slot that was not said is
left out. No two rows ask for the same command, so a held-out row is always a new combination.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from random import Random
from typing import Any

NUM_ROWS = 1100
SEED = 7
SYSTEM = "You run a smart home."

Command = dict[str, Any]

# fmt: off
ROOMS = ("kitchen", "bedroom", "bathroom", "living room", "office", "hallway", "garage", "nursery", "attic", "basement")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
TITLES = (
    "dentist", "haircut", "team lunch", "yoga class", "book club", "swimming lesson", "band practice", "job interview",
    "piano lesson", "car service", "eye test", "game night", "parents evening", "budget review", "dinner with Sam",
)
CHORES = (
    "water the plants", "call mom", "pay the rent", "take out the trash", "feed the cat", "renew my passport", "walk the dog",
    "charge the car", "return the library books", "clean the fridge", "take my pills", "send the invoice", "back up my laptop",
)
LABELS = ("pasta", "laundry", "eggs", "tea", "pizza", "nap", "homework", "workout", "bread", "rice", "parking", "meditation")
PIECES = ("eggs", "lemons", "avocados", "onions", "bananas", "batteries", "light bulbs", "bagels", "candles", "tomatoes")
GOODS = {"kg": ("flour", "sugar", "potatoes", "rice", "apples"), "l": ("milk", "orange juice", "olive oil", "oat milk")}
UNITS = {"kg": ("kilo", "kilos"), "l": ("liter", "liters")}
GENRES = ("jazz", "rock", "folk", "soul", "techno", "classical music", "the news", "rain sounds", "hip hop", "disco", "opera")
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Maya", "Noah", "Olga", "Paul")
MESSAGES = (
    "I am running late", "dinner is ready", "see you at the station", "the meeting is cancelled", "happy birthday", "I am home",
    "call me back", "the package is here", "bring an umbrella", "thanks for the cake", "I lost my keys", "good luck today",
)
# fmt: on


def spoken(number: int) -> str:
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def either(rng: Random, number: int) -> str:
    """The number in digits or in words."""
    return rng.choice((str(number), spoken(number)))


def time_of_day(rng: Random) -> tuple[str, str]:
    """A quarter of an hour between 6:00 and 22:45, as it is said and as HH:MM."""
    hour, minute = rng.randint(6, 22), rng.choice((0, 15, 30, 45))
    written = f"{hour:02}:{minute:02}"
    if written == "12:00" and rng.random() < 0.5:
        return "noon", written
    return rng.choice((clock_24, clock_12, clock_12, in_words))(hour, minute), written


def clock_24(hour: int, minute: int) -> str:
    return f"{hour}:{minute:02}"


def clock_12(hour: int, minute: int) -> str:
    minutes = f":{minute:02}" if minute else ""
    return f"{twelve(hour)}{minutes} {'am' if hour < 12 else 'pm'}"


def in_words(hour: int, minute: int) -> str:
    said = {0: "{}", 15: "quarter past {}", 30: "half past {}", 45: "quarter to {}"}[minute]
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    return f"{said.format(spoken(twelve(hour + (minute == 45))))} in the {part}"


def twelve(hour: int) -> int:
    return (hour - 1) % 12 + 1


def day(rng: Random) -> tuple[str, str]:
    """A day as it is said after a verb, and as a slot."""
    if rng.random() < 0.3:
        name = rng.choice(("today", "tomorrow"))
        return name, name
    name = rng.choice(DAYS)
    return rng.choice(("on {}", "this {}")).format(name), name[:3].lower()


def day_and_time(rng: Random) -> tuple[str, Command]:
    (said_day, day_slot), (said_time, time_slot) = day(rng), time_of_day(rng)
    said = rng.choice(("{day} at {time}", "at {time} {day}")).format(day=said_day, time=said_time)
    return said, {"day": day_slot, "time": time_slot}


def set_level(rng: Random) -> tuple[str, Command]:
    """A device of a room from 0 to 100 percent."""
    device, room, level = rng.choice(("light", "fan", "blinds", "speaker")), rng.choice(ROOMS), rng.randrange(0, 101, 5)
    off, on = {
        "light": (("turn off", "switch off"), ("turn on", "switch on")),
        "fan": (("turn off", "stop"), ("turn on", "start")),
        "blinds": (("close", "shut"), ("open", "raise")),
        "speaker": (("mute", "silence"), ("turn up", "turn on")),
    }[device]
    place = rng.choice((f"the {room} {device}", f"the {device} in the {room}"))
    if level in (0, 100):
        return f"{rng.choice(on if level else off)} {place}", {"action": "set", "device": device, "room": room, "level": level}
    amount = rng.choice((f"{level}%", f"{level} percent", f"{spoken(level)} percent"))
    if level == 50 and rng.random() < 0.5:
        amount = "half"
    request = rng.choice(("set {} to {}", "put {} at {}", "I want {} at {}", "change {} to {}")).format(place, amount)
    return request, {"action": "set", "device": device, "room": room, "level": level}


def heat(rng: Random) -> tuple[str, Command]:
    room, degrees = rng.choice(ROOMS), rng.randint(15, 25)
    unit = rng.choice(("degrees", "degrees", "°C"))
    amount = f"{degrees}°C" if unit == "°C" else f"{either(rng, degrees)} degrees"
    request = rng.choice(("heat the {} to {}", "make it {1} in the {0}", "set the {} to {}", "warm the {} up to {}"))
    command = {"action": "heat", "room": room, "celsius": degrees}
    if rng.random() < 0.3:
        return request.format(room, amount), command
    said, written = time_of_day(rng)
    return f"{request.format(room, amount)} {rng.choice(('at', 'from'))} {said}", command | {"time": written}


def timer(rng: Random) -> tuple[str, Command]:
    named = {15: "a quarter of an hour", 30: "half an hour", 60: "an hour", 90: "an hour and a half", 120: "two hours"}
    minutes = rng.choice((*range(2, 60), *named))
    length = named.get(minutes) or f"{either(rng, minutes)} minutes"
    label = rng.choice(LABELS)
    request = rng.choice(
        (
            "set a timer for {length} for the {label}",
            "start a {label} timer for {length}",
            "time the {label} for {length}",
            "{label} timer, {length}",
        )
    )
    return request.format(length=length, label=label), {"action": "timer", "minutes": minutes, "label": label}


def alarm(rng: Random) -> tuple[str, Command]:
    repeated = {"every day": "daily", "on weekdays": "weekdays", "on weekends": "weekends"}
    said_day, day_slot = rng.choice(list(repeated.items())) if rng.random() < 0.4 else day(rng)
    said_time, time_slot = time_of_day(rng)
    request = rng.choice(("wake me up {day} at {time}", "set an alarm for {time} {day}", "I need to get up at {time} {day}"))
    return request.format(day=said_day, time=said_time), {"action": "alarm", "day": day_slot, "time": time_slot}


def event(rng: Random) -> tuple[str, Command]:
    title, (when, slots) = rng.choice(TITLES), day_and_time(rng)
    request = rng.choice(("add {} {} to my calendar", "schedule {} {}", "book {} {}", "put {} in my calendar {}"))
    return request.format(title, when), {"action": "event", "title": title, **slots}


def remind(rng: Random) -> tuple[str, Command]:
    chore, (when, slots) = rng.choice(CHORES), day_and_time(rng)
    request = rng.choice(("remind me {when} to {chore}", "remind me to {chore} {when}", "don't let me forget to {chore} {when}"))
    return request.format(when=when, chore=chore), {"action": "remind", "text": chore, **slots}


def buy(rng: Random) -> tuple[str, Command]:
    if rng.random() < 0.6:
        item, count = rng.choice(PIECES), rng.randint(2, 24)
        amount = "a dozen" if count == 12 else "a couple of" if count == 2 else either(rng, count)
        command = {"action": "buy", "item": item, "amount": count}
    else:
        unit = rng.choice(tuple(GOODS))
        item, count = rng.choice(GOODS[unit]), rng.choice((0.5, *range(1, 13)))
        one, many = UNITS[unit]
        said = {0.5: f"half a {one}", 1: f"a {one}"}.get(count) or f"{either(rng, int(count))} {many}"
        amount, command = f"{said} of", {"action": "buy", "item": item, "amount": count, "unit": unit}
    request = rng.choice(("add {} {} to the shopping list", "we need {} {}", "buy {} {}", "put {} {} on my list", "get {} {}"))
    return request.format(amount, item), command


def play(rng: Random) -> tuple[str, Command]:
    genre, room = rng.choice(GENRES), rng.choice(ROOMS)
    request = rng.choice(("play {} in the {}", "put on {} in the {}", "I want to hear {} in the {}", "start {} in the {}"))
    command = {"action": "play", "what": genre, "room": room}
    if rng.random() < 0.4:
        return request.format(genre, room), command
    minutes = rng.randrange(10, 61, 5)
    return f"{request.format(genre, room)} for {either(rng, minutes)} minutes", command | {"minutes": minutes}


def message(rng: Random) -> tuple[str, Command]:
    person, text = rng.choice(PEOPLE), rng.choice(MESSAGES)
    request = rng.choice(("tell {} {}", "text {}: {}", "send {} a message: {}", "message {} that says {}", "let {} know: {}"))
    return request.format(person, text), {"action": "message", "to": person, "text": text}


INTENTS = (set_level, heat, timer, alarm, event, remind, buy, play, message, set_level)


def politely(rng: Random, request: str) -> str:
    form = rng.choice(("{}", "{}", "{}.", "{} please", "Please {}", "Hey, {}", "OK, {}.", "{}, thanks"))
    said = form.format(request)
    return said[0].upper() + said[1:]


def rows(rng: Random) -> Iterator[tuple[str, str]]:
    """Requests and commands without end, the intents in turn; every request and every command comes once."""
    seen: set[str] = set()
    for intent in cycle(INTENTS):
        request, command = new(intent, rng, seen)
        seen.update((request, command))
        yield request, command


def new(intent: Callable[[Random], tuple[str, Command]], rng: Random, seen: set[str]) -> tuple[str, str]:
    while True:
        request, command = intent(rng)
        said, written = politely(rng, request), json.dumps(command, separators=(",", ":"))
        if said not in seen and written not in seen:
            return said, written


def made() -> list[tuple[str, str]]:
    """The requests and commands of the file, in its order."""
    rng = Random(SEED)
    pairs = list(islice(rows(rng), NUM_ROWS))
    rng.shuffle(pairs)
    return pairs


def main() -> None:
    for request, command in made():
        turns = (("system", SYSTEM), ("user", request), ("assistant", command))
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
