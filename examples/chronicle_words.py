"""The words chronicles are made of: names, offices, things, and the sentences and questions of each relation.

`examples/chronicles.py` tells chronicles with them. Names are joined from two syllables, and one name in five is
held out: it is in no chronicle of the split `train`. Each relation holds out its last templates likewise.
"""

import re
from dataclasses import dataclass
from itertools import product

_ONSETS = [
    "Aber",
    "Bran",
    "Cor",
    "Del",
    "Ed",
    "Fen",
    "Gret",
    "Hol",
    "Isk",
    "Jor",
    "Kes",
    "Lud",
    "Mar",
    "Nor",
    "Or",
    "Per",
    "Quil",
    "Row",
    "Sab",
    "Tam",
    "Ulk",
    "Ves",
    "Wyk",
    "Yar",
    "Baz",
    "Cad",
    "Dun",
    "Eld",
    "Gar",
    "Had",
    "Ivek",
    "Lor",
]
_ENDINGS = [
    "win",
    "ven",
    "vin",
    "la",
    "da",
    "wick",
    "ta",
    "lis",
    "olde",
    "dan",
    "trel",
    "net",
    "en",
    "by",
    "rin",
    "gar",
    "ra",
    "dric",
    "na",
    "mer",
    "sin",
    "ric",
    "per",
    "stan",
    "bert",
    "ley",
]
_PORT_ONSETS = [
    "Hal",
    "Ost",
    "Vey",
    "King",
    "Tar",
    "Lim",
    "Sor",
    "Amb",
    "Bir",
    "Cald",
    "Dov",
    "Esk",
    "Fal",
    "Grim",
    "Hul",
    "Kir",
    "Lun",
    "Mor",
    "Nes",
    "Pol",
]
_PORT_ENDINGS = [
    "lam",
    "rand",
    "mouth",
    "fleet",
    "haven",
    "sow",
    "rel",
    "ford",
    "wick",
    "holm",
    "port",
    "ness",
    "ton",
    "stead",
    "by",
    "sund",
]


def _named(onsets: list[str], endings: list[str], held_out: bool) -> tuple[str, ...]:
    """All joined names of one side; every onset and every ending is on both sides."""
    return tuple(
        dict.fromkeys(
            onset + ending
            for (i, onset), (j, ending) in product(enumerate(onsets), enumerate(dict.fromkeys(endings)))
            if ((i + j) % 5 == 0) == held_out
        )
    )


SYLLABLES = (*(f" {onset}" for onset in (*_ONSETS, *_PORT_ONSETS)), *_ENDINGS, *_PORT_ENDINGS)
PEOPLE = {held: _named(_ONSETS, _ENDINGS, held) for held in (False, True)}
PORTS = {held: _named(_PORT_ONSETS, _PORT_ENDINGS, held) for held in (False, True)}

OFFICES = tuple(
    f"{first} {second}"
    for first, second in product(
        ("lighthouse", "watch", "salt", "council", "gate", "mill", "ferry", "granary", "bell", "harbour"),
        ("keeper", "warden", "captain", "master", "clerk"),
    )
)
GIFTS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("silver", "golden", "wooden", "carved", "painted", "broken"),
        ("bell", "cup", "lamp", "cross", "chair", "book", "shield", "key"),
    )
)
STREETS = tuple(
    f"{first} {second}"
    for first, second in product(
        ("Cooper", "Tanner", "Gull", "Candle", "Rope", "Willow", "Herring", "Smith", "Fountain", "Orchard"),
        ("Row", "Lane", "Street", "Yard", "Hill"),
    )
)
FINDS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("Roman", "black", "white", "green", "giant", "hollow"),
        ("coin", "stone", "skull", "ring", "anchor", "horn", "pearl", "sword"),
    )
)
WORKS = tuple(
    f"the {first} {second}"
    for first, second in product(
        ("east", "west", "old", "new", "brick", "high", "long"),
        ("wall", "bridge", "pier", "tower", "market", "school", "well"),
    )
)
GOODS = tuple(
    f"{first} {second}"
    for first, second in product(
        ("blue", "red", "fine", "rough", "Flemish", "northern"), ("cloth", "wax", "soap", "glass", "yarn", "leather")
    )
)
BEASTS = tuple(
    f"the {first} {second}"
    for first, second in product(
        ("grey", "brown", "lame", "night", "marsh"), ("wolf", "bear", "bull", "owl", "dog", "boar", "hare")
    )
)


def roman(year: int) -> str:
    """A year as chronicles write it; unlike digits, one word and one token."""
    signs = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
             (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))  # fmt: skip
    written = ""
    for value, sign in signs:
        written += sign * (year // value)
        year %= value
    return written


TOLD_YEARS = tuple(roman(year) for year in range(1150, 1300))
YEARS = TOLD_YEARS[:50]  # of births; events come after them
EVENTS = tuple(
    f"a {first} {second}"
    for first, second in product(
        ("great", "dry", "bitter", "strange", "sudden"), ("tide", "fire", "frost", "fever", "storm", "comet", "famine")
    )
)

QUIET = (
    "The winter was mild and the wells stayed sweet.",
    "Snow lay on the quays until the feast of Saint Gertrude.",
    "Bread was dear before harvest and cheap after it.",
    "The council met only to argue about tolls.",
    "Nothing else was written down that month.",
    "It rained for nine days.",
    "It was told at every hearth.",
    "Nobody knew who rang the bells.",
)

OPENINGS = (
    "Then {p}",
    "Later {p}",
    "Once {p}",
    "Soon {p}",
    "Again {p}",
    "Meanwhile {p}",
    "Still {p}",
    "Here {p}",
    "It was {p} who",
)


def openings(verb: int, held_out: bool) -> tuple[str, ...]:
    """What the `verb`-th verb of a relation may follow, besides a bare {p}; a quarter of the pairs is held out."""
    return tuple(opening for place, opening in enumerate(OPENINGS) if held_out or (verb + place) % 4)


@dataclass(frozen=True)
class Relation:
    """What can be told of a person, and how it is told and asked. Of questions, the last one is held out.

    `hidden` asks for the value without a content word that any of the sentences has; {who} is a description of the
    person by another relation's `described`.
    """

    values: tuple[str, ...] | None  # none: drawn from the split's own names (ports, people)
    verbs: tuple[str, ...]  # between person and value
    direct: tuple[str, ...]  # asks for {v} by {p}
    hidden: tuple[str, ...]  # asks for {v} by {who}
    described: str = ""  # {who}, by {v}; empty where values repeat

    @property
    def inverse(self) -> tuple[str, ...]:
        """Asks for {p} by {v}; none where values repeat."""
        return tuple(f"Who {verb} {{v}}?" for verb in self.verbs) if self.described else ()


RELATIONS = {
    "voyage": Relation(
        None,
        ("sailed to", "rowed to", "travelled to"),
        ("Where did {p} sail?", "Where did {p} row?", "Which port did {p} visit?", "Where was it {p} sailed to?"),
        ("What haven did {who} reach?", "Which haven did {who} enter?", "Which haven did {who} reach?"),
    ),
    "office": Relation(
        OFFICES,
        ("became", "was made", "was chosen"),
        ("What did {p} become?", "What was {p} made?", "What was {p} chosen?"),
        ("What post did {who} hold?", "Which duty did {who} have?", "Which post did {who} have?"),
        "the {v}",
    ),
    "gift": Relation(
        GIFTS,
        ("gave", "donated", "presented"),
        ("What did {p} give?", "What did {p} donate?", "What was donated by {p}?", "What was given by {p}?"),
        ("What offering came from {who}?", "Which offering did {who} make?", "Which offering came from {who}?"),
        "the giver of {v}",
    ),
    "home": Relation(
        STREETS,
        ("lived in", "dwelt in", "moved to"),
        ("Where did {p} live?", "Where was it {p} lived?", "Where did {p} dwell?", "Where was it {p} dwelt?"),
        ("What was the address of {who}?", "Which was the door of {who}?", "Which was the address of {who}?"),
    ),
    "find": Relation(
        FINDS,
        ("found", "dug up", "discovered"),
        ("What did {p} find?", "What did {p} dig up?", "What was found by {p}?", "What was dug up by {p}?"),
        ("Which treasure did {who} own?", "What treasure had {who}?", "What treasure did {who} own?"),
        "the finder of {v}",
    ),
    "work": Relation(
        WORKS,
        ("built", "mended", "paid for"),
        ("What did {p} build?", "What was it {p} built?", "What did {p} mend?", "What was built by {p}?"),
        (
            "What does the town owe to {who}?",
            "Which labour was begun by {who}?",
            "Which labour does the town owe to {who}?",
        ),
        "the builder of {v}",
    ),
    "trade": Relation(
        GOODS,
        ("sold", "traded", "imported"),
        ("What did {p} sell?", "What was sold by {p}?", "What did {p} trade?", "What was it {p} sold?"),
        ("Which wares made {who} rich?", "What wares had {who}?", "What wares made {who} rich?"),
    ),
    "fear": Relation(
        BEASTS,
        ("feared", "fled", "dreaded"),
        ("What did {p} fear?", "What was it {p} feared?", "What did {p} flee?", "What was feared by {p}?"),
        (
            "Which animal frightened {who}?",
            "What animal was the terror of {who}?",
            "Which animal was the terror of {who}?",
        ),
    ),
    "birth": Relation(
        YEARS,
        ("was born in", "was baptised in", "was christened in"),
        ("When was {p} born?", "When was it {p} was born?", "When was {p} baptised?", "When was {p} christened?"),
        (
            "How far back does the life of {who} go?",
            "What is the first date of {who}?",
            "How far back does the first date of {who} go?",
        ),
    ),
    "marriage": Relation(
        None,
        ("married", "wed", "courted"),
        (
            "Whom did {p} marry?",
            "Whom did {p} wed?",
            "Whom was it {p} married?",
            "Whom did {p} court?",
            "Whom was it {p} courted?",
        ),
        (
            "Who was the spouse of {who}?",
            "What was the name of the spouse of {who}?",
            "Which name had the spouse of {who}?",
        ),
    ),
}

_TEMPLATES = [
    t for r in RELATIONS.values() for t in (*r.verbs, *r.direct[:-1], *r.inverse[:-1], *r.hidden[:-1], r.described)
]
_FRAMES = ("In the year came a", "The year", "given", *(opening.replace("{p}", "") for opening in OPENINGS))
_VALUES = (*OFFICES, *GIFTS, *STREETS, *FINDS, *WORKS, *GOODS, *BEASTS, *EVENTS)
WORDS = tuple(sorted(set(re.findall(r"[A-Za-z]+", " ".join((*_TEMPLATES, *_VALUES, *_FRAMES, *QUIET))))))
