"""Makes diary.jsonl: plain text, what the home of make_commands.py writes down of a day.

python examples/make_diary.py > examples/diary.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from random import Random

from make_commands import CHORES, DAYS, GENRES, LABELS, MESSAGES, PEOPLE, PIECES, ROOMS, TITLES

NUM_ROWS = 400
SEED = 17
WEATHER = ("It is raining", "The sun is out", "It snowed in the night", "It is windy", "There is fog outside", "The sky is grey")
NIGHTS = ("All lights are off.", "The house is quiet.", "The doors are locked and the heating is down.", "Everybody is asleep.")


def light(rng: Random, who: str) -> str:
    room, level = rng.choice(ROOMS), rng.randrange(10, 100, 10)
    return f"{who} wants more light in the {room}, and the lamp there goes to {level} percent."


def warmth(rng: Random, who: str) -> str:
    room, degrees = rng.choice(ROOMS), rng.randint(17, 23)
    return f"It is too cold for {who} in the {room}. The heating there is set to {degrees} degrees."


def music(rng: Random, who: str) -> str:
    return f"{who} listens to {rng.choice(GENRES)} in the {rng.choice(ROOMS)}."


def timer(rng: Random, who: str) -> str:
    return f"A timer for the {rng.choice(LABELS)} is set by {who}, and rings {rng.randint(5, 45)} minutes later."


def shopping(rng: Random, who: str) -> str:
    return f"{who} puts {rng.randint(2, 12)} {rng.choice(PIECES)} on the shopping list."


def reminder(rng: Random, who: str) -> str:
    return f"{who} is reminded to {rng.choice(CHORES).replace('my', 'the')}."


def event(rng: Random, who: str) -> str:
    return f"{who} leaves the house. In the calendar it says {rng.choice(TITLES)}."


def message(rng: Random, who: str) -> str:
    friend = rng.choice([name for name in PEOPLE if name != who])
    return f'{who} writes to {friend}: "{rng.choice(MESSAGES)}."'


THINGS: tuple[Callable[[Random, str], str], ...] = (light, warmth, music, timer, shopping, reminder, event, message)


def day(rng: Random) -> str:
    family = rng.sample(PEOPLE, 3)
    hours = sorted(rng.sample(range(7, 23), rng.randint(4, 7)))
    lines = [f"{rng.choice(DAYS)}. {rng.choice(WEATHER)}."]
    lines += [f"At {hour}:{rng.choice((0, 15, 30, 45)):02}: {rng.choice(THINGS)(rng, rng.choice(family))}" for hour in hours]
    return " ".join([*lines, rng.choice(NIGHTS)])


def main() -> None:
    rng = Random(SEED)
    for _ in range(NUM_ROWS):
        sys.stdout.write(json.dumps({"text": day(rng)}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
