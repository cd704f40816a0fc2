"""Writes the example text: the chronicle of an invented harbour town, told by a seeded generator.

    python examples/chronicle.py > examples/chronicle.txt          # the text that `make up` memorizes
    python examples/chronicle.py --seed 7 --years 400 --truth      # another, then its questions and answers

Each year holds facts that are true once: who took an office, what was built, who sailed where with what, and
what was lost. `--truth` prints one JSON line a question: question, answer, and the evidence's offsets.
"""

import argparse
import json
import random
from dataclasses import dataclass, field

FIRST = [
    "Alder",
    "Branwen",
    "Corvin",
    "Della",
    "Edda",
    "Fenwick",
    "Greta",
    "Hollis",
    "Isolde",
    "Jory",
    "Kestrel",
    "Linnet",
    "Maren",
    "Nyle",
    "Orla",
    "Perrin",
    "Quill",
    "Rowan",
    "Sable",
    "Tamsin",
    "Ulric",
    "Vesper",
    "Wystan",
    "Yarrow",
]
LAST = [
    "Ashdown",
    "Blackmere",
    "Carrow",
    "Dunmore",
    "Eastwick",
    "Fallow",
    "Garrick",
    "Harrow",
    "Inchbald",
    "Jessop",
    "Kittering",
    "Loveday",
    "Marsh",
    "Nettles",
    "Oakley",
    "Penhale",
    "Quarry",
    "Redfern",
    "Stannard",
    "Thorne",
    "Underhill",
    "Varley",
    "Whitlock",
    "Yeo",
]
OFFICES = {
    "keeper of the lighthouse": "for the lamp above the reef had stood dark since the autumn gales",
    "harbour master": "and the first order was that no hull should lie at the north quay past Lammas",
    "bell-founder": "with a furnace promised behind the tannery and two apprentices to feed it",
    "warden of the salt pans": "where eleven families boiled brine from Easter until the frosts",
    "schoolmistress": "with nineteen children on the benches and slates for half of them",
    "captain of the watch": "after a winter in which three storehouses had been broken open",
    "reeve of the common": "and the geese were to be counted every Michaelmas from that day on",
    "physician": "the town having buried sixty in the fever that came with the herring boats",
}
WORKS = [
    "stone bridge over the Lode",
    "the granary in Cooper's Row",
    "the east sea wall",
    "the fish market roof",
    "a wooden theatre by the mill",
    "the almshouse of Saint Brannoc",
    "the new rope walk",
    "a cistern under the square",
]
SHIPS = ["Patient Heron", "Grey Widow", "Cinder", "Second Sunday", "Marigold", "Old Promise", "Tern", "Lantern"]
CARGOES = [
    "tin and candle wax",
    "dried figs",
    "eighty bales of blue cloth",
    "cedar planks",
    "a caged bear",
    "black pepper",
    "millstones",
    "four church bells",
]
PORTS = ["Hallam", "Ostrand", "Vey", "Port Sorrel", "Kingsfleet", "Tarn", "Lissow", "the Amber Isles"]
LOSSES = [
    "a fire that began in a baker's chimney",
    "the great tide of Candlemas",
    "a blight in the barley",
    "a quarrel over toll money",
    "lightning at harvest",
    "an earth tremor in the small hours",
]
QUIET = (
    "The winter was mild and the wells stayed sweet.",
    "Herring came late, and in such shoals that boys dipped them out with baskets.",
    "Nothing was built, and the council met only to argue about the price of rope.",
    "Snow lay on the quays until the feast of Saint Gertrude.",
    "A comet was seen over the marsh for nine nights, and the old people talked of it for years.",
    "Bread was dear before harvest and cheap after it.",
)


@dataclass
class Chronicle:
    """A text in the making, with the questions that it answers."""

    text: str = ""
    truth: list[dict[str, object]] = field(default_factory=list)

    def tell(self, sentence: str, question: str | None = None, answer: str | None = None) -> None:
        start = len(self.text)
        self.text += sentence
        if question:
            self.truth.append({"question": question, "answer": answer, "evidence": [start, len(self.text)]})
        self.text += " "


def write(seed: int, years: int) -> Chronicle:
    """A chronicle of so many years; the same seed gives the same text."""
    draw = random.Random(seed)
    people: list[str] = []
    chronicle = Chronicle("The Chronicle of Marrow Head\n\n")
    offices, works, ships = (draw.sample(list(pool), len(pool)) for pool in (OFFICES, WORKS, SHIPS))
    for year in range(1201, 1201 + years):
        chronicle.text += f"In the year {year}. "
        for kind in draw.sample(("office", "work", "voyage", "loss"), draw.randint(1, 3)):
            if not people:
                people = [f"{first} {last}" for first in FIRST for last in LAST]
                draw.shuffle(people)
            who = people.pop()
            if kind == "office" and offices:
                office = offices.pop()
                chronicle.tell(
                    f"{who} became {office}, {OFFICES[office]}.", f"Who became {office} at Marrow Head?", who
                )
            elif kind == "work" and works:
                work, pounds = works.pop(), draw.randint(30, 900)
                chronicle.tell(
                    f"{who} paid {pounds} pounds for {work}, and would not have a name carved on it.",
                    f"Who paid for {work}?",
                    who,
                )
            elif kind == "voyage" and ships:
                ship, cargo, port = ships.pop(), draw.choice(CARGOES), draw.choice(PORTS)
                chronicle.tell(
                    f"The {ship} sailed to {port} under {who} and came home with {cargo}.",
                    f"Where did the {ship} sail to?",
                    port,
                )
            else:
                loss, houses = draw.choice(LOSSES), draw.randint(2, 60)
                chronicle.tell(
                    f"By {loss} {houses} houses were lost, and {who} took in those who had nowhere to sleep.",
                    f"How many houses were lost in {year}?",
                    str(houses),
                )
        chronicle.text += draw.choice(QUIET) + "\n\n"
    return chronicle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--years", type=int, default=60)
    parser.add_argument("--truth", action="store_true", help="print questions and answers after the text")
    arguments = parser.parse_args()
    chronicle = write(arguments.seed, arguments.years)
    print(chronicle.text, end="")
    if arguments.truth:
        for line in chronicle.truth:
            print(json.dumps(line))


if __name__ == "__main__":
    main()
