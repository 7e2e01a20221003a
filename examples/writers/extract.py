"""Orders as people write them, and the same orders as JSON.

An answer always has the five fields in the same order; what the note does not say is null. The held-out notes use
names, items and cities that training never shows, and half of them a wording that training never shows either.
"""

from __future__ import annotations

import json
import string
from random import Random


def _words(text: str) -> list[str]:
    """Words or phrases between commas, over any number of lines."""
    return [" ".join(word.split()) for word in text.split(",")]


FIELDS = ("name", "item", "quantity", "city", "day")
NUMBER_WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]  # from 2
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

INSTRUCTIONS = ("Extract the order: ", "Order note: ", "Take down this order: ", "What was ordered? ")
FIRST = _words(
    """
    Maria, James, Aisha, Tom, Elena, Victor, Priya, Daniel, Sofia, Henrik, Grace, Omar, Julia, Marcus, Ines, Peter,
    Hannah, Luis, Nadia, Oscar, Clara, Samuel, Yuki, Andrea, Felix, Rosa, Ivan, Lena, Arthur, Mei, Beatriz, Cyrus,
    Dorothy, Emeka, Florence, Gustav, Hiroshi, Imani, Jerome, Katarina, Lorenzo, Margot, Nikolai, Octavia, Pablo,
    Quentin, Rashid, Svetlana, Tobias, Ursula, Vanessa, Wilhelm, Xavier, Yasmin, Zoltan, Abigail, Bogdan, Camille,
    Dmitri, Esperanza, Farah, Giorgio, Harriet, Isidora, Joaquin, Kenji, Lucinda, Mirko, Noemi, Olivia, Philippa,
    Roderick, Shanti, Thaddeus, Umberto, Viola, Winston, Yolanda, Zainab, Anders, Bridget
    """
)
LAST = _words(
    """
    Lopez, Carter, Khan, Fischer, Novak, Silva, Patel, Brooks, Rossi, Larsen, Okafor, Haddad, Moreau, Stone, Vega,
    Walsh, Weber, Ortiz, Petrov, Lindgren, Duarte, Price, Tanaka, Conti, Hoffman, Santos, Volkov, Berg, Doyle, Chen,
    Abernathy, Bianchi, Castellano, Dubois, Eriksson, Fitzgerald, Gupta, Hashimoto, Ivanova, Jankowski, Kowalczyk,
    Lefebvre, Montgomery, Nakamura, Oyelaran, Papadakis, Quigley, Ramirez, Schneider, Takahashi, Underwood, Vasquez,
    Whitaker, Yamada, Zielinski, Achterberg, Bergstrom, Chaudhary, Delacroix, Espinoza, Ferreira, Goldstein,
    Higgins, Iyer, Johansson, Kaplan, Lombardi, Mukherjee, Nwosu, Osterman, Pemberton, Rasmussen, Sinclair,
    Thornton, Ulrich, Vandermeer, Wolanski, Yildiz, Zamora, Beaumont, Crawford
    """
)
ITEMS = _words(
    """
    desk lamps, office chairs, coffee mugs, blue notebooks, rain jackets, garden hoses, paint brushes, bath towels,
    wall clocks, phone cases, wool blankets, bicycle tires, dinner plates, leather belts, picture frames,
    water bottles, printer cartridges, hiking boots, steel shelves, flower pots, yoga mats, cotton shirts,
    kitchen knives, door handles, light bulbs, storage boxes, travel bags, wine glasses, table fans, soup bowls
    """
)
CITIES = _words(
    """
    Oslo, Lisbon, Chicago, Berlin, Toronto, Madrid, Prague, Dublin, Boston, Vienna, Osaka, Lyon, Denver, Warsaw,
    Naples, Geneva, Seattle, Athens, Porto, Hamburg, Leeds, Turin, Dallas, Bergen, Antwerp, Bilbao, Cardiff,
    Dresden, Edinburgh, Florence, Gdansk, Helsinki, Istanbul, Jakarta, Kampala, Leipzig, Marseille, Nairobi, Odense,
    Palermo, Quito, Riga, Salzburg, Tallinn, Utrecht, Verona, Winnipeg, Yerevan, Zagreb, Adelaide, Bordeaux,
    Cleveland, Durban, Eindhoven, Fukuoka, Glasgow, Hanover, Innsbruck, Johannesburg, Kathmandu, Ljubljana,
    Montevideo, Nashville, Ottawa, Portland, Rostock, Stavanger, Tbilisi, Uppsala, Vancouver, Wellington, Aarhus,
    Baltimore, Cordoba, Debrecen, Exeter, Freiburg, Graz, Heidelberg, Lausanne
    """
)

HELD_OUT_INSTRUCTIONS = ("Write down the order: ", "New order: ")
HELD_OUT_FIRST = _words(
    """
    Ruth, Diego, Amira, Walter, Fiona, Kofi, Helen, Mateo, Ingrid, Simon, Leila, Bruno
    """
)
HELD_OUT_LAST = _words(
    """
    Jensen, Romero, Abbas, Fletcher, Murphy, Mensah, Sutton, Ibarra, Holm, Keller, Farouk, Costa
    """
)
HELD_OUT_ITEMS = _words(
    """
    floor rugs, metal buckets, silk scarves, tennis rackets, reading glasses, pillow covers, garden chairs,
    tea pots, laptop stands, winter gloves, candle holders, toy trains
    """
)
HELD_OUT_CITIES = _words(
    """
    Rome, Bristol, Houston, Zurich, Krakow, Malmo, Valencia, Kyoto, Austin, Ghent
    """
)

TEMPLATES = (
    "{name} from {city} would like {quantity} {item} by {day}.",
    "Please send {quantity} {item} to {name} in {city}, delivery on {day}.",
    "{quantity} {item} for {name}, to arrive in {city} on {day}.",
    "Hello, this is {name}. I need {quantity} {item} in {city} before {day}.",
    "We promised {name} that {quantity} {item} will reach {city} on {day}.",
    "On {day} the van goes to {city} with {quantity} {item} for {name}.",
    "{name} called: {quantity} {item}, please, at the {city} address by {day}.",
    "Ship {quantity} {item} to {city} for {name} no later than {day}.",
    "Could you get {quantity} {item} to {city} by {day}? The name is {name}.",
    "By {day} our customer {name} in {city} expects {quantity} {item}.",
    "My name is {name} and I want to buy {quantity} {item}. Bring them to {city} on {day}.",
    "Order from {city}: {name} asks for {quantity} {item}, wanted on {day}.",
    "{name} wants {quantity} {item} sent to {city}.",
    "Reserve {quantity} {item} for {name} in {city}, no hurry.",
    "{name} will pick up {quantity} {item} on {day}.",
    "Put aside {quantity} {item} for {name} until {day}.",
    "Someone in {city} ordered {quantity} {item} for {day}.",
    "{quantity} {item} go to {city} on {day}, the buyer gave no name.",
    "{name} has bought {quantity} {item}.",
    "Send some {item} to {name} in {city} on {day}.",
)
HELD_OUT_TEMPLATES = (
    "I am {name}, I live in {city}, and I would like {quantity} {item} on {day}.",
    "{day} delivery for {name}: {quantity} {item}, {city}.",
    "Our shop in {city} has to hand {quantity} {item} to {name} by {day}.",
    "Please pack {quantity} {item} for {name}; the truck to {city} leaves on {day}.",
    "{name} needs {quantity} {item} delivered to {city}.",
    "Keep {quantity} {item} for {name}, who comes on {day}.",
)


def write(rng: Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) pairs to train on and held out."""
    train = [_order(rng, TEMPLATES[i % len(TEMPLATES)], INSTRUCTIONS, FIRST, LAST, ITEMS, CITIES) for i in range(400)]
    new = (HELD_OUT_FIRST, HELD_OUT_LAST, HELD_OUT_ITEMS, HELD_OUT_CITIES)
    held_out = [_order(rng, TEMPLATES[i % len(TEMPLATES)], INSTRUCTIONS, *new) for i in range(30)]
    held_out += [
        _order(rng, HELD_OUT_TEMPLATES[i % len(HELD_OUT_TEMPLATES)], HELD_OUT_INSTRUCTIONS, *new) for i in range(30)
    ]
    return train, held_out


def _order(
    rng: Random,
    template: str,
    instructions: tuple[str, ...],
    first: list[str],
    last: list[str],
    items: list[str],
    cities: list[str],
) -> tuple[str, str]:
    quantity = rng.randint(2, 12) if rng.random() < 0.6 else rng.randint(13, 90)
    spelled = NUMBER_WORDS[quantity - 2] if quantity <= 12 and rng.random() < 0.5 else str(quantity)
    fields = {
        "name": f"{rng.choice(first)} {rng.choice(last)}",
        "item": rng.choice(items),
        "quantity": quantity,
        "city": rng.choice(cities),
        "day": rng.choice(DAYS),
    }
    note = template.format(**{**fields, "quantity": spelled})
    said = {slot for _, slot, _, _ in string.Formatter().parse(template)}
    answer = {field: fields[field] if field in said else None for field in FIELDS}
    return rng.choice(instructions) + note[0].upper() + note[1:], json.dumps(answer)
