"""Questions about one table, and the SQL that answers them.

The prompt gives the table's name and columns, so the skill carries over to tables it was not trained on: every held-out
question is about a table that training never shows, and half of them are worded in a way training never shows either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Table:
    """A table: what its rows are called, the column that names a row, numbers, and texts with their values."""

    name: str
    key: str
    numbers: dict[str, tuple[int, ...]]
    texts: dict[str, tuple[str, ...]]

    @property
    def heading(self) -> str:
        return f"{self.name} ({', '.join(('id', self.key, *self.numbers, *self.texts))})"


def _table(name: str, key: str, numbers: str, texts: str) -> Table:
    """Columns as "column: value value; column: value value"."""

    def columns(spec: str) -> list[tuple[str, list[str]]]:
        return [(column.strip(), values.split()) for column, values in (part.split(":") for part in spec.split(";"))]

    return Table(
        name,
        key,
        {column: tuple(int(value) for value in values) for column, values in columns(numbers)},
        {column: tuple(values) for column, values in columns(texts)},
    )


TABLES = (
    _table(
        "employees",
        "name",
        "salary: 30000 45000 60000; age: 25 40 55",
        "department: sales legal purchasing; city: Oslo Lyon Stockholm",
    ),
    _table(
        "products",
        "title",
        "price: 10 25 80; stock: 5 50 300",
        "category: toys garden lighting; brand: Acme Nordia Velvetine",
    ),
    _table(
        "students", "name", "grade: 60 75 90; age: 12 15 18", "school: Hillside Northgate; country: Spain Japan Ecuador"
    ),
    _table(
        "movies",
        "title",
        "year: 1980 1999 2015; rating: 5 7 9",
        "genre: comedy horror western; language: French Hindi Swahili",
    ),
    _table(
        "orders",
        "customer",
        "total: 100 250 900; items: 2 5 20",
        "status: paid open canceled; city: Berlin Porto Marseille",
    ),
    _table(
        "flights",
        "code",
        "distance: 500 1200 4000; seats: 90 180 300",
        "airline: Skyway Aerolux; origin: Rome Delhi Reykjavik",
    ),
    _table(
        "cars",
        "model",
        "price: 9000 15000 30000; power: 70 110 200",
        "color: red white turquoise; maker: Volta Kestrel",
    ),
    _table(
        "books",
        "title",
        "pages: 120 300 700; year: 1950 1990 2010",
        "author: Woolf Orwell Dostoevsky; genre: poetry crime",
    ),
    _table(
        "patients",
        "name",
        "weight: 55 70 95; age: 30 50 80",
        "ward: north south maternity; doctor: Meyer Singh Okonkwo",
    ),
    _table(
        "houses",
        "address",
        "price: 90000 200000; rooms: 2 4 7",
        "town: Bath York Shrewsbury; style: modern rustic victorian",
    ),
    _table(
        "players", "name", "goals: 5 10 30; height: 170 185 200", "team: Rovers United Albion; position: keeper winger"
    ),
    _table(
        "songs",
        "title",
        "length: 120 180 300; plays: 1000 50000",
        "artist: Luna Marlow; album: Tides Ember Kaleidoscope",
    ),
    _table(
        "rivers", "name", "length: 200 900 3000; depth: 5 20 60", "country: Brazil Norway Madagascar; basin: east west"
    ),
    _table(
        "invoices", "client", "amount: 75 400 2000; tax: 10 50 300", "currency: EUR USD; state: late settled disputed"
    ),
    _table(
        "dogs", "name", "weight: 8 20 45; age: 2 6 11", "breed: poodle beagle dachshund; owner: Kim Brown Gallagher"
    ),
    _table("hotels", "name", "stars: 2 3 4; rooms: 20 80 250", "city: Paris Cairo Singapore; chain: Astra Lumenova"),
)
HELD_OUT_TABLES = (
    _table("teachers", "name", "salary: 28000 42000; years: 3 10 25", "subject: physics music; school: Elmwood Ashby"),
    _table("cities", "name", "population: 20000 500000; area: 40 150", "country: Chile Poland; region: coast hills"),
    _table("phones", "model", "price: 150 400 900; memory: 64 128 256", "brand: Orbit Pixelon; color: green black"),
    _table("recipes", "title", "minutes: 15 30 90; calories: 200 450 800", "cuisine: Thai Greek; level: easy hard"),
    _table("ships", "name", "length: 60 140 300; crew: 12 40 900", "flag: Malta Panama; port: Genoa Rotterdam"),
    _table("concerts", "band", "price: 20 45 120; seats: 200 1500", "venue: Arena Apollo; month: May October"),
)

# Each: question, SQL. {t} table, {k} key column, {n} a number column and {a} a value of it, {x} {y} text columns and
# {v} {w} values of them, {c} a small count.
TEMPLATES = (
    ("Which {t} have a {n} above {a}?", "SELECT {k} FROM {t} WHERE {n} > {a};"),
    ("List the {k} of all {t} with a {n} under {a}.", "SELECT {k} FROM {t} WHERE {n} < {a};"),
    ("Which {t} have at least {a} in {n}?", "SELECT {k} FROM {t} WHERE {n} >= {a};"),
    ("Which {t} have {v} as {x}?", "SELECT {k} FROM {t} WHERE {x} = '{v}';"),
    ("How many {t} are there?", "SELECT COUNT(*) FROM {t};"),
    ("Count all {t} with a {n} over {a}.", "SELECT COUNT(*) FROM {t} WHERE {n} > {a};"),
    ("How many {t} have the {x} {v}?", "SELECT COUNT(*) FROM {t} WHERE {x} = '{v}';"),
    ("How many {t} have a {n} above {a}?", "SELECT COUNT(*) FROM {t} WHERE {n} > {a};"),
    ("What is the average {n} of the {t}?", "SELECT AVG({n}) FROM {t};"),
    ("What is the average {n} of {t} whose {x} is {v}?", "SELECT AVG({n}) FROM {t} WHERE {x} = '{v}';"),
    ("What is the total {n} of {t} whose {x} is {v}?", "SELECT SUM({n}) FROM {t} WHERE {x} = '{v}';"),
    ("What is the highest {n}?", "SELECT MAX({n}) FROM {t};"),
    ("What is the lowest {n}?", "SELECT MIN({n}) FROM {t};"),
    ("Which of the {t} has the highest {n}?", "SELECT {k} FROM {t} ORDER BY {n} DESC LIMIT 1;"),
    ("Which of the {t} has the lowest {n}?", "SELECT {k} FROM {t} ORDER BY {n} ASC LIMIT 1;"),
    ("Show the top {c} {t} by {n}.", "SELECT {k} FROM {t} ORDER BY {n} DESC LIMIT {c};"),
    ("How many {t} are there for each {x}?", "SELECT {x}, COUNT(*) FROM {t} GROUP BY {x};"),
    ("What is the average {n} for each {x}?", "SELECT {x}, AVG({n}) FROM {t} GROUP BY {x};"),
    ("Which different values of {x} do the {t} have?", "SELECT DISTINCT {x} FROM {t};"),
    ("Show everything about {t} whose {x} is {v}.", "SELECT * FROM {t} WHERE {x} = '{v}';"),
    ("Show all columns of the {t} with the {x} {v}.", "SELECT * FROM {t} WHERE {x} = '{v}';"),
    ("Show everything about the {t} with a {n} over {a}.", "SELECT * FROM {t} WHERE {n} > {a};"),
    (
        "Which {t} whose {x} is {v} have a {n} above {a}?",
        "SELECT {k} FROM {t} WHERE {x} = '{v}' AND {n} > {a};",
    ),
    (
        "List the {k} of all {t} with the {x} {v} and the {y} {w}.",
        "SELECT {k} FROM {t} WHERE {x} = '{v}' AND {y} = '{w}';",
    ),
    ("What are the {n} and the {x} of all {t}?", "SELECT {n}, {x} FROM {t};"),
    ("List all {t} sorted by {n}.", "SELECT {k} FROM {t} ORDER BY {n} ASC;"),
)
HELD_OUT_TEMPLATES = (
    ("Give me the {k} of {t} with a {n} above {a}.", "SELECT {k} FROM {t} WHERE {n} > {a};"),
    ("Count the {t} whose {x} is {v}.", "SELECT COUNT(*) FROM {t} WHERE {x} = '{v}';"),
    ("Tell me the average {n} of all {t}.", "SELECT AVG({n}) FROM {t};"),
    ("Find the {t} with the {x} {v}.", "SELECT {k} FROM {t} WHERE {x} = '{v}';"),
    ("Show me all about {t} whose {x} is {v}.", "SELECT * FROM {t} WHERE {x} = '{v}';"),
    ("How many {t} are there with a {n} over {a}?", "SELECT COUNT(*) FROM {t} WHERE {n} > {a};"),
)


def write(rng: Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) pairs to train on and held out."""
    pairs = [(template, table) for template in TEMPLATES for table in TABLES]  # 26 × 16
    train = [_question(rng, template, table) for template, table in pairs]
    held_out = [
        _question(rng, TEMPLATES[i % len(TEMPLATES)], HELD_OUT_TABLES[i % len(HELD_OUT_TABLES)]) for i in range(26)
    ]
    held_out += [_question(rng, template, table) for template in HELD_OUT_TEMPLATES for table in HELD_OUT_TABLES]
    return train, held_out


def _question(rng: Random, template: tuple[str, str], table: Table) -> tuple[str, str]:
    n = rng.choice(sorted(table.numbers))
    x, y = rng.sample(sorted(table.texts), 2)
    slots = {
        **{"t": table.name, "k": table.key, "n": n, "x": x, "y": y},
        **{"v": rng.choice(table.texts[x]), "w": rng.choice(table.texts[y])},
        **{"a": rng.choice(table.numbers[n]), "c": rng.choice((3, 5, 10))},
    }
    question, query = (text.format(**slots) for text in template)
    question = re.sub(r"\ba (?=[aeiou])", "an ", question)
    return f"Table {table.heading}\n{question}", query
