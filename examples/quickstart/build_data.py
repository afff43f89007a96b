"""Build the quickstart data set: plain English request -> one JSON command.

The phrasings (`phrasings.json`) and the values for their slots (`values.json`) are
written by hand; this script only fills them in.  It writes `train.jsonl` and
`heldout.jsonl` beside itself, the same bytes every time.  No held-out phrasing
occurs in training, and about a third of the held-out rows also use slot values
that training never shows.

    python build_data.py           write both files
    python build_data.py --check   verify the files that are there
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240607
TRAIN_PER_COMMAND = 60
HELDOUT_PER_COMMAND = 8
MAX_WORDS = 20

# The arguments of each command, in the order the completion gives them.
SCHEMA: dict[str, tuple[str, ...]] = {
    "set_timer": ("minutes",),
    "set_alarm": ("time",),
    "set_lights": ("room", "state"),
    "set_temperature": ("room", "degrees"),
    "play_music": ("artist",),
    "send_message": ("to", "text"),
    "add_to_list": ("item",),
    "get_weather": ("city",),
}
POLITE_WORDS = {"please", "hey", "nova", "thanks"}

Value = str | int
Row = dict[str, str]


@dataclass(frozen=True)
class Group:
    """Phrasings that share a command and its fixed (not spoken) arguments."""

    command: str
    fixed: dict[str, Value]
    train: list[str]
    heldout: list[str]


@dataclass(frozen=True)
class Phrasings:
    """What the hand-written files hold: templates, and values for their slots."""

    groups: list[Group]
    values: dict[str, list[Value]]
    fresh: dict[str, list[Value]]  # used by held-out rows only

    def groups_per_command(self) -> Counter[str]:
        """Count the groups that share each command's rows."""
        return Counter(group.command for group in self.groups)


class Deck:
    """Deals every slot's values in shuffled order, reshuffling when used up."""

    def __init__(self, values: dict[str, list[Value]], rng: random.Random) -> None:
        """Start with nothing dealt."""
        self._values = values
        self._rng = rng
        self._left: dict[str, list[Value]] = {slot: [] for slot in values}

    def draw(self, slot: str) -> Value:
        """Deal the next value of a slot."""
        if not self._left[slot]:
            self._left[slot] = list(self._values[slot])
            self._rng.shuffle(self._left[slot])
        return self._left[slot].pop()


def load_phrasings() -> Phrasings:
    """Read the hand-written files."""
    groups = json.loads((HERE / "phrasings.json").read_text(encoding="utf-8"))
    values = json.loads((HERE / "values.json").read_text(encoding="utf-8"))
    return Phrasings(
        groups=[Group(**group) for group in groups],
        values=values["training"],
        fresh=values["heldout_only"],
    )


def to_json(value: dict[str, Value] | Row) -> str:
    """Serialise the one way this data set uses."""
    return json.dumps(value, separators=(", ", ": "))


def make_row(group: Group, template: str, deck: Deck) -> Row:
    """Fill one template with values from the deck."""
    slots = [name for name in SCHEMA[group.command] if name not in group.fixed]
    drawn = {slot: deck.draw(slot) for slot in slots} | group.fixed
    command: dict[str, Value] = {"command": group.command}
    command |= {name: drawn[name] for name in SCHEMA[group.command]}
    return {"prompt": template.format(**drawn), "completion": to_json(command)}


def cycle_shuffled(templates: list[str], rng: random.Random) -> Iterator[str]:
    """Yield the templates for ever, each pass in a new order."""
    while True:
        yield from rng.sample(templates, len(templates))


def train_rows(phrasings: Phrasings, rng: random.Random) -> list[Row]:
    """Use every training template about equally often; never the same prompt twice."""
    deck = Deck(phrasings.values, rng)
    per_command = phrasings.groups_per_command()
    rows: dict[str, Row] = {}
    for group in phrasings.groups:
        wanted = len(rows) + TRAIN_PER_COMMAND // per_command[group.command]
        templates = cycle_shuffled(group.train, rng)
        while len(rows) < wanted:
            row = make_row(group, next(templates), deck)
            rows.setdefault(row["prompt"], row)
    return rng.sample(list(rows.values()), len(rows))


def heldout_rows(phrasings: Phrasings, rng: random.Random) -> list[Row]:
    """Use every held-out template once; every third one gets unseen values."""
    known = Deck(phrasings.values, rng)
    fresh = Deck(phrasings.fresh, rng)
    rows = [
        make_row(group, template, fresh if index % 3 == 1 else known)
        for group in phrasings.groups
        for index, template in enumerate(group.heldout)
    ]
    return rng.sample(rows, len(rows))


def build(phrasings: Phrasings) -> dict[str, list[Row]]:
    """Make the rows of both files."""
    rng = random.Random(SEED)
    return {
        "train.jsonl": train_rows(phrasings, rng),
        "heldout.jsonl": heldout_rows(phrasings, rng),
    }


def encode(rows: Iterable[Row]) -> bytes:
    """Give the bytes of a JSON Lines file."""
    return "".join(to_json(row) + "\n" for row in rows).encode("ascii")


def skeleton(template: str) -> str:
    """Reduce a template to its words: no case, punctuation or politeness."""
    words = re.findall(r"\{\w+\}|[\w']+", template.lower())
    return " ".join(word for word in words if word not in POLITE_WORDS)


def template_problems(phrasings: Phrasings) -> Iterator[str]:
    """Yield repeated templates, wrong slots, and values that are not held out."""
    seen: set[str] = set()
    for group in phrasings.groups:
        spoken = sorted(set(SCHEMA[group.command]) - set(group.fixed))
        for template in group.train + group.heldout:
            if skeleton(template) in seen:
                yield f"template occurs twice: {template}"
            seen.add(skeleton(template))
            if sorted(re.findall(r"\{(\w+)\}", template)) != spoken:
                yield f"template has the wrong slots: {template}"
    for slot, values in phrasings.fresh.items():
        for value in set(values) & set(phrasings.values[slot]):
            yield f"{slot} {value} is both a training and a fresh value"


def row_problems(row: Row) -> Iterator[str]:
    """Yield what is wrong with one row taken by itself."""
    prompt, completion = row["prompt"], row["completion"]
    command: dict[str, Value] = json.loads(completion)
    if to_json(command) != completion:
        yield f"completion does not re-serialise to itself: {completion}"
    if list(command) != ["command", *SCHEMA.get(str(command["command"]), ())]:
        yield f"completion does not follow the schema: {completion}"
    for name, value in command.items():
        if name not in ("command", "state") and str(value) not in prompt:
            yield f"{name} cannot be copied from the prompt: {prompt}"
    if len(prompt.split()) > MAX_WORDS:
        yield f"prompt is longer than {MAX_WORDS} words: {prompt}"
    if re.search(r"\b[Aa] (8|11\b|18\b|[aeiou])", prompt):
        yield f"article should be 'an': {prompt}"


def set_problems(train: list[Row], heldout: list[Row]) -> Iterator[str]:
    """Yield wrong counts and prompts that occur more than once in the two files."""
    prompts = Counter(row["prompt"].lower() for row in train + heldout)
    for prompt, count in prompts.items():
        if count > 1:
            yield f"prompt occurs {count} times: {prompt}"
    for rows, wanted in ((train, TRAIN_PER_COMMAND), (heldout, HELDOUT_PER_COMMAND)):
        counts = Counter(json.loads(row["completion"])["command"] for row in rows)
        if counts != dict.fromkeys(SCHEMA, wanted):
            yield f"expected {wanted} rows of each command, got {dict(counts)}"


def problems(phrasings: Phrasings) -> Iterator[str]:
    """Yield what is wrong with the rows, and with the files that should hold them."""
    files = build(phrasings)
    for name, rows in files.items():
        path = HERE / name
        if not path.exists() or path.read_bytes() != encode(rows):
            yield f"{name} is not what this script would write"
        for row in rows:
            yield from row_problems(row)
    yield from template_problems(phrasings)
    yield from set_problems(files["train.jsonl"], files["heldout.jsonl"])


def check(phrasings: Phrasings) -> int:
    """Print the problems found; return the exit status."""
    found = list(problems(phrasings))
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"{len(found)} problems found" if found else "ok")
    return 1 if found else 0


def write(phrasings: Phrasings) -> int:
    """Write both files; return the exit status."""
    for name, rows in build(phrasings).items():
        (HERE / name).write_bytes(encode(rows))
        print(f"{name}: {len(rows)} rows")
    return 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the quickstart data set.")
    parser.add_argument("--check", action="store_true", help="verify the files instead")
    arguments = parser.parse_args()
    phrasings = load_phrasings()
    return check(phrasings) if arguments.check else write(phrasings)


if __name__ == "__main__":
    sys.exit(main())
